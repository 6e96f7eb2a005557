"""The agent of `apprentice export balrog` shows the student what it sees here; on_balrog.py has the real evaluator."""

import base64
import importlib.util
import io
import json
import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from command_line import run, write_params
from PIL import Image

from apprentice import prompt
from apprentice.cli import balrog
from apprentice.params import Prompt
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.world import TILES, World

FIELDS = "model_id completion stop_reason input_tokens output_tokens reasoning"
CALL = {"base_url": "http://127.0.0.1:1/v1", "timeout": 1, "max_retries": 0, "model_id": "rl"}


class BaseAgent:
    """BALROG's own, as of 2026-03."""

    def __init__(self, client_factory, prompt_builder):
        self.client, self.prompt_builder = client_factory(), prompt_builder

    def reset(self):
        pass


@pytest.fixture
def agent(tmp_path, monkeypatch):
    """The agent for a prompt, out of its file."""
    for name, known in (
        ("agents.base", {"BaseAgent": BaseAgent}),
        ("client", {"LLMResponse": namedtuple("R", FIELDS)}),
    ):
        module = ModuleType(f"balrog.{name}")
        module.__dict__.update(known)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def made(shown: Prompt):
        balrog.write(tmp_path, shown)
        spec = importlib.util.spec_from_file_location("custom", tmp_path / "custom.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.CustomAgent(lambda: SimpleNamespace(client_kwargs={"temperature": 1.0}, **CALL), None)

    return made


def as_balrog_says(seen) -> dict:
    """BALROG's text and picture of a moment."""
    (dx, dy), codes = seen.facing, seen.view
    tile = TILES[codes[3 + dy, 4 + dx]]
    ahead = {"void": "None", "plant-ripe": "plant"}.get(tile, "arrow" if tile.startswith("arrow") else tile)
    owned = "\n".join(f"- {name}: {count}" for name, count in seen.inventory.items() if count)
    vitals = "\n".join(f"- {name}: {value}/9" for name, value in seen.vitals.items())
    status = "You are sleeping, and will not be able take actions until energy is full.\n\n" if seen.sleeping else ""
    scene = f"{status}You see:\n- grass 1 step to your west\n\nYou face {ahead} at your front."
    texts = {"long_term_context": scene, "short_term_context": f"Your status:\n{vitals}\n\nYour inventory:\n{owned}"}
    return {"text": texts, "image": Image.fromarray(seen.image)}


@pytest.mark.parametrize(
    "shown",
    [Prompt(rules=False, history=8, picture="world"), Prompt(inventory="all", scale=2)],
    ids=["tiny", "all"],
)
def test_it_shows_what_the_pipeline_shows_and_plays_what_is_asked(agent, monkeypatch, shown):
    custom = agent(shown)
    (episode,) = play(Scripted("expert"), Spec([3], 230, shown))
    assert any(step.observation.sleeping for step in episode.steps)
    world, asked = World(3), []
    seen = world.reset()

    def create(**request):
        asked.append(request)
        function = SimpleNamespace(arguments=json.dumps({"actions": [action]}))
        message = SimpleNamespace(content=None, tool_calls=[SimpleNamespace(function=function)])
        usage = SimpleNamespace(prompt_tokens=90, completion_tokens=9)
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=usage)

    monkeypatch.setattr(custom.endpoint.chat.completions, "create", create)
    names = {"move_left": "Move West", "place_stone": "Place Stone", "noop": "Noop", "do": "Do"}
    history: list[str] = []
    for step in episode.steps:
        (action,) = step.executed
        spoken = custom.act(as_balrog_says(seen)).completion
        assert spoken == names.get(action, spoken)
        [_, said] = prompt.messages(seen, shown, tuple(history))
        words = said["content"][1]["text"].replace("ripe-plant", "sapling")
        assert asked[-1]["messages"][1]["content"][1]["text"] == words, f"step {step.step}"
        data = asked[-1]["messages"][1]["content"][0]["image_url"]["url"].split(",")[1]
        assert (np.array(Image.open(io.BytesIO(base64.b64decode(data)))) == prompt.picture(seen, shown)).all()
        history.append(action)
        seen = world.step(action).observation
    assert asked[0]["messages"][0]["content"] == prompt.system(shown) and asked[0]["tools"] == prompt.TOOLS
    assert asked[0]["temperature"] == 1.0
    size = custom.act.__globals__["picture"](Image.new("RGB", (72, 72)))["image_url"]["url"]
    assert size.startswith("data:image/png;base64,")
    with pytest.raises(ValueError, match=r"crafter_kwargs.size=\[72,72\]"):
        custom.act(as_balrog_says(seen) | {"image": Image.new("RGB", (256, 256))})


def test_a_reply_without_an_action_is_for_balrog_to_count(agent, monkeypatch):
    custom = agent(Prompt(history=2))
    message = SimpleNamespace(content="I wait.", tool_calls=None)
    reply = SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=None)
    monkeypatch.setattr(custom.endpoint.chat.completions, "create", lambda **_: reply)
    assert custom.act(as_balrog_says(World(1).reset())).completion == "I wait." and custom.history == ["noop"]


def test_the_command_writes_it_and_refuses_a_prompt_that_balrog_cannot_fill(tmp_path):
    write_params(tmp_path)
    done = run(tmp_path, "export", "balrog")
    assert done.returncode == 0 and "balrog/agents/custom.py" in done.stdout
    assert '"""An agent for BALROG' in (tmp_path / "exports/balrog/custom.py").read_text()
    with pytest.raises(balrog.ConfigError, match="mode: text, which"):
        balrog.write(tmp_path, Prompt(mode="text"))
