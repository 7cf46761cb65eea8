"""Near duplicates beside imagededup and imagehash: images a second, recall, precision, and growth.

    python bench/dedup.py [--quick] [--json FILE] [--files N] [--runs N] [--photos DIR] [--keep DIR] [--part PART,PART]

The files are made here from the shared grocery photographs: each with three weak changes (resize, recompress, brightness) and
five strong ones (crop of 5 to 25 % a side, flip, quarter turn, 2 to 10 degrees, a stamp on 12 to 25 % of each side). Every side starts
from the files and ends with pairs. A change is recalled when its group holds the original; precision is of pairs. Originals that are a
burst of one product count as errors of all sides. Peers come from `make bench-peers` and run in turn with us, on the same cores.
FiftyOne's Brain stands in the workbench's own environment. It is given our hand-made features (344 numbers an image; the networks that it would fetch cannot be had
here), drawn in two threads; its time is that of embedding and of looking for near duplicates, without its import, its database's start and the adding of samples.
It is asked at its own threshold and, with the truth in view, at the one that recalls most at a precision of 0.99: a favour that no other side gets.
The parts (each side's name, `large`, `growth`) can run one by one on the same files, if `--keep` names a folder for them.
The ideal is the fastest decoder that we have, OpenCV's, reading the same files at the same reduced scale and doing nothing else, in as many
threads. Compiling our kernels, once a machine, is left out of the rates and stands in a row of its own.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

REPO = Path(__file__).parents[1]
PHOTOS = REPO.parent/"shared"/"data"/"grocery"     # beside the project, as for the tests
WEAK, STRONG = ("resize", "recompress", "light"), ("crop", "flip", "quarter", "angle", "overlay")
PEER = '''
import json, sys, time
from pathlib import Path
method, folder = sys.argv[1:]
start = time.perf_counter()
if method == "imagehash":
    import imagehash, numpy as np
    from PIL import Image
    paths = sorted(Path(folder).glob("*.jpg"))
    start = time.perf_counter()
    bits = np.stack([imagehash.phash(Image.open(p)).hash.ravel() for p in paths])
    words = np.packbits(bits, axis=1).view(np.uint64).ravel()
    pairs = [(paths[a].name, paths[a + 1 + b].name) for a in range(len(paths)) for b in np.flatnonzero(np.bitwise_count(words[a] ^ words[a + 1:]) <= 10)]
else:
    import imagededup.methods as methods
    start = time.perf_counter()
    found = getattr(methods, method)(verbose=False).find_duplicates(image_dir=folder, max_distance_threshold=10)
    pairs = sorted({tuple(sorted((a, b))) for a, others in found.items() for b in others})
print(json.dumps({"seconds": time.perf_counter() - start, "pairs": pairs}))
'''

BRAIN = """
import json, sys, time
from pathlib import Path
import numpy as np
from cvops_wb.data.looks.embeddings import describe_thumbs
from cvops_wb.data.near.thumbs import draw_thumbs
from cvops_wb.data.views import open_fiftyone
paths = sorted(Path(sys.argv[1]).glob("*.jpg"))
describe_thumbs(draw_thumbs(8, lambda k: paths[k].read_bytes()))
start = time.perf_counter()
points = describe_thumbs(draw_thumbs(len(paths), lambda k: paths[k].read_bytes()))
embedded = time.perf_counter() - start
with open_fiftyone() as fo:
    import fiftyone.brain as brain
    start = time.perf_counter()
    data = fo.Dataset("bench")
    data.add_samples([fo.Sample(filepath=str(path)) for path in paths], progress=False)
    added, names = time.perf_counter() - start, dict(zip(data.values("id"), (path.name for path in paths)))
    start = time.perf_counter()
    exact = brain.compute_exact_duplicates(data, progress=False)
    hashed = time.perf_counter() - start
    found, seconds = {}, {}
    start = time.perf_counter()
    index = brain.compute_near_duplicates(data, embeddings=points, progress=False)
    for threshold in (.2, .35, .3, .25, .15, .1, .07, .05, .03, .02):
        if threshold != .2: start = time.perf_counter(); index.find_duplicates(thresh=threshold)
        seconds[threshold] = time.perf_counter() - start
        found[threshold] = sorted({tuple(sorted((names[a], names[b]))) for a, others in index.neighbors_map.items() for b, _ in others})
    print(json.dumps({"embedded": embedded, "added": added, "hashed": hashed, "exact": len(exact), "seconds": seconds, "pairs": found}))
