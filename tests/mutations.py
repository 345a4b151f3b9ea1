"""Do the tests notice? Puts faults into a copy of the repository, one by one, and runs the test that should turn red.

    python -m tests.mutations                 # all faults: some minutes on one core
    python -m tests.mutations --only clip     # those whose name holds a text

Exit code 1 if a test stays green. A fault is a replacement of text; it must find its text exactly once, so a fault that
the code has outgrown is an error, and has to be written anew.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).parent.parent
SFT, RL, LM, MODELS = "train_sft.py", "train_rl.py", "data/videolm.py", "data/run/models.py"
HARD = "data/run/hard_prompts.py"
# The tests of tests/test_reference_loops.py, by case.
CONTRASTIVE, CAPTION_ONLY = "stage_1[contrastive]", "stage_1[caption-only]"
NO_TWIN, TWIN_CAPTIONS = "stage_1[no-twin]", "stage_1[twin-captions]"
PACKED = "tests/test_rollouts.py::test_packed_update_equals_separate_sequences"
RELATIVE, POOLED, RECALL, SIMILARITY = "stage_2[relative]", "stage_2[pooled]", "stage_2[recall]", "stage_2[similarity]"


@dataclass
class Fault:
    """Text of a file that is replaced, and what should turn red: a case of test_reference_loops.py, or any test."""

    name: str
    file: str
    old: str
    new: str
    case: str

    @property
    def test(self) -> str:
        """As pytest names it."""
        return self.case if "::" in self.case else f"tests/test_reference_loops.py::test_{self.case}"


FAULTS = [
    # Stage 1.
    Fault("schedule never stepped", SFT, "            schedule.step()\n", "", CONTRASTIVE),
    Fault("schedule stepped before the optimizer", SFT,
          "            optimizer.step()\n            schedule.step()\n",
          "            schedule.step()\n            optimizer.step()\n", CAPTION_ONLY),
    Fault("lambda ignored", SFT, "(lm_loss + s.contrastive_weight * contrastive_loss)", "(lm_loss + contrastive_loss)",
          CONTRASTIVE),
    Fault("contrastive loss logged, not trained", SFT,
          "(lm_loss + s.contrastive_weight * contrastive_loss)", "(lm_loss)", CONTRASTIVE),
    Fault("gradient clipping off", SFT, "finish_gradients(lm, s.grad_clip", "finish_gradients(lm, 1e9", CONTRASTIVE),
    Fault("caption loss divided by its micro-batch's tokens", SFT, "out.lm_loss / num_tokens",
          "out.lm_loss / len(batch.label_ids)", CAPTION_ONLY),
    Fault("contrastive loss divided by its micro-batch's keywords", SFT, "out.contrastive_loss / num_keywords",
          "out.contrastive_loss / max(1, len(batch.keyword_ids))", CONTRASTIVE),
    Fault("zero_grad missing", SFT, "            optimizer.zero_grad()\n", "", CAPTION_ONLY),
    Fault("only the last micro-batch counts", SFT, "            for batch in batches:\n",
          "            for batch in batches:\n                optimizer.zero_grad()\n", CAPTION_ONLY),
    Fault("optimizer steps after every micro-batch", SFT, "contrastive_loss).backward()",
          "contrastive_loss).backward(), optimizer.step()", CONTRASTIVE),
    Fault("weight decay ignored", SFT, "s.learning_rate, s.weight_decay", "s.learning_rate, 0.0", CAPTION_ONLY),
    Fault("warm-up ignored", SFT, "s.steps, s.warmup, s.decay", "s.steps, 0.0, s.decay", CONTRASTIVE),
    Fault("decay ignored", SFT, "s.warmup, s.decay)", "s.warmup, 0.0)", CAPTION_ONLY),
    Fault("decay a step late", MODELS, "rising, falling, steps, ", "rising, falling, steps + 1, ", CAPTION_ONLY),
    Fault("cosine in stage 2", RL, ', shape="linear"', "", RELATIVE),
    Fault("AdamW's own betas", MODELS, "betas=(0.9, 0.99), ", "", CAPTION_ONLY),
    Fault("temperature ignored", SFT, "s.contrastive_layer, s.temperature)", "s.contrastive_layer)", CONTRASTIVE),
    Fault("contrastive layer ignored", SFT,
          "(hf, s.contrastive_layer, s.temperature)", "(hf, None, s.temperature)", NO_TWIN),
    Fault("twin negatives cannot be switched off", SFT, "contrastive, s.twin_negatives)", "contrastive, True)", NO_TWIN),
    Fault("contrastive heads not trained", MODELS, "for part in (lm.hf, lm.heads)]", "for part in (lm.hf,)]", CONTRASTIVE),
    Fault("vision encoder cannot be frozen", SFT, "s.lora_rank, s.freeze_vision", "s.lora_rank, False", NO_TWIN),
    Fault("the seed does not decide the order", SFT, "        s.seed, s.workers,", "        0, s.workers,", NO_TWIN),
    Fault("every epoch in the same order", "data/loader.py", "default_rng([self.seed, epoch])",
          "default_rng([self.seed, 0])", CONTRASTIVE),
    Fault("the twin is the full video", "data/packing.py", "video = replaced_part(e), twin_tokens(e, shown)",
          "video = replaced_part(e), shown", CONTRASTIVE),
    Fault("the twin ends where its event begins", "data/packing.py", "return Replaced(slice(first, last + 1)",
          "return Replaced(slice(first, first + 1)", "tests/test_videolm.py::test_vision_once_and_of_the_twin_its_event"),
    Fault("stage 2 describes what is known already", HARD, "order = sorted(likely, key=likely.get)",
          "order = sorted(likely, key=likely.get, reverse=True)",
          "tests/test_hard_prompts.py::test_the_hardest_are_all_there"),
    Fault("a resumed run chooses its clips anew", HARD, "    if run.resumed.path:\n", "    if False:\n",
          "tests/test_hard_prompts.py::test_hard_ones_and_others_are_described"),
    Fault("the last layer's MLP runs all rows", LM, "if self.cuts_rows and wanted_rows is not None:", "if False:",
          "tests/test_videolm.py::test_last_mlp_runs_what_is_read"),
    Fault("text vectors carry gradients", LM, "(batch.keyword_ids).detach()", "(batch.keyword_ids)", CONTRASTIVE),
    Fault("twins never shown as quiet clips", SFT, "twin_captions=s.twin_captions,", "twin_captions=0.0,", TWIN_CAPTIONS),
    Fault("quiet clips keep the event's pixels", "data/examples.py",
          "pixels=torch.cat([patches[slot] for slot in example.source.tolist()])", "pixels=example.pixels",
          "tests/test_twin.py::test_a_twin_as_a_quiet_clip"),
    # Stage 2.
    Fault("KL weight fixed at 0", RL, "s.clip_low, s.clip_high, s.beta", "s.clip_low, s.clip_high, 0.0", RELATIVE),
    Fault("reference is the policy of now", RL, "reference.log_probs(update.packed", "lm.log_probs(update.packed",
          SIMILARITY),
    Fault("raw rewards for advantages", RL, "return torch.cat([group.advantage.cpu()",
          "return torch.cat([group.reward.cpu()", RECALL),
    Fault("advantages of the wrong sign", RL, "return torch.cat([group.advantage.cpu()",
          "return torch.cat([-group.advantage.cpu()", RECALL),
    Fault("clip-low and clip-high swapped", RL, "s.clip_low, s.clip_high, s.beta", "s.clip_high, s.clip_low, s.beta",
          RELATIVE),
    Fault("schedule never stepped", RL, "                schedule.step()\n", "", RECALL),
    Fault("gradient clipping off", RL, "finish_gradients(lm, s.grad_clip", "finish_gradients(lm, 1e9", RELATIVE),
    Fault("old log-probabilities from now", RL, "logp, update.old_logp,", "logp, logp.detach(),", SIMILARITY),
    Fault("old log-probabilities of other tokens", RL, "for logp in x.sampled.logp]",
          "for logp in [y.flip(0) for y in x.sampled.logp]]", RELATIVE),
    Fault("the twin's rollouts trained on", RL, "getattr(self, name)[:count]", "getattr(self, name)[-count:]", SIMILARITY),
    Fault("reward kind ignored", RL, "[: len(prompts)], s.reward,", '[: len(prompts)], "relative",', SIMILARITY),
    Fault("alpha ignored", RL, "s.alpha, s.margin, s.divide_by_spread", "1.0, s.margin, s.divide_by_spread", RECALL),
    Fault("margin ignored", RL, "s.alpha, s.margin, s.divide_by_spread", "s.alpha, 0.0, s.divide_by_spread", RELATIVE),
    Fault("never divided by the spread", RL, "s.margin, s.divide_by_spread", "s.margin, False", POOLED),
    Fault("the twin's rollouts not compared", RL,
          "[0 if prompt.example.source is None else s.num_twin_rollouts for prompt in prompts]",
          "[0 for _ in prompts]", POOLED),
    Fault("groups without spread trained on", RL, "(a.abs().max() > 1e-6)", "torch.tensor(True)", SIMILARITY),
    Fault("temperature ignored while sampling", RL, "torch.from_numpy(np.stack(draws)), s.temperature,",
          "torch.from_numpy(np.stack(draws)),", RECALL),
    Fault("temperature ignored in the policy's log-probabilities", RL, "see(lm, update, video, s), s.temperature)",
          "see(lm, update, video, s))", RECALL),
    Fault("temperature ignored in the reference's", RL, "see(reference, update, video, s), s.temperature)",
          "see(reference, update, video, s))", RELATIVE),
    Fault("the seed does not decide the rollouts", RL, "[s.seed, prompt.place]", "[0, prompt.place]", POOLED),
    Fault("loss level ignored", RL, "s.loss_level, num_tokens", '"token", num_tokens', POOLED),
    Fault("divided by the tokens of some rollouts", RL, "s.loss_level, num_tokens)",
          "s.loss_level, float(lengths[0].sum()))",
          RECALL),
    Fault("one update on every batch", RL, "for epoch in range(s.epochs):", "for epoch in range(1):", SIMILARITY),
    Fault("epochs not counted in the schedule", RL, "s.steps * s.epochs, s.warmup", "s.steps, s.warmup", POOLED),
    Fault("zero_grad missing", RL, "                optimizer.zero_grad()\n", "", RECALL),
    Fault("only the last micro-batch counts", RL, "                    loss.backward()\n",
          "                    optimizer.zero_grad()\n                    loss.backward()\n", SIMILARITY),
    Fault("optimizer steps after every micro-batch", RL, "                    loss.backward()\n",
          "                    loss.backward()\n                    optimizer.step()\n", SIMILARITY),
    Fault("weight decay ignored", RL, "s.learning_rate, s.weight_decay", "s.learning_rate, 0.0", RELATIVE),
    Fault("warm-up ignored", RL, "s.epochs, s.warmup,", "s.epochs, 0.0,", RELATIVE),
    Fault("AdamW's own betas", MODELS, "betas=(0.9, 0.99), ", "", RELATIVE),
    Fault("vision encoder never trained", RL, "s.lora_rank, s.freeze_vision, s.gradient",
          "s.lora_rank, True, s.gradient", POOLED),
    Fault("the twin's branch sees the full video", RL, "x.sampled.tokens for x in some], s.num_rollouts)",
          "x.sampled.tokens for x in some])", RELATIVE),
    Fault("the twin's branch never trained", RL, "if num and s.twin_branch]", "if False]", RELATIVE),
    Fault("the twin's branch cannot be switched off", RL, "if num and s.twin_branch]", "if num]", SIMILARITY),
    Fault("the twin is scored by the whole caption", RL,
          "still = still_part(prompts[b].clip.caption, prompts[b].clip.keywords)",
          "still = prompts[b].clip.caption", RELATIVE),
    Fault("claims on the twin rewarded", "vp.py", '"recall", -alpha, divide', '"recall", alpha, divide', RELATIVE),
    Fault("alpha ignored on the twin", RL, "s.alpha, s.divide_by_spread)))", "1.0, s.divide_by_spread)))", RELATIVE),
    # Branches of a shared prefix.
    Fault("a token sees the one behind it", "data/packing.py", ".triu(total - length + 1)",
          ".triu(total - length + 2)", PACKED),
    Fault("rollouts see one another", "data/packing.py", "for j, seen in enumerate(row) if seen]",
          "for j, seen in enumerate(row) if seen or j == 1]", PACKED),
    # The method itself.
    Fault("a tie goes to the later neighbour", "vp.py", "return kept[distance.argmin(1)]",
          "return kept.flip(0)[distance.flip(1).argmin(1)]", CONTRASTIVE),
    Fault("no twin negatives in equation (1)", "vp.py", "allowed = torch.cat([allowed, positive], 1)",
          "allowed = F.pad(allowed, (0, len(twin)))", CONTRASTIVE),
    Fault("no margin on the quality in equation (2)", "vp.py", "no_worse = q[:, None] > q_twin[None, :] - margin",
          "no_worse = q[:, None] > q_twin[None, :] - 9", "tests/test_reward.py::test_wins_against_a_loop"),
    Fault("clipped ratio not taken in equation (5)", "vp.py", "-torch.minimum(unclipped, clipped)", "-unclipped", RELATIVE),
    Fault("KL of the wrong direction in equation (5)", "vp.py", "        x = ref_logp - logp\n",
          "        x = logp - ref_logp\n", RELATIVE),
    # Rollouts.
    Fault("rollouts see one another", "data/generation.py", "torch.eye(num, dtype=torch.bool, device=device)",
          "torch.ones(num, num, dtype=torch.bool, device=device)",
          "tests/test_rollouts.py::test_rollouts_equal_whole_passes"),
    Fault("rollouts of the twin grow from the full video", "data/generation.py", "[0] * num_full + [1] * num_twin",
          "[0] * num_full + [0] * num_twin", "tests/test_rollouts.py::test_rollouts_equal_whole_passes"),
]  # fmt: skip


@dataclass
class Settings:
    """Settings of `python -m tests.mutations`."""

    only: str = ""
    """Faults whose file, case or name holds this text."""
    time_limit: float = 600.0
    """Seconds for one test."""


@dataclass
class Result:
    """How a test ended: green, red, or error (it could not be run), and what it said."""

    outcome: str
    message: str = ""


class Watcher:
    """A plugin of pytest that keeps how the one test ended."""

    def __init__(self):
        self.result = Result("error", "no test ran")

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be imported proves nothing about the test."""
        if report.failed:
            self.result = Result("error", str(report.longrepr).strip().splitlines()[-1])

    def pytest_runtest_logreport(self, report) -> None:
        """A failing fixture proves nothing either."""
        if report.when == "call" or report.failed:
            said = getattr(getattr(report.longrepr, "reprcrash", None), "message", "").splitlines()
            outcome = "green" if report.passed else "red" if report.when == "call" else "error"
            self.result = Result(outcome, said[0] if said else "")


