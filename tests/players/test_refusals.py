"""What an endpoint says that isn't an answer: a fault that passes, an empty account, or a setting that it refuses."""

import json
import re
import time
from email.utils import formatdate

import pytest
from endpoint import NOOP, Answer, Server, call, completion

from apprentice.episode import Episode
from apprentice.errors import ConfigError, OutOfMoney, WorkError
from apprentice.params import Endpoint, Prompt
from apprentice.play import Spec
from apprentice.players import chat
from apprentice.store import from_bytes


def endpoint(server: Server, **changes) -> Endpoint:
    settings = {"base_url": server.url, "model": "served", "api_key_env": None, "max_retries": 0, "concurrency": 4}
    return Endpoint(**settings | changes)


def played(server: Server, seeds: int = 1, max_steps: int = 2, mode: str = "text", **changes) -> list[Episode]:
    spec = Spec(range(seeds), max_steps, Prompt(mode=mode), "gpt")
    records = chat.record(spec, endpoint(server, **changes), "code", "teachers.gpt.endpoint")
    return [from_bytes(record) for record in records]


def error(message: object, status: int = 400, **more: object) -> Answer:
    return Answer({"error": {"message": message, **more}}, status)


def failed(reason: object, content: object = "I mo", **more: object) -> Answer:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": reason, **more}
    return Answer({**NOOP.body, "choices": [choice]})


# A generation that failed

FAILED = {
    "error, with the error": failed("error", error={"code": 502, "message": "upstream"}),
    "error alone": failed("error"),
    "network_error": failed("network_error"),
    "insufficient_system_resource": failed("insufficient_system_resource"),
    "abort": failed("abort", ""),
    "ABORTED": failed("ABORTED"),
    "cancelled": failed("cancelled"),
    "timeout": failed("timeout"),
    "failed": failed("failed"),
    "a provider's own word": failed("stop", None, native_finish_reason="MALFORMED_FUNCTION_CALL"),
    "none": failed(None),
    "an empty one": failed(""),
    "stop, with an error": failed("stop", error={"message": "upstream"}),
    "stop, with an error as text": failed("stop", error="upstream"),
    "an error on the message": Answer(
        {**NOOP.body, "choices": [{"message": {"content": "", "error": "upstream"}, "finish_reason": "stop"}]}
    ),
    "an error beside it": Answer({**NOOP.body, "error": {"code": 502, "message": "upstream"}}),
    "an error beside it, without a message": Answer({**NOOP.body, "error": {"code": 502}}),
}


@pytest.mark.parametrize("how", FAILED)
def test_a_failed_generation_is_asked_for_again_and_is_no_reply(how):
    with Server([FAILED[how], NOOP]) as server:
        (episode,) = played(server)
        assert len(server.requests) == 3
    assert [(step.invalid, step.reply.message) for step in episode.steps] == [("", call("noop"))] * 2


@pytest.mark.parametrize("how", ["error, with the error", "network_error", "none"])
def test_one_that_always_fails_says_what_came(how):
    with Server([FAILED[how]]) as server, pytest.raises(WorkError, match="1 of 1 episodes failed") as raised:
        played(server)
    assert "I mo" in str(raised.value)
    assert ("upstream" if "with" in how else how.removeprefix("none")) in str(raised.value)


ANSWERS = {
    "length": failed("length"),
    "stop": failed("stop"),
    "content_filter": failed("content_filter", None),
    "an error that is null": Answer({**failed("stop").body, "error": None}),
    "an error with nothing in it": Answer({**failed("stop").body, "error": {"code": None, "message": ""}}),
    "a reason of its own": failed("end_turn"),
}


@pytest.mark.parametrize("how", ANSWERS)
def test_what_the_model_ended_itself_is_its_answer(how):
    with Server([ANSWERS[how], NOOP]) as server:
        (episode,) = played(server)
        assert len(server.requests) == 2
    assert episode.steps[0].invalid == "no tool call"


def test_a_call_without_a_finish_reason_is_whole():
    with Server([Answer(completion(call("do"), None))]) as server:
        (episode,) = played(server)
        assert len(server.requests) == 2 and episode.steps[0].asked == ("do",)


