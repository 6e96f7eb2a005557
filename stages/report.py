"""report: results, training and replays as one page that needs nothing else; metrics/report.html.

    dvc repro report        or: python stages/report.py

The page is a function of what's in metrics/ and data/. How long stages took is in there too: each stage has written it
as an out of its own, metrics/times/<stage>.json. `apprentice report` builds the page with other worlds to replay.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.stage import run


def main() -> None:
    """Write metrics/report.html."""
    settings = params.load()

    from apprentice.files import replacing
    from apprentice.results import report, table

    data = report.gather(settings)
    page = Path("metrics/report.html")
    with replacing(page) as unfinished:
        unfinished.write_text(report.page(data))
    worlds = ", ".join(str(world["seed"]) for world in data["replays"]["worlds"])
    print(f"report: {page}, {page.stat().st_size / 1e6:.1f} MB; replays of the worlds {worlds}\n")
    table.show(settings)


if __name__ == "__main__":
    run(main, timed=False)  # it depends on all times
