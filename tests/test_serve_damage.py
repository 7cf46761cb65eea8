"""What was damaged on its way is refused before it answers anybody, and named: in DVC's cache and remote, among MLflow's artifacts, in a bento, its manifest, its signature.

A sample runs in `make test`; CVOPS_FULL=1 turns 1,000 bits and cuts 100 files short.
"""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from serve_toy import photograph, register_toy

from cvops_wb.core.errors import BadModel, CvopsError
from cvops_wb.core.files import dump_json
from cvops_wb.core.settings import load_settings
from cvops_wb.serve import Client, PackageSpec, package, service_running, verify_model
from cvops_wb.serve.clients import CallFailed
from cvops_wb.serve.launching import find_bento
from cvops_wb.serve.service.state import State
from cvops_wb.serve.supply import check_bill, make_key
from cvops_wb.serve.verification import verify_contents

FULL = bool(os.environ.get("CVOPS_FULL"))
TARGETS = {"bento": 340, "manifest": 240, "signature": 240, "artifact": 160, "served": 60, "cache": 30, "remote": 30}     # 1,100 in all
SAMPLE = {"bento": 40, "manifest": 20, "signature": 20, "artifact": 20, "served": 6, "cache": 1, "remote": 1}
COUNTS = TARGETS if FULL else SAMPLE


@pytest.fixture(scope="module")
def signed(bench):
    "The toy as a bento that is signed; the settings know the public key."
    with pytest.MonkeyPatch.context() as patch:
        private, public = make_key(bench.root/"keys")
        patch.setenv("CVOPS_SERVE_SIGN_KEY", str(private))
        patch.setenv("CVOPS_SERVE_PUBLIC_KEY", str(public))
        yield package(register_toy(bench.root), PackageSpec(), bench.reports/"signed.part")


def damage(path: Path, rng, k: int) -> None:
    "Turn one bit; every eleventh time cut the file short instead."
    data = bytearray(path.read_bytes())
    if k % 11 == 10: del data[rng.integers(len(data)):]
    else: data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def campaign(kind, files, check, mend=None, count=None):
    "Damage one file after another and mend it again; cases in which it was not refused by name, as `check` tells."
    rng, missed = np.random.default_rng(sum(kind.encode())), []
    good = {path: path.read_bytes() for path in files}
    for k in range(COUNTS[kind] if count is None else count):
        path = files[int(rng.integers(len(files)))]
        damage(path, rng, k)
        try: check()
        except CvopsError as e: said = str(e)
        else: said = "accepted"
        if path.name not in said and (mend is None or said == "accepted"): missed.append((k, str(path), said[:200]))
        path.write_bytes(good[path])
    check()
    return missed


def list_sealed(bench, bento):
    source = bench.root/bento.path/"src"
    files = [source/name for name in json.loads((source/"contents.json").read_text())["files"]]
    return [path for path in [*files, source/"contents.json"] if path.exists() and path.stat().st_size]


def test_a_bento_is_refused_whichever_file_is_damaged(bench, signed):
    "Code, settings, model, bill, the list itself: each is named before a worker is started."
    files = list_sealed(bench, signed)
    assert {"service.py", "settings.ini", "model.onnx", "manifest.sig", "sbom.cdx.json", "contents.json", "limits.py"} <= {path.name for path in files}
    assert campaign("bento", files, lambda: find_bento(load_settings(), signed)) == []


@pytest.mark.parametrize("kind, name", [("manifest", "manifest.json"), ("signature", "manifest.sig")])
def test_manifest_and_signature(bench, signed, kind, name):
    path = bench.root/signed.path/"src"/"model"/name
    assert campaign(kind, [path], lambda: find_bento(load_settings(), signed)) == []