def test_a_filtered_answer_may_have_no_message():
    filtered = Answer({**NOOP.body, "choices": [{"index": 0, "message": None, "finish_reason": "content_filter"}]})
    with Server([filtered, NOOP]) as server:
        (episode,) = played(server)
        assert len(server.requests) == 2 and episode.steps[0].reply.finish_reason == "content_filter"


# What passes

ODD = {
    "a list": Answer("[]"),
    "a number": Answer("5"),
    "a text": Answer('"hello"'),
    "null": Answer("null"),
    "true": Answer("true"),
    "nothing": Answer(""),
    "choices that are a number": Answer({**NOOP.body, "choices": 5}),
    "a choice that is null": Answer({**NOOP.body, "choices": [None]}),
    "a choice without a message": Answer({**NOOP.body, "choices": [{"finish_reason": "stop"}]}),
    "too early": Answer("", 425),
    "a date to wait for": Answer("", 503, {"Retry-After": formatdate(time.time() + 1, usegmt=True)}),
    "milliseconds to wait for": Answer("", 429, {"Retry-After-Ms": "20"}),
    "an hour to wait for": Answer("", 429, {"Retry-After": "3600"}),
    "nonsense to wait for": Answer("", 429, {"Retry-After": "soon"}),
    "an error of the server in a list": Answer('[{"error": {"code": 503, "message": "overloaded"}}]', 503),
    "an error as text": Answer({"error": "overloaded"}, 529),
    "an error of the server with status 200": Answer({"error": {"code": "503", "message": "overloaded"}}),
}


@pytest.mark.parametrize("how", ODD)
def test_an_odd_answer_is_asked_for_again(how):
    with Server([ODD[how], NOOP]) as server:
        began = time.monotonic()
        (episode,) = played(server, max_steps=1, max_retries=1)
        assert time.monotonic() - began < 30
        assert len(server.requests) == 2 and not episode.steps[0].invalid


@pytest.mark.parametrize("how", ["a list", "a number", "null", "a choice that is null"])
def test_an_odd_answer_that_stays_fails_the_episode_and_says_what_came(how):
    with Server([ODD[how]]) as server, pytest.raises(WorkError, match=r"the answer (is no J|has no c)"):
        played(server)


