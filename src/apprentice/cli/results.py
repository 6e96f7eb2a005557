"""`apprentice results`: what the pipeline came to, again."""

from apprentice import params
from apprentice.errors import WorkError


def show_results() -> None:
    """The table of results, where the time went, and what to do next; as at the end of `dvc repro`.

    Example: apprentice results
    """
    settings = params.load()

    from apprentice.results import table

    try:
        table.show(settings)
    except FileNotFoundError as error:
        raise WorkError(f"there is no {error.filename} yet: run dvc repro first") from None
