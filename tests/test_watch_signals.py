"Prometheus, Alertmanager, Grafana's panels, messages and traces: each against the real thing, or a receiver that listens."
import asyncio
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from serve_toy import photograph
from watch_bench import write_run

from cvops_wb.core.errors import BadRecord, WrongUsage
from cvops_wb.core.processes import free_port, running
from cvops_wb.core.records import Batch
from cvops_wb.core.settings import Alerts
from cvops_wb.serve import Client, service_running
from cvops_wb.serve.telemetry.machine import open_nvml, read_gpus
from cvops_wb.serve.telemetry.metrics import LABELS, Metrics, tell_watched
from cvops_wb.watch import dashboard_running, find_troubles, tell_people, write_boards, write_gauges, write_rules
from cvops_wb.watch.signals.boards import list_queries
from cvops_wb.watch.signals.incidents import Trouble
from cvops_wb.watch.signals.rules import make_rules
from cvops_wb.watch.verdicts.states import Cause, DriftState, Estimate, write_drift_state

REPORT = "reports/monitor-0a1b2c3d4e/drift.html"
DRIFT = DriftState(1, time="2026-11-24T05:00:00Z", rows=900, drifted=True, score=3.2, severity=.7, since="2026-11-24T04:00:00Z",
                   causes=(Cause("images", "brightness", "camera-3: darker by 40 %", "camera-3", 3.2),), cameras={"camera-3": 3.2, "camera-1": .1},
                   accuracy=Estimate(.81, .77, .85), checks=(Estimate(.8, .7, .9, method="spot check", count=50, time="2026-11-24T04:30:00Z"),), report=REPORT)
needs_prometheus = pytest.mark.skipif(not shutil.which("promtool"), reason="Debian's prometheus is not here: make system")


# ---- metrics

@pytest.fixture
def metrics(tmp_path): return Metrics({"name": "toy"}, lambda: {"shares": {(1, "champion"): 1.}}, tmp_path/"gauges.json")


def test_a_label_that_anybody_can_invent_does_not_fill_the_memory(metrics):
    for k in range(LABELS + 300): metrics.tell(1, f"tea|{k}", .5, 1000)
    page = metrics.render()[0].decode()
    assert page.count("cvops_predictions_total{") <= LABELS + 1 and 'cvops_predictions_total{label="other",version="1"} 300.0' in page


@pytest.mark.parametrize("text, lines", [
    ('{"gauges": [{"name": "cvops_drift_score", "help": "h", "lines": [[{"version": "1"}, 2.5]]}]}', 1),
    ('{"gauges": [{"name": "evil_name", "help": "h", "lines": [[{}, 1]]}]}', 0), ('{"gauges": [{"name": "cvops_a", "help": "h", "lines": [[{"Bad-Label": "1"}, 1]]}]}', 0),
    ('{"gauges": [{"name": "cvops_a", "help": "h", "lines": [[{}, "many"]]}, {"name": "cvops_b", "help": "h", "lines": [[{}, 1]]}]}', 1),
    ('{"gauges": 7}', 0), ('{"gau', 0), ("[]", 0),
])
def test_what_the_watcher_wrote_costs_at_most_itself(metrics, tmp_path, text, lines):
    (tmp_path/"gauges.json").write_text(text)
    metrics.count("/predict", 200, 1, .003)
    assert sum(len(family[3]) for family in tell_watched(tmp_path/"gauges.json")) == lines
    assert b'cvops_requests_total{path="/predict",status="200",version="1"} 1.0' in metrics.render()[0]


@needs_prometheus
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_names_and_units_pass_the_lint_of_prometheus(metrics, tmp_path, accept):
    (tmp_path/"gauges.json").write_text(json.dumps({"gauges": [{"name": "cvops_drift_score", "help": "h", "lines": [[{}, 1]]}]}))
    metrics.count("/predict", 200, 1, .003, "abc")
    metrics.refusals.labels("busy").inc()
    metrics.tell(1, "tea", .9, 1000)
    page = metrics.render(accept)[0]
    if accept: assert b'cvops_request_seconds_bucket{le="0.005",path="/predict"} 1.0 # {request_id="abc"} 0.003' in page
    else: assert subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True).stderr == b""


