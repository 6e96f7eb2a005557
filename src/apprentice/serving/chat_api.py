"""The student behind OpenAI's chat API: /v1/models and /v1/chat/completions, for any evaluator.

Requests that wait at the same time are answered together. The tool `act` is always shown, as in training, so a request
may name it or no tool. The form of requests and answers: platform.openai.com/docs/api-reference/chat, and vLLM's
`return_token_ids`.
"""

import asyncio
import base64
import binascii
import io
import itertools
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from apprentice.errors import WorkError
from apprentice.params import Sampling
from apprentice.serving.in_process import generate
from apprentice.serving.on_vllm import OnVllm
from apprentice.student.encoding import Encoded, encode

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

BODY = 16 << 20
"""Bytes that a request may have."""
PICTURES, SIDE = 16, 2048
"""How many pictures a request may have, and how many pixels the longer side of one."""
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class Asked(BaseModel):
    """A request. What would change the answer and isn't known here is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """None is the profile's own."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Another name for the same; without either, the profile's own."""
    seed: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    logprobs: bool = False
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    return_token_ids: bool = False
    # Known, and only as what they do nothing at.
    top_logprobs: Literal[0] | None = None
    top_p: Annotated[float, Field(ge=1, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    response_format: dict[str, Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None

    def sampling(self, usual: Sampling) -> Sampling:
        """How an answer is drawn; usual: what holds where the request says nothing."""
        most = self.max_completion_tokens or self.max_tokens or usual.max_tokens
        temperature = usual.temperature if self.temperature is None else self.temperature
        return usual.model_copy(update={"temperature": temperature, "max_tokens": most})

    @model_validator(mode="after")
    def _known(self) -> "Asked":
        for place, message in enumerate(self.messages):
            if message.get("role") not in ("system", "developer", "user", "assistant", "tool"):
                raise ValueError(f"messages.{place}.role is {message.get('role')!r}")
        names = [tool.get("function", {}).get("name") for tool in self.tools or ()]
        if set(names) - {"act"}:
            raise ValueError(f"tools names {', '.join(map(str, names))}; the student knows the tool act alone")
        return self


class Refused(Exception):
    """A request that cannot be answered, and which part of it is why."""

    def __init__(self, message: str, param: str, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True, eq=False)
class _Waiting:
    row: Encoded
    draws: np.ndarray
    temperature: float
    future: asyncio.Future


@dataclass(frozen=True)
class Answers:
    prompt_ids: list[int]
    found: list[tuple[list[int], list[float]]]
    """Of each answer its token ids, and their log-probabilities."""


class Engine(Protocol):
    """What answers: a model in this process, or vLLM."""

    name: str
    """What requests call it."""
    processor: "Qwen3VLProcessor"

    async def answers(self, asked: Asked) -> Answers:
        """Raises Refused for a request that cannot be answered."""

    async def run(self) -> None:
        """Work, until cancelled."""


class InProcessEngine:
    """A model that answers all who wait together; one batch at a time, in a thread of its own."""

    def __init__(
        self,
        name: str,
        model: "Qwen3VLForConditionalGeneration",
        processor: "Qwen3VLProcessor",
        sampling: Sampling,
    ):
        """name: what requests call it. sampling: what holds where a request says nothing; rows at once."""
        self.name, self.model, self.processor, self.sampling = name, model, processor, sampling
        self._waiting: list[_Waiting] = []
        self._more = asyncio.Event()

    async def answers(self, asked: Asked) -> Answers:
        """Raises Refused for a request that cannot be answered."""
        sampling = asked.sampling(self.sampling)
        tokens = self.model.config.get_text_config().max_position_embeddings
        _, row = await asyncio.to_thread(_shown, asked.messages, self.processor, sampling.max_tokens, tokens, PICTURES)
        generator = np.random.default_rng(asked.seed)
        loop = asyncio.get_running_loop()
        draws = [generator.random(sampling.max_tokens) for _ in range(asked.n)]
        mine = [_Waiting(row, drawn, sampling.temperature, loop.create_future()) for drawn in draws]
        self._waiting += mine
        self._more.set()
        try:
            return Answers(row.prompt_ids, await asyncio.gather(*(one.future for one in mine)))
        finally:  # nobody may be left to read it
            self._waiting = [one for one in self._waiting if one not in mine]

    async def run(self) -> None:
        """Answer, until cancelled."""
        while True:
            await self._more.wait()
            self._more.clear()
            while self._waiting:
                first = self._waiting[0]
                alike = [one for one in self._waiting if one.temperature == first.temperature]
                company = alike[: self.sampling.batch_size]
                self._waiting = [one for one in self._waiting if one not in company]
                try:
                    found = await asyncio.to_thread(self._answer, company)
                except Exception as error:
                    for one in company:
                        if not one.future.done():
                            one.future.set_exception(error)
                    continue
                for one, answer in zip(company, found, strict=True):
                    if not one.future.done():
                        one.future.set_result(answer)

    def _answer(self, company: Sequence[_Waiting]) -> list[tuple[list[int], list[float]]]:
        most = max(len(one.draws) for one in company)
        draws = np.stack([np.pad(one.draws, (0, most - len(one.draws))) for one in company])
        rows = [one.row for one in company]
        found = generate(self.model, self.processor, rows, draws, company[0].temperature)
        return [
            (ids[: len(one.draws)], logprobs[: len(one.draws)])
            for one, (ids, logprobs, *_) in zip(company, found, strict=True)
        ]


class VllmEngine:
    """The same by vLLM servers, asked by turns."""

    def __init__(self, policy: OnVllm, sampling: Sampling, tokens: int):
        """tokens: of a prompt and its answer at most, as the servers were started with; they take one picture."""
        self.tokens = tokens
        self.name, self.processor, self._policy, self._sampling = policy.name, policy.processor, policy, sampling
        self._turns = itertools.cycle(policy.servers)

    async def answers(self, asked: Asked) -> Answers:
        """Raises Refused for a request that cannot be answered, and WorkError when the server doesn't answer."""
        sampling = asked.sampling(self._sampling)
        most = sampling.max_tokens
        messages, _ = await asyncio.to_thread(_shown, asked.messages, self.processor, most, self.tokens, 1)
        body: dict[str, Any] = {"messages": messages, "n": asked.n}
        body |= {"temperature": sampling.temperature, "max_tokens": most}
        if asked.seed is not None:
            body["seed"] = asked.seed
        answer = await self._policy.ask(next(self._turns), body)
        found = [
            (choice["token_ids"], [token["logprob"] for token in choice["logprobs"]["content"]])
            for choice in answer["choices"]
        ]
        return Answers(answer["prompt_token_ids"], found)

    async def run(self) -> None:
        pass


