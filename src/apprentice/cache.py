"""The user's cache folder: what survives a run, outside of DVC and shared by all checkouts."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """$APPRENTICE_CACHE, or the user's cache folder. It may not exist yet."""
    return Path(os.environ.get("APPRENTICE_CACHE") or user_cache_path("apprentice"))
