"""The embedded world: seeded, held out, resumable, honest about where its event is."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from data import world
from data.base import BaseSettings, still_scene
from data.base import main as make_base
from data.clips import load_clips
from data.tiny import build_tiny
from data.video import read_frames
from data.world import (
    ACTIONS,
    COLOURS,
    FPS,
    NUM_FRAMES,
    SHAPES,
    SPLITS,
    Place,
    Thing,
    WorldSettings,
    draw_clip,
    embedded_world,
    held_out,
    in_cells,
    make_world,
    render,
)
from docs import other_world


def combination(line: dict) -> tuple[str, str, str]:
    """(shape, colour, action) of the actor."""
    colour, shape = line["truth"]["actor"].split()
    return shape, colour, line["truth"]["action"]


def lines_of(split: str, count: int, **more) -> list[dict]:
    """The first annotation lines of a split."""
    return [draw_clip(split, i, times=(), **more)[1] for i in range(count)]


def test_same_seed_same_frames():
    """Frames and text depend on split, index and seed, and on nothing else."""
    for index in range(5):
        (a, line_a), (b, line_b) = (draw_clip("train", index, 7) for _ in range(2))
        assert np.array_equal(a, b) and line_a == line_b
        some, line = draw_clip("train", index, 7, times=(0, 5))
        assert line == line_a and np.abs(some.astype(int) - a[[0, 5]]).max() < 30  # all but the noise
    assert not np.array_equal(draw_clip("train", 0, 7)[0], draw_clip("train", 0, 8)[0])
    assert not np.array_equal(draw_clip("train", 0, 7)[0], draw_clip("test", 0, 7)[0])


def test_held_out_combinations_never_occur_elsewhere():
    """Every actor of the held-out split is new; yet each of its parts, and each pair of parts, is known."""
    known = {combination(x) for split in ("train", "test") for x in lines_of(split, 1500, quiet=0.0)}
    new = Counter(combination(x) for x in lines_of("held-out", 200))
    assert not known & set(new)
    for shape, colour, action in new:
        assert held_out(SHAPES.index(shape), list(COLOURS).index(colour), ACTIONS.index(action))
        assert any(t[0] == shape and t[1] == colour for t in known)
        assert any(t[0] == shape and t[2] == action for t in known)
        assert any(t[1] == colour and t[2] == action for t in known)
    assert {t[2] for t in new} == set(ACTIONS)


@pytest.mark.parametrize(
    "split, habit, quiet", [("train", 0.8, 0.2), ("train", 0.6, 0.0), ("test", 0.8, 0.2), ("held-out", 0.8, 0.2)]
)
def test_habits(split, habit, quiet):
    """In training an event is its floor's usual one as often as asked for, elsewhere half of the time."""
    lines = lines_of(split, 1500, habit=habit, quiet=quiet)
    kinds = Counter(x["truth"]["kind"] for x in lines)
    assert kinds["quiet"] / len(lines) == pytest.approx(0 if split == "held-out" else quiet, abs=0.03)
    share = kinds["usual"] / (kinds["usual"] + kinds["rare"])
    assert share == pytest.approx(habit if split == "train" else 0.5, abs=0.04)
    for x in lines:
        if x["truth"]["kind"] != "quiet":
            assert (x["truth"]["action"] == x["truth"]["usual"]) == (x["truth"]["kind"] == "usual")


@pytest.mark.parametrize("index", range(12))
def test_the_event_is_in_its_span_and_nowhere_else(index):
    """Frames outside the span hardly differ from their neighbours; those inside do; a caption names actor and action."""
    frames, line = draw_clip("train", index, quiet=0.0)
    start, end = (round(t * FPS) for t in line["truth"]["span"])
    assert end - start in (2, 3) and start > 0 and end < NUM_FRAMES
    smooth = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    edges = [start - 1, end - 1]
    inside = [smooth[e] for e in edges]
    outside = [s for t, s in enumerate(smooth) if t not in edges]
    assert min(inside) > max(outside)
    sentence = line["caption"].removeprefix(line["truth"]["static"])
    assert line["truth"]["action"] in sentence and line["truth"]["actor"] in sentence
    assert line["keywords"] == [line["truth"]["action"]]


