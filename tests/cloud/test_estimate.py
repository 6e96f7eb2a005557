"""The estimate agrees with what was measured, says what was not, and names a source for every figure."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from apprentice import compute, params
from apprentice.cloud import estimate as room
from apprentice.cloud.estimate import RATES, rates, record
from apprentice.pipeline import ROOT
from apprentice.workers import cores

yaml = YAML(typ="safe")
GPT = {
    "policy": "chat",
    "seeds": "0-99",
    "max_steps": 50,
    "prompt": {"mode": "text", "rules": True},
    "endpoint": {"model": "gpt-4o-mini", "api_key_env": "OPENAI_API_KEY", "concurrency": 10},
}


MEASURED = {
    "teachers__expert__seeds": "0-71",
    "profiles__tiny__prompt__history": 8,
    "profiles__tiny__student__pretraining__steps": 250,
    "profiles__tiny__student__pretraining__batch_size": 32,
    "profiles__tiny__sft__epochs": 1,
    "profiles__tiny__sft__batch_size": 16,
    "profiles__tiny__sft__evaluation": None,
    "profiles__tiny__rl__iterations": 11,
    "profiles__tiny__rl__groups": 16,
    "profiles__tiny__rl__group_size": 4,
    "profiles__tiny__rl__max_steps": 150,
    "profiles__tiny__rl__decisions": 3072,
    "profiles__tiny__rl__evaluation": {"seeds": "310000-310063", "every": 6},
    "benchmark__seeds": "200000-200063",
    "benchmark__max_steps": 200,
}
"""The settings of the run that LOG.md has the times of."""


@pytest.fixture
def settings(tmp_path):
    def make(**changes) -> params.Params:
        tree = yaml.load((ROOT / "params.yaml").read_text())
        pinned = {key: value for key, value in MEASURED.items() if key.partition("__")[0] not in changes}
        changes = pinned | changes
        for path, value in changes.items():
            *parents, key = path.split("__")
            node = tree
            for parent in parents:
                node = node[parent]
            node[key] = value
        with (tmp_path / "params.yaml").open("w") as file:
            yaml.dump(tree, file)
        return params.load(tmp_path / "params.yaml")

    return make


def estimate(settings: params.Params, **places: dict) -> dict:
    """On what compute.yaml names, but for these stages."""
    tree = yaml.load((ROOT / "compute.yaml").read_text())
    for stage, place in places.items():
        tree["stages"][stage] = place
    return room.estimate(settings, compute.Compute.model_validate(tree))


def lines(settings: params.Params, **places: dict) -> dict[str, dict]:
    return {line["stage"]: line for line in estimate(settings, **places)["stages"]}


@pytest.mark.parametrize("size", ["2B", "4B", "8B"])
def test_what_was_not_measured_is_a_range_with_its_reason(settings, size):
    model = f"Qwen/Qwen3-VL-{size}-Instruct"
    found = lines(settings(profile="qwen2b", profiles__qwen2b__student__model=model))
    for stage in ("sft", "distill", "rl", "agreement", "benchmark_student"):
        for name in ("hours", "gpu_hours", "usd"):
            low, high = found[stage][name]
            assert 0 < 1.5 * low < high, (stage, name)
        assert any("tokens_per_second: not measured; " in source for source in found["sft"]["sources"])
    # NVIDIA's figure for LoRA with NeMo on an H100: no estimate is faster.
    nemo = 14_110 * 7 / int(size[0])
    assert found["sft"]["hours"][0] * 3600 * 2 * nemo >= 0.9 * found["sft"]["tokens"]


def test_the_gpus_are_those_of_compute_yaml(settings):
    qwen = settings(profile="qwen4b")  # of which neither card was measured: both have the same rates
    two, eight = (lines(qwen, sft={"accelerators": f"H100:{count}"})["sft"] for count in (2, 8))
    assert (two["gpus"], eight["gpus"]) == (2, 8) and "× H100 at $3.00" in two["how"]
    assert two["hours"] == pytest.approx([4 * hours for hours in eight["hours"]])
    assert two["usd"] == pytest.approx(eight["usd"])
    assert lines(qwen)["sft"]["usd"] == pytest.approx([usd * 3.5 / 3 for usd in two["usd"]])
    here, there = (lines(qwen, sft={"accelerators": "H100", "where": where})["sft"] for where in ("here", "sky"))
    assert there["hours"][1] - here["hours"][1] == pytest.approx(20 / 60) and "minutes of set-up" in there["how"]
    for place, why in {"B300:2": "no rates or no price for .* on B300", None: "names no accelerators for sft"}.items():
        unknown = lines(qwen, sft={"accelerators": place})["sft"]
        assert unknown["usd"] is None and unknown["tokens"] and re.search(why, unknown["how"])


def test_validation_is_counted(settings):
    """A forward pass of each held-out row, at each evaluation: a third of what it is to train on it."""
    qwen = [settings(profile="qwen2b", profiles__qwen2b__sft__eval_steps=steps) for steps in (10, 10**6)]
    often, seldom = (lines(one)["sft"] for one in qwen)
    held_out = min(1372, qwen[0].active.sft.eval_rows or 1372)
    rows = int(often["decisions"] / 32 / 10) * held_out
    assert rows > 50_000 and f"validated 115 × {held_out:,}" in often["how"]
    assert often["hours"][0] / seldom["hours"][0] == pytest.approx(1 + rows / 3 / seldom["decisions"])


def test_play_at_each_validation_is_counted(settings):
    worlds = {"seeds": "320000-320007", "max_steps": 100}
    often = {"profiles__tiny__sft__eval_steps": 100}
    quiet, played = (settings(profiles__tiny__sft__evaluation=each, **often) for each in (None, worlds))
    before, after = lines(quiet)["sft"], lines(played)["sft"]
    validations = int(re.search(r"validated (\d+) ×", after["how"])[1])
    assert validations and after["decisions"] - before["decisions"] == validations * 8 * 100
    assert "8 held-out worlds each time" in after["how"] and after["hours"][0] > before["hours"][0]


def test_agents_that_are_paid_for_are_counted(settings):
    agent = {key: GPT[key] for key in ("policy", "prompt", "endpoint")}
    line = lines(settings(benchmark__agents={"gpt": agent, "noop": {"policy": "noop"}}))["benchmark@gpt"]
    assert line["decisions"] == 64 * 200 and line["usd"][0] > 0
    capped = lines(settings(benchmark__agents={"gpt": agent | {"max_calls": 60}}))["benchmark@gpt"]
    assert capped["decisions"] == 64 * 60
    unknown = agent | {"endpoint": agent["endpoint"] | {"model": "mine"}}
    found = lines(settings(benchmark__agents={"gpt": unknown}))["benchmark@gpt"]
    assert found["usd"] is None and "benchmark.agents.gpt.endpoint.price" in found["how"]


def test_measured_rates_take_the_place_of_the_others(settings, tmp_path, monkeypatch):
    path = tmp_path / "rates.yaml"
    shutil.copy(RATES, path)
    monkeypatch.setattr(room, "RATES", path)
    model = "Qwen/Qwen3-VL-2B-Instruct"
    qwen = settings(profile="qwen2b")
    record(model, "NVIDIA H200", "2026-12-01", sft_tokens_per_second=30_123.4, path=path)
    record(model, "NVIDIA GH200 480GB", "2026-12-01", play_decisions_per_second=7.123, path=path)
    kept = RATES.read_text().splitlines()
    assert {line for line in kept if line.lstrip().startswith("#")} <= set(path.read_text().splitlines())
    assert rates()["students"][model]["GH200"] == {
        "play_decisions_per_second": {"rate": 7.12, "source": "measured 2026-12-01 on one GH200, benchmarks/gpu.py"}
    }
    found = lines(qwen)
    trained = found["sft"]
    assert "sft_tokens_per_second: measured 2026-12-01 on one H200, benchmarks/gpu.py" in trained["sources"]
    assert trained["hours"][1] / trained["hours"][0] == pytest.approx(4 / 2, rel=0.01)  # a third more, a third less
    assert any("play_decisions_per_second: not measured" in source for source in found["rl"]["sources"])
    rates.cache_clear()


def test_what_was_measured_comes_out_as_it_was_measured(settings):
    """LOG.md, 2026-11-21: minutes of `make repro` on two cores, and the rows of sft."""
    found = lines(settings())
    for stage, minutes in {"student": 1.8, "sft": 1.8, "rl": 9.7, "benchmark_student": 2.4}.items():
        low, high = found[stage]["hours"]
        assert low * 60 < minutes < high * 60, stage
        assert any("measured 2026-11-21" in source for source in found[stage]["sources"])
    assert found["sft"]["decisions"] == pytest.approx(12_276, rel=0.03)
    collect = lines(settings(teachers__expert__seeds="0-199"))["collect@expert"]  # of the second run
    low, high = collect["hours"]
    assert low * 60 < 0.6 < high * 60 and any("measured 2026-11-21" in source for source in collect["sources"])
    assert estimate(settings())["usd"] == (0, 0)


def test_a_teacher_over_an_api_costs_its_tokens(settings):
    line = lines(settings(teachers={"gpt": GPT}))["collect@gpt"]
    decisions = 100 * 50
    assert line["decisions"] == decisions
    assert lines(settings(teachers={"gpt": GPT | {"max_calls": 9}}))["collect@gpt"]["decisions"] == 100 * 9
    prompt = line["tokens"] / decisions - rates()["text"]["completion_tokens"]
    assert line["usd"] == pytest.approx([decisions * (prompt * 0.15 + 30 * 0.60) / 1e6] * 2)
    assert sum(line["hours"]) / 2 * 3600 == pytest.approx(decisions * 2 / 10)
    assert any("prices.yaml, 2026-11-21" in source for source in line["sources"])
    with_picture = GPT | {"prompt": {"mode": "text+image", "rules": True}}
    seen = lines(settings(teachers={"gpt": with_picture}))["collect@gpt"]
    assert seen["tokens"] - line["tokens"] == decisions * (2833 + 5667)


def test_prices_of_ones_own_are_used_and_unknown_ones_said(settings):
    own = GPT | {"endpoint": GPT["endpoint"] | {"model": "mine", "price": {"input": 1.0, "output": 0.0}}}
    line = lines(settings(teachers={"gpt": own}))["collect@gpt"]
    assert line["usd"] == pytest.approx([(line["tokens"] - 5000 * 30) / 1e6] * 2)
    unknown = GPT | {"endpoint": GPT["endpoint"] | {"model": "mine"}}
    found = estimate(settings(teachers={"gpt": unknown}))
    assert found["stages"][0]["usd"] is None and found["unknown"] == ["collect@gpt"]
    assert "teachers.gpt.endpoint.price" in found["stages"][0]["how"]


def test_a_limit_that_will_stop_the_run_is_said(settings):
    endpoint = GPT["endpoint"] | {"max_cost_usd": 0.01, "max_tokens": 50}
    assert (
        "stops at max_cost_usd" in lines(settings(teachers={"gpt": GPT | {"endpoint": endpoint}}))["collect@gpt"]["how"]
    )


def test_the_judge_is_counted_where_it_is_used(settings):
    endpoint = {"model": "gpt-4o-mini", "api_key_env": "K"}
    used = {"judge": {"endpoint": endpoint}, "filter__min_judge_score": 0.5}
    assert "filter: judge" not in lines(settings(judge={"endpoint": endpoint}))
    assert lines(settings(**used))["filter: judge"]["usd"][0] > 0
    found = lines(settings(**used, profiles__tiny__rl__reward={"judge": 1.0}))
    assert found["rl: judge"]["usd"][0] == pytest.approx(
        found["filter: judge"]["usd"][0] * (11 * 64 * 150) / (72 * 200), rel=0.05
    )


def test_imported_lines_are_rows_to_train_on(settings, tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}\n" * 10_000)
    before = lines(settings())["sft"]["decisions"]
    after = lines(settings(imports={"friends": {"file": str(tmp_path / "chats.jsonl")}}))
    assert after["import@friends"]["decisions"] == 10_000
    assert after["sft"]["decisions"] - before == pytest.approx(10_000 * rates()["kept"]["share"] * 0.9, abs=1)
    pq.write_table(pa.table({"step": range(500)}), tmp_path / "theirs.parquet")
    after = lines(settings(imports={"theirs": {"file": str(tmp_path / "theirs.parquet")}}))
    assert after["import@theirs"]["decisions"] == 500
    gone = lines(settings(imports={"friends": {"file": "gone.jsonl"}}))
    assert gone["import@friends"]["decisions"] is None and "cannot be read" in gone["import@friends"]["how"]


def test_a_student_without_rates_is_not_guessed(settings):
    found = estimate(settings(profile="qwen2b", profiles__qwen2b__student__model="Qwen/Qwen3-VL-32B-Instruct"))
    assert found["unknown"] == ["sft", "distill", "rl", "agreement", "benchmark_student"]
    line = next(line for line in found["stages"] if line["stage"] == "benchmark_student")
    assert line["tokens"] > 0 and line["hours"] is None


def test_more_of_anything_costs_more(settings):
    base = dict(profile="qwen2b")
    usd = estimate(settings(**base))["usd"][0]
    for key, value in {
        "teachers__expert__seeds": "0-399",
        "profiles__qwen2b__sft__epochs": 9,
        "profiles__qwen2b__rl__iterations": 40,
        "profiles__qwen2b__rl__max_steps": 100,
        "profiles__qwen2b__rl__decisions": 4096,
        "benchmark__max_steps": 400,
        "profiles__qwen2b__prompt__scale": 8,
    }.items():
        assert estimate(settings(**base, **{key: value}))["usd"][0] > usd * 1.02, key


def run(top: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from apprentice.cli import main; main()", "estimate", *arguments]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=60)


def test_the_command_says_it_for_people_and_for_scripts(settings, tmp_path):
    expected = estimate(settings(profile="qwen2b"))
    shutil.copy(ROOT / "compute.yaml", tmp_path)
    found = json.loads(run(tmp_path, "--json").stdout)
    assert found == json.loads(json.dumps(expected))
    said = " ".join(run(tmp_path).stdout.split())
    for line in found["stages"]:
        assert line["stage"] in said and line["sources"]
    low, high = found["usd"]
    assert f"${low:.2f} to {high:.2f}" in said and "not measured; from 2B's on one H100" in said


def test_without_parameters_it_is_one_sentence_and_code_2(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "there is no params.yaml" in done.stderr and "Traceback" not in done.stderr


def ran(folder: Path, settings: params.Params, **seconds: float) -> None:
    """What the pipeline leaves of a run with these settings, in which stages took so long."""
    parts = runpy.run_path(str(ROOT / "stages/settings.py"))["parts"](settings)
    files = {f"data/settings/{name}": part for name, part in parts.items()}
    files |= {f"metrics/times/{name}": {"seconds": took, "cores": cores()} for name, took in seconds.items()}
    for name, value in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


def test_the_last_run_here_sets_the_pace(settings, tmp_path):
    before, more = settings(), settings(profiles__tiny__rl__iterations=22)
    ran(tmp_path, before, rl=1200, sft=1, filter=30, split=30)

    def hours(asked: params.Params, stage: str) -> tuple[float, float]:
        found = room.estimate(asked, compute.Compute(), tmp_path)["stages"]
        return next(line["hours"] for line in found if line["stage"] == stage)

    assert hours(before, "rl") == pytest.approx((1200 / 3600 * 0.667, 1200 / 3600 * 1.333))
    assert hours(before, "filter, split") == pytest.approx((60 / 3600 * 0.667, 60 / 3600 * 1.333))
    assert 1.7 < hours(more, "rl")[0] / hours(before, "rl")[0] < 2.1  # the first evaluation stays
    assert hours(before, "sft") == lines(before)["sft"]["hours"]  # it took up a finished checkpoint
    small = settings(profiles__tiny__rl__iterations=1)
    assert hours(small, "rl") == lines(small)["rl"]["hours"]  # a pace of another size says nothing


def test_the_sum_is_of_all_stages(settings):
    found = estimate(settings())
    assert found["hours"] == pytest.approx([sum(line["hours"][at] for line in found["stages"]) for at in (0, 1)])
