"""An agent for BALROG's evaluator that asks `apprentice serve rl`, with the prompt and the tool that it was taught.

`apprentice export balrog` writes it as custom.py, with the settings of the student filled in. Copy that over
balrog/agents/custom.py of a checkout of github.com/balrog-ai/BALROG, and run there:

    python eval.py agent.type=custom envs.names=crafter envs.crafter_kwargs.size=[72,72] eval.num_workers=1 \
        client.client_name=vllm client.model_id=rl client.base_url=http://127.0.0.1:8000/v1

It sees the picture (72 pixels, the size that it was taught with), and of BALROG's text what its prompt has: status,
inventory and the cell ahead. BALROG doesn't say whether a plant is ripe, nor what is ahead near the map's edge.
"""

import base64
import io
import json
import os
import re

import openai
from balrog.agents.base import BaseAgent
from balrog.client import LLMResponse
from PIL import Image

SETTINGS: dict = {}
"""system, tools, items (those always listed), history, max_actions, size (as shown), side: filled in by the export."""
_FACING = {"move_left": "left", "move_right": "right", "move_up": "up", "move_down": "down"}
_SPOKEN = {"move_left": "Move West", "move_right": "Move East", "move_up": "Move North", "move_down": "Move South"}
_NAMES = {"plant": "sapling", "None": "nothing"}


class CustomAgent(BaseAgent):
    """One decision a call of the model; where it may ask for several actions, they are played one after the other."""

    def __init__(self, client_factory, prompt_builder):
        super().__init__(client_factory, prompt_builder)
        asked = self.client
        self.endpoint = openai.OpenAI(
            base_url=asked.base_url,
            api_key=os.environ.get("APPRENTICE_SERVE_KEY", "none"),
            timeout=asked.timeout,
            max_retries=asked.max_retries,
        )
        self.begin()

    def begin(self):
        self.facing, self.asleep, self.energy = "down", False, 9
        self.history: list[str] = []
        self.waiting: list[str] = []

    def reset(self):
        super().reset()
        self.begin()

    def act(self, obs, prev_action=None):
        """The next action, by BALROG's name; for a reply without one what was said, which BALROG counts as invalid."""
        scene, status = (obs["text"][name] for name in ("long_term_context", "short_term_context"))
        owned = {name: int(count) for name, count in re.findall(r"- (\w+): (\d)", status)}
        # Asleep, actions do nothing, but for the one that comes when it's rested.
        if self.history and self.history[-1] in _FACING and (not self.asleep or self.energy == 9):
            self.facing = _FACING[self.history[-1]]
        self.asleep, self.energy = "You are sleeping" in scene, owned["energy"]
        if self.waiting:
            return self.answer(self.waiting.pop(0))
        reply = self.endpoint.chat.completions.create(
            model=self.client.model_id,
            messages=[
                {"role": "system", "content": SETTINGS["system"]},
                {
                    "role": "user",
                    "content": [picture(obs["image"]), {"type": "text", "text": self.words(scene, owned)}],
                },
            ],
            tools=SETTINGS["tools"],
            temperature=self.client.client_kwargs.get("temperature"),
        )
        message = reply.choices[0].message
        first, *self.waiting = actions(message) or ["noop"]
        said = None if actions(message) else message.content or "no action"
        return self.answer(first, said, reply.usage)

    def answer(self, action, said=None, usage=None):
        self.history.append(action)
        return LLMResponse(
            model_id=self.client.model_id,
            completion=said or _SPOKEN.get(action, action.replace("_", " ").title()),
            stop_reason="stop",
            input_tokens=usage.prompt_tokens if usage else 0,
            output_tokens=usage.completion_tokens if usage else 0,
            reasoning=None,
        )

    def words(self, scene, owned):
        """The words of the prompt: vitals, what is owned, and what is ahead."""
        vitals = ("health", "food", "drink", "energy")
        items = {name: 0 for name in SETTINGS["items"]} | {name: owned[name] for name in owned if name not in vitals}
        ahead = re.search(r"You face ([\w-]+) at your front", scene)
        cell = ahead[1] if ahead else "nothing"
        lines = [
            " ".join(f"{name} {owned[name]}" for name in vitals),
            " ".join(f"{name} {count}" for name, count in items.items()) or "nothing owned",
            f"{'asleep' if self.asleep else 'awake'}, facing {self.facing}, {_NAMES.get(cell, cell)}",
        ]
        if count := SETTINGS["history"]:
            lines.append("last " + " ".join((["nothing"] * count + self.history)[-count:]))
        return "\n".join(lines)


def picture(image):
    """The picture as the student was shown it, a PNG data URL."""
    side, (width, height) = SETTINGS["side"], SETTINGS["size"]
    if image.size != (side, side):
        raise ValueError(f"the picture has {image.size}; run eval.py with envs.crafter_kwargs.size=[{side},{side}]")
    file = io.BytesIO()
    seen = image.crop((0, 0, side, side * height // width))
    seen.resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def actions(message):
    """The actions that a reply asks for; none where it has no call that can be read, or asks for what there isn't."""
    found = []
    for call in message.tool_calls or ():
        try:
            found += json.loads(call.function.arguments)["actions"]
        except (ValueError, LookupError, TypeError):
            return []
    known = SETTINGS["tools"][0]["function"]["parameters"]["properties"]["actions"]["items"]["enum"]
    return found if all(action in known for action in found) and len(found) <= SETTINGS["max_actions"] else []
