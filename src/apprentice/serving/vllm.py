"""vLLM as child processes: started, waited for, restarted once, fed with adapters, and never left behind."""

import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np

from apprentice.cache import cache_folder
from apprentice.compute import Vllm
from apprentice.errors import ConfigError, WorkError
from apprentice.files import digest
from apprentice.params import MOST_SCALE
from apprentice.student.template import TEMPLATE
from apprentice.world import png
from apprentice.world.observation import SIZE

_PIXELS = (MOST_SCALE * SIZE) ** 2
"""Of the largest picture of a prompt. What Qwen calls edges are numbers of pixels."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM's kernels are made for."""
ENDED = ".ended"
"""The file beside a server's log that says that it will not be started again; every rank looks for it."""
ASLEEP = ".asleep"
"""The file beside a server's log that says that it sleeps: if it ends, it's not started before it's to wake."""
_VARIABLES = {
    "PYTHONPATH": str(Path(__file__).parent / "vllm_processes"),
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_SERVER_DEV_MODE": "1",  # for /sleep and /wake_up
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
}
_ON_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # Compiling the few functions that vLLM compiles however eager it is takes a minute, for nothing at this size.
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder under the name that servers know it by."""

    folder: str
    name: str

    @classmethod
    def of(cls, folder: Path) -> "Adapter":
        """Named after its weights: vLLM's prefix cache is keyed by the name.

        Under a name that stood for other weights before, old prefixes would be taken for those of the new ones.
        """
        return cls(str(folder.resolve()), f"adapter-{digest(folder / 'adapter_model.safetensors')[:16]}")


@dataclass(frozen=True)
class Server:
    """A running vLLM server."""

    url: str
    """Without /v1."""
    log: str | None = None
    """Of a server that this program has started."""
    timeout: float = 60.0
    """Seconds within which it is to be ready, after it was started or started again."""

    def ready(self, adapter: Adapter | None = None) -> None:
        """Wait until the server answers and knows the adapter. Raises WorkError when it won't."""
        deadline = time.monotonic() + self.timeout
        while not self._has(adapter):
            if self.log and Path(self.log + ENDED).exists():
                raise WorkError(f"vLLM has ended{self.last_words()}")
            if time.monotonic() > deadline:
                raise WorkError(f"{self.url} is not ready after {self.timeout:.0f} s{self.last_words()}")
            time.sleep(0.2)

    def _has(self, adapter: Adapter | None) -> bool:
        """Whether it answers, and has loaded the adapter; it may be about to end."""
        try:
            if httpx2.get(f"{self.url}/health", timeout=5.0).status_code != 200:
                return False
            if adapter and adapter.name not in self.adapters():
                body = {"lora_name": adapter.name, "lora_path": adapter.folder}
                said = httpx2.post(f"{self.url}/v1/load_lora_adapter", json=body, timeout=self.timeout)
                # Another process may have been first.
                if said.status_code != 200 and adapter.name not in self.adapters():
                    raise WorkError(f"{self.url} does not load {adapter.folder}: {said.text[:500]}{self.last_words()}")
        except httpx2.HTTPError:
            return False
        return True

    def adapters(self) -> list[str]:
        """The names of those that are loaded."""
        models = httpx2.get(f"{self.url}/v1/models", timeout=self.timeout).json()["data"]
        return [model["id"] for model in models if model["parent"]]

    def unload(self, name: str) -> None:
        """Forget an adapter; a server that has ended has forgotten it."""
        with suppress(httpx2.HTTPError):
            httpx2.post(f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=self.timeout)

    def reload(self, adapter: Adapter) -> None:
        """Load an adapter anew, and forget what was computed with it."""
        self.unload(adapter.name)
        with suppress(httpx2.HTTPError):
            for cache in ("prefix", "encoder"):
                httpx2.post(f"{self.url}/reset_{cache}_cache", timeout=self.timeout)
        self.ready(adapter)

    def sleep(self) -> None:
        """Give the GPU's memory back; what is in it is kept in the host's.

        One that has ended meanwhile is started first, so that it's asleep afterwards in any case. Raises WorkError
        when it won't.
        """
        for _ in range(2):
            self.asleep.touch()
            with suppress(httpx2.HTTPError):
                httpx2.post(f"{self.url}/sleep?level=1", timeout=self.timeout).raise_for_status()
                return
            self.asleep.unlink(missing_ok=True)
            self.ready()
        raise WorkError(f"{self.url} does not go to sleep{self.last_words()}")

    def wake(self) -> None:
        """Take the GPU's memory again; one that has ended in its sleep is started. Raises WorkError when it won't."""
        self.asleep.unlink(missing_ok=True)
        with suppress(httpx2.HTTPError):
            httpx2.post(f"{self.url}/wake_up", timeout=self.timeout).raise_for_status()
        self.ready()

    @property
    def asleep(self) -> Path:
        """The file that is there while it sleeps."""
        assert self.log, "only servers that this program has started take turns with a trainer"
        return Path(self.log + ASLEEP)

    def last_words(self) -> str:
        """The end of its log, for an error message."""
        if self.log is None or not Path(self.log).exists():
            return ""
        lines = Path(self.log).read_text(errors="replace").splitlines()[-20:]
        return "; the last lines of its log:\n" + "\n".join(f"  {line[:300]}" for line in lines)


