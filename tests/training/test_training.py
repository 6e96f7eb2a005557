"""Rows reach the trainer in whole batches of like length, whatever the devices, and without being held in memory."""

import itertools
import json
import runpy
import tracemalloc

import numpy as np
import pytest
from conftest import SHOWN

from apprentice import params
from apprentice.data.chat_rows import row
from apprentice.data.dataset import Jsonl, order, write_jsonl
from apprentice.errors import WorkError
from apprentice.params import Lora, Prompt
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.student import encoding, loading
from apprentice.student.encoding import encode, length
from apprentice.training import devices, examples

LENGTHS = np.random.default_rng(0).integers(100, 2000, 1000)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Of very different lengths, as imports beside a teacher's would be."""
    episodes = play(Scripted("expert", rationale=True), Spec([3, 4], 100, SHOWN))
    shown = [SHOWN, Prompt(mode="text+image", rules=False, history=8), Prompt(mode="text"), Prompt(mode="text+image")]
    return [
        row(episode, step, settings, rationale)
        for episode in episodes
        for step in episode.steps
        for settings, rationale in zip(shown, (False, True, False, True), strict=True)
    ]


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("epochs", [0.3, 1, 2.5])
def test_every_row_comes_once_an_epoch_and_every_batch_is_whole(epochs):
    found = order(LENGTHS, 32, epochs, 0)
    assert len(found) % 32 == 0 and 0 <= len(found) - epochs * len(LENGTHS) < 32
    counts = np.bincount(found, minlength=len(LENGTHS))
    assert counts.max() - counts.min() <= 1


def test_fewer_rows_than_a_batch_fill_it():
    assert np.bincount(order(LENGTHS[:3], 8, 1, 0)).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_the_order_is_that_of_its_seed():
    assert np.array_equal(order(LENGTHS, 32, 2, 1), order(LENGTHS, 32, 2, 1))
    assert not np.array_equal(order(LENGTHS, 32, 2, 1), order(LENGTHS, 32, 2, 2))


def test_rows_of_nearly_one_length_stay_mixed():
    lengths = np.array([130, 131] * 500)
    assert (lengths[order(lengths, 10, 1, 0)].reshape(-1, 10) == 130).any(axis=1).mean() > 0.95


@pytest.mark.parametrize(("ranks", "at_once"), [(1, 32), (1, 8), (2, 16), (4, 2), (8, 4)])
def test_a_step_has_the_same_rows_on_any_number_of_devices(ranks, at_once):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    found = order(LENGTHS, 32, 1, 0)
    batches = BatchSampler(SequentialSampler(found), at_once, drop_last=False)
    shares = [list(BatchSamplerShard(batches, ranks, rank)) for rank in range(ranks)]
    accumulation = 32 // (ranks * at_once)
    for step, wanted in enumerate(found.reshape(-1, 32)):
        at = slice(step * accumulation, (step + 1) * accumulation)
        seen = [place for share in shares for batch in share[at] for place in batch]
        assert sorted(found[seen]) == sorted(wanted)


def test_less_than_a_tenth_is_padding(tiny_folder, tiny, file):
    survey = examples.survey(file, tiny_folder, "padding")

    def padding(chosen) -> float:
        rows = examples.Rows(file, tiny[1], survey.places, chosen)
        masks = [rows.collate(list(rows.dataset.select(range(first, first + 8))))["attention_mask"]
                 for first in range(0, len(chosen), 8)]  # fmt: skip
        return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)

    assert padding(order(survey.lengths, 16, 1, 0)) < 0.1
    assert padding(np.random.default_rng(0).permutation(len(survey.lengths))) > 0.2


@pytest.mark.parametrize("part", [16 << 20, 50_000, 1_000])
def test_a_survey_finds_every_row_wherever_a_part_ends(tiny_folder, tiny, file, rows, monkeypatch, part):
    monkeypatch.setattr(examples, "_PART", part)
    survey = examples.survey(file, tiny_folder, "survey")
    assert [Jsonl(file, survey.places)[index] for index in range(len(rows))] == rows
    assert survey.lengths.tolist() == [length(tiny[1], row["messages"]) for row in rows]
    assert survey.answers.tolist() == [len(encode(tiny[1], row["messages"]).answer_ids) for row in rows]
    assert survey.teachers == [{"teacher": "expert", "model": "expert", "rows": len(rows), "episodes": 2}]


