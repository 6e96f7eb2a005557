"""GRPO on the student's own play: TRL's trainer, with rollouts through `play` and an advantage for each decision."""

import sys
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import use_adapter

from apprentice.actor import Actor
from apprentice.conversation import batch
from apprentice.episode import Episode
from apprentice.params import ConfigError, Judge, Prompt, Rl, Sampling
from apprentice.play import play
from apprentice.reward import returns, rewards, with_mean
from apprentice.world import ACHIEVEMENTS


def advantages(
    group: Sequence[Episode], settings: Rl, scores: Sequence[float | None] | None = None
) -> list[np.ndarray]:
    """An advantage for each decision of episodes played on the same world seed.

    The discounted return from a decision on, less its mean over the group at the same decision (an episode that has
    ended has nothing more to come), divided by the standard deviation within the group. DeepSeekMath (arXiv 2402.03300)
    normalises one outcome for each answer; an episode has hundreds of answers, and most come before what they lead to.

    scores: the judge's, None for an episode without one.
    """
    scores = with_mean(scores or [None] * len(group))
    longest = max(len(episode.steps) for episode in group)
    table = np.zeros((len(group), longest))
    for row, episode, score in zip(table, group, scores, strict=True):
        row[: len(episode.steps)] = returns(rewards(episode, settings.reward, score), settings.discount)
    centred = table - table.mean(axis=0)
    alive = np.concatenate([row[: len(episode.steps)] for row, episode in zip(centred, group, strict=True)])
    centred /= alive.std() + 1e-6
    return [row[: len(episode.steps)] for row, episode in zip(centred, group, strict=True)]


def critic_advantages(
    episodes: Sequence[Episode], settings: Rl, scores: Sequence[float | None] | None = None
) -> list[np.ndarray]:
    """An advantage for each decision from a linear value function of the state, instead of from the group.

    The group's mean at the same decision is blind to what an episode has already got: who unlocks early has less to
    come than the others and is blamed for it. Here the values are a ridge regression of the return on features of the
    state (the linear feature baseline of Duan et al., arXiv 1604.06778), fitted on the other half of the episodes, so
    that no decision is measured by its own outcome; advantages are GAE's (Schulman et al., arXiv 1506.02438), less
    their mean and divided by their standard deviation.
    """
    earned = [
        np.array(rewards(episode, settings.reward, score))
        for episode, score in zip(episodes, with_mean(scores or [None] * len(episodes)), strict=True)
    ]
    totals = [np.array(returns(values.tolist(), settings.discount)) for values in earned]
    states = [_features(episode, settings.max_steps) for episode in episodes]
    weights = [
        _ridge(np.concatenate(states[half::2]), np.concatenate(totals[half::2]))
        for half in range(min(2, len(episodes)))
    ]
    found = []
    for index, (values, features) in enumerate(zip(earned, states, strict=True)):
        expected = np.append(features @ weights[(index + 1) % len(weights)], 0.0)  # nothing comes after the end
        surprise = values + settings.discount * expected[1:] - expected[:-1]
        found.append(np.array(returns(surprise.tolist(), settings.discount * settings.gae_lambda)))
    # Centred, since a mean below 0 would make every token less likely, those of the tool call's form too.
    mean, scale = np.concatenate(found).mean(), np.concatenate(found).std() + 1e-6
    return [(values - mean) / scale for values in found]


def _features(episode: Episode, max_steps: int) -> np.ndarray:
    """(decisions, features): the time left, what has been unlocked, and both together; vitals and inventory."""
    rows, unlocked = [], np.zeros(len(ACHIEVEMENTS))
    for step in episode.steps:
        now, left = step.observation, 1 - step.step / max_steps
        numbers = [*now.vitals.values(), *(min(count, 3) for count in now.inventory.values())]
        rows.append(
            np.concatenate([[1, left, left**2, now.sleeping, now.daylight], numbers, unlocked, unlocked * left])
        )
        unlocked[[ACHIEVEMENTS.index(name) for name in step.unlocked]] = 1
    return np.array(rows)