@dataclass(frozen=True)
class Plan:
    """Which GPUs the student plays on and which train."""

    replicas: tuple[str | None, ...]
    """The GPUs of each server, as CUDA_VISIBLE_DEVICES has them, None on a machine without; no server at all is in
    process."""
    training: tuple[str, ...] | None = None
    """GPUs left to the trainer where the servers have theirs to themselves; None are all there are."""
    sleeps: bool = False
    """Servers and trainer take turns on the same GPUs."""


def plan(settings: Vllm, here: list[str], training: bool) -> Plan:
    """Where the student is to play. here: the machine's GPUs. Raises ConfigError on what cannot be."""
    if settings.use == "never" or (settings.use == "auto" and not (here and program(settings))):
        return Plan(())
    if settings.endpoints:
        return Plan((None,) * len(settings.endpoints))
    if not program(settings):
        raise ConfigError(
            f"compute.yaml: vllm.use is {settings.use!r} but there is no vLLM: install requirements-gpu.lock "
            "(or on a CPU: make vllm), or name the program as vllm.program or in APPRENTICE_VLLM"
        )
    if settings.gpus is None:
        return Plan(_replicas(here, settings) or (None,), sleeps=training and bool(here))
    if missing := [number for number in settings.gpus if number >= len(here)]:
        raise ConfigError(f"compute.yaml: vllm.gpus names {missing}, and this machine has {len(here)} GPUs")
    own = [here[number] for number in settings.gpus]
    rest = tuple(name for name in here if name not in own)
    if training and not rest:
        raise ConfigError("compute.yaml: vllm.gpus leaves no GPU to train on; name fewer, or null to take turns")
    return Plan(_replicas(own, settings), rest if training else None)


def _replicas(gpus: Sequence[str], settings: Vllm) -> tuple[str, ...]:
    """The GPUs of each server. Raises ConfigError where some would be left over."""
    each = settings.tensor_parallel_size
    if len(gpus) % each:
        raise ConfigError(
            f"compute.yaml: vllm.tensor_parallel_size is {each}, and {len(gpus)} GPUs are no multiple of it; name as "
            "many as are under vllm.gpus, or write 1"
        )
    return tuple(",".join(gpus[first : first + each]) for first in range(0, len(gpus), each))


def program(settings: Vllm) -> str | None:
    """The `vllm` program: as configured, beside this Python, or of the environment that `make vllm` sets up."""
    return next((str(place.absolute()) for place in places(settings) if place.is_file()), None)


def places(settings: Vllm) -> list[Path]:
    """Where the `vllm` program is looked for."""
    named = settings.program or os.environ.get("APPRENTICE_VLLM")
    return [Path(named)] if named else [Path(sys.executable).parent / "vllm", Path(".venv-vllm/bin/vllm")]


def command(settings: Vllm, base: Path, url: str, dtype: str, rank: int, on_gpu: bool, sleeps: bool) -> list[str]:
    """How a server is started. rank: the adapters' highest. sleeps: it takes turns with a trainer."""
    host, port = url.removeprefix("http://").split(":")
    flags = {
        **{"--host": host, "--port": port, "--served-model-name": "base", "--dtype": dtype.replace("mixed", "float32")},
        "--max-model-len": settings.max_model_len,
        "--limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
        **_pictures(base),
        "--tool-call-parser": "hermes",
        # Our template, and none of the sampling settings that a model comes with.
        **{"--chat-template": TEMPLATE, "--generation-config": "vllm"},
        # The rank, two adapters (this policy and the one before it).
        **{"--max-lora-rank": next(size for size in _RANKS if size >= rank), "--max-loras": 2},
        # Of what was drawn from: after temperature and banned tokens.
        **{"--logprobs-mode": "processed_logprobs", "--max-logprobs": -1},
    }
    if on_gpu:
        flags["--gpu-memory-utilization"] = settings.gpu_memory or (0.45 if sleeps else 0.85)
        flags["--tensor-parallel-size"] = settings.tensor_parallel_size
    # Without the connector's flag, vLLM ignores an adapter's weights in the vision tower and says nothing.
    switches = ["--enable-auto-tool-choice", "--enable-lora", "--enable-tower-connector-lora"]
    # A step that ends within a picture's tokens is where deepstack models have been wrong.
    switches += ["--disable-chunked-mm-input"]
    switches += ["--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching"]
    switches += ["--enable-sleep-mode"] if sleeps else []
    switches += [] if on_gpu and settings.cuda_graphs else ["--enforce-eager"]
    # On a CPU a prompt that is read in two steps ends the engine, if its request has a seed.
    switches += [] if on_gpu else ["--no-enable-chunked-prefill"]
    switches += ["--disable-uvicorn-access-log"]
    flat = [str(part) for pair in flags.items() for part in pair]
    return [str(program(settings)), "serve", str(base), *flat, *switches]


