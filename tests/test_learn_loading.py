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


def test_another_content_is_another_cache(tmp_path):
    "Ids are names; what is decoded is known by its content."
    reader, other = Reader(), Reader()
    reader.table["sha256"], other.table["sha256"] = [f"{k:064x}" for k in range(8)], [f"{k + 9:064x}" for k in range(8)]
    for each in (reader, other, reader): load_pixels(each, [16], tmp_path, decode)
    assert (reader.reads, other.reads, len(list(tmp_path.iterdir()))) == (7, 7, 2)


def test_what_does_not_fit_is_streamed(tmp_path, capsys):
    "The same images, one by one or several, and nothing on the disk."
    kept, = load_pixels(Reader(), [16], tmp_path/"kept", decode)
    streamed, = load_pixels(Reader(), [16], tmp_path/"none", decode, limit_mb=.001)
    assert "decoded anew" in capsys.readouterr().out and not (tmp_path/"none").exists()
    assert (streamed.take(list(kept.ids)[::-1]) == kept.take(list(kept.ids)[::-1])).all() and (streamed.images[3] == kept.images[3]).all()
    assert streamed.images.shape == kept.images.shape and len(streamed.images[np.array([2, 2, 0])]) == 3


def test_a_disk_without_room_streams(tmp_path, monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    assert load_pixels(Reader(), [16], tmp_path, decode)[0].take(["0000000000000005"])[0, 0, 0, 0] == 50 and list(tmp_path.iterdir()) == []


def test_crops_are_those_of_torchvision():
    "The same windows give the same pixels, and windows are chosen as `RandomResizedCrop` chooses them."
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop, functional

    from cvops_wb.learn.augmentation import choose_windows, cut_windows, normalise
    rng = np.random.default_rng(0)
    smooth = [np.asarray(Image.fromarray(rng.integers(0, 255, (9, 9, 3)).astype(np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)) for _ in range(6)]
    windows = choose_windows(6, 90, 120, torch.Generator().manual_seed(0))
    ours = cut_windows([torch.from_numpy(image) for image in smooth], windows, torch.tensor([False]*3 + [True]*3), 64)
    for image, (x, y, w, h), mine, turned in zip(smooth, windows.tolist(), ours, [False]*3 + [True]*3, strict=True):
        theirs = functional.resized_crop(Image.fromarray(image), y, x, h, w, [64, 64], antialias=True)      # Pillow's
        theirs = np.asarray(theirs)[:, ::-1] if turned else np.asarray(theirs)
        assert np.abs(mine.permute(1, 2, 0).numpy().astype(int) - theirs.astype(int)).max() <= 2
    wanted = functional.normalize(ours.float()/255, [.485, .456, .406], [.229, .224, .225])
    torch.testing.assert_close(normalise(ours, [.485, .456, .406], [.229, .224, .225]), wanted, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    blank, count = torch.zeros(3, 90, 120), 3000
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [.08, 1.], [3/4, 4/3]) if hasattr(RandomResizedCrop, "get_params") else
                           (p := RandomResizedCrop(64, antialias=True).make_params([blank])) and [p["top"], p["left"], p["height"], p["width"]] for _ in range(count)]).float()
    mine = choose_windows(count, 90, 120, torch.Generator().manual_seed(1))[:, [1, 0, 3, 2]].float()
    from scipy.stats import ks_2samp
    for column in range(4): assert ks_2samp(mine[:, column], theirs[:, column]).pvalue > 1e-3
