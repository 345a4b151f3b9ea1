"""Correctness, then speed and memory, of every kernel and its rivals: python -m kernels.bench

Needs torch and triton only. On a GPU it first holds each kernel to its reference in float64, on odd sizes,
then times it beside its rivals on the sizes of training: median of many runs with the 20th and 80th
percentile, the share of the card's own ceiling (bytes of a large copy, FLOPs of a large bfloat16 product,
both measured in this run) that the least possible traffic and work make of it, and the peak memory above its
inputs. Libraries that are not installed are skipped, and named. It prints a table and writes JSON and, where
matplotlib is there, a PNG to --out. --tune tries other tiles for our kernels. Without a GPU the correctness
part runs, under Triton's interpreter, on tiny sizes, and the public functions, which take the references
there, are timed beside the references called directly.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ON_GPU = torch.cuda.is_available()
if __name__ == "__main__" and not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import vp  # noqa: E402
from kernels import check, contrastive, dispatch, logprob, reward  # noqa: E402

contrastive_reference = partial(vp.contrastive_loss, use_kernel=False)
DEVICE = "cuda" if ON_GPU else "cpu"
contrastive_inputs = partial(check.contrastive_inputs, device=DEVICE)
head_inputs, text_inputs = partial(check.head_inputs, device=DEVICE), partial(check.text_inputs, device=DEVICE)


def check_all() -> list[dict]:
    """Each kernel's error against float64 beside that of eager PyTorch; raises ValueError where it is larger."""
    rows = []
    for row in check.compare_all(DEVICE):
        print(f"{row.kernel:12} {row.dtype:9} error {row.error:.1e}   eager {row.eager_error:.1e}")
        if not row.right:
            raise ValueError(f"{row.kernel} in {row.dtype} is wrong: error {row.error:.2e}, eager {row.eager_error:.2e}")
        rows.append(vars(row))
    return rows


def time_public(pairs: int = 200) -> list[dict]:
    """Median milliseconds of the public functions and of their references called directly, in turn, without a kernel."""
    *inputs, tokens = contrastive_inputs(16, 1, 27, 256, torch.float32)  # a step of the embedded world
    states, weight, targets, banned, _ = head_inputs(480, 96, 800, torch.float32)
    batch = text_inputs(8, 6, 20, 20, 128, torch.float32, ragged=True)

    def one_by_one() -> list:
        out = []
        for p in batch:
            q, c = vp.score_rollouts(p.rollouts, p.weights, p.reference, p.reference_weights, p.keywords)
            four = q[: p.num_full], c[: p.num_full], q[p.num_full :], c[p.num_full :]
            out.append((q, c, vp.relative_wins(*four, 0.1), *vp.rewards_and_advantages("relative", *four)))
        return out

    both = {
        "contrastive": (lambda: vp.contrastive_loss(*inputs, tokens),
                        lambda: contrastive_reference(*inputs, tokens)),
        "log-probs": (lambda: logprob.log_probs_from_states(states, weight, targets, banned),
                      lambda: logprob.selected_log_probs(F.linear(states, weight), targets, banned)),
        "reward": (lambda: vp.paired_rewards(batch), torch.no_grad()(one_by_one)),
    }  # fmt: skip
    rows = []
    for name, functions in both.items():
        seconds = [[], []]
        for i in range(2 * pairs + 20):
            first = i // 2 % 2  # now this one first, now that
            which = i % 2 ^ first
            began = time.perf_counter()
            functions[which]()
            if i >= 20:
                seconds[which].append(time.perf_counter() - began)
        public, direct = (1e3 * statistics.median(x) for x in seconds)
        rows.append({"kernel": name, "public_ms": public, "reference_ms": direct})
        print(f"{name:12} public function {public:.3f} ms, its reference {direct:.3f} ms: ratio {public / direct:.3f}")
    return rows


# --- Rivals ----------------------------------------------------------------------------------------------------------


def products_and_rows(
    full: Tensor, twin: Tensor, keywords: Tensor, tau: Tensor, tokens: vp.KeyTokens, rows: Callable,
    finish: Callable,
) -> list[Tensor]:  # fmt: skip
    """The contrastive loss and its gradients by cuBLAS products with compiled row kernels between them."""
    unit = F.normalize(keywords.float(), dim=-1).to(full.dtype)
    products = [x @ unit.T for x in (full, twin)]
    asks = (tokens.clip, tokens.slot, tokens.shown, tokens.keyword_clip, tokens.keyword_id, tokens.keyword_slots)
    loss, gs, cs, rs = rows(full, twin, *products, tau, *asks)
    dxs = [finish(g @ unit, x, c, r, tau) for x, g, c, r in zip((full, twin), gs, cs, rs)]
    dk = sum((g * r[:, None].to(g.dtype)).T @ x for x, g, r in zip((full, twin), gs, rs)).float() / tau
    q, e = 1 / keywords.float().norm(dim=1).clamp(min=1e-12), (dk * unit).sum(1)
    return [loss, *dxs, (q[:, None] * (dk - e[:, None] * unit)).to(keywords.dtype)]


