"The samples in FiftyOne: equal to the record, rebuilt at will, shown in the App; and no process left behind."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput, MissingTool, NoRoom
from cvops_wb.core.processes import free_port
from cvops_wb.core.records import View
from cvops_wb.core.settings import load_settings
from cvops_wb.data import views
from cvops_wb.data.curation import CurateSpec, curate
from cvops_wb.data.intake import IngestSpec, ingest
from cvops_wb.data.splits import SPLITS
from cvops_wb.data.store import read_samples
from cvops_wb.data.views import (
    NUMBERS,
    ViewSpec,
    find_marker,
    find_mongod,
    index_samples,
    listens,
    open_app,
    open_database,
    open_fiftyone,
    serving_app,
)

REPO = Path(__file__).parents[1]
CHROMIUM = "/usr/bin/chromium"


def room(settings, run: str):
    "The folder of a run."
    path = settings.reports/run
    path.mkdir(parents=True, exist_ok=True)
    return path


def list_processes(word: str) -> list[str]:
    "Command lines on this machine that hold the word."
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try: lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError: continue
    return [line for line in lines if word in line]


def count_grouped(selection) -> int: return int(read_samples(selection.samples).group.duplicated(keep=False).sum())


@pytest.fixture(scope="module")
def shelf(photos, tmp_path_factory):
    "A workbench with a selection that was indexed."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("views")/"bench"
        root.mkdir()
        shutil.copy(REPO/"settings.ini", root)
        patch.setenv("CVOPS_ROOT", str(root))
        settings = load_settings(root)
        source = root/"source"
        shutil.copytree(photos, source)
        shutil.copy(source/"lime"/"00.jpg", source/"lime"/"copy.jpg")
        Image.open(source/"plum"/"03.jpg").save(source/"plum"/"again.jpg", quality=70)
        selection = curate(ingest(str(source), IngestSpec(), room(settings, "ingest")), CurateSpec(), room(settings, "curate-1"))
        yield settings, selection, index_samples(selection, ViewSpec(), room(settings, "explore"))


@pytest.mark.slow
def test_the_index_equals_the_record(shelf):
    settings, selection, view = shelf
    table = read_samples(selection.samples).set_index("id")
    assert view == View("curate-1", settings.workbench.name, len(table), {tag: count for tag, count in selection.tags.items()})
    assert selection.tags["near_duplicate"] == selection.tags["exact_duplicate"] == 1
    with open_fiftyone() as fiftyone:
        dataset = fiftyone.load_dataset(view.dataset)
        assert dataset.persistent and dataset.count_values("split") == table.split.value_counts().to_dict()
        assert dataset.count_values("label.label") == table.label.value_counts().to_dict()
        for sample in dataset:
            row = table.loc[sample["key"]]
            assert sample.tags == row.tags and sample["group"] == row.group and sample["sources"] == row.sources
            assert sample["sha256"] in sample.filepath and Path(sample.filepath).stat().st_size == sample.metadata.size_bytes == row.bytes
            assert [sample[name] for name in NUMBERS] == row[list(NUMBERS)].tolist()
        shown = {name: dataset.load_saved_view(name) for name in dataset.list_saved_views()}
        assert {name: len(shown[name]) for name in SPLITS} == {split: selection.splits.get(split, 0) for split in SPLITS}
        assert len(shown["set aside"]) == selection.set_aside == 1 and len(shown["duplicates and scenes"]) == count_grouped(selection)
        odd = shown["oddest first"].values("oddness")
        assert odd == sorted(odd, reverse=True) and fiftyone.list_datasets() == [view.dataset]


@pytest.mark.slow
def test_the_index_is_rebuilt(shelf):
    "A cache that was deleted is noticed and made again; again is the same; nothing is left of the building."
    settings, selection, view = shelf
    shutil.rmtree(settings.cache)
    with pytest.raises(BadInput, match="not in the cache"), serving_app(view, free_port()): pass
    for run in ("anew", "again"): assert index_samples(selection, ViewSpec(), room(settings, run)) == view
    assert json.loads(find_marker(settings, view.dataset).read_text())["count"] == view.count
    with open_fiftyone() as fiftyone: assert fiftyone.list_datasets() == [view.dataset]


@pytest.mark.slow
def test_fiftyone_is_left_as_it_was(shelf):
    settings, _, _ = shelf
    before = dict(os.environ)
    with open_fiftyone() as fiftyone: inside = fiftyone.config.database_uri
    assert dict(os.environ) == before and fiftyone.config.database_uri != inside
    assert "databricks" not in sys.modules or sys.modules["databricks"] is not None
    assert not listens(int(inside.rpartition(":")[2])) and not list_processes(str(settings.cache/"mongo"))


@pytest.mark.slow
def test_the_database_of_a_killed_process(shelf):
    "kill -9 of its owner: mongod goes, and the next start has all data."
    settings, _, view = shelf
    program = ("import time; from cvops_wb.core.settings import load_settings; from cvops_wb.data.views import open_database\n"
               "with open_database(load_settings()) as address: print(address, flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().strip()
    with open_database(settings) as shared: assert shared == address
    process.kill()
    process.wait()
    with open_fiftyone() as fiftyone: assert len(fiftyone.load_dataset(view.dataset)) == view.count
    assert not list_processes(str(settings.cache/"mongo"))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CVOPS_FULL"), reason="make test-full")
def test_a_killed_mongod_loses_nothing(shelf):
    "kill -9 of the database itself, right after a write: the next start has all data and the write."
    settings, _, view = shelf
    with open_fiftyone() as fiftyone:
        dataset = fiftyone.load_dataset(view.dataset)
        dataset.info["said"] = "before the kill"
        dataset.save()
        pids = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_mongod(path, settings)]
        assert len(pids) == 1
        os.kill(pids[0], signal.SIGKILL)
    with open_fiftyone() as fiftyone:
        again = fiftyone.load_dataset(view.dataset)
        assert len(again) == view.count and again.info["said"] == "before the kill"


