"The camera inbox: files that grow, stop, come back, are renamed and overwritten; a full disk; clocks that step; and the page of what was refused."
import hashlib
import io
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from threading import Event as ThreadEvent
from threading import Thread, Timer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import cvops_wb.data.inbox as inbox_room
from cvops_wb.data import (
    IngestSpec,
    fingerprint_source,
    ingest,
    list_rejected,
    list_samples,
    report_rejected,
    watch_stream,
)
from cvops_wb.data.inbox import Inbox, WatchSpec, watch_inbox
from cvops_wb.data.inbox.refusals import draw_refusal
from cvops_wb.data.shards import pack_images
from cvops_wb.data.store import Arrival, Store, commit, open_writer, read_blob, stage


def make_photo(number: int, side: int = 32, taken: str = "", format: str = "JPEG") -> bytes:
    "A small image, like no other."
    out, exif = io.BytesIO(), Image.Exif()
    if taken: exif[0x132] = taken
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(out, format, quality=60, exif=exif)
    return out.getvalue()


class Scene:
    "An inbox with a clock that the test turns, and the parent's log of acknowledgements."

    def __init__(self, settings, folder: Path):
        folder.mkdir()
        self.folder, self.settings, self.now, self.log = folder, settings, 0., []
        self.inbox = Inbox(folder, settings, WatchSpec(settle=2, give_up=60), clock=lambda: self.now)

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def look(self, after: float = 0.):
        self.now += after
        return self.inbox.scan(self.log.extend)

    def settle(self):
        self.look()
        return self.look(3)

    @property
    def images(self) -> dict[str, str]: return {a.name: a.sha256 for a in self.log if not a.reason}


@pytest.fixture
def scene(workbench, tmp_path): return Scene(workbench, tmp_path/"inbox")


def sha(data: bytes) -> str: return hashlib.sha256(data).hexdigest()


