"""Tracers of PyTorch see the plain network: torch.fx, jit, export, FX quantisation, torch.func."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from starlayers import ACTIVATIONS, DropPath, StarBlock, StarMLP, StarOp, use_backend
from starlayers.coefficients.modules import RankStarMLP, ScaledStarMLP, SumMLP
from starlayers.tracing import record
from starlayers.vision import DemoNet, StarBlock2d, StarNet
from tests.helpers import randn


def starnet(**options):
    torch.manual_seed(0)
    return StarNet(8, (1, 1), stage_strides=(2, 2), num_classes=5, **options).eval()


#: name -> (network, shape of an input)
NETWORKS = {
    "op": (lambda: StarOp(4, 6, act="silu"), (3, 4)),
    "packed": (lambda: StarOp(4, 6, packed=True, offset=1), (3, 4)),
    "mlp": (lambda: StarMLP(4, act="gelu"), (3, 4)),
    "bare block": (lambda: StarBlock(4), (2, 3, 4)),
    "block": (lambda: StarBlock(4, pre=nn.LayerNorm(4), layer_scale=0.5), (2, 3, 4)),
    "sum": (lambda: SumMLP(4), (3, 4)),
    "rank": (lambda: RankStarMLP(4, rank=2), (3, 4)),
    "scaled": (lambda: ScaledStarMLP(4), (3, 4)),
    "block2d": (lambda: StarBlock2d(4).eval(), (2, 4, 8, 8)),
    "starnet": (starnet, (2, 3, 32, 32)),
    "fused starnet": (lambda: starnet().fuse(), (2, 3, 32, 32)),
    "demonet": (
        lambda: DemoNet(depth=2, dim=8, num_classes=5, patch_size=4).eval(),
        (2, 3, 16, 16),
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    return build(), randn(*shape)


def layers(net):
    """Count linear layers and convolutions."""
    return sum(type(m) in (nn.Linear, nn.Conv2d) for m in net.modules())


@every_network
def test_fx_records_the_plain_network(name):
    net, x = network(name)
    graph = torch.fx.symbolic_trace(net)
    assert layers(graph) == layers(net) > 0
    assert torch.equal(graph(x), net(x))
    larger = torch.cat([x, x])
    torch.testing.assert_close(graph(larger), net(larger))


def test_fx_keeps_the_residual_optional():
    mlp, x, residual = StarMLP(4), randn(3, 4), randn(3, 4, seed=1)
    graph = torch.fx.symbolic_trace(mlp)
    assert torch.equal(graph(x), mlp(x))
    assert torch.equal(graph(x, residual), mlp(x, residual))


@every_network
def test_jit_trace_records_the_network_for_other_sizes_without_a_warning(name):
    net, x = network(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(net, x)
    larger = torch.cat([x, x])
    torch.testing.assert_close(traced(larger), net(larger))


SCRIPTED = [name for name in NETWORKS if name not in ("sum", "rank", "scaled", "demonet")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTED)
def test_script_compiles_what_fx_records(name):
    net, x = network(name)
    scripted = torch.jit.script(net)
    larger = torch.cat([x, x])
    torch.testing.assert_close(scripted(larger), net(larger))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", sorted({row.name for row in ACTIVATIONS.values()}))
def test_script_knows_every_activation(act):
    op, x = StarOp(4, 6, act=act), randn(3, 4)
    torch.testing.assert_close(torch.jit.script(op)(x), op(x))


@pytest.mark.filterwarnings("ignore")
def test_a_recorded_module_lives_as_long_as_its_recording():
    # jit.script finds by id() what it has replaced: an id must not be given to another object
    recorded = record(block := StarBlock2d(4).eval())
    kept = weakref.ref(block)
    del block
    gc.collect()
    assert kept() is not None
    assert recorded.meta["recorded"] is kept()


def test_script_takes_a_starnet_inside_of_another_module_and_follows_its_norms():
    net, x = nn.Sequential(starnet(), nn.Softmax(1)), randn(4, 3, 32, 32)
    scripted = torch.jit.script(net)
    for training in (False, True):
        torch.testing.assert_close(scripted.train(training)(x), net.train(training)(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StarBlock(4, drop_path=0.5), "drop_path drops at rate 0.5 .*eval"),
        (lambda: starnet(drop_path_rate=0.25).train(), "drop_path drops at rate 0.25 .*eval"),
    ],
)
def test_script_refuses_to_record_what_drops_at_random(make, words):
    with pytest.raises(ValueError, match=words):
        torch.jit.script(make())
    torch.jit.script(make().eval())
    assert DropPath(0.0).p == 0


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_dropout_before_the_head_follows_the_mode():
    net, x = starnet(drop_rate=0.25), randn(4, 3, 32, 32)
    scripted = torch.jit.script(net.train())
    with torch.no_grad():
        assert not torch.equal(scripted(x), scripted(x))
        torch.testing.assert_close(scripted.eval()(x), net.eval()(x))


@pytest.mark.export
@pytest.mark.parametrize("name", ["op", "packed", "mlp", "block"])
def test_export_keeps_every_dimension_but_the_channels_dynamic(name):
    net, x = network(name)
    dims = dict.fromkeys(range(x.ndim - 1), torch.export.Dim.AUTO)
    program = torch.export.export(net, (x,), dynamic_shapes=(dims,))
    other = randn(*(n + 3 for n in x.shape[:-1]), x.shape[-1])
    torch.testing.assert_close(program.module()(other), net(other))


@pytest.mark.export
@pytest.mark.parametrize("name", ["block2d", "starnet", "fused starnet"])
def test_export_keeps_batch_and_size_dynamic(name):
    net, x = network(name)
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(net, (x,), dynamic_shapes=(dims,))
    other = randn(5, x.shape[1], 64, 48)
    torch.testing.assert_close(program.module()(other), net(other))


def test_torchvision_extracts_the_features_of_each_stage():
    net, x = starnet(), randn(2, 3, 32, 32)
    features = create_feature_extractor(net, {"stages.0": "first", "stages.1": "second"})(x)
    _, maps = net.forward_intermediates(x, norm=False)
    torch.testing.assert_close([*features.values()], maps)
    names = get_graph_node_names(net)[1]
    assert {"stem.conv", "stages.0.1.mlp.f1", "stages.1.1.mlp.g", "head"} <= set(names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [starnet, lambda: starnet(act="gelu")])
def test_fx_quantises_every_linear_layer_and_convolution(make):
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = next(e for e in ("x86", "fbgemm", "onednn") if e in engines)
    net, x = make(), randn(8, 3, 32, 32)
    prepared = prepare_fx(net, get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    places = [f"{type(m).__module__}.{type(m).__name__}" for m in quantised.modules()]
    assert sum("quantized" in p and p.endswith((".Linear", ".Conv2d")) for p in places) == 14
    assert layers(quantised) == 0
    y = net(x)
    assert (quantised(x) - y).norm() < 0.1 * y.norm()


@every_network
def test_torch_func_calls_it_with_other_weights(name):
    net, x = network(name)
    weights = {n: 0.5 * p for n, p in net.named_parameters()}
    y = torch.func.functional_call(net, weights, (x,))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(y, net(x))


def test_a_tracer_under_the_triton_backend_is_refused():
    with use_backend("triton"), pytest.raises(RuntimeError, match="transform or tracer"):
        torch.fx.symbolic_trace(StarOp(4, 4))


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


@pytest.mark.filterwarnings("ignore")
def test_script_refuses_a_dropout_that_it_would_record_in_training_mode():
    block = StarBlock(4, pre=Dropping())
    with pytest.raises(ValueError, match=r"dropout in StarBlock .*eval"):
        torch.jit.script(block)
    x = randn(2, 4)
    torch.testing.assert_close(torch.jit.script(block.eval())(x), block(x))


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_residual_has_the_shape_of_the_result():
    mlp, x = StarMLP(4), randn(3, 4)
    scripted = torch.jit.script(mlp)
    torch.testing.assert_close(scripted(x, x), mlp(x, x))
    with pytest.raises(torch.jit.Error, match="must have the shape of the result"):
        scripted(x, x[:1])


@pytest.mark.parametrize("size", [32, 4096])
def test_flop_counters_see_the_products_at_every_size(size):
    mlp, rows = StarMLP(size, 2 * size), 4 * 4096 // size
    with FlopCounterMode(display=False) as counter:
        mlp(torch.ones(rows, size))
    assert counter.get_total_flops() == 2 * rows * size * 2 * size * 3
