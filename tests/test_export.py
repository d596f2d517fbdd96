"""Export: what is written is what the model computes, or nothing is written."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer
from gossamer.export import onnx as onnx_export
from gossamer.export import to_onnx, to_program, to_safetensors, zeros_note
from nets import Vgg, evaluate, images

ROOT = Path(__file__).parent.parent


def slim() -> gossamer.Shrunk:
    """A network out of which channels were cut, with norms that have seen data."""
    torch.manual_seed(0)
    model = Vgg()
    model.train()(images(32, dtype=torch.float32))
    with torch.no_grad():
        for layer, gone in ((3, 5), (7, 9), (10, 4)):
            model.features[layer].weight[:, :gone] = 0
    shrunk = gossamer.shrink(model.eval(), images(2, dtype=torch.float32))
    assert shrunk.removed == 18
    return shrunk


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Keywords(nn.Module):
    """Inputs and outputs of every kind: nested, optional, unused, numbers, named like inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, input, scale=None, *, pair=(), unused=None, times=1, table=None):
        hidden = self.layer(input) * times + table
        for one in pair:
            hidden = hidden + one["shift"]
        hidden = hidden if scale is None else hidden * scale
        return {"hidden": hidden, "input": (hidden.argmax(1), None)}


KEYWORDS = {  # not in the order of the signature; a batch of one; a table without a batch
    "times": 3,
    "unused": torch.zeros(1),
    "pair": [{"shift": torch.ones(1, 1)}, {"shift": torch.ones(1, 4)}],
    "table": torch.arange(4.0),
    "input": torch.randn(1, 6, generator=torch.Generator().manual_seed(0)),
}


# ------------------------------------------------------------------ ONNX


def test_onnx_of_a_slim_net(tmp_path):
    import onnxruntime

    made = slim()
    made.model.train()  # written in eval mode all the same, and left as it is
    path = tmp_path / "new" / "slim.onnx"
    found = to_onnx(path, made.model, images(2, dtype=torch.float32))
    assert made.model.training
    assert files(path.parent) == ["slim.onnx"]
    assert found.bytes == path.stat().st_size
    assert (found.format, found.path) == ("onnx", str(path))
    assert found.inputs == {"x": ("batch", 3, 8, 8)}
    assert found.outputs == {"output": ("batch", 4)}
    assert found.versions["onnxruntime"] == onnxruntime.__version__
    assert [(check.inputs, check.batch) for check in found.verified.checks] == [
        ("the example", 2),
        ("random inputs", 2),
        ("random inputs", 1),
        ("random inputs", 3),
    ]
    assert 0 < found.verified.difference <= found.verified.tolerance < 1e-3 * found.verified.scale
    assert found.to_dict()["verified"]["difference"] == found.verified.difference
    text = found.text()
    assert "(batch 2) and random inputs (batch 2, 1, 3): outputs differ by at most" in text
    assert f"opset {found.versions['opset']}" in text

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(7, seed=9, dtype=torch.float32)
    (output,) = session.run(None, {"x": x.numpy()})
    assert np.allclose(output, evaluate(made.model.eval(), x).numpy(), atol=1e-6)
    # Nothing of this machine goes with it.
    assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch.onnx of 2.8 writes no None")
def test_onnx_takes_what_the_forward_takes(tmp_path):
    found = to_onnx(tmp_path / "model.onnx", Keywords(), KEYWORDS)
    assert found.inputs == {
        "input": ("batch", 6),
        "pair_0_shift": ("batch", 1),
        "pair_1_shift": ("batch", 4),
        "unused": ("batch",),
        "table": (4,),
    }
    assert found.outputs == {"hidden": ("batch", 4), "input_0": ("batch",)}
    assert [check.batch for check in found.verified.checks] == [1, 1, 2, 3]


def test_onnx_of_two_gibibytes_is_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_ONE_FILE", 0)
    model = nn.Linear(64, 64)
    found = to_onnx(
        tmp_path / "model.onnx", model, torch.randn(3, 64), dynamic_batch=False, opset=18
    )
    assert files(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert found.bytes > 64 * 64 * 4 > (tmp_path / "model.onnx").stat().st_size
    assert f"The tensors are in {tmp_path / 'model.onnx.data'}" in found.text()
    assert found.inputs == {"input": (3, 64)}
    assert found.versions["opset"] == "18"
    assert [check.batch for check in found.verified.checks] == [3, 3]


def test_onnx_runtime_knows_little_of_float64(tmp_path):
    model = nn.Conv2d(3, 4, 3).double()
    with pytest.raises(ValueError, match=r"cannot run model.onnx on the CPU: .* Conv.*float\(\)"):
        to_onnx(tmp_path / "model.onnx", model, images(2))
    assert files(tmp_path) == []


def test_bfloat16_cannot_be_verified(tmp_path):
    model = nn.Linear(3, 4).bfloat16()
    with pytest.raises(ValueError, match=r"takes no bfloat16 .* export model.float\(\)"):
        to_onnx(tmp_path / "model.onnx", model, torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_onnx_is_an_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}, .*pip install \"gossamer\[onnx\]\""):
        to_onnx(tmp_path / "model.onnx", nn.Linear(3, 4), torch.zeros(2, 3))


