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


def run_notebook(notebook: Path, folder: Path) -> None:
    "In a process of its own: the notebook's cells, all that is printed into a file; a second file says that no cell failed."
    from nbdev.test import nbdev_test
    place = os.open(folder/"output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2): os.dup2(place, stream)
    nbdev_test(str(notebook), n_workers=0)      # leaves by SystemExit where a cell fails
    for stream in (sys.stdout, sys.stderr): stream.flush()
    (folder/"passed").touch()
    os._exit(0)     # what native libraries do when they are taken down is not the notebook's


def check(notebook: Path, context) -> tuple[Path, float, str]:
    "Path, seconds, and what went wrong. The child says itself whether it passed: of two threads one may read the status that the other waits for, and gets 255."
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = context.Process(target=run_notebook, args=(notebook, folder))
        child.start()
        child.join()
        said = "" if (folder/"passed").is_file() else f"{(folder/'output').read_text(errors='replace')[-6000:] if (folder/'output').is_file() else ''}\nended with {child.exitcode}"
        return notebook, time.monotonic() - begin, said


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
