"""The canary's test: how often it accuses an equal version when it looks after every request, and how soon it finds a worse one.

    python bench/canary.py [--quick] [--json FILE]

Rollouts are simulated: errors, latencies (log-normal), answers found wrong by feedback, doubts and answers, in pairs of the two versions. The peer is the
test of fixed size at 90 % power, one-sided at the error that ours was measured to make: for shares the test of two proportions, for
latencies Mann-Whitney, as Kayenta has it. Its sample size comes from the usual formulas and is checked by simulating its power here. A pair is one
answer of each version; both sides count pairs.
"""
import argparse
import json
import math
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np

from cvops_wb.serve.rollouts.evidence import make_accusers
from cvops_wb.serve.rollouts.sequential import Family, Process, Proportions, Values

score = NormalDist().inv_cdf
LEVEL, POWER = Family.level, .9


def bound_rate(hits: int, count: int) -> float:
    "The upper end of the one-sided 95 % interval of Clopper and Pearson."
    from scipy.stats import beta
    return 1. if hits == count else float(beta.ppf(.95, hits + 1, count - hits))


def size_proportions(a: float, b: float, level: float) -> float:
    "Pairs that the test of two proportions needs."
    middle = (a + b)/2
    spread = score(1 - level)*math.sqrt(2*middle*(1 - middle)) + score(POWER)*math.sqrt(a*(1 - a) + b*(1 - b))
    return (spread/(b - a))**2


def size_ranks(ratio: float, spread: float, level: float) -> float:
    "Pairs that Mann-Whitney needs for log-normal values (Noether, 1987)."
    above = NormalDist().cdf(math.log(ratio)/spread/math.sqrt(2))
    return (score(1 - level) + score(POWER))**2/(6*(above - .5)**2)


def check_power(draw, size: float, level: float, ranks: bool, rng: np.random.Generator, runs: int = 2000) -> float:
    "How often the test of fixed size finds what `draw` gives."
    from scipy.stats import mannwhitneyu
    count = math.ceil(size)
    a, b = draw(rng, (runs, count))
    if ranks: return float((mannwhitneyu(b, a, axis=1, alternative="greater", method="asymptotic").pvalue <= level).mean())
    middle = (a.mean(1) + b.mean(1))/2
    z = (b.mean(1) - a.mean(1))/np.sqrt(np.maximum(2*middle*(1 - middle)/count, 1e-12))
    return float((z >= score(1 - level)).mean())


def shares(a: float, b: float):
    return lambda rng, shape: (rng.random(shape) < a, rng.random(shape) < b)


def latencies(ratio: float, spread: float):
    return lambda rng, shape: (rng.lognormal(3, spread, shape), ratio*rng.lognormal(3, spread, shape))


