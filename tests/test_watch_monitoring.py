"The stage: a version's newest predictions against the reference that the version carries."
import json
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from watch_bench import make_bento, write_log, write_run

from cvops_wb.core.errors import BadInput, BadModel
from cvops_wb.core.files import dump_json
from cvops_wb.core.records import parse_record
from cvops_wb.serve.rollouts.states import end
from cvops_wb.watch import (
    MonitorSpec,
    SpotcheckSpec,
    draw_columns,
    draw_timeline,
    monitor,
    read_drift_state,
    spotcheck,
    take_window,
)
from cvops_wb.watch.drift import make_window
from cvops_wb.watch.monitoring import trace_column
from cvops_wb.watch.verdicts.rounds import estimate_accuracy
from cvops_wb.watch.verdicts.sheets import say_estimate

QUICK = MonitorSpec(report=False)
LOG = ".cvops/store/predictions"
REPO = Path(__file__).parents[1]


@pytest.fixture
def bento(workbench): return make_bento(workbench)


@pytest.fixture
def out(workbench, monkeypatch):
    "The unfinished folder of a run."
    folder = workbench.reports/"monitor-0000000000.part"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CVOPS_PART", str(folder))
    return folder


def test_a_dark_camera(workbench, bento, out):
    write_log(workbench.root/LOG, make_window(600, seed=2, darker=.4, dark_camera="camera-2"))
    window = monitor(LOG, bento, QUICK, out)
    assert window.drifted and window.share >= .3 and window.count == 600 and window.version == 1
    assert window.columns["brightness"]["note"].endswith("mostly camera-2")
    assert .6 < window.accuracy < .93 and window.since < window.until and window.report.startswith("reports/monitor-0000000000/")
    assert sorted(p.name for p in out.iterdir()) == ["columns.parquet", "drift.html", "reference.parquet", "window.parquet"]
    assert parse_record(json.loads(dump_json(window.to_dict()))) == window
    for figure in (draw_timeline(window), draw_columns(window)): assert len(figure.axes) >= 2


@pytest.mark.parametrize("count, said", [(30, "not known, with 30 labelled answers in the reference; cvops spotcheck asks people"), (0, "not known, with 0 labelled answers in the reference; cvops spotcheck asks people")])
def test_why_accuracy_is_not_known_is_said_as_it_is(workbench, count, said):
    reference = make_window(60, seed=4)
    reference.loc[count:, "label"] = ""
    accuracy, checks = estimate_accuracy(reference, make_window(300, seed=5), 1, workbench)
    assert not accuracy.known and say_estimate(accuracy) == accuracy.why == said and checks == ()


def test_a_good_day_and_twice_the_same(workbench, bento, out):
    write_log(workbench.root/LOG, make_window(400, seed=3).assign(label=""))
    window = monitor(LOG, bento, QUICK, out)
    assert not window.drifted and window.share == 0 and window.accuracy is None
    assert monitor(LOG, bento, QUICK, out) == window



def test_one_verdict_and_its_causes(workbench, bento, out):
    late = make_window(300, seed=4, darker=.4, dark_camera="camera-3", start="2026-03-02T15:00:00")
    write_log(workbench.root/LOG, pd.concat([make_window(400, seed=3), late]))
    window = monitor(LOG, bento, QUICK, out)
    cause = window.causes[0]
    assert window.drifted and window.score >= 1 and cause["camera"] == "camera-3" and "camera-3: darker by" in cause["words"]
    assert "2026-03-02T13:30" < window.began < "2026-03-02T16:00" and .3 < window.severity <= 1
    truth = set(late.loc[late["camera"] == "camera-3", "id"])
    assert len(cause["samples"]) >= 20 and sum(i in truth for i in cause["samples"]) >= .9*len(cause["samples"])
    page = (out/"drift.html").read_text()
    assert "camera-3: darker by" in page and "not kept" in page and "<script" not in page and window.page.endswith("/drift.html")
    state = read_drift_state(1)
    assert state.drifted and state.causes[0].words == cause["words"] and state.report == window.page and state.cameras["camera-3"] >= 1


def test_other_versions_in_between(workbench, bento, out):
    write_log(workbench.root/LOG, make_window(300, seed=5))
    write_log(workbench.root/LOG, make_window(300, seed=6, darker=.5, start="2026-03-02T20:00:00").assign(version=2))
    window = monitor(LOG, bento, MonitorSpec(newest=200, report=False), out)
    assert window.count == 200 and not window.drifted
    rows = pd.read_parquet(out/"window.parquet")
    assert rows["time"].is_monotonic_increasing and rows["time"].max() < "2026-03-02T20"


