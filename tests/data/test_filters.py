"""Each filter drops what it says and no more, every fallen decision is counted, and a dead end names the way out."""

import weakref
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from apprentice import prompt
from apprentice.data.filters import Funnel, NothingLeft, select
from apprentice.episode import Episode, Reply
from apprentice.params import Filter, Prompt
from apprentice.play import Spec, play
from apprentice.world import World

OFF = Filter(
    min_steps_per_episode=0,
    max_steps_per_episode=None,
    min_achievements_per_episode=0,
    min_unique_states=0,
    detect_loops="off",
    require_valid_tool_calls="off",
    deduplicate=False,
)
INVALID = "?"
LEAST = {"health": 9, "food": 9, "drink": 9, "energy": 9}


class Script:
    """Plays these actions one by one; `?` is an invalid reply."""

    name = "script"

    def __init__(self, actions: Iterable[str]):
        self.actions = iter(actions)

    def begin(self, seed: int) -> "Script":
        return self

    async def reply(self, turn) -> Reply:
        action = next(self.actions)
        if action == INVALID:
            return Reply({"role": "assistant", "content": f"I wait at {turn.observation.daylight}"})
        return Reply(prompt.answer([action]))

    def end(self) -> None:
        pass


def played(actions: Iterable[str], seed: int = 0, mode: str = "image") -> Episode:
    actions = tuple(actions)
    return play(Script(actions), Spec([seed], len(actions), Prompt(mode=mode)))[0]


def filtered(episodes: Iterable[Episode], **settings) -> tuple[list[Episode], Funnel]:
    """What passes with only these filters on, and the funnel, in which all numbers add up."""
    funnel = Funnel()
    kept = list(select(episodes, OFF.model_copy(update=settings), funnel))
    for counts in (funnel.episodes, funnel.decisions):
        assert counts["read"] == sum(count for name, count in counts.items() if name != "read")
    assert funnel.episodes["kept"] == len(kept)
    assert funnel.decisions["kept"] == sum(len(episode.steps) for episode in kept)
    assert all(episode.steps for episode in kept)
    return kept, funnel


def seeds(episodes: Iterable[Episode]) -> list[int]:
    return [episode.seed for episode in episodes]


def places(episode: Episode) -> list[int]:
    return [step.step for step in episode.steps]


@pytest.fixture(scope="module")
def at_a_tree() -> tuple[int, list[str]]:
    """A seed, and the moves after which the player there stands at a tree and faces it: `move_right` has no effect."""
    for seed in range(30):
        world = World(seed)
        observation, moves = world.reset(), []
        for _ in range(4):
            view = prompt.grid(observation).splitlines()[3].split()
            if view[5] == "tree":
                return seed, moves or ["move_right"]
            if "tree" not in view[5:]:
                break
            observation = world.step("move_right").observation
            moves.append("move_right")
    raise AssertionError("no seed with a tree to the right")


@pytest.fixture(scope="module")
def free() -> Episode:
    """Twelve times the same move with a step each."""
    for seed in range(30):
        episode = played(["move_left"] * 12, seed)
        if len({step.observation.position for step in episode.steps}) == 12:
            return episode
    raise AssertionError("no seed with room to the left")


def looping(at_a_tree, times: int, after: Iterable[str] = ("move_left", "move_left")) -> tuple[Episode, list[int]]:
    """An episode that walks into a tree as often, and the decisions that do so."""
    seed, moves = at_a_tree
    episode = played([*moves, *["move_right"] * times, *after], seed)
    return episode, list(range(len(moves), len(moves) + times))


def test_with_everything_off_all_is_kept_as_it_was():
    episodes = [played(["noop"] * 9 + [INVALID], seed) for seed in range(3)]
    kept, funnel = filtered(episodes)
    for before, after in zip(episodes, kept, strict=True):
        assert len(after.steps) == 10
        assert all(one is other for one, other in zip(before.steps, after.steps, strict=True))
    assert funnel.as_dict() == {"episodes": {"read": 3, "kept": 3}, "decisions": {"read": 30, "kept": 30}}


