"""YAML files as frozen, checked trees: the base of their models, and errors that name the key and its remedy."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from apprentice.errors import ConfigError

T = TypeVar("T", bound="Section")


class Section(BaseModel):
    """Frozen. Unknown keys are errors, and so is a text where a number belongs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


_SECRET = {"api_key_env", "base_url", "environment", "secrets"}
"""Keys where somebody may have written a key or a password: what stands there is never quoted."""


def parsed(path: Path, text: str | None = None) -> Any:
    """What a YAML file says. Raises ConfigError where it is no YAML or not there. text: its contents, if at hand."""
    try:
        return YAML(typ="safe").load(path.read_text() if text is None else text)
    except FileNotFoundError:
        raise ConfigError(f"there is no {path} in {os.getcwd()}; run from the top of the checkout") from None
    except (UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def checked(path: Path, tree: Any, model: type[T], elsewhere: Callable[[tuple], bool] = lambda location: False) -> T:
    """A tree of this model. Raises ConfigError that names each wrong key of the file, and what would be right.

    elsewhere: whether the file has a place's value in another place, where its error is told.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(model.model_fields)}")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        errors = [one for one in error.errors() if not elsewhere(one["loc"])] or error.errors()
        raise ConfigError("\n".join(_explained(path, tree, errors, model))) from None


def _explained(path: Path, tree: dict, errors: Iterable[dict], model: type[Section]) -> Iterable[str]:
    for error in errors:
        # pydantic adds names of its own to a location, of a union's branch for one: keep what stands in the file, and
        # the last part where the error is about a key that should not, or should, be there.
        location, node = [], tree
        for place, part in enumerate(error["loc"]):
            inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int))
            about_key = error["type"] in ("missing", "extra_forbidden") and place == len(error["loc"]) - 1
            if inside or about_key:
                location.append(str(part))
                node = node[part] if inside else None
        key = ".".join(location)
        if error["type"] == "extra_forbidden":
            known = known_keys(model, location[:-1])
            yield f"{path}: {key}: unknown key" + (f"; known there: {', '.join(known)}" if known else "")
        elif error["type"] == "missing":
            yield f"{path}: {key}: is required"
        else:
            message = error["msg"].removeprefix("Value error, ")
            quotable = key and not _SECRET & set(location) and not isinstance(error["input"], (dict, Section))
            got = f" (it is {error['input']!r})" if quotable else ""
            yield f"{path}: {key}: {message}{got}" if key else f"{path}: {message}"


def known_keys(model: type[Section], location: Iterable[str]) -> list[str]:
    """The keys that a model knows at a place of its file, sorted where several sections may stand there."""
    found = [model]
    for part in location:
        found = [section for at in found for section in _sections(at, part)]
    names = [name for section in found for name in section.model_fields]
    return names if len(found) == 1 else sorted(set(names))


def _sections(model: Any, part: str) -> list:
    """What may stand under a key of a section, or of a mapping or a list of sections: the sections in its type."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        field = model.model_fields.get(part)
        return _unwrapped(field.annotation) if field else []
    return _unwrapped(get_args(model)[-1 if model.__origin__ is dict else 0])


def _unwrapped(kind: Any) -> list:
    """The sections, mappings and lists of sections in a type: unions taken apart, annotations left out."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    if getattr(kind, "__origin__", None) in (dict, tuple) and not hasattr(kind, "__metadata__"):
        return [kind] if any(map(_unwrapped, get_args(kind))) else []
    return [section for inner in get_args(kind) for section in _unwrapped(inner)]