class Nvml:
    "A driver with two GPUs, the second a slice that does not tell how busy it is."
    def nvmlDeviceGetCount_v2(self, count): count._obj.value = 2; return 0                                        # noqa: E702
    def nvmlDeviceGetHandleByIndex_v2(self, index, handle): handle._obj.value = index + 1; return 0               # noqa: E702
    def nvmlDeviceGetMemoryInfo(self, handle, memory): memory._obj.total, memory._obj.used = 80, 20; return 0     # noqa: E702
    def nvmlDeviceGetName(self, handle, name, size): name.value = b"H100"; return 0                               # noqa: E702
    def nvmlDeviceGetUtilizationRates(self, handle, busy): busy._obj.gpu = 50; return 0 if handle.value == 1 else 3   # noqa: E702


def test_gpus_are_told_where_there_are_any():
    assert [(gpu.name, gpu.busy, gpu.memory_used/gpu.memory_total) for gpu in read_gpus(Nvml())] == [("H100", .5, .25), ("H100", 0, .25)]
    if open_nvml() is None: assert read_gpus() == []
    assert open_nvml.__wrapped__("libnothing.so.9") is None


# ---- rules

def series(**values): return [{"series": name, "values": text} for name, text in values.items()]


ASKED = 'cvops_requests_total{job="cvops",path="/predict",status="200"}'
FAILED = 'cvops_requests_total{job="cvops",path="/predict",status="500"}'
COUNT, BUCKET = 'cvops_request_seconds_count{job="cvops",path="/predict"}', 'cvops_request_seconds_bucket{job="cvops",path="/predict",le="0.2"}'
UP = {'up{job="cvops"}': "1x7000"}
HEALTHY = {**UP, ASKED: "0+600x7000", COUNT: "0+600x7000", BUCKET: "0+600x7000", 'cvops_drift_detected{version="1"}': "0x7000", 'cvops_refusals_total{job="cvops",reason="busy"}': "0x7000",
           'cvops_estimated_accuracy_ratio{version="1",bound="high"}': "0.9x7000", "cvops_log_lost_total": "0x7000", "cvops_rollout_running": "0x7000"}
CASES = {   # what is planted over healthy minutes, the minute that is looked at, and the alerts that fire
    "healthy": ({}, 120, set()),
    "down": ({'up{job="cvops"}': "1x60 0x60"}, 65, {"CvopsServiceDown"}),
    "an hour of 10 % errors": ({FAILED: "0x60 0+60x100"}, 120, {"CvopsErrorsBurnFast", "CvopsErrorsBurn"}),
    "two errors": ({FAILED: "0x60 2x100"}, 80, set()),
    "1 % errors without end": ({FAILED: "0+6x7000"}, 200, {"CvopsErrorsBurn"}),
    "a tenth is slow": ({BUCKET: "0+600x60 36000+400x100"}, 120, {"CvopsSlowBurnFast", "CvopsSlowBurn"}),
    "drift": ({'cvops_drift_detected{version="1"}': "0x60 1x100"}, 62, {"CvopsDrift"}),
    "wrong": ({'cvops_estimated_accuracy_ratio{version="1",bound="high"}': "0.9x60 0.4x100"}, 70, {"CvopsAccuracyLow"}),
    "an interval across the limit": ({'cvops_estimated_accuracy_ratio{version="1",bound="low"}': "0.4x400"}, 70, set()),
    "turned away": ({'cvops_refusals_total{job="cvops",reason="busy"}': "0x60 0+100x100"}, 75, {"CvopsBusy"}),
    "refused": ({'cvops_refusals_total{job="cvops",reason="not_an_image"}': "0x60 0+200x100"}, 100, {"CvopsRefusals"}),
    "disk full": ({"cvops_log_lost_total": "0x60 5x100"}, 63, {"CvopsLogLost"}),
    "nobody watches": ({"cvops_watch_timestamp_seconds": "0x7000"}, 70, {"CvopsWatcherSilent"}),
    "rollout without end": ({"cvops_rollout_running": "0x10 1x400"}, 200, {"CvopsRolloutLong"}),
}
GIVEN = replace(Alerts(), silent_hours=1.)