def application(engine: Engine) -> FastAPI:
    """The server. Nobody is asked for a key, and no body is measured: see environment.guard."""

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        running = asyncio.create_task(engine.run())
        yield
        running.cancel()

    app = FastAPI(title=f"apprentice: {engine.name}", lifespan=lifespan)
    began = int(time.time())

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return _error(str(error), error.param, error.status)

    @app.exception_handler(WorkError)
    async def fail(_: Request, error: WorkError) -> JSONResponse:
        return _error(str(error), "", 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(f"{where}: {first['msg']}".removeprefix(": "), where, 400)

    @app.get("/", include_in_schema=False)
    async def root() -> dict:
        return {"what": f"{engine.name}, by OpenAI's chat API", "see": ["/v1/models", "/v1/chat/completions", "/docs"]}

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(engine.name, began)]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        if name != engine.name:
            raise _unknown(name, engine.name)
        return _model(name, began)

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(asked: Asked) -> dict | StreamingResponse:
        if asked.model != engine.name:
            raise _unknown(asked.model, engine.name)
        answers = await engine.answers(asked)
        told = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": engine.name}
        choices = [_choice(engine.processor, asked, index, *answer) for index, answer in enumerate(answers.found)]
        said = sum(len(ids) for ids, _ in answers.found)
        usage = {"prompt_tokens": len(answers.prompt_ids), "completion_tokens": said}
        usage["total_tokens"] = sum(usage.values())
        if asked.stream:
            return StreamingResponse(_streamed(told, choices, usage, asked), media_type="text/event-stream")
        whole = {**told, "object": "chat.completion", "choices": choices, "usage": usage}
        return whole | ({"prompt_token_ids": answers.prompt_ids} if asked.return_token_ids else {})

    return app


def _model(name: str, began: int) -> dict:
    return {"id": name, "object": "model", "created": began, "owned_by": "apprentice"}


def _unknown(name: str, known: str) -> Refused:
    return Refused(f"there is no model {name!r} here; there is {known!r}", "model", 404)


