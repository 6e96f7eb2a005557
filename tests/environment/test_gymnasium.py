"""The Gymnasium environment passes Gymnasium's own checker and is the world that everybody here plays."""

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import apprentice.environment  # noqa: F401  registers it
from apprentice.world import ACTIONS, World

NAME = "apprentice/Crafter-v0"
NOT_NEEDED = {"torch", "transformers", "fastapi", "pydantic", "pyarrow", "datasets", "dvc", "openai", "typer"}


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_gymnasiums_checker_passes_without_a_warning(observation):
    environment = gymnasium.make(NAME, observation=observation, render_mode="rgb_array", max_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(environment.unwrapped)


def test_an_episode_is_that_of_the_world_with_the_same_seed():
    environment = gymnasium.make(NAME, observation="dict", max_steps=60)
    world = World(7, max_steps=60)
    seen, _ = environment.reset(seed=7)
    expected = world.reset()
    generator, total = np.random.default_rng(0), 0.0
    for step in range(1, 61):
        assert (seen["image"] == expected.image).all() and (seen["view"] == expected.view).all()
        assert seen["vitals"].tolist() == list(expected.vitals.values())
        action = int(generator.integers(17))
        seen, reward, terminated, truncated, info = environment.step(action)
        outcome = world.step(ACTIONS[action])
        expected, total = outcome.observation, total + reward
        assert (reward, info["unlocked"], info["steps"]) == (outcome.reward, outcome.unlocked, step)
        assert (terminated, truncated) == (outcome.died, outcome.done and not outcome.died)
        if outcome.done:
            break
    assert truncated and info["seed"] == 7


def test_without_a_seed_the_worlds_follow_from_the_last_one():
    environment = gymnasium.make(NAME)
    drawn = []
    for _ in range(2):
        environment.reset(seed=1)
        drawn.append([environment.reset()[1]["seed"] for _ in range(3)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


def test_it_renders_at_another_size_without_changing_the_episode():
    environment = gymnasium.make(NAME, render_mode="rgb_array", render_size=180)
    environment.reset(seed=3)
    assert environment.render().shape == (180, 180, 3)


def test_vectors_of_it_can_be_made():
    environments = gymnasium.make_vec(NAME, num_envs=2, vectorization_mode="sync", max_steps=5)
    seen, _ = environments.reset(seed=[1, 2])
    assert seen.shape == (2, 72, 72, 3) and (seen[0] == World(1).reset().image).all()


@pytest.mark.parametrize("action", [-1, 17, 1.5, "noop", np.array([3]), None])
def test_an_action_outside_of_the_space_is_an_error_and_changes_nothing(action):
    environment = gymnasium.make(NAME).unwrapped
    environment.reset(seed=1)
    with pytest.raises(ValueError, match="actions are integers from 0 to 16: noop, move_left"):
        environment.step(action)
    assert environment.step(np.int64(16))[4]["steps"] == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"max_steps": 0}, "max_steps is 0; it must be a whole number from 1 on"),
        ({"size": 17}, "size is 17; it must be a whole number from 18 on"),
        ({"size": 64.0}, "size is 64.0"),
        ({"render_size": 0}, "render_size is 0"),
        ({"observation": "pixels"}, "it can be 'image' or 'dict'"),
    ],
)
def test_a_wrong_setting_is_said_when_it_is_made(setting, words):
    with pytest.raises(ValueError, match=words):
        gymnasium.make(NAME, **setting)


def test_a_seed_may_have_more_than_31_bits():
    seeds = (1, 2**31, 2**32 + 1, 2**64 + 1)
    worlds = [gymnasium.make(NAME).reset(seed=seed) for seed in seeds]
    assert [info["seed"] for _, info in worlds] == list(seeds)
    assert len({seen.tobytes() for seen, _ in worlds}) == len(seeds)


def in_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "made",
    [
        f"import apprentice.environment, gymnasium; made = gymnasium.make({NAME!r})",
        f"import gymnasium, apprentice.environment; made = gymnasium.make({NAME!r})",
        f"import gymnasium; made = gymnasium.make('apprentice.environment:{NAME}')",
    ],
)
def test_it_is_found_by_its_name_once_its_room_is_imported_and_needs_little(made):
    """Neither torch nor anything else that the pipeline needs and a world does not."""
    code = f"import sys; {made}; assert made.reset(seed=7)[1]['seed'] == 7\n"
    code += f"assert not {NOT_NEEDED}.intersection(sys.modules), {NOT_NEEDED}.intersection(sys.modules)"
    in_a_new_process(code)


def test_apprentice_alone_does_not_import_gymnasium():
    in_a_new_process("import apprentice.world, sys; assert 'gymnasium' not in sys.modules")


def test_its_room_can_be_imported_without_gymnasium():
    in_a_new_process("import sys; sys.modules['gymnasium'] = None; import apprentice.environment")
