"""The house rules: floors, declared dependencies, and what a change reruns."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from closure import PACKAGE, ROOT, closure, imports
from ruamel.yaml import YAML

DVC = [sys.executable, "-m", "dvc"]
yaml = YAML(typ="safe")
PIPELINE = yaml.load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in PIPELINE.items()}
FILES = {name: re.match(r"python (stages/\w+\.py)", stage["cmd"])[1] for name, stage in STAGES.items()}
NOUNS = {"params", "episode", "world", "game", "picture", "terrain", "compiled", "prompt", "policy", "expert", "ledger"}
NOUNS |= {"store", "processes", "torchvision_operators", "command", "client", "prices"}


def test_imports_go_down_only():
    for module in PACKAGE.glob("*.py"):
        if module.stem in NOUNS:
            assert imports(module) <= NOUNS, module.name


def test_no_stage_imports_another():
    for stage in (ROOT / "stages").glob("*.py"):
        for node in ast.walk(ast.parse(stage.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module != "stages" and not (node.module or "").startswith("stages."), stage.name


def test_only_faces_load_the_parameters():
    for module in PACKAGE.glob("*.py"):
        if module.stem != "params":
            assert "params.load(" not in module.read_text(), module.name


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_every_file_that_it_imports(name):
    code = {dep for dep in STAGES[name]["deps"] if dep.endswith(".py")}
    assert code == {FILES[name]} | closure(ROOT / FILES[name])


def test_the_report_depends_on_what_it_is_drawn_with():
    assert {f"src/apprentice/report.{kind}" for kind in ("css", "html", "js")} <= set(STAGES["report"]["deps"])


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
def repository(tmp_path_factory) -> Path:
    """A throw-away repository with this pipeline; a stage's command only writes new outs."""
    top = tmp_path_factory.mktemp("repository")
    for name in ("params.yaml", "src", "stages"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, top / name, ignore=ignore) if source.is_dir() else shutil.copy(source, top)
    fake = top / "fake.py"
    fake.write_text(
        "import pathlib, sys, uuid\n"
        "for out in map(pathlib.Path, sys.argv[1:]):\n"
        "    out.parent.mkdir(parents=True, exist_ok=True)\n"
        "    out.write_text(str(uuid.uuid4()))\n"
    )
    (top / "others.jsonl").touch()
    with_import(top, "others", "others.jsonl")
    pipeline = yaml.load((ROOT / "dvc.yaml").read_text())
    for stage in pipeline["stages"].values():
        stage = stage.get("do", stage)
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"] + stage.get("metrics", [])]
        stage["cmd"] = f"{sys.executable} fake.py {' '.join(outs)}"
    with (top / "dvc.yaml").open("w") as file:
        yaml.dump({"stages": pipeline["stages"]}, file)
    subprocess.run(["git", "init", "--quiet", top], check=True)
    subprocess.run([*DVC, "init", "--quiet"], cwd=top, check=True)
    rerun(top)
    return top


def with_import(top: Path, name: str, file: str) -> None:
    tree = yaml.load((top / "params.yaml").read_text())
    tree["imports"][name] = {"file": file}
    with (top / "params.yaml").open("w") as out:
        yaml.dump(tree, out)


def rerun(top: Path) -> set[str]:
    """The stages that `dvc repro` runs."""
    done = subprocess.run([*DVC, "repro"], cwd=top, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"^Running stage '(.+)':$", done.stdout, re.MULTILINE))


AGENTS = {"benchmark@random", "benchmark@noop", "benchmark@expert"}
STUDENTS = {"benchmark_student@base", "benchmark_student@sft", "benchmark_student@rl"}


