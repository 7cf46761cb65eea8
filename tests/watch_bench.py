"A workbench full of results, made without running a stage: what the dashboard and the monitor read."
import hashlib
import io
import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from cvops_wb.core.files import dump_json, hash_file, hash_value
from cvops_wb.core.records import (
    SAMPLE_COLUMNS,
    Batch,
    Bento,
    Candidate,
    Envelope,
    Evaluation,
    ModelVersion,
    Rehearsal,
    Selection,
    Snapshot,
)
from cvops_wb.watch.drift import make_window

CLASSES = ("tea", "milk", "bread", "jam")
COLOURS = {"tea": (86, 140, 80), "milk": (120, 160, 215), "bread": (196, 148, 84), "jam": (170, 50, 80)}


def write_run(settings, stage, record, ago=300., seconds=4., inputs=None, run="", files=()):
    "A finished run: its folder with record.json, a page and whatever else."
    run = run or f"{stage}-{hash_value([stage, str(record)])[:10]}"
    folder = settings.reports/run
    folder.mkdir(parents=True, exist_ok=True)
    made = datetime.fromtimestamp(time.time() - ago, UTC).isoformat(timespec="seconds")
    envelope = Envelope(run, stage, record, key="k", created=made, seconds=seconds, inputs=inputs or {})
    (folder/"record.json").write_text(dump_json(envelope.to_dict()))
    os.utime(folder/"record.json", (time.time() - ago + seconds,)*2)
    (folder/"notebook.html").write_text(f"<!doctype html><title>{stage}</title><h1>{stage}</h1><script>document.title='ran'</script>")
    for name, content in dict(files).items(): (folder/name).write_bytes(content)
    return run


def paint(label, seed):
    "A product on a shelf, as a JPEG."
    rng = np.random.default_rng(seed)
    image = Image.fromarray(np.linspace(90, 150, 240*320*3).reshape(240, 320, 3).astype(np.uint8))
    pen, (x, y) = ImageDraw.Draw(image), rng.integers(20, 120, 2)
    pen.rectangle((0, 200, 320, 240), fill=(92, 74, 60))
    pen.rounded_rectangle((x, y - 10, x + 100, y + 90), 14, fill=COLOURS[label], outline=(30, 30, 30), width=3)
    pen.ellipse((x + 25, y + 20, x + 75, y + 60), fill=tuple(int(c) for c in rng.integers(150, 255, 3)))
    noisy = np.asarray(image) + rng.normal(0, 9, (240, 320, 3))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_images(settings, each=6, names=CLASSES):
    "Photographs in the store and their sample table; returns the table's name."
    from cvops_wb.data import write_samples
    rows = []
    for name, look in zip(names, CLASSES, strict=True):
        for k in range(each):
            data = paint(look, 100*CLASSES.index(look) + k)
            digest = hashlib.sha256(data).hexdigest()
            path = settings.store/"blobs"/digest[:2]/f"{digest}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            texts = {column: [] if kind == "list" else "" if kind == "str" else 0 for column, kind in SAMPLE_COLUMNS.items()}
            rows.append({**texts, "id": digest[:16], "sha256": digest, "ext": ".jpg", "label": name, "split": ("train", "test")[k % 3 == 0], "width": 320, "height": 240})
    path = settings.root/"data"/"samples"/"made.parquet"
    write_samples(pd.DataFrame(rows).drop_duplicates("sha256"), path)
    return path.relative_to(settings.root).as_posix()


def write_model(folder, reference):
    "A model's folder as far as the watcher reads it."
    folder.mkdir(parents=True, exist_ok=True)
    reference.to_parquet(folder/"reference.parquet", index=False)
    entry = {"sha256": hash_file(folder/"reference.parquet"), "size": (folder/"reference.parquet").stat().st_size}
    (folder/"manifest.json").write_text(json.dumps({"schema": 1, "files": {"reference.parquet": entry}}))
    return hash_file(folder/"manifest.json")


def write_log(folder, rows):
    "Predictions, through the service's own log."
    from cvops_wb.serve.predictions import PredictionLog, pack
    log = PredictionLog(folder)
    for row in rows.to_dict("records"): log.append({**row, "embedding": pack(row["embedding"]), "scores": pack(np.array([row["confidence"]]))})
    log.close()


def make_bento(settings, version=1, reference=None):
    "A packaged version with its reference."
    place = settings.root/"bentos"/"classifier"/"built"/str(version)
    digest = write_model(place/"src"/"model", make_window(300, seed=1) if reference is None else reference)
    return Bento(f"classifier:{version}", place.relative_to(settings.root).as_posix(), version, settings.workbench.name, digest, "champion")


