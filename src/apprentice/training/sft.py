"""SFT's trainer: TRL's, with losses that are means over the answers' tokens, however a batch is split."""

import torch
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from apprentice.student import loading, tower
from apprentice.student.narrowing import narrow


class SftTrainer(SFTTrainer):
    """The loss of a batch, and of the validation rows, is the same on any number of devices and in any parts."""

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

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluated: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, right, tokens = torch.cat(self._evaluated).sum(dim=0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None) -> tuple[None, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, fused_lm_head=True)
        parts = -output.log_probs, output.is_top1, output.label_mask
        rows = torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts], dim=1)
        self._evaluated.append(self.accelerator.gather_for_metrics(rows))  # without those that fill up a last batch
        return None, None, None
