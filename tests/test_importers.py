"""Importers: each format in its official form, with its odd cases, against lines written by hand."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import tyro
from rich.console import Console

from data.clips import load_clips
from data.curation.importers import run_import
from data.curation.sources import IMPORTERS, Format, Settings
from data.files import ClipError, PathError, inside_root
from data.video import Clip, read_frames

HERE = Path(__file__).parent.parent


def files(root: Path, *names: str) -> Path:
    """Empty files below root; an import looks at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def lines(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def imported(form: str, source: Path, videos: Path, **more) -> tuple[list[dict], list[tuple[str, str, str]]]:
    """What an import writes: the clips, and (place, reason, field) of what was rejected. load_clips must like the clips."""
    out = source.parent / "out" / "captions.jsonl"
    console = Console(quiet=True)
    count = run_import(Settings(form, source, videos, out, **more), console)
    clips, rejected = lines(out), lines(out.with_name("captions.rejected.jsonl"))
    loaded, problems = load_clips(out, videos)
    assert problems == [] and len(loaded) == len(clips) == count
    assert all(clip.video.is_file() and clip.video.is_relative_to(videos.resolve()) for clip in loaded)
    assert [c.caption for c in loaded] == [c["caption"] for c in clips]
    assert all(set(r) == {"where", "reason", "field", "found", "fix"} and r["fix"] for r in rejected)
    assert not list(out.parent.glob("*.part"))
    first = out.read_bytes()
    run_import(Settings(form, source, videos, out, **more), console)
    assert out.read_bytes() == first  # the same again
    return clips, [(r["where"], r["reason"], r["field"]) for r in rejected]


def test_activitynet(tmp_path):
    """Both names of a file, source order, ends behind the duration, equal keys, and all sorts of bad times."""
    videos = files(tmp_path / "v", "v_zz.mp4", "sub/aa.mkv", "v_q-_1.WEBM")
    source = tmp_path / "train.json"
    source.write_text(
        '{"v_zz": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81], [56.26, 90]], "sentences": '
        '["A woman is seen.\\n", "  Elle se lève — et s’assoit.", "They dance."], "extra": {"duration": 1}},\n'
        '"v_aa": {"duration": 10, "timestamps": [[5, 5], [6, 4], [-1, 2], [1, "2"], [1], [12, 15], [0, NaN], [0, 10]], '
        '"sentences": ["a", "b", "c", "d", "e", "f", "g", "h"]},\n'
        '"v_aa": {"duration": 10, "timestamps": [[0, 10], [1, 2]], "sentences": ["h", "Equal key."]},\n'
        '"v_gone": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["x"]},\n'
        '"q-_1": {"timestamps": [[0, 1], [0, 2], [0, 3]], "sentences": ["No duration.", " ", null]},\n'
        '"v_uneven": {"duration": 9, "timestamps": [[0, 1]], "sentences": []}, "v_list": [1],\n'
        '"v_long": {"duration": "9", "timestamps": [[0, 1]], "sentences": ["x"]},\n'
        f'"v_zz": {{"duration": 1{"0" * 400}, "timestamps": [[0, 1]], "sentences": ["Far too long."]}}}}',
        encoding="utf-8",
    )
    clips, rejected = imported("activitynet", source, videos)
    assert clips == [
        {"video": "v_zz.mp4", "caption": "A woman is seen.", "start": 0.83, "end": 19.86},
        {"video": "v_zz.mp4", "caption": "Elle se lève — et s’assoit.", "start": 17.37, "end": 60.81},
        {"video": "v_zz.mp4", "caption": "They dance.", "start": 56.26, "end": 82.73},
        {"video": "sub/aa.mkv", "caption": "h", "start": 0, "end": 10},
        {"video": "sub/aa.mkv", "caption": "Equal key.", "start": 1, "end": 2},
        {"video": "v_q-_1.WEBM", "caption": "No duration.", "start": 0, "end": 1},
    ]
    assert rejected == [
        *((f"train.json: v_aa, sentence {i}", "bad times", "timestamps") for i in range(1, 8)),
        ("train.json: v_aa, sentence 1", "duplicate", ""),
        ("train.json: v_gone, sentence 1", "video missing", "key"),
        ("train.json: q-_1, sentence 2", "caption empty", "sentences"),
        ("train.json: q-_1, sentence 3", "caption empty", "sentences"),
        ("train.json: v_uneven", "malformed record", "timestamps"),
        ("train.json: v_list", "malformed record", "timestamps"),
        ("train.json: v_long, sentence 1", "bad times", "duration"),
        ("train.json: v_zz, sentence 1", "bad times", "duration"),
    ]


CHARADES_HEADER = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"


def test_charades(tmp_path):
    """Several descriptions, quotes and new lines in them, no actions, an empty description, a file that is not there."""
    videos = files(tmp_path / "v", "Charades_v1_480/46GP8.mp4", "Charades_v1_480/N11GT.mp4", "Charades_v1_480/0IH69.mp4")
    source = tmp_path / "Charades_v1_train.csv"
    source.write_text(
        CHARADES_HEADER + "46GP8,HR43,Kitchen,6,7,Yes,A person cooking.,food;stove,"
        '"A person is cooking, then looks out;; of a window.; Someone ""stirs"";",c092 11.90 21.20;c147 0.00 12.60,24.83\n'
        'N11GT,0KZ7,Stairs,,,No,Script.,light,"One\nline.",,20.00\n'
        "0IH69,6RE8,Bedroom,4,5,Yes,Script.,,;  ;,c075 0.00 15.50,15.50\n"
        "GONE1,6RE8,Bedroom,4,5,Yes,Script.,,A person leaves.,,15.50\n"
        "0IH69,6RE8,Bedroom,4,5,Yes,Script, with a comma that nobody quoted.,,Text.,,15.50\n",
        encoding="utf-8",
    )
    clips, rejected = imported("charades", source, videos)
    assert clips == [
        {"video": "Charades_v1_480/46GP8.mp4", "caption": "A person is cooking, then looks out"},
        {"video": "Charades_v1_480/46GP8.mp4", "caption": "of a window."},
        {"video": "Charades_v1_480/46GP8.mp4", "caption": 'Someone "stirs"'},
        {"video": "Charades_v1_480/N11GT.mp4", "caption": "One\nline."},
    ]
    assert rejected == [
        ("Charades_v1_train.csv:5, description 1", "caption empty", "descriptions"),
        ("Charades_v1_train.csv:6, description 1", "video missing", "id"),
        ("Charades_v1_train.csv:7", "malformed record", ""),
    ]


def test_charades_sta(tmp_path):
    """The line that everybody quotes, and broken ones; equal lines; a sentence with the mark in it."""
    videos = files(tmp_path / "v", "AO8RW.mp4", "Y6R7T.avi")
    source = tmp_path / "charades_sta_train.txt"
    source.write_bytes(
        b"AO8RW 0.0 6.9##a person is putting a book on a shelf.\r\n\r\n"
        b"Y6R7T 20.8 30.0##person ## caf\xc3\xa9.\n"
        b"AO8RW 0.0 6.9##a person is putting a book on a shelf.\n"
        b"AO8RW 0.0 6.9##another sentence of the same part.\n"
        b"AO8RW 6.9 6.9##nothing\nAO8RW 9 6.9##backwards\nAO8RW 0 x##text\nAO8RW 0.0 6.9##\nAO8RW 0.0 6.9 no mark\n"
        b"AO8RW 0.0##one time\nZZZZZ 0.0 6.9##gone\nAO8RW 0.0 inf##for ever\nAO8RW 0 1##caf\xe9\n"
    )
    clips, rejected = imported("charades-sta", source, videos)
    assert clips == [
        {"video": "AO8RW.mp4", "caption": "a person is putting a book on a shelf.", "start": 0.0, "end": 6.9},
        {"video": "Y6R7T.avi", "caption": "person ## café.", "start": 20.8, "end": 30.0},
        {"video": "AO8RW.mp4", "caption": "another sentence of the same part.", "start": 0.0, "end": 6.9},
    ]
    places = [(4, "duplicate", ""), *((i, "bad times", "end") for i in (6, 7, 8)), (9, "caption empty", "sentence")]
    places += [(10, "malformed record", ""), (11, "malformed record", ""), (12, "video missing", "video")]
    places += [(13, "bad times", "end"), (14, "malformed record", "sentence")]
    assert rejected == [(f"charades_sta_train.txt:{i}", reason, name) for i, reason, name in places]


def dream_messages(vid: object, reference: object) -> dict:
    """A line of DREAM-1k.jsonl as it is now."""
    video = {"reference": None, "text": None, "type": "video", "video": {"video_file": f"/mnt/hdfs/{vid}.mp4"}}
    question = {"reference": None, "text": "Describe the video in detail.", "type": "text", "video": None}
    answer = {"reference": reference, "text": "", "type": "text", "video": None}
    turns = [{"content": [video, question], "role": "user"}, {"content": [answer], "role": "assistant"}]
    more = {"task": "video/caption", "idx": vid, "extra_info": {"duration": 5.09, "events": ["It lands."], "n_events": 1}}
    return {"messages": turns, "dataset": "DREAM/movie_animation", "vid": vid} | more


def test_dream_1k(tmp_path):
    """The three published forms, a broken line between good ones, numbers as names."""
    videos = files(tmp_path / "v", "1.mp4", "10.mp4", "video/2.mp4", "3.mov")
    source = tmp_path / "DREAM-1k.jsonl"
    text = {"prompt": "<video>\nDescribe the video in detail.", "response": "It falls."}
    records = [dream_messages(1, "It jumps and lands."), dream_messages(99, "x"), dream_messages(10, "")]
    records += [{"idx": 2, "text": text, "video_file": "<placeholder>", "extra_info": {"duration": 9.7}, "vid": 2}]
    records += [
        {"messages": [], "vid": 3},
        {"vid": 3, "text": "flat"},
        dream_messages(3, ["x"]),
        [1],
        dream_messages(None, "x"),
    ]
    source.write_text(
        "\ufeff" + "\n".join(map(json.dumps, records[:2])) + '\n{"vid": 1,\n' + "\n".join(map(json.dumps, records[2:]))
    )
    clips, rejected = imported("dream-1k", source, videos)
    prompt = "Describe the video in detail."
    assert clips == [
        {"video": "1.mp4", "caption": "It jumps and lands.", "prompt": prompt},
        {"video": "video/2.mp4", "caption": "It falls.", "prompt": prompt},
    ]
    places = [(2, "video missing", "vid"), (3, "malformed record", ""), (4, "caption empty", "messages")]
    places += [(6, "malformed record", ""), (7, "malformed record", ""), (8, "malformed record", "messages")]
    places += [(9, "malformed record", ""), (10, "malformed record", "vid")]
    assert rejected == [(f"DREAM-1k.jsonl:{i}", reason, name) for i, reason, name in places]

    source = tmp_path / "metadata.json"
    records = [
        {"idx": "3", "video_file": "video/3.mp4", "source": "x", "duration": "4", "description": "It runs.", "events": "[]"}
    ]
    for written in (json.dumps(records, indent=1), json.dumps(records[0]) + "\n"):
        source.write_text(written)
        assert imported("dream-1k", source, videos)[0] == [{"video": "3.mov", "caption": "It runs."}]


def test_motionbench(tmp_path):
    """Keys with and without extension, broken Unicode, a missing field."""
    videos = files(tmp_path / "v", "videos/ef47-22_58_59.mp4", "videos/b.c.mp4", "other/k.mp4")
    source = tmp_path / "train.jsonl"
    records = [
        {"video_path": "ef47-22_58_59.mp4", "motion_caption": "The hand turns the key twice. \n", "uid": 4},
        {"video_path": "b.c", "motion_caption": "猫が跳ぶ。"},
        {"video_path": "k.mp4", "caption": "Under another name."},
        {"motion_caption": "x"},
        {"video_path": "k.mp4", "motion_caption": "\ud800"},
        {"video_path": "../v/other/k.mp4", "motion_caption": "x"},
    ]
    source.write_text("".join(json.dumps(r) + "\n\n" for r in records))
    clips, rejected = imported("motionbench", source, videos)
    assert clips == [
        {"video": "videos/ef47-22_58_59.mp4", "caption": "The hand turns the key twice."},
        {"video": "videos/b.c.mp4", "caption": "猫が跳ぶ。"},
    ]
    assert rejected == [
        ("train.jsonl:5", "caption empty", "motion_caption"),
        ("train.jsonl:7", "malformed record", "video_path"),
        ("train.jsonl:9", "malformed record", "motion_caption"),
        ("train.jsonl:11", "path leaves the folder", "video_path"),
    ]


def test_vru_accident(tmp_path):
    """The same name in two sources: the folder decides, and never another source's video; one file or all four."""
    videos = files(tmp_path / "VRU_videos", "DoTA/VRU_1.mp4", "CAP_DATA/VRU_1.mp4", "CAP_DATA/VRU_2.mp4")
    for source, entries in {
        "DoTA": {"./VRU_videos/DoTA/VRU_1": {"gt": "A car hits a bicycle."}, "./VRU_videos/DoTA/VRU_2": {"gt": "x"}},
        "CAP_DATA": {
            "./VRU_videos/CAP_DATA/VRU_1.mp4": {"gt": "A van turns.", "more": 1},
            "./VRU_videos/CAP_DATA/VRU_2": {},
        },
    }.items():
        (tmp_path / "MetaData" / source).mkdir(parents=True)
        (tmp_path / "MetaData" / source / f"{source}_Dense_Caption.json").write_text(json.dumps(entries))
        (tmp_path / "MetaData" / source / f"{source}_VQA_annotation.json").write_text("{}")
    clips, rejected = imported("vru-accident", tmp_path / "MetaData", videos)
    assert clips == [
        {"video": "CAP_DATA/VRU_1.mp4", "caption": "A van turns."},
        {"video": "DoTA/VRU_1.mp4", "caption": "A car hits a bicycle."},
    ]
    assert rejected == [
        ("CAP_DATA_Dense_Caption.json: ./VRU_videos/CAP_DATA/VRU_2", "caption empty", "gt"),
        ("DoTA_Dense_Caption.json: ./VRU_videos/DoTA/VRU_2", "video missing", "key"),
    ]
    one = tmp_path / "MetaData/DoTA/DoTA_Dense_Caption.json"
    assert imported("vru-accident", one, videos / "DoTA")[0] == [{"video": "VRU_1.mp4", "caption": "A car hits a bicycle."}]
    with pytest.raises(ClipError, match="no clip could be imported"):  # another source's VRU_1 must not be taken
        imported("vru-accident", one, videos / "CAP_DATA")


def test_something_something(tmp_path):
    """The label is the caption; test.json has none; ids as numbers."""
    videos = files(tmp_path / "v", "78687.webm", "42326.webm")
    source = tmp_path / "train.json"
    label = {"label": "holding potato next to bottle", "template": "Holding [something] next to [something]"}
    records = [{"id": "78687", "placeholders": ["potato", "bottle"], **label}, {"id": 42326, "label": "pushing a mug"}]
    source.write_text(json.dumps([*records, {"id": "42326"}, {"id": "1", **label}, "x", {"id": None, **label}]))
    clips, rejected = imported("something-something", source, videos)
    assert clips == [
        {"video": "78687.webm", "caption": "holding potato next to bottle"},
        {"video": "42326.webm", "caption": "pushing a mug"},
    ]
    reasons = [("caption empty", "label"), ("video missing", "id"), ("malformed record", ""), ("malformed record", "id")]
    assert rejected == [(f"train.json: element {i}", *reason) for i, reason in enumerate(reasons, 3)]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv(tmp_path, mark):
    """Every delimiter, a BOM, quoted new lines and delimiters, Windows' paths and line ends, times and their absence."""
    videos = files(tmp_path / "v", "a.mp4", "train/b.mkv", "val/b.mkv", "c.mp4", "c.mov", "d.mp4")
    table = [
        ["file", "text, in; words|x", "start", "end", "note"],
        ["a.mp4", f"First{mark} of two.\nSecond.", "", "", "extra"],
        ["train\\b.mp4", "In train.", "1.5", "3", ""],
        ["./val/b", "In val.", "0", "", ""],
        ["b", "Which?", "", "", ""],
        ["c", "Which?", "", "", ""],
        ["c.mov", "This.", "", "", ""],
        ["test/b.mkv", "Not in that folder.", "", "", ""],
        ["/etc/a.mp4", "x", "", "", ""],
        ["C:\\clips\\a.mp4", "x", "", "", ""],
        ["../v/a.mp4", "x", "", "", ""],
        ["a.mp4", "x", "00:01", "", ""],
        ["a.mp4", "x", "", "nan", ""],
        ["a.mp4", "", "", "", ""],
        ["", "x", "", "", ""],
        ["a.mp4", "one", "", "", "", "too many"],
    ]
    rows = [mark.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in table]
    rows += ["", f"d.mp4{mark}Short row", f'a.mp4{mark}"x"y', f"d.mp4{mark}Last caf\udce9"]
    source = tmp_path / "table.csv"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode("utf-8", "surrogateescape"))
    clips, rejected = imported("csv", source, videos, video_column="file", caption_column="text, in; words|x")
    assert clips == [
        {"video": "a.mp4", "caption": f"First{mark} of two.\nSecond."},
        {"video": "train/b.mkv", "caption": "In train.", "start": 1.5, "end": 3.0},
        {"video": "val/b.mkv", "caption": "In val.", "start": 0.0},
        {"video": "c.mov", "caption": "This."},
        {"video": "d.mp4", "caption": "Short row"},
    ]
    places = [(6, "several videos", "file"), (7, "several videos", "file"), (9, "video missing", "file")]
    places += [(i, "path leaves the folder", "file") for i in (10, 11, 12)]
    places += [(13, "bad times", "start"), (14, "bad times", "end"), (15, "caption empty", "text, in; words|x")]
    places += [(16, "malformed record", "file"), (17, "malformed record", ""), (20, "malformed record", "")]
    places += [(21, "malformed record", "text, in; words|x")]
    assert rejected == [(f"table.csv:{i}", reason, name) for i, reason, name in places]


