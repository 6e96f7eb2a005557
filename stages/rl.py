"""rl: the student improves on its own play, from models/distill on; the adapter goes to models/rl.

    dvc repro rl        or: python stages/rl.py

An iteration plays groups of episodes on the same world seeds and trains on their decisions (`iterations` below). Every
few iterations the student plays held-out worlds; the adapter that did best there is the one that's kept. Checkpoints
lie in the user's cache, one for each iteration, and finished episodes in the ledger: a killed run continues.
"""

import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # this checkout's, whatever is installed

from apprentice import compute, params
from apprentice.errors import OutOfBounds
from apprentice.stage import run, write_curve, write_metrics, write_plot

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

    from apprentice.training.rl import RlTrainer
    from apprentice.training.self_play import SelfPlay

BASE, START, OUT = Path("models/base"), Path("models/distill"), Path("models/rl")
ROLLOUTS = Path("data/rl/rollouts.parquet")
NEWS = {"achievements": ("achievements", ".2f"), "reward": ("reward", ".2f"), "invalid_rate": ("invalid", ".1%")}
NEWS["kl"] = ("KL", ".3f")
HELD_OUT = ("iteration", "reward", "achievements", "invalid_rate")


def main() -> None:
    """Train the adapter models/rl."""
    settings = params.load()
    compute.reporters()  # before minutes of work
    profile, rl = settings.active, settings.active.rl
    judge = settings.judge if rl.reward.judge else None
    if judge:
        from apprentice.endpoint.client import api_key

        api_key(judge.endpoint, "judge.endpoint")  # before hours of play

    from apprentice import gpus
    from apprentice.cache import cache_folder
    from apprentice.files import digest
    from apprentice.fingerprint import code, fingerprint
    from apprentice.serving import vllm
    from apprentice.training import devices

    sections = {"rl": rl, "prompt": profile.prompt, "sampling": profile.sampling}
    shaping = {name: section.model_dump(mode="json") for name, section in sections.items()}
    if judge:
        shaping["judge"] = judge.model_dump(mode="json", include={"outcome", "events"})
        shaping["judge"]["endpoint"] = judge.endpoint.asked
    shaping["inputs"] = [digest(folder, without="README.md") for folder in (BASE, START)]
    serving = compute.load().vllm
    plan = vllm.plan(serving, gpus.names(), training=True)
    ranks, rows, accumulation = devices.layout(rl.batch_size, rl.micro_batch_size, on=plan.training)
    if rl.zero.stage:
        shaping["ranks"] = ranks  # each has its part of a checkpoint
    made_by = code(__file__, afterwards=("student.adapter", "student.card"))
    folder = cache_folder() / "rl" / fingerprint(**shaping, dtype=profile.dtype, code=made_by)
    relief = f"What helps, in this order, under profiles.{settings.profile}.rl: micro_batch_size, zero.stage: 2"
    with vllm.Servers(plan, serving, BASE, profile.dtype, [START]) as students:
        work = (train, ranks, profile, judge, folder, rows, accumulation, students.servers, plan.sleeps)
        devices.launch(*work, group=rl.zero.stage > 0, relief=relief, on=plan.training)


def train(
    profile: params.Profile,
    judge: params.Judge | None,
    folder: Path,
    rows: int,
    accumulation: int,
    servers: tuple,
    sleeping: bool,
) -> None:
    """What each rank does. folder: the run's, in the cache. rows: decisions at once, in each rank. servers: that play;
    none plays in process. sleeping: they and the trainer take turns."""
    from apprentice.student import loading
    from apprentice.training.checkpoints import Whole, last_checkpoint
    from apprentice.training.live import Live
    from apprentice.training.probe import Probe
    from apprentice.training.rl import RlTrainer
    from apprentice.training.sampler import sampler
    from apprentice.training.self_play import SelfPlay, evaluations

    rl = profile.rl
    args = arguments(profile, folder, rows, accumulation)
    model, processor = loading.load(BASE, START, profile.dtype, trainable=True, quantization=rl.quantization)
    probe = partial(Probe, rl.seeds, profile.prompt, rl.temperature, rl.max_sampler_mismatch)
    player = sampler(servers, profile, BASE, processor, folder, sleeping, probe)
    exact = not servers and profile.dtype == "float32" and rl.quantization is None
    trainer = RlTrainer(model, processor, rl, profile.prompt, args, exact)

    def plan() -> tuple[dict[str, int], int]:
        """What is still to be done, and how many iterations have been."""
        done = trainer.iteration
        left, held_out = rl.iterations - done, len(range(0, rl.iterations, rl.evaluation.every)) + 1
        held_out -= len(evaluations(folder))
        return {"iteration": left, "play": left, "held-out play": held_out}, done

    def curves(history: list[dict]) -> None:
        write_plots(history, evaluations(folder), rl)

    live = Live(trainer, OUT.name, plan, curves, NEWS, stays="reward")
    play = SelfPlay(trainer, player, profile, folder, live)
    trainer.add_callback(Whole(play.kept))
    stopped = ""
    try:
        trainer.learn(iterations(trainer, play, rl, judge), last_checkpoint(folder))
        play.evaluate(rl.iterations)
    except OutOfBounds as reason:
        stopped = str(reason)
    live.close()
    if trainer.is_world_process_zero():
        write(trainer.history, processor, profile, judge, folder, stopped)
    player.close()


