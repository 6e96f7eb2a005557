"""sft: LoRA fine-tuning of models/base on data/sft, with TRL's SFTTrainer; the adapter goes to models/sft.

    dvc repro sft        or: python stages/sft.py

The loss is on the answers only. Evaluated every `eval_steps`, the adapter with the lowest validation loss is kept.
Checkpoints lie in the user's cache, named by everything that shapes them: a killed run continues.
"""

import shutil
from pathlib import Path

from apprentice import params
from apprentice.command import WorkError, run, write_metrics

BASE, OUT = Path("models/base"), Path("models/sft")
DATA = {name: Path(f"data/sft/{name}.jsonl") for name in ("train", "val")}


def main() -> None:
    """Train the adapter models/sft."""
    settings = params.load()
    sft = settings.student.sft

    from apprentice import distributed, training
    from apprentice.ledger import cache, code, digest, fingerprint

    inputs = [digest(path) for path in (*DATA.values(), BASE)]
    known = {
        name: fingerprint(rows=rows, base=inputs[-1], code=code(__file__))
        for name, rows in zip(DATA, inputs, strict=False)
    }
    left_out = 0
    for name, file in DATA.items():
        lengths = training.survey(file, BASE, known[name]).lengths
        if not (lengths <= sft.max_length).any():
            where, shortest = f"profiles.{settings.profile}", min(lengths, default=0)
            raise WorkError(
                f"sft: {file} has no row of at most {sft.max_length} tokens, the shortest has {shortest}: "
                f"raise {where}.sft.max_length, or show less by {where}.prompt"
            )
        left_out += int((lengths > sft.max_length).sum())
    shaping = {"sft": sft.model_dump(mode="json"), "dtype": settings.student.dtype, "inputs": inputs}
    ranks, rows, accumulation = distributed.layout(sft.batch_size, sft.micro_batch_size)
    if sft.zero.stage:
        shaping["ranks"] = ranks  # each has its part of a checkpoint
    checkpoints = cache() / "sft" / fingerprint(**shaping, code=code(__file__))
    arguments = settings.student, known, left_out, checkpoints, rows, accumulation
    relief = training.relief(f"profiles.{settings.profile}.sft", sft)
    distributed.launch(train, ranks, *arguments, group=sft.zero.stage > 0, relief=relief)


def train(
    profile: params.Profile, known: dict[str, str], left_out: int, checkpoints: Path, rows: int, accumulation: int
) -> None:
    """What each rank does. known: the name of each file's survey. rows: at once, in each rank."""
    import numpy as np
    import torch
    from transformers import EarlyStoppingCallback
    from trl import SFTConfig

    from apprentice import adapter, dataset, distributed, student, training
    from apprentice.sft import Trainer

    sft, readers = profile.sft, distributed.readers()
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=1,  # `order` has all of them
        train_sampling_strategy="sequential",
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=sft.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=sft.learning_rate,
        warmup_steps=sft.warmup_ratio,
        lr_scheduler_type=sft.lr_scheduler,
        weight_decay=sft.weight_decay,
        max_grad_norm=sft.max_grad_norm,
        eval_strategy="steps",
        eval_steps=sft.eval_steps,
        save_steps=sft.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=min(sft.eval_steps, 25),
        bf16=profile.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=sft.gradient_checkpointing,
        deepspeed=training.zero_config(sft.zero),
        ddp_find_unused_parameters=False,
        seed=sft.random_seed,
        max_length=None,
        dataloader_num_workers=readers,
        dataloader_persistent_workers=readers > 0,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
    )
    model, processor = student.load(BASE, dtype=profile.dtype, quantization=sft.lora.quantization)
    data = {}
    for name, file in DATA.items():
        survey = training.survey(file, BASE, known[name])
        chosen = np.flatnonzero(survey.lengths <= sft.max_length)
        lengths = survey.lengths[chosen]
        if name == "train":
            chosen = chosen[dataset.order(lengths, sft.batch_size, sft.epochs, sft.random_seed)]
        else:
            chosen = chosen[lengths.argsort(kind="stable")]  # like lengths together: little to pad
        data[name] = training.Rows(file, processor, survey.places, chosen)
    patience = sft.early_stopping_patience
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"].dataset,
        eval_dataset=data["val"].dataset,
        data_collator=data["train"].collate,
        processing_class=processor,
        peft_config=training.lora_config(sft.lora),
        callbacks=[training.Whole(), *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    if sft.zero.stage < 3:  # there no rank has a whole weight to fold
        student.fold(trainer.model)
    trainer.train(resume_from_checkpoint=training.last_checkpoint(checkpoints))
    # With stage 3 each rank has a part of the weights, and all bring them together.
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sft.zero.stage == 3 else None
    if not trainer.is_world_process_zero():
        return

    shutil.rmtree(OUT, ignore_errors=True)
    trainer.model.save_pretrained(OUT, state_dict=weights)
    history = trainer.state.log_history
    columns = {"loss": "loss", "mean_token_accuracy": "token_accuracy", "learning_rate": "learning_rate"}
    training.write_curve(Path("metrics/plots/sft_train.csv"), history, columns)
    columns = {"eval_loss": "loss", "eval_mean_token_accuracy": "token_accuracy"}
    training.write_curve(Path("metrics/plots/sft_val.csv"), history, columns)
    best = min((entry for entry in history if "eval_loss" in entry), key=lambda entry: entry["eval_loss"])
    metrics = {
        "val_loss": best["eval_loss"],
        "val_token_accuracy": best["eval_mean_token_accuracy"],
        "best_step": best["step"],
        "steps": trainer.state.global_step,
        "rows_too_long": left_out,
    }
    write_metrics("sft", metrics)
    taught = adapter.teachers(training.survey(DATA["train"], BASE, known["train"]).teachers)
    validated = adapter.teachers(training.survey(DATA["val"], BASE, known["val"]).teachers)
    sections = {
        "Data": f"Trained on decisions of\n\n{taught}\n\nand validated, on other worlds, on\n\n{validated}",
        "Metrics": adapter.table(("metric", "value"), metrics.items()),
        "Settings": adapter.settings({"dtype": profile.dtype, "sft": sft.model_dump(mode="json")}),
    }
    adapter.complete(OUT, processor, profile.student, sections)
    print(
        f"sft: validation loss {best['eval_loss']:.3f} at step {best['step']} of {trainer.state.global_step}; "
        f"{left_out} rows were too long and left out"
    )


if __name__ == "__main__":
    run(main)