# ------------------------------------------------------------------ programs and tensors


def test_a_program_of_a_slim_net(tmp_path):
    made = slim()
    x = images(5, dtype=torch.float32)
    found = to_program(tmp_path / "slim.pt2", made.model, x)
    assert files(tmp_path) == ["slim.pt2"]
    assert found.inputs == {"x": ("batch", 3, 8, 8)}
    assert list(found.outputs.values()) == [("batch", 4)]
    assert [check.batch for check in found.verified.checks] == [5, 5, 1, 6]
    assert found.verified.difference <= 1e-6
    content = (tmp_path / "slim.pt2").read_bytes()
    assert str(ROOT).encode() not in content
    assert x.numpy().tobytes() not in content  # the example is the user's


def test_a_program_takes_what_the_forward_takes(tmp_path):
    found = to_program(tmp_path / "model.pt2", Keywords(), KEYWORDS)
    assert list(found.inputs) == ["input", "pair_0_shift", "pair_1_shift", "unused", "table"]


def test_a_process_with_nothing_but_the_files(tmp_path):
    """The program in PyTorch alone, the tensors in the user's own class; no network at all."""
    made = slim()
    x = images(4, dtype=torch.float32)
    to_program(tmp_path / "slim.pt2", made.model, x)
    to_safetensors(tmp_path / "slim.safetensors", made.model, x, full=Vgg(), plan=made.plan)
    torch.save({"x": x, "expected": evaluate(made.model, x)}, tmp_path / "check.pt")
    source = (ROOT / "tests" / "nets.py").read_text()
    user = source[source.index("def _conv_bn") : source.index("class BasicBlock")]
    (tmp_path / "mine.py").write_text(
        "from collections.abc import Sequence\n"
        "import torch\nfrom torch import Tensor, nn\nCLASSES = 4\n\n\n" + user
    )
    script = """
        import socket, sys
        def no(*_, **__): raise AssertionError("the network, or a Sparsifier, was asked for")
        socket.socket.connect = socket.getaddrinfo = no
        import torch
        check = torch.load("check.pt", weights_only=True)
        def verify(model):
            with torch.no_grad():
                assert torch.allclose(model(check["x"]), check["expected"], atol=1e-6)
        verify(torch.export.load("slim.pt2").module())
        assert "gossamer" not in sys.modules
        import gossamer
        gossamer.Sparsifier.__init__ = no
        from mine import Vgg
        model = gossamer.load("slim.safetensors", Vgg())
        verify(model.eval())
        assert type(model) is Vgg
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tensors_come_back_into_the_class_they_were_cut_from(tmp_path):
    made = slim()
    x = images(2, dtype=torch.float32)
    path = tmp_path / "slim.safetensors"
    full = Vgg()
    found = to_safetensors(
        path, made.model, x, full=full, plan=made.plan, metadata={"note": "mine"}
    )
    assert found.verified.difference == 0
    assert found.bytes == path.stat().st_size
    assert full.features[3].weight.shape == made.model.features[3].weight.shape
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"14 .*, the plan was made for 12"):
        to_safetensors(path, made.model, x, full=Vgg((14, 16, 20, 20)), plan=made.plan)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["slim.safetensors"]


# ------------------------------------------------------------------ what is refused


class Random(nn.Module):
    """Draws anew whenever it runs, so that no file agrees with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, training=True))


@pytest.mark.parametrize("write", [to_program, pytest.param(to_onnx, marks=pytest.mark.slow)])
def test_what_differs_is_not_written(write, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"nothing was written: on .* differs from the model by"):
        write(path, Random(), torch.randn(8, 6))
    assert path.read_bytes() == b"before"
    assert files(tmp_path) == ["model"]


