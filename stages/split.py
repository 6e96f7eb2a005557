"""split: the kept decisions as OpenAI chat rows, by seed into data/sft/train.jsonl and data/sft/val.jsonl.

dvc repro split        or: python stages/split.py
"""

from collections import defaultdict
from pathlib import Path

from apprentice import params
from apprentice.command import WorkError, run, write_metrics


def main() -> None:
    """Split data/filtered.parquet, rendered with the student's prompt settings."""
    settings = params.load()
    split, shown_with = settings.split, settings.student.prompt

    from tqdm import tqdm

    from apprentice import conversation, dataset, store

    source = Path("data/filtered.parquet")
    achievements = defaultdict(list)
    for seed, unlocked in store.outcomes(source):
        achievements[seed].append(unlocked)
    means = {seed: sum(counts) / len(counts) for seed, counts in achievements.items()}
    try:
        held_out = dataset.held_out(means, split.val_fraction, split.random_seed)
    except ValueError as error:
        raise WorkError(f"split: {error}") from None
    characters = 0

    def rows(validation: bool):
        nonlocal characters
        for episode in tqdm(store.read(source), desc="val" if validation else "train", unit="episode", mininterval=1):
            if (episode.seed in held_out) == validation:
                for step in episode.steps:
                    row = conversation.row(episode, step, shown_with, split.include_rationale)
                    characters += conversation.characters(row["messages"])
                    yield row

    train = dataset.write_jsonl(Path("data/sft/train.jsonl"), rows(False), split.random_seed if split.shuffle else None)
    val = dataset.write_jsonl(Path("data/sft/val.jsonl"), rows(True))
    pictures = 0 if shown_with.mode == "text" else train + val
    metrics = {
        "episodes": sum(map(len, achievements.values())),
        "train_rows": train,
        "val_rows": val,
        "val_seeds": len(held_out),
        "pictures": pictures,
        "characters": characters,
    }
    write_metrics("split", metrics)
    print(
        f"split: {metrics['episodes']} episodes, {train + val} decisions, {train} train and {val} val rows, "
        f"about {characters / 4 / 1e6:.2f} M tokens of text (4 characters each) and {pictures} pictures"
    )


if __name__ == "__main__":
    run(main)
