"""Layer of torch optimizers: a step on the parameters of GPT-2 124M, random, with random gradients."""

from typing import Any

from .common import clock, library

FUSED, FOREACH = {"fused": True}, {"foreach": True}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LowRankMuon rank=64": ("LowRankMuon", {"rank": 64, "adamw": FUSED}),
    "LowRankMuon rank=64 foreach": ("LowRankMuon", {"rank": 64, "adamw": FOREACH}),
    "LowRankMuon": ("LowRankMuon", {"adamw": FUSED}),
    "LowRankMuon paper": ("LowRankMuon", {"rank": 64, "paper": True, "adamw": FUSED}),
    "LowRankMSGD rank=64": ("LowRankMSGD", {"rank": 64, "adamw": FUSED}),
    "peer: AdamW fused": ("AdamW", FUSED),
    "peer: AdamW foreach": ("AdamW", FOREACH),
}
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "Muon": ("Muon", {"adamw": FUSED}),
    "MSGD": ("MSGD", {"adamw": FUSED}),
    "peer: torch.optim.Muon": ("torch.optim.Muon", FUSED),
}
FLOOR = {"floor: products, AdamW fused": ("floor", FUSED)}
BLOCK = {"qkv": (2304, 768), "projection": (768, 768), "up": (3072, 768), "down": (768, 3072)}
VECTORS = (2304, 768, 3072, 768, 768, 768, 768, 768)
LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 768, 50257, 1024


def parameters(device: str) -> tuple[list[Any], list[Any]]:
    """Matrices of the blocks, and everything else, each with a gradient: 32 directions above noise."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Any:
        p = torch.nn.Parameter((0.02 * torch.randn(*shape, generator=generator)).to(device))
        left, right = (torch.randn(size, 32, generator=generator) for size in (shape[0], shape[-1]))
        known = left @ right.T if len(shape) > 1 else 0
        p.grad = (1e-3 * (torch.randn(*shape, generator=generator) + known)).to(device)
        return p

    matrices = [parameter(*shape) for _ in range(LAYERS) for shape in BLOCK.values()]
    vectors = [parameter(n) for _ in range(LAYERS) for n in VECTORS]
    return matrices, [parameter(VOCABULARY, WIDTH), parameter(CONTEXT, WIDTH), *vectors]


class Products:
    """Three bare products of rank 64 with every matrix: of the step of low rank what no way saves."""

    def __init__(self, matrices: list[Any], rank: int = 64) -> None:
        import torch

        self.given = []
        for p in matrices:
            for G in p.grad.split(WIDTH) if p.shape[0] == BLOCK["qkv"][0] else [p.grad]:
                left, right = (torch.randn(size, rank, device=G.device) for size in G.shape)
                self.given.append((G, left, right, torch.empty_like(G)))

    def step(self) -> None:
        for G, left, right, out in self.given:
            _ = G @ right
            out.addmm_(left, left.mT @ G, beta=0)


def optimizers(name: str, matrices: list[Any], others: list[Any]) -> list[Any]:
    """Optimizers that together step everything."""
    import torch

    import orthlin.torch

    kind, options = (OPTIMIZERS | SLOW | FLOOR)[name]
    if kind == "floor":
        return [Products(matrices), torch.optim.AdamW(others, **options)]
    if kind == "AdamW":
        return [torch.optim.AdamW(matrices + others, **options)]
    if kind == "torch.optim.Muon":
        return [torch.optim.Muon(matrices), torch.optim.AdamW(others, **options)]
    options = {k: v for k, v in options.items() if k != "paper"} | (orthlin.torch.PAPER if "paper" in options else {})
    qkv = [p for p in matrices if p.shape[0] == BLOCK["qkv"][0]]
    groups = [
        {"params": qkv, "algorithm": "orthogonal", "view": {"splits": 3}},
        {"params": [p for p in matrices if p.shape[0] != BLOCK["qkv"][0]], "algorithm": "orthogonal"},
        {"params": others, "algorithm": "adamw"},
    ]
    return [getattr(orthlin.torch, kind)(groups, **options)]


class _Step:
    version = "1"
    timeout = 600
    rounds = 1
    repeat = (5, 12, 8.0)
    warmup_time = 0
    param_names = ["device", "optimizer"]
    ready: tuple[str, ...] = ()

    def setup(self, device: str, name: str) -> None:
        """Make the optimizers; the first step makes the state of AdamW."""
        if self.ready == (device, name):
            return
        lib = library({"cpu": "torch", "cuda": "torch:cuda"}[device])
        self.wait = lib.wait
        self.optimizers = optimizers(name, *parameters(device))
        self.step()
        self.timer = clock(lib.name)
        self.ready = (device, name)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.wait(None)


class Time(_Step):
    params = [["cpu", "cuda"], list(OPTIMIZERS)]

    def time_step(self, *_: str) -> None:
        self.step()

    def peakmem_step(self, *_: str) -> None:
        self.step()


class Slow(_Step):
    """On a CPU without units for bfloat16 a step of torch.optim.Muon takes minutes."""

    repeat = (1, 3, 20.0)
    min_run_count = 1
    params = [["cpu", "cuda"], list(SLOW)]

    def time_step(self, *_: str) -> None:
        self.step()
