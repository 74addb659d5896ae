"""Marks transformers' tests `hf`; a test that skips has to be on the list in skips.py."""

from pathlib import Path

import pytest

from tests.nlp.hf import skips

SKIPPED = pytest.StashKey[bool]()
HERE = Path(__file__).parent
#: of each family, in the quick tier
QUICK = "test_save_load"

# marks transformers puts on its tests, unknown to this project otherwise
MARKS = """accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test generate
is_expert_parallel_test is_fsdp_test is_tensor_parallel_test is_training_test
torch_compile_test torch_export_test openvino_export_test"""


def pytest_configure(config):
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: of transformers' tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents and item.name != QUICK:
            item.add_marker(pytest.mark.hf)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if not _family(item) or report.when == "teardown":
        return report
    entry = skips.entry(item.cls.__name__, item.name)
    item.stash[SKIPPED] = item.stash.get(SKIPPED, False) or report.skipped
    of_a_subtest = call.start == call.stop == 0  # their reports come first
    problem = None
    if report.skipped and entry is None:
        problem = f"skips and is not in skips.py: {report.longrepr[2]}"
    ran = report.when == "call" and report.passed and not item.stash[SKIPPED]
    if ran and not of_a_subtest and entry and entry.always:
        problem = "is in skips.py and does not skip"
    if problem:
        report.outcome, report.longrepr = "failed", f"{item.nodeid} {problem}"
    return report


def _family(item):
    return hasattr(getattr(item, "cls", None), "makes_inputs")
