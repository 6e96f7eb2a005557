"""The commands that README, CONTRIBUTING and docs/ show, as they stand there."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apprentice.pipeline import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {".", "$EDITOR", "cd", "export", "git", "nvidia-smi", "pip", "python3", "xdg-open", ".venv-sky/bin/sky"}
"""Programs that are not ours, in blocks of commands."""
PROGRAMS = {"apprentice", "dvc", "make", "python", "pre-commit"} | OTHERS


@dataclass(frozen=True)
class Command:
    page: Path
    line: int
    words: tuple[str, ...]
    """Without what stands before (`A=b`), and without a comment."""
    inline: bool
    """In a sentence, where it may be part of a command."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    return [command for page in PAGES for command in (*_blocks(page), *_sentences(page))]


def _blocks(page: Path) -> Iterator[Command]:
    """Indented lines of which the first begins with a program are all commands, up to an empty line."""
    known = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("    ") or not line.strip():
            known = None
            continue
        first = line.split()[0]
        if known is None:
            known = first in PROGRAMS
        if known:
            yield from _split(page, number, line, inline=False)


def _sentences(page: Path) -> Iterator[Command]:
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("    "):
            for quoted in re.findall(r"`([^`]+)`", line):
                if quoted.split()[0] in ("apprentice", "dvc", "make") and " " in quoted.strip():
                    yield from _split(page, number, quoted, inline=True)


def _split(page: Path, number: int, line: str, inline: bool) -> Iterator[Command]:
    for part in re.split(r"\s&&\s", re.sub(r"\s#.*", "", line)):
        words = shlex.split(part)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        yield Command(page, number, tuple(words), inline)
