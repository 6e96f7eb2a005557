"""What a run will take, before it: decisions, tokens, hours, GPU-hours and dollars of each stage, and how it's known.

Everything is reckoned from nothing and with every episode as long as it may be; what the ledger has already is neither
played nor paid again. rates.yaml and prices.yaml hold the rates, each with its date or the words «assumed» or «not
measured»: then the figures are a range.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq
from pyarrow.lib import ArrowException
from ruamel.yaml import YAML

from apprentice import compute, prompt
from apprentice.data.judge import LINES
from apprentice.endpoint import prices
from apprentice.files import replacing
from apprentice.params import Agent, Benchmark, Endpoint, Params, Profile, Prompt, Teacher
from apprentice.workers import cores
from apprentice.world.observation import SIZE, VIEW
from apprentice.world.world import World

RATES = Path(__file__).with_name("rates.yaml")
Range = tuple[float, float]
"""From and to; the same twice for what is known."""
_NOTHING = (0.0, 0.0)
_FORWARD = 1 / 3
"""What a token costs in validation, as a share of what it costs in training: that goes forward, forward again
(checkpointing) and back."""
_AGREEMENT = 1024
"""Decisions that the stage agreement asks for at most."""
_VISUAL_TOKEN = 32
"""Side in pixels of what a Qwen3-VL makes one token of; the tiny one makes a token of each of the 81 tiles."""


@dataclass(frozen=True)
class Line:
    """What one stage takes; None where it is not known."""

    stage: str
    decisions: int | None
    tokens: int | None
    """Of prompts and replies together, pictures included."""
    hours: Range | None
    """On the clock."""
    gpus: int
    gpu_hours: Range | None
    usd: Range | None
    how: str
    """The formula with its numbers."""
    sources: tuple[str, ...]


@lru_cache
def rates() -> dict:
    return YAML(typ="safe").load(RATES.read_text())


def record(
    model: str,
    card: str,
    date: str,
    sft_tokens_per_second: float | None = None,
    rl_tokens_per_second: float | None = None,
    play_decisions_per_second: float | None = None,
    path: Path = RATES,
) -> None:
    """Write rates that were measured on one card into rates.yaml; a rate that's None stays as it is.

    model: as params.yaml has it. card: SkyPilot's name (H200), or torch's (NVIDIA H200). date: 2026-12-01.
    """
    card = card.removeprefix("NVIDIA ").split()[0]
    measured = {
        "sft_tokens_per_second": sft_tokens_per_second,
        "rl_tokens_per_second": rl_tokens_per_second,
        "play_decisions_per_second": play_decisions_per_second,
    }
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 120, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    tree = yaml.load(path.read_text())
    known = tree["students"].setdefault(model, {}).setdefault(card, {})
    for name, rate in measured.items():
        if rate is not None:
            source = f"measured {date} on one {card}, benchmarks/gpu.py"
            known[name] = {"rate": float(f"{rate:.3g}"), "source": source}
    with replacing(path) as written, written.open("w") as file:
        yaml.dump(tree, file)
    rates.cache_clear()


def estimate(settings: Params, places: compute.Compute, folder: Path | None = None) -> dict:
    """{"profile", "stages": [each Line as a dict], "hours", "usd", "gpu_hours", "unknown": the stages that the last two
    lack}.

    places: on how many GPUs of which kind the stages run, wherever that is. folder: a checkout; where the pipeline has
    run there, its times set the pace.
    """
    lines = _lines(settings, places)
    if folder and (before := as_run(settings, folder)):
        lines = _paced(lines, {line.stage: line for line in _lines(before, places)}, _took(folder))
    return {
        "profile": settings.profile,
        "stages": [asdict(line) for line in lines],
        "hours": _sum(line.hours for line in lines),
        "usd": _sum(line.usd for line in lines),
        "gpu_hours": _sum(line.gpu_hours for line in lines),
        "unknown": [line.stage for line in lines if line.usd is None],
    }


def as_run(settings: Params, folder: Path) -> Params | None:
    """The settings that a checkout's pipeline was last run with, of what the estimate is made of; None if it wasn't."""

    def read(name: str):
        return json.loads((folder / f"data/settings/{name}.json").read_text())

    try:
        profile = Profile.model_validate({name: read(f"student/{name}") for name in Profile.model_fields})
        known = [name for name in settings.teachers if (folder / f"data/settings/teachers/{name}.json").exists()]
        played = {"seeds": tuple(read("benchmark/seeds")), "max_steps": read("benchmark/rules")["steps"]}
        return settings.model_copy(
            update={
                "profiles": {settings.profile: profile},
                "teachers": {name: Teacher.model_validate(read(f"teachers/{name}")) for name in known},
                "benchmark": settings.benchmark.model_copy(update=played),
            }
        )
    except (OSError, ValueError):
        return None


def _took(folder: Path) -> dict[str, float]:
    """Hours of each line's stages when they last ran, with as many cores as there are now."""
    hours: dict[str, float] = {}
    for file in sorted(folder.glob("metrics/times/*.json")):
        time = json.loads(file.read_text())
        kind, _, name = file.stem.partition("-")
        line = f"{kind}@{name}" if kind in ("collect", "import") else kind
        line = "filter, split" if kind in ("filter", "split") else line
        if time["cores"] == cores():
            hours[line] = hours.get(line, 0.0) + time["seconds"] / 3600
    return hours


