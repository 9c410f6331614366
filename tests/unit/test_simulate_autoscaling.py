"""The autoscaling simulator: queueing theory, Ray's own policy, and no request lost."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from ray.serve._private import autoscaling_state
from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingContext

from gptj import GPTJConfig
from gptj_bench.autoscaling.__main__ import combinations, main, read_service
from gptj_bench.autoscaling.autoscaler import Autoscaler, Clock, simulated_time
from gptj_bench.autoscaling.machines import KV_6B, MACHINES, WEIGHTS_6B, Machine
from gptj_bench.autoscaling.replica import Request, RowsReplica, TokensReplica
from gptj_bench.autoscaling.report import first_tokens, summary
from gptj_bench.autoscaling.simulation import (
    CONTROL_SECONDS,
    Outcome,
    Service,
    Signal,
    simulate,
)
from gptj_bench.autoscaling.traffic import Arrivals, Traffic, arrivals

SERVE_CONFIG = Path(__file__).resolve().parents[2] / "k8s" / "base" / "serve.yaml"
# Round numbers: a step takes 10 ms, and 1 ms more for each 100 new tokens above the first 1000.
MACHINE = Machine(
    name="round",
    basis="made up",
    weight_bytes=1e9,
    memory_bytes_per_s=1e11,
    flop_per_token=1e9,
    flop_per_s=1e14,
    kv_bytes_per_token=0,
    cache_tokens=100_000,
    step_overhead_s=0.0,
    start_s=5.0,
    load_bytes_per_s=1e8,
    node_s=0.0,
)
# Prompts cost 10 us a token, and nothing else costs anything.
PROMPTS_ONLY = replace(MACHINE, weight_bytes=0)
SERVICE = Service(
    autoscaling={
        "min_replicas": 1,
        "max_replicas": 8,
        "target_ongoing_requests": 8,
        "upscale_delay_s": 10,
        "downscale_delay_s": 60,
    },
    max_ongoing_requests=64,
    max_queued_requests=200,
    max_num_seqs=16,
    max_num_batched_tokens=256,
)
FIXED = SERVICE.autoscaling | {"max_replicas": 1}
SIGNALS = get_args(Signal)  # requests, tokens
calls: list[float] = []


def counting_policy(context: AutoscalingContext) -> tuple[int | float, dict[str, Any]]:
    """Ray's default policy, recording its inputs."""
    from test_simulate_autoscaling import calls  # Ray pickles this function, and not the list

    calls.append(context.total_num_requests)
    return default_autoscaling_policy(context)


def even(every: float, count: int, prompt: int = 100, output: int = 50) -> Arrivals:
    """One request after another."""
    sizes = np.ones(count, dtype=np.int64)
    return Arrivals(np.arange(1, count + 1) * every, prompt * sizes, output * sizes)


def burst(count: int, at: float = 100.0) -> Arrivals:
    """A few quiet minutes with a burst of requests within ten seconds in the middle."""
    quiet = np.arange(0.5, 600, 5.0)
    times = np.sort(np.concatenate([quiet, np.linspace(at, at + 10, count)]))
    sizes = np.ones(len(times), dtype=np.int64)
    return Arrivals(times, 200 * sizes, 200 * sizes)


def targets(outcome: Outcome) -> list[int]:
    return [moment.target for moment in outcome.moments]


def test_a_lone_request_takes_its_prompts_step_and_a_step_for_each_further_token() -> None:
    (request,) = simulate(SERVICE, MACHINE, even(3.0, 1, prompt=200, output=11)).requests
    assert request.first - request.arrival == pytest.approx(0.010)
    assert request.end - request.first == pytest.approx(10 * 0.010)


def test_a_long_prompt_takes_as_many_steps_as_it_fills() -> None:
    (request,) = simulate(SERVICE, MACHINE, even(3.0, 1, prompt=1024, output=1)).requests
    assert request.end == request.first == pytest.approx(request.arrival + 1024 / 256 * 0.010)


def test_outputs_that_decode_together_share_each_step() -> None:
    """Sixteen at once: the first's prompt is a step, the others' the next; then 10 ms a token."""
    replica = TokensReplica(0, MACHINE, max_num_seqs=16, max_num_batched_tokens=256)
    requests = [Request(number, 1.0, 16, 101) for number in range(16)]
    for request in requests:
        replica.add(1.0, request)
    ended: list[Request] = []
    while len(ended) < 16:
        ended += replica.work(replica.due)
    assert [request.first for request in requests] == pytest.approx([1.01] + [1.02] * 15)
    for request in requests:
        assert request.end - request.first == pytest.approx(1.0)


