"""A warm process that forks one ingest a job, so that thousands of them can be killed in minutes.

Jobs come as lines of JSON; each answer is `pid`, then the exit status. A child writes what it acknowledges to a file of its
own outside the store, after the journal has it: the parent's log. `plant` takes one safeguard out."""
import json
import os
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"

from tqdm import tqdm  # noqa: E402

from cvops_wb.core.errors import CvopsError  # noqa: E402
from cvops_wb.core.progress import show_progress  # noqa: E402, F401
from cvops_wb.core.settings import Settings  # noqa: E402
from cvops_wb.data import images, inbox, intake, shards, store  # noqa: E402, F401
from cvops_wb.data.formats import Listing, walk_images  # noqa: E402
from cvops_wb.data.near import kept  # noqa: E402


class Inline:
    "An executor without threads: the calls of a child come in one order."

    def __init__(self, *args, **options): pass
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def map(self, work, items): return [work(item) for item in items]
    def shutdown(self, **options): pass

    def submit(self, work, *args):
        future = Future()
        try: future.set_result(work(*args))
        except Exception as e: future.set_exception(e)
        return future


def copy_in_place(source, target):
    "What a rename must not be replaced by."
    with open(source, "rb") as left, open(target, "wb") as right: right.write(left.read())
    os.unlink(source)


class Deaf:
    "A file that takes a failed write for a good one."

    def __init__(self, *arguments, **options): self.file = open(*arguments, **options)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def fileno(self): return self.file.fileno()

    def write(self, data):
        try: return self.file.write(data)
        except OSError: return len(data)


def sync_deaf(descriptor, kept=os.fsync):
    "An fsync whose error nobody hears."
    try: kept(descriptor)
    except OSError: pass


def drop_late(pool, work, items, ahead):
    "A queue that drops what comes while it is full."
    waiting = [pool.submit(work, item) for item in list(items)[:ahead]]
    for future in waiting: yield future.result()


def plant(fault: str) -> None:
    "Take a safeguard out of this child."
    if fault == "swallow": store.open = Deaf
    if fault == "deaf": os.fsync = sync_deaf
    if fault == "hasty":
        sure = intake.commit
        def commit(opened, origin, arrivals):
            intake_told(arrivals)
            return sure(opened, origin, arrivals)
        intake.commit = commit
    if fault == "drop": intake._run_ahead = drop_late
    if fault == "fsync": os.fsync = lambda descriptor: None
    if fault == "folder": store.sync_folder = lambda folder: None
    if fault == "recover": store._recover = store._sweep
    if fault == "rename": os.replace = copy_in_place
    if fault == "hash": store.Store.holds = lambda self, sha256, data: self.find_blob(sha256) is not None
    if fault == "note":
        write = shards.write_atomic
        shards.write_atomic = lambda path, content, durable=True: write(path, content, durable=False)
    if fault == "early":
        def commit(opened, origin, arrivals, kept=store._move):
            store._move = lambda *_: None
            new = early(opened, origin, arrivals)
            intake_told(arrivals)
            kept(opened, arrivals)
            return new
        early, intake.commit = store.commit, commit


def step_clock(seconds: float) -> None:
    "The wall clock steps back and forth with each reading."
    kept = store.datetime

    class Stepping(kept):
        "A clock that somebody sets again and again."
        at = 0

        @classmethod
        def now(cls, zone=None):
            cls.at += 1
            return kept.fromtimestamp(time.time() + seconds*(cls.at % 2), zone)

    store.datetime = Stepping


def intake_told(arrivals) -> None:
    "The log of acknowledgements; one write a chunk."
    try: os.write(told, "".join(f"{a.sha256} {a.reason or 'image'}\n" for a in arrivals if a.sha256).encode())
    except OSError: os._exit(1)     # the fault hit the parent's log, not the store


def work(job: dict) -> int:
    "One ingest. 0: done, 1: refused in good order."
    global told
    intake.CHUNK = job.get("chunk", 2)
    if job.get("inline"): intake.ThreadPoolExecutor = store.ThreadPoolExecutor = shards.ThreadPoolExecutor = Inline
    if job.get("pack"): shards.SHARD_BYTES, shards.WINDOW, kept.LEAST = job["pack"], 1, 1
    plant(job.get("plant", ""))
    if job.get("clock"): step_clock(job["clock"])
    while job.get("go") and not os.access(job["go"], os.F_OK): time.sleep(.001)
    told = os.open(job["acks"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    settings = Settings(Path(job["root"]))
    if job.get("watch"): return watch(Path(job["source"]), settings, job["watch"])
    items = list(walk_images(Path(job["source"])))
    if "names" in job: items = [item for item in items if item.name in set(job["names"])]
    try:
        with store.open_writer(settings) as opened:
            intake.take_in(opened, Listing(items, ""), job["source"], settings, 4, intake_told)
    except CvopsError: return 1
    return 0


def watch(folder: Path, settings: Settings, spec: dict) -> int:
    "Look at an inbox again and again: three times, or for some seconds."
    end = time.monotonic() + spec.pop("seconds", 0)
    watched, looks = inbox.Inbox(folder, settings, inbox.WatchSpec(**spec)), 0
    while looks < 3 or time.monotonic() < end:
        paused, looks = watched.scan(intake_told).paused, looks + 1
        if end - time.monotonic() > .05: time.sleep(.05)
    return int(bool(paused))


def main() -> None:
    "Fork a child a line, until the input ends."
    tqdm.set_lock(threading.RLock())    # its own is a semaphore in /dev/shm, which a killed child leaves there
    sys.stderr = open(os.devnull, "w") if not os.environ.get("CVOPS_DEBUG") else sys.stderr
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try: code = work(json.loads(line))
            except BaseException:
                Path(json.loads(line)["acks"] + ".error").write_text(traceback.format_exc())
                code = 70
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__": main()
