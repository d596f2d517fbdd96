"""Training one network, dense or sparse, with Lightning underneath.

What makes a run repeat bit for bit and resume as if it had not stopped: batches and dropout are
drawn anew from (seed, epoch) at the start of every epoch. Checkpoints are made at its end and,
every few minutes, within it; those know which batches were given, and the state of the generators.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.finite import check_weights
from gossamer.integrations.lightning import FiniteLoss, SparsifyCallback
from gossamer.measure.channels import channel_stats
from gossamer.measure.topology import Topology
from gossamer.reading import reading
from gossamer.site import Site
from gossamer.sparsifier import Sparsifier
from gossamer.train.checkpoints import FORMAT, WholeFiles, check_network, newest, read
from gossamer.train.config import TrainConfig
from gossamer.train.data import Batches
from gossamer.train.folder import RunFolder
from gossamer.train.stop import Stop
from gossamer.train.work import Work

__all__ = ["History", "Row", "Watcher", "fit", "make_optimizer", "rate", "write_history"]

Row = dict[str, float]
_PACKAGE = Path(__file__).parents[1]


@dataclass
class History:
    """What is kept of a training. All but `rows` is about supports, and empty for a dense network.

    Attributes:
        rows: Of metrics.csv: one per epoch.
        layers: Of layers.csv: one per epoch and sparse layer; epoch 0 is before training.
        start: The columns of metrics.csv about topology, before training.
        end: All about the topology of all layers together, after the last epoch.
    """

    rows: list[Row] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    start: Row = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)


class Watcher(Protocol):
    """Who is told how training goes."""

    def noted(self, text: str) -> None:
        """What is to be known before training."""

    def started(self, network: str, epochs: int, steps: int, done: int) -> None:
        """`network` trains for `epochs` of `steps` each, of which `done` were made before."""

    def stepped(self, epoch: int, step: int, figures: Callable[[], Mapping[str, float]]) -> None:
        """A step was made; `figures()` computes the averages of the epoch so far."""

    def epoch_ended(self, row: Row) -> None:
        """An epoch was made: its row of metrics.csv."""

    def ended(self) -> None:
        """Training ended, or was broken off."""


def fit(
    network: str,
    model: nn.Module,
    config: TrainConfig,
    folder: RunFolder,
    train: Batches,
    val: Batches,
    work: Work,
    watcher: Watcher,
    sparsifier: Sparsifier | None = None,
    resume: bool = False,
    stop: Stop | None = None,
) -> History:
    """Train `model` in place, from its newest checkpoint if `resume`; returns its history.

    A network that has been trained to the end is only loaded.

    Args:
        network: "sparse" or "dense": names the files.
        model: With `sparsifier` attached, if there is one.
        config: The settings of the run.
        folder: Where checkpoints and metrics go.
        train: Batches to train on.
        val: Batches to validate on after every epoch.
        work: Counts `macs_training`.
        watcher: Is told how it goes.
        sparsifier: Of `model`; None trains it dense.
        resume: Load the newest whole checkpoint, if there is one.
        stop: Is looked at after every step; a checkpoint is written when it asks to end.

    Raises:
        FloatingPointError: The loss is not finite; says since when, and from which layer on.
        CollapseError: A layer fell below its floor, and the Sparsifier was to stop then.
        Interrupted: A signal asked to end; the checkpoint says after which step.
        KeyboardInterrupt: Something else broke it off; the checkpoints before are there.
        ValueError: The checkpoint is damaged, or does not belong to this run.
        OSError: A file could not be written; the one before it is still whole.
    """
    stop = stop or Stop()
    files_there = (folder.checkpoint(network), folder.previous(network))
    start = newest(files_there, watcher.noted) if resume else None
    if start is not None:
        checkpoint = read(start)
        if sparsifier is None:  # what belongs to a sparse one, the Sparsifier checks
            check_network(start, checkpoint, model)
        del checkpoint
    sparsify = None if sparsifier is None else SparsifyCallback(sparsifier, log=False)
    module = _Classifier(network, model, config, train, work, watcher, sparsify)
    callbacks: list[Callback] = [_Save(folder, module, stop), FiniteLoss(model)]
    if sparsify is not None:
        callbacks.append(sparsify)
    files = WholeFiles(folder.previous(network), whole=start in (None, folder.checkpoint(network)))
    plugins: list[Any] = [files]
    if SLURMEnvironment.detect():  # else Lightning writes, and prefers, checkpoints of its own
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = Trainer(
        accelerator="gpu" if train.images.is_cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_epochs=config.epochs,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=callbacks,
        plugins=plugins,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.path,
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _noted(watcher):
            trainer.fit(module, train, val, ckpt_path=start)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}. {_good(folder.checkpoint(network))}") from error
    except SystemExit as stopped:  # what Lightning makes of a KeyboardInterrupt
        stop.check()
        raise KeyboardInterrupt from stopped
    finally:
        stop.waits = False
        watcher.ended()
        if signal.getsignal(signal.SIGINT) is not on_interrupt:
            signal.signal(signal.SIGINT, on_interrupt)
    stop.check()
    return module.history


def write_history(folder: RunFolder, network: str, history: History) -> None:
    """Write metrics.csv and layers.csv. Raises OSError, with both as they were."""
    if history.rows:
        folder.write_rows(folder.metrics(network), history.rows)
    if history.layers:
        folder.write_rows(folder.layers, history.layers)


@contextmanager
def _noted(watcher: Watcher) -> Iterator[None]:
    """What Gossamer warns of is told to the watcher, not as a warning with a line of source."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            *more: Any,
            **others: Any,
        ) -> None:
            if _PACKAGE in Path(filename).parents:
                watcher.noted(f"warning: {message}")
            else:
                show(message, category, filename, *more, **others)

        warnings.showwarning = tell
        yield


