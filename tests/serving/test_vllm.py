"""Servers are started where they should be, waited for, restarted once and never left behind; here with a program that
answers like vLLM. on_vllm.py has the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from apprentice.compute import Vllm
from apprentice.errors import ConfigError, WorkError
from apprentice.serving import vllm
from apprentice.serving.vllm import Plan, Servers, plan

PROGRAM = """#!{python}
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])  # as vLLM's is
print("started", os.getpid(), engine.pid, os.environ["CUDA_VISIBLE_DEVICES"] or "none", flush=True)
if os.environ.get("BROKEN"):
    sys.exit("no memory left")
models = [{{"id": "base", "parent": None}}]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"data": models}})
    def do_POST(self):
        print(self.path, flush=True)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        if self.path == "/v1/load_lora_adapter":
            models.append({{"id": body["lora_name"], "parent": "base"}})
        if self.path == "/v1/unload_lora_adapter":
            models[:] = [model for model in models if model["id"] != body["lora_name"]]
        self.answer({{}})
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def log_message(self, *arguments):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path) -> str:
    file = tmp_path / "vllm"
    file.write_text(PROGRAM.format(python=sys.executable))
    file.chmod(0o755)
    return str(file)


def running(program: str, **settings) -> Servers:
    found = Vllm(use="always", program=program, start_timeout=60.0, **settings)
    return Servers(plan(found, [], training=False), found, Path("models/base"), "float32", [])


def started(server: vllm.Server) -> list[list[str]]:
    """For each start: server's pid, engine's pid, GPUs."""
    lines = Path(server.log).read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith("started")]


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[str]) -> bool:
    end = time.monotonic() + 60  # vLLM's resource tracker ends last, when it has cleaned up
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.parametrize(
    ("settings", "gpus", "training", "expected"),
    [
        ({}, [], True, Plan(())),
        ({}, ["0", "1"], True, Plan(("0", "1"), None, sleeps=True)),
        ({}, ["0", "1"], False, Plan(("0", "1"))),
        ({"use": "never"}, ["0"], True, Plan(())),
        ({"use": "always"}, [], True, Plan((None,))),
        ({"gpus": [0, 1]}, ["4", "5", "6", "7"], True, Plan(("4", "5"), ("6", "7"))),
        ({"gpus": [0, 1]}, ["4", "5", "6", "7"], False, Plan(("4", "5"))),
        ({"tensor_parallel_size": 2}, ["4", "5", "6", "7"], True, Plan(("4,5", "6,7"), None, sleeps=True)),
        ({"gpus": [0, 1], "tensor_parallel_size": 2}, ["4", "5", "6"], True, Plan(("4,5",), ("6",))),
        ({"use": "always", "endpoints": ["http://127.0.0.1:1", "http://127.0.0.1:2"]}, [], True, Plan((None, None))),
    ],
)
def test_servers_and_trainer_share_the_gpus(program, settings, gpus, training, expected):
    assert plan(Vllm(program=program, **settings), gpus, training) == expected


def test_without_vllm_gpus_still_play_in_process(tmp_path):
    assert plan(Vllm(program=str(tmp_path / "none")), ["0"], training=True) == Plan(())


