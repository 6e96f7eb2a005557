"""Validation seeds are drawn fairly and repeatably, and rows go to disk in an order that anybody can repeat."""

import json

import numpy as np
import pytest

from apprentice.data.dataset import Jsonl, held_out, write_jsonl

ACHIEVEMENTS = {seed: float(seed * 7 % 13) for seed in range(50)}
ROWS = [{"number": number, "text": "é\u2028\n" * (number % 5), "nested": {"list": [number]}} for number in range(200)]


def in_order(rows) -> list[dict]:
    return sorted(rows, key=lambda row: row["number"])


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 5), (0.5, 25), (0.001, 1), (0.999, 49)])
def test_the_fraction_of_seeds_is_held_out_at_least_one_and_never_all(fraction, count):
    seeds = held_out(ACHIEVEMENTS, fraction, 0)
    assert len(seeds) == count
    assert seeds <= set(ACHIEVEMENTS)


def test_of_two_seeds_one_is_held_out():
    assert len(held_out({3: 1.0, 4: 1.0}, 0.1, 0)) == 1
    assert len(held_out({3: 1.0, 4: 1.0}, 0.9, 0)) == 1


@pytest.mark.parametrize("achievements", [{}, {5: 3.0}])
def test_fewer_than_two_seeds_cannot_be_split(achievements):
    with pytest.raises(ValueError, match="at least two"):
        held_out(achievements, 0.1, 0)


@pytest.mark.parametrize("random_seed", range(30))
def test_good_and_bad_seeds_are_both_held_out_in_their_share(random_seed):
    achievements = {seed: 12.0 if seed % 2 else 0.0 for seed in range(40)}
    seeds = held_out(achievements, 0.1, random_seed)
    assert sorted(achievements[seed] for seed in seeds) == [0, 0, 12, 12]


def test_the_choice_does_not_depend_on_the_order_of_play():
    backwards = dict(reversed(ACHIEVEMENTS.items()))
    assert held_out(ACHIEVEMENTS, 0.2, 42) == held_out(backwards, 0.2, 42) == held_out(ACHIEVEMENTS, 0.2, 42)


def test_another_random_seed_holds_out_others():
    assert len({frozenset(held_out(ACHIEVEMENTS, 0.2, seed)) for seed in range(10)}) == 10


def test_every_seed_may_be_held_out():
    assert set.union(*(held_out(ACHIEVEMENTS, 0.2, seed) for seed in range(100))) == set(ACHIEVEMENTS)


def test_without_shuffling_rows_stand_in_the_order_given(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    assert write_jsonl(path, iter(ROWS)) == len(ROWS)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == ROWS


def test_shuffling_keeps_every_row_in_another_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert write_jsonl(path, iter(ROWS), shuffle=1) == len(ROWS)
    shuffled = list(Jsonl(path))
    assert shuffled != ROWS
    assert in_order(shuffled) == ROWS
    moved = np.abs(np.arange(len(ROWS)) - [row["number"] for row in shuffled])
    assert moved.mean() > len(ROWS) / 5  # 1/3 of the length is expected


def test_the_same_seed_shuffles_to_the_same_bytes_and_another_to_others(tmp_path):
    files = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        write_jsonl(tmp_path / name, iter(ROWS), shuffle=seed)
        files[name] = (tmp_path / name).read_bytes()
    assert files["one"] == files["again"] != files["other"]


@pytest.mark.parametrize("shuffle", [None, 3])
def test_nothing_but_the_file_is_left(tmp_path, shuffle):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS, shuffle)
    write_jsonl(path, ROWS, shuffle)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    before = path.read_bytes()

    def broken():
        yield ROWS[1]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_jsonl(path, broken())
    assert path.read_bytes() == before


def test_no_rows_make_an_empty_file(tmp_path):
    assert write_jsonl(tmp_path / "rows.jsonl", [], shuffle=1) == 0
    assert len(Jsonl(tmp_path / "rows.jsonl")) == 0


def test_rows_are_read_at_random(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    rows = Jsonl(path)
    assert len(rows) == len(ROWS)
    for index in (199, 0, 57, 57, 4, 198):
        assert rows[index] == ROWS[index]
    assert list(rows) == ROWS
    for index in (200, -1):
        with pytest.raises(IndexError):
            rows[index]
