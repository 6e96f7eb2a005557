"""The report: one HTML file with everything in it; results, training, and replays of chosen episodes.

Python gathers the data, report.js draws it, report.html holds both. What a model has written gets into the page as JSON
and from there as text: nothing is ever put together as HTML. A content security policy with the hashes of our own
script and style lets no other run, and nothing be fetched.
"""

import base64
import csv
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from apprentice import prompt, store
from apprentice.params import Params, Prompt
from apprentice.stage import read_metrics
from apprentice.world import png
from apprentice.world.observation import ACHIEVEMENTS, ACTIONS, SIZE, VITALS, constants

BYTES = 9_000_000
"""What the pictures and texts of replays may weigh together: the page stays under 10 MB."""
_DECISIONS = 400
"""The most decisions of an episode that are shown."""
_SHEET = 200
"""Pictures in a sheet: 200 × 72 pixels is a height that every browser takes."""
CURVES = ("sft_train", "sft_val", "sft_held_out", "distill", "distill_train", "rl", "rl_training", "rl_held_out")
_ROLLOUTS = Path("data/rl/rollouts.parquet")


def page(data: dict) -> str:
    """The HTML file for this data (JSON-able)."""
    html, css, js = (Path(__file__).with_name(name).read_text() for name in ("report.html", "report.css", "report.js"))
    values = {"css": css, "js": js, "data": inert(data), "css-hash": _hash(css), "js-hash": _hash(js)}
    # Split once, so that nobody searches what was put in: a reply may say {{js}} too.
    pieces = re.split(r"\{\{([\w-]+)\}\}", html)
    return "".join(values[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def inert(data: dict) -> str:
    """JSON that can't end its script element or begin a comment; all in ASCII, U+2028 and its like escaped."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def gather(settings: Params, worlds: tuple[int, ...] = ()) -> dict:
    """Everything that the page shows, from metrics/ and data/ of the folder it's called in.

    worlds: seeds of the benchmark to replay; otherwise median, best and worst of the last agent, as many as fit.
    """
    benchmark, profile = settings.benchmark, settings.active
    statistics, times = read_metrics("statistics"), _times(settings)
    return {
        "facts": {
            "protocol": "almost balrog" if settings.departures else benchmark.protocol,
            "worlds": len(benchmark.seeds),
            "steps": benchmark.steps,
            "profile": settings.profile,
            "model": "a tiny Qwen3-VL" if profile.student.model == "tiny" else profile.student.model,
            "toy": statistics["toy"],
            "run": ran(times),
        },
        "agents": _agents(settings, statistics["intervals"]),
        "achievements": tree(),
        "differences": read_metrics("differences"),
        "warnings": statistics["warnings"],
        "published": YAML(typ="safe").load(Path(__file__).with_name("published.yaml").read_text()),
        "funnel": read_metrics("filter") | {"split": read_metrics("split")},
        "curves": {name: curve(Path(f"metrics/plots/{name}.csv")) for name in CURVES},
        "agreement": _agreement(Path("metrics/plots/agreement.csv")),
        "costs": read_metrics("cost") | {"distill": read_metrics("distill")},
        "times": times,
        "replays": replays(benchmark.names, worlds),
        "sheet": _SHEET,
    }


def _agents(settings: Params, intervals: dict) -> list[dict]:
    """A row for each agent, in the order of the parameters: who it is, its scores, their intervals, what it took."""
    scores, kinds = read_metrics("benchmark"), dict.fromkeys(settings.benchmark.students, "student")
    for name, agent in settings.benchmark.agents.items():
        kinds[name] = agent.endpoint.model if agent.endpoint else "built in"
    return [
        {
            "name": name,
            "kind": kinds[name],
            "score": row,
            "ci95": intervals[name],
            "play": read_metrics(f"benchmark/{name}"),
        }
        for name, row in scores.items()
    ]


@cache
def tree() -> list[dict]:
    """The 22 achievements as Crafter's rules order them: {"name", "needs": what comes directly before, "tier"}.

    tier: how many must come before it, along the longest way.
    """
    makes = {item: f"collect_{item}" for rule in constants.collect.values() for item in rule["receive"]}
    makes |= {name: f"place_{name}" for name in constants.place if f"collect_{name}" not in ACHIEVEMENTS}
    makes |= {name: f"make_{name}" for name in constants.make}
    needs: dict[str, set[str]] = {name: set() for name in ACHIEVEMENTS}
    for rule in constants.collect.values():
        for item in rule["receive"]:
            needs[f"collect_{item}"] |= {makes[tool] for tool in rule["require"]}
    for verb, rules in (("place", constants.place), ("make", constants.make)):
        for name, rule in rules.items():
            needs[f"{verb}_{name}"] |= {makes[item] for item in [*rule["uses"], *rule.get("nearby", ())]}
    needs["eat_plant"] = {"place_plant"}

    @cache
    def before(name: str) -> frozenset[str]:
        return frozenset(needs[name]).union(*(before(one) for one in needs[name]))

    @cache
    def tier(name: str) -> int:
        return 1 + max(map(tier, needs[name])) if needs[name] else 0

    def direct(name: str) -> list[str]:
        return sorted(one for one in needs[name] if not any(one in before(other) for other in needs[name]))

    return [{"name": name, "needs": direct(name), "tier": tier(name)} for name in ACHIEVEMENTS]


def curve(path: Path) -> dict[str, list[float | None]]:
    """The columns of a CSV file of numbers; a value that isn't there, or isn't finite, is None."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def _number(text: str) -> float | None:
    value = float(text or "nan")
    return value if np.isfinite(value) else None


def _agreement(path: Path) -> dict:
    """How often the student answers each of the teacher's actions with which: rows the teacher's, in order."""
    counts: dict[tuple[str, str], int] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            counts[row["teacher"], row["student"]] = counts.get((row["teacher"], row["student"]), 0) + 1
    found = {name for pair in counts for name in pair}
    names = [name for name in (*ACTIONS, "invalid") if name in found]
    return {"names": names, "counts": [[counts.get((one, other), 0) for other in names] for one in names]}


def _times(settings: Params) -> list[dict]:
    """What each stage took, in the order of the pipeline."""
    names = [*(f"collect-{name}" for name in settings.teachers), *(f"import-{name}" for name in settings.imports)]
    names += ["filter", "split", "student", "sft", "agreement", "distill", "rl"]
    names += [f"benchmark-{name}" for name in settings.benchmark.agents]
    names += [*(f"benchmark_student-{name}" for name in settings.benchmark.students), "score"]
    return [{"stage": name} | read_metrics(f"times/{name}") for name in names]


def ran(times: list[dict]) -> dict | None:
    """Where, when and of which commit the stages ran, as they have written it themselves; None if none has.

    The page is of DVC's outputs, which may come from its cache: what counts is when and where they were computed.
    """
    known = [stage for stage in times if "date" in stage]  # an older version's has only seconds and cores
    if not known:
        return None

    def commit(stage: dict) -> str | None:
        return stage["commit"] and stage["commit"] + (" with changes" if stage["changed"] else "")

    last = max(known, key=lambda stage: stage["date"])
    machines = dict.fromkeys(f"{stage['cores']} cores of {stage['processor']}" for stage in known)
    others = {commit(stage) for stage in known} - {commit(last), None}
    return {"date": last["date"], "commit": commit(last), "others": sorted(others), "machines": list(machines)}


class _Replays:
    """Episodes as the page wants them: texts and inventories named once, pictures in sheets; and what they weigh."""

    def __init__(self):
        self.texts: dict[str, int] = {}
        self.sheets: list[str] = []
        self.worlds: list[dict] = []
        self.weight = 0

    def text(self, text: str) -> int:
        if text not in self.texts:
            self.texts[text] = len(self.texts)
            self.weight += len(json.dumps(text))
        return self.texts[text]

    def add(self, world: dict, episodes: list[tuple[dict, list[dict]]], most: int) -> bool:
        """Add a world with its episodes (what is known of each, its rows) unless they are too heavy."""
        texts, sheets, weight = dict(self.texts), len(self.sheets), self.weight
        found = [facts | self._episode(rows, most) for facts, rows in episodes]
        self.weight += sum(len(json.dumps(episode)) for episode in found)
        if self.weight > BYTES:
            self.texts, self.weight = texts, weight
            del self.sheets[sheets:]
            return False
        self.worlds.append(world | {"episodes": found})
        return True

    def _episode(self, rows: list[dict], most: int) -> dict:
        episode = store.from_rows(rows)
        shown = Prompt.model_validate_json(episode.prompt)
        places: dict[bytes, int] = {}
        steps = []
        for step, row in zip(episode.steps[:most], rows, strict=False):
            observation, reply = step.observation, step.reply
            system, user = prompt.messages(observation, shown, step.history, inline=False)
            seen = {
                "step": step.step,
                "picture": places.setdefault(observation.png, len(places)),
                "vitals": [observation.vitals[name] for name in VITALS],
                "inventory": self.text(json.dumps({name: n for name, n in observation.inventory.items() if n})),
                "system": self.text(system["content"]),
                "user": self.text(user["content"][-1]["text"]),
                "reply": self.text(said(reply.message)),
                "invalid": self.text(step.invalid),
                "executed": self.text(" ".join(step.executed)),
                "reward": round(step.reward, 4),
                "unlocked": list(step.unlocked),
                "advantage": row.get("advantage"),
            }
            steps.append(seen)
        sheets = []
        pictures = list(places)
        for start in range(0, len(pictures), _SHEET):
            sheets.append(len(self.sheets))
            self.sheets.append(base64.b64encode(sheet(pictures[start : start + _SHEET])).decode())
            self.weight += len(self.sheets[-1])
        return {
            "seed": episode.seed,
            "columns": {name: [step[name] for step in steps] for name in steps[0] if name != "advantage"}
            | ({"advantage": [round(step["advantage"], 4) for step in steps]} if "advantage" in rows[0] else {}),
            "sheets": sheets,
            "mode": shown.mode,
            "scale": shown.scale,
            "length": episode.length,
            "decisions": len(episode.steps),
            "achievements": len(set(episode.unlocked)),
            "reward": round(episode.reward, 2),
            "ending": episode.steps[-1].ending,
        }


def said(message: dict) -> str:
    """A reply as it came: its text, then its tool calls."""
    lines = [text] if (text := prompt.said(message)) else []
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            arguments = function.get("arguments")
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            lines.append(f"{function.get('name')}({arguments})")
        else:
            lines.append(json.dumps(call))
    return "\n".join(lines)


def sheet(pictures: list[bytes]) -> bytes:
    """PNGs of the same size below one another, as one PNG without loss.

    Its lines are unfiltered (`png.encode`): a tile that comes again is found again, which takes a third less than a PNG
    for each.
    """
    return png.encode(np.concatenate([png.decode(data) for data in pictures]), 9)


def ranked(path: Path) -> list[int]:
    """The seeds of a file of the benchmark, by the achievements unlocked there: the most come last."""
    return [seed for _, seed in sorted((count, seed) for seed, count in store.outcomes(path) if seed is not None)]


def replays(agents: tuple[str, ...], worlds: tuple[int, ...] = ()) -> dict:
    """Episodes to watch: for each chosen world every agent's, and of RL's first and last iteration two to compare."""
    found, files = _Replays(), {name: Path(f"data/benchmark/{name}.parquet") for name in agents}
    worlds_by_outcome = ranked(files[agents[-1]])
    median, best, worst = (worlds_by_outcome[place] for place in (len(worlds_by_outcome) // 2, -1, 0))
    labels = {best: f"the best of {agents[-1]}", worst: f"the worst of {agents[-1]}"}
    labels[median] = f"the median of {agents[-1]}"

    def add(seed: int, most: int = _DECISIONS) -> bool:
        episodes = [({"agent": name}, store.rows(file, seed=seed)) for name, file in files.items()]
        return found.add({"seed": seed, "label": labels.get(seed, "")}, [one for one in episodes if one[1]], most)

    first, *others = dict.fromkeys(worlds or (median, best, worst))
    most = _DECISIONS
    while not add(first, most):
        most //= 2  # so many agents, or such long texts, that not even one world fits in whole
    if not worlds:
        for world, episodes in _rollouts():
            found.add(world, episodes, most)
    for seed in others:
        add(seed, most)
    return {"texts": list(found.texts), "sheets": found.sheets, "worlds": found.worlds, "size": SIZE}


def _rollouts() -> Iterator[tuple[dict, list[tuple[dict, list[dict]]]]]:
    """Of the first and the last iteration the world on which its episodes differ most: the best and the worst there."""
    known = pq.read_table(_ROLLOUTS, columns=["iteration", "seed", "step", "reward"]).to_pylist()
    starts = [place for place, row in enumerate(known) if row["step"] == 0]
    episodes = [
        (known[start]["iteration"], known[start]["seed"], sum(row["reward"] for row in known[start:end]), start, end)
        for start, end in zip(starts, [*starts[1:], len(known)], strict=True)
    ]
    iterations = sorted({episode[0] for episode in episodes})
    table = pq.read_table(_ROLLOUTS)
    for iteration in dict.fromkeys((iterations[0], iterations[-1])):
        groups = {}
        for episode in episodes:
            if episode[0] == iteration:
                groups.setdefault(episode[1], []).append(episode)
        seed, group = max(groups.items(), key=lambda item: (np.ptp([episode[2] for episode in item[1]]), -item[0]))
        ranked = sorted(group, key=lambda episode: -episode[2])
        chosen = {"best": ranked[0], "worst": ranked[-1]} if len(ranked) > 1 else {"only": ranked[0]}
        world = {"seed": seed, "label": f"RL, iteration {iteration}", "rollouts": len(group)}
        yield (
            world,
            [
                ({"agent": f"{name} of {len(group)} rollouts"}, table.slice(start, end - start).to_pylist())
                for name, (_, _, _, start, end) in chosen.items()
            ],
        )
