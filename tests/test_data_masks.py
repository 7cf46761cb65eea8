"Images and pictures of their classes: every way that people lay and write them, each as files on a disk."
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_data_formats import picture, take

from cvops_wb.data import draw_objects
from cvops_wb.data.formats import find_format
from cvops_wb.data.formats.exporting import list_exported, write_export
from cvops_wb.data.formats.objects import parse_objects
from cvops_wb.data.intake import fingerprint_source
from cvops_wb.data.store import Store
from cvops_wb.learn.tasks import choose_task
from cvops_wb.learn.tasks.segmentation import read_mask

VALUES = np.zeros((48, 64), np.uint8)
VALUES[10:30, 5:25], VALUES[20:40, 40:60] = 1, 2
COLOURS = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255]], np.uint8)
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


def lay(root, masks, photo="images/{}.jpg", mask="masks/{}.png", **files):
    "Photographs of noise, and a mask (pixels or an image) for each."
    for k, pixels in enumerate(masks):
        (root/photo.format(k)).parent.mkdir(parents=True, exist_ok=True)
        (root/photo.format(k)).write_bytes(picture(k))
        if pixels is None: continue
        (root/mask.format(k)).parent.mkdir(parents=True, exist_ok=True)
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(root/mask.format(k))
    for name, text in files.items(): (root/name.replace("_csv", ".csv").replace("_txt", ".txt")).write_text(text)
    return root


def read(root):
    name, reader = find_format(str(root))
    assert name == "masks"
    return reader.read(str(root))


def draw(item, names): return draw_objects(parse_objects(item.objects), {name: k for k, name in enumerate(names, 1)}, (64, 48), (64, 48))


def with_palette():
    image = Image.fromarray(VALUES, "P")
    image.putpalette(PALETTE)
    return image


