"""What `import orthlin` costs, beside the libraries it needs anyway."""

IMPORTS = ["orthlin", "orthlin.torch", "orthlin.jax", "floor: numpy", "floor: torch", "floor: jax"]


class Time:
    version = "1"
    params = IMPORTS
    param_names = ["module"]
    rounds = 1
    repeat = 5
    number = 1

    def timeraw_import(self, name: str) -> str:
        return f"import {name.removeprefix('floor: ')}"
