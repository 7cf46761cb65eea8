"""Promise R3: a run that is killed, starved or out of disk claims nothing, leaves nobody, harms nothing, and its repeat is the same to the bit.

The sample runs in `make test`; `CVOPS_FULL=1` kills 200 times, spread over the time that the stage takes, or a piece of
that where the campaign is run in pieces: `CVOPS_PIECE=2/5` makes the second 40 of the 200. `-s` shows the tally."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from loop_bench import CURATE, write_ingest, write_notebook  # noqa: E402

from cvops_wb.core.errors import CvopsError  # noqa: E402
from cvops_wb.core.records import read_envelope  # noqa: E402
from cvops_wb.loop import run_stage  # noqa: E402
from cvops_wb.loop.kernels import close_kernels  # noqa: E402
from cvops_wb.loop.runner import find_damage  # noqa: E402

FULL = bool(os.environ.get("CVOPS_FULL"))
KILLS = 200 if FULL else 3
PIECE, PIECES = map(int, os.environ.get("CVOPS_PIECE", "1/1").split("/"))
CLI = [sys.executable, "-c", "from cvops_wb.loop.cli import main; main()"]
# Files of some size, in steps, from the seed; and a program in a session of its own, as a database or a server would be.
WORK = """
import subprocess, time, numpy
subprocess.Popen(['sleep', '300'], start_new_session=True)
numpy.random.seed(count)
for k in range(8):
    (run.out/f"part{k}.bin").write_bytes(numpy.random.bytes(200_000))
    time.sleep(.03)
"""
CHILD = """
import sys
from cvops_wb.loop import runner, run_stage
bug = sys.argv[1]
if bug == "renamed before the record":
    def execute(settings, order, report, brake, real=runner.execute):
        part = settings.reports/(order.run + '.part')
        (settings.reports/order.run).mkdir(parents=True, exist_ok=True)
        import threading, time, shutil
        def early():
            while not (part/'part0.bin').exists(): time.sleep(.005)
            shutil.copytree(part, settings.reports/order.run, dirs_exist_ok=True, ignore=lambda *_: ['.ipython'])
            (settings.reports/order.run/'record.json').write_text('{}')
        threading.Thread(target=early, daemon=True).start()
        return real(settings, order, report, brake)
    runner.execute = execute
if bug == "group not ended":
    from cvops_wb.loop.kernels import nursery
    from cvops_wb.loop import engine, kernels
    engine.end_family = kernels.watching.end_family = lambda *a, **k: None
    real = kernels.subprocess.Popen
    kernels.subprocess.Popen = lambda command, **k: real([*command[:2], 'import cvops_wb.loop.engine as e; e.end_family = lambda *a, **k: None; ' + command[2]], **k)
