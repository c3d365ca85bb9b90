"""Labelled files of this machine: real content whose type the file's ending tells.

They come from the Python installation that runs the demo, so there is something on every machine, and nothing of the
user's is read.
"""

import site
import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

LABEL_OF_SUFFIX = {
    ".c": "c",
    ".css": "css",
    ".h": "c",
    ".html": "html",
    ".js": "javascript",
    ".json": "json",
    ".md": "markdown",
    ".py": "python",
    ".pyc": "pythonbytecode",
    ".so": "elf",
    ".toml": "toml",
    ".whl": "zip",
}
FILES_PER_LABEL_MAX = 16
FILE_BYTES_MIN = 64
SCANNED_FILES_MAX = 50_000


class LabelledFile(msgspec.Struct, frozen=True):
    """A file's content (its first and last 4096 bytes are all that the model sees) and what it is."""

    path: Path
    label: str
    content: bytes


def collect() -> list[LabelledFile]:
    """Up to 16 files of each label, in a stable order, interleaved so that any prefix is a fair sample."""
    found: dict[str, list[LabelledFile]] = {}
    for path in islice(_candidates(), SCANNED_FILES_MAX):
        label = LABEL_OF_SUFFIX.get(path.suffix, "")
        if label and len(found.setdefault(label, [])) < FILES_PER_LABEL_MAX:
            content = path.read_bytes()
            if len(content) >= FILE_BYTES_MIN:
                found[label].append(LabelledFile(path, label, content))
    return [files[index] for index in range(FILES_PER_LABEL_MAX) for files in found.values() if index < len(files)]


def _candidates() -> Iterator[Path]:
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("include"), *site.getsitepackages(), sys.prefix]
    for root in dict.fromkeys(roots):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in LABEL_OF_SUFFIX and path.is_file() and not path.is_symlink():
                yield path
