"""benchmark: an agent without weights plays the held-out worlds: a built-in one, or a model behind an endpoint.

    dvc repro benchmark@expert                  or: python stages/benchmark.py expert

data/benchmark/<agent>.parquet has its episodes, metrics/benchmark/<agent>.json what they hold. Who plays, and by whose
rules, is in params.yaml under `benchmark`; benchmark_student.py is the same for the student. Episodes go to the ledger
as they end, and replies that are paid for as they come, so that a killed run continues and more seeds only add.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.errors import ConfigError
from apprentice.stage import run, write_metrics


def main(name: str) -> None:
    """Play the benchmark as the agent NAME of params.yaml."""
    benchmark = params.load().benchmark
    if name not in benchmark.agents:
        known = ", ".join(benchmark.agents)
        raise ConfigError(f"params.yaml: benchmark.agents has no {name!r}; known there: {known}")
    agent = benchmark.agents[name]
    if agent.endpoint:
        from apprentice.endpoint.client import api_key

        api_key(agent.endpoint, whose(name))  # before anything else: it may be missing

    from apprentice import store

    trace = Path(f"data/benchmark/{name}.parquet")
    store.join(trace, episodes(name, agent, benchmark))
    totals = store.totals(trace)
    write_metrics(f"benchmark/{name}", totals | {"cost_usd": dollars(name, agent, benchmark)})
    print(f"benchmark {name}: {totals['episodes']} episodes, {totals['decisions']} decisions")


def spec(name: str, agent: params.Agent, benchmark: params.Benchmark):
    """What the agent is to play, by the benchmark's rules; a paid one's episodes are named in players.chat."""
    from apprentice.fingerprint import code, fingerprint
    from apprentice.play import Spec

    key = ""
    if agent.endpoint is None:
        rules = {"max_steps": benchmark.steps, "opening": benchmark.opening}
        made_by = code(__file__, players=[agent.policy])
        key = fingerprint(agent=name, play=agent.model_dump(mode="json"), **rules, code=made_by)
    return Spec(
        *(benchmark.seeds, benchmark.steps, agent.prompt, name),
        opening=benchmark.opening,
        fingerprint=key,
        max_calls=agent.max_calls,
    )


def episodes(name: str, agent: params.Agent, benchmark: params.Benchmark) -> Iterator[bytes]:
    """The agent's episodes (`store.to_bytes`) in the order of the seeds, kept from before or played now."""
    playing = spec(name, agent, benchmark)
    if agent.endpoint:
        from apprentice.fingerprint import code
        from apprentice.players import chat

        return chat.record(playing, agent.endpoint, code(__file__, players=[agent.policy]), whose(name))

    from apprentice.play import record
    from apprentice.players.scripted import Scripted

    return record(Scripted, (agent.policy,), playing)


def whose(name: str) -> str:
    """Where the endpoint's settings stand, for error messages."""
    return f"benchmark.agents.{name}.endpoint"


def dollars(name: str, agent: params.Agent, benchmark: params.Benchmark) -> float | None:
    """What the episodes have cost; None if a price is not known."""
    if agent.endpoint is None:
        return 0.0
    from apprentice.players import chat

    cost, _ = chat.cost(spec(name, agent, benchmark), agent.endpoint)
    return cost if cost is None else round(cost, 9)


if __name__ == "__main__":
    run(main)
