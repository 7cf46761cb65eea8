"S3 as a remote and as a source: a real S3 server on loopback; what is flipped or cut there is found and named, never accepted."
import os
import random
import shutil
from pathlib import Path

import pytest
from test_data_snapshots import make_bench, room, select
from test_data_versions import call, hashes, holds

from cvops_wb.core.errors import BadInput, BadRecord, ToolFailed
from cvops_wb.core.settings import load_settings
from cvops_wb.data.intake import IngestSpec, fingerprint_source, ingest
from cvops_wb.data.snapshots import SnapshotSpec, ensure_dvc, find_snapshot, open_snapshot, run_dvc, take_snapshot
from cvops_wb.data.versions import buckets
from cvops_wb.data.versions.integrity import pull_data
from cvops_wb.data.versions.objects import Objects, Report, read_listing, read_pointer

pytest.importorskip("moto.server")
pytest.importorskip("s3fs")
SECRET = "not-for-any-file"


@pytest.fixture(scope="module")
def s3():
    "An S3 server of our own on a free port, with one bucket; its address and secrets stand in the environment."
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET,
                            "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}.items(): patch.setenv(name, value)
        import s3fs
        system = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        system.mkdir("shop")
        yield system
    server.stop()


@pytest.fixture(scope="module")
def pushed(s3, photos, tmp_path_factory):
    "A workbench whose version was pushed to the bucket."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVOPS_ROOT", "")
        patch.setenv("CVOPS_DATA_REMOTE", "s3://shop/versions")
        settings = make_bench(tmp_path_factory.mktemp("pushed")/"bench")
        yield settings, take_snapshot(select(settings, photos), SnapshotSpec("the first"), room(settings, "snapshot"))


@pytest.fixture
def clone(pushed, tmp_path, monkeypatch):
    "Another machine's clone: settings and data.dvc, nothing else."
    settings, snapshot = pushed
    monkeypatch.setenv("CVOPS_DATA_REMOTE", "s3://shop/versions")
    monkeypatch.setenv("CVOPS_ROOT", str(tmp_path/"clone"))
    here = make_bench(tmp_path/"clone")
    shutil.copy(settings.root/"data.dvc", here.root)
    monkeypatch.chdir(here.root)
    return here, settings, snapshot


def test_a_clone_pulls_from_the_bucket(clone):
    here, settings, snapshot = clone
    assert snapshot.pushed
    code, told = call("pull")
    assert code == 0 and hashes(here) == hashes(settings) and told["report"]["brought"] == len(hashes(here)) and told["report"]["damages"] == []
    reader = open_snapshot(find_snapshot())
    assert all(len(reader.read(row.id)) == row.bytes for row in reader.table.itertuples()) and pull_data().brought == 0


@pytest.mark.skipif(not os.environ.get("CVOPS_FULL"), reason="make test-full")
def test_dvc_itself_pulls_what_was_pushed(clone):
    here, settings, _ = clone
    run_dvc(here, ["pull"])
    assert hashes(here) == hashes(settings)


def test_no_secret_is_written(clone, monkeypatch):
    here, settings, _ = clone
    monkeypatch.setenv("CVOPS_DATA_ENDPOINT", "http://127.0.0.1:9")
    text = ensure_dvc(load_settings(here.root)).read_text()
    assert "endpointurl = http://127.0.0.1:9" in text and "url = s3://shop/versions" in text
    assert not any(SECRET.encode() in p.read_bytes() for root in (here.root, settings.root) for p in root.rglob("*") if p.is_file())