def after(*changed: str) -> set[str]:
    """These stages and all that depend on them."""
    next_ones = {
        "collect@expert": {"filter"}, "import@others": {"filter"}, "filter": {"split", "score"},
        "split": {"sft", "agreement"},
        "student": {"sft", "agreement", *STUDENTS}, "sft": {"rl", "agreement", "benchmark_student@sft", "score"},
        "agreement": {"score"},
        "rl": {"benchmark_student@rl", "score", "report"}, **{name: {"score"} for name in (*AGENTS, *STUDENTS)},
    }  # fmt: skip
    found = set(changed)
    for _ in next_ones:
        found = found.union(*(next_ones.get(name, ()) for name in found))
    return found | {"report"} if found else found


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("teachers.expert.explore", 0.3, {"collect@expert", "filter"}),
        ("filter.min_steps_per_episode", 7, {"filter"}),
        ("split.random_seed", 43, {"split"}),
        ("profiles.tiny.dtype", "bfloat16", {"sft", "agreement", *STUDENTS}),
        ("profiles.tiny.prompt.history", 3, {"split", "student"}),
        ("profiles.tiny.sampling.temperature", 0.9, {"rl", "agreement", *STUDENTS}),
        ("profiles.tiny.student.random_seed", 1, {"student"}),
        ("profiles.tiny.sft.learning_rate", 1e-3, {"sft"}),
        ("profiles.tiny.rl.learning_rate", 1e-4, {"rl"}),
        ("benchmark.max_steps", 100, {*AGENTS, *STUDENTS}),
        ("benchmark.protocol", "balrog", {*AGENTS, *STUDENTS}),
        ("benchmark.agents.random.prompt", {"history": 1}, {"benchmark@random"}),
        ("benchmark.seeds", "200000-200031", {"import@others", *AGENTS, *STUDENTS}),
        ("profiles.qwen2b.sft.learning_rate", 1e-3, set()),
    ],
)
def test_a_changed_parameter_reruns_what_depends_on_it_and_nothing_else(repository, path, value, stages):
    file = repository / "params.yaml"
    tree = yaml.load(file.read_text())
    *parents, key = path.split(".")
    node = tree
    for parent in parents:
        node = node[parent]
    node[key] = value
    with file.open("w") as out:
        yaml.dump(tree, out)
    assert rerun(repository) == after(*stages)


# Each stage imports some of these; that dvc.yaml has all the others as well is tested above.
CHANGED = ("world", "chat", "imports", "quality", "pretraining", "sft", "grpo", "local", "score", "report", "compute")


@pytest.mark.parametrize("module", [f"{name}.py" for name in CHANGED])
def test_a_changed_module_reruns_the_stages_that_import_it_and_nothing_else(repository, module):
    file = repository / "src" / "apprentice" / module
    file.write_text(file.read_text() + "\n# changed\n")
    path = f"src/apprentice/{module}"
    users = {name for name in STAGES if path in closure(ROOT / FILES[name])}
    of_each = {"collect": {"collect@expert"}, "import": {"import@others"}}
    of_each |= {"benchmark": AGENTS, "benchmark_student": STUDENTS}
    assert rerun(repository) == after(*set().union(*(of_each.get(name, {name}) for name in users)))


def test_nothing_reruns_when_nothing_changed(repository):
    assert rerun(repository) == set()


def test_another_teacher_runs_alone_and_goes_into_the_filter(repository):
    file = repository / "params.yaml"
    tree = yaml.load(file.read_text())
    tree["teachers"]["monkey"] = {"policy": "random", "seeds": "0-9"}
    with file.open("w") as out:
        yaml.dump(tree, out)
    assert rerun(repository) == {"collect@monkey"} | after("filter")


def test_another_import_is_read_alone_and_goes_into_the_filter(repository):
    (repository / "friends.jsonl").touch()
    with_import(repository, "friends", "friends.jsonl")
    assert rerun(repository) == {"import@friends"} | after("filter")


def test_a_changed_file_of_an_import_reruns_that_import(repository):
    (repository / "others.jsonl").write_text("changed")
    assert rerun(repository) == after("import@others")


def test_another_agent_of_the_benchmark_plays_alone(repository):
    file = repository / "params.yaml"
    tree = yaml.load(file.read_text())
    tree["benchmark"]["agents"]["monkey"] = {"policy": "random"}
    with file.open("w") as out:
        yaml.dump(tree, out)
    assert rerun(repository) == {"benchmark@monkey", "score", "report"}


def test_other_weights_make_nobody_play_but_the_student_that_has_them(repository):
    (repository / "models/rl").write_text("changed")
    subprocess.run([*DVC, "commit", "--force", "rl"], cwd=repository, check=True, capture_output=True)
    assert rerun(repository) == {"benchmark_student@rl", "score", "report"}
