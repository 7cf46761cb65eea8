"Rollouts: whatever is done in whatever order, with a crash at any point, the file is whole, the champion answers, and nothing unproven is promoted."
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cvops_wb.core.errors import BadModel, BadRecord, WrongUsage
from cvops_wb.serve.rollouts import states as rollouts
from cvops_wb.serve.rollouts.controller import Controller, LogReader, alone
from cvops_wb.serve.rollouts.evidence import Evidence, RolloutSpec, decide
from cvops_wb.serve.rollouts.states import (
    BASELINE,
    CHALLENGER,
    CHAMPION,
    HOLDING,
    IDLE,
    RUNNING,
    Arm,
    Rollout,
    RolloutFile,
    abort,
    advance,
    choose_arm,
    end,
    parse_rollout,
    place_caller,
    promote,
    read_boot,
    start,
)
from cvops_wb.serve.rollouts.traffic import Loaded, Traffic

FULL = bool(os.environ.get("CVOPS_FULL"))
ARMS = [Arm(k, f"registry/{k}", f"{k:02}"*4) for k in range(1, 5)]


class Crash(BaseException): "The plug was pulled."


class Machine(RuleBasedStateMachine):
    "Operations in any order; each may crash before, between or after its writes."
    torn = staticmethod(lambda path, content: None)

    def __init__(self):
        super().__init__()
        self.file, self.champion, self.started = RolloutFile(mkdtemp()), ARMS[0], 0
        self.proven = {ARMS[0]}     # versions that were promoted, or were there from the start

    def do(self, how, *arguments, crash=None):
        writes, real = [], rollouts.write_atomic

        def write(path, content, durable=True):
            writes.append(path)
            if crash == 2*len(writes) - 2: raise Crash
            real(path, content, durable)
            if crash == 2*len(writes) - 1: raise Crash
        rollouts.write_atomic = write
        try: return self.file.change(how, *arguments)
        except Crash: return None
        finally: rollouts.write_atomic = real

    crashes = st.one_of(st.none(), st.integers(0, 5))

    @rule(k=st.integers(0, 3), crash=crashes, shadow=st.booleans())
    def start(self, k, crash, shadow):
        state = self.file.read()
        champion = state.champion or ARMS[0]
        self.started += 1
        try: self.do(lambda now: start(now, champion, ARMS[k], f"r{self.started}", shadow=shadow), crash=crash)
        except WrongUsage: assert state.phase == RUNNING or ARMS[k] == champion

    @rule(crash=crashes)
    def advance(self, crash):
        state = self.file.read()
        try: self.do(advance, "fine", crash=crash)
        except WrongUsage: assert state.phase != RUNNING

    @rule(crash=crashes)
    def promote(self, crash):
        state = self.file.read()
        if state.challenger: self.proven.add(state.challenger)
        try: self.do(promote, "proven", crash=crash)
        except WrongUsage: assert state.phase != RUNNING

    @rule(crash=crashes)
    def abort(self, crash):
        before = self.file.read()
        after = self.do(abort, "bad", crash=crash)
        if after is None: return
        assert after.phase == IDLE and after.share == 0
        if before.phase == RUNNING: assert after.champion == before.champion
        if before.phase == HOLDING: assert after.champion == before.previous
        assert self.file.change(abort) == after     # once more changes nothing

    @rule(crash=crashes)
    def end(self, crash): self.do(end, crash=crash)

    @rule()
    def renew(self): assert self.file.renew(self.file.read().id) == (self.file.read().phase == RUNNING)

    @invariant()
    def is_whole(self):
        state = self.file.read()
        assert state.phase in (IDLE, RUNNING, HOLDING)
        assert (state.phase == RUNNING) == (state.challenger is not None)
        assert state.champion is None or state.champion in self.proven
        assert state.share <= .5 and (state.phase == RUNNING or state.share == 0)
        for k in range(8):
            arm = choose_arm(state, f"caller {k}", time.monotonic(), read_boot())
            assert state.phase == RUNNING or arm == CHAMPION
            assert choose_arm(state, f"caller {k}", state.lease + .001, read_boot()) == CHAMPION

    @invariant()
    def history_is_whole(self):
        state, events = self.file.read(), self.file.history()
        assert [event["number"] for event in events] == list(range(1, state.number + 1))
        if events: assert (events[-1]["event"], events[-1]["rollout"]) == (state.event, state.id)


