"Which images a service keeps, for how long, and who may forbid it; asked of a real one."
import hashlib
import io
import os
import time

import numpy as np
import pytest
from PIL import Image
from serve_toy import photograph

from cvops_wb.core.errors import BadInput, WrongUsage
from cvops_wb.core.settings import Serve
from cvops_wb.data import read_blob
from cvops_wb.serve import Client
from cvops_wb.serve import pictures as rooms
from cvops_wb.serve.clients import CallFailed
from cvops_wb.serve.launching import service_running
from cvops_wb.serve.pictures import Pictures, read_masks


def wait(made, seconds=10.):
    "Until it holds, or the time is over."
    end = time.monotonic() + seconds
    while not made() and time.monotonic() < end: time.sleep(.05)
    return made()


@pytest.mark.parametrize("share, below, kept", [("0", "1.01", "all"), ("0.5", "0", "half")])
def test_images_are_kept_as_settings_and_callers_say(share, below, kept, bench, bento, monkeypatch):
    "Bit for bit under their id, for `read_blob`; what a caller forbids is not there."
    monkeypatch.setenv("CVOPS_SERVE_KEEP_SHARE", share)
    monkeypatch.setenv("CVOPS_SERVE_KEEP_BELOW", below)
    log = bench.store/"predictions"
    photos = {hashlib.sha256(data).hexdigest()[:16]: data for data in (photograph("red", seed=100 + k) for k in range(24))}
    secret = photograph("blue", seed=99)
    with service_running(bento, log, workers=1) as service, Client(service.url) as client:
        for data in photos.values(): assert client.predict(data)["label"]
        client.predict(secret, keep=False)
        wanted = {id for id in photos if kept == "all" or int(id[:8], 16) < 2**31}
        folder = bench.store/"kept"
        assert wait(lambda: {p.name for p in folder.glob("??/*")} >= wanted)
    found = {p.name: p.read_bytes() for p in folder.glob("??/*")}
    assert found == {id: photos[id] for id in wanted} and (0 < len(found) < 24 or kept != "half")
    for id in wanted: assert read_blob(id, bench) == photos[id]
    with pytest.raises(BadInput): read_blob(hashlib.sha256(secret).hexdigest()[:16], bench)
    for path in folder.glob("??/*"): path.unlink()


def test_a_damaged_picture_is_no_picture(bench):
    "The id is the hash: other bytes under it are refused."
    path = bench.store/"kept"/"ab"/("ab" + "0"*14)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"something else")
    with pytest.raises(BadInput, match="damaged"): read_blob(path.name, bench)


# ── what must not be seen ──

def make_person(seed, kind="JPEG", turned=False):
    "A photograph of noise; what it shows is told by every 24 bytes of its file. With a preview in its EXIF that shows all of it."
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (120, 160, 3), np.uint8))
    exif, out, small = Image.Exif(), io.BytesIO(), io.BytesIO()
    image.resize((80, 60)).save(small, "JPEG")
    exif[0x9286] = small.getvalue()
    if turned: exif[0x112] = 6
    image.save(out, kind, exif=exif)
    return out.getvalue()


def find_traces(root, data):
    "Files below a folder that have a piece of an image, whatever their names: of its second half, where there are only pixels."
    pieces = {data[at:at + 24] for at in range(len(data)//2, len(data) - 24, 24)}
    return sorted(path for path in root.rglob("*") if path.is_file() and any(content[at:at + 24] in pieces for content in [path.read_bytes()] for at in range(len(content) - 24)))


def look_at(path, box):
    "The brightest pixel in a box of a kept image, and how much there is to see outside."
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    inside = pixels[box[1]:box[3], box[0]:box[2]].max()
    pixels[box[1]:box[3], box[0]:box[2]] = 128
    return inside, pixels.std()


@pytest.fixture(scope="module")
def service(bench, bento):
    "A service that keeps all, and has a window before one of its cameras."
    log = bench.store/"predictions"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"KEEP_SHARE": "1", "MASKS": "caf\u00e9: 0,0,.5,.25 | door: 100,60,160,120"}.items(): patch.setenv(f"CVOPS_SERVE_{name}", value)
        with service_running(bento, log, workers=1) as service: yield service


MASKED = [("JPEG", "", [(20, 10, 90, 70)], (20, 10, 90, 70)), ("PNG", "", [(.125, .25, .5, 1)], (20, 30, 80, 120)), ("WEBP", "", [(20, 10, 999, 999)], (20, 10, 160, 120)),
          ("JPEG", "caf\u00e9", [], (0, 0, 80, 30)), ("PNG", "door", [], (100, 60, 160, 120))]


@pytest.mark.parametrize("kind, camera, mask, box", MASKED)
def test_what_is_masked_never_touches_the_disk(service, bench, kind, camera, mask, box):
    "By request and by camera: black in the kept image, the rest is there, and no other file of the workbench has a piece of the original."
    data = make_person(len(kind + camera), kind)
    with Client(service.url) as client: name = client.predict(data, camera=camera, mask=mask) and hashlib.sha256(data).hexdigest()[:16]
    folder = bench.store/"kept"/name[:2]
    assert wait(lambda: list(folder.glob(f"{name}.*")))
    [path] = folder.glob(f"{name}*")
    inside, outside = look_at(path, box)
    assert inside <= (40 if kind == "JPEG" else 0) and outside > 15 and set(find_traces(bench.root, data)) <= {path} and b"Exif" not in path.read_bytes()
    assert read_blob(name, bench) == path.read_bytes()
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BadInput, match="damaged"): read_blob(name, bench)
    path.unlink()


