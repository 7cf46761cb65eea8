"""Run notebooks beside papermill's command and nbclient: ten stages, one warm stage, two hundred cells, and whether the same comes out.

    python bench/notebook.py [--quick] [--json FILE] [--runs N]

The notebooks are made here. Ours goes through `run_stage` in a process that has run one stage before: with the key, the record, the
hashes and the HTML page that papermill does not make. Papermill is its command, as people and schedulers call it, once a notebook;
nbclient is `jupyter execute`, likewise. A second measure gives papermill our advantage, one process that is warm (`papermill in one
process`). All are interleaved, and the medians are told.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO/"tests")]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONPATH": str(REPO)}


def make_bench(root: Path) -> None:
    "A workbench with a short stage and one of two hundred cells."
    from loop_bench import write_ingest
    shutil.copy(REPO/"settings.ini", root)
    write_ingest(root, "print('counted', count)")
    write_ingest(root, *[f"x{k} = {k}\nprint('cell', x{k})" for k in range(196)], name="02_explore")
    long = root/"nbs"/"runs"/"02_explore.ipynb"
    long.write_text(long.read_text().replace('open_run(\\"ingest\\"', 'open_run(\\"explore\\"'))
    os.environ["CVOPS_ROOT"] = str(root)
    os.chdir(root)


def run_ours(stage: str, counts: list[int]) -> Path:
    "Stages through run_stage; the last executed notebook."
    from cvops_wb.loop import run_stage
    for count in counts: run = run_stage(stage, {"count": count}, force=True).envelope.run
    return Path("reports")/run/"notebook.ipynb"


def run_papermill(stage: str, counts: list[int]) -> Path:
    "The papermill command, once a stage."
    notebook, out = next(Path("nbs/runs").glob(f"*_{stage}.ipynb")), Path("papermill.ipynb")
    for count in counts:
        shutil.rmtree("reports/peer", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "papermill", notebook, out, "-y", json.dumps(all_parameters(stage, count)), "--no-progress-bar", "-k", "python3"],
                       check=True, capture_output=True, env=with_context(stage, count))
    return out


def run_inside(stage: str, counts: list[int]) -> Path:
    "papermill.execute_notebook in this process, which has imported it."
    import papermill
    notebook, out = next(Path("nbs/runs").glob(f"*_{stage}.ipynb")), Path("inside.ipynb")
    for count in counts:
        os.environ["CVOPS_CONTEXT"] = with_context(stage, count)["CVOPS_CONTEXT"]
        shutil.rmtree("reports/peer", ignore_errors=True)
        papermill.execute_notebook(str(notebook), str(out), all_parameters(stage, count), progress_bar=False, kernel_name="python3")
    os.environ.pop("CVOPS_CONTEXT")
    return out


def run_nbclient(stage: str, counts: list[int]) -> Path:
    "`jupyter execute`, with the parameters written into a copy beforehand, since it takes none."
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    for count in counts:
        shutil.rmtree("reports/peer", ignore_errors=True)
        node = load_notebook_node(str(next(Path("nbs/runs").glob(f"*_{stage}.ipynb"))))
        nbformat.write(parameterize_notebook(node, all_parameters(stage, count)), "nbclient.ipynb")
        subprocess.run([sys.executable, "-m", "jupyter", "execute", "--inplace", "nbclient.ipynb"], check=True, capture_output=True, env=with_context(stage, count))
    return Path("nbclient.ipynb")


def all_parameters(stage: str, count: int) -> dict:
    "Every parameter, as our runner gives them."
    from cvops_wb.core.settings import load_settings
    from cvops_wb.loop.runner import prepare_run
    return {**prepare_run(load_settings(), stage, {"count": count}).parameters, "out": "reports/peer"}


def with_context(stage: str, count: int) -> dict[str, str]:
    "What our runner tells a notebook, so that the peers run the same cells."
    from cvops_wb.core.settings import load_settings
    from cvops_wb.loop.runner import prepare_run
    order = prepare_run(load_settings(), stage, {"count": count})
    context = {"run": order.run, "stage": stage, "key": order.key.digest, "parameters": order.parameters, "facts": order.key.facts}
    return {**ENVIRONMENT, "CVOPS_CONTEXT": json.dumps(context), "CVOPS_ROOT": os.environ["CVOPS_ROOT"]}


def join_pieces(outputs: list[dict]) -> list[dict]:
    "Neighbouring pieces of one stream as one: where a kernel cuts its text is chance, ours joins what it cut and papermill does not."
    joined = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream" and output["name"] == joined[-1]["name"]:
            joined[-1]["text"] = "".join([*joined[-1]["text"], *output["text"]]).splitlines(keepends=True)
        else: joined.append(output)
    return joined


def plain(path: Path) -> str:
    "The executed notebook without ids, times, the folder's name, and the places where a stream was cut."
    notebook = json.loads(path.read_text())
    notebook["metadata"].pop("papermill", None)
    for cell in notebook["cells"]:
        cell.pop("id", None)
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
        if "outputs" in cell: cell["outputs"] = join_pieces(cell["outputs"])
    text = json.dumps(notebook, sort_keys=True)
    return re.sub(r"reports/(peer|[\w.-]+\.part)", "reports/OUT", re.sub(r"<th>took</th><td>[\d.]+ s", "", text))


def clock(action, *arguments) -> tuple[float, Path]:
    "Seconds, and what came back."
    begin = time.perf_counter()
    found = action(*arguments)
    return time.perf_counter() - begin, found


def row(measure, ours, peer, name, goal, met, runs, note="") -> dict:
    "One line of the table."
    ratio = None if peer is None else (peer/ours if goal.startswith(">=") else ours/peer)
    return {"measure": measure, "ours": round(ours, 4), "peer": peer and round(peer, 4), "peer_name": name, "ratio": ratio and round(ratio, 3),
            "goal": goal, "met": met(ratio) if ratio else met(ours), "runs": runs, "note": note}


def measure(runs: int, stages: int, cells: bool) -> list[dict]:
    "All rows."
    peers = {"papermill command": run_papermill, "papermill in one process": run_inside, "jupyter execute (nbclient)": run_nbclient}
    run_ours("ingest", [0])
    taken, same = {}, {}
    for turn in range(runs):
        for stage, counts in (("ingest", [turn*100 + k + 1 for k in range(stages)]), *([("explore", [turn + 1])] if cells else [])):
            for name, action in {"ours": run_ours, **peers}.items():
                seconds, path = clock(action, stage, counts)
                taken.setdefault((stage, name), []).append(seconds)
                text = plain(path)
                if name == "ours": same["ours"] = text
                elif name != "jupyter execute (nbclient)": same.setdefault(stage, []).append(text == same["ours"])
    middle = {key: statistics.median(values) for key, values in taken.items()}
    one, load = middle["ingest", "ours"]/stages, f"load {os.getloadavg()[0]:.1f}"
    rows = [row("seconds a stage, warm", one, None, "", "<= 0.3", lambda v: v <= .3, runs, f"{stages} stages; {load}")]
    for name in peers: rows.append(row(f"seconds for {stages} stages", middle["ingest", "ours"], middle["ingest", name], name, ">= 8 x faster", lambda v: v >= 8, runs, load))
    for name in peers if cells else (): rows.append(row("seconds for 200 cells", middle["explore", "ours"], middle["explore", name], name, "<= 0.25 x", lambda v: v <= .25, runs, load))
    for stage in ("ingest", "explore") if cells else ("ingest",):
        rows.append(row(f"same notebook, {stage}", float(all(same[stage])), None, "papermill", "= 1, ids and times apart", lambda v: v == 1, runs))
    return rows


def main() -> int:
    "0 when it measured."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: one turn of four stages, and the 200 cells once")
    parser.add_argument("--json")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        make_bench(Path(folder))
        rows = measure(1 if options.quick else options.runs, 4 if options.quick else 10, True)
        os.chdir("/")
    print("| measure | ours | peer | | ratio | goal | met | note |\n|---|---|---|---|---|---|---|---|")
    for r in rows: print("| " + " | ".join("" if r[k] is None else str(r[k]) for k in ("measure", "ours", "peer", "peer_name", "ratio", "goal", "met", "note")) + " |")
    if options.json: Path(options.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__": sys.exit(main())
