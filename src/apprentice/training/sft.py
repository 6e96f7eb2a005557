"""SFT's trainer: TRL's, with losses that are means over the answers' tokens, however a batch is split."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from apprentice import gpus
from apprentice.errors import WorkError
from apprentice.params import Distill, Sft
from apprentice.student import loading, tower
from apprentice.student.narrowing import narrow


def config(section: Sft | Distill, dtype: str, folder: Path, rows: int, accumulation: int, **more) -> SFTConfig:
    """The settings that sft and distill share, as TRL takes them.

    folder: for checkpoints. rows: at once, in each rank. more: what only one of them has.
    """
    return SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_ratio,
        lr_scheduler_type=section.lr_scheduler,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        bf16=dtype == "bfloat16",
        use_cpu=not gpus.used(),
        gradient_checkpointing=section.gradient_checkpointing,
        ddp_find_unused_parameters=False,
        seed=section.random_seed,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **more,
    )


class SftTrainer(SFTTrainer):
    """The loss of a batch, and of the validation rows, is the same on any number of devices and in any parts."""

    held_out: Callable[[int], dict[str, float]] | None = None
    """Play on held-out worlds after so many steps, part of each validation: what it came to."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Qwen3-VL says no, meaning a loss of its own that isn't used here. Without the number of tokens of the whole
        # batch, TRL's would be the mean of each part's mean.
        self.model_accepts_loss_kwargs = True
        model = self.accelerator.unwrap_model(self.model)
        narrow(model.get_base_model())
        tower.prepare(model.get_base_model())
        if self.args.bf16:
            loading.keep_precision(model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:  # else training would end here, as if it were done
            raise WorkError(
                f"sft: the training rows ended within step {self.state.global_step + 1} of {self.state.max_steps}; "
                "make data/sft anew: dvc repro -f -s split"
            )
        return batches, tokens

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluated: list[torch.Tensor] = []
        self.accelerator.unwrap_model(self.model).eval()
        played = self.held_out(self.state.global_step) if self.held_out else {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = torch.cat(self._evaluated)
        if len(rows) < (output.num_samples or 0):
            raise WorkError(
                f"sft: only {len(rows)} of {output.num_samples} validation rows were seen; make data/sft anew: "
                "dvc repro -f -s split"
            )
        loss, right, tokens = rows.sum(dim=0).tolist()
        found = {"loss": loss / tokens, "mean_token_accuracy": right / tokens} | played
        for name, value in found.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)
        parts = -output.log_probs, output.is_top1, output.label_mask
        rows = torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts], dim=1)
        self._evaluated.append(self.accelerator.gather_for_metrics(rows))  # without those that fill up a last batch
        return None, None, None
