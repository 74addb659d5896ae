"""State that nothing shows: refused by its name."""

import contextvars
import inspect
import itertools
import logging
import multiprocessing
import random
import sys
import threading
import time
import types
import weakref

import pytest
import torch.distributed as dist
from torch import get_default_dtype as default_dtype
from torch import get_num_threads as threads

from starlayers import starify
from starlayers.surgery.unseen import unseen
from tests.surgery.edited import SwiGLU

VARIABLE = contextvars.ContextVar("v", default=None)
logger = logging.getLogger("tests")


class Owner:
    scale = None


OWNER = Owner()


def reading(read, **attributes):
    """Return an MLP whose forward reads something."""
    members = {"forward": lambda self, x: SwiGLU.forward(self, x) if read(self) else x}
    mlp = type("Reads", (SwiGLU,), members)()
    vars(mlp).update(attributes)
    return mlp


CASES = {
    "an attribute's name is made": (lambda: reading(lambda s: getattr(s, f"{s.kind}_scale")),
                                    "by a name that it makes as it runs"),
    "weak reference": (lambda: reading(lambda s: s.ref().scale, ref=weakref.ref(OWNER)),
                       "may read 'ref', a ReferenceType"),
    "value of processes": (lambda: reading(lambda s: s.v.value, v=multiprocessing.Value("d", 1.0)),
                           "may read 'v', a Synchronized"),
    "value of a thread": (lambda: reading(lambda s: s.v.value, v=threading.local()),
                          "may read 'v', a _local"),
    "value of a context": (lambda: reading(lambda s: VARIABLE.get()),
                           "the global VARIABLE, a ContextVar"),
    "its method": (lambda: reading(lambda s: s.get(), get=VARIABLE.get), "'get', a ContextVar"),
    "in a config": (lambda: reading(lambda s: s.config.v.get(),
                                    config=types.SimpleNamespace(v=VARIABLE)), "'config.v', a"),
    "iterator": (lambda: reading(lambda s: next(s.steps), steps=itertools.count()), "a count"),
    "generator": (lambda: reading(lambda s: next(s.steps), steps=(i for i in ())), "a generator"),
    "random generator": (lambda: reading(lambda s: s.rng.random(), rng=random.Random(0)), "Random"),
    "hooks": (lambda: reading(lambda s: s._forward_hooks), "'_forward_hooks'"),
    "processes": (lambda: reading(lambda s: dist.is_initialized()), "'is_initialized'"),
    "level of a logger": (lambda: reading(lambda s: logger.isEnabledFor(10)), "'isEnabledFor'"),
    "another name": (lambda: reading(lambda s: threads() > 1), "'get_num_threads'"),
    "default dtype by another name": (
        lambda: reading(lambda s: default_dtype() == s), "'get_default_dtype'"
    ),
    "recursion": (lambda: reading(lambda s: sys.getrecursionlimit()), "'getrecursionlimit'"),
    "frames": (lambda: reading(lambda s: inspect.currentframe().f_back), "'currentframe'"),
    "time": (lambda: reading(lambda s: time.time()), "the time, of the module 'time'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_nothing_shows_is_named(name):
    make, words = CASES[name]
    assert words in unseen(make(), ["gate_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("an attribute's name is made", "by a name that it makes as it runs"),
        ("iterator", "may advance steps, an iterator"),
    ],
)
def test_it_is_refused_and_left_as_it_was(name, words):
    mlp = CASES[name][0]()
    with pytest.raises(ValueError, match=words):
        starify(mlp, mode="fuse")
    assert next(vars(mlp).get("steps", iter([0]))) == 0


def test_usual_forwards_are_seen_whole():
    mlp = reading(lambda s: logger.debug("it runs") or len(s.names), names=("a",), unread=VARIABLE)
    assert unseen(SwiGLU(), ()) == unseen(mlp, ()) == ""
