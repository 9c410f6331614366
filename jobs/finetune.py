#!/usr/bin/env python
"""Fine-tune GPT-J, or train a small model from scratch, on Ray with DeepSpeed.

    ray job submit -- jobs/finetune.py [SETTINGS.yaml] [key=value …]

Without arguments: a tiny language model on the text of Python's documentation, into ./outputs.
gptj/training/settings.py lists all settings. Results go to storage/run: checkpoints, loss.png,
TensorBoard's files and, at the end, `model`. The same command resumes from the last
checkpoint; once the model is there, it does nothing.
"""

from __future__ import annotations

import sys

from gptj_jobs.key_value import help_if_asked

if __name__ == "__main__":
    help_if_asked(sys.argv[1:], __doc__)  # before the imports, which take seconds

import logging
import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptj import storage
from gptj.adapters.base import Base
from gptj.checkpoints.folder import TRAINING
from gptj.config import GPTJConfig
from gptj.data import preparing
from gptj.data.preparing import Plan
from gptj.environment.extras import missing
from gptj.storage.lease import Claim, Lease, LeaseHeldError, LeaseLostError
from gptj.storage.scratch import shared_scratch_folder
from gptj.tokenizer import GPTJTokenizer
from gptj.training.dataset import node_data, prepare_run_data
from gptj.training.failures import StoppedError, UnrecoverableError, unrecoverable
from gptj.training.loop import Worker, train
from gptj.training.model_config import make_config
from gptj.training.packages import check_packages
from gptj.training.settings import Settings, SettingsError, read_settings
from gptj.training.state import (
    check_resumable,
    check_same_data,
    is_complete,
    latest_checkpoint,
    read_progress,
    upload_state,
)
from gptj.training.tokenizer import load_tokenizer, prepare_tokenizer

try:
    import ray
    import ray.train
    from ray.actor import ActorHandle
    from ray.exceptions import RayActorError, RayError
    from ray.train import (
        FailureConfig,
        RunConfig,
        ScalingConfig,
        TrainingFailedError,
        UserCallback,
    )
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from gptj_jobs.attempts import NumberAttempts, this_attempt
    from gptj_jobs.holding import hold
    from gptj_jobs.memory import check_memory
    from gptj_jobs.preparing import write_shards
    from gptj_jobs.ray_errors import reason
    from gptj_jobs.room import wait_for_room
    from gptj_jobs.stopping import PREEMPTED, STOPPED, Notices, OnSigterm
    from gptj_jobs.training_metrics import TrainingMetrics, count_failure
except ModuleNotFoundError as error:
    raise missing(error, "jobs/finetune.py", extra="train") from error

SMALL_BYTES = 16 * 2**20  # less data is not worth starting Ray Data for

logger = logging.getLogger("finetune")


def main() -> None:
    _log_to_stdout()
    try:
        settings = read_settings(sys.argv[1:]).resolved()
        whole = storage.join(settings.model_folder, TRAINING)
        print(
            f"Settings other than the defaults (all will be in {whole}):\n\n{settings.to_yaml()}",
            flush=True,
        )
        if is_complete(settings):
            print(f"The run is already complete: {settings.model_folder}", flush=True)
            return
        check_address()
        ray.init(logging_level=logging.WARNING)
        use = f"the run {settings.run!r} is already being trained"
        stop_signal = hold(settings.folder, use, "run=")
        on_gpu = check_workers(settings)
    except (ValueError, OSError) as error:  # users' errors need no traceback
        sys.exit(f"error: {error}")
    try:
        storage.check_writable(settings.folder)
        lease = Lease(storage.join(settings.folder, "lease"))
    except storage.StorageError as error:
        sys.exit(f"error: {error}")
    except LeaseHeldError as error:
        sys.exit(f"error: {use}: {error}. Wait for it to end, or choose another run=")
    submission = uuid.uuid4().hex
    with lease, shared_scratch_folder(f"data-{submission}") as shared:
        fine_tune(settings, on_gpu, lease.claim, submission, shared, stop_signal)
    print(f"The model is complete: {settings.model_folder}", flush=True)


