"""Every family of solvers on the trained digits network: evaluations against trajectory error and sample quality.

    python benchmarks/digits_network.py --output benchmarks/results/digits_network.json --figure docs/digits.png

The truth of the trajectory error is a tight solve of the *network's* flow, in float64, from the same noise. Quality is against the 360
held-out digits: sliced Wasserstein-2 in the 16 principal components of the training digits, and how often a classifier
trained on them (scikit-learn's SVC) reads the class that was asked for. Real training digits show what is reachable.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor
from train_digits import split

import sdeflow as sf
from sdeflow.measure.errors import sliced_wasserstein
from sdeflow.measure.record import versions
from sdeflow.solvers.base import Solver

NETWORKS = Path(__file__).parents[1] / "tests" / "data" / "digits"
STEPS = (5, 10, 20, 40)


def ode_solvers() -> dict[str, list[Solver]]:
    """Solvers of the flow; several calls a step get fewer steps."""
    one_call = {
        "DDIM": sf.DDIM,
        "DEIS-3": lambda steps: sf.DEIS(order=3, steps=steps),
        "DPM-Solver++2M": lambda steps: sf.DPMSolverPP(order=2, steps=steps),
        "DPM-Solver++3M": lambda steps: sf.DPMSolverPP(order=3, steps=steps),
        "UniPC-3": lambda steps: sf.UniPC(order=3, steps=steps),
        "FixedAdams": lambda steps: sf.FixedAdams(steps=steps),
    }
    table: dict[str, list[Solver]] = {name: [make(steps=n) for n in STEPS] for name, make in one_call.items()}
    table["DPM-Solver-2"] = [sf.DPMSolver(order=2, steps=max(1, n // 2)) for n in STEPS]
    table["EDM Heun"] = [sf.EDMHeun(steps=math.ceil(n / 2)) for n in STEPS]
    table["Runge–Kutta 4"] = [sf.RungeKutta("rk4", steps=max(1, n // 4)) for n in STEPS[1:]]
    table["Adams, adaptive"] = [sf.Adams(rtol=e, atol=e) for e in (1e-1, 1e-2, 1e-3, 1e-4)]
    table["Dopri5, adaptive"] = [sf.Dopri5(rtol=e, atol=e) for e in (1e-1, 1e-2, 1e-3)]
    return table


def sde_solvers() -> dict[str, list[Solver]]:
    """Solvers of the reverse SDE, η = 1."""
    makers = {
        "DDPM": sf.DDPM,
        "Euler ancestral": sf.EulerAncestral,
        "SDE-DPM-Solver++2M": lambda steps: sf.DPMSolverPP(order=2, steps=steps, sde=True),
        "SA-Solver": lambda steps: sf.SASolver(steps=steps),
        "ER-SDE": sf.ERSDE,
    }
    return {name: [make(steps=n) for n in STEPS[1:]] for name, make in makers.items()}


class Judge:
    """Sample quality against the held-out digits."""

    def __init__(self):
        self.train, self.classes, self.held_out, self.labels = split()
        flat = self.train.flatten(1).numpy()
        self.classifier = SVC().fit(flat, self.classes.numpy())
        self.components = PCA(16, random_state=0).fit(flat)
        self.truth = self.project(self.held_out)

    def project(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.components.transform(images.flatten(1).numpy())).double()

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        images = images.float().reshape(-1, 1, 8, 8)
        read = self.classifier.predict(images.flatten(1).numpy())
        distance = sliced_wasserstein(self.project(images), self.truth)
        return {"sliced_wasserstein": distance, "accuracy": float((read == labels.numpy()).mean())}


def run(predict: sf.Prediction, exact: sf.Prediction, labels: Tensor, judge: Judge) -> list[dict]:
    """All rows of one network; `exact` is the same network in float64, for the reference.

    In float32 the network's rounding looks like roughness to an adaptive solver, and tight tolerances cannot be reached.
    """
    noise = predict.process.prior((len(labels), 1, 8, 8), seed=1)
    flow, rows = sf.ProbabilityFlowODE(predict), []
    tight = sf.solve(sf.ProbabilityFlowODE(exact), sf.Adams(rtol=1e-7, atol=1e-7), noise.double())
    again = sf.solve(sf.ProbabilityFlowODE(exact), sf.Adams(rtol=1e-6, atol=1e-6), noise.double())
    agreement = (tight.x - again.x).square().mean().sqrt().item()

    def row(name: str, equation: sf.Equation, solver: Solver | None, found: sf.Solution, error: float | None) -> None:
        entry = {"solver": name, "equation": "ode" if equation is flow else "sde", "settings": repr(solver)}
        entry |= {"evaluations": found.evaluations.double().mean().item(), "trajectory_error": error}
        rows.append(entry | judge(found.x, labels))
        shown = "" if error is None else f"{error:9.2e}"
        print(
            f"{name:20s} {entry['evaluations']:6.1f} {shown:9s} {rows[-1]['sliced_wasserstein']:.3f} "
            f"{rows[-1]['accuracy']:.3f}",
            flush=True,
        )

    row("reference", flow, sf.Adams(rtol=1e-7, atol=1e-7), tight, agreement)
    for name, settings in ode_solvers().items():
        for solver in settings:
            found = sf.solve(flow, solver, noise)
            row(name, flow, solver, found, (found.x - tight.x).square().mean().sqrt().item())
    reverse = sf.ReverseSDE(predict, eta=1.0)
    for name, settings in sde_solvers().items():
        for solver in settings:
            row(name, reverse, solver, sf.solve(reverse, solver, noise, seed=2), None)
    return rows


def picture(path: Path, predict_at, judge: Judge) -> None:
    """Ten classes across: real digits, then samples (guidance scale 2) of several solvers from the same noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = torch.arange(10)
    guided = predict_at(labels, guidance_scale=2.0)
    noise = guided.process.prior((10, 1, 8, 8), seed=5)
    solvers = {
        "Adams 1e-4": sf.Adams(rtol=1e-4, atol=1e-4),
        "UniPC-3, 20": sf.UniPC(order=3, steps=20),
        "UniPC-3, 8": sf.UniPC(order=3, steps=8),
        "DDIM, 8": sf.DDIM(steps=8),
    }
    real = torch.stack([judge.held_out[judge.labels == k][0] for k in labels])
    lines = {"held out": real}
    lines |= {name: sf.solve(sf.ProbabilityFlowODE(guided), s, noise).x for name, s in solvers.items()}
    figure, axes = plt.subplots(len(lines), 10, figsize=(7, 0.72 * len(lines)), squeeze=False)
    for own, (name, images) in zip(axes, lines.items(), strict=True):
        for axis, image in zip(own, images, strict=True):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        own[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every family of solvers on the trained digits network.")
    parser.add_argument("--network", choices=("noise", "v"), default="noise")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    judge = Judge()
    labels = judge.labels[: given.samples]
    folder = NETWORKS / given.network

    def predict_at(labels: Tensor, **options) -> sf.Prediction:
        return sf.diffusers.from_pretrained(str(folder), class_labels=labels, null_label=10, **options).prediction

    real = judge(judge.train[: given.samples], judge.classes[: given.samples])
    print(f"real digits: sliced Wasserstein {real['sliced_wasserstein']:.3f}, accuracy on the training part", real)
    held = float((judge.classifier.predict(judge.held_out.flatten(1).numpy()) == judge.labels.numpy()).mean())
    print(f"classifier on held-out digits: {held:.4f}")
    with torch.no_grad():
        if given.figure:
            picture(given.figure, predict_at, judge)
        exact = predict_at(labels, load={"torch_dtype": torch.float64})
        rows = run(predict_at(labels), exact, labels, judge)
    if given.output:
        record = {
            "network": given.network,
            "samples": given.samples,
            "seed": 1,
            "device": "cpu",
            "versions": versions(),
            "floor_sliced_wasserstein": real["sliced_wasserstein"],
            "classifier_accuracy_held_out": held,
            "rows": rows,
        }
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