def test_a_long_log_of_another_version_is_not_read_whole(workbench, bento, out, monkeypatch):
    "What a look costs is bounded, however long the log is: neither the window nor the first look of the watcher goes further back."
    import cvops_wb.serve.predictions as predictions
    from cvops_wb.watch import monitoring
    from cvops_wb.watch.verdicts import followers
    write_log(workbench.root/LOG, make_window(60, seed=5))
    for k in range(12): write_log(workbench.root/LOG, make_window(50, seed=k, start=f"2026-03-03T{8 + k:02}:00:00").assign(version=2))
    write_log(workbench.root/LOG, make_window(40, seed=6, start="2026-03-03T21:00:00"))
    for path in (workbench.root/LOG).glob("*.jsonl"):       # a segment was touched when its last row came
        when = pd.Timestamp(json.loads(path.read_bytes().splitlines()[-1])["time"]).timestamp()
        os.utime(path, (when, when))
    read, real = [], predictions.read_segment
    for room in (predictions, followers): monkeypatch.setattr(room, "read_segment", lambda stem, **how: read.append(stem.name) or real(stem, **how))
    for room in (monitoring, followers): monkeypatch.setattr(room, "REACH", 130)
    window = monitor(LOG, bento, MonitorSpec(newest=100, report=False), out)
    assert window.count == 40 and len(set(read)) <= 5      # 40 of ours, 50 and 50: enough was looked through
    monkeypatch.setattr(monitoring, "REACH", 10**6)
    assert len(monitoring.take_window(LOG, 1, 100, 30)) == 100 and len(set(read)) == 14


@pytest.mark.parametrize("rows, words", [
    (None, "nothing has been predicted"), (make_window(12), "too few"), (make_window(50).assign(version=7), "version 1 has predicted nothing"),
])
def test_nothing_to_judge(workbench, bento, out, rows, words):
    if rows is not None: write_log(workbench.root/LOG, rows)
    with pytest.raises(BadInput, match=words) as caught: monitor(LOG, bento, QUICK, out)
    assert caught.value.fix and list(out.iterdir()) == []


def test_who_was_promoted_is_watched(workbench, bento, out):
    "After a rollout the version that answers is watched against its own reference; a package that is named, or was made later, by itself."
    from watch_bench import write_model

    from cvops_wb.serve import Arm, RolloutFile
    from cvops_wb.watch import find_answering
    digest = write_model(workbench.root/"data/registry/x/2", make_window(300, seed=8))
    write_log(workbench.root/LOG, make_window(60, seed=5))
    write_log(workbench.root/LOG, make_window(80, seed=6, start="2026-03-03T08:00:00").assign(version=2))
    assert monitor(LOG, bento, QUICK, out).version == 1
    file = RolloutFile(workbench.store/"rollout")
    file.start(Arm(1, bento.path, bento.manifest_sha256), Arm(2, "data/registry/x/2", digest), "r")
    assert find_answering(bento) == bento       # not yet
    file.promote("better")
    window = monitor(LOG, bento, QUICK, out)
    assert (window.version, window.count) == (2, 80) and read_drift_state(2).version == 2 and not window.drifted
    assert monitor(LOG, bento, replace(QUICK, follow=False), out).version == 1
    file.abort("it broke")
    assert find_answering(bento) == bento
    card = next((workbench.root/bento.path).rglob("src"))/"service.json"
    card.write_text("{}")
    file.start(Arm(1, bento.path, bento.manifest_sha256), Arm(2, "data/registry/x/2", digest), "r2")
    file.promote("better")
    file.change(end)
    os.utime(card, (4e9, 4e9))
    assert find_answering(bento) == bento       # a package was made since


def test_the_notebook_follows_unless_another_is_named(workbench, bento):
    "The runner fills in `bento` and `log`, whether they were given or not: what the live service and the newest package are is followed."
    cells = json.loads((REPO/"nbs"/"runs"/"10_monitor.ipynb").read_text())["cells"]
    source = next("".join(cell["source"]) for cell in cells if "MonitorSpec(" in "".join(cell["source"]))
    write_log(workbench.root/LOG, make_window(60, seed=5))
    write_log(workbench.root/"elsewhere", make_window(60, seed=5))
    older = write_run(workbench, "package", replace(bento, tag="classifier:0"), 900)
    newest = write_run(workbench, "package", bento, 600)
    def follows(**given): exec(source, names := {"newest": 2000, "seed": 0, "out": "", "bento": "", "log": "", **given}); return names["spec"].follow   # noqa: E702
    assert follows() and follows(bento=newest, log=LOG)
    assert not follows(bento=older, log=LOG) and not follows(bento=newest, log="elsewhere")


def test_a_version_without_reference(workbench, bento, out):
    write_log(workbench.root/LOG, make_window(50))
    found = next((workbench.root/bento.path).rglob("reference.parquet"))
    found.unlink()
    with pytest.raises(BadInput, match="no reference"): monitor(LOG, bento, QUICK, out)


