"""`--tensorboard`: the scalars of metrics.csv as TensorBoard reads them, also after a resume."""

import csv
import importlib.util
import json

import pytest
import torch

import gossamer
from gossamer.train.config import TrainConfig
from gossamer.train.run import train
from gossamer.train.tensorboard import TensorBoard

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Stops:
    """Breaks training off after an epoch of a network."""

    def __init__(self, network, epoch):
        self.told, self.stop = [], (network, epoch)

    def noted(self, text):
        self.told.append(text)

    def started(self, network, epochs, steps, done):
        self.network = network
        self.told.append((network, done))

    def stepped(self, epoch, step, figures):
        if (self.network, epoch) == self.stop:
            raise KeyboardInterrupt

    def epoch_ended(self, row):
        self.told.append(row["epoch"])

    def ended(self):
        self.told.append("ended")


def scalars(path):
    """By name: (step, value) of each event, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_it_has_the_scalars_of_the_csv_file(tmp_path):
    pytest.importorskip("tensorboard")
    config = TrainConfig(
        model="vgg-small",
        width=0.25,
        epochs=2,
        lr=0.05,
        threads=1,
        baseline=True,
        tensorboard=True,
        out=str(tmp_path / "run"),
    )
    method = gossamer.Chase(density=0.2, channel_sparsity=0.4, min_channels=2)
    stops = Stops("sparse", 1)
    with pytest.raises(KeyboardInterrupt):
        train(config, method, watcher=stops)
    assert stops.told == [("sparse", 0), 1, "ended"]
    train(config, method, resume=True)

    for network, file in (("sparse", "metrics.csv"), ("dense", "metrics-dense.csv")):
        found = scalars(tmp_path / "run" / "tensorboard" / network)
        rows = table(tmp_path / "run" / file)
        assert found.keys() == rows[0].keys() - {"epoch"}
        for name, events in found.items():
            assert [step for step, _ in events] == [1, 2]
            values = torch.tensor([float(row[name]) for row in rows])
            torch.testing.assert_close(torch.tensor([value for _, value in events]), values)
    assert "accuracy" in json.loads((tmp_path / "run" / "summary.json").read_text())["dense"]


def test_without_the_package_it_says_so_before_anything_is_written(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    config = TrainConfig(tensorboard=True, out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"pip install 'gossamer\[tensorboard\]', or leave it out"):
        train(config, gossamer.Chase(density=0.2))
    assert not (tmp_path / "run").exists()


def test_it_passes_on_what_it_is_told(tmp_path):
    stops = Stops("", 0)
    TensorBoard(tmp_path, stops).noted("forecast")
    assert stops.told == ["forecast"]
    assert list(tmp_path.iterdir()) == []
