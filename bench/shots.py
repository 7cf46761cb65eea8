"Few-shot starts on grocery: an eye that learned half of the coarse classes, five images a class of the other half; and the hand-made eye."
import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SIZE = 96


def read_grocery(root: Path, least: int) -> tuple[list[tuple[Path, int, str]], list[int]]:
    "All photographs with their coarse class and side, and the coarse classes that have images enough on both sides."
    rows = []
    for side in ("train", "val"):
        for line in (root/f"{side}.txt").read_text().splitlines():
            if not line.strip(): continue
            path, _, coarse = (part.strip() for part in line.split(","))
            rows.append((root/path, int(coarse), side))
    held = [coarse for _, coarse, side in rows if side == "val"]
    return rows, sorted(c for c in {*held} if held.count(c) >= least)


def load(rows: list, cache: dict) -> np.ndarray:
    "uint8 (N, SIZE, SIZE, 3)."
    from cvops_wb.learn.loading import decode_resized
    for path, *_ in rows:
        if path not in cache: cache[path] = decode_resized(path.read_bytes(), [SIZE])[0]
    return np.stack([cache[path] for path, *_ in rows])


def train_eye(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int):
    "Our network on the other classes, by the package's own recipe."
    import pandas as pd
    import torch

    from cvops_wb.learn.fitting import fit
    from cvops_wb.learn.learners.classification import ClassificationLearner, FitSpec
    from cvops_wb.learn.loading import Pixels
    from cvops_wb.learn.networks import build_network
    from cvops_wb.learn.tasks import TASKS
    torch.manual_seed(seed)
    network = build_network("small_resnet", int(labels.max()) + 1, SIZE)
    table = pd.DataFrame({"id": [f"{k:05}" for k in range(len(images))]})
    pixels, held = Pixels(pd.Index(table["id"]), images), slice(0, 64)
    material = SimpleNamespace(task=TASKS["classification"](), size=SIZE, rows=table, held=table[held], targets=labels, held_targets=labels[held], pixels=pixels, exact=pixels)
    spec = FitSpec(epochs=epochs, size=SIZE, start_size=64, predict_size=SIZE, cache_size=SIZE, seed=seed, every=epochs)
    fit(ClassificationLearner(network, material, spec), lambda report: None)
    return network


def try_shots(eye, way: str, shown: np.ndarray, names: np.ndarray, asked: np.ndarray, truth: np.ndarray, classes: int) -> float:
    "Accuracy on the images that are asked."
    import torch

    from cvops_wb.learn.networks.shots import BATCH, Shots, recall
    network = Shots(eye, classes, way)
    def read(images):
        values = (torch.from_numpy(images).permute(0, 3, 1, 2).float()/255 - torch.tensor(eye.mean).view(1, 3, 1, 1))/torch.tensor(eye.std).view(1, 3, 1, 1)
        return values.split(BATCH)
    recall(network, read(shown), torch.from_numpy(names))
    with torch.inference_mode(): said = torch.cat([network(batch).argmax(1) for batch in read(asked)]).numpy()
    return float((said == truth).mean())


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--quick", action="store_true", help="one eye of two epochs, three draws: it runs, it says little")
    parse.add_argument("--json", type=Path)
    parse.add_argument("--shots", type=int, default=5)
    parse.add_argument("--epochs", type=int, default=25)
    parse.add_argument("--draws", type=int, default=10)
    parse.add_argument("--seed", type=int, default=0, help="of the split of the classes, the eye and the draws")
    parse.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]/"shared"/"data"/"grocery")
    options = parse.parse_args()
    if not options.data.is_dir(): sys.exit(f"the photographs are not there: {options.data}")
    if options.quick: options.epochs, options.draws = 2, 3
    import torch

    from cvops_wb.learn.networks import build_network
    from cvops_wb.learn.networks.memory import Filters
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    rng, cache = np.random.default_rng(options.seed), {}
    rows, classes = read_grocery(options.data, 4)
    order = rng.permutation(classes)
    new = sorted(order[:len(order)//2].tolist())
    old = sorted({c for _, c, _ in rows} - set(new))
    known = [row for row in rows if row[1] in old and row[2] == "train"]
    begin = time.perf_counter()
    eye = train_eye(load(known, cache), np.array([old.index(c) for _, c, _ in known]), options.epochs, options.seed)
    spent = time.perf_counter() - begin
    asked = [row for row in rows if row[1] in new and row[2] == "val"]
    pool, truth = [row for row in rows if row[1] in new and row[2] == "train"], np.array([new.index(c) for _, c, _ in asked])
    torch.manual_seed(options.seed)
    eyes = {"trained on the other half": eye, "hand-made": Filters(), "same network, not trained": build_network("small_resnet", 2, SIZE)}
    found = {(name, way): [] for name in eyes for way in ("prototypes", "linear", "knn")}
    for _ in range(options.draws):
        taken = [pool[k] for c in new for k in rng.permutation([k for k, row in enumerate(pool) if row[1] == c])[:options.shots]]
        names = np.array([new.index(c) for _, c, _ in taken])
        for name, way in found: found[name, way].append(try_shots(eyes[name], way, load(taken, cache), names, load(asked, cache), truth, len(new)))
    chance = float(np.bincount(truth).max()/len(truth))
    told = []
    for (name, way), values in found.items():
        spread = statistics.stdev(values)
        note = f"mean of {len(values)} draws, {min(values):.3f} to {max(values):.3f}, sd {spread:.3f}; {len(new)} new classes, {len(truth)} test images; seed {options.seed}; eye trained {spent:.0f} s"
        told.append({"measure": f"accuracy, {options.shots} images a class, {way}, eye {name}", "ours": round(statistics.mean(values), 4), "peer": round(chance, 4),
                     "peer_name": "chance (the most frequent class)", "ratio": round(statistics.mean(values)/chance, 2), "goal": "", "met": None, "runs": len(values), "note": note})
        print(f"{told[-1]['measure']:<75} {told[-1]['ours']:.3f}  chance {chance:.3f}", flush=True)
    if options.json: options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__": main()
