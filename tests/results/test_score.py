"""Scores are the published formulas, and agents are compared on the worlds that both have played."""

from dataclasses import replace

import numpy as np
import pytest

from apprentice.episode import Episode, Reply, Step
from apprentice.prompt import answer
from apprentice.results.score import Summary, compare, compare_all, interval, intervals, score, summary, warnings
from apprentice.world import ACHIEVEMENTS, World

SAMPLES = 500


def played(seed: int, *unlocked: str, **changes) -> Summary:
    return replace(Summary(seed, frozenset(unlocked), float(len(unlocked)), 100, 50, 0), **changes)


def some(seed: int, count: int) -> Summary:
    return played(seed, *ACHIEVEMENTS[:count])


def test_a_summary_counts_what_the_episode_has():
    step = Step(
        0, (), World(0).reset(), Reply(answer(["do"])), ("do",), "", ("do",), 1.0, 0, ("eat_cow",), False, False
    )
    steps = (
        step,
        replace(step, step=1, asked=(), invalid="no tool call", executed=("noop",), reward=-0.1, unlocked=()),
        replace(step, step=2, executed=("do",) * 3, reward=0.9, unlocked=("collect_wood", "collect_drink")),
    )
    expected = Summary(5, frozenset({"eat_cow", "collect_wood", "collect_drink"}), 1.0 - 0.1 + 0.9, 5, 3, 1)
    found = summary(Episode("agent", 5, steps))
    assert replace(found, reward=0) == replace(expected, reward=0)
    assert found.reward == pytest.approx(1.8)


def test_achievement_rate_is_the_mean_share_of_the_22():
    assert len(ACHIEVEMENTS) == 22
    row = score([some(0, 0), some(1, 11), some(2, 22)], SAMPLES)
    assert row["achievement_rate"] == pytest.approx(0.5)
    assert score([some(0, 1)], SAMPLES)["achievement_rate"] == pytest.approx(1 / 22)


def test_crafter_score_by_hand():
    """One achievement always, one in half of the episodes: exp((ln 101 + ln 51) / 22) - 1."""
    row = score([played(0, "eat_cow", "wake_up"), played(1, "eat_cow")], SAMPLES)
    assert row["crafter_score"] == pytest.approx((101 * 51) ** (1 / 22) - 1)


def test_crafter_score_is_the_geometric_mean_of_the_success_rates_in_percent():
    generator = np.random.default_rng(0)
    table = generator.random((40, 22)) < generator.random(22)
    episodes = [played(seed, *np.array(ACHIEVEMENTS)[row]) for seed, row in enumerate(table)]
    percent = 100 * table.mean(axis=0)
    row = score(episodes, SAMPLES)
    assert row["crafter_score"] == pytest.approx(np.exp(np.log(1 + percent).mean()) - 1)
    assert row["crafter_score"] < percent.mean()
    assert list(row["achievements"]) == list(ACHIEVEMENTS)
    assert list(row["achievements"].values()) == pytest.approx(list(table.mean(axis=0)))


def test_crafter_score_goes_from_0_to_100():
    assert score([some(0, 0)], SAMPLES)["crafter_score"] == pytest.approx(0)
    assert score([some(0, 22)], SAMPLES)["crafter_score"] == pytest.approx(100)


def test_a_rare_achievement_is_worth_more_than_one_more_of_a_frequent_one():
    """What the geometric mean is for; the arithmetic one cannot tell these apart."""
    frequent = [played(seed, "eat_cow") for seed in range(10)]
    rare = [played(seed, "eat_cow") for seed in range(9)] + [played(9, "collect_diamond")]
    assert score(rare, SAMPLES)["crafter_score"] > score(frequent, SAMPLES)["crafter_score"]
    assert score(rare, SAMPLES)["achievement_rate"] == pytest.approx(score(frequent, SAMPLES)["achievement_rate"])


