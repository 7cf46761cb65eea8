"What changes a stage's key, and what does not."
from dataclasses import replace
from pathlib import Path

import pytest
from loop_bench import write_notebook

from cvops_wb.core.errors import BadInput
from cvops_wb.core.records import Envelope, Snapshot
from cvops_wb.core.settings import load_settings
from cvops_wb.loop import keys
from cvops_wb.loop.keys import Closure, find_module, identify, make_key, read_code, read_module
from cvops_wb.loop.stages import check_parameters, find_stage

LOCAL = '"A module."\nimport json\n\ndef double(x):\n    "Twice."\n    return 2*x   # why\n'


@pytest.fixture
def make(workbench):
    "A function that gives the key of a small stage, with anything about it changed."
    path = workbench.root/"nbs/runs/05_train.ipynb"

    def key(code="from helper import double\ndouble(3)", local=LOCAL, given=None, digests=None, parameters='snapshot: str = ""\nsource: str = ""\nepochs: int = 3'):
        write_notebook(path, parameters, code)
        (workbench.root/"helper.py").write_text(local)
        for cached in (find_module, read_module): cached.cache_clear()
        settings = load_settings(workbench.root)
        stage = find_stage(settings, "train")
        return make_key(settings, stage, check_parameters(stage, given or {}), {"snapshot": "aa"} if digests is None else digests)
    return key


@pytest.mark.parametrize("change", [
    dict(code="from helper import double\n# a comment\ndouble(3)"),
    dict(code="from helper import double\n\n\ndouble( 3 )"),
    dict(local=LOCAL + "\nimport numpy"), dict(local=LOCAL + "\ndef idle(): return 1"), dict(local=LOCAL.replace("# why", "# because")), dict(local=LOCAL.replace("Twice.", "Two times.")), dict(local=LOCAL.replace('"A module."\n', "")),
    dict(given={"epochs": 3}), dict(parameters='snapshot: str = ""     # said otherwise\nsource: str = ""\nepochs: int = 3'),
])
def test_what_leaves_the_key(make, change): assert make(**change).digest == make().digest


@pytest.mark.parametrize("change", [
    dict(code="from helper import double\ndouble(4)"),
    dict(code="from helper import double\n%time double(3)"),
    dict(local=LOCAL.replace("2*x", "3*x")), dict(local=LOCAL.replace("2*x", "2*x + len(json.__all__)")), dict(local=LOCAL + "\nprint(json)"),
    dict(given={"epochs": 4}), dict(digests={"snapshot": "bb"}),
    dict(parameters='snapshot: str = ""\nsource: str = ""\nepochs: int = 4'),
])
def test_what_changes_the_key(make, change): assert make(**change).digest != make().digest


def test_a_source_is_watched_without_being_read(make, workbench):
    folder = workbench.root/"photos"
    folder.mkdir()
    (folder/"a.jpg").write_bytes(b"one")
    keyed = [make(given={"source": "photos"}).digest]
    (folder/"b.jpg").write_bytes(b"two")
    keyed.append(make(given={"source": "photos"}).digest)
    (folder/"b.jpg").write_bytes(b"twoo")
    keyed.append(make(given={"source": str(folder)}).facts["sources"])
    assert len({str(k) for k in keyed}) == 3 and make(given={"source": "synth"}).facts["sources"] == {}


def test_device_and_versions(make, monkeypatch):
    before = make(code="import torch")
    assert before.facts["vendors"]["torch"] and "python" in before.facts["vendors"]
    monkeypatch.setattr(keys, "find_device", lambda: "cuda")
    assert make(code="import torch").digest != before.digest
    monkeypatch.undo()
    monkeypatch.setattr(keys, "find_version", lambda vendor: "99")
    assert make(code="import torch").digest != before.digest