def _ridge(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The weights of a ridge regression."""
    return np.linalg.solve(features.T @ features + np.eye(features.shape[1]), features.T @ targets)


class Trainer(GRPOTrainer):
    """TRL's GRPO with other data: each iteration plays groups of episodes and trains on their decisions.

    Losses, clipping, the KL divergence to a frozen copy of the adapter, optimizer and checkpoints are TRL's.
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
        # TRL walks through a data set of prompts; ours come from the world, so its rows only count.
        rows = Dataset.from_dict({"prompt": ["play"] * args.generation_batch_size})
        super().__init__(model, _no_reward, args=args, train_dataset=rows, processing_class=processor)

    def seeds(self, iteration: int) -> list[int]:
        """This rank's world seeds of an iteration: of the next `groups` of the settings' seeds, in turn, its share."""
        first = iteration * self.rl.groups + self.accelerator.process_index
        places = range(first, (iteration + 1) * self.rl.groups, self.accelerator.num_processes)
        return [self.rl.seeds[place % len(self.rl.seeds)] for place in places]

    def _generate_and_score_completions(self, inputs) -> dict:
        updates = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        iteration = self.state.global_step // (updates * self.num_iterations)
        generator = np.random.default_rng([self.rl.random_seed, 7, iteration, self.accelerator.process_index])
        began = perf_counter()
        self.actor.wake()
        self.actor.update(self.accelerator.unwrap_model(self.model), iteration)
        policy = self.actor.policy(self.rl.temperature, self.sampling.max_tokens, int(generator.integers(2**62)))
        size = self.rl.group_size
        seeds = [seed for seed in self.seeds(iteration) for _ in range(size)]
        episodes = play(policy, seeds, self.rl.max_steps, self.shown_with)
        self.actor.sleep()
        seconds = perf_counter() - began
        scores = self._scores(episodes)
        if self.rl.baseline == "linear":
            found = critic_advantages(episodes, self.rl, scores)
        else:
            found = [
                values
                for start in range(0, len(episodes), size)
                for values in advantages(episodes[start : start + size], self.rl, scores[start : start + size])
            ]
        self._record(episodes, scores, seconds)
        decisions = [
            (step, advantage)
            for episode, values in zip(episodes, found, strict=True)
            for step, advantage in zip(episode.steps, values, strict=True)
        ]
        # TRL shuffles the rows next. A resumed run has drawn other numbers by now than one that was never killed.
        torch.manual_seed(int(generator.integers(2**62)))
        return self._rows(decisions, generator)

    def _scores(self, episodes: list[Episode]) -> list[float | None]:
        """The judge's scores. A judge that does not work at all is an error; that it ceases to is no reason to stop."""
        if self.judge is None:
            return [None] * len(episodes)
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

    def _rows(self, decisions: list, generator: np.random.Generator) -> dict:
        """As many decisions as an iteration trains on, in the form that TRL's loss takes.

        They are drawn in proportion to the size of their advantage, which is divided out again (importance sampling):
        the gradient is that of all decisions, and none is spent on those that hardly matter.
        """
        wanted = self.rl.decisions // self.accelerator.num_processes
        values = np.array([advantage for _, advantage in decisions])
        sizes = np.abs(values) + 1e-9
        drawn = generator.choice(len(decisions), wanted, p=sizes / sizes.sum())
        weights = torch.tensor(np.sign(values[drawn]) * np.abs(values).mean(), dtype=torch.float32)
        chosen = [decisions[index][0] for index in drawn]
        samples = [step.reply.sample for step in chosen]
        rows = batch(self.processing_class, [sample.encoded for sample in samples])
        answer = max(len(sample.encoded.answer_ids) for sample in samples)
        prompt = rows["input_ids"].shape[1] - answer
        old = torch.zeros(wanted, answer)
        for row, sample in zip(old, samples, strict=True):
            row[: len(sample.logprobs)] = torch.tensor(sample.logprobs)
        mask = rows["attention_mask"][:, prompt:]
        found = {
            "prompt_ids": rows["input_ids"][:, :prompt],
            "prompt_mask": rows["attention_mask"][:, :prompt],
            "completion_ids": rows["input_ids"][:, prompt:],
            "completion_mask": mask,
            "advantages": weights,
            "old_per_token_logps": old,
            "num_items_in_batch": mask.sum(),
            "mm_token_type_ids": rows["mm_token_type_ids"],
        }
        if "pixel_values" in rows:
            found |= {name: rows[name] for name in ("pixel_values", "image_grid_thw")}
            found["num_images"] = [1] * wanted
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
                batch_size=self.args.per_device_train_batch_size,
                **{
                    name: rows.get(name)
                    for name in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
                },
            )[0]

    def _record(self, episodes: list[Episode], scores: list[float | None], seconds: float) -> None:
        """What an iteration's play was like in all ranks, for the log of the trainer."""
        sums = {
            "episodes": len(episodes),
            "reward": sum(sum(rewards(episode, self.rl.reward)) for episode in episodes),
            "achievements": sum(len(episode.unlocked) for episode in episodes),
            "length": sum(episode.length for episode in episodes),
            "invalid": sum(bool(step.invalid) for episode in episodes for step in episode.steps),
            "decisions": sum(len(episode.steps) for episode in episodes),
            "judged": sum(score is not None for score in scores),
            "score": sum(score or 0.0 for score in scores),
            "seconds": seconds,
        }
        mine = torch.tensor([list(sums.values())], dtype=torch.float32, device=self.accelerator.device)
        total = dict(zip(sums, self.accelerator.gather(mine).sum(dim=0).tolist(), strict=True))
        values = {name: total[name] / total["episodes"] for name in ("reward", "achievements", "length")}
        values["invalid_rate"] = total["invalid"] / total["decisions"]
        values["decisions"] = total["decisions"]
        if self.judge:
            values["judge_score"] = total["score"] / max(1, total["judged"])
            values["judge_missing"] = 1 - total["judged"] / total["episodes"]
        values["steps_per_second"] = total["length"] / (total["seconds"] / self.accelerator.num_processes)
        for name, value in values.items():
            self._metrics["train"][name].append(value)


def _no_reward(**kwargs):
    raise AssertionError("rewards come from the world")
