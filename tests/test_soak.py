"""A short soak, and that a soak notices what it looks for; ``python -m benchmarks soak`` is the long one."""

import pytest

from benchmarks import soak


@pytest.mark.first
def test_a_short_soak():
    """Finite losses, and nothing that grows with the number of shapes."""
    result = soak.soak(120, seed=3, points=10)
    assert result.steps == 120 and result.shapes > 60
    assert not [f for f in result.failures if "slowed" not in f], result.failures


@pytest.mark.parametrize(
    "change, word",
    [
        ({"bytes": [10**8 + i * 4 * 2**20 for i in range(40)]}, "rose"),
        ({"step_ms": [10.0 + i / 4 for i in range(40)]}, "slowed"),
        ({"bytes": []}, "ended"),
    ],
)
def test_a_soak_notices(change, word):
    fine = {"steps": 400, "bytes": [10**8] * 40, "step_ms": [10.0] * 40, "losses": [1.0]}
    assert soak._judge(soak.Soak(**fine)) == []
    assert [word in failure for failure in soak._judge(soak.Soak(**fine | change))] == [True]
