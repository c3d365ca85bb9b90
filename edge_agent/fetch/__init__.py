"""How bytes get onto the device: resumed, bounded, verified before they get their name.

`Fetcher` chooses between `ChunkFetcher` (MQTT) and `HttpFetcher`; all three have the same `fetch`. `DesiredPoll` asks
for orders over HTTP while MQTT is silent. Nothing here knows what an artifact means, and nothing here retries: whoever
calls decides when `Unavailable` is worth another try, and the next try goes on where this one stopped.
"""

from edge_agent.fetch.choice import Fetcher, make_fetcher
from edge_agent.fetch.chunks import ChunkFetcher, ChunkLink
from edge_agent.fetch.http import HttpFetcher
from edge_agent.fetch.pace import Pace
from edge_agent.fetch.partial import cut_to_flushed
from edge_agent.fetch.session import Session, open_session
from edge_agent.fetch.transfer import Fetching, FetchLimits, OnProgress, Ranges, Transfer
from edge_agent.fetch.twin import DesiredPoll, Envelope, NotModified

__all__ = [
    "ChunkFetcher",
    "ChunkLink",
    "DesiredPoll",
    "Envelope",
    "FetchLimits",
    "Fetcher",
    "Fetching",
    "HttpFetcher",
    "NotModified",
    "OnProgress",
    "Pace",
    "Ranges",
    "Session",
    "Transfer",
    "cut_to_flushed",
    "make_fetcher",
    "open_session",
]
