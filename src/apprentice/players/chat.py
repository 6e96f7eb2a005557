"""A model behind an endpoint as a teacher: many episodes at once, and every reply is kept, for it was paid for.

An episode that was interrupted is played again from the kept replies, which costs nothing since the world is
deterministic, and goes on from there. A reply is known by all that was shown for it: what changes no prompt, such as
more steps an episode or other code, pays for nothing again.
"""

import asyncio
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import uvloop

from apprentice import prompt, store
from apprentice.endpoint.client import Client
from apprentice.endpoint.purse import Purse
from apprentice.endpoint.replies import Replies, shown_digest
from apprentice.episode import Episode, Reply
from apprentice.errors import ConfigError, NoAnswer, WorkError
from apprentice.fingerprint import fingerprint
from apprentice.params import Endpoint
from apprentice.play import Spec, play_one
from apprentice.policy import Turn
from apprentice.progress import Progress
from apprentice.stage import told
from apprentice.workers import together
from apprentice.world.observation import ACTIONS

_WRITTEN = f"""

Write the call as text, in this form and with nothing after it:
<tool_call>
{{"name": "act", "arguments": {{"actions": ["noop"]}}}}
</tool_call>
The actions are {", ".join(ACTIONS)}."""
"""What the system prompt ends with for an endpoint without tools."""


class Chat:
    """The policy. What its endpoint does wrong for good (NoAnswer) ends that one episode."""

    def __init__(self, name: str, client: Client, replies: Replies):
        self.name, self.client, self.replies = name, client, replies
        self.kept = replies.decisions()
        """How many decisions of each seed have been answered before; `replies` belongs to this process alone."""
        self.costs: dict[int, float | None] = {}
        """Dollars of each episode's replies, by its seed; None without a price."""
        self.going_on = asyncio.Lock()
        self.stopped: ConfigError | WorkError | None = None
        """Why nothing may be asked any more; replies under way are still waited for and kept."""

    def begin(self, seed: int) -> "_ChatPlayer":
        self.costs[seed] = 0.0
        return _ChatPlayer(self, seed)


class _ChatPlayer:
    def __init__(self, policy: Chat, seed: int):
        self.policy, self.seed, self.decision = policy, seed, 0

    async def reply(self, turn: Turn) -> Reply:
        messages, tools = turn.messages, prompt.TOOLS
        if not self.policy.client.endpoint.use_tools:
            system, *others = messages
            messages, tools = [system | {"content": system["content"] + _WRITTEN}, *others], []
        reply, cost = await self._reply(messages, tools)
        self.decision += 1
        total = self.policy.costs[self.seed]
        self.policy.costs[self.seed] = None if cost is None or total is None else total + cost
        return replace(reply, message=prompt.in_openai_form(reply.message))

    async def _reply(self, messages: list[dict], tools: list[dict]) -> tuple[Reply, float | None]:
        policy, shown = self.policy, shown_digest(messages, tools)
        known = self.decision < policy.kept.get(self.seed, 0)
        if known and (kept := policy.replies.get(self.seed, self.decision, shown)):
            await asyncio.sleep(0)  # the others' turn: a whole episode may be kept
            return kept
        if policy.stopped:
            raise policy.stopped
        answer = await policy.client.complete(messages, tools or None)
        reply = Reply(
            answer.message, answer.finish_reason, answer.model, answer.prompt_tokens, answer.completion_tokens
        )
        policy.replies.add(self.seed, self.decision, shown, reply, answer.cost, answer.seconds)
        # One goes on to its next request in each turn of the event loop. If all that wait did, the first one's request
        # would leave, a task of its own, only when the last one's is ready: the endpoint would idle meanwhile.
        async with policy.going_on:
            await asyncio.sleep(0)
        return reply, answer.cost

    def end(self) -> None:
        pass


def record(spec: Spec, endpoint: Endpoint, code: str, whose: str) -> Iterator[bytes]:
    """The episodes of a spec (`store.to_bytes`) in the order of its seeds; what isn't there yet is played first.

    code: the digest of what turns replies into episodes. whose: where the endpoint's settings stand, for error
    messages. Raises ConfigError when the endpoint refuses the key, the model or a setting, WorkError when too many
    episodes have failed or the money is spent; a later run goes on in every case.
    """
    name, seeds = spec.agent, spec.seeds
    with Replies(name, endpoint.asked, alone=True) as replies:
        client = Client(endpoint, whose, name)
        policy, run = Chat(name, client, replies), _run(spec, endpoint)
        wrong: Counter[tuple[str, str]] = Counter()
        finished = replies.finished(run, code)
        failures: dict[int, str] = {}
        missing = [seed for seed in seeds if seed not in finished]
        with Progress(name, {"episode": len(missing)}, done=len(seeds) - len(missing)) as progress:

            def tell() -> None:
                spent = f", ${client.purse.known:.4f} spent" if client.price else ""
                progress.news = f"{len(failures)} failed{spent}"
                progress.end("episode")

            def ended(seed: int, episode: Episode, record: bytes) -> None:
                replies.ended(run, seed, policy.costs[seed], code, record)
                wrong.update((step.invalid, step.reply.finish_reason) for step in episode.steps)
                progress.say(told(episode, policy.costs[seed]))
                tell()

            def failed(seed: int, error: NoAnswer) -> None:
                failures[seed] = str(error)
                replies.failed(run, seed, failures[seed])
                progress.say(f"seed {seed}: failed, {error}")
                if len(failures) > max(1, endpoint.max_failure_rate * len(seeds)):
                    policy.stopped = policy.stopped or too_many(spec, endpoint, failures)
                tell()

            play = _play(policy, spec, missing, ended, failed)
            with _garbage_collected_seldom():
                uvloop.run(play)  # a tenth faster than asyncio's own loop
        if unread := unread_replies(wrong, spec, whose):
            print(unread, file=sys.stderr)
        if policy.stopped:
            raise policy.stopped
        if len(failures) > endpoint.max_failure_rate * len(seeds) or len(failures) == len(seeds):
            raise too_many(spec, endpoint, failures)
        if failures:
            print(f"{name}: left out, for the next run to try again: {_counted(failures)}", file=sys.stderr)
        yield from replies.records(run, (seed for seed in seeds if seed not in failures))