def run_test(folder: Path, test: str, results: multiprocessing.Queue) -> None:
    """Run one test in a copy of the repository; a forked process, in which nothing of the repository is loaded yet."""
    os.chdir(folder)
    sys.path[0] = str(folder)
    watcher = Watcher()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", test], [watcher])
    results.put(watcher.result)


def forget_repository() -> None:
    """Unload what was imported from the repository, and keep the libraries: they take most of a test's time."""
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or os.sep)
        if name != "__main__" and file.is_relative_to(HERE) and "site-packages" not in file.parts:
            del sys.modules[name]


def try_fault(copy: Path, fault: Fault | None, test: str, time_limit: float) -> Result:
    """Run a test with a fault in the copy, which is whole again afterwards."""
    path = copy / fault.file if fault else None
    text = path.read_text() if path else ""
    if fault:
        if text.count(fault.old) != 1:
            raise SystemExit(
                f"{fault.file}: '{fault.name}': found {text.count(fault.old)} times: {fault.old!r}; give a new text"
            )
        path.write_text(text.replace(fault.old, fault.new))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    process = fork.Process(target=run_test, args=(copy, test, results))
    process.start()
    process.join(time_limit)
    if process.is_alive():
        process.kill()
    result = results.get(timeout=5) if process.exitcode == 0 else Result("error", f"exit code {process.exitcode}")
    if fault:
        path.write_text(text)
    return result


