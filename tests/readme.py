"README.md from nbs/index.ipynb: its Markdown cells, with paths that hold at the top of the project."
import re
import sys
from pathlib import Path

from nbconvert import MarkdownExporter

REPO = Path(__file__).parents[1]


def render_readme() -> str:
    "The text that README.md must have."
    exporter = MarkdownExporter(exclude_input=True, exclude_output=True)
    text, _ = exporter.from_filename(str(REPO/"nbs"/"index.ipynb"))
    text = re.sub(r'(\]\(|src=")(?!https?:|#|/)(?!\.\./)', r"\1nbs/", text)
    return re.sub(r'(\]\(|src=")\.\./', r"\1", text).strip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv: sys.exit(render_readme() != (REPO/"README.md").read_text() and "README.md is not nbs/index.ipynb: run `make notebooks`")
    (REPO/"README.md").write_text(render_readme())
