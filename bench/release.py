"""A release as users live it: another grocery model is rolled out under load while its page is watched; two bad ones are rolled back by themselves.

    python bench/release.py [WORKBENCH] [--quick] [--json FILE] [--photos DIR] [--shots DIR]     (--shots: the page at each change, light and dark)

WORKBENCH has two registered models of the grocery photographs (`cvops train`, `evaluate`, `register`, twice); one is made, and kept, where none is named. The less accurate of them is made champion and packaged, the other is rolled out. All happens in a copy, with a real service,
real clients on four threads without a second try, feedback with the truth after each answer, the page `rollout` open in Chromium, and `cvops rollout start` as a person types it.
Then two bad versions are planted in the copy's registry: one whose first layer takes blue for red, so that it answers as quickly as before, and wrongly, and one that cannot answer one
photograph in three. For the first of them nobody tells the truth: what is seen are its doubts and its answers. Peers do not exist without Kubernetes: their column is empty.
"""
import argparse
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
from parts.shop import make_shop

REPO = Path(__file__).parents[1]
CVOPS = Path(sys.executable).parent/"cvops"
SETTINGS = {"CVOPS_ROLLOUT_STEP_SECONDS": "3", "CVOPS_ROLLOUT_HOLD": "4", "CVOPS_ROLLOUT_WRONG_MARGIN": "0.1"}


def swap_colours(model):
    "A graph whose first layer takes blue for red, and costs no more than before."
    from onnx import numpy_helper
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4 and values.shape[1] == 3: return tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:, ::-1]), tensor.name))
    raise SystemExit("no layer of this network looks at colours")


def fail_sometimes(model):
    "A graph that looks beyond the end of a table for answers of every third class."
    from onnx import helper, numpy_helper
    graph = model.graph
    for node in graph.node: node.output[:] = ["planted_logits" if each == "logits" else each for each in node.output]
    graph.initializer.extend([numpy_helper.from_array(np.ones(2, np.float32), "planted_table"), numpy_helper.from_array(np.array(3), "planted_three")])
    graph.node.extend([helper.make_node("ArgMax", ["planted_logits"], ["planted_class"], axis=1, keepdims=1), helper.make_node("Mod", ["planted_class", "planted_three"], ["planted_rest"]),
                       helper.make_node("Gather", ["planted_table", "planted_rest"], ["planted_one"]), helper.make_node("Mul", ["planted_logits", "planted_one"], ["logits"])])


