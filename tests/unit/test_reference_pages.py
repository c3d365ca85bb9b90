"""The generated reference pages say what the code says."""

from pathlib import Path

import pytest

from tests.reference_pages import pages


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.name)
def test_the_page_is_current(path: Path) -> None:
    assert path.read_text() == pages()[path], "run `python -m tests.reference_pages`"