def test_rows_and_cache_limit_the_running_requests() -> None:
    """The third waits for the first two to end; also if the cache only holds two."""
    for rows, cache in ((2, 100_000), (16, 299)):
        machine = replace(MACHINE, cache_tokens=cache)
        replica = TokensReplica(0, machine, max_num_seqs=rows, max_num_batched_tokens=256)
        requests = [Request(number, 0.0, 50, 51) for number in range(3)]
        for request in requests:
            replica.add(0.0, request)
        while replica.ongoing:
            replica.work(replica.due)
        assert requests[2].first > min(requests[0].end, requests[1].end)


def test_rows_are_batched_at_the_length_of_the_longest() -> None:
    """The first at once; of those that came meanwhile as many as a batch takes, then the rest."""
    replica = RowsReplica(0, PROMPTS_ONLY, max_batch=3)
    rows = [Request(number, 0.0, 100 * (number + 1), 1) for number in range(5)]
    for row in rows:
        replica.add(0.0, row)
    ends = []
    while replica.ongoing:
        ends.append([(request.number, request.end) for request in replica.work(replica.due)])
    assert ends == [
        [(0, pytest.approx(0.001))],
        [(number, pytest.approx(0.001 + 3 * 0.004)) for number in (1, 2, 3)],
        [(4, pytest.approx(0.013 + 0.005))],
    ]
    assert replica.due == float("inf")
    assert [row.first for row in rows] == [row.end for row in rows]


@pytest.mark.slow
def test_waiting_times_match_queueing_theory() -> None:
    """One prompt a step, all alike, Poisson arrivals: M/D/1, whose mean wait is known.

    rho / (2 (1 - rho)) service times (Pollaczek and Khinchine). 200,000 requests at a load of 0.7
    leave an error of some percent.
    """
    random = np.random.default_rng(0)
    service_seconds, load = 1000 * 1e-5, 0.7
    times = np.cumsum(random.exponential(service_seconds / load, 200_000))
    sizes = np.ones(len(times), dtype=np.int64)
    alone = replace(
        SERVICE, autoscaling=FIXED, max_ongoing_requests=10_000, max_num_batched_tokens=1000
    )
    outcome = simulate(alone, PROMPTS_ONLY, Arrivals(times, 1000 * sizes, sizes))
    _, seconds = first_tokens(outcome)
    expected = load / (2 * (1 - load)) * service_seconds
    assert (seconds - service_seconds).mean() == pytest.approx(expected, rel=0.05)
    assert seconds.min() == pytest.approx(service_seconds)


@pytest.mark.parametrize("most_queued", [-1, 20])
def test_every_request_is_served_once_or_refused(most_queued: int) -> None:
    """Through a flood and the resulting starts and stops of replicas."""
    requests = burst(1500)
    outcome = simulate(replace(SERVICE, max_queued_requests=most_queued), MACHINE, requests)
    assert [request.arrival for request in outcome.requests] == requests.times.tolist()
    for request in outcome.requests:
        if request.refused:
            assert request.first == request.end == float("inf")
        else:
            assert request.arrival < request.first < request.end < float("inf")
    row = summary(outcome)
    assert row["served"] + row["refused"] == row["requests"] == len(requests)
    assert (row["refused"] > 0) == (most_queued == 20)
    assert max(targets(outcome)) > 1 == targets(outcome)[-1]


def test_rays_policy_decides_on_what_the_proxy_reported() -> None:
    """The function named in the settings is called, with the requests of the look-back period."""
    calls.clear()
    policy = {"policy_function": f"{__name__}:counting_policy"}
    settings = SERVICE.autoscaling | {"policy": policy}
    outcome = simulate(replace(SERVICE, autoscaling=settings), MACHINE, burst(1500))
    assert len(calls) == len(outcome.moments)
    assert max(calls) > 100
    assert targets(outcome) == targets(simulate(SERVICE, MACHINE, burst(1500)))