def iterations(
    trainer: "RlTrainer", play: "SelfPlay", rl: params.Rl, judge: params.Judge | None
) -> Iterator[list[dict]]:
    """RL's loop: play, score, compare, draw. The trainer updates the policy on what is yielded, then asks for more.

    Raises OutOfBounds when too many replies are invalid, when the policy is too far from where it began, or when it's
    another one that plays.
    """
    import numpy as np

    from apprentice.training import rollouts
    from apprentice.training.advantages import Critic, advantages, draw_decisions
    from apprentice.training.judged import Judged
    from apprentice.training.self_play import summary

    first = trainer.iteration
    judged = Judged(judge, rl.group_size) if judge else None
    critic = Critic(play.folder / "critics", first)
    for iteration in range(first, rl.iterations):
        # Play.
        began = perf_counter()
        episodes = play.played_ahead(iteration)
        waited = perf_counter() - began
        if iteration % rl.evaluation.every == 0:
            play.evaluate(iteration)
        last = trainer.history[-1] if trainer.history else {}
        within("the KL divergence to the policy at the start", last.get("kl", 0.0), rl.max_kl, trainer)
        if not last.get("staleness"):  # an older policy is another one
            mismatch = last.get("sampler_mismatch", 0.0)
            within("the sampler's distance from the trainer", mismatch, rl.max_sampler_mismatch, trainer)
        trainer.stale = episodes is not None
        began = perf_counter() - waited
        if episodes is None:
            episodes = play.episodes(iteration)
        seconds = perf_counter() - began

        # Score.
        scores, log = judged.scores(episodes) if judged else ([0.0] * len(episodes), {})
        log |= summary(episodes, rl.reward, seconds) | {"staleness": trainer.stale}
        trainer.note(log)

        # Compare: how much better than expected was each decision?
        values = advantages(episodes, rl, scores, critic)
        if trainer.is_world_process_zero():
            group = zip(episodes[: rl.group_size], values[: rl.group_size], strict=True)
            rollouts.write(play.folder / "rollouts" / f"{iteration:05}.parquet", group, iteration)
            critic.save(play.folder / "critics", iteration)
        if log["invalid_rate"] > rl.max_invalid_rate:
            trainer.log({})  # what was seen of this iteration
        within("the share of invalid replies", log["invalid_rate"], rl.max_invalid_rate, trainer)

        # Draw what to train on.
        generator = np.random.default_rng([rl.random_seed, 7, iteration])
        batches = trainer.batches(*draw_decisions(episodes, values, rl.decisions, generator))
        if rl.staleness and iteration + 1 < rl.iterations:
            play.play_ahead(iteration + 1)

        # Update.
        play.live.begin("iteration", "update")
        yield batches


def within(what: str, value: float, bound: float, trainer: "RlTrainer") -> None:
    """Raise OutOfBounds if it's above the bound, or no number."""
    if not value <= bound:
        done = len(trainer.history)
        raise OutOfBounds(f"{what} was {value:.3g} in iteration {done}, above the bound of {bound:g}")


def arguments(profile: params.Profile, folder: Path, rows: int, accumulation: int):
    """The settings as TRL takes them."""
    from trl import GRPOConfig

    from apprentice import gpus
    from apprentice.training import live, memory

    rl = profile.rl
    batches = rl.decisions // rl.batch_size
    return GRPOConfig(
        output_dir=str(folder),
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
        logging_steps=rl.epochs * batches,
        ignore_data_skip=True,
        bf16=profile.dtype == "bfloat16",
        use_cpu=not gpus.used(),
        gradient_checkpointing=rl.gradient_checkpointing,
        deepspeed=memory.zero_config(rl.zero),
        ddp_find_unused_parameters=False,
        ddp_timeout=24 * 3600,  # the slowest rank's play is waited for
        remove_unused_columns=False,
        seed=rl.random_seed,
        **live.reporting(OUT.name),
    )


