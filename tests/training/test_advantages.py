"""Rewards and advantages are what their definitions say."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import SHOWN

from apprentice.episode import Reply
from apprentice.params import Achievement, Reward, Rl
from apprentice.play import Spec, play
from apprentice.players.scripted import Scripted
from apprentice.training import advantages as credit
from apprentice.training.advantages import RIDGE, Critic, advantages, anchor, draw, gigpo, grpo, return_to_go
from apprentice.training.reward import returns, rewards, with_mean
from apprentice.world import ACHIEVEMENTS

RL = Rl(
    seeds="0-9",
    evaluation={"seeds": "10-19"},
    iterations=1,
    groups=1,
    group_size=3,
    max_steps=60,
    decisions=64,
    advantage="return_to_go",
)


def but(**changes) -> Rl:
    return RL.model_copy(update=changes)


@pytest.fixture(scope="module")
def group():
    return [play(Scripted(name), Spec([5], 60, SHOWN))[0] for name in ("expert", "random", "noop")]


@pytest.fixture(scope="module")
def many():
    return play(Scripted("random"), Spec(range(12), 60, SHOWN)) + play(Scripted("expert"), Spec(range(12), 60, SHOWN))


def earned(episodes, weights=None):
    return [np.array(rewards(episode, weights or Reward())) for episode in episodes]


def test_returns_discount_what_comes_later():
    assert returns([0.0, 1.0, 2.0], 0.5) == [1.0, 2.0, 2.0]


def test_the_default_reward_is_crafters_but_counts_each_unlock(group):
    for episode in group:
        for step, value in zip(episode.steps, rewards(episode, Reward()), strict=True):
            assert value == pytest.approx(len(step.unlocked) + 0.1 * step.health_change)


def test_weights_of_the_reward_are_used(group):
    expert = group[0]
    assert sum(rewards(expert, Reward(unique=3.0, health=0.0))) == 3.0 * len(expert.unlocked)
    assert sum(rewards(expert, Reward(achievements={"collect_wood": 5.0}, health=0.0))) == 4 + len(expert.unlocked)
    assert "collect_wood" in expert.unlocked
    unlocking = sum(bool(step.unlocked) for step in expert.steps)
    assert sum(rewards(expert, Reward(unique=0.0, stepwise=0.5, health=0.0))) == 0.5 * unlocking


def test_every_achievement_can_be_weighted():
    assert Achievement.__args__ == ACHIEVEMENTS


def test_a_missing_score_is_the_mean_of_the_others():
    assert with_mean([1.0, None, 0.5]) == [1.0, 0.75, 0.5]
    assert with_mean([None, None]) == [0.0, 0.0]


@pytest.mark.parametrize("algorithm", ["return_to_go", "grpo", "gigpo", "linear"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_have_the_mean_0_over_all_decisions(many, algorithm, scale):
    found = advantages(many, but(advantage=algorithm, scale_rewards=scale, group_size=4))
    assert [len(values) for values in found] == [len(episode.steps) for episode in many]
    flat = np.concatenate(found)
    assert flat.mean() == pytest.approx(0, abs=1e-9)
    if scale == "batch":
        assert flat.std() == pytest.approx(1, abs=1e-3)


def test_return_to_go_is_centred_at_each_decision(group):
    found = return_to_go(group, earned(group), RL)
    shortest = min(map(len, found))
    np.testing.assert_allclose(np.stack([values[:shortest] for values in found]).mean(axis=0), 0, atol=1e-9)
    assert found[0][:20].mean() > found[2][:20].mean()  # the expert's early moves against doing nothing


def test_grpo_gives_an_episode_one_advantage(group):
    found = grpo(group, earned(group), RL)
    totals = [values.sum() for values in earned(group)]
    for values, total in zip(found, totals, strict=True):
        assert set(values) == {total - np.mean(totals)}


def test_gigpo_compares_steps_that_begin_in_the_same_state(group):
    """The first step is the same state for all; a state that one episode alone has seen adds nothing."""
    of_episode = gigpo(group, earned(group), but(anchor_weight=0.0))
    both = gigpo(group, earned(group), RL)
    steps = [values - base for values, base in zip(both, of_episode, strict=True)]
    first = np.array([returns(values.tolist(), RL.discount)[0] for values in earned(group)])
    alike = [anchor(episode.steps[0]) for episode in group]
    assert len(set(alike)) == 1
    seen = [anchor(step) for episode in group for step in episode.steps]
    alone = [
        value
        for episode, values in zip(group, steps, strict=True)
        for step, value in zip(episode.steps, values, strict=True)
        if seen.count(anchor(step)) == 1
    ]
    assert alone and not np.any(alone)
    assert np.argmax([values[0] for values in steps]) == np.argmax(first)


@pytest.mark.parametrize("algorithm", [return_to_go, grpo, gigpo])
def test_a_group_that_fared_alike_teaches_nothing(group, algorithm):
    if algorithm is gigpo:
        pytest.skip("within an episode, a state that comes again is compared with itself")
    same = [group[0], group[0]]
    for values in algorithm(same, earned(same), RL):
        np.testing.assert_allclose(values, 0, atol=1e-6)


LINEAR = but(advantage="linear", group_size=2)


def test_a_linear_value_function_explains_much_of_the_return(many):
    totals = np.concatenate([returns(values.tolist(), RL.discount) for values in earned(many)])
    raw = np.concatenate(advantages(many, LINEAR.model_copy(update={"gae_lambda": 1.0, "scale_rewards": "none"})))
    assert 0.2 * totals.var() < raw.var() < 0.8 * totals.var()


def test_unlocking_is_an_advantage_at_the_step_that_does_it(many):
    found = advantages(many, LINEAR)
    unlocking, others = [], []
    for episode, values in zip(many, found, strict=True):
        for step, value in zip(episode.steps, values, strict=True):
            (unlocking if step.unlocked else others).append(value)
    assert np.mean(unlocking) > np.mean(others) + 1


def test_no_episode_is_measured_by_its_own_outcome(many):
    """A judge's score moves the returns of one episode: those of its own group are measured as before."""
    weighted = LINEAR.model_copy(update={"reward": Reward(judge=5.0), "scale_rewards": "none"})
    scores = [0.5] * len(many)
    before = advantages(many, weighted, scores)
    after = advantages(many, weighted, [1.0, *scores[1:]])
    # but for the common centre
    same_group, other_group = (np.ptp(before[index] - after[index]) for index in (1, 2))
    assert same_group == pytest.approx(0, abs=1e-9)
    assert other_group > 1e-6