def test_short_and_long_episodes_are_dropped():
    episodes = [played(["noop"] * length, seed) for seed, length in enumerate((4, 5, 6, 7))]
    kept, funnel = filtered(episodes, min_steps_per_episode=5, max_steps_per_episode=6)
    assert seeds(kept) == [1, 2]
    assert funnel.episodes == {"read": 4, "min_steps_per_episode": 1, "max_steps_per_episode": 1, "kept": 2}
    assert funnel.decisions == {"read": 22, "min_steps_per_episode": 4, "max_steps_per_episode": 7, "kept": 11}


def test_steps_are_environment_steps_not_decisions():
    class Pair(Script):
        async def reply(self, turn) -> Reply:
            return Reply(prompt.answer(["noop", "noop"]))

    episode = play(Pair(()), Spec([0], 8, Prompt(max_actions=2)))[0]
    assert len(episode.steps) == 4
    assert filtered([episode], min_steps_per_episode=8)[0]
    assert filtered([episode, played(["noop"])], max_steps_per_episode=7)[1].episodes["max_steps_per_episode"] == 1


def test_episodes_with_too_few_achievements_are_dropped():
    actions = ["move_left", "noop", "noop", "noop", "noop", "noop"]
    none = played(actions, seed=1)
    assert not none.unlocked
    one, two = (
        replace(
            none, seed=seed, steps=tuple(replace(s, unlocked=(n,)) for s, n in zip(none.steps, names, strict=False))
        )
        for seed, names in ((2, ["eat_cow"]), (3, ["eat_cow", "wake_up"]))
    )
    kept, funnel = filtered([none, one, two, one], min_achievements_per_episode=2)
    assert seeds(kept) == [3]
    assert funnel.episodes["min_achievements_per_episode"] == 3


def test_episodes_with_too_few_distinct_states_are_dropped(free):
    still = played(["noop"] * 12)
    kept, funnel = filtered([still, free], min_unique_states=12)
    assert seeds(kept) == [free.seed]
    assert funnel.episodes["min_unique_states"] == 1
    assert funnel.decisions["min_unique_states"] == 12
    assert len(filtered([still], min_unique_states=1)[0]) == 1


@pytest.mark.parametrize(("setting", "left"), [("off", 8), ("decision", 6), ("episode", 4)])
def test_invalid_replies_are_kept_dropped_or_cost_the_episode(setting, left):
    half, whole = played([INVALID, "noop", INVALID, "noop"], 1), played(["noop", "move_up", "noop", "move_up"], 2)
    kept, funnel = filtered([half, whole], require_valid_tool_calls=setting)
    assert sum(len(episode.steps) for episode in kept) == left
    assert funnel.decisions["require_valid_tool_calls"] == 8 - left
    assert funnel.episodes["require_valid_tool_calls"] == (setting == "episode")
    if setting != "off":
        assert not any(step.invalid for episode in kept for step in episode.steps)


def test_an_episode_without_a_decision_left_is_counted():
    kept, funnel = filtered([played([INVALID] * 3), played(["noop"])], require_valid_tool_calls="decision")
    assert len(kept) == 1
    assert funnel.episodes == {"read": 2, "no decision left": 1, "kept": 1}


def test_a_loop_is_a_longer_run_than_allowed(at_a_tree):
    seed, _ = at_a_tree
    for times, fallen in ((5, 0), (6, 1), (9, 4)):
        episode, repeated = looping(at_a_tree, times)
        kept, funnel = filtered([episode], detect_loops="decision", max_repeated_actions=5)
        assert seeds(kept) == [seed]
        assert funnel.decisions["max_repeated_actions"] == fallen
        assert sorted(set(places(episode)) - set(places(kept[0]))) == repeated[5:]


def test_a_loop_can_cost_the_episode(at_a_tree):
    loops, fine = looping(at_a_tree, 6)[0], looping(at_a_tree, 5)[0]
    kept, funnel = filtered([loops, replace(fine, seed=99)], detect_loops="episode", max_repeated_actions=5)
    assert seeds(kept) == [99]
    assert funnel.episodes["max_repeated_actions"] == 1
    assert funnel.decisions["max_repeated_actions"] == len(loops.steps)
    assert len(filtered([loops], detect_loops="off", max_repeated_actions=5)[0][0].steps) == len(loops.steps)


def test_moving_freely_is_no_loop(free):
    kept, funnel = filtered([free], detect_loops="decision", max_repeated_actions=2)
    assert funnel.decisions["max_repeated_actions"] == 0
    assert len(kept[0].steps) == 12


