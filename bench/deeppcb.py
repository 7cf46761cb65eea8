"DeepPCB by the product's own stages: COCO in, curate, snapshot, train, evaluate; mAP on a random fifth of each board group."
import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

NAMES = ("open", "short", "mousebite", "spur", "copper", "pin-hole")
PEER = {"map33": (.92, .97, "untuned heat map at 320 px"), "map50": (.86, None, "untuned heat map at 320 px")}


def split_groups(stems: list[str], seed: int = 1) -> dict[str, str]:
    "Stem → side: of each board group a fifth for the test, as the official split does, and a tenth of the rest to watch."
    groups, rng, sides = defaultdict(list), random.Random(seed), {}
    for stem in sorted(stems): groups[stem[:4]].append(stem)
    for members in groups.values():
        rng.shuffle(members)
        test, val = len(members)//5, max(len(members)*4//50, 1)
        sides |= {stem: "test" if k < test else "val" if k < test + val else "train" for k, stem in enumerate(members)}
    return sides


def write_coco(source: Path, target: Path, most: int) -> None:
    "The label lists beside the images as one COCO file a split."
    sides = split_groups([path.stem for path in (source/"labels").glob("*.txt")])
    chosen = sorted(random.Random(0).sample(sorted(sides), min(most, len(sides))))
    for side in ("train", "val", "test"):
        images, boxes = [], []
        for number, stem in enumerate(s for s in chosen if sides[s] == side):
            (target/"images"/side).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source/"images"/f"{stem}.jpg", target/"images"/side/f"{stem}.jpg")
            images.append({"id": number, "file_name": f"{stem}.jpg", "width": 640, "height": 640})
            rows = [[int(value) for value in line.split()] for line in (source/"labels"/f"{stem}.txt").read_text().splitlines() if line.strip()]
            boxes += [{"id": len(boxes) + k, "image_id": number, "category_id": name, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1)*(y2 - y1), "iscrowd": 0}
                      for k, (x1, y1, x2, y2, name) in enumerate(rows)]
        (target/"annotations").mkdir(exist_ok=True)
        described = {"images": images, "annotations": boxes, "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES, 1)]}
        (target/"annotations"/f"instances_{side}.json").write_text(json.dumps(described))


def run_stages(root: Path, source: Path, options: argparse.Namespace) -> dict:
    "A workbench of its own, from the COCO folder to an evaluation; its metrics, intervals and costs."
    os.environ |= {"CVOPS_ROOT": str(root), "CVOPS_TRAIN_THREADS": str(options.threads)}
    os.chdir(root)
    shutil.copyfile(Path(__file__).resolve().parents[1]/"settings.ini", root/"settings.ini")
    (root/"pyproject.toml").write_text('[project]\nname = "pcb"\nversion = "0"\n[tool.nbdev]\nlib_path = "pcb"\nnbs_path = "nbs"\n')
    from cvops_wb.core.processes import hush
    from cvops_wb.data import CurateSpec, IngestSpec, SnapshotSpec, curate, ingest, take_snapshot
    from cvops_wb.learn import EvaluateSpec, TrainSpec, evaluate, train
    hush()
    room = {name: root/"reports"/name for name in ("ingest", "curate", "snapshot", "train", "evaluate")}
    for folder in room.values(): folder.mkdir(parents=True)
    selection = curate(ingest(str(source), IngestSpec(), room["ingest"]), CurateSpec(strategy="given", keep_duplicates=True), room["curate"])
    snapshot = take_snapshot(selection, SnapshotSpec(push=False), room["snapshot"])
    begin, processor = time.perf_counter(), time.process_time()
    spec = TrainSpec(epochs=options.epochs, flips="all", seed=options.seed, track=False, **({"size": 320, "network": "heatmap:16"} if options.quick else {}))
    candidate = train(snapshot, spec, room["train"])
    cost = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - processor}
    judged = evaluate(candidate, EvaluateSpec(split="test", bootstrap=200, track=False), room["evaluate"])
    return {"metrics": judged.metrics, "intervals": judged.intervals, "count": judged.count, "splits": snapshot.splits, "epochs": candidate.spec["epochs"], **cost}


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--quick", action="store_true", help="a tenth of the images, few epochs, half the side: it runs, it says nothing of quality")
    parse.add_argument("--json", type=Path)
    parse.add_argument("--epochs", type=int, default=16)
    parse.add_argument("--threads", type=int, default=0, help="of torch; 0: all cores")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2]/"shared"/"data"/"deeppcb")
    options = parse.parse_args()
    if not options.data.is_dir(): sys.exit(f"the boards are not there: {options.data}")
    if options.quick: options.epochs = 2
    place = options.json.absolute() if options.json else None
    with tempfile.TemporaryDirectory(prefix="deeppcb-") as folder:
        source, root = Path(folder)/"coco", Path(folder)/"bench"
        root.mkdir()
        write_coco(options.data.absolute(), source, 100 if options.quick else 10**6)
        found = run_stages(root, source, options)
        os.chdir("/")
    note = f"{found['count']} held-out images, {found['splits']}, {found['epochs']} epochs, {found['seconds']:.0f} s, {found['cpu_seconds']:.0f} CPU-seconds"
    rows = []
    for name, value in found["metrics"].items():
        if name not in found["intervals"]: continue
        peer, goal, who = PEER.get(name, (None, None, ""))
        rows.append({"measure": name, "ours": round(value, 4), "peer": peer, "peer_name": who, "ratio": round(value/peer, 3) if peer else None, "goal": goal,
                     "met": None if goal is None else bool(value >= goal), "runs": 1, "note": f"95 % {[round(v, 4) for v in found['intervals'][name]]}; {note}"})
    for row in rows: print(f"{row['measure']:<10} {row['ours']:.4f}  goal {row['goal'] or '-'}  {row['note']}")
    if place: place.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__": main()
