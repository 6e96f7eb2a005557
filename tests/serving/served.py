"""Decisions of every kind, each as the turn that a player is asked at and as the row that training is given."""

from collections.abc import Iterator

import numpy as np

from apprentice import prompt
from apprentice.data.chat_rows import row
from apprentice.episode import Reply
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.policy import Turn
from apprentice.world import ACTIONS

KINDS = {
    "image": Prompt(mode="image", rules=False, history=8),
    "text+image": Prompt(mode="text+image", history=4, max_actions=5, scale=4),
    "text+image, all that can be shown": Prompt(
        mode="text+image", rules=False, history=32, max_actions=20, inventory="all", position=True
    ),
    "text": Prompt(mode="text", max_actions=3, history=2),
}
"""Prompt settings, by name."""


def decisions(settings: Prompt, count: int, seed: int = 5) -> Iterator[tuple[Turn, dict]]:
    """So many decisions of a player that asks for as many actions at once as it may, and says why at times.

    The turn is what `Local` and a served student are asked with (turn.messages, prompt.TOOLS), the row what `split`
    writes. On a GPU server or here, the row's prompt and the turn's have to be the same token ids and pixels.
    """
    found = 0
    while found < count:
        episode = play(_Several(), Spec([seed], 2000, settings))[0]
        for step in episode.steps[: count - found]:
            yield Turn(step.observation, step.history, settings), row(episode, step, settings, rationale=True)
        found, seed = found + len(episode.steps), seed + 1


class _Several:
    """Asks for random actions, 1 to as many as are allowed."""

    name = "several"

    def begin(self, seed: int) -> "_Several":
        self.generator = np.random.default_rng(seed)
        return self

    async def reply(self, turn: Turn) -> Reply:
        count = self.generator.integers(1, turn.settings.max_actions, endpoint=True)
        words = [None, "There is nothing here.", 'A cow — "food" <b>now</b>.\n\nEat & go on.'][
            self.generator.integers(3)
        ]
        return Reply(prompt.answer(self.generator.choice(ACTIONS, count).tolist(), words), "tool_calls", self.name)

    def end(self) -> None:
        pass
