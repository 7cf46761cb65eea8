"What is said about accuracy without labels holds as often as stated, also after a shift; spot checks are unbiased; damage asks once."
import json

import numpy as np
import pandas as pd
import pytest
from watch_bench import make_bento, paint

from cvops_wb.core.errors import BadInput
from cvops_wb.watch.accuracy import (
    Estimator,
    SpotcheckSpec,
    judge_check,
    judge_damage,
    read_checks,
    read_triggers,
    spotcheck,
)
from cvops_wb.watch.accuracy.asking import list_classes
from cvops_wb.watch.accuracy.spotchecks import draw, find_chances, find_checks, join_check
from cvops_wb.watch.drift import make_window
from cvops_wb.watch.verdicts import DriftState, Estimate

MIDDLES = np.random.default_rng(99).normal(size=(8, 16))
NAMES = np.array([f"c{k}" for k in range(8)])


def imagine(count, rng, scale=.8, prior=None, noise=0., dark=0., hard=0., part=1.):
    "Images of eight kinds, an overconfident classifier's answers, and what a shift does to both."
    truth = rng.choice(8, count, p=prior)
    hit = rng.random(count) < part
    points = scale*MIDDLES[truth] + rng.normal(size=(count, 16))*(1 + hard)
    points = (points + hit[:, None]*rng.normal(size=(count, 16))*noise)*np.where(hit, 1 - dark, 1.)[:, None]
    logits = (points@(scale*MIDDLES).T - ((scale*MIDDLES)**2).sum(1)/2)*1.7
    scores = np.exp(logits - logits.max(1, keepdims=True))
    scores /= scores.sum(1, keepdims=True)
    return pd.DataFrame({"id": [f"{k:016x}" for k in range(count)], "label": NAMES[truth], "predicted": NAMES[scores.argmax(1)], "confidence": scores.max(1),
                         "embedding": list(points.astype(np.float32)), "brightness": rng.normal(.5, .08, count)*np.where(hit, 1 - dark, 1.),
                         "camera": np.array(list("abc"))[rng.integers(0, 3, count)], "time": "2026-01-01T00:00:00.000Z"})


def shift(rng):
    kind = rng.integers(0, 5)
    return [{"prior": rng.dirichlet(np.ones(8)*.4)}, {"noise": rng.uniform(0, 1.5)}, {"dark": rng.uniform(0, .6)}, {"hard": rng.uniform(-.4, .6)},
            {"noise": rng.uniform(0, 2), "part": rng.uniform(0, .5), "prior": rng.dirichlet(np.ones(8))}][kind]


def cover(blind=False, shifts=100):
    "In how many of the shifts the true accuracy lies in the interval; `blind`: one that counts chance alone."
    held = 0
    for k in range(shifts):
        rng = np.random.default_rng([11, k])
        scale = .6 + .1*(k % 5)
        reference, window = imagine(int(rng.choice([200, 400, 800])), rng, scale), imagine(500, rng, scale, **shift(rng))
        estimator = Estimator.learn(reference)
        if blind: estimator.measure_doubt = lambda logits, places: 0.
        told = estimator.estimate(window)
        held += told.low <= (window["label"] == window["predicted"]).mean() <= told.high
    return held


def test_the_interval_holds_at_its_rate_over_a_hundred_shifts(): assert cover() >= 95


def test_an_interval_that_counts_chance_alone_would_not(): assert cover(blind=True, shifts=60) < 48


def test_it_says_where_it_cannot_know():
    rng = np.random.default_rng(0)
    estimator = Estimator.learn(imagine(400, rng))
    new = imagine(500, rng)
    new["embedding"] = [e + (4. if k % 5 == 0 else 0.)*np.float32(1) for k, e in enumerate(new["embedding"])]
    healthy, told = estimator.estimate(imagine(500, rng)), estimator.estimate(new)
    assert healthy.known and not told.known and "spotcheck" in told.why and told.low < healthy.low
    assert not Estimator.learn(imagine(100, rng)).estimate(imagine(50, rng).assign(confidence=np.nan)).known


def say_far(streams, known=300, count=300, new=0., band=True):
    "The share of windows of which it is said that images are far from every class; `new`: the part of them that is of a kind of its own."
    from cvops_wb.watch.accuracy import openness
    said = 0
    for seed in range(streams):
        rng = np.random.default_rng([7, seed])
        seen = openness.Openness.learn(np.stack(imagine(known, rng, 2.)["embedding"]))
        window = np.stack(imagine(count, rng, 2.)["embedding"])
        window[:int(new*count)] = rng.normal(size=(int(new*count), 16))*.5 - 2*MIDDLES.mean(0)*8
        said += seen.judge(window, .01 if band else 1.)[0] > 0
    return said/streams


