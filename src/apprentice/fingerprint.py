"""What shapes a result: settings, the code that computes it, the versions of the libraries that code computes with.

One rule, for `make deps`, which writes dvc.yaml's dependencies from it, and for the names under which episodes and
checkpoints are kept: a file's own imports, followed through the package, less the modules of SHAPELESS; and of the
libraries that these import, those of COMPUTING. An edit of anything else costs no episode and no adapter.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from apprentice import store
from apprentice.files import digest
from apprentice.world import world

PACKAGE = Path(__file__).parent

SHAPELESS = (
    # How a command begins and ends, and where things are kept.
    "__init__", "errors", "files", "cache", "fingerprint", "ledger", "workers", "gpus", "stage", "schema",
    "pipeline",
    # What is seen of it meanwhile.
    "progress", "training.live",
    # Settings: what they come to is in data/settings, which stages depend on. Where a stage runs.
    "params", "compute", "cloud", "cli", "environment",
    # What was paid for is kept as it came, whatever asks for it; and what it costs.
    "endpoint",
    # Which checkpoint is whole; how torchvision is imported.
    "training.checkpoints", "student.torchvision_operators", "serving.vllm_processes",
    # How many processes there are.
    "serving.processes",
)  # fmt: skip
"""Modules and rooms that shape no result."""

COMPUTING = {
    "PIL": "pillow", "accelerate": "accelerate", "bitsandbytes": "bitsandbytes", "crafter": "crafter",
    "datasets": "datasets", "deepspeed": "deepspeed", "numba": "numba", "numpy": "numpy",
    "opensimplex": "opensimplex", "peft": "peft", "pyarrow": "pyarrow", "scipy": "scipy", "tokenizers": "tokenizers",
    "torch": "torch", "transformers": "transformers", "trl": "trl",
}  # fmt: skip
"""Libraries whose version may change a result: the name that's imported → the name in the lock."""


POLICIES = ("random", "noop", "expert", "chat")
"""Modules of players/ that a stage uses only where its settings name them."""


def hashed(value) -> str:
    """A name for a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(**settings) -> str:
    """A name for all that shapes an episode or a checkpoint, apart from its seed: settings as JSON-able values.

    The versions of the world and of the rows belong to it.
    """
    return hashed({"world": world.VERSION, "store": store.VERSION, **settings})


def code(file: str | Path, players: Iterable[str] = (), afterwards: Iterable[str] = ()) -> str:
    """The digest of the code that computes what a stage's file makes, and of its libraries' installed versions.

    players: policies that play, which are imported by their names. afterwards: modules, `student.adapter`, that only
    work on what has been made. Raises nothing for a library that isn't installed here: its version is then empty.
    """
    files, libraries = shaping(Path(file), tuple(players), tuple(afterwards))
    versions = {name: _version(name) for name in libraries}
    return hashed([[digest(path) for path in files], versions])


@lru_cache
def shaping(
    file: Path, players: tuple[str, ...] = (), afterwards: tuple[str, ...] = ()
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files that shape what a stage's file makes, it among them, and the libraries that these compute with."""
    found, libraries = {file}, set()
    waiting = [file, *(PACKAGE / "players" / f"{name}.py" for name in players)]
    while waiting:
        at = waiting.pop()
        found.add(at)
        modules, imported, data = _reads(at)
        if at == file:
            modules = modules - {PACKAGE / "players" / f"{name}.py" for name in set(POLICIES) - set(players)}
        libraries |= imported
        found |= data
        waiting += [path for path in modules if path not in found and not _shapeless(path, afterwards)]
    return tuple(sorted(found)), tuple(sorted(libraries))


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def name(path: Path) -> str:
    """A module's name within the package: world.rules; of the package's own __init__, __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _shapeless(path: Path, afterwards: tuple[str, ...]) -> bool:
    own = name(path)
    return any(own == one or own.startswith(f"{one}.") for one in (*SHAPELESS, *afterwards))


def imports(path: Path) -> set[Path]:
    """The modules of the package that a file imports anywhere, also within functions.

    Of a room only what is imported from it: importing a module runs its room's __init__ as well, which shapes nothing.
    What is imported for annotations alone counts too.
    """
    return _reads(path, annotations=True)[0]


@lru_cache
def _reads(path: Path, annotations: bool = False) -> tuple[set[Path], set[str], set[Path]]:
    """Modules of the package that a file imports, computing libraries, and files beside it that it names.

    annotations: with what stands under `if TYPE_CHECKING:`, which never runs, and so shapes nothing.
    """
    names: set[str] = set()
    data: set[Path] = set()
    for node in _nodes(ast.parse(path.read_text()), annotations):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {module if _file(module) else node.module for module in inside.values()}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and path.is_relative_to(PACKAGE):
            data |= _named(path.parent, node.value)
    found = {file for imported in names if (file := _file(imported))}
    libraries = {COMPUTING[top] for top in (imported.split(".")[0] for imported in names) if top in COMPUTING}
    return found, libraries, data


def _nodes(tree: ast.AST, annotations: bool) -> Iterator[ast.AST]:
    """All parts of a file's code, or those that can run."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not annotations and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from _nodes(other, annotations)
        else:
            yield from _nodes(node, annotations)


def _file(module: str) -> Path | None:
    """The file of a module or a room of the package."""
    top, *parts = module.split(".")
    at = PACKAGE.joinpath(*parts)
    files = (at / "__init__.py", at.with_suffix(".py")) if top == "apprentice" else ()
    return next((file for file in files if file.is_file()), None)


def _named(folder: Path, text: str) -> set[Path]:
    """The file of this name beside a module."""
    if not text or len(text) > 60 or "/" in text or text.startswith(".") or "\n" in text:
        return set()
    return {folder / text} if (folder / text).is_file() else set()


def _version(library: str) -> str:
    try:
        return version(library).partition("+")[0]  # a build for the CPU says so behind a plus
    except ModuleNotFoundError:
        return ""
