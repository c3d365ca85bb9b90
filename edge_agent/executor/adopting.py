"""Finding the releases in the slots again when the journal that named them was lost.

A slot holds its release's signed manifest, so it can say for itself what it is, and whether it is all there. Which of
two was in service nobody knows any more; the one that came first is taken, for the other may not have proven itself.
The newest order, which has to be asked for again, then finds the other one on the disk.
"""

from msgspec import UNSET

from common.artifact import ArtifactRef, decode_manifest, digest_of
from common.artifact.manifest import PAYLOAD_TYPE
from common.errors import FerryError
from common.ids import ModelName
from common.trust import verify
from edge_agent.executor.parts import Parts
from edge_agent.slots import SLOTS
from edge_agent.update import Installed, ModelState, Slot


def adopt(parts: Parts) -> list[ModelState]:
    """The state of every model that has a complete release with a manifest signed by a trusted key."""
    states = []
    for model in parts.slots.models():
        slots = sorted(SLOTS, key=lambda slot, model=model: parts.slots.made_at(model, slot))  # type: ignore[misc]
        found = [release for slot in slots if (release := _release(parts, model, slot)) is not None]
        if found:
            states.append(ModelState(model=model, installed=found[0], previous=found[1] if found[1:] else None))
    return states


def _release(parts: Parts, model: ModelName, slot: Slot) -> Installed | None:
    try:
        envelope = parts.slots.manifest(model, slot)
        manifest = decode_manifest(verify(envelope, PAYLOAD_TYPE, parts.keys))
    except (FerryError, OSError):
        return None
    ref = ArtifactRef(digest_of(envelope), len(envelope))
    for name, variant in manifest.variants.items() if manifest.model == model else ():
        if parts.slots.verify(model, slot, variant.files, ref):
            return Installed(
                slot=slot,
                version=manifest.version,
                variant=name,
                files=variant.files,
                onnx_file=variant.model,
                manifest=ref,
                inputs=variant.inputs,
                outputs=variant.outputs,
                self_test=variant.self_test,
                pipeline=variant.pipeline or UNSET,
                custom_ops=variant.custom_ops or UNSET,
                serving=variant.serving,
                reference=variant.reference,
            )
    return None
