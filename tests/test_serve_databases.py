"The prediction log with a real PostgreSQL behind it: finished segments go there once and whole, and whoever reads the log does not notice."
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from serve_toy import photograph

from cvops_wb.core.errors import ToolFailed, WrongUsage
from cvops_wb.core.settings import load_settings
from cvops_wb.serve import (
    Client,
    compact_predictions,
    databases,
    list_segments,
    read_predictions,
    read_segment,
    service_running,
)
from cvops_wb.serve.databases import Database, mark_database, open_database
from cvops_wb.serve.inference import Answer
from cvops_wb.serve.predictions import PredictionLog, prune_predictions, tell_time, to_row
from cvops_wb.serve.rollouts.controller import LogReader

FOUND = shutil.which("pg_ctl") or next((str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))), "")
BIN = Path(FOUND).resolve().parent if FOUND else None
pytestmark = pytest.mark.skipif(not FOUND, reason="PostgreSQL is not installed: make system (Debian: postgresql)")


class Server:
    "A PostgreSQL of our own in a temporary folder, on a socket alone; started by nobody in particular where we are root, which it refuses."

    def __init__(self, folder: Path):
        import pwd
        self.folder, self.data = folder, folder/"data"
        found = pwd.getpwnam("nobody") if os.getuid() == 0 else None
        self.dropped = {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []} if found else {}
        if found: os.chown(folder, found.pw_uid, found.pw_gid)
        self.call("initdb", "-D", self.data, "-U", "shop", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")

    def call(self, name: str, *words) -> None:
        done = subprocess.run([BIN/name, *map(str, words)], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "HOME": str(self.folder)}, **self.dropped)
        assert done.returncode == 0, done.stdout

    def start(self) -> None: self.call("pg_ctl", "-D", self.data, "-w", "-t", 60, "-l", self.folder/"log", "-o", f"-c listen_addresses='' -c unix_socket_directories='{self.folder}' -c fsync=off -c shared_buffers=16MB", "start")

    def stop(self, how: str = "fast") -> None: self.call("pg_ctl", "-D", self.data, "-w", "-m", how, "stop")

    @property
    def address(self) -> str: return f"host={self.folder} user=shop dbname=postgres"


@pytest.fixture(scope="module")
def server():
    from tempfile import TemporaryDirectory
    with TemporaryDirectory(prefix="cvops-pg-") as folder:      # short: a socket's path has 107 characters at most
        server = Server(Path(folder))
        server.start()
        yield server
        server.stop("immediate")


@pytest.fixture
def database(server):
    "It, empty."
    with Database(server.address).connected() as connection: connection.execute("DROP TABLE IF EXISTS cvops_predictions, cvops_segments")
    return Database(server.address)


def fill(log, first, last):
    "Answers, told apart by their numbers."
    for k in range(first, last):
        rng = np.random.default_rng(k)
        answer = Answer(f"{k:016x}", "caf\u00e9 \u2603", .9, rng.random(3, np.float32), .3, rng.random(8, np.float32), {"brightness": .5, "width": 60})
        log.append(to_row(answer, request_id=str(k), time=tell_time(1.7e9 + k), version=1, model="abc", camera="c1", caller="", latency_ms=1.5, arm=f"r:{('baseline', 'challenger')[k % 2]}", failed=0))


def make_log(folder, count=25, lines=10):
    log = PredictionLog(folder, lines)
    fill(log, 0, count)
    return log


def test_a_log_in_a_database_reads_like_one_on_the_disk(tmp_path, database):
    log = make_log(tmp_path/"log")
    shutil.copytree(tmp_path/"log", tmp_path/"other")
    mark_database(tmp_path/"log", database.address)
    assert compact_predictions(tmp_path/"log") == 2 and compact_predictions(tmp_path/"other") == 3     # ours has a writer
    assert not list((tmp_path/"log").glob("*.parquet")) and len(list((tmp_path/"log").glob("*.jsonl"))) == 1
    pd.testing.assert_frame_equal(read_predictions(tmp_path/"log"), read_predictions(tmp_path/"other"))
    assert [stem.name for stem, _ in list_segments(tmp_path/"log")] == [stem.name for stem, _ in list_segments(tmp_path/"other")]
    stem = list_segments(tmp_path/"log")[-1][0]
    assert read_segment(stem).schema == read_segment(tmp_path/"other"/stem.name).schema and read_segment(stem) == read_segment(tmp_path/"other"/stem.name)
    assert list(read_predictions(tmp_path/"log", newest=12).request_id) == [str(k) for k in range(13, 25)]
    log.close()


