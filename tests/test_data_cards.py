"Data cards: the facts are those of the table, and names from outside are text in Markdown, in YAML and in HTML."
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from test_data_snapshots import room
from test_data_versions import change, copy, history  # noqa: F401 - fixtures

from cvops_wb.data.snapshots import SnapshotSpec, open_snapshot, take_snapshot
from cvops_wb.data.versions.datacards import describe_snapshot, list_sections, quote_markdown, write_card

HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "a|b\n---\nid: stolen", "![](http://a.b/c.png)", "'; --",
           "`code` **bold**", "\u2028line\u0085", "{{ 7*7 }} $x$", "- no", "null", "😀 é"]


class Page(HTMLParser):
    "What a browser would see: tags, addresses, handlers."
    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.handlers = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


@pytest.fixture
def hostile(copy):  # noqa: F811
    "A snapshot whose classes and file names are chosen by somebody who means harm."
    settings, first, _ = copy
    def edit(table):
        names = [HOSTILE[k % len(HOSTILE)] for k in range(len(table))]
        return table.assign(label=names, sources=[[f"{name}/x.jpg"] for name in names], labeled_by=names, camera=names)
    from cvops_wb.core.records import Selection
    selection = change(settings, Selection("", first.samples, 0, 0, {}, {}, 0, "", {}), "curate-3", edit)
    return settings, take_snapshot(selection, SnapshotSpec(HOSTILE[0], push=False), room(settings, "snapshot-3"))


def test_the_facts(copy):  # noqa: F811
    settings, first, _ = copy
    facts, table = describe_snapshot(first), open_snapshot(first).table
    assert facts["images"] == 40 == sum(facts["splits"].values()) and facts["classes"] == {"apple": 10, "lemon": 10, "lime": 10, "plum": 10}
    assert facts["labels_by"] == {"folder": 40} and facts["bytes"] == table["bytes"].sum() and facts["licence"] == ""
    assert {name: sum(n.values()) for name, n in facts["class_by_split"].items()} == first.splits
    (settings.versioned/"LICENSE").write_text("CC-BY 4.0\n")
    assert describe_snapshot(first)["licence"] == "CC-BY 4.0"


def test_boxes_are_counted_by_class(copy):  # noqa: F811
    "Of a detector's data a card says which classes are in how many images, and how many objects that is; an image without any is not hidden."
    from cvops_wb.core.records import Selection
    from cvops_wb.data.formats.objects import dump_objects, make_object
    settings, first, _ = copy
    def edit(table):
        names = [["cat"], ["cat", "cat", "dog"], []]
        return table.assign(label="", labeled_by="", objects=[dump_objects([make_object(name, [1, 1, 9, 9]) for name in names[k % 3]]) for k in range(len(table))])
    selection = change(settings, Selection("", first.samples, 0, 0, {}, {}, 0, "", {}), "curate-4", edit)
    snapshot = take_snapshot(selection, SnapshotSpec("boxes", push=False), room(settings, "snapshot-4"))
    facts = describe_snapshot(snapshot)
    assert facts["classes"] == {"cat": 27, "dog": 13, "(no label)": 13} and facts["objects"] == {"cat": 40, "dog": 13}
    assert sum(counts["cat"] for counts in facts["class_by_split"].values()) == 27 and "(no label of the whole image)" in facts["labels_by"]
    row = next(row for row in list_sections(facts)["Classes and splits"] if row["class"] == "(no label)")
    assert row["images"] == sum(row[split] for split in facts["class_by_split"]) == 13 and row["objects"] == 0


def test_the_stage_writes_the_card(copy):  # noqa: F811
    settings, first, _ = copy
    folder = settings.reports/"snapshot-1"
    assert {p.name for p in folder.glob("card*")} == {"card.md", "card.html", "card-classes.png", "card-samples.png", "card-worst.png", "card-map.png"}
    notebook = json.loads((Path(__file__).parents[1]/"nbs"/"runs"/"04_snapshot.ipynb").read_text())
    assert any("](card.html)" in "".join(cell["source"]) for cell in notebook["cells"])
    front = yaml.safe_load((folder/"card.md").read_text().split("---\n")[1])
    assert front["id"] == first.id and front["classes"]["apple"] == 10


def test_hostile_names_in_html(hostile):
    settings, snapshot = hostile
    page = Page()
    page.feed(write_card(snapshot, settings.cache/"card").read_text())
    assert "script" not in page.tags and page.handlers == [] and page.tags.count("img") == 4
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)


def test_hostile_names_in_markdown(hostile):
    from markdown_it import MarkdownIt
    settings, snapshot = hostile
    write_card(snapshot, settings.cache/"card")
    text = (settings.cache/"card"/"card.md").read_text()
    _, front, body = text.split("---\n", 2)
    read = yaml.safe_load(front)
    assert read["id"] == snapshot.id and set(read["classes"]) == {part for name in HOSTILE for part in name.split("|")} and read["message"] == HOSTILE[0]
    page = Page()
    page.feed(MarkdownIt("commonmark").enable("table").render(body))
    assert set(page.tags) <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "img"}
    assert sorted(page.addresses) == ["card-classes.png", "card-map.png", "card-samples.png", "card-worst.png"] and page.handlers == []


@pytest.mark.parametrize("text", HOSTILE)
def test_quoting_keeps_one_line(text): assert "\n" not in quote_markdown(text) and "<" not in quote_markdown(text)
