"""A champion of the workbench's own kind for a bench: the product's network, recipe and loop on images in memory, kept in the cache by what it has learnt from.

    from parts.champion import learn_champion
    look = learn_champion(images, labels, epochs=12)      # look(images) → classes, chances (N, K), embeddings (N, D)
"""
import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

REPO = Path(__file__).parents[2]
SIZE = 64       # of the images in service, pixels


def to_pixels(images, size):
    "uint8 (N, S, S, 3)."
    from PIL import Image
    return np.stack([np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX)) for image in images])


def fit_network(network, pixels, labels, epochs, seed, path):
    "The recipe and the loop of `cvops train`, kept on the way; nothing is held out, for nothing is chosen by it."
    from cvops_wb.learn.fitting import fit
    from cvops_wb.learn.learners.checkpoints import Checkpoints
    from cvops_wb.learn.learners.classification import ClassificationLearner
    from cvops_wb.learn.loading import Pixels
    from cvops_wb.learn.training import TrainSpec, shorten_memory, to_fit
    targets = np.unique(labels, return_inverse=True)[1]
    rows = pd.DataFrame({"id": [f"{k:06}" for k in range(len(labels))], "label": labels})
    recipe = shorten_memory(to_fit(TrainSpec(epochs=epochs, size=SIZE, batch_size=64, seed=seed), network.mean, network.std), len(rows))
    exact = Pixels(pd.Index(rows["id"]), pixels)
    few = rows.iloc[:64]
    material = SimpleNamespace(rows=rows, targets=targets, held=few, held_targets=targets[:64], pixels=Pixels(pd.Index(rows["id"]), pixels), exact=exact, size=SIZE)
    def say(report): print(f"champion: epoch {report['epoch']:.0f} of {epochs}, loss {report['loss']:.3f}", file=sys.stderr, flush=True)
    kept = Checkpoints(path, 30)
    fit(ClassificationLearner(network, material, recipe), say, kept)
    kept.drop()


def learn_champion(images, labels, epochs=12, seed=0):
    "Train, or take what was trained on the same images before; what it returns looks at other images."
    import torch
    from safetensors.torch import load_file, save_file

    from cvops_wb.learn.networks import Served, build_network
    from cvops_wb.learn.training import seed_all
    seed_all(seed, int(os.environ.get("OMP_NUM_THREADS") or 0))
    classes, pixels = np.unique(labels), to_pixels(images, SIZE)
    network = build_network("small_resnet", len(classes), SIZE)
    key = hashlib.sha256(pixels.tobytes() + "\n".join(labels).encode() + f"{epochs} {seed}".encode()).hexdigest()[:16]
    kept = REPO/".cvops"/"cache"/"bench"/f"champion-{key}.safetensors"
    if kept.exists(): network.load_state_dict(load_file(kept))
    else:
        kept.parent.mkdir(parents=True, exist_ok=True)
        fit_network(network, pixels, labels, epochs, seed, kept.with_name(f"way-{key}.safetensors"))
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, kept)
    served = Served(network.eval())

    @torch.inference_mode()
    def look(images):
        parts = [served(torch.from_numpy(to_pixels(images[k:k + 128], SIZE))) for k in range(0, len(images), 128)]
        logits, embedding = (torch.cat(each).float().numpy() for each in zip(*parts, strict=True))
        scores = np.exp(logits - logits.max(1, keepdims=True))
        return classes, scores/scores.sum(1, keepdims=True), embedding
    return look
