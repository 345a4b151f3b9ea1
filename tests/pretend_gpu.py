"""A pretend GPU for machines without one: tensors that say they are on a device of their own, and compute on the CPU.

What a GPU refuses is refused: an operator on tensors of two devices, a tensor of the device as a numpy array. What makes
the host wait for a GPU is counted, and what reads a copy before it has arrived, each with the line that did it:

    gpu = pretend_gpu.device()                  # torch.device("gpu:0")
    with pretend_gpu.watch() as seen:
        ...
    seen.waits, seen.races                      # Counter: line -> how often
    seen.peak                                   # the most bytes that were alive on the device, above those at the start

With `pretend_gpu.sizes_only()` floating-point tensors have a size and no content, so that a step of a model of seven
billion weights runs in seconds and in no memory, and `peak` says what it would take.

It is a device of torch's own Python backend (PrivateUse1). A device cannot be unregistered, so a test that needs one runs
in a process of its own.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = str(Path(__file__).resolve().parents[1])


@dataclass
class Seen:
    """What was seen on the device. waits, races: line -> how often; peak: bytes above those alive at the start."""

    waits: Counter = field(default_factory=Counter)
    races: Counter = field(default_factory=Counter)
    start: int = 0
    highest: int = 0
    at_peak: Counter = field(default_factory=Counter)  # line -> bytes, of what was alive at the peak

    @property
    def peak(self) -> int:
        """The most bytes that were alive at the same time, above those at the start."""
        return self.highest - self.start

    def table(self) -> str:
        """All waits, the commonest first."""
        return "\n".join(f"{count:5d}  {line}" for line, count in self.waits.most_common())


@dataclass
class _Device:
    """seen: where to note; alive: bytes on the device, storages: of each, made_by: by the line that made them."""

    ready: bool = False
    sizes_only: bool = False
    seen: Seen | None = None
    alive: int = 0
    storages: dict[int, int] = field(default_factory=dict)
    made_by: Counter = field(default_factory=Counter)


_device = _Device()


# --- The device --------------------------------------------------------------------------------------------------------


class _Backend(_DummyBackendModule):
    """What torch asks a device's module for: `torch.gpu`."""

    def synchronize(self, device=None) -> None:
        note("waits", "synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_) -> None:
        pass


# What CUDA's autocast runs in the lower precision, as far as these models use it.
AUTOCAST = ("linear", "matmul", "mm", "bmm", "addmm", "conv3d", "scaled_dot_product_attention")
_kept = []  # libraries live as long as they are referred to


def device() -> torch.device:
    """The device; registered at the first call, together with its autocast. Backward passes run in the calling thread."""
    if not _device.ready:
        _setup_privateuseone_for_python_backend("gpu", _Backend())
        torch._C._set_only_lift_cpu_tensors(True)
        torch.autograd.set_multithreading_enabled(False)
        _register_autocast()
        # Tensors of inference mode have no views here. Without it no graph is kept, either.
        torch.inference_mode.__enter__, torch.inference_mode.__exit__ = _enter_no_grad, _exit_no_grad
        _Mode().__enter__()
        _device.ready = True
    return torch.device("gpu:0")


def _enter_no_grad(self) -> None:
    self.grad_before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)


def _exit_no_grad(self, *_) -> None:
    torch._C._set_grad_enabled(self.grad_before)


