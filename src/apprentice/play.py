"""The only loop: many worlds, one policy, episodes out as they end."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
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


async def play_one(
    policy: Policy, seed: int, max_steps: int, settings: Prompt, agent: str = "", explore: float = 0.0
) -> Episode:
    """Play one episode on the world of this seed.

    An invalid reply costs a noop, is recorded with its reason, and the episode goes on. What remains of a reply's
    actions when the episode ends is dropped. explore: the probability with which each action is replaced by a
    random one when executed; the draws depend on the seed alone.
    """
    world = World(seed, max_steps=max_steps)
    player = policy.begin(seed)
    exploration = np.random.default_rng([seed, 2])
    observation, steps, history = world.reset(), [], []
    try:
        while not world.done:
            turn = Turn(observation, tuple(history[-HISTORY:]), settings)
            reply = await player.reply(turn)
            parsed = prompt.parse(reply.message, settings.max_actions)
            before, executed, reward, unlocked = observation, [], 0.0, []
            for action in parsed.actions or ("noop",):
                if explore and exploration.random() < explore:
                    action = ACTIONS[exploration.integers(len(ACTIONS))]
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
    ended: Callable[[Episode], None] = lambda episode: None,
) -> list[Episode]:
    """Play an episode on each seed, all at once, and return them in the order of the seeds.

    A seed may stand there several times. ended: called with each episode when it ends.
    """

    async def one(seed: int) -> Episode:
        episode = await play_one(policy, seed, max_steps, settings, agent, explore)
        ended(episode)
        return episode

    async def all_of_them() -> list[Episode]:
        tasks = [asyncio.ensure_future(one(seed)) for seed in seeds]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

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
    together: int = 1,
) -> None:
    """Play an episode on each seed that the ledger does not have yet, on all cores, recording each as it ends.

    build(*args): the policy, built once in each process. together: how many seeds one policy plays at once; if one
    of them is missing all are played again, since a batched model's rounding depends on the company.
    """
    with Ledger(fingerprint) as ledger:
        done = ledger.seeds()
        groups = [seeds[start : start + together] for start in range(0, len(seeds), together)]
        missing = [group for group in groups if not done.issuperset(group)]
        calls = [(build, args, group, max_steps, settings, agent, explore) for group in missing]
        with tqdm(total=len(seeds), desc=agent, unit="episode", mininterval=1) as bar:
            bar.update(len(seeds) - sum(map(len, missing)))
            for played in in_processes(_play_group, calls):
                for seed, data in played:
                    ledger.add(seed, data)
                bar.update(len(played))


def _play_group(build, args, seeds, max_steps, settings, agent, explore) -> list[tuple[int, bytes]]:
    episodes = play(_built(build, args), seeds, max_steps, settings, agent=agent, explore=explore)
    return [(episode.seed, store.to_bytes(episode)) for episode in episodes]


@lru_cache(maxsize=1)
def _built(build: Callable[..., Policy], args: tuple) -> Policy:
    return build(*args)
