"""Does the service feel its watchers? Answer times while Prometheus, the page and a monitor are well, stopped, slow or dead, in turns.

    python bench/feel.py [--quick] [--json FILE]

A toy model is served with one worker on one core; the client and all watchers share the other. Prometheus scrapes each second, the page `monitoring` is open in a kernel of
its own and renews itself each two seconds, a monitor reads the log and writes its gauges in a loop. In each turn they are, one after the other: well; stopped half-way (SIGSTOP, connections
open); slow (all watchers at the lowest priority, eight connections that ask for /metrics and never read it, gauges that are damaged); killed (and started anew after the turn). The
quantiles are over all requests of a state, of the time that the service itself takes, from the head of a request to its answer: the client's own time would tell more of what the client
shares its core with. The peer is the service with its watchers well; the goal is that p99 changes by less than 5 %. The order of the states moves with the turn.
"""
import argparse
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

REPO = Path(__file__).parents[1]
STATES = ("well", "stopped", "slow", "killed")
MONITOR = '''
import sys, time
from cvops_wb.core.settings import load_settings
from cvops_wb.serve import read_predictions
from cvops_wb.watch import count_log, write_gauges
settings = load_settings()
while True:
    count_log(settings); read_predictions(settings.store/"predictions", 2000); write_gauges(settings); time.sleep(1)
'''


class Watchers:
    "Prometheus, the page with a viewer, and a monitor: what can be stopped, slowed and killed."

    def __init__(self, settings, url, folder):
        self.settings, self.url, self.folder, self.stack, self.hung = settings, url, folder, ExitStack(), []

    def start(self):
        "All of them, on their core, until they have looked once."
        import httpx
        import psutil
        from test_watch_signals import prometheus_running, try_ask

        from cvops_wb.watch import dashboard_running
        ask, prometheus = self.stack.enter_context(prometheus_running(self.folder, self.settings, self.url, "http://127.0.0.1:9/"))
        address, page = self.stack.enter_context(dashboard_running(settings=self.settings, name="monitoring"))
        httpx.get(address, timeout=60, trust_env=False).read()
        monitor = subprocess.Popen([sys.executable, "-c", MONITOR], cwd=self.settings.root, env={**os.environ, "PYTHONPATH": str(REPO)})
        self.stack.callback(monitor.wait)
        self.stack.callback(monitor.kill)
        for _ in range(100):
            if (try_ask(ask, "query", query='up{job="cvops"}') or {"result": []})["result"]: break
            time.sleep(.2)
        self.all = [each for root in (prometheus, page, monitor) for each in (psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True))]
        for each in self.all:
            each.cpu_affinity([1])
            each.nice(0)

    def take(self, state):
        "Bring them into a state."
        if state == "stopped": self.each(lambda process: process.suspend())
        if state == "killed": self.each(lambda process: process.kill())
        if state != "slow": return
        self.each(lambda process: process.nice(19))
        self.hung = [socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))) for _ in range(8)]
        for line in self.hung: line.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"*20)
        (self.settings.store/"watch"/"gauges.json").write_text("{")

    def leave(self, state):
        "And out of it again."
        if state == "stopped": self.each(lambda process: process.resume())
        if state == "slow": self.each(lambda process: process.nice(0))
        for line in self.hung: line.close()
        self.hung = []
        if state == "killed":
            self.stack.close()
            self.start()

    def each(self, act):
        "Do something to those that live."
        import psutil
        for process in self.all:
            try: act(process)
            except psutil.NoSuchProcess: continue


def time_requests(client, image, count, pace):
    "Seconds of each request as the service measures them, asked at a pace; an answer that fails ends the bench."
    found, begin = [], time.perf_counter()
    for k in range(count):
        while time.perf_counter() < begin + k*pace: time.sleep(pace/20)
        found.append(client.post("/predict", content=image, headers={"content-type": "image/jpeg"}).raise_for_status().json()["latency_ms"]/1e3)
    return found


