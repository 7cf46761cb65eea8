"kill -9 at any point of add, push, pull: the old version or the new one stands, and the repository works. Killed from outside, at a chosen system call."
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_data_snapshots import make_bench, select

from cvops_wb.core.errors import BadRecord
from cvops_wb.core.settings import load_settings
from cvops_wb.data import shards
from cvops_wb.data.snapshots import find_snapshot, open_snapshot, read_current, read_pointer, version_data
from cvops_wb.data.store import read_blob, read_samples
from cvops_wb.data.versions import integrity
from cvops_wb.data.versions.integrity import check_data, pull_data
from cvops_wb.data.versions.objects import Objects, Report, read_listing

FULL = bool(os.environ.get("CVOPS_FULL"))
CALLS = "openat,write,pwrite64,rename,renameat,renameat2,link,linkat,unlink,unlinkat,fsync,fdatasync,mkdir,chmod,fchmod,copy_file_range,sendfile,ftruncate"
PULL = "from cvops_wb.data.versions.integrity import pull_data; pull_data()"
PUSH = "from cvops_wb.data.snapshots import version_data; version_data('second', push=True)"
pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    "Thirty files in a pushed version."
    settings = make_bench(tmp_path/"bench")
    monkeypatch.setenv("CVOPS_ROOT", str(settings.root))
    for k in range(30):
        path = settings.versioned/"shards"/f"{k}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(k).randbytes(3000))
    (settings.versioned/"current").write_text("one\n")
    version_data("first", push=True)
    return settings


def read_all(settings):
    "Name → bytes of what stands in `data/`, half-written files left out."
    root = settings.versioned
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and not p.name.endswith(".part")}


def list_points(program, tmp_path):
    "Each (system call, its number in its thread) that the program makes once it is on its way, in order: strace counts by call and by thread."
    log, counts, points, begun = tmp_path/"trace", Counter(), [], False
    subprocess.run(["strace", "-f", "-qq", "-o", log, "-e", f"trace={CALLS}", sys.executable, "-c", program], check=True, capture_output=True)
    for line in log.read_text(errors="replace").splitlines():
        found = re.match(r"(\d+) +(\w+)\(", line)
        if not found: continue
        counts[found.groups()] += 1
        begun = begun or "version.lock" in line
        if begun: points.append((found[2], counts[found.groups()]))
    return points


def kill_at(program, point):
    "Killed when this call is entered; True if it came to that."
    name, number = point
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}", sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, start_new_session=True).returncode != 0


def test_a_pull_that_is_killed(bench, tmp_path, monkeypatch):
    "At call after call of a pull into a clone: every file that has its name is whole, and the next pull ends it."
    wanted = read_all(bench)
    def empty():
        shutil.rmtree(bench.versioned, ignore_errors=True)
        shutil.rmtree(bench.root/".dvc"/"cache", ignore_errors=True)
    empty()
    found = list_points(PULL, tmp_path)
    assert read_all(bench) == wanted
    points = found if FULL else random.Random(1).sample(found, 5)
    killed = 0
    for at in points:
        empty()
        killed += kill_at(PULL, at)
        now = read_all(bench)
        assert all(wanted[name] == data for name, data in now.items()), f"torn at call {at}"
        assert "current" not in now or now == wanted, f"current before the rest at call {at}"
        pull_data()
        assert read_all(bench) == wanted, f"not mended after call {at}"
    assert killed >= .8*len(points)


