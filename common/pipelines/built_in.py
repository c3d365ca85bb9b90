"""The steps that are part of the agent, by name and version. What a version does never changes: another behaviour is
another version, and the old one stays.
"""

from collections.abc import Mapping

from common.pipelines.image import open_image
from common.pipelines.step import OpenStep
from common.pipelines.top_k import open_top_k

BUILT_IN: Mapping[tuple[str, str], OpenStep] = {
    ("edgeferry.image", "1"): open_image,
    ("edgeferry.top_k", "1"): open_top_k,
}
