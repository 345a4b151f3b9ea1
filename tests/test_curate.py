"""Curation from end to end: nothing vanishes, nothing crashes, and a kill changes no byte."""

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torchcodec.encoders import VideoEncoder

from data import motion
from data.clips import load_clips
from data.curation import curate, inspection
from data.curation.page import group_of
from data.files import ClipError
from data.video import Clip, Frames
from data.world import SAME_BYTES, draw_clip
from tests.commands import Command, run
from tests.test_clips import write_video


def settings(captions: Path, out: Path, **more) -> curate.Settings:
    """Settings for a run in this process."""
    return curate.Settings(captions, out, **{"workers": 0, "samples": 2, "part_lines": 8} | more)


def curated(captions: Path, out: Path, **more) -> tuple[list[dict], list[dict]]:
    """The lines of clips.jsonl and rejected.jsonl."""
    curate.main(settings(captions, out, **more), Console(quiet=True))
    return [[json.loads(x) for x in (out / name).open()] for name in ("clips.jsonl", "rejected.jsonl")]


def world_lines(world: Path, count: int) -> list[dict]:
    """Annotation lines of the small world, without truth."""
    lines = [json.loads(x) for x in (world / "train.jsonl").open()][:count]
    return [{k: v for k, v in x.items() if k != "truth"} for x in lines]


def write(path: Path, lines: list) -> Path:
    """Write JSONL; texts as they stand."""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_every_line_is_kept_or_rejected_with_a_reason(world, tmp_path):
    """Good clips, and one of each fault: the reason is the right one, and kept lines load for training."""
    good = world_lines(world, 8)
    (world / "empty.mp4").write_bytes(b"")
    shutil.copy(world / good[1]["video"], world / "copy.mp4")
    frames = draw_clip("test", 3, quiet=0.0)[0]
    frames[:4] = frames[0]  # nothing happens in the first two slots
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    VideoEncoder(video, frame_rate=8).to_file(world / "still.mp4", crf=12, extra_options=SAME_BYTES)
    odd = {
        "malformed": "{not json",
        "unreadable": good[0] | {"video": "empty.mp4", "caption": "Something else vanishes: a cross."},
        "duplicate caption": good[2] | {"video": good[7]["video"], "caption": good[0]["caption"].upper()},
        "duplicate clip": good[1] | {"video": "copy.mp4", "caption": "Other words: it turns black."},
        "event fills the clip": good[3] | {"key_spans": [[0.0, 2.0]], "caption": "It vanishes all the time."},
        "twin looks like the full video": good[4]
        | {"video": "still.mp4", "key_spans": [[0.0, 0.1]], "caption": "It turns black."},
    }
    path = write(world / "odd.jsonl", [*good[:7], *odd.values()])
    clips, rejected = curated(path, tmp_path / "out")
    assert [x["caption"] for x in clips] == [x["caption"] for x in good[:7]]
    assert [x["reason"] for x in rejected] == list(odd) and [x["line"] for x in rejected] == list(range(8, 14))
    assert all(x["detail"] and x["reason"] in curate.REASONS for x in rejected)
    loaded, problems = load_clips(tmp_path / "out/clips.jsonl", world)
    assert len(loaded) == 7 and not problems and all(clip.key_spans for clip in loaded)


def test_keywords_come_from_the_caption_where_none_are_given(world, tmp_path):
    """Grammar names the event; a caption without one, or in another language, is rejected with that reason."""
    lines = [{k: v for k, v in x.items() if k != "keywords"} for x in world_lines(world, 3)]
    lines[0]["caption"] = "A blue cross stands beside a square. Suddenly the square turns black."
    lines[1]["caption"] = "There is a blue cross next to a square."
    lines[2]["caption"] = "Ein blaues Kreuz steht da, und das Quadrat ist mit einem Mal schwarz."
    clips, rejected = curated(write(world / "bare-captions.jsonl", lines), tmp_path / "out")
    assert [x["keywords"] for x in clips] == [["turns black"]]
    assert [x["reason"] for x in rejected] == ["no event in caption", "language"]


