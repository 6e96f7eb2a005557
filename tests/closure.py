"""Which library files a stage imports, directly or not, found in the source: what dvc.yaml has to list."""

import ast
from pathlib import Path

from apprentice.ledger import PLACES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "apprentice"


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports anywhere, also within functions; not those of PLACES."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        parts = [name.split(".")[1] for name in names if name.startswith("apprentice.")]
        found |= {part for part in parts if (PACKAGE / f"{part}.py").exists()}
    return found - PLACES


def closure(stage: Path) -> set[str]:
    """The paths, from the checkout's top, of all library files that running a stage may load."""
    found, waiting = set(), imports(stage) | imports(PACKAGE / "__init__.py")
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= imports(PACKAGE / f"{module}.py") - found
    return {f"src/apprentice/{module}.py" for module in found} | {"src/apprentice/__init__.py"}