def rename(frame, names):
    "The made-up labels under other names."
    new = dict(zip(CLASSES, names, strict=True))
    return frame.replace({"label": new, "predicted": new})


def write_event(settings, version, when="2026-03-02T09:30:00+00:00"):
    "One version in the registry."
    body = {"schema": 1, "time": when, "previous": "", "event": "registered", "by": "anna", **{k: v for k, v in version.to_dict().items() if k not in ("kind", "schema")}}
    path = settings.versioned/"registry"/"events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_json({"id": hash_value(body)[:16], **body}, indent=None) + "\n")


def fill_bench(settings, names=CLASSES, darker=.4, live=False, report=False):
    "All stages but explore, as if the loop had run; returns the window that `monitor` made."
    from cvops_wb.watch import MonitorSpec, monitor
    samples = write_images(settings, names=names)
    classes = dict.fromkeys(names, 6)
    batch = write_run(settings, "ingest", Batch("synth", "synth", samples, 24, 24, 2, classes), 1200, 6.1)
    selection = Selection(batch, samples, 23, 1, {"exact_duplicate": 4, "near_duplicate": 7, "dark": 2}, {"train": 15, "test": 8, "none": 1}, 20, "grouped", classes)
    chosen = write_run(settings, "curate", selection, 1100, 8.4, {"batch": batch})
    snap = Snapshot("a1b2c3d4e5f6", samples, [], 23, list(names), {"train": 15, "test": 8})
    snapshot = write_run(settings, "snapshot", snap, 1000, 9., {"selection": chosen})
    reference = rename(make_window(300, seed=1), names)
    bento = make_bento(settings, 1, reference)
    metrics = {"accuracy": .931, "macro_f1": .927, "calibration_error": .031, "latency_ms": 2.4, "size_mb": 7.6, "accuracy_unleaked": .915, "count_unleaked": 280.}
    candidate = Candidate(snap.id, "classification", "small_resnet", "reports/x/model", list(names), 112, metrics, {}, bento.manifest_sha256)
    train = write_run(settings, "train", candidate, 900, 48., {"snapshot": snapshot})
    table = io.BytesIO()
    reference[["id", "label", "predicted", "confidence"]].to_parquet(table, index=False)
    judged = Evaluation(train, snap.id, "test", 300, metrics, {"accuracy": [.902, .954]}, {n: {"f1": .9, "count": 75.} for n in names},
                        "reports/PLACE/predictions.parquet", "reports/x/model", bento.manifest_sha256)
    place = f"evaluate-{hash_value('evaluate')[:10]}"
    evaluation = write_run(settings, "evaluate", replace(judged, predictions=f"reports/{place}/predictions.parquet"), 800, 3., {"candidate": train},
                           place, {"predictions.parquet": table.getvalue()})
    version = ModelVersion(settings.workbench.name, 1, "champion", "data/registry/x/1", bento.manifest_sha256, [], True, train, snap.id, metrics)
    write_event(settings, version)
    registered = write_run(settings, "register", version, 700, 2., {"evaluation": evaluation})
    packaged = write_run(settings, "package", bento, 600, 5., {"version": registered})
    rehearsing = "rehearse-00000000aa"
    log = settings.store/"predictions" if live else settings.reports/rehearsing/"log"
    write_log(log, rename(make_window(600, seed=2, darker=darker, dark_camera="camera-2"), names))
    name = log.relative_to(settings.root).as_posix()
    rehearsal = Rehearsal(bento.tag, 600, 0, .81, 4.2, 12.6, 4.4, (settings.reports/rehearsing/"log").relative_to(settings.root).as_posix())
    write_run(settings, "rehearse", rehearsal, 500, 11., {"bento": packaged, "snapshot": snapshot}, rehearsing)
    out = settings.reports/"monitor-00000000bb"
    out.mkdir()
    window = monitor(name, bento, MonitorSpec(report=report), out)
    write_run(settings, "monitor", window, 5, 14., {"bento": packaged}, out.name)
    return window


def take_picture(address, path, width=1400, height=1000, dark=False, full=True, before=None, wait=None, prepare=None):
    "Open a page in headless Chromium; returns the requests that were made, the console's errors and the result of `before(page)`."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
        try:
            page = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light").new_page()
            asked, errors = [], []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: errors.append(str(error)))
            if prepare: prepare(page)
            page.goto(address, wait_until="commit" if prepare else "load", timeout=60_000)
            if wait: page.wait_for_selector(wait, state="visible", timeout=60_000)
            told = before(page) if before else None
            if path: page.screenshot(path=str(Path(path)), full_page=full)
        finally: browser.close()
    return asked, errors, told
