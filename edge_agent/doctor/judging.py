"""What the facts about a device mean: pure, one function per check, from facts to findings.

Each check has its facts in one struct, gathered by `edge_agent.doctor.probing`. A finding's `detail` is a sentence that
says what is, its `fix` what to do; a finding that is ok needs no fix.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from common.delta.codecs import CODEC_PCO
from common.errors import FerryError, Unauthenticated
from common.ids import ModelName
from edge_agent.inference.memory import needed
from edge_agent.update import ModelState

Verdict = Literal["ok", "warning", "problem"]

MIB = 1024 * 1024
ROOM_BYTES_MIN = 256 * MIB
"""Less room than this beside the reserve, and a model of common size may not fit."""
MEMORY_BYTES_MIN = 64 * MIB
"""What the agent itself needs to go on."""
CLOCK_WARNING_S = 30.0
CLOCK_PROBLEM_S = 300.0
"""Certificates and orders of some minutes' age are then refused, or expired ones accepted."""
SPOOL_FULL_SHARE = 0.9
OTHERS_MODE = 0o077
FAST_X86 = "avx2"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found."""

    check: str
    verdict: Verdict
    detail: str
    fix: str = ""


class Folder(msgspec.Struct, frozen=True, kw_only=True):
    """The data folder. `free` and `reserve` in bytes."""

    path: str
    exists: bool
    writable: bool = False
    free: int = 0
    reserve: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer over the network, in `took_s`; `ahead_s`: how far this device's clock is ahead of the other's."""

    where: str
    took_s: float
    ahead_s: float | None = None


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """What ONNX Runtime said in a process of its own, and what the processor can; `error` when it did not work."""

    machine: str
    flags: tuple[str, ...]
    version: str = ""
    error: str = ""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the machine, of what is left to others (`reserve`) and of the largest installed model."""

    total: int
    available: int
    reserve: int = 0
    largest_model: int = 0


class SlotCheck(msgspec.Struct, frozen=True, kw_only=True):
    """A release in a slot, named `model@version`; whether it `serves`, and whether every byte is what it should be."""

    release: str
    serves: bool
    whole: bool


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The agent on this folder; `status` is its own words (`GET /status`), None when it did not answer."""

    pid: int | None = None
    url: str = ""
    ready: bool = False
    connected: bool = False
    refused: str = ""


class SpoolState(msgspec.Struct, frozen=True, kw_only=True):
    """Telemetry on the disk: windows waiting, windows lost for ever, bytes of the file and their limit."""

    waiting: int = 0
    lost: int = 0
    bytes: int = 0
    bytes_max: int = 1
    set_aside: bool = False


def folder(facts: Folder) -> Finding:
    """Can the agent write, and is there room for an update?"""
    room = facts.free - facts.reserve
    if not facts.exists:
        return problem("data folder", f"there is no {facts.path}", "`ferry-agent join JOIN_STRING` makes it")
    if not facts.writable:
        fix = "run as the user who owns it (sudo does), or name another folder with --data"
        return problem("data folder", f"{facts.path} cannot be written by this user", fix)
    if room < 0:
        detail = f"{size(facts.free)} are free, an update must leave {size(facts.reserve)}"
        return problem("data folder", detail, "free some space, or lower disk_reserve_bytes")
    if room < ROOM_BYTES_MIN:
        detail = f"{size(facts.free)} are free at {facts.path}; larger models will not fit"
        return warning("data folder", detail, "free some space")
    return ok("data folder", f"{facts.path} can be written, {size(facts.free)} are free")


def identity(device: str, mode: int) -> Finding:
    """Is the file with the device's secrets its owner's alone? `mode` is the file's."""
    if mode & OTHERS_MODE:
        detail = f"others on this machine may read the secrets of {device} (mode {mode:o})"
        return problem("identity", detail, "chmod 600 identity.json, and join again with --force if somebody has")
    return ok("identity", f"this device is {device}")


