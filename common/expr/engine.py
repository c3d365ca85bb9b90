"""The CEL package without its command line, which it would import along with 25 MB of terminal toolkits."""

import sys
from types import ModuleType

sys.modules.setdefault("cel.cli", ModuleType("cel.cli"))

import cel  # noqa: E402

__all__ = ["cel"]
