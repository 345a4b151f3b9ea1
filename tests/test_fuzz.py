"""A small version of `python -m tests.fuzz`."""

from tests.fuzz import Settings, fuzz


def test_nothing_crashes_and_nothing_is_lost_unnamed(tmp_path):
    """Broken lines and broken videos, through training and evaluation."""
    outcomes = fuzz(Settings(lines=120, videos=24, seed=3, minutes=5), tmp_path)
    for outcome in outcomes.values():
        assert outcome.faults == []
        assert outcome.refused + outcome.lost > 5 and outcome.used > 5
