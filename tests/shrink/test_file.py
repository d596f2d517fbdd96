"""Model files: whole or not there at all, readable with the user's own class alone."""

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import gossamer
from gossamer.shrink.file import read_plan, write_whole
from nets import READERS, Vgg, batches, evaluate, images, net, optimizer_for, train

CHASE = gossamer.Chase(density=0.2, channel_sparsity=0.5, update_interval=4, min_channels=2)


def _slim(name: str = "vgg", dtype: torch.dtype = torch.float64) -> gossamer.Shrunk:
    model = net(name, dtype=dtype)
    x = images(2, dtype=dtype)
    sparsifier = gossamer.Sparsifier(model, CHASE, total_steps=24, example=x)
    train(model, sparsifier, optimizer_for("sgd", model), batches(24, dtype=dtype))
    sparsifier.finalize()
    return gossamer.shrink(model, x, sparsifier.plan)


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", READERS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    slim = _slim(name)
    path = tmp_path / "made" / "on the way" / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)
    assert _files(path.parent) == ["model.safetensors"]
    fresh = net(name, seed=5)
    assert gossamer.load(path, fresh) is fresh
    assert read_plan(path).to_dict() == slim.plan.to_dict()
    x = images(4)
    assert torch.equal(evaluate(fresh, x), evaluate(slim.model, x))
    for key, value in slim.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    fresh(x).sum().backward()  # an ordinary model: it can go on training


