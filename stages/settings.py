"""settings: what params.yaml comes to; data/settings has a file for whatever a stage uses of it.

    dvc repro settings        or: python stages/settings.py

Defaults, and what a profile has from those it extends, are filled in; what follows from other settings, such as the
benchmark's steps, stands there too. Stages depend on these files: a default that changes reruns who uses it, and an
edit of the checks in params.py reruns nothing else. They read params.yaml itself, so that they run alone too.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.files import replacing
from apprentice.stage import run

OUT = Path("data/settings")


def main() -> None:
    """Write data/settings."""
    settings = params.load()
    with replacing(OUT) as folder:
        for name, value in sorted(parts(settings).items()):
            path = folder / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    print(f"settings: {OUT}, of the profile {settings.profile}")
    for what in settings.departures:
        print(f"note: not by BALROG's rules: {what}")


def parts(settings: params.Params) -> dict[str, Any]:
    """File → what is in it."""
    whole, profile = settings.model_dump(mode="json"), settings.active.model_dump(mode="json")
    benchmark = settings.benchmark
    return {
        **{name: whole[name] for name in ("filter", "split", "judge")},
        **{f"student/{name}": value for name, value in profile.items()},
        **{f"teachers/{name}": value for name, value in whole["teachers"].items()},
        **{f"imports/{name}": value for name, value in whole["imports"].items()},
        **{f"agents/{name}": value for name, value in whole["benchmark"]["agents"].items()},
        "benchmark/seeds": benchmark.seeds,
        "benchmark/rules": {"steps": benchmark.steps, "opening": benchmark.opening},
        "benchmark/compared": {
            "names": benchmark.names,
            "bootstrap_samples": benchmark.bootstrap_samples,
            "departures": settings.departures,
            "toy": settings.active.toy,
        },
        "held_out": settings.held_out,
        "student/answers": {"max_tokens": settings.active.sampling.max_tokens},
        # Without play, how it's played does not shape sft.
        "student/held_out_play": {name: profile[name] for name in ("prompt", "sampling")}
        if settings.active.sft.evaluation
        else None,
        "sources": [*whole["teachers"], *whole["imports"]],
    }


if __name__ == "__main__":
    run(main, timed=False)  # its time would make the report out of date at every edit
