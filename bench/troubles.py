"""Five planted troubles on a served grocery model: is each seen, told in words, with the right images, and is a healthy day left alone?

    python bench/troubles.py [WORKBENCH] [--quick] [--json FILE] [--photos DIR] [--only NAME …]

WORKBENCH has a packaged model of the grocery photographs (`cvops package`); one is made, and kept, where none is named. Every trouble runs in a copy of it, with a real service and a real
`cvops monitor`. A day is 400 held-out photographs as they are, drawn with replacement from three cameras, then 300 with the trouble; healthy: 1,000.
The peer's column stays empty: nobody else names images. `quick` stops 100 images after the trouble begins.
"""
import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from parts.shop import make_shop
from PIL import Image, ImageEnhance, ImageFilter

from cvops_wb.core.errors import CvopsError
from cvops_wb.data import WarehouseSpec, make_warehouse
from cvops_wb.serve import Client

REPO = Path(__file__).parents[1]
CVOPS = Path(sys.executable).parent/"cvops"
HEALTHY, STEP = 400, 100


def encode(image):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def darken(image): return ImageEnhance.Brightness(image).enhance(.55)
def blur(image): return image.filter(ImageFilter.GaussianBlur(2.5))
def swap(image): return Image.fromarray(np.asarray(image)[..., ::-1].copy())


CHANGES = {"a dark camera": (darken, "c"), "a blurred camera": (blur, "b"), "red and blue exchanged": (swap, "abc")}
TROUBLES = ["healthy", *CHANGES, "a new product", "a changed mix"]


def read_photos(folder):
    "Held-out photographs with their coarse class."
    names = {row[3]: row[2] for row in (line.split(",") for line in (folder/"classes.csv").read_text().splitlines()[1:])}
    rows = [[part.strip() for part in line.split(",")] for line in (folder/"val.txt").read_text().splitlines() if line.strip()]
    return [(folder/row[0], names[row[2]]) for row in rows]


def draw(trouble, photos, strangers, rng, number):
    "The bytes, the camera, and whether this image belongs to the trouble."
    (path, _), camera, begun = rng.choice(photos), rng.choice("abc"), number >= HEALTHY
    if begun and trouble in CHANGES and camera in CHANGES[trouble][1]:
        return encode(CHANGES[trouble][0](Image.open(path).convert("RGB"))), camera, True
    if begun and trouble == "a new product" and rng.random() < .3: return encode(Image.open(rng.choice(strangers)).convert("RGB")), camera, True
    if begun and trouble == "a changed mix" and rng.random() < .6:
        return rng.choice([photo for photo, label in photos if label in ("Juice", "Milk")]).read_bytes(), camera, True
    return path.read_bytes(), camera, False


def serve(root):
    "A service of the copy on a free port, and its client."
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "CVOPS_SERVE_PORT": str(port), "CVOPS_SERVE_KEEP_SHARE": "1"}
    child = subprocess.Popen([CVOPS, "serve"], cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = Client(f"http://127.0.0.1:{port}")
    for _ in range(120):
        try: return child, client, client.list_models()
        except CvopsError: time.sleep(.5)
    child.send_signal(signal.SIGINT)
    raise SystemExit("the service did not start: run `cvops serve` in the workbench to see why")


def watch(trouble, workbench, photos, strangers, most, folder):
    "What `cvops monitor` says after each hundred images: rows of the bench."
    root, rng, planted, rows = folder/hashlib.sha256(trouble.encode()).hexdigest()[:8], random.Random(trouble), set(), []
    shutil.copytree(workbench, root, symlinks=True)
    child, client, _ = serve(root)
    try:
        for number in range(most):
            data, camera, bad = draw(trouble, photos, strangers, rng, number)
            client.predict(data, camera=f"camera-{camera}")
            if bad: planted.add(hashlib.sha256(data).hexdigest()[:16])
            if (number + 1) % STEP or number + 1 < HEALTHY: continue
            done = subprocess.run([CVOPS, "monitor", "--json"], cwd=root, capture_output=True, text=True)
            if done.returncode: raise SystemExit(done.stderr)
            rows.append((number + 1, json.loads(done.stdout)["stages"][-1]["record"], set(planted)))
    finally:
        client.close()
        child.send_signal(signal.SIGINT)
        child.wait(30)
        shutil.rmtree(root)
    return judge(trouble, rows)


def judge(trouble, rows):
    "Alarms before the trouble, images until it was seen, the share of named images that are planted."
    def row(measure, ours, goal, met, note=""): return {"measure": f"{measure}, {trouble}", "ours": ours, "peer": None, "peer_name": "", "ratio": None, "goal": goal, "met": met, "runs": 1, "note": note}
    early = [record for count, record, _ in rows if record["drifted"] and (trouble == "healthy" or count <= HEALTHY)]
    found = [row("alarms while healthy", len(early), "0", not early, "; ".join(record["causes"][0]["words"] for record in early if record["causes"]))]
    if trouble == "healthy": return found
    seen = [(count - HEALTHY, record, planted) for count, record, planted in rows if count > HEALTHY and record["drifted"]]
    if not seen: return [*found, row("images until it is seen", None, "300", False, "not seen")]
    count, record, planted = seen[0]
    cause = record["causes"][0]
    right = float(np.mean([sample in planted for sample in cause["samples"]]))
    return [*found, row("images until it is seen", count, "<= 300", True, cause["words"]), row("named images that are planted", round(right, 3), ">= 0.8", right >= .8, f"{len(cause['samples'])} images")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workbench", type=Path, nargs="?")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--photos", type=Path, default=REPO.parent/"shared"/"data"/"grocery")
    parser.add_argument("--only", nargs="*", default=TROUBLES, choices=TROUBLES)
    given = parser.parse_args()
    rows, workbench = [], given.workbench or make_shop(given.photos)
    with TemporaryDirectory(prefix="cvops-troubles-") as folder:
        make_warehouse(Path(folder)/"strangers", WarehouseSpec(count=60, broken=0.))
        strangers, photos = sorted((Path(folder)/"strangers").rglob("*.jpg")), read_photos(given.photos)
        for trouble in given.only:
            most = HEALTHY + STEP if given.quick else 1000 if trouble == "healthy" else HEALTHY + 3*STEP
            for row in watch(trouble, workbench.resolve(), photos, strangers, most, Path(folder)):
                rows.append(row)
                print(f"| {row['measure']} | {row['ours']} | {row['goal']} | {'yes' if row['met'] else '**no**'} | {row['note']} |", flush=True)
    if given.json: given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__": main()
