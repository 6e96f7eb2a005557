"""RL's update: TRL's GRPO trainer, fed with decisions of the student's own play.

stages/rl.py has the loop: it plays, scores, compares and draws, and hands an iteration's batches to this trainer.
Losses, clipping, the KL divergence to a frozen copy of the adapter, optimizer and checkpoints are TRL's.

Of TRL 1.16 this file alone uses names that are not public: `_prepare_inputs`, `_compute_loss`, `_metrics` and
`_get_per_token_logps_and_entropies`. tests/test_trl.py says what each has to be.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

from apprentice.episode import Step
from apprentice.params import Prompt, Rl
from apprentice.serving.in_process import vision_tokens
from apprentice.student import tower
from apprentice.student.encoding import batch
from apprentice.student.narrowing import narrow
from apprentice.training import rollouts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor


class RlTrainer(GRPOTrainer):
    """TRL's GRPO on batches that it is given, an iteration's at a time.

    What is drawn for an iteration does not depend on the number of ranks: all draw the same decisions, and each trains
    on its share.
    """

    args: GRPOConfig
    processing_class: "Qwen3VLProcessor"

    def __init__(
        self,
        model: "PeftModel",
        processor: "Qwen3VLProcessor",
        settings: Rl,
        shown_with: Prompt,
        args: GRPOConfig,
        exact: bool,
    ):
        """model: with the adapter to train. exact: the sampler's log-probabilities are this trainer's own."""
        self.rl, self.shown_with, self.exact = settings, shown_with, exact
        self._experience: Iterator[list[dict]] = iter(())
        self._batches: list[dict] = []
        self._taken = 0
        self.stale = False
        """What is trained on was played with an older policy."""
        # What the sampler never draws has no share in the probabilities here either; entropies could not bear -inf.
        head = model.get_output_embeddings()
        bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
        bias[vision_tokens(processor)] = -1e4
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
        # TRL walks through a data set of prompts; ours come from the world, so its rows only count.
        rows = Dataset.from_dict({"prompt": ["play"] * args.generation_batch_size})
        super().__init__(model, _no_reward, args=args, train_dataset=rows, processing_class=processor)
        base = cast("Qwen3VLForConditionalGeneration", model.get_base_model())
        narrow(base)
        tower.prepare(base)

    def learn(self, experience: Iterator[list[dict]], checkpoint: str | None) -> None:
        """Update the policy on each iteration's `batches`, which are asked for when the iteration before is done.

        checkpoint: where to continue; then experience begins with the iteration after it.
        """
        self._experience = experience
        self.train(resume_from_checkpoint=checkpoint)

    @property
    def iteration(self) -> int:
        """How many have been completed."""
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        return self.state.global_step // (updates * self.num_iterations)

    @property
    def history(self) -> list[dict]:
        """What was logged of each iteration."""
        return [entry for entry in self.state.log_history if "reward" in entry]

    def note(self, values: dict[str, float]) -> None:
        """Add to what is logged of this iteration."""
        for name, value in values.items():
            self._metrics["train"][name].append(float(value))

    def batches(self, steps: Sequence[Step], weights: np.ndarray) -> list[dict]:
        """Decisions in the form that TRL's loss takes: this rank's share of them. weights: their advantages."""
        tokens = sum(len(step.reply.sample.logprobs) for step in steps)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        size, found = self.args.per_device_train_batch_size, []
        for start in range(0, len(steps), ranks * size):
            mine = slice(start + rank, start + ranks * size, ranks)
            found.append(self._rows(steps[mine], weights[mine]) | {"num_items_in_batch": torch.tensor(float(tokens))})
        return found

    def _prepare_inputs(self, generation_batch) -> dict:
        """The next batch of the iteration; TRL's own would generate completions for its prompts here."""
        if self._taken % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._taken, self._batches = 0, next(self._experience)
        self._taken += 1
        return self._batches[(self._taken - 1) % self.args.steps_per_generation]

    def _rows(self, steps: list[Step], weights: np.ndarray) -> dict:
        encoded = rollouts.encoded(steps, self.shown_with, self.processing_class)
        rows = batch(self.processing_class, encoded)
        answer = max(len(row.answer_ids) for row in encoded)
        prompt = rows["input_ids"].shape[1] - answer
        old = torch.zeros(len(steps), answer)
        for row, step in zip(old, steps, strict=True):
            row[: len(step.reply.sample.logprobs)] = torch.tensor(step.reply.sample.logprobs)
        found = {
            "prompt_ids": rows["input_ids"][:, :prompt],
            "prompt_mask": rows["attention_mask"][:, :prompt],
            "completion_ids": rows["input_ids"][:, prompt:],
            "completion_mask": rows["attention_mask"][:, prompt:],
            "advantages": torch.tensor(weights, dtype=torch.float32),
            "old_per_token_logps": old,
            "mm_token_type_ids": rows["mm_token_type_ids"],
        }
        if "pixel_values" in rows:
            found |= {name: rows[name] for name in ("pixel_values", "image_grid_thw")}
            found["num_images"] = [1] * len(steps)
        found = {name: self.to_device(value) for name, value in found.items()}
        if self.beta:
            found["ref_per_token_logps"] = self._logprobs_under("ref", found)
        if self.rl.importance_sampling != "off" and (self.stale or not self.exact):
            found |= self._corrected(found)
        return found

    def _corrected(self, rows: dict) -> dict:
        """For tokens that another program, or an older policy, has drawn: the ratio of trainer to sampler.

        Kept within bounds as TRL does with its own vLLM (vllm_importance_sampling_mode), from "Your Efficient RL
        Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025). TRL multiplies the loss by it; here
        it's in the advantages, (rows, tokens), which comes to the same. The loss clips against the trainer's own.
        """
        sampled, mode = rows["old_per_token_logps"], self.rl.importance_sampling
        own = self._logprobs_under("default", rows)
        difference = (own - sampled) * rows["completion_mask"]
        if mode.startswith("sequence"):
            difference = difference.sum(dim=-1, keepdim=True).expand_as(difference)
        ratio, most = difference.exp(), self.rl.importance_sampling_max
        ratio = ratio.clamp(max=most) if mode.endswith("truncate") else ratio.masked_fill(ratio > most, 0.0)
        return {
            "old_per_token_logps": own,
            "sampling_per_token_logps": sampled,
            "advantages": rows["advantages"][:, None] * ratio,
        }

    def to_device(self, value):
        return value.to(self.accelerator.device) if isinstance(value, torch.Tensor) else value

    @torch.no_grad()
    def _logprobs_under(self, adapter: str, rows: dict) -> torch.Tensor:
        """Log-probabilities under the adapter `default`, which is trained, or `ref`, that training began with."""
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter):
            return self._get_per_token_logps_and_entropies(
                model,
                torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
                torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
                rows["completion_ids"].shape[1],
                **{
                    name: rows.get(name)
                    for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
                },
            )[0]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logprobs = found[0].detach()
        return found

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        # Before the first update of an iteration, trainer and sampler have the same weights, if not an older policy's
        # rollouts are trained on. The ratio in the loss is to what the sampler said, which corrects for the mismatch.
        if self._taken <= self.args.gradient_accumulation_steps:
            mask = inputs["completion_mask"]
            sampled = inputs.get("sampling_per_token_logps", inputs["old_per_token_logps"])
            off = ((self._logprobs - sampled).abs() * mask).sum() / mask.sum()
            self.note({"sampler_mismatch": self.accelerator.gather(off).mean().item()})
        return loss


def _no_reward(**kwargs):
    raise AssertionError("rewards come from the world")
