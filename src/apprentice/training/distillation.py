"""On-policy distillation: the student plays, and a teacher says what it would have done in each of its states.

DAgger (Ross, Gordon & Bagnell 2011, arXiv 1011.0686): what is learnt are the states that the student itself comes to,
not those of the teacher, and the labels of all rounds. In a falling share of the decisions the teacher's answer is
carried out instead of the student's. stages/distill.py has the loop.
"""

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, DataLoader, Subset

from apprentice import prompt
from apprentice.data import chat_rows, dataset
from apprentice.endpoint.client import Client
from apprentice.endpoint.purse import Purse
from apprentice.endpoint.replies import Replies
from apprentice.episode import Episode, Reply
from apprentice.errors import ConfigError, NoAnswer, WorkError
from apprentice.files import damage, digest, replacing, seal
from apprentice.ledger import Ledger
from apprentice.params import Distill, Profile, Tutor
from apprentice.play import Spec, play_all
from apprentice.players import chat, expert  # noqa: F401  what a scripted teacher of that name plays
from apprentice.players.scripted import Scripted
from apprentice.policy import Player, Policy, Turn
from apprentice.training import devices, examples, rollouts
from apprentice.training.live import Live
from apprentice.training.own_play import OwnPlay
from apprentice.training.sampler import Sampler
from apprentice.training.sft import SftTrainer

AGENT = "distill"
"""In whose name an endpoint is asked for labels."""