@pytest.mark.parametrize(
    ("settings", "gpus", "said"),
    [
        ({"use": "always", "program": "/nowhere/vllm"}, [], "make vllm"),
        ({"gpus": [0, 3]}, ["0", "1"], r"vllm.gpus names \[3\]"),
        ({"gpus": [0, 1]}, ["0", "1"], "leaves no GPU to train on"),
        ({"tensor_parallel_size": 2}, ["0", "1", "2"], "3 GPUs are no multiple of it"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(program, settings, gpus, said):
    with pytest.raises(ConfigError, match=said):
        plan(Vllm(**{"program": program} | settings), gpus, training=True)


@pytest.mark.parametrize(("sleeps", "memory"), [(False, None), (True, 0.45), (False, 0.85)])
def test_a_server_is_started_with_the_flags_that_this_needs(program, sleeps, memory):
    asked = Path("models/base"), "http://127.0.0.1:8123", "bfloat16", 9, memory is not None, sleeps
    found = vllm.command(Vllm(program=program), *asked)
    assert found[:3] == [program, "serve", "models/base"]
    values = dict(zip(found, found[1:], strict=False))
    assert (values["--host"], values["--port"], values["--max-lora-rank"]) == ("127.0.0.1", "8123", "16")
    assert json.loads(values["--limit-mm-per-prompt"]) == {"image": 1, "video": 0}
    assert values["--tool-call-parser"] == "hermes" and values["--logprobs-mode"] == "processed_logprobs"
    assert {
        "--enable-auto-tool-choice",
        "--enable-lora",
        "--enable-tower-connector-lora",
        "--enable-prefix-caching",
        "--disable-chunked-mm-input",
    } <= set(found)
    assert ("--enable-sleep-mode" in found) == sleeps
    assert {"--enforce-eager", "--no-enable-chunked-prefill"}.isdisjoint(found) == (memory is not None)
    assert values.get("--gpu-memory-utilization") == (memory and str(memory))


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_a_server_is_ready_for_the_largest_picture_of_a_prompt_not_of_the_model(program, tmp_path, name):
    """vLLM ends at once where a picture may have more tokens than its steps: 16,384 with Qwen3-VL, 8,192 on an H100."""

    def bounds(longest: int) -> dict:
        processor = {"size": {"shortest_edge": 65_536, "longest_edge": longest}}
        found = {"image_processor": processor} if name == "processor_config.json" else processor
        (tmp_path / name).write_text(json.dumps(found))
        started = vllm.command(Vllm(program=program), tmp_path, "http://127.0.0.1:8123", "bfloat16", 9, True, False)
        values = dict(zip(started, started[1:], strict=False))
        return json.loads(values.get("--mm-processor-kwargs", "{}"))

    assert bounds(16_777_216) == {"size": {"shortest_edge": 65_536, "longest_edge": 1_327_104}}
    assert bounds(1_327_104) == {}  # tokens, 32 × 32 pixels each: 1,296


def test_each_setting_is_a_flag_of_the_servers(program):
    """Without a GPU too: a CPU has neither memory nor several cards to share."""
    asked = Path("models/base"), "http://127.0.0.1:8123", "bfloat16", 9
    usual, other = (
        vllm.command(Vllm(program=program, **settings), *asked, True, False)
        for settings in (
            {},
            {
                "gpu_memory": 0.7,
                "tensor_parallel_size": 2,
                "max_model_len": 2048,
                "prefix_caching": False,
                "cuda_graphs": False,
            },
        )
    )
    values, others = (dict(zip(found, found[1:], strict=False)) for found in (usual, other))
    flags = {"--gpu-memory-utilization": "0.7", "--tensor-parallel-size": "2", "--max-model-len": "2048"}
    assert {name: others[name] for name in flags} == flags
    assert (values["--max-model-len"], values["--tensor-parallel-size"]) == ("4096", "1")
    assert {"--no-enable-prefix-caching", "--enforce-eager"} == set(other) - set(usual) - set(flags.values())


def test_servers_have_the_variables_that_are_set_for_them(program):
    """The way back to vLLM's Model Runner V1."""
    text = (
        Path(program)
        .read_text()
        .replace('print("started"', 'print(os.environ["VLLM_USE_V2_MODEL_RUNNER"])\nprint("started"')
    )
    Path(program).write_text(text)
    with running(program, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}) as students:
        assert Path(students.servers[0].log).read_text().startswith("0\n")


def test_each_gpu_has_a_server_of_its_own_and_all_end_with_the_block(program):
    found = Vllm(program=program, gpus=(0, 1), start_timeout=60.0)
    with Servers(plan(found, ["6", "7"], training=False), found, Path("models/base"), "bfloat16", []) as students:
        begun = [line for server in students.servers for line in started(server)]
        assert [gpus for *_, gpus in begun] == ["6", "7"]
        assert all(map(alive, begun[0][:2]))
    assert gone([pid for *pids, _ in begun for pid in pids])


def test_a_server_that_cannot_start_says_why(program, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(WorkError, match=r"(?s)vLLM has ended.*no memory left"), running(program):
        pass


def test_a_server_that_does_not_get_ready_is_given_up(tmp_path):
    sleeper = tmp_path / "vllm"
    sleeper.write_text(f"#!{sys.executable}\nimport time\nprint('loading', flush=True)\ntime.sleep(1000)")
    sleeper.chmod(0o755)
    found = Vllm(use="always", program=str(sleeper), start_timeout=1.0)
    with (
        pytest.raises(WorkError, match=r"(?s)not ready after 1 s.*loading"),
        Servers(Plan((None,)), found, Path("models/base"), "float32", []),
    ):
        pass


def test_a_server_that_ends_is_started_again_once(program, capfd):
    with running(program) as students:
        server = students.servers[0]
        for times in (1, 2):
            [first, engine, _] = started(server)[-1]
            os.kill(int(first), signal.SIGKILL)
            assert gone([first, engine])
            if times == 1:
                server.ready()
        with pytest.raises(WorkError, match="vLLM has ended"):
            server.ready()
        assert len(started(server)) == 2
    assert capfd.readouterr().err.count("starting it again") == 1


def test_a_server_that_dies_asleep_is_started_when_it_is_to_wake(program):
    """Not before: the trainer has the memory that it would take."""
    with running(program) as students:
        server = students.servers[0]
        server.sleep()
        [first, engine, _] = started(server)[-1]
        os.kill(int(first), signal.SIGKILL)
        assert gone([first, engine])
        time.sleep(1.5)
        assert len(started(server)) == 1
        server.wake()
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert len(started(server)) == 2


def test_a_server_that_dies_before_it_sleeps_is_asleep_all_the_same(program):
    with running(program) as students:
        server = students.servers[0]
        [first, engine, _] = started(server)[-1]
        os.kill(int(first), signal.SIGKILL)
        assert gone([first, engine])
        server.sleep()
        assert Path(server.log).read_text().rstrip().endswith("/sleep?level=1") and len(started(server)) == 2


def test_a_server_that_dies_asleep_twice_ends_the_work(program):
    with running(program) as students:
        server = students.servers[0]
        for _ in range(2):
            server.sleep()
            [first, engine, _] = started(server)[-1]
            os.kill(int(first), signal.SIGKILL)
            assert gone([first, engine])
            if len(started(server)) == 1:
                server.wake()
        with pytest.raises(WorkError, match="vLLM has ended"):
            server.wake()


def test_no_server_outlives_a_killed_parent(program, tmp_path):
    code = (
        "from pathlib import Path; import time; from test_vllm import running\n"
        f"with running({program!r}) as students:\n"
        "    print(students.servers[0].log, flush=True); time.sleep(1000)"
    )
    environment = os.environ | {"APPRENTICE_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    [pids] = started(vllm.Server("", parent.stdout.readline().strip()))
    assert all(map(alive, pids[:2]))
    parent.kill()
    assert gone(pids[:2])
    parent.wait()


def test_an_adapter_is_called_by_its_weights_and_loaded_once(program, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    one = vllm.Adapter.of(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"two")
    assert vllm.Adapter.of(tmp_path).name != one.name
    with running(program) as students:
        server = students.servers[0]
        for _ in range(2):
            server.ready(one)
        assert server.adapters() == [one.name]
        server.unload(one.name)
        assert server.adapters() == []
        running_already = Vllm(use="always", endpoints=[server.url])
        with Servers(plan(running_already, [], training=True), running_already, tmp_path, "float32", []) as named:
            assert [known.url for known in named.servers] == [server.url]
        assert httpx2.get(f"{server.url}/health").status_code == 200  # not ours to end


def test_what_a_servers_processes_do_first_is_there(tmp_path):
    """On a CPU, vLLM's own environment has a torchvision that can't be imported without it."""
    folder = vllm._VARIABLES["PYTHONPATH"]
    code = (
        "import sitecustomize, sys; print(sitecustomize.__file__, any('Torchvision' in str(x) for x in sys.meta_path))"
    )
    environment = os.environ | {"PYTHONPATH": folder}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [f"{folder}/sitecustomize.py", "True"], done.stderr
