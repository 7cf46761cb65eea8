"From photographs to a registered model, through the data wing, torch, ONNX Runtime, DVC and MLflow; and what cannot be trained."
import shutil
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PYPROJECT, REPO
from PIL import Image

from cvops_wb.core.errors import BadInput, UnknownName, WrongUsage
from cvops_wb.core.places import locate
from cvops_wb.core.processes import hush
from cvops_wb.core.settings import Tracking, load_settings
from cvops_wb.data import CurateSpec, IngestSpec, SnapshotSpec, curate, ingest, open_snapshot, take_snapshot
from cvops_wb.learn import (
    EvaluateSpec,
    RegisterSpec,
    TrainSpec,
    draw_calibration,
    draw_classes,
    draw_confusion,
    draw_errors,
    draw_history,
    draw_metrics,
    draw_predictions,
    draw_verdict,
    evaluate,
    find_version,
    list_versions,
    read_model,
    read_scores,
    register,
    run_model,
    train,
)
from cvops_wb.learn.learners.devices import NoDevice, choose_device
from cvops_wb.learn.loading import load_pixels
from cvops_wb.learn.tasks import TASKS
from cvops_wb.learn.training import Diverged, complete, gather, show_all

TINY = TrainSpec(network="small_resnet:8", epochs=8, size=32, batch_size=8, track=False)
REFERENCE = {"id", "label", "predicted", "confidence", "entropy_of_scores", "embedding",
             "brightness", "contrast", "sharpness", "entropy", "saturation", "width", "height", "bytes"}


@pytest.fixture(scope="module")
def shelf(photos, tmp_path_factory):
    "A workbench with a snapshot of the forty photographs."
    root = tmp_path_factory.mktemp("learn")
    shutil.copy(REPO/"settings.ini", root)
    (root/"pyproject.toml").write_text(PYPROJECT)
    hush()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROOT": root, "GATE_MIN_SAMPLES": 5, "GATE_MIN_ACCURACY": .05, "GATE_MAX_CALIBRATION_ERROR": .9, "TRAIN_THREADS": 1}.items():
            patch.setenv(f"CVOPS_{name}", str(value))
        patch.chdir(root)
        settings = load_settings()
        batch = ingest(str(photos), IngestSpec(), room(settings, "ingest"))
        selection = curate(batch, CurateSpec(val=.25, test=.25), room(settings, "curate"))
        yield settings, take_snapshot(selection, SnapshotSpec(push=False), room(settings, "snapshot"))


def room(settings, run: str):
    "The folder of a run."
    path = settings.reports/run
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.slow
def test_from_photographs_to_a_champion(shelf, capsys):
    settings, snapshot = shelf
    candidate = train(snapshot, replace(TINY, epochs=12, track=True), room(settings, "train-1"))
    assert capsys.readouterr().out.count("epoch ") == 12 and candidate.tracking
    assert pd.read_csv(settings.reports/"train-1"/"history.csv").shape[0] == 12
    model = read_model(locate(candidate.model), candidate.manifest_sha256)
    reference = model.read_reference()
    assert REFERENCE <= set(reference) and set(reference["label"]) <= set(snapshot.classes) and model.classes == snapshot.classes
    assert candidate.metrics["parity"] < 1e-3 and candidate.metrics["accuracy"] == (reference["label"] == reference["predicted"]).mean()

    evaluation = evaluate(candidate, EvaluateSpec(bootstrap=200), room(settings, "evaluate-1"))
    table = read_scores(evaluation)
    assert evaluation.split == "test" and evaluation.count == len(table) == snapshot.splits["test"] and evaluation.candidate == "train-1"
    assert evaluation.metrics["accuracy"] == table["correct"].mean() and evaluation.intervals["accuracy"][0] <= evaluation.metrics["accuracy"]
    assert evaluation.metrics["accuracy"] > .5      # four colours
    assert {"top3", "macro_f1", "calibration_error", "accuracy_unleaked", "latency_ms", "size_mb"} <= set(evaluation.metrics)
    assert sum(c["count"] for c in evaluation.per_class.values()) == evaluation.count

    version = register(evaluation, RegisterSpec(), room(settings, "register-1"))
    assert (version.version, version.alias) == (1, "champion") and find_version() == version and len(list_versions()) == 1
    assert (settings.root/"data.dvc").is_file()
    for picture in (draw_history(candidate), draw_predictions(candidate), draw_metrics(evaluation), draw_confusion(evaluation),
                    draw_calibration(evaluation), draw_classes(evaluation), draw_verdict(version)): assert picture is not None
    assert draw_errors(evaluation).width > 100, "also of a model that is never wrong"

    again = evaluate(candidate, EvaluateSpec(split="val", bootstrap=50, track=False), room(settings, "evaluate-2"))
    assert again.split == "val" and abs(again.metrics["accuracy"] - candidate.metrics["accuracy"]) < 1e-9

    from cvops_wb.learn.tracking import find_run, open_client
    client, experiment = open_client(settings)
    run = client.get_run(find_run(client, experiment, "train-1"))
    assert run.info.run_id == candidate.tracking and run.data.tags["cvops.snapshot"] == snapshot.id and run.data.metrics["test_accuracy"] >= 0
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 12
    assert {"curves.png", "confusion.png", "samples.png", "predictions.png", "model.json"} <= {a.path for a in client.list_artifacts(run.info.run_id)}


