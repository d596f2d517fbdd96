"""gossamer bench: models side by side in the engines at hand, or what a cut would bring."""

from __future__ import annotations

import csv
import io
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.train.commands import add_model_arguments, fail, print_table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gossamer.measure.bench import Bench, Timed
    from gossamer.measure.layers import Limits
    from gossamer.narrow import Narrowed

__all__ = ["limit_lines", "outcome_lines", "prediction_lines", "prediction_table", "run"]

_EPILOG = """\
examples:
  gossamer bench runs/digits-vgg-small-chase-s0
  gossamer bench resnet18 --predict 0.3,0.5,0.7 --residual
  gossamer bench dense.safetensors slim.safetensors --engines eager,onnx --batch 1,8,32

One trained MODEL is timed against its dense twin; of several, the first is what the others are
compared with. --predict needs no training: channels of a dense network are cut at random."""

_WORST = 3  # layers named in the statement
_BLOCK = 8  # kernels work in blocks of so many channels
_BLOCK_OF_HALF = 16  # and of so many in matrix units: there 24 channels take as long as 32
_VISIBLE = 1e-3  # below this, outputs differ by the order of summation


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = ArgumentParser(
        prog="gossamer bench",
        description="Time models in turns, in every engine at hand, and say what limits the gain.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        metavar="MODEL",
        nargs="+",
        help="folder or .safetensors file of gossamer train; name of a network; or "
        "package.module:factory",
    )
    add_model_arguments(parser)
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--engines", metavar="A,B", help="names, or all (default: those that pay most here)"
    )
    timing.add_argument("--batch", metavar="N,M", default="1,8", help="default: 1,8")
    timing.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default: 1, timed in CPU time"
    )
    timing.add_argument(
        "--rounds", type=int, default=9, metavar="N", help="times each is measured (default: 9)"
    )
    timing.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    before = parser.add_argument_group("before any training")
    before.add_argument(
        "--predict",
        metavar="S,T",
        nargs="?",
        const="0.3,0.5,0.7",
        help="what these channel sparsities would bring (default: 0.3,0.5,0.7)",
    )
    before.add_argument("--residual", action="store_true", help="cut the skip paths too")
    before.add_argument(
        "--multiple", type=int, metavar="N", help="of the widths (default: 16, 8 in narrow layers)"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--out", metavar="FILE", help="write the rows as CSV")
    wanted = parser.parse_args(argv)
    try:
        batches, shares = _numbers("batch", wanted.batch, int), []
        if wanted.predict is not None:
            shares = _numbers("predict", wanted.predict, float)
    except ValueError as error:
        return fail(2, error)
    if shares and len(wanted.sources) > 1:
        return fail(2, f"--predict is about one MODEL, not {len(wanted.sources)}")
    if (wanted.residual or wanted.multiple is not None) and not shares:
        return fail(2, "--residual and --multiple say what --predict cuts: give --predict too")
    if wanted.model is not None and not any(Path(spec).exists() for spec in wanted.sources):
        return fail(
            2,
            f"--model {wanted.model} says what a file was made from, and none of the "
            "MODELs is a file",
        )
    try:
        found = _bench(wanted, batches, shares)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return fail(1, error)
    if wanted.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        found.show()
    return 0


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) <= 0 or (kind is float and max(values) >= 1):
        wanted = "whole numbers from 1" if kind is int else "shares between 0 and 1"
        raise ValueError(f"--{name} {text}: give {wanted}, with commas between them")
    return values


