"What people do in the App comes back into the record, once, whatever happens in between; views they save are part of snapshots."
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from cvops_wb.core.errors import BadInput, BadRecord, CvopsError, UnknownName
from cvops_wb.core.records import SAMPLE_COLUMNS
from cvops_wb.core.settings import load_settings
from cvops_wb.data import take_back
from cvops_wb.data.curation import CurateSpec, curate, group_samples, is_aside, split_samples
from cvops_wb.data.intake import IngestSpec, ingest
from cvops_wb.data.snapshots import SnapshotSpec, find_snapshot, open_snapshot, take_snapshot
from cvops_wb.data.store import read_samples
from cvops_wb.data.versions.corrections import read_labels, undo_labels
from cvops_wb.data.versions.datacards import describe_snapshot
from cvops_wb.data.versions.decisions import (
    Changes,
    Decisions,
    find_changes,
    lay_tags,
    read_decisions,
    read_views,
    record_changes,
    sign_decisions,
)
from cvops_wb.data.versions.erasure import forget
from cvops_wb.data.versions.events import read_events
from cvops_wb.data.views import VIEWS, ViewSpec, index_samples, list_views, open_fiftyone

REPO = Path(__file__).parents[1]


def room(settings, run: str):
    path = settings.reports/run
    path.mkdir(parents=True, exist_ok=True)
    return path


def make_table(count: int, **columns) -> pd.DataFrame:
    blank = {"str": "", "int": 100, "float": .9, "list": ()}
    ids = [f"{k:016x}" for k in range(count)]
    return pd.DataFrame({**{name: [blank[kind]]*count for name, kind in SAMPLE_COLUMNS.items()}, "id": ids, "sha256": ids, "group": ids,
                         "label": (["tea", "milk"]*count)[:count], "sources": [["a.jpg"]]*count, "tags": [[] for _ in ids], **columns})


PAIRS = pd.DataFrame({"a": [0, 2], "b": [2, 4], "distance": 2, "likeness": [.99, .99]})     # 0, 2 and 4 show the same; 0 represents them


@pytest.mark.parametrize("tags, inside", [
    ({}, {0}), ({0: "remove"}, {2}), ({0: "remove", 2: "remove"}, {4}), ({2: "keep"}, {0, 2}), ({0: "remove", 2: "remove", 4: "remove"}, set()),
])
def test_remove_and_keep_among_duplicates(tags, inside):
    "What is removed represents nobody; what is kept stays beside its representative, on the same side."
    table = make_table(30, tags=[[tags[k]] if k in tags else [] for k in range(30)])
    done, _ = split_samples(group_samples(table, PAIRS, CurateSpec()), CurateSpec())
    assert {k for k in (0, 2, 4) if done.split[k] != "none"} == inside and done.split[list(inside)].nunique() <= 1


@pytest.mark.parametrize("tags, aside", [
    (["blank"], True), (["blank", "keep"], False), (["label_conflict"], True), (["remove"], True), (["remove", "keep"], True), (["dark"], False), (["unlabelled"], True), (["unlabelled", "keep"], True),
])
def test_what_stands_aside(tags, aside): assert is_aside(make_table(2, tags=[tags, []])).tolist() == [aside, False]


def test_a_tag_that_was_taken_away_stays_away():
    table = make_table(3, tags=[["blank", "dark"], ["blank"], []])
    laid = lay_tags(table, Decisions({table.id[2]: {"note"}}, {table.id[0]: {"blank"}}))
    assert laid.tags.tolist() == [["dark"], ["blank"], ["note"]]


@pytest.mark.parametrize("tags", [["keep", "remove"], ["relabel:tea", "relabel:milk"], ["relabel:"], ["relabel: "]])
def test_contradictions_are_refused(tags):
    table = make_table(1)
    said = {"samples": {table.id[0]: {"label": "tea", "tags": tags}}, "views": {}}
    with pytest.raises(BadInput, match=table.id[0]): find_changes(table, {}, said, Decisions(), {})


def test_an_edited_label_and_what_the_record_learned_meanwhile():
    "What the command line corrected since is not undone by an App that shows the old label; a label that the record has already is no news."
    table = make_table(3)
    def say(*labels): return {"samples": {id: {"label": label, "tags": []} for id, label in zip(table.id, labels, strict=True)}, "views": {}}
    now = {table.id[0]: "rice"}
    assert find_changes(table, {}, say("tea", "milk", "tea"), Decisions(), now).labels == []
    assert find_changes(table, {}, say("rice", "milk", "tea"), Decisions(), now).labels == []
    assert find_changes(table, {}, say("salt", "milk", ""), Decisions(), now).labels == [(table.id[0], "rice", "salt")]


def test_a_record_of_nothing_is_nothing(workbench):
    record_changes(workbench, Changes())
    assert sign_decisions(workbench) == "" and read_decisions(workbench) == Decisions({}, {}, {})


