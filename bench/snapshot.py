"""Versions beside plain DVC: the first snapshot, an added hundredth, checkout, status, and the disk they take.

    python bench/snapshot.py [--quick] [--json FILE] [--files N]

Both sides get the same JPEG files of about 20 kB, made here from noise, and run in turn. Ours takes them in first, which decodes, checks and
measures every image and packs them beside; so two numbers stand beside `dvc add` on the folder: the snapshot alone (from the start of Python to
data.dvc, pictures and data card), and ingest and snapshot together. DVC is as it is after `dvc init`, or with hard links to its cache (--links).
Times are those of whole processes: the start of Python and of DVC is included. Curation is not timed: splits and labels are given by hand.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from PIL import Image

REPO = Path(__file__).parents[1]
DVC = [sys.executable, "-m", "dvc"]
QUIET = {"DVC_NO_ANALYTICS": "1", "PYTHONWARNINGS": "ignore"}


def make_images(folder: Path, count: int, seed: int = 0) -> None:
    "So many JPEG files of about 20 kB: one noisy picture in many, each with bytes of its own in a comment."
    import io
    rng, bases = np.random.default_rng(seed), []
    for _ in range(64):
        small = rng.normal(128, 50, (60, 80, 3)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
        bases.append(out.getvalue())
    for k in range(count):
        path = folder/f"{k % 100:02}"/f"{seed}-{k:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        base = bases[k % 64]
        # a comment segment right after the start marker: another file, the same picture
        comment = rng.bytes(64)
        path.write_bytes(base[:2] + b"\xff\xfe" + (66).to_bytes(2, "big") + comment + base[2:])


def run_dvc(root: Path, *arguments: str) -> float:
    "Seconds of one DVC command."
    begin = time.perf_counter()
    subprocess.run([*DVC, *arguments], cwd=root, check=True, capture_output=True, env={**os.environ, **QUIET})
    return time.perf_counter() - begin


INGEST = """
import sys
from pathlib import Path
from cvops_wb.data.intake import IngestSpec, ingest
out = Path("reports/ingest-by-hand"); out.mkdir(parents=True, exist_ok=True)
ingest(sys.argv[1], IngestSpec(), out)
"""
CURATE = """
from pathlib import Path
from cvops_wb.data.store import list_samples, write_samples
table = list_samples()
splits, labels = ("train", "train", "train", "val", "test"), [f"class {k}" for k in range(40)]
table["split"], table["label"] = [splits[k % 5] for k in range(len(table))], [labels[k % 40] for k in range(len(table))]
write_samples(table, Path("reports/curate-by-hand/samples.parquet").absolute())
"""
SNAPSHOT = """
import sys
from pathlib import Path
from cvops_wb.core.records import Selection
from cvops_wb.data.snapshots import SnapshotSpec, take_snapshot
out = Path("reports/snapshot-by-hand"); out.mkdir(parents=True, exist_ok=True)
take_snapshot(Selection("", "reports/curate-by-hand/samples.parquet", 0, 0, {}, {}, 0, "", {}), SnapshotSpec("bench", push=False), out)
"""
CHECKOUT = "import sys; from cvops_wb.data.versions import checkout_version; checkout_version(sys.argv[1])"
STATUS = "from cvops_wb.core.settings import load_settings; from cvops_wb.data.versions import check_status; check_status(load_settings())"


def run_ours(root: Path, program: str, *arguments: str) -> float:
    "Seconds of one of our programs, Python's start and DVC included."
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "CVOPS_ROOT": str(root), "PYTHONPATH": str(REPO)})
    if done.returncode: raise SystemExit(done.stderr)
    return time.perf_counter() - begin


def measure_disk(*folders: Path) -> int:
    "Bytes on the disk; what is linked twice counts once."
    seen = {(s.st_dev, s.st_ino): s.st_blocks*512 for f in folders for p in f.rglob("*") if p.is_file() and not p.is_symlink() and (s := p.stat())}
    return sum(seen.values())


def prepare(root: Path, count: int) -> None:
    "Images made and taken in, splits and labels given; the seconds of the ingest."
    images, ours = root/"images", root/"ours"
    make_images(images, count)
    ours.mkdir()
    shutil.copy(REPO/"settings.ini", ours)
    seconds = run_ours(ours, INGEST, str(images))
    run_ours(ours, CURATE)
    (root/"ingest.json").write_text(json.dumps({"seconds": seconds}))


def measure(root: Path, links: bool) -> list[dict]:
    "All rows, ours and DVC's in turn; the two that are judged, and the empty calls, right after each other."
    images, ours, plain = root/"images", root/"ours", root/"plain"
    plain.mkdir()
    shutil.copytree(images, plain/"images")
    run_dvc(plain, "init", "--no-scm", "-q")
    if links: run_dvc(plain, "config", "cache.type", "hardlink,copy")
    (plain/"empty").write_text("")
    files = [p.stat().st_size for p in images.rglob("*.jpg")]
    size, count, ingest_first = sum(files), len(files), json.loads((root/"ingest.json").read_text())["seconds"]
    os.sync()   # what is left is not what ingest acknowledged
    empty = [run_dvc(plain, "add", "empty") for _ in range(2)]
    first_ours, first_plain = run_ours(ours, SNAPSHOT), run_dvc(plain, "add", "images")
    load = os.getloadavg()[1]
    version = (ours/"data"/"current").read_text().strip()
    status_first = run_ours(ours, STATUS)
    make_images(root/"more", max(count//100, 1), seed=1)
    ingest_added = run_ours(ours, INGEST, str(root/"more"))
    run_ours(ours, CURATE)
    os.sync()
    added_ours = run_ours(ours, SNAPSHOT)
    empty += [run_dvc(plain, "add", "empty") for _ in range(2)]
    status = [(status_first if k == 0 else run_ours(ours, STATUS), run_dvc(plain, "status")) for k in range(3)]
    # DVC's files are links to its cache: new ones go beside them
    shutil.copytree(root/"more", plain/"images", dirs_exist_ok=True)
    shutil.copy(plain/"images.dvc", plain/"first.txt")
    added_plain = run_dvc(plain, "add", "images")
    back_ours = run_ours(ours, CHECKOUT, version)
    shutil.copy(plain/"first.txt", plain/"images.dvc")
    back_plain = run_dvc(plain, "checkout", "images.dvc")
    run_ours(ours, "from cvops_wb.core.settings import load_settings; from cvops_wb.data.versions import free_blobs; free_blobs(load_settings())")
    disk_ours, disk_plain, empty = measure_disk(ours), measure_disk(plain), statistics.median(empty)
    note = f"{count:,} files, {size/1e9:.2f} GB{', hard links' if links else ''}; an empty DVC call {empty:.2f} s; load {load:.1f}"
    state_ours, state_plain = (statistics.median(side) for side in zip(*status, strict=False))
    budget = .05*first_plain + empty
    return [
        row("first snapshot, s", first_ours, first_plain, first_plain/first_ours, ">= 10 x faster", first_plain >= 10*first_ours, 1, note),
        row("an added 1 %, s", added_ours, added_plain, added_ours/budget, "<= 5 % of DVC's first + an empty call", added_ours <= budget, 1, f"budget {budget:.2f} s"),
        row("ingest and first snapshot, s", ingest_first + first_ours, first_plain, first_plain/(ingest_first + first_ours), "told beside", first_plain >= ingest_first + first_ours,
            1, f"ingest {ingest_first:.1f} s: every image decoded, measured, durable one by one, and packed"),
        row("ingest and snapshot of it, s", ingest_added + added_ours, added_plain, added_plain/(ingest_added + added_ours), "told beside",
            added_plain >= ingest_added + added_ours, 1, f"ingest {ingest_added:.1f} s"),
        row("status, s", state_ours, state_plain, state_plain/state_ours, ">= 1", state_ours <= state_plain, 3, "both look at times, sizes and links"),
        row("checkout of the first, s", back_ours, back_plain, back_plain/back_ours, ">= 1", back_ours <= back_plain, 1, "ours hashes every byte; DVC takes a hundredth away"),
        row("disk / images, once packed", disk_ours/size, disk_plain/size, disk_plain/disk_ours, "<= 1.3", disk_ours <= 1.3*size, 1, "without remotes; loose blobs of packed images gone"),
    ]


def row(measure: str, ours: float, peer: float, ratio: float, goal: str, met: bool, runs: int, note: str = "") -> dict:
    "One line of the table."
    return {"measure": measure, "ours": round(ours, 3), "peer": round(peer, 3), "peer_name": "dvc add on the folder", "ratio": round(ratio, 2), "goal": goal,
            "met": bool(met), "runs": runs, "note": note}


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2,000 files")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--links", action="store_true", help="let DVC link files to its cache too, instead of its default, copies")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder if not given")
    parser.add_argument("--prepare", action="store_true", help="make the images and take them in, and say where; no more")
    parser.add_argument("--prepared", type=Path, help="measure on what --prepare has made, which is then deleted")
    options = parser.parse_args()
    count = 2_000 if options.quick else options.files
    root = options.prepared or Path(mkdtemp(prefix="bench-snapshot-", dir=options.folder))
    if options.prepare: return print(prepare(root, count) or f"--prepared {root}")
    try:
        if not options.prepared: prepare(root, count)
        rows = measure(root, options.links)
    finally: shutil.rmtree(root, ignore_errors=True)
    for r in rows: print("{measure:<28} ours {ours:>9.2f}  dvc {peer:>9.2f}  ratio {ratio:>6.2f}  goal {goal:<40} {0}  {note}".format("met" if r["met"] else "NOT MET", **r))
    if options.json: options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__": main()
