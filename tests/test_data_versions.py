"Versions: listed, compared, brought back; every flipped bit and every cut in cache, remote or folder is named and none is accepted."
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_data_snapshots import make_bench, room, select

from cvops_wb.core.errors import BadRecord, UnknownName, WrongUsage
from cvops_wb.core.settings import load_settings
from cvops_wb.data import shards
from cvops_wb.data.snapshots import SnapshotSpec, find_snapshot, open_snapshot, read_current, take_snapshot
from cvops_wb.data.store import read_samples, write_samples
from cvops_wb.data.versions import integrity, objects, recording
from cvops_wb.data.versions.events import append_event, read_events
from cvops_wb.data.versions.history import compare_versions, draw_difference, list_versions, write_difference
from cvops_wb.data.versions.integrity import check_data, checkout_version, mend_version, pull_data

FULL = bool(os.environ.get("CVOPS_FULL"))
MAIN = [sys.executable, "-c", "from cvops_wb.loop.cli import main; main()"]
NASTY = "<script>alert(1)</script>"


def call(*arguments):
    "Run `cvops --json` in the current folder."
    done = subprocess.run([*MAIN, *arguments, "--json"], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    return done.returncode, json.loads(done.stdout)


def change(settings, selection, run, edit):
    "Another selection: the table as `edit` leaves it."
    table = edit(read_samples(selection.samples, settings).sort_values("id", ignore_index=True))
    path = write_samples(table, room(settings, run)/"samples.parquet")
    return replace(selection, samples=path.relative_to(settings.root).as_posix())


def edit_some(table):
    "Row 0 goes, row 1 gets another label (a hostile one), row 2 another split."
    table.loc[1, "label"] = NASTY
    table.loc[2, "split"] = "val" if table.loc[2, "split"] == "train" else "train"
    return table.iloc[1:].reset_index(drop=True)


@pytest.fixture(scope="module")
def history(photos, tmp_path_factory): yield from make_history(photos, tmp_path_factory.mktemp("history")/"bench")


@pytest.fixture(scope="module")
def crowd(photos, tmp_path_factory): yield from make_history(photos, tmp_path_factory.mktemp("crowd")/"bench", 25_000)


def make_history(photos, root, most=shards.SHARD_BYTES):
    "A workbench with two versions, both pushed; in one shard, or in as many as `most` bytes each make."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVOPS_ROOT", "")
        patch.setattr(shards, "SHARD_BYTES", most)
        settings = make_bench(root)
        selection = select(settings, photos)
        first = take_snapshot(selection, SnapshotSpec("the first"), room(settings, "snapshot-1"))
        second = take_snapshot(change(settings, selection, "curate-2", edit_some), SnapshotSpec("the second"), room(settings, "snapshot-2"))
        yield settings, first, second


@pytest.fixture
def copy(history, tmp_path, monkeypatch): return copy_history(history, tmp_path, monkeypatch)


@pytest.fixture
def many(crowd, tmp_path, monkeypatch): return copy_history(crowd, tmp_path, monkeypatch)


def copy_history(history, tmp_path, monkeypatch):
    "The same again, to be spoiled; links between data and cache kept as DVC made them."
    settings, first, second = history
    subprocess.run(["cp", "-a", settings.root, tmp_path/"bench"], check=True)
    monkeypatch.setenv("CVOPS_ROOT", str(tmp_path/"bench"))
    monkeypatch.chdir(tmp_path/"bench")
    return load_settings(tmp_path/"bench"), first, second


def test_the_log(copy):
    settings, first, second = copy
    found = list_versions()
    assert [v.snapshot.id for v in found] == [second.id, first.id] and [v.current for v in found] == [True, False]
    assert all(v.time and v.by for v in found) and found[0].snapshot.parent == first.id
    code, told = call("log")
    assert code == 0 and [v["message"] for v in told["versions"]] == ["the second", "the first"]


def test_the_difference(copy):
    settings, first, second = copy
    ids = sorted(open_snapshot(first).table["id"])
    found = compare_versions(first, second)
    assert (found.added, found.removed, list(found.relabelled), list(found.moved)) == ([], ids[:1], ids[1:2], ids[2:3]) and found.unchanged == 37
    assert found.relabelled[ids[1]][1] == NASTY
    back = compare_versions(second, first)
    assert back.added == ids[:1] and back.counts["unchanged"] == 37 and compare_versions(first, first).counts["unchanged"] == 40
    assert set(draw_difference(found)) == {"removed", "relabelled", "moved"}
    page = write_difference(found, settings.cache/"page.html").read_text()
    assert page.count("<img ") == 3 and "<script" not in page
    code, told = call("diff", first.id[:6])
    assert code == 0 and told["counts"] == found.counts and (settings.root/told["page"]).is_file()
    assert call("diff")[1]["counts"] == found.counts    # what the current version changed


@pytest.mark.parametrize("command", [["checkout"], ["diff"]])
def test_an_unknown_version_gets_a_suggestion(copy, command):
    _, first, _ = copy
    wrong = first.id[:-1] + ("0" if first.id[-1] != "0" else "1")
    code, told = call(*command, wrong)
    assert code == 2 and f"did you mean {first.id!r}?" in told["error"]["what"]


def test_checkout(copy):
    settings, first, second = copy
    before = (settings.root/"data.dvc").read_text()
    code, told = call("checkout", first.id[:5])
    after = (settings.root/"data.dvc").read_text()
    assert code == 0 and read_current() == first.id == find_snapshot().id and before != after and first.id in after
    from cvops_wb.loop.runs import find_run
    assert find_run(settings, "snapshot").record.id == first.id     # what `train` starts from
    assert len(open_snapshot(find_snapshot(second.id)).table) == 39     # the other is still there
    checkout_version(second.id)
    assert read_current() == second.id and {line for line in before.split("\n") if "md5" in line} == {line for line in (settings.root/"data.dvc").read_text().split("\n") if "md5" in line}


def test_a_dry_run_changes_nothing(copy):
    settings, first, second = copy
    assert call("checkout", first.id, "--dry-run")[0] == 0 and call("pull", "--dry-run")[0] == 0 and read_current() == second.id


def hashes(settings):
    "What stands below data/."
    from cvops_wb.core.files import hash_file
    return {p.relative_to(settings.versioned).as_posix(): hash_file(p) for p in settings.versioned.rglob("*") if p.is_file()}


def test_a_clone_pulls(copy):
    settings, first, second = copy
    wanted = hashes(settings)
    shutil.rmtree(settings.versioned)
    shutil.rmtree(settings.root/".dvc"/"cache")
    code, told = call("pull")
    assert code == 0 and hashes(settings) == wanted and told["report"]["brought"] == len(wanted) and told["report"]["damages"] == []
    assert pull_data().brought == 0


def test_what_no_version_holds_is_kept(copy):
    settings, _, _ = copy
    replace_bytes(settings.versioned/"events"/"versions.jsonl", b"mine\n")
    (settings.versioned/"new.txt").write_text("not in any version")
    report = pull_data()
    assert (Path(report.kept)/"events"/"versions.jsonl").read_bytes() == b"mine\n" and (settings.versioned/"new.txt").is_file()
    assert len(read_events(settings, "versions")) == 2


def replace_bytes(path, data, in_place=False):
    "Other bytes under a name; in place: also for the names that are linked to it."
    if in_place: path.chmod(0o644)
    else: path.unlink()
    path.write_bytes(data)
    if in_place: path.chmod(0o444)


def spoil(path, chance, in_place=True):
    "Flip one bit, or cut some bytes off."
    data = bytearray(path.read_bytes())
    if chance.random() < .5 and len(data): data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else: data = data[:chance.randrange(len(data))] if data else b"x"
    replace_bytes(path, bytes(data), in_place)


def campaign(settings, count, seed=0, places=("cache", "remote", "data")):
    "So many random flips and cuts; returns how many were accepted: bytes that are not the version's, or damage whose file nobody named."
    chance, wanted, accepted = random.Random(seed), hashes(settings), 0
    good = settings.root.parent/"good"
    subprocess.run(["cp", "-a", settings.root, good], check=True)
    stores = {"cache": settings.root/".dvc"/"cache"/"files"/"md5", "remote": settings.root/".cvops"/"remote"/"files"/"md5"}
    snapshot, digest = find_snapshot(), objects.read_pointer(settings)
    called = {md5: name for name, md5 in objects.read_listing(objects.Objects(settings, objects.Report()), digest).items()} | {digest: "the list of files"}
    for _ in range(count):
        spoiled = chance.sample(places, chance.choice((1, 1, 2)) if len(places) > 1 else 1)
        name = chance.choice(sorted(wanted))
        cold = "remote" in spoiled and chance.random() < .5     # a clone: no cache, no data
        if cold: shutil.rmtree(settings.versioned); shutil.rmtree(stores["cache"])
        objects_spoiled = {}
        for place in spoiled:
            if place != "data": path = chance.choice(sorted(p for p in stores[place].rglob("*") if p.is_file())) if stores[place].is_dir() else None
            else: path = settings.versioned/name if (settings.versioned/name).exists() else None
            if path: spoil(path, chance)
            if path: objects_spoiled[place] = name if place == "data" else called.get(path.parent.name + path.name, "")
        checkout = not cold and chance.random() < .5
        try: report = mend_version(settings, snapshot) if checkout else pull_data()
        except BadRecord as error: accepted += not any(name and f"{name} is {what}" in str(error) for name in objects_spoiled.values() for what in ("damaged", "missing"))
        except (KeyError, ValueError, TypeError): accepted += 1     # damaged bytes were read as if they were right
        else:
            now = hashes(settings)
            kinds = ("shards/", "samples/") if checkout else ("",)
            wrong = [n for n in wanted if n.startswith(kinds) and now.get(n) != wanted[n]]
            named = {d.name for d in report.damages}
            touched = {n for n in [name] if "data" in spoiled and n.startswith(("shards/", "samples/"))} if not cold else set()
            if objects_spoiled.get("cache") and not checkout: touched.add(objects_spoiled["cache"])     # a pull reads every object of the version
            accepted += bool(wrong) or not touched <= named
        shutil.rmtree(settings.root)
        subprocess.run(["cp", "-a", good, settings.root], check=True)
    shutil.rmtree(good)
    return accepted


@pytest.mark.parametrize("bench", ["copy", "many"])
def test_no_flipped_bit_and_no_cut_is_accepted(bench, request):
    settings, first, _ = request.getfixturevalue(bench)
    assert (len(first.shards) == 1) if bench == "copy" else (len(first.shards) >= 6)
    assert campaign(settings, 1000 if FULL else 40) == 0


@pytest.mark.parametrize("planted", ["no hash of objects", "no hash of data", "no name"])
def test_the_campaign_sees_a_planted_bug(many, monkeypatch, planted):
    if planted == "no hash of objects": monkeypatch.setattr(objects, "matches", lambda path, md5: path.is_file())
    elif planted == "no hash of data": monkeypatch.setattr(integrity, "_judge", lambda path: "" if path.is_file() else "missing")
    else: monkeypatch.setattr(integrity, "Damage", lambda place, name, *more: objects.Damage(place, "a file", *more))
    assert campaign(many[0], 25) > 0


@pytest.mark.parametrize("left", ["", "remote", "cache"])
def test_damage_without_a_good_copy_is_named(copy, left):
    "A shard is spoiled everywhere, or everywhere but in one place."
    settings, first, _ = copy
    name = Path(first.shards[0]).name
    shard = settings.versioned/"shards"/name
    copies = [p for root in (".dvc/cache", ".cvops/remote") for p in (settings.root/root).rglob("*") if p.is_file() and p.read_bytes() == shard.read_bytes()]
    assert len(copies) == 2
    kept = {"remote": copies[1], "cache": copies[0], "": None}[left]
    for path in (shard, *copies):
        if path != kept: replace_bytes(path, shard.read_bytes()[:-700] if path is not shard else path.read_bytes()[:-700])
    if left:
        report = mend_version(settings, first)
        assert check_data(settings) == [] and name in str(report.damages[0])
    else:
        with pytest.raises(BadRecord) as caught: checkout_version(first.id)
        assert f"shards/{name}" in str(caught.value) and "remote" in str(caught.value) and read_current() != first.id


@pytest.mark.parametrize("names", [["a"], ["b/c.txt", "b.txt", "b-c", "b/a", "é ü", "B/x"], [f"shards/{k}" for k in range(30)]])
def test_dvc_would_have_written_the_same(workbench, names):
    "To the byte: the list, the pointer; and DVC itself finds nothing to do."
    from cvops_wb.data.snapshots import run_dvc, version_data
    for name in names:
        path = workbench.versioned/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    digest = version_data("ours")
    pointer = workbench.root/"data.dvc"
    ours, cache = pointer.read_text(), sorted(p.name for p in (workbench.root/".dvc"/"cache").rglob("*") if p.is_file())
    assert "up to date" in run_dvc(workbench, ["status"])
    shutil.rmtree(workbench.root/".dvc"/"cache")
    pointer.unlink()
    run_dvc(workbench, ["add", "data"])
    assert digest in pointer.read_text() and pointer.read_text() == ours.split("\n", 1)[1]
    assert sorted(p.name for p in (workbench.root/".dvc"/"cache").rglob("*") if p.is_file()) == cache


def test_a_listing_cannot_leave_data(copy):
    settings, _, _ = copy
    here = integrity.Objects(settings, integrity.Report())
    from cvops_wb.core.errors import BadInput
    some = next(iter(integrity.read_listing(here, objects.read_pointer(settings)).values()))
    with pytest.raises(BadInput): integrity.bring(settings, here, {"../../out": some})
    assert not (settings.root.parent/"out").exists()


def test_events_cannot_be_changed_unseen(workbench):
    for k in range(3): append_event(workbench, "labels", sample=str(k))
    path = workbench.versioned/"events"/"labels.jsonl"
    lines = path.read_text().splitlines()
    for spoiled in (lines[1:], [lines[0], lines[2]], [lines[0], lines[1].replace('"1"', '"7"'), lines[2]], [*lines, "{"]):
        path.write_text("\n".join(spoiled) + "\n")
        with pytest.raises(BadRecord): read_events(workbench, "labels")


def test_unknown_names(copy, tmp_path):
    from cvops_wb.data.versions.backups import restore
    from cvops_wb.data.versions.corrections import find_ids
    with pytest.raises(UnknownName): checkout_version("nothing")
    with pytest.raises(WrongUsage, match="several samples"): find_ids(["ab12", "ab13"], ["ab"])
    with pytest.raises(WrongUsage, match="no such backup"): restore(tmp_path/"none.tar", tmp_path/"new")


def test_relabel_undo_and_history(copy):
    settings, _, second = copy
    from cvops_wb.data.versions.corrections import read_labels
    table = open_snapshot(second).table.set_index("id")
    chosen = list(table.index[table["label"] == "apple"][:2])
    code, told = call("relabel", *(id[:10] for id in chosen), "--to", "quince", "--by", "eva")
    new = open_snapshot(find_snapshot()).table.set_index("id")
    assert code == 0 and new.label[chosen].tolist() == ["quince"]*2 and new.labeled_by[chosen].tolist() == ["eva"]*2
    assert told["snapshot"]["parent"] == second.id and compare_versions(second, find_snapshot()).counts["relabelled"] == 2
    assert "quince" in find_snapshot().classes
    call("relabel", chosen[0], "--to", "pear")
    assert call("relabel", "--undo")[0] == 0 and open_snapshot(find_snapshot()).table.set_index("id").label[chosen].tolist() == ["quince"]*2
    assert call("relabel", "--undo")[0] == 0 and open_snapshot(find_snapshot()).table.set_index("id").label[chosen].tolist() == ["apple"]*2
    code, told = call("relabel", "--undo")
    assert code == 1 and "taken back" in told["error"]["what"]
    found = read_labels()
    assert found.event.tolist() == ["relabelled"]*3 + ["undone"]*3 and found.by.tolist()[:2] == ["eva"]*2 and found.time.map(bool).all()
    assert len(call("labels")[1]["events"]) == 6


def test_a_correction_outlives_the_next_snapshot(copy):
    settings, first, second = copy
    from cvops_wb.core.records import Selection
    from cvops_wb.data.versions.corrections import relabel
    id = open_snapshot(second).table["id"][0]
    relabel([id], "quince")
    again = take_snapshot(Selection("", first.samples, 0, 0, {}, {}, 0, "", {}), SnapshotSpec("again", push=False), room(settings, "again"))
    assert open_snapshot(again).table.set_index("id").label[id] == "quince" and again.id != first.id


@pytest.mark.parametrize("arguments, says", [(["0000000000000000", "--to", "tea"], "unknown sample"), (["--to", "tea"], "samples and a label"), ([], "samples and a label")])
def test_wrong_corrections(copy, arguments, says):
    code, told = call("relabel", *arguments)
    assert code == 2 and says in told["error"]["what"] and not (copy[0].versioned/"events"/"labels.jsonl").exists()


def holds(root, data):
    "Files below a folder in which these bytes stand."
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and data in p.read_bytes()]


