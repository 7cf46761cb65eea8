"The measures of STYLE.md: rooms, functions and nesting small, notebooks taught, run notebooks thin."
import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOMS = [p for p in sorted((REPO/"cvops_wb").rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py") and "share" not in p.parts]
LIBRARY = [p for p in sorted((REPO/"nbs"/"api").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
RUNS = sorted((REPO/"nbs"/"runs").glob("*.ipynb"))
WINGS = sorted(p for p in (REPO/"cvops_wb").iterdir() if p.is_dir() and p.name not in ("__pycache__", "share"))
NESTING = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith)


def code_lines(node_or_text) -> int:
    "Lines that hold code: no blanks, no comments, no docstrings."
    tree = ast.parse(node_or_text) if isinstance(node_or_text, str) else node_or_text
    strings = {line for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for line in range(n.lineno, n.end_lineno + 1)}
    return len({line for n in ast.walk(tree) if hasattr(n, "lineno") for line in (n.lineno, n.end_lineno)} - strings)


def functions():
    "Every function of the package with its module."
    for room in ROOMS:
        for node in ast.walk(ast.parse(room.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef): yield room, node


def depth(node, level: int = 0) -> int:
    "How deep the control flow nests; an `elif` is no deeper than its `if`."
    best = level
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST): continue
            elif_ = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If) and len(value) == 1
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda): continue
            best = max(best, depth(child, level + (isinstance(child, NESTING) and not elif_)))
    return best


def name(path: Path) -> str: return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("room", ROOMS, ids=name)
def test_a_room_is_small(room):
    assert code_lines(room.read_text()) <= 300


def test_sizes_in_the_middle():
    rooms = [code_lines(r.read_text()) for r in ROOMS]
    lengths = [code_lines(f) for _, f in functions()]
    assert statistics.median(rooms) <= 150
    assert statistics.median(lengths) <= 8
    assert sorted(lengths)[int(.95*len(lengths))] <= 30


@pytest.mark.parametrize("wing", WINGS, ids=name)
def test_a_wing_has_at_most_twelve_rooms(wing):
    assert len([p for p in wing.glob("*.py") if p.name != "__init__.py"]) <= 12


def test_nesting():
    assert [f"{name(r)}:{f.name}" for r, f in functions() if depth(f) > 3] == []


def test_public_functions_say_what_they_do():
    bare = [f"{name(r)}:{n.name}" for r in ROOMS for n in ast.parse(r.read_text()).body
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not n.name.startswith("_") and not ast.get_docstring(n)
            and not (isinstance(n, ast.ClassDef) and n.decorator_list)]
    assert bare == []


def test_public_functions_are_annotated():
    found = []
    for room in ROOMS:
        for node in ast.parse(room.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"): continue
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            found += [f"{name(room)}:{node.name}({a.arg})" for a in args if a.annotation is None]
    assert found == []


def test_no_bare_except():
    bare = [f"{name(r)}:{n.lineno}" for r in ROOMS for n in ast.walk(ast.parse(r.read_text())) if isinstance(n, ast.ExceptHandler) and n.type is None]
    assert bare == []


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_a_library_notebook_teaches(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    first = "".join(cells[0]["source"])
    words = sum(len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown")
    assert first.startswith("# ") and "\n> " in first, "the first cell is a title and one line"
    assert words >= 20


def test_definitions_are_short():
    cells = [c for n in LIBRARY for c in json.loads(n.read_text())["cells"] if c["cell_type"] == "code"]
    lengths = sorted(len(source.splitlines()) for c in cells if (source := "".join(c["source"])).startswith("#| export"))
    assert statistics.median(lengths) <= 30 and lengths[int(.95*len(lengths))] <= 60 and lengths[-1] <= 75


@pytest.mark.parametrize("notebook", RUNS, ids=name)
def test_a_run_notebook_is_thin(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    tagged = [c for c in code if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and len(code) <= 12
    names = [n.target.id for n in ast.parse("".join(tagged[0]["source"])).body if isinstance(n, ast.AnnAssign) and ast.literal_eval(n.value) is not Ellipsis]
    assert len(names) == len(ast.parse("".join(tagged[0]["source"])).body), "every parameter is an annotated literal"
    rest = ast.parse("\n".join("".join(c["source"]) for c in code if c is not tagged[0]))
    read = {n.id for n in ast.walk(rest) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert set(names) - read == set(), "every parameter is read"
    assert not [n for n in ast.walk(rest) if isinstance(n, ast.FunctionDef | ast.For | ast.While | ast.If)]


def test_nothing_is_imported_or_bound_in_vain():
    ruff = Path(sys.executable).parent/"ruff"
    for options in (["--isolated", "--select", "F", "cvops_wb"], ["tests", "bentos"]):
        done = subprocess.run([ruff, "check", "--output-format", "concise", *options], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
