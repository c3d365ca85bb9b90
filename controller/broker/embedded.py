"""The embedded broker: a real NATS server that lives and dies with the controller, for fleets that fit one machine.

It listens on loopback unless told otherwise and keeps its data, its port and its users in one folder:

    nats.json     the server's configuration, generated, with a bcrypt hash for each user
    users.json    the devices that were admitted and their hashes: the truth that nats.json is made from
    secret        the controller's own password
    port          the port in use when any free one was asked for; kept, because devices remember it
    nats.pid      the running server, so that one that outlived a killed controller is found and ended
    jetstream/    retained messages and what waits for absent clients

`admit` writes the users durably, then has the server reload; admissions that wait at the same time share one reload.
When the server dies it is started again with backoff, and connected clients come back by themselves. The caller must
see to it that no second controller uses the same folder.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
from collections.abc import Callable
from pathlib import Path

import bcrypt
import msgspec

from common import durable
from common.backoff import Backoff
from common.errors import Conflict, FerryError, InvalidInput
from common.ids import DeviceId
from controller.broker.child import ServerProcess, end_stale_server
from controller.broker.nats_config import CONTROLLER_USER, ServerLimits, server_config
from controller.broker.ports import kept_port

PASSWORD_BYTES = 32
BCRYPT_ROUNDS = 4
"""The least that bcrypt takes: passwords are 256 random bits, which nobody guesses however fast the hash is."""
RESTART = Backoff(base_s=0.2, cap_s=30.0)
STEADY_S = 60.0
"""A server that ran this long was healthy: its next restart is not held back by earlier ones."""

_log = logging.getLogger(__name__)


class EmbeddedBroker:
    """The broker as the controller sees it: started, stopped, told who may come in (`Admission`)."""

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        limits: ServerLimits = ServerLimits(),  # noqa: B008  frozen
        uniform: Callable[[], float] = random.random,
    ) -> None:
        """`port` 0 takes any free port the first time and the same one ever after."""
        self._folder = folder.absolute()
        self._host = host
        self._port = port
        self._limits = limits
        self._uniform = uniform
        self._users: dict[DeviceId, str] = {}
        self._password = ""
        self._password_hash = ""
        self._server: ServerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._changed = 0
        self._applied = 0
        self._turn = asyncio.Lock()  # who starts, reloads or stops the server

    @property
    def port(self) -> int:
        """The port for MQTT; known once `start` has returned."""
        return self._port

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._host, self._host)  # noqa: S104  compared, not bound
        return f"mqtt://{host}:{self._port}"

    @property
    def credentials(self) -> tuple[str, str]:
        """The controller's own user name and password."""
        return CONTROLLER_USER, self._password

    @property
    def client_id(self) -> str:
        """The controller's MQTT client id: always the same, and no device can guess it to push the controller off."""
        return "ferry-" + hashlib.sha256(b"client id:" + self._password.encode()).hexdigest()[:32]

    async def start(self) -> None:
        """Start the server and keep it running.

        Raises `Conflict` when the port is taken, `Unavailable` when the server is not installed or does not come up,
        `InvalidInput` when its list of users is damaged.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        await end_stale_server(self._pid_file, self._config_file)
        self._users = self._load_users()
        self._password = self._load_secret()
        self._password_hash = _hash(self._password)  # once, so that the file changes only when users do
        self._port = self._port or kept_port(self._folder / "port", self._host, "broker_listen")
        async with self._turn:
            await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(), name="broker-supervisor")

    async def stop(self) -> None:
        """End the server; retained and waiting messages stay on the disk."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        async with self._turn:
            if self._server is not None:
                await self._server.stop()
                self._server = None
        self._pid_file.unlink(missing_ok=True)

    async def admit(self, device: DeviceId, password: str) -> None:
        """Let `device` connect with `password` from now on, instead of any earlier one; durable when this returns.

        Raises `StorageFull`, and `Unavailable` when the server did not answer; both are safe to repeat.
        """
        self._users[device] = _hash(password)
        await self._apply()

    async def revoke(self, device: DeviceId) -> None:
        """Keep `device` out and cut its connection; a device that nobody admitted is no error."""
        if self._users.pop(device, None) is not None:
            await self._apply()

    async def _apply(self) -> None:
        """Write the users down and make the server read them, once for all changes made so far."""
        self._changed += 1
        mine = self._changed
        async with self._turn:
            if self._applied >= mine:
                return
            covered, users = self._changed, dict(self._users)
            await asyncio.to_thread(self._write_users, users)
            if self._server is not None and self._server.running:
                await self._server.reload()
            self._applied = covered

    async def _launch(self) -> None:
        await asyncio.to_thread(self._write_users, dict(self._users))
        try:
            self._server = await ServerProcess.start(self._config_file, self._pid_file)
        except Conflict as error:
            fix = "stop what listens there, or choose another with --broker-listen HOST:PORT"
            where = f"{self._host}:{self._port}"
            raise Conflict(f"the broker's port {where} is already in use", field="broker_listen", fix=fix) from error
        _log.info("broker listens", extra={"url": self.url})

    async def _supervise(self) -> None:
        """Start the server again whenever it ends, until `stop`."""
        attempt = 0
        said = ""
        while True:
            if self._server is not None:
                began = asyncio.get_running_loop().time()
                said = await self._server.ended()
                attempt = 0 if asyncio.get_running_loop().time() - began > STEADY_S else attempt
            delay_s = RESTART.delay_s(attempt, self._uniform())
            _log.error("the broker ended; starting it again", extra={"said": said, "delay_s": round(delay_s, 2)})
            await asyncio.sleep(delay_s)
            attempt += 1
            async with self._turn:
                self._server = None
                try:
                    await self._launch()
                except FerryError as error:
                    said = str(error)

    def _write_users(self, users: dict[DeviceId, str]) -> None:
        config = server_config(
            folder=self._folder, host=self._host, port=self._port, controller_hash=self._password_hash,
            devices=users, limits=self._limits,
        )  # fmt: skip
        durable.write_file(self._users_file, msgspec.json.encode(users), durable.PRIVATE_MODE)
        durable.write_file(self._config_file, config, durable.PRIVATE_MODE)

    def _load_users(self) -> dict[DeviceId, str]:
        try:
            return msgspec.json.decode(self._users_file.read_bytes(), type=dict[DeviceId, str])
        except FileNotFoundError:
            return {}
        except msgspec.DecodeError as error:
            fix = "restore it from a backup; without it every device has to join again"
            raise InvalidInput(f"damaged: {error}", field=str(self._users_file), fix=fix) from error

    def _load_secret(self) -> str:
        path = self._folder / "secret"
        with contextlib.suppress(FileNotFoundError):
            return path.read_text().strip()
        secret = secrets.token_urlsafe(PASSWORD_BYTES)
        durable.write_file(path, secret.encode(), durable.PRIVATE_MODE)
        return secret

    @property
    def _config_file(self) -> Path:
        return self._folder / "nats.json"

    @property
    def _users_file(self) -> Path:
        return self._folder / "users.json"

    @property
    def _pid_file(self) -> Path:
        return self._folder / "nats.pid"


def _hash(password: str) -> str:
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(BCRYPT_ROUNDS)).decode()
