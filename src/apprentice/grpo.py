"""GRPO on the student's own play: TRL's trainer, with rollouts through `play` and an advantage for each decision."""

import hashlib
import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

from apprentice import rollouts
from apprentice.actor import Actor
from apprentice.advantages import Critic, advantages, draw
from apprentice.conversation import batch
from apprentice.episode import Episode, Step
from apprentice.ledger import Ledger
from apprentice.lighter import lighten
from apprentice.local import vision_tokens
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
        self._ahead: Callable[[], list[Episode]] | None = None
        # What the sampler never draws has no share in the probabilities here either; entropies could not bear -inf.
        head = model.get_output_embeddings()
        bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
        bias[vision_tokens(processor)] = -1e4
        head.bias = torch.nn.Parameter(bias, requires_grad=False)
        # TRL walks through a data set of prompts; ours come from the world, so its rows only count.
        rows = Dataset.from_dict({"prompt": ["play"] * args.generation_batch_size})
        super().__init__(model, _no_reward, args=args, train_dataset=rows, processing_class=processor)
        lighten(model.get_base_model())

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
        began = perf_counter()
        episodes = self._played_ahead(iteration)
        waited = perf_counter() - began
        if iteration % self.rl.evaluation.every == 0:
            self.evaluate_play(iteration)
        self._stop_if(self._last("kl"), self.rl.max_kl, "the KL divergence to the SFT policy")
        self._metrics["train"]["staleness"].append(float(episodes is not None))
        began = perf_counter() - waited
        if episodes is None:
            episodes = self._play("train", iteration, self._seeds(iteration))()
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
        batches = self._batches(decisions, generator)
        if self.rl.staleness and iteration + 1 < self.rl.iterations:
            self._play_ahead(iteration + 1)
        return batches

    def _seeds(self, iteration: int) -> list[int]:
        first = iteration * self.rl.groups
        places = range(first, first + self.rl.groups)
        return [self.rl.seeds[place % len(self.rl.seeds)] for place in places for _ in range(self.rl.group_size)]

    def _play_ahead(self, iteration: int) -> None:
        """Begin the next iteration's play with the policy as it is, before this iteration has changed it."""
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            folder = self.folder / "ahead"
            _save(folder / str(iteration), lambda path: model.save_pretrained(path, selected_adapters=["default"]))
            for old in folder.iterdir():
                if int(old.name) < iteration - 1:
                    shutil.rmtree(old)
        self._ahead = self._play("train", iteration, self._seeds(iteration), ahead=True)

    def _played_ahead(self, iteration: int) -> list[Episode] | None:
        """What was begun in the iteration before; after a kill it's continued with the policy that began it."""
        begun, self._ahead = self._ahead, None
        if begun:
            return begun()
        kept = self.folder / "ahead" / str(iteration) / "adapter_model.safetensors"
        if not self.rl.staleness or not kept.exists():
            return None
        model = self.accelerator.unwrap_model(self.model)
        now = {
            name: weight.clone() for name, weight in get_peft_model_state_dict(model, adapter_name="default").items()
        }
        set_peft_model_state_dict(model, load_file(kept), adapter_name="default")
        episodes = self._play("train", iteration, self._seeds(iteration))()
        set_peft_model_state_dict(model, now, adapter_name="default")
        return episodes

    def _stop_if(self, value: float | None, bound: float, what: str) -> None:
        if value is not None and value > bound:
            raise Stopped(f"{what} was {value:.3g} in iteration {len(self.history)}, above the bound of {bound:g}")

    @property
    def history(self) -> list[dict]:
        """What was logged of each iteration."""
        return [entry for entry in self.state.log_history if "reward" in entry]

    def _last(self, name: str) -> float | None:
        return self.history[-1].get(name) if self.history else None

    def _play(self, purpose: str, iteration: int, seeds: list[int], ahead: bool = False) -> Callable[[], list[Episode]]:
        """Play these seeds with the policy as it is now, in all ranks, or take the episodes from the ledger.

        Returns a call that gives the episodes. ahead: it's played meanwhile, by an actor that can.
        """
        model, rank = self.accelerator.unwrap_model(self.model), self.accelerator.process_index
        ours, weights, ledger_name = purpose == "train", _digest(model), f"rl-{self.folder.name}"
        name = f"{weights} {purpose} {iteration}"
        complete = self._with_hidden if self.rl.advantage == "critic" and ours else lambda episode: episode

        def policy(place: int):
            numbers = [self.rl.random_seed, 7, iteration, place, int(ours)]
            temperature = self.rl.temperature if ours else self.sampling.temperature
            seed = int(np.random.default_rng(numbers).integers(2**62))
            return self.actor.policy(temperature, self.sampling.max_tokens, seed)

        def share() -> dict[int, Episode]:
            with Ledger(ledger_name) as ledger:
                return rollouts.play_share(
                    policy,
                    seeds,
                    self.rl.max_steps,
                    self.shown_with,
                    ledger,
                    name,
                    self.sampling.batch_size,
                    rank,
                    self.accelerator.num_processes,
                    complete,
                )

        self.actor.wake()
        self.actor.update(model, iteration)
        if self.is_world_process_zero():
            with Ledger(ledger_name) as ledger:
                ledger.forget(weights)
        self.accelerator.wait_for_everyone()
        played: Future[dict[int, Episode]] = Future()
        if ahead and self.actor.apart:
            # Ranks speak to each other in the main thread only; a daemon holds up nobody who ends early.
            threading.Thread(target=_fulfil, args=(played, share), daemon=True).start()
        else:
            played.set_result(share())
            self.actor.sleep()

        def episodes() -> list[Episode]:
            mine = played.result()
            self.accelerator.wait_for_everyone()
            with Ledger(ledger_name) as ledger:
                others = [place for place in range(len(seeds)) if place not in mine]
                found = mine | dict(zip(others, rollouts.read(ledger, name, others), strict=True))
            self.accelerator.wait_for_everyone()  # the first rank may go on to other weights, and forget these
            return [found[place] for place in range(len(seeds))]

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
            shown = rollouts.encoded(part, self.shown_with, self.processing_class)
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
        episodes = self._play("evaluation", iteration, list(self.rl.evaluation.seeds))()
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
        given = [score for score in known if score is not None]
        self._metrics["train"]["judge_missing"].append(known.count(None) / len(known))
        self._metrics["train"]["judge_score"].append(float(np.mean(given or [0.0])))
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

        Their gradient is that of all decisions, with little noise added by the choice: see `draw`.
        """
        values = np.array([advantage for _, advantage in decisions])
        scores = np.array([_score_length(step.reply.sample.logprobs) for step, _ in decisions])
        drawn, weights = draw(values, scores, self.rl.decisions, generator)
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
        found = {name: self._to_device(value) for name, value in found.items()}
        if self.beta:
            found["ref_per_token_logps"] = self._logprobs_under("ref", found)
        stale = self._metrics["train"]["staleness"][-1]
        if self.rl.importance_sampling != "off" and (stale or not self.actor.exact):
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

    def _to_device(self, value):
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
        if self._step % (self.args.steps_per_generation * self.num_iterations) < self.args.gradient_accumulation_steps:
            mask = inputs["completion_mask"]
            sampled = inputs.get("sampling_per_token_logps", inputs["old_per_token_logps"])
            off = ((self._logprobs - sampled).abs() * mask).sum() / mask.sum()
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


def _score_length(logprobs: Sequence[float]) -> float:
    """About the norm of the score, the gradient of a reply's log-probability: little if it could only be this reply.

    Not 0, for what has become less likely within the iteration.
    """
    return float(np.linalg.norm(1 - np.exp(logprobs))) + 0.05


def _fulfil(future: Future, work: Callable[[], object]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


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
    if path.is_dir():
        shutil.rmtree(path)
    unfinished.replace(path)


def _no_reward(**kwargs):
    raise AssertionError("rewards come from the world")
