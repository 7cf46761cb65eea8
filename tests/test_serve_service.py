"The packaged service as its callers meet it: a real BentoML service with two workers, over HTTP."
import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_toy import photograph

from cvops_wb.core.errors import BadModel, NoRoom
from cvops_wb.core.processes import answers, free_port, running, wait_until
from cvops_wb.serve import Client, read_predictions, service_running
from cvops_wb.serve.clients import CallFailed

pytestmark = pytest.mark.slow
JPEG = photograph("green")


@pytest.fixture(scope="module")
def service(bench, bento):
    with service_running(bento, bench.root/"log", workers=2, output=bench.root/"service.log") as service: yield service


@pytest.fixture(scope="module")
def client(service):
    with Client(service.url) as client: yield client


def send(service, method: str = "POST", path: str = "/predict", body: bytes | None = None, **headers: str):
    "Status, headers and body of one request on a connection of its own."
    connection = http.client.HTTPConnection(service.url[7:], timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    result = reply.status, reply.headers, reply.read()
    connection.close()
    return result


def form(field: str, data: bytes, extra: bytes = b"", name: str = "a.jpg") -> dict:
    "Body and content type of a form."
    part = f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'.encode()
    return {"body": extra + part + data + b"\r\n--edge--\r\n", "content_type": "multipart/form-data; boundary=edge"}


def read_metrics(service) -> dict[str, float]:
    "Each series and its value."
    lines = send(service, "GET", "/metrics")[2].decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def find_workers(service) -> list[int]:
    "Processes that the service has started."
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(service.process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in children.split()]


# ── what is answered ──

@pytest.mark.parametrize("kind, content_type", [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp"), ("TIFF", "image/tiff"), ("BMP", "image/bmp"), ("PNG", "application/octet-stream"), ("JPEG", "image/png")])
@pytest.mark.parametrize("colour", ["red", "blue"])
def test_raw_bytes_are_answered(service, kind, content_type, colour):
    status, headers, body = send(service, body=photograph(colour, kind), content_type=content_type)
    answer = json.loads(body)
    assert status == 200 and answer["label"] == colour and answer["version"] == 1 and headers["X-Request-Id"] == answer["request_id"]
    assert set(answer["scores"]) == {"red", "green", "blue"} and abs(sum(answer["scores"].values()) - 1) < 1e-4
    assert answer["top"][0] == {"label": colour, "score": answer["scores"][colour]} and answer["confidence"] == answer["scores"][colour]
    assert headers["X-Content-Type-Options"] == "nosniff" and "BentoML" not in str(headers) and "uvicorn" not in str(headers).lower()


@pytest.mark.parametrize("field, extra", [("file", b""), ("image", b""), ("anything", b'--edge\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n')])
def test_a_form_gives_the_same_answer(service, field, extra):
    raw = json.loads(send(service, body=JPEG, content_type="image/jpeg")[2])
    status, _, body = send(service, **form(field, JPEG, extra))
    assert status == 200 and json.loads(body)["scores"] == raw["scores"]


@pytest.mark.parametrize("data", [{"image": base64.b64encode(JPEG).decode()}, {"images": [base64.b64encode(JPEG).decode()]}, {"image": "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()}])
def test_base64_in_json_gives_the_same_answer(service, data):
    raw = json.loads(send(service, body=JPEG, content_type="image/jpeg")[2])
    status, _, body = send(service, body=json.dumps(data).encode(), content_type="application/json")
    assert status == 200 and json.loads(body)["scores"] == raw["scores"]


def form_of(*files: bytes) -> dict:
    "A form with several files."
    parts = [b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + data + b"\r\n" for data in files]
    return {"body": b"".join(parts) + b"--edge--\r\n", "content_type": "multipart/form-data; boundary=edge"}


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
@pytest.mark.parametrize("how", ["form", "json"])
def test_several_images_are_answered_each_for_itself(service, bench, path, how):
    "A bad one between them is refused alone; each answer is in the log under its own id."
    files, name = [photograph("red"), b"no photograph", photograph("blue", "PNG")], f"several-{how}-{len(path)}"
    encoded = {"body": json.dumps({"images": [base64.b64encode(data).decode() for data in files]}).encode(), "content_type": "application/json"}
    status, _, body = send(service, path=path, x_request_id=name, **(form_of(*files) if how == "form" else encoded))
    first, second, third = json.loads(body)["answers"]
    assert status == 200 and (first["label"], second["reason"], second["status"], third["label"]) == ("red", "not_an_image", 422, "blue")
    logged = read_predictions(bench.root/"log").set_index("request_id").predicted
    assert [first["request_id"], third["request_id"]] == [name, f"{name}.2"] and (logged[name], logged[f"{name}.2"]) == ("red", "blue") and f"{name}.1" not in logged
    with Client(service.url) as client: client.tell("x"*60 + ".31", "red")


def test_a_batch_of_one_is_a_list(service):
    assert [a["label"] for a in json.loads(send(service, path="/predict/batch", body=JPEG, content_type="image/jpeg")[2])["answers"]] == ["green"]


def test_the_picture_shows_what_the_answer_comes_from(service):
    "Half of the photograph is green and half is grey: the colour is on the green half, for the class green and not for the class red."
    pixels = np.full((120, 160, 3), 128, np.uint8)
    pixels[:, :80] = (30, 200, 50)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    def ask(path):
        status, headers, body = send(service, path=path, body=out.getvalue(), content_type="image/png")
        assert status == 200 and headers["Content-Type"] == "image/png" and headers["X-Version"] == "1"
        picture = np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(float)
        colour = picture.max(2) - picture.min(2)
        return headers["X-Label"], colour[:, :60].mean(), colour[:, 100:].mean()
    label, left, right = ask("/explain")
    assert label == "green" and left > 5*right + 10, (left, right)
    assert ask("/explain?label=red")[0] == "red"


def test_a_browser_that_cannot_draw_a_file_gets_its_picture(service):
    "The image as it is read, small enough for a page; the width that boxes are told in stands beside it."
    status, headers, body = send(service, path="/explain?plain=1", body=photograph("red", "TIFF", (1600, 900)), content_type="image/tiff")
    picture = Image.open(io.BytesIO(body))
    assert (status, headers["Content-Type"], headers["X-Width"], headers["X-Method"], picture.size) == (200, "image/png", "1600", "plain", (640, 360))
    assert np.abs(np.asarray(picture.convert("RGB")).mean((0, 1)) - np.asarray(Image.open(io.BytesIO(photograph("red", "PNG", (1600, 900)))).convert("RGB")).mean((0, 1))).max() < 3
    assert send(service, path="/explain?plain=1", body=b"hello, I am a photograph", content_type="image/tiff")[0] == 422


def test_one_explanation_at_a_time(service):
    with ThreadPoolExecutor(8) as pool: replies = list(pool.map(lambda _: send(service, path="/explain", body=JPEG, content_type="image/jpeg"), range(24)))
    assert {status for status, *_ in replies} <= {200, 429} and any(status == 200 for status, *_ in replies)


@pytest.mark.parametrize("given, echoed", [("order-17.a_B", True), ("x"*64, True), ("x"*65, False), ("a b", False), ("é", False), ("<b>", False)])
def test_a_request_id_of_ones_own(service, given, echoed):
    _, headers, body = send(service, body=JPEG, content_type="image/jpeg", x_request_id=given.encode("utf-8").decode("latin-1"))
    assert (headers["X-Request-Id"] == given) == echoed and json.loads(body)["request_id"] == headers["X-Request-Id"]


def test_the_truth_is_taken_and_can_be_read(service, client, bench):
    from cvops_wb.serve.rollouts.controller import LogReader
    said = client.predict(JPEG)
    client.tell(said["request_id"], "  a new product, 日本 ")
    rows = {row["request_id"]: row["label"] for row in LogReader(bench.store/"feedback").read()}
    assert rows[said["request_id"]] == "a new product, 日本"
    with pytest.raises(CallFailed, match="bad_feedback"): client.tell("no id of ours", "tea")


# ── what is refused ──

@pytest.mark.parametrize("status, reason, request_", [
    (422, "not_an_image", {"body": b"hello, I am a photograph", "content_type": "image/jpeg"}),
    (422, "truncated", {"body": JPEG[:len(JPEG)//2], "content_type": "image/jpeg"}),
    (422, "unsupported_format", {"body": b"GIF89a" + bytes(50), "content_type": "application/octet-stream"}),
    (400, "empty", {"body": b"", "content_type": "image/jpeg"}),
    (400, "no_file", {"body": b'--edge\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n--edge--\r\n', "content_type": "multipart/form-data; boundary=edge"}),
    (400, "bad_multipart", {"body": b"nonsense", "content_type": "multipart/form-data; boundary=edge"}),
    (400, "bad_multipart", {"body": b"nonsense", "content_type": "multipart/form-data"}),
    (413, "too_large", {"body": bytes(10_000_001), "content_type": "image/jpeg"}),
    (413, "too_large", form("file", bytes(10_000_001))),
    (413, "too_large", form("file", bytes(11_000_000))),
    (415, "content_type", {"body": JPEG}),
    (415, "content_type", {"body": JPEG, "content_type": "image/svg+xml"}),
    (400, "no_image", {"body": b'{"url": "http://example.com/a.jpg"}', "content_type": "application/json"}),
    (400, "bad_base64", {"body": b'{"image": "http://example.com/a.jpg"}', "content_type": "application/json"}),
    (400, "no_image", {"body": b'{"images": []}', "content_type": "application/json"}),
    (400, "no_image", {"path": "/predict/batch", "body": b'{"images": [7]}', "content_type": "application/json"}),
    (400, "bad_json", {"body": b"["*4000, "content_type": "application/json"}),
    (400, "too_many_images", {"path": "/predict/batch", "body": b'{"images": [' + b'"AAAA",'*32 + b'"AAAA"]}', "content_type": "application/json"}),
    (400, "too_many_images", {"path": "/explain", "body": b'{"images": ["AAAA", "AAAA"]}', "content_type": "application/json"}),
    (413, "too_large", {"body": b'{"image": "' + b"A"*13_400_000 + b'"}', "content_type": "application/json"}),
    (413, "too_large", {"path": "/predict/batch", "body": bytes(10_000_001), "content_type": "image/jpeg"}),
    (422, "not_an_image", {"path": "/explain", "body": b"hello, I am a photograph", "content_type": "image/jpeg"}),
    (400, "no_label", {"path": "/explain?label=purple", "body": JPEG, "content_type": "image/jpeg"}),
    (404, "no_version", {"path": "/explain?version=99", "body": JPEG, "content_type": "image/jpeg"}),
    *[(415, "content_type", {"body": b"cos\nsystem\n(S'id'\ntR.", "content_type": kind}) for kind in
      ("application/x-pickle", "application/python-pickle", "application/vnd.bentoml+pickle", "application/x-python-serialize", "application/x-npy")],
    (404, "no_route", {"method": "GET", "path": "/docs/../etc/passwd"}),
    (404, "no_route", {"path": "/predict/batch/", "body": JPEG}),
    (405, "method", {"method": "GET", "path": "/predict"}),
    (405, "method", {"method": "POST", "path": "/metrics", "body": b""}),
    (400, "bad_feedback", {"path": "/feedback", "body": b"", "content_type": "application/json"}),
    (400, "bad_feedback", {"path": "/feedback", "body": b"["*4000, "content_type": "application/json"}),
    (400, "bad_feedback", {"path": "/feedback", "body": b'{"request_id": "../x", "label": "tea"}', "content_type": "application/json"}),
    (400, "bad_feedback", {"path": "/feedback", "body": b'{"request_id": "a", "label": "  "}', "content_type": "application/json"}),
    (413, "too_large", {"path": "/feedback", "body": bytes(5000), "content_type": "application/json"}),
    (415, "content_type", {"path": "/feedback", "body": b'{"request_id": "a", "label": "tea"}', "content_type": "image/jpeg"}),
    (405, "method", {"method": "GET", "path": "/feedback"}),
    (403, "not_loopback", {"body": JPEG, "content_type": "image/jpeg", "host": "evil.example"}),
    (403, "other_origin", {"body": JPEG, "content_type": "image/jpeg", "origin": "http://evil.example"}),
])
def test_a_refusal_has_a_code_and_a_way_out(service, status, reason, request_):
    got, headers, body = send(service, **request_)
    said = json.loads(body)
    assert (got, said["reason"]) == (status, reason)
    assert said["error"] and said["request_id"] == headers["X-Request-Id"] and headers["Content-Type"] == "application/json"
    assert "Traceback" not in str(said) and "/tmp" not in str(said) and "site-packages" not in str(said)


def test_a_length_too_large_is_refused_before_the_body_comes(service):
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])), 10) as wire:
        wire.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\nContent-Length: 200000000\r\n\r\n")
        assert wire.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_without_a_length_is_counted(service):
    connection = http.client.HTTPConnection(service.url[7:], timeout=20)
    connection.request("POST", "/predict", (bytes(500_000) for _ in range(24)), {"Content-Type": "image/jpeg"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_many_megapixels_are_refused_by_the_header_alone(service):
    out = io.BytesIO()
    Image.new("L", (6000, 6000)).save(out, "PNG")
    status, _, body = send(service, body=out.getvalue(), content_type="image/png")
    assert (status, json.loads(body)["reason"]) == (422, "too_many_pixels")


def test_a_full_line_says_when_to_come_back(service):
    out = io.BytesIO()
    Image.effect_noise((4800, 4800), 40).convert("RGB").save(out, "JPEG", quality=30)
    large = out.getvalue()
    with ThreadPoolExecutor(41) as pool:
        probes = pool.submit(lambda: [time_probe(service) for _ in range(8)])
        replies = list(pool.map(lambda _: send(service, body=large, content_type="image/jpeg"), range(40)))
    statuses = [status for status, *_ in replies]
    assert set(statuses) == {200, 429} and all(headers["Retry-After"] == "1" for status, headers, _ in replies if status == 429)
    assert max(probes.result()) < 1.5, "the loop is not held up by the images"
    assert send(service, body=JPEG, content_type="image/jpeg")[0] == 200


def time_probe(service) -> float:
    "Seconds until /livez answers."
    begin = time.monotonic()
    assert send(service, "GET", "/livez")[0] == 200
    time.sleep(.05)
    return time.monotonic() - begin


# ── what is written down ──

def test_metrics_count_over_both_workers(service):
    before = read_metrics(service)
    for _ in range(12): send(service, body=JPEG, content_type="image/jpeg")
    send(service, body=b"x", content_type="image/jpeg")
    after = read_metrics(service)
    def grown(name): return after.get(name, 0) - before.get(name, 0)
    assert grown('cvops_requests_total{path="/predict",status="200",version="1"}') == 12
    assert grown('cvops_requests_total{path="/predict",status="422",version="1"}') == 1 and grown('cvops_refusals_total{reason="not_an_image"}') == 1
    assert grown('cvops_predictions_total{label="green",version="1"}') == 12 and grown('cvops_request_seconds_count{path="/predict"}') == 13


def test_each_answer_is_in_the_log(bench, client):
    said = client.predict(photograph("blue", seed=7), camera="Gang 3 ä", caller="me\nyou", request_id="in-the-log")
    for _ in range(100):        # what is measured of the image follows the answer
        row = read_predictions(bench.root/"log").set_index("request_id").loc["in-the-log"]
        if row.brightness > 0: break
        time.sleep(.02)
    assert (row.predicted, row.camera, row.version, row.model, row.label) == ("blue", "Gang 3 ä", 1, said["model"], "")
    assert "\n" not in row.caller and abs(row.confidence - said["confidence"]) < 1e-6 and (row.width, row.height) == (160, 120)
    assert len(row.embedding) == 3 and abs(sum(row.scores) - 1) < 1e-5 and 0 < row.brightness < 1 and 0 <= row.entropy_of_scores <= 1


def test_the_log_survives_a_kill_and_the_worker_is_back(bench, service):
    before = set(find_workers(service))
    assert len(before) == 2
    answered = []
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(send, service, body=JPEG, content_type="image/jpeg", x_request_id=f"kill-{k}") for k in range(120)]
        time.sleep(.1)
        for pid in before: os.kill(pid, signal.SIGKILL)
        for future in futures:
            try: status, _, body = future.result()
            except (OSError, http.client.HTTPException): continue   # it was in the killed worker's hands
            if status == 200: answered.append(json.loads(body)["request_id"])
    logged = set(read_predictions(bench.root/"log").request_id)
    assert len(answered) >= 20 and set(answered) <= logged, "an answer is in the log before it is sent"
    wait_until(lambda: len(find_workers(service)) == 2 and answers(f"{service.url}/readyz"), service.process, "two workers")
    assert not set(find_workers(service)) & before


# ── pages ──

def test_models_and_openapi(client, service):
    assert client.list_models()[0] | {"model": ""} == {"name": "toy", "version": 1, "alias": "champion", "model": "", "classes": ["red", "green", "blue"], "size": 32}
    api = json.loads(send(service, "GET", "/openapi.json")[2])
    assert api["openapi"].startswith("3.1") and {"/predict", "/predict/batch", "/explain", "/feedback", "/metrics", "/v1/models", "/livez", "/readyz"} <= set(api["paths"])
    for status in ("400", "413", "415", "422", "429"): assert status in api["paths"]["/predict"]["post"]["responses"]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_in_chromium(service, tmp_path, scheme):
    sync = pytest.importorskip("playwright.sync_api")
    picture = tmp_path/"photo.png"
    picture.write_bytes(photograph("red", "PNG", (640, 480)))
    (tmp_path/"text.jpg").write_text("no photograph")
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed: make system")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 900})
        asked, complaints = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"{service.url}/")
        page.screenshot(path=tmp_path/f"drop-{scheme}.png")
        page.set_input_files("#file", picture)
        page.wait_for_selector("#answer:not([hidden])")
        assert page.inner_text("#label") == "red" and page.locator(".row").count() == 3 and "version 1" in page.inner_text("#foot")
        page.wait_for_timeout(400)
        page.screenshot(path=tmp_path/f"answer-{scheme}.png")
        plain = page.get_attribute("#photo", "src")
        page.click("#why")
        sync.expect(page.locator("#why")).to_have_text("Show the photograph")
        assert page.get_attribute("#photo", "src") != plain and page.locator("#photo").evaluate("photo => photo.naturalWidth") == 640
        page.screenshot(path=tmp_path/f"why-{scheme}.png")
        page.click("#why")
        assert page.get_attribute("#photo", "src") == plain
        page.select_option("#truth", "blue")
        sync.expect(page.locator("#told")).to_have_text("Noted. Thank you.")
        scan = tmp_path/"scan.tif"
        scan.write_bytes(photograph("blue", "TIFF", (1200, 800)))
        page.set_input_files("#file", scan)
        sync.expect(page.locator("#label")).to_have_text("blue")
        page.wait_for_function("document.querySelector('#photo').naturalWidth === 640 && document.querySelector('#past img').naturalWidth === 640")
        assert page.get_attribute("#photo", "src").startswith("blob:"), "the service drew what the browser cannot"
        page.screenshot(path=tmp_path/f"scan-{scheme}.png")
        page.set_input_files("#file", tmp_path/"text.jpg")
        page.wait_for_selector("#error:not([hidden])")
        assert "not_an_image" in page.inner_text("#error")
        page.screenshot(path=tmp_path/f"error-{scheme}.png")
        assert [c for c in complaints if "422" not in c] == []
        page.goto(f"{service.url}/docs")
        assert all(path in page.inner_text("main") for path in ("/v1/models", "/predict/batch", "/explain", "/feedback")) and "too_many_pixels" in page.inner_text("main")
        page.screenshot(path=tmp_path/f"docs-{scheme}.png", full_page=True)
        browser.close()
    assert asked and all(url.startswith((service.url, "blob:", "data:")) for url in asked), asked


# ── who asks too often, and what is written of them ──

def test_a_token_that_asks_too_often_waits_and_another_does_not(bench, bento):
    "The limit is each token's; the access log has neither tokens, nor callers, nor what was in the query."
    tokens = {name: f"a-long-token-of-{name}" for name in ("ann", "bob")}
    env = {"CVOPS_TOKEN": "\n".join(tokens.values()), "CVOPS_SERVE_RATE": "2", "CVOPS_SERVE_ACCESS_LOG": "true"}
    with service_running(bento, bench.root/"log", workers=1, output=bench.root/"rate.log", env=env) as service:
        def ask(name): return send(service, path="/predict?version=1", body=JPEG, content_type="image/jpeg", authorization=f"Bearer {tokens[name]}", x_caller="secret-caller")
        replies = [ask("ann") for _ in range(30)]
        refused = [(headers["Retry-After"], json.loads(body)["reason"]) for status, headers, body in replies if status == 429]
        assert [status for status, *_ in replies[:4]] == [200]*4 and refused and set(refused) == {("1", "rate")}
        assert ask("bob")[0] == 200 and send(service, body=JPEG, content_type="image/jpeg", authorization="Bearer no")[0] == 401
    written = (bench.root/"rate.log").read_text()
    assert "POST /predict 200" in written and "POST /predict 429" in written
    assert not [word for word in (*tokens.values(), "secret-caller", "version=1") if word in written]


# ── starting and ending ──

def test_a_port_in_use_is_one_sentence(bench, bento, service):
    with pytest.raises(NoRoom, match="is in use"), service_running(bento, bench.root/"unused", port=int(service.url.rpartition(":")[2])): pass


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "weights.safetensors"])
def test_a_flipped_bit_is_refused_before_anything_starts(bench, bento, name):
    path = bench.root/bento.path/"src"/"model"/name
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 4]) + good[-2:])
    try:
        with pytest.raises(BadModel, match=name), service_running(bento, bench.root/"unused"): pass
        if name == "model.onnx": assert name in start_worker(bench.root/bento.path)     # also by a worker that nobody has looked over
    finally: path.write_bytes(good)


