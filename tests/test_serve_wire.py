"The short way answers what the usual way answers, checks what it checks, counts what it counts, and takes nothing that is not plain."
import asyncio
import json
import shutil
from dataclasses import replace

import pytest
from open_loop import make_request, split_head
from serve_toy import photograph, write_model
from uvicorn import Config
from uvicorn.server import ServerState

from cvops_wb.core.settings import Serve
from cvops_wb.serve import read_predictions
from cvops_wb.serve.service import Application
from cvops_wb.serve.service import wire as room
from cvops_wb.serve.service.wire import SHORT, WAITING, Turn, Wire

JPEG = photograph("green")
FORM = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + JPEG + b"\r\n--edge--\r\n"


@pytest.fixture()
def app(tmp_path, monkeypatch):
    for name in ("CVOPS_ROLLOUT", "CVOPS_MODELS", "CVOPS_FEEDBACK", "CVOPS_KEPT"): monkeypatch.delenv(name, raising=False)
    digest = write_model(tmp_path/"svc"/"model")
    (tmp_path/"svc"/"service.json").write_text(json.dumps({"service": "x", "version": 1, "model_name": "toy", "alias": "champion", "manifest_sha256": digest}))
    app = Application(tmp_path/"svc", replace(Serve(), threads=1), tmp_path/"log")
    app.start()
    yield app
    app.close()
    shutil.rmtree(tmp_path/"svc")


@pytest.fixture()
def ways(monkeypatch):
    "Which way each request went."
    taken, answer_now, replay = [], room.answer_now, Wire.replay

    def now(*arguments):
        reply = answer_now(*arguments)
        if reply is not None: taken.append("short")
        return reply
    monkeypatch.setattr(room, "answer_now", now)
    monkeypatch.setattr(Wire, "replay", lambda self, held: (taken.append("usual"), replay(self, held))[1])
    return taken


