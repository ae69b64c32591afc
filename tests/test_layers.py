"""The walls of the house, read off the syntax trees of the sources."""

import ast
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "orthlin"
LAYERS = (
    {"errors", "_minimax"},
    {"_backend.arrays", "_backend.libraries", "_schedule"},
    {"_backend.derivative", "_backend.loop", "_backend.random", "_backend.settings"},
    {"_backend.linalg", "_backend.powers"},
    {"_backend"},
    {"_checks", "_scaling", "_signs", "schedules"},
    {"_bounds", "_newton", "_residuals"},
    {"_derivatives", "metrics", "sketch"},
    {"qr", "_polynomial", "_gram"},
    {"rangefinder", "_factors", "_shards", "_unitary"},
    {"polar"},
    {"lowrank"},
    {"_direction"},
    {"steppers"},
    {"jax", "torch.views"},
    {"torch._adamw", "torch._blocks", "torch._maps", "torch._sharded"},
    {"torch._copies"},
    {"torch._pieces"},
    {"torch._notes", "torch._sums", "torch._ways", "torch._filled", "torch._stacks"},
    {"torch._owners"},
    {"torch._update"},
    {"torch._survey"},
    {"torch._groups", "torch._table"},
    {"torch._state", "torch._distributed"},
    {"torch._plan"},
    {"torch._orthogonal"},
    {"torch.optim"},
    {"torch"},
    {"torch.gpt2", "torch.train"},
    {"torch.train.config", "torch.train.data", "torch.train.files", "torch.train.world"},
    {
        "torch.train.captured",
        "torch.train.checkpoint",
        "torch.train.models",
        "torch.train.optimizers",
        "torch.train.report",
        "torch.train.table",
    },
    {"torch.train.loop", "torch.train.options"},
    {"torch.train.compare", "torch.train.single"},
    {"torch.train.__main__"},
    {"__init__"},
    {"__main__"},
)
ALGORITHMS = {
    "sketch", "_newton", "_derivatives", "_polynomial", "_gram", "_unitary", "_factors",
    "qr", "polar", "rangefinder", "lowrank",
}  # fmt: skip
RULER = {"metrics", "_residuals", "_bounds"}
LIBRARIES = {"torch", "jax", "cupy", "array_api_strict", "array_api_compat"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(path):
    *folders, name = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(folders if folders and name == "__init__" else [*folders, name])


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", SOURCES)


@cache
def tree(module):
    return ast.parse(SOURCES[module].read_text())


def imported(node):
    """The dotted names that an import statement may load: `from a import b` may load a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "relative import"
    return [f"{node.module}.{alias.name}" for alias in node.names]


def imports(module):
    statements = [node for node in ast.walk(tree(module)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return list(chain.from_iterable(map(imported, statements)))


def inner(module):
    """The modules of this package that `module` imports, each by the longest name that is a file."""
    names = set()
    for parts in (name.split(".") for name in imports(module)):
        if parts[0] == "orthlin":
            longest = max((n for n in range(1, len(parts)) if ".".join(parts[1 : n + 1]) in SOURCES), default=0)
            names.add(".".join(parts[1 : longest + 1]) or "__init__")
    return names


def level(module):
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def test_every_file_has_its_one_place():
    assert sorted(chain.from_iterable(LAYERS)) == sorted(SOURCES)


@every_module
def test_a_file_imports_only_from_strictly_lower_layers(module):
    assert {name for name in inner(module) if level(name) >= level(module)} == set()


@every_module
def test_the_backend_is_entered_by_its_one_door(module):
    assert module.startswith("_backend") or not any(name.startswith("_backend.") for name in inner(module))


@every_module
def test_array_libraries_are_imported_by_the_backend_alone(module):
    own = {module.split(".")[0]} & {"jax", "torch"}
    assert module.startswith("_backend") or not (LIBRARIES - own) & {name.split(".")[0] for name in imports(module)}


@pytest.mark.parametrize("module", [name for name in SOURCES if not name.startswith("torch")])
def test_array_libraries_are_imported_inside_functions(module):
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, FUNCTIONS)]
    lazy = set(chain.from_iterable(map(ast.walk, functions)))
    eager = [n for n in ast.walk(tree(module)) if isinstance(n, ast.Import | ast.ImportFrom) and n not in lazy]
    loaded = {name.split(".")[0] for name in chain.from_iterable(map(imported, eager))}
    assert not loaded & (LIBRARIES - {"array_api_compat"})


def test_the_ruler_and_what_it_measures_do_not_know_each_other():
    assert {(a, b) for a in ALGORITHMS for b in inner(a) & RULER} == set()
    assert {(a, b) for a in RULER for b in inner(a) & ALGORITHMS} == set()


@every_module
def test_no_assert_no_print_and_no_hidden_nan(module):
    nodes = list(ast.walk(tree(module)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not any(isinstance(node, ast.Assert) for node in nodes)
    assert "nan_to_num" not in names
    assert module.endswith("__main__") or "print" not in names


@every_module
def test_a_file_is_below_300_lines(module):
    assert len(SOURCES[module].read_text().splitlines()) < 300


def without_docstring(function):
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    return length - (first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0)


@every_module
def test_a_function_is_below_40_lines_without_its_docstring(module):
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, FUNCTIONS)]
    assert {f.name: without_docstring(f) for f in functions if without_docstring(f) >= 40} == {}
