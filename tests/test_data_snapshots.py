"Shards, snapshots and DVC: the same content twice costs nothing, a flipped bit is named, a kill leaves the old version or the new."
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput, BadRecord, MissingTool, NoRoom, ToolFailed, UnknownName
from cvops_wb.core.records import parse_record
from cvops_wb.core.settings import load_settings
from cvops_wb.data import snapshots
from cvops_wb.data.curation import CurateSpec, curate
from cvops_wb.data.intake import IngestSpec, ingest
from cvops_wb.data.shards import build_shard, index_shards, list_shards, pack_images, read_index
from cvops_wb.data.snapshots import (
    SnapshotSpec,
    draw_snapshot,
    ensure_dvc,
    find_snapshot,
    open_snapshot,
    push_data,
    read_current,
    run_dvc,
    take_snapshot,
    version_data,
)
from cvops_wb.data.store import read_samples

REPO = Path(__file__).parents[1]


def room(settings, run: str):
    "The folder of a run."
    path = settings.reports/run
    path.mkdir(parents=True, exist_ok=True)
    return path


def select(settings, source, run: str = "1", **spec):
    "Ingest and curate."
    return curate(ingest(str(source), IngestSpec(), room(settings, f"ingest-{run}")), CurateSpec(**spec), room(settings, f"curate-{run}"))


def make_bench(root: Path):
    root.mkdir(parents=True)
    shutil.copy(REPO/"settings.ini", root)
    os.environ["CVOPS_ROOT"] = str(root)
    return load_settings(root)


@pytest.fixture(scope="module")
def shelf(photos, tmp_path_factory):
    "A workbench without git whose first snapshot was taken and pushed."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVOPS_ROOT", "")
        settings = make_bench(tmp_path_factory.mktemp("shelf")/"bench")
        selection = select(settings, photos)
        yield settings, selection, take_snapshot(selection, SnapshotSpec("the first"), room(settings, "snapshot"))


def copy_bench(shelf, tmp_path, monkeypatch):
    "The shelf again, to be spoiled."
    settings, selection, snapshot = shelf
    shutil.copytree(settings.root, tmp_path/"copy")
    monkeypatch.setenv("CVOPS_ROOT", str(tmp_path/"copy"))
    return load_settings(tmp_path/"copy"), selection, snapshot


@pytest.mark.parametrize("sizes", [[], [0], [1, 511, 512, 513], [10_000]*7])
def test_a_shard_is_a_tar(sizes, tmp_path):
    words = [os.urandom(size) for size in sizes]
    names = [hashlib.sha256(word).hexdigest() for word in words]
    data = build_shard(zip(names, [".jpg"]*len(names), words, strict=True))
    assert data == build_shard(zip(names, [".jpg"]*len(names), words, strict=True))
    path = tmp_path/"one.tar"
    path.write_bytes(data)
    with tarfile.open(path) as tar: assert tar.getnames() == ["index.json", *(f"{n}.jpg" for n in names)]
    assert [read_index(path)[name].read() for name in names] == words


@pytest.mark.parametrize("cut", [0, 100, 600, 700])
def test_a_torn_shard(cut, tmp_path):
    path = tmp_path/"one.tar"
    path.write_bytes(build_shard([("a"*64, ".jpg", b"tea")])[:cut])
    with pytest.raises(BadRecord): index_shards([path])["a"*64].read()


def test_what_is_new_goes_into_new_shards(tmp_path):
    store = {hashlib.sha256(b"%d" % k).hexdigest(): b"%d" % k*100 for k in range(100)}
    store = {hashlib.sha256(word).hexdigest(): word for word in store.values()}
    wanted, reads = [(name, ".png", len(word)) for name, word in store.items()], []
    first = list_shards(pack_images(wanted[:60], tmp_path, store.get, most=2000))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    whole = list_shards(pack_images(wanted, tmp_path, lambda name: reads.append(name) or store[name], most=2000))
    assert len(reads) == 40 and set(first) < set(whole) and {name: (tmp_path/name).stat().st_mtime_ns for name in before} == before
    assert list_shards(pack_images(wanted[:60], tmp_path, None, most=2000)) == first


