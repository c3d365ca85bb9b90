"""Steps before and after a model: the protocol of a plug-in, finding it, and running a chain of steps.

A plug-in is an installed Python distribution with an entry point in the group `edgeferry.pipelines`. The entry point
names a function that opens a step; the manifest of a release says which steps, in which version, from which code
(`common.artifact.pipeline`). A plug-in imports what it needs from here:

    from common.pipelines import InvalidInput, TensorSpec

    class Doubled:
        row_wise = True

        def __init__(self, spec):
            self.inputs = self.outputs = (spec,)

        def apply(self, arrays):
            return {name: 2 * array for name, array in arrays.items()}

    def open_step(parameters, inputs):
        return Doubled(inputs[0])
"""

from common.artifact import TensorSpec
from common.errors import InvalidInput
from common.pipelines.chain import Chain, open_chain
from common.pipelines.step import PluginMissing, Step, StepFailed
from common.pipelines.stopping import Guard

__all__ = [
    "Chain",
    "Guard",
    "InvalidInput",
    "PluginMissing",
    "Step",
    "StepFailed",
    "TensorSpec",
    "open_chain",
]
