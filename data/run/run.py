"""A training run: its terminal, files, processes and signals, and where it continues from.

`Run` never calls a model or an optimizer: what training does is in the train scripts.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import TypeVar

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from torch import Tensor, nn

from data import device
from data.clips import load_clips
from data.examples import Preparation
from data.files import ClipError
from data.loader import ClipLoader
from data.run import checkpoints, memory, processes
from data.run.log import RunLog, describe_environment, progress_table
from data.run.models import load_processor, num_parameters
from data.run.precision import choose_attention
from data.run.settings import TrainSettings
from data.run.sheets import warn
from data.video import Clip
from kernels.check import replace_unfit

T = TypeVar("T")


class TooManyBadSteps(ValueError):
    """Loss or gradient stays NaN or Inf."""


class Metrics:
    """Named numbers of the steps since the last line of metrics.jsonl. They stay on the device until they are averaged.

    records: one a step, or one a prompt; not every record has every name.
    """

    def __init__(self, saved: Sequence[Mapping[str, float]] = ()):
        self.records: list[dict[str, Tensor | float]] = [dict(record) for record in saved]

    def add(self, record: Mapping[str, Tensor | float]) -> None:
        """Note one record."""
        self.records.append(dict(record))

    def numbers(self) -> list[dict[str, float]]:
        """The records as plain numbers. Waits for the device, once."""
        tensors = [value for record in self.records for value in record.values() if isinstance(value, Tensor)]
        read = iter(torch.stack([t.detach().float().reshape(()) for t in tensors]).tolist() if tensors else [])
        return [{n: next(read) if isinstance(v, Tensor) else float(v) for n, v in r.items()} for r in self.records]


def means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name over the records that have it.

    >>> means([{"a": 1.0}, {"a": 2.0, "b": 5.0}])
    {'a': 1.5, 'b': 5.0}
    """
    names = dict.fromkeys(name for record in records for name in record)
    found = {name: [record[name] for record in records if name in record] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def counted(records: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The records of the steps that were not skipped; if all were, one of NaN.

    >>> counted([{"a": 1.0, "skipped": 0.0}, {"a": 9.0, "skipped": 1.0}]), counted([{"a": 9.0, "skipped": 1.0}])
    ([{'a': 1.0}], [{'a': nan}])
    """
    kept = [{name: x for name, x in r.items() if name != "skipped"} for r in records if not r["skipped"]]
    return kept or [dict.fromkeys((name for name in records[0] if name != "skipped"), math.nan)]


class Run:
    """One run of a train script. See the methods in the order in which a script calls them."""

    def __init__(self, settings: TrainSettings, resolve: Callable[[TrainSettings], TrainSettings], free: Sequence[str]):
        """Start: processes, settings, seed, terminal, and where to continue from.

        resolve: checks the settings and fills in what they leave open; one process makes the embedded world, and the
        others find it. free: settings that may change when a run is resumed.
        """
        self.accelerator = processes.start_processes(settings.tracker, settings.out)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        self.peers = processes.new_peers(self.num_processes)
        with processes.first_process_first(self.rank, self.peers):
            self.settings = resolve(settings)
        set_seed(self.settings.seed)
        self.console = Console(quiet=not self.is_main, emoji=False)
        self.resumed = checkpoints.resume(self.settings, free, self.num_processes)
        self.step = self.resumed.step
        self.problems: list[str] = []  # of the training file
        self.eval_problems: list[str] = []
        state = self.resumed.state
        self.bad_steps = torch.tensor(state.get("bad_steps", 0.0), device=self.device)
        self.bad_in_a_row = torch.tensor(state.get("bad_in_a_row", 0.0), device=self.device)
        self.metrics, self.loader_state, self.live = Metrics(), None, None
        self.stopping, self.saved_extra = False, dict(state.get("extra", {}))
        self._stop_asked = False
        signal.signal(signal.SIGTERM, self._ask_to_stop)

    def _ask_to_stop(self, *_) -> None:
        self._stop_asked = True

    # --- before the first step

    def split_batch(self, clips: int = 1) -> int:
        """How often this process takes so many clips in a step. Raises ValueError if that does not come out even."""
        batch_size = self.settings.batch_size
        count, left_over = divmod(batch_size, clips * self.num_processes)
        if left_over:
            raise ValueError(
                f"--batch-size {batch_size} is not a multiple of {clips} clips x {self.num_processes} processes"
            )
        return count

    def load_clips(self, new_tokens: int) -> tuple[list[Clip], list[Clip], Preparation]:
        """The clips to train on and to evaluate on, and how a clip becomes tokens.

        Lines that cannot be used, and clips whose text is too long for the model, are noted, to be named by `show_start`.
        new_tokens: of the longest description that training samples, for which the model's context must have room.
        """
        s = self.settings
        clips, self.problems = load_clips(s.data, s.root, s.follow_links)
        eval_clips = []
        if s.eval_data:
            eval_clips, self.eval_problems = load_clips(s.eval_data, s.root, s.follow_links)
        # Files first: what is missing on this machine is told before a hub is asked for anything.
        processor = load_processor(s.model)
        self.architecture = memory.skeleton(s.model)  # the model without weights
        preparation = Preparation(
            processor, s.max_frames, s.fps, max_pixels=s.max_pixels,
            context=self.architecture.config.text_config.max_position_embeddings, visual_tokens=s.visual_tokens,
            skim=s.how_to_look(), cache=s.cache,
        )  # fmt: skip
        clips, too_long = memory.leave_out_long(clips, preparation, s.max_text_tokens, new_tokens)
        self.problems += too_long
        # An evaluation reads no caption.
        longest = max(new_tokens, memory.EVAL_TOKENS)
        eval_clips, too_long = memory.leave_out_long(
            eval_clips, preparation, s.max_text_tokens, longest, captions=False
        )  # fmt: skip
        self.eval_problems += too_long
        return clips, eval_clips, preparation

    def budget(self, load: memory.Load) -> memory.Budget:
        """What a step with this load will need, known before the model is loaded."""
        s = self.settings
        return memory.Budget(self.architecture, load, vars(s), self.device, s.memory_gb, self.num_processes)

    def share(self, block: int) -> dict[str, int]:
        """Which clips of the common order this process takes: arguments of `ClipLoader`."""
        return {"rank": self.rank, "world_size": self.num_processes, "block": block}

    def restore(self, lm: nn.Module, optimizer, schedule, loader: ClipLoader) -> None:
        """If a run is resumed: put everything where it was."""
        if self.resumed.path:
            mine = checkpoints.restore(self.resumed, lm, optimizer, schedule, loader, self.rank)
            self.metrics = Metrics(mine["metrics"])
        self.loader_state = loader.state()
        loader.start()

    def show_start(self, clips: Sequence[Clip], lm: nn.Module) -> None:
        """Open the log and print what a run begins with: settings, environment, parameters, skipped lines by name.

        Raises ClipError if more of the annotation file is bad than --max-bad-share allows.
        """
        s = self.settings
        self.log = RunLog(s.out, s, self.accelerator, self.resumed.step)
        self.console.print(asdict(s) | describe_environment())
        trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.console.print(
            f"{len(clips)} clips, {len(self.problems)} lines skipped; {trained / 1e6:.2f} M of "
            f"{num_parameters(lm) / 1e6:.2f} M parameters trained; attention: {choose_attention()}; "
            f"{self.num_processes} process(es)"
        )
        if self.device.type == "cuda" and device.compute_dtype(self.device) == torch.float32:
            self.console.print("[yellow]this card has no bfloat16 (compute capability below 8.0): computing in float32")
        for name, why in replace_unfit(self.device).items():
            warn(self.console, "kernel not taken", f"{name}, its reference stands in: {why}")
        for note in self.resumed.notes:
            self.console.print(note, highlight=False)
        for problem in self.eval_problems + self.problems:
            warn(self.console, "skipped", problem)
        if len(self.problems) > s.max_bad_share * (len(clips) + len(self.problems)):
            allowed = f"--max-bad-share {s.max_bad_share:g} allows"
            raise ClipError(f"{s.data}: {len(self.problems)} bad lines are more than {allowed}")

    # --- the loop

    @contextmanager
    def guard(self, saver: "checkpoints.Saver", budget: "memory.Budget") -> Iterator[None]:
        """Around the loop: the live table, the measured memory, and no error that loses what was trained."""
        self.began = self.mark = time.perf_counter()
        self.tokens = self.num_steps = 0  # since `mark`
        self.peak, self.held = memory.PeakMemory(self.device), budget.held
        live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else nullcontext()
        # Other processes wait elsewhere: there is no saving together with them.
        explained = budget.explained(lambda: self.num_processes == 1 and saver.rescue())
        with self.peak, live as self.live, explained:
            try:
                yield
            except TooManyBadSteps:
                saver.save(self.step, merged=True)
                raise
            except ClipError:  # too many clips are lost
                saver.rescue()
                raise

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to make. After SIGTERM the step under way is the last."""
        while self.step < self.settings.steps and not self.stopping:
            self.step += 1
            yield self.step

    @property
    def is_last(self) -> bool:
        """Whether no step follows this one."""
        return self.stopping or self.step == self.settings.steps

    def together(self, make: Callable[[], T]) -> T:
        """What `make` returns. If it raises ClipError in one process, all of them end; all learn of a SIGTERM to one."""
        made, lost = None, None
        try:
            made = make()
        except ClipError as error:
            lost = error
        any_lost, any_stop = self.agree(lost is not None, self._stop_asked)
        self.stopping = any_stop > 0
        if any_lost:
            raise lost or ClipError("another process has lost too many clips")
        return made

    def agree(self, *values: float) -> list[float]:
        """Sums over all processes."""
        return processes.agree(values, self.peers)

    def mean_counts(self, *counts: float) -> list[float]:
        """Counts of a step, a process on average: gradients are averaged over processes, so each divides by these."""
        return [total / self.num_processes for total in self.agree(*counts)]

    def autocast(self) -> AbstractContextManager:
        """bf16 on a GPU that has it, nothing on a CPU."""
        return device.autocast(self.device)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named scalars, averaged over processes, on the device."""
        stacked = torch.stack([torch.as_tensor(v, device=self.device).detach().float() for v in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").unbind()))

    def count_bad(self, found_inf: Tensor) -> None:
        """Count an update that the optimizer left out (found_inf 1) or made (0), on the device."""
        self.bad_steps += found_inf
        self.bad_in_a_row = (self.bad_in_a_row + 1) * found_inf

    def end_of_step(self, loader: ClipLoader, tokens: int) -> None:
        """Note how far the data has been used up. tokens: that this process has seen in the step."""
        self.loader_state = loader.state()
        self.tokens += tokens * self.num_processes
        self.num_steps += 1
        if self.step == self.resumed.step + 1:
            self.console.print(memory.measured(self.peak.stop(), self.held))

    def due(self, every: int) -> bool:
        """Whether something that is done every so many steps (-1: never) is to be done after this one."""
        return every > 0 and self.step % every == 0

    def write_metrics(self, loader: ClipLoader, records: Sequence[Mapping[str, float]], more: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl: the means of the records of all processes, and `more`; show it.

        Raises TooManyBadSteps.
        """
        records = processes.gather(records, self.peers)
        metrics = {"step": self.step} | means(records) | more
        metrics["data/skipped"] = sum(self.agree(len(loader.skipped)))
        self.log.write(metrics)
        self.metrics = Metrics()
        left = (self.settings.steps - self.step) * (time.perf_counter() - self.began) / (self.step - self.resumed.step)
        title = f"{self.settings.out}  step {self.step}/{self.settings.steps}"
        if self.live:
            self.live.update(progress_table(title, metrics, left), refresh=True)
        elif self.due(10 * self.settings.log_every) or self.is_last:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.console.print(f"{shown}  {left / 60:.1f} min left", highlight=False, soft_wrap=True)
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            raise TooManyBadSteps(
                f"loss or gradient was NaN or Inf in {int(self.bad_in_a_row)} updates in a row; none of them changed the "
                f"weights, which are saved in {self.settings.out / 'checkpoint'}. Try a lower --learning-rate"
            )

    def speed(self) -> dict[str, float]:
        """Seconds a step and tokens a second since this was last asked; loading included, evaluations not."""
        now = time.perf_counter()
        seconds = now - self.mark
        found = {"perf/step_seconds": seconds / self.num_steps, "perf/tokens_per_second": self.tokens / seconds}
        self.mark, self.tokens, self.num_steps = now, 0, 0
        return found

    def state(self) -> dict:
        """What all processes need to continue, besides weights and optimizer."""
        return {"bad_steps": self.bad_steps.item(), "bad_in_a_row": self.bad_in_a_row.item(), "extra": self.saved_extra}

    # --- after the last step

    def show_skipped(self, loader: ClipLoader) -> None:
        """Name the clips that were lost on the way."""
        for reason in loader.skipped.values():
            warn(self.console, "skipped", reason)

    def end(self, panels: Mapping[str, Sequence[str]], *files: str) -> None:
        """Draw the curves and name the files of the run."""
        if self.is_main:
            seconds = time.perf_counter() - self.began
            shown = [self.log.plot(panels), *(self.settings.out / file for file in files)]
            lines = "\n".join(escape(str(path)) for path in shown)
            self.console.print(f"{lines}  ({self.step} steps in {seconds:.0f} s)", highlight=False)
        self.accelerator.end_training()
