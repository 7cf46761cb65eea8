"Parameters are strict: what is not declared, or of another type, is an error before anything starts."
import pytest
from loop_bench import write_ingest, write_notebook

from cvops_wb.core.errors import BadInput, CvopsError, UnknownName, WrongUsage
from cvops_wb.loop.stages import (
    BadParameter,
    UnknownParameter,
    check_parameters,
    find_stage,
    list_stages,
    read_parameters,
    read_stage,
)

CELL = 'name: str = "a"\ncount: int = 3\nrate: float = 0.5\nloud: bool = False\nmaybe: int | None = None\nout: str = ""'


@pytest.fixture
def stage(workbench): return read_stage(write_notebook(workbench.root/"nbs/runs/05_train.ipynb", CELL, "name, count, rate, loud, maybe"))


@pytest.mark.parametrize("given, want", [
    ({}, {"name": "a", "count": 3, "rate": .5, "loud": False, "maybe": None}),
    ({"count": "7"}, {"count": 7}), ({"count": "1_000"}, {"count": 1000}), ({"count": " -2 "}, {"count": -2}), ({"count": 7}, {"count": 7}),
    ({"rate": "1e-3"}, {"rate": .001}), ({"rate": 1}, {"rate": 1.}), ({"rate": "2"}, {"rate": 2.}),
    ({"loud": "yes"}, {"loud": True}), ({"loud": "OFF"}, {"loud": False}), ({"loud": True}, {"loud": True}),
    ({"maybe": "4"}, {"maybe": 4}), ({"maybe": "none"}, {"maybe": None}), ({"maybe": None}, {"maybe": None}),
    ({"name": "none"}, {"name": "none"}), ({"name": "3"}, {"name": "3"}), ({"name": ""}, {"name": ""}), ({"name": "a=b"}, {"name": "a=b"}),
])
def test_what_is_taken(stage, given, want):
    taken = check_parameters(stage, given)
    assert {k: taken[k] for k in want} == want and set(taken) == {"name", "count", "rate", "loud", "maybe"}
    assert all(type(taken[k]) is type(want[k]) for k in want)


@pytest.mark.parametrize("given, error, says", [
    ({"cuont": "7"}, UnknownParameter, "did you mean 'count'?"),
    ({"xyzzy": "7"}, UnknownParameter, "known: count, loud, maybe, name, rate"),
    ({"out": "/tmp"}, WrongUsage, "set by the runner"),
    ({"count": "three"}, BadParameter, "must be int"), ({"count": "3.0"}, BadParameter, "must be int"), ({"count": ""}, BadParameter, "must be int"),
    ({"count": 3.}, BadParameter, "must be int"), ({"count": True}, BadParameter, "must be int"), ({"count": None}, BadParameter, "must be int"),
    ({"rate": "fast"}, BadParameter, "must be float"), ({"rate": "nan"}, BadParameter, "must be float"), ({"rate": float("inf")}, BadParameter, "must be float"),
    ({"rate": True}, BadParameter, "must be float"),
    ({"loud": "maybe"}, BadParameter, "must be bool"), ({"loud": 1}, BadParameter, "must be bool"), ({"loud": 0.}, BadParameter, "must be bool"),
    ({"maybe": "x"}, BadParameter, "must be int | None"), ({"maybe": [1]}, BadParameter, "must be int | None"),
    ({"name": 5}, BadParameter, "must be str"), ({"name": None}, BadParameter, "must be str"),
])
def test_what_is_refused(stage, given, error, says):
    with pytest.raises(error, match=says.replace("|", r"\|").replace("?", r"\?")) as caught: check_parameters(stage, given)
    assert caught.value.exit_code == 2 and caught.value.fix


@pytest.mark.parametrize("line", ["count = 3", "count: int", "count: int = 1 + 1", "names: list = []", "count: int = 'x'", "import os", "for", "a: int | str = 1",
                                  "x: float = float('nan')", "d: dict = dict(a=1)"])
def test_a_cell_that_declares_nothing_sure(line):
    with pytest.raises(CvopsError): read_parameters(line, "train")


def test_comments_are_help():
    found = read_parameters('a: str = "#1"   # what it is # indeed\nb: int = -1', "x")
    assert found["a"].default == "#1" and found["a"].help == "what it is # indeed" and found["b"].default == -1


@pytest.mark.parametrize("name", ["ingest", "01_ingest", "01_ingest.ipynb", "nbs/runs/01_ingest.ipynb"])
def test_a_notebook_has_many_names(workbench, name):
    write_ingest(workbench.root)
    assert find_stage(workbench, name).name == "ingest"


def test_notebooks_that_cannot_be_stages(workbench):
    write_ingest(workbench.root)
    with pytest.raises(UnknownName, match="did you mean 'ingest'"): find_stage(workbench, "inget")
    (workbench.root/"nbs/runs/02_curate.ipynb").write_text("{")
    with pytest.raises(BadInput, match="is not a notebook"): find_stage(workbench, "curate")
    (workbench.root/"nbs/runs/02_curate.ipynb").write_text('{"cells": []}')
    with pytest.raises(BadInput, match="0 cells tagged"): find_stage(workbench, "curate")
    write_ingest(workbench.root, name="07_ingest")
    with pytest.raises(BadInput, match="two run notebooks"): list_stages(workbench)


def test_threads_may_parse_at_once():
    "CPython 3.11 fails now and then when they do (SystemError: AST constructor recursion depth mismatch): it is done one by one."
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from cvops_wb.loop.stages import parse_python
    texts = [path.read_text() for path in sorted((Path(__file__).parents[1]/"cvops_wb").rglob("*.py"))]
    with ThreadPoolExecutor(8) as pool: assert len(list(pool.map(parse_python, texts*2))) == 2*len(texts)
