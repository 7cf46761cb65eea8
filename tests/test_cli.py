"The console script: what it prints where, and with which exit status."
import json
import os
import re
import subprocess
import sys
import time

import pytest
from loop_bench import write_curate, write_ingest, write_notebook

MAIN = [sys.executable, "-c", "from cvops_wb.loop.cli import main; main()"]


def call(*arguments, **environment):
    "Run `cvops` in the current folder."
    return subprocess.run([*MAIN, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, "NO_COLOR": "1", **environment}, timeout=120)


COMMANDS = ["init", "demo", "ingest", "curate", "snapshot", "train", "evaluate", "register", "package", "rehearse", "serve", "monitor", "dashboard", "spotcheck", "suspects", "compare", "piles", "predict", "rollout", "run", "cancel", "lab", "synth", "convert", "sweep",
            "export", "status", "lineage", "doctor", "clean", "models", "rollback", "reproduce", "log", "diff", "checkout", "pull", "relabel", "labels", "forget", "backup", "restore", "watch"]


def test_help_is_in_the_order_of_the_loop():
    text = call("--help").stdout
    assert re.findall(r"^  (\w+) ", text.split("Begin:")[1].split("Exit status")[0], re.M) == COMMANDS
    assert "The loop, in order:" in text and "cvops demo --data photos/" in text and "Exit status" in text


GROUPED = [f"rollout {name}" for name in ("start", "status", "promote", "abort", "history", "watch")] + [f"watch {name}" for name in ("rules", "grafana", "tell")]


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name not in ("rollout", "watch")), *GROUPED])
def test_every_command_takes_json_and_explains_itself(command):
    from typer.testing import CliRunner

    from cvops_wb.loop.cli import app
    text = CliRunner().invoke(app, [*command.split(), "--help"]).stdout
    assert "--json" in text and text.splitlines()[2].strip().endswith(".")
    assert command in ("status", "lineage", "doctor", "models", "log", "diff", "labels", "cancel", *GROUPED[1:2], *GROUPED[3:]) or "--dry-run" in text


def test_the_cost_of_help(record_property):
    def cpu(*command):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system
    bare = min(cpu(sys.executable, "-c", "import cvops_wb") for _ in range(3))
    full = min(cpu(*MAIN, "--help") for _ in range(3))
    print(f"import cvops_wb {bare:.3f} s, cvops --help {full:.3f} s of CPU")
    record_property("import_s", bare)
    record_property("help_s", full)
    assert full < 3, "ten times the budget: something heavy is imported"


