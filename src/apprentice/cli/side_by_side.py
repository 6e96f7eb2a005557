"""`apprentice film`: how agents of the benchmark played the same world, as one film."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apprentice import params
from apprentice.cli import agents
from apprentice.errors import ConfigError, WorkError

if TYPE_CHECKING:
    from apprentice.episode import Episode

_SIZE = 216
"""Side of each picture in pixels: three fit into a page of documentation."""


def film(
    names: Annotated[
        list[str],
        typer.Argument(metavar="AGENT…", help="Agents of the benchmark, left to right.", autocompletion=agents.names),
    ],
    out: Annotated[list[Path], typer.Option(help="The film, .gif or .mp4; twice for both.")],
    seed: Annotated[
        int | None, typer.Option(min=0, help="A world of benchmark.seeds; otherwise the last agent's median one.")
    ] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=100, help="Environment steps a second.")] = 10,
) -> None:
    """Agents side by side on one world, as the benchmark recorded them: nobody plays anew.

    Example: apprentice film base sft rl --out rl.gif --out rl.mp4
    """
    for path in out:
        if path.suffix.lower() not in (".gif", ".mp4"):
            raise ConfigError(f"{path} must end in .gif or .mp4")
    benchmark = params.load().benchmark
    for name in names:
        if name not in benchmark.names:
            raise ConfigError(f"the benchmark has no agent {name!r}; it has {', '.join(benchmark.names)}")

    from apprentice.cli import watch
    from apprentice.cli.film import write_side_by_side

    files = [Path(f"data/benchmark/{name}.parquet") for name in names]
    for path in files:
        if not path.exists():
            raise WorkError(f"there is no {path} yet: run dvc repro first")
    if seed is None:
        from apprentice.results.report import ranked

        seeds = ranked(files[-1])
        seed = seeds[len(seeds) // 2]
    played = [_episode(path, seed) for path in files]

    def moments(episode: "Episode") -> Iterator[watch.Moment]:
        return watch.moments(episode, _SIZE, benchmark.opening)

    for path in out:
        write_side_by_side(path, [(name, moments(one)) for name, one in zip(names, played, strict=True)], _SIZE, fps)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {', '.join(names)} on world {seed}")


def _episode(path: Path, seed: int) -> "Episode":
    from apprentice import store

    if rows := store.rows(path, seed=seed):
        return store.from_rows(rows)
    raise ConfigError(f"--seed {seed}: {path.stem} has not played this world; choose from benchmark.seeds")
