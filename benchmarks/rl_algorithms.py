"""RL's algorithms on the tiny student: all from the same sft adapter, as many iterations each, over several seeds.

    python benchmarks/rl_algorithms.py [SEEDS] [ITERATIONS]      # after `dvc repro sft`

Runs the stage itself, one for each core at a time, in a folder of its own and a cache of its own; whatever was finished
when it's stopped is kept there (tmp/rl_algorithms) and not run again. Prints what the last adapter, not the best, gets
on held-out worlds that are the same for all, and the time, which is the same but for noise: the algorithms differ in
how they credit decisions, which takes no time, and in nothing else.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORK = ROOT / "tmp" / "rl_algorithms"
ALGORITHMS = ("return_to_go", "grpo", "gigpo", "linear", "critic")
SMALLER = {"groups": 8, "decisions": 1536, "batch_size": 128, "learning_rate": 7.0e-4}


def main(seeds: int = 3, iterations: int = 5) -> None:
    cores: SimpleQueue[int] = SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def run(algorithm: str, seed: int) -> None:
        folder = WORK / f"{algorithm}-{seed}-{iterations}"
        if not (folder / "done.json").exists():
            core = cores.get()
            try:
                train(folder, algorithm, seed, iterations, core)
            finally:
                cores.put(core)  # or, after a failure, the next would wait for it
        show(iterations)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        for done in [pool.submit(run, algorithm, seed) for seed in range(seeds) for algorithm in ALGORITHMS]:
            done.result()


def train(folder: Path, algorithm: str, seed: int, iterations: int, core: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("base", "sft"):
        shutil.copytree(ROOT / "models" / name, folder / "models" / name)
    yaml = YAML()
    tree = yaml.load(ROOT / "params.yaml")
    rl = tree["profiles"]["tiny"]["rl"]
    rl |= SMALLER | {"advantage": algorithm, "random_seed": seed, "iterations": iterations}
    # Other worlds for another seed, so that it's another draw of everything.
    rl |= {"seeds": f"{320000 + 1000 * seed}-{320999 + 1000 * seed}"}
    rl |= {"evaluation": {"seeds": "330000-330063", "every": iterations}}
    yaml.dump(tree, folder / "params.yaml")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, ROOT / "stages" / "rl.py"],
            cwd=folder,
            env=os.environ | {"APPRENTICE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{folder}/log says why it failed")
    rows = list(csv.DictReader((folder / "metrics/plots/rl_held_out.csv").open()))
    sft, last = (float(rows[place]["achievements"]) for place in (0, -1))
    found = {"sft": sft, "last": last, "cpu": usage.ru_utime + usage.ru_stime}
    shutil.rmtree(folder / "cache")
    (folder / "done.json").write_text(json.dumps(found))


def show(iterations: int) -> None:
    text = "\n| advantage | achievements, each seed | mean | less sft | CPU s a run |\n|---|---|---|---|---|"
    for algorithm in ALGORITHMS:
        files = sorted(WORK.glob(f"{algorithm}-*-{iterations}/done.json"))
        if runs := [json.loads(file.read_text()) for file in files]:
            last = [run["last"] for run in runs]
            gain = statistics.mean(run["last"] - run["sft"] for run in runs)
            spent = statistics.mean(run["cpu"] for run in runs)
            each = " ".join(f"{value:.2f}" for value in last)
            text += f"\n| {algorithm} | {each} | {statistics.mean(last):.2f} | {gain:+.2f} | {spent:.0f} |"
    print(text, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
