"""kill -9 at any moment: the next start goes on, and ends as if nothing had been, bit for bit."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import yaml
from tests.train.test_run import lasting, rows, same_metrics, same_model

from gossamer.train.checkpoints import newest
from gossamer.train.folder import RunFolder
from gossamer.train.html import page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]

KILLS = 20
DROPOUT = ["--model", "tests.train.test_run:with_dropout"]
VGG = ["--model", "vgg-small", "--width", "0.25"]
CHASE = ["--method", "chase", "--density", "0.2", "--channel_sparsity", "0.5"]
CHASE += ["--min_channels", "2"]
CASES = {
    "chase-cut_during-baseline": [*VGG, *CHASE, "--cut", "during", "--baseline"],
    "chase-cut_end-dropout-adamw": [*DROPOUT, *CHASE, "--cut", "end", "--optimizer", "adamw"],
    "dst": [*VGG, "--method", "dst", "--alpha", "1e-4", "--augment", "--no_flip"],
    "autosparse-bf16": [*VGG, "--method", "autosparse", "--precision", "bf16"],
}


class Forks:
    """Runs of `gossamer train` in forks of one process, see forks.py."""

    def __init__(self, log):
        root = Path(__file__).parent.parent.parent
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        )

    def __call__(self, argv, **when):
        """The exit code of `gossamer train *argv`, -9 where it was killed, and its seconds."""
        job = {"argv": ["train", *map(str, argv)], "log": str(self.log), **when}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        done = json.loads(self.server.stdout.readline())
        assert done["code"] in (0, -9), self.log.read_text()[-3000:]
        return done["code"], done["seconds"]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("log") / "log")
    yield forks
    forks.server.communicate()
    assert forks.server.returncode == 0


def settings(case, folder, minutes):
    return [
        *CASES[case],
        *("--epochs", 3, "--batch_size", 64, "--lr", "0.01", "--threads", 1),
        *("--checkpoint_minutes", minutes, "--auto_resume", "--out", folder),
    ]


def check_whole(folder):
    """Every file that has its name is whole, whatever moment it is."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if "config.yaml" in names:
        assert "seed" in yaml.safe_load((folder / "config.yaml").read_text())
    for name in names & {"metrics.csv", "metrics-dense.csv", "layers.csv"}:
        assert all(None not in row.values() and None not in row for row in rows(folder, name))
    if "model.safetensors" in names:
        with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
            assert [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    if "summary.json" in names:
        json.loads((folder / "summary.json").read_text())
    if "report.html" in names:
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    for network in ("sparse", "dense"):
        damaged = []
        run = RunFolder(folder)
        newest([run.checkpoint(network), run.previous(network)], damaged.append)
        assert not damaged


def check_same(folder, whole):
    """The run that was killed has left what the other one has."""
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == sorted(
        p.relative_to(whole) for p in whole.rglob("*")
    )
    assert same_model(folder, whole)
    same_metrics(folder, whole)
    summaries = [json.loads((f / "summary.json").read_text()) for f in (folder, whole)]
    assert lasting(summaries[0]) == lasting(summaries[1])
    for network in ("sparse", "dense"):
        paths = [f / "checkpoints" / f"{network}.ckpt" for f in (folder, whole)]
        if paths[1].exists():
            same_state(*(torch.load(path, weights_only=True) for path in paths))
            name = "metrics.csv" if network == "sparse" else f"metrics-{network}.csv"
            for mine, theirs in zip(rows(folder, name), rows(whole, name), strict=True):
                clocks = {"seconds": 0, "cpu_seconds": 0}
                assert {**mine, **clocks} == {**theirs, **clocks}
    assert len(page([folder])) > 10_000


def same_state(one, other):
    """Weights, masks, thresholds, and what the optimizer remembers."""
    assert one["global_step"] == other["global_step"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (one, other)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][key]))


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments(case, forks, tmp_path, capsys):
    code, seconds = forks(settings(case, tmp_path / "whole", 10))
    assert code == 0
    training = sum(float(row["seconds"]) for row in rows(tmp_path / "whole"))
    moment = random.Random(case)
    kills = within = runs = 0
    while kills < KILLS:
        runs += 1
        folder = tmp_path / f"killed{runs}"
        ended = False
        while not ended:
            when = {"after": moment.uniform(0, 1.1 * seconds)}
            if moment.random() < 0.7:  # of the run as a whole little time is training
                when = {"after": moment.uniform(0, training)}
                when["written"] = str(RunFolder(folder).checkpoint("sparse"))
            ended = forks(settings(case, folder, 0.0005), **when)[0] == 0
            kills += not ended
            if folder.exists():
                check_whole(folder)
        check_same(folder, tmp_path / "whole")
    log = forks.log.read_text()
    within = log.count(": goes on in epoch")
    forks.log.write_text("")
    assert within >= 3  # within an epoch
    with capsys.disabled():
        sys.stdout.write(f"\n{case}: {kills} kills of {runs} runs, {within} went on in an epoch\n")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_every_rename(before, forks, tmp_path):
    case = "chase-cut_during-baseline"
    argv = [*settings(case, tmp_path / "whole", 10), "--epochs", 2, "--baseline", "no"]
    assert forks(argv)[0] == 0
    count, code = 0, -9
    while code == -9:
        count += 1
        folder = tmp_path / f"rename{count}"
        argv[argv.index("--out") + 1] = folder
        code, _ = forks(argv, rename=count, before=before)
        if folder.exists():
            check_whole(folder)
        if code == -9:
            assert forks(argv)[0] == 0
        check_same(folder, tmp_path / "whole")
    assert count > 10