def test_reward_length_and_invalid_replies_are_averaged():
    episodes = [
        played(0, reward=1.0, length=10, decisions=10, invalid=5),
        played(1, reward=4.0, length=30, decisions=30, invalid=5),
    ]
    row = score(episodes, SAMPLES)
    assert (row["episodes"], row["reward"], row["steps_mean"], row["invalid_rate"]) == (2, 2.5, 20, 0.25)


def test_the_interval_contains_the_mean_and_is_the_same_every_time():
    values = np.random.default_rng(1).normal(3, 1, size=50)
    low, high = interval(values, SAMPLES)
    assert low < values.mean() < high
    assert interval(values, SAMPLES) == [low, high]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(50), rel=0.25)


def test_the_interval_narrows_with_more_episodes():
    values = np.random.default_rng(2).normal(size=400)
    widths = [np.diff(interval(values[:count], SAMPLES))[0] for count in (25, 400)]
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize("values", [[0.5], [0.25, 0.25, 0.25]])
def test_the_interval_of_one_value_is_that_value(values):
    assert interval(np.array(values), SAMPLES) == [values[0]] * 2


def test_the_score_has_the_interval_of_its_achievement_rate():
    episodes = [some(seed, seed % 7) for seed in range(30)]
    rates = np.array([seed % 7 / 22 for seed in range(30)])
    assert score(episodes, SAMPLES)["achievement_rate_ci95"] == interval(rates, SAMPLES)


def test_agents_are_compared_seed_by_seed():
    one = [some(seed, seed % 9 + 2) for seed in range(20)]
    other = [some(seed, seed % 9) for seed in range(20)]
    found = compare(one, other, SAMPLES)
    assert found["difference"] == pytest.approx(2 / 22)
    assert found["ci95"] == pytest.approx([2 / 22] * 2)  # the worlds differ, the difference does not
    assert found["pairs"] == 20
    assert compare(other, one, SAMPLES)["difference"] == pytest.approx(-2 / 22)


def test_a_comparison_does_not_depend_on_the_order_of_play():
    generator = np.random.default_rng(3)
    one = [some(seed, int(generator.integers(10))) for seed in range(20)]
    other = [some(seed, int(generator.integers(10))) for seed in range(20)]
    assert compare(one, other[::-1], SAMPLES) == compare(one, other, SAMPLES)
    turned = compare(one[::-1], other, SAMPLES)
    assert turned["difference"] == pytest.approx(compare(one, other, SAMPLES)["difference"])


def test_only_seeds_that_both_have_played_count():
    found = compare([some(seed, 5) for seed in range(10)], [some(seed, 1) for seed in range(8, 20)], SAMPLES)
    assert found["pairs"] == 2
    assert found["difference"] == pytest.approx(4 / 22)


def test_the_score_from_a_files_columns_is_that_of_its_episodes(tmp_path):
    from apprentice import play, store
    from apprentice.params import Prompt
    from apprentice.players.scripted import Scripted
    from apprentice.results.score import summaries

    episodes = play.play(Scripted("random"), play.Spec([1, 2], 40, Prompt()))
    store.write(tmp_path / "random.parquet", episodes)
    columns = ["seed", "step", "unlocked", "reward", "executed", "invalid"]
    assert summaries(store.columns(tmp_path / "random.parquet", columns)) == [summary(one) for one in episodes]


def test_every_metric_has_an_interval_around_it():
    generator = np.random.default_rng(3)
    episodes = [
        played(seed, *np.array(ACHIEVEMENTS)[generator.random(22) < 0.4], reward=generator.normal(), invalid=seed % 3)
        for seed in range(40)
    ]
    row, found = score(episodes, SAMPLES), intervals(episodes, SAMPLES)
    for name in ("achievement_rate", "crafter_score", "reward", "invalid_rate"):
        low, high = found[name]
        assert low < row[name] < high, name
    assert found["achievement_rate"] == row["achievement_rate_ci95"]
    for name, (low, high) in found["achievements"].items():
        assert 0 <= low <= row["achievements"][name] <= high <= 1


