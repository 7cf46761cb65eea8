"A kernel is forked warm, is used once, and is as new as a cold one; limits and `cancel` end a run, and say which of them did."
import json
import os
import subprocess
import time

import psutil
import pytest
from loop_bench import write_ingest
from test_loop_runs import CLI, alone, folders, processes_of, start_slow  # noqa: F401

from cvops_wb.core.errors import CvopsError, UnknownName
from cvops_wb.loop import kernels, run_stage
from cvops_wb.loop.kernels import KEEPERS, close_kernels, find_keeper
from cvops_wb.loop.kernels.watching import NOTE, DeadKernel, OutOfMemory, TimedOut, cancel_run, list_running

LEAVE = "import json\nfrom pathlib import Path\ndef leave(fact):\n    with open('facts', 'a') as file: file.write(json.dumps(fact) + chr(10))\n"


def facts(root) -> list: return [json.loads(line) for line in (root/"facts").read_text().splitlines()]


def test_each_run_has_a_new_kernel_in_the_state_of_a_cold_one(alone, monkeypatch):  # noqa: F811
    look = ("import os, random, sys\nimport numpy\nleave([os.getpid(), os.getcwd(), os.environ.get('SPECIAL'), os.environ['CVOPS_TASK'], "
            "random.random(), float(numpy.random.rand()), 'left_behind' in globals() or hasattr(numpy, 'left_behind'), threading.active_count()])\n"
            "left_behind = numpy.left_behind = True\nos.environ['SPECIAL'] = 'dirty'; os.chdir('/')")
    write_ingest(alone.root, LEAVE + "import threading", look, f"os.chdir({str(alone.root)!r})")
    for k, warm in enumerate(("true", "true", "true", "false")):
        monkeypatch.setenv("CVOPS_RUNS_WARM", warm)
        if k == 1: monkeypatch.setenv("SPECIAL", "given")
        assert not run_stage("ingest", {"count": k}).reused
    seen = facts(alone.root)
    assert [s[2] for s in seen] == [None, "given", "given", "given"] and {s[1] for s in seen} == {str(alone.root)} and not any(s[6] for s in seen)
    for column in (0, 3, 4, 5): assert len({s[column] for s in seen}) == 4, column
    assert len({s[7] for s in seen[:3]}) == 1 and seen[0][7] <= seen[3][7]     # a cold one has a thread that looks for its parent


def test_changed_code_is_seen_by_the_next_kernel(alone, monkeypatch):  # noqa: F811
    module = alone.root/"lib"/"own_module.py"
    module.parent.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    write_ingest(alone.root, LEAVE + "import own_module\nleave(own_module.ANSWER)")
    module.write_text("ANSWER = 1")
    run_stage("ingest", {"count": 1})
    keeper = next(iter(KEEPERS.values()))
    keeper.send({"do": "import", "modules": ["own_module"]})
    time.sleep(1)
    run_stage("ingest", {"count": 2})
    assert KEEPERS[next(iter(KEEPERS))] is keeper
    module.write_text("ANSWER = 2")
    run_stage("ingest", {"count": 3})
    assert facts(alone.root) == [1, 1, 2] and KEEPERS[next(iter(KEEPERS))] is not keeper


def test_another_environment_is_another_nursery():
    environment = {**os.environ, "CVOPS_ROOT": "/"}
    first = find_keeper(environment)
    assert find_keeper(environment | {"CVOPS_CONTEXT": "{}"}) is first and find_keeper(environment | {"OMP_NUM_THREADS": "3"}) is not first
    close_kernels()
    assert first.process.wait(10) is not None and not KEEPERS


@pytest.mark.parametrize("cell, limits, error, kind", [
    ("import time\nwhile True:\n    try: time.sleep(300)\n    except KeyboardInterrupt: pass", {"TIME_LIMIT": "2"}, TimedOut, "took longer than its 2 s"),
    ("held = []\nwhile len(held) < 400: held.append(bytearray(b'x'*10_000_000)); __import__('time').sleep(.01)", {"MEMORY_LIMIT": "400"}, OutOfMemory, "more than its 400 MB"),
    ("import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'x = bytearray(b\"x\"*600_000_000); import time; time.sleep(99)'], start_new_session=True)\ntime.sleep(90)",
     {"MEMORY_LIMIT": "400"}, OutOfMemory, "more than its 400 MB"),
])
def test_a_limit_ends_the_run_and_is_named(alone, monkeypatch, cell, limits, error, kind):  # noqa: F811
    write_ingest(alone.root)
    good = run_stage("ingest").envelope.run
    before = (alone.reports/good/"record.json").read_bytes()
    for name, value in limits.items(): monkeypatch.setenv(f"CVOPS_RUNS_{name}", value)
    write_ingest(alone.root, cell)
    with pytest.raises(error, match=kind) as caught: run_stage("ingest")
    assert caught.value.exit_code == 1 and folders(alone) == {good, caught.value.folder} and (alone.reports/good/"record.json").read_bytes() == before
    cells = json.loads((alone.reports/caught.value.folder/"notebook.ipynb").read_text())["cells"]
    assert [c["metadata"]["papermill"]["status"] for c in cells if "papermill" in c["metadata"]][-2:] == ["failed", "pending"]


