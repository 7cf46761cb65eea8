"Formats in and out: what is read, what is set aside, and that a round trip loses only what it says."
import io
import json
import os
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput, CvopsError, MissingTool, UnknownName
from cvops_wb.core.records import SAMPLE_COLUMNS
from cvops_wb.data import (
    CurateSpec,
    IngestSpec,
    SnapshotSpec,
    curate,
    export_samples,
    ingest,
    list_samples,
    read_samples,
    take_snapshot,
)
from cvops_wb.data.formats import find_format, formats
from cvops_wb.data.formats.archives import Caps, unpack
from cvops_wb.data.formats.exporting import Sample, list_exported, list_writers, write_export
from cvops_wb.data.formats.objects import dump_objects, make_object, parse_objects
from cvops_wb.data.intake import fingerprint_source
from cvops_wb.data.store import Store, write_samples

WRITERS = ["coco", "csv", "fiftyone", "folder", "masks", "voc", "yolo"]
DEFECTS = {"1": "open", "2": "short", "3": "mousebite", "4": "spur", "5": "copper", "6": "pin-hole"}


def save_picture(pixels, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def picture(seed: int, width: int = 64, height: int = 48) -> bytes:
    return save_picture(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8), "JPEG")


def make_sample(seed: int, label="", split="", objects=(), looked=True, width=64, height=48, **facts) -> Sample:
    facts = {"tags": [], "camera": "", "taken": "", **facts}
    return Sample(f"{seed:016x}", f"p{seed}.jpg", label, split, parse_objects(dump_objects(list(objects))), looked, width, height, facts, lambda: picture(seed, width, height))


def take(source, settings, run: str = "in", **spec):
    "The sample table of a source that was taken in."
    out = settings.reports/run
    out.mkdir(parents=True, exist_ok=True)
    batch = ingest(str(source), IngestSpec(**spec), out)
    return batch, read_samples(batch.samples, settings), pd.read_parquet(out/"rejected.parquet")


def by_image(table: pd.DataFrame, column: str) -> dict[str, str]: return table.set_index("sha256")[column].to_dict()


