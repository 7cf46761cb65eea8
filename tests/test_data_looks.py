"Leaks of a split that others made, and points for images: what is planted is found, what is damaged is made anew."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput
from cvops_wb.core.records import SAMPLE_COLUMNS
from cvops_wb.data import CurateSpec, IngestSpec, curate, ingest, report_leaks
from cvops_wb.data.looks import count_leaks, embed_samples, list_leaks, place_samples
from cvops_wb.data.looks.embeddings import Descriptor, describe_thumbs


def draw(seed, size=(160, 120)):
    "A picture of some rectangles, like no other."
    rng = np.random.default_rng(seed)
    picture = np.full((size[1], size[0], 3), rng.integers(40, 200, 3), np.uint8)
    for _ in range(14):
        x, y, w, h = rng.integers(0, size[0]), rng.integers(0, size[1]), *rng.integers(10, 60, 2)
        picture[y:y + h, x:x + w] = rng.integers(0, 255, 3)
    return Image.fromarray(picture)


@pytest.fixture
def split_folder(tmp_path):
    "Train and test as somebody published them: three of the test's pictures are pictures of train, made smaller, brighter, or given another label."
    for split, seeds in (("train", range(20)), ("test", range(100, 110))):
        for seed in seeds:
            folder = tmp_path/"src"/split/("tea" if seed % 2 else "milk")
            folder.mkdir(parents=True, exist_ok=True)
            draw(seed).save(folder/f"{seed}.jpg", quality=90)
    draw(3).resize((120, 90)).save(tmp_path/"src"/"test"/"tea"/"small.jpg")
    draw(5).point(lambda v: min(255, int(v*1.15))).save(tmp_path/"src"/"test"/"tea"/"bright.jpg")
    draw(7).save(tmp_path/"src"/"test"/"milk"/"other.jpg", quality=60)
    return tmp_path/"src"


def test_planted_leaks_are_found_counted_and_shown(split_folder, workbench):
    for name in ("a", "b"): (workbench.reports/name).mkdir(parents=True)
    selection = curate(ingest(str(split_folder), IngestSpec(), workbench.reports/"a"), CurateSpec(strategy="given"), workbench.reports/"b")
    found, text = report_leaks(selection)
    names = {row[f"source_{side}"].rpartition("/")[2] for row in found["leaks"] for side in "ab" if row[f"split_{side}"] == "test"}
    assert names == {"small.jpg", "bright.jpg", "other.jpg"} and found["samples"]["test"] == 3 and found["other_label"] == 1
    assert "3 of 13 in test (23.1%)" in text
    page = open(found["page"]).read()
    assert page.count("data:image/png") == 1 and "other.jpg" in page
    (workbench.reports/"b"/"pairs.parquet").unlink()
    with pytest.raises(BadInput, match="pairs"): report_leaks(selection)


def test_our_own_split_has_none(split_folder, workbench):
    for name in ("a", "b"): (workbench.reports/name).mkdir(parents=True)
    selection = curate(ingest(str(split_folder), IngestSpec(), workbench.reports/"a"), CurateSpec(strategy="grouped", keep_duplicates=True), workbench.reports/"b")
    found, text = report_leaks(selection)
    assert found["pairs"] == 0 and text.startswith("no photograph")


def test_what_is_set_aside_does_not_leak_and_names_cannot_break_the_page():
    blank = {"str": "", "int": 100, "float": .9, "list": ()}
    table = pd.DataFrame({name: [blank[kind]]*3 for name, kind in SAMPLE_COLUMNS.items()}).assign(id=["a", "b", "c"], split=["train", "test", "none"])
    pairs = pd.DataFrame({"a": ["a", "a", "b"], "b": ["c", "b", "c"], "likeness": [.99, .9, .95]})
    leaks = list_leaks(table, pairs)
    assert leaks[["a", "b"]].values.tolist() == [["a", "b"]]
    assert count_leaks(table, leaks)["shares"] == {"train": 1., "test": 1.}
    assert list_leaks(table, pairs[:0]).empty


def to_file(picture):
    from io import BytesIO
    out = BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def test_what_looks_alike_lies_near():
    "Of each picture the nearest other point is its own copy, brighter and smaller."
    pictures = [draw(k) for k in range(24)]
    copies = [picture.resize((100, 75)).point(lambda v: min(255, int(v*1.1) + 5)) for picture in pictures]
    points = Descriptor().embed([to_file(picture) for picture in pictures + copies])
    apart = np.linalg.norm(points[:24, None] - points[None, 24:], axis=2)
    assert (apart.argmin(1) == np.arange(24)).mean() >= .95 and points.dtype == np.float32
    assert describe_thumbs(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 344) and np.isfinite(describe_thumbs(np.zeros((1, 32, 32, 3), np.uint8))).all()
    assert Descriptor().embed([]).shape == (0, 344)


def test_points_are_kept_by_hash_and_by_embedder(tmp_path):
    asked = []
    def make(name, width): return SimpleNamespace(name=name, embed=lambda files: asked.append(len(files)) or np.ones((len(files), width)))
    read = {"a": b"1", "b": b"2", "c": b"3"}.get
    assert embed_samples(["a", "b"], read, make("one", 3), tmp_path).shape == (2, 3)
    assert embed_samples(["c", "a"], read, make("one", 3), tmp_path).shape == (2, 3) and asked == [2, 1]
    assert embed_samples(["a"], read, make("two", 5), tmp_path).shape == (1, 5)
    for damage in (b"", b"PK\x03\x04", (tmp_path/"one.npz").read_bytes()[:-40]):
        (tmp_path/"one.npz").write_bytes(damage)
        assert embed_samples(["b"], read, make("one", 3), tmp_path).shape == (1, 3)
    with pytest.raises(BadInput, match="a point for each image"): embed_samples(["z"], lambda id: b"", make("bad", 2).__class__(name="bad", embed=lambda files: np.ones(3)), tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_the_map_holds_any_number_of_points(count):
    points = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    flat = place_samples(points)
    assert flat.shape == (count, 2) and np.isfinite(flat).all() and np.abs(flat).max(initial=0) <= 1
    assert np.allclose(flat, place_samples(points))
