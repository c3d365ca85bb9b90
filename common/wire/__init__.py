"""What travels between controller and agents: messages, topics, size limits, the join string.

Messages are frozen msgspec structs, JSON on the wire so that a person can read them with any MQTT client; the one
exception is `Chunk`, which carries bytes and is MessagePack. Every message says which version of the protocol it
speaks; unknown fields are ignored, so that a newer peer may add some. Every message type has a size limit.

Delivery is at least once and unordered across topics. Each message is therefore a statement of how things are, not of
what to do next, and carries `(epoch, seq)` so that an old one can be told from a new one.
"""

from common.wire.codec import decode, encode
from common.wire.join import JoinString
from common.wire.messages import (
    LATENCY_BOUNDS_S,
    PROTOCOL_VERSION,
    RUN_ROWS_BOUNDS,
    Capabilities,
    Chunk,
    ChunkRequest,
    DesiredFile,
    DesiredModel,
    DesiredState,
    DeviceWindow,
    Heartbeat,
    Message,
    NotRun,
    OnExceed,
    Outcome,
    PartsOffer,
    PatchOffer,
    Presence,
    ReportedModel,
    ReportedState,
    Strategy,
    Telemetry,
    TelemetryWindow,
    Transport,
    UpdatePhase,
    UpdateReport,
)
from common.wire.topics import TO_DEVICE, Kind, Topic, filters_for_controller, filters_for_device
from common.wire.traffic import Shadow, ShadowReport, SideReport, Split, SplitReport

__all__ = [
    "LATENCY_BOUNDS_S",
    "PROTOCOL_VERSION",
    "RUN_ROWS_BOUNDS",
    "TO_DEVICE",
    "Capabilities",
    "Chunk",
    "ChunkRequest",
    "DesiredFile",
    "DesiredModel",
    "DesiredState",
    "DeviceWindow",
    "Heartbeat",
    "JoinString",
    "Kind",
    "Message",
    "NotRun",
    "OnExceed",
    "Outcome",
    "PartsOffer",
    "PatchOffer",
    "Presence",
    "ReportedModel",
    "ReportedState",
    "Shadow",
    "ShadowReport",
    "SideReport",
    "Split",
    "SplitReport",
    "Strategy",
    "Telemetry",
    "TelemetryWindow",
    "Topic",
    "Transport",
    "UpdatePhase",
    "UpdateReport",
    "decode",
    "encode",
    "filters_for_controller",
    "filters_for_device",
]
