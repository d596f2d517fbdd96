"""Hugging Face Transformers: a callback that has any Trainer train sparse; files of slim models.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    sparsifier = gossamer.Sparsifier(model, gossamer.SRSTE(), total_steps=planned_steps(trainer))
    trainer.add_callback(SparsifyCallback(sparsifier))
    trainer.train()                        # and later: trainer.train(resume_from_checkpoint=True)
    sparsifier.finalize()
    slim = gossamer.shrink(model, example, plan=sparsifier.plan)
    save_pretrained("slim", slim.model, slim.plan)
    model = load_pretrained("slim")        # in any process

The callback adds `sparsifier.penalty()` itself: leave it out of the loss.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from gossamer.finite import check_loss
from gossamer.integrations.checkpoint import carry
from gossamer.measure.topology import TopologyTracker
from gossamer.method import Progress
from gossamer.shrink.plan import Plan
from gossamer.sparsifier import Sparsifier

__all__ = [
    "SparseTrainer",
    "SparsifyCallback",
    "load_pretrained",
    "planned_steps",
    "save_pretrained",
]

_PLAN_FILE = "gossamer_plan.json"
# These keep the weights, or step the optimizer, in ways of their own.
_UNSUPPORTED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TP")


class SparsifyCallback(TrainerCallback):
    """Steps Sparsifiers with the Trainer, and keeps their state in the Trainer's checkpoints.

    `sparsifier.step(optimizer)` runs once after every optimizer step, also when gradients are
    accumulated. The penalty's gradient is there before the first batch of a step: it counts once,
    whatever the Trainer divides the loss by, and clipping sees it; the reported loss is without it.
    The model's `state_dict` holds the Sparsifiers' state until `finalize()`, so a checkpoint's
    widths are there before its tensors are loaded.

    Args:
        sparsifiers: On the Trainer's model, before it trains. Several, each with a method and
            layers of its own, may train one model.
        log: Log `density` and `live_channels`, and after every epoch also `exploration`,
            `sad_from_start` and `sad_since_last` (per weight). They reach the progress bar and
            `state.log_history`; with `SparseTrainer` every logger.

    Attributes:
        topology: Has seen all changes of the supports. With `log` it is checked after every epoch;
            otherwise check it when you like.
    """

    def __init__(self, *sparsifiers: Sparsifier, log: bool = True) -> None:
        if not sparsifiers:
            raise ValueError("SparsifyCallback() has no Sparsifier: pass one, or several")
        self.sparsifiers = sparsifiers
        self._log = log
        self.topology = TopologyTracker(self._supports())
        self._revision = self._seen()
        self._loss: Tensor | None = None
        self._widths: dict[str, float] = {}
        self._moves: dict[str, float] = {}
        carry(*sparsifiers, topology=self.topology, restored=self._restored)

    def observe(self, share: Tensor) -> None:
        """Tell what `Trainer.training_step` returned: a batch's share of the step's mean loss."""
        share = share.detach()
        self._loss = share if self._loss is None else self._loss + share

    def figures(self) -> dict[str, float]:
        """How sparse the network is; after the first epoch also how far its topology has moved."""
        if not self._widths:
            sites = [site for sparsifier in self.sparsifiers for site in sparsifier.sites]
            weights = sum(site.original_numel for site in sites)
            self._widths = {
                "density": sum(site.nonzeros for site in sites) / weights,
                "live_channels": float(sum(one.live_channels for one in self.sparsifiers)),
            }
        return {**self._widths, **self._moves}

    # ------------------------------------------------------------------ what the Trainer calls

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the Trainer's engine is one that works."""
        self._check_engine(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that Trainer, model and Sparsifiers fit; warn when the schedules are too long.

        Raises:
            ValueError: The Sparsifiers are on another model or stand at another step, the loss is
                not told to one that follows it, or the Trainer runs on what does not work.
        """
        self._check_engine(args)
        self._check_model(kwargs["model"])
        for sparsifier in self.sparsifiers:
            made, planned = sparsifier.step_count, sparsifier.total_steps
            if made != state.global_step:
                raise ValueError(
                    f"the Trainer starts at step {state.global_step}, the Sparsifier stands at "
                    f"{made}. To begin anew make a new model and Sparsifier; to resume do so too, "
                    "and pass resume_from_checkpoint a checkpoint that was saved with a "
                    "SparsifyCallback"
                )
            if state.max_steps != planned:
                warnings.warn(
                    f"the Sparsifier's schedules are for {planned} steps, the Trainer will make "
                    f"{state.max_steps}: pass total_steps={state.max_steps}",
                    stacklevel=2,
                )
        self._loss = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the penalty's gradient where the batches' will be added to it."""
        scaler = getattr(kwargs["optimizer"], "scaler", None)  # of fp16; bf16 needs none
        for sparsifier in self.sparsifiers:
            penalty = sparsifier.penalty()
            if penalty.requires_grad:
                scaled = penalty if scaler is None else scaler.scale(penalty)
                scaled.backward()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the Sparsifiers; look at what came of it."""
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        for sparsifier in self.sparsifiers:
            self._tell_loss(sparsifier)
            sparsifier.step(optimizer)
        self._loss = None
        if self._revision != self._seen():
            self._revision = self._seen()
            self.topology.observe(self._supports())
            self._widths = {}

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look how far the topology has moved; the next log says it."""
        if self._log:
            total = self.topology.check(state.global_step, self._supports()).total
            self._moves = {
                "exploration": total.exploration,
                "sad_from_start": total.from_start.per_weight,
                "sad_since_last": total.since_last.per_weight,
            }

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the figures to a training log."""
        logs = kwargs["logs"]
        if self._log and "loss" in logs:
            logs.update(self.figures())
            state.log_history[-1].update(self.figures())

    # ------------------------------------------------------------------ inside

    def _tell_loss(self, sparsifier: Sparsifier) -> None:
        coming = Progress(sparsifier.step_count + 1, sparsifier.total_steps)
        if sparsifier.method.wants_loss(coming):
            if self._loss is None:
                raise ValueError(
                    f"{type(sparsifier.method).__name__} follows the training loss, which a "
                    "callback is not told: use SparseTrainer, or call callback.observe(loss) with "
                    "what training_step returns in your own Trainer"
                )
            sparsifier.observe(self._loss)

    def _supports(self) -> dict[str, Tensor]:
        return {k: v for sparsifier in self.sparsifiers for k, v in sparsifier.supports().items()}

    def _seen(self) -> tuple[int, ...]:
        return tuple(sparsifier.revision for sparsifier in self.sparsifiers)

    def _restored(self) -> None:
        self._revision, self._widths = self._seen(), {}

    def _check_engine(self, args: TrainingArguments) -> None:
        engine = AcceleratorState().distributed_type
        if engine in {getattr(DistributedType, name, None) for name in _UNSUPPORTED}:
            raise ValueError(
                f"the Trainer runs on {engine.value}, which keeps weights in a form of its own: "
                "use several processes with DistributedDataParallel (torchrun, no --fsdp and no "
                "--deepspeed), or your own loop"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"the Trainer would copy the model to {args.n_gpu} GPUs in every step "
                "(DataParallel): start one process per GPU with torchrun, or show it one GPU with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        during = [one for one in self.sparsifiers if one.state_dict()["cut"] == "during"]
        if args.world_size > 1 and any(one.method.needs_graph for one in during):
            raise ValueError(
                f"{args.world_size} processes share gradients by the widths they started with: "
                'use Sparsifier(..., cut="end") and shrink the model after training'
            )

    def _check_model(self, model: nn.Module) -> None:
        mine = {id(parameter) for parameter in model.parameters()}
        for site in (site for sparsifier in self.sparsifiers for site in sparsifier.sites):
            if id(site.weight) not in mine:
                raise ValueError(
                    f"the Trainer's {type(model).__name__} does not hold the weight of "
                    f"{site.name}: make the Sparsifier on trainer.model, and pass the Trainer "
                    "model=, not model_init="
                )


class SparseTrainer(Trainer):
    """A Trainer that tells a SparsifyCallback its loss, and every logger the callback's figures.

    Needed by methods that follow the loss (`AutoSparse(dense_losses=...)`); all others train in any
    Trainer. It stops at a loss that is not finite, with a FloatingPointError that names the layer,
    unless a GradScaler is there, which skips such steps.
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """One batch, forward and backward."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.scaler is None:
            step = self.state.global_step + 1
            check_loss(loss, model, lambda: model(**self._prepare_inputs(inputs)), step)
        for callback in self._sparsifying():
            callback.observe(loss)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the figures of the callback, unless it is silent."""
        for callback in self._sparsifying():
            if callback._log and "loss" in logs:
                logs = {**logs, **callback.figures()}
        super().log(logs, *args, **kwargs)

    def _sparsifying(self) -> list[SparsifyCallback]:
        found = self.callback_handler.callbacks
        return [callback for callback in found if isinstance(callback, SparsifyCallback)]


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps that `trainer.train()` will make: what a Sparsifier's `total_steps` wants.

    Raises:
        ValueError: The data has no length, and `max_steps` is not given.
    """
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    with torch.random.fork_rng(devices=[]):  # making a loader may draw a seed
        loader = trainer.get_train_dataloader()
    try:
        batches = len(loader)
    except TypeError as error:
        raise ValueError(
            "the training data has no length, so nobody knows how many steps an epoch has: give "
            "TrainingArguments(max_steps=...)"
        ) from error
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def save_pretrained(
    folder: str | os.PathLike[str], model: PreTrainedModel, plan: Plan | None = None
) -> None:
    """Write a plain, slim model to a folder: what `model.save_pretrained` writes, and the plan.

    Each file appears whole. Without cuts `from_pretrained` reads the folder too; with cuts it
    cannot, because the configuration makes the full-width model: `load_pretrained` can.

    Args:
        folder: Made if it is not there.
        model: After `finalize()`, and `gossamer.shrink`.
        plan: What was cut (`slim.plan`); None for nothing.

    Raises:
        ValueError: The model is still parametrized; names the module.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{name} is still parametrized: call sparsifier.finalize() before saving"
            )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        model.save_pretrained(temporary)
        (Path(temporary) / _PLAN_FILE).write_text((plan or Plan()).to_json())
        for path in sorted(Path(temporary).iterdir()):
            os.replace(path, target / path.name)


def load_pretrained(
    folder: str | os.PathLike[str], cls: type[PreTrainedModel] | None = None, **settings: Any
) -> PreTrainedModel:
    """The model that `save_pretrained` wrote, at its widths.

    Args:
        folder: A local one.
        cls: The model's class; None: the class of Transformers that the configuration names.
        **settings: Of `from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        ValueError: The folder has no plan, its plan is damaged or of another model, or the class is
            not one of Transformers.
    """
    path = Path(folder) / _PLAN_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is not there: this reads what gossamer.integrations.transformers."
            "save_pretrained wrote; other folders are for from_pretrained"
        )
    try:
        plan = Plan.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    cls = cls or _architecture(folder)

    def init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        plan.apply(self)

    narrow: Any = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    local = {"use_safetensors": True, "local_files_only": True}
    model: PreTrainedModel = narrow.from_pretrained(folder, **local, **settings)
    model.__class__ = cls
    return model


def _architecture(folder: str | os.PathLike[str]) -> type[PreTrainedModel]:
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["no class"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(
            f"{folder} holds a {name}, which is not in Transformers: pass the class, "
            "load_pretrained(folder, MyModel)"
        )
    found: type[PreTrainedModel] = cls
    return found
