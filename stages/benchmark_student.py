"""benchmark_student: the student with some folder's weights plays the held-out worlds, as benchmark.py's agents do.

    dvc repro benchmark_student@sft             or: python stages/benchmark_student.py sft

data/benchmark/<name>.parquet has its episodes, metrics/benchmark/<name>.json what they hold. Whose weights is in
params.yaml under `benchmark.students`. It plays on vLLM or in this process, as compute.yaml says.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.errors import ConfigError
from apprentice.stage import run, write_metrics

BASE = Path("models/base")


def main(name: str) -> None:
    """Play the benchmark as the student NAME of params.yaml."""
    settings = params.load()
    students = settings.benchmark.students
    if name not in students:
        raise ConfigError(f"params.yaml: benchmark.students has no {name!r}; known there: {', '.join(students)}")

    from apprentice import store

    trace = Path(f"data/benchmark/{name}.parquet")
    store.join(trace, episodes(name, Path(students[name]), settings.benchmark, settings.active))
    totals = store.totals(trace)
    write_metrics(f"benchmark/{name}", totals | {"cost_usd": 0.0})
    print(f"benchmark {name}: {totals['episodes']} episodes, {totals['decisions']} decisions")


def episodes(name: str, weights: Path, benchmark: params.Benchmark, profile: params.Profile) -> Iterator[bytes]:
    """The student's episodes (`store.to_bytes`) in the order of the seeds, kept from before or played now."""
    from apprentice import compute, gpus
    from apprentice.files import digest
    from apprentice.fingerprint import code, fingerprint
    from apprentice.play import Spec, record
    from apprentice.serving import in_process, on_vllm, processes, vllm
    from apprentice.workers import cores

    sampling = profile.sampling
    adapters = [] if weights == BASE else [weights]
    settings = compute.load().vllm
    plan = vllm.plan(settings, gpus.names(), training=False)
    servers = vllm.Servers(plan, settings, BASE, profile.dtype, adapters)
    shaping = {
        "prompt": profile.prompt.model_dump(mode="json"),
        "sampling": sampling.model_dump(mode="json"),
        "dtype": profile.dtype,
        "weights": [digest(folder, without="README.md") for folder in (BASE, *adapters)],
        "vllm": bool(servers.servers),
        "max_steps": benchmark.steps,
        "opening": benchmark.opening,
        "code": code(__file__),
    }
    spec = Spec(
        benchmark.seeds,
        benchmark.steps,
        profile.prompt,
        agent=name,
        opening=benchmark.opening,
        together=sampling.batch_size,
        fingerprint=fingerprint(agent=name, **shaping),
    )
    adapter = str(weights) if adapters else None
    if servers.servers:
        args = (name, servers.servers, adapter, sampling.temperature, sampling.max_tokens, str(BASE))
        return record(on_vllm.load, args, spec, while_playing=servers)
    places = processes.places(BASE, profile.dtype, -(-len(benchmark.seeds) // spec.together))
    threads = max(1, cores() // len(places))
    student = (name, adapter, profile.dtype, sampling.temperature, sampling.max_tokens, threads)
    return record(in_process.load, student, spec, places=places)


if __name__ == "__main__":
    run(main)
