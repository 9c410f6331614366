"""The training loop of one worker: settings in, a model folder out; no Ray inside.

Every worker (rank) runs `train` with the same settings. DeepSpeed shards the model's state and
reduces the gradients; a step's data depends only on the step's number and the seed.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gptj import storage
from gptj.adapters.base import Base
from gptj.adapters.quantization import count_weights
from gptj.checkpoints.manifest import MANIFEST
from gptj.config import GPTJConfig
from gptj.data.batches import BatchOrder
from gptj.environment.devices import check_device
from gptj.environment.extras import Extra
from gptj.errors import CheckpointError
from gptj.pretrained import GPTJPreTrainedModel
from gptj.serialization.json_object import parse_object
from gptj.storage.lease import Claim, take_over
from gptj.storage.scratch import scratch_folder, shared_scratch_folder
from gptj.tokenizer import GPTJTokenizer
from gptj.training.agreement import agree, read_alike
from gptj.training.dataset import TaskData, set_aside
from gptj.training.deepspeed_config import (
    clips_gradients,
    deepspeed_config,
    learning_rate_share,
    parameter_groups,
    sums_in_bf16,
)
from gptj.training.engine_state import load_state, save_state
from gptj.training.evaluation import evaluate
from gptj.training.failures import DivergedError, StoppedError, naming_full_disk
from gptj.training.flops import StepFlops, matrix_peak
from gptj.training.loader import Loader, to_device
from gptj.training.model_config import make_config
from gptj.training.operators import guarded_builds
from gptj.training.optimizer import own_optimizer
from gptj.training.packages import check_packages
from gptj.training.probe import Probe
from gptj.training.progress import ProgressLog, duration, peak_memory, thinned
from gptj.training.provenance import hardware, provenance
from gptj.training.room import check_room, checkpoint_bytes
from gptj.training.settings import Settings, SettingsError
from gptj.training.spikes import SpikeFilter, UpdateGate
from gptj.training.state import (
    Progress,
    check_resumable,
    check_same_data,
    check_same_labels,
    checkpoint_name,
    checkpoint_step,
    delete_old_checkpoints,
    delete_unfinished_checkpoints,
    is_complete,
    latest_checkpoint,
    read_progress,
)
from gptj.training.tasks import Data, Part
from gptj.training.trackers import Trackers
from gptj.training.weights import PRECISIONS, all_finite, build_model, export_model, undo_first_step

ATTEMPTS = "attempts"  # in a run's folder, which attempt has it
TRACKED = "tracked.json"  # there, the last submission that has opened its trackers

logger = logging.getLogger(__name__)
deepspeed = Extra("deepspeed", "training")


@dataclass(frozen=True)
class Worker:
    """One training process, and its callbacks to the outside.

    torch.distributed must be initialized with `world_size` ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    # Stores metrics and a finished local checkpoint folder under a name, unless the last argument,
    # the fence, raises because another attempt has taken over. Called from a thread, equally often
    # on every rank.
    report: Callable[[dict[str, float], Path, str, Callable[[], None]], None]
    # Receives each point of the run's history as it is logged; only rank 0 calls it.
    watch: Callable[[dict[str, float]], None] = lambda point: None
    # Raises if another submission of the run has taken over; called before a rank writes.
    fence: Callable[[], None] = lambda: None
    # Orders the run's attempts by when they were started, rather than by when they get to run: an
    # earlier one that was delayed does not take the run from a later one.
    fencing_token: tuple[int, ...] = ()
    # Returns the reason if the run should stop; ranks may learn it at different times.
    stop: Callable[[], str | None] = lambda: None
    # The same at each restart of the workers; names the tokenized data that a node's processes
    # share. None: rank 0 generates a name.
    submission: str | None = None
    # Addresses of the run's prepared data, by name (gptj.training.dataset); None: not prepared.
    prepared: Mapping[str, str] | None = None
    # The commit of the hub at which a new run reads the model's checkpoint; None: its branch's now.
    commit: str | None = None