def test_a_steady_load_scales_as_ray_documents() -> None:
    """20 ongoing at 8 a replica: three, after the proxy's report and the upscale delay."""
    clock = Clock()
    with simulated_time(clock):
        autoscaler = Autoscaler(SERVICE.autoscaling, clock)
        history = []
        for _ in range(40):
            clock.now += CONTROL_SECONDS
            autoscaler.observe({0: 15}, 5)
            history.append(autoscaler.decide({0: 15}))
    reported = 10  # the default metrics_interval_s
    assert history == [1] * (reported + 10 - 1) + [3] * (40 - reported - 10 + 1)


@pytest.mark.slow
def test_tokens_as_the_signal_count_a_request_by_its_context() -> None:
    """Of equal requests they count what requests do; of longer ones more, at the same rate."""
    same = [targets(simulate(SERVICE, MACHINE, burst(1500), signal=each)) for each in SIGNALS]
    assert same[0] == same[1]
    assert max(same[0]) > 1
    prompts = np.concatenate([np.full(600, 100), np.full(600, 2000)])
    mixed = Arrivals(np.arange(1, 1201) * 0.1, prompts, np.full(1200, 50))
    by_requests, by_tokens = (
        simulate(SERVICE, MACHINE, mixed, signal=each).moments for each in SIGNALS
    )
    end = mixed.times[-1]
    assert max(each.target for each in by_tokens if each.time < end) > max(
        each.target for each in by_requests if each.time < end
    )


def test_a_simulation_restores_real_time() -> None:
    simulate(SERVICE, MACHINE, even(1.0, 3))
    assert autoscaling_state.time is time


@pytest.mark.slow
def test_more_load_needs_more_replicas_and_more_hours() -> None:
    rows = []
    for rate in (10, 40, 80):
        day = arrivals(Traffic(requests_per_s=rate, hours=0.2, new_tokens=100, bursts_per_day=0))
        rows.append(summary(simulate(SERVICE, MACHINE, day)))
    for less, more in itertools.pairwise(rows):
        assert less["replicas_mean"] < more["replicas_mean"]
        assert less["replica_hours"] < more["replica_hours"]


def test_a_replica_accepts_requests_only_once_started() -> None:
    """Ordered, it takes 5 s of itself, 10 s of weights and the time of a machine."""
    assert MACHINE.start_seconds == 15
    slow = MACHINE.with_node(100)
    assert slow.start_seconds == 115
    patient = replace(SERVICE, autoscaling=SERVICE.autoscaling | {"downscale_delay_s": 600})
    moments = simulate(patient, slow, burst(1500)).moments
    ordered = next(moment.time for moment in moments if moment.target > 1)
    running = next(moment.time for moment in moments if moment.running > 1)
    assert 115 <= running - ordered <= 115 + CONTROL_SECONDS


@pytest.mark.slow
def test_the_same_seed_gives_the_same_day_and_another_one_another() -> None:
    def rows(seed: int) -> dict[str, Any]:
        day = arrivals(Traffic(requests_per_s=20, hours=0.05, new_tokens=100, seed=seed))
        return summary(simulate(SERVICE, MACHINE, day, seed))

    assert rows(1) == rows(1) != rows(2)


