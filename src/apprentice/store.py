"""Episodes as a table: Parquet files for DVC, Arrow buffers for the ledger; one row for each decision."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apprentice.episode import Episode, Given, Reply, Step
from apprentice.files import replacing
from apprentice.world import png
from apprentice.world.observation import ITEMS, VIEW, VITALS, Observation

VERSION = 2
"""Raised when rows change their meaning; part of every fingerprint."""

_BATCH = 256
"""Rows read or written at a time."""

_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_NAMES = pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        pa.field("episode_id", pa.string()),
        pa.field("agent", pa.string()),
        pa.field("seed", pa.int64()),
        pa.field("step", pa.int32()),
        pa.field("history", _NAMES),
        pa.field("image", _IMAGE),
        pa.field("shown", pa.string()),
        pa.field("view", pa.binary()),
        pa.field("vitals", pa.struct([(name, pa.int8()) for name in VITALS])),
        pa.field("inventory", pa.struct([(name, pa.int8()) for name in ITEMS])),
        pa.field("facing", pa.list_(pa.int8(), 2)),
        pa.field("position", pa.list_(pa.int16(), 2)),
        pa.field("sleeping", pa.bool_()),
        pa.field("daylight", pa.float64()),
        pa.field("prompt", pa.string()),
        pa.field("content", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("model", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("asked", _NAMES),
        pa.field("invalid", pa.string()),
        pa.field("executed", _NAMES),
        pa.field("reward", pa.float64()),
        pa.field("health_change", pa.int8()),
        pa.field("unlocked", _NAMES),
        pa.field("done", pa.bool_()),
        pa.field("died", pa.bool_()),
        pa.field("ending", pa.string()),
    ]
)


def _feature(kind: pa.DataType) -> dict:
    """The type as `datasets` writes it; a column whose type is _IMAGE is shown as pictures."""
    if kind == _IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
        return {"feature": _feature(kind.value_type), "length": length, "_type": "List"}
    name = {"double": "float64"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}


_FEATURES = {field.name: _feature(field.type) for field in SCHEMA}
SCHEMA = SCHEMA.with_metadata({"huggingface": json.dumps({"info": {"features": _FEATURES}}, sort_keys=True)})


def to_table(episode: Episode) -> pa.Table:
    """One row for each decision."""
    return pa.Table.from_pylist([_row(episode, step) for step in episode.steps], SCHEMA)


def to_bytes(episode: Episode) -> bytes:
    """The episode as a compressed Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(to_table(episode))
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> Episode:
    return from_rows(pa.ipc.open_stream(data).read_all().to_pylist())


def write(path: Path, episodes: Iterable[Episode]) -> int:
    """Write episodes in the given order, few at a time; the same episodes give the same bytes. Returns the rows."""
    return _write(path, map(to_table, episodes))


def join(path: Path, records: Iterable[bytes]) -> None:
    """`write` for episodes that are `to_bytes` already."""
    _write(path, (pa.ipc.open_stream(data).read_all() for data in records))


def _write(path: Path, tables: Iterable[pa.Table]) -> int:
    rows, waiting = 0, []
    with replacing(path) as unfinished, pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
        for table in tables:
            waiting.append(table)
            rows += table.num_rows
            # Imported episodes may be single decisions: a row group for each would be mostly its own description.
            if sum(table.num_rows for table in waiting) >= _BATCH:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return rows


def read(path: Path) -> Iterator[Episode]:
    """The episodes of a file, one at a time."""

    def rows() -> Iterator[dict]:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH):
            yield from batch.to_pylist()

    for _, group in groupby(rows(), key=lambda row: row["episode_id"]):
        yield from_rows(list(group))


def _row(episode: Episode, step: Step) -> dict:
    reply = step.reply
    message = reply.message if isinstance(reply.message, dict) else {}
    return {
        "episode_id": episode.id,
        "agent": episode.agent,
        "seed": episode.seed,
        "step": step.step,
        "history": step.history,
        "prompt": episode.prompt,
        "content": _text(message.get("content")),
        "tool_calls": json.dumps(message["tool_calls"]) if message.get("tool_calls") else None,
        "finish_reason": reply.finish_reason,
        "model": reply.model,
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "asked": step.asked,
        "invalid": _text(step.invalid),
        "executed": step.executed,
        **(_given(step.observation) if isinstance(step.observation, Given) else _observed(step)),
    }


