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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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


def load(target: str, labels: Tensor, **options) -> sf.Prediction:
    """The trained network, conditioned on labels (batch,)."""
    folder = str(NETWORKS / target)
    return sf.diffusers.from_pretrained(folder, class_labels=labels, null_label=10, **options).prediction


def solved(target: str, samples: int, solver: Solver, eta: float) -> sf.Solution:
    """One solve of the float32 network: a job for a process of its own."""
    torch.set_num_threads(1)
    predict = load(target, split()[3][:samples])
    noise = predict.process.prior((samples, 1, 8, 8), seed=1)
    with torch.no_grad():
        return sf.solve(sf.ReverseSDE(predict, eta=eta), solver, noise, seed=2 if eta else None)


def reference(target: str, samples: int, traced: int, tolerance: float) -> sf.Solution:
    """A tight solve of the first `traced` samples with the network in float64.

    In float32 its rounding looks like roughness to an adaptive solver, and tight tolerances cannot be reached.
    """
    exact = load(target, split()[3][:traced], load={"torch_dtype": torch.float64})
    noise = exact.process.prior((samples, 1, 8, 8), seed=1)[:traced].double()
    with torch.no_grad():
        return sf.solve(sf.ProbabilityFlowODE(exact), sf.Adams(rtol=tolerance, atol=tolerance), noise)


def run(target: str, samples: int, traced: int, workers: int, judge: Judge) -> tuple[list[dict], float]:
    """All rows of one network, and the distance between two references."""
    labels = judge.labels[:samples]
    jobs = [(name, 0.0, solver) for name, settings in ode_solvers().items() for solver in settings]
    jobs += [(name, 1.0, solver) for name, settings in sde_solvers().items() for solver in settings]
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tight, again = (pool.submit(reference, target, samples, traced, tolerance) for tolerance in (1e-6, 1e-5))
        found = [pool.submit(solved, target, samples, solver, eta) for _, eta, solver in jobs]
        truth = tight.result().x
        agreement = (again.result().x - truth).square().mean().sqrt().item()
        print(f"two references differ by {agreement:.1e}; evaluations {tight.result().evaluations.double().mean():.0f}")
        for (name, eta, solver), job in zip(jobs, found, strict=True):
            solution = job.result()
            error = None if eta else (solution.x[:traced] - truth).square().mean().sqrt().item()
            evaluations = solution.evaluations.double().mean().item()
            entry = {"solver": name, "eta": eta, "settings": repr(solver), "evaluations": evaluations}
            rows.append(entry | {"trajectory_error": error} | judge(solution.x, labels))
            shown = "" if error is None else f"{error:9.2e}"
            quality = f"{rows[-1]['sliced_wasserstein']:.3f} {rows[-1]['accuracy']:.3f}"
            print(f"{name:20s} {evaluations:6.1f} {shown:9s} {quality}", flush=True)
    return rows, agreement


def picture(path: Path, target: str, judge: Judge) -> None:
    """Ten classes across: real digits, then samples (guidance scale 2) of several solvers from the same noise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = torch.arange(10)
    guided = load(target, labels, guidance_scale=2.0)
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


def page(record: dict) -> str:
    """The record as a page of the docs."""
    lines = [
        "# Solvers on a trained network",
        "",
        f"The class-conditional U-Net of `tests/data/digits/{record['network']}` (225 thousand parameters, 8×8 pixels, trained by",
        "`benchmarks/train_digits.py`), without guidance. Made by `benchmarks/digits_network.py` from",
        "`benchmarks/results/digits_network.json`; seed, versions and settings are in that file.",
        "",
        "![Held-out digits, and samples of several solvers from the same noise](digits.png)",
        "",
        f"- {record['samples']} samples, classes as in the held-out digits. Trajectory error: RMS distance of the first "
        f"{record['traced']} to a tight solve",
        "  of the network's own flow in float64 from the same noise; two such solves (tolerances 1e-6 and 1e-5) differ by",
        f"  {record['references_differ_by']:.1e}. Pixels lie in [−1, 1].",
        "- SW: sliced Wasserstein-2 to the 360 held-out digits in 16 principal components. As many real training digits show",
        f"  {record['floor_sliced_wasserstein']:.3f}: near that a sampler cannot be told from the data. (Their classes are random; the samples'",
        "  are the held-out ones, so that they may lie a little lower.)",
        "- Accuracy: how often scikit-learn's SVC reads the class that was asked for; on held-out digits it reads "
        f"{100 * record['classifier_accuracy_held_out']:.1f} %.",
        "- NFE is counted at the network, mean a sample.",
        "",
        "| solver | equation | NFE | trajectory error | SW | accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["rows"]:
        error = "" if row["trajectory_error"] is None else f"{row['trajectory_error']:.1e}"
        equation = "reverse SDE" if row["eta"] else "flow"
        lines.append(
            f"| {row['solver']} | {equation} | {row['evaluations']:.0f} | {error} | {row['sliced_wasserstein']:.3f} "
            f"| {100 * row['accuracy']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Every family of solvers on the trained digits network.")
    parser.add_argument("--network", choices=("noise", "v"), default="noise")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--traced", type=int, default=40, help="samples whose trajectory error is measured")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--page", type=Path, help="write the docs page; from --output alone when that exists")
    given = parser.parse_args()
    if given.page and given.output and given.output.exists():
        given.page.write_text(page(json.loads(given.output.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    judge = Judge()
    real = judge(judge.train[: given.samples], judge.classes[: given.samples])
    held = float((judge.classifier.predict(judge.held_out.flatten(1).numpy()) == judge.labels.numpy()).mean())
    print(f"real digits: sliced Wasserstein {real['sliced_wasserstein']:.3f}; classifier on held-out digits {held:.4f}")
    if given.figure:
        with torch.no_grad():
            picture(given.figure, given.network, judge)
    rows, agreement = run(given.network, given.samples, given.traced, given.workers, judge)
    record = {
        "network": given.network,
        "samples": given.samples,
        "traced": given.traced,
        "seed": 1,
        "device": "cpu",
        "versions": versions(),
        "floor_sliced_wasserstein": real["sliced_wasserstein"],
        "classifier_accuracy_held_out": held,
        "references_differ_by": agreement,
        "rows": rows,
    }
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.page:
        given.page.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
