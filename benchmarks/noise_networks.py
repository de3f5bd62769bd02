"""What an error of a network's noise costs, on the straight line and in the chart that bends for it.

    python benchmarks/noise_networks.py --output benchmarks/results/noise_networks.json
    python benchmarks/noise_networks.py --table              # the tables of docs/choosing.md, from the data

The exact ε̂ of ring, 64-D mixture and digits, and to it a smooth error of δ = 0, 0.005 or 0.02 (RMS): 32 cosines of random directions in x and
t. VP from t = 1, where σ/α is 152, and from t = 0.707, where it is 12. Errors are medians over 256 samples of the RMS error at the end against
Adams at 1e-9 on the same network. Adams: evaluations to reach an error, from tolerances 1e-1 … 1e-6, log-log interpolated. A cost with
δ = 0 is what a network pays whose ε̂ has no error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from cells import PROBLEMS
from torch import Tensor

import sdeflow as sf
from sdeflow.measure.record import versions

RESULTS = Path(__file__).parent / "results" / "noise_networks.json"
DELTAS, STARTS, GOALS, STEPS = (0.0, 0.005, 0.02), (1.0, 0.707), (1e-2, 1e-3, 1e-4), (5, 10, 20)
TOLERANCES = [10.0 ** (-0.5 * k) for k in range(1, 13)]
CHARTS = {"line": sf.StraightLine(), "bent": sf.BentLine()}


class Erring(torch.nn.Module):
    """The exact noise of a problem and a smooth error of size delta."""

    def __init__(self, exact: torch.nn.Module, d: int, delta: float):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.exact, self.delta = exact, delta
        self.of_x = torch.randn(d, 32, generator=draw, dtype=torch.float64) / math.sqrt(d)
        self.out = torch.randn(32, d, generator=draw, dtype=torch.float64) / math.sqrt(32)
        self.phase = 2 * math.pi * torch.rand(32, generator=draw, dtype=torch.float64)
        self.of_t = 5.0 * torch.randn(32, generator=draw, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = math.sqrt(2.0) * torch.cos(x @ self.of_x + self.phase + t[:, None] * self.of_t)
        return self.exact(x, t) + self.delta * waves @ self.out


def reached(points: list[tuple[float, float]], goal: float) -> float | None:
    """Evaluations at which the error passes the goal for good; points are (evaluations, error), in order of tolerance."""
    for (n0, e0), (n1, e1) in reversed(list(zip(points, points[1:], strict=False))):
        if e1 <= goal < e0:
            return n0 * (n1 / n0) ** (math.log(e0 / goal) / math.log(e0 / e1))
    return None


def row(name: str, start: float, delta: float, samples: int) -> dict:
    """One network, all solvers in both charts."""
    problem, process = PROBLEMS[name](), sf.VP()
    network = Erring(problem.prediction(process, kind="noise").network, problem.dim, delta)
    equation = sf.ProbabilityFlowODE(sf.NoisePrediction(network, process))
    alpha, sigma = (c.item() for c in process.coefficients(torch.tensor(start, dtype=torch.float64))[:2])
    x = process.prior((samples, problem.dim), seed=3, dtype=torch.float64)
    if start < 1.0:  # a state of the law at the start
        draw = torch.Generator().manual_seed(4)
        x = alpha * problem.sample(samples, seed=5).to(torch.float64) + sigma * torch.randn(
            x.shape, generator=draw, dtype=torch.float64
        )

    def run(solver: sf.Adams | sf.FixedAdams | sf.StochasticAdams) -> tuple[float, Tensor]:
        s = sf.solve(equation, solver, x, start=start)
        return s.evaluations.double().mean().item(), s.x

    def error(x: Tensor) -> float:
        return (x - truth).square().mean(1).sqrt().median().item()

    truth = run(sf.Adams(rtol=1e-9, atol=1e-9))[1]
    found: dict = {"problem": name, "start": start, "rho": sigma / alpha, "delta": delta, "adams": {}, "fixed": {}}
    for key, chart in CHARTS.items():
        runs = [run(sf.Adams(rtol=e, atol=e, chart=chart)) for e in TOLERANCES]
        found["adams"][key] = [(n, error(end)) for n, end in runs]
        high = 2.0 if key == "line" else None
        found["fixed"][key] = {
            "StochasticAdams": [error(run(sf.StochasticAdams(steps=n, high=high))[1]) for n in STEPS],
            "FixedAdams": [error(run(sf.FixedAdams(steps=n, chart=chart))[1]) for n in STEPS],
        }
    return found


def table(record: dict) -> str:
    """Markdown: Adams's evaluations, then errors of fixed steps; straight line / bent."""

    def markdown(names: list[str], cells: Callable[[dict], list[str]]) -> list[str]:
        top = ["network", "σ/α", "δ", *names]
        body = [[r["problem"], f"{r['rho']:.0f}", f"{r['delta']:g}", *cells(r)] for r in record["rows"]]
        return [f"| {' | '.join(line)} |" for line in (top, ["---"] * len(top), *body)]

    def adams(r: dict) -> list[str]:
        both = [[reached(r["adams"][key], goal) for key in CHARTS] for goal in GOALS]
        return [" / ".join("–" if n is None else f"{n:.0f}" for n in pair) for pair in both]

    def fixed(r: dict) -> list[str]:
        return [" / ".join(f"{r['fixed'][key][s][STEPS.index(n)]:.1e}" for key in CHARTS) for s, n in pairs]

    pairs = [(s, n) for s in ("StochasticAdams", "FixedAdams") for n in STEPS]
    lines = markdown([f"Adams to {g:.0e}" for g in GOALS], adams)
    return "\n".join([*lines, "", *markdown([f"{s}, {n}" for s, n in pairs], fixed)])


def main() -> None:
    parser = argparse.ArgumentParser(description="What an error of a network's noise costs.")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", action="store_true", help="print the tables from the data that are there")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for name in ("ring", "mixture64", "digits"):
            for start in STARTS:
                for delta in DELTAS:
                    rows.append(row(name, start, delta, given.samples))
                    print(table({"rows": rows[-1:]}).splitlines()[2], flush=True)
    record = {"samples": given.samples, "seeds": [3, 4, 5], "device": "cpu", "versions": versions(), "rows": rows}
    if given.output:
        given.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
