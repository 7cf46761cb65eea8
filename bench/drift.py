"""Drift beside Evidently, alibi-detect and frouros: speed of one window, false alarms over thousands, and how late a change is seen.

    python bench/drift.py [--quick] [--json FILE] [--photos DIR] [--runs N] [--nulls N] [--alibi PYTHON] [--frouros PYTHON]

Images: the shared grocery photographs and drawn ones (`cvops synth`), each clean and with seven corruptions at three severities. Each has what the
prediction log has: image statistics, file size, and the answer, confidence and embedding of a champion: the product's network, trained by its recipe on half of the
images (`parts/champion.py`; minutes, then kept in the cache), which has never seen the other half, nor the classes that are called new. A stream is a reference of 1,000 rows, 1,000
healthy rows, and then the change; rows are drawn with replacement, so that all healthy rows are independent and alike. The delay is the number of rows
from the change to the alarm. We look every 25 rows. Evidently's tests (Kolmogorov-Smirnov on columns; the share of embedding numbers that
differ) look at windows of 200, whose first begins with the change, which favours them; their thresholds are set so that they accuse one healthy
window in a thousand, on windows of their own. We look with the level that we ship: 1 % for the life of a stream. `sliding` is Evidently's
tests on the last 200 rows every 25, with thresholds for the same rate. For the delays Evidently's statistics are computed without its reports, which would take days;
that the numbers are Evidently's is checked on some windows in the run. alibi-detect and frouros are asked in environments of their own (`make bench-peers`).
"""
import argparse
import io
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageFilter

REPO = Path(__file__).parents[1]
PHOTOS = REPO.parent/"shared"/"data"/"grocery"
SIDE, DIMENSIONS, REFERENCE, WINDOW, STEP, LIMIT = 160, 512, 1000, 200, 25, 4000
STATISTICS = ["brightness", "contrast", "sharpness", "entropy", "saturation", "width", "height", "bytes", "confidence", "entropy_of_scores"]
PEER = '''
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
kind, path = sys.argv[1:]
data = np.load(path)
reference, windows = data["reference"], data["windows"]
if kind == "alibi":
    from alibi_detect.cd import KSDrift
    start = time.perf_counter(); detector = KSDrift(reference, p_val=.05); fit = time.perf_counter() - start
    def judge(window): return float(detector.predict(window)["data"]["p_val"].min())
else:
    from frouros.detectors.data_drift import KSTest
    detectors = [KSTest() for _ in range(reference.shape[1])]
    for k, d in enumerate(detectors): d.fit(X=reference[:, k])
    def judge(window): return min(float(d.compare(X=window[:, k])[0].p_value) for k, d in enumerate(detectors))
judge(windows[0])
out, times = [], []
for window in windows:
    start = time.perf_counter(); out.append(judge(window)); times.append(time.perf_counter() - start)
print(json.dumps({"p": out, "seconds": float(np.median(times))}))
'''


# ---- images

