"""`apprentice play`: anybody's episode in a terminal, as a film, as JSON; and one by hand."""

import json
import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import run, write_params
from endpoint import Answer, Server, call, completion
from PIL import Image

from apprentice import store
from apprentice.cli import screen, watch
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted

COMMAND = [sys.executable, "-c", "from apprentice.cli import main; main()"]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_params(tmp_path)
    return tmp_path


def test_an_episode_ends_as_the_same_one_in_the_pipeline(folder):
    done = run(folder, "play", "expert", "--json")
    assert done.returncode == 0, done.stderr
    (episode,) = play(Scripted("expert"), Spec([200200], 30, Prompt()))
    assert json.loads(done.stdout) == {
        "agent": "expert",
        "seed": 200200,
        "steps": 30,
        "reward": pytest.approx(episode.reward),
        "achievements": list(episode.unlocked),
        "died": False,
    }


def test_a_film_has_a_frame_for_each_step(folder):
    done = run(folder, "play", "random", "--seed", "3", "--max-steps", "12", "--gif", "a.gif", "--mp4", "films/a.mp4")
    assert done.returncode == 0, done.stderr
    with Image.open(folder / "a.gif") as film:
        assert film.n_frames == 13
        first = np.asarray(film.convert("RGB"))
    (episode,) = play(Scripted("random"), Spec([3], 12, Prompt()))
    shown = next(watch.moments(episode, 288)).image
    assert np.abs(first[:288].astype(int) - shown).mean() < 8  # GIF has 256 colours
    assert first[288:].max() == 255  # words below

    import imageio_ffmpeg

    frames = imageio_ffmpeg.read_frames(folder / "films/a.mp4")
    assert next(frames)["source_size"] == (288, 344)
    assert len(list(frames)) == 13
    assert not list(folder.rglob(".partial*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "there is no agent 'nobody'; there are random, noop, expert, base, sft, distill, rl, api, me"),
        (["me"], "needs a terminal"),
        (["noop", "--seed", str(2**31)], "2147483647"),
        (["expert", "--gif", "a.mp4"], "a.mp4 must end in .gif"),
        (["rl"], "rl needs models/base, which is not there; make it by dvc repro"),
    ],
)
def test_what_cannot_be_played_is_one_sentence_with_the_remedy(folder, arguments, said):
    done = run(folder, "play", *arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_without_params_the_built_in_agents_play(tmp_path):
    done = run(tmp_path, "play", "noop", "--max-steps", "3", "--json")
    assert json.loads(done.stdout)["steps"] == 3
    assert run(tmp_path, "play", "sft").returncode == 2


def test_a_model_behind_an_api_plays_and_is_not_paid_twice(folder):
    evil = call("move_left") | {"content": "\x1b[2Jgone\x07"}
    with Server([Answer(completion(evil))]) as server:
        write_params(folder, server.url)
        one = run(folder, "play", "api", "--seed", "0", "--max-steps", "6", "--json")
        two = run(folder, "play", "api", "--seed", "0", "--max-steps", "6", "--json")
        assert one.returncode == 0 and one.stdout == two.stdout and len(server.requests) == 6
        code, shown = in_terminal(folder, ["play", "api", "--seed", "0", "--max-steps", "6", "--fps", "50"])
    assert code == 0 and "gone" in shown and "\x1b[2J" not in shown and "\x07" not in shown


def in_terminal(folder: Path, arguments: list[str], keys: bytes = b"") -> tuple[int, str]:
    """Run it in a terminal of 80 × 24 and press keys, each when a picture has come. Its exit code and output."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.execve(sys.executable, [*COMMAND, *arguments], os.environ | {"COLUMNS": "80", "LINES": "24"})
    shown, waiting = b"", [keys[i : i + 1] for i in range(len(keys))]
    quiet = time.monotonic()
    while True:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                break
            if not data:
                break
            shown += data
            quiet = time.monotonic()
        elif b"\xe2\x96\x80" in shown and waiting and time.monotonic() - quiet > 0.2:
            os.write(terminal, waiting.pop(0))
            quiet = time.monotonic()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode(errors="replace")


def test_in_a_terminal_pictures_are_shown_and_the_screen_is_given_back(folder):
    code, shown = in_terminal(folder, ["play", "expert", "--max-steps", "5", "--fps", "50"])
    assert code == 0
    frames = shown.split(screen.HOME)
    assert len(frames) > 6 and shown.index(screen.ENTER[:8]) < shown.index(screen.LEAVE[-8:])
    assert "step 5/5" in frames[-1] and "health 9" in frames[-1]
    assert shown.index("expert begins") < shown.index(screen.ENTER[:8])
    after = shown.split(screen.LEAVE)[-1]
    assert "expert on seed 200200: 5 steps" in after and "▀" in after and "step 5/5" in after  # the last picture stays
    for frame in frames[1:]:
        assert [line for line in bare(frame.split(screen.LEAVE)[0]).split("\n") if len(line.strip("\r")) > 80] == []
        assert frame.split(screen.LEAVE)[0].count("\n") < 24


def bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_an_achievement_is_flashed_and_the_caption_tells_what_happens(folder):
    code, shown = in_terminal(folder, ["play", "expert", "--seed", "200003", "--max-steps", "29", "--fps", "100"])
    frames = shown.split(screen.HOME)[2:]
    assert code == 0 and len(frames) == 30
    assert "\x1b[7m unlocked defeat_zombie" in frames[22] and "hits the zombie: health -2" in bare(frames[22])
    assert "\x1b[7m" not in frames[21] and "turns left, to zombie" in bare(frames[17])
    assert "2. collect_sapling" in bare(frames[26])


def test_the_best_of_the_benchmark_is_shown_as_it_was_recorded(folder):
    episodes = play(Scripted("random"), Spec([5, 6, 7], 60, Prompt(), "random"))
    store.write(folder / "data/benchmark/random.parquet", episodes)
    best = max(episodes, key=lambda episode: (len(episode.unlocked), episode.reward))
    found = json.loads(run(folder, "play", "random", "--best", "--json").stdout)
    assert (found["seed"], found["achievements"]) == (best.seed, list(best.unlocked)) and found["steps"] == best.length
    assert "leave --seed" in run(folder, "play", "random", "--best", "--seed", "5").stderr
    assert "there is no data/benchmark/rl.parquet" in run(folder, "play", "rl", "--best").stderr


def test_by_hand_the_keys_are_crafters(folder):
    code, shown = in_terminal(folder, ["play", "me", "--seed", "3"], b"d n?x")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "step 1/10000, reward 0.0, 0/22" in plain and "move_right: " in plain
    assert "step 2/10000" in plain and "do" in plain and "step 3/10000" in plain
    assert "step 4/10000" not in plain and "me on seed 3: 3 steps" in plain


def test_a_moment_is_what_the_world_shows_at_that_step():
    (episode,) = play(Scripted("expert"), Spec([5], 40, Prompt()))
    seen = list(watch.moments(episode, 72))
    assert [moment.steps for moment in seen] == list(range(41))
    for moment, step in zip(seen, episode.steps, strict=False):
        assert (moment.image == step.observation.image).all()
    assert seen[-1].achievements == episode.unlocked and seen[-1].reward == pytest.approx(episode.reward)


def test_half_blocks_hold_two_pixels_each():
    image = np.zeros((3, 2, 3), np.uint8)
    image[0, 0], image[1, 0] = (1, 2, 3), (4, 5, 6)
    lines = screen.half_blocks(image)
    assert len(lines) == 2 and lines[0].startswith("\x1b[38;2;1;2;3;48;2;4;5;6m▀")


def test_a_models_words_can_do_nothing_to_the_terminal():
    assert screen.plain("a\x1b[2Jb\r\n\x9bc\u202ed") == "a [2Jb c d"
    assert screen.plain("abcdef", 4) == "abc…"
