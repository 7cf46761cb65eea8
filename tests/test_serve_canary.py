"A real service under load while versions change: nobody's request fails, a good version is promoted, one that fails is gone by itself."
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from serve_toy import COLOURS, make_graph, photograph, write_model

from cvops_wb.serve import Arm, Client, Controller, RolloutFile, RolloutSpec, read_predictions, service_running


def make_breaking_graph():
    "The toy, but it fails on blue photographs: an index beyond the end."
    graph = make_graph()
    graph.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "two"))
    nodes = [helper.make_node("ArgMax", ["logits_raw"], ["kind"], axis=1, keepdims=1), helper.make_node("Gather", ["two", "kind"], ["one"]),
             helper.make_node("Mul", ["logits_raw", "one"], ["logits"])]
    for node in graph.graph.node:
        if node.output[0] == "logits": node.output[0] = "logits_raw"
    graph.graph.node.extend(nodes)
    assert graph.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    return graph


class Load:
    "Clients that ask without pause, until they are stopped."

    def __init__(self, url):
        self.url, self.stopping, self.versions, self.failed, self.count = url, threading.Event(), {}, [], itertools.count()
        self.photos = [photograph(colour, seed=k) for k, colour in enumerate(list(COLOURS)*3)]

    def ask(self, number):
        with Client(self.url) as client:
            while not self.stopping.is_set():
                k = next(self.count)
                try: said = client.predict(self.photos[k % len(self.photos)], caller=f"caller {k % 397}")
                except Exception as e:      # noqa: BLE001 - any failure counts
                    self.failed.append(repr(e))
                else: self.versions.setdefault(said["version"], []).append((f"caller {k % 397}", said["label"]))
                time.sleep(.01)

    def __enter__(self):
        self.pool = ThreadPoolExecutor(4)
        for number in range(4): self.pool.submit(self.ask, number)
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.pool.shutdown()


@pytest.fixture(scope="module")
def arms(bench, bento):
    "The packaged version, its twin, and one that fails on blue."
    def make(number, graph=None, **card):
        folder = f"data/registry/toy/{number}"
        return Arm(number, folder, write_model(bench.root/folder, graph, **card))
    return [Arm(1, "data/registry/toy/1", bento.manifest_sha256), make(2, temperature=1.01), make(3, make_breaking_graph())]


def watch(controller, seconds=90):
    deadline, state = time.monotonic() + seconds, controller.tick()
    while state.phase != "idle" and time.monotonic() < deadline:
        time.sleep(.1)
        state = controller.tick()
    return state


def test_a_good_version_is_promoted_and_a_bad_one_is_gone_with_no_failed_request(bench, bento, arms):
    log, heard = bench.root/"log-canary", []
    spec = RolloutSpec(step_seconds=.3, step_pairs=25, hold=0., error_margin=.1, latency_margin=2.)
    file = RolloutFile(bench.store/"rollout")
    with service_running(bento, log, workers=2, output=bench.root/"canary.log") as service, Load(service.url) as load:
        controller = Controller(bench.store/"rollout", log, spec, lambda state: heard.append(state.event))
        file.start(arms[0], arms[1], "good", (.25, .5))
        good = watch(controller)
        time.sleep(1)
        after = len(load.versions.get(2, []))
        time.sleep(1)
        assert len(load.versions[2]) > after, "the promoted version answers"
        file.start(arms[1], arms[2], "bad", (.25, .5))
        bad = watch(controller)
        time.sleep(1)
        told = len(load.versions.get(3, []))
        time.sleep(1)
        assert len(load.versions.get(3, [])) == told, "the bad version answers nobody any more"
    assert load.failed == [] and heard[:4] == ["start", "step", "promote", "end"]
    assert good.champion == arms[1] and bad.champion == arms[1] and bad.event == "abort" and "fails in" in bad.reason
    rows = read_predictions(log)
    answered = rows[(rows["failed"] == 0) & (rows["arm"] != "bad:challenger")]
    assert (rows["failed"] == 1).sum() > 0 and (answered["predicted"] != "").all()
    challenger = rows[rows["arm"] == "good:challenger"]["caller"].unique()
    baseline = rows[rows["arm"] == "good:baseline"]["caller"].unique()
    assert len(challenger) and len(baseline) and not set(challenger) & set(rows[(rows["arm"] == "good:baseline") & rows["caller"].isin(challenger)]["caller"]) - set(baseline)
    harmed = (rows["failed"] == 1).sum()/len(rows)
    assert harmed < .1, "each of them was answered by the champion"


def test_in_the_shadow_nobody_hears_the_challenger(bench, bento, arms):
    log, file = bench.root/"log-shadow", RolloutFile(bench.store/"rollout")
    before = file.read()
    with service_running(bento, log) as service, Load(service.url) as load:
        file.start(arms[1], arms[2], "quiet", (.25,), shadow=True)
        controller = Controller(bench.store/"rollout", log, RolloutSpec(step_seconds=0., step_pairs=10_000))
        state = watch(controller)
    assert load.failed == [] and set(load.versions) == {2}, "a service that starts anew knows who was promoted"
    assert state.event == "abort" and "fails in" in state.reason and state.number == before.number + 2
    rows = read_predictions(log)
    assert {"quiet:baseline", "quiet:challenger"} <= set(rows["arm"])
