"""`apprentice report`: the page with results and replays, of other worlds than the pipeline chose."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from apprentice import params
from apprentice.cli.results import made
from apprentice.errors import ConfigError


def report(
    worlds: Annotated[str, typer.Option(help='Seeds of the benchmark to replay: "200003,200040-200042".')] = "",
    out: Annotated[Path, typer.Option(help="The page, .html; or the results as one figure, .svg or .png.")] = Path(
        "report.html"
    ),
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Results, training and replays as one page that needs no network.

    `dvc repro` writes metrics/report.html; this is for other worlds to replay, and for a figure of the results.

    Example: apprentice report --worlds 200003,200040 --open
    """
    if out.suffix.lower() not in (".html", ".svg", ".png"):
        raise ConfigError(f"--out {out}: it must end in .html, .svg or .png")
    settings = params.load()
    try:
        seeds = params.seeds(worlds) if worlds else ()
    except ValueError as error:
        raise ConfigError(f"--worlds: {error}") from None
    if others := sorted(set(seeds) - set(settings.benchmark.seeds)):
        raise ConfigError(f"--worlds: nobody has played {others[0]}; choose from benchmark.seeds in params.yaml")

    if out.suffix.lower() != ".html":
        _figure(out, worlds)
        return

    from apprentice.results import report as drawn

    with made():
        data = drawn.gather(settings, seeds)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(drawn.page(data))
    shown = [world["seed"] for world in data["replays"]["worlds"]]
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, replays of the worlds {', '.join(map(str, shown))}")
    if left_out := [seed for seed in seeds if seed not in shown]:
        print(f"left out, for the page would be over 10 MB: {', '.join(map(str, left_out))}")
    if show:
        webbrowser.open(out.resolve().as_uri())


def _figure(out: Path, worlds: str) -> None:
    if worlds:
        raise ConfigError("--worlds is for replays, which a figure has not; leave it out, or --out report.html")
    from apprentice.results import figure

    with made():
        figure.draw(out)
    print(f"written: {out}")
