"""Our three top-level packages have generic names, so nobody else may own them and they must come from one place."""

from importlib import metadata
from pathlib import Path

import common
import controller
import edge_agent

OURS = ("common", "controller", "edge_agent")


def test_the_three_packages_share_one_root() -> None:
    roots = {Path(package.__file__ or "").parent.parent for package in (common, controller, edge_agent)}
    assert len(roots) == 1


def test_no_other_distribution_owns_them() -> None:
    owners = metadata.packages_distributions()
    for name in OURS:
        assert set(owners.get(name, ["edgeferry"])) == {"edgeferry"}, f"{name} is also shipped by {owners[name]}"


def test_every_test_folder_is_a_package() -> None:
    tests = Path(__file__).parent.parent
    folders = {path.parent for path in tests.rglob("test_*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
