"""What several tests stand on."""

import os
import signal

import pytest

from apprentice.params import Architecture, Prompt
from apprentice.workers import cores
from apprentice.world import World


def pytest_configure() -> None:
    # A shell has its background jobs ignore Ctrl-C, and so would every program that a test starts to interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # For each worker of `make test`, which has its core to itself; a stage that a test starts sees to its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config) -> int:
    return cores() + 2  # many tests wait: for a pause to end, for a program to start


def pytest_sessionstart(session) -> None:
    if not hasattr(session.config, "workerinput"):  # once, before the workers begin
        world = World(0, max_steps=1)  # numba compiles its functions beside them; small.checkout copies that
        world.reset()
        world.step("noop")


SHOWN = Prompt(mode="image", rules=False, history=2)


@pytest.fixture(scope="session")
def tiny():
    """An untrained tiny Qwen3-VL: (model, processor)."""
    from apprentice.student.tiny import build, tokenizer
    from apprentice.training import pretraining

    _, seen = pretraining.frames(100_000, 8)
    tokens = tokenizer(*pretraining.vocabulary(SHOWN, seen), 512)
    model, processor = build(Architecture(initializer_range=0.3), tokens, 0)
    return model.eval(), processor


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The same as a folder of Hugging Face's form."""
    folder = tmp_path_factory.mktemp("base")
    for part in tiny:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees the user's ledger or checkpoints."""
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "cache"))


LONG = ("test_pipeline", "test_rl", "test_chat", "test_world")
"""Files that take minutes. They begin first, so that no core is left with one of them at the end."""


def pytest_collection_modifyitems(items):
    names = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: names.get(item.path.stem, len(LONG)))
