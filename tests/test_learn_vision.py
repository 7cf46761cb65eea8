"torchvision's architectures by name answer alike as ONNX, on a real photograph: one of each task here, `CVOPS_FULL=1` looks at all of them."
import os
import socket

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from cvops_wb.core.errors import CvopsError
from cvops_wb.learn.exporting import check_parity, open_session, to_onnx
from cvops_wb.learn.networks import build_network, vision
from cvops_wb.learn.tasks import TASKS

PHOTO = REPO.parent/"shared"/"data"/"grocery"/"train"/"Fruit"/"Apple"/"Golden-Delicious"/"Golden-Delicious_001.jpg"
QUICK = [("timm:resnet18", "classification", 64), ("torchvision:lraspp_mobilenet_v3_large", "segmentation", 96)]
FULL = [(f"torchvision:{name}", task, size) for task, size, names in [
    ("classification", 64, ["resnet18", "convnext_tiny", "efficientnet_b0", "mobilenet_v3_small", "vit_b_16"]),
    ("segmentation", 96, ["deeplabv3_mobilenet_v3_large"]),
    ("detection", 128, ["fcos_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])] for name in names]


@pytest.mark.parametrize("name, task, size", QUICK + (FULL if os.environ.get("CVOPS_FULL") else []))
def test_parity(name, task, size):
    if not PHOTO.is_file(): pytest.skip("the shared photographs are not here")
    torch.manual_seed(0)
    network = build_network(name, TASKS[task]().count(list("abcd")), size).eval()
    image = np.array(Image.open(PHOTO).convert("RGB").resize((size, size)))[None]
    assert check_parity(network, open_session(to_onnx(network, size, TASKS[task]().outputs)), image) < 1e-2


@pytest.mark.parametrize("learned", [False, True])
def test_ssdlite_is_compared_once_it_has_learned(learned):
    "All scores of a detector that has learned nothing are alike: which hundred boxes are the best is then anybody's choice, and is said so."
    torch.manual_seed(0)
    network = build_network("torchvision:ssdlite320_mobilenet_v3_large", 2, 320).eval()
    if learned:     # statistics of one batch are enough for scores that differ
        for part in network.modules(): part.momentum = 1.
        with torch.no_grad(): network.train().losses(torch.randn(2, 3, 320, 320), [torch.tensor([[40., 60, 200, 180, 0]])]*2)
        network.eval()
    image = np.random.default_rng(0).integers(0, 255, (1, 320, 320, 3), dtype=np.uint8)
    session = open_session(to_onnx(network, 320, TASKS["detection"]().outputs), 1)
    if learned: assert check_parity(network, session, image) < .32
    else:
        with pytest.raises(CvopsError) as refused: check_parity(network, session, image)
        assert "train it for longer" in refused.value.fix


def test_a_network_that_is_silent_is_not_waited_for(monkeypatch, tmp_path):
    "A proxy that takes the connection and never answers."
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name in ("https_proxy", "HTTPS_PROXY"): monkeypatch.setenv(name, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(vision, "impatient", lambda patience=vision.impatient: patience(.3))
        with pytest.raises(CvopsError, match="could not be downloaded") as refused: vision.fetch_weights("resnet18", "DEFAULT")
    assert "weights.safetensors" in refused.value.fix and socket.getdefaulttimeout() is None