def write(
    history: list[dict],
    processor,
    profile: params.Profile,
    judge: params.Judge | None,
    folder: Path,
    stopped: str,
) -> None:
    """The best adapter with its card, some rollouts, plots and metrics."""
    from apprentice.files import SEAL, replacing
    from apprentice.training import rollouts
    from apprentice.training.self_play import evaluations

    held_out = evaluations(folder)
    best = max(held_out, key=lambda evaluation: evaluation["achievements"])
    metrics = metrics_of(history, held_out, best, judge, stopped)
    with replacing(OUT) as out:
        kept = folder / "evaluated" / str(best["iteration"])
        shutil.copytree(kept, out, ignore=shutil.ignore_patterns("evaluation.json", SEAL))
        write_card(out, processor, profile, best["iteration"], metrics)
    rollouts.join(sorted(folder.glob("rollouts/*.parquet")), ROLLOUTS)
    write_plots(history, held_out, profile.rl)
    write_metrics("rl", metrics)
    if stopped:
        print(f"rl: STOPPED EARLY: {stopped}; models/rl is the best adapter until then")
    print(
        f"rl: {len(history)} iterations; achievements on held-out worlds {held_out[0]['achievements']:.2f} → "
        f"{best['achievements']:.2f} (after {best['iteration']} iterations), "
        f"in training {history[0]['achievements']:.2f} → {history[-1]['achievements']:.2f}"
    )


def write_plots(history: list[dict], held_out: list[dict], rl: params.Rl) -> None:
    """Iteration 1 is the first. Held-out worlds are played after so many iterations; 0 is before the first."""
    from apprentice.world.observation import ACTIONS

    history = [{**entry, "iteration": iteration} for iteration, entry in enumerate(history, 1)]
    judged = ("judge_score", "judge_missing") if rl.reward.judge else ()
    played = ("reward", "achievements", "length", "invalid_rate", "steps_per_second", *judged)
    write_curve("rl", history, {name: name for name in played}, x="iteration")
    trained = {"entropy": "entropy", "clip_ratio/region_mean": "clip_fraction", "sampler_mismatch": "sampler_mismatch"}
    trained |= {"staleness": "staleness"} | ({"kl": "kl"} if rl.kl_coefficient else {})
    write_curve("rl_training", history, trained, x="iteration")
    write_plot("rl_held_out", HELD_OUT, [[row[name] for name in HELD_OUT] for row in held_out])
    # In their own order: a checkpoint sorts the names.
    actions = ([entry["iteration"], action, entry[f"action/{action}"]] for entry in history for action in ACTIONS)
    write_plot("rl_actions", ["iteration", "action", "share"], actions)


def metrics_of(history: list[dict], held_out: list[dict], best: dict, judge: params.Judge | None, stopped: str) -> dict:
    """metrics/rl.json."""
    metrics = {"iterations": len(history), "stopped": stopped or None, "best_iteration": best["iteration"]}
    rows = {"first": history[0], "last": history[-1], "held_out_first": held_out[0], "held_out_best": best}
    for when, row in rows.items():
        metrics |= {f"{when}_{name}": row[name] for name in ("reward", "achievements")}
    if judge:
        from apprentice.data.judge import spent

        metrics["judge_usd"] = spent(judge)  # with what the filter has asked
    return metrics


def write_card(
    folder: Path, processor: "Qwen3VLProcessor", profile: params.Profile, iterations: int, metrics: dict
) -> None:
    """Make the adapter's folder complete: processor, model card."""
    from apprentice import prompt
    from apprentice.student import adapter, card
    from apprentice.world.world import World

    rl = profile.rl
    shown = {"prompt": profile.prompt, "sampling": profile.sampling, "rl": rl}
    seeds = {"seeds": True, "evaluation": {"seeds"}}  # hundreds
    settings = {name: section.model_dump(mode="json", exclude=seeds) for name, section in shown.items()}
    sections = {
        "Data": f"{card.section(START, 'Data')}\n\nThen {iterations} iterations on its own play, "
        f"{rl.groups * rl.group_size} episodes each, of worlds from {rl.seeds[0]} on.",
        "Metrics": card.table(("metric", "value"), metrics.items()),
        "Settings": card.settings({"dtype": profile.dtype, **settings}),
    }
    asked = prompt.messages(World(rl.evaluation.seeds[0]).reset(), profile.prompt)
    best = {name: metrics[f"held_out_best_{name}"] for name in ("achievements", "reward")}
    results = card.results(best, "held-out worlds")
    adapter.complete(folder, OUT.name, processor, profile.student, asked, sections, results)


if __name__ == "__main__":
    run(main)
