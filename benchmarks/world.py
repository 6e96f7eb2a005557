"""How much faster than stock the world is: python benchmarks/world.py

Every contender plays the same random episodes, in a process of its own on one core, in turns with the others; of
the rounds, the median is printed. Stock is crafter 1.8.3 as `pip install crafter` leaves it, its noise in Python;
with numba installed, its noise compiles itself.
"""

import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import tracemalloc

ROUNDS = 3
SIZE = 72
CONTENDERS = ("stock", "stock with numba", "world")
RATES = ("resets", "steps with a picture", "steps without one", "steps with 256 px")


def main() -> None:
    core = min(os.sched_getaffinity(0))
    rounds = {contender: [] for contender in CONTENDERS}
    for _ in range(ROUNDS):
        for contender in CONTENDERS:
            rounds[contender].append(in_process(rates, core, contender))
    medians = {c: {rate: statistics.median(r[rate] for r in rounds[c]) for rate in RATES} for c in CONTENDERS}

    print(f"{'a second, on one core':24}" + "".join(f"{contender:>18}" for contender in CONTENDERS) + "    ratios")
    for rate in RATES:
        stock, with_numba, ours = (medians[contender][rate] for contender in CONTENDERS)
        figures = "".join(f"{figure:18,.1f}" for figure in (stock, with_numba, ours))
        print(f"{rate:24}{figures}    {ours / stock:.1f}x, {ours / with_numba:.1f}x with numba")

    print(f"\n{'a second, on all cores, a random policy':42}{'stock':>10}{'play':>10}")
    rounds_of_play = {"stock": [], "play": []}
    for _ in range(ROUNDS):
        rounds_of_play["stock"].append(all_cores(stock_episode))
        rounds_of_play["play"].append(through_play())
    stock, ours = (statistics.median(rounds_of_play[contender]) for contender in ("stock", "play"))
    print(f"{'steps, every picture kept as PNG by play':42}{stock:10,.0f}{ours:10,.0f}    {ours / stock:.1f}x")

    print("\nfirst use, in seconds    import   reset  picture")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nothing compiled yet", "any later process"):
            seconds = in_process(first_use, core, folder)
            print(f"{name:22}" + "".join(f"{seconds[part]:9.2f}" for part in ("import", "reset", "picture")))

    print("\nmemory, in KiB")
    for name, amount in in_process(memory, core).items():
        print(f"{name:48}{amount / 1024:9.1f}")
    print(json.dumps({"rounds": rounds}))


def in_process(function, core: int, *arguments) -> dict[str, float]:
    """What the function returns in a fresh process that stays on one core."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, core, function, *arguments))
    process.start()
    sending.close()
    answer = receiving.recv()
    process.join()
    return answer


def _answer(sending, core, function, *arguments) -> None:
    os.sched_setaffinity(0, {core})
    sending.send(function(*arguments))


def rates(contender: str) -> dict[str, float]:
    """Per second, by name as in RATES. crafter is imported only here, after numba's settings."""
    if contender == "stock":
        os.environ["NUMBA_DISABLE_JIT"] = "1"
    play = play_world if contender == "world" else play_stock
    play([0], SIZE, look=True)
    resets, episodes = {"stock": (4, 5), "stock with numba": (20, 10), "world": (200, 60)}[contender]
    # A dead player's episode is over in stock as here, and the seeds' first steps are the same: the same play.
    _, seconds, _ = play(range(resets), SIZE, look=False, max_steps=1)
    measured = {"resets": resets / seconds}
    seeds = [seed % 10 for seed in range(episodes)]
    for rate, size, look in zip(RATES[1:], (SIZE, SIZE, 256), (True, False, True), strict=True):
        steps, _, seconds = play(seeds, size, look)
        measured[rate] = steps / seconds
    return measured


def actions(seed: int):
    """The same for every contender."""
    import numpy as np

    return iter(np.random.RandomState(seed).randint(0, 17, 10_000).tolist())


