"""Damaged and hostile data: it loads right, or a ValueError says what it is, and nothing changed.

Plain data gets wrong types, missing and extra keys, huge and negative numbers; files get flipped
bytes, and are cut short. Nothing in any file is ever executed. `make test-all` tries a thousand.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import gossamer
from gossamer.integrations.checkpoint import carry
from gossamer.latency import Readings
from gossamer.measure.topology import TopologyTracker
from nets import Vgg, batches, evaluate, images, train

CHASE = gossamer.Chase(density=0.3, channel_sparsity=0.5, update_interval=3, min_channels=2)
STEPS = 12
# What a value may turn into.
HOSTILE: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.0, 0.5, math.nan, math.inf]
HOSTILE += ["", "0", "__class__", "../../../etc/passwd", "a" * 300, b"\0", [], {}, [[]], [None]]
HOSTILE += [{"format": "gossamer-plan"}, torch.zeros(3), torch.tensor(math.nan), ()]
FEW, MANY = 15, 1000


def counts() -> list[Any]:
    return [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


def _vgg(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Vgg((6, 8, 8, 8)).double()


class Subject:
    """A network, its Sparsifier and its optimizer, fresh or trained and cut."""

    def __init__(self, *, trained: bool = False) -> None:
        self.model = _vgg()
        self.sparsifier = gossamer.Sparsifier(
            self.model, CHASE, total_steps=STEPS, example=images(2)
        )
        self.tracker = TopologyTracker(self.sparsifier.supports())
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        if trained:
            train(self.model, self.sparsifier, self.optimizer, batches(STEPS))
            assert len(self.sparsifier.plan)
            self.tracker.observe(self.sparsifier.supports())

    @property
    def looks(self) -> list[Any]:
        """All that loading may change."""
        sparsifier = self.sparsifier
        return [
            [
                (name, module.__class__, _numbers(module))
                for name, module in self.model.named_modules()
            ],
            {name: value.clone() for name, value in self.model.state_dict().items()},
            copy.deepcopy(self.optimizer.state_dict()),
            copy.deepcopy(sparsifier.state_dict()),
            [(pool.group.channels, pool.live.tolist()) for pool in sparsifier.pools],
            copy.deepcopy(self.tracker.state_dict()),
        ]


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if type(value) in (int, bool)}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def said(error: ValueError, name: str = "") -> None:
    """The message is for people: one line, not too long, with the file in it."""
    text = str(error)
    assert len(text.split()) >= 5, text
    assert "\n" not in text.strip(), text
    assert len(text) < 1000, text
    assert name in text, text


def attempt(
    subject: Subject | Plain, load: Callable[..., object], given: Any, name: str = ""
) -> bool:
    """Whether `load(subject, given)` did; where not, the error is ours, and all is as it was."""
    before = subject.looks
    try:
        load(subject, given)
    except ValueError as error:
        failure = error
    else:
        return True
    said(failure, name)
    assert same(before, subject.looks), f"changed by a failed load: {failure}"
    return False


def resume(subject: Subject, state: Any) -> None:
    subject.sparsifier.load_state_dict(state)


def follow(subject: Subject, state: Any) -> None:
    subject.tracker.load_state_dict(state)


def apply(subject: Subject, plan: Any) -> None:
    """And take it back."""
    gossamer.Plan.from_dict(plan).apply(subject.model, subject.optimizer)()


def read(subject: Plain, path: Any) -> None:
    gossamer.load(path, subject.model)


def read_carried(subject: Subject, state: Any) -> None:
    try:
        subject.model.load_state_dict(state)
    except RuntimeError as error:  # the Sparsifiers fit, and PyTorch says which tensor does not
        if "size mismatch" not in str(error):
            raise


# ------------------------------------------------------------------ ways to damage


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in nested plain data."""
    if path:
        yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _places(value, (*path, key))


def damaged(data: Any, chance: random.Random) -> Any:
    """A copy of nested plain data with one or two things wrong."""
    data = copy.deepcopy(data)
    for _ in range(chance.choice([1, 1, 1, 2])):
        *way, last = chance.choice(list(_places(data)))
        holder = data
        for key in way:
            holder = holder[key]
        kind = chance.choice(
            ["replace", "replace", "replace", "remove", "double", "nudge", "rename"]
        )
        value = holder[last]
        if kind == "remove":
            del holder[last]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(chance.randrange(len(holder) + 1), copy.deepcopy(value))
        elif kind == "nudge" and type(value) is int:
            holder[last] = value + chance.choice([-1, 1])
        elif kind == "rename" and isinstance(holder, dict):
            holder[chance.choice(["", "x", 3, None, f"{last} "])] = holder.pop(last)
        else:
            holder[last] = copy.deepcopy(chance.choice(HOSTILE))
    return data


