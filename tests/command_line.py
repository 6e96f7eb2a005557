"""The command `apprentice`, run within the test's process: nothing is imported or compiled anew."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from apprentice.pipeline import ROOT


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(folder: Path, *arguments: str) -> Done:
    """As from a shell in that folder; stdout and stderr are no terminal."""
    from apprentice.cli import main

    out, err, before, argv = io.StringIO(), io.StringIO(), Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["apprentice", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(before)
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


def write_params(
    folder: Path, url: str = "http://127.0.0.1:9/v1", key_env: str | None = None, **teachers: dict
) -> None:
    """This checkout's params.yaml with a short benchmark, and a teacher `api` at this address beside the given ones."""
    yaml = YAML(typ="safe")
    tree = yaml.load((ROOT / "params.yaml").read_text())
    endpoint = {"base_url": url, "model": "served", "api_key_env": key_env}
    prompt = {"mode": "text"}
    tree["teachers"] = teachers | {"api": {"policy": "chat", "seeds": "0-1", "prompt": prompt, "endpoint": endpoint}}
    tree["benchmark"] |= {"protocol": "quick", "seeds": "200200-200203", "max_steps": 30}
    with (folder / "params.yaml").open("w") as file:
        yaml.dump(tree, file)
