"Packaging and rehearsing: the way from a registered version to a service that was asked real photographs."
import json
import shutil

import pandas as pd
import pytest
from PIL import Image
from serve_toy import photograph, register_toy

from cvops_wb.core.errors import BadInput, BadModel, Refused, ToolFailed, WrongUsage
from cvops_wb.core.records import Snapshot
from cvops_wb.serve import (
    PackageSpec,
    RehearseSpec,
    draw_answers,
    draw_latency,
    list_contents,
    package,
    read_predictions,
    rehearse,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(bench):
    "A dozen photographs, eleven of them with their truth, one of those wrong, one broken."
    folder = bench.root/"photos"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = []
    for k in range(12):
        colour = ("red", "green", "blue")[k % 3]
        (folder/f"{k:02}.jpg").write_bytes(photograph(colour, seed=k) if k != 7 else b"broken on the way")
        rows.append({"file": f"{k:02}.jpg", "sku": colour if k else "blue", "camera": f"aisle {k % 2}"})
    pd.DataFrame(rows[:11]).to_csv(folder/"truth.csv", index=False)
    return folder


def test_a_bento_holds_what_serving_needs_and_no_more(bench, bento):
    built = bench.root/bento.path
    names = {path.relative_to(built/"src").as_posix() for path in (built/"src").rglob("*") if path.is_file()}
    assert {"service.py", "service.json", "settings.ini", "model/model.onnx", "model/manifest.json", "cvops_wb/serve/service/application.py"} <= names
    assert not [n for n in names if n.startswith(("cvops_wb/learn", "cvops_wb/watch", "cvops_wb/loop", "cvops_wb/share")) or n.endswith((".pyc", ".pkl", ".ipynb"))]
    needs = (built/"env"/"python"/"requirements.txt").read_text()
    assert "onnxruntime==" in needs and "torch" not in needs and "mlflow" not in needs and "fiftyone" not in needs
    assert json.loads((built/"src"/"service.json").read_text())["manifest_sha256"] == bento.manifest_sha256
    assert bento.tag == f"classifier:{built.name}" and str(bench.root) not in (built/"bento.yaml").read_text()
    assert "src/model/model.onnx" in set(list_contents(bento)["file"])
    assert len((bench.root/"bentos"/"classifier"/"service.py").read_text().splitlines()) <= 40


def test_the_same_version_and_code_are_built_once(bench, bento):
    version, built = register_toy(bench.root), bench.root/bento.path
    before = (built/"bento.yaml").stat().st_mtime_ns
    assert package(version, PackageSpec(), bench.reports/"again.part") == bento
    assert (built/"bento.yaml").stat().st_mtime_ns == before
    (built/"src"/"model"/"model.onnx").write_bytes(b"rotten")
    assert package(version, PackageSpec(), bench.reports/"again.part") == bento
    assert (built/"src"/"model"/"model.onnx").stat().st_size > 100, "what rotted was built again"
    code = bench.root/"bentos"/"classifier"/"service.py"
    text = code.read_text()
    code.write_text(text + "\n# changed\n")
    try: other = package(version, PackageSpec(), bench.reports/"again.part")
    finally: code.write_text(text)
    assert other.tag != bento.tag and sorted(p.name for p in built.parent.iterdir()) == sorted({built.name, other.path.rpartition("/")[2]})


@pytest.mark.parametrize("error, change, spec", [(WrongUsage, {"passed": False}, {}), (BadModel, {"manifest_sha256": "0"*64}, {}), (BadModel, {"model": "data/none"}, {}),
                                                 (WrongUsage, {}, {"service": "nobody"}), (BadInput, {}, {"service": "../outside"})])
def test_what_is_not_packaged(bench, error, change, spec):
    from dataclasses import replace
    with pytest.raises((error, Refused)): package(replace(register_toy(bench.root), **change), PackageSpec(**spec), bench.reports/"no.part")


def test_a_rehearsal(bench, bento, folder):
    out = bench.reports/"rehearse-1.part"
    record = rehearse(bento, None, RehearseSpec(photos="photos", clients=3), out)
    assert (record.bento, record.requests, record.failed) == (bento.tag, 12, 1) and record.accuracy == round(9/10, 4)
    assert 0 < record.p50_ms <= record.p99_ms and record.ready_s > 0 and record.sample["label"] in ("red", "green", "blue")
    assert record.log == "reports/rehearse-1/predictions" and {p.suffix for p in (out/"predictions").iterdir()} == {".parquet"}
    log = read_predictions(out/"predictions")
    assert len(log) == 11 and set(log.caller) == {"rehearsal"} and set(log.camera) == {"aisle 0", "aisle 1", ""}
    answers = pd.read_parquet(out/"answers.parquet")
    assert list(answers[answers.status != 200].reason) == ["not_an_image"]
    out.rename(out.with_name("rehearse-1"))
    picture = draw_answers(record)
    assert isinstance(picture, Image.Image) and picture.width > 500
    assert draw_latency(record).axes[0].get_title(loc="left") == "11 answers, 1 without one; ready after " + f"{record.ready_s:.1f} s"


def test_a_rehearsal_needs_photographs(bench, bento):
    (bench.root/"empty").mkdir(exist_ok=True)
    for photos, error in (("empty", BadInput), ("nowhere", BadInput), ("", WrongUsage)):
        with pytest.raises(error): rehearse(bento, None, RehearseSpec(photos=photos), bench.reports/"x.part")


def test_a_rehearsal_that_gets_no_answer_fails(bench, bento, folder):
    for path in folder.glob("*.jpg"): path.write_bytes(b"broken")
    with pytest.raises(ToolFailed, match="answered no photograph"): rehearse(bento, None, RehearseSpec(photos="photos"), bench.reports/"rehearse-2.part")


def test_held_out_photographs_of_a_snapshot(bench, bento, photos, monkeypatch):
    from cvops_wb.core.processes import call
    from cvops_wb.data import CurateSpec, IngestSpec, SnapshotSpec, curate, ingest, take_snapshot
    monkeypatch.chdir(bench.root)
    call(["git", "init", "-q", "."], "git init", cwd=bench.root)
    batch = ingest(str(photos), IngestSpec(), bench.reports/"a.part")
    (bench.reports/"a.part").rename(bench.reports/"a")
    selection = curate(batch, CurateSpec(), bench.reports/"b.part")
    (bench.reports/"b.part").rename(bench.reports/"b")
    snapshot = take_snapshot(selection, SnapshotSpec(), bench.reports/"c.part")
    assert isinstance(snapshot, Snapshot)
    record = rehearse(bento, snapshot, RehearseSpec(requests=5, clients=2), bench.reports/"rehearse-3.part")
    assert record.requests == min(5, max(snapshot.splits.get("test", 0), snapshot.splits.get("val", 0))) and record.failed == 0 and record.accuracy == 0.
