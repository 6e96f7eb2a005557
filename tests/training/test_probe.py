"""A server that plays something else than what is trained is told from one that doesn't."""

from dataclasses import replace

import pytest
import torch
from conftest import SHOWN
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from apprentice.errors import WorkError
from apprentice.params import Prompt
from apprentice.serving.in_process import InProcess
from apprentice.student import loading
from apprentice.training.probe import Probe

SEEDS = range(4)


@pytest.fixture(scope="module")
def trained(tiny_folder):
    """(PEFT model, processor) with an adapter that acts in the vision tower too."""
    torch.manual_seed(0)
    model, processor = loading.load(tiny_folder)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return loading.fold(get_peft_model(model, lora)).eval(), processor


def served(trained, tiny_folder, without: str | None = None, noise: float = 0.0) -> InProcess:
    """A policy that plays this model, as a server does which lacks the adapter in layers with this in their name."""
    trainers, processor = trained
    model, _ = loading.load(tiny_folder)
    with torch.no_grad():
        for name, layer in trainers.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                weight = model.get_submodule(name).weight
                if without is None or without not in name:
                    weight += layer.get_delta_weight("default")
                weight += noise * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return InProcess("student", model, processor, 1.0, 4)


def doubt(trained, policy, bound: float = 0.1) -> str | None:
    model, processor = trained
    return Probe(SEEDS, SHOWN, 1.0, bound).doubt(policy, model, processor)


def test_the_policy_that_is_trained_is_not_doubted(trained, tiny_folder):
    model, _ = trained
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert doubt(trained, served(trained, tiny_folder)) is None
    assert doubt(trained, served(trained, tiny_folder, noise=1e-3)) is None  # as bfloat16 would be
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_half_an_adapter_is_found_out(trained, tiny_folder):
    """vLLM without --enable-tower-connector-lora ignores the tower's part and says nothing: however little it does."""
    assert "without its part in the vision tower" in doubt(trained, served(trained, tiny_folder, "visual"), bound=10.0)


def test_an_adapter_that_was_dropped_is_found_out(trained, tiny_folder):
    """vLLM issue 53888: it was, in its sleep."""
    assert "the base model without the adapter" in doubt(trained, served(trained, tiny_folder, ""), bound=10.0)


def test_an_engine_that_computes_otherwise_is_found_out(trained, tiny_folder):
    said = doubt(trained, served(trained, tiny_folder, noise=0.5), bound=0.01)
    assert "nats a token from the trainer's, and max_sampler_mismatch is 0.01" in said


def test_an_adapter_that_does_nothing_yet_is_no_reason_to_doubt(tiny_folder):
    """Half of it, or none, is the same policy then."""
    model, processor = loading.load(tiny_folder)
    fresh = loading.fold(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))).eval(), processor
    assert doubt(fresh, served(fresh, tiny_folder, noise=5e-3)) is None


def test_other_prompts_are_an_error_that_says_so(trained, tiny_folder):
    policy = served(trained, tiny_folder)
    begin = policy.begin

    class Other:
        """Shows the text that another template would."""

        name = "student"

        def begin(self, seed):
            player = begin(seed)
            reply = player.reply
            player.reply = lambda turn: reply(replace(turn, settings=Prompt(mode="image", rules=True, history=2)))
            return player

    with pytest.raises(WorkError, match="renders other prompts"):
        doubt(trained, Other())
