"Fixtures that every suite shares: a workbench of its own, the real photographs, a small folder of made ones."
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvops_wb.core.processes import hush
from cvops_wb.core.settings import load_settings

REPO = Path(__file__).parents[1]
SHARED = REPO.parent/"shared"/"data"
PYPROJECT = '[project]\nname = "a-workbench"\nversion = "0"\n[tool.nbdev]\nlib_path = "a_workbench"\nnbs_path = "nbs"\n'

hush()

pytest_plugins = ["serve_toy"]     # bench, bento: a packaged toy model


@pytest.fixture
def workbench(tmp_path, monkeypatch):
    "An empty workbench: settings.ini, CVOPS_ROOT and the current folder point to it."
    root = tmp_path/"bench"
    root.mkdir()
    shutil.copy(REPO/"settings.ini", root)
    (root/"pyproject.toml").write_text(PYPROJECT)
    monkeypatch.setenv("CVOPS_ROOT", str(root))
    monkeypatch.chdir(root)
    return load_settings(root)


@pytest.fixture(scope="session")
def grocery() -> Path:
    "The grocery photographs, read in place."
    if not (SHARED/"grocery").is_dir(): pytest.skip("the grocery photographs are not beside this project (shared/data/grocery)")
    return SHARED/"grocery"


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    "Forty JPEG files in four class sub-folders, each class a colour and a shape."
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, colour in {"apple": (200, 40, 40), "lime": (60, 200, 60), "plum": (90, 40, 160), "lemon": (230, 220, 60)}.items():
        (root/label).mkdir()
        for k in range(10):
            pixels = rng.normal(120, 30, (120, 160, 3))
            y, x = rng.integers(20, 60), rng.integers(20, 90)
            pixels[y:y + 45, x:x + 45] = colour + rng.normal(0, 12, (45, 45, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root/label/f"{k:02}.jpg", quality=88)
    return root