def test_repeating_what_earns_something_is_no_loop():
    """The state may look the same: a blow does not show until the zombie falls."""
    episode = played(["noop"] * 8)
    for changes, fallen in (({}, 6), ({"reward": 0.1}, 0), ({"unlocked": ("eat_cow",)}, 0)):
        earning = replace(episode, steps=tuple(replace(step, **changes) for step in episode.steps))
        _, funnel = filtered([earning], detect_loops="decision", max_repeated_actions=1)
        assert funnel.decisions["max_repeated_actions"] == fallen


def test_sleeping_is_no_loop():
    """Asleep, nothing changes but the time of day."""
    steps = played(["noop"] * 8).steps
    asleep = tuple(
        replace(
            step,
            executed=("sleep",),
            asked=("sleep",),
            observation=replace(step.observation, sleeping=True, daylight=1 - index / 100),
        )
        for index, step in enumerate(steps)
    )
    for sleeping, fallen in ((asleep, 0), (steps, 6)):
        episode = replace(played(["noop"]), steps=sleeping)
        _, funnel = filtered([episode], detect_loops="decision", max_repeated_actions=1)
        assert funnel.decisions["max_repeated_actions"] == fallen


def test_different_actions_without_effect_are_no_loop(at_a_tree):
    seed, moves = at_a_tree
    episode = played([*moves, *["move_right", "noop"] * 6], seed)
    assert (
        filtered([episode], detect_loops="decision", max_repeated_actions=1)[1].decisions["max_repeated_actions"] == 0
    )


def test_the_same_seen_and_answered_is_kept_once():
    one = played(["noop", "move_left", "noop"])
    kept, funnel = filtered([one, replace(one, seed=5), replace(one, agent="other")], deduplicate=True)
    assert kept == [one]
    assert funnel.decisions == {"read": 9, "deduplicate": 6, "kept": 3}
    assert funnel.episodes == {"read": 3, "no decision left": 2, "kept": 1}


def test_another_answer_to_the_same_is_no_duplicate():
    kept, _ = filtered([played([action]) for action in ("noop", "move_left", INVALID, "noop")], deduplicate=True)
    assert [len(episode.steps) for episode in kept] == [1, 1, 1]


def changed(step, **changes):
    return replace(step, observation=replace(step.observation, **changes))


@pytest.mark.parametrize(
    ("mode", "what", "kept"),
    [
        ("image", "image", 2),
        ("image", "inventory", 2),
        ("image", "vitals", 2),
        ("image", "facing", 2),
        ("text", "image", 1),  # not shown
        ("text", "view", 2),
        ("text+image", "image", 2),
        ("image", "position", 1),  # not shown
    ],
)
def test_what_was_seen_is_what_was_shown(mode, what, kept):
    episode = played(["noop"], mode=mode)
    step = episode.steps[0]
    image, view = step.observation.image.copy(), step.observation.view.copy()
    image[0, 0, 0] ^= 1
    view[0, 0] = (view[0, 0] + 1) % 5
    other = {
        "image": image,
        "view": view,
        "inventory": step.observation.inventory | {"wood": 4},
        "vitals": LEAST | {"food": 1},
        "facing": (-1, 0),
        "position": (1, 1),
    }[what]
    twin = replace(episode, steps=(changed(step, **{what: other}),))
    assert len(filtered([episode, twin], deduplicate=True)[0]) == kept


def test_a_different_history_counts_only_where_it_is_shown():
    step = replace(played(["noop"]).steps[0], history=("do",))
    other = replace(step, history=("sleep",))
    for history, kept in ((0, 1), (2, 2)):
        episodes = [Episode("a", 0, (s,), Prompt(history=history).model_dump_json()) for s in (step, other)]
        assert len(filtered(episodes, deduplicate=True)[0]) == kept


