"""A wrong params.yaml is one helpful error before the first step, and a right one means what it says."""

import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dvc.utils.serialize import modify_yaml
from ruamel.yaml import YAML

from apprentice import params
from apprentice.errors import ConfigError
from apprentice.pipeline import ROOT

STAGES = sorted(file for file in (ROOT / "stages").glob("*.py") if "params" in file.read_text())
TEACHER = {"policy": "random", "seeds": "0-4"}
CHAT = {"policy": "chat", "seeds": "0-4", "prompt": {"mode": "image"}, "endpoint": {"model": "m", "api_key_env": "KEY"}}
CHAT_256 = CHAT | {"endpoint": CHAT["endpoint"] | {"max_tokens": 256}}
REMOVED = object()


def changed(folder: Path, **changes) -> Path:
    """The checkout's params.yaml with some keys changed, each named by its path with __ for the dots."""
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    tree = yaml.load(ROOT / "params.yaml")
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = tree
        for section in sections:
            node = node[section]
        if value is REMOVED:
            del node[last]
        else:
            node[last] = value
    path = folder / "params.yaml"
    yaml.dump(tree, path)
    return path


def error(folder: Path, **changes) -> str:
    with pytest.raises(ConfigError) as raised:
        params.load(changed(folder, **changes))
    return str(raised.value)


def stage(file: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, file, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0-3", (0, 1, 2, 3)),
        ("0-2,7-8", (0, 1, 2, 7, 8)),
        (" 4 , 1 - 2 ", (4, 1, 2)),
        ("5-5", (5,)),
        (7, (7,)),
        ([3, "0-1", 9], (3, 0, 1, 9)),
        ((1, 2), (1, 2)),
        ("2147483647", (2147483647,)),
    ],
)
def test_seeds_are_ranges_numbers_or_lists_in_the_order_written(written, meant):
    assert params.seeds(written) == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("9-5", "write 5-9"),
        ("0-5,3", "seed 3 is named twice"),
        ([1, 2, 1], "seed 1 is named twice"),
        ("many", "'many' is not a seed or a range; write for example"),
        ("1,,2", "not a seed or a range"),
        ("1.5", "'1.5' is not a seed or a range"),
        ("", "write for example"),
        ("-3", "'-3' is not a seed or a range"),
        (-3, "'-3' is not a seed or a range"),
        ("2147483648", "too large"),
        ("0-99999999", "more than ten million"),
        (True, "True is not a seed; write a number"),
        ([0, False], "False is not a seed"),
        (1.5, "1.5 is not a seed; write a number"),
        (None, "None is not a seed"),
        ({}, "{} is not a seed"),
        ([], "no seeds; write for example"),
    ],
)
def test_what_is_no_seed_is_refused_with_what_to_write_instead(written, said):
    with pytest.raises(ValueError) as raised:
        params.seeds(written)
    assert said in str(raised.value)


def test_a_seed_named_twice_is_found_at_once_in_a_long_range():
    began = time.process_time()
    with pytest.raises(ValueError, match="seed 29999 is named twice"):
        params.seeds("0-29999,29999")
    assert time.process_time() - began < 1


def test_the_checkouts_own_parameters_are_valid():
    settings = params.load(ROOT / "params.yaml")
    assert settings.active is settings.profiles[settings.profile]
    assert set(settings.profiles) >= {"tiny", "qwen2b"}


@pytest.mark.parametrize("profile", ["tiny", "qwen2b"])
def test_every_profile_is_one_line_away(tmp_path, profile):
    assert params.load(changed(tmp_path, profile=profile)).profile == profile


def test_parameters_cannot_be_changed_once_read():
    with pytest.raises(ValueError, match="frozen"):
        params.load(ROOT / "params.yaml").filter.min_steps_per_episode = 0


