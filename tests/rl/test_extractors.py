"""Features extractors: shapes, images as bytes and floats, and what must raise."""

import inspect
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from starlayers import StarBlock
from starlayers.rl import StarCnnExtractor, StarCombinedExtractor, StarExtractor
from tests.rl.agents import OBSERVATIONS, Sampled, agent


def image(*shape):
    return spaces.Box(0, 255, shape, dtype=np.uint8)


#: screen -> kernel and stride of the stem, strides of three stages, sizes after each of the four
STEMS = [
    ((84, 84), 8, 4, [2, 2, 2], [22, 11, 6, 3]),
    ((64, 64), 8, 4, [2, 2, 2], [17, 9, 5, 3]),
    ((60, 60), 8, 4, [2, 2, 1], [16, 8, 4, 4]),
    ((48, 48), 8, 4, [2, 2, 1], [13, 7, 4, 4]),
    ((47, 47), 3, 2, [2, 2, 2], [24, 12, 6, 3]),
    ((17, 17), 3, 2, [2, 2, 1], [9, 5, 3, 3]),
    ((16, 16), 3, 2, [2, 1, 1], [8, 4, 4, 4]),
    ((15, 15), 3, 1, [2, 2, 1], [15, 8, 4, 4]),
    ((7, 7), 3, 1, [2, 1, 1], [7, 4, 4, 4]),
    ((4, 4), 3, 1, [1, 1, 1], [4, 4, 4, 4]),
]


@pytest.mark.parametrize(("screen", "kernel", "stride", "strides", "sizes"), STEMS)
def test_strides_follow_the_size_of_the_screen(screen, kernel, stride, strides, sizes):
    net = StarCnnExtractor(image(2, *screen), 8, dims=(4, 6, 8), depths=(1, 1, 1))
    assert net.stem.kernel_size == (kernel, kernel)
    assert net.stem.stride == (stride, stride)
    stages = list(net.stages)[:3]
    assert [stage[0].conv.stride[0] for stage in stages] == strides
    x = torch.rand(2, 2, *screen)
    y = net.stem(x).permute(0, 2, 3, 1)
    found = [y.shape[1]]
    for stage in stages:
        y = stage(y)
        found.append(y.shape[1])
    assert found == sizes
    maps = net.feature_maps(x)
    assert maps.shape == (2, sizes[-1], sizes[-1], 8)
    assert net.head[0].in_features == sizes[-1] ** 2 * 8
    assert net(x).shape == (2, 8)
    assert net(x[:0]).shape == (0, 8)


def test_the_shorter_side_decides():
    for shape in ((20, 60), (60, 20)):
        net = StarCnnExtractor(image(1, *shape), 8)
        assert net.stem.stride == (2, 2)
        assert sorted(net.feature_maps(torch.rand(1, 1, *shape)).shape[1:3]) == [3, 8]


def test_the_network_is_its_formula():
    net = StarCnnExtractor(image(2, 9, 9), 5, dims=(4,), depths=(1,), activation_fn="gelu")
    x = torch.rand(3, 2, 9, 9)
    y = net.stem_norm(net.stem(x).movedim(1, -1))
    down, block = net.stages[0]
    y = down.conv(y.movedim(-1, 1)).movedim(1, -1)
    inner = block.pre[1](block.pre[0].conv(y.movedim(-1, 1)).movedim(1, -1))
    nn.init.normal_(block.mlp.g.weight)
    product = F.gelu(block.mlp.f1(inner)) * (1 + block.mlp.f2(inner))
    y = y + block.post.conv(block.mlp.g(product).movedim(-1, 1)).movedim(1, -1)
    y = net.stages[1](y)
    assert (block.mlp.f1.out_features, block.mlp.act) == (8, "gelu")
    torch.testing.assert_close(net(x), torch.relu(net.head[0](y.flatten(1))))
    assert [type(m) for m in (block.pre[1], net.stages[1], net.stem_norm)] == [nn.LayerNorm] * 3


