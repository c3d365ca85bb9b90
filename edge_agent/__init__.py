"""The agent on a device. `from edge_agent import Device` runs it inside an application (`edge_agent.library`)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_agent.library import Device

__all__ = ["Device"]


def __getattr__(name: str) -> object:
    """Load the engine only for those who ask for it: `ferry-agent --help` needs none."""
    if name != "Device":
        raise AttributeError(name)
    from edge_agent.library import Device

    return Device
