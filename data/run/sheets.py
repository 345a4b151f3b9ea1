"""What people look at: contact sheets of full video and twin, and descriptions of both side by side."""

import html
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from rich.text import Text

import vp
from data.clips import named
from data.examples import Preparation, make_example
from data.look import Look
from data.video import Clip, Frames

FULL_COLOUR, TWIN_COLOUR = "#1a9850", "#d73027"


def printable(text: str) -> str:
    """One line without control characters, which a sampled text may hold and a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def warn(console: Console, what: str, text: object) -> None:
    """Print a line that begins with a word in yellow; what follows is text, whatever it holds."""
    # As Text, not as markup: rich makes an emoji of the ":100:" in "clips.jsonl:100: ..."
    console.print(Text.assemble((what, "yellow"), " ", printable(str(text))), highlight=False)


def safe_name(text: str) -> str:
    """A short name for a file, of letters, digits and dashes.

    >>> safe_name("Ein Mädchen/../läuft 🙂.mp4"), safe_name("...")
    ('Ein-M-dchen-l-uft-mp4', 'clip')
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", text)[:40].strip("-") or "clip"


def draw_sheets(clips: Sequence[Clip], preparation: Preparation, folder: Path, console: Console) -> None:
    """A contact sheet of each clip, called by its number and a short name; what cannot be drawn is named, and no more."""
    for number, clip in enumerate(clips):
        try:
            with named(clip, "drawing failed"):
                look = preparation.look(clip)
                example = make_example(clip, look, preparation)
                contact_sheet(
                    clip, look.as_frames(), example, folder / f"sheet-{number:03d}-{safe_name(clip.video.stem)}.png"
                )
        except Exception as error:
            warn(console, "no sheet", error)


