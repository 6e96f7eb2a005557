"""A step of SFT as the stage takes it, with the hub's real sizes but for layers and width."""

import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from transformers import TrainerControl, TrainerState

from apprentice import params
from apprentice.data.chat_rows import row
from apprentice.pipeline import ROOT
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.student import loading, sizes
from apprentice.student.encoding import batch, encode
from apprentice.training.checkpoints import Often
from apprentice.training.sampler import weights_digest
from apprentice.training.sft import SftTrainer

sys.path.append(str(ROOT / "stages"))
PROFILE = params.load(ROOT / "params.yaml").profiles["qwen2b"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    sizes.build(sizes.config("2b", layers=2, width=128)).save_pretrained(folder)
    sizes.processor(PROFILE.prompt).save_pretrained(folder)
    return folder


def test_a_step_of_the_hubs_profile_trains_every_adapter_in_bfloat16(base, tmp_path):
    import sft

    settings = PROFILE.sft.model_copy(update={"zero": params.Zero(), "warmup_ratio": 0.0})
    args = sft.arguments(PROFILE.model_copy(update={"sft": settings}), tmp_path, 2, 1)
    model, processor = loading.load(base, dtype=PROFILE.dtype)
    episode = play(Scripted("expert"), Spec([3], 2, PROFILE.prompt))[0]
    rows = [encode(processor, row(episode, step, PROFILE.prompt)["messages"]) for step in episode.steps]
    given = batch(processor, rows)
    assert given["image_grid_thw"].tolist() == [[1, 18, 18]] * 2
    assert (given["mm_token_type_ids"].sum(dim=1) == 81).all()

    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"images": [[0]] * 2}),
        eval_dataset=Dataset.from_dict({"images": [[0]] * 2}),
        data_collator=lambda chosen: dict(given),
        processing_class=processor,
        peft_config=loading.lora_config(settings.lora),
    )
    layers = {name: module for name, module in trainer.model.named_modules() if isinstance(module, LoraLayer)}
    kinds = set()
    for layer in layers.values():
        layer.lora_A["default"].register_forward_pre_hook(lambda module, given: kinds.add(given[0].dtype))
    trainer.train()
    assert kinds == {torch.bfloat16}, "activations were turned into the adapters' float32 and back"
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for layer in layers.values())
    for name, layer in layers.items():
        assert layer.lora_B["default"].weight.any(), name
    validated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(validated) == 1 and 5 < validated[0] < 20  # of 151,936 words


@pytest.mark.parametrize(("keep", "best"), [("achievements", 2), ("loss", 3)])
def test_the_adapter_that_plays_best_is_kept_where_that_is_asked_for(base, tmp_path, keep, best):
    import sft

    evaluation = params.SftEvaluation(seeds=(1,), max_steps=1, keep=keep)
    settings = PROFILE.sft.model_copy(
        update={"zero": params.Zero(), "eval_steps": 1, "evaluation": evaluation, "learning_rate": 1e-3}
    )
    args = sft.arguments(PROFILE.model_copy(update={"sft": settings}), tmp_path, 1, 1)
    model, processor = loading.load(base, dtype=PROFILE.dtype)
    episode = play(Scripted("expert"), Spec([3], 1, PROFILE.prompt))[0]
    given = batch(processor, [encode(processor, row(episode, episode.steps[0], PROFILE.prompt)["messages"])])
    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"images": [[0]] * 3}),
        eval_dataset=Dataset.from_dict({"images": [[0]]}),
        data_collator=lambda chosen: dict(given),
        processing_class=processor,
        peft_config=loading.lora_config(settings.lora),
    )
    plays = {1: 1.0, 2: 2.0, 3: 1.5}
    adapters = {}

    def held_out(step: int) -> dict[str, float]:
        adapters[step] = weights_digest(trainer.model)
        assert not trainer.model.training, "a server's chances are compared with those of a model without dropout"
        return {"achievements": plays[step], "invalid_rate": 0.0}

    trainer.held_out = held_out
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_achievements"] for entry in rows] == list(plays.values())
    assert np.diff([entry["eval_loss"] for entry in rows]).max() < 0  # it's always the same row
    assert trainer.state.best_global_step == best
    assert weights_digest(trainer.model) == adapters[best] and len(set(adapters.values())) == 3


def test_validation_is_on_rows_of_the_whole_file_and_on_no_more_than_asked_for(base, monkeypatch):
    import sft

    from apprentice.training import examples

    lengths = np.random.default_rng(0).integers(1000, 2000, 11_444)
    processor, known = loading.processor(base), examples.Survey(np.arange(len(lengths)), lengths, lengths * 0 + 8, [])
    monkeypatch.setattr(examples, "survey", lambda *_: known)

    def chosen(**changes) -> list[int]:
        rows = sft.examples_of(
            "val", "", processor, PROFILE.model_copy(update={"sft": PROFILE.sft.model_copy(update=changes)})
        )
        return rows.dataset.with_format(None)["row"][:]

    rows = chosen()
    assert len(set(rows)) == len(rows) == PROFILE.sft.eval_rows == 512
    assert np.diff([0, *sorted(rows), len(lengths)]).max() < 2 * len(lengths) / 512
    assert (np.diff(lengths[rows]) >= 0).all()
    assert rows == chosen() and len(chosen(eval_rows=None)) == len(chosen(eval_rows=20_000)) == len(lengths)


def test_a_checkpoint_comes_every_100_steps_though_validation_is_seldom(tmp_path):
    import sft

    args = sft.arguments(PROFILE.model_copy(update={"sft": PROFILE.sft.model_copy(update={"zero": params.Zero()})}),
                         tmp_path, 2, 1)  # fmt: skip
    saved = []
    for step in range(1, 301):
        control = TrainerControl()
        Often().on_step_end(args, TrainerState(global_step=step), control)
        saved += [step] * control.should_save
    assert saved == [100, 200, 300]
