"The synthetic warehouse: the same for a seed whatever the threads, real files, planted faults that are what truth.csv says, a task that must be learned."
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, UnidentifiedImageError

from cvops_wb.core.errors import UnknownName, WrongUsage
from cvops_wb.data import TrafficSpec, WarehouseSpec, decode_image, make_traffic, make_warehouse, measure_image
from cvops_wb.data.formats.synth import parse_source
from cvops_wb.data.scenery import CATALOGUE, LIGHTS, SHAPES, TALL, YAWS, draw_product, find_twin
from cvops_wb.data.scenery.artwork import EMBLEMS, LAYOUTS
from cvops_wb.data.scenery.cameras import CAMERAS
from cvops_wb.data.synthesis import hash_drawing, plan_warehouse

SPEC = WarehouseSpec(count=180, exact=.06, near=.09, wrong=.06, broken=.05)


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    "180 files and their truth."
    folder = tmp_path_factory.mktemp("warehouse")
    return folder, make_warehouse(folder, SPEC)


@pytest.fixture(scope="module")
def traffic(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    "A day and a night."
    folder = tmp_path_factory.mktemp("traffic")
    return folder, make_traffic(folder, TrafficSpec(count=48))


def hash_files(folder: Path) -> dict[str, str]:
    "Content by name."
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def distance(a: str, b: str) -> int: return (int(a, 16) ^ int(b, 16)).bit_count()


@pytest.mark.parametrize("make, spec", [(make_warehouse, WarehouseSpec(count=24, near=.2, exact=.1, wrong=.1, broken=.1, seed=5)), (make_traffic, TrafficSpec(count=10, seed=5))])
def test_a_seed_decides_all_and_threads_nothing(tmp_path, make, spec):
    for name, workers in (("one", 1), ("three", 3)): make(tmp_path/name, spec, workers)
    make(tmp_path/"other", type(spec)(**{**spec.__dict__, "seed": 6}))
    one, three, other = (hash_files(tmp_path/name) for name in ("one", "three", "other"))
    assert one == three
    assert not set(one.values()) & set(other.values()) - {hashlib.sha256(b"").hexdigest(), *(h for f, h in one.items() if (tmp_path/"one"/f).stat().st_size < 100)}


def test_every_file_stands_in_the_truth(warehouse):
    folder, truth = warehouse
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.jpg"))
    assert sorted(truth.file) == files and len(files) == SPEC.count
    assert truth.file.str.partition("/")[0].tolist() == truth.label.tolist()
    assert set(truth.sku) == set(CATALOGUE) and set(truth.camera) == {camera.model for camera in CAMERAS}
    pd.testing.assert_frame_equal(truth, pd.read_csv(folder/"truth.csv", keep_default_na=False).astype(truth.dtypes))


def test_the_default_holds_what_its_shares_say():
    kinds = pd.Series([shot.kind for shot in plan_warehouse(WarehouseSpec())]).value_counts().to_dict()
    assert kinds == {"clean": 522, "near_duplicate": 30, "exact_duplicate": 18, "wrong_label": 18, "broken": 12}


def test_photographs_are_as_large_and_as_rich_as_real_ones(warehouse):
    folder, truth = warehouse
    for row in truth[truth.kind.isin(["clean", "wrong_label"])].itertuples():
        data = (folder/row.file).read_bytes()
        image, camera = Image.open(folder/row.file), next(c for c in CAMERAS if c.model == row.camera)
        assert 12_000 <= len(data) <= 48_000 and image.format == "JPEG" and image.size == camera.size
        assert image.getexif()[0x110] == row.camera and image.getexif().get_ifd(0x8769)[0x9003] == row.taken.replace("-", ":").replace("T", " ")
        assert measure_image(decode_image(data))["entropy"] > .6     # of 1: a drawing of flat colours has about .3


def test_exact_duplicates_are_exact(warehouse):
    folder, truth = warehouse
    copies = truth[truth.kind == "exact_duplicate"]
    assert len(copies) == 11 and (copies.label != copies.sku).sum() == 1     # one was filed under the twin
    for row in copies.itertuples(): assert (folder/row.file).read_bytes() == (folder/row.of).read_bytes()
    hashes = hash_files(folder)
    groups = truth[truth.kind != "broken"].file.map(hashes)
    assert groups.duplicated().sum() == len(copies), "nothing else is equal to anything"


def test_near_duplicates_are_near(warehouse):
    folder, truth = warehouse
    hashes = {row.file: measure_image(decode_image((folder/row.file).read_bytes()))["phash"] for row in truth[truth.kind != "broken"].itertuples()}
    copies = truth[truth.kind == "near_duplicate"]
    assert set(copies.how) == {"recompressed", "resized", "cropped", "brightened"}
    near = [distance(hashes[row.file], hashes[row.of]) for row in copies.itertuples()]
    assert all((folder/row.file).read_bytes() != (folder/row.of).read_bytes() for row in copies.itertuples())
    clean = truth[truth.kind == "clean"].file.tolist()
    far = [distance(hashes[a], hashes[b]) for k, a in enumerate(clean) for b in clean[:k]]
    assert np.median(near) <= 4 and max(near) <= 14 and np.quantile(far, .001) > np.median(near)


def test_broken_files_cannot_be_opened(warehouse):
    folder, truth = warehouse
    broken = truth[truth.kind == "broken"]
    assert set(broken.how) == {"truncated", "text", "empty"}
    for row in broken.itertuples():
        with pytest.raises((UnidentifiedImageError, OSError)): Image.open(folder/row.file).load()
    for row in truth[truth.kind != "broken"].itertuples(): Image.open(folder/row.file).load()


def test_wrong_labels_are_wrong(warehouse):
    _, truth = warehouse
    wrong = truth[truth.kind == "wrong_label"]
    assert len(wrong) == 11 and (wrong.label != wrong.sku).all() and wrong.label.isin(list(CATALOGUE)).all()
    assert (wrong.label == wrong.sku.map(find_twin)).mean() > .3
    assert (truth[truth.kind.isin(["clean", "near_duplicate"])].eval("label == sku")).all()


def test_the_task_is_neither_trivial_nor_hopeless(warehouse):
    "The nearest mean image is right more often than chance, and far from always."
    folder, truth = warehouse
    clean = truth[truth.kind == "clean"]
    pixels = np.stack([np.asarray(Image.open(folder/file).resize((16, 16), Image.Resampling.BOX), np.float32).ravel() for file in clean.file])
    labels, learn = clean.sku.to_numpy(), np.arange(len(clean)) % 3 > 0
    names = sorted(set(labels))
    means = np.stack([pixels[learn & (labels == name)].mean(0) for name in names])
    found = np.array(names)[((pixels[~learn][:, None] - means)**2).sum(2).argmin(1)]
    assert 2/12 < (found == labels[~learn]).mean() < .8


def test_night_is_dark_warm_blurred_and_one_camera(traffic):
    folder, truth = traffic
    assert truth.label.eq("").all() and truth.of.eq("").all() and truth.file.tolist() == sorted(truth.file)
    assert truth.kind.tolist() == ["day"]*24 + ["night"]*24, "in the order of their names"
    assert truth[truth.kind == "night"].camera.nunique() == 1 and truth[truth.kind == "day"].camera.nunique() == 3
    images = [decode_image((folder/file).read_bytes()) for file in truth.file]
    table = pd.DataFrame([measure_image(image) for image in images]).assign(kind=truth.kind)
    table["warmth"] = [(lambda m: m[0]/m[2])(np.asarray(image).mean((0, 1))) for image in images]
    day, night = (table[table.kind == kind].mean(numeric_only=True) for kind in ("day", "night"))
    assert night.brightness < .75*day.brightness and night.warmth > 1.3*day.warmth
    assert truth[truth.kind == "night"].blur.min() > 1


@pytest.mark.parametrize("spec, word", [
    (WarehouseSpec(count=0), "count"), (WarehouseSpec(skus=1), "skus"), (WarehouseSpec(skus=99), "skus"), (WarehouseSpec(cameras=0), "cameras"),
    (WarehouseSpec(wrong=-.1), "wrong"), (WarehouseSpec(exact=.5, near=.5), "exact"), (WarehouseSpec(seed=-1), "seed"),
    (TrafficSpec(night=1.5), "night"), (TrafficSpec(count=200_000), "count"),
])
def test_a_bad_spec_is_refused(tmp_path, spec, word):
    with pytest.raises(WrongUsage, match=word): (make_traffic if isinstance(spec, TrafficSpec) else make_warehouse)(tmp_path/"new", spec)
    assert not (tmp_path/"new").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path/"mine.jpg").write_bytes(b"mine")
    with pytest.raises(WrongUsage, match="not empty"): make_warehouse(tmp_path, WarehouseSpec(count=4))
    assert [f.name for f in tmp_path.iterdir()] == ["mine.jpg"]


