"""filter: keep the episodes and decisions worth imitating, of all teachers and imports, in data/filtered.parquet.

    dvc repro filter        or: python stages/filter.py

metrics/filter.json says what fell where, metrics/teachers.json how good each teacher's play was, metrics/cost.json what
all of it has cost.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.errors import WorkError
from apprentice.stage import run, write_metrics


def main() -> None:
    """Filter the traces of all teachers and imports of params.yaml."""
    settings = params.load()
    judging = settings.filter.min_judge_score is not None
    if judging:
        from apprentice.endpoint.client import api_key

        api_key(settings.judge.endpoint, "judge.endpoint")  # before anything else: it may be missing

    from apprentice import store
    from apprentice.data.filters import Funnel, NothingLeft, select, to_judge
    from apprentice.progress import counted

    def episodes(purpose: str):
        found = (episode for trace in traces for episode in store.read(trace))
        return counted(found, purpose, total, "episode")

    sources, funnel = [*settings.teachers, *settings.imports], Funnel()
    traces = [Path(f"data/traces/{name}.parquet") for name in sources]
    total = sum(1 for trace in traces for _ in store.outcomes(trace))
    scores = {}
    if judging:
        from apprentice.data import judge

        candidates = (episode for episode in episodes("judge") if to_judge(episode, settings.filter))
        verdicts = judge.scores(candidates, settings.judge)
        scores = {verdict.episode_id: verdict.score for verdict in verdicts if verdict.score is not None}
        missing = [verdict.why_not for verdict in verdicts if verdict.score is None]
        if missing:
            fate = "kept" if settings.filter.judge_missing == "keep" else "dropped"
            print(f"filter: {len(missing)} of {len(verdicts)} episodes have no score and are {fate}; {missing[0]}")
    try:
        store.write(Path("data/filtered.parquet"), select(episodes("filter"), settings.filter, funnel, scores))
    except NothingLeft as error:
        raise WorkError(f"filter: {error}") from None
    costs = {name: json.loads(Path(f"metrics/cost/{name}.json").read_text()) for name in sources}
    teachers = {name: quality.as_dict(costs[name]["cost_usd"]) for name, quality in funnel.teachers.items()}
    write_metrics("filter", funnel.as_dict())
    write_metrics("teachers", teachers)
    write_metrics("cost", {"teachers": costs, "judge_usd": judge.spent(settings.judge) if judging else 0.0})
    show(teachers)
    for what, counts in (("episodes", funnel.episodes), ("decisions", funnel.decisions)):
        for reason, count in counts.items():
            print(f"filter: {count:7} {what} {reason if reason in ('read', 'kept') else f'dropped by {reason}'}")
    print("filter: in data/filtered.parquet; metrics/filter.json and metrics/teachers.json have the figures")


def show(teachers: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    def text(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    columns = {
        "episodes": ("episodes", "d"),
        "achieved": ("achievements_mean", ".1f"),
        "steps": ("steps_mean", ".0f"),
        "invalid": ("invalid_rate", ".1%"),
        "judged": ("judge_score_mean", ".2f"),
        "kept": ("kept_decisions", "d"),
        "$ a kept": ("cost_per_kept_decision_usd", ".5f"),
    }
    if all(row["judge_score_mean"] is None for row in teachers.values()):
        del columns["judged"]
    table = Table("teacher", *columns, box=None)
    for name, row in teachers.items():
        table.add_row(name, *(text(row[key], form) for key, form in columns.values()))
    Console(width=None).print(table)


if __name__ == "__main__":
    run(main)