def test_a_check_that_skips_the_hash_would_be_found(bench, signed, monkeypatch):
    "The planted bug: file sizes are compared, and SHA-256 is not."
    from cvops_wb.serve import verification
    def check_file(path, entry):
        data = verification.read_once(path)
        if len(data) != entry["size"]: raise verification.spoilt(path, "size")
        return data
    monkeypatch.setattr(verification, "check_file", check_file)
    missed = campaign("bento", [bench.root/signed.path/"src"/"model"/"weights.safetensors"], lambda: find_bento(load_settings(), signed), count=20)
    assert len(missed) >= 15, "turned bits went through, and the campaign says so"


def test_a_stranger_and_a_missing_file_in_a_bento(bench, signed):
    source = bench.root/signed.path/"src"
    (source/"sitecustomize.py").write_text("print('hello')")
    with pytest.raises(BadModel, match="sitecustomize.py"): verify_contents(source, (bench.root/signed.path).name)
    (source/"sitecustomize.py").unlink()
    (source/"cvops_wb"/"serve"/"limits.py").rename(bench.root/"limits.py")
    with pytest.raises(BadModel, match="limits.py"): find_bento(load_settings(), signed)
    (bench.root/"limits.py").rename(source/"cvops_wb"/"serve"/"limits.py")
    find_bento(load_settings(), signed)


@pytest.fixture(scope="module")
def artifacts(bench, signed):
    "MLflow's store of artifacts, with the model in it."
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    store = LocalArtifactRepository((bench.root/"mlartifacts").as_uri())
    store.log_artifacts(str(bench.root/"data/registry/toy/1"), "model")
    return store


def test_an_artifact_of_mlflow(bench, signed, artifacts):
    def check():
        shutil.rmtree(bench.root/"fetched", ignore_errors=True)
        (bench.root/"fetched").mkdir()
        verify_model(artifacts.download_artifacts("model", str(bench.root/"fetched")), signed.manifest_sha256)
    files = sorted((bench.root/"mlartifacts"/"model").iterdir())
    assert campaign("artifact", files, check) == []


# ── who signed ──

def start(folder: Path, bench, **env):
    "The state of a service that starts on a folder."
    state = State(folder, load_settings().serve, bench.root/"log")
    state.start()
    state.close()


def test_unsigned_or_signed_by_another_does_not_start(bench, signed, tmp_path, monkeypatch):
    "Where a key says who must sign. Without a key the same model starts, with or without a signature."
    folder = shutil.copytree(bench.root/signed.path/"src", tmp_path/"src")
    start(folder, bench)
    monkeypatch.setenv("CVOPS_SERVE_PUBLIC_KEY", str(make_key(tmp_path/"other")[1]))
    with pytest.raises(BadModel, match="manifest.sig"): start(folder, bench)
    monkeypatch.setenv("CVOPS_SERVE_PUBLIC_KEY", "")
    start(folder, bench)
    (folder/"model"/"manifest.sig").unlink()
    start(folder, bench)
    monkeypatch.setenv("CVOPS_SERVE_PUBLIC_KEY", str(bench.root/"keys"/"sign.pub"))
    with pytest.raises(BadModel, match="manifest.sig"): start(folder, bench)


