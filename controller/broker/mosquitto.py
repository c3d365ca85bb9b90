"""Users and rules for a mosquitto broker, as the two files that mosquitto reads: `passwords` and `acl`.

The controller writes both files, all or nothing, whenever a device is admitted or revoked; whoever runs mosquitto
points `password_file` and `acl_file` at them and has it reload (SIGHUP) when they change. A password is stored as
PBKDF2-HMAC-SHA512 in mosquitto's `$7$` form (mosquitto_passwd(1)); the iterations are few because our passwords are
256 random bits. The ACL does not grow with the fleet: its `pattern` lines use the user name, which is the device id.
"""

import asyncio
import base64
import hashlib
import secrets
from pathlib import Path

from common import durable
from common.errors import InvalidInput
from common.ids import DEVICE_ID, DeviceId
from common.wire.topics import PREFIX
from controller.broker.admission import FOR_DEVICE, FROM_DEVICE

SALT_BYTES = 12
ITERATIONS = 101
"""mosquitto's own default."""
KEY_BYTES = 64


class MosquittoFiles:
    """`Admission` for a mosquitto whose files are in `folder`; other users in `passwords` are kept.

    `username` and `password` are the controller's own, from the URL of the broker.
    """

    def __init__(self, folder: Path, username: str, password: str) -> None:
        self._folder = folder
        self._username = username
        self._password = password
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Write the rules and the controller's own user.

        Raises `InvalidInput` when a device could have the controller's name, or when the folder is no good.
        """
        if not self._username or DEVICE_ID.fullmatch(self._username):
            fix = "give the controller a name that no device can have, for example _controller"
            raise InvalidInput(f"user name {self._username!r} could be a device's", field="broker", fix=fix)
        try:
            await asyncio.to_thread(self._prepare)
        except OSError as error:
            fix = "give a folder that the controller can write and mosquitto can read"
            raise InvalidInput(f"{self._folder}: {error.strerror}", field="mosquitto_files", fix=fix) from error

    async def admit(self, device: DeviceId, password: str) -> None:
        """Add the device, or replace its password. mosquitto knows it after its next reload."""
        async with self._turn:
            await asyncio.to_thread(self._rewrite, device, hashed(password))

    async def revoke(self, device: DeviceId) -> None:
        """Take the device out. mosquitto lets it in until its next reload, and does not cut its connection."""
        async with self._turn:
            await asyncio.to_thread(self._rewrite, device, None)

    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        durable.write_file(self._folder / "acl", acl(self._username).encode())
        if not self._passwords.exists():
            durable.write_file(self._passwords, b"", durable.PRIVATE_MODE)
        self._rewrite(self._username, hashed(self._password))

    def _rewrite(self, user: str, password_hash: str | None) -> None:
        lines = [line for line in self._passwords.read_text().splitlines() if line.partition(":")[0] != user]
        lines += [f"{user}:{password_hash}"] if password_hash else []
        mode = self._passwords.stat().st_mode & 0o777  # mosquitto runs as another user: its operator chose the mode
        durable.write_file(self._passwords, "".join(f"{line}\n" for line in lines).encode(), mode)

    @property
    def _passwords(self) -> Path:
        return self._folder / "passwords"


def hashed(password: str, salt: bytes | None = None) -> str:
    """The password as mosquitto stores it: `$7$iterations$salt$key`, both in base64."""
    salt = salt or secrets.token_bytes(SALT_BYTES)
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, ITERATIONS, KEY_BYTES)
    return f"$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def acl(username: str) -> str:
    """The access rules: for the controller, whose user name is given, and the same for every device."""
    return "\n".join(
        (
            "# Written by ferry-controller; changes are overwritten.",
            f"user {username}",
            *(f"topic write {PREFIX}/d/+/{kind.value}" for kind in FOR_DEVICE),
            *(f"topic read {PREFIX}/d/+/{kind.value}" for kind in FROM_DEVICE),
            "",
            *(f"pattern write {PREFIX}/d/%u/{kind.value}" for kind in FROM_DEVICE),
            *(f"pattern read {PREFIX}/d/%u/{kind.value}" for kind in FOR_DEVICE),
            "",
        )
    )