def contact_sheet(clip: Clip, frames: Frames, example: vp.Example, path: Path, columns: int = 16) -> Path:
    """Draw the sampled frames of a clip and of its twin as a PNG; long clips are thinned to `columns` slots at most.

    Key slots are framed in green in the full row; in the twin's row what replaces them is framed in red.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    num_slots = example.num_slots
    slots = rearrange(frames.pixels, "(s f) c h w -> s f h w c", s=num_slots)
    key = torch.zeros(num_slots, dtype=torch.bool)
    for keyword in example.keywords:
        key |= keyword.slots
    source = torch.arange(num_slots) if example.source is None else example.source
    shown = torch.arange(num_slots)
    if num_slots > columns // 2:  # both frames of a slot fit only in a short clip: show the first of each
        slots = slots[:, :1]
        shown = torch.linspace(0, num_slots - 1, min(columns, num_slots)).round().long()
    per_slot = slots.shape[1]
    width = len(shown) * per_slot
    height, wide = slots.shape[2:4]
    shape = min(4.0, max(0.25, height / wide))  # a picture of a strip is drawn smaller in its frame
    figure, axes = plt.subplots(2, width, figsize=(width * 1.0, 2.2 * shape + 0.9), squeeze=False)
    step = len(frames.timestamps) // num_slots
    for row, (label, order, colour) in enumerate((("full", shown, FULL_COLOUR), ("twin", source[shown], TWIN_COLOUR))):
        for i, (place, slot) in enumerate(zip(shown.tolist(), order.tolist())):
            for f in range(per_slot):
                axis = axes[row][i * per_slot + f]
                axis.imshow(slots[slot, f].numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                for spine in axis.spines.values():
                    spine.set(color=colour if key[place] else "#cccccc", linewidth=3 if key[place] else 0.5)
                if row == 0:
                    axis.set_title(f"{frames.timestamps[place * step + f]:.2f}s", fontsize=7)
        axes[row][0].set_ylabel(label, fontsize=9)
    note = "" if example.source is not None else "  (no twin: no key slot, or nothing else)"
    keywords = textwrap.shorten(printable(", ".join(clip.keywords)) or "none", 300, placeholder=" ...")
    caption = textwrap.shorten(printable(clip.caption[:1000]), 600, placeholder=" ...")
    lines = textwrap.wrap(f"keywords: {keywords}{note}", 20 + 9 * width) + textwrap.wrap(caption, 20 + 9 * width)
    room = 0.18 * len(lines)  # inches for the words
    figure.set_figheight(figure.get_figheight() + max(0.0, room - 0.5))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=8, va="bottom", parse_math=False)  # "$" is a dollar sign
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # about characters that the font lacks
            figure.tight_layout(rect=(0, room / figure.get_figheight(), 1, 1), h_pad=0.4, w_pad=0.1)
            figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
    return path


def draw_look(look: Look, path: Path, columns: int = 12) -> Path:
    """Draw where a video was looked at: the skim's curve with the windows, and some of the frames, those of windows framed.

    Each window brings its middle frame, and the context what is left of `columns` pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    numbers = look.run_numbers()
    middles = [(f.timestamps[len(f.timestamps) // 2], f.pixels[len(f.timestamps) // 2], True)
               for f, n in zip(look.runs, numbers) if n]  # fmt: skip
    others = [
        (t, picture, False) for f, n in zip(look.runs, numbers) if not n for t, picture in zip(f.timestamps, f.pixels)
    ]
    room = max(0, columns - len(middles))
    places = torch.linspace(0, len(others) - 1, min(room, len(others))).round().long().tolist() if others else []
    shown = sorted([*middles[:columns], *(others[i] for i in places)], key=lambda picture: picture[0])
    figure = plt.figure(figsize=(1.0 * columns, 3.4))
    grid = figure.add_gridspec(2, len(shown), height_ratios=(2, 1))
    axis = figure.add_subplot(grid[0, :])
    if look.curve is not None:
        axis.plot(look.times, look.curve.tolist(), color="#444444", linewidth=0.8)
    for start, end in look.spans:
        axis.axvspan(start, end, color=FULL_COLOUR, alpha=0.35)
    axis.plot(look.timestamps, [0.0] * len(look.timestamps), "|", color="black", markersize=6)
    axis.set(xlim=(0, look.runs[0].duration), xlabel="seconds", ylabel="something comes and goes", title=look.note)
    for i, (second, picture, in_window) in enumerate(shown):
        axis = figure.add_subplot(grid[1, i])
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{second:.1f}s", fontsize=7)
        for spine in axis.spines.values():
            spine.set(color=FULL_COLOUR if in_window else "#cccccc", linewidth=3 if in_window else 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
    return path


@dataclass
class RolloutGroup:
    """A prompt's descriptions: of the full video with their rewards, of the twin with their quality."""

    clip: Clip
    full: list[str]
    rewards: list[float]
    twin: list[str]
    twin_quality: list[float]

    @classmethod
    def of(cls, clip: Clip, texts: Sequence[str], rewards: vp.Rewards) -> "RolloutGroup":
        """From a prompt's descriptions, those of the full video first, and their rewards."""
        G = len(rewards.reward)
        return cls(clip, texts[:G], rewards.reward.tolist(), texts[G:], rewards.quality[G:].tolist())


def shade(value: float, low: float, high: float) -> tuple[int, int, int]:
    """Red for the lowest reward of a group, green for the highest, yellow in the middle or if all are equal."""
    t = 0.5 if high - low < 1e-6 else (value - low) / (high - low)
    return round(255 * min(1, 2 - 2 * t) * 0.85), round(255 * min(1, 2 * t) * 0.7), 40


def rollout_table(groups: Sequence[RolloutGroup], step: int) -> Table:
    """Descriptions of full video and twin side by side, coloured by reward, for the terminal."""
    table = Table(title=f"step {step}: full video, reward first | twin, quality first", show_lines=False)
    table.add_column("full video", ratio=1)
    table.add_column("twin", ratio=1)
    for group in groups:
        words = Text(printable(f"caption: {group.clip.caption}"), style="bold")
        table.add_row(words, Text(printable(f"keywords: {', '.join(group.clip.keywords) or 'none'}"), style="bold"))
        ranked = sorted(zip(group.rewards, group.full), reverse=True)
        beside = sorted(zip(group.twin_quality, group.twin), reverse=True)
        for i in range(max(len(ranked), len(beside))):
            cells = [Text(""), Text("")]
            if i < len(ranked):
                r, g, b = shade(ranked[i][0], min(group.rewards), max(group.rewards))
                cells[0] = Text(f"{ranked[i][0]:.2f}  {printable(ranked[i][1])}", style=f"rgb({r},{g},{b})")
            if i < len(beside):
                cells[1] = Text(f"{beside[i][0]:.2f}  {printable(beside[i][1])}")
            table.add_row(*cells)
        table.add_section()
    return table


STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{width:100%;border-collapse:collapse;margin:.4em 0 1.6em}
td{width:50%;vertical-align:top;padding:.25em .6em;border-bottom:1px solid #eee}th{text-align:left;padding:.25em .6em}
td b{display:inline-block;min-width:3em}mark{background:#fff2a8}"""


def rollout_page(path: Path, pages: Sequence[tuple[int, Sequence[RolloutGroup]]]) -> Path:
    """The same as one HTML file without network, newest step first; keywords are marked."""

    def words(text: str, keywords: Sequence[str]) -> str:
        longest_first = sorted((k.strip() for k in keywords), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})", printable(text), flags=re.IGNORECASE)
        marked = (html.escape(p) if i % 2 == 0 else f"<mark>{html.escape(p)}</mark>" for i, p in enumerate(pieces))
        return "".join(marked) or "<i>(nothing)</i>"

    out = [f"<!doctype html><meta charset=utf-8><title>Rollouts</title><style>{STYLE}</style><h1>Full video and twin</h1>",
           "<p>Left: descriptions of the full video, best reward first, from green to red within the group. "
           "Right: of its twin, with their quality. Keywords are marked.</p>"]  # fmt: skip
    for step, groups in reversed(list(pages)):
        out.append(f"<h2>step {step}</h2>")
        for group in groups:
            keywords = group.clip.keywords
            out.append(f"<p><b>{words(group.clip.caption, keywords)}</b><br><small>{html.escape(group.clip.where)}; "
                       f"keywords: {html.escape(', '.join(keywords)) or 'none'}</small></p>")  # fmt: skip
            out.append("<table><tr><th>full video: reward</th><th>twin: quality</th></tr>")
            left = sorted(zip(group.rewards, group.full), reverse=True)
            right = sorted(zip(group.twin_quality, group.twin), reverse=True)
            for i in range(max(len(left), len(right))):
                cells = ["", ""]
                if i < len(left):
                    colour = "rgb({},{},{})".format(*shade(left[i][0], min(group.rewards), max(group.rewards)))
                    cells[0] = f"<b style=color:{colour}>{left[i][0]:.2f}</b> {words(left[i][1], keywords)}"
                if i < len(right):
                    cells[1] = f"<b>{right[i][0]:.2f}</b> {words(right[i][1], keywords)}"
                out.append(f"<tr><td>{cells[0]}</td><td>{cells[1]}</td></tr>")
            out.append("</table>")
    path.write_text("\n".join(out) + "\n", "utf-8", "backslashreplace")
    return path


class RolloutPage:
    """What stage 2 shows of a run: some descriptions in the terminal, all looks at them in rollouts.html."""

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self.groups: list[RolloutGroup] = []  # of the next look: the first prompts since the last one
        self.looks: list[tuple[int, list[RolloutGroup]]] = []

    def add(self, group: RolloutGroup) -> None:
        """Keep a prompt's descriptions, of the first four."""
        if len(self.groups) < 4:
            self.groups.append(group)

    def show(self, step: int) -> None:
        """Print one prompt, and write the page again."""
        self.console.print(rollout_table(self.groups[:1], step))
        self.looks.append((step, self.groups))
        rollout_page(self.path, self.looks)
        self.groups = []