def test_mlflow_has_the_pictures_and_the_machine(shelf, monkeypatch):
    "From `train` alone: pictures of a sensible size, system metrics of the time it took; photographs only where `cvops forget` reaches."
    from cvops_wb.data.versions.erasure import _empty_cache
    from cvops_wb.learn.tracking import open_client
    settings, snapshot = shelf
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", ".05")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the picture")
        candidate = train(snapshot, replace(TINY, track=True), room(settings, "train-pictures"))
    client, _ = open_client(settings)
    metrics = client.get_run(candidate.tracking).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(metrics) and metrics["system/system_memory_usage_megabytes"] > 0
    shown = {a.path for a in client.list_artifacts(candidate.tracking)}
    assert {"confusion.png", "samples.png", "predictions.png"} <= shown
    for name in ("confusion.png", "samples.png", "predictions.png"): assert min(Image.open(settings.reports/"train-pictures"/name).size) > 100
    monkeypatch.setattr("cvops_wb.data.versions.erasure.KEPT", [path.name for path in settings.cache.glob("*")])     # others of this module need theirs
    _empty_cache(settings)
    assert {"samples.png", "predictions.png"} & {a.path for a in client.list_artifacts(candidate.tracking)} == set()

    elsewhere = replace(settings, tracking=Tracking(uri="http://127.0.0.1:9"))
    kept = []
    show_all(elsewhere, SimpleNamespace(keep=kept.append), candidate, gather(settings, TASKS["classification"](), snapshot, complete(TINY, snapshot)), room(settings, "train-elsewhere"))
    assert [path.name for path in kept] == ["confusion.png"]


def test_the_same_seed_gives_the_same_model(shelf):
    settings, snapshot = shelf
    spec = replace(TINY, epochs=2)
    first, same, other = (train(snapshot, replace(spec, seed=s), room(settings, f"train-seed-{k}")) for k, s in enumerate([1, 1, 2]))
    assert first.manifest_sha256 == same.manifest_sha256 != other.manifest_sha256 and first.metrics == same.metrics


def cut_off(monkeypatch, snapshot, spec, out):
    "A training that is interrupted at its eleventh step, those of a measurement not counted; it is kept at each."
    from cvops_wb.learn.fitting import Run, Step
    steps, take = [], Step.take
    def stop(self, index, progress):
        if isinstance(self, Run): steps.append(progress)
        if len(steps) == 11: raise KeyboardInterrupt
        return take(self, index, progress)
    monkeypatch.setenv("CVOPS_TRAIN_CHECKPOINT", "0")
    with monkeypatch.context() as patch:
        patch.setattr(Step, "take", stop)
        with pytest.raises(KeyboardInterrupt): train(snapshot, spec, out)


def test_cut_off_it_goes_on(shelf, monkeypatch, capsys):
    "The stage itself, cut off at its eleventh step and called again: the same manifest, the whole history, and no checkpoint left."
    settings, snapshot = shelf
    spec = replace(TINY, epochs=4, seed=5)
    whole = train(snapshot, spec, room(settings, "train-whole"))
    cut_off(monkeypatch, snapshot, spec, room(settings, "train-cut"))
    assert len(list((settings.cache/"checkpoints").glob("*.safetensors"))) == 1
    again = train(snapshot, spec, room(settings, "train-cut"))
    assert again.manifest_sha256 == whole.manifest_sha256 and again.metrics == whole.metrics and "goes on in epoch" in capsys.readouterr().out
    tables = [pd.read_csv(settings.reports/run/"history.csv")[["epoch", "loss", "val_accuracy"]] for run in ("train-whole", "train-cut")]
    assert tables[0].equals(tables[1]) and not list((settings.cache/"checkpoints").iterdir())


