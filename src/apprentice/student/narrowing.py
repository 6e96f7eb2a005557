"""The same results from a Qwen3-VL, for less work.

Of the last decoder layer and the head, only what is read: to play, that's the last token, to train, the answer. All
other positions are computed for nothing, and that's a third of a student of three layers; of Qwen3-VL-2B's, one in 28.

The patches of a picture as one matrix product: PyTorch's convolution takes several times as long for it.
"""

from functools import wraps
from types import MethodType

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLTextDecoderLayer,
    rotate_half,
)

from apprentice.student.onednn import product


def narrow(model: Qwen3VLForConditionalGeneration) -> None:
    """Have a Qwen3-VL compute no more of its last layer than `logits_to_keep` or its labels ask for; patches faster.

    Where labels are given, what comes back, tokens' log-probabilities too, begins at the first token that has one in
    any row. To be called when nothing else will be put around the model's forward. With attention other than PyTorch's
    own, the last layer is computed whole, and so is what comes back.
    """
    embedding = model.model.visual.patch_embed.proj
    embedding.forward = MethodType(_as_product, embedding)
    config = model.config.text_config
    shallow = config.num_hidden_layers <= len(model.config.vision_config.deepstack_visual_indexes)
    if config._attn_implementation != "sdpa" or shallow:  # pictures are added after the first layers, everywhere
        return
    layer, forward = model.model.language_model.layers[-1], model.forward
    layer.forward = MethodType(_last_layer, layer)

    @wraps(forward)  # TRL looks at the signature
    def narrowed(*args, labels: torch.Tensor | None = None, logits_to_keep: int = 0, **kwargs):
        if labels is None:
            return forward(*args, logits_to_keep=logits_to_keep, last_positions=logits_to_keep, **kwargs)
        first = (labels != -100).any(dim=0).nonzero()
        kept = labels.shape[1] - int(first[0]) + 1 if len(first) and first[0] else 0  # and that before it, to say it
        return forward(*args, labels=labels[:, -kept:], last_positions=kept, **kwargs)

    model.forward = narrowed


def _as_product(convolution: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """The convolution of patches as large as its kernel."""
    return product(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)


def _last_layer(
    layer: Qwen3VLTextDecoderLayer, hidden_states, position_embeddings, attention_mask=None, last_positions=0, **kwargs
):
    """Qwen3VLTextDecoderLayer.forward for the last positions alone; keys and values are needed of all."""
    if not 0 < last_positions < hidden_states.shape[1]:
        return type(layer).forward(layer, hidden_states, position_embeddings, attention_mask, **kwargs)
    attention, cache = layer.self_attn, kwargs.get("past_key_values")
    normed, last = layer.input_layernorm(hidden_states), slice(-last_positions, None)
    rows = len(normed)

    def heads(of, x):
        return of(x).view(rows, x.shape[1], -1, attention.head_dim)

    def rotated(x, where):
        cos, sin = (part[:, None, where] for part in position_embeddings)
        return x * cos + rotate_half(x) * sin

    queries = rotated(attention.q_norm(heads(attention.q_proj, normed[:, last])).transpose(1, 2), last)
    keys = rotated(attention.k_norm(heads(attention.k_proj, normed)).transpose(1, 2), slice(None))
    values = heads(attention.v_proj, normed).transpose(1, 2)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    if attention_mask is not None:
        mask = attention_mask[:, :, last]
    else:  # what came before all of them is seen by all
        mask = torch.ones(last_positions, keys.shape[2], dtype=torch.bool, device=keys.device).tril(
            keys.shape[2] - last_positions
        )[None, None]
    found, _ = sdpa_attention_forward(attention, queries, keys, values, mask, scaling=attention.scaling)
    hidden_states = hidden_states[:, last] + attention.o_proj(found.reshape(rows, last_positions, -1))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
