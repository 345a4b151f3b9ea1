"""Pages and tables of rollouts: everything in its place, and nothing that a sampled text holds can break them."""

from pathlib import Path

from rich.console import Console

from data.clips import Clip
from data.sheets import RolloutGroup, rollout_page, rollout_table, shade

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
