"""Compile a hot loop with numba once per machine, not once per process.

numba keeps compiled functions beside their source, or else in the user's cache folder. Where it can write to
neither, `njit(cache=True)` raises on import, here and in opensimplex alike. Such a process gets a folder of
its own and compiles for itself, some seconds; set NUMBA_CACHE_DIR to a writable folder to spare it that.
"""

import tempfile

import numba

compiled = numba.njit(cache=True)
"""Decorator. Without `fastmath`, so float64 arithmetic gives Python's bits; one thread, so it can be forked."""


def _find_cache() -> tempfile.TemporaryDirectory | None:
    """The folder made because there was nothing to write to; it lives as long as the process."""
    try:
        compiled(_find_cache)
        import opensimplex  # noqa: F401  (is decorated in the same way, in another folder)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        folder = tempfile.TemporaryDirectory(prefix="apprentice-numba-")
        numba.config.CACHE_DIR = folder.name
        return folder
    return None


_FOLDER = _find_cache()
