"""rl: GRPO from models/sft on the student's own play; the adapter goes to models/rl.

    dvc repro rl        or: python stages/rl.py

An iteration plays groups of episodes on the same world seeds and trains on their decisions. Every few iterations the
student plays held-out worlds; the adapter that did best there is the one that's kept. Checkpoints lie in the user's
cache, one for each iteration, and finished episodes in the ledger: a killed run continues where it was.
"""

import csv
import os
import shutil
from pathlib import Path

from apprentice import params
from apprentice.command import run, write_metrics

SFT, OUT = Path("models/sft"), Path("models/rl")
ROLLOUTS = Path("data/rl/rollouts.parquet")
PLOTS = Path("metrics/plots")


def main() -> None:
    """Train the adapter models/rl."""
    settings = params.load()
    profile, judge = settings.student, settings.judge
    rl = profile.rl
    if rl.reward.judge:
        from apprentice.client import api_key

        api_key(judge.endpoint, "judge.endpoint")  # before hours of play

    from apprentice import compute, distributed, serve
    from apprentice.ledger import cache, code, digest, fingerprint

    sections = {"rl": rl, "prompt": profile.prompt, "sampling": profile.sampling}
    shaping = {name: section.model_dump(mode="json") for name, section in sections.items()}
    if rl.reward.judge:
        shaping["judge"] = judge.model_dump(mode="json", include={"outcome", "events"})
        shaping["judge"]["endpoint"] = judge.endpoint.asked
    shaping["inputs"] = [digest(Path(folder)) for folder in ("models/base", SFT)]
    serving = compute.load().serve
    plan = serve.plan(serving, serve.gpus(), training=True)
    if plan.training is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(plan.training)
    ranks, rows, accumulation = distributed.layout(rl.batch_size, rl.micro_batch_size)
    if rl.zero.stage:
        shaping["ranks"] = ranks  # each has its part of a checkpoint
    checkpoints = cache() / "rl" / fingerprint(**shaping, dtype=profile.dtype, code=code(__file__))
    with serve.Servers(plan, serving, Path("models/base"), profile.dtype, [SFT]) as students:
        work = (train, ranks, profile, judge, checkpoints, rows, accumulation, students.servers, plan.sleeps)
        relief = f"What helps, in this order, under profiles.{settings.profile}.rl: micro_batch_size, zero.stage: 2, 3"
        distributed.launch(*work, group=rl.zero.stage > 0, relief=relief)


def train(
    profile: params.Profile,
    judge: params.Judge | None,
    checkpoints: Path,
    rows: int,
    accumulation: int,
    servers: tuple,
    sleeping: bool,
):
    """What each rank does. rows: decisions at once, in each rank. servers: that play; none plays in process."""
    import torch
    from trl import GRPOConfig

    from apprentice import student, training
    from apprentice.actor import InProcess, OnVllm
    from apprentice.grpo import Stopped, Trainer

    rl = profile.rl
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
        disable_dropout=True,  # the sampler has none
        epsilon=rl.clip_low,
        epsilon_high=rl.clip_high,
        beta=rl.kl_coefficient,
        entropy_coef=rl.entropy_coefficient,
        loss_type="dapo",  # every token of an iteration weighs the same, whatever the ranks and their batches
        save_steps=rl.epochs * batches,
        save_total_limit=2,
        logging_steps=rl.epochs * batches,
        ignore_data_skip=True,
        bf16=profile.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        deepspeed=training.zero_config(rl.zero),
        ddp_find_unused_parameters=False,
        ddp_timeout=24 * 3600,  # the slowest rank's play is waited for
        remove_unused_columns=False,
        seed=rl.random_seed,
        report_to="none",
    )
    model, processor = student.load("models/base", SFT, profile.dtype, trainable=True)
    if servers:
        actor = OnVllm(servers, processor, checkpoints / "policies", sleeping)
    else:
        actor = InProcess(student.load("models/base", dtype=profile.dtype)[0], processor)
    trainer = Trainer(model, actor, processor, rl, profile.prompt, profile.sampling, arguments, judge)
    trainer.add_callback(training.Whole())
    stopped = ""
    try:
        trainer.train(resume_from_checkpoint=training.last_checkpoint(checkpoints))
        trainer.evaluate_play(rl.iterations)
    except Stopped as reason:
        stopped = str(reason)
    actor.close()
    if trainer.is_world_process_zero():
        write(trainer.history, processor, profile, judge, checkpoints, stopped)


