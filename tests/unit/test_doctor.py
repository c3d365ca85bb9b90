"""What the doctor makes of facts: every verdict, and that whoever reads it learns what to do."""

import pytest

from common.artifact import ArtifactRef
from common.errors import Unauthenticated, Unavailable
from common.ids import Digest, ModelName, Version
from common.wire.messages import UpdateReport
from edge_agent.doctor import as_document, as_table, judging, worst
from edge_agent.doctor.judging import MIB, Finding
from edge_agent.update import Installed, ModelState
from edge_agent.update.state import Quarantined

MODEL, DIGEST = ModelName("detector"), Digest("sha256:" + "0" * 64)
HERE = judging.Folder(path="/data", exists=True, writable=True, free=10**10, reserve=16 * MIB)
CPU = judging.Runtime(machine="x86_64", flags=("avx", "avx2"), version="1.31.1")


def release(size: int = 10) -> Installed:
    ref = ArtifactRef(DIGEST, size)
    return Installed(
        slot="a",
        version=Version("1"),
        variant="default",
        files={"model.onnx": ref},
        onnx_file="model.onnx",
        manifest=ref,
        inputs=(),
        outputs=(),
    )


def folder(**other: object) -> Finding:
    return judging.folder(judging.Folder(**{**{f: getattr(HERE, f) for f in HERE.__struct_fields__}, **other}))


CASES: list[tuple[Finding | list[Finding] | None, str, str]] = [
    (folder(), "ok", "10.0 GB are free"),
    (folder(exists=False), "problem", "there is no /data"),
    (folder(writable=False), "problem", "cannot be written"),
    (folder(free=15 * MIB), "problem", "an update must leave 17 MB"),
    (folder(free=100 * MIB), "warning", "105 MB are free"),
    (judging.identity("cam-1", 0o600), "ok", "cam-1"),
    (judging.identity("cam-1", 0o640), "problem", "mode 640"),
    (judging.controller(judging.Answer(where="http://c", took_s=0.012)), "ok", "(12 ms)"),
    (judging.controller(Unauthenticated("no such token")), "problem", "does not know this device"),
    (judging.controller(Unavailable("the controller cannot be reached")), "problem", "cannot be reached"),
    (judging.clock(judging.Answer(where="", took_s=0, ahead_s=-2.0)), "ok", "agrees"),
    (judging.clock(judging.Answer(where="", took_s=0, ahead_s=-40.0)), "warning", "40 s behind"),
    (judging.clock(judging.Answer(where="", took_s=0, ahead_s=4000.0)), "problem", "4000 s ahead of"),
    (judging.broker(judging.Answer(where="mqtt://b", took_s=0.005)), "ok", "lets this device in"),
    (judging.broker(Unauthenticated("the broker refused this device")), "problem", "orders come by polls"),
    (judging.runtime(CPU), "ok", "1.31.1 works on this x86_64 (avx, avx2)"),
    (judging.runtime(judging.Runtime(machine="aarch64", flags=(), version="1")), "ok", "no extensions"),
    (judging.runtime(judging.Runtime(machine="x86_64", flags=("avx",), version="1")), "warning", "without AVX2"),
    (judging.runtime(judging.Runtime(machine="x86_64", flags=(), error="ended by SIGILL")), "problem", "SIGILL"),
    (judging.codecs(("tensor-pco.1", "tensor-zstd.1")), "ok", "tensor-pco.1"),
    (judging.codecs(("tensor-zstd.1",)), "warning", "without pcodec"),
    (judging.memory(judging.Memory(total=10**9, available=5 * 10**8, largest_model=10**8)), "ok", "500 MB"),
    (judging.memory(judging.Memory(total=10**9, available=2 * 10**8, largest_model=10**8)), "warning", "317 MB"),
    (
        judging.memory(judging.Memory(total=10**9, available=4 * 10**8, reserve=10**8, largest_model=10**8)),
        "warning",
        "stop",
    ),
    (judging.memory(judging.Memory(total=10**9, available=10**7)), "problem", "10 MB of 1.0 GB"),
    (judging.journal(1, ""), "ok", "1 model"),
    (judging.journal(0, "file is not a database"), "problem", "file is not a database"),
    (judging.slots([judging.SlotCheck(release="d@1", serves=True, whole=True)], 0), "ok", "1 release on the disk"),
    (judging.slots([judging.SlotCheck(release="d@1", serves=True, whole=False)], 0), "problem", "d@1"),
    (judging.slots([judging.SlotCheck(release="d@1", serves=False, whole=False)], 0), "warning", "not in service: d@1"),
    (judging.slots([judging.SlotCheck(release="d@1", serves=True, whole=True)], 2), "warning", "no time for 2 more"),
    (judging.agent(judging.Running()), "problem", "no agent runs"),
    (judging.agent(judging.Running(pid=7, url="http://x")), "problem", "does not answer at http://x"),
    (judging.agent(judging.Running(pid=7, url="http://x", ready=True)), "warning", "no MQTT connection"),
    (judging.agent(judging.Running(pid=7, url="http://x", ready=True, connected=True)), "ok", "is connected"),
    (
        judging.agent(judging.Running(pid=7, url="", ready=True, connected=True, refused="bad signature")),
        "problem",
        "bad signature",
    ),
    (judging.updates([ModelState(model=MODEL, trouble="no room left")]), "warning", "detector waits: no room left"),
    (
        judging.updates(
            [
                ModelState(
                    model=MODEL,
                    last_update=UpdateReport(
                        generation=3, version=Version("2"), outcome="rolled_back", reason="unhealthy", detail="4 of 4"
                    ),
                )
            ]
        ),
        "warning",
        "detector@2 rolled back: 4 of 4",
    ),
    (
        judging.updates(
            [
                ModelState(
                    model=MODEL,
                    quarantine=(Quarantined(files=DIGEST, version=Version("2"), order=3, reason="unhealthy"),),
                )
            ]
        ),
        "warning",
        "detector@2 failed here and is not tried again: unhealthy",
    ),
    (judging.spool(judging.SpoolState(waiting=3, bytes_max=100)), "ok", "3 windows waiting"),
    (judging.spool(judging.SpoolState(lost=2, bytes_max=100)), "warning", "2 windows of telemetry lost"),
    (judging.spool(judging.SpoolState(bytes=95, bytes_max=100)), "warning", "nearly full"),
    (judging.spool(judging.SpoolState(set_aside=True)), "warning", "set aside"),
    (judging.late("broker", 15), "problem", "no result within 15 s"),
]