def _paced(lines: list[Line], before: dict[str, Line], took: dict[str, float]) -> list[Line]:
    """Lines whose hours are what the stage took here before, by so much more or less as there is to do now.

    Not where a stage took less than a fifth of what was to be expected: it has found its work in the cache. Nor where
    there was four times as much to do, or a quarter: then its pace was another.
    """
    found = []
    for line in lines:
        expected, real = before[line.stage].hours if line.stage in before else None, took.get(line.stage, 0.0)
        more = sum(line.hours) / sum(expected) if line.hours and expected else 0.0
        if line.gpus or not expected or real < sum(expected) / 2 / 5 or not 1 / 4 <= more <= 4:
            found.append(line)
            continue
        share, hours = rates()["spread"]["share"], more * real
        how = f"{line.how}. It took {60 * real:.1f} minutes here, which counts"
        hours_now = hours * (1 - share), hours * (1 + share)
        found.append(replace(line, hours=hours_now, how=how, sources=(*line.sources, "metrics/times")))
    return found


def _lines(settings: Params, places: compute.Compute) -> list[Line]:
    teachers, rl = settings.teachers.values(), settings.active.rl
    lines = [_collect(name, teacher) for name, teacher in settings.teachers.items()]
    lines += [_import(name, Path(source.file)) for name, source in settings.imports.items()]
    played = sum(len(teacher.seeds) * _decisions(teacher, teacher.max_steps) for teacher in teachers)
    read = sum(line.decisions or 0 for line in lines)
    if settings.filter.min_judge_score is not None:
        lines.append(_judge("filter: judge", settings, sum(len(teacher.seeds) for teacher in teachers), played))
    lines.append(_here("filter, split", read, "filter_decisions_per_second", f"{read:,} decisions"))
    lines += _student(settings, places, read)
    distill = settings.active.distill
    if distill.rounds and (endpoint := distill.teacher.endpoint):
        episodes = distill.rounds * distill.worlds
        what = f"{episodes:,} episodes × at most {distill.max_steps} decisions of the student's own"
        where, most = f"profiles.{settings.profile}.distill.teacher", episodes * distill.max_steps
        lines.append(_chat("distill: teacher", endpoint, distill.teacher.prompt, where, most, what))
    if rl.reward.judge:
        episodes = rl.iterations * rl.groups * rl.group_size
        lines.append(_judge("rl: judge", settings, episodes, episodes * rl.max_steps))
    return lines + _agents(settings.benchmark)


def _sum(ranges: Iterable[Range | None]) -> Range:
    known = [found or _NOTHING for found in ranges]
    return sum(low for low, _ in known), sum(high for _, high in known)