@pytest.mark.parametrize("action", ACTIONS)
def test_strength(action):
    """At half the strength an event changes its frames about half as much; the others are the same at every strength.
    Fading goes furthest: to 0.575 of the way at half the strength, and never beyond 0.9."""
    lines = enumerate(lines_of("train", 100, quiet=0.0))
    index = next(i for i, line in lines if line["truth"]["action"] == action)
    none, half, full = (draw_clip("train", index, quiet=0.0, strength=s)[0].astype(float) for s in (0.0, 0.5, 1.0))
    line = draw_clip("train", index, quiet=0.0, times=())[1]
    start, end = (round(t * FPS) for t in line["truth"]["span"])
    changes = [np.abs(frames - none).mean((1, 2, 3)) for frames in (half, full)]
    for change in changes:
        assert np.flatnonzero(change).tolist() == list(range(start, end))
    assert changes[0].sum() / changes[1].sum() == pytest.approx(0.575 / 0.9 if action == "fades" else 0.5, abs=0.1)


@pytest.mark.parametrize("setting, value", [("habit", 1.2), ("quiet", -0.1), ("strength", 2.0), ("strength", float("nan"))])
def test_a_share_that_is_none_is_refused(tmp_path, setting, value):
    """Which setting, what it was, what to give; nothing is written."""
    with pytest.raises(ValueError, match=f"--{setting}: got {value}; give 0 to 1"):
        make_world(WorldSettings(tmp_path / "w", train=2, workers=1, **{setting: value}))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("setting, value", [("train", -1), ("held_out", -2), ("seed", -1), ("workers", 0)])
def test_a_number_that_cannot_be_is_refused(tmp_path, setting, value):
    """The same for counts."""
    with pytest.raises(ValueError, match=f"--{setting.replace('_', '-')}: got {value}; give"):
        make_world(WorldSettings(tmp_path / "w", **{"train": 2, setting: value}))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("action", ACTIONS)
def test_an_event_leaves_other_cells_alone(action):
    """Whatever a thing does, what stands in the cells beside it looks as it did, so that it is not taken for the actor."""
    middles = [(12, 12), (12, 36), (36, 12)]
    places = [Place(np.full(1, x), np.full(1, y), 9.0) for x, y in middles]
    shots = []
    for strength in (0.0, 1.0):
        things = [Thing("square", colour, place) for colour, place in zip(COLOURS, places)]
        things[0].action, things[0].acts = action, np.full(1, strength)
        shots.append(render(things, 0, 1, np.random.default_rng(0))[0].astype(int))
    changed = np.abs(shots[1] - shots[0]).max(-1) > 2
    assert changed[:28, :28].sum() > 50  # within its cell, and a little beyond
    assert not changed[28:].any() and not changed[:, 28:].any()


def test_prompts_are_like_training_clips_but_others():
    """As many usual, rare and quiet ones, no held-out actor, and none of the training clips again."""
    lines = {split: lines_of(split, 1500) for split in ("train", "prompts")}
    kinds = {split: Counter(line["truth"]["kind"] for line in lines[split]) for split in lines}
    assert all(abs(kinds["train"][kind] - kinds["prompts"][kind]) < 80 for kind in ("usual", "rare", "quiet"))
    assert kinds["prompts"]["rare"] < 200 < kinds["prompts"]["quiet"]
    same = [a["caption"] == b["caption"] for a, b in zip(lines["train"], lines["prompts"])]
    assert sum(same) < 15
    actors = [combination(line) for line in lines["prompts"] if "actor" in line["truth"]]
    assert not any(held_out(SHAPES.index(s), list(COLOURS).index(c), ACTIONS.index(a)) for s, c, a in actors)


@pytest.mark.parametrize("index", range(4))
def test_nothing_happens_in_a_quiet_clip(index):
    """No event in the frames, none in the caption, no keyword, and no span."""
    frames, line = draw_clip("test", index, quiet=1.0)
    smooth = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    assert smooth.max() < 1.2 * np.median(smooth)
    assert line["caption"] == line["truth"]["static"] and line["keywords"] == []
    assert line["truth"].keys() == {"static", "kind", "usual"}


