"Starts without much: a memory of good images, and heads over fixed eyes; both as any other candidate, through ONNX to the service."
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cvops_wb.core.errors import BadInput, WrongUsage
from cvops_wb.core.records import Evaluation
from cvops_wb.core.settings import Gate
from cvops_wb.learn.evaluation import EvaluateSpec, measure_all, measure_damaged, predict, slice_up
from cvops_wb.learn.exporting import check_parity, open_session, read_model, to_onnx, write_model
from cvops_wb.learn.gates import judge
from cvops_wb.learn.learners import LEARNERS, LearnSpec
from cvops_wb.learn.learners.shots import recall_all, say_chance
from cvops_wb.learn.loading import Pixels
from cvops_wb.learn.networks import build_network
from cvops_wb.learn.tasks import TASKS, find_good
from cvops_wb.learn.tasks.anomaly import choose_threshold, measure_auroc, measure_regions
from cvops_wb.serve.inference import Classifier, find_regions
from cvops_wb.serve.verification import verify_model

SIDE, SCAR = 64, json.dumps([{"box": [20, 30, 9, 7], "label": "scar"}])


def imagine(count: int, scarred: int, seed: int = 0) -> tuple[pd.DataFrame, Pixels]:
    "Grainy plates, the last ones with a scar."
    plates = np.random.default_rng(seed).normal(150, 9, (count, SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    plates[count - scarred:, 30:37, 20:29] -= 70
    table = pd.DataFrame({"id": [f"{k:03}" for k in range(count)], "label": "", "objects": ["[]"]*(count - scarred) + [SCAR]*scarred, "width": SIDE, "height": SIDE,
                          "group": range(count), "tags": [[]]*count, "split": "train"})
    return table, Pixels(pd.Index(table["id"]), plates)


def learn_plates(held_scarred: int = 8, train_scarred: int = 0):
    "A memory of 24 plates, and what was held out."
    task, names = TASKS["anomaly"](), ["good", "scar"]
    table, pixels = imagine(24 + 16, held_scarred)
    rows, held = table[:24].copy(), table[24:].reset_index(drop=True)
    if train_scarred:
        rows.loc[rows.index[:train_scarred], "objects"] = SCAR
        pixels.images[:train_scarred, 30:37, 20:29] -= 70
    targets = [task.to_targets(part, names, SIDE) for part in (rows, held)]
    material = SimpleNamespace(task=task, size=SIDE, rows=rows, held=held, targets=targets[0], held_targets=targets[1], pixels=pixels, exact=pixels)
    torch.manual_seed(0)
    network, told = build_network("patches", 2, SIDE), []
    LEARNERS["anomaly"](network, material, LearnSpec()).memorise(told.append)
    return network, material, told[0]


@pytest.mark.parametrize("scarred", [0, 6])
def test_scars_are_found_where_they_are(scarred):
    "Also where `train` holds some that are labelled: they are left out of the memory."
    _, _, told = learn_plates(train_scarred=scarred)
    assert told["auroc"] == 1 and told["pro"] > .9


def test_nothing_good_is_said():
    with pytest.raises(BadInput, match="no good images"): learn_plates(train_scarred=24)


def test_a_memory_is_served_as_any_model(tmp_path):
    network, material, _ = learn_plates()
    task, names = material.task, ["good", "scar"]
    onnx = to_onnx(network, SIDE, task.outputs)
    session = open_session(onnx, 1)
    check_parity(network, session, material.exact.take(material.held["id"]))
    raw = session.run(None, {"images": material.exact.take(material.held["id"])})[0]
    card = {"task": "anomaly", "network": "patches", "classes": names, "size": SIDE, "temperature": task.calibrate(raw, material.held_targets), "snapshot": "s"}
    identity = write_model(tmp_path/"model", network, onnx, card, pd.DataFrame({"id": ["x"]}))
    table, scores = predict(task, read_model(tmp_path/"model"), material.held, material.exact)
    assert table["correct"].all() and table["label"].tolist() == table["predicted"].tolist()
    assert np.array_equal(task.unpack(task.pack(scores)), scores)
    service = Classifier(verify_model(tmp_path/"model", identity))
    good, scarred = (service.predict(material.exact.images[k]) for k in (24, 39))
    assert (good.label, scarred.label) == ("good", "scar") and good.more["objects"] == [] and good.scores.sum() == pytest.approx(1)
    x1, y1, x2, y2 = scarred.more["objects"][0]["box"]
    assert x1 < 24.5 < x2 and y1 < 33.5 < y2 and (x2 - x1)*(y2 - y1) < 30**2


def test_without_defects_nothing_is_claimed():
    "Good images alone: a threshold that two in a hundred pass, no AUROC, and a gate that refuses for want of it."
    network, material, told = learn_plates(held_scarred=0)
    assert np.isnan(told["auroc"]) and "pro" not in told and told["false_alarms"] <= .1
    task, model = material.task, SimpleNamespace(classes=["good", "scar"], size=SIDE)
    scores = np.full((16, 16, 16), .3, np.float32)
    table = material.held.assign(leak=False, slices=[[]]*16)
    metrics, intervals, _ = measure_all(task, model, table, scores, EvaluateSpec(bootstrap=20))
    assert "auroc" not in metrics and "auroc" not in intervals and slice_up(task, model, table, scores, EvaluateSpec(bootstrap=60)) == []
    e = Evaluation("t", "s", "test", 16, metrics, intervals, {}, "p", main_metric="auroc")
    assert not next(r for r in judge(e, Gate()) if r["rule"] == "min_accuracy")["passed"]


def test_damage_tells_a_blind_model_from_one_that_sees(tmp_path):
    "Good images alone: what was damaged on purpose is found by a memory, not by a model that says the same of everything; and the rule goes by that."
    network, material, _ = learn_plates(held_scarred=0)
    task, names, images = material.task, ["good", "defect"], material.exact.take(material.held["id"])
    card = {"task": "anomaly", "network": "patches", "classes": names, "size": SIDE, "temperature": 1., "snapshot": "s"}
    told = {}
    for kind in ("sees", "blind"):
        if kind == "blind": network.reach.fill_(1e6)
        write_model(tmp_path/kind, network, to_onnx(network, SIDE, task.outputs), card, pd.DataFrame({"id": ["x"]}))
        model = read_model(tmp_path/kind)
        table, scores = predict(task, model, material.held, material.exact)
        assert task.is_one_sided(task.to_targets(table, names, SIDE))
        metrics, intervals = measure_damaged(task, model, images, table, scores, EvaluateSpec(bootstrap=50))
        e = Evaluation("t", "s", "test", 16, metrics, intervals, {}, "p", task="anomaly", main_metric="planted_auroc")
        told[kind] = metrics, next(r for r in judge(e, Gate(min_accuracy=.7)) if r["rule"] == "min_accuracy")
    assert set(told["sees"][0]) == {"planted_auroc", "planted_pro", "planted_recall"} and told["sees"][0]["planted_auroc"] > .9 > .6 > told["blind"][0]["planted_auroc"]
    assert told["sees"][1]["passed"] and not told["blind"][1]["passed"] and "damaged on purpose" in told["sees"][1]["why"]


def test_auroc_is_sklearn_s():
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    scores, bad, weights = rng.integers(0, 12, 80)/12, rng.random(80) < .4, rng.integers(0, 3, (5, 80))
    assert measure_auroc(scores, bad, weights) == pytest.approx([roc_auc_score(bad, scores, sample_weight=w) for w in weights])
    assert np.isnan(measure_auroc(scores, np.zeros(80, bool), weights)).all()


def test_a_small_region_counts_as_much_as_a_large_one():
    truth = np.zeros((20, 32, 32), np.int8)
    truth[:10, 2:14, 2:14], truth[:10, 20:22, 20:22] = 1, 1
    maps = np.random.default_rng(0).uniform(0, .5, truth.shape)
    large, small = maps.copy(), maps.copy()
    large[:10, 2:14, 2:14] = small[:10, 20:22, 20:22] = 1
    values = [measure_regions(m, truth, np.ones((1, 20)))[0] for m in (large, small)]
    assert values == pytest.approx([.575, .575], abs=.05)


def test_thresholds():
    strange, bad = np.arange(100.), np.arange(100) >= 90
    assert 89 < choose_threshold(strange, bad) < 90 and choose_threshold(strange, np.zeros(100, bool)) == pytest.approx(97, abs=.1)
    assert [part.sum() for part in find_regions(np.array([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], bool))] == [2, 2]
    assert find_regions(np.zeros((3, 3), bool)) == []


def test_what_is_good():
    table = pd.DataFrame({"label": ["pcb", "open", "short"], "objects": "", "split": ["train", "test", "test"]})
    assert find_good(table) == "pcb" and find_good(table.assign(label=["ok", "a", "b"])) == "ok"
    with pytest.raises(BadInput, match="nothing says"): find_good(table.assign(split="train"))


def gather_shots(colours: bool, held: int = 60):
    "Five images of each of three colours, or of noise."
    rng, count = np.random.default_rng(1), 15 + held
    images, names = rng.integers(0, 150, (count, 32, 32, 3)).astype(np.uint8), np.arange(count) % 3
    if colours: images[np.arange(count), :, :, names] += 100
    table = pd.DataFrame({"id": [f"{k:03}" for k in range(count)]})
    pixels = Pixels(pd.Index(table["id"]), images)
    return SimpleNamespace(rows=table[:15], held=table[15:], targets=names[:15], held_targets=names[15:], exact=pixels, size=32)


@pytest.mark.parametrize("way", ["prototypes", "linear", "knn"])
def test_five_images_a_class(way, capsys):
    told = []
    for colours in (True, False):
        network, material = build_network(way, 3, 32), gather_shots(colours)
        recall_all(network, material, 0, told.append)
        session = open_session(to_onnx(network, 32), 1)
        check_parity(network, session, material.exact.images[:8])
    assert told[0]["accuracy"] > .75 and told[1]["accuracy"] < .55
    said = capsys.readouterr().out.splitlines()
    assert ": better than chance" in said[0] and "not shown to be better" in said[1]


def test_chance_refuses():
    "An accuracy whose interval reaches down to the most frequent class's share is refused, however low the other limits."
    values = {"accuracy": .62, "chance": .6, "calibration_error": 0., "latency_ms": 1., "size_mb": 1., "count_unleaked": 200.}
    rules = judge(Evaluation("t", "s", "test", 200, values, {"accuracy": [.55, .69]}, {}, "p"), Gate(min_accuracy=0.))
    assert [r["rule"] for r in rules if not r["passed"]] == ["better_than_chance"]
    assert "not shown" in say_chance(.62, 200, .6)


def test_an_eye_needs_a_middle_and_weights_an_eye():
    with pytest.raises(WrongUsage): build_network("patches", 2, 64, "DEFAULT")
    with pytest.raises(WrongUsage): build_network("linear", 2, 64, "DEFAULT")
    with pytest.raises(Exception, match="middle"): build_network("patches:torchvision:mobilenet_v3_small", 2, 64)
