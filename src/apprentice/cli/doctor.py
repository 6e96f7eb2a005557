"""`apprentice doctor`: what this machine can do for the pipeline, and what each gap prevents."""

import configparser
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from apprentice import compute, params
from apprentice.errors import ConfigError, WorkError

OK, GAP, BROKEN = "ok", "gap", "broken"
_GB = 1e9
_ON_GPUS = ("sft", "distill", "rl", "agreement", "benchmark_student")
"""The stages that have something to do for a GPU."""


@dataclass(frozen=True)
class Finding:
    what: str
    state: str
    """ok; gap: something else than `dvc repro` with these settings needs it; broken: that needs it."""
    found: str
    prevents: str = ""
    """What cannot be done without it; empty where nothing is lacking."""
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For a script: the same as JSON.")] = False) -> None:
    """What works on this machine, and what each gap prevents. Exit code 1 if dvc repro could not run as configured.

    Example: apprentice doctor
    """
    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("", "", "found", box=None, show_header=False)
        for finding in findings:
            table.add_row({OK: "✓", GAP: "·", BROKEN: "✗"}[finding.state], finding.what, finding.found)
        console = Console(highlight=False, markup=False)
        console.print(table)
        for finding in findings:
            if finding.state != OK:
                console.print(f"\n{finding.what}: prevents {finding.prevents}. {finding.remedy}")
    if any(finding.state == BROKEN for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """All findings, in the order of their weight."""
    yield Finding("Python", OK, ".".join(map(str, sys.version_info[:3])))
    yield _packages()
    yield from _configuration()
    yield from _machine()
    yield _gpu()
    yield from _student()
    yield from _keys()
    yield _vllm()
    yield _skypilot()
    yield from _remotes()
    yield _film()


def _packages() -> Finding:
    lock = Path("requirements.lock")
    if not lock.is_file():
        return Finding("packages", GAP, "no requirements.lock here", "to say if they are the right ones", _TOP)
    pins = dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line and line[0] != "#")
    other = []
    for name, version in pins.items():
        try:
            # A build for the CPU says so behind a plus.
            if importlib.metadata.version(name).partition("+")[0] != version.partition("+")[0]:
                other.append(name)
        except importlib.metadata.PackageNotFoundError:
            other.append(name)
    if not other:
        return Finding("packages", OK, f"{len(pins)} as in requirements.lock")
    names = ", ".join(other[:5]) + (", …" if len(other) > 5 else "")
    found = f"{len(other)} of {len(pins)} not as in requirements.lock: {names}"
    return Finding("packages", GAP, found, "the same results as elsewhere", "Run make setup.")


_TOP = "Run it from the top of the checkout."


def _configuration() -> Iterator[Finding]:
    for what, load in (("params.yaml", params.load), ("compute.yaml", compute.load)):
        try:
            load()
            yield Finding(what, OK, "valid")
        except ConfigError as error:
            yield Finding(what, BROKEN, str(error), "dvc repro", "Correct it." if Path(what).is_file() else _TOP)
    lacking = [name for name in ("git", "make") if not shutil.which(name)]
    if not Path(".git").exists() or not Path(".dvc").is_dir():
        yield Finding("checkout", BROKEN, "not a repository of git and DVC", "dvc repro", _TOP)
    elif lacking:
        remedy = f"Install {' and '.join(lacking)}."
        yield Finding("checkout", GAP, f"no {', '.join(lacking)}", "make repro, dvc exp, launch", remedy)
    else:
        yield Finding("checkout", OK, "git and DVC")


