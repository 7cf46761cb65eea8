"Duplicates, quality, splits and the curate stage: on real photographs, on planted faults, on data too small to split."
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput, WrongUsage
from cvops_wb.core.records import SAMPLE_COLUMNS
from cvops_wb.data.curation import (
    CurateSpec,
    add_tags,
    count_splits,
    curate,
    draw_duplicates,
    draw_quality,
    draw_splits,
    group_samples,
    has_tag,
    split_samples,
)
from cvops_wb.data.duplicates import find_pairs, pick_representatives
from cvops_wb.data.images import inspect_image
from cvops_wb.data.intake import IngestSpec, ingest
from cvops_wb.data.near.candidates import find_candidates, join_groups
from cvops_wb.data.near.checks import NEAR, SCENE
from cvops_wb.data.quality import QUALITY, flag_quality, measure_oddness
from cvops_wb.data.splits import find_leaks, has_split, link_bursts, split_given, split_grouped
from cvops_wb.data.store import read_samples


def make_table(count: int, **columns) -> pd.DataFrame:
    "A sample table of which these columns matter."
    blank = {"str": "", "int": 100, "float": .9, "list": ()}
    rows = {name: [blank[kind]]*count for name, kind in SAMPLE_COLUMNS.items()}
    ids = [f"{k:016x}" for k in range(count)]
    labels = ["tea", "milk"]*(count//2) + ["tea"]*(count % 2)
    return pd.DataFrame({**rows, "id": ids, "group": ids, "label": labels, "sources": [["a.jpg"]]*count, "tags": [[]]*count, **columns})


def room(settings, run: str):
    "The folder of a run."
    path = settings.reports/run
    path.mkdir(parents=True, exist_ok=True)
    return path


def save(image: Image.Image, quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


CHANGES = {
    "saved again": lambda image: save(image, 60),
    "half the size": lambda image: save(image.resize((image.width//2, image.height//2))),
    "brighter": lambda image: save(image.point(lambda v: min(round(v*1.2), 255))),
    "darker": lambda image: save(image.point(lambda v: round(v*.75))),
    "trimmed": lambda image: save(image.crop((4, 5, image.width - 6, image.height - 4))),
    "as PNG": lambda image: _png(image),
}


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_near_duplicates_of_real_photographs(grocery):
    "Every change of 72 photographs is found with its original, and nothing else."
    paths = sorted((grocery/"train").rglob("*.jpg"))[::37][:72]
    files, truth = [path.read_bytes() for path in paths], []
    for k, path in enumerate(paths):
        files.append(list(CHANGES.values())[k % len(CHANGES)](Image.open(path).convert("RGB")))
        truth.append((k, len(files) - 1))
    table = pd.DataFrame([vars(inspect_image(data)) for data in files])
    pairs = find_pairs(table, files.__getitem__, likeness=NEAR)
    found = set(zip(pairs.a, pairs.b, strict=True))
    assert len(found & set(truth)) >= .98*len(truth) and found <= set(truth)


@pytest.mark.parametrize("count", [0, 1, 2, 700])
def test_candidates_are_all_pairs(count):
    "Blocks or not: the same pairs as one comparison of all with all."
    rng = np.random.default_rng(count)
    hashes = [f"{h:016x}" for h in rng.integers(0, 2**63, count, dtype=np.uint64)]
    hashes += [f"{int(h, 16) ^ 0b101:016x}" for h in hashes[:count//3]]
    got = {(a, b): d for a, b, d in find_candidates(hashes, 4, block=64).tolist()}
    bits = [[(int(a, 16) ^ int(b, 16)).bit_count() for b in hashes] for a in hashes] if count < 10 else None
    want = {(k, count + k): 2 for k in range(count//3)}
    if bits: want |= {(a, b): bits[a][b] for a in range(len(hashes)) for b in range(a + 1, len(hashes)) if bits[a][b] <= 4}
    assert got == want


@pytest.mark.parametrize("links, want", [
    ([], [0, 1, 2, 3, 4]), ([(0, 1), (1, 2)], [0, 0, 0, 3, 4]), ([(4, 3), (3, 4)], [0, 1, 2, 3, 3]), ([(3, 4), (2, 3), (0, 4)], [0, 1, 0, 0, 0]),
])
def test_groups(links, want): assert join_groups(5, links).tolist() == want


@pytest.mark.parametrize("rows, best", [
    ([{"width": 10}, {"width": 20}, {"width": 15}], 1),                     # the largest
    ([{"width": 10}, {"width": 20, "label": ""}], 0),                       # a label counts more
    ([{"bytes": 5}, {"bytes": 9}], 1),                                      # less compressed
    ([{"id": "b"}, {"id": "a"}], 1),                                        # no tie
])
def test_the_representative(rows, best):
    table = pd.DataFrame([{"width": 10, "height": 10, "bytes": 1, "label": "tea", "id": str(k), **row} for k, row in enumerate(rows)])
    assert pick_representatives(table, np.zeros(len(rows), int)).tolist() == [k == best for k in range(len(rows))]


@pytest.mark.parametrize("change, flag", [
    ({"brightness": .02}, "dark"), ({"brightness": .97}, "bright"), ({"entropy": .1, "contrast": .05}, "blank"), ({"contrast": .01}, "blank"),
    ({"entropy": .15, "contrast": .9}, None),
    ({"sharpness": .005}, "blurred"), ({"width": 20, "height": 20}, "odd_size"), ({"width": 4000, "height": 3000}, "odd_size"),
    ({"width": 900, "height": 150}, "odd_shape"), ({}, None), ({"bytes": 3_000_000}, "heavy"), ({"bytes": 3_000_000, "ext": ".png"}, None),
])
@pytest.mark.parametrize("noise", [0., 1.])
def test_quality_flags(change, flag, noise):
    "Each fault bears its flag and no other, in a batch that varies and in one that does not."
    rng = np.random.default_rng(0)
    light, detail = .45 + noise*rng.normal(0, .06, 300), .3*np.exp(noise*rng.normal(0, .25, 300))
    batch = pd.DataFrame({"brightness": light, "contrast": .4, "sharpness": detail, "entropy": .93, "width": 480, "height": 360, "bytes": 60_000, "ext": ".jpg"})
    batch = pd.concat([batch, pd.DataFrame([{**batch.median(numeric_only=True), "ext": ".jpg", **change}])], ignore_index=True)
    flags, oddness = flag_quality(batch), measure_oddness(batch)
    assert flags.iloc[-1][flags.iloc[-1]].index.tolist() == [flag]*(flag is not None) and not flags.iloc[:-1].to_numpy().any()
    if flag and flag not in ("odd_shape", "heavy"): assert oddness.iloc[-1] > 3 and oddness.rank().iloc[-1] > .97*len(batch)
    assert set(flags) == set(QUALITY)


def grow(seed):
    "A table of scenes, and the orders in which its images come."
    rng = np.random.default_rng(seed)
    table = make_table(900, label=rng.choice(["tea", "milk", "rice", "salt"], 900, p=[.5, .3, .15, .05]))
    table["group"] = table["id"].where(rng.random(900) < .6).ffill().fillna(table["id"][0])
    table["label"] = table.groupby("group")["label"].transform("first")
    return table, rng.permutation(900)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_is_stable_when_data_are_added(seed):
    "Images come in no order, scenes are joined late: none changes its side, and each class keeps its shares."
    (table, order), known = grow(seed), {}
    for count in (60, 200, 201, 500, 900):
        part = table.loc[np.sort(order[:count])]
        split = split_grouped(part, seed=seed, before=known)
        assert all(split[part.id == id].iloc[0] == side for id, side in known.items())
        assert (split[split != "none"].groupby(part.group).nunique() == 1).all(), "a scene stays on one side"
        known = {id: side for id, side in zip(part.id, split, strict=True) if side != "none"}
    shares = pd.crosstab(table.label, split, normalize="index")
    assert (abs(shares[["val", "test"]] - .15) < .05).all(axis=None) and "none" not in set(split)
    forgot = split_grouped(table, seed=seed)
    assert (forgot != split).any(), "without its memory it would have moved some"


def test_what_joins_two_sides_stands_on_neither():
    table = make_table(40)
    split = split_grouped(table)
    train, test = (table.id[split == side].iloc[0] for side in ("train", "test"))
    new = pd.concat([table, table[:1].assign(id="f"*16)], ignore_index=True)
    new.loc[new.id.isin([train, test, "f"*16]), "group"] = "joined"
    grown = split_grouped(new, before=dict(zip(table.id, split, strict=True)))
    assert (grown[:40] == split).all() and grown[40] == "none"
    done, _ = split_samples(new.assign(tags=[[] for _ in range(41)]), CurateSpec(), dict(zip(table.id, split, strict=True)))
    assert done.split[40] == "none" and done.tags[40] == ["between"] and has_tag(done, "leak").sum() == 1


def test_an_old_sample_stays_the_representative():
    "A larger copy that comes later does not take its place."
    table = make_table(40)
    pairs = pd.DataFrame({"a": [0], "b": [2], "distance": 2, "likeness": [.99]})
    first = table.id[0]
    table.loc[2, "bytes"] = table.loc[0, "bytes"] + 1000
    assert has_tag(group_samples(table, pairs, CurateSpec()), "near_duplicate").tolist().index(True) == 0
    old = group_samples(table, pairs, CurateSpec(), {first: "test"})
    assert not has_tag(old, "near_duplicate")[0]


@pytest.mark.parametrize("labels, train, val", [
    (["tea"]*3 + ["milk"]*3, 2, 1), (["tea"]*2 + ["milk"]*2, 2, 1), (["tea"]*40 + ["milk"], 2, 1), (["tea"]*2 + ["milk"], 2, 1),
    ([*"abcdefgh"] + ["a"], 8, 1),
])
@pytest.mark.parametrize("seed", range(5))
def test_small_data_can_be_trained_on(labels, train, val, seed):
    "Every class has a training image, and something is held out."
    table = make_table(len(labels), label=labels)
    split = split_grouped(table, seed=seed)
    assert set(table.label[split == "train"]) == set(labels) and (split == "train").sum() >= train and (split == "val").sum() >= val


@pytest.mark.parametrize("change, error, says", [
    ({"label": ["tea"]*6}, BadInput, "only one class"), ({"label": [""]*6, "group": ["x"]*6}, BadInput, "too few images"),
    ({"label": list("abcdef")}, BadInput, "too few images"), ({"group": ["x"]*6}, BadInput, "too few images"),
])
def test_what_cannot_be_split(change, error, says):
    with pytest.raises(error, match=says): split_grouped(make_table(6, **change))


@pytest.mark.parametrize("shares", [(.5, .5), (-.1, .2), (1., 0.)])
def test_shares_that_leave_nothing(shares):
    with pytest.raises(WrongUsage, match="leave nothing"): split_grouped(make_table(20), *shares)


@pytest.mark.parametrize("given, want", [
    (["train"]*8 + ["val"]*2, {"train": 8, "val": 2}), (["train"]*6 + ["val"]*2 + ["test"]*2, {"train": 6, "val": 2, "test": 2}),
    (["train"]*6 + [""]*2 + ["val"]*2, {"train": 8, "val": 2}),
])
def test_a_given_split_is_kept(given, want):
    table = make_table(10, given_split=given)
    assert has_split(table) and split_given(table).value_counts().to_dict() == want


def test_a_given_split_without_val():
    "Some of `train` is held out, and `test` stays what it was."
    table = make_table(200, given_split=["train"]*160 + ["test"]*40)
    split = split_given(table)
    assert (split[160:] == "test").all() and 10 <= (split[:160] == "val").sum() <= 40


@pytest.mark.parametrize("given, says", [([""]*10, "no split of its own"), (["val"]*10, "nothing to train on")])
def test_a_given_split_that_is_none(given, says):
    with pytest.raises(BadInput, match=says): split_given(make_table(10, given_split=given))


def test_leaks_are_marked_on_the_side_that_is_held_out():
    table = make_table(10, given_split=["train"]*6 + ["val"]*4, group=["x", *"abcde", "x", *"fgh"])
    assert np.flatnonzero(find_leaks(table.assign(split=split_given(table)))).tolist() == [6]


@pytest.mark.parametrize("stuck", [False, True])
def test_bursts(stuck):
    taken = ["2026-03-02T07:00:00"]*50 if stuck else [f"2026-03-02T07:{k//2:02}:{k % 2*20:02}" for k in range(50)]
    links = list(link_bursts(make_table(50, camera=["Heron"]*50, taken=taken)))
    assert links == ([] if stuck else [(k, k + 1) for k in range(0, 50, 2)])


@pytest.mark.parametrize("keep, strategy, given, aside", [
    (False, "auto", "", 1), (True, "auto", "", 0), (False, "auto", "train", 0), (False, "grouped", "train", 1),
])
def test_near_duplicates_are_set_aside_where_we_split(keep, strategy, given, aside):
    table = make_table(40, given_split=[given]*30 + [given and "val"]*10)
    pairs = pd.DataFrame({"a": [0, 4], "b": [2, 6], "distance": 2, "likeness": [.99, .8]})
    done, _ = split_samples(group_samples(table, pairs, CurateSpec()), CurateSpec(strategy=strategy, keep_duplicates=keep))
    assert (done.split == "none").sum() == aside and has_tag(done, "near_duplicate").sum() == 1 and done.group.nunique() == 38


def test_conflicts_and_what_has_no_label_are_set_aside():
    pairs = pd.DataFrame({"a": [0], "b": [1], "distance": [0], "likeness": [.99]})     # tea and milk
    table = make_table(40).assign(label=lambda t: t.label.where(t.id != t.id[7], ""))
    table = add_tags(table, label_conflict=[k == 9 for k in range(40)], blank=[k == 11 for k in range(40)])
    done, _ = split_samples(group_samples(table, pairs, CurateSpec()), CurateSpec())
    assert np.flatnonzero(done.split == "none").tolist() == [0, 1, 7, 9, 11] and "unlabelled" in done.tags[7]


def test_a_class_with_one_image_is_trained_on():
    table, pairs = make_table(41, label=["tea", "milk"]*20 + ["salt"]), pd.DataFrame(columns=["a", "b", "distance", "likeness"])
    done, _ = split_samples(group_samples(table, pairs, CurateSpec()), CurateSpec())
    assert done.tags[40] == ["singleton"] and done.split[40] == "train"


@pytest.mark.parametrize("spec", [CurateSpec(strategy="random"), CurateSpec(scene=.99), CurateSpec(val=.6, test=.5)])
def test_a_spec_without_sense(spec, workbench, photos):
    batch = ingest(str(photos), IngestSpec(), room(workbench, "ingest"))
    with pytest.raises(WrongUsage): curate(batch, spec, room(workbench, "curate"))
    assert not list((workbench.reports/"curate").iterdir())


def test_the_stage(workbench, photos):
    batch = ingest(str(photos), IngestSpec(), room(workbench, "ingest-1"))
    selection = curate(batch, CurateSpec(), room(workbench, "curate-1"))
    table = read_samples(selection.samples)
    assert selection.batch == "ingest-1" and selection.samples == "reports/curate-1/samples.parquet" and selection.strategy == "grouped"
    assert selection.count + selection.set_aside == batch.count == len(table)
    assert sum(selection.splits.values()) == selection.count == sum(selection.classes.values())
    assert curate(batch, CurateSpec(), room(workbench, "curate-2")).table_sha256 == selection.table_sha256
    assert curate(batch, CurateSpec(seed=1), room(workbench, "curate-3")).splits != {} and count_splits(table).to_numpy().sum() == batch.count
    written = {p.name for p in (workbench.reports/"curate-1").iterdir()}
    assert written == {"samples.parquet", "pairs.parquet", "splits.png", "duplicates.png", "quality.png"}
    for picture in (draw_splits(selection), draw_duplicates(selection), draw_quality(selection)): assert picture is not None
    json.dumps(selection.to_dict())


@pytest.mark.parametrize("classes, says", [(["tea"], "only one class")])
def test_folders_that_cannot_be_curated(classes, says, workbench, photos, tmp_path):
    source = tmp_path/"source"
    for label in classes:
        (source/label).mkdir(parents=True, exist_ok=True)
        for path in sorted((photos/"lime").glob("*.jpg")): (source/label/path.name).write_bytes(path.read_bytes())
    batch = ingest(str(source), IngestSpec(), room(workbench, "ingest"))
    with pytest.raises(BadInput, match=says): curate(batch, CurateSpec(), room(workbench, "curate"))
    assert not list((workbench.reports/"curate").iterdir())


@pytest.mark.slow
def test_planted_faults_are_found(workbench):
    "The synthetic warehouse knows its truth: every copy is found, and nothing that is none."
    from cvops_wb.data.formats.synth import prepare_warehouse
    batch = ingest("synth:count=120,near=.15", IngestSpec(), room(workbench, "ingest"))
    table = read_samples(curate(batch, CurateSpec(), room(workbench, "curate")).samples)
    truth = pd.read_csv(prepare_warehouse("synth:count=120,near=.15")/"truth.csv").fillna("").set_index("file")
    found = {name: row for row in table.itertuples() for name in row.sources}
    pairs = {frozenset((row.of, name)) for name, row in truth.iterrows() if row.kind == "near_duplicate"}
    joined = pd.Series({name: row.group for name, row in found.items()})
    assert all(joined[list(pair)].nunique() == 1 for pair in pairs)
    assert has_tag(table, "near_duplicate").sum() == len(pairs) and (table.split[has_tag(table, "near_duplicate")] == "none").all()
    assert all("exact_duplicate" in found[name].tags for name in truth.index[truth.kind == "exact_duplicate"])
    assert not set(found) & set(truth.index[truth.kind == "broken"])


@pytest.mark.slow
def test_the_grocery_photographs(workbench, grocery):
    "The published split does not leak as far as perceptual hashes see: 65 pairs of one scene, none of them across it."
    batch = ingest(str(grocery), IngestSpec(label="coarse"), room(workbench, "ingest"))
    selection = curate(batch, CurateSpec(), room(workbench, "curate"))
    table, pairs = read_samples(selection.samples).set_index("id"), pd.read_parquet(workbench.reports/"curate"/"pairs.parquet")
    assert selection.strategy == "given" and selection.splits == {"train": 2640, "val": 296} and "leak" not in selection.tags
    assert 50 < len(pairs) < 90 and (pairs.likeness >= SCENE).all()
    assert (table.label[pairs.a].to_numpy() == table.label[pairs.b].to_numpy()).all()
    assert (table.split[pairs.a].to_numpy() == table.split[pairs.b].to_numpy()).all()
    grouped = curate(batch, CurateSpec(strategy="grouped"), room(workbench, "grouped"))
    assert set(grouped.splits) == {"train", "val", "test"} and grouped.set_aside == grouped.tags["near_duplicate"]


@pytest.mark.parametrize("boards, photographs", [(5, 95), (50, 50), (95, 5), (30, 0)])
def test_no_board_is_blank_in_any_company(boards, photographs, grocery):
    "Binarised boards beside photographs: `blank` is said of what is blank, and the batch has no say in it."
    from PIL import Image

    from cvops_wb.data import inspect_image
    paths = [*sorted((grocery.parent/"deeppcb"/"images").glob("*"))[:boards], *sorted((grocery/"train").rglob("*.jpg"))[::13][:photographs]]
    if not boards or not paths[0].exists(): pytest.skip("the boards are not beside this project")
    def read(image):
        out = io.BytesIO()
        image.save(out, "PNG")
        return out.getvalue()
    noise = np.random.default_rng(0).normal(0, 3, (240, 320)).round()
    empty = [Image.new("RGB", (320, 240), colour) for colour in ("black", "white", (90, 120, 60))] + [Image.fromarray((noise + level).clip(0, 255).astype(np.uint8)) for level in (6, 250)]
    facts = [vars(inspect_image(data)) for data in [*(path.read_bytes() for path in paths), *map(read, empty)]]
    assert flag_quality(pd.DataFrame(facts))["blank"].tolist() == [False]*len(paths) + [True]*len(empty)


def test_a_faint_board_is_no_blank_and_a_speck_is_no_drawing(grocery, workbench, tmp_path):
    "Real boards with a sixteenth of their contrast: their numbers are those of a blank image, their small pictures are not. A plate with a speck or the time on it stays blank."
    from PIL import Image, ImageDraw
    paths = sorted((grocery.parent/"deeppcb"/"images").glob("*"))[:60:5]
    if not paths: pytest.skip("the boards are not beside this project")
    source = tmp_path/"plates"
    for kind in ("board", "plate", "shelf"): (source/kind).mkdir(parents=True)
    for k, path in enumerate(sorted((grocery/"train").rglob("*.jpg"))[:200:40]): (source/"shelf"/f"{k}.jpg").write_bytes(path.read_bytes())
    for k, path in enumerate(paths):
        board = Image.open(path).convert("L").resize((320, 320))
        board.point(lambda v, k=k: 100 + 4*k + v//16).save(source/"board"/f"{k:02}.png")
        plate = Image.new("L", (320, 320), 100 + 4*k)
        pen = ImageDraw.Draw(plate)
        pen.text((8, 8), f"12:{k:02}:07", fill=140) if k % 2 else pen.ellipse((30 + 9*k, 160, 40 + 9*k, 170), fill=20)
        plate.save(source/"plate"/f"{k:02}.png")
    batch = ingest(str(source), IngestSpec(), room(workbench, "ingest"))
    before = read_samples(batch.samples)
    numbers = flag_quality(before)["blank"].groupby(before.label).mean()
    assert numbers["board"] > .5 and numbers["plate"] == 1      # by the numbers alone
    table = read_samples(curate(batch, CurateSpec(min_images=0), room(workbench, "curate")).samples)
    assert has_tag(table, "blank").groupby(table.label).mean().to_dict() == {"board": 0, "plate": 1, "shelf": 0}


def draw_station(place, seed, light, scratched, seen=7):
    "What a camera sees that never moves: the same things each time, another part, another light, and now and then a scratch."
    from PIL import Image, ImageDraw
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(seen)
    image = Image.new("RGB", (160, 120), (120, 122, 118))
    pen = ImageDraw.Draw(image)
    for _ in range(9):
        x, y, side = *fixed.integers(5, 140, 2), int(fixed.integers(10, 26))
        pen.ellipse([x, y, x + side, y + side], fill=tuple(int(v) for v in fixed.integers(60, 220, 3)))
    pen.rectangle([60, 50, 104, 92], fill=(186, 150, 90))
    if scratched: pen.line([*rng.integers(62, 90, 2), *rng.integers(62, 90, 2)], fill=(30, 20, 15), width=3)
    slope = np.linspace(-1, 1, 160)[None, :, None]*rng.uniform(-60, 60)*light
    pixels = np.asarray(image, np.float32)*(1 + light*rng.uniform(-1, 1)) + slope + rng.normal(0, 2, (120, 160, 3))
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place, quality=90)


@pytest.mark.parametrize("light, labels", [(.25, ("", "")), (0., ("good", "good")), (.25, ("good", "scratch"))])
def test_a_fixed_camera_is_no_heap_of_duplicates(light, labels, workbench, tmp_path):
    "Forty pictures of one station, most of them alike but for the light: each is a picture of its own, and something can be held out."
    source = tmp_path/"station"
    for k in range(40): draw_station(source/labels[k % 5 == 0]/f"{k:02}.jpg", k, light, labels[1] == "scratch" and k % 5 == 0)
    selection = curate(ingest(str(source), IngestSpec(), room(workbench, "ingest")), CurateSpec(), room(workbench, "curate"))
    table = read_samples(selection.samples)
    assert selection.splits["train"] >= 24 and min(selection.splits["val"], selection.splits["test"]) >= 4
    assert selection.groups >= 36 and table["group"].value_counts().max() <= 4
