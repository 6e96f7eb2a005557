"""An adapter's folder as strangers need it: PEFT weights, the base model or its name, the processor, a model card.

Nothing in it names a time, a machine or a path outside: the same training gives the same bytes.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from apprentice.errors import ConfigError
from apprentice.params import HubStudent, Lora, TinyStudent
from apprentice.student import card

if TYPE_CHECKING:
    from huggingface_hub import EvalResult
    from transformers import Qwen3VLProcessor


BASE = Path("models/base")
CARRIED = "base"
"""The folder within an adapter's that has its base model, where no hub has it."""


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
    folder: Path,
    name: str,
    processor: "Qwen3VLProcessor",
    student: HubStudent | TinyStudent,
    asked: list[dict],
    sections: dict[str, str],
    results: "list[EvalResult]",
) -> None:
    """Make what PEFT has saved a folder that transformers, PEFT and vLLM load as it is, and that needs no other.

    name: of the stage, and of the folder under models/. asked: a chat, as the student is shown one. sections, results:
    of the card, beside how to use the adapter.
    """
    processor.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    if isinstance(student, HubStudent):
        base, revision = student.model, student.revision
        loaded, of = f'"{base}", revision="{revision}"', f"`{base}` at revision `{revision}`"
        metadata: dict = {"base_model": base, "base_model_relation": "adapter"}
    else:
        shutil.copytree(BASE, folder / CARRIED, dirs_exist_ok=True)
        base, revision = f"models/{name}/{CARRIED}", None
        loaded, of, metadata = f'f"{{folder}}/{CARRIED}"', f"the model in its folder `{CARRIED}`", {}
    config |= {"base_model_name_or_path": base, "revision": revision}
    # PEFT keeps names of layers in a set, whose order is another one in each process.
    config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    metadata |= {"license": card.license_of(BASE), "library_name": "peft", "tags": ["lora"]}
    about = (
        f"A LoRA adapter for {of} that plays [Crafter](https://github.com/danijar/crafter): it is shown the world and "
        f"calls the tool `act`. Made by the stage `{name}` of apprentice; the commit is the one whose dvc.lock has "
        "this folder."
    )
    tower = config["exclude_modules"] is None
    use = f"{card.use(folder, name, asked, loaded)}\n\n{_served(name, base, revision, config['r'], tower)}"
    made_with = card.versions("torch", "transformers", "trl", "peft")
    card.write(folder, name, about, {"Use": use, **sections, "Made with": made_with}, metadata, results)


def _served(name: str, base: str, revision: str | None, rank: int, tower: bool) -> str:
    flag = " --enable-tower-connector-lora" if tower else ""
    most = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)  # those that vLLM knows
    pinned = f" --revision {revision}" if revision else ""
    return f"""\
Or behind OpenAI's API, asked for the model `{name}`:

    vllm serve {base}{pinned} --enable-lora --max-lora-rank {most} --lora-modules {name}=models/{name}{flag} \\
      --enable-auto-tool-choice --tool-call-parser hermes

`apprentice merge models/{name} OUT` writes a model of its own."""
