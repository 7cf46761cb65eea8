"""Promise R1: an image is acknowledged only when it is durable. Killed anywhere, on a full or failing disk, after a power loss: of what
the parent saw acknowledged, nothing is lost, doubled or torn, and the next ingest works. Each campaign must fail on a planted bug.

`CVOPS_FULL=1` runs the long campaigns, as `make test-full` does."""
import hashlib
import io
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import numpy as np
import pytest
from ingest_parent import CALLS, Children, audit, count_calls, read_acks
from PIL import Image
from power import RECORDED, Disk

FULL = bool(os.environ.get("CVOPS_FULL"))
pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed: make system")


@pytest.fixture(scope="module")
def children():
    warm = Children()
    yield warm
    warm.close()


def make_photo(number: int, side: int = 24) -> bytes:
    "A small JPEG file, like no other."
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG", quality=60)
    return out.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "Five images, one of them twice, and a file cut off."
    root = tmp_path_factory.mktemp("source")
    for number in range(5): (root/f"{number}.jpg").write_bytes(make_photo(number, 48))
    shutil.copy(root/"1.jpg", root/"again.jpg")
    (root/"cut.jpg").write_bytes(make_photo(9, 48)[:-400])
    return root


class Bench:
    "A workbench that is ingested into and broken, again and again."

    def __init__(self, children: Children, source: Path, root: Path):
        self.children, self.source, self.root, self.acks = children, source, root, root.parent/f"{root.name}.acks"
        self.reset()

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        self.acks.unlink(missing_ok=True)

    def job(self, **more) -> dict: return {"root": str(self.root), "source": str(self.source), "acks": str(self.acks)} | more

    def check(self, **more) -> list[str]:
        "What is wrong now, and what is wrong after the next ingest."
        wrong = audit(self.root, read_acks(self.acks))
        code = self.children.run(self.job(inline=True, **more))
        if code != 0: return [*wrong, f"the next ingest ended with {code}"]
        every = {hashlib.sha256(p.read_bytes()).hexdigest(): "truncated" if p.name == "cut.jpg" else "image" for p in self.source.iterdir()}
        left = [f"left behind {p.name}" for p in (self.root/".cvops/store/incoming").iterdir()]
        return wrong + audit(self.root, every) + left


@pytest.fixture
def bench(children, source):
    "In memory where there is a place for it: what a disk would lose is rebuilt from the trace, so none is waited for."
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Bench(children, source, Path(folder)/"bench")


def list_points(bench: Bench, out: Path, calls: str, **more) -> list[tuple[str, int]]:
    "Every call of an ingest, as (name, which)."
    bench.children.trace(bench.job(**more), "-e", f"trace={calls}", out=out)
    points = [(call, k) for call, count in sorted(count_calls(out, calls).items()) for k in range(1, count + 1)]
    bench.reset()
    return points


def sweep(bench: Bench, points, fault: str, prepare=lambda: None, until: str = "nothing", **more) -> tuple[list, list[str]]:
    "Inject a fault at each point; the points where the ingest gave up, and what was wrong. Ends early where `until` is found."
    took, wrong, trace = [], [], bench.root.with_name("sweep.trace")
    for call, k in points:
        bench.reset()
        prepare()
        code = bench.children.trace(bench.job(**more), "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={k}", out=trace)
        if not re.search("INJECTED|killed by", trace.read_text(errors="replace")): wrong.append(f"{call} {k} {fault}: it did not strike")
        took += [(call, k)]*(code != 0)
        if code == 70: wrong.append(f"{call} {k}: " + Path(str(bench.acks) + ".error").read_text()[-600:])
        wrong += [f"{call} {k} {fault}: {what}" for what in bench.check()]
        if any(until in line for line in wrong): break
    return took, wrong


PACK = 2000     # bytes a shard: two of the source's images fill one


