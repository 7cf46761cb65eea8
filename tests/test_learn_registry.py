"The registry: first, better, equal and worse models; registered twice, refused, died half-way, shown in MLflow."
import json
import sys
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cvops_wb.core.errors import BadModel, BadRecord, WrongUsage
from cvops_wb.core.files import write_atomic
from cvops_wb.core.processes import call
from cvops_wb.core.records import Candidate, Envelope, Evaluation
from cvops_wb.learn import registry
from cvops_wb.learn.evaluation import predict
from cvops_wb.learn.exporting import read_model, to_onnx, write_model
from cvops_wb.learn.networks import Assembled, build_network
from cvops_wb.learn.registry import (
    RegisterSpec,
    append_event,
    find_rival,
    find_version,
    list_versions,
    locked,
    move_alias,
    pin_network,
    read_events,
    read_registry,
    register,
)
from cvops_wb.learn.tasks import TASKS

COUNT = 600
ROWS = pd.DataFrame({"id": [f"{k:016x}" for k in range(COUNT)], "label": ["dark", "light"]*(COUNT//2), "group": np.arange(COUNT), "tags": [[]]*COUNT})
IMAGES = np.where(np.arange(COUNT) % 2, 200, 50).astype(np.uint8)[:, None, None, None] + np.random.default_rng(0).integers(0, 40, (COUNT, 8, 8, 3)).astype(np.uint8)


class Shown:
    "The pixels of the test split, for any size."
    def take(self, ids): return IMAGES[ROWS["id"].isin(list(ids)).to_numpy()]


class Brightness(nn.Module):
    "Tells dark from light, and is wrong on those images whose noise lies below `flaw`."

    def __init__(self, flaw: float):
        super().__init__()
        self.flaw = nn.Parameter(torch.tensor(flaw), requires_grad=False)

    def forward(self, x):
        light, noise = (x.mean((1, 2, 3)) > 0).float()*2 - 1, x[:, :, 4, 4].mean(1)
        flip = 1 - 2*((noise - (x.mean((1, 2, 3)))).abs() < self.flaw).float()
        return torch.stack([-light*flip, light*flip], 1)


def train_toy(settings, run: str, flaw: float) -> Evaluation:
    "A candidate with a known share of errors and its evaluation, as the stages before would leave them."
    network = Assembled(Brightness(flaw), nn.Linear(2, 2, bias=False)).eval()
    network.mean, network.std = (.5,)*3, (1.,)*3
    with torch.no_grad(): network.head.weight.copy_(torch.eye(2)*2)
    card = {"task": "classification", "network": "toy", "classes": ["dark", "light"], "size": 8, "temperature": 1., "snapshot": "s"}
    folder = settings.reports/run/"model"
    identity = write_model(folder, network, to_onnx(network, 8), card, pd.DataFrame({"id": ["x"]}))
    table, scores = predict(TASKS["classification"](), read_model(folder), ROWS, Shown())
    path = f"reports/{run}/predictions.parquet"
    table.to_parquet(settings.root/path)
    accuracy = float(table["correct"].mean())
    return Evaluation(run, "s", "test", COUNT, {"accuracy": accuracy, "calibration_error": .1, "latency_ms": 1., "size_mb": .1, "count_unleaked": float(COUNT)},
                      {"accuracy": [accuracy - .03, accuracy + .03]}, {}, path, f"reports/{run}/model", identity)


@pytest.fixture
def bench(workbench, monkeypatch):
    "A workbench whose test split is the toy's, and whose DVC is a list of messages."
    said = []
    monkeypatch.setattr(registry, "open_split", lambda settings, snapshot, split, size, truth="label": (ROWS, Shown(), "test"))
    monkeypatch.setattr(registry, "_version_data", lambda message, push=True: said.append(message))
    return workbench, said


def put(settings, evaluation: Evaluation, **spec):
    out = settings.reports/f"register-{evaluation.candidate}.part"
    return register(evaluation, RegisterSpec(track=False, by="a person", **spec), out)


def test_first_better_equal_worse(bench):
    settings, said = bench
    weak, strong, equal, bad = (train_toy(settings, f"train-{k}", flaw) for k, flaw in enumerate([.006, .001, .00101, .01]))
    assert .7 < weak.metrics["accuracy"] < .9 < strong.metrics["accuracy"]
    first, second, third, fourth = (put(settings, e) for e in (weak, strong, equal, bad))
    assert [(v.version, v.alias, v.passed) for v in (first, second, third)] == [(1, "champion", True), (2, "champion", True), (3, "challenger", True)]
    assert (fourth.version, fourth.alias, fourth.passed) == (0, "", False)
    assert "worse" in next(r["why"] for r in fourth.rules if not r["passed"])
    assert [v.alias for v in read_registry(settings)["warehouse"]] == ["", "champion", "challenger"]
    assert find_version().version == find_version("champion").version == 2 and find_version(3).alias == "challenger" and find_version("1").alias == ""
    assert list_versions()["version"].tolist() == [3, 2, 1] and len(said) == 4
    assert [e["event"] for e in read_events(settings)] == ["registered"]*3 + ["refused"]
    read_model(settings.root/second.model, strong.manifest_sha256)
    assert (settings.reports/"register-train-3.part"/"verdict.csv").is_file()


def test_registering_twice_changes_nothing(bench):
    settings, _ = bench
    evaluation = train_toy(settings, "train-1", .004)
    first, again = put(settings, evaluation), put(settings, evaluation)
    assert first == again and len(read_events(settings)) == 1
    copy = train_toy(settings, "train-copy", .004)      # the same bytes from another run
    assert put(settings, copy).version == 1 and len(read_events(settings)) == 1


@pytest.mark.parametrize("change", [
    {"count": 10}, {"intervals": {}}, {"metrics": {}}, {"intervals": {"accuracy": [.4, .6]}},
])
def test_refused(bench, change):
    settings, _ = bench
    evaluation = replace(train_toy(settings, "train-1", .004), **change)
    versions = [put(settings, evaluation) for _ in range(2)]
    assert all(v.version == 0 and not v.passed and not v.alias for v in versions)
    assert [e["event"] for e in read_events(settings)] == ["refused"]       # said twice, written once
    assert not (settings.versioned/"registry"/"warehouse").exists()
    with pytest.raises(WrongUsage, match="no version"): find_version()
    assert len(list_versions()) == 0
    assert put(settings, train_toy(settings, "train-1", .004)).version == 1     # a whole evaluation of the same model passes


def test_predictions_of_other_images_are_refused(bench):
    settings, _ = bench
    put(settings, train_toy(settings, "train-1", .006))
    evaluation = train_toy(settings, "train-2", .001)
    table = pd.read_parquet(settings.root/evaluation.predictions)
    table.iloc[:-5].to_parquet(settings.root/evaluation.predictions)
    version = put(settings, evaluation)
    assert not version.passed and "same images" in version.rules[-1]["why"] and version.rules[-1]["value"] is None


def test_a_spoilt_candidate_or_champion_stops_everything(bench):
    settings, _ = bench
    evaluation, better = train_toy(settings, "train-1", .006), train_toy(settings, "train-2", .001)
    (settings.root/better.model/"model.onnx").write_bytes(b"other")
    with pytest.raises(BadModel, match="model.onnx"): put(settings, better)
    first, better = put(settings, evaluation), train_toy(settings, "train-2", .001)
    (settings.root/first.model/"model.onnx").write_bytes(b"other")
    with pytest.raises(BadModel, match="model.onnx"): put(settings, better)
    assert len(read_events(settings)) == 1


def test_death_between_the_files_and_the_event(bench, monkeypatch):
    settings, _ = bench
    evaluation = train_toy(settings, "train-1", .004)
    def die(*args, **body): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(registry, "append_event", die)
        put(settings, evaluation)
    assert len(list_versions()) == 0
    assert put(settings, evaluation).version == 1 and len(read_events(settings)) == 1


@pytest.mark.parametrize("harm", [
    lambda text: text.replace('"passed": true', '"passed": false'), lambda text: text[:-30], lambda text: text + "{}\n",
    lambda text: "".join(text.splitlines(True)[1:]), lambda text: text + "no JSON\n",
])
def test_changed_events_are_found(bench, harm):
    settings, _ = bench
    for k in range(2): put(settings, train_toy(settings, f"train-{k}", .006 - .005*k))
    path = settings.versioned/"registry"/"events.jsonl"
    write_atomic(path, harm(path.read_text()))
    with pytest.raises(BadRecord, match="events are damaged"): list_versions()


def test_a_person_moves_an_alias(bench):
    settings, _ = bench
    for k in range(2): put(settings, train_toy(settings, f"train-{k}", .006 - .005*k))
    assert move_alias("champion", 1).alias == "champion" and find_version().version == 1 and find_version(2).alias == ""
    with pytest.raises(WrongUsage): move_alias("winner", 1)
    with pytest.raises(WrongUsage): move_alias("champion", 9)


def test_eight_writers(workbench):
    def write(k: int):
        with locked(workbench): append_event(workbench, event="refused", name="m", manifest_sha256=str(k))
    threads = [threading.Thread(target=write, args=(k,)) for k in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(e["manifest_sha256"] for e in read_events(workbench)) == list("01234567")


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "", "x"*65, "a b", "-x"])
def test_names_that_are_no_folder(bench, name):
    settings, _ = bench
    evaluation = train_toy(settings, "train-1", .004)
    if name:
        with pytest.raises(WrongUsage): put(settings, evaluation, name=name)
    else: assert put(settings, evaluation, name=name).name == "warehouse"
    assert put(settings, evaluation, name="shelf-2.b").model == "data/registry/shelf-2.b/1"


@pytest.mark.slow
def test_mlflow_shows_it_and_is_made_anew(bench):
    "Registered with tracking on; the database deleted; mirrored again: the same versions and aliases, by our ids."
    settings, _ = bench
    evaluations = [train_toy(settings, f"train-{k}", flaw) for k, flaw in enumerate([.006, .001])]
    for e in evaluations:
        candidate = Candidate("s", "classification", "toy", e.model, ["dark", "light"], 8, {"accuracy": .9}, {"epochs": 2}, e.manifest_sha256)
        (settings.reports/e.candidate/"record.json").write_text(json.dumps(Envelope(e.candidate, "train", candidate, created=e.candidate).to_dict()))
        pd.DataFrame({"epoch": [1, 2], "loss": [2., 1.]}).to_csv(settings.reports/e.candidate/"history.csv", index=False)
    versions = [register(e, RegisterSpec(by="a person"), settings.reports/"register-1.part") for e in evaluations]

    places = {v.version: (settings.root/v.model).parent/"mlflow"/str(v.version) for v in versions}     # beside the sealed folder, with the very file
    assert all((places[v.version]/"model.onnx").read_bytes() == (settings.root/v.model/"model.onnx").read_bytes() for v in versions)
    want = {str(v.version): [v.manifest_sha256, str(places[v.version])] for v in versions}
    assert look("mirror_version(find_version(2))") == {"versions": want, "aliases": {"champion": "2"}, "losses": [], "runs": 2, "params": {}}
    for file in settings.cache.glob("mlflow.db*"): file.unlink()
    again = look("assert rebuild_tracking() == 2; assert rebuild_tracking() == 0")
    assert again == {"versions": want, "aliases": {"champion": "2"}, "losses": [2., 1.], "runs": 2, "params": {"epochs": "2", "parameters": "0"}}


LOOK = """
import json
from cvops_wb.core.settings import load_settings
from cvops_wb.learn import find_version, mirror_version, rebuild_tracking
from cvops_wb.learn.tracking import find_run, open_client
{first}
client, experiment = open_client(load_settings())
versions = {{v.tags["cvops.version"]: [v.tags["cvops.manifest"], v.source] for v in client.search_model_versions("name='warehouse'")}}
aliases = {{a: client.get_model_version_by_alias("warehouse", a).tags["cvops.version"] for a in client.get_registered_model("warehouse").aliases}}
run = find_run(client, experiment, "train-1")
losses = [m.value for m in client.get_metric_history(run, "loss")] if run else []
print(json.dumps({{"versions": versions, "aliases": aliases, "losses": losses, "runs": len(client.search_runs([experiment])),
                   "params": client.get_run(run).data.params if run else {{}}}}))
"""


def look(first: str) -> dict:
    "What MLflow shows in a new process, after `first`; MLflow holds an open database in the old one."
    return json.loads(call([sys.executable, "-W", "ignore", "-c", LOOK.format(first=first)], "look into MLflow").splitlines()[-1])


@pytest.mark.slow
def test_mlflow_out_of_reach_loses_nothing(bench):
    settings, _ = bench
    evaluation = train_toy(settings, "train-1", .004)
    write_atomic(settings.cache/"mlflow.db", "no database")
    with pytest.warns(UserWarning, match="MLflow did not take this run"):
        version = register(evaluation, RegisterSpec(), settings.reports/"register-1.part")
    assert version.version == 1 and find_version().version == 1


def enter(settings, number: int, name: str, network, task: str = "classification") -> None:
    "A version as registration would leave it, champion."
    place = f"data/registry/warehouse/{number}"
    card = {"task": task, "network": name, "classes": ["dark", "light"], "size": 32, "temperature": 1., "snapshot": "s"}
    identity = write_model(settings.root/place, network, b"", card, pd.DataFrame({"id": ["x"]}))
    with locked(settings):
        append_event(settings, event="registered", name="warehouse", version=number, alias="champion", model=place, manifest_sha256=identity, rules=[], passed=True, candidate="c", snapshot="s", metrics={})


def test_an_eye_stays_the_version_that_it_was(bench):
    "`linear:champion` is pinned to a number; a champion that is a head over an eye lends that eye, whoever is champion by then."
    settings, _ = bench
    torch.manual_seed(0)
    first = build_network("small_resnet:8", 2, 32)
    enter(settings, 1, "small_resnet:8", first)
    assert [pin_network(name) for name in ("linear:champion", "knn:1", "small_resnet", "")] == ["linear:1", "knn:1", "small_resnet", ""]
    for number, way in ((2, "knn:1"), (3, "linear:2")):
        network = build_network(way, 2, 32)
        network.known, network.names = torch.zeros(7, network.feature_width), torch.zeros(7, 2)      # a memory is as long as what was shown
        enter(settings, number, way, network)
    eye = build_network(pin_network("prototypes:champion"), 5, 32).eye
    assert all(torch.equal(value, eye.state_dict()[name]) for name, value in first.state_dict().items())
    enter(settings, 4, "heatmap", first, "detection")
    enter(settings, 5, "linear:champion", first)        # as they were written before they were pinned
    for number in (4, 5):
        with pytest.raises(WrongUsage, match="gives no eye"): build_network(f"linear:{number}", 2, 32)


def test_a_champion_for_another_task_is_no_measure(bench):
    settings, _ = bench
    put(settings, train_toy(settings, "train-1", .001))
    other = put(settings, replace(train_toy(settings, "train-2", .001001), task="multilabel"))
    assert not other.passed and "a name of its own" in next(r["why"] for r in other.rules if r["rule"] == "not_worse_than_champion")


def test_a_verdict_is_asked_for_again_when_the_champion_has_changed(bench):
    "The champion to beat belongs to what a register run is keyed by: a refusal against another one is no answer."
    settings, _ = bench
    strong, weak, other = (train_toy(settings, f"train-{k}", flaw) for k, flaw in enumerate([.001, .004, .0041]))
    rivals = lambda e: find_rival(settings, "", e.manifest_sha256)  # noqa: E731
    assert rivals(weak) == ""
    put(settings, weak)
    put(settings, strong)
    assert (rivals(weak), rivals(strong), rivals(other)) == ("", "1", "2") and not put(settings, other, rival="2").passed
    move_alias("champion", 1)
    assert (rivals(strong), rivals(other)) == ("1", "1")
    with pytest.raises(BadRecord, match="has changed"): put(settings, other, rival="2")
    assert put(settings, other, rival="1").rules[-3]["rule"] == "not_worse_than_champion"