"""


def cut(image: Image.Image, rng: random.Random) -> Image.Image:
    "A crop anywhere, with 75 to 95 % of each side."
    share = 1 - rng.uniform(.05, .25)
    width, height = int(image.width*share), int(image.height*share)
    x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((x, y, x + width, y + height))


def stamp(image: Image.Image, rng: random.Random) -> Image.Image:
    "A coloured box anywhere, 12 to 25 % of each side."
    image, share = image.copy(), rng.uniform(.12, .25)
    width, height = int(image.width*share), int(image.height*share)
    x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    ImageDraw.Draw(image).rectangle((x, y, x + width, y + height), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


CHANGES = {
    "original": lambda image, rng: image,
    "resize": lambda image, rng: image.resize([round(side*share) for share in [rng.choice((.4, .5, .7, 1.3))] for side in image.size]),
    "recompress": lambda image, rng: image,
    "light": lambda image, rng: ImageEnhance.Brightness(image).enhance(rng.choice((.7, .8, 1.2, 1.3))),
    "crop": cut,
    "flip": lambda image, rng: image.transpose(rng.choice((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM))),
    "quarter": lambda image, rng: image.transpose(rng.choice((Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270))),
    "angle": lambda image, rng: image.rotate(rng.choice((-1, 1))*rng.uniform(2, 10), Image.Resampling.BICUBIC),
    "overlay": stamp,
}


def make_files(photos: Path, folder: Path, count: int, pixels: int = 0) -> None:
    "About so many JPEG files named by photograph and change; at least `pixels` large if given."
    rng, paths = random.Random(0), sorted(photos.rglob("*.jpg"))
    many = count//len(CHANGES)
    for k in range(many):
        image = Image.open(paths[k*len(paths)//many]).convert("RGB")
        if pixels: image = image.resize([round(side*(pixels/image.width/image.height)**.5) for side in image.size], Image.Resampling.BICUBIC)
        for name, change in CHANGES.items():
            change(image, rng).save(folder/f"{k:05}_{name}.jpg", quality=rng.randint(30, 60) if name == "recompress" else rng.randint(75, 92))


def decode_bare(paths: list[Path]) -> float:
    "Seconds to decode all at the reduced scale that we decode at."
    import cv2
    flags = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    scales = [flags[1 << min(max(min(Image.open(path).size)//64, 1).bit_length() - 1, 3)] | cv2.IMREAD_IGNORE_ORIENTATION for path in paths]     # not timed

    def decode(start: int) -> None:
        for path, scale in zip(paths[start:start + 64], scales[start:start + 64], strict=True): cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), scale)
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool: list(pool.map(decode, range(0, len(paths), 64)))
    return time.perf_counter() - start


def run_ours(paths: list[Path]) -> tuple[float, list[tuple[str, str]]]:
    "Seconds from files to pairs, and the pairs."
    from cvops_wb.data.duplicates import match_thumbs
    from cvops_wb.data.near.checks import NEAR
    from cvops_wb.data.near.thumbs import draw_thumbs
    start = time.perf_counter()
    found = match_thumbs(draw_thumbs(len(paths), lambda place: paths[place].read_bytes()), likeness=NEAR)
    seconds = time.perf_counter() - start
    return seconds, [(paths[a].name, paths[b].name) for a, b in zip(found.a, found.b, strict=False)]


def run_peer(python: Path, method: str, folder: Path) -> tuple[float, list[tuple[str, str]]]:
    "Seconds without its imports, and its pairs; raises if it fails."
    done = subprocess.run([python, "-c", PEER, method, folder], capture_output=True, text=True, check=True)
    reply = json.loads(done.stdout.strip().splitlines()[-1])
    return reply["seconds"], [tuple(pair) for pair in reply["pairs"]]


def run_brain(folder: Path) -> dict:
    "Seconds of each step, and the pairs at each threshold, of FiftyOne's Brain in a process and a workbench of its own."
    with TemporaryDirectory() as place:
        (Path(place)/"settings.ini").write_text("")
        done = subprocess.run([sys.executable, "-c", BRAIN, folder], capture_output=True, text=True, check=True, cwd=place, env={**os.environ, "PYTHONPATH": str(REPO)})
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_brain(folder: Path, runs: int) -> list[dict]:
    "FiftyOne's Brain beside us, in turn, on one folder."
    paths, ours, theirs = sorted(folder.glob("*.jpg")), [], []
    run_ours(paths[:64])
    for _ in range(runs):
        ours.append(run_ours(paths))
        theirs.append(run_brain(folder))
    names, last = [p.name for p in paths], theirs[-1]
    mine, at = judge(ours[-1][1], names), {float(t): judge([tuple(pair) for pair in pairs], names) for t, pairs in last["pairs"].items()}
    exact = f"{last['exact']} exact duplicates in {last['hashed']:.1f} s (there are none), samples added in {last['added']:.1f} s, embedded in {last['embedded']:.1f} s"
    good, rows = [t for t in at if at[t]["precision"] >= .99], []
    for t, name in ((.2, "its own threshold"), (max(good, key=lambda t: at[t]["weak"] + at[t]["strong"], default=None), "the best one")):
        if t is None: rows.append(row("no threshold gives it a precision of 0.99", 0)); continue
        fast, slow = min(took for took, _ in ours), min(told["embedded"] + told["seconds"]["0.2"] for told in theirs)
        rows.append(row("images/s", len(paths)/fast, len(paths)/slow, f"FiftyOne Brain, {name}, {t:g}", slow/fast, "", None, runs, f"{len(paths)} files; {exact}"))
        rows += [row(what, mine[key], at[t][key], f"FiftyOne Brain, {name}, {t:g}", mine[key]/max(at[t][key], 1e-9), ">= peer", mine[key] >= at[t][key])
                 for what, key in (("recall, weak changes", "weak"), ("recall, strong changes", "strong"), ("precision", "precision"))]
    return rows


def judge(pairs: list[tuple[str, str]], names: list[str]) -> dict[str, float]:
    "Precision of pairs, and recall of weak and of strong changes: is each in the group of its original?"
    from cvops_wb.data.near.candidates import join_groups
    where = {name: k for k, name in enumerate(names)}
    first = join_groups(len(names), [(where[a], where[b]) for a, b in pairs])
    right = sum(a[:5] == b[:5] for a, b in pairs)
    hit = {kind: statistics.mean(float(first[k] == first[where[f"{name[:5]}_original.jpg"]]) for k, name in enumerate(names) if name[6:-4] == kind)
           for kind in (*WEAK, *STRONG)}
    out = {kind: statistics.mean(hit[k] for k in kinds) for kind, kinds in (("weak", WEAK), ("strong", STRONG))}
    return {**out, "precision": right/max(len(pairs), 1), **hit}


def row(measure: str, ours: float, peer: float | None = None, name: str = "", ratio: float | None = None, goal: str = "", met: bool | None = None, runs: int = 1, note: str = "") -> dict:
    "One row of the table."
    clean = [None if v is None else float(f"{v:.4g}") for v in (ours, peer, ratio)]
    return {"measure": measure, "ours": clean[0], "peer": clean[1], "peer_name": name, "ratio": clean[2], "goal": goal, "met": None if met is None else bool(met), "runs": runs, "note": note}


SIDES = ("PHash", "DHash", "imagehash")


def compare(folder: Path, runs: int, python: Path, chosen: set[str]) -> list[dict]:
    "Rates, recall and precision on one folder, every side in turn."
    paths, sides = sorted(folder.glob("*.jpg")), [side for side in SIDES if side in chosen and python.exists()]
    seconds, found = {}, {}
    warm, _ = run_ours(paths[:64])
    for _ in range(runs):
        seconds.setdefault("bare", []).append(decode_bare(paths))
        for side in ("ours", *sides):
            took, found[side] = run_ours(paths) if side == "ours" else run_peer(python, side, folder)
            seconds.setdefault(side, []).append(took)
    rate = {side: len(paths)/min(took) for side, took in seconds.items()}
    quality = {side: judge(pairs, [p.name for p in paths]) for side, pairs in found.items()}
    mine, note = quality["ours"], f"{len(paths)} files"
    rows = [row("images/s, decoding included", rate["ours"], rate["bare"], "bare scaled decoding", rate["ours"]/rate["bare"], ">= 0.8", rate["ours"] >= .8*rate["bare"], runs, note)]
    rows.append(row("seconds for the first 64 images, with compiled kernels loaded or made", warm))
    for side in sides:
        name, theirs = side if side == "imagehash" else f"imagededup {side}", quality[side]
        better = mine["weak"] >= theirs["weak"] and mine["strong"] >= theirs["strong"] and mine["precision"] >= .99
        rows += [row("images/s, at recall no lower and precision >= 0.99", rate["ours"], rate[side], name, rate["ours"]/rate[side], ">= 4", rate["ours"] >= 4*rate[side] and better, runs, note)]
        rows += [row(what, mine[key], theirs[key], name, mine[key]/max(theirs[key], 1e-9), ">= peer", mine[key] >= theirs[key], 1, note)
                 for what, key in (("recall, weak changes", "weak"), ("recall, strong changes", "strong"), ("precision", "precision"))]
    rows.append(row("recall, strong changes", mine["strong"], goal=">= 0.75 at precision >= 0.99", met=mine["strong"] >= .75 and mine["precision"] >= .99,
                    note=", ".join(f"{kind} {mine[kind]:.2f}" for kind in STRONG)))
    rows.append(row("precision", mine["precision"], goal=">= 0.99", met=mine["precision"] >= .99))
    return rows if python.exists() else [*rows, row("peers", 0, note="not installed: make bench-peers")]


def rate_large(folder: Path, runs: int) -> dict:
    "The share of bare decoding at two megapixels."
    paths, ratios, ours = sorted(folder.glob("*.jpg")), [], []
    for _ in range(runs):
        bare = decode_bare(paths)
        ours.append(run_ours(paths)[0])
        ratios.append(bare/ours[-1])
    best = statistics.median(ratios)
    return row("images/s at 2 megapixels", len(paths)/min(ours), len(paths)/min(ours)/best, "bare scaled decoding", best, ">= 0.9", best >= .9, runs, f"{len(paths)} files")


def grow(count: int) -> dict:
    "Seconds, the best of five, for so many random hashes with planted pairs of 4 bits, in a process of its own."
    code = ("import numpy as np, time, resource; from cvops_wb.data.near.candidates import _find_self\n"
            f"n = {count}; rng = np.random.default_rng(0); h = rng.integers(0, 2**64, n, dtype=np.uint64); k = n//100\n"
            "flips = np.array([sum(1 << int(b) for b in rng.choice(64, 4, replace=False)) for _ in range(k)], dtype=np.uint64)\n"
            "h[-k:] = h[:k] ^ flips; _find_self(h[:100], 8); took = []\n"
            "for _ in range(5):\n    t = time.perf_counter(); p = _find_self(h, 8); took.append(time.perf_counter() - t)\n"
            "t = min(took)\n"
            "hit = len({*map(tuple, p[:, :2].tolist())} & {(j, n - k + j) for j in range(k)})/k\n"
            "print(t, hit, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    seconds, hit, memory = map(float, done.stdout.split())
    return {"count": count, "seconds": seconds, "recall": hit, "GiB": memory}


def measure_growth(counts: list[int]) -> list[dict]:
    "One row a count; beside n log n from the count before."
    rows, before = [], None
    for now in map(grow, counts):
        bound = before and before["seconds"]*now["count"]*np.log2(now["count"])/(before["count"]*np.log2(before["count"]))
        met = now["GiB"] <= 24 and (bound is None or now["seconds"] <= bound)
        rows.append(row(f"seconds for {now['count']:,} hashes", now["seconds"], bound, "n log n" if bound else "", bound and now["seconds"]/bound, "<= n log n, <= 24 GiB", met, 1,
                        f"planted pairs of 4 bits found {now['recall']:.3f}, {now['GiB']:.2f} GiB"))
        before = now
    return rows


PARTS = ("ours", *SIDES, "brain", "large", "growth")


def open_files(place: Path, name: str, *made: object) -> Callable[[], Path]:
    "Gives the folder of these files, which are made when they are first asked for."
    def find() -> Path:
        folder = place/f"{name}-{made[1]}"
        if not folder.is_dir():
            (part := place/f"{folder.name}.part").mkdir(parents=True)
            make_files(made[0], part, *made[1:])
            part.rename(folder)
        return folder
    return find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--files", type=int)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--keep", type=Path, help="a folder for the files, made where they are missing")
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--peer", type=Path, default=REPO/".cvops"/"peers"/"dedup"/"bin"/"python", help="a Python that has imagededup and imagehash")
    options = parser.parse_args()
    sys.path.insert(0, str(REPO))
    count = options.files or (600 if options.quick else 10_000)
    parts = set(options.part.split(","))
    if unknown := parts - {*PARTS}: parser.error(f"unknown part: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    rows, runs = [], 1 if options.quick else options.runs
    with TemporaryDirectory() as place:
        small, large = (open_files(options.keep or Path(place), name, options.photos, *size) for name, size in (("small", (count,)), ("large", (90 if options.quick else 270, 2_000_000))))
        if parts & {"ours", *SIDES}: rows += compare(small(), runs, options.peer, parts)
        if "brain" in parts: rows += compare_brain(small(), min(runs, 2))
        if "large" in parts: rows.append(rate_large(large(), 3))
    if "growth" in parts: rows += measure_growth([10_000, 100_000] if options.quick else [10_000, 100_000, 1_000_000])
    print("| measure | ours | peer | | ratio | goal | met | note |\n|---|---|---|---|---|---|---|---|")
    for r in rows: print("|", " | ".join("" if v is None else str(v) for v in (r[k] for k in ("measure", "ours", "peer", "peer_name", "ratio", "goal", "met", "note"))), "|")
    if options.json: options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
