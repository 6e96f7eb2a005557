"""The student's own play in RL: in all ranks, kept in the ledger, played ahead where that is asked for.

What is played does not depend on the number of ranks, nor on when a run was killed.
"""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from apprentice.episode import Episode
from apprentice.files import damage, replacing, seal
from apprentice.ledger import Ledger
from apprentice.params import Profile, Reward
from apprentice.play import Spec
from apprentice.student.encoding import batch
from apprentice.training import rollouts
from apprentice.training.live import Live
from apprentice.training.own_play import OwnPlay, outcome
from apprentice.training.reward import rewards
from apprentice.training.rl import RlTrainer
from apprentice.training.sampler import Sampler
from apprentice.world.observation import ACTIONS


class SelfPlay(OwnPlay):
    """Plays an iteration's groups, and the held-out worlds, with the policy as the trainer has it."""

    trainer: RlTrainer

    def __init__(self, trainer: RlTrainer, sampler: Sampler, profile: Profile, folder: Path, live: Live):
        super().__init__(trainer, sampler, profile, folder)
        self.rl, self.live = profile.rl, live
        self._ahead: Callable[[], list[Episode]] | None = None

    def episodes(self, iteration: int) -> list[Episode]:
        """An iteration's groups, in order, played with the policy as it is now."""
        self.live.begin("play")
        episodes = self._play(iteration)()
        self.live.end("play")
        return episodes

    def played_ahead(self, iteration: int) -> list[Episode] | None:
        """What `play_ahead` has begun, None if nothing; after a kill it's continued with the policy that began it."""
        begun, self._ahead = self._ahead, None
        if begun:
            self.live.begin("play")
            episodes = begun()
            self.live.end("play")
            return episodes
        kept = self.folder / "ahead" / str(iteration) / "adapter_model.safetensors"
        if not self.rl.staleness or not kept.exists():
            return None
        model = self.model
        now = {
            name: weight.clone() for name, weight in get_peft_model_state_dict(model, adapter_name="default").items()
        }
        set_peft_model_state_dict(model, load_file(kept), adapter_name="default")
        episodes = self.episodes(iteration)
        set_peft_model_state_dict(model, now, adapter_name="default")
        return episodes

    def play_ahead(self, iteration: int) -> None:
        """Begin an iteration's play with the policy as it is, before the iteration before has changed it."""
        if self.first:
            folder = self.folder / "ahead"
            with replacing(folder / str(iteration)) as path:
                self.model.save_pretrained(path, selected_adapters=["default"])
            for old in folder.iterdir():
                if old.name.isdigit() and int(old.name) < iteration - 1:
                    shutil.rmtree(old)
        self._ahead = self._play(iteration, ahead=True)

    def evaluate(self, iteration: int) -> None:
        """Play the held-out worlds after so many iterations; keep the adapter with what it got there."""
        folder = self.folder / "evaluated" / str(iteration)
        if not damage(folder):
            return  # before a kill
        self.live.begin("held-out play")
        rl = self.rl
        episodes = self.held_out(rl.evaluation.seeds, rl.max_steps, rl.random_seed, iteration)
        if not self.first:
            return
        reward = float(np.mean([sum(rewards(episode, rl.reward)) for episode in episodes]))
        found = {"iteration": iteration, "reward": reward, **outcome(episodes)}
        with replacing(folder) as path:
            self.model.save_pretrained(path, selected_adapters=["default"])
            (path / "evaluation.json").write_text(json.dumps(found))
            seal(path)
        achieved = f"{found['achievements']:.2f} achievements"
        self.live.end("held-out play", f"after {iteration} iterations {achieved} on held-out worlds")

    def kept(self) -> list[Path]:
        """The files beside a checkpoint that the iterations after it, and the end, read."""
        following = self.trainer.iteration
        whole = [*self.folder.glob("evaluated/[0-9]*/*"), *self.folder.glob("rollouts/[0-9]*")]
        earlier = [file for file in whole if int(file.relative_to(self.folder).parts[1].partition(".")[0]) < following]
        critic, ahead = self.folder / "critics" / f"{following - 1}.npy", self.folder / "ahead" / str(following)
        return [*earlier, *([critic] if critic.exists() else []), *ahead.glob("*")]

    def _seeds(self, iteration: int) -> list[int]:
        first = iteration * self.rl.groups
        places = range(first, first + self.rl.groups)
        return [self.rl.seeds[place % len(self.rl.seeds)] for place in places for _ in range(self.rl.group_size)]

    def _play(self, iteration: int, ahead: bool = False) -> Callable[[], list[Episode]]:
        """Play an iteration's groups with the policy as it is now, in all ranks, or take them from the ledger.

        Returns a call that gives the episodes. ahead: it's played meanwhile, by a sampler that can.
        """
        rl = self.rl
        spec = self.spec(self._seeds(iteration), rl.max_steps, f"{self.take(iteration)} train {iteration}")
        hidden = rl.advantage == "critic" and not self.sampler.shows_hidden

        def share() -> dict[int, Episode]:
            return self.share(
                lambda place: self.policy(place, rl.temperature, [rl.random_seed, 7, iteration, place, 1]), spec
            )

        played: Future[dict[int, Episode]] = Future()
        if ahead and self.sampler.apart:
            # Ranks speak to each other in the main thread only; a daemon holds up nobody who ends early.
            threading.Thread(target=_fulfil, args=(played, share), daemon=True).start()
        else:
            played.set_result(share())
            self.sampler.sleep()
            if hidden:
                with Ledger(self.ledger_name) as ledger:
                    self._add_hidden(ledger, spec)
        return lambda: self.gathered(played.result(), spec, hidden)

    @torch.no_grad()
    def _add_hidden(self, ledger: Ledger, spec: Spec) -> None:
        """Compute the hidden states that an engine did not show, of this rank's share, and keep them in the ledger."""
        trainer, processor, model = self.trainer, self.trainer.processing_class, self.model.get_base_model()
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        size, done = trainer.args.per_device_train_batch_size, ledger.keys()
        name = spec.fingerprint
        places = [at for at in range(rank, len(spec.seeds), ranks) if rollouts.hidden_key(name, at) not in done]
        episodes = list(rollouts.read(ledger, name, places))
        steps, states = [step for episode in episodes for step in episode.steps], []
        for start in range(0, len(steps), size):
            rows = rollouts.encoded(steps[start : start + size], spec.prompt, processor)
            inputs = batch(processor, [replace(row, answer_ids=[]) for row in rows])
            inputs = {name: trainer.to_device(value) for name, value in inputs.items() if name != "labels"}
            states.append(model.model(**inputs).last_hidden_state[:, -1].float().cpu().numpy())
        ends = np.cumsum([len(episode.steps) for episode in episodes])
        for place, found in zip(places, np.split(np.concatenate(states), ends[:-1]) if states else [], strict=True):
            ledger.add(rollouts.hidden_key(name, place), found.tobytes())