def test_files_decode_to_what_was_drawn(world):
    """MP4s of 16 frames at 8 a second, close to the drawn pixels."""
    clips, problems = load_clips(world / "train.jsonl")
    assert len(clips) == 48 and not problems
    for index in (0, 17, 47):
        frames = read_frames(clips[index], 16)
        assert frames.timestamps == pytest.approx([t / FPS for t in range(16)])
        drawn = draw_clip("train", index, habit=0.8, quiet=0.0)[0].transpose(0, 3, 1, 2).astype(float)
        assert np.abs(frames.pixels.numpy() - drawn).mean() < 6


def test_resumed_and_parallel_worlds_are_equal(tmp_path):
    """A world interrupted half-way and finished by other processes equals one made at once; finished files stay."""
    whole = make_world(WorldSettings(tmp_path / "whole", train=10, test=4, held_out=2, prompts=3, workers=1))
    part = make_world(WorldSettings(tmp_path / "part", train=5, test=2, held_out=1, prompts=0, workers=2))
    kept = (part / "train/000/000001.mp4").stat().st_mtime_ns
    (part / "train/000/000003.mp4").unlink()
    make_world(WorldSettings(tmp_path / "part", train=10, test=4, held_out=2, prompts=3, workers=2))
    assert (part / "train/000/000001.mp4").stat().st_mtime_ns == kept
    for split in SPLITS:
        assert (whole / f"{split}.jsonl").read_text() == (part / f"{split}.jsonl").read_text()
    for file in sorted(whole.rglob("*.mp4")):
        assert file.read_bytes() == (part / file.relative_to(whole)).read_bytes()
    assert not list(part.rglob("*.partial"))


def test_worlds_are_not_mixed(tmp_path):
    """A folder made with another seed, or with events of another strength, is refused, in words."""
    make_world(WorldSettings(tmp_path / "w", train=2, test=2, held_out=0, prompts=0, workers=1))
    with pytest.raises(ValueError, match=r'"strength": 0.7.*asked for.*"strength": 0.5'):
        make_world(WorldSettings(tmp_path / "w", train=2, test=2, held_out=0, prompts=0, strength=0.5, workers=1))
    with pytest.raises(ValueError, match=r'"seed": 0.*asked for.*"seed": 1'):
        make_world(WorldSettings(tmp_path / "w", train=2, test=2, held_out=0, prompts=0, seed=1, workers=1))
    make_world(WorldSettings(tmp_path / "w", train=0, test=2, held_out=0, prompts=1, workers=1))  # 0: left as it is
    assert [sum(1 for _ in (tmp_path / f"w/{split}.jsonl").open()) for split in ("train", "prompts")] == [2, 1]


def test_a_world_that_is_there_costs_no_process(tmp_path, monkeypatch):
    """What is there is found; what is missing, or shorter than asked for, is drawn; another version is refused."""
    drawn = []
    monkeypatch.setattr(world.subprocess, "run", lambda command, **_: drawn.append(command[-4:]))
    folder = tmp_path / "w"
    embedded_world("train", 3, folder)
    for split, count in (("train", 3), ("prompts", 2), ("test", 400), ("held-out", 200)):
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("{}\n" * count)
    settings = WorldSettings(folder)
    (folder / "world.json").write_text(json.dumps(world.stamp(settings)))
    assert embedded_world("train", 3, folder) == embedded_world("prompts", 2, folder) == folder
    assert drawn == [["--train", "3", "--prompts", "0"]]
    embedded_world("prompts", 3, folder)
    assert drawn[1:] == [["--train", "0", "--prompts", "3"]]
    (folder / "world.json").write_text(json.dumps(world.stamp(settings) | {"version": world.VERSION - 1}))
    with pytest.raises(ValueError, match="Delete the folder"):
        embedded_world("train", 3, folder)


@pytest.mark.parametrize("index", range(12))
def test_the_base_sees_no_event(index):
    """In its scenes no look comes or goes, and no caption has a word of an action."""
    frames, caption = still_scene(index, range(NUM_FRAMES))
    smooth = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
    assert smooth.max() < 1.2 * np.median(smooth)
    words = set(caption.lower().replace(",", "").rstrip(".").split())
    assert words <= {"a", "and", *COLOURS, *SHAPES}
    assert not words & {word for action in ACTIONS for word in action.split()} - {"a"}