def wait(process: Process, draw, pairs: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    "The pair after which each run raises the alarm; infinity if it never does."
    when = np.full(runs, np.inf)
    for k in range(pairs):
        process.add(*draw(rng, runs))
        when[(process.evidence >= -math.log(LEVEL)) & np.isinf(when)] = k + 1
    return when


def wait_family(make, draws: dict, pairs: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    "The same for all measures of a rollout together."
    family, when = make(runs=runs), np.full(runs, np.inf)
    for k in range(pairs):
        for name, process in family.processes.items(): process.add(*draws[name](rng, runs))
        when[family.found & np.isinf(when)] = k + 1
    return when


def row(measure: str, ours: float, peer: float | None, name: str, goal: str, met: bool, runs: int, note: str) -> dict:
    ratio = None if not peer else round(ours/peer, 4)
    return {"measure": measure, "ours": ours, "peer": peer, "peer_name": name, "ratio": ratio, "goal": goal, "met": bool(met), "runs": runs, "note": note}


EQUAL = {"errors": shares(.05, .05), "latency": latencies(1, .3), "tail": latencies(1, .3), "wrong": shares(.2, .2),
         "doubt": lambda rng, shape: (rng.random(shape), rng.random(shape)), "mix": shares(.2, .2), "differ": lambda rng, shape: (rng.random(shape) < .3,)}


def measure_equal(runs: int, pairs: int, rng: np.random.Generator) -> dict:
    "Equal versions, all measures at once, a look after every pair."
    hits = int(np.isfinite(wait_family(make_accusers, EQUAL, pairs, runs, rng)).sum())
    bound = bound_rate(hits, runs)
    found = row("equal versions accused, upper 95 % bound", round(bound, 4), None, "", "<= 0.05", bound <= .05, runs,
                f"{hits} of {runs} rollouts of {pairs} pairs, seven measures, a look after each pair")
    return {**found, "false": max(hits, 1)/runs}


def measure_effect(name: str, process, equal, draws: list, size, ranks: bool, pairs: int, runs: int, rng: np.random.Generator) -> list[dict]:
    "One measure: the effect that a rollout is planned for, and twice as much."
    false = float(np.isfinite(wait(process(runs=runs), equal, pairs, runs, rng)).mean())
    fixed = size(max(false, 1/runs))
    power = check_power(draws[0], fixed, max(false, 1/runs), ranks, rng)
    rows = []
    for draw, limit, effect in zip(draws, (.8, .35), ("planned", "twice"), strict=True):
        median = float(np.median(wait(process(runs=runs), draw, math.ceil(fixed*2), runs, rng)))
        rows.append(row(f"{name}, {effect} effect: pairs until found, median", median, round(fixed, 1), "Mann-Whitney" if ranks else "two proportions",
                        f"<= {limit} x", median <= limit*fixed, runs, f"false alarms {false:.3f}; the peer's power at its size, simulated: {power:.3f}"))
    return rows


def measure_family(runs: int, false: float, rng: np.random.Generator) -> list[dict]:
    "One measure is worse and six are equal: the peer looks at four at the same error in all (Bonferroni), or is told which one to look at."
    rows = []
    worse = {"errors": (lambda x: shares(.05, .05 + .05*x), lambda level: size_proportions(.05, .1, level), "two proportions"),
             "latency": (lambda x: latencies(1 + .2*x, .3), lambda level: size_ranks(1.2, .3, level), "Mann-Whitney")}
    for name, (draw, size, peer) in worse.items():
        for times, limit in ((1, .8), (2, .35)):
            when = float(np.median(wait_family(make_accusers, {**EQUAL, name: draw(times)}, math.ceil(size(false)*2), runs, rng)))
            for level, note in ((false/4, "the peer too looks at four"), (false, "the peer is told which one to look at")):
                rows.append(row(f"{name} among seven, {times} x the effect: pairs, median", when, round(size(level), 1), peer,
                                f"<= {limit} x", when <= limit*size(level), runs, f"{note}, at an error of {level:.4f}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer runs: under a minute on two cores")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rng, begin = np.random.default_rng(0), time.perf_counter()
    runs, pairs = (400, 500) if options.quick else (2000, 2000)
    rows = [measure_equal(runs, pairs, rng)]
    for base in (.01, .05, .2):
        rows += measure_effect(f"errors {base:.0%} + 5 points", Proportions, shares(base, base), [shares(base, base + .05), shares(base, base + .1)],
                               lambda level, base=base: size_proportions(base, base + .05, level), False, pairs, runs, rng)
    for spread in (.3, .6):
        rows += measure_effect(f"p50 + 20 %, spread {spread}", Values, latencies(1, spread), [latencies(1.2, spread), latencies(1.4, spread)],
                               lambda level, spread=spread: size_ranks(1.2, spread, level), True, pairs, runs, rng)
    rows += measure_family(runs, rows[0]["false"], rng)
    for entry in rows: print(f"{entry['measure']:58} {entry['ours']:9} {entry['peer'] or '':>8} {entry['ratio'] or '':>7}  {entry['goal']:>8} {'met' if entry['met'] else 'MISSED'}  {entry['note']}")
    print(f"{time.perf_counter() - begin:.0f} s")
    if options.json: options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__": main()
