"Models held against each other, their cards, and the way back to an earlier one."
import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from test_learn_registry import bench, put, train_toy  # noqa: F401 - bench is a fixture

from cvops_wb.core.errors import BadModel, MetricMissing, WrongUsage
from cvops_wb.core.processes import call
from cvops_wb.core.records import Evaluation
from cvops_wb.core.settings import Card, load_settings
from cvops_wb.learn import comparison, slices
from cvops_wb.learn.comparison import ask_mcnemar, compare_models, list_class_differences, read_tables
from cvops_wb.learn.gates import count_needed, paired_interval
from cvops_wb.learn.modelcards import choose_threshold, list_limits, read_model_card, sum_costs
from cvops_wb.learn.registry import find_version, read_events, read_registry, roll_back
from cvops_wb.loop.cli import main
from cvops_wb.loop.judging import choose_images, find_differences

HOSTILE = "</script><img src=x onerror=alert(1)>| a: [b]"


@pytest.fixture
def photos_at_hand(monkeypatch):
    "Grey photographs for every id."
    for room in (comparison, slices): monkeypatch.setattr(room, "read_photos", lambda settings, snapshot, ids: [Image.new("RGB", (20, 20), "grey")]*len(ids))


def rename(settings, evaluation: Evaluation) -> Evaluation:
    "The same evaluation with a slice, a prediction and a class of a hostile name."
    table = pd.read_parquet(settings.root/evaluation.predictions)
    table["slices"] = [[f"camera={HOSTILE}"] if k % 2 else [f"camera=north {k % 4}"] for k in range(len(table))]
    table["predicted"] = HOSTILE
    table.to_parquet(settings.root/evaluation.predictions)
    row = {"slice": f"camera={HOSTILE}", "count": 300, "groups": 300, "value": .5, "low": .4, "high": .6, "low_all": .35, "high_all": .65, "metrics": {}}
    return replace(evaluation, slices=[row], per_class={HOSTILE: {"f1": .5, "count": 3.}})


def test_two_models_on_a_page(bench, photos_at_hand):  # noqa: F811
    settings, _ = bench
    weak, strong = (rename(settings, train_toy(settings, f"train-{k}", flaw)) for k, flaw in enumerate([.01, .001]))
    out = settings.reports/"compare-1"
    contest = compare_models([strong, weak], out, ["strong", "weak"])
    pair = contest.pairs[0]
    accuracy = [e.metrics["accuracy"] for e in (strong, weak)]
    assert pair["difference"] == pytest.approx(accuracy[0] - accuracy[1]) == pytest.approx(pair["metric"]["difference"])
    assert pair["verdict"] == "strong is better" and pair["p"] < .001 and pair["only_b"] == 0 and pair["low"] > 0 < pair["metric"]["low"]
    assert {s["slice"] for s in pair["slices"]} == {f"camera={HOSTILE}", "camera=north 0", "camera=north 2"}
    page = (out/"comparison.html").read_text()
    assert HOSTILE not in page and "<script" not in page and "&lt;/script&gt;" in page and page.count("data:image/png") == 3
    same = compare_models([strong, strong], out, ["a", "b"])
    assert same.pairs[0]["p"] == 1 and same.pairs[0]["verdict"].startswith("not decided")


def test_other_images_are_not_compared(bench):  # noqa: F811
    settings, _ = bench
    a, b = (train_toy(settings, f"train-{k}", .005) for k in range(2))
    table = pd.read_parquet(settings.root/b.predictions)
    table.iloc[1:].to_parquet(settings.root/b.predictions)
    with pytest.raises(MetricMissing, match="same images"): read_tables([a, b])
    with pytest.raises(WrongUsage): read_tables([a])


@pytest.mark.parametrize("better, worse, want", [(0, 0, 1.), (3, 3, 1.), (8, 1, .0390625), (0, 10, 2*.5**10)])
def test_mcnemar(better, worse, want): assert ask_mcnemar(better, worse) == pytest.approx(want)


def test_classes_side_by_side():
    e = Evaluation("t", "s", "test", 9, {}, {}, {"a": {"f1": .9, "count": 3.}, "b": {"f1": .2, "count": 3.}, "gone": {"f1": 0., "count": 0.}}, "p")
    other = replace(e, per_class={"a": {"f1": .8, "count": 3.}, "b": {"f1": .9, "count": 3.}})
    assert [(row["class"], round(row["A less B"], 3)) for row in list_class_differences([e, other], ["x", "y"])] == [("b", -.7), ("a", .1)]


