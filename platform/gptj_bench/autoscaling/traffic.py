"""A day of requests, a daily curve with bursts: arrival times, prompt and output lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DAY = 24 * 3600
QUIETEST = 4 * 3600  # time of day, in seconds


@dataclass(frozen=True)
class Traffic:
    """Parameters of the traffic. Lengths are log-normal; bursts start abruptly."""

    requests_per_s: float = 8.0  # mean over all hours, including bursts
    hours: float = 24.0
    daily_swing: float = 0.6  # the daily curve ranges from 1 - swing to 1 + swing times its mean
    bursts_per_day: float = 24.0
    burst_factors: tuple[float, float] = (2.0, 4.0)  # uniform multiple of the curve
    burst_seconds: float = 300.0  # mean of an exponential distribution
    burst_prompts: float = 1.0  # how many times as long prompts are in bursts
    prompt_tokens: float = 256.0  # the median
    new_tokens: float = 192.0  # the median
    spread: float = 0.7  # sigma of both logarithms
    context: int = 2048  # prompt and output together
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("requests_per_s", "hours", "burst_seconds", "prompt_tokens", "new_tokens")
        for name in (*positive, "burst_prompts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.daily_swing < 1:
            raise ValueError(f"daily_swing must be in [0, 1), got {self.daily_swing}")
        if self.context < 2:
            raise ValueError(f"context must be 2 or more, got {self.context}")


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival."""

    times: NDArray[np.float64]  # seconds since the start
    prompts: NDArray[np.int64]  # tokens
    outputs: NDArray[np.int64]  # new tokens, including the first

    def __len__(self) -> int:
        return len(self.times)


def arrivals(traffic: Traffic) -> Arrivals:
    """Sample arrivals; deterministic for the same traffic and seed."""
    random = np.random.default_rng(traffic.seed)
    rates, bursts = request_rates(traffic, random)
    counts = random.poisson(rates)
    seconds = np.repeat(np.arange(len(rates)), counts)
    times = np.sort(seconds + random.random(len(seconds)))
    sizes = [
        np.exp(random.normal(np.log(median), traffic.spread, len(times)))
        for median in (traffic.prompt_tokens, traffic.new_tokens)
    ]
    sizes[0][bursts[seconds]] *= traffic.burst_prompts
    prompts = np.clip(sizes[0], 1, traffic.context - 1).astype(np.int64)
    outputs = np.clip(sizes[1], 1, traffic.context - prompts).astype(np.int64)
    return Arrivals(times, prompts, outputs)


def request_rates(
    traffic: Traffic, random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Requests per second, and whether there is a burst, for each second."""
    seconds = np.arange(round(traffic.hours * 3600), dtype=np.float64)
    curve = 1 - traffic.daily_swing * np.cos(2 * np.pi * (seconds - QUIETEST) / DAY)
    factors = np.ones_like(seconds)
    for _ in range(random.poisson(traffic.bursts_per_day * len(seconds) / DAY)):
        start = random.uniform(0, len(seconds))
        end = start + random.exponential(traffic.burst_seconds)
        inside = slice(int(start), int(end) + 1)
        factors[inside] = np.maximum(factors[inside], random.uniform(*traffic.burst_factors))
    rates = curve * factors
    scaled: NDArray[np.float64] = rates * (traffic.requests_per_s / rates.mean())
    return scaled, factors > 1
