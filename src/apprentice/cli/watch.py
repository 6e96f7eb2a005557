"""Watch an episode: every environment step as a picture, while somebody plays or from what was played.

The world is deterministic: whoever looks on plays the same actions in a world of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apprentice import prompt
from apprentice.episode import Episode, Reply
from apprentice.policy import Player, Policy, Turn
from apprentice.world.observation import Observation
from apprentice.world.world import World


@dataclass(frozen=True)
class Moment:
    """What there is to see after an environment step."""

    steps: int
    """Environment steps so far."""
    action: str
    """The one that led here; empty at the start."""
    said: str
    """The player's words of the decision that the action belongs to. A model's may hold anything."""
    invalid: str
    """Why the reply could not be read, so that the action is a noop; empty if it could."""
    observation: Observation
    image: np.ndarray
    """uint8, (size, size, 3); a size of 18 at least."""
    reward: float
    """Crafter's, summed since the start."""
    unlocked: tuple[str, ...]
    """By this action."""
    achievements: tuple[str, ...]
    """So far, in the order of their unlocking."""
    done: bool
    died: bool
    caption: str = ""
    """What the action did, in words."""


class Spectator:
    """A world of one's own, moved by the actions of another."""

    def __init__(self, seed: int, max_steps: int, size: int, opening: Sequence[str] = ()):
        self._world, self._size = World(seed, max_steps=max_steps + len(opening)), size
        self._opening = opening
        self._steps, self._reward, self._achievements = 0, 0.0, ()
        self._before: Observation | None = None

    def start(self) -> Moment:
        observation = self._world.reset()
        for action in self._opening:
            observation = self._world.step(action).observation
        self._before = observation
        return Moment(0, "", "", "", observation, self._world.render(self._size), 0.0, (), (), False, False)

    def see(self, action: str, said: str = "", invalid: str = "") -> Moment:
        outcome = self._world.step(action)
        told = caption(self._before, action, outcome.observation) if self._before else ""
        self._before = outcome.observation
        self._steps += 1
        self._reward += outcome.reward
        self._achievements += outcome.unlocked
        return Moment(
            self._steps,
            action,
            said,
            invalid,
            outcome.observation,
            self._world.render(self._size),
            self._reward,
            outcome.unlocked,
            self._achievements,
            outcome.done,
            outcome.died,
            told,
        )


_HANDS = {
    "tree": "chops the tree", "water": "drinks", "grass": "searches the grass for a sapling", "stone": "mines stone",
    "coal": "mines coal", "iron": "mines iron", "diamond": "mines a diamond", "zombie": "hits the zombie",
    "skeleton": "hits the skeleton", "cow": "hits the cow", "plant": "pokes the plant", "ripe-plant": "eats the plant",
}  # fmt: skip
_OTHERWISE = {"noop": "waits", "sleep": "lies down to sleep"}


def caption(before: Observation, action: str, after: Observation) -> str:
    """What an action did, in words: chops the tree: wood +1."""
    ahead, (verb, _, what) = prompt.ahead(before), action.partition("_")
    owned = before.vitals | before.inventory
    now = after.vitals | after.inventory
    changes = [f"{name} {now[name] - count:+}" for name, count in owned.items() if now[name] != count]
    if before.sleeping and after.sleeping:
        told = "sleeps"
    elif verb == "move":
        told = f"walks {what}" if before.position != after.position else f"turns {what}, to {prompt.ahead(after)}"
    elif action == "do":
        told = _HANDS.get(ahead, f"uses its hands on {ahead}")
    elif verb in ("place", "make"):
        done = before.inventory != after.inventory
        told = f"{verb}s {what.replace('_', ' ')}" if done else f"tries to {verb} {what.replace('_', ' ')}"
    else:
        told = _OTHERWISE.get(action, action)
    return told + (f": {', '.join(changes)}" if changes else "")


class Watched:
    """A policy whose episodes somebody watches: `show` gets each moment when it has come about, before the next."""

    def __init__(self, policy: Policy, max_steps: int, size: int, show: Callable[[Moment], None]):
        self.name, self.policy, self.max_steps, self.size, self.show = policy.name, policy, max_steps, size, show

    def begin(self, seed: int) -> "_WatchedPlayer":
        return _WatchedPlayer(self.policy.begin(seed), Spectator(seed, self.max_steps, self.size), self.show)


class _WatchedPlayer:
    def __init__(self, player: Player, spectator: Spectator, show: Callable[[Moment], None]):
        self.player, self.spectator, self.show = player, spectator, show
        self.begun = False

    async def reply(self, turn: Turn) -> Reply:
        if not self.begun:
            self.begun = True
            self.show(self.spectator.start())
        reply = await self.player.reply(turn)
        parsed = prompt.parse(reply.message, turn.settings.max_actions)
        for action in parsed.actions or ("noop",):
            moment = self.spectator.see(action, prompt.said_beside_calls(reply.message), parsed.invalid)
            self.show(moment)
            if moment.done:
                break
        return reply

    def end(self) -> None:
        self.player.end()


def moments(episode: Episode, size: int, opening: Sequence[str] = ()) -> Iterator[Moment]:
    """A played episode again, step by step; not for an import, whose world is not known. opening: see `play_one`."""
    spectator = Spectator(episode.seed, episode.length, size, opening)
    yield spectator.start()
    for step in episode.steps:
        for action in step.executed:
            yield spectator.see(action, prompt.said_beside_calls(step.reply.message), step.invalid)
