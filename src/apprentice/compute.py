"""compute.yaml as a checked tree: where stages run, and on what. It changes no result: nothing depends on it."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from apprentice.errors import ConfigError
from apprentice.schema import Section, checked, parsed

PATH = Path("compute.yaml")

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""The name of an environment variable."""


def _server(value: str) -> str:
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.path.strip("/"):
        raise ValueError("is not a server's address; write for example http://127.0.0.1:8000")
    return value.rstrip("/")


class Candidate(Section):
    """One of the places where SkyPilot may find a machine; it takes the cheapest that has one."""

    infra: Annotated[str, Field(min_length=1)]
    """A cloud, Kubernetes or Slurm, narrower if you like: nebius, aws/us-east-1, k8s/my-context, slurm/my-cluster."""
    use_spot: bool = False
    """A cheaper machine that may be taken away; not on Slurm."""
    instance_type: str | None = None
    image_id: str | None = None
    """A machine image, or a container (docker:name) where the place runs those."""


class Stage(Section):
    """Where a stage runs, and on what."""

    where: Literal["here", "sky"] = "here"
    """On this machine, or on one that SkyPilot finds; the rest is for sky only."""
    accelerators: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+(:[1-9][0-9]*)?$")] | None = None
    """H200:4 are four of them; null is none."""
    cpus: Annotated[str, Field(pattern=r"^[0-9]+\+?$")] | None = None
    """8 or 8+; null leaves it to SkyPilot."""
    memory: Annotated[str, Field(pattern=r"^[0-9]+\+?$")] | None = None
    """GB, 64 or 64+."""
    any_of: Annotated[tuple[Candidate, ...], Field(strict=False)] | None = None
    """Null is any cloud that you have enabled."""
    disk_size: PositiveInt | None = 256
    """GB; null leaves it to SkyPilot."""
    teardown: bool = True
    """Take the machine down when the outputs are here; otherwise it waits for autostop_minutes, ready for a rerun."""
    machine: Annotated[str, Field(pattern=r"^[a-z0-9]{1,20}$")] | None = None
    """Stages that have the same word here share a machine, one after the other. It's taken down after autostop_minutes
    without work, whatever teardown says. Null is a machine for each."""
    autostop_minutes: PositiveInt = 60
    """A machine without work for so long is taken down by itself: also when nobody has fetched what it made. Then that
    is lost, except for what transfer: remote or checkpoints have brought to safety."""
    environment: dict[Variable, str | None] = Field(default_factory=dict)
    """Variables for the stage; null takes the value they have here."""
    secrets: Annotated[tuple[Variable, ...], Field(strict=False)] = ()
    """Names of variables whose values are taken from here and written nowhere."""
    max_hourly_usd: PositiveFloat | None = None
    """A machine that costs more an hour is not started."""
    max_total_usd: PositiveFloat | None = None
    """What all tries at the same work may cost together. A run that would pass it is stopped, and its checkpoints are
    brought here or to `checkpoints`: raised, it goes on from the last."""
    lock: Annotated[str, Field(min_length=1)] = "requirements-gpu.lock"
    """The pinned packages of the machine."""
    transfer: Literal["rsync", "remote"] = "rsync"
    """How inputs and outputs travel: between here and there, or through DVC's default remote."""
    download_base: bool = True
    """The machine downloads a hub's student itself; false sends models/base, where the machine can't reach the hub."""
    checkpoints: str | None = None
    """Where checkpoints and played episodes are kept for a rerun as they come, a file for each whole checkpoint: a
    bucket (s3://bucket/folder; not on RunPod, which cannot mount one), a folder that all machines share
    (/shared/folder), or null: on the machine's own disk, from where they are brought here when the stage has ended
    otherwise than well. Null loses them when the machine is taken away."""
    dirty: bool = False
    """Send what is in no commit, too; otherwise that's an error."""
    managed: bool = False
    """Run as a managed job, which SkyPilot starts again when a spot machine is taken away."""

    @property
    def cards(self) -> tuple[str | None, int]:
        """The kind of its GPUs, None without any, and how many they are."""
        kind, _, number = (self.accelerators or "").partition(":")
        return (kind, int(number or 1)) if kind else (None, 0)

    @model_validator(mode="after")
    def _possible(self):
        if self.any_of == ():
            raise ValueError("any_of is empty: name at least one place, or write null for every one you have enabled")
        if twice := set(self.environment) & set(self.secrets):
            raise ValueError(f"{', '.join(sorted(twice))} stands under both environment and secrets; choose one")
        if self.checkpoints is not None and not (self.checkpoints.startswith("/") or "://" in self.checkpoints):
            raise ValueError(
                f"checkpoints ({self.checkpoints}) is neither a bucket (s3://bucket/folder) nor a folder (/folder)"
            )
        if self.managed and self.transfer != "remote":
            raise ValueError(
                "managed needs transfer: remote, since SkyPilot takes the machine of a managed job down by itself"
            )
        if self.managed and self.checkpoints is None:
            raise ValueError("managed needs checkpoints, or a recovered job would begin anew")
        if self.managed and self.machine:
            raise ValueError("managed jobs have machines of their own: remove machine, or managed")
        runpod = any(candidate.infra.lower().startswith("runpod") for candidate in self.any_of or ())
        if runpod and "://" in (self.checkpoints or ""):
            raise ValueError(
                f"RunPod cannot mount the bucket {self.checkpoints}: remove it from any_of, or write checkpoints: "
                "null, which brings them here when the stage ends"
            )
        for candidate in self.any_of or ():
            if candidate.use_spot and candidate.infra.startswith("slurm"):
                raise ValueError("any_of: Slurm has no spot machines; remove use_spot there")
        return self


