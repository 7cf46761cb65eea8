"The package is what the notebooks export, and nothing else."
import json
import re
from collections import Counter
from pathlib import Path

from exported import find_changes

REPO = Path(__file__).parents[1]
NOTEBOOKS = [p for p in sorted((REPO/"nbs"/"api").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def exported_module(notebook: Path) -> str | None:
    "The name after `default_exp`, or None."
    text = "\n".join("".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code")
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", text, re.M)
    return found and found[1]


def test_export_and_clean_leave_no_difference():
    assert find_changes() == []


def test_every_module_has_its_notebook():
    named = {exported_module(n) for n in NOTEBOOKS}
    modules = {p.relative_to(REPO/"cvops_wb").with_suffix("").as_posix().replace("/", ".") for p in (REPO/"cvops_wb").rglob("*.py")}
    empty = {m for m in modules if m.split(".")[-1] in ("__init__", "_modidx") and _is_written_by_nbdev(m)}
    assert modules - named - empty == set()


def _is_written_by_nbdev(module: str) -> bool:
    text = (REPO/"cvops_wb"/(module.replace(".", "/") + ".py")).read_text()
    return module == "_modidx" or not [line for line in text.splitlines() if line.strip() and not line.startswith(("#", '"', "__all__", "__version__"))]


def test_no_two_notebooks_export_one_module():
    twice = [m for m, n in Counter(exported_module(n) for n in NOTEBOOKS).items() if m and n > 1]
    assert twice == []


def test_every_library_notebook_exports():
    assert [str(n) for n in NOTEBOOKS if not exported_module(n)] == []
