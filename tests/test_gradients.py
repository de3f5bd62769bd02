"""Gradients through solves: plain autograd, checkpoints and the adjoint agree with differences; what each keeps in memory."""

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
}


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode):
    solver, wrap, eta = MODES[mode]
    _, end = ends(solver, wrap, eta)
    # adaptive steps respond to the state, which differences see and gradients do not: both only to their tolerance
    tolerance = {"atol": 1e-5, "rtol": 1e-3} | ({"nondet_tol": 1e-6} if mode == "adjoint" else {})
    assert torch.autograd.gradcheck(end, (start(),), **tolerance)


def test_the_adjoint_gives_the_gradients_of_plain_autograd_for_weights_too():
    found = []
    for adjoint in (False, True):
        network, end = ends(sf.TorchDiffEq("dopri5", rtol=1e-9, atol=1e-9, adjoint=adjoint))
        end(start()).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def kept(solver: Solver, wrap=lambda n: n) -> int:
    """Bytes autograd keeps for the backward pass of one solve."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    _, end = ends(solver, wrap)
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


def test_checkpoints_keep_less_than_plain_autograd():
    solver = sf.DDIM(steps=20)
    assert kept(solver, sf.Checkpointed) < 0.7 * kept(solver)