def controller(facts: Answer | FerryError) -> Finding:
    """Does the controller answer, and does it know us?"""
    if isinstance(facts, Answer):
        return ok("controller", f"{facts.where} answers and knows this device ({facts.took_s * 1000:.0f} ms)")
    if isinstance(facts, Unauthenticated):
        fix = "join again: `ferry-agent join JOIN_STRING --force`"
        return problem("controller", f"the controller does not know this device: {facts.message}", fix)
    fix = facts.fix or "check the network and that the controller runs"
    return problem("controller", facts.message, fix)


def clock(facts: Answer) -> Finding | None:
    """Does this device know what time it is? None: the controller did not say."""
    ahead = facts.ahead_s
    if ahead is None:
        return None
    where = f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the controller's"
    if abs(ahead) < CLOCK_WARNING_S:
        return ok("clock", "this clock agrees with the controller's")
    fix = "set the clock, for example with systemd-timesyncd or chrony"
    return (problem if abs(ahead) >= CLOCK_PROBLEM_S else warning)("clock", where, fix)


def broker(facts: Answer | FerryError) -> Finding:
    """Does the broker let us in? Without it orders come late, by polls; with a wrong login something is wrong."""
    if isinstance(facts, Answer):
        return ok("broker", f"{facts.where} lets this device in ({facts.took_s * 1000:.0f} ms)")
    fix = facts.fix or "check the network and that the broker runs"
    return problem("broker", f"{facts.message}; until then orders come by polls", fix)


def runtime(facts: Runtime) -> Finding:
    """Does ONNX Runtime work on this processor?"""
    if facts.error:
        return problem("runtime", facts.error, "install edgeferry again for this machine and this Python")
    found = f"ONNX Runtime {facts.version} works on this {facts.machine} ({', '.join(facts.flags) or 'no extensions'})"
    if facts.machine == "x86_64" and FAST_X86 not in facts.flags:
        return warning("runtime", f"{found}; without AVX2 models are several times slower", "prefer small variants")
    return ok("runtime", found)


def codecs(names: Sequence[str]) -> Finding:
    """Which patches can be applied?"""
    found = f"patches: {', '.join(names)}"
    if CODEC_PCO in names:
        return ok("patches", found)
    fix = 'pip install "edgeferry[agent]"; there is no build of pcodec for musl and for 32-bit ARM'
    return warning("patches", f"{found}; without pcodec patches are larger", fix)


def memory(facts: Memory) -> Finding:
    """Is there room for a second session during an update?"""
    second = needed(facts.largest_model, None) + facts.reserve if facts.largest_model else 0
    found = f"{size(facts.available)} of {size(facts.total)} are available"
    if facts.available < MEMORY_BYTES_MIN:
        return problem("memory", found, "stop other programs, or give the machine swap")
    if facts.available < second:
        fix = "nothing, if a short stop is fine; or roll out a smaller variant, or stop other programs during updates"
        what = f"a second release of the largest model may take {size(second)}: an update may stop the first for it"
        return warning("memory", f"{found}; {what}", fix)
    return ok("memory", found)


def journal(states: int, error: str) -> Finding:
    """Is the durable memory whole?"""
    if error:
        fix = "stop the agent and move journal.db* away: models are fetched again, orders are taken afresh"
        return problem("journal", f"journal.db is damaged: {error}", fix)
    return ok("journal", f"the journal is whole; it knows {count(states, 'model')}")


def slots(found: Sequence[SlotCheck], left: int) -> Finding:
    """Is every byte of every release what it should be? `left` releases could not be looked at in time."""
    bad = [one for one in found if not one.whole]
    serving = [one.release for one in bad if one.serves]
    if serving:
        fix = "restart the agent: it fetches them again; if it comes back, suspect the disk"
        return problem("models", f"damaged on the disk: {', '.join(serving)}", fix)
    if bad:
        names = ", ".join(one.release for one in bad)
        return warning("models", f"damaged, but not in service: {names}", "the agent removes them when it restarts")
    if left:
        detail = f"{count(len(found), 'release')} whole; there was no time for {left} more"
        return warning("models", detail, "large models take long to read; look again when the disk is idle")
    return ok("models", f"{count(len(found), 'release')} on the disk, all whole")


