"""Lets torchvision be imported beside a CPU build of torch.

The registry has no CPU build of torchvision. The other one registers fake kernels of operators which its own library
would define, but that library does not load without CUDA. transformers imports torchvision; nothing here uses it.
"""

import sys
from importlib.abc import MetaPathFinder


class _BeforeTorchvision(MetaPathFinder):
    """Defines the missing operators when torchvision is about to be imported; finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                for operator in ("nms", "qnms"):
                    if not hasattr(torch.ops.torchvision, operator):  # another copy of this may have been first
                        schema = f"torchvision::{operator}"
                        torch.library.define(schema, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def install() -> None:
    """From now on, an import of torchvision works."""
    sys.meta_path.insert(0, _BeforeTorchvision())
