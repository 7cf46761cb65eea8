"Evidently's page: mended, safe, self-contained, and drawn."
import json

import pytest
from watch_bench import rename, take_picture

from cvops_wb.core.errors import BadInput, ToolFailed
from cvops_wb.watch.drift import make_window
from cvops_wb.watch.reports import mend_html, restore_lists, write_evidently

HOSTILE = ("</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=2>", "![x](http://example.com/x.png)", "{{7*7}}\u2028\"'`<!--")
PAGE = "<html><head></head><script>\n var m = {0};\n    var additional_graphs_m = {1};\n</script></html>"


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    "A report on a dark window whose classes and columns have hostile names; half of the labels are known."
    reference, window = (rename(f, HOSTILE) for f in (make_window(250, seed=1), make_window(400, seed=2, darker=.4)))
    for frame in (reference, window): frame[HOSTILE[0]], frame[HOSTILE[1]], frame["<b>x</b>"] = frame["contrast"]*2, frame["brightness"], frame["predicted"]
    window.loc[::2, "label"] = ""
    return write_evidently(reference, window, tmp_path_factory.mktemp("evidently")/"evidently.html", title=HOSTILE[0])


@pytest.mark.parametrize("value, want", [
    ({"dtype": "i1", "bdata": "AQID"}, [1, 2, 3]), ({"a": [{"dtype": "i1", "bdata": "AQIDBA==", "shape": "2, 2"}]}, {"a": [[[1, 2], [3, 4]]]}),
    ({"dtype": "f4", "bdata": "AACAPw=="}, [1.]), ({"dtype": "x"}, {"dtype": "x"}), ([None, "bdata", 1.5], [None, "bdata", 1.5]),
])
def test_lists_come_back(value, want): assert restore_lists(value) == want


@pytest.mark.parametrize("name", HOSTILE)
def test_the_data_cannot_leave_their_script(name):
    mended = mend_html(PAGE.replace("{0}", json.dumps({name: 1})).replace("{1}", json.dumps({"x": name})))
    data = mended[mended.index("var m = "):mended.rindex("</script>")]
    assert "<" not in data and ">" not in data and json.loads(data[8:data.index(";\n")]) == {name: 1}


@pytest.mark.parametrize("text", ["", "<html>", "<script>var a = {}</script>"])
def test_another_page_is_refused(text):
    with pytest.raises(ToolFailed): mend_html(text)


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(BadInput): write_evidently(make_window(5)[["id"]], make_window(5)[["id"]], tmp_path/"x.html")


@pytest.mark.slow
def test_the_file(page):
    text = page.read_text()
    assert "bdata" not in text and len(text) < 6e6
    assert not any(name in text for name in HOSTILE[:2]) and "Content-Security-Policy" in text


@pytest.mark.slow
@pytest.mark.browser
def test_it_draws_and_asks_nobody(page, tmp_path):
    def look(tab):
        tab.wait_for_function("document.querySelectorAll('.js-plotly-plot').length > 8")
        drawn = "[...document.querySelectorAll('.js-plotly-plot')].filter(p => [...p.querySelectorAll('.plot path, .plot image')].some(e => e.tagName == 'image' || (e.getAttribute('d') || '').length > 10)).length"
        tab.wait_for_function(f"{drawn} > 8")
        return tab.evaluate(f"[document.querySelectorAll('.js-plotly-plot').length, {drawn}, window.hacked ?? 0, document.title]"), tab.inner_text("body")
    asked, errors, ((plots, drawn, hacked, title), text) = take_picture(page.as_uri(), tmp_path/"evidently.png", height=1600, before=look)
    assert drawn == plots >= 10 and hacked == 0 and title == HOSTILE[0] and errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert "Dataset Drift is detected" in text and "Accuracy" in text and HOSTILE[0] in text


@pytest.mark.slow
def test_its_verdict_is_not_hasty():
    # Evidently's own chi-square calls every third pair of equal samples different; the one that we register does not.
    import numpy as np
    import pandas as pd

    from cvops_wb.watch.reports import judge_categories
    rng = np.random.default_rng(0)
    draws = [(pd.Series(rng.choice(4, 400)), pd.Series(rng.choice(4, 1500))) for _ in range(200)]
    assert sum(judge_categories(*pair, None, .01)[1] for pair in draws) <= 8
