"""Optimizers for PyTorch: the steps of `orthlin.steppers` as full citizens of `torch.optim`."""

from orthlin.torch.optim import MSGD, LowRankMSGD, LowRankMuon, Muon
from orthlin.torch.views import MatrixView

__all__ = ["MSGD", "LowRankMSGD", "LowRankMuon", "MatrixView", "Muon"]
