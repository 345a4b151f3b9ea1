"""The processes that share a run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data.device import best_device

T = TypeVar("T")


def start_processes(tracker: str | None = None, folder: Path | None = None) -> Accelerator:
    """This process among those that `torchrun` or `accelerate launch` started, or alone. Raises ValueError for a tracker
    that is not installed."""
    project = folder if tracker else None
    accelerator = Accelerator(cpu=best_device().type == "cpu", log_with=tracker, project_dir=project)
    if tracker and not accelerator.log_with:
        raise ValueError(f"--tracker {tracker}: it is not installed; pip install {tracker}")
    return accelerator


# Of waits between processes. One of them may save, merge or evaluate for hours; the backend of GPUs gives up after minutes.
PATIENCE = timedelta(days=7)


def new_peers(num_processes: int) -> dist.ProcessGroup | None:
    """All processes as a group of CPUs, None for one alone. Counts, records and long waits go through it: no device is
    waited for, none is given another's tensors, and nobody loses patience."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if num_processes > 1 else None


@contextmanager
def first_process_first(rank: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """The first process runs what is inside, then the others do."""
    if group is not None and rank > 0:
        dist.barrier(group)
    yield
    if group is not None and rank == 0:
        dist.barrier(group)


def gather(values: Sequence[T], group: dist.ProcessGroup | None) -> list[T]:
    """The values of all processes, in their order. Plain numbers and texts: a tensor would come with its device."""
    if group is None:
        return list(values)
    parts: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, list(values), group=group)
    return [value for part in parts for value in part]


def agree(values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
    """Sums over all processes, worked out on CPUs, so that nobody waits for a device. group: of gloo; None when alone."""
    if group is None:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Make the gradients those of all processes together; those of FSDP2 are it already, from the backward pass.

    By hand and once a step, not by DistributedDataParallel's hooks: processes may have no keyword, or no useful group of
    rollouts, in a step, and then touch other parameters, or fewer, than their peers. What no process has touched keeps no
    gradient, as with one process: zeros would age the optimizer's averages.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if group is None or not parameters:
        return
    touched = agree([float(p.grad is not None) for p in parameters], group)
    parameters = [p for p, count in zip(parameters, touched) if count]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
        work.wait()
    if parameters:
        torch._foreach_div_([p.grad for p in parameters], dist.get_world_size(group))


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients down to a norm of at most `largest`; returns the norm they had, on their device."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in (whole, sharded) if some
    ]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for some in (whole, sharded):
        torch.nn.utils.clip_grads_with_norm_(some, largest, norm)
    return norm


def finish_gradients(lm: nn.Module, grad_clip: float, group: dist.ProcessGroup | None) -> Tensor:
    """Average the gradients over processes and clip them; returns the norm that they had, on their device."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    average_gradients(trained, group)
    return clip_gradients(trained, grad_clip)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, checked: Tensor) -> Tensor:
    """Make a fused optimizer leave out its next step if `checked` is NaN or Inf; returns 1 if so, else 0, on the device."""
    optimizer.found_inf = 1.0 - torch.isfinite(checked).float()
    return optimizer.found_inf
