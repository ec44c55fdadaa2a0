"""What a step computes: accumulation, clipping, labels, heads, precision, layout; hooks and the row of an epoch."""

import math

import pytest
import torch
from small_training import At, MemorySource, assert_same, bits, make_trainer, recipe, small_model
from torch import nn

from repkern.data.batch import Batch
from repkern.models.small_vgg import SmallVGG
from repkern.nn import custom_l2
from repkern.train import Callback, Classification


def plain_model(classes=10, dtype=torch.float64):
    """Without norms and dropout: a mean over a batch is a mean over its pieces."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, classes)).to(dtype)


def test_two_runs_are_the_same_and_another_seed_is_not():
    trainers = []
    for seed in (3, 3, 4):
        trainers.append(make_trainer(model=small_model(seed)))
        trainers[-1].fit()
    first, second, third = trainers
    assert_same(first, second)
    assert bits(third)[1] != bits(first)[1]


def test_it_learns():
    class Bright(MemorySource):
        def __init__(self):
            super().__init__()
            self.images += 2 * self.labels[:, None, None, None]

    rows = make_trainer(model=small_model(dropout=0.0), data=Bright(), train={"epochs": 12}).fit()
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    assert rows[-1]["test_accuracy"] > 0.4


@pytest.mark.parametrize("pieces", [2, 8])
@pytest.mark.parametrize("mixed", [False, True])
def test_accumulation_equals_the_whole_batch(pieces, mixed):
    trainers = []
    for accumulate in (1, pieces):
        data = MemorySource(dtype=torch.float64, mixed=mixed)
        trainers.append(
            make_trainer(model=plain_model(), data=data, train={"accumulate": accumulate, "clip_norm": 0.5})
        )
        trainers[-1].fit()
    whole, parts = trainers
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-11)
        assert one["train_accuracy"] == other["train_accuracy"]


def first_gradient(**options):
    """Gradients of the first step, as the optimizer gets them, and the model before it."""
    found = {}

    class Look(Callback):
        def on_step_end(self, trainer):
            if not found:
                found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})

    data = options.pop("data", None) or MemorySource(dtype=torch.float64)
    train = {"max_steps": 1, **options.pop("train", {})}
    trainer = make_trainer(data=data, callbacks=[Look()], train=train, **options)
    trainer.fit()
    return found, next(data.train_batches(0))


def wanted_gradient(model, loss):
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def assert_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12)


def test_the_norm_of_the_gradient_is_clipped():
    plain, _ = first_gradient(model=plain_model())
    norm = math.sqrt(sum(float(g.square().sum()) for g in plain.values()))
    for most in (norm / 3, norm * 3):
        clipped, _ = first_gradient(model=plain_model(), train={"clip_norm": most})
        factor = min(1.0, most / (norm + 1e-6))
        assert_gradients(clipped, {name: g * factor for name, g in plain.items()})


def test_elements_of_the_gradient_are_clipped():
    plain, _ = first_gradient(model=plain_model())
    clipped, _ = first_gradient(model=plain_model(), train={"clip_value": 0.01})
    assert max(float(g.abs().max()) for g in plain.values()) > 0.01
    assert_gradients(clipped, {name: g.clamp(-0.01, 0.01) for name, g in plain.items()})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_are_shares(smoothing):
    data = MemorySource(dtype=torch.float64, mixed=True)
    found, batch = first_gradient(model=plain_model(), data=data, loss={"label_smoothing": smoothing})
    model = plain_model()
    target = batch.labels * (1 - smoothing) + smoothing / 10
    loss = -(target * torch.log_softmax(model(batch.images), 1)).sum(1).mean()
    assert_gradients(found, wanted_gradient(model, loss))


def test_labels_of_one_class_as_shares_are_labels():
    class Shares(MemorySource):
        def train_batches(self, *arguments):
            for images, labels in super().train_batches(*arguments):
                yield Batch(images, nn.functional.one_hot(labels, 10).float())

    one = make_trainer(model=plain_model())
    other = make_trainer(model=plain_model(), data=Shares())
    one.fit(), other.fit()
    assert [row["train_accuracy"] for row in one.rows] == [row["train_accuracy"] for row in other.rows]
    assert one.rows[-1]["train_loss"] == pytest.approx(other.rows[-1]["train_loss"], rel=1e-9)


class TwoHeads(nn.Module):
    def __init__(self, as_mapping):
        super().__init__()
        self.main, self.other, self.as_mapping = plain_model(), plain_model(), as_mapping

    def forward(self, x):
        if not self.training:
            return self.main(x)
        outputs = {"aux": self.other(x), "out": self.main(x)}
        return outputs if self.as_mapping else (outputs["out"], outputs["aux"])


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_auxiliary_heads_add_their_share_of_the_loss(as_mapping, share):
    model = TwoHeads(as_mapping)
    if share == 0.0:
        model.other.requires_grad_(False)
    found = {}

    class Look(Callback):
        def on_gradients(self, trainer):
            found.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    data = MemorySource(dtype=torch.float64)
    make_trainer(model=model, data=data, callbacks=[Look()], train={"max_steps": 1}, loss={"auxiliary": share}).fit()
    fresh, batch = TwoHeads(as_mapping), next(data.train_batches(0))
    loss = sum(
        part * nn.functional.cross_entropy(head(batch.images), batch.labels)
        for head, part in ((fresh.main, 1.0), (fresh.other, share))
    )
    wanted = wanted_gradient(fresh, loss)
    assert_gradients(found, {n: g for n, g in wanted.items() if share or n.startswith("main")})


def test_a_network_that_gives_something_else_is_an_error():
    class Odd(nn.Linear):
        def forward(self, x):
            return {x.shape}

    with pytest.raises(TypeError, match="must give a tensor of logits, or several, got set"):
        make_trainer(model=Odd(3, 3)).fit()


@pytest.mark.parametrize(("classes", "mixed"), [(3, False), (11, False), (3, True)])
def test_a_network_of_other_classes_is_an_error(classes, mixed):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    with pytest.raises(ValueError, match=rf"must give \[N, 10\].* got \[16, {classes}\]"):
        make_trainer(model=model, data=MemorySource(mixed=mixed)).fit()


def test_custom_l2_is_in_the_gradient():
    def model():
        torch.manual_seed(2)
        return SmallVGG((4,), 2, block="repvgg").double()

    settings = {"loss": {"custom_l2": True}, "optimizer": {"weight_decay": 0.3}}
    found, batch = first_gradient(model=model(), **settings)
    fresh = model().train()
    loss = nn.functional.cross_entropy(fresh(batch.images), batch.labels) + 0.15 * custom_l2(fresh)
    assert_gradients(found, wanted_gradient(fresh, loss))


def test_bf16_is_the_forward_pass_alone():
    dtypes = set()

    class Task(Classification):
        def update(self, metrics, result, batch):
            dtypes.add(result.outputs.dtype)
            super().update(metrics, result, batch)

    settings = {"train": {"precision": "bf16", "epochs": 1}}
    trainer = make_trainer(task=Task(recipe(**settings), 10), **settings)
    rows = trainer.fit()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    plain = make_trainer(train={"epochs": 1}).fit()
    assert 0 < abs(rows[0]["train_loss"] - plain[0]["train_loss"]) < 0.1


def test_channels_last_reaches_weights_and_images_and_a_changed_network():
    layouts = []

    class Network(nn.Sequential):
        def forward(self, x):
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    torch.manual_seed(1)
    model = Network(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))

    class Colored(MemorySource):
        channels = 3

        def train_batches(self, *arguments):
            for images, labels in super().train_batches(*arguments):
                yield Batch(images.expand(-1, 3, -1, -1).contiguous(), labels)

        def test_batches(self, *arguments):
            for images, labels in super().test_batches(*arguments):
                yield Batch(images.expand(-1, 3, -1, -1).contiguous(), labels)

    def grow(trainer):
        from repkern.train import StructureChanged

        trainer.model[1] = nn.Conv2d(4, 4, 3)
        trainer.structure_changed(StructureChanged(("1",)))

    trainer = make_trainer(
        model=model, data=Colored(), callbacks=[At(3, grow)], train={"channels_last": True}, ema={"decay": 0.9}
    )
    trainer.fit()
    assert layouts
    assert all(layouts)
    for network in (trainer.model, trainer.average.module):
        assert all(network[at].weight.is_contiguous(memory_format=torch.channels_last) for at in (0, 1))


@pytest.mark.filterwarnings("ignore")  # of the compiler, about things that are its own
def test_compiled_is_the_same_network():
    def run(**train):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        trainer = make_trainer(model=model, train={"epochs": 1, "max_steps": 2, **train})
        trainer.fit()
        return trainer

    plain, compiled = run(), run(compile=True)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())
    for one, other in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert "OptimizedModule" not in type(compiled.model).__name__
