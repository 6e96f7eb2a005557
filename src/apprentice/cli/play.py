"""`apprentice play`: watch an agent, or play by hand."""

import asyncio
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apprentice import params
from apprentice.cli import agents
from apprentice.errors import ConfigError

if TYPE_CHECKING:
    from apprentice.cli.watch import Moment
    from apprentice.episode import Episode
    from apprentice.policy import Policy

_DONE = ("\x1b", "\x04", "x", "")
"""Keys that end the game by hand: Escape, Ctrl-D, x; the last is the end of the input."""
_KEYS = {
    "w": "move_up", "a": "move_left", "s": "move_down", "d": "move_right",
    "\x1b[A": "move_up", "\x1b[D": "move_left", "\x1b[B": "move_down", "\x1b[C": "move_right",
    "\x1bOA": "move_up", "\x1bOD": "move_left", "\x1bOB": "move_down", "\x1bOC": "move_right",
    " ": "do", "\t": "sleep", "n": "noop",
    "r": "place_stone", "t": "place_table", "f": "place_furnace", "p": "place_plant",
    "1": "make_wood_pickaxe", "2": "make_stone_pickaxe", "3": "make_iron_pickaxe",
    "4": "make_wood_sword", "5": "make_stone_sword", "6": "make_iron_sword",
}  # fmt: skip
"""As in Crafter's own window, and the arrows."""
_HELP = (
    "wasd or arrows move, space does, tab sleeps, n waits, x ends the game",
    "r stone, t table, f furnace, p plant; pickaxes 1 wood, 2 stone, 3 iron; swords 4 wood, 5 stone, 6 iron",
)


