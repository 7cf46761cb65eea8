"A toy model that knows three colours, as a sealed folder, a registered version, and a packaged service: for the tests of `serve`."
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from cvops_wb.core.records import ModelVersion
from cvops_wb.core.settings import load_settings

REPO = Path(__file__).parents[1]
CLASSES = ("red", "green", "blue")
COLOURS = {"red": (210, 40, 30), "green": (30, 200, 50), "blue": (30, 50, 220)}


def make_graph(size: int = 32):
    "Mean colour → three logits; the embedding is the mean colour."
    values = {"w": np.eye(3, dtype=np.float32)*8, "scale": np.array(1/255, np.float32)}
    nodes = [helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
             helper.make_node("Mul", ["mean", "scale"], ["embedding"]), helper.make_node("MatMul", ["embedding", "w"], ["logits"])]
    ends = [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", size, size, 3]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3]), helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", 3])]
    graph = helper.make_graph(nodes, "colours", ends[:1], ends[1:], [numpy_helper.from_array(value, name) for name, value in values.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def seal(folder: Path) -> str:
    "Write the manifest over what is there; returns its hash."
    files = {f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "size": f.stat().st_size}
             for f in sorted(folder.iterdir()) if f.name != "manifest.json"}
    (folder/"manifest.json").write_text(json.dumps({"schema": 1, "files": files}))
    return hashlib.sha256((folder/"manifest.json").read_bytes()).hexdigest()


def write_model(folder: Path, graph=None, **card) -> str:
    "The files of a model; returns the hash of the manifest."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"model.onnx").write_bytes((graph or make_graph()).SerializeToString())
    (folder/"model.json").write_text(json.dumps({"schema": 1, "classes": list(CLASSES), "size": 32, "temperature": 1., **card}))
    (folder/"weights.safetensors").write_bytes(b"weights"*99)
    (folder/"reference.parquet").write_bytes(b"PAR1reference")
    return seal(folder)


def register_toy(root: Path, number: int = 1) -> ModelVersion:
    "A version in a workbench's registry."
    name = f"data/registry/toy/{number}"
    return ModelVersion("toy", number, "champion", name, write_model(root/name), [], True)


def photograph(colour: str = "green", kind: str = "JPEG", size: tuple[int, int] = (160, 120), seed: int = 0) -> bytes:
    "The bytes of a noisy image of one colour."
    pixels = np.random.default_rng(seed).normal(COLOURS[colour], 25, (size[1], size[0], 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def bench():
    "A workbench with a registered toy and the code of the service: CVOPS_ROOT points to it."
    with tempfile.TemporaryDirectory(prefix="cvops-serve-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        shutil.copy(REPO/"settings.ini", root)
        shutil.copytree(REPO/"bentos"/"classifier", root/"bentos"/"classifier", ignore=shutil.ignore_patterns("built"))
        patch.setenv("CVOPS_ROOT", folder)
        for name in ("CVOPS_TOKEN", "CVOPS_TOKEN_FILE", "CVOPS_PART"): patch.delenv(name, raising=False)
        yield load_settings(root)


@pytest.fixture(scope="module")
def bento(bench):
    "The toy as a built bento."
    from cvops_wb.serve import PackageSpec, package
    return package(register_toy(bench.root), PackageSpec(), bench.reports/"package.part")