def test_csv_columns(tmp_path):
    """A column that is named must be there; start and end may be called otherwise; an open quote is reported."""
    videos = files(tmp_path / "v", "a.mp4")
    source = tmp_path / "t.csv"
    source.write_text('video,caption,from,to\na,x,1,2\na,"never closed,1,2\n')
    clips, rejected = imported("csv", source, videos, start_column="from", end_column="to")
    assert clips == [{"video": "a.mp4", "caption": "x", "start": 1.0, "end": 2.0}]
    assert rejected == [("t.csv:3", "malformed record", "")]
    with pytest.raises(ClipError, match="expected columns video, caption, begin"):
        imported("csv", source, videos, start_column="begin")


def test_folder(tmp_path):
    """Sidecars beside the videos or in a folder of their own; what lacks its other half; odd names."""
    videos = files(tmp_path / "v", "a.mp4", "b/a.mp4", "b/x.y.MKV", "c.webm", "c.avi", "d.mov", "e.mp4")
    for place in (videos, tmp_path / "texts"):
        texts = {"a.txt": "Above.", "b/a.txt": "\ufeffBelow.\n", "b/x.y.txt": "x\ny", "c.txt": "Both.", "e.txt": " "}
        for name, text in (texts | {"alone.txt": "x"}).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
        clips, rejected = imported("folder", place, videos)
        assert clips == [
            {"video": "a.mp4", "caption": "Above."},
            {"video": "b/a.mp4", "caption": "Below."},
            {"video": "b/x.y.MKV", "caption": "x\ny"},
            {"video": "c.avi", "caption": "Both."},
            {"video": "c.webm", "caption": "Both."},
        ]
        assert rejected == [
            ("d.mov", "caption empty", "caption"),
            ("e.txt", "caption empty", "caption"),
            ("alone.txt", "video missing", "video"),
        ]


