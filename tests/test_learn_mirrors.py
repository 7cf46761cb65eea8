"A finished run in W&B's and ClearML's own files, written offline by the real clients and read back; and a mirror that fails."
import json
import math
import struct
import warnings
import zipfile
from dataclasses import replace

import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import UnknownName
from cvops_wb.core.records import Candidate
from cvops_wb.core.settings import Settings, Tracking
from cvops_wb.learn.mirrors import gather_run, list_mirrors, mirror_run

LOSSES = [2., 1., .5]


@pytest.fixture
def finished(tmp_path):
    "What a training of three epochs leaves, in a workbench of its own; and its settings without any mirror."
    settings = Settings(tmp_path)
    folder = settings.reports/"train-1.part"
    folder.mkdir(parents=True)
    pd.DataFrame({"epoch": [1, 2, 3], "loss": LOSSES, "val_accuracy": [math.nan, .5, .75]}).to_csv(folder/"history.csv", index=False)
    Image.new("RGB", (8, 8), "red").save(folder/"curves.png")
    candidate = Candidate("5eed", "classification", "small_resnet", "reports/train-1/model", ["a", "b"], 32, {"accuracy": .75, "map": math.nan},
                          {"lr": .1, "recipe": {"ema": .9}}, "ab"*32, 1234)
    return settings, gather_run(settings, candidate, folder)


def turn_on(settings, names): return replace(settings, tracking=Tracking(mirrors=names))


def take_strictly(settings, run):
    "Mirror a run; a warning is a failure."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return mirror_run(settings, run)


def read_wandb(path):
    "The records of a `.wandb` file: LevelDB's log format after seven bytes, blocks of 32 KiB, records that may be cut over several."
    from wandb.proto.wandb_internal_pb2 import Record
    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7: place += room
        _, size, kind = struct.unpack("<IHB", data[place:place + 7])
        whole, place = whole + data[place + 7:place + 7 + size], place + 7 + size
        if kind in (1, 4):      # full, last
            yield Record.FromString(whole)
            whole = b""


def name_items(items): return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def test_wandb_holds_the_same_run(finished):
    settings, run = finished
    assert take_strictly(turn_on(settings, "wandb"), run) == ["wandb"]
    folder = settings.cache/"mirrors"/"wandb"/"train-1"
    [path] = folder.glob("wandb/offline-run-*/run-train-1.wandb")
    records = list(read_wandb(path))
    rows = [name_items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    assert [row["loss"] for row in rows if "loss" in row] == LOSSES and [row["epoch"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["val_accuracy"] for row in rows if "val_accuracy" in row] == [.5, .75]
    [begun] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert begun.run_id == "train-1" and config["lr"] == "0.1" and config["recipe.ema"] == "0.9" and config["cvops.snapshot"] == "5eed" and config["cvops.manifest"] == "ab"*32
    summary = {}
    for r in records:
        if r.WhichOneof("record_type") == "summary": summary |= name_items(r.summary.update)
    assert summary["accuracy"] == .75
    assert [p.name.split("_")[0] for p in folder.rglob("media/images/*.png")] == ["curves"]


def test_clearml_holds_the_same_run(finished):
    settings, run = finished
    assert take_strictly(turn_on(settings, "clearml"), run) == ["clearml"]
    [path] = (settings.cache/"mirrors"/"clearml"/"train-1").glob("offline/*.zip")
    with zipfile.ZipFile(path) as session:
        task = json.loads(session.read("task.json"))
        events = [event for line in session.read("metrics.jsonl").splitlines() if line.strip() for event in json.loads(line)]
        pictures = [name for name in session.namelist() if name.endswith(".png")]
    assert task["name"] == "train-1" and {"cvops.snapshot=5eed", f"cvops.manifest={'ab'*32}"} <= set(task["tags"])
    params = {name: item["value"] for name, item in task["hyperparams"]["General"].items()}
    assert params["lr"] == "0.1" and params["recipe.ema"] == "0.9" and params["parameters"] == "1234"
    assert [(e["iter"], e["value"]) for e in events if e.get("metric") == "loss"] == list(enumerate(LOSSES, 1))
    assert [e["value"] for e in events if e.get("metric") == "Summary"] == [.75] and len(pictures) == 1
    assert not task.get("script", {}).get("diff"), "no source of anybody's is stored"


def test_one_that_fails_only_warns(finished, monkeypatch):
    settings, run = finished
    broken = replace(run, pictures={"curves": str(settings.root/"nowhere.png")})
    with pytest.warns(UserWarning, match="wandb did not take this run; the run itself is not harmed"):
        assert mirror_run(turn_on(settings, "wandb"), broken) == []
    monkeypatch.setattr("cvops_wb.learn.mirrors.PATIENCE", .05)
    with pytest.warns(UserWarning, match="took longer"):
        assert mirror_run(turn_on(settings, "wandb"), run) == []


def test_off_by_default_and_a_wrong_name_is_refused(finished):
    settings, run = finished
    assert take_strictly(settings, run) == [] and not (settings.cache/"mirrors").exists()
    assert list_mirrors(turn_on(settings, "wandb, clearml")) == ["wandb", "clearml"]
    with pytest.raises(UnknownName, match="wanbd"): list_mirrors(turn_on(settings, "wanbd"))