def test_a_models_free_text_never_becomes_a_keyword(world, tmp_path, qwen2_5):
    """--keywords model on random weights: its babble is rejected with the reason."""
    lines = [{k: v for k, v in x.items() if k != "keywords"} for x in world_lines(world, 2)]
    more = dict(keywords="model", model=str(qwen2_5), max_frames=16, fps=8.0)
    clips, rejected = curated(write(world / "ask.jsonl", lines), tmp_path / "out", **more)
    assert not clips and {x["reason"] for x in rejected} == {"no event in caption"}
    assert all("the answer is" in x["detail"] for x in rejected)


def test_limits(world, tmp_path):
    """Too short, too long, no event found: each by its own setting."""
    path = write(world / "some.jsonl", world_lines(world, 3))
    for name, reason, more in (("a", "too short", {"min_seconds": 5.0}), ("b", "too long", {"max_seconds": 1.5}),
                               ("c", "no event found", {"min_confidence": 1.1})):  # fmt: skip
        clips, rejected = curated(path, tmp_path / name, **more)
        assert not clips and {x["reason"] for x in rejected} == {reason}


def test_a_frozen_clip(tmp_path):
    """A video of one picture is named frozen."""
    picture = torch.randint(0, 255, (1, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    VideoEncoder(picture.repeat(24, 1, 1, 1), frame_rate=12).to_file(
        tmp_path / "still.mp4", crf=10, extra_options=SAME_BYTES
    )
    path = write(tmp_path / "c.jsonl", [{"video": "still.mp4", "caption": "It jumps.", "keywords": ["jumps"]}])
    assert curated(path, tmp_path / "out")[1][0]["reason"] == "frozen"


def test_test_sets_are_left_out_by_file_and_by_picture(world, tmp_path):
    """--exclude finds the same bytes, and the same pictures encoded anew."""
    from torchcodec.decoders import VideoDecoder

    lines = world_lines(world, 4)
    again = VideoDecoder(world / lines[2]["video"]).get_frames_in_range(0, 16).data
    VideoEncoder(again.contiguous(), frame_rate=8).to_file(world / "again.mp4", crf=24, extra_options=SAME_BYTES)
    tests = write(world / "benchmark.jsonl", [lines[0], lines[2] | {"video": "again.mp4"}])
    clips, rejected = curated(write(world / "four.jsonl", lines), tmp_path / "out", exclude=(tests,))
    assert [x["line"] for x in rejected] == [1, 3] and {x["reason"] for x in rejected} == {"in a test set"}
    assert len(clips) == 2


def test_the_draw_is_even_and_says_what_is_missing(world, tmp_path):
    """--target takes as many of each action as it can, the same ones each time; the rest is listed."""
    path = write(world / "many.jsonl", world_lines(world, 40))
    clips, rejected = curated(path, tmp_path / "a", target=16)
    again, _ = curated(path, tmp_path / "a", target=16)
    assert clips == again and len(clips) <= 16 and len(clips) + len(rejected) == 40
    counts = Counter(x["keywords"][0].split()[0] for x in clips)
    assert max(counts.values()) <= 16 // 5 + 2 and {x["reason"] for x in rejected} >= {"not drawn"}


@pytest.mark.parametrize("seed", range(5))
def test_quota_against_trying_all(seed):
    """The largest level that keeps the sum of capped groups at or under the target."""
    chooser = random.Random(seed)
    counts = Counter({f"a{i}": chooser.randrange(1, 30) for i in range(6)})
    for target in (1, 7, 40, 1000):
        best = max(n for n in range(0, 31) if sum(min(c, n) for c in counts.values()) <= target)
        assert curate.quota(counts, target) == min(best, max(counts.values()))


@pytest.mark.parametrize("bits", [0, 3])
def test_hash_index_finds_what_a_loop_finds(bits):
    """Pigeonhole pieces lose no neighbour, and thumbnails must agree."""
    chooser, seen, stored = random.Random(0), curate.Seen(bits), []
    for i in range(60):
        hashes = [chooser.getrandbits(64) for _ in range(3)]
        about = {"hashes": [f"{h:016x}" for h in hashes], "pictures": bytes([i] * 8).hex()}
        seen.add(about, str(i))
        stored.append(hashes)
    for i, hashes in enumerate(stored):
        for flips in range(6):
            near = [h ^ sum(1 << b for b in chooser.sample(range(64), flips)) for h in hashes]
            about = {"hashes": [f"{h:016x}" for h in near], "pictures": bytes([i + 5] * 8).hex()}
            assert seen.find(about) == (str(i) if flips <= bits else None)
        other = {"hashes": [f"{h:016x}" for h in hashes], "pictures": bytes([i + 100] * 8).hex()}
        assert seen.find(other) is None


def test_another_run_in_the_same_folder_is_refused(world, tmp_path):
    """Parts of different settings are never mixed."""
    path = write(world / "one.jsonl", world_lines(world, 2))
    curated(path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"fps was 12.0, is 6.0"):
        curated(path, tmp_path / "out", fps=6.0)
    path.write_text(path.read_text() + "\n{}")
    with pytest.raises(ValueError, match="input was"):
        curated(path, tmp_path / "out")


def test_report_is_one_page(world, tmp_path):
    """Counts, tables, sampled sheets with curves; nothing from outside; captions are text."""
    lines = world_lines(world, 6)
    lines[0]["caption"] = "A <script>alert(1)</script> vanishes."
    curated(write(world / "six.jsonl", lines), tmp_path / "out", samples=6)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<figure>") == 6 and page.count("data:image/png;base64") == 6 and page.count("<polyline") == 6
    assert "<b>6 kept</b>" in page and "http" not in page and "<script" not in page
    assert all(title in page for title in ("Duration", "Events a clip", "Share that is key", "Top actions", "Rejected"))


def test_group_of_counts_the_first_kept_keyword():
    """Quotas go by action and duration."""
    record = {"lemmas": ["jump", "fall"], "kept": [1], "duration": 4.0}
    assert group_of(record) == ("fall", "< 6 s")
    assert group_of(record | {"duration": 400.0})[1] == ">= 60 s"
    assert group_of(record | {"duration": 6.0})[1] == "< 12 s"  # the next group begins with its limit


# --- One clip, with pictures made by hand --------------------------------------------------------------------------


def scene(count: int = 32, bright: int = 255, first: int = 10, last: int = 16) -> Frames:
    """A still scene at eight frames a second in which a small square is `bright` from frame first up to last."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 160, (1, 3, 48, 64), generator=g, dtype=torch.uint8).repeat(count, 1, 1, 1)
    pixels[first:last, :, 10:22, 30:42] = bright
    return Frames(pixels, [i / 8 for i in range(count)], 8.0, count / 8)


@pytest.fixture
def look(monkeypatch, tmp_path):
    """look(frames, keywords, spans, models, **settings): the record that inspect makes of these frames."""
    (tmp_path / "any.mp4").write_bytes(b"any")

    def inspect(frames: Frames, keywords=("jumps",), spans=None, models=None, **more) -> dict:
        monkeypatch.setattr(inspection, "read_frames", lambda *_, **__: frames)
        clip = Clip(tmp_path / "any.mp4", "It jumps.", "c:1", keywords=list(keywords), key_spans=spans)
        return curate.inspect(clip, curate.Settings(Path("c.jsonl"), Path("out"), **more), models)

    return inspect


@pytest.mark.parametrize("bright, reason", [(113, "frozen"), (116, "no event found"), (140, None)])
def test_how_much_must_move(look, bright, reason):
    """A square that changes by 3 of 255 is frozen, by 6 it moves and is no event, by 30 it is one."""
    frames = scene()
    frames.pixels[:, :, 8:24, 28:44] = 110
    frames.pixels[10:16, :, 8:24, 28:44] = bright
    assert look(frames, min_confidence=0.4).get("rejected") == reason


@pytest.mark.parametrize("seconds, reason", [(0.9, "too short"), (1.0, None), (4.0, None), (4.1, "too long")])
def test_shortest_and_longest_clip(look, seconds, reason):
    """Both limits are still allowed."""
    frames = scene()
    frames.duration = seconds
    frames.timestamps = [seconds * i / 32 for i in range(32)]
    found = look(frames, spans=[[[0.3 * seconds, 0.5 * seconds]]], min_seconds=1.0, max_seconds=4.0)
    assert found.get("rejected") == reason


def test_every_keyword_gets_spans(look):
    """Two keywords, one finder without keywords of its own: the same curve and spans for both, both kept."""
    found = look(scene(), ("jumps", "lands"))
    assert found["kept"] == [0, 1] and len(found["curves"]) == 2
    assert found["key_spans"] == [[[1.25, 2.0]]] * 2


def test_given_spans_are_taken_as_they_are(look):
    """Wherever motion is: as given, sure, and both together make the share that is key."""
    found = look(scene(), ("jumps", "lands"), [[[1.0, 1.5]], [[1.3, 2.0], [3.0, 3.1]]])
    assert found["key_spans"] == [[[1.0, 1.5]], [[1.3, 2.0], [3.0, 3.1]]] and found["confidence"] == [1.0, 1.0]
    assert found["key_share"] == pytest.approx(5 / 16, abs=1e-4) and found["kept"] == [0, 1]
    still = look(scene(first=0, last=4), spans=[[[0.0, 0.5]]])  # where motion alone is not sure
    assert still["confidence"] == [1.0] and still["kept"] == [0]


@pytest.mark.parametrize("slots, reason", [(12, None), (13, "event fills the clip"), (16, "event fills the clip")])
def test_how_much_may_be_key(look, slots, reason):
    """Up to three quarters, with that as the limit; a clip that is nothing but key has no twin."""
    found = look(scene(), spans=[[[0.0, slots / 4]]], max_key_share=0.75)
    assert found["key_share"] == slots / 16 and found.get("rejected") == reason


@pytest.mark.parametrize("bright, change", [(110, None), (150, 40.0)])
def test_how_much_the_twin_differs(look, bright, change):
    """The largest change of a block between a key frame and what the twin shows in its place; under the limit: no twin."""
    frames = scene()
    frames.pixels[:, :, 8:24, 28:44] = 110
    frames.pixels[10:16, :, 8:24, 28:44] = bright
    frames.pixels[24:26] = 200  # elsewhere: not key
    found = look(frames, spans=[[[1.25, 2.0]]], min_change=39.0)
    assert found.get("change") == change and found.get("rejected") == (None if change else "twin looks like the full video")


class Known:
    """Models whose own evidence is given."""

    def __init__(self, *evidence: motion.Evidence):
        self.evidence = list(evidence)

    def own_evidence(self, clip, frames):
        """As given."""
        return self.evidence


def test_own_evidence_is_taken_further_down(look):
    """A slot at 0.4 of the peak is key for `self`, alone and with motion; a keyword that is not sure is left out."""
    curve = torch.zeros(16)
    curve[5:8] = torch.tensor([0.4, 1.0, 0.2])
    sure, unsure = motion.Evidence(curve, 0.9), motion.Evidence(curve, 0.1)
    found = look(scene(), ("jumps", "lands"), models=Known(unsure, sure), finders=("self",))
    assert found["kept"] == [1] and found["confidence"] == [0.1, 0.9]
    assert found["key_spans"] == [[[1.25, 1.75]]] * 2
    both = look(scene(), models=Known(sure), finders=("motion", "self"))
    assert both["key_spans"] == [[[1.25, 2.0]]] and len(both["curves"][0]) == 32


def test_a_flat_curve_is_no_event(look):
    """However sure a finder says it is."""
    found = look(scene(), models=Known(motion.Evidence(torch.zeros(16), 0.9)), finders=("self",), min_confidence=0.0)
    assert found["rejected"] == "no event found"


# --- Among clips, with records made by hand ------------------------------------------------------------------------


def record(line: int, **more) -> dict:
    """A good record that is unlike any other line's."""
    g = random.Random(line)
    about = {"line": line, "source": {"video": f"{line}.mp4", "caption": f"Number {line} jumps."}, "duration": 2.0}
    about |= {"keywords": ["jumps", "falls"], "lemmas": ["jump", "fall"], "key_spans": [[[0.5, 1.0]], [[1.0, 1.5]]]}
    about |= {"sha256": f"{line:064x}", "hashes": [f"{g.getrandbits(64):016x}" for _ in range(3)], "kept": [0]}
    return about | {"pictures": g.randbytes(768).hex(), "key_share": 0.25} | more


def judged(tmp_path: Path, records: list[dict], **more) -> dict[int, str]:
    """The reason of every line that is lost beside the others; records are split over two parts."""
    parts = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for part, some in zip(parts, (records[:2], records[2:])):
        write(part, some)
    lost = curate.judge(parts, curate.Settings(Path("c.jsonl"), tmp_path, **more), Console(quiet=True))
    return {line: reason for line, (reason, _) in lost.items()}


PLAIN = {"hashes": ["0" * 16] * 3, "pictures": bytes(768).hex()}


def test_what_makes_two_clips_the_same(tmp_path):
    """All three pictures, not one; captions but for case and blanks; nothing where pictures are plain; the first stays."""
    first = record(1)
    same = {name: first[name] for name in ("hashes", "pictures")}
    middle = {"hashes": ["f" * 15 + "0", first["hashes"][1], "0" * 15 + "f"], "pictures": first["pictures"]}
    spaced = {"video": "x.mp4", "caption": " NUMBER  3\njumps."}
    records = [first, record(2, **same), record(3), record(4, **middle), record(5, source=spaced), record(6, **PLAIN)]
    records += [record(7, **PLAIN), record(8, rejected="frozen", detail="", **same), record(9, **same)]
    lost = judged(tmp_path, records)
    assert lost == {2: "duplicate clip", 5: "duplicate caption", 9: "duplicate clip"}


def test_what_is_in_a_test_set(tmp_path, monkeypatch):
    """By file, plain or not; by pictures, unless they are plain; before it can be a duplicate of anything."""
    seen, twins = curate.Seen(3), record(2)
    for about in (twins, record(0) | PLAIN):
        seen.add(about, "test.jsonl:1")
    monkeypatch.setattr(curate, "excluded_clips", lambda s: ({record(1)["sha256"], record(4)["sha256"]}, seen))
    again = {name: twins[name] for name in ("hashes", "pictures")}
    records = [record(1), record(3, **again), record(4, **PLAIN), record(5, **PLAIN), record(6)]
    assert judged(tmp_path, records) == dict.fromkeys((1, 3, 4), "in a test set")


def test_excluded_folder(tmp_path, world, monkeypatch):
    """A folder's videos, those below it too; a plain one counts by its file only; a broken one ends the run by name."""
    (tmp_path / "sets/inner").mkdir(parents=True)
    names = ["sets/a.mp4", "sets/inner/b.MKV", "sets/plain.webm"]
    for i, name in enumerate(names):
        shutil.copy(world / f"train/000/{i:06d}.mp4", tmp_path / name)
    (tmp_path / "sets/notes.txt").write_text("no video")
    real = curate.fingerprint
    monkeypatch.setattr(curate, "fingerprint", lambda c, x: real(c, x) | (PLAIN if "plain" in c.video.name else {}))
    s = curate.Settings(Path("c.jsonl"), tmp_path, exclude=(tmp_path / "sets",))
    files, seen = curate.excluded_clips(s)
    assert files == {curate.file_hash(tmp_path / name) for name in names}
    places = {place for table in seen.tables for entries in table.values() for place, *_ in entries}
    assert places == {str(tmp_path / name) for name in names[:2]}
    (tmp_path / "sets/broken.mp4").write_bytes(b"no video")
    with pytest.raises(ClipError, match=r"--exclude: .*broken\.mp4"):
        curate.excluded_clips(s)


def test_the_draw_by_hand(tmp_path):
    """As many of each action and duration as fit; another seed draws others; without a target all stay."""
    groups = {"jump": 6, "fall": 3, "roll": 1}
    names = [name for name, n in groups.items() for _ in range(n)]
    records = [record(i, lemmas=["other", name], kept=[1]) for i, name in enumerate(names, 1)]
    records += [record(11, lemmas=["other", "roll"], kept=[1], duration=3.0)]  # a group of its own
    draws = [set(range(1, 12)) - set(judged(tmp_path, records, target=7, seed=seed)) for seed in range(6)]
    for drawn in draws:
        assert Counter(names[i - 1] for i in drawn if i < 11) == {"jump": 2, "fall": 2, "roll": 1} and 11 in drawn
    assert len({frozenset(d) for d in draws}) > 1 and judged(tmp_path, records) == {}
    assert judged(tmp_path, records, target=7) == judged(tmp_path, records, target=7)


def test_only_kept_keywords_are_written(tmp_path):
    """clips.jsonl has the keywords that are kept, with their spans, and whatever else the line had."""
    records = [record(1, kept=[1]), record(2, kept=[0, 1]), record(3, rejected="frozen", detail="still")]
    records[0]["source"] |= {"start": 1.5, "keywords": ["old"], "more": "kept"}
    part = write(tmp_path / "1.jsonl", records)
    counts = curate.finish([part], curate.Settings(tmp_path / "c.jsonl", tmp_path, samples=0), Console(quiet=True))
    lines = [json.loads(x) for x in (tmp_path / "clips.jsonl").open()]
    assert lines[0] == records[0]["source"] | {"keywords": ["falls"], "key_spans": [[[1.0, 1.5]]]}
    assert lines[1]["keywords"] == ["jumps", "falls"] and lines[1]["key_spans"] == records[1]["key_spans"]
    assert counts == {"kept": 2, "frozen": 1} and len(list((tmp_path / "rejected.jsonl").open())) == 1


# --- Parts ---------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(world, tmp_path, monkeypatch):
    """Parts that are there are read; a missing one is made; half-written files are ignored; other settings are refused."""
    path = write(world / "again.jsonl", world_lines(world, 6))
    first = curated(path, tmp_path / "out", part_lines=2)
    parts = sorted((tmp_path / "out/parts").glob("*.jsonl"))
    assert [p.name for p in parts] == ["000000001.jsonl", "000000003.jsonl", "000000005.jsonl"]
    parts[1].unlink()
    (parts[1].parent / ".000000003.jsonl.77").write_text('{"line": 3')
    real, looked = curate.inspect, []
    monkeypatch.setattr(curate, "inspect", lambda clip, *more: looked.append(clip.where) or real(clip, *more))
    assert curated(path, tmp_path / "out", part_lines=2) == first
    assert looked == [f"{path}:3", f"{path}:4"]
    for name, value in (("min_confidence", 0.5), ("finders", ("motion", "self")), ("max_keywords", 2), ("part_lines", 3)):
        with pytest.raises(ValueError, match=f"{name} was"):
            curated(path, tmp_path / "out", **{"part_lines": 2, "model": "x", "root": None} | {name: value})
    curated(
        path, tmp_path / "out", part_lines=2, target=3, seed=5, duplicate_bits=1
    )  # these judge parts, and do not make them


def test_lines_as_they_are_given(world, tmp_path):
    """Given keywords stay, whatever grammar and language say; a mark of UTF-8 before the first line is no fault."""
    lines = world_lines(world, 3)
    lines[0] |= {
        "keywords": ["blue cross"],
        "caption": "Ein blaues Kreuz und ein Quadrat, das ist nicht mit dabei. blue cross",
    }
    lines[1] |= {"keywords": ["Turns black at once"], "caption": "It. Turns black at once."}
    path = write(world / "given.jsonl", lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    clips, rejected = curated(path, tmp_path / "out")
    assert not rejected and [x["keywords"] for x in clips[:2]] == [["blue cross"], ["Turns black at once"]]
    made = [json.loads(x) for x in (tmp_path / "out/parts/000000001.jsonl").open()]
    assert [x["lemmas"] for x in made[:2]] == [["blue"], ["turns"]]


def damaged(data: bytes, chooser: random.Random) -> bytes:
    """Bytes of a good file flipped, cut or spliced."""
    data = bytearray(data)
    kind = chooser.randrange(3)
    if kind == 0:
        for _ in range(chooser.randrange(1, 200)):
            data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
    elif kind == 1:
        del data[chooser.randrange(len(data)) :]
    else:
        a, b = sorted(chooser.randrange(len(data)) for _ in range(2))
        data[a:b] = data[: b - a][::-1]
    return bytes(data)


def test_broken_files_cost_their_clip_only(world, tmp_path):
    """Files of damaged bytes, with a worker: every one is in clips.jsonl or rejected.jsonl."""
    lines, chooser = world_lines(world, 6), random.Random(0)
    (world / "broken").mkdir(exist_ok=True)
    bad = []
    for i in range(40):
        source = lines[i % 6]
        (world / f"broken/{i}.mp4").write_bytes(damaged((world / source["video"]).read_bytes(), chooser))
        bad.append(source | {"video": f"broken/{i}.mp4", "caption": f"{source['caption']} {i}"})
    clips, rejected = curated(write(world / "bad.jsonl", bad), tmp_path / "out", workers=1, time_limit=20.0)
    assert len(clips) + len(rejected) == 40 and len(rejected) > 10
    assert {x["reason"] for x in rejected} <= {"unreadable", "frozen", "duplicate clip", "no event found", "too short",
                                              "twin looks like the full video", "event fills the clip"}  # fmt: skip


def work_or_hang(clip):
    """What a worker does, but for clips whose name says hang or die. Workers import it from here."""
    if clip.video.name.startswith("hang"):
        clip.video.with_suffix(".pid").write_text(str(os.getpid()))
        threading.Event().wait()
    if clip.video.name.startswith("die"):
        os._exit(11)
    return curate._work(clip)


def test_a_decoder_that_hangs_costs_its_time_limit_and_its_clip_only(world, tmp_path, monkeypatch):
    """Two clips hang, one kills its worker: each is in rejected.jsonl with its reason, the rest as without them."""
    lines = world_lines(world, 7)
    sound = write(world / "sound.jsonl", [x for i, x in enumerate(lines) if i not in (1, 2, 4)])
    undisturbed, _ = curated(sound, tmp_path / "a")
    for i, name in ((1, "hang-1.mp4"), (2, "die.mp4"), (4, "hang-2.mp4")):
        shutil.copy(world / lines[i]["video"], world / name)
        lines[i]["video"] = name
    monkeypatch.setattr(curate, "_work", work_or_hang)
    clips, rejected = curated(write(world / "hanging.jsonl", lines), tmp_path / "b", workers=2, time_limit=10.0)
    assert clips == undisturbed and len(clips) == 4
    assert [(x["line"], x["reason"]) for x in rejected] == [(i, "unreadable") for i in (2, 3, 5)]
    for x, said in zip(rejected, ("hung for 10 s", "crashed (exit code 11)", "hung for 10 s")):
        assert said in x["detail"] and f"hanging.jsonl:{x['line']}" in x["detail"] and x["source"]["video"] in x["detail"]
    for name in ("hang-1.pid", "hang-2.pid"):  # stopped, not left behind
        with pytest.raises(ProcessLookupError):
            os.kill(int((world / name).read_text()), 0)


def test_a_kill_changes_no_byte(world, tmp_path):
    """kill -9 at random moments, started again each time: the same files as an undisturbed run."""
    path = write(world / "kill.jsonl", world_lines(world, 48))
    undisturbed = tmp_path / "whole"
    curated(path, undisturbed, part_lines=4)
    out, chooser = tmp_path / "killed", random.Random(1)
    command = ["-m", "data.curation.curate", path, out, "--part-lines", 4, "--samples", 2]
    kills = 0
    for workers in (1, 0, 0):
        started = Command(*command, "--workers", workers, cwd=tmp_path, before=os.setsid)
        enough = len(list(out.glob("parts/*.jsonl"))) + chooser.randrange(1, 4)
        while started.process.is_alive() and len(list(out.glob("parts/*.jsonl"))) < min(enough, 12):
            time.sleep(0.01)  # until so many parts are there: no fixed wait
        if started.process.is_alive():
            os.killpg(started.pid, signal.SIGKILL)
            kills += 1
        started.wait()
    run(*command, "--workers", 0, cwd=tmp_path)
    assert kills >= 2
    for name in ("clips.jsonl", "rejected.jsonl"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not re.findall(r"\.\d+$", "\n".join(str(p) for p in (out / "parts").glob("0*")))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.jsonl", "out"], "none.jsonl: no such file"),
        (["{one}", "out", "--finders", "self"], "--model: this choice"),
        (["{one}", "out", "--finders", "clip"], "--clip-model: this choice"),
        (["{one}", "out", "--keywords", "model"], "--model: this choice"),
    ],
)
def test_bad_settings_are_one_line(world, tmp_path, arguments, message):
    """The name, what is missing; no traceback."""
    one = write(world / "single.jsonl", world_lines(world, 1))
    done = run("-m", "data.curation.curate", *[a.format(one=one) for a in arguments], check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_sentence_without_end(world, tmp_path):
    """A thousand words in one sentence took seconds, three thousand minutes: it is named, and costs no time."""
    lines = world_lines(world, 2)
    lines[0] = {"video": lines[0]["video"], "caption": "The man jumps " * 1000}
    clips, rejected = curated(write(world / "endless.jsonl", lines), tmp_path / "out")
    (lost,) = rejected
    assert len(clips) == 1 and (lost["reason"], lost["detail"]) == ("text too long", "a sentence of 3000 words")


def test_the_models_own_evidence(world, tmp_path, qwen2_5):
    """--finders self motion: runs on a checkpoint, one curve a keyword, the same as the finder gives."""
    path = write(world / "self.jsonl", world_lines(world, 2))
    curated(path, tmp_path / "out", finders=("motion", "self"), model=str(qwen2_5), max_frames=16, fps=8.0)
    for record in map(json.loads, (tmp_path / "out/parts/000000001.jsonl").open()):
        assert len(record["curves"]) == len(record["keywords"]) == 1 and len(record["curves"][0]) == 16


def test_odd_clips_end_no_curation(world, tmp_path, qwen2_5):
    """With a model: special tokens in a caption are text; a strip of a video, a caption of 33,000 words and one beyond the
    model's context cost their clip only."""
    lines = world_lines(world, 5)
    write_video(world / "strip.mp4", size=(16, 4096))
    lines[1] |= {"video": "strip.mp4", "key_spans": [[0.5, 0.9]]}
    lines[2] = {"video": lines[2]["video"], "caption": "The man jumps off. " * 8000}
    lines[3] |= {"caption": "The man jumps off. " * 1000}
    lines[4] |= {"caption": "A <|video_pad|> man [/] jumps.<|im_end|> " + lines[4]["caption"]}
    more = dict(finders=("motion", "self"), model=str(qwen2_5), max_frames=16, fps=8.0)
    clips, rejected = curated(write(world / "odd-self.jsonl", lines), tmp_path / "out", **more)
    assert {x["line"]: x["reason"] for x in rejected if x["line"] in (2, 3, 4)} == {
        2: "unreadable",
        3: "text too long",
        4: "unreadable",
    }
    details = {x["line"]: x["detail"] for x in rejected}
    assert "aspect ratio" in details[2] and "the model reads 4096" in details[4]
    assert len(clips) + len(rejected) == 5 and "unreadable" not in (x["reason"] for x in rejected if x["line"] == 5)
