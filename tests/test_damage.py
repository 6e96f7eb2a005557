"""What a full disk, a power cut or a bad sector has damaged is named, and never taken for whole."""

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from apprentice.errors import WorkError
from apprentice.files import SEAL, damage, seal
from apprentice.ledger import Ledger, opened
from apprentice.training.checkpoints import Whole, last_checkpoint

FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "overwritten": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": Path.unlink,
}


def save(folder: Path, step: int, best: int | None = None, beside=tuple) -> Path:
    """A checkpoint, as a trainer saves it."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (checkpoint / name).write_text(f"{name} {step}")
    state = SimpleNamespace(global_step=step, best_global_step=best, is_world_process_zero=True)
    Whole(beside).on_save(SimpleNamespace(output_dir=str(folder)), state, None)
    return checkpoint


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, SEAL])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, capsys, name, how):
    before, newest = save(tmp_path, 5), save(tmp_path, 10)
    assert last_checkpoint(tmp_path) == str(newest)
    DAMAGES[how](newest / name)
    assert last_checkpoint(tmp_path) == str(before)
    said = capsys.readouterr().err
    if (name, how) != (SEAL, "removed"):  # that is what a kill leaves
        assert said.count("\n") == 1 and str(newest / name) in said and "an earlier point" in said
    assert not newest.exists()  # or the next one of this name would have its files


def test_a_checkpoint_is_not_taken_without_the_best_one_that_it_names(tmp_path):
    """The trainer would end with other weights, and a warning."""
    best, newest = save(tmp_path, 5, best=5), save(tmp_path, 10, best=5)
    assert last_checkpoint(tmp_path) == str(newest)
    (best / "adapter_model.safetensors").write_bytes(b"")
    assert last_checkpoint(tmp_path) is None


def test_a_checkpoint_is_not_taken_without_what_it_reads_elsewhere(tmp_path):
    critic = tmp_path / "critics/3.npy"
    critic.parent.mkdir()
    critic.write_text("what it has learnt")
    before, newest = save(tmp_path, 5), save(tmp_path, 10, beside=lambda: [critic])
    assert last_checkpoint(tmp_path) == str(newest)
    critic.write_text("")
    assert last_checkpoint(tmp_path) == str(before)


def test_two_checkpoints_are_kept_with_the_best_that_each_of_them_names(tmp_path):
    best = [5, 5, 5, 20, 20, 20]
    kept = []
    for step, best_step in zip(range(5, 35, 5), best, strict=True):
        save(tmp_path, step, best_step)
        kept.append(sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")))
    assert kept == [[5], [5, 10], [5, 10, 15], [5, 15, 20], [20, 25], [20, 25, 30]]


def test_a_run_goes_on_from_a_cache_that_has_moved(tmp_path):
    save(tmp_path / "here", 5, best=5), save(tmp_path / "here", 10, best=5)
    there = (tmp_path / "here").rename(tmp_path / "there")
    assert last_checkpoint(there) == str(there / "checkpoint-10")
    state = SimpleNamespace(best_global_step=5, best_model_checkpoint=None)
    Whole().on_train_begin(SimpleNamespace(output_dir=str(there)), state, None)
    assert state.best_model_checkpoint == str(there / "checkpoint-5")


def test_a_seal_holds_for_a_folder_that_gets_its_name_afterwards(tmp_path):
    folder = tmp_path / ".partial"
    folder.mkdir()
    (folder / "weights").write_text("weights")
    assert "not finished" in damage(folder)
    seal(folder)
    folder = folder.rename(tmp_path / "whole")
    assert damage(folder) == ""


@pytest.fixture
def ledger() -> Path:
    """The file of a ledger with many episodes."""
    with Ledger("damaged") as filled:
        for seed in range(200):
            filled.add(str(seed), bytes([seed]) * 3000)
        return filled._path


@pytest.mark.parametrize("how", ["cut", "overwritten", "in the middle"])
def test_a_damaged_ledger_is_named_moved_aside_and_begun_anew(ledger, capsys, how):
    whole = ledger.read_bytes()
    half = len(whole) // 2 // 4096 * 4096
    damaged = {
        "cut": whole[:half],
        "overwritten": bytes(len(whole)),
        "in the middle": whole[:half] + bytes(8192) + whole[half + 8192 :],
    }
    ledger.write_bytes(damaged[how])
    with Ledger("damaged") as anew:
        assert anew.keys() == set()
        anew.add("1", b"episode")
    aside = Path(f"{ledger}.damaged-1")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(ledger) in said and str(aside) in said
    assert aside.read_bytes() == damaged[how]
    with Ledger("damaged") as kept:
        assert kept.keys() == {"1"}
    assert not capsys.readouterr().err


def test_an_emptied_ledger_is_named(ledger, capsys):
    ledger.write_bytes(b"")
    with Ledger("damaged") as anew:
        assert anew.keys() == set()
    assert f"{ledger} is empty" in capsys.readouterr().err


def test_what_was_paid_for_is_not_paid_again_before_the_user_knows(tmp_path):
    path = tmp_path / "replies.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(WorkError, match=r"replies.sqlite was damaged, and is now .*damaged-1.*paid for again"):
        opened(path)
    db = opened(path)
    db.execute("CREATE TABLE replies (seed INTEGER)")
    db.close()
    assert isinstance(opened(path), sqlite3.Connection)


@pytest.mark.parametrize("harm", DAMAGES)
def test_damaged_play_on_held_out_worlds_is_as_if_it_had_not_been(tmp_path, harm):
    from apprentice.training.self_play import evaluations

    for iteration in (0, 2):
        folder = tmp_path / "evaluated" / str(iteration)
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"iteration": iteration}))
        seal(folder)
    assert [found["iteration"] for found in evaluations(tmp_path)] == [0, 2]
    DAMAGES[harm](tmp_path / "evaluated/2/evaluation.json")
    assert [found["iteration"] for found in evaluations(tmp_path)] == [0]
