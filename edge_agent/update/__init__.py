"""How one model on the device gets from the release it runs to the release it was ordered to run.

Pure: no IO, no clock, no threads. `step(state, event)` answers with the next state and the effects to carry out; the
executor saves the state first and acts second, so after a crash the saved state says what was about to happen, and
`resume(state)` says what to do about it. `order` decides which orders are accepted at all, `choice` picks the cheapest
way to the bytes, `report` turns a state into what the controller is told, `diagram` draws the table for the docs.
"""

from edge_agent.update.choice import FromFull, FromHeld, FromParts, FromPatches, Source, Sources, choose
from edge_agent.update.machine import resume, step
from edge_agent.update.order import agreed_variant, open_order
from edge_agent.update.outcomes import REDOWNLOADS_MAX, STRIKES_MAX
from edge_agent.update.report import held_digests, reported_model, wanted_downloads
from edge_agent.update.state import MANIFEST_FILE, Installed, ModelState, Quarantined, Slot, Stage, Tally

__all__ = [
    "MANIFEST_FILE",
    "REDOWNLOADS_MAX",
    "STRIKES_MAX",
    "FromFull",
    "FromHeld",
    "FromParts",
    "FromPatches",
    "Installed",
    "ModelState",
    "Quarantined",
    "Slot",
    "Source",
    "Sources",
    "Stage",
    "Tally",
    "agreed_variant",
    "choose",
    "held_digests",
    "open_order",
    "reported_model",
    "resume",
    "step",
    "wanted_downloads",
]