def test_1e_5_without_a_point_is_a_number(tmp_path):
    """YAML 1.1 reads it as text."""
    path = changed(tmp_path, profiles__tiny__rl__learning_rate="LEARNING_RATE")
    path.write_text(path.read_text().replace("LEARNING_RATE", "1e-5"))
    assert "learning_rate: 1e-5" in path.read_text()
    assert params.load(path).active.rl.learning_rate == 1e-5


CAPPED = {
    "policy": "chat",
    "prompt": {"mode": "text"},
    "endpoint": {"model": "m", "api_key_env": None},
    "max_calls": 9,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"filters": {}}, ["filters: unknown key", "known there", "benchmark"]),
        ({"teachers__expert__explor": 0.1}, ["teachers.expert.explor: unknown key", "known there", "explore"]),
        ({"profiles__tiny__sft__lora__rang": 8}, ["profiles.tiny.sft.lora.rang: unknown key", "rank"]),
        ({"profiles__tiny__prompt__modus": "text"}, ["profiles.tiny.prompt.modus: unknown key", "mode"]),
        ({"teachers__expert__max_steps": "many"}, ["teachers.expert.max_steps", "integer", "'many'"]),
        ({"teachers__expert__max_steps": 0}, ["teachers.expert.max_steps", "greater than or equal to 1"]),
        ({"teachers__expert__max_steps": 10_001}, ["teachers.expert.max_steps", "10000"]),
        ({"teachers__expert__explore": 1.5}, ["teachers.expert.explore", "less than or equal to 1"]),
        (
            {"teachers__expert__policy": "gpt"},
            ["teachers.expert.policy", "'expert', 'random', 'noop' or 'chat'", "'gpt'"],
        ),
        ({"teachers__expert": None}, ["teachers.expert", "None"]),
        ({"teachers": {}}, ["neither a teacher nor an import"]),
        ({"filter__detect_loops": True}, ["filter.detect_loops", "'off', 'decision' or 'episode'"]),
        ({"split__val_fraction": 1}, ["split.val_fraction", "less than 1"]),
        ({"benchmark__agents": {"rll": {"policy": "rl"}}}, ["benchmark.agents.rll.policy", "'rl'"]),
        ({"benchmark__agents": {"a": {"policy": "noop", "seeds": "0"}}}, ["benchmark.agents.a.seeds", "known there"]),
        ({"benchmark__agents": {"gpt": {"policy": "chat"}}}, ["benchmark.agents.gpt", "needs an endpoint"]),
        ({"teachers__expert__max_calls": 9}, ["teachers.expert: max_calls is only for policy chat", "expert"]),
        ({"benchmark__protocol": "crafter", "benchmark__agents": {"api": CAPPED}}, ["agents.api.max_calls", "null"]),
        ({"profiles__tiny__distill__teacher": CAPPED}, ["distill.teacher: max_calls ends", "lower max_steps"]),
        ({"benchmark__agents": {"sft": {"policy": "noop"}}}, ["'sft'", "both an agent and a student"]),
        ({"benchmark__agents": {}, "benchmark__students": {}}, ["benchmark: nobody plays"]),
        ({"benchmark__protocol": "atari"}, ["benchmark.protocol", "'balrog'"]),
        ({"benchmark__protocol": "balrog", "benchmark__max_steps": 2001}, ["benchmark: max_steps is 2001", "2000"]),
        ({"benchmark__protocol": "balrog", "benchmark__seeds": "200000-200008"}, ["seeds are 9", "10 episodes"]),
        ({"benchmark__protocol": "crafter", "benchmark__max_steps": 200}, ["protocol crafter has 10000"]),
        ({"profiles__tiny__rl__learning_rate": float("nan")}, ["profiles.tiny.rl.learning_rate: ", "nan"]),
        ({"benchmark": REMOVED}, ["benchmark: is required"]),
        ({"profiles__tiny__rl__seeds": REMOVED}, ["profiles.tiny.rl.seeds: is required"]),
        ({"teachers__expert__seeds": REMOVED}, ["teachers.expert.seeds: is required"]),
        ({"teachers__expert__seeds": "5-1"}, ["teachers.expert.seeds", "write 1-5"]),
        ({"benchmark__seeds": ""}, ["benchmark.seeds", "write for example"]),
        ({"profile": "huge"}, ["profile: 'huge' is not defined", "tiny", "qwen2b"]),
        ({"teachers__expert__seeds": "0,200063"}, ["teachers.expert.seeds and benchmark.seeds", "200063", "own range"]),
        (
            {"teachers__expert__seeds": "0,300000"},
            ["teachers.expert.seeds and profiles.tiny.rl.seeds", "300000", "own range"],
        ),
        (
            {"profiles__tiny__rl__seeds": "200005"},
            ["profiles.tiny.rl.seeds and benchmark.seeds", "200005", "own range"],
        ),
        (
            {"profiles__tiny__student__pretraining__seeds": "200000-200009"},
            ["profiles.tiny.student.pretraining.seeds and benchmark.seeds", "10 seeds", "own range"],
        ),
        (
            {"filter__min_steps_per_episode": 30, "filter__max_steps_per_episode": 29},
            ["filter: max_steps_per_episode (29) is below min_steps_per_episode (30)", "raise it or set it to null"],
        ),
        (
            {"profiles__tiny__rl__batch_size": 64, "profiles__tiny__rl__decisions": 200},
            ["profiles.tiny.rl: decisions (200) is not a multiple of batch_size (64)", "write 192"],
        ),
        (
            {"profiles__tiny__rl__batch_size": 64, "profiles__tiny__rl__decisions": 20},
            ["profiles.tiny.rl: decisions (20)", "write 64"],
        ),
        (
            {"imports": {"friends": {"file": "a.jsonl", "tools": {"wait": {"action": "noop", "argument": "x"}}}}},
            ["imports.friends.tools.wait: action is for a tool that is one action"],
        ),
        (
            {"imports": {"theirs": {"file": "a.parquet", "tools": {"wait": {"action": "noop"}}}}},
            ["imports.theirs: tools: in a trace the replies are read already"],
        ),
        (
            {"imports": {"friends": {"file": "a.jsonl", "tools": {"move": {"names": {"left": "left"}}}}}},
            ["imports.friends.tools.move.names.left", "move_left"],
        ),
        (
            {"teachers__expert__policy": "random", "teachers__expert__rationale": True},
            ["teachers.expert: rationale: the policy 'random' has no reasons", "set policy: expert"],
        ),
        (
            {"profiles__qwen2b__rl__scale_rewards": "group"},
            ["profiles.qwen2b.rl: scale_rewards group does not go with advantage critic", "set it to batch or none"],
        ),
        (
            {"profiles__qwen2b__rl__scale_rewards": "group", "profiles__qwen2b__rl__advantage": "linear"},
            ["profiles.qwen2b.rl: scale_rewards group does not go with advantage linear"],
        ),
        ({"profiles__tiny__sft__lora__rank": 513}, ["profiles.tiny.sft.lora.rank", "less than or equal to 512"]),
        ({"split__include_images": False}, ["split.include_images: unknown key"]),
        (
            {"profiles__tiny__distill__seeds": "200000-200999"},
            ["profiles.tiny.distill.seeds and benchmark.seeds share", "for example 200000"],
        ),
        (
            {"profiles__tiny__distill__seeds": "309000-310000"},
            ["profiles.tiny.distill.seeds and profiles.tiny.rl.evaluation.seeds share 1 seeds"],
        ),
        (
            {"profiles__tiny__sft__evaluation__seeds": "310063-310064"},
            ["profiles.tiny.rl.evaluation.seeds and profiles.tiny.sft.evaluation.seeds share 1 seeds"],
        ),
        (
            {"profiles__smoke__sft__zero": {"stage": 3}},
            ["profiles.smoke.sft: evaluation cannot go with zero.stage 3", "set stage to 2"],
        ),
        (
            {"profiles__tiny__distill__seeds": "400000-400001"},
            ["profiles.tiny.distill: worlds is 64, and seeds are 2; name more seeds"],
        ),
        (
            {"profiles__tiny__distill__teacher": {"policy": "expert", "prompt": {"max_actions": 5}}},
            ["profiles.tiny.distill.teacher.prompt.max_actions is 5", "profiles.tiny.prompt.max_actions is 1"],
        ),
        (
            {"teachers__x": CHAT | {"prompt": {"mode": "image", "max_actions": 5}}},
            ["teachers.x.prompt.max_actions is 5", "profiles.tiny.prompt.max_actions is 1", "set both to the same"],
        ),
        (
            {"teachers__x": CHAT, "split__include_rationale": True},
            ["teachers.x.endpoint.max_tokens is not set", "profiles.tiny.sampling.max_tokens is 16", "reasons"],
        ),
        (
            {"teachers__x": CHAT_256, "split__include_rationale": True, "profile": "qwen2b"},
            [
                "teachers.x.endpoint.max_tokens is 256",
                "profiles.qwen2b.sampling.max_tokens is 128",
                "include_rationale",
            ],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_an_error_names_the_key_and_the_remedy(tmp_path, changes, said):
    message = error(tmp_path, **changes)
    for part in said:
        assert part in message
    assert len(message.splitlines()) == 1


def chat(**endpoint) -> dict:
    return CHAT | {"endpoint": CHAT["endpoint"] | endpoint}


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({**TEACHER, "endpoint": CHAT["endpoint"]}, ["teachers.x: endpoint is only for policy chat", "random"]),
        ({**CHAT, "endpoint": None}, ["teachers.x: policy chat needs an endpoint", "model", "api_key_env"]),
        (
            {**CHAT, "prompt": {"history": 2}},
            ["teachers.x: policy chat needs prompt.mode", "text+image, image or text"],
        ),
        ({**CHAT, "endpoint": {"model": "m"}}, ["teachers.x.endpoint.api_key_env: is required"]),
        (chat(modle="m"), ["teachers.x.endpoint.modle: unknown key", "model", "max_cost_usd"]),
        (chat(temperature=-1), ["teachers.x.endpoint.temperature", "-1"]),
        (chat(max_tokens_field="tokens"), ["teachers.x.endpoint.max_tokens_field", "'max_completion_tokens'"]),
        (chat(base_url="api.openai.com"), ["teachers.x.endpoint.base_url: is not a URL", "https://api.openai.com/v1"]),
        (chat(max_cost_usd=1.0), ["teachers.x.endpoint: max_cost_usd needs max_tokens"]),
        (chat(extra_body={"n": 2, "max_tokens": 9}), ["teachers.x.endpoint: extra_body may not hold max_tokens, n"]),
        (chat(concurrency=0), ["teachers.x.endpoint.concurrency", "greater than or equal to 1"]),
        (chat(max_failure_rate=2), ["teachers.x.endpoint.max_failure_rate", "less than or equal to 1"]),
        (chat(price={"input": 1.0}), ["teachers.x.endpoint.price.output: is required"]),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[0],
)
def test_a_chat_teachers_error_names_the_key_and_the_remedy(tmp_path, teacher, said):
    message = error(tmp_path, teachers__x=teacher)
    for part in said:
        assert part in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_key_env", "sk-s3cret"),
        ("api_key_env", ["sk-s3cret"]),
        ("base_url", "https://me:s3cret@example.com/v1"),
        ("base_url", "https://example.com/v1?key=s3cret"),
        ("base_url", "https://example.com/v1#s3cret"),
        ("base_url", "s3cret"),
        ("base_url", ["s3cret"]),
        ("api_key", "s3cret"),
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path, key, value):
    message = error(tmp_path, teachers__x=chat(**{key: value}))
    assert f"teachers.x.endpoint.{key}: " in message
    assert "s3cret" not in message