@pytest.fixture(scope="module")
def shelf(photos, tmp_path_factory):
    "A curated workbench in FiftyOne: photographs, one of them twice in poorer quality, and a blank one."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("decisions")/"bench"
        root.mkdir()
        shutil.copy(REPO/"settings.ini", root)
        patch.setenv("CVOPS_ROOT", str(root))
        settings = load_settings(root)
        shutil.copytree(photos, root/"source")
        Image.open(root/"source"/"plum"/"03.jpg").save(root/"source"/"plum"/"again.jpg", quality=70)
        Image.new("RGB", (160, 120), (90, 90, 90)).save(root/"source"/"lime"/"blank.jpg")
        batch = ingest(str(root/"source"), IngestSpec(), room(settings, "ingest"))
        selection = curate(batch, CurateSpec(), room(settings, "curate-1"))
        yield settings, batch, selection, index_samples(selection, ViewSpec(), room(settings, "explore-1"))


@pytest.mark.slow
def test_from_the_app_to_the_record_and_back(shelf):
    pytest.importorskip("dvc")
    settings, batch, selection, view = shelf
    table = read_samples(selection.samples)
    by = {Path(row.sources[0]).as_posix(): row.id for row in table.itertuples()}
    assert "blank" in table.set_index("id").tags[by["lime/blank.jpg"]] and selection.tags["near_duplicate"] == 1
    with open_fiftyone() as fiftyone:
        dataset = fiftyone.load_dataset(view.dataset)
        assert set(list_views(dataset, fiftyone.ViewField)) == set(VIEWS) == set(dataset.list_saved_views())
        assert dataset.first()["outlier"] >= 0 and dataset.first()["size_ratio"] == 1
        def tag(name, *tags):
            sample = dataset.match(fiftyone.ViewField("key") == by[name]).first()
            sample.tags.extend(tags)
            sample.save()
        tag("apple/00.jpg", "remove", "look again")
        tag("apple/01.jpg", "relabel:lemon")
        tag("plum/again.jpg", "keep")
        blank = dataset.match(fiftyone.ViewField("key") == by["lime/blank.jpg"]).first()
        blank.tags.remove("blank")
        blank.save()
        edited = dataset.match(fiftyone.ViewField("key") == by["lime/02.jpg"]).first()
        edited.label.label = "plum"
        edited.save()
        hard = dataset.match(fiftyone.ViewField("label.label") == "lemon").sort_by("oddness", reverse=True).limit(4)
        hard_ids = hard.values("key")
        dataset.save_view("hard lemons", hard)
        dataset.save_view("to go", dataset.limit(2))
    before = sign_decisions(settings)
    changes, known = take_back(view, dry=True)
    assert sign_decisions(settings) == before == "" and known == ["apple", "lemon", "lime", "plum"]
    assert sorted(changes.labels) == sorted([(by["apple/01.jpg"], "apple", "lemon"), (by["lime/02.jpg"], "lime", "plum")])
    assert sorted(changes.tagged) == sorted([(by["apple/00.jpg"], "look again"), (by["apple/00.jpg"], "remove"), (by["plum/again.jpg"], "keep")])
    assert changes.untagged == [(by["lime/blank.jpg"], "blank")] and set(changes.saved) == {"hard lemons", "to go"} and changes.saved["hard lemons"]["ids"] == hard_ids
    assert take_back(view, by="eva")[0] == changes
    assert not any(take_back(view)[0].counts.values()), "twice is once"
    assert {event["by"] for kind in ("labels", "tags", "views") for event in read_events(settings, kind)} == {"eva"}

    anew = curate(batch, CurateSpec(), room(settings, "curate-2"))
    rows = read_samples(anew.samples).set_index("id")
    assert rows.split[by["apple/00.jpg"]] == "none" and {"look again", "remove"} <= set(rows.tags[by["apple/00.jpg"]])
    assert rows.label[by["apple/01.jpg"]] == "lemon" and rows.label[by["lime/02.jpg"]] == "plum" and rows.labeled_by[by["lime/02.jpg"]] == "eva"
    assert rows.split[by["plum/again.jpg"]] == rows.split[by["plum/03.jpg"]] != "none"
    assert rows.split[by["lime/blank.jpg"]] != "none" and "blank" not in rows.tags[by["lime/blank.jpg"]]
    again = index_samples(anew, ViewSpec(), room(settings, "explore-2"))
    with open_fiftyone() as fiftyone:
        dataset = fiftyone.load_dataset(again.dataset)
        assert dataset.load_saved_view("hard lemons").values("key") == hard_ids
        assert dict(zip(*dataset.values(["key", "label.label"]), strict=True)) == rows.label.to_dict()
        assert {key: sorted(tags) for key, tags in zip(*dataset.values(["key", "tags"]), strict=True)} == rows.tags.to_dict()
        dataset.delete_saved_view("to go")
    changes, _ = take_back(again)
    assert changes.dropped == ["to go"] and sum(changes.counts.values()) == 1 and set(read_decisions(settings).views) == {"hard lemons"}

    snapshot = take_snapshot(anew, SnapshotSpec("curated", push=False), room(settings, "snapshot-1"))
    reader = open_snapshot(find_snapshot(snapshot.id))
    assert snapshot.views == {"hard lemons": 4} and reader.views == {"hard lemons": hard_ids} and len(reader.table) == len(rows)
    assert describe_snapshot(snapshot)["views"] == {"hard lemons": 4}
    few = take_snapshot(anew, SnapshotSpec("only these", push=False, view="hard lemons"), room(settings, "snapshot-2"))
    assert sorted(open_snapshot(few).table.id) == sorted(hard_ids) and few.id != snapshot.id
    with pytest.raises(UnknownName, match="hard lemons"): take_snapshot(anew, SnapshotSpec(view="hard lemon"), room(settings, "snapshot-3"))
    take_snapshot(anew, SnapshotSpec("all", push=False), room(settings, "snapshot-4"))
    assert len(read_labels()) == 2
    restored = undo_labels([by["lime/02.jpg"]])
    assert open_snapshot(restored).table.set_index("id").label[by["lime/02.jpg"]] == "lime" and restored.views == {"hard lemons": 4}
    forget([hard_ids[0]], history=True)
    assert all(hard_ids[0] not in view["ids"] for path in (settings.versioned/"samples").glob("*.parquet") for view in read_views(path).values())
    assert find_snapshot().views == {"hard lemons": 3}


