"""The house rules: rooms and floors, declared dependencies, and what a change reruns."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import networkx as nx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from apprentice import fingerprint, pipeline
from apprentice.fingerprint import PACKAGE, POLICIES, SHAPELESS, code, imports, modules, shaping
from apprentice.params import Agent
from apprentice.pipeline import FLOORS, ROOMS, ROOT, room

DVC = [sys.executable, "-m", "dvc"]
yaml = YAML(typ="safe")
STAGES = pipeline.stages(yaml.load((ROOT / "dvc.yaml").read_text()))


def test_every_room_has_its_floor():
    assert {room(path) for path in modules()} - {"__init__"} == set(ROOMS) and len(ROOMS) <= 30


def test_the_table_of_rooms_has_each_room_in_its_place():
    rows = re.findall(r"^\| (?:\*\*(\w+)\*\*|`(\w+)`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    floors = [(floor, *rooms.split()) for floor, rooms in FLOORS.items()]
    assert [floor or one for floor, one in rows] == [name for names in floors for name in names]


def test_imports_go_down_only_and_in_no_circle():
    found = [path for path in modules() if room(path) != "__init__"]
    assert len(found) > 60  # every module, not those of one level
    for path in found:
        for imported in imports(path) - {PACKAGE / "__init__.py"}:
            assert ROOMS.index(room(imported)) <= ROOMS.index(room(path)), f"{path} imports {imported}"


def test_within_a_room_imports_run_in_no_circle():
    def reached(path: Path, of: str) -> set[Path]:
        found, waiting = set(), [path]
        while waiting:
            new = {one for one in imports(waiting.pop()) if room(one) == of} - found
            found |= new
            waiting += new
        return found

    for path in modules():
        if path.name != "__init__.py":
            assert path not in reached(path, room(path)), path


def test_no_stage_imports_another():
    for stage in (ROOT / "stages").glob("*.py"):
        assert not re.search(r"^\s*(from|import) stages\b", stage.read_text(), re.MULTILINE), stage.name


def test_only_faces_load_the_parameters():
    for path in modules():
        if room(path) not in (*FLOORS["faces"].split(), "params"):
            assert "params.load(" not in path.read_text(), path


def test_dvc_yaml_has_the_dependencies_that_the_rule_gives():
    text = (ROOT / "dvc.yaml").read_text()
    assert pipeline.written(text) == text, "run make deps"
    assert pipeline.versions() == pipeline.VERSIONS.read_text(), "run make deps"
    assert len(text.splitlines()) < 250


def test_the_drawing_is_of_this_house():
    assert pipeline.drawn(pipeline.HOUSE.read_text()) == pipeline.HOUSE.read_text(), "run make deps"


def test_following_a_profile_through_rl_passes_at_most_five_rooms():
    """The rooms to which stages/rl.py hands the profile or a section of it, and those to which they hand it on."""
    passed, waiting = set(), [ROOT / "stages/rl.py"]
    while waiting:
        for path in imports(waiting.pop()):
            takes = re.search(r"params import .*\b(Profile|Rl|Prompt|Sampling|Reward|Zero)\b", path.read_text())
            if takes and room(path) not in ("params", "schema") and path not in passed:
                passed.add(path)
                waiting.append(path)
    assert {room(path) for path in passed} <= {"training", "serving", "play", "policy", "prompt"}


def test_every_policy_that_a_setting_can_name_is_a_module_that_the_rule_knows():
    assert set(get_args(Agent.model_fields["policy"].annotation)) == set(POLICIES)
    for policy in POLICIES:
        assert (PACKAGE / f"players/{policy}.py").is_file()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_player_brings_nothing_that_its_stage_does_not_depend_on(policy):
    """dvc.yaml names it after the policy; all else has to be there for every policy."""
    for stage in ("collect", "benchmark"):
        file = ROOT / f"stages/{stage}.py"
        assert set(shaping(file, (policy,))[0]) - set(shaping(file)[0]) == {PACKAGE / f"players/{policy}.py"}
        assert shaping(file, (policy,))[1] == shaping(file)[1]


SHAPED = {
    "collect": {"world/terrain.py", "world/png.py", "play.py", "store.py", "prompt.py"},
    "split": {"data/chat_rows.py", "data/dataset.py", "prompt.py"},
    "sft": {"training/sft.py", "training/examples.py", "training/own_play.py", "student/card.py"},
    "distill": {"training/distillation.py", "training/sft.py", "training/rollouts.py", "players/expert.py", "play.py"},
    "rl": {"training/rl.py", "training/self_play.py", "training/advantages.py", "serving/vllm.py", "world/rules.py"},
    "report": {f"results/report.{kind}" for kind in ("py", "html", "css", "js")} | {"results/published.yaml"},
}
NOT_SHAPED = {
    "collect": {"training/rl.py", "student/loading.py", "results/report.py", "params.py", "players/random.py"},
    "split": {"world/terrain.py", "student/loading.py", "training/sft.py"},
    "sft": {"training/rl.py", "results/report.py", "endpoint/prices.yaml", "errors.py"},
    "distill": {"results/report.js", "endpoint/client.py", "training/advantages.py", "cloud/launch.py"},
    "rl": {
        "training/distillation.py",
        "results/report.js",
        "endpoint/client.py",
        "cloud/launch.py",
        "environment/gymnasium_env.py",
        "cli/play.py",
    },
    "score": {"results/report.py", "training/sft.py"},
}


@pytest.mark.parametrize("name", sorted(SHAPED | NOT_SHAPED))
def test_what_shapes_a_result(name):
    files = {
        str(path.relative_to(PACKAGE))
        for path in shaping(ROOT / f"stages/{name}.py")[0]
        if path.is_relative_to(PACKAGE)
    }
    assert SHAPED.get(name, set()) <= files
    assert not NOT_SHAPED.get(name, set()) & files


def test_what_is_imported_for_annotations_alone_shapes_nothing(tmp_path):
    """It has to keep to the order of the rooms all the same."""
    file = tmp_path / "stage.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n    from apprentice.training import rl\n"
        "else:\n    import scipy\n    from apprentice import prompt\n"
    )
    files, libraries = shaping(file)
    assert PACKAGE / "prompt.py" in files and "scipy" in libraries
    assert PACKAGE / "training/rl.py" not in files and "torch" not in libraries
    assert PACKAGE / "training/rl.py" in imports(file)


def test_checkpoints_are_lost_to_an_edit_of_what_shapes_them_and_to_no_other(monkeypatch):
    """Of every file of the package, and of the pinned versions: by the fingerprints that stages name checkpoints by."""
    edited: list[Path] = []
    digest = fingerprint.digest
    monkeypatch.setattr(fingerprint, "digest", lambda path: "edited" if path in edited else digest(path))
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for name in ("sft", "distill", "rl"):
        stage, afterwards = ROOT / f"stages/{name}.py", ("student.adapter", "student.card")
        shaped, before = shaping(stage, (), afterwards)[0], code(stage, (), afterwards)
        assert len(shaped) < len(files) / 2
        for path in files:
            edited[:] = [path]
            assert (code(stage, (), afterwards) != before) == (path in shaped), path
        edited.clear()
        monkeypatch.setattr(fingerprint, "version", lambda library: "0" if library == "peft" else "1")
        one = code(stage, (), afterwards)
        monkeypatch.setattr(fingerprint, "version", lambda library: "1")
        assert code(stage, (), afterwards) != one
        monkeypatch.undo()
        monkeypatch.setattr(fingerprint, "digest", lambda path: "edited" if path in edited else digest(path))


def test_every_name_of_the_rule_is_a_module_or_a_room():
    names = {fingerprint.name(path) for path in modules()} | {room(path) for path in modules()}
    assert set(SHAPELESS) <= names | {"serving.vllm_processes"}


def test_no_stage_has_a_time_that_another_depends_on():
    """Times differ from run to run: only the report shows them."""
    for name, stage in STAGES.items():
        times = [dep for dep in stage["deps"] if dep.startswith("metrics/times")]
        assert not times or name == "report", name


def test_every_stage_can_be_restored_from_the_run_cache():
    """DVC keeps none of a stage that has an out in git, unless it's a metric or a plot."""
    for name, stage in STAGES.items():
        assert all(isinstance(out, str) for out in stage["outs"]), name


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Iterator[Repo]:
    """A throw-away repository with this pipeline. Only `settings` does its work; all others just write new outputs."""
    top = tmp_path_factory.mktemp("repository")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, top / name, ignore=ignore)
    shutil.copy(ROOT / "params.yaml", top)
    (top / "others.jsonl").touch()
    whole = yaml.load((ROOT / "dvc.yaml").read_text())
    for name, stage in pipeline.stages(whole).items():
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"] + stage.get("metrics", [])]
        new = (f"mkdir -p {Path(out).parent}; cat /proc/sys/kernel/random/uuid > {out}" for out in outs)
        stage["cmd"] = f"{sys.executable} stages/settings.py" if name == "settings" else "; ".join(new)
    with (top / "dvc.yaml").open("w") as file:
        yaml.dump({"stages": whole["stages"]}, file)
    subprocess.run(["git", "init", "--quiet", top], check=True)
    subprocess.run([*DVC, "init", "--quiet"], cwd=top, check=True)
    before = Path.cwd()
    os.chdir(top)
    set_params("imports.others", {"file": "others.jsonl"})
    with Repo() as repo:
        rerun(repo)
        yield repo
    os.chdir(before)


