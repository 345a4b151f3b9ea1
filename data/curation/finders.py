"""When does the event happen? Evidence for each sampled frame, and the key spans that follow from it.

motion   no model: how unlike a frame is both what was shown two seconds before and what is shown two seconds after, at the
         place of the picture where it differs most. A hand that comes and goes, a flash, a car that passes: all are there
         for a while and then not, while slow change is like one side or the other. Looks do not cross a cut, and a moving
         camera lowers the confidence.
clip     image-text similarity of the frames with the keyword, by any sentence-transformers or transformers CLIP or SigLIP.
self     the video-language model's own evidence. With the heads of stage 1: how near the states of each slot are to the
         keyword in the contrastive space. Without: by how much the keyword's log-probability falls when a window of slots
         is shown as its neighbours; one vision pass a clip, the windows are a batch. The heads say where, less well how
         long: equation (1) asks for one positive token of all key slots, so an event that begins late in a slot is often
         seen from the next slot on. Together with `motion`, which says how long, they do better.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import vp
from data import packing, videolm
from data.device import best_device
from data.examples import Preparation, make_example
from data.motion import Evidence
from data.run.models import find_checkpoint
from data.skim import motion_curve
from data.user_text import space_out
from data.video import Clip, Frames


def spans_of(
    curve: Tensor, timestamps: Sequence[float], duration: float, frames_per_slot: int = 2, level: float = 0.6
) -> list[list[float]]:
    """Key spans in seconds, on slot edges: where the evidence is above `level` of the way from its low to its peak.

    curve: (F,), F a multiple of frames_per_slot; low is the 10 % quantile. Gaps of one slot are closed. Empty where the
    curve is flat.

    >>> spans_of(torch.tensor([0., 0, 0, 0, 9, 9, 0, 0]), [0, .5, 1, 1.5, 2, 2.5, 3, 3.5], 4.0)
    [[2, 3]]
    """
    low, high = curve.quantile(0.1), curve.max()
    if high - low < 1e-6:
        return []
    key = (curve > low + level * (high - low)).view(-1, frames_per_slot).any(1).tolist()
    key = [k or (0 < i < len(key) - 1 and key[i - 1] and key[i + 1]) for i, k in enumerate(key)]
    begins = list(timestamps[::frames_per_slot])
    ends = [*begins[1:], duration]
    spans: list[list[float]] = []
    for k, begin, end in zip(key, begins, ends):
        if k and spans and spans[-1][1] == begin:
            spans[-1][1] = end
        elif k:
            spans.append([begin, end])
    return spans


def peak_level(finders: Sequence[str]) -> float:
    """The `level` of `spans_of` for the evidence of these finders: the model's own is steep, and is taken further down."""
    return 0.3 if "self" in finders else 0.6


def repeat(packed: packing.Packed, count: int, visual_index: Tensor) -> packing.Packed:
    """One packed clip `count` times, each time with other visual tokens in its visual places."""
    T = packed.input_ids.shape[1]
    rows = (packed.rows + T * torch.arange(count)[:, None]).flatten()
    many = {name: getattr(packed, name).repeat(count, 1) for name in ("input_ids", "token_types", "branch")}
    positions, targets = packed.position_ids.repeat(1, count, 1), packed.targets.repeat(count)
    many["ancestors"] = packed.ancestors.repeat(count, 1, 1)
    return replace(packed, **many, position_ids=positions, targets=targets, rows=rows, visual_index=visual_index)


