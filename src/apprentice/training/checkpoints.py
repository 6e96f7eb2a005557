"""Checkpoints that are known to be whole: a kill, a full disk or a power cut may leave one that isn't."""

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from apprentice.files import SEAL, damage, seal, sealed
from apprentice.training import devices


class Often(TrainerCallback):
    """Saves between validations too: after a kill, at most 100 steps are done again."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % (_LOGS * args.logging_steps) == 0:  # so that what is logged is the same after a kill
            control.should_save = True


_LOGS = 4


class Whole(TrainerCallback):
    """Seals a checkpoint when every rank has written its part, and removes what the two newest don't need.

    The trainer's own limit would remove the one before, or the best one, before the new one is whole; so set none.
    """

    def __init__(self, beside: Callable[[], Iterable[Path]] = tuple):
        """beside: the files outside of a checkpoint's folder that a run continued from it reads."""
        self._beside = beside

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.best_global_step:  # the folder that it was saved in may have another name now
            state.best_model_checkpoint = str(_named(Path(args.output_dir), state.best_global_step))

    def on_save(self, args, state, control, **kwargs) -> None:
        devices.wait()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            checkpoint, best = (_named(folder, step or 0) for step in (state.global_step, state.best_global_step))
            needed = [file for file in best.rglob("*") if file.is_file()] if best != checkpoint else []
            seal(checkpoint, [*needed, *self._beside()])
            _forget(folder)


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint, None if there is none. One that is damaged is named and removed.

    Every rank has to call it.
    """
    found: list[str | None] = [None]
    if PartialState().is_main_process:
        found = [_last(folder)]
    return broadcast_object_list(found)[0]


def _last(folder: Path) -> str | None:
    for checkpoint in _newest_first(folder):
        why = damage(checkpoint)
        if not why:
            return str(checkpoint)
        if (checkpoint / SEAL).exists():  # what a kill has cut short is nothing to speak of
            message = f"{why}: {checkpoint.name} is given up, and training goes on from an earlier point"
            print(message, file=sys.stderr, flush=True)
        shutil.rmtree(checkpoint)
    return None


def _forget(folder: Path) -> None:
    newest = _newest_first(folder)
    needed = {file for checkpoint in newest[:2] if (checkpoint / SEAL).exists() for file in sealed(checkpoint)}
    for checkpoint in newest[2:]:
        if not any(file.is_relative_to(checkpoint.resolve()) for file in needed):
            shutil.rmtree(checkpoint)


def _named(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _newest_first(folder: Path) -> list[Path]:
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted(found, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), reverse=True)
