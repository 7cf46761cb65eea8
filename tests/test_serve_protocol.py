"The Open Inference Protocol, spoken by Triton's own client and by hand, and versions that are called by number."
import base64
import gzip
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_toy import photograph, register_toy, write_model

from cvops_wb.core.files import dump_json
from cvops_wb.serve import Client, service_running

triton = pytest.importorskip("tritonclient.http")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service(bench, bento):
    "The toy as version 1, and beside it a version 2 that says the opposite, a version 3 that was damaged, and one that the gate refused."
    second = register_toy(bench.root, 2)
    folder = bench.root/second.model
    write_model(folder, classes=["red", "green", "blue"])
    manifest = write_model(folder, classes=["other-" + name for name in ("red", "green", "blue")])
    shutil.copytree(folder, bench.root/"data/registry/toy/3", dirs_exist_ok=True)
    (bench.root/"data/registry/toy/3/model.onnx").write_bytes(b"spoilt")
    events = [{"event": "registered", "name": "toy", "version": number, "model": where, "manifest_sha256": manifest, "passed": passed}
              for number, where, passed in ((2, second.model, True), (3, "data/registry/toy/3", True), (4, second.model, False))]
    (bench.root/"data/registry/events.jsonl").write_text("".join(dump_json(e, indent=None) + "\n" for e in events))
    with service_running(bento, bench.root/"log", workers=1, output=bench.root/"service.log") as service: yield service


@pytest.fixture(scope="module")
def client(service):
    with triton.InferenceServerClient(service.url.removeprefix("http://")) as client: yield client