def test_a_card_beside_each_version(bench):  # noqa: F811
    settings, _ = bench
    version = put(settings, rename(settings, train_toy(settings, "train-1", .004)))
    folder = settings.root/"data"/"registry"/version.name/"cards"/str(version.version)
    text, page, facts = (folder/"card.md").read_text(), (folder/"card.html").read_text(), read_model_card(settings, version)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["name"] == "warehouse" and front["metrics"] == facts["metrics"] == version.metrics and front["reproduce"] == "cvops reproduce warehouse:1"
    assert HOSTILE not in page and "<script" not in page and "<img src=x" not in text and "data:image/png" in page
    assert facts["rules"] == version.rules and facts["snapshot"] == "s" and facts["slices"][0]["weak"] and any("weak on camera" in limit for limit in facts["limits"])
    (folder/"card.html").unlink()
    assert put(settings, train_toy(settings, "train-1", .004)).version == 1 and (folder/"card.html").is_file()     # one that was lost is written again


@pytest.mark.parametrize("change, said", [
    ({"split": "val"}, "which the training watched"), ({"metrics": {"accuracy": .9, "count_unleaked": 150.}}, "50 of 200 test images"),
    ({"per_class": {"a": {"count": 0.}, "b": {"count": 2.}}}, "1 class had no image"), ({"main_metric": "map50"}, "knows 2 classes"),
])
def test_limits_are_said(change, said):
    e = replace(Evaluation("t", "s", "test", 200, {"accuracy": .9, "count_unleaked": 200.}, {}, {}, "p"), **change)
    assert any(said in limit for limit in list_limits(e, ["a", "b"], Card())) and "mine" in list_limits(e, ["a", "b"], Card(limits="mine"))


@pytest.mark.parametrize("error, look", [(5., 1.), (1., 1.), (20., 1.), (3., 0.)])
def test_the_threshold_has_the_least_cost(error, look):
    rng, card = np.random.default_rng(0), Card(cost_error=error, cost_abstain=look)
    confidence = np.round(rng.random(500), 2)       # with ties
    correct = rng.random(500) < confidence
    best = sum_costs(confidence, correct, choose_threshold(confidence, correct, card), card).sum()
    assert best == pytest.approx(min(sum_costs(confidence, correct, t, card).sum() for t in [*np.unique(confidence), 2.]))


def test_rollback(bench, capsys):  # noqa: F811
    settings, _ = bench
    for k, flaw in enumerate([.008, .004, .001]): put(settings, train_toy(settings, f"train-{k}", flaw))
    assert find_version().version == 3
    assert [v.version for v in roll_back()] == [3, 2] and find_version().version == 2
    assert read_events(settings)[-1] | {"id": "", "previous": "", "time": "", "by": ""} == {
        "schema": 1, "event": "alias", "name": "warehouse", "version": 2, "alias": "champion", "id": "", "previous": "", "time": "", "by": "",
        "manifest_sha256": find_version(2).manifest_sha256}
    with pytest.raises(SystemExit) as done: main(["rollback", "1", "--json"])
    assert done.value.code == 0 and json.loads(capsys.readouterr().out)["champion"] == 1 == find_version().version
    events = len(read_events(settings))
    roll_back(1)
    assert len(read_events(settings)) == events     # it is champion already
    (settings.root/find_version(3).model/"model.onnx").write_bytes(b"other")
    with pytest.raises(BadModel): roll_back(3)
    assert find_version().version == 1
    with pytest.raises(SystemExit): main(["models", "--json"])
    told = json.loads(capsys.readouterr().out)["models"]
    assert [(m["version"], m["alias"], bool(m["card"])) for m in told] == [(3, "", True), (2, "", True), (1, "champion", True)]


def test_the_first_champion_has_none_before(bench):  # noqa: F811
    settings, _ = bench
    put(settings, train_toy(settings, "train-1", .004))
    with pytest.raises(WrongUsage, match="no champion before"): roll_back()


def test_data_alone_tell_the_champion(bench, tmp_path):  # noqa: F811
    "What DVC brings to a clone, and nothing else: the same versions, aliases and cards."
    settings, _ = bench
    for k, flaw in enumerate([.008, .001]): put(settings, train_toy(settings, f"train-{k}", flaw))
    roll_back()
    clone = tmp_path/"clone"
    shutil.copytree(settings.versioned, clone/"data")
    shutil.copy(settings.root/"settings.ini", clone)
    there = load_settings(clone)
    assert read_registry(there) == read_registry(settings) and read_model_card(there, find_version())["version"] == 1


