"""A loss that is NaN or infinite: the error says where it began, and the weights stay good."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from gossamer.finite import check_loss, check_weights
from gossamer.integrations.lightning import FiniteLoss

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))


def refuse():
    raise AssertionError("a finite loss runs nothing again")


def test_a_finite_loss_passes():
    check_loss(torch.tensor(1e38), net(), refuse)


def test_the_first_layer_is_named():
    model, x = net(), torch.full((2, 4), 1e38)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    loss = model(x).sum() * torch.tensor(float("nan"))
    with pytest.raises(
        FloatingPointError,
        match=r"loss of step 7 is nan: 0 \(Linear\) is the first .* inputs of up to 1e\+38",
    ):
        check_loss(loss, model, lambda: model(x), 7)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bad_input_is_told_from_a_bad_layer():
    model, x = net(), torch.full((2, 4), float("inf"))
    with pytest.raises(FloatingPointError, match=r"the input of 0 \(Linear\), the first layer to"):
        check_loss(model(x).sum() * float("nan"), model, lambda: model(x))


def test_bad_weights_are_named_before_all_else():
    model = net()
    with torch.no_grad():
        model[2][0].bias[3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"2\.0\.bias is not finite, so an earlier"):
        check_loss(torch.tensor(float("inf")), model, refuse)


def test_a_loss_of_its_own():
    model, x = net(), torch.zeros(2, 4)
    with pytest.raises(FloatingPointError, match="the loss is inf: all layers give finite values"):
        check_loss(torch.tensor(float("inf")), model, lambda: model(x))


def test_weights_and_what_the_optimizer_remembers():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    check_weights(model, optimizer)
    optimizer.state[model[0].weight]["momentum_buffer"][0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"momentum_buffer of 0\.weight in the optimizer"):
        check_weights(model, optimizer)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^0\.weight is no longer finite"):
        check_weights(model, optimizer)


class Module(LightningModule):
    """Its logarithm is of something negative from the third batch on."""

    def __init__(self):
        super().__init__()
        self.model = net()
        self.seen = 0

    def training_step(self, batch, index):
        self.seen += 1
        return (self.model(batch) + (1.0 if index < 2 else -9.0)).log().abs().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:.*num_workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.parametrize("scaled", [False, True])
def test_lightning_stops_before_the_weights_change(scaled, tmp_path):
    module = Module()
    plugins = []
    if scaled:
        scaler = torch.amp.GradScaler("cpu")
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[FiniteLoss(module.model)],
        plugins=plugins,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **QUIET,
    )
    loader = torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=2)
    start = copy.deepcopy(module.state_dict())
    if scaled:  # it skips such steps, and goes on
        trainer.fit(module, loader)
        assert module.seen == 4
    else:
        with pytest.raises(FloatingPointError, match="loss of step 3 is nan: all layers give"):
            trainer.fit(module, loader)
        assert module.seen == 4  # three steps, and the last batch again
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert not torch.equal(module.state_dict()["model.0.bias"], start["model.0.bias"])