def test_images_are_called_far_as_seldom_as_promised(): assert say_far(80) <= .03


def test_without_the_band_healthy_windows_would_be_called_far(): assert say_far(40, band=False) > .5


def test_a_kind_of_its_own_is_called_far(): assert say_far(20, new=.3) >= .9


def test_the_same_image_twice_is_one():
    from cvops_wb.watch.accuracy.openness import Openness
    rng = np.random.default_rng(5)
    points = np.stack(imagine(200, rng, 2.)["embedding"])
    assert Openness.learn(np.concatenate([points]*4)).judge(np.stack(imagine(300, rng, 2.)["embedding"]))[0] == 0


def test_a_reference_without_labels_is_said():
    with pytest.raises(BadInput): Estimator.learn(imagine(300, np.random.default_rng(0)).assign(label=""))


@pytest.mark.parametrize("noise", [0., .8, 1.6])
def test_spot_checks_are_unbiased_and_their_interval_holds(noise):
    rng = np.random.default_rng(3)
    estimator, rows = Estimator.learn(imagine(400, rng)), imagine(2000, rng, noise=noise)
    right = (rows["label"] == rows["predicted"]).to_numpy(float)
    expected = estimator.weigh(rows)
    chances = find_chances(np.sqrt(expected*(1 - expected)), 50)
    told = []
    for seed in range(600):
        places = draw(chances, seed)
        assert len(set(places)) == 50
        told.append(judge_check(right[places], chances[places], 2000))
    values, low, high = np.array(told).T
    assert abs(values.mean() - right.mean()) < 4*values.std()/np.sqrt(600) + .002
    assert ((low <= right.mean()) & (right.mean() <= high)).mean() >= .94
    places = [draw(chances, seed) for seed in range(600)]
    assert noise == 0 or abs(np.mean([right[p].mean() for p in places]) - right.mean()) > .02     # without weights it would be biased


def test_a_check_with_people(workbench, photos):
    from cvops_wb.data import IngestSpec, ingest, read_samples
    out = workbench.reports/"ingest-0000000000"
    out.mkdir(parents=True)
    samples = read_samples(ingest(str(photos), IngestSpec(), out).samples)
    rng = np.random.default_rng(0)
    wrong = rng.random(len(samples)) < .2
    rows = pd.DataFrame({"id": samples["id"], "label": "", "predicted": np.where(wrong, "nothing", samples["label"]), "confidence": np.where(wrong, .6, .9),
                         "time": "2026-03-02T08:00:00.000Z", "camera": "a"})
    bento = make_bento(workbench)
    folder, result, answered = spotcheck(rows, make_window(200, seed=1), bento, SpotcheckSpec(24))
    assert result is None and answered == 0 and len(list((folder/"images").iterdir())) == 24 and "predicted" not in (folder/"sheet.csv").read_text()
    from cvops_wb.label import label_tools
    tool, truth = label_tools["files"](folder), dict(zip(samples["id"], samples["label"], strict=True))
    asked = [row["id"] for row in tool.list_rows()]
    for sample in asked[:10]: tool.answer(sample, truth[sample], "anna")
    assert spotcheck(rows, make_window(200, seed=1), bento)[1:] == (None, 10)
    for sample in asked[10:]:
        place = next((folder/"images").glob(f"{sample}.*"))
        (folder/"sorted"/truth[sample]).mkdir(exist_ok=True)
        place.rename(folder/"sorted"/truth[sample]/place.name)
    again, result, answered = spotcheck(rows, make_window(200, seed=1), bento)
    assert again == folder and answered == 24 and result.low <= (~wrong).mean() <= result.high and read_checks(1) == (result,)
    assert spotcheck(rows, make_window(200, seed=1), bento, SpotcheckSpec(5))[0] != folder and len(find_checks(1)) == 2


