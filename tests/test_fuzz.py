"""A small version of `python -m tests.fuzz`."""

from pathlib import Path

from tests.commands import Command
from tests.fuzz import Settings, fuzz


def fork_script(words: list[str], folder: Path, log: Path, minutes: float) -> int:
    """As `tests.fuzz.run_script`, without the time for imports."""
    done = Command(*words, cwd=folder, env={"COLUMNS": "10000"}).wait(60 * minutes)
    log.write_text(done.stdout + done.stderr)
    return done.returncode


def test_nothing_crashes_and_nothing_is_lost_unnamed(tmp_path):
    """Broken lines and broken videos, through training and evaluation."""
    outcomes = fuzz(Settings(lines=60, videos=14, seed=3, minutes=5), tmp_path, fork_script)
    for outcome in outcomes.values():
        assert outcome.faults == []
        assert outcome.refused + outcome.lost > 3 and outcome.used > 3
