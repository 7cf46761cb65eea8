"""Rollouts while everything goes wrong: controllers killed under a prober, runs that prove nothing, planted faults.

A sample by default; the campaign with CVOPS_FULL=1. What it measured is printed with `-s` and stands in bench/results/rollout.md."""
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass, field, replace

import httpx
import numpy as np
import pytest
from serve_toy import COLOURS, bench, bento, photograph  # noqa: F401 - fixtures
from test_serve_canary import arms  # noqa: F401

from cvops_wb.serve import service_running
from cvops_wb.serve.predictions import PredictionLog
from cvops_wb.serve.rollouts import controller as controllers
from cvops_wb.serve.rollouts import evidence as evidences
from cvops_wb.serve.rollouts import states
from cvops_wb.serve.rollouts.controller import Controller, LogReader
from cvops_wb.serve.rollouts.evidence import Decision, Evidence, RolloutSpec
from cvops_wb.serve.rollouts.states import (
    BASELINE,
    CHALLENGER,
    IDLE,
    RUNNING,
    Arm,
    RolloutFile,
)
from cvops_wb.serve.rollouts.traffic import Loaded, Quota, Traffic

FULL = bool(os.environ.get("CVOPS_FULL"))
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["cvops_wb.serve.rollouts.controller"])
TWINS = [Arm(k, f"registry/{k}", f"{k:02}"*4) for k in (1, 2)]


CONTROL = """
from cvops_wb.serve.rollouts import states
from cvops_wb.serve.rollouts.controller import Controller
from cvops_wb.serve.rollouts.evidence import RolloutSpec
states.LEASE = {lease}
Controller({folder!r}, {log!r}, {spec}, feedback={feedback!r}).watch({every}, lambda state: False)
"""


def start_controller(folder, log, spec, lease=1., feedback="", every=.05):
    "A controller of its own process, there within milliseconds: it follows every rollout until it is killed."
    code = CONTROL.format(folder=str(folder), log=str(log), spec=repr(spec), lease=lease, feedback=str(feedback), every=every)
    child = FORK.Process(target=exec, args=(code, {"__name__": "controller"}), daemon=True)
    child.start()
    return child


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.join()


# ---- kills

class Prober:
    "One request each 20 ms, whatever came of the last; failures, and who answered when."

    def __init__(self, url, each=.02):
        self.url, self.each, self.stopping, self.failed, self.answers, self.count = url, each, threading.Event(), [], [], itertools.count()
        self.photos, self.threads = [photograph(colour, seed=k) for k, colour in enumerate(COLOURS)], [threading.Thread(target=self.ask, args=(k,)) for k in range(4)]

    def ask(self, place):
        begin = time.monotonic() + place*self.each
        with httpx.Client(base_url=self.url, timeout=10., trust_env=False) as client:     # ours would ask again
            for k in itertools.count():
                if self.stopping.wait(max(0., begin + 4*k*self.each - time.monotonic())): return
                number = next(self.count)
                try: said = client.post("/predict", content=self.photos[number % 3], headers={"content-type": "image/jpeg", "x-caller": f"caller {number % 211}"}).raise_for_status().json()
                except (httpx.HTTPError, ValueError) as e: self.failed.append(repr(e))
                else: self.answers.append((time.monotonic(), said["version"]))

    def __enter__(self):
        for thread in self.threads: thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads: thread.join()


def judge_file(file):
    "The state and its history are whole, and only what was shown to be no worse was promoted."
    state, events = file.read(), file.history()
    assert [event["number"] for event in events] == list(range(1, state.number + 1))
    assert (state.phase == RUNNING) == (state.challenger is not None) and state.share <= .5
    assert all("shown to be no worse" in event["reason"] for event in events if event["event"] == "promote")
    return state, events


def wait_for_work(file, before, seconds=20.):
    "Until a controller has written something, or the time is over."
    end = time.monotonic() + seconds
    while (file.read().lease, file.read().number) == (before.lease, before.number) and time.monotonic() < end: time.sleep(.01)


