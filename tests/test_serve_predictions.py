"The prediction log: nothing that was written is lost, nothing torn is read, nothing that is being written is touched."
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from cvops_wb.core.errors import BadRecord
from cvops_wb.serve import compact_predictions, find_predictions, list_segments, read_predictions, read_segment
from cvops_wb.serve.inference import Answer
from cvops_wb.serve.predictions import COLUMNS, MEASURED, PredictionLog, tell_time, to_measured, to_row

ANSWER = Answer("0"*16, "red", .9, np.array([.9, .1], np.float32), .3, np.arange(4, dtype=np.float32), {"brightness": .5, "width": 60, "phash": "f"*16})


def row(k: int, **more) -> dict:
    "A row of the log."
    return to_row(ANSWER, **{"request_id": str(k), "time": tell_time(1e9 + k), "version": 1, "model": "m", "camera": "c", "caller": "", "latency_ms": 1., **more})


def ids(folder, newest=None) -> list[str]: return list(read_predictions(folder, newest).request_id)


def test_an_empty_folder_has_the_columns(tmp_path):
    assert list(read_predictions(tmp_path)) == list(COLUMNS) and list(read_predictions(tmp_path/"none")) == list(COLUMNS) and compact_predictions(tmp_path/"none") == 0


def test_segments_turn_and_the_newest_come_last(tmp_path):
    log = PredictionLog(tmp_path, lines=10)
    for k in range(35): assert log.append(row(k))
    assert len(list(tmp_path.iterdir())) == 4 and ids(tmp_path) == [str(k) for k in range(35)]
    assert compact_predictions(tmp_path) == 3 and sum(p.suffix == ".jsonl" for p in tmp_path.iterdir()) == 1, "the one at hand is left alone"
    for newest in (0, 1, 5, 6, 12, 34, 35, 100): assert ids(tmp_path, newest) == [str(k) for k in range(max(0, 35 - newest), 35)]
    assert log.append(row(35)) and ids(tmp_path, 1) == ["35"]
    log.close()
    assert compact_predictions(tmp_path) == 1 and ids(tmp_path) == [str(k) for k in range(36)]


def test_what_is_asked_of_a_long_log_costs_by_the_answer(tmp_path, monkeypatch):
    from cvops_wb.serve import predictions
    # a moment or a value: neither reads the whole log, in whichever form its segments are
    log = PredictionLog(tmp_path, lines=10)
    for k in range(95):
        log.append(row(k, camera=f"c{k % 7}"))
        if k == 60: compact_predictions(tmp_path)
    for place, (stem, _) in enumerate(sorted(list_segments(tmp_path), key=lambda found: found[0].name)):
        for path in tmp_path.glob(f"{stem.name}.*"): os.utime(path, (1e9 + 10*place + 9.5,)*2)
    read = []
    whole = predictions.read_segment
    monkeypatch.setattr(predictions, "read_segment", lambda stem, *more, **named: (named or read.append(stem.name), whole(stem, *more, **named))[1])
    assert list(read_predictions(tmp_path, since=tell_time(1e9 + 83)[:19]).request_id) == [str(k) for k in range(83, 95)] and len(read) == 2
    read.clear()
    assert list(find_predictions(tmp_path, "request_id", "42").request_id) == ["42"] and len(read) == 1
    read.clear()
    assert list(find_predictions(tmp_path, "camera", "c3", 3).request_id) == ["94", "87", "80"] and len(read) <= 3
    assert list(read_predictions(tmp_path, newest=2, since=tell_time(1e9)).request_id) == ["93", "94"]
    assert len(find_predictions(tmp_path, "camera", "c3", 99)) == 14 and len(find_predictions(tmp_path, "camera", "none")) == 0 == len(find_predictions(tmp_path/"none", "id", "x"))


def test_the_vectors_and_types_come_back(tmp_path):
    log = PredictionLog(tmp_path)
    log.append(row(1, camera="Gang ä \n \u2028 </script>"))
    for _ in range(2):
        table = read_predictions(tmp_path)
        assert table.scores[0].dtype == np.float32 and list(table.embedding[0]) == [0, 1, 2, 3] and table.camera[0] == "Gang ä \n \u2028 </script>"
        assert table.version.dtype == "int64" and table.confidence.dtype == "float64" and table.phash[0] == "f"*16 and np.isnan(table.sharpness[0])
        log.close() if log else None
        log = compact_predictions(tmp_path) and None


