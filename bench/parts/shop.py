"""A workbench of the grocery photographs for the benches that need a served model: made once by the commands that a person types, and kept.

    from parts.shop import make_shop
    root = make_shop(photos)      # two registered versions, the better one champion and packaged
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
CVOPS = Path(sys.executable).parent/"cvops"
EPOCHS = (16, 24)    # of the two versions: the second is a little better, so that the gate lets it pass


def call(root, *words):
    "One command in the workbench: its document."
    print("shop: cvops", *words, file=sys.stderr, flush=True)
    done = subprocess.run([CVOPS, *words, "--json"], cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ, "CVOPS_ROOT": str(root)})
    if done.returncode: raise SystemExit(f"cvops {' '.join(words)} ended with {done.returncode}: {done.stdout[-2000:]}")
    return json.loads(done.stdout)


def make_shop(photos):
    "A folder with two versions (43 classes, 96 px, 16 and 24 epochs); made anew where an earlier attempt did not come to its end."
    root = REPO/".cvops"/"bench"/"shop"
    if (root/"made").is_file(): return root
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([CVOPS, "init", root], check=True, stdout=subprocess.DEVNULL)
    for words in (["ingest", str(photos), "-p", "label=coarse"], ["curate", "-p", "split=given"], ["snapshot", "-m", "grocery"]): call(root, *words)
    for epochs in EPOCHS:
        call(root, "train", "-p", f"epochs={epochs}", "-p", "size=96")
        for word in ("evaluate", "register"): call(root, word)
    call(root, "package")
    (root/"made").touch()
    return root
