"""The report holds what was measured, fits into 10 MB, and takes what models write for text."""

import base64
import io
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image
from sample_report import EVIL, RAN, made, recorded

from apprentice import stage
from apprentice.pipeline import ROOT
from apprentice.results import report
from apprentice.world import ACHIEVEMENTS, png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def data(folder):
    """What a report is made of: two agents on three worlds, one of them writes what it should not."""
    return made(folder)


def test_whatever_a_model_writes_cannot_leave_the_data_element(data):
    page = report.page(data)
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(script[1]) == data
    assert all(any(words in text for text in data["replays"]["texts"]) for words in EVIL)
    assert not re.search("[<>&\u2028\u2029]", script[1]) and script[1].isascii()
    assert page.count("<script") == 2 and page.count("<!--") == 0


def test_a_placeholder_in_a_reply_is_not_filled(data):
    assert any("{{js}}" in text for text in data["replays"]["texts"])
    assert report.page(data).count('"use strict"') == 1


def test_nothing_is_fetched_and_no_other_script_allowed(data):
    page = report.page(data)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    # An address that names a vocabulary is all there may be.
    assert set(re.findall(r"https?://[^\s\"'`]+", page.split('id="data"')[0])) == set()
    assert not re.search(
        r"innerHTML|insertAdjacent|document\.write|\beval\(", (ROOT / "src/apprentice/results/report.js").read_text()
    )


def test_the_same_data_gives_the_same_page(data, tmp_path):
    assert report.page(made(tmp_path)) == report.page(data)


def test_a_sheet_holds_its_pictures_without_loss():
    generator = np.random.default_rng(0)
    pictures = [generator.integers(256, size=(72, 72, 3), dtype=np.uint8) for _ in range(3)]
    sheet = np.asarray(Image.open(io.BytesIO(report.sheet([png.encode(one) for one in pictures]))))
    assert (sheet == np.concatenate(pictures)).all()


def test_every_decision_of_a_replay_is_as_it_was_recorded(data, folder):
    texts, world = data["replays"]["texts"], data["replays"]["worlds"][0]
    assert [episode["agent"] for episode in world["episodes"]] == ["expert", "sft"]
    for episode in world["episodes"]:
        rows = recorded(folder, episode["agent"], world["seed"])
        columns = episode["columns"]
        assert columns["step"] == [row["step"] for row in rows]
        assert [texts[place] for place in columns["executed"]] == [" ".join(row["executed"]) for row in rows]
        assert columns["reward"] == pytest.approx([row["reward"] for row in rows])
        assert len({row["image"]["bytes"] for row in rows}) == 1 + max(columns["picture"])
        pictures = [row["image"]["bytes"] for row in rows]
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["replays"]["sheets"][episode["sheets"][0]]))))
        at = 72 * columns["picture"][-1]
        assert (sheet[at : at + 72] == png.decode(pictures[-1])).all()


def test_replays_are_of_the_median_the_best_and_the_worst_world_of_the_last_agent(data):
    labels = [world["label"] for world in data["replays"]["worlds"]]
    assert labels[0] == "the median of sft" and {"the best of sft", "the worst of sft"} <= set(labels)


def test_rollouts_of_the_first_and_last_iteration_have_their_advantages(data):
    worlds = [world for world in data["replays"]["worlds"] if "rollouts" in world]
    assert [world["label"] for world in worlds] == ["RL, iteration 0", "RL, iteration 4"]
    for world in worlds:
        assert [episode["agent"] for episode in world["episodes"]] == ["best of 2 rollouts", "worst of 2 rollouts"]
        for episode in world["episodes"]:
            assert len(episode["columns"]["advantage"]) == len(episode["columns"]["step"])


def test_what_is_too_heavy_is_left_out_and_an_episode_too_long_is_cut(tmp_path, monkeypatch):
    whole = made(tmp_path / "whole")["replays"]
    weight = sum(map(len, whole["sheets"]))
    monkeypatch.setattr(report, "BYTES", weight // 3)
    few = made(tmp_path / "few")["replays"]
    assert 1 <= len(few["worlds"]) < len(whole["worlds"])
    monkeypatch.setattr(report, "BYTES", weight // 40)
    cut = made(tmp_path / "cut")["replays"]
    episode = cut["worlds"][0]["episodes"][0]
    assert len(cut["worlds"]) == 1 and len(episode["columns"]["step"]) < episode["decisions"]
    assert sum(map(len, cut["sheets"])) < weight // 40


def test_the_tech_tree_is_crafters():
    nodes = {node["name"]: node for node in report.tree()}
    assert set(nodes) == set(ACHIEVEMENTS)
    assert nodes["collect_wood"] == {"name": "collect_wood", "needs": [], "tier": 0}
    assert nodes["make_wood_pickaxe"]["needs"] == ["place_table"]
    assert nodes["collect_iron"]["needs"] == ["make_stone_pickaxe"]
    assert nodes["collect_diamond"]["needs"] == ["make_iron_pickaxe"]
    assert nodes["eat_plant"]["needs"] == ["place_plant"]
    assert set(nodes["make_iron_pickaxe"]["needs"]) == {"collect_coal", "collect_iron", "place_furnace"}
    assert all(node["tier"] > nodes[need]["tier"] for node in nodes.values() for need in node["needs"])


def test_a_curves_hole_is_no_number(tmp_path):
    (tmp_path / "curve.csv").write_text("step,loss\n1,0.5\n2,\n3,nan\n")
    assert report.curve(tmp_path / "curve.csv") == {"step": [1, 2, 3], "loss": [0.5, None, None]}


def test_published_results_say_where_they_are_from():
    from ruamel.yaml import YAML

    published = YAML(typ="safe").load((ROOT / "src/apprentice/results/published.yaml").read_text())
    assert {row["source"] for row in published["rows"]} == set(published["sources"]) > set(published["second_hand"])
    for row in published["rows"]:
        assert row["value"] > 0 and row["kind"] and re.fullmatch(r"20\d\d-\d\d", row["date"])
        assert row["metric"] in ("achievement_rate", "crafter_score", "share_of_reward")
        if row["source"] == "BALROG":  # its evaluator's default since 2025-03
            assert row["temperature"] == (1.0 if row["date"] > "2025-03" else 0.0)


def test_of_which_run_the_page_is_is_what_the_stages_wrote():
    old = {"stage": "split", "seconds": 1.0, "cores": 2}
    assert report.ran([old]) is None  # by a version that wrote no more
    first = old | RAN | {"date": "2026-11-25", "commit": "0000001", "cores": 4}
    last = old | RAN | {"changed": True}
    assert report.ran([old, last, first, last]) == {
        "date": "2026-11-26",
        "commit": "1234567 with changes",
        "others": ["0000001"],
        "machines": ["2 cores of Abacus 9", "4 cores of Abacus 9"],
    }


def test_a_stage_writes_of_which_commit_it_is_and_whether_its_code_was_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage._circumstances()["commit"] is None
    for name in ("src", "stages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text("")
    for name in ("params.yaml", "dvc.lock"):
        (tmp_path / name).write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "dvc.lock").write_text("the pipeline's own")
    found = stage._circumstances()
    assert found["commit"] and found["processor"] and not found["changed"]
    (tmp_path / "src/code.py").write_text("another")
    assert stage._circumstances()["changed"]
