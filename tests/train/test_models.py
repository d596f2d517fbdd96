"""Models by name: published sizes to the weight, shapes, widths, factories, errors."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.train.models import build_model, model_names

MNIST, CIFAR, IMAGENET = (1, 28, 28), (3, 32, 32), (3, 224, 224)


def weights(model):
    """Conv and linear weights, as the papers count them: no biases, no norms."""
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return sum(layer.weight.numel() for layer in layers)


def macs(model, in_shape):
    """MACs of convolutions and linear layers for one image, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *in_shape, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "num_classes", "in_shape", "num_weights", "num_macs"),
    [
        ("lenet-300-100", 10, MNIST, 266_200, 266_200),
        ("lenet5", 10, MNIST, 430_500, 2_293_000),
        ("vgg-small", 10, CIFAR, 287_840, 38_634_752),
        ("vgg16", 10, CIFAR, 14_715_584, 313_201_664),
        ("vgg19", 100, CIFAR, 20_070_080, 398_182_400),
        # 0.27 M and 40.55 M MACs in the paper, whose shortcuts have no weights.
        ("resnet20", 10, CIFAR, 268_336 + 2_560, 40_551_040 + 262_144),
        ("resnet50", 100, CIFAR, 23_652_032, 1_298_014_208),
        ("wrn-16-8", 10, CIFAR, 10_954_160, 1_548_145_664),
        ("mobilenetv1", 1000, IMAGENET, 4_209_088, 568_740_352),
        ("resnet18-imagenet", 1000, IMAGENET, 11_678_912, 1_814_073_344),
        ("resnet50-imagenet", 1000, IMAGENET, 25_502_912, 4_089_184_256),
    ],
)
def test_dense_networks_have_the_published_size(name, num_classes, in_shape, num_weights, num_macs):
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, in_shape=in_shape)
    assert weights(model) == num_weights
    assert macs(model, in_shape) == num_macs


@pytest.mark.parametrize(("width", "num_weights"), [(1.0, 210_944), (2.0, 815_104)])
def test_the_lstm_has_the_published_size_and_reads_row_by_row(width, num_weights):
    torch.manual_seed(0)
    model = build_model("lstm", num_classes=10, in_shape=MNIST, width=width)
    matrices = [p for name, p in model.lstm.named_parameters() if name.startswith("weight")]
    assert sum(map(torch.numel, matrices)) == num_weights
    images = torch.randn(2, 3, 5, 7)
    model = build_model("lstm", num_classes=4, in_shape=(3, 5, 7), width=0.1)
    rows = torch.stack([torch.cat([*images[:, :, row].unbind(1)], 1) for row in range(5)], 1)
    _, (last, _) = model.lstm(rows)
    torch.testing.assert_close(model(images), model.fc(last[-1]))


@pytest.mark.parametrize("name", model_names())
def test_every_model_trains_on_a_small_input(name):
    in_shape = (1, 16, 16) if name.startswith("lenet") else CIFAR
    torch.manual_seed(0)
    model = build_model(name, num_classes=7, in_shape=in_shape, width=0.125)
    out = model(torch.randn(2, *in_shape))
    assert out.shape == (2, 7)
    out.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["vgg-small", "resnet20", "resnet18", "wrn-10-1", "mobilenetv1"])
def test_digits_are_large_enough(name):
    model = build_model(name, num_classes=10, in_shape=(1, 8, 8), width=0.25)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_inputs_need_not_be_square():
    for name in ("lenet5", "resnet18-imagenet", "vgg16"):
        model = build_model(name, num_classes=3, in_shape=(2, 32, 44), width=0.1).eval()
        assert model(torch.randn(1, 2, 32, 44)).shape == (1, 3)


def test_mobilenet_keeps_small_inputs_large():
    for size, stages in ((32, 4), (64, 2), (224, 7)):
        model = build_model("mobilenetv1", num_classes=2, in_shape=(3, size, size), width=0.05)
        features = model.eval().features(torch.randn(1, 3, size, size))
        assert features.shape[2:] == (stages, stages)


def test_width_multiplies_every_width():
    def widths(name, width):
        model = build_model(name, num_classes=10, in_shape=CIFAR, width=width)
        return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]

    assert sorted(set(widths("resnet18", 0.25))) == [16, 32, 64, 128]
    assert sorted(set(widths("resnet50", 0.5))) == [32, 64, 128, 256, 512, 1024]
    assert sorted(set(widths("vgg-small", 2.0))) == [64, 128, 256]
    assert set(widths("resnet20", 0.001)) == {1}
    assert widths("wrn-10-2", 0.5)[:2] == [8, 16]
    lenet = build_model("lenet-300-100", num_classes=10, in_shape=MNIST, width=0.01)
    assert [lenet.fc1.out_features, lenet.fc2.out_features, lenet.fc3.out_features] == [3, 1, 10]