def train(settings: Settings, worker: Worker) -> dict[str, float]:
    """Train from scratch or from the run's last complete checkpoint, and export the model.

    Returns:
        The last evaluation's metrics; without evaluation data, the last training loss; empty if
        the model had already been exported.

    Raises:
        SettingsError: if the settings do not fit the data or the checkpoint, or the data has
            changed since the run began.
        CheckpointError: if the checkpoint is damaged.
        UnsupportedDeviceError: if PyTorch does not support this worker's GPU.
        DivergedError: if a loss, a gradient or a weight is not finite. None of that is saved: the
            last checkpoint is good.
        StoppedError: if the worker's `stop` gave a reason; the last step has a checkpoint.
        UnrecoverableError: for anything else that a retry cannot fix.
    """
    check_device(worker.device)
    check_packages(settings)
    if agree(settings.model_folder if worker.rank == 0 and is_complete(settings) else None):
        return {}  # the run was killed just after its export
    worker, attempt = _begin_attempt(settings, worker)
    if worker.rank == 0:  # the others wait below
        delete_unfinished_checkpoints(settings.folder, attempt)
    checkpoint = agree(latest_checkpoint(settings.folder) if worker.rank == 0 else None)
    progress = Progress(world_size=worker.world_size, settings=settings.model_dump(mode="json"))
    before: dict[str, Any] = {}  # the settings that the checkpoint was written with
    if checkpoint is not None:
        progress = check_resumable(settings, checkpoint)
        before = progress.settings
        progress.settings = settings.model_dump(mode="json")
        progress.world_size = worker.world_size
    tracking = None if checkpoint is None else before.get("tracking", {})
    submission = agree(worker.submission or uuid.uuid4().hex)
    assert submission is not None
    with (
        shared_scratch_folder(f"data-{submission}", on_abandoned=set_aside) as shared,
        scratch_folder() as scratch,
        naming_full_disk(scratch),
        guarded_builds(),
        _trackers(settings, worker, scratch, submission, tracking) as trackers,
    ):
        if checkpoint is None and settings.model.checkpoint:
            start = settings.model.checkpoint, settings.model.revision or None
            found = Base.at(*start, worker.commit)
            found = replace(found, commit=agree(found.commit))
            progress.start = asdict(found)
            progress.base = progress.start if settings.adapter is not None else None
        # Before anything is read: its branch may move, and may have since the run began.
        pinned = settings.pinned((progress.start or {}).get("commit"), progress.commits)
        tokenizer, data = read_alike(pinned, worker.world_size, shared, worker.prepared)
        if checkpoint is not None:
            check_same_data(settings, checkpoint, progress, data.fingerprints)
        progress.data = {name: asdict(each) for name, each in data.fingerprints.items()}
        progress.commits = data.commits
        if (labels := data.train.labels) is not None:
            if checkpoint is not None:
                check_same_labels(settings, checkpoint, progress, labels)
            progress.labels = [*labels.names]
        config = make_config(pinned, tokenizer, labels)
        total = settings.total_steps(len(data.train))
        if progress.step == 0 and worker.rank == 0:
            logger.info(
                "%d training examples, %s evaluation examples, %d steps of %d rows on %d workers",
                len(data.train),
                len(data.evaluation) if data.evaluation is not None else "no",
                total,
                settings.batch_size,
                worker.world_size,
            )
        run = _Run(settings, worker, attempt, progress, total, scratch, checkpoint, trackers)
        engine = run.start(config, pinned)
        if checkpoint is not None:
            run.load(engine, checkpoint)
            if worker.rank == 0:
                logger.info(
                    "resuming after step %d of %d on %d workers",
                    progress.step,
                    total,
                    worker.world_size,
                )
                _log_new_schedule(settings, before, progress.step, len(data.train))
        if progress.step < total:
            run.check_room(engine.module)
        metrics = run.steps(engine, data.train, data.evaluation)
        run.export(engine.module, tokenizer, metrics, data)
    return metrics


def _begin_attempt(settings: Settings, worker: Worker) -> tuple[Worker, int]:
    """Take the run over from earlier attempts, whose workers may still live on a lost node.

    Returns:
        the worker, whose `fence` also raises once another attempt has taken over, and the attempt's
        number, from 1.

    Raises:
        LeaseLostError: if an attempt that was started later already has the run.
    """
    outer, taken = worker.fence, None
    if worker.rank == 0:
        outer()
        claims = storage.join(settings.folder, ATTEMPTS)
        taken = json.dumps(asdict(take_over(claims, worker.fencing_token)))
    claim = Claim(**json.loads(agree(taken) or ""))

    def fence() -> None:
        outer()
        claim.check()

    return replace(worker, fence=fence), claim.generation


