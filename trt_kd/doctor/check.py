"""One finding of the doctor, and the text and document made of many."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "missing", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and the one thing that would mend it."""

    name: str
    """Subject of the check, unique in a list of checks."""
    status: Status
    """``ok``; ``warn``: works, with a loss; ``missing``: optional and absent; ``fail``: broken."""
    detail: str
    """What was found, with values and limits."""
    remedy: str = ""
    """One fix; empty exactly where nothing is to be done."""


@dataclass(frozen=True)
class Capability:
    """Whether this machine can do one thing that trt-kd offers."""

    available: bool
    """All that is needed is here."""
    detail: str
    """What it runs on, or what is missing."""
    remedy: str = ""
    """How to get it, where it is not available."""


def render(checks: Sequence[Check]) -> str:
    """Plain text: one line per check, its remedy below it, the totals last."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8}{check.name:<{width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<{width + 10}}fix: {check.remedy}")
    counts = Counter(check.status for check in checks)
    totals = ", ".join(f"{counts[status]} {status}" for status in ("ok", "warn", "missing", "fail"))
    return "\n".join([*lines, "", f"{len(checks)} checks: {totals}"])


def render_capabilities(capabilities: Mapping[str, Capability]) -> str:
    """Plain text: one line per capability, how to get it below where it is absent."""
    width = max(map(len, capabilities), default=0)
    lines = []
    for name, capability in capabilities.items():
        answer = "yes" if capability.available else "no"
        lines.append(f"{answer:<8}{name:<{width}}  {capability.detail}")
        if capability.remedy:
            lines.append(f"{'':<{width + 10}}get it: {capability.remedy}")
    return "\n".join(lines)


def document(
    checks: Sequence[Check],
    capabilities: Mapping[str, Capability],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """JSON document: ``schema_version``, ``environment``, ``checks`` and ``capabilities``."""
    return {
        "schema_version": 1,
        "environment": dict(environment),
        "checks": [asdict(check) for check in checks],
        "capabilities": {name: asdict(value) for name, value in capabilities.items()},
    }
