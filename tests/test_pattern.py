"""check_nm: what is N:M, what is not, where and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.measure import check_nm
from gossamer.ops import n_of_m
from nets import net


def _linear(weight: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def _conv(weight: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:])))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def test_a_pattern_and_one_weight_too_many() -> None:
    weight = torch.randn(6, 8) + 3
    weight = weight * n_of_m(weight, 2, 4)
    report = check_nm(_linear(weight), 2, 4)
    assert report.fits
    assert report["0"].groups == 12
    assert report["0"].why == ""
    weight[3, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    (layer,) = check_nm(_linear(weight), 2, 4).layers
    assert not layer.fits
    assert layer.violations == 1
    assert layer.why == "[3, 4-7] holds 3 non-zeros"


def test_convolutions_group_their_input_channels() -> None:
    weight = torch.randn(4, 8, 3, 3) + 3
    weight = weight * n_of_m(weight, 2, 4)
    assert check_nm(_conv(weight), 2, 4)["0"].groups == 4 * 2 * 9
    assert check_nm(_conv(weight), 2, 4).fits
    weight[1, 4:8, 2, 0] = 1
    report = check_nm(_conv(weight), 2, 4)
    assert report["0"].why == "[1, 4-7, 2, 0] holds 4 non-zeros"
    assert "no: [1, 4-7, 2, 0]" in report.table()
    assert "1 of 72" in report.table()


def test_a_dense_layer() -> None:
    report = check_nm(_linear(torch.ones(4, 8)), 2, 4)
    assert report["0"].why == "dense: it has no zeros"
    assert report["0"].violations == 8


def test_the_wrong_axis_is_named() -> None:
    weight = torch.randn(8, 16, 3, 3) + 3
    outputs = n_of_m(weight.transpose(0, 1), 2, 4).transpose(0, 1)
    why = check_nm(_conv(weight * outputs), 2, 4)["0"].why
    assert why.endswith("it is 2:4 along its outputs, not its inputs")
    # The first release of the authors grouped NCHW memory, across kernel positions.
    flat = n_of_m(weight.reshape(1, -1), 2, 4).reshape(weight.shape)
    why = check_nm(_conv(weight * flat), 2, 4)["0"].why
    assert why.endswith("it is 2:4 in flat memory order, not along its inputs")


def test_a_shorter_last_group() -> None:
    weight = torch.zeros(2, 6)
    weight[:, :2] = 1
    weight[:, 4:] = 1
    assert check_nm(_linear(weight), 2, 4).fits
    (layer,) = check_nm(_linear(weight), 1, 4).layers
    assert layer.groups == 4
    assert layer.violations == 4
    weight[0, :2] = 0
    weight[1] = 0
    assert check_nm(_linear(weight), 1, 4)["0"].why == "[0, 4-5] holds 2 non-zeros"


def test_a_model_in_training_and_a_plain_one() -> None:
    model = net("vgg")
    gossamer.Sparsifier(model, gossamer.SRSTE(), total_steps=5)
    report = check_nm(model, 2, 4)
    assert [layer.name for layer in report.layers if not layer.fits] == ["features.0"]
    assert not report.fits
    gossamer.finalize(model)
    assert check_nm(model, 2, 4) == report
    assert report.to_dict()["layers"][0]["fits"] is False
    pairs = [layer.name for layer in check_nm(model, 1, 2).layers if layer.fits]
    assert pairs == [], "2:4 is seldom 1:2"


def test_refuses() -> None:
    with pytest.raises(ValueError, match="4:4 is no pattern"):
        check_nm(nn.Linear(4, 4), 4, 4)
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        check_nm(nn.ReLU(), 2, 4)