def test_the_funnel_adds_up_with_every_filter_on(at_a_tree):
    generator = np.random.default_rng(0)
    vocabulary = ["noop", "move_left", "move_right", "do", INVALID]
    episodes = [
        played(generator.choice(vocabulary, size=int(size)), seed % 3) for seed, size in enumerate([3, 9, 20, 40])
    ]
    episodes += [looping(at_a_tree, 12)[0], episodes[2]]
    _, funnel = filtered(
        episodes,
        min_steps_per_episode=5,
        max_steps_per_episode=30,
        detect_loops="decision",
        max_repeated_actions=3,
        require_valid_tool_calls="decision",
        deduplicate=True,
    )  # it is checked there
    assert set(funnel.episodes) == {
        "read",
        "kept",
        "min_steps_per_episode",
        "max_steps_per_episode",
        "no decision left",
    }
    assert {"require_valid_tool_calls", "max_repeated_actions", "deduplicate"} <= set(funnel.decisions)


def nothing(episodes: list[Episode], **settings) -> str:
    with pytest.raises(NothingLeft) as raised:
        filtered(episodes, **settings)
    return str(raised.value)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"min_steps_per_episode": 50}, {"min_steps_per_episode": 12}),
        ({"max_steps_per_episode": 3}, {"max_steps_per_episode": 8}),
        ({"min_achievements_per_episode": 9}, {"min_achievements_per_episode": 0}),
        ({"detect_loops": "episode", "max_repeated_actions": 2}, {"max_repeated_actions": 6}),
        ({"detect_loops": "episode", "max_repeated_actions": 2}, {"detect_loops": "decision"}),
    ],
)
def test_when_nothing_is_left_the_message_names_the_filter_and_a_value_that_keeps_some(settings, remedy):
    episodes = [played(["noop"] * 12, 0), played([*["move_left", "noop"], *["noop"] * 6], 1)]
    message = nothing(episodes, **settings)
    ((name, value),) = remedy.items()
    assert f"filter.{name} to {value}" in message
    assert "20 of 20 decisions" in message
    assert filtered(episodes, **settings | remedy)[0]


def test_the_remedy_for_too_few_states_keeps_some(free):
    message = nothing([played(["noop"] * 12), free], min_unique_states=30)
    assert "set filter.min_unique_states to 12" in message
    assert seeds(filtered([played(["noop"] * 12), free], min_unique_states=12)[0]) == [free.seed]


def test_the_remedy_for_invalid_replies_keeps_some():
    half = played(["noop", INVALID, "noop", INVALID])
    message = nothing([half], require_valid_tool_calls="episode")
    assert "2 valid replies" in message
    assert "set filter.require_valid_tool_calls to decision" in message
    assert filtered([half], require_valid_tool_calls="decision")[0]


@pytest.mark.parametrize("setting", ["decision", "episode"])
def test_if_every_reply_is_invalid_only_turning_the_filter_off_is_named(setting):
    """To drop them one by one would keep none either."""
    message = nothing([played([INVALID] * 4)], require_valid_tool_calls=setting)
    assert "set filter.require_valid_tool_calls to off" in message
    assert filtered([played([INVALID] * 4)], require_valid_tool_calls="off")[0]


def test_nothing_left_of_loops_between_invalid_replies_is_said_too():
    """The decisions that a loop is allowed are invalid, so that the rest of the loop is what took most."""
    episode = played([INVALID] * 6 + ["noop"] * 20 + [INVALID])
    message = nothing([episode], require_valid_tool_calls="decision", detect_loops="decision", max_repeated_actions=5)
    assert "max_repeated_actions" in message
    assert "20 of 27 decisions" in message


def test_the_filter_that_took_most_is_named():
    episodes = [played(["noop"] * 3, 0), played(["noop"] * 30, 1), played(["noop"] * 4, 2)]
    message = nothing(episodes, min_steps_per_episode=5, min_achievements_per_episode=1)
    assert "min_achievements_per_episode" in message
    assert "30 of 37" in message
    assert "min_steps_per_episode" not in message


def test_without_episodes_the_message_says_to_collect():
    assert "collect" in nothing([])


def test_one_episode_after_the_other_is_read_and_let_go():
    made = []

    def episodes():
        for seed in range(6):
            assert sum(one() is not None for one in made) <= 1  # the one that was given last
            episode = played(["noop", "move_up"], seed)
            made.append(weakref.ref(episode))
            yield episode
            del episode

    for kept, passed in enumerate(select(episodes(), OFF, Funnel())):
        assert passed.seed == kept
        assert len(made) == kept + 1  # nothing is read ahead
        del passed
    assert len(made) == 6
