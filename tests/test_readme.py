"README.md is what nbs/index.ipynb says, and what it names exists."
import re
from pathlib import Path

from readme import render_readme

REPO = Path(__file__).parents[1]


def test_readme_is_the_index():
    assert (REPO/"README.md").read_text() == render_readme()


def test_what_the_readme_links_to_is_there():
    links = re.findall(r'(?:\]\(|src=")(?!https?:|#)([^)"#]+)', (REPO/"README.md").read_text())
    assert links and [link for link in links if not (REPO/link).exists()] == []


def test_the_two_commands_come_first():
    text = (REPO/"README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("![")
