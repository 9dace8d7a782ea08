"""The source itself: blocks that are repeated on purpose (`# twin: module.name`) stay equal, functions short."""
import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TWIN = re.compile(r"# twin: (\w+)\.(\w+)\n(?:@.*\n)*(?:class|def) (\w+)")
METHODS = ("a0", "vla0", "robovlms", "cogact", "robobrain_x0")


def test_twins_are_identical():
    for path in sorted(ROOT.glob("*.py")):
        for module, name, here in TWIN.findall(path.read_text(encoding="utf-8")):
            ours, theirs = (inspect.getsource(getattr(importlib.import_module(m), n))
                            for m, n in ((path.stem, here), (module, name)))
            assert ours == theirs.replace(f"class {name}", f"class {here}").replace(f"def {name}", f"def {here}"), \
                f"{path.name}:{here} drifted from {module}.{name}; make them equal or drop the twin mark"


def test_every_twin_mark_stands_above_a_block():
    for path in sorted(ROOT.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^\s*# twin:", text, re.M)) == len(TWIN.findall(text)), path.name


@pytest.mark.parametrize("method", [m for m in METHODS if (ROOT / f"{m}.py").is_file()])
def test_no_method_imports_another(method):
    """method.py and common.py are all that a method needs."""
    text = (ROOT / f"{method}.py").read_text(encoding="utf-8")
    local = {p.stem for p in ROOT.glob("*.py")}
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    assert imported & local <= {"common"}


@pytest.mark.parametrize("method", [m for m in METHODS if (ROOT / f"{m}.py").is_file()])
def test_every_method_offers_the_names_the_scripts_use(method):
    module = importlib.import_module(method)
    for name in ("Config", "PRESETS", "PREDICTS", "load_tokenizer", "prepare", "collate", "Model", "from_pretrained", "Policy"):
        assert hasattr(module, name), f"{method}.py has no {name} (see the top of common.py)"
    for name in ("forward", "loss", "act", "blocks", "param_groups", "save_pretrained"):
        assert callable(getattr(module.Model, name))
    for name in ("reset", "ask", "step"):
        assert callable(getattr(module.Policy, name))
    assert isinstance(module.Policy.needs_chunk, property) and "tiny" in module.PRESETS


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("examples/*.py"),
                                         *ROOT.glob("benchmarks/*.py")]), ids=lambda path: path.name)
def test_functions_are_short_and_lines_fit(path):
    """No function beyond 70 lines (but train.py's loop, a flat script), no line beyond 110 columns."""
    text = path.read_text(encoding="utf-8")
    assert not [n for n, line in enumerate(text.splitlines(), 1) if len(line) > 110]
    assert not [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
                and node.end_lineno - node.lineno >= 70 and (path.name, node.name) != ("train.py", "run")]
