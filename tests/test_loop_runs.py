"A stage runs, is reused, fails and is stopped as it should: real kernels in a small workbench."
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from loop_bench import write_curate, write_ingest, write_notebook

from cvops_wb.core.errors import BadRecord, CvopsError, NoRoom, RunFailed, UnknownName, WrongUsage
from cvops_wb.core.records import read_envelope
from cvops_wb.loop import find_run, run_stage
from cvops_wb.loop.engine import MARK, Task, explain_cell


def processes_of(root) -> list[str]:
    "Command lines of the processes that belong to a workbench's runs."
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("CVOPS_ROOT") == str(root) and MARK in environment: found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError): continue
    return found


def folders(settings) -> set[str]: return {p.name for p in settings.reports.glob("*") if not p.name.startswith(".")}


@pytest.fixture
def alone(workbench):
    "A workbench that must have no process left when its test is over."
    yield workbench
    deadline = time.monotonic() + 10
    while processes_of(workbench.root) and time.monotonic() < deadline: time.sleep(.2)
    assert processes_of(workbench.root) == []


@pytest.mark.slow
def test_run_reuse_force_and_repair(alone):
    write_ingest(alone.root)
    write_curate(alone.root)
    seen = []
    first = run_stage("ingest", {"count": "5"}, report=lambda *told: seen.append(told))
    folder = alone.reports/first.envelope.run
    assert not first.reused and first.envelope.record.count == 5 and (6, 6, "") in seen and any(line == "reading synth" for *_, line in seen)
    assert {p.name for p in folder.iterdir()} == {"notebook.ipynb", "notebook.html", "record.json", "samples.txt"}
    assert list(first.envelope.outputs) == [f"reports/{first.envelope.run}/samples.txt"] and folder.name.startswith("ingest-")
    provenance = first.envelope.provenance
    assert provenance["device"] in ("cpu", "cuda") and len(provenance["code"]) == 64 and provenance["vendors"]["python"]

    notebook = json.loads((folder/"notebook.ipynb").read_text())
    assert str(alone.root) not in json.dumps(notebook["metadata"]) and ".part" in json.dumps(notebook["cells"])
    page = (folder/"notebook.html").read_text()
    assert "<script" not in page and "Content-Security-Policy" in page and "cvops-run" in page

    again = run_stage("ingest", {"count": 5})
    assert again.reused and again.envelope == first.envelope
    (folder/"samples.txt").write_text("yyyyy")
    repaired = run_stage("ingest", {"count": 5})
    assert not repaired.reused and (folder/"samples.txt").read_text() == "xxxxx"

    made = run_stage("curate")
    assert made.envelope.inputs == {"batch": first.envelope.run} and made.envelope.parameters["batch"] == first.envelope.run
    assert find_run(alone, "selection").run == made.envelope.run
    assert run_stage("curate", {"batch": first.envelope.run[:12]}).reused
    assert folders(alone) == {first.envelope.run, made.envelope.run}


def test_the_newest_is_the_one_last_asked_for(alone):
    write_ingest(alone.root)
    write_curate(alone.root)
    three, four = run_stage("ingest", {"count": 3}), run_stage("ingest", {"count": 4})
    assert find_run(alone, "batch").run == four.envelope.run
    assert run_stage("ingest", {"count": 3}).reused and find_run(alone, "batch").run == three.envelope.run
    assert find_run(alone, "batch", four.envelope.run[:12]).record.count == 4
    assert find_run(alone, "batch", f"reports/{four.envelope.run}/record.json").run == four.envelope.run


@pytest.mark.parametrize("kind, value, error, says", [
    ("snapshot", "", BadRecord, "cvops snapshot"), ("batch", "ingest-0000", UnknownName, "unknown batch or run"),
])
def test_a_missing_input_names_the_command(workbench, kind, value, error, says):
    with pytest.raises(error) as caught: find_run(workbench, kind, value)
    assert says in str(caught.value)


def test_a_stage_without_its_input_starts_nothing(workbench):
    write_curate(workbench.root)
    with pytest.raises(BadRecord, match="there is no batch yet"): run_stage("curate")
    assert not workbench.reports.exists()


@pytest.mark.parametrize("cell, what, got, fix, code", [
    ("from cvops_wb.core.errors import BadInput\nclass Odd(BadInput): exit_code = 2\nraise Odd('two\\nlines', got=[1], fix='give a folder')",
     "two\nlines", "[1]", "give a folder", 2),
    ("import no_such_module", "01_ingest.ipynb stopped in cell [5]", "ModuleNotFoundError: No module named 'no_such_module'", None, 1),
])
def test_a_failing_cell(alone, cell, what, got, fix, code):
    write_ingest(alone.root, cell)
    with pytest.raises(RunFailed) as caught: run_stage("ingest")
    error = caught.value
    assert (error.what, error.got, error.exit_code) == (what, got, code) and (fix is None or error.fix == fix)
    assert folders(alone) == {error.folder} and error.folder.endswith(".failed")
    assert not (alone.reports/error.folder/"record.json").exists() and (alone.reports/error.folder/"notebook.html").is_file()