def test_all_errors_are_told_at_once(tmp_path):
    message = error(tmp_path, filter__min_unique_states=-1, benchmark__max_steps=0)
    assert "filter.min_unique_states" in message
    assert "benchmark.max_steps" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teachers__expert__max_steps", "200"),
        ("teachers__expert__max_steps", True),
        ("teachers__expert__explore", "0.1"),
        ("split__shuffle", "yes"),
        ("split__shuffle", 1),
    ],
)
def test_a_value_of_another_type_is_not_converted(tmp_path, key, value):
    assert key.replace("__", ".") in error(tmp_path, **{key: value})


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(tmp_path, value):
    assert "reward.unique" in error(tmp_path, profiles__tiny__rl__reward={"unique": value})


@pytest.mark.parametrize(
    ("profile", "key", "value"),
    [
        ("tiny", "pretraining__steps", 0),
        ("tiny", "colour", "red"),
        ("tiny", "pretraining__stepz", 3),
        ("qwen2b", "revision", "main"),
    ],
)
def test_an_error_in_the_student_speaks_of_that_key_alone(tmp_path, profile, key, value):
    message = error(tmp_path, **{f"profiles__{profile}__student__{key}": value})
    assert f"profiles.{profile}.student.{key.replace('__', '.')}:" in message
    assert len(message.splitlines()) == 1, message


