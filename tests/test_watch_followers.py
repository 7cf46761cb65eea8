"Whatever happens to the segments of a log: each row is judged once, and what was odd is said."
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from watch_bench import make_bento, write_log

from cvops_wb.watch import MonitorSpec, monitor, read_drift_state
from cvops_wb.watch.drift import make_window
from cvops_wb.watch.verdicts.followers import Follower
from cvops_wb.watch.verdicts.states import find_state

LOG = ".cvops/store/predictions"
QUICK = MonitorSpec(report=False)


def take(folder, follower=None, **options):
    follower = follower or Follower(1)
    return follower, *follower.take(folder, **options)


def test_only_what_is_new(tmp_path):
    write_log(tmp_path, make_window(60, seed=1))
    follower, rows, notes = take(tmp_path)
    write_log(tmp_path, make_window(40, seed=2, start="2026-03-02T15:00:00"))
    _, more, _ = take(tmp_path, follower)
    assert (len(rows), len(more), notes) == (60, 40, []) and len(take(tmp_path, follower)[1]) == 0


def test_compacting_a_segment_does_not_judge_it_twice(tmp_path):
    from cvops_wb.serve import compact_predictions
    write_log(tmp_path, make_window(60, seed=1))
    follower, *_ = take(tmp_path)
    assert compact_predictions(tmp_path) == 1 and len(take(tmp_path, follower)[1]) == 0


@pytest.mark.parametrize("planted", [False, True])
def test_a_copied_segment_is_known_by_its_requests(tmp_path, planted):
    write_log(tmp_path, make_window(60, seed=1))
    follower, *_ = take(tmp_path)
    write_log(tmp_path, make_window(60, seed=1))
    if planted: follower.seen = follower.seen[:0]       # a follower that forgets would judge all of them again
    _, rows, notes = take(tmp_path, follower)
    assert len(rows) == (60 if planted else 0) and any("twice" in note for note in notes) is not planted


def test_a_late_segment_is_judged_and_said(tmp_path):
    write_log(tmp_path, make_window(60, seed=2, start="2026-03-02T20:00:00"))
    follower, *_ = take(tmp_path)
    write_log(tmp_path, make_window(60, seed=1))
    _, rows, notes = take(tmp_path, follower)
    assert len(rows) == 60 and any("came late: 60 rows" in note for note in notes)


def test_rows_out_of_order_and_a_clock_that_was_set_back(tmp_path):
    rows = make_window(60, seed=1)
    write_log(tmp_path, pd.concat([rows[30:], rows[:30]]))
    _, found, notes = take(tmp_path)
    assert found["time"].is_monotonic_increasing and len(found) == 60 and any("times go back" in note for note in notes)


def test_a_clock_that_is_ahead(tmp_path):
    write_log(tmp_path, make_window(60, seed=1, start="2099-01-01T00:00:00"))
    _, rows, notes = take(tmp_path, now=int(time.time()*1000))
    assert len(rows) == 60 and any("ahead of this clock" in note for note in notes)


def test_a_segment_that_vanished_before_it_was_read_to_its_end(tmp_path):
    write_log(tmp_path, make_window(60, seed=1))
    follower, *_ = take(tmp_path)
    for path in tmp_path.glob("*.jsonl"): path.unlink()
    write_log(tmp_path, make_window(40, seed=2, start="2026-03-02T15:00:00"))
    _, rows, notes = take(tmp_path, follower)
    assert len(rows) == 40 and any("a segment is gone" in note for note in notes)


def test_a_damaged_segment_is_named_and_left_out(tmp_path):
    write_log(tmp_path, make_window(60, seed=1))
    (tmp_path/"20260302T080000-000000001-1.parquet").write_bytes(b"PAR1 no table")
    _, rows, notes = take(tmp_path)
    assert len(rows) == 60 and any("damaged" in note for note in notes)


