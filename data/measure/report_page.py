"""Two pictures of a report: rare events named against events claimed, and what the models say of twelve clips."""

import base64
import html
import io
import json
from collections.abc import Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data.video import Clip, read_frames

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
img{width:100%;image-rendering:pixelated}table{border-collapse:collapse;margin:.4em 0 2em;width:100%}
td,th{text-align:left;vertical-align:top;padding:.2em .6em;border-bottom:1px solid #eee}
.right{color:#1a7f37}.wrong{color:#cf222e}"""


@lru_cache
def lines_of(annotations: str) -> list[str]:
    """The lines of an annotation file, read once."""
    with open(annotations, encoding="utf-8") as file:
        return list(file)


def line_of(row: Mapping) -> dict:
    """The annotation line of a row of results, whose "clip" is FILE:LINE."""
    annotations, _, number = row["clip"].rpartition(":")
    return json.loads(lines_of(annotations)[int(number) - 1])


def claimed(results: Mapping) -> float:
    """The share of twins and quiet clips of which an event is claimed."""
    values = [r["twin scores"]["event claimed"] for r in results["rows"] if "twin scores" in r]
    values += [r["scores"]["event claimed"] for r in results["rows"] if "event claimed" in r["scores"]]
    return sum(values) / len(values)


def draw_habits(runs: Mapping[str, Mapping[int, Path]], path: Path) -> Path:
    """A point a run: rare events named, against events claimed that are not there; an arrow from stage 1 to stage 2."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    points = {}
    for title, of_seed in runs.items():
        results = {seed: json.loads((run / "results.json").read_text()) for seed, run in of_seed.items()}
        points[title] = {seed: (claimed(r), r["full"]["rare event named"]) for seed, r in results.items()}
        axis.scatter(*zip(*points[title].values()), s=45, label=title, zorder=3)
    first, second = (
        next((t for t in points if "(default)" in t and ("stage 2" in t) == late), None) for late in (False, True)
    )
    for seed in points.get(second, {}):
        style = dict(arrowstyle="->", color="#888888", shrinkA=4, shrinkB=4)
        axis.annotate("", points[second][seed], points[first][seed], arrowprops=style)
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="event claimed that is not there", ylabel="rare event named")
    axis.set_title("Better is up and to the left. A point is a run.", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def colour_words(text: str, reference: str) -> str:
    """A description as HTML: words that the right caption has in their place green, others red.

    >>> colour_words("A red cross.", "A red circle.")
    '<span class=right>A</span> <span class=right>red</span> <span class=wrong>cross.</span>'
    """
    words, wanted = text.split(), reference.split()
    right = set()
    for block in SequenceMatcher(None, words, wanted, autojunk=False).get_matching_blocks():
        right.update(range(block.a, block.a + block.size))
    marked = (f"<span class={'right' if i in right else 'wrong'}>{html.escape(w)}</span>" for i, w in enumerate(words))
    return " ".join(marked) or "<i>(nothing)</i>"


def film_strip(video: Path) -> str:
    """All sampled frames of a clip in a row, as the address of an embedded PNG."""
    frames = read_frames(Clip(video, "", str(video)), 16).pixels.numpy().transpose(0, 2, 3, 1)  # (F, H, W, C)
    strip = np.concatenate([np.pad(frame, ((0, 0), (0, 2), (0, 0)), constant_values=255) for frame in frames], 1)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(runs: Mapping[str, Path], path: Path, count: int = 12) -> Path:
    """The first clips of the test split, their frames, and what each run says of the clip and of its twin."""
    results = {title: json.loads((run / "results.json").read_text()) for title, run in runs.items()}
    rows = {title: {row["clip"]: row for row in r["rows"]} for title, r in results.items()}
    out = [
        f"<!doctype html><meta charset=utf-8><title>Descriptions</title><style>{STYLE}</style><h1>What the models say</h1>",
        "<p>Words in their right place are <span class=right>green</span>, others <span class=wrong>red</span>. "
        "A twin shows no event: the right words are those of the still scene.</p>",
    ]
    for clip in list(next(iter(rows.values())))[:count]:
        some = [(title, of_clip[clip]) for title, of_clip in rows.items() if clip in of_clip]
        line = line_of(some[0][1])
        out.append(f"<p><b>{html.escape(line['caption'])}</b> <small>({line['truth'].get('kind', '')})</small></p>")
        out.append(
            f'<img src="{film_strip(Path(some[0][1]["video"]))}"><table><tr><th></th><th>video</th><th>twin</th></tr>'
        )
        for title, row in some:
            cells = [colour_words(row["description"], line["caption"]), ""]
            if "twin description" in row:
                cells[1] = colour_words(row["twin description"], line["truth"]["static"])
            out.append(f"<tr><td>{html.escape(title)}</td><td>{cells[0]}</td><td>{cells[1]}</td></tr>")
        out.append("</table>")
    path.write_text("\n".join(out) + "\n")
    return path