def test_the_key_in_an_error_is_a_key_of_the_file(tmp_path):
    for line in error(tmp_path, profiles__tiny__sft__lora={"target_modules": 5}).splitlines():
        assert "profiles.tiny.sft.lora.target_modules: " in line


def test_what_stands_in_comments_is_ready_to_use(tmp_path):
    lines = (ROOT / "params.yaml").read_text().splitlines()
    path = tmp_path / "params.yaml"
    lines = [line[1:] if line.startswith(("#  ", "#judge:")) else line for line in lines]
    path.write_text("\n".join(line for line in lines if not line.startswith("judge: #")))
    found = params.load(path)
    assert list(found.teachers) == ["expert", "gpt_4o_mini", "qwen3_vl"]
    assert found.teachers["qwen3_vl"].endpoint.base_url == "http://localhost:8000/v1"
    assert "gpt_4o_mini" in found.benchmark.agents
    assert found.judge.endpoint.model == "gpt-4o-mini-2024-07-18" and list(found.judge.events) == ["survival"]


PLAN = {
    "sft.epochs": 3, "sft.batch_size": 32, "sft.learning_rate": 5e-5, "sft.warmup_ratio": 0.03,
    "sft.max_length": 2048, "sft.lora.rank": 16, "sft.lora.alpha": 32, "sft.lora.dropout": 0.05, "sft.zero.stage": 2,
    "rl.iterations": 20, "rl.max_steps": 50, "rl.kl_coefficient": 0.1, "rl.clip_low": 0.2, "rl.clip_high": 0.2,
    "rl.learning_rate": 2e-6,
}  # fmt: skip
DEPARTS = {"rl.learning_rate"}
"""Where the profiles depart from the plan, with the reason beside it in params.yaml."""


