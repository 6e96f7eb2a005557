"""rl: GRPO from models/sft on the student's own play; the adapter goes to models/rl.

    dvc repro rl        or: python stages/rl.py

An iteration plays groups of episodes on the same world seeds and trains on their decisions. Checkpoints lie in the
user's cache, one for each iteration: a killed run continues with the iteration it was in.
"""

import shutil
from pathlib import Path

from apprentice import params
from apprentice.command import run, write_metrics

OUT = Path("models/rl")


def main() -> None:
    """Train the adapter models/rl."""
    settings = params.load()
    profile, judge = settings.student, settings.judge
    rl = profile.rl
    if rl.reward.judge:
        from apprentice.client import api_key

        api_key(judge.endpoint, "judge.endpoint")  # before hours of play

    from apprentice import distributed
    from apprentice.ledger import cache, code, digest, fingerprint

    sections = {"rl": rl, "prompt": profile.prompt, "sampling": profile.sampling}
    shaping = {name: section.model_dump(mode="json") for name, section in sections.items()}
    if rl.reward.judge:
        shaping["judge"] = judge.model_dump(mode="json", include={"outcome", "events"})
        shaping["judge"]["endpoint"] = judge.endpoint.asked
    shaping["inputs"] = [digest(Path(folder)) for folder in ("models/base", "models/sft")]
    checkpoints = cache() / "rl" / fingerprint(**shaping, dtype=profile.dtype, code=code(__file__))
    ranks, rows, accumulation = distributed.layout(rl.batch_size, rl.micro_batch_size, rl.groups)
    distributed.launch(train, ranks, profile, judge, checkpoints, rows, accumulation)


def train(profile: params.Profile, judge: params.Judge | None, checkpoints: Path, rows: int, accumulation: int):
    """What each rank does. rows: decisions at once, in each rank."""
    import torch
    from trl import GRPOConfig

    from apprentice import student, training
    from apprentice.actor import InProcess
    from apprentice.grpo import Trainer

    rl = profile.rl
    model, processor = student.load("models/base", "models/sft", profile.dtype, trainable=True)
    actor = InProcess(student.load("models/base", dtype=profile.dtype)[0], processor)
    batches = rl.decisions // rl.batch_size
    arguments = GRPOConfig(
        output_dir=str(checkpoints),
        max_steps=rl.iterations * rl.epochs * batches,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=batches * accumulation,
        num_iterations=rl.epochs,
        num_generations=2,  # TRL's own groups, unused
        max_completion_length=profile.sampling.max_tokens,
        learning_rate=rl.learning_rate,
        lr_scheduler_type=rl.lr_scheduler,
        warmup_steps=rl.warmup_ratio,
        max_grad_norm=rl.max_grad_norm,
        temperature=rl.temperature,
        epsilon=rl.clip_low,
        epsilon_high=rl.clip_high,
        beta=rl.kl_coefficient,
        loss_type="bnpo",
        save_steps=rl.epochs * batches,
        save_total_limit=2,
        logging_steps=rl.epochs * batches,
        ignore_data_skip=True,
        bf16=profile.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        seed=rl.random_seed,
        report_to="none",
    )
    trainer = Trainer(model, actor, processor, rl, profile.prompt, profile.sampling, arguments, judge)
    trainer.train(resume_from_checkpoint=training.last_checkpoint(checkpoints))
    if not trainer.is_world_process_zero():
        return

    shutil.rmtree(OUT, ignore_errors=True)
    trainer.model.save_pretrained(OUT, selected_adapters=["default"])
    processor.save_pretrained(OUT)
    columns = {name: name for name in ("reward", "achievements", "length", "invalid_rate", "entropy")}
    columns |= {"clip_ratio/region_mean": "clip_fraction", "steps_per_second": "steps_per_second"}
    if rl.kl_coefficient:
        columns["kl"] = "kl"
    if rl.reward.judge:
        columns |= {"judge_score": "judge_score", "judge_missing": "judge_missing"}
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    training.write_curve(Path("metrics/plots/rl.csv"), history, columns)
    first, last = history[0], history[-1]
    metrics = {"iterations": len(history)} | {
        f"{when}_{name}": entry[name]
        for when, entry in (("first", first), ("last", last))
        for name in ("reward", "achievements")
    }
    write_metrics("rl", metrics)
    print(
        f"rl: {len(history)} iterations; training reward {first['reward']:.2f} → {last['reward']:.2f}, "
        f"achievements {first['achievements']:.2f} → {last['achievements']:.2f}"
    )


if __name__ == "__main__":
    run(main)
