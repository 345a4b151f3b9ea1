"""Which file may import which: arrows point one way, and there is no cycle."""

import ast
import graphlib
from pathlib import Path

HERE = Path(__file__).parent.parent
# What each part may import of the others, besides itself. The commands of kernels/ and docs/ are scripts as well.
ALLOWED = {
    "kernels": set(),
    "vp": {"kernels"},
    "kernels.check": {"kernels", "vp"},  # holds the kernels to the method
    "data": {"kernels", "vp"},
    "data.run": {"kernels", "kernels.check", "vp", "data"},
    "data.curation": {"kernels", "vp", "data", "data.run"},
    "data.benchmarks": {"kernels", "vp", "data", "data.run"},
    "data.measure": {"kernels", "kernels.check", "vp", "data", "data.run", "data.benchmarks", "data.curation"},
    "scripts": {"kernels", "kernels.check", "vp", "data", "data.run", "data.benchmarks", "data.measure"},
}
SCRIPTS = (
    "train_sft.py",
    "train_rl.py",
    "eval.py",
    "kernels/bench.py",
    "kernels/fit.py",
    "docs/pictures.py",
    "docs/counts.py",
    "docs/other_world.py",
)


def modules() -> dict[str, Path]:
    """Our modules by name."""
    paths = [*HERE.glob("*.py"), *HERE.glob("kernels/*.py"), *HERE.glob("docs/*.py"), *HERE.glob("data/**/*.py")]
    names = {p: ".".join(p.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__") for p in paths}
    return {name: path for path, name in names.items()}


def part_of(name: str) -> str:
    """The part that a module belongs to."""
    if name.replace(".", "/") + ".py" in SCRIPTS:
        return "scripts"
    return next(part for part in sorted(ALLOWED, key=len, reverse=True) if f"{name}.".startswith(f"{part}."))


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, inside functions too, but not for type checkers only."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
               for n in ast.walk(node)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & known.keys() or {node.module}
    return found & known.keys()


def test_arrows_point_one_way():
    """No upward import, and no script that imports a script."""
    known = modules()
    for name, path in known.items():
        part = part_of(name)
        for other in imports(path, known):
            above = part_of(other)
            assert above == part != "scripts" or above in ALLOWED[part], f"{name} imports {other}"


def test_no_cycle():
    """The modules can be put in an order in which each imports earlier ones only."""
    known = modules()
    order = list(graphlib.TopologicalSorter({name: imports(path, known) for name, path in known.items()}).static_order())
    assert len(order) == len(known)


def test_what_a_part_knows():
    """kernels knows torch and triton only; the method knows nothing of files or of transformers."""
    for path in HERE.glob("kernels/*.py"):
        if f"kernels/{path.name}" not in SCRIPTS:
            assert "import transformers" not in path.read_text() and "from transformers" not in path.read_text()
    method = (HERE / "vp.py").read_text()
    assert "transformers" not in method and "pathlib" not in method


# Seconds of imports each, alone or by what they import; imported where they are used.
HEAVY = {"peft", "bitsandbytes", "sentence_transformers", "nltk", "rouge_score", "scipy", "matplotlib", "spacy"}


def test_scripts_start_quickly():
    """What a script imports before it can say anything holds none of the heavy packages, nor a schedule of transformers."""
    known, reached, ahead = modules(), set(), ["train_sft", "train_rl", "eval"]
    while ahead:
        reached.add(name := ahead.pop())
        ahead += imports(known[name], known) - reached
    for path in (known[name] for name in reached):
        for node in ast.parse(path.read_text()).body:  # of the module itself, not inside functions
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                schedules = {"peft" for alias in node.names if node.module == "transformers" and "schedule" in alias.name}
                names = {node.module.split(".")[0]} | schedules
            else:
                continue
            assert not names & HEAVY, f"{path.relative_to(HERE)}:{node.lineno}"
