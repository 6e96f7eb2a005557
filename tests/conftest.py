"""What several tests stand on."""

import pytest

from apprentice.params import Architecture, Prompt

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
