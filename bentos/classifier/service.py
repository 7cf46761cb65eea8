"""The classifier as a BentoML service. What it does stands in cvops_wb.serve; this file names it and its folder.

`cvops package` lays the model, service.json and settings.ini beside it and builds the bento; `cvops serve` runs it.
"""
from pathlib import Path

from cvops_wb.serve import make_service

Classifier = make_service("classifier", Path(__file__).parent)
