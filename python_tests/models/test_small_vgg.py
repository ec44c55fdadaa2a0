import pytest
import torch

from repkern.models.small_vgg import SmallVGG
from repkern.nn import KINDS, reparameterize


@pytest.mark.parametrize("block", ["conv_bn", "repvgg", "qarepvgg", "csla"])
def test_every_block_deploys_to_the_plain_network(block):
    torch.manual_seed(0)
    model = SmallVGG((6, 8), 2, 5, 3, block)
    images = torch.randn(8, 3, 9, 9)
    model(images)
    model.eval()
    plain = reparameterize(model, verify=images)
    twin = SmallVGG((6, 8), 2, 5, 3, "plain").eval()
    twin.load_state_dict(plain.state_dict())
    torch.testing.assert_close(twin(images), plain(images))
    assert block in KINDS


def test_stages_halve_the_image():
    model = SmallVGG((6, 8, 10), 2).eval()
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert sizes == [(6, 16, 16), (8, 8, 8), (10, 4, 4)]


@pytest.mark.parametrize("options", [{"widths": ()}, {"widths": (0, 4)}, {"blocks": 0}, {"num_classes": 0}])
def test_bad_sizes(options):
    with pytest.raises(ValueError, match="sizes must be positive"):
        SmallVGG(**options)


def test_bad_block():
    with pytest.raises(ValueError, match="block must be one of"):
        SmallVGG(block="nothing")


def test_options_go_to_the_blocks():
    model = SmallVGG((6, 8), 2, block="orepa", block_options={"scaling": "scalar"})
    assert {block.conv.scaling for block in model.modules() if hasattr(block, "conv")} == {"scalar"}
    with pytest.raises(TypeError, match="block 'acb' has no option scaling"):
        SmallVGG(block="acb", block_options={"scaling": "none"})


def test_one_list_of_branches_serves_layers_with_and_without_identity():
    model = SmallVGG((6, 8), 2, block="odbb", block_options={"branches": ["kxk", "id"]})
    found = {name: block.branches for name, block in model.named_modules() if hasattr(block, "branches")}
    assert found == {
        "stem": ("kxk",), "stages.0.0": ("kxk", "id"), "stages.0.1": ("kxk", "id"),
        "stages.1.0": ("kxk",), "stages.1.1": ("kxk", "id"),
    }  # fmt: skip