def test_a_survey_on_all_cores_is_the_same_and_is_made_once(tiny_folder, file, monkeypatch):
    alone = examples.survey(file, tiny_folder, "alone")
    monkeypatch.setattr(examples, "_PART", file.stat().st_size // 3)
    monkeypatch.setattr(examples, "_ALONE", 0)
    spread = examples.survey(file, tiny_folder, "spread")
    assert np.array_equal(alone.lengths, spread.lengths) and np.array_equal(alone.places, spread.places)
    assert alone.teachers == spread.teachers
    monkeypatch.setattr(examples, "_survey_part", None)
    assert np.array_equal(examples.survey(file, tiny_folder, "spread").lengths, spread.lengths)


def test_a_row_that_cannot_be_encoded_is_named_before_training(tiny_folder, rows, tmp_path):
    path = tmp_path / "train.jsonl"
    wrong = rows[0] | {"messages": [{"role": "user", "content": [{"type": "image"}]}, rows[0]["messages"][-1]]}
    write_jsonl(path, [*rows[:6], wrong, *rows[:3]])
    with pytest.raises(WorkError, match=r"train\.jsonl, line 7, cannot be encoded .*0 pictures and 1 places.*split"):
        examples.survey(path, tiny_folder, "wrong")


def _ends_at(monkeypatch, row: dict) -> None:
    """From now on, to encode this row ends as an iterator does."""
    encode_all = encoding.encode_all

    def ending(processor, chats, images=None):
        if row["messages"] in chats:
            raise StopIteration
        return encode_all(processor, chats, images)

    for module in (encoding, examples):
        monkeypatch.setattr(module, "encode_all", ending)


def test_nothing_that_encodes_ends_an_iteration(tiny, file, rows, tiny_folder, monkeypatch):
    survey = examples.survey(file, tiny_folder, "ending")
    found = examples.Rows(file, tiny[1], survey.places, np.arange(8))
    _ends_at(monkeypatch, rows[5])
    assert len(found.dataset[:5]["encoded"]) == 5
    with pytest.raises(WorkError, match=r"train\.jsonl, line 6, cannot be encoded \(StopIteration"):
        found.dataset[:8]


@pytest.mark.parametrize("name", ["train", "eval"])
def test_training_that_does_not_see_all_rows_is_an_error(tiny_folder, file, tmp_path, name):
    """Whatever ended the rows early: a trainer takes it for the end, and is done."""
    from trl import SFTConfig

    from apprentice.training.sft import SftTrainer

    class EndsEarly:
        """A loader that stops after half of its batches."""

        def __init__(self, loader):
            self.loader = loader

        def __getattr__(self, name):
            return getattr(self.loader, name)

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            yield from itertools.islice(self.loader, len(self.loader) // 2)

    model, processor = loading.load(tiny_folder)
    survey = examples.survey(file, tiny_folder, "early")
    data = examples.Rows(file, processor, survey.places, np.arange(8))
    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=data.dataset,
        eval_dataset=data.dataset,
        data_collator=data.collate,
        processing_class=processor,
        peft_config=loading.lora_config(Lora(rank=2)),
    )
    whole = getattr(trainer, f"get_{name}_dataloader")
    setattr(trainer, f"get_{name}_dataloader", lambda *given: EndsEarly(whole(*given)))
    work, said = {
        "train": (trainer.train, "training rows ended within step 3 of 4"),
        "eval": (trainer.evaluate, "only 4 of 8 validation rows were seen"),
    }[name]
    with pytest.raises(WorkError, match=said):
        work()


def test_sft_leaves_out_answers_that_the_students_play_would_cut_off(tiny_folder, tiny, file, monkeypatch):
    stage = runpy.run_path(str(ROOT / "stages/sft.py"))
    survey = examples.survey(file, tiny_folder, "answers")
    profile = params.load(ROOT / "params.yaml").active
    most = int(np.median(survey.answers))
    profile = profile.model_copy(update={"sampling": profile.sampling.model_copy(update={"max_tokens": most})})
    fit = survey.fitting(profile)
    assert 0 < fit.sum() < len(fit)
    assert (fit == ((survey.answers <= most) & (survey.lengths <= profile.sft.max_length))).all()
    monkeypatch.setattr(examples, "survey", lambda *_: survey)
    assert stage["too_long"]("train", "answers", profile, "profiles.tiny") == (~fit).sum()
    none = profile.model_copy(update={"sampling": profile.sampling.model_copy(update={"max_tokens": 2})})
    with pytest.raises(WorkError, match=r"answer of at most 2,.*raise .*profiles\.tiny\.sampling\.max_tokens"):
        stage["too_long"]("train", "answers", none, "profiles.tiny")


def test_memory_does_not_grow_with_the_rows(tiny, tmp_path):
    """The places, and the order of an epoch: some bytes of a row of thousands."""

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        line = json.dumps({"text": "x" * 100}) + "\n"
        path.write_text(line * count)
        places = np.arange(count) * len(line)
        tracemalloc.start()
        rows = examples.Rows(path, tiny[1], places, order(np.full(count, 130), 32, 1, 0))
        assert rows._rows[count - 1]["text"] and len(Jsonl(path)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(200_000) - peak(2_000) < 198_000 * 25


def test_readers_leave_the_cores_to_training_where_there_is_no_gpu(monkeypatch):
    assert devices.readers()["num_workers"] == 0
    monkeypatch.setattr("apprentice.gpus.names", lambda: ["0"])
    monkeypatch.setattr(devices, "cores", lambda: 16)
    assert devices.readers()["num_workers"] == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert devices.readers()["num_workers"] == 1
