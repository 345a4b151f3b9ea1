"""The page that curation ends with: one HTML file that needs no network; looks at records, decodes a sample of clips."""

import html
import json
import math
import random
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import vp
from data import motion
from data.clips import parse_line
from data.run.sheets import contact_sheet
from data.video import Frames, read_frames

DURATIONS = (3.0, 6.0, 12.0, 30.0, 60.0, math.inf)


def group_of(record: dict) -> tuple[str, str]:
    """The quota that a clip counts in: its first action, and its duration."""
    top = next(d for d in DURATIONS if record["duration"] < d)
    return record["lemmas"][record["kept"][0]], f"< {top:g} s" if math.isfinite(top) else f">= {DURATIONS[-2]:g} s"


def records_of(parts: Sequence[Path]) -> Iterator[dict]:
    """All records, one at a time."""
    for path in parts:
        with path.open(encoding="utf-8") as f:
            yield from map(json.loads, f)


STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}
h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:left}
td.n{text-align:right}.bars td:last-child div{background:#3182bd;height:.9em}figure{margin:2em 0}img{max-width:100%}
.row{display:flex;flex-wrap:wrap;gap:3em}svg{background:#f7f7f7}small{color:#666}"""


def bars(title: str, counts: Sequence[tuple[str, int]]) -> str:
    """A table of counts with bars."""
    largest = max((n for _, n in counts), default=1) or 1
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{n}</td>"
        f"<td><div style='width:{220 * n / largest:.0f}px'></div></td></tr>"
        for name, n in counts
    )
    return f"<div><h3>{html.escape(title)}</h3><table class=bars>{rows}</table></div>"


def curve_picture(record: dict) -> str:
    """The evidence of each kept keyword against time, key spans shaded."""
    width, height, out = 1000, 60, []
    scale = width / record["duration"]
    for j in record["kept"]:
        curve = record["curves"][j]
        shade = "".join(f"<rect x='{a * scale:.1f}' width='{(b - a) * scale:.1f}' height='{height}' fill='#c7e9c0'/>"
                        for a, b in record["key_spans"][j])  # fmt: skip
        points = " ".join(
            f"{i * width / max(1, len(curve) - 1):.1f},{height - 3 - (height - 6) * y:.1f}" for i, y in enumerate(curve)
        )
        out.append(f"<small>{html.escape(record['keywords'][j])}: confidence {record['confidence'][j]:.2f}</small><br>"
                   f"<svg viewBox='0 0 {width} {height}' width=100%>{shade}"
                   f"<polyline points='{points}' fill=none stroke='#08519c' stroke-width=2 /></svg>")  # fmt: skip
    return "".join(out)


def sample_sheet(record: dict, s: dict, folder: Path) -> str:
    """One clip of the report: full and twin, keyword, evidence."""
    root = s["root"] or s["captions"].parent
    source = record["source"] | {"keywords": [record["keywords"][j] for j in record["kept"]]}
    source |= {"key_spans": [record["key_spans"][j] for j in record["kept"]]}
    clip = parse_line(json.dumps(source), f"{s['captions']}:{record['line']}", root, s["follow_links"])
    frames = read_frames(clip, 32, s["fps"])
    slots = [vp.span_slots(spans, frames.timestamps) for spans in clip.key_spans]
    none = torch.zeros(0, dtype=torch.long)
    keywords = [vp.Keyword(text, none, of_text) for text, of_text in zip(clip.keywords, slots)]
    example = vp.Example(clip.where, none, none, 0, none, torch.tensor([len(frames.pixels) // 2, 0, 0]), 1.0,
                         vp.twin_sources(torch.stack(slots).any(0)), keywords)  # fmt: skip
    small = motion.shrink(frames.pixels, 160).byte()
    path = contact_sheet(clip, Frames(small, frames.timestamps, frames.fps, frames.duration), example, folder / "sheet.png")
    picture = b64encode(path.read_bytes()).decode()
    return (f"<figure><img src='data:image/png;base64,{picture}'>{curve_picture(record)}"
            f"<figcaption><small>{html.escape(clip.where)} {html.escape(str(source['video']))}</small>"
            "</figcaption></figure>")  # fmt: skip


def report(parts: Sequence[Path], lost: dict, counts: Counter, s: dict) -> str:
    """The page: counts, histograms, top actions, rejects, and a sample of clips."""
    durations, events, shares, actions = Counter(), Counter(), Counter(), Counter()
    chooser, sample, number = random.Random(s["seed"]), [], 0
    for record in records_of(parts):
        if "rejected" in record or record["line"] in lost:
            continue
        durations[group_of(record)[1]] += 1
        events[len(record["kept"])] += 1
        shares[min(9, int(record["key_share"] * 10))] += 1
        actions.update(record["lemmas"][j] for j in record["kept"])
        number += 1  # reservoir sampling: every kept clip is as likely to be shown
        if len(sample) < s["samples"]:
            sample.append(record)
        elif (place := chooser.randrange(number)) < s["samples"]:
            sample[place] = record
    order = {f"< {d:g} s": d for d in DURATIONS[:-1]} | {f">= {DURATIONS[-2]:g} s": math.inf}
    tables = [
        bars("Duration", sorted(durations.items(), key=lambda x: order[x[0]])),
        bars("Events a clip", [(str(k), n) for k, n in sorted(events.items())]),
        bars("Share that is key", [(f"{10 * k} to {10 * k + 10} %", n) for k, n in sorted(shares.items())]),
        bars("Top actions", sorted(actions.items(), key=lambda x: (-x[1], x[0]))[:25]),
        bars("Rejected", sorted(((k, n) for k, n in counts.items() if k != "kept"), key=lambda x: (-x[1], x[0]))),
    ]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for record in sorted(sample, key=lambda r: r["line"]):
            try:
                figures.append(sample_sheet(record, s, Path(folder)))
            except Exception as error:  # one clip, or its sheet
                figures.append(f"<p>{html.escape(str(error))}</p>")
    return (f"<!doctype html><meta charset=utf-8><title>Curation</title><style>{STYLE}</style><h1>Curation</h1>"
            f"<p>{html.escape(s['captions'].name)}: {counts.total()} clips, <b>{counts['kept']} kept</b>. Finders: "
            f"{', '.join(s['finders'])}; keywords: {s['keywords']}.</p><div class=row>{''.join(tables)}</div>"
            f"<h2>{len(figures)} of the clips</h2>{''.join(figures)}\n")  # fmt: skip
