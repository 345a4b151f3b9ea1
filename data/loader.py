"""The loader: an endless, seeded stream of examples that no clip can stop, and that continues where it was left."""

import itertools
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pebble import ProcessExpired, ProcessPool

import vp
from data.clips import named
from data.examples import Preparation, prepare
from data.files import ClipError
from data.video import Clip
from data.workers import worker_context

_make: Callable | None = None  # of a worker process: sent once, not with every clip


def _start_worker(make: Callable) -> None:
    global _make
    torch.set_num_threads(1)
    _make = make


def _work(clip: Clip, seed: Sequence[int]) -> bytes:
    # Plain bytes, not shared memory: nothing that a killed worker still owns is left in the parent. And
    # errors in words: an exception of a library may not survive the way there.
    with named(clip):
        return pickle.dumps(_make(clip, seed=seed), pickle.HIGHEST_PROTOCOL)


@dataclass
class Taken:
    """An example, the index of its clip, and how far the order of clips was used up when it was taken."""

    index: int
    example: vp.Example
    place: int


class ClipLoader:
    """An endless, seeded stream of examples that survives every clip, and continues where it stopped.

    Worker processes read ahead (0: none, in this process), and make of each clip what `make` does (clip,
    preparation, seed; default: an example). A clip that raises, that kills its worker, or that takes longer
    than time_limit seconds (the worker is killed) is skipped for good: `skipped` maps its index to the
    reason. When more than max_bad_share of the clips are lost, the stream raises ClipError with the list.

    Training processes share the clips without repeats: of the one order that all know, process `rank` of
    `world_size` takes every world_size-th block of `block` clips. `position` is how far that order has been
    used up.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        preparation: Preparation,
        seed: int = 0,
        workers: int = 1,
        time_limit: float = 60.0,
        max_bad_share: float = 0.05,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        block: int = 1,
        make: Callable = prepare,
    ):
        self.rank, self.world_size, self.block = rank, world_size, block
        self.position = 0
        self.clips, self.seed, self.shuffle = clips, seed, shuffle
        self.make = partial(make, preparation=preparation)
        self.time_limit, self.max_bad_share, self.workers = time_limit, max_bad_share, workers
        self.skipped: dict[int, str] = {}
        self.pool = None
        self.stream: Iterator | None = None  # of `take`

    def start(self) -> None:
        """Start the workers, if there are any, ahead of the first clip."""
        if self.workers and self.pool is None:
            context = worker_context("data.loader")
            self.pool = ProcessPool(self.workers, initializer=_start_worker, initargs=(self.make,), context=context)

    def state(self) -> dict:
        """What `restore` needs to continue after the last example."""
        return {"position": self.position, "skipped": dict(self.skipped)}

    def restore(self, state: dict) -> None:
        """Continue where a loader of the same clips, seed and share stopped; JSON in between does no harm."""
        self.position = state["position"]
        self.skipped = {int(index): reason for index, reason in state["skipped"].items()}

    def __enter__(self) -> "ClipLoader":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()
            self.pool = None

    def order(self) -> Iterator[tuple[int, int]]:
        """(epoch, clip index) without end, every clip once an epoch."""
        for epoch in itertools.count():
            if len(self.skipped) == len(self.clips):  # nothing is left, or there was nothing
                return
            indices = np.arange(len(self.clips))
            if self.shuffle:
                np.random.default_rng([self.seed, epoch]).shuffle(indices)
            yield from ((epoch, int(i)) for i in indices)

    def examples(self, epochs: int | None = None) -> Iterator[tuple[int, vp.Example]]:
        """(clip index, example), in an order that depends on the seed alone. Raises ClipError when too many
        are lost, or, without a number of epochs, when none is left."""
        self.start()
        draws = self.order() if epochs is None else itertools.takewhile(lambda d: d[0] < epochs, self.order())
        mine = (
            (place, *draw)
            for place, draw in enumerate(draws)
            if place >= self.position and place // self.block % self.world_size == self.rank
        )
        ahead: deque = deque()
        while True:
            while len(ahead) < max(1, 8 * self.workers) and (draw := next(mine, None)) is not None:
                place, epoch, index = draw
                if index not in self.skipped:
                    ahead.append((place, index, self.submit(epoch, index)))
            if not ahead:
                if epochs is None:
                    listed = "".join(f"\n  {reason}" for reason in self.skipped.values())
                    raise ClipError(f"none of {len(self.clips)} clips can be used:{listed}")
                return
            place, index, result = ahead.popleft()
            self.position = place + 1
            if index in self.skipped:
                continue
            clip, example = self.clips[index], None
            try:
                with named(clip):
                    try:
                        example = result()
                    except TimeoutError:
                        hung = f"the decoder hung for {self.time_limit:g} s and was stopped"
                        raise ClipError(f"{clip.where}: {clip.video}: {hung}") from None
                    except ProcessExpired as error:
                        crashed = f"the decoder crashed (exit code {error.exitcode})"
                        raise ClipError(f"{clip.where}: {clip.video}: {crashed}") from None
            except ClipError as error:
                self.skip(index, str(error))
            else:
                yield index, example

    def take(self, count: int) -> list["Taken"]:
        """The next `count` examples. Raises ClipError, see `examples`."""
        if self.stream is None:
            self.stream = self.examples()
        return [Taken(*next(self.stream), self.position) for _ in range(count)]

    def submit(self, epoch: int, index: int):
        """A function that gives the example, being made by a worker or, without workers, when it is called."""
        seed = (self.seed, epoch, index)
        if self.pool is None:
            return lambda: self.make(self.clips[index], seed=seed)
        future = self.pool.schedule(_work, args=(self.clips[index], seed), timeout=self.time_limit)
        return lambda: pickle.loads(future.result())

    def skip(self, index: int, reason: str) -> None:
        """Note a lost clip; too many of them end the run."""
        self.skipped[index] = reason
        if len(self.skipped) * self.world_size > self.max_bad_share * len(self.clips):
            listed = "\n  ".join(self.skipped.values())
            raise ClipError(
                f"{len(self.skipped)} of {len(self.clips)} clips cannot be used, more than the allowed share of "
                f"{self.max_bad_share:g} (max_bad_share):\n  {listed}"
            )