@pytest.mark.parametrize("everywhere", [False, True])
def test_forget(copy, everywhere):
    settings, first, second = copy
    table = open_snapshot(second).table
    row = table[table["split"] != "none"].iloc[5]
    data, others = open_snapshot(second).read(row.id), {id: open_snapshot(second).read(id) for id in table["id"] if id != row.id}
    log_folder = settings.store/"predictions"
    log_folder.mkdir()
    (log_folder/"1-1.jsonl").write_text(f'{{"request_id": "a", "id": "{row.id}"}}\n{{"request_id": "b", "id": "{table["id"].iloc[0]}"}}\n')
    kept = settings.store/"kept"/row.id[:2]/row.id
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data)      # the service had kept it for a while
    told = call("forget", row.id[:12], *(["--history"] if everywhere else []), "--dry-run")[1]["receipt"]
    assert told["images"] == [row.sha256] and set(told["versions"]) == {first.id, second.id} and holds(settings.store, data)
    code, told = call("forget", row.id[:12], *(["--history"] if everywhere else []))
    receipt, now = told["receipt"], open_snapshot(find_snapshot())
    assert not kept.exists()
    assert code == 0 and row.id not in set(now.table["id"]) and len(now.table) == len(table) - 1
    assert {id: now.read(id) for id in others} == others
    assert not holds(settings.store, data) and row.id not in (log_folder/"1-1.jsonl").read_text() and receipt["predictions"]["rows"] == 1
    assert read_events(settings, "forgotten")[0]["images"] == [row.sha256] and "_gone" not in read_events(settings, "forgotten")[0]
    if everywhere:
        assert holds(settings.root, data) == [] and receipt["still_in"] == [] and set(receipt["renamed"]) == {first.id, second.id}
        assert all(row.id not in set(open_snapshot(v.snapshot).table["id"]) for v in list_versions()) and len(list_versions()) == 2
        shutil.rmtree(settings.versioned), shutil.rmtree(settings.root/".dvc"/"cache")
        assert pull_data().brought and len(open_snapshot(find_snapshot()).table) == len(table) - 1
    else: assert set(receipt["still_in"]) == {first.id, second.id} and open_snapshot(first).read(row.id) == data


