"""Optimizers for PyTorch: the steps of `orthlin.steppers` as full citizens of `torch.optim`."""

from orthlin.torch.optim import MSGD, PAPER, LowRankMSGD, LowRankMuon, Muon
from orthlin.torch.views import MatrixView

__all__ = ["MSGD", "PAPER", "LowRankMSGD", "LowRankMuon", "MatrixView", "Muon"]
