"torchvision's architectures by name answer alike as ONNX, on a real photograph: one of each task here, `CVOPS_FULL=1` looks at all of them."
import hashlib
import http.server
import io
import os
import socket
import threading
from contextlib import contextmanager

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


@contextmanager
def serving(files: dict[str, bytes]):
    "A server of these files on loopback; its address, and what was asked of it."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET" and body: self.wfile.write(body)
        do_HEAD = do_GET
        def log_message(self, *arguments): pass
    asked, server = [], http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(), server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "torch's cache is empty, and no proxy stands between."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path/"torch"/"hub"/"checkpoints"


def pretrained(seed: int = 5) -> tuple[bytes, str, torch.Tensor]:
    "A file of tensors as torchvision's maker would write it, its name with the hash in it, and one of the tensors."
    from torchvision import models
    torch.manual_seed(seed)
    model, out = models.get_model("shufflenet_v2_x0_5", weights=None), io.BytesIO()
    torch.save(model.state_dict(), out)
    return out.getvalue(), f"shufflenet-{hashlib.sha256(out.getvalue()).hexdigest()[:8]}.pth", model.state_dict()["conv1.0.weight"]


def test_weights_are_fetched_once_and_then_come_from_the_cache(hub, monkeypatch):
    body, name, first = pretrained()
    with serving({f"/{name}": body}) as (address, asked):
        monkeypatch.setattr(vision, "find_weights", lambda variant, weights: ("IMAGENET1K_V1", f"{address}/{name}"))
        chosen, told = vision.choose_weights("linear:torchvision:shufflenet_v2_x0_5", "auto", 64)
        assert asked == [f"HEAD /{name}", f"GET /{name}"] and name in told
    network = build_network("torchvision:shufflenet_v2_x0_5", 3, 64, chosen)       # the server is gone
    assert chosen == "IMAGENET1K_V1" and torch.equal(network.body.conv1[0].weight, first) and [p.name for p in hub.iterdir()] == [name]
    assert vision.choose_weights("torchvision:shufflenet_v2_x0_5", "auto", 64)[0] == "IMAGENET1K_V1"


@pytest.mark.parametrize("fault", ["another hash", "not there", "no server", "a program"])
def test_what_cannot_be_had_is_said_and_nothing_is_kept(fault, hub, monkeypatch):
    body, name, _ = pretrained()
    if fault == "another hash": name = f"shufflenet-{'0'*8}.pth"
    if fault == "a program":
        body = b"cos\nsystem\n(S'true'\ntR."
        name = f"shufflenet-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    with serving({}) as (gone, _): pass
    with serving({} if fault == "not there" else {f"/{name}": body}) as (address, _):
        monkeypatch.setattr(vision, "find_weights", lambda variant, weights: ("IMAGENET1K_V1", f"{gone if fault == 'no server' else address}/{name}"))
        chosen, told = vision.choose_weights("torchvision:shufflenet_v2_x0_5", "auto", 64)
    assert chosen == "" and told.startswith("trains from scratch") and "weights=FILE" in told
    if fault != "a program": assert not hub.exists() or list(hub.iterdir()) == []
    with pytest.raises(CvopsError): vision.fetch_weights("shufflenet_v2_x0_5", "DEFAULT")


def test_a_server_that_is_silent_is_given_up(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x-00000000.pth"
        monkeypatch.setattr(vision, "find_weights", lambda variant, weights: ("IMAGENET1K_V1", url))
        assert not vision.is_reachable(url, .3)
        monkeypatch.setattr(vision.is_reachable, "__defaults__", (.3,))
        assert vision.choose_weights("torchvision:resnet18", "auto", 64)[0] == ""
