"Pixels are decoded once; a split that cannot be used is found at once."
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import BadImage, BadInput, BadRecord, NoRoom, WrongUsage
from cvops_wb.learn.loading import check_classes, load_pixels, open_split, take_split


class Reader:
    "An opened snapshot of eight small photographs."

    def __init__(self, damaged: tuple[str, ...] = ()):
        self.table = pd.DataFrame({"id": [f"{k:016x}" for k in range(8)], "split": ["train"]*4 + ["val"]*3 + ["none"], "label": list("abababa") + [""]})
        self.damaged, self.reads = damaged, 0

    def read(self, id: str) -> bytes:
        self.reads += 1
        out = io.BytesIO()
        Image.fromarray(np.full((40, 60, 3), 10*int(id, 16), np.uint8)).save(out, "PNG")
        return out.getvalue()[:40] if id in self.damaged else out.getvalue()


def decode(data: bytes, sizes):
    try: image = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as e: raise BadImage("truncated", "the image is cut off") from e
    return [np.asarray(image.resize((size, size))) for size in sizes]


def test_decoded_once(tmp_path):
    reader = Reader()
    small, large = load_pixels(reader, [16, 24], tmp_path, decode)
    again, more = load_pixels(reader, [16, 32], tmp_path, decode)
    assert reader.reads == 2*7 and small.images.shape == (7, 16, 16, 3) and large.images.shape == (7, 24, 24, 3) and more.images.shape == (7, 32, 32, 3)
    assert (again.take(["0000000000000005", "0000000000000002"])[:, 0, 0, 0] == [50, 20]).all()
    assert isinstance(small.images, np.memmap) and not small.images.flags.writeable


def test_an_unknown_sample_is_an_error(tmp_path):
    with pytest.raises(BadInput): load_pixels(Reader(), [16], tmp_path, decode)[0].take(["0000000000000007"])   # set aside: in no split


@pytest.mark.parametrize("ids", [("0000000000000003",)])
def test_a_damaged_sample_leaves_nothing_behind(tmp_path, ids):
    with pytest.raises(BadInput, match=ids[0]): load_pixels(Reader(ids), [16], tmp_path, decode)
    assert list(tmp_path.iterdir()) == []
    assert load_pixels(Reader(), [16], tmp_path, decode)[0].images.shape == (7, 16, 16, 3)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(NoRoom): load_pixels(Reader(), [16], tmp_path, decode)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split, count", [("train", 4), ("val", 3)])
def test_splits(split, count): assert len(take_split(Reader().table, split)) == count


@pytest.mark.parametrize("call, message", [
    (lambda table: take_split(table, "test"), "no labelled sample"),
    (lambda table: take_split(table.assign(label=""), "train"), "no labelled sample"),
    (lambda table: check_classes(table.query("label == 'a'")), "two classes"),
    (lambda table: check_classes(table.iloc[:0]), "two classes"),
])
def test_degenerate_splits(call, message):
    with pytest.raises(BadInput, match=message) as caught: call(Reader().table)
    assert caught.value.fix


@pytest.mark.parametrize("split, snapshot, error", [("tset", "s", WrongUsage), ("auto", "missing", BadRecord)])
def test_wrong_names(workbench, split, snapshot, error):
    with pytest.raises(error): open_split(workbench, snapshot, split, 32)
