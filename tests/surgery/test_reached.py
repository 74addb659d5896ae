"""What a forward can read is watched: a change of any of it is seen, and named."""

import collections
import functools
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers import starify, use_backend
from starlayers.surgery.snapshot import Snapshot
from tests.surgery.edited import SwiGLU

CONFIG = types.SimpleNamespace(scale=None)
HELD = [None]
LAYERS = ["gate_proj", "up_proj", "down_proj"]
settings = types.ModuleType("settings")
settings.scale = None
helpers = types.ModuleType("helpers")  # another file of the user's
exec(
    "C = None\ndef factor(): return C\ndef late():\n  try: return D\n  except NameError: pass",
    vars(helpers),
)
factor, late = helpers.factor, helpers.late
ARRAY = np.ones(2)


class Flags:
    scale = None


class Control:
    scale = None

    def get(self):
        return self.scale


class MyControl(Control):
    pass


CONTROL = MyControl()


def scaled(read, **members):
    """Return a subclass of an MLP that multiplies its product by what it reads, unless None."""

    def forward(self, x):
        h, c = self.product(x), read(self)
        return self.down_proj(h if c is None else c * h)

    base = type("Base", (SwiGLU,), {"forward": forward, "read": read, **members})
    return type("Mine", (base,), {})


def set_item(values, key, value):
    values[key] = value


def own(name, value=None):
    """Return members of a class with one attribute."""
    return {name: value}


N = types.SimpleNamespace