def _error(message: str, param: str, status: int) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    told = {"message": message, "type": kind, "param": param or None, "code": None}
    return JSONResponse({"error": told}, status)


def _shown(
    messages: list[dict], processor: "Qwen3VLProcessor", most: int, tokens: int, pictures: int
) -> tuple[list[dict], Encoded]:
    """The chat as servers take it, and encoded. Raises Refused for one with too many pictures, or that leaves less than
    `most` of so many tokens for the answer."""
    chat = _messages(messages, pictures)
    try:
        row = encode(processor, chat)
    except ValueError as error:
        raise Refused(f"the chat cannot be shown to the student: {error}", "messages") from None
    room = tokens - len(row.prompt_ids)
    if most > room:
        raise Refused(f"the prompt leaves {max(0, room)} tokens for the answer, and {most} are asked for", "messages")
    return chat, row


def _messages(messages: list[dict], most: int) -> list[dict]:
    """The chat as `encode` takes it; its pictures are PNG data URLs. Raises Refused for what cannot be shown."""
    found, pictures = [], 0
    for place, message in enumerate(messages):
        if message["role"] == "developer":
            message = message | {"role": "system"}
        if isinstance(message.get("content"), list):
            parts = [_part(part, f"messages.{place}.content.{index}") for index, part in enumerate(message["content"])]
            pictures += sum(part["type"] == "image_url" for part in parts)
            message = message | {"content": parts}
        elif not isinstance(message.get("content"), str | None):
            raise Refused(f"messages.{place}.content is neither text nor a list of parts", f"messages.{place}.content")
        found.append(message | {"content": message.get("content") or ""})
    if pictures > most:
        raise Refused(f"there are {pictures} pictures; {most} may be", "messages")
    return found


def _part(part: Any, where: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    url = part.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise Refused(f"{where} is neither a text nor an image_url", where)
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise Refused(f"{where} is no data URL (data:image/png;base64,…); pictures are fetched from nowhere", where)
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            if max(picture.size) > SIDE:
                raise Refused(f"{where} is {picture.width} × {picture.height} pixels; a side may have {SIDE}", where)
            picture.load()
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise Refused(f"{where} cannot be read as a picture: {error}", where) from None
    return {"type": "image_url", "image_url": {"url": url}}


def _choice(processor: "Qwen3VLProcessor", asked: Asked, index: int, ids: list[int], logprobs: list[float]) -> dict:
    tokenizer = processor.tokenizer
    ended = ids[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    text = tokenizer.decode(ids[:-1] if ended else ids)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    reason = "stop" if ended else "length"
    calls = [] if asked.tool_choice == "none" else _calls(text)
    if calls:
        message |= {"content": text[: text.index("<tool_call>")].strip() or None, "tool_calls": calls}
        reason = "tool_calls" if ended else "length"
    choice = {"index": index, "message": message, "finish_reason": reason, "logprobs": None}
    if asked.logprobs:
        content = []
        for token, logprob in zip(ids, logprobs, strict=True):
            word = tokenizer.decode([token])
            content.append({"token": word, "logprob": logprob, "bytes": [*word.encode()], "top_logprobs": []})
        choice["logprobs"] = {"content": content, "refusal": None}
    return choice | ({"token_ids": ids} if asked.return_token_ids else {})


def _calls(text: str) -> list[dict]:
    """The tool calls in a text of Qwen's form; none if one of them cannot be read, as vLLM's parser has it."""
    found = []
    for call in _CALL.findall(text):
        try:
            read = json.loads(call)
            name, arguments = read["name"], read["arguments"]
        except (ValueError, TypeError, KeyError):
            return []
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        function = {"name": str(name), "arguments": arguments}
        found.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return found


async def _streamed(told: dict, choices: list[dict], usage: dict, asked: Asked) -> AsyncIterator[str]:
    """Server-sent events: what an answer says in one piece, then how it ended."""
    head = {**told, "object": "chat.completion.chunk"}
    for choice in choices:
        delta = choice["message"]
        if "tool_calls" in delta:
            calls = [{"index": place, **call} for place, call in enumerate(delta["tool_calls"])]
            delta = delta | {"tool_calls": calls}
        piece = {"index": choice["index"], "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None}
        end = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        for part in (piece, end):
            yield f"data: {json.dumps({**head, 'choices': [part]})}\n\n"
    if (asked.stream_options or {}).get("include_usage"):
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"