@pytest.mark.parametrize("fresh, pack, sample", [(True, 0, 20), (False, 0, 20), (True, PACK, 20)], ids=["fresh", "grown", "packing"])
def test_killed_at_every_call(bench, tmp_path, fresh, pack, sample):
    def prepare():
        if not fresh: bench.children.run(bench.job(inline=True, names=["0.jpg", "3.jpg"]))
    prepare()
    points = list_points(bench, tmp_path/"trace", CALLS, pack=pack)
    assert len(points) > 100 and ("packed" in (tmp_path/"trace").read_text()) == bool(pack)
    chosen = points if FULL else random.Random(0).sample(points, sample)
    took, wrong = sweep(bench, chosen, "signal=KILL", prepare, pack=pack)
    assert wrong == []
    assert took == chosen


@pytest.mark.parametrize("fault", ["error=ENOSPC", "error=EIO"])
def test_packing_ahead_is_not_the_concern_of_the_ingest(bench, tmp_path, fault):
    "A disk that fails under a shard: the ingest ends as if nothing was, all is acknowledged, and no half shard is called whole."
    bench.children.trace(bench.job(pack=PACK), "-e", f"trace={CALLS}", out=tmp_path/"trace")
    points = list_packing((tmp_path/"trace").read_text(errors="replace"))
    bench.reset()
    assert {call for call, _ in points} >= {"openat", "write", "fsync", "rename", "mkdir"}
    chosen = points if FULL else points[::4]
    took, wrong = sweep(bench, chosen, fault, pack=PACK)
    assert wrong == [] and took == []


def list_packing(trace: str) -> list[tuple[str, int]]:
    "The calls of a trace that write a shard packed ahead, its note, or the pictures that are kept, as (name, which)."
    seen, points, held = Counter(), [], set()
    for call, rest, result in re.findall(r"^\d+ +(\w+)\((.*)\) += +(-?\d+)", trace, re.M):
        seen[call] += 1
        number = rest.split(",")[0]
        if re.search("cache/(packed|thumbs)", rest) or number in held: points.append((call, seen[call]))
        if call == "openat" and re.search("cache/(packed|thumbs)", rest): held.add(result)
        if call == "close": held.discard(number)
    return [point for point in points if point[0] != "close"]


@pytest.mark.parametrize("fault", ["error=ENOSPC", "error=EIO"])
def test_a_full_and_a_failing_disk(bench, tmp_path, fault):
    points = list_points(bench, tmp_path/"trace", "write,pwrite64,fsync,fdatasync,mkdir,rename,ftruncate")
    chosen = points if FULL else points[::4]      # of every call alike
    took, wrong = sweep(bench, chosen, fault)
    assert wrong == []
    assert len(took) >= .8*len(chosen)
    # What an ingest may live through is SQLite's moving of its log into the journal: the log still has everything.
    assert {call for call, _ in set(chosen) - set(took)} <= {"pwrite64", "fdatasync", "ftruncate"}


@pytest.mark.parametrize("fault", ["error=ENOSPC", "error=EIO"])
def test_a_full_disk_finds_a_write_that_is_taken_for_good(bench, tmp_path, fault):
    points = list_points(bench, tmp_path/"trace", "write", plant="swallow")
    assert any("torn" in line for line in sweep(bench, points, fault, until="torn", plant="swallow")[1])


def test_a_failing_disk_finds_an_fsync_that_nobody_hears(bench, tmp_path):
    "Sound code gives up at every fsync that fails; where the error is swallowed, what the disk refused would be acknowledged."
    points = list_points(bench, tmp_path/"trace", "fsync")
    assert sweep(bench, points, "error=EIO")[0] == points
    assert len(sweep(bench, points, "error=EIO", plant="deaf")[0]) < len(points)/2