def _hours(seconds: float, more: str = "share") -> Range:
    """more: which spread upwards, by its name in rates.yaml."""
    spread = rates()["spread"]
    return seconds / 3600 * (1 - spread["share"]), seconds / 3600 * (1 + spread[more])


def _here(stage: str, number: int, rate: str, what: str) -> Line:
    """Work on this machine's processor."""
    machine = rates()["machine"]
    how = f"{what}, {machine[rate]:,} a second"
    return Line(
        stage,
        *(number, None, _hours(number / machine[rate], "processor")),
        *(0, _NOTHING, _NOTHING),
        *(how, ("params.yaml", machine["source"])),
    )


def _collect(name: str, teacher: Teacher) -> Line:
    each = _decisions(teacher, teacher.max_steps)
    most = len(teacher.seeds) * each
    what = f"{len(teacher.seeds):,} episodes × at most {each} decisions"
    if teacher.endpoint is None:
        return _here(f"collect@{name}", most, "collect_decisions_per_second", what)
    return _chat(f"collect@{name}", teacher.endpoint, teacher.prompt, f"teachers.{name}", most, what)


def _agents(benchmark: Benchmark) -> list[Line]:
    """The benchmark's agents: those built in together, each that is paid for alone."""
    worlds, steps, lines = len(benchmark.seeds), benchmark.steps, []
    built_in = sum(agent.endpoint is None for agent in benchmark.agents.values())
    if built_in:
        what = f"{built_in} agents built in × {worlds:,} worlds × at most {steps:,} decisions"
        lines.append(_here("benchmark", built_in * worlds * steps, "collect_decisions_per_second", what))
    for name, agent in benchmark.agents.items():
        if agent.endpoint:
            each = _decisions(agent, steps)
            what = f"{worlds:,} worlds × at most {each:,} decisions"
            where = f"benchmark.agents.{name}"
            lines.append(_chat(f"benchmark@{name}", agent.endpoint, agent.prompt, where, worlds * each, what))
    return lines


def _decisions(agent: Agent, steps: int) -> int:
    """The most of an episode of so many steps."""
    return min(steps, agent.max_calls or steps)


def _chat(stage: str, endpoint: Endpoint, shown: Prompt, where: str, most: int, what: str) -> Line:
    """Play of a model behind an endpoint: a request for each decision."""
    picture = prices.picture_tokens(endpoint.model, *prompt.size(shown)) if shown.mode != "text" else 0
    return _asked(stage, endpoint, where, most, _text_tokens(shown) + picture, what)


def _import(name: str, path: Path) -> Line:
    try:
        if path.suffix == ".parquet":
            count = pq.read_metadata(path).num_rows
        else:
            with path.open("rb") as file:
                count = sum(1 for _ in file)
    except (OSError, ArrowException):
        return Line(
            f"import@{name}", None, None, None, 0, _NOTHING, _NOTHING, f"{path} cannot be read", ("params.yaml",)
        )
    return _here(f"import@{name}", count, "import_decisions_per_second", f"{count:,} lines, taken for a decision each")


def _judge(stage: str, settings: Params, episodes: int, decisions: int) -> Line:
    told = rates()["judge"]
    characters = min(decisions / max(1, episodes), LINES) * told["characters_per_decision"]
    shown = round(characters / rates()["text"]["characters_per_token"])
    line = _asked(stage, settings.judge.endpoint, "judge", episodes, shown, f"{episodes:,} episodes")
    return replace(line, decisions=None, sources=(*line.sources, f"length of the story: {told['source']}"))