def test_links_and_names(tmp_path):
    """A link that leaves the folder is not taken, one that stays is; composed and decomposed letters are the same name."""
    outside = files(tmp_path / "outside", "secret.mp4", "sub/s.mp4")
    videos = files(tmp_path / "v", "real/a.mp4", "cafe\u0301.mp4")  # as macOS writes it
    (videos / "link.mp4").symlink_to("real/a.mp4")
    (videos / "secret.mp4").symlink_to(outside / "secret.mp4")
    (videos / "sub").symlink_to(outside / "sub")
    (videos / "broken.mp4").symlink_to("nowhere.mp4")
    (videos / "dir.mp4").mkdir()
    source = tmp_path / "t.csv"
    names = ("link", "caf\u00e9", "secret.mp4", "sub/s.mp4", "broken", "dir.mp4", "a\0")
    source.write_text("video,caption\n" + "".join(f"{name},x\n" for name in names), encoding="utf-8")
    clips, rejected = imported("csv", source, videos)
    assert clips == [{"video": "link.mp4", "caption": "x"}, {"video": "cafe\u0301.mp4", "caption": "x"}]
    assert [reason for _, reason, _ in rejected] == ["video missing"] * 5


# --- Chats of other trainers ----------------------------------------------------------------------------------------------


def said(question: object, answer: object, form: str = "llava") -> list[dict]:
    """A question and an answer, in the turns of LLaVA or of everybody else."""
    if form == "llava":
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def part(**video) -> list[dict]:
    """The content of a turn that shows a video."""
    return [{"type": "video", **video}, {"type": "text", "text": "What happens?"}]


