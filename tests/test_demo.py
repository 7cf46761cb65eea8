"The main job as a person runs it: `cvops init`, `cvops demo`, then the service, the way back from an answer, the pages."
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvops_wb.core.processes import free_port
from cvops_wb.core.records import parse_record
from cvops_wb.core.settings import load_settings
from cvops_wb.loop.flow import LOOP

pytestmark = pytest.mark.slow
MAIN = [sys.executable, "-c", "from cvops_wb.loop.cli import main; main()"]
SMALL = ["ingest.source=synth:count=260", "train.network=small_resnet:16", "train.epochs=6", "train.size=48", "train.batch_size=32", "rehearse.requests=60"]
EASY = {"CVOPS_GATE_MIN_ACCURACY": "0.02", "CVOPS_GATE_MAX_CALIBRATION_ERROR": "1"}     # six epochs are no model: the way is what is tested


def alone(**more):
    "The environment without what points to another workbench."
    return {k: v for k, v in os.environ.items() if not k.startswith("CVOPS_")} | more


def call(root, *arguments, status=0, **environment):
    "Run `cvops` in a workbench: the document that it prints, and what it tells a person."
    done = subprocess.run([*MAIN, *arguments, "--json"], cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=alone(NO_COLOR="1", **environment), timeout=600)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout), done.stderr


def list_processes(root):
    "Command lines of what still runs in a folder."
    import psutil
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(root): found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError): continue
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A workbench after its first demo, which the gate refused, and its second."
    root = tmp_path_factory.mktemp("demo")/"shop"
    call(root.parent, "init", "shop")
    small = [word for value in SMALL for word in ("-p", value)]
    refused = call(root, "demo", *small, status=3, CVOPS_GATE_MIN_ACCURACY="0.999")
    done = call(root, "demo", *small, **EASY)
    again = call(root, "demo", *small, **EASY)
    return root, refused, done, again


def stages(document): return {stage["stage"]: stage for stage in document["stages"]}


def test_a_refused_model_goes_no_further(made):
    document, told = made[1]
    assert set(stages(document)) == set(LOOP) - {"package", "rehearse", "monitor"}
    assert document["left_out"] == {"package": "register", "rehearse": "package", "monitor": "package"} and "refused: min_accuracy" in told
    version = stages(document)["register"]["record"]
    assert not version["passed"] and version["version"] == 0


