"""Power, clocks, temperature, memory and throttling of NVIDIA GPUs while something runs on them.

``nvidia-smi`` tells them ten times a second, in a process of its own. Where there is none, or the
driver does not know a number, that number is absent, never zero. Energy is the integral of power,
which the driver itself averages over up to a second: it says little of runs shorter than that, so
a run with fewer than ``LEAST_SAMPLES`` has none. Names of the throttle reasons are those of NVML
(nvmlClocksEventReasons).
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from time import perf_counter
from types import TracebackType
from typing import Any

from typing_extensions import Self

from trt_kd.measuring.clock import Clock
from trt_kd.measuring.statistics import median

PROGRAM = "nvidia-smi"
PERIOD_MS = 100
LEAST_SAMPLES = 10
FIELDS = ("index", "power.draw", "clocks.sm", "temperature.gpu", "memory.used")
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same number by its name of today and of drivers before 535."""
REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Bits that mean that the GPU runs slower than asked; idling and chosen clocks are none."""
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class GpuSample:
    """One GPU at one moment; None where the driver does not tell."""

    at_s: float
    index: int
    power_w: float | None
    clock_mhz: float | None
    temperature_c: float | None
    memory_bytes: float | None
    reasons: int | None
    """Bits of ``REASONS`` and others."""


def parse_sample(line: str, at_s: float) -> GpuSample | None:
    """One line of ``--format=csv,noheader,nounits``; None for anything else."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(FIELDS) + 1 or not parts[0].isdigit():
        return None
    power, clock, temperature, memory = (_number(part) for part in parts[1:-1])
    try:
        reasons = int(parts[-1], 16)
    except ValueError:
        reasons = None
    size = None if memory is None else memory * _MEBIBYTE
    return GpuSample(at_s, int(parts[0]), power, clock, temperature, size, reasons)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None


class GpuWatch:
    """Samples of every GPU that this process may use. A context manager."""

    def __init__(self, clock: Clock = perf_counter) -> None:
        """``clock`` stamps the samples, and later tells when something ran."""
        self.clock = clock
        self._samples: list[GpuSample] = []
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def between(self, start_s: float, end_s: float) -> list[GpuSample]:
        """Samples of that time by the watch's clock."""
        return [sample for sample in list(self._samples) if start_s <= sample.at_s <= end_s]

    def __enter__(self) -> Self:
        """Start, where there is a GPU that can be asked."""
        argv = _command()
        if argv is not None:
            self._process = subprocess.Popen(
                [*argv, f"--loop-ms={PERIOD_MS}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        if self._process is None or self._thread is None:
            return
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        if self._process is None or self._process.stdout is None:
            return
        for line in self._process.stdout:
            sample = parse_sample(line, self.clock())
            if sample is not None:
                self._samples.append(sample)


def _command() -> list[str] | None:
    """What asks the driver, or None where nothing answers."""
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [f"--id={visible}"] if visible else []
    for reasons in REASON_FIELDS:
        query = f"--query-gpu={','.join((*FIELDS, reasons))}"
        argv = [program, *chosen, query, "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0 and any(parse_sample(x, 0.0) for x in done.stdout.splitlines()):
            return argv
    return None


def gpu_use(samples: Sequence[GpuSample], start_s: float, end_s: float) -> dict[str, Any] | None:
    """What one run took of the GPUs; a number that is not known is absent. None without samples.

    ``energy_j`` and ``power_w`` are sums over GPUs, ``clock_mhz`` the median of them all,
    ``temperature_c`` and ``memory_bytes`` the highest, the latter a sum over GPUs; ``throttled``
    has the share of samples by reason.
    """
    if not samples:
        return None
    by_gpu: dict[int, list[GpuSample]] = {}
    for sample in samples:
        by_gpu.setdefault(sample.index, []).append(sample)
    gpus = by_gpu.values()
    powers = [[(s.at_s, s.power_w) for s in each if s.power_w is not None] for each in gpus]
    memory = [[s.memory_bytes for s in each if s.memory_bytes is not None] for each in gpus]
    clocks = [s.clock_mhz for s in samples if s.clock_mhz is not None]
    temperatures = [s.temperature_c for s in samples if s.temperature_c is not None]
    reasons = [s.reasons for s in samples if s.reasons is not None]
    found: dict[str, Any] = {"samples": min(map(len, by_gpu.values()))}
    if all(len(each) >= LEAST_SAMPLES for each in powers):
        found["energy_j"] = sum(energy_j(each, start_s, end_s) for each in powers)
    if all(powers):
        found["power_w"] = sum(fmean(watts for _, watts in each) for each in powers)
    if clocks:
        found["clock_mhz"] = median(clocks)
    if temperatures:
        found["temperature_c"] = max(temperatures)
    if all(memory):
        found["memory_bytes"] = int(sum(max(each) for each in memory))
    if reasons:
        shares = {name: sum(bool(r & bit) for r in reasons) for bit, name in REASONS.items()}
        found["throttled"] = {name: n / len(reasons) for name, n in shares.items() if n}
    return found


def energy_j(power: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Integral over time of (seconds, watts), straight between samples and level at the ends."""
    points = [(start_s, power[0][1]), *power, (end_s, power[-1][1])]
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(points))


def gpu_record(runs: Sequence[dict[str, Any] | None], tokens: float) -> dict[str, Any]:
    """Numbers of a record from ``gpu_use`` of its runs, which made ``tokens`` tokens on average.

    Empty where the GPUs were not watched; a number that one run lacks is absent.
    """
    known = [run for run in runs if run is not None]
    if not known or len(known) < len(runs):
        return {}

    def of(name: str) -> list[float]:
        values = [run[name] for run in known if name in run]
        return values if len(values) == len(known) else []

    found: dict[str, Any] = {}
    if energies := of("energy_j"):
        found["energy_j_per_token"] = sum(energies) / (tokens * len(energies))
    for name, pick in (("power_w", fmean), ("clock_mhz", median), ("temperature_c", max),
                       ("memory_bytes", max)):  # fmt: skip
        if values := of(name):
            found[f"gpu_{name}"] = pick(values)
    if all("throttled" in run for run in known):
        names = dict.fromkeys(name for run in known for name in run["throttled"])
        found["gpu_throttled"] = {
            name: fmean(run["throttled"].get(name, 0.0) for run in known) for name in names
        }
    return found


UNEQUAL_SHARE = 0.1
"""Share of the samples by which variants may differ in being throttled."""


def mark_unequal_throttling(variants: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Mark workloads whose variants were throttled unequally as not steady: no gate uses them.

    Records of the variants are in one order.
    """
    for records in zip(*variants, strict=True):
        shares = [max(record["gpu_throttled"].values(), default=0.0)
                  for record in records if "gpu_throttled" in record]  # fmt: skip
        if shares and max(shares) - min(shares) > UNEQUAL_SHARE:
            for record in records:
                record["steady"] = False
