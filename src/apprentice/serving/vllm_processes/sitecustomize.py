"""What every process of a vLLM server does first; Python imports it by its name, since vllm.py puts it on the path.

It ends with the process that started it, so that no engine outlives its server and no server the stage, not even a
SIGKILL. And torchvision can be imported beside a CPU build of torch, as in torchvision_operators.py, which says why:
that package isn't installed where vLLM is.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path


def _end_with_parent() -> None:
    if not sys.platform.startswith("linux"):
        return
    # It cleans up after the others when they have ended, and ends by itself.
    if any("resource_tracker" in argument for argument in sys.orig_argv):
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)  # it has ended already


_end_with_parent()
runpy.run_path(str(Path(__file__).parents[2] / "student/torchvision_operators.py"))["install"]()