class _Found:
    """What there is to show."""

    def __init__(
        self,
        timed: Bench,
        limited: Limits | str,
        odd: list[str],
        cuts: Mapping[str, Narrowed],
        kept: list[str],
    ) -> None:
        self._timed, self._limited, self._odd = timed, limited, odd
        self._cuts, self._kept = cuts, kept

    def lines(self) -> list[str]:
        """The statement."""
        lines = [f"not timed: {skip}" for skip in self._timed.skipped]
        if self._cuts:
            lines += prediction_lines(self._timed, self._cuts)
        else:
            lines += outcome_lines(self._timed)
        lines += self._odd
        if isinstance(self._limited, str):
            return [*lines, self._limited] if self._limited else lines
        return lines + limit_lines(self._limited, *self._compared())

    def _compared(self) -> tuple[str, str, int]:
        """Which two models, at which batch size, were timed layer by layer."""
        return self._timed.first, compared(list(self._timed.macs)), self._timed.rows[-1].batch

    def to_dict(self) -> dict[str, Any]:
        found = self._timed.to_dict() | {"statement": self.lines()}
        if self._cuts:
            found["predicted"] = {
                name: {"channel_sparsity": cut.channel_sparsity, "layers": cut.layers}
                for name, cut in self._cuts.items()
            }
            found["kept"] = self._kept
        if not isinstance(self._limited, str):
            found["layers"] = self._limited.to_dict()
        return found

    def show(self) -> None:
        print_table(self._timed.table(), text_columns=2)
        where = self._timed.conditions[0]
        print(
            f"{where.gpu or where.cpu}, {where.threads} thread(s), {where.clock} time, torch "
            f"{where.torch}, median of {where.rounds} rounds in turns; MACs: share of those of "
            f"{self._timed.first}\n"
        )
        if self._cuts:
            print_table(prediction_table(self._timed, self._cuts))
            print()
        print("\n".join(self.lines()))
        if self._kept:
            print(f"kept whole: {'; '.join(self._kept)}")


def _bench(wanted: Namespace, batches: list[int], shares: list[float]) -> _Found:
    import torch

    from gossamer.measure.bench import bench, with_batch
    from gossamer.measure.engines import ENGINES
    from gossamer.measure.layers import limits

    if wanted.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here")
    models, example = _models(wanted)
    cuts: dict[str, Narrowed] = {}
    kept: list[str] = []
    if shares:
        models, cuts, kept = _predicted(models, example, shares, wanted)
    models = {name: model.to(wanted.device) for name, model in models.items()}
    example = example.to(wanted.device)
    engines = None
    if wanted.engines is not None:
        engines = list(ENGINES) if wanted.engines == "all" else wanted.engines.split(",")
    timed = bench(
        models,
        example,
        engines=engines,
        batches=batches,
        threads=wanted.threads,
        rounds=wanted.rounds,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if wanted.out is not None:
        _write_csv(Path(wanted.out), timed)
    limited: Limits | str = ""
    if len(models) > 1:
        pair = (models[timed.first], models[compared(list(models))])
        inputs = with_batch(example, timed.rows[-1].batch)
        clock = timed.conditions[0].clock
        try:
            limited = limits(*pair, inputs, threads=wanted.threads, clock=clock)
        except ValueError as error:
            limited = f"not compared layer by layer: {error}"
    half = any(ENGINES[row.engine].dtype is not None for row in timed.slower)
    odd = odd_lines(models, example, _BLOCK_OF_HALF if half else _BLOCK)
    return _Found(timed, limited, odd, cuts, kept)


def compared(models: list[str]) -> str:
    """The model that is compared with the first layer by layer: the one in the middle."""
    return models[len(models) // 2]


def _models(wanted: Namespace) -> tuple[dict[str, nn.Module], Tensor]:
    """The models by the names they have in the table, the first to compare with."""
    from gossamer.train.source import open_model

    models: dict[str, nn.Module] = {}
    first = None
    for spec in wanted.sources:
        shape = None if wanted.in_shape is None else tuple(wanted.in_shape)
        source = open_model(
            spec,
            model=wanted.model if Path(spec).exists() else None,
            in_shape=shape or (None if first is None else first.architecture.in_shape),
            num_classes=wanted.num_classes
            or (None if first is None else first.architecture.num_classes),
            width=wanted.width,
        )
        if first is None:
            first = source
        if source.example.shape[1:] != first.example.shape[1:]:
            raise ValueError(
                f"{spec} takes images of {tuple(source.example.shape[1:])}, {wanted.sources[0]} "
                f"of {tuple(first.example.shape[1:])}: compare models of the same images"
            )
        if len(wanted.sources) == 1 and source.dense is not None:
            models["dense"] = source.dense
            if wanted.predict is None:
                models["slim"] = source.model
            continue
        name = Path(spec).name
        if name in models:
            name = spec
        if name in models:
            raise ValueError(f"{spec} is given twice: give every MODEL once")
        models[name] = source.model
    assert first is not None
    return models, first.example


def _predicted(
    models: Mapping[str, nn.Module], example: Tensor, shares: list[float], wanted: Namespace
) -> tuple[dict[str, nn.Module], dict[str, Narrowed], list[str]]:
    """The dense network and its narrower copies; what they are; what is kept whole, and why."""
    from gossamer.channels import find_groups
    from gossamer.narrow import cuttable, narrowed

    [dense] = models.values()
    groups = find_groups(dense, example)
    if not cuttable(groups, residual=wanted.residual):
        reasons = "; ".join(f"{g.name}: {g.locked or 'on a skip path'}" for g in groups)
        raise ValueError(f"no channel of it can be cut ({reasons})")
    cuts = {
        f"{share:g} cut": narrowed(
            dense,
            example,
            share,
            residual=wanted.residual,
            multiple=wanted.multiple,
            groups=groups,
        )
        for share in dict.fromkeys(shares)
    }
    kept = [f"{group.name} ({group.locked})" for group in groups if group.locked]
    skips = [g.name for g in groups if not g.locked and not g.internal]
    if skips and not wanted.residual:
        kept.append(f"{len(skips)} skip paths (--residual cuts them too)")
    return {"dense": dense} | {name: cut.model for name, cut in cuts.items()}, cuts, kept


def _write_csv(path: Path, timed: Bench) -> None:
    from gossamer.shrink.file import write_whole

    rows = timed.flat()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue()))


