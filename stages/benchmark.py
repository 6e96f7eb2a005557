"""benchmark: one agent plays the held-out worlds; data/benchmark/<agent>.parquet, metrics/benchmark/<agent>.json.

    dvc repro benchmark@expert                  or: python stages/benchmark.py expert
    dvc repro benchmark_student@sft             or: python stages/benchmark.py sft

Who plays, and by whose rules, is in params.yaml under `benchmark`. Episodes go to the ledger as they end, and replies
that are paid for as they come, so that a killed run continues and more seeds only add. The stage `score` compares all.
"""

from collections.abc import Iterator
from pathlib import Path

from apprentice import params
from apprentice.command import run, write_metrics


def main(name: str) -> None:
    """Play the benchmark as the agent or student NAME of params.yaml."""
    settings = params.load()
    benchmark = settings.benchmark
    if name not in benchmark.names:
        known = ", ".join(benchmark.names)
        raise params.ConfigError(f"params.yaml: benchmark has no agent or student {name!r}; known there: {known}")
    agent = benchmark.agents.get(name)
    if agent and agent.endpoint:
        from apprentice.client import api_key

        api_key(agent.endpoint, whose(name))  # before anything else: it may be missing

    from apprentice import store

    trace = Path(f"data/benchmark/{name}.parquet")
    store.join(trace, student(name, settings) if agent is None else without_weights(name, agent, benchmark))
    totals = store.totals(trace)
    write_metrics(f"benchmark/{name}", totals | {"cost_usd": dollars(name, agent, benchmark)})
    print(f"benchmark {name}: {totals['episodes']} episodes, {totals['decisions']} decisions")


def without_weights(name: str, agent: params.Player, benchmark: params.Benchmark) -> Iterator[bytes]:
    """The episodes of a built-in policy, or of a model behind an endpoint."""
    from apprentice.ledger import code, fingerprint

    if agent.endpoint:
        from apprentice import chat

        return chat.record(name, as_teacher(agent, benchmark), code(__file__), whose(name), benchmark.opening)

    from apprentice import play
    from apprentice.policy import Scripted

    return play.record(
        Scripted,
        (agent.policy,),
        benchmark.seeds,
        benchmark.steps,
        agent.prompt,
        fingerprint=fingerprint(agent=name, play=agent.model_dump(mode="json"), **rules(benchmark)),
        agent=name,
        opening=benchmark.opening,
    )


def student(name: str, settings: params.Params) -> Iterator[bytes]:
    """The episodes of the student with these weights, on vLLM or in process, as compute.yaml says."""
    from apprentice import compute, local, play, remote, serve
    from apprentice.ledger import digest, fingerprint
    from apprentice.processes import cores

    benchmark, profile, weights = settings.benchmark, settings.student, settings.benchmark.students[name]
    sampling, adapter = profile.sampling, None if weights == "models/base" else weights
    together, adapters = sampling.batch_size, [Path(adapter)] if adapter else []
    serving = compute.load().serve
    plan = serve.plan(serving, serve.gpus(), training=False)
    students = serve.Servers(plan, serving, Path("models/base"), profile.dtype, adapters)
    key = fingerprint(
        agent=name,
        prompt=profile.prompt.model_dump(mode="json"),
        sampling=sampling.model_dump(mode="json"),
        dtype=profile.dtype,
        weights=[digest(folder) for folder in (Path("models/base"), *adapters)],
        vllm=bool(students.servers),
        **rules(benchmark),
    )
    if students.servers:
        build = remote.load
        with_these = (name, students.servers, adapter, sampling.temperature, sampling.max_tokens, "models/base")
    else:
        build, processes = local.load, min(cores(), -(-len(benchmark.seeds) // together))
        threads = max(1, cores() // processes)
        with_these = (name, adapter, profile.dtype, sampling.temperature, sampling.max_tokens, threads)
    return play.record(
        build,
        with_these,
        benchmark.seeds,
        benchmark.steps,
        profile.prompt,
        fingerprint=key,
        agent=name,
        opening=benchmark.opening,
        together=together,
        while_playing=students,
    )


def rules(benchmark: params.Benchmark) -> dict:
    """What shapes every agent's episodes."""
    from apprentice.ledger import code

    return {"max_steps": benchmark.steps, "opening": benchmark.opening, "code": code(__file__)}


def as_teacher(agent: params.Player, benchmark: params.Benchmark) -> params.Teacher:
    return params.Teacher(**dict(agent), seeds=benchmark.seeds, max_steps=benchmark.steps)


def whose(name: str) -> str:
    return f"benchmark.agents.{name}.endpoint"


def dollars(name: str, agent: params.Player | None, benchmark: params.Benchmark) -> float | None:
    """What the episodes have cost; None if a price is not known."""
    if agent is None or agent.endpoint is None:
        return 0.0
    from apprentice import chat

    cost, _ = chat.cost(name, as_teacher(agent, benchmark), benchmark.opening)
    return cost if cost is None else round(cost, 9)


if __name__ == "__main__":
    run(main)