def test_a_wait_that_is_too_long_is_named_when_nothing_else_helps():
    with Server([ODD["an hour to wait for"]]) as server, pytest.raises(WorkError, match="asks to wait for 3600 s"):
        played(server, max_retries=1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
def test_json_is_read_in_any_of_its_encodings(encoding):
    with Server([Answer(json.dumps(NOOP.body).encode(encoding))]) as server:
        played(server)
        assert len(server.requests) == 2


# No money

BROKE = {
    "402": Answer("Payment Required", 402),
    "402 with a body": error("requires more credits, or fewer max_tokens", 402, code=402),
    "200 with 402 within": error("requires more credits", 200, code=402),
    "200 with a text": error("Insufficient credits", 200, code="402"),
    "200 on the choice": failed("error", error={"code": 402, "message": "Pay."}),
    "200 with a state of its own": Answer({"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}}),
    "400 of Anthropic": error("Your credit balance is too low to access the API.", 400, type="invalid_request_error"),
    "400 of Alibaba": Answer({"error": {"code": "Arrearage", "message": "Access denied, good standing"}}, 400),
    "403 of DeepSeek": error("Insufficient Balance", 403),
    "403 of xAI": Answer({"error": "Your team has either used all available credits or reached its limit."}, 403),
    "429 by its type": error("You exceeded your current quota", 429, type="insufficient_quota"),
    "429 by its code": error("Billing hard limit has been reached", 429, code="billing_hard_limit_reached"),
    "429 of Moonshot": error("Your account is suspended", 429, type="exceeded_current_quota_error"),
}


@pytest.mark.parametrize("how", BROKE)
def test_an_empty_account_stops_the_run_at_once(how):
    with Server([BROKE[how]]) as server:
        with pytest.raises(OutOfMoney, match=r"teachers\.gpt\.endpoint: .* no credit left"):
            played(server, 100, max_retries=5)
        assert len(server.requests) <= 4


@pytest.mark.parametrize(
    "answer",
    [
        error("Rate limit reached. Upgrade at https://console.example/settings/billing", 429),
        Answer('[{"error": {"code": 429, "message": "You exceeded your current quota", "status": "EXHAUSTED"}}]', 429),
    ],
)
def test_a_limit_to_the_rate_is_no_empty_account(answer):
    with Server([answer, NOOP]) as server:
        played(server, max_retries=1)
        assert len(server.requests) == 3


def test_an_endpoint_that_refuses_every_request_is_a_wrong_configuration():
    with Server([error("Bad Request")]) as server:
        with pytest.raises(ConfigError, match=r"teachers\.gpt\.endpoint: .* has refused every request: .*Bad Request"):
            played(server, 100)
        assert len(server.requests) <= 5  # one may have begun when the first was refused


def test_an_endpoint_that_refuses_some_requests_loses_their_episodes_alone():
    def answer(request) -> Answer:
        return error("Bad Request") if request.number % 2 else NOOP

    with Server(answer) as server, pytest.raises(WorkError, match="Bad Request"):
        played(server, 20, concurrency=1)
    assert len(server.requests) > 4


# A setting that is refused

SETTINGS = {
    "temperature": (
        error("Unsupported value: 'temperature' does not support 0.5 with this model.", param="temperature"),
        {"temperature": 0.5},
        "temperature",
        "set it to null",
    ),
    "top_p without a param": (error("`top_p` cannot be specified for this model"), {"top_p": 0.5}, "top_p", "null"),
    "the field of max_tokens": (
        error(
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            param="max_tokens",
        ),
        {"max_tokens": 10, "max_tokens_field": "max_tokens"},
        "max_tokens_field",
        "write max_tokens_field: max_completion_tokens",
    ),
    "the other field, as Mistral says it": (
        Answer(
            {
                "object": "error",
                "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"]}]},
            },
            422,
        ),
        {"max_tokens": 10},
        "max_tokens_field",
        "write max_tokens_field: max_tokens",
    ),
    "too many tokens": (
        error("max_tokens is too large: 99999. This model supports at most 16384 completion tokens"),
        {"max_tokens": 99999},
        "max_tokens",
        "lower it",
    ),
    "no tokens": (error("max_tokens: Field required"), {}, "max_tokens", "set it"),
    "more than the context": (
        error("This model's maximum context length is 512 tokens, however you requested 1300"),
        {"max_tokens": 600},
        "max_tokens",
        "lower it",
    ),
    "tool_choice": (
        error("deepseek-reasoner does not support this tool_choice"),
        {"tool_choice": "required"},
        "tool_choice",
        "null",
    ),
    "tool_choice that no provider takes": (
        error("No endpoints found that support the provided 'tool_choice' value.", 404, code=404),
        {"tool_choice": "required"},
        "tool_choice",
        "null",
    ),
    "vLLM without its flags": (
        error('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        {},
        "tool_choice",
        "start the server with --enable-auto-tool-choice",
    ),
    "llama.cpp without its flag": (error("tools param requires --jinja flag", 500), {}, "tool_choice", "--jinja"),
    "no tools": (error("registry/library/gemma does not support tools"), {}, "model", "takes tools"),
    "a key of extra_body": (
        Answer({"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs"}]}, 422),
        {"extra_body": {"top_k": 5}},
        "extra_body.top_k",
        "remove it",
    ),
    "a key within extra_body": (
        error("Unrecognized chat template argument enable_thinking"),
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        "extra_body.chat_template_kwargs.enable_thinking",
        "remove it",
    ),
    "a key in another spelling": (
        Answer('{"code": "Client specified an invalid argument", "error": "does not take reasoningEffort"}', 400),
        {"extra_body": {"reasoning_effort": "low"}},
        "extra_body.reasoning_effort",
        "remove it",
    ),
    "a key, as Gemini says it": (
        Answer('[{"error": {"code": 400, "message": "Unknown name \\"top_k\\": Cannot find field."}}]', 400),
        {"extra_body": {"top_k": 5}},
        "extra_body.top_k",
        "remove it",
    ),
    "a key, behind a gateway": (
        error("Provider returned error", code=400, metadata={"raw": '{"message": "unknown field top_k"}'}),
        {"extra_body": {"top_k": 5}},
        "extra_body.top_k",
        "unknown field top_k",
    ),
    "within an answer": (
        error("temperature must be 1", 200, type="invalid_request_error"),
        {"temperature": 0.5},
        "temperature",
        "null",
    ),
    "an unknown model": (error("anthropic/claude-9 is not a valid model ID"), {"model": "claude-9"}, "model", "know"),
    "a model that is gone": (error("gone", 410), {}, "model", "does not know the model"),
}