def call(service, path, body=None, headers=None, method=None):
    "Status, headers, body."
    request = urllib.request.Request(service.url + path, data=body, headers=headers or {}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply: return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as e: return e.code, e.headers, e.read()


def put_files(*files, name="image"):
    made = triton.InferInput(name, [len(files)], "BYTES")
    made.set_data_from_numpy(np.array(files, object))
    return made


def test_a_client_of_triton_asks_who_is_there(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("toy") and client.is_model_ready("toy", "1")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    about = client.get_model_metadata("toy")
    assert about["name"] == "toy" and about["versions"] == ["1", "2", "3"] and {t["name"] for t in about["outputs"]} == {"label", "confidence", "scores", "embedding"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_files_by_a_client_of_triton(client, service, kind):
    "Three files in one request, as length-prefixed bytes; the answers are those of /predict."
    files = [photograph(colour, kind) for colour in ("red", "green", "blue")]
    result = client.infer("toy", [put_files(*files)], request_id="mine")
    with Client(service.url) as ours: known = [ours.predict(data) for data in files]
    assert [text.decode() for text in result.as_numpy("label")] == [answer["label"] for answer in known]
    np.testing.assert_allclose(result.as_numpy("scores"), [list(answer["scores"].values()) for answer in known], atol=1e-6)
    assert result.get_response()["id"] == "mine" and result.get_response()["model_version"] == "1"


@pytest.mark.parametrize("datatype, batch, binary", [("UINT8", True, True), ("UINT8", False, True), ("FP32", True, True), ("UINT8", True, False), ("FP32", False, False)])
def test_pixels_by_a_client_of_triton(client, service, datatype, batch, binary):
    "As bytes or in the JSON, one image or several; the answer is that of the same pixels in a PNG."
    pixels = np.asarray(Image.open(BytesIO(photograph("green", size=(40, 30)))).convert("RGB"))
    values = pixels if datatype == "UINT8" else (pixels/255).astype(np.float32)
    values = values[None].repeat(2, 0) if batch else values
    made = triton.InferInput("images", values.shape, datatype)
    made.set_data_from_numpy(np.ascontiguousarray(values), binary_data=binary)
    result = client.infer("toy", [made], outputs=[triton.InferRequestedOutput("label", binary_data=binary), triton.InferRequestedOutput("confidence", binary_data=binary)])
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    with Client(service.url) as ours: known = ours.predict(out.getvalue())
    said = [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("label")]
    assert said == [known["label"]]*len(said) and len(said) == 1 + batch and result.as_numpy("scores") is None
    np.testing.assert_allclose(result.as_numpy("confidence"), known["confidence"], atol=1e-5)


def test_a_version_by_its_number(client, service):
    "By the protocol and by `?version=`; the log says who answered."
    data = photograph("green")
    labels = {version: client.infer("toy", [put_files(data)], model_version=version).as_numpy("label")[0].decode() for version in ("1", "2")}
    assert labels["2"] == f"other-{labels['1']}"
    status, _, body = call(service, "/predict?version=2", data, {"content-type": "image/jpeg"})
    assert status == 200 and json.loads(body)["version"] == 2 and json.loads(body)["label"] == labels["2"]
    assert json.loads(call(service, "/v1/models")[2])["versions"] == [1, 2, 3]


@pytest.mark.parametrize("path, status, reason", [
    ("/v2/models/toy/versions/9", 404, "no_version"), ("/v2/models/toy/versions/4/ready", 404, "no_version"), ("/v2/models/else", 404, "no_model"),
    ("/v2/models/toy/versions/x", 404, "no_route"), ("/v2/nothing", 404, "no_route"), ("/v2/models/..%2f..%2fetc", 404, "no_route"),
])
def test_what_is_not_there(service, path, status, reason):
    code, _, body = call(service, path)
    assert (code, json.loads(body)["reason"]) == (status, reason) and json.loads(body)["error"]


@pytest.mark.parametrize("version, status", [("9", 404), ("-1", 400), ("two", 400), ("4", 404)])
def test_versions_that_cannot_be_called(service, version, status):
    assert call(service, f"/predict?version={version}", photograph(), {"content-type": "image/jpeg"})[0] == status


def test_a_damaged_version_answers_nobody(service):
    "Its files are not what the manifest says: an error that names no path, and the packaged version goes on."
    code, _, body = call(service, "/predict?version=3", photograph(), {"content-type": "image/jpeg"})
    assert (code, json.loads(body)["reason"]) == (503, "damaged_version") and "registry" not in body.decode() and call(service, "/predict", photograph(), {"content-type": "image/jpeg"})[0] == 200


IMAGE = base64.b64encode(photograph()).decode()


@pytest.mark.parametrize("body, headers, reason", [
    (b"{", {}, "bad_json"), (b"[]", {}, "bad_tensor"), (b'{"inputs": []}', {}, "bad_tensor"), (b'{"inputs": [3]}', {}, "bad_tensor"), (b"[" * 100_000, {}, "bad_json"),
    ({"datatype": "BYTES", "shape": [2], "data": [IMAGE]}, {}, "bad_tensor"), ({"datatype": "BYTES", "shape": [1], "data": ["no base64!"]}, {}, "bad_tensor"),
    ({"datatype": "BYTES", "shape": [1], "data": [7]}, {}, "bad_tensor"), ({"datatype": "BYTES", "shape": [1], "data": ["AAAA"]}, {}, "not_an_image"),
    ({"datatype": "BYTES", "shape": [40], "data": [IMAGE]*40}, {}, "too_many_images"), ({"datatype": "BYTES", "shape": [0], "data": []}, {}, "too_many_images"),
    ({"datatype": "INT64", "shape": [1, 1, 3], "data": [1, 2, 3]}, {}, "bad_tensor"), ({"datatype": "UINT8", "shape": [1, 1, 3], "data": [1, 2]}, {}, "bad_tensor"),
    ({"datatype": "UINT8", "shape": [1, 1, 3], "data": [1, 2, 900]}, {}, "bad_tensor"), ({"datatype": "UINT8", "shape": [-1, 1, 3], "data": [1, 2, 3]}, {}, "bad_tensor"),
    ({"datatype": "UINT8", "shape": [1, 1, 4], "data": [1, 2, 3, 4]}, {}, "bad_tensor"), ({"datatype": "FP32", "shape": [1, 1, 3], "data": [1, 2, 3]}, {}, "bad_tensor"),
    ({"datatype": "FP32", "shape": [1, 1, 3], "data": ["a", None, 3]}, {}, "bad_tensor"), ({"datatype": "FP32", "shape": [1, 1, 3], "data": [float("nan")]*3}, {}, "bad_tensor"),
    ({"datatype": "UINT8", "shape": [99999, 99999, 3], "data": []}, {}, "bad_tensor"), ({"datatype": "UINT8", "shape": "3", "data": []}, {}, "bad_tensor"),
    ({"datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 99}}, {}, "bad_tensor"), ({"datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": -1}}, {}, "bad_tensor"),
    (b'{"inputs": [{}]}', {"inference-header-content-length": "9999"}, "bad_tensor"), (b'{"inputs": [{}]}', {"inference-header-content-length": "x"}, "bad_tensor"),
])
def test_requests_that_make_no_sense(service, body, headers, reason):
    "Each is refused with its reason; none is the service's fault."
    if isinstance(body, dict): body = json.dumps({"inputs": [{"name": "image", **body}]}).encode()
    status, _, told = call(service, "/v2/models/toy/infer", body, {**JSON, **headers})
    assert 400 <= status < 500 and json.loads(told)["reason"] == reason, told


def test_outputs_that_nobody_knows(service):
    body = json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [IMAGE]}], "outputs": [{"name": "colour"}]}).encode()
    status, _, told = call(service, "/v2/models/toy/infer", body, JSON)
    assert status == 400 and "label, confidence" in json.loads(told)["error"]


def test_every_image_of_a_request_is_in_the_log(client, bench):
    from cvops_wb.serve.predictions import read_predictions
    client.infer("toy", [put_files(*[photograph("blue", seed=k) for k in range(3)])], headers={"x-request-id": "three", "x-camera": "north"})
    rows = read_predictions(bench.root/"log")
    ours = rows[rows["request_id"].str.startswith("three")]
    assert sorted(ours["request_id"]) == ["three", "three.1", "three.2"] and set(ours["camera"]) == {"north"} and ours["embedding"].map(len).gt(0).all()


PEERS = Path(__file__).parents[1]/".cvops"/"peers"


def find_peer(name, program):
    "A program of a client that has an environment of its own."
    path = Path(os.environ.get(name.upper()) or PEERS/name/"bin"/program)
    return path if path.is_file() else pytest.skip(f"{name} has an environment of its own: make bench-peers, or {name.upper()}=…/bin/{program}")


@pytest.mark.parametrize("binary, batch", [(False, 1), (True, 4)])
def test_mlservers_own_client(service, tmp_path, binary, batch):
    "`mlserver infer` reads a file of requests and writes one of replies: pixels, in JSON or binary, one by one or four requests in one."
    program, pixels = find_peer("mlserver", "mlserver"), {colour: np.full((1, 6, 8, 3), 0, np.uint8) for colour in ("red", "green", "blue")}
    for k, colour in enumerate(pixels): pixels[colour][..., k] = 220
    order = [("red", "green", "blue")[k % 3] for k in range(9)]
    lines = [json.dumps({"id": str(k), "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 6, 8, 3], "data": pixels[colour].ravel().tolist()}]}) for k, colour in enumerate(order)]
    (tmp_path/"in.json").write_text("\n".join(lines) + "\n")
    done = subprocess.run([program, "infer", "-u", service.url.removeprefix("http://"), "-m", "toy", "-i", tmp_path/"in.json", "-o", tmp_path/"out.json", "-s", str(batch), *(["-b"] if binary else [])],
                          capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    replies = [json.loads(line) for line in (tmp_path/"out.json").read_text().splitlines()]
    said = {int(reply["id"]): next(each["data"][0] for each in reply["outputs"] if each["name"] == "label") for reply in replies}
    assert said == dict(enumerate(order)), done.stderr[-800:]


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
url, data = sys.argv[1], open(sys.argv[2], "rb").read()

async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    alive = [await client.is_server_live(url), await client.is_server_ready(url), await client.is_model_ready(url, "toy")]
    def put(binary):
        pixels = InferInput("images", [2, 6, 8, 3], "UINT8")
        pixels.set_data_from_numpy(np.stack([np.full((6, 8, 3), (210, 40, 30), np.uint8), np.full((6, 8, 3), (30, 50, 220), np.uint8)]), binary_data=binary)
        return pixels
    file = InferInput("image", [1], "BYTES")
    file.set_data_from_numpy(np.array([data], object), binary_data=True)
    replies = [await client.infer(url, InferRequest(infer_inputs=[each], model_name="toy", request_id="theirs"), model_name="toy") for each in (put(True), put(False), file)]
    print(json.dumps({"alive": alive, "ids": [reply.id for reply in replies], "labels": [[str(label.decode() if isinstance(label, bytes) else label) for label in next(each for each in reply.outputs if each.name == "label").as_numpy()] for reply in replies]}))

asyncio.run(main())
"""


def test_kserves_own_client(service, tmp_path):
    "`InferenceRESTClient` asks who is there, and sends pixels, binary and in JSON, and files."
    program = find_peer("kserve", "python")
    (tmp_path/"photo").write_bytes(photograph("green"))
    done = subprocess.run([program, "-c", KSERVE, service.url, tmp_path/"photo"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"alive": [True]*3, "ids": ["theirs"]*3, "labels": [["red", "blue"], ["red", "blue"], ["green"]]}


def test_a_compressed_request_is_refused_with_a_word(service):
    "Nothing unpacks what a stranger has packed."
    body = gzip.compress(json.dumps({"inputs": []}).encode())
    assert call(service, "/v2/models/toy/infer", body, {**JSON, "content-encoding": "gzip"})[0] == 400
