"Labels put right by clicks in a notebook's widget: the widget itself, the record, the history, the next stage."
import pytest
from test_data_versions import copy, history  # noqa: F401 - fixtures

from cvops_wb.core.errors import BadInput, UnknownName
from cvops_wb.data import find_snapshot, open_snapshot, read_labels
from cvops_wb.loop import correct_here, find_run


def test_a_widget_corrects_labels_and_takes_them_back(copy):  # noqa: F811
    "Clicks in the widget itself: one version for all that was answered, in the history, adopted by the next stage; undo; an unsaved answer is no correction."
    settings = copy[0]
    first, before = find_snapshot(), open_snapshot(find_snapshot()).table.set_index("id").label
    widget = correct_here(label="apple", by="eva")
    picture, told, names, other, more = widget.children
    click = {button.description: button.click for box in (names, more) for button in box.children}
    shown = picture.value
    click["lime"]()
    assert picture.value != shown and "1 not saved" in told.value
    other.value = "quince"
    click["back"](), click["back"](), click["back"]()
    assert "2 not saved" in told.value and "lime" in told.value
    click["save"]()
    now = open_snapshot(find_snapshot()).table.set_index("id").label
    assert find_snapshot().parent == first.id and sorted(now[now != before]) == ["lime", "quince"] and find_run(settings, "snapshot").record.id == find_snapshot().id
    assert set(read_labels().by) == {"eva"} and "0 not saved" in told.value
    click["plum"]()
    click["undo"]()
    assert "0 not saved" in told.value and len(read_labels()) == 2
    click["undo"]()
    assert (open_snapshot(find_snapshot()).table.set_index("id").label == before).all() and len(read_labels()) == 4
    click["undo"]()
    assert "no label was corrected" in told.value
    other.value = "<img src=x>"
    assert "<img" not in told.value


@pytest.mark.parametrize("what, error", [({"view": "none such"}, UnknownName), ({"label": "quince"}, BadInput), ({"ids": ["zzz"]}, BadInput)])
def test_nothing_to_correct(copy, what, error):  # noqa: F811
    with pytest.raises(error): correct_here(**what)
