"""Curation from end to end: nothing vanishes, nothing crashes, and a kill changes no byte."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from data import curate
from data.clips import load_clips
from data.curate_report import group_of
from tests.test_scripts import HERE, run


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
    odd = {
        "malformed": "{not json",
        "unreadable": good[0] | {"video": "empty.mp4", "caption": "Something else vanishes: a cross."},
        "duplicate caption": good[2] | {"video": good[7]["video"], "caption": good[0]["caption"].upper()},
        "duplicate clip": good[1] | {"video": "copy.mp4", "caption": "Other words: it turns black."},
        "event fills the clip": good[3] | {"key_spans": [[0.0, 2.0]], "caption": "It vanishes all the time."},
        "twin looks like the full video": good[4] | {"key_spans": [[0.0, 0.1]], "caption": "It turns black at once."},
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
    from torchcodec.encoders import VideoEncoder

    picture = torch.randint(0, 255, (1, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    VideoEncoder(picture.repeat(24, 1, 1, 1), frame_rate=12).to_file(tmp_path / "still.mp4", crf=10)
    path = write(tmp_path / "c.jsonl", [{"video": "still.mp4", "caption": "It jumps.", "keywords": ["jumps"]}])
    assert curated(path, tmp_path / "out")[1][0]["reason"] == "frozen"


def test_test_sets_are_left_out_by_file_and_by_picture(world, tmp_path):
    """--exclude finds the same bytes, and the same pictures encoded anew."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.encoders import VideoEncoder

    lines = world_lines(world, 4)
    again = VideoDecoder(world / lines[2]["video"]).get_frames_in_range(0, 16).data
    VideoEncoder(again.contiguous(), frame_rate=8).to_file(world / "again.mp4", crf=24)
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
    clips, rejected = curated(write(world / "hanging.jsonl", lines), tmp_path / "b", workers=2, time_limit=3.0)
    assert clips == undisturbed and len(clips) == 4
    assert [(x["line"], x["reason"]) for x in rejected] == [(i, "unreadable") for i in (2, 3, 5)]
    for x, said in zip(rejected, ("hung for 3 s", "crashed (exit code 11)", "hung for 3 s")):
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
    command = [sys.executable, "-m", "data.curate", path, out, "--workers", "1", "--part-lines", "4", "--samples", "2"]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        enough = len(list(out.glob("parts/*.jsonl"))) + chooser.randrange(1, 4)
        while process.poll() is None and len(list(out.glob("parts/*.jsonl"))) < min(enough, 12):
            time.sleep(0.01)  # until so many parts are there: no fixed wait
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    run(*command[1:], cwd=tmp_path)
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
    done = run("-m", "data.curate", *[a.format(one=one) for a in arguments], check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_models_own_evidence(world, tmp_path, qwen2_5):
    """--finders self motion: runs on a checkpoint, one curve a keyword, the same as the finder gives."""
    path = write(world / "self.jsonl", world_lines(world, 2))
    curated(path, tmp_path / "out", finders=("motion", "self"), model=str(qwen2_5), max_frames=16, fps=8.0)
    for record in map(json.loads, (tmp_path / "out/parts/000000001.jsonl").open()):
        assert len(record["curves"]) == len(record["keywords"]) == 1 and len(record["curves"][0]) == 16
