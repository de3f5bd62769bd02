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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
REFERENCES = (
    sf.FixedAdams(order=4, steps=1000, grid=sf.UniformLogSNR()),
    sf.RungeKutta("rk4", steps=400, chart=sf.PlainTime()),
)
"""The truth, and a solver of another kind on other steps to judge it by.

Even and many: the network's output wiggles in t with the periods of its time embedding (the shortest is 2π of 1000 times), by a thousandth or
so. An adaptive solver takes that for noise and steps over it, and so do all with fewer than some 200 steps.
"""
BUDGETS = (6, 10)
"""Evaluations a tuned solver is allowed; tuning itself takes 100 times as many, on samples of its own."""


def spread(make: Callable[..., Solver], calls: float = 1, steps: Sequence[int] = STEPS, **settings) -> list[Solver]:
    """The solver in as many steps as give about 5, 10, 20 and 40 evaluations."""
    return [make(steps=n, **settings) for n in sorted({max(1, math.ceil(n / calls)) for n in steps})]


def ode_solvers() -> dict[str, dict[str, list[Solver]]]:
    """Solvers of the flow, by family."""
    adaptive = (1e-1, 1e-2, 1e-3)
    return {
        "exponential": {
            "DDIM": spread(sf.DDIM),
            "DEIS-3": spread(sf.DEIS, order=3),
            "DPM-Solver-2": spread(sf.DPMSolver, 2, order=2),
            "DPM-Solver++2M": spread(sf.DPMSolverPP, order=2),
            "DPM-Solver++3M": spread(sf.DPMSolverPP, order=3),
            "UniPC-3": spread(sf.UniPC, order=3),
            "Stochastic Adams": spread(sf.StochasticAdams),
        },
        "Runge–Kutta": {
            "Heun": spread(partial(sf.RungeKutta, "heun"), 2),
            "RK4": spread(partial(sf.RungeKutta, "rk4"), 4, STEPS[1:]),
            "EDM Heun": spread(sf.EDMHeun, 2),
            "Dopri5, adaptive": [sf.Dopri5(rtol=e, atol=e) for e in adaptive],
            "Tsit5, adaptive": [sf.Tsit5(rtol=e, atol=e) for e in adaptive],
        },
        "Adams": {
            "FixedAdams": spread(sf.FixedAdams),
            "Adams, adaptive": [sf.Adams(rtol=e, atol=e) for e in (*adaptive, 1e-4)],
        },
        "torchdiffeq": {
            "torchdiffeq rk4": spread(partial(sf.TorchDiffEq, "rk4"), 4, STEPS[1:]),
            "torchdiffeq explicit Adams": spread(partial(sf.TorchDiffEq, "explicit_adams"), 1, STEPS[1:]),
            "torchdiffeq dopri5": [sf.TorchDiffEq("dopri5", rtol=e, atol=e) for e in adaptive],
        },
    }


def sde_solvers() -> dict[str, dict[str, list[Solver]]]:
    """Solvers of the reverse SDE, η = 1, by family."""
    tail, even = STEPS[1:], {"chart": sf.Trigonometric(), "grid": sf.UniformLogSNR()}
    return {
        "ancestral": {
            "DDPM": spread(sf.DDPM, 1, tail),
            "DDIM, η = 1": spread(sf.DDIM, 1, tail, eta=1.0),
            "Euler ancestral": spread(sf.EulerAncestral, 1, tail),
        },
        "exponential": {
            "SDE-DPM-Solver++2M": spread(sf.DPMSolverPP, 1, tail, order=2, sde=True),
            "SA-Solver": spread(sf.SASolver, 1, tail),
            "ER-SDE": spread(sf.ERSDE, 1, tail),
            "Stochastic Adams": spread(sf.StochasticAdams, 1, tail),
        },
        "EDM": {
            "EDM Heun, churn 8": spread(sf.EDMHeun, 2, tail, churn=8.0),
            "Restart": spread(sf.Restart, 4, tail),
        },
        "Adams": {"Adams, adaptive": [sf.Adams(rtol=e, atol=e) for e in (3e-1, 1e-1, 3e-2)]},
        "path": {
            "Euler–Maruyama": spread(sf.EulerMaruyama, 1, tail),
            "Stochastic Heun": spread(sf.StochasticHeun, 2, tail),
            "SEA": spread(sf.SEA, 1, tail, **even),
            "SRA1": spread(sf.SRA1, 2, tail, **even),
            "SRA3": spread(sf.SRA3, 3, tail, **even),
            "ShARK": spread(sf.ShARK, 2, tail, **even),
            "Exponential ShARK": spread(sf.ExponentialShARK, 2, tail, grid=sf.UniformLogSNR()),
            "ShARK, adaptive": [sf.ShARK(rtol=e, atol=e, chart=sf.Trigonometric()) for e in (1e-1, 3e-2)],
            "Gotta Go Fast": [sf.GottaGoFast(rtol=e, atol=0.1 * e) for e in (3e-1, 1e-1)],
        },
        "torchsde": {
            "torchsde euler": spread(partial(sf.TorchSDE, "euler"), 1, tail),
            "torchsde heun": spread(partial(sf.TorchSDE, "heun"), 2, tail),
            "torchsde srk": spread(partial(sf.TorchSDE, "srk"), 2, tail),
        },
    }


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
        images = images.float().nan_to_num(0.0, 0.0, 0.0).reshape(-1, 1, 8, 8)  # a failed sample is a grey square
        read = self.classifier.predict(images.flatten(1).numpy())
        distance = sliced_wasserstein(self.project(images), self.truth)
        return {"sliced_wasserstein": distance, "accuracy": float((read == labels.numpy()).mean())}


