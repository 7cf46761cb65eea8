"A sweep reads its space strictly, resumes after a kill, prunes, survives failing trials, and tells it on one safe page."
import json
import os
import subprocess
import time

import pytest
from loop_bench import write_notebook
from test_loop_runs import CLI, alone  # noqa: F401

from cvops_wb.core.errors import CvopsError, WrongUsage
from cvops_wb.loop.runs import list_runs
from cvops_wb.loop.stages import read_stage
from cvops_wb.loop.sweeps import open_sweep, requeue, run_sweep, tell_sweep
from cvops_wb.loop.sweeps.pages import make_page
from cvops_wb.loop.sweeps.space import Choice, Range, read_space

PARAMETERS = 'lr: float = 0.01\nsize: int = 96\nnetwork: str = "a"\nepochs: int = 4\nsay: str = ""\nout: str = ""'
BEGIN = "import math, time\nfrom cvops_wb.core.places import name_final\nfrom cvops_wb.core.records import Candidate\nfrom cvops_wb.loop import open_run\nrun = open_run('train', out)"
FIT = '''
if network == "broken": raise ValueError("no such network")
best = 1 - abs(math.log10(lr) + 3)/2 - .1*(network == "b") - abs(size - 128)/1000
with open(run.out/"history.csv", "w") as file:
    print("epoch,loss,val_accuracy", file=file)
    for epoch in range(1, epochs + 1):
        print(f"{epoch},{1/epoch},{best*epoch/epochs}", file=file, flush=True)
        print("epoch", epoch, flush=True)
        if say == "slow": time.sleep(.3)
'''
END = ("run.finish(Candidate('s', 'classification', network, name_final(run.out, run.settings.root), ['a'], size, {'accuracy': best}, "
       "{'lr': lr, 'epochs': epochs, 'say': say}, '0'))")


def finished_runs(settings): return list_runs(settings, "train")


def write_train(root): return write_notebook(root/"nbs/runs/05_train.ipynb", PARAMETERS, BEGIN, FIT, END)


@pytest.mark.parametrize("given, want", [
    ({"lr": "1e-4..1e-2:log"}, {"lr": Range(1e-4, 1e-2, True)}), ({"lr": "0.1..0.5:0.1"}, {"lr": Range(.1, .5, False, .1)}),
    ({"size": "96..160:32"}, {"size": Range(96, 160, False, 32)}), ({"network": "a,b", "lr": "0.1"}, {"network": Choice(("a", "b"))}),
    ({"size": "96, 128"}, {"size": Choice((96, 128))}),
])
def test_a_space_that_is_meant(tmp_path, given, want): assert read_space(read_stage(write_train(tmp_path)), given).varied == want


@pytest.mark.parametrize("given, says", [
    ({"lr": "1e-2..1e-4"}, "empty"), ({"lr": "0..1:log"}, "above 0"), ({"lr": "1..x"}, "must be float"), ({"network": "1..2"}, "no range"),
    ({"size": "96..160:lg"}, "neither"), ({"size": "1.5..3"}, "must be int"), ({"network": "a,a"}, "not all different"), ({"network": "a,"}, "not all different"),
    ({"size": "96,big"}, "must be int"), ({"lrr": "1..2"}, "did you mean 'lr'"), ({"lr": "0.1"}, "nothing to sweep"), ({}, "nothing to sweep"),
    ({"lr": "nan..1"}, "must be float"), ({"out": "a,b"}, "set by the runner"), ({"size": "96..160:-3"}, "neither"),
])
def test_a_space_that_is_not(tmp_path, given, says):
    with pytest.raises(WrongUsage, match=says): read_space(read_stage(write_train(tmp_path)), given)


