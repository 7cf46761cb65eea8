"Data sets as a stranger brings them: what was understood is said, what was not read is counted, nothing is lost in silence."
import os
import stat
import zipfile

import pytest
from test_data_formats import COCO, LINE, PAGE, picture, take, write_odd

from cvops_wb.core.errors import BadInput
from cvops_wb.data.formats import find_format
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