def start_worker(folder: Path) -> str:
    "What a bare worker says before it gives up."
    from cvops_wb.serve.launching import WORKER, open_listener
    with open_listener("127.0.0.1", 0) as listener:
        done = subprocess.run([sys.executable, "-c", WORKER, folder, str(listener.fileno()), "2"], cwd=folder/"src", capture_output=True, text=True, timeout=60,
                              pass_fds=[listener.fileno()], env={**os.environ, "PYTHONPATH": str(folder/"src"), "BENTOML_HOME": str(folder.parent)})
    assert done.returncode != 0
    return done.stderr


def test_what_was_accepted_is_answered_and_nothing_stays(bench, bento):
    from cvops_wb.core.processes import stop
    with service_running(bento, bench.root/"log-end", output=bench.root/"end.log") as service, ThreadPoolExecutor(6) as pool:
        workers = find_workers(service)
        large = photograph("blue", size=(3000, 2000))
        futures = [pool.submit(send, service, body=large, content_type="image/jpeg") for _ in range(6)]
        time.sleep(.25)
        stop(service.process, 40)
        assert [future.result()[0] for future in futures] == [200]*6
    assert service.process.returncode == 0 and not answers(f"{service.url}/livez")
    for pid in workers:
        with pytest.raises(ProcessLookupError): os.kill(pid, 0)
    assert len(read_predictions(bench.root/"log-end")) == 6


