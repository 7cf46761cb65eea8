"The gate: every rule, every missing number, and the champion better, equal, worse or not decidable."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cvops_wb.core.errors import MetricMissing, WrongUsage
from cvops_wb.core.records import Evaluation
from cvops_wb.core.settings import Gate, load_settings
from cvops_wb.learn.evaluation import bootstrap, resample_groups
from cvops_wb.learn.gates import compare, design_effect, judge, paired_interval
from cvops_wb.learn.tasks import TASKS

GATE = Gate(min_samples=20, min_accuracy=.5, max_calibration_error=.25, max_latency_ms=200., max_size_mb=200., margin=.01)
GOOD = Evaluation("train-1", "s", "test", 200, {"accuracy": .9, "calibration_error": .05, "latency_ms": 4., "size_mb": 11., "count_unleaked": 200.},
                  {"accuracy": [.85, .94]}, {}, "reports/evaluate-1/predictions.parquet")


def failed(evaluation: Evaluation, comparison=None) -> list[str]:
    return [rule["rule"] for rule in judge(evaluation, GATE, comparison) if not rule["passed"]]


def with_metric(name: str, value) -> Evaluation:
    return replace(GOOD, metrics={k: v for k, v in {**GOOD.metrics, name: value}.items() if v is not ...})


@pytest.mark.parametrize("evaluation, want", [
    (GOOD, []),
    (replace(GOOD, count=20), []),
    (replace(GOOD, count=19), ["min_samples"]),
    (replace(GOOD, intervals={"accuracy": [.5, .9]}), []),
    (replace(GOOD, intervals={"accuracy": [.499, .9]}), ["min_accuracy"]),
    (replace(GOOD, intervals={}), ["min_accuracy"]),
    (replace(GOOD, intervals={"accuracy": []}), ["min_accuracy"]),
    (replace(GOOD, intervals={"accuracy": [float("nan"), 1.]}), ["min_accuracy"]),
    (with_metric("accuracy", ...), ["min_accuracy"]),
    (with_metric("calibration_error", .25), []),
    (with_metric("calibration_error", .2501), ["max_calibration_error"]),
    (with_metric("calibration_error", float("nan")), ["max_calibration_error"]),
    (with_metric("calibration_error", ...), ["max_calibration_error"]),
    (with_metric("latency_ms", 201.), ["max_latency_ms"]),
    (with_metric("latency_ms", ...), ["max_latency_ms"]),
    (with_metric("size_mb", float("inf")), ["max_size_mb"]),
    (with_metric("size_mb", ...), ["max_size_mb"]),
    (replace(GOOD, metrics={}, intervals={}), ["min_accuracy", "max_calibration_error", "max_latency_ms", "max_size_mb", "max_leak_share"]),
])
def test_absolute_rules(evaluation, want): assert failed(evaluation) == want


def test_every_rule_answers_whole():
    for rule in judge(with_metric("size_mb", ...), GATE, MetricMissing("the champion was not scored")):
        assert set(rule) == {"rule", "value", "limit", "passed", "why"} and rule["why"]
        assert (rule["value"] is None) == (rule["rule"] in ("size_mb", "max_size_mb", "not_worse_than_champion"))


def predictions(correct: np.ndarray, groups=None) -> pd.DataFrame:
    count = len(correct)
    return pd.DataFrame({"id": [f"{k:016x}" for k in range(count)], "correct": correct.astype(bool), "group": np.arange(count) if groups is None else groups})


def paired(count: int, better: int, worse: int):
    "A candidate and a champion that is right on 80 %, but for so many images."
    champion = np.arange(count) % 5 > 0
    candidate = champion.copy()
    candidate[np.flatnonzero(~champion)[:better]] = True
    candidate[np.flatnonzero(champion)[:worse]] = False
    return predictions(candidate), predictions(champion)


@pytest.mark.parametrize("count, better, worse, passed, word", [
    (1000, 0, 0, True, ""),                 # equal, and enough images to know it
    (80, 0, 0, False, "inconclusive"),      # equal, as far as 80 images can tell
    (1000, 60, 10, True, ""),               # better
    (80, 14, 0, True, ""),                  # better, on few images
    (1000, 10, 60, False, "worse"),
    (200, 20, 20, False, "inconclusive"),   # as good, but differing too much to be sure
    (3000, 30, 30, True, ""),
])
def test_against_champion(count, better, worse, passed, word):
    rule = judge(GOOD, GATE, compare(*paired(count, better, worse), version=3))[-1]
    assert rule["rule"] == "not_worse_than_champion" and rule["passed"] is passed and "version 3" in rule["why"] and word in rule["why"]
    assert (rule["value"] > rule["limit"]) is passed