def run_machine(machine, count):
    run_state_machine_as_test(machine, settings=settings(max_examples=count, stateful_step_count=50, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                                                         suppress_health_check=list(HealthCheck)))


def test_any_order_with_a_crash_at_any_point():
    run_machine(Machine, 5000 if FULL else 25)


class Forgetful(Machine):
    "Planted: the history is not filled up after a crash."
    def __init__(self):
        super().__init__()
        self.file.fill_up = lambda state: None if state.number % 3 == 0 else RolloutFile.fill_up(self.file, state)


class Careless(Machine):
    "Planted: an abort of a promoted version leaves it in place."
    def do(self, how, *arguments, crash=None):
        def keep(state, *given): return replace(how(state, *given), champion=state.champion)
        return super().do(keep if how is abort else how, *arguments, crash=crash)


@pytest.mark.parametrize("machine", [Forgetful, Careless])
def test_a_planted_fault_is_noticed(machine):
    with pytest.raises(AssertionError): run_machine(machine, 60)


def test_callers_stay_where_they_are_and_shares_are_what_they_say():
    state = Rollout(ARMS[0], ARMS[1], phase=RUNNING, id="r", lease=10., boot="b")
    places = np.array([place_caller("r", f"caller {k}") for k in range(20_000)])
    assert abs(np.histogram(places, 20, (0, 1))[0] - 1000).max() < 150
    before = set()
    for step, share in enumerate(state.steps):
        arms = {key: choose_arm(replace(state, step=step), key, 1., "b") for key in (f"caller {k}" for k in range(20_000))}
        ours = {key for key, arm in arms.items() if arm == CHALLENGER}
        assert abs(len(ours)/20_000 - share) < .01 and abs(sum(arm == BASELINE for arm in arms.values())/20_000 - share) < .01
        assert before <= ours       # who had the challenger keeps it
        before = ours


@pytest.mark.parametrize("value", [[], "x", {"champion": 3}, {"champion": {"version": 1}}, {"steps": 3}])
def test_a_damaged_file_is_named(value):
    with pytest.raises((BadRecord, TypeError)) as e: parse_rollout(value)
    assert isinstance(e.value, BadRecord)


def make_traffic(folder, broken=()):
    def load(arm):
        if arm.version in broken: raise BadModel("refused", got=arm.model)
        return Loaded(arm.version, arm.manifest_sha256, None)
    return Traffic(folder, Loaded(1, ARMS[0].manifest_sha256, None), load)


def test_a_worker_follows_and_a_version_that_does_not_load_gets_nobody(tmp_path):
    good, bad = make_traffic(tmp_path), make_traffic(tmp_path, broken=(2,))
    for traffic in (good, bad): traffic.start()
    try:
        good.file.change(start, ARMS[0], ARMS[1], "r", (.5,))
        deadline = time.monotonic() + 20
        while {good.choose(f"{k}").arm for k in range(50)} == {CHAMPION} and time.monotonic() < deadline: time.sleep(.05)
        assert {good.choose(f"{k}").arm for k in range(50)} == {BASELINE, CHALLENGER}
        assert {good.choose(f"{k}").fallback.version for k in range(50)} == {1}
        while bad.seen is None and time.monotonic() < deadline: time.sleep(.05)
        assert {bad.choose(f"{k}").loaded.version for k in range(50)} == {1}
        good.file.path.write_text("{torn")
        time.sleep(.5)
        assert good.choose("x").loaded.version in (1, 2)    # a file that cannot be read changes nothing
    finally:
        for traffic in (good, bad): traffic.close()


