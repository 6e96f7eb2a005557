"""The whole pipeline, small: it runs end to end, says what it did, and survives being killed anywhere."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from small import SMALL, checkout, environment, stage, started, wait_for, yaml

from apprentice import store

TRAINING = ("sft", "distill", "rl")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """A checkout in which `dvc repro` has run from nothing."""
    folder = tmp_path_factory.mktemp("ran")
    top = checkout(folder / "checkout", SMALL)
    stage(top, folder / "cache", "-m", "dvc", "repro")
    return top


def test_the_benchmark_says_how_every_agent_plays(ran):
    scores = json.loads((ran / "metrics/benchmark.json").read_text())
    assert list(scores) == ["random", "noop", "expert", "base", "sft", "distill", "rl"]
    for row in scores.values():
        assert row["episodes"] == 4 and row["steps_mean"] == 10
        assert 0 <= row["achievement_rate_ci95"][0] <= row["achievement_rate"] <= row["achievement_rate_ci95"][1] <= 1
        assert len(row["achievements"]) == 22
        assert {"crafter_score", "reward", "invalid_rate"} <= row.keys()
    assert scores["noop"]["achievement_rate"] == 0 < scores["expert"]["achievement_rate"]
    assert "rl - distill" in json.loads((ran / "metrics/differences.json").read_text())


def test_a_table_and_a_page_show_it(ran):
    row = json.loads((ran / "metrics/differences.json").read_text())["rl - distill"]
    assert row["pairs"] == 4 and row["p"] <= row["p_holm"] <= 1
    assert any(
        "too few" in warning for warning in json.loads((ran / "metrics/statistics.json").read_text())["warnings"]
    )
    summary = json.loads((ran / "metrics/summary.json").read_text())
    assert list(summary["achievement_rate"]) == ["random", "noop", "expert", "base", "sft", "distill", "rl"]
    page = (ran / "metrics/report.html").read_bytes()
    assert 100_000 < len(page) < 10_000_000


def test_the_report_is_a_function_of_its_deps(ran):
    before = (ran / "metrics/report.html").read_bytes()
    stage(ran, ran.parent / "other-cache", "stages/report.py")
    assert (ran / "metrics/report.html").read_bytes() == before


def test_dvc_shows_few_columns_and_draws_its_plots(ran):
    metrics = json.loads(stage(ran, ran.parent / "cache", "-m", "dvc", "metrics", "show", "--json"))
    assert set(metrics[""]["data"]) == {"metrics/summary.json", "metrics/live.json"}
    assert json.loads((ran / "metrics/live.json").read_text()) == {}, "nothing runs"
    stage(ran, ran.parent / "cache", "-m", "dvc", "plots", "show", "--out", "plots")
    page = (ran / "plots/index.html").read_text()
    wanted = ["SFT loss", "Distillation loss", "RL reward", "RL actions", "Success by achievement", "Achievement rate"]
    wanted += ["Student against teacher"]
    for title in wanted:
        assert title in page, title
    assert "DVC_METRIC" not in page


def test_rows_are_openai_chats_split_by_seed(ran):
    sides = [[json.loads(line) for line in (ran / f"data/sft/{side}.jsonl").open()] for side in ("train", "val")]
    for row in [*sides[0], *sides[1]]:
        system, user, assistant = row["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        assert user["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert json.loads(assistant["tool_calls"][0]["function"]["arguments"])["actions"]
        assert row["metadata"]["has_image"] and row["tools"][0]["function"]["name"] == "act"
    train, val = ({row["metadata"]["seed"] for row in side} for side in sides)
    assert train and val and not train & val


def test_adapters_are_peft_folders_without_checkpoints(ran):
    for name in TRAINING:
        files = {file.name for file in (ran / "models" / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files
        assert not any(file.startswith("checkpoint") for file in files)
        card = (ran / "models" / name / "README.md").read_text()
        assert "| expert | expert |" in card and str(ran) not in card
        assert {file.name for file in (ran / "models" / name / "base").iterdir()} >= {"model.safetensors", "README.md"}
    assert (ran / "models/sft/adapter_model.safetensors").read_bytes() != (
        ran / "models/rl/adapter_model.safetensors"
    ).read_bytes()


def test_curves_are_there_to_plot(ran):
    for name, columns in (
        ("sft_train", "step,loss"),
        ("sft_val", "step,loss"),
        ("sft_held_out", "step,achievements"),
        ("distill", "round,"),
        ("rl", "iteration,reward,achievements"),
        ("rl_training", "iteration,entropy"),
        ("rl_held_out", "iteration,reward"),
        ("rl_actions", "iteration,action"),
    ):
        lines = (ran / f"metrics/plots/{name}.csv").read_text().splitlines()
        assert lines[0].startswith(columns) and len(lines) > 1, name
    iterations = [str(1 + iteration) for iteration in range(SMALL["profiles.tiny.rl.iterations"])]
    for name, counted in (("rl", iterations), ("rl_training", iterations), ("rl_held_out", ["0", "2", "3"])):
        lines = (ran / f"metrics/plots/{name}.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == counted, name


def test_nothing_runs_again(ran):
    assert "Running stage" not in stage(ran, ran.parent / "cache", "-m", "dvc", "repro")


def test_another_clone_gives_the_same_bytes(ran, tmp_path):
    agents = ["random", "expert"]
    top = checkout(tmp_path / "other", SMALL)
    for command in (["collect", "expert"], ["filter"], ["split"], *(["benchmark", agent] for agent in agents)):
        stage(top, tmp_path / "cache", f"stages/{command[0]}.py", *command[1:])
    files = ["data/traces/expert.parquet", "data/filtered.parquet", "data/sft/train.jsonl", "data/sft/val.jsonl"]
    for name in [*files, "metrics/filter.json", *(f"data/benchmark/{agent}.parquet" for agent in agents)]:
        assert (top / name).read_bytes() == (ran / name).read_bytes(), name


def killed_in_play(tmp_path: Path, changes: dict, file: str, out: str) -> tuple[Path, Path]:
    """A checkout and its cache after a kill of this stage for the expert, with 8 to 39 of 40 episodes played."""
    top, cache = checkout(tmp_path / "killed", changes), tmp_path / "cache"
    process = started(top, cache, file, "expert")
    wait_for(lambda: _recorded(cache) >= 8, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 8 <= _recorded(cache) < 40 and not (top / out).exists()
    return top, cache


def test_a_killed_collect_goes_on_where_it_was(tmp_path):
    changes = SMALL | {"teachers.expert.seeds": "0-39", "teachers.expert.max_steps": 100}
    name = "data/traces/expert.parquet"
    top, cache = killed_in_play(tmp_path, changes, "stages/collect.py", name)
    stage(top, cache, "stages/collect.py", "expert")
    undisturbed = checkout(tmp_path / "undisturbed", changes)
    stage(undisturbed, tmp_path / "other-cache", "stages/collect.py", "expert")
    assert (top / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_killed_benchmark_plays_no_episode_twice(tmp_path):
    changes = SMALL | {"benchmark.seeds": "200000-200039", "benchmark.max_steps": 100}
    name = "data/benchmark/expert.parquet"
    top, cache = killed_in_play(tmp_path, changes, "stages/benchmark.py", name)
    # Two that were played change places in the cache: where they're not played again, they do so in the outcome.
    (ledger,) = cache.glob("episodes/*.sqlite")
    with sqlite3.connect(ledger) as db:
        one, other = db.execute("SELECT data, key FROM episodes ORDER BY key LIMIT 2").fetchall()
        db.executemany("UPDATE episodes SET data = ? WHERE key = ?", [(one[0], other[1]), (other[0], one[1])])
    stage(top, cache, "stages/benchmark.py", "expert")
    seeds = [seed for seed, _ in store.outcomes(top / name)]
    assert sorted(seeds) == list(range(200000, 200040))
    assert sum(seed != place for place, seed in enumerate(seeds, 200000)) == 2


def _recorded(cache: Path, keys: str = "%") -> int:
    count = 0
    for file in cache.glob("episodes/*.sqlite"):
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
                count += db.execute("SELECT count(*) FROM episodes WHERE key LIKE ?", (keys,)).fetchone()[0]
        except sqlite3.OperationalError:
            pass  # just being made
    return count


@pytest.mark.parametrize("name", TRAINING)
def test_killed_training_ends_in_the_same_adapter(ran, tmp_path, name):
    top, cache = checkout(tmp_path / "killed", SMALL), tmp_path / "cache"
    for folder in ("data", "models"):
        shutil.copytree(ran / folder, top / folder)
    shutil.rmtree(top / "models" / name)
    process = started(top, cache, f"stages/{name}.py")
    well_begun = {
        "sft": lambda: list(cache.glob("sft/*/checkpoint-*/trainer_state.json")),
        "distill": lambda: _recorded(cache, "% 1 %"),  # of the second round
        "rl": lambda: _recorded(cache, "% train 1 %"),
    }
    wait_for(well_begun[name], process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (top / "models" / name).exists()
    stage(top, cache, f"stages/{name}.py")
    weights = f"models/{name}/adapter_model.safetensors"
    assert (top / weights).read_bytes() == (ran / weights).read_bytes()
    if name == "rl":  # the best may be the one that it began with
        last = "rl/*/evaluated/3/adapter_model.safetensors"
        killed, undisturbed = (next(folder.glob(last)) for folder in (cache, ran.parent / "cache"))
        assert killed.read_bytes() == undisturbed.read_bytes()
        assert (top / "data/rl/rollouts.parquet").read_bytes() == (ran / "data/rl/rollouts.parquet").read_bytes()


def test_ctrl_c_exits_130_and_locks_nothing(tmp_path):
    top, cache = checkout(tmp_path / "top", SMALL | {"teachers.expert.seeds": "0-999"}), tmp_path / "cache"
    process = started(top, cache, "stages/collect.py", "expert")
    wait_for(lambda: _recorded(cache) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    process = started(top, cache, "-m", "dvc", "repro", "collect@expert")
    before = _recorded(cache)
    wait_for(lambda: _recorded(cache) > before, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    assert set(yaml.load((top / "dvc.lock").read_text())["stages"]) == {"settings"}


def test_filters_that_leave_nothing_say_which_and_what_would_help(ran):
    changed = yaml.load((ran / "params.yaml").read_text())
    original = (ran / "params.yaml").read_bytes()
    changed["filter"]["min_achievements_per_episode"] = 22
    with (ran / "params.yaml").open("w") as file:
        yaml.dump(changed, file)
    try:
        done = subprocess.run(
            [sys.executable, "stages/filter.py"],
            cwd=ran,
            env=environment(ran / "cache"),
            capture_output=True,
            text=True,
        )
    finally:
        (ran / "params.yaml").write_bytes(original)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "min_achievements_per_episode" in done.stderr and "set filter." in done.stderr


def test_without_validation_all_is_trained_on_and_the_last_adapter_is_kept(ran, tmp_path):
    top, cache = checkout(tmp_path / "top", SMALL | {"split.val_fraction": 0}), tmp_path / "cache"
    for folder in ("data", "models", "metrics"):
        shutil.copytree(ran / folder, top / folder, dirs_exist_ok=True)
    said = {
        name: stage(top, cache, f"stages/{name}.py")
        for name in ("settings", "split", "sft", "agreement", "summary", "report")
    }
    assert "so profiles.tiny.sft.evaluation has no occasion to play" in said["sft"]
    assert len((top / "metrics/plots/sft_held_out.csv").read_text().splitlines()) == 1
    assert not (top / "data/sft/val.jsonl").read_bytes()
    metrics = json.loads((top / "metrics/sft.json").read_text())
    assert metrics["val_loss"] is None and metrics["best_step"] == metrics["steps"] > 0
    assert json.loads((top / "metrics/summary.json").read_text())["sft_agreement"] is None
    card = (top / "models/sft/README.md").read_text()
    assert "Trained on decisions of" in card and "validated" not in card
