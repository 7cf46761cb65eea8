"Run the library notebooks as tests, two at a time, and say which one fails: `python tests/notebooks.py [WORD …]`."
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).parents[1]
# What most notebooks import is imported once; each notebook then runs in a fork of that process, so that none sees another.
COMMON = ["nbdev.test", "IPython", "numpy", "pyarrow.parquet", "pandas", "PIL.Image", "matplotlib.pyplot", "torchvision", "cv2", "numba", "onnxruntime", "sklearn.metrics", "scipy.stats"]


def run_notebook(notebook: Path, output: str) -> None:
    "In a process of its own: the notebook's cells, all that is printed into a file; ends with status 1 where a cell fails."
    from nbdev.test import nbdev_test
    place = os.open(output, os.O_WRONLY)
    for stream in (1, 2): os.dup2(place, stream)
    nbdev_test(str(notebook), n_workers=0)      # leaves by SystemExit where a cell fails
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(0)     # what native libraries do when they are taken down is not the notebook's


def check(notebook: Path, context) -> tuple[Path, float, str]:
    "Path, seconds, and what went wrong."
    begin = time.monotonic()
    with tempfile.NamedTemporaryFile(suffix=".txt") as output:
        child = context.Process(target=run_notebook, args=(notebook, output.name))
        child.start()
        child.join()
        return notebook, time.monotonic() - begin, "" if child.exitcode == 0 else f"{Path(output.name).read_text(errors='replace')[-6000:]}\nended with {child.exitcode}"


def main(words: list[str]) -> int:
    "0 if all pass."
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    os.chdir(REPO)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(COMMON)
    notebooks = [p for p in sorted((REPO/"nbs"/"api").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and all(w in str(p) for w in words)]
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for notebook, seconds, error in pool.map(lambda p: check(p, context), notebooks):
            failed += bool(error)
            print(f"{'FAILED' if error else 'ok'}  {seconds:5.1f} s  {notebook.relative_to(REPO)}", flush=True)
            if error: print(error, flush=True)
    print(f"{len(notebooks) - failed} notebooks pass, {failed} fail")
    return int(failed > 0 or not notebooks)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
