"""Which cards do the kernels fit on? Compiles each of them for every card, without a GPU: python -m kernels.fit

Prints a table: registers, bytes spilled to memory, bytes of shared memory of each kernel at the tiles that its launch
takes, by card and dtype. Needs Triton, whose own assembler tells these numbers; nothing runs.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import contrastive, logprob, reward

# Compute capability -> shared memory that a block may take, in KB, and cards that have it.
CARDS = {
    80: (163, "A100"), 86: (99, "RTX 30, A10"), 89: (99, "RTX 40, L4, L40"), 90: (227, "H100, H200"),
    100: (227, "B200"), 120: (99, "RTX 50"),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What is not float32 among the arguments: the data in 16 bits, indices, and numbers; all others are int32.
DATA = {"full_ptr", "twin_ptr", "k_ptr", "unit_ptr", "g_ptr", "dfull_ptr", "dtwin_ptr", "dk_ptr", "h_ptr", "w_ptr"}
DATA |= {"a_ptr", "b_ptr", "y_ptr", "x_ptr", "dz_ptr"}
POINTERS = dict.fromkeys(("slot_ptr", "clip_ptr", "shown_ptr", "kclip_ptr", "kid_ptr", "target_ptr"), "i64")
POINTERS |= dict(kslots_ptr="u8", ok_ptr="u8", **dict.fromkeys(("first_token_ptr", "first_word_ptr"), "i32"))
POINTERS |= dict.fromkeys(("num_reference_ptr", "first_weight_ptr", "prompt_ptr", "first_rollout_ptr", "group_ptr"), "i32")
NUMBERS = ("inverse_temperature", "alpha", "margin")
# Sizes of the model and strides, divisible by 16, which the compiler is told; counts are not (do_not_specialize).
ALIGNED = ("D", "H", "V", "cols_each", "width", "stride_am", "stride_ak")


@dataclass
class Compiled:
    """A kernel for a card: registers of a thread, bytes spilled, bytes of shared memory of a block."""

    name: str
    registers: int
    spilled: int
    shared: int

    def fits(self, card: int) -> bool:
        """Whether it runs there, and without a register in memory."""
        return self.spilled == 0 and self.shared <= CARDS[card][0] * 1024


def launches(dtype: torch.dtype) -> Iterator[tuple[str, object, dict, dict]]:
    """(name, kernel, constants and options, arguments that are constants too) of all launches of runs and benchmarks."""
    for D in (256, 4096):  # a whole row
        yield f"normalise_keywords D={D}", contrastive.normalise_keywords, dict(EPS=1e-12, BLOCK_D=D), {}
        yield f"keywords_gradient D={D}", contrastive.keywords_gradient, dict(BLOCK_D=D), {}
    yield "combine_parts", contrastive.combine_parts, dict(BLOCK_B=128), {}
    largest = 6e4 if dtype == torch.float16 else 1e12
    for K in (12, 512):
        tiles = {name: contrastive.launch(name, dtype, K) for name in ("similarity", "coefficients", "states", "keywords")}
        del tiles["coefficients"]["BLOCK_D"]
        store, twin = dict(EPS=1e-12, STORE=True), dict(HAS_TWIN=True, LARGEST=largest)
        yield f"similarity_tile K={K}", contrastive.similarity_tile, store | tiles["similarity"], {}
        yield f"coefficients K={K}", contrastive.coefficients, tiles["coefficients"], {}
        yield f"states_gradient K={K}", contrastive.states_gradient, tiles["states"], {}
        yield f"keywords_product K={K}", contrastive.keywords_product, twin | tiles["keywords"], {}
    tile, options = logprob.launch("head", dtype)
    tiles = dict(zip(("BLOCK_M", "BLOCK_V", "BLOCK_H"), tile)) | options
    yield "sum_stretches", logprob.sum_stretches, tiles, {}
    yield "logits_gradient", logprob.logits_gradient, tiles, {}
    tile, options = logprob.launch("multiply", dtype)
    tiles = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile)) | options
    yield "multiply, to the states", logprob.multiply, dict(ADD=True) | tiles, {"stride_ak": 1, "out_ptr": "fp32"}
    yield "multiply, to the head", logprob.multiply, dict(ADD=False) | tiles, {"stride_am": 1, "out_ptr": None}
    tiles = reward.launch(dtype)
    yield "match_words", reward.match_words, tiles, {}
    for R in (16, 64):
        yield f"reward_group R={R}", reward.reward_group, dict(KIND=2, DIVIDE=True, BLOCK_R=R) | reward.GROUP, {}


def compile_for(card: int, dtype: str, name: str, kernel, constants: dict, given: dict) -> Compiled:
    """One kernel, compiled and assembled for a card."""
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    signature, constant, aligned = {}, {}, {}
    for i, p in enumerate(kernel.params):
        value = given.get(p.name)
        if p.is_constexpr or isinstance(value, int):
            signature[p.name], constant[(i,)] = "constexpr", constants[p.name] if p.is_constexpr else value
            continue
        if p.name.endswith("_ptr"):
            signature[p.name] = "*" + (value or (dtype if p.name in {*DATA, *given} else POINTERS.get(p.name, "fp32")))
        else:
            signature[p.name] = "fp32" if p.name in NUMBERS else "i32"
        if p.name.endswith("_ptr") or p.name in ALIGNED or (kernel is logprob.multiply and p.name == "N"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    done = triton.compile(ASTSource(kernel, signature, constant, aligned), GPUTarget("cuda", card, 32), options)
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = folder / ("ptxas-blackwell" if card >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas")
    target = re.search(r"\.target (\S+)", done.asm["ptx"])[1].split(",")[0]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(done.asm["ptx"])
        file.flush()
        command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    said = told.stderr + told.stdout
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    return Compiled(name, int(registers[1]), int(spilled[1]), done.metadata.shared)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, nargs="+", default=list(CARDS), help="compute capabilities, as 86")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name holds one of these")
    arguments = parser.parse_args()
    print("| kernel | dtype | " + " | ".join(f"sm_{card}" for card in arguments.cards) + " |")
    print("|---" * (2 + len(arguments.cards)) + "|")
    unfit = 0
    for dtype in arguments.dtypes:
        for name, kernel, constants, given in launches(DTYPES[dtype]):
            if not any(part in name for part in arguments.only):
                continue
            cells = []
            for card in arguments.cards:
                found = compile_for(card, dtype, name, kernel, constants, given)
                unfit += not found.fits(card)
                wrong = "" if found.fits(card) else f" **{found.spilled} bytes spilled**"
                cells.append(f"{found.registers}, {found.shared / 1024:.0f} KB{wrong}")
            print(f"| {name} | {dtype} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nRegisters of a thread, shared memory of a block; {unfit} of these spill or do not fit.")
    sys.exit(unfit > 0)


if __name__ == "__main__":
    main()
