"""Prompts of stage 2: clips that stage 1 finds hard, and as many others.

Where all descriptions of a clip earn the same there is nothing to learn. What a model describes well already is such a
clip, and what stage 1 was trained on it describes well. The others are there because among hard clips alone whatever a
model goes by looks wrong: from those it unlearned who did it (docs/results.md).
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from data.examples import Preparation
from data.files import write_whole
from data.loader import ClipLoader
from data.run.models import gathered
from data.run.processes import gather
from data.run.run import Run
from data.video import Clip
from data.videolm import VideoLM

AT_ONCE = 16  # clips of a forward pass, at most


def caption_log_probs(run: Run, lm: VideoLM, preparation: Preparation, clips: Sequence[Clip]) -> dict[int, float]:
    """The log-probability of each clip's caption, by the clip's number. Clips that cannot be used are noted as problems of
    the run. Processes share the clips, and all get all."""
    s, found = run.settings, {}
    loader = ClipLoader(clips, preparation, s.seed, s.workers, s.time_limit, math.inf, shuffle=False, **run.share(1))
    lm.eval()
    with loader, run.autocast(), gathered(lm):
        stream = loader.examples(epochs=1)
        while group := list(islice(stream, AT_ONCE)):
            logp = lm.caption_log_probs([example for _, example in group])
            found |= zip((index for index, _ in group), logp.tolist())
    lm.train()
    run.problems += gather(list(loader.skipped.values()), run.peers)
    return dict(gather(list(found.items()), run.peers))


def hardest_and_others(likely: Mapping[int, float], number: int, seed: int) -> list[int]:
    """The clips with the lowest numbers, and as many of the rest by chance.

    >>> hardest_and_others({7: -1.0, 3: -9.0, 4: -0.1, 5: -8.0}, 2, 0)
    [3, 4, 5, 7]
    >>> 3 in hardest_and_others({7: -1.0, 3: -9.0, 4: -0.1, 5: -8.0}, 1, seed=0)
    True
    """
    order = sorted(likely, key=likely.get)
    others = np.random.default_rng([seed, number]).permutation(order[number:])[:number]
    return sorted([*order[:number], *others.tolist()])


def choose_prompts(run: Run, lm: VideoLM, preparation: Preparation, clips: Sequence[Clip], number: int) -> list[Clip]:
    """`number` clips whose captions the model finds least likely, and as many others; all, if there are no more, or if
    number is 0.

    The choice is kept in the run's folder, where a run that is resumed finds it: its model is another by then.
    """
    if not number or 2 * number >= len(clips):
        return list(clips)
    path = run.settings.out / "prompts.json"
    if run.resumed.path:
        if not path.exists():
            raise ValueError(f"{path}: it holds which clips the run describes, and is gone; start anew in another --out")
        return [clips[index] for index in json.loads(path.read_text())["clips"]]
    likely = caption_log_probs(run, lm, preparation, clips)
    chosen = hardest_and_others(likely, number, run.settings.seed)
    if run.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"clips": chosen, "caption log-probabilities": [likely[i] for i in chosen]}) + "\n")
    others = f"and {max(0, len(chosen) - number)} others"
    run.console.print(f"described, of {len(clips)} clips: {number} whose captions the model finds least likely, {others}")
    return [clips[index] for index in chosen]
