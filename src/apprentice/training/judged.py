"""The judge's scores of RL's episodes, the same in every rank."""

import sys
from collections.abc import Sequence

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from apprentice.data import judge as judging
from apprentice.episode import Episode
from apprentice.errors import ConfigError, OutOfMoney
from apprentice.params import Judge
from apprentice.training import devices
from apprentice.training.reward import with_mean


class Judged:
    """Asks the judge, in the main rank alone. One that does not work at all is an error; that it ceases to is none."""

    def __init__(self, judge: Judge, group_size: int):
        self.judge, self.group_size = judge, group_size
        self._has_answered = False

    def scores(self, episodes: Sequence[Episode]) -> tuple[list[float], dict[str, float]]:
        """A score for each episode, 0 to 1, and what to log.

        A missing one is replaced by its group's mean, for every algorithm alike.
        """
        found: list = [None]
        if PartialState().is_main_process:
            found = [self._asked(episodes)]
        devices.wait()  # the judge may take minutes
        known = broadcast_object_list(found)[0]
        given = [score for score in known if score is not None]
        groups = [known[start : start + self.group_size] for start in range(0, len(known), self.group_size)]
        log = {"judge_missing": known.count(None) / len(known), "judge_score": float(np.mean(given or [0.0]))}
        return [score for group in groups for score in with_mean(group)], log

    def _asked(self, episodes: Sequence[Episode]) -> list[float | None]:
        try:
            verdicts = judging.scores(episodes, self.judge)
        except (ConfigError, OutOfMoney) as error:
            if not self._has_answered:
                raise
            verdicts = [judging.Verdict(episode.id, None, str(error)) for episode in episodes]
        known = [verdict.score for verdict in verdicts if verdict.score is not None]
        self._has_answered |= bool(known)
        if len(known) < len(verdicts):
            why = next(verdict.why_not for verdict in verdicts if verdict.score is None)
            print(f"rl: the judge scored {len(known)} of {len(verdicts)} episodes; {why}", file=sys.stderr)
        return [verdict.score for verdict in verdicts]
