"""Verify a hidden layer whose forward computes linear map and activation."""

import torch
from torch import Tensor, nn

from starlayers.surgery.adopted import arguments
from starlayers.surgery.contexts import graphs
from starlayers.surgery.formula import Chain, activation_name, read_chain
from starlayers.surgery.hidden import install_hidden
from starlayers.surgery.linear_layers import Projection, dtype_and_device, gate_blocker, projection
from starlayers.surgery.reads import Reads
from starlayers.surgery.recipes import is_activation
from starlayers.surgery.sandbox import sandbox_copy
from starlayers.surgery.site import Site, attribute, parent_of
from starlayers.surgery.trial_run import MismatchError, run


def verify_hidden(owner: nn.Module, site: Site) -> str | None:
    """Verify that a module is an element-wise function of its linear layer, and nothing else.

    By graph: under all `CONTEXTS` and for input of any size, its output is the same function of
    the result of its linear layer, which takes the input. Then the module with a zero gate is run
    beside itself.

    Returns:
        The name of the function in `ACTIVATIONS`, `None` if it has none.

    Raises:
        MismatchError: the module computes anything else; the message says what.
    """
    module, leaf = parent_of(owner, site.inp)
    if "forward" in vars(module):
        raise MismatchError("its forward was replaced on the instance")
    needed = [p for p in arguments(module) if p.default is p.empty]
    if len(needed) != 1:
        raise MismatchError(f"its forward takes {len(needed)} arguments, not the input alone")
    if blocker := gate_blocker(attribute(module, leaf)):
        raise MismatchError(blocker)
    chain = _read(module, leaf)
    if not is_activation(chain):
        raise MismatchError(f"its forward applies no activation to the output of {leaf!r}")
    _compare(module, site, leaf)
    return activation_name(chain)


def _read(module: nn.Module, leaf: str) -> Chain:
    """Return the function that makes the output of the result of a linear layer."""
    inp = attribute(module, leaf)
    n = (projection(inp) or Projection(1, 1)).in_features
    device = dtype_and_device(inp)[1]
    device = torch.device("cpu") if device.type == "meta" else device
    first: Chain | None = None
    for context, graph in graphs(
        lambda make: sandbox_copy(module, make=make), n, device, [leaf], Reads()
    ):
        calls = graph.calls_to(leaf)
        if len(calls) != 1:
            raise MismatchError(f"one run calls {leaf!r} {len(calls)} times, not once")
        if graph.inputs(calls[0]) != [graph.x]:
            raise MismatchError(f"{leaf!r} takes more than the input, or other than it")
        result = [n for n in calls[0].nodes if set(n.users) - set(calls[0].nodes)]
        if len(result) != 1 and graph.output not in calls[0].nodes:
            raise MismatchError(f"the result of {leaf!r} is not used")
        try:
            chain = read_chain(graph, graph.output, result or [graph.output])
        except MismatchError as error:
            text = str(error).replace("a factor of its product", "the output of its forward")
            raise MismatchError(text) from error
        if first is not None and chain.text != first.text:
            raise MismatchError(f"it computes {chain.text} in {context}, {first.text} otherwise")
        first = first or chain
    assert first is not None
    return first


def _compare(module: nn.Module, site: Site, leaf: str) -> None:
    """Compare a module with itself with a zero gate, and with another gate."""
    own, copy = sandbox_copy(module), sandbox_copy(module)
    for parameter in own.parameters():  # the same random weights, also from meta
        parameter.requires_grad_(True)
    copy.load_state_dict(own.state_dict())
    inp = attribute(own, leaf)
    dtype, device = dtype_and_device(inp)
    x = torch.randn(2, 3, (projection(inp) or Projection(1, 1)).in_features)
    x = x.to(device, dtype)
    star = install_hidden(nn.ModuleDict({"_": copy}), _inside(site, leaf), "full", recompute=False)
    for train in (False, True):
        y, z = (run(m, x, train=train) for m in (own, star))
        if not _equal(y, z):
            raise MismatchError("with a zero gate, its output is another")
    nn.init.ones_(star.star_gate.bias)  # type: ignore[arg-type, union-attr]
    if not _equal(2 * run(own, x), run(star, x)):
        raise MismatchError("a gate of one does not double its output")


def _inside(site: Site, leaf: str) -> Site:
    return Site(site.recipe, "plain", f"_.{leaf}", None, None)


def _equal(y: Tensor, z: Tensor) -> bool:
    return y.dtype == z.dtype and torch.equal(y, z)