@pytest.mark.parametrize("profile", ["qwen2b", "qwen4b", "qwen8b"])
def test_the_profiles_of_the_hub_are_the_plans_but_where_a_reason_stands(profile):
    settings = params.load(ROOT / "params.yaml").profiles[profile]
    for key, planned in PLAN.items():
        value = settings
        for part in key.split("."):
            value = getattr(value, part)
        assert (value != planned) == (key in DEPARTS), key
    assert settings.rl.groups * settings.rl.group_size == 50
    lines = (ROOT / "params.yaml").read_text().splitlines()
    rate = lines.index(f"      learning_rate: {settings.rl.learning_rate:.1e}".replace("e-0", "e-"))
    assert any("The plan has 2e-6" in line for line in lines[rate - 3 : rate])


def test_validation_is_a_small_part_of_training_however_many_rows_there_are():
    """103,000 rows of training and a tenth as many of validation, as a paid teacher's 2,000 episodes make them."""
    for profile in ("qwen2b", "qwen4b", "qwen8b"):
        sft = params.load(ROOT / "params.yaml").profiles[profile].sft
        rows, held_out = 103_000, 11_444
        steps = rows * sft.epochs // sft.batch_size
        every = sft.eval_steps if sft.eval_steps >= 1 else steps * sft.eval_steps
        assert steps / every * min(held_out, sft.eval_rows or held_out) < 0.05 * rows * sft.epochs
        assert (1 + sft.early_stopping_patience) * every > 0.3 * steps, "it may stop while the rate is near its peak"