def test_defaults_are_pinned():
    defaults = {
        StarExtractor: {
            "features_dim": 64,
            "net": "star",
            "depth": 2,
            "activation_fn": "tanh",
            "norm": None,
        },
        StarCnnExtractor: {
            "features_dim": 512,
            "normalized_image": False,
            "dims": (32, 64),
            "depths": (1, 1),
            "activation_fn": "relu6",
        },
        StarCombinedExtractor: {"cnn_output_dim": 256, "normalized_image": False},
    }
    for kind, expected in defaults.items():
        parameters = inspect.signature(kind).parameters.values()
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == expected
    flat = StarExtractor(spaces.Box(-1, 1, (3,)))
    assert [(m.in_features, m.out_features, m.act) for m in flat.trunk] == [
        (3, 64, "tanh"),
        (64, 64, "tanh"),
    ]
    net = StarCnnExtractor(image(1, 20, 20))
    assert [stage[0].conv.out_channels for stage in list(net.stages)[:-1]] == [32, 64]
    assert [len(stage) for stage in list(net.stages)[:-1]] == [2, 2]
    assert {m.mlp.act for m in net.modules() if isinstance(m, StarBlock)} == {"relu6"}
    assert net.head[0].out_features == 512


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("net", "mlp"),
        ("depth", 1),
        ("activation_fn", "gelu"),
        ("norm", "layer"),
        ("features_dim", 8),
    ],
)
def test_every_option_of_the_flat_extractor_changes_it(option, value):
    torch.manual_seed(0)
    default = StarExtractor(spaces.Box(-1, 1, (3,)))
    torch.manual_seed(0)
    changed = StarExtractor(spaces.Box(-1, 1, (3,)), **{option: value})
    x = torch.randn(2, 3)
    assert changed(x).shape != default(x).shape or not torch.allclose(changed(x), default(x))


def test_rollouts_and_updates_see_one_network():
    # PPO collects in eval mode and learns in train mode
    net = StarCnnExtractor(image(1, 20, 20), 8)
    x = torch.rand(3, 1, 20, 20)
    assert torch.equal(net.train()(x), net.eval()(x))
    assert list(net.buffers()) == []


def test_blocks_begin_as_the_identity_also_under_ortho_init():
    model = agent("PPO", "image", policy_kwargs={"net_arch": [8]})
    net = model.policy.features_extractor
    blocks = [m for m in net.modules() if type(m).__name__ == "StarBlock"]
    assert len(blocks) == 2
    for block in blocks:
        x = torch.randn(2, 4, 4, block.mlp.in_features)
        torch.testing.assert_close(block(x) - block.post.conv.bias, x)
        depthwise = block.pre[0].conv.weight
        # an orthogonal start would give it a tenth of this
        assert depthwise.abs().max() > 0.25
    model.learn(64)
    assert blocks[0].mlp.g.weight.abs().max() > 0