def run_promtool(folder, rules, cases):
    "What `promtool test rules` says of cases."
    folder.mkdir(exist_ok=True)
    (folder/"rules.yml").write_text(yaml.safe_dump(rules))
    tests = [{"interval": "1m", "name": name, "input_series": series(**{**HEALTHY, **planted}),
              "promql_expr_test": [{"expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": f"{minutes}m",
                                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(alerts)]}]}
             for name, (planted, minutes, alerts) in cases.items()]
    named = {"interval": "1m", "input_series": series(**{'cvops_drift_detected{version="1"}': "1x10", f'cvops_watch_info{{run="monitor-1",report="{REPORT}"}}': "1x10"}),
             "alert_rule_test": [{"eval_time": "5m", "alertname": "CvopsDrift", "exp_alerts": [{"exp_labels": {"severity": "ticket", "version": "1"}, "exp_annotations": {
                 "summary": "version 1 sees other images than it was trained on", "description": "The report names the causes and shows the images.", "open": REPORT}}]}]}
    (folder/"tests.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [*tests, named]}))
    return subprocess.run(["promtool", "test", "rules", str(folder/"tests.yml")], capture_output=True, text=True)


@needs_prometheus
def test_each_trouble_fires_its_alert_and_no_other(tmp_path):
    done = run_promtool(tmp_path/"right", make_rules(GIVEN), CASES)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize("given, name", [(replace(Alerts(), available=.9), "an hour of 10 % errors"), (replace(Alerts(), fast_share=.5), "a tenth is slow"), (replace(Alerts(), accuracy=.1), "wrong")])
def test_a_rule_that_sleeps_is_seen(tmp_path, given, name):
    assert run_promtool(tmp_path, make_rules(given), {name: CASES[name]}).returncode != 0


@needs_prometheus
def test_the_files_are_ones_that_the_tools_take(workbench, tmp_path):
    write_rules(tmp_path, webhook="http://127.0.0.1:9/", token_file="/run/secrets/token")
    for command in (["promtool", "check", "rules", "cvops.rules.yml"], ["promtool", "check", "config", "--syntax-only", "prometheus.yml"], ["amtool", "check-config", "alertmanager.yml"]):
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert "credentials_file: /run/secrets/token" in (tmp_path/"prometheus.yml").read_text()


# ---- receivers

@contextmanager
def receiving(status=200):
    "An HTTP server that keeps what it is sent."
    kept = SimpleNamespace(bodies=[], status=status)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if kept.status == 200: kept.bodies.append((self.path, body))
            self.send_response(kept.status)
            self.send_header("content-length", "0")
            self.end_headers()
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept.url = f"http://127.0.0.1:{server.server_port}"
    try: yield kept
    finally: server.shutdown()


@contextmanager
def mail_server():
    "An SMTP server that keeps what it is sent: as much of the protocol as a client needs."
    kept = SimpleNamespace(mails=[])

    async def talk(reader, writer):
        async def say(text): writer.write(text.encode() + b"\r\n"); await writer.drain()   # noqa: E702
        await say("220 here")
        while line := (await reader.readline()).decode().strip():
            if line.upper() == "DATA":
                await say("354 go on")
                kept.mails.append((await reader.readuntil(b"\r\n.\r\n")).decode())
            if line.upper() == "QUIT":
                await say("221 bye")
                return writer.close()
            await say("250 ok")
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(talk, "127.0.0.1", 0))
    kept.port = server.sockets[0].getsockname()[1]
    threading.Thread(target=loop.run_forever, daemon=True).start()
    try: yield kept
    finally: loop.call_soon_threadsafe(loop.stop)


def wait_for(what, seconds=30.):
    "The first true value of a function."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(.2)
    return found


# ---- people

def test_people_hear_once_and_once_more_at_the_end(workbench):
    write_drift_state(DRIFT)
    with receiving() as hook, receiving() as slack, mail_server() as mail:
        places = [hook.url.replace("http", "json") + "/hook", slack.url.replace("http", "mmost") + "/a1b2c3d4e5f6g7h8i9j0k1l2m3",
                  f"mailto://127.0.0.1:{mail.port}?from=watch@example.com&to=us@example.com&mode=insecure"]
        hook.status = 500
        said = [tell_people(find_troubles(now=1764000000.), addresses=places)]
        hook.status = 200
        for state in (DRIFT, replace(DRIFT, score=5., rows=1200), replace(DRIFT, drifted=False, score=.1)):
            write_drift_state(state)
            said.append(tell_people(find_troubles(now=1764000000.), addresses=places))
    assert [len(lines) for lines in said] == [2, 1, 0, 3]
    titles = [json.loads(body)["title"] for _, body in hook.bodies]
    assert titles == [f"{over}warehouse 1: drift, camera-3: darker by 40 %" for over in ("", "Over: ")] and REPORT in json.loads(hook.bodies[0][1])["message"]
    assert len(slack.bodies) == 2 and all("drift" in json.dumps(json.loads(body)) for _, body in slack.bodies) and "text" in json.loads(slack.bodies[0][1])
    assert len(mail.mails) == 2 and "To: us@example.com" in mail.mails[0] and "camera-3" in mail.mails[0] and "Over" in mail.mails[1]
    assert read_incidents(workbench) == {}