@pytest.mark.parametrize(("found", "verdict", "said"), CASES)
def test_facts_get_their_verdict_and_what_is_wrong_comes_with_what_to_do(
    found: Finding | list[Finding] | None, verdict: str, said: str
) -> None:
    findings = found if isinstance(found, list) else [found] if found else []
    assert worst(findings) == verdict
    assert said in " ".join(finding.detail for finding in findings)
    for finding in findings:
        assert (finding.verdict == "ok") == (finding.fix == ""), finding


def test_what_the_controller_does_not_say_is_no_finding() -> None:
    assert judging.clock(judging.Answer(where="", took_s=0)) is None


def test_a_model_in_good_order_is_no_news() -> None:
    assert judging.updates([ModelState(model=MODEL, installed=release())]) == []


def test_the_largest_installed_model_counts() -> None:
    states = (ModelState(model=MODEL, installed=release(5)), ModelState(model=MODEL, installed=release(50)))
    assert judging.largest_model((*states, ModelState(model=MODEL))) == 50


def test_the_table_says_what_to_do_below_what_is_wrong_and_sums_up() -> None:
    findings = [judging.ok("clock", "fine"), judging.problem("broker", "gone", "start it")]
    assert as_table(findings).splitlines() == [
        "ok       clock   fine",
        "PROBLEM  broker  gone",
        "                 do: start it",
        "",
        "problems: 1, warnings: 0, ok: 1",
    ]
    assert as_table(findings[:1]).splitlines()[-1] == "all is well"
    assert as_document(findings)["verdict"] == "problem"
    assert as_document(findings)["findings"][0] == {"check": "clock", "verdict": "ok", "detail": "fine", "fix": ""}
