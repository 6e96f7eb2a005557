"""distill: the student plays, and learns what a teacher would have done in its states; the adapter: models/distill.

    dvc repro distill        or: python stages/distill.py

It begins with models/sft. A round plays and labels, adds its labels to those of the rounds before, and trains on all of
them and on rows of sft (`rounds` below). Checkpoints lie in the user's cache, and labelled episodes in the ledger: a
killed run continues, and pays for no label twice. With no rounds, models/distill is models/sft.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import compute, params
from apprentice.stage import run, write_curve, write_metrics, write_plot

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

    from apprentice.training.distillation import DistillTrainer, Practice
    from apprentice.training.examples import Survey

BASE, SFT, OUT = Path("models/base"), Path("models/sft"), Path("models/distill")
DATA = Path("data/sft/train.jsonl")
ROUND = ("round", "teacher_share", "decisions", "rows", "dropped_labels", "agreement", "achievements", "invalid_rate")
CURVE = {"loss": "loss", "mean_token_accuracy": "token_accuracy", "learning_rate": "learning_rate"}


def main() -> None:
    """Train the adapter models/distill."""
    settings = params.load()
    compute.reporters()  # before minutes of work
    profile, distill = settings.active, settings.active.distill
    where = f"profiles.{settings.profile}.distill"
    if not distill.rounds:
        copy()
        return
    tutor = distill.teacher
    if tutor.endpoint:
        from apprentice.endpoint.client import api_key

        api_key(tutor.endpoint, f"{where}.teacher.endpoint")  # before minutes of play

    from apprentice import gpus
    from apprentice.cache import cache_folder
    from apprentice.endpoint.replies import Replies
    from apprentice.files import digest
    from apprentice.fingerprint import code, fingerprint
    from apprentice.serving import vllm
    from apprentice.training import devices, distillation, examples

    shaping = {name: getattr(profile, name).model_dump(mode="json") for name in ("prompt", "sampling")}
    shaping["distill"] = distill.model_dump(mode="json", exclude={"teacher": {"endpoint"}})
    shaping["endpoint"] = tutor.endpoint and tutor.endpoint.asked
    shaping["inputs"] = inputs = [digest(path, without="README.md") for path in (BASE, SFT, DATA)]
    shaping |= {
        "dtype": profile.dtype,
        "max_length": profile.sft.max_length,
        "rationale": settings.split.include_rationale,
    }
    serving = compute.load().vllm
    plan = vllm.plan(serving, gpus.names(), training=True)
    ranks, rows, accumulation = devices.layout(distill.batch_size, distill.micro_batch_size, on=plan.training)
    made_by = code(__file__, afterwards=("student.adapter", "student.card"))
    folder = cache_folder() / "distill" / fingerprint(**shaping, code=made_by)
    known = fingerprint(rows=inputs[2], base=inputs[0], code=code(examples.__file__))
    examples.survey(DATA, BASE, known)
    relief = f"What helps, in this order, under {where}: micro_batch_size, gradient_checkpointing: true"
    # Ranks label different episodes; another process would pay for the same.
    alone = Replies(distillation.AGENT, tutor.endpoint.asked, alone=True) if tutor.endpoint else nullcontext()
    with alone, vllm.Servers(plan, serving, BASE, profile.dtype, [SFT]) as students:
        of_run = (profile, settings.split.include_rationale, where, folder, known)
        work = (train, ranks, *of_run, rows, accumulation, students.servers, plan.sleeps)
        devices.launch(*work, relief=relief, on=plan.training)


def copy() -> None:
    """With no rounds, what comes out is what went in."""
    from apprentice.files import replacing

    with replacing(OUT) as out:
        shutil.copytree(SFT, out)
    write_metrics("distill", {"rounds": []})
    write_curves([], [])
    print("distill: no rounds, so models/distill is models/sft")


def train(
    profile: params.Profile,
    rationale: bool,
    where: str,
    folder: Path,
    known: str,
    rows: int,
    accumulation: int,
    servers: tuple,
    sleeping: bool,
) -> None:
    """What each rank does. rationale: labels have the teacher's words. where: the section, for error messages. folder:
    the run's, in the cache. known: the name of sft's survey. rows: at once, in each rank. servers: that play; none
    plays in process. sleeping: they and the trainer take turns."""
    from apprentice.student import loading
    from apprentice.training.checkpoints import Often, Whole, last_checkpoint
    from apprentice.training.distillation import DistillTrainer, Practice
    from apprentice.training.live import Live
    from apprentice.training.probe import Probe
    from apprentice.training.sampler import sampler

    distill = profile.distill
    args = arguments(profile, folder, rows, accumulation)
    model, processor = loading.load(BASE, SFT, profile.dtype, trainable=True, quantization=distill.quantization)
    temperature = profile.sampling.temperature or 1.0
    probe = partial(Probe, distill.seeds, profile.prompt, temperature, distill.max_sampler_mismatch)
    player = sampler(servers, profile, BASE, processor, folder, sleeping, probe)
    trainer = DistillTrainer(distill, model=model, args=args, processing_class=processor)

    def plan() -> tuple[dict[str, int], int]:
        """What is still to be done, and how many steps have been."""
        done = trainer.state.global_step
        return {"step": args.max_steps - done, "play": distill.rounds - -(-done // distill.steps)}, done

    def curves(history: list[dict]) -> None:
        write_curves(history, practice.rounds())

    news = {"loss": ("loss", ".3f"), "mean_token_accuracy": ("token accuracy", ".1%")}
    live = Live(trainer, OUT.name, plan, curves, news)
    practice = Practice(trainer, player, profile, BASE, folder, rationale, f"{where}.teacher.endpoint", live)
    for callback in (Often(), Whole(practice.kept)):
        trainer.add_callback(callback)
    trainer.learn(rounds(trainer, practice, processor, profile, known), last_checkpoint(folder))
    live.close()
    surveys = [practice.survey(number) for number in range(distill.rounds)]
    if trainer.is_world_process_zero():
        write(trainer, practice, surveys, processor, profile)
    player.close()


def rounds(
    trainer: "DistillTrainer",
    practice: "Practice",
    processor: "Qwen3VLProcessor",
    profile: params.Profile,
    known: str,
) -> Iterator[dict]:
    """The loop: play, label, aggregate. The trainer learns from what is yielded, then asks for more."""
    import numpy as np

    from apprentice.training import examples
    from apprentice.training.distillation import draw

    distill = profile.distill
    first, done = divmod(trainer.state.global_step, distill.steps)
    for number in range(first, distill.rounds):
        # Play, and label.
        practice.play(number)

        # Aggregate: rows of sft, and the labels of all rounds so far.
        files = {DATA: examples.survey(DATA, BASE, known)}
        files |= {practice.rows(before): practice.survey(before) for before in range(number + 1)}
        lengths = [survey.lengths for survey in files.values()]
        order = draw([survey.fitting(profile) for survey in files.values()], lengths, distill, number)

        # Train.
        rows = [
            examples.Rows(file, processor, survey.places, np.arange(len(survey.places)))
            for file, survey in files.items()
        ]
        yield from trainer.batches(rows, order, done if number == first else 0)


def arguments(profile: params.Profile, folder: Path, rows: int, accumulation: int):
    """The settings as TRL takes them."""
    from apprentice.training import live
    from apprentice.training.sft import config

    distill = profile.distill
    return config(
        *(distill, profile.dtype, folder, rows, accumulation),
        max_steps=distill.rounds * distill.steps,
        save_steps=distill.steps,
        # A whole number of times in a round, so that what is logged is the same after a kill.
        logging_steps=next(steps for steps in range(25, 0, -1) if distill.steps % steps == 0),
        ignore_data_skip=True,
        ddp_timeout=24 * 3600,  # the slowest rank's play is waited for
        **live.reporting(OUT.name),
    )


def write_curves(history: list[dict], rounds: list[dict]) -> None:
    write_plot("distill", ROUND, [[row[name] for name in ROUND] for row in rounds])
    write_curve("distill_train", history, CURVE)


def write(
    trainer: "DistillTrainer",
    practice: "Practice",
    surveys: "list[Survey]",
    processor: "Qwen3VLProcessor",
    profile: params.Profile,
) -> None:
    """The adapter with its card, curves and metrics. surveys: of each round's rows."""
    from apprentice.data.dataset import Jsonl
    from apprentice.files import replacing
    from apprentice.student import adapter, card

    distill, rounds = profile.distill, practice.rounds()
    metrics = {
        "rounds": rounds,
        "decisions": sum(row["decisions"] for row in rounds),
        "rows": sum(row["rows"] for row in rounds),
        "dropped_labels": sum(row["dropped_labels"] for row in rounds),
        "rows_too_long": sum(int((~survey.fitting(profile)).sum()) for survey in surveys),
        "cost_usd": practice.cost(),
    }
    write_metrics("distill", metrics)
    write_curves(trainer.state.log_history, rounds)
    taught = card.teachers([teacher for survey in surveys for teacher in survey.teachers])
    settings = distill.model_dump(mode="json", exclude={"seeds"})  # hundreds
    sections = {
        "Data": f"{card.section(SFT, 'Data')}\n\nThen, in {distill.rounds} rounds, on its own states, labelled "
        f"by\n\n{taught}",
        "Metrics": card.table(ROUND, [[row[name] for name in ROUND] for row in rounds]),
        "Settings": card.settings({"dtype": profile.dtype, "distill": settings}),
    }
    asked = Jsonl(DATA)[0]["messages"][:-1]
    results = card.results({"agreement": rounds[-1]["agreement"]}, "its own decisions")
    with replacing(OUT) as out:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
        adapter.complete(out, OUT.name, processor, profile.student, asked, sections, results)
    first, last = rounds[0], rounds[-1]
    print(
        f"distill: {metrics['rows']} labels of {metrics['decisions']} own decisions in {distill.rounds} rounds; the "
        f"student agreed with the teacher on {first['agreement']:.1%} → {last['agreement']:.1%} of them"
    )


if __name__ == "__main__":
    run(main)
