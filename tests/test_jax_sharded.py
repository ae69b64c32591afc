"""Arrays of JAX that lie on several devices: XLA places the collectives, none larger than what has r rows."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

M, N, R = 96, 160, 8
RUN = r"""
import json, re, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import orthlin
from orthlin import steppers
from orthlin.jax import gradient_transformation

M, N, R = map(int, sys.argv[1:])
gaussian = lambda seed, *shape: np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
mesh = Mesh(np.asarray(jax.devices()), ("parts",))
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
COLLECTIVE = r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("

def judge(function, plain, cut):
    compiled = jax.jit(function).lower(*cut).compile()
    sizes = [
        sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shapes))
        for shapes, _ in re.findall(COLLECTIVE, compiled.as_text())
    ]
    pairs = zip(*(jax.tree.leaves(x) for x in (compiled(*cut), jax.jit(function)(*plain))), strict=True)
    off = max(np.abs(np.asarray(x, np.float64) - np.asarray(y)).max() / max(np.abs(y).max(), 1e-30) for x, y in pairs)
    return {"sizes": sizes, "off": float(off)}

G, omega = jax.numpy.asarray(gaussian(0, M, N)), jax.numpy.asarray(gaussian(1, N, R))
stepper = steppers.muon(0.1, rank=R, warm_start=True, tail="auto", tol=0.1)
tree = {"a": G, "b": jax.numpy.asarray(gaussian(2, M, N)), "c": jax.numpy.asarray(gaussian(3, N, M))}
transformation = gradient_transformation(stepper)
found = {}
for side, spec in {"rows": ("parts", None), "columns": (None, "parts")}.items():
    cut = put(G, *spec)
    for tol in (None, 0.1):
        found[f"lowrank_orth, {tol}, {side}"] = judge(
            lambda G, W, tol=tol: orthlin.lowrank_orth(G, R, test_matrix=W, tol=tol),
            (G, omega), (cut, put(omega, spec[1], None)),
        )
    found[f"stepper, {side}"] = judge(stepper.update, (G, stepper.init(G), G), (cut, stepper.init(cut), cut))
    parts = {name: put(x, *(spec if name != "c" else spec[::-1])) for name, x in tree.items()}
    found[f"tree, {side}"] = judge(
        transformation.update, (tree, transformation.init(tree), tree), (parts, transformation.init(parts), parts)
    )
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", RUN, *map(str, (M, N, R))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CALLS = [f"{what}, {side}" for what in ("lowrank_orth, None", "lowrank_orth, 0.1", "stepper", "tree")
         for side in ("rows", "columns")]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_what_moves_between_devices_has_r_rows(found, call):
    sizes = found[call]["sizes"]
    matrices = 3 if "tree" in call else 1
    assert sizes
    assert len(sizes) <= 7
    assert sum(sizes) <= matrices * (R * N + N + 4 * R * R + 8)  # of M N in each, which is 8 times that


@pytest.mark.parametrize("call", CALLS)
def test_the_values_are_those_of_one_device(found, call):
    assert found[call]["off"] <= 2e-5
