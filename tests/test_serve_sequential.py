"The canary's tests: they keep their word when they are looked at after every pair, and the suite notices a test that does not."
import numpy as np
import pytest

from cvops_wb.serve.rollouts.sequential import (
    Difference,
    Family,
    Process,
    Proportions,
    Scale,
    Share,
    Tail,
    Values,
    project,
)

BAR, RUNS = np.log(20), 400


def watch(process, draw, pairs, rng):
    "The share of runs whose evidence ever passed the bar of 5 %."
    for _ in range(pairs): process.add(*draw(rng))
    return float((process.peak >= BAR).mean())


def shares(a, b): return lambda rng: (rng.random(RUNS) < a, rng.random(RUNS) < b)
def values(ratio, spread=.4): return lambda rng: (rng.lognormal(3, spread, RUNS), ratio*rng.lognormal(3, spread, RUNS))
def heavy(ratio): return lambda rng: (rng.pareto(1.2, RUNS) + .1, ratio*(rng.pareto(1.2, RUNS) + .1))


EQUAL = {
    "rare errors": (lambda: Proportions(runs=RUNS), shares(.002, .002)),
    "errors": (lambda: Proportions(runs=RUNS), shares(.05, .05)),
    "coins": (lambda: Proportions(runs=RUNS), shares(.5, .5)),
    "fewer": (lambda: Proportions(side=-1, runs=RUNS), shares(.3, .3)),
    "better than the champion": (lambda: Proportions(runs=RUNS), shares(.1, .05)),
    "at the margin": (lambda: Proportions(margin=.05, runs=RUNS), shares(.1, .15)),
    "at the other margin": (lambda: Proportions((.02, .05), (1, 1), margin=.05, side=-1, runs=RUNS), shares(.1, .15)),
    "at a margin near nothing": (lambda: Proportions((.02, .05), (1, 1), margin=.02, side=-1, runs=RUNS), shares(.001, .021)),
    "latency": (lambda: Values(runs=RUNS), values(1)),
    "faster": (lambda: Values(runs=RUNS), values(.8)),
    "lower values": (lambda: Values(side=-1, runs=RUNS), values(1)),
    "latency at the margin": (lambda: Values(margin=1.1, runs=RUNS), values(1.1)),
    "not slower, at the margin": (lambda: Values((1.05, 1.1), (1, 1), margin=1.1, side=-1, runs=RUNS), values(1.1)),
    "heavy tails": (lambda: Values(runs=RUNS), heavy(1)),
    "ties": (lambda: Values(runs=RUNS), lambda rng: np.round(rng.random((2, RUNS))*3) + 1),
    "tail": (lambda: Tail(runs=RUNS), values(1)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_nobody_is_accused_wrongly_more_often_than_said(name):
    make, draw = EQUAL[name]
    rate = watch(make(), draw, 600, np.random.default_rng(3))
    assert rate <= .05 + 3*np.sqrt(.05*.95/RUNS), rate


WORSE = {
    "errors": (lambda: Proportions(runs=RUNS), shares(.05, .12)),
    "rare errors": (lambda: Proportions(runs=RUNS), shares(0., .03)),
    "fewer right": (lambda: Proportions(side=-1, runs=RUNS), shares(.9, .8)),
    "latency": (lambda: Values(runs=RUNS), values(1.3)),
    "heavy tails": (lambda: Values(runs=RUNS), heavy(1.8)),
    "lower values": (lambda: Values(side=-1, runs=RUNS), values(.75)),
    "a slow tail": (lambda: Tail(runs=RUNS), lambda rng: (rng.lognormal(3, .3, RUNS), rng.lognormal(3, .3, RUNS)*np.where(rng.random(RUNS) < .15, 5, 1))),
    "no worse by a margin": (lambda: Proportions((.03, .05), (1, 1), margin=.05, side=-1, runs=RUNS), shares(.05, .05)),
    "not slower by a margin": (lambda: Values((1.1, 1.2), (1, 1), margin=1.2, side=-1, runs=RUNS), values(1)),
}


@pytest.mark.parametrize("name", WORSE)
def test_what_is_there_is_found(name):
    make, draw = WORSE[name]
    assert watch(make(), draw, 900, np.random.default_rng(4)) >= .9


class Peeking(Proportions):
    "Planted: the alternative is guessed from the pair at hand too."

    def add(self, champion, challenger):
        self.counts, self.hits = self.counts + 1, self.hits + champion + challenger
        self.gap = np.where(np.asarray(challenger)[:, None], .3, .001)*np.ones(self.wealth.shape)
        self.renew()
        self.counts, self.hits = self.counts - 1, self.hits - champion - challenger
        super().add(champion, challenger)


class Impatient(Process):
    "Planted: the test of fixed size, looked at after every pair."

    def __init__(self):
        super().__init__([1], RUNS)
        self.sums, self.count = np.zeros((2, RUNS)), 0

    def add(self, champion, challenger):
        self.sums += champion, challenger
        self.count += 1
        middle = self.sums.mean(0)/self.count
        z = (self.sums[1] - self.sums[0])/np.sqrt(np.maximum(2*middle*(1 - middle)*self.count, 1e-9))
        self.earn(np.where((z > 1.645) & (self.count > 30), 100., 0.)[:, None])


class Twice(Values):
    "Planted: every pair is booked twice."

    def earn(self, logs): super().earn(2*logs)


@pytest.mark.parametrize("make, draw", [(lambda: Peeking(runs=RUNS), shares(.2, .2)), (Impatient, shares(.2, .2)), (lambda: Twice(runs=RUNS), values(1))])
def test_a_test_that_does_not_keep_its_word_is_noticed(make, draw):
    assert watch(make(), draw, 300, np.random.default_rng(5)) > .05 + 3*np.sqrt(.05*.95/RUNS)


def test_a_share_alone():
    rng = np.random.default_rng(6)
    equal, higher = Share(.1, runs=RUNS), Share(.1, runs=RUNS)
    for _ in range(400):
        equal.add(rng.random(RUNS) < .1)
        higher.add(rng.random(RUNS) < .2)
    assert (equal.peak >= BAR).mean() <= .05 + 3*np.sqrt(.05*.95/RUNS)
    assert (higher.peak >= BAR).mean() >= .9


def test_a_family_shares_its_level_and_names_the_cause():
    rng = np.random.default_rng(7)
    family = Family({"errors": Proportions(runs=RUNS), "latency": Values(runs=RUNS), "wrong": Proportions(runs=RUNS)}, level=.05)
    found = np.zeros(RUNS, bool)
    for _ in range(300):
        for name, draw in {"errors": shares(.05, .05), "latency": values(1), "wrong": shares(.3, .3)}.items(): family.processes[name].add(*draw(rng))
        found |= family.found
    assert found.mean() <= .05 + 3*np.sqrt(.05*.95/RUNS)
    assert not family.proven.any() or family.proven.mean() < .01
    for _ in range(200): family.processes["latency"].add(*values(2)(rng))
    assert family.found.all() and family.name_cause() == "latency"


def test_the_interval_holds_at_all_times():
    rng, missed = np.random.default_rng(8), 0
    for _ in range(40):
        known, wrong = Difference(), False
        for a, b in rng.random((150, 2)) < [.1, .2]:
            known.add(a, b)
            _, low, high = known.tell()
            wrong |= not low - .005 <= .1 <= high + .005    # half a step of its margins
        missed += wrong
    assert missed <= 6     # 5 % of 40 are two; seven or more would happen once in 500 times


@pytest.mark.parametrize("low, high, margin", [(.1, .2, 0.), (.1, .1, .05), (.01, .02, .1), (.5, .3, -.1), (.9, .95, .02)])
def test_the_closest_pair_is_the_closest(low, high, margin):
    q = float(project(np.array(low), np.array(high), np.array(margin)))
    def diverge(p, at): return p*np.log(p/at) + (1 - p)*np.log((1 - p)/(1 - at))
    places = np.linspace(max(0, -margin) + 1e-4, min(1, 1 - margin) - 1e-4, 20001)
    best = places[np.argmin(diverge(low, places) + diverge(high, places + margin))]
    assert q == pytest.approx(best, abs=1e-4)


def test_the_scale_is_one_of_ranks():
    rng = np.random.default_rng(9)
    logs = rng.normal(0, 1, (2, 500))
    scale = Scale(np.quantile(logs, (np.arange(33) + .5)/33, axis=1).T)
    assert np.all(np.diff(scale.place(np.sort(logs, axis=1)), axis=1) >= 0)
    assert scale.shift(1.2) == pytest.approx(np.log(1.2), rel=.15)
