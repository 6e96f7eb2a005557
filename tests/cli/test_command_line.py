"""The command `apprentice` as a whole: its help, its completion, and how fast it answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import write_params

from apprentice.cli import application

GROUPS = {"": application} | {f"{group.name} ": group.typer_instance for group in application.registered_groups}
COMMANDS = {
    prefix + (command.name or command.callback.__name__): command.callback
    for prefix, group in GROUPS.items()
    for command in group.registered_commands
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_with_an_example(name):
    assert f"Example: apprentice {name}" in COMMANDS[name].__doc__


def test_the_shell_completes_commands_and_agents(tmp_path):
    write_params(tmp_path)
    for words, expected in (("apprentice tra", "traces"), ("apprentice play ap", "api"), ("apprentice play r", "rl")):
        completion = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        done = subprocess.run(
            [Path(sys.executable).parent / "apprentice"],  # what is completed is the program of this name
            cwd=tmp_path,
            env=os.environ | {"_APPRENTICE_COMPLETE": "complete_bash"} | completion,
            capture_output=True,
            text=True,
        )
        assert expected in done.stdout.split(), (done.stdout, done.stderr)


def test_help_loads_nothing_heavy():
    code = "import apprentice.cli, sys; print([name for name in sys.modules if name in ('torch', 'numpy', 'dvc')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout
