"""One training run: from a configuration to a folder with a slim model and its figures."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer
from gossamer.control import Targeted
from gossamer.forecast import forecast, forecastable
from gossamer.latency import LatencyTable, Readings
from gossamer.measure.latency import compare_latency
from gossamer.measure.macs import account
from gossamer.method import Method
from gossamer.reading import read_json
from gossamer.shrink.file import save
from gossamer.sparsifier import Sparsifier
from gossamer.train.config import (
    TrainConfig,
    check_unchanged,
    from_dict,
    read_yaml,
    to_dict,
    to_yaml,
)
from gossamer.train.data import Batches, Split, load_data
from gossamer.train.engine import (
    History,
    Row,
    Watcher,
    fit,
    make_optimizer,
    rate,
    write_history,
)
from gossamer.train.figures import (
    Delivered,
    accuracy,
    deliver,
    figures,
    layers,
    logits,
    topology,
)
from gossamer.train.folder import RunFolder
from gossamer.train.models import build_model
from gossamer.train.narrowing import Widths, read_widths
from gossamer.train.report import markdown
from gossamer.train.source import Architecture
from gossamer.train.stop import Stop, stoppable
from gossamer.train.tensorboard import TensorBoard
from gossamer.train.work import Work

__all__ = ["Restored", "restore", "train"]


def train(
    config: TrainConfig,
    method: Method,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train, cut, measure, and write the run folder `config.folder`; returns its summary.

    Args:
        config: The settings; `config.method` names the method.
        method: Its hyperparameters.
        resume: Go on from the newest checkpoints; a finished run is only read.
        overwrite: Remove an earlier run in the folder, once this one is ready to start.
        watcher: Is told how it goes.

    Raises:
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` is set.
        ValueError: A setting that does not fit model, data or the run to resume.
        OSError: A file could not be read or written; earlier files are still whole.
        FloatingPointError: The loss is not finite; says since when, and from which layer on.
        CollapseError: A layer fell below its floor, and `config.on_collapse` is "stop".
        KeyboardInterrupt: Ctrl-C or SIGTERM (`Interrupted`): `resume` goes on after the last step.
    """
    folder = RunFolder(config.folder)
    if resume:
        _check_resumable(folder, config, method)
        if folder.summary.exists():
            summary = read_json(folder.summary, "remove it: --resume then ends the run again")
            if "dense" in summary or not config.baseline:
                with folder.held():
                    folder.sweep(finished=True)  # it may have been killed right before that
                return summary
    elif folder.existing() and not overwrite:
        raise FileExistsError(
            f"{folder.path} holds a run already ({folder.existing()[0].name}): --resume goes on "
            "with it, --overwrite throws it away, --out chooses another folder"
        )
    watcher = watcher or _Silent()
    if config.tensorboard:
        watcher = TensorBoard(folder.tensorboard, watcher)
    new = not folder.path.exists()
    try:
        with folder.held(), stoppable() as stop, _threads(config.threads):
            folder.sweep()
            return _Run(config, method, folder, watcher, resume, overwrite, stop).go()
    finally:
        if new and folder.path.exists() and not any(folder.path.iterdir()):
            folder.path.rmdir()  # it did not get as far as to write anything


@dataclass(frozen=True)
class Restored:
    """A finished run, to look at.

    Attributes:
        method: It was trained with.
        sparsifier: Of the sparse network, as training left it.
        example: An input of the network.
        val: The validation images.
    """

    method: Method
    sparsifier: Sparsifier
    example: Tensor
    val: Batches


def restore(path: Path) -> Restored:
    """Load the sparse network of the finished run in folder `path`, before it was finalized.

    Raises:
        ValueError: The folder holds no finished run.
        OSError: A file could not be read.
    """
    folder = RunFolder(path)
    if not folder.config.exists():
        raise ValueError(f"{path} holds no run: give the folder that `gossamer train` wrote")
    if not folder.summary.exists() or not folder.checkpoint("sparse").exists():
        raise ValueError(
            f"the run in {path} has not ended: "
            f"`gossamer train --resume --out {path}` goes on with it"
        )
    config, method = from_dict(read_yaml(folder.config) | {"out": str(path)})
    with _threads(config.threads):
        run = _Run(config, method, folder, _Silent(), resume=True, overwrite=False)
        return Restored(method, run.trained(), run.example, run.val)


