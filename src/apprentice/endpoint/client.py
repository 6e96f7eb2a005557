"""A model behind OpenAI's chat API: one call with its retries, its cost, and a limit to what may be spent.

Three errors leave `Client.complete`. ConfigError: the endpoint refuses the key or the model, so that no other call can
do better. OutOfMoney: there's none left. NoAnswer: this one call has got none, after all retries; others may. What
the model itself does wrong is an answer like any other: no tool call, a refusal, nothing at all.
"""

import asyncio
import base64
import json
import os
import random
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from apprentice.endpoint import prices
from apprentice.errors import ConfigError, NoAnswer, OutOfMoney
from apprentice.params import Endpoint
from apprentice.world import png

_UNREADABLE = 3
"""How often an answer that can't be read is asked for again: each may have been paid for."""
_SPECIAL = 512
"""Tokens that a server may add to what it's sent: its template's own words."""


@dataclass(frozen=True)
class Completion:
    """An answer, as it came."""

    message: dict
    """An assistant message in OpenAI's form: content, tool_calls, refusal; without content if there was none."""
    finish_reason: str
    """The endpoint's word: stop, length, tool_calls, content_filter; ours: refusal, or empty if nothing came."""
    model: str
    """Which model the endpoint says it was."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """Dollars, with those for unreadable answers before this one; None if the price isn't known."""
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

    whose: for error messages, where its settings stand. spent: what was paid before this run, for max_cost_usd.
    """

    def __init__(self, endpoint: Endpoint, whose: str, spent: float = 0.0):
        self._key = api_key(endpoint, whose)
        self.endpoint, self.whose, self.price = endpoint, whose, prices.price(endpoint)
        if endpoint.max_cost_usd is not None and self.price is None:
            raise ConfigError(
                f"{whose}.max_cost_usd: the price of {endpoint.model} is not known; give it as {whose}.price"
            )
        import openai

        self._openai = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=endpoint.base_url,
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        )
        self._purse = _Purse(endpoint.max_cost_usd, spent, whose)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception) -> None:
        await self._openai.close()

    @property
    def spent(self) -> float:
        """Dollars, with those before this run."""
        return self._purse.spent

    async def complete(self, messages: list[dict], tools: list[dict] | None = None) -> Completion:
        """Ask for the next message; tools in OpenAI's form."""
        body, began = self._body(messages, tools), time.monotonic()
        cost = 0.0
        for attempt in range(_UNREADABLE + 1):
            if attempt:
                await asyncio.sleep(2**attempt * random.uniform(0.25, 0.5))
            async with self._purse.opened(self._most(body)) as payment:
                data = await self._post(body)
                usage = _usage(data)
                if self.price:
                    # Unless it says otherwise, it has cost what it can at most.
                    payment.amount = prices.dollars(self.price, *usage) if usage else payment.most
                    cost += payment.amount
            choice = _first_choice(data)
            if choice:
                break
        else:
            if not isinstance(data, dict):
                raise NoAnswer(f"the answer is not JSON: {self._said(data)}")
            if "choices" not in data:
                raise NoAnswer(f"the answer has no choices: {self._said(json.dumps(data))}")
        message, reason = _message(choice), _text(choice.get("finish_reason")) if choice else "empty"
        return Completion(
            message,
            "refusal" if message.get("refusal") and reason == "stop" else reason,
            _text(data.get("model")),
            *(usage or (0, 0))[:2],
            cost if self.price else None,
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

    async def _post(self, body: dict[str, Any]) -> Any:
        """The answer's JSON; its text if it is none. The package sees to retries, back-off and Retry-After."""
        import httpx2
        import openai

        try:
            # Not chat.completions.create: what endpoints answer need not be of the types that it makes of it.
            url = f"{self.endpoint.base_url}/chat/completions"
            response = await self._openai.post(url, body=body, cast_to=httpx2.Response)
        except openai.APIStatusError as error:
            return self._refused(error.status_code, error.body, error.code)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raise NoAnswer(f"no answer: {self._said(str(cause)) or type(cause).__name__}") from None
        text = self._cleaned(response.content.decode("utf-8", "replace"))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def _refused(self, status: int, body: object, code: str | None) -> dict:
        """Raise what an HTTP error means; a filtered prompt is an answer."""
        if code in ("content_filter", "content_policy_violation"):
            return {"choices": [{"message": {}, "finish_reason": "content_filter"}], "usage": {}}
        endpoint = self.endpoint
        said = body.get("message") if isinstance(body, dict) else body
        said = self._said(said if isinstance(said, str) else json.dumps(body))
        if status in (401, 403):
            variable = endpoint.api_key_env or "no key (api_key_env is null)"
            raise ConfigError(f"{self.whose}: {endpoint.base_url} refuses {variable} with HTTP {status}: {said}")
        if status == 404:
            raise ConfigError(
                f"{self.whose}: {endpoint.base_url} does not know the model {endpoint.model}, or is no "
                f"OpenAI-compatible address (HTTP 404): {said}"
            )
        if code == "insufficient_quota":
            raise OutOfMoney(f"{self.whose}: the account of {endpoint.base_url} has no credit left: {said}")
        raise NoAnswer(f"HTTP {status}: {said}")

    def _most(self, body: dict[str, Any]) -> float:
        """What a request can cost at most, in dollars: a token is at least a byte of text."""
        if self.price is None or self.endpoint.max_cost_usd is None:
            return 0.0
        tokens = _SPECIAL + len(json.dumps(body.get("tools"), ensure_ascii=False).encode())
        for message in body["messages"]:
            content = message.get("content")
            for part in content if isinstance(content, list) else [{"type": "text", "text": content or ""}]:
                if part["type"] == "image_url":
                    start = base64.b64decode(part["image_url"]["url"].partition(",")[2][:32])
                    tokens += prices.picture_tokens(self.endpoint.model, *png.size(start))
                else:
                    tokens += len(part["text"].encode())
        return prices.dollars(self.price, tokens, self.endpoint.max_tokens)

    def _cleaned(self, text: str) -> str:
        """Without the key, should a server repeat it; one of a few letters is a placeholder, no secret."""
        return text.replace(self._key, "***") if len(self._key) >= 8 else text

    def _said(self, text: str) -> str:
        text = " ".join(self._cleaned(text).split())
        return text if len(text) <= 300 else text[:300] + "…"


@dataclass(eq=False)
class _Payment:
    most: float
    amount: float = 0.0


class _Purse:
    """Never opened for more than is in it: what is under way counts with the most it can cost."""

    def __init__(self, limit: float | None, spent: float, whose: str):
        self.limit, self.spent, self.whose = limit, spent, whose
        self._open: list[_Payment] = []
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def opened(self, most: float):
        """Wait until this fits beside what is under way. Raises OutOfMoney when it cannot fit any more."""
        payment = _Payment(most)
        if self.limit is not None:
            async with self._changed:
                await self._changed.wait_for(lambda: self._fits(most) or not self._open)
                if not self._fits(most):
                    raise OutOfMoney(
                        f"{self.whose}.max_cost_usd: ${self.spent:.4f} of ${self.limit:g} are spent and another "
                        f"decision may cost ${most:.4f}; everything so far is kept, a higher limit continues"
                    )
                self._open.append(payment)
        try:
            yield payment
        finally:
            self.spent += payment.amount
            if self.limit is not None:
                self._open.remove(payment)
                async with self._changed:
                    self._changed.notify_all()

    def _fits(self, most: float) -> bool:
        return self.spent + sum(payment.most for payment in self._open) + most <= self.limit


def _first_choice(data: Any) -> dict:
    choices = data.get("choices") if isinstance(data, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    return choice if isinstance(choice, dict) and isinstance(choice.get("message"), dict) else {}


def _message(choice: dict) -> dict:
    """What of a message is the assistant's own, in OpenAI's form."""
    message = choice.get("message", {})
    kept = {name: message[name] for name in ("tool_calls", "refusal") if message.get(name)}
    return {"role": "assistant", "content": message.get("content"), **kept}


def _usage(data: Any) -> tuple[int, int, int] | None:
    """Prompt tokens, completion tokens, and how many of the former came from a cache."""
    usage = data.get("usage") if isinstance(data, dict) else None
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return prompt, completion, min(prompt, _count(cached))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


def _text(value: Any) -> str:
    return value.encode("utf-8", "replace").decode()[:200] if isinstance(value, str) else ""