@contextmanager
def _garbage_collected_seldom() -> Iterator[None]:
    """A tenth of the time went into looking again and again at all that was imported and played."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def _play(
    policy: Chat,
    spec: Spec,
    seeds: list[int],
    ended: Callable[[int, Episode, bytes], None],
    failed: Callable[[int, NoAnswer], None],
) -> None:
    """Play an episode on each of these seeds, so many at once, each at its own pace.

    The first error that others would meet too stops them all, when what they have under way is answered and kept.
    """
    waiting = iter(seeds)

    async def one_after_the_other() -> None:
        for seed in waiting:
            if policy.stopped:
                break
            try:
                episode = await play_one(policy, spec, seed)
                # In a thread: it takes a millisecond a decision, and the others shall go on.
                record = await asyncio.to_thread(store.to_bytes, episode)
                ended(seed, episode, record)
            except NoAnswer as error:
                failed(seed, error)
            except (ConfigError, WorkError) as error:
                policy.stopped = policy.stopped or error
                break

    async with policy.client:
        await together(one_after_the_other() for _ in range(min(policy.client.endpoint.concurrency, len(seeds))))


def unread_replies(replies: Counter[tuple[str, str]], spec: Spec, whose: str) -> str:
    """What to look at when most replies cannot be read; empty when most can. replies: (why not, finish reason)."""
    wrong = Counter({key: number for key, number in replies.items() if key[0]})
    if wrong.total() * 2 <= replies.total():
        return ""
    why, finish = wrong.most_common(1)[0][0]
    remedy = f"apprentice traces shows them; {whose}.tool_choice: required makes most models call the tool"
    if finish == "length":
        remedy = f"they were cut off: raise {whose}.max_tokens, or have the model think less"
    elif finish in ("content_filter", "refusal"):
        remedy = "the model or its provider refuses to answer: name another model"
    elif "actions asked for" in why:
        remedy = f"raise {whose.removesuffix('endpoint')}prompt.max_actions"
    elif why.startswith("no tool call"):
        remedy = (
            f"set {whose}.tool_choice to required; a vLLM server needs --enable-auto-tool-choice and the "
            "--tool-call-parser of its model"
        )
    return f"{spec.agent}: {wrong.total()} of {replies.total()} replies cannot be read, most for: {why}; {remedy}"


def cost(spec: Spec, endpoint: Endpoint) -> tuple[float | None, float | None]:
    """Dollars for the finished episodes of a spec, and for all that was paid; None where they aren't known."""
    with Replies(spec.agent, endpoint.asked) as replies, Purse(endpoint, spec.agent) as purse:
        finished = replies.finished(_run(spec, endpoint))
        costs = [finished[seed] for seed in spec.seeds if seed in finished]
        return None if None in costs else sum(costs), purse.spent


def status(spec: Spec, endpoint: Endpoint) -> str:
    """What there is, in a few lines; plays nothing and needs no key."""
    seeds, run = spec.seeds, _run(spec, endpoint)
    with Replies(spec.agent, endpoint.asked) as replies, Purse(endpoint, spec.agent) as purse:
        finished, failures, kept = replies.finished(run), replies.failures(run), replies.decisions()
        spent = purse.spent
    begun = {seed: kept[seed] for seed in seeds if seed in kept and seed not in finished}
    failed = {seed: failures[seed] for seed in seeds if seed in failures}
    lines = [
        f"{spec.agent}: {len(finished.keys() & set(seeds))} of {len(seeds)} episodes done; {len(begun)} unfinished, "
        f"with {sum(begun.values())} decisions; {len(failed)} failed",
        f"{sum(kept.values())} replies for " + ("an unknown price" if spent is None else f"${spent:.4f}"),
    ]
    return "\n".join(lines + ([f"failed: {_counted(failed)}"] if failed else []))


def _run(spec: Spec, endpoint: Endpoint) -> str:
    """A name for how the episodes are played, whatever it may cost and however fast it goes."""
    settings = {"max_steps": spec.max_steps, "explore": spec.explore, "prompt": spec.prompt.model_dump(mode="json")}
    if spec.opening:
        settings["opening"] = spec.opening
    if spec.max_calls is not None:
        settings["max_calls"] = spec.max_calls
    return fingerprint(agent=spec.agent, teacher=settings, endpoint=endpoint.asked)


def too_many(spec: Spec, endpoint: Endpoint, failures: dict[int, str]) -> WorkError:
    return WorkError(
        f"{spec.agent}: {len(failures)} of {len(spec.seeds)} episodes failed, and max_failure_rate is "
        f"{endpoint.max_failure_rate:g}: {_counted(failures)}. Their replies are kept; run again to "
        "try the rest"
    )


def _counted(failures: dict[int, str]) -> str:
    """The reasons, the commonest first, with how often and for example where."""
    seeds = {reason: seed for seed, reason in failures.items()}
    counts = Counter(failures.values()).most_common(3)
    return "; ".join(f"{number} × {reason} (seed {seeds[reason]})" for reason, number in counts)