def test_settings_count_where_they_are_read(make, monkeypatch):
    code = "from cvops_wb.core.settings import load_settings\nlow = load_settings().gate.min_accuracy"
    before, other = make(code=code), make()
    assert before.facts["settings"] == {"gate.min_accuracy": .5} and other.facts["settings"] == {}
    monkeypatch.setenv("CVOPS_GATE_MIN_ACCURACY", "0.4")
    assert make(code=code).digest != before.digest and make().digest == other.digest
    monkeypatch.setenv("CVOPS_TRACKING_URI", "postgresql://me:secret@host/db")
    assert "secret" not in str(make(code="settings.tracking.uri").facts)


def reach(text: str, root: Path = Path("/")) -> Closure:
    "What some cells of a notebook reach."
    for cached in (find_module, read_module): cached.cache_clear()
    closure = Closure(root)
    closure.add(read_code(text, whole=True), "notebook")
    return closure


def test_a_face_leads_to_one_room():
    found = reach("from cvops_wb.data import decode_image")
    assert "cvops_wb.data.images" in found.hashes and not {"cvops_wb.data", "cvops_wb.data.store", "cvops_wb.data.intake"} & set(found.hashes)
    assert not [m for m in found.hashes if m.startswith("cvops_wb.loop")]
    assert "PIL" in found.vendors and not found.vendors & {"os", "json", "cvops_wb"}


def test_members_of_a_plug_are_followed():
    found = reach("from cvops_wb.data import ingest")
    assert {"cvops_wb.data.formats", "cvops_wb.data.formats.folder", "cvops_wb.data.formats.lists", "cvops_wb.data.synthesis"} <= set(found.hashes)


def test_the_gate_is_no_part_of_the_training():
    trained, judged = reach("from cvops_wb.learn import train"), reach("from cvops_wb.learn import register")
    assert not any(s.startswith("gate") for s in trained.settings) and any(s.startswith("gate") for s in judged.settings)
    assert "cvops_wb.learn.gates" not in trained.hashes and "torch" in trained.vendors


MODULE = """
import os
import numpy as np
from .other import helper, unused
LOW = 1
TABLE = {}
def register(name): return lambda f: TABLE.setdefault(name, f)
def inner(): return LOW
def used():
    from lazy import thing
    return inner(), helper, thing
def idle(): return unused, np
class Kind:
    def method(self): return idle()
"""


@pytest.mark.parametrize("name, also, reaches", [
    ("used", "", {"helper", "lazy"}), ("idle", "", {"unused", "numpy"}), ("Kind", "", {"unused", "numpy"}), ("LOW", "", set()),
    ("LOW", "@register('x')\ndef plugged(): return np", {"numpy"}),                          # it registers itself on import
    ("LOW", "@dataclass(frozen=True)\nclass Plain:\n    x: int = np.int8(1)", set()),         # nobody is told of it
    ("LOW", "TABLE['y'] = np", {"numpy"}), ("LOW", "if os.name: np.seterr()", {"numpy"}), ("LOW", "for x in (): np", {"numpy"}),
    ("LOW", "unnamed = np.array", set()), ("unnamed", "unnamed = np.array", {"numpy"}), ("a", "a, b = np.e, 1", {"numpy"}), ("LOW", "LOW += len(np.__all__)", {"numpy"}),
    ("*", "", {"helper", "unused", "lazy", "numpy"}),
])
def test_only_what_is_reached_counts(tmp_path, name, also, reaches):
    (tmp_path/"own").mkdir()
    (tmp_path/"own/__init__.py").write_text("")
    (tmp_path/"own/other.py").write_text("def helper(): import marker_helper\ndef unused(): import marker_unused\n")
    (tmp_path/"own/main.py").write_text(MODULE + also)
    found = reach(f"from own.main import {name}", tmp_path)
    assert {v.removeprefix("marker_") for v in found.vendors} == reaches


