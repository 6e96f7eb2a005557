"""What a model's tokens cost, and how many tokens a picture is: prices.yaml, or what params.yaml says instead."""

import math
import re
from functools import lru_cache
from pathlib import Path

from ruamel.yaml import YAML

from apprentice.params import Endpoint, Price

_MILLION = 1_000_000


@lru_cache
def table() -> dict:
    """prices.yaml: its date and its models."""
    return YAML(typ="safe").load(Path(__file__).with_name("prices.yaml").read_text())


def _known(model: str) -> dict | None:
    """The row of a model, also when its name ends with a date: gpt-4o-mini-2024-07-18."""
    models = table()["models"]
    return models.get(model) or models.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))


def price(endpoint: Endpoint) -> Price | None:
    """What the endpoint's tokens cost; None if nobody has said."""
    row = _known(endpoint.model)
    if endpoint.price or not row:
        return endpoint.price
    return Price(input=row["input"], cached_input=row["cached_input"], output=row["output"])


def dollars(price: Price, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> float:
    """cached_tokens: how many of the prompt's tokens the provider had in its cache."""
    cached = price.input if price.cached_input is None else price.cached_input
    fresh = prompt_tokens - cached_tokens
    return (fresh * price.input + cached_tokens * cached + completion_tokens * price.output) / _MILLION


def picture_tokens(model: str, width: int, height: int) -> int:
    """Prompt tokens of a picture of this size in pixels: OpenAI's rules, and for other models an upper bound."""
    rule = (_known(model) or {}).get("picture")
    if rule is None:
        # Qwen-VL takes a token for 28 or 32 pixels squared, after enlarging a small picture; others take fewer.
        return max(1024, math.ceil(width / 28) * math.ceil(height / 28))
    if "patch" in rule:
        return math.ceil(min(1536, math.ceil(width / 32) * math.ceil(height / 32)) * rule["patch"])
    shrunk = min(1.0, 2048 / max(width, height))
    shrunk = min(shrunk, 768 / min(width, height))
    tiles = math.ceil(width * shrunk / 512) * math.ceil(height * shrunk / 512)
    return rule["base"] + rule["tile"] * tiles
