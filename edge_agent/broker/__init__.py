"""The device's line to its controller over MQTT.

`AgentLink` announces the device with birth and will, publishes what it has to say, and hands over orders and chunks.
It knows topics and messages, and nothing of what an order means.
"""

from edge_agent.broker.connection import parse_broker_url
from edge_agent.broker.link import AgentLink, LinkLimits

__all__ = ["AgentLink", "LinkLimits", "parse_broker_url"]
