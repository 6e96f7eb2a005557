"""The scripted teacher plays well, repeats itself exactly, and looks at nothing but observations."""

from dataclasses import replace

import numpy as np
import pytest

from apprentice.players.expert import Expert
from apprentice.world import ACTIONS, ITEMS, TILES, Observation, World


def play(seed: int, steps: int) -> tuple[list[str], list[Observation], set[str]]:
    world, expert = World(seed, max_steps=steps), Expert()
    observations, actions, unlocked = [world.reset()], [], set()
    while not world.done:
        actions.append(expert.act(observations[-1]))
        outcome = world.step(actions[-1])
        observations.append(outcome.observation)
        unlocked.update(outcome.unlocked)
    return actions, observations, unlocked


def scene(*rows: str, **changes) -> Observation:
    """An observation in broad daylight of what `rows` show around the player; empty hands, facing down."""
    signs = {".": "grass", "#": "stone", "~": "water", "T": "tree", "@": "player", "Z": "zombie", "!": "lava"}
    observation = Observation(
        image=np.zeros((72, 72, 3), np.uint8),
        view=np.array([[TILES.index(signs[sign]) for sign in row] for row in rows], np.uint8),
        vitals={"health": 9, "food": 9, "drink": 9, "energy": 9},
        inventory=dict.fromkeys(ITEMS, 0),
        facing=(0, 1),
        position=(32, 32),
        sleeping=False,
        daylight=1.0,
    )
    return replace(observation, **changes)


MEADOW = [".........", ".........", ".........", "....@....", ".........", ".........", "........."]


def holding(**items: int) -> dict[str, int]:
    return dict.fromkeys(ITEMS, 0) | items


def test_unlocks_twelve_achievements_in_200_steps():
    assert np.mean([len(play(seed, 200)[2]) for seed in range(50)]) >= 12


def test_the_same_observations_give_the_same_actions():
    actions, observations, _ = play(seed=3, steps=300)
    again = Expert()
    assert [again.act(observation) for observation in observations[: len(actions)]] == actions


def test_plays_without_picture_and_world():
    """Copies of the observations, with the picture blanked, are enough."""
    actions, observations, _ = play(seed=4, steps=150)
    expert = Expert()
    for observation, action in zip(observations[:-1], actions, strict=True):
        blank = replace(observation, image=np.zeros_like(observation.image), view=observation.view.copy())
        assert expert.act(blank) == action


def test_does_not_change_the_observation():
    observation = scene(*MEADOW)
    view, vitals, inventory = observation.view.copy(), dict(observation.vitals), dict(observation.inventory)
    Expert().act(observation)
    assert (observation.view == view).all()
    assert (observation.vitals, observation.inventory) == (vitals, inventory)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_survives_actions_that_it_did_not_choose(seed):
    """Every other action is somebody else's; it still names real actions and a plan."""
    world, expert, random = World(seed, max_steps=300), Expert(), np.random.RandomState(seed)
    observation = world.reset()
    while not world.done:
        action = expert.act(observation)
        assert action in ACTIONS
        assert expert.plan
        observation = world.step(random.choice(ACTIONS) if random.rand() < 0.5 else action).observation


def test_begins_with_a_sapling():
    expert = Expert()
    assert expert.act(scene(*MEADOW)) == "do"
    assert expert.plan == "collect a sapling from the grass"


def test_plants_the_sapling_at_once():
    """What it holds is what to do with it: somebody who sees just the picture can follow."""
    assert Expert().act(scene(*MEADOW, inventory=holding(sapling=1))) == "place_plant"


def test_turns_to_a_zombie_then_strikes():
    rows = [*MEADOW[:3], "...Z@....", *MEADOW[4:]]
    assert Expert().act(scene(*rows)) == "move_left"
    assert Expert().act(scene(*rows, facing=(-1, 0))) == "do"


def test_drinks_until_full():
    rows = [*MEADOW[:4], "....~....", *MEADOW[5:]]
    thirsty = {"health": 9, "food": 9, "drink": 8, "energy": 9}
    assert Expert().act(scene(*rows, vitals=thirsty)) == "do"
    assert Expert().act(scene(*rows, vitals=thirsty, facing=(0, -1), inventory=holding(wood=1))) != "do"


def test_never_steps_into_lava():
    rows = [".........", ".........", "....!....", "...!@!...", "....!....", ".........", "........."]
    for facing in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        for items in ({}, {"wood": 9}, {"wood_pickaxe": 1, "stone": 9}):
            action = Expert().act(scene(*rows, facing=facing, inventory=holding(**items)))
            assert not action.startswith("move_")


def test_places_a_table_only_with_wood_for_the_tools():
    """With less it goes on collecting, so that the table serves at once."""
    rows = [*MEADOW[:3], "....@..T.", *MEADOW[4:]]
    assert Expert().act(scene(*rows, inventory=holding(wood=3))) == "move_right"
    assert Expert().act(scene(*rows, inventory=holding(wood=4))) == "place_table"
