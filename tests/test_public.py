"""What a user sees: names, signatures, docstrings, what an import costs, and what is in the package."""

import ast
import inspect
import random
import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata, resources
from pathlib import Path

import numpy as np
import pytest
import torch

import orthlin
from orthlin import errors

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "orthlin").rglob("*.py"))
MODULES = (
    "errors",
    "metrics",
    "schedules",
    "sketch",
    "steppers",
)  # public modules; the other public names are functions
HOMES = ("lowrank", "polar", "qr", "rangefinder")  # where those functions live

SIGNATURES = """
lowrank_orth(G, r, /, *, n_iter, n_oversamples, sketch, test_matrix, method, tol, precision, rng)
lowrank_orth_factors(G, r, /, *, n_iter, n_oversamples, sketch, test_matrix, method, tol, precision, rng)
orthogonalize(A, /, *, method, schedule, tol)
polar(A, /, *, side, method)
matrix_sign(A, /, *, method, schedule)
qr(A, /, *, method)
randomized_range_finder(A, rank, /, *, n_oversamples, n_iter, normalizer, sketch, test_matrix, rng)
adaptive_range_finder(A, /, *, tol, block_size, max_rank, failure_probability, rng)
sketch.gaussian(n, width, /, *, like, rng)
sketch.sparse_sign(n, width, /, *, like, rng, nonzeros)
sketch.columns(n, width, /, *, like, rng)
"""
RESULTS = {
    orthlin.QRResult: ("Q", "R"),
    orthlin.PolarResult: ("U", "H"),
    orthlin.LowRankOrth: ("Q", "W"),
    orthlin.metrics.TailBound: ("bound", "failure_probability"),
    orthlin.steppers.State: ("step", "momentum", "right", "skipped", "fading"),
    orthlin.steppers.Stepper: ("init", "update"),
}


def module(name):
    return import_module(f"orthlin.{name}")


def public_callables():
    """Every public function, class and method by its dotted name, the errors aside."""
    found = {name: getattr(orthlin, name) for name in orthlin.__all__ if name not in MODULES}
    for name in MODULES[1:]:
        found |= {f"{name}.{key}": getattr(module(name), key) for key in module(name).__all__}
    schedule = orthlin.schedules.Schedule
    methods = {key: value for key, value in vars(schedule).items() if inspect.isfunction(value) and key[0] != "_"}
    return found | {f"schedules.Schedule.{key}": value for key, value in methods.items()}


PUBLIC = public_callables()
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def defined_in(namespace):
    """Functions and classes of orthlin in a namespace that have a public name."""
    own = {key: value for key, value in vars(namespace).items() if inspect.isfunction(value) or inspect.isclass(value)}
    return {key: value for key, value in own.items() if value.__module__.startswith("orthlin") and key[0] != "_"}


# names and signatures ----------------------------------------------------------------------------


def test_all_of_the_package_is_what_its_parts_offer():
    offered = [name for home in HOMES for name in module(home).__all__]
    assert sorted(orthlin.__all__) == sorted([*offered, *MODULES])
    assert set(defined_in(orthlin)) == set(offered)


@pytest.mark.parametrize("name", MODULES)
def test_all_of_a_public_module_is_what_it_defines_or_takes_from_private_ones(name):
    home, homes = module(name), {key: getattr(module(name), key).__module__ for key in module(name).__all__}
    assert len(homes) == len(home.__all__)
    assert {key for key, value in defined_in(home).items() if value.__module__ == home.__name__} <= set(homes)
    for private in set(homes.values()) - {home.__name__}:
        assert private.startswith("orthlin._")
        offered = getattr(import_module(private), "__all__", None)
        assert offered is None or set(offered) == {key for key, value in homes.items() if value == private}


