"""Statistics, tables and files that all benchmarks share, on numbers whose answers are known."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common


def held_by_median(count, first, last):
    """Probability that the median lies between two order statistics, by counting coins."""
    return sum(math.comb(count, k) for k in range(first + 1, last + 1)) / 2**count


@given(st.integers(6, 300))
def test_interval_holds_the_median_and_is_the_narrowest_that_does(count):
    first, last = common.median_ranks(count)
    assert first + last == count - 1
    assert held_by_median(count, first, last) >= 0.95
    assert held_by_median(count, first + 1, last - 1) < 0.95


@pytest.mark.parametrize(("count", "ranks"), [(1, (0, 0)), (5, (0, 4)), (6, (0, 5)), (10, (1, 8)), (40, (13, 26))])
def test_ranks_of_the_tables_in_textbooks(count, ranks):
    assert common.median_ranks(count) == ranks


def test_ratios_are_taken_within_a_round():
    """A machine that is ten times slower in some rounds changes no ratio."""
    slow = [1.0, 10.0, 1.0, 10.0, 1.0]
    spread = common.compare([s * r for s, r in zip(slow, [1.1, 1.2, 1.3, 1.4, 1.5], strict=True)], slow)
    expected = common.Spread(median=1.3, lower=1.2, upper=1.4, low=1.1, high=1.5, fastest=1.1)
    assert [getattr(spread, n) for n in common.Spread.__slots__] == pytest.approx(
        [getattr(expected, n) for n in common.Spread.__slots__]
    )


def test_every_variant_is_first_as_often_and_has_both_neighbours():
    turns = [common.rotated("abc", turn) for turn in range(6)]
    assert sorted(order[0] for order in turns) == [*"aabbcc"]
    before = {left for order in turns for left, right in itertools.pairwise(order) if right == "b"}
    assert before == {"a", "c"}


def test_turns_are_as_many_as_rounds():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = common.take_turns(steps, rounds=4, repeats=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    assert calls.count("a") == 12 and min(times["a"]) > 0


def test_tables_and_files(tmp_path):
    columns = [("name", lambda row: row["name"]), ("ratio", lambda row: f"{row['ratio']:.2f}")]
    rows = [{"name": "long name", "ratio": 1.5}, {"name": "b", "ratio": math.nan}]
    assert common.text_table(columns, rows).splitlines() == [
        "name       ratio",
        "----------------",
        "long name   1.50",
        "b            nan",
    ]
    common.save(tmp_path / "deep/table", "Title", "What it is.", columns, rows, {"schema": "x/1", "samples": (1, 2)})
    assert "| long name | 1.50 |" in (tmp_path / "deep/table.md").read_text()
    read = json.loads((tmp_path / "deep/table.json").read_text())
    assert read == {"schema": "x/1", "samples": [1, 2], "rows": [rows[0], {"name": "b", "ratio": None}]}


def test_a_fresh_process_answers_or_says_why(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys\nprint('noise')\nprint([1, 2] if sys.argv[1] == 'go' else no_such_name)")
    assert common.fresh(program, ["go"]) == [1, 2]
    with pytest.raises(RuntimeError, match="no_such_name"):
        common.fresh(program, ["stop"])


def test_a_table_made_in_pieces_keeps_the_rows_of_other_models(tmp_path):
    columns = [("model", lambda row: row["model"]), ("ratio", lambda row: f"{row['spread'].median:.1f}")]
    spread = common.compare([1.0, 2.0], [1.0, 1.0])
    rows = [{"model": name, "spread": spread, "other": None} for name in ("a", "b")]
    common.save(tmp_path / "table", "Title", "About.", columns, rows, {})
    assert common.kept(tmp_path / "table", ["b", "c"]) == rows[:1]
    assert common.kept(tmp_path / "none", ["b"]) == []
