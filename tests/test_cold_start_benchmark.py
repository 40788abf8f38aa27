"""The benchmark of the cold start runs the command and accounts for all of its time."""

import pytest

from benchmarks.cold_start import PARTS, measure


def test_the_parts_add_up() -> None:
    seconds = measure(candidates=2)
    assert list(seconds) == [*PARTS, "in all"]
    for which in (0, 1):
        assert sum(seconds[part][which] for part in PARTS) == pytest.approx(seconds["in all"][which])
    for part in PARTS[:-1]:
        assert seconds[part][0] > 0 and seconds[part][1] > 0
