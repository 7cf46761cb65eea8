"Networks by name, weights by file: safetensors alone, and never by a download that fails silently."
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cvops_wb.core.errors import BadModel, CvopsError, UnknownName, WrongUsage
from cvops_wb.learn.networks import NETWORKS, build_network
from cvops_wb.learn.networks.vision import list_architectures

MEMBERS = [*(n for n in NETWORKS if n not in ("torchvision", "timm")), "timm:resnet18", "torchvision:resnet18", "torchvision:shufflenet_v2_x0_5"]
TASK = {"heatmap": "detection", "encoder_decoder": "segmentation", "patches": "anomaly"}     # of the others: classification


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in TASK])
def test_contract(name):
    "Every member gives an embedding and logits, and knows its normalisation."
    network = build_network(name, classes=5, size=64).eval()
    images = torch.zeros(2, 3, 64, 64)
    with torch.no_grad(): embedding, logits = network.features(images), network(images)
    tell = network.vote if name == "knn" else network.head     # neighbours vote, nothing is weighed
    assert logits.shape == (2, 5) and embedding.ndim == 2 and torch.allclose(tell(embedding), logits)
    assert len(network.mean) == len(network.std) == 3


@pytest.mark.parametrize("name", TASK)
def test_contract_of_what_looks_at_places(name):
    "A member for another task says which, and serves what that task reads, as does its export."
    from cvops_wb.learn.exporting import open_session, to_onnx
    from cvops_wb.learn.tasks import TASKS
    task = TASKS[TASK[name]]()
    network = build_network(name, classes=task.count(list("abcde")), size=64).eval()
    with torch.no_grad(): first, embedding = network.answer(torch.rand(2, 3, 64, 64))
    assert network.task == TASK[name] and len(network.mean) == len(network.std) == 3
    wanted = {"detection": (100, 6), "segmentation": (6, 64, 64), "anomaly": (16, 16)}[network.task]
    assert first.shape == (2, *wanted) and embedding.ndim == 2 and len(embedding) == 2
    told = open_session(to_onnx(network, 64, task.outputs)).run(None, {"images": np.zeros((2, 64, 64, 3), np.uint8)})
    assert [part.shape for part in told] == [tuple(first.shape), tuple(embedding.shape)]


@pytest.mark.parametrize("name, message", [
    ("smal_resnet", "did you mean 'small_resnet'"), ("resnet18", ""), ("torchvision:resnet81", "did you mean 'resnet18'"), ("torchvision", "architecture"), ("", "network"),
])
def test_unknown_names(name, message):
    with pytest.raises(UnknownName) as caught: build_network(name, classes=5, size=64)
    assert message in str(caught.value)


def test_a_size_that_cannot_be():
    with pytest.raises(CvopsError, match="cannot be built"): build_network("torchvision:vit_b_16", classes=5, size=65)


@pytest.mark.parametrize("weights", ["model.pth", "model.pt", "model.pkl", "model.bin", "folder/model"])
def test_a_pickle_is_refused(weights, tmp_path):
    with pytest.raises(WrongUsage, match="safetensors"): build_network("small_resnet", classes=5, size=64, weights=str(tmp_path/weights))


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    first = build_network("small_resnet", classes=5, size=64)
    save_file(first.state_dict(), tmp_path/"w.safetensors")
    same, more = (build_network("small_resnet", classes=k, size=64, weights=str(tmp_path/"w.safetensors")) for k in (5, 9))
    assert torch.equal(same.head.weight, first.head.weight)
    body = next(k for k in first.state_dict() if not k.startswith("head."))
    assert more.head.weight.shape[0] == 9 and torch.equal(more.state_dict()[body], first.state_dict()[body])


def test_weights_by_the_maker_s_names(tmp_path):
    from torchvision.models import resnet18
    theirs = resnet18()
    save_file(theirs.state_dict(), tmp_path/"resnet18.safetensors")
    ours = build_network("torchvision:resnet18", classes=5, size=64, weights=str(tmp_path/"resnet18.safetensors"))
    assert torch.equal(ours.body.conv1.weight, theirs.conv1.weight)


@pytest.mark.parametrize("content, error", [(b"no tensors", BadModel), ({"head.weight": torch.zeros(3)}, BadModel), (None, WrongUsage)])
def test_wrong_files(tmp_path, content, error):
    path = tmp_path/"w.safetensors"
    if isinstance(content, bytes): path.write_bytes(content)
    if isinstance(content, dict): save_file(content, path)
    with pytest.raises(error): build_network("small_resnet", classes=5, size=64, weights=str(path))


def test_no_internet_names_the_other_way(monkeypatch):
    def fail(*args, **options): raise URLError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(CvopsError) as caught: build_network("torchvision:resnet18", classes=5, size=64, weights="DEFAULT")
    assert "download.pytorch.org" in str(caught.value) and "save_file" in caught.value.fix
    with pytest.raises(UnknownName, match="IMAGENET1K_V1"): build_network("torchvision:resnet18", classes=5, size=64, weights="IMAGENET1K_V9")


def test_the_list_is_long(): assert len(list_architectures()) > 60 and np.all([":" not in name for name in list_architectures()])


@pytest.mark.parametrize("name, size, fixed", [("torchvision:alexnet", 64, True), ("torchvision:alexnet", 32, None), ("torchvision:shufflenet_v2_x0_5", 64, False), ("timm:vit_tiny_patch16_224", 64, True), ("timm:resnet18", 64, False)])
def test_how_small_pictures_may_be(name, size, fixed):
    "A training begins with pictures of half the size, where the network takes them; a size that it cannot look at is said."
    if fixed is not None: assert build_network(name, classes=3, size=size).fixed is fixed
    else:
        with pytest.raises(WrongUsage, match="so small"): build_network(name, classes=3, size=size)
