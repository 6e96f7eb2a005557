"""student: the base model in models/base. A hub model is downloaded; the tiny one is built and taught to see.

    dvc repro student        or: python stages/student.py

To this pipeline the tiny student is what a hub model is: it sees, it answers in form, it cannot play.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import params
from apprentice.files import replacing
from apprentice.stage import run, write_metrics

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

    from apprentice.training.pretraining import Frame

BASE = Path("models/base")


def main() -> None:
    """Make models/base for the profile in use."""
    settings = params.load()
    make = hub if isinstance(settings.active.student, params.HubStudent) else tiny
    with replacing(BASE) as folder:
        metrics = make(settings, folder)
    write_metrics("student", metrics)
    print("student: " + ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))


def hub(settings: params.Params, folder: Path) -> dict:
    from apprentice.student.hub import download

    student = settings.active.student
    download(student.model, student.revision, folder)
    return {"megabytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6}


def tiny(settings: params.Params, folder: Path) -> dict:
    from apprentice.progress import counted
    from apprentice.student import loading
    from apprentice.training import devices, pretraining
    from apprentice.workers import in_processes

    student, shown_with = settings.active.student, settings.active.prompt
    assert isinstance(student, params.TinyStudent)
    options = student.pretraining
    calls = [(seed, options.frames_per_seed) for seed in options.seeds]
    played = in_processes(pretraining.frames, calls)
    worlds = dict(counted(played, "frames", len(calls), "world"))
    held_out = [frame for seed in options.seeds[:4] for frame in worlds[seed]]
    seen = [frame for seed in options.seeds[4:] for frame in worlds[seed]]

    ranks, _, _ = devices.layout(options.batch_size, options.batch_size, on=())
    devices.launch(teach, ranks, settings.active, seen, folder, on=())
    loading.use_all_cores()
    model, processor = loading.load(folder)
    sight = pretraining.sight(cast("Qwen3VLForConditionalGeneration", model), processor, shown_with, held_out)
    sizes = {"parameters": model.num_parameters(), "vocabulary": len(processor.tokenizer), "frames": len(seen)}
    metrics = sizes | sight
    write_card(folder, student, shown_with, metrics, sight)
    return metrics


def teach(profile: params.Profile, seen: "list[Frame]", folder: Path) -> None:
    """What each rank does, on the processor: build the model, and teach it to see. The first saves it."""
    from torch import distributed

    from apprentice.progress import Progress
    from apprentice.student.tiny import build, tokenizer
    from apprentice.training import pretraining

    student = profile.student
    assert isinstance(student, params.TinyStudent)
    options, seed = student.pretraining, student.random_seed
    if int(os.environ["WORLD_SIZE"]) > 1:
        distributed.init_process_group("gloo")
    first = os.environ["RANK"] == "0"
    tokens = tokenizer(*pretraining.vocabulary(profile.prompt, seen[:1000]), student.architecture.vocabulary)
    model, processor = build(student.architecture, tokens, seed)
    with Progress("pretraining", {"step": options.steps}, shown=first) as progress:

        def tell(step: int, loss: float) -> None:
            progress.news = f"loss {loss:.3f}"
            progress.end("step")

        pretraining.pretrain(model, processor, profile.prompt, seen, options, seed, profile.dtype == "mixed", tell)
    if first:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def write_card(
    folder: Path, student: params.TinyStudent, shown_with: params.Prompt, metrics: dict, sight: dict[str, float]
) -> None:
    """README.md. A model of the hub has its own."""
    from apprentice import prompt
    from apprentice.student import card
    from apprentice.world.world import World

    options = student.pretraining
    asked = prompt.messages(World(options.seeds[0]).reset(), shown_with)
    about = (
        "A Qwen3-VL with small numbers that sees [Crafter](https://github.com/danijar/crafter) and calls the tool "
        "`act` in form, with any action: it cannot play yet. Made by the stage `student` of apprentice; the commit is "
        "the one whose dvc.lock has this folder."
    )
    sections = {
        "Use": f"{card.use(folder, BASE.name, asked)}\n\n{card.served(str(BASE))}",
        "Data": f"Frames of noisy play, of worlds {options.seeds[4]} to {options.seeds[-1]}: what is in each cell, "
        "and a random action as the reply.",
        "Metrics": card.table(("metric", "value"), metrics.items()),
        "Settings": card.settings({"student": student.model_dump(mode="json", exclude={"pretraining": {"seeds"}})}),
        "Made with": card.versions("torch", "transformers"),
    }
    metadata = {"license": "mit", "library_name": "transformers"}
    card.write(folder, BASE.name, about, sections, metadata, card.results(sight, "frames of held-out worlds"))


if __name__ == "__main__":
    run(main)
