"The stages in order: two at once, what fails stops only what depends on it, a refusal is not a fault."
import io

import pytest
from loop_bench import write_curate, write_ingest, write_notebook

from cvops_wb.core.errors import WrongUsage
from cvops_wb.loop.flow import DEMO, LOOP, Board, list_needs, make_demo, plan_flow, run_flow
from cvops_wb.loop.stages import check_parameters, find_stage

OPEN = "from cvops_wb.loop import open_run\nrun = open_run('{0}', out)\nfrom cvops_wb.core.records import {1}\ntaken = run.load('{2}', {2})"
STAMP = "import time\nfrom pathlib import Path\nPath('{0}-began').write_text(str(time.time()))\ntime.sleep({1})\nPath('{0}-ended').write_text(str(time.time()))"
EXPLORE = ("03_explore", 'selection: str = ""\nout: str = ""', OPEN.format("explore", "View", "selection"), STAMP.format("explore", 2),
           "run.finish(View(selection, 'x', 3))")
SNAPSHOT = ("04_snapshot", 'selection: str = ""\nout: str = ""', OPEN.format("snapshot", "Snapshot", "selection"), STAMP.format("snapshot", 2),
            "run.finish(Snapshot('abc', 'x', [], 3, ['tea'], {}))")
BROKEN = (*EXPLORE[:3], "raise ValueError('no database')", EXPLORE[-1])
REGISTER = ("07_register", 'snapshot: str = ""\nout: str = ""', OPEN.format("register", "ModelVersion", "snapshot"),
            "run.finish(ModelVersion('tea', 0, '', 'x', '', [{'rule': 'min_accuracy', 'passed': False, 'why': '0.1 < 0.5'}], False))")
PACKAGE = ("08_package", 'version: str = ""\nout: str = ""', OPEN.format("package", "Bento", "version"), "run.finish(Bento('tea:1', 'x', 1, 'tea', ''))")


def write_all(root, *notebooks):
    write_ingest(root)
    write_curate(root)
    for name, *cells in notebooks: write_notebook(root/f"nbs/runs/{name}.ipynb", *cells)


@pytest.mark.slow
def test_two_at_once_then_all_reused(workbench):
    write_all(workbench.root, EXPLORE, SNAPSHOT)
    targets, stream = ["ingest", "curate", "explore", "snapshot"], io.StringIO()
    given = {"ingest": {"count": 2}}
    assert [(s.stage, s.state, s.after) for s in plan_flow(targets, given)] == [
        ("ingest", "run", ()), ("curate", "run", ("ingest",)), ("explore", "run", ("curate",)), ("snapshot", "run", ("curate",))]
    result = run_flow(targets, given, board=Board(stream))
    assert result.exit_code == 0 and list(result.outcomes)[:2] == ["ingest", "curate"] and not result.errors
    times = {n: float((workbench.root/n).read_text()) for n in ("explore-began", "explore-ended", "snapshot-began", "snapshot-ended")}
    assert times["explore-began"] < times["snapshot-ended"] and times["snapshot-began"] < times["explore-ended"], "side by side"
    assert [line.split()[:2] for line in stream.getvalue().splitlines()][:2] == [[">", "ingest"], ["+", "ingest"]]

    (workbench.cache/"mongo").mkdir(parents=True)     # as explore would have left it
    again = run_flow(targets, given)
    assert all(o.reused for o in again.outcomes.values())
    assert all(s.state == "reuse" and s.run for s in plan_flow(targets, given))
    assert [s.state for s in plan_flow(targets, {"ingest": {"count": 7}})] == ["run"]*4


@pytest.mark.slow
def test_a_side_branch_may_fail_and_a_gate_may_refuse(workbench):
    write_all(workbench.root, BROKEN, SNAPSHOT, REGISTER, PACKAGE)
    stream = io.StringIO()
    result = run_flow(["ingest", "curate", "explore", "snapshot", "register", "package"], board=Board(stream))
    assert set(result.outcomes) == {"ingest", "curate", "snapshot", "register"} and set(result.errors) == {"explore"}
    assert result.skipped == {"package": "register"} and result.refused and result.exit_code == 1
    text = stream.getvalue()
    assert "refused: min_accuracy 0.1 < 0.5" in text and "left out: it needs register" in text and "failed: 03_explore.ipynb stopped" in text
    assert run_flow(["register"]).exit_code == 3


@pytest.mark.parametrize("given", [{"ingest": {"cuont": 1}}, {"curate": {"split": 5}}])
def test_parameters_are_checked_before_the_first_stage(workbench, given):
    write_all(workbench.root)
    for call in (plan_flow, run_flow):
        with pytest.raises(WrongUsage): call(["ingest", "curate"], given)
    assert not workbench.reports.exists()


def test_the_graph_of_the_real_notebooks():
    from pathlib import Path

    from cvops_wb.core.settings import load_settings
    settings = load_settings(Path(__file__).parents[1])
    needs = {name: set(list_needs(find_stage(settings, name), LOOP, {}).values()) for name in LOOP}
    assert needs["explore"] == needs["snapshot"] == {"curate"} and needs["train"] == {"snapshot"} and needs["register"] == {"evaluate"}
    assert needs["rehearse"] == {"package", "snapshot"} and needs["monitor"] == {"package", "rehearse"}
    for given in (make_demo(), make_demo("photos", "coarse")):
        for name, values in given.items(): check_parameters(find_stage(settings, name), values)
    assert make_demo() == DEMO and make_demo("a/photos/")["snapshot"]["message"] == "images from photos"


class Terminal(io.StringIO):
    "A stream that says it is one."
    encoding = "utf-8"
    def isatty(self): return True


def test_the_board_renews_its_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    board = Board(stream)
    for name in ("explore", "train"): board.start(name)
    board.drawn = 0
    board.update("train", 3, 11, "epoch 2\x1b]0;evil\x07\r\nmore")
    board.finish("explore", "done", "980 images", "26.0 s")
    text = stream.getvalue()
    assert "\x1b]0" not in text and "\x07" not in text and "3/11" in text and "\x1b[2F\x1b[J" in text
    assert text.endswith("\n") and "\x1b[32m✓\x1b[0m explore" in text.splitlines()[-2] and "train" in text.splitlines()[-1]


def test_the_board_is_plain_in_a_log():
    stream = io.StringIO()
    board = Board(stream)
    board.start("train")
    board.update("train", 3, 11, "epoch 2")
    board.finish("train", "reused", "a model", "reused")
    assert [line.split() for line in stream.getvalue().splitlines()] == [[">", "train"], ["=", "train", "a", "model", "reused"]]
    quiet = Board(stream, quiet=True)
    quiet.start("x"); quiet.finish("x", "failed", "y")
    assert len(stream.getvalue().splitlines()) == 2


def test_a_log_hears_of_long_work_now_and_then(monkeypatch):
    stream, clock = io.StringIO(), iter([0, 10, 61, 61, 70, 70])
    monkeypatch.setattr("cvops_wb.loop.flow.time.monotonic", lambda: next(clock))
    board = Board(stream)
    board.start("train")
    for epoch in (1, 2, 3): board.update("train", 3, 11, f"epoch {epoch}")
    assert [line.split()[1:] for line in stream.getvalue().splitlines()] == [["train"], ["train", "epoch", "2"]]
