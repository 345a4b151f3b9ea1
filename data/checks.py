"""Numbers among settings that cannot be: refused before anything is loaded, by their flag, with what to give."""

import math


def flag(name: str) -> str:
    """The command-line flag of a field, for messages.

    >>> flag("max_frames")
    '--max-frames'
    """
    return f"--{name.replace('_', '-')}"


def check_above_zero(settings: object, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is given and not above 0 (NaN and infinity are not)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag(name)}: got {value}; give a number above 0")


def check_within(settings: object, least: float, most: float, *names: str) -> None:
    """Raise ValueError for the first of the named fields that is given and not within these (NaN and infinity are not)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (least <= value <= most and value < math.inf):
            allowed = f"{least:g} to {most:.10g}" if most < math.inf else f"{least:g} or more"
            raise ValueError(f"{flag(name)}: got {value}; give {allowed}")


def check_limit(settings: object, name: str) -> None:
    """Raise ValueError if the named field, the first so many of something, is neither above 0 nor -1."""
    value = getattr(settings, name)
    if value < 1 and value != -1:
        raise ValueError(f"{flag(name)}: got {value}; give a number above 0, or -1 for all")
