"Tasks beside single-label classification: metrics against COCO's own, planted truth that must be learnt, decoding that must not move."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from cvops_wb.core.errors import BadInput, WrongUsage
from cvops_wb.data import read_runs
from cvops_wb.learn.exporting import check_parity, open_session, run_session, to_onnx
from cvops_wb.learn.fitting import fit
from cvops_wb.learn.learners import LEARNERS, LearnSpec
from cvops_wb.learn.loading import Pixels
from cvops_wb.learn.networks import build_network, heatmap
from cvops_wb.learn.tasks import TASKS, check_labels, choose_task
from cvops_wb.learn.tasks.boxes import average_precision, match_class
from cvops_wb.learn.tasks.detection import measure, to_image

SIDE, CLASSES = 64, ["block", "disc"]


def imagine(seed: int, images: int = 12) -> tuple[list, list]:
    "Boxes of two classes, and predictions that are right, shifted, doubled or wrong."
    rng, scores, targets = np.random.default_rng(seed), [], []
    for _ in range(images):
        corner, extent = rng.uniform(0, 60, (rng.integers(0, 6), 2)), rng.uniform(8, 40, (1, 2))
        true = np.c_[corner, corner + extent, rng.integers(0, 3, len(corner))]
        found = np.r_[true, true[::2], np.c_[rng.uniform(0, 40, (3, 2)), rng.uniform(50, 90, (3, 2)), rng.integers(0, 3, 3)]]
        moved = found[:, :4] + rng.normal(0, 3, (len(found), 4))
        scores.append(np.c_[moved, rng.uniform(.02, 1, len(found)), found[:, 4]])
        targets.append(true)
    return scores, targets


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_coco_s(seed):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    scores, targets = imagine(seed)
    truth = COCO()
    def lay(x1, y1, x2, y2): return [float(x1), float(y1), float(x2 - x1), float(y2 - y1)]
    boxes = [{"image_id": n, "category_id": int(row[4]), "bbox": lay(*row[:4]), "area": float((row[2] - row[0])*(row[3] - row[1])), "iscrowd": 0}
             for n, target in enumerate(targets) for row in target]
    truth.dataset = {"images": [{"id": n} for n in range(len(targets))], "categories": [{"id": k} for k in range(3)],
                     "annotations": [{"id": k + 1, **box} for k, box in enumerate(boxes)]}
    truth.createIndex()
    said = truth.loadRes([{"image_id": n, "category_id": int(row[5]), "bbox": lay(*row[:4]), "score": float(row[4])} for n, found in enumerate(scores) for row in found])
    judge = COCOeval(truth, said, "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    ours = measure(scores, targets)
    assert [ours[name][0] for name in ("map", "map50", "map75")] == pytest.approx(judge.stats[:3].tolist(), abs=1e-9)
    assert 0 < ours["map"][0] < 1


def test_weights_are_repetition():
    "An image that was drawn twice counts as two."
    scores, targets = imagine(5)
    weights = np.random.default_rng(0).integers(0, 3, (4, len(targets)))
    for row, *got in zip(weights, *(measure(scores, targets, weights)[name] for name in ("map33", "f1", "recall")), strict=True):
        several = [k for k, often in enumerate(row) for _ in range(often)]
        wanted = measure([scores[k] for k in several], [targets[k] for k in several])
        assert got == pytest.approx([wanted[name][0] for name in ("map33", "f1", "recall")])


@pytest.mark.parametrize("spoil", [lambda b: b[:, [1, 0, 3, 2, 4, 5]], lambda b: b + [8, 8, 8, 8, 0, 0], lambda b: np.c_[b[:, :5], 1 - b[:, 5]]])
def test_spoilt_boxes_lose(spoil):
    truth = [np.array([[4., 20, 14, 40, 0], [30, 5, 60, 15, 1]])]
    right = [np.c_[truth[0][:, :4], [.9, .8], truth[0][:, 4]]]
    assert measure(right, truth)["map"][0] > .999 and measure([spoil(right[0])], truth)["map50"][0] < .01


def test_nothing_anywhere():
    task, empty = TASKS["detection"](), [np.zeros((0, 5))]
    assert task.rate([np.zeros((0, 6))], empty).tolist() == [1] and np.isnan(measure([np.zeros((0, 6))], empty)["map"][0])
    assert np.isnan(average_precision(match_class([np.zeros((0, 6))], empty, 0), np.ones((1, 1)))).all()


def draw_scene(seed: int) -> tuple[np.ndarray, list[dict]]:
    "A noisy image with one or two of a blue block and a red disc, and its objects."
    rng, objects = np.random.default_rng(seed), []
    image = Image.fromarray(rng.normal(110, 15, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8))
    for k in rng.permutation(2)[:rng.integers(1, 3)]:
        w, h = (int(v) for v in rng.integers(14, 26, 2))
        x, y = int(rng.integers(0, SIDE - w)), int(rng.integers(0, SIDE//2 - h//2) if k else rng.integers(0, SIDE - h))
        pen = ImageDraw.Draw(image)
        (pen.ellipse if k else pen.rectangle)((x, y, x + w - 1, y + h - 1), fill=((30, 60, 220), (220, 40, 40))[k])
        objects.append({"box": [x, y, w, h], "label": CLASSES[k]})
    return np.array(image), objects


def gather(name: str, count: int = 48):
    "What a learner is given, of drawn scenes: the last quarter held out."
    scenes, task = [draw_scene(k) for k in range(count)], TASKS[name]()
    table = pd.DataFrame({"id": [f"{k:03}" for k in range(count)], "label": "", "objects": [json.dumps(o) for _, o in scenes], "width": SIDE, "height": SIDE})
    pixels, cut = Pixels(pd.Index(table["id"]), np.stack([image for image, _ in scenes])), count*3//4
    rows, held = table[:cut].reset_index(drop=True), table[cut:].reset_index(drop=True)
    targets = [task.to_targets(part, CLASSES, SIDE) for part in (rows, held)]
    return task, SimpleNamespace(task=task, size=SIDE, rows=rows, held=held, targets=targets[0], held_targets=targets[1], pixels=pixels, exact=pixels)


def teach(name: str, network: str, epochs: int) -> tuple[float, object, object]:
    "The main metric on held-out scenes, by way of the exported graph."
    torch.manual_seed(0)
    torch.set_num_threads(1)
    task, material = gather(name)
    made, losses = build_network(network, task.count(CLASSES), SIDE), []
    fit(LEARNERS[name](made, material, LearnSpec(epochs=epochs, batch=6, every=epochs)), lambda report: losses.append(report["loss"]))
    session = open_session(to_onnx(made, SIDE, task.outputs), 1)
    images = material.exact.take(material.held["id"])
    assert check_parity(made, session, images[:4]) < 1e-2 and losses[-1] < losses[0]
    raw = run_session(session, images).logits
    scores = task.to_scores(raw, task.calibrate(raw, material.held_targets, material.held, SIDE), material.held, SIDE)
    assert len(task.rate(scores, material.held_targets)) == len(material.held)
    again = task.unpack(task.pack(scores))
    assert all(np.allclose(a, b, atol=1e-3) for a, b in zip(again, scores, strict=True))
    assert set(task.to_columns(scores, CLASSES)) >= {"predicted", "confidence", "entropy_of_scores"} and set(task.measure_classes(scores, material.held_targets, CLASSES)) == set(CLASSES)
    return float(task.measure(scores, material.held_targets)[task.main_metric][0]), made, material


@pytest.mark.parametrize("name, network, epochs, least", [("detection", "heatmap:8", 16, .6), ("segmentation", "encoder_decoder:8", 15, .6), ("multilabel", "small_resnet:8", 16, .85)])
def test_a_planted_truth_is_learnt(name, network, epochs, least): assert teach(name, network, epochs)[0] > least


def test_a_broken_decoding_shows(monkeypatch):
    "Boxes that are read with x and y confused find nothing, whatever was learnt."
    right = heatmap.to_boxes
    monkeypatch.setattr(heatmap, "to_boxes", lambda raw: right(raw)[:, [1, 0, 3, 2]] if not torch.is_grad_enabled() else right(raw))
    assert teach("detection", "heatmap:8", 16)[0] < .3


def test_a_broken_loss_shows(monkeypatch):
    monkeypatch.setattr("cvops_wb.learn.learners.detection.detection_loss", lambda heat, box, targets: heat.float().square().mean() + box.float().square().mean())
    assert teach("detection", "heatmap:8", 16)[0] < .3


def test_the_size_of_the_photograph_is_undone():
    found = to_image(np.array([[16., 8, 48, 24, .9, 0], [0, 0, 9, 9, .001, 1]]), 64, 1280, 320)
    assert found.tolist() == [[320, 40, 960, 120, .9, 0]]


@pytest.mark.parametrize("mask", [np.eye(5, 7, dtype=np.uint8), np.zeros((4, 3), np.uint8), np.random.default_rng(0).integers(0, 2, (40, 70)).astype(np.uint8)])
def test_run_lengths_are_coco_s(mask):
    from pycocotools import mask as theirs
    runs = theirs.encode(np.asfortranarray(mask))
    assert (read_runs({"size": runs["size"], "counts": runs["counts"].decode()}) == mask).all()


@pytest.mark.parametrize("label, objects, task", [
    ("cup", "", "classification"), ("cup|jug", "", "multilabel"), ("", '[{"box":[0,0,9,9],"label":"cup"}]', "detection"),
    ("", '[{"box":[0,0,9,9],"label":"cup","polygons":[[0,0,9,0,9,9]]}]', "segmentation"), ("cup", "[]", "classification"),
])
def test_the_task_follows_from_the_labels(label, objects, task): assert choose_task(pd.DataFrame({"label": [label], "objects": [objects]})) == task


def test_several_classes_are_no_label():
    table = pd.DataFrame({"label": [""], "objects": ['[{"box":[0,0,9,9],"label":"cup"},{"box":[0,0,9,9],"label":"jug"}]']})
    with pytest.raises(BadInput, match="task=detection"): check_labels(table)
    with pytest.raises(BadInput, match="task=multilabel"): check_labels(pd.DataFrame({"label": ["cup", "cup|jug"], "objects": ""}))


def test_where_all_is_even_rounding_does_not_choose():
    "An even part of a heat map is all peak, or none of it: two runtimes that differ in the seventh digit find the same boxes."
    heat, box = torch.full((1, 1, 8, 8), -2.), torch.zeros(1, 4, 8, 8)
    heat[0, 0, 5, 5] = 1.
    noise = 1e-6*torch.rand(heat.shape, generator=torch.Generator().manual_seed(0))
    first, second = (heatmap.find_peaks(h, box)[0] for h in (heat, heat + noise))
    kept = [{tuple(row[:4].tolist()) for row in found if row[4] > .01} for found in (first, second)]
    assert kept[0] == kept[1] and len(kept[0]) == 64 - 8


def test_a_network_for_another_task():
    from cvops_wb.learn.training import TrainSpec, check_task
    with pytest.raises(WrongUsage, match="network=heatmap"): check_task(build_network("small_resnet:8", 2, 64), replace(TrainSpec(), task="detection", network="small_resnet:8"))


@pytest.mark.parametrize("name, classes", [("torchvision:lraspp_mobilenet_v3_large", 3)])
def test_torchvision_s_segmenters(name, classes):
    network = build_network(name, classes, 64).train()
    network(torch.zeros(2, 3, 64, 64)).mean().backward()
    session = open_session(to_onnx(network.eval(), 64, ("maps", "embedding")), 1)
    assert run_session(session, np.zeros((3, 64, 64, 3), np.uint8)).logits.shape == (3, classes, 64, 64)


@pytest.mark.parametrize("side, want", [(8, 32), (28, 64), (64, 128), (348, 128)])
def test_small_images_are_not_blown_up(side, want):
    assert TASKS["classification"]().choose_size(pd.DataFrame({"width": [side]*3 + [4000], "height": [side + 20]*4})) == want


@pytest.mark.parametrize("count, fits", [(0, []), (1, ["detection", "segmentation"]), (255, ["detection", "segmentation"]), (256, ["detection"])])
def test_classes_that_can_be_told_apart(count, fits):
    "A mask of bytes holds 255 classes; without an object there is nothing to learn."
    table = pd.DataFrame({"objects": ["[]", *(json.dumps([{"box": [0, 0, 4, 4], "label": f"c{k}"}]) for k in range(count))]})
    for name in ("detection", "segmentation"):
        if name in fits: assert len(TASKS[name]().list_classes(table, [])) == count
        else:
            with pytest.raises(BadInput, match="classes"): TASKS[name]().list_classes(table, [])


def test_what_reaches_out_of_an_image_is_cut_off():
    "A box that is found whole as far as it can be seen is right; one outside is not missed."
    rows = pd.DataFrame({"objects": [json.dumps([{"box": [-20, 10, 30, 20], "label": "cup"}, {"box": [70, 0, 9, 9], "label": "cup"}])], "width": [64], "height": [64]})
    task = TASKS["detection"]()
    targets = task.to_targets(rows, ["cup"])
    assert targets[0].tolist() == [[0, 10, 10, 30, 0]] and task.measure([np.array([[0, 10, 10, 30, .9, 0]])], targets)["map50"] == pytest.approx(1)
