"DeepPCB as an anomaly task: a memory of crops without a defect, judged on crops with and without one, by AUROC of images and PRO of boxes."
import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SIDE = 160


def cut_boards(source: Path, boards: int) -> list[tuple[str, np.ndarray, str]]:
    "Side, pixels and objects of each crop: of three fifths of the boards good crops to learn from, of a quarter good and bad ones to judge by."
    from PIL import Image
    rng, crops = random.Random(0), []
    stems = sorted(path.stem for path in (source/"labels").glob("*.txt"))
    rng.shuffle(stems)
    for k, stem in enumerate(stems[:boards]):
        side = "train" if k < .6*min(boards, len(stems)) else "val" if k < .75*min(boards, len(stems)) else "test"
        image = Image.open(source/"images"/f"{stem}.jpg").convert("RGB")
        boxes = [list(map(int, line.split())) for line in (source/"labels"/f"{stem}.txt").read_text().splitlines() if line.strip()]
        places = [(rng.randrange(image.width - SIDE), rng.randrange(image.height - SIDE)) for _ in range(60)]
        good = [place for place in places if not find_defects(boxes, *place, 4) and .1 < (np.asarray(image.crop(frame(*place)).convert("L")) > 127).mean() < .9]
        crops += [(side, np.asarray(image.crop(frame(*place))), "[]") for place in good[:2 if side == "train" else 1]]
        if side == "train": continue
        x1, y1, x2, y2, _ = rng.choice(boxes)
        place = (min(max(0, x1 - rng.randrange(20, max(21, SIDE - x2 + x1 - 20))), image.width - SIDE), min(max(0, y1 - rng.randrange(20, max(21, SIDE - y2 + y1 - 20))), image.height - SIDE))
        crops.append((side, np.asarray(image.crop(frame(*place))), json.dumps(find_defects(boxes, *place))))
    return crops


def frame(x: int, y: int) -> tuple[int, int, int, int]:
    "Corners of a crop."
    return x, y, x + SIDE, y + SIDE


def find_defects(boxes: list, x: int, y: int, margin: int = 0) -> list[dict]:
    "The defects that a crop touches, in its pixels."
    found = [[max(x1 - x, 0), max(y1 - y, 0), min(x2 - x, SIDE), min(y2 - y, SIDE)] for x1, y1, x2, y2, _ in boxes
             if x1 < x + SIDE + margin and x2 > x - margin and y1 < y + SIDE + margin and y2 > y - margin]
    return [{"box": [x1, y1, x2 - x1, y2 - y1], "label": "defect"} for x1, y1, x2, y2 in found if margin or (x2 > x1 and y2 > y1)]


def judge_eye(network: str, crops: list, memory: int) -> tuple[dict, dict, float]:
    "Metrics on `test`, their intervals, seconds to learn."
    import pandas as pd
    import torch

    from cvops_wb.learn.evaluation import bootstrap
    from cvops_wb.learn.exporting import open_session, run_session, to_onnx
    from cvops_wb.learn.learners import LearnSpec, memory as learner
    from cvops_wb.learn.loading import Pixels
    from cvops_wb.learn.networks import build_network
    from cvops_wb.learn.tasks import TASKS
    torch.manual_seed(0)
    task, names, learner.MEMORY = TASKS["anomaly"](), ["good", "defect"], memory
    table = pd.DataFrame([{"id": f"{k:05}", "label": "", "objects": objects, "width": SIDE, "height": SIDE, "split": side} for k, (side, _, objects) in enumerate(crops)])
    pixels, parts = Pixels(pd.Index(table["id"]), np.stack([image for _, image, _ in crops])), [table[table["split"] == s].reset_index(drop=True) for s in ("train", "val", "test")]
    train, val, test = (task.to_targets(part, names, SIDE) for part in parts)
    material = SimpleNamespace(task=task, size=SIDE, rows=parts[0], held=parts[1], pixels=pixels, exact=pixels, targets=train, held_targets=val)
    built, begin = build_network(network, 2, SIDE), time.perf_counter()
    learner.MemoryLearner(built, material, LearnSpec(batch=16)).memorise(lambda report: None)
    seconds, session = time.perf_counter() - begin, open_session(to_onnx(built, SIDE, task.outputs))
    heat = [run_session(session, pixels.take(part["id"])).logits for part in parts[1:]]
    scores = task.to_scores(heat[1], task.calibrate(heat[0], val))
    return {k: float(v[0]) for k, v in task.measure(scores, test).items()}, bootstrap(task, scores, test, np.arange(len(test)), 200), seconds


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--quick", action="store_true", help="120 boards, the hand-made eye alone")
    parse.add_argument("--json", type=Path)
    parse.add_argument("--boards", type=int, default=1000)
    parse.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]/"shared"/"data"/"deeppcb")
    options = parse.parse_args()
    if not options.data.is_dir(): sys.exit(f"the boards are not there: {options.data}")
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    crops, told = cut_boards(options.data, 120 if options.quick else options.boards), []
    eyes = [("patches", 2000)] if options.quick else [("patches", 2000), ("patches", 6000), ("patches:torchvision:resnet18", 2000), ("patches:small_resnet", 2000)]
    for network, memory in eyes:
        values, ends, seconds = judge_eye(network, crops, memory)
        for name, chance in (("auroc", .5), ("pro", .15)):
            told.append({"measure": f"{name}, {network}, {memory} patches", "ours": round(values[name], 4), "peer": chance, "peer_name": "chance", "ratio": round(values[name]/chance, 2), "goal": "", "met": None, "runs": 1,
                         "note": f"95 % interval [{ends[name][0]:.3f}, {ends[name][1]:.3f}]; {sum(side == 'test' for side, *_ in crops)} test crops; learned in {seconds:.0f} s"})
            print(told[-1]["measure"], told[-1]["ours"], told[-1]["note"], flush=True)
    if options.json: options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__": main()
