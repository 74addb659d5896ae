"""State of a network that a CUDA graph of it was captured from, and which must not change."""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from starlayers.dispatch import is_plain
from starlayers.kernels.versions import versions

__all__ = ["NetworkState"]


class NetworkState:
    """Modules, settings and tensors of a network without hooks, to be compared with it later.

    It is compared before every replay of a graph. So it is laid out as a few long lists: those of
    StarNet-S4, 300 modules, take 0.1 ms, where a loop over the modules took 1.2 ms. Holding the
    tensors keeps others from their addresses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.kinds: list[Any] = list(map(type, self.modules))
        self.forwards = {kind: kind.forward for kind in self.kinds}
        self.attributes = [m.__dict__ for m in self.modules]
        lists = [d[name] for d in self.attributes for name in ("_parameters", "_buffers")]
        lists += [m._modules for m in self.modules]
        self.lists = [items for items in lists if items]
        attached = [v for d in self.attributes for k, v in d.items() if k.endswith("_hooks")]
        self.empty = [d for d in (*lists, *attached) if not d]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.memory = [t.detach() for t in self.tensors]
        self.known = self._settings(), self._items(), self._places()
        self.values = self._values()

    def same_memory(self) -> bool:
        """Return True if modules, settings and addresses are as they were; values may differ."""
        settings, items, places = self.known
        now = self._items()
        if len(now) != len(items) or not all(map(is_, now, items)) or any(self.empty):
            return False
        if list(map(type, self.modules)) != self.kinds or self._places() != places:
            return False
        if any(kind.forward is not own for kind, own in self.forwards.items()):
            return False
        if not is_plain(self.modules[0], self.kinds[0]):  # global hooks
            return False
        try:
            return self._settings() == settings
        except (RuntimeError, ValueError):  # a tensor or an array in the place of a setting
            return False

    def same(self) -> bool:
        """Return True if the values of all tensors are as they were, too."""
        return self.same_memory() and self._values() == self.values

    def _settings(self) -> list[Any]:
        return _contents(self.attributes)

    def _items(self) -> list[Any]:
        """Return parameters, buffers and children of all modules."""
        return _contents(self.lists)

    def _places(self) -> list[Any]:
        places: list[Any] = list(map(Tensor.data_ptr, self.tensors))
        # the layout too: `w.data = w.data.t()` keeps the address
        return places + list(map(Tensor.stride, self.tensors))

    def _values(self) -> tuple[Any, ...]:
        return versions(()), list(map(attrgetter("_version"), self.tensors))


def _contents(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))