def test_inconclusive_says_how_many_images_it_takes():
    why = judge(GOOD, GATE, compare(*paired(80, 0, 0)))[-1]["why"]
    wanted = int(why.split("about ")[1].split(" ")[0])
    assert judge(GOOD, GATE, compare(*paired(wanted, 0, 0)))[-1]["passed"]
    assert not judge(GOOD, GATE, compare(*paired(wanted//2, 0, 0)))[-1]["passed"]


@pytest.mark.parametrize("change", [lambda t: t.iloc[:-1], lambda t: t.assign(id=[f"x{k}" for k in range(len(t))]), lambda t: t.iloc[:0]])
def test_other_images_are_no_comparison(change):
    candidate, champion = paired(100, 5, 0)
    with pytest.raises(MetricMissing): compare(candidate, change(champion))


def test_groups_make_a_comparison_weaker():
    candidate, champion = paired(600, 30, 2)
    alone, grouped = compare(candidate, champion), compare(candidate.assign(group=np.arange(600)//50), champion)
    assert alone.low > 0 > grouped.low and grouped.effective < alone.effective == 600
    assert design_effect(np.zeros(100), np.arange(100)//10) == 10 and design_effect(np.zeros(100), np.arange(100)) == 1


@pytest.mark.parametrize("rate", [.0, .05, .2])
def test_interval_covers(rate):
    "An A/A test: equal models are called different at most as often as promised."
    rng = np.random.default_rng(1)
    draws = rng.multinomial(120, [rate, rate, 1 - 2*rate], 600)[:, :2].tolist()
    cases = {tuple(d): paired_interval(*d, 120) for d in map(tuple, draws)}
    assert np.mean([cases[tuple(d)][0] <= 0 <= cases[tuple(d)][1] for d in draws]) > .93


@pytest.mark.parametrize("better, worse, count", [(0, 0, 1), (1, 0, 1), (0, 1, 1), (7, 3, 10), (10, 0, 10), (0, 10, 10), (3, 3, 500)])
def test_interval_is_sane(better, worse, count):
    low, high = paired_interval(better, worse, count)
    other = paired_interval(worse, better, count)
    assert -1 <= low <= (better - worse)/count <= high <= 1 and np.allclose((low, high), (-other[1], -other[0]), atol=1e-9)


def test_bootstrap_agrees_with_the_formula():
    rng, task = np.random.default_rng(0), TASKS["classification"]()
    targets = rng.integers(0, 3, 400)
    scores = np.eye(3)[np.where(rng.random(400) < .8, targets, (targets + 1) % 3)]
    low, high = bootstrap(task, scores, targets, np.arange(400), 2000)["accuracy"]
    accuracy = (scores.argmax(1) == targets).mean()
    assert abs((high - low)/2 - 1.96*(accuracy*(1 - accuracy)/400)**.5) < .005
    weights = resample_groups(np.array(["a", "a", "b"]), 50)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 0] + weights[:, 2] == 2).all()


@pytest.mark.parametrize("count", [1, 2])
def test_degenerate_evaluations_have_finite_numbers(count):
    task = TASKS["classification"]()
    scores, targets = np.full((count, 2), .5), np.zeros(count, int)
    for value in task.measure(scores, targets).values(): assert np.isfinite(value).all()
    assert all(np.isfinite(v).all() for v in bootstrap(task, scores, targets, np.arange(count), 20).values())
    assert task.measure(scores, np.full(count, -1))["accuracy"] == 0     # a label that the model does not know is an error


@pytest.mark.parametrize("key", ["margin", "slice_margin", "slice_tolerance", "max_latency_ms"])
def test_a_limit_that_is_no_number_lets_nothing_through(workbench, monkeypatch, key):
    monkeypatch.setenv(f"CVOPS_GATE_{key.upper()}", "nan")
    with pytest.raises(WrongUsage, match=f"{key} must be float"): load_settings()


def test_few_groups_reach_further():
    "What groups cost is itself an estimate: of ten groups the interval is wider than the normal one by Student's factor."
    candidate, champion = paired(600, 30, 2)
    c = compare(candidate.assign(group=np.arange(600)//60), champion)
    normal = paired_interval(c.better, c.worse, c.effective)
    assert c.effective < 600 and c.low < normal[0] - .005 and c.high > normal[1] + .005
    alone = compare(candidate, champion)
    assert (alone.low, alone.high) == paired_interval(30, 2, 600)
