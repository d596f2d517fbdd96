"""Sparsifier: runs a method on a model. The only part that keeps state, and that is a step count
and the plan of what was cut; masks and thresholds live in the model.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer import bake
from gossamer.channels import Change
from gossamer.collapse import Guard, OnCollapse
from gossamer.example import Example
from gossamer.fitting import attach, eligible, fitting, on_device, priced
from gossamer.latency import LatencyTable, Milliseconds
from gossamer.method import Method, Progress, SupportChange
from gossamer.ops import spread
from gossamer.parallel import DataParallel, check_agreement, from_first_rank, world_size
from gossamer.reading import reading, short, whole_number
from gossamer.sharding import Crowd, is_sharded, local, placed, whole
from gossamer.shrink.plan import Plan
from gossamer.shrink.slice import Undo
from gossamer.shrink.verify import cut_verified, outputs, probe
from gossamer.site import ChannelPool, in_places
from gossamer.sparse_weight import Masked

__all__ = ["Sparsifier"]

_STATE_FORMAT = 1
_LATER = ("locked", "refused", "collapse")  # a state that was saved before these is as good
# A latency is predicted, measured, and predicted better, until both agree, but not for ever.
_NOISE = 0.02  # by which two measurements of one network differ
_TIMES_MEASURED = 6

# These update every element from its own gradient and state alone: where weight, gradient and
# state are zero they stay zero. After any other optimizer the masks are applied again.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


class Sparsifier:
    """Trains `model` sparse with `method`, inside the user's own loop.

    Construct it before the optimizer, DDP and `torch.compile`; call `step(optimizer)` after every
    `optimizer.step()`; call `finalize()` at the end.

    Args:
        model: A plain model; its linear and convolution weights become sparse in place.
        method: What to do, for instance `gossamer.Chase(density=0.1)`.
        total_steps: Optimizer steps of the whole run; schedules are fractions of it.
        example: An input the model accepts (tensor, tuple of positional inputs, or dict of keyword
            inputs; a few samples are enough). Needed by methods that remove channels.
        include: Layer name patterns (`fnmatch`) to make sparse; None means all.
        exclude: Layer name patterns to leave dense.
        keep_channels: Name patterns of layers whose output channels must all stay.
        cut: "during": removed channels are cut out of the model at once, so training gets faster.
            "end": they are only masked; `gossamer.shrink` cuts them after `finalize()`.
        latency: What the network takes at any widths, `gossamer.latency(model, batch)`, for methods
            that ask for it. None: it is measured here, on the example as it is.
        on_collapse: When a layer keeps next to no weight (`gossamer.collapse`): "warn", "hold" it
            at its floor, or "stop" with a CollapseError.
        seed: Of every random decision; the same on all ranks.

    Attributes:
        sites: The sparse weights.
        pools: The channel groups that may lose channels.
        locked: Channels of which layers stay, with the reason.
        prices: What a network of the pools' widths costs, in the units that the method asks for.
        refused: Cuts that were not made because the network would have become slower, in words.
        collapsed: Layers that fell below their floor, when and why, in words.
        left_dense: Layers and weights that the method cannot make sparse, with the reason.
        plan: What has been cut so far.
        revision: Grows by one whenever supports or widths change.

    Raises:
        ValueError: The model or the run cannot serve the method; says which layer and why.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        total_steps: int,
        example: Example | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        keep_channels: Sequence[str] = (),
        cut: Literal["during", "end"] = "during",
        latency: LatencyTable | None = None,
        on_collapse: OnCollapse = "warn",
        seed: int = 0,
    ) -> None:
        _check_kinds(model, method, include=include, exclude=exclude, keep_channels=keep_channels)
        if type(total_steps) is not int or total_steps < 1:
            raise ValueError(
                f"total_steps={total_steps!r}: give the optimizer steps of the whole run, a whole "
                "number from 1"
            )
        if cut not in ("during", "end"):
            raise ValueError(f'cut={cut!r}: choose "during" or "end"')
        layers, self.left_dense = fitting(model, method, include, exclude)
        shapes = [in_places(place.weight.shape, method.block) for place in layers.values()]
        counts = method.budget(shapes)
        if example is not None:
            example = on_device(example, model)
        groups, self.locked = eligible(model, method, layers, example, keep_channels)
        method.validate({group.name: group.channels for group in groups}, total_steps)
        self.prices = priced(model, method, groups, example, latency)
        method.check_channels(groups, self.prices)

        self.model = model
        self.method = method
        self.total_steps = total_steps
        self.step_count = 0
        self.plan = Plan()
        self.revision = 0
        self.refused = self._clock.slower() if self._clock else []
        self._seed = seed
        self._cut = cut
        self._example = None if example is None else probe(model, example)
        self._postponed = False
        self._wants_dense_grad = False
        self._finalized = False
        self._parallel: DataParallel | None = None
        self._cuts_made = 0
        self._checked: torch.optim.Optimizer | None = None
        self._handles: list[RemovableHandle] = []

        generators = [self._generator(f"start/{name}") for name in layers]
        self.sites = [
            attach(name, place, method, count, generator)
            for (name, place), count, generator in zip(
                layers.items(), counts, generators, strict=True
            )
        ]
        self._bind()
        self.pools = [
            ChannelPool(g, tuple(self._site[part.layer] for part in g.producers), g.channels)
            for g in groups
        ]
        self._zero_off_support(None)
        with torch.no_grad():
            method.advance(self.sites, Progress(0, total_steps), None)
            given = [count * method.block for count in counts]
            self._guard = Guard(on_collapse, method, self.sites, given)
        self._announce()

    def _bind(self) -> None:
        """Refer to the sites, and mask their gradients."""
        for handle in self._handles:
            handle.remove()
        self._site = {site.name: site for site in self.sites}
        self._masked_sites = [site for site in self.sites if isinstance(site.sparse, Masked)]
        self._masks = [(site.masked, site.weight) for site in self._masked_sites]
        self._handles = [
            weight.register_post_accumulate_grad_hook(mask.mask_gradient)  # type: ignore[no-untyped-call]
            for mask, weight in self._masks
        ]

    # ------------------------------------------------------------------ several processes

    def data_parallel(self, **settings: Any) -> DataParallel:
        """The model for several processes: DistributedDataParallel, made anew after every cut.

        Call it in place of `DistributedDataParallel(model, ...)` and use what it returns in the
        forward pass. With `cut="end"` DistributedDataParallel itself serves as well.

        Args:
            **settings: Of `torch.nn.parallel.DistributedDataParallel`, such as `device_ids=[0]`.
        """
        self._parallel = DataParallel(self.model, lambda: self._cuts_made, settings)
        return self._parallel

    def rebind(self) -> None:
        """Take the parameters that the model has now: to be called after `fully_shard` (FSDP2) has
        replaced them, before the optimizer is built and before the first forward pass.

        Of every mask this process then keeps its part only.

        Raises:
            ValueError: Channels are to be cut out while the model is sharded, or weights are kept
                and pruned in blocks.
        """
        sites = [replace(site, weight=bake.latent(site.module, site.tensor)) for site in self.sites]
        sharded = any(is_sharded(site.weight) for site in sites)
        if sharded and self.method.needs_graph and self._cut == "during":
            raise ValueError(
                'cut="during" changes shapes that FSDP has fixed: train with cut="end", and call '
                "gossamer.shrink on the plain model that finalize(into=...) fills"
            )
        if sharded and self.method.block > 1:
            raise ValueError(
                f"block={self.method.block} needs whole blocks of outputs in every process, and "
                "FSDP shards rows as it likes: train with DistributedDataParallel, or with block=1"
            )
        for site in sites:
            site.sparse.shard(site.weight)
        self.sites, self._checked = sites, None
        self._bind()
        self._guard.bind(sites)
        self.pools = [
            replace(pool, producers=tuple(self._site[site.name] for site in pool.producers))
            for pool in self.pools
        ]

    # ------------------------------------------------------------------ the user's loop

    def parameter_groups(self, **thresholds: Any) -> list[dict[str, Any]]:
        """The model's parameters for an optimizer, thresholds in a group of their own.

        Args:
            **thresholds: Optimizer settings of the thresholds, such as `weight_decay=0.0`; what is
                not named is as for the other parameters. Mask methods have no thresholds.
        """
        learned = [p for site in self.sites for p in site.sparse.parameters()]
        ids = {id(parameter) for parameter in learned}
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        groups: list[dict[str, Any]] = [{"params": rest}]
        return [*groups, {"params": learned, **thresholds}] if learned else groups

    def penalty(self) -> Tensor:
        """Term to add to the loss; 0 for mask methods."""
        penalty = self.method.penalty(self.sites)
        if penalty is None:
            return local(self.sites[0].weight).new_zeros(())
        return whole(penalty)

    @torch.no_grad()
    def observe(self, loss: Tensor) -> None:
        """Tell the loss of a batch before `step`, to methods that follow it; others ignore it.

        With accumulated gradients tell the loss of every batch.

        Args:
            loss: 0-d, of this process's own batch, without the penalty.
        """
        if self.method.wants_loss(Progress(self.step_count + 1, self.total_steps)):
            loss = loss.detach().float().clone()
            if world_size() > 1:
                dist.all_reduce(loss)
                loss /= world_size()
            self.method.observe(self.sites, loss)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """To be called after every `optimizer.step()`, before gradients are zeroed.

        Raises:
            ValueError: No gradient reached a sparse weight, or the optimizer lacks a parameter.
        """
        if self._finalized:
            raise ValueError(
                "step() after finalize(): the model is plain and no longer masked; call finalize() "
                "when training has ended, or make a new Sparsifier"
            )
        if optimizer is not self._checked:
            self._check_optimizer(optimizer)
        if all(site.weight.grad is None for site in self.sites):
            raise ValueError(
                "step() found no gradient on any sparse weight: call it after loss.backward() and "
                "optimizer.step(), and before optimizer.zero_grad()"
            )
        self.step_count += 1
        progress = Progress(self.step_count, self.total_steps)
        if type(optimizer) not in _ELEMENTWISE or self._gradients_changed():
            self._zero_off_support(optimizer)

        seen = self.revision
        removed = self._remove_channels(progress)
        changes = self._update(progress)
        if changes is not None:
            self._apply(self._guard.spare(self.sites, changes), optimizer)
        if removed or changes is not None:
            self._zero_off_support(optimizer)
            self.revision += 1
            check_agreement(self.sites, self.step_count)
        if removed and self._cut == "during":
            self._cut_dead_channels(optimizer)
        if self._cut == "end" or any(pool.name in self.locked for pool in self.pools):
            self._zero_dead_biases(optimizer)
        if self.method.advance(self.sites, progress, optimizer):
            self.revision += 1
        self._guard.cap()
        if self.revision != seen:
            self._guard.look(progress)
        self._announce()

    def finalize(self, into: nn.Module | None = None) -> nn.Module:
        """Make the model plain again, exact zeros off the support; returns it.

        The Sparsifier is done then. EMA copies are finalized with `gossamer.finalize(copy)`.

        Args:
            into: For a sharded model (FSDP2): a fresh, plain model of the same class, to be filled
                and returned in its place. All processes call it, each with one of its own.

        Raises:
            ValueError: The model is sharded and `into` is missing or does not fit.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._finalized = True
        return bake.finalize(self.model, into)

    # ------------------------------------------------------------------ what it looks like

    @property
    def density(self) -> float:
        """Weights on the support over the weights the model had at the start."""
        return sum(site.nonzeros for site in self.sites) / sum(
            site.original_numel for site in self.sites
        )

    def supports(self) -> dict[str, Tensor]:
        """Bool support of every site in its original shape; what was cut is off it."""
        found = {}
        for site in self.sites:
            support = whole(site.support)
            for dim in range(2):
                kept = self.plan.kept(site.tensor_name, dim)
                if kept is not None:
                    shape = (*site.original_shape[: dim + 1], *support.shape[dim + 1 :])
                    support = support.new_zeros(shape).index_copy_(
                        dim, kept.to(support.device), support
                    )
            found[site.name] = support
        return found

    @property
    def collapsed(self) -> list[str]:
        """Layers that fell below their floor, when and why, in words."""
        return self._guard.said

    @property
    def live_channels(self) -> int:
        """Channels still there in all pools that may lose channels."""
        return sum(int(pool.live.sum()) for pool in self.pools)

    @property
    def channel_sparsity(self) -> float:
        """Removed share of the channels that may be removed; 0 when there are none.

        A channel that several layers write (of a residual stream) counts once.
        """
        original = sum(pool.original_channels for pool in self.pools)
        return 1 - self.live_channels / original if original else 0.0

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain data to resume from, beside `model.state_dict()` and the optimizer's."""
        return {
            "format": _STATE_FORMAT,
            "method": self.method.to_dict(),
            "total_steps": self.total_steps,
            "seed": self._seed,
            "cut": self._cut,
            "step": self.step_count,
            "postponed": self._postponed,
            "shapes": {site.name: list(site.original_shape) for site in self.sites},
            "plan": self.plan.to_dict(),
            **({"latency": self._clock.state_dict()} if self._clock else {}),
            "locked": dict(self.locked),
            "refused": list(self.refused),
            "collapse": self._guard.state_dict(),
        }

    def load_state_dict(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> Undo:
        """Resume: cuts the fresh model to the widths of the checkpoint and sets the step.

        Call it first, on a Sparsifier made as in the interrupted run; then load the model's and
        the optimizer's state. Returns what takes all of it back.

        Raises:
            ValueError: The state is of another method, other hyperparameters or another model, or
                is damaged. Nothing is changed then.
        """
        expected = self.state_dict()
        for key in expected:
            if not isinstance(state, Mapping) or (key not in state and key not in _LATER):
                raise ValueError(
                    f"this is not a Sparsifier's state: {key!r} is missing. Pass what "
                    "Sparsifier.state_dict() returned"
                )
        for key in ("format", "method", "total_steps", "seed", "cut", "shapes"):
            got = state[key]
            if key == "method" and isinstance(got, dict):
                got = self.method.defaults() | got  # of settings that are newer than it
            if not _equal(got, expected[key]):
                raise ValueError(
                    f"the checkpoint does not fit: {_difference(key, got, expected[key])}; "
                    "resume with the settings of the interrupted run"
                )
        if len(self.plan) or self.step_count:
            raise ValueError("load_state_dict() needs a fresh Sparsifier, before its first step")
        what, remedy = "the Sparsifier's state", "resume from an earlier checkpoint"
        with reading(what, remedy):
            step = whole_number(state, "step", 0, sys.maxsize)
            if type(state["postponed"]) is not bool:
                raise ValueError(f"postponed is {short(state['postponed'])}, wanted a bool")
        plan = Plan.from_dict(state["plan"])
        widen, pools = plan.apply(self.model, optimizer), self.pools

        def take_back() -> None:
            widen()
            self.plan, self.pools, self.step_count, self._postponed = Plan(), pools, 0, False
            self.locked, self.refused = expected["locked"], expected["refused"]
            self._guard.load_state_dict(expected["collapse"])
            self.revision += 1
            self._announce()

        try:
            with reading(what, remedy):
                self._check_runs(plan)
                self._guard.load_state_dict(state.get("collapse", expected["collapse"]))
                self.locked |= {str(k): str(v) for k, v in state.get("locked", {}).items()}
                self.refused[:] = map(str, state.get("refused", self.refused))
                if self._clock:
                    self._clock.load_state_dict(state["latency"])
        except BaseException:
            take_back()
            raise
        self._follow(plan.changes)
        self.step_count = step
        self._postponed = state["postponed"]
        self.revision += 1
        self._announce()
        return take_back

    def _check_runs(self, plan: Plan) -> None:
        """Run what the plan made of the model, where there is an example and something was cut."""
        if len(plan) and self._example is not None:
            outputs(self.model, on_device(self._example, self.model))

    # ------------------------------------------------------------------ inside a step

    def _generator(self, purpose: str) -> torch.Generator:
        """CPU generator from (seed, purpose): the same decisions on every rank and device."""
        digest = hashlib.sha256(f"{self._seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "param_groups"):  # wrappers are no torch.optim.Optimizer
            raise TypeError(
                f"step() got a {type(optimizer).__name__}: pass the optimizer that has just made "
                "its step"
            )
        cuts = self.method.needs_graph and self._cut == "during"
        if cuts and self._parallel is None and world_size() > 1:
            raise ValueError(
                'cut="during" changes shapes that DistributedDataParallel has fixed: wrap the '
                "model with sparsifier.data_parallel(...), which is made anew after every cut, "
                'or train with cut="end" and call gossamer.shrink after finalize()'
            )
        for site in self.sites:
            if not is_sharded(site.weight) and is_sharded(bake.latent(site.module, site.tensor)):
                raise ValueError(
                    f"{site.name}.{site.tensor} was sharded after the Sparsifier was made: call "
                    "sparsifier.rebind() right after fully_shard(model), before the optimizer is "
                    "built"
                )
        for name, inner in vars(optimizer).items():
            if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
                raise ValueError(
                    f"{type(optimizer).__name__} remembers momentum and the like in .{name}, which "
                    f"step() must clear and cut: call step(optimizer.{name})"
                )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for site in self.sites:
            for name, parameter in (("weight", site.weight), *site.sparse.named_parameters()):
                if id(parameter) not in held:
                    raise ValueError(
                        f"the optimizer lacks {site.name}.{name} of shape "
                        f"{tuple(parameter.shape)}: build it from model.parameters() after the "
                        "Sparsifier"
                    )
        self._checked = optimizer

    def _announce(self) -> None:
        """Tell the masks whether the coming step's gradient is needed off the support."""
        coming = Progress(self.step_count + 1, self.total_steps)
        wanted = self._postponed or self.method.wants_dense_grad(coming)
        if wanted or self._wants_dense_grad:
            for site in self._masked_sites:
                site.masked.wants_dense_gradient = wanted
                site.masked.dense_gradient = None
        self._wants_dense_grad = wanted

    def _gradients_changed(self) -> bool:
        """Whether somebody wrote to a gradient after its mask: clipping, noise, unscaling."""
        return any(mask.gradient_changed(weight) for mask, weight in self._masks)

    def _update(self, progress: Progress) -> list[SupportChange] | None:
        due = self._postponed or self.method.updates_at(progress)
        if not (due or self._wants_dense_grad):
            return None
        usable = self._share_dense_gradients()
        self._postponed = due and not usable
        if not (due and usable):
            return None
        generator = self._generator(f"update/{progress.step}")
        return self.method.update(self.sites, progress, generator)

    def _share_dense_gradients(self) -> bool:
        """Average what every rank set aside from its own samples; all of it goes if not finite.

        A step that GradScaler skipped has no usable gradient: the next step updates instead.
        """
        gradients = []
        for mask, _ in self._masks:
            gradient = mask.dense_gradient
            if gradient is not None:
                # FSDP has averaged it already.
                if (world := world_size()) > 1 and not is_sharded(gradient):
                    dist.all_reduce(gradient)
                    gradient /= world
                gradients.append(gradient)
        if not gradients:
            return True
        device = gradients[0].device
        parts = [part for part in map(local, gradients) if part.numel()]
        spoiled = [~edge.isfinite().to(device) for part in parts for edge in part.aminmax()]
        count = int(torch.stack(spoiled).sum()) if spoiled else 0
        if Crowd(gradients).total(count, device) == 0:
            return True
        for mask, _ in self._masks:
            mask.dense_gradient = None
        return False

    def _apply(self, changes: Sequence[SupportChange], optimizer: torch.optim.Optimizer) -> None:
        for site, change in zip(self.sites, changes, strict=True):
            # Through the mask's own memory: a fresh float tensor costs more than the products.
            kept = spread(change.kept, site.block)
            _multiply(site.weight, site.masked.mask.copy_(kept), optimizer)
            site.masked.mask.copy_(spread(change.kept | change.grown, site.block))

    def _zero_off_support(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Latent weights and optimizer state are zero off the support from here on."""
        for site in self._masked_sites:
            with torch.no_grad():
                _multiply(site.weight, site.masked.mask, optimizer)
            site.masked.kept_zero = True

    def _remove_channels(self, progress: Progress) -> bool:
        removals = self.method.removals(self.pools, progress, self.prices)
        if removals is not None and self._clock:
            removals = self._timed(removals, progress)
        if removals is None or not any(len(channels) for channels in removals):
            return False
        for pool, channels in zip(self.pools, removals, strict=True):
            for part in pool.group.slices:
                site = self._site.get(part.layer)
                if site is not None:
                    live = site.masked.live_out if part.axis == "out" else site.masked.live_in
                    live.view(-1)[part.index[channels.cpu()].flatten().to(live.device)] = False
                    site.masked.mask.mul_(site.masked.live)
        return True

    @property
    def _clock(self) -> Milliseconds | None:
        """The price that is measured, and measured again while training."""
        price = self.prices.get("latency")
        assert price is None or isinstance(price, Milliseconds)
        return price

    def _timed(self, removals: list[Tensor], progress: Progress) -> list[Tensor]:
        """The removals, chosen again until the network they leave takes as long as was said.

        None at all when it would take longer than before.
        """
        clock = self._clock
        assert clock is not None
        before = clock.measured
        live = [int(pool.live.sum()) for pool in self.pools]
        nothing = [gone[:0] for gone in removals]
        for attempt in range(_TIMES_MEASURED):
            widths = [n - len(gone) for n, gone in zip(live, removals, strict=True)]
            if widths == live:
                return nothing
            off = clock.check(widths, from_first_rank)
            if abs(off - 1) < _NOISE or attempt == _TIMES_MEASURED - 1:
                break
            again = self.method.removals(self.pools, progress, self.prices)
            assert again is not None
            removals = again
        # A budget is met by cutting more, not less.
        if clock.measured <= before * (1 + _NOISE) or self.method.budgets:
            return removals
        cut = [
            f"{pool.name} {n} to {width}"
            for pool, n, width in zip(self.pools, live, widths, strict=True)
            if width < n
        ]
        self.refused.append(
            f"step {progress.step}: {', '.join(cut)} would take {clock.measured:.4g} ms, and "
            f"before the cut it is {before:.4g} ms"
        )
        clock.measured = before
        return nothing

    def _zero_dead_biases(self, optimizer: torch.optim.Optimizer) -> None:
        """A removed channel that is still there computes nothing at all."""
        for pool in self.pools:
            for site in pool.producers:
                bias = site.module.bias
                if isinstance(bias, nn.Parameter):
                    live = site.masked.live_out.flatten().to(bias.dtype)
                    _multiply(bias, placed(live, like=bias), optimizer)

    def _cut_dead_channels(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._example is not None
        removals = [
            (pool.group, (~pool.live).nonzero().squeeze(1))
            for pool in self.pools
            if pool.name not in self.locked
        ]
        example = on_device(self._example, self.model)
        made = cut_verified(self.model, removals, example, optimizer)
        self.locked.update(made.refused)
        for cuts in made.batches:
            self._follow(cuts)

    def _follow(self, cuts: Sequence[Change]) -> None:
        """Bring plan and pools up to date with cuts that were made on the model."""
        self.plan.record(cuts)
        self._cuts_made += 1
        self.pools = [replace(pool, group=pool.group.after(cuts)) for pool in self.pools]


def _check_kinds(model: object, method: object, **patterns: object) -> None:
    """Raise TypeError where something else is passed than is meant."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: pass the network, a torch.nn.Module, before the "
            "method"
        )
    if not isinstance(method, Method):
        name = method.__name__ if isinstance(method, type) else repr(method)
        raise TypeError(
            f"method is {short(name)}, no Method object: pass one with its settings, such as "
            "gossamer.Chase(density=0.1)"
        )
    for option, given in patterns.items():
        if isinstance(given, str):
            raise TypeError(f"{option}={given!r} is text: give a list of patterns, [{given!r}]")


@torch.no_grad()
def _multiply(
    parameter: nn.Parameter, factor: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Multiply a parameter and every optimizer state of its shape by 0 or 1, in place."""
    parameter.mul_(factor)
    if optimizer is not None:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.mul_(factor)


def _equal(got: Any, wanted: Any) -> bool:
    try:
        return bool(got == wanted)
    except Exception:  # tensors and the like, where plain data is wanted
        return False


def _difference(key: str, got: Any, wanted: Any) -> str:
    """What differs between a checkpoint's and this run's settings, in words."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        for name in (*wanted, *got):
            if not _equal(got.get(name), wanted.get(name)):
                there, here = short(got.get(name)), short(wanted.get(name))
                return f"{key}: {str(name)[:80]} is {there} in it and {here} here"
    return f"{key} is {short(got)} in it and {short(wanted)} here"
