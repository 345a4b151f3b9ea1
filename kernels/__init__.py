"""Triton kernels for what no library has. One file per kernel: reference, kernel, autograd, public function.

The package index has a package of the same name, which transformers and bitsandbytes import if it is installed. Ours,
first on sys.path, hides it; so a name that is not ours is looked up in that package, and is missing only if it is absent.
"""

import importlib.util
import logging
import sys
from pathlib import Path

# Without that package bitsandbytes warns on every start, on some CPUs, that a kernel of it cannot be loaded.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _load_hub_package():
    ours = Path(__file__).resolve().parent
    for entry in sys.path:
        theirs = Path(entry).resolve() / "kernels"
        if theirs != ours and (theirs / "__init__.py").is_file():
            __path__.append(str(theirs))  # its submodules, behind ours
            spec = importlib.util.spec_from_file_location(
                "kernels._hub", theirs / "__init__.py", submodule_search_locations=[str(theirs)]
            )
            module = sys.modules["kernels._hub"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return None


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    if "_hub" not in globals():
        globals()["_hub"] = _load_hub_package()
    if _hub is None or not hasattr(_hub, name):  # noqa: F821
        raise AttributeError(f"module 'kernels' has no attribute {name!r}, nor has the Hub's package of that name")
    return getattr(_hub, name)  # noqa: F821
