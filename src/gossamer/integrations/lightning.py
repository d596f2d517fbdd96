"""Lightning: a callback that trains any LightningModule sparse.

    class Net(LightningModule):
        def __init__(self): ...            # self.model is a plain network

    net = Net()
    sparsifier = gossamer.Sparsifier(net.model, gossamer.Chase(density=0.1), total_steps=steps,
                                     example=batch)
    trainer = Trainer(callbacks=[SparsifyCallback(sparsifier)])
    trainer.fit(net, loader)               # and later: trainer.fit(net, loader, ckpt_path=...)
    sparsifier.finalize()

Methods with a penalty need `+ sparsifier.penalty()` in the loss; for mask methods it is 0.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from gossamer.finite import check_loss
from gossamer.measure.topology import TopologyTracker
from gossamer.sparsifier import Sparsifier

__all__ = ["FiniteLoss", "SparsifyCallback"]


class FiniteLoss(Callback):
    """Stops training before a loss that is not finite changes the weights; says where it began.

    For automatic optimization. With a GradScaler it looks at nothing, since that skips such steps.

    Args:
        model: Whose layers to name; None: the module.

    Raises:
        FloatingPointError: In training: the loss is NaN or infinite; names the step and the layer.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._loss: Tensor | None = None
        self._batch: tuple[Any, int] = (None, 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, to run it again."""
        self._batch = batch, batch_idx

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss."""
        plugin = trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        self._loss = None if scaled else loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the loss; by now a GPU has it, and is busy with the gradients."""
        loss, self._loss = self._loss, None
        if loss is None or not pl_module.automatic_optimization:
            return
        check_loss(
            loss,
            self._model or pl_module,
            lambda: pl_module.training_step(*self._batch),
            trainer.global_step + 1,
        )


class SparsifyCallback(Callback):
    """Steps a Sparsifier with the trainer, and keeps its state in the trainer's checkpoints.

    `sparsifier.step(optimizer)` runs once after every optimizer step, also when gradients are
    accumulated over batches. When a checkpoint is restored, the module is cut to the checkpoint's
    widths before its tensors are loaded. In a module with manual optimization call
    `sparsifier.step(optimizer)` yourself, after each `optimizer.step()`; the callback then does
    the rest.

    Args:
        sparsifier: Made on the module's network, before the trainer runs.
        log: Log `density` and `live_channels`, and show them in the progress bar; after every
            epoch also `exploration`, `sad_from_start` and `sad_since_last` (per weight).

    Attributes:
        topology: Has seen all changes of the supports. With `log` it is checked after every epoch;
            otherwise check it when you like.
    """

    def __init__(self, sparsifier: Sparsifier, *, log: bool = True) -> None:
        self.sparsifier = sparsifier
        self._log = log
        self.topology = TopologyTracker(sparsifier.supports())
        self._steps = 0
        self._revision = sparsifier.revision
        self._figures: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """Where checkpoints keep the Sparsifier's state."""
        return "gossamer.Sparsifier"

    def state_dict(self) -> dict[str, Any]:
        """The Sparsifier's state, and the tracker's: plain data and tensors."""
        return {**self.sparsifier.state_dict(), "topology": self.topology.state_dict()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that trainer and Sparsifier fit; see to it that a checkpoint's widths come first.

        Raises:
            ValueError: The Sparsifier's network is not in the module, or several processes would
                train a network that is cut on the way.
        """
        mine = {id(parameter) for parameter in pl_module.parameters()}
        for site in self.sparsifier.sites:
            if id(site.weight) not in mine:
                raise ValueError(
                    f"{type(pl_module).__name__} does not hold the weight of {site.name}: make the "
                    "Sparsifier on the network inside this module"
                )
        cuts = (
            self.sparsifier.method.needs_graph and self.sparsifier.state_dict()["cut"] == "during"
        )
        if trainer.world_size > 1 and cuts:
            raise ValueError(
                f"{trainer.world_size} processes share gradients by the widths they started with: "
                'use Sparsifier(..., cut="end") and shrink the model after training'
            )

        # Lightning calls the module's `on_load_checkpoint` before it loads the tensors, and a
        # callback's only afterwards, when tensors of other shapes have failed already.
        def restore_then_own(checkpoint: dict[str, Any]) -> None:
            self._restore(trainer, checkpoint)
            type(pl_module).on_load_checkpoint(pl_module, checkpoint)

        pl_module.__dict__["on_load_checkpoint"] = restore_then_own

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module if its `configure_model` has sharded it."""
        self.sparsifier.rebind()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own `on_load_checkpoint` back."""
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn when the trainer's steps are not those the schedules were made for."""
        self._steps = trainer.global_step
        planned, coming = self.sparsifier.total_steps, trainer.estimated_stepping_batches
        if coming not in (planned, math.inf):
            warnings.warn(
                f"the Sparsifier's schedules are for {planned} steps, the trainer will make "
                f"{coming}: pass total_steps={coming}",
                stacklevel=2,
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Step the Sparsifier if the optimizer made a step; look at what came of it, and log it."""
        made = trainer.global_step - self._steps
        self._steps = trainer.global_step
        if made and pl_module.automatic_optimization:
            self.sparsifier.step(trainer.optimizers[0])
        if self._revision != self.sparsifier.revision:
            self._revision = self.sparsifier.revision
            self.topology.observe(self.sparsifier.supports())
            self._figures = {}
        if self._log:
            if not self._figures:
                self._figures = {
                    "density": self.sparsifier.density,
                    "live_channels": float(self.sparsifier.live_channels),
                }
            pl_module.log_dict(self._figures, prog_bar=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how far the topology has moved."""
        if self._log:
            check = self.topology.check(self.sparsifier.step_count, self.sparsifier.supports())
            pl_module.log_dict(
                {
                    "exploration": check.total.exploration,
                    "sad_from_start": check.total.from_start.per_weight,
                    "sad_since_last": check.total.since_last.per_weight,
                }
            )

    def _restore(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            raise ValueError(
                "the checkpoint holds no Sparsifier's state: it was saved without a "
                "SparsifyCallback; train on from its weights with a new Sparsifier and trainer"
            )
        same_widths = state["plan"] == self.sparsifier.plan.to_dict()
        if trainer.state.fn != TrainerFn.FITTING and same_widths and self.sparsifier.step_count:
            return  # testing the network that was just trained
        take_back = self.sparsifier.load_state_dict(state)
        try:
            self.topology.load_state_dict(state.get("topology", {}))
        except BaseException:
            take_back()
            raise
        self._revision, self._figures = self.sparsifier.revision, {}