class _Run:
    """The steps of one run, on what all of them share: data, device, folder."""

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        folder: RunFolder,
        watcher: Watcher,
        resume: bool,
        overwrite: bool,
        stop: Stop | None = None,
    ) -> None:
        self.config = config
        self.method = method
        self.folder = folder
        self.watcher = watcher
        self.resume = resume
        self.overwrite = overwrite
        self.stop = stop
        self.device = _device(config.device)
        self.data = load_data(
            config.data,
            val_fraction=config.val_fraction,
            seed=config.seed,
            image_size=config.image_size,
        )
        self.val = self._batches(self.data.val)
        self.test = self._batches(self.data.test)
        self.example = next(iter(self.val))[0][:2].cpu()
        self.widths = self._widths()
        self.latency = self._latency() if "latency" in method.priced_in else None

    def go(self) -> dict[str, Any]:
        """Train what is asked for and write everything; returns the summary."""
        config, folder = self.config, self.folder
        model = self._model()
        sparsifier = self._sparsifier(model)
        for name in ("threshold_decay", "threshold_clip"):
            value = getattr(config, name)
            if value is not None and len(sparsifier.parameter_groups()) == 1:
                raise ValueError(
                    f"{name}={value}: {config.method} learns no thresholds: leave it out"
                )
        # All that can be wrong with the settings was found by now: an old run may go.
        if self.overwrite:
            folder.clear()
        folder.write_text(folder.config, to_yaml(config, self.method))
        if self.latency is not None:
            folder.write_json(folder.latency, self.latency.readings.to_dict())
        if self.widths is not None:
            folder.write_json(folder.widths, self.widths.to_dict())

        told = self._forecast(model, sparsifier)
        if told is not None:
            self.watcher.noted(f"forecast: {told}")
        history = {"sparse": self._trained("sparse", model, sparsifier)}
        before = None if self.widths is None else self.widths.plan
        delivered = deliver(sparsifier, self._full(), self.example, before)
        save(folder.model, delivered.slim, delivered.plan, self._architecture().metadata())
        twin = None
        if config.baseline:
            twin = self._full()
            history["dense"] = self._trained("dense", twin, None)

        summary = self._summary(delivered, twin, history) | {
            "forecast": told,
            "topology": topology(history["sparse"]),
            "left_dense": sparsifier.left_dense,
            "locked": sparsifier.locked,
            "widths": self._about_widths(),
            "refused": sparsifier.refused,
            "collapsed": sparsifier.collapsed,
        }
        summary["budgets"] = self._budgets(sparsifier, delivered, summary["slim"])
        sizes = [delivered.account(name, self.example) for name in ("sparse", "slim")]
        summary["layers"] = layers(*sizes)
        folder.write_text(folder.report, markdown(summary, to_dict(config, self.method)))
        folder.write_json(folder.summary, summary)
        folder.sweep(finished=True)
        return summary

    def trained(self) -> Sparsifier:
        """Of the sparse network, as a run that has ended left it."""
        model = self._model()
        sparsifier = self._sparsifier(model)
        self._fit("sparse", model, sparsifier)
        return sparsifier

    def _sparsifier(self, model: nn.Module) -> Sparsifier:
        config = self.config
        return Sparsifier(
            model,
            self.method,
            total_steps=config.epochs * len(self._train_batches()),
            example=self.example,
            include=config.include,
            exclude=config.exclude,
            keep_channels=config.keep_channels,
            cut=config.cut,
            latency=self.latency,
            on_collapse=config.on_collapse,
            seed=config.seed,
        )

    def _latency(self) -> LatencyTable:
        """What the network takes at any widths; a resumed run goes on with what it measured."""
        readings = None
        if self.resume and self.folder.latency.exists():
            readings = Readings.from_dict(read_json(self.folder.latency, "train from the start"))
        model = self._model().to(self.device)
        return gossamer.latency(model, self._latency_images(), readings=readings)

    def _forecast(self, model: nn.Module, sparsifier: Sparsifier) -> str | None:
        """What the schedule implies for thresholds, where weight decay is what raises them."""
        config, steps = self.config, len(self._train_batches())
        targeted = isinstance(self.method, Targeted) and self.method.target_density is not None
        if targeted or not forecastable(sparsifier.sites):
            return None
        optimizer = make_optimizer(config, model, sparsifier)
        lrs = [config.lr * rate(config, step, steps) for step in range(config.epochs * steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the text says it
            found = forecast(sparsifier.sites, optimizer, lrs)
        return f"no sparsity can appear: {found}" if found.futile else str(found)

    def _trained(self, network: str, model: nn.Module, sparsifier: Sparsifier | None) -> History:
        history = self._fit(network, model, sparsifier)
        if self.resume:  # it may have been broken off between the last checkpoint and these files
            write_history(self.folder, network, history)
        return history

    def _fit(self, network: str, model: nn.Module, sparsifier: Sparsifier | None) -> History:
        work = Work(model, self.example, sparsifier)
        return fit(
            network,
            model,
            self.config,
            self.folder,
            self._train_batches(),
            self.val,
            work,
            self.watcher,
            sparsifier,
            self.resume,
            self.stop,
        )

    def _summary(
        self, delivered: Delivered, twin: nn.Module | None, history: Mapping[str, History]
    ) -> dict[str, Any]:
        networks = {} if twin is None else {"dense": twin}
        networks |= {"sparse": delivered.sparse, "slim": delivered.slim}
        for model in networks.values():
            model.to(self.device)
        times = compare_latency(networks, self._latency_images())
        outputs = [logits(networks[name], self.val) for name in ("sparse", "slim")]
        scores = {name: accuracy(model, self.test) for name, model in networks.items()}
        for model in networks.values():
            model.cpu()

        rows = {name: own.rows for name, own in history.items()}
        full = self._full()
        reference = account(full, self.example)
        steps = len(rows["sparse"]) * len(self._train_batches()) * self.config.batch_size
        summary: dict[str, Any] = {
            "config": str(self.folder.config),
            "model": {
                "name": self.config.model,
                "num_classes": self.data.num_classes,
                "in_shape": list(self.data.in_shape),
                "width": self.config.width,
            },
            "method": self.method.to_dict(),
            "data": self._about_data(),
            "seed": self.config.seed,
            "versions": {"gossamer": gossamer.__version__, "torch": str(torch.__version__)},
            "machine": {
                "device": str(self.device),
                "cpu": times.conditions.cpu,
                "gpu": times.conditions.gpu,
                "threads": torch.get_num_threads(),
                "platform": platform.platform(),
            },
            **{
                f"{clock}_seconds": {
                    name: sum(row[column] for row in own) for name, own in rows.items()
                }
                for clock, column in (("wall", "seconds"), ("cpu", "cpu_seconds"))
            },
            "latency": {
                **asdict(times.conditions),
                "ratio": {model.name: model.ratio.median for model in times.models},
            },
            "reference": {
                "nonzeros": sum(parameter.numel() for parameter in full.parameters()),
                "bytes_on_disk": reference.bytes_on_disk,
                "macs_executed": reference.macs_executed,
                "macs_sparse": reference.macs_sparse,
                "macs_training": 3.0 * steps * reference.macs_executed,
            },
        }
        if twin is not None:
            summary["dense"] = figures(
                account(twin, self.example),
                accuracy=scores["dense"],
                density=1.0,
                channel_sparsity=0.0,
                macs_training=rows["dense"][-1]["macs_training"],
                latency_ms=times["dense"].milliseconds.median,
            )
        for name in ("sparse", "slim"):
            summary[name] = figures(
                delivered.account(name, self.example),
                accuracy=scores[name],
                density=delivered.density(name),
                channel_sparsity=delivered.channel_sparsity(name),
                macs_training=rows["sparse"][-1]["macs_training"],
                latency_ms=times[name].milliseconds.median,
            )
        summary["slim"] |= {
            "bytes_on_disk": self.folder.model.stat().st_size,
            "max_abs_difference": float((outputs[0] - outputs[1]).abs().max()),
            "output_scale": float(outputs[0].abs().max()),
        }
        if delivered.note:
            summary["slim"]["not_cut"] = delivered.note
        return summary

    def _budgets(
        self, sparsifier: Sparsifier, delivered: Delivered, slim: Mapping[str, float]
    ) -> dict[str, dict[str, Any]]:
        """Per budget: what the slim network was said to cost, and what it costs."""
        found = {}
        widths = [int(pool.live.sum()) for pool in sparsifier.pools]
        for unit, limit in self.method.budgets.items():
            price = sparsifier.prices[unit]
            if unit == "latency":
                assert self.latency is not None
                measured = price.dense * self.latency.compare(delivered.slim.to(self.device))
                delivered.slim.cpu()
            else:
                measured = slim["macs_executed" if unit == "macs" else "bytes_on_disk"]
            found[unit] = {
                "unit": price.unit,
                "budget": limit,
                "dense": price.dense,
                "predicted": price(widths),
                "measured": measured,
            }
        return found

    def _about_data(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": data.name,
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
            "classes": list(data.classes),
            "mean": data.mean.tolist(),
            "std": data.std.tolist(),
        }

    def _architecture(self) -> Architecture:
        return Architecture(
            name=self.config.model,
            num_classes=self.data.num_classes,
            in_shape=self.data.in_shape,
            width=self.config.width,
            data=self.data.name,
        )

    def _widths(self) -> Widths | None:
        """What the network is cut to before training; a resumed run stays with what it was."""
        config, file = self.config, self.folder.widths
        if config.widths_of is None:
            return None
        if self.resume and file.exists():
            widths = Widths.from_dict(read_json(file, "train from the start"), str(file))
            widths.check_source(config.widths_of)
            return widths
        return read_widths(
            config.widths_of,
            self._full(),
            self.example,
            network=(config.model, config.width),
            match=config.widths_match,
            keep_channels=config.keep_channels,
        )

    def _about_widths(self) -> dict[str, Any] | None:
        if self.widths is None:
            return None
        return {"of": self.widths.source, "match": self.config.widths_match}

    def _model(self) -> nn.Module:
        """The network as training starts from it: the same each time."""
        full = self._full()
        if self.widths is None:
            return full
        # Other weights than a sparse run of this seed has had: those that are drawn next.
        built_in = ":" not in self.config.model
        return self._placed(self.widths.narrow(self._build(), self.example, built_in=built_in))

    def _full(self) -> nn.Module:
        """The network at full width, as a run without `widths_of` starts from it."""
        torch.manual_seed(self.config.seed)
        return self._placed(self._build())

    def _build(self) -> nn.Module:
        return build_model(
            self.config.model,
            num_classes=self.data.num_classes,
            in_shape=self.data.in_shape,
            width=self.config.width,
        )

    def _placed(self, model: nn.Module) -> nn.Module:
        if self.config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def _train_batches(self) -> Batches:
        return self._batches(self.data.train, training=True)

    def _batches(self, split: Split, training: bool = False) -> Batches:
        config = self.config
        return Batches(
            split,
            batch_size=config.batch_size,
            mean=self.data.mean,
            std=self.data.std,
            shuffle=training,
            augment=training and config.augment,
            flip=config.flip,
            seed=config.seed,
            drop_last=training,
            device=self.device,
            channels_last=config.channels_last,
        )

    def _latency_images(self) -> Tensor:
        images = torch.cat([images for images, _ in self.test])[: self.config.latency_batch]
        memory = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=memory)


class _Silent:
    """A watcher that says nothing."""

    def noted(self, text: str) -> None: ...

    def started(self, network: str, epochs: int, steps: int, done: int) -> None: ...

    def stepped(
        self, epoch: int, step: int, figures: Callable[[], Mapping[str, float]]
    ) -> None: ...

    def epoch_ended(self, row: Row) -> None: ...

    def ended(self) -> None: ...


def _check_resumable(folder: RunFolder, config: TrainConfig, method: Method) -> None:
    if not folder.config.exists():
        raise FileNotFoundError(
            f"there is no run to resume in {folder.path} (no {folder.config.name}): name its "
            "folder with --out, or start one without --resume"
        )
    check_unchanged(folder.config, config, method)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but PyTorch finds no CUDA device: choose cpu or auto")
    return torch.device(name)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