@pytest.mark.slow
def test_an_index_that_is_gone_is_no_source(shelf):
    settings, _, _, view = shelf
    (settings.cache/"mongo").rename(settings.cache/"away")
    try:
        with pytest.raises(BadInput, match="not in the cache"): take_back(view)
    finally: (settings.cache/"away").rename(settings.cache/"mongo")


def test_a_changed_decision_is_noticed(workbench):
    record_changes(workbench, Changes(tagged=[("a", "remove")]))
    path = workbench.versioned/"events"/"tags.jsonl"
    path.write_text(path.read_text().replace("remove", "keepit"))
    with pytest.raises(BadRecord, match="damaged"): read_decisions(workbench)
    assert issubclass(BadRecord, CvopsError)


def test_an_unlabelled_batch_is_curated_split_and_versioned(photos, workbench, tmp_path):
    "A camera's photographs before anybody labelled them: copies set aside, scenes on one side, a version; and labels that come later change no side."
    pytest.importorskip("dvc")
    flat = tmp_path/"camera"
    flat.mkdir()
    for path in photos.rglob("*.jpg"): shutil.copy(path, flat/f"{path.parent.name}-{path.name}")
    Image.open(flat/"apple-00.jpg").save(flat/"copy.jpg", quality=60)
    batch = ingest(str(flat), IngestSpec(), room(workbench, "ingest"))
    selection = curate(batch, CurateSpec(), room(workbench, "curate"))
    assert selection.count == 40 and selection.set_aside == 1 and selection.tags["unlabelled"] == 41 and set(selection.splits) == {"train", "val", "test"}
    snapshot = take_snapshot(selection, SnapshotSpec(push=False), room(workbench, "snapshot"))
    assert snapshot.classes == [] and snapshot.count == 40
    sides = open_snapshot(snapshot).table.set_index("id").split
    table = read_samples(selection.samples)
    record_changes(workbench, Changes(labels=[(row.id, "", Path(row.sources[0]).name.split("-")[0].replace("copy.jpg", "apple")) for row in table.itertuples()]))
    labelled = curate(batch, CurateSpec(before=snapshot.id), room(workbench, "curate-2"))
    after = read_samples(labelled.samples).set_index("id")
    assert (after.split[sides.index[sides != "none"]] == sides[sides != "none"]).all() and labelled.classes == {"apple": 10, "lemon": 10, "lime": 10, "plum": 10} and "unlabelled" not in labelled.tags


def test_the_commands_know_decisions_and_views(workbench, photos):
    "Over the command line: a snapshot needs no FiftyOne; a decision makes curation run anew, and only then; a view that was saved can be taken alone."
    pytest.importorskip("dvc")
    from cvops_wb.loop import plan_flow, run_stage
    shutil.copytree(REPO/"nbs"/"runs", workbench.root/"nbs"/"runs")
    taken = run_stage("ingest", {"source": str(photos)})
    curated = run_stage("curate", {"batch": taken.envelope.run})
    first = run_stage("snapshot", {"push": False}).envelope.record
    assert plan_flow(["curate"])[0].state == "reuse" and first.views == {}
    ids = read_samples(curated.envelope.record.samples).id.tolist()
    record_changes(workbench, Changes(tagged=[(ids[0], "remove")], saved={"few": {"ids": ids[:6], "stages": []}}))
    assert plan_flow(["curate"])[0].state == "run"
    again = run_stage("curate", {}).envelope
    assert again.run != curated.envelope.run and again.record.set_aside == curated.envelope.record.set_aside + 1
    second = run_stage("snapshot", {"push": False}).envelope.record
    few = run_stage("snapshot", {"push": False, "only": "few"}).envelope.record
    assert second.views == {"few": 6} == few.views and len(open_snapshot(few).table) == 6 and plan_flow(["curate"])[0].state == "reuse"