def row(measure, ours, peer, goal, met, runs, note=""):
    clean = [float(f"{v:.4g}") for v in (ours, peer, ours/peer)]
    return {"measure": measure, "ours": clean[0], "peer": clean[1], "peer_name": "watchers well", "ratio": clean[2], "goal": goal, "met": met, "runs": runs, "note": note}


def compare(times, rng):
    "p50 and p99 of each state beside the watchers' being well, with a bootstrap interval of the ratio over whole turns."
    rows = []
    for state in STATES[1:]:
        for share, name in ((.5, "p50"), (.99, "p99")):
            both = [np.array(times[each]) for each in (state, "well")]      # (turns, requests)
            ours, peer = (float(1e3*np.quantile(each, share)) for each in both)
            picks = [rng.integers(0, len(both[0]), len(both[0])) for _ in range(400)]
            low, high = np.quantile([np.quantile(both[0][pick], share)/np.quantile(both[1][pick], share) for pick in picks], (.025, .975))
            rows.append(row(f"{name}, ms, watchers {state}", ours, peer, "within 5 %" if name == "p99" else "told", abs(ours/peer - 1) < .05 if name == "p99" else None, both[0].size, f"95 % {low:.2f} to {high:.2f}"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=8)
    options = parser.parse_args()
    sys.path[:0] = [str(REPO), str(REPO/"tests")]
    from cvops_wb.core.processes import hush
    hush()
    import shutil

    import httpx
    import psutil
    from serve_toy import photograph, register_toy
    from watch_bench import write_run

    from cvops_wb.core.records import Batch
    from cvops_wb.core.settings import load_settings
    from cvops_wb.serve import PackageSpec, package, service_running
    from cvops_wb.watch import write_gauges
    from cvops_wb.watch.verdicts.states import DriftState
    turns, count = (2, 150) if options.quick else (options.turns, 500)
    times = {state: [] for state in STATES}
    with TemporaryDirectory(prefix="cvops-feel-") as folder:
        root = Path(folder)/"bench"
        root.mkdir()
        shutil.copy(REPO/"settings.ini", root)
        shutil.copytree(REPO/"bentos"/"classifier", root/"bentos"/"classifier", ignore=shutil.ignore_patterns("built"))
        os.environ |= {"CVOPS_ROOT": str(root), "CVOPS_MONITOR_REFRESH": "2"}
        settings = load_settings(root)
        bento = package(register_toy(root), PackageSpec(), settings.reports/"package.part")
        write_run(settings, "ingest", Batch("x", "x", "x", 1, 1, 0, {"red": 1}))
        (settings.store/"watch").mkdir(parents=True, exist_ok=True)
        write_gauges(settings, DriftState(1))
        with service_running(bento, settings.store/"predictions") as service, httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
            port = int(service.url.rpartition(":")[2])
            served = {each.pid for each in psutil.net_connections("tcp") if each.laddr and each.laddr.port == port and each.status == "LISTEN"}
            for pid in served:
                for each in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)): each.cpu_affinity([0])
            psutil.Process().cpu_affinity([1])
            psutil.Process().nice(-10 if os.geteuid() == 0 else 0)
            time_requests(client, photograph("blue"), 200, .004)
            watchers = Watchers(settings, service.url, Path(folder)/"prometheus")
            watchers.folder.mkdir()
            watchers.start()
            for turn in range(turns):
                for state in np.roll(STATES, turn):
                    watchers.take(state)
                    time_requests(client, photograph("blue"), 25, .006)
                    times[state].append(time_requests(client, photograph("blue"), count, .006))
                    watchers.leave(state)
            watchers.stack.close()
    rows = compare(times, np.random.default_rng(0))
    print("| measure | ours | peer | | ratio | goal | met | note |\n|---|---|---|---|---|---|---|---|")
    for r in rows: print("|", " | ".join("" if v is None else str(v) for v in (r[k] for k in ("measure", "ours", "peer", "peer_name", "ratio", "goal", "met", "note"))), "|")
    if options.json: options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
