"""Rewards and advantages are what their definitions say."""

import numpy as np
import pytest
from conftest import SHOWN

from apprentice.grpo import advantages, critic_advantages
from apprentice.params import Reward, Rl
from apprentice.play import play
from apprentice.policy import Scripted
from apprentice.reward import returns, rewards

RL = Rl(seeds="0-9", iterations=1, groups=1, group_size=2, max_steps=60, decisions=64)


@pytest.fixture(scope="module")
def episodes():
    return [play(Scripted(name), [5], 60, SHOWN)[0] for name in ("expert", "random", "noop")]


def test_returns_discount_what_comes_later():
    assert returns([0.0, 1.0, 2.0], 0.5) == [1.0, 2.0, 2.0]


def test_the_default_reward_is_crafters_but_counts_each_unlock(episodes):
    for episode in episodes:
        for step, value in zip(episode.steps, rewards(episode, Reward()), strict=True):
            assert value == pytest.approx(len(step.unlocked) + 0.1 * step.health_change)


def test_weights_of_the_reward_are_used(episodes):
    found = rewards(episodes[0], Reward(unlock=3.0, health=0.0))
    assert sum(found) == 3.0 * len(episodes[0].unlocked)


def test_advantages_are_centred_at_each_decision_and_scaled_in_the_group(episodes):
    found = advantages(episodes, RL)
    assert [len(values) for values in found] == [len(episode.steps) for episode in episodes]
    shortest = min(map(len, found))
    table = np.stack([values[:shortest] for values in found])
    np.testing.assert_allclose(table.mean(axis=0), 0, atol=1e-9)
    assert np.concatenate(found).std() == pytest.approx(1, abs=1e-3)
    assert found[0][:20].mean() > found[2][:20].mean()  # the expert's early moves against doing nothing


def test_a_group_that_fared_alike_teaches_nothing(episodes):
    for values in advantages([episodes[0], episodes[0]], RL):
        np.testing.assert_allclose(values, 0, atol=1e-6)


@pytest.fixture(scope="module")
def many():
    return play(Scripted("random"), range(12), 60, SHOWN) + play(Scripted("expert"), range(12), 60, SHOWN)


def test_a_linear_baseline_explains_much_of_the_return(many):
    """Centred and of size one like the group's, and less moved by what an episode gets anyway."""
    found = critic_advantages(many, RL)
    assert [len(values) for values in found] == [len(episode.steps) for episode in many]
    flat = np.concatenate(found)
    assert flat.std() == pytest.approx(1, abs=1e-3) and flat.mean() == pytest.approx(0, abs=1e-9)
    totals = np.concatenate([returns(rewards(episode, RL.reward), RL.discount) for episode in many])
    raw = np.concatenate(critic_advantages(many, RL.model_copy(update={"gae_lambda": 1.0})))
    unexplained = 1 - np.corrcoef(raw, totals)[0, 1] ** 2
    assert unexplained > 0.1  # with no baseline, advantages would be the returns


def test_unlocking_is_an_advantage_at_the_step_that_does_it(many):
    found = critic_advantages(many, RL)
    unlocking, others = [], []
    for episode, values in zip(many, found, strict=True):
        for step, value in zip(episode.steps, values, strict=True):
            (unlocking if step.unlocked else others).append(value)
    assert np.mean(unlocking) > np.mean(others) + 1


def test_no_episode_is_measured_by_its_own_outcome(many):
    """The judge's scores move the returns of every other episode: those of its own half are measured as before."""
    weighted = RL.model_copy(update={"reward": Reward(judge=5.0)})
    scores = [0.5] * len(many)
    before = critic_advantages(many, weighted, scores)
    after = critic_advantages(many, weighted, [1.0, *scores[1:]])
    # but for the common scale and centre
    same_half, other_half = (np.corrcoef(before[index], after[index])[0, 1] for index in (2, 3))
    assert same_half == pytest.approx(1, abs=1e-12)
    assert other_half < 1 - 1e-9
