"""filter: keep the episodes and decisions worth imitating; data/filtered.parquet and the funnel metrics/filter.json.

dvc repro filter        or: python stages/filter.py
"""

from pathlib import Path

from apprentice import params
from apprentice.command import WorkError, run, write_metrics


def main() -> None:
    """Filter the traces of all teachers of params.yaml."""
    settings = params.load()

    from tqdm import tqdm

    from apprentice import store
    from apprentice.quality import Funnel, NothingLeft, select

    funnel = Funnel()
    episodes = (
        episode for teacher in settings.teachers for episode in store.read(Path(f"data/traces/{teacher}.parquet"))
    )
    total = sum(len(teacher.seeds) for teacher in settings.teachers.values())
    try:
        bar = tqdm(episodes, total=total, desc="filter", unit="episode", mininterval=1)
        store.write(Path("data/filtered.parquet"), select(bar, settings.filter, funnel))
    except NothingLeft as error:
        raise WorkError(f"filter: {error}") from None
    write_metrics("filter", funnel.as_dict())
    kept, read = funnel.decisions["kept"], funnel.decisions["read"]
    print(f"filter: kept {funnel.episodes['kept']} of {funnel.episodes['read']} episodes, {kept} of {read} decisions")


if __name__ == "__main__":
    run(main)