def plant(settings, number, like, change):
    "A version of the registry made from a good one, with a changed graph."
    import onnx

    from cvops_wb.learn import find_version, registry
    good = find_version(like)
    folder = settings.root/Path(good.model).with_name(str(number))
    shutil.copytree(settings.root/good.model, folder)
    for path in folder.iterdir(): path.chmod(0o644)
    model = onnx.load(folder/"model.onnx")
    change(model)
    onnx.checker.check_model(model)
    (folder/"model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((folder/"manifest.json").read_text())
    manifest["files"]["model.onnx"].update(sha256=hashlib.sha256((folder/"model.onnx").read_bytes()).hexdigest(), size=(folder/"model.onnx").stat().st_size)
    (folder/"manifest.json").write_text(json.dumps(manifest))
    value = {**registry._to_body(good), "version": number, "alias": "", "model": folder.relative_to(settings.root).as_posix(),
             "manifest_sha256": hashlib.sha256((folder/"manifest.json").read_bytes()).hexdigest()}
    with registry.locked(settings): registry.append_event(settings, event="registered", by="bench", **value)


def prepare(settings):
    "The less accurate of two versions is champion and packaged; it, the other, and the first free number."
    from cvops_wb.learn import list_versions, move_alias
    table = list_versions().sort_values("accuracy").tail(2)
    old, new = (int(number) for number in table["version"])
    if table["alias"].iloc[0] != "champion": move_alias("champion", old, by="bench")
    done = subprocess.run([CVOPS, "package"], cwd=settings.root, capture_output=True, text=True)
    if done.returncode: raise SystemExit(done.stdout + done.stderr)
    return old, new, int(list_versions()["version"].max()) + 1


def read_photos(folder):
    "The published validation photographs with their coarse class."
    names = {row[3]: row[2] for row in (line.split(",") for line in (folder/"classes.csv").read_text().splitlines()[1:])}
    rows = [[part.strip() for part in line.split(",")] for line in (folder/"val.txt").read_text().splitlines() if line.strip()]
    return [((folder/row[0]).read_bytes(), names[row[2]]) for row in rows]


class Load:
    "Requests at a steady rate; each failure is kept, and who answered what and when."

    def __init__(self, url, photos, rate, threads=4):
        self.url, self.photos, self.each, self.count = url, photos, threads/rate, itertools.count()
        self.stopping, self.tells, self.failed, self.answers = threading.Event(), True, [], []
        self.threads = [threading.Thread(target=self.ask, args=(k/rate,)) for k in range(threads)]

    def ask(self, late):
        from cvops_wb.serve import Client
        begin = time.monotonic() + late
        with Client(self.url) as client, httpx.Client(base_url=self.url, timeout=20., trust_env=False) as plain:
            for k in itertools.count():
                if self.stopping.wait(max(0., begin + k*self.each - time.monotonic())): return
                number = next(self.count)
                data, truth = self.photos[number*7 % len(self.photos)]
                start = time.monotonic()
                try: said = plain.post("/predict", content=data, headers={"content-type": "image/jpeg", "x-caller": f"till {number % 499}", "x-camera": f"camera-{number % 3}"}).raise_for_status().json()
                except (httpx.HTTPError, ValueError) as e: self.failed.append(repr(e))
                else:
                    self.answers.append((start, time.monotonic() - start, said["version"], said["label"] == truth))
                    if self.tells: client.tell(said["request_id"], truth)

    def __enter__(self):
        for thread in self.threads: thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads: thread.join()


def serve(root):
    "A service of the copy on a free port, ready; and where it is."
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    child = subprocess.Popen([CVOPS, "serve"], cwd=root, env={**os.environ, "CVOPS_SERVE_PORT": str(port), "CVOPS_SERVE_KEEP_SHARE": "0"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).is_success: return child, f"http://127.0.0.1:{port}"
        except httpx.HTTPError: time.sleep(.5)
    child.send_signal(signal.SIGINT)
    raise SystemExit("the service did not start: run `cvops serve` in the workbench to see why")


def shoot(tab, shots, name):
    "The page as it is, in both schemes."
    for scheme in ("light", "dark") if shots else ():
        tab.emulate_media(color_scheme=scheme)
        time.sleep(.3)
        tab.screenshot(path=str(shots/f"{name}-{scheme}.png"), full_page=True)
    tab.emulate_media(color_scheme="light")


def roll_out(root, version, load, tab, shots, most):
    "`cvops rollout start` as a person runs it, with the page beside it: its exit status, the state, and what the page said."
    name, begin = f"version-{version}", time.monotonic()
    child = subprocess.Popen([CVOPS, "rollout", "start", str(version), "--canary", "5%", "--json"], cwd=root, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shot, seen = 0, []
    while child.poll() is None and time.monotonic() < begin + most:
        time.sleep(1.)
        title, lead = (tab.inner_text(f".wb {part}") for part in ("h1", ".lead")) if tab.query_selector(".wb .lead") else ("", "")
        if title and (not seen or title != seen[-1][0]):
            seen.append((title, lead))
            shoot(tab, shots, f"{name}-{shot}")
            shot += 1
    if child.poll() is None: child.kill()
    out, errors = child.communicate()
    time.sleep(3.)
    shoot(tab, shots, f"{name}-end")
    seen.append((tab.inner_text(".wb h1"), tab.inner_text(".wb .lead")))
    text = out.strip()
    if child.returncode not in (0, 3): raise SystemExit(f"{text}\n{errors}")
    state = json.loads(text[text.index("\n{") + 1 if not text.startswith("{") else 0:])["state"]
    mine = [answer for answer in load.answers if answer[0] >= begin]
    print(f"version {version}: exit {child.returncode}, {state['event']}: {state['reason']}; page: {seen[-1]}", flush=True)
    return {"code": child.returncode, "state": state, "seconds": time.monotonic() - begin - 3, "page": seen, "requests": len(mine), "ours": sum(a[2] == version for a in mine),
            "wrong_ours": sum(a[2] == version and not a[3] for a in mine)}


def row(measure, ours, goal="told", met=None, runs=1, note=""):
    return {"measure": measure, "ours": None if ours is None else float(f"{ours:.4g}"), "peer": None, "peer_name": "", "ratio": None, "goal": goal, "met": met, "runs": runs, "note": note}


def judge(good, bad, load, old, new):
    "Rows of the bench."
    def share(version):
        right = [a[3] for a in load.answers if a[2] == version]
        return float(np.mean(right)) if right else None
    rows = [row(f"version {new} is promoted, exit status", good["code"], "0", good["code"] == 0, good["requests"], good["state"]["reason"] + f"; {good['seconds']:.0f} s"),
            *(row(f"accuracy that callers got from version {each}", share(each), runs=sum(a[2] == each for a in load.answers)) for each in (old, new))]
    for name, told in bad.items():
        rows += [row(f"{name}: rolled back by itself, exit status", told["code"], "3", told["code"] == 3 and told["state"]["champion"]["version"] == (new if good["code"] == 0 else old), told["requests"], told["state"]["reason"] + f"; {told['seconds']:.0f} s"),
                 row(f"{name}: answers that callers got from it, of all in this time", told["ours"]/max(told["requests"], 1), "told", None, told["requests"], f"{told['wrong_ours']} of {told['ours']} were wrong"),
                 row(f"{name}: the page said so", float("rolled back" in told["page"][-1][0]), "1", "rolled back" in told["page"][-1][0], 1, " → ".join(title.replace("\n", " ") for title, _ in told["page"]))]
    times = np.array([a[1] for a in load.answers])
    return [*rows, row("failed requests", len(load.failed), "0", not load.failed, len(load.answers), f"p50 {1e3*np.quantile(times, .5):.0f} ms, p99 {1e3*np.quantile(times, .99):.0f} ms with the page, the controller and the clients on the same cores")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workbench", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true", help="the failing version alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--photos", type=Path, default=REPO.parent/"shared"/"data"/"grocery")
    parser.add_argument("--shots", type=Path)
    parser.add_argument("--rate", type=float, default=30., help="requests a second")
    given = parser.parse_args()
    sys.path.insert(0, str(REPO))
    from playwright.sync_api import sync_playwright

    from cvops_wb.core.processes import hush
    from cvops_wb.core.settings import load_settings
    hush()
    if given.shots: given.shots.mkdir(parents=True, exist_ok=True)
    photos = read_photos(given.photos)
    with TemporaryDirectory(prefix="cvops-release-") as folder:
        root = Path(folder)/"shop"
        shutil.copytree(given.workbench or make_shop(given.photos), root, symlinks=True, ignore=shutil.ignore_patterns("remote", "cache"))
        os.environ["CVOPS_ROOT"] = str(root)
        settings = load_settings(root)
        old, new, first = prepare(settings)
        plant(settings, first, new, swap_colours)
        plant(settings, first + 1, new, fail_sometimes)
        from cvops_wb.watch import dashboard_running
        child, url = serve(root)
        try:
            with dashboard_running(settings=settings, name="rollout") as (address, _), sync_playwright() as p, Load(url, photos, given.rate) as load:
                browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
                tab = browser.new_context(viewport={"width": 1300, "height": 1000}).new_page()
                tab.goto(address)
                tab.wait_for_selector(".wb h1", timeout=60_000)
                good, bad = None, {}
                if not given.quick:
                    good = roll_out(root, new, load, tab, given.shots, 400)
                    load.tells = False
                    bad["red and blue exchanged, no truth told"] = roll_out(root, first, load, tab, given.shots, 200)
                bad["a third cannot be answered"] = roll_out(root, first + 1, load, tab, given.shots, 200)
                browser.close()
        finally:
            child.send_signal(signal.SIGINT)
            child.wait(30)
        rows = judge(good, bad, load, old, new) if good else judge({"code": 3, "requests": 0, "state": {"reason": "left out"}, "seconds": 0}, bad, load, old, new)[1:]
    print("| measure | ours | goal | met | note |\n|---|---:|---|---|---|")
    for r in rows: print("|", " | ".join("" if v is None else str(v) for v in (r[k] for k in ("measure", "ours", "goal", "met", "note"))), "|")
    if given.json: given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
