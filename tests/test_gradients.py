"""Gradients through solves: plain autograd, checkpoints and the adjoint agree with differences; what each keeps in memory."""

import dataclasses

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers.base import Solver

VP = sf.VP()


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None].to(x.dtype)], 1))


def ends(solver: Solver, wrap=lambda n: n, eta: float = 0.0):
    """(network, end state as a function of the start and of the first layer's weights)."""
    network = Network()
    predict = sf.VPrediction(wrap(network), VP)

    def end(x):
        equation = sf.ReverseSDE(predict, eta=eta)
        return sf.solve(equation, solver, x, start=0.9, stop=0.1, seed=3 if eta else None, gradients=True).x

    return network, end


def start(batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 2, dtype=torch.float64, requires_grad=True)


MODES = {
    "plain": (sf.DPMSolverPP(order=2, steps=5), lambda n: n, 0.0),
    "stochastic": (sf.DPMSolverPP(order=2, steps=5, sde=True), lambda n: n, 1.0),
    "checkpointed": (sf.UniPC(order=2, steps=5), sf.Checkpointed, 0.0),
    "torchdiffeq": (sf.TorchDiffEq("dopri5", rtol=1e-8, atol=1e-8), lambda n: n, 0.0),
    "adjoint": (sf.TorchDiffEq("dopri5", rtol=1e-8, atol=1e-8, adjoint=True), lambda n: n, 0.0),
    "torchsde": (sf.TorchSDE("srk", steps=5), lambda n: n, 1.0),
    "torchsde adjoint": (sf.TorchSDE("heun", steps=40, adjoint=True), lambda n: n, 1.0),
}


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    solver, wrap, eta = MODES[mode]
    _, end = ends(solver, wrap, eta)
    # adaptive steps respond to the state, which differences see and gradients do not: both only to their tolerance
    tolerance = {"atol": 1e-5, "rtol": 1e-3} | ({"nondet_tol": 1e-6} if mode == "adjoint" else {})
    if mode == "torchsde adjoint":
        # the gradient of the equation, not of the steps: they differ by O(h)
        tolerance = {"atol": 1e-3, "rtol": 1e-3}
    assert torch.autograd.gradcheck(end, (start(),), **tolerance)


def test_the_adjoint_gives_the_gradients_of_plain_autograd_for_weights_too():
    found = []
    for adjoint in (False, True):
        network, end = ends(sf.TorchDiffEq("dopri5", rtol=1e-9, atol=1e-9, adjoint=adjoint))
        end(start()).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


