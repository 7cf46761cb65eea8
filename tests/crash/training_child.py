"""Train the same small network again and again, in forks that are killed: one JSON line with the weights' hash of each.

    python training_child.py FOLDER PLANT STEP …     each STEP: kill at it (SIGKILL), begin again, and so on to the end; 0: never

A STEP may be several, `7,3`: killed at the seventh step, begun again, killed three steps later. PLANT=chance leaves the random generators where a
new process has them, PLANT=optimizers the optimisers without their memory, PLANT=none plants nothing."""
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from PIL import Image

from cvops_wb.learn import fitting
from cvops_wb.learn.learners import LearnSpec
from cvops_wb.learn.learners.checkpoints import Checkpoints
from cvops_wb.learn.learners.classification import ClassificationLearner, FitSpec
from cvops_wb.learn.learners.detection import DetectionLearner
from cvops_wb.learn.loading import Pixels
from cvops_wb.learn.networks import build_network
from cvops_wb.learn.tasks import TASKS


def draw(count: int = 40) -> tuple[Pixels, np.ndarray]:
    "Photographs of noise with a coloured square each, and its colour."
    rng = np.random.default_rng(0)
    labels, images = np.arange(count) % 3, rng.integers(0, 90, (count, 64, 64, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True): image[20:40, 16:44, label] = 220
    smooth = [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)) for image in images]
    return Pixels(pd.Index([str(k) for k in range(count)]), np.stack(smooth)), labels


def make(task: str) -> object:
    "A learner; dropout, mixing and crops draw from every generator."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels, labels = draw()
    rows = pd.DataFrame({"id": pixels.ids, "width": 64, "height": 64})
    boxes = [np.array([[16., 20., 44., 40., label]]) for label in labels]
    targets = labels if task == "classification" else boxes
    material = SimpleNamespace(rows=rows, targets=targets, held=rows[:8], held_targets=targets[:8], pixels=pixels, exact=pixels, size=64, task=TASKS[task]())
    if task == "detection": return DetectionLearner(build_network("heatmap:4", 3, 64), material, LearnSpec(epochs=3, batch=8, crop=32, flips="all", every=2))
    network = build_network("small_resnet:8", 3, 32)
    network.dropout = torch.nn.Dropout(.3)
    spec = FitSpec(epochs=4, batch=8, min_steps=4, size=32, start_size=32, predict_size=32, mix_chance=.5, every=2, patience=9)
    return ClassificationLearner(network, material, spec)


def learn(path: Path, task: str, kill_at: int, plant: str) -> str:
    "The hash of the weights at the end; the process is killed in the middle of step `kill_at` of its own."
    learner, done = make(task), 0
    ask = learner.loss

    def loss(index, progress):
        nonlocal done
        done += 1
        found = ask(index, progress)
        if done == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return found
    learner.loss = loss
    if plant == "chance": fitting.set_chance = lambda own, found: None
    if plant == "optimizers": fitting.fill_optimizers = lambda optimizers, tensors: None
    fitting.fit(learner, lambda report: None, Checkpoints(path, 0))
    digest = hashlib.sha256()
    for name, value in sorted(learner.network.state_dict().items()): digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def fork(path: Path, task: str, kill_at: int, plant: str) -> str:
    "The hash that a fork of us ended with, or nothing if it was killed."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with open(os.devnull, "w") as quiet: os.dup2(quiet.fileno(), 1)
        os.write(write, learn(path, task, kill_at, plant).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe: told = pipe.read()
    os.waitpid(child, 0)
    return told


def main(folder: Path, plant: str, plans: list[str]) -> None:
    "One line for each plan."
    for number, plan in enumerate(plans):
        task, _, steps = plan.partition(":")
        path, kills = folder/f"{number}.safetensors", [int(k) for k in steps.split(",")]
        told = [fork(path, task, k, plant) for k in [k for k in kills if k] + [0]]
        print(json.dumps({"plan": plan, "killed": sum(not t for t in told), "hash": told[-1]}), flush=True)


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
