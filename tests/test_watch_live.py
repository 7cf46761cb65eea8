"The service at a glance and a rollout as it goes: counts that add up whatever happens, pages that show them, live, in a real browser."
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
from serve_toy import photograph
from test_serve_canary import Load, arms, make_breaking_graph  # noqa: F401 - a fixture
from watch_bench import fill_bench, take_picture

from cvops_wb.core.errors import WrongUsage
from cvops_wb.core.settings import load_settings
from cvops_wb.serve import Client, Controller, RolloutFile, RolloutSpec, service_running
from cvops_wb.serve.predictions import PredictionLog, compact_predictions
from cvops_wb.serve.rollouts.states import Arm, end, promote
from cvops_wb.watch import dashboard_running, read_glance, read_rollout, render_front, render_rollout, write_mail
from cvops_wb.watch.live.aggregates import BINS, Aggregates, count_rows, find_quantile
from cvops_wb.watch.live.previews import find_preview
from cvops_wb.watch.verdicts.states import Cause, DriftState, Estimate, write_drift_state

REPO = Path(__file__).parents[1]
HOSTILE = "</style></script><script>window.hacked=1</script>"


def iso(seconds): return str(np.datetime64(int(seconds*1000), "ms")) + "Z"


def write_rows(folder, times, version=1, camera="east", closed=True, **more):
    "Predictions through the service's own log."
    log = PredictionLog(folder, lines=100)
    for k, when in enumerate(times):
        log.append({"request_id": f"{when}-{k}", "time": iso(when), "version": version, "camera": camera, "confidence": .8, "latency_ms": 5. + k % 7, "failed": 0, "predicted": "tea", **more})
    if closed: log.close()
    return log


# ---- counts

def test_counts_are_those_of_the_rows():
    rng, n = np.random.default_rng(1), 5000
    rows = pd.DataFrame({"time": [iso(t) for t in 1.76e9 + rng.uniform(0, 7200, n)], "version": rng.integers(1, 3, n), "camera": rng.choice(["a", "b", None], n),
                         "confidence": rng.random(n), "latency_ms": rng.lognormal(2, 1, n), "failed": rng.random(n) < .1})
    counted = count_rows(rows)
    assert counted["count"].sum() == (~rows["failed"]).sum() and counted["failed"].sum() == rows["failed"].sum() == n - counted[BINS].to_numpy().sum()
    want = rows[~rows["failed"]].groupby("version")["latency_ms"].quantile(.99)
    for version, part in counted.groupby("version"): assert find_quantile(part[BINS].to_numpy().sum(0), .99) == pytest.approx(want[version], rel=.12)
    assert count_rows(rows.assign(time="yesterday"))["count"].sum() == 0 == count_rows(rows.iloc[:0])["count"].sum()


def test_a_segment_is_counted_once_whatever_it_becomes(tmp_path):
    counts, day = Aggregates(tmp_path/"log", tmp_path/"cache"), 1_760_000_000
    log = write_rows(tmp_path/"log", day + np.arange(250.), closed=False)       # two full segments and a growing one
    def total(): return int(counts.read(0, 4e9)["count"].sum())
    assert counts.renew() and total() == 250 and counts.done == {}
    compact_predictions(tmp_path/"log")
    assert counts.renew() and total() == 250 and len(counts.done) == 2
    log.close()
    compact_predictions(tmp_path/"log")
    assert counts.renew() and counts.renew() and total() == 250 and counts.growing == {}
    write_rows(tmp_path/"log", day - 90_000 + np.arange(10.))                    # late: yesterday's
    for path in (tmp_path/"log").glob("*.parquet"): shutil.copy(path, tmp_path)
    compact_predictions(tmp_path/"log")
    assert counts.renew() and total() == 260 and counts.read(day - 90_000, day - 80_000)["count"].sum() == 10
    for path in (tmp_path/"log").glob("*.parquet"): path.unlink()               # retention: what was counted stays
    assert counts.renew() and total() == 260
    assert Aggregates(tmp_path/"log", tmp_path/"cache").read(0, 4e9)["count"].sum() == 260