def row_kernel(full, twin, s_full, s_twin, tau, clip, slot, shown, keyword_clip, keyword_id, keyword_slots):
    """Norms, softmaxes and coefficients of both halves, to be fused by torch.compile."""
    own = clip[:, None] == keyword_clip[None]
    positive = own & keyword_slots.T[slot]
    negative = ~own & ~(shown[:, :, None] == keyword_id[None, None]).any(1)
    rs = [1 / x.float().norm(dim=1).clamp(min=1e-12) for x in (full, twin)]
    s = [(y.float() * r[:, None] / tau) for y, r in zip((s_full, s_twin), rs)]
    masked = [s[0].masked_fill(~(positive | negative), -1e30), s[1].masked_fill(~positive, -1e30)]
    lse = torch.logaddexp(masked[0].logsumexp(0), masked[1].logsumexp(0))
    lse_positive = s[0].masked_fill(~positive, -1e30).logsumexp(0)
    p = torch.where(positive, (s[0] - lse_positive).exp(), 0.0)
    gs = [(masked[0] - lse).exp() - p, (masked[1] - lse).exp()]
    cs = [(g * x).sum(1) for g, x in zip(gs, s)]
    return (lse - lse_positive).sum(), [g.to(full.dtype) for g in gs], cs, rs


def finish_rows(product: Tensor, x: Tensor, c: Tensor, r: Tensor, tau: Tensor) -> Tensor:
    """The norm's backward, in one pass once it is compiled."""
    return (r[:, None] * (product.float() / tau - (c * r)[:, None] * x.float())).to(x.dtype)


def padded_scores(y: Tensor, reference: Tensor) -> Tensor:
    """F1 of dense rollouts (P, R, L, D) against (P, T, D): what torch.compile is given."""
    y, x = F.normalize(y.float(), dim=-1), F.normalize(reference.float(), dim=-1)
    s = (y.flatten(1, 2) @ x.transpose(1, 2)).unflatten(1, y.shape[1:3]).clamp(min=0)
    precision, recall = s.amax(3).mean(2), s.amax(2).mean(2)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)


def library(name: str):
    """A module, or None with a printed line."""
    try:
        return __import__(name, fromlist=["*"])
    except ImportError as reason:
        print(f"skipped: {name} ({reason})")
        return None


def contrastive_rivals(inputs: tuple) -> dict[str, Callable]:
    """Forward and backward, and their names."""
    *tensors, tokens = inputs

    def step(function: Callable, **more) -> Callable:
        return lambda: torch.autograd.grad(function(*tensors, tokens, **more)[0], tensors)

    compiled = torch.compile(contrastive_reference, mode="max-autotune-no-cudagraphs")
    rows, finish = torch.compile(row_kernel), torch.compile(finish_rows)
    detached = [x.detach() for x in tensors]
    return {
        "ours": step(vp.contrastive_loss, use_kernel=True),
        "eager": step(contrastive_reference),
        "torch.compile max-autotune": step(compiled),
        "cuBLAS + compiled rows": lambda: products_and_rows(*detached, tokens, rows, finish),
    }


def head_rivals(inputs: tuple) -> dict[str, Callable]:
    """Log-probs, forward and backward to the states, the head frozen."""
    states, weight, targets, banned, temperature = inputs

    def step(function: Callable) -> Callable:
        return lambda: torch.autograd.grad(function().sum(), states)

    def eager(rows: Tensor, targets: Tensor) -> Tensor:
        return logprob.selected_log_probs(F.linear(rows, weight), targets, banned, temperature)[0]

    def chunked() -> Tensor:
        parts = zip(states.split(512), targets.split(512))
        return torch.cat([checkpoint(eager, *part, use_reentrant=False) for part in parts])

    compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs")
    rivals = {
        "ours": step(lambda: logprob.log_probs_from_states(*inputs, use_kernel=True)[0]),
        "eager": step(lambda: eager(states, targets)),
        "eager, 512 rows at a time, recomputed": step(chunked),
        "torch.compile max-autotune": step(lambda: compiled(states, targets)),
    }
    liger = library("liger_kernel.transformers")
    if liger:  # a summed cross-entropy: no banned ids, no weight of a token's own
        loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        rivals["liger-kernel (cross-entropy)"] = step(lambda: loss(weight, states, targets))
    return rivals