LLAVA = [
    # as in LLaVA-Video-178K: <image> stands for the video
    ({"id": "0", "data_source": "0_30_s", "video": "a.mp4", "conversations": said("<image>\nDescribe it.", "One.")},
     {"video": "a.mp4", "caption": "One.", "prompt": "Describe it."}),
    ({"video": ["sub/b.mkv"], "conversations": said("What happens?\n<video>", "Two.") + said("Why?", "Ice.")},
     {"video": "sub/b.mkv", "caption": "Two.", "prompt": "What happens?"}),
    ({"video": "b", "conversations": [{"from": "system", "value": "S"}, *said("Watch:\n<video>\nSay it.", "Three.")]},
     {"video": "sub/b.mkv", "caption": "Three.", "prompt": "Watch:\nSay it."}),
    ({"video": "a.mp4", "conversations": said("Hello.", "Hello!") + said("<video>\n", "Four.")},
     {"video": "a.mp4", "caption": "Four."}),
    ({"image": "a.mp4", "conversations": said("<vila/video> Look.", "Five.")},
     {"video": "a.mp4", "caption": "Five.", "prompt": "Look."}),
    ({"image": "a.jpg", "conversations": said("<image>\nDescribe.", "x")}, ("only image", "video")),
    ({"conversations": said("Hello.", "x")}, ("no video", "video")),
    ({"video": ["a.mp4", "b.mkv"], "conversations": said("<video><video>Same?", "x")}, ("more than one video", "video")),
    ({"video": "a.mp4", "image": "a.jpg", "conversations": said("<video><image>Same?", "x")},
     ("image beside the video", "video")),
    ({"video": "a.mp4", "conversations": said("<video>\nDescribe.", "x")[:1]}, ("no assistant turn", "conversations")),
    ({"video": "a.mp4", "conversations": said("<video>\nDescribe.", "x")[::-1]}, ("no assistant turn", "conversations")),
    ({"video": "a.mp4", "conversations": said("What happens in <video>?", "x")},
     ("mark inside the prompt", "conversations[0]")),
    ({"video": "a.mp4", "conversations": said("<video><video>Which?", "x")},
     ("mark inside the prompt", "conversations[0]")),
    ({"video": "a.mp4", "conversations": said("<video>Say.", " ")}, ("caption empty", "conversations[1]")),
    ({"video": "gone.mp4", "conversations": said("<video>Say.", "x")}, ("video missing", "video")),
    ({"video": "https://x.org/a.mp4", "conversations": said("<video>Say.", "x")}, ("video missing", "video")),
    ({"video": ["1.jpg", "2.jpg"], "conversations": said("<video>Say.", "x")}, ("more than one video", "video")),
    ({"video": "a.mp4", "conversations": []}, ("malformed record", "conversations")),
    ({"video": "a.mp4", "conversations": ["x"]}, ("malformed record", "conversations[0]")),
    ({"video": "a.mp4", "conversations": [{"from": "tool", "value": "x"}]}, ("unknown role", "conversations[0]")),
    ({"video": "a.mp4", "conversations": said(5, "x")}, ("malformed record", "conversations[0]")),
    ({"video": "a.mp4"}, ("no assistant turn", "")),
]  # fmt: skip
SWIFT = [
    ({"messages": [{"role": "system", "content": "S"}, *said("<video>Describe.", "One.", "")], "videos": ["a.mp4"]},
     {"video": "a.mp4", "caption": "One.", "prompt": "Describe."}),
    ({"query": "<video>Describe.", "response": "Two.", "videos": "a.mp4"},
     {"video": "a.mp4", "caption": "Two.", "prompt": "Describe."}),
    ({"query": "And then?", "response": "x", "history": [["<video>What?", "Three."]], "videos": [{"path": "a.mp4"}]},
     {"video": "a.mp4", "caption": "Three.", "prompt": "What?"}),
    ({"instruction": "Describe.", "input": "Briefly.", "output": "Four.", "videos": ["a.mp4"], "images": []},
     {"video": "a.mp4", "caption": "Four.", "prompt": "Describe.\nBriefly."}),
    ({"conversation": [{"human": "<video>What?", "assistant": "Five."}], "videos": ["b.mkv"]},
     {"video": "sub/b.mkv", "caption": "Five.", "prompt": "What?"}),
    ({"messages": [{"role": "assistant", "content": "<video>Six."}], "videos": ["a.mp4"]},  # its form of pretraining
     {"video": "a.mp4", "caption": "Six."}),
    ({"messages": said("<video>x", "Seven.", ""), "rejected_response": "No.", "videos": ["a.mp4"], "label": True},
     {"video": "a.mp4", "caption": "Seven.", "prompt": "x"}),
    ({"messages": said("<video>x", "bad", ""), "label": False, "videos": ["a.mp4"]}, ("answer marked as bad", "label")),
    ({"messages": said("<image>x", "y", ""), "images": ["a.jpg"]}, ("only image", "video")),
    ({"messages": said("<video><audio>x", "y", ""), "videos": ["a.mp4"], "audios": ["a.wav"]},
     ("audio beside the video", "videos")),
    ({"messages": said("<video>x", "y", ""), "videos": [["1.jpg", "2.jpg"]]}, ("pictures in place of a video", "videos")),
    ({"messages": said("<video>x", "y", ""), "videos": []}, ("no video", "video")),
    ({"messages": said("<video>x", "y", "")[:1], "videos": ["a.mp4"]}, ("no assistant turn", "messages")),
]  # fmt: skip
MESSAGES = [
    ({"messages": said(part(video="a.mp4", fps=2), [{"type": "text", "text": "One."}], "")},
     {"video": "a.mp4", "caption": "One.", "prompt": "What happens?"}),
    ({"messages": said(part(path="sub\\b.mkv"), "Two.", "")},
     {"video": "sub/b.mkv", "caption": "Two.", "prompt": "What happens?"}),
    ({"messages": said([{"type": "text", "text": "Look:"}, *part(url="a.mp4", video=None)], "Three.", "")},
     {"video": "a.mp4", "caption": "Three.", "prompt": "Look:\nWhat happens?"}),
    ({"messages": said([{"type": "video_url", "video_url": {"url": "FILE://a.mp4"}}], "Four.", "")},
     {"video": "a.mp4", "caption": "Four."}),
    ({"prompt": said(part(video="a.mp4", video_start=0.5, video_end=2), "", "")[:1],
      "completion": said("", "Five.", "")[1:]},
     {"video": "a.mp4", "caption": "Five.", "start": 0.5, "end": 2, "prompt": "What happens?"}),
    ({"prompt": said(part(), "", "")[:1], "chosen": said("", "Six.", "")[1:], "rejected": [], "videos": ["a.mp4"]},
     {"video": "a.mp4", "caption": "Six.", "prompt": "What happens?"}),
    ({"messages": said(part(), "x", "")}, ("no video", "video")),
    ({"messages": said(part(video="a.mp4") + part(video="b.mkv"), "x", "")}, ("more than one video", "video")),
    ({"messages": said([*part(video="a.mp4"), {"type": "image_url", "image_url": {"url": "a.jpg"}}], "x", "")},
     ("image beside the video", "video")),
    ({"messages": said(part(video={"bytes": "AAAA"}), "x", "")}, ("video inside the file", "messages.video")),
    ({"messages": said(part(video="data:video/mp4;base64,AAAA"), "x", "")}, ("video missing", "messages")),
    ({"messages": said([{"type": "hologram", "hologram": 1}], "x", "")}, ("malformed record", "messages[0]")),
    ({"prompt": "Say.", "completion": "x"}, ("no video", "video")),
]  # fmt: skip