def test_the_value_function_remembers_earlier_iterations_and_forgets_them_slowly(many):
    critic = Critic()
    fresh = advantages(many[:2], LINEAR)
    advantages(many, LINEAR, critic=critic)
    again = Critic()
    again.sums = critic.sums.copy()
    informed = advantages(many[:2], LINEAR, critic=critic)
    assert np.abs(informed[0] - fresh[0]).max() > 1e-3
    for one, other in zip(informed, advantages(many[:2], LINEAR, critic=again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert critic.sums[0, 0] < sum(len(episode.steps) for episode in many) + 120 and RIDGE > 0


def test_the_critic_reads_the_hidden_state(many):
    """A state that knows the return, which no other feature does."""
    from apprentice.serving.in_process import Sample

    told = []
    for episode, values in zip(many, earned(many), strict=True):
        states = np.array(returns(values.tolist(), RL.discount), np.float32)[:, None]
        steps = [
            replace(step, reply=replace(Reply({}), sample=Sample(None, [], state)))
            for step, state in zip(episode.steps, states, strict=True)
        ]
        told.append(replace(episode, steps=tuple(steps)))
    settings = LINEAR.model_copy(update={"gae_lambda": 1.0, "scale_rewards": "none"})
    with_it = np.concatenate(advantages(told, settings.model_copy(update={"advantage": "critic"}))).var()
    assert with_it < 0.2 * np.concatenate(advantages(many, settings)).var()


def hidden_states(dimensions: int, groups: int, dice: np.random.Generator):
    """(moments of the folds, known features, rows to test on): play in which some of many hidden features say much.

    Each of groups × 5 episodes has 50 decisions; a group's world, and an episode's course, make them alike.
    """
    mixed, weights = 0.7 * dice.normal(size=(24, dimensions)), dice.normal(size=24) / 24**0.5

    def played(count: int) -> np.ndarray:
        truth, now = np.empty((count, 5, 50, 24)), dice.normal(size=(count, 5, 24))
        for turn in range(50):
            now = 0.95 * now + 0.31 * dice.normal(size=now.shape)
            truth[:, :, turn] = now
        truth = (truth + dice.normal(size=(count, 1, 1, 24)) / 2).reshape(-1, 24)
        left = np.tile(1 - np.arange(50) / 50, count * 5)
        luck = np.repeat(dice.normal(size=count * 5), 50) + dice.normal(size=len(left))
        hidden = truth @ mixed + dimensions**0.5 * dice.normal(size=(len(left), dimensions))
        target = left * (1.5 * truth @ weights + luck) + 3 * left
        return np.column_stack([np.ones(len(left)), left, left**2, truth[:, :6] + 0.3, hidden, target])

    parts = np.zeros((credit.FOLDS, dimensions + 10, dimensions + 10))
    for fold in range(credit.FOLDS):
        rows = played(groups // credit.FOLDS)
        parts[fold] = rows.T @ rows
    return parts, 9, played(20)


@pytest.mark.parametrize(("dimensions", "groups", "better"), [(128, 32, -0.01), (2048, 8, 0.1)])
def test_the_folds_choose_how_much_hidden_states_are_trusted(dimensions, groups, better):
    """Qwen's 2,048 hidden features need another penalty than the tiny student's 128."""
    parts, known, rows = hidden_states(dimensions, groups, np.random.default_rng(3))
    learnt = parts.sum(axis=0)

    def explained(ridge: float) -> float:
        told = rows[:, :-1] @ credit._ridge(learnt, ridge, known)
        return 1 - ((rows[:, -1] - told) ** 2).mean() / rows[:, -1].var()

    chosen = credit._ridges(learnt, parts, known)
    assert np.mean([explained(ridge) for ridge in chosen]) > explained(RIDGE) + better


def test_a_value_moves_no_farther_in_an_iteration_than_is_allowed(many):
    """In standard deviations of the return; a first iteration has nothing to move from."""
    settings = LINEAR.model_copy(update={"gae_lambda": 1.0, "scale_rewards": "none", "discount": 1.0})
    first, second = many[:12], many[12:]  # who does nothing useful, then experts

    def raw(clip: float | None) -> tuple[np.ndarray, np.ndarray]:
        critic, changed = Critic(), settings.model_copy(update={"value_clip": clip})
        return tuple(
            np.concatenate(critic.advantages(episodes, earned(episodes), changed)) for episodes in (first, second)
        )

    returned = np.concatenate([returns(values.tolist(), 1.0) for values in earned(first)])
    (free_first, free), (held_first, held), (_, wide) = raw(None), raw(0.2), raw(1e6)
    np.testing.assert_array_equal(held_first, free_first)
    np.testing.assert_array_equal(wide, free)
    critic = Critic()
    critic.advantages(first, earned(first), settings)
    known = credit.features(second[0], settings.max_steps).shape[1]
    old = np.concatenate([credit.features(one, settings.max_steps) for one in second]) @ credit._ridge(
        critic.sums, RIDGE, known
    )
    to_go = np.concatenate([returns(values.tolist(), 1.0) for values in earned(second)])
    moved = np.abs(to_go - held - old)
    assert moved.max() == pytest.approx(0.2 * returned.std()) and np.abs(to_go - free - old).max() > moved.max()


@pytest.mark.parametrize("count", [100, 999, 2300])
def test_the_decisions_drawn_stand_for_all(count):
    dice = np.random.default_rng(0)
    values, scores = dice.normal(size=1000) ** 3, dice.random(1000) + 0.01
    told = dice.normal(size=1000) + np.sign(values)
    estimates = []
    for _ in range(2000):
        drawn, weights = draw(values, scores, count, dice)
        assert len(drawn) == count and np.bincount(drawn).max() <= count // 1000 + 1
        estimates.append((weights * told[drawn]).mean())
    error = np.std(estimates) / 2000**0.5
    assert np.mean(estimates) == pytest.approx((values * told).mean(), abs=4 * error)
    if count < 1000:
        assert (np.abs(values) * scores).argmax() in drawn  # whoever else is
        plain = [(values * told)[dice.integers(1000, size=count)].mean() for _ in range(2000)]
        assert np.std(estimates) < 0.8 * np.std(plain)


def test_chances_are_in_proportion_to_the_size():
    dice = np.random.default_rng(0)
    values, scores, times = dice.choice([-1.0, 1.0], 50), dice.random(50) + 0.5, np.zeros(50)
    for _ in range(5000):
        drawn, _ = draw(values, scores, 10, dice)
        times[drawn] += 1 / 5000
    np.testing.assert_allclose(times, 10 * scores / scores.sum(), atol=0.03)
    assert (np.diff(drawn) < 0).any()  # in no order


def test_decisions_without_advantages_are_drawn_alike():
    drawn, weights = draw(np.zeros(10), np.ones(10), 5, np.random.default_rng(0))
    assert len(set(drawn)) == 5 and not weights.any()
