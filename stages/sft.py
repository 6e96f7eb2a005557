"""sft: LoRA fine-tuning of models/base on data/sft, with TRL's SFTTrainer; the adapter goes to models/sft.

    dvc repro sft        or: python stages/sft.py

The loss is on the answers only. Validated every `eval_steps`, the adapter with the lowest validation loss is
kept; where nothing is held out, the last one. With `evaluation`, the student plays held-out worlds at each validation,
and the adapter that does best there can be kept instead.
Checkpoints lie in the user's cache, named by everything that shapes them: a killed run continues.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import compute, params
from apprentice.errors import WorkError
from apprentice.stage import run, write_curve, write_metrics

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

    from apprentice.training.examples import Rows
    from apprentice.training.live import Live
    from apprentice.training.own_play import OwnPlay
    from apprentice.training.sft import SftTrainer

BASE, OUT = Path("models/base"), Path("models/sft")
DATA = {name: Path(f"data/sft/{name}.jsonl") for name in ("train", "val")}


def main() -> None:
    """Train the adapter models/sft."""
    settings = params.load()
    compute.reporters()  # before minutes of work
    profile, sft, where = settings.active, settings.active.sft, f"profiles.{settings.profile}"

    from apprentice import gpus
    from apprentice.cache import cache_folder
    from apprentice.files import digest
    from apprentice.fingerprint import code, fingerprint
    from apprentice.serving import vllm
    from apprentice.student import adapter
    from apprentice.training import devices, memory

    adapter.check_targets(BASE, sft.lora, f"params.yaml: {where}.sft.lora")
    inputs = {name: digest(path) for name, path in DATA.items()} | {"base": digest(BASE, without="README.md")}
    made_by = code(__file__, afterwards=("student.adapter", "student.card"))
    surveys = {
        name: fingerprint(rows=inputs[name], base=inputs["base"], code=made_by)
        for name, path in DATA.items()
        if path.stat().st_size
    }
    if sft.evaluation and "val" not in surveys:
        print(f"sft: there are no rows to validate on, so {where}.sft.evaluation has no occasion to play, either")
    evaluation = sft.evaluation if "val" in surveys else None
    left_out = sum(too_long(name, survey, profile, where) for name, survey in surveys.items())
    serving = compute.load().vllm.model_copy(update={"gpus": None})  # for a few minutes of play, none of their own
    plays = vllm.plan(serving, gpus.names(), training=True) if evaluation else vllm.Plan(())
    ranks, rows, accumulation = devices.layout(sft.batch_size, sft.micro_batch_size, on=plays.training)
    shaping: dict[str, Any] = {"sft": sft.model_dump(mode="json"), "dtype": profile.dtype}
    shaping |= {"inputs": list(inputs.values()), "answers": profile.sampling.max_tokens}
    if sft.zero.stage:
        shaping["ranks"] = ranks  # each has its part of a checkpoint
    if evaluation:
        shaping |= {name: getattr(profile, name).model_dump(mode="json") for name in ("prompt", "sampling")}
    checkpoints = cache_folder() / "sft" / fingerprint(**shaping, code=made_by)
    relief = memory.relief(f"{where}.sft", sft)
    with vllm.Servers(plays, serving, BASE, profile.dtype, [], rank=sft.lora.rank) as students:
        of_run = (profile, surveys, left_out, checkpoints)
        work = (train, ranks, *of_run, rows, accumulation, students.servers, plays.sleeps)
        devices.launch(*work, group=sft.zero.stage > 0, relief=relief, on=plays.training)


def too_long(name: str, survey: str, profile: params.Profile, where: str) -> int:
    """How many rows of a file don't fit. Raises WorkError if none does."""
    from apprentice.training import examples

    known = examples.survey(DATA[name], BASE, survey)
    fit = known.fitting(profile)
    if not fit.any():
        raise WorkError(
            f"sft: {DATA[name]} has no row of at most {profile.sft.max_length} tokens, the shortest has "
            f"{min(known.lengths, default=0)}, with an answer of at most {profile.sampling.max_tokens}, the shortest "
            f"has {min(known.answers, default=0)}: raise {where}.sft.max_length or {where}.sampling.max_tokens, or "
            f"show less by {where}.prompt"
        )
    return int((~fit).sum())