@pytest.mark.parametrize("error", [BadModel("refused", got="2"), RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT\nmore")])
def test_a_version_that_no_worker_can_load_is_rolled_back_and_the_next_rollout_is_followed(tmp_path, error):
    def load(arm):
        if arm.version == 2: raise error
        return Loaded(arm.version, arm.manifest_sha256, None)
    traffic = Traffic(tmp_path/"rollout", Loaded(1, ARMS[0].manifest_sha256, None), load)
    controller = Controller(tmp_path/"rollout", tmp_path/"log")
    third = replace(ARMS[1], version=3, manifest_sha256="c"*64)
    for name, challenger, phase in (("r1", ARMS[1], IDLE), ("r2", ARMS[1], IDLE), ("r3", third, RUNNING)):
        controller.file.start(ARMS[0], challenger, name, (.5,))
        assert rollouts.find_refusal(controller.file.folder, challenger) == ""       # not of the rollout before
        traffic.look()
        state = controller.tick()
        assert state.phase == phase and ("cannot be loaded: " in state.reason and "\n" not in state.reason) == (phase == IDLE), state
    assert {traffic.choose(f"{k}").arm for k in range(500)} >= {CHALLENGER}


@pytest.mark.parametrize("broken", [False, True])
def test_the_baseline_is_answered_by_a_second_copy_of_the_champion(tmp_path, broken):
    # as seldom asked as the challenger, so as cold in every cache; the champion itself would be faster than its own twin
    def load(arm):
        if broken and arm.version == 1: raise BadModel("gone", got="1")
        return Loaded(arm.version, arm.manifest_sha256, object())
    own = Loaded(1, ARMS[0].manifest_sha256, object())
    traffic = Traffic(tmp_path, own, load)
    traffic.file.start(ARMS[0], ARMS[1], "r", (.25,))
    traffic.look()
    choices = [traffic.choose(f"{k}") for k in range(400)]
    by = {arm: {(id(c.loaded.engine), c.loaded.version) for c in choices if c.arm == arm} for arm in (CHAMPION, BASELINE, CHALLENGER)}
    assert all(len(found) == 1 for found in by.values()) and by[CHAMPION] == {(id(own.engine), 1)} and all(c.fallback is own for c in choices)
    assert (by[BASELINE] == by[CHAMPION]) == broken and {version for _, version in by[BASELINE]} == {1}
    before = traffic.routing.twin
    assert traffic.file.renew("r")
    traffic.look()
    assert traffic.routing.twin is before    # loaded once
    traffic.file.abort("enough")
    traffic.look()
    assert traffic.routing.twin is None and find_no_refusal(tmp_path)


def find_no_refusal(folder): return not list(folder.rglob("refused/*"))


@pytest.mark.parametrize("since, version", [("", 2), ("2020-01-01T00:00:00Z", 2), ("2999-01-01T00:00:00Z", 1)])
def test_a_package_that_was_made_after_a_promotion_answers(tmp_path, since, version):
    file = RolloutFile(tmp_path)
    for change in ((start, ARMS[0], ARMS[1], "r"), (promote,), (end,)): file.change(*change)
    traffic = Traffic(tmp_path, Loaded(1, ARMS[0].manifest_sha256, None, since), lambda arm: Loaded(arm.version, arm.manifest_sha256, None))
    traffic.look()
    assert traffic.choose("x").loaded.version == version


def write_rows(log, name, count, rng, failing=.01, slower=1., wrong=None):
    "Answers of both arms as the service writes them."
    log.mkdir(parents=True, exist_ok=True)
    with open(log/"20260101T000000-0-1.jsonl", "a") as file:
        for _ in range(count):
            for arm in (BASELINE, CHALLENGER):
                ours = arm == CHALLENGER
                row = {"request_id": f"{arm}{file.tell()}", "arm": f"{name}:{arm}", "failed": int(rng.random() < (failing if ours else .01)),
                       "latency_ms": rng.lognormal(2, .3)*(slower if ours else 1), "predicted": "tea"}
                file.write(json.dumps(row) + "\n")


def make_controller(tmp_path, **options):
    heard = []
    controller = Controller(tmp_path/"rollout", tmp_path/"log", RolloutSpec(step_seconds=0., **options), heard.append)
    controller.file.change(start, ARMS[0], ARMS[1], "r1", (.05, .5))
    return controller, heard


def test_a_good_version_is_promoted_and_told(tmp_path):
    controller, heard = make_controller(tmp_path, hold=0.)
    rng, states = np.random.default_rng(0), []
    for _ in range(40):
        write_rows(tmp_path/"log", "r1", 60, rng)
        states.append(controller.tick())
        if states[-1].phase != RUNNING: break
    assert states[-1].phase == HOLDING and states[-1].champion == ARMS[1] and states[-1].previous == ARMS[0]
    assert controller.tick().phase == IDLE
    assert [state.event for state in heard] == ["start", "step", "promote", "end"]
    assert "no worse" in heard[2].reason


@pytest.mark.parametrize("worse, said", [({"failing": .3}, "fails in"), ({"slower": 1.6}, "slow")])
def test_a_bad_version_is_gone_and_the_reason_is_said(tmp_path, worse, said):
    controller, heard = make_controller(tmp_path)
    rng = np.random.default_rng(1)
    for _ in range(30):
        write_rows(tmp_path/"log", "r1", 10, rng, **worse)
        if controller.tick().phase == IDLE: break
    assert heard[-1].event == "abort" and said in heard[-1].reason and heard[-1].champion == ARMS[0]
    assert controller.evidence.pairs < 300


def test_what_is_inconclusive_is_not_promoted(tmp_path):
    controller, heard = make_controller(tmp_path, deadline=.5)
    write_rows(tmp_path/"log", "r1", 30, np.random.default_rng(2))
    controller.tick()
    time.sleep(2.1)     # the file's times are whole seconds
    assert controller.tick().phase == IDLE and heard[-1].event == "abort" and "inconclusive" in heard[-1].reason


def test_feedback_counts(tmp_path):
    controller = Controller(tmp_path/"rollout", tmp_path/"log", RolloutSpec(step_seconds=0., feedback=True), None, tmp_path/"feedback")
    controller.file.change(start, ARMS[0], ARMS[1], "r1", (.5,))
    write_rows(tmp_path/"log", "r1", 200, np.random.default_rng(3))
    assert controller.tick().phase == RUNNING and controller.evidence.open == ["wrong"]      # not promoted: the truth was asked for
    (tmp_path/"feedback").mkdir()
    with open(tmp_path/"feedback"/"20260101T000000-0-1.jsonl", "w") as file:
        for row in LogReader(tmp_path/"log").read(): file.write(json.dumps({"request_id": row["request_id"], "label": "milk" if CHALLENGER in row["arm"] else "tea"}) + "\n")
    assert controller.tick().phase == IDLE and "is wrong in" in controller.file.read().reason


def test_a_new_controller_knows_what_the_old_one_knew(tmp_path):
    controller, _ = make_controller(tmp_path)
    rng = np.random.default_rng(4)
    for _ in range(5):
        write_rows(tmp_path/"log", "r1", 7, rng)
        controller.tick()
    other = Controller(tmp_path/"rollout", tmp_path/"log", RolloutSpec(step_seconds=0.))
    other.tick()
    assert other.evidence.pairs == controller.evidence.pairs
    assert np.allclose(other.evidence.worse.evidence, controller.evidence.worse.evidence)
    with alone(tmp_path/"rollout"), pytest.raises(WrongUsage, match="another controller"): other.watch()


def test_controllers_that_die_young_get_on_together(tmp_path):
    "Each lives for one look: what its predecessors saw in this step counts, and what was seen before it does not."
    spec, log, rng, steps = RolloutSpec(step_seconds=0., step_pairs=40, first_pairs=40), tmp_path/"log", np.random.default_rng(9), []
    RolloutFile(tmp_path/"rollout").start(ARMS[0], ARMS[1], "r1", (.05, .5))
    log.mkdir()
    time.sleep(1.1)     # the file's times are whole seconds
    for k in range(6):
        with open(log/"20260101T000000-0-1.jsonl", "a") as file:
            for n in range(10):
                for arm in (BASELINE, CHALLENGER):
                    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{n:03}Z"
                    file.write(json.dumps({"request_id": f"{k} {n} {arm}", "time": when, "arm": f"r1:{arm}", "failed": 0, "latency_ms": rng.lognormal(2, .3)}) + "\n")
        steps.append(Controller(tmp_path/"rollout", log, spec).tick().step)
    assert steps == [0, 0, 0, 1, 1, 1]      # 40 pairs, ten at each look
    other = Controller(tmp_path/"rollout", log, spec)
    other.tick()
    assert other.at_change >= 40 and other.evidence.pairs == 60


def test_rows_survive_their_segment_becoming_a_table(tmp_path):
    import pandas as pd
    write_rows(tmp_path, "r1", 5, np.random.default_rng(5))
    log, fresh = LogReader(tmp_path), LogReader(tmp_path)
    assert len(list(log.read())) == 10
    lines = tmp_path/"20260101T000000-0-1.jsonl"
    rows = [json.loads(line) for line in lines.read_text().splitlines()] + [{"request_id": "late", "arm": "", "failed": 0}]
    pd.DataFrame(rows).to_parquet(lines.with_suffix(".parquet"))
    lines.unlink()
    assert [row["request_id"] for row in log.read()] == ["late"] and list(log.read()) == []
    assert len(list(fresh.read())) == 11 and list(fresh.read()) == []


CHILD = """
import sys
from cvops_wb.serve.rollouts import states as rollouts
from cvops_wb.serve.rollouts.controller import Controller
from cvops_wb.serve.rollouts.evidence import RolloutSpec
rollouts.LEASE = 1.
Controller(sys.argv[1], sys.argv[2], RolloutSpec(step_seconds=0.)).watch(.05, lambda state: False)
"""


def test_a_dead_controller_cannot_leave_a_version_its_traffic(tmp_path):
    "Killed at any moment: within the lease the champion answers everybody again, and the next controller goes on where it was."
    file, traffic, rng = RolloutFile(tmp_path/"rollout"), make_traffic(tmp_path/"rollout"), np.random.default_rng(6)
    file.change(start, ARMS[0], ARMS[1], "r1", (.5,))
    file.renew("r1")
    for k in range(60 if FULL else 3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path/"rollout"), str(tmp_path/"log")], cwd=Path(__file__).parents[1])
        deadline = time.monotonic() + 60
        leased = file.read().lease
        while file.read().lease == leased and time.monotonic() < deadline: time.sleep(.02)
        time.sleep(rng.random()*.3)
        traffic.look()
        assert {traffic.choose(f"{k}").arm for k in range(50)} == {BASELINE, CHALLENGER}, "it is renewed while the controller lives"
        child.kill()
        child.wait()
        time.sleep(1.2)
        traffic.look()
        assert {traffic.choose(f"{k}").arm for k in range(50)} == {CHAMPION}
        assert file.read().phase == RUNNING


