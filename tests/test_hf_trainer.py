"""SparsifyCallback in Hugging Face's Trainer, and files of slim models, with a BERT from config."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gossamer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate.utils import DistributedType  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gossamer.integrations.checkpoint import carry  # noqa: E402
from gossamer.integrations.transformers import (  # noqa: E402
    SparseTrainer,
    SparsifyCallback,
    load_pretrained,
    planned_steps,
    save_pretrained,
)

STEPS = 12
BATCH = 8
WORDS = 32
MLPS = {"exclude": ["*attention*", "*pooler*", "classifier"]}
ATTENTION = {"include": ["*attention*"]}


def examples(count=48):
    """Sequences of eight tokens; the label says whether the first comes back."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(2, WORDS, (count, 8), generator=generator)
    labels = (tokens[:, 1:] == tokens[:, :1]).any(1).long()
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


EXAMPLE = {"input_ids": torch.stack([row["input_ids"] for row in examples()[:4]])}


def bert(dropout=0.1):
    torch.manual_seed(2)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=8,
            num_labels=2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def chase(**settings):
    defaults = {"density": 0.5, "channel_sparsity": 0.5, "min_channels": 4, "channel_multiple": 1}
    intervals = {"update_interval": 2, "channel_interval": 2}
    return gossamer.Chase(**{**defaults, **intervals, **settings})


def sparse(model, method=None, **settings):
    settings = {"total_steps": STEPS, "example": EXAMPLE, **settings}
    return gossamer.Sparsifier(model, method or chase(), **settings)


STATIC = gossamer.Static(density=0.5)


def two(model):
    """2:4 in the attention, Chase on the MLPs: two methods on one model."""
    attention = sparse(model, gossamer.SRSTE(lam=0.01), **ATTENTION)
    return attention, sparse(model, **MLPS)


def arguments(folder, **settings):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 11,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer(folder, model, *callbacks, kind=Trainer, **settings):
    return kind(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=examples(),
        callbacks=list(callbacks),
    )


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if not name.endswith("gossamer_state"):
            assert torch.equal(other[name], tensor), name


class Stop(TrainerCallback):
    """Ends training after so many steps, as a killed process would."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.after


class Recording(Trainer):
    """Remembers its batches."""

    seen: list

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append(dict(inputs))
        return super().training_step(model, inputs, *args, **kwargs)


# It trains as a plain loop does


def by_items(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("accumulate", "loss"),
    [(1, None), (3, None), (3, by_items)],
    ids=["one batch", "by batches", "by items"],
)
def test_the_penalty_counts_once_per_step(tmp_path, accumulate, loss):
    """However the Trainer normalizes its loss: batch by batch, or by items over all batches."""
    model = bert(dropout=0.0)
    runner = trainer(
        tmp_path,
        model,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
        optim="sgd",
        kind=Recording,
    )
    runner.seen = []
    runner.compute_loss_func, runner.model_accepts_loss_kwargs = loss, False
    steps = planned_steps(runner)
    assert steps == STEPS // accumulate
    method = gossamer.SRSTE(lam=10.0)
    sparsifier = sparse(model, method, total_steps=steps)
    runner.add_callback(SparsifyCallback(sparsifier))
    runner.train()
    assert sparsifier.step_count == steps

    plain = bert(dropout=0.0)
    other = sparse(plain, method, total_steps=steps)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        for batch in runner.seen[step * accumulate : (step + 1) * accumulate]:
            (plain(**batch).loss / accumulate).backward()
        other.penalty().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        other.step(optimizer)
        schedule.step()
        optimizer.zero_grad()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_it_resumes_bit_for_bit_across_cuts(tmp_path):
    """Dropout, two methods on one model, channels cut before and after the checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole = bert()
    _, kept = two(whole)
    uninterrupted = SparsifyCallback(_, kept)
    trainer(tmp_path / "whole", whole, uninterrupted).train()

    first = bert()
    pair = two(first)
    trainer(tmp_path / "run", first, SparsifyCallback(*pair), Stop(5), **settings).train()
    assert kept.live_channels < pair[1].live_channels < 48

    second = bert()
    resumed = two(second)
    callback = SparsifyCallback(*resumed)
    trainer(tmp_path / "run", second, callback, **settings).train(resume_from_checkpoint=True)
    assert [one.step_count for one in resumed] == [STEPS, STEPS]
    assert resumed[1].plan == kept.plan
    assert_same(second.state_dict(), whole.state_dict())
    checks = [one.topology.check(STEPS, one._supports()) for one in (callback, uninterrupted)]
    assert checks[0] == checks[1]