def test_looking_at_the_newest_does_not_read_the_rest(tmp_path, database, monkeypatch):
    make_log(tmp_path, 60).close()
    for k, path in enumerate(sorted(tmp_path.glob("*.jsonl"))): os.utime(path, (1.7e9 + 10*k + 9,)*2)     # when its last line was written
    mark_database(tmp_path, database.address)
    compact_predictions(tmp_path)
    read, real = [], Database.read
    monkeypatch.setattr(Database, "read", lambda self, name: read.append(name) or real(self, name))
    assert len(read_predictions(tmp_path, newest=5)) == 5 and len(read) <= 2


def test_a_crash_between_database_and_disk_doubles_nothing(tmp_path, database, monkeypatch):
    "Committed, and killed before the file went: the next one sees it. Killed before the commit: nothing is there."
    make_log(tmp_path, 20).close()
    mark_database(tmp_path, database.address)
    def killed(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt): compact_predictions(tmp_path)
    assert len(database.list_segments()) == 1 and len(read_predictions(tmp_path)) == 20
    with monkeypatch.context() as patch:
        patch.setattr(databases, "_to_value", killed)
        with pytest.raises(KeyboardInterrupt): compact_predictions(tmp_path)
    assert len(database.list_segments()) == 1 and len(read_predictions(tmp_path)) == 20
    compact_predictions(tmp_path)
    assert list(read_predictions(tmp_path).request_id) == [str(k) for k in range(20)] and not list(tmp_path.glob("*.jsonl"))


def test_a_database_that_commits_twice_is_found(tmp_path, database, monkeypatch):
    "The planted bug: a segment is put in without a look whether it is there."
    make_log(tmp_path, 10).close()
    mark_database(tmp_path, database.address)
    real = Database.put
    monkeypatch.setattr(Database, "put", lambda self, name, *rest: real(self, f"{name}-{time.monotonic_ns()}", *rest))
    def killed(*_, **__): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt): compact_predictions(tmp_path)
    compact_predictions(tmp_path)
    assert len(read_predictions(tmp_path)) == 20, "every row twice: the test above would see it"


def test_while_it_is_away_nothing_is_lost(tmp_path, server, database):
    "The segments wait on the disk; a controller reads on; a reader is told; then they move."
    make_log(tmp_path, 20).close()
    mark_database(tmp_path, server.address)
    compact_predictions(tmp_path)
    log, reader = make_log(tmp_path, 0), LogReader(tmp_path)
    assert len(list(reader.read())) == 20
    server.stop()
    try:
        fill(log, 20, 35)
        with pytest.raises(ToolFailed, match="does not answer"): compact_predictions(tmp_path)
        with pytest.raises(ToolFailed, match="start it"): read_predictions(tmp_path)
        assert [row["request_id"] for row in reader.read()] == [str(k) for k in range(20, 35)]
    finally: server.start()
    log.close()
    assert compact_predictions(tmp_path) > 0 and list(read_predictions(tmp_path).request_id) == [str(k) for k in range(35)]
    assert list(reader.read()) == [] and len(list(LogReader(tmp_path).read())) == 35 and list(LogReader(tmp_path, "2999-01-01T00:00:00Z").read()) == []