@torch.no_grad()
def head_evidence(lm: videolm.VideoLM, example: vp.Example) -> list[Evidence]:
    """For each keyword: how near each slot's states after l layers are to it, by the trained heads of stage 1.

    One value a slot: the largest cosine among its tokens, above the clip's median slot. The confidence is by how much the
    best slot stands out, which is near 1 for an event that the model knows and near 0 for none.
    """
    batch = lm.collate([example]).to(lm.device)
    embedded = lm.embed(batch.input_ids, batch.token_types, lm.encode_video(batch))
    states = lm.run_language(embedded, batch.position_ids, layers=slice(lm.contrastive_layer))[0]
    places = torch.nonzero(example.token_types == 2).squeeze(1).view(int(example.grid[0]), -1)
    states = F.normalize(lm.heads.visual(states[places.to(lm.device)].float()), dim=-1)
    evidence = []
    for keyword in example.keywords:
        text = lm.base.get_input_embeddings()(keyword.ids.to(states.device)).mean(0)
        near = (states @ F.normalize(lm.heads.text(text.float()), dim=-1)).amax(1).cpu()  # (S,)
        curve = (near - near.median()).clamp(min=0)
        evidence.append(Evidence(curve, min(1.0, float(curve.max()))))
    return evidence


@torch.no_grad()
def fall_evidence(lm: videolm.VideoLM, example: vp.Example, longest: int = 3, batch_size: int = 32) -> list[Evidence]:
    """For each keyword: how far its log-probability falls when a window of slots is shown as its nearest neighbours.

    Windows of one to `longest` slots are tried, since a slot inside an event has the event for a neighbour, too. A slot's
    evidence is the largest fall / length ** 0.5 among the windows that hold it, one value a slot. The confidence is the
    share of the keyword's probability that hangs on its best window.
    """
    device = lm.device
    num_slots, answer = int(example.grid[0]), example.input_ids[example.prompt_length :].tolist()
    windows = [(a, n) for n in range(1, min(longest, num_slots - 1) + 1) for a in range(num_slots - n + 1)]
    video = lm.encode_examples([example])
    per_slot = len(video.pooler_output[0]) // num_slots
    rows = []  # places of each keyword's tokens in the sequence; the whole answer if it is not in it
    for keyword in example.keywords:
        ids = keyword.ids.tolist()
        at = next((i for i in range(len(answer)) if answer[i : i + len(ids)] == ids), None)
        rows.append(torch.arange(len(answer)) if at is None else at + torch.arange(len(ids)))
    logps = []
    for i in range(-1, len(windows), batch_size):  # the first row is the full video
        sources = []
        for j in range(max(i, -1), min(i + batch_size, len(windows))):
            key = torch.zeros(num_slots, dtype=torch.bool)
            if j >= 0:
                key[windows[j][0] : sum(windows[j])] = True
            source = vp.twin_sources(key)
            sources.append(torch.arange(num_slots) if source is None else source)
        index = torch.stack(sources)[:, :, None] * per_slot + torch.arange(per_slot)
        packed = lm.pack_rollouts([example], [[example.input_ids[example.prompt_length :]]])
        packed = repeat(packed, len(sources), index.flatten()).to(device)
        logps.append(lm.log_probs(packed, video)[0].view(len(sources), -1).cpu())
    logp = torch.cat(logps)  # (1 + windows, answer)
    out = []
    for places in rows:
        fall = (logp[0, places].sum() - logp[1:, places].sum(1)).clamp(min=0)  # (windows,)
        curve = torch.zeros(num_slots)
        for (a, n), value in zip(windows, fall.tolist()):
            curve[a : a + n] = curve[a : a + n].clamp(min=value / n**0.5)
        confidence = 1 - float((-fall.max()).exp())
        out.append(Evidence(curve, confidence))
    return out


def image_text_evidence(score, frames: Tensor, keywords: Sequence[str]) -> list[Evidence]:
    """For each keyword: how much more like it each frame is than the clip's median frame.

    score(frames (F, C, H, W) uint8, keywords) -> (F, K) cosines in [-1, 1]; see `load_image_text`. The confidence is by
    how much the best frame stands out, a difference of 0.1 counting as certain.
    """
    cosines = score(frames, keywords).float().cpu()  # (F, K)
    curves = (cosines - cosines.median(0).values).clamp(min=0)
    return [Evidence(curve, min(1.0, float(curve.max()) / 0.1)) for curve in curves.unbind(1)]


