"""How much is learnt in how much time: the whole pipeline with other training seeds, and with other settings.

    python benchmarks/frontier.py                                    # params.yaml as it is, training seeds 0, 1, 2
    python benchmarks/frontier.py --name short --seeds 0 1 -S profiles.tiny.rl.iterations=8
    python benchmarks/frontier.py --name before --checkout FOLDER    # of another commit, on the same machine

Each run is `dvc repro` in a clone of the checkout's commit, with a cache of its own, under tmp/frontier. What is
finished is kept there and not run again. Prints every student's achievement rate on the benchmark's worlds against the
minutes of all stages up to it; the benchmark's minutes are not counted. A training seed changes the base's first
weights, the order of the rows, and all draws of play; the teacher's episodes and the worlds stay.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORK = ROOT / "tmp" / "frontier"
STAGES = {"base": "student", "sft": "sft", "distill": "distill", "rl": "rl"}
"""What makes each student; each depends on a training seed."""
DATA = ("collect", "filter", "split")
yaml = YAML()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="as it is", help="of these settings, in the table")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose code and settings are run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("-S", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as DVC's own -S")
    asked = parser.parse_args()
    for seed in asked.seeds:
        run(WORK / f"{asked.name}-{seed}".replace(" ", "_"), asked.checkout, seed, asked.settings, asked.name)
        show()


def run(folder: Path, checkout: Path, seed: int, settings: list[str], name: str) -> None:
    """`dvc repro` there, if it isn't done. Ends the program with its code where it fails."""
    if (folder / "done.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    top = folder / "checkout"
    subprocess.run(["git", "clone", "--quiet", checkout, top], check=True)
    tree = yaml.load(top / "params.yaml")
    for stage in STAGES.values():
        if stage in (of := tree["profiles"][tree["profile"]]):
            of[stage]["random_seed"] = seed
    for change in settings:
        key, value = change.split("=", 1)
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = YAML(typ="safe").load(value)
    yaml.dump(tree, top / "params.yaml")
    environment = os.environ | {"APPRENTICE_CACHE": str(folder / "cache"), "PYTHONPATH": str(top / "src")}
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=top, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    of = json.loads((top / "metrics" / "benchmark.json").read_text())
    seconds = {file.stem: json.loads(file.read_text())["seconds"] for file in (top / "metrics/times").glob("*.json")}
    rates = {agent: of[agent]["achievement_rate"] for agent in STAGES if agent in of}
    found = {"name": name, "seed": seed, "settings": settings, "rates": rates, "seconds": seconds}
    (folder / "done.json").write_text(json.dumps(found))


def show() -> None:
    """The table of all that is finished."""
    runs: dict[str, list[dict]] = {}
    for file in sorted(WORK.glob("*/done.json")):
        found = json.loads(file.read_text())
        runs.setdefault(found["name"], []).append(found)
    print("\n| settings | agent | minutes | achievement rate, each seed | mean | deviation |\n" + "|---" * 6 + "|")
    for name, each in runs.items():
        stages = list(DATA)
        for agent, own in STAGES.items():
            stages.append(own)
            rates = [100 * found["rates"][agent] for found in each if agent in found["rates"]]
            if not rates:
                continue
            minutes = statistics.mean(
                sum(took for stage, took in found["seconds"].items() if stage.partition("-")[0] in stages) / 60
                for found in each
            )
            spread = f"{statistics.stdev(rates):.1f}" if len(rates) > 1 else ""
            print(
                f"| {name} | {agent} | {minutes:.1f} | {' '.join(f'{rate:.1f}' for rate in rates)} % "
                f"| {statistics.mean(rates):.1f} % | {spread} |"
            )


if __name__ == "__main__":
    main()
