"""Data for a report without a pipeline: played for real, with a student that writes what it should not."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apprentice import params, play, store
from apprentice.episode import Reply
from apprentice.params import Prompt
from apprentice.pipeline import ROOT
from apprentice.players.scripted import Scripted
from apprentice.results import report, score

EVIL = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<!-- <script>",
    "<img src=x onerror='window.hacked = 3'>",
    "<svg onload=window.hacked=4>",
    "\u2028window.hacked = 5\u2029",
    "]]><iframe srcdoc='<script>parent.hacked=6</script>'>",
    "{{js}}",
    "javascript:window.hacked=7//",
    "\x00\u202e😀 & &lt;b&gt;",
)
SEEDS = (7, 8, 9)
RAN = {"processor": "Abacus 9", "date": "2026-11-26", "commit": "1234567", "changed": False}


class _Evil(Scripted):
    """Plays as the expert, and has something to say at every turn."""

    def begin(self, seed: int):
        player, turn = super().begin(seed), iter(range(10**9))
        answer = player.reply

        async def reply(shown):
            found = await answer(shown)
            words = EVIL[next(turn) % len(EVIL)]
            return Reply(found.message | {"content": words}, "stop", "evil")

        player.reply = reply
        return player


def made(folder: Path) -> dict:
    """The data of a report of what was played into this folder."""
    for name in ("data/benchmark", "data/rl", "metrics/plots", "metrics/times", "metrics/benchmark"):
        (folder / name).mkdir(parents=True)
    settings = params.load(ROOT / "params.yaml")
    small = {"seeds": SEEDS, "agents": {"expert": params.Agent(policy="expert")}, "students": {"sft": "models/sft"}}
    settings = settings.model_copy(update={"benchmark": settings.benchmark.model_copy(update=small)})
    sft = Prompt(mode="image", rules=False, history=8)
    episodes = {
        "expert": play.play(Scripted("expert"), play.Spec(SEEDS, 30, Prompt())),
        "sft": play.play(_Evil("expert"), play.Spec(SEEDS, 40, sft, agent="sft", explore=0.5)),
    }
    for name, played in episodes.items():
        store.write(folder / f"data/benchmark/{name}.parquet", played)
    rollouts = []
    for iteration in (0, 4):
        for member, episode in enumerate((*episodes["sft"][:1], *episodes["sft"][:1])):
            table = store.to_table(replace(episode, agent="rl", name=f"{iteration}-{episode.seed}-{member}"))
            advantages = np.sin(np.arange(table.num_rows) + member)
            table = table.append_column("advantage", pa.array(advantages))
            rollouts.append(table.append_column("iteration", pa.array([iteration] * table.num_rows, pa.int32())))
    pq.write_table(pa.concat_tables(rollouts), folder / "data/rl/rollouts.parquet")
    played = {name: [score.summary(one) for one in episodes[name]] for name in episodes}
    scores = {name: score.score(one, 200) for name, one in played.items()}
    differences = score.compare_all(played, 200)
    metrics = {
        "benchmark": scores,
        "differences": differences,
        "statistics": {
            "toy": False,
            "intervals": {name: score.intervals(one, 200) for name, one in played.items()},
            "warnings": score.warnings(scores, differences),
        },
        "filter": {"episodes": {"read": 10, "kept": 9}, "decisions": {"read": 900, "deduplicate": 50, "kept": 850}},
        "split": {"train_rows": 800, "val_rows": 50, "val_seeds": 1},
        "cost": {"teachers": {"expert": _play(900)}, "judge_usd": 0.0},
        "distill": {"rounds": [], "decisions": 80, "cost_usd": 0.0},
        "benchmark/expert": _play(90),
        "benchmark/sft": _play(120),
    }
    stages = ("collect-expert", "filter", "split", "student", "sft", "agreement", "distill", "rl", "benchmark-expert")
    metrics |= {
        f"times/{stage}": {"seconds": 12.5, "cores": 2} | RAN for stage in (*stages, "benchmark_student-sft", "score")
    }
    for name, values in metrics.items():
        (folder / f"metrics/{name}.json").write_text(json.dumps(values))
    curves = {
        "sft_train": "step,loss,token_accuracy\n10,0.5,0.8\n20,0.3,0.9\n",
        "sft_val": "step,loss,token_accuracy\n20,0.35,0.88\n",
        "sft_held_out": "step,achievements,invalid_rate\n20,4.5,0.01\n",
        "distill": "round,agreement\n0,0.4\n1,0.5\n",
        "distill_train": "step,loss\n10,0.4\n20,0.3\n",
        "rl": "iteration,reward,achievements\n1,5.1,5\n2,5.4,6\n",
        "rl_training": "iteration,kl,entropy,clip_fraction\n1,0.01,0.5,0\n2,0.02,,0.01\n",
        "rl_held_out": "iteration,reward,achievements\n0,5,5\n2,6,6\n",
        "agreement": "teacher,student\ndo,do\ndo,sleep\nsleep,sleep\nnoop,invalid\n",
    }
    for name, text in curves.items():
        (folder / f"metrics/plots/{name}.csv").write_text(text)
    before = Path.cwd()
    os.chdir(folder)
    try:
        return report.gather(settings)
    finally:
        os.chdir(before)


def recorded(folder: Path, agent: str, seed: int) -> list[dict]:
    """The rows behind a replay."""
    rows = pq.read_table(folder / f"data/benchmark/{agent}.parquet").to_pylist()
    return [row for row in rows if row["seed"] == seed]


def _play(decisions: int) -> dict:
    return {"episodes": 3, "decisions": decisions, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
