"""torch.fx, torch.compile, torch.export."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import fx, nn

from compat_matrix.table import tool
from compat_matrix.values import EQUAL, close, folds, plain_of, same_gradients

TRACING = "Tracing and compiling"


class Parent(nn.Module):
    """A network around a block that does something before and after it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return torch.relu(self.block(x * 2)) + 1


def same_training(made, model, x):
    for module in (made, model):
        module.train().zero_grad()
        module(x).square().sum().backward()
    same_gradients(made, model, "train mode")


@tool("`torch.fx.symbolic_trace`", TRACING)
def symbolic_trace(case):
    """Of the block and of a network around it: the same output and gradients, and the graph's block is deployed by
    `reparameterize`. A graph of an `ODBBlock` alone has its gates and masks as inputs, which the deployed form has
    not: calling that is a TypeError."""
    for model in (case.make(), Parent(case.make())):
        x = case.images()
        traced = fx.symbolic_trace(copy.deepcopy(model))
        close(traced(x), model(x), "traced")
        if len(inspect.signature(model.forward).parameters) == 1:
            close(folds(traced, x), model(x), "deployed after tracing")
        else:
            with pytest.raises(TypeError, match="positional arguments"):
                plain_of(traced)(x)
        same_training(traced, copy.deepcopy(model), x)


@tool("feature extraction", TRACING)
def feature_extraction(case):
    """As torchvision's `create_feature_extractor`: the graph is cut behind the block, and gives its output."""
    model, x = nn.Sequential(nn.Identity(), Parent(case.make()), nn.ReLU()).eval(), case.images()
    graph = fx.Tracer().trace(model)
    node = next(node for node in reversed(graph.nodes) if "block" in str(node.target) and node.op == "call_module")
    for last in [n for n in graph.nodes if n.op == "output"]:
        graph.erase_node(last)
    graph.inserting_after(node)
    graph.output({"feature": node})
    extractor = fx.GraphModule(model, graph)
    extractor.graph.eliminate_dead_code()
    extractor.delete_all_unused_submodules()
    extractor.recompile()
    assert not [name for name, _ in extractor.named_modules() if name == "2"], "what follows is still there"
    wanted = model[1].block(x * 2)
    close(extractor(x)["feature"], wanted, "feature")
    close(plain_of(extractor)(x)["feature"], wanted, "feature, deployed")


def check_compiled(case, backend):
    block, x = case.make(), case.images()
    wanted = block(x)
    torch.compiler.reset()
    compiled, other = torch.compile(block, fullgraph=True, backend=backend), case.make()
    with warnings.catch_warnings():
        for own in (DeprecationWarning, FutureWarning):  # inductor's, about what it imports and calls
            warnings.simplefilter("ignore", own)
        close(compiled(x), wanted, "eval")
        for module, run in ((block, compiled), (other, other)):
            module.train().zero_grad()
            run(x).square().sum().backward()
    same_gradients(block, other, "train mode")
    close(folds(block, x), folds(other, x), "after a training forward")
    torch.compiler.reset()


@tool('`torch.compile(fullgraph=True)`, `backend="aot_eager"`', TRACING, few=True)
def compiled_eagerly(case):
    """Forward in eval mode, forward and backward in train mode; running statistics too."""
    check_compiled(case, "aot_eager")


@tool("`torch.compile(fullgraph=True)`, inductor", TRACING, few=True)
def compiled_by_inductor(case):
    """Forward in eval mode, forward and backward in train mode; running statistics too. Not with padding_mode
    "replicate", whose backward inductor gets wrong for plain torch modules too."""
    # "expected size 4==4, stride 1==143": replication_pad2d_backward of a map that inductor made channels_last.
    check_compiled(case, "aot_eager" if case.geometry[-1] == "replicate" else "inductor")


@tool("`torch.export`", TRACING, few=True)
def exported(case):
    """The exported program of a block in eval mode gives its output."""
    block, x = case.make(), case.images()
    program = torch.export.export(block, (x,))
    close(program.module()(x), block(x), "exported", EQUAL)
    close(folds(block, x), block(x), "after export")


@tool("`torch.jit.trace`", TRACING, few=True)
def jit_traced(case):
    """The traced block in eval mode gives its output."""
    block, x = case.make(), case.images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block, x)
    close(traced(x), folds(block, x), "traced")