def test_teachers_may_share_seeds(tmp_path):
    path = changed(tmp_path, teachers={"one": TEACHER, "two": TEACHER | {"explore": 0.5}})
    assert set(params.load(path).teachers) == {"one", "two"}


def test_a_profile_not_in_use_may_overlap(tmp_path):
    params.load(changed(tmp_path, profiles__qwen2b__rl__seeds="0-9"))


def test_worlds_of_the_benchmark_and_of_evaluations_are_held_out(tmp_path):
    path = changed(
        tmp_path,
        benchmark__seeds="200000-200001",
        profiles__tiny__rl__evaluation__seeds="310000",
        profiles__tiny__sft__evaluation__seeds="320000",
    )
    assert params.load(path).held_out == (200_000, 200_001, 310_000, 320_000)
    path = changed(tmp_path, profiles__tiny__sft__evaluation=None)
    assert 320_000 not in params.load(path).held_out


def test_how_the_student_plays_shapes_sft_only_where_it_plays_there(tmp_path):
    parts = runpy.run_path(str(ROOT / "stages/settings.py"))["parts"]
    warm = {"profiles__tiny__sampling__temperature": 0.5}
    plays = parts(params.load(changed(tmp_path, **warm)))["student/held_out_play"]
    assert plays["sampling"]["temperature"] == 0.5 and plays["prompt"]["mode"] == "image"
    quiet = changed(tmp_path, profiles__tiny__sft__evaluation=None, **warm)
    assert parts(params.load(quiet))["student/held_out_play"] is None


def test_a_teacher_may_ask_for_as_many_actions_and_say_as_much_as_the_student(tmp_path):
    several = CHAT_256 | {"prompt": {"mode": "image", "max_actions": 5}}
    changes = {"profiles__tiny__prompt__max_actions": 5, "profiles__tiny__sampling__max_tokens": 256}
    assert params.load(changed(tmp_path, teachers__x=several, split__include_rationale=True, **changes)).split
    assert params.load(
        changed(tmp_path, profiles__tiny__rl__scale_rewards="group", profiles__tiny__rl__advantage="grpo")
    )


@pytest.mark.parametrize("written", ["", "- 1\n", "profile: [", "profile: tiny\nprofile: tiny\n", "a: \t- b"])
def test_what_is_no_mapping_in_yaml_is_a_configuration_error(tmp_path, written):
    path = tmp_path / "params.yaml"
    path.write_text(written)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        params.load(path)


def test_without_a_file_the_error_says_where_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run from the top of the checkout") as raised:
        params.load()
    assert str(tmp_path) in str(raised.value)


def test_what_departs_from_balrogs_rules_is_said_and_allowed(tmp_path):
    asked = {
        "policy": "chat",
        "prompt": {"mode": "text", "max_actions": 5},
        "endpoint": {"model": "m", "api_key_env": None},
    }
    asked["endpoint"]["temperature"] = 0.0
    changes = {"benchmark__protocol": "balrog", "benchmark__agents": {"api": asked | {"max_calls": 60}}}
    student = {"benchmark__max_steps": 500, "profiles__tiny__sampling__temperature": 0.7}
    quick = changed(tmp_path, **student)
    assert params.load(quick).departures == ()
    assert params.load(changed(tmp_path, benchmark__protocol="balrog")).departures == ()
    said = params.load(changed(tmp_path, **changes, **student)).departures
    assert [words.partition(",")[0] for words in said] == [
        "benchmark.agents.api.max_calls is 60",
        "benchmark.max_steps is 500",
        "profiles.tiny.sampling.temperature is 0.7",
        "benchmark.agents.api.prompt.max_actions is 5",
        "benchmark.agents.api.endpoint.temperature is 0.0",
    ]


