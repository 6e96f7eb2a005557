"""The student's own play while it is trained: shared out among the ranks, kept in the ledger, read back by every rank.

What is played does not depend on the number of ranks, nor on when a run was killed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import Trainer

from apprentice.episode import Episode
from apprentice.ledger import Ledger
from apprentice.params import Profile
from apprentice.play import Spec
from apprentice.policy import Policy
from apprentice.training import devices, rollouts
from apprentice.training.sampler import Sampler, weights_digest


class OwnPlay:
    """Plays with the policy as the trainer has it. Every rank calls every method, in the same order."""

    def __init__(self, trainer: Trainer, sampler: Sampler, profile: Profile, folder: Path):
        """folder: the run's, in the cache; its name is the fingerprint of all that shapes the run."""
        self.trainer, self.sampler, self.profile, self.folder = trainer, sampler, profile, folder
        self.ledger_name = f"{folder.parent.name}-{folder.name}"

    @property
    def model(self) -> PeftModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    @property
    def first(self) -> bool:
        """This is the first rank."""
        return self.trainer.is_world_process_zero()

    def take(self, version: int) -> str:
        """Play with the trainer's weights from now on, and forget episodes of others. Returns the weights' name."""
        weights = weights_digest(self.model)
        self.sampler.wake()
        self.sampler.update(self.model, version)
        if self.first:
            with Ledger(self.ledger_name) as ledger:
                ledger.forget(weights)
        devices.wait()
        return weights

    def policy(self, place: int, temperature: float, numbers: Sequence[int]) -> Policy:
        """For the episode at this place. numbers: what its draws depend on."""
        seed = int(np.random.default_rng(numbers).integers(2**62))
        return self.sampler.policy(temperature, self.profile.sampling.max_tokens, seed, place)

    def spec(self, seeds: Sequence[int], max_steps: int, name: str) -> Spec:
        """Of what is played. name: of the episodes, in the ledger; it begins with that of the weights."""
        together = self.profile.sampling.batch_size
        return Spec(seeds, max_steps, self.profile.prompt, together=together, fingerprint=name)

    def share(self, policy: Callable[[int], Policy], spec: Spec) -> dict[int, Episode]:
        """Play this rank's share, or what the ledger lacks of it; the episodes played, by place."""
        accelerator = self.trainer.accelerator
        with Ledger(self.ledger_name) as ledger:
            return rollouts.play_share(policy, spec, ledger, accelerator.process_index, accelerator.num_processes)

    def gathered(self, mine: dict[int, Episode], spec: Spec, hidden: bool = False) -> list[Episode]:
        """All ranks' episodes in order. hidden: with the hidden states that the ledger has of them."""
        places = range(len(spec.seeds))
        devices.wait()
        with Ledger(self.ledger_name) as ledger:
            others = [place for place in places if place not in mine]
            found = mine | dict(zip(others, rollouts.read(ledger, spec.fingerprint, others), strict=True))
            if hidden:
                found = rollouts.with_hidden(ledger, spec.fingerprint, found)
        devices.wait()  # the first rank may go on to other weights, and forget these
        return [found[place] for place in places]

    def held_out(self, seeds: Sequence[int], max_steps: int, random_seed: int, after: int) -> list[Episode]:
        """Play held-out worlds after so many steps or iterations; replies are drawn as in the benchmark."""
        spec = self.spec(seeds, max_steps, f"{self.take(after)} evaluation {after}")
        temperature = self.profile.sampling.temperature
        mine = self.share(lambda place: self.policy(place, temperature, [random_seed, 7, after, place, 0]), spec)
        self.sampler.sleep()
        return self.gathered(mine, spec)


def outcome(episodes: Sequence[Episode]) -> dict[str, float]:
    """What the episodes came to: the mean of their achievements, and the share of replies that cannot be read."""
    steps = [step for episode in episodes for step in episode.steps]
    return {
        "achievements": float(np.mean([len(episode.unlocked) for episode in episodes])),
        "invalid_rate": float(np.mean([bool(step.invalid) for step in steps])),
    }
