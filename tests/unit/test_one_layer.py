"""On the device everything that changes the disk goes through `common.durable`, or is SQLite's: read in the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import edge_agent

ROOT = Path(edge_agent.__file__).parent
CHANGES = {
    "fsync",
    "ftruncate",
    "hardlink_to",
    "link",
    "mkdir",
    "makedirs",
    "pwrite",
    "rename",
    "rmdir",
    "rmtree",
    "symlink_to",
    "touch",
    "truncate",
    "unlink",
    "write_bytes",
    "write_text",
}
EXCUSED = {("running.py", "write_text"): "the process id in the lock file is for people only"}


def test_nothing_else_changes_the_disk() -> None:
    found = {
        (str(path.relative_to(ROOT)), call)
        for path in ROOT.rglob("*.py")
        for call in _changes(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(EXCUSED), "use common.durable"


def _changes(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        on = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        if name in CHANGES or (on == "os" and name == "replace"):
            yield name
        modes = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if name == "open" and on != "os" and any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes):
            yield f"open for writing: {modes}"


def test_a_change_is_seen() -> None:
    source = "path.open('wb')\nos.replace(a, b)\nPath('x').unlink()\ntext.replace('a', 'b')\npath.open('rb')"
    assert list(_changes(ast.parse(source))) == ["open for writing: ['wb']", "replace", "unlink"]
