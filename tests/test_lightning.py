"""SparsifyCallback in other people's LightningModules: it needs no code of theirs."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.integrations.lightning import SparsifyCallback

pytestmark = [
    # Lightning 2.6 on torch 2.13.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Some tests save with a ModelCheckpoint and restore without one.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

STEPS = 12


def batches(count=STEPS // 2, size=8):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 4)
        for _ in range(count)
    ]


class Net(LightningModule):
    """What a user has: a network inside, and nothing about sparsity."""

    def __init__(self, lr=0.05):
        super().__init__()
        torch.manual_seed(1)
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(3, 12, 3, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 4),
        )

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch, index):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def chase(**settings):
    defaults = {"density": 0.3, "channel_sparsity": 0.5, "min_channels": 2, "update_interval": 2}
    return gossamer.Chase(**{**defaults, "channel_interval": 2, **settings})


def sparse(net, method=None, **settings):
    return gossamer.Sparsifier(
        net.net, method or chase(), **{"total_steps": STEPS, "example": batches()[0][0], **settings}
    )


def trainer(*callbacks, epochs=2, checkpoint=False, **settings):
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=checkpoint,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


class Loader:
    """Batches in memory; Lightning would take a list for several loaders."""

    def __len__(self):
        return len(batches())

    def __iter__(self):
        return iter(batches())


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_it_trains_as_a_plain_loop_does(accumulate):
    steps = 2 * len(batches()) // accumulate
    net = Net()
    sparsifier = sparse(net, total_steps=steps)
    trainer(SparsifyCallback(sparsifier), accumulate_grad_batches=accumulate).fit(net, Loader())
    assert sparsifier.step_count == steps

    plain = Net()
    other = sparse(plain, total_steps=steps)
    optimizer = plain.configure_optimizers()
    for _ in range(2):
        for index, batch in enumerate(batches()):
            (plain.training_step(batch, index) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                other.step(optimizer)
                optimizer.zero_grad()
    assert other.live_channels < 28
    assert len(other.plan)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


def test_it_resumes_bit_for_bit_across_cuts(tmp_path):
    whole = Net()
    kept = sparse(whole)
    uninterrupted = SparsifyCallback(kept)
    trainer(uninterrupted).fit(whole, Loader())

    first = Net()
    half = sparse(first)
    save = ModelCheckpoint(tmp_path, save_last=True)
    with pytest.warns(UserWarning, match="the trainer will make 6"):
        trainer(SparsifyCallback(half), save, epochs=1, checkpoint=True).fit(first, Loader())
    assert kept.live_channels < half.live_channels < 28

    second = Net()
    resumed = sparse(second)
    torch.load(tmp_path / "last.ckpt", weights_only=True)  # nothing in it can run code
    callback = SparsifyCallback(resumed)
    trainer(callback).fit(second, Loader(), ckpt_path=tmp_path / "last.ckpt")
    assert callback.topology.sad_cumulative == uninterrupted.topology.sad_cumulative > 0
    checks = [one.topology.check(STEPS, resumed.supports()) for one in (callback, uninterrupted)]
    assert checks[0] == checks[1]
    assert resumed.step_count == STEPS
    assert resumed.plan == kept.plan
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint at the end of a run, and the module it was made from."""
    net = Net()
    sparsifier = sparse(net)
    save = ModelCheckpoint(tmp_path, save_last=True)
    runner = trainer(SparsifyCallback(sparsifier), save, checkpoint=True)
    runner.fit(net, Loader())
    assert len(sparsifier.plan)
    return tmp_path / "last.ckpt", net, sparsifier, runner


def test_testing_restores_the_widths_too(checkpoint):
    path, net, sparsifier, runner = checkpoint
    trained = runner.test(net, Loader(), ckpt_path=path, verbose=False)  # the network is there
    fresh = Net()
    restored = sparse(fresh)
    runner = trainer(SparsifyCallback(restored))
    assert runner.test(fresh, Loader(), ckpt_path=path, verbose=False) == trained
    assert restored.plan == sparsifier.plan
    assert "on_load_checkpoint" not in vars(fresh)  # the module is as the user wrote it