class WithCondition(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(2, 2).double()

    def forward(self, x, t, c):
        return torch.tanh(0.5 * self.layer(x) + c) * t[:, None]


@pytest.mark.parametrize("backend", ["torchdiffeq", "torchsde"])
def test_the_adjoint_leaves_no_part_of_a_guided_prediction_out(backend):
    """Both networks, scales and conditions, though a wrapper shows one network alone."""
    found = []
    for adjoint in (False, True):
        networks = WithCondition(0), WithCondition(1)
        c = torch.tensor([[0.3, -0.2], [0.1, 0.7]], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
        pair = [sf.VPrediction(sf.Conditioned(network, c=c), VP) for network in networks]
        equation = sf.ReverseSDE(sf.ClassifierFree(*pair, scale=scale), eta=float(backend == "torchsde"))
        solver = (
            sf.TorchSDE("heun", steps=400, adjoint=adjoint)
            if backend == "torchsde"
            else sf.TorchDiffEq("dopri5", rtol=1e-9, atol=1e-9, adjoint=adjoint)
        )
        seed = 3 if backend == "torchsde" else None
        end = sf.solve(equation, solver, start().detach(), start=0.9, stop=0.5, seed=seed, gradients=True).x
        end.square().sum().backward()
        wanted = [c, scale, *networks[0].parameters(), *networks[1].parameters()]
        assert all(tensor.grad is not None for tensor in wanted)
        found.append(torch.cat([tensor.grad.flatten() for tensor in wanted]))
    assert found[0].abs().min() > 1e-4
    bound = 1e-2 if backend == "torchsde" else 1e-5
    torch.testing.assert_close(found[1], found[0], rtol=bound, atol=bound * found[0].abs().max().item())


def test_the_adjoint_of_a_likelihood_reaches_the_weights():
    found = []
    for adjoint in (False, True):
        network = Network()
        solver = sf.TorchDiffEq("dopri5", rtol=1e-8, atol=1e-8, adjoint=adjoint)
        x = start().detach()
        sf.log_likelihood(sf.VPrediction(network, VP), x, solver, gradients=True).log_prob.sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def kept(solver: Solver, wrap=lambda n: n, eta: float = 0.0) -> int:
    """Bytes autograd keeps for the backward pass of one solve."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    _, end = ends(solver, wrap, eta)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        end(start(64))
    return total


def test_the_adjoint_keeps_the_same_memory_however_many_steps():
    def adjoint(steps):
        return kept(sf.TorchDiffEq("rk4", steps=steps, adjoint=True))

    def plain(steps):
        return kept(sf.TorchDiffEq("rk4", steps=steps))

    assert adjoint(80) <= 1.1 * adjoint(10)
    assert plain(80) > 6 * plain(10)
    assert adjoint(80) < 0.05 * plain(80)


def test_the_sdes_adjoint_keeps_the_same_memory_however_many_steps():
    def adjoint(steps):
        return kept(sf.TorchSDE("heun", steps=steps, adjoint=True), eta=1.0)

    def plain(steps):
        return kept(sf.TorchSDE("heun", steps=steps), eta=1.0)

    assert adjoint(80) <= 1.1 * adjoint(10)
    assert plain(80) > 6 * plain(10)
    assert adjoint(80) < 0.05 * plain(80)


def by_both(solve, settings):
    """Gradients of `solve(solver)` by plain autograd and by the adjoint, and their distance over the former's size."""
    plain, adjoint = (solve(sf.TorchSDE(**settings, adjoint=adjoint)) for adjoint in (False, True))
    return plain, adjoint, ((adjoint - plain).norm() / plain.norm()).item()


def reverse_sde(solver, save_at=None):
    """Gradients of the start and the weights, on one path whatever the steps are."""
    network, x = Network(), start(4)
    path = sf.BrownianPath(sf.sample_seeds(7, 4), (2,), torch.float64)
    equation = sf.ReverseSDE(sf.VPrediction(network, VP), eta=1.0)
    found = sf.solve(equation, solver, x, start=0.9, stop=0.3, path=path, save_at=save_at, gradients=True)
    found.states.square().sum().backward()
    return torch.cat([v.grad.flatten() for v in (x, *network.parameters())])


@pytest.mark.parametrize(("method", "bound"), [("heun", 1e-3), ("srk", 2e-2)])
def test_the_sdes_adjoint_converges_to_plain_autograd_on_one_path(method, bound):
    coarse, fine = (by_both(reverse_sde, {"method": method, "steps": n})[2] for n in (16, 64))
    assert fine < bound
    assert fine < coarse / 3  # order 1 would be 4


def test_outputs_on_the_way_have_their_gradients():
    _, _, apart = by_both(lambda s: reverse_sde(s, save_at=[0.9, 0.7, 0.5]), {"method": "heun", "steps": 64})
    assert apart < 1e-3
    alone = reverse_sde(sf.TorchSDE("heun", steps=64, adjoint=True))
    both = reverse_sde(sf.TorchSDE("heun", steps=64, adjoint=True), save_at=[0.5])
    assert (both - alone).norm() > 0.1 * alone.norm()


def test_adaptive_steps_have_an_adjoint_too():
    _, _, apart = by_both(reverse_sde, {"method": "heun", "adaptive": True, "rtol": 3e-3, "atol": 3e-3})
    assert apart < 5e-3


class Bank(torch.nn.Module):
    """dx = −a x ds + g(x) dw with a and the size b of the noise to be learnt."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.a = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.b = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def drift(self, t, x):
        return -self.a * x + 0.2 * torch.sin(x)

    def diffusion(self, t, x):
        if self.noise == "additive":
            return (self.b * (1.0 + t)).expand(2)
        if self.noise == "general":
            return self.b * torch.stack([torch.cos(x), 1.0 + 0.1 * x, x], 2)
        return self.b * (1.0 + 0.5 * torch.sin(x))


@pytest.mark.parametrize(
    ("noise", "calculus", "method"),
    [
        ("additive", "ito", "srk"),
        ("diagonal", "ito", "milstein"),
        ("diagonal", "stratonovich", "heun"),
        ("scalar", "ito", "milstein"),
        ("scalar", "stratonovich", "midpoint"),
        ("general", "stratonovich", "heun"),
    ],
)
def test_every_noise_has_an_adjoint_for_state_drift_and_diffusion(noise, calculus, method):
    def solve(solver):
        bank, x = Bank(noise), torch.linspace(-1.0, 1.0, 64, dtype=torch.float64).reshape(32, 2).requires_grad_()
        path = sf.BrownianPath(sf.sample_seeds(5, 32), ({"scalar": 1, "general": 3}.get(noise, 2),), torch.float64)
        equation = sf.Equation(bank.drift, bank.diffusion, noise=noise, calculus=calculus)
        solver = dataclasses.replace(solver, adjoint_params=(bank.a, bank.b))
        sf.solve(equation, solver, x, start=0.0, stop=1.0, path=path, gradients=True).x.square().sum().backward()
        return torch.cat([v.grad.flatten() for v in (x, bank.a, bank.b)])

    coarse, fine = (by_both(solve, {"method": method, "steps": n})[2] for n in (8, 128))
    assert fine < 0.05
    assert fine < coarse / 3  # order ½ would be 4, order 1 sixteen


def test_a_failed_sample_has_no_gradient_and_spoils_no_other():
    network, x = Network(), start(4)
    with torch.no_grad():
        x[1] = float("nan")
    predict = sf.VPrediction(network, VP)
    solver = sf.TorchSDE("heun", steps=10, adjoint=True)
    found = sf.solve(
        sf.ReverseSDE(predict), solver, x, start=0.9, stop=0.3, seed=1, gradients=True, on_failure="return"
    )
    assert found.success.tolist() == [True, False, True, True]
    found.x[found.success].square().sum().backward()
    assert x.grad[1].tolist() == [0.0, 0.0] and x.grad[[0, 2, 3]].abs().min() > 0
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())


def test_checkpoints_keep_less_than_plain_autograd():
    solver = sf.DDIM(steps=20)
    assert kept(solver, sf.Checkpointed) < 0.7 * kept(solver)
