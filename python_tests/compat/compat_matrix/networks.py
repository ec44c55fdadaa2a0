"""Real networks of torchvision, timm and segmentation_models_pytorch, with random weights, at small sizes."""

import importlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

TORCHVISION = (
    *("resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "densenet121", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny"),
)
SEGMENTATION = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
#: Networks of timm that reparameterize themselves.
FAMILIES = ("repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8", "repghostnet_050")
TIMM = ("resnet18d", "mobilenetv4_conv_small", "ghostnet_100", "hrnet_w18_small", "efficientnet_lite0")
SMP = (
    ("Unet", "resnet18", {}),
    ("FPN", "mobilenet_v2", {}),
    ("DeepLabV3Plus", "resnet18", {"encoder_output_stride": 8}),
)


class Network(NamedTuple):
    """A network: the package that it is from and what makes it."""

    name: str
    package: str
    construct: Callable[[], nn.Module]

    def make(self):
        """In float64 and eval mode, with statistics that are not their initial values."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.construct().double()
        return with_statistics(model)

    @property
    def installed(self):
        try:
            importlib.import_module(self.package)
        except ImportError:
            return False
        return True


def images(size=64):
    torch.manual_seed(3)
    return torch.randn(2, 3, size, size, dtype=torch.float64)


@torch.no_grad()
def with_statistics(model):
    """Statistics of a few batches, by which random weights give maps of an ordinary size."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    for _ in range(3):
        model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    return model.eval()


def output_of(model, x):
    """The main output as one tensor, whatever it is packed in."""
    out = model(x)
    if isinstance(out, dict):
        out = out["out"]
    return out[0] if isinstance(out, tuple | list) else out


def _of_torchvision(name):
    def construct():
        import torchvision

        options = {"weights_backbone": None} if name in SEGMENTATION else {}
        return torchvision.models.get_model(name, weights=None, num_classes=10, **options)

    return Network(f"torchvision {name}", "torchvision", construct)


def of_timm(name, **options):
    def construct():
        import timm

        return timm.create_model(name, pretrained=False, **({"num_classes": 10} | options))

    return Network(f"timm {name}", "timm", construct)


def _of_smp(architecture, encoder, options):
    def construct():
        import segmentation_models_pytorch as smp

        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=3, **options)

    return Network(f"smp {architecture} {encoder}", "segmentation_models_pytorch", construct)


NETWORKS = [_of_torchvision(name) for name in (*TORCHVISION, *SEGMENTATION)]
NETWORKS += [of_timm(name) for name in (*FAMILIES, *TIMM)]
NETWORKS += [_of_smp(*row) for row in SMP]