def test_planted_regressions_are_all_found_and_equal_versions_mostly_not():
    rng, accused, equal = np.random.default_rng(7), 0, 0
    for _ in range(100 if FULL else 12):
        bad, same = Evidence(RolloutSpec()), Evidence(RolloutSpec())
        for _ in range(400):
            for evidence, failing in ((bad, .12), (same, .01)):
                if evidence is bad and bad.accuse(): continue
                evidence.add([{"arm": arm, "failed": rng.random() < (failing if arm == CHALLENGER else .01), "latency_ms": rng.lognormal(2, .3)} for arm in (BASELINE, CHALLENGER)])
        accused, equal = accused + bool(bad.accuse()), equal + bool(same.accuse())
    assert accused == (100 if FULL else 12) and equal <= (10 if FULL else 3)
    state = Rollout(ARMS[0], ARMS[1], phase=RUNNING, id="r", step=len(rollouts.STEPS) - 1)
    assert decide(state, Evidence(RolloutSpec()), RolloutSpec(), 10., 10., 0).action == "wait"


def test_what_was_shown_stays_shown_however_seldom_somebody_looks():
    "The page drew a curve over the line while the rollout went on, since nobody had looked at that moment."
    def give(pairs: int, champion: int, challenger: int) -> list[dict]:
        return [{"arm": arm, "failed": k % 10 < failing, "latency_ms": 9.} for k in range(pairs) for arm, failing in ((BASELINE, champion), (CHALLENGER, challenger))]
    rows, often, once = [*give(60, 0, 4), *give(600, 4, 0)], Evidence(RolloutSpec()), Evidence(RolloutSpec())
    for row in rows: often.add([row])
    once.add(rows)
    assert once.accuse() == often.accuse() and "fails in" in once.accuse()
    assert not once.worse.found[0]      # by now it has fallen back
    assert max(now["worse"] for _, now in once.trail) > -np.log10(RolloutSpec().level)