def test_the_key_is_hidden_and_made_once(bench, signed):
    assert (bench.root/"keys"/"sign.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(CvopsError, match="key already"): make_key(bench.root/"keys")
    assert str(bench.root/"keys") not in (bench.root/signed.path/"src"/"settings.ini").read_text()


def test_the_bill_of_a_bento(bench, signed):
    text = (bench.root/signed.path/"src"/"sbom.cdx.json").read_text()
    value = json.loads(text)
    names = {each["name"]: each for each in value["components"]}
    assert check_bill(text) == len(names) and {"numpy", "onnxruntime", "bentoml", "model.onnx", "weights.safetensors"} <= set(names) and "torch" not in names
    assert names["model.onnx"]["hashes"][0]["content"] == hashlib.sha256((bench.root/signed.path/"src"/"model"/"model.onnx").read_bytes()).hexdigest()
    assert "/tmp" not in text and str(bench.root) not in text


# ── a service that runs goes on ──

def test_the_champion_goes_on(bench, signed):
    "A damaged version is called by its number: it is refused, the log names its file, and the champion answers all the while."
    second = register_toy(bench.root, 2)
    (bench.root/"data/registry/events.jsonl").write_text(dump_json({"event": "registered", "name": "toy", "version": 2, "model": second.model, "manifest_sha256": second.manifest_sha256, "passed": True}, indent=None) + "\n")
    files, log = sorted((bench.root/second.model).iterdir()), bench.root/"service.log"
    with service_running(signed, bench.root/"log", workers=1, output=log, env={"CVOPS_SERVE_PUBLIC_KEY": ""}) as service, Client(service.url) as client:
        def ask(version=""): return client.call("POST", f"/predict{version}", content=photograph(), headers={"content-type": "image/jpeg"})
        rng, good = np.random.default_rng(4), {path: path.read_bytes() for path in files}
        for k in range(COUNTS["served"]):
            path, before = files[k % len(files)], log.stat().st_size
            damage(path, rng, k)
            with pytest.raises(CallFailed) as caught: ask("?version=2")
            assert (caught.value.status, caught.value.reason) == (503, "damaged_version") and ask()["version"] == 1
            assert path.name in log.read_text()[before:], "the log names the file"
            path.write_bytes(good[path])
        assert ask("?version=2")["version"] == 2 and ask()["version"] == 1


# ── DVC ──

def dvc(root, *words):
    "DVC in a folder; whether it went well, and what it said."
    done = subprocess.run([Path(sys.executable).parent/"dvc", *words], cwd=root, capture_output=True, text=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def versioned(bench, signed, tmp_path_factory):
    "A model under DVC, pushed to a remote that is verified."
    root = tmp_path_factory.mktemp("versioned")
    shutil.copytree(bench.root/"data/registry/toy/1", root/"model")
    assert dvc(root, "init", "--no-scm", "-q")[0] == 0
    (root/".dvc"/"config").write_text(f"[core]\n    no_scm = True\n    remote = store\n    analytics = false\n['remote \"store\"']\n    url = {root/'remote'}\n    verify = true\n")
    for words in (("add", "-q", "model"), ("push", "-q")): assert dvc(root, *words)[0] == 0
    return root


@pytest.mark.parametrize("kind", ["cache", "remote"])
def test_a_cache_or_a_remote_of_dvc(versioned, signed, kind):
    "DVC lays a damaged file of its cache into the folder and says that all is well: the model is refused. What it fetches from a remote it checks, or we do."
    root = versioned
    store = root/".dvc"/"cache"/"files" if kind == "cache" else root/"remote"/"files"
    wanted = {hashlib.md5(path.read_bytes()).hexdigest(): path.name for path in (root/"model").iterdir()}
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and not path.name.endswith(".dir") and path.parent.name + path.name in wanted]
    rng, good = np.random.default_rng(5), {path: path.read_bytes() for path in files}
    assert len(files) == len(wanted)
    for k in range(COUNTS[kind]):
        path = files[k % len(files)]
        damage(path, rng, k)
        shutil.rmtree(root/"model", ignore_errors=True)
        if kind == "remote": shutil.rmtree(root/".dvc"/"cache", ignore_errors=True)
        status, said = dvc(root, "checkout" if kind == "cache" else "pull", "--force")
        name = wanted[path.parent.name + path.name]
        if status == 0:
            with pytest.raises(BadModel, match=name): verify_model(root/"model", signed.manifest_sha256)
        else:       # DVC itself refuses, and names the folder; nothing is there that could be served
            assert kind == "remote" and "model" in said, said
            with pytest.raises(BadModel): verify_model(root/"model", signed.manifest_sha256)
        path.write_bytes(good[path])
    shutil.rmtree(root/"model", ignore_errors=True)
    assert dvc(root, "pull", "--force")[0] == 0
    verify_model(root/"model", signed.manifest_sha256)
