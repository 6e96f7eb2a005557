"""What others do with `apprentice serve`: an episode through OpenEnv's own client, typed as in TRL's examples.

Runs in the environment of requirements-openenv.lock and prints JSON:

    python tests/environment/openenv_episode.py URL SEED ACTION…
"""

import asyncio
import hashlib
import json
import os
import sys

from openenv import GenericEnvClient
from openenv.core.client_types import StepResult
from openenv.core.env_client import EnvClient
from openenv.core.env_server.types import Action, Observation, State


class Act(Action):
    action: str


class Seen(Observation):
    image: str
    unlocked: list[str]


class Crafter(EnvClient[Act, Seen, State]):
    def _step_payload(self, action: Act) -> dict:
        return action.model_dump()

    def _parse_result(self, payload: dict) -> StepResult[Seen]:
        seen = {name: payload["observation"][name] for name in ("image", "unlocked")}
        observation = Seen(**seen, done=payload["done"], reward=payload["reward"])
        return StepResult(observation, payload["reward"], payload["done"])

    def _parse_state(self, payload: dict) -> State:
        return State(episode_id=payload["episode_id"], step_count=payload["step_count"])


def line(image: str, result: StepResult) -> list:
    return [hashlib.sha256(image.encode()).hexdigest(), result.reward, result.done]


def typed(url: str, seed: int, actions: list[str]) -> tuple[list, int]:
    """By the typed client, without async: what TRL's environments do."""
    key = os.environ.get("APPRENTICE_SERVE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else None
    with Crafter(url, headers=headers).sync() as world:
        result = world.reset(seed=seed, max_steps=len(actions))
        seen = [line(result.observation.image, result)]
        for action in actions:
            result = world.step(Act(action=action))
            seen.append(line(result.observation.image, result))
        return seen, world.state().step_count


async def generic(url: str, seed: int, actions: list[str]) -> tuple[list, str]:
    """By the client that knows no types; and what it hears of a wrong action."""
    key = os.environ.get("APPRENTICE_SERVE_KEY")
    async with GenericEnvClient(url.replace("://", f"://me:{key}@") if key else url) as world:
        result = await world.reset(seed=seed, max_steps=len(actions))
        seen = [line(result.observation["image"], result)]
        try:
            await world.step({"action": "fly"})
            said = ""
        except RuntimeError as error:
            said = str(error)
        for action in actions:
            result = await world.step({"action": action})
            seen.append(line(result.observation["image"], result))
        return seen, said


if __name__ == "__main__":
    url, seed, *actions = sys.argv[1:]
    print(json.dumps([typed(url, int(seed), actions), asyncio.run(generic(url, int(seed), actions))]))