TEA, CUP = make_object("tea", [1, 2, 30, 40]), make_object("a cup, \"hot\" <&>", [0, 0, 64, 48])
AWKWARD = [
    make_sample(1, "tea", "train", [TEA]), make_sample(2, "", "val", [TEA, CUP]), make_sample(3, "", "test", []), make_sample(4, "tea", "train", [TEA, TEA]),
    make_sample(5, "tea", "val", [make_object("tea", [1/3, 2/7, 10.123456, 5.5])], width=63, height=47),
]
# What each format holds of the samples above, beyond what all hold; the rest must be told, item by item.
CASES = {
    "plain": (AWKWARD, {"masks": {"attributes": 5, "boxes": 5, "classes of objects": 2, "objects": 1}, "folder": {"objects": 6, "whether somebody looked for objects": 1}}),
    "polygon": ([make_sample(1, "tea", "train", [make_object("tea", polygons=[[1, 2, 9, 2, 5, 8]])])], {"voc": {"polygons": 1}, "masks": {"attributes": 1, "boxes": 1, "polygons": 1}, "folder": {"objects": 1}}),
    "two polygons": ([make_sample(1, "tea", "train", [make_object("tea", polygons=[[1, 2, 9, 2, 5, 8], [20, 20, 30, 20, 25, 30]])])],
                     {"voc": {"polygons": 1}, "yolo": {"polygons": 1}, "masks": {"attributes": 1, "boxes": 1, "polygons": 1}, "folder": {"objects": 1}}),
    "attributes": ([make_sample(1, "tea", "train", [make_object("tea", [1, 2, 3, 4], attributes={"difficult": 1, "pose": "Left"})])],
                   {"yolo": {"attributes": 1}, "masks": {"attributes": 1, "boxes": 1}, "folder": {"objects": 1}}),
    "other attributes": ([make_sample(1, "tea", "train", [make_object("tea", [1, 2, 3, 4], attributes={"score": .5, "kind": {"of": [1, None, "x"]}})])],
                         {"yolo": {"attributes": 1}, "voc": {"attributes": 1}, "masks": {"attributes": 1, "boxes": 1}, "folder": {"objects": 1}}),
    "a label of its own": ([make_sample(1, "shelf", "train", [TEA, CUP]), make_sample(2, "tea", "val", [CUP])],
                           {"yolo": {"labels of images": 2}, "voc": {"labels of images": 2}, "masks": {"attributes": 3, "boxes": 2, "classes of objects": 2, "labels of images": 2}, "folder": {"objects": 3}}),
    "labels only": ([make_sample(1, "tea", "train", looked=False), make_sample(2, "milk", "val", looked=False)],
                    {"coco": {"whether somebody looked for objects": 2}, "yolo": {"labels of images": 2}, "masks": None, "voc": None}),
    "tags": ([make_sample(1, "tea", "train", [TEA], tags=["blurred", "dark"], camera="K1", taken="2026-11-23T10:00:00")],
             {**{name: {"tags": 1, "camera": 1, "taken": 1} for name in ("coco", "yolo", "voc")}, "masks": {"attributes": 1, "boxes": 1, "tags": 1, "camera": 1, "taken": 1}, "folder": {"objects": 1, "tags": 1, "camera": 1, "taken": 1}}),
    "no split": ([make_sample(1, "tea", "", [TEA]), make_sample(2, "", "", [TEA, CUP])], {"masks": {"attributes": 3, "boxes": 3, "classes of objects": 2}, "folder": {"objects": 3}}),
    "label with a slash": ([make_sample(1, "../../tea", "train", looked=False), make_sample(2, "tea/green", "train", looked=False)],
                           {"masks": None, "folder": {"labels of images": 2}, "coco": {"whether somebody looked for objects": 2}, "yolo": {"labels of images": 2}, "voc": None}),
    "control characters": ([make_sample(1, "", "train", [make_object("te\0a\x01", [1, 2, 3, 4]), TEA])], {"voc": {"classes of objects": 1}, "masks": {"attributes": 2, "boxes": 2}, "folder": {"objects": 2}}),
}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_lost_is_told_and_nothing_else(tmp_path, workbench, case, format):
    samples, lost = CASES[case]
    want = lost.get(format, {})
    if want is None:
        with pytest.raises(BadInput): write_export(samples, tmp_path/"out", format)
        assert list(tmp_path.glob("*out*")) == []
        return
    done = write_export(samples, tmp_path/"out", format)
    assert done.lost == want and done.count == len(samples) and find_format(str(tmp_path/"out"))[0] == format
    batch, table, rejected = take(tmp_path/"out", workbench)
    assert batch.format == format and len(rejected) == 0 and len(table) == len(samples)
    if want: return
    pixels = {sample.read(): sample for sample in samples}
    for row in table.itertuples():
        sample = pixels[Store(workbench).find_blob(row.sha256).read_bytes()]
        assert (row.label, row.given_split, row.objects) == (sample.label, sample.split, dump_objects(sample.objects) if sample.looked else "")


def test_a_loss_that_nobody_counted_would_be_seen(tmp_path, workbench, monkeypatch):
    "The planted bug: a writer that shifts every box by a pixel."
    from cvops_wb.data.formats import coco
    monkeypatch.setattr(coco, "_write_object", lambda each, classes, real=coco._write_object: real({**each, "box": [each["box"][0] + 1, *each["box"][1:]]}, classes))
    assert write_export(AWKWARD, tmp_path/"out", "coco").lost == {"boxes": 6}


def write_pcb(root: Path, source: Path, count: int) -> dict[str, list]:
    "Real boards with their real boxes as a YOLO data set; name → objects in pixels."
    truth, classes = {}, list(DEFECTS.values())
    for split, start in (("train", 0), ("val", 1)):
        for kind in ("images", "labels"): (root/kind/split).mkdir(parents=True)
        for image in sorted((source/"images").glob("*.jpg"))[start:count:2]:
            corners = [line.split() for line in (source/"labels"/f"{image.stem}.txt").read_text().splitlines()]
            truth[image.stem] = [make_object(DEFECTS[kind], [x, y, right - x, bottom - y]) for *numbers, kind in corners for x, y, right, bottom in [map(int, numbers)]]
            (root/"images"/split/image.name).write_bytes(image.read_bytes())
            lines = [f"{classes.index(o['label'])} {(o['box'][0] + o['box'][2]/2)/640} {(o['box'][1] + o['box'][3]/2)/640} {o['box'][2]/640} {o['box'][3]/640}" for o in truth[image.stem]]
            (root/"labels"/split/f"{image.stem}.txt").write_text("\n".join(lines))
    (root/"data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(classes)}\n")
    return truth


@pytest.fixture(scope="module")
def pcb(tmp_path_factory):
    source = Path(__file__).parents[2]/"shared"/"data"/"deeppcb"
    if not source.is_dir(): pytest.skip("the circuit boards are not beside this project (shared/data/deeppcb)")
    root = tmp_path_factory.mktemp("pcb")/"yolo"
    return root, write_pcb(root, source, 40)