def write_slowly(scene: Scene, count: int, step_clock: float = 0.) -> list[bytes]:
    "`count` writers in turns; every other one gives up half-way. The clock of the files steps to and fro."
    photos = [make_photo(number) for number in range(count)]
    for part in range(1, 5):
        for number, photo in enumerate(photos):
            if number % 2 and part > 2: continue
            path = scene.put(f"cam{number % 3}/{number}.jpg", photo[:len(photo)*part//4])
            os.utime(path, (step_clock*(part % 2 or -1) + 1.7e9 + number,)*2)
            if number % 7 == part: scene.look(.01)
        scene.look(5)       # longer than it takes to settle: what is there is looked at, half as it is
    return photos


@pytest.mark.parametrize("step", [0., 3600.])
def test_slow_writers_of_which_half_give_up(scene, step):
    photos = write_slowly(scene, 200, step)
    scene.look(3)
    assert sorted(scene.images.values()) == sorted(map(sha, photos[::2]))
    assert [a for a in scene.log if a.reason] == []
    assert scene.look(30).waiting == 100
    last = scene.look(31)
    assert len(last.abandoned) == 100 and last.waiting == 0
    refused = list_rejected(scene.settings)
    assert set(refused.reason) == {"abandoned"}
    assert {(scene.settings.store/"rejected"/file).read_bytes() for file in refused.file} == {p[:len(p)*2//4] for p in photos[1::2]}
    assert scene.look(100).abandoned == [] and len(list_samples(scene.settings)) == 100


def test_slow_writers_show_an_inbox_that_does_not_wait(scene, monkeypatch):
    monkeypatch.setattr(inbox_room, "_HALF", set())
    write_slowly(scene, 20)
    assert [a for a in scene.log if a.reason] != []


def test_an_overwritten_file_shows_an_inbox_that_does_not_compare(scene, monkeypatch):
    monkeypatch.setattr(inbox_room, "_sign", lambda path: (1, 1, 1))
    for number in (1, 2):
        scene.put("latest.jpg", make_photo(number))
        scene.settle()
    assert len(list_samples(scene.settings)) == 1


def test_without_events_the_rescan_finds_everything(scene, monkeypatch):
    monkeypatch.setattr(inbox_room, "_listen", lambda *given: None)
    taken = []

    def end(arrivals):
        taken.extend(a.name for a in arrivals)
        raise KeyboardInterrupt

    Timer(.3, lambda: scene.put("cam/late.jpg", make_photo(1))).start()
    told = watch_inbox(scene.folder, scene.settings, WatchSpec(settle=.1, rescan=.1), acknowledge=end, tell=len)
    assert taken == ["cam/late.jpg"] and told["known"] == 1


@pytest.mark.parametrize("deaf", [False, True], ids=["events", "no events"])
def test_an_event_is_enough(scene, monkeypatch, deaf):
    "No rescan within the hour: what comes is taken because the file system says so, and is not where nobody listens."
    if deaf: monkeypatch.setattr(inbox_room, "_listen", lambda *given: None)
    taken, over = [], ThreadEvent()

    def write():        # again and again: the first may come before anybody listens
        for k in range(400):
            if over.wait(.15): return
            scene.put(f"cam/{k}.jpg", make_photo(k))

    def end(arrivals):
        taken.extend(a.name for a in arrivals)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)     # who runs the tests in the background may have it ignored
    writer, limit = Thread(target=write), Timer(2.5 if deaf else 50, lambda: os.kill(os.getpid(), signal.SIGINT))
    for thread in (writer, limit): thread.start()
    try: told = watch_inbox(scene.folder, scene.settings, WatchSpec(settle=.05, rescan=3600), acknowledge=end, tell=len)
    finally:
        limit.cancel()
        over.set()
        writer.join()
        signal.signal(signal.SIGINT, before)
    assert bool(taken) != deaf and (told["known"] > 0) != deaf


def test_an_abandoned_file_that_is_finished_after_all(scene):
    photo = make_photo(1)
    scene.put("a.jpg", photo[:300])
    scene.settle()
    assert scene.look(61).abandoned == ["a.jpg"]
    scene.put("a.jpg", photo)
    scene.settle()
    assert scene.images == {"a.jpg": sha(photo)}
    document, _ = report_rejected(scene.settings)
    assert [row["taken_since"] for row in document["rejected"]] == [True]


def test_a_file_is_taken_when_it_gets_its_name(scene):
    photo = make_photo(1)
    for name in (".a.jpg.Xy12", "b.jpg.part", "c.tmp"): scene.put(name, photo)
    assert scene.settle().taken == 0
    (scene.folder/"b.jpg.part").rename(scene.folder/"b.jpg")
    assert scene.settle().taken == 1 and set(scene.images) == {"b.jpg"}


def test_the_same_bytes_twice_are_one_sample_with_two_sources(scene):
    photo = make_photo(1)
    for name in ("cam0/a.jpg", "cam1/b.jpg"): scene.put(name, photo)
    assert (scene.settle().new, scene.look(10).taken) == (1, 0)
    table = list_samples(scene.settings)
    assert table.sources.tolist() == [["cam0/a.jpg", "cam1/b.jpg"]]
    (scene.folder/"cam1/b.jpg").rename(scene.folder/"cam1/c.jpg")
    assert (scene.settle().new, len(list_samples(scene.settings))) == (0, 1)


def test_the_same_name_with_new_bytes_is_a_new_sample(scene):
    photos = [make_photo(1), make_photo(2)]
    for photo in photos:
        scene.put("latest.jpg", photo)
        scene.settle()
    table = list_samples(scene.settings)
    assert set(table.sha256) == set(map(sha, photos)) and table.sources.tolist() == [["latest.jpg"]]*2


def test_a_second_watch_takes_nothing_twice(scene):
    scene.put("a.jpg", make_photo(1))
    scene.settle()
    again = watch_inbox(scene.folder, scene.settings, WatchSpec(settle=.05, rescan=.05), once=True, tell=len)
    assert (again["taken"], again["new"], again["known"]) == (1, 0, 1)


def test_a_look_does_not_read_what_is_known_already(scene, monkeypatch):
    queries, read_all = [], Store.read_all
    monkeypatch.setattr(Store, "read_all", lambda self, query, values=(): queries.append(query) or read_all(self, query, values))
    for k in range(4):
        scene.put(f"{k}.jpg", make_photo(k))
        scene.settle()
    assert sum(query == "select sha256 from samples" for query in queries) <= 1
    with sqlite3.connect(scene.settings.store/"journal.sqlite") as journal:     # as another ingest would
        journal.execute("insert into samples (sha256) values ('elsewhere')")
    scene.put("5.jpg", make_photo(5))
    scene.settle()
    assert scene.inbox.known >= {"elsewhere", sha(make_photo(5))}


def test_a_file_that_changes_while_it_is_read_is_not_taken(scene, monkeypatch):
    path, whole = scene.put("a.jpg", make_photo(1)), make_photo(2)
    scene.look()
    look_at = inbox_room.look_at

    def look_and_overwrite(*given):
        arrival = look_at(*given)
        path.write_bytes(whole)
        return arrival

    monkeypatch.setattr(inbox_room, "look_at", look_and_overwrite)
    assert scene.look(3).taken == 0
    monkeypatch.setattr(inbox_room, "look_at", look_at)
    scene.settle()
    assert scene.images == {"a.jpg": sha(whole)}


def test_what_must_not_be_opened_is_set_aside_once(scene, tmp_path):
    (tmp_path/"secret.jpg").write_bytes(make_photo(1))
    (scene.folder/"link.jpg").symlink_to(tmp_path/"secret.jpg")
    os.mkfifo(scene.folder/"pipe.jpg")
    assert scene.settle().rejected == 2 and scene.look(100).rejected == 0
    assert set(list_rejected(scene.settings).reason) == {"outside_root", "not_a_file"}
    assert list_samples(scene.settings).empty


def test_each_camera_has_its_own_name_and_clock(scene):
    now = 1.7e9
    for camera, offset in {"door": 0, "roof": -7200}.items():
        for k in range(3):
            taken = inbox_room.datetime.fromtimestamp(now + offset + k).strftime("%Y:%m:%d %H:%M:%S")
            os.utime(scene.put(f"{camera}/{k}.jpg", make_photo(hash((camera, k)) % 2**32, taken=taken)), (now + k,)*2)
    scene.settle()
    cameras = {name: camera.to_dict() for name, camera in scene.inbox.cameras.items()}
    assert {name: (c["images"], c["clock_behind_s"]) for name, c in cameras.items()} == {"door": (3, 0), "roof": (3, 7200)}
    assert sorted(list_samples(scene.settings).camera) == ["door"]*3 + ["roof"]*3


def test_a_full_disk_pauses_and_resumes(scene, monkeypatch):
    free = [400e6]
    monkeypatch.setattr(inbox_room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    scene.put("a.jpg", make_photo(1))
    assert "400.0 MB left" in scene.settle().paused and scene.log == []
    free[0] = 520e6     # a little more than the least: not yet
    assert scene.look(3).paused
    free[0] = 600e6
    assert not scene.look(3).paused and set(scene.images) == {"a.jpg"}


def test_another_writer_pauses_and_resumes(scene):
    scene.put("a.jpg", make_photo(1))
    scene.look()
    with open_writer(scene.settings): assert "another ingest" in scene.look(3).paused
    assert scene.look(3).taken == 1


def test_acknowledged_is_in_the_journal_and_on_the_disk(scene):
    seen = []

    def check(arrivals):
        with sqlite3.connect(scene.settings.store/"journal.sqlite") as other: rows = {s for s, in other.execute("select sha256 from samples")}
        seen.extend(a.sha256 in rows and sha((scene.settings.store/"blobs"/a.sha256[:2]/f"{a.sha256}.jpg").read_bytes()) == a.sha256 for a in arrivals)

    for k in range(5): scene.put(f"{k}.jpg", make_photo(k))
    scene.look()
    scene.now += 3
    scene.inbox.scan(check)
    assert seen == [True]*5


def test_the_batch_is_what_was_acknowledged_also_when_the_files_are_gone(scene, tmp_path):
    for k in range(3): scene.put(f"cam/{k}.jpg", make_photo(k))
    scene.put("cam/half.jpg", make_photo(9)[:200])
    scene.settle()
    spec = IngestSpec(format="inbox")
    first = fingerprint_source(str(scene.folder), spec)
    assert first == fingerprint_source(str(scene.folder), spec)
    shutil.rmtree(scene.folder/"cam")
    (tmp_path/"out").mkdir()
    out = scene.settings.reports/"ingest-0000000000"
    out.mkdir(parents=True)
    batch = ingest(str(scene.folder), spec, out)
    assert (batch.count, batch.rejected, batch.format) == (3, 0, "inbox")
    labelled = ingest(str(scene.folder), IngestSpec(format="inbox", label="leaf"), out)     # where sub-folders are classes
    assert labelled.classes == {"cam": 3}
    names = [(path.name.partition(".")[0], path.suffix, path.stat().st_size) for path in (scene.settings.store/"blobs").rglob("*.jpg")]
    pack_images(names, scene.settings.versioned/"shards", lambda sha256: read_blob(sha256, scene.settings))
    shutil.rmtree(scene.settings.store/"blobs")     # as after `free_blobs`: the images stand in shards
    assert ingest(str(scene.folder), spec, out).count == 3
    scene.put("cam/4.jpg", make_photo(4))
    scene.settle()
    assert fingerprint_source(str(scene.folder), spec) != first


def test_a_video_is_a_camera(workbench, tmp_path):
    cv2 = pytest.importorskip("cv2")
    video = str(tmp_path/"aisle 4.avi")
    writer = cv2.VideoWriter(video, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for k in range(40): writer.write(np.full((48, 64, 3), 6*k, np.uint8))
    writer.release()
    seen = watch_stream(video, workbench, WatchSpec(settle=.05, rescan=.05), every=.5, tell=len)
    assert (seen["taken"], seen["new"], list(seen["cameras"])) == (8, 8, ["aisle-4"])
    assert not [p for p in (workbench.store/"streams").rglob("*") if p.is_file()]
    again = watch_stream(video, workbench, WatchSpec(settle=.05, rescan=.05), every=.5, tell=len)
    assert (again["taken"], again["new"], again["known"]) == (8, 0, 8)


def test_ctrl_c_ends_a_watch_in_good_order(workbench, tmp_path):
    folder = tmp_path/"inbox"
    folder.mkdir()
    (folder/"a.jpg").write_bytes(make_photo(1))
    script = f"from cvops_wb.loop.cli import main; main(['ingest', {str(folder)!r}, '--watch', '--json'])"
    shutil.copytree(Path(__file__).parents[1]/"nbs"/"runs", workbench.root/"nbs"/"runs")
    watch = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in watch.stderr:
        if "1 taken" in line: break
    watch.send_signal(signal.SIGINT)
    out, _ = watch.communicate()
    document = json.loads(out)
    assert watch.returncode == 0 and document["watch"]["taken"] == 1
    assert document["stages"][0]["record"]["count"] == 1


@pytest.mark.parametrize("arguments, code, says", [
    (["--rejected"], 0, '"rejected": ['), (["--watch"], 2, "SRC is missing"), (["no/such/folder", "--watch"], 1, "the inbox is no folder"),
    (["empty", "--watch", "--once"], 0, '"known": 0'), (["none.mp4", "--watch"], 1, "the stream cannot be opened"),
])
def test_the_command(workbench, arguments, code, says):
    (workbench.root/"empty").mkdir()
    done = subprocess.run([sys.executable, "-c", "from cvops_wb.loop.cli import main; main()", "ingest", *arguments, "--json"], capture_output=True, text=True)
    assert done.returncode == code and says in done.stdout, done.stderr


# What was refused.

def make_bomb() -> bytes:
    "A PNG file of a few bytes that says it has 900 megapixels."
    def chunk(kind: bytes, body: bytes) -> bytes: return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data, drawn", [
    (make_photo(1, 64)[:-500], True), (make_photo(1, format="PNG"), True), (make_bomb(), False), (b"<svg onload=alert(1)>", False), (b"", False),
    (b"GIF89a" + bytes(50), False), (b"%PDF-1.7", False), (b"\xff\xd8\xff" + bytes(200), False), (make_photo(1)[:40], False),
], ids=["cut", "png", "bomb", "svg", "empty", "gif", "pdf", "no jpeg", "header"])
def test_only_what_is_safe_is_drawn(workbench, tmp_path, data, drawn):
    (tmp_path/"file.jpg").write_bytes(data)
    assert (draw_refusal(tmp_path/"file.jpg", workbench) is not None) == drawn


@pytest.mark.parametrize("name", [
    "<script>alert(1)</script>.jpg", "\"><img src=x onerror=alert(1)>.jpg", "&lt;b&gt;.jpg", "{summary}{0}.jpg", "a\u202egpj.exe.jpg", "\x1b[2J\x1b]0;owned\x07.jpg", "a\nb\r.jpg",
    "'; drop table rejected; --.jpg", "javascript:alert(1).jpg", "x"*200 + ".jpg",
])
def test_hostile_names_stay_text(workbench, tmp_path, name):
    with open_writer(workbench) as store:
        data = make_photo(1, 64)[:-500]
        commit(store, "shop", [Arrival(name, sha(data), staged=stage(store, data, sha(data)), reason="truncated", detail="cut off")])
    document, text = report_rejected(workbench)
    page = Path(document["page"]).read_text()
    assert document["rejected"][0]["name"] == name
    assert page.count("<img") == 1 and "<script" not in page and 'default-src \'none\'' in page
    assert not {c for c in text.replace("\n", "") if not c.isprintable()} and len(text.splitlines()) == 2
    assert not {c for c in page if c in "\u202e\x1b\x07"}


def test_a_row_that_points_elsewhere_is_not_followed(workbench, tmp_path):
    (tmp_path/"private.png").write_bytes(make_photo(1, format="PNG"))
    with open_writer(workbench) as store:
        commit(store, "shop", [Arrival("a.jpg", "a"*64, reason="truncated")])
        store.journal.execute("update rejected set file = ?", [os.path.relpath(tmp_path/"private.png", workbench.store/"rejected")])
    assert "<img" not in Path(report_rejected(workbench)[0]["page"]).read_text()
