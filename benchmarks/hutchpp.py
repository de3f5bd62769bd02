"""Does Hutch++ pay for log-likelihoods? Variance of the divergence's estimators at equal backward passes.

    python benchmarks/hutchpp.py --output benchmarks/results/hutchpp.json

Hutch++ (Meyer, Musco, Musco & Woodruff 2021): with Q an orthonormal basis of the range of J S, S (d, k) random signs,

    tr J = tr QᵀJQ + tr (I − QQᵀ) J (I − QQᵀ):   the first exactly, the second by Hutchinson with the signs G.

Along a flow it can be used in two ways, and this script measures the error of log p, not of one trace:

- "fresh": Q found anew at every evaluation, 3k products with J (J S, J Q, J G). The estimate then depends on the state through Q,
  which turns: an adaptive solver sees a rougher right side. Here on a fixed grid, so that its variance alone is seen.
- "held": Q from JᵀS at the start of the solve (k products, once), J Q and J G at every evaluation, 2k products. Unbiased for any Q.

J here is dF/dz of the chart's drift; products are vector-Jacobian products, and tr J = tr Jᵀ. Hutchinson takes as many probes as the
method has products an evaluation. Both also in a form of ours, "centred" (see `deflated`). Reported: the standard deviation of log p
over independent probes, RMS over the samples, relative to Hutchinson's (random signs) at the same cost; below 1 it pays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from digits_network import load, split
from torch import Tensor

import sdeflow as sf
from sdeflow.measure.record import versions


def jacobians(predict: sf.Prediction, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(weights, J): log p's integral Σ w_i tr J_i along the flow by the trapezoid on even steps of the chart, J (n, batch, d, d)."""
    process, chart = predict.process, sf.StraightLine()
    bound, d = chart.bind(process), x[0].numel()
    times = sf.InChart(chart).times(process, process.t_min, process.t_max, steps)
    with torch.no_grad():
        states = sf.solve(
            sf.ProbabilityFlowODE(predict),
            sf.DPMSolverPP(order=2, grid=times),
            x,
            start=process.t_min,
            stop=process.t_max,
            save_at=times,
        ).states
    u = bound.u(times)
    h = u.diff()
    weights = torch.cat([h[:1] / 2, (h[1:] + h[:-1]) / 2, h[-1:] / 2])
    found = []
    for at, t, state in zip(u, times, states, strict=True):
        z = bound.to_chart(t, state).detach()
        value, pull, *_ = torch.func.vjp(lambda z, at=at: bound.drift(predict, at, z), z)
        rows = [
            pull(e.reshape(1, *z.shape[1:]).expand_as(z))[0].detach().flatten(1) for e in torch.eye(d, dtype=z.dtype)
        ]
        found.append(torch.stack(rows, 1))
        del value
    return weights, torch.stack(found)


def signs(shape: tuple[int, ...], draw: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(0, 2, shape, generator=draw).to(like) * 2.0 - 1.0


def forms(J: Tensor, v: Tensor) -> Tensor:
    """vᵀJv summed over the columns of v (n or 1, repeats, batch, d, k): (n, repeats, batch)."""
    return ((J[:, None] @ v) * v).sum((-1, -2))


def hutchinson(J: Tensor, v: Tensor) -> Tensor:
    """Mean of vᵀJv over probes v (repeats, batch, d, k)."""
    return forms(J, v[None]) / v.shape[-1]


def deflated(J: Tensor, Q: Tensor, G: Tensor, centred: bool) -> Tensor:
    """tr QᵀJQ + mean of g'ᵀJg', g' = (I − QQᵀ)g; Q (n or 1, repeats, batch, d, k), G (repeats, batch, d, k).

    `centred`: of J − cI, c = tr QᵀJQ/k, whose trace is known: random signs have no variance on cI, but their projections have.
    """
    exact, rest = forms(J, Q), G - Q @ (Q.mT @ G)
    k, d = G.shape[-1], G.shape[-2]
    c = exact / k if centred else torch.zeros_like(exact)
    return exact + (forms(J, rest) - c * rest.square().sum((-1, -2))) / k + c * (d - k)


def compare(predict: sf.Prediction, x: Tensor, ks: tuple[int, ...], repeats: int, steps: int) -> list[dict]:
    """Standard deviations of log p for every k, relative to Hutchinson's."""
    weights, J = jacobians(predict, x, steps)
    exact = torch.einsum("n,nbdd->b", weights.to(J), J)
    draw, (_, batch, d, _) = torch.Generator().manual_seed(0), J.shape

    def spread(terms: Tensor) -> float:
        return (torch.einsum("n,nrb->rb", weights.to(J), terms) - exact).square().mean().sqrt().item()

    rows = []
    for k in ks:
        if 3 * k > d:
            continue
        S, G = (signs((repeats, batch, d, k), draw, J) for _ in range(2))
        # the range of J S from products with J itself; that of Jᵀ serves as well and is what backward passes give
        fresh = torch.linalg.qr(torch.einsum("nbde,rbdk->nrbek", J, S)).Q
        held = torch.linalg.qr(torch.einsum("bde,rbdk->rbek", J[0], S)).Q[None]
        three, two = (spread(hutchinson(J, signs((repeats, batch, d, c * k), draw, J))) for c in (3, 2))
        row = {"k": k, "hutchinson_3k": three, "hutchinson_2k": two}
        # where J is diagonal random signs have no variance, and there is nothing to gain
        if three > 1e-9:
            for name, Q, same in (("fresh", fresh, three), ("held", held, two)):
                row |= {f"{name}{', centred' * c}": spread(deflated(J, Q, G, c)) / same for c in (False, True)}
        rows.append(row)
    return rows


def cases(samples: int) -> dict[str, tuple[sf.Prediction, Tensor]]:
    """The exact problems, and the trained networks on held-out digits with the noise of t_min."""
    found = {}
    for problem in (sf.problems.gaussian(), sf.problems.ring(), sf.problems.digits()):
        for process in (sf.VP(), sf.EDM()):
            x = problem.sample(samples, seed=1, dtype=torch.float64)
            x, _ = process.marginal(x, process.t_min)
            name = f"{problem.name}, {type(process).__name__}"
            found[name] = (problem.prediction(process), x)
    _, _, images, labels = split()
    for target in ("noise", "v"):
        predict = load(target, labels[:samples], load={"dtype": torch.float64})
        found[f"digits network, {target}"] = (predict, images[:samples].double())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Does Hutch++ pay for log-likelihoods?")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, (predict, x) in cases(given.samples).items():
        for row in compare(predict, x, (1, 2, 4, 8, 16), given.repeats, given.steps):
            rows.append({"case": name, "d": x[0].numel(), **row})
            print(" ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows[-1].values()), flush=True)
    if given.output:
        record = {"samples": given.samples, "repeats": given.repeats, "steps": given.steps, "seed": 1, "device": "cpu"}
        text = json.dumps(record | {"versions": versions(), "rows": rows}, indent=1, ensure_ascii=False)
        given.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
