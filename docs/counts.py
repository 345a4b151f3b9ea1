"""Count what docs/code.md says of the code: lines, names, comments.

python -m docs.counts                     # this repository
python -m docs.counts --folder ../old     # a checkout of another commit
"""

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

import tyro

SCRIPTS = ("vp.py", "train_sft.py", "train_rl.py")


@dataclass
class Settings:
    """Settings of `python -m docs.counts`."""

    folder: Path = Path(__file__).parent.parent
    """The repository to count."""


def names_of_main(tree: ast.Module) -> int:
    """How many names the function `main` assigns."""
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return len({n.id for n in ast.walk(main) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)})


def tuple_assignments(tree: ast.Module) -> int:
    """How many assignments have a tuple on both sides."""
    assignments = [n for n in ast.walk(tree) if isinstance(n, ast.Assign)]
    return sum(isinstance(a.targets[0], ast.Tuple) and isinstance(a.value, ast.Tuple) for a in assignments)


def comment_density(text: str, tree: ast.Module) -> float:
    """Comment lines for each line of code. Docstrings are neither; what a formatter reads is no comment."""
    code, comments, docs = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments |= {token.start[0]} if not token.string.startswith(("# fmt:", "# noqa")) else set()
        elif token.type not in layout:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(comments) / len(code - docs)


def loop(text: str) -> str:
    """Lines of the training loop that are the method, of all: what comes before its comment "Bookkeeping"."""
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    starts = [i for i, line in enumerate(lines) if line.strip() == "for _ in run.steps():"]
    if not starts:
        return "?"
    begin, mark = starts[0] + 1, "# Bookkeeping"
    indent = len(lines[begin]) - len(lines[begin].lstrip())
    end = next(i for i in range(begin, len(lines)) if len(lines[i]) - len(lines[i].lstrip()) < indent)
    after = text[text.index(mark) :].splitlines()[1:]
    first = next(line for line in after if line.strip())
    return f"{lines.index(first, begin) - begin} of {end - begin}"


def main(settings: Settings) -> None:
    """Print the column of the table."""
    texts = {name: (settings.folder / name).read_text() for name in SCRIPTS}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    loops, density = SCRIPTS[1:], (*SCRIPTS, "kernels/logprob.py")
    hidden = {".venv", "runs", "tests"}
    files = [f for f in settings.folder.rglob("*.py") if not hidden & set(f.relative_to(settings.folder).parts)]
    lines = {f.relative_to(settings.folder): f.read_text().splitlines() for f in files}
    longest = max(lines, key=lambda f: len(lines[f]))
    long = sum(len(line) > 110 for each in lines.values() for line in each)
    comments = []
    for name in density:
        text = (settings.folder / name).read_text()
        comments.append(f"{comment_density(text, ast.parse(text)):.2f}")
    print("lines:", ", ".join(f"{len(text.splitlines())}" for text in texts.values()))
    print("method in the loop:", ", ".join(loop(texts[name]) for name in loops))
    print("names of main:", ", ".join(str(names_of_main(trees[name])) for name in loops))
    print("comments for each line of code:", ", ".join(comments))
    print("assignments of a tuple to a tuple:", sum(map(tuple_assignments, trees.values())))
    print(f"longest file: {len(lines[longest])} ({longest})")
    print(f"lines over 110: {long:,} of {sum(map(len, lines.values())):,}")
    print(f"README: {len((settings.folder / 'README.md').read_text().split()):,} words")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
