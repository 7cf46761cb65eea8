"""Bad input against a real service: each case is refused with a reason or answered, nothing fails inside, no worker dies.

A sample runs in `make test`; CVOPS_FULL=1 sends 10,000 images and 5,000 requests made from the service's own OpenAPI document.
"""
import base64
import io
import json
import os
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter

import numpy as np
import psutil
import pytest
from PIL import Image
from serve_toy import photograph

from cvops_wb.serve import Client, service_running
from cvops_wb.serve.clients import CallFailed

FULL = bool(os.environ.get("CVOPS_FULL"))
COUNT = 10_000 if FULL else 400
REASONS = {"not_an_image", "truncated", "unsupported_format", "too_large", "too_many_pixels", "animated", "empty", "damaged", "bomb", "bad_mode"}


def save(kind, mode="RGB", size=(96, 64), **options):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
def png(width, height, *chunks): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + b"".join(chunks) + chunk(b"IEND", b"")


SEEDS = {"jpeg": save("JPEG"), "progressive": save("JPEG", progressive=True), "cmyk": save("JPEG", "CMYK"), "grey": save("JPEG", "L"), "png": save("PNG"), "palette": save("PNG", "P"),
         "alpha": save("PNG", "RGBA"), "webp": save("WEBP"), "lossless": save("WEBP", lossless=True), "tiff": save("TIFF"), "bmp": save("BMP"), "gif": save("GIF"), "ico": save("ICO")}
EXIF = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + bytes(400)      # says sixty thousand entries
FIXED = {
    "nothing": b"", "one byte": b"\xff", "text": b"hello" * 100, "html": b"<html><script>alert(1)</script></html>", "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n", "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj", "zip": b"PK\x03\x04" + bytes(100), "elf": b"\x7fELF" + bytes(200),
    "pickle": b"\x80\x04\x95" + b"cposix\nsystem\n(S'touch /tmp/pwned'\ntR.", "bomb of a width": png(100_000, 100_000, chunk(b"IDAT", zlib.compress(bytes(1000)))),
    "bomb of a ratio": png(20_000, 20_000, chunk(b"IDAT", zlib.compress(bytes(20_001*60_000//50), 9))), "text chunk bomb": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000_000), 9)), chunk(b"IDAT", zlib.compress(bytes(200)))),
    "icc bomb": png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60_000_000), 9)), chunk(b"IDAT", zlib.compress(bytes(200)))), "no data": png(8, 8), "zero wide": png(0, 8, chunk(b"IDAT", zlib.compress(b""))),
    "negative size": png(2**31 + 5, 5, chunk(b"IDAT", b"")), "exif abuse": SEEDS["jpeg"][:2] + b"\xff\xe1" + struct.pack(">H", len(EXIF) + 2) + EXIF + SEEDS["jpeg"][2:],
    "icc of garbage": SEEDS["jpeg"][:2] + b"\xff\xe2" + struct.pack(">H", 216) + b"ICC_PROFILE\0\x01\x01" + bytes(range(200)) + SEEDS["jpeg"][2:], "endless segments": SEEDS["jpeg"][:2] + b"\xff\xe0\x00\x02"*9000,
    "polyglot of jpeg and zip": SEEDS["jpeg"] + b"PK\x03\x04" + bytes(300), "polyglot of gif and script": b"GIF89a/*" + b"\0"*20 + b"*/=1;alert(1)", "two jpegs": SEEDS["jpeg"]*2, "jpeg of a webp": SEEDS["webp"],
    "tiff of a huge strip": b"II*\0\x08\0\0\0\x01\0\x11\x01\x04\0\xff\xff\xff\x7f\xff\xff\xff\x7f\0\0\0\0", "riff cut short": b"RIFF\xff\xff\xff\xffWEBPVP8 ", "dark heart": b"\xff\xd8" + b"\xff"*5000,
}


def mutate(rng):
    "A damaged image: bits turned, pieces cut, doubled, zeroed, lengths changed."
    data = bytearray(list(SEEDS.values())[rng.integers(len(SEEDS))])
    for _ in range(rng.integers(1, 5)):
        place, length = int(rng.integers(len(data))), int(rng.integers(1, 64))
        way = rng.integers(6)
        if way == 0: data[place] ^= 1 << int(rng.integers(8))
        elif way == 1: del data[place:]
        elif way == 2: data[place:place] = data[place:place + length]
        elif way == 3: data[place:place + length] = bytes(min(length, len(data) - place))
        elif way == 4: data[place:place + length] = rng.integers(0, 256, length).astype(np.uint8).tobytes()
        else: data[place:place + 2] = b"\xff\xff"
        if not data: return b"\0"
    return bytes(data)