BINARY, DISC = VALUES*0, (np.hypot(*np.mgrid[-24:24, -32:32]) < 14)
BINARY[VALUES == 1] = 255
WAYS = {    # how masks are written → a mask, files beside, its classes, what it says
    "grey values": (VALUES, {}, ["1", "2"], "a value for each class"),
    "grey values, named": (VALUES, {"classes_txt": "background\ntea\nmilk\n"}, ["tea", "milk"], "named by classes.txt"),
    "named without the background": (VALUES, {"labels_txt": "tea\nmilk\n"}, ["tea", "milk"], "named by labels.txt"),
    "named by number": (VALUES, {"_classes_csv": "Pixel Value, Class\n0, background\n1, tea\n2, milk\n"}, ["tea", "milk"], "named by _classes.csv"),
    "a palette": (with_palette(), {"classes_txt": "background\ntea\nmilk\n"}, ["tea", "milk"], "a value for each class"),
    "a palette that is the legend": (with_palette(), {"labelmap_txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\nmilk:0,128,0::\ntea:128,0,0::\n"}, ["tea", "milk"], "a colour for each class"),
    "colours, named": (COLOURS[VALUES], {"class_dict_csv": "name,r,g,b\nbackground,0,0,0\nmilk,51,221,255\ntea,250,50,83\n"}, ["tea", "milk"], "named by class_dict.csv"),
    "colours": (COLOURS[VALUES], {}, ["#fa3253", "#33ddff"], "a colour for each class"),
    "grey values and a legend of colours": (VALUES, {"class_dict_csv": "name,r,g,b\nvoid,0,0,0\ntea,250,50,83\nmilk,51,221,255\n"}, ["tea", "milk"], "a value for each class"),
    "255 for what nobody knows": (np.where(DISC & (VALUES == 0), 255, VALUES).astype(np.uint8), {}, ["1", "2"], "255 read as background"),
    "sixteen bits": (VALUES.astype(np.uint16)*300, {}, ["300", "600"], "a value for each class"),
    "with opacity": (np.dstack([COLOURS[VALUES], np.full((48, 64), 255, np.uint8)]), {}, ["#fa3253", "#33ddff"], "a colour for each class"),
}
BLACK_AND_WHITE = {"0 and 255": BINARY, "0 and 1": BINARY//255, "one bit": Image.fromarray(BINARY).convert("1"), "as colours": np.dstack([BINARY]*3), "in the opacity": np.dstack([BINARY*0]*3 + [BINARY])}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_classes(tmp_path, way):
    mask, files, names, says = WAYS[way]
    listing = read(lay(tmp_path, [mask, mask], **files))
    assert all((draw(item, names) == VALUES).all() and not item.problem for item in listing.items)
    assert says in listing.notes[0] and all(name in listing.notes[0] for name in names) and "2 masks for 2 images" in listing.notes[0]
    assert listing.skipped == {}


@pytest.mark.parametrize("way", BLACK_AND_WHITE)
def test_black_and_white(tmp_path, way):
    listing = read(lay(tmp_path, [BLACK_AND_WHITE[way], Image.fromarray(BINARY*0), None]))
    thing, empty, bare = listing.items
    assert (draw(thing, ["foreground"]) == BINARY//255).all() and (empty.objects, bare.objects) == ("[]", "")     # looked at and empty; not looked at
    assert "black and white: foreground" in listing.notes[0] and listing.notes[1] == "1 of the images has no mask"
    (tmp_path/"classes.txt").write_text("background\ntumour\n")
    assert read(tmp_path).items[0].label == "tumour"


def test_a_scaled_and_a_lossy_mask_are_black_and_white_again(tmp_path):
    large = Image.fromarray((DISC*255).astype(np.uint8)).resize((192, 144), Image.Resampling.BICUBIC)
    lay(tmp_path, [large, None])
    large.resize((64, 48), Image.Resampling.BILINEAR).save(tmp_path/"masks/1.jpg", quality=70)
    for item in read(tmp_path).items: assert (draw(item, ["foreground"]) == DISC).mean() > .985


PLACES = [("images/{}.jpg", "masks/{}.png", ""), ("img/{}.jpg", "mask/{}.png", ""), ("images/{}.jpg", "annotations/{}.png", ""), ("images/{}.jpg", "labels/{}_mask.png", ""),
          ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", ""), ("images/train/{}.jpg", "masks/train/{}.png", "train"), ("val/images/{}.jpg", "val/masks/{}.png", "val"),
          ("train/{}.jpg", "train_masks/{}_mask.png", "train"), ("test/{}.jpg", "testannot/{}.png", "test"), ("{}.jpg", "{}_mask.png", ""), ("{}.jpg", "{}.png", ""), ("{}_sat.jpg", "{}_mask.png", "")]


@pytest.mark.parametrize("photo, mask, split", PLACES, ids=lambda value: str(value).replace("/", " "))
def test_every_way_to_lay_them(tmp_path, photo, mask, split):
    listing = read(lay(tmp_path, [VALUES]*3, photo, mask))
    assert [item.name for item in listing.items] == [photo.format(k) for k in range(3)]
    assert all(item.given_split == split and (draw(item, ["1", "2"]) == VALUES).all() for item in listing.items)


def test_voc_lists_give_the_split_and_masks_of_things_are_not_taken(tmp_path):
    lay(tmp_path, [VALUES]*2, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    lay(tmp_path, [VALUES]*2, "JPEGImages/{}.jpg", "SegmentationObject/{}.png")
    (tmp_path/"ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path/"ImageSets/Segmentation/val.txt").write_text("1\n")
    listing = read(tmp_path)
    assert [item.given_split for item in listing.items] == ["", "val"] and listing.skipped["masks without an image"] == 2


def test_a_mask_for_each_thing(tmp_path):
    for k in range(2):
        lay(tmp_path/f"a{k}", [None], photo=f"images/a{k}.jpg")
        (tmp_path/f"a{k}/masks").mkdir()
        for value in (1, 2): Image.fromarray(np.where(VALUES == value, 255, 0).astype(np.uint8)).save(tmp_path/f"a{k}/masks/{value}f3.png")
    assert [len(parse_objects(item.objects)) for item in read(tmp_path).items] == [2, 2]


def test_mvtec_with_its_ground_truth(tmp_path, workbench):
    root = tmp_path/"bottle"
    for k, (place, mask) in enumerate([("train/good", None)]*3 + [("test/good", None), ("test/broken", BINARY), ("test/dirt", BINARY)]):
        lay(root, [mask], f"{place}/{k:03}.png", f"ground_truth/{place.partition('/')[2]}/{k:03}_mask.png")
        (root/f"{place}/{k:03}.png").write_bytes(picture(k))
    batch, table, rejected = take(root, workbench)
    assert batch.format == "masks" and len(rejected) == 0 and batch.skipped == {}
    assert sorted(zip(table.label, table.given_split, table.objects.str.len() > 2, strict=True)) == [("broken", "test", True), ("dirt", "test", True), ("good", "test", False), *[("good", "train", False)]*3]
    assert choose_task(table.assign(split=table.given_split)) == "anomaly"
    (mask,) = [read_mask(row.objects, [row.label], 64, row.width, row.height) for row in table.itertuples() if row.label == "dirt"]
    assert (mask[:, :4] == 0).all() and mask[20, 12] == 1


def test_masks_beside_images_in_folders_of_classes(tmp_path):
    for label in ("benign", "malignant"): lay(tmp_path/label, [BINARY]*2, label + " ({}).png", label + " ({})_mask.png")
    Image.fromarray(BINARY).save(tmp_path/"benign/benign (0)_mask_1.png")
    listing = read(tmp_path)
    assert [(item.label, [each["label"] for each in parse_objects(item.objects)]) for item in listing.items] == [("benign", ["benign"]*2), ("benign", ["benign"])] + [("malignant", ["malignant"])]*2


def test_a_mask_as_the_camera_held_it(tmp_path):
    lay(tmp_path, [VALUES]*3)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.open(tmp_path/"images/1.jpg").save(tmp_path/"images/1.jpg", exif=exif)      # its mask is as stored
    Image.open(tmp_path/"images/2.jpg").save(tmp_path/"images/2.jpg", exif=exif)      # its mask is as shown
    Image.fromarray(np.rot90(VALUES, -1)).save(tmp_path/"masks/2.png")
    for item in read(tmp_path).items[1:]:
        assert (draw_objects(parse_objects(item.objects), {"1": 1, "2": 2}, (48, 64), (48, 64)) == np.rot90(VALUES, -1)).all()


BAD = {"of another shape": Image.new("L", (64, 64)), "a photograph": Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)), "floats": Image.fromarray(VALUES.astype(np.float32))}


@pytest.mark.parametrize("case", [*BAD, "cut off", "empty", "a text"])
def test_an_image_whose_mask_makes_no_sense_is_set_aside(tmp_path, workbench, case):
    root = lay(tmp_path/"in", [VALUES]*4, mask="masks/{}.tiff" if case == "floats" else "masks/{}.png")
    path = next((root/"masks").glob("3.*"))
    if case in BAD: BAD[case].save(path)
    else: path.write_bytes({"cut off": path.read_bytes()[:60], "empty": b"", "a text": b"no mask"}[case])
    batch, _, rejected = take(root, workbench)
    assert batch.count == 3 and rejected.name.tolist() == ["images/3.jpg"] and rejected.reason.tolist() == ["bad_annotation"] and rejected.detail[0]


@pytest.mark.parametrize("names", [["mask/1.jpg", "no mask/1.jpg"], ["with_mask/1.jpg", "without_mask/1.jpg"], ["images/tea/1.jpg", "images/milk/1.jpg"], ["labels/a.jpg", "stamps/b.jpg"], ["images/1.jpg", "masks/1.jpg"]])
def test_photographs_in_folders_called_so_stay_classes(tmp_path, names):
    for k, name in enumerate(names):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(picture(k))
    assert find_format(str(tmp_path))[0] == "folder"


def test_what_is_left_over_is_counted(tmp_path):
    root = lay(tmp_path, [VALUES]*3, classes_txt="background\ntea\nmilk\n", notes_txt="by hand")
    (root/"images/1.jpg").unlink()
    assert read(root).skipped == {"masks without an image": 1, ".txt": 1}


def test_out_and_in_again_nothing_is_lost(tmp_path, workbench):
    rng = np.random.default_rng(3)
    noise = [np.kron(rng.integers(0, 4, (12, 16)), np.ones((4, 4), int)).astype(np.uint8) for _ in range(4)]
    for split in ("train", "val"): lay(tmp_path/"in", [*noise, VALUES*0, None], f"images/{split}/{split}{{}}.jpg", f"masks/{split}/{split}{{}}.png", classes_txt="background\nzinc\nmilk\ntea\n")
    for k, path in enumerate(sorted((tmp_path/"in/images").rglob("*.jpg"))): path.write_bytes(picture(100 + k))
    _, table, _ = take(tmp_path/"in", workbench)
    store = Store(workbench)
    samples = list_exported(table.assign(split=table.given_split), lambda id: store.find_blob(table.set_index("id").sha256[id]).read_bytes())
    assert write_export(samples, tmp_path/"out", "masks").lost == {} and write_export(samples, tmp_path/"coco", "coco").lost == {"whether somebody looked for objects": 2}
    for name in ("out", "coco"):
        _, again, _ = take(tmp_path/name, workbench, name)
        before, after = (pd.Series(t.objects.where(t.objects != "", "[]").values, t.sha256).sort_index() for t in (table, again))
        assert (before == after).all() and len(before) == 12, name


def test_a_changed_mask_changes_the_fingerprint(tmp_path):
    root = lay(tmp_path, [VALUES]*2)
    first = fingerprint_source(str(root))
    assert fingerprint_source(str(root)) == first
    Image.fromarray(VALUES[::-1].copy()).save(root/"masks/1.png")
    assert fingerprint_source(str(root)) != first


def test_run_lengths_are_pycocotools(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")
    lay(tmp_path, [VALUES]*2)
    for each in json.loads(read(tmp_path).items[0].objects):
        wanted = (int(each["label"]) == VALUES).astype(np.uint8)
        assert each["attributes"]["segmentation"]["counts"] == mask.encode(np.asfortranarray(wanted))["counts"].decode() and each["box"] == mask.toBbox(mask.encode(np.asfortranarray(wanted))).tolist()
