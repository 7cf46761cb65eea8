"Data sets as a stranger brings them: what was understood is said, what was not read is counted, nothing is lost in silence."
import json
import os
import stat
import zipfile

import pytest
from test_data_formats import COCO, LINE, PAGE, picture, take, write_odd

from cvops_wb.core.errors import BadInput
from cvops_wb.data.formats import find_format
from cvops_wb.loop.keys import sign_path
from cvops_wb.loop.workbench import enter_workbench

EXTRA = {"notes.txt": "by hand", "in/paper.pdf": "%PDF", "in/old.xml": "<a/>"}
UNREAD = {     # a source → what of it is not read, beside `EXTRA`
    "folder": ({"tea/1.jpg": 1, "milk/2.jpg": 2}, {}),
    "lists": ({"train.txt": "a/1.jpg, tea\n", "classes.csv": "Class ID,Class Name\n1,tea\n", "a/1.jpg": 1, "a/2.jpg": 2}, {"images that nothing names": 1}),
    "csv": ({"labels.csv": "file,label\n1.jpg,tea\n", "1.jpg": 1, "2.jpg": 2}, {"images that nothing names": 1}),
    "coco": ({"annotations/instances_train.json": COCO, "annotations/captions.json": '{"images": [', "images/1.jpg": 1, "images/2.jpg": 2}, {"images that nothing names": 1, ".json": 1}),
    "yolo": ({"data.yaml": "train: images\nval: images\nnames: [tea, milk]\n", "images/1.jpg": 1, "labels/1.txt": LINE, "labels/9.txt": LINE, "away/2.jpg": 2}, {"images that nothing names": 1, ".txt": 1}),
    "boxes": ({"images/1.jpg": 1, "labels/1.txt": "0 .5 .5 .2 .2\n", "labels/9.txt": LINE}, {".txt": 1}),
    "voc": ({"Annotations/1.xml": PAGE, "JPEGImages/1.jpg": 1, "JPEGImages/2.jpg": 2, "SegmentationObject/1.png": 3, "ImageSets/Main/train.txt": "1\n"}, {"masks": 1}),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_counted(tmp_path, workbench, name):
    files, unread = UNREAD[name]
    extra = {".txt": 1, ".pdf": 1, ".xml": 1}
    want = {kind: extra.get(kind, 0) + unread.get(kind, 0) for kind in {**extra, **unread}}
    batch, table, rejected = take(write_odd(tmp_path/"in", {**files, **EXTRA}), workbench)
    assert batch.format == name and batch.skipped == want and len(rejected) == 0
    assert batch.remarks[-1].startswith(f"{sum(want.values())} files were not read: ") and "1 × .pdf" in batch.remarks[-1]
    pictures = sum(isinstance(content, int) for content in files.values())
    assert len(table) + batch.skipped.get("images that nothing names", 0) + batch.skipped.get("masks", 0) == pictures     # each picture is somewhere


def test_a_link_in_an_archive_is_counted_each_time(tmp_path, workbench):
    with zipfile.ZipFile(tmp_path/"set.zip", "w") as out:
        for name in ("tea", "milk"): out.writestr(f"set/{name}/1.jpg", picture(len(name)))
        link = zipfile.ZipInfo("set/tea/2.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(link, "1.jpg")
    for run in ("first", "from the cache"): assert take(tmp_path/"set.zip", workbench, run)[0].skipped == {"link or device": 1}


COLUMNS = {     # values of the only column left → whether they are taken as the label, and what is said
    "measurements": (["1.25", "3.5", "2.75", "9.5"]*5, False, "numbers with decimals"), "counts": ([str(7*k) for k in range(20)], False, "numbers that are almost all different"),
    "captions": ([f"a cup number {k}" for k in range(20)], False, "texts that are almost all different"), "masks": ([f"{k}_mask.png" for k in range(20)], False, "names of images"),
    "nothing": ([""]*20, False, "nothing"), "numbers of classes": (["0", "1", "2", "1"]*5, True, "taken as the label"), "words": (["tea", "milk"]*10, True, "taken as the label"),
    "as pandas writes classes": (["0.0", "1.0"]*10, True, "taken as the label"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_the_only_column_left_is_no_label_if_it_cannot_be_one(tmp_path, workbench, case):
    values, taken, says = COLUMNS[case]
    rows = "".join(f"{k}.jpg,{value}\n" for k, value in enumerate(values))
    source = write_odd(tmp_path/"in", {"labels.csv": f"file,what\n{rows}", **{f"{k}.jpg": b"..." for k in range(len(values))}})
    listing = find_format(str(source))[1].read(str(source))
    assert [item.label for item in listing.items] == [values[int(item.name[:-4])]*taken for item in listing.items]
    assert len(listing.notes) == 1 and says in listing.notes[0] and "--label" in listing.notes[0]
    forced = find_format(str(source))[1].read(str(source), "what")
    assert {item.label for item in forced.items} == set(values) and forced.notes == ()


def test_a_demo_where_there_is_no_workbench_makes_one(tmp_path, monkeypatch, photos):
    monkeypatch.delenv("CVOPS_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    before = sorted(photos.rglob("*"))
    assert enter_workbench(str(photos), dry_run=True).endswith("-workbench") and list(tmp_path.iterdir()) == []
    place = enter_workbench(str(photos))
    assert os.getcwd() == str(tmp_path/place) and (tmp_path/place/"settings.ini").is_file() and sorted(photos.rglob("*")) == before
    assert enter_workbench(str(photos)) == ""       # now there is one here
    monkeypatch.chdir(tmp_path)
    assert enter_workbench(str(photos)) == place    # the same one
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="does not exist"): enter_workbench("fotos")
    assert [path.name for path in tmp_path.iterdir()] == [place]


def list_labels(items): return {item.name: item.label for item in items}


def test_a_list_with_spaces_and_a_lone_folder_of_images(tmp_path):
    spaced = write_odd(tmp_path/"spaced", {"train.txt": "images/1.jpg 0\nimages/a b.jpg 1\n", "images/1.jpg": 1, "images/a b.jpg": 2})
    name, reader = find_format(str(spaced))
    assert name == "lists" and list_labels(reader.read(str(spaced)).items) == {"images/1.jpg": "0", "images/a b.jpg": "1"}
    listing = find_format(str(write_odd(tmp_path/"lone", {"images/1.jpg": 1, "images/2.jpg": 2})))[1].read(str(tmp_path/"lone"))
    assert set(list_labels(listing.items).values()) == {""} and "'images' was not taken as a class" in listing.notes[0]
    two = write_odd(tmp_path/"two", {"images/1.jpg": 1, "drawings/2.jpg": 2})
    assert set(list_labels(find_format(str(two))[1].read(str(two)).items).values()) == {"images", "drawings"}


def test_columns_of_0_and_1_are_labels(tmp_path, workbench):
    rows = ["1.jpg,1,0,0", "2.jpg,1,1,0", "3.jpg,0,0,0"]
    source = write_odd(tmp_path/"in", {"_classes.csv": "filename,cat,dog,bird\n" + "\n".join(rows), **{f"{k}.jpg": k for k in (1, 2, 3)}})
    listing = find_format(str(source))[1].read(str(source))
    assert list_labels(listing.items) == {"1.jpg": "cat", "2.jpg": "cat|dog", "3.jpg": ""} and "cat, dog, bird hold 0 and 1" in listing.notes[-1]
    assert list_labels(find_format(str(source))[1].read(str(source), "dog").items)["2.jpg"] == "1"


def test_headers_as_a_spreadsheet_exports_them(tmp_path):
    source = write_odd(tmp_path/"in", {"photos/a.jpg": 1, "photos/b, c.jpg": 2, "Export.csv": "\ufeffImage Path;Class-Name;Confidence\r\nC:\\Users\\Eva\\photos\\a.jpg;tea;0,93\r\n\"photos\\b, c.jpg\";\"green \"\"tea\"\"\";0,81\r\n"})
    name, reader = find_format(str(source))
    assert name == "csv" and list_labels(reader.read(str(source)).items) == {"photos/a.jpg": "tea", "photos/b, c.jpg": 'green "tea"'}


def test_a_yolo_description_with_whole_paths_of_another_machine(tmp_path):
    source = write_odd(tmp_path/"in", {"images/train/1.jpg": 1, "labels/train/1.txt": LINE, "images/val/.keep": "", "data.yaml": "path: /data/eva/set\ntrain: /data/eva/set/images/train\nval: /data/eva/set/images/val\nnames: [tea, milk]\n"})
    assert [(item.label, item.given_split) for item in find_format(str(source))[1].read(str(source)).items] == [("milk", "train")]


def test_an_annotation_file_belongs_to_the_image_of_its_own_name(tmp_path):
    pages = {"Annotations/1.xml": PAGE, "Annotations/2.xml": PAGE.replace("tea", "milk")}     # both say 1.jpg
    source = write_odd(tmp_path/"in", {"JPEGImages/1.jpg": 1, "JPEGImages/2.jpg": 2, **pages})
    assert list_labels(find_format(str(source))[1].read(str(source)).items) == {"JPEGImages/1.jpg": "tea", "JPEGImages/2.jpg": "milk"}


def test_annotations_of_no_image_are_told_and_a_bad_one_is_counted_once(tmp_path, workbench):
    boxes = [{"image_id": "a", "category_id": "c9", "bbox": [1, 2, 3, 4]}, {"image_id": "b", "category_id": "c9", "bbox": [1, 2, -3, 4]}, {"image_id": "gone", "category_id": "c9", "bbox": [1, 2, 3, 4]}]
    document = {"images": [{"id": "a", "file_name": "1.jpg"}, {"id": "b", "file_name": "2.jpg"}], "categories": [{"id": "c9", "name": "tea"}, {"id": "c77", "name": "unused"}], "annotations": boxes}
    batch, table, rejected = take(write_odd(tmp_path/"in", {"images/1.jpg": 1, "images/2.jpg": 2, "annotations/instances_default.json": json.dumps(document)}), workbench)
    assert (batch.count, rejected.name.tolist(), batch.skipped) == (1, ["images/2.jpg"], {}) and batch.notes == ["1 annotations of instances_default.json belong to no image there"]


ODDITIES = {
    "capitals": ({"Milk/1.jpg": 1, "milk/2.jpg": 2, "tea/3.jpg": 3}, "'Milk' and 'milk'"), "two labels": ({"ok/1.jpg": 1, "bad/1.jpg": 1, "bad/2.jpg": 2}, "1 image came under more than one label"),
    "a class that train lacks": ({"train/tea/1.jpg": 1, "train/milk/2.jpg": 2, "val/tea/3.jpg": 3, "val/beer/4.jpg": 4}, "in val but not in train, so that nothing can learn them: beer"),
    "a box outside": ({"images/1.jpg": 1, "labels/1.txt": LINE, "data.yaml": "train: images\nnames: [tea, milk]\n", "images/2.jpg": 2, "labels/2.txt": "0 .9 .9 .6 .6\n"}, "1 image with boxes that have no area, or reach out"),
}


@pytest.mark.parametrize("case", ODDITIES)
def test_what_is_odd_about_the_labels_is_said(tmp_path, workbench, case):
    files, says = ODDITIES[case]
    batch = take(write_odd(tmp_path/"in", files), workbench)[0]
    assert len(batch.notes) == 1 and says in batch.notes[0]


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path, workbench):
    batch = take(write_odd(tmp_path/"in", {"cafe\u0301/1.jpg": 1, "caf\u00e9/2.jpg": 2, "tea/3.jpg": 3}), workbench)[0]
    assert batch.classes == {"caf\u00e9": 2, "tea": 1} and batch.notes == []


def test_an_archive_with_one_name_twice_and_one_in_an_archive(tmp_path, workbench):
    with zipfile.ZipFile(tmp_path/"set.zip", "w") as out, pytest.warns(UserWarning, match="Duplicate name"):
        for k, name in enumerate(("tea/1.jpg", "milk/1.jpg", "milk/1.jpg")): out.writestr(name, picture(k))
        out.writestr("tea/zero.jpg", b"")
    batch, table, rejected = take(tmp_path/"set.zip", workbench)
    assert batch.skipped == {"second of its name": 1} and len(table) == 2 and rejected.reason.tolist() == ["empty"]
    with zipfile.ZipFile(tmp_path/"outer.zip", "w") as out: out.write(tmp_path/"set.zip", "set.zip")
    with pytest.raises(BadInput) as error: take(tmp_path/"outer.zip", workbench, "outer")
    assert "unpack set.zip and give that" in error.value.fix


def test_links_in_a_circle_pipes_and_sockets_stop_nothing(tmp_path, workbench):
    source = write_odd(tmp_path/"in", {"tea/1.jpg": 1, "milk/2.jpg": 2})
    (source/"tea/loop").symlink_to("..")
    (source/"tea/self.jpg").symlink_to("self.jpg")
    (source/"tea/gone.jpg").symlink_to("/nowhere/x.jpg")
    os.mkfifo(source/"tea/pipe.jpg")
    first = sign_path(source)
    (source/"milk/3.jpg").write_bytes(picture(3))
    assert first != sign_path(source) == sign_path(source)
    batch, _, rejected = take(source, workbench)
    assert batch.count == 3 and sorted(rejected.name) == ["tea/gone.jpg", "tea/loop", "tea/pipe.jpg", "tea/self.jpg"]
