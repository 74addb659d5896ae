"""Features extractors: shapes, images as bytes and floats, and what must raise."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import nn

from starlayers.rl import StarCnnExtractor, StarCombinedExtractor, StarExtractor
from tests.rl.agents import OBSERVATIONS, Sampled, agent


def image(*shape):
    return spaces.Box(0, 255, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "maps"), [((4, 84, 84), 6), ((3, 64, 64), 5), ((1, 20, 20), 3), ((2, 7, 7), 4)]
)
def test_images_from_atari_to_small_grids(shape, maps):
    net = StarCnnExtractor(image(*shape), 32)
    assert net.features_dim == 32
    x = torch.rand(2, *shape)
    assert net.feature_maps(x).shape == (2, maps, maps, 64)
    assert net(x).shape == (2, 32)
    assert net(x[:0]).shape == (0, 32)


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
    assert kinds == {"vector": "Flatten", "image": "StarCnnExtractor", "kind": "Flatten"}
    x = {"vector": torch.randn(2, 3), "image": torch.rand(2, 1, 20, 20), "kind": torch.eye(3)[:2]}
    assert net(x).shape == (2, 22)


@pytest.mark.parametrize("net", ["star", "mlp", "simba"])
def test_flat_observations(net):
    extractor = StarExtractor(spaces.Discrete(5), 8, net=net, depth=1, activation_fn=nn.ReLU)
    assert extractor(torch.eye(5)).shape == (5, 8)
    assert isinstance(extractor.flatten, nn.Flatten)


def test_wrong_spaces_are_named():
    with pytest.raises(ValueError, match=r"StarCnnExtractor expects a Box of shape \(C, H, W\)"):
        StarCnnExtractor(spaces.Box(-1, 1, (3,)))
    with pytest.raises(ValueError, match=r"channels first, and \(64, 64, 3\) looks like"):
        StarCnnExtractor(spaces.Box(0, 1, (64, 64, 3)))
    with pytest.raises(ValueError, match="StarCombinedExtractor expects a Dict space, got Box"):
        StarCombinedExtractor(spaces.Box(-1, 1, (3,)))
    with pytest.raises(ValueError, match=r"dims=\(8,\) and depths=\(1, 2\) need one entry for each stage"):
        StarCnnExtractor(image(1, 20, 20), dims=(8,), depths=(1, 2))
    with pytest.raises(ValueError, match="StarExtractor: depth must be at least 1, got 0"):
        StarExtractor(spaces.Box(-1, 1, (3,)), depth=0)