@pytest.fixture
def asked(workbench, monkeypatch):
    "A check of 24 answers, all `Sour-Milk`, whose images are in the store; what asks again, the folder and the ids."
    from cvops_wb.watch.accuracy import asking
    rows = make_window(60, seed=2).assign(predicted="Sour-Milk", label="")
    monkeypatch.setattr(asking, "find_images", lambda table, settings: dict.fromkeys(table["id"], paint("tea", 1)))
    reference, bento = make_window(200, seed=1).replace({"label": {"jam": "Sour-Milk"}}), make_bento(workbench)
    def ask(**how): return spotcheck(rows, reference, bento, SpotcheckSpec(24), **how)
    folder = ask()[0]
    return ask, folder, [row["id"] for row in json.loads((folder/"check.json").read_text())["rows"]]


@pytest.mark.parametrize("written, right", [("Sour-Milk", 1.), ("sour milk", 1.), ("SOUR_MILK ", 1.), ("soured milk", 0.), ("-", 0.)])
def test_a_person_may_write_a_class_as_people_do(asked, written, right):
    from cvops_wb.label import label_tools
    ask, folder, ids = asked
    for sample in ids: label_tools["files"](folder).answer(sample, written)
    assert ask()[1].value == right


def test_a_class_that_was_not_among_the_held_out_images_is_one_all_the_same(workbench):
    rows = make_window(60, seed=2).assign(predicted="Soy-Milk", label="soy milk")
    assert "Soy-Milk" in list_classes(make_window(200, seed=1), rows.to_dict("records"))
    assert spotcheck(rows, make_window(200, seed=1), make_bento(workbench), SpotcheckSpec(24, "simulated"))[1].value == 1.


def test_nobody_can_be_simulated_where_no_truth_is_known(workbench):
    with pytest.raises(BadInput, match="nobody can be simulated"):
        spotcheck(make_window(60, seed=2).assign(label=""), make_window(200, seed=1), make_bento(workbench), SpotcheckSpec(24, "simulated"))


def test_a_rollout_that_nobody_has_asked_yet_is_said():
    from cvops_wb.watch.accuracy.asking import draw_pairs
    with pytest.raises(BadInput, match="no answer"): draw_pairs(pd.DataFrame(columns=["id", "request_id", "arm"]), 20)


def test_a_check_that_nobody_answers_can_be_closed(asked):
    from cvops_wb.label import label_tools
    ask, folder, ids = asked
    label_tools["files"](folder).answer(ids[0], "Sour-Milk")
    assert ask()[0] == folder and ask(last=True)[1:] == (None, 1) and read_checks(1) == ()
    assert ask()[0] != folder


def test_a_simulated_check_answers_at_once(workbench):
    rows = make_window(500, seed=2)
    _, result, answered = spotcheck(rows, make_window(300, seed=1), make_bento(workbench), SpotcheckSpec(50, "simulated"))
    assert answered == 50 and result.low <= (rows["label"] == rows["predicted"]).mean() <= result.high and not list(workbench.store.glob("**/sheet.csv"))


def test_images_that_nobody_kept_cannot_be_checked(workbench):
    with pytest.raises(BadInput, match="none of these images was kept"): spotcheck(make_window(60), make_window(200, seed=1), make_bento(workbench))


def test_between_checks_the_estimate_is_carried_on():
    check = Estimate(.84, .74, .92, method="spot check", count=50)
    still, fallen = (join_check(Estimate(value, value - .2, value + .18), check, .9) for value in (.9, .8))
    assert still.value == .84 and abs(fallen.value - .74) < 1e-9 and fallen.high - fallen.low > still.high - still.low and still.method == "both"


@pytest.mark.parametrize("state, asked", [
    ({"drifted": True, "score": 50., "accuracy": Estimate(.93, .9, .96)}, False), ({"accuracy": Estimate(.7, .6, .8, known=False, why="new")}, False),
    ({"accuracy": Estimate(.8, .7, .9)}, False), ({"accuracy": Estimate(.7, .6, .8)}, True),
    ({"accuracy": Estimate(.9, .8, .95), "checks": (Estimate(.6, .5, .7, method="spot check"),)}, True), ({}, False),
], ids=["difference", "unknown", "unsure", "damage", "a check", "nothing"])
def test_damage_and_not_difference_asks_for_training(workbench, state, asked):
    found = judge_damage(DriftState(1, time="2026-03-02T08:00:00Z", **state), .93)
    assert (found is not None) is asked and len(read_triggers(1)) == asked
    again = judge_damage(DriftState(1, time="2026-03-02T20:00:00Z", **state), .93)
    later = judge_damage(DriftState(1, time="2026-03-04T20:00:00Z", **state), .93)
    assert again is None and (later is not None) is asked