def test_a_snapshot(shelf):
    settings, selection, snapshot = shelf
    table, reader = read_samples(selection.samples, settings), open_snapshot(snapshot)
    assert snapshot.pushed and snapshot.dvc.endswith(".dir") and (snapshot.parent, snapshot.message) == ("", "the first")
    assert read_current() == snapshot.id == reader.digest and snapshot.count == selection.count and snapshot.splits == selection.splits
    assert reader.classes == sorted(selection.classes) == snapshot.classes and reader.table.equals(table.sort_values("id", ignore_index=True))
    assert sum(len(reader.select(split)) for split in snapshot.splits) == snapshot.count
    assert all(hashlib.sha256(reader.read(row.id)).hexdigest() == row.sha256 for row in table.itertuples())
    assert all((settings.root/name).is_file() for name in [snapshot.samples, *snapshot.shards])
    assert (settings.root/"data.dvc").read_text().startswith('desc: "the first"\n')
    assert list((settings.root/".cvops"/"remote"/"files").rglob("*.dir")) and draw_snapshot(snapshot).width > 200
    written = json.loads((settings.versioned/"snapshots"/f"{snapshot.id}.json").read_text())
    assert parse_record(written) == replace(snapshot, dvc="", pushed=False)
    with pytest.raises(BadInput, match="no image of this id"): reader.read("0"*16)


@pytest.mark.parametrize("name, found", [("", True), ("whole", True), ("short", True), ("ffff0000", False)])
def test_a_snapshot_is_found(name, found, shelf):
    _, _, snapshot = shelf
    name = {"whole": snapshot.id, "short": snapshot.id[:5]}.get(name, name)
    if found: assert find_snapshot(name).id == snapshot.id
    else: pytest.raises(UnknownName, find_snapshot, name)


@pytest.mark.slow
def test_the_same_again_and_more(shelf, photos, tmp_path, monkeypatch):
    settings, selection, snapshot = copy_bench(shelf, tmp_path, monkeypatch)
    again = take_snapshot(selection, SnapshotSpec(push=False), room(settings, "again"))
    assert again == replace(snapshot, pushed=False)

    shutil.copytree(photos, tmp_path/"more")
    for k in range(6):
        path = tmp_path/"more"/"lime"/f"{k:02}.jpg"
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path.with_name(f"new{k}.jpg"), quality=85)
    more = take_snapshot(select(settings, tmp_path/"more", "2"), SnapshotSpec("limes"), room(settings, "more"))
    assert more.id != snapshot.id and more.parent == snapshot.id
    assert set(snapshot.shards) < set(more.shards) and len(more.shards) == len(snapshot.shards) + 1
    old, new = open_snapshot(snapshot).table.set_index("id"), open_snapshot(more).table.set_index("id")
    assert (new.split[old.index] == old.split).all() and len(new) == len(old) + 6
    assert len(open_snapshot(snapshot).read(old.index[0])) == old.bytes.iloc[0]

    back = take_snapshot(selection, SnapshotSpec(push=False), room(settings, "back"))
    assert (back.id, back.parent, back.message, read_current()) == (snapshot.id, "", "the first", snapshot.id)


@pytest.mark.slow
def test_a_clone_pulls_and_reads(shelf, tmp_path, monkeypatch):
    "git carries data.dvc and the DVC config; the rest comes from the remote, verified."
    settings, _, snapshot = shelf
    clone = tmp_path/"clone"
    monkeypatch.setenv("CVOPS_ROOT", str(clone))
    here = make_bench(clone)
    shutil.copytree(settings.root/".cvops"/"remote", clone/".cvops"/"remote")
    shutil.copy(settings.root/"data.dvc", clone)
    run_dvc(here, ["pull"])
    reader = open_snapshot(find_snapshot())
    assert reader.digest == snapshot.id and all(len(reader.read(row.id)) == row.bytes for row in reader.table.itertuples())

    shutil.rmtree(clone/"data")
    shutil.rmtree(clone/".dvc"/"cache")
    largest = max((clone/".cvops"/"remote").rglob("*"), key=lambda path: path.stat().st_size*path.is_file())
    spoil(largest)
    with pytest.raises(ToolFailed): run_dvc(here, ["pull"])
    assert not [path for path in (clone/"data").rglob("*") if path.is_file() and path.stat().st_size == largest.stat().st_size]


