"""A run that is stopped, killed or out of space goes on where it was, and nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from tests.train.test_run import (
    Watching,
    lasting,
    rows,
    same_metrics,
    same_model,
    tiny,
    with_dropout,
)
from torch import nn

import gossamer
from gossamer.collapse import CollapseError, CollapseWarning
from gossamer.registry import METHODS
from gossamer.train import checkpoints, cli
from gossamer.train.checkpoints import newest
from gossamer.train.data import Batches, load_data
from gossamer.train.folder import RunFolder
from gossamer.train.run import train
from gossamer.train.stop import Interrupted, Stop, stoppable

# Lightning 2.6 on torch 2.13.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SETTINGS = {"model": f"{with_dropout.__module__}:{with_dropout.__name__}", "width": 1.0}
SETTINGS |= {"epochs": 2, "method": "static"}
STATIC = gossamer.Static(density=0.2)


class Signalled(Watching):
    """Sends this process a signal after a step, as Ctrl-C or a cluster does."""

    def __init__(self, epoch, step, number=signal.SIGTERM, times=1):
        super().__init__()
        self.at, self.number, self.times = (epoch, step), number, times

    def stepped(self, epoch, step, figures):
        if (epoch, step) == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed, and its summary."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(tiny(folder, **SETTINGS), STATIC)


def check_same(config, summary, whole):
    assert lasting(summary) == lasting(whole[1])
    assert same_model(config.folder, whole[0])
    same_metrics(config.folder, whole[0])
    files = [sorted(p.relative_to(f) for p in f.rglob("*")) for f in (config.folder, whole[0])]
    assert files[0] == files[1]  # nothing is left lying about


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("number", "code", "damaged"),
    [
        (signal.SIGTERM, 143, True),
        pytest.param(signal.SIGINT, 130, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_step_and_a_damaged_checkpoint_is_passed_over(
    number, code, damaged, whole, tmp_path, capsys, monkeypatch
):
    config = tiny(tmp_path / "run", **SETTINGS)
    words = ["--method", "static", "--model", config.model, "--epochs", "2", "--batch_size", "64"]
    words += ["--lr", "0.05", "--density", "0.2", "--out", str(config.folder)]
    before = signal.getsignal(number)
    monkeypatch.setattr(cli, "_watcher", lambda: Signalled(1, 4, number))
    assert cli.main(["train", "--auto_resume", *words]) == code
    assert signal.getsignal(number) is before
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    assert line == (
        "interrupted (sparse network, after step 25); "
        f"to go on: gossamer train --resume --out {config.folder}"
    )
    path = RunFolder(config.folder).checkpoint("sparse")
    both = path, RunFolder(config.folder).previous("sparse")
    steps = [checkpoints.read(one)["global_step"] for one in both]
    assert steps == [25, 20]
    if damaged:
        path.write_bytes(path.read_bytes()[:-200])
        with (path.parent / ".sparse.ckpt.abcdefgh").open("w") as half:
            half.write("half")  # as a kill leaves it

    watcher = Watching()
    monkeypatch.setattr(cli, "_watcher", lambda: watcher)
    assert cli.main(["train", "--auto_resume", *words]) == 0
    if damaged:
        assert f"the checkpoint {path} is damaged (" in watcher.notes[0]
        assert "the one before it is taken" in watcher.notes[0]
        assert watcher.networks == [("sparse", 1)]
    else:
        assert watcher.notes == ["sparse: goes on in epoch 2 of 2, after step 5 of 20"]
    (config.folder / "report.html").unlink()
    check_same(config, train(config, STATIC, resume=True), whole)


def test_a_second_signal_does_not_wait(tmp_path):
    config = tiny(tmp_path / "run", **SETTINGS)
    with pytest.raises(Interrupted, match="SIGTERM") as stopped:
        train(config, STATIC, watcher=Signalled(1, 4, times=2))
    assert stopped.value.number == signal.SIGTERM
    path = RunFolder(config.folder).checkpoint("sparse")
    assert checkpoints.read(path)["global_step"] == 20


def test_signals_wait_only_where_they_are_looked_at():
    with stoppable() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(Interrupted, match="SIGINT"):
            stop.check()
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)  # the second
    with pytest.raises(Interrupted), stoppable():
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    Stop().check()


# ------------------------------------------------------------------ going on within an epoch


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_within_an_epoch(name, tmp_path):
    settings = {"str": {"s_init": -5.0}}  # by default it wants a longer run
    method = METHODS[name].cls(**settings.get(name, {}))
    same = {**SETTINGS, "method": name}
    whole = train(tiny(tmp_path / "whole", **same), method)
    config = tiny(tmp_path / "broken", checkpoint_minutes=0.0, **same)
    for index, at in enumerate(((0, 1), (0, 7), (1, 4), (1, 19))):
        with pytest.raises(KeyboardInterrupt):
            train(config, method, resume=index > 0, watcher=Watching("sparse", *at))
    watcher = Watching()
    resumed = train(config, method, resume=True, watcher=watcher)
    assert watcher.notes[-1] == "sparse: goes on in epoch 2 of 2, after step 19 of 20"
    check_same(config, resumed, (tmp_path / "whole", whole))


def test_batches_go_on_where_others_stood():
    data = load_data("digits", seed=0)
    settings = {"batch_size": 100, "mean": data.mean, "std": data.std, "shuffle": True}
    one, other = (Batches(data.train, **settings, augment=True) for _ in range(2))
    one.set_epoch(3)
    iterator = iter(one)
    for _ in range(5):
        next(iterator)
    other.load_state_dict(one.state_dict())
    rest = list(iterator)
    for mine, theirs in zip(list(other), rest, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    assert len(list(other)) == len(list(one)) == len(one)  # whole epochs again


def test_a_newer_format_is_refused(tmp_path):
    parts = {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "callbacks": {}}
    parts |= {"loops": {}, "epoch": 0, "global_step": 0, "gossamer": {"format": 3}}
    torch.save(parts, tmp_path / "sparse.ckpt")
    with pytest.raises(ValueError, match="has format 3, and this version of Gossamer reads 1 to 2"):
        checkpoints.read(tmp_path / "sparse.ckpt")


@pytest.mark.slow
def test_checkpoints_of_an_older_and_of_a_newer_format(whole, tmp_path):
    config = tiny(tmp_path / "run", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(config, STATIC, watcher=Watching("sparse", 1, 1))
    path = RunFolder(config.folder).checkpoint("sparse")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["gossamer"]["format"] = 3
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"sparse.ckpt has format 3, and this .* reads 1 to 2: go"):
        train(config, STATIC, resume=True)

    del checkpoint["gossamer"]["format"], checkpoint["gossamer"]["within"]  # format 1
    del checkpoint["gossamer"]["work"]["counted"]
    for key in ("locked", "refused", "collapse"):
        del checkpoint["callbacks"]["gossamer.Sparsifier"][key]
    torch.save(checkpoint, path)
    text = RunFolder(config.folder).config.read_text().splitlines()
    known = [line for line in text if line.split(":")[0] not in ("checkpoint_minutes", "augment")]
    RunFolder(config.folder).config.write_text("\n".join(known))
    check_same(config, train(config, STATIC, resume=True), whole)


# ------------------------------------------------------------------ files


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    path, older = both = tmp_path / "sparse.ckpt", tmp_path / "older.ckpt"
    said = []
    assert newest(both, said.append) is None
    files = checkpoints.WholeFiles(older)
    for step in range(3):
        files.save_checkpoint({"gossamer": {}, "step": step, "x": torch.ones(5000)}, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["older.ckpt", "sparse.ckpt"]
    assert newest(both, said.append) == path
    assert [torch.load(p)["step"] for p in (path, older)] == [2, 1]
    data = path.read_bytes()
    damage = [b"", data[:100], data[:-1], data[:9000] + bytes(4000) + data[13000:], b"x" * 20_000]
    for index, wrong in enumerate(damage):
        path.write_bytes(wrong)
        assert newest(both, said.append) == older
        assert len(said) == index + 1
    path.unlink()  # killed between the two renames
    assert newest(both, said.append) == older

    # What is damaged is never kept in the place of what is whole.
    path.write_bytes(data[:100])
    checkpoints.WholeFiles(older, whole=False).save_checkpoint({"gossamer": {}, "step": 3}, path)
    assert [torch.load(p)["step"] for p in (path, older)] == [3, 1]
    for wrong in (path, older):
        wrong.write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"sparse.ckpt is damaged .* remove .*older.ckpt"):
        newest(both, said.append)


def test_a_write_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args, name=name, real=real):
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    RunFolder(tmp_path).write_text(tmp_path / "report.md", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_two_runs_do_not_share_a_folder(whole, tmp_path):
    config = tiny(tmp_path / "run", **SETTINGS)
    with RunFolder(config.folder).held(), pytest.raises(ValueError, match="a run is at work in"):
        train(config, STATIC)
    config.folder.rmdir()  # nothing was written


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    size = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *size], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
def test_a_full_disk_loses_nothing(small_disk, whole):
    config = tiny(small_disk / "run", **SETTINGS, checkpoint_minutes=0.0)
    fill = small_disk / "others"

    class Filling(Watching):
        def stepped(self, epoch, step, figures):
            if (epoch, step) == (1, 3):
                with fill.open("wb", buffering=0) as file:
                    while True:
                        try:
                            file.write(bytes(4096))
                        except OSError:
                            return

    with pytest.raises(OSError, match=r"could not write .*sparse.ckpt \(No space left on device\)"):
        train(config, STATIC, watcher=Filling())
    assert [p.name for p in config.folder.glob("**/.*")] == []
    path = RunFolder(config.folder).checkpoint("sparse")
    assert checkpoints.read(path)["global_step"] == 23
    with pytest.raises(OSError, match="No space left"):
        train(config, STATIC, resume=True)
    fill.unlink()
    check_same(config, train(config, STATIC, resume=True), whole)


# ------------------------------------------------------------------ what is not finite


class Overflowing(nn.Module):
    """Its second layer gives infinities from a certain step on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16))
        self.scale = nn.Softplus()
        self.head = nn.Linear(16, 10)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        x = self.body(x)
        return self.head(self.scale(x * 1e38 * 1e10 if self.calls > 25 else x))


