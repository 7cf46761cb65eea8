"""No pickle is ever loaded: not out of a request, not out of a model, its registry or its artifacts, not out of a data set.

Fifty forms, each that makes a folder once it is run (the first test runs them), go in by every door: three covers of a request, two places in a registered version that the service is asked for by its number, one
data set. An audit hook in the serving process tells from inside what it unpickled, executed or started. A sample runs in `make test`; CVOPS_FULL=1 sends all 300.
"""
import base64
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager

import psutil
import pytest
from onnx import TensorProto
from pickle_forms import FORMS, arm
from serve_toy import REPO, make_graph, photograph, register_toy, seal, write_model

from cvops_wb.core.errors import BadModel
from cvops_wb.core.files import dump_json
from cvops_wb.serve import PackageSpec, package, service_running, verify_model
from cvops_wb.serve.protocols.registered import list_registered

FULL = bool(os.environ.get("CVOPS_FULL"))
NAMES = list(FORMS)
JSON, PICKLES = "application/json", ("application/vnd.bentoml+pickle", "application/x-pickle", "application/python-pickle", "application/x-python-serialize", "application/pickle", "application/x-joblib", "application/x-npy",
                                     "application/x-torch", "application/zip", "application/vnd.bentoml+multipart", "application/x-python-pickle", "application/x-parquet")

# What the hook writes: how it came to be there, and each event. What the import of a module runs, Python's own code out of its cache, is not told.
HOOK = '''
import json, os, sys
WATCHED = {"pickle.find_class", "marshal.loads", "marshal.load", "exec", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"}
def is_import():
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"): return True
        frame = frame.f_back
    return False
def hear(event, told):
    if event == "os.mkdir" and os.environ["CVOPS_MARKS"] in str(told[0]) or event in WATCHED and not (event in ("exec", "marshal.loads", "marshal.load") and is_import()):
        os.write(out, (json.dumps([os.getpid(), event, repr(told)[:200]]) + "\\n").encode())
if os.environ.get("CVOPS_AUDIT"):
    out = os.open(os.environ["CVOPS_AUDIT"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(hear)
    os.write(out, (json.dumps([os.getpid(), "hooked", ""]) + "\\n").encode())
'''
LEAKS = '''
import os
if os.environ.get("CVOPS_PLANT"):
    import pickle
    from cvops_wb.serve.service import routes, state
    read, verify = routes.read_upload, state.verify_model
    def unpickle(data):
        try: pickle.loads(data)
        except Exception: pass
    async def read_upload(*told):
        upload = await read(*told)
        unpickle(upload.body)
        return upload
    def verify_model(folder, *told):
        for path in sorted(Path(folder).iterdir()): unpickle(path.read_bytes())
        return verify(folder, *told)
    routes.read_upload, state.verify_model = read_upload, verify_model
'''


# ── what there is to send, and by which door ──

def post(path, body, kind, **headers): return path, body, {"content-type": kind, **headers}
def encode(data): return base64.b64encode(data).decode()
def write_form(data, name): return b'--edge\r\ncontent-disposition: form-data; name="file"; filename="' + name.encode() + b'"\r\n\r\n' + data + b"\r\n--edge--\r\n"
def ask_v2(**more): return json.dumps({"inputs": [{"name": "images", "shape": [1], "datatype": "BYTES", **more}]}).encode()


def attach(data, name, k):
    head = ask_v2(parameters={"binary_data_size": len(data) + 4})
    return post("/v2/models/toy/infer", head + len(data).to_bytes(4, "little") + data, "application/octet-stream", **{"inference-header-content-length": str(len(head))})


