"""Audit: predicts every support, weight and optimizer state with the reference twin, step by step.

Between `optimizer.step()` and `Sparsifier.step()` it photographs the run; afterwards the run must
equal, bit for bit, what the twin says. Which layer reads which channels comes from a table written
by hand, dense gradients from a hook of its own.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import gossamer
from nets import Reader, Stream
from reference import chase as twin


class Event(NamedTuple):
    """What happened in a step that changed something."""

    step: int
    removed: int
    updated: bool
    nonzeros: int
    live_channels: int


class Audit:
    """Hooks into `nets.train(..., before_step=audit.before, after_step=audit.after)`."""

    def __init__(
        self,
        sparsifier: gossamer.Sparsifier,
        optimizer: torch.optim.Optimizer,
        readers: Mapping[str, Reader] | Mapping[str, Stream],
    ) -> None:
        self.sparsifier = sparsifier
        self.optimizer = optimizer
        self.method = sparsifier.method
        assert isinstance(self.method, gossamer.Chase)
        self.cuts = sparsifier.state_dict()["cut"] == "during"
        streams = {
            name: entry if isinstance(entry, Stream) else Stream((name,), (entry,))
            for name, entry in readers.items()
        }
        order = [site.name for site in sparsifier.sites]  # pools are in the order of the modules
        self.streams = {
            name: streams[name]
            for name in sorted(streams, key=order.index)
            if self.method.channel_sparsity
        }
        self.events: list[Event] = []
        self.sites = {site.name: site for site in sparsifier.sites}
        self.original = sum(site.weight.numel() for site in sparsifier.sites)
        self.widths = {name: len(self.sites[name].weight) for name in self.streams}
        self.floors = [
            twin.floor(
                width,
                self.method.channel_sparsity,
                self.method.min_channel_factor,
                self.method.min_channels,
            )
            for width in self.widths.values()
        ]
        # Live channels in the present numbering, and their numbers in the original network.
        self.live = {name: np.ones(width, dtype=bool) for name, width in self.widths.items()}
        self.numbers = {name: np.arange(width) for name, width in self.widths.items()}
        self.gradients: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            site.weight.register_hook(self._collector(name))

    def _collector(self, name: str):
        def collect(gradient: Tensor) -> None:
            before = self.gradients.get(name)
            self.gradients[name] = gradient.clone() if before is None else before + gradient

        return collect

    def masks(self) -> dict[str, np.ndarray]:
        return {name: site.masked.mask.numpy() != 0 for name, site in self.sites.items()}

    def removed_numbers(self) -> dict[str, set[int]]:
        """Removed channels per producer, numbered as in the original network."""
        return {
            name: set(range(self.widths[name])) - set(self.numbers[name][self.live[name]].tolist())
            for name in self.streams
        }

    # Before the Sparsifier's step

    def before(self, step: int) -> None:
        self.step = step
        self.masks_before = {name: mask.copy() for name, mask in self.masks().items()}
        self.params_before = self._photograph()

    def _photograph(self) -> dict[str, list[Tensor]]:
        """Every parameter of a sparse layer with its optimizer state, `layer.kind` -> tensors."""
        taken = {}
        for name, site in self.sites.items():
            for kind, parameter in (("weight", site.weight), ("bias", site.module.bias)):
                if parameter is not None:
                    taken[f"{name}.{kind}"] = [t.detach().clone() for t in self._all(parameter)]
        return taken

    def _all(self, parameter: nn.Parameter) -> list[Tensor]:
        state = self.optimizer.state.get(parameter, {})
        same = [state[key] for key in sorted(state) if torch.is_tensor(state[key])]
        return [parameter, *(tensor for tensor in same if tensor.dim() > 0)]

    # After it

    def after(self, step: int) -> None:
        assert step == self.step
        removed = self._expected_removal()
        removed_before = self.removed_numbers()
        for name, channels in removed.items():
            self.live[name][channels] = False
        live = {name: self._live_positions(name) for name in self.sites}
        masks = {name: mask & live[name] for name, mask in self.masks_before.items()}
        support = self._expected_update(masks, live)
        updated = support is not None
        kept = dict(zip(masks, support.kept, strict=True)) if support else masks
        grown = dict(zip(masks, support.grown, strict=True)) if support else {}
        factor = {f"{name}.weight": torch.from_numpy(kept[name]) for name in masks}
        if removed:
            for name, stream in self.streams.items():
                for producer in stream.producers:
                    if self.sites[producer].module.bias is not None:
                        factor[f"{producer}.bias"] = torch.from_numpy(self.live[name])
        expected_masks = {name: kept[name] | grown[name] if grown else kept[name] for name in masks}
        expected = {
            name: [t * factor[name] if name in factor else t for t in tensors]
            for name, tensors in self.params_before.items()
        }
        if removed and self.cuts:
            expected_masks, expected = self._cut(expected_masks, expected)

        self._compare(expected_masks, expected)
        self._invariants(removed_before)
        if removed or updated:
            count = sum(int(mask.sum()) for mask in self.masks().values())
            gone = sum(len(channels) for channels in removed.values())
            live_channels = sum(int(alive.sum()) for alive in self.live.values())
            self.events.append(Event(step, gone, updated, count, live_channels))
            self._counts(masks, live, self.events[-1])
        self.gradients.clear()

    def _expected_removal(self) -> dict[str, list[int]]:
        method, total = self.method, self.sparsifier.total_steps
        if not self.streams or self.step not in method.removal_steps(total):
            return {}
        end = method.explore_end if method.channel_end is None else method.channel_end
        share = twin.channel_sparsity(
            self.step,
            round(method.channel_start * total),
            round(end * total),
            method.channel_sparsity,
        )
        scores = []
        for producers, _ in self.streams.values():
            weight = twin.joined([self.params_before[f"{p}.weight"][0].numpy() for p in producers])
            mask = twin.joined([self.masks_before[p] for p in producers])
            # Inputs that were cut count as inactive: divide by the original fan-in.
            fan_in = sum(int(np.prod(self.sites[p].original_shape[1:])) for p in producers)
            if method.channel_score == "umm":
                scores.append(twin.umm(weight, fan_in))
            elif method.channel_score == "masked_mean":
                scores.append(twin.masked_mean(weight, mask))
            else:
                scores.append(mask.sum(1) / fan_in)
        target = twin.live_target(sum(self.widths.values()), share)
        gone = twin.select(scores, list(self.live.values()), self.floors, target)
        return dict(zip(self.streams, gone, strict=True)) if any(gone) else {}

    def _expected_update(self, masks, live) -> twin.Support | None:
        method, total = self.method, self.sparsifier.total_steps
        if not method.updates_at(gossamer.Progress(self.step, total)):
            return None
        names = list(masks)
        weights = [self.params_before[f"{name}.weight"][0].numpy() for name in names]
        gradients = [
            self.gradients.get(name, torch.zeros(masks[name].shape)).numpy() for name in names
        ]
        return twin.update(
            weights,
            list(masks.values()),
            [live[name] for name in names],
            gradients,
            step=self.step,
            total=total,
            phase_a=round(method.explore_end * total),
            original=self.original,
            density=method.density,
            margin=method.margin,
            drop=(method.drop_fraction, method.drop_fraction_end),
        )

    def _live_positions(self, layer: str) -> np.ndarray:
        """Positions of a layer's weight outside removed channels."""
        live = np.ones(self.masks_before[layer].shape, dtype=bool)
        rows, columns = self._live_rows(layer), self._live_columns(layer)
        if rows is not None:
            live[~rows] = False
        if columns is not None:
            live[:, ~columns] = False
        return live

    def _live_rows(self, layer: str) -> np.ndarray | None:
        """Live outputs of a layer; None when it writes no stream and filters none."""
        for name, (producers, readers) in self.streams.items():
            if layer in producers or layer in [reader.depthwise for reader in readers]:
                return self.live[name]
        return None

    def _live_columns(self, layer: str) -> np.ndarray | None:
        """Live inputs of a layer: those of all streams it reads, in their order."""
        parts = sorted(
            (reader.start, name, reader.per_channel)
            for name, stream in self.streams.items()
            for reader in stream.readers
            if reader.layer == layer
        )
        blocks = [np.repeat(self.live[name], times) for _, name, times in parts]
        return np.concatenate(blocks) if blocks else None

    def _cut(self, masks, tensors):
        """What is left of all tensors once removed channels are cut out."""
        rows = {name: self._live_rows(name) for name in self.sites}
        columns = {name: self._live_columns(name) for name in self.sites}
        for name, alive in self.live.items():
            self.numbers[name] = self.numbers[name][alive]
            self.live[name] = np.ones(len(self.numbers[name]), dtype=bool)

        def cut(layer: str, kind: str, value):
            if rows[layer] is not None:
                value = value[rows[layer]]
            if columns[layer] is not None and kind == "weight":
                value = value[:, columns[layer]]
            return value

        cut_masks = {name: cut(name, "weight", mask) for name, mask in masks.items()}
        cut_tensors = {
            key: [cut(*key.rsplit(".", 1), tensor) for tensor in values]
            for key, values in tensors.items()
        }
        return cut_masks, cut_tensors

    def _compare(self, masks, tensors) -> None:
        for name, mask in self.masks().items():
            np.testing.assert_array_equal(mask, masks[name], err_msg=f"{self.step} {name}")
        for name, values in self._photograph().items():
            for got, wanted in zip(values, tensors[name], strict=True):
                assert got.shape == wanted.shape, (self.step, name)
                assert torch.equal(got, wanted.to(got.dtype)), (self.step, name)

    def _invariants(self, removed_before: Mapping[str, set[int]]) -> None:
        """What must hold after every step, said without the twin."""
        for name, site in self.sites.items():
            off = site.masked.mask == 0
            assert set(site.masked.mask.unique().tolist()) <= {0.0, 1.0}
            for tensor in self._all(site.weight):
                assert not tensor.detach()[off].any(), (self.step, name)
            assert not site.effective.detach()[off].any()
            assert torch.equal(site.support, ~off)
        for name, gone in self.removed_numbers().items():
            assert removed_before[name] <= gone
            removed = torch.from_numpy(~self.live[name])
            for producer in self.streams[name].producers:
                assert not self.sites[producer].masked.mask[removed].any()
                if self.sites[producer].module.bias is not None:
                    for tensor in self._all(self.sites[producer].module.bias):
                        assert not tensor.detach()[removed].any(), (self.step, producer)
            for reader in self.streams[name].readers:
                columns = torch.from_numpy(~self._live_columns(reader.layer))
                assert not self.sites[reader.layer].weight.detach()[:, columns].any()
        assert self.sparsifier.live_channels == sum(int(a.sum()) for a in self.live.values())

    def _counts(self, masks, live, event: Event) -> None:
        """The exact counts of chase.md 6.4, items 1 and 4."""
        method, total = self.method, self.sparsifier.total_steps
        phase_a = round(method.explore_end * total)
        budget = round(method.density * self.original)
        capacity = sum(int(allowed.sum()) for allowed in live.values())
        if event.updated:
            ceiling = twin.ceiling(event.step, phase_a, method.density, method.margin)
            goal = round(ceiling * self.original) if event.step <= phase_a else budget
            assert event.nonzeros == min(goal, capacity)
            assert self.sparsifier.density == event.nonzeros / self.original
        else:
            assert event.nonzeros == sum(int(mask.sum()) for mask in masks.values())
        for name, least in zip(self.streams, self.floors, strict=True):
            assert self.live[name].sum() >= least
        if event.removed:
            end = method.explore_end if method.channel_end is None else method.channel_end
            share = twin.channel_sparsity(
                event.step,
                round(method.channel_start * total),
                round(end * total),
                method.channel_sparsity,
            )
            assert event.live_channels == round((1 - share) * sum(self.widths.values()))
