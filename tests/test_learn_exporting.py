"A model's files: the same answers as torch, and one flipped bit refused by name."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from cvops_wb.core.errors import BadInput, BadModel, CvopsError
from cvops_wb.learn.exporting import (
    ParityFailed,
    _differ,
    check_parity,
    open_session,
    read_model,
    run_model,
    to_onnx,
    write_model,
)
from cvops_wb.learn.networks import Assembled, build_network

FILES = ["weights.safetensors", "model.onnx", "model.json", "reference.parquet", "manifest.json"]


@pytest.fixture(scope="module")
def photos_at_64() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 255, (6, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    return (smooth*.8 + rng.integers(0, 50, (6, 64, 64, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    toy = Assembled(nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), nn.Linear(48, 3)).eval()
    card = {"task": "classification", "network": "toy", "classes": ["a", "b", "c"], "size": 16, "temperature": 1., "snapshot": "s"}
    reference = pd.DataFrame({"id": ["x"], "label": ["a"], "embedding": [np.zeros(48, np.float32)]})
    write_model(tmp_path/"model", toy, to_onnx(toy, 16), card, reference)
    return tmp_path/"model"


def tiny_transformer() -> Assembled:
    "What `torchvision:vit_b_16` is made of, small: its attention needs care on export."
    body = VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    body.heads = nn.Identity()
    return Assembled(body, nn.Linear(32, 7))


@pytest.mark.parametrize("name", ["small_resnet", "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:efficientnet_b0",
                                  "torchvision:convnext_tiny", "transformer"])
def test_parity(name, photos_at_64):
    torch.manual_seed(0)
    network = (tiny_transformer() if name == "transformer" else build_network(name, classes=7, size=64)).eval()
    session = open_session(to_onnx(network, 64))
    assert check_parity(network, session, photos_at_64) < 1e-3
    for count in (1, 5):    # any number of images
        logits, embedding = session.run(["logits", "embedding"], {"images": photos_at_64[:count]})
        assert logits.shape == (count, 7) and logits.dtype == np.float32 and embedding.shape[0] == count and embedding.ndim == 2
    assert session.get_inputs()[0].type == "tensor(uint8)" and session.get_inputs()[0].shape[1:] == [64, 64, 3]


def test_a_wrong_export_is_an_error(photos_at_64):
    network, other = (build_network("small_resnet", classes=7, size=64).eval() for _ in range(2))
    with pytest.raises(ParityFailed): check_parity(network, open_session(to_onnx(other, 64)), photos_at_64)


def test_read_back(model_folder):
    model = read_model(model_folder)
    assert (model.classes, model.size, model.temperature) == (["a", "b", "c"], 16, 1.)
    assert list(model.read_reference()["id"]) == ["x"]
    assert run_model(model, np.zeros((70, 16, 16, 3), np.uint8)).embedding.shape == (70, 48)
    assert {f.name for f in model_folder.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, .5, 1])
def test_a_flipped_bit_is_refused(model_folder, name, place):
    recorded = read_model(model_folder).manifest_sha256
    data = bytearray((model_folder/name).read_bytes())
    data[int(place*(len(data) - 1))] ^= 4
    (model_folder/name).write_bytes(data)
    with pytest.raises(BadModel) as caught: read_model(model_folder, recorded)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(b"")])
def test_a_missing_or_cut_file_is_refused(model_folder, name, harm):
    harm(model_folder/name)
    with pytest.raises(BadModel) as caught: read_model(model_folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("files", [{}, [], {"../outside": {"sha256": "0", "size": 1}}, {"model.onnx": {"sha256": "0"}}, None, "text"])
def test_a_forged_manifest_is_refused(model_folder, files):
    known = json.loads((model_folder/"manifest.json").read_text())["files"]
    forged = {**known, **files} if isinstance(files, dict) and files else files
    (model_folder/"manifest.json").write_text(json.dumps({"schema": 1, "files": forged}))
    with pytest.raises((BadModel, BadInput)): read_model(model_folder)


def test_no_folder_is_a_clear_error(tmp_path):
    with pytest.raises(CvopsError, match="manifest.json"): read_model(tmp_path/"nothing")


def test_ties_at_the_hundredth_box_are_no_disagreement():
    "Where many boxes score alike, the two sides may keep others of them; what scores more must be on both."
    rng, sure = np.random.default_rng(0), np.linspace(.9, .5, 60)
    ours, theirs = (np.concatenate([np.c_[np.arange(60)[:, None] + np.arange(4), sure, np.zeros(60)], np.c_[rng.uniform(0, 64, (40, 4)), np.full(40, .2), np.zeros(40)]]) for _ in range(2))
    assert _differ(ours[None], theirs[None]) == 0
    theirs[0, 0] -= 5
    assert _differ(ours[None], theirs[None]) == 5
    assert _differ(ours[None, 60:], theirs[None, 60:]) > 1      # all alike: nothing was proved
