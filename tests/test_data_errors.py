"The errors of an evaluation in the real FiftyOne: matched boxes as patches, cells of the confusion matrix as saved views."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput
from cvops_wb.core.records import Evaluation
from cvops_wb.data.looks.errors import describe_boxes, index_errors

NAMES = ["bolt", "nut"]


@pytest.fixture
def judged(workbench, tmp_path):
    "Twelve pictures in the store, and an evaluation of them whose table a test fills in."
    from cvops_wb.data import IngestSpec, ingest, read_samples
    rng, out = np.random.default_rng(0), workbench.reports/"ingest-0000000000"
    out.mkdir(parents=True)
    for k in range(12):
        path = tmp_path/"in"/NAMES[k % 2]/f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (80, 100, 3)).astype(np.uint8)).save(path)
    table = read_samples(ingest(str(tmp_path/"in"), IngestSpec(), out).samples)
    evaluation = Evaluation("train-1", "s", "test", 12, {"accuracy": .8}, {}, {name: {} for name in NAMES}, "reports/predictions.parquet")
    return workbench, table, evaluation


def test_boxes_below_the_threshold_are_left_out():
    found = describe_boxes([10, 20, 30, 60, .9, 1, 0, 0, 5, 5, .49, 0], NAMES, 100, 200)
    assert found == [{"label": "nut", "confidence": .9, "box": [.1, .1, .2, .2]}] and describe_boxes([], NAMES, 9, 9) == []


def test_images_that_are_gone(judged):
    settings, table, evaluation = judged
    table.assign(id="0"*16, predicted="", confidence=0., correct=False).to_parquet(settings.root/evaluation.predictions)
    with pytest.raises(BadInput, match="none of the images"): index_errors(evaluation)


@pytest.mark.slow
def test_cells_and_patches(judged):
    from cvops_wb.data.views import open_fiftyone
    settings, table, evaluation = judged
    said = table["label"].where(np.arange(12) >= 3, "nut")
    cells = pd.DataFrame({"id": table["id"], "label": table["label"], "predicted": said, "confidence": np.linspace(.5, .9, 12), "correct": said == table["label"]})
    cells.to_parquet(settings.root/evaluation.predictions)
    wrong = cells[~cells["correct"]]
    view = index_errors(evaluation)
    assert view.tags["bolt taken for nut"] == len(wrong) == view.tags["surest and wrong"] and view.count == 12
    with open_fiftyone() as fiftyone:
        cell = fiftyone.load_dataset(view.dataset).load_saved_view("bolt taken for nut")
        assert cell.values("key") == wrong.sort_values("confidence", ascending=False)["id"].tolist()
    true = [{"box": [10, 10, 20, 20], "label": "bolt"}, {"box": [60, 40, 20, 20], "label": "nut"}]
    found = [[11, 10, 30, 30, .9, 0], [60, 40, 80, 60, .8, 0], [2, 60, 9, 70, .7, 1]]     # right; wrong class; nothing there
    boxes = cells.assign(objects=json.dumps(true), width=100, height=80, scores=[np.ravel(found).astype(np.float32)]*12, correct=.4)
    boxes.to_parquet(settings.root/evaluation.predictions)
    view = index_errors(replace(evaluation, task="detection"))
    assert [view.tags[f"boxes: {kind}"] for kind in ("right", "wrong", "missed")] == [12, 24, 12]
    with open_fiftyone() as fiftyone:
        dataset = fiftyone.load_dataset(view.dataset)
        assert dataset.has_evaluation("eval") and set(dataset.list_saved_views()) == set(view.tags)
        assert dataset.load_saved_view("boxes: missed").first().truth.detections[0].label == "nut"
