"""Importers: each format in its official form, with its odd cases, against lines written by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from data.clips import ClipError, load_clips
from data.importers import IMPORTERS, Format, Settings, run_import

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
    assert all(set(r) == {"where", "reason", "field", "found", "mend"} and r["mend"] for r in rejected)
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
        command = [sys.executable, "-m", "data.importers", form, "[b]t.csv", "--videos", "v", "--out", "new/clips.jsonl"]
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
    assert rejected["where"] == "[b]t.csv:3" and rejected["found"] == "b" and ".mp4" in rejected["mend"]
    done = run("dream-1k")
    assert done.returncode == 1 and done.stderr.startswith("error: [b]t.csv: neither JSONL")
    assert done.stderr.count("\n") == 1 and set(IMPORTERS) == set(get_args(Format))