def _asked(stage: str, endpoint: Endpoint, where: str, requests: int, shown: int, what: str) -> Line:
    """Requests to an endpoint, each with so many tokens in the prompt."""
    text, price = rates()["text"], prices.price(endpoint)
    said, seconds = text["completion_tokens"], text["seconds_per_reply"]
    how = f"{what} × ({shown:,} prompt + {said} reply tokens) to {endpoint.model}"
    sources = ["params.yaml", f"tokens and seconds of a reply: {text['source']}"]
    if price is None:
        usd = None
        how += f", whose price is not known: give it as {where}.endpoint.price"
    else:
        usd = requests * prices.dollars(price, shown, said)
        how += f" at ${price.input:g} and ${price.output:g} a million"
        sources.append("price: " + ("params.yaml" if endpoint.price else f"prices.yaml, {prices.table()['date']}"))
        if endpoint.max_cost_usd is not None and usd > endpoint.max_cost_usd:
            how += f"; stops at max_cost_usd, ${endpoint.max_cost_usd:g}"
    how += f"; {seconds} s a reply, {endpoint.concurrency} at once"
    hours = _hours(requests * seconds / endpoint.concurrency)
    cost = None if usd is None else (usd, usd)
    return Line(stage, requests, requests * (shown + said), hours, 0, _NOTHING, cost, how, tuple(sources))


@lru_cache
def _text_tokens(settings: Prompt) -> int:
    """Tokens of a prompt without its picture, from the very text at the start of a world."""
    system, user = prompt.messages(World(0).reset(), settings, inline=False)
    characters = len(system["content"]) + len(user["content"][-1]["text"]) + len(json.dumps(prompt.TOOLS))
    return round(characters / rates()["text"]["characters_per_token"])


@dataclass(frozen=True)
class _Share:
    """A part of a stage's work: so much of something, at one of the student's rates, on so many cards."""

    number: float
    rate: str
    what: str
    cards: int


