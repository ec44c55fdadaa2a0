"""Batches by counter: the same bits from any position, with any number of processes and workers."""

import itertools

import pytest
import torch

from repkern.data import Batch, ImageSource, MemoryData, Shard
from repkern.data.draws import epoch_order


def add_noise(images, draws):
    """An augmentation that shows which draws it got, and one that depends on the whole image."""
    return images + draws.uniform(5)[:, :, None, None] + images.mean(dim=(1, 2, 3), keepdim=True)


def soften(batch, draws):
    labels = torch.nn.functional.one_hot(batch.labels, 10).float()
    share = draws.uniform(6)
    return Batch(batch.images, labels * share + labels.flip(0) * (1 - share))


def make_source(make_set, **options):
    settings = {"batch_size": 8, "seed": 3, "augment": add_noise, "mean": (0.5,), "std": (0.25,)}
    return ImageSource(make_set(50), make_set(13), **(settings | options))


def assert_same(one, other):
    one, other = list(one), list(other)
    assert len(one) == len(other)
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def joined(batches):
    batches = list(batches)
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_an_epoch_is_the_order_of_its_counter(make_set):
    source = make_source(make_set, augment=None, mean=(), std=())
    assert source.steps_per_epoch == 6
    for epoch in (0, 4):
        numbers = torch.cat([batch.images[:, 0, 0, 0] for batch in source.train_batches(epoch)]) * 255
        assert numbers.round().long().tolist() == epoch_order(3, epoch, 50)[:48].tolist()
    images, labels = next(source.train_batches(0))
    assert images.shape == (8, 1, 4, 4)
    assert images.dtype == torch.float32
    assert torch.equal(labels, (images[:, 0, 0, 0] * 255).round().long() % 10)


def test_pixels_are_augmented_in_0_to_1_then_normalized_then_mixed(make_set):
    seen = []

    def look(images, draws):
        seen.append(images.clone())
        return images

    source = make_source(make_set, augment=look, mix=soften)
    images, labels = next(source.train_batches(0))
    assert torch.equal(seen[0], epoch_order(3, 0, 50)[:8].float().div(255).reshape(8, 1, 1, 1).expand(8, 1, 4, 4))
    torch.testing.assert_close(images, (seen[0] - 0.5) / 0.25)
    assert labels.shape == (8, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_test_images_are_neither_augmented_nor_mixed(make_set):
    source = make_source(make_set, mix=soften)
    images, labels = joined(source.test_batches())
    torch.testing.assert_close(images[:, 0, 0, 0], (torch.arange(13) / 255 - 0.5) / 0.25)
    assert labels.tolist() == [number % 10 for number in range(13)]


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (0, 1), (1, 3), (2, 5), (1, 6)])
def test_a_run_continues_from_any_position(make_set, epoch, step):
    whole = list(make_source(make_set).train_batches(epoch))
    assert_same(make_source(make_set).train_batches(epoch, step), whole[step:])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on machines of fewer cores
def test_workers_change_no_bit(make_set, workers, no_process_is_left):
    alone, helped = make_source(make_set, mix=soften), make_source(make_set, mix=soften, workers=workers)
    for epoch, step in ((0, 0), (1, 2), (1, 6)):
        assert_same(alone.train_batches(epoch, step), helped.train_batches(epoch, step))
        assert_same(alone.test_batches(), helped.test_batches())
    pieces = Shard(1, 2, 2)
    assert_same(alone.train_batches(2, 3, pieces), helped.train_batches(2, 3, pieces))
    helped.close()


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_the_global_batch_is_the_same_for_any_number_of_processes(make_set, world, accumulate):
    source = make_source(make_set)
    for epoch in (0, 1):
        parts = [list(source.train_batches(epoch, 1, Shard(rank, world, accumulate))) for rank in range(world)]
        assert all(len(part) == 5 * accumulate for part in parts)
        for step, whole in enumerate(source.train_batches(epoch, 1)):
            pieces = [part[step * accumulate : (step + 1) * accumulate] for part in parts]
            images, labels = joined(itertools.chain.from_iterable(pieces))
            assert torch.equal(images, whole.images)
            assert torch.equal(labels, whole.labels)