def test_bentoml_serves_the_folder_by_itself_and_a_token_is_needed(bench, bento):
    secret, port = "correct-horse-battery-staple", free_port()
    command = [Path(sys.executable).with_name("bentoml"), "serve", bench.root/bento.path, "--port", str(port)]
    env = {"CVOPS_TOKEN": secret, "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(bench.root/"bentoml"), "CVOPS_PREDICTIONS": str(bench.root/"log-stock")}
    url, log = f"http://127.0.0.1:{port}", bench.root/"stock.log"
    with running(command, log, bench.root, env) as process:
        wait_until(lambda: answers(f"{url}/readyz"), process, "bentoml serve", 60., log)
        with pytest.raises(CallFailed) as error: Client(url, token="wrong").predict(JPEG)
        assert (error.value.status, error.value.reason) == (401, "token")
        with Client(url, token=secret) as client: assert client.predict(JPEG)["label"] == "green"
        assert answers(f"{url}/docs") and not answers(f"{url}/metrics") and not answers(f"{url}/v1/models")
    assert secret not in log.read_text() and len(read_predictions(bench.root/"log-stock")) == 1


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "fiftyone", "mlflow", "onnx", "pandas", "pyarrow", "evidently", "papermill", "sklearn"): raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import asyncio, json, bentoml
app = bentoml.load(sys.argv[1]).to_asgi()
app.start()
said = []
async def receive(): return {"type": "http.request", "body": open(sys.argv[2], "rb").read(), "more_body": False}
async def send(message): said.append(message)
scope = {"type": "http", "method": "POST", "path": "/predict", "client": ("127.0.0.1", 1), "headers": [(b"content-type", b"image/jpeg")]}
asyncio.run(app(scope, receive, send))
print(said[0]["status"], json.loads(said[1]["body"])["label"], sys.modules["cvops_wb"].__file__)
"""


def test_it_needs_neither_torch_nor_fiftyone_nor_mlflow(bench, bento, tmp_path):
    (tmp_path/"a.jpg").write_bytes(JPEG)
    folder = bench.root/bento.path
    env = {**os.environ, "PYTHONPATH": str(folder/"src"), "BENTOML_HOME": str(tmp_path), "CVOPS_PREDICTIONS": str(tmp_path/"log")}
    done = subprocess.run([sys.executable, "-c", BLOCKED, folder, tmp_path/"a.jpg"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    status, label, where = done.stdout.split()[-3:]
    assert (status, label) == ("200", "green") and Path(where).is_relative_to(folder), "the bento's own code runs, not what is installed"


def test_a_taken_port_in_the_foreground(bento):
    from cvops_wb.serve import serve_bento
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(NoRoom, match="in use"): serve_bento(bento, port=other.getsockname()[1])