def load(target: str, labels: Tensor, **options) -> sf.Prediction:
    """The trained network, conditioned on labels (batch,)."""
    folder = str(NETWORKS / target)
    return sf.diffusers.from_pretrained(folder, class_labels=labels, null_label=10, **options).prediction


def solved(target: str, samples: int, solver: Solver | int, eta: float) -> sf.Solution:
    """One solve of the float32 network, or of a budget with a solver tuned for it: a job for a process of its own."""
    torch.set_num_threads(1)
    predict = load(target, split()[3][:samples])
    noise = predict.process.prior((samples, 1, 8, 8), seed=1)
    with torch.no_grad():
        if isinstance(solver, int):
            # pilots of the training digits' classes, from other noise than what is judged
            own = load(target, split()[1][:24])
            solver = sf.tune(sf.ProbabilityFlowODE(own), solver, own.process.prior((24, 1, 8, 8), seed=3))
        return sf.solve(sf.ReverseSDE(predict, eta=eta), solver, noise, seed=2 if eta else None, on_failure="return")


def reference(target: str, samples: int, traced: int, solver: Solver) -> sf.Solution:
    """A tight solve of the first `traced` samples with the network in float64.

    In float32 its rounding looks like roughness to an adaptive solver, and tight tolerances cannot be reached.
    """
    exact = load(target, split()[3][:traced], load={"dtype": torch.float64})
    noise = exact.process.prior((samples, 1, 8, 8), seed=1)[:traced].double()
    with torch.no_grad():
        return sf.solve(sf.ProbabilityFlowODE(exact), solver, noise)


def run(target: str, samples: int, traced: int, workers: int, judge: Judge) -> dict:
    """All rows of one network, and the distance between two references."""
    labels = judge.labels[:samples]
    tables = ((0.0, ode_solvers()), (1.0, sde_solvers()))
    jobs = [
        (f, name, eta, s) for eta, t in tables for f, family in t.items() for name, made in family.items() for s in made
    ]
    jobs += [("Adams", "tuned", 0.0, budget) for budget in BUDGETS]
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        tight, again = (pool.submit(reference, target, samples, traced, solver) for solver in REFERENCES)
        found = [pool.submit(solved, target, samples, solver, eta) for _, _, eta, solver in jobs]
        truth = tight.result().x
        agreement = (again.result().x - truth).square().mean().sqrt().item()
        print(f"two references differ by {agreement:.1e}; evaluations {tight.result().evaluations.double().mean():.0f}")
        for (family, name, eta, solver), job in zip(jobs, found, strict=True):
            solution = job.result()
            error = None if eta else (solution.x[:traced] - truth).square().mean().sqrt().item()
            evaluations = solution.evaluations.double().mean().item()
            settings = f"tune(budget={solver})" if isinstance(solver, int) else repr(solver)
            entry = {"family": family, "solver": name, "eta": eta, "settings": settings, "evaluations": evaluations}
            entry["failed"] = int((~solution.success).sum())
            rows.append(entry | {"trajectory_error": error} | judge(solution.x, labels))
            shown = "" if error is None else f"{error:9.2e}"
            quality = f"{rows[-1]['sliced_wasserstein']:.3f} {rows[-1]['accuracy']:.3f}"
            print(f"{name:20s} {evaluations:6.1f} {shown:9s} {quality}", flush=True)
    return {"references_differ_by": agreement, "rows": rows}


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