@pytest.mark.parametrize("how", SETTINGS)
def test_a_setting_that_is_refused_is_named_with_what_to_write(how):
    answer, changes, key, remedy = SETTINGS[how]
    with Server([answer]) as server:
        with pytest.raises(ConfigError, match=rf"^teachers\.gpt\.endpoint\.{re.escape(key)}: ") as raised:
            played(server, 50, max_retries=3, **changes)
        assert remedy in str(raised.value)
        assert len(server.requests) <= 4


@pytest.mark.parametrize(
    "answer",
    [
        error("Invalid content type. image_url is only supported by certain models.", param="messages.[1].content"),
        error("No endpoints found that support image input", 404, code=404),
        error("Failed to deserialize: messages[1]: unknown variant `image_url`, expected `text`", 422),
        error("served is not a multimodal model"),
        error("image input is not supported - hint: you may need to provide the mmproj", 500),
    ],
)
def test_a_model_that_takes_no_pictures_says_so_by_the_prompts_mode(answer):
    with Server([answer]) as server:
        with pytest.raises(ConfigError, match=r"^teachers\.gpt\.prompt\.mode: .*write mode: text"):
            played(server, 50, mode="image", max_retries=3)
        assert len(server.requests) <= 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (error("Incorrect API key provided: k***", 400), "refuses no key"),
        (error("API key not valid. Please pass a valid API key.", 400, code="API_KEY_INVALID"), "refuses no key"),
        (error("Who are you?", 200, code=401), "refuses no key"),
        (error("The model `vision-1` does not exist", 404, code="model_not_found"), "does not know the model"),
        (Answer("<html><img> tools, temperature</html>", 404), "no OpenAI-compatible address"),
        (Answer("", 405), "no OpenAI-compatible address"),
    ],
)
def test_a_wrong_key_or_address_is_told_as_such(answer, said):
    with Server([answer]) as server, pytest.raises(ConfigError, match=said):
        played(server, 50, mode="image", temperature=0.5, model="vision-1")


@pytest.mark.parametrize(
    "answer",
    [
        error("No.", 400, code="content_filter"),
        error("No.", 400, code="data_inspection_failed"),
        error("Output blocked by content filtering policy", 400),
        error("Your input was flagged", 403, metadata={"reasons": ["violence"], "flagged_input": "hit"}),
        error("No.", 200, code="content_filter"),
    ],
)
def test_a_prompt_that_a_filter_refuses_is_a_reply(answer):
    with Server([answer, NOOP]) as server:
        (episode,) = played(server)
        assert [step.reply.finish_reason for step in episode.steps] == ["content_filter", "tool_calls"]


def test_another_refusal_of_a_request_fails_its_episode_alone():
    with Server([error("Something about this one", 400), NOOP]) as server:
        episodes = played(server, 4, concurrency=1, max_failure_rate=0.5, temperature=0.5)
        assert len(episodes) == 3


# Replies that cannot be read


@pytest.mark.parametrize(
    ("message", "finish", "remedy"),
    [
        ({"content": "I go left."}, "stop", r"endpoint\.tool_choice to required; a vLLM server needs"),
        ({"content": "[TOOL_CALLS]act"}, "stop", r"Mistral's \[TOOL_CALLS\] in the text; .*--tool-call-parser"),
        ({"content": "<think>Let me"}, "length", r"raise teachers\.gpt\.endpoint\.max_tokens"),
        (call("do", "do"), "tool_calls", r"raise teachers\.gpt\.prompt\.max_actions"),
        ({"content": None}, "content_filter", "refuses to answer"),
    ],
)
def test_when_most_replies_cannot_be_read_the_run_says_what_to_look_at(message, finish, remedy, capsys):
    with Server([Answer(completion(message, finish))]) as server:
        played(server, 2)
    assert re.search(rf"gpt: 4 of 4 replies cannot be read, most for: .*{remedy}", capsys.readouterr().err)


def test_when_most_can_be_read_it_says_nothing(capsys):
    with Server([NOOP, Answer(completion({"content": "Left."}, "stop")), NOOP]) as server:
        played(server, 2)
    assert "cannot be read" not in capsys.readouterr().err
