"""The vision tower in training: it takes part in every pass, and all of its adapters get gradients."""

import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel


def prepare(model: Qwen3VLForConditionalGeneration) -> None:
    """Make a Qwen3-VL ready to be trained on several ranks, with gradient checkpointing of either kind.

    Where a micro-batch has no picture, the tower sees the smallest one there is, and nothing comes of it: neither in
    the loss nor in a gradient. Without it a rank would wait for ever for others that have pictures: DDP and ZeRO-2 for
    gradients of the tower's adapters, ZeRO-3 for the parts of its weights. To be called once, before training.
    """
    inner: Qwen3VLModel = model.model
    if any(weight.requires_grad for weight in inner.visual.parameters()):
        # Reentrant checkpointing computes no gradients within a block whose input needs none. transformers sees to
        # that for the embeddings of words alone, and TRL asks for this kind with ZeRO-3.
        inner.visual.patch_embed.register_forward_hook(lambda module, given, found: found.requires_grad_())

    def with_picture(module, given, named):
        if named.get("deepstack_visual_embeds") is None:
            named["inputs_embeds"] = named["inputs_embeds"] + _nothing(inner, named["inputs_embeds"])
        return given, named

    inner.language_model.register_forward_pre_hook(with_picture, with_kwargs=True)


def _nothing(inner: Qwen3VLModel, like: torch.Tensor) -> torch.Tensor:
    """0, computed from all that the tower makes of one visual token's patches."""
    side, sizes = inner.visual.spatial_merge_size, inner.visual.config
    width = sizes.in_channels * sizes.temporal_patch_size * sizes.patch_size**2
    patches = torch.zeros(side**2, width, device=like.device, dtype=like.dtype)
    seen = inner.visual(patches, grid_thw=torch.tensor([[1, side, side]], device=like.device), return_dict=True)
    return sum(part[:0].sum() for part in (seen.pooler_output, *seen.deepstack_features)).to(like.dtype)