@pytest.fixture
def brief(monkeypatch):
    "So few epochs are worth it that a budget of minutes ends soon."
    monkeypatch.setattr(TASKS["classification"], "most_epochs", 1)
    return replace(TINY, epochs=0, size=0, minutes=30.)


def test_a_budget_becomes_epochs_and_a_size(shelf, brief, capsys):
    "Chosen before the first step, said, in the record; the same epochs and size by hand, as `cvops reproduce` gives them, make the same model."
    from cvops_wb.core.records import Envelope
    from cvops_wb.learn.modelcards import pin_parameters
    settings, snapshot = shelf
    candidate = train(snapshot, brief, room(settings, "train-minutes"))
    budget, said = candidate.spec["budget"], capsys.readouterr().out
    assert (budget["minutes"], budget["epochs"], budget["size"]) == (30., 4, candidate.size) and candidate.size > 64, "the largest of the ladder that the images have room for"
    assert f"30 min: 4 epochs at {candidate.size} px" in said and said.count("\nepoch ") == 4
    assert budget["epoch_seconds"] > 0 and budget["check_seconds"] > 0 and 0 < budget["seconds"] < 1800
    given = pin_parameters(Envelope("train-minutes", "train", candidate, parameters={"minutes": 30., "epochs": 0, "size": 0, "weights": "auto"}))
    assert given == {"minutes": None, "epochs": 4, "size": candidate.size, "weights": "scratch"}
    again = train(snapshot, replace(brief, **given), room(settings, "train-by-hand"))
    assert again.manifest_sha256 == candidate.manifest_sha256 and again.metrics == candidate.metrics and not again.spec["budget"]


def test_cut_off_it_keeps_its_budget(shelf, brief, monkeypatch, capsys):
    "The machine is measured once: what goes on, or begins anew, has the epochs and the size of the beginning, whatever the clock would say now."
    from cvops_wb.learn.learners import budgets
    settings, snapshot = shelf
    spec = replace(brief, seed=3)
    cut_off(monkeypatch, snapshot, spec, room(settings, "train-minutes-cut"))
    def slow(*_): raise AssertionError("it is measured again")
    monkeypatch.setattr(budgets, "measure_cost", slow)
    again = train(snapshot, spec, room(settings, "train-minutes-cut"))
    assert "goes on in epoch" in capsys.readouterr().out
    monkeypatch.setattr(budgets, "MOST", 1000)
    anew = train(snapshot, spec, room(settings, "train-minutes-anew"))
    whole = train(snapshot, replace(spec, minutes=None, epochs=again.spec["epochs"], size=again.size), room(settings, "train-minutes-whole"))
    assert again.manifest_sha256 == anew.manifest_sha256 == whole.manifest_sha256 and again.metrics == whole.metrics
    with pytest.raises(AssertionError, match="measured again"): train(snapshot, replace(spec, seed=4), room(settings, "train-minutes-other"))


def test_what_is_fitted_at_one_look_needs_no_budget(shelf, brief, capsys):
    settings, snapshot = shelf
    candidate = train(snapshot, replace(brief, network="prototypes", size=32), room(settings, "train-minutes-look"))
    assert candidate.spec["budget"] == {} and "nothing to choose" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("gain, taken", [(99., "int8"), (0., "fp32")])
def test_eight_bits_are_taken_where_they_pay(shelf, monkeypatch, gain, taken):
    from cvops_wb.learn import exporting
    from cvops_wb.serve import Classifier, verify_model
    settings, snapshot = shelf
    monkeypatch.setattr(exporting, "GAIN", gain)
    monkeypatch.setattr(exporting.choose_precision, "__defaults__", (1.,))      # whatever it loses: what is asked here is the time
    candidate = train(snapshot, replace(TINY, epochs=1, precision="auto"), room(settings, f"train-{taken}"))
    model = read_model(locate(candidate.model))
    said = model.card["precision"]
    assert said["taken"] == taken and len(model.onnx) == said[taken]["bytes"] and said["int8"]["bytes"] != said["fp32"]["bytes"] and said["int8"]["ms"] > 0
    image = open_snapshot(snapshot)
    engine = Classifier(verify_model(model.folder))
    answer = engine.predict(image.read(image.table["id"][0]))
    assert abs(answer.scores.sum() - 1) < 1e-5 and answer.label in model.classes
    assert candidate.metrics["accuracy"] == pytest.approx(said[taken]["metric"], abs=1e-4), "the metric is that of the graph that is served"


