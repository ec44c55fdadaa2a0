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
