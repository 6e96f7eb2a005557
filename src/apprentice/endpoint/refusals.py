"""What an endpoint means by an error: whether it may pass, and if not, which setting it is about.

Gateways and servers say the same in many words and with many codes, also in answers with status 200. What is here was
seen with OpenAI, Azure, OpenRouter, xAI, Mistral, DeepSeek, Groq, Together, Gemini, Anthropic, vLLM, llama.cpp, Ollama.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from apprentice.errors import ConfigError, NoAnswer, OutOfMoney
from apprentice.params import Endpoint

_MONEY = re.compile(
    r"insufficient[ _](user[ _])?(quota|credit|balance|funds)|billing[ _](hard[ _]limit|not[ _]active)|credit balance|"
    r"billing.{0,30}(disabled|enabled|suspended)|"
    r"(out of|no|more|all available|not enough) credits?\b|credits? (exhausted|depleted|limit)|spending limit|"
    r"payment[ _]required|exceeded_current_quota|monthly included credits|arrear|not enough balance|余额不足"
)
_FILTER = re.compile(
    r"content_?filter|content_policy|content management policy|content filtering policy|data_inspection_failed|"
    r"input was flagged|flagged_input|requires moderation|moderation_blocked|prohibited_content|"
    r"responsible_?ai_?policy"
)
_KEY = re.compile(r"api[ _-]?key|authenticat|unauthori[sz]ed")
_MODEL = re.compile(
    r"model_not_found|invalid_model|model_decommissioned|(invalid|unknown|no such|unsupported|not a valid) model\b|"
    r"\bmodel\b.{0,80}(not found|not exist|not a valid|decommissioned|deprecated|not available)"
)
_PICTURE = re.compile(r"\bimages?\b|image_url|image input|multi-?modal|\bvision\b|\bpictures?\b|mmproj")
_FLAGS = re.compile(r"--enable-auto-tool-choice|--tool-call-parser|--jinja")
_CONTEXT = re.compile(r"context[ _](length|window|size)|maximum context|prompt is too long|max_model_len")
_UNKNOWN = re.compile(r"unsupported|not supported|unknown|unrecogni|\bextra|not permitted|unexpected|instead")
_CANNOT = re.compile(r"not support|unsupported|requires? --|missing data required")
_PASSING = (408, 409, 425, 429, 498, 499)
"""Beside 500 and above: time-outs, locks, too early, too many, no capacity."""
UNSETTLED = (408, 499, 504, 524)
"""Somebody between us and the model has not waited for its answer, which may be paid for all the same."""


class Fault(NoAnswer):
    """A fault that may pass.

    answered: it came as an answer with status 200, which may have been paid for. reply: what there is, should it stay
    so; None if that's nothing.
    """

    def __init__(self, message: str, answered: bool = False, reply: dict | None = None):
        super().__init__(message)
        self.answered, self.reply = answered, reply


class Filtered(Exception):
    """The prompt was refused for what is in it, which is an answer like any other."""


def error_in(data: Any) -> Any:
    """The error in an answer with status 200: beside the choices, on the first one, or on its message. None if none."""
    if not isinstance(data, dict):
        return None
    choices = data.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    for holder in (data, first, first.get("message") if isinstance(first, dict) else None):
        error = holder.get("error") if isinstance(holder, dict) else None
        if any(error.values()) if isinstance(error, dict) else error:
            return error
    return None


def meaning(status: int, data: Any, endpoint: Endpoint, whose: str, body: dict[str, Any]) -> Exception:
    """What an error says: ConfigError, OutOfMoney, Filtered, Fault, or NoAnswer for this one request.

    data: the error as JSON, or as text. status: of HTTP; of an error within an answer, 200. body: what was asked.
    """
    said = _said(data)
    # A model's name may have a word like "vision" in it.
    text = re.sub(rf"(?<!\w){re.escape(endpoint.model.lower())}(?!\w)", "", " ".join(_texts(data)).lower())
    within = status == 200
    if within:
        status = _status(data)
    where = f"HTTP {status}" + (" in the answer" if within else "")
    if status < 500 and status != 429 and _FILTER.search(text):
        return Filtered(said)
    if status == 402 or _MONEY.search(text):
        return OutOfMoney(f"{whose}: the account of {endpoint.base_url} has no credit left: {said}")
    if status in (401, 403) or (status == 400 and _KEY.search(text)):
        variable = endpoint.api_key_env or "no key (api_key_env is null)"
        return ConfigError(f"{whose}: {endpoint.base_url} refuses {variable} with {where}: {said}")
    structured = not isinstance(data, str) or "<" not in data
    about_us = status in (400, 404, 413, 422) or (status >= 500 and _CANNOT.search(text))
    if structured and about_us and (refused := _setting(text, _named(data), endpoint, whose, body)):
        path, remedy = refused
        return ConfigError(f"{path}: {endpoint.base_url} refuses it ({where}): {said}; {remedy}")
    if status in (404, 405, 410) or (status in (400, 422) and _MODEL.search(text)):
        return ConfigError(
            f"{whose}.model: {endpoint.base_url} does not know the model {endpoint.model}, or is no "
            f"OpenAI-compatible address ({where}): {said}"
        )
    if within or status in _PASSING or status >= 500:
        return Fault(f"the answer has an error: {said}" if within else f"{where}: {said}", answered=within)
    return NoAnswer(f"{where}: {said}")


def _setting(
    text: str, named: list[str], endpoint: Endpoint, whose: str, body: dict[str, Any]
) -> tuple[str, str] | None:
    """The key in params.yaml of what the endpoint refuses, and what to write instead."""
    if _FLAGS.search(text):
        remedy = "start the server with --enable-auto-tool-choice --tool-call-parser NAME (llama.cpp: --jinja)"
        return f"{whose}.tool_choice", f"{remedy}, or set it to none if the model writes its calls as <tool_call>"
    shown = any(isinstance(message.get("content"), list) for message in body["messages"])
    pictured = shown and '"image_url"' in json.dumps(body["messages"])
    parameters = [name for name in named if not name.startswith("messages")]
    if pictured and not parameters and _PICTURE.search(text):
        return f"{whose.removesuffix('endpoint')}prompt.mode", "the model takes no pictures: write mode: text"
    sent: dict[str, str] = {name: f"{whose}.{name}" for name in ("temperature", "top_p", "tool_choice") if name in body}
    sent |= dict(_paths(endpoint.extra_body, f"{whose}.extra_body"))
    sent |= dict.fromkeys(("max_tokens", "max_completion_tokens"), f"{whose}.max_tokens")
    found = [(place, name) for name in sent if (place := _place(name, " ".join(parameters).lower())) is not None]
    found = found or [(place, name) for name in sent if (place := _place(name, text)) is not None]
    if found:
        name = min(found)[1]
        return _instead(name, sent[name], text, endpoint)
    if _CONTEXT.search(text) and endpoint.max_tokens is not None:
        return f"{whose}.max_tokens", "lower it, show less, or serve the model with a longer context"
    if "tools" in body and re.search(r"\btools?\b|\bfunction.call", text):
        return f"{whose}.model", "name a model that takes tools"
    return None


def _instead(name: str, path: str, text: str, endpoint: Endpoint) -> tuple[str, str]:
    if "extra_body" in path:
        return path, "remove it, or give it the value that is named"
    if name in ("max_tokens", "max_completion_tokens"):
        if endpoint.max_tokens is None:
            return path, "set it"
        if not _UNKNOWN.search(text):
            return path, "lower it"
        other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
        return f"{path}_field", f"write max_tokens_field: {other[endpoint.max_tokens_field]}"
    if name == "tool_choice":
        return path, "write auto or required, whichever it takes, or null to leave it out"
    return path, "set it to null, so that it is not sent, or to the value that is named"


def _paths(tree: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        yield name, f"{path}.{name}"
        if isinstance(value, dict):
            yield from _paths(value, f"{path}.{name}")


def _place(name: str, text: str) -> int | None:
    """Where a setting is first named: max_tokens, maxTokens, max tokens."""
    words = "[ _-]?".join(re.escape(word) for word in name.lower().split("_"))
    found = re.search(rf"(?<![a-z]){words}(?![a-z])", text)
    return found and found.start()


def _error(data: Any) -> Any:
    """The error itself: OpenAI has it under `error`, Gemini in a list, others at the top."""
    if isinstance(data, list) and data:
        return _error(data[0])
    error = data.get("error") if isinstance(data, dict) else None
    return error or data


def _status(data: Any) -> int:
    """The status of an error in an answer, by its code or its type; 200 if it says none."""
    error = _error(data)
    if not isinstance(error, dict):
        return 200
    for name in ("code", "status", "status_code"):
        if re.fullmatch(r"[45]\d\d", code := str(error.get(name))):
            return int(code)
    kind = f"{error.get('type')} {error.get('code')}".lower()
    known = {r"invalid_api_key|authentication": 401, r"model_not_found": 404, r"rate_limit": 429}
    known |= {r"invalid_request|bad_?request|validation|unsupported|unknown_parameter": 400}
    return next((status for pattern, status in known.items() if re.search(pattern, kind)), 200)


def _said(data: Any) -> str:
    """What an error says to people."""
    error = _error(data)
    message = error.get("message") if isinstance(error, dict) else error
    if not isinstance(message, str) or not message.strip():
        message = json.dumps(data, ensure_ascii=False) if not isinstance(data, str) else data
    elif raw := _raw(error):
        message += f": {raw}"
    message = " ".join(message.encode("utf-8", "replace").decode().split())
    return message if len(message) <= 300 else message[:300] + "…"


def _raw(error: Any) -> str:
    """What a provider behind a gateway has said: OpenRouter's own message is that there was an error."""
    metadata = error.get("metadata") if isinstance(error, dict) else None
    raw = metadata.get("raw") if isinstance(metadata, dict) else None
    return raw if isinstance(raw, str) else json.dumps(raw) if raw else ""


def _texts(data: Any, depth: int = 6) -> Iterator[str]:
    """Names and texts of an error, without what it repeats of the request."""
    if isinstance(data, (str, int, float)):
        yield str(data)[:2000]
    elif depth and isinstance(data, (dict, list)):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            if name not in ("input", "messages", "user_id", "request_id", "id"):
                yield from [name] if isinstance(name, str) else []
                yield from _texts(value, depth - 1)


def _named(data: Any) -> list[str]:
    """What an error names as its place: OpenAI's `param`, FastAPI's `loc`."""
    error, found = _error(data), []
    if isinstance(error, dict):
        found += [error["param"]] if isinstance(error.get("param"), str) else []
        details = error.get("detail", error.get("message"))
        details = details.get("detail") if isinstance(details, dict) else details
        for detail in details if isinstance(details, list) else []:
            loc = detail.get("loc") if isinstance(detail, dict) else None
            if isinstance(loc, list):
                found.append(".".join(str(part) for part in loc if part != "body"))
    return found