def kill_controllers(root, log, url, arms, kills, rng, lease=1.):  # noqa: F811
    "Kill controllers at any moment of one rollout after the other; each tenth time wait until the lease is over and look who answers."
    file, spec, told = RolloutFile(root/"rollout"), RolloutSpec(step_seconds=.1, step_pairs=12, hold=.5, error_margin=.2, wrong_margin=.2, latency_margin=3.), {"rollouts": 0, "fallbacks": 0, "at work": 0}
    with Prober(url) as prober:
        for k in range(kills):
            state, _ = judge_file(file)
            if state.phase == IDLE:
                champion = state.champion or arms[0]
                file.start(champion, arms[0] if champion == arms[1] else arms[1], f"r{k}", (.25, .5))
                told["rollouts"] += 1
            before, child = file.read(), start_controller(root/"rollout", log, spec, lease)
            if k % 2: wait_for_work(file, before)       # every other one is not killed before it has begun, however busy the machine is
            time.sleep(.02 + rng.random()*.5)
            kill(child)
            state, _ = judge_file(file)
            told["at work"] += (state.lease, state.number) != (before.lease, before.number)
            if k % 10 == 9 and state.phase == RUNNING:
                time.sleep(lease + .3)
                since, told["fallbacks"] = time.monotonic(), told["fallbacks"] + 1
                time.sleep(.4)
                assert {version for when, version in prober.answers if when > since + .1} == {state.champion.version}, "a dead controller left a version its traffic"
        told.update(requests=len(prober.answers), failed=len(prober.failed), seconds=round(prober.answers[-1][0] - prober.answers[0][0]))
    assert prober.failed == [] and len(prober.answers) > 3*kills
    return {**told, "kills": kills, "promotions": sum(event["event"] == "promote" for event in file.history())}


@pytest.mark.slow
def test_killed_controllers_cost_no_request(bench, bento, arms, monkeypatch):  # noqa: F811
    monkeypatch.setattr(states, "LEASE", 1.)
    log = bench.root/"log-kills"
    with service_running(bento, log, output=bench.root/"kills.log") as service:
        told = kill_controllers(bench.store, log, service.url, arms, 500 if FULL else 12, np.random.default_rng(8))
        monkeypatch.setattr(states, "LEASE", 60.)
        with pytest.raises(AssertionError, match="left a version its traffic"):     # planted: a lease that does not end
            plant_lease(bench.store, log, service.url, arms)
    print("kills:", json.dumps(told))
    assert told["failed"] == 0 and told["at work"] > told["kills"]/4 and (told["promotions"] > 0 or not FULL)


def plant_lease(root, log, url, arms):  # noqa: F811
    "A controller whose lease is a minute: the same look as above must notice."
    file = RolloutFile(root/"rollout")
    file.abort("planted")
    file.start(file.read().champion or arms[0], next(arm for arm in arms if arm != file.read().champion), "planted", (.5,))
    child = start_controller(root/"rollout", log, RolloutSpec(step_seconds=99., step_pairs=10**6), 60.)
    time.sleep(.5)
    kill(child)
    with Prober(url) as prober:
        time.sleep(2.)
    assert {version for _, version in prober.answers} == {file.read().champion.version}, "a dead controller left a version its traffic"


# ---- runs that prove nothing

@dataclass
class Clock:
    "Seconds since any moment, as the controller asks for them."
    seconds: float = 0.
    def since(self, moment): return self.seconds


def write_answers(log, name, count, rng, who=(BASELINE, CHALLENGER), failing=(.01, .01), slower=1., place=itertools.count()):   # noqa: B008 - counts on
    "Answers of a rollout, one of each arm in turn, as the service writes them."
    for _ in range(count):
        for arm in who:
            ours = arm == CHALLENGER
            log.append({"request_id": f"q{next(place)}", "arm": f"{name}:{arm}", "failed": int(rng.random() < failing[ours]), "latency_ms": rng.lognormal(2, .3)*(slower if ours else 1), "predicted": "tea", "confidence": .8})