def _machine() -> Iterator[Finding]:
    import psutil

    from apprentice.cache import cache_folder
    from apprentice.workers import cores

    count = cores()
    found = f"{count}"
    yield (
        Finding("cores", OK, found)
        if count > 1
        else Finding(
            "cores", GAP, found, "the times that README names", "Take a machine with more of them, or have patience."
        )
    )
    memory = psutil.virtual_memory()
    found = f"{memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB free"
    yield (
        Finding("memory", OK, found)
        if memory.available > 4 * _GB
        else Finding(
            "memory",
            GAP,
            found,
            "training even of the tiny student (4 GB)",
            "Close something, or take a larger machine.",
        )
    )
    folders = {"disk here": Path.cwd(), "disk of the cache": cache_folder()}
    for what, folder in folders.items():
        place = folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        found = f"{free / _GB:.1f} GB free for {folder}"
        if not os.access(place, os.W_OK):
            yield Finding(what, BROKEN, f"{folder} cannot be written", "dvc repro", _ELSEWHERE)
        elif free < 5 * _GB:
            yield Finding(what, GAP, found, "larger runs: the tiny profile takes 2 GB", _ELSEWHERE)
        else:
            yield Finding(what, OK, found)


_ELSEWHERE = "Make room; APPRENTICE_CACHE names another folder for the cache."


def _gpu() -> Finding:
    import torch

    from apprentice import gpus

    try:
        count = gpus.check()
    except WorkError as error:
        remedy = "Update the driver; until then CUDA_VISIBLE_DEVICES= hides the GPUs, and the processor computes."
        return Finding("GPU", BROKEN, str(error), f"student, {', '.join(_ON_GPUS)}", remedy)
    if count and gpus.rehearsed():
        return Finding("GPU", GAP, f"{count}, rehearsed", "to compute on them", f"Unset {gpus.REHEARSAL}.")
    if count:
        names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(count)}))
        memory = torch.cuda.get_device_properties(0).total_memory / _GB
        return Finding("GPU", OK, f"{count} × {names}, {memory:.0f} GB")
    why = "none"
    if shutil.which("nvidia-smi"):
        why = "none that torch can use, but there is nvidia-smi: see whether torch is a CPU build"
    elsewhere = "Let the training stages run elsewhere: where: sky in compute.yaml."
    here = [stage for stage in _ON_GPUS if not _elsewhere(stage)]
    if here and (student := _of_the_hub()):
        return Finding("GPU", BROKEN, why, f"{', '.join(here)} of {student.model}, which needs them", elsewhere)
    return Finding("GPU", GAP, why, "the larger profiles (qwen2b and up) in reasonable time", elsewhere)


def _elsewhere(stage: str) -> bool:
    try:
        return compute.runs_elsewhere(stage)
    except ConfigError:  # said above
        return False


def _of_the_hub() -> params.HubStudent | None:
    """The student, if it is made of a model of the hub."""
    try:
        student = params.load().active.student
    except ConfigError:  # said above
        return None
    return student if isinstance(student, params.HubStudent) else None


def _student() -> Iterator[Finding]:
    """Whether the hub has the student's model for this machine."""
    student = _of_the_hub()
    if not student or Path("models/base/config.json").exists():
        return
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    what, model = "student", student.model
    try:
        HfApi().model_info(model, revision=student.revision, timeout=5)
        yield Finding(what, OK, f"the hub has {model}")
    except (HTTPError, OSError) as error:
        found = f"the hub does not give {model} at {student.revision} ({type(error).__name__})"
        remedy = "HF_ENDPOINT names a mirror, HF_TOKEN holds the key for a gated model."
        yield Finding(what, BROKEN, found, "student, and what depends on it", remedy)


def _keys() -> Iterator[Finding]:
    """Whether the variables that the settings name are set; never what is in them."""
    wanted: dict[str, list[str]] = {}
    try:
        settings = params.load()
    except ConfigError:
        settings = None
    if settings:
        players = {f"teachers.{name}": player for name, player in settings.teachers.items()}
        players |= {f"benchmark.agents.{name}": player for name, player in settings.benchmark.agents.items()}
        endpoints = {name: player.endpoint for name, player in players.items() if player.endpoint}
        if settings.judge:
            endpoints["judge"] = settings.judge.endpoint
        for name, endpoint in endpoints.items():
            if endpoint.api_key_env:
                wanted.setdefault(endpoint.api_key_env, []).append(name)
    for variable, users in wanted.items():
        if os.environ.get(variable, "").strip():
            yield Finding(variable, OK, f"set, for {', '.join(users)}")
        else:
            yield Finding(variable, BROKEN, "not set", ", ".join(users), f"export {variable}=…")
    others = {
        "OPENAI_API_KEY": "a teacher or judge of OpenAI's",
        "HF_TOKEN": "a gated model as the student, and uploads to the hub",
    }
    for variable, prevents in others.items():
        if variable not in wanted:
            if os.environ.get(variable, "").strip():
                yield Finding(variable, OK, "set")
            else:
                yield Finding(variable, GAP, "not set, and not needed by params.yaml", prevents, f"export {variable}=…")