def _observed(step: Step) -> dict:
    observation = step.observation
    return {
        "image": {"bytes": observation.png or png.encode(observation.image), "path": None},
        "view": observation.view.tobytes(),
        "vitals": observation.vitals,
        "inventory": observation.inventory,
        "facing": observation.facing,
        "position": observation.position,
        "sleeping": observation.sleeping,
        "daylight": observation.daylight,
        "reward": step.reward,
        "health_change": step.health_change,
        "unlocked": step.unlocked,
        "done": step.done,
        "died": step.died,
        "ending": step.ending,
    }


def _given(given: Given) -> dict:
    """Columns that are not named are null: of an imported decision they are not known."""
    image = None if given.png is None else {"bytes": given.png, "path": None}
    return {"shown": json.dumps(given.messages), "image": image}


def _text(value: object) -> str | None:
    """What a model wrote, as text that can be stored: parts as JSON, half characters replaced."""
    if value is not None and not isinstance(value, str):
        value = json.dumps(value)
    return value if value is None else value.encode("utf-8", "replace").decode()


def from_rows(rows: list[dict]) -> Episode:
    """The episode of these rows, as `pyarrow` reads them."""
    agent, seed, prompt = (rows[0][name] for name in ("agent", "seed", "prompt"))
    name = rows[0]["episode_id"].removeprefix(f"{agent}-")
    return Episode(agent, seed, tuple(_step(row) for row in rows), prompt, "" if name == str(seed) else name)


def _step(row: dict) -> Step:
    message = {"role": "assistant", "content": row["content"]}
    if row["tool_calls"]:
        message["tool_calls"] = json.loads(row["tool_calls"])
    return Step(
        step=row["step"],
        history=tuple(row["history"]),
        observation=_observation(row),
        reply=Reply(message, row["finish_reason"], row["model"], row["prompt_tokens"], row["completion_tokens"]),
        asked=tuple(row["asked"]),
        invalid=row["invalid"],
        executed=tuple(row["executed"]),
        reward=row["reward"] or 0.0,
        health_change=row["health_change"] or 0,
        unlocked=tuple(row["unlocked"] or ()),
        done=bool(row["done"]),
        died=bool(row["died"]),
        ending=row.get("ending") or "",  # traces from before the column was there have none
    )


def _observation(row: dict) -> Observation | Given:
    if row["shown"] is not None:
        return Given(tuple(json.loads(row["shown"])), row["image"] and row["image"]["bytes"])
    return Observation(
        image=partial(png.decode, row["image"]["bytes"]),
        png=row["image"]["bytes"],
        view=np.frombuffer(row["view"], np.uint8).reshape(VIEW[1], VIEW[0]),
        vitals=row["vitals"],
        inventory=row["inventory"],
        facing=tuple(row["facing"]),
        position=tuple(row["position"]),
        sleeping=row["sleeping"],
        daylight=row["daylight"],
    )


def columns(path: Path, names: list[str]) -> Iterator[dict]:
    """The decisions of a file, of each only these columns: without the pictures it's quick."""
    for batch in pq.ParquetFile(path).iter_batches(columns=names):
        yield from batch.to_pylist()


def rows(path: Path, **values: int | str) -> list[dict]:
    """The decisions of a file that have these values in their columns, pictures and all."""
    return pq.read_table(path, filters=[(name, "==", value) for name, value in values.items()]).to_pylist()


def totals(path: Path) -> dict[str, int]:
    """What a file of played episodes holds: episodes, decisions, tokens, and more, without reading the pictures."""
    names = ["episode_id", "prompt_tokens", "completion_tokens", "executed", "invalid", "unlocked"]
    episodes, found = set(), Counter()
    for row in columns(path, names):
        episodes.add(row["episode_id"])
        found["decisions"] += 1
        found["prompt_tokens"] += row["prompt_tokens"]
        found["completion_tokens"] += row["completion_tokens"]
        found["steps"] += len(row["executed"])
        found["invalid"] += bool(row["invalid"])
        found["unlocked"] += len(row["unlocked"])
    return {"episodes": len(episodes), **found}


def outcomes(path: Path) -> Iterator[tuple[int | None, int]]:
    """(seed, achievements unlocked) of each episode of a file, without reading the pictures.

    An imported episode may have no seed, and has no known achievement.
    """
    found: dict[str, tuple[int | None, int]] = {}
    for row in columns(path, ["episode_id", "seed", "unlocked"]):
        seed, count = found.get(row["episode_id"], (row["seed"], 0))
        found[row["episode_id"]] = seed, count + len(row["unlocked"] or ())
    yield from found.values()
