"What is not what the manifest says is refused, and named; what was verified is what runs."
import json

import numpy as np
import pytest
from onnx import TensorProto, helper
from serve_toy import make_graph, photograph, seal, write_model

from cvops_wb.core.errors import BadModel
from cvops_wb.serve import verify_model
from cvops_wb.serve.inference import Classifier

FILES = ("manifest.json", "model.json", "model.onnx", "reference.parquet", "weights.safetensors")


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path/"model")
    return tmp_path/"model"


def refusal(folder, **options) -> str:
    "What the refusal says."
    with pytest.raises(BadModel) as error: verify_model(folder, **options)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_and_cuts_are_named(model, name):
    rng, good, identity = np.random.default_rng(0), (model/name).read_bytes(), verify_model(model).manifest_sha256
    for k in range(40):
        bad = bytearray(good)
        bad[rng.integers(len(good))] ^= 1 << rng.integers(8)
        (model/name).write_bytes(bytes(bad) if k % 5 else good[:rng.integers(len(good))])
        said = refusal(model, expected=identity)
        assert name in said, said
    (model/name).write_bytes(good)
    verify_model(model, identity)


def test_a_manifest_that_matches_other_files_is_not_the_one_that_was_recorded(model):
    identity = verify_model(model).manifest_sha256
    write_model(model, temperature=2.)
    verify_model(model)
    assert "manifest.json" in refusal(model, expected=identity)


@pytest.mark.parametrize("name", ["extra.onnx", "model.pkl", "notes.txt", "model.onnx.data"])
def test_a_stranger_in_the_folder(model, name):
    (model/name).write_bytes(b"anything")
    assert name in refusal(model)


@pytest.mark.parametrize("name", ["model.pkl", "weights.pt", "a.joblib", "a.npy", "../model.onnx", "sub/model.onnx", ".hidden.json", "model.onnx\n"])
def test_a_manifest_cannot_name_a_pickle_or_another_folder(model, name):
    manifest = json.loads((model/"manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["model.onnx"]
    (model/"manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json" in refusal(model)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2, "files": {}}', '{"schema": 1, "files": []}', '{"schema": 1, "files": {}}', "\udc80", "["*5000])
def test_a_manifest_that_is_none(model, text):
    (model/"manifest.json").write_text(text, errors="surrogateescape")
    assert "manifest.json" in refusal(model)


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "manifest.json"])
def test_links_and_pipes_are_not_followed(model, tmp_path, name):
    (model/name).rename(tmp_path/"elsewhere")
    (model/name).symlink_to(tmp_path/"elsewhere")
    assert name in refusal(model)
    (model/name).unlink()
    assert name in refusal(model)
    (model/name).mkdir()
    assert name in refusal(model)


@pytest.mark.parametrize("card", [{"classes": ["one"]}, {"classes": ["a", "a"]}, {"classes": "abc"}, {"classes": [1, 2, 3]}, {"size": 0}, {"size": "32"}, {"temperature": 0},
                                  {"temperature": None}, {"temperature": float("nan")}])
def test_a_card_that_cannot_be_served(tmp_path, card):
    write_model(tmp_path/"m", **card)
    assert "model.json" in refusal(tmp_path/"m")


def external(tensor):
    "The same tensor, with its values elsewhere."
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../etc/passwd")
    return tensor


def in_an_initializer(graph): external(graph.graph.initializer[0])


def in_a_branch(graph):
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=external(make_graph().graph.initializer[0]))], "then", [], [])
    graph.graph.node.append(helper.make_node("If", ["cond"], ["y"], then_branch=branch, else_branch=branch))


def in_a_function(graph):
    node = helper.make_node("Constant", [], ["c"], value=external(make_graph().graph.initializer[0]))
    graph.functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))


def in_a_sparse_tensor(graph):
    sparse = graph.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external(make_graph().graph.initializer[0]))


def location_alone(graph): graph.graph.initializer[0].external_data.add(key="location", value="x")


@pytest.mark.parametrize("plant", [in_an_initializer, in_a_branch, in_a_function, in_a_sparse_tensor, location_alone])
def test_external_data_is_refused_wherever_it_hides(tmp_path, plant):
    graph = make_graph()
    plant(graph)
    write_model(tmp_path/"m", graph)
    assert "external data" in refusal(tmp_path/"m")


@pytest.mark.parametrize("data", [b"", b"\x80\x04\x95pickle.", b"PK\x03\x04zip", b"\x00\x00\x00\x00ORTM" + bytes(40), b"\x08\x08", b"\x3a\x02\x2a\x09" + bytes(4), b"\x3a\x02\x28\x01"])
def test_bytes_that_are_no_onnx(model, data):
    (model/"model.onnx").write_bytes(data)
    seal(model)
    assert "model.onnx" in refusal(model)


@pytest.mark.parametrize("card", [{"classes": ["a", "b"]}, {"size": 16}])
def test_a_graph_that_breaks_the_contract(tmp_path, card):
    write_model(tmp_path/"m", **card)
    with pytest.raises(BadModel, match="model.onnx"): Classifier(verify_model(tmp_path/"m"))


def test_what_was_verified_is_what_runs(model):
    verified = verify_model(model)
    for path in model.iterdir(): path.write_bytes(b"changed after the check")
    assert Classifier(verified).predict(photograph("blue")).label == "blue"