@pytest.mark.parametrize("end", [b'{"request_id": "torn', b"\x00"*40, b"\xff\xfe\n", b"[1, 2]\n", b'{"other": 1}\n', b"\n\n", b"null\n"])
def test_what_is_torn_is_left_out(tmp_path, end):
    log = PredictionLog(tmp_path)
    for k in range(3): log.append(row(k))
    os.write(log.segment.file, end)
    assert ids(tmp_path) == ["0", "1", "2"]
    log.close()
    compact_predictions(tmp_path)
    assert ids(tmp_path) == ["0", "1", "2"]


def test_a_full_disk_costs_the_line_and_not_the_next(tmp_path):
    log = PredictionLog(tmp_path)
    good, full = log.segment.file, os.open("/dev/full", os.O_WRONLY)
    log.append(row(0))
    log.segment.file = full
    assert log.append(row(1)) is False and log.append_open(row(1)) is None
    log.segment.file, log.torn = good, True     # as after a line of which half was written
    os.write(good, json.dumps(row(2)).encode()[:50])
    assert log.append(row(3)) and ids(tmp_path) == ["0", "3"]


LIGHT = {"brightness": .5, "contrast": .25, "sharpness": 1., "entropy": 0., "saturation": .12345, "phash": "0123456789abcdef"}


def blank(k: int) -> dict: return {name: value for name, value in row(k).items() if name not in MEASURED}


def test_what_is_measured_later_is_filled_in(tmp_path):
    log = PredictionLog(tmp_path, lines=2)
    waiting = [log.append_open(blank(k)) for k in range(5)]
    found = read_predictions(tmp_path)
    assert list(found.request_id) == list("01234") and found.brightness.isna().all() and found.phash.isna().all(), "rows are there at once"
    log.close()
    assert compact_predictions(tmp_path) == 0, "segments that wait to be filled in are not finished"
    for k in (4, 0, 1, 3): waiting[k](LIGHT)
    waiting[2]({})
    assert compact_predictions(tmp_path) == 3
    found = read_predictions(tmp_path).set_index("request_id")
    assert all({name: found.loc[str(k)][name] for name in LIGHT} == LIGHT for k in (0, 1, 3, 4)) and np.isnan(found.loc["2"].brightness)


def test_who_follows_the_log_waits_for_what_is_measured(tmp_path):
    log = PredictionLog(tmp_path)
    found = [(log.append_open if k == 2 else log.append)({**blank(k), "time": tell_time()}) for k in range(4)]
    [(stem, _)] = list_segments(tmp_path)
    assert (read_segment(stem).num_rows, read_segment(stem, settled=True).num_rows) == (4, 2)
    found[2](LIGHT)
    assert read_segment(stem, settled=True).num_rows == 4
    log.append_open({**blank(4), "time": tell_time(1e9)})
    assert read_segment(stem, settled=True).num_rows == 5, "what nobody will fill in any more is not waited for"


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 40, 41, 55, 56])
def test_a_line_that_a_kill_left_half_filled_is_whole(tmp_path, cut):
    log = PredictionLog(tmp_path)
    *_, place = log.append_open(blank(0)).args
    os.pwrite(log.segment.file, to_measured(LIGHT)[:cut], place)
    found = read_predictions(tmp_path).iloc[0]
    assert found.request_id == "0" and (found.phash == LIGHT["phash"] if cut == 56 else found.phash is None and np.isnan(found.brightness))


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path/"20260101T000000-1-1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadRecord, match="damaged"): read_predictions(tmp_path)


WRITER = """
import os, sys, numpy as np
from cvops_wb.serve.inference import Answer
from cvops_wb.serve.predictions import PredictionLog, tell_time, to_row
log, answer = PredictionLog(sys.argv[1], lines=7), Answer("0"*16, "red", .9, np.ones(2, np.float32), .3, np.ones(4, np.float32), {})
for k in range(60): log.append(to_row(answer, request_id=f"{sys.argv[2]}-{k}", time=tell_time(), version=1, model="m", camera="", caller="", latency_ms=1.))
os._exit(0)     # no farewell
"""


def test_writers_readers_and_compactors_at_once(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, str(w)]) for w in range(3)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        compact_predictions(tmp_path)
        found = ids(tmp_path)
        assert len(found) == len(set(found)) and len(found) >= seen, "nothing twice, and nothing that was there is gone"
        seen = len(found)
    compact_predictions(tmp_path)
    assert sorted(ids(tmp_path)) == sorted(f"{w}-{k}" for w in range(3) for k in range(60)) and not list(tmp_path.glob("*.jsonl"))


def test_a_line_costs_less_than_a_tenth_of_a_millisecond(tmp_path):
    log, times = PredictionLog(tmp_path), []
    for k in range(500):
        begin = time.perf_counter()
        log.append(row(k))
        times.append(time.perf_counter() - begin)
    assert sorted(times)[250] < 1e-4