def test_every_way_to_import_is_followed(tmp_path):
    (tmp_path/"own/deep").mkdir(parents=True)
    (tmp_path/"own/__init__.py").write_text("from .deep import leaf\n_rooms = {'face': 'room'}\n")
    (tmp_path/"own/deep/__init__.py").write_text("from .leaf import f as g\n")
    (tmp_path/"own/deep/leaf.py").write_text("def f(): import vendor_leaf\n")
    (tmp_path/"own/room.py").write_text("from .deep import g\ndef face(): return g\n")
    for text in ["from own import face", "import own.room", "import own.room as r", "from own import room", "from own.room import *", "from own.deep import g",
                 "from own.deep.leaf import f", "from own.deep import leaf", "def late():\n    import own.deep.leaf", "from own import *"]:
        assert reach(text, tmp_path).vendors == {"vendor_leaf"}, text


def test_a_circle_of_imports_ends(tmp_path):
    (tmp_path/"a.py").write_text("from b import g\ndef f(): return g")
    (tmp_path/"b.py").write_text("from a import f\ndef g(): return f")
    assert set(reach("from a import f", tmp_path).hashes) == {"notebook", "a", "b"}


def test_the_service_belongs_to_the_key_of_its_package(workbench):
    write_notebook(workbench.root/"nbs/runs/08_package.ipynb", 'service: str = "classifier"', "service")
    service = workbench.root/"bentos/classifier/service.py"
    service.parent.mkdir(parents=True)
    digests = []
    for text in ("a = 1", "a = 1  # one", "a = 2"):
        service.write_text(text)
        stage = find_stage(workbench, "package")
        digests.append(make_key(workbench, stage, check_parameters(stage, {}), {}).digest)
    assert digests[0] == digests[1] != digests[2]


SNAPSHOT = Snapshot("5af1", "data/samples/5af1.parquet", ["data/shards/a.tar"], 3, ["tea"], {"train": 3}, dvc="1.dir", message="one")


@pytest.mark.parametrize("change, same", [
    (dict(dvc="2.dir", message="two", parent="77", pushed=True), True),
    (dict(samples="reports/curate-0123456789/x"), False), (dict(id="5af2"), False), (dict(classes=["milk"]), False), (dict(splits={"train": 2, "val": 1}), False),
])
def test_an_input_counts_by_what_it_says(change, same):
    one, two = Envelope("snapshot-0123456789", "snapshot", SNAPSHOT), Envelope("snapshot-abcdef0123", "snapshot", replace(SNAPSHOT, **change))
    assert (identify(one) == identify(two)) is same


def test_the_files_of_an_input_count():
    def made(run, sha): return Envelope(run, "train", SNAPSHOT, outputs={f"reports/{run}/predictions.parquet": {"sha256": sha, "size": 1}})
    assert identify(made("train-0123456789", "aa")) == identify(made("train-abcdef0123", "aa")) != identify(made("train-abcdef0123", "bb"))


def test_no_heavy_import():
    import subprocess
    import sys
    code = ("import sys; from cvops_wb.core.settings import load_settings as l; from cvops_wb.loop.runner import prepare_run;"
            "print(sorted({'numpy', 'pandas', 'papermill', 'torch', 'nbformat', 'psutil', 'typer'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_code_that_is_none_starts_nothing(make):
    with pytest.raises(BadInput, match="05_train.ipynb is not Python"): make(code="for x in")
    with pytest.raises(BadInput, match="helper.py is not Python"): make(local="def f(:")


def test_what_a_process_of_its_own_runs_belongs_to_the_key(monkeypatch):
    "The data set for FiftyOne's App is built in another process, by name: its builder is followed all the same."
    before = reach("from cvops_wb.data import index_samples").hashes["cvops_wb.data.views"]
    monkeypatch.setattr(Path, "read_text", _change(Path.read_text, "views.py", '"set aside": dataset', '"put aside": dataset'))
    assert reach("from cvops_wb.data import index_samples").hashes["cvops_wb.data.views"] != before


def _change(read, name, old, new):
    def changed(path, *args, **options):
        text = read(path, *args, **options)
        return text.replace(old, new) if path.name == name else text
    return changed
