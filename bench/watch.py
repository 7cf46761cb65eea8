"""What a look costs when the log is long: `monitor`, the counts behind the pages, and the page `monitoring` in Chromium.

    python bench/watch.py [--quick] [--json FILE] [--rows N] [--no-browser | --pages]

A workbench is made with a log of N predictions (10 million; 200,000 if quick) in segments of 5,000, as the service leaves them when they are compacted: all columns, an embedding
of 64 numbers, four cameras, thirty days. Beside it stands one with a fiftieth of the rows. In turns, each look in a process of its own: the first look of `monitor` at the last 2,000
predictions, a later one after 5,000 more, the counts of the whole log (made once), of what is new, and the page's view of 24 hours. The page is opened in headless Chromium,
from the address to the first picture, to the picture of another period that is picked in it, and, where a person has added a cell, to the page of the viewer's own kernel, by one viewer and by three at once. Peer: the same numbers of a day from reading the log with pandas.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

REPO = Path(__file__).parents[1]
SEGMENT, DAYS = 5000, 30
LOOK = '''
import sys, time, json
from pathlib import Path
what, root = sys.argv[1:3]
import os; os.environ["CVOPS_ROOT"] = root
from cvops_wb.core.processes import hush; hush()
from cvops_wb.core.settings import load_settings
settings = load_settings()
if what == "monitor":
    from cvops_wb.core.records import parse_record
    from cvops_wb.watch import MonitorSpec, monitor
    out = Path(root)/"out"; out.mkdir(exist_ok=True)
    bento = parse_record(json.loads((Path(root)/"bento.json").read_text()))
    start = time.perf_counter(); monitor(".cvops/store/predictions", bento, MonitorSpec(report=False), out)
elif what == "count":
    from cvops_wb.watch import count_log
    start = time.perf_counter(); count_log(settings, 3600.)
elif what == "glance":
    from cvops_wb.watch import read_glance, render_front
    start = time.perf_counter(); render_front(read_glance(settings, "24 hours"), "")
else:
    import pandas as pd
    from cvops_wb.serve import read_predictions
    start = time.perf_counter()
    rows = pd.concat([pd.read_parquet(path, columns=["time", "version", "camera", "confidence", "latency_ms", "failed"]) for path in sorted((settings.store/"predictions").glob("*.parquet"))])
    rows = rows[rows["time"] >= sorted(rows["time"].tail(1))[0][:10]]
    rows.groupby("version")["latency_ms"].quantile(.99), rows.groupby("camera").size()
seconds = time.perf_counter() - start
import resource
print(json.dumps({"seconds": seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}))
'''


def make_segment(folder, seed):
    "One finished segment's rows as the service compacts them."
    import numpy as np
    import pyarrow.parquet as pq
    from watch_bench import write_log

    from cvops_wb.serve import compact_predictions
    from cvops_wb.watch.drift import make_window
    rows = make_window(SEGMENT, seed=seed)
    rng = np.random.default_rng(seed)
    rows["embedding"] = list(rng.normal(size=(SEGMENT, 64)).astype(np.float32))
    rows["camera"] = rng.choice([f"camera-{k}" for k in range(4)], SEGMENT)
    shutil.rmtree(folder, ignore_errors=True)
    write_log(folder, rows)
    compact_predictions(folder)
    return pq.read_table(next(folder.glob("*.parquet")))


def write_segments(folder, tables, count, end, first=0):
    "A log that ends at a moment."
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder.mkdir(parents=True, exist_ok=True)
    span = DAYS*86400/count
    for k in range(first, first + count):
        begin, table = end - (first + count - k)*span, tables[k % len(tables)]
        moments = (1000*(begin + np.arange(SEGMENT)*span/SEGMENT)).astype("datetime64[ms]")
        table = table.set_column(table.schema.get_field_index("time"), "time", pa.array(np.char.add(np.datetime_as_string(moments, unit="ms"), "Z")))
        table = table.set_column(table.schema.get_field_index("request_id"), "request_id", pa.array([f"{k:06}{n:06}" for n in range(SEGMENT)]))
        path = folder/f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(begin))}-{k:09}-1.parquet"
        pq.write_table(table, path)
        os.utime(path, (begin + span, begin + span))


def make_bench(root, tables, reference, rows):
    "A workbench with a package, its reference, and a log."
    from watch_bench import make_bento

    from cvops_wb.core.settings import load_settings
    root.mkdir()
    shutil.copy(REPO/"settings.ini", root)
    os.environ["CVOPS_ROOT"] = str(root)
    settings = load_settings(root)
    bento = make_bento(settings, 1, reference)
    (root/"bento.json").write_text(json.dumps(bento.to_dict()))
    write_segments(settings.store/"predictions", tables, rows//SEGMENT, time.time() - 600)
    return settings


def look(what, root):
    "Seconds and megabytes of one look in a process of its own."
    done = subprocess.run([sys.executable, "-c", LOOK, what, str(root)], capture_output=True, text=True, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})
    if done.returncode: raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def add_cell(settings):
    "The page's notebook with a cell of a person's own: such a page is shown by a kernel."
    notebook = json.loads((REPO/"nbs"/"dashboards"/"monitoring.ipynb").read_text())
    cell = {"cell_type": "code", "id": "own", "metadata": {}, "source": ["6*7"], "outputs": [], "execution_count": None}
    path = settings.root/"nbs"/"dashboards"/"monitoring.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook | {"cells": [*notebook["cells"], cell]}))
    return path


def open_pages(settings, viewers, runs, own=False):
    "Seconds from the address to the first picture, to the answer to a pick made then, and to the page of a kernel if there is one, each viewer's."
    from playwright.sync_api import sync_playwright

    from cvops_wb.watch import dashboard_running
    times, seen = ([], [], [])[:3 if own else 2], "() => document.querySelectorAll('.wb svg.chart').length > 3 && document.querySelector('.wb .tile strong').innerText.length > 0"
    picked = """() => {
        if ([...document.querySelectorAll('.wb .over')].some(each => each.innerText.toLowerCase().includes('7 days'))) return true;
        window.turns = (window.turns ?? -1) + 1;
        if (window.turns % 60) return false;        // a person who is not answered within a second picks again
        const picker = document.querySelector('select');
        picker.selectedIndex = 3;       // 7 days
        picker.dispatchEvent(new Event('change', {bubbles: true}));
    }"""
    live = "() => !document.querySelector('#wb-preview') && document.querySelectorAll('.wb-stand .wb svg.chart').length > 3"
    with dashboard_running(settings=settings, name="monitoring") as (address, _), sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-quic"])
        time.sleep(8)       # the kernel for the next viewer is made while nobody waits
        for _ in range(runs):
            tabs, begin = [browser.new_context(viewport={"width": 1300, "height": 900}).new_page() for _ in range(viewers)], time.perf_counter()
            for tab in tabs: tab.goto(address, wait_until="commit")
            for condition, kept in zip((seen, picked, live), times, strict=False):
                for tab in tabs:
                    tab.wait_for_function(condition, timeout=120_000)
                    kept.append(time.perf_counter() - begin)
            for tab in tabs: tab.context.close()
            time.sleep(8)
        browser.close()
    return times


def row(measure, ours, peer=None, peer_name="", goal="told", met=None, runs=1, note=""):
    clean = [None if v is None else float(f"{v:.4g}") for v in (ours, peer, peer/ours if peer else None)]
    return {"measure": measure, "ours": clean[0], "peer": clean[1], "peer_name": peer_name, "ratio": clean[2], "goal": goal, "met": met, "runs": runs, "note": note}


def compare_looks(long, short, rows, tables, runs):
    "The same looks at both logs, in turns."
    found = {}
    def take(what, name):
        for settings in (short, long): found.setdefault((name, settings is long), []).append(look(what, settings.root))
    take("count", "all counts, once")
    for k in range(runs):
        for settings in (short, long): shutil.rmtree(settings.store/"watch", ignore_errors=True)
        take("monitor", "monitor, first look at 2,000")
        for settings in (short, long): write_segments(settings.store/"predictions", tables, 1, time.time() - 300 + k, rows//SEGMENT + k)
        take("monitor", "monitor, 5,000 new")
        take("count", "counts of 5,000 new")
        take("glance", "page of 24 hours, drawn")
    told = []
    for name in dict.fromkeys(key[0] for key in found):
        ours, less = (median(each["seconds"] for each in found[name, longer]) for longer in (True, False))
        told.append(row(f"{name}, s, log of {rows:,}", ours, less, f"the same, log of {max(SEGMENT, rows//50):,}", "told" if "once" in name else "<= 1.5 x" if "24 hours" not in name else "told",
                        None if "once" in name or "24 hours" in name else ours <= 1.5*less, len(found[name, True]), f"{max(each['mb'] for each in found[name, True]):.0f} MB at most"))
    return told


def compare_pages(settings, size, runs):
    "The page in Chromium, for one viewer and for three at once."
    os.environ["CVOPS_ROOT"], rows, before = str(settings.root), [], {}
    names = [("first picture", "live page: a pick is answered"), ("first picture, with a cell of one's own", "pick answered, with a cell of one's own", "page of a kernel, with a cell of one's own")]
    for own, told in enumerate(names):
        path = add_cell(settings) if own else None
        for viewers in (1, 3):
            for name, found in zip(told, open_pages(settings, viewers, runs, own=bool(own)), strict=True):
                if viewers == 1: before[name] = median(found)
                rows.append(row(f"monitoring in Chromium, to the {name}, s, {viewers} viewer{'s at once' if viewers > 1 else ''}, log of {size:,}", median(found), None, "", "<= 3" if viewers == 1 else "<= 2 x one viewer",
                                median(found) <= (3 if viewers == 1 else 2*before[name]), len(found), f"slowest {max(found):.1f}"))
        if path: path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--pages", action="store_true", help="the page in Chromium alone")
    options = parser.parse_args()
    sys.path[:0] = [str(REPO), str(REPO/"tests")]
    from cvops_wb.core.processes import hush
    hush()
    from cvops_wb.watch.drift import make_window
    count, runs = options.rows or (200_000 if options.quick else 10_000_000), 1 if options.quick else 3
    with TemporaryDirectory(prefix="cvops-watch-") as folder:
        folder = Path(folder)
        tables = [make_segment(folder/"made", seed) for seed in range(4)]
        import numpy as np
        reference = make_window(1000, seed=99)
        reference["embedding"] = list(np.random.default_rng(99).normal(size=(1000, 64)).astype(np.float32))
        reference["camera"] = np.random.default_rng(98).choice([f"camera-{k}" for k in range(4)], 1000)
        rows, middle, size = [], None, count if options.quick else 1_000_000
        if not options.pages:
            long, short = (make_bench(folder/name, tables, reference, amount) for name, amount in (("long", count), ("short", max(SEGMENT, count//50))))
            rows, middle = compare_looks(long, short, count, tables, runs), long if options.quick else None
        if middle is None:
            middle = make_bench(folder/"middle", tables, reference, size)
            for what in ("count", "monitor"): look(what, middle.root)
        if not options.pages:
            whole, ours = look("pandas", middle.root), median(look("glance", middle.root)["seconds"] for _ in range(runs))
            rows.append(row(f"page of 24 hours, drawn, s, log of {size:,}", ours, whole["seconds"], "pandas over the log, no page", runs=runs, note=f"its memory: {whole['mb']:.0f} MB"))
        if not options.no_browser: rows += compare_pages(middle, size, 1 if options.quick else 5)
    print("| measure | ours | peer | | ratio | goal | met | note |\n|---|---|---|---|---|---|---|---|")
    for r in rows: print("|", " | ".join("" if v is None else str(v) for v in (r[k] for k in ("measure", "ours", "peer", "peer_name", "ratio", "goal", "met", "note"))), "|")
    if options.json: options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