def play_stock(seeds, size: int, look: bool, max_steps: int = 10_000) -> tuple[int, float, float]:
    """Plays random episodes to their end; returns the steps, and the seconds for resetting and for stepping."""
    import crafter

    steps, resetting, stepping = 0, 0.0, 0.0
    for seed in seeds:
        env = crafter.Env(seed=seed, size=(size, size), length=max_steps)
        if not look:
            # Stock can't do without; this is what it would cost if it could.
            env._obs = lambda: None
        start = time.perf_counter()
        env.reset()
        reset = time.perf_counter()
        for action in actions(seed):
            steps += 1
            if env.step(action)[2]:
                break
        resetting, stepping = resetting + reset - start, stepping + time.perf_counter() - reset
    return steps, resetting, stepping


def play_world(seeds, size: int, look: bool, max_steps: int = 10_000) -> tuple[int, float, float]:
    """As `play_stock`."""
    from apprentice.world import ACTIONS, World

    steps, resetting, stepping = 0, 0.0, 0.0
    for seed in seeds:
        world = World(seed, max_steps, size)
        start = time.perf_counter()
        observation = world.reset()
        if look:
            _ = observation.image
        reset = time.perf_counter()
        for action in actions(seed):
            steps += 1
            outcome = world.step(ACTIONS[action])
            if look:
                _ = outcome.observation.image
            if outcome.done:
                break
        resetting, stepping = resetting + reset - start, stepping + time.perf_counter() - reset
    return steps, resetting, stepping


def stock_episode(seed: int) -> int:
    """The steps of a random episode in stock, which draws every picture."""
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    return play_stock([seed], SIZE, look=True)[0]


def all_cores(episode) -> float:
    """Steps per second of `episode` on a few seeds, processes already begun."""
    from apprentice.workers import cores, in_processes

    calls = [(seed,) for seed in range(6 * cores())]
    played, start, steps = in_processes(episode, calls), None, 0
    for taken in played:
        # The first result says that the processes have begun; the clock and the count start there.
        steps, start = (0, time.perf_counter()) if start is None else (steps + taken, start)
    return steps / (time.perf_counter() - start)


def through_play() -> float:
    """Steps per second of `play.record` with a random policy: as collect and benchmark play, ledger and all."""
    from apprentice import store
    from apprentice.params import Prompt
    from apprentice.play import Spec, record
    from apprentice.players.scripted import Scripted

    with tempfile.TemporaryDirectory() as folder:
        os.environ["APPRENTICE_CACHE"] = folder
        played = record(Scripted, ("random",), Spec(range(200), 10_000, Prompt(), fingerprint="speed", agent="random"))
        start = time.perf_counter()
        return sum(store.from_bytes(data).length for data in played) / (time.perf_counter() - start)


def first_use(folder: str) -> dict[str, float]:
    os.environ["NUMBA_CACHE_DIR"] = folder
    start = time.perf_counter()
    from apprentice.world import World

    imported = time.perf_counter()
    observation = World(0).reset()
    reset = time.perf_counter()
    _ = observation.image
    return {"import": imported - start, "reset": reset - imported, "picture": time.perf_counter() - reset}


def memory() -> dict[str, float]:
    """In bytes. What's shared by all worlds of a process is named for itself."""
    import crafter

    from apprentice.world import ACTIONS, World, picture

    def world(seed):
        world = World(seed)
        _ = world.reset().image
        for action in list(actions(seed))[:100]:
            if world.step(ACTIONS[action]).done:
                break
        return world

    def env(seed):
        env = crafter.Env(seed=seed, size=(SIZE, SIZE))
        env.reset()
        for action in list(actions(seed))[:100]:
            if env.step(action)[2]:
                break
        return env

    def each(make, count):
        make(0)
        gc.collect()
        tracemalloc.start()
        kept = [make(seed) for seed in range(count)]
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] / len(kept)
        tracemalloc.stop()
        return taken

    one = World(0)
    one.reset()
    return {
        "a world, after 100 steps": each(world, 20),
        "a stock environment, after 100 steps": each(env, 5),
        "an observation nobody has looked at": each(lambda _: one.step("noop").observation, 50),
        "its picture, once looked at": picture.draw(one._scene(), SIZE).nbytes,
        "tiles shared by all worlds, for 72 px": picture._atlas(8).nbytes,
        "tiles shared by all worlds, for 256 px": picture._atlas(28).nbytes,
    }


if __name__ == "__main__":
    main()
