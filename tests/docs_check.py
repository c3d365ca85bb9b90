"""`make check` runs this: links in the docs lead somewhere, and every module opens with a paragraph.

It reads files only; whether the reference pages tell the truth is tested beside the code they describe.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "controller", "edge_agent", "benchmarks", "tests")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file."""
    text = page.read_text()
    targets = [target.partition("#")[0] for target in LINK.findall(text) if "://" not in target]
    return [f"{page.relative_to(ROOT)}: no such file: {target}" for target in targets if not _exists(page, target)]


def _exists(page: Path, target: str) -> bool:
    return not target or target.startswith("mailto:") or (page.parent / target).exists()


def open_fences(page: Path) -> list[str]:
    """A page whose code blocks do not pair up."""
    return [f"{page.relative_to(ROOT)}: a code block is not closed"] if len(FENCE.findall(page.read_text())) % 2 else []


def silent_modules() -> list[str]:
    """Modules with code and no opening paragraph."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return [f"{path.relative_to(ROOT)}: opens without a paragraph" for path in sorted(files) if _silent(path)]


def _silent(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return bool(tree.body) and ast.get_docstring(tree) is None


def main() -> int:
    """Print what is wrong; the exit status says whether anything is."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    problems = [line for page in pages for line in (*broken_links(page), *open_fences(page))] + silent_modules()
    for line in problems:
        print(line, file=sys.stderr)  # noqa: T201 -- this is a command
    print(f"docs: {len(pages)} pages, {len(problems)} problems")  # noqa: T201
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
