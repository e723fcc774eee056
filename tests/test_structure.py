"""The architecture as a test: imports run strictly downward, files stay readable, the public surface is documented."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Bottom to top; a module may import what is in an earlier row.
ROWS = (
    ("errors", "figures", "kernels"),
    ("readers", "values", "file_kinds", "tensor_names"),
    ("records",),
    ("documents",),
    ("text_files", "data_sets"),
    ("config",),
    ("windows", "sources", "calibration"),
    ("checkpoint", "families", "ragged", "_ragged_template", "_verify_child"),
    ("model_config", "quantisation"),
    ("contents",),
    ("skeleton", "corpus", "devices", "writer", "capture"),
    ("paging", "activations"),
    ("binding", "inputs", "compressed"),
    ("sweep", "state"),
    ("stores", "allocation"),
    ("statistics",),
    ("methods",),
    ("slim", "evaluate", "report"),
    ("compensate", "output", "companions", "progress"),
    ("plan",),
    ("footprint",),
    ("texts",),
    ("rates",),
    ("planner", "resume"),
    ("job",),
    ("facts",),
    ("run",),
    ("verify", "demo", "options"),
    ("cli",),
)
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}
FILES = sorted(
    [*ROOT.joinpath("streamprune").rglob("*.py"), *ROOT.joinpath("kernels").rglob("*.py")], key=lambda file: str(file)
)
SCRIPTS = sorted([*ROOT.joinpath("tests").rglob("*.py"), *ROOT.joinpath("bench").rglob("*.py")], key=str)


def module_of(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported(file):
    """Modules of the package that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "streamprune":
            assert node.module and node.level == 0
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("streamprune."))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downward(file):
    module = module_of(file)
    if module == "__init__":
        return  # the package's own face, above everything
    for name in imported(file):
        assert name == module or RANK[name] < RANK[module], f"{module} imports {name}"


def test_kernels_import_only_torch_and_themselves():
    for file in ROOT.joinpath("kernels").rglob("*.py"):
        assert set(imported(file)) <= {"kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the ecosystem's package `kernels`"


@pytest.mark.parametrize("file", [*FILES, *SCRIPTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_files_fit(file):
    assert len(file.read_text().splitlines()) < 400


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_fit(file):
    text = file.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_things_have_docstrings(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_no_pickle_is_ever_loaded():
    for file in FILES:
        text = file.read_text()
        for word in ("torch.load(", "pickle.load", "import pickle"):
            assert word not in text, f"{file}: {word}"