def test_the_base_sees_every_shape_in_every_colour():
    """Alone, too; shapes are learned from these scenes."""
    captions = [still_scene(index, ())[1] for index in range(300)]
    assert {f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES} <= {
        name for caption in captions for name in caption.lower().rstrip(".").replace(" and ", ", ").split(", ")
    }
    assert 0.2 < sum(" and " not in caption for caption in captions) / len(captions) < 0.5


def test_a_base_that_is_made_loads_and_says_when_it_still_guesses(tmp_path, capsys):
    """Two steps teach no shapes. A word that the base has never read keeps its random weights."""
    made, other = tmp_path / "base.safetensors", tmp_path / "other.safetensors"
    make_base(BaseSettings(made, clips=4, whole_clips=2, steps=2, whole_steps=1, batch_size=2))
    assert "still guesses" in capsys.readouterr().out

    def weights(base):
        tiny = AutoModelForImageTextToText.from_pretrained(build_tiny(tmp_path / "tiny", seed=5, base=base))
        return {name: weight.clone() for name, weight in tiny.named_parameters()}

    random, loaded = weights(None), weights(made)
    saved = load_file(made)
    assert saved.keys() == loaded.keys() and all(torch.equal(loaded[name], saved[name].float()) for name in saved)
    with safe_open(made, "pt") as file:
        tokens = json.loads(file.metadata()["tokens"])
    row, embedding = tokens.index("Ġpurple"), "model.language_model.embed_tokens.weight"
    renamed = ["Ġlilac" if token == "Ġpurple" else token for token in tokens]
    # Rows are found by their words, not by their numbers.
    turned = saved | {embedding: saved[embedding].flip(0).contiguous()}
    save_file(turned, other, {"tokens": json.dumps(renamed[::-1])})
    without, loaded, random = (found[embedding] for found in (weights(other), loaded, random))
    others = [i for i in range(len(tokens)) if i != row]
    assert torch.equal(without[row], random[row]) and not torch.equal(without[row], loaded[row])
    assert torch.equal(without[others], loaded[others])


@pytest.mark.parametrize("drawn", [world, other_world])
def test_events_of_both_worlds_are_about_as_plain(drawn):
    """Over a hundred scenes a frame changes by a distance of 1,000 to 2,300, whatever happens; by 0 if nothing does."""
    for action in drawn.ACTIONS:
        distances = []
        for seed in range(100):
            rng = np.random.default_rng(seed)
            (place,) = in_cells(np.array([False]), np.arange(1), rng)
            shape, colour, floor = rng.choice(drawn.SHAPES), rng.choice(sorted(COLOURS)), int(rng.integers(8))
            things = (
                Thing(shape, colour, place),
                Thing(shape, colour, place, action),
                Thing(shape, colour, place, action, 0.7),
            )
            still, before, during = (drawn.render([t], floor, 1, np.random.default_rng(seed)).astype(float) for t in things)
            assert np.array_equal(still, before)
            distances.append(np.linalg.norm(during - before))
        assert 1000 < np.mean(distances) < 2300, (action, np.mean(distances))


def test_another_world_has_its_own_words_and_actors(monkeypatch):
    """Captions name its shapes and actions; its held-out actors occur nowhere else; a floor has one usual action."""
    for name in ("SHAPES", "ACTIONS", "FLOORS", "HELD_OUT", "coverage", "render"):
        monkeypatch.setattr(world, name, getattr(world, name))  # put back afterwards
    other_world.replace_the_world()
    train, new = lines_of("train", 1500, quiet=0.0, habit=0.6), lines_of("held-out", 200)
    known = {combination(line) for line in train}
    assert {actor[0] for actor in known} == set(other_world.SHAPES)
    assert {line["keywords"][0] for line in train} == set(other_world.ACTIONS)
    assert not known & {combination(line) for line in new}
    assert 0.55 < np.mean([line["truth"]["kind"] == "usual" for line in train]) < 0.65
