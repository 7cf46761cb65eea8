"Run the library notebooks as tests, two at a time, and say which one fails: `python tests/notebooks.py [WORD …]`."
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).parents[1]


def check(notebook: Path) -> tuple[Path, float, str]:
    "Path, seconds, and what went wrong."
    begin = time.monotonic()
    command = [Path(sys.executable).parent/"nbdev-test", notebook, "--n-workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return notebook, time.monotonic() - begin, "" if done.returncode == 0 else (done.stdout + done.stderr)[-6000:]


def main(words: list[str]) -> int:
    "0 if all pass."
    notebooks = [p for p in sorted((REPO/"nbs"/"api").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and all(w in str(p) for w in words)]
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for notebook, seconds, error in pool.map(check, notebooks):
            failed += bool(error)
            print(f"{'FAILED' if error else 'ok'}  {seconds:5.1f} s  {notebook.relative_to(REPO)}", flush=True)
            if error: print(error, flush=True)
    print(f"{len(notebooks) - failed} notebooks pass, {failed} fail")
    return int(failed > 0 or not notebooks)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
