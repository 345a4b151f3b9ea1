"""Fingerprints of clips: a hash of the file, and of the pictures, by which the same clip is found again."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from data.video import Clip, list_frames


def difference_hash(picture: Tensor) -> int:
    """64 bits that say, in a grid of 8 by 8, where a picture (C, H, W) grows darker to the right, by more than noise."""
    small = F.interpolate(picture.mean(0)[None, None], size=(8, 9), mode="area")[0, 0]
    bits = (small[:, 1:] < small[:, :-1] - 3).flatten().tolist()
    return sum(bit << i for i, bit in enumerate(bits))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the numbered pictures of a folder."""
    if path.is_dir():
        return hashlib.sha256("".join(file_hash(p) for p in list_frames(path)).encode()).hexdigest()
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(clip: Clip, pixels: Tensor) -> dict:
    """What tells that two clips are the same: file, part and pictures at a quarter, half and three quarters."""
    places = [len(pixels) * k // 4 for k in (1, 2, 3)]
    hashes = [f"{difference_hash(pixels[i]):016x}" for i in places]
    gray = F.interpolate(pixels[places].mean(1, keepdim=True), size=(16, 16), mode="area")
    pictures = gray.round().byte().numpy().tobytes().hex()
    return {"sha256": file_hash(clip.video), "hashes": hashes, "pictures": pictures}


class Seen:
    """Clips that were seen, found again by their pictures: perceptual hashes within a few bits, confirmed by thumbnails.

    Hashes alone would call two clips of one person before one wall the same.
    """

    def __init__(self, bits: int, largest: int = 12):
        self.bits, self.largest = bits, largest
        self.tables = [defaultdict(list) for _ in range(bits + 1)]

    def keys(self, middle: int) -> list[int]:
        """One of bits + 1 pieces must be equal where at most `bits` bits differ."""
        width = -(-64 // (self.bits + 1))
        return [(middle >> (width * i)) & ((1 << width) - 1) for i in range(self.bits + 1)]

    def find(self, about: dict) -> str | None:
        """The place of an earlier clip with the same pictures."""
        numbers, pictures = [int(h, 16) for h in about["hashes"]], bytes.fromhex(about["pictures"])
        for table, key in zip(self.tables, self.keys(numbers[1])):
            for place, other, thumbnails in table[key]:
                near = all((a ^ b).bit_count() <= self.bits for a, b in zip(numbers, other))
                if near and max(abs(a - b) for a, b in zip(pictures, thumbnails)) <= self.largest:
                    return place
        return None

    def add(self, about: dict, place: str) -> None:
        """Remember a clip."""
        numbers, pictures = [int(h, 16) for h in about["hashes"]], bytes.fromhex(about["pictures"])
        for table, key in zip(self.tables, self.keys(numbers[1])):
            table[key].append((place, numbers, pictures))


def plain_hash(hashes: Sequence[str]) -> bool:
    """Whether a picture has too little to tell it from others (black, white, a flat wall)."""
    return any(int(h, 16).bit_count() in (0, 64) for h in hashes)
