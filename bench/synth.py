"Do made images help? DeepPCB with few boards: a detector on the photographs alone, and on the same with pasted or spoiled ones, equal steps, paired by seed."
import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SIDE = 320
NAMES = ["open", "short", "mousebite", "spur", "copper", "pin-hole"]


def read_board(source: Path, stem: str) -> tuple[np.ndarray, str]:
    "Pixels uint8 (640, 640, 3), and the objects as the sample table has them."
    from PIL import Image
    rows = [list(map(int, line.split())) for line in (source/"labels"/f"{stem}.txt").read_text().splitlines() if line.strip()]
    objects = [{"box": [x1, y1, x2 - x1, y2 - y1], "label": NAMES[name - 1]} for x1, y1, x2, y2, name in rows]
    return np.asarray(Image.open(source/"images"/f"{stem}.jpg").convert("RGB")), json.dumps(objects)


def lay_out(boards: dict, held: dict, made: list):
    "What a learner is given."
    import pandas as pd
    from PIL import Image

    from cvops_wb.learn.loading import Pixels
    from cvops_wb.learn.tasks import TASKS
    task, names = TASKS["detection"](), sorted(NAMES)
    parts = [list(boards.values()) + [(m.pixels, m.objects) for m in made], list(held.values())]
    table = pd.DataFrame([{"id": f"{k}-{n:04}", "label": "", "objects": objects, "width": 640, "height": 640, "side": k} for k, part in enumerate(parts) for n, (_, objects) in enumerate(part)])
    pixels = Pixels(pd.Index(table["id"]), np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for part in parts for image, _ in part]))
    rows, seen = (table[table["side"] == k].reset_index(drop=True) for k in (0, 1))
    return SimpleNamespace(task=task, size=SIDE, rows=rows, held=seen, pixels=pixels, exact=pixels, targets=task.to_targets(rows, names), held_targets=task.to_targets(seen, names))


def learn_boards(material, passes: int, seed: int) -> float:
    "mAP at 0.5 on the held-out boards after so many images were looked at."
    import torch

    from cvops_wb.learn.fitting import fit
    from cvops_wb.learn.learners import LEARNERS, LearnSpec
    from cvops_wb.learn.networks import build_network
    torch.manual_seed(seed)
    epochs, told = max(1, round(passes/len(material.rows))), []
    spec = LearnSpec(epochs=epochs, batch=8, flips="all", seed=seed, every=epochs, ema=.98)
    fit(LEARNERS["detection"](build_network("heatmap:16", len(NAMES), SIDE), material, spec), told.append)
    return float(told[-1]["map50"])


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--quick", action="store_true", help="two seeds, a fifth of the steps: it runs, it says little")
    parse.add_argument("--json", type=Path)
    parse.add_argument("--boards", type=int, default=24, help="photographs to learn from")
    parse.add_argument("--made", type=int, default=96)
    parse.add_argument("--passes", type=int, default=1200, help="images looked at, the same for all")
    parse.add_argument("--seeds", type=int, default=4)
    parse.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]/"shared"/"data"/"deeppcb")
    options = parse.parse_args()
    if not options.data.is_dir(): sys.exit(f"the boards are not there: {options.data}")
    if options.quick: options.seeds, options.passes = 2, 240
    import pandas as pd
    import torch

    from cvops_wb.data.planting import Stock, SynthSpec, imagine
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
    stems, found, begin = sorted(path.stem for path in (options.data/"labels").glob("*.txt")), {"alone": [], "paste": [], "spoil": []}, time.perf_counter()
    for seed in range(options.seeds):
        chosen = random.Random(seed).sample(stems, options.boards + 60)
        boards, held = ({stem: read_board(options.data, stem) for stem in part} for part in (chosen[:options.boards], chosen[options.boards:]))
        stock = Stock(pd.DataFrame({"id": list(boards), "label": "", "objects": [objects for _, objects in boards.values()]}), lambda stem, boards=boards: boards[stem][0])
        for kind in found:
            made = [] if kind == "alone" else list(imagine(SynthSpec(kind, options.made, seed), stock))
            found[kind].append(learn_boards(lay_out(boards, held, made), options.passes, seed))
            print(f"seed {seed}  {kind:<6} map50 {found[kind][-1]:.3f}  {time.perf_counter() - begin:.0f} s", flush=True)
    from scipy.stats import t
    told, alone = [], found.pop("alone")
    for kind, values in found.items():
        apart = [a - b for a, b in zip(values, alone, strict=True)]
        reach = float(t.ppf(.975, len(apart) - 1))*statistics.stdev(apart)/len(apart)**.5
        middle = statistics.mean(apart)
        note = f"difference {middle:+.3f} [{middle - reach:+.3f}, {middle + reach:+.3f}], Student, paired by seed; {options.boards} boards, {options.made} made, {options.passes} images looked at by each"
        told.append({"measure": f"map50 with {kind}", "ours": round(statistics.mean(values), 4), "peer": round(statistics.mean(alone), 4), "peer_name": "the photographs alone",
                     "ratio": round(statistics.mean(values)/max(statistics.mean(alone), 1e-9), 3), "goal": "", "met": None, "runs": len(values), "note": note})
        print(told[-1]["measure"], told[-1]["ours"], "alone", told[-1]["peer"], note)
    if options.json: options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__": main()
