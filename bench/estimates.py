"""Accuracy without labels, and spot checks: does the interval hold at its stated rate, how wide is it, and does it say where it cannot know?

    python bench/estimates.py [--quick] [--json FILE] [--photos DIR]

Images, corruptions and the trained champion are those of bench/drift.py. A shift is a window of 500 answers: a corruption at a random severity in a random share of the
images, a changed mix of classes, or both; the reference is up to 500 labelled answers to other images. The truth is the accuracy of the window. The peer is the mean
of the confidences as they are, with a binomial interval (what one gets from a model's scores alone), and the mean of the confidences calibrated on the same
reference with the interval of chance alone. Unknown classes are shifts of their own: there the interval need not hold, it must be said that nobody knows.
Spot checks: 50 answers of a window of 2,000, drawn by weight, thousands of times.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from drift import CORRUPTIONS, PHOTOS, World, draw_photos, hash_text, read_photos, row


def draw_shift(world, pool, rng, count=500):
    "A window, and what was done to it."
    places = pool
    if rng.random() < .4:       # another mix of classes
        weights = np.array([rng.dirichlet(np.ones(2)*.6)[0] + .02 if hash_text(label + str(rng.integers(9))) % 2 else 1. for label in world.clean["label"].iloc[pool]])
        places = rng.choice(pool, len(pool), p=weights/weights.sum())
    places = rng.choice(places, count)
    window, key = world.clean.iloc[places].reset_index(drop=True), list(world.changed)[rng.integers(len(world.changed))]
    hit = rng.random(count) < rng.choice([0., .3, 1.], p=[.2, .4, .4])*rng.uniform(.5, 1)
    window = pd.concat([window[~hit], world.changed[key].iloc[places[hit]]], ignore_index=True)
    return window, key if hit.any() else None


def is_right(rows): return (rows["label"] == rows["predicted"]).to_numpy(float)


def hold_binomial(value, count, truth):
    half = 1.96*np.sqrt(max(value*(1 - value), 1e-9)/count)
    return abs(truth - value) <= half, 2*half


def measure_shifts(world, shifts, rng):
    "How often each interval holds the truth, and how wide it is."
    from cvops_wb.watch.accuracy import Estimator
    found = {"ours": [], "calibrated": [], "raw": []}
    for _ in range(shifts):
        order = rng.permutation(len(world.clean))
        reference = world.clean.iloc[order[:min(500, len(order)//2)]].reset_index(drop=True)        # each image once, as a test split has it
        window, _ = draw_shift(world, order[len(order)//2:], rng)
        truth, estimator = is_right(window).mean(), Estimator.learn(reference)
        told = estimator.estimate(window)
        found["ours"].append((told.low <= truth <= told.high, told.high - told.low, abs(told.value - truth), told.known))
        for name, value in (("calibrated", estimator.weigh(window).mean()), ("raw", window["confidence"].mean())):
            found[name].append((*hold_binomial(value, len(window), truth), abs(value - truth), True))
    return {name: np.array(values, float).T for name, values in found.items()}


def measure_healthy(world, windows, rng):
    "How often it is said that nobody knows, of windows that are as the reference."
    from cvops_wb.watch.accuracy import Estimator
    said = []
    for _ in range(windows):
        order = rng.permutation(len(world.clean))
        estimator = Estimator.learn(world.clean.iloc[order[:len(order)//2]].reset_index(drop=True))
        said.append(not estimator.estimate(world.clean.iloc[order[len(order)//2:]].reset_index(drop=True)).known)
    return float(np.mean(said))


def measure_unknown(world, shifts, rng):
    "How often it is said that nobody knows, with 30 % of a class that the reference does not have."
    from cvops_wb.watch.accuracy import Estimator
    said = []
    for _ in range(shifts):
        order = rng.permutation(len(world.clean))
        reference = world.clean.iloc[order[:len(order)//2]].reset_index(drop=True)
        window = pd.concat([world.clean.iloc[rng.choice(order[len(order)//2:], 350)], world.new.iloc[rng.integers(0, len(world.new), 150)]], ignore_index=True)
        told, truth = Estimator.learn(reference).estimate(window), is_right(window).mean()
        said.append((not told.known, told.low <= truth <= told.high))
    return np.array(said, float).mean(0)


def measure_checks(world, checks, rng):
    "Mean error of a spot check, its standard error, how often its interval holds, and its spread beside that of an equal draw."
    from cvops_wb.watch.accuracy import Estimator, judge_check
    from cvops_wb.watch.accuracy.spotchecks import draw, find_chances
    order = rng.permutation(len(world.clean))
    estimator = Estimator.learn(world.clean.iloc[order[:len(order)//2]].reset_index(drop=True))
    window = world.clean.iloc[rng.choice(order[len(order)//2:], 2000)].reset_index(drop=True)
    right, chance = is_right(window), estimator.weigh(window)
    chances = find_chances(np.sqrt(chance*(1 - chance)), 50)
    found = []
    for seed in range(checks):
        places = draw(chances, seed)
        value, low, high = judge_check(right[places], chances[places], len(window))
        found.append((value - right.mean(), low <= right.mean() <= high, right[places].mean() - right.mean(), right[rng.choice(len(right), 50, replace=False)].mean() - right.mean()))
    return np.array(found, float).T


def measure(world, shifts, checks, rng):
    told, name = measure_shifts(world, shifts, rng), world.name
    (held, width, error, known), rows = told["ours"], []
    for peer, title in (("calibrated", "calibrated confidence, chance alone"), ("raw", "confidence as it is, chance alone")):
        rows.append(row(f"shifts whose accuracy lies in the 95 % interval, of {shifts}, {name}", held.sum(), told[peer][0].sum(), title, None, ">= 95 %", held.mean() >= .95, shifts,
                        f"mean width {width.mean():.2f}, its {told[peer][1].mean():.2f}; {int((1 - known).sum())} said unknown"))
        rows.append(row(f"mean error of the estimate, points, {name}", 100*error.mean(), 100*told[peer][2].mean(), title, told[peer][2].mean()/error.mean(), "told", None, shifts))
    unknown = measure_unknown(world, max(shifts//2, 5), rng)
    rows.append(row(f"30 % of an unknown class: said that nobody knows, share, {name}", unknown[0], goal="told", runs=max(shifts//2, 5), note=f"the interval held in {unknown[1]:.0%}"))
    count = 20 if shifts < 50 else 300
    said = measure_healthy(world, count, rng)
    rows.append(row(f"healthy windows: said that nobody knows, share, {name}", said, goal="<= 0.02", met=said <= .02, runs=count, note="level 0.01"))
    bias, held, plain, equal = measure_checks(world, checks, rng)
    spread = bias.std()/np.sqrt(checks)
    rows.append(row(f"spot check of 50: mean error, points, {name}", 100*bias.mean(), 100*plain.mean(), "the same draw without its weights", None, "within 3 standard errors of 0", abs(bias.mean()) <= 3*spread, checks, f"standard error {100*spread:.2g}"))
    rows.append(row(f"spot check of 50: 95 % interval holds, share, {name}", held.mean(), goal=">= 0.95", met=held.mean() >= .95, runs=checks))
    rows.append(row(f"spot check of 50: standard deviation, points, {name}", 100*bias.std(), 100*equal.std(), "50 at random", equal.std()/bias.std(), "told", None, checks))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, shifts and checks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from cvops_wb.core.processes import hush
    hush()
    rng, rows = np.random.default_rng(0), []
    names = ["dark", "blur"] if options.quick else list(CORRUPTIONS)
    sets = {"grocery": lambda: read_photos(options.photos, 240 if options.quick else 2640), "drawn": lambda: draw_photos(600)}
    for name in list(sets)[:1 if options.quick else 2]:
        rows += measure(World(name, *sets[name](), names, 2 if options.quick else 12), 10 if options.quick else 100, 300 if options.quick else 4000, rng)
    print("| measure | ours | peer | | ratio | goal | met | note |\n|---|---|---|---|---|---|---|---|")
    for r in rows: print("|", " | ".join("" if v is None else str(v) for v in (r[k] for k in ("measure", "ours", "peer", "peer_name", "ratio", "goal", "met", "note"))), "|")
    if options.json: options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__": main()
