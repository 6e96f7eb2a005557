"""A model behind OpenAI's chat API: one call with its retries, its cost, and a limit to what may be spent.

Three errors leave `Client.complete`. ConfigError: the endpoint refuses the key, the model or a setting, so that no
other call can do better. OutOfMoney: there's none left. NoAnswer: this one call has got none, after all retries; others
may. What the model itself does wrong is an answer like any other: no tool call, a refusal, nothing at all.
"""

import asyncio
import base64
import json
import os
import random
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from apprentice.endpoint import prices, refusals, usage
from apprentice.endpoint.purse import Payment, Purse
from apprentice.endpoint.refusals import Fault, Filtered
from apprentice.errors import ConfigError, NoAnswer, OutOfMoney
from apprentice.params import Endpoint
from apprentice.world import png

if TYPE_CHECKING:
    import httpx2

_UNREADABLE = 3
"""How often an answer that can't be read is asked for again: each may have been paid for."""
_REFUSED = 2
"""Requests after which an endpoint that has answered none refuses whatever it is asked."""
_SPECIAL = 512
"""Tokens that a server may add to what it's sent: its template's own words."""
_LONGEST_PAUSE = 60.0
"""Seconds that a server may ask for; who asks for more is asked again after a pause of ours."""
_FAILED = re.compile(
    r"error|abort|cancel|fail|time_?out|interrupt|malformed|unavailable|overload|insufficient|unspecified"
)
"""What is in the finish reasons of generations that came to no end."""


@dataclass(frozen=True)
class Completion:
    """An answer, as it came."""

    message: dict
    """The assistant's message as it came, which `prompt.in_openai_form` reads; without content if there was none."""
    finish_reason: str
    """The endpoint's word: stop, length, tool_calls, content_filter; ours: refusal, or empty if nothing came."""
    model: str
    """Which model the endpoint says it was."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """Dollars, with those for unreadable answers before this one; None if they aren't known. With a limit, what isn't
    known is the most that it can be."""
    seconds: float


def api_key(endpoint: Endpoint, whose: str) -> str:
    """The endpoint's key. Raises ConfigError that says which variable is missing, and for whom."""
    if endpoint.api_key_env is None:
        return "none"  # the openai package insists on one
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"{whose}: the environment variable {endpoint.api_key_env} is not set; it must hold the key for "
            f"{endpoint.base_url}: export {endpoint.api_key_env}=…"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"{whose}: what {endpoint.api_key_env} holds is no key: it has spaces or odd characters in it"
        )
    return key


