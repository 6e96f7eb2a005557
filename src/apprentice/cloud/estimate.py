"""What a run will take, before it: decisions, tokens, hours, GPU-hours and dollars of each stage, and how it's known.

Everything is reckoned from nothing and with every episode as long as it may be; what the ledger has already is neither
played nor paid again. rates.yaml and prices.yaml hold the rates, each with its date or the word «assumed».
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from ruamel.yaml import YAML

from apprentice import prompt
from apprentice.data.judge import LINES
from apprentice.endpoint import prices
from apprentice.params import Endpoint, Params, Prompt, Teacher
from apprentice.world.observation import SIZE
from apprentice.world.world import World

_VISUAL_TOKEN = 32
"""Side in pixels of what a Qwen3-VL makes one token of; the tiny one makes a token of each of the 81 tiles."""


@dataclass(frozen=True)
class Line:
    """What one stage takes; None where it is not known."""

    stage: str
    decisions: int | None
    tokens: int | None
    """Of prompts and replies together, pictures included."""
    hours: tuple[float, float] | None
    """On the clock, from and to."""
    gpus: int
    gpu_hours: float | None
    usd: float | None
    how: str
    """The formula with its numbers."""
    sources: tuple[str, ...]


@lru_cache
def rates() -> dict:
    return YAML(typ="safe").load(Path(__file__).with_name("rates.yaml").read_text())


def estimate(settings: Params) -> dict:
    """{"profile", "stages": [each Line as a dict], "usd", "gpu_hours", "unknown": the stages that the sums lack}."""
    teachers, rl = settings.teachers.values(), settings.active.rl
    lines = [_collect(name, teacher) for name, teacher in settings.teachers.items()]
    lines += [_import(name, Path(source.file)) for name, source in settings.imports.items()]
    played = sum(len(teacher.seeds) * teacher.max_steps for teacher in teachers)
    read = sum(line.decisions or 0 for line in lines)
    if settings.filter.min_judge_score is not None:
        lines.append(_judge("filter: judge", settings, sum(len(teacher.seeds) for teacher in teachers), played))
    lines.append(_here("filter, split", read, "filter_decisions_per_second", f"{read:,} decisions"))
    lines += _student(settings, read)
    if rl.reward.judge:
        episodes = rl.iterations * rl.groups * rl.group_size
        lines.append(_judge("rl: judge", settings, episodes, episodes * rl.max_steps))
    return {
        "profile": settings.profile,
        "stages": [asdict(line) for line in lines],
        "usd": sum(line.usd or 0.0 for line in lines),
        "gpu_hours": sum(line.gpu_hours or 0.0 for line in lines),
        "unknown": [line.stage for line in lines if line.usd is None],
    }


def _hours(seconds: float) -> tuple[float, float]:
    spread = rates()["spread"]["share"]
    return seconds / 3600 * (1 - spread), seconds / 3600 * (1 + spread)


def _here(stage: str, number: int, rate: str, what: str) -> Line:
    """Work on this machine's processor."""
    machine = rates()["machine"]
    how = f"{what}, {machine[rate]:,} a second"
    return Line(
        stage, number, None, _hours(number / machine[rate]), 0, 0.0, 0.0, how, ("params.yaml", machine["source"])
    )


def _collect(name: str, teacher: Teacher) -> Line:
    most = len(teacher.seeds) * teacher.max_steps
    what = f"{len(teacher.seeds):,} episodes × at most {teacher.max_steps} decisions"
    if teacher.endpoint is None:
        return _here(f"collect@{name}", most, "collect_decisions_per_second", what)
    side = SIZE * teacher.prompt.scale
    picture = prices.picture_tokens(teacher.endpoint.model, side, side) if teacher.prompt.mode != "text" else 0
    shown = _text_tokens(teacher.prompt) + picture
    return _asked(f"collect@{name}", teacher.endpoint, f"teachers.{name}", most, shown, what)


