"""Checkpoints that a kill cannot leave half-written."""

from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class Often(TrainerCallback):
    """Saves between validations too: after a kill, at most 100 steps are done again."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % (_LOGS * args.logging_steps) == 0:  # so that what is logged is the same after a kill
            control.should_save = True


_LOGS = 4


class Whole(TrainerCallback):
    """Marks a checkpoint when every rank has written its part; one that a kill cut short has no mark."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / _WHOLE).touch()


_WHOLE = "whole"


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint, None if there is none."""
    marks = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_WHOLE}")
    found = sorted((mark.parent for mark in marks), key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
    return str(found[-1]) if found else None