def test_floats_that_are_normalised_already():
    class Floats(Sampled):
        def __init__(self):
            super().__init__("image")
            self.observation_space = spaces.Box(0, 1, (1, 20, 20), dtype=np.float32)

    kwargs = {"normalize_images": False, "net_arch": [8]}
    model = agent("PPO", env=Floats(), policy="StarCnnPolicy", policy_kwargs=kwargs).learn(64)
    bytes_ = agent("PPO", "image", policy_kwargs={"net_arch": [8]})
    bytes_.policy.load_state_dict(model.policy.state_dict())
    x = OBSERVATIONS["image"].sample()
    tensors = [m.policy.obs_to_tensor(v)[0] for m, v in ((bytes_, x), (model, x / np.float32(255)))]
    values = [m.policy.predict_values(t) for m, t in zip((bytes_, model), tensors)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("policy", ["MultiInputPolicy", "StarMultiInputPolicy"])
def test_floats_in_a_dictionary(policy):
    class Floats(Sampled):
        def __init__(self):
            super().__init__("dict")
            image = spaces.Box(0, 1, (3, 36, 36))
            self.observation_space = spaces.Dict({"image": image})

    kwargs = {"normalize_images": False, "features_extractor_class": StarCombinedExtractor}
    kwargs["features_extractor_kwargs"] = {"cnn_output_dim": 8}
    model = agent("PPO", env=Floats(), policy=policy, policy_kwargs=kwargs)
    assert model.policy.features_dim == 8


def test_a_cnn_in_a_stock_policy_takes_its_arguments():
    kwargs = {
        "features_extractor_class": StarCnnExtractor,
        "features_extractor_kwargs": {"features_dim": 16, "dims": (8,), "depths": (2,)},
    }
    model = PPO("CnnPolicy", Sampled("image"), n_steps=16, batch_size=16, policy_kwargs=kwargs)
    assert model.policy.features_extractor.stages[0][0].conv.out_channels == 8
    model.learn(16)


def test_dictionaries():
    net = StarCombinedExtractor(OBSERVATIONS["dict"], cnn_output_dim=16, dims=(8,), depths=(1,))
    assert net.features_dim == 3 + 16 + 3
    kinds = {key: type(e).__name__ for key, e in net.extractors.items()}
    flat = "FlattenExtractor"
    assert kinds == {"vector": flat, "image": "StarCnnExtractor", "kind": flat}
    x = {"vector": torch.randn(2, 3), "image": torch.rand(2, 1, 20, 20), "kind": torch.eye(3)[:2]}
    parts = [x["vector"], net.extractors["image"](x["image"]), x["kind"]]
    order = {"image": 1, "kind": 2, "vector": 0}
    expected = torch.cat([parts[order[key]] for key in net.extractors], 1)
    assert torch.equal(net(x), expected)
    assert expected.shape == (2, 22)


@pytest.mark.parametrize("net", ["star", "mlp", "simba"])
def test_flat_observations(net):
    extractor = StarExtractor(spaces.Discrete(5), 8, net=net, depth=1, activation_fn=nn.ReLU)
    assert extractor(torch.eye(5)).shape == (5, 8)
    assert isinstance(extractor.flatten, nn.Flatten)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((64, 64, 3), True),
        ((64, 64, 4), True),
        ((5, 64, 4), True),
        ((64, 64, 5), False),
        ((4, 64, 4), False),
        ((64, 4, 4), False),
        ((3, 64, 64), False),
    ],
)
def test_channels_last_are_known_by_their_shape(shape, channels_last):
    space = image(*shape)
    if channels_last:
        words = rf"expects channels first, and {re.escape(str(shape))} looks like channels last"
        with pytest.raises(ValueError, match=words):
            StarCnnExtractor(space)
    else:
        assert StarCnnExtractor(space, 8, dims=(4,), depths=(1,)).stem.in_channels == shape[0]


@pytest.mark.parametrize(
    "space", [spaces.Box(-1, 1, (3,)), spaces.MultiBinary((3, 8, 8)), OBSERVATIONS["dict"]]
)
def test_images_are_boxes_of_three_dimensions(space):
    words = r"StarCnnExtractor expects a Box of shape \(C, H, W\), got .*; StarMlpPolicy and Star"
    with pytest.raises(ValueError, match=words):
        StarCnnExtractor(space)


@pytest.mark.parametrize(
    ("dims", "depths"), [((8,), (1, 2)), ((8, 8), (1,)), ((), ())], ids=["more", "fewer", "none"]
)
def test_stages_have_dims_and_depths(dims, depths):
    words = rf"dims={re.escape(str(dims))} and depths={re.escape(str(depths))} need one entry for"
    with pytest.raises(ValueError, match=words):
        StarCnnExtractor(image(1, 20, 20), dims=dims, depths=depths)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="StarCombinedExtractor expects a Dict space, got Box"):
        StarCombinedExtractor(spaces.Box(-1, 1, (3,)))
    box = spaces.Box(-1, 1, (3,))
    with pytest.raises(ValueError, match="StarExtractor: depth must be at least 1, got 0"):
        StarExtractor(box, depth=0)
    with pytest.raises(ValueError, match="StarExtractor: features_dim must be at least 1, got 0"):
        StarExtractor(box, 0)
    with pytest.raises(ValueError, match="StarCnnExtractor: features_dim must be at least 1"):
        StarCnnExtractor(image(1, 20, 20), 0)
    with pytest.raises(ValueError, match="activation_fn=ELU: a star layer needs an activation"):
        StarExtractor(box, activation_fn=nn.ELU)