async def talk(app, chunks: list[bytes], count: int = 1, pause: float = .02) -> list[tuple[int, dict, bytes]]:
    "Replies to what is written on one connection."
    config, state, turn = Config(app, lifespan="off", log_config=None), ServerState(), Turn()
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: Wire(app, turn, config=config, server_state=state, app_state={}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for chunk in chunks:
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(pause)
    data, replies = b"", []
    async with asyncio.timeout(20):
        while len(replies) < count:
            head = split_head(data)
            if head and len(data) >= (end := head[2] + int(head[1].get("content-length", 0))):
                replies.append((head[0], head[1], data[head[2]:end]))
                data = data[end:]
                continue
            part = await reader.read(65536)
            if not part: break
            data += part
    writer.close()
    server.close()
    await asyncio.sleep(.05)
    return replies


def ask(app, *chunks: bytes, count: int = 1): return asyncio.run(talk(app, list(chunks), count))


def to_progressive(data: bytes) -> bytes:
    import io

    from PIL import Image
    out = io.BytesIO()
    Image.open(io.BytesIO(data)).save(out, "JPEG", progressive=True)
    return out.getvalue()


PLAIN = {"raw": make_request("/predict", JPEG, "image/jpeg"), "octets": make_request("/predict", JPEG), "form": make_request("/predict", FORM, "multipart/form-data; boundary=edge"),
         "damaged": make_request("/predict", JPEG[:len(JPEG)//2], "image/jpeg"), "foreign": make_request("/predict", JPEG, "image/jpeg", host="evil.example")}


@pytest.mark.parametrize("name", PLAIN)
def test_both_ways_say_the_same(app, ways, monkeypatch, name):
    request = PLAIN[name]
    [short] = ask(app, request)
    head = request.index(b"\r\n\r\n") + 4
    monkeypatch.setattr(room, "REST", .005)
    [usual] = ask(app, request[:head + 20], request[head + 20:])
    assert ways == ["short", "usual"]
    told = [json.loads(body) for _, _, body in (short, usual)]
    for each in told: [each.pop(key, None) for key in ("request_id", "time", "latency_ms")]
    assert told[0] == told[1] and short[0] == usual[0] == {"damaged": 422, "foreign": 403}.get(name, 200)
    assert {k: v for k, v in short[1].items() if k not in ("date", "x-request-id", "content-length")} == {k: v for k, v in usual[1].items() if k not in ("date", "x-request-id", "content-length")}


OTHER = {"png": make_request("/predict", photograph(kind="PNG", size=(40, 30)), "image/png"), "progressive": make_request("/predict", to_progressive(JPEG), "image/jpeg"),
         "many pixels": make_request("/predict", photograph(size=(1000, 700))[:SHORT], "image/jpeg"), "text": make_request("/predict", b"text", "text/plain"), "nothing there": make_request("/predict", b"no image", "image/jpeg"),
         "json": make_request("/predict", b'{"image": 1}', "application/json"), "two files": make_request("/predict", FORM[:-len("--edge--\r\n")] + FORM, "multipart/form-data; boundary=edge")}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_plain_goes_the_usual_way(app, ways, name):
    [reply] = ask(app, OTHER[name])
    assert ways == ["usual"] and reply[0] in (200, 400, 415, 422)


@pytest.mark.parametrize("request_", [make_request("/predict?version=1", JPEG, "image/jpeg"), make_request("/predict", JPEG, "image/jpeg", Expect="100-continue"), make_request("/predict", JPEG, "image/jpeg", Connection="close"),
                                      make_request("/predict/batch", JPEG, "image/jpeg"), make_request("/readyz", b"", verb="GET"), make_request("/livez", b"x", verb="GET"), make_request("/predict", photograph(size=(900, 900)), "image/jpeg")])
def test_a_head_that_is_not_plain_is_not_held(app, ways, request_):
    replies = ask(app, request_, count=2 if b"Expect" in request_ else 1)
    assert ways == [] and replies


def test_one_after_another_on_one_connection(app, ways):
    requests = [make_request("/predict", JPEG, "image/jpeg", X_Request_Id=f"r{k}") for k in range(4)]
    usual = make_request("/predict?version=1", JPEG, "image/jpeg", X_Request_Id="slow")
    replies = ask(app, b"".join([requests[0], requests[1], usual, requests[2], requests[3]]), count=5)
    assert [reply[1]["x-request-id"] for reply in replies] == ["r0", "r1", "slow", "r2", "r3"] and {reply[0] for reply in replies} == {200}
    assert ways[:2] == ["short"]*2, "and what stands behind a slow one is not answered before it"


def test_it_is_counted_logged_and_measured(app, ways, tmp_path):
    ask(app, make_request("/predict", JPEG, "image/jpeg", X_Request_Id="one", X_Camera="gate"))
    text, row = app.metrics.render()[0].decode(), read_predictions(tmp_path/"log").set_index("request_id").loc["one"]
    assert ways == ["short"] and 'cvops_requests_total{path="/predict",status="200",version="1"} 1.0' in text and app.gate.inside == 0
    assert row.camera == "gate" and row.predicted == "green" and row.brightness > 0 and len(row.phash) == 16


def test_tokens_and_rates_hold(app, ways):
    app.tokens = (b"a-token-of-some-length",)
    right = {"Authorization": "Bearer a-token-of-some-length"}
    assert [ask(app, make_request("/predict", JPEG, "image/jpeg", **headers))[0][0] for headers in ({}, {"Authorization": "Bearer another-token-here"}, right)] == [401, 401, 200]
    app.rates.rate = .5
    found = [ask(app, make_request("/predict", JPEG, "image/jpeg", **right))[0] for _ in range(3)]
    assert [reply[0] for reply in found] == [200, 429, 429] and found[1][1]["retry-after"] and ways == ["short"]*6


def test_whether_it_lives_is_said_at_once(app, ways, monkeypatch):
    taken = []
    monkeypatch.setattr(Wire, "answer", lambda self, body, answer=Wire.answer: (taken.append(answer(self, body)), taken[-1])[1])
    [reply] = ask(app, make_request("/livez", b"", verb="GET"))
    assert reply[0] == 200 and json.loads(reply[2]) == {"live": True} and taken == [True] and reply[1]["x-content-type-options"] == "nosniff"
    assert 'cvops_requests_total{path="/livez",status="200",version="1"} 1.0' in app.metrics.render()[0].decode()


def test_a_turn_answers_no_more_than_a_line_holds(app, ways, monkeypatch):
    found = ask(app, PLAIN["raw"]*(app.gate.most + 3), count=app.gate.most + 3)
    assert ways == ["short"]*app.gate.most and {reply[0] for reply in found} == {200}, "what is beyond goes the usual way, where a line is kept"
    app.gate.inside = app.gate.most
    assert ask(app, PLAIN["raw"])[0][0] == 429
    app.gate.inside = 0


def test_the_short_way_is_shut_for_a_moment_when_too_many_came():
    turn = Turn()
    turn.count = WAITING
    assert not turn.is_over()
    turn.count += 1
    assert turn.is_over()
    turn.count = 0
    assert turn.is_over() and turn.shut > 0
    turn.shut = 0.
    assert not turn.is_over()


def test_the_rest_of_a_body_is_waited_for(app, ways, monkeypatch):
    request = PLAIN["raw"]
    assert [reply[0] for reply in ask(app, request[:300], request[300:900], request[900:] + request[:-1], request[-1:], count=2)] == [200, 200] and ways == ["short"]*2
    monkeypatch.setattr(room, "UPLOADS", 0)     # too many wait
    assert ask(app, request[:300], request[300:])[0][0] == 200 and ways[2:] == ["usual"]
    assert asyncio.run(talk(app, [request[:300]], 0)) == [], "who leaves in the middle is forgotten"


def test_a_slow_version_takes_the_usual_way(app, ways):
    app.classifier.seconds = .03
    assert ask(app, PLAIN["raw"])[0][0] == 200 and ways == []


def test_an_end_is_told(app, ways):
    app.closing = True
    assert ask(app, PLAIN["raw"])[0][1]["connection"] == "close" and ways == []


def test_while_others_wait_an_image_is_measured_before_its_answer(app, ways, tmp_path):
    app.classifier.seconds, app.gate.inside = .03, app.threads      # one waits, and a slow network makes it the usual way
    ask(app, make_request("/predict", JPEG, "image/jpeg", X_Request_Id="busy"))
    [line] = [line for path in (tmp_path/"log").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert "measured" not in json.loads(line) and json.loads(line)["brightness"] > 0 and app.gate.inside == app.threads
    app.gate.inside = 0