def lose_power(bench: Bench, tmp_path: Path, states: int, first: str = "", late: bool = False, **more) -> Iterator[str]:
    """Record ingests, rebuild states that the disk may be in after a power loss, and check each.

    `first` is a fault of an earlier ingest; `late` is after the first acknowledgement."""
    lines = []
    for k, fault in enumerate([first, ""] if first else [""]):
        options = ["-xx", "-s", "10000000", "-e", f"trace={RECORDED}", *(["-e", f"inject={fault}"] if fault else [])]
        bench.children.trace(bench.job(**more), *options, out=tmp_path/f"trace{k}")
        lines += (tmp_path/f"trace{k}").read_text().splitlines()
    rng, changes, disk = random.Random(0), [], Disk(bench.root)
    for at, line in enumerate(lines):
        if disk.play(line, str(bench.acks)) and (disk.acks or not late): changes.append(at)
    assert disk.acks == read_acks(bench.acks) and len(disk.acks) >= 6
    stops = sorted(rng.choices(changes, k=states))
    disk, at = Disk(bench.root), 0
    for stop in stops:
        while at <= stop:
            disk.play(lines[at], str(bench.acks))
            at += 1
        bench.reset()
        disk.lose_power(bench.root, rng)
        bench.acks.write_text("".join(f"{sha} {what}\n" for sha, what in disk.acks.items()))
        yield from (f"after {at} of {len(lines)} calls: {what}" for what in bench.check())


def test_power_lost(bench, tmp_path):
    assert list(lose_power(bench, tmp_path, 500 if FULL else 40)) == []


def test_power_lost_after_a_kill(bench, tmp_path):
    assert list(lose_power(bench, tmp_path, 500 if FULL else 30, first="fsync:signal=KILL:when=2")) == []


@pytest.mark.parametrize("fault, first, what", [
    ("fsync", "", "torn"), ("folder", "", "lost"), ("rename", "", "torn"), ("early", "", "lost"), ("recover", "fsync:signal=KILL:when=2", "lost"),
])
def test_power_loss_finds_what_is_planted(bench, tmp_path, fault, first, what):
    assert any(what in line for line in lose_power(bench, tmp_path, 100, late=True, plant=fault, first=first))


def test_power_lost_while_packing(bench, tmp_path):
    assert list(lose_power(bench, tmp_path, 500 if FULL else 25, pack=PACK)) == []


def test_power_loss_finds_a_note_that_comes_before_its_shard(bench, tmp_path):
    assert any("torn packed" in line for line in lose_power(bench, tmp_path, 100, pack=PACK, plant="note"))


def test_kills_find_a_rename_that_is_none(bench, tmp_path):
    points = list_points(bench, tmp_path/"trace", "write", plant="rename")
    assert any("torn" in line for line in sweep(bench, points, "signal=KILL", until="torn", plant="rename")[1])


def test_a_damaged_blob_is_mended_by_its_source(bench):
    bench.children.run(bench.job())
    damage(bench)
    assert [what[:4] for what in audit(bench.root, read_acks(bench.acks))] != []
    assert [what for what in bench.check() if "torn" not in what and "lost" not in what] == []
    assert audit(bench.root, read_acks(bench.acks)) == []


def test_damage_stays_where_the_hash_is_not_checked(bench):
    bench.children.run(bench.job())
    damage(bench)
    bench.children.run(bench.job(plant="hash"))
    assert any("torn" in what for what in audit(bench.root, read_acks(bench.acks)))


def damage(bench: Bench) -> None:
    "Flip a bit of one blob, cut another, empty a third."
    blobs = sorted(p for p in (bench.root/".cvops/store/blobs").rglob("*") if p.is_file())
    for path, data in zip(blobs, (lambda d: d[:30] + bytes([d[30] ^ 1]) + d[31:], lambda d: d[:-7], lambda d: b""), strict=False):
        path.write_bytes(data(path.read_bytes()))


def kill_at_random(bench: Bench, kills: int, until: str = "nothing", **more) -> tuple[int, int, list[str]]:
    """SIGKILL ingests with all their threads at random moments, four on one store and then on the next. How many died, how many of
    them after they had acknowledged something and before they were done, and what was wrong. Ends early where `until` is found.

    The moments are drawn over the time that an ingest takes, which is found out on the way: on a busy machine it is another one."""
    rng, died, midway, wrong, length = random.Random(kills), 0, 0, [], .1
    for k in range(kills):
        if k % 4 == 0: bench.reset()
        begin, pid, before = time.monotonic(), bench.children.start(bench.job(chunk=2, **more)), len(read_acks(bench.acks))
        time.sleep(rng.uniform(0, length))
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
        code, acks = bench.children.wait(), read_acks(bench.acks)
        died += code == -signal.SIGKILL
        midway += code == -signal.SIGKILL and len(acks) > before
        length = max(.005, .95*min(length, time.monotonic() - begin)) if code == 0 else 1.02*length
        wrong += [f"kill {k}: {what}" for what in audit(bench.root, acks)]
        if any(until in what for what in wrong): break
    return died, midway, [*wrong, *bench.check()]


