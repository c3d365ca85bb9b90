"""Whether this device can take a release at all, asked of its manifest before its files are downloaded.

What the owner does not allow is a verdict: the order is rejected, and a newer one may try again. A plug-in that is not
installed is none: the update waits, because somebody may install it.
"""

from common.artifact import Variant
from common.pipelines.installed import check_installed
from edge_agent.inference.custom_ops import refuse_custom_ops


def admit(variant: Variant, *, custom_ops: bool) -> None:
    """Raise `Forbidden` (native code where the owner allows none) or `PluginMissing`. Reads the plug-ins' files."""
    if variant.custom_ops and not custom_ops:
        raise refuse_custom_ops()
    if variant.pipeline:
        for step in variant.pipeline.steps:
            check_installed(step)