def test_traffic_has_the_requested_mean_a_daily_curve_and_bursts() -> None:
    calm = arrivals(Traffic(requests_per_s=5, bursts_per_day=0))
    assert len(calm) == pytest.approx(5 * 86400, rel=0.01)
    per_hour = np.bincount((calm.times // 3600).astype(int))
    assert per_hour.argmin() in (3, 4)
    assert per_hour.argmax() in (15, 16)
    bursty = arrivals(Traffic(requests_per_s=5, bursts_per_day=24))
    assert len(bursty) == pytest.approx(len(calm), rel=0.01)
    per_minute = [np.bincount((day.times // 60).astype(int)) for day in (calm, bursty)]
    assert per_minute[1].max() > 1.5 * per_minute[0].max()
    assert (bursty.prompts + bursty.outputs <= 2048).all()
    longer = arrivals(Traffic(requests_per_s=5, bursts_per_day=24, burst_prompts=4))
    assert (longer.times == bursty.times).all()
    grown = longer.prompts > 2 * bursty.prompts
    assert 0.01 < grown.mean() < 0.5
    assert (longer.prompts[~grown] <= 2 * bursty.prompts[~grown]).all()
    assert bursty.outputs.min() >= 1


def test_the_published_models_constants_match_its_shape() -> None:
    config = GPTJConfig.preset("6b")
    assert config.n_layer * 2 * config.n_embd * 2 == KV_6B
    assert pytest.approx(2 * 6_050_882_784, rel=1e-3) == WEIGHTS_6B


def test_a_request_that_never_fits_and_bad_settings_are_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match=r"150001 tokens never fits.*100000"):
        simulate(SERVICE, MACHINE, even(1.0, 1, prompt=150_000, output=1))
    with pytest.raises(ValueError, match="requests_per_s must be above 0, got 0"):
        Traffic(requests_per_s=0)
    with pytest.raises(ValueError, match="not NAME=VALUE"):
        combinations(["max_replicas"])
    with pytest.raises(ValueError, match="has no application 'poems'; it has"):
        read_service(SERVE_CONFIG, "poems", MACHINE)


def test_a_services_limits_follow_from_the_machine() -> None:
    """As the overlay for the card sets them, or as a replica would choose them on a CPU."""
    found = {name: read_service(SERVE_CONFIG, "generation", MACHINES[name]) for name in MACHINES}
    limits = {
        name: (each.max_num_seqs, each.max_num_batched_tokens) for name, each in found.items()
    }
    assert limits == {"h100": (256, 1024), "a10g": (35, 256), "cpu-305m": (64, 256)}


def test_combinations_are_complete() -> None:
    assert combinations(["a=1,2", "b=x"]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert combinations([]) == [{}]


@pytest.fixture
def lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    options = ["--hours", "0.3", "--requests-per-s", "4", "--plot", str(tmp_path / "day.png")]
    main([str(SERVE_CONFIG), *options, "--set", "max_replicas=3"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_command_prints_settings_outcome_and_table_and_draws_the_day(
    lines: list[str], tmp_path: Path
) -> None:
    objects = [json.loads(line) for line in lines if line.startswith("{")]
    assert objects[0]["machine"]["basis"] == "steps measured on an H100"
    outcome = objects[2]
    assert outcome["settings"]["max_replicas"] == 3
    assert outcome["served"] > 3000
    assert 0 < outcome["ttft_p50_s"] <= outcome["ttft_p99_s"] <= outcome["ttft_max_s"]
    assert [row["from_s"] for row in objects[3:6]] == [0, 300, 600]
    assert lines[-1].startswith("| 3 |")
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")


def test_several_values_are_compared_on_the_same_requests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = ["--hours", "0.1", "--set", "target_ongoing_requests=1,32", "--machine", "a10g"]
    sweep += ["--requests-per-s", "3", "--set", "max_replicas=4"]
    main([str(SERVE_CONFIG), *sweep])
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    few, many = objects[2:]
    assert few["requests"] == many["requests"]
    assert few["replica_hours"] > many["replica_hours"]


@pytest.mark.slow
@pytest.mark.parametrize("application", ["classification", "question-answering"])
def test_services_of_whole_rows_are_simulated_too(
    application: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At next to no load a reply takes a step, about 4.6 ms, and one replica is enough."""
    options = ["--hours", "0.5", "--requests-per-s", "0.5", "--prompt-tokens", "64"]
    main([str(SERVE_CONFIG), "--application", application, *options])
    outcome = json.loads(capsys.readouterr().out.splitlines()[2])
    assert outcome["ttft_p50_s"] == pytest.approx(0.0046, abs=0.0005)
    assert outcome["replicas_max"] == 1
    assert outcome["served"] == outcome["requests"] > 300


def test_an_h100s_steps_are_near_the_measured_ones() -> None:
    """Milliseconds by outputs with contexts of 224 tokens, and by prompt tokens (2026-11-27)."""
    decoding = {1: 4.312, 8: 5.074, 32: 6.001, 64: 7.283, 128: 9.685, 256: 14.59}
    machine = MACHINES["h100"]
    for outputs, measured in decoding.items():
        near = 0.09 if outputs == 1 else 0.03
        assert machine.step_seconds(outputs, outputs * 224, 0) == pytest.approx(
            measured / 1e3, rel=near
        )
    for tokens, measured in {1024: 21.09, 2048: 42.02}.items():
        assert machine.step_seconds(0, 0, tokens) == pytest.approx(measured / 1e3, rel=0.01)


def test_machines_state_their_basis() -> None:
    assert all("measured" in machine.basis for machine in MACHINES.values())
