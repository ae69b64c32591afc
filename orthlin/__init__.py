"""Orthogonalize matrices, fully or at low rank, on any array library."""

from orthlin import errors, metrics, schedules, sketch, steppers
from orthlin.lowrank import LowRankOrth, lowrank_orth, lowrank_orth_factors
from orthlin.polar import PolarResult, matrix_sign, orthogonalize, polar
from orthlin.qr import QRResult, qr
from orthlin.rangefinder import adaptive_range_finder, randomized_range_finder

__version__ = "0.1.0"

__all__ = [
    "LowRankOrth",
    "PolarResult",
    "QRResult",
    "adaptive_range_finder",
    "errors",
    "lowrank_orth",
    "lowrank_orth_factors",
    "matrix_sign",
    "metrics",
    "orthogonalize",
    "polar",
    "qr",
    "randomized_range_finder",
    "schedules",
    "sketch",
    "steppers",
]
