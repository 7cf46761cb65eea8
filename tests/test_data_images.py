"Every kind of image file, whole, odd and damaged: taken as it is, or set aside with the right reason; and one table says which kinds there are."
import hashlib
import io
import os
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from cvops_wb.core.errors import BadImage
from cvops_wb.core.kinds import KINDS, find_kind
from cvops_wb.data.curation import CurateSpec, curate
from cvops_wb.data.formats import export_samples
from cvops_wb.data.images import decode_image, inspect_and_sketch, inspect_image, resize_image, show_image
from cvops_wb.data.intake import IngestSpec, draw_rejected, ingest
from cvops_wb.data.near.thumbs import draw_thumb
from cvops_wb.data.snapshots import SnapshotSpec, open_snapshot, take_snapshot
from cvops_wb.data.store import read_blob, read_samples, show_blob
from cvops_wb.learn.loading import decode_resized, load_pixels

REPO = Path(__file__).parents[1]
FULL = bool(os.environ.get("CVOPS_FULL"))
Y, X = np.mgrid[:120, :160]
GREY = ((X//20 + Y//20) % 2*150 + 40 + np.random.default_rng(0).integers(0, 10, X.shape)).astype(np.uint8)
RGB = np.stack([GREY, 255 - GREY, (X*255//160).astype(np.uint8)], -1)
WIDE = GREY.astype(np.uint16)*257
G, R = Image.fromarray(GREY), Image.fromarray(RGB)


def save(image, kind="TIFF", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write(pixels, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **options)
    return out.getvalue()


def pack_twelve(values):
    "Two numbers of twelve bits in three bytes, as TIFF wants them."
    a, b = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).reshape(len(values), -1)


def page(tags, *, order="<", at=8, following=0):
    "A TIFF of one page of tags (number, kind, count, value) and nothing else."
    body = b"".join(struct.pack(order + "HHII", *tag) for tag in tags)
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at) + struct.pack(order + "H", len(tags)) + body + struct.pack(order + "I", following)


def twelve():
    data = pack_twelve(GREY.astype(int)*4095//255)
    tags = [(256, 4, 1, 160), (257, 4, 1, 120), (258, 4, 1, 12), (259, 4, 1, 1), (262, 4, 1, 1), (273, 4, 1, 122), (277, 4, 1, 1), (278, 4, 1, 120), (279, 4, 1, data.nbytes)]
    return page(tags) + data.tobytes()


def turned(kind, way):
    exif = Image.Exif()
    exif[0x112] = way
    return save(R, kind, exif=exif)


WHOLE = {       # what is read, its pixels, and how far they may be off
    **{f"grey TIFF, {packing}": (save(G, compression=packing), GREY, 4 if packing == "jpeg" else 0) for packing in (None, "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg")},
    **{f"RGB TIFF, {packing}": (save(R, compression=packing), RGB, 6 if packing == "jpeg" else 0) for packing in (None, "tiff_lzw", "packbits", "jpeg")},
    "RGBA TIFF": (save(R.convert("RGBA"), compression="tiff_lzw"), RGB, 0), "CMYK TIFF": (save(R.convert("CMYK")), RGB, 0), "YCbCr TIFF": (save(R.convert("YCbCr")), RGB, 3),
    "palette TIFF": (save(R.quantize(64)), RGB, 5), "two tones, TIFF": (save(G.point(lambda v: 255*(v > 128)).convert("1")), 255*(GREY > 128), 0),
    "grey and alpha, TIFF": (save(G.convert("LA")), GREY, 0), "white is zero, TIFF": (write(GREY, photometric="miniswhite"), 255 - GREY, 0),
    **{f"16 bits, {order}, {packing}": (write(WIDE, byteorder=order, compression=packing), GREY, 0) for order in "<>" for packing in (None, "zlib")},
    "16 bits of RGB": (write(RGB.astype(np.uint16)*257, photometric="rgb"), RGB, 0), "12 bits, packed": (twelve(), GREY, 1), "12 bits in 16, not shifted": (write(WIDE >> 4), GREY//16, 1),
    "tiles": (write(RGB, photometric="rgb", tile=(64, 64)), RGB, 0), "planes": (write(np.moveaxis(RGB, -1, 0).copy(), photometric="rgb", planarconfig="separate"), RGB, 0),
    "strips of three rows": (write(RGB, photometric="rgb", rowsperstrip=3), RGB, 0), "with a preview": (None, GREY, 0),
    **{f"{mode} BMP": (save(R.convert(mode), "BMP"), RGB, 0) for mode in ("RGB", "RGBA")}, "grey BMP": (save(G, "BMP"), GREY, 0), "palette BMP": (save(R.quantize(64), "BMP"), RGB, 5),
    "BMP from the top": (None, RGB, 0), "16 bits, PNG": (save(Image.fromarray(WIDE), "PNG"), GREY, 0), "turned TIFF": (turned("TIFF", 6), np.rot90(RGB, -1), 0),
}
with io.BytesIO() as out:
    with tifffile.TiffWriter(out) as file: file.write(GREY); file.write(GREY[::4, ::4].copy(), subfiletype=1)
    WHOLE["with a preview"] = out.getvalue(), GREY, 0
top = bytearray(save(R.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
top[22:26] = struct.pack("<i", -120)
WHOLE["BMP from the top"] = bytes(top), RGB, 0


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_is_read(name):
    "Its pixels are right, its facts and small picture are those of a PNG of the same, and a browser gets what it can draw."
    data, pixels, off = WHOLE[name]
    want = np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels
    assert abs(np.asarray(decode_image(data)).astype(int) - want).mean() <= off
    facts, sketch = inspect_and_sketch(data)
    twin, other = inspect_and_sketch(save(decode_image(data), "PNG"))
    assert facts.ext == find_kind(data).ext and (facts.width, facts.height, facts.bytes) == (want.shape[1], want.shape[0], len(data))
    assert (facts.phash, facts.brightness, facts.sharpness) == (twin.phash, twin.brightness, twin.sharpness) and (sketch == other).all()
    assert abs(draw_thumb(data).astype(int) - np.asarray(decode_image(data).resize((32, 32), Image.Resampling.BOX))).max() <= 1
    assert find_kind(show_image(data)).drawn and (find_kind(data).drawn or (np.asarray(decode_image(show_image(data))) == np.asarray(decode_image(data))).all())


def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
HEAD = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
def png(*chunks, head=HEAD): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def interlaced():
    "Adam7, drawn pass by pass."
    raw = b"".join(b"".join(b"\0" + RGB[y, x0:64:dx].tobytes() for y in range(y0, 64, dy)) for x0, y0, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)))
    return png(chunk(b"IDAT", zlib.compress(raw)), head=struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 1))


def arithmetic():
    "A JPEG that says it is coded arithmetically, as the decoder knows; that it is not, nobody can tell."
    data = bytearray(JPEG)
    at = data.index(b"\xff\xc0")
    data[at + 1] = 0xc9
    return bytes(data)


def insert(marker, body): return JPEG[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body + JPEG[2:]


JPEG, rows = save(R, "JPEG"), [(256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (262, 3, 1, 1), (279, 4, 1, 256)]
ONE = [*rows, (273, 4, 1, 78)]      # its pixels follow the tags
LZW, BMP = save(R, compression="tiff_lzw"), save(R, "BMP")
ODD = {     # what it is → the reason why it is set aside, or "taken"
    "progressive JPEG": (save(R, "JPEG", progressive=True), "taken"), "CMYK JPEG by Adobe, inverted": (save(R.convert("CMYK"), "JPEG"), "taken"), "grey JPEG": (save(G, "JPEG"), "taken"),
    "arithmetic JPEG": (arithmetic(), "taken"), "JPEG at 99 %": (JPEG[:len(JPEG)*99//100], "truncated"), "JPEG without its end": (JPEG[:-2], "truncated"), "JPEG and 3 MB more": (JPEG + bytes(3_000_000), "taken"),
    "two pictures, MPO": (save(R, "MPO", save_all=True, append_images=[G]), "taken"), "large EXIF preview": (insert(0xe1, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + bytes(65_000)), "taken"),
    "EXIF of nonsense": (insert(0xe1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(256))), "taken"), "colour profile of nonsense": (insert(0xe2, b"ICC_PROFILE\0\x01\x01" + bytes(range(200))), "taken"),
    "colour profile, third part of two": (insert(0xe2, b"ICC_PROFILE\0\x03\x02" + bytes(200)), "taken"), "JPEG, twelve bits a sample": (JPEG.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "damaged"),
    "JPEG, no rows": (JPEG.replace(struct.pack(">BHH", 8, 120, 160), struct.pack(">BHH", 8, 0, 160)), "damaged"), "JPEG, wide as none": (JPEG.replace(struct.pack(">BHH", 8, 120, 160), struct.pack(">BHH", 8, 65_000, 65_000)), "too_many_pixels"),
    "comments only": (b"\xff\xd8" + b"\xff\xfe\0\x04ab"*900, "truncated"), "one pixel": (save(R.crop((0, 0, 1, 1)), "PNG"), "taken"), "one wide, 20,000 high": (save(Image.new("RGB", (1, 20_000), "red"), "PNG"), "taken"),
    "20,000 wide, one high": (save(Image.new("RGB", (20_000, 1), "red"), "JPEG"), "taken"), "palette and tRNS": (save(R.quantize(9), "PNG", transparency=3), "taken"), "interlaced PNG": (interlaced(), "taken"),
    "CgBI, of a telephone's program": (b"\x89PNG\r\n\x1a\n" + chunk(b"CgBI", bytes(4)) + png(chunk(b"IDAT", zlib.compress(bytes(200))[2:-4]))[8:], "unsupported_format"), "PNG of two tones": (save(G.convert("1"), "PNG"), "taken"),
    "PNG and text behind": (save(R, "PNG") + b"hello"*999, "taken"), "a checksum of a PNG": (save(R, "PNG").replace(b"IDAT", b"IDAU", 1), "damaged"), "APNG": (save(R, "PNG", save_all=True, append_images=[R.rotate(9)]), "animated"),
    "animated WebP": (save(R, "WEBP", save_all=True, append_images=[R.rotate(9)]), "animated"), "GIF": (save(R, "GIF"), "unsupported_format"), "animated GIF": (save(R, "GIF", save_all=True, append_images=[R.rotate(9)]), "unsupported_format"),
    "nothing": (b"", "empty"), "JPEG's first three bytes": (b"\xff\xd8\xff", "truncated"), "text that begins with BM": (b"BMW builds cars. " * 9, "not_an_image"), "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "JPEG XL": (b"\xff\x0a" + bytes(99), "unsupported_format"), "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "unsupported_format"), "AVIF": (save(R, "AVIF"), "unsupported_format"),
    "TIFF of several pages": (write(np.stack([GREY]*3), photometric="minisblack"), "several_pages"), "BigTIFF": (write(GREY, bigtiff=True), "unsupported_format"), "TIFF of floats": (write(GREY.astype(np.float32)), "unsupported_format"),
    "TIFF, signed": (write(GREY.astype(np.int16)), "unsupported_format"), "TIFF, 32 bits": (write(GREY.astype(np.uint32)), "unsupported_format"), "TIFF by Zstandard": (page([*ONE, (259, 3, 1, 50_000)]) + bytes(999), "unsupported_format"),
    "TIFF by the old JPEG": (page([*ONE, (259, 3, 1, 6)]) + bytes(999), "unsupported_format"), "camera raw": (page([*ONE, (50706, 1, 4, 1)]) + bytes(999), "unsupported_format"), "TIFF, a preview alone": (page([*ONE, (254, 4, 1, 1)]) + bytes(999), "unsupported_format"),
    "TIFF's first bytes": (b"II*\0", "truncated"), "TIFF, no page": (b"MM\0*" + bytes(60), "damaged"), "TIFF, tags beyond the end": (b"II*\0\xff\xff\xff\x7f" + bytes(90), "truncated"), "TIFF, pages in a ring": (page([*ONE, (254, 4, 1, 0)], following=8) + bytes(300), "taken"),
    "TIFF, strip beyond the end": (page([*rows, (273, 4, 1, 2**31)]), "truncated"), "TIFF, fewer pixels than it says": (page([*[r for r in ONE if r[0] != 279], (279, 4, 1, 20)]) + bytes(999), "truncated"), "TIFF without strips": (page(rows), "damaged"),
    "TIFF, a tag of four thousand million values": (page([*ONE, (700, 4, 2**32 - 1, 8)]) + bytes(999), "damaged"), "TIFF, 60,000 x 60,000": (page([(256, 4, 1, 60_000), (257, 4, 1, 60_000), (258, 3, 1, 8), (259, 3, 1, 5), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 9)]), "too_many_pixels"),
    "TIFF, tiles of 2 GB": (page([*rows, (259, 3, 1, 5), (322, 4, 1, 2**16), (323, 4, 1, 2**15), (324, 4, 1, 8), (325, 4, 1, 9)]), "damaged"), "TIFF at 99 %": (LZW[:len(LZW)*99//100], "truncated"), "TIFF at half": (LZW[:len(LZW)//2], "truncated"),
    "BMP at 99 %": (BMP[:len(BMP)*99//100], "truncated"), "BMP less one byte": (BMP[:-1], "truncated"), "BMP, packed": (BMP[:30] + b"\x01" + BMP[31:], "unsupported_format"), "BMP, no width": (BMP[:18] + bytes(4) + BMP[22:], "damaged"),
    "BMP, 60,000 x 60,000": (BMP[:18] + struct.pack("<ii", 60_000, 60_000) + BMP[26:], "truncated"), **{f"EXIF turn {way}": (turned("JPEG", way), "taken") for way in (*range(1, 9), 0, 9, 60_000)},
}


def judge(data):
    try: return inspect_image(data) and decode_image(data) and "taken"
    except BadImage as e: return e.reason


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_taken_or_set_aside_with_its_reason(name):
    assert judge(ODD[name][0]) == ODD[name][1]


def test_what_is_odd_and_taken_looks_right():
    assert abs(np.asarray(decode_image(ODD["CMYK JPEG by Adobe, inverted"][0])).astype(int) - RGB).mean() < 8
    assert (np.asarray(decode_image(ODD["interlaced PNG"][0])) == RGB[:64, :64]).all() and decode_image(ODD["two pictures, MPO"][0]).size == (160, 120)
    for way in range(1, 9): assert abs(np.asarray(decode_image(turned("TIFF", way))).astype(int) - np.asarray(decode_image(turned("JPEG", way)))).mean() < 12
    assert [inspect_image(turned(kind, 6)).width for kind in ("TIFF", "JPEG")] == [120, 120]


@pytest.mark.parametrize("name", ["grey TIFF, None", "RGB TIFF, tiff_lzw", "16 bits, >, zlib", "tiles", "RGB BMP"])
def test_no_file_that_is_cut_off_passes(name):
    "Wherever it is cut before its last pixel."
    data = WHOLE[name][0]
    end = max(data.rfind(bytes(decode_image(data).tobytes()[-12:])), len(data)*9//10)      # TIFF may have tags behind its pixels
    assert {judge(data[:cut]) for cut in np.linspace(30, min(end, len(data) - 1), 40).astype(int)} <= {"truncated", "damaged"}


def test_mutants_are_refused_or_read():
    "Bits turned, numbers replaced, ends cut, mostly among the tags: nothing but `BadImage` comes out."
    seeds, rng, seen = [data for data, _, _ in WHOLE.values()], np.random.default_rng(5), Counter()
    for _ in range(20_000 if FULL else 500):
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.integers(1, 6)):
            low, high = ((0, len(data)), (0, min(300, len(data))), (max(len(data) - 400, 0), len(data)))[rng.integers(3)]
            at, way = int(rng.integers(low, high)), rng.integers(5)
            if way < 4: data[at:at + 4] = ((int(data[at]) ^ 1 << int(rng.integers(8))).to_bytes(1, "little"), rng.bytes(4), b"\xff"*4, bytes(4))[way]
            elif len(data) > 40 and rng.integers(6) == 0: del data[max(at, 20):]
        seen[judge(bytes(data))] += 1
    assert set(seen) <= {"taken", "damaged", "truncated", "unsupported_format", "not_an_image", "several_pages", "too_many_pixels", "animated", "empty"} and min(seen["taken"], seen["damaged"], seen["truncated"]) > 20, seen


def test_one_table_says_what_is_read():
    "No other room lists suffixes or content types of its own; what is stored is named by the table."
    listed = re.compile(r"""["'](?:\.webp|image/webp|\.tiff?|image/tiff)["']""")
    found = {str(path.relative_to(REPO)): listed.findall(path.read_text()) for path in (REPO/"cvops_wb").rglob("*.py")}
    assert {path for path, hits in found.items() if hits} <= {"cvops_wb/core/kinds.py", "cvops_wb/data/headers/__init__.py", "cvops_wb/data/images.py", "cvops_wb/data/versions/erasure.py"}
    for kind in KINDS: assert judge(save(R, kind.name)) == "taken" and find_kind(save(R, kind.name)) is kind


def room(settings, run):
    path = settings.reports/run
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def shelf(photos, tmp_path):
    "The forty photographs: half as they were, the others as TIFF of 8 and 16 bits, and BMP; and things that are no image."
    kinds = {0: ("jpg", {}), 2: ("tif", {"compression": "tiff_lzw"}), 4: ("bmp", {}), 6: ("tiff", {}), 8: ("tif", {})}
    for path in sorted(photos.rglob("*.jpg")):
        number, target = int(path.stem), tmp_path/"shelf"/path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        suffix, options = kinds.get(number, kinds[0])
        image = Image.open(path)
        if number in (0, *range(1, 10, 2)): (target/path.name).write_bytes(path.read_bytes())
        elif number == 8: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)*257).save(target/f"{number:02}.{suffix}", **options)
        else: image.save(target/f"{number:02}.{suffix}", **options)
    lime = tmp_path/"shelf"/"lime"
    Image.open(lime/"01.jpg").save(lime/"twin.tif", compression="jpeg")
    (lime/"wrong name.jpg").write_bytes(save(R, compression="packbits"))
    (lime/"pages.tif").write_bytes(ODD["TIFF of several pages"][0])
    (lime/"cut.bmp").write_bytes(BMP[:-100])
    (lime/"folder.jpg").mkdir()
    os.mkfifo(lime/"pipe.tif")
    (lime/"device.bmp").symlink_to("/dev/zero")
    (lime/"nothing.tif").write_bytes(b"")
    return tmp_path/"shelf"


def test_tiff_and_bmp_all_the_way(workbench, shelf, tmp_path):
    "In, looked at, beside a twin, versioned, trained on, written out, shown: the bytes as they came."
    batch = ingest(str(shelf), IngestSpec(), room(workbench, "ingest"))
    table, refused = read_samples(batch.samples), draw_rejected(batch).set_index("name").reason
    assert dict(table.ext.value_counts()) == {".jpg": 24, ".tif": 14, ".bmp": 4}
    assert refused.to_dict() == {"lime/pages.tif": "several_pages", "lime/cut.bmp": "truncated", "lime/pipe.tif": "not_a_file", "lime/device.bmp": "outside_root", "lime/nothing.tif": "empty"}
    for row in table.itertuples(): assert read_blob(row) == (shelf/row.sources[0]).read_bytes()
    selection = curate(batch, CurateSpec(), room(workbench, "curate"))
    pairs, found = pd.read_parquet(workbench.reports/"curate"/"pairs.parquet"), read_samples(selection.samples).set_index("id")
    assert {frozenset(found.sources[id][0] for id in pair) for pair in pairs[["a", "b"]].to_numpy()} >= {frozenset(("lime/01.jpg", "lime/twin.tif"))}
    snapshot = take_snapshot(selection, SnapshotSpec(), room(workbench, "snapshot"))
    reader = open_snapshot(snapshot)
    pixels = load_pixels(reader, [32], tmp_path/"cache", decode_resized)[0]
    for row in table[table.id.isin(reader.table.id[reader.table.split != "none"])].itertuples(): assert (pixels.take([row.id])[0] == resize_image(decode_image(read_blob(row)), 32)).all()
    for kind in ("folder", "csv"):
        export_samples(snapshot, tmp_path/kind, kind)
        again = ingest(str(tmp_path/kind), IngestSpec(), room(workbench, f"again-{kind}"))
        assert again.new == 0 and again.count == len(reader.table[reader.table.split != "none"]) and again.rejected == 0
    shown = {row.ext: show_blob(row, workbench) for row in table.itertuples()}
    assert {ext: path.suffix for ext, path in shown.items()} == {".jpg": ".jpg", ".bmp": ".bmp", ".tif": ".png"} and shown[".tif"].is_relative_to(workbench.cache)


@pytest.mark.parametrize("name, suffix", [("JPEG", ".jpg"), ("PNG", ".png"), ("TIFF", ".png")])
def test_what_a_service_keeps_can_be_drawn(workbench, name, suffix):
    # it lies there without a suffix, under the beginning of its hash, and FiftyOne's App goes by the suffix; masked, it bears a second hash
    for masked in (False, True):
        out = io.BytesIO()
        Image.new("RGB", (40, 30), "teal" if masked else "navy").save(out, name)
        digest = hashlib.sha256(out.getvalue()).hexdigest()
        asked = "0"*8 + digest[:8] if masked else digest[:16]
        path = workbench.store/"kept"/asked[:2]/(f"{asked}.{digest[:16]}" if masked else asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
        for _ in range(2):
            shown = show_blob(asked, workbench)
            assert shown.suffix == suffix and Image.open(shown).size == (40, 30) and shown.is_relative_to(workbench.cache)