def test_killed_while_it_writes(tmp_path, database):
    "SIGKILL at any moment of a compaction, again and again: each row once."
    mark_database(tmp_path/"log", database.address)
    program = "import sys; from cvops_wb.serve import compact_predictions; print('go', flush=True); compact_predictions(sys.argv[1])"
    rng, count = np.random.default_rng(3), 12
    for k in range(count):
        log = PredictionLog(tmp_path/"log", 40)
        fill(log, 200*k, 200*(k + 1))
        log.close()
        child = subprocess.Popen([sys.executable, "-c", program, tmp_path/"log"], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(rng.random()*.12)
        child.kill()
        child.wait()
        child.stdout.close()
    compact_predictions(tmp_path/"log")
    assert sorted(map(int, read_predictions(tmp_path/"log").request_id)) == list(range(200*count)) and not list((tmp_path/"log").glob("*.jsonl"))


def test_old_segments_go(tmp_path, database):
    make_log(tmp_path, 40).close()
    mark_database(tmp_path, database.address)
    for k, path in enumerate(sorted(tmp_path.glob("*.jsonl"))): os.utime(path, (k*86400 + 1e9,)*2)
    compact_predictions(tmp_path)
    assert prune_predictions(tmp_path, now=1e9 + 4*86400) == 0 and prune_predictions(tmp_path, days=2.5, now=1e9 + 4*86400) == 2 and len(read_predictions(tmp_path)) == 20
    with database.connected() as connection: size = connection.execute("SELECT max(bytes) FROM cvops_segments").fetchone()[0]
    assert prune_predictions(tmp_path, megabytes=size*1.5/1e6) == 1 and list(read_predictions(tmp_path).request_id) == [str(k) for k in range(30, 40)]
    with database.connected() as connection: assert connection.execute("SELECT count(*) FROM cvops_predictions").fetchone()[0] == 10


def test_forgotten_images_are_forgotten_here_too(workbench, photos, server, database):
    "`cvops forget` erases an image's answers from the database; while that is away it refuses, and nothing has been begun."
    from cvops_wb.data import IngestSpec, ingest, list_samples
    from cvops_wb.loop.keeping import forget
    ingest(str(photos), IngestSpec(), workbench.reports/"ingest")
    first, other = list_samples(workbench)["id"][:2]
    log = PredictionLog(workbench.store/"predictions")
    for k in range(6): log.append({"request_id": str(k), "time": tell_time(1.7e9 + k), "version": 1, "id": (first, other)[k % 2]})
    log.close()
    mark_database(workbench.store/"predictions", server.address)
    compact_predictions(workbench.store/"predictions")
    server.stop()
    try:
        with pytest.raises(ToolFailed): forget([first])
        assert first in set(list_samples(workbench)["id"])
    finally: server.start()
    forget([first], dry_run=True)
    assert len(read_predictions(workbench.store/"predictions")) == 6
    assert forget([first]).document["receipt"]["answers_in_the_database"] == 3
    assert set(read_predictions(workbench.store/"predictions")["id"]) == {other} and first not in set(list_samples(workbench)["id"])


def test_what_callers_send_is_a_value(tmp_path, database):
    "Names with quotes, backslashes, tabs, a zero, what looks like SQL: they come back as they were, but for the zero."
    nasty, log = ["a'); DROP TABLE cvops_predictions; --", "tab\there\nand \\N and \\.", "zero\0inside", "\u202e\U0001f4a5", '"'], PredictionLog(tmp_path)
    for k, caller in enumerate(nasty): log.append({"request_id": str(k), "time": tell_time(1.7e9 + k), "version": 1, "caller": caller})
    log.close()
    mark_database(tmp_path, database.address)
    compact_predictions(tmp_path)
    assert list(read_predictions(tmp_path).caller) == [text.replace("\0", "") for text in nasty]


def test_a_password_stays_in_the_environment(tmp_path, monkeypatch):
    mark_database(tmp_path, "postgresql://shop:hush-hush@127.0.0.1:1/answers")
    assert "hush" not in (tmp_path/"database").read_text() and "hush" not in open_database(tmp_path).address
    monkeypatch.setenv("CVOPS_SERVE_DATABASE", "postgresql://shop:hush-hush@127.0.0.1:1/answers")
    assert "hush" in open_database(tmp_path).address
    with pytest.raises(ToolFailed) as caught: list_segments(tmp_path)
    assert "hush" not in str(caught.value)
    with pytest.raises(WrongUsage, match="no address"): mark_database(tmp_path, "mysql://nowhere")


def test_a_service_with_a_database_and_who_watches_it(bench, bento, server, database, monkeypatch):
    "By the setting alone: a real service answers, a killed worker's segment moves, and watch and the rollout's reader see all answers."
    from cvops_wb.watch.states import read_service
    monkeypatch.setenv("CVOPS_SERVE_DATABASE", server.address)
    log, names = bench.store/"predictions", []
    for number in range(2):
        with service_running(bento, log, workers=1, output=bench.root/"pg.log") as service, Client(service.url) as client:
            names += [client.predict(photograph(seed=k), camera=f"till {number}")["request_id"] for k in range(15)]
            assert len(read_predictions(log)) == 15*(number + 1)
        compact_predictions(log)
    assert not list(log.glob("*.jsonl")) and not list(log.glob("*.parquet")) and len(database.list_segments()) == 2
    assert sorted(read_predictions(log).request_id) == sorted(names) and len(read_predictions(log, 7)) == 7
    assert read_service({}, load_settings()).requests == 30
    assert {row["request_id"] for row in LogReader(log).read()} == set(names)
    with database.connected() as connection:
        assert connection.execute("SELECT camera, count(*) FROM cvops_predictions WHERE predicted = 'green' GROUP BY camera ORDER BY camera").fetchall() == [("till 0", 15), ("till 1", 15)]
        assert len(connection.execute("SELECT embedding FROM cvops_predictions LIMIT 1").fetchone()[0]) == 3
