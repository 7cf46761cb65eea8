"""Odd images beside CleanVision: dark, bright, blurred, blank, odd size, odd shape; recall, precision, images a second. And what does not belong here at all.

    python bench/quality.py [--quick] [--json FILE] [--files N] [--runs N] [--photos DIR] [--peer PYTHON]

The files are the shared grocery photographs; of every fifty, six are spoiled: one of each kind, every second one mildly. The strengths are ours and were set
before the limits were looked at again. Recall is of spoiled images that bear the flag of their kind. Precision is of flagged images: one that nobody spoiled is an error,
although a shelf may well be photographed darkly or out of focus; one flagged for another reason as well is none. CleanVision 0.3.7 runs
with its own limits, for these six issues alone, in an environment of its own (`make bench-peers`), on as many processes as there are cores.
Both sides start from files and end with flags; ours also proves that the file is whole and hashes it, which `cvops ingest` does in the same decode.
What does not belong: boards of printed circuits (the shared DeepPCB images) and drawn shelves among the photographs, ranked by the score `outlier` of hand-made
features; CleanVision has no such score, so the row has no peer.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

REPO = Path(__file__).parents[1]
DATA = REPO.parent/"shared"/"data"
KINDS = {"dark": "dark", "bright": "light", "blurred": "blurry", "blank": "low_information", "odd_size": "odd_size", "odd_shape": "odd_aspect_ratio"}
PEER = '''
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
from cleanvision import Imagelab
kinds = json.loads(sys.argv[2])
start = time.perf_counter()
lab = Imagelab(data_path=sys.argv[1], verbose=False)
lab.find_issues({kind: {} for kind in kinds.values()}, n_jobs=len(os.sched_getaffinity(0)), verbose=False)
seconds, issues = time.perf_counter() - start, lab.issues
found = {os.path.basename(path): [ours for ours, theirs in kinds.items() if row[f"is_{theirs}_issue"]] for path, row in issues.iterrows()}
print(json.dumps({"seconds": seconds, "found": found}))
'''


def spoil(image: Image.Image, kind: str, mild: bool, rng: random.Random) -> Image.Image:
    "One fault, strong or mild."
    pixels = np.asarray(image, np.float32)
    if kind == "dark": return to_image(pixels*(rng.uniform(.18, .25) if mild else rng.uniform(.05, .12)))
    if kind == "bright": return to_image(255 - (255 - pixels)*(rng.uniform(.2, .3) if mild else rng.uniform(.03, .1)))
    if kind == "blurred": return image.filter(ImageFilter.GaussianBlur(min(image.size)/(100 if mild else 40)))
    if kind == "blank": return to_image(rng.uniform(30, 220) + np.random.default_rng(rng.getrandbits(32)).normal(0, 3. if mild else .5, pixels.shape))
    if kind == "odd_size": return image.resize([max(side//(4 if mild else 12), 8) for side in image.size])
    width = int(image.height*(.38 if mild else .15))
    return image.crop((image.width//3, 0, image.width//3 + width, image.height))


def to_image(pixels: np.ndarray) -> Image.Image: return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_files(photos: Path, folder: Path, count: int) -> dict[str, tuple[str, bool]]:
    "Files; name → kind and whether it is mild, of those that were spoiled."
    paths, rng, planted = sorted(photos.rglob("*.jpg")), random.Random(7), {}
    rng.shuffle(paths)
    kinds = list(KINDS)
    for k, path in enumerate(paths[:count]):
        name, place = f"{k:05}.jpg", k % 50
        if place >= len(kinds): os.link(path, folder/name) if path.stat().st_dev == folder.stat().st_dev else (folder/name).write_bytes(path.read_bytes())
        else:
            planted[name] = kinds[place], bool(k//50 % 2)
            with Image.open(path) as image: spoil(image.convert("RGB"), *planted[name], rng).save(folder/name, quality=90)
    return planted


def run_ours(folder: Path) -> tuple[float, dict[str, list[str]]]:
    "Seconds, and the flags of each file."
    from cvops_wb.data.images import inspect_image
    from cvops_wb.data.quality import QUALITY, flag_quality
    begin, paths = time.perf_counter(), sorted(folder.glob("*.jpg"))
    with ThreadPoolExecutor(2*len(os.sched_getaffinity(0))) as pool: facts = list(pool.map(lambda path: vars(inspect_image(path.read_bytes())), paths))
    flags = flag_quality(pd.DataFrame(facts))
    found = {path.name: [kind for kind in QUALITY if row[kind]] for path, row in zip(paths, flags.to_dict("records"), strict=True)}
    return time.perf_counter() - begin, found


def run_peer(python: Path, folder: Path) -> tuple[float, dict[str, list[str]]]:
    done = subprocess.run([python, "-c", PEER, folder, json.dumps(KINDS)], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    return told["seconds"], told["found"]


def judge(found: dict[str, list[str]], planted: dict[str, tuple[str, bool]]) -> dict[str, float]:
    "Recall of each kind, strong and mild, and precision by image."
    told = {}
    for kind in KINDS:
        for mild in (False, True):
            names = [name for name, what in planted.items() if what == (kind, mild)]
            told[f"recall, {kind}, {'mild' if mild else 'strong'}"] = sum(kind in found.get(name, ()) for name in names)/max(len(names), 1)
    flagged = [name for name, kinds in found.items() if kinds]
    told["recall, all"] = sum(kind in found.get(name, ()) for name, (kind, _) in planted.items())/max(len(planted), 1)
    told["precision"] = sum(name in planted for name in flagged)/max(len(flagged), 1)
    return told


def find_strangers(photos: Path, count: int) -> dict:
    "Boards among groceries: the share of them among the first as many by the score `outlier`."
    from cvops_wb.data.looks.embeddings import Descriptor, measure_outliers
    paths, boards = sorted(photos.rglob("*.jpg")), sorted((DATA/"deeppcb"/"images").glob("*.jpg"))
    random.Random(3).shuffle(paths)
    strangers = boards[::max(len(boards)//10, 1)][:10]
    files = [path.read_bytes() for path in [*paths[:count], *strangers]]
    begin = time.perf_counter()
    scores = measure_outliers(Descriptor().embed(files))
    seconds, first = time.perf_counter() - begin, set(np.argsort(-scores)[:len(strangers)])
    found = sum(k in first for k in range(len(files) - len(strangers), len(files)))/max(len(strangers), 1)
    return {"measure": f"boards among the {len(strangers)} first by `outlier`", "ours": round(found, 3), "note": f"{len(strangers)} among {len(files)} files; {len(files)/seconds:.0f} images/s with embedding"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--photos", type=Path, default=DATA/"grocery")
    parser.add_argument("--peer", type=Path, default=REPO/".cvops"/"peers"/"cleanvision"/"bin"/"python")
    options = parser.parse_args()
    count, runs = options.files or (400 if options.quick else 2900), options.runs or (1 if options.quick else 3)
    rows, peer = [], options.peer.exists()
    if not peer: print(f"CleanVision is not at {options.peer}: make bench-peers", file=sys.stderr)
    with TemporaryDirectory() as place:
        folder = Path(place)
        planted = make_files(options.photos, folder, count)
        total = len(list(folder.glob("*.jpg")))
        ours, theirs = [], []
        run_ours(folder)        # the first decode of a process loads libraries
        for _ in range(runs):   # in turn, on the same machine
            ours.append(run_ours(folder))
            if peer: theirs.append(run_peer(options.peer, folder))
        note = f"{total} files, {len(planted)} spoiled"
        rate, other = total/statistics.median(seconds for seconds, _ in ours), total/statistics.median(seconds for seconds, _ in theirs) if peer else None
        rows.append(compare("images/s, from files to flags", rate, other, ">= peer", runs, note))
        mine, peers = judge(ours[-1][1], planted), judge(theirs[-1][1], planted) if peer else {}
        rows += [compare(name, value, peers.get(name), ">= peer", 1, note) for name, value in mine.items()]
    if (DATA/"deeppcb"/"images").is_dir(): rows.append({"peer": None, "peer_name": "", "ratio": None, "goal": "", "met": None, "runs": 1} | find_strangers(options.photos, 300 if options.quick else 2000))
    print("| measure | ours | CleanVision | ratio | met | note |\n|---|---|---|---|---|---|")
    for row in rows: print(f"| {row['measure']} | {row['ours']:.4g} | {'' if row['peer'] is None else format(row['peer'], '.4g')} | {'' if row['ratio'] is None else format(row['ratio'], '.3g')} | {row['met']} | {row['note']} |")
    if options.json: options.json.write_text(json.dumps(rows, indent=1))


def compare(measure: str, ours: float, peer: float | None, goal: str, runs: int, note: str) -> dict:
    "A row."
    ratio = ours/peer if peer else None
    return {"measure": measure, "ours": round(ours, 4), "peer": None if peer is None else round(peer, 4), "peer_name": "CleanVision" if peer is not None else "",
            "ratio": None if ratio is None else round(ratio, 4), "goal": goal, "met": None if peer is None else ours >= peer, "runs": runs, "note": note}


if __name__ == "__main__": main()
