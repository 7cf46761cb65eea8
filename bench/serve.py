"""The service beside a bare loop of decode and ONNX Runtime, and beside FastAPI, plain BentoML, LitServe, MLServer and `mlflow models serve`.

    python bench/serve.py [--quick] [--json FILE] [--rounds N] [--seconds S] [--parts resnet18 null ready predict] [--peers NAME …]

Each server has the first core to itself and the caller the last one; every other server is stopped (SIGSTOP) meanwhile. All use the ONNX file and
the decode of bench/serving/engine.py, in environments of their own (`make bench-peers`). `one client` is an open loop at half of what the bare
loop can do: latency counts from the scheduled time. `eight clients` ask again at once. Ours has metrics, the prediction log, image statistics, and a
rollout with 5 % canary on. One round asks all of them one after another; figures are over all rounds. `ready` is from the command to the first answer.
"""
import argparse
import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO/"tests")]
PEERS, SERVING = REPO/".cvops"/"peers", REPO/"bench"/"serving"
FIRST, LAST = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
NAMES = ["fastapi", "bentoml", "litserve", "mlserver", "mlflow"]
OURS, CLIENTS = "cvops", 8
PARTS = ["resnet18", "null", "ready", "predict"]


def find_port() -> int:
    "One that is free at this moment."
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def pinned(core):
    "What is started here runs on that core, and its children."
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core} if core is not None else before)
    try: yield
    finally: os.sched_setaffinity(0, before)


# ── models and photographs ──

def make_models(folder: Path) -> dict[str, Path]:
    "ResNet-18 at 224 px with 1,000 classes, and a null model, as ONNX files."
    from resnet import make_resnet18
    from serve_toy import make_graph
    found = {"resnet18": (make_resnet18(), 1000, 224), "null": (make_graph(), 3, 32)}
    for name, (graph, count, size) in found.items():
        (folder/f"{name}.onnx").write_bytes(graph.SerializeToString())
        (folder/f"{name}.json").write_text(json.dumps({"classes": [f"class {k}" for k in range(count)], "size": size}))
    return {name: folder/f"{name}.onnx" for name in found}


def make_photos(folder: Path) -> list[bytes]:
    "Sixteen photographs of the synthetic warehouse, JPEG of about 30 KB."
    from cvops_wb.data import WarehouseSpec, make_warehouse
    make_warehouse(folder/"made", WarehouseSpec(count=24, broken=0.))
    (folder/"photos").mkdir()
    for number, path in enumerate(sorted((folder/"made").rglob("*.jpg"))[:16]): shutil.copy(path, folder/"photos"/f"{number:02}.jpg")
    return [path.read_bytes() for path in sorted((folder/"photos").iterdir())]


# ── the servers ──