def spoil(path: Path) -> None:
    "Flip a bit in the middle."
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("what, says", [("shard", "damaged"), ("table", "changed"), ("no shard", "cannot be read"), ("no table", "not there")])
def test_damage_is_named(what, says, shelf, tmp_path, monkeypatch):
    settings, _, snapshot = copy_bench(shelf, tmp_path, monkeypatch)
    path = settings.root/(snapshot.shards[0] if "shard" in what else snapshot.samples)
    if what.startswith("no "): path.unlink()
    else: spoil(path)
    def read_all():
        reader = open_snapshot(snapshot)
        for id in reader.table["id"]: reader.read(id)
    with pytest.raises(BadRecord, match=says): read_all()


@pytest.mark.parametrize("git", ["none", "here", "above"])
def test_dvc_with_and_without_git(git, workbench):
    root = {"here": workbench.root, "above": workbench.root.parent}.get(git)
    if root: subprocess.run(["git", "init", "-q", root], check=True)
    (workbench.versioned/"registry").mkdir(parents=True)
    (workbench.versioned/"registry"/"events.jsonl").write_text('{"event": "registered"}\n')
    digest = version_data('a "first" word: é')
    pointer = (workbench.root/"data.dvc").read_text()
    assert digest in pointer and json.loads(pointer.splitlines()[0].removeprefix("desc: ")) == 'a "first" word: é'
    assert ("no_scm" in ensure_dvc(workbench).read_text()) == (git == "none")
    if root: assert subprocess.run(["git", "check-ignore", "-q", "data"], cwd=workbench.root).returncode == 0


def test_the_config_of_a_person_is_kept(workbench):
    config = workbench.root/".dvc"/"config"
    config.parent.mkdir()
    config.write_text('[core]\n    autostage = true\n[cache]\n    type = "reflink,copy"\n[\'remote "mine"\']\n    url = s3://bucket/x\n')
    text = ensure_dvc(workbench).read_text()
    wanted = ("autostage = true", 'type = "reflink,copy"', "s3://bucket/x", "verify = true", "remote = cvops", "url = ../.cvops/remote")
    assert all(words in text for words in wanted)
    before = config.stat().st_mtime_ns
    assert ensure_dvc(workbench).read_text() == text and config.stat().st_mtime_ns == before


@pytest.mark.parametrize("remote, url", [(".cvops/remote", "../.cvops/remote"), ("/mnt/store", "/mnt/store"), ("s3://bucket/a", "s3://bucket/a")])
def test_where_the_remote_is(remote, url, workbench, monkeypatch):
    monkeypatch.setenv("CVOPS_DATA_REMOTE", remote)
    assert f"url = {url}\n" in ensure_dvc(load_settings()).read_text()