@pytest.mark.parametrize(("world", "size"), [(1, 0), (1, 5), (2, 4), (3, 2), (4, 100)])
def test_the_test_set_is_seen_once_in_order_by_all_together(make_set, world, size):
    source = make_source(make_set, test_batch_size=size)
    parts = [list(source.test_batches(Shard(rank, world))) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert max(len(batch.images) for part in parts for batch in part) <= (size or 8)
    assert_same([joined(itertools.chain.from_iterable(parts))], [joined(source.test_batches())])


def test_iterators_do_not_disturb_each_other(make_set):
    source = make_source(make_set)
    first, second = source.train_batches(0), source.train_batches(1)
    alternating = list(zip(first, second, strict=True))
    assert_same([a for a, _ in alternating], source.train_batches(0))
    assert_same([b for _, b in alternating], source.train_batches(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator_alone(make_set, workers):
    source = make_source(make_set, workers=workers)
    before = torch.get_rng_state()
    list(source.train_batches(0))
    list(source.test_batches())
    assert torch.equal(before, torch.get_rng_state())
    source.close()


def test_the_number_of_threads_changes_no_bit(make_set):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 1, 300, 300, generator=generator)

    def centred(images, _):
        return images - images.mean()  # one sum, which torch splits among its threads

    source = ImageSource(MemoryData(images, torch.arange(8)), MemoryData(images, torch.arange(8)), batch_size=8, seed=0,
                         augment=centred)  # fmt: skip
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(next(source.train_batches(0)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert_same(found, found[:1] * 3)


def test_colour_and_grey_become_each_other(make_set):
    from repkern.data import Framing

    images = torch.randint(0, 256, (4, 3, 4, 4), dtype=torch.uint8)
    colour = MemoryData(images, torch.arange(4))
    source = ImageSource(colour, colour, batch_size=4, seed=0, framing=Framing(channels=1))
    weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    grey = next(source.test_batches()).images
    torch.testing.assert_close(grey, (images / 255 * weights).sum(1, keepdim=True))
    source = ImageSource(make_set(4), make_set(4), batch_size=4, seed=0, framing=Framing(channels=3))
    assert next(source.test_batches()).images.shape == (4, 3, 4, 4)


def test_descriptions_tell_sources_apart(make_set):
    base = make_source(make_set).describe()
    assert base == make_source(make_set, workers=2, test_batch_size=3).describe()
    differing = [
        make_source(make_set, seed=4),
        make_source(make_set, batch_size=10),
        make_source(make_set, augment=None),
        make_source(make_set, mix=soften),
        make_source(make_set, options={"crop": 0.5}),
        make_source(lambda count: make_set(count + 1)),
    ]
    assert all(other.describe() != base for other in differing)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 51}, "batch_size must be at most the number of training images, 50, got 51"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"mean": (0.5, 0.5)}, "one value for each of 1 channels"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"workers": -1}, "workers must be 0 or more, got -1"),
        ({"on_error": "maybe"}, "on_error must be 'skip' or 'fail', got 'maybe'"),
        ({"damaged_share": 2}, "damaged_share must be in .* got 2"),
    ],
)
def test_bad_settings_are_named(make_set, options, text):
    with pytest.raises(ValueError, match=text):
        make_source(make_set, **options)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((-1,), "epoch must be 0 or more .* got -1 and 0"),
        ((0, 7), r"first_step in \[0, 6\], got 0 and 7"),
        ((0, 0, Shard(0, 3)), "batch_size 8 cannot be divided among 3 processes in 1 pieces"),
        ((0, 0, Shard(0, 2, 3)), "batch_size 8 cannot be divided among 2 processes in 3 pieces"),
        ((0, 0, Shard(2, 2)), "rank must be in"),
    ],
)
def test_bad_positions_are_errors_at_the_call(make_set, arguments, text):
    with pytest.raises(ValueError, match=text):
        make_source(make_set).train_batches(*arguments)


def test_a_test_set_without_names_has_the_classes_of_the_training_set():
    def numbered(count):
        return MemoryData(torch.zeros(count, 1, 4, 4), torch.arange(count))

    source = ImageSource(numbered(8), numbered(3), batch_size=4, seed=0)
    assert source.classes == tuple("01234567")
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), one of the classes, got 0 to 7"):
        ImageSource(numbered(3), numbered(8), batch_size=2, seed=0)


def test_sets_that_do_not_fit_together(make_set):
    other = MemoryData(torch.zeros(4, 1, 4, 4), torch.arange(4), ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="same classes, they differ in a, b, c"):
        ImageSource(make_set(), other, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="training images have 1 channels, test images 3"):
        ImageSource(make_set(), make_set(channels=3), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="no test images"):
        ImageSource(make_set(), make_set(0), batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("images", "labels", "error", "text"),
    [
        (torch.zeros(2, 4, 4), torch.arange(2), ValueError, r"images must be \[N, C, H, W\], got \[2, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4).long(), torch.arange(2), TypeError, "uint8 or floating, got torch.int64"),
        (torch.zeros(2, 1, 4, 4), torch.arange(3), ValueError, r"labels must be \[2\], one an image, got \[3\]"),
        (torch.zeros(2, 1, 4, 4), torch.zeros(2), TypeError, "labels must be integers, got torch.float32"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, -1]), ValueError, "got -1 to 0"),
    ],
)
def test_bad_tensors_are_named(images, labels, error, text):
    with pytest.raises(error, match=text):
        MemoryData(images, labels)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\), one of the classes, got 0 to 1"):
        MemoryData(torch.zeros(2, 1, 4, 4), torch.arange(2), ["only"])
