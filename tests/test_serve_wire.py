"The short way answers what the usual way answers, checks what it checks, counts what it counts, and takes nothing that is not plain."
import asyncio
import json
import shutil
import socket
import time
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
from cvops_wb.serve.service.door import Door, read_head
from cvops_wb.serve.service.state import LINE, SHORT
from cvops_wb.serve.service.wire import Refusals, Turn, Wire

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
    taken, conclude, replay, refuse = [], room.conclude, Wire.replay, Door.refuse

    def now(app, request, path, reply):
        if path != "/livez": taken.append("short")
        return conclude(app, request, path, reply)

    def turn_away(self, data):
        done = refuse(self, data)
        if done: taken.append("door")
        return done
    monkeypatch.setattr(room, "conclude", now)
    monkeypatch.setattr(Door, "refuse", turn_away)
    monkeypatch.setattr(Wire, "replay", lambda self, held: (taken.append("usual"), replay(self, held))[1])
    return taken


async def talk(app, chunks: list[bytes], count: int = 1, pause: float = .02) -> list[tuple[int, dict, bytes]]:
    "Replies to what is written on one connection."
    config, state, turn, refusals = Config(app, lifespan="off", log_config=None), ServerState(), Turn(), Refusals(app)
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: Wire(app, turn, refusals, config=config, server_state=state, app_state={}), "127.0.0.1", 0)
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


async def talk_together(app, requests: list[bytes], turn=None, early: int = 0) -> list[tuple[int, dict, bytes]]:
    "The first reply to each of some requests, all there before the loop hears of one, each on a connection of its own, in the order in which they are answered; `early` callers leave at once."
    config, state, turn, refusals = Config(app, lifespan="off", log_config=None), ServerState(), turn or Turn(), Refusals(app)
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: Wire(app, turn, refusals, config=config, server_state=state, app_state={}), "127.0.0.1", 0)
    lanes, found = [await asyncio.open_connection(*server.sockets[0].getsockname()) for _ in requests], []

    async def hear(reader):
        data = await reader.readuntil(b"\r\n\r\n")
        status, headers, _ = split_head(data)
        found.append((status, headers, await reader.readexactly(int(headers["content-length"]))))
    await asyncio.sleep(.05)
    for (_, writer), request in zip(lanes, requests, strict=True): writer.get_extra_info("socket")._sock.sendall(request)
    for _, writer in lanes[len(lanes) - early:]: writer.transport.abort()
    async with asyncio.timeout(20): await asyncio.gather(*(hear(reader) for reader, _ in lanes[:len(lanes) - early]))
    for _, writer in lanes: writer.close()
    server.close()
    await asyncio.sleep(.05)
    return found


@pytest.fixture()
def slow(app, monkeypatch):
    "What happened in which turn of the loop: answers of 5 ms, refusals, whether it lives."
    seen, tell, conclude, refuse = [], room.tell, room.conclude, Door.refuse

    def answer(*given):
        seen.append("answer")
        time.sleep(.005)
        return tell(*given)

    def turn_away(self, data):
        done = refuse(self, data)
        if done: seen.append("refusal")
        return done

    def live(app, request, path, reply):
        if path == "/livez": seen.append("live")
        return conclude(app, request, path, reply)
    monkeypatch.setattr(room, "tell", answer)
    monkeypatch.setattr(room, "conclude", live)
    monkeypatch.setattr(Door, "refuse", turn_away)
    return seen


LIVE = make_request("/livez", b"", verb="GET")


def test_of_many_that_come_together_a_line_is_answered_and_the_others_are_told_at_once(app, slow):
    "Counted, not timed: no refusal and nobody who asks whether it lives waits for more than the answer that is under way."
    line = LINE
    found = asyncio.run(talk_together(app, [*[PLAIN["raw"]]*(5*line), LIVE]))
    answered = slow.count("answer")
    assert line <= answered <= line + 3 and slow.count("refusal") == 5*line - answered and [status for status, *_ in found].count(200) == answered + 1
    assert slow.index("live") < 5*line and slow[:slow.index("live")].count("answer") <= 2, slow
    last = max(k for k, what in enumerate(slow) if what == "refusal")
    assert slow[:last].count("answer") <= 2 and app.gate.inside == 0, slow
    for status, headers, body in found:
        if status == 429: assert headers["retry-after"] == "1" and json.loads(body)["reason"] == "busy" and json.loads(body)["request_id"] == headers["x-request-id"]


def test_answering_all_of_a_turn_in_it_is_found(app, slow, monkeypatch):
    "The planted bug: whoever has come is answered before anybody else is heard."
    monkeypatch.setattr(Turn, "add", lambda self, loop, answer: answer())
    asyncio.run(talk_together(app, [*[PLAIN["raw"]]*LINE, LIVE]))
    assert slow[:slow.index("live")].count("answer") > 2