# ---- what is seen without a complaint, and what people say

def answer_pairs(evidence, kind, pairs, rng):
    "Both arms answer other callers; the challenger is of a kind."
    for _ in range(pairs):
        for arm in (BASELINE, CHALLENGER):
            bad = arm == CHALLENGER
            sure = rng.beta(2, 6) if bad and kind == "doubts" else rng.beta(9, 2) if bad and kind == "surer" else rng.beta(6, 2)
            label = "milk" if bad and kind == "repeats" and rng.random() < .6 else str(rng.integers(12))
            evidence.add([{"arm": arm, "failed": 0, "latency_ms": rng.lognormal(2, .3), "confidence": sure, "predicted": label, "request_id": str(rng.random())}])
        if evidence.accuse(): break
    return evidence


@pytest.mark.parametrize("kind, said", [("doubts", "less sure"), ("repeats", "'milk'"), ("surer", ""), ("equal", "")])
def test_a_broken_preprocessing_is_seen_without_a_complaint(kind, said):
    found = [answer_pairs(Evidence(RolloutSpec()), kind, 150, np.random.default_rng(seed)).accuse() for seed in range(8)]
    assert sum(said in words and bool(words) == bool(said) for words in found) >= 7, found    # by chance an equal version is accused in one rollout of 25