def flipped(data: bytes, chance: random.Random, upto: int | None = None) -> bytes:
    """Bytes flipped, cut short, or lengthened; `upto`: in the first so many."""
    changed = bytearray(data)
    kind = chance.choice(["flip", "flip", "flip", "cut", "grow", "zero"])
    if kind == "cut":
        return bytes(changed[: chance.randrange(len(changed))])
    if kind == "grow":
        return bytes(changed) + chance.randbytes(chance.choice([1, 100]))
    for _ in range(chance.choice([1, 1, 3])):
        at = chance.randrange(min(upto or len(changed), len(changed)))
        changed[at] = 0 if kind == "zero" else changed[at] ^ (1 << chance.randrange(8))
    return bytes(changed)


@pytest.fixture(scope="module")
def done() -> Subject:
    torch.set_num_threads(1)
    return Subject(trained=True)


# ------------------------------------------------------------------ plain data


@pytest.mark.parametrize("count", counts())
def test_plans(done: Subject, count: int) -> None:
    good = done.sparsifier.plan.to_dict()
    subject, loaded = Subject(), 0
    original = subject.looks
    for seed in range(count):
        loaded += attempt(subject, apply, damaged(good, random.Random(seed)))
    assert same(original, subject.looks)
    assert loaded < count / 2


@pytest.mark.parametrize("count", counts())
def test_sparsifier_states(done: Subject, count: int) -> None:
    good = done.sparsifier.state_dict()
    subject = Subject()
    for seed in range(count):
        if attempt(subject, resume, damaged(good, random.Random(seed))):
            evaluate(subject.model, images(2))  # it runs, at whatever widths
            subject = Subject()


@pytest.mark.parametrize(
    "state", [None, [], "state", 7, torch.zeros(3), {"format": torch.zeros(3)}]
)
def test_what_is_no_state_at_all(state: Any, done: Subject) -> None:
    subject = Subject()
    assert not attempt(subject, resume, state)
    assert not attempt(subject, follow, state)
    whole = done.sparsifier.state_dict()
    for key in whole:
        if attempt(subject, resume, {**whole, key: state}):
            subject = Subject()


@pytest.mark.parametrize("count", counts())
def test_trackers(done: Subject, count: int) -> None:
    good = done.tracker.state_dict()
    subject = Subject()
    for seed in range(count):
        if attempt(subject, follow, damaged(good, random.Random(seed))):
            subject.tracker.check(3, subject.sparsifier.supports())
            subject = Subject()


@pytest.mark.parametrize("count", counts())
def test_readings(count: int) -> None:
    surface = {"c_in": (4, 8), "c_out": (8,), "ms": ((0.5,), (1.0,))}
    good = json.loads(
        json.dumps({"surfaces": [surface], "whole": [4, 3, 2, 1.0], "conditions": {"threads": 1}})
    )
    for seed in range(count):
        try:
            found = Readings.from_dict(damaged(good, random.Random(seed)))
        except ValueError as error:
            said(error)
        else:
            assert all(math.isfinite(one(6, 8)) for one in found.surfaces)


@pytest.mark.parametrize("count", counts())
def test_carried_states(done: Subject, count: int) -> None:
    """In the model's own state dict, as a tensor of bytes."""
    donor = Subject(trained=True)
    carry(donor.sparsifier, topology=donor.tracker)
    good = donor.model.state_dict()
    [key] = [name for name in good if name.endswith("gossamer_state")]
    packed = good[key].numpy().tobytes()
    plain = torch.load(io.BytesIO(packed), weights_only=True)

    def subject() -> Subject:
        made = Subject()
        carry(made.sparsifier, topology=made.tracker)
        return made

    target = subject()
    for seed in range(count):
        chance = random.Random(seed)
        if seed % 2:
            data = flipped(packed, chance)
        else:
            buffer = io.BytesIO()
            torch.save(damaged(plain, chance), buffer)
            data = buffer.getvalue()
        state = {**good, key: torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)}
        if attempt(target, read_carried, state):
            target = subject()


# ------------------------------------------------------------------ model files


