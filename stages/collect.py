"""collect: one teacher plays Crafter on its seeds; its episodes become data/traces/<teacher>.parquet.

    dvc repro collect@expert        or: python stages/collect.py expert

Episodes go to the ledger as they end, so that a killed run continues, and more seeds only add.
"""

from pathlib import Path

from apprentice import params
from apprentice.command import run


def main(name: str) -> None:
    """Play as the teacher NAME of params.yaml."""
    settings = params.load()
    if name not in settings.teachers:
        known = ", ".join(settings.teachers)
        raise params.ConfigError(f"params.yaml: teachers has no {name!r}; known there: {known}")
    teacher = settings.teachers[name]

    from apprentice import play, store
    from apprentice.ledger import code, fingerprint
    from apprentice.policy import Scripted

    episodes = play.record(
        Scripted,
        (teacher.policy, teacher.rationale),
        teacher.seeds,
        teacher.max_steps,
        teacher.prompt,
        fingerprint=fingerprint(
            agent=name, teacher=teacher.model_dump(mode="json", exclude={"seeds"}), code=code(__file__)
        ),
        agent=name,
        explore=teacher.explore,
    )
    unlocked = steps = 0

    def counted():
        nonlocal unlocked, steps
        for episode in episodes:
            unlocked, steps = unlocked + len(episode.unlocked), steps + episode.length
            yield episode

    rows = store.write(Path(f"data/traces/{name}.parquet"), counted())
    count = len(teacher.seeds)
    print(
        f"collect {name}: {count} episodes, {rows} decisions, {steps / count:.0f} steps and "
        f"{unlocked / count:.1f} achievements an episode"
    )


if __name__ == "__main__":
    run(main)
