"""What a target density costs: learned thresholds left free, against held to the same density.

    python benchmarks/target.py recipes/digits-dst.yaml [--seeds 0 1 2 3 4] [--SETTING VALUE ...]

For every seed the recipe runs as it is and ends at some density; then it runs again with that
density as `target_density`. Accuracies are on the test images after the last epoch: nothing is
selected.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.control import Targeted
from gossamer.train.flags import parse
from gossamer.train.run import train


def pair(recipe: Path, seed: int, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sparse network's figures, free and held."""
    request = parse(["--config", str(recipe), "--seed", str(seed), *settings])
    method = request.method
    assert isinstance(method, Targeted)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("free", "held"):
            config = replace(request.config, out=f"{scratch}/{name}", baseline=False)
            found.append(train(config, method)["sparse"])
            method = replace(method, target_density=found[0]["density"])
    return found[0], found[1]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("recipe", type=Path)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    chosen, settings = arguments.parse_known_args()

    print(f"{chosen.recipe.stem} {' '.join(settings)}")
    pairs = []
    for seed in chosen.seeds:
        free, held = pair(chosen.recipe, seed, settings)
        pairs.append((free, held))
        off = held["density"] / free["density"] - 1
        print(
            f"  seed {seed}: density {free['density']:.4%}, held {held['density']:.4%} "
            f"({off:+.3%}); accuracy {free['accuracy']:.2%}, held {held['accuracy']:.2%}",
            flush=True,
        )
    for name, runs in zip(("free", "held"), zip(*pairs, strict=True), strict=True):
        accuracies = [run["accuracy"] for run in runs]
        print(
            f"  {name}: accuracy {statistics.mean(accuracies):.2%} "
            f"+- {statistics.stdev(accuracies):.2%}, density "
            f"{statistics.mean(run['density'] for run in runs):.3%}"
        )


if __name__ == "__main__":
    main()