@pytest.fixture(scope="module")
def file(done: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    model = gossamer.finalize(copy.deepcopy(done.model))
    gossamer.save(path, model, done.sparsifier.plan)
    return path


class Plain:
    """A model that a file is loaded into."""

    def __init__(self) -> None:
        self.model = _vgg()

    @property
    def looks(self) -> list[Any]:
        return [
            [(name, _numbers(module)) for name, module in self.model.named_modules()],
            {name: value.clone() for name, value in self.model.state_dict().items()},
        ]


@pytest.mark.parametrize("count", counts())
def test_flipped_and_cut_files(file: Path, tmp_path: Path, count: int) -> None:
    good, path = file.read_bytes(), tmp_path / "mine.safetensors"
    header = 8 + struct.unpack("<Q", good[:8])[0]
    subject = Plain()
    for seed in range(count):
        path.write_bytes(flipped(good, random.Random(seed), upto=header if seed % 4 else None))
        if attempt(subject, read, path, path.name):
            evaluate(subject.model, images(2))
            subject = Plain()


@pytest.mark.parametrize("count", counts())
def test_headers_that_lie(file: Path, tmp_path: Path, count: int) -> None:
    """The tensors' table and the plan, each damaged as data, in a file that is whole."""
    good, path = file.read_bytes(), tmp_path / "mine.safetensors"
    size = struct.unpack("<Q", good[:8])[0]
    table = json.loads(good[8 : 8 + size])
    plan = json.loads(table["__metadata__"]["gossamer_plan"])
    subject = Plain()
    for seed in range(count):
        chance, told = random.Random(seed), copy.deepcopy(table)
        if seed % 2:
            told["__metadata__"]["gossamer_plan"] = json.dumps(damaged(plan, chance), default=str)
        else:
            told = damaged(table, chance)
        text = json.dumps(told, default=str, skipkeys=True).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + size :])
        if attempt(subject, read, path, path.name):
            evaluate(subject.model, images(2))
            subject = Plain()


def test_tensors_of_other_kinds(file: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    path = tmp_path / "mine.safetensors"
    name = "features.0.weight"
    for wrong in (tensors[name].long(), tensors[name] > 0, tensors[name][0], torch.zeros(0)):
        safetensors.torch.save_file({**tensors, name: wrong}, path, metadata)
        assert not attempt(Plain(), read, path, path.name)
    safetensors.torch.save_file({**tensors, name: tensors[name].float()}, path, metadata)
    gossamer.load(path, _vgg())  # another precision is fine


@pytest.mark.parametrize("depth", [10, 100_000])
def test_json_without_end(depth: int, done: Subject) -> None:
    with pytest.raises(ValueError, match="plan") as error:
        gossamer.Plan.from_json("[" * depth + "]" * depth)
    said(error.value)


# ------------------------------------------------------------------ checkpoints of a run


@pytest.mark.parametrize("count", counts())
def test_checkpoints_of_a_run(count: int, tmp_path: Path) -> None:
    """Flipped bytes are found by the checksums; whatever else is in it, reading says."""
    from gossamer.train import checkpoints

    path = tmp_path / "sparse.ckpt"
    good: dict[str, Any] = {"state_dict": {"model.a": torch.ones(3)}, "epoch": 1, "global_step": 4}
    good |= {"optimizer_states": [{"state": {}}], "lr_schedulers": [{}], "callbacks": {"x": {}}}
    good |= {"loops": {"fit": 1}, "gossamer": {"format": checkpoints.FORMAT, "history": {}}}
    torch.save(good, path)
    assert same(checkpoints.read(path), good)
    whole = path.read_bytes()
    for seed in range(count):
        chance = random.Random(seed)
        if seed % 2:
            path.write_bytes(flipped(whole, chance))
        else:
            torch.save(damaged(good, chance), path)
        try:
            start = checkpoints.newest([path], print)
            assert start is not None
            checkpoint = checkpoints.read(start)
            checkpoints.check_network(start, checkpoint, nn.Module())
        except ValueError as error:
            failure = error
        else:
            assert isinstance(checkpoint["gossamer"], dict)
            assert not seed % 2 or same(checkpoint, good)
            continue
        said(failure, path.name)


# ------------------------------------------------------------------ nothing is executed


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def payloads(mark: Path) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"format": Payload(mark), "gossamer": Payload(mark)}, buffer)
    legacy = io.BytesIO()
    torch.save([Payload(mark)], legacy, _use_new_zipfile_serialization=False)
    return {
        "torch": buffer.getvalue(),
        "legacy": legacy.getvalue(),
        "pickle": pickle.dumps(Payload(mark)),
        "yaml": f"!!python/object/apply:os.mkdir ['{mark}']".encode(),
    }