class Client:
    """Calls to one endpoint, all within one event loop.

    whose: for error messages, where its settings stand. agent: in whose name the endpoint is paid.
    """

    def __init__(self, endpoint: Endpoint, whose: str, agent: str = ""):
        self._key = api_key(endpoint, whose)
        self.endpoint, self.whose, self.price = endpoint, whose, prices.price(endpoint)
        if endpoint.max_cost_usd is not None and self.price is None:
            raise ConfigError(
                f"{whose}.max_cost_usd: the price of {endpoint.model} is not known; give it as {whose}.price"
            )
        import openai

        # Retries are ours: each of them may be paid for.
        self._openai = openai.AsyncOpenAI(
            api_key=self._key, base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=0
        )
        self.purse = Purse(endpoint, agent, whose)
        self._refusal: ConfigError | OutOfMoney | None = None
        """The last error after which no other call can do better: those that pause then ask no more."""
        self._answered, self._refused = False, 0
        """Whether anything was answered, and how many requests were refused for a reason that is not understood."""

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception) -> None:
        self.purse.__exit__()
        await self._openai.close()

    async def complete(self, messages: list[dict], tools: list[dict] | None = None) -> Completion:
        """Ask for the next message; tools in OpenAI's form."""
        body, began, refusal = self._body(messages, tools), time.monotonic(), self._refusal
        most = self._most_tokens(body), self.endpoint.max_tokens or 0
        cost: float | None = 0.0
        failed = unreadable = 0
        while True:
            async with self.purse.opened(*most) as payment:
                try:
                    data, pause = await self._asked(body, payment)
                except (ConfigError, OutOfMoney) as error:
                    self._refusal = error
                    raise
            if payment.answered:
                cost = None if cost is None or payment.dollars is None else cost + payment.dollars
            if not isinstance(data, Fault):
                break
            if data.answered:
                unreadable += 1
                if unreadable > _UNREADABLE and data.reply:
                    data = data.reply
                    break
                if unreadable > _UNREADABLE:
                    raise NoAnswer(str(data))
                pause = 2**unreadable * random.uniform(0.25, 0.5)
            else:
                failed += 1
                if failed > self.endpoint.max_retries:
                    raise NoAnswer(str(data))
                pause = pause or pause_before(failed)
            await asyncio.sleep(pause)
            if self._refusal and self._refusal is not refusal:
                raise self._refusal
        choice = _first_choice(data)
        message, reason = _message(choice), _text(choice.get("finish_reason")) if choice else "empty"
        used = usage.tokens(data, _says(choice)) or (0, 0)
        return Completion(
            message,
            "refusal" if message.get("refusal") and reason == "stop" else reason,
            _text(data.get("model")),
            *used[:2],
            cost,
            time.monotonic() - began,
        )

    def _body(self, messages: list[dict], tools: list[dict] | None) -> dict[str, Any]:
        endpoint = self.endpoint
        body = {
            "model": endpoint.model,
            "messages": messages,
            "tools": tools,
            endpoint.max_tokens_field: endpoint.max_tokens,
        }
        body |= {"temperature": endpoint.temperature, "top_p": endpoint.top_p}
        if tools:
            body["tool_choice"] = endpoint.tool_choice
        return {name: value for name, value in body.items() if value is not None} | endpoint.extra_body

    async def _asked(self, body: dict[str, Any], payment: Payment) -> tuple[Any, float | None]:
        """One request: its answer, or a Fault, and the seconds that the server asks to wait for."""
        import httpx2
        import openai

        try:
            # Not chat.completions.create: what endpoints answer need not be of the types that it makes of it.
            url = f"{self.endpoint.base_url}/chat/completions"
            response = await self._openai.post(url, body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            response = error.response
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)):
                payment.dollars = 0.0  # it was never sent
            return Fault(f"no answer: {self._said(str(cause)) or type(cause).__name__}"), None
        data = self._read(response)
        meaning = self._meaning(response.status_code, data, body)
        self._note(payment, response.status_code, data, meaning)
        if isinstance(meaning, Filtered):
            return {"choices": [{"message": {}, "finish_reason": "content_filter"}]}, None
        pause = _asked_pause(response.headers)
        if isinstance(meaning, Fault) and response.headers.get("x-should-retry") != "false":
            if pause is None or pause <= _LONGEST_PAUSE:
                return meaning, pause
            return Fault(f"{meaning} (it asks to wait for {pause:g} s)", meaning.answered, meaning.reply), None
        if isinstance(meaning, Exception):
            raise self._after_refusal(meaning)
        self._answered = True
        return meaning, None

    def _after_refusal(self, error: Exception) -> Exception:
        """The error; another when one request after the other is refused: then it's no matter of what they ask."""
        if isinstance(error, NoAnswer) and not isinstance(error, Fault):
            self._refused += 1
            if not self._answered and self._refused >= _REFUSED:
                return ConfigError(f"{self.whose}: {self.endpoint.base_url} has refused every request: {error}")
        return error

    def _read(self, response: "httpx2.Response") -> Any:
        """What came as JSON, or as text if it is none; in any encoding that JSON may have."""
        content = response.content
        text = self._cleaned(content.decode(json.detect_encoding(content), "replace"))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def _note(self, payment: Payment, status: int, data: Any, meaning: dict | Exception) -> None:
        """Write down what an answer has cost, if that can be known. A refusal is free if it doesn't say otherwise."""
        answered = isinstance(meaning, (dict, Filtered)) or (isinstance(meaning, Fault) and meaning.answered)
        used, charged = usage.tokens(data, _says(_first_choice(data))), usage.dollars(data)
        payment.answered = answered
        if used:
            payment.prompt_tokens, payment.completion_tokens = used[:2]
            payment.dollars = prices.dollars(self.price, *used) if self.price else None
        if charged is not None:
            payment.dollars = charged
        elif not used and not answered and status not in refusals.UNSETTLED:
            payment.dollars = 0.0

    def _meaning(self, status: int, data: Any, body: dict[str, Any]) -> dict | Exception:
        """What came: an answer that has a message, or what there is instead."""
        if not 200 <= status < 300:
            return refusals.meaning(status, data, self.endpoint, self.whose, body)
        if isinstance(data, str):
            return Fault(f"the answer is not JSON: {self._said(data)}", answered=True)
        shown = self._said(json.dumps(data, ensure_ascii=False))
        if not isinstance(data, dict):
            return Fault(f"the answer is no JSON object: {shown}", answered=True)
        choice, error = _first_choice(data), refusals.error_in(data)
        if error or not choice:
            meaning = refusals.meaning(200, error or data, self.endpoint, self.whose, body)
            if isinstance(meaning, (ConfigError, OutOfMoney)) or (error and isinstance(meaning, Filtered)):
                return meaning
            if error:
                return Fault(f"{meaning}{self._words(choice)}", answered=True)
            reply = data if data.get("choices", choice) in ([], None) else None
            return Fault(f"the answer has no choices: {shown}", answered=True, reply=reply)
        reason, called = choice.get("finish_reason"), {"tool_calls", "function_call"} & choice["message"].keys()
        reasons = [one for one in (reason, choice.get("native_finish_reason")) if isinstance(one, str) and one]
        if any(_FAILED.search(one.lower()) for one in reasons):
            return Fault(f"the generation failed, {' and '.join(reasons)}{self._words(choice)}", answered=True)
        if not reason and not any(choice["message"][name] for name in called):
            return Fault(f"the generation has no finish_reason{self._words(choice)}", answered=True)
        return data

    def _words(self, choice: dict) -> str:
        """What a failed generation has said, for a message."""
        content = choice.get("message", {}).get("content")
        return f"; it said {self._said(json.dumps(content, ensure_ascii=False))}" if content else ""

    def _most_tokens(self, body: dict[str, Any]) -> int:
        """What a request's prompt can have at most: a token is at least a byte of text."""
        tokens = _SPECIAL + len(json.dumps(body.get("tools"), ensure_ascii=False).encode())
        for message in body["messages"]:
            content = message.get("content")
            for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
                if part["type"] == "image_url":
                    start = base64.b64decode(part["image_url"]["url"].partition(",")[2][:32])
                    tokens += prices.picture_tokens(self.endpoint.model, *png.size(start))
                else:
                    tokens += len(part["text"].encode())
        return tokens

    def _cleaned(self, text: str) -> str:
        """Without the key, should a server repeat it; one of a few letters is a placeholder, no secret."""
        return text.replace(self._key, "***") if len(self._key) >= 8 else text

    def _said(self, text: str) -> str:
        text = " ".join(self._cleaned(text).split())
        return text if len(text) <= 300 else text[:300] + "…"