def set_params(path: str, value) -> None:
    file = Path("params.yaml")
    tree = yaml.load(file.read_text())
    *parents, key = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[key] = value
    with file.open("w") as out:
        yaml.dump(tree, out)


def rerun(repo: Repo) -> set[str]:
    """The stages that `dvc repro` runs, but for `settings`, which runs whenever params.yaml has changed."""
    repo._reset()
    return {stage.addressing for stage in repo.reproduce()} - {"settings"}


def stale(repo: Repo) -> set[str]:
    """The stages whose own dependencies have changed, as `dvc status` says."""
    return set(repo.status())


@pytest.fixture
def direct(repository) -> Iterator[Callable[[], set[str]]]:
    """What params.yaml, as it is now, makes stale by itself; afterwards all is as it was."""
    original = Path("params.yaml").read_bytes()
    settings = runpy.run_path("stages/settings.py")["main"]

    def found() -> set[str]:
        settings()
        repository._reset()
        return stale(repository) - {"settings"}

    yield found
    Path("params.yaml").write_bytes(original)
    settings()
    repository._reset()


AGENTS = {"benchmark@random", "benchmark@noop", "benchmark@expert"}
STUDENTS = {f"benchmark_student@{name}" for name in ("base", "sft", "rl")}


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("teachers.expert.explore", 0.3, {"collect@expert", "report"}),
        ("filter.min_steps_per_episode", 7, {"filter"}),
        ("split.random_seed", 43, {"split", "distill"}),
        ("profiles.tiny.dtype", "bfloat16", {"student", "sft", "distill", "rl", "agreement", *STUDENTS}),
        ("profiles.tiny.prompt.history", 3, {"split", "student", "sft", "distill", "rl", *STUDENTS}),
        ("profiles.tiny.sampling.temperature", 0.9, {"sft", "distill", "rl", "agreement", *STUDENTS}),
        ("profiles.tiny.sampling.max_tokens", 20, {"sft", "distill", "rl", "agreement", *STUDENTS}),
        ("profiles.tiny.rl.evaluation.seeds", "310000", {"import@others", "rl"}),
        ("profiles.tiny.student.random_seed", 1, {"student", "sft", "distill", "rl", "report"}),
        ("profiles.tiny.sft.evaluation.seeds", "320000", {"import@others", "sft", "distill"}),
        ("profiles.tiny.sft.learning_rate", 1e-3, {"sft", "distill"}),
        ("profiles.tiny.distill.rounds", 2, {"distill"}),
        ("profiles.tiny.rl.learning_rate", 1e-4, {"rl"}),
        ("benchmark.max_steps", 100, {*AGENTS, *STUDENTS, "score", "report"}),
        ("benchmark.protocol", "balrog", {*AGENTS, *STUDENTS, "score", "report"}),
        ("benchmark.agents.random.prompt", {"history": 1}, {"benchmark@random", "score", "report"}),
        ("benchmark.seeds", "200000-200031", {"import@others", *AGENTS, *STUDENTS, "score", "report"}),
        ("benchmark.bootstrap_samples", 500, {"score", "report"}),
        ("profiles.qwen2b.sft.learning_rate", 1e-3, set()),
    ],
)
def test_a_changed_parameter_reruns_who_uses_it_and_nobody_else(direct, path, value, stages):
    set_params(path, value)
    assert direct() == stages


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("profiles.tiny.rl.clip_low", 0.3, {"rl"}),  # which it extends
        ("profiles.tiny_long.rl.max_steps", 90, {"rl"}),  # its own
        ("profiles.tiny.rl.iterations", 3, set()),  # which it has of its own
    ],
)
def test_a_profile_reruns_when_what_it_has_from_another_changes(repository, path, value, stages):
    original = Path("params.yaml").read_bytes()
    settings = runpy.run_path("stages/settings.py")["main"]
    set_params("profile", "tiny_long")
    settings()
    set_params(path, value)
    before = {name: Path(f"data/settings/student/{name}.json").read_text() for name in ("sft", "rl", "prompt")}
    settings()
    after = {name: Path(f"data/settings/student/{name}.json").read_text() for name in before}
    assert {name for name in before if before[name] != after[name]} == stages
    Path("params.yaml").write_bytes(original)
    settings()
    repository._reset()


