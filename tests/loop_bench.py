"Tiny run notebooks for the tests of the loop."
import json
from pathlib import Path
from textwrap import dedent

# A batch in a second: writes one file, prints, and can be told to misbehave by `do`.
INGEST = '''
    from pathlib import Path
    from cvops_wb.core.places import name_final
    from cvops_wb.core.records import Batch
    from cvops_wb.loop import open_run
    run = open_run("ingest", out)
    print("reading", source)
'''
PARAMETERS = '''
    source: str = "synth"       # a folder, or `synth`
    count: int = 3
    rate: float = 0.5
    maybe: int | None = None
    loud: bool = False
    out: str = ""
'''
MAKE = '''
    (run.out/"samples.txt").write_text("x"*count)
    batch = Batch(source, "folder", name_final(run.out/"samples.txt"), count, count, 0, {"tea": count})
'''
FINISH = "run.finish(batch)"
CURATE = ['''
    from cvops_wb.core.records import Selection
    from cvops_wb.loop import open_run
    run = open_run("curate", out)
    taken = run.load("batch", batch)
''', '''
    selection = Selection(batch, "x", taken.count, 0, {}, {"train": taken.count}, 1, split, dict(taken.classes))
''', "run.finish(selection)"]


def write_notebook(path: Path, parameters: str, *cells: str) -> Path:
    "A run notebook: a title, the tagged cell, the others."
    code = [dict(cell_type="code", id=f"c{k}", metadata={"tags": ["parameters"]} if k == 0 else {}, outputs=[], execution_count=None, source=dedent(text).strip())
            for k, text in enumerate([parameters, *cells])]
    title = dict(cell_type="markdown", id="t", metadata={}, source=f"# {path.stem}\n\n> A tiny one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"cells": [title, *code], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


def write_ingest(root: Path, *extra: str, name: str = "01_ingest") -> Path:
    "The ingest notebook, with cells between making and finishing."
    return write_notebook(root/"nbs"/"runs"/f"{name}.ipynb", PARAMETERS, INGEST, MAKE + "    (rate, maybe, loud)", *extra, FINISH)


def write_curate(root: Path) -> Path:
    "A notebook that starts from a batch."
    return write_notebook(root/"nbs"/"runs"/"02_curate.ipynb", 'batch: str = ""\nsplit: str = "grouped"\nout: str = ""', *CURATE)