def load_image_text(model: str):
    """A function that compares frames with texts, from a transformers CLIP or SigLIP directory or hub name."""
    from transformers import AutoModel, AutoProcessor

    device = best_device()
    try:
        network = AutoModel.from_pretrained(model, use_safetensors=True).to(device).eval()
        processor = AutoProcessor.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"--clip-model {model}: {str(error).strip().splitlines()[0]}") from None

    @torch.no_grad()
    def score(frames: Tensor, keywords: Sequence[str]) -> Tensor:
        padding = "max_length" if "siglip" in network.config.model_type else True
        texts = [space_out(processor.tokenizer, keyword) for keyword in keywords]
        inputs = processor(text=texts, images=list(frames), return_tensors="pt", padding=padding, truncation=True)
        out = network(**inputs.to(device))
        return F.normalize(out.image_embeds, dim=-1) @ F.normalize(out.text_embeds, dim=-1).T

    return score


def combine(evidence: Sequence[Evidence]) -> Evidence:
    """Several finders' evidence of one keyword as one: each scaled to 1 at its peak, the geometric mean; so is confidence.

    Curves with one value a slot are stretched to the longest.
    """
    length = max(len(e.curve) for e in evidence)
    scaled = [(e.curve / e.curve.max().clamp(min=1e-6)).repeat_interleave(length // len(e.curve)) for e in evidence]
    curve = (torch.stack(scaled) + 1e-3).log().mean(0).exp()
    confidence = float(torch.tensor([max(e.confidence, 1e-6) for e in evidence]).log().mean().exp())
    return Evidence(curve, confidence, [note for e in evidence for note in e.notes])


def skim_finder(
    finder: str, look_for: str | None, lm: videolm.VideoLM, preparation: Preparation, model: str,
    clip_model: str | None = None, chunk: int = 32,
) -> Callable[[Tensor, Sequence[float]], Tensor]:  # fmt: skip
    """What says where something happens in a skim, for `data.look.look`: (pictures (N, C, h, w), seconds) -> curve (N,).

    motion: pictures alone. clip, self: how well pictures show `look_for`, by an image-text model or by this model itself
    (with the heads of stage 1, if `model` is a run that has them), a chunk of pictures at a time.
    """
    if finder == "motion":
        return motion_curve
    if finder == "clip":
        score = load_image_text(clip_model)

        def by_image_text(pixels: Tensor, times: Sequence[float]) -> Tensor:
            cosines = torch.cat([score(part, [look_for])[:, 0].float().cpu() for part in pixels.split(chunk)])
            return (cosines - cosines.median()).clamp(min=0)

        return by_image_text
    heads = Path(find_checkpoint(model)) / "heads.safetensors"
    if heads.exists():
        lm.heads.load_state_dict(load_file(heads))
        lm.heads.to(lm.base.lm_head.weight.device)
    evidence = head_evidence if heads.exists() else fall_evidence

    def by_itself(pixels: Tensor, times: Sequence[float]) -> Tensor:
        step = preparation.frames_per_slot
        curve, short = torch.zeros(len(pixels)), replace(preparation, skim=None, visual_tokens=None)
        for i in range(0, len(pixels), chunk):
            begin = max(0, min(i, len(pixels) - chunk))  # the last chunk is a whole one, too
            part, seconds = pixels[begin : begin + chunk], list(times[begin : begin + chunk])
            if len(part) < 2 * step:
                continue
            count = len(part) // step * step
            about = Clip(Path("skim"), look_for, "skim", keywords=[look_for], key_spans=[[[0.0, 1e-3]]])  # not read
            length = seconds[-1] - seconds[0]
            seconds = [t - seconds[0] for t in seconds[:count]]
            frames = Frames(part[:count], seconds, (count - 1) / max(length, 1e-3), max(length, 1e-3))
            found = evidence(lm, make_example(about, frames, short))[0].curve.repeat_interleave(step)
            curve[begin : begin + count] = curve[begin : begin + count].maximum(found)
        return curve

    return by_itself
