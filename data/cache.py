"""A cache of what was decoded and found for a clip, so that the next epoch reads it instead of decoding again.

    --cache DIR

One safetensors file a clip, called by a hash of the video's content, of the part that the clip is of, and of all settings
that its frames depend on: another setting is another file, and nothing is ever out of date. A file is written whole or not
at all; one that cannot be read is made again. Delete the folder at any time.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import write_whole
from data.look import Look
from data.video import Clip, Frames, list_frames

VERSION = 1  # of what a file holds; raise it with every change of how frames are chosen, read or made small


def content_hash(path: Path, folder: Path) -> str:
    """A hash of a video's bytes. It is noted in `folder`, by path, size and time, so that a file is hashed once."""
    files = list_frames(path) if path.is_dir() else [path]
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    note = folder / "content" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    if note.exists() and len(known := note.read_text()) == 64:
        return known
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    note.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, digest.hexdigest())
    return digest.hexdigest()


def cached(folder: Path, clip: Clip, settings: object, make: Callable[[], Look]) -> Look:
    """What `make` returns, from the cache if it is there. settings: all that it depends on besides the clip's part."""
    about = [VERSION, content_hash(clip.video, folder), clip.start, clip.end, clip.frames_per_second, settings]
    name = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode()).hexdigest()
    path = folder / name[:2] / f"{name}.safetensors"
    try:
        return read_look(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there, not whole, or another's
        found = make()
        write_look(path, found)
        return found


def write_look(path: Path, look: Look) -> None:
    """Write a look, without its curve, in one piece."""
    tensors = {f"run {i}": frames.pixels.contiguous() for i, frames in enumerate(look.runs)}
    tensors |= {name: getattr(look, name) for name in ("windows", "slots") if getattr(look, name) is not None}
    runs = [{k: v for k, v in asdict(frames).items() if k != "pixels"} for frames in look.runs]
    about = {"runs": runs, "last": look.last, "spans": look.spans, "sized": look.sized, "note": look.note}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, partial, {"look": json.dumps(about)})
    os.replace(partial, path)


def read_look(path: Path) -> Look:
    """What `write_look` wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["look"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    runs = [Frames(tensors[f"run {i}"], **run) for i, run in enumerate(about.pop("runs"))]
    return Look(runs, tensors.get("windows"), slots=tensors.get("slots"), **about)