@pytest.mark.parametrize("differing, said", [(.1, ""), (.3, ""), (.7, "differs from the champion")])
def test_in_the_shadow_answers_to_the_same_image_are_compared(differing, said):
    for seed in range(4):
        rng, evidence = np.random.default_rng(seed), Evidence(RolloutSpec())
        for k in range(200):
            labels = [str(rng.integers(12))]*2 if rng.random() > differing else rng.choice(12, 2, replace=False).astype(str)
            evidence.add([{"arm": arm, "failed": 0, "latency_ms": 9., "predicted": label, "request_id": f"r{k}"} for arm, label in zip((BASELINE, CHALLENGER), labels, strict=True)])
        assert (said in evidence.accuse()) if said else not evidence.accuse()
        assert evidence.twins.count == 200 and not evidence.twins.said


def test_people_decide_a_rollout(tmp_path, monkeypatch):
    "Half of the images from each arm; what people say is heard once, whoever dies in between."
    import shutil

    import pandas as pd

    from cvops_wb.core.errors import BadInput
    from cvops_wb.core.settings import load_settings
    from cvops_wb.label import label_tools
    from cvops_wb.loop.checking import spotcheck_rollout
    from cvops_wb.serve import PredictionLog
    from cvops_wb.watch.accuracy import asking
    shutil.copy(Path(__file__).parents[1]/"settings.ini", tmp_path)
    monkeypatch.setenv("CVOPS_ROOT", str(tmp_path))
    monkeypatch.setattr(asking, "find_images", lambda rows, settings: {sample: b"\x89PNG" for sample in rows["id"]})
    settings, rng = load_settings(tmp_path), np.random.default_rng(0)
    with pytest.raises(BadInput, match="no rollout"): spotcheck_rollout(settings, 20, "files", False)
    controller = Controller(settings.store/"rollout", settings.store/"predictions", RolloutSpec(step_seconds=0., step_pairs=10**6), None, settings.store/"feedback")
    controller.file.change(start, ARMS[0], ARMS[1], "r1", (.5,))
    log = PredictionLog(settings.store/"predictions")
    for k in range(400):
        arm = (BASELINE, CHALLENGER)[k % 2]
        log.append({"request_id": f"q{k}", "time": f"{pd.Timestamp.now('UTC'):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z", "version": 1 + k % 2, "model": "", "camera": "", "caller": "", "label": "", "failed": 0, "id": f"i{k}", "arm": f"r1:{arm}",
                    "predicted": "tea" if arm == BASELINE or rng.random() < .3 else f"no {k % 40}", "confidence": .8, "latency_ms": 9.})
    log.close()
    controller.tick()
    reply = spotcheck_rollout(settings, 120, "files", False)
    drawn = json.loads((settings.root/reply.document["folder"]/"check.json").read_text())["rows"]
    assert pd.Series([row["arm"] for row in drawn]).value_counts().to_dict() == {"r1:baseline": 60, "r1:challenger": 60} and reply.document["answered"] == 0
    tool = label_tools["files"](settings.root/reply.document["folder"])
    for row in drawn[:50] + drawn[60:110]: tool.answer(row["id"], "tea", "anna")
    real = asking.mark_told

    def killed(*_): raise KeyboardInterrupt     # after the answers were told, before that was noted: told twice, heard once
    monkeypatch.setattr(asking, "mark_told", killed)
    with pytest.raises(KeyboardInterrupt): spotcheck_rollout(settings, 120, "files", False)
    monkeypatch.setattr(asking, "mark_told", real)
    assert spotcheck_rollout(settings, 120, "files", False).document["told"] == 100 and spotcheck_rollout(settings, 120, "files", False).document["told"] == 0
    state = controller.tick()
    assert controller.evidence.seen[BASELINE][2:] == [50, 0] and controller.evidence.seen[CHALLENGER][2] == 50
    assert state.event == "abort" and "is wrong in" in state.reason