def test_modules_have_conventional_names():
    keys = build_model("resnet20", num_classes=2, in_shape=CIFAR).state_dict().keys()
    assert {
        "conv1.weight",
        "bn1.weight",
        "layer1.0.conv1.weight",
        "layer2.0.shortcut.0.weight",
        "layer3.2.bn2.running_mean",
        "fc.bias",
    } <= keys
    keys = build_model("vgg16", num_classes=2, in_shape=CIFAR, width=0.1).state_dict().keys()
    assert {"features.0.weight", "features.1.weight", "classifier.weight"} <= keys


def test_bottleneck_strides_on_its_3x3():
    model = build_model("resnet50-imagenet", num_classes=2, in_shape=IMAGENET, width=0.1)
    block = model.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_convolutions_start_from_he_fan_out():
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=10, in_shape=CIFAR)
    weight = model.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_the_generator_decides_the_weights():
    def first_weight(seed):
        torch.manual_seed(seed)
        return next(build_model("vgg-small", num_classes=2, in_shape=CIFAR).parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


@pytest.mark.parametrize("name", ["resnet20", "wrn-10-1", "lenet5"])
def test_forward_has_no_graph_break(name):
    model = build_model(name, num_classes=3, in_shape=CIFAR, width=0.25).eval()
    x = torch.randn(2, *CIFAR)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


def test_unknown_names_suggest_near_ones():
    with pytest.raises(ValueError, match=r"'resnet-18'; did you mean resnet18.*model_names\(\)"):
        build_model("resnet-18", num_classes=2, in_shape=CIFAR)
    with pytest.raises(ValueError, match=r"no model is called 'zzz'\. .*package\.module:factory"):
        build_model("zzz", num_classes=2, in_shape=CIFAR)


@pytest.mark.parametrize("name", ["wrn-15-2", "wrn-4-2", "wrn-16-0"])
def test_impossible_wide_resnets(name):
    with pytest.raises(ValueError, match=rf"{name}: the depth must be 6 n \+ 4"):
        build_model(name, num_classes=2, in_shape=CIFAR)


def test_unusable_sizes():
    for wrong in ({"num_classes": 0}, {"in_shape": (3, 0, 8)}, {"in_shape": (3, 8)}, {"width": 0}):
        with pytest.raises(ValueError, match="wanted at least one class"):
            build_model("resnet20", **{"num_classes": 2, "in_shape": CIFAR} | wrong)
    for name, size in (("lenet5", 16), ("vgg-small", 4), ("vgg16", 32), ("vgg19", 32)):
        build_model(name, num_classes=2, in_shape=(1, size, size), width=0.1)
        with pytest.raises(ValueError, match=f"{name} pools .* at least {size}x{size}"):
            build_model(name, num_classes=2, in_shape=(1, size, size - 1))


FACTORIES = """
from torch import nn

class Net(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(3, num_classes)

def sized(in_shape, num_classes, depth=1):
    return nn.Linear(in_shape[0], num_classes)

def bare():
    return nn.Linear(1, 1)

def forgetful():
    nn.Linear(1, 1)

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory that holds the modules user_nets and broken_nets."""
    (tmp_path / "user_nets.py").write_text(FACTORIES)
    (tmp_path / "broken_nets.py").write_text("import gossamer_no_such_package\n")
    monkeypatch.chdir(tmp_path)
    # A console script's path: without the current directory.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    yield
    sys.modules.pop("user_nets", None)


@pytest.mark.usefixtures("here")
def test_factories_get_what_their_signature_names():
    def build(name):
        return build_model(name, num_classes=5, in_shape=CIFAR)

    assert build("user_nets:Net").out_features == 5
    assert (build("user_nets:sized").in_features, build("user_nets:sized").out_features) == (3, 5)
    assert build("user_nets:bare").out_features == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("user_net:bare", ValueError, "no module 'user_net'"),
        ("user_nets.deeper:bare", ValueError, "no module 'user_nets.deeper'"),
        ("user_nets:bar", ValueError, "has no 'bar'; did you mean bare"),
        ("user_nets:number", TypeError, "is a int; wanted a function or class"),
        ("user_nets:forgetful", TypeError, "returned a NoneType; wanted a torch.nn.Module"),
        ("broken_nets:net", ModuleNotFoundError, "gossamer_no_such_package"),
    ],
)
def test_factory_errors(name, error, message):
    with pytest.raises(error, match=message):
        build_model(name, num_classes=5, in_shape=CIFAR)


@pytest.mark.usefixtures("here")
def test_a_factory_has_no_width():
    with pytest.raises(ValueError, match=r"width=0\.5 scales the built-in models only"):
        build_model("user_nets:bare", num_classes=5, in_shape=CIFAR, width=0.5)