def make_command(name: str, port: int, onnx: Path, folder: Path) -> list[str]:
    "How a peer is started."
    bin = PEERS/name/"bin"
    if name == "fastapi": return [bin/"python", "-m", "uvicorn", "with_fastapi:app", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    if name == "bentoml": return [bin/"bentoml", "serve", "with_bentoml:Plain", "--host", "127.0.0.1", "--port", str(port), "--working-dir", str(SERVING)]
    if name == "litserve": return [bin/"python", "with_litserve.py", str(port)]
    if name == "mlserver":
        place = folder/f"mlserver-{onnx.stem}"
        place.mkdir(exist_ok=True)
        (place/"settings.json").write_text(json.dumps({"parallel_workers": 0, "http_port": port, "grpc_port": find_port(), "metrics_port": find_port(), "host": "127.0.0.1", "debug": False}))
        (place/"model-settings.json").write_text(json.dumps({"name": "plain", "implementation": "with_mlserver.Plain"}))
        return [bin/"mlserver", "start", str(place)]
    place = folder/f"mlflow-{onnx.stem}"
    if not place.exists():
        code = "import mlflow, sys; mlflow.pyfunc.save_model(sys.argv[1], python_model=sys.argv[2], pip_requirements=[])"
        subprocess.run([bin/"python", "-c", code, place, SERVING/"with_mlflow.py"], check=True, capture_output=True, env=make_environment(name, onnx), cwd=SERVING)
    return [bin/"mlflow", "models", "serve", "-m", str(place), "--env-manager", "local", "--port", str(port), "--host", "127.0.0.1", "--workers", "1"]


def make_environment(name: str, onnx: Path) -> dict[str, str]:
    "Quiet, and with the engine in reach."
    return {**os.environ, "BENCH_ONNX": str(onnx), "PYTHONPATH": str(SERVING), "BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1",
            "PATH": f"{PEERS/name/'bin'}{os.pathsep}{os.environ['PATH']}", "MLFLOW_TRACKING_URI": "sqlite:///:memory:"}


def make_requests(name: str, photos: list[bytes]) -> list[bytes]:
    "A peer's own way of taking an image."
    from open_loop import make_request
    texts = [base64.b64encode(photo).decode() for photo in photos]
    forms = {"litserve": ("/predict", lambda text: {"image": text}), "mlflow": ("/invocations", lambda text: {"dataframe_split": {"columns": ["image"], "data": [[text]]}}),
             "mlserver": ("/v2/models/plain/infer", lambda text: {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}]})}
    if name in forms: return [make_request(forms[name][0], json.dumps(forms[name][1](text)).encode(), "application/json") for text in texts]
    return [make_request("/predict", photo, "image/jpeg" if name == OURS else "application/octet-stream") for photo in photos]


def read_label(name: str, body: bytes) -> str:
    "What a peer said."
    value = json.loads(body)
    if name == "mlserver": value = json.loads(value["outputs"][0]["data"][0])
    return (value["predictions"][0] if name == "mlflow" else value)["label"]


class Server:
    "One that runs, and can be stopped while others are asked."

    def __init__(self, name: str, port: int, process: subprocess.Popen, ready_s: float, photos: list[bytes]):
        self.name, self.port, self.process, self.ready_s, self.requests = name, port, process, ready_s, make_requests(name, photos)
        self.waits, self.rates = [], []

    def hold(self): os.killpg(self.process.pid, signal.SIGSTOP)
    def go(self): os.killpg(self.process.pid, signal.SIGCONT)

    def read_labels(self) -> list[str]:
        from open_loop import Wire
        wire, found = Wire(self.port), []
        for request in self.requests:
            status, _, body = wire.ask(request)
            if status != 200: raise SystemExit(f"{self.name} answers {status}: {body[:300]!r}")
            found.append(read_label(self.name, body))
        wire.close()
        return found

    def measure(self, rate: float, seconds: float) -> None:
        "One round."
        from open_loop import Load, ask_at
        self.go()
        try:
            ask_at(self.port, self.requests, rate, min(1., seconds/4))
            self.waits += ask_at(self.port, self.requests, rate, seconds)
            self.rates.append(asyncio.run(Load(self.port, self.requests).saturate(CLIENTS, seconds)))
        finally: self.hold()


def wait_for(server: Server, begin: float, patience: float = 120.) -> float:
    "Seconds from the command to the first answer."
    from open_loop import Wire
    while True:
        try:
            wire = Wire(server.port)
            if wire.ask(server.requests[0])[0] == 200: return time.perf_counter() - begin
        except (OSError, ConnectionError): pass
        if server.process.poll() is not None or time.perf_counter() - begin > patience: raise SystemExit(f"{server.name} did not start: status {server.process.returncode}")
        time.sleep(.02)


@contextmanager
def serving(name: str, onnx: Path, folder: Path, photos: list[bytes], core):
    "A server, ready; whatever happens it ends."
    start = start_ours if name == OURS else start_peer
    with start(name, onnx, folder, core) as (port, process, begin):
        server = Server(name, port, process, 0., photos)
        server.ready_s = wait_for(server, begin)
        try: yield server
        finally: server.go()


