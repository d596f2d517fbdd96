"""A small Transformer on text: N:M patterns, AutoSparse and RigL beside dense twins, one recipe.

    python benchmarks/text_transformer.py [--data tinyshakespeare/input.txt] [--methods dense ...]
        [--seeds 0 1 2] [--steps 1250] [--threads 1] [--out runs/text-transformer]

Predicts the next character. The first 90 % of the text are for training, the next 5 % for
validation, the last 5 % for the test, which is looked at once, after the last step. Embeddings and
output head stay dense. The learning rate was chosen by the validation loss of the dense network
alone: 6e-3 was better than 3e-3 (1250 steps, seed 0). Methods:

    dense               the twin
    srste-N:M[-LAM]     SR-STE, LAM 2e-4 if not given
    decoupled-N:M-LAM   SR-STE that decays pruned weights after the step, past the optimizer
    ste-N:M             plain STE: pruned weights do not decay
    autosparse-DENSITY  held at the density by target_density
    rigl-DENSITY

Writes results.csv (a row per run) and results.md after every run. A run that is there already is
not run again, and several processes may fill one folder. A run takes 2 to 3 minutes of one core.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gossamer
from gossamer.measure import TopologyTracker, account, check_nm
from gossamer.schedules import cosine
from gossamer.train.folder import RunFolder
from gossamer.train.report import table
from gossamer.train.work import Work
from interleave import conditions

METHODS = (
    *("dense", "srste-2:4", "ste-2:4", "srste-4:8", "srste-1:4"),
    *("autosparse-0.5", "autosparse-0.25", "rigl-0.5", "rigl-0.25"),
)
DENSE = "dense"
LAM = 2e-4  # the paper's
PARTS = (0.9, 0.95)  # of the text: where training ends, where validation ends
CHECKS = 20  # of the topology, at equal intervals: what sad_cumulative adds up

# Of results.csv, in order.
FIELDS = (
    *("method", "seed", "test_bpc", "test_accuracy", "val_bpc", "val_accuracy", "train_bpc"),
    *("density", "nonzeros", "bytes_on_disk", "macs_executed", "macs_sparse", "macs_training"),
    *("sad_cumulative", "sad_last", "cpu_seconds", "collapsed", "gossamer", "machine"),
    *("hyperparameters", "settings"),
)
Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all runs of one table share; `data` is the text's SHA-256."""

    data: str
    steps: int
    batch: int
    threads: int
    dtype: str
    lr: float
    warmup: float = 0.05  # of the steps
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1  # of matrices
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128

    def rate(self, step: int) -> float:
        """Factor on the learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return cosine((step - warmup) / (self.steps - warmup), 1.0, 0.0)


# ---------------------------------------------------------------------- text


@dataclass(frozen=True)
class Text:
    """A text in three parts, each character a number (int64) below `characters`."""

    train: Tensor
    val: Tensor
    test: Tensor
    characters: int


def read_text(path: Path, context: int) -> tuple[Text, str]:
    """The text, and its SHA-256."""
    if not path.is_file():
        raise SystemExit(
            f"{path} is no file: give a text with --data, such as the input.txt of char-rnn's "
            "tinyshakespeare (1.1 million characters)"
        )
    data = path.read_bytes()
    written = data.decode()
    numbers = {character: number for number, character in enumerate(sorted(set(written)))}
    text = torch.tensor([numbers[character] for character in written])
    train, val, test = text.tensor_split([round(part * len(text)) for part in PARTS])
    if len(test) <= context:
        raise SystemExit(
            f"{path} has {len(text)} characters, and a twentieth of them, to test on, is not more "
            f"than the context of {context}: give a longer text"
        )
    return Text(train, val, test, len(numbers)), hashlib.sha256(data).hexdigest()


def batch(text: Tensor, settings: Settings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Characters from random places, and those that follow them: `(batch, context)` each."""
    starts = torch.randint(len(text) - settings.context, (settings.batch, 1), generator=generator)
    windows = text[starts + torch.arange(settings.context + 1)]
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def score(model: nn.Module, text: Tensor, context: int) -> tuple[float, float]:
    """Bits per character, and share of characters that came first, in windows side by side."""
    model.eval()
    length = (len(text) - 1) // context * context
    inputs, targets = (part.view(-1, context) for part in (text[:length], text[1 : length + 1]))
    loss = hits = 0.0
    for x, y in zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True):
        logits = model(x).flatten(0, 1)
        loss += float(F.cross_entropy(logits, y.flatten(), reduction="sum"))
        hits += int((logits.argmax(1) == y.flatten()).sum())
    return loss / length / math.log(2), hits / length


