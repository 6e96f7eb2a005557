"""An adapter's folder is what strangers can load, the same bytes each time; merged, it answers as it did."""

import json

import command_line
import pytest
import torch
from conftest import SHOWN
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from small import contents
from transformers import AutoModelForImageTextToText, AutoProcessor

from apprentice import prompt
from apprentice.data.chat_rows import row
from apprentice.errors import ConfigError, WorkError
from apprentice.params import Architecture, HubStudent, Lora, Pretraining, TinyStudent
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.student import adapter, card, loading
from apprentice.student.encoding import batch, encode
from apprentice.student.merge import merge
from apprentice.student.template import TEMPLATE
from apprentice.student.tiny import build
from apprentice.world import World

TINY = TinyStudent(model="tiny", pretraining=Pretraining(seeds="0", steps=1))
HUB = HubStudent(model="Qwen/Qwen3-VL-2B-Instruct", revision="89644892e4d85e24eaac8bacfd4f463576704203")
DATA = card.teachers([{"teacher": "expert", "model": "expert", "rows": 40, "episodes": 2}])
SECTIONS = {
    "Data": DATA,
    "Metrics": card.table(("metric", "value"), {"val_loss": 0.123456, "steps": 7}.items()),
    "Settings": card.settings({"dtype": "float32", "sft": {"learning_rate": 5e-5, "lora": {"rank": 4}}}),
}


def saved(base, folder, known_as):
    torch.manual_seed(0)
    model, processor = loading.load(base)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder)
    complete(folder, processor, known_as)
    return folder


def complete(folder, processor, known_as):
    asked = prompt.messages(World(1).reset(), SHOWN)
    results = card.results({"val_loss": 0.123456}, "held-out decisions")
    adapter.complete(folder, folder.name, processor, known_as, asked, SECTIONS, results)