@pytest.fixture(scope="module")
def service(bench, bento):
    with service_running(bento, bench.root/"log", workers=1, output=bench.root/"service.log") as service: yield service


def find_workers(service):
    "Process ids of all that serve."
    return sorted(child.pid for child in psutil.Process(service.process.pid).children(recursive=True))


def peak(service):
    "The most memory that the worker ever held, bytes."
    return max(int(line.split()[1])*1024 for pid in find_workers(service) for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM"))


def put(service, data, kind="image/jpeg", path="/predict", **headers):
    "Status and reply."
    request = urllib.request.Request(service.url + path, data=data, headers={"content-type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply: return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as e: return e.code, json.loads(e.read())


def judge(service, cases, ask=put):
    "Send all; those that were neither answered nor refused with a reason."
    before, wrong = find_workers(service), []
    for name, data in cases:
        status, told = ask(service, data)
        if not (status == 200 and told["label"] or 400 <= status < 500 and told.get("reason")): wrong.append((name, status, told))
    assert find_workers(service) == before, "a worker died"
    return wrong


@pytest.mark.parametrize("name", FIXED)
def test_a_hostile_file_is_refused_or_answered(service, name):
    assert judge(service, [(name, FIXED[name])]) == []


SENT = {"raw": lambda data: (data, "application/octet-stream", "/predict"), "wrong type": lambda data: (data, "image/png", "/predict"),
        "form": lambda data: (b'--edge\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + data + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge", "/predict"),
        "json": lambda data: (json.dumps({"image": base64.b64encode(data).decode()}).encode(), "application/json", "/predict"), "explained": lambda data: (data, "image/jpeg", "/explain")}


@pytest.mark.parametrize("how", ["form", "json", "explained"])
@pytest.mark.parametrize("name", FIXED)
def test_a_hostile_file_in_another_cover(service, name, how):
    body, kind, path = SENT[how](FIXED[name])
    request = urllib.request.Request(service.url + path, data=body, headers={"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply: assert reply.status == 200 and reply.read()
    except urllib.error.HTTPError as e: assert 400 <= e.code < 500 and json.loads(e.read())["reason"]


def test_one_of_a_batch_may_be_hostile(service):
    "All of them at once, between two good ones: each has its word, and the good ones are answered."
    files = [photograph("red"), *list(FIXED.values())[1:29], photograph("blue")]
    status, told = put(service, json.dumps({"images": [base64.b64encode(data).decode() for data in files]}).encode(), "application/json", "/predict/batch")
    answers = told["answers"]
    assert status == 200 and [answers[0]["label"], answers[-1]["label"]] == ["red", "blue"] and all("label" in a or 400 <= a["status"] < 500 and a["reason"] for a in answers)


def damage(rng):
    "A mutant of anything that we have: of a small image, of a photograph of up to a megabyte, of a crafted file."
    way = rng.integers(10)
    if way < 7: return mutate(rng)
    data = bytearray(LARGE[rng.integers(len(LARGE))] if way == 9 else list(FIXED.values())[1 + rng.integers(len(FIXED) - 1)])
    for _ in range(rng.integers(1, 9)): data[int(rng.integers(len(data)))] = int(rng.integers(256))
    return bytes(data[:rng.integers(1, len(data) + 1)]) if rng.integers(4) == 0 else bytes(data)


LARGE = [photograph("green", kind, (1000, 750), k) for k, kind in enumerate(("JPEG", "WEBP", "BMP", "TIFF"))]
LARGE = [data for data in LARGE if len(data) <= 3_000_000]


def test_the_campaign_of_bad_input(service):
    """Mutants of images and of crafted files, raw, in forms, as Base64: refused with a reason or answered; how long a refusal takes is told, and the peak of memory
    stays within a fifth of that of valid photographs."""
    rng, before = np.random.default_rng(11), find_workers(service)
    for k in range(40 if FULL else 12):
        for kind in ("JPEG", "PNG", "WEBP"):
            data = photograph(seed=k, kind=kind, size=(1000, 750))
            for how in ("raw", "form", "json"): put(service, *SENT[how](data))
    most, seconds, statuses, wrong = peak(service), [], {}, []
    for k in range(COUNT):
        data, how = damage(rng), ("raw", "wrong type", "form", "json")[k % 4]
        begin = time.perf_counter()
        status, told = put(service, *SENT[how](data))
        if status != 200 and len(data) <= 1_000_000: seconds.append(time.perf_counter() - begin)
        statuses[status] = statuses.get(status, 0) + 1
        if not (status == 200 and told["label"] or 400 <= status < 500 and told.get("reason")): wrong.append((how, status, told, data[:40]))
    refused = np.sort(seconds)*1e3
    print(f"\n{COUNT} bad inputs: {statuses}; refusals of up to 1 MB p50 {refused[len(refused)//2]:.1f} ms, p99 {refused[int(.99*len(refused))]:.1f} ms; peak {peak(service)/most:.3f} of a valid run's {most/1e6:.0f} MB")
    assert wrong == [] and find_workers(service) == before and peak(service) <= 1.2*most, (wrong[:3], peak(service)/most)
    assert put(service, photograph())[0] == 200


def test_a_service_that_fails_inside_would_be_seen(service):
    "The planted bug: a decoder that lets an exception out, here as a reply of 500."
    def ask(service, data): return (500, {"reason": "internal"}) if data[:2] == b"\xff\xd8" else put(service, data)
    assert judge(service, [("whole", SEEDS["jpeg"]), ("other", SEEDS["png"])], ask) == [("whole", 500, {"reason": "internal"})]


@pytest.mark.parametrize("path", ["/predict", "/v2/models/toy/infer"])
def test_two_hundred_megabytes_are_not_read(service, path):
    "The length that is said is believed; a body that says none is cut at the limit. The service takes no such memory."
    before = max(psutil.Process(pid).memory_info().rss for pid in find_workers(service))
    import http.client
    address = service.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest("POST", path)
    for name, value in {"content-type": "application/octet-stream", "content-length": "200000000"}.items(): connection.putheader(name, value)
    connection.endheaders(bytes(1_000_000))     # the refusal is there before the rest has been sent
    reply = connection.getresponse()
    assert reply.status == 413 and json.loads(reply.read())["reason"] == "too_large"
    connection.close()
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request("POST", path, body=(bytes(1_000_000) for _ in range(200)), headers={"content-type": "application/octet-stream"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError): pass       # it hung up on us, which is an answer too
    finally: connection.close()
    assert max(psutil.Process(pid).memory_info().rss for pid in find_workers(service)) < before + 80e6


@pytest.mark.parametrize("kind, body", [
    ("multipart/form-data", b"x"), ("multipart/form-data; boundary=", b"--\r\n"), ("multipart/form-data; boundary=" + "b"*300, b"x"), ("multipart/form-data; boundary=a", b"--a\r\n\r\n"),
    ("multipart/form-data; boundary=a", b"--a\r\ncontent-disposition: form-data; name=file\r\n"*3000), ("multipart/form-data; boundary=a", b"--a\r\n" + b"x: y\r\n"*20_000 + b"\r\n\r\n--a--"),
    ("multipart/form-data; boundary=a", b"--a\r\ncontent-disposition: form-data; name=\"file\"; filename=\"../../etc/passwd\"\r\n\r\nhello\r\n--a--"), ("application/x-python-pickle", FIXED["pickle"]),
    ("application/json", b'{"image": "http://127.0.0.1/secret"}'), ("text/plain", b"x"), ("", b"x"), ("image/svg+xml", FIXED["svg"]), ("application/vnd.bentoml+pickle", FIXED["pickle"]),
])
def test_bodies_that_make_no_sense(service, kind, body):
    status, told = put(service, body, kind)
    assert 400 <= status < 500 and told["reason"] and not os.path.exists("/tmp/pwned")


def test_the_service_keeps_to_its_own_description(service):
    "Schemathesis sends what the OpenAPI document allows, and what it forbids: never an error of the server."
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    document = json.loads(urllib.request.urlopen(service.url + "/openapi.json").read())
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 18
    each, least, seen = (800, 5_000, []) if FULL else (12, 120, [])     # routes without a choice have one case each
    for operation in operations:
        @settings(max_examples=each, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(case=operation.as_strategy())
        def send(case):
            response = case.call(base_url=service.url)
            seen.append((case.method, case.path, response.status_code))
            assert response.status_code < 500, (case.method, case.path, response.text[:300])
        send()
    print(f"\n{len(seen)} requests out of the description, of {len(operations)} operations: {dict(Counter(status for *_, status in seen))}")
    assert len(seen) >= least
    with Client(service.url) as client: assert client.predict(photograph())["label"]


def test_the_client_tells_the_reason(service):
    with Client(service.url) as client, pytest.raises(CallFailed) as caught: client.predict(FIXED["svg"])
    assert caught.value.status == 422 and caught.value.reason
