"A workbench of the version before: its journal and its tables are read, carried over once, and lose nothing; a kill in between leaves the one or the other."
import sqlite3
from dataclasses import fields

import pytest
from test_data_inbox import make_photo, sha

from cvops_wb.core.errors import BadRecord
from cvops_wb.core.records import ADDED_COLUMNS
from cvops_wb.data import store as store_room
from cvops_wb.data.images import ImageFacts, inspect_image
from cvops_wb.data.intake import IngestSpec, ingest
from cvops_wb.data.store import Store, list_rejected, list_samples, open_writer, read_blob, read_samples, write_samples

FACTS = [field.name for field in fields(ImageFacts)]
# The first schema, as its own writer made it: no `objects`, and no `user_version`.
FIRST = f"""
create table samples (sha256 text primary key, {", ".join(FACTS)}, added text) without rowid;
create table arrivals (origin text, name text, sha256 text, label text, labeled_by text, given_split text, seen text,
    primary key (origin, name, sha256)) without rowid;
create index arrivals_by_sample on arrivals (sha256);
create table rejected (origin text, name text, sha256 text, reason text, detail text, file text, bytes integer, seen text,
    primary key (origin, name, sha256)) without rowid;
"""


@pytest.fixture
def old(workbench):
    "Five images and a refused file, written with the first schema."
    (workbench.store/"blobs").mkdir(parents=True)
    journal = sqlite3.connect(workbench.store/"journal.sqlite", isolation_level=None)
    journal.execute("pragma journal_mode = wal")
    for statement in filter(str.strip, FIRST.split(";")): journal.execute(statement)
    for k in range(5):
        data = make_photo(k)
        facts, path = inspect_image(data), workbench.store/"blobs"/sha(data)[:2]/f"{sha(data)}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        journal.execute(f"insert into samples values ({', '.join('?'*(len(FACTS) + 2))})", [sha(data), *(getattr(facts, name) for name in FACTS), "2026-01-01"])
        journal.execute("insert into arrivals values (?, ?, ?, ?, ?, ?, ?)", ["shop", f"tea/{k}.jpg", sha(data), "tea", "folder", "train", "2026-01-01"])
    journal.execute("insert into rejected values ('shop', 'cut.jpg', 'f00', 'truncated', 'cut off', '', 3, '2026-01-01')")
    journal.close()
    return workbench


def read_version(settings):
    journal = sqlite3.connect(settings.store/"journal.sqlite")
    try: return journal.execute("pragma user_version").fetchone()[0], {row[1] for row in journal.execute("pragma table_info(arrivals)")}
    finally: journal.close()


def check(settings):
    table = list_samples(settings)
    assert len(table) == 5 and set(table["label"]) == {"tea"} and set(table["given_split"]) == {"train"} and set(table["objects"]) == {""}
    assert all(read_blob(row, settings) == make_photo(k) for k in range(5) for row in [table[table["sha256"] == sha(make_photo(k))].iloc[0]])
    assert list_rejected(settings).reason.tolist() == ["truncated"]


def test_an_old_journal_is_carried_over(old, tmp_path):
    assert read_version(old)[0] == 0 and "objects" not in read_version(old)[1]
    check(old)
    version, columns = read_version(old)
    assert version == store_room._VERSION and "objects" in columns
    source = tmp_path/"more"/"milk"
    source.mkdir(parents=True)
    for k in (3, 9): (source/f"{k}.jpg").write_bytes(make_photo(k))
    (out := old.reports/"ingest-0000000000").mkdir(parents=True)
    batch = ingest(str(tmp_path/"more"), IngestSpec(), out)
    assert (batch.count, batch.new) == (2, 1) and len(list_samples(old)) == 6


@pytest.mark.parametrize("at", range(1, 9))
def test_a_migration_that_breaks_off_leaves_the_old_or_the_new(old, at, monkeypatch):
    "Stopped at statement after statement of the migration: the next opening ends it."
    class Stopping:
        def __init__(self, journal): self.journal, self.count = journal, 0
        def execute(self, *given):
            self.count += 1
            if self.count == at: raise KeyboardInterrupt
            return self.journal.execute(*given)
    journal = sqlite3.connect(old.store/"journal.sqlite", isolation_level=None)
    with pytest.raises(KeyboardInterrupt): store_room._migrate(Stopping(journal))
    journal.close()
    assert read_version(old)[0] in (0, store_room._VERSION)
    check(old)
    assert read_version(old)[0] == store_room._VERSION


def test_a_newer_journal_is_left_alone(old):
    journal = sqlite3.connect(old.store/"journal.sqlite")
    journal.execute("pragma user_version = 99")
    journal.close()
    with pytest.raises(BadRecord, match="newer"): Store(old).read_all("select * from samples")
    with pytest.raises(BadRecord, match="newer"), open_writer(old): pass
    assert read_version(old)[0] == 99


def test_an_old_sample_table_is_read(old, tmp_path):
    table = list_samples(old)
    path = write_samples(table, tmp_path/"samples.parquet")
    import pyarrow.parquet as pq
    pq.write_table(pq.read_table(path).drop_columns(list(ADDED_COLUMNS)), path)
    assert read_samples(path).equals(table)