def test_what_no_episode_has_shown_may_still_happen():
    """Wilson's interval of 0 of 20 reaches to 16 %; a bootstrap's would be 0 to 0."""
    low, high = intervals([some(seed, 0) for seed in range(20)], SAMPLES)["achievements"]["eat_cow"]
    assert (low, high) == (0, pytest.approx(0.161, abs=0.001))


def test_a_difference_on_every_world_is_no_chance_and_none_at_all_is():
    better, worse = [some(seed, 9 + seed % 2) for seed in range(20)], [some(seed, 5) for seed in range(20)]
    assert compare(better, worse, SAMPLES)["p"] < 0.01
    assert compare(worse, worse, SAMPLES)["p"] == 1
    found = compare(better, worse, SAMPLES)
    assert (found["better"], found["worse"], found["pairs"]) == (20, 0, 20)


def test_worlds_are_paired():
    """The worlds differ much more than the agents: unpaired this would drown."""
    worse = [some(seed, seed) for seed in range(20)]
    better = [some(seed, seed + 1 + seed % 2) for seed in range(20)]
    assert compare(better, worse, SAMPLES)["p"] < 0.01


def test_many_comparisons_make_each_count_for_less():
    generator = np.random.default_rng(5)
    agents = {f"agent{index}": [some(seed, generator.integers(3, 9)) for seed in range(30)] for index in range(6)}
    found = compare_all(agents, SAMPLES)
    assert len(found) == 15 and "agent1 - agent0" in found
    ranked = sorted(found.values(), key=lambda row: row["p"])
    assert all(row["p_holm"] >= row["p"] for row in ranked)
    assert ranked[0]["p_holm"] == pytest.approx(min(1, 15 * ranked[0]["p"]))
    assert [row["p_holm"] for row in ranked] == sorted(row["p_holm"] for row in ranked)


def test_a_claim_that_the_episodes_cannot_support_is_warned_of():
    close = {"base": [some(seed, 5 + seed % 4) for seed in range(12)], "sft": [some(seed, 7) for seed in range(12)]}
    far = {"base": [some(seed, 2 + seed % 2) for seed in range(12)], "sft": [some(seed, 9) for seed in range(12)]}
    few = far | {"base": far["base"][:9]}

    def said(agents: dict) -> list[str]:
        scores = {name: score(episodes, SAMPLES) for name, episodes in agents.items()}
        return warnings(scores, compare_all(agents, SAMPLES))

    assert said(far) == []
    assert len(said(close)) == 1 and said(close)[0].startswith("sft and base can't be told apart on 12 worlds")
    assert said({"base": far["base"], "sft": far["base"]}) == [
        "sft and base can't be told apart on 12 worlds: +0.0 percentage points, +0.0 to +0.0, p = 1"
    ]
    assert said(few) == ["base: 9 episodes are too few for its interval to be trusted; play 10 or more"]


def test_few_worlds_of_everybody_are_one_sentence():
    agents = {name: [some(seed, 5) for seed in range(4)] for name in ("base", "sft", "rl")}
    scores = {name: score(episodes, SAMPLES) for name, episodes in agents.items()}
    assert warnings(scores, compare_all(agents, SAMPLES)) == [
        "4 worlds are too few for any interval or difference to be trusted; play 10 or more"
    ]


def test_a_smaller_difference_needs_more_worlds_by_the_usual_formula():
    """(1.96 + 0.84)² × variance / difference²: 5 % significance, 80 % power."""
    one = [some(seed, 6 + seed % 2) for seed in range(40)]  # better by 0 or 1 of 22: mean 0.5, deviation 0.506
    other = [some(seed, 6) for seed in range(40)]
    assert compare(one, other, SAMPLES)["needed"] == 9
    assert compare(one[2:4], [some(2, 1), some(3, 1)], SAMPLES)["needed"] == 6  # fewer never reach p < 0.05
