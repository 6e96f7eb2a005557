"""What an install brings: the world without the pipeline, and every import of an extra's modules declared."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from apprentice.fingerprint import PACKAGE
from apprentice.pipeline import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
OF = {
    "apprentice": "pipeline",
    "apprentice.__init__": "base",
    "apprentice.gpus": "train",
    "apprentice.world": "base",
    "apprentice.world.png": "pipeline",
    "apprentice.environment": "serve",
    "apprentice.environment.__init__": "base",
    "apprentice.environment.gymnasium_env": "base",
    "apprentice.cli.serve": "serve",
    "apprentice.cli.film": "film",
    "apprentice.results.figure": "film",
    "apprentice.cli.doctor": "all",
    "apprentice.cli.export": "all",
    "apprentice.serving": "train",
    "apprentice.serving.chat_api": "all",
    "apprentice.student": "train",
    "apprentice.student.__init__": "base",
    "apprentice.training": "train",
    "stages": "pipeline",
    "stages.distill": "train",
    "stages.rl": "train",
    "stages.sft": "train",
    "stages.student": "train",
    "tests": "dev",
}
"""The extra with which a module, or all that lie below it, has to work: the longest name that fits counts."""
LAZY = {
    "apprentice.cli.balrog_agent": {"balrog"},  # copied into BALROG, never imported here
    "apprentice.student.torchvision_operators": {"torch"},  # acts only where torchvision is about to be imported
    "tests.cli.trainer_reads": {"axolotl", "llamafactory", "yaml"},  # runs in their environments
    "tests": {"starlette", "vllm", "openenv", "sky", "boto3"},  # targets with environments of their own
}
UNIMPORTED = {
    "dvc-s3": "DVC imports it for a remote on S3",
    "mypy": "a program",
    "mypy-baseline": "a program",
    "pytest-xdist": "pytest imports it for make test",
    "ruff": "a program",
    "torchvision": "Transformers imports it for processors",
}
"""Declared and never imported here, with who uses it."""
LOCAL = {
    path.stem for folder in ("tests", "stages", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
}
LOCAL |= {"apprentice", "stages"}


def declared(extra: str) -> set[str]:
    """The distributions that an extra asks for, with those of the extras it names, and the base install's."""
    found = {canonicalize_name(name) for name in names(EXTRAS["base"])}
    if extra == "dev":
        extra, found = "all", found | {canonicalize_name(name) for name in names(EXTRAS["dev"])}
    waiting = [extra]
    while waiting:
        for requirement in map(Requirement, EXTRAS[waiting.pop()]):
            if requirement.name == PROJECT["name"]:
                waiting += requirement.extras
            else:
                found.add(canonicalize_name(requirement.name))
    return found


def names(requirements: list[str]) -> list[str]:
    return [Requirement(one).name for one in requirements if Requirement(one).name != PROJECT["name"]]


def module(path: Path) -> str:
    top = PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT
    return ".".join(path.relative_to(top).with_suffix("").parts)


def of(path: Path) -> str:
    """The extra of a module."""
    parts = module(path).split(".")
    return next(OF[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in OF)


def imported(path: Path) -> set[str]:
    """The packages from elsewhere that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - LOCAL


FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "stages").glob("*.py"), *(ROOT / "tests").rglob("*.py")])
DISTRIBUTIONS = {name: {canonicalize_name(one) for one in found} for name, found in packages_distributions().items()}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_every_import_is_of_a_package_that_the_extra_declares(path):
    lazy = next((LAZY[name] for name in (module(path), module(path).partition(".")[0]) if name in LAZY), set())
    for name in imported(path) - lazy:
        assert DISTRIBUTIONS[name] & declared(of(path)), f"pyproject.toml: the extra {of(path)} lacks {name}"


def test_every_declared_package_is_used():
    used = {one for path in FILES for name in imported(path) for one in DISTRIBUTIONS.get(name, ())}
    asked = {canonicalize_name(name) for requirements in EXTRAS.values() for name in names(requirements)}
    assert asked - used == set(UNIMPORTED)


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-gpu.lock"])
def test_what_is_pinned_is_within_the_bounds(lock):
    pinned = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / lock).read_text(), re.MULTILINE)
    versions = {canonicalize_name(name): version for name, version in pinned}
    extras = EXTRAS if lock == "requirements.lock" else {name: EXTRAS[name] for name in EXTRAS.keys() - {"dev"}}
    for requirement in (Requirement(one) for requirements in extras.values() for one in requirements):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


WORLD = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # an import of it then raises ModuleNotFoundError
import gymnasium
from apprentice.world import World
environment = gymnasium.make("apprentice.environment:apprentice/Crafter-v0", max_steps=5)
image, info = environment.reset(seed=7)
assert image.shape == (72, 72, 3) and info["seed"] == 7
assert (World(seed=7, max_steps=5).reset().image == image).all()
while not environment.step(1)[3]:
    pass
try:
    import apprentice.cli
except SystemExit as end:
    sys.exit(end.code)
"""


def test_the_base_install_has_the_world_and_a_command_that_says_what_it_lacks():
    """In a process to which all packages that only extras declare are missing."""
    lacking = declared("dev") - declared("base")
    blocked = sorted(name for name, found in DISTRIBUTIONS.items() if found <= lacking and name.isidentifier())
    assert {"torch", "transformers", "deepspeed", "dvc", "openai", "fastapi", "pyarrow", "typer"} <= set(blocked)
    code = WORLD.format(blocked=blocked)
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'apprentice[all]'" in done.stderr


def test_every_file_of_the_package_is_in_a_wheel():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["apprentice"]
    data = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py"
    }
    assert data == {path for pattern in patterns for path in PACKAGE.glob(pattern)}