def test_help_imports_nothing_heavy():
    code = ("import sys, cvops_wb.loop.cli; print(sorted(m for m in sys.modules if m.split('.')[0] in "
            "('rich', 'numpy', 'pandas', 'torch', 'papermill', 'nbconvert', 'mlflow', 'fiftyone', 'bentoml', 'evidently', 'plotly', 'psutil')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("arguments, code, kind, says", [
    (["ingest", "synth", "-p", "cuont=3"], 2, "UnknownParameter", "did you mean 'count'?"),
    (["ingest", "synth", "-p", "count=three"], 2, "BadParameter", "must be int"),
    (["ingest", "synth", "-p", "count"], 2, "WrongUsage", "KEY=VALUE"),
    (["ingest", "synth", "-p", "out=/tmp"], 2, "WrongUsage", "set by the runner"),
    (["ingest"], 2, "WrongUsage", "SRC"), (["ingest", "a", "b"], 2, "WrongUsage", "unexpected extra argument"),
    (["ingset", "synth"], 2, "WrongUsage", "Did you mean 'ingest'"), (["ingest", "synth", "--foo"], 2, "WrongUsage", "--foo"),
    (["run", "inget"], 2, "UnknownName", "did you mean 'ingest'?"),
    (["train"], 2, "UnknownName", "unknown run notebook 'train'"),
    (["lineage", "nothing"], 2, "UnknownName", "unknown name 'nothing'"),
    (["serve"], 1, "BadRecord", "there is no bento yet"),
    (["init", "."], 2, "WrongUsage", "a workbench already"),
])
def test_errors_have_three_parts_and_a_status(workbench, arguments, code, kind, says):
    write_ingest(workbench.root)
    done = call(*arguments, "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["exit"], told["ok"], told["error"]["kind"]) == (code, code, False, kind) and says in told["error"]["what"]
    assert told["error"]["fix"] and says in done.stderr and "Traceback" not in done.stderr and not workbench.reports.exists()


def test_without_a_workbench(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CVOPS_ROOT", raising=False)
    done = call("status")
    assert done.returncode == 2 and "there is no workbench here" in done.stderr and "cvops init DIR" in done.stderr


@pytest.mark.slow
def test_one_document_and_nothing_else(workbench):
    write_ingest(workbench.root, "import os, sys\nprint('to stdout')\nos.write(1, b'raw\\n')\nprint('to stderr', file=sys.stderr)")
    write_curate(workbench.root)
    planned = json.loads(call("ingest", "synth", "--dry-run", "--json").stdout)
    assert planned["plan"][0]["state"] == "run" and not workbench.reports.exists()
    done = call("ingest", "synth", "-p", "count=4", "-p", "loud=yes", "--json")
    told = json.loads(done.stdout)
    stage, = told["stages"]
    assert done.returncode == 0 and told["ok"] and told["schema"] == 1 and told["command"] == "ingest"
    assert stage["record"]["count"] == 4 and stage["run"] == planned["plan"][0]["run"] or stage["run"].startswith("ingest-")
    assert not stage["reused"] and (workbench.root/stage["page"]).is_file() and "ingest" in done.stderr and "raw" not in done.stderr
    plain = call("ingest", "synth", "-p", "count=4", "-p", "loud=yes")
    assert plain.stdout.strip() == stage["page"] and "reused" in plain.stderr and plain.returncode == 0
    forced = json.loads(call("ingest", "synth", "-p", "count=4", "-p", "loud=yes", "--force", "--json").stdout)
    assert not forced["stages"][0]["reused"]
    listed = json.loads(call("run", "ingest", "--list", "--json").stdout)["notebooks"][0]
    assert [p["name"] for p in listed["parameters"]] == ["source", "count", "rate", "maybe", "loud"]
    status = json.loads(call("status", "--json").stdout)
    assert status["stages"][0]["run"] == stage["run"] and status["stages"][1]["text"] == "not run yet"
    assert "reading" not in call("lineage", stage["run"]).stdout and stage["run"] in call("lineage", stage["run"][:12]).stdout
    assert json.loads(call("clean", "--json").stdout)["ok"]


@pytest.mark.slow
def test_failures_and_refusals(workbench):
    write_ingest(workbench.root, "from cvops_wb.core.errors import BadInput\nraise BadInput('no image here', got=source, fix='give a folder of images')")
    done = call("ingest", "synth", "--json")
    error = json.loads(done.stdout)["errors"]["ingest"]
    assert done.returncode == 1 and (error["kind"], error["what"], error["got"], error["fix"]) == ("BadInput", "no image here", "synth", "give a folder of images")
    assert error["folder"].endswith(".failed") and "cvops: no image here\n  got: synth\n  fix: give a folder of images\n  see: reports/" in done.stderr
    assert "Traceback" not in done.stderr and json.loads(call("status", "--json").stdout)["leftovers"] == [error["folder"]]
    write_notebook(workbench.root/"nbs/runs/07_register.ipynb", 'name: str = ""\nout: str = ""',
                   "from cvops_wb.loop import open_run\nfrom cvops_wb.core.records import ModelVersion\nrun = open_run('register', out)",
                   "run.finish(ModelVersion(name, 0, '', 'x', '', [{'rule': 'min_accuracy', 'passed': False, 'why': '0.1 < 0.5'}], False))")
    refused = call("run", "register", "-p", "name=tea")
    assert refused.returncode == 3 and "refused: min_accuracy 0.1 < 0.5" in refused.stderr


def test_completion(workbench):
    write_ingest(workbench.root)
    def complete(words): return call(_CVOPS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert "complete" not in complete("cvops re").stderr
    done = subprocess.run([sys.executable, "-c", "import sys; sys.argv=['cvops']; from cvops_wb.loop.cli import main; main()"], capture_output=True, text=True,
                          env={**os.environ, "_CVOPS_COMPLETE": "complete_bash", "COMP_WORDS": "cvops run ingest -p c", "COMP_CWORD": "4"})
    assert done.stdout.split() == ["count="]


def test_a_closed_pipe_is_no_traceback(workbench):
    write_ingest(workbench.root)
    process = subprocess.Popen([*MAIN, "run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    time.sleep(.1)
    assert "Traceback" not in process.stderr.read()
    process.wait()
    process.stderr.close()


def test_a_path_is_seen_from_the_workbench(workbench, monkeypatch):
    from cvops_wb.loop.replies import place
    (workbench.root/"photos/tea").mkdir(parents=True)
    monkeypatch.chdir(workbench.root/"photos")
    assert place("tea") == "photos/tea" and place("synth") == "synth" and place("") == "" and place(str(workbench.root.parent)) == str(workbench.root.parent)
