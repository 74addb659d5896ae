"""Programs: launches that were recorded, to be repeated without what came between them."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from starlayers.kernels.registration import INTERPRET, Launch

__all__ = ["Program"]

#: arguments by which a kernel of this library names what it writes
OUTPUTS = ("y", "parts")


class Step(NamedTuple):
    """Launch of a program, with places for the tensors that differ from call to call."""

    #: launches the compiled kernel: grid, stream, handle, metadata, hooks, arguments
    run: Callable[..., object]
    arguments: list[Any]
    #: position in the arguments -> number of the tensor that goes there
    places: tuple[tuple[int, int], ...]
    #: numbers of the tensors that are allocated before, and of those that are free afterwards
    made: tuple[tuple[int, Callable[[], Tensor]], ...]
    freed: tuple[int, ...]


class Program:
    """Launches that were recorded on an input `x` with the result `y`, to be repeated on others.

    Every tensor among their arguments is `x`, an output of one of them, or constant: weights and
    what was computed from them, which the program keeps alive. Calls share nothing that changes,
    so that threads may run a program at the same time.

    Raises:
        ValueError: something else, such as a cast, computed a part of the result.
    """

    def __init__(self, launches: Sequence[Launch], x: Tensor, y: Tensor) -> None:
        numbers = {x.data_ptr(): 0}
        allocations: list[Callable[[], Tensor]] = [lambda: x]
        places: list[tuple[tuple[int, int], ...]] = []
        for launch in launches:
            for name, t in zip(launch.kernel.arg_names, launch.arguments, strict=True):
                if name in OUTPUTS and t.numel() and t.data_ptr() not in numbers:
                    numbers[t.data_ptr()] = len(allocations)
                    allocate = partial(torch.empty, t.shape, dtype=t.dtype, device=t.device)
                    allocations.append(allocate)
            places.append(
                tuple(
                    (i, numbers[t.data_ptr()])
                    for i, t in enumerate(launch.arguments)
                    if isinstance(t, Tensor) and t.data_ptr() in numbers
                )
            )
        self.stream = _stream_function()
        self.size, self.result = len(allocations), len(allocations) - 1
        used = [{number for _, number in step} for step in places]
        uses = Counter(number for step in used for number in step)
        # written and read; `x` is only read, and the result only written
        linked = uses[0] and all(uses[number] > 1 for number in range(1, self.result))
        if not (linked and numbers.get(y.data_ptr()) == self.result):
            raise ValueError("something other than the launches computed a part of the result")
        self.steps: list[Step] = []
        for i, launch in enumerate(launches):
            new = used[i].difference(*used[:i]) - {0}
            freed = used[i].difference(*used[i + 1 :]) - {self.result}
            made = tuple((number, allocations[number]) for number in sorted(new))
            template = list(launch.arguments)
            for position, _ in places[i]:
                template[position] = None  # else the tensors of the recording would stay
            self.steps.append(Step(_runner(launch), template, places[i], made, tuple(freed)))

    def __call__(self, x: Tensor) -> Tensor:
        """Run the program on `x`, which has shape, dtype and alignment of the recorded input."""
        tensors: list[Any] = [None] * self.size
        tensors[0] = x
        stream = self.stream()
        for run, template, places, made, freed in self.steps:
            for number, allocate in made:
                tensors[number] = allocate()
            arguments = template.copy()
            for position, number in places:
                arguments[position] = tensors[number]
            run(stream, arguments)
            for number in freed:
                tensors[number] = None
        return tensors[self.result]  # type: ignore[no-any-return]


def _runner(launch: Launch) -> Callable[[Any, list[Any]], object]:
    """Return a function of a stream and arguments that launches the kernel again."""
    if not INTERPRET:
        from starlayers.kernels.device.compiled import repeated

        return repeated(launch.compiled, launch.grid)
    kernel, grid, options = launch.kernel, launch.grid, launch.options
    return lambda stream, arguments: kernel[grid](*arguments, **options)


def _stream_function() -> Callable[[], Any]:
    if INTERPRET:
        return lambda: None
    from starlayers.kernels.device.compiled import stream

    return stream