def test_the_endpoint_may_stand_in_the_settings(clone, s3, monkeypatch):
    here, settings, _ = clone
    monkeypatch.setenv("CVOPS_DATA_ENDPOINT", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert pull_data().brought and hashes(here) == hashes(settings)


def spoil(system, path, chance) -> bytes:
    "Flip a bit of an object, or cut it; returns what it was."
    kept = system.cat_file(path)
    data = bytearray(kept)
    if chance.random() < .5: data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else: data = data[:chance.randrange(len(data))]
    system.pipe_file(path, bytes(data))
    return kept


def campaign(here, system, seed: int) -> int:
    "Every object spoiled once, each in a pull of a bare clone; how many were accepted or not named."
    chance, accepted = random.Random(seed), 0
    digest = read_pointer(here)
    pull_data()
    files = {**{md5: name for name, md5 in read_listing(Objects(here, Report()), digest).items()}, digest: "the list of files"}
    for md5, name in sorted(files.items()):
        shutil.rmtree(here.versioned, ignore_errors=True), shutil.rmtree(here.root/".dvc"/"cache")
        path = f"shop/versions/files/md5/{md5[:2]}/{md5[2:]}"
        kept = spoil(system, path, chance)
        try: pull_data()
        except BadRecord as error: accepted += f"{name} is damaged in the remote" not in str(error) or (here.versioned/"current").exists()
        except (ValueError, KeyError, OSError): accepted += 1   # damaged bytes were read as if they were right, a damaged list too
        else: accepted += 1
        finally: system.pipe_file(path, kept)
    return accepted


def test_what_is_spoiled_in_the_bucket_is_named(clone, s3): assert campaign(clone[0], s3, 1) == 0


def test_the_campaign_sees_a_bucket_that_is_not_hashed(clone, s3, monkeypatch):
    def trusting(self, md5, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        self.system.get_file(self.name(md5), str(target))
        return True
    monkeypatch.setattr(buckets.Bucket, "fetch", trusting)
    assert campaign(clone[0], s3, 1) > 0


def test_a_missing_object_is_named(clone, s3):
    here, settings, snapshot = clone
    name = f"shards/{Path(snapshot.shards[0]).name}"
    md5 = read_listing(Objects(settings, Report()), read_pointer(settings))[name]
    path = f"shop/versions/files/md5/{md5[:2]}/{md5[2:]}"
    kept = s3.cat_file(path)
    s3.rm_file(path)
    with pytest.raises(BadRecord, match=f"{name} is missing in the remote"): pull_data()
    s3.pipe_file(path, kept)
    assert pull_data().damages == []


@pytest.mark.parametrize("name, value", [("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("CVOPS_DATA_REMOTE", "s3://nobodys-bucket/x")])
def test_a_remote_that_is_not_there(clone, monkeypatch, name, value):
    from cvops_wb.data.snapshots import push_data
    pull_data()
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ToolFailed, match="could not be pushed") as caught: push_data()
    assert SECRET not in str(caught.value) and "push=false" in caught.value.fix
    s3fs.S3FileSystem.clear_instance_cache()


def test_forget_reaches_into_the_bucket(clone, s3, monkeypatch):
    here, settings, snapshot = clone
    monkeypatch.setenv("CVOPS_DATA_REMOTE", "s3://shop/other")
    from cvops_wb.data.snapshots import push_data
    from cvops_wb.data.versions.erasure import forget
    shutil.copytree(settings.versioned, here.versioned), shutil.copytree(settings.root/".dvc"/"cache", here.root/".dvc"/"cache")
    push_data()
    row = open_snapshot(find_snapshot()).table.iloc[3]
    data = open_snapshot(find_snapshot()).read(row.id)
    assert any(data in s3.cat_file(path) for path in s3.find("shop/other"))
    receipt = forget([row.id], history=True)
    assert not any(data in s3.cat_file(path) for path in s3.find("shop/other")) and "bucket itself" in receipt["remote"] and holds(here.root, data) == []
    shutil.rmtree(here.versioned), shutil.rmtree(here.root/".dvc"/"cache")
    assert pull_data().brought and len(open_snapshot(find_snapshot()).table) == 39


def test_a_prefix_is_ingested(s3, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("CVOPS_ROOT", str(tmp_path/"bench"))
    settings = make_bench(tmp_path/"bench")
    s3.put(str(photos), "shop/photos", recursive=True)
    before = fingerprint_source("s3://shop/photos")
    batch = ingest("s3://shop/photos", IngestSpec(), room(settings, "ingest"))
    assert batch.count == 40 and sorted(batch.classes) == ["apple", "lemon", "lime", "plum"]
    assert fingerprint_source("s3://shop/photos") == before
    s3.pipe_file("shop/photos/lime/new.jpg", next(photos.rglob("*.jpg")).read_bytes())
    assert fingerprint_source("s3://shop/photos") != before
    with pytest.raises(BadInput, match="nothing at this address"): ingest("s3://shop/nothing-here", IngestSpec(), room(settings, "nothing"))