def text_rivals(batch: list) -> dict[str, Callable]:
    """Scores of dense rollouts; ours makes keywords, rewards and advantages too."""
    packed = reward.pack_texts(batch)
    fields = [x for x in vars(packed).values() if isinstance(x, Tensor)]
    y = torch.stack([torch.stack(list(p.rollouts)) for p in batch])  # (P, R, L, D)
    x = torch.stack([p.reference for p in batch])
    compiled = torch.compile(padded_scores, mode="max-autotune-no-cudagraphs")
    ys, xs = y.flatten(0, 1), x.repeat_interleave(y.shape[1], 0)
    rivals = {
        "ours": lambda: reward.paired_reward_op(*fields, list(packed.longest), 2, 1.0, 0.1, False),
        "ours with packing": lambda: vp.paired_rewards(batch, use_kernel=True),
        "eager": lambda: vp.paired_rewards(batch, use_kernel=False),
        "torch.compile max-autotune (scores only)": lambda: compiled(y, x),
    }
    late, flash = library("late_interaction_kernels"), library("flash_maxsim")
    if late:
        rivals["late-interaction-kernels, both directions"] = lambda: (
            late.maxsim_pairs(ys, xs, normalize=True), late.maxsim_pairs(xs, ys, normalize=True)
        )  # fmt: skip
    if flash:
        rivals["flash-maxsim, both directions, not normalised"] = lambda: (
            flash.flash_maxsim_pairs(ys, xs), flash.flash_maxsim_pairs(xs, ys)
        )  # fmt: skip
    return rivals


# --- Measuring -------------------------------------------------------------------------------------------------------


def measure(function: Callable) -> dict:
    """Median and both percentiles in milliseconds, and the peak memory above what was there, in MB."""
    from triton.testing import do_bench

    function()  # compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    del kept
    median, low, high = do_bench(function, warmup=100, rep=500, quantiles=[0.5, 0.2, 0.8])
    return {"ms": median, "ms_20": low, "ms_80": high, "peak_mb": peak}


