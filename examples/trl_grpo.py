"""GRPO by TRL's own trainer, in the worlds of `apprentice serve world`: its `environment_factory`, over plain HTTP.

    apprentice serve world                                       # in one terminal
    apprentice merge models/sft student                          # in another
    python examples/trl_grpo.py student trained --steps 100

It needs trl, peft, Pillow and torchvision, and nothing of apprentice: copy `Crafter` into a trainer of your own. With a
key, export APPRENTICE_SERVE_KEY.

TRL has an episode as one conversation that grows: each action's picture comes back as the tool's answer. A student of
this pipeline knows single decisions, so only the first looks to it as it learnt them; `stages/rl.py` trains on these.
"""

import argparse
import base64
import io
import json
import os
import urllib.error
import urllib.request
from typing import Literal, get_args

import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer

URL = "http://127.0.0.1:8000"
SYSTEM = "Play Crafter. Call act with one action."
"""What the student was told; its model card has it."""
HISTORY, STEPS = 8, 20
"""How many actions are shown as the last ones, and how many calls there are in an episode."""
Action = Literal[
    "noop", "move_left", "move_right", "move_up", "move_down", "do", "sleep", "place_stone", "place_table",
    "place_furnace", "place_plant", "make_wood_pickaxe", "make_stone_pickaxe", "make_iron_pickaxe", "make_wood_sword",
    "make_stone_sword", "make_iron_sword",
]  # fmt: skip
_ACTIONS = {
    "type": "array",
    "items": {"type": "string", "enum": list(get_args(Action))},
    "minItems": 1,
    "description": "The actions to take, in order.",
}
_PARAMETERS = {"type": "object", "properties": {"actions": _ACTIONS}, "required": ["actions"]}
TOOLS = [
    {"type": "function", "function": {"name": "act", "description": "Act in the world.", "parameters": _PARAMETERS}}
]
"""The tool as a student of apprentice has learnt it; what TRL writes of `Crafter.act` lacks `minItems`."""


class Crafter:
    """An episode on the server. TRL makes one for each rollout, resets it for the next, and offers `act` as a tool."""

    url = URL

    def __init__(self):
        self._session = None

    def reset(self, seed: int, **_) -> list[dict]:
        """Begin the world of this seed; rows of the data set with the same seed play in the same world."""
        path = f"/sessions/{self._session}/reset" if self._session else "/sessions"
        self._last = self._post(path, {"seed": seed, "max_steps": STEPS})
        self._session = self._last.get("session_id", self._session)
        self._reward, self._history = 0.0, ["nothing"] * HISTORY
        return self._shown()

    def act(self, actions: list[Action]) -> list[dict]:
        """Act in the world.

        Args:
            actions: The actions to take, in order.
        """
        for action in actions:
            if self._last["done"]:
                return [{"type": "text", "text": "The episode is over."}]
            self._last = self._post(f"/sessions/{self._session}/step", {"action": {"action": action}})
            self._reward += self._last["reward"]
            self._history.append(action)
        return self._shown()

    def get_reward(self) -> float:
        """What the world gave: 1 for each achievement, 0.1 for a health point."""
        return self._reward

    def _shown(self) -> list[dict]:
        seen = self._last["observation"]
        words = seen["text"].split("\naround you")[0] + "\nlast " + " ".join(self._history[-HISTORY:])
        picture = Image.open(io.BytesIO(base64.b64decode(seen["image"])))
        return [{"type": "image", "image": picture}, {"type": "text", "text": words}]

    def _post(self, path: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("APPRENTICE_SERVE_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:  # TRL gives it to the model as the tool's answer
            raise ValueError(error.read().decode()) from None


def trainer(model: str, output: str, steps: int, environment: type[Crafter] = Crafter, **changes) -> GRPOTrainer:
    """TRL's trainer. model: a folder or a name of the hub. changes: of GRPOConfig."""
    processor = AutoProcessor.from_pretrained(model)
    prompt = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [{"type": "text", "text": ""}]},  # reset fills it
    ]
    settings = {
        "max_steps": steps,
        "num_generations": 4,  # in one world
        "per_device_train_batch_size": 4,
        "max_completion_length": 4096,  # of a whole episode, with its pictures
        "max_tool_calling_iterations": STEPS,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        # A picture's token that was drawn would be one without a picture.
        "generation_kwargs": {"suppress_tokens": [processor.image_token_id, processor.video_token_id]},
        "report_to": "none",
    }
    found = GRPOTrainer(
        model,
        args=GRPOConfig(output, **settings | changes),
        train_dataset=Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in range(400_000, 401_000)]),
        processing_class=processor,
        environment_factory=environment,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", exclude_modules=".*visual.*"),
    )
    found._env_tools[None] = TOOLS
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--url", default=URL)
    given = parser.parse_args()
    Crafter.url = given.url
    training = trainer(given.model, given.output, given.steps)
    training.train()
    training.save_model(given.output)