def _vllm() -> Finding:
    from apprentice.serving import vllm

    try:
        settings = compute.load().vllm
    except ConfigError:  # said above
        settings = compute.Vllm()
    if found := vllm.program(settings):
        return Finding("vLLM", OK, found)
    remedy = "With GPUs, install requirements-gpu.lock; on a CPU, make vllm; or name it in APPRENTICE_VLLM."
    prevents = "fast play of the student in RL and benchmark; it plays in process"
    looked = ", ".join(map(str, vllm.places(settings)))
    return Finding("vLLM", GAP, f"not at {looked}", prevents, remedy)


def _skypilot() -> Finding:
    places = [".venv-sky/bin/sky", shutil.which("sky") or ""]
    for place in filter(None, places):
        if Path(place).is_file():
            return Finding("SkyPilot", OK, f"{place} ({place} check says which clouds it may use)")
    remedy = "Run make sky, then .venv-sky/bin/sky check."
    return Finding(
        "SkyPilot", GAP, "not set up", "stages on machines elsewhere (where: sky), apprentice launch", remedy
    )


def _remotes() -> Iterator[Finding]:
    """DVC's remotes on S3: whether there are credentials and the bucket answers."""
    config = configparser.ConfigParser()
    config.read([".dvc/config", ".dvc/config.local"])
    found = {name[len("'remote \"") : -2]: dict(config[name]) for name in config.sections() if "remote" in name}
    remotes = {name: remote for name, remote in found.items() if remote.get("url", "").startswith("s3://")}
    if not remotes:
        remedy = "dvc remote add --default storage s3://BUCKET/PATH"
        yield Finding("S3", GAP, "no DVC remote on S3", "dvc push and pull, and stages elsewhere", remedy)
    for name, remote in remotes.items():
        yield _bucket(f"S3 ({name})", remote)


def _bucket(what: str, remote: dict[str, str]) -> Finding:
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = remote["url"].removeprefix("s3://").partition("/")[0]
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # it would be looked for, for seconds
    session = botocore.session.Session(profile=remote.get("profile"))
    prevents = "dvc push and pull, and stages elsewhere"
    patience = Config(connect_timeout=3, read_timeout=5, retries={"max_attempts": 0})
    try:
        client = session.create_client(
            "s3",
            region_name=remote.get("region") or session.get_config_variable("region") or "us-east-1",
            endpoint_url=remote.get("endpointurl"),
            aws_access_key_id=remote.get("access_key_id"),
            aws_secret_access_key=remote.get("secret_access_key"),
            config=patience,
        )
        client.head_bucket(Bucket=bucket)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        why = {403: "the credentials may not read it", 404: "there is no such bucket"}.get(status, f"HTTP {status}")
        return Finding(what, GAP, f"{bucket}: {why}", prevents, "Correct the remote, or the credentials.")
    except (BotoCoreError, ValueError) as error:
        known = type(error).__name__
        why = "no credentials" if known == "NoCredentialsError" else f"no answer ({known})"
        remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the remote's endpointurl."
        return Finding(what, GAP, f"{bucket}: {why}", prevents, remedy)
    return Finding(what, OK, f"{bucket} answers")


def _film() -> Finding:
    import imageio_ffmpeg

    try:
        return Finding("ffmpeg", OK, Path(imageio_ffmpeg.get_ffmpeg_exe()).name)
    except RuntimeError:
        remedy = "Run make setup, or put an ffmpeg on the PATH."
        return Finding("ffmpeg", GAP, "none", "apprentice play --mp4", remedy)
