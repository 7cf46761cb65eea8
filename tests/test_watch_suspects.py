"From real photographs to the verdict's page and FiftyOne: the images that were made dark are the ones that are shown."
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance
from watch_bench import make_bento, take_picture, write_log

from cvops_wb.core.errors import BadInput
from cvops_wb.watch import MonitorSpec, monitor, read_drift_state
from cvops_wb.watch.drift import make_window
from cvops_wb.watch.verdicts.states import DriftState

HOSTILE = "</style><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"


@pytest.fixture
def watched(workbench, grocery, monkeypatch):
    "A bench that has taken in 240 photographs, of which the last 60 of one camera went dark; and its window."
    from cvops_wb.data import IngestSpec, ingest, read_samples
    folder, out = workbench.root/"photos", workbench.reports/"ingest-0000000000"
    out.mkdir(parents=True)
    paths = sorted(grocery.rglob("*.jpg"))[::11][:240]
    for k, path in enumerate(paths):
        image, made = Image.open(path).convert("RGB"), io.BytesIO()
        (ImageEnhance.Brightness(image).enhance(.35) if k >= 180 and k % 2 else image).save(made, "JPEG", quality=88)
        place = folder/"shelf"/f"{k:03}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(made.getvalue())
    table = read_samples(ingest(str(folder), IngestSpec(), out).samples)
    order = table.assign(number=[int(re.search(r"(\d+)\.jpg", str(list(s))).group(1)) for s in table["sources"]]).sort_values("number")
    rng, made = np.random.default_rng(0), make_window(240, seed=3)
    kept = ["id", "brightness", "contrast", "sharpness", "entropy", "saturation", "width", "height", "bytes"]
    rows = made.assign(**{name: order[name].to_numpy() for name in kept}, camera=[HOSTILE if n % 2 else "camera-2" for n in order["number"]])
    picked = rows.iloc[rng.integers(0, 180, 400)]
    reference = picked.assign(**{name: picked[name]*rng.normal(1, .02, 400) for name in kept[1:6]}, camera="")
    write_log(workbench.root/".cvops/store/predictions", rows)
    run = workbench.reports/"monitor-0000000000.part"
    run.mkdir()
    monkeypatch.setenv("CVOPS_PART", str(run))
    window = monitor(".cvops/store/predictions", make_bento(workbench, reference=reference), MonitorSpec(report=False), run)
    dark = set(order.loc[(order["number"] >= 180) & (order["number"] % 2 == 1), "id"])
    return workbench, run/"drift.html", window, dark


def test_the_right_images_are_on_the_page(watched):
    _, page, window, dark = watched
    text = page.read_text()
    assert window.drifted and window.causes[0]["camera"] == HOSTILE and "darker by" in window.causes[0]["words"]
    shown = window.causes[0]["samples"][:18]
    assert len(shown) == 18 and sum(sample in dark for sample in shown) >= 17
    assert text.count('src="data:image/jpeg;base64,') >= 18 and "not kept" not in text and len(text) < 6e6
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width, dark_mode", [(1200, False), (390, True)])
def test_the_page_in_a_browser(watched, tmp_path, width, dark_mode):
    _, page, _, _ = watched
    def look(tab): return tab.evaluate("[window.hacked ?? 0, [...document.images].filter(i => i.naturalWidth > 0).length, document.images.length, document.documentElement.scrollWidth - innerWidth]")
    asked, errors, (hacked, drawn, images, beyond) = take_picture(page.as_uri(), tmp_path/"drift.png", width=width, dark=dark_mode, before=look)
    assert hacked == 0 and drawn == images >= 18 and beyond <= 0 and errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.slow
def test_a_saved_view_for_each_cause(watched):
    from cvops_wb.data import index_suspects
    from cvops_wb.data.views import open_fiftyone
    from cvops_wb.loop.checking import list_suspects
    _, _, window, dark = watched
    view = index_suspects(list_suspects(read_drift_state(1)), "version 1")
    with open_fiftyone() as fiftyone:
        dataset = fiftyone.load_dataset(view.dataset)
        assert "drift" in dataset.list_saved_views() and set(view.tags) == set(dataset.list_saved_views())
        first = dataset.load_saved_view(next(name for name in dataset.list_saved_views() if "darker by" in name))
        assert np.isin(first.values("key")[:18], list(dark)).mean() > .9


@pytest.mark.parametrize("state, got, fix", [(None, "nothing was watched yet", "run `cvops monitor`"), (DriftState(2, rows=1450), "no drift in 1,450 predictions of version 2", "nothing, until")])
def test_no_suspects_is_no_riddle(state, got, fix):
    from cvops_wb.loop.checking import list_suspects
    with pytest.raises(BadInput) as told: list_suspects(state)
    assert told.value.got == got and told.value.fix.startswith(fix)


def test_without_images_it_is_said(workbench):
    from cvops_wb.data import index_suspects
    with pytest.raises(BadInput, match="kept"): index_suspects(pd.DataFrame([("ab"*8, "x", 1, "", "", "")], columns=["id", "cause", "place", "camera", "time", "predicted"]))


def test_views_stand_in_the_order_of_the_causes_and_their_names_end_at_a_word():
    from cvops_wb.data.looks.suspects import name_views
    long = "camera-z: width 320 in 16 % of the images, was 0 %, height 272 in 16 % of the images, was 0 %, since 03:16 UTC"
    named = name_views([long, "camera-a: darker by 40 %, since 03:16 UTC", long])
    assert list(named.values()) == [long, "camera-a: darker by 40 %, since 03:16 UTC"] and list(named)[1].startswith("2 camera-a")
    assert len(list(named)[0]) <= 90 and list(named)[0].endswith("16 % of the images, …")