def test_traces_of_an_unmasked_image_are_found(service, bench):
    "The planted bug of the test above: a mask that does nothing."
    data = make_person(77)
    with Client(service.url) as client: client.predict(data)
    assert wait(lambda: find_traces(bench.store/"kept", data)), "an image that is kept as it came leaves traces"
    assert read_blob(hashlib.sha256(data).hexdigest()[:16], bench) == data


def test_a_mask_holds_for_an_image_that_turns_up_again(tmp_path):
    "Kept plain, then masked: the plain one goes. Masked, then plain or with another mask: what was black stays black."
    data, name = make_person(1, turned=True), "ab" + "0"*14
    shelf = Pictures(tmp_path, Serve(keep_share=1.))
    for boxes in ((), [(0, 0, 60, 60)], (), [(60, 60, 120, 160)], [(0, 0, 60, 60)]): assert shelf.offer(name, data, .9, {}, boxes)
    shelf.close()
    [path] = tmp_path.glob("??/*")
    assert path.name.startswith(f"{name}.") and Image.open(path).size == (120, 160), "upright"
    assert look_at(path, (0, 0, 60, 60))[0] <= 40 and look_at(path, (60, 60, 120, 160))[0] <= 40 and find_traces(tmp_path, data) == []


@pytest.mark.parametrize("mask", ["1,2,3", "a,b,c,d", "5,5,5,9", "0,0,nan,1", "-1,0,5,5", "0,0,inf,1", ";", "0,0,1,1;"*65])
def test_a_mask_that_cannot_be_read_is_refused(service, bench, mask):
    "Not answered without it."
    before = set((bench.store/"kept").rglob("*"))
    with Client(service.url) as client, pytest.raises(CallFailed) as caught:
        client.call("POST", "/predict", content=make_person(5), headers={"content-type": "image/jpeg", "x-mask": mask})
    assert (caught.value.status, caught.value.reason) == (400, "bad_mask") and set((bench.store/"kept").rglob("*")) == before


@pytest.mark.parametrize("text", ["till 1", "till: 1,2,3", "0,0,1,1", "a: 0,0,1,1 | : 0,0,1,1"])
def test_masks_of_settings_that_cannot_be_read_stop_the_service(text, tmp_path):
    with pytest.raises(WrongUsage, match="masks"): Pictures(tmp_path, Serve(masks=text))


def test_only_what_was_agreed_to_is_kept(tmp_path):
    shelf = Pictures(tmp_path, Serve(keep_share=1., keep_below=1.1, keep_asked=True))
    assert [shelf.offer("0"*16, b"x", .1, {"x-keep": word} if word else {}) for word in ("", "no", "maybe", "yes")] == [False, False, False, True]
    shelf.close()
    shelf = Pictures(tmp_path/"none", Serve(keep_share=0., keep_below=0.))
    assert not any(shelf.offer(f"{k:016x}", b"x", k/9) for k in range(9)) and read_masks("") == {}
    shelf.close()


def test_an_idle_service_lets_old_images_go(tmp_path, monkeypatch):
    "Nobody asks any more: what is too old goes all the same."
    monkeypatch.setattr(rooms, "IDLE", .05)
    shelf = Pictures(tmp_path, Serve(keep_share=1., keep_days=7))
    assert shelf.offer("ab" + "0"*14, b"x", .9) and wait(lambda: list(tmp_path.glob("??/*")))
    os.utime(next(tmp_path.glob("??/*")), (1e9, 1e9))
    assert wait(lambda: not list(tmp_path.glob("??/*")))
    shelf.close()