def overflowing(num_classes: int, in_shape: tuple[int, int, int]) -> nn.Module:
    return Overflowing()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_watcher", Watching)
    words = ["--method", "static", "--model", f"{__name__}:overflowing", "--epochs", "2"]
    words += ["--batch_size", "64", "--out", str(tmp_path / "run"), "--checkpoint_minutes", "0"]
    assert cli.main(["train", *words]) == 1
    error, on = capsys.readouterr().err.splitlines()[-2:]
    path = RunFolder(tmp_path / "run").checkpoint("sparse")
    for part in ("the loss of step 26 is nan: ", "(Softplus)", str(path), "after step 25"):
        assert part in error
    assert on == f"gossamer: to go on: gossamer train --resume --out {tmp_path / 'run'}"
    checkpoint = checkpoints.read(path)
    assert all(x.isfinite().all() for x in checkpoint["state_dict"].values())


def test_what_gossamer_warns_of_is_told_without_a_line_of_source(tmp_path):
    watcher = Watching()
    with warnings.catch_warnings():
        warnings.filterwarnings("default", "DST", UserWarning)
        train(tiny(tmp_path / "run", method="dst"), gossamer.DST(alpha=10.0), watcher=watcher)
    (told,) = (note for note in watcher.notes if "reset_below=0.01 again and again" in note)
    assert told.startswith("warning: DST(alpha=10)")


@pytest.mark.slow
def test_a_collapse_stops_a_run_and_can_be_held_instead(tmp_path):
    method = gossamer.STR(s_init=-5.0)
    config = tiny(tmp_path / "run", method="str", epochs=2, threshold_decay=2.0)
    with pytest.raises(CollapseError, match=r"has collapsed .* Weight decay draws"):
        train(replace(config, on_collapse="stop"), method)
    watcher = Watching()
    with warnings.catch_warnings():
        warnings.simplefilter("default", CollapseWarning)
        summary = train(replace(config, on_collapse="hold"), method, resume=True, watcher=watcher)
    told = [note for note in watcher.notes if "It is held at" in note]
    assert told == [f"warning: {text}" for text in summary["collapsed"]] != []
    assert f"Collapse: {summary['collapsed'][0]}" in (config.folder / "report.md").read_text()
    lowest = min(float(row["density"]) for row in rows(config.folder, "layers.csv"))
    assert lowest > 0