UNPROVEN = {    # what the log shows until the deadline: nothing of it is a proof
    "too few answers": lambda log, rng: write_answers(log, "r", int(rng.integers(0, 25)), rng),
    "the challenger is never asked": lambda log, rng: write_answers(log, "r", 400, rng, (BASELINE,)),
    "nobody holds it against the champion": lambda log, rng: write_answers(log, "r", 400, rng, (CHALLENGER,)),
    "more errors than are tolerated": lambda log, rng: write_answers(log, "r", 60, rng, failing=(.1, .13)),
    "slower than is tolerated": lambda log, rng: write_answers(log, "r", 40, rng, slower=1.3),
    "the truth was asked for and nobody told it": lambda log, rng: write_answers(log, "r", 400, rng),
    "answers of another rollout": lambda log, rng: write_answers(log, "before", 400, rng),
    "lines that are no rows": lambda log, rng: [os.write(log.segment.file, b'{"arm": "r:challenger", "latency_ms": 5}\n{"torn') for _ in range(400)],
}


def run_unproven(folder, name, seed, monkeypatch):
    "The last event of a rollout that saw only what proves nothing, with a controller that is replaced now and then."
    clock, rng = Clock(), np.random.default_rng(seed)
    monkeypatch.setattr(controllers, "_since", clock.since)
    spec = RolloutSpec(step_pairs=10, feedback=name.startswith("the truth"))
    file, log = RolloutFile(folder/"rollout"), PredictionLog(folder/"log")
    file.start(*TWINS, "r", (.05, .5))
    controller = Controller(folder/"rollout", folder/"log", spec, feedback=folder/"feedback")
    for k in range(12):
        if k == 4: UNPROVEN[name](log, rng)
        if rng.random() < .3: controller = Controller(folder/"rollout", folder/"log", spec, feedback=folder/"feedback")
        clock.seconds = spec.deadline*k/10
        controller.tick()
    log.close()
    return file.read(), file.history()


def test_what_proves_nothing_is_not_promoted(tmp_path, monkeypatch):
    count, said = 200 if FULL else 16, {}
    for k in range(count):
        name = list(UNPROVEN)[k % len(UNPROVEN)]
        state, events = run_unproven(tmp_path/str(k), name, k, monkeypatch)
        assert state.phase == IDLE and state.champion == TWINS[0] and "promote" not in [event["event"] for event in events], name
        end = events[-1]["reason"].partition(":")[0].partition(" in ")[0].partition(" (")[0]
        said[end] = said.get(end, 0) + 1
    print("inconclusive:", json.dumps({"runs": count, "promotions": 0, "ends": said}))


def test_a_promotion_without_proof_is_noticed(tmp_path, monkeypatch):
    "Planted: at the deadline it is promoted."
    real = evidences.decide

    def hopeful(*given):
        decision = real(*given)
        return Decision("promote", "surely fine") if "inconclusive" in decision.reason else decision
    monkeypatch.setattr(controllers, "decide", hopeful)
    state, events = run_unproven(tmp_path, "too few answers", 0, monkeypatch)
    assert "promote" in [event["event"] for event in events]


# ---- planted faults

@dataclass
class Fault:
    "What a bad challenger does to one answer: failed, milliseconds, confidence, answer; and whether its caller is the worse for it."
    name: str
    failing: float = 0.
    slower: float = 1.
    tail: float = 0.        # share of answers that take five times as long
    wrong: float = 0.       # share of wrong answers beyond the champion's, told by feedback
    doubts: bool = False
    repeats: float = 0.

    def answer(self, rng):
        slow = self.slower*(5 if rng.random() < self.tail else 1)
        failed, wrong, repeats = rng.random(3) < (self.failing, self.wrong, self.repeats)
        harmed = failed or wrong or repeats or slow > 1 or self.doubts
        return bool(failed), slow, rng.beta(2, 6) if self.doubts else None, "jam" if repeats else "no" if wrong else "", bool(harmed)


FAULTS = [Fault("all fail", failing=1.), Fault("a third fails", failing=.33), Fault("a tenth fails", failing=.1), Fault("twice as slow", slower=2.), Fault("half slower", slower=1.5),
          Fault("a slow tail", tail=.3), Fault("half is wrong", wrong=.5), Fault("a third is wrong", wrong=.33), Fault("doubts all", doubts=True), Fault("one answer", repeats=.8)]