def summary(episodes: Sequence[Episode], reward: Reward, seconds: float) -> dict[str, float]:
    """What an iteration's play was like, for the log."""
    steps = [step for episode in episodes for step in episode.steps]
    asked = Counter(action for step in steps for action in step.asked)
    values = {
        "reward": np.mean([sum(rewards(episode, reward)) for episode in episodes]),
        "achievements": np.mean([len(episode.unlocked) for episode in episodes]),
        "length": np.mean([episode.length for episode in episodes]),
        "invalid_rate": np.mean([bool(step.invalid) for step in steps]),
        "decisions": len(steps),
        "steps_per_second": sum(episode.length for episode in episodes) / seconds,
    }
    return values | {f"action/{name}": asked[name] / max(1, asked.total()) for name in ACTIONS}


def evaluations(folder: Path) -> list[dict]:
    """What the held-out worlds gave, by iteration; `folder` / "evaluated" / ITERATION has the adapter.

    A damaged one is left out: its worlds are played again.
    """
    whole = (kept for kept in folder.glob("evaluated/[0-9]*") if not damage(kept, "evaluation.json"))
    found = [json.loads((kept / "evaluation.json").read_text()) for kept in whole]
    return sorted(found, key=lambda evaluation: evaluation["iteration"])


def _fulfil(future: Future, work: Callable[[], object]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