VERSIONS = str(pipeline.VERSIONS.relative_to(ROOT))
FILES = sorted(
    str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
)


def test_a_touched_file_makes_those_stages_stale_whose_result_it_shapes_and_no_other(repository):
    """Every file of the package, one after the other; DVC is asked about dependencies on code alone, which is quick."""
    code_of = {
        stage.addressing: [dep for dep in stage.deps if dep.def_path.startswith("src/") and dep.def_path != VERSIONS]
        for stage in repository.index.stages
    }
    of_each = {"collect": {"collect@expert"}, "import": {"import@others"}}
    of_each |= {"benchmark": AGENTS, "benchmark_student": STUDENTS}
    players = {f"players/{policy}.py": {f"benchmark@{policy}"} for policy in ("expert", "random", "noop")}
    players["players/expert.py"].add("collect@expert")
    for name in FILES:
        path = Path("src/apprentice") / name
        original, times = path.read_bytes(), path.stat()
        path.write_bytes(original + b"\n# touched\n")
        expected = set(players.get(name, ()))
        for stage, tree in STAGES.items():
            if PACKAGE / name in shaping(pipeline.file_of(tree))[0]:
                expected |= of_each.get(stage, {stage})
        if name in ("params.py", "schema.py"):
            expected = {"settings"}
        found = {stage for stage, deps in code_of.items() if any(dep.workspace_status() for dep in deps)}
        assert found == expected, name
        path.write_bytes(original)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_library_that_computes_reruns_what_computes_with_it(repository):
    path = Path("src/apprentice/versions.yaml")
    original = path.read_text()
    path.write_text(original.replace("peft: '", "peft: '9"))
    repository._reset()
    assert stale(repository) == {"student", "sft", "distill", "rl", "agreement", *STUDENTS}
    path.write_text(original)
    repository._reset()


