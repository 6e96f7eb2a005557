"""Products with weights on a CPU, by oneDNN.

PyTorch's own in float32 are MKL's, which takes twice as long on AMD's processors (LOG.md). Both come with PyTorch.

With `dtype: mixed`, numbers are rounded to bfloat16 for a product and summed in float32, where the processor is faster
at that. Attention stays as it is: in products as small as its own, rounding takes longer than it saves.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear

_HERE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_FASTER = torch.cpu._is_avx512_bf16_supported()
"""bfloat16 than float32: AVX512-BF16, and AMX, which comes with it."""
_OF_ONEDNN: Any = torch.backends.mkldnn
_FEW = 64
"""Rows below which the call itself takes longer than what it saves."""


_rounded = False


def use_products(model: torch.nn.Module, rounded: bool = False) -> None:
    """Let all linear layers of a model compute with `product`. rounded: `product` rounds, in all of this process."""
    global _rounded
    _rounded = rounded and _FASTER
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = MethodType(_forward, module)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch.nn.functional.linear; the same but for rounding."""
    floats = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if not (_HERE and floats) or x.numel() < _FEW * x.shape[-1]:
        return linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)


def _forward(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return product(x, layer.weight, layer.bias)


@contextmanager
def _rounding() -> Iterator[None]:
    if not _rounded:
        yield
        return
    products = _OF_ONEDNN.matmul
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with _rounding():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        with _rounding():
            of_weights = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
        return (
            _product(gradient, weight.t(), None) if of_x else None,
            of_weights,
            rows.sum(dim=0) if of_bias else None,
        )