def test_new_connections_are_let_in_before_the_next_answer(app, slow, monkeypatch):
    "uvloop accepts one in each turn: who stands before the door does not wait until everybody within has been answered."
    uvloop = pytest.importorskip("uvloop")
    monkeypatch.setattr(Wire, "connection_made", lambda self, transport, made=Wire.connection_made: (slow.append("in"), made(self, transport))[1])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner: found = runner.run(crowd(app, 80))
    third = [k for k, what in enumerate(slow) if what == "answer"][2]
    assert sorted(found) == [200]*found.count(200) + [429]*found.count(429) and len(found) == 80 and found.count(200) > LINE
    assert slow[:third].count("in") > 15, slow


async def crowd(app, count: int) -> list[int]:
    "Statuses of callers who all stand before the door with their request when the loop begins to hear."
    listener, request = socket.create_server(("127.0.0.1", 0), backlog=count), PLAIN["raw"]
    callers = [socket.create_connection(listener.getsockname()) for _ in range(count)]
    for caller in callers: caller.sendall(request)
    config, turn, state, refusals = Config(app, lifespan="off", log_config=None), Turn(), ServerState(), Refusals(app)
    config.load()
    server = await asyncio.get_running_loop().create_server(lambda: Wire(app, turn, refusals, config=config, server_state=state, app_state={}), sock=listener)
    replies = [await asyncio.to_thread(caller.recv, 4096) for caller in callers]
    for caller in callers: caller.close()
    server.close()
    await asyncio.sleep(.05)
    return [int(reply[9:12]) for reply in replies]


def test_who_leaves_the_line_is_not_answered(app, slow):
    early = 3
    found = asyncio.run(talk_together(app, [PLAIN["raw"]]*LINE, early=early))
    assert len(found) == LINE - early and slow.count("answer") < LINE and app.gate.inside == 0


def test_a_line_on_one_connection_keeps_its_order(app, ways):
    "What is sent behind a request that stands in the line waits for it, and goes the usual way."
    requests = [make_request("/predict", JPEG, "image/jpeg", X_Request_Id=f"r{k}") for k in range(LINE + 3)]
    found = ask(app, b"".join(requests), count=len(requests))
    assert [headers["x-request-id"] for _, headers, _ in found] == [f"r{k}" for k in range(len(requests))] and {status for status, *_ in found} == {200}


def test_the_door_says_what_the_usual_way_says(app, ways, monkeypatch):
    app.gate.inside, request = LINE, make_request("/predict", JPEG, "image/jpeg", X_Request_Id="Mine.1")
    [door] = ask(app, request)
    monkeypatch.setattr(Door, "refuse", lambda self, data: False)
    [parsed] = ask(app, request)
    [usual] = ask(app, make_request("/predict", JPEG, "image/jpeg", X_Request_Id="Mine.1", Connection="close"))
    app.gate.inside = 0
    assert ways == ["door", "short"] and door[0] == parsed[0] == usual[0] == 429 and door[2] == parsed[2] == usual[2]
    told = [{name: value for name, value in headers.items() if name not in ("date", "connection")} for _, headers, _ in (door, parsed, usual)]
    assert told[0] == told[1] == told[2] and told[0]["retry-after"] == "1"


def test_what_the_door_has_refused_is_skipped_and_counted(app, ways, monkeypatch):
    "A body that comes in parts, the next request on the same connection, and a token that nobody asked for."
    monkeypatch.setattr(Refusals, "EVERY", .001)
    app.gate.inside, request = LINE, PLAIN["raw"]
    found = ask(app, request[:500], request[500:900], request[900:], request, count=2)
    app.gate.inside = 0
    assert [status for status, *_ in found] == [429, 429] and ways == ["door", "door"]
    text = app.metrics.render()[0].decode()
    assert 'cvops_requests_total{path="/predict",status="429",version="1"} 2.0' in text and 'cvops_refusals_total{reason="busy"} 2.0' in text
    assert asyncio.run(talk_full_then_free(app, request)) == [429, 200]


async def talk_full_then_free(app, request: bytes) -> list[int]:
    "Statuses of two requests on one connection; there is room for the second, whose beginning comes with the end of the first."
    app.gate.inside = LINE
    async def free():
        await asyncio.sleep(.03)
        app.gate.inside = 0
    freed = asyncio.ensure_future(free())
    found = await talk(app, [request[:500], request[500:] + request], 2, pause=.06)
    await freed
    return [status for status, *_ in found]


@pytest.mark.parametrize("head", [b"GET /predict HTTP/1.1\r\nContent-Length: 5\r\n", b"POST /predict HTTP/1.0\r\nContent-Length: 5\r\n", b"POST /predict HTTP/1.1\r\nHost: here\r\n", b"POST /explain HTTP/1.1\r\nContent-Length: 5\r\n",
                                  b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"POST /predict HTTP/1.1\r\nHost: a\nContent-Length: 5\r\n",
                                  b"POST /predict HTTP/1.1\r\nContent-Length: 5\r\nConnection: close\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: five\r\n", b"POST /predict HTTP/1.1\r\nContent-Length : 5\r\n"])
def test_the_door_leaves_a_head_that_is_not_plain_alone(head): assert read_head(head) is None


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
