"""GRPO on the student's own play: TRL's trainer, with rollouts through `play` and an advantage for each decision."""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import get_peft_model_state_dict
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

from apprentice import rollouts
from apprentice.actor import Actor
from apprentice.advantages import Critic, advantages
from apprentice.conversation import batch
from apprentice.episode import Episode, Step
from apprentice.ledger import Ledger
from apprentice.params import ConfigError, Judge, Prompt, Rl, Sampling
from apprentice.reward import rewards, with_mean
from apprentice.world import ACTIONS


class Stopped(Exception):
    """Training has left its bounds; the message says which."""


class Trainer(GRPOTrainer):
    """TRL's GRPO with other data: each iteration plays groups of episodes and trains on their decisions.

    Losses, clipping, the KL divergence to a frozen copy of the adapter, optimizer and checkpoints are TRL's. What is
    played and what is drawn from it does not depend on the number of ranks: all know all episodes, draw the same
    decisions, and each trains on its share.
    """

    def __init__(
        self,
        model,
        actor: Actor,
        processor,
        settings: Rl,
        shown_with: Prompt,
        sampling: Sampling,
        args: GRPOConfig,
        judge: Judge | None = None,
    ):
        """model: with the adapter to train. actor: plays with it.

        judge: asked if its weight in the reward is not 0.
        """
        self.actor, self.rl, self.shown_with, self.sampling = actor, settings, shown_with, sampling
        self.judge = judge if settings.reward.judge else None
        self._judge_has_answered = False
        self.folder = Path(args.output_dir)
        self._critic: Critic | None = None
        # TRL walks through a data set of prompts; ours come from the world, so its rows only count.
        rows = Dataset.from_dict({"prompt": ["play"] * args.generation_batch_size})
        super().__init__(model, _no_reward, args=args, train_dataset=rows, processing_class=processor)

    @property
    def iteration(self) -> int:
        """How many have been completed."""
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        return self.state.global_step // (updates * self.num_iterations)

    def _prepare_inputs(self, generation_batch) -> dict:
        """TRL's buffer of an iteration's batches, filled with ours."""
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._iterate()
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _iterate(self) -> list[dict]:
        """Play, and make batches of what was played. Raises Stopped if a bound has been left."""
        iteration, size = self.iteration, self.rl.group_size
        if iteration % self.rl.evaluation.every == 0:
            self.evaluate_play(iteration)
        self._stop_if(self._last("kl"), self.rl.max_kl, "the KL divergence to the SFT policy")
        began = perf_counter()
        first = iteration * self.rl.groups
        places = range(first, first + self.rl.groups)
        seeds = [self.rl.seeds[place % len(self.rl.seeds)] for place in places for _ in range(size)]
        episodes = self._play("train", iteration, seeds)
        seconds = perf_counter() - began
        scores = self._scores(episodes)
        invalid_rate = self._record(episodes, seconds)["invalid_rate"]
        critic = self._critic_of(iteration)
        found = advantages(episodes, self.rl, scores, critic)
        if self.is_world_process_zero():
            rollouts.write(
                self.folder / "rollouts" / f"{iteration:05}.parquet",
                zip(episodes[:size], found[:size], strict=True),
                iteration,
            )
            if critic.sums is not None:
                kept = self.folder / "critics"
                _save(kept / f"{iteration}.npy", lambda path: np.save(path, critic.sums))
                (kept / f"{iteration - 3}.npy").unlink(missing_ok=True)  # two checkpoints are kept
        if invalid_rate > self.rl.max_invalid_rate:
            self.log({})  # what was seen of this iteration
        self._stop_if(invalid_rate, self.rl.max_invalid_rate, "the share of invalid replies")
        generator = np.random.default_rng([self.rl.random_seed, 7, iteration])
        decisions = [
            (step, advantage)
            for episode, values in zip(episodes, found, strict=True)
            for step, advantage in zip(episode.steps, values, strict=True)
        ]
        return self._batches(decisions, generator)

    def _stop_if(self, value: float | None, bound: float, what: str) -> None:
        if value is not None and value > bound:
            raise Stopped(f"{what} was {value:.3g} in iteration {len(self.history)}, above the bound of {bound:g}")

    @property
    def history(self) -> list[dict]:
        """What was logged of each iteration."""
        return [entry for entry in self.state.log_history if "reward" in entry]

    def _last(self, name: str) -> float | None:
        return self.history[-1].get(name) if self.history else None

    def _play(self, purpose: str, iteration: int, seeds: list[int]) -> list[Episode]:
        """Episodes on these seeds with the policy as it is now, played by all ranks or taken from the ledger."""
        model, ranks = self.accelerator.unwrap_model(self.model), self.accelerator.num_processes
        ours = purpose == "train"
        name = f"{_digest(model)} {purpose} {iteration}"

        def policy(place: int):
            numbers = [self.rl.random_seed, 7, iteration, place, int(ours)]
            temperature = self.rl.temperature if ours else self.sampling.temperature
            seed = int(np.random.default_rng(numbers).integers(2**62))
            return self.actor.policy(temperature, self.sampling.max_tokens, seed)

        self.actor.wake()
        self.actor.update(model, iteration)
        with Ledger(f"rl-{self.folder.name}") as ledger:
            if self.is_world_process_zero():
                ledger.forget(_digest(model))
            self.accelerator.wait_for_everyone()
            mine = rollouts.play_share(
                policy,
                seeds,
                self.rl.max_steps,
                self.shown_with,
                ledger,
                name,
                self.sampling.batch_size,
                self.accelerator.process_index,
                ranks,
                self._with_hidden if self.rl.advantage == "critic" and ours else lambda episode: episode,
            )
            self.accelerator.wait_for_everyone()
            # What was played here need not be rendered again; it's the same.
            known = rollouts.read(ledger, name, len(seeds))
            episodes = [mine.get(place, episode) for place, episode in enumerate(known)]
        self.actor.sleep()
        return episodes

    @torch.no_grad()
    def _with_hidden(self, episode: Episode) -> Episode:
        """The episode with the hidden states that an engine did not show."""
        if all(step.reply.sample.hidden is not None for step in episode.steps):
            return episode
        model, size = self.accelerator.unwrap_model(self.model).get_base_model(), self.args.per_device_train_batch_size
        steps = []
        for start in range(0, len(episode.steps), size):
            part = episode.steps[start : start + size]
            shown = [rollouts.encoded(step, self.shown_with, self.processing_class) for step in part]
            inputs = batch(self.processing_class, [replace(row, answer_ids=[]) for row in shown])
            inputs = {name: self._to_device(value) for name, value in inputs.items() if name != "labels"}
            hidden = model.model(**inputs).last_hidden_state[:, -1].float().cpu().numpy()
            for step, state in zip(part, hidden, strict=True):
                sample = replace(step.reply.sample, hidden=state)
                steps.append(replace(step, reply=replace(step.reply, sample=sample)))
        return replace(episode, steps=tuple(steps))

    def evaluate_play(self, iteration: int) -> None:
        """Play the held-out worlds after so many iterations; keep the adapter with what it got there."""
        folder = self.folder / "evaluated" / str(iteration)
        if folder.exists():
            return  # before a kill
        episodes = self._play("evaluation", iteration, list(self.rl.evaluation.seeds))
        if not self.is_world_process_zero():
            return
        found = {
            "iteration": iteration,
            "reward": float(np.mean([sum(rewards(episode, self.rl.reward)) for episode in episodes])),
            "achievements": float(np.mean([len(episode.unlocked) for episode in episodes])),
            "invalid_rate": float(np.mean([bool(step.invalid) for episode in episodes for step in episode.steps])),
        }

        def write(path: Path) -> None:
            self.accelerator.unwrap_model(self.model).save_pretrained(path, selected_adapters=["default"])
            (path / "evaluation.json").write_text(json.dumps(found))

        _save(folder, write)

    def _critic_of(self, iteration: int) -> Critic:
        """The value function as the iteration before has left it."""
        if self._critic is None:
            file = self.folder / "critics" / f"{iteration - 1}.npy"
            self._critic = Critic(np.load(file) if file.exists() else None)
        return self._critic

    def _scores(self, episodes: list[Episode]) -> list[float]:
        """The judge's scores, 0 without one. A missing one is replaced by its group's mean, for every algorithm alike.

        A judge that does not work at all is an error; that it ceases to is no reason to stop.
        """
        if self.judge is None:
            return [0.0] * len(episodes)
        found: list = [None]
        if self.is_world_process_zero():
            found = [self._asked(episodes)]
        known = broadcast_object_list(found)[0]
        self._metrics["train"]["judge_missing"].append(known.count(None) / len(known))
        self._metrics["train"]["judge_score"].append(float(np.mean([score or 0.0 for score in known])))
        groups = [known[start : start + self.rl.group_size] for start in range(0, len(known), self.rl.group_size)]
        return [score for group in groups for score in with_mean(group)]

    def _asked(self, episodes: list[Episode]) -> list[float | None]:
        from apprentice import judge

        try:
            verdicts = judge.scores(episodes, self.judge)
        except ConfigError as error:
            if not self._judge_has_answered:
                raise
            verdicts = [judge.Verdict(episode.id, None, str(error)) for episode in episodes]
        known = [verdict.score for verdict in verdicts if verdict.score is not None]
        self._judge_has_answered |= bool(known)
        if len(known) < len(verdicts):
            why = next(verdict.why_not for verdict in verdicts if verdict.score is None)
            print(f"rl: the judge scored {len(known)} of {len(verdicts)} episodes; {why}", file=sys.stderr)
        return [verdict.score for verdict in verdicts]

    def _batches(self, decisions: list[tuple[Step, float]], generator: np.random.Generator) -> list[dict]:
        """As many decisions as an iteration trains on, in the form that TRL's loss takes: this rank's share of them.

        They are drawn in proportion to the size of their advantage, which is divided out again (importance sampling):
        the gradient is that of all decisions, and none is spent on those that hardly matter.
        """
        values = np.array([advantage for _, advantage in decisions])
        sizes = np.abs(values) + 1e-9
        drawn = generator.choice(len(decisions), self.rl.decisions, p=sizes / sizes.sum())
        weights = np.sign(values[drawn]) * np.abs(values).mean()
        chosen = [decisions[index][0] for index in drawn]
        tokens = sum(len(step.reply.sample.logprobs) for step in chosen)
        rank, ranks, size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.per_device_train_batch_size,
        )
        found = []
        for start in range(0, len(chosen), ranks * size):
            mine = slice(start + rank, start + ranks * size, ranks)
            found.append(self._rows(chosen[mine], weights[mine]) | {"num_items_in_batch": torch.tensor(float(tokens))})
        return found

    def _rows(self, steps: list[Step], weights: np.ndarray) -> dict:
        encoded = [rollouts.encoded(step, self.shown_with, self.processing_class) for step in steps]
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
        found = {name: self._to_device(value) for name, value in found.items()}
        if self.beta:
            found["ref_per_token_logps"] = self._reference_logprobs(found)
        return found

    def _to_device(self, value):
        return value.to(self.accelerator.device) if isinstance(value, torch.Tensor) else value

    @torch.no_grad()
    def _reference_logprobs(self, rows: dict) -> torch.Tensor:
        """Log-probabilities under the adapter that training began with."""
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, "ref"):
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
        if self._step % (self.args.steps_per_generation * self.num_iterations) < self.args.gradient_accumulation_steps:
            mask = inputs["completion_mask"]
            off = ((self._logprobs - inputs["old_per_token_logps"]).abs() * mask).sum() / mask.sum()
            self._metrics["train"]["sampler_mismatch"].append(self.accelerator.gather(off).mean().item())
        return loss

    def _record(self, episodes: list[Episode], seconds: float) -> dict[str, float]:
        """What an iteration's play was like, for the log of the trainer too."""
        steps = [step for episode in episodes for step in episode.steps]
        asked = Counter(action for step in steps for action in step.asked)
        values = {
            "reward": np.mean([sum(rewards(episode, self.rl.reward)) for episode in episodes]),
            "achievements": np.mean([len(episode.unlocked) for episode in episodes]),
            "length": np.mean([episode.length for episode in episodes]),
            "invalid_rate": np.mean([bool(step.invalid) for step in steps]),
            "decisions": len(steps),
            "steps_per_second": sum(episode.length for episode in episodes) / seconds,
        }
        values |= {f"action/{name}": asked[name] / max(1, asked.total()) for name in ACTIONS}
        for name, value in values.items():
            self._metrics["train"][name].append(float(value))
        return values


def evaluations(folder: Path) -> list[dict]:
    """What the held-out worlds gave, by iteration; `folder` / "evaluated" / ITERATION has the adapter."""
    found = [json.loads(file.read_text()) for file in folder.glob("evaluated/*/evaluation.json")]
    return sorted(found, key=lambda evaluation: evaluation["iteration"])


def _digest(model) -> str:
    """A name for the adapter's weights."""
    hashed = hashlib.sha256()
    for name, weight in sorted(get_peft_model_state_dict(model, adapter_name="default").items()):
        hashed.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()[:16]


def _save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file or a folder, there whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished)
    unfinished.replace(path)


def _no_reward(**kwargs):
    raise AssertionError("rewards come from the world")