@pytest.mark.parametrize("form, cases", [("llava", LLAVA), ("swift", SWIFT), ("messages", MESSAGES)])
def test_chats(tmp_path, form, cases):
    """Each record makes the clip that it is paired with, or is refused by that reason and field; and in every kind of file
    the same: a JSON list on one line and over many, JSONL, objects over lines, the list in an object."""
    videos = files(tmp_path / "v", "a.mp4", "sub/b.mkv")
    records = [record for record, _ in cases]
    clips = [wanted for _, wanted in cases if isinstance(wanted, dict)]
    refused = [wanted for _, wanted in cases if isinstance(wanted, tuple)]
    written = {
        "list.json": json.dumps(records),
        "indented.json": json.dumps(records, indent=2),
        "lines.jsonl": "\ufeff" + "\n\n".join(map(json.dumps, records)),
        "objects.jsonl": "\n".join(json.dumps(record, indent=2) for record in records),
        "wrapped.json": json.dumps({"version": 1, "data": records}),
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found, rejected = imported(form, tmp_path / name, videos)
        assert found == clips, name
        assert [(reason, field) for _, reason, field in rejected if reason != "further turn"] == refused, name
        assert len(rejected) - len(refused) == {"llava": 2, "swift": 1, "messages": 0}[form], name


def test_what_a_chat_leaves_out_is_counted(tmp_path, capsys):
    """Further turns by place, system texts and rejected answers by number."""
    videos, source = files(tmp_path / "v", "a.mp4", "sub/b.mkv"), tmp_path / "swift.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record, _ in SWIFT))
    run_import(Settings("swift", source, videos, tmp_path / "clips.jsonl"), Console(width=100))
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "system texts left out 1" in shown and "rejected answers left out 1" in shown
    assert "rejected: further turn 1" in shown
    (further,) = [r for r in lines(tmp_path / "clips.rejected.jsonl") if r["reason"] == "further turn"]
    assert (further["where"], further["field"], further["found"]) == ("swift.jsonl:3", "response[2]", "And then?")


def test_broken_json_among_chats(tmp_path):
    """A bad line costs that line; in objects over lines, what is behind the break is refused with its beginning."""
    videos, good = files(tmp_path / "v", "a.mp4"), LLAVA[0][0]
    other = good | {"conversations": said("<video>\nWhat?", "Two.")}
    for first in ('{"a": 1} x', '{"video": "a.mp4",', '{"a": "\udca1'):
        text = "\n".join([first, json.dumps(good), json.dumps(other)])
        (tmp_path / "t.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
        clips, rejected = imported("llava", tmp_path / "t.jsonl", videos)
        assert [clip["caption"] for clip in clips] == ["One.", "Two."]
        assert rejected == [("t.jsonl:1", "malformed record", "")]
    (tmp_path / "t.jsonl").write_text(json.dumps(good, indent=1) + "\n{" + json.dumps(other, indent=1))
    clips, rejected = imported("llava", tmp_path / "t.jsonl", videos)
    assert len(clips) == 1 and rejected == [("t.jsonl: element 2", "malformed record", "")]


def test_records(tmp_path):
    """A list of clips keeps the fields of clips.jsonl; others are counted; what is no clip is refused; parquet too."""
    import pyarrow
    import pyarrow.parquet

    videos = files(tmp_path / "v", "a.mp4", "b.mkv")
    good = {"video": "a.mp4", "caption": "He jumps.", "prompt": "<video>\nSay.", "start": 0, "end": 5,
            "keywords": ["jumps"], "key_spans": [[1, 2]]}  # fmt: skip
    records = [good | {"id": 7}, {"video": "b.mp4", "caption": ["One.", "Two."]}, good | {"key_spans": [[1, 2], [2, 3]]},
               {"video": "a.mp4"}, 5, good | {"keywords": ["\ud800"]}, good | {"video": {"path": "b.mkv"}}]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(records))
    clips, rejected = imported("json", tmp_path / "list.json", videos)
    good["prompt"] = "Say."
    assert clips == [good, {"video": "b.mkv", "caption": "One."}, {"video": "b.mkv", "caption": "Two."},
                     good | {"video": "b.mkv"}]  # fmt: skip
    assert rejected == [
        ("list.json: element 3", "not a clip", ""),
        ("list.json: element 4", "malformed record", "caption"),
        ("list.json: element 5", "malformed record", ""),
        ("list.json: element 6", "not a clip", ""),
    ]
    rows = [{"path": {"bytes": b"x" * 9, "path": "a.mp4"}, "text": "Row."}, {"path": {"bytes": b"x"}, "text": "Inside."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = dict(video_column="path", caption_column="text")
    clips, rejected = imported("parquet", tmp_path / "t.parquet", videos, **columns)
    assert clips == [{"video": "a.mp4", "caption": "Row."}]
    assert rejected == [("t.parquet: row 2", "video inside the file", "path")]


# --- A foreign file where clips.jsonl is expected ------------------------------------------------------------------------


def foreign_files(folder: Path) -> dict[str, str]:
    """Files of other forms, and the words of the importer's command that each message must give."""
    import pyarrow
    import pyarrow.parquet

    chat, clips = LLAVA[0][0], [{"video": "a.mp4", "caption": "He jumps."}, {"video": "b.mkv", "caption": "He falls."}]
    named = [{"file_name": "a.mp4", "text": "He jumps.", "split": "train"}] * 3
    texts = {
        "chat.json": (json.dumps([chat] * 2), "llava"),
        "chat.jsonl": (json.dumps(chat) + "\n", "llava"),
        "objects.jsonl": (json.dumps(chat, indent=1) + "\n" + json.dumps(chat, indent=1), "llava"),
        "wrapped.json": (json.dumps({"data": [chat]}, indent=1), "llava"),
        "swift.jsonl": (json.dumps(SWIFT[0][0]), "swift"),
        "query.jsonl": (json.dumps(SWIFT[1][0]), "swift"),
        "trl.jsonl": (json.dumps(MESSAGES[0][0]), "messages"),
        "prompts.jsonl": (json.dumps(MESSAGES[4][0]), "messages"),
        "list.json": (json.dumps(clips, indent=4), "json"),
        "one-line.json": (json.dumps(clips), "json"),
        "lines-in-a-list.json": ("[" + ",\n".join(map(json.dumps, clips)) + "]", "json"),
        "indented.json": (json.dumps(clips[0], indent=1), "json"),
        "named.json": (json.dumps(named), "json", "--video-column file_name --caption-column text"),
        "named.jsonl": ("\n".join(map(json.dumps, named)), "json", "--video-column file_name --caption-column text"),
        "table.csv": ("video,caption\na.mp4,He jumps.\n", "csv"),
        "named.csv": ("\ufeffid;Text;video_path\r\n1;He jumps.;a.mp4\r\n", "csv",
                      "--video-column video_path --caption-column Text"),
        "table.tsv": ("eins\tzwei\na.mp4\tHe jumps.\n", "csv", "--video-column NAME --caption-column NAME\n  (its fields"),
        "charades.csv": (CHARADES_HEADER + "a,b\n", "charades"),
        "sta.txt": ("a 0.0 6.9##he jumps.\n", "charades-sta"),
        "anet.json": (json.dumps({"v_a": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["x"]}}), "activitynet"),
        "vru.json": (json.dumps({"./VRU_videos/S/VRU_1": {"gt": "x"}}), "vru-accident"),
        "dream.jsonl": (json.dumps(dream_messages(1, "x")), "dream-1k"),
        "motion.jsonl": (json.dumps({"video_path": "a.mp4", "motion_caption": "x"}), "motionbench"),
        "ssv2.json": (json.dumps([{"id": "1", "label": "x", "template": "y"}]), "something-something"),
    }  # fmt: skip
    for name, (text, *_) in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(clips), folder / "clips.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat]), folder / "chats.parquet")
    words = {name: [importer, *more] for name, (_, importer, *more) in texts.items()}
    return words | {"clips.parquet": ["parquet"], "chats.parquet": ["llava"]}


def test_a_foreign_file_is_named_with_its_command(tmp_path):
    """One message: what the file is, and a command. The command works as it stands, and what it makes is read."""
    folder = files(tmp_path / "my data", "a.mp4", "b.mkv")
    for name, (importer, *more) in foreign_files(folder).items():
        with pytest.raises(ClipError) as caught:
            load_clips(folder / name)
        message = str(caught.value)
        importers = "python -m data.curation.importers"
        command = f"{importers} {importer} '{folder / name}' --videos '{folder}' --out '{folder}/clips.jsonl'"
        assert command + "".join(f" {m}" for m in more) in message, (name, message)
        assert message.count("\n") <= 6 and f"continue with --data '{folder}/clips.jsonl'" in message
        if importer not in ("json", "csv", "llava", "swift", "messages", "parquet") or "NAME" in message:
            continue
        words = shlex.split(message[message.index("python -m") :].split("\n")[0])[3:]
        run_import(tyro.cli(Settings, args=words), Console(quiet=True))
        clips, problems = load_clips(folder / "clips.jsonl")
        assert clips and not problems and clips[0].caption in ("He jumps.", "One.", "Two.", "Five."), name
        (folder / "clips.jsonl").unlink()
    (folder / "clips.jsonl").write_text("earlier")
    with pytest.raises(
        ClipError, match=r"chat\.clips\.jsonl' --follow-links\nand continue with .*chat\.clips\.jsonl' --root"
    ):
        load_clips(folder / "chat.json", tmp_path, follow_links=True)  # nothing is overwritten


def test_what_is_no_text_is_named(tmp_path):
    """Archives, videos, other data and folders are named, too, and not read line by line."""
    for name, content, message in (
        ("a.jsonl", gzip.compress(b"{}"), "gzip; unpack"),
        ("a.zip", b"PK\x03\x04rest", "zip archive"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.jsonl", b"\0\0\0\x18ftypmp42", "this is a video"),
        ("a.avi", b"RIFF....AVI LIST", "this is a video"),
        ("a.arrow", b"\xff\xff\xff\xff....", "save it as parquet"),
        ("a.bin", b"abc\0\1\2", "no text"),
        ("a.parquet", b"PAR1 cut off", "damaged parquet"),
        ("a.json", b"[1, 2]", "JSON list of int"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ClipError, match=message) as caught:
            load_clips(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ClipError, match=r"this is a folder.*\n.*importers folder"):
        load_clips(tmp_path)


def test_a_bad_first_line_is_not_taken_for_a_foreign_file(tmp_path):
    """Good clips behind a first line of any kind are still read."""
    good, file = json.dumps({"video": "a.mp4", "caption": "x"}), tmp_path / "clips.jsonl"
    for bad in ("[1]", "[", "{", '{"id": 1}', "video, caption", "# a note", '"x"', "null", "{}", '{"video": {}}', "[{}]"):
        file.write_text(f"{bad}\n{good}\n{good}\n")
        clips, problems = load_clips(file)
        assert len(clips) == 2 and len(problems) == 1, bad


def test_scripts_name_a_foreign_file(tmp_path):
    """Curation and benchmarks of one's own clips say the same as the train scripts."""
    from data.benchmarks.questions import load_benchmark
    from data.curation import curate

    files(tmp_path, "a.mp4")
    (tmp_path / "chat.json").write_text(json.dumps([LLAVA[0][0]]))
    for run in (
        lambda: curate.main(curate.Settings(tmp_path / "chat.json", tmp_path / "out"), Console(quiet=True)),
        lambda: load_benchmark("clips", tmp_path / "chat.json"),
    ):
        with pytest.raises(ClipError, match=r"LLaVA conversations; .*\n  python -m data\.curation\.importers llava"):
            run()


# --- Endings, links, paths ------------------------------------------------------------------------------------------------


def test_every_ending_is_taken_and_read(tmp_path):
    """Videos in the containers that people have, made by FFmpeg, from the table to the frames; upper case, too."""
    endings = {"ts": "", "MTS": "-f mpegts", "m2ts": "", "3gp": "-c:v h263 -s 176x144", "mpg": "", "MPEG": "", "vob": "",
               "wmv": "", "asf": "", "flv": "", "f4v": "-c:v libx264", "ogv": "-c:v libtheora", "gif": "", "avi": "",
               "mkv": "", "WebM": "-c:v libvpx", "mov": "", "m4v": "", "mxf": "", "y4m": "-pix_fmt yuv420p", "nut": "",
               "MP4": "", "m2v": "", "qt": "-f mov", "divx": "-f avi", "m4s": "-f mp4", "mk3d": "-f matroska"}  # fmt: skip
    videos = tmp_path / "v"
    videos.mkdir()
    command = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=2", "-threads", "1"]
    for ending, options in endings.items():
        command += [*options.split(), str(videos / f"{ending.lower()}.{ending}")]
    subprocess.run(command, check=True, timeout=60)
    source = tmp_path / "t.csv"
    source.write_text("video,caption\n" + "".join(f"{ending.lower()},He jumps.\n" for ending in endings))
    clips, rejected = imported("csv", source, videos)
    assert rejected == [] and [clip["video"] for clip in clips] == [f"{e.lower()}.{e}" for e in endings]
    for clip in load_clips(tmp_path / "out" / "captions.jsonl", videos)[0]:
        frames = read_frames(clip, 4)
        assert len(frames.pixels) == 4 and abs(frames.duration - 2) < 0.1, clip.video


def test_ids_with_dots_and_several_endings(tmp_path):
    """A dot in an id is not an ending; sounds and previews beside a video are not meant."""
    videos = files(tmp_path / "v", "scene.264.mp4", "scene.mp4", "b.mp4", "b.gif", "b.ogg", "c.gif", "d.ts", "d.gif")
    source = tmp_path / "t.csv"
    source.write_text("video,caption\nscene.264,x\nscene,y\nb,x\nb.gif,y\nc,x\nd,x\n")
    clips, rejected = imported("csv", source, videos)
    assert [clip["video"] for clip in clips] == ["scene.264.mp4", "scene.mp4", "b.mp4", "b.gif", "c.gif"]
    assert rejected == [("t.csv:7", "several videos", "video")]


def hub_cache(folder: Path) -> tuple[Path, Path]:
    """A data set as a hub cache holds it: every file a link to a blob without an ending. Its folder and the blob."""
    root, blobs = folder / "snapshots" / "x", folder / "blobs"
    for path in (root / "sub", blobs):
        path.mkdir(parents=True)
    make = ["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=1", "-f", "mp4"]
    subprocess.run([*make, str(blobs / "0123abcd")], check=True, timeout=60)
    (root / "a.mp4").symlink_to("../../blobs/0123abcd")
    (root / "sub" / "b.mp4").symlink_to("../../../blobs/0123abcd")
    (root / "more").symlink_to("../../blobs")
    (root / "again").symlink_to("../x")
    return root, blobs / "0123abcd"


def test_links_of_a_hub_cache(tmp_path):
    """A link that leaves the root is named as a link; --follow-links takes it, as a path below the root, and it decodes."""
    root, blob = hub_cache(tmp_path)
    file = root / "clips.jsonl"
    paths = ("a.mp4", "sub/b.mp4", "more/0123abcd", "../x/a.mp4", "../../blobs/0123abcd", "more/../../outside.mp4")
    file.write_text("".join(json.dumps({"video": path, "caption": path}) + "\n" for path in paths))
    with pytest.raises(ClipError, match=r"it is a link that leaves the root .*--follow-links"):
        load_clips(file)
    clips, problems = load_clips(file, follow_links=True)
    assert [clip.caption for clip in clips] == list(paths[:4]) and len(problems) == 2
    assert all("leaves the root" in problem and "is a link" not in problem for problem in problems)
    assert clips[0].video == root.resolve() / "a.mp4" and clips[2].video == root.resolve() / "more" / "0123abcd"
    wanted = read_frames(Clip(blob, "", "blob"), 4).pixels
    assert all(torch.equal(read_frames(clip, 4).pixels, wanted) for clip in clips)
    file.write_text('{"video": "blobs/0123abcd", "caption": "x"}\n')
    assert load_clips(file, tmp_path)[0][0].video == blob.resolve()  # no link at all, and no ending


def test_links_in_importers_and_curation(tmp_path):
    """Importers and curation name the links, and follow them where they are told to; circles of links end."""
    from data.curation import curate

    root, blob = hub_cache(tmp_path / "cache")
    source, quiet = tmp_path / "t.csv", Console(quiet=True)
    rows = "a,He jumps.\nsub/b.mp4,He falls.\nmore/0123abcd,He runs.\nb,He falls.\n"
    source.write_text("video,caption\n" + rows)
    with pytest.raises(ClipError, match=r"its 3 links leave it.*--follow-links"):
        run_import(Settings("csv", source, root, tmp_path / "clips.jsonl"), quiet)
    (root / "c.mp4").write_bytes(blob.read_bytes())
    source.write_text("video,caption\n" + rows + "c,He waits.\n")
    run_import(Settings("csv", source, root, tmp_path / "clips.jsonl"), quiet)
    assert [clip["video"] for clip in lines(tmp_path / "clips.jsonl")] == ["c.mp4"]
    fixes = [r["fix"] for r in lines(tmp_path / "clips.rejected.jsonl")]
    assert len(fixes) == 4 and all("link that leaves" in fix and "--follow-links" in fix for fix in fixes)
    run_import(Settings("csv", source, root, tmp_path / "clips.jsonl", follow_links=True), quiet)
    found = lines(tmp_path / "clips.jsonl")
    assert [clip["video"] for clip in found] == ["a.mp4", "sub/b.mp4", "more/0123abcd", "c.mp4"]  # b is the same clip

    captions = [clip | {"keywords": ["jumps"], "caption": f"{i} jumps"} for i, clip in enumerate(found)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in captions))
    for name, counted in (("no", 3), ("yes", 0)):
        s = curate.Settings(tmp_path / "captions.jsonl", tmp_path / name, root, workers=0, follow_links=name == "yes")
        counts = curate.main(s, quiet)
        assert counts["malformed"] == counted and counts["unreadable"] == 0 and counts.total() == 4


def test_links_in_benchmarks(tmp_path):
    """A benchmark's videos may be links with --follow-links; another ending than the authors' is found."""
    from data.benchmarks.questions import load_benchmark

    root, blob = hub_cache(tmp_path / "cache")
    (root / "MetaData" / "DoTA").mkdir(parents=True)
    (root / "VRU_videos" / "DoTA").mkdir(parents=True)
    entries = {f"./VRU_videos/DoTA/VRU_{i}": {"gt": "x"} for i in (1, 2)}
    (root / "MetaData" / "DoTA" / "DoTA_Dense_Caption.json").write_text(json.dumps(entries))
    (root / "VRU_videos" / "DoTA" / "VRU_1.mp4").symlink_to(tmp_path / "cache" / "blobs" / "0123abcd")
    (root / "VRU_videos" / "DoTA" / "VRU_2.MKV").write_bytes(blob.read_bytes())
    benchmark = load_benchmark("vru-accident-captions", root)
    assert [q.video.name for q in benchmark.questions] == ["VRU_2.MKV"]
    (problem,) = [problem for problem in benchmark.problems if "VRU_1" in problem]
    assert "it is a link that leaves the root" in problem and "--follow-links" in problem
    benchmark = load_benchmark("vru-accident-captions", root, follow_links=True)
    assert [q.video.name for q in benchmark.questions] == ["VRU_1.mp4", "VRU_2.MKV"]
    (root / "clips.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n')
    assert [q.id for q in load_benchmark("clips", root, follow_links=True).questions] == ["a.mp4"]


def test_paths_of_all_kinds(tmp_path):
    """Whole paths, addresses and Windows' paths: taken if they are below the root, else one clear message."""
    root = files(tmp_path / "my videos", "a.mp4", "sub/b.mp4", "50%.mp4", "~c.mp4", "odd\\name.mp4", "100%25.mp4")
    taken = {
        "a.mp4": "a.mp4",
        "./sub/../a.mp4": "a.mp4",
        "sub\\b.mp4": "sub/b.mp4",
        str(root / "a.mp4"): "a.mp4",
        f"file://{root}/a.mp4": "a.mp4",
        f"file://localhost{root}/sub/b.mp4".replace(" ", "%20"): "sub/b.mp4",
        "file://50%.mp4": "50%.mp4",
        "file://100%25.mp4": "100%25.mp4",
        "~c.mp4": "~c.mp4",
        "odd\\name.mp4": "odd\\name.mp4",
        "gone.mp4": "gone.mp4",
    }
    for path, wanted in taken.items():
        assert inside_root(path, root) == root.resolve() / wanted, path
    for path, message in {
        "../a.mp4": "leaves the root",
        "sub/../../a.mp4": "leaves the root",
        f"{root}2/a.mp4": "leaves the root",
        "/etc/hostname": "leaves the root",
        "file:///etc/hostname": "leaves the root",
        "..\\a.mp4": "leaves the root",
        "C:\\videos\\a.mp4": "Windows disk",
        "\\\\server\\a.mp4": "leaves the root",
        "~/a.mp4": "begins with ~",
        "~anna/a.mp4": "begins with ~",
        "http://x.org/a.mp4": "web address; download",
        "s3://bucket/a.mp4": "web address; download",
        "data:video/mp4;base64,AAAA": "the file itself",
        "a\0b": "not a path",
        "x" * 300 + ".mp4": "not a path",
        "\ud800.mp4": "not a path",
    }.items():
        for follow_links in (False, True):
            with pytest.raises(PathError, match=message):
                inside_root(path, root, follow_links)
    link = tmp_path / "link to root"
    link.symlink_to(root)
    assert inside_root("a.mp4", link) == inside_root(str(root / "a.mp4"), link) == root.resolve() / "a.mp4"
    (root / "self.mp4").symlink_to("self.mp4")
    (root / "inner.mp4").symlink_to("sub/b.mp4")
    assert inside_root("inner.mp4", root) == root.resolve() / "sub/b.mp4"
    assert not inside_root("self.mp4", root).exists()


# --- Files that are something else, and the command -----------------------------------------------------------------------


BROKEN_FILES = [
    ("activitynet", b"[1]", "found a JSON list; expected ActivityNet Captions"),
    ("activitynet", b'{"v_a": ', "not readable as JSON .*; expected ActivityNet Captions"),
    ("activitynet", b"\xff\xfe{}", "not readable as JSON .*; expected ActivityNet Captions"),
    ("activitynet", b'{"v_a": ' + b"1" * 5000 + b"}", "not readable as JSON .*; expected ActivityNet Captions"),
    ("activitynet", b"[" * 100_000, "not readable as JSON .*; expected ActivityNet Captions"),
    ("vru-accident", b'"x"', "found a JSON str; expected VRU-Accident"),
    ("something-something", b"", "neither JSONL nor a JSON list; expected Something-Something"),
    ("something-something", b"[{", "not readable as JSON"),
    ("dream-1k", b"video,caption\n", "neither JSONL nor a JSON list; expected DREAM-1K"),
    ("motionbench", b'{"a":\n1}\n', "no clip could be imported as motionbench; see .*rejected.jsonl"),
    ("charades", b"id,subject\n", "expected columns id, descriptions"),
    ("charades-sta", b"{}\n", "no clip could be imported as charades-sta"),
    ("csv", b"", "expected columns video, caption"),
    ("csv", b"\xff\xfev\0i\0", "expected columns video, caption"),
    ("folder", b"", "no clip could be imported as folder"),
]


@pytest.mark.parametrize("form, content, message", BROKEN_FILES)
def test_broken_files(tmp_path, form, content, message):
    """A file that is something else is one error of one line, and what an earlier import wrote stays."""
    videos, out = files(tmp_path / "v", "a.mp4"), tmp_path / "captions.jsonl"
    out.write_text("earlier\n")
    source = tmp_path / "source.txt"
    source.write_bytes(content)
    with pytest.raises(ClipError, match=message) as caught:
        run_import(Settings(form, source, videos, out), Console(quiet=True))
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert out.read_text() == "earlier\n" and not list(tmp_path.glob("*.part"))


def test_wrong_places(tmp_path):
    """No source, no videos, and an output that is the source."""
    videos, source = files(tmp_path / "v", "a.mp4"), tmp_path / "captions.jsonl"
    console = Console(quiet=True)
    for wrong in (source, videos):
        with pytest.raises(ClipError, match="no such file; expected the annotation file of csv"):
            run_import(Settings("csv", wrong, videos, tmp_path / "out.jsonl"), console)
    source.write_text("video,caption\na,x\n")
    with pytest.raises(ClipError, match="would overwrite the source"):
        run_import(Settings("csv", source, videos, source), console)
    for folder in (tmp_path / "none", files(tmp_path / "t", "a.txt")):
        with pytest.raises(ClipError, match="no folder with video files"):
            run_import(Settings("csv", source, folder, tmp_path / "out.jsonl"), console)
    assert source.read_text() == "video,caption\na,x\n"


def test_command(tmp_path):
    """The command line: a summary and exit code 0, or one line and exit code 1."""
    files(tmp_path / "v", "a.mp4")
    (tmp_path / "[b]t.csv").write_text("video,caption\na,Jumps.\nb,x\n")  # rich must not read it as markup
    env = os.environ | {"PYTHONPATH": str(HERE), "COLUMNS": "120"}

    def run(form: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "data.curation.importers",
            form,
            "[b]t.csv",
            "--videos",
            "v",
            "--out",
            "new/clips.jsonl",
        ]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    done = run("csv")
    assert done.returncode == 0, done.stderr
    for words in (
        "csv: [b]t.csv",
        "imported 1",
        "rejected: video missing 1",
        "videos with a clip 1 of 1",
        "new/clips.rejected.jsonl",
    ):
        assert words in " ".join(done.stdout.replace("│", " ").split())
    assert lines(tmp_path / "new/clips.jsonl") == [{"video": "a.mp4", "caption": "Jumps."}]
    (rejected,) = lines(tmp_path / "new/clips.rejected.jsonl")
    assert rejected["where"] == "[b]t.csv:3" and rejected["found"] == "b" and ".mp4" in rejected["fix"]
    done = run("dream-1k")
    assert done.returncode == 1 and done.stderr.startswith("error: [b]t.csv: neither JSONL")
    assert done.stderr.count("\n") == 1 and set(IMPORTERS) == set(get_args(Format))