def _register_autocast() -> None:
    """Products under torch.autocast("gpu") compute in its dtype; everything else as without it."""
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    products = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lower(op):
        def compute(*args, **more):
            with torch._C._ExcludeDispatchKeyGuard(keys):
                dtype = torch.get_autocast_dtype("gpu")
                args, more = tree_map_only(
                    Tensor, lambda x: x.to(dtype) if x.dtype == torch.float32 else x, (args, more)
                )  # fmt: skip
                return op(*args, **more)

        return compute

    for name in AUTOCAST:
        products.impl(name, lower(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    _kept.extend([rest, products])


class PretendTensor(Tensor):
    """A tensor of the device; `raw` is the CPU's tensor that it computes with, or one without content."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=torch.device("gpu:0"), requires_grad=False,
        )  # fmt: skip

    def __init__(self, raw: Tensor):
        self.raw = raw

    def __repr__(self) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        note("waits", "tolist")
        return self.raw.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Catches what no argument tells of: factories with device="gpu"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def of_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the device that has a size and no content."""
    return _wrap(torch.empty(shape, dtype=dtype, device="meta"))


# --- Notes -------------------------------------------------------------------------------------------------------------


@contextmanager
def watch() -> Iterator[Seen]:
    """Note what happens on the device inside."""
    before, seen = _device.seen, Seen(start=_device.alive, highest=_device.alive)
    _device.seen = seen
    try:
        yield seen
    finally:
        _device.seen = before


def see(seen: Seen) -> None:
    """Note in `seen` from here on, until the `watch` around it ends."""
    _device.seen = seen


def seeing() -> Seen:
    """Where what happens is noted."""
    return _device.seen


@contextmanager
def sizes_only() -> Iterator[None]:
    """Inside, what is made on the device of floating-point numbers has a size and no content; integers are real."""
    _device.sizes_only = True
    try:
        yield
    finally:
        _device.sizes_only = False


def where() -> str:
    """The innermost line of the project that is running, and, if a library was called from there, its innermost line."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        ours = name.startswith(ROOT) and "site-packages" not in name
        if not name.startswith("<") and "/torch/" not in name and name != __file__:
            line = f"{name.split('site-packages/')[-1].removeprefix(ROOT + '/')}:{frame.f_lineno}"
            if ours:
                return f"{line} {frame.f_code.co_name}" + (f" > {library}" if library else "")
            library = library or line
        frame = frame.f_back
    return library or "?"


def note(what: str, kind: str) -> None:
    """Count a wait or a race, with its line."""
    if _device.seen is not None:
        getattr(_device.seen, what)[f"{kind}: {where()}"] += 1


def _track(raw: Tensor) -> None:
    """Count the bytes of a tensor's storage until it is gone."""
    storage = raw.untyped_storage()
    if storage._cdata in _device.storages:
        return
    key, size, line = storage._cdata, storage.nbytes(), where() if _device.sizes_only else ""
    _device.storages[key] = size
    _device.alive += size
    _device.made_by[line] += size
    weakref.finalize(storage, _forget, key, size, line)
    raw._storage_kept = storage  # the Python object of a storage lives as long as its tensor
    if _device.seen is not None and _device.alive > _device.seen.highest:
        _device.seen.highest, _device.seen.at_peak = _device.alive, Counter(_device.made_by) if line else Counter()


def _forget(key: int, size: int, line: str) -> None:
    if _device.storages.pop(key, None) is not None:
        _device.alive -= size
        _device.made_by[line] -= size


# --- Operators ---------------------------------------------------------------------------------------------------------

# The size of what they return, or a number of the host, depends on the contents.
WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero",
}  # fmt: skip
# Operators that take tensors of two devices.
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
TWO_DEVICES = INDEXING | {
    "aten::copy_", "aten::_to_copy", "aten::set_", "aten::lift_fresh", "aten::_has_compatible_shallow_copy_type",
    "prim::device", "aten::is_same_size", "aten::_pin_memory", "aten::is_pinned",
}  # fmt: skip


def _on_device(place: object) -> bool:
    return place is not None and torch.device(place).type == "gpu"


def _wrap(x: Tensor) -> Tensor:
    if isinstance(x, PretendTensor):
        return x
    _track(x)
    return PretendTensor(x)


def _run(func, args: tuple, kwargs: dict):
    """One operator: refused, counted, and computed on the CPU."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, PretendTensor)]
    target = kwargs.get("device")
    if not on_gpu and not _on_device(target):
        return func(*args, **kwargs)
    if name == "prim::device":
        return torch.device("gpu:0")
    elsewhere = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0 and x.device.type != "meta"]
    if on_gpu and elsewhere and name not in TWO_DEVICES:
        shapes = [(tuple(x.shape), "gpu" if isinstance(x, PretendTensor) else "cpu") for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found gpu:0 and cpu: {name} {shapes}")
    result_on_gpu = _note_operator(name, func._overloadname, args, kwargs)

    plain = dict(kwargs)
    if target is not None:
        plain["device"] = torch.device("cpu")
    plain_args, plain = tree_map_only(PretendTensor, lambda x: x.raw, (args, plain))
    if name == "aten::_to_copy":
        plain.pop("non_blocking", None)
    if _device.sizes_only:
        plain_args, plain = _without_content(name, plain_args, plain)
    result = func(*plain_args, **plain)
    if not result_on_gpu:
        return result
    result = tree_map_only(Tensor, _wrap, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if on_gpu else result


def _note_operator(name: str, overload: str, args: tuple, kwargs: dict) -> bool:
    """Note what an operator would cost the host. Returns whether its result is on the device."""
    if name == "aten::_to_copy" or name == "aten::copy_":
        if name == "aten::copy_":
            onto, source = args[:2]
            to_gpu = isinstance(onto, PretendTensor)
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source, target = args[0], kwargs.get("device")
            to_gpu = isinstance(source, PretendTensor) if target is None else _on_device(target)
            non_blocking = kwargs.get("non_blocking", False)
        from_gpu = isinstance(source, PretendTensor)
        if from_gpu and not to_gpu:
            note(*(("races", "read before it has arrived") if non_blocking else ("waits", "copy to the host")))
        elif to_gpu and not from_gpu and not non_blocking and source.dim() > 0:
            note("waits", "blocking copy to the device")
        return to_gpu
    if name in INDEXING:
        indices = [i for i in args[1] if i is not None]
        if not isinstance(args[0], PretendTensor) and any(isinstance(i, PretendTensor) for i in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(not isinstance(i, PretendTensor) for i in indices):
            note("waits", "index copied to the device")
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            note("waits", "boolean index")
    elif name == "aten::repeat_interleave" and overload == "Tensor" and kwargs.get("output_size") is None:
        note("waits", "size depends on the content")
    elif name in WAITING:
        note("waits", "item()" if "scalar" in name else "size depends on the content")
    return True


def _without_content(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments on the meta device, if a floating-point tensor is among them or is made."""

    def to_meta(x: Tensor) -> Tensor:
        same = x.device.type == "meta"
        return x if same else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    made = not tensors or name == "aten::_to_copy"
    usual = torch.long if name == "aten::arange" else torch.get_default_dtype()
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else usual)
    large = not tensors or tensors[0].numel() > 4096  # a few numbers may be read
    if any(x.device.type == "meta" for x in tensors) or (made and dtype.is_floating_point and large):
        args, kwargs = tree_map_only(Tensor, to_meta, (args, kwargs))
        if "device" in kwargs or not tensors:
            kwargs["device"] = torch.device("meta")
    return args, kwargs