class Vllm(Section):
    """What the student plays on, in rl's rollouts and in the benchmark."""

    use: Literal["auto", "always", "never"] = "auto"
    """auto: vLLM where there are GPUs and it is installed, this program's own process elsewhere."""
    endpoints: Annotated[tuple[Annotated[str, AfterValidator(_server)], ...], Field(strict=False)] = ()
    """vLLM servers that run already, as http://127.0.0.1:8000; they have to be started with the flags that vllm.py
    gives its own, and read adapters from the same folders as this machine."""
    gpus: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] | None = None
    """The GPUs (0 is the first) that are for servers alone: rl trains on the others. Null: all, and in rl the servers
    sleep while it trains."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one server, which holds a part of the model on each. There are as many servers as the GPUs allow."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a GPU's memory that a server takes (--gpu-memory-utilization); null is 0.85, or 0.45 where it takes
    turns with a trainer, which keeps its own beside it."""
    max_model_len: PositiveInt = 4096
    """Tokens of a prompt and its reply at most; a longer prompt is refused, which ends the stage. Those of qwen2b have
    about 1,400."""
    prefix_caching: bool = True
    """Keep what was computed of a prompt for the next that begins alike."""
    cuda_graphs: bool = True
    """Replay recorded steps on a GPU: faster to play, a minute more to start. false is vLLM's --enforce-eager."""
    environment: dict[Variable, str] = Field(default_factory=dict)
    """Variables of the servers. VLLM_USE_V2_MODEL_RUNNER: "0" takes vLLM's older Model Runner V1, should the newer one
    be wrong; rl says so when a server's log-probabilities are not the trainer's."""
    program: Annotated[str, Field(min_length=1)] | None = None
    """Where vLLM is, for example /opt/vllm/bin/vllm; null looks at APPRENTICE_VLLM, beside this Python, and in
    .venv-vllm."""
    start_timeout: PositiveFloat = 900.0
    """Seconds that a server may take to start."""


class Compute(Section):
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "wandb"], ...], Field(strict=False)] = ()
    """Where sft, distill and rl log to as well, each by a package that has to be installed; TensorBoard reads runs/."""
    vllm: Vllm = Vllm()
    stages: dict[Literal["student", "sft", "distill", "rl", "agreement", "benchmark_student"], Stage] = Field(
        default_factory=dict
    )
    """Those that have something to do for a GPU; one that isn't named runs here."""


def load(path: Path | None = None) -> Compute:
    """Read and check compute.yaml; without it, everything runs here. Raises ConfigError naming the key."""
    path = path or PATH
    return checked(path, (parsed(path) or {}) if path.exists() else {}, Compute)


def reporters() -> list[str]:
    """report_to. Raises ConfigError for one whose package isn't installed."""
    found: list[str] = list(load().report_to)
    for name in found:
        if not find_spec(name):
            raise ConfigError(f"{PATH}: report_to: {name} is not installed; run: pip install {name}")
    return found


def runs_elsewhere(stage: str) -> bool:
    """Whether compute.yaml sends this stage to SkyPilot; never from the machine that SkyPilot has found."""
    if "APPRENTICE_HERE" in os.environ:
        return False
    found = load().stages.get(stage)
    return found is not None and found.where == "sky"