# The statement


def outcome_lines(timed: Bench) -> list[str]:
    """What is fastest, and what each model brings against what its MACs promise."""
    lines = []
    for best in timed.best:
        if best.model == timed.first:
            lines.append(
                f"batch {best.batch}: {best.model} is fastest in {best.engine}, "
                f"{best.milliseconds:.4g} ms"
            )
            continue
        lines.append(
            f"batch {best.batch}: {best.model} is fastest in {best.engine}, "
            f"{best.milliseconds:.4g} ms: {_gain(best.ratio.median)}; "
            f"MACs promise {_gain(timed.macs_ratio(best.model))}"
        )
    return lines + _slower_lines(timed) + _error_lines(timed)


def prediction_table(timed: Bench, cuts: Mapping[str, Narrowed]) -> list[tuple[str, ...]]:
    """A line for each channel sparsity: MACs, time in the best engine, and whether it pays."""
    batches = list(dict.fromkeys(best.batch for best in timed.best))
    head = ("channel sparsity", "in these widths", "MACs")
    lines: list[tuple[str, ...]] = [
        (*head, *(f"best, batch {batch}" for batch in batches), "pays in")
    ]
    for name, cut in cuts.items():
        best = {row.batch: row for row in timed.best if row.model == name}
        paying, all_rows = _paying(timed, name)
        lines.append(
            (
                name.removesuffix(" cut"),
                f"{cut.channel_sparsity:.2f}",
                f"{timed.macs_ratio(name):.3f}",
                *(
                    f"{best[batch].ratio.median:.3f} {best[batch].engine}" if batch in best else "-"
                    for batch in batches
                ),
                f"{len(paying)} of {len(all_rows)} rows",
            )
        )
    return lines


