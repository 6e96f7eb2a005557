"""A stranger gets an action out of a model by its card's words: its folder alone, without apprentice or the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch
from conftest import SHOWN
from huggingface_hub import ModelCard
from peft import get_peft_model

from apprentice import params, prompt
from apprentice.data.chat_rows import row
from apprentice.files import digest
from apprentice.params import HubStudent, Lora, Pretraining, TinyStudent
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.student import adapter, card, loading
from apprentice.student.encoding import batch, encode
from apprentice.student.merge import merge
from apprentice.world import World

TINY = TinyStudent(model="tiny", pretraining=Pretraining(seeds="0", steps=1))
HUB = HubStudent(model="Qwen/Qwen3-VL-2B-Instruct", revision="89644892e4d85e24eaac8bacfd4f463576704203")
FOUND = {"val_loss": 0.25, "val_token_accuracy": 0.5}


def run(top: Path, *cards: Path, **environment: str) -> list[str]:
    """What the cards' programs print in a folder, one after the other in a Python that has no apprentice; behind each
    the token ids that the model was given."""
    programs = []
    for number, text in enumerate(file.read_text() for file in cards):
        programs.append(top / f"program{number}.py")
        programs[-1].write_text(text.partition("```python\n")[2].partition("```")[0])
    stranger = (
        "import runpy, sys; sys.modules['apprentice'] = None\n"
        "for file in sys.argv[1:]: print(runpy.run_path(file)['inputs']['input_ids'][0].tolist())"
    )
    command = [sys.executable, "-I", "-c", stranger, *map(str, programs)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(top / "hub"), **environment}
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def asked():
    """A row: what is shown and the reply to it."""
    episode = play(Scripted("expert"), Spec([3], 4, SHOWN))[0]
    return row(episode, episode.steps[3], SHOWN)["messages"]


@pytest.fixture(scope="module")
def top(tiny_folder, asked, tmp_path_factory):
    """The top of a checkout with models/base, and models/rl, which has learnt one reply; merged into one in out."""
    top = tmp_path_factory.mktemp("checkout")
    shutil.copytree(tiny_folder, top / "models/base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        metadata = {"license": "mit", "library_name": "transformers"}
        use = card.use(adapter.BASE, "base", asked[:-1])
        card.write(adapter.BASE, "base", "Sees.", {"Use": use}, metadata, card.results({"tiles": 0.5}, "frames"))
        model, processor = loading.load(adapter.BASE)
        torch.manual_seed(0)
        model = get_peft_model(model, loading.lora_config(Lora(rank=8, alpha=16)))
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-2)
        lesson, loss = batch(processor, [encode(processor, asked)]), torch.inf
        while loss > 1e-3:
            loss = model(**lesson).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        out = Path("models/rl")
        model.save_pretrained(out)
        results = card.results(FOUND, "held-out decisions")
        adapter.complete(out, "rl", processor, TINY, asked[:-1], {"Data": "Of the expert."}, results)
        merge(out, Path("out/merged"))
    return top


def test_the_programs_of_the_cards_run_where_there_is_nothing_but_their_folders(top, tiny, asked, tmp_path):
    for name in ("models/rl", "out/merged"):
        shutil.copytree(top / name, tmp_path / name)
    answer = str(list(prompt.parse(asked[-1]).actions))
    ids = str(encode(tiny[1], asked).prompt_ids)
    cards = [tmp_path / name / "README.md" for name in ("models/rl", "out/merged")]
    assert run(tmp_path, *cards) == [answer, ids, answer, ids]
    shutil.move(tmp_path / "models/rl/base", tmp_path / "models/base")
    *said, shown = run(tmp_path, tmp_path / "models/base/README.md")
    assert said != [answer] and shown == ids


def test_the_program_of_a_hubs_models_adapter_takes_the_base_from_the_hub(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    shown = params.Prompt(mode="text+image", history=4, scale=4)
    hub.write(tmp_path / "models/base", shown)
    out, chat = Path("models/sft"), prompt.messages(World(1).reset(), shown)
    model, processor = loading.load(adapter.BASE, dtype="bfloat16")
    get_peft_model(model, loading.lora_config(Lora(rank=8, alpha=16))).save_pretrained(out)
    adapter.complete(out, "sft", processor, HUB, chat, {}, card.results(FOUND, "held-out decisions"))
    (tmp_path / "alone").mkdir()
    shutil.move(tmp_path / "models/sft", tmp_path / "alone/models/sft")
    with hub.hub(tmp_path / "models/base", HUB.model, HUB.revision) as address:
        said = run(tmp_path / "alone", tmp_path / "alone/models/sft/README.md", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert said[-1] == str(encode(processor, chat).prompt_ids)
    data = ModelCard.load(tmp_path / "alone/models/sft/README.md").data
    assert (data.base_model, data.base_model_relation, data.license) == (HUB.model, "adapter", "apache-2.0")


def test_the_hub_is_told_what_it_asks_for(top):
    tags = {"apprentice", "crafter", "agent", "tool-use"}
    for name, library, found in (
        ("models/base", "transformers", {"tiles": 0.5}),
        ("models/rl", "peft", FOUND),
        ("out/merged", "transformers", FOUND),
    ):
        data = ModelCard.load(top / name / "README.md", ignore_metadata_errors=False).data
        assert (data.license, data.library_name, data.pipeline_tag) == ("mit", library, "image-text-to-text")
        assert tags <= set(data.tags) and data.datasets == ["crafter"]
        assert data.base_model is None  # no hub has one: it lies in the folder
        assert {result.metric_type: result.metric_value for result in data.eval_results} == found
        assert {result.dataset_type for result in data.eval_results} == {"crafter"}


def test_a_card_is_no_reason_to_train_or_play_again(top, tmp_path):
    other = tmp_path / "rl"
    shutil.copytree(top / "models/rl", other)
    before = digest(other), digest(other, without=card.CARD)
    for file in other.rglob(card.CARD):
        file.write_text("Other words.")
    assert digest(other) != before[0] and digest(other, without=card.CARD) == before[1]
    (other / "adapter_config.json").write_text(json.dumps({}))
    assert digest(other, without=card.CARD) != before[1]