def is_mongod(path, settings) -> bool:
    try: words = path.read_bytes().split(b"\0")
    except OSError: return False
    return words[0].endswith(b"mongod") and str(settings.cache).encode() in b" ".join(words)


def test_an_address_from_settings(workbench, monkeypatch):
    monkeypatch.setenv("CVOPS_FIFTYONE_DATABASE", "mongodb://db.example:27017")
    with open_database(load_settings()) as address: assert address == "mongodb://db.example:27017"
    assert not (workbench.cache/"mongo").exists()


def test_without_mongod(workbench, monkeypatch):
    monkeypatch.setattr(views, "find_spec", lambda name: None)
    monkeypatch.setattr(views.shutil, "which", lambda name: None)
    with pytest.raises(MissingTool, match="no mongod"): find_mongod()


def test_a_port_in_use(workbench):
    import socket
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(NoRoom, match="in use"): open_app(View("curate-1", "warehouse", 1), taken.getsockname()[1])


@pytest.fixture(scope="module")
def app(shelf):
    "`open_app` in a process of its own, as `cvops curate --app` runs it: the process and the address that it printed."
    settings, _, view = shelf
    port = free_port()
    program = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "     # a shell's `&` takes Ctrl-C away from what it starts
               "from cvops_wb.core.records import View; from cvops_wb.data.views import open_app; "
               f"open_app(View('curate-1', {view.dataset!r}, 1), {port})")
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    lines = [process.stderr.readline(), process.stderr.readline()]
    assert "Ctrl-C ends it" in lines[1] and list_processes(str(settings.cache))
    yield process, lines[1].split()[1]
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.browser
def test_the_app_shows_the_samples(shelf, app, tmp_path):
    "In Chromium: the data set, its labels and pictures, a saved view; nothing is asked of another machine, and no other file is served."
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(CHROMIUM).exists(): pytest.skip("Chromium is not installed (make system)")
    settings, selection, view = shelf
    address, away, pictures = app[1], [], []

    def watch(route):
        near = route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
        if not near: away.append(route.request.url)
        return route.continue_() if near else route.abort()

    with playwright.sync_playwright() as play:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.route("**/*", watch)
        page.on("response", lambda r: pictures.append(r.status) if "/media" in r.url else None)
        page.goto(address)
        page.get_by_text(f"{view.count} samples").wait_for(timeout=60_000)
        page.get_by_text("apple").first.wait_for(timeout=30_000)
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path/"app.png")
        page.goto(f"{address}?view=duplicates-and-scenes")
        page.get_by_text(f"{count_grouped(selection)} samples").wait_for(timeout=30_000)
        media = address.partition("/datasets")[0] + "/media?filepath="
        refused = [page.request.get(media + path).status for path in ("/etc/passwd", str(settings.root/"settings.ini"))]
        browser.close()
    assert away == [] and refused == [403, 403] and len(pictures) >= 8 and set(pictures) <= {200, 206, 304}
    assert len(Image.open(tmp_path/"app.png").convert("RGB").getcolors(10**7)) > 2000


@pytest.mark.slow
def test_ctrl_c_ends_the_app_and_all_that_it_started(shelf, app):
    settings, _, _ = shelf
    process, address = app
    port = int(address.partition("127.0.0.1:")[2].partition("/")[0])
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0 and "closed" in process.stderr.read()
    time.sleep(.2)
    assert not listens(port) and not list_processes(str(settings.cache)) and not list_processes(f"run_server(int(sys.argv[1]), sys.argv[2]) {port}")


def test_every_sample_has_its_file_when_only_shards_have_it(shelf, tmp_path, monkeypatch):
    "As in a clone: no loose blob is left, and each image that FiftyOne is told of is there, bit for bit, where the App may read it."
    pytest.importorskip("dvc")
    from cvops_wb.data import read_blob
    from cvops_wb.data.snapshots import SnapshotSpec, take_snapshot
    from cvops_wb.data.views import _find_files, is_allowed
    settings, selection, _ = shelf
    take_snapshot(selection, SnapshotSpec(push=False), room(settings, "snapshot"))
    table = read_samples(selection.samples)
    table = table[table["split"] != "none"]
    whole = {row.id: read_blob(row.sha256, settings) for row in table.itertuples()}
    (settings.store/"blobs").rename(settings.store/"elsewhere")
    try:
        files = _find_files(settings, table)
        assert {row.id: path.read_bytes() for row, path in zip(table.itertuples(), files, strict=True)} == whole
        for path in files:
            scope = {"path": "/media", "headers": [(b"host", b"127.0.0.1")], "query_string": f"filepath={path}".encode()}
            assert is_allowed(scope, settings.store/"blobs", settings.cache/"shown") and not is_allowed(scope, settings.store/"blobs")
    finally: (settings.store/"elsewhere").rename(settings.store/"blobs")