def test_backup_and_restore(copy, monkeypatch, tmp_path):
    settings, first, second = copy
    code, told = call("backup", str(tmp_path/"kept.tar"))
    assert code == 0 and call("backup", str(tmp_path/"kept.tar"))[0] == 2
    wanted, blobs = hashes(settings), {p.name for p in (settings.store/"blobs").rglob("*.jpg")}
    assert call("restore", str(tmp_path/"kept.tar"), str(tmp_path/"new"))[0] == 0
    new = load_settings(tmp_path/"new")
    assert hashes(new) == wanted and {p.name for p in (new.store/"blobs").rglob("*.jpg")} == blobs
    monkeypatch.setenv("CVOPS_ROOT", str(new.root))
    from cvops_wb.data.store import list_samples
    assert len(list_samples(new)) == 40 and len(open_snapshot(find_snapshot(first.id)).table) == 40
    assert call("restore", str(tmp_path/"kept.tar"), str(tmp_path/"new"))[0] == 2


@pytest.mark.parametrize("how", ["flip", "cut", "escape", "link"])
def test_a_bad_backup_restores_nothing(copy, tmp_path, how):
    import io
    import tarfile

    from cvops_wb.core.errors import CvopsError
    from cvops_wb.data.versions.backups import back_up, restore
    path = tmp_path/"kept.tar"
    back_up(path)
    data = bytearray(path.read_bytes())
    if how == "flip": data[data.index(b"\xff\xd8\xff") + 900] ^= 1
    if how == "cut": data = data[:len(data)//2]
    path.write_bytes(data)
    if how in ("escape", "link"):
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo("../out" if how == "escape" else "data/a")
            if how == "link": member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(CvopsError): restore(path, tmp_path/"new")
    assert not (tmp_path/"new").exists() and not (tmp_path/"new.part").exists() and not (tmp_path/"out").exists()


def test_packed_images_may_leave_the_store(copy):
    settings, _, second = copy
    from cvops_wb.data.store import read_blob
    from cvops_wb.data.versions.packing import free_blobs, loosen_blobs
    rows = open_snapshot(second).table
    damaged = next((settings.versioned/"shards").glob("*.tar"))
    good = damaged.read_bytes()
    replace_bytes(damaged, good[:-2000] + b"x" + good[-1999:])
    assert free_blobs(settings)["images"] == 0      # its shard is damaged: the loose one is the only good one
    replace_bytes(damaged, good)
    assert free_blobs(settings, dry=True)["images"] == 40 == free_blobs(settings)["images"]
    assert not list((settings.store/"blobs").rglob("*.jpg")) and all(len(read_blob(row, settings)) == row.bytes for row in rows.itertuples())
    assert loosen_blobs(settings) == 40 and free_blobs(settings)["images"] == 40


def test_equal_files_become_one_object(workbench):
    "A registry holds a model twice; the threads that record a version meet at the same object."
    for turn in range(20):
        for name in "abcd":
            path = workbench.versioned/str(turn)/name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % turn*200_000)
    recording.add_data(workbench, "")
    cache = workbench.root/".dvc"/"cache"
    assert len([p for p in cache.rglob("*") if p.is_file()]) == 21 and not list(cache.rglob("*.part"))
    assert recording.check_status(workbench) == {"changed": [], "missing": [], "new": []}
