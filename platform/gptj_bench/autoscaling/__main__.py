"""Simulate a day of bursty traffic under a Serve config's autoscaling settings, without a cluster.

    python -m gptj_bench.autoscaling k8s/base/serve.yaml [--application generation] [--machine h100]
        [--node-seconds 0] [--requests-per-s 8] [--hours 24] [--seed 0] [--set max_replicas=8]
        [--set target_ongoing_requests=16,32,48 …] [--signal requests] [--burst-prompts 1]
        [--plot day.png]

The autoscaler is Ray Serve's own; replicas are simulated at the rates of `--machine` (see
machines.py for the rates and their basis). Generation replicas decode one token per sequence and
step; the others compute batches of whole rows: `--prompt-tokens` is a row's length, and the time to
first token is the reply's. `--node-seconds` is the time to provision a machine for a new replica.
`--signal tokens` counts requests by their tokens, as a policy of ours could: a request that has, on
the mean of its life, twice as many in the cache as others counts twice. `--burst-prompts` makes the
prompts of bursts longer.
`--set` overrides a setting of `autoscaling_config`; with several comma-separated values, every
combination is simulated on the same requests.

Prints JSON lines: the settings, then each combination's outcome (time to first token, replicas,
replica-hours), for a single combination also every five minutes' outcome, and at the end a table.
`--plot` draws the day of a single combination.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import yaml

from deployments.loading import BatchArguments
from gptj import GPTJConfig
from gptj.engine.limits import Limits
from gptj.serialization.json_object import to_json
from gptj_bench.autoscaling.machines import MACHINES, Machine
from gptj_bench.autoscaling.report import Row, intervals, plot, summary, table
from gptj_bench.autoscaling.simulation import Service, Signal, simulate
from gptj_bench.autoscaling.traffic import Traffic, arrivals
from gptj_jobs import command_line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--application", default="generation")
    parser.add_argument("--machine", choices=sorted(MACHINES), default="h100")
    parser.add_argument("--node-seconds", type=float, default=0.0)
    parser.add_argument("--requests-per-s", type=float, default=Traffic.requests_per_s)
    parser.add_argument("--prompt-tokens", type=float, default=Traffic.prompt_tokens)
    parser.add_argument("--new-tokens", type=float, default=Traffic.new_tokens)
    parser.add_argument("--hours", type=float, default=Traffic.hours)
    parser.add_argument("--seed", type=int, default=Traffic.seed)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE[,VALUE…]")
    parser.add_argument("--signal", choices=get_args(Signal), default="requests")
    parser.add_argument("--burst-prompts", type=float, default=Traffic.burst_prompts)
    parser.add_argument("--plot", type=command_line.folder)
    given = parser.parse_args(arguments)
    try:
        changes = combinations(given.set)
        traffic = Traffic(
            requests_per_s=given.requests_per_s,
            prompt_tokens=given.prompt_tokens,
            new_tokens=given.new_tokens,
            burst_prompts=given.burst_prompts,
            hours=given.hours,
            seed=given.seed,
        )
        machine = MACHINES[given.machine].with_node(given.node_seconds)
        service = read_service(given.config, given.application, machine)
    except ValueError as error:
        parser.error(str(error))
    if given.plot and len(changes) > 1:
        parser.error("--plot draws one day: give one value for each --set")
    _show({"machine": asdict(machine), "start_seconds": round(machine.start_seconds, 1)})
    _show({"traffic": asdict(traffic), "signal": given.signal})
    requests = arrivals(traffic)
    if service.max_num_batched_tokens is None:  # the whole reply is computed at once
        requests = replace(requests, outputs=np.ones_like(requests.outputs))
    rows = []
    for change in changes:
        settings = service.autoscaling | change
        changed = replace(service, autoscaling=settings)
        outcome = simulate(changed, machine, requests, given.seed, signal=given.signal)
        rows.append(change | summary(outcome))
        _show({"settings": settings, **summary(outcome)})
        if len(changes) == 1:
            for row in intervals(outcome):
                _show(row)
            if given.plot:
                plot(outcome, given.plot, f"{given.config} on {machine.name} ({machine.basis})")
    print(table(rows))


def read_service(path: Path, application: str, machine: Machine) -> Service:
    """The settings of an application with one deployment, on that machine.

    ValueError if the file has no such application, or its deployment does not autoscale.
    """
    config = yaml.safe_load(path.read_text())
    found = {each["name"]: each for each in config["applications"]}
    if application not in found:
        raise ValueError(f"{path} has no application {application!r}; it has {sorted(found)}")
    (deployment,) = found[application]["deployments"]
    if "autoscaling_config" not in deployment:
        raise ValueError(f"{path}: {application} has a fixed number of replicas")
    module = importlib.import_module(found[application]["import_path"].partition(":")[0])
    arguments = module.Arguments(**found[application]["args"])
    whole_rows = isinstance(arguments, BatchArguments)
    if whole_rows:
        together, max_num_batched_tokens = arguments.max_batch, None
    else:
        limits = Limits.of(
            torch.device(machine.device),
            machine.cache_tokens,
            GPTJConfig().n_positions,
            max_num_seqs=arguments.max_num_seqs or machine.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
        )
        together, max_num_batched_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    # A replica refuses requests beyond its queue; Serve's own queue, in the proxies, holds those
    # that no replica may get.
    room = together + arguments.max_queued
    offered = deployment["max_ongoing_requests"]
    return Service(
        autoscaling=deployment["autoscaling_config"],
        max_ongoing_requests=min(offered, room),
        max_queued_requests=0 if offered > room else deployment.get("max_queued_requests", -1),
        max_num_seqs=together,
        max_num_batched_tokens=max_num_batched_tokens,
    )


def combinations(changes: Sequence[str]) -> list[dict[str, Any]]:
    """`a=1,2`, `b=3` -> [{a: 1, b: 3}, {a: 2, b: 3}]."""
    names, values = [], []
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not text:
            raise ValueError(f"{change!r} is not NAME=VALUE")
        names.append(name)
        values.append([yaml.safe_load(value) for value in text.split(",")])
    return [dict(zip(names, each, strict=True)) for each in itertools.product(*values)]


def _show(row: Row) -> None:
    print(to_json(row), flush=True)


if __name__ == "__main__":
    main()