@pytest.mark.parametrize("damage", ["list", "day", "segment"])
def test_damage_costs_what_is_damaged(tmp_path, damage):
    write_rows(tmp_path/"log", 1.76e9 + np.arange(250.))
    compact_predictions(tmp_path/"log")
    counts = Aggregates(tmp_path/"log", tmp_path/"cache")
    if damage == "segment": next((tmp_path/"log").glob("*.parquet")).write_bytes(b"PAR1 not a table")
    counts.renew()
    if damage == "list": (counts.folder/"segments.json").write_text("{")
    if damage == "day":
        for path in counts.folder.glob("*.parquet"): path.unlink()
        (counts.folder/"segments.json").unlink()
    again = Aggregates(tmp_path/"log", tmp_path/"cache")
    again.renew()
    assert 150 <= again.read(0, 4e9)["count"].sum() <= 250 and (damage == "segment" or again.read(0, 4e9)["count"].sum() == 250)


DIES = """
import os, sys
from cvops_wb.watch.live import aggregates
real, left = aggregates.write_atomic, int(sys.argv[3])
def write(*given, **more):
    global left
    left -= 1
    if left < 0: os._exit(9)
    return real(*given, **more)
aggregates.write_atomic = write
aggregates.Aggregates(sys.argv[1], sys.argv[2]).renew()
"""


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_count_that_was_killed_is_made_up_for(tmp_path, writes):
    write_rows(tmp_path/"log", 1.76e9 + np.arange(0, 250_000, 1000.))      # three days
    compact_predictions(tmp_path/"log")
    assert subprocess.run([sys.executable, "-c", DIES, tmp_path/"log", tmp_path/"cache", str(writes)]).returncode == 9
    counts = Aggregates(tmp_path/"log", tmp_path/"cache")
    assert counts.renew() and counts.read(0, 4e9)["count"].sum() == 250


def test_a_list_written_before_its_days_would_be_seen(tmp_path, monkeypatch):
    # the planted bug: the list first, then the days
    write_rows(tmp_path/"log", 1.76e9 + np.arange(250.))
    compact_predictions(tmp_path/"log")
    counts = Aggregates(tmp_path/"log", tmp_path/"cache")
    def fails(*_): raise KeyboardInterrupt
    monkeypatch.setattr(Aggregates, "write_day", fails)
    with pytest.raises(KeyboardInterrupt): counts.renew()
    assert not (counts.folder/"segments.json").exists()


def test_several_viewers_count_together(tmp_path):
    write_rows(tmp_path/"log", 1.76e9 + np.arange(0, 1_500_000, 1000.))
    compact_predictions(tmp_path/"log")
    def count(_): return Aggregates(tmp_path/"log", tmp_path/"cache").renew()
    with ThreadPoolExecutor(4) as pool: assert all(pool.map(count, range(4)))
    assert Aggregates(tmp_path/"log", tmp_path/"cache").read(0, 4e9)["count"].sum() == 1500


def test_a_window_costs_by_the_window(tmp_path, monkeypatch):
    write_rows(tmp_path/"log", 1.76e9 + np.arange(0, 20*86400, 8640.))
    compact_predictions(tmp_path/"log")
    Aggregates(tmp_path/"log", tmp_path/"cache").renew()
    counts, read = Aggregates(tmp_path/"log", tmp_path/"cache"), []
    monkeypatch.setattr(pd, "read_parquet", lambda path, real=pd.read_parquet: (read.append(path), real(path))[1])
    monkeypatch.setattr(Aggregates, "read_table", lambda *_: pytest.fail("a counted segment was read again"))
    counts.renew()
    counts.read(1.76e9 + 5*86400, 1.76e9 + 5*86400 + 3600)
    assert len(read) == 1 and len(list(counts.folder.glob("*.parquet"))) == 21


# ---- the glance and its page

