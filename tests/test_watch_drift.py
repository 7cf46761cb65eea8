"Drift is found where it was planted, and called as seldom as promised where there is none."
import numpy as np
import pandas as pd
import pytest

from cvops_wb.core.errors import BadInput, WrongUsage
from cvops_wb.watch.causes import describe_columns, find_camera, say_verdict
from cvops_wb.watch.drift import make_window, score_columns

REFERENCE = make_window(400, seed=1)


def plant(name):
    "A window in which one thing is wrong."
    window = make_window(500, seed=2)
    if name == "dark": return window.assign(brightness=window["brightness"]*.7)
    if name == "blur": return window.assign(sharpness=window["sharpness"]*.6)
    if name == "spread": return window.assign(brightness=window["brightness"].mean() + 2*(window["brightness"] - window["brightness"].mean()))
    if name == "mix": return window.assign(predicted=np.where(np.arange(500) % 3 == 0, "tea", window["predicted"]))
    if name == "new class": return window.assign(predicted=window["predicted"].replace("jam", "honey"))
    if name == "unsure": return window.assign(confidence=window["confidence"]*.85)
    if name == "appearance": return window.assign(embedding=[e + np.float32(.7) for e in window["embedding"]])
    if name == "size": return window.assign(width=320)
    if name == "missing": return window.assign(brightness=window["brightness"].where(np.arange(500) % 4 > 0))
    if name == "no camera": return window.assign(camera=window["camera"].where(np.arange(500) % 3 > 0, ""))
    if name == "dark and missing": return plant("dark").assign(brightness=plant("dark")["brightness"].where(np.arange(500) % 4 > 0))
    raise KeyError(name)


@pytest.mark.parametrize("trouble, column, words", [
    ("dark", "brightness", "brightness lower by (29|30|31) %"), ("blur", "sharpness", "sharpness lower by"), ("spread", "brightness", "spread"),
    ("mix", "predicted", "answers: more 'tea'"), ("new class", "predicted", "'jam'|'honey'"), ("unsure", "confidence", "confidence lower by 1[4567] %"),
    ("appearance", "embedding", "look different"), ("size", "width", "width lower by 50 %"), ("missing", "missing", "brightness missing in 25 % of the images, was 0 %"),
    ("no camera", "missing", "camera missing in 33 % of the images, was 0 %"), ("dark and missing", "brightness", "lower by (29|30|31) %"),
])
def test_a_planted_trouble_is_found_and_told(trouble, column, words):
    import re
    window = plant(trouble)
    columns = describe_columns(score_columns(REFERENCE, window), REFERENCE, window)
    drifted = {name for name, c in columns.items() if c["drifted"]}
    assert drifted == {column, "missing"} if "and" in trouble else {column}
    assert re.search(words, columns[column]["note"]) and columns[column]["score"] > columns[column]["threshold"]


def test_false_alarms_are_as_rare_as_promised():
    # 300 windows, each with a reference of its own; at 5 % one expects 15 and, once in a thousand tries, more than 28.
    alarms = 0
    for k in range(300):
        columns = score_columns(make_window(160, seed=10_000 + 2*k), make_window(120, seed=10_001 + 2*k), alpha=.05, shuffles=240, seed=k)
        alarms += any(c["drifted"] for c in columns.values())
    assert 2 <= alarms <= 28, f"{alarms} of 300 at 5 %"


def test_what_is_missing_is_no_value_of_the_column():
    # half of a column is missing in the windows and nothing in their references: its values are judged at the same rate, and only `missing` says so
    said = []
    for k in range(150):
        reference, window = make_window(160, seed=30_000 + 2*k), make_window(120, seed=30_001 + 2*k)
        keep = ["brightness", "confidence"]
        columns = score_columns(reference[keep], window[keep].assign(brightness=window["brightness"].where(np.random.default_rng(k).random(120) < .5)), alpha=.05, shuffles=240, seed=k)
        said.append({name for name, column in columns.items() if column["drifted"]})
    assert all("missing" in names for names in said) and sum(bool(names - {"missing"}) for names in said) <= 16     # 7 or 8 are expected; more than 16 once in a thousand tries


def test_the_same_seed_says_the_same():
    window = make_window(200, seed=5, darker=.1)
    assert score_columns(REFERENCE, window, seed=3) == score_columns(REFERENCE, window, seed=3)


def test_the_default_limit_holds_on_the_reference_itself():
    columns = score_columns(REFERENCE, REFERENCE)
    assert not any(c["drifted"] for c in columns.values()) and max(c["score"] for c in columns.values()) < 1e-3


@pytest.mark.parametrize("change, known", [
    (lambda w: w.drop(columns="embedding"), 11), (lambda w: w.drop(columns=["brightness", "predicted"]), 10),
    (lambda w: w.assign(embedding=[None]*len(w)), 11), (lambda w: w.assign(confidence=np.nan), 11), (lambda w: w, 12),
])
def test_what_both_sides_have_is_judged(change, known):
    window = change(make_window(60, seed=4))
    columns = score_columns(REFERENCE, window, shuffles=300)
    assert sum(column["kind"] != "schema" for column in columns.values()) == known
    assert [name for name, column in columns.items() if column["kind"] == "schema" and column["drifted"]] == ["missing"]*bool(window.isna().any().any())     # a column that is empty is told as missing


@pytest.mark.parametrize("reference, window, options, error", [
    (REFERENCE, pd.DataFrame({"time": ["2026"]}), {}, BadInput), (REFERENCE.iloc[:0], REFERENCE, {}, BadInput),
    (REFERENCE, make_window(60).assign(embedding=[np.zeros(3, np.float32)]*60), {}, BadInput), (REFERENCE, make_window(60), {"shuffles": 30}, WrongUsage),
])
def test_what_cannot_be_judged_is_said(reference, window, options, error):
    with pytest.raises(error) as caught: score_columns(reference, window, **options)
    assert caught.value.fix


@pytest.mark.parametrize("camera, dark, want", [("camera-2", .4, "camera-2"), ("", .4, ""), ("camera-1", .3, "camera-1")])
def test_the_camera_is_named_where_it_is_one(camera, dark, want):
    window = make_window(600, seed=6, darker=dark, dark_camera=camera)
    assert find_camera(REFERENCE["brightness"], window["brightness"], window["camera"]) == want


def test_the_verdict_says_the_camera_once():
    window = make_window(600, seed=6, darker=.4, dark_camera="camera-3")
    said = say_verdict(True, describe_columns(score_columns(REFERENCE, window), REFERENCE, window))
    assert said.startswith("Drift: ") and "brightness lower by" in said and said.count("mostly camera-3") == 1
    assert say_verdict(False, score_columns(REFERENCE, make_window(100, seed=7))).startswith("No drift")
