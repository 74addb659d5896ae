"""Channels_last views: equal values, no copy where none is needed."""

from collections import OrderedDict

import torch
from torch import nn

from starlayers.vision import blocks
from starlayers.vision.layout import OnChannelsLast, to_channels_last

from .util import image


def test_channels_last_keeps_values_and_copies_only_other_layouts():
    x = image(2, 3, 4, 5)
    y = to_channels_last(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert to_channels_last(y).data_ptr() == y.data_ptr()


def test_channels_last_under_vmap():
    x = image(3, 2, 4, 5, 6)
    assert torch.equal(torch.func.vmap(to_channels_last)(x), x)


def test_layers_run_in_order_on_views_of_the_input():
    layers = OnChannelsLast(OrderedDict(conv=nn.Conv2d(4, 6, 3), act=nn.Tanh()))
    x, seen = image(2, 5, 7, 4), []
    layers.conv.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    want = torch.tanh(layers.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    torch.testing.assert_close(layers(x), want)
    assert want.shape == (2, 3, 5, 6)
    assert seen[-1].data_ptr() == x.data_ptr()


def test_networks_pickled_as_a_whole_find_the_class_under_its_old_path():
    assert blocks.OnChannelsLast is OnChannelsLast
