"""The import rules of the design, checked on the source: imports flow one way, and three things stay put.

The checker is tested below on a small false tree, so that a rule that checks nothing does not pass unseen.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tessel"

# A module may import its own layer's package and anything to the left. Modules in one set do not import
# each other. A new top-level module needs a place here.
LAYERS: tuple[set[str], ...] = (
    {"errors"},
    {"config", "safe_dir"},
    {"ir"},
    {"ops", "targets"},
    {"tiles"},
    {"solve"},
    {"frontend", "passes"},
    {"quant"},
    {"codegen"},
    {"runtime"},
    {"autotune"},
    {"report_html"},
    {"report"},
    {"place"},
    {"driver"},
    {"loaded"},
    {"backend", "build", "capture_cache", "models"},
    {"sharding"},
    {"wrapper"},
    {"__init__"},  # the public face
    {"cli"},
    {"__main__"},
)
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}

# What may be used -> by which files only (a folder ends in /).
ONLY = {
    "z3": ("solve/", "codegen/prove.py"),
    "triton": ("codegen/compile_job.py", "runtime/"),
    "torch.ops.aten": ("frontend/", "runtime/library.py"),
    "os.environ": ("config.py",),
    "torch.utils._pytree": ("frontend/compat.py",),
}
MEMBERS = ("torch.ops.aten", "os.environ", "torch.utils._pytree")


def violations(package: Path) -> list[str]:
    """What breaks the rules in the tree ``package``, one ``file:line: words`` each, in order of the files."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        own = inside.parts[0].removesuffix(".py")
        where = inside.as_posix()
        if own not in RANK:
            found.append(f"{where}:1: {own} has no place in LAYERS")
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            for what in _uses(node):
                if not where.startswith(ONLY[what]):
                    found.append(f"{where}:{node.lineno}: {what} belongs in {' and '.join(ONLY[what])}")
            for target in _imports(node, inside, package.name):
                top = target[0]
                if top != own and RANK.get(top, 99) >= RANK[own]:
                    found.append(f"{where}:{node.lineno}: {own} imports {top}, which is not to its left")
                if own == top == "passes" and _sibling_pass(inside, target, package):
                    found.append(f"{where}:{node.lineno}: a pass imports the pass {target[1]}")
    return found


def _uses(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        out = [n.split(".")[0] for n in names if n.split(".")[0] in ("z3", "triton")]
        members = {f"{names[0]}.{a.name}" for a in node.names}
        members |= set(names) if isinstance(node, ast.Import) else {names[0]}
        out += [what for what in MEMBERS if what in members]
        return out + ["os.environ"] * ("os.getenv" in members)
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        return [w for w in MEMBERS if text == w] + ["os.environ"] * (text == "os.getenv")
    return []


def _imports(node: ast.AST, inside: Path, package: str) -> list[tuple[str, ...]]:
    """The modules of the package that an import names, as parts below the package: ``("ir", "node")``."""
    if isinstance(node, ast.Import):
        paths = [tuple(a.name.split(".")) for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = tuple(node.module.split(".")) if node.module else ()
        if node.level:
            here = (package, *inside.parent.parts)
            base = here[: len(here) - node.level + 1] + base
        paths = [(*base, a.name) for a in node.names]
    else:
        return []
    ours = [p[1:] for p in paths if p and p[0] == package]
    # a name that is no module is something the public face offers
    return [p if p and p[0] in RANK else ("__init__",) for p in ours]


def _sibling_pass(inside: Path, target: tuple[str, ...], package: Path) -> bool:
    """Whether one pass file imports another; the pipeline imports all, a ``_helper.py`` is no pass."""
    if inside.name in ("pipeline.py", "__init__.py") or len(target) < 2:
        return False
    name = target[1]
    is_module = (package / "passes" / f"{name}.py").exists() or (package / "passes" / name).is_dir()
    return is_module and not name.startswith("_") and name != inside.parts[1].removesuffix(".py")


def test_imports_flow_one_way() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("ir/node.py", "from ..codegen import triton", "ir imports codegen"),
        ("ir/node.py", "import tessel.passes.fuse", "ir imports passes"),
        ("ir/node.py", "from tessel import runtime", "ir imports runtime"),
        ("ir/node.py", "def f():\n    from ..ops import table", "ir imports ops"),
        ("ir/node.py", "from tessel import compile", "ir imports __init__"),
        ("ops/matmul.py", "from ..targets import TARGETS", "ops imports targets"),
        ("passes/fuse.py", "from .tile import run", "a pass imports the pass tile"),
        ("passes/fuse.py", "from . import tile", "a pass imports the pass tile"),
        ("frontend/importer.py", "from ..passes import fuse", "frontend imports passes"),
        ("tiles/cost.py", "import z3", "z3 belongs in"),
        ("codegen/cpp.py", "from triton import language", "triton belongs in"),
        ("codegen/cpp.py", "import os, triton.language as tl", "triton belongs in"),
        ("ops/matmul.py", "import torch\nx = torch.ops.aten.mm.default", "torch.ops.aten belongs in"),
        ("ops/matmul.py", "from torch.ops import aten", "torch.ops.aten belongs in"),
        ("driver.py", "import os\nos.environ['A']", "os.environ belongs in"),
        ("driver.py", "from os import getenv", "os.environ belongs in"),
        ("build.py", "from torch.utils import _pytree as pytree", "torch.utils._pytree belongs in"),
        ("build.py", "from torch.utils._pytree import tree_map", "torch.utils._pytree belongs in"),
        ("build.py", "def f():\n    import torch.utils._pytree as pytree", "torch.utils._pytree belongs in"),
        ("build.py", "import torch\nx = torch.utils._pytree.tree_map", "torch.utils._pytree belongs in"),
        ("stray.py", "", "stray has no place in LAYERS"),
    ],
)
def test_the_checker_finds_a_planted_violation(tmp_path: Path, file: str, line: str, words: str) -> None:
    tree = tmp_path / "tessel"
    for name in ("passes/fuse.py", "passes/tile.py", file):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    assert violations(tree) == ([] if file != "stray.py" else ["stray.py:1: stray has no place in LAYERS"])
    (tree / file).write_text(line + "\n")
    found = violations(tree)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("ir/node.py", "from .types import TensorType\nfrom ..errors import check\nimport torch"),
        ("solve/solver.py", "import z3\nfrom ..tiles import cost"),
        ("codegen/prove.py", "import z3"),
        ("codegen/compile_job.py", "import triton\nimport triton.language as tl"),
        ("runtime/launch.py", "import triton"),
        ("frontend/aten.py", "import torch\nt = torch.ops.aten.mm.default"),
        ("passes/pipeline.py", "from . import fuse, tile"),
        ("passes/fuse.py", "from ..ir import node\nfrom ._match import find"),
        ("config.py", "import os\nfrom .errors import check\nx = os.environ.get('A')"),
        ("cli.py", "import tessel\nfrom .models import load_model"),
    ],
)
def test_the_checker_allows_what_the_rules_allow(tmp_path: Path, file: str, line: str) -> None:
    tree = tmp_path / "tessel"
    for name in ("passes/fuse.py", "passes/tile.py", "passes/_match.py", file):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    (tree / file).write_text(line + "\n")
    assert violations(tree) == []
