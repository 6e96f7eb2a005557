"""The tower takes part in every pass of training, and all of its adapters get the gradients they should."""

from copy import deepcopy

import pytest
import torch
from peft import get_peft_model

from apprentice.params import Lora
from apprentice.student import loading, sizes, tower


@pytest.fixture(scope="module")
def model():
    adapted = get_peft_model(
        sizes.build(sizes.config("2b", layers=2, width=64)), loading.lora_config(Lora(rank=4, vision=True))
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # which begins at 0, and then hides the gradients of A
            torch.nn.init.normal_(weight, std=0.1)
    return adapted.train()


def inputs(picture: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 1000, (2, 30), generator=torch.Generator().manual_seed(0))
    if not picture:
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    ids[:, 3], ids[:, 4:8], ids[:, 8] = 151652, 151655, 151653
    pixels = torch.randn(2 * 16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(1))
    return inputs(False) | {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 151655).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def passed(model, picture: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of adapters by name."""
    loss = model(**inputs(picture), use_cache=False).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


def test_words_alone_give_the_tower_a_gradient_of_nothing_and_change_nothing_else(model):
    plain, prepared = deepcopy(model), deepcopy(model)
    tower.prepare(prepared.get_base_model())
    (loss, gradients), (other_loss, other) = passed(plain, False), passed(prepared, False)
    assert torch.equal(loss, other_loss)
    for name, gradient in other.items():
        if ".visual." in name:
            assert gradient is not None and not gradient.any(), name
        else:
            assert torch.equal(gradient, gradients[name]), name


def test_a_picture_is_seen_as_before(model):
    plain, prepared = deepcopy(model), deepcopy(model)
    tower.prepare(prepared.get_base_model())
    (loss, gradients), (other_loss, other) = passed(plain, True), passed(prepared, True)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in other.items())


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_either_kind_gives_every_adapter_its_gradient(model, picture, reentrant):
    whole, kept = deepcopy(model), deepcopy(model)
    for one in (whole, kept):
        tower.prepare(one.get_base_model())
    kept.enable_input_require_grads()  # as TRL does
    kept.gradient_checkpointing_enable({"use_reentrant": reentrant})
    gradients, found = passed(whole, picture)[1], passed(kept, picture)[1]
    for name, gradient in gradients.items():
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], gradient)
        assert gradient.any() == (picture or ".visual." not in name), name


def test_nothing_is_computed_backwards_through_a_frozen_tower():
    base = sizes.build(sizes.config("2b", layers=2, width=64))
    frozen = get_peft_model(base, loading.lora_config(Lora(rank=4, vision=False)))
    tower.prepare(frozen.get_base_model())
    given = inputs(True)
    seen = base.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
    assert not seen.pooler_output.requires_grad