def fine_tune(
    settings: Settings,
    on_gpu: bool,
    claim: Claim,
    submission: str,
    shared: Path,
    stop_signal: ActorHandle[Any],
) -> None:
    """Check the inputs and train. SystemExit with an error message.

    Args:
        claim: to the run's folder, so that no other job trains it.
        submission: names `shared`, the folder with the tokenized data, which workers on this node
            also read.
        stop_signal: sent if the job is told to stop.
    """
    try:
        claim.check()
        with storage.fenced(settings.folder, claim.check):
            config, longest, inputs = check_inputs(settings, shared)
        if not _has_fitted(settings):
            check_memory(settings, config, on_gpu, longest)
    except (ValueError, OSError, UnrecoverableError, LeaseLostError) as error:
        sys.exit(f"error: {error}")
    try:
        with OnSigterm(stop_signal):
            build_trainer(settings, on_gpu, claim, submission, inputs, shared, stop_signal).fit()
    except TrainingFailedError as error:
        if isinstance(_last_cause(error), StoppedError):
            print(_last_cause(error), flush=True)
            sys.exit(STOPPED)
        count_failure(settings.run)
        sys.exit(f"error: {explained(error, settings)}")
    except RayError as error:  # Ray Train's controller was killed, and its workers with it
        count_failure(settings.run)
        sys.exit(
            f"error: Ray Train's controller has ended: {reason(error).rstrip('.')}. The "
            f"checkpoints in {settings.folder} are kept: the same command resumes from them."
        )


def check_address() -> None:
    """SettingsError if RAY_ADDRESS is the jobs API's address rather than the head's."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise SettingsError(
            f"RAY_ADDRESS={address} is where jobs are submitted, as by ray job submit -- "
            f"jobs/finetune.py …; to run the program directly, set RAY_ADDRESS to the head's "
            f"HOST:6379, or to auto on a node of the cluster"
        )


def explained(error: TrainingFailedError, settings: Settings) -> str:
    """The message for the user: the cause, the number of tries, and what is kept."""
    if (cause := _last_cause(error)) is not None:
        return str(cause)
    tries = settings.workers.max_failures + 1
    # Ray gives up on workers after max_failures, and on itself after one failure.
    often = isinstance(error, WorkerGroupError) and tries > 1
    return (
        f"{error}\n\n"
        + (f"The training failed {tries} times in all. " if often else "")
        + f"The checkpoints in {settings.folder} are kept: the same command resumes from them."
    )


class EndAtOnce(UserCallback):
    """Ends the run, however many failures are allowed, if a retry would fail the same way.

    Ray calls it in the controller, with the workers' exceptions. The other workers, which may be
    waiting for the one that failed, end with the controller's error.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, UnrecoverableError):
                _leave_to_driver()
                raise ControllerError(error)  # which the failure policy never retries


