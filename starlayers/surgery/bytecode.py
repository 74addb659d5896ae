"""Names that code can read: attributes, strings, globals, imports, and names that it makes."""

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

#: functions that take the name of an attribute
BY_NAME = ("getattr", "hasattr")
#: instructions that call a function; Python 3.11 has a pair of them, of which the first counts
CALLS = ("PRECALL",) if "PRECALL" in dis.opmap else ("CALL", "CALL_FUNCTION")


class Names(NamedTuple):
    """Names in a code and in the functions inside of it.

    Args:
        read: names of attributes and globals, and all strings.
        variables: names of globals.
        imports: modules that it imports as it runs, with the level of relative imports.
        makes: True if it asks for an attribute by a name that it makes as it runs.
    """

    read: frozenset[str]
    variables: frozenset[str]
    imports: frozenset[tuple[str, int]]
    makes: bool


@lru_cache(maxsize=4096)
def names_of(code: CodeType) -> Names:
    """Return the names that a code can read.

    Example:
        >>> names = names_of((lambda x: getattr(x, "scale") * LIMIT).__code__)
        >>> sorted(names.read), sorted(names.variables), names.makes
        (['LIMIT', 'getattr', 'scale'], ['LIMIT', 'getattr'], False)
        >>> names_of((lambda x, name: getattr(x, name)).__code__).makes
        True
    """
    steps = list(dis.get_instructions(code))
    read = {*code.co_names, *_strings(code.co_consts)}
    variables = {s.argval for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    levels = [steps[max(i - 2, 0)].argval for i in range(len(steps))]
    imports = {
        (step.argval, level if isinstance(level, int) else 0)
        for step, level in zip(steps, levels)
        if step.opname == "IMPORT_NAME"
    }
    by_name = [i for i, s in enumerate(steps) if s.argval in BY_NAME and s.argval in variables]
    makes = any(not _name_is_constant(steps, i) for i in by_name)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = names_of(constant)
            read |= inner.read
            variables |= inner.variables
            imports |= inner.imports
            makes = makes or inner.makes
    return Names(frozenset(read), frozenset(variables), frozenset(imports), makes)


def _strings(constants: object) -> Iterator[str]:
    if isinstance(constants, str):
        yield constants
    elif isinstance(constants, (tuple, frozenset)):
        for constant in constants:
            yield from _strings(constant)


def _name_is_constant(steps: list[dis.Instruction], place: int) -> bool:
    """Return True if the function loaded at a place is called with a constant as second argument.

    Values on the stack are counted; a branch among the arguments ends the count, with False.
    """
    depth, second = 0, None
    for step in steps[place + 1 :]:
        if step.opname in CALLS and depth == step.arg:
            return second is not None and second.opname == "LOAD_CONST"
        if "JUMP" in step.opname:
            return False
        depth += dis.stack_effect(step.opcode, step.arg)
        if depth == 2:
            second = step
        if depth < 0:
            return False
    return False