def test_a_users_own_hook_still_runs(checkpoint):
    class Hooked(Net):
        def on_load_checkpoint(self, checkpoint):
            self.seen = sorted(checkpoint)

    net = Hooked()
    trainer(SparsifyCallback(sparse(net))).test(
        net, Loader(), ckpt_path=checkpoint[0], verbose=False
    )
    assert "state_dict" in net.seen


def test_checkpoints_that_do_not_fit_are_refused(checkpoint, tmp_path):
    path = checkpoint[0]
    net = Net()
    callback = SparsifyCallback(sparse(net, gossamer.Static(density=0.3)))
    with pytest.raises(ValueError, match="method: name is 'Chase' in it and 'Static' here"):
        trainer(callback).fit(net, Loader(), ckpt_path=path)

    net = Net()
    callback = SparsifyCallback(sparse(net, chase(density=0.2)))
    with pytest.raises(ValueError, match=r"density is 0.3 in it and 0.2 here"):
        trainer(callback).fit(net, Loader(), ckpt_path=path)

    dense = Net()
    save = ModelCheckpoint(tmp_path / "dense", save_last=True)
    trainer(save, checkpoint=True).fit(dense, Loader())
    net = Net()
    with pytest.raises(ValueError, match="saved without a SparsifyCallback"):
        trainer(SparsifyCallback(sparse(net))).fit(
            net, Loader(), ckpt_path=tmp_path / "dense" / "last.ckpt"
        )


def test_a_module_without_the_network_is_refused():
    sparsifier = sparse(Net())
    with pytest.raises(ValueError, match=r"Net does not hold the weight of 0: make the Sparsifier"):
        trainer(SparsifyCallback(sparsifier)).fit(Net(), Loader())


def test_other_steps_than_planned_are_said():
    net = Net()
    sparsifier = sparse(net, total_steps=50)
    with pytest.warns(UserWarning, match=r"for 50 steps, the trainer will make 6: pass total_"):
        trainer(SparsifyCallback(sparsifier), epochs=1).fit(net, Loader())


def test_it_logs_how_sparse_the_network_is():
    net = Net()
    sparsifier = sparse(net)
    callback = SparsifyCallback(sparsifier)
    runner = trainer(callback)
    runner.fit(net, Loader())
    logged = runner.callback_metrics
    assert float(logged["density"]) == pytest.approx(sparsifier.density)
    assert float(logged["live_channels"]) == sparsifier.live_channels == 14
    total = callback.topology.check(STEPS, sparsifier.supports()).total
    assert float(logged["exploration"]) == pytest.approx(total.exploration)
    assert float(logged["sad_from_start"]) == pytest.approx(total.from_start.per_weight)
    assert 0 < logged["sad_since_last"] < logged["sad_from_start"]
    assert total.exploration > sparsifier.density

    net = Net()
    runner = trainer(SparsifyCallback(sparse(net), log=False))
    runner.fit(net, Loader())
    assert not runner.callback_metrics


def test_its_tracker_has_seen_every_support():
    class Looking(Callback):
        def on_train_batch_end(self, *_):
            for name, support in sparsifier.supports().items():
                union[name] |= support

    net = Net()
    sparsifier = sparse(net)
    union = sparsifier.supports()
    callback = SparsifyCallback(sparsifier, log=False)
    trainer(callback, Looking()).fit(net, Loader())
    total = callback.topology.check(STEPS, sparsifier.supports()).total
    assert total.ever == sum(int(mask.count_nonzero()) for mask in union.values())
    assert total.since_last == total.from_start  # nobody has checked before


def test_with_manual_optimization_the_module_steps():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.optimizers().step()
            sparsifier.step(optimizer)

    net = Manual()
    sparsifier = sparse(net)
    trainer(SparsifyCallback(sparsifier)).fit(net, Loader())
    assert sparsifier.step_count == STEPS


def test_the_module_is_plain_at_the_end():
    net = Net()
    sparsifier = sparse(net)
    trainer(SparsifyCallback(sparsifier)).fit(net, Loader())
    example = batches()[0][0]
    slim = gossamer.shrink(sparsifier.finalize(), example, plan=sparsifier.plan)
    full = Net().net
    slim.plan.apply(full)
    full.load_state_dict(slim.model.state_dict())
    copied = copy.deepcopy(full).eval()
    assert torch.equal(copied(example), slim.model.eval()(example))