def noise(image: Image.Image, by: float, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray((np.asarray(image) + rng.normal(0, by, (image.height, image.width, 3))).clip(0, 255).astype(np.uint8))


def tint(image: Image.Image, by: float) -> Image.Image:
    return Image.fromarray((np.asarray(image)*np.array([1 + by, 1., 1 - by])).clip(0, 255).astype(np.uint8))


CORRUPTIONS = {     # name: three severities
    "dark": [lambda i, r, s=s: ImageEnhance.Brightness(i).enhance(s) for s in (.92, .8, .6)],
    "fog": [lambda i, r, s=s: ImageEnhance.Contrast(i).enhance(s) for s in (.9, .75, .5)],
    "blur": [lambda i, r, s=s: i.filter(ImageFilter.GaussianBlur(s)) for s in (.4, .8, 1.6)],
    "noise": [lambda i, r, s=s: noise(i, s, r) for s in (3, 8, 20)],
    "colour": [lambda i, r, s=s: tint(i, s) for s in (.04, .1, .25)],
    "small": [lambda i, r, s=s: i.resize((int(i.width*s), int(i.height*s))).resize(i.size) for s in (.8, .5, .25)],
    "jpeg": [lambda i, r: i]*3,
}
QUALITY = {"jpeg": (70, 45, 15)}


def describe(images: list[Image.Image], look, quality: int = 85) -> pd.DataFrame:
    "The columns of the log; `look` is the champion's."
    from cvops_wb.data import measure_image
    rows, seen = [], []
    for image in images:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        decoded = Image.open(io.BytesIO(out.getvalue())).convert("RGB")
        rows.append({**measure_image(decoded), "width": image.width, "height": image.height, "bytes": len(out.getvalue())})
        seen.append(decoded)
    classes, scores, points = look(seen)
    return pd.DataFrame(rows).drop(columns="phash").assign(embedding=list(points), predicted=classes[scores.argmax(1)], confidence=scores.max(1),
                                                           entropy_of_scores=-(scores*np.log(scores + 1e-12)).sum(1))


def widen(rows: pd.DataFrame) -> pd.DataFrame:
    "The same rows with embeddings of 512 numbers, by a fixed random layer: what a larger network has."
    points = np.stack(rows["embedding"].to_numpy())
    return rows.assign(embedding=list(points@np.random.default_rng(7).normal(size=(points.shape[1], DIMENSIONS)).astype(np.float32)))


def read_photos(photos: Path, count: int) -> tuple[list[Image.Image], list[str]]:
    lines = [line.split(",") for line in (photos/"train.txt").read_text().splitlines() if line.strip()]
    chosen = [lines[k] for k in np.random.default_rng(0).permutation(len(lines))[:count]]
    return [Image.open(photos/row[0].strip()).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for row in chosen], [row[2].strip() for row in chosen]


def draw_photos(count: int) -> tuple[list[Image.Image], list[str]]:
    from cvops_wb.data import WarehouseSpec, make_warehouse
    with TemporaryDirectory() as folder:
        truth = make_warehouse(Path(folder)/"drawn", WarehouseSpec(count=count, exact=0., near=0., wrong=0., broken=0., seed=3))
        images = [Image.open(Path(folder)/"drawn"/file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for file in truth["file"]]
    return images, [str(label) for label in truth["label"]]


class World:
    "Clean and corrupted rows of one set of images, with the answers of a champion that was trained on other images."

    def __init__(self, name: str, images: list[Image.Image], labels: list[str], corruptions: list[str], epochs: int = 12):
        from parts.champion import learn_champion
        self.name, rng, labels = name, np.random.default_rng(1), np.array(labels)
        classes = np.array(sorted(set(labels)))
        self.fresh = set(rng.permutation(classes)[:max(2, len(classes)//8)])     # the reference does not know them
        is_new, half = np.array([label in self.fresh for label in labels]), rng.random(len(images)) < .5
        def pick(mask): return [image for image, keep in zip(images, mask, strict=True) if keep]
        look, rest = learn_champion(pick(half & ~is_new), list(labels[half & ~is_new]), epochs), ~half & ~is_new
        self.clean, self.new = (describe(pick(mask), look).assign(label=labels[mask]) for mask in (rest, is_new))
        self.accuracy, mine = float((self.clean["predicted"] == self.clean["label"]).mean()), pick(rest)
        self.changed = {(name, level): describe([change(i, rng) for i in mine], look, QUALITY.get(name, (85,)*3)[level]).assign(label=labels[rest])
                        for name in corruptions for level, change in enumerate(CORRUPTIONS[name])}

    def list_changes(self) -> dict[str, list]:
        "Name → what draws `count` rows of the change, after `done` rows of it."
        def pick(table): return lambda rng, count, done: smooth(table, rng.integers(0, len(table), count), rng)
        def blend(table, share): return lambda rng, count, done: pd.concat([pick(table)(rng, k := rng.binomial(count, share(done)), 0), pick(self.clean)(rng, count - k, 0)]).sample(frac=1, random_state=int(rng.integers(2**31)))
        heavy = self.clean["label"].map(lambda label: 3. if hash_text(label) % 2 else 1/3).to_numpy()
        mixed = lambda rng, count, done: smooth(self.clean, rng.choice(len(self.clean), count, p=heavy/heavy.sum()), rng)
        ramp = {f"{name} {level + 1}, ramp": blend(table, lambda done: min(1., done/2000)) for (name, level), table in self.changed.items() if level == 2 and name in ("dark", "blur")}
        return {**{f"{name} {level + 1}": pick(table) for (name, level), table in self.changed.items()}, **ramp, "new class 30 %": blend(self.new, lambda done: .3), "changed mix": mixed}


SMOOTH = 1/3    # of the difference between two rows


def smooth(table: pd.DataFrame, places: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    "Rows of a table, each moved along the difference of two others."
    if not len(places): return table.iloc[:0]
    here, one, other = (table.iloc[rng.integers(0, len(table), len(places)) if k else places] for k in range(3))
    moved = [a + SMOOTH*(b - c) for a, b, c in zip(to_tables(here), to_tables(one), to_tables(other), strict=True)]
    numbers = dict(zip(STATISTICS, moved[0].T, strict=True))
    numbers |= {"confidence": numbers["confidence"].clip(.01, 1), "width": here["width"].to_numpy(), "height": here["height"].to_numpy()}
    return pd.DataFrame({**numbers, "embedding": list(moved[1].astype(np.float32)), "predicted": here["predicted"].to_numpy(), "label": here["label"].to_numpy()})


def hash_text(text: str) -> int:
    return sum(ord(c)*31**k for k, c in enumerate(text)) % 1009


# ---- Evidently's statistics, without its reports

def to_tables(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return rows[STATISTICS].to_numpy(float), np.stack(rows["embedding"].to_numpy())


class Tests:
    "Kolmogorov-Smirnov p-values as Evidently takes them from SciPy, many columns at once, against a sorted reference."

    def __init__(self, reference: pd.DataFrame):
        self.sides = [np.sort(table, axis=0) for table in to_tables(reference)]
        self.shares = reference["predicted"].value_counts()

    @staticmethod
    def distances(known: np.ndarray, window: np.ndarray) -> np.ndarray:
        window, n, m = np.sort(window, axis=0), len(known), len(window)
        out = np.empty(known.shape[1])
        for k in range(known.shape[1]):     # at each jump of either, from both sides
            marks = np.concatenate([known[:, k], window[:, k]])
            out[k] = np.abs(np.searchsorted(known[:, k], marks, "right")/n - np.searchsorted(window[:, k], marks, "right")/m).max()
        return out

    def judge(self, rows: pd.DataFrame) -> tuple[float, float]:
        "The greatest distance of a column (as its exact p-value's order), and the share of embedding numbers that differ at 0.05."
        from scipy.stats import chi2_contingency, kstwo
        columns, points = to_tables(rows)
        effective = len(self.sides[0])*len(rows)/(len(self.sides[0]) + len(rows))
        far = self.distances(self.sides[0], columns).max()
        p = float(kstwo.sf(far, round(effective)))
        counts = pd.concat([self.shares, rows["predicted"].value_counts()], axis=1).fillna(0).to_numpy().T
        p = min(p, float(chi2_contingency(counts).pvalue))
        limit = kstwo.isf(.05, round(effective))
        return p, float((self.distances(self.sides[1][:, ::8], points[:, ::8]) > limit).mean())


def calibrate(world: World, count: int, rng: np.random.Generator, rate: float = 1e-3) -> tuple[float, float]:
    "Thresholds with which healthy windows are accused at the rate; half of it for each test."
    found = []
    while len(found) < count:
        tests = Tests(draw(world, REFERENCE, rng))
        found += [tests.judge(draw(world, WINDOW, rng)) for _ in range(50)]
    p, share = np.array(found).T
    return float(np.quantile(p, rate/2)), float(np.quantile(share, 1 - rate/2))


def draw(world: World, count: int, rng: np.random.Generator) -> pd.DataFrame:
    return smooth(world.clean, rng.integers(0, len(world.clean), count), rng)


# ---- delays and alarms

def delay_ours(reference: pd.DataFrame, healthy: pd.DataFrame, change, rng: np.random.Generator) -> float:
    from cvops_wb.watch.verdicts import Watcher
    watcher, done = Watcher.learn(reference), 0
    for start in range(0, len(healthy), WINDOW): watcher.add(healthy.iloc[start:start + WINDOW])
    if watcher.drifted: return 0.
    while done < LIMIT:
        watcher.add(change(rng, STEP, done))
        done += STEP
        if watcher.drifted: return float(done)
    return np.inf


def delay_evidently(tests: Tests, limits: tuple[float, float], change, rng: np.random.Generator, healthy: pd.DataFrame | None = None) -> float:
    "In windows of their own, or sliding over healthy rows where these are given."
    rows, step = (healthy.tail(WINDOW), STEP) if healthy is not None else (None, WINDOW)
    for done in range(step, LIMIT + 1, step):
        fresh = change(rng, step, done - step)
        rows = fresh if rows is None or step == WINDOW else pd.concat([rows, fresh]).tail(WINDOW)
        p, share = tests.judge(rows)
        if p < limits[0] or share > limits[1]: return float(done)
    return np.inf


def count_alarms(world: World, windows: int, rng: np.random.Generator) -> int:
    from cvops_wb.watch.verdicts import Watcher
    alarms = 0
    for _ in range(windows//100):
        watcher = Watcher.learn(draw(world, REFERENCE, rng))
        for _ in range(100): watcher.add(draw(world, WINDOW, rng))
        alarms += watcher.alarms
    return alarms


def bound_rate(alarms: int, windows: int) -> float:
    from scipy.stats import beta
    return float(beta.ppf(.95, alarms + 1, windows - alarms))


# ---- speed

def to_evidently(rows: pd.DataFrame) -> pd.DataFrame:
    columns, points = to_tables(rows)
    frame = pd.DataFrame(columns, columns=STATISTICS).assign(predicted=rows["predicted"].to_numpy())
    return pd.concat([frame, pd.DataFrame(points, columns=[f"e{k}" for k in range(points.shape[1])])], axis=1)


def run_evidently(reference: pd.DataFrame, window: pd.DataFrame, embeddings: bool = True) -> tuple[float, dict]:
    "Seconds of one report's verdict, without its page; and its p-values."
    import evidently as ev
    from evidently.metrics import EmbeddingsDrift
    from evidently.presets import DataDriftPreset
    points = [name for name in window if name.startswith("e") and name[1:].isdigit()]
    definition = ev.DataDefinition(numerical_columns=STATISTICS, categorical_columns=["predicted"], embeddings={"points": points} if embeddings else None)
    sides = [ev.Dataset.from_pandas(frame, definition) for frame in (window, reference)]
    metrics = [DataDriftPreset(columns=[*STATISTICS, "predicted"], num_method="ks", num_threshold=.05), *([EmbeddingsDrift(embeddings_name="points")] if embeddings else [])]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = ev.Report(metrics).run(*sides).dict()
    seconds = time.perf_counter() - start
    found = {metric["config"]["column"]: metric["value"] for metric in done["metrics"] if "column" in metric.get("config", {}) and not isinstance(metric["value"], dict)}
    return seconds, found


def compare_speed(world: World, runs: int, rng: np.random.Generator) -> list[dict]:
    from scipy.stats import ks_2samp

    from cvops_wb.watch.verdicts import Watcher
    reference = widen(draw(world, REFERENCE, rng))
    watcher, known, times, apart = Watcher.learn(reference), to_evidently(reference), {"ours": [], "whole": [], "columns": []}, 0.
    for _ in range(runs):
        window = widen(draw(world, WINDOW, rng))
        for _ in range(3):
            start = time.perf_counter()
            watcher.add(window)
            times["ours"].append(time.perf_counter() - start)
        table = to_evidently(window)
        seconds, _ = run_evidently(known, table)
        fewer, found = run_evidently(known, table, embeddings=False)
        times["whole"].append(seconds)
        times["columns"].append(fewer)
        apart = max([apart, *(abs(found[name] - ks_2samp(known[name], table[name]).pvalue) for name in STATISTICS if name in found)])
    ours, whole, columns = (float(np.median(times[name])) for name in ("ours", "whole", "columns"))
    note = f"{world.name}; Evidently's KS p-values differ from SciPy's by at most {apart:.1e}"
    return [row("ms for a window of 200 × 512, all four views", 1e3*ours, goal="<= 10", met=ours <= .010, runs=3*runs),
            row("ms for a window of 200 × 512", 1e3*ours, 1e3*whole, "Evidently, columns and embeddings", whole/ours, ">= 20", whole >= 20*ours, runs, note),
            row("ms for a window of 200 × 512", 1e3*ours, 1e3*columns, "Evidently, columns alone", columns/ours, "told", None, runs, "ours with embeddings")]


def ask_peer(kind: str, python: Path, reference: np.ndarray, windows: np.ndarray) -> dict:
    with TemporaryDirectory() as folder:
        path = Path(folder)/"data.npz"
        np.savez(path, reference=reference, windows=windows)
        done = subprocess.run([python, "-c", PEER, kind, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_peers(world: World, changes: dict, pythons: dict[str, Path], ours: dict[str, float], rng: np.random.Generator, speed: float) -> list[dict]:
    rows = []
    for kind, python in pythons.items():
        if not python.exists():
            rows.append(row(kind, 0, note="not installed: make bench-peers"))
            continue
        reference, delays, seconds = draw(world, REFERENCE, rng), {}, []
        def table(frame, kind=kind): return np.hstack(to_tables(frame)).astype(np.float32) if kind == "alibi" else to_tables(frame)[0]
        for name, change in changes.items():
            told = ask_peer(kind, python, table(reference), np.stack([table(change(rng, WINDOW, k*WINDOW)) for k in range(6)]))
            seconds.append(told["seconds"])
            hits = np.flatnonzero(np.array(told["p"]) < 1e-3/table(reference).shape[1])
            delays[name] = float(WINDOW*(hits[0] + 1)) if len(hits) else np.inf
        peer = {"alibi": "alibi-detect KSDrift, 522 columns", "frouros": "frouros KSTest, 10 columns"}[kind]
        better = sum(ours[name] <= delays[name]/2 for name in delays)
        rows += [row("ms for a window of 200", speed, 1e3*float(np.median(seconds)), peer, 1e3*float(np.median(seconds))/speed, "told", None, len(seconds)),
                 row(f"changes seen in half the rows or fewer, of {len(delays)}", better, len(delays) - better, peer, None, "told", None, 1,
                     "one stream each, at Bonferroni's 1/1000 a window, six windows; " + tell(delays, 6*WINDOW))]
    return rows


# ---- the run

def row(measure: str, ours: float, peer: float | None = None, name: str = "", ratio: float | None = None, goal: str = "", met: bool | None = None, runs: int = 1, note: str = "") -> dict:
    "One row of the table; what was not found has no number."
    clean = [None if v is None or not np.isfinite(v) else float(f"{v:.4g}") for v in (ours, peer, ratio)]
    return {"measure": measure, "ours": clean[0], "peer": clean[1], "peer_name": name, "ratio": clean[2], "goal": goal, "met": None if met is None else bool(met), "runs": runs, "note": note}


def tell(delays: dict[str, float], most: int) -> str:
    return ", ".join(f"{name}: {f'not in {most}' if not np.isfinite(d) else int(d)}" for name, d in delays.items())


def compare_delays(world: World, changes: dict, runs: int, nulls: int, rng: np.random.Generator) -> tuple[list[dict], dict[str, float]]:
    limits, sliding = calibrate(world, nulls, rng), calibrate(world, nulls, rng, 1e-3*STEP/WINDOW)
    found: dict[str, dict[str, list[float]]] = {}
    for name, change in changes.items():
        for _ in range(runs):
            reference, healthy = draw(world, REFERENCE, rng), draw(world, 1000, rng)
            tests, out = Tests(reference), found.setdefault(name, {"ours": [], "windows": [], "sliding": []})
            out["ours"].append(delay_ours(reference, healthy, change, rng))
            out["windows"].append(delay_evidently(tests, limits, change, rng))
            out["sliding"].append(delay_evidently(tests, sliding, change, rng, healthy))
    middle = {name: {side: float(np.median(delays)) for side, delays in sides.items()} for name, sides in found.items()}
    def ratio(m, side): return m[side]/m["ours"] if np.isfinite(m["ours"]) and np.isfinite(m[side]) else np.inf if np.isfinite(m["ours"]) else 0. if np.isfinite(m[side]) else 1.
    rows = [row(f"rows until {name} is seen, {world.name}", m["ours"], m["windows"], "Evidently, windows of 200", ratio(m, "windows"), ">= 2", ratio(m, "windows") >= 2, runs,
                f"sliding: {m['sliding']:.0f}" + ("" if np.isfinite(m["ours"] + m["windows"]) else f"; no number: not in {LIMIT}")) for name, m in middle.items()]
    for side, title in (("windows", "Evidently, windows of 200"), ("sliding", "Evidently's tests, sliding")):
        seen = [m for m in middle.values() if np.isfinite(m["ours"]) or np.isfinite(m[side])]
        typical = float(np.median([ratio(m, side) for m in seen])) if seen else 1.
        rows.append(row(f"median over {len(seen)} changes of (its delay / ours), {world.name}", 1., None, title, typical, ">= 2" if side == "windows" else "told", typical >= 2 if side == "windows" else None,
                        runs, f"{sum(ratio(m, side) >= 2 for m in seen)} of {len(seen)} at 2 or more, {sum(ratio(m, side) < 1 for m in seen)} lost"))
    return rows, {name: m["ours"] for name, m in middle.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--runs", type=int, default=0, help="streams a change; 1 if quick, else 9")
    parser.add_argument("--nulls", type=int, default=0, help="healthy windows of each set of images; 400 if quick, else 5,000")
    parser.add_argument("--sets", nargs="*", choices=["grocery", "drawn"], help="of images; grocery alone if quick, else both")
    parser.add_argument("--corruptions", nargs="*", choices=list(CORRUPTIONS), help="dark and blur if quick, else all")
    parser.add_argument("--changes", nargs="*", help="names of changes, as the table has them; all if not given")
    parser.add_argument("--calibration", type=int, default=4000, help="healthy windows that set Evidently's thresholds; 400 if quick")
    parser.add_argument("--alibi", type=Path, default=REPO/".cvops"/"peers"/"alibi"/"bin"/"python")
    parser.add_argument("--frouros", type=Path, default=REPO/".cvops"/"peers"/"frouros"/"bin"/"python")
    options = parser.parse_args()
    sys.path.insert(0, str(REPO))
    from cvops_wb.core.processes import hush
    hush()
    runs, nulls, rng = options.runs or (1 if options.quick else 9), options.nulls or (400 if options.quick else 5000), np.random.default_rng(0)
    names = options.corruptions or (["dark", "blur"] if options.quick else list(CORRUPTIONS))
    sets = {"grocery": lambda: read_photos(options.photos, 240 if options.quick else 2640), "drawn": lambda: draw_photos(60 if options.quick else 600)}
    rows: list[dict] = []
    for name in options.sets or list(sets)[:1 if options.quick else 2]:
        make, done = sets[name], len(rows)
        world = World(name, *make(), names, 2 if options.quick else 12)
        changes = {name: change for name, change in world.list_changes().items() if not options.changes or name in options.changes}
        if not rows: rows += compare_speed(world, 2 if options.quick else 5, rng)
        alarms = count_alarms(world, nulls, rng)
        rows.append(row(f"alarms in {nulls} independent healthy windows, {name}", alarms, runs=nulls, note=f"upper 95 % bound {bound_rate(alarms, nulls):.2e} a window"))
        rows.append(row(f"false alarms a window, upper 95 % bound, {name}", bound_rate(alarms, nulls), goal="<= 0.001", met=bound_rate(alarms, nulls) <= 1e-3, runs=nulls,
                        note=f"{alarms} in {nulls} windows" + ("" if nulls >= 5000 else "; too few windows to meet it")))
        delays, ours = compare_delays(world, changes, runs, 400 if options.quick else options.calibration, rng)
        rows += delays
        for r in rows[done:]: print(r, file=sys.stderr, flush=True)
        some = dict(list(changes.items())[:2]) if options.quick else changes
        rows += compare_peers(world, some, {"alibi": options.alibi, "frouros": options.frouros}, ours, rng, rows[0]["ours"])
    print("| measure | ours | peer | | ratio | goal | met | note |\n|---|---|---|---|---|---|---|---|")
    for r in rows: print("|", " | ".join("" if v is None else str(v) for v in (r[k] for k in ("measure", "ours", "peer", "peer_name", "ratio", "goal", "met", "note"))), "|")
    if options.json: options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