def test_the_payload_works(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.load(io.BytesIO(payloads(mark)["torch"]), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("kind", payloads(Path()))
def test_no_file_runs_code(kind: str, done: Subject, tmp_path: Path, capsys: Any) -> None:
    from gossamer.train import checkpoints, cli, config

    mark = tmp_path / "executed"
    data = payloads(mark)[kind]
    for name in ("model.safetensors", "sparse.ckpt", "some.yaml", "compare.yaml", "model.pt"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        gossamer.load(tmp_path / "model.safetensors", _vgg())
    with pytest.raises(ValueError, match="plan"):
        gossamer.Plan.from_json(data.decode("latin1"))
    with pytest.raises(ValueError, match=r"some\.yaml"):
        config.read_yaml(tmp_path / "some.yaml")
    with pytest.raises(ValueError, match=r"sparse\.ckpt"):
        checkpoints.newest([tmp_path / "sparse.ckpt"], print)
    subject = Subject()
    carry(subject.sparsifier)
    state = Subject().model.state_dict()
    state["gossamer_state"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    with pytest.raises(ValueError, match="gossamer_state"):
        subject.model.load_state_dict(state)
    for words in (
        ["check", tmp_path / "model.safetensors"],
        ["check", tmp_path / "model.pt"],
        ["train", "--config", tmp_path / "some.yaml"],
        ["compare", tmp_path / "compare.yaml"],
        ["report", tmp_path],
    ):
        assert cli.main([str(word) for word in words]) in (1, 2)
    assert capsys.readouterr().err.count("gossamer: error: ") == 5
    assert not mark.exists()


# ------------------------------------------------------------------ no size is believed


def peak() -> int:
    """Most memory this process has used so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@pytest.mark.parametrize(
    "about",
    [
        {"num_classes": 10**12},
        {"num_classes": 10**9},
        {"width": 1e9},
        {"width": 4000.0},
        {"width": math.inf},
        {"width": math.nan},
        {"width": -1.0},
        {"num_classes": 0},
        {"num_classes": -5},
        {"in_shape": [3, 10**9, 10**9]},
        {"in_shape": [10**9, 8, 8]},
        {"in_shape": [0, 8, 8]},
        {"in_shape": [3, 8]},
        {"in_shape": "abc"},
        {"name": "../../etc/passwd"},
        {"name": "os:system"},
        {"name": None},
        {"name": {}},
    ],
    ids=str,
)
def test_headers_that_ask_for_the_world(about: dict[str, Any], tmp_path: Path) -> None:
    from gossamer.train.source import Architecture, open_model

    said_there = {"name": "lenet5", "num_classes": 10, "in_shape": [1, 28, 28], "width": 1.0}
    network = Architecture(name="lenet5", num_classes=10, in_shape=(1, 28, 28)).build()
    path = tmp_path / "mine.safetensors"
    header = {"gossamer_model": json.dumps(said_there | about)}
    gossamer.save(path, network, metadata=header)
    before = peak()
    with pytest.raises(ValueError, match=r"mine\.safetensors") as error:
        open_model(str(path))
    said(error.value)
    assert peak() - before < 600


def test_plans_and_states_that_ask_for_the_world(done: Subject) -> None:
    before = peak()
    plan = done.sparsifier.plan.to_dict()
    for row in plan["cuts"]:
        row["of"] = 10**15
    subject = Subject()
    assert not attempt(subject, apply, plan)
    state = done.sparsifier.state_dict()
    state["shapes"] = {name: [10**9, 10**9] for name in state["shapes"]}
    assert not attempt(subject, resume, state)
    assert peak() - before < 200


# ------------------------------------------------------------------ YAML

YAML = """
method: chase
density: 0.1
epochs: 2
lr: 0.05
exclude: [fc, conv1]
milestones: [0.5, 0.75]
baseline: true
"""


@pytest.mark.parametrize("count", counts())
def test_settings_files(count: int, tmp_path: Path) -> None:
    import yaml

    from gossamer.train.flags import parse

    path = tmp_path / "mine.yaml"
    good = yaml.safe_load(YAML)
    for seed in range(count):
        chance = random.Random(seed)
        if seed % 2:
            path.write_bytes(flipped(YAML.encode(), chance))
        else:
            data = damaged(good, chance)
            path.write_text(yaml.dump(json.loads(json.dumps(data, default=str))))
        try:
            request = parse(["--config", str(path)])
        except OSError:
            pass  # a name that no file can have
        except (ValueError, TypeError) as error:
            assert len(str(error).split()) >= 4, error  # noqa: PT017
            assert len(str(error)) < 1000, error  # noqa: PT017
        else:
            assert math.isfinite(request.config.lr)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nexclude: *c\n",
        "exclude: " + "[" * 5000,
        "lr: 2020-99-99\n",
        "epochs: " + "9" * 5000,
        "? [a, b]\n: 1\n",
        "\x00\x01",
        "epochs: !!python/object/apply:os.getcwd []\n",
        "lr: .nan\n",
        "lr: .inf\n",
        "weight_decay: .nan\n",
        "width: .inf\n",
        "width: 0\n",
        "threads: 1000000000\n",
    ],
    ids=lambda text: text[:30].strip(),
)
def test_settings_that_are_traps(text: str, tmp_path: Path, capsys: Any) -> None:
    from gossamer.train import cli

    path = tmp_path / "mine.yaml"
    path.write_text(text)
    before = peak()
    assert cli.main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("gossamer: error: ")
    assert error.count("\n") == 1
    assert len(error) < 1000
    assert peak() - before < 200
    assert not os.path.exists(tmp_path / "run" / "config.yaml")