def test_a_long_silence_and_traffic_that_breaks_down(tmp_path):
    write_log(tmp_path, make_window(300, seed=1))
    follower, *_ = take(tmp_path)
    write_log(tmp_path, make_window(40, seed=2, start="2026-03-03T20:00:00"))
    _, _, notes = take(tmp_path, follower)
    assert any(note.startswith("no predictions for 30 hours") for note in notes) and any("a minute, were" in note for note in notes)


def test_the_first_look_at_a_long_log_takes_the_newest_rows_alone(tmp_path):
    for k in range(5): write_log(tmp_path, make_window(100, seed=k, start=f"2026-03-0{k + 1}T08:00:00"))
    follower, rows, _ = take(tmp_path, most=150)
    assert len(rows) == 150 and rows["time"].min() > "2026-03-04" and len(take(tmp_path, follower)[1]) == 0


def test_failed_answers_and_other_versions_are_not_judged(tmp_path):
    write_log(tmp_path, make_window(60, seed=1).assign(failed=[int(k % 3 == 0) for k in range(60)]))
    write_log(tmp_path, make_window(60, seed=2).assign(version=2))
    assert len(take(tmp_path)[1]) == 40


@pytest.fixture
def out(workbench, monkeypatch):
    folder = workbench.reports/"monitor-0000000000.part"
    folder.mkdir(parents=True)
    monkeypatch.setenv("CVOPS_PART", str(folder))
    return folder


def test_looks_add_up_and_the_state_remembers(workbench, out):
    bento = make_bento(workbench)
    write_log(workbench.root/LOG, make_window(300, seed=2))
    first = monitor(LOG, bento, QUICK, out)
    write_log(workbench.root/LOG, make_window(300, seed=3, darker=.4, dark_camera="camera-1", start="2026-03-02T15:00:00"))
    second = monitor(LOG, bento, QUICK, out)
    state = read_drift_state(1)
    assert not first.drifted and second.drifted and state.rows == 600 and len(state.timeline) == 2 and state.alarms == 1
    assert monitor(LOG, bento, QUICK, out) == second and read_drift_state(1).rows == 600


def test_a_damaged_memory_begins_anew_and_is_said(workbench, out):
    bento = make_bento(workbench)
    write_log(workbench.root/LOG, make_window(300, seed=2))
    monitor(LOG, bento, QUICK, out)
    memory = next(find_state(1, workbench).parent.glob("memory-*.npz"))
    memory.write_bytes(memory.read_bytes()[:300])
    window = monitor(LOG, bento, QUICK, out)
    assert any("began anew" in note for note in window.notes) and read_drift_state(1).rows == 300


KILLED = """
import os, signal, sys
from cvops_wb.watch import monitoring
from cvops_wb.core.records import Bento
from pathlib import Path
def die(*args, **options): os.kill(os.getpid(), signal.SIGKILL)
{plant}
monitoring.monitor(sys.argv[1], Bento(*{bento!r}), monitoring.MonitorSpec(report=False), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("plant", [
    "monitoring.write_sheet = die",
    "from cvops_wb.watch.verdicts import rounds; rounds.write_memory = die",
    "from cvops_wb.watch.verdicts import rounds; rounds.write_drift_state = die",
], ids=["before the report", "before the memory", "between memory and state"])
def test_killed_half_way_the_last_state_stays_and_the_next_look_makes_up(workbench, out, plant):
    bento = make_bento(workbench)
    write_log(workbench.root/LOG, make_window(300, seed=2))
    monitor(LOG, bento, QUICK, out)
    before = find_state(1, workbench).read_bytes()
    write_log(workbench.root/LOG, make_window(300, seed=3, darker=.4, start="2026-03-02T15:00:00"))
    values = (bento.tag, bento.path, bento.version, bento.model_name, bento.manifest_sha256, bento.alias)
    done = subprocess.run([sys.executable, "-c", KILLED.format(plant=plant, bento=values), LOG, str(out)], cwd=workbench.root, env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-800:]
    assert find_state(1, workbench).read_bytes() == before
    window = monitor(LOG, bento, QUICK, out)
    assert window.drifted and read_drift_state(1).rows == 600 and read_drift_state(1).drifted