def main(settings: Settings) -> int:
    """Try all faults; returns the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    faults = [f for f in FAULTS if settings.only in f"{f.file} {f.case} {f.name}"]
    began = time.perf_counter()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before the libraries are loaded
    importlib.import_module("tests.test_reference_loops")
    forget_repository()
    sys.dont_write_bytecode = True  # a fault may have the size and the second of the text before it
    table = Table("fault", "file", "test that went red", "it said")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        kept_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache")
        shutil.copytree(HERE, copy, ignore=kept_out, symlinks=True)
        for test in dict.fromkeys(fault.test for fault in faults):  # without a fault all are green, or nothing is shown
            result = try_fault(copy, None, test, settings.time_limit)
            if result.outcome != "green":
                console.print(f"{test} without a fault: {result.outcome}: {result.message}", markup=False)
                return 1
        for fault in faults:
            result = try_fault(copy, fault, fault.test, settings.time_limit)
            shown = {"red": escape(fault.case), "green": "[bold red]STILL GREEN[/]", "error": "[bold red]ERROR[/]"}
            table.add_row(
                fault.name, fault.file, shown[result.outcome], escape(result.message.removeprefix("AssertionError: ")[:60])
            )
            console.print(f"{result.outcome}: {fault.file}: {fault.name}", markup=False)
            bad += result.outcome != "red"
    console.print(table)
    console.print(f"{len(faults) - bad} of {len(faults)} faults turned a test red, in {time.perf_counter() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