def check_workers(settings: Settings) -> bool:
    """Whether the workers run on GPUs. SettingsError if the cluster has no room for them."""
    workers, cluster = settings.workers, ray.cluster_resources()
    gpus, cpus = cluster.get("GPU", 0), cluster.get("CPU", 0)
    on_gpu = workers.device == "gpu" or (workers.device == "auto" and gpus > 0)
    if workers.device == "gpu" and not gpus and not workers.autoscaling:
        raise SettingsError(
            "workers.device=gpu, but the cluster has no GPU: leave it out to train on CPUs, or set "
            "workers.autoscaling=true if the cluster will get some"
        )
    if not workers.autoscaling:
        if on_gpu and workers.fewest > gpus:
            raise SettingsError(
                f"workers.count={workers.fewest} needs as many GPUs, but the cluster has {gpus:g}: "
                f"lower it, or set workers.autoscaling=true if the cluster will grow"
            )
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if workers.cpus > largest:
            raise SettingsError(
                f"workers.cpus={workers.cpus:g} must fit on one node, but the largest has "
                f"{largest:g} CPUs: lower it"
            )
        if workers.fewest * workers.cpus > cpus:
            raise SettingsError(
                f"workers.count={workers.fewest} with workers.cpus={workers.cpus:g} needs "
                f"{workers.fewest * workers.cpus:g} CPUs, but the cluster has {cpus:g}: lower "
                f"them, or set workers.autoscaling=true if the cluster will grow"
            )
        count = workers_to_start(settings, on_gpu)
        needed = {"CPU": count * workers.cpus, "GPU": float(count * on_gpu)}
        wait_for_room({name: amount for name, amount in needed.items() if amount})
    if not on_gpu:
        deepspeed = settings.deepspeed
        if deepspeed.precision == "fp16":
            raise SettingsError("deepspeed.precision=fp16 needs GPUs: use bf16 or fp32")
        if deepspeed.offload_optimizer or deepspeed.offload_parameters:
            raise SettingsError(
                "deepspeed.offload_… moves state from GPUs to host memory, where CPU workers "
                "already keep it; leave it out"
            )
    return on_gpu


def workers_to_start(settings: Settings, on_gpu: bool) -> int:
    """How many workers Ray Train will want: of elastic ones as many as all nodes could hold.

    Its ElasticScalingPolicy counts each node's total resources, even those in use, and would wait
    for them forever: so we wait for them first, and name the holder.
    """
    workers = settings.workers
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fitting = has.get("CPU", 0) // workers.cpus
            room += int(min(fitting, has.get("GPU", 0)) if on_gpu else fitting)
    return max(workers.fewest, min(workers.most, room))


class Inputs(NamedTuple):
    """What the driver has found for the workers."""

    prepared: dict[str, str]  # addresses of the prepared data
    commit: str | None  # of the model's checkpoint, if it is on the hub


def check_inputs(settings: Settings, shared: Path) -> tuple[GPTJConfig, int, Inputs]:
    """Check storage, data and settings up front, rather than failing after hours.

    Returns:
        the model's configuration, the tokens of the longest training example, and what the workers
        need to read the same.
    """
    commit, commits = None, {}
    check_packages(settings)
    storage.delete_unfinished(settings.folder)
    checkpoint = latest_checkpoint(settings.folder)
    if checkpoint is not None:
        progress = check_resumable(settings, checkpoint)
        commit, commits = (progress.start or {}).get("commit"), progress.commits
    elif settings.model.checkpoint:
        commit = Base.at(settings.model.checkpoint, settings.model.revision or None).commit
    # Branches may have moved since the run began, or move while the data is prepared.
    settings = settings.pinned(commit, commits)
    logger.info("reading the data")
    tokenizer = prepare_tokenizer(settings)
    prepared = prepare_run_data(settings, tokenizer, checkpoint, partial(_prepare, settings))
    data = node_data(settings, tokenizer, shared, prepared)
    if checkpoint is not None:
        check_same_data(settings, checkpoint, progress, data.fingerprints)
    for name, each in (("training", data.train), ("evaluation", data.evaluation)):
        if each is not None:
            logger.info("%s data: %s", name, each.summary())
    settings.total_steps(len(data.train))
    config = make_config(settings, tokenizer, data.train.labels)
    return config, data.train.longest, Inputs(prepared, commit)


def _has_fitted(settings: Settings) -> bool:
    """Whether the run has a checkpoint with the same memory-relevant settings."""
    checkpoint = latest_checkpoint(settings.folder)
    if checkpoint is None:
        return False
    before, now = read_progress(checkpoint).settings, settings.model_dump(mode="json")
    keys = ("batch_size", "micro_batch_size", "data", "model", "adapter", "optimizer")
    return all(before.get(key) == now[key] for key in (*keys, "deepspeed", "workers"))