@pytest.mark.parametrize("file", STAGES, ids=lambda file: file.stem)
def test_a_stage_ends_with_code_2_before_it_touches_anything(tmp_path, file):
    changed(tmp_path, benchmark__seeds="9-5")
    arguments = ["expert"] if file.stem in ("collect", "import", "benchmark", "benchmark_student") else []
    ended = stage(file, *arguments, folder=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "params.yaml: benchmark.seeds: the range 9-5 runs backwards" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_an_unknown_teacher_is_told_who_there_is(tmp_path):
    changed(tmp_path)
    ended = stage(ROOT / "stages/collect.py", "nobody", folder=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "teachers has no 'nobody'; known there: expert" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()


def test_reading_parameters_loads_nothing_heavy():
    code = "import sys, apprentice.params; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "apprentice.params" in loaded
    assert not {"torch", "crafter", "transformers", "torchvision", "numba", "datasets"} & set(loaded)


OWN = {"extends": "tiny", "prompt": {}, "sampling": {}, "student": {}, "sft": {}, "distill": {}, "rl": {}}


def test_a_profile_has_what_it_does_not_name_from_the_one_that_it_extends(tmp_path):
    own = OWN | {"sft": {"lora": {"rank": 8}}, "prompt": {"history": 2}}
    further = OWN | {"extends": "own", "sft": {"epochs": 2}}
    loaded = params.load(changed(tmp_path, profiles__own=own, profiles__further=further, profile="further"))
    tiny, active = loaded.profiles["tiny"], loaded.active
    assert (active.sft.epochs, active.sft.lora.rank, active.prompt.history) == (2, 8, 2)
    assert (active.sft.lora.alpha, active.rl, active.dtype) == (tiny.sft.lora.alpha, tiny.rl, tiny.dtype)
    assert tiny.sft.lora.rank == 64


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"extends": "nobody"}, "profiles.own.extends: there is no profile 'nobody'; profiles are "),
        ({"extends": "own"}, "profiles.own.extends: own extends own in turn"),
        ({"rl": REMOVED}, "profiles.own.rl: is required; {} is as in tiny"),
        ({"sft": {"epochz": 1}}, "profiles.own.sft.epochz: unknown key; known there: epochs"),
        ({"sft": {"epochs": "many"}}, "profiles.own.sft.epochs: Input should be a valid number"),
    ],
)
def test_what_is_wrong_with_a_profile_that_extends_another_is_said(tmp_path, own, said):
    tree = {key: value for key, value in (OWN | own).items() if value is not REMOVED}
    assert said in error(tmp_path, profiles__own=tree)


def test_what_is_wrong_with_a_profile_is_said_once_whoever_extends_it(tmp_path):
    assert len(error(tmp_path, profiles__qwen2b__sft__epochs=-1).splitlines()) == 1
    assert len(error(tmp_path, profiles__qwen2b__rl__staleness=1).splitlines()) == 1


def test_what_dvc_sets_in_params_yaml_changes_that_line_alone(tmp_path):
    """DVC writes a null as nothing, and so does the file; comments stay."""
    changed = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text().splitlines()
    changed.write_text("\n".join(before) + "\n")
    with modify_yaml(changed) as tree:
        tree["profiles"]["tiny"]["sft"]["epochs"] = 7
    after = changed.read_text().splitlines()
    assert [line for line in after if line not in before] == ["      epochs: 7"] and len(after) == len(before)
