"""The GPUs of this machine: the one place that asks torch about them, so that a test can pretend some.

With APPRENTICE_REHEARSAL set, CUDA_VISIBLE_DEVICES names GPUs that need not be there: what goes where is decided as if
they were, and everything is computed on the processor.
"""

import os
import shutil
import subprocess

from apprentice.errors import WorkError

REHEARSAL = "APPRENTICE_REHEARSAL"


def names() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES has them. CUDA isn't begun by asking."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if rehearsed():
        return named
    import torch

    count = torch.cuda.device_count()  # by NVML, as long as nothing in this process has begun CUDA
    return named[:count] or [str(number) for number in range(count)]


def used() -> bool:
    """Whether this process computes on a GPU; begins CUDA.

    Raises WorkError where there are GPUs that torch cannot use: the processor would take days at their price.
    """
    if rehearsed():
        return False
    import torch

    if not torch.cuda.is_available() and torch.cuda.device_count():
        raise WorkError(
            f"there are {torch.cuda.device_count()} GPUs, and torch {torch.__version__} cannot use them: most likely "
            f"the driver ({_driver()}) is older than CUDA {torch.version.cuda}. Take a machine with a newer driver, or "
            "hide the GPUs by CUDA_VISIBLE_DEVICES= to compute on the processor"
        )
    return torch.cuda.is_available()


def check(wanted: int = 0) -> int:
    """How many GPUs this process may use, each tried; begins CUDA.

    Raises WorkError where one does not work, or where there are fewer than wanted.
    """
    here = names()
    if len(here) < wanted:
        import torch

        raise WorkError(
            f"{wanted} GPUs were asked for, and torch {torch.__version__} (CUDA {torch.version.cuda}) finds "
            f"{len(here)} (driver: {_driver()}). Take a machine with a driver for this CUDA, or a torch built for CUDA"
        )
    if used():
        import torch

        for number, name in enumerate(here):
            try:
                torch.zeros(1, device=f"cuda:{number}").item()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise WorkError(f"GPU {name} does not work ({reason}; driver: {_driver()}). Take another") from None
    return len(here)


def _driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi says it."""
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi here"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout if done.returncode == 0 else done.stdout + done.stderr).strip().splitlines()[0]


def rehearsed() -> bool:
    """Whether GPUs are only pretended."""
    return bool(os.environ.get(REHEARSAL))
