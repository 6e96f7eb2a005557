"""The benchmark's achievement rates with their intervals as one picture, for a README or a paper."""

from pathlib import Path

from apprentice.files import replacing
from apprentice.stage import read_metrics

_GREY, _BLUE = "#808080", "#4a86d0"
"""Both can be read on white and on black."""


def draw(path: Path) -> None:
    """Write metrics/benchmark.json as an SVG or a PNG, as path ends; the same results give the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "results", "font.family": "sans-serif"}
    from matplotlib import pyplot

    scores = read_metrics("benchmark")
    rates = [100 * row["achievement_rate"] for row in scores.values()]
    bounds = [[100 * bound for bound in row["achievement_rate_ci95"]] for row in scores.values()]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.8 + 0.34 * len(scores)), layout="constrained")
    places = range(len(scores))
    axes.barh(places, rates, height=0.62, color=_BLUE)
    sides = [[rate - low, high - rate] for rate, (low, high) in zip(rates, bounds, strict=True)]
    axes.errorbar(rates, places, xerr=list(zip(*sides, strict=True)), fmt="none", ecolor=_GREY, capsize=3)
    for place, rate, (_, high) in zip(places, rates, bounds, strict=True):
        axes.annotate(f"{rate:.1f} %", (high, place), (6, 0), textcoords="offset points", va="center", color=_GREY)
    axes.set(yticks=places, yticklabels=list(scores), xlim=(0, 100), xlabel="achievement rate in %, with 95 % interval")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY)
    axes.xaxis.label.set_color(_GREY)
    with replacing(path) as partial:
        dated = {"metadata": {"Date": None}} if path.suffix.lower() == ".svg" else {}
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=150, transparent=True, **dated)
    pyplot.close(figure)
