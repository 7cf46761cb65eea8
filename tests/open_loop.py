"""A load of HTTP requests whose times are fixed before it begins (open loop): latency counts from the scheduled time, so a server that stalls is not spared.

`ask` is one connection that waits for each answer; `Load` is as many as the schedule needs. Both speak HTTP/1.1 over sockets, for a client library would cost more than the servers."""
import asyncio
import re
import select
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


LENGTH = re.compile(rb"\r\ncontent-length: (\d+)")

class Lane:
    "One kept connection of a `Storm`."
    __slots__ = ("busy", "data", "due", "probe", "socket")

    def __init__(self, port: int):
        self.socket, self.due, self.data, self.probe, self.busy = socket.create_connection(("127.0.0.1", port), 10), 0., b"", False, False
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)


class Storm:
    "An open loop without tasks or futures, for loads at which `Load` would be the slower side: one thread, one `epoll`, thirty microseconds a request. /livez is asked in between, twenty times a second, on connections of its own."

    def __init__(self, port: int, requests: list[bytes], lanes: int = 64):
        self.port, self.requests, self.epoll = port, requests, select.epoll()
        self.lanes, self.idle, self.lag = {}, {False: [], True: []}, []
        self.heard, self.probes = [], []        # of the load, of /livez
        for _ in range(lanes): self.idle[False].append(self.open())

    def open(self) -> Lane:
        lane = Lane(self.port)
        self.lanes[lane.socket.fileno()] = lane
        self.epoll.register(lane.socket, select.EPOLLIN)
        return lane

    def send(self, due: float, request: bytes, probe: bool = False) -> None:
        "One request, on time or as soon as may be; `lag` keeps how late it was."
        lane = self.idle[probe].pop() if self.idle[probe] else self.open()
        lane.due, lane.data, lane.probe, lane.busy = due, b"", probe, True
        self.lag.append(time.perf_counter() - self.begin - due)
        try: sent = lane.socket.send(request)
        except OSError as e: return self.end(lane, 0, str(e))
        if sent < len(request):     # its buffer is full: the server does not read
            lane.socket.setblocking(True)
            lane.socket.sendall(request[sent:])
            lane.socket.setblocking(False)

    def end(self, lane: Lane, status: int, why: str = "", head: bytes = b"", kept: bool = False) -> None:
        "What became of a request."
        wait = time.perf_counter() - self.begin - lane.due
        if lane.busy: (self.probes if lane.probe else self.heard).append((lane.due, status, wait, head, why))
        else: self.idle[lane.probe].remove(lane)        # the server let a kept connection go
        lane.busy = False
        if kept: return self.idle[lane.probe].append(lane)
        del self.lanes[lane.socket.fileno()]
        lane.socket.close()

    def hear(self, lane: Lane) -> None:
        "What has come on a connection."
        try: part = lane.socket.recv(262144)
        except OSError as e: return self.end(lane, 0, str(e))
        lane.data = data = lane.data + part
        if not part: return self.end(lane, 0, "closed")
        at, length = data.find(b"\r\n\r\n"), LENGTH.search(data)     # our service says it of each answer
        if at > 0 and length and len(data) >= at + 4 + int(length[1]): self.end(lane, int(data[9:12]), "", data[:at], b"\r\nconnection: close" not in data)

    def run(self, rate: float, seconds: float, patience: float = 30.) -> list[Reply]:
        "So many requests a second; returns when each has its reply."
        probe, number, probed, self.begin = make_request("/livez", b"", verb="GET"), 0, 0, time.perf_counter()
        while (now := time.perf_counter() - self.begin) < seconds + patience and (now < seconds or len(self.heard) < number or len(self.probes) < probed):
            while now < seconds and number/rate <= now:
                self.send(number/rate, self.requests[number % len(self.requests)])
                number += 1
                if number % 8 == 0: break       # listen in between
            if now < seconds and probed/20 <= now:
                self.send(probed/20, probe, True)
                probed += 1
            for file, _ in self.epoll.poll(0 if now < seconds else .001): self.hear(self.lanes[file])
        for lane in [lane for lane in self.lanes.values() if lane.busy]: self.end(lane, 0, "no answer")
        self.probes = [Reply(due, status, wait) for due, status, wait, *_ in self.probes]
        return [Reply(due, status, wait, split_head(head + b"\r\n\r\n")[1] if head else {}, why) for due, status, wait, head, why in self.heard]

    def close(self) -> None:
        for lane in self.lanes.values(): lane.socket.close()
        self.epoll.close()
