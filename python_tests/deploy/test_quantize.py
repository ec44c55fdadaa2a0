import importlib.util
import shutil

import pytest
import torch
from torch import nn

from repkern.deploy import quantize as module
from repkern.deploy.quantize import (
    QATModule,
    evaluate,
    finish_qat,
    load_quantized,
    prepare_qat,
    quantize,
)
from repkern.deploy.quantize_report import kernel_spread, sensitivity, sqnr
from repkern.deploy.quantize_torchao import LEAST_SCALE, Scheme, missing_torchao
from repkern.nn import ConvNormAct, QARepVGGBlock, RepVGGBlock

pytestmark = pytest.mark.skipif(missing_torchao() is not None, reason="torchao is not installed")


def network(block, seed=0):
    """Three blocks and a head, with statistics of real-looking batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        block(3, 12, 3, 2, activation=nn.ReLU()),
        block(12, 12, 3, 1, activation=nn.ReLU()),
        block(12, 12, 3, 1, activation=nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    for batch in images(count=6, seed=9):
        model(batch)
    return model.eval()


def images(count=3, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 12, 12, generator=generator) + 0.3 for _ in range(count)]


@pytest.fixture(scope="module")
def repvgg():
    model = network(RepVGGBlock)
    return model, quantize(model, images())


@pytest.mark.parametrize("block", [ConvNormAct, RepVGGBlock, QARepVGGBlock])
def test_int8_stays_near_the_float_network(block):
    model = network(block)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    quantized = quantize(model, images(), progress=seen.append)
    batch = images(1, seed=5)[0]
    with torch.no_grad():
        wanted = model(batch)
    assert 25 < sqnr(wanted, quantized(batch)) < 80  # neither lost nor left in float
    assert seen == [16, 32, 48]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_are_int8_and_no_float_copy_is_left(repvgg):
    _, quantized = repvgg
    tensors = quantized.program.state_dict
    kernels = [tensor for tensor in tensors.values() if tensor.dim() in (2, 4)]
    assert [tuple(kernel.shape) for kernel in kernels] == [(12, 3, 3, 3), (12, 12, 3, 3), (12, 12, 3, 3), (5, 12)]
    assert all(kernel.dtype == torch.int8 for kernel in kernels)
    scales = [tensor for tensor in tensors.values() if tensor.dim() == 1 and len(tensor) == 12]
    assert len(scales) >= 3  # one for every output channel


def test_any_batch_size(repvgg):
    _, quantized = repvgg
    batch = images(1, 7)[0]
    whole = quantized(batch)
    for size in (1, 2, 7):
        torch.testing.assert_close(quantized(batch[:size]), whole[:size])


def test_saved_and_loaded_computes_the_same(repvgg, tmp_path):
    _, quantized = repvgg
    path = tmp_path / "net.pt2"
    quantized.save(path)
    loaded = load_quantized(path)
    batch = images(1)[0]
    assert torch.equal(loaded(batch), quantized(batch))
    assert loaded.info == quantized.info
    assert loaded.info["method"] == "ptq"
    assert loaded.info["calibration_images"] == 48
    text = path.read_bytes()
    assert str(tmp_path).encode() not in text
    assert b"/python_tests/" not in text


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compiled_computes_the_same_on_int8_kernels(repvgg):
    _, quantized = repvgg
    fast = quantized.compiled()
    for seed in (1, 2):
        batch = images(1, 8, seed)[0]
        assert sqnr(quantized(batch), fast(batch)) > 40


def test_fewer_bits_and_one_scale_lose_more():
    model, batches = network(RepVGGBlock), images()
    with torch.no_grad():
        wanted = model(batches[0])

    def loss(**options):
        return sqnr(wanted, quantize(model, batches, **options)(batches[0]))

    default = loss()
    assert loss(weight_bits=4) < default - 10
    assert loss(weights="per_tensor") < default


def test_the_report_agrees_with_the_program():
    model, batches = network(RepVGGBlock), images()
    named = []
    report = sensitivity(model, batches, progress=named.append)
    with torch.no_grad():
        wanted = model(batches[-1])
    real = sqnr(wanted, quantize(model, batches)(batches[-1]))
    assert report.network == pytest.approx(real, abs=0.5)
    assert [layer.name for layer in report.layers] == named == ["0.conv", "1.conv", "2.conv", "5"]
    for layer in report.layers:
        assert layer.accumulated <= layer.own + 3
        assert layer.network >= report.network - 3
    assert [layer.spread.centre is None for layer in report.layers] == [False, False, False, True]
    assert report.worst(1)[0].network == min(layer.network for layer in report.layers)
    assert "2.conv" in str(report)
    assert report.as_json()["layers"][0]["shape"] == [12, 3, 3, 3]


def test_the_report_names_the_layer_that_is_made_bad():
    model = network(ConvNormAct)
    with torch.no_grad():  # one input of the second layer needs a range that leaves one step for the others
        model[0].bn.weight[3] *= 3000
        model[1].conv.weight[:, 3] /= 3000
    report = sensitivity(model, images())
    assert report.worst(1)[0].name == "1.conv"
    assert report.layers[1].own < min(report.layers[at].own for at in (0, 2)) - 10


def test_spread_tells_centre_from_surround():
    weight = torch.zeros(2, 2, 3, 3)
    weight[:, :, 1, 1] = torch.tensor([[3.0, -3.0], [1.0, -1.0]])
    weight[:, :, 0, :] = torch.tensor([1.0, -1.0, 0.0])
    spread = kernel_spread(weight)
    assert spread.centre == pytest.approx(5**0.5)
    assert spread.surround == pytest.approx((4 * 2 / 32) ** 0.5)
    assert spread.largest == 3
    assert spread.channel_ratio == 3
    assert kernel_spread(torch.ones(2, 4)).centre is None


def test_sqnr_in_decibel():
    signal = torch.ones(100)
    assert sqnr(signal, signal * 0.9) == pytest.approx(20, abs=1e-4)
    assert sqnr(signal, signal) == 200
    assert sqnr(torch.zeros(3), torch.ones(3)) == -200


def test_training_on_quantized_weights_helps_and_its_result_is_what_was_rehearsed():
    model = network(RepVGGBlock)
    batches = images(4)
    with torch.no_grad():
        targets = [model(batch) for batch in batches]
    trained = prepare_qat(model, batches[0], weight_bits=3)
    optimizer = torch.optim.Adam(trained.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        for batch, target in zip(batches, targets, strict=True):
            optimizer.zero_grad()
            loss = (trained(batch) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    trained.eval()
    with torch.no_grad():
        rehearsed = trained(batches[0])
        trained(100 * batches[1])  # must not move the ranges
        assert torch.equal(trained(batches[0]), rehearsed)
    done = finish_qat(trained, train_images=64)
    assert done.info["method"] == "qat"
    assert sqnr(rehearsed, done(batches[0])) > 80  # the same rounding; what differs is where a sum is rounded
    before = sqnr(targets[0], quantize(model, batches, weight_bits=3)(batches[0]))
    assert sqnr(targets[0], done(batches[0])) > before


def test_norms_are_kept_in_qat_and_gone_behind_it():
    """One block: torchao looks for its patterns of convolution and norm for ten seconds, whatever the size."""
    torch.manual_seed(0)
    model = nn.Sequential(ConvNormAct(3, 6, 3, activation=nn.ReLU()), nn.Flatten(), nn.Linear(6 * 36, 3))
    batch = torch.randn(8, 3, 6, 6)
    trained = prepare_qat(model, batch)
    assert isinstance(trained, QATModule)
    calls = [str(node.target) for node in trained.graph.graph.nodes]
    assert sum("batch_norm" in call for call in calls) == 1
    names = [name for name, _ in trained.graph.named_buffers() if name.endswith("running_mean")]
    (name,) = names
    before = trained.graph.get_buffer(name).clone()
    for _ in range(3):
        trained(batch)
    assert not torch.equal(trained.graph.get_buffer(name), before)
    trained.eval()
    still = trained.graph.get_buffer(name).clone()
    with torch.no_grad():
        rehearsed = trained(batch)
    assert torch.equal(trained.graph.get_buffer(name), still)
    done = finish_qat(trained)
    assert not any("batch_norm" in str(node.target) for node in done.program.graph.nodes)
    assert sqnr(rehearsed, done(batch)) > 80


def test_evaluate_counts():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    found = evaluate(Fixed(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(Fixed(), [])


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        ([], ValueError, "at least one batch"),
        ([torch.zeros(2, 3, 12, 12, dtype=torch.float64)], TypeError, "float64"),
        (["images"], TypeError, "batch 0 must be float32 images"),
        ([torch.full((2, 3, 12, 12), torch.nan)], ValueError, "batch 0 has values that are NaN"),
        ([torch.zeros(0, 3, 12, 12)], ValueError, r"\(0, 3, 12, 12\)"),
    ],
)
def test_bad_calibration(batches, error, text):
    with pytest.raises(error, match=text):
        quantize(network(ConvNormAct), batches)


@pytest.mark.parametrize("options", [{"weights": "per_row"}, {"weight_bits": 1}, {"weight_bits": 9}])
def test_bad_scheme(options):
    with pytest.raises(ValueError, match="got"):
        Scheme(**options)


def test_bad_files(repvgg, tmp_path):
    with pytest.raises(ValueError, match=r"\.pt2"):
        repvgg[1].save(tmp_path / "net.onnx")
    with pytest.raises(FileNotFoundError, match="no quantized network"):
        load_quantized(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_quantized(tmp_path / "text.pt2")
    with pytest.raises(TypeError, match="prepare_qat"):
        finish_qat(nn.Linear(2, 2))


def test_batches_with_labels_and_mappings():
    batch = images(1)[0]
    labels = torch.zeros(16, dtype=torch.int64)
    for wrapped in ((batch, labels), [batch, labels], {"images": batch, "labels": labels}):
        (found,) = module.images_of([wrapped])
        assert torch.equal(found, batch)


def test_a_missing_torchao_is_one_clear_line(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else real(name))
    with pytest.raises(ImportError, match=r"pip install 'repkern\[quantize\]'"):
        quantize(network(ConvNormAct), images())


def test_nothing_is_imported_before_it_is_needed(run_python):
    code = "import sys, repkern.deploy, repkern.deploy.quantize; print('torchao' in sys.modules)"
    done = run_python("-c", code)
    assert done.stdout.strip() == "False", done.stderr


def test_training_on_is_resumed_from_a_state_dict(tmp_path):
    from safetensors.torch import load_model, save_model

    batch = images(1)[0]
    trained = prepare_qat(network(RepVGGBlock), batch)
    for _ in range(2):
        trained(batch)
    save_model(trained, str(tmp_path / "qat.safetensors"))
    fresh = prepare_qat(network(RepVGGBlock, seed=4), batch)
    load_model(fresh, str(tmp_path / "qat.safetensors"), strict=True)
    for one, other in ((trained.eval(), fresh.eval()), (trained.train(), fresh.train())):
        assert torch.equal(one(batch), other(batch))
    least = {float(b) for name, b in fresh.named_buffers() if name.endswith(".eps")}
    assert least == {LEAST_SCALE}
    again = prepare_qat(network(RepVGGBlock, seed=5), batch)
    assert again.load_state_dict(trained.state_dict()) == ([], [])
    assert torch.equal(again.eval()(batch), trained.eval()(batch))


def test_one_image_at_a_time_calibrates_too():
    model, batch = network(ConvNormAct), images(1, 6)[0]
    whole, single = quantize(model, [batch]), quantize(model, batch.split(1))
    assert single.info["calibration_images"] == 6
    assert sqnr(whole(batch), single(batch)) > 20
