"The contract of every label tool, and the errors that a simulated one makes."
import pandas as pd
import pytest

from cvops_wb.core.errors import BadInput, UnknownName
from cvops_wb.label import ANSWER_COLUMNS, label_tools

TRUTH = {f"{k:04}": "abc"[k % 3] for k in range(600)}


class People(dict):
    "What people do with a tool before they answer: nothing where it answers by itself."
    def fill(self, tool, asked):
        for id in asked["id"] if hasattr(tool, "answer") else (): tool.answer(id, self[id])


@pytest.mark.parametrize("name", list(label_tools))
def test_a_tool_keeps_the_contract(name, tmp_path):
    tool = label_tools[name](tmp_path) if name == "files" else label_tools[name](TRUTH)
    asked = pd.DataFrame({"id": sorted(TRUTH)[:50]})
    assert tool.send(asked) == 50 and tool.send(asked) == 0
    People(TRUTH).fill(tool, asked)
    answers = tool.fetch()
    assert (answers["label"] == answers["id"].map(TRUTH)).all()
    assert list(answers) == ANSWER_COLUMNS and set(answers["id"]) == set(asked["id"])


@pytest.mark.parametrize("rate", [0., .1, .5])
def test_simulated_people_err_at_their_rate(rate):
    tool = label_tools["simulated"](TRUTH, error_rate=rate, seed=1)
    tool.send(pd.DataFrame({"id": list(TRUTH)}))
    answers = tool.fetch()
    assert abs((answers["label"] != answers["id"].map(TRUTH)).mean() - rate) <= .06


def test_unknown_things_are_refused():
    with pytest.raises(UnknownName): label_tools["simulatd"]
    with pytest.raises(BadInput): label_tools["simulated"](TRUTH).send(pd.DataFrame({"id": ["nobody"]}))
