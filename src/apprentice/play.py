"""The only loop: many worlds, one policy, episodes out as they end."""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import numpy as np
from tqdm import tqdm

from apprentice import prompt, store
from apprentice.episode import HISTORY, Episode, Step
from apprentice.ledger import Ledger
from apprentice.params import Prompt
from apprentice.policy import Policy, Turn
from apprentice.processes import in_processes
from apprentice.world import ACTIONS, World

# Not sleep: it is not one action but all until the player wakes up, which may be too late.
_EXPLORED = tuple(action for action in ACTIONS if action != "sleep")


async def play_one(
    policy: Policy,
    seed: int,
    max_steps: int,
    settings: Prompt,
    agent: str = "",
    explore: float = 0.0,
    opening: Sequence[str] = (),
) -> Episode:
    """Play one episode on the world of this seed.

    An invalid reply costs a noop, is recorded with its reason, and the episode goes on. What remains of a reply's
    actions when the episode ends is dropped. explore: the probability with which each action is replaced by a
    random one (never sleep) when executed; the draws depend on the seed alone. opening: actions before the first
    decision; they are neither counted nor recorded.
    """
    world = World(seed, max_steps=max_steps + len(opening))
    player = policy.begin(seed)
    exploration = np.random.default_rng([seed, 2])
    observation, steps, history = world.reset(), [], []
    for action in opening:
        observation = world.step(action).observation
    try:
        while not world.done:
            turn = Turn(observation, tuple(history[-HISTORY:]), settings)
            reply = await player.reply(turn)
            parsed = prompt.parse(reply.message, settings.max_actions)
            before, executed, reward, unlocked = observation, [], 0.0, []
            for action in parsed.actions or ("noop",):
                if explore and parsed.actions and exploration.random() < explore:
                    action = _EXPLORED[exploration.integers(len(_EXPLORED))]
                outcome = world.step(action)
                observation = outcome.observation
                executed.append(action)
                reward += outcome.reward
                unlocked += outcome.unlocked
                if outcome.done:
                    break
            history += executed
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
                    done=outcome.done,
                    died=outcome.died,
                )
            )
    finally:
        player.end()
    return Episode(agent or policy.name, seed, tuple(steps), settings.model_dump_json())


def play(
    policy: Policy,
    seeds: Iterable[int],
    max_steps: int,
    settings: Prompt,
    *,
    agent: str = "",
    explore: float = 0.0,
    opening: Sequence[str] = (),
    ended: Callable[[int, Episode], None] = lambda place, episode: None,
) -> list[Episode]:
    """Play an episode on each seed, all at once, and return them in the order of the seeds.

    A seed may stand there several times. ended: called with each episode, and its place, when it ends.
    """

    async def one(place: int, seed: int) -> Episode:
        episode = await play_one(policy, seed, max_steps, settings, agent, explore, opening)
        ended(place, episode)
        return episode

    async def all_of_them() -> list[Episode]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(place, seed)) for place, seed in enumerate(seeds)]
        return [task.result() for task in tasks]

    return asyncio.run(all_of_them())


def record(
    build: Callable[..., Policy],
    args: tuple,
    seeds: Sequence[int],
    max_steps: int,
    settings: Prompt,
    *,
    fingerprint: str,
    agent: str,
    explore: float = 0.0,
    opening: Sequence[str] = (),
    together: int = 1,
    while_playing: AbstractContextManager = nullcontext(),  # noqa: B008
) -> Iterator[bytes]:
    """The episodes on these seeds, in order, as `store.to_bytes` has them. What the ledger lacks is played first.

    build(*args): the policy, built once in each process. together: how many seeds one policy plays at once. A batched
    model's rounding depends on the company, so episodes are known by it, and if one is missing all are played again.
    while_playing: what the policy needs to be there, entered only if there is something to play.
    """
    groups = [tuple(seeds[start : start + together]) for start in range(0, len(seeds), together)]
    keys = {group: [str(seed) if together == 1 else f"{seed} of {group}" for seed in group] for group in groups}
    with Ledger(fingerprint) as ledger:
        done = ledger.keys()
        missing = [group for group in groups if not done.issuperset(keys[group])]
        calls = [(build, args, group, max_steps, settings, agent, explore, opening) for group in missing]
        with tqdm(total=len(seeds), desc=agent, unit="episode", mininterval=1) as bar:
            bar.update(len(seeds) - sum(map(len, missing)))
            with while_playing if calls else nullcontext():
                for group, played in in_processes(_play_group, calls):
                    for key, data in zip(keys[group], played, strict=True):
                        ledger.add(key, data)
                    bar.update(len(played))
        yield from ledger.records(key for group in groups for key in keys[group])


def _play_group(
    build, args, group, max_steps, settings, agent, explore, opening
) -> tuple[tuple[int, ...], list[bytes]]:
    episodes = play(_built(build, args), group, max_steps, settings, agent=agent, explore=explore, opening=opening)
    return group, [store.to_bytes(episode) for episode in episodes]


@lru_cache(maxsize=1)
def _built(build: Callable[..., Policy], args: tuple) -> Policy:
    return build(*args)