def read_incidents(settings): return json.loads((settings.store/"watch"/"incidents.json").read_text())["incidents"]


def test_a_killed_teller_tells_nothing_twice(workbench):
    # the first address got the message when the process dies at the second: the next look tells the second alone
    heard = []
    def dies(address, *_):
        if address == "b" and len(heard) == 1: raise KeyboardInterrupt
        return not heard.append(address)
    trouble = Trouble("drift-1", "drift", "dark", "report")
    with pytest.raises(KeyboardInterrupt): tell_people([trouble], workbench, ["a", "b"], dies)
    tell_people([trouble], workbench, ["a", "b"], lambda address, *_: not heard.append(address))
    assert heard == ["a", "b"]


def test_secrets_stay_out_of_the_file(workbench):
    tell_people([Trouble("k", "t", "x", "o")], workbench, ["json://user:secret@host/"], lambda *_: True)
    assert "secret" not in (workbench.store/"watch"/"incidents.json").read_text() and list(read_incidents(workbench)) == ["k"]
    with pytest.raises(WrongUsage) as e: tell_people([Trouble("k2", "t", "x", "o")], workbench, ["nonsense-secret"])
    assert "secret" not in str(e.value).replace("nonsense-secret://", "")
    (workbench.store/"watch"/"incidents.json").write_text("{")
    with pytest.raises(BadRecord): tell_people([], workbench, [])


@pytest.mark.parametrize("state, keys", [
    (DRIFT, {"drift-1", "silent"}), (replace(DRIFT, drifted=False), {"silent"}), (replace(DRIFT, drifted=False, time="2099-01-01T00:00:00Z"), set()),
    (replace(DRIFT, drifted=False, time="", accuracy=Estimate(.4, .3, .45)), {"accuracy-1"}), (replace(DRIFT, drifted=False, time="", accuracy=Estimate(.4, .3, .45, known=False)), set()),
    (replace(DRIFT, drifted=False, time="", checks=(Estimate(.9, .8, 1., time="2020-01-01T00:00:00Z"),)), {"labels"}),
])
def test_which_troubles_there_are(workbench, state, keys):
    now = 1795672800.   # 2026-11-26
    assert {trouble.key for trouble in find_troubles(workbench, state, now)} == keys


# ---- the whole: service, Prometheus, Alertmanager

@contextmanager
def prometheus_running(folder, settings, targets, webhook):
    "A Prometheus and an Alertmanager of our own, looking each second."
    port, other = free_port(), free_port()
    settings = replace(settings, serve=replace(settings.serve, port=int(targets.rpartition(":")[2])))
    write_rules(folder, settings, webhook, alertmanager=f"127.0.0.1:{other}", every="1s")
    routes = (folder/"alertmanager.yml").read_text().replace("group_wait: 10s", "group_wait: 0s").replace("group_interval: 5m", "group_interval: 1s")
    (folder/"alertmanager.yml").write_text(routes)
    prometheus = ["prometheus", "--config.file=prometheus.yml", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=error"]
    manager = ["prometheus-alertmanager", "--config.file=alertmanager.yml", f"--storage.path={folder}/am", f"--web.listen-address=127.0.0.1:{other}", "--cluster.listen-address=", "--log.level=error"]
    with running(manager, folder/"am.log", folder, {}), running(prometheus, folder/"prometheus.log", folder, {}) as process:
        def ask(path, **query):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=5) as reply: return json.load(reply)["data"]
        yield ask, process


def try_ask(ask, *path, **query):
    "An answer, or nothing while the server comes up."
    try: return ask(*path, **query)
    except OSError: return None