def test_bf16_and_clipping(tmp_path):
    model = bert()
    sparsifier = sparse(model, chase(channel_sparsity=0.0))
    losses = trainer(tmp_path, model, SparsifyCallback(sparsifier), bf16=True, max_grad_norm=0.1)
    losses = losses.train()
    assert math.isfinite(losses.training_loss)
    assert sparsifier.density == pytest.approx(0.5, abs=1e-3)
    for site in sparsifier.sites:
        assert not site.weight[~site.support].any()
        assert site.weight.dtype == torch.float32


def test_thresholds_in_a_group_of_their_own(tmp_path):
    model = bert()
    sparsifier = sparse(model, gossamer.DST(target_density=0.4))
    runner = trainer(tmp_path, model, SparsifyCallback(sparsifier))
    groups = sparsifier.parameter_groups(weight_decay=0.0)
    runner.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    runner.train()
    assert [group["weight_decay"] for group in runner.optimizer.param_groups] == [0.1, 0.0]
    assert sparsifier.density == pytest.approx(0.4, abs=0.01)


def test_the_penalty_is_scaled_as_fp16_losses_are():
    model = bert()
    sparsifier = sparse(model, gossamer.SRSTE(lam=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = SimpleNamespace(scaler=scaler)  # as Accelerate's
    SparsifyCallback(sparsifier).on_step_begin(None, None, None, optimizer=optimizer)
    found = [site.weight.grad.clone() for site in sparsifier.sites]
    model.zero_grad()
    sparsifier.penalty().backward()
    for site, gradient in zip(sparsifier.sites, found, strict=True):
        assert gradient.any()
        torch.testing.assert_close(gradient, 1024 * site.weight.grad)


# Figures and losses


class Listener(TrainerCallback):
    """A logger of somebody else's."""

    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(dict(logs))


def test_it_logs_how_sparse_the_network_is(tmp_path):
    logging = {"logging_strategy": "steps", "logging_steps": 4}
    model = bert()
    callback = SparsifyCallback(*two(model))
    runner = trainer(tmp_path, model, callback, **logging)
    runner.train()
    last = [row for row in runner.state.log_history if "loss" in row][-1]
    sites = [site for one in callback.sparsifiers for site in one.sites]
    weights = sum(site.original_numel for site in sites)
    assert last["density"] == sum(int(site.support.sum()) for site in sites) / weights
    assert last["live_channels"] == 24
    assert 0 < last["exploration"] <= 1
    assert last["sad_from_start"] > 0

    for kind, log, hears in ((SparseTrainer, True, 3), (SparseTrainer, False, 0)):
        model, listener = bert(), Listener()  # comes first, as the loggers of report_to do
        callback = SparsifyCallback(sparse(model, STATIC), log=log)
        runner = trainer(tmp_path, model, listener, callback, kind=kind, **logging)
        runner.train()
        assert sum("density" in row for row in listener.heard) == hears
        assert any("density" in row for row in runner.state.log_history) == log


def test_a_method_that_follows_the_loss(tmp_path):
    """What AutoSparse sums up over its tuning period is what the Trainer logs."""
    steps = STEPS // 2
    method = gossamer.AutoSparse(dense_losses=(0.7, 0.7), tune_end=0.5, alpha_reset=0.9)
    model = bert()
    logging = {"logging_strategy": "steps", "logging_steps": 1}
    settings = {"gradient_accumulation_steps": 2, **logging}
    with pytest.raises(ValueError, match=r"AutoSparse follows the training loss.*SparseTrainer"):
        trainer(
            tmp_path, model, SparsifyCallback(sparse(model, method, total_steps=steps)), **settings
        ).train()

    model = bert()
    sparsifier = sparse(model, method, total_steps=steps)
    told = []
    observe = sparsifier.observe
    sparsifier.observe = lambda loss: (told.append(float(loss)), observe(loss))
    runner = trainer(tmp_path, model, SparsifyCallback(sparsifier), kind=SparseTrainer, **settings)
    runner.train()
    logged = [row["loss"] for row in runner.state.log_history if "loss" in row]
    assert told == pytest.approx(logged[: steps // 2], abs=1e-4)


# What does not fit is refused


def test_planned_steps(tmp_path):
    for settings in (
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 7, "dataloader_drop_last": True},
    ):
        model = bert()
        runner = trainer(tmp_path, model, Stop(1), **settings)
        state = torch.get_rng_state()
        steps = planned_steps(runner)
        assert torch.equal(torch.get_rng_state(), state)
        runner.train()
        assert runner.state.max_steps == steps, settings

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples())

    runner = Trainer(model=bert(), args=arguments(tmp_path, max_steps=3), train_dataset=Stream())
    assert planned_steps(runner) == 3
    runner.args.max_steps = -1
    with pytest.raises(ValueError, match=r"no length.*max_steps="):
        planned_steps(runner)


def test_other_steps_than_planned_are_said(tmp_path):
    model = bert()
    callback = SparsifyCallback(sparse(model, STATIC, total_steps=50))
    with pytest.warns(UserWarning, match=r"for 50 steps, the Trainer will make 6: pass total_"):
        trainer(tmp_path, model, callback, num_train_epochs=1).train()


def test_another_model_and_another_start_are_refused(tmp_path):
    callback = SparsifyCallback(sparse(bert(), STATIC))
    with pytest.raises(ValueError, match=r"Bert.* does not hold the weight of .*not model_init="):
        trainer(tmp_path, bert(), callback).train()

    model = bert()
    runner = trainer(tmp_path, model, SparsifyCallback(sparse(model, STATIC)))
    runner.train()
    with pytest.raises(ValueError, match="starts at step 0, the Sparsifier stands at 12"):
        runner.train()

    dense = bert()
    trainer(tmp_path, dense, Stop(2), save_strategy="steps", save_steps=2).train()
    model = bert()
    callback = SparsifyCallback(sparse(model, STATIC))
    with pytest.raises(ValueError, match=r"starts at step 2, the Sparsifier stands at 0.*resume"):
        trainer(tmp_path, model, callback).train(resume_from_checkpoint=True)

    with pytest.raises(ValueError, match="no Sparsifier"):
        SparsifyCallback()


def test_engines_that_do_not_work_are_refused(tmp_path, monkeypatch):
    model = bert()
    runner = trainer(tmp_path, model)
    callback = SparsifyCallback(sparse(model))

    class Args:
        n_gpu, world_size = 2, 1

    with pytest.raises(ValueError, match=r"to 2 GPUs in every step.*torchrun"):
        callback.on_train_begin(Args, runner.state, runner.control, model=model)
    Args.n_gpu, Args.world_size = 1, 2
    with pytest.raises(ValueError, match=r'2 processes share gradients.*cut="end"'):
        callback.on_train_begin(Args, runner.state, runner.control, model=model)
    only_masks = bert()
    SparsifyCallback(sparse(only_masks, gossamer.Static())).on_init_end(Args, None, None)

    class State:
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr("gossamer.integrations.transformers.AcceleratorState", State)
    with pytest.raises(ValueError, match=r"runs on FSDP.*DistributedDataParallel"):
        Trainer(model=model, args=arguments(tmp_path), callbacks=[callback])


# The model carries its Sparsifiers


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Dropout(0.1))


def carried(method=None, steps=0, **settings):
    net = small()
    sparsifier = gossamer.Sparsifier(
        net, method or chase(), total_steps=STEPS, example=torch.randn(4, 8), **settings
    )
    carry(sparsifier)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, sparsifier, optimizer, steps)
    return net, sparsifier, optimizer


