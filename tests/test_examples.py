"""What every example has: a paragraph, a help with defaults, a bar, less than 120 lines."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(p.stem for p in EXAMPLES.glob("[!_]*.py"))
BAR = re.compile(
    r"_report\.bar|_text\.train|progress_bar=True|trange|search\(|import .*train(?:_command)?$",
    re.M,
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_short_and_says_what_to_expect(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 120
    title, paragraph, commands = text.split('"""')[1].split("\n\n")[:3]
    assert len(title.splitlines()) <= 2
    assert 20 < len(paragraph.split()) < 120
    assert re.search(r"\b(second|minute)s?\b", title + paragraph + commands)
    assert commands.startswith(f"python examples/{name}.py")
    assert BAR.search(text)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_has_the_paragraph_and_a_default_for_every_option(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    title = (EXAMPLES / f"{name}.py").read_text().split('"""')[1].split("\n")[0]
    assert title in shown
    options = re.findall(r"^\W*(--.*)$", shown, re.M)
    assert len(options) > 2
    for option in options:
        assert "default" in option or option.startswith("--help"), option


@pytest.mark.slow
def test_a_text_without_paragraphs_is_told_what_a_row_is(tmp_path):
    (tmp_path / "my.txt").write_text("A line.\n" * 4000)
    asked = [sys.executable, str(EXAMPLES / "nlp_generate.py"), "--data", "my.txt"]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    message = " ".join(re.sub(r"[│╭╰─╮╯]", " ", done.stderr).split())
    assert done.returncode == 2
    assert "each paragraph is one row: put an empty line between paragraphs" in message
    assert "1 rows are too few" in message
    assert not (tmp_path / "runs").exists()


def test_table_and_figure(tmp_path, capsys):
    report = runpy.run_path(str(EXAMPLES / "_report.py"))
    report["table"](
        ("model", "accuracy", "note"), [("a", "9.5%", "x"), ("star", "10.25%", "")], "title"
    )
    assert capsys.readouterr().out == (
        "\ntitle\nmodel  accuracy  note\na          9.5%  x\nstar     10.25%\n"
    )
    figure, ax = report["axes"]()
    report["lines"](ax, {"loss": ([1, 2], [3, 4])}, "steps", "loss")
    report["save"](figure, tmp_path / "new" / "loss.png")
    assert capsys.readouterr().out == f"figure: {tmp_path / 'new' / 'loss.png'}\n"
    assert (tmp_path / "new" / "loss.png").stat().st_size > 1000


def test_threads_of_an_example_wait_without_spinning():
    said = (
        "import sys; sys.path.insert(0, 'examples'); import _report, os; "
        "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=EXAMPLES.parent, capture_output=True, text=True
    )
    assert done.stdout == "passive\n", done.stderr
    for name in PROGRAMS:
        imported = re.findall(r"^import (\w+)", (EXAMPLES / f"{name}.py").read_text(), re.M)
        assert next(m for m in imported if m not in sys.stdlib_module_names) == "_report", name
