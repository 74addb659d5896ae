"""Structure of the package: no import circle, and one place that decides what runs."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

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
        "starlayers.datasets.image_folder",  # pillow
        "starlayers.rl.contrib",  # sb3-contrib
        "starlayers.vision.cost",  # torchvision and timm's conventions, for `starlayers info`
        "starlayers.vision.models",
    }


#: what a decision between fused and eager asks -> files that may ask it
QUESTIONS = {
    "HAS_TRITON": {"dispatch", "kernels.registration"},
    "TRITON_ACTIVATIONS": {"dispatch", "kernels.registration"},
    "closed_form": {"dispatch", "activations"},
    "_has_any_global_hook": {"dispatch"},
    "_get_tracing_state": {"dispatch"},
    "peek_interpreter_stack": {"dispatch"},
    "MIN_ROWS": {"dispatch"},
    "MIN_ELEMENTS_STAR": {"dispatch"},
    "MIN_HIDDEN_BYTES_TRAINING": {"dispatch"},
    "mlp_tile": {"dispatch", "kernels.star_mlp_launch"},
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_one_file_decides_what_runs(question):
    asking = {
        module.removeprefix("starlayers.")
        for module, tree in FILES.items()
        for node in ast.walk(tree)
        if question in (getattr(node, "id", None), getattr(node, "attr", None))
    }
    assert asking == QUESTIONS[question]


def test_layers_get_their_plans_from_dispatch():
    deciders = {"plan_mlp", "plan_star", "plan_block", "plain_weights", "is_plain", "declined"}
    sources = {
        node.module
        for tree in FILES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and deciders & {a.name for a in node.names}
    }
    assert sources == {"starlayers.dispatch"}