def train(net, sparsifier, optimizer, steps):
    for _ in range(steps):
        generator = torch.Generator().manual_seed(sparsifier.step_count)
        net(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()


def test_a_models_state_resumes_all(tmp_path):
    """Also inside another module, and through a file."""
    net, sparsifier, optimizer = carried(steps=6)
    outer = nn.ModuleDict({"net": net})
    torch.save((outer.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    assert sparsifier.live_channels < 16

    fresh, resumed, other = carried()
    model_state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    result = nn.ModuleDict({"net": fresh}).load_state_dict(model_state)
    assert not result.unexpected_keys
    other.load_state_dict(optimizer_state)
    for triple in ((net, sparsifier, optimizer), (fresh, resumed, other)):
        torch.manual_seed(9)
        train(*triple, STEPS - 6)
    assert resumed.plan == sparsifier.plan
    assert_same(fresh.state_dict(), net.state_dict())


def test_copies_and_finalized_models_carry_nothing():
    net, sparsifier, _ = carried(steps=2)
    twin = copy.deepcopy(net)
    assert "gossamer_state" in net.state_dict()
    assert "gossamer_state" not in twin.state_dict()
    twin.load_state_dict(net.state_dict())  # an average that takes on the model's weights
    assert sparsifier.step_count == 2
    gossamer.finalize(twin)
    sparsifier.finalize()
    assert list(net.state_dict()) == list(small().state_dict())
    again = gossamer.Sparsifier(net, gossamer.Static(), total_steps=3)
    assert "gossamer_state" not in net.state_dict()
    carry(again)
    assert "gossamer_state" in net.state_dict()


def test_going_back_keeps_the_widths_or_is_refused():
    """As a trainer does that loads its best checkpoint at the end."""
    net, sparsifier, optimizer = carried(cut="end", steps=2)
    best = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    train(net, sparsifier, optimizer, 6)
    net.load_state_dict(best)
    assert sparsifier.step_count == 8
    assert torch.equal(
        net[0].parametrizations.weight.original, best["0.parametrizations.weight.original"]
    )

    net, sparsifier, optimizer = carried(steps=1)
    best = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    train(net, sparsifier, optimizer, 8)
    with pytest.raises(ValueError, match=r'of step 1, .* other widths by step 9: .*cut="end"'):
        net.load_state_dict(best)


def test_states_that_do_not_fit_are_refused():
    net, sparsifier, _ = carried(steps=2)
    state = net.state_dict()
    with pytest.raises(ValueError, match=r"density is 0.5 in it and 0.3 here"):
        carried(chase(density=0.3))[0].load_state_dict(state)
    damaged = {**state, "gossamer_state": state["gossamer_state"][:-100]}
    with pytest.raises(ValueError, match="'gossamer_state' is damaged"):
        carried()[0].load_state_dict(damaged)
    with pytest.raises(ValueError, match="carries a Sparsifier already"):
        carry(sparsifier)
    with pytest.raises(ValueError, match="several models"):
        carry(sparsifier, gossamer.Sparsifier(small(), gossamer.Static(), total_steps=3))

    net = small()
    pair = [
        gossamer.Sparsifier(net, gossamer.Static(), total_steps=STEPS, include=[layer])
        for layer in ("0", "2")
    ]
    carry(*pair)
    with pytest.raises(ValueError, match="of 1 Sparsifiers, and 2 are carried here"):
        net.load_state_dict(state)


# Files


def slim_bert():
    """Trained for a few steps; attention heads and hidden units are gone."""
    model = bert()
    exclude = ["*pooler*", "classifier"]
    method = chase(prune_residual=True, min_channels=1, min_channel_factor=0.0)
    sparsifier = sparse(model, method, exclude=exclude)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for row in range(STEPS):
        batch = torch.utils.data.default_collate(examples()[row : row + 4])
        model(**batch).loss.backward()
        optimizer.step()
        sparsifier.step(optimizer)
        optimizer.zero_grad()
    sparsifier.finalize()
    return gossamer.shrink(model.eval(), EXAMPLE, plan=sparsifier.plan)


def comes_back(slim, folder):
    save_pretrained(folder, slim.model, slim.plan)
    back = load_pretrained(folder)
    assert type(back) is type(slim.model)
    assert not back.training
    assert torch.equal(back(**EXAMPLE).logits, slim.model(**EXAMPLE).logits)
    return back


def test_a_slim_model_comes_back(tmp_path):
    """In this process; tests/test_examples.py has it come back in a clean one."""
    slim = slim_bert()
    layers = comes_back(slim, tmp_path).bert.encoder.layer
    assert min(layer.attention.self.query.out_features for layer in layers) < 16  # heads are gone
    assert max(layer.intermediate.dense.out_features for layer in layers) < 24
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "gossamer_plan.json"}
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_causal_model_with_tied_embeddings_comes_back(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, ::3] = 0
    slim = gossamer.shrink(model, EXAMPLE)
    assert slim.model.model.layers[0].mlp.up_proj.out_features == 16
    back = comes_back(slim, tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight


def test_folders_that_do_not_fit_are_refused(tmp_path):
    model = bert()
    sparsifier = sparse(model, gossamer.SRSTE(lam=0.01))
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.* is still parametrized: call"):
        save_pretrained(tmp_path, model)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"gossamer_plan.json is not there.*from_pretrained"):
        load_pretrained(tmp_path)
    sparsifier.finalize()
    save_pretrained(tmp_path, model.eval())
    plain = BertForSequenceClassification.from_pretrained(tmp_path)  # nothing was cut
    assert torch.equal(plain(**EXAMPLE).logits, model(**EXAMPLE).logits)
    assert_same(load_pretrained(tmp_path).state_dict(), model.state_dict())

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MyBert"]}))
    with pytest.raises(ValueError, match=r"holds a MyBert.*load_pretrained\(folder, MyModel\)"):
        load_pretrained(tmp_path)
    assert type(load_pretrained(tmp_path, type(model))) is type(model)
    (tmp_path / "gossamer_plan.json").write_text("{")
    with pytest.raises(ValueError, match="the plan is not JSON"):
        load_pretrained(tmp_path)


def test_a_loss_that_is_not_finite_names_the_layer(tmp_path):
    model = bert()
    dense = model.bert.encoder.layer[1].intermediate.dense
    seen = []

    def overflow(module, inputs, output):
        seen.append(output)
        return output * float("inf") if len(seen) > 3 else output

    dense.register_forward_hook(overflow)
    runner = trainer(tmp_path, model, SparsifyCallback(sparse(model, STATIC)), kind=SparseTrainer)
    with pytest.raises(
        FloatingPointError,
        match=r"step 3 is nan: bert.encoder.layer.1.intermediate.dense \(Linear\) is the first",
    ):
        runner.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