@pytest.mark.parametrize("spec", [WarehouseSpec(count=1), WarehouseSpec(count=7, skus=2, cameras=1), WarehouseSpec(count=20, exact=0., near=0., wrong=0., broken=0.),
                                  WarehouseSpec(count=10, exact=.4, near=.35), WarehouseSpec(count=3, exact=.2, near=.2, wrong=.2, broken=.2),
                                  WarehouseSpec(count=1, exact=.8, near=0., wrong=0., broken=0.)])
def test_small_and_lopsided_warehouses(tmp_path, spec):
    truth = make_warehouse(tmp_path/"new", spec)
    assert len(truth) == spec.count and truth.sku.nunique() <= spec.skus


def test_a_source_names_fields():
    assert parse_source("synth:count=40,seed=3,wrong=0.1") == WarehouseSpec(count=40, seed=3, wrong=.1)
    with pytest.raises(UnknownName): parse_source("synth:cuont=40")


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_a_product_is_a_clean_cut_out(name):
    sku = CATALOGUE[name]
    assert sku.shape in SHAPES and sku.brand in LAYOUTS and sku.emblem in EMBLEMS and find_twin(find_twin(name)) == name
    for yaw in (YAWS[0], YAWS[2]):
        views = [draw_product(name, yaw, light) for light in LIGHTS]
        assert views[0].mode == "RGBA" and views[0].size == views[1].size and abs(views[0].height - TALL) < .2*TALL
        alpha = np.asarray(views[0].getchannel("A"))
        assert .5 < (alpha > 128).mean() <= 1 and (alpha[-6:] > 128).any(), "it stands on the lowest rows"
        assert views[0].tobytes() != views[1].tobytes()


def test_the_code_that_draws_has_a_hash():
    assert len(hash_drawing()) == 64
