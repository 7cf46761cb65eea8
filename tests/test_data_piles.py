"From images without a label to labels: piles that are named, a vote that must earn belief, and nothing that was not looked at."
import shutil

import numpy as np
import pandas as pd
import pytest

from cvops_wb.core.errors import BadInput, Refused, UnknownName
from cvops_wb.core.places import locate
from cvops_wb.data.curation import CurateSpec, curate
from cvops_wb.data.intake import IngestSpec, ingest
from cvops_wb.data.looks.piles import PileSpec, Sheets, find_piles, name_piles, pile_up
from cvops_wb.data.looks.proposals import propose_labels, take_proposals, write_proposals
from cvops_wb.data.snapshots import SnapshotSpec, find_snapshot, open_snapshot, take_snapshot
from cvops_wb.data.versions.corrections import correct, undo_labels


def room(settings, name):
    folder = settings.reports/name
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def unlabelled(workbench, photos, tmp_path):
    "Forty photographs in one folder; the piles of their snapshot, and what each really shows."
    flat = tmp_path/"flat"
    flat.mkdir()
    for path in photos.glob("*/*.jpg"): shutil.copy(path, flat/f"{path.parent.name}-{path.name}")
    selection = curate(ingest(str(flat), IngestSpec(), room(workbench, "ingest-1")), CurateSpec(bursts=False), room(workbench, "curate-1"))
    snapshot = take_snapshot(selection, SnapshotSpec(message="none labelled", push=False), room(workbench, "snapshot-1"))
    piles = pile_up(snapshot, PileSpec(count=6), room(workbench, "piles-1"))
    table = open_snapshot(snapshot).table
    return piles, {row.id: row.sources[0].partition("-")[0] for row in table.itertuples()}


def count_right(truth, table): return int(sum(truth[row.id] == row.label for row in table.itertuples() if row.label))


def test_piles_are_named_and_the_rest_is_proposed(unlabelled, workbench):
    piles, truth = unlabelled
    sheets = Sheets(piles)._repr_html_()
    assert sheets.count("<h3>") == len(piles.piles) == 6 and "<script" not in sheets
    rows = pd.read_parquet(locate(piles.table))
    shown = rows[rows["rank"] >= 0]
    names = {int(pile): pd.Series([truth[id] for id in part["id"]]).mode()[0] for pile, part in shown.groupby("pile")}
    first = shown["id"].iloc[0]
    named = name_piles(piles, names, but=[first[:8]], by="anna")
    table = open_snapshot(named).table.set_index("id", drop=False)
    assert (table.loc[shown["id"], "label"] != "").sum() == len(shown) - 1 and table.loc[first, "label"] == ""
    assert (table.loc[rows.loc[rows["rank"] < 0, "id"], "label"] == "").all(), "what was not shown is not labelled"
    assert set(table["labeled_by"][table["label"] != ""]) == {"anna, by pile"} and count_right(truth, table) >= .9*(len(shown) - 1)
    found = propose_labels(.6)
    assert found.belief.count == 0 and len(found.rows) == (table["label"] == "").sum()
    with pytest.raises(Refused, match="not shown to be better"): take_proposals(found)
    by_hand = found.rows["id"].tolist()[::2]
    correct({id: truth[id] for id in by_hand}, "anna")
    found = propose_labels(.6)
    assert found.belief.count == len(by_hand) and found.belief.holds, str(found.belief)
    page = write_proposals(found, workbench.cache/"proposals.html").read_text()
    assert "better than" in page and "<script" not in page and (workbench.cache/"proposals.csv").is_file()
    after = open_snapshot(take_proposals(found, "anna")).table
    assert "anna, proposed" in set(after["labeled_by"]) and count_right(truth, after) >= .85*(after["label"] != "").sum()
    undo_labels()
    assert (open_snapshot(find_snapshot()).table["label"] == "").sum() == len(found.rows)


def test_random_labels_earn_no_belief(unlabelled):
    piles, truth = unlabelled
    rng = np.random.default_rng(0)
    correct({id: str(rng.choice(["tea", "milk"])) for id in list(truth)[:30]}, "ben")
    found = propose_labels(0.)
    assert found.belief.count >= 25 and not found.belief.holds
    with pytest.raises(Refused): take_proposals(found)


def test_what_makes_no_sense(unlabelled, workbench):
    piles, truth = unlabelled
    with pytest.raises(UnknownName): name_piles(piles, {99: "tea"})
    with pytest.raises(UnknownName): name_piles(piles, {1: "tea"}, but=["zzzz"])
    with pytest.raises(BadInput, match="two labels"): propose_labels()
    correct({id: name for id, name in truth.items()}, "anna")
    with pytest.raises(BadInput, match="too few"): pile_up(find_snapshot(), PileSpec(), room(workbench, "piles-2"))
    assert sum(pile_up(find_snapshot(), PileSpec(everything=True), room(workbench, "piles-3")).piles.values()) >= 35


def test_equals_are_one_pile_or_several():
    same = find_piles(np.ones((9, 4)), 3)
    assert len(same) == 9 and same.max() <= 2