@dataclass
class World:
    "Callers whose requests are routed by the service's own traffic, and written into its own log; no pixels."
    folder: object
    fault: Fault
    rng: np.random.Generator
    requests: int = 0
    harmed: int = 0
    answered: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.file, self.log, self.feedback = RolloutFile(self.folder/"rollout"), PredictionLog(self.folder/"log"), PredictionLog(self.folder/"feedback")
        self.traffic = Traffic(self.folder/"rollout", Loaded(1, TWINS[0].manifest_sha256, None), lambda arm: Loaded(arm.version, arm.manifest_sha256, None))
        self.file.start(*TWINS, "r")
        self.traffic.start()

    def name_caller(self): return f"caller {self.rng.integers(5000)}"

    def ask(self):
        "One request."
        rng, key = self.rng, self.name_caller()
        choice, self.requests = self.traffic.choose(key), self.requests + 1
        failed, slow, sure, said, harmed = self.fault.answer(rng) if choice.arm == CHALLENGER else (False, 1., None, "", False)
        self.harmed, self.answered[choice.arm] = self.harmed + harmed, self.answered.get(choice.arm, 0) + 1
        if not choice.tag and self.requests % 50: return    # rows outside of the rollout are thinned: they only cost time
        truth, sure = f"class {rng.integers(12)}", rng.beta(6, 2) if sure is None else sure
        self.log.append({"request_id": f"q{self.requests}", "arm": choice.tag, "failed": int(failed), "latency_ms": rng.lognormal(2, .3)*slow, "predicted": said or (truth if rng.random() < .9 else "other"), "confidence": sure})
        if choice.tag and self.fault.wrong: self.feedback.append({"request_id": f"q{self.requests}", "label": truth})

    def close(self):
        self.traffic.close()
        for log in (self.log, self.feedback): log.close()


def find_enough(folder, spec):
    "How many rows of the rollout a judge needs who has all the time in the world."
    evidence = Evidence(spec)
    truths = {row["request_id"]: row["label"] for row in LogReader(folder/"feedback").read()}
    for count, row in enumerate((row for row in LogReader(folder/"log").read() if row["arm"]), 1):
        arm = row["arm"].rpartition(":")[2]
        evidence.add([{**row, "arm": arm}])
        if row["request_id"] in truths and not row["failed"]: evidence.hear(arm, row["predicted"] != truths[row["request_id"]])
        if evidence.accuse(): return count
    return None


