"""A device without pcodec (musl, 32-bit ARM): it says so, chooses what it can apply, and applies it bit for bit."""

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
from onnx import numpy_helper

from common import delta
from common.artifact import ArtifactRef, digest_of
from common.artifact.source import BytesSource
from common.ids import ModelName, Version
from common.wire import DesiredFile, DesiredModel, PatchOffer
from tests.small_models import model_bytes

CHILD = """
import sys
from pathlib import Path

sys.modules["pcodec"] = None  # what an import of a package that is not installed comes to

import msgspec

from common import delta
from common.artifact import digest_of
from common.errors import IntegrityFailure
from common.filesource import FileSource
from common.wire import DesiredModel
from edge_agent.config import AgentSettings
from edge_agent.machine import capabilities
from edge_agent.update.choice import FromPatches, Local, choose

folder = Path(sys.argv[1])
announced = capabilities(AgentSettings(data=folder)).patch_codecs
target = msgspec.json.decode((folder / "order").read_bytes(), type=DesiredModel)
plan = choose(target, Local(frozenset({digest_of((folder / "base").read_bytes())}), announced))
((offer,),) = (source.offers for source in plan.sources)
pieces = []
with FileSource(folder / "base") as base, FileSource(folder / offer.codec) as patch:
    delta.apply(base, patch, pieces.append, target=target.artifact)
assert digest_of(b"".join(pieces)) == target.artifact.digest
with FileSource(folder / "base") as base, FileSource(folder / "tensor-pco.1") as patch:
    try:
        delta.apply(base, patch, pieces.append, target=target.artifact)
    except IntegrityFailure:
        print(*announced, offer.codec)
"""


def test_a_device_without_pcodec_announces_and_applies_what_it_can(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    weights = chance.standard_normal(20_000, np.float32)
    tuned = weights + chance.standard_normal(20_000, np.float32) * np.float32(1e-4)
    base, target = (model_bytes(initializers=[numpy_helper.from_array(w, "w")]) for w in (weights, tuned))
    base_digest, target_ref = digest_of(base), ArtifactRef(digest_of(target), len(target))
    (tmp_path / "base").write_bytes(base)
    offers = []
    for codec in delta.CODECS:
        pieces: list[bytes] = []
        delta.make(BytesSource(base), BytesSource(target), pieces.append, codec=codec)
        patch = b"".join(pieces)
        (tmp_path / codec).write_bytes(patch)
        offers.append(PatchOffer(base_digest, target_ref, ArtifactRef(digest_of(patch), len(patch)), codec))
    order = DesiredModel(
        model=ModelName("m"),
        version=Version("2"),
        variant="default",
        manifest=ArtifactRef(digest_of(b"manifest"), 100),
        files=(DesiredFile(name="model.onnx", artifact=target_ref, patches=tuple(offers)),),
        order=1,
    )
    (tmp_path / "order").write_bytes(msgspec.json.encode(order))

    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )

    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["tensor-zstd.1", "tensor-zstd.1"]
    assert [offer.codec for offer in sorted(offers, key=lambda offer: offer.patch.size)] == list(delta.CODECS)