def plant(settings, cameras=("east", "west"), name="camera-3: darker by 40 %"):
    "A full workbench with live predictions, a verdict with images, spot checks."
    fill_bench(settings)
    now = time.time()
    for k, camera in enumerate(cameras): write_rows(settings.store/"predictions", now - 3000 + np.arange(300.)*10, 1 + k, camera)
    ids = tuple(path.stem for path in sorted((settings.store/"blobs").rglob("*.jpg"))[:6])
    state = DriftState(1, "m", iso(now - 60), 600, True, 3.2, .7, iso(now - 1800), (Cause("images", "brightness", name, cameras[0], 3.2, -.4, .7, iso(now - 1800), ids),),
                       {cameras[0]: 3.2}, ids, Estimate(.81, .77, .85, time=iso(now)), (Estimate(.8, .7, .9, method="spot check", count=50, time=iso(now - 900)),),
                       ("a segment came late",), ((iso(now - 1800), .2), (iso(now - 600), 3.2)), 1, "reports/monitor-00000000bb/drift.html")
    write_drift_state(state, settings)
    return state


def test_a_glance(workbench):
    state = plant(workbench)
    glance = read_glance(workbench)
    assert glance.problems == {} and glance.traffic.count == 600 and glance.cameras == ("east", "west") and set(glance.traffic.versions) == {1, 2}
    assert len(glance.photos) == 6 and not glance.service.ready and {step.stage for step in glance.training} == {"train", "evaluate", "register", "package"}
    page = render_front(glance)
    for text in ("drift", "not serving", "81.0 %", "camera-3: darker by 40 %", "data:image/jpeg", "600", "version 2: 300", "a segment came late"): assert text in page
    west = read_glance(workbench, "1 hour", "west")
    assert west.traffic.count == 300 and west.cameras == ("east", "west") and "camera-3: darker" not in render_front(west).split("<h2>Drift")[1]
    write_drift_state(replace(state, drifted=False, score=.1, causes=()), workbench)
    assert "healthy" not in render_front(read_glance(workbench)) and '"pill bad"' not in render_front(read_glance(workbench))


@pytest.mark.parametrize("gone", ["verdict", "reports", "log", "blobs"])
def test_what_is_gone_takes_nothing_with_it(workbench, gone):
    plant(workbench)
    if gone == "verdict": next((workbench.store/"watch").rglob("state.json")).write_text("{")
    if gone == "reports": shutil.rmtree(workbench.reports)
    if gone == "log": shutil.rmtree(workbench.store/"predictions")
    if gone == "blobs": shutil.rmtree(workbench.store/"blobs")
    glance = read_glance(workbench)
    assert set(glance.problems) == ({"drift"} if gone == "verdict" else set()) and "<h1>warehouse" in render_front(glance)


def test_the_service_tells_of_itself(bench, bento, monkeypatch):
    with service_running(bento, bench.store/"told"/"predictions") as service:
        Client(service.url).predict(photograph("red"))
        with pytest.raises(Exception, match="415|400|422"): Client(service.url).predict(b"no image at all")
        settings = replace(bench, serve=replace(bench.serve, port=int(service.url.rpartition(":")[2])))
        glance = read_glance(settings)
    assert glance.service.ready and sum(glance.service.refusals.values()) == 1 and glance.service.facts["workers"] == 1
    assert "Refused since the service began" in render_front(glance) and glance.service.shares == {"champion: version 1": 1.}