def test_the_second_goes_all_the_way_and_trains_nothing_twice(made):
    root, (before, _), (document, told), _ = made
    assert list(stages(document)) and set(stages(document)) == set(LOOP) and not document["errors"] and not document["left_out"]
    assert {name for name, stage in stages(document).items() if stage["reused"]} == {"ingest", "curate", "explore", "snapshot", "train", "evaluate"}
    assert stages(document)["train"]["run"] == stages(before)["train"]["run"]
    for stage in stages(document).values():
        folder = (root/stage["page"]).parent
        assert {"record.json", "notebook.ipynb", "notebook.html"} <= {p.name for p in folder.iterdir()}
        assert not [o for c in json.loads((folder/"notebook.ipynb").read_text())["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    version, rehearsal, drift = (stages(document)[name]["record"] for name in ("register", "rehearse", "monitor"))
    assert version["alias"] == "champion" and version["version"] == 1 and rehearsal["failed"] == 0 and rehearsal["requests"] == 60
    assert drift["drifted"] and 0 < (root/drift["report"]).stat().st_size < 6e6, "the planted night shift is found"
    assert (root/"data.dvc").is_file() and not list((root/"reports").glob("*.part"))


def test_an_unchanged_demo_reuses_every_stage(made):
    document, _ = made[3]
    assert len(document["stages"]) == len(LOOP) and all(stage["reused"] for stage in document["stages"])
    assert document["seconds"] < made[2][0]["seconds"]/2


def test_nothing_is_left_running(made):
    assert list_processes(made[0]) == []


def test_the_service_answers_and_its_answer_leads_back(made, monkeypatch):
    from PIL import Image

    from cvops_wb.serve import Client, service_running
    root, _, (document, _), _ = made
    bento, snapshot = parse_record(stages(document)["package"]["record"]), stages(document)["snapshot"]["record"]
    photo = max((root/".cvops/cache/synth").glob("traffic-*/*.jpg"), key=lambda p: p.name)
    monkeypatch.setenv("CVOPS_ROOT", str(root))
    with service_running(bento, log=root/".cvops/store/predictions") as service:
        answer = Client(service.url).predict(photo.read_bytes(), camera="aisle-1")
    assert answer["label"] in snapshot["classes"] and answer["label"] == max(answer["scores"], key=answer["scores"].get)
    assert abs(sum(answer["scores"].values()) - 1) < 1e-3 and Image.open(photo).format == "JPEG"
    document, _ = call(root, "lineage", answer["request_id"])
    runs = {name: stage["run"] for name, stage in stages(made[2][0]).items()}
    text = json.dumps(document)
    for name in ("ingest", "curate", "snapshot", "train", "evaluate", "register", "package"): assert runs[name] in text, name


def test_one_record_names_what_made_it(made):
    import mlflow
    root, _, (document, _), _ = made
    envelope = json.loads((root/"reports"/stages(document)["train"]["run"]/"record.json").read_text())
    provenance = envelope["provenance"]
    assert len(provenance["code"]) == 64 and provenance["vendors"]["torch"] and provenance["device"] == "cpu" and "seed" in provenance
    client = mlflow.MlflowClient(f"sqlite:///{root}/.cvops/cache/mlflow.db")
    run = client.get_run(stages(document)["train"]["record"]["tracking"])
    assert run.data.tags["cvops.run"] == stages(document)["train"]["run"] and run.data.tags["cvops.snapshot"] == stages(document)["snapshot"]["record"]["id"]
    assert (run.data.tags["cvops.key"], run.data.tags["cvops.code"]) == (envelope["key"], provenance["code"])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 6


@pytest.mark.browser
def test_the_dashboard_of_the_demo(made, tmp_path):
    from watch_bench import take_picture

    from cvops_wb.watch import dashboard_running
    root = made[0]
    with dashboard_running(settings=load_settings(root)) as (address, _):
        asked, errors, said = take_picture(address, tmp_path/"page.png", before=lambda tab: tab.inner_text(".wb"), wait=".wb h1")
    base = address.split("?")[0]
    assert "Champion" in said and "rehearse" in said and errors == []
    assert [url for url in asked if not url.startswith((base, "data:", "blob:", f"ws://127.0.0.1:{base.split(':')[2]}"))] == []


def test_a_taken_port(made):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for command, key in (("serve", "CVOPS_SERVE_PORT"), ("dashboard", "CVOPS_MONITOR_PORT")):
            document, told = call(made[0], command, status=1, **{key: str(port)})
            assert document["error"]["kind"] == "NoRoom" and "in use" in told and "port" in document["error"]["fix"]
    assert list_processes(made[0]) == []


def test_ctrl_c_in_the_middle_of_training(made):
    root, runs = made[0], {p.name for p in (made[0]/"reports").iterdir()}
    process = subprocess.Popen([*MAIN, "train", "-p", "epochs=500", "-p", "size=48"], cwd=root, env=alone(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not [p for p in (root/"reports").glob("train-*.part/history.csv") if p.read_text().count("\n") > 2]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert {p.name for p in (root/"reports").iterdir()} == runs and list_processes(root) == []
    assert stages(call(root, "demo", *[w for v in SMALL for w in ("-p", v)], **EASY)[0])["train"]["reused"]


def test_a_notebook_that_fails_half_way(made):
    root = made[0]
    path = root/"nbs/runs/06_evaluate.ipynb"
    good = path.read_text()
    notebook = json.loads(good)
    notebook["cells"].insert(-1, {"cell_type": "code", "id": "planted", "metadata": {}, "outputs": [], "execution_count": None, "source": "1/0"})
    path.write_text(json.dumps(notebook))
    document, told = call(root, "evaluate", status=1)
    error = document["errors"]["evaluate"]
    assert error["folder"].endswith(".failed") and "ZeroDivisionError" in told and error["fix"]
    assert "ZeroDivisionError" in (root/"reports"/error["folder"]/"notebook.html").read_text(), "what was done up to there can be looked at"
    path.write_text(good)
    assert stages(call(root, "evaluate")[0])["evaluate"]["run"] == stages(made[2][0])["evaluate"]["run"]


def test_a_free_port_serves(made):
    port = free_port()
    process = subprocess.Popen([*MAIN, "serve"], cwd=made[0], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=alone(CVOPS_SERVE_PORT=str(port)))
    from cvops_wb.core.processes import answers, wait_until
    try: wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), process, "cvops serve")
    finally:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"http://127.0.0.1:{port}" in output and list_processes(made[0]) == []


def test_the_first_hour(made):
    import nbformat
    from nbclient import NotebookClient
    root, path = made[0], made[0]/"nbs/tutorials/01_first_hour.ipynb"
    notebook = nbformat.read(path, 4)
    os.environ["CVOPS_ROOT"], before = str(root), os.environ.get("CVOPS_ROOT")
    try: NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
    finally: os.environ.pop("CVOPS_ROOT") if before is None else os.environ.update(CVOPS_ROOT=before)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 6
    said = "".join(o.get("text", "") for o in outputs)
    assert "the service says" in said and "reused in" in said
