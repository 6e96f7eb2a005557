"""Whole episodes, played here for whoever asks: by a built-in policy, the student, or a model behind an API."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

from apprentice import store
from apprentice.endpoint.client import Client
from apprentice.endpoint.replies import Replies
from apprentice.environment.messages import Busy, RolloutRequest, Wrong, by_name, in_base64
from apprentice.episode import Reply
from apprentice.params import Agent, Prompt
from apprentice.play import Spec, play_one
from apprentice.players.chat import Chat
from apprentice.players.scripted import Scripted
from apprentice.policy import Policy, Turn

Student = tuple[Callable[[], Policy], Prompt]
"""What makes the policy of one rollout, loading the weights the first time, and what it's shown."""


class Rollouts:
    """Those under way, in a thread with an event loop of its own: their worlds' steps hold up no session.

    scripted: the names of built-in policies. endpoints: models by name, each with where its settings stand. A request
    can name one, and nothing else of it: neither an address nor a key. students: those with weights here, by name.
    most: how many there may be at once.
    """

    def __init__(
        self,
        scripted: tuple[str, ...],
        endpoints: dict[str, tuple[Agent, str]],
        students: dict[str, Student],
        most: int,
    ):
        self.names, self.most = [*scripted, *students, *endpoints], most
        self._endpoints, self._students = endpoints, students
        self._loading = asyncio.Lock()
        self._clients: dict[str, tuple[Client, Replies]] = {}
        self._running: set[Future] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, asked: RolloutRequest) -> Future:
        """Its summary and its rows, in the future; to cancel that is to end it. Raises Wrong; Busy for too many.

        The future raises NoAnswer when the model gives none, ConfigError or WorkError when it cannot be asked.
        """
        if asked.policy not in self.names:
            raise Wrong(f"there is no policy {asked.policy!r} here; there are {', '.join(self.names)}")
        if len(self) >= self.most:
            raise Busy(f"{self.most} rollouts are under way; try again later")
        future = asyncio.run_coroutine_threadsafe(self._play(asked), self._loop)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    async def _play(self, asked: RolloutRequest) -> dict:
        policy: Policy
        max_calls = None
        if asked.policy in self._students:
            make, settings = self._students[asked.policy]
            async with self._loading:
                policy = await asyncio.to_thread(make)
        elif asked.policy in self._endpoints:
            model, whose = self._endpoints[asked.policy]
            policy, settings = self._chat(asked.policy, model, whose), model.prompt
            max_calls = model.max_calls
        else:
            policy, settings = _Fair(Scripted(asked.policy)), Prompt()
        spec = Spec([asked.seed], asked.max_steps, settings, max_calls=max_calls)
        episode = await play_one(policy, spec, asked.seed)
        rows = await asyncio.to_thread(lambda: store.to_table(episode).to_pylist())
        return {
            "policy": asked.policy,
            "seed": asked.seed,
            "steps": episode.length,
            "reward": episode.reward,
            "achievements": episode.unlocked,
            "died": episode.steps[-1].died,
            "ending": episode.steps[-1].ending,
            "decisions": [_decision(row, asked.images) for row in rows],
        }

    def _chat(self, name: str, model: Agent, whose: str) -> Chat:
        """A new one, which knows what the last ones were answered, so that nothing is paid for twice."""
        if name not in self._clients:
            replies = Replies(name, model.endpoint.asked)
            self._clients[name] = Client(model.endpoint, whose, name), replies
        return Chat(name, *self._clients[name])

    def close(self) -> None:
        """End those under way; blocks until they have ended."""

        async def close() -> None:
            playing = asyncio.all_tasks() - {asyncio.current_task()}
            for task in playing:
                task.cancel()
            await asyncio.gather(*playing, return_exceptions=True)  # they write down what they have paid
            for client, replies in self._clients.values():
                await client.__aexit__()
                replies.__exit__()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


class _Fair:
    """A policy that never waits, made to give others their turn, and a cancellation its chance."""

    def __init__(self, policy: Policy):
        self.name, self.policy = policy.name, policy

    def begin(self, seed: int) -> "_FairPlayer":
        return _FairPlayer(self.policy.begin(seed))


class _FairPlayer:
    def __init__(self, player):
        self.player, self.end = player, player.end

    async def reply(self, turn: Turn) -> Reply:
        await asyncio.sleep(0)
        return await self.player.reply(turn)


def _decision(row: dict, images: bool) -> dict:
    """A row of a trace as JSON."""
    image = row.pop("image")
    row["view"] = by_name(row["view"])
    if images:
        row["image"] = in_base64(image["bytes"])
    return row
