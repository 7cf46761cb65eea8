"The page of the whole loop: from results alone, whatever is missing and whatever things are called."
import os
import shutil
import time

import pytest
from watch_bench import fill_bench, take_picture, write_run

from cvops_wb.core.records import Batch, ModelVersion, Selection
from cvops_wb.watch import read_state, render_page

HOSTILE = ("</style></script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=2>", "\"' onload=window.hacked=3 x='", "http://example.com/{{7*7}}")


@pytest.fixture
def full(workbench):
    fill_bench(workbench)
    return workbench


def states(settings): return {step.stage: step.state for step in read_state(settings).steps}


def test_a_full_bench(full):
    state = read_state(full)
    assert state.problems == {} and state.next == "" and {s.stage for s in state.steps if s.state != "done"} == {"explore"}
    assert state.data.count == 23 and len(state.data.photos) == 18 and state.model.version == 1 and state.model.alias == "champion"
    assert state.model.matrix.sum() == 300 and state.service.source == "rehearsal" and state.service.requests == 600 == sum(state.service.traffic)
    assert state.drift.window.drifted and "camera-2" in state.drift.verdict
    page = render_page(state, "/results")
    for text in ("93.1 %", "91.5 %", "mostly camera-2", "champion", "near duplicate 7", 'href="/results/monitor-00000000bb/notebook.html"'): assert text in page
    assert "<script" not in page and page.count("<svg") >= 6


def test_an_empty_bench_names_the_next_command(workbench):
    state = read_state(workbench)
    page = render_page(state)
    assert state.problems == {} and state.next == "cvops ingest SRC"
    for command in ("cvops ingest SRC", "cvops evaluate", "cvops serve", "cvops monitor", "cvops demo"): assert f"<code>{command}</code>" in page


def test_live_traffic_comes_first(workbench):
    fill_bench(workbench, live=True, darker=0.)
    state = read_state(workbench)
    assert state.service.source == "live" and not state.drift.window.drifted and "No drift" in render_page(state)


@pytest.mark.parametrize("gone, problem", [
    ("reports/rehearse-00000000aa/log", ""), ("reports/monitor-00000000bb/window.parquet", "drift"), (".cvops/store/blobs", ""),
    ("data/samples", ""), ("data/registry", ""), ("bentos", ""), ("reports/evaluate-*/predictions.parquet", "model"), ("reports/train-*", ""),
])
def test_what_is_gone_takes_nothing_with_it(full, gone, problem):
    for path in full.root.glob(gone): shutil.rmtree(path) if path.is_dir() else path.unlink()
    state = read_state(full)
    assert set(state.problems) == ({problem} if problem else set())
    assert "could not be read" in render_page(state) if problem else "could not be read" not in render_page(state)


def test_a_damaged_record_is_passed_over(full):
    for path in full.reports.glob("curate-*/record.json"): path.write_text('{"run": "x"')
    assert states(full)["curate"] == "missing" and "Batch" in type(read_state(full).data).__name__ + "Batch"


def test_a_newer_selection_outdates_what_was_made_from_the_old_one(full):
    write_run(full, "curate", Selection("x", "data/samples/made.parquet", 1, 0, {}, {}, 1, "given", {}), ago=1, run="curate-ffffffffff")
    now = states(full)
    assert now["curate"] == "done" and {now[s] for s in ("snapshot", "train", "evaluate", "register", "package", "rehearse", "monitor")} == {"outdated"}
    assert read_state(full).next == "cvops snapshot"


@pytest.mark.parametrize("suffix, age, state", [(".failed", 0, "failed"), (".part", 0, "running"), (".part", 7200, "done")])
def test_a_run_that_goes_on_or_failed(full, suffix, age, state):
    folder = full.reports/f"train-eeeeeeeeee{suffix}"
    folder.mkdir()
    os.utime(folder, (time.time() - age,)*2)
    assert states(full)["train"] == state


def test_a_refused_model_leaves_the_champion(full):
    write_run(full, "register", ModelVersion("warehouse", 0, "", "m", "h", [], False), ago=0, run="register-dddddddddd")
    assert states(full)["register"] == "done" and read_state(full).model.version == 1


def test_hostile_names(workbench, monkeypatch):
    monkeypatch.setenv("CVOPS_WORKBENCH_NAME", HOSTILE[0])
    fill_bench(workbench, names=HOSTILE)
    write_run(workbench, "ingest", Batch(HOSTILE[1], "folder", "nowhere.parquet", 3, 3, 0, {HOSTILE[2]: 3}), ago=0, run="ingest-cccccccccc")
    page = render_page(read_state(workbench), "/results")
    assert "<script" not in page and "<img src=x" not in page and page.count("</style>") == 1 and "window.hacked=1" in page


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(1400, False), (390, True)])
def test_the_page_in_a_browser(workbench, tmp_path, width, dark):
    fill_bench(workbench, names=HOSTILE)
    file = tmp_path/"page.html"
    file.write_text("<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><body data-voila>" + render_page(read_state(workbench)))
    def look(tab):
        return tab.evaluate("""[window.hacked ?? 0, document.documentElement.scrollWidth - innerWidth, getComputedStyle(document.body).backgroundColor,
            [...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width > 50).length, [...document.images].every(i => i.naturalWidth > 0)]""")
    asked, errors, (hacked, over, ground, charts, photos) = take_picture(file.as_uri(), tmp_path/"page.png", width, dark=dark, before=look)
    assert hacked == 0 and errors == [] and over <= 0 and charts >= 5 and photos
    assert ground == ("rgb(13, 18, 23)" if dark else "rgb(245, 246, 248)")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
