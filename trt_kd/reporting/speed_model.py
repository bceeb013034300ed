"""What a report says of speed: workloads by our clock, and loads by a load generator's."""

from typing import Literal

from trt_kd.reporting.record import Record


class Percentiles(Record):
    """A distribution over repeats, in milliseconds."""

    p50: float
    """Median."""
    p90: float
    """90th percentile."""
    p99: float
    """99th percentile."""


class WatchedRecord(Record):
    """What the GPUs told while something was measured; null where none was watched."""

    energy_j_per_token: float | None = None
    """Energy of the GPUs per generated token, prefill included; null where no GPU tells power."""
    gpu_power_w: float | None = None
    """Mean power of the GPUs together while it ran."""
    gpu_clock_mhz: float | None = None
    """Median clock of the multiprocessors while it ran."""
    gpu_temperature_c: float | None = None
    """Highest temperature of a GPU while it ran."""
    gpu_memory_bytes: int | None = None
    """Most memory in use on the GPUs together while it ran, of whatever process."""
    gpu_throttled: dict[str, float] | None = None
    """Share of the time by reason that the GPUs were throttled; null where they do not tell."""


class SpeedRecord(WatchedRecord):
    """One workload on one backend."""

    backend: str
    """Runtime, by its registered name."""
    format: str
    """Format of the weights that ran."""
    batch_size: int
    """Sequences decoded at once, or requests in flight where ``under_load``."""
    under_load: bool = False
    """True where a load generator measured it: ``batch_size`` requests are in flight at once."""
    input_tokens: int
    """Prompt tokens of each sequence (ISL)."""
    output_tokens: int
    """Tokens generated for each sequence (OSL), exactly."""
    ttft_ms: Percentiles
    """Time to the first token, prefill included."""
    itl_ms: Percentiles | None
    """Time between two tokens after the first; null where only one token is generated."""
    output_tokens_per_s: float
    """Generated tokens of the whole batch over the whole time, prefill included; the median."""
    repeats: int
    """Timed runs after the warm-up."""
    spread: float
    """Half the range of output_tokens_per_s over the repeats, as a share of the median."""
    peak_memory_bytes: int | None = None
    """Largest resident memory of the process that ran it."""
    prefill_floor_ms: float | None = None
    """Least time of reading the prompts on this machine, from its measured peaks (roofline)."""
    prefill_bound: Literal["weights", "cache", "compute"] | None = None
    """What that least time waits for: reading weights, writing the cache, or arithmetic."""
    decode_floor_ms: float | None = None
    """Least time of one decoding step on this machine, from its measured peaks (roofline)."""
    decode_bound: Literal["weights", "cache", "compute"] | None = None
    """What that least time waits for: reading weights, reading the cache, or arithmetic."""
    load_s: float | None = None
    """Time to load the model, not part of any other number."""
    steady: bool | None = None
    """False where the repeats drifted too far apart to be judged; null where not checked."""
    client_headroom: float | None = None
    """How many times this rate the load generator reaches without a model; null if not known."""


class LoadRecord(WatchedRecord):
    """One load on one server or engine, as a load generator measured it."""

    backend: str
    """Load generator, by its registered name."""
    format: str
    """Format of the weights that ran."""
    concurrency: int | None
    """Requests in flight at once; null where requests arrive at a rate."""
    request_rate: float | None
    """Requests per second, arriving at random (Poisson); null where so many are in flight."""
    input_tokens: int
    """Prompt tokens of each request (ISL)."""
    output_tokens: int
    """Tokens asked for in each request (OSL)."""
    ttft_ms: Percentiles
    """Time to the first token, queue and prefill included; medians over runs."""
    tpot_ms: Percentiles
    """Time per output token after the first, one value per request; medians over runs."""
    e2e_ms: Percentiles
    """The whole request; medians over runs."""
    output_tokens_per_s: float
    """Generated tokens of all requests over the whole time; median of runs."""
    requests_per_s: float | None
    """Requests that were answered, per second; median of runs."""
    tokens_per_s_per_user: float | None
    """What one user sees: generation only; median of runs."""
    slo: dict[str, float] = {}
    """Limits in milliseconds that a request must meet, all of them, to be good."""
    goodput_requests_per_s: float | None = None
    """Good requests per second; null where there are no limits."""
    repeats: int
    """Runs that count."""
    spread: float
    """Half the range of output_tokens_per_s over the runs, as a share of the median."""
    steady: bool | None = None
    """False where the runs drifted too far apart to be judged."""
    client_headroom: float | None = None
    """How many times this rate the load generator reaches without a model; null if not known."""
    served_here: bool | None = None
    """False where the server was on another machine, whose GPUs were not watched."""
