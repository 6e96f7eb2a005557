"""The only loop: many worlds, one policy, episodes out as they end."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from apprentice import prompt, store
from apprentice.episode import HISTORY, Episode, Step
from apprentice.ledger import Ledger
from apprentice.params import Prompt
from apprentice.policy import Policy, Turn
from apprentice.progress import Progress
from apprentice.workers import in_processes, together
from apprentice.world.observation import ACTIONS
from apprentice.world.world import World

# Not sleep: it is not one action but all until the player wakes up, which may be too late.
_EXPLORED = tuple(action for action in ACTIONS if action != "sleep")


@dataclass(frozen=True)
class Spec:
    """What is played, and how: the same for the teacher, the student, RL and the benchmark."""

    seeds: Sequence[int]
    """World seeds, an episode on each, in order; a seed may stand there several times."""
    max_steps: int
    """Environment steps after which an episode ends."""
    prompt: Prompt
    """What the player is shown."""
    agent: str = ""
    """The name that the episodes bear; empty is the policy's."""
    explore: float = 0.0
    """The probability with which each action is replaced by a random one (never sleep) when it's executed; the draws
    depend on the seed alone."""
    opening: tuple[str, ...] = ()
    """Actions before the first decision; they are neither counted nor recorded."""
    together: int = 1
    """How many episodes one policy plays at once. A batched model's rounding depends on the company."""
    max_calls: int | None = None
    """Replies after which an episode ends, readable or not; None is no cap. How often a player has to ask until it has
    one doesn't matter."""
    fingerprint: str = ""
    """The name for all that shapes these episodes, under which the ledger has them."""


async def play_one(policy: Policy, spec: Spec, seed: int) -> Episode:
    """Play one episode on the world of this seed.

    An invalid reply costs a noop, is recorded with its reason, and the episode goes on. What remains of a reply's
    actions when the episode ends is dropped.
    """
    world = World(seed, max_steps=spec.max_steps + len(spec.opening))
    player = policy.begin(seed)
    exploration = np.random.default_rng([seed, 2])
    observation, ending = world.reset(), ""
    steps: list[Step] = []
    history: list[str] = []
    for action in spec.opening:
        observation = world.step(action).observation
    try:
        while not ending:
            turn = Turn(observation, tuple(history[-HISTORY:]), spec.prompt)
            reply = await player.reply(turn)
            parsed = prompt.parse(reply.message, spec.prompt.max_actions)
            before, executed, reward, unlocked = observation, [], 0.0, []
            for action in parsed.actions or ("noop",):
                if spec.explore and parsed.actions and exploration.random() < spec.explore:
                    action = _EXPLORED[exploration.integers(len(_EXPLORED))]
                outcome = world.step(action)
                observation = outcome.observation
                executed.append(action)
                reward += outcome.reward
                unlocked += outcome.unlocked
                if outcome.done:
                    break
            history += executed
            if outcome.done:
                ending = "died" if outcome.died else "steps"
            elif len(steps) + 1 == spec.max_calls:
                ending = "calls"
            steps.append(
                Step(
                    step=len(history) - len(executed),
                    history=turn.history,
                    observation=before,
                    reply=reply,
                    asked=parsed.actions,
                    invalid=parsed.invalid,
                    executed=tuple(executed),
                    reward=reward,
                    health_change=observation.vitals["health"] - before.vitals["health"],
                    unlocked=tuple(unlocked),
                    done=bool(ending),
                    died=outcome.died,
                    ending=ending,
                )
            )
    finally:
        player.end()
    return Episode(spec.agent or policy.name, seed, tuple(steps), spec.prompt.model_dump_json())


def _nothing(place: int, episode: Episode) -> None:
    pass


async def play_all(policy: Policy, spec: Spec, ended: Callable[[int, Episode], None] = _nothing) -> list[Episode]:
    """Play all of a spec's episodes at once, and return them in the order of its seeds.

    ended: called with each episode, and its place, when it ends.
    """

    async def one(place: int, seed: int) -> Episode:
        episode = await play_one(policy, spec, seed)
        ended(place, episode)
        return episode

    return await together(one(place, seed) for place, seed in enumerate(spec.seeds))


def play(policy: Policy, spec: Spec, ended: Callable[[int, Episode], None] = _nothing) -> list[Episode]:
    """`play_all`, to its end."""
    return asyncio.run(play_all(policy, spec, ended))


def record(
    build: Callable[..., Policy],
    args: tuple,
    spec: Spec,
    while_playing: AbstractContextManager = nullcontext(),  # noqa: B008
    places: Sequence[str | None] | None = None,
) -> Iterator[bytes]:
    """The episodes of a spec, in order, as `store.to_bytes` has them. What the ledger lacks is played first.

    build(*args): the policy, built once in each process. Episodes that one policy plays at once are known by their
    company, and if one is missing all of them are played again. while_playing: what the policy needs to be there,
    entered only if there is something to play. places: the processes that play, as `in_processes` has them.
    """
    starts = range(0, len(spec.seeds), spec.together)
    groups = [tuple(spec.seeds[start : start + spec.together]) for start in starts]
    keys = {group: [str(seed) if spec.together == 1 else f"{seed} of {group}" for seed in group] for group in groups}
    with Ledger(spec.fingerprint) as ledger:
        done = ledger.keys()
        missing = [group for group in groups if not done.issuperset(keys[group])]
        calls = [(build, args, replace(spec, seeds=group)) for group in missing]
        left = sum(map(len, missing))
        shown = Progress(spec.agent, {"episode": left}, done=len(spec.seeds) - left)
        if left < len(spec.seeds):
            shown.say(f"{spec.agent}: {len(spec.seeds) - left} of {len(spec.seeds)} episodes are kept from before")
        with shown as progress, while_playing if calls else nullcontext():
            for group, played in in_processes(_play_group, calls, places):
                for key, data in zip(keys[group], played, strict=True):
                    ledger.add(key, data)
                progress.end("episode", len(played))
        yield from ledger.records(key for group in groups for key in keys[group])


def _play_group(build, args, spec: Spec) -> tuple[tuple[int, ...], list[bytes]]:
    return tuple(spec.seeds), list(map(store.to_bytes, play(_built(build, args), spec)))


@lru_cache(maxsize=1)
def _built(build: Callable[..., Policy], args: tuple) -> Policy:
    return build(*args)