def test_round_trip_as_text_path_and_without_a_plan(tmp_path: Path) -> None:
    model = net("vgg")
    gossamer.save(str(tmp_path / "full.safetensors"), model)
    fresh = gossamer.load(str(tmp_path / "full.safetensors"), net("vgg", seed=3))
    assert torch.equal(evaluate(fresh, images(2)), evaluate(model, images(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_memory_formats(dtype: torch.dtype, tmp_path: Path) -> None:
    slim = _slim(dtype=dtype).model.to(memory_format=torch.channels_last)
    gossamer.save(tmp_path / "model.safetensors", slim)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for key, value in slim.state_dict().items():
        assert torch.equal(tensors[key], value)
        assert tensors[key].dtype == value.dtype
    assert not slim.features[3].weight.is_contiguous()  # saving changes nothing


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    """safetensors refuses them; a file of ours holds them once each."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.hidden = nn.Linear(5, 5)
            self.out = nn.Linear(5, 7, bias=False)
            self.out.weight = self.embed.weight

    model = Tied()
    gossamer.save(tmp_path / "model.safetensors", model)
    fresh = gossamer.load(tmp_path / "model.safetensors", Tied())
    assert torch.equal(fresh.out.weight, model.embed.weight)
    assert fresh.out.weight is fresh.embed.weight


@pytest.mark.slow
def test_a_fresh_process_needs_only_the_users_class(tmp_path: Path) -> None:
    """No method, no example, no Sparsifier, and nothing pickled."""
    slim = _slim()
    gossamer.save(tmp_path / "model.safetensors", slim.model, slim.plan)
    x = images(4)
    torch.save({"x": x, "expected": evaluate(slim.model, x)}, tmp_path / "check.pt")
    source = Path(__file__).parent.parent / "nets.py"
    code = source.read_text()
    start = code.index("def _conv_bn")
    user = code[start : code.index("class BasicBlock")]
    (tmp_path / "mine.py").write_text(
        "from collections.abc import Sequence\n"
        "import torch\nfrom torch import Tensor, nn\nCLASSES = 4\n\n\n" + user
    )
    script = """
        import torch
        import gossamer
        from mine import Vgg
        check = torch.load("check.pt", weights_only=True)
        model = gossamer.load("model.safetensors", Vgg().double()).eval()
        with torch.no_grad():
            assert torch.equal(model(check["x"]), check["expected"])
        print(sum(p.numel() for p in model.parameters()))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(p.numel() for p in slim.model.parameters())


# Damage


def _expect_damage(path: Path) -> None:
    model = net("vgg")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=str(path.name)):
        gossamer.load(path, model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    slim = _slim()
    path = tmp_path / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    _expect_damage(path)
    path.write_bytes(data[:-1])
    _expect_damage(path)
    path.write_bytes(data + b"\0")
    _expect_damage(path)


@pytest.mark.parametrize("at", [0, 1, 8, 9, 40])
def test_a_damaged_header(at: int, tmp_path: Path) -> None:
    slim = _slim()
    path = tmp_path / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    _expect_damage(path)


def test_something_else_altogether(tmp_path: Path) -> None:
    for content in (b"", b"hello", b"PK\x03\x04" + bytes(1000), os.urandom(5000)):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        _expect_damage(path)


def test_a_safetensors_file_of_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(net("vgg").state_dict(), path)
    _expect_damage(path)
    with pytest.raises(ValueError, match="not written by Gossamer"):
        read_plan(path)
    safetensors.torch.save_file(
        net("vgg").state_dict(), path, metadata={"gossamer_plan": '{"format": '}
    )
    with pytest.raises(ValueError, match="JSON"):
        gossamer.load(path, net("vgg"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        gossamer.load(tmp_path / "nothing.safetensors", net("vgg"))


# Other models


def test_the_plan_of_another_model(tmp_path: Path) -> None:
    slim = _slim()
    path = tmp_path / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)
    with pytest.raises(ValueError, match=r"lacks.*build the model"):
        gossamer.load(path, net("mlp"))
    wider = Vgg((12, 16, 24, 20)).double()
    with pytest.raises(ValueError, match=r"features\.7.*(20|24)"):
        gossamer.load(path, wider)
    already = net("vgg")
    slim.plan.apply(already)
    with pytest.raises(ValueError, match="full-width"):
        gossamer.load(path, already)


def test_tensors_of_another_model(tmp_path: Path) -> None:
    """Same widths along the plan, other tensors: what is missing, unknown or of another shape."""
    slim = _slim()
    path = tmp_path / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)

    more_classes = net("vgg")
    more_classes.classifier = nn.Linear(20, 9).double()
    with pytest.raises(ValueError, match=r"classifier\.(weight|bias) is \(4.*\(9"):
        gossamer.load(path, more_classes)
    without_bias = net("vgg")
    without_bias.classifier = nn.Linear(20, 4, bias=False).double()
    with pytest.raises(ValueError, match=r"unknown \['classifier\.bias'\]"):
        gossamer.load(path, without_bias)
    extra = net("vgg")
    extra.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing \['extra\.bias', 'extra\.weight'\]"):
        gossamer.load(path, extra)


def test_a_failed_load_leaves_the_model_whole(tmp_path: Path) -> None:
    slim = _slim()
    path = tmp_path / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)
    model = net("vgg")
    model.classifier = nn.Linear(20, 9).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="another model"):
        gossamer.load(path, model)
    for key, value in model.state_dict().items():
        assert value.shape == before[key].shape, key
        assert torch.equal(value, before[key])


# Writing


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    gossamer.save(path, net("vgg"))
    old = path.read_bytes()

    def full_disk(*_args, **_kwargs) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((Path, "write_bytes"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full_disk)
            with pytest.raises(OSError, match=r"model\.safetensors.*No space left") as error:
                gossamer.save(path, net("vgg", seed=1))
            assert error.value.errno == 28
        assert path.read_bytes() == old
        assert _files(tmp_path) == ["model.safetensors"]
    gossamer.save(path, net("vgg", seed=1))
    assert path.read_bytes() != old


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text("old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "old"
    assert _files(tmp_path) == ["data"]


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    """A real one: the kernel refuses to write on, in a process of its own."""
    pytest.importorskip("resource")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    script = """
        import resource, signal
        import torch, gossamer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            gossamer.save("model.safetensors", torch.nn.Linear(100, 100))
        except OSError as error:
            print(error)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert path.read_bytes() == b"old"
    assert _files(tmp_path) == ["model.safetensors"]


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        gossamer.save(tmp_path / "model.safetensors", net("mlp"))
    assert _files(tmp_path) == ["model.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        gossamer.save(tmp_path / "file" / "model.safetensors", net("mlp"))


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """A temporary file is its owner's alone; a model is to be read by others, as umask says."""
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    path = tmp_path / "model.safetensors"
    gossamer.save(path, net("mlp"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_the_header_is_what_other_tools_expect(tmp_path: Path) -> None:
    slim = _slim()
    path = tmp_path / "model.safetensors"
    gossamer.save(path, slim.model, slim.plan)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(slim.model.state_dict())
    assert metadata["format"] == "pt"
    assert json.loads(metadata["gossamer_plan"]) == slim.plan.to_dict()
