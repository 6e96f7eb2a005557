"""The student's base model from the Hugging Face hub."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from apprentice.errors import WorkError
from apprentice.progress import Progress


def download(model: str, revision: str, folder: Path) -> None:
    """Bring a commit of a repository into a folder, the same files on any machine.

    Raises WorkError if it cannot be had.
    """
    try:
        with Progress(model, {"download": 1}) as progress:
            progress.begin("download")
            snapshot_download(model, revision=revision, local_dir=folder)
    except OSError as error:  # the hub's own errors are OSErrors
        raise WorkError(f"{model} at {revision} cannot be downloaded: {error}") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
