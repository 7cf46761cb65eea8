"What people give by mistake, over the command line: one clear message with the way out, nothing half-written, and the next try works."
import shutil

import numpy as np
import pytest
from PIL import Image
from test_demo import call, list_processes, stages

pytestmark = pytest.mark.slow


def paint(path, seed):
    "An image of noise, so that no two are alike."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A workbench, and beside it the folders that people give."
    root = tmp_path_factory.mktemp("bad")/"shop"
    call(root.parent, "init", "shop")
    beside = root.parent
    (beside/"empty").mkdir()
    (beside/"texts").mkdir()
    (beside/"texts/notes.txt").write_text("milk, bread")
    for k in range(12): paint(beside/"one/tea"/f"{k}.jpg", k)
    shutil.copytree(beside/"one", beside/"single")
    paint(beside/"single/cup/0.jpg", 99)
    shutil.copytree(beside/"one", beside/"good")
    for k in range(12): paint(beside/"good/cup"/f"{k}.jpg", 50 + k)
    (beside/"good/cup/broken.jpg").write_bytes(b"no image at all")
    return root


@pytest.mark.parametrize("source, says, way", [
    ("missing", "does not exist", "did you mean"), ("empty", "is empty", "one sub-folder a class"),
    ("texts", "no image in the folder", "one sub-folder a class"), ("texts/notes.txt", "not read", "one sub-folder a class"),
])
def test_what_cannot_be_ingested(root, source, says, way):
    document, told = call(root, "ingest", str(root.parent/source), status=1)
    error = document["errors"]["ingest"]
    assert says in error["what"] and way in error["fix"] and says in told and f"fix: {error['fix']}" in told
    assert not [p for p in (root/"reports").iterdir() if p.suffix == ".part" or (p/"record.json").exists() and p.suffix != ".failed"]


@pytest.mark.parametrize("source, says, way", [("one", "only one class", "another class"), ("single", "fewer than 2 images", "min_images=1")])
def test_what_cannot_be_curated(root, source, says, way):
    call(root, "ingest", str(root.parent/source))
    document, told = call(root, "curate", status=1)
    error = document["errors"]["curate"]
    assert says in error["what"] and way in error["fix"] and document["left_out"] == {"explore": "curate"}
    if source == "single":
        assert "cup (1)" in told
        assert stages(call(root, "run", "curate", "-p", "min_images=1")[0])["curate"]["record"]["count"] == 13


def test_then_the_next_run_works(root):
    batch = stages(call(root, "ingest", str(root.parent/"good"))[0])["ingest"]["record"]
    assert (batch["count"], batch["rejected"]) == (24, 1)
    assert stages(call(root, "run", "curate")[0])["curate"]["record"]["classes"] == {"cup": 12, "tea": 12}
    assert list_processes(root) == []
