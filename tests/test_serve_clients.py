"The Python client against a real service: more callers than it takes, a worker that is killed, nobody there, somebody who never answers."
import asyncio
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve_toy import photograph

from cvops_wb.serve import AsyncClient, Client, read_predictions, service_running
from cvops_wb.serve.clients import CallFailed

pytestmark = pytest.mark.slow
CALLS = 50


@pytest.fixture(scope="module")
def service(bench, bento):
    with service_running(bento, bench.root/"log", workers=1, output=bench.root/"service.log", env={"CVOPS_SERVE_THREADS": "1"}) as service: yield service


@pytest.fixture(scope="module")
def large() -> bytes:
    "An image that takes a while."
    return photograph("blue", size=(2400, 1600))


def count_refused(client, reason: str = "busy") -> int:
    "How many calls the service has refused."
    lines = client.http.get("/metrics").text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f'cvops_refusals_total{{reason="{reason}"}}')))


def ask_in_threads(url: str, image: bytes, names: list[str]) -> list[tuple[dict, float]]:
    def ask(name: str) -> tuple[dict, float]:
        begin = time.monotonic()
        return client.predict(image, request_id=name), time.monotonic() - begin
    with Client(url, timeout=60., retries=30) as client, ThreadPoolExecutor(CALLS) as pool: return list(pool.map(ask, names))


def ask_in_a_loop(url: str, image: bytes, names: list[str]) -> list[tuple[dict, float]]:
    async def go():
        async def ask(name: str) -> tuple[dict, float]:
            begin = time.monotonic()
            return await client.predict(image, request_id=name), time.monotonic() - begin
        async with AsyncClient(url, timeout=60., retries=30) as client: return await asyncio.gather(*(ask(name) for name in names))
    return asyncio.run(go())


@pytest.mark.parametrize("ask", [ask_in_threads, ask_in_a_loop])
def test_who_is_refused_comes_again_when_told_to(bench, service, large, ask):
    "Fifty at once where nine are taken: the rest wait for as long as the service says, and all are answered, each of them once."
    names = [f"{ask.__name__}-{k}" for k in range(CALLS)]
    with Client(service.url) as client:
        before = count_refused(client)
        told = ask(service.url, large, names)
        refused = count_refused(client) - before
    assert [said["request_id"] for said, _ in told] == names and all(said["label"] == "blue" for said, _ in told)
    assert refused >= CALLS - 9 - 1 - len(told)//2 > 0 and sum(took >= 1 for _, took in told) > 0, "Retry-After says one second"
    logged = [name for name in read_predictions(bench.root/"log").request_id if name in names]
    assert sorted(logged) == sorted(names)


def test_without_tries_a_refusal_is_told_at_once(service, large):
    with Client(service.url, retries=0) as client, ThreadPoolExecutor(CALLS) as pool:
        futures = [pool.submit(client.predict, large) for _ in range(CALLS)]
        errors = [error for future in futures if (error := future.exception())]
    assert errors and {(error.status, error.reason) for error in errors} == {(429, "busy")}


def test_a_killed_worker_is_not_noticed(service):
    "The lone worker dies in the middle: every call is answered, by the one that follows it."
    [worker] = [int(pid) for pid in subprocess.run(["ps", "-o", "pid=", "--ppid", str(service.process.pid)], capture_output=True, text=True).stdout.split()]
    with Client(service.url, timeout=40., retries=20) as client, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.predict, photograph("red")) for _ in range(60)]
        futures[4].result()
        os.kill(worker, signal.SIGKILL)
        futures += [pool.submit(client.predict, photograph("red")) for _ in range(4)]
        assert {future.result()["label"] for future in futures} == {"red"}


def test_a_mistake_is_not_made_again(service):
    with Client(service.url, retries=50) as client:
        before = count_refused(client, "not_an_image")
        with pytest.raises(CallFailed, match="not_an_image") as error: client.predict(b"no image")
        assert error.value.status == 422 and count_refused(client, "not_an_image") == before + 1


@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_who_never_answers_is_given_up_in_time(make):
    "The time-out is for the call with all its tries."
    async def go(client):
        async with client: return await client.predict(b"x")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        begin, client = time.monotonic(), make(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=.6, retries=9)
        with pytest.raises(CallFailed, match="does not answer") as error: client.predict(b"x") if make is Client else asyncio.run(go(client))
    assert error.value.status == 0 and .5 <= time.monotonic() - begin < 10
