"""What makes a data folder this controller's: its lock, its signing key, the first administrator's token.

    lock               held while a controller uses the folder
    keys/signing.pem   the Ed25519 key that every device of the fleet trusts (0600); back it up
    admin.token        a bearer token with role admin (0600); delete the file to get another at the next start

The key is made once. A folder that knows devices but has lost the key is refused: devices would not obey a new one.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from common import durable
from common.errors import Conflict, InvalidInput
from common.trust import Signer
from controller.api.auth import fingerprint, new_token
from controller.store.port import Store, Transaction

ADMIN_TOKEN_ID = "first-admin"  # noqa: S105  the row's id, not the secret
FOLDER_MODE = 0o700


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[Path]:
    """Make the folder if need be and hold its lock; gives its absolute path.

    Raises `Conflict` when another controller holds it, `InvalidInput` when it cannot be used. The lock goes with the
    process, however it ends.
    """
    folder = folder.absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, durable.PRIVATE_MODE)
    except OSError as error:
        fix = "give a folder that this user can write, with --data DIR"
        raise InvalidInput(f"cannot use {folder}: {error.strerror}", field="data", fix=fix) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        fix = "stop it, or give this one a folder of its own with --data DIR"
        raise Conflict(f"another controller uses {folder}", field="data", fix=fix) from error
    finally:
        os.close(descriptor)


async def load_signer(folder: Path, store: Store) -> Signer:
    """The signing key in `folder`, made on the first start.

    Raises `Conflict` when it is gone although the fleet has devices, `IntegrityFailure` when the file is damaged.
    """
    path = folder / "keys" / "signing.pem"
    if path.exists():
        return Signer.from_pem(path.read_bytes())
    if await store.read(lambda tx: tx.devices.page("", 1)):
        fix = "restore it from a backup; with a new key every device would have to join again"
        raise Conflict(f"{path} is missing, and this fleet's devices trust no other key", field="data", fix=fix)
    signer = Signer.generate()
    path.parent.mkdir(mode=FOLDER_MODE, exist_ok=True)
    durable.write_file(path, signer.to_pem(), durable.PRIVATE_MODE)
    return signer


async def ensure_admin_token(folder: Path, store: Store, now: float) -> Path:
    """See to it that the token in `admin.token` is valid; made when the file is not there. The file's path."""
    path = folder / "admin.token"
    text = path.read_text().strip() if path.exists() else ""
    fresh, token = new_token("admin", "first-admin", now)
    if not text:
        text = fresh
        durable.write_file(path, f"{text}\n".encode(), durable.PRIVATE_MODE)
    row = replace(token, id=ADMIN_TOKEN_ID, sha256=fingerprint(text))

    def write(tx: Transaction) -> None:
        if tx.tokens.find(row.sha256) is None:
            tx.tokens.put(row)

    await store.write(write)
    return path
