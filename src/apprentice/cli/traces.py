"""`apprentice traces`: look into what was played."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from apprentice import params
from apprentice.errors import ConfigError, WorkError

application = typer.Typer(
    no_args_is_help=True, help="Look into what was played: the teachers' traces, the benchmark's, rl's."
)
_COLUMNS = [
    "episode_id",
    "agent",
    "seed",
    "step",
    "invalid",
    "executed",
    "reward",
    "unlocked",
    "done",
    "died",
    "ending",
]
_COLUMNS += ["prompt_tokens", "completion_tokens"]


def _teachers() -> list[str]:
    try:
        settings = params.load()
    except ConfigError:
        return []
    return [*settings.teachers, *settings.imports]


def _achievements() -> tuple[str, ...]:
    from apprentice.world.observation import ACHIEVEMENTS

    return ACHIEVEMENTS


Teachers = Annotated[
    list[str] | None,
    typer.Option("--teacher", help="Only this one's (or the benchmark agent's); several times for several."),
]
Achievements = Annotated[
    list[str] | None,
    typer.Option("--achievement", help="Only with this one unlocked; several times for all of several."),
]
Least = Annotated[int, typer.Option("--min-achievements", min=0, max=22, help="Only with so many.")]
Seeds = Annotated[str | None, typer.Option("--seed", help="Only on these worlds, for example 0-99,200.")]
Benchmark = Annotated[bool, typer.Option("--benchmark", help="What the benchmark's agents played, not the teachers.")]
Rl = Annotated[
    bool, typer.Option("--rl", help="What the student played in rl, a group of each iteration; so far, while it runs.")
]
Json = Annotated[bool, typer.Option("--json", help="For a script: the same as JSON.")]


@application.command("list")
def list_episodes(
    teacher: Teachers = None,
    achievement: Achievements = None,
    min_achievements: Least = 0,
    seed: Seeds = None,
    benchmark: Benchmark = False,
    rl: Rl = False,
    limit: Annotated[int, typer.Option(min=1, help="The most lines; --json gives all.")] = 50,
    as_json: Json = False,
) -> None:
    """The episodes, the best first.

    Example: apprentice traces list --achievement collect_iron --min-achievements 15
    """
    found = sorted(
        _chosen(_files(benchmark, rl, teacher), achievement, min_achievements, seed),
        key=lambda episode: -len(episode["achievements"]),
    )
    if as_json:
        print(json.dumps(found, indent=1))
        return

    from rich.console import Console
    from rich.table import Table

    columns = ("episode", "decisions", "steps", "achievements", "reward", "invalid", "end")
    table = Table(*columns, box=None)
    for episode in found[:limit]:
        table.add_row(
            _plain(episode["episode"]),
            str(episode["decisions"]),
            str(episode["steps"]),
            str(len(episode["achievements"])),
            f"{episode['reward']:.1f}",
            str(episode["invalid"]),
            "died" if episode["died"] else episode["ending"],
        )
    console = Console(highlight=False)
    console.print(table)
    more = f", {limit} of them shown; --limit shows more" if len(found) > limit else ""
    console.print(f"{len(found)} episodes{more}")


@application.command("stats")
def statistics(
    teacher: Teachers = None,
    achievement: Achievements = None,
    min_achievements: Least = 0,
    seed: Seeds = None,
    benchmark: Benchmark = False,
    rl: Rl = False,
    as_json: Json = False,
) -> None:
    """What each teacher achieved, and how often each achievement was unlocked.

    Example: apprentice traces stats --seed 0-99
    """
    found = {}
    for name, paths in _files(benchmark, rl, teacher).items():
        episodes = list(_chosen({name: paths}, achievement, min_achievements, seed))
        found[name] = _summary(episodes)
    if as_json:
        print(json.dumps(found, indent=1))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("", *map(_plain, found), box=None)
    for row, form in (
        ("episodes", ",d"), ("decisions", ",d"), ("steps_mean", ".0f"), ("achievements_mean", ".1f"),
        ("reward_mean", ".2f"), ("invalid_rate", ".1%"), ("died_rate", ".0%"), ("prompt_tokens", ",d"),
        ("completion_tokens", ",d"),
    ):  # fmt: skip
        table.add_row(row.replace("_", " "), *(format(one[row], form) for one in found.values()))
    table.add_section()
    for name in _achievements():
        table.add_row(name, *(f"{one['achievements'][name]:.0%}" for one in found.values()))
    Console(highlight=False).print(table)


@application.command("show")
def show_episode(
    episode: Annotated[str, typer.Argument(help="As `traces list` calls it, for example expert-12.")],
    step: Annotated[int | None, typer.Option(min=0, help="One decision in full, with its picture.")] = None,
    benchmark: Benchmark = False,
    rl: Rl = False,
    gif: Annotated[Path | None, typer.Option(help="Write the episode as a film.")] = None,
    as_json: Json = False,
) -> None:
    """An episode, decision by decision: what was done and what came of it.

    Example: apprentice traces show expert-12 --step 40
    """
    if gif and gif.suffix.lower() != ".gif":
        raise ConfigError(f"{gif} must end in .gif")
    played = _read(_files(benchmark, rl, None), episode)
    if gif:
        if played.imported or played.seed is None:
            raise ConfigError(f"{episode} was imported: its world is not known, so there is no film of it")
        from apprentice.cli import film, watch

        opening = params.load().benchmark.opening if benchmark else ()
        film.write_gif(gif, watch.moments(played, film.SIZE, opening), episode, 8)
        print(f"written: {gif}")
        return
    steps = [one for one in played.steps if step in (None, one.step)]
    if not steps:
        known = ", ".join(str(one.step) for one in played.steps[:8])
        raise ConfigError(f"{episode} has no decision at step {step}; it has {known}, …")
    if as_json:
        print(json.dumps([_decision(one) for one in steps], indent=1))
    elif step is None:
        for one in steps:
            print(_line(one))
        print(f"{len(played.steps)} decisions, reward {played.reward:.1f}, {len(played.unlocked)} of 22 achievements")
    else:
        _show(played, steps[0])


def _show(played, step) -> None:
    from apprentice import prompt
    from apprentice.cli.screen import half_blocks
    from apprentice.episode import Given

    given = isinstance(step.observation, Given)
    png = step.observation.png
    if png and sys.stdout.isatty():
        print("\n".join(half_blocks(png.decode(png))))
    shown = (
        prompt.given(step.observation)
        if given
        else prompt.messages(step.observation, params.Prompt.model_validate_json(played.prompt), step.history)
    )
    for message in shown:
        for part in message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]:
            print(f"{message['role']}:")
            for line in str(part.get("text", "(the picture)")).splitlines():
                print(f"    {_plain(line)}")
    print(f"assistant:\n    {_plain(json.dumps(step.reply.message, ensure_ascii=False))}")
    print(_line(step))


def _line(step) -> str:
    parts = [f"{step.step:5d}  {' '.join(step.executed) or ' '.join(step.asked)}"]
    if step.asked and step.executed and step.asked != step.executed:
        parts.append(f"(asked for {' '.join(step.asked)})")
    if step.reward:
        parts.append(f"reward {step.reward:+.1f}")
    if step.unlocked:
        parts.append(f"unlocked {', '.join(step.unlocked)}")
    if step.invalid:
        parts.append(f"invalid: {_plain(step.invalid)}")
    if step.ending:
        parts.append({"steps": "time is up", "calls": "no calls left"}.get(step.ending, step.ending))
    return "  ".join(parts)


def _decision(step) -> dict:
    return {
        "step": step.step,
        "message": step.reply.message,
        "asked": step.asked,
        "invalid": step.invalid,
        "executed": step.executed,
        "reward": step.reward,
        "unlocked": step.unlocked,
        "done": step.done,
        "died": step.died,
        "ending": step.ending,
        "prompt_tokens": step.reply.prompt_tokens,
        "completion_tokens": step.reply.completion_tokens,
    }


def _files(benchmark: bool, rl: bool, names: list[str] | None) -> dict[str, list[Path]]:
    """Where the episodes of each are; of those named in params.yaml, never what else lies there."""
    settings = params.load()
    if rl:
        if benchmark or names:
            raise ConfigError("--rl shows the student's own play; leave out --benchmark and --teacher")
        return {"rl": _rollouts()}
    known = list(settings.benchmark.names) if benchmark else [*settings.teachers, *settings.imports]
    folder = "data/benchmark" if benchmark else "data/traces"
    for name in names or ():
        if name not in known:
            raise ConfigError(f"there is no {name!r}; params.yaml has {', '.join(known)}")
    files = {name: Path(folder) / f"{name}.parquet" for name in names or known}
    there = {name: [path] for name, path in files.items() if path.is_file()}
    if not there or (names and len(there) < len(files)):
        lacking = ", ".join(str(path) for name, path in files.items() if name not in there)
        raise ConfigError(f"there is no {lacking} yet; make it by dvc repro, or dvc pull it")
    return there


def _rollouts() -> list[Path]:
    """What rl has given; while it runs, or where it was ended before, what the last run of it has played so far."""
    from apprentice.cache import cache_folder

    done = Path("data/rl/rollouts.parquet")
    if done.is_file():
        return [done]
    runs = sorted(cache_folder().glob("rl/*/rollouts"), key=lambda folder: folder.stat().st_mtime)
    played = sorted(runs[-1].glob("*.parquet")) if runs else []
    if not played:
        raise ConfigError(
            f"there is no {done} yet, and rl has played no iteration; make it by dvc repro, or dvc pull it"
        )
    return played


def _chosen(
    files: dict[str, list[Path]], achievements: list[str] | None, least: int, seeds: str | None
) -> Iterator[dict]:
    for name in achievements or ():
        if name not in _achievements():
            raise ConfigError(f"{name!r} is no achievement; Crafter's are {', '.join(_achievements())}")
    try:
        wanted = None if seeds is None else set(params.seeds(seeds))
    except ValueError as error:
        raise ConfigError(f"--seed: {error}") from None
    for path in itertools.chain(*files.values()):
        for episode in _episodes(path):
            unlocked = set(episode["achievements"])
            if wanted is not None and episode["seed"] not in wanted:
                continue
            if len(unlocked) >= least and unlocked.issuperset(achievements or ()):
                yield episode


def _episodes(path: Path) -> Iterator[dict]:
    """Each episode of a file in short; its pictures are not read."""
    import pyarrow.parquet as pq

    episode: dict = {}
    for batch in pq.ParquetFile(path).iter_batches(columns=_COLUMNS):
        for row in batch.to_pylist():
            if row["episode_id"] != episode.get("episode"):
                if episode:
                    yield episode
                episode = {"episode": row["episode_id"], "agent": row["agent"], "seed": row["seed"], "decisions": 0}
                episode |= {"steps": 0, "achievements": [], "reward": 0.0, "invalid": 0, "died": False, "ending": ""}
                episode |= {"prompt_tokens": 0, "completion_tokens": 0}
            episode["decisions"] += 1
            episode["steps"] = row["step"] + len(row["executed"])
            episode["achievements"] += row["unlocked"] or []
            episode["reward"] += row["reward"] or 0.0
            episode["invalid"] += bool(row["invalid"])
            episode["died"] |= bool(row["died"])
            episode["ending"] = row.get("ending") or ""
            episode["prompt_tokens"] += row["prompt_tokens"]
            episode["completion_tokens"] += row["completion_tokens"]
    if episode:
        yield episode


def _summary(episodes: list[dict]) -> dict:
    count = len(episodes)

    def total(name: str) -> int:
        return sum(episode[name] for episode in episodes)

    def mean(value: float) -> float:
        return value / count if count else 0.0

    decisions = total("decisions")
    return {
        "episodes": count,
        "decisions": decisions,
        "steps_mean": mean(total("steps")),
        "achievements_mean": mean(sum(len(episode["achievements"]) for episode in episodes)),
        "reward_mean": mean(total("reward")),
        "invalid_rate": total("invalid") / decisions if decisions else 0.0,
        "died_rate": mean(total("died")),
        "prompt_tokens": total("prompt_tokens"),
        "completion_tokens": total("completion_tokens"),
        "achievements": {
            name: mean(sum(name in episode["achievements"] for episode in episodes)) for name in _achievements()
        },
    }


def _read(files: dict[str, list[Path]], name: str):
    from apprentice import store

    paths = list(itertools.chain(*files.values()))
    for path in paths:
        if rows := store.rows(path, episode_id=name):
            return store.from_rows(rows)
    raise WorkError(f"there is no episode {name!r} in {', '.join(map(str, paths))}; see apprentice traces list")


def _plain(text: str) -> str:
    from apprentice.cli.screen import plain

    return plain(text)
