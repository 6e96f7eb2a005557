"""`apprentice results`: what the pipeline came to, again."""

from collections.abc import Iterator
from contextlib import contextmanager

from apprentice import params
from apprentice.errors import WorkError


def show_results() -> None:
    """The table of results, where the time went, and what to do next; as at the end of `dvc repro`.

    Example: apprentice results
    """
    settings = params.load()

    from apprentice.results import table

    with made():
        table.show(settings)


@contextmanager
def made() -> Iterator[None]:
    """What is read here has to have been made: a file that isn't there is a WorkError that says by what."""
    try:
        yield
    except FileNotFoundError as error:
        raise WorkError(f"there is no {error.filename} yet: run dvc repro first") from None
