"""`apprentice cache`: what is kept between runs is shown, explained and removed, and nothing paid for by mistake."""

from pathlib import Path

import pytest
from command_line import run


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "cache"))
    for name in ("sft/one/checkpoint-5/a", "sft/two/b", "episodes/x.sqlite", "replies/y.sqlite"):
        file = tmp_path / "cache" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"0" * 1_500_000)
    return tmp_path / "cache"


def test_what_is_kept_is_shown_and_explained(cache):
    done = run(cache.parent, "cache")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:3] for line in done.stdout.splitlines() if line.strip()}
    assert rows["sft"] == ["2", "3.0"] and rows["episodes"] == ["1", "1.5"] and "rl" not in rows
    assert "apprentice cache clear sft" in done.stdout


def test_what_is_named_is_removed_and_nothing_else(cache):
    done = run(cache.parent, "cache", "clear", "sft", "--yes")
    assert done.returncode == 0 and "removed 2 entries, 3.0 MB" in done.stdout
    assert not list((cache / "sft").iterdir()) and (cache / "episodes/x.sqlite").exists()
    assert "nothing to remove" in run(cache.parent, "cache", "clear", "sft", "--yes").stdout


def test_what_was_paid_for_is_not_lost_by_mistake(cache):
    done = run(cache.parent, "cache", "clear", "sft", "replies", "--yes")
    assert done.returncode == 2 and "add --paid" in done.stderr and (cache / "sft/two/b").exists()
    assert run(cache.parent, "cache", "clear", "replies", "--yes", "--paid").returncode == 0
    assert not list((cache / "replies").iterdir())


def test_an_empty_cache_and_an_unknown_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "none"))
    assert "is empty" in " ".join(run(tmp_path, "cache").stdout.split())
    done = run(tmp_path, "cache", "clear", "models")
    assert done.returncode == 2 and "there are episodes, rows, sft" in done.stderr
