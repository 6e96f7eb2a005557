"""What a run shows: a line that says how far it is, where a terminal is and where none; and no library's own noise."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apprentice import compute, progress
from apprentice.errors import ConfigError
from apprentice.pipeline import ROOT
from apprentice.progress import Progress, duration
from apprentice.stage import place

SHOW = """
import sys, time
from apprentice import progress
progress.EVERY = 0.3
with progress.Progress("rl", {"iteration": 4, "play": 4}) as shown:
    for number in range(4):
        shown.begin("play")
        time.sleep(0.4)
        shown.end("play")
        shown.begin("iteration", "update")
        time.sleep(0.2)
        shown.end("iteration")
        shown.say(f"line {number}")
"""


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    return after


def test_what_is_left_is_known_within_a_third_once_each_kind_of_work_was_seen(clock):
    """As rl goes: episodes grow longer while it learns, and every fourth iteration plays held-out worlds as well."""
    plays = [20 + number for number in range(12)]
    held_out, updates = [30.0] * 4, [10.0] * 12
    shown = Progress("rl", {"iteration": 12, "play": 12, "held-out": 4}, shown=False)
    known = 0
    for number in range(12):
        if number % 4 == 0:
            shown.begin("held-out")
            clock(held_out.pop())
            shown.end("held-out")
        shown.begin("play")
        assert (shown.left() is None) == (number == 0)
        clock(plays[number])
        shown.end("play")
        shown.begin("iteration", "update")
        clock(updates.pop())
        shown.end("iteration")
        real = sum(plays[number + 1 :]) + sum(updates) + sum(held_out)
        assert shown.left() == pytest.approx(real, rel=1 / 3)
        known += 1
    assert known == 12


def test_what_is_under_way_counts_as_far_as_it_has_come(clock):
    shown = Progress("sft", {"step": 10}, done=10, shown=False)
    for _ in range(5):
        clock(2)
        shown.end("step")
    assert shown.left() == 10 and str(shown) == "sft 15/20 steps, 10 s left"
    clock(1)
    assert shown.left() == 9
    clock(100)
    assert shown.left() == 8


def test_where_it_is_no_terminal_a_line_comes_now_and_then():
    for again in (True, True, False):  # on a busy machine a line comes later than it should
        done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
        lines = done.stderr.splitlines()
        assert not done.stdout and "\r" not in done.stderr and "\x1b" not in done.stderr
        assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(4)]
        others = [line for line in lines if not line.startswith("line")]
        assert all(line.startswith("rl ") for line in others)
        in_time = 5 <= len(others) <= 9 and others[0] == "rl 0/4: play for 0 s" and "left" in others[-1]
        if in_time or not again:
            break
    assert in_time, others


def test_in_a_terminal_one_line_is_written_again_and_again():
    ours, its = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SHOW], stderr=its, env=os.environ | {"COLUMNS": "20"})
    os.close(its)
    shown = b""
    while data := _read(ours):
        shown += data
    assert process.wait() == 0
    assert shown.count(b"\n") == 4  # those that stay
    for line in shown.decode().replace("\x1b[K", "").replace("\n", "\r").split("\r"):
        assert len(line) < 20


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_stages_keep_libraries_quiet_and_tests_do_not(recwarn):
    noise = "import warnings; warnings.warn('old', FutureWarning); warnings.warn('mine', UserWarning)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {noise!r}])"
    code = f"from apprentice.progress import quiet; quiet(); {noise}; {child}"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "old" not in shown and shown.count("mine") >= 2
    import warnings

    warnings.warn("old", FutureWarning, stacklevel=1)
    assert len(recwarn) == 1


@pytest.mark.parametrize(("seconds", "said"), [(3.4, "3 s"), (59.7, "1:00 min"), (185, "3:05 min"), (3720, "1:02 h")])
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_stage_says_which_of_all_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert place("settings") == "stage 1 of 18: settings"
    assert place("benchmark@expert") == "stage 12 of 18: benchmark@expert"
    assert place("report") == "stage 18 of 18: report"


def test_a_bad_setting_says_how_what_dvc_removed_comes_back(tmp_path):
    for name in ("stages", "src", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    (tmp_path / "dvc.lock").write_text("stages:\n  collect@nobody:\n    cmd: x\n")
    for stage, hint in {"collect@nobody": True, "collect@expert": False}.items():
        done = subprocess.run(
            [sys.executable, str(Path("stages/collect.py")), "nobody"],
            cwd=tmp_path, env=os.environ | {"DVC_STAGE": stage}, capture_output=True, text=True,
        )  # fmt: skip
        assert ("`dvc checkout` brings them back" in done.stderr) == hint
        assert stage == "collect@expert" or done.returncode == 2


def test_a_place_to_log_to_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compute.reporters() == []
    Path("compute.yaml").write_text("report_to: [trackio, wandb]")
    monkeypatch.setattr(compute, "find_spec", lambda name: name == "trackio")
    with pytest.raises(ConfigError, match="report_to: wandb is not installed; run: pip install wandb"):
        compute.reporters()
    Path("compute.yaml").write_text("report_to: [mlflow]")
    with pytest.raises(ConfigError, match="report_to"):
        compute.reporters()


def test_the_lines_are_half_a_minute_apart():
    assert progress.EVERY == 30
