"""RL's algorithms on the tiny student: all from the same sft adapter, as many iterations each, over several seeds.

    nice -n 10 python benchmarks/rl_algorithms.py [SEEDS] [ITERATIONS]      # after `dvc repro sft`

Runs the stage itself, with one process, in a folder of its own and a cache of its own; whatever was finished when it's
stopped is kept there (tmp/rl_algorithms) and not run again. Prints what the last adapter, not the best, gets on
held-out worlds that are the same for all, and the CPU time, which is the same but for noise: the algorithms differ in
how they credit decisions, which takes no time, and in nothing else.
"""

import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORK = ROOT / "tmp" / "rl_algorithms"
ALGORITHMS = ("return_to_go", "grpo", "gigpo", "linear", "critic")
SMALLER = {"groups": 8, "max_steps": 150, "decisions": 1536, "batch_size": 128}


def main(seeds: int = 3, iterations: int = 4) -> None:
    yaml = YAML()
    found: dict[str, list[dict]] = {}
    for seed in range(seeds):
        for algorithm in ALGORITHMS:
            folder = WORK / f"{algorithm}-{seed}-{iterations}"
            if not (folder / "done.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                for name in ("base", "sft"):
                    shutil.copytree(ROOT / "models" / name, folder / "models" / name)
                tree = yaml.load(ROOT / "params.yaml")
                rl = tree["profiles"]["tiny"]["rl"]
                rl |= SMALLER | {"advantage": algorithm, "random_seed": seed, "iterations": iterations}
                # Other worlds for another seed, so that it's another draw of everything.
                rl |= {"seeds": f"{320000 + 1000 * seed}-{320999 + 1000 * seed}"}
                rl |= {"evaluation": {"seeds": "330000-330047", "every": iterations}}
                yaml.dump(tree, folder / "params.yaml")
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(
                    [sys.executable, ROOT / "stages" / "rl.py"],
                    cwd=folder,
                    env=os.environ | {"APPRENTICE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
                    preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:]),
                    check=True,
                )
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                rows = list(csv.DictReader((folder / "metrics/plots/rl_held_out.csv").open()))
                sft, last = (float(rows[place]["achievements"]) for place in (0, -1))
                (folder / "done.json").write_text(json.dumps({"sft": sft, "last": last, "cpu": spent}))
                shutil.rmtree(folder / "cache")
            found.setdefault(algorithm, []).append(json.loads((folder / "done.json").read_text()))
            show(found)


def show(found: dict[str, list[dict]]) -> None:
    print(
        "\n| advantage | achievements, each seed | mean | less sft | CPU s a run |\n|---|---|---|---|---|", flush=True
    )
    for algorithm, runs in found.items():
        last = [run["last"] for run in runs]
        gain = statistics.mean(run["last"] - run["sft"] for run in runs)
        spent = statistics.mean(run["cpu"] for run in runs)
        each = " ".join(f"{value:.2f}" for value in last)
        print(f"| {algorithm} | {each} | {statistics.mean(last):.2f} | {gain:+.2f} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
