"A budget of minutes becomes a size and epochs: what is chosen fits, the largest size that gets its passes, and nonsense is told."
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvops_wb.core.errors import WrongUsage
from cvops_wb.learn.fitting import NoMemory
from cvops_wb.learn.learners import budgets
from cvops_wb.learn.learners.budgets import (
    MARGIN,
    RESERVE,
    Cost,
    NoTime,
    check_minutes,
    choose_budget,
    count_seconds,
    find_budget,
    say_seconds,
    want_epochs,
)

LADDER = (64, 96, 128, 160, 192, 224)


def scale(epoch: float, check: float = 1., once: float = 5., checks: int = 20, sizes=LADDER) -> list[Cost]:
    "Costs in proportion to the area; those of 128 px are given."
    return [Cost(size, epoch*(size/128)**2, check*(size/128)**2, once, checks) for size in sizes]


@pytest.mark.parametrize("minutes, size, epochs", [
    (1, 64, 14), (2, 64, 33), (5, 96, 43), (12, 128, 61), (30, 160, 100), (120, 224, 209), (10_000, 224, 240)])
def test_what_a_classifier_gets(minutes, size, epochs):
    found = choose_budget(minutes, scale(10.), epochs=60, base=128, most=240)
    assert (found.size, found.epochs) == (size, epochs), found.say()


@settings(max_examples=200, deadline=None)
@given(minutes=st.floats(.1, 2000), epoch=st.floats(.001, 500), check=st.floats(.001, 50), once=st.floats(0, 600), spent=st.floats(0, 300),
       checks=st.sampled_from([6, 20]), epochs=st.integers(1, 120), most=st.sampled_from([240, 480]))
def test_it_fits_and_uses_what_there_is(minutes, epoch, check, once, spent, checks, epochs, most):
    costs = scale(epoch, check, once, checks)
    left = count_seconds(minutes, spent)
    try: found = choose_budget(minutes, costs, epochs, 128, most, spent)
    except NoTime:
        assert costs[0].sum(1) > left
        return
    by_size = {cost.size: cost for cost in costs}
    assert found.seconds <= 60*minutes*(1 - MARGIN) + 1e-3 and 1 <= found.epochs <= most
    assert found.epochs == most or all(by_size[found.size].sum(n) > left for n in range(found.epochs + 1, most + 1))
    for cost in costs:
        reaches = cost.fit(left, most) >= min(most, want_epochs(cost.size, epochs, 128))
        assert not reaches or cost.size <= found.size, "no larger size gets what it wants"
    assert found.epochs >= found.wanted or found.size == 64


@pytest.mark.parametrize("epoch", [.01, 1., 30.])
def test_more_minutes_never_give_a_smaller_size(epoch):
    sizes = [choose_budget(float(m), scale(epoch), 60, 128, 240).size for m in np.geomspace(2, 5000, 60)]
    assert sizes == sorted(sizes)


def test_few_images_are_not_learned_by_heart():
    found = choose_budget(600., scale(.05), epochs=60, base=128, most=240)
    assert found.epochs == found.most == 240 and found.seconds < 300 and "not worth their time" in found.say()


@pytest.mark.parametrize("minutes, epochs, message", [
    (0., 0, "more than nothing"), (-3., 0, "more than nothing"), (math.nan, 0, "more than nothing"), (math.inf, 0, "more than nothing"), (5., 10, "one of them")])
def test_what_cannot_be_meant(minutes, epochs, message):
    with pytest.raises(WrongUsage, match=message): check_minutes(minutes, epochs)
    check_minutes(None, epochs)


def test_too_little_says_how_much_is_needed():
    with pytest.raises(NoTime, match="not one epoch") as told: choose_budget(1., scale(600.), 60, 128, 240)
    needed = float(told.value.fix.partition("minutes=")[2].split()[0])
    assert choose_budget(needed, scale(600.), 60, 128, 240).epochs == 1
    with pytest.raises(NoTime): choose_budget(needed*.9, scale(600.), 60, 128, 240)


def measured(monkeypatch, epoch: float = 10., fails: int = 1000) -> list[int]:
    "The sizes that were measured."
    asked = []
    def measure(make, size, checks, known):
        asked.append(size)
        if size >= fails: raise NoMemory("a batch does not fit into memory, and half of it neither")
        return Cost(size, epoch*(size/128)**2, 1., 0., checks)
    monkeypatch.setattr(budgets, "measure_cost", measure)
    return asked


@pytest.mark.parametrize("minutes, fails, sizes, chosen", [(30., 1000, [64, 96, 128, 160, 192], 160), (600., 160, [64, 96, 128, 160], 128), (1., 1000, [64], 64)])
def test_no_more_is_measured_than_may_be_chosen(monkeypatch, minutes, fails, sizes, chosen):
    asked = measured(monkeypatch, fails=fails)
    task = SimpleNamespace(most_epochs=60, checks=20)
    from time import perf_counter
    assert find_budget(minutes, LADDER, 128, 60, task, None, perf_counter()).size == chosen and asked == sizes


def test_where_nothing_fits_into_memory_that_is_said(monkeypatch):
    measured(monkeypatch, fails=0)
    with pytest.raises(NoMemory): find_budget(30., LADDER, 128, 60, SimpleNamespace(most_epochs=60, checks=20), None, 0.)


@pytest.mark.parametrize("seconds, said", [(4.4, "4 s"), (95., "95 s"), (1650., "28 min")])
def test_seconds_are_said(seconds, said): assert say_seconds(seconds) == said


def test_the_reserve_counts(): assert count_seconds(1., 4.) == pytest.approx(60*(1 - MARGIN) - RESERVE - 4.)