def test_real_boards_through_every_format_and_back(pcb, workbench, tmp_path):
    "YOLO → the store → a snapshot → each format → the store: the same boxes to a millionth of a pixel."
    pytest.importorskip("dvc")
    root, truth = pcb
    batch, table, _ = take(root, workbench, "r1")
    assert {Path(row.sources[0]).stem: parse_objects(row.objects) for row in table.itertuples()} == truth
    out = workbench.reports/"r2"
    out.mkdir()
    selection = curate(batch, CurateSpec(), out)
    curated = read_samples(selection.samples)   # whatever curation sets aside, here each shall travel
    write_samples(curated.assign(split=curated.given_split), workbench.root/selection.samples)
    snapshot = take_snapshot(selection, SnapshotSpec(push=False), out)
    assert snapshot.classes == sorted(DEFECTS.values()) and snapshot.count == 40
    for format in ("coco", "voc", "fiftyone", "csv", "yolo"):
        done = export_samples(snapshot, tmp_path/format, format)
        assert "boxes" not in done.lost and "objects" not in done.lost, done
        _, again, _ = take(tmp_path/format, workbench, format)
        assert by_image(again, "objects") == by_image(table, "objects"), format
        assert by_image(again, "given_split") == by_image(table, "given_split"), format
    from cvops_wb.loop.cli import export
    told = export(str(tmp_path/"told"), "voc", snapshot.id)
    assert told.document["snapshot"] == snapshot.id and told.document["count"] == 40 and told.document["lost"].keys() <= {"tags", "labels of images"} and "40 images as voc" in told.text
    assert export(str(tmp_path/"dry"), dry_run=True).text.startswith("would write 40 images") and not (tmp_path/"dry").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("CVOPS_FULL") != "1", reason="FiftyOne and its database take half a minute: make test-full")
def test_another_tool_reads_what_we_wrote(pcb, workbench, tmp_path):
    "FiftyOne's own importers find the same boxes; in VOC one pixel to the side, since they take its first pixel for zero."
    from cvops_wb.data.views import open_fiftyone
    root, truth = pcb
    paths = [(split, path) for split in ("train", "val") for path in sorted((root/"images"/split).glob("*.jpg"))]
    samples = [Sample(path.stem.zfill(16), path.name, "board", split, parse_objects(dump_objects(truth[path.stem])), True, 640, 640, {"tags": ["dark"], "camera": "K", "taken": ""}, path.read_bytes)
               for split, path in paths]
    for format in ("coco", "yolo", "voc", "fiftyone"): write_export(samples, tmp_path/format, format)
    with open_fiftyone(workbench) as fo:
        kinds, val = fo.types, {path.stem for split, path in paths if split == "val"}
        cases = {
            "fiftyone": ({"dataset_type": kinds.FiftyOneDataset, "dataset_dir": tmp_path/"fiftyone"}, truth.keys(), .001),
            "coco": ({"dataset_type": kinds.COCODetectionDataset, "data_path": tmp_path/"coco/images/val", "labels_path": tmp_path/"coco/annotations/instances_val.json"}, val, .001),
            "yolo": ({"dataset_type": kinds.YOLOv5Dataset, "dataset_dir": tmp_path/"yolo", "yaml_path": "data.yaml", "split": "val"}, val, .001),
            "voc": ({"dataset_type": kinds.VOCDetectionDataset, "data_path": tmp_path/"voc/JPEGImages", "labels_path": tmp_path/"voc/Annotations"}, truth.keys(), 1.001),
        }
        for format, (options, stems, tolerance) in cases.items():
            dataset = fo.Dataset.from_dir(**{name: value if isinstance(value, type) else str(value) for name, value in options.items()})
            field = next(name for name in ("ground_truth", "detections") if dataset.has_field(name))
            found = {Path(sample.filepath).stem: sorted((each.label, *(640*share for share in each.bounding_box)) for each in sample[field].detections) for sample in dataset}
            assert found.keys() == stems, format
            for stem, rows in found.items():
                want = sorted((each["label"], *each["box"]) for each in truth[stem])
                assert [row[0] for row in rows] == [row[0] for row in want] and np.allclose([row[1:] for row in rows], [row[1:] for row in want], atol=tolerance), (format, stem)
            if format == "fiftyone": assert dataset.count_values("label.label") == {"board": 40} and dataset.count_sample_tags() == {"train": 20, "val": 20, "dark": 40}


