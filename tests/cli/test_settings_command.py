"""`apprentice settings`: every setting with its value, and the key of params.yaml to change it by."""

import json
import shutil

import pytest
from command_line import run
from ruamel.yaml import YAML

from apprentice import params
from apprentice.pipeline import ROOT

yaml = YAML(typ="safe")


@pytest.fixture
def top(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def listed(top, *arguments: str) -> dict[str, dict]:
    done = run(top, "settings", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {one["key"]: one for one in json.loads(done.stdout)}


@pytest.mark.parametrize("profile", ["tiny", "tiny_long", "qwen2b", "qwen4b", "qwen8b"])
def test_every_setting_of_a_profile_stands_in_params_yaml_so_that_S_reaches_it(top, profile):
    tree, whole = yaml.load((top / "params.yaml").read_text()), params.load(ROOT / "params.yaml").profiles[profile]
    found = listed(top, "--profile", profile)
    for key in ("dtype", "prompt.inventory", "sft.weight_decay", "sft.zero.offload", "rl.reward.judge"):
        assert key in found
    for key, setting in found.items():
        if key.split(".")[0] not in ("dtype", "prompt", "sampling", "student", "sft", "distill", "rl"):
            continue
        if key.startswith("distill.teacher."):
            continue  # as of a teacher, only what differs is named
        assert setting["place"], f"{key} has no place"
        node, value = tree, whole.model_dump(mode="json")
        for part in setting["place"].split("."):
            node = node[part]
        for part in key.split("."):
            value = value[part]
        assert setting["value"] == value
        assert isinstance(value, list) or node == value
        assert (
            setting["place"].rpartition(".")[2] in (top / "params.yaml").read_text().splitlines()[setting["line"] - 1]
        )


def test_an_inherited_value_stands_with_the_profile_that_has_it(top):
    found = listed(top, "--profile", "qwen4b")
    assert found["sft.micro_batch_size"]["place"] == "profiles.qwen4b.sft.micro_batch_size"
    assert found["sft.learning_rate"]["place"] == "profiles.qwen2b.sft.learning_rate"
    assert found["profile"] == {"key": "profile", "value": "qwen4b", "place": "profile", "line": 3}


def test_it_is_readable_and_knows_no_other_profile(top):
    done = run(top, "settings")
    assert "sft.learning_rate" in done.stdout and "profiles.tiny.sft.learning_rate" in done.stdout
    assert "teachers.expert.seeds" in done.stdout and "0-287" in done.stdout
    done = run(top, "settings", "--profile", "nobody")
    assert done.returncode == 2 and "profiles are tiny, tiny_long, smoke, qwen2b, qwen4b, qwen8b" in done.stderr
