"""Clips, models, runs, measuring. They look into models, so they refuse versions of transformers that nobody tried."""

from importlib.metadata import version

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


check_transformers(version("transformers"))
