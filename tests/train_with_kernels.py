"""Does training learn the same with the kernels? Both train scripts, with the references and then with the kernels.

    python -m tests.train_with_kernels --steps 50

On the CPU the kernels run under Triton's interpreter: slow, and exact. Float32, one seed, a small embedded world.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path


def train_twice(script: str, steps: int, out: Path, arguments: list[str]) -> list[dict[str, float]]:
    """Run a train script on the CPU with the references, then with the kernels: `compare_runs` of both.

    Runs go to out/references and out/kernels.
    """
    runs = []
    for name, kernels in (("references", "0"), ("kernels", "1")):
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "VIDEOPERCEIVER_KERNELS": kernels}
        command = [sys.executable, str(Path(__file__).parents[1] / script), "--steps", str(steps), "--log-every", "1",
                   "--out", str(out / name), *arguments]  # fmt: skip
        began = time.perf_counter()
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        print(f"{script} with the {name}: {steps} steps in {time.perf_counter() - began:.0f} s", flush=True)
        runs.append([json.loads(line) for line in (out / name / "metrics.jsonl").open()])
    return compare_runs(*runs)


def compare_runs(references: list[dict], kernels: list[dict]) -> list[dict]:
    """One row a step: its losses and rewards in both runs, and the largest difference among them.

    >>> compare_runs([{"step": 1, "loss/lm": 2.0, "lr": 1}], [{"step": 1, "loss/lm": 2.5, "lr": 2}])
    [{'step': 1, 'loss/lm': (2.0, 2.5), 'difference': 0.5}]
    """
    rows = []
    for one, two in zip(references, kernels, strict=True):
        names = [n for n in one if n.split("/")[0] in ("loss", "reward", "policy")]
        row = {"step": one["step"]} | {n: (one[n], two[n]) for n in names}
        differences = [abs(one[n] - two[n]) for n in names]
        rows.append(row | {"difference": max(math.inf if math.isnan(d) else d for d in differences)})
    return rows


def check_training(steps: int, out: Path, bar: float = 1e-4) -> None:
    """Print how losses and rewards of both stages differ, step by step; exit where one is above the bar."""
    out.mkdir(parents=True, exist_ok=True)
    make = [sys.executable, "-m", "data.world", "--out", str(out / "world"), "--train", "400", "--test", "1"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    data = ["--data", str(out / "world/train.jsonl"), "--workers", "0"]
    small = [["--batch-size", "4", "--micro-batch-size", "4", "--sheets", "0"],
             ["--batch-size", "2", "--micro-batch-size", "2", "--num-rollouts", "4", "--num-twin-rollouts", "2",
              "--beta", "0.1", "--model", str(out / "stage-1/references")]]  # fmt: skip
    shown = (("loss/lm", "loss/contrastive"), ("policy/loss", "policy/kl", "reward/total"))
    largest = 0.0
    for stage, script, count in ((0, "train_sft.py", steps), (1, "train_rl.py", max(1, steps // 10))):
        rows = train_twice(script, count, out / f"stage-{stage + 1}", data + small[stage])
        print(f"step  {'  '.join(f'{n}: references, kernels' for n in shown[stage])}  largest difference of all")
        for row in rows:
            pairs = [row.get(n, (math.nan, math.nan)) for n in shown[stage]]  # no policy loss where no group had spread
            values = "  ".join(f"{a:10.6f} {b:10.6f}" for a, b in pairs)
            print(f"{row['step']:4d}  {values}  {row['difference']:.1e}")
        largest = max(largest, *(row["difference"] for row in rows))
    print(f"largest difference: {largest:.1e} (at most {bar:g} is asked)")
    if not largest <= bar:
        sys.exit(f"error: training with the kernels differs by {largest:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of stage 1; stage 2 makes a tenth of them")
    parser.add_argument("--out", type=Path, default=Path("runs/training"), help="folder of the runs")
    arguments = parser.parse_args()
    check_training(arguments.steps, arguments.out)
