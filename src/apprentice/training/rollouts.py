"""RL's episodes: shared out among the ranks, kept in the ledger as they end, read back by every rank."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apprentice import store
from apprentice.episode import Episode, Step
from apprentice.errors import WorkError
from apprentice.files import replacing
from apprentice.ledger import Ledger
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.policy import Policy, Turn
from apprentice.serving.in_process import InProcess, Sample, shown
from apprentice.student.encoding import Encoded

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

_SAMPLE = pa.schema(
    [
        pa.field("answer_ids", pa.list_(pa.int32())),
        pa.field("logprobs", pa.list_(pa.float64())),
        pa.field("hidden", pa.list_(pa.float32())),
    ]
)
"""What a trainer needs of a reply, beside a trace's columns; the prompt's tokens follow from what was observed."""


def play_share(
    policy: Callable[[int], Policy],
    spec: Spec,
    ledger: Ledger,
    rank: int = 0,
    ranks: int = 1,
) -> dict[int, Episode]:
    """Play a rank's `parties`, and keep them in the ledger; returns the episodes by their place in the spec's seeds."""
    played = {}

    def keep(places: Sequence[int], at: int, episode: Episode) -> None:
        played[places[at]] = episode
        ledger.add(key(spec, places[at]), to_bytes(episode))

    for places, players, party in parties(policy, spec, ledger, rank, ranks):
        play(players, party, partial(keep, places))
    return played


def parties(
    policy: Callable[[int], Policy], spec: Spec, ledger: Ledger, rank: int, ranks: int
) -> Iterator[tuple[Sequence[int], Policy, Spec]]:
    """Those episodes of a rank's share that the ledger lacks: the places of some that are played at once, their policy,
    and the spec of these alone.

    policy(place): a policy whose draws depend on the place, so that they are the same whatever was played before. If
    one of an in-process policy's company is missing, the company is played again as a whole, and all of it by one rank.
    Episodes of other policies are independent of each other: each rank has as many.
    """
    seeds = spec.seeds
    in_company = isinstance(policy(0), InProcess)
    together = spec.together if in_company else 1
    done = ledger.keys()
    missing = [
        place for place in range(len(seeds)) if place // together % ranks == rank and key(spec, place) not in done
    ]
    if not missing:
        return
    companies: list[Sequence[int]] = [missing]
    if in_company:
        starts = sorted({place // together * together for place in missing})
        companies = [range(start, min(start + together, len(seeds))) for start in starts]
    for places in companies:
        players = policy(places[0]) if in_company else _Apart(map(policy, places))
        yield places, players, replace(spec, seeds=[seeds[place] for place in places])


def key(spec: Spec, place: int) -> str:
    """The ledger's key of the episode at this place in the spec's seeds."""
    return f"{spec.fingerprint} {place}"


class _Apart:
    """A policy of its own for each episode, in the order in which they begin."""

    name = "student"

    def __init__(self, policies: Iterator[Policy]):
        self._policies = policies

    def begin(self, seed: int):
        return next(self._policies).begin(seed)


def read(ledger: Ledger, name: str, places: Iterable[int]) -> Iterator[Episode]:
    """Episodes of this name, in order, with what a trainer needs of their replies."""
    for data in ledger.records(f"{name} {place}" for place in places):
        rows = pa.ipc.open_stream(data).read_all().to_pylist()
        episode = store.from_rows(rows)
        steps = [
            replace(step, reply=replace(step.reply, sample=_sample(row)))
            for step, row in zip(episode.steps, rows, strict=True)
        ]
        yield replace(episode, steps=tuple(steps))


def hidden_key(name: str, place: int) -> str:
    """The ledger's key of an episode's hidden states, (decisions, features) float32, where play did not show them."""
    return f"{name} {place} hidden"


def with_hidden(ledger: Ledger, name: str, episodes: dict[int, Episode]) -> dict[int, Episode]:
    """The episodes, by place, with the hidden states that the ledger has of them."""
    found, records = {}, ledger.records(hidden_key(name, place) for place in episodes)
    for (place, episode), data in zip(episodes.items(), records, strict=True):
        states = np.frombuffer(data, np.float32).reshape(len(episode.steps), -1)
        steps = [
            replace(step, reply=replace(step.reply, sample=Sample(sample.encoded, sample.logprobs, state)))
            for step, state in zip(episode.steps, states, strict=True)
            if (sample := step.reply.sample)
        ]
        found[place] = replace(episode, steps=tuple(steps))
    return found


def to_bytes(episode: Episode) -> bytes:
    """The episode as a compressed Arrow stream, with what a trainer needs of its replies."""
    samples = [step.reply.sample for step in episode.steps]
    columns = [
        [sample.encoded.answer_ids for sample in samples],
        [sample.logprobs for sample in samples],
        [sample.hidden for sample in samples],
    ]
    table = store.to_table(episode)
    for field, values in zip(_SAMPLE, columns, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _sample(row: dict) -> Sample:
    hidden = None if row["hidden"] is None else np.array(row["hidden"], np.float32)
    return Sample(Encoded([], row["answer_ids"], None, None), row["logprobs"], hidden)


def encoded(steps: Sequence[Step], settings: Prompt, processor: "Qwen3VLProcessor") -> list[Encoded]:
    """What was shown and answered, as the model takes it; rendered here for decisions that were read back, or served.

    Raises WorkError if a server was shown something else.
    """
    found = [step.reply.sample.encoded for step in steps]
    lacking = [
        place
        for place, known in enumerate(found)
        if not known.prompt_ids or (known.pixel_values is None and settings.mode != "text")
    ]
    turns = [Turn(steps[place].observation, steps[place].history, settings) for place in lacking]
    rendered = shown(processor, turns) if turns else []
    for place, row in zip(lacking, with_answers(rendered, [found[place] for place in lacking]), strict=True):
        found[place] = row
    return found


def with_answers(rendered: Sequence[Encoded], known: Sequence[Encoded]) -> list[Encoded]:
    """What is rendered here, with the answers of what a server, or the ledger, knows of the same decisions.

    Raises WorkError if a server was shown something else.
    """
    pairs = list(zip(rendered, known, strict=True))
    if any(there.prompt_ids and there.prompt_ids != here.prompt_ids for here, there in pairs):
        raise WorkError(
            "the vLLM server renders other prompts than training does: it has another model or another chat "
            "template; let it serve models/base with the flags of serving/vllm.py"
        )
    return [replace(here, answer_ids=there.answer_ids) for here, there in pairs]


SCHEMA = pa.schema(
    [*store.SCHEMA, pa.field("advantage", pa.float64()), pa.field("iteration", pa.int32())], store.SCHEMA.metadata
)
"""A trace's columns, and what RL made of each decision."""


def write(path: Path, episodes: Iterable[tuple[Episode, np.ndarray]], iteration: int) -> None:
    """Write some episodes of an iteration with their advantages; an episode is called ITERATION-SEED-MEMBER."""
    tables = []
    for member, (episode, advantages) in enumerate(episodes):
        named = replace(episode, agent="rl", name=f"{iteration}-{episode.seed}-{member}")
        table = store.to_table(named).append_column("advantage", pa.array(advantages, pa.float64()))
        tables.append(table.append_column("iteration", pa.array([iteration] * len(advantages), pa.int32())))
    with replacing(path) as unfinished:
        pq.write_table(pa.concat_tables(tables).cast(SCHEMA), unfinished, compression="zstd")


def join(parts: Iterable[Path], path: Path) -> None:
    """Write the episodes of several files into one, in this order."""
    with replacing(path) as unfinished, pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, schema=SCHEMA))
