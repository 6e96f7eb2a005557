"""split: the kept decisions as OpenAI chat rows, by seed into data/sft/train.jsonl and data/sft/val.jsonl.

dvc repro split        or: python stages/split.py
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.errors import WorkError
from apprentice.stage import run, write_metrics


def main() -> None:
    """Split data/filtered.parquet, rendered with the student's prompt settings."""
    settings = params.load()
    split, shown_with = settings.split, settings.active.prompt

    from apprentice import prompt, store
    from apprentice.data import chat_rows, dataset
    from apprentice.progress import counted

    source = Path("data/filtered.parquet")
    achievements = defaultdict(list)
    for seed, unlocked in store.outcomes(source):
        achievements[seed].append(unlocked)
    # What was played on an unknown world may be next to anything: it is never validated on.
    unknown = achievements.pop(None, [])
    total = sum(map(len, achievements.values())) + len(unknown)
    means = {seed: sum(counts) / len(counts) for seed, counts in achievements.items()}
    try:
        held_out = dataset.held_out(means, split.val_fraction, split.random_seed)
    except ValueError as error:
        hint = "; imported rows are only trained on unless their metadata has a seed" if unknown else ""
        raise WorkError(f"split: {error}{hint}") from None
    characters = 0
    counts: Counter[str] = Counter()
    unplayable: Counter[str] = Counter()

    def rows(validation: bool):
        nonlocal characters
        system = prompt.system(shown_with)
        for episode in counted(store.read(source), f"split {'val' if validation else 'train'}", total, "episode"):
            if (episode.seed in held_out) == validation:
                for step in episode.steps:
                    if step.invalid:
                        counts["invalid"] += 1  # kept by the filter's settings, but no target to learn
                        continue
                    row = chat_rows.row(episode, step, shown_with, split.include_rationale)
                    if refused := chat_rows.refused(row, shown_with.max_actions):
                        unplayable[refused] += 1  # the student could say it, but not do it
                        continue
                    characters += chat_rows.characters(row["messages"])
                    counts["pictures"] += row["metadata"]["has_image"]
                    counts["imported"] += episode.imported
                    counts["no_picture"] += episode.imported and not row["metadata"]["has_image"]
                    counts["other_prompt"] += row["messages"][0]["content"] != system
                    yield row

    train = dataset.write_jsonl(Path("data/sft/train.jsonl"), rows(False), split.random_seed if split.shuffle else None)
    val = dataset.write_jsonl(Path("data/sft/val.jsonl"), rows(True))
    metrics = {
        "episodes": total,
        "train_rows": train,
        "val_rows": val,
        "val_seeds": len(held_out),
        "imported_rows": counts["imported"],
        "imported_rows_with_another_system_prompt": counts["other_prompt"],
        "imported_rows_without_picture": counts["no_picture"],
        "invalid_left_out": counts["invalid"],
        "unplayable_left_out": unplayable.total(),
        "pictures": counts["pictures"],
        "characters": characters,
    }
    if not train or (held_out and not val):
        why = "; ".join(f"{count} × {reason}" for reason, count in unplayable.most_common(3))
        raise WorkError(
            f"split: {train} train and {val} val rows are left; {counts['invalid']} replies were invalid, and "
            f"{unplayable.total()} are none that the student's play would take{f' ({why})' if why else ''}: raise "
            f"profiles.{settings.profile}.prompt.max_actions, or collect more"
        )
    write_metrics("split", metrics)
    print(
        f"split: {metrics['episodes']} episodes, {train + val} decisions, {train} train and {val} val rows, "
        f"about {characters / 4 / 1e6:.2f} M tokens of text (4 characters each) and {counts['pictures']} pictures, "
        "in data/sft/train.jsonl and data/sft/val.jsonl"
    )
    if unplayable:
        reason, count = unplayable.most_common(1)[0]
        print(
            f"split: {unplayable.total()} replies are left out, which the student's own play would not take: {count} × "
            f"{reason}"
        )
    if counts["no_picture"] and shown_with.mode != "text":
        print(f"split: {counts['no_picture']} imported rows have no picture, which the student will be asked with")
    if counts["other_prompt"]:
        print(
            f"split: {counts['other_prompt']} imported rows have another system prompt than the one that the student "
            "will be asked with; they are used as they came, having nothing to be rendered from"
        )


if __name__ == "__main__":
    run(main)
