"Synthetic images: the same seed, the same bytes; the truth is where it is said; the mark outlives export and intake; they never judge."
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from cvops_wb.core.errors import BadInput, UnknownName, WrongUsage
from cvops_wb.data import (
    CurateSpec,
    IngestSpec,
    SnapshotSpec,
    SynthSpec,
    curate,
    export_samples,
    ingest,
    is_synthetic,
    make_synthetic,
    open_snapshot,
    read_samples,
    take_snapshot,
)
from cvops_wb.data.planting import Stock, encode_marked, imagine, place_synthetic


def write_boards(root, count: int = 24) -> None:
    "Boards with a scar each, as COCO with a split."
    rng = np.random.default_rng(0)
    for side, numbers in (("train", range(count*2//3)), ("test", range(count*2//3, count))):
        images, boxes = [], []
        for k in numbers:
            x, y = (int(v) for v in rng.integers(10, 80, 2))
            board = Image.fromarray(np.kron(rng.integers(60, 220, (6, 6, 3)), np.ones((20, 20, 1))).astype(np.uint8))
            ImageDraw.Draw(board).rectangle((x, y, x + 13, y + 9), fill=(10, 10, 10))
            (root/"images"/side).mkdir(parents=True, exist_ok=True)
            board.save(root/"images"/side/f"{k:03}.png")
            images.append({"id": k, "file_name": f"{k:03}.png", "width": 120, "height": 120})
            boxes.append({"id": k, "image_id": k, "category_id": 1, "bbox": [x, y, 14, 10], "area": 140, "iscrowd": 0})
        (root/"annotations").mkdir(exist_ok=True)
        (root/"annotations"/f"instances_{side}.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "scar"}]}))


def run(settings, source, name: str, **given):
    "Intake, curation, snapshot."
    for stage in ("ingest", "curate", "snapshot"): (settings.reports/f"{stage}-{name}").mkdir(parents=True)
    batch = ingest(str(source), IngestSpec(), settings.reports/f"ingest-{name}")
    selection = curate(batch, CurateSpec(**given), settings.reports/f"curate-{name}")
    return selection, take_snapshot(selection, SnapshotSpec(push=False), settings.reports/f"snapshot-{name}")


def test_made_images_train_and_never_judge(workbench, tmp_path):
    write_boards(tmp_path/"boards")
    _, snapshot = run(workbench, tmp_path/"boards", "0000000000", strategy="given")
    done = make_synthetic(snapshot, SynthSpec("paste", 12), tmp_path/"more")
    assert (done["made"], done["own"], done["format"]) == (12, 24, "coco") and len(pd.read_csv(tmp_path/"more"/"truth.csv")) == 12
    for name, strategy in (("1111111111", "given"), ("2222222222", "grouped")):
        selection, again = run(workbench, tmp_path/"more", name, strategy=strategy)
        table = read_samples(selection.samples)
        made = is_synthetic(table)
        assert made.sum() == 12 == selection.tags["synthetic"] and set(table["split"][made]) <= {"train", "none"} and (table["split"][made] == "train").any()
        assert (table["split"][~made] == "test").any()
    export_samples(again, tmp_path/"out", "coco")      # to another workbench, by files alone
    back = read_samples(ingest(str(tmp_path/"out"), IngestSpec(), _make(workbench.reports/"ingest-3333333333")).samples)
    assert is_synthetic(back).sum() == (open_snapshot(again).table.query("split != 'none'")["camera"].str.startswith("synthetic")).sum() > 0


def _make(folder):
    folder.mkdir(parents=True)
    return folder


def test_nothing_that_is_held_out_is_pasted(workbench, tmp_path):
    write_boards(tmp_path/"boards")
    _, snapshot = run(workbench, tmp_path/"boards", "0000000000", strategy="given")
    make_synthetic(snapshot, SynthSpec("paste", 20, alone=True), tmp_path/"more")
    used = set("|".join(pd.read_csv(tmp_path/"more"/"truth.csv")["of"]).split("|"))
    sides = open_snapshot(snapshot).table.set_index("id")["split"]
    assert used and {sides[name] for name in used} == {"train"}
    with pytest.raises(BadInput, match="something in the folder"): make_synthetic(snapshot, SynthSpec("paste", 2, alone=True), tmp_path/"more")
    with pytest.raises(BadInput, match="all images were made"): run(workbench, tmp_path/"more", "4444444444")


@pytest.mark.parametrize("held, want", [("test", "none"), ("val", "none"), ("train", "train"), ("none", "train")])
def test_a_copy_of_what_is_held_out_is_set_aside(held, want):
    table = pd.DataFrame({"camera": ["Phone", "synthetic: spoil"], "group": "a", "split": [held, "test"]})
    assert place_synthetic(table).tolist() == [held, want]


@pytest.mark.parametrize("kind", ["paste", "spoil", "scenes"])
def test_the_same_seed_makes_the_same(kind):
    rng = np.random.default_rng(0)
    plates = {name: rng.integers(0, 255, (90, 110, 3)).astype(np.uint8) for name in "abc"}
    stock = Stock(pd.DataFrame({"id": [*"abc"], "label": "", "objects": ['[{"box": [30, 40, 14, 10], "label": "scar"}]', "[]", "[]"]}), plates.__getitem__)
    first, second, other = ([encode_marked(m.pixels, kind) for m in imagine(SynthSpec(kind, 4, seed), stock)] for seed in (1, 1, 2))
    assert first == second != other and Image.open(io.BytesIO(first[0])).getexif()[0x110] == f"synthetic: {kind}"
    for made in imagine(SynthSpec(kind, 6), stock):
        height, width = made.pixels.shape[:2]
        for x, y, w, h in (each["box"] for each in json.loads(made.objects)): assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height


def test_what_cannot_be_made():
    empty = Stock(pd.DataFrame({"id": [], "label": [], "objects": []}), lambda id: None)
    with pytest.raises(BadInput, match="no photograph"): next(imagine(SynthSpec("spoil"), empty))
    with pytest.raises(UnknownName): next(imagine(SynthSpec("dream"), empty))
    with pytest.raises(WrongUsage): next(imagine(SynthSpec("spoil", 0), empty))
    labelled = Stock(pd.DataFrame({"id": ["a"], "label": ["x"], "objects": [""]}), lambda id: np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(BadInput, match="has objects"): next(imagine(SynthSpec("paste"), labelled))