@needs_prometheus
@pytest.mark.slow
def test_a_real_prometheus_sees_the_service_and_alerts_once(bench, bento, tmp_path):
    write_run(bench, "ingest", Batch("x", "x", "x", 1, 1, 0, {"red": 1}))
    write_run(bench, "train", Batch("x", "x", "x", 1, 1, 0, {"red": 1}))
    (bench.store/"watch").mkdir(parents=True, exist_ok=True)
    write_gauges(bench, replace(DRIFT, drifted=False))
    with service_running(bento, bench.store/"predictions") as service, receiving() as hook, \
            prometheus_running(tmp_path, bench, service.url, hook.url) as (ask, _):
        client, colours, asked = Client(service.url), ("red", "green", "blue"), {}

        def work():
            for k in range(6): client.predict(photograph(colours[k % 3], seed=k))
            assert urllib.request.urlopen(urllib.request.Request(f"{service.url}/livez")).status == 200
            with pytest.raises(urllib.error.HTTPError): urllib.request.urlopen(f"{service.url}/predict", b"not an image")
            for board, panel, query in list_queries("10s"):
                if not asked.get((board, panel, query)): asked[board, panel, query] = try_ask(ask, "query", query=query)["result"] if try_ask(ask, "query", query="up") else []
            return all(found for (_, panel, _), found in asked.items() if panel != "GPU")
        try: wait_for(work, 60)
        except AssertionError: pytest.fail(f"panels without data: {[key for key, found in asked.items() if not found and key[1] != 'GPU']}")
        assert ask("query", query='sum(cvops_version_share_ratio)')["result"][0]["value"][1] == "1"
        exemplars = wait_for(lambda: ask("query_exemplars", query="cvops_request_seconds_bucket", start=time.time() - 300, end=time.time() + 5))
        rows = {json.loads(line)["request_id"] for path in (bench.store/"predictions").glob("*.jsonl") for line in path.read_text().splitlines()}
        assert {e["labels"]["request_id"] for found in exemplars if found["seriesLabels"]["path"] == "/predict" for e in found["exemplars"]} & rows
        assert not [a for a in ask("alerts")["alerts"] if a["state"] == "firing" and a["labels"]["alertname"] != "CvopsRefusals"]
        write_gauges(bench, DRIFT)
        wait_for(lambda: [body for _, body in hook.bodies if b"CvopsDrift" in body])
        write_gauges(bench, replace(DRIFT, rows=2000))      # it lasts: nobody is told again
        time.sleep(3)
        write_gauges(bench, replace(DRIFT, drifted=False))
        wait_for(lambda: [body for _, body in hook.bodies if b"CvopsDrift" in body and json.loads(body)["status"] == "resolved"])
    told = [json.loads(body) for _, body in hook.bodies if b"CvopsDrift" in body]
    assert [message["status"] for message in told] == ["firing", "resolved"] and told[0]["alerts"][0]["annotations"]["open"] == REPORT


def follows_schema(board):
    "Whether Grafana's own model, made from its schema, knows every key of a dashboard: what it reads, it writes again."
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard
    register_default_plugins()
    def holds(more, less):
        if isinstance(less, dict): return all(key in more and holds(more[key], value) for key, value in less.items())
        return len(more) == len(less) and all(map(holds, more, less)) if isinstance(less, list) else more == less
    return holds(json.loads(JSONEncoder().encode(Dashboard.from_json(board))), board)


def test_boards_are_whole(workbench, tmp_path):
    files = write_boards(tmp_path, workbench)
    boards = [json.loads(path.read_text()) for path in files if path.suffix == ".json"]
    assert {board["uid"] for board in boards} == {"cvops-service", "cvops-model"}
    assert {(board["uid"].removeprefix("cvops-"), panel["title"]) for board in boards for panel in board["panels"]} == {key[:2] for key in list_queries()}
    for board in boards:
        places = [panel["gridPos"] for panel in board["panels"]]
        assert all(place["x"] + place["w"] <= 24 for place in places) and all(panel["targets"] and panel["datasource"]["uid"] == "${datasource}" for panel in board["panels"])
        assert follows_schema(board) and not follows_schema(board | {"panel": []}) and not follows_schema(board | {"panels": [board["panels"][0] | {"gridPosition": {}}]})
    provided = yaml.safe_load((tmp_path/"provisioning"/"dashboards"/"cvops.yml").read_text())
    assert provided["providers"][0]["options"]["path"] == str((tmp_path/"dashboards").resolve())


# ---- traces

def parse_spans(body):
    "The spans of one OTLP message, packed or not."
    import gzip

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
    message = ExportTraceServiceRequest()
    message.ParseFromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    return [span for resource in message.resource_spans for scope in resource.scope_spans for span in scope.spans]