class OneBatch(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


class Decides(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else x + 1


class NoTensors(nn.Module):
    def forward(self, x):
        return Answer()


class Answer:
    pass


class Nothing(nn.Module):
    def forward(self, x):
        return x.log() / 0 * 0


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (OneBatch(), torch.ones(2, 3), r"OneBatch: its forward works with batches of 2 only"),
        (Decides(), torch.ones(2, 3), r"decides by values .*test_export.py line \d+: return x if"),
        (NoTensors(), torch.ones(2, 3), r"NoTensors: it returns a test_export.Answer: return ten"),
        (Nothing(), torch.ones(2, 3), r"the model gives no finite number to compare"),
        (nn.Linear(4, 3), torch.ones(2, 3), r"Linear fails on the example \(RuntimeError: .*mat1"),
        (nn.Linear(4, 3), torch.ones(2, 4).double(), r"fails on the example \(RuntimeError: .*d"),
        (nn.Linear(4, 3), {"y": torch.ones(2, 4)}, r"fails on the example \(TypeError: "),
        (nn.Linear(4, 3), torch.tensor(1.0), r"no batch in dim 0"),
    ],
)
def test_models_that_cannot_be_written(model, example, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        to_program(tmp_path / "model.pt2", model, example)
    assert "\n" not in str(raised.value)
    assert files(tmp_path) == []


class Spoils(nn.Module):
    def forward(self, x):
        return x.add_(1).sum(1)


def test_inputs_that_a_model_changes_are_copies(tmp_path):
    x = torch.zeros(2, 3)
    found = to_program(tmp_path / "model.pt2", Spoils(), x)
    assert found.verified.difference <= 1e-6
    assert not x.any()


def test_one_batch_is_fine_where_it_is_asked_for(tmp_path):
    found = to_program(tmp_path / "model.pt2", OneBatch(), torch.ones(2, 3, 4), dynamic_batch=False)
    assert found.inputs == {"x": (2, 3, 4)}


def test_sparsified_models_are_refused(tmp_path):
    model = Vgg()
    gossamer.Sparsifier(model, gossamer.Static(density=0.5), total_steps=2)
    for write in (to_onnx, to_program):
        with pytest.raises(ValueError, match=r"is still parametrized: call sparsifier.finalize"):
            write(tmp_path / "model", model, images(2, dtype=torch.float32))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match=r"could not write .*model.pt2 \(No space left on device\)"):
        to_program(path, nn.Linear(3, 4), torch.ones(2, 3))
    assert path.read_bytes() == b"before"
    assert files(tmp_path) == ["model.pt2"]


# ------------------------------------------------------------------ what zeros bring


def test_zeros_note():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.zero_()  # a table is looked up, not multiplied by
    assert zeros_note(model) == ""
    with torch.no_grad():
        model[1].weight[:6] = 0
    note = zeros_note(model)
    assert note.startswith("37.5% of the weights are zero, and as values zeros bring nothing")
    assert "2:4" not in note
    with torch.no_grad():
        model[1].weight.fill_(1)
        model[2].weight[:, ::2] = 0
    assert "1 linear layers and 1x1 convolutions are 2:4: on a CUDA GPU" in zeros_note(model)
    assert zeros_note(nn.ReLU()) == ""


# ------------------------------------------------------------------ slow: other architectures


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.recurrent = cls(6, 8, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.recurrent(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Eigenvalues(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


def transformer(name):
    transformers = pytest.importorskip("transformers")
    tokens = {"input_ids": torch.randint(0, 99, (2, 12))}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64, "vocab_size": 99}
    if name == "bert":
        tokens["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        config = transformers.BertConfig(**small)
        return transformers.BertForSequenceClassification(config), tokens
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=99,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
        )
        return transformers.GPT2LMHeadModel(config), tokens
    if name == "llama":
        config = transformers.LlamaConfig(**small, num_key_value_heads=2, use_cache=False)
        return transformers.LlamaForCausalLM(config), tokens
    config = transformers.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2
    )
    return transformers.SwinForImageClassification(config), torch.randn(2, 3, 16, 16)


ARCHITECTURES = {
    "lstm": lambda: (Recurrent(nn.LSTM), torch.randn(2, 5, 6)),
    "gru": lambda: (Recurrent(nn.GRU), torch.randn(2, 5, 6)),
    "attention": lambda: (Attention(), torch.randn(2, 5, 16)),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        torch.randn(2, 5, 16),
    ),
    **{
        name: lambda name=name: transformer(name)  # type: ignore[misc]
        for name in ("bert", "gpt2", "llama", "swin")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("write", [to_onnx, to_program])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, write, tmp_path):
    torch.manual_seed(0)
    model, example = ARCHITECTURES[name]()
    found = write(tmp_path / "model", model, example)
    assert found.verified.difference <= 1e-5
    assert all(shape[0] == "batch" for shape in (*found.inputs.values(), *found.outputs.values()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(dtype, tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    found = to_onnx(tmp_path / "model.onnx", model, torch.randn(2, 6, dtype=dtype))
    assert found.verified.difference <= (1e-14 if dtype == torch.float64 else 5e-3)


@pytest.mark.slow
def test_what_onnx_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"torch.onnx cannot convert Eigenvalues: .*linalg_eig"):
        to_onnx(tmp_path / "model.onnx", Eigenvalues(), torch.randn(2, 4, 4))
    with pytest.raises(ValueError, match=r"in opset 18 and cannot bring it to opset 3"):
        to_onnx(tmp_path / "model.onnx", nn.Linear(3, 4), torch.ones(2, 3), opset=3)
    assert files(tmp_path) == []


@pytest.mark.gpu
def test_a_program_stays_on_the_device_of_its_model(tmp_path):
    model = slim().model.cuda()
    x = images(2, dtype=torch.float32).cuda()
    to_program(tmp_path / "slim.pt2", model, x)
    loaded = torch.export.load(tmp_path / "slim.pt2").module()
    assert torch.allclose(loaded(x), evaluate(model, x), atol=1e-5)
    found = to_onnx(tmp_path / "slim.onnx", model, x)  # on the CPU
    assert found.verified.difference <= 1e-4
