"""`ferry-agent doctor`: what is wrong with this device, and what to do about it.

`probing` looks (disk, network, runtime; each look has a time limit, and nothing is changed), `judging` says what the
facts mean. One finding per check: ok, warning (works, but somebody should know) or problem (something does not work).
"""

from edge_agent.doctor.judging import Finding
from edge_agent.doctor.probing import examine
from edge_agent.doctor.telling import as_document, as_table, worst

__all__ = ["Finding", "as_document", "as_table", "examine", "worst"]
