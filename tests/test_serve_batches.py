"`cvops predict`: a table for a folder, resumed after a kill, honest about files that are none."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cvops_wb.core.errors import BadInput
from cvops_wb.serve import Classifier, list_pictures, predict_pictures, verify_model
from cvops_wb.serve.batches import read_part

SCRIPT = """
import sys, time
from pathlib import Path
from cvops_wb.serve import Classifier, list_pictures, predict_pictures, verify_model
engine = Classifier(verify_model(sys.argv[1]))
asked = engine.predict
def slow(data, measured=True):
    print("asked", flush=True)
    time.sleep(.02)
    return asked(data, measured)
engine.predict = slow
predict_pictures(engine, list_pictures(sys.argv[2]), Path(sys.argv[3]), part=5, threads=1)
"""


@pytest.fixture(scope="module")
def model(bench, bento) -> Path:
    "The folder of the toy's model."
    return bench.root/bento.path/"src"/"model"


@pytest.fixture(scope="module")
def engine(model) -> Classifier:
    return Classifier(verify_model(model))


def test_a_folder_becomes_a_table(engine, photos, tmp_path):
    "One row a picture, as the service says it; nothing is left beside the table."
    done = predict_pictures(engine, list_pictures(photos), tmp_path/"out.parquet", "toy:1", measured=True)
    table = pd.read_parquet(done.path)
    assert len(table) == done.images == 40 and table["path"].is_unique and table["reason"].isna().all() and [p.name for p in tmp_path.iterdir()] == ["out.parquet"]
    for row in table.iloc[::13].itertuples():
        answer = engine.predict((photos/row.path).read_bytes())
        assert (row.predicted, row.brightness) == (answer.label, answer.statistics["brightness"])
        np.testing.assert_array_equal(row.scores, answer.scores)


def test_what_is_no_image_is_a_row_with_a_reason(engine, photos, tmp_path):
    "Torn, empty, of another kind, not readable: each has its row; hidden files and pipes are passed over."
    folder = tmp_path/"odd"
    folder.mkdir()
    whole = next(photos.rglob("*.jpg")).read_bytes()
    for name, data in {"whole.JPG": whole, "torn.jpg": whole[:len(whole)//2], "empty.png": b"", "page.jpg": b"<html>", ".hidden.jpg": whole, "notes.txt": b"x"}.items():
        (folder/name).write_bytes(data)
    os.mkfifo(folder/"pipe.jpg")
    os.symlink("nowhere", folder/"link.jpg")
    done = predict_pictures(engine, list_pictures(folder), tmp_path/"odd.parquet")
    table = pd.read_parquet(done.path).set_index("path")
    assert set(table.index) == {"whole.JPG", "torn.jpg", "empty.png", "page.jpg"} and done.failed == 3
    assert table["reason"].isna().to_dict() == {"whole.JPG": True, "torn.jpg": False, "empty.png": False, "page.jpg": False}


@pytest.mark.parametrize("made", ["nothing", "an empty folder", "a folder of text"])
def test_no_image_is_an_error(made, tmp_path):
    "With the way out."
    folder = tmp_path/"x"
    if made != "nothing": folder.mkdir()
    if made == "a folder of text": (folder/"a.txt").write_text("a")
    with pytest.raises(BadInput, match="fix"): list_pictures(folder)


@pytest.mark.parametrize("kills", [(3,), (8, 2), (22,)])
def test_a_killed_run_goes_on(kills, engine, model, photos, tmp_path):
    "SIGKILL after so many pictures: parts that are whole are not asked again, and the table is that of an undisturbed run."
    out, asked = tmp_path/"out.parquet", 0
    for count in kills:
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, model, photos, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(count): child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not out.exists()
        asked += count//5*5
    done = predict_pictures(engine, list_pictures(photos), out, part=5, threads=1)
    assert done.reused >= asked and done.reused % 5 == 0
    whole = predict_pictures(engine, list_pictures(photos), tmp_path/"whole.parquet")
    assert pd.read_parquet(out).drop(columns=["scores", "embedding"]).equals(pd.read_parquet(whole.path).drop(columns=["scores", "embedding"]))


@pytest.mark.parametrize("harm", ["cut", "flip", "of other pictures"])
def test_a_spoilt_part_is_asked_again(harm, engine, photos, tmp_path, monkeypatch):
    "A part is believed when its checksums hold and its pictures are the same: a run that believes the file alone would keep the spoilt one."
    out, pictures = tmp_path/"out.parquet", list_pictures(photos)
    with monkeypatch.context() as patch:
        patch.setattr("cvops_wb.serve.batches.shutil.rmtree", lambda path: None)
        predict_pictures(engine, pictures, out, part=20)
    first = sorted(Path(f"{out}.parts").iterdir())[0]
    data = bytearray(first.read_bytes())
    if harm == "cut": first.write_bytes(data[:-100])
    elif harm == "flip":
        data[len(data)//3] ^= 1
        first.write_bytes(data)
    else:
        path = photos/pictures[0].name
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))
        pictures = list_pictures(photos)
    assert predict_pictures(engine, pictures, out, part=20).reused == 20
    assert read_part(out, 40) is not None


def test_rows_carry_which_model_spoke(engine, photos, tmp_path):
    "In the file's own metadata."
    import pyarrow.parquet as pq
    predict_pictures(engine, list_pictures(photos)[:2], tmp_path/"o.parquet", "toy:1")
    about = pq.read_schema(tmp_path/"o.parquet").metadata
    assert about[b"version"] == b"toy:1" and about[b"manifest_sha256"].decode() == engine.model.manifest_sha256 and json.loads(about[b"classes"]) == engine.model.classes
