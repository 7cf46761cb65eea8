"`cvops init` from a clone and from an installed wheel; the doctor and the broom."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from cvops_wb.core.errors import CvopsError, WrongUsage
from cvops_wb.core.settings import load_settings
from cvops_wb.loop import check_machine, clean_caches, init_workbench

REPO = Path(__file__).parents[1]
EXPECTED = {"settings.ini", "pyproject.toml", ".gitignore", *(f"nbs/runs/{p.name}" for p in (REPO/"nbs/runs").glob("*.ipynb"))}


def test_init_writes_a_workbench_that_loads(tmp_path):
    root = tmp_path/"Café shop"
    written = init_workbench(root)
    assert EXPECTED <= set(written) and (root/".git").is_dir() and load_settings(root).root == root.resolve()
    assert not [n for n in written if "__pycache__" in n or "checkpoint" in n or "/built/" in n or n.endswith(".gitkeep")]
    import tomllib
    project = tomllib.loads((root/"pyproject.toml").read_text())
    assert project["tool"]["nbdev"]["allowed_cell_metadata_keys"] == ["tags"] and project["project"]["name"] == "caf--shop"
    assert "/data/" in (root/".gitignore").read_text().splitlines()


def test_init_touches_nothing_that_is_there(tmp_path):
    root = tmp_path/"photos"
    (root/"nbs/runs").mkdir(parents=True)
    (root/"nbs/runs/01_ingest.ipynb").write_text("mine")
    (root/"tea.jpg").write_bytes(b"x")
    assert set(init_workbench(root, dry_run=True)) and not (root/"settings.ini").exists()
    assert "nbs/runs/01_ingest.ipynb" not in init_workbench(root) and (root/"nbs/runs/01_ingest.ipynb").read_text() == "mine"
    with pytest.raises(WrongUsage, match="a workbench already"): init_workbench(root)
    with pytest.raises(WrongUsage, match="this is a file"): init_workbench(root/"tea.jpg")


def test_init_inside_a_repository_makes_no_other(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    init_workbench(tmp_path/"bench")
    assert not (tmp_path/"bench/.git").exists()


@pytest.mark.slow
def test_init_from_an_installed_wheel(tmp_path):
    def call(*command, **options): return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **options).stdout
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path/"dist", cwd=REPO)
    wheel, = (tmp_path/"dist").glob("*.whl")
    ZipFile(wheel).extractall(tmp_path/"site")      # what installing a wheel of pure Python is; uv's environments have no pip
    environment = {k: v for k, v in os.environ.items() if k != "CVOPS_ROOT"} | {"PYTHONPATH": str(tmp_path/"site")}
    command = [sys.executable, "-c", "from cvops_wb.loop.cli import main; main()"]
    told = json.loads(call(*command, "init", tmp_path/"shop", "--json", cwd=tmp_path, env=environment))
    assert told["ok"] and EXPECTED <= set(told["written"])
    where = call(sys.executable, "-c", "import cvops_wb; print(cvops_wb.__file__)", cwd=tmp_path, env=environment)
    assert str(tmp_path/"site") in where
    listed = json.loads(call(*command, "run", "--json", cwd=tmp_path/"shop", env=environment))
    assert [n["name"] for n in listed["notebooks"]][:2] == ["ingest", "curate"]
    wings = {p.parent.name for p in (tmp_path/"site/cvops_wb").glob("*/__init__.py")}
    assert wings >= {"core", "data", "learn", "serve", "watch", "loop"} & {p.parent.name for p in (REPO/"cvops_wb").glob("*/__init__.py")}


def test_the_doctor(workbench):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        os.environ["CVOPS_SERVE_PORT"] = str(taken.getsockname()[1])
        try: checks = {c.name: c for c in check_machine()}
        finally: del os.environ["CVOPS_SERVE_PORT"]
        port = checks[f"port {taken.getsockname()[1]}"]
    assert port.state == "warn" and "[serve] port" in port.fix
    assert checks["python"].state in ("ok", "warn") and checks["packages"].state == "ok" and checks["settings.ini"].state == "ok"
    assert checks["dvc"].state == "warn" and all(c.fix for c in checks.values() if c.state != "ok")


def test_the_doctor_reads_bad_settings(workbench):
    (workbench.root/"settings.ini").write_text("[gaet]\nx = 1\n")
    found = check_machine()[-1]
    assert found.name == "settings.ini" and found.state == "bad" and "did you mean 'gate'" in found.text


def test_an_old_package_is_seen(monkeypatch):
    from cvops_wb.loop import doctor
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.6.0" if name == "evidently" else real(name))
    found = {c.name: c for c in doctor.check_packages()}
    assert found["packages monitor"].state == "bad" and "evidently 0.6.0, not >=0.7.20" in found["packages monitor"].text


def test_clean_takes_caches_only(workbench):
    kept = [".cvops/store/journal.sqlite", "data/shards/a.tar", "reports/train-0000000001/record.json", "bentos/classifier/service.py"]
    gone = [".cvops/cache/mlflow.db", ".cvops/cache/pixels/a.npy", "reports/train-0000000002.part/x", "reports/train-0000000003.failed/x"]
    for name in kept + gone:
        (workbench.root/name).parent.mkdir(parents=True, exist_ok=True)
        (workbench.root/name).write_text("x"*5000)
    assert sum(clean_caches(dry_run=True).values()) >= 20_000 and all((workbench.root/n).exists() for n in gone)
    clean_caches()
    assert all((workbench.root/n).exists() for n in kept) and not any((workbench.root/n).exists() for n in gone)
    assert clean_caches() == {}


def test_clean_leaves_a_store_that_lies_in_the_cache(workbench, monkeypatch):
    monkeypatch.setenv("CVOPS_DATA_STORE", ".cvops/cache/store")
    (workbench.root/".cvops/cache/store").mkdir(parents=True)
    assert clean_caches() == {} and (workbench.root/".cvops/cache/store").is_dir()


def test_nothing_is_cleaned_while_it_is_used(workbench):
    from cvops_wb.loop.runner import claimed
    part = workbench.reports/"train-0000000001.part"
    part.mkdir(parents=True)
    with claimed(workbench, "train-0000000001", lambda: None):
        with pytest.raises(CvopsError, match="in use"): clean_caches()
        assert part.is_dir() and len(clean_caches(dry_run=True)) == 1
    assert list(clean_caches()) == ["reports/train-0000000001.part"]


@pytest.mark.parametrize("folder, name", [("Shelf 7", "shelf-7"), ("grocery", "grocery"), ("Ä", "workbench")])
def test_a_workbench_bears_the_name_of_its_folder(folder, name, tmp_path):
    "Its data set, its experiment and its models are not called after the demo's warehouse; nothing else in settings.ini changes."
    init_workbench(tmp_path/folder)
    assert load_settings(tmp_path/folder).workbench.name == name
    pairs = zip((tmp_path/folder/"settings.ini").read_text().splitlines(), (REPO/"settings.ini").read_text().splitlines(), strict=True)
    assert [theirs.split("#")[0].split("=")[0].strip() for theirs, ours in pairs if theirs != ours] == ["name"]
