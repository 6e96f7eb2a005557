"""What an answer says that it has used, and what it has cost. Endpoints say it in many ways, and some not at all.

What is not said clearly is None, which is not 0: whoever pays has to count the most that it can be.
"""

import math
from typing import Any, NamedTuple

_TICKS = 1e10
"""Of xAI, in a dollar."""


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    """With those of the reasoning."""
    cached_tokens: int
    """How many of the prompt's came from the provider's cache."""


def tokens(data: Any, said: bool) -> Usage | None:
    """The tokens of an answer; None if they are not known. said: the model said something, which takes tokens."""
    usage = _usage(data)
    prompt, completion, total = (_count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total"))
    details = usage.get("completion_tokens_details")
    reasoning = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    if prompt is None and completion is not None and total:
        prompt = total - completion
    if prompt is None or prompt <= 0 or (completion is None and not total):
        return None
    # xAI and Gemini count what was reasoned in the total alone.
    completion = max(completion or 0, total - prompt if total else 0)
    if reasoning and (not total or reasoning > completion):
        completion += reasoning
    if said and not completion:
        return None
    details = usage.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(prompt, completion, min(prompt, cached or 0))


def dollars(data: Any) -> float | None:
    """What the provider says that it has charged; None if it says nothing. 0 says nothing: somebody else may charge."""
    usage = _usage(data)
    cost = usage.get("cost", usage.get("estimated_cost", usage.get("total_cost")))
    charged = _number(cost.get("total_cost") if isinstance(cost, dict) else cost) or 0.0
    details = usage.get("cost_details")
    upstream = (_number(details.get("upstream_inference_cost")) if isinstance(details, dict) else None) or 0.0
    if usage.get("is_byok") is True or upstream > charged:
        charged += upstream  # OpenRouter charges its fee, and the provider the rest, by the user's own key there
    return charged or (_number(usage.get("cost_in_usd_ticks")) or 0.0) / _TICKS or None


def _usage(data: Any) -> dict:
    usage = data.get("usage") if isinstance(data, dict) else None
    return usage if isinstance(usage, dict) else {}


def _number(value: Any) -> float | None:
    """A number, or a text of one; None if it is none, below 0 or without bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) < 2**31 else None
