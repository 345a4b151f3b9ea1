"""Commands of the repository, each in a process of its own that costs no import.

A server process imports the scripts once and is forked for every command: importing takes twelve seconds of a
core, and a small run one or two. What a fork cannot show (Ctrl-C while Python still imports, a first import,
torchrun) starts Python.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent.parent
# The scripts, and what they and transformers import late.
IMPORTED = ["train_sft", "train_rl", "eval", "data.curation.curate", "matplotlib.pyplot", "peft", "sentence_transformers"]
IMPORTED += ["nltk.stem.porter", "rouge_score.rouge_scorer", "scipy.stats"]
IMPORTED += [f"transformers.models.{m}.modeling_{m}" for m in ("qwen2_5_vl", "qwen3_vl", "bert")]


SERVER = forkserver.ForkServer()  # beside the one of multiprocessing, which the loader's workers come from
SERVER.set_forkserver_preload(IMPORTED)


def _be_the_command(words: Sequence[str], folder: str, environment: dict, outputs: Sequence[str], before: Callable) -> None:
    """In the new process: take over folder, environment and outputs, then do what `python *words` does."""
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if before is not None:
        before()
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


class Command:
    """A command under way. before: a function of a module, called in the new process first."""

    def __init__(self, *words: object, cwd: Path, env: dict | None = None, before: Callable | None = None):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        environment = os.environ | {"COLUMNS": "160"} | (env or {})
        self.words, self.scratch = list(map(str, words)), tempfile.TemporaryDirectory()
        self.paths = [f"{self.scratch.name}/{name}" for name in ("out", "err")]
        for path in self.paths:
            Path(path).touch()
        arguments = (self.words, str(cwd), environment, self.paths, before)
        self.process = multiprocessing.get_context("forkserver").Process(target=_be_the_command, args=arguments)
        os.environ["PYTHONPATH"] = str(HERE)  # for the server's own imports; it starts with the first command
        with mock.patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return Path(self.paths[0]).read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until it has printed a text."""
        end = time.monotonic() + seconds
        while text not in self.stdout:
            assert self.process.is_alive() and time.monotonic() < end, self.stdout + Path(self.paths[1]).read_text()
            time.sleep(0.01)

    def wait(self, seconds: float = 600) -> subprocess.CompletedProcess:
        """Until it has ended; its exit code (negative: the signal) and what it printed."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds:g} s: {self.stdout}")
        printed = [Path(path).read_text(errors="replace") for path in self.paths]
        self.scratch.cleanup()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *printed)


def run(*words: object, check: bool = True, cwd: Path = HERE, **more) -> subprocess.CompletedProcess:
    """Run a command to its end; with check, one that fails is an AssertionError with what it printed."""
    done = Command(*words, cwd=cwd, **more).wait()
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done