def write(
    history: list[dict],
    processor,
    profile: params.Profile,
    judge: params.Judge | None,
    checkpoints: Path,
    stopped: str,
) -> None:
    """The best adapter, some rollouts, metrics and plots."""
    from apprentice import adapter, rollouts, training
    from apprentice.grpo import evaluations

    rl = profile.rl
    held_out = evaluations(checkpoints)
    best = max(held_out, key=lambda evaluation: evaluation["achievements"])
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(
        checkpoints / "evaluated" / str(best["iteration"]), OUT, ignore=shutil.ignore_patterns("evaluation.json")
    )
    rollouts.join(sorted(checkpoints.glob("rollouts/*.parquet")), ROLLOUTS)

    columns = {name: name for name in ("reward", "achievements", "length", "invalid_rate", "steps_per_second")}
    if rl.reward.judge:
        columns |= {"judge_score": "judge_score", "judge_missing": "judge_missing"}
    training.write_curve(PLOTS / "rl.csv", history, columns)
    columns = {"entropy": "entropy", "clip_ratio/region_mean": "clip_fraction", "sampler_mismatch": "sampler_mismatch"}
    columns["staleness"] = "staleness"
    if rl.kl_coefficient:
        columns["kl"] = "kl"
    training.write_curve(PLOTS / "rl_training.csv", history, columns)
    with (PLOTS / "rl_held_out.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(best), lineterminator="\n")
        writer.writeheader()
        writer.writerows(held_out)
    with (PLOTS / "rl_actions.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["iteration", "action", "share"])
        for iteration, entry in enumerate(history):
            actions = {key.removeprefix("action/"): share for key, share in entry.items() if key.startswith("action/")}
            writer.writerows([iteration, action, f"{share:.6g}"] for action, share in actions.items())

    metrics = {"iterations": len(history), "stopped": stopped or None, "best_iteration": best["iteration"]}
    rows = {"first": history[0], "last": history[-1], "held_out_sft": held_out[0], "held_out_best": best}
    for when, row in rows.items():
        metrics |= {f"{when}_{name}": row[name] for name in ("reward", "achievements")}
    if rl.reward.judge:
        from apprentice.judge import spent

        metrics["judge_usd"] = spent(judge)  # with what the filter has asked
    write_metrics("rl", metrics)
    shaping = {"prompt": profile.prompt, "sampling": profile.sampling, "rl": rl}
    seeds = {"seeds": True, "evaluation": {"seeds"}}  # hundreds
    shaping = {name: section.model_dump(mode="json", exclude=seeds) for name, section in shaping.items()}
    sections = {
        "Data": f"{adapter.section(SFT, 'Data')}\n\nThen {best['iteration']} iterations on its own play, "
        f"{rl.groups * rl.group_size} episodes each, of worlds from {rl.seeds[0]} on.",
        "Metrics": adapter.table(("metric", "value"), metrics.items()),
        "Settings": adapter.settings({"dtype": profile.dtype, **shaping}),
    }
    adapter.complete(OUT, processor, profile.student, sections)
    if stopped:
        print(f"rl: STOPPED EARLY: {stopped}; models/rl is the best adapter until then")
    print(
        f"rl: {len(history)} iterations; achievements on held-out worlds {held_out[0]['achievements']:.2f} → "
        f"{best['achievements']:.2f} (after {best['iteration']} iterations), "
        f"in training {history[0]['achievements']:.2f} → {history[-1]['achievements']:.2f}"
    )


if __name__ == "__main__":
    run(main)