#: case -> how the forward reads a factor, members of its class, the change, and its words
CASES = {
    "the base's forward": (
        lambda s: None, {}, lambda m: setattr(type(m).__mro__[1], "forward", SwiGLU.product),
        "the forward of its class was replaced",
    ),
    "a method, new on the subclass": (
        lambda s: None, {}, lambda m: setattr(type(m), "product", lambda s, x: 3 * s.up_proj(x)),
        "Mine.product is new",
    ),
    "an attribute of the base, new on the subclass": (
        lambda s: s.scale, own("scale"), lambda m: setattr(type(m), "scale", 3.0),
        "Mine.scale is new",
    ),
    "a property, new on the subclass": (
        lambda s: s.scale, own("scale", property(lambda s: None)),
        lambda m: setattr(type(m), "scale", 3.0), "Mine.scale is new",
    ),
    "what was not in the class": (
        lambda s: getattr(s, "scale", None), {}, lambda m: setattr(type(m), "scale", 3.0),
        "Mine.scale is new",
    ),
    "a dict in the class": (
        lambda s: s.options["scale"], own("options", {"scale": None}),
        lambda m: m.options.update(scale=3.0),
        "Base.options is ('scale', 3.0), was ('scale', None)",
    ),
    "an object in the class": (
        lambda s: s.config.scale, own("config", N(scale=None)),
        lambda m: setattr(m.config, "scale", 3.0), "Base.config.scale is 3.0, was None",
    ),
    "a builtin in the class": (
        lambda s: s.fn and None, own("fn", torch.sigmoid),
        lambda m: setattr(type(m).__mro__[1], "fn", torch.relu), "Base.fn is relu, was sigmoid",
    ),
    "a cached method": (
        lambda s: s.factor(), own("factor", functools.lru_cache(None)(lambda s: None)),
        lambda m: setattr(type(m).__mro__[1], "factor", len), "Base.factor is len, was <lambda>",
    ),
    "__getattr__": (
        lambda s: s.factor,
        own("__getattr__", lambda s, k: None if k == "factor" else nn.Module.__getattr__(s, k)),
        lambda m: setattr(type(m).__mro__[1], "__getattr__", nn.Module.__getattr__),
        "Base.__getattr__ is Module.__getattr__, was <lambda>",
    ),
    "a global object": (
        lambda s: CONFIG.scale, {}, lambda m: setattr(CONFIG, "scale", 3.0),
        "the global CONFIG.scale is 3.0, was None",
    ),
    "a class attribute by a method of a global object": (
        lambda s: CONTROL.get(), {}, lambda m: setattr(Control, "scale", 3.0),
        "Control.scale is 3.0, was None",
    ),
    "a method, new on the class of a global object": (
        lambda s: CONTROL.get(), {}, lambda m: setattr(MyControl, "get", lambda s: 3.0),
        "MyControl.get is new",
    ),
    "a global class": (
        lambda s: Flags.scale, {}, lambda m: setattr(Flags, "scale", 3.0),
        "Flags.scale is 3.0, was None",
    ),
    "a global module": (
        lambda s: settings.scale, {}, lambda m: setattr(settings, "scale", 3.0),
        "the global settings.scale is 3.0, was None",
    ),
    "new in a global module": (
        lambda s: getattr(settings, "limit", None), {}, lambda m: setattr(settings, "limit", 3.0),
        "the global settings.limit is new",
    ),
    "a global of another file": (
        lambda s: factor(), {}, lambda m: setattr(helpers, "C", 3.0),
        "the global C is 3.0, was None",
    ),
    "a global that was not there": (
        lambda s: late(), {}, lambda m: setattr(helpers, "D", 3.0), "the global D is new",
    ),
    "a list in a list": (
        lambda s: s.held[0][0], own("held", [[None]]), lambda m: set_item(m.held[0], 0, 3.0),
        "Base.held is ((3.0,),), was ((None,),)",
    ),
    "a deque": (
        lambda s: s.held[0], own("held", collections.deque([None])),
        lambda m: set_item(m.held, 0, 3.0), "Base.held is (3.0,), was (None,)",
    ),
    "an array": (
        lambda s: ARRAY[0], {}, lambda m: set_item(ARRAY, 0, 3.0),
        "values of the global ARRAY were changed",
    ),
    "deep in a config": (
        lambda s: s.a.b.c.d.e.f, own("a", N(b=N(c=N(d=N(e=N(f=None)))))),
        lambda m: setattr(m.a.b.c.d.e, "f", 3.0), "Base.a.b.c.d.e.f is 3.0, was None",
    ),
    "the code of a helper": (
        lambda s: factor(), {}, lambda m: setattr(factor, "__code__", (lambda: 3.0).__code__),
        "the code of factor is another function, was another function",
    ),
    "a function of PyTorch": (
        lambda s: F.silu and None, {}, lambda m: setattr(F, "silu", torch.relu),
        "the global F.silu is relu, was silu",
    ),
    "calls of linear layers": (
        lambda s: None, {}, lambda m: setattr(nn.Linear, "__call__", F.relu),
        "the call of nn.Linear is relu, was Module._wrapped_call_impl",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_it_was():
    """Undo what the changes do to classes and modules."""
    holders = [F, settings, helpers, CONFIG, Flags, Control, MyControl]
    before = [(holder, dict(vars(holder))) for holder in holders]
    code = factor.__code__
    yield
    factor.__code__ = code
    ARRAY[:] = 1
    if "__call__" in vars(nn.Linear):
        del nn.Linear.__call__
    for holder, values in before:
        for key in [key for key in vars(holder) if key not in values]:
            delattr(holder, key)
        for key, value in values.items():
            if vars(holder)[key] is not value:
                setattr(holder, key, value)


def snapshot_of(mlp):
    return Snapshot(mlp, type(mlp).forward, LAYERS)


@pytest.mark.parametrize("name", CASES)
def test_a_change_is_seen_and_named(name):
    read, members, change, words = CASES[name]
    mlp = scaled(read, **members)()
    snapshot, unread = snapshot_of(mlp), snapshot_of(SwiGLU())
    before = SwiGLU.forward
    assert snapshot.change(mlp) == ""
    mlp(torch.ones(2, 16)).sum().backward()
    assert snapshot.change(mlp) == ""
    change(mlp)
    assert snapshot.change(mlp) == words
    assert SwiGLU.forward is before
    if "PyTorch" not in name and "linear" not in name:
        assert unread.change(unread.module) == ""


def test_the_forward_of_a_base_that_is_called_by_super():
    class Base(SwiGLU):
        def forward(self, x):
            return super().forward(x)

    class Mine(Base):
        def forward(self, x):
            return super().forward(x)

    mlp = Mine()
    snapshot = snapshot_of(mlp)
    Base.forward = F.relu
    assert snapshot.change(mlp).startswith("Base.forward is relu, was ")


def test_a_default_that_is_changed_in_place():
    class Mine(SwiGLU):
        def forward(self, x, _state=[1.0]):  # noqa: B006
            return _state[0] * super().forward(x)

    mlp = Mine()
    snapshot = snapshot_of(mlp)
    Mine.forward.__defaults__[0][0] = 3.0
    words = "values in __defaults__ of "
    assert snapshot.change(mlp).startswith(words)
    assert snapshot.change(mlp).endswith("is ((3.0,),), was ((1.0,),)")


def test_names_that_no_code_reads_do_not_count():
    class Mine(SwiGLU):
        config = N(scale=None, other=N(deep=1))

        def forward(self, x):
            return super().forward(x) if self.config.scale is None else x

    mlp = Mine()
    snapshot = snapshot_of(mlp)
    mlp.unread = Mine.other_unread = Mine.config.unread = 1
    assert snapshot.change(mlp) == ""


def test_containers_of_containers_are_served():
    class Mine(SwiGLU):
        def forward(self, x):
            return super().forward(x) if self.options else x

    mlp = Mine()
    mlp.options = [{"a": {"b": None}}, [[], [1]], collections.deque()]
    expected, x = mlp(torch.ones(9, 16)).detach(), torch.ones(9, 16)
    star = starify(mlp, mode="fuse")
    with use_backend("cpu"):
        torch.testing.assert_close(star(x), expected)
    star.options[0]["a"]["b"] = 1
    assert "'b', 1" in star.star_plan(x).reason