def test_add_and_push_that_are_killed(bench, tmp_path):
    "The pointer names the first version or the second, whichever it is can be pulled whole, and the next call ends the work."
    first = read_pointer(bench)
    (bench.versioned/"shards"/"new.bin").write_bytes(random.Random(99).randbytes(5000))
    (bench.versioned/"current").write_text("two\n")
    start = tmp_path/"start"
    subprocess.run(["cp", "-a", bench.root, start], check=True)
    points = list_points(PUSH, tmp_path)
    second, wanted = read_pointer(bench), read_all(bench)
    chance, killed = random.Random(2), 0
    # the objects and the pointer are written in the last part
    chosen = chance.sample(points, 100 if FULL else 1) + chance.sample(points[-len(points)//4:], 100 if FULL else 1)
    for at in chosen:
        shutil.rmtree(bench.root)
        subprocess.run(["cp", "-a", start, bench.root], check=True)
        killed += kill_at(PUSH, at)
        digest = read_pointer(bench)
        assert digest in (first, second) and read_all(bench) == wanted, f"at call {at}"
        listing = read_listing(Objects(bench, Report()), digest)
        assert all(Objects(bench, Report()).find(md5, name) for name, md5 in listing.items()), f"at call {at}"
        assert version_data("second", push=True) == second, f"the next call does not end the work, at call {at}"
        shutil.rmtree(bench.root/".dvc"/"cache"); shutil.rmtree(bench.versioned)
        pull_data()
        assert read_all(bench) == wanted
    assert killed >= (.5*len(chosen) if FULL else 1)


SNAPSHOT = """
from cvops_wb.core.settings import load_settings
from cvops_wb.data.snapshots import locked, record_version
from cvops_wb.data.store import read_samples
settings = load_settings()
table = read_samples("{samples}").sort_values("id", ignore_index=True)
with locked(settings): record_version(settings, table, "first")
"""


def test_a_snapshot_of_shards_packed_ahead_that_is_killed(photos, tmp_path, monkeypatch):
    "No version or a whole one; every image can be read, and the next call ends the work, whatever of the shards was taken in."
    settings = make_bench(tmp_path/"bench")
    monkeypatch.setenv("CVOPS_ROOT", str(settings.root))
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(shards, "WINDOW", 1)
    selection = select(settings, photos)
    ahead, start = settings.cache/shards.AHEAD, tmp_path/"start"
    packed = {path.name for path in ahead.glob("*.tar")}
    # links, not copies: a note knows its shard by the inode
    subprocess.run(["cp", "-al", settings.root, start], check=True)
    program = SNAPSHOT.format(samples=selection.samples)
    points = list_points(program, tmp_path)
    version, rows = read_current(settings), read_samples(selection.samples, settings)
    assert len(packed) >= 4 and packed < {path.name for path in (settings.versioned/"shards").glob("*.tar")} and not list(ahead.iterdir())
    killed, chosen = 0, random.Random(3).sample(points, 80 if FULL else 3)
    for at in chosen:
        shutil.rmtree(settings.root)
        subprocess.run(["cp", "-al", start, settings.root], check=True)
        killed += kill_at(program, at)
        assert read_current(settings) in ("", version) and (not read_pointer(settings) or read_current(settings) == version), f"at call {at}"
        listing = read_listing(Objects(settings, Report()), read_pointer(settings)) if read_pointer(settings) else {}
        assert all(Objects(settings, Report()).find(md5, name) for name, md5 in listing.items()), f"at call {at}"
        assert all(len(read_blob(row, settings)) == row.bytes for row in rows.itertuples()), f"at call {at}"
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        assert read_current(settings) == version and check_data(settings) == [] and not list(settings.versioned.rglob("*.part")), f"at call {at}"
        assert all(len(open_snapshot(find_snapshot()).read(row.id)) == row.bytes for row in rows.itertuples())
    assert killed >= .5*len(chosen)


def test_the_suite_sees_a_planted_bug(bench, monkeypatch):
    "A pull that copies straight to the name leaves a torn file when the copy breaks off."
    def torn(source, place):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        with open(place, "wb") as file:
            file.write(source.read_bytes()[:1000])
            raise KeyboardInterrupt
    monkeypatch.setattr(integrity, "_link", torn)
    wanted = read_all(bench)
    shutil.rmtree(bench.versioned)
    with pytest.raises(KeyboardInterrupt): pull_data()
    assert not all(wanted[name] == data for name, data in read_all(bench).items())


def test_nothing_is_left_over(bench):
    "What a killed pull left half-written is swept by the next."
    left = bench.versioned/"shards"/".1.bin.77.part"
    left.write_bytes(b"half")
    pull_data()
    assert not left.exists() and not [p for p in bench.root.rglob("*.part")]


def test_no_version(bench):
    (bench.root/"data.dvc").write_text("outs:\n- md5: " + "0"*32 + ".dir\n  path: data\n")
    with pytest.raises(BadRecord, match="list of files"): pull_data()
    assert load_settings().root == bench.root
