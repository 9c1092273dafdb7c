"""How cost grows with work: straight lines, bends, and the series that are measured."""

from __future__ import annotations

import random

import pytest

from benchmarks import growth

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_straight_line_is_found_whatever_its_sizes():
    work = [1e6 * 2**i for i in range(12)]
    line = growth.fit(work, [0.05 + 3e-9 * w for w in work])
    assert line.fixed == pytest.approx(0.05) and line.per_unit == pytest.approx(3e-9)
    assert abs(line.worst) < 1e-9


@pytest.mark.parametrize("at", [3, 11])
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_bend_is_named_with_its_place_and_sign(at, factor):
    work = [1e6 * 2**i for i in range(12)]
    cost = [0.05 + 3e-9 * w for w in work]
    cost[at] *= factor
    line = growth.fit(work, cost)
    assert line.at == at and abs(line.worst) > growth.STRAIGHT_MS and (line.worst > 0) == (factor > 1)


def test_growth_that_is_not_straight_is_seen():
    work = [1e6 * 2**i for i in range(12)]
    for cost in ([w**1.3 for w in work], [w**0.7 for w in work]):
        assert abs(growth.fit(work, cost).worst) > growth.STRAIGHT_MS


def test_straight_stretches_end_where_the_rate_changes():
    work = [1e6 * 2**i for i in range(12)]
    cost = [0.05 + 3e-9 * w if i < 8 else 6e-9 * w for i, w in enumerate(work)]
    first, second = growth.stretches(work, cost)
    assert (first.begin, first.end, second.begin, second.end) == (0, 8, 8, 12)
    assert first.line.per_unit == pytest.approx(3e-9) and second.line.per_unit == pytest.approx(6e-9)
    assert len(growth.stretches(work[:8], cost[:8])) == 1
    last = growth.stretches([*work[:8], 8 * work[7]], [*cost[:8], 24 * cost[7]])[1]
    assert last == growth.Stretch(8, 9, None)


@pytest.mark.parametrize(("work", "cost"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 1.0])])
def test_a_line_needs_points(work, cost):
    with pytest.raises(ValueError, match="at least two"):
        growth.fit(work, cost)


@pytest.mark.parametrize("name", list(growth.SERIES))
def test_a_series_measures_its_ends(name):
    series = growth.SERIES[name]
    assert set(series.quick) <= set(series.values) and list(series.values) == sorted(series.values)
    first, second = (
        growth.measure(series, value, rounds=1, turn_s=0.0, seed=random.randrange(10**6))
        for value in series.values[:2]
    )
    assert second.flops > first.flops and second.data > first.data
    assert second.ours_bytes > first.ours_bytes and second.eager_bytes > first.eager_bytes
    assert first.ours_ms.p50 > 0 and first.ratio.p50 > 0
    assert growth.by_series([second, first]) == {name: [first, second]}


def test_what_a_growth_point_keeps_is_counted_by_hand():
    """Simple: the input and half a byte per pooled output."""
    point = growth.measure(growth.SERIES["batch"], 2, rounds=1, turn_s=0.0, seed=1)
    assert point.data == 2 * (3 * 28 * 28 + 196 * 64) * 4
    assert point.flops == 2 * 2 * 64 * 28 * 28 * 27
    assert point.ours_bytes == 2 * 3 * 28 * 28 * 4 + 2 * 196 * 64 // 2
    assert point.parameters == (64 * 27 + 64) * 4  # the LSTM's are not used