def test_pixels_are_those_of_the_service(shelf):
    "What evaluation feeds the model is what `resize_image(decode_image(bytes))` gives in service."
    from cvops_wb.data import decode_image, resize_image
    settings, snapshot = shelf
    reader = open_snapshot(snapshot)
    pixels, = load_pixels(reader, [32], settings.cache/"pixels")
    name = reader.table.query("split == 'test'")["id"].iloc[0]
    assert (pixels.take([name])[0] == resize_image(decode_image(reader.read(name)), 32)).all()


def test_torchvision_trains_too(shelf):
    settings, snapshot = shelf
    candidate = train(snapshot, replace(TINY, network="torchvision:mobilenet_v3_small", epochs=1, size=64), room(settings, "train-vision"))
    images = np.zeros((3, 64, 64, 3), np.uint8)
    assert run_model(read_model(locate(candidate.model)), images).logits.shape == (3, 4) and candidate.parameters > 1e6


def test_a_network_for_one_size_learns_at_that_size(shelf):
    "The pictures of a transformer cannot grow."
    settings, snapshot = shelf
    candidate = train(snapshot, replace(TINY, network="timm:vit_tiny_patch16_224", epochs=1, size=64), room(settings, "train-fixed"))
    assert candidate.metrics["parity"] < 1e-2 and candidate.size == 64


@pytest.mark.parametrize("change, error, message", [
    ({"epochs": -1}, WrongUsage, "epochs"), ({"size": 8}, WrongUsage, "size"), ({"batch_size": 1}, WrongUsage, "batch_size"), ({"lr": -1.}, WrongUsage, "lr"),
    ({"lr": float("nan")}, WrongUsage, "lr"), ({"flips": "sometimes"}, WrongUsage, "sides"), ({"clip": float("inf")}, WrongUsage, "clip"), ({"minutes": -1., "epochs": 0}, WrongUsage, "more than nothing"), ({"minutes": 5.}, WrongUsage, "leave one of them"), ({"minutes": 1e-6, "epochs": 0}, WrongUsage, "not one epoch"), ({"accumulate": -1}, WrongUsage, "accumulate"), ({"schedule": "cosin"}, WrongUsage, "one-cycle"), ({"network": "resnet"}, UnknownName, "network"), ({"task": "classify"}, UnknownName, "classification"),
    ({"device": "tpu"}, WrongUsage, "no such device"), ({"weights": "w.pth"}, WrongUsage, "safetensors"),
    ({"network": "linear", "task": "multilabel"}, WrongUsage, "small_resnet"), ({"network": "linear:9"}, WrongUsage, "no version '9'"), ({"lr": 1e30}, Diverged, "smaller lr"),
])
def test_what_cannot_be_trained(shelf, change, error, message):
    settings, snapshot = shelf
    with pytest.raises(error) as caught: train(snapshot, replace(TINY, **change), room(settings, "train-bad"))
    assert message in str(caught.value)
    assert not (settings.reports/"train-bad"/"model").exists()


def test_the_batch_that_led_nowhere_is_kept(shelf):
    settings, snapshot = shelf
    out = room(settings, "train-lost")
    with pytest.raises(Diverged, match="kept in diverged/"): train(snapshot, replace(TINY, lr=1e30), out)
    kept = {path.stem for path in (out/"diverged").glob("*.png")}
    from cvops_wb.data import open_snapshot
    assert kept and kept <= set(open_snapshot(snapshot).select("train")["id"])


@pytest.mark.parametrize("change, message", [
    (lambda t: t.assign(label="apple"), "two classes"),
    (lambda t: t.assign(label=""), "no labelled sample"),
    (lambda t: t[t["split"] != "val"], "'val' holds no"),
    (lambda t: t[t["split"] != "train"], "'train' holds no"),
])
def test_what_cannot_be_learned_from(shelf, monkeypatch, change, message):
    settings, snapshot = shelf
    class Changed:
        table, classes = change(open_snapshot(snapshot).table), snapshot.classes
    monkeypatch.setattr("cvops_wb.data.open_snapshot", lambda record: Changed(), raising=False)
    with pytest.raises(BadInput, match=message): train(snapshot, TINY, room(settings, "train-bad"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said():
    assert choose_device("auto") == "cpu"
    with pytest.raises(NoDevice, match="torch sees none"): choose_device("cuda")
