"""Who this device is: what it got when it joined a fleet, in one private file.

`identity.json` in the data folder holds secrets (the device's token and its MQTT password), so only its owner may read
it. It is written once, by joining, and only read from then on. Who holds it is the device.
"""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from common.durable import PRIVATE_MODE, write_file
from common.errors import Forbidden, IntegrityFailure, NotFound
from common.ids import DeviceId
from common.trust import PublicKey
from common.wire.messages import Seconds

FILE_NAME = "identity.json"


class BrokerAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Where the MQTT broker is (`mqtt://host:port` or `mqtts://host:port`) and the credential for it."""

    url: str
    username: str
    password: str


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A device's place in its fleet.

    `client_id` is the MQTT client id: the device id and a random suffix, because a broker lets whoever connects with a
    client id push off the one who holds it, so it must not be guessable. `signing_keys` are the only keys whose orders
    and manifests this device believes.
    """

    device: DeviceId
    device_token: str
    controller_url: str
    broker: BrokerAccess
    client_id: str
    signing_keys: tuple[PublicKey, ...]
    heartbeat_s: Seconds
    poll_s: Seconds
    format: Annotated[int, Meta(ge=1, le=1)] = 1


def identity_path(data: Path) -> Path:
    """Where the identity lives in the data folder."""
    return data / FILE_NAME


def load_identity(data: Path) -> Identity:
    """The identity in the data folder.

    Raises `NotFound` before joining, `Forbidden` for a user who may not read it, `IntegrityFailure` when it is damaged.
    """
    path = identity_path(data)
    rejoin = f"run `ferry-agent join JOIN_STRING --data {data}`"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError as error:
        raise NotFound(f"this device has not joined a fleet: there is no {path}", fix=rejoin) from error
    except PermissionError as error:
        raise Forbidden(f"{path} is not yours to read", fix="use sudo, or another --data folder") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityFailure(f"{path} is damaged: {error}", fix=f"{rejoin} --force") from error


def save_identity(data: Path, identity: Identity) -> None:
    """Write the identity, all or nothing, readable by its owner only."""
    write_file(identity_path(data), msgspec.json.format(msgspec.json.encode(identity)), PRIVATE_MODE)