@pytest.mark.parametrize("line", SIGNATURES.split("\n")[1:-1])
def test_signatures_are_those_of_the_design(line):
    signature = inspect.signature(FUNCTIONS[line.partition("(")[0]])
    bare = [p.replace(annotation=p.empty, default=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == line[line.index("(") :]


@every_function
def test_arrays_are_positional_only_and_everything_after_a_slash_is_keyword_only(name):
    kinds = {key: parameter.kind for key, parameter in inspect.signature(FUNCTIONS[name]).parameters.items()}
    arrays = [kind for key, kind in kinds.items() if re.fullmatch("[A-Z]", key)]
    assert all(kind is inspect.Parameter.POSITIONAL_ONLY for kind in arrays)
    scalars_too = name.startswith(
        ("schedules.", "steppers.", "metrics.hmt", "metrics.posterior")
    )  # no array, nothing to confuse
    assert scalars_too or inspect.Parameter.POSITIONAL_OR_KEYWORD not in kinds.values()


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result.__name__)
def test_results_are_named_tuples_of_our_own(result):
    assert issubclass(result, tuple)
    assert result._fields == RESULTS[result]
    assert result.__module__.startswith("orthlin.")


def test_the_hermitian_factor_has_a_second_name():
    result = orthlin.polar(np.eye(2))
    assert result.P is result.H


# docstrings --------------------------------------------------------------------------------------


def sections(docstring):
    """The body of every numpydoc section; "" is what stands before the first."""
    parts = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def documented(section):
    """The names that stand before the colons of a section, without indentation."""
    heads = [line.partition(" :")[0] for line in section.splitlines() if line[:1].strip()]
    return [name for head in heads for name in re.split(r", ", head)]


def raisers():
    """Names of functions of the package that raise an error of ours, or call one that does."""
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    calls = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            called = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
            calls.setdefault(node.name, set()).update(getattr(f, "id", getattr(f, "attr", "")) for f in called)
    found = {name for name in errors.__all__ if name.endswith("Error")}
    while new := {name for name, called in calls.items() if called & found} - found:
        found |= new
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_the_summary_is_one_sentence(name):
    summary = sections(PUBLIC[name].__doc__)[""].split("\n\n")[0]
    assert summary.endswith(".")
    assert summary.count("\n") == 0


@every_function
def test_every_parameter_is_documented_and_nothing_else(name):
    parameters = [key for key in inspect.signature(FUNCTIONS[name]).parameters if key != "self"]
    described = documented(sections(FUNCTIONS[name].__doc__).get("Parameters", ""))
    assert sorted(described) == sorted(parameters)


@every_function
def test_returns_and_an_example_are_documented(name):
    found = sections(FUNCTIONS[name].__doc__)
    assert found["Returns"].strip()
    assert ">>> " in found["Examples"]


@every_function
def test_what_validates_documents_its_errors(name):
    raised = documented(sections(FUNCTIONS[name].__doc__).get("Raises", ""))
    assert set(raised) <= set(errors.__all__)
    assert raised or name.rpartition(".")[2] not in raisers()


@pytest.mark.parametrize("result", [*RESULTS, orthlin.schedules.Schedule], ids=lambda result: result.__name__)
def test_the_fields_of_results_are_documented(result):
    found = sections(result.__doc__)
    fields = getattr(result, "_fields", None) or [*result.__dataclass_fields__]
    assert documented(found.get("Attributes") or found["Parameters"]) == list(fields)


# import, package, randomness ---------------------------------------------------------------------

IMPORT = """
import sys
def refuse(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http", "subprocess"):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(refuse)
import orthlin
print(sorted({"torch", "jax", "cupy", "array_api_strict", "scipy", "matplotlib"} & set(sys.modules)))
"""


def test_an_import_loads_no_array_library_but_numpy_and_touches_no_network():
    run = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_the_version_is_that_of_the_project_file_and_of_the_installation():
    assert orthlin.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert orthlin.__version__ == metadata.version("orthlin")


def test_the_package_holds_a_gradient_that_loads_without_pickle_and_declares_its_types():
    home = resources.files("orthlin")
    with (home / "data" / "gpt2_gradient.npy").open("rb") as file:
        gradient = np.load(file, allow_pickle=False)
        assert file.tell() < 2**20
    assert gradient.ndim == 2
    assert gradient.dtype.kind == "f"
    assert np.isfinite(gradient).all()
    assert (home / "py.typed").is_file()


def random_calls(node):
    """What is called as np.random.x, numpy.random.x, cupy.random.x, torch.x or random.x, and its keywords."""
    name = ast.unparse(node.func)
    keywords = {key.arg for key in node.keywords}
    return re.sub(r"^np\.", "numpy.", name), keywords


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_calls_a_global_random_generator(path):
    tree = ast.parse(path.read_text())
    assert not any("random" in (a.name for a in n.names) for n in ast.walk(tree) if isinstance(n, ast.Import))
    explicit = {"default_rng", "Generator", "SeedSequence"}
    for name, keywords in map(random_calls, (n for n in ast.walk(tree) if isinstance(n, ast.Call))):
        if re.fullmatch(r"(numpy|cupy)\.random\.\w+", name):
            assert name.rpartition(".")[2] in explicit
        # weights of models come from the global state of torch: they are drawn in a copy of it
        forked = path.parent.name == "train" and name in {"torch.random.fork_rng", "torch.manual_seed"}
        drawn = r"torch\.(manual_seed|seed|set_rng_state|rand\w*_like)|torch\.random\..*"
        assert forked or not re.fullmatch(drawn, name)
        if re.fullmatch(r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial)", name):
            assert keywords & {"generator", None}  # None: options that hold the generator


@pytest.mark.parametrize("rng", [None, 7])
@pytest.mark.parametrize("asarray", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_no_call_reads_or_writes_the_global_random_state(asarray, rng):
    A = asarray(np.diag(np.arange(1.0, 9.0)))

    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    orthlin.lowrank_orth(A, 2, rng=rng)
    orthlin.randomized_range_finder(A, 2, sketch="sparse_sign", rng=rng)
    orthlin.adaptive_range_finder(A, tol=3.0, block_size=2, rng=rng)
    orthlin.sketch.columns(8, 4, like=A, rng=rng)
    assert state() == before
