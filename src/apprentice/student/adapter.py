"""An adapter's folder as strangers need it: PEFT weights, the base model's name, the processor, a model card.

Nothing in it names a time, a machine or a path outside: the same training gives the same bytes.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from apprentice.errors import ConfigError
from apprentice.params import HubStudent, Lora, TinyStudent

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor


BASE = Path("models/base")
CARD = "README.md"
TAGS = ["apprentice", "crafter", "agent", "tool-use"]


def check_targets(base: Path, lora: Lora, key: str) -> None:
    """Raise ConfigError if a layer of the base model that `lora.target_modules` names cannot be adapted.

    Known by the model's configuration alone, before anything is trained. key: of the section lora, for the message.
    """
    named = lora.target_modules
    if named == "all-linear":
        return

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base))
    layers = {name: layer for name, layer in model.named_modules() if lora.vision or "visual" not in name}
    holders = Counter(id(layer.weight) for layer in model.modules() if hasattr(layer, "weight"))
    linear = {name.rpartition(".")[2] for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
    for target in (named,) if isinstance(named, str) else named:
        pattern = target if isinstance(named, str) else rf"(.*\.)?{re.escape(target)}"  # as PEFT takes them
        try:
            found = [name for name in layers if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"{key}.target_modules: {target!r} is no regular expression: {error}") from None
        if not found:
            hint = f"; a text is a pattern for whole names, so write [{target}] for a layer's name" * (target is named)
            raise ConfigError(
                f"{key}.target_modules: no layer is called {target!r}; linear ones are "
                f"{', '.join(sorted(linear - {'lm_head'}))}, and all-linear is every one of them{hint}"
            )
        for name in found:
            layer, why = layers[name], ""
            if layer is model.get_output_embeddings():
                why = "scores the words, and is not adapted in play"
            elif not isinstance(layer, torch.nn.Linear):
                why = f"is no linear layer but a {type(layer).__name__}, and would be played as it was"
            elif holders[id(layer.weight)] > 1:
                why = "has its weights in common with another layer, which would not be adapted"
            if why:
                raise ConfigError(
                    f"{key}.target_modules: {target!r} names {name}, which {why}; name linear layers, as "
                    "[q_proj, v_proj], or write all-linear"
                )


def complete(
    folder: Path, name: str, processor: "Qwen3VLProcessor", student: HubStudent | TinyStudent, sections: dict[str, str]
) -> None:
    """Make what PEFT has saved a folder that transformers, PEFT and vLLM load as it is.

    name: of the stage, and of the folder under models/. sections: of the card, by heading, beside how to load the
    adapter.
    """
    processor.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    base, revision = named(student)
    config |= {"base_model_name_or_path": base, "revision": revision}
    # PEFT keeps names of layers in a set, whose order is another one in each process.
    config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    front = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": [*TAGS, "lora"],
    }
    about = (
        f"A LoRA adapter for `{base}`{f' at revision `{revision}`' if revision else ''} that plays "
        "[Crafter](https://github.com/danijar/crafter): it is shown the world and calls the tool `act`. Made by the "
        f"stage `{name}` of apprentice; the commit is the one whose dvc.lock has this folder."
    )
    use = _use(name, base, revision, config["r"], tower=config["exclude_modules"] is None)
    made_with = ", ".join(f"{one} {version(one)}" for one in ("torch", "transformers", "trl", "peft"))
    sections = {"Use": use, **sections, "Made with": made_with}
    write_card(folder, front, f"apprentice, {name}", about, sections)


def named(student: HubStudent | TinyStudent) -> tuple[str, str | None]:
    """What to load the base model by, and its revision: of the hub, or this checkout's own, from its top."""
    return (student.model, student.revision) if isinstance(student, HubStudent) else (str(BASE), None)


def write_card(folder: Path, front: dict, title: str, about: str, sections: dict[str, str]) -> None:
    """Write README.md with Hugging Face's front matter."""
    parts = [f"---\n{_yaml(front)}---\n\n# {title}\n\n{about}\n"]
    parts += [f"\n## {heading}\n\n{text.strip()}\n" for heading, text in sections.items()]
    (folder / CARD).write_text("".join(parts))


def section(folder: Path, heading: str) -> str:
    """What a folder's card says under a heading; nothing where there is no such."""
    card = folder / CARD
    text = card.read_text() if card.is_file() else ""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].strip()


def settings(sections: dict) -> str:
    """Settings as a block of YAML."""
    return f"```yaml\n{_yaml(sections)}```"


def teachers(found: list[dict]) -> str:
    """A table of who taught, from a survey of rows."""
    return table(
        ("teacher", "model", "episodes", "rows"), [(t["teacher"], t["model"], t["episodes"], t["rows"]) for t in found]
    )


def table(header: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A table in Markdown; fractions with four digits."""
    lines = [list(header), None, *rows]
    return "\n".join(
        "|" + "---|" * len(lines[0])
        if cells is None
        else "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        for cells in lines
    )


def _yaml(value: dict) -> str:
    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.dump(value, text)
    return text.getvalue()


def _use(name: str, base: str, revision: str | None, rank: int, tower: bool) -> str:
    at = f', revision="{revision}"' if revision else ""
    flag = " --enable-tower-connector-lora" if tower else ""
    most = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)  # those that vLLM knows
    pinned = f" --revision {revision}" if revision else ""
    return f"""\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}"{at})
model = PeftModel.from_pretrained(base, "models/{name}")
processor = AutoProcessor.from_pretrained("models/{name}")  # its chat template needs the tools: tools=[…]
```

Or behind OpenAI's API, asked for the model `{name}`:

    vllm serve {base}{pinned} --enable-lora --max-lora-rank {most} --lora-modules {name}=models/{name}{flag} \\
      --enable-auto-tool-choice --tool-call-parser hermes

`apprentice merge models/{name} OUT` writes a model of its own. A turn is asked as the rows of data/sft/val.jsonl are:
their system prompt, picture, text and tool."""
