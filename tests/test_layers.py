"The wings import in one direction, through faces, and each vendor has one owner: read from the code, not from memory."
import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO/"cvops_wb"
WINGS = ["core", "data", "label", "learn", "serve", "watch", "loop"]
OWNERS = {
    "fiftyone": {"data"}, "dvc": {"data"}, "faiss": {"data"}, "sqlite3": {"data"}, "cv2": {"data"}, "numba": {"data"}, "watchfiles": {"data"},
    "label_studio_sdk": {"label"}, "cleanlab": {"label"},
    "torch": {"learn"}, "torchvision": {"learn"}, "lightning": {"learn"}, "mlflow": {"learn"}, "lightning_fabric": {"learn"}, "timm": {"learn"}, "wandb": {"learn"}, "clearml": {"learn"}, "safetensors": {"learn"}, "onnx": {"learn"},
    "bentoml": {"serve"}, "starlette": {"serve"}, "prometheus_client": {"serve"}, "onnxruntime": {"learn", "serve"},
    "opentelemetry": {"serve"}, "model_signing": {"serve"}, "cyclonedx": {"serve"}, "psycopg": {"serve"}, "grafana_foundation_sdk": {"watch"}, "apprise": {"watch"},
    "evidently": {"watch"}, "whylogs": {"watch"}, "ipywidgets": {"watch"}, "voila": {"watch"},
    "papermill": {"loop"}, "optuna": {"loop"}, "nbconvert": {"loop"}, "typer": {"loop"}, "ray": {"loop"}, "dagster_pipes": {"loop"},
}
# Vendors heavy enough that one room alone may import them.
ONE_ROOM = {"fiftyone", "mlflow", "bentoml", "evidently", "papermill", "typer", "dvc", "apprise", "grafana_foundation_sdk"}
MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py" and "share" not in p.parts]


def module_name(path: Path) -> str:
    "cvops_wb.data.store for cvops_wb/data/store.py; a package for its __init__."
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, path: Path):
    "Every module that is imported, at top level or inside a function, relative names resolved; with the names taken."
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names: yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, node.module or ""]).strip("."), tuple(a.name for a in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant): yield str(node.args[0].value), ()


def breaches(path: Path, text: str) -> list[str]:
    "What in a module breaks the order of the wings or a vendor's ownership."
    wing = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for name, taken in imports(ast.parse(text), path):
        top = name.split(".")[0]
        if top != "cvops_wb":
            if top in OWNERS and wing not in OWNERS[top]: found.append(f"{wing} imports {top}, which {OWNERS[top]} owns")
            continue
        parts = [*name.split("."), *(["*"] if not taken else [])]
        targets = [parts[1]] if len(name.split(".")) > 1 else list(taken)
        for target in targets:
            if target not in WINGS or target == wing or target == "core": continue
            if WINGS.index(target) > WINGS.index(wing): found.append(f"{wing} imports {target}, which stands to its right")
            elif len(name.split(".")) > 2 or (taken and _rooms_taken(target, taken)): found.append(f"{wing} imports a room of {target}: {name} {taken}")
        if wing == "core" and any(t in WINGS[1:] for t in targets): found.append(f"core imports {name}")
    return found


def _rooms_taken(wing: str, names: tuple[str, ...]) -> list[str]:
    return [n for n in names if (PACKAGE/wing/f"{n}.py").exists() or (PACKAGE/wing/n).is_dir()]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_keeps_to_its_wing(path):
    assert breaches(path, path.read_text()) == []


@pytest.mark.parametrize("wing, text", [
    ("core", "from cvops_wb.data import ingest"),
    ("data", "from cvops_wb.learn import train"),
    ("data", "def f():\n from cvops_wb.learn import train"),
    ("learn", "from cvops_wb.data.store import read_samples"),
    ("learn", "from ..data.store import read_samples"),
    ("learn", "import cvops_wb.serve"),
    ("data", "import torch"),
    ("serve", "def f():\n import mlflow.pyfunc"),
])
def test_a_breach_is_seen(wing, text):
    assert breaches(PACKAGE/wing/"planted.py", text) != []


def test_each_heavy_vendor_has_one_room():
    rooms: dict[str, set[str]] = {}
    for path in MODULES:
        for name, _ in imports(ast.parse(path.read_text()), path):
            if name.split(".")[0] in ONE_ROOM: rooms.setdefault(name.split(".")[0], set()).add(module_name(path))
    assert {v: r for v, r in rooms.items() if len(r) > 1} == {}


def test_heavy_vendors_are_imported_when_used():
    early = [(module_name(p), n) for p in MODULES for n, _ in _top_level(p) if n.split(".")[0] in ONE_ROOM - {"typer"}]
    assert early == []


def _top_level(path: Path):
    tree = ast.parse(path.read_text())
    return imports(ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []), path)


@pytest.mark.parametrize("wing", WINGS[1:])
def test_a_face_names_no_room(wing):
    face = PACKAGE/wing/"__init__.py"
    tables = [n.value for n in ast.walk(ast.parse(face.read_text())) if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "_rooms"]
    names = ast.literal_eval(tables[0])
    rooms = {p.stem for p in (PACKAGE/wing).glob("*.py")} | {p.name for p in (PACKAGE/wing).iterdir() if p.is_dir()}
    assert set(names) & rooms == set() and set(names.values()) <= rooms