def _pictures(base: Path) -> dict[str, str]:
    """The flag by which a server is ready for pictures as large as a prompt shows them, and no larger.

    Qwen3-VL takes up to 16,384 tokens a picture, and vLLM neither has steps that long on an H100, nor would it have
    memory to spare for them. Which pictures it takes stands in one of two files: transformers writes the first, the hub
    has the other.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (base / name).exists():
            found = json.loads((base / name).read_text())
            size = found.get("image_processor", found).get("size", {})
            if size.get("longest_edge", 0) > _PIXELS:
                bounded = {"shortest_edge": size["shortest_edge"], "longest_edge": _PIXELS}
                return {"--mm-processor-kwargs": json.dumps({"size": bounded})}
    return {}


class Servers:
    """The servers of a plan, running within a `with`. One that ends by itself is started again, once."""

    def __init__(self, plan: Plan, settings: Vllm, base: Path, dtype: str, adapters: Sequence[Path], rank: int = 8):
        """adapters: whose ranks the servers have to be ready for. rank: of those that are yet to be made."""
        self._plan, self._settings, self._base, self._dtype = plan, settings, base, dtype
        ranks = (json.loads((folder / "adapter_config.json").read_text())["r"] for folder in adapters)
        self._rank = max([rank, *ranks])
        self._guards: list[threading.Thread] = []
        self._children: dict[Server, subprocess.Popen] = {}
        self._changing = threading.Lock()
        self._running = self._ending = False
        self._folder = None
        self.servers: tuple[Server, ...] = tuple(Server(url) for url in settings.endpoints if plan.replicas)
        """Their addresses, known before they run."""
        if plan.replicas and not self.servers:
            self._folder = cache_folder() / "serve" / secrets.token_hex(8)
            self.servers = tuple(
                Server(f"http://127.0.0.1:{port}", str(self._folder / f"{number}.log"), settings.start_timeout)
                for number, port in enumerate(_free_ports(len(plan.replicas)))
            )

    def __enter__(self) -> "Servers":
        if self._folder:
            self._folder.mkdir(parents=True)
        try:
            for server, gpu in zip(self.servers, self._plan.replicas, strict=True):
                if server.log:
                    self._guards.append(threading.Thread(target=self._guard, args=(server, gpu), daemon=True))
                    self._guards[-1].start()
            for server in self.servers:
                server.ready()
                _warm_up(server)
            self._running = True
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind, *_) -> None:
        self._end()
        if kind is None and self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        with self._changing:
            self._ending = True
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
        for guard in self._guards:
            guard.join()

    def _guard(self, server: Server, gpu: str | None) -> None:
        """Run a server until all is to end; the kernel would end it with the thread that has started it."""
        for again in (True, False):
            with self._changing:
                if self._ending:
                    return
                child = self._children[server] = self._start(server, gpu)
            code = child.wait()
            if self._ending:
                return
            again &= self._running  # one that has never run would not now
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            print(f"{server.url}: vLLM has ended ({how}){'; starting it again' if again else ''}", file=sys.stderr)
            if not again:
                break
            while server.asleep.exists() and not self._ending:  # the trainer has the memory
                time.sleep(0.2)
        Path(server.log + ENDED).touch()

    def _start(self, server: Server, gpu: str | None) -> subprocess.Popen:
        arguments = command(
            self._settings, self._base, server.url, self._dtype, self._rank, gpu is not None, self._plan.sleeps
        )
        variables = _VARIABLES | (_ON_CPU if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with open(server.log, "ab") as log:
            return subprocess.Popen(
                arguments,
                env=os.environ | variables | self._settings.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for this program, which then ends it
            )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _warm_up(server: Server) -> None:
    """The first requests compile and allocate; after these two it answers at its speed."""
    picture = base64.b64encode(png.encode(np.zeros((SIZE, SIZE, 3), np.uint8))).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "ready?"},
    ]
    body = {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "logprobs": True}
    for temperature in (0.0, 1.0):
        said = httpx2.post(
            f"{server.url}/v1/chat/completions", json=body | {"temperature": temperature}, timeout=server.timeout
        )
        if said.status_code != 200:
            raise WorkError(f"{server.url} does not answer: {said.text[:500]}{server.last_words()}")
