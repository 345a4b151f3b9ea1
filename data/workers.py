"""How worker processes start: the loader's, those of curation, those that draw the world."""

import multiprocessing
import sys


def worker_context(module: str) -> multiprocessing.context.BaseContext:
    """Forked from a server that has loaded `module`, so that a new one is there at once. On macOS each starts by itself,
    since libraries of the system do not survive a fork."""
    if sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context
