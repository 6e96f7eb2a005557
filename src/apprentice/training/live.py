"""What a trainer shows while it works: one line on how far it is, a line for each iteration, curves that grow.

It shapes no result.
"""

import os
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from apprentice import compute
from apprentice.progress import Progress
from apprentice.stage import LIVE, write_metrics


def reporting(stage: str) -> dict[str, Any]:
    """What a trainer's arguments say of compute.yaml's report_to."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"runs/{stage}")
    os.environ.setdefault("WANDB_PROJECT", "apprentice")
    return {"report_to": compute.reporters() or "none", "run_name": stage, "project": "apprentice"}


class Live(TrainerCallback):
    """Takes the place of a trainer's own bars and dictionaries. Every rank has one; the first rank's is seen."""

    def __init__(
        self,
        trainer: Trainer,
        stage: str,
        plan: Callable[[], tuple[dict[str, int], int]],
        curves: Callable[[list[dict]], None],
        news: dict[str, tuple[str, str]],
        stays: str = "",
    ):
        """plan: asked for when training begins, see Progress; what is called step and validation there is counted
        here. curves: writes them, of the trainer's log so far. news: what matters of the log, key → name, format.
        stays: an entry that has this key is a line that stays."""
        self.stage, self.plan, self.curves, self.news, self.stays = stage, plan, curves, news, stays
        self._seen: dict[str, float] = {}
        self._progress: Progress | None = None
        for bar in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(bar)
        trainer.add_callback(self)

    def begin(self, kind: str, shown: str = "") -> None:
        """This kind of the plan's work begins; shown: its name, if another."""
        if self._progress:
            self._progress.begin(kind, shown)

    def end(self, kind: str, news: str = "") -> None:
        """It has been done; the news stay on the screen."""
        if self._progress:
            self._progress.end(kind)
            if news:
                self._progress.say(f"{self.stage}: {news}")

    def close(self) -> None:
        """There will be nothing more to show."""
        if self._progress:
            self._progress.__exit__()
            self._progress = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        plan, done = self.plan()
        self._progress = Progress(self.stage, plan, done, shown=state.is_world_process_zero)
        self._progress.__enter__()
        if done:
            unit, then = self._progress.unit, "and it goes on from there" if any(plan.values()) else "which is all"
            self._progress.say(
                f"{self.stage}: {done} of {self._progress.total} {unit}s are kept from before, {then}; to begin anew: "
                f"apprentice cache clear {self.stage}"
            )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._progress and "step" in self._progress.plan:
            self.end("step")

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self.end("validation")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        assert self._progress is not None
        if self._progress.unit == "iteration" and self.stays in logs:
            self.end("iteration")
        if not self._progress.shown or not (self.news.keys() & logs.keys()):
            return
        self._seen |= {key: logs[key] for key in self.news if key in logs}
        seen = {name: (self._seen[key], form) for key, (name, form) in self.news.items() if key in self._seen}
        self._progress.news = ", ".join(f"{name} {format(float(value), form)}" for name, (value, form) in seen.items())
        if self.stays in logs:
            self._progress.say(str(self._progress))
        self.curves(state.log_history)
        counts = {self._progress.unit: self._progress.done, "of": self._progress.total}
        values = {self.news[key][0]: float(value) for key, value in self._seen.items()}
        write_metrics(LIVE, {"stage": self.stage, **counts, **values})
