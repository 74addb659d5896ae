"""Settings and state that a forward may ask for and nothing shows."""

from collections.abc import Collection

from torch import nn

from starlayers.surgery.entries import HOOKS, names_in_code, parts_of
from starlayers.surgery.reached import unwatched

#: names of what neither a graph nor a snapshot shows, wherever a forward may reach them
NAMES = frozenset(
    {
        *HOOKS,
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
        # processes
        "get_backend",
        "get_rank",
        "get_world_size",
        "is_initialized",
        "is_torchelastic_launched",
        # settings of PyTorch
        "allow_tf32",
        "backends",
        "get_default_device",
        "get_deterministic_debug_mode",
        "get_float32_matmul_precision",
        "get_num_threads",
        "get_rng_state",
        "initial_seed",
        "is_anomaly_enabled",
        "is_deterministic_algorithms_warn_only_enabled",
        "is_in_onnx_export",
        "is_profiler_enabled",
        "max_memory_allocated",
        "mem_get_info",
        "memory_allocated",
        "memory_reserved",
        # Python
        "__dict__",
        "__import__",
        "attrgetter",
        "eval",
        "exec",
        "getEffectiveLevel",
        "globals",
        "import_module",
        "isEnabledFor",
        "vars",
    }
)


#: the same, but for what libraries ask for as they work: an obstacle in classes of parts alone
IN_PARTS = frozenset(
    {
        "are_deterministic_algorithms_enabled",
        "environ",
        "get_default_dtype",
        "getenv",
        "geterr",
        "getrecursionlimit",
        "is_compiling",
        "is_dynamo_compiling",
        "is_exporting",
        "is_torchdynamo_compiling",
        "is_tracing",
        "is_warn_always_enabled",
        "isenabled",
        "requires_grad",
    }
)
#: and in the class of the module alone
FRAMES = frozenset({"_getframe", "currentframe"})


def unseen(module: nn.Module, apart: Collection[str]) -> str:
    """Return in words what a forward may ask for and nothing shows, "" if there is nothing.

    Parts named in `apart` are called, whatever they are.

    Example:
        >>> __name__ = "mine"  # a module that is not the library's
        >>> import torch.distributed as dist
        >>> class Reduces(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x if dist.is_initialized() else x
        >>> unseen(Reduces(), ())
        "its forward may ask for 'is_initialized', which no graph shows"
    """
    reason, names = unwatched(module, apart)
    in_parts = frozenset[str]().union(
        *(names_in_code(type(part)) for _, part in parts_of(module, apart))
    )
    own = names_in_code(type(module))
    if asked := NAMES & (names | in_parts) | IN_PARTS & in_parts | FRAMES & own:
        return f"its forward may ask for {min(asked)!r}, which no graph shows"
    return reason
