"""The reference pages of the API and the command line list every route and every command, as the code has them.

    python -m tests.integration.test_reference_pages

rewrites the lists in the pages.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from controller.api import reference as api
from controller.cli import reference as cli

PAGES = Path(__file__).parents[2] / "docs/reference"
BEGIN, END = "<!-- generated -->", "<!-- end -->"
LISTINGS: Mapping[str, Callable[[], str]] = {"api.md": api.listing, "cli.md": cli.listing}


def with_listing(text: str, made: str) -> str:
    """The page with `made` between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"the page lacks {BEGIN}"
    assert end, f"the page lacks {END}"
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


@pytest.mark.parametrize("page", sorted(LISTINGS))
def test_the_page_lists_what_the_code_has(page: str) -> None:
    text = (PAGES / page).read_text(encoding="utf-8")
    hint = "out of date; run: python -m tests.integration.test_reference_pages"
    assert text == with_listing(text, LISTINGS[page]()), f"{page} is {hint}"


def test_every_command_and_its_help_can_be_shown() -> None:
    found = dict(cli.commands())
    assert {"ferry release publish", "ferry rollout watch", "ferry device token create"} <= found.keys()
    assert all(command.get_short_help_str() for command in found.values())


if __name__ == "__main__":
    for name, listing in LISTINGS.items():
        page_file = PAGES / name
        page_file.write_text(with_listing(page_file.read_text(encoding="utf-8"), listing()), encoding="utf-8")
