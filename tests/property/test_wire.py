"""Messages, topics and join strings survive the trip; strangers' bytes become one named error."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from common.artifact import ArtifactRef, digest_of
from common.errors import FerryError, InvalidInput, TooLarge
from common.ids import DEVICE_ID, DeviceId, ModelName, Version
from common.monitoring.reference import EDGES_MAX
from common.monitoring.sketch import FEATURES_MAX, FeatureCounts, Sketch
from common.wire import (
    Capabilities,
    Chunk,
    ChunkRequest,
    DesiredFile,
    DesiredModel,
    DesiredState,
    DeviceWindow,
    Heartbeat,
    JoinString,
    Kind,
    Message,
    PartsOffer,
    PatchOffer,
    Presence,
    ReportedModel,
    ReportedState,
    Shadow,
    ShadowReport,
    SideReport,
    Split,
    SplitReport,
    Telemetry,
    TelemetryWindow,
    Topic,
    UpdateReport,
    decode,
    encode,
    filters_for_controller,
    filters_for_device,
)
from common.wire.codec import BYTES_MAX
from edge_agent.conversation import WINDOWS_BYTES_MAX

DEVICE = DeviceId("dev-1")
DIGEST = digest_of(b"x")
REF = ArtifactRef(DIGEST, 1)
EXAMPLES: list[Message] = [
    Presence(device=DEVICE, epoch=1, seq=0, sent_at=1.5, online=True, capabilities=Capabilities(agent_version="1")),
    Heartbeat(
        device=DEVICE,
        epoch=1,
        seq=2,
        sent_at=1.5,
        uptime_s=1,
        load_1m=0.5,
        cpu_percent=3,
        memory_bytes=1,
        memory_available_bytes=1,
        disk_bytes=1,
        disk_free_bytes=1,
        generation=3,
        running={ModelName("m"): Version("1")},
    ),
    Telemetry(
        device=DEVICE,
        epoch=1,
        seq=2,
        sent_at=1.5,
        windows=(
            TelemetryWindow(
                model=ModelName("m"),
                version=Version("1"),
                started_at=1,
                ended_at=2,
                requests=3,
                errors=0,
                latency_counts=(0,) * 17,
                latency_sum_s=0.1,
            ),
        ),
    ),
    DesiredState(
        device=DEVICE,
        generation=1,
        issued_at=1.0,
        models=(
            DesiredModel(
                model=ModelName("m"),
                version=Version("1"),
                variant="default",
                manifest=REF,
                files=(
                    DesiredFile(
                        name="model.onnx",
                        artifact=REF,
                        patches=(PatchOffer(DIGEST, REF, REF, "tensor-zstd.1"),),
                        parts=(PartsOffer(DIGEST, REF, REF, 7),),
                    ),
                    DesiredFile(name="model.onnx.data", artifact=REF),
                ),
                order=1,
                max_bytes=200_000,
                on_exceed="fail",
            ),
        ),
    ),
    ReportedState(
        device=DEVICE,
        epoch=1,
        seq=1,
        sent_at=1,
        generation=1,
        held=(DIGEST,),
        models=(
            ReportedModel(
                model=ModelName("m"),
                running=Version("1"),
                artifact=DIGEST,
                phase="idle",
                generation=1,
                last_update=UpdateReport(generation=1, version=Version("1"), outcome="succeeded"),
            ),
        ),
    ),
    ChunkRequest(device=DEVICE, digest=DIGEST, offset=0, length=1),
    Chunk(device=DEVICE, digest=DIGEST, offset=0, total=3, data=b"\x00\xff\x80"),
]


_REPORT = ShadowReport(
    verdict="pass",
    samples=40,
    agreed=39,
    dropped=2,
    live=SideReport(requests=41, errors=1, latency_s=0.01),
    candidate=SideReport(requests=41, errors=2, latency_s=0.02),
)
_ORDER, _TOLD = EXAMPLES[3], EXAMPLES[4]
assert isinstance(_ORDER, DesiredState)
assert isinstance(_TOLD, ReportedState)
TRAFFIC: list[Message] = [
    replace(
        _ORDER,
        models=(
            replace(
                _ORDER.models[0],
                shadow=Shadow(for_s=600, share=0.1, agree="top1", agreement_min=0.98, samples_min=50, on_few="fail"),
                split=Split(share=0.25, header="X-Model-Side", key="X-Caller"),
            ),
        ),
    ),
    replace(
        _TOLD,
        models=(
            ReportedModel(
                model=ModelName("m"),
                running=Version("1"),
                artifact=DIGEST,
                phase="shadowing",
                target=Version("2"),
                generation=2,
                shadow=_REPORT,
                last_update=UpdateReport(
                    generation=1,
                    version=Version("1"),
                    outcome="succeeded",
                    shadow=_REPORT,
                    split=SplitReport(candidate=SideReport(requests=3), stable=SideReport()),
                ),
            ),
        ),
    ),
]
"""With what an order may say about requests, and what was found."""


_BIRTH = EXAMPLES[0]
assert isinstance(_BIRTH, Presence)
assert _BIRTH.capabilities is not None
MEASURED: list[Message] = [
    replace(
        _BIRTH,
        capabilities=replace(_BIRTH.capabilities, variants=("auto",), device_class="aarch64, Cortex, 4 CPUs, 1a2b3c4d"),
    ),
    replace(_ORDER, models=(replace(_ORDER.models[0], variant="int8", measure=True),)),
    replace(
        _TOLD,
        models=(
            replace(
                _TOLD.models[0],
                last_update=UpdateReport(
                    generation=2, version=Version("2"), outcome="succeeded", variant="int8", run_s=0.0041
                ),
            ),
        ),
    ),
]
"""With what it takes to choose variants by measurement."""


FULL_TELEMETRY = Telemetry(
    device=DEVICE,
    epoch=1,
    seq=3,
    sent_at=2.5,
    windows=(
        TelemetryWindow(
            model=ModelName("m"),
            version=Version("1"),
            started_at=1,
            ended_at=2,
            requests=3,
            errors=1,
            latency_counts=(0, 3, *(0,) * 15),
            latency_sum_s=0.1,
            queue_counts=(2, 1, *(0,) * 15),
            queue_sum_s=0.002,
            queue_max_s=0.001,
            run_counts=(1, 1, *(0,) * 6),
            run_rows=3,
            run_sum_s=0.09,
            refused=4,
            expired=5,
            cancelled=6,
            labelled=2,
            correct=1,
            sketch=Sketch(
                reference=DIGEST,
                observations=2,
                features=(FeatureCounts((1, 2, 3, 0), -0.5, 7.25), FeatureCounts((4, 5))),
            ),
        ),
    ),
    device_windows=(
        DeviceWindow(
            started_at=1,
            ended_at=2,
            cpu_s=0.25,
            rss_bytes=100,
            pss_bytes=60,
            windows_lost=7,
            files_bad=2,
            files_mended=1,
        ),
    ),
)


def test_telemetry_with_everything_survives_the_trip() -> None:
    assert decode(encode(FULL_TELEMETRY), Telemetry) == FULL_TELEMETRY


def test_the_largest_window_there_can_be_fits_into_a_message() -> None:
    cells, most = EDGES_MAX + 3, 2**53 - 1
    largest = FeatureCounts((most,) * cells, -1.7976931348623157e308, 1.7976931348623157e308)
    plain = FULL_TELEMETRY.windows[0]
    window = msgspec.structs.replace(
        plain,
        model=ModelName("m" * 64),
        version=Version("1" * 64),
        latency_counts=(most,) * 17,
        queue_counts=(most,) * 17,
        run_counts=(most,) * 8,
        sketch=Sketch(reference=DIGEST, observations=most, features=(largest,) * FEATURES_MAX),
    )
    assert len(msgspec.json.encode(window)) < WINDOWS_BYTES_MAX
    assert encode(msgspec.structs.replace(FULL_TELEMETRY, windows=(window,)))


@pytest.mark.parametrize("message", EXAMPLES + TRAFFIC + MEASURED, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_trip(message: Message) -> None:
    assert decode(encode(message), type(message)) == message


def test_every_message_type_has_an_example_and_a_limit() -> None:
    assert {type(message) for message in EXAMPLES} == set(BYTES_MAX)


@pytest.mark.parametrize("message", EXAMPLES + TRAFFIC + MEASURED, ids=lambda message: type(message).__name__)
def test_every_truncation_is_a_named_error(message: Message) -> None:
    data = encode(message)
    for length in range(len(data)):
        with pytest.raises(InvalidInput):
            decode(data[:length], type(message))


@given(data=st.binary(max_size=300), kind=st.sampled_from(sorted(BYTES_MAX, key=lambda kind: kind.__name__)))
def test_random_bytes_never_raise_anything_else(data: bytes, kind: type[Message]) -> None:
    with contextlib.suppress(FerryError):
        decode(data, kind)


def test_unknown_fields_are_ignored_so_that_a_newer_peer_may_add_some() -> None:
    data = encode(EXAMPLES[5])
    assert decode(data[:-1] + b',"new":1}', ChunkRequest) == EXAMPLES[5]


@pytest.mark.parametrize("kind", list(BYTES_MAX))
def test_endless_nesting_is_a_named_error(kind: type[Message]) -> None:
    depth = BYTES_MAX[kind] - 16
    nested = b"\x81\xa3new" + b"\x91" * depth if kind is Chunk else b'{"new":' + b"[" * depth
    with pytest.raises(InvalidInput):
        decode(nested, kind)


def test_another_protocol_version_is_refused_by_name() -> None:
    data = msgspec.json.encode(msgspec.structs.replace(EXAMPLES[5], v=2))
    with pytest.raises(InvalidInput, match="protocol version 2"):
        decode(data, ChunkRequest)


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(TooLarge, match="at most 1024 bytes"):
        decode(b"{" + b" " * 2000, ChunkRequest)


@given(device=st.from_regex(DEVICE_ID, fullmatch=True), kind=st.sampled_from(Kind))
def test_topics_survive_the_trip(device: str, kind: Kind) -> None:
    topic = Topic(DeviceId(device), kind)
    assert Topic.parse(str(topic)) == topic


@given(text=st.text(max_size=60) | st.from_regex(r"fc/v1/d/.{0,20}/(hb|x)", fullmatch=True))
def test_a_topic_is_ours_or_a_named_error(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert str(Topic.parse(text)) == text


def test_the_two_directions_share_no_topic() -> None:
    assert set(filters_for_device(DEVICE)) == {"fc/v1/d/dev-1/desired", "fc/v1/d/dev-1/dl"}
    assert {text.rsplit("/")[-1] for text in filters_for_controller()} == {"state", "hb", "tel", "reported", "rq"}


@given(token=st.text(max_size=100))
def test_join_strings_survive_the_trip(token: str) -> None:
    join = JoinString("https://fleet.example:8443", token)
    assert JoinString.parse(str(join)) == join


@given(text=st.text(max_size=100).map(lambda text: "ferry1." + text) | st.text(max_size=100))
def test_a_damaged_join_string_says_what_to_copy(text: str) -> None:
    try:
        JoinString.parse(text)
    except InvalidInput as error:
        assert "token create" in str(error)


def test_a_join_string_cannot_point_at_a_file() -> None:
    with pytest.raises(InvalidInput, match="http"):
        JoinString.parse(str(JoinString("file:///etc/passwd", "t")))
