"""An adapter merged into its base model: a model of its own, for servers and tools that know no adapters."""

import json
import shutil
from pathlib import Path

from apprentice.errors import ConfigError, WorkError
from apprentice.files import replacing
from apprentice.student import adapter as adapters
from apprentice.student import card


def merge(adapter: Path, out: Path, base: str | None = None) -> None:
    """Write the folder `out`: weights in the base's own precision, processor with chat template, model card.

    base: a folder or the name of a hub's model; if not given, the one that the adapter carries, models/base, or what
    the adapter names, whichever is there. An adapter trained on a quantised base is merged into the base as it was
    before.
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
    named, carried = config["base_model_name_or_path"], adapter / adapters.CARRIED
    base = base or next((str(folder) for folder in (carried, adapters.BASE) if folder.is_dir()), named)
    revision = config["revision"] if base == named else None
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, revision=revision, dtype="auto")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise WorkError(f"{adapter} and {base} don't fit: {why}; name its base model with --base") from None
    metadata = {"base_model": named, "base_model_relation": "finetune"} if config["revision"] else {}
    metadata |= {"license": card.license_of(adapter), "library_name": "transformers"}
    about = (
        f"The adapter `{adapter.name}` of apprentice and its base model `{named}` as one; it plays "
        "[Crafter](https://github.com/danijar/crafter)."
    )
    sections = {"Use": card.merged(card.section(adapter, "Use"), str(out))}
    sections |= {heading: card.section(adapter, heading) for heading in ("Data", "Metrics", "Settings", "Made with")}
    with replacing(out) as folder:
        model.save_pretrained(folder)
        loading.processor(adapter).save_pretrained(folder)
        for picture in adapter.glob(card.PICTURES):
            shutil.copy(picture, folder)
        written = {heading: text for heading, text in sections.items() if text}
        card.write(folder, f"{adapter.name} merged", about, written, metadata, card.results_of(adapter))