# BentoML's runners take an object out of a body whose headers say so (CVE-2024-2912, CVE-2025-32375).
INNER = {"Payload-Container": "DefaultContainer", "Payload-Meta": '{"format": "pickle5", "with_buffer": false}', "Batch-Size": "1", "Args-Number": "1", "Bento-Is-Main": "1"}
COVERS = {
    "its own type": lambda data, name, k: post(("/predict", "/predict/batch", "/explain", "/feedback")[k % 4], data, PICKLES[k % len(PICKLES)]),
    "raw": lambda data, name, k: post("/predict", data, "application/octet-stream"),
    "as a JPEG": lambda data, name, k: post("/explain", data, "image/jpeg"),
    "a form": lambda data, name, k: post("/predict", write_form(data, name), "multipart/form-data; boundary=edge"),
    "JSON": lambda data, name, k: post("/predict", dump_json({"image": encode(data)}).encode(), JSON),
    "a batch": lambda data, name, k: post("/predict/batch", dump_json({"images": [encode(photograph()), encode(data)]}).encode(), JSON),
    "raw, said to be JSON": lambda data, name, k: post("/v2/models/toy/infer", data, JSON),
    "v2, Base64": lambda data, name, k: post("/v2/models/toy/infer", ask_v2(data=[encode(data)]), JSON),
    "v2, binary": attach,
    "v2, pixels": lambda data, name, k: post("/v2/models/toy/infer", ask_v2(shape=[1, 1, len(data)//3, 3], datatype="UINT8", data=list(data[:len(data)//3*3])), JSON),
    "feedback": lambda data, name, k: post("/feedback", dump_json({"request_id": "a", "label": encode(data)[:200]}).encode(), JSON),
    "BentoML's inside": lambda data, name, k: post(("/", "/predict", "/Model", "/Model/predict", "/__call__", "/call")[k % 6], data, PICKLES[k % 2], **INNER),
    "BentoML's inside, as bytes": lambda data, name, k: post("/predict", data, "application/octet-stream", **INNER),
    "a header": lambda data, name, k: post("/predict", photograph(), "image/jpeg", **{"x-camera": encode(data)[:4000], "x-caller": encode(data)[:4000], "cookie": f"session={encode(data)[:4000]}"}),
}


def replace_file(folder, data, file):
    (folder/file).write_bytes(data)
    return seal(folder)


def place_after(folder, data, file):
    "What lies beside what the manifest names."
    sealed = seal(folder)
    (folder/file).write_bytes(data)
    return sealed


def link(folder, data, file):
    (folder.parent/f"{folder.name}.pkl").write_bytes(data)
    (folder/file).unlink()
    (folder/file).symlink_to(folder.parent/f"{folder.name}.pkl")
    return seal(folder)


def point_outside(folder, data, file):
    "A graph that takes a tensor out of the payload's file."
    graph = make_graph()
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", file
    (folder/"model.onnx").write_bytes(graph.SerializeToString())
    return replace_file(folder, data, file)


def write_artifact(folder, data, file):
    "A model of MLflow in the place of ours."
    for path in folder.iterdir(): path.unlink()
    (folder/"MLmodel").write_text(f"flavors:\n  python_function:\n    loader_module: mlflow.sklearn\n    model_path: {file}\n  sklearn:\n    pickled_model: {file}\n    serialization_format: cloudpickle\n")
    (folder/"python_env.yaml").write_text("dependencies: [-r requirements.txt]\n")
    return replace_file(folder, data, file)


PLACES = {      # how, which file, refused whatever it holds
    "the graph": (replace_file, "model.onnx", False), "the card": (replace_file, "model.json", True), "the weights": (replace_file, "weights.safetensors", False), "the reference": (replace_file, "reference.parquet", False),
    "one more file": (replace_file, "model.pkl", True), "one more of a good name": (replace_file, "adapter.safetensors", False), "a stranger": (place_after, "data.pt", True), "the signature": (place_after, "manifest.sig", False),
    "the manifest": (place_after, "manifest.json", True), "a link": (link, "model.onnx", True), "external data": (point_outside, "weights.safetensors", True), "an artifact": (write_artifact, "model.pkl", True),
}


def list_cases():
    "Form, door, and which of the door's ways: six for each form, so that every way meets many forms."
    for k, name in enumerate(NAMES):
        yield from ((name, "request", list(COVERS)[(3*k + j) % len(COVERS)]) for j in range(3))
        yield from ((name, "model", list(PLACES)[(2*k + j) % len(PLACES)]) for j in range(2))
        yield name, "data", ("its own name", "another name")[k % 2]


def sample(cases):
    "One case of each way, with another form each time, and every twenty-third of all."
    ways = [[case for case in cases if case[1:] == way] for way in dict.fromkeys(case[1:] for case in cases)]
    return list(dict.fromkeys([*(found[k % len(found)] for k, found in enumerate(ways)), *cases[::23]]))


CASES = list(list_cases()) if FULL else sample(list(list_cases()))


def test_there_are_three_hundred():
    whole = list(list_cases())
    assert len(whole) == len(set(whole)) == 300 and len(NAMES) == 50 and (len(CASES) == 300 if FULL else 36 <= len(CASES) <= 48)
    assert {way for _, door, way in CASES if door == "request"} == set(COVERS) and {way for _, door, way in CASES if door == "model"} == set(PLACES)


@pytest.mark.parametrize("name", NAMES)
def test_each_would_strike(name, tmp_path):
    "Read as it wants to be read, it makes its folder: a payload that is dead would prove nothing."
    data = arm(name, tmp_path/"struck")
    assert not (tmp_path/"struck").exists()
    FORMS[name][2](data)
    assert (tmp_path/"struck").is_dir()


# ── the service, with the hook inside ──

@pytest.fixture(scope="module")
def marks(bench):
    (bench.root/"marks").mkdir()
    return bench.root/"marks"


def mark(marks, k, name): return marks/f"{k:03}-{name.replace(' ', '-').replace(',', '')}"


@pytest.fixture(scope="module")
def cases(bench, marks):
    "Each case with its bytes; those of models lie in the registry, as versions that passed."
    register_toy(bench.root)
    made, events = [], []
    for k, (name, door, way) in enumerate(CASES):
        data, version = arm(name, mark(marks, k, name)), 100 + k
        made.append((k, name, door, way, data))
        if door != "model": continue
        folder = bench.root/f"data/registry/toy/{version}"
        write_model(folder)
        act, file, _ = PLACES[way]
        sealed = act(folder, data, file)
        events.append({"event": "registered", "name": "toy", "version": version, "model": f"data/registry/toy/{version}", "manifest_sha256": sealed, "passed": True})
    (bench.root/"data/registry/events.jsonl").write_text("".join(f"{dump_json(event, indent=None)}\n" for event in events))
    return made


@pytest.fixture(scope="module")
def watched(bench, cases):
    "The toy as a bento that carries the hook, and the bug, which is asleep."
    source = bench.root/"bentos"/"watched"
    shutil.copytree(REPO/"bentos"/"classifier", source, ignore=shutil.ignore_patterns("built"))
    (source/"sitecustomize.py").write_text(HOOK)
    (source/"bentofile.yaml").write_text((source/"bentofile.yaml").read_text().replace("  - service.py\n", "  - service.py\n  - sitecustomize.py\n"))
    (source/"service.py").write_text((source/"service.py").read_text().replace('"classifier"', '"watched"') + LEAKS)
    return package(register_toy(bench.root), PackageSpec("watched"), bench.reports/"watched.part")


@contextmanager
def serving(bench, marks, bento, name, **more):
    "A service, and the file into which its hook writes."
    audit = bench.root/f"{name}.audit"
    env = {"CVOPS_AUDIT": str(audit), "CVOPS_MARKS": str(marks), "PYTHONPATH": str(bench.root/"bentos"/"watched"), "CVOPS_SERVE_PUBLIC_KEY": "", **more}
    with service_running(bento, bench.root/f"{name}-log", workers=1, output=bench.root/f"{name}.log", env=env) as service: yield service, audit


@pytest.fixture(scope="module")
def service(bench, marks, watched):
    with serving(bench, marks, watched, "watched") as found: yield found


def read_audit(path): return [json.loads(line) for line in path.read_text().splitlines()]


def send(service, path, body, headers):
    request = urllib.request.Request(service.url + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply: return reply.status, reply.read()
    except urllib.error.HTTPError as e: return e.code, e.read()


def put(service, k, name, door, way, data):
    "Status and reply to one case."
    if door == "request": return send(service, *COVERS[way](data, f"model{FORMS[name][0]}", k))
    return send(service, f"/predict?version={100 + k}", photograph(), {"content-type": "image/jpeg"})


def is_well(door, way, status, told):
    "Answered, or refused with a reason; a model that must be refused is."
    told = {} if told[:8] == b"\x89PNG\r\n\x1a\n" else json.loads(told)
    if door == "model": return (status, told.get("reason")) == (503, "damaged_version") or status == 200 and told["label"] == "green" and not PLACES[way][2]
    return status == 200 or 400 <= status < 500 and bool(told.get("reason") or told.get("error"))


def campaign(service, audit, marks, cases):
    "Send all. What was run, what the hook heard meanwhile, what was neither answered nor refused, and the statuses."
    before, statuses, wrong = len(read_audit(audit)), Counter(), []
    for case in cases:
        status, told = put(service, *case)
        statuses[case[2], status] += 1
        if not is_well(case[2], case[3], status, told): wrong.append((case[:4], status, told[:200]))
    return sorted(path.name for path in marks.iterdir()), read_audit(audit)[before:], wrong, statuses


def test_nothing_is_run_by_requests_and_models(service, marks, cases):
    "No folder is made; the hook, which is in the worker, hears of no class that was looked up, no code, no program."
    running, audit = service
    sent = [case for case in cases if case[2] != "data"]
    struck, heard, wrong, statuses = campaign(running, audit, marks, sent)
    hooked = {pid for pid, event, _ in read_audit(audit) if event == "hooked"}
    assert {child.pid for child in psutil.Process(running.process.pid).children()} <= hooked, "the hook is in every process that serves"
    print(f"\n{len(sent)} payloads in requests and models: {dict(statuses)}; {len(struck)} run; {len(heard)} events in {len(hooked)} processes")
    assert (struck, heard, wrong) == ([], [], [])
    assert [event for event in read_audit(audit) if event[1] == "pickle.find_class"] == [], "not at the start either"


def test_a_service_that_unpickles_would_be_found(bench, marks, watched, cases):
    "The planted bug: a handler and a loader that unpickle. The same campaign finds both, by the folders and by the hook."
    with serving(bench, marks, watched, "leaky", CVOPS_PLANT="1") as (running, audit):
        plain = [case for case in cases if case[1].startswith("pickle") and (case[2] == "model" or case[3] in ("raw", "as a JPEG", "BentoML's inside, as bytes"))]
        struck, heard, _, _ = campaign(running, audit, marks, plain)
    for path in marks.iterdir(): path.rmdir()
    doors = {case[2] for case in plain if mark(marks, case[0], case[1]).name in struck}
    assert doors == {"request", "model"} and {"pickle.find_class", "os.mkdir"} <= {event for _, event, _ in heard}


def test_one_port_and_no_service_inside(service, bench):
    "BentoML's own server is not there: one socket on the loopback, one service without others below it, none of BentoML's routes."
    import bentoml
    running, _ = service
    tree = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    ports = {(each.laddr.ip, each.laddr.port) for process in tree for each in process.net_connections("all") if each.status == psutil.CONN_LISTEN}
    assert ports == {("127.0.0.1", int(running.url.rpartition(":")[2]))}
    built = next((bench.root/"bentos"/"watched"/"built").iterdir())
    loaded = bentoml.load(str(built))
    assert (len(loaded.all_services()), loaded.dependencies, loaded.apis) == (1, {}, {}) and type(loaded.to_asgi()).__module__.endswith("serve.service.application")
    data = arm("pickle, protocol 4", bench.root/"inner")
    for path in ("/healthz", "/schema.json", "/docs.json", "/Model", "/call", "/__is_ready__", "/predict/call"):
        assert send(running, path, data, {"content-type": PICKLES[0], **INNER})[0] == 404, path
    assert not (bench.root/"inner").exists()


# ── models and data sets, in the processes that read them ──

READER = '''
import json, sys
from pathlib import Path
from cvops_wb.core.errors import CvopsError
from cvops_wb.data import IngestSpec, ingest
told = {}
def attempt(name, work):
    try: told[name] = work()
    except CvopsError as e: told[name] = type(e).__name__
def take(source, k):
    out = Path(sys.argv[2], str(k)); out.mkdir(parents=True)
    batch = ingest(source, IngestSpec(), out)
    return [batch.count, batch.rejected]
order = json.loads(Path(sys.argv[1]).read_text())
if order.get("leak"):
    import pickle
    from cvops_wb.data import intake
    honest = intake._read
    def read(path, most):
        data = honest(path, most)
        try: pickle.loads(data)
        except Exception: pass
        return data
    intake._read = read
for k, source in enumerate(order["sources"]): attempt(source, lambda: take(source, k))
if order["models"] or order["weights"]:
    from cvops_wb.learn import read_model
    from cvops_wb.learn.networks import build_network, load_weights
    network = build_network("small_resnet", classes=3, size=32)
for path in order["models"]: attempt(path, lambda: bool(read_model(path)))
for path in order["weights"]: attempt(path, lambda: bool(load_weights(network, path)))
print(json.dumps(told))
'''


def read_all(bench, marks, name, **order):
    "Let a process with the hook ingest sources and read models; what came of each, and what the hook heard."
    (bench.root/"hooks").mkdir(exist_ok=True)
    (bench.root/"hooks"/"sitecustomize.py").write_text(HOOK)
    audit, told = bench.root/f"{name}.audit", bench.root/f"{name}.json"
    told.write_text(json.dumps({"models": [], "weights": [], **order}))
    env = {**os.environ, "CVOPS_AUDIT": str(audit), "CVOPS_MARKS": str(marks), "PYTHONPATH": str(bench.root/"hooks")}
    done = subprocess.run([sys.executable, "-c", READER, str(told), str(bench.root/name)], env=env, cwd=bench.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), read_audit(audit)


def lay_out(root, cases):
    "A folder with four photographs and every payload of a data set among them, under its own name or that of a photograph; and each for itself."
    for label, colour in (("tea", "red"), ("cup", "blue")):
        (root/"all"/label).mkdir(parents=True)
        for k in range(2): (root/"all"/label/f"good{k}.jpg").write_bytes(photograph(colour, seed=k))
    for k, name, _, way, data in cases:
        file = f"{k:03}{FORMS[name][0] if way == 'its own name' else '.jpg'}"
        for folder in (root/"all"/("tea", "cup")[k % 2], root/"single"):
            folder.mkdir(exist_ok=True)
            (folder/file).write_bytes(data)
    return [str(root/"all"), *(str(path) for path in sorted((root/"single").iterdir()))]


def test_nothing_is_run_by_data_sets_and_by_learning(bench, marks, cases):
    "Payloads in a folder of photographs, each as a source of its own; versions read as learning reads them; weights that say they are safetensors."
    sources = lay_out(bench.root/"sets", [case for case in cases if case[2] == "data"])
    weights = []
    for k, name, _, _, data in cases:
        if "safetensors" not in name and k % 9: continue
        weights.append(str(bench.root/f"weights-{k}.safetensors"))
        (bench.root/f"weights-{k}.safetensors").write_bytes(data)
    models = [str(bench.root/f"data/registry/toy/{100 + case[0]}") for case in cases if case[2] == "model"]
    told, heard = read_all(bench, marks, "reader", sources=sources, models=models, weights=weights)
    assert len(told) == len(sources) + len(models) + len(weights) and told[sources[0]][0] >= 4, "the photographs are taken in"
    assert all(told[path] != True for path in weights), "what is no safetensors of this network is refused"     # noqa: E712
    print(f"\n{len(sources) - 1} payloads in data sets, {len(models)} models, {len(weights)} files of weights: {dict(Counter(str(v) for v in told.values()).most_common(4))}")
    assert sorted(marks.iterdir()) == [] and [event for event in heard if event[1] not in ("hooked", "exec") and "ldconfig" not in event[2]] == [], "no class looked up, no program but the one that finds libraries"


def test_an_ingest_that_unpickles_would_be_found(bench, marks, cases):
    "The planted bug: a reader of files that unpickles first."
    sources = lay_out(bench.root/"planted", [(0, "pickle of os.system", "data", "another name", arm("pickle of os.system", marks/"planted"))])
    _, heard = read_all(bench, marks, "leaking", sources=sources, leak=True)
    assert [path.name for path in marks.iterdir()] == ["planted"] and {"pickle.find_class", "os.system"} <= {event for _, event, _ in heard}
    (marks/"planted").rmdir()


@pytest.mark.parametrize("name", ["pickle, protocol 0", "pickle, protocol 5", "torch, old", "zip"])
def test_a_payload_among_the_events(name, tmp_path):
    "Lines of the registry that are no events are passed over; those around them count."
    (tmp_path/"data/registry").mkdir(parents=True)
    event = json.dumps({"event": "registered", "name": "toy", "version": 3, "model": "m", "manifest_sha256": "0", "passed": True}).encode()
    (tmp_path/"data/registry/events.jsonl").write_bytes(arm(name, tmp_path/"struck") + b"\n" + event + b"\n")
    assert list(list_registered(tmp_path, "toy")) == [3] and not (tmp_path/"struck").exists()


@pytest.mark.parametrize("place", [name for name, (*_, refused) in PLACES.items() if refused])
def test_a_place_that_is_always_refused(place, tmp_path, marks):
    "Links, external data, strangers, other kinds of model: whatever the payload."
    act, file, _ = PLACES[place]
    write_model(tmp_path/"model")
    sealed = act(tmp_path/"model", arm("pickle, protocol 4", tmp_path/"struck"), file)
    with pytest.raises(BadModel): verify_model(tmp_path/"model", sealed)
    assert not (tmp_path/"struck").exists()
