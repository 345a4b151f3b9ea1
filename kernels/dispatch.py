"""Which path a call takes: a Triton kernel if the tensors are on a GPU, else the eager reference."""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # an installation for the CPU may lack Triton: the kernels are then plain functions that nobody calls

    class _Absent:
        jit = staticmethod(lambda function=None, **_: function or (lambda kernel: kernel))
        constexpr = object

    triton = tl = _Absent

HAS_TRITON = hasattr(triton, "cdiv")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels then run on the CPU, slowly: for tests only
# VIDEOPERCEIVER_KERNELS=0 takes the references on a GPU, too; 1 the kernels under the interpreter, too.
FORCED = {"": None, "0": False, "1": True}.get(ASKED := os.environ.get("VIDEOPERCEIVER_KERNELS", ""), ASKED)
if FORCED is ASKED:
    raise ValueError(f"VIDEOPERCEIVER_KERNELS: got {ASKED!r}; give 0 (references), 1 (kernels) or nothing (by the device)")


REPLACED: dict[str, str] = {}  # kernels that are not to be taken on this machine, and why; see kernels/check.py


def takes_kernel(use_kernel: bool | None, *tensors: Tensor | None, name: str = "") -> bool:
    """Whether a call takes the kernel: None takes it if all tensors are on a GPU that the tiles fit on, and it can.

    use_kernel False never does, True always does and fails loudly if it cannot. float64 has no kernel. If
    VIDEOPERCEIVER_KERNELS is 0 or 1, it takes the place of None. name: of the kernel, for REPLACED.
    """
    # An optional tensor, such as the twin's, may be None.
    tensors = [x for x in tensors if x is not None]
    use_kernel = FORCED if use_kernel is None else use_kernel
    able = HAS_TRITON and all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in tensors)
    if use_kernel is None:
        return able and not INTERPRETED and name not in REPLACED and all(fits(x.device) for x in tensors)
    # Asked for and impossible: an error, since a silent fallback would be measured as the kernel.
    if use_kernel and not (able and (INTERPRETED or all(x.is_cuda for x in tensors))):
        raise ValueError("use_kernel: got True; it needs Triton, a GPU (or TRITON_INTERPRET=1) and 16 or 32 bit floats")
    return use_kernel


def fits(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU from Ampere on: others may have too little shared memory for the tiles."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def num_programs(device: torch.device) -> int:
    """How many programs of a kernel fill the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; at least 1, so that a grid is never empty."""
    return max(1, -(-a // b))
