"""Plugin of pytest: the Python blocks of README.md and of docs/ are tests, each page one program, run from its top.

    python -m pytest -p docs.pages --ignore docs/_extensions README.md docs    # part of `make test`

A block that cannot run here is preceded by an HTML comment, which pages do not show: <!-- skip: next "reason" -->.
"""

import importlib
import warnings
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parents[1]


@pytest.fixture
def as_a_reader(monkeypatch, tmp_path):
    """In an empty folder, with the examples at hand; what a page registers is forgotten after the block."""
    registry = importlib.import_module("klcore.backends")
    for name in ("_MODULES", "_libraries", "_loaded"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between other libraries, as within torch.compile
        yield


pytest_collect_file = Sybil(
    path=str(ROOT),
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/decisions/*.md"],
    fixtures=["as_a_reader"],
).pytest()