def _import(name: str, path: Path) -> Line:
    try:
        with path.open("rb") as file:
            count = sum(1 for _ in file)
    except OSError:
        return Line(f"import@{name}", None, None, None, 0, 0.0, 0.0, f"{path} cannot be read", ("params.yaml",))
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
    return Line(stage, requests, requests * (shown + said), hours, 0, 0.0, usd, how, tuple(sources))


@lru_cache
def _text_tokens(settings: Prompt) -> int:
    """Tokens of a prompt without its picture, from the very text at the start of a world."""
    system, user = prompt.messages(World(0).reset(), settings, inline=False)
    characters = len(system["content"]) + len(user["content"][-1]["text"]) + len(json.dumps(prompt.TOOLS))
    return round(characters / rates()["text"]["characters_per_token"])


def _student(settings: Params, read: int) -> list[Line]:
    """The stages in which the student learns or plays; read: decisions of all teachers and imports."""
    profile, benchmark, kept = settings.active, settings.benchmark, rates()["kept"]
    sft, rl, model = profile.sft, profile.rl, profile.student.model
    side = -(-SIZE * profile.prompt.scale // _VISUAL_TOKEN)
    picture = 0 if profile.prompt.mode == "text" else 81 if model == "tiny" else side**2
    each = _text_tokens(profile.prompt) + picture + rates()["text"]["completion_tokens"]
    rate = rates()["students"].get(model)

    def line(stage: str, plays: int, trains: int, what: str) -> Line:
        """So many decisions to play and to train on."""
        decisions, tokens = plays + trains, (plays + trains) * each
        how = f"{what}; {each:,} tokens a decision"
        sources = ("params.yaml", f"tokens: {rates()['text']['source']}")
        if rate is None:
            how += f"; rates.yaml has no rates for {model}"
            return Line(stage, decisions, tokens, None, 0, None, None, how, sources)
        seconds = 0.0
        if plays:
            seconds += plays / rate["play_decisions_per_second"]
            how += f"; plays {rate['play_decisions_per_second']:g} decisions a second"
        if trains:
            seconds += trains * each / rate[f"{stage}_tokens_per_second"]
            how += f"; trains {rate[f'{stage}_tokens_per_second']:,} tokens a second"
        sources += (f"rates: {rate['source']}",)
        gpus, hour = rate["gpus"][stage], rates()["gpu_hour"]
        if gpus:
            how += f"; {gpus} × H200 at ${hour['usd']:.2f} an hour"
            sources += (f"price of an hour: {hour['source']}",)
        spent = gpus * seconds / 3600
        return Line(stage, decisions, tokens, _hours(seconds), gpus, spent, spent * hour["usd"], how, sources)

    rows = round(read * kept["share"] * (1 - settings.split.val_fraction))
    evaluations = -(-rl.iterations // rl.evaluation.every) + 1
    episodes = rl.iterations * rl.groups * rl.group_size + evaluations * len(rl.evaluation.seeds)
    students = len(benchmark.students)
    lines = [
        line("sft", 0, round(rows * sft.epochs), f"{rows:,} rows ({kept['share']:.1%} kept) × {sft.epochs:g} epochs"),
        line(
            "rl",
            episodes * rl.max_steps,
            rl.iterations * rl.decisions * rl.epochs,
            f"{episodes:,} episodes × at most {rl.max_steps} decisions, {rl.iterations} × {rl.decisions:,} trained on",
        ),
        line(
            "benchmark_student",
            students * len(benchmark.seeds) * benchmark.steps,
            0,
            f"{students} students × {len(benchmark.seeds)} worlds × at most {benchmark.steps} decisions",
        ),
    ]
    lines[0] = replace(lines[0], sources=(*lines[0].sources, f"share kept: {kept['source']}"))
    if model == "tiny":
        pretraining = profile.student.pretraining
        frames = pretraining.steps * pretraining.batch_size
        lines.insert(0, _here("student", frames, "pretraining_frames_per_second", f"{frames:,} frames of random play"))
    return lines
