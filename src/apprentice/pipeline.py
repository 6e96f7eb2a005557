"""What is written from the code's imports: dvc.yaml's dependencies, versions.yaml, the drawing in docs/house.md.

python -m apprentice.pipeline, or `make deps`.
"""

import re
import textwrap
from pathlib import Path

from ruamel.yaml import YAML

from apprentice.fingerprint import COMPUTING, PACKAGE, imports, modules, shaping

ROOT = PACKAGE.parent.parent
PIPELINE, LOCK, VERSIONS = ROOT / "dvc.yaml", ROOT / "requirements.lock", PACKAGE / "versions.yaml"
HOUSE = ROOT / "docs/house.md"
FLOORS = {
    "nouns": "errors schema files cache params compute progress workers gpus world episode prompt policy store "
    "fingerprint ledger endpoint stage",
    "verbs": "play players data student serving training results cloud environment",
    "faces": "pipeline cli",
}
"""The rooms of the package: its modules and packages. A room imports only those that stand before it."""
ROOMS = " ".join(FLOORS.values()).split()
_WIDTH = 120


def main() -> None:
    """Bring all of it up to date."""
    HOUSE.write_text(drawn(HOUSE.read_text()))
    VERSIONS.write_text(versions())
    PIPELINE.write_text(written(PIPELINE.read_text()))


def versions() -> str:
    """versions.yaml: the libraries that compute, with their versions in requirements.lock."""
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", LOCK.read_text(), re.MULTILINE))
    lines = [f"{library}: {pinned[library]!r}" for library in sorted(set(COMPUTING.values()))]
    head = "# Libraries that compute, as requirements.lock pins them. A stage depends on those it uses. By make deps."
    return "\n".join([head, *lines]) + "\n"


def stages(tree: dict) -> dict[str, dict]:
    """The stages of a dvc.yaml by name, those of a foreach as its template."""
    return {name: stage.get("do", stage) for name, stage in tree["stages"].items()}


def file_of(stage: dict) -> Path:
    """The file that a stage runs."""
    return ROOT / re.match(r"python (stages/\w+\.py)", stage["cmd"])[1]


def code_of(name: str, stage: dict) -> tuple[list[str], list[str]]:
    """The paths of the code that shapes a stage's outputs, and the libraries it computes with.

    A player is left to dvc.yaml, which names it after the policy in params.yaml.
    """
    files, libraries = shaping(file_of(stage))
    files = set(files) | ({PACKAGE / "params.py", PACKAGE / "schema.py"} if name == "settings" else set())
    return sorted(str(path.relative_to(ROOT)) for path in files), list(libraries)


def written(text: str) -> str:
    """A dvc.yaml with its dependencies on code and libraries as they have to be; all else stays as it is."""
    for name, stage in stages(YAML(typ="safe").load(text)).items():
        code, libraries = code_of(name, stage)
        others = [path for path in stage["deps"] if "$" in path or not path.startswith(("src/", "stages/"))]
        params = [param for param in stage.get("params", []) if isinstance(param, str)]
        if libraries:
            params.append({str(VERSIONS.relative_to(ROOT)): libraries})
        begins = re.search(rf"^  {name}:\n", text, re.MULTILINE).end()
        ends = begins + re.search(r"^  ?\w|^\w|\Z", text[begins:], re.MULTILINE).start()
        body = _with(text[begins:ends], "deps", [*code, *others])
        body = _with(body, "params", params) if params else body
        text = text[:begins] + body + text[ends:]
    return text


def room(path: Path) -> str:
    """The room that a module is in; __main__ is the door to cli."""
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "cli" if first == "__main__" else first


def doors() -> dict[str, set[str]]:
    """Room → the rooms that it imports from."""
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path in modules():
        if room(path) in found:
            found[room(path)] |= {room(imported) for imported in imports(path)} & found.keys() - {room(path)}
    return found


def drawn(text: str) -> str:
    """docs/house.md with the rooms' imports drawn. What follows from two other lines is left out."""
    found = doors()

    def reached(name: str) -> set[str]:
        return found[name].union(*map(reached, found[name]))

    lines = ["flowchart BT"]
    for floor, rooms in FLOORS.items():
        lines += [f"  subgraph {floor}", *(f"    {name}" for name in rooms.split()), "  end"]
    for name, others in found.items():
        further = set().union(*map(reached, others))
        lines += [f"  {name} --> {other}" for other in ROOMS if other in others - further]
    drawing = "\n".join(["```mermaid", *lines, "```"])
    return re.sub(r"```mermaid\n.*?```", drawing, text, flags=re.DOTALL)


def _with(stage: str, key: str, items: list) -> str:
    """A stage's text with this list under the key: in square brackets, as many items to a line as fit."""
    found = re.search(rf"^( +){key}:.*\n(?:\1 .*\n)*", stage, re.MULTILINE)
    indent = found[1]
    lines = textwrap.wrap(
        f"{key}: [{', '.join(map(_shown, items))}]",
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return stage[: found.start()] + "\n".join(lines) + "\n" + stage[found.end() :]


def _shown(item) -> str:
    """An item of a list in YAML's flow style."""
    if isinstance(item, dict):
        return "".join(f"{{{key}: [{', '.join(values)}]}}" for key, values in item.items())
    return f'"{item}"' if "$" in item else item


if __name__ == "__main__":
    main()
