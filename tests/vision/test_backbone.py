"""StarNet as a backbone: feature maps, its steps in order, tracers and scripts, against timm's."""

import copy

import pytest
import timm
import torch
from timm.models import FeatureInfo as TimmFeatureInfo
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._features import FeatureGetterNet
from torch import nn
from torchvision.models import _utils, feature_extraction

from starlayers.vision.names import timm_name

from .test_timm import NAME, make, peer
from .util import image, randomise, relative_error

# --- feature maps

CLASSES = ["list", "dict", "hook", "getter", "fx", FeatureGetterNet]


@pytest.mark.parametrize("kind", CLASSES, ids=[*CLASSES[:-1], "class"])
@pytest.mark.parametrize("indices", [None, (1, 3), (0,), (-2,)], ids=str)
def test_feature_maps_are_timms(kind, indices):
    options = {} if indices is None else {"out_indices": indices}
    whole, x = make(seed=1), image(2, 3, 96, 64)
    want = peer(whole).forward_intermediates(x, indices, intermediates_only=True)
    model = timm.create_model(NAME, features_only=True, feature_cls=kind, **options).eval()
    copy_weights(whole, model)
    with torch.no_grad():
        maps = model(x)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    assert len(maps) == len(want)
    for got, expected in zip(maps, want, strict=True):
        assert relative_error(got, expected) < 1e-5
    assert model.feature_info.channels() == [m.shape[1] for m in want]
    assert [64 // r for r in model.feature_info.reduction()] == [m.shape[3] for m in want]


def copy_weights(whole, model):
    """Copy the weights of a network into one of its feature extractors, whose names differ."""
    given = {name.replace(".", "_"): t for name, t in whole.state_dict().items()}
    for name, t in model.state_dict().items():
        parts = name.removeprefix("model.").removeprefix("body.").removeprefix("graph_module.")
        t.copy_(given[parts.replace(".", "_")])


def test_extractors_follow_the_depth_of_the_network():
    model = timm.create_model(NAME, features_only=True, depths=(1, 2), stage_strides=(2, 2))
    assert model.feature_info.reduction() == [4, 8]


def test_feature_info_answers_as_timms():
    ours, theirs = make(), timm.create_model("starnet_s050")
    info = TimmFeatureInfo(theirs.feature_info, 4)
    assert ours.feature_info.channels() == info.channels() == [16, 32, 64, 128]
    assert ours.feature_info.reduction() == info.reduction() == [4, 8, 16, 32]
    assert ours.feature_info.module_name() == info.module_name()
    for idx in (0, -1, [1, 3], (0,)):
        assert ours.feature_info.channels(idx) == info.channels(idx)
        assert ours.feature_info.get("reduction", idx) == info.get("reduction", idx)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_extractor_trains_with_and_without_gradient_checkpointing(checkpointing):
    model = randomise(timm.create_model(NAME, features_only=True)).train()
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    x = image(2, 3, 64, 64)
    for net in (model, plain):
        sum(m.square().mean() for m in net(x)).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_an_extractor_is_scripted():
    model, x = timm.create_model(NAME, features_only=True).eval(), image(1, 3, 64, 64)
    for got, want in zip(torch.jit.script(model)(x), model(x), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("prune_head", [False, True])
@pytest.mark.parametrize("indices", [[0], [1, 2], [3], 2, (-1, 0)], ids=str)
def test_pruned_networks_are_timms(indices, prune_head, prune_norm):
    ours, x = make(num_classes=10), image(2, 3, 64, 64)
    theirs = peer(ours)
    options = {"prune_head": prune_head, "prune_norm": prune_norm}
    taken = ours.prune_intermediate_layers(indices, **options)
    assert taken == theirs.prune_intermediate_layers(indices, **options)
    names = {timm_name(name) for name, _ in ours.named_parameters()}
    assert names == {name for name, _ in theirs.named_parameters()}
    for attribute in ("num_classes", "num_features", "head_hidden_size"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    with torch.no_grad():
        assert relative_error(ours(x), theirs(x)) < 1e-5
        options = {"indices": taken, "norm": not prune_norm}
        got, want = (m.forward_intermediates(x, **options) for m in (ours, theirs))
    assert relative_error(got[0], want[0]) < 1e-5
    assert [relative_error(*pair) < 1e-5 for pair in zip(got[1], want[1], strict=True)]
    ours.train()
    features = ours.forward_intermediates(x, **options)
    sum(m.sum() for m in (features[0], *features[1])).backward()
    unused = [n for n, p in ours.named_parameters() if p.grad is None]
    assert unused == ([] if ours.num_classes == 0 else ["head.weight", "head.bias"])
    ours.reset_classifier(7, "avg")
    assert ours(x).shape == (2, 7)


def test_a_wrong_stage_is_not_pruned_to():
    with pytest.raises(ValueError, match=r"stages 0 to 3, got indices=\[4\]"):
        make().prune_intermediate_layers([4])


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_an_output_stride_keeps_the_resolution_and_what_kernels_see(stride):
    whole, x = make(seed=1, num_classes=0, global_pool=""), image(1, 3, 128, 128)
    dilated = timm.create_model(NAME, num_classes=0, global_pool="", output_stride=stride).eval()
    dilated.load_state_dict(whole.state_dict())
    assert dilated.feature_info.reduction() == [min(r, stride) for r in (4, 8, 16, 32)]
    with torch.no_grad():
        want = whole.forward_intermediates(x, intermediates_only=True)
        got = dilated.forward_intermediates(x, intermediates_only=True)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape[-1] == 128 // dilated.feature_info.reduction(i)
        step = a.shape[-1] // b.shape[-1]
        torch.testing.assert_close(a[..., ::step, ::step], b, rtol=1e-4, atol=1e-4)
    maps = timm.create_model(NAME, features_only=True, output_stride=stride)(x)
    assert [m.shape[-1] for m in maps] == [128 // min(r, stride) for r in (4, 8, 16, 32)]


# --- tracers and scripts


def traced(model, train):
    """Return a network by torchvision's tracer with timm's settings, as timm's tests trace it."""
    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    nodes = feature_extraction.get_graph_node_names(model, tracer_kwargs=options)
    return feature_extraction.create_feature_extractor(
        model,
        train_return_nodes=[nodes[0][-1]],
        eval_return_nodes=[nodes[1][-1]],
        tracer_kwargs=options,
    ).train(train)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_traced_network_computes_the_same(train):
    model, x = make(num_classes=10).train(train), image(2, 3, 64, 64)
    graph = traced(copy.deepcopy(model), train)
    (got,), want = graph(x).values(), model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if train:
        got.mean().backward()
        assert all(p.grad is not None for p in graph.parameters())


def test_networks_and_traced_networks_are_scripted():
    model, x = make(num_classes=10), image(2, 3, 64, 64)
    want = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), want)
    (got,) = torch.jit.script(traced(model, False))(x).values()
    torch.testing.assert_close(got, want)


# --- steps in order, as frameworks take networks apart


def test_a_chain_of_the_children_is_the_network():
    for options in ({}, {"num_classes": 0}, {"num_classes": 0, "global_pool": ""}):
        model, x = make(**options), image(2, 3, 64, 64)
        chain = nn.Sequential(*model.children())
        assert relative_error(chain(x), model(x)) < 1e-5
        names = [name for name, _ in model.named_children()]
        assert names == ["stem", "stages", "norm", "global_pool", "flatten", "head_drop", "head"]


def test_torchvisions_getter_sees_timms_maps():
    ours, x = make(), image(2, 3, 64, 64)
    theirs = peer(ours)
    for layers in ({"stem": "0"}, {"stages": "0"}, {"norm": "0"}):
        maps = [_utils.IntermediateLayerGetter(m, layers)(x)["0"] for m in (ours, theirs)]
        assert cosine(*maps) == pytest.approx(1.0, abs=1e-6)
        assert relative_error(*maps) < 1e-5


def cosine(a, b):
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


def test_a_split_into_the_smallest_steps_sees_timms_maps():
    """The steps as ultralytics' TorchVision(split=True) makes them: sequences unrolled once."""
    ours, x = make(), image(2, 3, 64, 64)
    theirs = peer(ours)
    steps = [
        step
        for child in ours.children()
        for step in (child.children() if isinstance(child, nn.Sequential) else [child])
    ]
    assert [type(step).__name__ for step in steps[:3]] == ["Conv2d", "BatchNorm2d", "Activation"]
    seen, y = [], x
    for step in steps:
        y = step(y)
        seen.append(y)
    assert cosine(y, theirs(x)) == pytest.approx(1.0, abs=1e-6)
    for got, want in zip(seen[3:7], theirs.forward_intermediates(x)[1], strict=True):
        assert cosine(got, want) == pytest.approx(1.0, abs=1e-6)


def test_hooks_and_torch_fx_see_the_maps():
    ours, x, seen = make(), image(2, 3, 64, 64), {}
    want = peer(ours).forward_intermediates(x, intermediates_only=True)
    extractor = feature_extraction.create_feature_extractor(ours, ["stem.act", "stages.0"])
    for name in ("stem.act", "stages.0"):
        part = ours.get_submodule(name)
        part.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
    ours(x)
    assert relative_error(seen["stages.0"], want[0]) < 1e-5
    for name, got in extractor(x).items():
        torch.testing.assert_close(got, seen[name])
    torch.testing.assert_close(seen["stem.act"], peer(ours).stem(x))


def test_a_replaced_activation_of_the_stem_is_computed():
    ours, x = make(), image(2, 3, 64, 64)
    ours.stem.act = nn.Tanh()
    torch.testing.assert_close(
        ours._stem(x), ours.stem.bn(ours.stem.conv(x)).tanh(), rtol=1e-5, atol=1e-6
    )


def before_steps_were_modules(model, drop_rate=0.25):
    """Return the pickled state of a network of the time when activation and pool were none."""
    state = model.__getstate__()
    state["_modules"] = dict(state["_modules"])
    for name in ("global_pool", "flatten", "head_drop"):
        del state["_modules"][name]
    state["_modules"]["stem"] = copy.deepcopy(model.stem)
    del state["_modules"]["stem"].act
    state |= {"global_pool": model.global_pool.pool_type, "drop_rate": drop_rate, "act": model.act}
    return state | {"feature_info": list(model.feature_info)}


@pytest.mark.parametrize("pool", ["max", ""])
def test_networks_pickled_before_steps_were_modules_get_them(pool):
    model = make(num_classes=10 if pool else 0, global_pool=pool)
    old = object.__new__(type(model))
    old.__setstate__(before_steps_were_modules(model))
    assert [n for n, _ in old.named_modules()] == [n for n, _ in model.named_modules()]
    assert (old.drop_rate, old.training, type(old.feature_info)) == (
        0.25,
        False,
        type(model.feature_info),
    )
    x = image(2, 3, 64, 64)
    torch.testing.assert_close(old(x), model(x), rtol=0, atol=0)
    again = copy.deepcopy(old)
    assert [n for n, _ in again.named_modules()] == [n for n, _ in model.named_modules()]


def test_an_activation_that_was_removed_stays_away():
    model = make()
    del model.stem.act
    assert not hasattr(copy.deepcopy(model).stem, "act")


def test_the_activation_is_that_of_the_stem():
    model, x = make(), image(2, 3, 64, 64)
    assert model.act == model.stem.act.name == "relu6"
    model.act = "silu"
    torch.testing.assert_close(
        model._stem(x), nn.functional.silu(model.stem.bn(model.stem.conv(x)))
    )
    plain = make(act="identity")
    assert (plain.act, hasattr(plain.stem, "act")) == ("identity", False)


def test_the_rate_of_dropout_is_that_of_its_module():
    model = make(drop_rate=0.1)
    assert (model.drop_rate, model.head_drop.p) == (0.1, 0.1)
    model.drop_rate = 0.5
    assert model.head_drop.p == 0.5
    with pytest.raises(ValueError, match="drop_rate"):
        model.drop_rate = 1.5