@contextmanager
def start_peer(name, onnx, folder, core):
    port = find_port()
    command, log = make_command(name, port, onnx, folder), folder/f"{name}-{onnx.stem}.log"
    with pinned(core), open(log, "wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=SERVING, env=make_environment(name, onnx), start_new_session=True)
    try: yield port, process, begin
    except SystemExit:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired: pass
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass


def make_workbench(onnx: Path, root: Path):
    "Two registered versions of one graph, the first packaged; the bento and both arms of a rollout."
    from serve_toy import register_toy, write_model

    from cvops_wb.core.settings import load_settings
    from cvops_wb.serve import PackageSpec, package
    from cvops_wb.serve.rollouts.states import Arm
    (root/"bentos").mkdir(parents=True)
    shutil.copy(REPO/"settings.ini", root)
    shutil.copytree(REPO/"bentos"/"classifier", root/"bentos"/"classifier", ignore=shutil.ignore_patterns("built"))
    os.environ["CVOPS_ROOT"] = str(root)
    import onnx as library
    card, graph, arms = json.loads(onnx.with_suffix(".json").read_text()), library.load(onnx), []
    for number in (1, 2):
        version = register_toy(root, number)
        arms.append(Arm(number, version.model, write_model(root/version.model, graph, **card, number=number)))
    first = replace(version, version=1, model=arms[0].model, manifest_sha256=arms[0].manifest_sha256)
    return package(first, PackageSpec(), load_settings(root).reports/"package.part"), arms


@contextmanager
def start_ours(name, onnx, folder, core, canary=True):
    from cvops_wb.core.settings import load_settings
    from cvops_wb.serve import RolloutFile
    root = folder/f"workbench-{onnx.stem}"
    if not root.exists(): BENTOS[root] = make_workbench(onnx, root)
    bento, arms = BENTOS[root]
    os.environ["CVOPS_ROOT"] = str(root)
    file, ended = RolloutFile(load_settings(root).store/"rollout"), threading.Event()
    file.abort("anew")
    if canary: file.start(*arms, "bench", (.05, .5))

    def renew():
        while not ended.wait(4): file.renew("bench")
    threading.Thread(target=renew, daemon=True).start()
    port, log = find_port(), folder/f"ours-{onnx.stem}.log"
    order = {"bento": bento.to_dict(), "port": port, "workers": None, "log": str(root/"log")}
    with pinned(core), open(log, "wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", "import sys; from cvops_wb.serve.launching import obey; obey(sys.argv[1])", json.dumps(order)], stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    try: yield port, process, begin
    except SystemExit:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        ended.set()
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(45)


BENTOS = {}


# ── the measures ──

def run_bare(onnx: Path, photos: Path, rate: float, seconds: float) -> dict:
    "The bare loop on the first core, in the environment of FastAPI."
    with pinned(FIRST):
        done = subprocess.run([PEERS/"fastapi"/"bin"/"python", SERVING/"bare.py", str(rate), str(seconds), photos], capture_output=True, text=True, env=make_environment("fastapi", onnx), check=True)
    return json.loads(done.stdout)


def compare(model: str, onnx: Path, names: list[str], folder: Path, photos: list[bytes], rounds: int, seconds: float, rate: float = 0.) -> dict:
    "All servers and the bare loop in rounds: latencies of one client, answers a second of eight, time until ready."
    bare = {"waits": [], "rates": []}
    first = run_bare(onnx, folder/"photos", 0, 2.)
    rate = rate or .5*len(first["waits"])/first["seconds"]
    with ExitStack() as stack:
        servers = []
        for name in [OURS, *names]:
            server = stack.enter_context(serving(name, onnx, folder, photos, FIRST))
            said = server.read_labels()
            wanted = first["labels"]
            if said != wanted: raise SystemExit(f"{name} does not answer as the bare loop: {said[:4]} {wanted[:4]}")
            server.hold()
            servers.append(server)
            print(f"  {model}: {name} ready after {server.ready_s:.1f} s", file=sys.stderr, flush=True)
        for number in range(rounds):
            bare["waits"] += run_bare(onnx, folder/"photos", rate, seconds)["waits"]
            found = run_bare(onnx, folder/"photos", 0, seconds)
            bare["rates"].append(len(found["waits"])/found["seconds"])
            for server in servers[number % len(servers):] + servers[:number % len(servers)]: server.measure(rate, seconds)
            print(f"  {model}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        found = {server.name: {"waits": server.waits, "rates": server.rates, "ready": server.ready_s} for server in servers}
    return {"rate": rate, "bare": bare, **found}


def sum_up(found: dict) -> dict[str, dict[str, float]]:
    "p50 and p99 in milliseconds, answers a second."
    return {name: {"p50": float(np.percentile(part["waits"], 50))*1e3, "p99": float(np.percentile(part["waits"], 99))*1e3, "rate": statistics.median(part["rates"])}
            for name, part in found.items() if name != "rate"}


def to_rows(model: str, found: dict) -> list[dict]:
    "The measures against the bare loop, and against each peer."
    told, rows = sum_up(found), []
    ours, bare, runs = told[OURS], told["bare"], len(found["bare"]["rates"])
    number = f"{len(found[OURS]['waits'])} requests at {found['rate']:.1f} a second"

    def row(measure, ours, peer, name, ratio, goal, met, note=""):
        rows.append({"measure": f"{model}: {measure}", "ours": round(ours, 3), "peer": round(peer, 3), "peer_name": name, "ratio": round(ratio, 3), "goal": goal, "met": met, "runs": runs, "note": note})
    if model == "null":
        for name, part in told.items():
            if name in ("bare", OURS): continue
            row("cost of the framework, ms", ours["p50"] - bare["p50"], part["p50"] - bare["p50"], name, (ours["p50"] - bare["p50"])/(part["p50"] - bare["p50"]), "<= 0.5", ours["p50"] - bare["p50"] <= .5, number)
    else:
        row("p50 of one client, ms", ours["p50"], bare["p50"], "bare loop", ours["p50"]/bare["p50"], "<= 1.05", ours["p50"] <= 1.05*bare["p50"], number)
        row("p99 of one client, ms", ours["p99"], bare["p99"], "bare loop", ours["p99"]/bare["p99"], "<= 1.10", ours["p99"] <= 1.10*bare["p99"], number)
        row("answers a second, eight clients", ours["rate"], bare["rate"], "bare loop", ours["rate"]/bare["rate"], ">= 0.95", ours["rate"] >= .95*bare["rate"])
    for name, part in told.items():
        if name in ("bare", OURS): continue
        goal, met = (">= 2", ours["rate"] >= 2*part["rate"]) if name == "mlflow" and model != "null" else ("", None)
        row("answers a second, eight clients", ours["rate"], part["rate"], name, ours["rate"]/part["rate"], goal, met)
        if model != "null":
            row("p50 of one client, ms", ours["p50"], part["p50"], name, ours["p50"]/part["p50"], "", None, number)
            row("p99 of one client, ms", ours["p99"], part["p99"], name, ours["p99"]/part["p99"], "", None, number)
    return rows


def measure_ready(onnx: Path, folder: Path, photos: list[bytes], rounds: int) -> list[dict]:
    "A null model from its command to its first answer, all cores, turn about; the first start of each, which fills caches, is thrown away."
    seconds = {OURS: [], "bentoml": []}
    for _ in range(rounds + 1):
        for name in seconds:
            with serving(name, onnx, folder, photos, None) as server: seconds[name].append(server.ready_s)
    ours, peer = (statistics.median(found[1:]) for found in seconds.values())
    return [{"measure": "ready with a null model, s", "ours": round(ours, 2), "peer": round(peer, 2), "peer_name": "bentoml", "ratio": round(ours/peer, 3), "goal": "<= 1.2", "met": ours <= 1.2*peer, "runs": rounds,
             "note": f"the goal beyond: 3 s; {'met' if ours <= 3 else 'not met'}"}]


PREDICT = """
import sys, time
from pathlib import Path
from cvops_wb.serve import Classifier, list_pictures, predict_pictures, verify_model
engine = Classifier(verify_model(Path(sys.argv[1])))
pictures = list_pictures(sys.argv[2])
begin = time.perf_counter()
done = predict_pictures(engine, pictures, Path(sys.argv[3]))
print((done.images - done.failed)/(time.perf_counter() - begin))
"""


def measure_predict(onnx: Path, folder: Path, photos: list[bytes], rounds: int, seconds: float) -> list[dict]:
    "`cvops predict` on a folder, from files to its Parquet table, beside the bare loop on images in memory; one core each, turn about."
    import onnx as library
    from serve_toy import write_model
    write_model(folder/"predict-model", library.load(onnx), **json.loads(onnx.with_suffix(".json").read_text()))
    first, ours, bare = run_bare(onnx, folder/"photos", 0, 1.5), [], []
    (folder/"many").mkdir()
    for number in range(int(seconds*len(first["waits"])/first["seconds"]) + 1): (folder/"many"/f"{number:05}.jpg").write_bytes(photos[number % len(photos)])
    for _ in range(rounds):
        found = run_bare(onnx, folder/"photos", 0, seconds)
        bare.append(len(found["waits"])/found["seconds"])
        with pinned(FIRST): done = subprocess.run([sys.executable, "-c", PREDICT, folder/"predict-model", folder/"many", folder/"out.parquet"], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        ours.append(float(done.stdout))
    mine, peer = statistics.median(ours), statistics.median(bare)
    return [{"measure": "resnet18: cvops predict, images a second", "ours": round(mine, 2), "peer": round(peer, 2), "peer_name": "bare loop", "ratio": round(mine/peer, 3), "goal": ">= 0.9", "met": mine >= .9*peer, "runs": rounds,
             "note": f"{len(list((folder/'many').iterdir()))} files; with the table written"}]


def measure_part(part, quick, models, names, folder, photos, rounds, seconds):
    "The rows of one part."
    if part == "ready": return [] if quick else measure_ready(models["null"], folder, photos, 3)
    if part == "predict": return measure_predict(models["resnet18"], folder, photos, rounds, 1. if quick else 4*seconds)
    with pinned(LAST): return to_rows(part, compare(part, models[part], names, folder, photos, rounds, seconds, 0. if part == "resnet18" else 100.))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--peers", nargs="*", choices=NAMES)
    given = parser.parse_args()
    names = given.peers if given.peers is not None else ["fastapi"] if given.quick else NAMES
    missing = [name for name in {*names, "fastapi"} if not (PEERS/name/"bin"/"python").exists()]
    if missing: raise SystemExit(f"missing: {', '.join(missing)}; run: make bench-peers")
    rounds, seconds = given.rounds or (1 if given.quick else 3), given.seconds or (2.5 if given.quick else 4.)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))       # as Ctrl-C: the servers go too
    rows = []
    with TemporaryDirectory(prefix="cvops-serve-bench-") as folder:
        folder = Path(folder)
        models, photos = make_models(folder), make_photos(folder)
        for part in given.parts:
            fresh = measure_part(part, given.quick, models, names, folder, photos, rounds, seconds)
            for row in fresh: print(f"| {row['measure']} | {row['ours']} | {row['peer']} | {row['peer_name']} | {row['ratio']} | {row['goal']} | {'' if row['met'] is None else 'yes' if row['met'] else '**no**'} | {row['note']} |", flush=True)
            rows += fresh
            if given.json: given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__": main()