def test_without_dvc(workbench, monkeypatch):
    monkeypatch.setattr(snapshots, "find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="dvc"): run_dvc(workbench, ["status"])
    assert version_data("x").endswith(".dir")       # a version itself needs none


def test_nothing_to_push(workbench):
    with pytest.raises(BadInput, match="no version to push"): push_data()


def test_a_remote_that_is_a_file(workbench, monkeypatch):
    (workbench.root/"blocked").write_text("")
    monkeypatch.setenv("CVOPS_DATA_REMOTE", "blocked")
    (workbench.versioned).mkdir()
    (workbench.versioned/"a").write_text("a")
    with pytest.raises(ToolFailed, match="could not be pushed"): version_data("x", push=True)
    assert (workbench.root/"data.dvc").is_file()
    monkeypatch.delenv("CVOPS_DATA_REMOTE")
    push_data()
    assert (workbench.root/".cvops"/"remote"/"files").is_dir()


@pytest.mark.slow
def test_a_full_disk(workbench, tmp_path, monkeypatch):
    "The remote on a file system of 64 kB: told as such, and the version before is untouched."
    full = tmp_path/"full"
    full.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full], capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        monkeypatch.setenv("CVOPS_DATA_REMOTE", str(full))
        workbench.versioned.mkdir()
        (workbench.versioned/"a").write_bytes(os.urandom(300_000))
        with pytest.raises(NoRoom, match="disk is full"): version_data("x", push=True)
    finally: subprocess.run(["umount", full], check=True)


def test_two_versions_at_once(workbench):
    "The second waits; both tell the truth."
    workbench.versioned.mkdir()
    (workbench.versioned/"a").write_text("a")
    program = "from cvops_wb.data.snapshots import version_data; print(version_data('x'))"
    with ThreadPoolExecutor(2) as pool:
        run = lambda _: subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=workbench.root)
        done = list(pool.map(run, range(2)))
    assert [d.returncode for d in done] == [0, 0] and done[0].stdout == done[1].stdout != ""


KILLED = """
import json, sys
from pathlib import Path
from cvops_wb.core.records import parse_record
from cvops_wb.data.snapshots import SnapshotSpec, take_snapshot
print("go", flush=True)
take_snapshot(parse_record(json.loads(sys.argv[1])), SnapshotSpec("second"), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_version_or_the_new(shelf, photos, tmp_path, monkeypatch):
    settings, _, snapshot = copy_bench(shelf, tmp_path, monkeypatch)
    selection = select(settings, photos, "2", seed=3)
    out, pointer = room(settings, "killed"), settings.root/"data.dvc"
    seen = {pointer.read_text()}
    command = [sys.executable, "-c", KILLED, json.dumps(selection.to_dict()), str(out)]
    for wait in (.03, .3, 1., 1.6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout.readline() == "go\n"
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.add(pointer.read_text())
        assert len(open_snapshot(snapshot).table) == 40 and open_snapshot(find_snapshot()).read(open_snapshot(snapshot).table["id"][0])
    last = take_snapshot(selection, SnapshotSpec("second"), out)
    assert last.parent == snapshot.id and last.dvc in pointer.read_text() and not list(settings.versioned.rglob("*.part"))
    digests = {line.split()[-1] for text in seen for line in text.splitlines() if line.startswith("- md5")}
    assert digests <= {snapshot.dvc, last.dvc}


def test_only_new_shards_are_listed(tmp_path, monkeypatch):
    "What stands in a shard is remembered; what was remembered and is damaged is asked again."
    from cvops_wb.data import shards
    store = {hashlib.sha256(b"%d" % k).hexdigest(): b"%d" % k*100 for k in range(100)}
    store = {hashlib.sha256(word).hexdigest(): word for word in store.values()}
    wanted, asked, kept = [(name, ".png", len(word)) for name, word in store.items()], [], tmp_path/"kept"
    monkeypatch.setattr(shards, "list_images", lambda path, real=shards.list_images: asked.append(path.name) or real(path))
    def pack(count):
        asked.clear()
        return pack_images(wanted[:count], tmp_path/"shards", store.get, most=2000, kept=kept)
    first = set(list_shards(pack(60)))
    whole = pack(100)
    assert set(asked) == set(list_shards(whole)) - first and len(first) > 4
    assert pack(100).get(wanted[7][0]) == whole.get(wanted[7][0]) and asked == []
    kept.write_bytes(kept.read_bytes()[:-3])
    assert pack(100).get(wanted[7][0]) == whole.get(wanted[7][0]) and set(asked) == set(list_shards(whole))
    path, start, size, name = whole.get(wanted[7][0][:16])
    assert name == wanted[7][0] and path.read_bytes()[start:start + size] == store[name]
