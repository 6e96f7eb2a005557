"""Lets torchvision be imported beside a CPU build of torch; import this before transformers.

The registry has no CPU build of torchvision. The other one registers fake kernels of operators which its own library
would define, but that library does not load without CUDA. transformers imports torchvision; nothing here uses it.
"""

import torch

_OPERATORS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

if torch.version.cuda is None:
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", _OPERATORS)
