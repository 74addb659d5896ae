"""Structure of the package: no import circle, and one place that decides what runs."""

import ast
import itertools
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch

from starlayers import StarBlock, dispatch, star_mlp, use_backend

PACKAGE = Path(__file__).parent.parent / "starlayers"
FILES = {
    ".".join(("starlayers", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): ast.parse(f.read_text())
    for f in sorted(PACKAGE.rglob("*.py"))
}


def imported(module, tree):
    """Yield (imported module of ours, True if a function imports it) of a file."""

    def walk(node, inside):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((a.name, inside) for a in node.names if a.name.startswith("starlayers"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starlayers"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in FILES else node.module), inside
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from ((name, inside) for name, inside in walk(tree, False) if name != module)


GRAPH = {module: list(imported(module, tree)) for module, tree in FILES.items()}


def test_no_file_imports_itself_by_way_of_others():
    """Imports inside functions count: none of them may hold a circle open."""
    graph = {module: {name for name, _ in names} for module, names in GRAPH.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_functions_import_only_what_needs_another_package():
    late = {(m, name) for m, names in GRAPH.items() for name, inside in names if inside}
    assert {name for _, name in late if not name.startswith("starlayers.kernels.device")} == {
        "starlayers.commands.vision",  # the extras of the room
        "starlayers.datasets.image_folder",  # pillow
        "starlayers.rl.contrib",  # sb3-contrib
        "starlayers.vision.cost",  # torchvision and timm's conventions, for `starlayers info`
        "starlayers.vision.models",
    }


#: what a decision between fused and eager asks -> files that may ask it; attributes with a dot
QUESTIONS = {
    "HAS_TRITON": {"plans", "kernels.registration"},
    ".triton": {"dispatch", "plans"},
    "closed_form": {"activations", "dispatch", "plans"},
    "_has_any_global_hook": {"dispatch"},
    "_forward_hooks": {"dispatch", "tracing"},
    "_get_tracing_state": {"dispatch", "tracing"},
    "peek_interpreter_stack": {"dispatch"},
    "MIN_ROWS": {"plans"},
    "MIN_ELEMENTS_STAR": {"dispatch", "plans"},
    "MIN_HIDDEN_BYTES_TRAINING": {"dispatch", "plans"},
    "mlp_tile": {"plans", "kernels.star_mlp_launch", "kernels.tiles"},
    "mlp_backward_tiles": {"plans", "kernels.star_mlp_launch"},
}


#: what decides, or what a decision is made from
DECIDING = {
    "calls_directly", "declined", "exporting", "is_plain", "launches_directly",
    "linear", "plain_weights", "rules_blocks_out", "rules_convolution_out", "rules_kernels_out",
    "plan_block", "plan_convolution", "plan_early", "plan_mlp", "plan_star", "is_transformed",
}  # fmt: skip


def test_layers_get_their_plans_from_dispatch_alone():
    imported = {
        (module, node.module, alias.name)
        for module, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in DECIDING
    }
    assert {source for _, source, _ in imported} == {"starlayers.dispatch"}
    assert {name for _, _, name in imported} == DECIDING
    assert set(dispatch.__all__) == DECIDING | {
        "FORWARDS",
        "Plan",
        "forget_plans",
        "has_global_hooks",
    }


@pytest.mark.parametrize("question", QUESTIONS)
def test_one_file_decides_what_runs(question):
    asking = {
        module.removeprefix("starlayers.")
        for module, tree in FILES.items()
        for node in ast.walk(tree)
        if question in (getattr(node, "id", ""), (attr := getattr(node, "attr", "")), f".{attr}")
    }
    assert asking == QUESTIONS[question]


def walk(call):
    """Return the files of the library that a call enters, in order, until its kernel."""
    files, arrived = [], []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and not arrived and PACKAGE in Path(code.co_filename).parents:
            files.append(code.co_filename)
            arrived.extend([True] * (code.co_name == "blocked_forward"))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert arrived
    return [name for name, after in itertools.pairwise(files) if name != after]


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_call_that_was_met_before_is_a_short_walk_to_the_kernel(backend):
    block, x = StarBlock(8).requires_grad_(False), torch.ones(300, 8)
    f1, f2, g = block.mlp.children()
    weights = (f1.weight, f1.bias, f2.weight, f2.bias, g.weight, g.bias)
    with use_backend(backend):
        for call, most in ((lambda: block(x), 8), (lambda: star_mlp(x, *weights), 7)):
            call()
            assert len(walk(call)) == most