def prediction_lines(timed: Bench, cuts: Mapping[str, Narrowed]) -> list[str]:
    """Will it pay? For each channel sparsity, in the engine that is fastest for it."""
    lines = []
    for name in cuts:
        share = name.removesuffix(" cut")
        gains = [row for row in timed.best if row.model == name]
        told = ", ".join(
            f"{_gain(row.ratio.median)} at batch {row.batch} ({row.engine})" for row in gains
        )
        pays = all(row.ratio.high < 1 for row in gains)
        sometimes = any(row.ratio.high < 1 for row in gains)
        verdict = "will pay" if pays else "will pay in part" if sometimes else "will not pay"
        lines.append(f"channel sparsity {share} {verdict} here: {told}")
    return lines + _slower_lines(timed) + _error_lines(timed)


def _paying(timed: Bench, model: str) -> tuple[list[Timed], list[Timed]]:
    rows = [row for row in timed.rows if row.model == model]
    return [row for row in rows if row.ratio.high < 1], rows


def _gain(ratio: float) -> str:
    return f"{ratio:.3f} of the time, {1 / ratio:.2f}x the throughput"


def _slower_lines(timed: Bench) -> list[str]:
    if not any(timed.macs_ratio(model) < 1 for model in timed.macs):
        return []
    if not timed.slower:
        return [f"no model with fewer MACs than {timed.first} took longer, in any row"]
    told = ", ".join(
        f"{row.model} in {row.engine} at batch {row.batch} ({row.ratio.median:.3f} of the time "
        f"with {timed.macs_ratio(row.model):.3f} of the MACs)"
        for row in timed.slower
    )
    return [f"SLOWER than {timed.first}, though with fewer MACs; do not use it there: {told}"]


def odd_lines(models: Mapping[str, nn.Module], example: Tensor, multiple: int) -> list[str]:
    """Layers cut to widths that are no multiples, which cost time: a line for each model."""
    from gossamer.measure.macs import account

    shapes = {
        name: {row.name: row.shape for row in account(model, example).layers}
        for name, model in models.items()
    }
    first, *others = shapes
    lines = []
    for name in others:
        odd = {
            layer: shape[0]
            for layer, shape in shapes[name].items()
            if shape[0] % multiple and shape[0] < shapes[first].get(layer, shape)[0]
        }
        if odd:
            some = ", ".join(f"{layer} ({width})" for layer, width in list(odd.items())[:_WORST])
            lines.append(
                f"{len(odd)} layers of {name} have widths that are no multiples of {multiple}: "
                f"they may take as long as the next multiple ({some})"
            )
    return lines


def _error_lines(timed: Bench) -> list[str]:
    """Engines that compute something visibly different."""
    worst: dict[str, float] = {}
    for row in timed.rows:
        worst[row.engine] = max(row.error, worst.get(row.engine, 0.0))
    told = ", ".join(
        f"{engine} by {error:.1%}" for engine, error in worst.items() if error > _VISIBLE
    )
    return [f"changes the outputs (of the largest): {told}"] if told else []


def limit_lines(limited: Limits, first: str, second: str, batch: int) -> list[str]:
    """What keeps the second model from being as fast as its MACs promise."""
    whole = sum(row.first for row in limited.roles)
    perfect = sum(row.second if row.macs is None else row.macs * row.first for row in limited.roles)
    shares = ", ".join(f"{row.layer} {row.first / whole:.0%}" for row in limited.roles)
    ratios = ", ".join(f"{row.layer} {row.ratio:.3f}" for row in limited.roles)
    lines = [
        f"eager, batch {batch}: the time of {first} is {shares}; {second} takes of each: {ratios}",
        f"if its products took what their MACs promise, the rest would hold it at "
        f"{perfect / whole:.3f} of the time",
    ]
    worst = [row for row in limited.layers if row.excess > 0][:_WORST]
    if worst:
        layers = ", ".join(
            f"{row.layer} ({row.ratio:.3f} of the time with {row.macs:.3f} of the MACs, "
            f"{row.excess:.2g} ms too long)"
            for row in worst
        )
        lines.append(f"farthest above their MACs: {layers}")
    return lines
