"""What holds for every augmentation: same bits in every batch and with any threads, shapes, dtypes, bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from repkern.data import augment
from repkern.data.augment._sampling import stream_number
from repkern.data.draws import Draws

STEPS = TypeAdapter(list[augment.Step])
# Each with options that make it do something to most images.
EVERY = {
    "flip": {"vertical": 0.5},
    "crop": {"padding": 3, "mode": "reflect"},
    "affine": {"degrees": 30, "scale": 0.3},
    "erasing": {"probability": 0.9},
    "cutout": {"size": 7},
    "jitter": {"hue": 0.4},
    "lighting": {"deviation": 0.5},
    "grayscale": {"probability": 0.5},
    "randaugment": {"count": 3},
    "autoaugment": {},
    "trivialaugment": {},
}
NEED_KORNIA = {"jitter", "randaugment", "autoaugment", "trivialaugment"}
COLORS_ONLY = {"lighting", "grayscale"}  # nothing happens to images of one channel
NEED_COLORS = NEED_KORNIA | COLORS_ONLY


def step_of(name, **options):
    if name in NEED_KORNIA:
        pytest.importorskip("kornia")
    return STEPS.validate_python([{"name": name, **EVERY[name], **options}])[0]


def images_of(count, channels=3, size=(31, 29), seed=0):
    # Even images and noise, so that averages and histograms have something to do.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, channels, *size, generator=generator)
    ramp = torch.linspace(0, 1, size[1]).expand(count, channels, *size)
    return torch.where(torch.arange(count)[:, None, None, None] % 2 == 0, noise, 0.7 * ramp + 0.3 * noise)


def test_the_list_names_every_step():
    literals = {step.model_fields["name"].default for step in step_classes()}
    assert literals == set(EVERY)


def step_classes():
    union = augment.Step.__origin__
    return union.__args__


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_a_sample_does_not_depend_on_its_batch(name, channels):
    step, images, samples = step_of(name), images_of(16, channels), torch.arange(100, 116)
    whole = step(images, Draws(1, 2, samples))
    assert whole.shape == images.shape
    assert whole.dtype == images.dtype
    assert torch.equal(whole, images) == (channels == 1 and name in COLORS_ONLY)
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    for parts in (range(16), (slice(0, 3), slice(3, 16)), (torch.arange(15, -1, -1),)):
        for part in parts:
            part = slice(part, part + 1) if isinstance(part, int) else part
            assert torch.equal(step(images[part], Draws(1, 2, samples[part])), whole[part]), part


@pytest.mark.parametrize("name", EVERY)
def test_the_number_of_threads_changes_no_bit(name):
    step, images = step_of(name), images_of(8, size=(150, 131))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = step(images, Draws(1, 2, torch.arange(8)))
        torch.set_num_threads(2)
        two = step(images, Draws(1, 2, torch.arange(8)))
        alone = step(images[:1], Draws(1, 2, torch.arange(1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    assert torch.equal(one[:1], alone)


@pytest.mark.parametrize("name", EVERY)
def test_the_input_stays_as_it_is_and_its_layout_does_not_matter(name):
    step, images = step_of(name), images_of(6)
    before = images.clone()
    expected = step(images, Draws(0, 0, torch.arange(6)))
    assert torch.equal(images, before)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(step(last, Draws(0, 0, torch.arange(6))), expected)
    wide = torch.stack([images, images], dim=-1)[..., 0]
    assert torch.equal(step(wide, Draws(0, 0, torch.arange(6))), expected)


@pytest.mark.parametrize("name", EVERY)
def test_double_precision_and_no_images(name):
    step, images = step_of(name), images_of(6)
    exact = step(images.double(), Draws(0, 0, torch.arange(6)))
    assert exact.dtype == torch.float64
    close = (exact - step(images, Draws(0, 0, torch.arange(6)))).abs() < 1e-4
    assert close.double().mean() > 0.999  # levels of 8 bits may fall to the other side
    none = step(images[:0], Draws(0, 0, torch.arange(0)))
    assert none.shape == (0, 3, 31, 29)


@pytest.mark.parametrize("name", EVERY)
def test_other_epochs_and_seeds_give_other_images(name):
    step, images = step_of(name), images_of(8)
    results = [step(images, Draws(*key, torch.arange(8))) for key in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(step(images, Draws(0, 1, torch.arange(8))), results[1])


@pytest.mark.parametrize("name", EVERY)
def test_wrong_images_are_errors(name):
    step, draws = step_of(name), Draws(0, 0, torch.arange(2))
    with pytest.raises(TypeError, match=r"floating-point tensor.*got torch.uint8"):
        step(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), draws)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\], got shape \[3, 8, 8\]"):
        step(torch.zeros(3, 8, 8), draws)
    with pytest.raises(ValueError, match="draws of 2 samples do not fit 3 images"):
        step(torch.zeros(3, 3, 8, 8), draws)


@pytest.mark.parametrize("name", sorted(NEED_COLORS))
@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_values_outside_of_0_to_1_are_errors_where_colors_count(name, value):
    images = images_of(2)
    images[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\] here, before they are normalized, got"):
        step_of(name)(images, Draws(0, 0, torch.arange(2)))


def test_what_is_no_step_is_an_error():
    with pytest.raises(TypeError, match=r"steps must be sections.*'flip'"):
        augment.build([augment.Flip(), {"name": "flip"}])


@pytest.mark.parametrize(
    "options",
    [
        {"name": "flop"},
        {"name": "flip", "horizontal": 1.5},
        {"name": "flip", "padding": 2},
        {"name": "crop", "padding": 0},
        {"name": "crop", "mode": "wrap"},
        {"name": "affine", "scale": 0.5, "strength": 2.0},
        {"name": "affine", "degrees": float("nan")},
        {"name": "erasing", "area": (0.5, 0.1)},
        {"name": "erasing", "ratio": (0.0, 1.0)},
        {"name": "cutout", "size": 0},
        {"name": "jitter", "hue": 0.6},
        {"name": "lighting", "deviation": -1},
        {"name": "randaugment", "magnitude": 31},
        {"name": "randaugment", "space": "torchvision"},
        {"name": "autoaugment", "policy": "svhn"},
        {"name": "trivialaugment", "fill": 128},
        {"horizontal": 0.5},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValidationError):
        STEPS.validate_python([options])


def test_steps_are_written_and_read_back_as_json():
    steps = STEPS.validate_python([{"name": name, **options} for name, options in EVERY.items()])
    assert STEPS.validate_json(STEPS.dump_json(steps)) == steps


def test_a_further_step_changes_no_other_draws():
    images, draws = images_of(8), Draws(0, 0, torch.arange(8))
    flip, crop = augment.Flip(), augment.Crop(padding=4)
    alone = augment.build([crop])(images, draws)
    assert torch.equal(alone, crop(images, draws))
    nothing = augment.Flip(horizontal=0.0)
    assert torch.equal(augment.build([nothing, crop])(images, draws), alone)
    assert torch.equal(augment.build([flip, crop])(images, draws), crop(flip(images, draws), draws))
    assert augment.build([])(images, draws) is images


def test_streams_of_all_purposes_differ():
    source = "".join(path.read_text() for path in sorted(Path(augment.__file__).parent.glob("*.py")))
    purposes = re.findall(r'draw\(images, draws, f?"([^"]+)"', source)
    purposes += ["flip/horizontal", "flip/vertical"]
    purposes.remove("flip/{way}")
    assert len(purposes) == len(set(purposes)) >= 18
    streams = [stream_number(purpose) for purpose in purposes]
    streams += [stream_number(f"{stream}/{turn}") for stream in streams for turn in range(1, 10)]
    assert len(set(streams)) == len(streams)
    assert max(streams) < 2**32 - 16  # those are for reading and ordering images


def test_a_step_that_comes_again_has_draws_of_its_own():
    images, draws = images_of(256, 1, (4, 5)), Draws(0, 0, torch.arange(256))
    mirrored = images.flip(3)
    once = augment.build([augment.Flip()])(images, draws)
    twice = augment.build([augment.Flip(), augment.Flip()])(images, draws)
    first = torch.tensor([torch.equal(a, b) for a, b in zip(once, mirrored, strict=True)])
    both = torch.tensor([torch.equal(a, b) for a, b in zip(twice, mirrored, strict=True)])
    second = first ^ both
    # Four equal parts of 64, each 5 standard deviations (6.9) wide.
    for pair in (first & second, first & ~second, ~first & second, ~first & ~second):
        assert 29 <= int(pair.sum()) <= 99


def test_simple_steps_import_no_kornia():
    simple = [{"name": name, **options} for name, options in EVERY.items() if name not in NEED_KORNIA]
    code = f"""
import json, sys, torch
from pydantic import TypeAdapter
from repkern.data import augment
from repkern.data.augment._sampling import stream_number
from repkern.data.batch import Batch
from repkern.data.draws import Draws
steps = TypeAdapter(list[augment.Step]).validate_json({json.dumps(json.dumps(simple))})
images = augment.build(steps)(torch.rand(4, 3, 16, 16), Draws(0, 0, torch.arange(4)))
augment.Mix(mixup=0.2)(Batch(images, torch.arange(4)), Draws(0, 0, torch.arange(4)), 4)
assert not [name for name in sys.modules if name.split(".")[0] in ("kornia", "scipy")]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
