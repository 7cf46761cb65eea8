"Export and clean a copy of the notebooks; fail, naming the files, where that changes anything."
import shutil
import subprocess
import sys
from filecmp import cmp
from pathlib import Path
from tempfile import TemporaryDirectory

REPO = Path(__file__).parents[1]
KEPT = ("nbs", "cvops_wb", "pyproject.toml", "settings.ini", "README.md")


def find_changes() -> list[str]:
    "Paths that `nbdev-export` and `nbdev-clean` would change."
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in KEPT:
            source = REPO/name
            if source.is_dir(): shutil.copytree(source, copy/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
            else: shutil.copy(source, copy/name)
        tool = Path(sys.executable).parent
        for command in ("nbdev-export", "nbdev-clean"):
            subprocess.run([tool/command], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        made = [p.relative_to(copy) for p in copy.rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb")]
        return sorted(str(p) for p in made if not (REPO/p).is_file() or not cmp(copy/p, REPO/p, shallow=False))


if __name__ == "__main__":
    changed = find_changes()
    if changed: sys.exit("not exported or not clean (run `make notebooks`):\n  " + "\n  ".join(changed))