@pytest.fixture
def top(tiny_folder, tmp_path, monkeypatch):
    """The top of a checkout that has trained: models/base and models/sft."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/base").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    saved("models/base", adapter.Path("models/sft"), TINY)
    return tmp_path


@pytest.fixture(scope="module")
def inputs(tiny):
    steps = play(Scripted("expert"), Spec([3], 4, SHOWN))[0]
    found = batch(tiny[1], [encode(tiny[1], row(steps, step, SHOWN)["messages"]) for step in steps.steps])
    del found["labels"]
    return found


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs).logits


def test_a_stranger_loads_it_by_what_it_names(top, inputs):
    named = json.loads((top / "models/sft/adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForImageTextToText.from_pretrained(named)
    alone = logits(base, inputs)
    assert (logits(PeftModel.from_pretrained(base, "models/sft"), inputs) - alone).abs().max() > 0.1
    assert AutoProcessor.from_pretrained("models/sft").chat_template == TEMPLATE


def test_the_same_training_gives_the_same_bytes(top):
    folder = top / "models/sft"
    before = contents(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = config["target_modules"][::-1]  # PEFT writes a set
    file.write_text(json.dumps(config))
    complete(folder, loading.processor("models/base"), TINY)
    assert contents(folder) == before
    assert not any(str(top).encode() in content for content in before.values())


def test_the_card_says_what_it_is_made_of(top):
    found = ModelCard.load("models/sft/README.md", ignore_metadata_errors=False)
    assert {"lora", "crafter"} <= set(found.data.tags) and found.data.library_name == "peft"
    for part in (
        DATA,
        "| val_loss | 0.1235 |",
        "learning_rate: 5e-05",
        "--max-lora-rank 8",
        "apprentice merge models/sft",
    ):
        assert part in found.content, part
    assert card.section(top / "models/sft", "Data") == DATA
    assert card.section(top / "models/base", "Data") == ""


def test_an_adapter_of_a_hubs_model_names_it_and_its_revision(top):
    folder = saved("models/base", top / "models/hub", HUB)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (HUB.model, HUB.revision)
    found = ModelCard.load(folder / "README.md")
    assert found.data.base_model == HUB.model and not (folder / "base").exists()
    assert f"vllm serve {HUB.model} --revision {HUB.revision}" in found.content


def test_an_adapter_of_a_hubs_model_is_trained_on_and_saved_without_the_hub(top, monkeypatch):
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", None)
    model, _ = loading.load("models/base", saved("models/base", top / "models/hub", HUB), trainable=True)
    model.save_pretrained(top / "models/next")


def test_merged_it_answers_as_base_and_adapter_do(top, inputs):
    merge(adapter.Path("models/sft"), top / "out/merged")
    merged = AutoModelForImageTextToText.from_pretrained("out/merged")
    base = AutoModelForImageTextToText.from_pretrained("models/base")
    assert type(merged).__name__ == "Qwen3VLForConditionalGeneration"
    alone = logits(base, inputs)
    both = logits(PeftModel.from_pretrained(base, "models/sft"), inputs)
    torch.testing.assert_close(logits(merged, inputs), both, atol=1e-3, rtol=1e-3)
    assert (alone - both).abs().max() > 0.1
    assert AutoProcessor.from_pretrained("out/merged").chat_template == TEMPLATE
    assert DATA in ModelCard.load("out/merged/README.md").content
    assert sorted(file.name for file in (top / "out").iterdir()) == ["merged"]


def test_merged_weights_have_the_names_and_the_precision_of_the_base(top):
    from safetensors import safe_open

    AutoModelForImageTextToText.from_pretrained("models/base", dtype=torch.bfloat16).save_pretrained("models/bf16")
    merge(adapter.Path("models/sft"), top / "merged", base="models/bf16")
    with safe_open("models/bf16/model.safetensors", "pt") as one, safe_open("merged/model.safetensors", "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert {other.get_tensor(name).dtype for name in other.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_nothing_is_overwritten_and_nothing_begun_that_cannot_end(top):
    with pytest.raises(ConfigError, match="is no adapter"):
        merge(adapter.Path("models/none"), top / "out")
    (top / "out").mkdir()
    (top / "out/mine").touch()
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        merge(adapter.Path("models/sft"), top / "out")
    assert [file.name for file in (top / "out").iterdir()] == ["mine"]


def test_an_adapter_of_another_base_is_refused(top, tiny):
    other, processor = build(Architecture(hidden_size=64), tiny[1].tokenizer, 0)
    for part in (other, processor):
        part.save_pretrained("models/other")
    with pytest.raises(WorkError, match=r"don't fit: .*size mismatch.*--base"):
        merge(adapter.Path("models/sft"), top / "out", base="models/other")
    assert not (top / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["models/none", "out"], 2, "models/none is no adapter"),
        (["out"], 2, "models/rl is no adapter"),
        (["models/sft", "models/sft"], 2, "nothing is overwritten"),
        (["a", "b", "c"], 2, "nothing more"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(top, arguments, code, says):
    done = command_line.run(top, "merge", *arguments)
    assert done.returncode == code and says in done.stderr and done.stderr.count("\n") == 1


def test_an_adapter_trained_on_four_bits_is_merged_into_the_base_as_it_was(top, inputs):
    quantised, processor = loading.load("models/base", quantization="nf4")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(quantised, lora).save_pretrained("models/qlora")
    complete(adapter.Path("models/qlora"), processor, TINY)
    merge(adapter.Path("models/qlora"), top / "merged")
    merged = AutoModelForImageTextToText.from_pretrained("merged")
    base = AutoModelForImageTextToText.from_pretrained("models/base")
    assert not hasattr(merged.config, "quantization_config")
    both = logits(PeftModel.from_pretrained(base, "models/qlora"), inputs)
    torch.testing.assert_close(logits(merged, inputs), both, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ("q_proj", "v_proj"), ("attn.proj", "linear_fc1"), ("layers.0.mlp.up_proj",), r".*\.[qk]_proj"],
)
def test_linear_layers_can_be_adapted(tiny_folder, targets):
    adapter.check_targets(tiny_folder, Lora(target_modules=targets), "lora")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_proj", "embed_tokens"), "'embed_tokens' names .*embed_tokens, which is no linear layer but a Embedding"),
        (("patch_embed.proj",), "patch_embed.proj, which is no linear layer but a Conv3d"),
        (("proj",), "names model.visual.patch_embed.proj"),
        (("pos_embed",), "is no linear layer but a Embedding"),
        (("mlp",), "is no linear layer but a "),
        (("input_layernorm",), "is no linear layer but a "),
        (("lm_head",), "'lm_head' names lm_head, which scores the words"),
        (".*", "names "),
        (("q_prj",), "no layer is called 'q_prj'; linear ones are .*q_proj.*all-linear"),
        (("q_proj", "typo"), "no layer is called 'typo'"),
        ("q_proj", r"no layer is called 'q_proj'.*write \[q_proj\]"),
        ("*_proj", "no regular expression"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_with_the_reason(tiny_folder, targets, said):
    with pytest.raises(ConfigError, match=said) as raised:
        adapter.check_targets(tiny_folder, Lora(target_modules=targets), "profiles.x.sft.lora")
    assert str(raised.value).startswith("profiles.x.sft.lora.target_modules: ")


def test_without_the_tower_its_layers_are_none_to_adapt(tiny_folder):
    with pytest.raises(ConfigError, match="no layer is called 'qkv'"):
        adapter.check_targets(tiny_folder, Lora(target_modules=("qkv",), vision=False), "lora")


def test_shared_weights_are_found_where_a_linear_layer_has_them(tiny_folder, monkeypatch):
    shared = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    shared[1].weight = shared[0].weight
    shared.get_output_embeddings = lambda: None
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_config", lambda config: shared)
    with pytest.raises(ConfigError, match="'0' names 0, which has its weights in common"):
        adapter.check_targets(tiny_folder, Lora(target_modules=("0",)), "lora")
