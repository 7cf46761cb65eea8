"The parent's side of the crash suite: jobs, injected faults, and the audit of what a store holds against what it acknowledged."
import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
CALLS = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,link,unlink,unlinkat,mkdir,mkdirat,ftruncate,fallocate,close"


class Children:
    "Ingests, forked from one warm process."

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]), "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen([sys.executable, HERE/"ingest_child.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def start(self, job: dict) -> int:
        "Fork a child; its process id."
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int: return int(self.process.stdout.readline())

    def run(self, job: dict) -> int:
        "An ingest from beginning to end; its exit status."
        self.start(job)
        return self.wait()

    def trace(self, job: dict, *options: str, out: Path | None = None) -> int:
        "An ingest under strace, in one thread."
        go = Path(job["acks"] + ".go")
        pid = self.start(job | {"inline": True, "go": str(go)})
        tracer = subprocess.Popen(["strace", "-f", "-p", str(pid), "-o", out or os.devnull, *options], stderr=subprocess.PIPE)
        assert b"attached" in (line := tracer.stderr.readline()), line
        go.touch()
        code = self.wait()
        tracer.communicate()
        go.unlink()
        return code

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def read_acks(path: Path | str) -> dict[str, str]:
    "What was acknowledged: sha256 → `image`, or the reason why it was set aside."
    if not Path(path).exists(): return {}
    return dict(line.split() for line in Path(path).read_text().splitlines())


def audit(root: Path, acks: dict[str, str]) -> list[str]:
    "What is wrong with a store: lost, doubled, torn. The files and the journal are read here, not through the package."
    store, wrong = root/".cvops"/"store", []
    names = {kind: [p for p in (store/kind).rglob("*") if p.is_file()] for kind in ("blobs", "rejected")}
    sound = {kind: [p.stem for p in files if hashlib.sha256(p.read_bytes()).hexdigest() == p.stem] for kind, files in names.items()}
    wrong += [f"torn {kind}/{p.name}" for kind, files in names.items() for p in files if p.stem not in sound[kind]]
    wrong += audit_packed(root/".cvops"/"cache"/"packed")
    rows = read_rows(store)
    if isinstance(rows, str): return [*wrong, rows] if acks else wrong
    images, rejected, arrived = rows
    wrong += [f"lost {sha} ({what})" for sha, what in acks.items()
              if sha not in (sound["blobs"] if what == "image" else sound["rejected"]) or sha not in (images if what == "image" else rejected)]
    wrong += [f"lost: a row without its blob {sha}" for sha in images if sha not in sound["blobs"]]
    wrong += [f"lost: an image without its source {sha}" for sha in images if sha not in arrived]
    wrong += [f"doubled {sha}" for sha, count in Counter(p.stem for p in names["blobs"]).items() if count > 1]
    return wrong + [f"doubled row {sha}" for sha, count in Counter(images).items() if count > 1]


def audit_packed(folder: Path) -> list[str]:
    "Shards that a note calls whole and that are not; one without a note is nobody's."
    wrong = []
    for note in folder.glob("*.json"):
        shard = note.with_suffix(".tar")
        try: md5 = json.loads(note.read_bytes())["md5"]
        except (ValueError, KeyError): continue
        data = shard.read_bytes() if shard.exists() else None
        if data is not None and (hashlib.md5(data).hexdigest() != md5 or hashlib.sha256(data).hexdigest()[:32] != note.stem): wrong.append(f"torn packed/{note.stem}")
    return wrong


def read_rows(store: Path) -> tuple[list, set, set] | str:
    "The journal's hashes, or what is wrong with it."
    if not (store/"journal.sqlite").exists(): return "lost: there is no journal"
    try:
        journal = sqlite3.connect(store/"journal.sqlite", isolation_level=None)
        if (told := journal.execute("pragma integrity_check").fetchone()[0]) != "ok": return f"torn journal: {told}"
        if not journal.execute("select 1 from sqlite_master where name = 'samples'").fetchall(): return "lost: the journal is empty"
        return ([sha for sha, in journal.execute("select sha256 from samples")], {sha for sha, in journal.execute("select sha256 from rejected")},
                {sha for sha, in journal.execute("select sha256 from arrivals")})
    except sqlite3.Error as e: return f"torn journal: {e}"
    finally: journal.close()


def count_calls(trace: Path, calls: str = CALLS) -> Counter:
    "How often each call stands in a trace."
    return Counter(m[1] for m in re.finditer(r"^\d+ +(\w+)\(", trace.read_text(errors="replace"), re.M) if m[1] in calls.split(","))