@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(1300, False), (390, True)])
def test_the_edition_for_mail(workbench, tmp_path, width, dark):
    plant(workbench, ("east", HOSTILE), HOSTILE)
    file = write_mail(tmp_path/"page.html", settings=workbench)
    text = file.read_text()
    assert "<script" not in text and "http-equiv" in text and text.count("data:image/jpeg") == 6 and len(text) < 400_000
    def look(tab):
        return tab.evaluate("[window.hacked ?? 0, document.documentElement.scrollWidth - innerWidth, getComputedStyle(document.body).backgroundColor, [...document.images].every(i => i.naturalWidth > 0),"
                            "document.querySelectorAll('svg.chart').length]")
    asked, errors, (hacked, over, ground, photos, charts) = take_picture(file.as_uri(), tmp_path/"page.png", width, dark=dark, before=look)
    assert hacked == 0 and errors == [] and over <= 0 and photos and charts >= 5 and ground == ("rgb(13, 18, 23)" if dark else "rgb(245, 246, 248)")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def add_cell(settings, name="monitoring"):
    "The dashboard's notebook with a cell of a person's own."
    notebook = json.loads((REPO/"nbs"/"dashboards"/f"{name}.ipynb").read_text())
    cell = {"cell_type": "code", "id": "own", "metadata": {}, "source": ["6*7"], "outputs": [], "execution_count": None}
    (settings.root/"nbs"/"dashboards").mkdir(parents=True, exist_ok=True)
    (settings.root/"nbs"/"dashboards"/f"{name}.ipynb").write_text(json.dumps(notebook | {"cells": [*notebook["cells"], cell]}))


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("own", [False, True])
def test_the_page_is_live_for_several_viewers(workbench, monkeypatch, own):
    from playwright.sync_api import sync_playwright
    plant(workbench)
    if own: add_cell(workbench)
    monkeypatch.setenv("CVOPS_MONITOR_REFRESH", "1.5")
    answers = "() => document.querySelector('.wb .tile strong').innerText"
    with dashboard_running(settings=workbench, name="monitoring") as (address, process), sync_playwright() as p:
        browser, errors, asked = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-quic"]), [], []
        tabs = [browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page() for width, scheme in ((1300, "light"), (390, "dark"))]
        for tab in tabs:
            tab.on("pageerror", lambda error: errors.append(str(error)))
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(address)
            tab.wait_for_selector(".wb h1", timeout=60_000)
            assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        for tab in tabs if own else ():     # the kernel's page takes the place of what was seen first
            tab.wait_for_selector(".wb-stand .wb h1", timeout=60_000)
            assert tab.query_selector("#wb-preview") is None and tab.locator(".wb").count() == 1
            tab.wait_for_function("[...document.querySelectorAll('.jp-OutputArea-output')].some(output => output.innerText.trim() === '42')", timeout=60_000)
        tabs[0].select_option("select >> nth=1", label="west")     # one viewer picks, the other does not notice
        tabs[0].wait_for_function(f"({answers})() === '300'", timeout=20_000)
        assert tabs[1].evaluate(answers) == "600"
        write_rows(workbench.store/"predictions", time.time() + np.arange(11.), 2, "west")
        for tab, count in zip(tabs, ("311", "611"), strict=True): tab.wait_for_function(f"({answers})() === '{count}'", timeout=30_000)
        tabs[1].select_option("select >> nth=0", label="1 hour")
        tabs[1].wait_for_function("document.querySelector('.wb .over').innerText.toLowerCase().includes('1 hour')", timeout=20_000)
        assert tabs[0].evaluate(answers) == "311" and errors == [] and all(url.startswith((address.split("?")[0], "data:", "blob:", "ws://127.0.0.1")) for url in asked)
        closed = browser.new_context().new_page()
        assert closed.goto(address.split("?")[0]).status == 403 and "wb-preview" not in closed.content()
        text = httpx.get(address, timeout=60, trust_env=False).text      # what can be seen comes before what a kernel makes
        assert text.index('id="wb-preview"') < text.index("<svg") < text.index("</main>")
        assert (text.find("jupyter-config-data") > text.index("</main>")) == own and (len(psutil.Process(process.pid).children()) > 0) == own       # what is as it came needs no kernel
        browser.close()


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_of_the_server_alone(workbench, monkeypatch, tmp_path):
    # a new camera can be picked, who reads or pauses is not disturbed, and a server that is gone is told
    plant(workbench, ("east", LONG := HOSTILE + "x"*80))
    monkeypatch.setenv("CVOPS_MONITOR_REFRESH", "1")
    value = "document.querySelector('#wb-seen .tile strong').innerText"

    def look(tab):
        tab.click("#wb-live")
        write_rows(workbench.store/"predictions", time.time() + np.arange(11.), 2, "north")
        tab.wait_for_timeout(2500)
        paused = tab.evaluate(value), tab.get_attribute("#wb-live", "aria-pressed")
        tab.click("#wb-live")
        tab.wait_for_function("document.querySelectorAll('select')[1].options.length === 4", timeout=20_000)
        tab.select_option("select >> nth=1", label="north")
        tab.wait_for_function(f"{value} === '11'", timeout=20_000)
        process.kill()
        tab.wait_for_function("document.querySelector('#wb-wait').innerText.includes('still running?')", timeout=20_000)
        return paused, tab.evaluate(value), tab.evaluate("[...document.querySelectorAll('select')[1].options].map(option => option.value)"), tab.evaluate("[window.hacked ?? 0, document.documentElement.scrollWidth - innerWidth]")
    with dashboard_running(settings=workbench, name="monitoring") as (address, process):
        _, errors, told = take_picture(address, tmp_path/"alone.png", 390, before=look, wait="#wb-seen h1")
    assert errors == [] and told == (("600", "false"), "11", ["", LONG, "east", "north"], [0, 0])