def play(
    agent: Annotated[
        str,
        typer.Argument(
            help="random, noop, expert; base, sft, distill, rl: the student; a model behind an API; me: by hand.",
            autocompletion=agents.names,
        ),
    ],
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the world; otherwise the first that the benchmark plays.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Otherwise the benchmark's; 10,000 by hand.")
    ] = None,
    gif: Annotated[Path | None, typer.Option(help="Write a film instead of showing it.")] = None,
    mp4: Annotated[Path | None, typer.Option(help="The same as MP4, for long episodes.")] = None,
    fps: Annotated[float, typer.Option(min=0.1, max=100, help="Environment steps a second.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="How it ended, for a script.")] = False,
) -> None:
    """Watch an agent play an episode, or play one yourself.

    Example: apprentice play rl --seed 200003 --gif rl.gif
    """
    for path, ending in ((gif, ".gif"), (mp4, ".mp4")):
        if path and path.suffix.lower() != ending:
            raise ConfigError(f"{path} must end in {ending}")
    if agent == agents.ME and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("playing by hand needs a terminal for keys and pictures; run it in one, or name an agent")
    if agent == agents.ME and (gif or mp4):
        raise ConfigError("a game by hand cannot be filmed; leave --gif and --mp4 out, or name an agent")
    settings = params.load() if agent not in (*agents.SCRIPTED, agents.ME) or params.PATH.exists() else None
    if agent not in agents.names():
        raise ConfigError(f"there is no agent {agent!r}; there are {', '.join(agents.names())}")
    if seed is None:
        seed = settings.benchmark.seeds[0] if settings else 0
    if max_steps is None:
        max_steps = settings.benchmark.steps if settings and agent != agents.ME else 10_000

    if agent == agents.ME:
        end = _by_hand(seed, max_steps)
        steps, reward, achievements, died = end.steps, end.reward, end.achievements, end.died
    else:
        episode = _watch(agent, settings, seed, max_steps, gif, mp4, fps, as_json)
        steps, reward, achievements, died = (
            episode.length, episode.reward, episode.unlocked, episode.steps[-1].died
        )  # fmt: skip
    if as_json:
        found = {"agent": agent, "seed": seed, "steps": steps, "reward": round(reward, 6)}
        print(json.dumps(found | {"achievements": achievements, "died": died}))
        return
    print(
        f"{agent} on seed {seed}: {steps} steps{', died' if died else ''}, reward {reward:.1f}, "
        f"{len(achievements)} of 22 achievements"
    )
    if achievements:
        print(", ".join(achievements))
    for path in filter(None, (gif, mp4)):
        print(f"written: {path}")


def _watch(
    agent: str,
    settings: params.Params | None,
    seed: int,
    max_steps: int,
    gif: Path | None,
    mp4: Path | None,
    fps: float,
    quiet: bool,
) -> "Episode":
    """Let it play, and show or film it."""
    from apprentice.cli import film, watch

    if sys.stdout.isatty() and not (gif or mp4 or quiet):
        with _Screen(f"{agent}, seed {seed}", max_steps) as screen:
            last = 0.0

            def show(moment: "Moment") -> None:
                nonlocal last
                time.sleep(max(0.0, last + 1 / fps - time.monotonic()))
                last = time.monotonic()
                screen.show(moment)

            return _episode(agent, settings, seed, max_steps, (screen.size, show))
    episode = _episode(agent, settings, seed, max_steps)
    for path, write in ((gif, film.write_gif), (mp4, film.write_mp4)):
        if path:
            write(path, watch.moments(episode, film.SIZE), f"{agent}, seed {seed}", fps)
    return episode


def _episode(
    agent: str, settings: params.Params | None, seed: int, max_steps: int, watched: tuple | None = None
) -> "Episode":
    """An episode of the agent. watched: the pictures' size, and who gets each moment at once."""
    from apprentice.cli.watch import Watched
    from apprentice.play import Spec, play_one

    def seen(policy: "Policy") -> "Policy":
        return Watched(policy, max_steps, *watched) if watched else policy

    if agent in agents.SCRIPTED:
        from apprentice.players.scripted import Scripted

        return asyncio.run(play_one(seen(Scripted(agent)), Spec([seed], max_steps, params.Prompt(), agent), seed))
    if settings and agent in agents.students(settings):
        spec = Spec([seed], max_steps, settings.active.prompt, agent)
        return asyncio.run(play_one(seen(agents.student(agent, settings)), spec, seed))

    from apprentice.endpoint.client import Client
    from apprentice.endpoint.replies import Replies
    from apprentice.errors import NoAnswer, WorkError
    from apprentice.players.chat import Chat

    model, whose = agents.models(settings)[agent]

    async def ask() -> "Episode":
        with Replies(agent, model.endpoint.asked, alone=True) as replies:
            async with Client(model.endpoint, whose, agent) as client:
                spec = Spec([seed], max_steps, model.prompt, agent, max_calls=model.max_calls)
                return await play_one(seen(Chat(agent, client, replies)), spec, seed)

    try:
        return asyncio.run(ask())
    except NoAnswer as error:
        raise WorkError(f"{agent}: {error}; its replies so far are kept: run the same command again") from None


def _by_hand(seed: int, max_steps: int) -> "Moment":
    import click

    from apprentice.cli.watch import Spectator

    with _Screen(f"by hand, seed {seed}", max_steps, _HELP) as screen:
        spectator = Spectator(seed, max_steps, screen.size)
        moment = spectator.start()
        screen.show(moment)
        while not moment.done:
            key = click.getchar()
            if key in _DONE:
                break
            if action := _KEYS.get(key if key.startswith("\x1b") else key.lower()):
                moment = spectator.see(action)
                screen.show(moment)
    return moment


class _Screen:
    """The terminal while an episode is shown; afterwards it's as it was."""

    def __init__(self, title: str, max_steps: int, help_lines: tuple[str, ...] = ()):
        from apprentice.cli import screen

        self.title, self.max_steps, self.help_lines, self.screen = title, max_steps, help_lines, screen
        self.size = screen.picture_size(lines_below=5 + len(help_lines))
        self.begun = False

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *exception) -> None:
        if self.begun:
            self._write(self.screen.LEAVE)

    def show(self, moment: "Moment") -> None:
        if not self.begun:  # not before: loading a model has things to say
            self.begun = True
            self._write(self.screen.ENTER)
        columns = shutil.get_terminal_size().columns
        observation = moment.observation
        vitals = ", ".join(f"{name} {value}" for name, value in observation.vitals.items())
        owned = ", ".join(f"{name} {count}" for name, count in observation.inventory.items() if count)
        news = f"unlocked {', '.join(moment.unlocked)}" if moment.unlocked else moment.invalid
        lines = [
            f"{self.title}, step {moment.steps}/{self.max_steps}, reward {moment.reward:.1f}, "
            f"{len(moment.achievements)} of 22{', asleep' if observation.sleeping else ''}: {moment.action}",
            vitals + (f"; {owned}" if owned else ""),
            news,
            moment.said,
            *self.help_lines,
        ]
        words = [self.screen.plain(line, columns) for line in lines]
        picture = self.screen.half_blocks(moment.image)
        self._write(self.screen.HOME + "\n".join(line + self.screen.TO_END for line in [*picture, *words]))

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
