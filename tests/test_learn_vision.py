"torchvision's architectures by name answer alike as ONNX, on a real photograph: one of each task here, `CVOPS_FULL=1` looks at all of them."
import os

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from cvops_wb.learn.exporting import check_parity, open_session, to_onnx
from cvops_wb.learn.networks import build_network
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