def test_a_reference_that_was_changed(workbench, bento, out):
    write_log(workbench.root/LOG, make_window(50))
    make_window(300, seed=99).to_parquet(next((workbench.root/bento.path).rglob("reference.parquet")))
    with pytest.raises(BadModel, match="manifest"): monitor(LOG, bento, QUICK, out)


@pytest.mark.parametrize("count", [1, 9, 25, 400])
def test_the_trace_knows_when_it_began(count):
    reference = make_window(300, seed=1)
    window = pd.concat([make_window(count, seed=2), make_window(count, seed=3, darker=.5, start="2026-03-02T15:00:00")], ignore_index=True)
    traced = trace_column(window, reference, "brightness")
    assert len(traced) == max(1, min(24, 2*count//10)) and (traced["low"] < traced["high"]).all()
    if count == 400: assert traced["outside"].tolist() == [False]*12 + [True]*12


def look_again(workbench, bento, out, rows, newest=60):
    write_log(workbench.root/LOG, rows)
    return monitor(LOG, bento, MonitorSpec(newest=newest, report=False), out), read_drift_state(1)


def test_a_column_that_is_lost_later_is_a_finding_and_forgets_nothing(workbench, bento, out):
    "The window of the second look has no confidence at all: the watcher goes on with what it knows, and says what is gone."
    look_again(workbench, bento, out, make_window(120, seed=5))
    late = make_window(120, seed=6, start="2026-03-02T20:00:00").assign(confidence=float("nan"))
    window, state = look_again(workbench, bento, out, late)
    assert state.rows == 180 and "began anew" not in "".join(state.notes)      # the first look took 60
    assert window.drifted and "confidence missing" in window.causes[0]["words"]


def test_a_column_that_the_log_gains_is_watched_from_then_on(workbench, bento, out):
    _, state = look_again(workbench, bento, out, make_window(60, seed=5).assign(brightness=float("nan")))
    assert "not watched: brightness" in "".join(state.notes)
    _, state = look_again(workbench, bento, out, make_window(60, seed=6, darker=.5, start="2026-03-02T20:00:00"))
    assert "brightness" in "".join(state.notes) and "began anew" in "".join(state.notes)
    assert any("darker" in cause.words for cause in state.causes)


@pytest.mark.parametrize("spoil, words", [
    (lambda log: (log/"20300101T000000-000000001-1.parquet").write_bytes(b"PAR1 no"), "damaged: 20300101T000000-000000001-1"),
    (lambda log: write_log(log, make_window(40, seed=9).assign(failed=1)), ""),
    (lambda log: write_log(log, make_window(80, seed=5)), "80 rows came twice"),
    (lambda log: write_log(log, make_window(9, seed=10).assign(time="yesterday")), "9 rows have no time that can be read"),
    (lambda log: write_log(log, make_window(9, seed=10).assign(time="2026-03-02T20:00:00+02:00")), ""),
], ids=["damaged", "failed", "twice", "no time", "another zone"])
@pytest.mark.filterwarnings("error")
def test_an_odd_segment_stops_nobody(workbench, bento, out, spoil, words):
    write_log(workbench.root/LOG, make_window(80, seed=5))
    spoil(workbench.root/LOG)
    window = monitor(LOG, bento, QUICK, out)
    assert not window.drifted and window.count in (80, 89) and words in "".join(window.notes) and "hours" not in "".join(window.notes)


def test_where_no_request_was_answered_it_says_so(workbench, bento, out):
    write_log(workbench.root/LOG, make_window(80, seed=5).assign(failed=1))
    with pytest.raises(BadInput, match="could not answer any") as caught: monitor(LOG, bento, QUICK, out)
    assert caught.value.fix


def test_what_was_odd_and_what_is_asked_for_stands_in_the_lines_that_a_person_reads(workbench, bento, out, monkeypatch):
    from cvops_wb.loop.runs import DESCRIPTIONS
    def look() -> str:
        window = monitor(LOG, bento, QUICK, out)
        return "; ".join([DESCRIPTIONS["Window"](window), *window.remarks])
    write_log(workbench.root/LOG, make_window(80, seed=5).assign(brightness=float("nan")))
    told = look()
    assert told.startswith("no drift") and "not watched: brightness" in told and "of the answers right (" in told and "asked for" not in told
    monkeypatch.setenv("CVOPS_MONITOR_DAMAGE_FLOOR", ".97")
    write_log(workbench.root/LOG, make_window(600, seed=2, darker=.6, start="2026-03-03T08:00:00"))
    spotcheck(take_window(LOG, 1, 600, 30), make_window(300, seed=1), bento, SpotcheckSpec(50, "simulated"))
    told = look()
    assert told.startswith("drift: ") and "; a new training is asked for: accuracy " in told and "97.0 % at least" in told