@pytest.mark.parametrize("name, text, want", [
    ("BadInput", "no image\n  got: photos\n  fix: give images", ("no image", "photos", "give images")),
    ("BadInput", "no image\n  fix: give images", ("no image", None, "give images")),
    ("OSError", "[Errno 28] No space left on device: 'x'", ("the disk is full", "[Errno 28] No space left on device: 'x'", None)),
    ("ValueError", "", ("05_train.ipynb stopped in cell [7]", "ValueError: ", None)),
])
def test_an_error_that_came_before_the_run_was_open(tmp_path, name, text, want):
    error = explain_cell(Task(tmp_path/"05_train.ipynb", tmp_path, {}, tmp_path, {}), 7, name, text)
    assert (error.what, error.got) == want[:2] and error.fix and (want[2] is None or error.fix == want[2]) and error.exit_code == 1


@pytest.mark.parametrize("cells, says", [
    (["import os\nos._exit(0)"], "died in cell 6 of 7"),
    (["raise SystemExit(0)"], "ended without a record"),
    (["finish = run.finish\ndef run_finish(record):\n    finish(record)\n    (run.out/'samples.txt').write_text('later')\nrun.finish = run_finish"], "changed after its hash"),
    (["import os\nrun.context['run'] = 'ingest-ffffffffff'"], "another run"),
])
def test_success_is_never_claimed(alone, cells, says):
    write_ingest(alone.root, *cells)
    with pytest.raises(CvopsError) as caught: run_stage("ingest")
    assert says in str(caught.value) and all(name.endswith(".failed") for name in folders(alone))


def test_the_wrong_stage(alone):
    write_ingest(alone.root, name="03_explore")
    with pytest.raises(RunFailed, match="another stage"): run_stage("explore")


def test_a_killed_kernel_is_a_failure_and_leaves_nobody(alone):
    write_ingest(alone.root)
    good = run_stage("ingest").envelope.run
    kill = "import os, signal, subprocess\nif source == 'synth':\n    subprocess.Popen(['sleep', '300'], start_new_session=True)\n    os.kill(os.getpid(), signal.SIGKILL)"
    write_ingest(alone.root, "'more'", kill)
    with pytest.raises(RunFailed) as caught: run_stage("ingest")
    assert "SIGKILL" in caught.value.got and "died in cell 7 of 8" in caught.value.what and caught.value.exit_code == 1
    assert folders(alone) == {good, caught.value.folder} and not (alone.reports/caught.value.folder/"record.json").exists()


@pytest.mark.slow
def test_a_failed_repeat_leaves_the_earlier_result(alone):
    write_ingest(alone.root, "import os\nif os.path.exists('break'): raise ValueError('broken')")
    first = run_stage("ingest")
    (alone.root/"break").touch()
    with pytest.raises(RunFailed, match="stopped in cell"): run_stage("ingest", force=True)
    assert read_envelope(alone.reports/first.envelope.run) == first.envelope and run_stage("ingest").reused
    (alone.root/"break").unlink()
    assert not run_stage("ingest", force=True).reused and not [p for p in alone.reports.glob(".*") if p.name != ".locks"]


def test_what_a_notebook_leaves_running_is_ended(alone):
    write_ingest(alone.root, "import subprocess\nprint(subprocess.Popen(['sleep', '300'], start_new_session=True).pid)")
    run_stage("ingest")