@pytest.mark.parametrize("watch", [None, {"settle": 0, "give_up": 0}], ids=["ingest", "inbox"])
def test_killed_at_random(bench, watch):
    kills = 3000 if FULL else 60
    died, midway, wrong = kill_at_random(bench, kills, watch=watch)
    print(f"{died} of {kills} died, {midway} of them between an acknowledgement and the end")
    assert wrong == []
    assert died > kills/3 and (not FULL or midway > kills/100)


def test_random_kills_find_an_acknowledgement_that_comes_too_early(bench):
    assert any("lost" in what for what in kill_at_random(bench, 400, until="lost", plant="hasty")[2])


def burst(bench: Bench, folder: Path, count: int, **more) -> list[str]:
    "So many files at once; what was wrong."
    bench.source = folder
    folder.mkdir()
    for number in range(count): (folder/f"{number}.jpg").write_bytes(make_photo(number, 16))
    code, acks = bench.children.run(bench.job(chunk=256, **more)), read_acks(bench.acks)
    wrong = [f"it ended with {code}"]*(code != 0) + [f"{len(acks)} of {count} were acknowledged"]*(len(acks) != count)
    return wrong + [f"{sha} was taken for {what}" for sha, what in acks.items() if what != "image"] + bench.check()


@pytest.mark.parametrize("clock", [3600, -3600])
def test_a_burst_and_a_clock_that_steps(bench, tmp_path, clock):
    assert burst(bench, tmp_path/"burst", (20_000 if clock > 0 else 2_000) if FULL else 600, clock=clock) == []


def test_a_burst_finds_a_queue_that_drops(bench, tmp_path):
    assert any("were acknowledged" in what for what in burst(bench, tmp_path/"burst", 600, plant="drop"))


def test_slow_writers_while_the_watch_is_killed(bench, tmp_path):
    "Writers in real time, half of which give up; the watch is killed and started again."
    (count, seconds), rng = (200, 12.) if FULL else (60, 2.5), random.Random(3)
    bench.source = tmp_path/"slow"
    bench.source.mkdir()
    photos = [make_photo(number, 32) for number in range(count)]
    writers = [Thread(target=write_slowly, args=(bench.source/f"cam{k % 4}"/f"{k}.jpg", photo, k % 2 == 1, rng.uniform(.1, seconds))) for k, photo in enumerate(photos)]
    for writer in writers: writer.start()
    watch, died = {"settle": .2, "give_up": 1., "seconds": 60.}, 0
    while any(writer.is_alive() for writer in writers):
        pid = bench.children.start(bench.job(watch=watch))
        time.sleep(rng.uniform(.05, seconds/4))
        os.kill(pid, signal.SIGKILL)
        died += bench.children.wait() == -signal.SIGKILL
        assert audit(bench.root, read_acks(bench.acks)) == []
    assert died >= 2
    assert bench.children.run(bench.job(watch=watch | {"seconds": 2.5})) == 0
    acks = read_acks(bench.acks)
    assert {sha for sha, what in acks.items() if what == "image"} == {hashlib.sha256(photo).hexdigest() for photo in photos[::2]}
    assert {hashlib.sha256(photo[:len(photo)//2]).hexdigest() for photo in photos[1::2]} <= {sha for sha, what in acks.items() if what == "abandoned"}
    assert audit(bench.root, acks) == []


def write_slowly(path: Path, data: bytes, gives_up: bool, seconds: float) -> None:
    "Six pieces; one that gives up writes half of the bytes."
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data[:len(data)//2] if gives_up else data
    with open(path, "wb", buffering=0) as file:
        for k in range(6):
            file.write(data[len(data)*k//6:len(data)*(k + 1)//6])
            time.sleep(seconds/6)
