"""gossamer check: how sparse a model is, in what pattern, and what of it could be cut."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gossamer.train.commands import fail, model_parser, opened, print_table

if TYPE_CHECKING:
    from gossamer.train.source import Source

__all__ = ["run"]

_MOST = 10  # layers to say of why they are not N:M
_BLOCK = 16  # outputs that CPU kernels compute at a time
_EPILOG = """\
examples:
  gossamer check runs/digits-vgg-small-srste-s0
  gossamer check slim.safetensors --pattern 1:4
  gossamer check sparse.safetensors --model mypackage.models:make_net --in_shape 3 64 64"""


def run(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = model_parser(
        "check",
        "Say of every layer how dense it is, in what pattern (N:M, blocks), and what could be cut.",
        _EPILOG,
    )
    parser.add_argument(
        "--pattern", metavar="N:M", default="2:4", help="to hold weights against (default: 2:4)"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    wanted = parser.parse_args(argv)
    pattern = re.fullmatch(r"(\d+):(\d+)", wanted.pattern)
    if pattern is None:
        return fail(2, f"--pattern {wanted.pattern}: give N:M, such as 2:4")
    try:
        found = _check(opened(wanted, batch=2), int(pattern[1]), int(pattern[2]))
    except (ValueError, TypeError, OSError) as error:
        return fail(1, error)
    if wanted.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return 0


def _check(source: Source, n: int, m: int) -> dict[str, Any]:
    from gossamer.export import zeros_note
    from gossamer.measure.macs import account
    from gossamer.measure.pattern import check_block, check_nm
    from gossamer.shrink.shrink import shrink

    size = account(source.model, source.example)
    held = {row.name: row for row in check_nm(source.model, n, m).layers}
    blocks = {row.name: row for row in check_block(source.model, _BLOCK).layers}
    layers: list[dict[str, Any]] = []
    for row in size.layers:
        one: dict[str, Any] = {
            "layer": row.name,
            "shape": list(row.shape),
            "density": row.density,
            "macs_executed": row.macs_executed,
            "macs_sparse": row.macs_sparse,
        }
        if row.name in blocks:
            block = blocks[row.name]
            one |= {"blocks": block.fits, "block_density": block.block_density}
        if row.name in held and row.shape[1] >= m:
            one |= {"fits": held[row.name].fits, "why": held[row.name].why}
        layers.append(one)
    found: dict[str, Any] = {
        "model": source.name,
        "pattern": f"{n}:{m}",
        "block": _BLOCK,
        "density": size.density,
        "macs_executed": size.macs_executed,
        "macs_sparse": size.macs_sparse,
        "layers": layers,
        "zeros": zeros_note(source.model),
    }
    try:
        slim = shrink(source.model, source.example, source.plan)
    except ValueError as error:
        return found | {"not_cut": str(error)}
    return found | {
        "channels": [asdict(row) for row in slim.report],
        "removable": slim.removed,
        "macs_executed_if_cut": account(slim.model, source.example).macs_executed,
    }


def _show(found: dict[str, Any]) -> None:
    pattern = found["pattern"]
    print("weights: MACs are multiply-adds for one image (FLOPs are 2 per MAC)")
    rows = [("layer", "shape", pattern, "density", "MACs executed", "MACs sparse")]
    for layer in found["layers"]:
        fits = {True: "yes", False: "no", None: "-"}[layer.get("fits")]
        work = (f"{layer['macs_executed']:,}", f"{layer['macs_sparse']:,}")
        shape = "x".join(map(str, layer["shape"]))
        rows.append((layer["layer"], shape, fits, f"{layer['density']:.4f}", *work))
    work = (f"{found['macs_executed']:,}", f"{found['macs_sparse']:,}")
    rows.append(("all", "", "", f"{found['density']:.4f}", *work))
    print_table(rows, text_columns=3)
    held = [layer for layer in found["layers"] if "fits" in layer]
    fitting = [layer for layer in held if layer["fits"]]
    print(f"{len(fitting) or 'none'} of the {len(held)} layers with a whole group are {pattern}")
    blocked = [layer for layer in found["layers"] if layer.get("blocks")]
    if blocked:
        layers = f"{len(blocked)} of the {len(found['layers'])} layers"
        shrink = f"`gossamer shrink --block {_BLOCK}` leaves whole"
        print(f"\nzeros of {layers} come in blocks of {_BLOCK} outputs, which {shrink}:")
        parts = [("layer", "density", "of blocks")]
        for layer in blocked:
            parts.append(
                (layer["layer"], f"{layer['density']:.4f}", f"{layer['block_density']:.4f}")
            )
        print_table(parts)
    if fitting:  # else it was never meant to be
        others = [layer for layer in held if not layer["fits"] and layer["density"] < 1]
        for layer in others[:_MOST]:
            print(f"not {pattern}: {layer['layer']}{layer['why']}")
        if len(others) > _MOST:
            print(f"not {pattern}: {len(others) - _MOST} more (--json)")
    print()
    if "not_cut" in found:
        print(f"no channel can be cut: {found['not_cut']}")
    else:
        channels = [("channels of", "there are", "could be cut", "note")]
        for row in found["channels"]:
            gone = str(row["before"] - row["after"])
            channels.append((row["layer"], str(row["before"]), gone, row["note"]))
        print_table(channels, notes=True)
        after, before = found["macs_executed_if_cut"], found["macs_executed"]
        print(
            f"{found['removable']} channels do nothing: `gossamer shrink` would cut them, for "
            f"{after / before:.3f}x the MACs executed"
            if found["removable"]
            else "every channel that may be cut does something: nothing would be cut"
        )
    if found["zeros"]:
        print(f"\n{found['zeros']}")
