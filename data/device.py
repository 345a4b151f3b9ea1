"""The device: which one there is, what it computes in, copies to it, and the time on its clock.

The host runs ahead of a GPU: it hands over work and goes on. Where it reads a result, or copies from memory that is not
pinned, it waits until the device has done everything so far, and the device has nothing to do when it starts again. So
nothing here waits that need not; tests/test_pretend_gpu.py counts what does.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")  # a dataclass


def best_device() -> torch.device:
    """The GPU, if torch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """What products are computed in: bfloat16 on a GPU, float32 on a CPU and on NVIDIA cards before Ampere.

    Those (V100, T4, RTX 20) only emulate bfloat16, and have no kernel of ours or of flash-attn.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float32
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def autocast(device: torch.device) -> AbstractContextManager:
    """Products in `compute_dtype`, whatever the weights are held in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on another device. Nobody waits for a copy to a GPU; one to the host is read at once, so it waits."""
    kind = torch.device(device).type
    if kind == "cuda" and not x.is_cuda:
        x = x.pin_memory()  # from other memory a copy is made in two steps, and the first of them waits
    return x.to(device, non_blocking=kind != "cpu")


def to_host(records: Sequence[Record]) -> list[Record]:
    """Records whose fields are all tensors of one dtype, on the CPU: one copy for all, since the host waits for each."""
    # Every field of every record in one row of numbers, and back in the same order.
    parts = [x for record in records for x in vars(record).values()]
    if not parts:
        return []
    read = iter(torch.cat([x.flatten() for x in parts]).cpu().split([x.numel() for x in parts]))
    return [replace(record, **{name: next(read).view_as(x) for name, x in vars(record).items()}) for record in records]


def wait_and_time(device: torch.device) -> float:
    """Seconds on the clock when the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


class Clock:
    """When the device reached each part of a piece of work. It is told to note the time, and nobody waits for it."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []
        self.mark("")

    def mark(self, part: str) -> None:
        """Note that a part ends here."""
        now = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((part, now))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, in all. Waits for the device to come to the end, as it has when its results were read."""
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before), (part, now) in pairwise(self.marks):
            if part:  # what has no name is the time between two pieces of work
                seconds = before.elapsed_time(now) / 1e3 if self.on_gpu else now - before
                found[part] = found.get(part, 0.0) + seconds
        return found

    @staticmethod
    def join(clocks: Sequence["Clock"]) -> "Clock":
        """One for several pieces of work, in their order."""
        joined = copy(clocks[0])
        joined.marks = [mark for clock in clocks for mark in clock.marks]
        return joined
