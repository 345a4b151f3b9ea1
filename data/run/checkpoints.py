"""Checkpoints: whole or not there at all, found again by the next run, and loadable by plain transformers.

    runs/sft/checkpoint -> checkpoint-001000      the newest whole one
        config.json, model.safetensors, ...       an ordinary Hugging Face directory, adapters merged
        adapter/                                  the LoRA adapter in peft's format, if there is one
        heads.safetensors                         the contrastive heads of stage 1
        state/                                    what `--resume` needs: optimizer.safetensors, state.json
        files.json                                size and checksum of every file above

During a run with adapters its checkpoints hold the adapter alone; the last one is merged.
"""

import base64
import json
import os
import random
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.markup import escape
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from data.loader import ClipLoader
from data.run import models
from data.run.merge import save_model
from data.run.processes import gather
from data.run.settings import changed_settings

if TYPE_CHECKING:
    from data.run.run import Run


def checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file below a folder, but for files.json."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "files.json"):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        found[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return found


@contextmanager
def whole_or_nothing(folder: Path, step: int, keep: int = 2) -> Iterator[Path]:
    """A folder to write a checkpoint into; it becomes `folder`/checkpoint-STEP when it is whole, and not before.

    Then `folder`/checkpoint points at it, and all but it and the `keep` - 1 before it are dropped. Where
    writing fails, such as on a full disk, what was written is taken away, older ones stay, and ValueError
    says what happened.
    """
    final, partial = folder / f"checkpoint-{step:06d}", folder / f".partial-{step:06d}"
    for left_over in folder.glob(".partial-*"):
        shutil.rmtree(left_over)
    try:
        partial.mkdir(parents=True)
        yield partial
        (partial / "files.json").write_text(json.dumps(checksums(partial), indent=0) + "\n")
        for path in [*partial.rglob("*"), partial]:  # on the disk before the name is: a power cut leaves no empty file
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        last = newest_checkpoint(folder)[0]
        raise ValueError(
            f"{final} could not be saved ({error}); {free:.0f} MiB are free on that disk. "
            + (f"The checkpoint before, {last}, is whole: free some space and continue with --resume" if last else "")
        ) from error
    if final.exists():  # saved a second time, merged: out of the way, and dropped when the new one is in its place
        os.replace(final, folder / f".partial-old-{step:06d}")
    os.replace(partial, final)
    shutil.rmtree(folder / f".partial-old-{step:06d}", ignore_errors=True)
    link = folder / f".checkpoint-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, folder / "checkpoint")  # from one whole checkpoint to the next in a single step
    older = [path for path in checkpoints(folder) if path.name < final.name]
    for old in checkpoints(folder):
        if old != final and old not in older[: keep - 1]:  # what counts further is damaged, or of a run before this one
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted(Path(folder).glob("checkpoint-" + "[0-9]" * 6), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, or None, and a message for every broken one that was passed over."""
    broken = []
    for path in checkpoints(folder):
        try:
            promised, found = json.loads((path / "files.json").read_text()), checksums(path)
        except (OSError, ValueError) as error:
            broken.append(f"{path}: {error}")
            continue
        wrong = [name for name in promised if found.get(name) != promised[name]]
        if not wrong:
            return path, broken
        broken.append(f"{path}: damaged or missing: {', '.join(wrong[:3])}")
    return None, broken


# --- What --resume needs besides the weights ------------------------------------------------------------------------------


def random_states() -> dict:
    """All random states of this process, as JSON can hold them."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {"python": [version, list(numbers), gauss], "numpy": [name, keys.tolist(), *rest]}
    state["torch"] = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    if torch.cuda.is_available():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def set_random_states(state: dict) -> None:
    """The reverse of `random_states`."""

    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state((state["numpy"][0], np.array(state["numpy"][1], np.uint32), *state["numpy"][2:]))
    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name, whole, on the CPU. Every process of a sharded run must call
    it; the first gets them."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=whole).get("state", {})
    return {f"{name}/{key}": value for name, values in state.items() for key, value in values.items()}


def set_optimizer(model: nn.Module, optimizer, schedule, tensors: dict[str, Tensor], schedule_state: dict) -> None:
    """The reverse of `optimizer_tensors`, sharded like the parameters; and the learning rate where its schedule was."""
    for name, parameter in model.named_parameters():
        own = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
        for key, value in own.items():
            value = value.to(parameter.device)
            if isinstance(parameter, DTensor) and value.dim():
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = value
    schedule.load_state_dict(schedule_state)
    for settings, learning_rate in zip(optimizer.param_groups, schedule.get_last_lr()):
        settings["lr"] = learning_rate


def save_state(partial: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Write state/: the optimizer's tensors, and everything else as JSON."""
    (partial / "state").mkdir()
    save_file(tensors, partial / "state/optimizer.safetensors")
    (partial / "state/state.json").write_text(json.dumps(state, default=str) + "\n")


def load_state(checkpoint: Path) -> tuple[dict[str, Tensor], dict]:
    """Read state/ again. Raises ValueError if the checkpoint has none."""
    if not (checkpoint / "state/state.json").exists():
        raise ValueError(
            f"{checkpoint} has no state/ to resume from; start a new run from its weights: --model {checkpoint}"
        )
    state = json.loads((checkpoint / "state/state.json").read_text())
    return load_file(checkpoint / "state/optimizer.safetensors"), state


# --- A run: resume, save -------------------------------------------------------------------------------------------------


@dataclass
class Resumed:
    """Where a run continues. path: the checkpoint, None if the run starts; step: that it was saved after;
    tensors: the optimizer's; state: everything else that was saved; notes: what to tell about the search."""

    path: Path | None = None
    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def resume(settings, free: Sequence[str], num_processes: int) -> Resumed:
    """Find where a run continues, if it is asked to. free: settings that may differ from those it was begun with.

    Raises ValueError, naming what differs, if the checkpoint is of another run: settings, annotation file, processes.
    """
    if not settings.resume:
        return Resumed()
    path, broken = newest_checkpoint(settings.out)
    notes = [f"[yellow]checkpoint passed over[/] {escape(problem)}" for problem in broken]
    if path is None:
        return Resumed(notes=[*notes, f"no checkpoint in {escape(str(settings.out))}: started anew"])
    tensors, state = load_state(path)
    changed = changed_settings(settings, state["settings"], free)
    if state["annotations"] != zlib.crc32(Path(settings.data).read_bytes()):
        changed.append(f"{settings.data} has changed")
    if state["num_processes"] != num_processes:
        changed.append(f"it ran in {state['num_processes']} process(es), not {num_processes}, which share its clips")
    if changed:
        raise ValueError(f"--resume: {path} is of a run with other settings:\n  " + "\n  ".join(changed))
    return Resumed(path, state["step"], tensors, state, [*notes, f"resumed from {escape(str(path))}"])


def restore(resumed: Resumed, lm: nn.Module, optimizer, schedule, loader: ClipLoader, rank: int) -> dict:
    """Put optimizer, schedule, loader and random states where they were; returns all that this process had saved."""
    mine = resumed.state["processes"][rank]
    set_optimizer(lm, optimizer, schedule, resumed.tensors, resumed.state["schedule"])
    loader.restore(mine["loader"])
    set_random_states(mine["random"])
    return mine


@dataclass
class Saver:
    """Writes the checkpoints of a run: all that one holds."""

    run: "Run"
    lm: nn.Module
    processor: object
    optimizer: torch.optim.Optimizer
    schedule: object

    def save(self, step: int, merged: bool) -> None:
        """Write a checkpoint, adapters merged or not. Every process must call it; the main one writes.

        Contrastive heads are written if they are trained.
        """
        run, settings = self.run, self.run.settings
        # How fast this process was says nothing of the one that continues.
        metrics = [{n: v for n, v in r.items() if not n.startswith("perf/")} for r in run.metrics.numbers()]
        mine = {"loader": run.loader_state, "metrics": metrics, "random": random_states()}
        every_process = gather([mine], run.peers)
        tensors, weights = optimizer_tensors(self.lm, self.optimizer), models.whole_state(self.lm)
        if run.is_main:
            state = {"step": step, "settings": vars(settings), "schedule": self.schedule.state_dict()}
            state |= {"processes": every_process, "num_processes": run.num_processes}
            state |= {"annotations": zlib.crc32(Path(settings.data).read_bytes())}
            with whole_or_nothing(settings.out, step) as partial:
                save_model(partial, self.lm.hf, self.processor, merged, state=models.part(weights, "hf."))
                if self.lm.heads.log_temperature.requires_grad:
                    save_file(models.part(weights, "heads."), partial / "heads.safetensors")
                save_state(partial, tensors, state | run.state())
        if run.peers is not None:
            torch.distributed.barrier(run.peers)

    def rescue(self) -> bool:
        """After an error in the middle of a step: save what the steps before it learned, if there are any."""
        self.optimizer.zero_grad()
        if self.run.step - 1 <= self.run.resumed.step:
            return False
        self.save(self.run.step - 1, merged=True)
        return True
