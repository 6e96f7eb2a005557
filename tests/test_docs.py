"""README and docs/: every command that they show is one that there is, every link leads somewhere, every quoted error
is still said. `make test-docs` runs the commands.
"""

import ast
import re
from pathlib import Path

import click
import pytest
import typer
from documented import OTHERS, PAGES, commands
from dvc.cli import DvcParserError, parse_args
from ruamel.yaml import YAML

from apprentice.cli import application
from apprentice.fingerprint import PACKAGE
from apprentice.pipeline import ROOT

yaml = YAML(typ="safe")
PARAMS = yaml.load((ROOT / "params.yaml").read_text())
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
STAGES = set(yaml.load((ROOT / "dvc.yaml").read_text())["stages"])
SHOWN = commands()


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_command_that_is_shown_is_one_that_there_is(command):
    program, *words = command.words
    known = {"apprentice": apprentice, "dvc": dvc, "make": make, "python": python}
    if program in known:
        known[program](words, command.inline)
    else:
        assert program in OTHERS or program == "pre-commit", f"{program} is no known program"


def apprentice(words: list[str], inline: bool) -> None:
    group = typer.main.get_command(application)
    context = click.Context(group, info_name="apprentice")
    if words == ["--install-completion"]:  # to parse it is to do it
        assert any(words[0] in option.opts for option in group.params)
        return
    try:
        while True:
            context = group.make_context("apprentice", list(words), parent=context)
            if not isinstance(group, click.Group):
                break
            words = [*context._protected_args, *context.args]
            if not words and inline:
                break
            _, group, words = group.resolve_command(context, words)
    except click.MissingParameter:
        assert inline
    except click.exceptions.NoArgsIsHelpError:
        assert inline
    except (click.exceptions.Exit, typer.Exit):
        pass  # --help, --version


def dvc(words: list[str], inline: bool) -> None:
    try:
        parsed = parse_args(words)
    except DvcParserError:
        assert inline, f"dvc {' '.join(words)}"
        return
    for target in getattr(parsed, "targets", None) or ():
        if words[0] == "repro":
            assert target.partition("@")[0] in STAGES, f"dvc.yaml has no stage {target}"
    for change in getattr(parsed, "set_param", None) or ():
        path = change.partition("=")[0]
        if path[0] not in "+~":
            exists(path.strip("\"'"))


def exists(path: str) -> None:
    node = PARAMS
    for key in path.split("."):
        assert key in node, f"params.yaml has no {path}"
        node = node[key]


def make(words: list[str], inline: bool) -> None:
    for target in words:
        assert "=" in target or target in TARGETS or target in STAGES, f"the Makefile has no target {target}"


def python(words: list[str], inline: bool) -> None:
    assert words[0] == "-m" or (ROOT / words[0]).exists(), f"there is no {words[0]}"


def test_commands_were_found():
    assert {"apprentice", "dvc", "make", "python"} <= {command.words[0] for command in SHOWN} and len(SHOWN) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: there is no {path}"
        assert not heading or heading in headings(file), f"{page.name}: {file.name} has no {heading}"


def headings(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_page_is_in_the_site_and_in_the_readme():
    site, readme = (ROOT / "mkdocs.yml").read_text(), (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in site, page.name
        assert page.name == "index.md" or f"docs/{page.name}" in readme, page.name


def test_troubleshooting_quotes_what_is_said():
    """Each quoted piece of a message stands in the code, or in the Makefile; … stands for what differs."""
    said = [re.sub(r"\s+", " ", (ROOT / "Makefile").read_text())]
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                said.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    for path in (ROOT / "stages").glob("*.py"):
        said.append(path.read_text())
    rows = re.findall(r"^\| (.+?) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [piece for row in rows if not row.startswith("DVC") for piece in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 40
    for message in quoted:
        for piece in filter(None, map(str.strip, message.split("…"))):
            assert any(piece in one for one in said), f"nothing says {piece!r}"
