"""Draw the two figures of the README from stored results: speed on a GPU, and what training ends at.

    python asv_bench/readme.py

Speed is that of `results/gpu-h200.json`, the losses those of the first table of `docs/training.md`.
"""

import json
import re
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
mpl.rcParams.update({"axes.titlesize": 10, "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
CASE = "4096x4096, r = 256, bfloat16"
BARS = {
    "torch.optim.Muon's iteration": "torch.optim.Muon's iteration",
    "orthogonalize tol=0.2": "orthogonalize, tol=0.2",
    "lowrank_orth": "lowrank_orth, to full accuracy",
    "lowrank_orth tol=0.1 medium": "lowrank_orth, tol=0.1, bfloat16",
    "three products": "its three products alone",
}
LINES = {
    "plain": ("low-rank Muon of the paper", "C1"),
    "feedback": ("with error feedback, as Dion", "C2"),
    "low rank": ("LowRankMuon", "C0"),
}
WIDTH = 128


def losses() -> dict[str, dict[int, float]]:
    """Mean final loss by method and rank, rank 0 where a method has none."""
    found: dict[str, dict[int, float]] = {}
    for line in (DOCS / "training.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        row = re.fullmatch(r"(AdamW|full Muon|low rank|plain|feedback) ?(\d+)?(?: of \d+)?", cells[0])
        if row and re.fullmatch(r"\d\.\d{4}", cells[4 if len(cells) > 4 else 0]):
            found.setdefault(row[1], {})[int(row[2] or 0)] = float(cells[4])
    return found


def main() -> None:
    """Draw `docs/_static/readme.png`."""
    stored = json.loads((HERE / "results" / "gpu-h200.json").read_text())
    times = {fact["of"]: fact["graph"] / 1e3 for fact in stored["facts"] if fact.get("time") == CASE}
    figure, (speed, training) = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    bars = speed.barh(
        list(BARS.values()), [times[name] for name in BARS], color=["C1", "C0", "C0", "C0", "0.6"], height=0.6
    )
    speed.bar_label(bars, fmt="%.2f", padding=3)
    speed.set(title=f"4096 x 4096, rank 256, bfloat16: ms on an {stored['facts'][0]['device']}", xlim=(0, 3.8))
    speed.invert_yaxis()
    found = losses()
    for name, (label, color) in LINES.items():
        ranks = sorted(found[name])
        training.plot([r / WIDTH for r in ranks], [found[name][r] for r in ranks], "o-", color=color, label=label)
    for name, style in {"full Muon": "-", "AdamW": ":"}.items():
        training.axhline(found[name][0], color="0.3", linewidth=1, linestyle=style, label=name)
    training.set(title="GPT-2, 0.8 M parameters: loss after 2,000 steps", xlabel="rank / width", xscale="log")
    training.set_xticks([1 / 16, 1 / 8, 1 / 4, 1 / 2], ["1/16", "1/8", "1/4", "1/2"])
    training.minorticks_off()
    training.legend(frameon=False, fontsize=8)
    for axis in (speed, training):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "_static" / "readme.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
