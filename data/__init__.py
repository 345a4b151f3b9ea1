"""Clips, models, runs, measuring. They look into models, so they refuse versions of transformers that nobody tried."""

import sys
from importlib.metadata import version
from types import TracebackType

OLDEST, NEWEST = (5, 18, 0), (5, 24, 0)  # transformers that the tests were run with; 6 and later are refused


def check_transformers(found: str) -> None:
    """Raise ImportError for a version that would do something else in silence, such as drop a video that is handed to it.

    >>> check_transformers("5.24.0"), check_transformers("5.30.1.dev0")
    (None, None)
    """
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST[:2] <= numbers < (OLDEST[0] + 1,):
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ImportError(
            f"transformers {found} does not fit this project, which was tested with {oldest} to {newest}: "
            f"pip install 'transformers>={oldest},<{OLDEST[0] + 1}'"
        )


def end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python does with an error that nobody caught, but for Ctrl-C: one word, in place of a page of library code."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly
check_transformers(version("transformers"))
