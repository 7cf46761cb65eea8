"From any name back to notebook, model and images."
import json
import os
import time

import pandas as pd
import pytest

from cvops_wb.core.errors import UnknownName
from cvops_wb.core.files import dump_json, write_atomic
from cvops_wb.core.records import Batch, Bento, Candidate, Envelope, Evaluation, ModelVersion, Rehearsal, Snapshot
from cvops_wb.loop import find_run, read_status, trace

MANIFEST = "ab12cd34ef567890" + "0"*48
RUNS = [
    Envelope("ingest-0000000001", "ingest", Batch("photos", "folder", "x", 3, 3, 0, {"tea": 3})),
    Envelope("snapshot-0000000002", "snapshot", Snapshot("5af1c0ffee11", "data/samples/s.parquet", [], 3, ["tea"], {"train": 3}), inputs={"selection": "ingest-0000000001"}),
    Envelope("train-0000000003", "train", Candidate("5af1c0ffee11", "classification", "small", "reports/train-0000000003/model", ["tea"], 64, {}, {}, MANIFEST),
             inputs={"snapshot": "snapshot-0000000002"}),
    Envelope("evaluate-0000000004", "evaluate", Evaluation("train-0000000003", "5af1c0ffee11", "test", 3, {"accuracy": .9}, {"accuracy": [.8, 1.]}, {}, "x"),
             inputs={"candidate": "train-0000000003"}),
    Envelope("register-0000000005", "register", ModelVersion("tea", 7, "champion", "data/registry/tea/7", MANIFEST, [], True), inputs={"evaluation": "evaluate-0000000004"}),
    Envelope("package-0000000006", "package", Bento("classifier:7", "bentos/classifier/built/7", 7, "tea", MANIFEST), inputs={"version": "register-0000000005"}),
    Envelope("rehearse-0000000007", "rehearse", Rehearsal("classifier:7", 1, 0, 1., 4., 9., 3., "reports/rehearse-0000000007/log"),
             inputs={"bento": "package-0000000006", "snapshot": "snapshot-0000000002"}),
]
SAMPLE = "99aa99aa99aa99aa"


@pytest.fixture
def history(workbench):
    "A workbench with one of everything."
    for envelope in RUNS:
        write_atomic(workbench.reports/envelope.run/"record.json", dump_json(envelope.to_dict()))
        (workbench.reports/envelope.run/"notebook.html").touch()
    row = {"id": SAMPLE, "sha256": SAMPLE*4, "sources": ["aisle/1.jpg", "aisle/2.jpg"], "label": "tea", "labeled_by": "folder", "split": "test", "width": 40, "height": 30}
    (workbench.versioned/"samples").mkdir(parents=True)
    pd.DataFrame([row]).to_parquet(workbench.versioned/"samples"/"s.parquet")
    log = workbench.reports/"rehearse-0000000007"/"log"
    log.mkdir()
    answer = {"request_id": "req-1", "time": "2026-11-23T10:00:00.000Z", "version": 7, "model": MANIFEST[:16], "id": SAMPLE, "predicted": "tea", "confidence": .93}
    (log/"20261123T100000-000000001-1.jsonl").write_text(dump_json(answer, indent=None) + "\n")
    return workbench


@pytest.mark.parametrize("name, way", [
    ("req-1", ["request req-1", "tea (0.930)", "sample 9", "aisle/1.jpg", "package-0000000006", "register-0000000005", "train-0000000003/notebook.html",
               "model  reports/train-0000000003/model  sha256 ab12cd34ef56", "snapshot-0000000002", "images from  photos"]),
    (SAMPLE, ["sample 9", "tea (by folder), test, 40×30", "snapshots  5af1c0ffee11", "request req-1"]),
    (SAMPLE*4, ["sample 9"]),
    ("classifier:7", ["package-0000000006", "classifier:7 serves tea 7", "ingest-0000000001"]),
    ("champion", ["register-0000000005  tea 7, champion"]), ("tea:7", ["register-0000000005"]), ("7", ["register-0000000005"]),
    ("5af1c0ffee11", ["snapshot-0000000002", "ingest-0000000001"]),
    ("train-0000", ["train-0000000003"]),
])
def test_the_way_back(history, name, way):
    tree = str(trace(name))
    places = [tree.find(step) for step in way]
    assert -1 not in places, f"{way[places.index(-1)]} is not in\n{tree}"
    assert tree.count("└── ") >= 1 and trace(name).to_dict()["from"]


def test_an_unknown_name(history):
    with pytest.raises(UnknownName, match="did you mean"): trace("train-000000000x")


def test_what_is_gone_is_said(history):
    (history.reports/"ingest-0000000001"/"record.json").unlink()
    assert "ingest-0000000001  its folder is not in reports/ any more" in str(trace("champion"))


@pytest.mark.parametrize("kind, value, run", [("version", "champion", "register-0000000005"), ("bento", "classifier:7", "package-0000000006"),
                                              ("snapshot", "5af1c0ffee11", "snapshot-0000000002"), ("version", "7", "register-0000000005"), ("version", "", "register-0000000005")])
def test_records_are_found_by_their_own_names(history, kind, value, run): assert find_run(history, kind, value).run == run


def test_status(history):
    from loop_bench import write_ingest
    write_ingest(history.root)
    (history.reports/"train-0000000009.failed").mkdir()
    for run, pid in {"train-000000000a": os.getpid(), "train-000000000b": 2**22 + 1}.items():     # one goes on, the other's runner was killed
        part = history.reports/f"{run}.part"
        part.mkdir()
        (part/".running.json").write_text(json.dumps({"pid": pid, "mark": "m", "time": time.time() - 9}))
        (part/"notebook.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"output_type": "stream", "text": ["epoch 1/9\n", "epoch 2/9\n"]}]}, {"outputs": []}]}))
    found = read_status()
    assert [(each["run"], each["text"]) for each in found["running"]] == [("train-000000000a", "epoch 2/9")] and 9 <= found["running"][0]["seconds"]
    assert found["stages"][0]["run"] == "ingest-0000000001" and found["leftovers"] == ["train-0000000009.failed", "train-000000000b.part"] and found["champion"] is None
