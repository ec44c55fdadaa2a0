"""The released implementations' numbers (float64), as the parameter `golden_case` and the fixture `golden`."""

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from repkern import load_checkpoint, reparameterize
from repkern.models.checkpoints.layout import convert_blocks
from repkern.models.checkpoints.registry import RELEASED
from repkern.nn.repghost import RepGhostModule
from repkern.testing import assert_close

ROOT = Path(os.environ.get("REPKERN_GOLDEN_DIR", Path(__file__).resolve().parents[2].parent / "shared" / "golden"))
TOLERANCE = 1e-12  # relative to the largest value; all arithmetic is float64 and sums are short
# The released conversion makes its average kernel in float32 (README of the fixtures); absolute.
AVERAGE_TOLERANCE = 1e-7
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def converted(tensors):
    """Released tensors of one block in our names, differentiably."""
    return convert_blocks(tensors, list(RELEASED.values())).tensors


def step(model, x, state, learned, *arguments, loss=lambda output: output.square().mean()):
    """(output, gradient of the input, gradients by released name, our tensors afterwards) of one call of `model`."""
    released = {name: t.clone() for name, t in state.items()}
    for name in learned:
        released[name].requires_grad_()
    ours = converted(released)
    buffers = {name for name, _ in model.named_buffers()}
    assert set(model.state_dict()) <= set(ours) <= set(model.state_dict()) | buffers
    x = x.clone().requires_grad_()
    output = functional_call(model, ours, (x, *arguments))
    gradients = torch.autograd.grad(loss(output), [x] + [released[name] for name in learned], allow_unused=True)
    return output, gradients[0], dict(zip(learned, gradients[1:], strict=True)), ours


class Golden:
    """The fixtures, and what every one of them is compared with."""

    converted = staticmethod(converted)
    step = staticmethod(step)

    def read(self, block, case):
        return torch.load(ROOT / block / f"{case}.pt", weights_only=True)

    def check(self, actual, expected, what, *, at_least=0.0):
        """`at_least`: the magnitude of what cancelled to give `expected`, where it says little about the rounding."""
        assert_close(actual, expected, TOLERANCE * max(at_least, float(expected.detach().abs().max())), what)

    def check_gradients(self, fixture, grad_input, gradients, mode):
        # Through a norm in train mode the mean square depends on little but gamma and beta: terms of size 1 cancel.
        size = 1.0 if mode == "train" else 0.0
        self.check(grad_input, fixture["grad_input"], f"{mode} input gradient", at_least=size)
        assert gradients
        for name, gradient in gradients.items():
            expected = fixture["grad_of_params"][name]
            if expected is None:
                assert gradient is None or not gradient.any(), name
                continue
            assert gradient is not None, f"no gradient reaches {name}"
            self.check(gradient, expected, f"{mode} gradient of {name}", at_least=size)

    def check_eval(self, block, case, make):
        """Eval output and all gradients, in the released names."""
        fixture = self.read(block, case)
        model = make(fixture["config"]).eval()
        learned = list(fixture["grad_of_params"])
        output, grad_input, gradients, _ = step(model, fixture["input"], fixture["state_dict"], learned)
        self.check(output, fixture["output_eval"], "eval output")
        self.check_gradients(fixture, grad_input, gradients, "eval")

    def check_train(self, block, case, make):
        """Train output, all gradients, and the running statistics after the step."""
        fixture, trained = self.read(block, case), self.read(block, f"{case}.train")
        model = make(fixture["config"]).train()
        learned = list(trained["grad_of_params"])
        output, grad_input, gradients, ours = step(model, fixture["input"], fixture["state_dict"], learned)
        self.check(output, trained["output_train"], "train output")
        self.check_gradients(trained, grad_input, gradients, "train")
        after = converted({**fixture["state_dict"], **trained["buffers_after"]})
        names = [name for name in after if name.endswith(STATISTICS)]
        assert names
        for name in names:
            self.check(ours[name], after[name], f"{name} after one step")

    def check_deployed(self, block, case, make):
        """Loading in both forms, the folded kernel, and the output of the deployed form, ours and the released one."""
        fixture = self.read(block, case)
        x, expected = fixture["input"], fixture["output_eval"]
        model = load_checkpoint(fixture["state_dict"], make(fixture["config"]).eval())
        self.check(model(x), expected, "loaded output")
        fresh = make(fixture["config"]).eval().fuse()
        deployed = reparameterize(copy.deepcopy(model), verify=x)
        self.check(deployed(x), expected, "deployed output")
        if "deployed_weight" not in fixture:  # linear blocks of RepOptimizers, which have no deployed form
            return
        bound = AVERAGE_TOLERANCE if any(".avgbn." in name for name in fixture["state_dict"]) else 0.0
        weight, bias = self.folded(model)
        for ours, name in ((weight, "deployed_weight"), (bias, "deployed_bias")):
            assert_close(ours, fixture[name], max(bound, TOLERANCE * float(fixture[name].abs().max())), name)
        names = fixture["deployed_state_dict_keys"]
        folded = [name for name in names if name not in fixture["state_dict"]]
        released = {name: fixture["state_dict"][name] for name in names if name not in folded}
        released |= dict(zip(folded, (fixture["deployed_weight"], fixture["deployed_bias"]), strict=True))
        load_checkpoint({"state_dict": {f"module.{name}": t for name, t in released.items()}}, fresh)
        assert_close(fresh(x), expected, max(100 * bound, TOLERANCE * float(expected.abs().max())), "loaded deployed")

    @staticmethod
    def folded(model):
        """The convolution of a block; of a RepGhost module that of its depthwise part."""
        return (model.fusion if isinstance(model, RepGhostModule) else model).equivalent_kernel_bias()


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny, and threads that wait for each other on a busy machine cost far more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def released():
    """released.py: networks by their released names, and what they compute."""
    spec = importlib.util.spec_from_file_location("released", Path(__file__).with_name("released.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def golden():
    if not ROOT.is_dir():
        pytest.skip("the golden fixtures are absent (REPKERN_GOLDEN_DIR)")
    return Golden()


def pytest_generate_tests(metafunc):
    """A test with the argument `golden_case` runs on every case of its module's GOLDEN_BLOCKS."""
    if "golden_case" not in metafunc.fixturenames:
        return
    found = []
    for block in metafunc.module.GOLDEN_BLOCKS:
        stems = sorted(file.stem for file in (ROOT / block).glob("*.pt")) if ROOT.is_dir() else ["absent"]
        found += [
            (block, stem)
            for stem in stems
            if not stem.endswith(".train") and (ROOT / block / f"{stem}.train.pt").exists()
        ]
    metafunc.parametrize("golden_case", found, ids=["-".join(case) for case in found])