@pytest.mark.slow
@pytest.mark.browser
def test_the_first_picture_answers_and_hands_over(workbench, tmp_path):
    plant(workbench)
    add_cell(workbench)
    held = []

    def look(tab):
        assert tab.query_selector(".wb-stand") is None and tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        tab.select_option("#wb-preview select >> nth=1", label="west")
        tab.wait_for_function("document.querySelector('#wb-seen .tile strong').innerText === '300'", timeout=20_000)
        codes = tab.evaluate("Promise.all(['seen?period=8+days', 'seen?camera=%3Cb%3E', 'seen'].map(path => fetch(path).then(answer => answer.status)))")
        tab.unroute("**/voila.js")      # what is asked for from here on goes through
        for route in held: route.continue_()
        tab.wait_for_function("!document.querySelector('#wb-preview') && document.querySelector('.wb-stand .tile strong')", timeout=60_000)
        return codes, tab.inner_text(".wb-stand .tile strong"), tab.evaluate("document.querySelectorAll('select')[1].value")

    with dashboard_running(settings=workbench, name="monitoring") as (address, _):
        _, errors, told = take_picture(address, tmp_path/"first.png", 390, before=look, wait="#wb-seen h1", prepare=lambda tab: tab.route("**/voila.js", lambda route: held.append(route)))     # the scripts are held back: the server alone answers
        assert httpx.get(f"{address.split('?')[0]}seen", trust_env=False).status_code == 403
    assert errors == [] and told == ([400, 400, 200], "300", "west")


def test_viewers_share_the_first_picture(workbench):
    plant(workbench)
    drawn = []
    preview = find_preview(REPO/"nbs"/"dashboards"/"monitoring.ipynb", workbench)
    draw = preview.draw
    preview.draw = lambda *picked: (drawn.append(picked), time.sleep(.05), draw(*picked))[2]
    with ThreadPoolExecutor(6) as pool: texts = set(pool.map(lambda _: preview.take(), range(6)))
    assert len(texts) == len(drawn) == 1 and "camera-3: darker by 40 %" in preview.take() and preview.take().count("data:image/jpeg") == 6
    write_rows(workbench.store/"predictions", time.time() - 30 + np.arange(11.), 2, "west")
    assert ">600<" in preview.take() and len(drawn) == 1
    preview.sights = {key: replace(sight, made=sight.made - preview.keep) for key, sight in preview.sights.items()}      # it has grown old
    assert ">611<" in preview.take() and len(drawn) == 2 and ">311<" in preview.look("7 days", "west").page and drawn[-1] == ("7 days", "west")
    for other in (("8 days", ""), ("7 days", "north"), ("7 days", HOSTILE)):        # the cache grows by what can be picked, not by what is asked
        with pytest.raises(WrongUsage): preview.look(*other)
    assert len(drawn) == 3