@pytest.mark.slow
def test_a_trace_goes_from_the_request_to_its_row(bench, bento, tmp_path):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with receiving() as collector, service_running(bento, tmp_path/"log", env={"CVOPS_SERVE_TRACES": f"{collector.url}/v1/traces"}) as service:
        order = urllib.request.Request(f"{service.url}/predict", photograph("red"), {"content-type": "image/jpeg", "traceparent": parent, "x-request-id": "traced-1"})
        with urllib.request.urlopen(order) as reply: assert reply.status == 200
        def spans(): return [span for path, body in collector.bodies for span in parse_spans(body)]
        found = {span.name: span for span in wait_for(lambda: spans() if len(spans()) >= 4 else None)}
    root = found["POST /predict"]
    assert set(found) == {"POST /predict", "receive", "look", "prediction row"} and root.trace_id.hex() == parent.split("-")[1] and root.parent_span_id.hex() == parent.split("-")[2]
    assert all(span.parent_span_id == root.span_id and root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano
               for name, span in found.items() if name != "POST /predict")
    row = next(a.value.string_value for a in found["prediction row"].attributes if a.key == "cvops.request_id")
    assert row == "traced-1" and any("traced-1" in path.read_text() for path in (tmp_path/"log").glob("*.jsonl"))


# ---- the service does not feel the watcher

def percentile(times, share): return float(np.quantile(times, share))


@needs_prometheus
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CVOPS_FULL"), reason="the long campaign: CVOPS_FULL=1")
def test_the_service_does_not_feel_the_watcher(bench, bento, tmp_path):
    # in turns: nobody looks; a Prometheus that scrapes each second; one that hangs while it reads /metrics; the live page; all stopped half-way. Nothing fails, and the times are told
    (bench.store/"watch").mkdir(parents=True, exist_ok=True)
    write_gauges(bench, DRIFT)
    with service_running(bento, bench.store/"predictions") as service, receiving() as hook, prometheus_running(tmp_path, bench, service.url, hook.url) as (ask, prometheus), \
            dashboard_running(settings=bench, name="monitoring") as (address, voila):
        wait_for(lambda: (try_ask(ask, "query", query='up{job="cvops"}') or {"result": []})["result"])
        urllib.request.urlopen(address, timeout=60).read()      # a viewer's kernel
        processes = {"Prometheus": [psutil.Process(prometheus.pid)], "page": [psutil.Process(voila.pid), *psutil.Process(voila.pid).children(recursive=True)]}
        hung = [socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) for _ in range(4)]
        client, image, times = Client(service.url), photograph("blue"), {name: [] for name in ("nobody", "Prometheus", "page", "hung readers")}
        for turn in range(4*15):
            name = list(times)[turn % 4]
            for other, group in processes.items():
                for process in group: (process.resume if other == name else process.suspend)()
            for line in hung if name == "hung readers" else (): line.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")      # and never reads
            (bench.store/"watch"/"gauges.json").write_text("{" if turn % 2 else '{"gauges": []}')
            for _ in range(100):
                begin = time.perf_counter()
                assert client.predict(image)["label"] == "blue"
                times[name].append(time.perf_counter() - begin)
        for group in processes.values():
            for process in group: process.kill()
        assert client.predict(image)["label"] == "blue"
        for line in hung: line.close()
    told = {name: [round(1e3*float(np.quantile(values, share)), 2) for share in (.5, .99)] for name, values in times.items()}
    print(f"milliseconds, p50 and p99 of {15*100} requests each, in turns: {told}")
    assert all(len(values) == 1500 for values in times.values())


# ---- the command

@pytest.mark.parametrize("command, said", [
    (["watch", "rules", "ops"], "ops/prometheus.yml"), (["watch", "rules", "--dry-run"], ""), (["watch", "grafana"], "grafana/dashboards/model.json"), (["watch", "grafana", "--dry-run"], ""),
    (["watch", "tell"], ""), (["watch", "tell", "--dry-run"], ""), (["dashboard", "rollout", "--dry-run"], ""),
])
def test_the_command(workbench, capsys, command, said):
    from cvops_wb.loop.cli import main
    with pytest.raises(SystemExit) as end: main([*command, "--json"])
    reply = json.loads(capsys.readouterr().out)
    assert end.value.code == 0 and reply["ok"] and said in json.dumps(reply)
    assert all((workbench.root/name).is_file() for name in reply.get("files", ()))
    if command == ["watch", "tell"]: assert "cvops_watch_timestamp_seconds" in (workbench.store/"watch"/"gauges.json").read_text()