print(run_stage('ingest', {'count': 7}, force=True).envelope.run)
"""


@pytest.fixture
def bench(workbench):
    "A workbench with an earlier result, and the hashes that the stage gives when nobody disturbs it."
    write_ingest(workbench.root, WORK)
    write_notebook(workbench.root/"nbs/runs/02_curate.ipynb", 'batch: str = ""\nsplit: str = "grouped"\nout: str = ""', *CURATE)
    earlier, wanted = run_stage("ingest", {"count": 3}).envelope, run_stage("ingest", {"count": 7}).envelope
    close_kernels()
    yield workbench, earlier, wanted
    for process in family(workbench.root): process.kill()


def family(root) -> list[psutil.Process]:
    "Every process of the workbench but us."
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("CVOPS_ROOT") == str(root): found.append(process)
        except (psutil.Error, OSError): continue
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def find_faults(settings, earlier, patience: float = 10.) -> list[str]:
    "What the promise forbids and is so all the same."
    faults, deadline = [], time.monotonic() + patience
    while family(settings.root) and time.monotonic() < deadline: time.sleep(.05)
    if left := family(settings.root): faults.append(f"left running: {[' '.join(p.cmdline())[:60] for p in left]}")
    for folder in settings.reports.iterdir():
        if folder.name.startswith(".") or folder.name.endswith((".part", ".failed")): continue
        try: envelope = read_envelope(folder)
        except CvopsError as e: faults.append(f"{folder.name} is there without a record: {e.what}")
        else: faults += [d for d in [find_damage(envelope, settings.root)] if d]
    if find_damage(earlier, settings.root) or read_envelope(settings.reports/earlier.run) != earlier: faults.append("the earlier result was harmed")
    return faults


LIFE = 1.2      # seconds of a run in which there is a kernel, roughly


def find_victims(settings, runner, who: str, patience: float = 20.) -> list[int]:
    "The kernel, or all but the runner and the program that the stage left behind; waited for."
    deadline = time.monotonic() + patience
    while True:
        found = [p.pid for p in family(settings.root) if "sleep" not in p.name() and p.pid != runner.pid]
        kernels = [pid for pid in found if "CVOPS_TASK" in _environment(pid)]
        if kernels or runner.poll() is not None or time.monotonic() > deadline: return kernels if who == "kernel" else found
        time.sleep(.01)


def kill_at(settings, moment: float, who: str, share: float = 0., bug: str = "") -> bool:
    "Start the run, kill after so many seconds, or after that share of a kernel's life; whether there was something to kill."
    process = subprocess.Popen([sys.executable, "-c", CHILD, bug], cwd=settings.root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    time.sleep(moment if who == "runner" else 0)
    victims = [process.pid] if who == "runner" else find_victims(settings, process, who)
    if who != "runner":     # a kernel lives for a part of the stage only: from its first breath on
        time.sleep(share*LIFE)
        victims = find_victims(settings, process, who, 0)
    running = process.poll() is None and bool(victims)
    for pid in victims if running else []:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    try: process.communicate(timeout=60)
    except subprocess.TimeoutExpired: process.kill()
    return running and process.returncode != 0


def _environment(pid: int) -> dict:
    try: return psutil.Process(pid).environ()
    except (psutil.Error, OSError): return {}


def test_kills_spread_over_the_stage(bench):
    settings, earlier, wanted = bench
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", CHILD, ""], cwd=settings.root, check=True, capture_output=True)
    length, chance, tally = time.monotonic() - begin, random.Random(PIECE), {"runner": [], "kernel": [], "all": []}
    for k in (kills := range(KILLS)[PIECE - 1::PIECES]):
        who = ("runner", "kernel", "all")[k//PIECES % 3]
        tally[who].append(kill_at(settings, length*(k + chance.random())/KILLS, who, k/KILLS))
        assert find_faults(settings, earlier) == [], (k, who)
        if k//PIECES % 10 == 9 or k == kills[-1]:
            again = run_stage("ingest", {"count": 7}, force=True).envelope
            close_kernels()
            assert again.outputs == wanted.outputs and again.record == wanted.record
    print(f"a stage of {length:.1f} s; kills that struck:", {who: f"{sum(each)} of {len(each)}" for who, each in tally.items()})
    assert sum(map(sum, tally.values())) >= len(kills)//4, "kills that come when all is over prove nothing"


@pytest.mark.parametrize("bug, says", [("renamed before the record", "without a record"), ("group not ended", "left running")])
def test_the_suite_sees_a_planted_bug(bench, bug, says):
    settings, earlier, wanted = bench
    shutil.rmtree(settings.reports/wanted.run)
    process = subprocess.Popen([sys.executable, "-c", CHILD, bug], cwd=settings.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = settings.reports/f"{wanted.run}.part"
    deadline = time.monotonic() + 60
    while not (part/"part3.bin").exists() and time.monotonic() < deadline: time.sleep(.005)
    process.kill()
    process.wait()
    assert any(says in fault for fault in find_faults(settings, earlier, 5.))


TIDYING = """
import pathlib, sys, time
from cvops_wb.loop import engine, run_stage
def pause(*args, **kwargs):
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(300)
engine.end_family = pause
run_stage('ingest', {'count': 7}, force=True)
"""


def test_a_runner_dies_before_it_has_tidied_up(bench, tmp_path):
    "The kernel has ended, what it left behind has not, and nobody is there any more who would end it but the nursery."
    settings, earlier, _ = bench
    process = subprocess.Popen([sys.executable, "-c", TIDYING, tmp_path/"tidying"], cwd=settings.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path/"tidying").exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(.01)
    while any("CVOPS_TASK" in _environment(p.pid) and "sleep" not in p.name() for p in family(settings.root)) and time.monotonic() < deadline: time.sleep(.01)
    assert any("sleep" in p.name() for p in family(settings.root)), "nothing was left behind, so nothing is proved"
    process.kill()
    process.wait()
    assert find_faults(settings, earlier) == []


def test_eight_writers_of_one_run(bench):
    settings, earlier, wanted = bench
    shutil.rmtree(settings.reports/wanted.run)
    writers = [subprocess.Popen([*CLI, "run", "ingest", "-p", "count=7", "--json"], cwd=settings.root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
               for _ in range(8 if FULL else 4)]
    told = [json.loads(writer.communicate(timeout=240)[0])["stages"][0] for writer in writers]
    assert sorted(t["reused"] for t in told) == [False] + [True]*(len(writers) - 1) and {t["run"] for t in told} == {wanted.run}
    assert find_faults(settings, earlier) == [] and read_envelope(settings.reports/wanted.run).outputs == wanted.outputs


def test_too_little_memory(bench, monkeypatch):
    settings, earlier, wanted = bench
    monkeypatch.setenv("CVOPS_RUNS_MEMORY_LIMIT", "20")
    with pytest.raises(CvopsError, match="more than its 20 MB"): run_stage("ingest", {"count": 7}, force=True)
    close_kernels()
    assert find_faults(settings, earlier) == [] and read_envelope(settings.reports/wanted.run) == wanted
    monkeypatch.delenv("CVOPS_RUNS_MEMORY_LIMIT")
    assert run_stage("ingest", {"count": 7}, force=True).envelope.outputs == wanted.outputs


def test_a_full_disk(bench, tmp_path):
    settings, earlier, wanted = bench
    shutil.move(settings.reports, tmp_path/"aside")
    settings.reports.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2600k", "tmpfs", str(settings.reports)], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        shutil.copytree(tmp_path/"aside"/earlier.run, settings.reports/earlier.run)
        with pytest.raises(CvopsError, match="disk is full"): run_stage("ingest", {"count": 7})
        close_kernels()
        assert find_faults(settings, earlier) == []
        subprocess.run(["mount", "-o", "remount,size=9000k", str(settings.reports)], check=True)
        assert run_stage("ingest", {"count": 7}).envelope.outputs == wanted.outputs
    finally:
        close_kernels()
        subprocess.run(["umount", "-l", str(settings.reports)], check=True)
