"""How well random, noop and the expert play at 200, 2,000 and 10,000 steps: python benchmarks/teachers.py [EPISODES]

Runs the stages benchmark and score themselves, in a folder of its own, on worlds that the expert was not tuned on.
Prints Markdown.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

TOP = Path(__file__).resolve().parents[1]
AGENTS = ["random", "noop", "expert"]
CAPS = (200, 2_000, 10_000)


def main(episodes: int = 100) -> None:
    found = {cap: scores(cap, episodes) for cap in CAPS}
    columns = [(cap, agent) for cap in CAPS for agent in AGENTS]
    print("| " + " | ".join(["", *(f"{agent}, {cap:,}" for cap, agent in columns)]) + " |")
    print("|---" * (len(columns) + 1) + "|")

    def row(name: str, value) -> None:
        print("| " + " | ".join([name, *(value(found[cap][agent]) for cap, agent in columns)]) + " |")

    row("episodes", lambda of: str(of["episodes"]))
    row("achievements", lambda of: f"{22 * of['achievement_rate']:.2f}")
    row("Crafter score", lambda of: f"{of['crafter_score']:.1f}")
    row("reward", lambda of: f"{of['reward']:.2f}")
    row("steps", lambda of: f"{of['steps_mean']:.0f}")
    for name in found[CAPS[0]]["noop"]["achievements"]:
        row(name, lambda of, name=name: f"{of['achievements'][name]:.0%}")


def scores(cap: int, episodes: int) -> dict:
    """metrics/benchmark.json for episodes of at most this many steps."""
    yaml = YAML(typ="safe")
    tree = yaml.load((TOP / "params.yaml").read_text())
    tree["benchmark"] = {"seeds": f"200000-{200_000 + episodes - 1}", "max_steps": cap}
    tree["benchmark"]["agents"] = {name: {"policy": name} for name in AGENTS}
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "params.yaml").open("w") as file:
            yaml.dump(tree, file)
        for stage in (*(["benchmark.py", name] for name in AGENTS), ["score.py"]):
            command = [sys.executable, TOP / "stages" / stage[0], *stage[1:]]
            subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        return json.loads((Path(folder) / "metrics/benchmark.json").read_text())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
