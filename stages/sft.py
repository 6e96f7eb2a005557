"""sft: LoRA fine-tuning of models/base on data/sft, with TRL's SFTTrainer; the adapter goes to models/sft.

    dvc repro sft        or: python stages/sft.py

The loss is on the answers only. Evaluated every `eval_steps`, the adapter with the lowest validation loss is kept.
Checkpoints lie in the user's cache, named by everything that shapes them: a killed run continues.
"""

import json
import shutil
from pathlib import Path

from apprentice import params
from apprentice.command import WorkError, run

OUT = Path("models/sft")


def main() -> None:
    """Train the adapter models/sft."""
    settings = params.load()
    sft, where = settings.student.sft, f"profiles.{settings.profile}"

    import torch
    from transformers import EarlyStoppingCallback
    from trl import SFTConfig, SFTTrainer

    from apprentice import student, training
    from apprentice.ledger import cache, code, digest, fingerprint

    student.use_all_cores()
    data = {name: Path(f"data/sft/{name}.jsonl") for name in ("train", "val")}
    model, processor = student.load("models/base", dtype=settings.student.dtype)
    rows = {name: training.Rows(file, processor, sft.max_length) for name, file in data.items()}
    for name, file in data.items():
        if not len(rows[name].dataset):
            raise WorkError(
                f"sft: {file} has no row of at most {sft.max_length} tokens, the shortest has {rows[name].shortest}: "
                f"raise {where}.sft.max_length, or show less by {where}.prompt"
            )
    inputs = [digest(path) for path in (*data.values(), Path("models/base"))]
    checkpoints = (
        cache()
        / "sft"
        / fingerprint(sft=sft.model_dump(mode="json"), dtype=settings.student.dtype, inputs=inputs, code=code(__file__))
    )
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=sft.epochs,
        per_device_train_batch_size=sft.batch_size,
        per_device_eval_batch_size=sft.batch_size,
        gradient_accumulation_steps=sft.gradient_accumulation_steps,
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
        bf16=settings.student.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        seed=sft.random_seed,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
    )
    patience = sft.early_stopping_patience
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows["train"].dataset,
        eval_dataset=rows["val"].dataset,
        data_collator=rows["train"].collate,
        processing_class=processor,
        peft_config=training.lora_config(sft.lora),
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
    )
    trainer.train(resume_from_checkpoint=training.last_checkpoint(checkpoints))

    shutil.rmtree(OUT, ignore_errors=True)
    trainer.model.save_pretrained(OUT)
    processor.save_pretrained(OUT)
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
        "rows_too_long": sum(part.too_long for part in rows.values()),
    }
    Path("metrics/sft.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(
        f"sft: validation loss {best['eval_loss']:.3f} at step {best['step']} of {trainer.state.global_step}; "
        f"{metrics['rows_too_long']} rows were too long and left out"
    )


if __name__ == "__main__":
    run(main)