@pytest.mark.parametrize("kills, origin", [(0, DeadKernel.__name__), (1, OutOfMemory.__name__)])
def test_a_death_by_the_machine_is_told_from_any_other(alone, monkeypatch, kills, origin):  # noqa: F811
    from cvops_wb.loop import engine
    count = engine.count_kills()
    monkeypatch.setattr(engine, "count_kills", lambda: count + kills)
    write_ingest(alone.root, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(CvopsError, match="died in cell 6 of 7") as caught: run_stage("ingest")
    assert caught.value.origin == origin and "SIGKILL" in caught.value.got


def test_cancelled_from_another_shell(alone):  # noqa: F811
    process, _ = start_slow(alone.root)
    run = next(iter(list_running(alone)))
    done = subprocess.run([*CLI, "cancel", run[:9], "--json"], cwd=alone.root, capture_output=True, text=True, timeout=40)
    assert json.loads(done.stdout)["cancelled"] == run and done.returncode == 0
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "cancelled" in output and folders(alone) == set() and processes_of(alone.root) == []
    with pytest.raises(UnknownName, match="running run"): cancel_run(alone, run)


def test_a_run_whose_runner_was_killed_is_cleared_by_cancel_or_by_the_next(alone):  # noqa: F811
    for clear in (lambda: cancel_run(alone, "ingest"), lambda: run_stage("ingest", {"count": 3})):
        orphan = subprocess.Popen(["sleep", "300"], env={**os.environ, "CVOPS_TASK": "e"*32, "CVOPS_ROOT": str(alone.root)})
        write_ingest(alone.root)
        from cvops_wb.loop.runner import prepare_run
        part = alone.reports/f"{prepare_run(alone, 'ingest', {'count': 3}).run}.part"
        part.mkdir(parents=True)
        (part/NOTE).write_text(json.dumps({"pid": 2**22 - 1, "mark": "e"*32, "time": 0}))
        from cvops_wb.loop.cli import cancel
        told = cancel("")       # lists them
        assert "which is gone" in told.text and not told.document["running"][part.stem]["alive"]
        clear()
        assert orphan.wait(10) is not None and not part.exists()


@pytest.mark.slow
def test_the_nursery_goes_with_its_runner_and_takes_all_with_it(alone):  # noqa: F811
    process, _ = start_slow(alone.root)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=10)
    deadline = time.monotonic() + 10
    while processes_of(alone.root) and time.monotonic() < deadline: time.sleep(.1)
    assert processes_of(alone.root) == [] and not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children)


@pytest.mark.slow
def test_a_nursery_that_is_killed_is_replaced(alone):  # noqa: F811
    write_ingest(alone.root)
    run_stage("ingest", {"count": 1})
    next(iter(KEEPERS.values())).process.kill()
    assert not run_stage("ingest", {"count": 2}).reused


def test_what_a_kernel_put_off_until_its_end_is_done(alone):  # noqa: F811
    write_ingest(alone.root, "import atexit\nfrom pathlib import Path\nat = Path('at_exit')\natexit.register(at.touch)")
    run_stage("ingest")
    assert (alone.root/"at_exit").exists()


def test_code_that_keeps_changing_is_named(alone, monkeypatch):  # noqa: F811
    "Each nursery is stale before it can fork, as while an editor or a merge writes modules."
    module = alone.root/"lib"/"restless.py"
    module.parent.mkdir()
    module.write_text("ANSWER = 1")
    monkeypatch.setenv("PYTHONPATH", f"{module.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(kernels, "PATIENCE", (0., 0.))
    fork = kernels.Keeper.fork
    def change(keeper, order):
        with keeper.changed: keeper.changed.wait_for(lambda: keeper.ready, 60)
        keeper.send({"do": "import", "modules": ["restless"]})
        time.sleep(1)       # as above: it says nothing when it has imported
        module.write_text(f"ANSWER = {time.time_ns()}")
        return fork(keeper, order)
    monkeypatch.setattr(kernels.Keeper, "fork", change)
    write_ingest(alone.root)
    with pytest.raises(CvopsError, match="restless.py") as error: run_stage("ingest", {"count": 1})
    assert "when no code is being changed" in error.value.fix