def test_nothing_reruns_when_nothing_changed(repository):
    assert rerun(repository) == set()


def test_a_changed_sft_reruns_all_that_comes_after_it(repository):
    set_params("profiles.tiny.sft.learning_rate", 1e-3)
    after = {"distill", "rl", "agreement", *(STUDENTS - {"benchmark_student@base"}), "score", "summary", "report"}
    assert rerun(repository) == {"sft", *after}


def test_another_teacher_runs_alone_and_goes_into_the_filter(direct):
    set_params("teachers.monkey", {"policy": "random", "seeds": "900-909"})
    assert direct() == {"collect@monkey", "filter", "report"}


def test_another_import_is_read_alone_and_goes_into_the_filter(direct):
    Path("friends.jsonl").touch()
    set_params("imports.friends", {"file": "friends.jsonl"})
    assert direct() == {"import@friends", "filter", "report"}


def test_a_changed_file_of_an_import_reruns_that_import(repository):
    Path("others.jsonl").write_text("changed")
    assert stale(repository) == {"import@others"}
    Path("others.jsonl").write_text("")


def test_another_agent_of_the_benchmark_plays_alone(direct):
    set_params("benchmark.agents.monkey", {"policy": "random"})
    assert direct() == {"benchmark@monkey", "score", "report"}


def test_other_weights_make_nobody_play_but_the_student_that_has_them(repository):
    Path("models/rl").write_text("changed")
    subprocess.run([*DVC, "commit", "--force", "rl"], check=True, capture_output=True)
    assert rerun(repository) == {"benchmark_student@rl", "score", "summary", "report"}


def test_the_score_of_agents_alone_trains_no_student(repository):
    set_params("benchmark.students", {})
    repository._reset()
    graph = repository.index.graph
    (score,) = (stage for stage in graph if stage.addressing == "score")
    assert {stage.addressing for stage in nx.descendants(graph, score)} == {"settings", *AGENTS}