def _good(path: Path) -> str:
    """The last checkpoint, in words."""
    if not path.exists():
        return "There is no checkpoint yet"
    return f"The last good checkpoint is {path}, after step {read(path)['global_step']}"


def make_optimizer(
    config: TrainConfig, model: nn.Module, sparsifier: Sparsifier | None
) -> torch.optim.Optimizer:
    """The optimizer of a run, as its first step finds it."""
    lr, decay = config.lr, config.weight_decay
    thresholds = {} if config.threshold_decay is None else {"weight_decay": config.threshold_decay}
    groups = model.parameters() if sparsifier is None else sparsifier.parameter_groups(**thresholds)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, weight_decay=decay)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=decay)


class _Classifier(LightningModule):
    """The network in training: loss, optimizer, and the figures of each epoch."""

    def __init__(
        self,
        network: str,
        model: nn.Module,
        config: TrainConfig,
        batches: Batches,
        work: Work,
        watcher: Watcher,
        sparsify: SparsifyCallback | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.history = History()
        self.work = work
        self.network = network
        self.settings = config
        self._batches = batches
        self._watcher = watcher
        self._sparsifier = None if sparsify is None else sparsify.sparsifier
        self._topology = None if sparsify is None else sparsify.topology
        self._started = self._started_cpu = 0.0
        self._sums = {"train": _Sums(), "val": _Sums()}
        self._within: dict[str, Any] | None = None
        self.step_in_epoch = 0

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimizer, and a learning rate that changes with every step."""
        config = self.settings
        optimizer = make_optimizer(config, self.model, self._sparsifier)
        steps = len(self._batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate(config, step, steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients of learned thresholds, where that is asked for."""
        if self.settings.threshold_clip is not None and self._sparsifier is not None:
            thresholds = self._sparsifier.parameter_groups()[1]["params"]
            nn.utils.clip_grad_norm_(thresholds, self.settings.threshold_clip)

    def on_train_start(self) -> None:
        """Tell the watcher what is coming; note what training starts from, or go on within."""
        epochs, steps = self.settings.epochs, len(self._batches)
        within, self._within = self._within, None
        if within is not None:
            self._watcher.noted(
                f"{self.network}: goes on in epoch {self.current_epoch + 1} of {epochs}, after "
                f"step {within['step']} of {steps}"
            )
        self._watcher.started(self.network, epochs, steps, self.current_epoch)
        if within is not None:
            self._go_on(within)
        elif self.current_epoch == 0:
            self.history.start = self._look(0)

    def on_train_epoch_start(self) -> None:
        """The epoch's own batches and its own dropout, whatever ran before."""
        epoch = self.current_epoch
        self._batches.set_epoch(epoch)
        (mixed,) = np.random.SeedSequence((self.settings.seed, epoch)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed) >> 1)
        self._sums = {"train": _Sums(), "val": _Sums()}
        self._started, self._started_cpu = time.perf_counter(), time.process_time()
        self.step_in_epoch = 0

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        self._sums["train"].add(loss, logits, labels)
        self.step_in_epoch += 1
        self.work.add(len(labels))
        if self._sparsifier is None:
            return loss
        self._sparsifier.observe(loss)
        return loss + self._sparsifier.penalty()

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Tell the watcher."""
        self._watcher.stepped(self.current_epoch, batch_idx + 1, self._figures)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self.model(images)
        self._sums["val"].add(F.cross_entropy(logits, labels), logits, labels)

    def on_train_epoch_end(self) -> None:
        """Close the epoch's row."""
        seconds = self._seconds()  # what follows only looks at the network
        train, val = self._sums["train"], self._sums["val"]
        made = rate(self.settings, self.global_step - 1, len(self._batches))
        row: Row = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            "lr": self.settings.lr * made,
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "val_loss": val.loss,
            "val_accuracy": val.accuracy,
            **self._sparsity(),
            **self._look(self.current_epoch + 1),
            **seconds,
            "macs_training": self.work.total,
        }
        self.history.rows.append(row)
        self._watcher.epoch_ended(row)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the epochs so far and, within one, how far that one has come."""
        ended = len(self.history.rows) > self.current_epoch
        checkpoint["gossamer"] = {
            "format": FORMAT,
            "history": vars(self.history),
            "work": self.work.state_dict(),
            "within": None if ended else self._where(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the epochs so far, and the one that had begun."""
        with reading("what the checkpoint says of the run", "train from the start"):
            state = checkpoint["gossamer"]
            self.history = History(**state["history"])
            for row in self.history.rows:  # of a version that had one clock
                row.setdefault("cpu_seconds", row["seconds"])
            self.work.load_state_dict(state["work"])
            self._within = state.get("within")  # format 1 has none

    def _where(self) -> dict[str, Any]:
        """What an epoch needs to go on after this step, beside model, optimizer and batches."""
        train = self._batches.images
        return {
            "step": self.step_in_epoch,
            "sums": self._sums["train"].state_dict(),
            **self._seconds(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(train.device) if train.is_cuda else None,
        }

    def _go_on(self, within: dict[str, Any]) -> None:
        self.step_in_epoch = within["step"]
        self._sums = {"train": _Sums(), "val": _Sums()}
        self._sums["train"].load_state_dict(within["sums"])
        self._started = time.perf_counter() - within["seconds"]
        self._started_cpu = time.process_time() - within.get("cpu_seconds", within["seconds"])
        torch.set_rng_state(within["random"])
        if within["random_cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(within["random_cuda"])

    def _seconds(self) -> Row:
        """Of this epoch so far, on the wall's clock and on the processor's."""
        return {
            "seconds": time.perf_counter() - self._started,
            "cpu_seconds": time.process_time() - self._started_cpu,
        }

    def _figures(self) -> Row:
        train = self._sums["train"]
        return {"loss": train.loss, "accuracy": train.accuracy, **self._sparsity()}

    def _sparsity(self) -> Row:
        sparsifier = self._sparsifier
        if sparsifier is None:
            return {"density": 1.0, "live_channels": 0, "channel_sparsity": 0.0}
        return {
            "density": sparsifier.density,
            "live_channels": sparsifier.live_channels,
            "channel_sparsity": sparsifier.channel_sparsity,
        }

    def _look(self, epoch: int) -> Row:
        """Check the topology: notes the layers' rows, returns the columns for all of them."""
        sparsifier, tracker = self._sparsifier, self._topology
        if sparsifier is None or tracker is None:
            return {}
        check = tracker.check(sparsifier.step_count, sparsifier.supports())
        for site in sparsifier.sites:
            layer = check.layers[site.name]
            about = {"epoch": epoch, "layer": site.name, "weights": layer.weights}
            channels = channel_stats(site.effective, site.support)
            uneven = {
                "live_channels": layer.live_channels,
                "channel_spread": channels.by_density.spread,
                "channel_spread_random": channels.by_density.random,
                "umm_spread": channels.by_umm.spread,
                "umm_spread_random": channels.by_umm.random,
                "channels_below_half": channels.by_density.below_half,
                "channels_below_mean": channels.by_density.below_mean,
                "umm_below_half": channels.by_umm.below_half,
                "umm_below_mean": channels.by_umm.below_mean,
            }
            self.history.layers.append({**about, **uneven, **_columns(layer, [site])})
        self.history.end = check.total.to_dict()
        cumulative = {"sad_cumulative": tracker.sad_cumulative}
        return {**cumulative, **_columns(check.total, sparsifier.sites)}


def _columns(topology: Topology, sites: Sequence[Site]) -> Row:
    """Columns of metrics.csv, and of layers.csv, about the topology of these sites."""
    return {
        "density": topology.density,
        "sad_from_start": topology.from_start.per_weight,
        "sad_since_last": topology.since_last.per_weight,
        "exploration": topology.exploration,
        "churn": topology.churn,
        "revived": topology.revived,
        **_watched(sites),
    }


@torch.no_grad()
def _watched(sites: Sequence[Site]) -> Row:
    """What is learned or annealed at these sites: mean, lowest and highest of what is no factor."""
    found: dict[str, list[Tensor]] = {}
    for site in sites:
        for name, values in site.sparse.figures().items():
            found.setdefault(name, []).append(values)
    row = {}
    for name, parts in found.items():
        values = torch.cat([part.float().flatten() for part in parts])
        if parts[0].dim() == 0:
            row[name] = float(values.mean())
        else:
            shown = torch.stack([values.mean(), values.min(), values.max()]).tolist()
            row |= zip((f"{name}_mean", f"{name}_min", f"{name}_max"), shown, strict=True)
    return row


class _Sums:
    """Loss and hits over the batches of an epoch; read only when somebody asks."""

    def __init__(self) -> None:
        self._loss: Tensor | float = 0.0
        self._hits: Tensor | float = 0.0
        self._count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch with its mean loss."""
        self._loss = self._loss + loss.detach().float() * len(labels)
        self._hits = self._hits + (logits.detach().argmax(1) == labels).sum()
        self._count += len(labels)

    def state_dict(self) -> dict[str, float]:
        """Plain data to go on from; a float holds what a tensor of 32 bits does."""
        return {"loss": float(self._loss), "hits": int(self._hits), "count": self._count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self._loss, self._hits = state["loss"], state["hits"]
        self._count = int(state["count"])

    @property
    def loss(self) -> float:
        """Mean over the examples so far."""
        return float(self._loss) / max(1, self._count)

    @property
    def accuracy(self) -> float:
        """Share of hits so far."""
        return float(self._hits) / max(1, self._count)


def rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Factor on the learning rate of step `step`, counted from 0."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / warmup
    fraction = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * min(fraction, 1.0))) / 2
    if config.schedule == "multistep":
        done = step / (config.epochs * steps_per_epoch)
        return 0.1 ** sum(done >= milestone for milestone in config.milestones)
    return 1.0


class _Save(Checkpoint):
    """Writes checkpoint and metrics when an epoch is over, and checkpoints within it: every few
    minutes, and when the run is asked to end. Lightning runs it after all other callbacks.
    """

    def __init__(self, folder: RunFolder, module: _Classifier, stop: Stop) -> None:
        self._folder = folder
        self._module = module
        self._stop = stop
        self._seconds = module.settings.checkpoint_minutes * 60
        self._saved = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Signals come here from now on, and wait for the end of their step."""
        self._saved = time.monotonic()
        self._stop.attend()  # Lightning has put its own handler before ours
        self._stop.waits = True
        self._stop.check()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint if it is time; raise Interrupted if the run is to end."""
        if batch_idx + 1 == trainer.num_training_batches:
            return  # validation follows, and the checkpoint of the whole epoch
        asked = self._stop.number is not None
        if asked or time.monotonic() - self._saved >= self._seconds:
            self._save(trainer, f"step {trainer.global_step}")
        if asked:
            self._stop.check()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write all files."""
        self._save(trainer, f"epoch {trainer.current_epoch + 1}")
        write_history(self._folder, self._module.network, self._module.history)
        self._stop.check()

    def _save(self, trainer: Trainer, after: str) -> None:
        try:
            check_weights(self._module.model, trainer.optimizers[0])
        except FloatingPointError as error:
            raise FloatingPointError(
                f"after {after}, {error}: no checkpoint of it is written"
            ) from error
        trainer.save_checkpoint(self._folder.checkpoint(self._module.network), weights_only=False)
        self._saved = time.monotonic()
        self._stop.saved = f"{self._module.network} network, after {after}"