def test_two_at_once_make_one(alone):
    write_ingest(alone.root, "import time\ntime.sleep(1)")
    outcomes, told = [], []
    threads = [threading.Thread(target=lambda: outcomes.append(run_stage("ingest", settings=alone, report=lambda *a: told.append(a[2])))) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(o.reused for o in outcomes) == [False, True] and any("waiting" in line for line in told)


@pytest.mark.slow
def test_leftovers_of_a_crash_are_put_right(alone):
    write_ingest(alone.root)
    run = run_stage("ingest").envelope.run
    (alone.reports/run).rename(alone.reports/f".{run}.old")         # killed between the two renames
    (alone.reports/f"{run}.part").mkdir()
    (alone.reports/f"{run}.part"/"record.json").write_text("{")
    assert run_stage("ingest").reused
    assert not run_stage("ingest", force=True).reused and folders(alone) == {run}


CLI = [sys.executable, "-c", "from cvops_wb.loop.cli import main; main()"]


def start_slow(root) -> tuple[subprocess.Popen, str]:
    "`cvops ingest` in a notebook that sleeps beside a program of its own."
    cell = ("import subprocess, time\nfrom pathlib import Path\nsubprocess.Popen(['sleep', '300'], start_new_session=True)\n"
            "Path('started').touch()\ntry: time.sleep(300)\nfinally: Path('unwound').touch()")
    write_ingest(root, cell)
    process = subprocess.Popen([*CLI, "ingest", "synth"], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while not (root/"started").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(.05)
    return process, ""


@pytest.mark.slow
@pytest.mark.parametrize("sign, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_from_outside(alone, sign, code):
    process, _ = start_slow(alone.root)
    process.send_signal(sign)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert folders(alone) == set() and (alone.root/"unwound").exists() and "Traceback" not in output
    assert processes_of(alone.root) == []
    write_ingest(alone.root)
    assert not run_stage("ingest").reused


@pytest.mark.slow
def test_killed_outright(alone):
    process, _ = start_slow(alone.root)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any("ipykernel" in line for line in processes_of(alone.root)) and time.monotonic() < deadline: time.sleep(.1)
    assert not any("ipykernel" in line for line in processes_of(alone.root))
    for orphan in psutil.process_iter():    # a program in a session of its own outlives a kill -9 of everything above it
        try:
            if orphan.environ().get("CVOPS_ROOT") == str(alone.root): orphan.kill()
        except (psutil.Error, OSError): continue
    (alone.root/"started").unlink()
    write_ingest(alone.root)
    assert not run_stage("ingest").reused


@pytest.fixture
def full_disk(tmp_path):
    "A function that mounts a tmpfs of so many kilobytes."
    mounted = []

    def mount(name: str, kilobytes: int):
        folder = tmp_path/name
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode: pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted: subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes, count", [(200, 5_000_000), (40, 10)])   # the notebook's own file; the runner's
def test_a_full_disk(workbench, full_disk, monkeypatch, kilobytes, count):
    write_ingest(workbench.root)
    folder = full_disk("reports", kilobytes)
    root = folder/"bench"
    root.mkdir()
    for name in ("settings.ini", "nbs"):
        (shutil.copytree if (workbench.root/name).is_dir() else shutil.copy)(workbench.root/name, root/name)
    monkeypatch.setenv("CVOPS_ROOT", str(root))
    with pytest.raises(CvopsError) as caught: run_stage("ingest", {"count": count})
    assert "disk is full" in caught.value.what and "cvops clean" in caught.value.fix and isinstance(caught.value, NoRoom | RunFailed)
    assert not [p for p in (root/"reports").glob("*") if (p/"record.json").exists()]
    subprocess.run(["mount", "-o", "remount,size=8000k", str(folder)], check=True)
    assert not run_stage("ingest", {"count": 10}).reused


def test_by_hand(workbench, monkeypatch):
    from cvops_wb.core.places import locate
    from cvops_wb.core.records import Batch
    from cvops_wb.loop import open_run
    write_ingest(workbench.root)
    (workbench.root/"nbs/runs/deep").mkdir()
    monkeypatch.chdir(workbench.root/"nbs/runs/deep")
    monkeypatch.delenv("CVOPS_ROOT")
    monkeypatch.setenv("CVOPS_PART", "")
    run = open_run("ingest")
    assert run.out == workbench.reports/"ingest-by-hand" and os.getcwd() == str(workbench.root)
    (run.out/"table.csv").write_text("a")
    assert locate("reports/ingest-by-hand/table.csv") == run.out/"table.csv"
    done = run.finish(Batch("<b>", "folder", "reports/ingest-by-hand/table.csv", 1, 1, 0, {}))
    assert "&lt;b&gt;" not in done._repr_html_() and "ingest-by-hand" in done._repr_html_()
    assert find_run(workbench, "batch").run == "ingest-by-hand" and not list(open_run("ingest").out.iterdir())


def test_a_path_outside_is_no_place_to_write(workbench):
    from cvops_wb.core.errors import BadInput
    from cvops_wb.loop import open_run
    with pytest.raises(BadInput): open_run("ingest", "../elsewhere")
    with pytest.raises(WrongUsage): run_stage("ingest", {"out": "x"}) if write_ingest(workbench.root) else None


def test_figures_are_shown_without_pyplot(alone):
    cell = "from cvops_wb.core.drawing import draw_bars\ndraw_bars({'tea': 3, 'milk': 5})"
    write_ingest(alone.root, cell, "from PIL import Image\nImage.new('RGB', (40, 40), 'red')")
    run = run_stage("ingest").envelope.run
    outputs = [o for c in json.loads((alone.reports/run/"notebook.ipynb").read_text())["cells"] for o in c.get("outputs", [])]
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == 2
    assert (alone.reports/run/"notebook.html").read_text().count("data:image/png;base64,") == 2


def test_a_notebook_of_ones_own(alone):
    write_notebook(alone.root/"nbs/runs/20_count.ipynb", 'batch: str = ""\nout: str = ""',
                   "from cvops_wb.core.records import Bento\nfrom cvops_wb.loop import open_run\nrun = open_run('count', out)\ntaken = run.load('batch', batch)",
                   "run.finish(Bento('own:1', 'x', 1, 'own', ''))")
    write_ingest(alone.root)
    run_stage("ingest")
    assert run_stage("count").envelope.record.tag == "own:1" and find_run(alone, "count").stage == "count"
