"""Which request runs next, and with which others: pure decisions for the threads of `edge_agent.inference.dispatch`.

`Waiting` holds what could not run at once, `CostCurve` knows what a batch costs on this device, `rows` puts requests
together and takes answers apart, and `Usual` knows how long what took longer now and then takes as a rule.
"""

from edge_agent.inference.scheduling.curve import ROWS_MAX, CostCurve
from edge_agent.inference.scheduling.padding import length_class, near
from edge_agent.inference.scheduling.rows import agree, has_rows, join, row_count, split
from edge_agent.inference.scheduling.usual import Usual
from edge_agent.inference.scheduling.waiting import (
    BATCH_BYTES_MAX,
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    Taken,
    Ticket,
    Waiting,
    WaitingFull,
    WaitingLimits,
)

__all__ = [
    "BATCH_BYTES_MAX",
    "PRIORITY_DEFAULT",
    "PRIORITY_MAX",
    "ROWS_MAX",
    "CostCurve",
    "Taken",
    "Ticket",
    "Usual",
    "Waiting",
    "WaitingFull",
    "WaitingLimits",
    "agree",
    "has_rows",
    "join",
    "length_class",
    "near",
    "row_count",
    "split",
]
