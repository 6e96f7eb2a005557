"""An adapter merged into its base model: a model of its own, for servers and tools that know no adapters."""

import json
from pathlib import Path

from apprentice.errors import ConfigError, WorkError
from apprentice.files import replacing
from apprentice.student import adapter as adapters


def merge(adapter: Path, out: Path, base: str | None = None) -> None:
    """Write the folder `out`: weights in the base's own precision, processor with chat template, model card.

    base: a folder or the name of a hub's model; if not given, models/base, or what the adapter names where that is not
    there. An adapter trained on a quantised base is merged into the base as it was before.
    Raises ConfigError if there is no adapter or `out` is in use, WorkError if adapter and base don't fit.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"{adapter} is no adapter: it has no adapter_config.json; train one with dvc repro sft")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists; nothing is overwritten: name another folder, or remove it")

    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from apprentice.student import loading

    config = json.loads((adapter / "adapter_config.json").read_text())
    base = base or (str(adapters.BASE) if adapters.BASE.is_dir() else config["base_model_name_or_path"])
    revision = config["revision"] if base == config["base_model_name_or_path"] else None
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, revision=revision, dtype="auto")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise WorkError(f"{adapter} and {base} don't fit: {why}; name its base model with --base") from None
    front = {
        "base_model": config["base_model_name_or_path"],
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": adapters.TAGS,
    }
    about = (
        f"`{config['base_model_name_or_path']}` with an adapter of apprentice merged into it; it plays "
        "[Crafter](https://github.com/danijar/crafter). Load it with `AutoModelForImageTextToText` and "
        "`AutoProcessor`, or `vllm serve` with `--enable-auto-tool-choice --tool-call-parser hermes`."
    )
    headings = ("Data", "Metrics", "Settings", "Made with")
    sections = {heading: text for heading in headings if (text := adapters.section(adapter, heading))}
    with replacing(out) as folder:
        model.save_pretrained(folder)
        loading.processor(adapter).save_pretrained(folder)
        adapters.write_card(folder, front, f"apprentice, {adapter.name} merged", about, sections)