def pause_before(retry: int) -> float:
    """Seconds before a retry, counted from 1: half a second, then twice as long each time up to eight, never alike."""
    return min(0.5 * 2 ** (retry - 1), 8.0) * random.uniform(0.75, 1.0)


def _asked_pause(headers: "httpx2.Headers") -> float | None:
    """The seconds that a server asks to wait for, by a number or a date."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            asked = headers.get("retry-after", "")
            dated = re.search(r"[A-Za-z]{3}", asked)
            seconds = parsedate_to_datetime(asked).timestamp() - time.time() if dated else float(asked)
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def _says(choice: dict) -> bool:
    """Whether a choice has anything that takes tokens."""
    message = choice.get("message", {})
    return any(value for name, value in message.items() if name != "role")


def _first_choice(data: Any) -> dict:
    choices = data.get("choices") if isinstance(data, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and choice.get("message") is None and choice.get("finish_reason") == "content_filter":
        choice = choice | {"message": {}}
    return choice if isinstance(choice, dict) and isinstance(choice.get("message"), dict) else {}


def _message(choice: dict) -> dict:
    """What of a message is the assistant's own."""
    message = choice.get("message", {})
    names = ("tool_calls", "function_call", "refusal", "reasoning_content", "reasoning", "output")
    return {"role": "assistant", "content": message.get("content")} | {
        name: message[name] for name in names if message.get(name)
    }


def _text(value: Any) -> str:
    return value.encode("utf-8", "replace").decode()[:200] if isinstance(value, str) else ""