def test_a_sweep_finds_the_best_and_says_how_to_train_it_again(alone):  # noqa: F811
    write_train(alone.root)
    sweep = open_sweep(alone, "train", {"lr": "1e-5..1e-1:log", "network": "a,b,broken", "epochs": "3"})
    told = tell_sweep(run_sweep(sweep, 6, width=2))
    done = [t for t in told["trials"] if t["state"] in ("complete", "pruned")]
    assert len(done) == 6 and told["best"]["value"] == max(t["value"] for t in done if t["value"] is not None)
    for trial in told["trials"]:
        if trial["state"] == "fail": assert trial["parameters"]["network"] == "broken" and "no such network" in trial["error"]
        if trial["state"] == "complete": assert json.loads((alone.reports/trial["run"]/"record.json").read_text())["record"]["metrics"]["accuracy"] == trial["value"]
    again = subprocess.run([*CLI, *told["best"]["command"].split()[1:], "--json"], cwd=alone.root, capture_output=True, text=True)
    stage = json.loads(again.stdout)["stages"][0]
    assert stage["reused"] and stage["run"] == told["best"]["run"], "the command names the very run"
    before = len(told["trials"])
    assert len(tell_sweep(run_sweep(open_sweep(alone, "train", {"lr": "1e-5..1e-1:log", "network": "a,b,broken", "epochs": "3"}), 6))["trials"]) == before


def test_a_worse_trial_is_stopped_early(alone):  # noqa: F811
    write_train(alone.root)
    sweep = open_sweep(alone, "train", {"lr": "0.00001..1", "epochs": "8", "say": "slow"})
    for lr in (1e-3, 1.1e-3, 9e-4, 1.): sweep.study.enqueue_trial({"lr": lr})
    told = tell_sweep(run_sweep(sweep, 4, width=1))
    assert [t["state"] for t in told["trials"]] == ["complete"]*3 + ["pruned"] and len(told["trials"][3]["epochs"]) < 8
    assert not list(alone.reports.glob("*.part")), "what was stopped leaves no folder"


@pytest.mark.slow
def test_a_killed_sweep_goes_on(alone):  # noqa: F811
    write_train(alone.root)
    line = ["sweep", "train", "-p", "lr=1e-5..1e-1:log", "-p", "epochs=5", "-p", "say=slow", "--trials", "3", "--jobs", "1", "--json"]
    process = subprocess.Popen([*CLI, *line], cwd=alone.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while not finished_runs(alone) or not list(alone.reports.glob("train-*.part/history.csv")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(.05)
    finished = {path.name: (path/"record.json").read_bytes() for path in finished_runs(alone)}
    process.kill()
    process.communicate()
    done = subprocess.run([*CLI, *line], cwd=alone.root, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and "tried again" in done.stderr and sum(t["state"] != "fail" for t in told["trials"]) == 3, done.stderr
    values = [tuple(t["parameters"].values()) for t in told["trials"] if t["state"] == "fail"]
    assert all(any(tuple(t["parameters"].values()) == v and t["state"] != "fail" for t in told["trials"]) for v in values), "its trial was made up for"
    assert all((alone.reports/name/"record.json").read_bytes() == content for name, content in finished.items())
    assert (alone.root/told["page"]).is_file()


def test_a_trial_that_is_forgotten_fails_the_suite(alone):  # noqa: F811
    "The planted bug: a sweep that does not requeue leaves a trial running for ever."
    write_train(alone.root)
    sweep = open_sweep(alone, "train", {"lr": "1e-5..1e-1:log"})
    sweep.study.ask()
    assert [t.state.name for t in sweep.study.trials] == ["RUNNING"] and requeue(sweep.study) == 1
    assert [t.state.name for t in sweep.study.trials][0] == "FAIL"


def test_the_page_is_safe_and_whole():
    bad = '</pre><script>alert(1)</script>'
    trials = [{"number": k, "state": s, "value": v, "parameters": {bad: bad, "lr": 1e-4*10**k}, "epochs": {"1": .3}, "run": "train-0", "error": bad}
              for k, (s, v) in enumerate((("complete", .5), ("pruned", None), ("fail", None), ("complete", .7)))]
    best = {"number": 3, "value": .7, "parameters": trials[3]["parameters"], "run": "train-0", "command": f"cvops run train -p {bad}"}
    page = make_page({"sweep": bad, "stage": "train", "metric": "accuracy", "direction": "maximize", "fixed": {}, "trials": trials, "importance": {bad: .9}, "best": best})
    assert "<script" not in page and "Content-Security-Policy" in page and page.count("data:image/png") == 4 and "failed" in page and "2 finished, 1 stopped early, 1 failed" in page


def test_a_metric_that_is_not_there(alone):  # noqa: F811
    write_train(alone.root)
    with pytest.raises(CvopsError, match="no metric 'map50'"): run_sweep(open_sweep(alone, "train", {"lr": "1e-5..1e-1:log"}, "map50"), 1, width=1)
    assert os.listdir(alone.store)