def _prepare(settings: Settings, plan: Plan, folder: str, tokenizer: GPTJTokenizer) -> None:
    """On the cluster, or in this process if that is faster than starting Ray Data."""
    if sum(plan.sizes) <= SMALL_BYTES:
        preparing.prepare(plan, folder, tokenizer)
    elif preparing.begin(plan, folder) is None:
        load = partial(_run_tokenizer, settings.model_dump_json(exclude_unset=True))
        shards = write_shards(plan, folder, load, None, settings.addresses)
        preparing.finish(plan, folder, shards, tokenizer)


@lru_cache(maxsize=1)
def _run_tokenizer(settings: str) -> GPTJTokenizer:
    """Loaded once by each tokenizing process."""
    return load_tokenizer(Settings.model_validate_json(settings))


def build_trainer(
    settings: Settings,
    on_gpu: bool,
    claim: Claim,
    submission: str,
    inputs: Inputs,
    shared: Path,
    stop_signal: ActorHandle[Any],
) -> TorchTrainer:
    """Ray Train starts and restarts the workers; it never sees our checkpoints.

    Its controller would write its own list of checkpoints to storage, and ends a run at the first
    error. So it gets no checkpoints, and a folder on this node, where the controller is.
    """
    return TorchTrainer(
        work,
        train_loop_config={
            "settings": settings.model_dump(exclude_unset=True),
            "claim": asdict(claim),
            "submission": submission,
            "stop_signal": stop_signal,
            "prepared": inputs.prepared,
            "commit": inputs.commit,
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers.count,  # type: ignore[arg-type]  # a pair: elastic
            use_gpu=on_gpu,
            resources_per_worker={"CPU": settings.workers.cpus, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name=settings.run,
            storage_path=str(shared / "ray"),
            failure_config=FailureConfig(max_failures=settings.workers.max_failures),
            callbacks=[EndAtOnce(), NumberAttempts()],  # type: ignore[list-item]  # Train's, not Tune's
        ),
    )


def work(config: dict[str, Any]) -> None:
    """Run one worker. UnrecoverableError if a retry would fail the same way."""
    _log_to_stdout()
    settings = Settings(**config["settings"])
    storage.be_patient(settings.addresses)
    context = ray.train.get_context()

    def keep(metrics: dict[str, float], folder: Path, name: str, fence: Callable[[], None]) -> None:
        address = storage.join(settings.folder, name)
        upload_state(folder, address, worker.rank, worker.world_size, fence)

    notices = Notices(config["stop_signal"])
    metrics = TrainingMetrics(settings.run)
    claim = Claim(**config["claim"])
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        report=keep,
        watch=metrics.point,
        fence=claim.check,
        fencing_token=(claim.generation, this_attempt()),
        stop=notices.reason,
        submission=config["submission"],
        prepared=config["prepared"],
        commit=config["commit"],
    )
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
    try:
        with metrics:
            train(settings, worker)
    except StoppedError as error:
        # Some workers may not know yet. Ray restarts them elsewhere, without counting a failure.
        if error.reason == PREEMPTED:
            raise RayActorError(error_msg=str(error), preempted=True) from error
        _leave_to_driver()
        raise
    except Exception as error:
        message = unrecoverable(error)
        if message is None:
            raise
        _leave_to_driver()
        raise UnrecoverableError(message) from error


def _leave_to_driver() -> None:
    """Keep Ray's tracebacks in its files if the driver will report the error in one line."""
    for handler in logging.getLogger("ray.train").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(lambda _: _last_cause(sys.exc_info()[1]) is None)


def _last_cause(error: BaseException | None) -> UnrecoverableError | None:
    """The unrecoverable error that ended a run; None for any other error."""
    if isinstance(error, ControllerError):
        error = error.controller_failure
    return error if isinstance(error, UnrecoverableError) else None


def _log_to_stdout() -> None:
    """Log our messages to stdout as they come, and only warnings from libraries."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stdout, format="%(asctime)s %(message)s", force=True
    )
    for name in ("gptj", "preparing", logger.name):
        logging.getLogger(name).setLevel(logging.INFO)
    # DeepSpeed calls PyTorch functions that will be renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


if __name__ == "__main__":
    main()
