"""examples/trl_grpo.py: TRL's own trainer takes our processors, and trains in worlds of `apprentice serve world`."""

import sys

import pytest
import torch
from test_serve_world import serving

from apprentice import prompt
from apprentice.params import Prompt
from apprentice.pipeline import ROOT
from apprentice.student import loading
from apprentice.student.encoding import batch, encode
from apprentice.world import World

sys.path.append(str(ROOT / "examples"))
SHOWN = Prompt(mode="image", rules=False, history=8)


@pytest.fixture
def student(tiny_folder, tmp_path):
    """A folder with a student that calls the tool, with any of four actions."""
    model, processor = loading.load(tiny_folder)
    shown = [prompt.messages(World(400_000 + seed).reset(), SHOWN) for seed in range(4)]
    actions = ("move_left", "move_up", "noop", "do")
    rows = batch(processor, [encode(processor, [*chat, prompt.answer([one])]) for chat in shown for one in actions])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_trl_trains_a_student_in_served_worlds(student, tmp_path):
    import trl_grpo

    class Moving(trl_grpo.Crafter):
        """Rewards what even this student does now and then."""

        def get_reward(self) -> float:
            return float(sum(action.startswith("move") for action in self._history))

    assert trl_grpo.TOOLS == prompt.TOOLS
    with serving(tmp_path, "world") as (url, _):
        Moving.url = url
        trainer = trl_grpo.trainer(str(student), str(tmp_path / "trained"), 2, Moving, learning_rate=1e-2)
        world, trainer._batch_environments = Moving(), [None]
        asked = [{"role": "system", "content": trl_grpo.SYSTEM}, {"role": "user", "content": world.reset(400_001)}]
        ours = prompt.messages(World(400_001).reset(), SHOWN)
        assert trainer._tokenize_prompts([asked])[0] == [encode(loading.processor(student), ours).prompt_ids]
        trainer.train()
    first, second, _ = trainer.state.log_history
    for step in (first, second):
        assert step["tools/call_frequency"] >= 1 and step["tools/failure_frequency"] == 0
    assert first["rewards/Moving/std"] > 0
    learnt = [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]
    assert any(weight.abs().max() > 0 for weight in learnt)


def test_what_the_world_refuses_is_said_to_the_model(tmp_path):
    import trl_grpo

    with serving(tmp_path, "world") as (url, _):
        trl_grpo.Crafter.url = url
        world = trl_grpo.Crafter()
        world.reset(1)
        with pytest.raises(ValueError, match="fly"):
            world.act(["fly"])
        world.act(["noop"] * (trl_grpo.STEPS))
        assert world.act(["noop"]) == [{"type": "text", "text": "The episode is over."}]
        assert world._history[8:] == ["noop"] * trl_grpo.STEPS
        picture, words = world.reset(1)
        assert picture["image"].size == (72, 72) and words["text"].endswith("last" + 8 * " nothing")
