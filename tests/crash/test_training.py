"""A training that is killed at any step and begun again ends with the same weights, bit by bit.

The sample runs in `make test`; `CVOPS_FULL=1` kills 60 times."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("training_child.py")
KILLS = 60 if os.environ.get("CVOPS_FULL") else 2
STEPS = {"classification": 20, "detection": 15}    # that a whole training takes: 4 epochs of 5, 3 of 5


def run(folder: Path, plans: list[str], plant: str = "none") -> list[dict]:
    "What the child tells of each plan."
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, CHILD, folder, plant, *plans], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("task", STEPS)
def test_killed_at_any_step(task, tmp_path):
    rng, most = random.Random(task), STEPS[task]
    plans = [str(rng.randint(1, most)) for _ in range(KILLS)] + [f"{rng.randint(2, most//2)},{rng.randint(1, most//2 - 1)}"]
    whole, *killed = run(tmp_path, [f"{task}:{plan}" for plan in ["0", *plans]])
    assert whole["killed"] == 0 and [k["killed"] for k in killed] == [1]*KILLS + [2]
    assert [k["plan"] for k in killed if k["hash"] != whole["hash"]] == []


@pytest.mark.parametrize("plant", ["chance", "optimizers"])
def test_a_planted_fault_is_seen(plant, tmp_path):
    "Were a part of the state not brought back, the test above would fail."
    whole, killed = run(tmp_path, ["classification:0", "classification:7"], plant)
    assert killed["killed"] == 1 and killed["hash"] and killed["hash"] != whole["hash"]
