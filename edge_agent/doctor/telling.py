"""Findings for people and for programs."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.doctor.judging import Finding, Verdict

_WORDS: dict[Verdict, str] = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def worst(findings: Sequence[Finding]) -> Verdict:
    """The verdict on the whole device."""
    verdicts = {finding.verdict for finding in findings}
    return "problem" if "problem" in verdicts else "warning" if "warning" in verdicts else "ok"


def as_table(findings: Sequence[Finding]) -> str:
    """One line for each finding, below it what to do, and a last line that sums up."""
    width = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{_WORDS[finding.verdict]:<8} {finding.check:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  do: {finding.fix}")
    return "\n".join([*lines, "", _summary(findings)])


def as_document(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `-o json` prints."""
    return {"verdict": worst(findings), "findings": msgspec.to_builtins(findings)}


def _summary(findings: Sequence[Finding]) -> str:
    found = Counter(finding.verdict for finding in findings)
    if not found["problem"] and not found["warning"]:
        return "all is well"
    return f"problems: {found['problem']}, warnings: {found['warning']}, ok: {found['ok']}"