def train(
    profile: params.Profile,
    surveys: dict[str, str],
    left_out: int,
    checkpoints: Path,
    rows: int,
    accumulation: int,
    servers: tuple,
    sleeping: bool,
) -> None:
    """What each rank does. surveys: the name of each file's, of those that have rows. rows: at once, in each rank.
    servers: that play held-out worlds; none plays in process. sleeping: they and the trainer take turns."""
    from transformers import EarlyStoppingCallback

    from apprentice.student import loading
    from apprentice.training.checkpoints import Often, Whole, last_checkpoint
    from apprentice.training.live import Live
    from apprentice.training.own_play import OwnPlay
    from apprentice.training.probe import Probe
    from apprentice.training.sampler import sampler
    from apprentice.training.sft import SftTrainer

    sft = profile.sft
    validated = "val" in surveys
    # Before the model: ZeRO-3 divides it as it's loaded.
    args = arguments(profile, checkpoints, rows, accumulation, validated)
    model, processor = loading.load(BASE, dtype=profile.dtype, quantization=sft.lora.quantization)
    data = {name: examples_of(name, survey, processor, profile) for name, survey in surveys.items()}
    patience = sft.early_stopping_patience if validated else None
    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=data["train"].dataset,
        eval_dataset=data["val"].dataset if validated else None,
        data_collator=data["train"].collate,
        processing_class=processor,
        peft_config=loading.lora_config(sft.lora),
        callbacks=[Often(), Whole(), *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    news = {"loss": ("loss", ".3f"), "eval_loss": ("validation loss", ".3f")}
    news["eval_mean_token_accuracy"] = ("token accuracy", ".1%")
    news["eval_achievements"] = ("held-out achievements", ".2f")
    live = Live(trainer, OUT.name, partial(plan, trainer), write_curves, news, stays="eval_loss")
    if sft.zero.stage < 3:  # there no rank has a whole weight to fold
        loading.fold(trainer.model)
    player, held_out = None, sft.evaluation if validated else None
    if held_out:
        temperature = profile.sampling.temperature or 1.0
        probe = partial(Probe, held_out.seeds, profile.prompt, temperature, held_out.max_sampler_mismatch)
        player = sampler(servers, profile, BASE, processor, checkpoints, sleeping, probe)
        player.sleep()  # training comes first
        trainer.held_out = partial(played, OwnPlay(trainer, player, profile, checkpoints), held_out, live)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    live.close()
    if player:
        player.close()
    # With stage 3 each rank has a part of the weights, and all bring them together.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sft.zero.stage == 3 else None
    if trainer.is_world_process_zero():
        write(trainer, weights, processor, profile, surveys, left_out)


def played(play: "OwnPlay", worlds: params.SftEvaluation, live: "Live", step: int) -> dict[str, float]:
    """What the student's play on held-out worlds comes to after so many steps."""
    from apprentice.training.own_play import outcome

    live.begin("held-out play")
    episodes = play.held_out(worlds.seeds, worlds.max_steps, play.profile.sft.random_seed, step)
    live.end("held-out play")
    return outcome(episodes)


def arguments(profile: params.Profile, checkpoints: Path, rows: int, accumulation: int, validated: bool = True):
    """The settings as TRL takes them."""
    from apprentice.training import devices, live, memory
    from apprentice.training.sft import config

    sft, readers = profile.sft, devices.readers()
    by_play = sft.evaluation and sft.evaluation.keep == "achievements"
    return config(
        *(sft, profile.dtype, checkpoints, rows, accumulation),
        num_train_epochs=1,  # `dataset.order` has all of them
        train_sampling_strategy="sequential",
        per_device_eval_batch_size=sft.micro_batch_size,
        eval_strategy="steps" if validated else "no",
        eval_steps=sft.eval_steps,
        save_steps=sft.eval_steps,
        load_best_model_at_end=validated,
        metric_for_best_model="eval_achievements" if by_play else "eval_loss",
        logging_steps=25 if sft.eval_steps < 1 else min(sft.eval_steps, 25),
        deepspeed=memory.zero_config(sft.zero),
        dataloader_num_workers=readers["num_workers"],
        dataloader_multiprocessing_context=readers["multiprocessing_context"],
        dataloader_persistent_workers=readers["num_workers"] > 0,
        **live.reporting(OUT.name),
    )


def examples_of(name: str, survey: str, processor: "Qwen3VLProcessor", profile: params.Profile) -> "Rows":
    """The rows of a file that fit, in the order of training; of validation some, like lengths together."""
    import numpy as np

    from apprentice.data import dataset
    from apprentice.training import examples

    known, sft = examples.survey(DATA[name], BASE, survey), profile.sft
    chosen = np.flatnonzero(known.fitting(profile))
    if name == "val" and sft.eval_rows and sft.eval_rows < len(chosen):
        chosen = chosen[np.linspace(0, len(chosen) - 1, sft.eval_rows).round().astype(int)]
    lengths = known.lengths[chosen]
    if name == "train":
        order = dataset.order(lengths, sft.batch_size, sft.epochs, sft.random_seed)
    else:
        order = lengths.argsort(kind="stable")
    return examples.Rows(DATA[name], processor, known.places, chosen[order])


def plan(trainer: "SftTrainer") -> tuple[dict[str, int], int]:
    """What is still to be done, and how many steps have been."""
    state, every = trainer.state, trainer.state.eval_steps
    validations = state.max_steps // every - state.global_step // every if trainer.eval_dataset else 0
    ahead = {"step": state.max_steps - state.global_step, "validation": int(validations)}
    return ahead | ({"held-out play": int(validations)} if trainer.held_out else {}), state.global_step


def write_curves(history: list[dict]) -> None:
    columns = {"loss": "loss", "mean_token_accuracy": "token_accuracy", "learning_rate": "learning_rate"}
    write_curve("sft_train", history, columns)
    write_curve("sft_val", history, {"eval_loss": "loss", "eval_mean_token_accuracy": "token_accuracy"})
    write_curve("sft_held_out", history, {"eval_achievements": "achievements", "eval_invalid_rate": "invalid_rate"})


def write(
    trainer: "SftTrainer",
    weights: dict,
    processor: "Qwen3VLProcessor",
    profile: params.Profile,
    surveys: dict[str, str],
    left_out: int,
) -> None:
    """The adapter with its card, curves and metrics."""
    from apprentice.data.dataset import Jsonl
    from apprentice.files import replacing
    from apprentice.student import adapter, card
    from apprentice.training import examples

    history = trainer.state.log_history
    write_curves(history)
    validations, last = [row for row in history if "eval_loss" in row], trainer.state.global_step
    best = next((row for row in validations if row["step"] == trainer.state.best_global_step), {"step": last})
    metrics = {
        "val_loss": best.get("eval_loss"),
        "val_token_accuracy": best.get("eval_mean_token_accuracy"),
        "held_out_achievements": best.get("eval_achievements"),
        "best_step": best["step"],
        "steps": last,
        "rows_too_long": left_out,
    }
    write_metrics("sft", metrics)
    tables = [card.teachers(examples.survey(DATA[name], BASE, survey).teachers) for name, survey in surveys.items()]
    settings = profile.sft.model_dump(mode="json", exclude={"evaluation": {"seeds"}})
    sections = {
        "Data": "Trained on decisions of\n\n" + "\n\nand validated, on other worlds, on\n\n".join(tables),
        "Metrics": card.table(("metric", "value"), metrics.items()),
        "Settings": card.settings({"dtype": profile.dtype, "sft": settings}),
    }
    asked = Jsonl(DATA[list(surveys)[-1]])[0]["messages"][:-1]
    found = {name: value for name, value in metrics.items() if name.startswith("val_") and value is not None}
    results = card.results(found, "held-out decisions")
    with replacing(OUT) as out:
        trainer.model.save_pretrained(out, state_dict=weights)
        adapter.complete(out, OUT.name, processor, profile.student, asked, sections, results)
    kept = f"validation loss {best['eval_loss']:.3f} at step {best['step']}" if validations else f"step {last}"
    if "eval_achievements" in best:
        kept = f"{best['eval_achievements']:.2f} achievements on held-out worlds, {kept}"
    print(f"sft: {kept} of {last}; {left_out} rows were too long, or their answers, and left out")


if __name__ == "__main__":
    run(main)
