"""`make smoke`: does the pipeline still run from end to end? Every stage, with toy settings, in a copy of the checkout.

What is in data/, models/, metrics/ and the cache here stays as it is, and no teacher behind an API is asked: the copy
has `profile: smoke`, and of teachers and benchmark what is written below. Its results mean nothing, and say so.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from small import checkout, environment

SMOKE = {
    "profile": "smoke",
    "teachers": {"expert": {"policy": "expert", "seeds": "0-3", "max_steps": 30, "explore": 0.1}},
    "imports": {},
    "judge": None,
    "filter.min_judge_score": None,
    "benchmark.protocol": "quick",
    "benchmark.seeds": "200000-200002",
    "benchmark.max_steps": 10,
    "benchmark.agents": {name: {"policy": name} for name in ("random", "expert")},
    "benchmark.students": {name: f"models/{name}" for name in ("base", "sft", "rl")},
    "benchmark.bootstrap_samples": 100,
}


def repro(folder: Path) -> Path:
    """A copy of this checkout in which `dvc repro` has run. Raises CalledProcessError if a stage fails."""
    top = checkout(folder / "checkout", SMOKE)
    (top / "compute.yaml").unlink(missing_ok=True)  # it may send stages elsewhere
    subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=top, env=environment(folder / "cache"), check=True)
    return top


def main() -> int:
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="apprentice-smoke-"))
    try:
        top = repro(folder)
    except subprocess.CalledProcessError as failed:
        print(f"\nThe stage named above failed. The copy is kept: cd {folder / 'checkout'}")
        return failed.returncode
    times = {path.stem: json.loads(path.read_text())["seconds"] for path in (top / "metrics/times").glob("*.json")}
    for stage, seconds in sorted(times.items(), key=lambda item: -item[1]):
        print(f"{seconds:6.1f} s  {stage}")
    assert json.loads((top / "metrics/summary.json").read_text())["meaningless"]
    shutil.rmtree(folder)
    print(f"green in {time.monotonic() - began:.0f} s: every stage ran. The results mean nothing, and are gone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