NOTES = (
    "A network that predicts ε̂ to an error δ says nothing of the data to better than δσ/α, and here δ ≈ 0.024 near pure noise, where",
    "σ/α is 157: its D is off by 3.8 there. Solvers that leave pure noise in one long step of λ",
    "carry that along, and the ε̂-form of DPM-Solver-2 multiplies it by about e^{h/2}: in 4 evaluations (h = 4.8) it diverges, as it does on any",
    "grid that is coarse in λ there. For such networks grids and charts therefore have room there by default ([choosing.md](choosing.md)), and a",
    "network that predicts v is better still.",
    "",
    "Training them takes 149 s and 152 s by the clock, side by side on two cores with nothing else to do (`tests/data/digits/training.json`);",
    "run again it gave the committed weights to the bit.",
    "",
    "The networks' outputs wiggle in t with the periods of their time embedding, mostly 2π of the 1000 units of time. That moves the end by",
    "about a thousandth, which no solver with fewer than some 200 steps follows; an adaptive one takes it for noise, so that tolerances below",
    "1e-3 are not reached before the steps are that short.",
)


def page(record: dict) -> str:
    """The record as the measured part of the docs page."""
    noise, v = record["networks"]["noise"], record["networks"]["v"]
    lines = [
        "# Solvers on a trained network",
        "",
        "Two class-conditional U-Nets (`tests/data/digits/noise` and `v`: 225 thousand parameters each, 8×8 pixels, one predicts the noise,",
        "the other v; trained by `benchmarks/train_digits.py`), without guidance. Made by `benchmarks/digits_network.py` from",
        "`benchmarks/results/digits_network.json`; seed, versions and settings are in that file.",
        "",
        "![Held-out digits, and samples of several solvers from the same noise](digits.png)",
        "",
        f"- {record['samples']} samples, classes as in the held-out digits. Error: RMS distance of the first "
        f"{record['traced']} to a tight solve",
        "  of the network's own flow in float64 from the same noise (1000 Adams steps, even in λ); 400 steps of RK4, even in t, differ from it by",
        f"  {noise['references_differ_by']:.1e} (noise) and {v['references_differ_by']:.1e} (v). Pixels lie in [−1, 1].",
        "- SW: sliced Wasserstein-2 to the 360 held-out digits in 16 principal components. As many real training digits show",
        f"  {record['floor_sliced_wasserstein']:.3f}: near that a sampler cannot be told from the data. (Their classes are random; the samples'",
        "  are the held-out ones, so that they may lie a little lower.)",
        "- Read: how often scikit-learn's SVC reads the class that was asked for; on held-out digits it reads "
        f"{100 * record['classifier_accuracy_held_out']:.1f} %.",
        "- NFE is counted at the network, mean a sample; where the two networks differ (adaptive steps), both are given.",
        "",
        *NOTES,
        "",
    ]
    for eta, title in ((0.0, "The flow"), (1.0, "The reverse SDE")):
        wide = (
            ("noise: error", "SW", "read", "v: error", "SW", "read")
            if not eta
            else ("noise: SW", "read", "v: SW", "read")
        )
        lines += [
            f"## {title}",
            "",
            f"| family | solver | NFE | {' | '.join(wide)} |",
            f"|{' --- |' * (3 + len(wide))}",
        ]
        for a, b in zip(noise["rows"], v["rows"], strict=True):
            if a["eta"] == eta:
                both = [f"{row['evaluations']:.0f}" for row in (a, b)]
                cells = [c for row in (a, b) for c in _cells(row)]
                lines.append(
                    f"| {a['family']} | {a['solver']} | {'/'.join(dict.fromkeys(both))} | {' | '.join(cells)} |"
                )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cells(row: dict) -> list[str]:
    failed = f" ({row['failed']} failed)" if row["failed"] else ""
    quality = [f"{row['sliced_wasserstein']:.3f}", f"{100 * row['accuracy']:.0f} %{failed}"]
    return quality if row["eta"] else [f"{row['trajectory_error']:.1e}", *quality]


def main() -> None:
    parser = argparse.ArgumentParser(description="Every family of solvers on the trained digits network.")
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
            picture(given.figure, "noise", judge)
    networks = {t: run(t, given.samples, given.traced, given.workers, judge) for t in ("noise", "v")}
    record = {
        "samples": given.samples,
        "traced": given.traced,
        "seed": 1,
        "device": "cpu",
        "versions": versions(),
        "floor_sliced_wasserstein": real["sliced_wasserstein"],
        "classifier_accuracy_held_out": held,
        "networks": networks,
    }
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.page:
        given.page.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