def run_fault(folder, fault, seed, spec, pace=5000., most=120.):
    "A rollout of a bad version under load, with a controller of its own process: was it gone, how long after there was enough to see, how many were harmed."
    world = World(folder, fault, np.random.default_rng(seed))
    child, begin, when = start_controller(folder/"rollout", folder/"log", spec, 20., folder/"feedback", every=.5), time.monotonic(), []
    try:
        while time.monotonic() < begin + most and (world.requests % 25 or world.file.read().phase == RUNNING):
            before = world.answered.get(CHALLENGER, 0) + world.answered.get(BASELINE, 0)
            world.ask()
            if world.answered.get(CHALLENGER, 0) + world.answered.get(BASELINE, 0) > before: when.append(time.monotonic())
            if world.requests % 50 == 0: time.sleep(max(0., begin + world.requests/pace - time.monotonic()))
        gone = time.monotonic()
    finally:
        kill(child)
        world.close()
    state, enough = world.file.read(), find_enough(folder, spec)
    late = gone - when[enough - 1] if enough else None
    return {"fault": fault.name, "gone": state.event == "abort" and state.champion == TWINS[0], "reason": state.reason, "seconds_late": late and round(late, 2), "harmed": world.harmed,
            "requests": world.requests, "step": state.step, "challenger": world.answered.get(CHALLENGER, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS if FULL else FAULTS[::3], ids=lambda fault: fault.name)
def test_a_planted_fault_is_gone_before_it_harms(tmp_path, fault):
    spec = RolloutSpec(step_seconds=8., step_pairs=60)
    found = [run_fault(tmp_path/str(seed), fault, seed, spec) for seed in range(10 if FULL else 1)]
    for told in found: print("fault:", json.dumps(told))
    assert all(told["gone"] for told in found)
    assert max(told["seconds_late"] for told in found) <= 10
    assert max(told["harmed"]/told["requests"] for told in found) <= .01, "where every answer of it harms, its share of all answers is harmed: never more than one in a hundred"


def run_slowly(folder, fault, seed, spec, monkeypatch, pace=30.):
    "The same where requests are few, so that pairs and not seconds decide when a step ends; the controller looks each 25 requests, by a clock that we wind."
    world, clock = World(folder, fault, np.random.default_rng(seed)), Clock()
    monkeypatch.setattr(controllers, "_since", clock.since)
    controller, state = Controller(folder/"rollout", folder/"log", spec, feedback=folder/"feedback"), world.file.read()
    while state.phase == RUNNING and world.requests < 60_000:
        for _ in range(25): world.ask()
        clock.seconds = world.requests/pace
        state = controller.tick()
        world.traffic.look()
    world.close()
    return {"fault": fault.name, "gone": state.event == "abort" and state.champion == TWINS[0], "step": state.step, "harmed": world.harmed, "requests": world.requests, "challenger": world.answered.get(CHALLENGER, 0)}


SLOW = RolloutSpec(step_seconds=0., deadline=1e9)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS if FULL else [FAULTS[0], FAULTS[8]], ids=lambda fault: fault.name)
def test_a_planted_fault_harms_few_where_requests_are_few(tmp_path, fault, monkeypatch):
    found = [run_slowly(tmp_path/str(seed), fault, seed, SLOW, monkeypatch) for seed in range(10 if FULL else 1)]
    for told in found: print("slow fault:", json.dumps(told))
    assert all(told["gone"] and told["harmed"] <= .01*told["requests"] for told in found)


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["steps after forty pairs", "callers and not requests"])
def test_more_harm_is_noticed(tmp_path, plant, monkeypatch):
    "Planted: the first step as short as the others; a share of the callers whatever they ask, and one of them asks all day."
    if plant.startswith("callers"):
        monkeypatch.setattr(Quota, "admit", lambda self, state, arm, key: arm)
        monkeypatch.setattr(World, "name_caller", lambda self: "robot 163" if self.rng.random() < .05 else f"caller {self.rng.integers(5000)}")
    told = run_slowly(tmp_path, FAULTS[8], 0, SLOW if plant.startswith("callers") else replace(SLOW, first_pairs=40), monkeypatch)
    assert told["gone"] and told["harmed"] > .01*told["requests"]


BLIND = CONTROL.replace("states.LEASE = {lease}", """
from cvops_wb.serve.rollouts import controller, evidence
controller.Evidence = type("Blind", (evidence.Evidence,), dict(accuse=lambda self: ""))     # planted: nothing is ever held against the challenger
""")


@pytest.mark.slow
def test_a_controller_that_sees_nothing_is_noticed(tmp_path):
    world = World(tmp_path, Fault("all fail", failing=1.), np.random.default_rng(0))
    code = BLIND.format(folder=str(tmp_path/"rollout"), log=str(tmp_path/"log"), spec=repr(RolloutSpec(step_seconds=.5, step_pairs=10)), feedback="", every=.1)
    child = FORK.Process(target=exec, args=(code, {"__name__": "controller"}), daemon=True)
    child.start()
    begin = time.monotonic()
    while time.monotonic() < begin + 4: world.ask()
    kill(child)
    world.close()
    assert world.file.read().phase == RUNNING and world.file.read().step > 0 and find_enough(tmp_path, RolloutSpec()) is not None


# ---- twice, idle, and once more

def test_abort_is_safe_whenever_it_comes(tmp_path):
    file = RolloutFile(tmp_path)
    assert file.abort("idle").number == 0 and file.history() == []      # nothing is under way: nothing is written
    file.start(*TWINS, "r")
    first = file.abort("once")
    assert file.abort("twice") == first and [event["event"] for event in file.history()] == ["start", "abort"] and first.champion == TWINS[0]
    traffic = Traffic(tmp_path, Loaded(1, TWINS[0].manifest_sha256, None), lambda arm: Loaded(arm.version, arm.manifest_sha256, None))
    file.start(*TWINS, "r2")
    file.promote("a person")
    traffic.look()
    assert {traffic.choose(f"{k}").loaded.version for k in range(20)} == {2}
    file.abort("it broke a minute later")       # the old champion is still loaded
    traffic.look()
    assert {traffic.choose(f"{k}").loaded.version for k in range(20)} == {1} and file.read().champion == TWINS[0]
