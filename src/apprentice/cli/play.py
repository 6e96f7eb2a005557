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
from apprentice.workers import cores

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


_BESIDE, _WORDS, _FLASH = 34, 8, 8
"""Columns that words need beside a picture; lines that they have below it; steps that an achievement is flashed for."""


def play(
    agent: Annotated[
        str,
        typer.Argument(
            help="random, noop, expert; base, sft, distill, rl: the student; a model behind an API; me: by hand.",
            autocompletion=agents.names,
        ),
    ],
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31 - 1, help="Of the world; otherwise the first that the benchmark plays."),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Show its best episode of the benchmark, as recorded.")] = False,
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
    if best and (seed is not None or max_steps is not None or agent == agents.ME):
        raise ConfigError(
            "--best shows an episode that the benchmark has recorded; leave --seed, --max-steps and me out"
        )
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
    recorded = _recorded(agent) if best else None
    if recorded:
        seed, max_steps = recorded.seed, recorded.length
    if seed is None:
        seed = settings.benchmark.seeds[0] if settings else 0
    if max_steps is None:
        max_steps = settings.benchmark.steps if settings and agent != agents.ME else 10_000

    if agent == agents.ME:
        end = _by_hand(seed, max_steps)
        steps, reward, achievements, died = end.steps, end.reward, end.achievements, end.died
    else:
        episode = _watch(agent, settings, seed, max_steps, gif, mp4, fps, as_json, recorded)
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
    recorded: "Episode | None",
) -> "Episode":
    """Let it play, or take what is recorded, and show or film it."""
    from apprentice.cli import film, watch

    opening = settings.benchmark.opening if recorded and settings else ()
    if not quiet and not recorded:
        print(_loading(agent, settings), file=sys.stderr)

    if sys.stdout.isatty() and not (gif or mp4 or quiet):
        with _Screen(f"{agent}, seed {seed}", max_steps) as screen:
            last = 0.0

            def show(moment: "Moment") -> None:
                nonlocal last
                time.sleep(max(0.0, last + 1 / fps - time.monotonic()))
                last = time.monotonic()
                screen.show(moment)

            if recorded is None:
                return _episode(agent, settings, seed, max_steps, (screen.size, show))
            for moment in watch.moments(recorded, screen.size, opening):
                show(moment)
            return recorded
    episode = recorded or _episode(agent, settings, seed, max_steps)
    for path, write in ((gif, film.write_gif), (mp4, film.write_mp4)):
        if path:
            write(path, watch.moments(episode, film.SIZE, opening), f"{agent}, seed {seed}", fps)
    return episode


def _recorded(agent: str) -> "Episode":
    """The agent's best episode of the benchmark."""
    from apprentice import store
    from apprentice.results import table

    path = Path(f"data/benchmark/{agent}.parquet")
    if not path.exists():
        raise ConfigError(f"there is no {path}: dvc repro plays the benchmark, or dvc pull brings it")
    return store.from_rows(store.rows(path, seed=table.best(agent)))


def _loading(agent: str, settings: params.Params | None) -> str:
    """What is to come, before it takes some seconds."""
    if settings and agent in agents.students(settings):
        folders = dict.fromkeys([agents.BASE, agents.students(settings)[agent]])
        return f"loading {' and '.join(folders)} on {cores()} cores, a few seconds for the tiny student …"
    if settings and agent in agents.models(settings):
        model, _ = agents.models(settings)[agent]
        assert model.endpoint is not None
        return f"asking {model.endpoint.model} at {model.endpoint.base_url}, a request for each decision …"
    return f"{agent} begins …"


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
    """The terminal while an episode is shown; afterwards it's as it was, with the last picture on it.

    Beside the picture stand the words, where there is room for them, or below it.
    """

    def __init__(self, title: str, max_steps: int, help_lines: tuple[str, ...] = ()):
        from apprentice.cli import screen

        self.title, self.max_steps, self.help_lines, self.screen = title, max_steps, help_lines, screen
        columns, _ = shutil.get_terminal_size()
        self.size = screen.picture_size(lines_below=1)
        self.beside = columns - self.size >= _BESIDE
        if not self.beside:
            self.size = screen.picture_size(lines_below=_WORDS + len(help_lines))
        self.begun, self.news, self.until = False, "", 0
        self.last: list[str] = []

    def __enter__(self) -> "_Screen":
        return self

    def __exit__(self, *exception) -> None:
        if self.begun:
            self._write(self.screen.LEAVE + "\n".join([*self.last, ""]))

    def show(self, moment: "Moment") -> None:
        if not self.begun:  # not before: loading a model has things to say
            self.begun = True
            self._write(self.screen.ENTER)
        if moment.unlocked:
            self.news, self.until = f"unlocked {', '.join(moment.unlocked)}", moment.steps + _FLASH
        columns = shutil.get_terminal_size().columns
        width = columns - self.size - 2 if self.beside else columns
        picture = self.screen.half_blocks(moment.image)
        words = self._words(moment, width)
        if self.beside:
            words += [""] * (len(picture) - len(words))
            lines = [f"{left}  {right}" for left, right in zip(picture, words, strict=False)]
        else:
            lines = [*picture, *words]
        self.last = lines
        self._write(self.screen.HOME + "\n".join(line + self.screen.TO_END for line in lines))

    def _words(self, moment: "Moment", width: int) -> list[str]:
        """What is going on, a line each."""
        observation = moment.observation
        vitals = " ".join(f"{name} {value}" for name, value in observation.vitals.items())
        owned = ", ".join(f"{name} {count}" for name, count in observation.inventory.items() if count)
        asleep = ", asleep" if observation.sleeping else ""
        ended = ", died" if moment.died else ", over" if moment.done else ""
        texts = {
            self.title: 1,
            f"step {moment.steps}/{self.max_steps}, reward {moment.reward:.1f}, {len(moment.achievements)}/22"
            f"{asleep}{ended}": 1,
            f"{moment.action}: {moment.caption}" if moment.action else "at the start": 2,
            vitals: 1,
            owned or "owns nothing": 3,
            moment.said or moment.invalid: 3,
        }
        lines = [
            line for text, most in texts.items() for line in self.screen.folded(text, width, most if self.beside else 1)
        ]
        flash = moment.steps < self.until and bool(self.news)
        lines.insert(1, f"\x1b[7m {self.screen.plain(self.news, width - 2)} \x1b[0m" if flash else "")
        if self.beside:
            lines += [
                "",
                *(
                    f"{len(moment.achievements) - place}. {name}"
                    for place, name in enumerate(moment.achievements[:-6:-1])
                ),
            ]
        return lines + [line for text in self.help_lines for line in self.screen.folded(text, width, 4)]

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
