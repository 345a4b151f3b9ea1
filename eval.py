"""Measure a model: describe each clip and its twin, and look for the event in the words.

    python eval.py --model runs/sft --data runs/world/test.jsonl      # table, results.json, a Markdown row
    python eval.py describe VIDEO.mp4 --model runs/sft                # one file, one description
    python eval.py describe VIDEO.mp4 --frames skim                   # a long one: the moments it looked at, and a picture
    python eval.py long --what recall --data clips.jsonl              # events in long footage: uniform frames, or a skim?
    python eval.py progress runs/sft runs/rl                          # what two runs have learned, beside each other
    python eval.py report                                             # the README's tables: trains what they need
    python eval.py report --stage lora
    python eval.py doctor                                             # does this machine do? for bug reports
    python eval.py card                                               # all tables that need a GPU, in one go
    python eval.py cost                                               # what sharing prefixes saves in stage 2
    python eval.py merge runs/sft --out merged                        # fold a checkpoint's adapter into its model
    python eval.py cost --what questions                              # and in answering questions
    python eval.py run --benchmark mvbench --root MVBench --model runs/sft                           # answers, scores
    python eval.py run --benchmark mvbench --root MVBench --model runs/sft --twin --key-spans curated/clips.jsonl
    python eval.py run --benchmark clips --root clips.jsonl --model runs/sft --needle                # or --diff
    python eval.py score --benchmark mvbench --root MVBench --predictions runs/sft/mvbench.jsonl     # a public benchmark
    python eval.py score --compare a.official.json b.official.json    # two models on the same questions

A model that does not look at the event scores the same on the full video and on its twin: the difference is
the perception gap. Keyword recall is the share of a clip's keywords that are, word for word, in the greedy
description; caption similarity is ROUGE-L F1 (package rouge-score) against the caption. Clips with a `truth` field
(the embedded world) add: event named (that event, and no other of the data set's), also for usual and rare events
alone; event claimed (any, where none is shown: of twins, and of clips in which nothing happens); actor right (in the
sentence of the event); whole caption right (word for word); and similarity of the static part (the sentences that name no
event).
"""

import sys

import data  # isort: skip  # noqa: F401  first of all: Ctrl-C ends with one word from here on

import tyro
from rich.console import Console

from data.benchmarks.commands import RunSettings, ScoreSettings, run_benchmark, run_score
from data.files import ClipError
from data.measure.card import CardSettings, run_card
from data.measure.cost import CostSettings, run_cost
from data.measure.doctor import DoctorSettings, run_doctor
from data.measure.evaluate import (
    DescribeSettings,
    EvalSettings,
    ProgressSettings,
    run_describe,
    run_evaluation,
    run_progress,
)
from data.measure.long import LongSettings, run_long
from data.measure.report import ReportSettings, run_report
from data.run.merge import MergeSettings, run_merge

COMMANDS = {
    "evaluate": (EvalSettings, run_evaluation),
    "describe": (DescribeSettings, run_describe),
    "progress": (ProgressSettings, run_progress),
    "run": (RunSettings, run_benchmark),
    "score": (ScoreSettings, run_score),
    "merge": (MergeSettings, run_merge),
    "report": (ReportSettings, run_report),
    "cost": (CostSettings, run_cost),
    "card": (CardSettings, run_card),
    "doctor": (DoctorSettings, run_doctor),
    "long": (LongSettings, run_long),
}


def main(arguments: list[str], console: Console) -> None:
    """Run one command; without a name, `evaluate`."""
    name, *rest = arguments if arguments and arguments[0] in COMMANDS else ["evaluate", *arguments]
    settings, command = COMMANDS[name]
    description = __doc__ if name == "evaluate" else None
    command(tyro.cli(settings, args=rest, prog=f"eval.py {name}", description=description), console)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], Console(emoji=False))
    except (ClipError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        continues = "; what is answered is kept, and the same command continues" if sys.argv[1:2] == ["run"] else ""
        print(f"stopped{continues}", file=sys.stderr)
        sys.exit(130)  # the code of a command that Ctrl-C ended
