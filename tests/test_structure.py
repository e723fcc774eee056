"""The architecture as a test: rooms import downward only, files stay readable, the public surface is documented."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Bottom to top; a room may import rooms of earlier rows only. A module beside the rooms counts as one.
ROWS = (
    ("errors", "figures", "kernels", "logs"),
    ("schema", "values", "storage"),
    ("config", "model", "paging", "texts"),
    ("streaming",),
    ("methods", "recovery", "output"),
    ("planning",),
    ("pipeline",),
    ("verification", "reports", "tasks"),
    ("commands",),
    ("cli",),
)
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
WIDEST = 12  # modules of a folder
PACKAGE = ROOT / "streamprune"
FILES = sorted([*PACKAGE.rglob("*.py"), *ROOT.joinpath("kernels").rglob("*.py")], key=str)
SCRIPTS = sorted([*ROOT.joinpath("tests").rglob("*.py"), *ROOT.joinpath("bench").rglob("*.py")], key=str)
FACES = PACKAGE / "__init__.py", PACKAGE / "__main__.py"  # above everything
# A docstring begins with a verb or a noun: these begin with neither, and leave the reader to guess what is meant.
NO_BEGINNING = """
what which who whose why when where how whether if that those these this it its such some all every each both none one
also not up of by in as from to at on for with without under after before
"""
TEMPLATE = PACKAGE / "output" / "_ragged_template.py"  # its text is in checkpoints: it stays as it is


def dotted(file):
    """A file's module, without the package's name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("kernels", *parts[2:]) if parts[0] == "kernels" else parts[1:]
    return ".".join(parts).removesuffix(".__init__")


MODULES = {dotted(file) for file in FILES}


def imported(file):
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "streamprune":
            assert node.module and node.level == 0
            module = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{module}.{alias.name}".lstrip(".")
                yield full if full in MODULES else module
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("streamprune."))


def room_of(module):
    return module.partition(".")[0]


@pytest.mark.parametrize("file", [file for file in FILES if file not in FACES], ids=dotted)
def test_imports_run_downward(file):
    room = room_of(dotted(file))
    for module in imported(file):
        other = room_of(module)
        assert other == room or RANK[other] < RANK[room], f"{dotted(file)} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    graph = {dotted(file): {module for module in imported(file) if module != dotted(file)} for file in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)  # it raises CycleError


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES if "kernels" not in file.parts}), ids=str)
def test_folders_are_no_wider_than_a_newcomer_can_see(folder):
    assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= WIDEST


def test_no_public_name_stands_for_two_things():
    """Functions, classes and constants; what one file takes from another is the same thing."""
    homes = {}
    for file in FILES:
        for node in ast.parse(file.read_text()).body:
            names = [getattr(node, "name", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            for name in names:
                if name and not name.startswith("_"):
                    homes.setdefault(name, set()).add(dotted(file))
    twice = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert all(file.startswith("kernels.") for file in twice.pop("launch")), "how each kernel starts"
    assert twice == {}


def test_tests_mirror_the_rooms():
    """`kernel` for kernels: a folder `kernels` on the path would be taken for the ecosystem's package."""
    rooms = {room for row in ROWS for room in row if (PACKAGE / room).is_dir()} | {"kernel"}
    tests = ROOT / "tests"
    assert {each.name for each in tests.iterdir() if each.is_dir() and each.name != "__pycache__"} == rooms
    assert {file.name for file in tests.glob("test_*.py")} == {"test_structure.py", "test_docs.py"}


def test_kernels_import_only_torch_and_themselves():
    for file in ROOT.joinpath("kernels").rglob("*.py"):
        assert {room_of(module) for module in imported(file)} <= {"kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the ecosystem's package `kernels`"


@pytest.mark.parametrize("file", [*FILES, *SCRIPTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_files_fit(file):
    assert len(file.read_text().splitlines()) < 400


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_functions_fit(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 75, node.name


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_public_things_have_docstrings(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("file", [file for file in FILES if file != TEMPLATE], ids=dotted)
def test_docstrings_begin_with_a_verb_or_a_noun(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (said := ast.get_docstring(node)):
            word = said.split()[0].strip(",:;.").lower()
            assert word not in NO_BEGINNING.split(), f"{getattr(node, 'name', 'the module')}: {said.splitlines()[0]}"


def test_no_pickle_is_ever_loaded():
    for file in FILES:
        text = file.read_text()
        for word in ("torch.load(", "pickle.load", "import pickle"):
            assert word not in text, f"{file}: {word}"