class Teacher:
    """Answers what it would do in the student's states; what its endpoint does wrong for good ends an episode's labels.

    What stops all (a wrong key, no money, too many failures) is raised when all that is under way is answered and kept.
    """

    def __init__(self, policy: Policy, tutor: Tutor, spec: Spec, ranks: int):
        """spec: of all that is played. ranks: that ask at the same time."""
        self.policy, self.tutor, self.spec = policy, tutor, spec
        self.failed: dict[int, str] = {}
        self.stopped: ConfigError | WorkError | None = None
        self._asking = 0
        self._free = asyncio.Semaphore(
            max(1, tutor.endpoint.concurrency // ranks) if tutor.endpoint else len(spec.seeds)
        )

    async def label(self, player: Player, seed: int, turn: Turn) -> Reply | None:
        """The player's reply to what the student sees, shown as the teacher wants it; None where there is none."""
        async with self._free:
            if not self.stopped and seed not in self.failed:
                self._asking += 1
                try:
                    return await player.reply(replace(turn, settings=self.tutor.prompt))
                except NoAnswer as error:
                    self._fail(seed, error)
                except (ConfigError, WorkError) as error:
                    self.stopped = self.stopped or error
                finally:
                    self._asking -= 1
        return None

    def _fail(self, seed: int, error: NoAnswer) -> None:
        self.failed[seed] = str(error)
        if (endpoint := self.tutor.endpoint) and len(self.failed) > max(
            1, endpoint.max_failure_rate * len(self.spec.seeds)
        ):
            self.stopped = self.stopped or chat.too_many(self.spec, endpoint, self.failed)

    async def go_on(self) -> None:
        """Raise what stops all."""
        if self.stopped:
            while self._asking:
                await asyncio.sleep(0.01)
            raise self.stopped


@asynccontextmanager
async def teacher(tutor: Tutor, spec: Spec, ranks: int, whose: str) -> AsyncIterator[Teacher]:
    """The teacher, for one event loop. whose: where its endpoint's settings stand, for error messages."""
    if tutor.endpoint is None:
        yield Teacher(Scripted(tutor.policy, tutor.rationale), tutor, spec, ranks)
        return
    with Replies(AGENT, tutor.endpoint.asked) as replies:
        async with Client(tutor.endpoint, whose, AGENT) as client:
            yield Teacher(chat.Chat(AGENT, client, replies), tutor, spec, ranks)


class Guided:
    """The student's policy, with a teacher's answer beside each of its own."""

    name = "student"

    def __init__(self, student: Policy, teacher: Teacher, share: float, numbers: Sequence[int]):
        """share: of the decisions in which the teacher's answer is carried out. numbers: what the draws depend on,
        beside the world's seed."""
        self.student, self.teacher, self.share, self.numbers = student, teacher, share, numbers
        self.players: dict[int, _GuidedPlayer] = {}
        """By the world's seed."""

    def begin(self, seed: int) -> "_GuidedPlayer":
        self.players[seed] = _GuidedPlayer(self, seed)
        return self.players[seed]


class _GuidedPlayer:
    def __init__(self, policy: Guided, seed: int):
        self.policy, self.seed = policy, seed
        self.student, self.teacher = policy.student.begin(seed), policy.teacher.policy.begin(seed)
        self.draws = np.random.default_rng([*policy.numbers, seed])
        self.answers: list[Reply] = []
        """The student's own."""
        self.labels: list[Reply | None] = []
        """The teacher's."""

    async def reply(self, turn: Turn) -> Reply:
        teacher = self.policy.teacher
        answer, label = await asyncio.gather(self.student.reply(turn), teacher.label(self.teacher, self.seed, turn))
        await teacher.go_on()
        self.answers.append(answer)
        self.labels.append(label)
        guided = self.draws.random() < self.policy.share
        if guided and label and not prompt.parse(label.message, turn.settings.max_actions).invalid:
            return label
        return answer

    def end(self) -> None:
        self.student.end()
        self.teacher.end()


@dataclass
class Labels:
    """What came of some episodes."""

    rows: list[dict]
    """For fine-tuning: the teacher's answers in the student's states."""
    counts: Counter[str]
    replies: Counter[tuple[str, str]]
    """The teacher's: why it cannot be read, and its finish reason."""


def labelled(episode: Episode, player: _GuidedPlayer, tutor: Tutor, name: str, rationale: bool) -> dict:
    """A played episode, JSON-able: its rows, and what is counted. name: the episode's, beside its world."""
    shown_with, rows = player.policy.teacher.spec.prompt, []
    named = replace(episode, agent=tutor.policy, name=f"{name}-{episode.seed}")
    counts = Counter(decisions=len(episode.steps), unlocked=len(episode.unlocked))
    counts["unanswered"] = player.labels.count(None)
    replies: Counter[tuple[str, str]] = Counter()
    for step, answer, label in zip(episode.steps, player.answers, player.labels, strict=True):
        own = prompt.parse(answer.message, shown_with.max_actions)
        counts["invalid"] += bool(own.invalid)
        if label is None:
            continue
        parsed = prompt.parse(label.message, tutor.prompt.max_actions)
        replies[parsed.invalid, label.finish_reason] += 1
        if parsed.invalid:
            continue
        counts["agreed"] += own.actions == parsed.actions
        counts["readable"] += 1
        right = replace(step, reply=label, asked=parsed.actions, invalid="")
        row = chat_rows.row(named, right, shown_with, rationale)
        if not chat_rows.refused(row, shown_with.max_actions):
            rows.append(row)
    return {"rows": rows, "counts": counts, "replies": [[*key, number] for key, number in replies.items()]}


def play_share(
    student: Callable[[int], Policy],
    tutor: Tutor,
    spec: Spec,
    ledger: Ledger,
    share: float,
    numbers: Sequence[int],
    rationale: bool,
    whose: str,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Play a rank's share of the spec's episodes with the teacher beside the student, and keep them in the ledger.

    student(place): as rollouts.parties has it. share, numbers: as Guided has them. rationale: labels have the teacher's
    words too.
    """

    async def parties() -> None:
        async with teacher(tutor, spec, ranks, whose) as beside:
            for places, policy, party in rollouts.parties(student, spec, ledger, rank, ranks):
                guided = Guided(policy, beside, share, numbers)

                def keep(places: Sequence[int], guided: Guided, at: int, episode: Episode) -> None:
                    player, name = guided.players[spec.seeds[places[at]]], str(numbers[-1])
                    found = labelled(episode, player, tutor, name, rationale)
                    ledger.add(rollouts.key(spec, places[at]), zlib.compress(json.dumps(found).encode(), 1))

                await play_all(guided, party, partial(keep, places, guided))

    asyncio.run(parties())


def read(ledger: Ledger, spec: Spec) -> Labels:
    """All episodes of a spec, in order."""
    found = Labels([], Counter(), Counter())
    for data in ledger.records(rollouts.key(spec, place) for place in range(len(spec.seeds))):
        episode = json.loads(zlib.decompress(data))
        found.rows += episode["rows"]
        found.counts.update(episode["counts"])
        found.replies.update({(why, finish): number for why, finish, number in episode["replies"]})
    return found


class Practice(OwnPlay):
    """Plays a round with the student as the trainer has it, and keeps its rows."""

    trainer: "DistillTrainer"

    def __init__(
        self,
        trainer: "DistillTrainer",
        sampler: Sampler,
        profile: Profile,
        base: Path,
        folder: Path,
        rationale: bool,
        whose: str,
        live: Live,
    ):
        """base: the folder of the base model. rationale: labels have the teacher's words too. whose: where its
        endpoint's settings stand."""
        super().__init__(trainer, sampler, profile, folder)
        self.base, self.distill, self.rationale, self.whose, self.live = base, profile.distill, rationale, whose, live

    def rows(self, number: int) -> Path:
        """The rows that a round has made."""
        return self.folder / "rounds" / str(number) / "rows.jsonl"

    def kept(self) -> list[Path]:
        """The files beside a checkpoint that the steps after it read."""
        done = -(-self.trainer.state.global_step // self.distill.steps)
        return [file for number in range(done) for file in sorted(self.rows(number).parent.glob("*"))]

    def play(self, number: int) -> None:
        """Play and label a round, if that has not been done before a kill."""
        if not damage(self.rows(number).parent):
            return
        distill, accelerator = self.distill, self.trainer.accelerator
        places = range(number * distill.worlds, (number + 1) * distill.worlds)
        seeds = [distill.seeds[place % len(distill.seeds)] for place in places]
        numbers = [distill.random_seed, 11, number]

        def student(place: int) -> Policy:
            return self.policy(place, self.profile.sampling.temperature, [*numbers, place])

        self.live.begin("play")
        spec = replace(self.spec(seeds, distill.max_steps, f"{self.take(number)} {number}"), agent=AGENT)
        share = distill.teacher_share * distill.teacher_decay**number
        how = (share, numbers, self.rationale, self.whose, accelerator.process_index, accelerator.num_processes)
        with Ledger(self.ledger_name) as ledger:
            play_share(student, distill.teacher, spec, ledger, *how)
        self.sampler.sleep()
        devices.wait()
        if self.first:
            with Ledger(self.ledger_name) as ledger:
                self._write(number, share, read(ledger, spec), spec)
        devices.wait()
        seen = self.rounds()[number]
        self.live.end(
            "play",
            f"round {number + 1} of {distill.rounds}, {seen['achievements']:.1f} achievements, {seen['rows']} labels, "
            f"agrees with the teacher on {seen['agreement']:.1%}",
        )

    def _write(self, number: int, share: float, found: Labels, spec: Spec) -> None:
        if unread := chat.unread_replies(found.replies, spec, self.whose):
            print(unread, flush=True)
        if not found.rows:
            raise WorkError(f"distill: the teacher has labelled none of {found.counts['decisions']} decisions")
        counts = found.counts
        summary = {
            "round": number,
            "teacher_share": share,
            "decisions": counts["decisions"],
            "rows": len(found.rows),
            "dropped_labels": counts["decisions"] - len(found.rows),
            "agreement": counts["agreed"] / max(1, counts["readable"]),
            "achievements": counts["unlocked"] / len(spec.seeds),
            "invalid_rate": counts["invalid"] / counts["decisions"],
        }
        with replacing(self.rows(number).parent) as folder:
            folder.mkdir()
            dataset.write_jsonl(folder / "rows.jsonl", found.rows)
            (folder / "round.json").write_text(json.dumps(summary))
            seal(folder)

    def survey(self, number: int) -> examples.Survey:
        """What is known of a round's rows."""
        name, file = self.folder.name, self.rows(number)
        with self.trainer.accelerator.main_process_first():
            return examples.survey(file, self.base, f"{name}-{digest(file)[:16]}")

    def cost(self) -> float | None:
        """Dollars that all labels have cost; None if they aren't known."""
        if not (endpoint := self.distill.teacher.endpoint):
            return 0.0
        with Purse(endpoint, AGENT) as purse:
            return purse.spent

    def rounds(self) -> list[dict]:
        """What was seen in each round so far."""
        files = (self.rows(number).with_name("round.json") for number in range(self.distill.rounds))
        return [json.loads(file.read_text()) for file in files if not damage(file.parent, file.name)]


class DistillTrainer(SftTrainer):
    """SFT's, on batches that it is given, a round's at a time."""

    def __init__(self, distill: Distill, **kwargs):
        self._batches: Iterator[dict] = iter(())
        # TRL walks through a data set; ours comes from the world, so its rows only count. By its columns TRL knows that
        # there are pictures.
        rows = Dataset.from_dict({"images": [[]] * distill.batch_size})
        super().__init__(train_dataset=rows, **kwargs)

    def learn(self, batches: Iterator[dict], checkpoint: str | None) -> None:
        """Train on these. checkpoint: where to continue; then they begin with those after it."""
        self._batches = batches
        self.train(resume_from_checkpoint=checkpoint)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(self._batches, num_batches, device)

    def batches(
        self, files: Sequence[examples.Rows], order: np.ndarray, begin: int
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Of rows in this order, this rank's share from a step on: one batch for each step of accumulation.

        files: whose rows are counted through, one file after the other.
        """
        size, ranks = self.args.per_device_train_batch_size, self.accelerator.num_processes
        shared = order[begin * size * ranks * self.args.gradient_accumulation_steps :].reshape(-1, ranks, size)
        mine = shared[:, self.accelerator.process_index].reshape(-1).tolist()
        rows: Subset = Subset(ConcatDataset([file.dataset for file in files]), mine)
        yield from DataLoader(rows, size, collate_fn=files[0].collate, **devices.readers())


def draw(fits: Sequence[np.ndarray], lengths: Sequence[np.ndarray], distill: Distill, number: int) -> np.ndarray:
    """The rows of a round in the order of training: places in sft's rows and those of all rounds so far, one file after
    the other.

    fits: which rows of each file may be trained on, sft's first. lengths: of each file's rows, tokens.
    """
    generator = np.random.default_rng([distill.random_seed, 12, number])
    starts = np.cumsum([0, *map(len, lengths)])
    places = [start + np.flatnonzero(fit) for start, fit in zip(starts, fits, strict=False)]
    wanted = distill.steps * distill.batch_size
    from_sft = round(distill.sft_share * wanted)
    chosen = np.empty(0, int)
    for some, count in ((places[0], from_sft), (np.concatenate(places[1:]), wanted - from_sft)):
        if count and not len(some):
            raise WorkError("distill: no row is short enough to train on: raise sft.max_length or sampling.max_tokens")
        while count:
            once = generator.permutation(some)[:count]
            chosen, count = np.append(chosen, once), count - len(once)
    return chosen[dataset.order(np.concatenate(lengths)[chosen], distill.batch_size, 1, distill.random_seed + number)]