def _log_new_schedule(
    settings: Settings, before: Mapping[str, Any], step: int, examples: int
) -> None:
    """Say how an extended run's learning rate jumps after `step` steps.

    Args:
        before: its settings until then.
    """
    lengths = {key: before.get(key, getattr(settings, key)) for key in ("steps", "epochs")}
    old, new = (
        each.total_steps(examples) for each in (settings.model_copy(update=lengths), settings)
    )
    optimizer = settings.optimizer
    rates = [
        optimizer.learning_rate * learning_rate_share(optimizer, step, total)
        for total in (old, new)
    ]
    if rates[0] != rates[1]:
        logger.info(
            "the schedule has %d steps instead of %d: the learning rate is now %.3g, not %.3g",
            new,
            old,
            rates[1],
            rates[0],
        )


class _Upload(NamedTuple):
    """A checkpoint on its way to storage."""

    name: str
    best: int | None  # the best evaluation's step at that time
    stolen: float  # seconds that the steps waited for it until its upload began
    done: Future[float]  # this rank's part; the seconds that it took


class _Run:
    """The state of one worker's training."""

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        attempt: int,
        progress: Progress,
        total: int,
        scratch: Path,
        checkpoint: str | None,
        trackers: Trackers,
    ) -> None:
        self.settings = settings
        self.task = settings.task_definition
        self.worker = worker
        self.attempt = attempt
        self.progress = progress
        self.total = total
        self._scratch = scratch
        self._checkpoint_address = checkpoint  # the newest
        self._clipped: Tensor | None = None  # the last gradient norm, if DeepSpeed has none
        self._gate: UpdateGate | None = None
        self._part_bytes: int | None = None  # this rank's part of a checkpoint
        self._stopping = False  # the same on all ranks
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: _Upload | None = None  # of the last checkpoint
        self._trackers = trackers
        self._flops: StepFlops | None = None
        self._peak = 0.0  # FLOP/s of all workers
        self._log = None
        if worker.rank == 0:
            self._log = ProgressLog(progress, scratch, total, settings.log_every, self._watch)

    def _watch(self, point: dict[str, float]) -> None:
        self.worker.watch(point)
        self._trackers.point(point)

    def load(self, engine: Any, checkpoint: str) -> None:
        """Restore the engine from a checkpoint, keeping no local copy."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            worker = self.worker
            rank, seed = worker.rank, self.settings.seed
            load_state(engine, checkpoint, Path(folder), rank, worker.world_size, seed)
        if (stored := read_progress(checkpoint).probe) is not None:
            self._check_probe(engine, Probe(**stored), checkpoint)

    def _check_probe(self, engine: Any, probe: Probe, checkpoint: str) -> None:
        """CheckpointError, on all ranks, if any computes a loss that differs from the saved one."""
        losses: list[Any] = [None] * self.worker.world_size
        mine = probe.measure(self.task, engine.module, self.worker.device)
        dist.all_gather_object(losses, mine)
        for loss in losses:
            probe.check(loss, self.settings.deepspeed.precision, checkpoint)

    def check_room(self, model: GPTJPreTrainedModel) -> None:
        """DiskFullError, on all ranks, if any lacks disk space for its part of a checkpoint."""
        worker = self.worker
        part = checkpoint_bytes(self.settings, model, worker.rank, worker.world_size)
        self._part_bytes = part
        check_room(self._scratch, self.settings.folder, part)

    def start(self, config: GPTJConfig, pinned: Settings) -> Any:
        """DeepSpeed's engine with the model.

        Args:
            pinned: the settings, with the commit of the model's checkpoint.
        """
        settings, worker = self.settings, self.worker
        # DeepSpeed needs the process group before it shards a new model.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        plan = deepspeed_config(settings, worker.device.type, worker.world_size)
        model = build_model(self.task.head, config, pinned, plan, worker.rank, worker.device)
        if worker.rank == 0:
            name, size = self.task.head.__name__, count_weights(model)
            logger.info("%s of %s parameters", name, f"{size:,}")
            self._warn_of_sums(plan["gradient_accumulation_steps"])
        self._flops = StepFlops(model, config)
        self._peak = self._peak_of_all()
        if recomputed := settings.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(selective=recomputed == "selective")
        groups = parameter_groups(model, settings.optimizer.weight_decay)
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=own_optimizer(settings.optimizer, groups),
            config=plan,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: learning_rate_share(settings.optimizer, step, self.total),
            ),
            dist_init_required=False,
        )
        if settings.deepspeed.stage == 0:
            undo_first_step(engine)
            if worker.world_size == 1:  # it would copy all gradients, and back, to sum up one
                engine.enable_backward_allreduce = False
        if settings.optimizer.skip_spikes is not None:
            self._gate = self._skipping_spikes(engine)
        # Dropout differs between ranks, but is reproducible from the seed.
        torch.manual_seed(settings.seed + 1 + worker.rank)
        return engine

    def _warn_of_sums(self, micro_batches: int) -> None:
        if sums_in_bf16(self.settings.deepspeed, micro_batches):
            logger.warning(
                "the gradients of a step's %d micro-batches are added up in bf16, with 8 bits: "
                "deepspeed.stage=2 without deepspeed.offload_optimizer, or deepspeed.stage=3, adds "
                "them up in fp32",
                micro_batches,
            )

    def steps(
        self, engine: Any, train_data: Data, evaluation_data: Data | None
    ) -> dict[str, float]:
        """Run the remaining steps, with evaluations and checkpoints in between."""
        settings, worker = self.settings, self.worker
        order = BatchOrder(len(train_data), settings.batch_size, settings.seed)
        with Loader(
            train_data,
            order,
            rank=worker.rank,
            world_size=worker.world_size,
            micro_batch=settings.micro_batch_size,
            first=self.progress.step,
            last=self.total,
            pinned=worker.device.type == "cuda",
        ) as loader:
            try:
                return self._take_steps(engine, train_data, evaluation_data, order, loader)
            finally:
                self._uploader.shutdown()  # finish a running upload even after an error

    def _take_steps(
        self,
        engine: Any,
        train_data: Data,
        evaluation_data: Data | None,
        order: BatchOrder,
        loader: Loader,
    ) -> dict[str, float]:
        settings, progress = self.settings, self.progress
        if progress.probe is None:
            rows = order.indices(0)[: settings.micro_batch_size]
            progress.probe = asdict(Probe.first_rows(train_data, rows))
        metrics: dict[str, float] = {}
        if self._log is not None:
            self._log.begin()
        while progress.unfinished or (progress.step < self.total and not self._stops_early()):
            if progress.unfinished:
                progress.unfinished = False
            else:
                self._step(engine, train_data, loader)
            last = progress.step == self.total
            if self._stopping:
                progress.unfinished = last or _due(progress.step, settings.evaluate_every)
                self._stop(engine)
            evaluated = last or _due(progress.step, settings.evaluate_every)
            best = False
            if evaluated:
                metrics = self._evaluate(engine, evaluation_data)
                best = evaluation_data is not None and self._is_best(metrics)
                if not best and self._stops_early():
                    last = True
            # The best model is exported from its checkpoint, unless it is the last.
            keep = best and settings.export == "best"
            due = last or keep or _due(progress.step, settings.checkpoint_every)
            if due and not self._is_saved(progress.step):
                self._checkpoint(engine, metrics)
        self._finish_upload()
        if not metrics:  # the run was killed just before its export
            metrics = self._evaluate(engine, evaluation_data)
            self._check_weights(engine)
        return self._return_to_best(engine) or metrics

    def _is_saved(self, step: int) -> bool:
        """Whether the newest checkpoint is this step's: the run resumed from it."""
        newest = self._checkpoint_address
        return newest is not None and checkpoint_step(newest) == step

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Record an evaluation; returns whether it is the run's best so far."""
        progress, best = self.progress, self.progress.best
        kept = self.settings.export == "best"
        if kept and best is not None and not best["kept"]:
            # Before a resume with export=best: it cannot be exported.
            if self._log is not None:
                logger.info("the best model so far, of step %d, was not kept", best["step"])
            best = None
        if best is not None and not self.task.is_better(metrics, best["metrics"]):
            progress.worse += 1
            return False
        score = self.task.score(metrics)
        progress.best = {"step": progress.step, "score": score, "metrics": metrics, "kept": kept}
        progress.worse = 0
        return True

    def _stop(self, engine: Any) -> None:
        """Save a checkpoint and raise StoppedError, on all ranks."""
        reasons: list[Any] = [None] * self.worker.world_size
        dist.all_gather_object(reasons, self.worker.stop())
        self._checkpoint(engine, {})
        self._finish_upload()
        reason = next(reason for reason in reasons if reason is not None)
        raise StoppedError(
            f"stopped after step {self.progress.step} of {self.total}: {reason}. "
            f"{self._checkpoint_address} is saved, and the same command resumes from it",
            reason,
        )

    def _stops_early(self) -> bool:
        patience = self.settings.early_stopping
        return patience is not None and self.progress.worse >= patience

    def _return_to_best(self, engine: Any) -> dict[str, float] | None:
        """Restore the best evaluation's weights and return its metrics, unless it was the last."""
        best = self.progress.best
        if best is None or best["step"] == self.progress.step:
            return None
        if self.settings.export == "last" or not best["kept"]:
            return None
        address = None  # perhaps an earlier attempt's
        if self._log is not None:
            address = latest_checkpoint(self.settings.folder, best["step"])
        if (address := agree(address)) is None:
            raise CheckpointError(
                f"{self.settings.folder} has no checkpoint of step {best['step']}, the best one; "
                f"remedy: export=last exports the last model"
            )
        self.load(engine, address)
        if self._log is not None:
            logger.info(
                "exporting the best model, of step %d: %s",
                best["step"],
                "  ".join(f"{name} {value:.4g}" for name, value in best["metrics"].items()),
            )
        metrics: dict[str, float] = best["metrics"]
        return metrics

    def export(
        self,
        model: GPTJPreTrainedModel,
        tokenizer: GPTJTokenizer,
        metrics: dict[str, float],
        data: TaskData,
    ) -> None:
        """Write the model folder; all ranks together."""
        started = time.monotonic()
        address, labels = self.settings.model_folder, data.train.labels
        training = {
            "settings": self.settings.model_dump(mode="json"),
            "steps": self.progress.step,
            "best": self.progress.best,
            "stopped_early": self.progress.step < self.total,
            "worse": self.progress.worse,
            "metrics": metrics,
            "data": {
                name: {**fields, "commit": data.commits.get(name)}
                for name, fields in self.progress.data.items()
            },
            "labels": None if labels is None else labels.record(),
            "history": thinned(self.progress.history),
            "checkpoint": self.progress.start,
            "workers": self.worker.world_size,
            **hardware(self.worker.device),
            **provenance(),
        }
        if self._log is not None:  # the model comes last: once it is there, the run is complete
            self._log.publish(self.settings.folder, self._log.snapshot(), self.worker.fence)
            self._log.close()
            self._delete_export(address)
        export_model(
            model,
            address,
            self.settings,
            tokenizer,
            training,
            self.worker.rank,
            base=None if self.progress.base is None else Base(**self.progress.base),
            fence=self.worker.fence,
        )
        if self._log is not None:
            logger.info("wrote %s in %s", address, duration(time.monotonic() - started))

    def _delete_export(self, address: str) -> None:
        """Delete what an earlier attempt exported, before the run was extended, or in part.

        Never what a later attempt has exported, hence the fences: see storage.fenced.
        """
        with storage.fenced(address, self.worker.fence):
            manifest = storage.join(address, MANIFEST)
            if storage.exists(manifest):
                logger.info("replacing %s, exported before the run was extended", address)
            self.worker.fence()
            storage.delete_folder(address, first=MANIFEST, fence=self.worker.fence)
            storage.delete_unfinished(address)

    def _step(self, engine: Any, data: Data, loader: Loader) -> None:
        """Run one optimizer step; this rank computes its share of the global batch."""
        settings, worker = self.settings, self.worker
        started = time.monotonic()
        engine.train()
        (batches, counted, items, tokens, pairs, room), waited = loader.next()
        told = worker.stop() is not None
        # Each rank's wait has a place of its own in the sum, for the longest of them.
        waits = [waited if rank == worker.rank else 0.0 for rank in range(worker.world_size)]
        counts = torch.tensor([items, tokens, pairs, room, told, *waits], dtype=torch.float64)
        all_items, all_tokens, all_pairs, all_room, stops, *waits = self._sum(counts).tolist()
        self._stopping = stops > 0
        if not all_items:
            raise SettingsError(f"step {self.progress.step + 1} has nothing to learn from")
        total = torch.zeros(1, dtype=torch.float64, device=worker.device)
        rate = engine.optimizer.param_groups[0]["lr"]  # afterwards it is the next step's
        self._clipped = None
        for number, batch in enumerate(batches, 1):
            loss = self._loss(engine, data, batch) / all_items
            if number > counted:
                loss = loss * 0
            total += loss.detach()
            # Undo DeepSpeed's division by micro-batches and ranks: the loss is already a mean
            # over the global batch.
            engine.backward(loss * (len(batches) * worker.world_size))
            if number == len(batches) and not clips_gradients(settings.deepspeed):
                limit = settings.optimizer.gradient_clipping
                self._clipped = _clip_gradients(engine.module, limit)
            self._update(engine)
        # Together, since reading them waits for the device.
        mean, norm = torch.cat((self._sum(total), self._norm(engine).to(total))).tolist()
        self.progress.step += 1
        self._check_finite("the training loss", mean)
        if settings.deepspeed.precision != "fp16" or engine.was_step_applied():
            self._check_finite("the gradient norm", norm)
            self.progress.overflows_in_a_row = 0
            if self._gate is not None and self._gate.closed:
                self.progress.spikes += 1
        else:
            self._count_overflow(engine)
        if self._log is not None:
            seconds = time.monotonic() - started
            assert self._flops is not None
            self._log.step(
                mean,
                rate,
                norm,
                int(all_tokens),
                int(all_room),
                seconds,
                max(waits),
                flops=self._flops.count(int(all_tokens), int(all_pairs)),
                peak=self._peak,
                memory=peak_memory(worker.device),
            )

    def _loss(self, model: Any, data: Data, batch: dict[str, Tensor]) -> Tensor:
        """A micro-batch's loss, summed over its items."""
        inputs = to_device(batch, self.worker.device)
        return self.task.forward(model, inputs, data.count_items(batch))[0]

    def _update(self, engine: Any) -> None:
        """DeepSpeed's step, which updates weights after the last micro-batch.

        Raises DivergedError when gradients overflow at the lowest fp16 loss scale: DeepSpeed
        raises a bare Exception, and at stage 0 would skip all further steps.
        """
        what = "gradients overflow in fp16 at the lowest loss scale"
        scaling = getattr(engine.optimizer, "loss_scale_config", None)  # stage 0's
        lowest = scaling is not None and scaling.cur_scale == scaling.min_loss_scale
        last = engine.is_gradient_accumulation_boundary()
        if self._gate is not None:
            self._gate.begin()
        try:
            engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise self._diverged(what, ahead=1) from error
        if lowest and last and engine.optimizer.overflow:
            raise self._diverged(what, ahead=1)

    def _norm(self, engine: Any) -> Tensor:
        """The last gradients' norm before clipping (1,); NaN if DeepSpeed found it not finite."""
        given = engine.optimizer._global_grad_norm if self._clipped is None else self._clipped
        norm = torch.as_tensor(given, dtype=torch.float64).view(1)
        return norm.where(norm >= 0, math.nan)  # DeepSpeed reports it as -1

    def _skipping_spikes(self, engine: Any) -> UpdateGate:
        """A gate that skips updates of batches with an outlying gradient norm."""
        optimizer, progress = self.settings.optimizer, self.progress
        assert optimizer.skip_spikes is not None
        spikes = SpikeFilter(progress.norms, optimizer.skip_spikes, optimizer.spike_window)

        def is_usual() -> bool:
            # Norms may differ between ranks by rounding, but all must decide alike.
            norm = float(self._broadcast(self._norm(engine)))
            skipped = spikes.is_spike(norm)
            if skipped and self._log is not None:
                logger.warning(
                    "step %d: skipping the batch, since its gradient norm %.4g is more than "
                    "optimizer.skip_spikes=%g times the median %.4g of the last %d",
                    progress.step + 1,
                    norm,
                    optimizer.skip_spikes,
                    spikes.median,
                    len(progress.norms),
                )
            spikes.record(norm)
            return not skipped

        return UpdateGate(engine, is_usual)

    def _count_overflow(self, engine: Any) -> None:
        """Count a step that DeepSpeed skipped, lowering the loss scale.

        DivergedError after too many of them in a row.
        """
        progress, limit = self.progress, self.settings.deepspeed.max_overflows
        progress.overflows += 1
        progress.overflows_in_a_row += 1
        if self._log is not None:
            logger.warning(
                "skipped step %d: its gradients overflow in fp16 (%d in a row, %d in all); the "
                "loss scale is now %g",
                progress.step,
                progress.overflows_in_a_row,
                progress.overflows,
                engine.optimizer.loss_scale,
            )
        if progress.overflows_in_a_row >= limit:
            raise self._diverged(
                f"gradients have overflowed in fp16 for deepspeed.max_overflows={limit} steps in a "
                f"row,"
            )

    def _check_weights(self, engine: Any) -> None:
        """Check, before saving, that weights and the probe's loss are finite; record the loss.

        Finite weights can be too large to compute anything finite.
        """
        assert self.progress.probe is not None
        probe, device = Probe(**self.progress.probe), self.worker.device
        bad = (~all_finite(engine.module)).double().to(device)
        loss = probe.measure(self.task, engine.module, device)
        both = torch.stack((bad, torch.tensor(loss, dtype=torch.float64, device=device)))
        weights, total = self._sum(both).tolist()
        self._check_finite("a weight", math.nan if weights else 0.0)
        self._check_finite("the loss with the new weights", total)
        self.progress.probe = probe.with_loss(loss)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._diverged(f"{what} is {value}")

    def _diverged(self, what: str, *, ahead: int = 0) -> DivergedError:
        """The error for the last counted step plus `ahead`; all ranks must call it."""
        self._finish_upload()
        kept = self._checkpoint_address
        half = self.settings.deepspeed.precision == "fp16"
        return DivergedError(
            f"the training diverged: {what} at step {self.progress.step + ahead}. Start another "
            f"run= with a lower optimizer.learning_rate"
            + (", or with deepspeed.precision=bf16. " if half else ". ")
            + (f"The last good checkpoint is {kept}" if kept else "There is no checkpoint yet")
        )

    def _evaluate(self, engine: Any, data: Data | None) -> dict[str, float]:
        if data is None:
            return {"training_loss": self._last_loss()}
        metrics = evaluate(
            self.task,
            engine.module,
            data,
            batch_size=self.settings.micro_batch_size,
            device=self.worker.device,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            reduce=self._gather if self.worker.world_size > 1 else None,
        )
        self._check_finite("the evaluation loss", metrics["loss"])
        if self._log is not None:
            self._log.evaluation(metrics)
        return metrics

    def _last_loss(self) -> float:
        """The last logged loss, which only rank 0 has."""
        points = [point.get("loss") for point in self.progress.history]
        known = [loss for loss in points if loss is not None]
        loss = torch.tensor([known[-1] if known else 0.0], dtype=torch.float64)
        return float(self._sum(loss if self.worker.rank == 0 else torch.zeros_like(loss)))

    def _checkpoint(self, engine: Any, metrics: dict[str, float]) -> None:
        """Check the weights, write this rank's part to its scratch folder, upload it in a thread.

        Training continues meanwhile. The checkpoint is complete once all manifests are uploaded.
        """
        started = time.monotonic()
        self._check_weights(engine)
        checked = time.monotonic() - started
        self._finish_upload()
        started = time.monotonic()
        name = checkpoint_name(self.progress.step, self.attempt)
        folder = tempfile.TemporaryDirectory(dir=self._scratch)
        path = Path(folder.name) / name
        path.mkdir()
        with naming_full_disk(path, self._part_bytes):
            save_state(engine, path, self.progress, self.worker.rank)
        if self._log is not None:
            self.worker.fence()
        point = {"step": self.progress.step, **metrics}
        curve = None if self._log is None else self._log.snapshot()
        stolen = checked + time.monotonic() - started
        best = self.progress.best
        kept = None if best is None else best["step"]

        def upload() -> float:
            with folder:
                began = time.monotonic()
                self.worker.report(point, path, name, self.worker.fence)
                if self._log is not None and curve is not None:
                    self._log.publish(self.settings.folder, curve, self.worker.fence)
                return time.monotonic() - began

        self._upload = _Upload(name, kept, stolen, self._uploader.submit(upload))

    def _finish_upload(self) -> None:
        """Wait for all ranks' upload, if any, and delete old checkpoints.

        Raises what an upload raised.
        """
        if self._upload is None:
            return
        started = time.monotonic()
        upload, self._upload = self._upload, None
        seconds = upload.done.result()
        dist.barrier()
        self._checkpoint_address = storage.join(self.settings.folder, upload.name)
        if self._log is not None:
            self.worker.fence()  # another attempt may be resuming from an old one
            # Not progress.best: a better one since then is unsaved, and a resumed run would need
            # the older.
            keep = self.settings.keep_checkpoints
            delete_old_checkpoints(self.settings.folder, keep, upload.best)
            self._trackers.publish()
            logger.info(
                "saved %s in %s; it kept the steps waiting for %.1f s",
                self._checkpoint_address,
                duration(seconds),
                upload.stolen + time.monotonic() - started,
            )

    def _peak_of_all(self) -> float:
        """Total FLOP/s of all workers' matrix products, measured simultaneously."""
        device, known = self.worker.device, self.settings.workers.peak_tflops
        dtype = PRECISIONS[self.settings.deepspeed.precision]
        mine = matrix_peak(device, dtype) if known is None else known * 1e12
        peak = float(self._sum(torch.tensor([mine], dtype=torch.float64)))
        if self._log is not None:
            logger.info("matrix products reach %.3g TFLOP/s on all workers together", peak / 1e12)
            if device.type == "cpu" and dtype != torch.float32 and known is None:
                self._compare_with_fp32(mine)
        return peak

    def _compare_with_fp32(self, half: float) -> None:
        """Warn if this CPU computes slower in half precision: many have no instructions for it."""
        full = matrix_peak(self.worker.device, torch.float32)
        if full > half:
            logger.warning(
                "this CPU's matrix products are %.1f times as fast in fp32 as in %s: "
                "deepspeed.precision=fp32 trains faster, if its memory suffices",
                full / half,
                self.settings.deepspeed.precision,
            )

    def _gather(self, part: Part) -> list[Part]:
        parts: list[Any] = [None] * self.worker.world_size
        dist.all_gather_object(parts, part)
        return parts

    def _broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's values, on all ranks."""
        if self.worker.world_size == 1:
            return values
        values = values.to(self.worker.device)
        dist.broadcast(values, src=0)
        return values.cpu()

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, left on the device that the backend supports."""
        if self.worker.world_size == 1:
            return values
        values = values.to(self.worker.device)
        dist.all_reduce(values)
        return values


def _clip_gradients(model: torch.nn.Module, limit: float) -> Tensor:
    """Clip gradients to a norm of `limit` (0: no clipping); returns the norm before clipping."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _trackers(
    settings: Settings,
    worker: Worker,
    scratch: Path,
    submission: str,
    before: Mapping[str, Any] | None,
) -> Trackers:
    """Open the trackers on rank 0. Raises SettingsError on all ranks.

    Args:
        before: see Trackers.open.
    """
    trackers, fault = Trackers([]), None
    if worker.rank == 0:
        try:
            tracks = bool(settings.tracking.mlflow or settings.tracking.wandb)
            accepted = tracks and _has_tracked(settings, submission)
            trackers = Trackers.open(settings, scratch, before=before, accepted=accepted)
            if tracks and not accepted and trackers.complete:
                with ExitStack() as stack:
                    stack.push(trackers)  # closed if this fails
                    worker.fence()
                    content = json.dumps({"submission": submission}).encode()
                    storage.write_bytes(storage.join(settings.folder, TRACKED), content)
                    stack.pop_all()
        except SettingsError as error:
            fault = str(error)
    if (message := agree(fault)) is not None:
        raise SettingsError(message)
    return trackers


def _has_tracked(settings: Settings, submission: str) -> bool:
    """Whether the submission has opened its trackers before, and so its settings are good."""
    address = storage.join(settings.folder, TRACKED)
    if not storage.exists(address):
        return False
    try:
        fields = parse_object(storage.read_bytes(address), address)
    except CheckpointError as error:
        logger.warning("%s; the trackers are checked again", error)
        return False
    return fields.get("submission") == submission


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
