"""The worlds under way: a session holds one episode at a time, and there are at most so many sessions.

Worlds are moved in threads, so that nobody waits for another's step.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from apprentice.environment.messages import Busy, NoSuchSession, ResetRequest, StateBody, Wrong, answer
from apprentice.workers import cores
from apprentice.world.world import World


class Session:
    """One episode at a time. Its methods block, and are called in a thread, one after the other."""

    def __init__(self):
        self.turn = asyncio.Lock()
        self.seen = time.monotonic()
        """When it was last asked for something."""
        self._world: World | None = None
        self._asked, self._steps, self._achievements = ResetRequest(), 0, ()

    def reset(self, asked: ResetRequest) -> dict:
        if asked.seed is None:
            asked = asked.model_copy(update={"seed": secrets.randbelow(2**31)})
        self._world = World(asked.seed, max_steps=asked.max_steps, size=asked.size)
        self._asked, self._steps, self._achievements = asked, 0, ()
        return answer(self._world.seed, 0, self._world.reset())

    def step(self, action: str) -> dict:
        """Raises Wrong when there is no episode that goes on."""
        if self._world is None:
            raise Wrong("there is no episode yet: reset first")
        if self._world.done:
            raise Wrong("the episode is over: reset first")
        outcome = self._world.step(action)
        self._steps += 1
        self._achievements += outcome.unlocked
        return answer(self._world.seed, self._steps, outcome.observation, outcome)

    def act(self, actions: Sequence[str]) -> dict:
        """Steps until the actions or the episode are over, as one: rewards summed, all that was unlocked."""
        reward, unlocked = 0.0, []
        for action in actions:
            found = self.step(action)
            reward += found["reward"]
            unlocked += found["observation"]["unlocked"]
            if found["done"]:
                break
        return found | {"reward": reward, "observation": found["observation"] | {"unlocked": unlocked}}

    @property
    def state(self) -> dict:
        return StateBody(
            episode_id=self._asked.episode_id,
            step_count=self._steps,
            seed=self._asked.seed,
            max_steps=self._asked.max_steps,
            done=self._world is None or self._world.done,
            achievements=list(self._achievements),
        ).model_dump()


class Sessions:
    """Those under way, each until it ends or has been idle for too long.

    most: how many there may be. idle: seconds without a request after which a session ends.
    """

    def __init__(self, most: int, idle: float):
        self.most, self.idle = most, idle
        self._open: dict[str, Session] = {}
        self._threads = ThreadPoolExecutor(min(32, 2 * cores()), thread_name_prefix="world")

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> tuple[str, Session]:
        """A new one with its name, which nobody can guess. Raises Busy when there are too many."""
        self._end_idle()
        if len(self) >= self.most:
            raise Busy(f"all {self.most} sessions are taken; close one, or try again later")
        name, session = secrets.token_urlsafe(16), Session()
        self._open[name] = session
        return name, session

    def named(self, name: str) -> Session:
        """Raises NoSuchSession."""
        if name not in self._open:
            raise NoSuchSession(
                f"there is no such session: it was closed, idle for {self.idle:g} s, or the server was started anew; "
                "POST /sessions begins another"
            )
        return self._open[name]

    def end(self, name: str) -> None:
        self._open.pop(name, None)

    async def call(self, session: Session, function: Callable, *args: Any) -> Any:
        """In a thread; a session's calls wait for each other."""
        async with session.turn:
            session.seen = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
            finally:
                session.seen = time.monotonic()

    async def tidy(self) -> None:
        """End those that are idle, for ever."""
        while True:
            await asyncio.sleep(min(30.0, self.idle))
            self._end_idle()

    def _end_idle(self) -> None:
        # Those held by a WebSocket end with it, a little earlier than here.
        oldest = time.monotonic() - self.idle - 5
        for name in [name for name, session in self._open.items() if session.seen < oldest]:
            self.end(name)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