def agent(facts: Running) -> list[Finding]:
    """Does it run, answer, and have its line to the fleet?"""
    if facts.pid is None:
        fix = "`systemctl start ferry-agent`, or `ferry-agent run`; its log says why it stopped"
        return [problem("agent", "no agent runs on this folder", fix)]
    if not facts.ready:
        fix = "it may still be loading; if not, restart it"
        return [problem("agent", f"process {facts.pid} does not answer at {facts.url}", fix)]
    line = "is connected to its fleet" if facts.connected else "has no MQTT connection"
    found = f"process {facts.pid} answers at {facts.url} and {line}"
    findings = [
        ok("agent", found) if facts.connected else warning("agent", found, "see the broker's line; it goes on trying")
    ]
    if facts.refused:
        fix = "publish the order again from the controller whose keys this device trusts, or join again with --force"
        findings.append(problem("order", f"the newest order was refused: {facts.refused}", fix))
    return findings


def updates(states: Sequence[ModelState]) -> list[Finding]:
    """How did the last update of each model go, and what is not tried again?"""
    return [finding for state in states for finding in _updates_of(state)]


def _updates_of(state: ModelState) -> list[Finding]:
    found = []
    if state.trouble:
        detail = f"{state.model} waits: {state.trouble}"
        found.append(warning("update", detail, "it goes on by itself once that is mended"))
    last = state.last_update
    if last is not None and last.outcome != "succeeded":
        detail = f"{state.model}@{last.version} {last.outcome.replace('_', ' ')}: {last.detail or last.reason}"
        found.append(warning("update", detail, "publish a better release; `ferry rollout show` has the details"))
    for entry in state.quarantine:
        release = f"{state.model}@{entry.version}"
        fix = "only a newer order tries it again: `ferry rollout retry`, or publish a better release"
        found.append(warning("quarantine", f"{release} failed here and is not tried again: {entry.reason}", fix))
    return found


def spool(facts: SpoolState) -> Finding:
    """Does telemetry get away?"""
    if facts.set_aside:
        detail = "an unreadable telemetry.db was set aside and a new one begun"
        return warning("telemetry", detail, "suspect the disk; delete telemetry.db.unreadable when you have seen it")
    if facts.lost:
        detail = f"{count(facts.lost, 'window')} of telemetry lost, {facts.waiting} waiting"
        return warning("telemetry", detail, "the device was offline for long: raise telemetry_bytes_max if they matter")
    if facts.bytes > SPOOL_FULL_SHARE * facts.bytes_max:
        return warning("telemetry", "the spool is nearly full", "connect the device, or raise telemetry_bytes_max")
    return ok("telemetry", f"{count(facts.waiting, 'window')} waiting to be sent, none lost")


def late(check: str, limit_s: float) -> Finding:
    """A check that did not end within its limit."""
    return problem(check, f"no result within {limit_s:.0f} s", "the disk or the network hangs; see the system's log")


def largest_model(states: Sequence[ModelState]) -> int:
    """Bytes of the files of the largest installed model."""
    installed = [state.installed for state in states if state.installed is not None]
    return max((sum(ref.size for ref in release.files.values()) for release in installed), default=0)


def ok(check: str, detail: str) -> Finding:
    return Finding(check=check, verdict="ok", detail=detail)


def warning(check: str, detail: str, fix: str) -> Finding:
    return Finding(check=check, verdict="warning", detail=detail, fix=fix)


def problem(check: str, detail: str, fix: str) -> Finding:
    return Finding(check=check, verdict="problem", detail=detail, fix=fix)


def size(number: int) -> str:
    """Bytes for people."""
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit in {"B", "kB", "MB"} else f"{value:.1f} {unit}"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def name(model: ModelName, version: str) -> str:
    """A release, as people write it."""
    return f"{model}@{version}"