# ---------------------------------------------------------------------- model


class Attention(nn.Module):
    """Causal self-attention; the scores in float32, which under autocast is faster on CPUs."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).float().unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        with torch.autocast("cpu", enabled=False):
            seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and beside the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Logits `(batch, length, characters)` of the characters that follow `(batch, length)`."""

    def __init__(self, characters: int, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(settings.context, width)
        self.blocks = nn.Sequential(*(Block(width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:  # as GPT-2
                residual = name.endswith(("attention.out.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * settings.layers) if residual else 0.02
                nn.init.normal_(weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], device=x.device)
        stream = self.blocks(self.characters(x) + self.positions(place))
        logits: Tensor = self.head(self.norm(stream))
        return logits


# ---------------------------------------------------------------------- methods


def make_method(name: str) -> gossamer.Method | None:
    """What a name of `--methods` stands for; None is the dense twin."""
    kind, *given = name.split("-", 2)
    if name == DENSE:
        return None
    try:
        if kind in ("autosparse", "rigl"):
            (density,) = map(float, given)
            if kind == "rigl":
                return gossamer.RigL(density=density)
            return gossamer.AutoSparse(target_density=density)
        pattern, *lam = given
        n, m = map(int, pattern.split(":"))
        if kind == "ste" and not lam:
            return gossamer.SRSTE(n=n, m=m, lam=0.0)
        if kind == "srste":
            return gossamer.SRSTE(n=n, m=m, lam=float(lam[0]) if lam else LAM)
        if kind == "decoupled":
            return gossamer.SRSTE(n=n, m=m, lam=float(lam[0]), mode="decoupled")
        why = "it is none of the kinds"
    except (ValueError, IndexError) as error:
        why = str(error)
    raise argparse.ArgumentTypeError(
        f"{name!r} is no method ({why}): give one such as {', '.join(METHODS)}, srste-2:4-0.01, "
        "decoupled-2:4-1"
    )


def asked(method: gossamer.Method) -> float:
    """The density that a method of `make_method` is to end at."""
    if isinstance(method, gossamer.SRSTE):
        return method.n / method.m
    if isinstance(method, gossamer.AutoSparse):
        assert method.target_density is not None
        return method.target_density
    assert isinstance(method, gossamer.RigL)
    return method.density


def check_support(
    model: nn.Module, method: gossamer.Method, supports: Mapping[str, Tensor]
) -> float:
    """Density of a finished model; RuntimeError when its zeros are not those that were asked for.

    Args:
        model: Plain, after `finalize()`.
        method: It was trained with.
        supports: At the end of training, by layer name.
    """
    for name, support in supports.items():
        stray = int((model.get_parameter(f"{name}.weight") != 0)[~support].sum())
        if stray:
            raise RuntimeError(f"{name} has {stray} non-zeros off its support after finalize()")
    density = sum(int(s.sum()) for s in supports.values()) / sum(
        support.numel() for support in supports.values()
    )
    if isinstance(method, gossamer.SRSTE):
        report = check_nm(model, method.n, method.m)
        if not all(report[name].fits for name in supports):
            raise RuntimeError(f"the finished weights are not N:M:\n{report.table()}")
        short = [name for name, s in supports.items() if int(s.sum()) != asked(method) * s.numel()]
        if short:
            raise RuntimeError(
                f"{', '.join(short)} do not keep {method.n} of every {method.m} weights"
            )
    if abs(density / asked(method) - 1) > 0.01:
        raise RuntimeError(f"the run ends at density {density:.4f}, {asked(method)} was asked for")
    return density


# ---------------------------------------------------------------------- a run


def run(
    method: gossamer.Method | None, seed: int, text: Text, settings: Settings
) -> dict[str, Any]:
    """Train one network; its row's figures."""
    torch.manual_seed(seed)
    model = Transformer(text.characters, settings)
    example = text.train[None, : settings.context]
    sparsifier = tracker = None
    decayed = list(model.parameters())
    thresholds: list[dict[str, Any]] = []
    if method is not None:
        sparsifier = gossamer.Sparsifier(
            model, method, total_steps=settings.steps, exclude=["head"], seed=seed
        )
        if sparsifier.left_dense:
            raise SystemExit(f"{method}: some layers would stay dense: {sparsifier.left_dense}")
        tracker = TopologyTracker(sparsifier.supports())
        # The controller, not decay, raises thresholds (docs/target.md).
        group, *thresholds = sparsifier.parameter_groups(weight_decay=0.0)
        decayed = group["params"]
    groups = [
        {"params": [p for p in decayed if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in decayed if p.dim() <= 1], "weight_decay": 0.0},
        *thresholds,
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate)
    work = Work(model, example, sparsifier)
    generator = torch.Generator().manual_seed(seed)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16")

    losses: list[Tensor] = []
    seconds = sad_last = 0.0
    for step in range(1, settings.steps + 1):
        work.add(settings.batch)
        started = time.process_time()
        x, y = batch(text.train, settings, generator)
        with autocast:
            logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        losses.append(loss.detach())
        if sparsifier is not None:
            loss = loss + sparsifier.penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen = sparsifier.revision if sparsifier is not None else 0
        if sparsifier is not None:
            sparsifier.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
        seconds += time.process_time() - started
        if sparsifier is not None and tracker is not None:
            if step * CHECKS // settings.steps > (step - 1) * CHECKS // settings.steps:
                check = tracker.check(step, sparsifier.supports())
                sad_last = check.total.since_last.per_weight
            elif sparsifier.revision != seen:
                tracker.observe(sparsifier.supports())
    recent = torch.stack(losses[-max(1, settings.steps // CHECKS) :])
    if not recent.isfinite().all():
        raise RuntimeError(f"the loss is not finite by step {settings.steps}")

    density, supports = 1.0, {}
    if sparsifier is not None and method is not None:
        supports = sparsifier.supports()
        sparsifier.finalize()
        density = check_support(model, method, supports)
    size = account(model, example, supports={k: int(s.sum()) for k, s in supports.items()})
    val, test = (score(model, part, settings.context) for part in (text.val, text.test))
    return {
        **dict(zip(("test_bpc", "test_accuracy"), test, strict=True)),
        **dict(zip(("val_bpc", "val_accuracy"), val, strict=True)),
        "train_bpc": float(recent.mean()) / math.log(2),
        "density": density,
        "nonzeros": size.nonzeros,
        "bytes_on_disk": size.bytes_on_disk,
        "macs_executed": size.macs_executed,
        "macs_sparse": size.macs_sparse,
        "macs_training": work.total,
        "sad_cumulative": "" if tracker is None else tracker.sad_cumulative,
        "sad_last": "" if tracker is None else sad_last,
        "cpu_seconds": seconds,
        "collapsed": "" if sparsifier is None else "; ".join(sparsifier.collapsed),
    }


# ---------------------------------------------------------------------- results


def read_rows(path: Path) -> list[Row]:
    """Of results.csv; none where it is not there yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise SystemExit(f"{path} has other columns than this benchmark: choose another --out")
        return list(reader)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def same(row: Row, other: Row, *keys: str) -> bool:
    """Whether two rows are of one method, seed and settings, and agree in these columns too."""
    return all(row[key] == other[key] for key in ("method", "seed", "settings", *keys))


_LEGEND = f"""\
- method: name as for `--methods`; seeds: how many runs. What follows is their mean +- standard
  deviation; without +- they agree in these digits.
- bpc: bits per character, the mean cross-entropy in windows of the context's length side by side,
  in float32, after the last step; nothing was selected. accuracy: of the next character, in %.
- vs dense: difference to the dense twin of the same seed, in bits and in percentage points.
- train: bpc over the last {CHECKS}th of the steps, as trained.
- density: share of the sparse layers' weights that is kept: all but embeddings, norms and head.
- nonzeros, bytes, MACs: as shares of the dense network's. MACs executed: what dense-format hardware
  runs, multiplying by zeros too. MACs sparse: what hardware that skips every zero would run. MACs
  training: of the whole run, products that the method's zeros allow to skip left out.
- SAD: weights that exactly one of two supports keeps, per weight, from check to check, {CHECKS} of
  them; summed over the run, and of the last one.
- CPU s: processor's time of the training steps, in seconds."""

# Figures of the table: title, format, factor; None: as a share of the dense twins' mean.
_COLUMNS: dict[str, tuple[str, str, float | None]] = {
    "test_bpc": ("test bpc", "{:.4f}", 1),
    "test_bpc vs dense": ("vs dense", "{:+.4f}", 1),
    "test_accuracy": ("test accuracy", "{:.2f}", 100),
    "test_accuracy vs dense": ("vs dense", "{:+.2f}", 100),
    "val_bpc": ("validation bpc", "{:.4f}", 1),
    "val_accuracy": ("validation accuracy", "{:.2f}", 100),
    "train_bpc": ("train bpc", "{:.4f}", 1),
    "density": ("density", "{:.4f}", 1),
    "nonzeros": ("nonzeros", "{:.3f}", None),
    "bytes_on_disk": ("bytes", "{:.3f}", None),
    "macs_executed": ("MACs executed", "{:.3f}", None),
    "macs_sparse": ("MACs sparse", "{:.3f}", None),
    "macs_training": ("MACs training", "{:.3f}", None),
    "sad_cumulative": ("SAD, sum", "{:.3f}", 1),
    "sad_last": ("SAD, last", "{:.4f}", 1),
    "cpu_seconds": ("CPU s", "{:.0f}", 1),
}


def order(name: str) -> tuple[int, str]:
    return (METHODS.index(name) if name in METHODS else len(METHODS), name)


def means(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table, with its head: a row per method, mean +- sd over the seeds."""
    twins = {row["seed"]: row for row in rows if row["method"] == DENSE}
    lines = [("method", "seeds", *(title for title, _, _ in _COLUMNS.values()))]
    for name in sorted({row["method"] for row in rows}, key=order):
        group = [row for row in rows if row["method"] == name]
        cells = []
        for key, (_, form, factor) in _COLUMNS.items():
            figure, _, difference = key.partition(" ")
            values = [float(row[figure]) for row in group if row[figure]]
            if difference:
                paired = [row for row in group if row["seed"] in twins and name != DENSE]
                values = [float(r[figure]) - float(twins[r["seed"]][figure]) for r in paired]
            elif factor is None:
                base = fmean(float(row[figure]) for row in twins.values()) if twins else math.nan
                values = [value / base for value in values]
            cells.append(spread([(factor or 1) * value for value in values], form))
        lines.append((name, str(len(group)), *cells))
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Mean +- standard deviation; the latter only where it shows."""
    if not values or any(map(math.isnan, values)):
        return "-"
    text = form.format(fmean(values))
    if len(values) > 1:
        deviation = form.replace("+", "").format(stdev(values))
        if float(deviation):
            text += f" +- {deviation}"
    return text


def markdown(rows: Sequence[Row], settings: Settings, data: Path) -> str:
    """results.md: the table, what its words mean, the conditions, the command."""
    methods = sorted({row["method"] for row in rows}, key=order)
    seeds = sorted({int(row["seed"]) for row in rows})
    parts = [
        f"# A Transformer on {data.parent.name or data.stem}, character by character",
        f"MACs are multiply-adds for one window of {settings.context} characters (FLOPs are 2 per "
        "MAC); ratios are to dense.",
        table(means(rows)),
    ]
    if twin := next((row for row in rows if row["method"] == DENSE), None):
        figures = ("nonzeros", "bytes_on_disk", "macs_executed", "macs_sparse", "macs_training")
        shown = (f"{key} {float(twin[key]):,.0f}" for key in figures)
        parts.append(f"The dense network: {', '.join(shown)}.")
    if sgd := [name for name in methods if name.startswith("srste")]:
        parts.append(
            f"lam is {LAM:g} where the name says none. That is the paper's, for SGD; in "
            f"{', '.join(sgd)} it goes through AdamW, which rescales it weight by weight."
        )
    parts += [
        f"{row['method']} seed {row['seed']}: {row['collapsed']}"
        for row in rows
        if row["collapsed"]
    ]
    told = (sorted({row[key] for row in rows}) for key in ("machine", "gossamer"))
    machines, versions = map("; ".join, told)
    chosen = {
        "data": Path(*data.parts[-2:]),
        **{key: getattr(settings, key) for key in ("steps", "batch", "lr", "threads", "dtype")},
        "seeds": " ".join(map(str, seeds)),
        "methods": " ".join(methods),
    }
    flags = " ".join(f"--{key} {value}" for key, value in chosen.items())
    command = f"python benchmarks/text_transformer.py {flags}"
    parts += [
        _LEGEND,
        f"Conditions: {machines}; Gossamer {versions}; products in {settings.dtype}. A pre-norm "
        f"Transformer of {settings.layers} blocks, width {settings.width}, {settings.heads} heads, "
        f"context {settings.context}; AdamW, learning rate {settings.lr:g} with a linear warm-up "
        f"over {settings.warmup:.0%} of the steps, then a cosine to 0; batch {settings.batch}, "
        f"{settings.steps} steps, no dropout, no clipping. "
        "Settings of the methods are the library's defaults, but for what their names say, and "
        "thresholds have no weight decay; nothing was tuned for any of them.",
        f"Single runs, with all hyperparameters, are in results.csv.\n\n    {command}",
        f"## Settings\n\n```json\n{json.dumps(asdict(settings), indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def add_row(out: Path, row: Row, settings: Settings, data: Path) -> None:
    """Write both files anew, with the row."""
    folder, path = RunFolder(out), out / "results.csv"
    with locked(out):
        rows = [other for other in read_rows(path) if not same(other, row)]
        rows = sorted([*rows, row], key=lambda r: (*order(r["method"]), int(r["seed"])))
        folder.write_rows(path, rows)
        shown = [other for other in rows if other["settings"] == row["settings"]]
        folder.write_text(out / "results.md", markdown(shown, settings, data))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("tinyshakespeare/input.txt"))
    parser.add_argument("--out", type=Path, default=Path("runs/text-transformer"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    chosen = parser.parse_args()
    try:
        methods = {name: make_method(name) for name in chosen.methods}
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    if chosen.steps < CHECKS:
        parser.error(f"--steps {chosen.steps}: give at least {CHECKS}")
    torch.set_num_threads(chosen.threads)
    text, digest = read_text(chosen.data, Settings.context)
    settings = Settings(
        data=digest,
        steps=chosen.steps,
        batch=chosen.batch,
        lr=chosen.lr,
        threads=chosen.threads,
        dtype=chosen.dtype,
    )
    chosen.out.mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        for name, method in methods.items():
            row: Row = dict.fromkeys(FIELDS, "") | {
                "method": name,
                "seed": str(seed),
                "gossamer": gossamer.__version__,
                "machine": conditions().rpartition(", load")[0],
                "hyperparameters": json.dumps({} if method is None else method.to_dict()),
                "settings": json.dumps(asdict(settings)),
            }
            done = read_rows(chosen.out / "results.csv")
            if any(same(row, other, "hyperparameters") for other in done):
                print(f"{name} seed {seed}: is there already", flush=True)
                continue
            found = run(method, seed, text, settings)
            add_row(chosen.out, row | {k: str(v) for k, v in found.items()}, settings, chosen.data)
            print(
                f"{name} seed {seed}: train {found['train_bpc']:.4f}, validation "
                f"{found['val_bpc']:.4f}, test {found['test_bpc']:.4f} bits per character, "
                f"accuracy {found['test_accuracy']:.2%}, density {found['density']:.4f}, "
                f"{found['cpu_seconds']:.0f} s",
                flush=True,
            )
    print(f"written to {chosen.out / 'results.md'}")


if __name__ == "__main__":
    main()