def _student(settings: Params, places: compute.Compute, read: int) -> list[Line]:
    """The stages in which the student learns or plays; read: decisions of all teachers and imports."""
    profile, benchmark, kept = settings.active, settings.benchmark, rates()["kept"]
    sft, distill, rl, model = profile.sft, profile.distill, profile.rl, profile.student.model
    token = SIZE // VIEW[0] if model == "tiny" else _VISUAL_TOKEN
    sides = prompt.size(profile.prompt) if profile.prompt.mode != "text" else (0, 0)
    picture = math.prod(-(-side // token) for side in sides)
    each = _text_tokens(profile.prompt) + picture + rates()["text"]["completion_tokens"]
    val_fraction = settings.split.val_fraction
    rows, held_out = (round(read * kept["share"] * part) for part in (1 - val_fraction, val_fraction))
    trained, steps = round(rows * sft.epochs), rows * sft.epochs / sft.batch_size
    validations = int(steps // sft.eval_steps) if sft.eval_steps >= 1 else round(1 / sft.eval_steps)
    validated = min(held_out, sft.eval_rows or held_out)
    tried = validations * len(sft.evaluation.seeds) * sft.evaluation.max_steps if sft.evaluation else 0
    evaluations = -(-rl.iterations // rl.evaluation.every) + 1
    episodes = rl.iterations * rl.groups * rl.group_size + evaluations * len(rl.evaluation.seeds)
    share = f"{kept['share']:.1%} kept"
    rehearsed, relearnt = distill.rounds * distill.worlds, distill.rounds * distill.steps * distill.batch_size
    updated, students = rl.iterations * rl.decisions * rl.epochs, len(benchmark.students)
    tested, agreed = students * len(benchmark.seeds) * benchmark.steps, min(held_out, _AGREEMENT)

    def line(stage: str, plays: int, trains: int, validates: int, what: str) -> Line:
        """So many decisions to play, to train on, and to validate on; the last are in the hours only."""
        decisions, place = plays + trains, places.stages.get(stage)  # type: ignore[call-overload]
        how, known = f"{what}; {each:,} tokens a decision", rates()["students"].get(model, {})
        sources: tuple[str, ...] = ("params.yaml", f"tokens: {rates()['text']['source']}")
        card, cards = ("cpu", 0) if "cpu" in known else place.cards if place else (None, 0)
        if card is None:
            how += f"; compute.yaml names no accelerators for {stage}"
        elif card not in known or (card != "cpu" and card not in rates()["gpu_hour"]):
            how += f"; rates.yaml has no rates or no price for {model} on {card}"
            card = None
        if card is None:
            return Line(stage, decisions, decisions * each, None, cards, None, None, how, sources)
        serving = len(places.vllm.gpus or ()) if stage in ("distill", "rl") else 0  # the others train
        rate = "rl_tokens_per_second" if stage == "rl" else "sft_tokens_per_second"
        shares = [
            _Share(plays, "play_decisions_per_second", "plays {} decisions", serving or cards),
            _Share(trains * each, rate, "trains on {} tokens", max(1, cards - serving)),
            _Share(validates * each * _FORWARD, rate, "validates on three times {} tokens", cards),
        ]
        low = high = 0.0
        for share in shares:
            if share.number:
                found = known[card][share.rate]
                slow, fast = _both(found["rate"])
                many = max(1, share.cards)
                low, high = low + share.number / fast / many, high + share.number / slow / many
                how += f"; {share.what.format(_span(slow * many, fast * many))} a second"
                if (source := f"{share.rate}: {found['source']}") not in sources:
                    sources += (source,)
        hours = low / 3600, high / 3600
        if not cards:
            begun = rates()["machine"]["begin_seconds"] * (students if stage == "benchmark_student" else 1)
            begins, spread = _hours(begun, "processor"), rates()["spread"]
            slower = (1 + spread["processor"]) / (1 + spread["share"])
            hours = hours[0] + begins[0], hours[1] * slower + begins[1]
            how += f"; {begun} seconds to begin"
            return Line(stage, decisions, decisions * each, hours, 0, _NOTHING, _NOTHING, how, sources)
        if place and place.where == "sky":
            setup = rates()["setup"]
            hours = hours[0] + setup["minutes"][0] / 60, hours[1] + setup["minutes"][1] / 60
            how += f"; {_span(*setup['minutes'])} minutes of set-up"
            sources += (f"set-up: {setup['source']}",)
        price = rates()["gpu_hour"]
        how += f"; {cards} × {card} at ${price[card]:.2f} an hour"
        sources += (f"price of an hour: {price['source']}",)
        spent = cards * hours[0], cards * hours[1]
        usd = spent[0] * price[card], spent[1] * price[card]
        return Line(stage, decisions, decisions * each, hours, cards, spent, usd, how, sources)

    lines = [
        line(
            "sft",
            *(tried, trained, validations * validated),
            f"{rows:,} rows ({share}) × {sft.epochs:g} epochs, validated {validations} × {validated:,}"
            + (f", {len(sft.evaluation.seeds)} held-out worlds each time" if sft.evaluation else ""),
        ),
        line(
            "distill",
            *(rehearsed * distill.max_steps, relearnt, 0),
            f"{rehearsed:,} episodes × at most {distill.max_steps} decisions, {relearnt:,} rows trained on",
        ),
        line(
            "rl",
            *(episodes * rl.max_steps, updated, 0),
            f"{episodes:,} episodes × at most {rl.max_steps} decisions, {rl.iterations} × {rl.decisions:,} trained on",
        ),
        line("agreement", *(agreed, 0, 0), f"{agreed:,} held-out decisions"),
        line(
            "benchmark_student",
            *(tested, 0, 0),
            f"{students} students × {len(benchmark.seeds)} worlds × at most {benchmark.steps} decisions",
        ),
    ]
    lines[0] = replace(lines[0], sources=(*lines[0].sources, f"share kept: {kept['source']}"))
    if model == "tiny":
        pretraining = profile.student.pretraining
        frames = pretraining.steps * pretraining.batch_size
        lines.insert(0, _here("student", frames, "pretraining_frames_per_second", f"{frames:,} frames of random play"))
    return lines


def _both(rate: float | list[float]) -> Range:
    """The low and the high rate; of a measured one, the spread around it."""
    if isinstance(rate, list):
        return rate[0], rate[1]
    spread = rates()["spread"]["share"]
    return rate / (1 + spread), rate / (1 - spread)


def _span(low: float, high: float) -> str:
    return f"{low:,.4g}" if low == high else f"{low:,.0f} to {high:,.0f}"
