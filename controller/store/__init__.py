"""What the controller keeps in a database: the port (`port`), and its SQL adapter (`sql`), opened by `open_store`.

Importing this package loads no database library; `open_store` does, because the operator's CLI reads the port's words
and must start fast.
"""

from typing import TYPE_CHECKING

from common.clock import Clock

if TYPE_CHECKING:
    from controller.store.port import Store


async def open_store(url: str, clock: Clock) -> "Store":
    """The store at `url`, see `controller.store.sql.open_store`."""
    from controller.store import sql

    return await sql.open_store(url, clock)


__all__ = ["open_store"]
