"""A load of HTTP requests whose times are fixed before it begins (open loop): latency counts from the scheduled time, so a server that stalls is not spared.

`ask` is one connection that waits for each answer; `Load` is as many as the schedule needs. Both speak HTTP/1.1 over sockets, for a client library would cost more than the servers."""
import asyncio
import socket
import time
from dataclasses import dataclass, field
from itertools import cycle


def make_request(path: str, body: bytes, kind: str = "application/octet-stream", host: str = "127.0.0.1", verb: str = "POST", **headers: str) -> bytes:
    "One request, ready to be written."
    lines = [f"{verb} {path} HTTP/1.1", f"Host: {host}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    if body: lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def split_head(data: bytes) -> tuple[int, dict[str, str], int] | None:
    "Status, headers and where the body begins; None if the head is not whole."
    end = data.find(b"\r\n\r\n")
    if end < 0: return None
    first, *rest = data[:end].decode("latin-1").split("\r\n")
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}, end + 4


def is_whole(data: bytes, headers: dict[str, str], at: int) -> bool:
    "Whether the body has come."
    if "content-length" in headers: return len(data) - at >= int(headers["content-length"])
    return headers.get("transfer-encoding", "") == "chunked" and data.endswith(b"0\r\n\r\n")


class Wire:
    "One kept connection of a caller that waits."

    def __init__(self, port: int): self.socket = socket.create_connection(("127.0.0.1", port), 60); self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    def close(self): self.socket.close()

    def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        "Status, headers, body."
        self.socket.sendall(request)
        data, head = b"", None
        while head is None or not is_whole(data, head[1], head[2]):
            part = self.socket.recv(262144)
            if not part: raise ConnectionError("the server closed the connection")
            data += part
            head = head or split_head(data)
        return head[0], head[1], data[head[2]:]


def ask_at(port: int, requests: list[bytes], rate: float, seconds: float) -> list[float]:
    "One client at a fixed rate: seconds from each scheduled time to its answer; all must be 200."
    wire, waits, number, begin = Wire(port), [], 0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        due = begin + number/rate
        time.sleep(max(0., due - time.perf_counter()))
        status, *_ = wire.ask(requests[number % len(requests)])
        waits.append(time.perf_counter() - due)
        number += 1
        assert status == 200, status
    wire.close()
    return waits


@dataclass
class Reply:
    "What became of one request."
    due: float              # seconds after the begin
    status: int             # 0: no reply
    wait: float             # seconds from `due`
    headers: dict[str, str] = field(default_factory=dict)
    why: str = ""


class Caller(asyncio.Protocol):
    "One connection: sends a request, hands back the reply."

    def __init__(self): self.data, self.head, self.future, self.transport, self.lost = b"", None, None, None, False
    def connection_made(self, transport): self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.head = self.head or split_head(self.data)
        if not self.head or not is_whole(self.data, *self.head[1:]) or self.future is None or self.future.done(): return
        self.future.set_result((self.head[0], self.head[1]))

    def connection_lost(self, error) -> None:
        self.lost = True
        if self.future and not self.future.done(): self.future.set_exception(ConnectionError(str(error or "closed")))

    async def ask(self, request: bytes) -> tuple[int, dict[str, str]]:
        self.data, self.head, self.future = b"", None, asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.future


class Load:
    "Requests to one port over as many kept connections as are needed, `most` at once."

    def __init__(self, port: int, requests: list[bytes], most: int = 500, patience: float = 30.):
        self.port, self.requests, self.patience = port, cycle(requests), patience
        self.idle, self.replies, self.room = [], [], asyncio.Semaphore(most)

    async def send(self, due: float, begin: float, request: bytes) -> None:
        "One request, counted whatever happens."
        caller = None
        try:
            async with self.room, asyncio.timeout(self.patience):
                while self.idle and (caller := self.idle.pop()).lost: caller = None
                if caller is None: _, caller = await asyncio.get_running_loop().create_connection(Caller, "127.0.0.1", self.port)
                status, headers = await caller.ask(request)
        except (OSError, TimeoutError) as e: return self.replies.append(Reply(due, 0, time.perf_counter() - begin - due, why=type(e).__name__ + f" {e}"))
        self.replies.append(Reply(due, status, time.perf_counter() - begin - due, headers))
        if headers.get("connection", "") != "close" and not caller.lost: self.idle.append(caller)

    async def run(self, rate: float, seconds: float) -> list[Reply]:
        "So many requests a second; returns when each has its reply."
        begin, number, tasks = time.perf_counter(), 0, set()
        while (due := number/rate) < seconds:
            pause = due - (time.perf_counter() - begin)
            if pause > 0: await asyncio.sleep(pause)
            elif number % 32 == 0: await asyncio.sleep(0)
            task = asyncio.ensure_future(self.send(due, begin, next(self.requests)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        while tasks: await asyncio.gather(*tasks)
        return self.replies

    async def saturate(self, clients: int, seconds: float) -> float:
        "Closed loop: so many clients that ask again at once; answers a second."
        begin, done = time.perf_counter(), 0

        async def go() -> None:
            nonlocal done
            _, caller = await asyncio.get_running_loop().create_connection(Caller, "127.0.0.1", self.port)
            while time.perf_counter() < begin + seconds:
                status, _ = await caller.ask(next(self.requests))
                done += status == 200
            caller.transport.close()
        await asyncio.gather(*(go() for _ in range(clients)))
        return done/(time.perf_counter() - begin)

    def close(self) -> None:
        for caller in self.idle: caller.transport.close()
