"""Pages and tables of rollouts: everything in its place, and nothing that a sampled text holds can break them."""

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoProcessor

from data.clips import load_clips
from data.examples import Preparation
from data.run import sheets
from data.run.sheets import RolloutGroup, draw_sheets, rollout_page, rollout_table, shade, warn
from data.video import Clip

EVIL = "<script>alert(1)</script> \x1b[31m red\x00 \n turns black"
GROUP = RolloutGroup(
    Clip(Path("a.mp4"), "A <b> circle. It turns black.", "c.jsonl:1", keywords=["turns black"]),
    ["good, turns black", EVIL, ""], [1.9, 0.4, 0.0], ["twin says", "more"], [0.7, 0.8],
)  # fmt: skip


def test_shade_runs_from_red_to_green():
    """Lowest red, highest green, all equal yellow."""
    low, high, equal = shade(0, 0, 1), shade(1, 0, 1), shade(5, 5, 5)
    assert low[0] > 200 > low[1] and high[1] > 150 > high[0] and equal[0] > 150 < equal[1]


def test_page_escapes_and_orders(tmp_path):
    """Best reward first, both columns, keywords marked, newest step first; sampled tags are text."""
    page = rollout_page(tmp_path / "p.html", [(1, [GROUP]), (2, [GROUP])]).read_text()
    assert page.index("step 2") < page.index("step 1")
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page and "\x00" not in page
    assert "good, <mark>turns black</mark>" in page and "<i>(nothing)</i>" in page and "A &lt;b&gt; circle" in page
    first = page[: page.index("step 1")]
    assert first.index(">1.90<") < first.index(">0.40<") < first.index(">0.00<") and first.index(">0.80<") < first.index(
        ">0.70<"
    )


def test_table_prints_no_control_characters(tmp_path):
    """A terminal gets text only, markup in it is not obeyed."""
    group = RolloutGroup(GROUP.clip, [EVIL, "[red]x[/red]"], [1.0, 0.0], [], [])
    console = Console(file=(tmp_path / "out").open("w+"), width=120, color_system=None)
    console.print(rollout_table([group], 3))
    console.file.seek(0)
    shown = console.file.read()
    assert "[red]x[/red]" in shown and "\x1b" not in shown and "\x00" not in shown


def test_marks_in_a_page_never_cut_a_tag(tmp_path):
    """Keywords that are names of tags or of entities, and special signs, are marked in the text and nowhere else."""
    group = replace(
        GROUP, clip=replace(GROUP.clip, caption="A & B (mark)", keywords=["mark", "amp", "B (", "&"]), full=["a"]
    )
    page = rollout_page(tmp_path / "p.html", [(1, [group])]).read_text()
    assert "A <mark>&amp;</mark> <mark>B (</mark><mark>mark</mark>)" in page


HOSTILE = "A man pays $\\frac{$ [bold] [/] jumps \N{GRINNING FACE} \u8a9e" + "\x1b[31m\x00" + " word" * 2000


@pytest.fixture
def drawn(world, qwen2_5, tmp_path):
    """Draw sheets of clips, and return their names and what the console shows; warnings are errors."""

    def draw(clips) -> tuple[list[str], str]:
        console = Console(file=(tmp_path / "shown").open("w+"), width=200)
        with warnings.catch_warnings(action="error"):
            draw_sheets(clips, Preparation(AutoProcessor.from_pretrained(qwen2_5), 4), tmp_path / "out", console)
        console.file.seek(0)
        return sorted(p.name for p in (tmp_path / "out").iterdir()), console.file.read()

    return draw


def test_sheets_of_any_clip(world, drawn, tmp_path):
    """Long and odd names, two parts of one file, words that matplotlib or rich would obey: a sheet each, its name short."""
    clip = load_clips(world / "train.jsonl")[0][0]
    names = ["v" * 248 + ".mp4", "a.b [bold] \N{GRINNING FACE}.mp4", "\N{GRINNING FACE}.mp4"]
    for name in names:
        shutil.copy(clip.video, tmp_path / name)
    clips = [replace(clip, video=tmp_path / name) for name in names]
    parts = [replace(clip, start=start, end=start + 1, key_spans=None) for start in (0, 1)]
    clips = [*clips, *parts, replace(clip, caption=HOSTILE, keywords=[HOSTILE[:60]] * 12, key_spans=[[[0.5, 1]]] * 12)]
    files, shown = drawn(clips)
    assert not shown and len(files) == 6 and [f[:9] for f in files] == [f"sheet-{i:03d}" for i in range(6)]
    assert all(f.isascii() and len(f) < 60 and f.count(".") == 1 for f in files)
    assert files[1] == "sheet-001-a-b-bold.png" and files[2] == "sheet-002-clip.png"
    assert max(Image.open(tmp_path / "out" / files[-1]).size) < 3000  # two thousand words do not make a tower


def test_a_sheet_that_cannot_be_drawn_stops_nothing(world, drawn, monkeypatch):
    """A lost file, or any fault while drawing, is a line; the next sheet is drawn."""
    clips = load_clips(world / "train.jsonl")[0][:3]
    clips[0].video, real = world / "gone[/].mp4", sheets.contact_sheet

    def contact_sheet(clip, *more):
        if clip is clips[1]:
            raise OSError(28, "No space left on device")
        return real(clip, *more)

    monkeypatch.setattr(sheets, "contact_sheet", contact_sheet)
    files, shown = drawn(clips)
    assert len(files) == 1 and shown.count("no sheet") == 2
    assert "gone[/].mp4" in shown and "No space left" in shown and clips[1].where in shown.replace(os.linesep, "")


def test_markup_in_a_message_is_text(tmp_path):
    """What looks like a style, or ends one, is printed as it is."""
    console = Console(file=(tmp_path / "out").open("w+"), width=200)
    warn(console, "skipped", "clips.jsonl:1: [bold]x[/] [/red] \\[a] \x1b[31m")
    console.file.seek(0)
    assert console.file.read().rstrip() == "skipped clips.jsonl:1: [bold]x[/] [/red] \\[a]  [31m"