@pytest.mark.parametrize("after, apart", [({"accuracy": .5, "latency_ms": 9.}, []), ({"accuracy": .5000001}, ["accuracy"]), ({}, ["accuracy"]), ({"accuracy": .5, "top3": 1.}, ["top3"])])
def test_metrics_are_the_same_or_named(after, apart): assert [*find_differences({"accuracy": .5, "latency_ms": 1.}, after)] == apart


def test_how_many_images_are_needed():
    from cvops_wb.learn.gates import compare
    table = pd.DataFrame({"id": range(80), "group": range(80), "correct": True})
    needed = count_needed(compare(table, table), .01)
    assert paired_interval(0, 0, needed)[0] > -.01 > paired_interval(0, 0, needed*.8)[0]
    part = compare(table.assign(correct=np.linspace(.5, 1, 80)), table.assign(correct=np.linspace(.5, 1, 80)[::-1]))
    assert part.spread and count_needed(part, .01) > 80 and count_needed(replace(part, difference=-.5), .01) == float("inf")


@pytest.mark.skipif(not os.environ.get("CVOPS_FULL"), reason="trains twice: set CVOPS_FULL=1")
@pytest.mark.parametrize("how", [("--epochs", "30", "--size", "32"), ("--minutes", "2")], ids=["epochs", "minutes"])
def test_a_version_is_made_again(tmp_path, photos, monkeypatch, how):
    "The one command of a card, on real runs: the same metrics; and other metrics are found where the card says others."
    from cvops_wb.loop.workbench import init_workbench
    root = tmp_path/"bench"
    init_workbench(root)
    monkeypatch.setenv("CVOPS_ROOT", str(root))
    monkeypatch.chdir(root)
    for key, value in {"GATE_MIN_SAMPLES": "1", "GATE_MIN_ACCURACY": "0", "GATE_MAX_CALIBRATION_ERROR": "1", "GATE_MAX_LEAK_SHARE": "1"}.items():
        monkeypatch.setenv(f"CVOPS_{key}", value)
    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as done: main([*words, "--json"])
        return done.value.code
    for words in (("ingest", str(photos)), ("curate", "-p", "test=.4"), ("snapshot", "-m", "first"), ("train", *how), ("evaluate",), ("register",)):
        assert call(*words) == 0, words
    if "--minutes" in how: shutil.rmtree(root/".cvops"/"cache"/"checkpoints")    # another machine: nothing is known of the budget but what the card says
    assert call("reproduce", "1") == 0
    path = root/"data"/"registry"/find_version(1).name/"cards"/"1"/"card.json"
    facts = json.loads(path.read_text())
    path.chmod(0o644)
    path.unlink()
    path.write_text(json.dumps(facts | {"metrics": facts["metrics"] | {"accuracy": .123}}))
    assert call("reproduce", "1") == 3


def test_no_photograph_is_versioned(bench, photos_at_hand):  # noqa: F811
    settings, _ = bench
    version = put(settings, rename(settings, train_toy(settings, "train-1", .004)))
    out = settings.reports/"register-train-1.part"/"card"
    assert {p.name for p in ((settings.root/version.model).parent/"cards"/str(version.version)).iterdir()} == {"card.md", "card.html", "card.json", "slices.png"}
    assert (out/"card.html").is_file() and (out/"slices.png").is_file()


@pytest.mark.slow
def test_mlflow_reads_signature_and_example(bench):  # noqa: F811
    settings, _ = bench
    version = put(settings, train_toy(settings, "train-1", .004))
    text = ("import json; from mlflow.models import Model; m = Model.load({!r}); e = m.load_input_example({!r});"
            "print(json.dumps([m.signature.inputs.to_dict(), m.signature.outputs.to_dict(), [1, 8, 8, 3]]))")
    folder = str((settings.root/version.model).parent/"mlflow"/str(version.version))
    told = json.loads(call([sys.executable, "-W", "ignore", "-c", text.format(folder, folder)], "look into MLflow").splitlines()[-1])
    assert told[0][0]["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 8, 8, 3]} and [o["name"] for o in told[1]] == ["logits", "embedding"]


def test_models_for_different_tasks_are_not_compared():
    found = [SimpleNamespace(run=f"train-{task}", record=SimpleNamespace(task=task, snapshot="s")) for task in ("classification", "detection")]
    assert choose_images(found[:1]*2, "") == ("s", "auto")
    with pytest.raises(WrongUsage, match="different tasks"): choose_images(found, "")