def test_real_photographs_through_every_format_that_holds_labels(grocery, workbench, tmp_path):
    batch, table, _ = take(grocery, workbench, "r1", limit=80)
    samples = list_exported(table.assign(split=table.given_split), lambda id: Store(workbench).find_blob(id).read_bytes())
    for format in ("folder", "csv", "fiftyone", "coco"):
        done = write_export(samples, tmp_path/format, format)
        assert set(done.lost) <= {"tags", "camera", "taken", "whether somebody looked for objects"}, done
        _, again, _ = take(tmp_path/format, workbench, format)
        for column in ("label", "given_split"): assert by_image(again, column) == by_image(table, column), (format, column)


def test_the_objects_of_a_known_image_are_renewed(pcb, workbench, tmp_path):
    root, truth = pcb
    take(root, workbench, "r1")
    again = list_samples(workbench)
    assert len(again) == 40 and all(again.objects != "") and not again.objects.str.contains("relative").any()


# --- what is found by looking

def write_files(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


COCO = json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "categories": [{"id": 1, "name": "tea"}], "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]})
XML = "<annotation><filename>1.jpg</filename><object><name>tea</name><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>4</xmax><ymax>6</ymax></bndbox></object></annotation>"
MASK = save_picture(np.pad(np.full((8, 8), 255, np.uint8), ((20, 20), (28, 28))), "PNG")
LAYOUTS = {
    "coco as published": ("coco", {"annotations/instances_train2017.json": COCO, "train2017/1.jpg": "*"}, ("tea", "train")),
    "coco, captions beside": ("coco", {"annotations/instances_val.json": COCO, "annotations/captions_val.json": '{"images": [], "annotations": [', "val/1.jpg": "*"}, ("tea", "val")),
    "coco by Roboflow": ("coco", {"valid/_annotations.coco.json": COCO, "valid/1.jpg": "*"}, ("tea", "val")),
    "coco beside the images": ("coco", {"labels.json": COCO, "1.jpg": "*"}, ("tea", "")),
    "yolo": ("yolo", {"data.yaml": "train: images/train\nval: images/val\nnames: {0: tea}", "images/train/1.jpg": "*", "images/val/.keep": "", "labels/train/1.txt": "0 .5 .5 .1 .1"}, ("tea", "train")),
    "yolo by Roboflow": ("yolo", {"data.yaml": "train: ../train/images\nval: ../valid/images\nnames: [tea]", "train/images/.keep": "", "valid/images/1.jpg": "*", "valid/labels/1.txt": "0 .5 .5 .1 .1"}, ("tea", "val")),
    "yolo with a list": ("yolo", {"shop.yaml": "train: train.txt\nnames: [tea]", "train.txt": "./images/1.jpg\n", "images/1.jpg": "*", "labels/1.txt": "0 .5 .5 .1 .1"}, ("tea", "train")),
    "voc": ("voc", {"Annotations/1.xml": XML, "JPEGImages/1.jpg": "*", "ImageSets/Main/val.txt": "1\n"}, ("tea", "val")),
    "voc devkit": ("voc", {"VOCdevkit/VOC2012/Annotations/1.xml": XML, "VOCdevkit/VOC2012/JPEGImages/1.jpg": "*"}, ("tea", "")),
    "voc beside the images": ("voc", {"train/1.xml": XML, "train/1.jpg": "*"}, ("tea", "train")),
    "voc, another machine's name": ("voc", {"Annotations/1.xml": XML.replace("1.jpg", "IMG_9.jpg"), "JPEGImages/1.jpg": "*"}, ("tea", "")),
    "csv": ("csv", {"labels.csv": "\ufefffilename,class,set\nimages/1.jpg,tea,validation\n", "images/1.jpg": "*"}, ("tea", "val")),
    "csv made on Windows": ("csv", {"labels.csv": "path,label\r\nimages\\1.jpg,tea\r\n", "images/1.jpg": "*"}, ("tea", "")),
    "lists": ("lists", {"train.txt": "1.jpg, tea\n", "1.jpg": "*"}, ("tea", "train")),
    "masks": ("masks", {"images/val/1.jpg": "*", "masks/val/1.png": MASK}, ("foreground", "val")),
    "a csv about something else": ("folder", {"labels.csv": "a,b\n1,2\n", "tea/1.jpg": "*"}, ("tea", "")),
    "json and yaml about something else": ("folder", {"settings.json": '{"images": 3}', "ci.yaml": "names: 1", "notes.xml": "<note/>", "tea/1.jpg": "*"}, ("tea", "")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised(tmp_path, layout):
    name, files, want = LAYOUTS[layout]
    write_files(tmp_path, {path: picture(1) if content == "*" else content for path, content in files.items()})
    found, format = find_format(str(tmp_path))
    items = format.read(str(tmp_path)).items
    assert found == name and [(item.label, item.given_split, item.problem) for item in items] == [(*want, "")] and items[0].path.is_file()
    if name in ("coco", "yolo", "voc"): assert len(parse_objects(items[0].objects)) == 1


def test_two_formats_at_once_are_asked_about(tmp_path):
    write_files(tmp_path, {"instances.json": COCO, "Annotations/1.xml": XML, "JPEGImages/1.jpg": picture(1)})
    with pytest.raises(BadInput) as told: find_format(str(tmp_path))
    assert "coco and voc" in str(told.value) and "--format coco or --format voc" in told.value.fix
    assert find_format(str(tmp_path), "voc")[0] == "voc"


@pytest.mark.parametrize("name", ["coco", "yolo", "voc", "fiftyone", "csv", "archive"])
def test_a_format_that_is_not_there_says_so(tmp_path, name):
    (tmp_path/"1.jpg").write_bytes(picture(1))
    with pytest.raises(BadInput) as told: formats[name].read(str(tmp_path))
    assert told.value.fix.startswith("give a")


BROKEN = {
    "coco cut off": {"instances.json": COCO[:-20]}, "coco without ids": {"instances.json": '{"images": [{"file_name": "1.jpg"}], "categories": [], "annotations": []}'},
    "coco of lists": {"instances.json": '{"images": [1], "categories": [], "annotations": []}'}, "coco deep": {"instances.json": '{"images": [], "annotations": ' + "["*200_000},
    "yaml with a tag": {"data.yaml": "train: images\nnames: !!python/object/apply:os.system ['true']"}, "yaml bomb": {"data.yaml": "names: &a [1]\ntrain: *a\n"},
    "yaml names": {"data.yaml": "train: images\nnames: 7", "images/1.jpg": "x"}, "yaml outside": {"data.yaml": "train: ../../etc\nnames: [tea]"},
    "fiftyone": {"metadata.json": "{}", "samples.json": '{"samples": [1]}'}, "fiftyone cut off": {"metadata.json": "{}", "samples.json": '{"samples": ['},
    "parquet": {"labels.parquet": b"PAR1 no"}, "list": {"train.txt": "1.jpg, a, b, c, d\n", "1.jpg": "x"},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_description_is_one_error_with_a_fix(tmp_path, case):
    write_files(tmp_path, BROKEN[case])
    names = {"coco": "coco", "yaml": "yolo", "fiftyone": "fiftyone", "parquet": "csv", "list": "lists"}
    with pytest.raises(CvopsError) as told: formats[names[case.split()[0]]].read(str(tmp_path))
    assert told.value.fix


@pytest.mark.parametrize("annotation", [
    {"bbox": [1, 2, 3]}, {"bbox": [1, 2, -3, 4]}, {"bbox": "all"}, {"bbox": [1, 2, 1e999, 4]}, {"bbox": [1, 2, None, 4]}, {}, {"bbox": [1, 2, 3, 4], "category_id": 9},
    {"bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3]]}, {"bbox": [1, 2, 3, 4], "deep": 1e999},
])
def test_an_annotation_without_sense_sets_its_image_aside(tmp_path, workbench, annotation):
    coco = json.loads(COCO)
    coco["images"].append({"id": 2, "file_name": "2.jpg"})
    coco["annotations"].append({"image_id": 2, "category_id": 1, **annotation})
    write_files(tmp_path/"in", {"instances.json": json.dumps(coco).replace("Infinity", "1e999"), "1.jpg": picture(1), "2.jpg": picture(2)})
    _, table, rejected = take(tmp_path/"in", workbench)
    assert len(table) == 1 and rejected[["name", "reason"]].to_numpy().tolist() == [["2.jpg", "bad_annotation"]] and rejected.detail[0]


# --- archives and object stores

def pack(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items(): file.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as file:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize("top", ["", "shop/", "shop/v1/"])
def test_an_archive_is_read_by_the_format_inside(tmp_path, workbench, name, top):
    files = {"annotations/instances_train.json": COCO.encode(), "images/1.jpg": picture(1), "images/2.jpg": picture(2)}
    path = pack(tmp_path/name, {top + key: value for key, value in files.items()})
    batch, table, _ = take(path, workbench)
    assert batch.format == "archive" and table.label.tolist() == ["tea"] and table.given_split.tolist() == ["train"]
    before = fingerprint_source(str(path))
    assert before == fingerprint_source(str(path))
    pack(path, {top + "tea/1.jpg": picture(1), top + "milk/2.jpg": picture(2)})
    assert before != fingerprint_source(str(path))
    assert sorted(take(path, workbench, "again")[1].label) == ["milk", "tea"]
    assert len([p for p in (workbench.cache/"archives").iterdir()]) == 2


@pytest.mark.parametrize("caps", [Caps(files=1), Caps(one=1000), Caps(bytes=1500)])
def test_an_archive_has_caps(tmp_path, caps):
    with pytest.raises(BadInput, match="too much"): unpack(pack(tmp_path/"a.zip", {"1.jpg": bytes(900), "2.jpg": bytes(1100)}), tmp_path/"out", caps)


def test_a_bomb_stops_at_its_ratio(tmp_path, monkeypatch):
    from cvops_wb.data.formats import archives
    monkeypatch.setattr(archives, "_FREE", 1_000_000)
    with zipfile.ZipFile(tmp_path/"a.zip", "w", zipfile.ZIP_DEFLATED) as file: file.writestr("1.jpg", bytes(50_000_000))
    with pytest.raises(BadInput, match="too much"): unpack(tmp_path/"a.zip", tmp_path/"out")
    assert sum(path.stat().st_size for path in (tmp_path/"out").rglob("*")) < 15_000_000


def test_a_full_disk_is_no_bad_archive(tmp_path, workbench, monkeypatch):
    import errno

    from cvops_wb.core.errors import NoRoom
    from cvops_wb.data.formats import archives
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as file: file.writestr("tea/1.jpg", b"tea")
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(archives, "_write", full)
    with pytest.raises(NoRoom, match="disk is full"): archives.prepare_archive(str(tmp_path/"a.zip"))
    assert not [p for p in (workbench.cache/"archives").rglob("*") if p.is_file()]


def test_an_archive_that_is_cut_off_leaves_nothing(tmp_path, workbench):
    path = pack(tmp_path/"a.tar.gz", {f"tea/{k}.jpg": picture(k) for k in range(8)})
    path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
    with pytest.raises(BadInput, match="cannot be unpacked"): formats["archive"].read(str(path))
    assert not list((workbench.cache/"archives").iterdir())


def test_an_object_store(workbench):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name, data in {"annotations/instances_train.json": COCO.encode(), "images/1.jpg": picture(1)}.items(): memory.pipe(f"/shop-{workbench.root.parent.name}/v1/{name}", data)
    source = f"memory://shop-{workbench.root.parent.name}/v1"
    batch, table, _ = take(source, workbench)
    assert batch.format == "remote" and batch.source == source and table.label.tolist() == ["tea"]
    before = fingerprint_source(source)
    assert before == fingerprint_source(source)
    memory.pipe(f"/shop-{workbench.root.parent.name}/v1/images/2.jpg", picture(2))
    assert before != fingerprint_source(source)


def test_s3_without_its_package_names_the_extra(workbench, monkeypatch):
    import sys
    pytest.importorskip("fsspec")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingTool) as told: formats["remote"].read("s3://bucket/prefix")
    assert "cvops-wb[s3]" in told.value.fix


# --- the table and the journal

def test_a_table_without_objects_is_still_read(tmp_path):
    table = pd.DataFrame([{name: {"str": "", "int": 0, "float": 0., "list": []}[kind] for name, kind in SAMPLE_COLUMNS.items()}])
    write_samples(table, tmp_path/"new.parquet")
    pd.read_parquet(tmp_path/"new.parquet").drop(columns="objects").to_parquet(tmp_path/"old.parquet")
    assert read_samples(tmp_path/"old.parquet").objects.tolist() == [""]


def test_a_journal_of_version_one_is_migrated(workbench, photos):
    take(photos, workbench, "r1")
    before = list_samples(workbench)
    place = workbench.store/"journal.sqlite"
    journal = sqlite3.connect(place)
    journal.executescript("""create table old as select origin, name, sha256, label, labeled_by, given_split, seen from arrivals; drop table arrivals;
        create table arrivals (origin text, name text, sha256 text, label text, labeled_by text, given_split text, seen text, primary key (origin, name, sha256)) without rowid;
        insert into arrivals select * from old; drop table old; pragma user_version = 1;""")
    journal.close()
    pd.testing.assert_frame_equal(list_samples(workbench), before)
    assert sqlite3.connect(place).execute("pragma user_version").fetchone() == (2,)
    batch, _, _ = take(photos, workbench, "r2")
    assert batch.new == 0 and len(list_samples(workbench)) == 40


@pytest.mark.parametrize("make, error", [
    (lambda out: out.mkdir() or (out/"x").write_text(""), BadInput), (lambda out: out.write_text(""), BadInput), (lambda out: out.symlink_to("/tmp"), BadInput),
])
def test_an_export_never_writes_over_anything(tmp_path, make, error):
    make(tmp_path/"out")
    with pytest.raises(error): write_export(AWKWARD, tmp_path/"out", "coco")


def test_an_export_is_whole_or_not_there(tmp_path):
    def fail(): raise OSError("the disk is gone")
    with pytest.raises(OSError, match="gone"): write_export([*AWKWARD, make_sample(9, split="train").__class__(**{**vars(make_sample(9)), "read": fail})], tmp_path/"out", "coco")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnknownName): write_export(AWKWARD, tmp_path/"out", "cocoa")
    assert list_writers() == WRITERS


@pytest.mark.parametrize("alone", [False, True])
def test_a_coco_source_is_known_by_its_files_without_reading_boxes(photos, tmp_path, alone):
    "Another box, an image touched or added: another fingerprint; the same source, the same."
    root = tmp_path/"coco"
    (root/"images").mkdir(parents=True)
    names = [f"{k}.jpg" for k in range(3)]
    for name, path in zip(names, sorted(photos.rglob("*.jpg")), strict=False): (root/"images"/name).write_bytes(path.read_bytes())
    document = root/"instances_train.json"
    def write(x):
        boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [x, 2, 30, 40]} for k in range(3)]
        document.write_text(json.dumps({"images": [{"id": k, "file_name": name} for k, name in enumerate(names)], "annotations": boxes, "categories": [{"id": 1, "name": "tea"}]}))
    write(1)
    source, seen = str(document if alone else root), []
    def look():
        seen.append(fingerprint_source(source))
        assert fingerprint_source(source) == seen[-1]
    look()
    write(5)
    look()
    os.utime(root/"images"/"1.jpg", (1, 1))
    look()
    (root/"images"/"2.jpg").unlink()
    look()
    assert len(set(seen)) == 4


def write_odd(root: Path, files: dict[str, str | int | bytes]) -> Path:
    "A source: text, or the picture of a number."
    for name, content in files.items():
        path = root/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(content) if isinstance(content, int) else content if isinstance(content, bytes) else content.encode())
    return root


LINE, JUNK = "1 .5 .5 .5 .5\n", {".DS_Store": b"\0\0\0\1Bud1", "Thumbs.db": b"\xd0\xcf", "desktop.ini": "[x]", "__MACOSX/._1.jpg": b"\0\5\x16\7"}
PAGE = "<annotation><filename>1.jpg</filename><object><name>tea</name><difficult>1</difficult><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"
ODD = {     # files → format, and of each image: label, split, objects
    "yolo as Roboflow writes it, its test split missing": (
        {"train/images/1.jpg": 1, "train/labels/1.txt": LINE, "valid/images/2.jpg": 2, "valid/labels/2.txt": "",
         "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: ['tea', 'milk']\n"}, "yolo", {("milk", "train", 1), ("", "val", 0)}),
    "yolo lists from another machine": (
        {"images/1.jpg": 1, "labels/1.txt": LINE, "images/2.jpg": 2, "labels/2.txt": LINE, "train.txt": "./images/1.jpg\n", "val.txt": "/home/eva/set/images/2.jpg\n",
         "my.yaml": "path: /home/eva/set\ntrain: train.txt\nval: val.txt\nnames: {0: tea, 1: milk}\n"}, "yolo", {("milk", "train", 1), ("milk", "val", 1)}),
    "yolo with several folders a split, outlines": (
        {"images/a/1.JPG": 1, "labels/a/1.txt": "0 .1 .1 .5 .1 .5 .6\n", "images/b/2.jpeg": 2, "data.yaml": "train: [images/a, images/b]\nval:\nnames:\n  0: tea\n", **JUNK},
        "yolo", {("tea", "train", 1), ("", "train", None)}),
    "voc beside the images, nested": ({"a/1.jpg": 1, "a/1.xml": PAGE, "b/c/1.jpg": 2, "b/c/1.xml": PAGE, **JUNK}, "voc", {("tea", "", 1)}),
    "voc with masks": ({"JPEGImages/1.jpg": 1, "Annotations/1.xml": PAGE, "SegmentationClass/1.png": 2, "ImageSets/Main/val.txt": "1\n"}, "voc", {("tea", "val", 1)}),
    "csv with a box a row": ({"1.jpg": 1, "2.jpg": 2, "boxes.csv": "filename,class,xmin,ymin,xmax,ymax\n1.jpg,tea,1,2,30,40\n1.jpg,milk,5,6,10,12\n2.jpg,,,,,\n"}, "csv", {("", "", 2), ("", "", 0)}),
    "csv from a spreadsheet": ({"1.jpg": 1, "2.jpg": 2, "labels.csv": "Image;Label\r\n1.jpg;tea\r\n2.jpg;milk\r\n"}, "csv", {("tea", "", None), ("milk", "", None)}),
    "csv with quoted names and whole paths": (
        {"in/a, b.jpg": 1, "in/ü é.jpg": 2, "labels.csv": '\ufefffilename,species,split\n"in/a, b.jpg",tea,train\n"C:\\set\\in\\ü é.jpg",milk,val\n'}, "csv", {("tea", "train", None), ("milk", "val", None)}),
    "folder in a folder": ({"shop/Train/grüner Tee/1.JPG": 1, "shop/VAL/日本茶/bild 2": 2, **{f"shop/{name}": text for name, text in JUNK.items()}},
                           "folder", {("grüner Tee", "train", None), ("日本茶", "val", None)}),
    "folder of one class in a folder": ({"shop/tea/1.jpg": 1, "shop/tea/2.jpg": 2}, "folder", {("tea", "", None)}),
}


@pytest.mark.parametrize("packed", ["", "zip", "tar.gz"])
@pytest.mark.parametrize("case", ODD)
def test_what_others_write(tmp_path, workbench, case, packed):
    files, format, want = ODD[case]
    source = write_odd(tmp_path/"My Data", files)
    if packed == "zip":
        with zipfile.ZipFile(tmp_path/"set.zip", "w") as out:
            for path in sorted(source.rglob("*")): out.write(path, f"My Data/{path.relative_to(source)}")
    if packed == "tar.gz":
        with tarfile.open(tmp_path/"set.tar.gz", "w:gz") as out: out.add(source, "./some/My Data")
    source = tmp_path/f"set.{packed}" if packed else source
    name, reader = find_format(str(source))
    items = reader.read(str(source)).items
    assert name == ("archive" if packed else format) and [item for item in items if item.problem or not item.path.is_file()] == []
    assert {(item.label, item.given_split, len(parse_objects(item.objects)) if item.objects else None) for item in items} == want
    assert len(items) == sum(isinstance(content, int) for content in files.values()) - ("masks" in case)


def test_a_table_in_which_several_columns_may_be_the_label(tmp_path, workbench):
    source = write_odd(tmp_path/"in", {**{f"{k}.jpg": k for k in range(4)}, "labels.csv": "file,species,colour,weight\n0.jpg,tea,red,1.5\n1.jpg,milk,blue,2\n2.jpg,tea,blue,3\n3.jpg,milk,red,4\n"})
    reader = find_format(str(source))[1]
    with pytest.raises(BadInput, match="species, colour") as error: reader.read(str(source))
    assert "--label species" in error.value.fix
    assert [item.label for item in reader.read(str(source), "colour").items] == ["red", "blue", "blue", "red"]
    assert {item.label for item in reader.read(str(source), "none").items} == {""}


def test_images_in_parquet(tmp_path, workbench):
    "As data hubs write it: bytes, classes as numbers whose names stand in the file, a split a file; and names that want to leave."
    import pyarrow as pa
    import pyarrow.parquet as pq
    described = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["tea", "milk"], "_type": "ClassLabel"}}}})}
    (tmp_path/"in"/"data").mkdir(parents=True)
    for split, numbers in (("train", [1, 2, 3]), ("validation", [4]), ("test", [5])):
        table = pa.table({"image": [{"bytes": picture(k), "path": "../../../../etc/out.jpg"} for k in numbers] + [{"bytes": b"no image", "path": None}], "label": [k % 2 for k in numbers] + [0]})
        pq.write_table(table.replace_schema_metadata(described), tmp_path/"in"/"data"/f"{split}-00000-of-00001.parquet")
    batch, table, rejected = take(tmp_path/"in", workbench)
    assert batch.format == "parquet" and batch.count == 5 and sorted(table.label) == ["milk"]*3 + ["tea"]*2 and sorted(table.given_split) == ["test", "train", "train", "train", "val"]
    assert rejected.reason.tolist() == ["not_an_image"]*3
    assert take(tmp_path/"in"/"data"/"test-00000-of-00001.parquet", workbench, "one")[0].count == 1
