"""`apprentice settings`: what params.yaml comes to, and where each value stands."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from apprentice import params
from apprentice.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    key: str
    """In the merged tree; of the profile without its name: sft.learning_rate."""
    value: Any
    place: str
    """The key in params.yaml that has it, which is what `-S` changes; empty for a default."""
    line: int | None
    """Of params.yaml, from 1."""


def show_settings(
    profile: Annotated[str | None, typer.Option(help="Another profile than the one in use.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a script: the same as JSON.")] = False,
) -> None:
    """Print every setting with its value and where that stands: the key to change it by.

    Example: apprentice settings --profile qwen8b
    """
    found = list(settings(profile))
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    key = max(len(one.key) for one in found)
    value = min(40, max(len(_value(one)) for one in found))
    for one in found:
        where = f"{params.PATH}:{one.line}  {one.place}" if one.place else "default"
        print(f"{one.key:{key}}  {_value(one):{value}}  {where}")


def _value(one: Setting) -> str:
    value = one.value
    if isinstance(value, list) and len(value) > 2 and value == list(range(value[0], value[-1] + 1)):
        return f"{value[0]}-{value[-1]}"  # seeds
    return value if isinstance(value, str) else json.dumps(value)


def settings(profile: str | None = None) -> Iterator[Setting]:
    """All settings, the profile's first. Raises ConfigError for a profile that is not there."""
    from ruamel.yaml import YAML

    checked = params.load()
    name = profile or checked.profile
    if name not in checked.profiles:
        known = ", ".join(checked.profiles)
        raise ConfigError(f"params.yaml: there is no profile {name!r}; profiles are {known}")
    file = YAML().load(params.PATH.read_text())
    whole = checked.model_dump(mode="json", exclude={"profiles", "profile"})
    yield Setting("profile", name, "profile", file.lc.key("profile")[0] + 1)
    names = params.lineage(file["profiles"], name)
    for path, value in _leaves(checked.profiles[name].model_dump(mode="json")):
        yield _found(".".join(path), value, file, [("profiles", one, *path) for one in names])
    for path, value in _leaves(whole):
        yield _found(".".join(path), value, file, [path])


def _leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _found(key: str, value: Any, file: Any, paths: list[tuple[str, ...]]) -> Setting:
    """The setting, from the first of these places that has it."""
    for path in paths:
        node = file
        for part in path[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and path[-1] in node:
            return Setting(key, value, ".".join(path), node.lc.key(path[-1])[0] + 1)
    return Setting(key, value, "", None)