def test_a_page_that_a_person_changed_has_no_preview(workbench, tmp_path):
    text = (REPO/"nbs"/"dashboards"/"monitoring.ipynb").read_text()
    (tmp_path/"mine.ipynb").write_text(text.replace("show_monitoring()", "show_monitoring('7 days')"))
    assert find_preview(tmp_path/"mine.ipynb", workbench) is None and find_preview(REPO/"nbs"/"dashboards"/"workbench.ipynb", workbench) is None
    add_cell(workbench)
    assert [find_preview(root/"nbs"/"dashboards"/"monitoring.ipynb", workbench).whole for root in (REPO, workbench.root)] == [True, False]


# ---- the page of a rollout

def test_a_promoted_version_is_held_against_the_one_it_replaced(workbench):
    file = RolloutFile(workbench.store/"rollout")
    file.start(Arm(7, "old", "a"), Arm(8, "new", "b"), "r")
    for change, share in ((None, "1%"), (promote, "100%"), (end, "100%")):
        if change: file.change(change, "fine")
        page = render_rollout(read_rollout(workbench))
        assert "baseline: version 7" in page and "challenger: version 8" in page and f"<strong class=\"\">{share}</strong>" in page


def test_no_rollout_yet(workbench):
    assert "cvops rollout start VERSION" in render_rollout(read_rollout(workbench))
    (workbench.store/"rollout").mkdir(parents=True)
    (workbench.store/"rollout"/"state.json").write_text("{")
    assert "No rollout" in render_rollout(read_rollout(workbench))


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_follows_a_real_rollout(bench, bento, arms, tmp_path):  # noqa: F811
    settings, log, pages = load_settings(bench.root), bench.store/"predictions", {}
    spec, file = RolloutSpec(step_seconds=.3, step_pairs=25, hold=30., error_margin=.1, latency_margin=2.), RolloutFile(bench.store/"rollout")

    def follow(until, seconds=90):
        controller, end = Controller(bench.store/"rollout", log, spec), time.monotonic() + seconds
        while time.monotonic() < end:
            state, page = controller.tick(), render_rollout(read_rollout(settings))
            pages[state.event] = page
            if until(state): return controller, page
            time.sleep(.1)
        pytest.fail(f"still {state}")

    with service_running(bento, log) as service, Load(service.url) as load, dashboard_running(settings=settings, name="rollout") as (address, _):
        file.start(arms[0], arms[1], "good", (.25, .5))
        controller, page = follow(lambda state: state.event == "promote")
        view = read_rollout(settings)
        assert view.pairs >= controller.evidence.pairs > 0 and view.trail[-1][0] == view.pairs      # a few answers came after the decision
        assert all(ours >= theirs for arm in view.seen for ours, theirs in zip(view.seen[arm], controller.evidence.seen[arm], strict=True))
        assert "25%" in pages["start"] and "Version 2 against 1" in pages["start"] and "errors: no worse" in page and "promoted" in page and "shown to be no worse" in page
        file.start(arms[1], arms[2], "bad", (.25, .5))

        def look(tab):
            before = tab.inner_text(".wb h1")
            follow(lambda state: state.event == "abort")
            tab.wait_for_function("document.querySelector('.wb h1').innerText.includes('rolled back')", timeout=20_000)
            return before, tab.inner_text(".wb .lead"), tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        _, errors, (before, lead, over) = take_picture(address, os.environ.get("CVOPS_SHOT") or tmp_path/"rollout.png", 1300, before=look, wait=".wb h1")
        number = file.read().number
        assert "rolled back" not in before and "fails in" in lead and errors == [] and over <= 0
        assert read_rollout(settings).state.number == number == file.read().number and load.failed == []      # to look changes nothing
