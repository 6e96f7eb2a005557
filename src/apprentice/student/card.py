"""A model's card: what Hugging Face's hub reads of it, and a program that asks it, by transformers' own means.

What it's asked is a decision, as the student is shown one; the decision's pictures lie beside the card.
"""

import base64
import io
import re
import textwrap
from collections.abc import Iterable
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from pprint import pformat

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from ruamel.yaml import YAML

from apprentice import prompt
from apprentice.world.observation import ACTIONS

CARD = "README.md"
PICTURES = "example*.png"
_TASK = "image-text-to-text"
_MODEL = "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
_PROGRAM = """\
import json
import re

{peft}from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "models/{name}"  # this folder, wherever you have put it
{model}processor = AutoProcessor.from_pretrained(folder)

{asked}
inputs = processor.apply_chat_template(
    messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
# Drawn, as in play: a student that always says what's likeliest gets stuck.
output = model.generate(**inputs, max_new_tokens=256, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
call = re.search("<tool_call>(.*?)</tool_call>", reply, re.DOTALL)
print(json.loads(call[1])["arguments"]["actions"] if call else f"no call: {{reply}}")
"""


def write(
    folder: Path, name: str, about: str, sections: dict[str, str], metadata: dict, results: list[EvalResult]
) -> None:
    """Write README.md, with the metadata that the hub checks; the same bytes each time.

    name: what it's called after "apprentice, ". sections: by heading. metadata: what isn't the same for every model.
    """
    title = f"apprentice, {name}"
    tags = ["apprentice", "crafter", "agent", "tool-use", *metadata.pop("tags", ())]
    data = ModelCardData(
        **metadata,
        pipeline_tag=_TASK,
        tags=tags,
        datasets=["crafter"],
        model_name=title,
        eval_results=results or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{about}\n"]
    parts += [f"\n## {heading}\n\n{text.strip()}\n" for heading, text in sections.items()]
    (folder / CARD).write_text("".join(parts))


def results(metrics: dict[str, float], on: str) -> list[EvalResult]:
    """Metrics for `write`, found on what nothing was learnt from."""
    return [
        EvalResult(_TASK, "crafter", f"Crafter, {on}", name, value, metric_name=name.replace("_", " "))
        for name, value in metrics.items()
    ]


def results_of(folder: Path) -> list[EvalResult]:
    """Those of a folder's card."""
    return _metadata(folder).eval_results or []


def license_of(folder: Path) -> str:
    """The licence that a model's card names; what is made of the model has it too."""
    return _metadata(folder).license or "unknown"


def _metadata(folder: Path) -> ModelCardData:
    file = folder / CARD
    return ModelCard.load(file, ignore_metadata_errors=True).data if file.is_file() else ModelCardData()


def use(folder: Path, name: str, messages: list[dict], base: str | None = None) -> str:
    """A program that loads models/<name>, asks it this chat and reads its reply. Writes the chat's pictures beside it.

    messages: OpenAI's, as a player is shown them. base: of an adapter, the arguments that load its base model.
    """
    shown, pictures = [], 0
    for message in prompt.plain(messages):
        if isinstance(message.get("content"), list):
            parts = []
            for part in message["content"]:
                if part["type"] == "image_url":
                    pictures += 1
                    picture = f"example{pictures}.png"
                    (folder / picture).write_bytes(base64.b64decode(part["image_url"]["url"].split(",", 1)[1]))
                    part = {"type": "image", "image": _Code(f'Image.open(f"{{folder}}/{picture}")')}
                parts.append(part)
            message = message | {"content": parts}
        shown.append(message)
    loaded = {"peft": "", "model": _MODEL}
    if base:
        loaded["peft"] = "from peft import PeftModel\n"
        loaded["model"] = _MODEL.replace("model =", "base =").replace("(folder)", f"({base})")
        loaded["model"] += "model = PeftModel.from_pretrained(base, folder)\n"
    tools = deepcopy(prompt.TOOLS)
    tools[0]["function"]["parameters"]["properties"]["actions"]["items"]["enum"] = _Code("actions")
    asked: dict[str, list] = {"messages": shown, "actions": list(ACTIONS), "tools": tools}
    lines = "\n".join(_assigned(name, value) for name, value in asked.items())
    return f"```python\n{_PROGRAM.format(name=name, asked=lines, **loaded)}```"


def served(folder: str) -> str:
    """How vLLM serves a whole model."""
    return f"""\
Or behind OpenAI's API:

    vllm serve {folder} --enable-auto-tool-choice --tool-call-parser hermes"""


def merged(use: str, folder: str) -> str:
    """What an adapter's card says of its use, for the model that it becomes when it's merged into its base."""
    if not use:
        return ""
    program = use[: use.index("\n```") + 4]
    program = re.sub(r"from peft .*\n", "", program)
    program = re.sub(r"base = .*\nmodel = .*\n", _MODEL, program)
    program = re.sub(r'folder = "\S*"', lambda _: f'folder = "{folder}"', program)
    return f"{program}\n\n{served(folder)}"


class _Code:
    """What is printed as it stands."""

    def __init__(self, code: str):
        self.code = code

    def __repr__(self) -> str:
        return self.code


def _assigned(name: str, value: list) -> str:
    lines = pformat(value, width=110 - len(name), sort_dicts=False, compact=True)
    return f"{name} = " + textwrap.indent(lines, " " * (len(name) + 3)).strip()


def section(folder: Path, heading: str) -> str:
    """What a folder's card says under a heading; nothing where there is no such."""
    card = folder / CARD
    text = card.read_text() if card.is_file() else ""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].strip()


def settings(sections: dict) -> str:
    """Settings as a block of YAML."""
    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(sections, text)
    return f"```yaml\n{text.getvalue()}```"


def teachers(found: list[dict]) -> str:
    """A table of who taught, from a survey of rows."""
    return table(
        ("teacher", "model", "episodes", "rows"), [(t["teacher"], t["model"], t["episodes"], t["rows"]) for t in found]
    )


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A table in Markdown; fractions with four digits."""
    names = list(header)
    return "\n".join([_line(names), "|" + "---|" * len(names), *map(_line, rows)])


def _line(cells: Iterable) -> str:
    return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def versions(*libraries: str) -> str:
    """What a model was made with."""
    return ", ".join(f"{one} {version(one)}" for one in libraries)
