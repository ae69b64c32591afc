"""Benchmarks of orthlin: one module a layer, `ratios` for what is compared call by call, `counts` for devices."""
