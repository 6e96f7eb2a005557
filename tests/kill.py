"""`make test-kill`: every stage is killed at random moments and run again, and ends as if nothing had happened.

A small pipeline runs undisturbed. Then each stage runs in a checkout and with a cache of its own, on the same inputs.
It is killed by SIGKILL twice, at moments drawn between its begin and the time that it took undisturbed. A file of the
newest checkpoint, where there is one, is emptied, as a power cut may do. Then the stage runs to its end. No output may
be torn after a kill, but a curve may have only begun. At the end the outputs are the same bytes, and no file or process
is left behind. Of the paid teacher's stub nothing was asked for twice, but for what was under way at a kill. KILL_SEED
draws other moments.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from endpoint import Request, Server, playing
from small import SMALL, checkout, environment, yaml

from apprentice.data import chat_rows
from apprentice.files import SEAL
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.workers import cores

KILLS, TRIES = 2, 6
"""How often each stage is killed, and how often at most it may be at its end before, after which it begins anew."""
COMMANDS = (
    "settings", "collect expert", "collect paid", "import others", "filter", "split", "student", "sft", "distill", "rl",
    "agreement", "benchmark expert", "benchmark_student sft", "score", "summary", "report",
)  # fmt: skip
"""Stages with their arguments, in an order in which they can run. Agents and students of the benchmark are alike."""
SMALLER = SMALL | {
    "profiles.tiny.student.pretraining.steps": 10,
    "profiles.tiny.sft.eval_steps": 10,
    "profiles.tiny.distill.rounds": 1,
    "profiles.tiny.rl.iterations": 2,
    "teachers.expert.seeds": "0-3",
    "benchmark.agents": {"expert": {"policy": "expert"}},
    "benchmark.students": {"sft": "models/sft"},
    "imports": {"others": {"file": "others.jsonl"}},
}
DIFFERS = ("metrics/times/", "metrics/plots/rl.csv", "metrics/cost/paid.json", "metrics/cost.json")
"""Outputs that say how long something took, or what was paid for what was under way at a kill."""


@dataclass
class Pipeline:
    """An undisturbed run."""

    top: Path
    server: Server
    seconds: dict[str, float]
    asked: Counter


def test_every_stage_ends_as_if_it_had_not_been_killed(tmp_path):
    seed = int(os.environ.get("KILL_SEED", "0"))
    with Server(lambda request: playing(request.body, 0.02)) as server:
        pipeline = undisturbed(tmp_path, server)
        print(
            f"\nundisturbed: {sum(pipeline.seconds.values()):.0f} s; moments of kills by KILL_SEED={seed}", flush=True
        )
        with ThreadPoolExecutor(cores()) as pool:
            counts = [pool.submit(campaign, tmp_path, pipeline, command, seed) for command in COMMANDS]
            total = sum((count.result() for count in counts), Counter())
    print(", ".join(f"{count} {what}" for what, count in total.items()))
    assert total["kills"] >= len(COMMANDS)  # others came after the end


def undisturbed(folder: Path, server: Server) -> Pipeline:
    top, cache, seconds = checkout(folder / "undisturbed", SMALLER), folder / "cache", {}
    endpoint = {"base_url": server.url, "model": "served", "api_key_env": None, "concurrency": 4}
    shown = {"mode": "text"}
    params = yaml.load((top / "params.yaml").read_text())
    params["teachers"]["paid"] = {
        "policy": "chat", "seeds": "0-3", "max_steps": 60, "prompt": shown, "endpoint": endpoint
    }  # fmt: skip
    with (top / "params.yaml").open("w") as file:
        yaml.dump(params, file)
    student = Prompt(**params["profiles"]["tiny"]["prompt"])
    episodes = play(Scripted("expert"), Spec(range(40, 44), 60, student))
    rows = [chat_rows.row(episode, step, student) for episode in episodes for step in episode.steps]
    (top / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in COMMANDS:
        began = time.monotonic()
        finish(top, cache, command)
        seconds[command] = time.monotonic() - began
    return Pipeline(top, server, seconds, asked(server.requests))


def campaign(folder: Path, pipeline: Pipeline, command: str, seed: int) -> Counter:
    """Kill a stage and run it again; how many kills there were, and requests asked twice."""
    draw = random.Random(f"{seed} {command}")
    top = folder / command.replace(" ", "-")
    shutil.copytree(pipeline.top, top)
    cache, outs, files = folder / f"{top.name}-cache", outs_of(top, command), names(top)
    before, counts, under_way = len(pipeline.server.requests), Counter(kills=0), 0
    remove(top, outs)
    longest = pipeline.seconds[command]
    while counts["kills"] < KILLS and counts["ends before a kill"] < TRIES:
        process = start(top, cache, command)
        try:
            assert process.wait(draw.uniform(0.1, 1) * longest) == 0
            counts["ends before a kill"] += 1
            longest *= 0.6
            remove(top, outs)
            shutil.rmtree(cache, ignore_errors=True)
            before, under_way = len(pipeline.server.requests), 0
        except subprocess.TimeoutExpired:
            counts["kills"] += 1
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            under_way += sum(request.ended > time.monotonic() - 0.5 for request in list(pipeline.server.requests))
            process.wait()
            _, alive = psutil.wait_procs(children, timeout=30)
            assert not alive, f"{command} has left {alive} behind"
        for out in outs:
            torn = (top / out).exists() and differs(top, pipeline.top, out) and not begun(top, pipeline.top, out)
            assert not torn, f"{command}: {out} is torn after a kill"
    if checkpoints := sorted(cache.rglob(SEAL), key=lambda seal: seal.stat().st_mtime):
        file = draw.choice(sorted(file for file in checkpoints[-1].parent.iterdir() if file.stat().st_size))
        file.write_bytes(b"")
        counts["checkpoints damaged"] += 1
    finish(top, cache, command)
    for out in outs:
        assert not differs(top, pipeline.top, out), f"{command}: {out} is not what it is undisturbed"
    assert names(top) == files, f"{command} has left files behind, or lacks some: {names(top) ^ files}"
    left = [path for path in cache.rglob(".partial-*")]
    assert not left, f"{command} has left {left} behind"
    if command == "collect paid":
        counts["requests"] = len(pipeline.server.requests) - before
        counts["requests asked twice"] = (asked(pipeline.server.requests[before:]) - pipeline.asked).total()
        assert counts["requests asked twice"] <= under_way, f"{under_way} were under way"
    print(f"{command}: {', '.join(f'{count} {what}' for what, count in counts.items())}", flush=True)
    shutil.rmtree(top)
    return counts


def remove(top: Path, outs: list[str]) -> None:
    """As DVC does before it runs a stage."""
    for out in outs:
        shutil.rmtree(top / out) if (top / out).is_dir() else (top / out).unlink(missing_ok=True)


def start(top: Path, cache: Path, command: str) -> subprocess.Popen:
    name, *arguments = command.split()
    log = (top.parent / f"{top.name}.log").open("a")
    return subprocess.Popen(
        [sys.executable, f"stages/{name}.py", *arguments],
        cwd=top,
        env=environment(cache),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def finish(top: Path, cache: Path, command: str) -> None:
    code = start(top, cache, command).wait(900)
    assert code == 0, f"{command}: {(top.parent / f'{top.name}.log').read_text()[-3000:]}"


def outs_of(top: Path, command: str) -> list[str]:
    """A stage's outputs by dvc.yaml."""
    name, _, key = command.partition(" ")
    tree = yaml.load((top / "dvc.yaml").read_text())["stages"][name]
    outs = [*tree.get("do", tree)["outs"], *(next(iter(out)) for out in tree.get("metrics", []))]
    return [out.replace("${key}", key) for out in outs]


def differs(one: Path, other: Path, out: str) -> bool:
    if out.startswith(DIFFERS):
        return not (one / out).stat().st_size
    if (one / out).is_dir():
        return names(one / out) != names(other / out) or any(
            differs(one, other, f"{out}/{name}") for name in names(one / out)
        )
    return (one / out).read_bytes() != (other / out).read_bytes()


def begun(one: Path, whole: Path, out: str) -> bool:
    """A curve is drawn while its stage runs: what is there is the beginning of the whole one."""
    return out.startswith("metrics/plots/") and (whole / out).read_bytes().startswith((one / out).read_bytes())


def names(top: Path) -> set[str]:
    files = (file for file in top.rglob("*") if file.is_file())
    return {str(file.relative_to(top)) for file in files if not {"__pycache__", ".git"} & set(file.parts)}


def asked(requests: list[Request]) -> Counter:
    """How often each was asked."""
    return Counter(json.dumps(request.body) for request in requests)