def ceilings() -> dict:
    """Bytes a second of a 2 GB copy (read and written), FLOPs a second of a bfloat16 product of 8192 cubed."""
    a, b = (torch.empty(1 << 30, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    copy = measure(lambda: b.copy_(a))["ms"]
    x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: x @ y)["ms"]
    return {"bytes_per_second": 2 * 2 * a.numel() / copy * 1e3, "flops_per_second": 2 * 8192**3 / product * 1e3}


def cases() -> list[tuple]:
    """(kernel, sizes, inputs, rivals, least bytes, least FLOPs) of each benchmark; bfloat16."""
    bf16, out = torch.bfloat16, []
    # (clips, keywords a clip, tokens a clip): the size, and one training step of Qwen2.5-VL-7B, 8
    # clips of 24 slots of 256 tokens, 4 of them key; before and after the projection to 256.
    for clips, keywords, tokens, D in ((256, 2, 64, 3584), (8, 1, 1024, 3584), (8, 1, 1024, 256)):
        rows, K = 2 * clips * tokens, clips * keywords
        make = lambda a=(clips, keywords, tokens, D): contrastive_inputs(*a, bf16)  # noqa: E731
        num_bytes, flops = 2 * (3 * rows * D + 3 * K * D), 6 * rows * K * D
        out.append(("contrastive", f"{rows} states, K={K}, D={D}", make, contrastive_rivals, num_bytes, flops))
    for M, H, V in ((4096, 3584, 152064), (512, 2048, 151936)):
        out.append((
            "log-probs", f"M={M}, H={H}, V={V}", lambda a=(M, H, V): head_inputs(*a, bf16),
            head_rivals, 2 * (2 * V * H + 3 * M * H), 6 * M * H * V,  # the logits twice, and the product with the head
        ))  # fmt: skip
    for P, G, L, T, D in ((16, 8, 256, 256, 384), (8, 8, 64, 32, 384)):
        rollouts = P * 2 * G
        out.append((
            "reward", f"{P} prompts x ({G}+{G}) x {L} tokens, T={T}, D={D}",
            lambda a=(P, G, L, T, D): text_inputs(*a, bf16, ragged=False),
            text_rivals, 2 * (rollouts * L * D + P * T * D), 2 * rollouts * L * (T + 8) * D,
        ))  # fmt: skip
    return out


def run_benchmarks(only: str | None) -> tuple[dict, list[dict]]:
    """All cases, printed as they come."""
    top = ceilings()
    print(f"copy {top['bytes_per_second'] / 1e12:.2f} TB/s, bf16 product {top['flops_per_second'] / 1e12:.0f} TFLOP/s")
    rows = []
    for kernel, sizes, make, rivals, num_bytes, flops in cases():
        if only and kernel != only:
            continue
        floor = 1e3 * max(num_bytes / top["bytes_per_second"], flops / top["flops_per_second"])
        print(f"\n{kernel}: {sizes}   floor {floor:.3f} ms")
        for name, function in rivals(make()).items():
            try:
                row = measure(function)
            except (RuntimeError, AssertionError, TypeError, ValueError) as reason:  # a rival's limits are not ours
                print(f"  {name:46} failed: {str(reason).strip().splitlines()[0][:120]}")
                if name == "ours":
                    raise
                continue
            row |= {"kernel": kernel, "sizes": sizes, "name": name, "floor_ms": floor, "share": floor / row["ms"]}
            rows.append(row)
            print(f"  {name:46} {row['ms']:9.3f} ms ({row['ms_20']:.3f} to {row['ms_80']:.3f})  {row['share']:5.0%} of the "
                  f"ceiling  {row['peak_mb']:8.0f} MB")  # fmt: skip
        torch.cuda.empty_cache()
    return top, rows


def tune(only: str | None) -> list[dict]:
    """Our kernels on each case's size with other tiles, warps and stages: one choice for all kernels of a module."""
    rows = []
    for kernel, sizes, make, rivals, *_ in cases():
        module = {"contrastive": contrastive, "log-probs": logprob}.get(kernel)
        if module is None or (only and kernel != only):
            continue
        ours, usual = rivals(make())["ours"], module.launch
        print(f"\n{kernel}: {sizes}")
        for tile in (64, 128, 256):
            for step in (32, 64, 128):
                for warps, stages in ((4, 3), (4, 4), (8, 3), (8, 4)):
                    options = dict(num_warps=warps, num_stages=stages)
                    if module is logprob:
                        module.launch = lambda *_, given=((tile, tile, step), options): given
                    else:
                        module.launch = partial(square_tiles, tile, step, options)
                    about = {"tile": tile, "step": step, **options}
                    try:
                        rows.append({"kernel": kernel, "sizes": sizes, **about, **measure(ours)})
                        print(f"  {about}  {rows[-1]['ms']:.3f} ms")
                    except Exception as reason:  # too large for the card in more ways than one
                        print(f"  {about}  {type(reason).__name__}")
        module.launch = usual
    return rows


def square_tiles(tile: int, step: int, options: dict, kernel: str, *_) -> dict[str, int]:
    """Tiles of the contrastive kernels: `step` along the axis that a product sums over, `tile` along the others."""
    summed = {"similarity": "BLOCK_D", "states": "BLOCK_K", "keywords": "BLOCK_N", "coefficients": "BLOCK_K"}[kernel]
    return dict(BLOCK_N=tile, BLOCK_K=tile, BLOCK_D=tile) | {summed: step} | options


def draw(rows: list[dict], path: Path) -> None:
    """Bars of medians, one panel a case; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((r["kernel"], r["sizes"]) for r in rows))
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 2.2 * len(groups)), squeeze=False, layout="constrained")
    for axis, group in zip(axes[:, 0], groups):
        mine = [r for r in rows if (r["kernel"], r["sizes"]) == group][::-1]
        spread = [[r["ms"] - r["ms_20"] for r in mine], [r["ms_80"] - r["ms"] for r in mine]]
        colours = ["tab:blue" if r["name"].startswith("ours") else "tab:gray" for r in mine]
        axis.barh([r["name"] for r in mine], [r["ms"] for r in mine], xerr=spread, color=colours)
        axis.axvline(mine[0]["floor_ms"], color="tab:red", linestyle=":")
        axis.set(title=f"{group[0]}: {group[1]}", xlabel="ms (dotted: the card's floor)", xscale="log")
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    """Correctness, benchmarks, table, files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for bench.json and bench.png")
    parser.add_argument("--only", choices=("contrastive", "log-probs", "reward"), help="time one kernel")
    parser.add_argument("--tune", action="store_true", help="try other tiles instead of timing rivals")
    args = parser.parse_args()
    if not dispatch.HAS_TRITON:
        sys.exit("error: the benchmark needs Triton; pip install triton")
    import triton

    about = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    about |= {"device": torch.cuda.get_device_name() if ON_GPU else "none", "date": time.strftime("%Y-%m-%d %H:%M")}
    print(" ".join(f"{k} {v}" for k, v in about.items()))
    if not ON_GPU:
        print("No GPU: the kernels run under Triton's interpreter, for correctness on tiny sizes; none is timed.")
    errors = check_all()
    if not ON_GPU:
        time_public()
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tune:
        report = about | {"errors": errors, "tuning": tune(args.only)}
    else:
        top, rows = run_benchmarks(args.only)
        report = about | top | {"errors": errors, "rows": rows}
        draw(rows, args.out / "bench.png")
    (args.out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    print(args.out / "bench.json")


if __name__ == "__main__":
    main()
