"""The estimate agrees with what was measured and what was planned, and names a source for every figure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from apprentice import params
from apprentice.cloud.estimate import estimate, rates
from apprentice.pipeline import ROOT

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
    "profiles__tiny__rl__iterations": 11,
    "profiles__tiny__rl__groups": 16,
    "profiles__tiny__rl__group_size": 4,
    "profiles__tiny__rl__max_steps": 150,
    "profiles__tiny__rl__decisions": 3072,
    "profiles__tiny__rl__evaluation": {"seeds": "310000-310063", "every": 6},
    "profiles__qwen2b__rl__evaluation": {"seeds": "310000", "every": 20},
    "benchmark__seeds": "200000-200063",
    "benchmark__max_steps": 200,
}
"""The settings of the run that LOG.md has the times of, and of the plans."""


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


def lines(settings: params.Params) -> dict[str, dict]:
    return {line["stage"]: line for line in estimate(settings)["stages"]}


@pytest.mark.parametrize(("size", "sft", "rl"), [("2B", 10.5, 70), ("8B", 21, 112)])
def test_the_plans_for_h200s_come_out_and_are_called_assumed(settings, size, sft, rl):
    model = f"Qwen/Qwen3-VL-{size}-Instruct"
    plan = {"profile": "qwen2b", "teachers__expert__seeds": "0-159", "profiles__qwen2b__student__model": model}
    found = lines(settings(**plan))
    assert found["sft"]["usd"] == pytest.approx(sft, rel=0.05) and found["sft"]["gpus"] == 2
    assert found["rl"]["usd"] == pytest.approx(rl, rel=0.05) and found["rl"]["gpus"] == 4
    for stage in ("sft", "rl", "benchmark_student"):
        assert any("rates: assumed, not measured" in source for source in found[stage]["sources"])
    if size == "2B":
        low, high = found["sft"]["hours"]
        assert (low, high) == pytest.approx((1, 2), rel=0.05)
        assert found["benchmark_student"]["usd"] == pytest.approx(5, rel=0.05)


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
    assert estimate(settings())["usd"] == 0


def test_a_teacher_over_an_api_costs_its_tokens(settings):
    line = lines(settings(teachers={"gpt": GPT}))["collect@gpt"]
    decisions = 100 * 50
    assert line["decisions"] == decisions
    prompt = line["tokens"] / decisions - rates()["text"]["completion_tokens"]
    assert line["usd"] == pytest.approx(decisions * (prompt * 0.15 + 30 * 0.60) / 1e6)
    assert sum(line["hours"]) / 2 * 3600 == pytest.approx(decisions * 2 / 10)
    assert any("prices.yaml, 2026-11-21" in source for source in line["sources"])
    with_picture = GPT | {"prompt": {"mode": "text+image", "rules": True}}
    seen = lines(settings(teachers={"gpt": with_picture}))["collect@gpt"]
    assert seen["tokens"] - line["tokens"] == decisions * (2833 + 5667)


def test_prices_of_ones_own_are_used_and_unknown_ones_said(settings):
    own = GPT | {"endpoint": GPT["endpoint"] | {"model": "mine", "price": {"input": 1.0, "output": 0.0}}}
    line = lines(settings(teachers={"gpt": own}))["collect@gpt"]
    assert line["usd"] == pytest.approx((line["tokens"] - 5000 * 30) / 1e6)
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
    assert lines(settings(**used))["filter: judge"]["usd"] > 0
    found = lines(settings(**used, profiles__tiny__rl__reward={"judge": 1.0}))
    assert found["rl: judge"]["usd"] == pytest.approx(
        found["filter: judge"]["usd"] * (11 * 64 * 150) / (72 * 200), rel=0.05
    )


def test_imported_lines_are_rows_to_train_on(settings, tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}\n" * 10_000)
    before = lines(settings())["sft"]["decisions"]
    after = lines(settings(imports={"friends": {"file": str(tmp_path / "chats.jsonl")}}))
    assert after["import@friends"]["decisions"] == 10_000
    assert after["sft"]["decisions"] - before == pytest.approx(10_000 * rates()["kept"]["share"] * 0.9, abs=1)
    gone = lines(settings(imports={"friends": {"file": "gone.jsonl"}}))
    assert gone["import@friends"]["decisions"] is None and "cannot be read" in gone["import@friends"]["how"]


def test_a_student_without_rates_is_not_guessed(settings):
    found = estimate(settings(profile="qwen2b", profiles__qwen2b__student__model="Qwen/Qwen3-VL-32B-Instruct"))
    assert found["unknown"] == ["sft", "rl", "benchmark_student"]
    assert found["stages"][-1]["tokens"] > 0 and found["stages"][-1]["hours"] is None


def test_more_of_anything_costs_more(settings):
    base = dict(profile="qwen2b")
    usd = estimate(settings(**base))["usd"]
    for key, value in {
        "teachers__expert__seeds": "0-399",
        "profiles__qwen2b__sft__epochs": 9,
        "profiles__qwen2b__rl__iterations": 40,
        "profiles__qwen2b__rl__max_steps": 100,
        "profiles__qwen2b__rl__decisions": 4096,
        "benchmark__max_steps": 400,
        "profiles__qwen2b__prompt__scale": 8,
    }.items():
        assert estimate(settings(**base, **{key: value}))["usd"] > usd * 1.02, key


def run(top: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from apprentice.cli import main; main()", "estimate", *arguments]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=60)


def test_the_command_says_it_for_people_and_for_scripts(settings, tmp_path):
    expected = estimate(settings(profile="qwen2b"))
    found = json.loads(run(tmp_path, "--json").stdout)
    assert found == json.loads(json.dumps(expected))
    said = run(tmp_path).stdout
    for line in found["stages"]:
        assert line["stage"] in said and line["sources"]
    assert f"{found['usd']:.2f}" in said and "assumed, not measured" in " ".join(said.split())


def test_without_parameters_it_is_one_sentence_and_code_2(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2 and "there is no params.yaml" in done.stderr and "Traceback" not in done.stderr
