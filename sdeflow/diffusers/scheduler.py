"""Our solvers as diffusers schedulers.

A scheduler is stepped from outside: the pipeline evaluates the network at `scheduler.timesteps[n]` and hands the output to
`step`, which answers with the next state to evaluate. Our solvers call the network themselves, several times a step if they
like. So the solver runs unchanged in a thread of its own, whose network waits for the pipeline: its n-th call is the
pipeline's n-th step. The times of the calls are found beforehand by a run on one number.

A pipeline evaluates the network at its own state first. Solvers whose first call is at another one (SEA and ShARK shift it by
the path's area, EDM's churn raises its noise) get an additional first step, whose output is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import queue
import threading
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdeflow.diffusers.pipelines import require
from sdeflow.diffusers.schedules import TARGETS, times_of
from sdeflow.diffusers.settings import as_solver, describe, of_model
from sdeflow.equations import ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.grids import Nodes
from sdeflow.predictions import FlowPrediction, Prediction
from sdeflow.processes import DiscreteVP, Process, RectifiedFlow
from sdeflow.solve import solve
from sdeflow.solvers.base import Solver

WAIT = 600.0
"""Seconds the pipeline waits for the solver between two network calls before giving up."""


class _Stopped(BaseException):
    """The pipeline gave the run up."""


class _Run:
    """One solve in a thread: `state` and `time` are the pending network call, until `x` is the result."""

    def __init__(self, solver: Solver, process: Process, target: type[Prediction], eta: float, settings: dict):
        self.solver, self.process, self.target, self.eta, self.settings = solver, process, target, eta, settings
        self.outputs: queue.SimpleQueue = queue.SimpleQueue()
        self.news: queue.SimpleQueue = queue.SimpleQueue()
        self.state: Tensor | None = None
        self.time, self.x = math.nan, None
        self.stopped = False

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        self.news.put(("call", x, float(t[0])))
        output = self.outputs.get()
        if output is None:
            raise _Stopped
        return output

    def begin(self, x: Tensor) -> None:
        """Run to the first network call."""
        threading.Thread(target=self._solve, args=(x,), daemon=True, name="sdeflow-scheduler").start()
        self._wait()

    def answer(self, output: Tensor) -> None:
        """Give the pending call its output and run to the next."""
        self.outputs.put(output)
        self._wait()

    def stop(self) -> None:
        """End the thread."""
        if self.x is None and not self.stopped:
            self.stopped = True
            self.outputs.put(None)

    def _solve(self, x: Tensor) -> None:
        try:
            equation = ReverseSDE(self.target(self.network, self.process, dtype=x.dtype), eta=self.eta)
            self.news.put(("end", solve(equation, self.solver, x, **self.settings).x, math.nan))
        except _Stopped:
            pass
        except BaseException as error:
            self.news.put(("error", error, math.nan))

    def _wait(self) -> None:
        kind, value, self.time = self.news.get(timeout=WAIT)
        if kind == "error":
            self.stopped = True
            raise value
        self.state, self.x = (value, None) if kind == "call" else (None, value)


def _calls_of(
    solver: Solver, process: Process, target: type[Prediction], eta: float, settings: dict
) -> tuple[list[float], bool]:
    """Times at which the solver calls the network, the same for every state since its grid is fixed; whether it moves the
    start state before the first of them."""
    times: list[float] = []
    states: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        states.append(x)
        return torch.zeros_like(x)

    start = torch.ones(1, 1, dtype=torch.float64)
    solve(ReverseSDE(target(network, process), eta=eta), solver, start, on_failure="return", **settings)
    # into a chart and back is the same state up to rounding
    return times, bool(times) and not torch.allclose(states[0], start, rtol=1e-9)


class Stepping:
    """What the scheduler does, apart from its settings: the pipeline's calls on one side, the solver's run on the other."""

    config: Any
    solver: Solver
    process: Process
    target: type[Prediction]
    eta: float
    output: ClassVar[Any]

    def _prepare(self, solver: Solver, eta: float | None) -> None:
        """Process, prediction and usual times of the config."""
        settings, diffusers = self.config, require()
        self.solver, self.target = solver, TARGETS[settings.prediction_type]
        flow, n = self.target is FlowPrediction, settings.num_train_timesteps
        self._unit = float(n) if flow else 1.0
        # the table and the usual times are diffusers' own, so that they are the model's to the last bit
        if flow:
            self._usual: Any = diffusers.FlowMatchEulerDiscreteScheduler(n, shift=settings.shift)
            self.process = RectifiedFlow(t_min=1e-4)
        else:
            betas = diffusers.DDPMScheduler(
                n, settings.beta_start, settings.beta_end, settings.beta_schedule, settings.trained_betas
            ).betas  # DDIM's knows fewer schedules
            self._usual = diffusers.DDIMScheduler(
                n, trained_betas=betas.numpy(), timestep_spacing=settings.timestep_spacing, steps_offset=settings.steps_offset,
                rescale_betas_zero_snr=settings.rescale_betas_zero_snr,
            )  # fmt: skip
            self.process = DiscreteVP(self._usual.alphas_cumprod.double())
            self.alphas_cumprod = self._usual.alphas_cumprod
        self.eta = _eta_of(solver) if eta is None else float(eta)
        self.timesteps = torch.arange(n - 1, -1, -1, dtype=torch.float32)
        self.num_inference_steps: int | None = None
        self._run: _Run | None = None
        self._given: Tensor | None = None
        self._n = self._begin = 0
        self._calls, self._moved = [], False

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        """Prepare a run of that many solver steps; `timesteps` lists its network calls, float32.

        A list of sigmas (flow matching) gives the times of the steps, shifted as the model's usual scheduler would; `mu` is
        that shift where it depends on the image's size. Without sigmas and own_times the solver's grid places the steps.
        """
        self._stop()
        solver, grid = self.solver, getattr(self.solver, "grid", None)
        if isinstance(grid, Nodes):
            num_inference_steps = grid.steps
        elif sigmas is not None and self._unit != 1.0:
            num_inference_steps = len(sigmas)
            listed = self._own_times(num_inference_steps, {"sigmas": [float(s) for s in sigmas], "mu": mu})
            solver = _placed(solver, grid=self._closed(listed))
        elif self.config.own_times:
            solver = _placed(solver, grid=self._closed(self._own_times(int(num_inference_steps or 1), {"mu": mu})))
        elif num_inference_steps is None:
            raise InvalidInput("set_timesteps needs num_inference_steps; write scheduler.set_timesteps(20)")
        else:
            solver = _placed(solver, steps=int(num_inference_steps), grid=grid)
        self._current = solver
        self._calls, self._moved = _calls_of(solver, self.process, self.target, self.eta, self._span(solver))
        listed = self._calls[:1] * self._moved + self._calls
        self.timesteps = (torch.tensor(listed, dtype=torch.float64) * self._unit).to(device, torch.float32)
        self.num_inference_steps = num_inference_steps
        self._begin = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at timesteps[begin_index] (image to image); solvers of one call a step."""
        self._begin = int(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input is the state itself."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float | None = None,
        generator: Any = None,
        return_dict: bool = True,
        **ignored: Any,
    ) -> Any:
        """Take the network's output at (sample, timestep); answer with the next state to evaluate, or the result.

        Raises:
            InvalidInput: steps out of order, or a pipeline that changed the state in between.
        """
        fresh = self._run is None
        if self._run is None:
            self._start(sample, timestep, generator)
        assert self._run is not None
        run = self._run
        self._check(run, timestep, sample)
        assert run.state is not None
        if not (fresh and self._moved):
            run.answer(model_output.detach().to(run.state.dtype))
        self._n += 1
        ended, following = run.x is not None, run.state if run.x is None else run.x
        assert following is not None
        if not ended and self._begin + self._n >= len(self.timesteps):
            self._stop()
            raise InvalidInput(
                f"{self.solver.facts.name} asks for more than the {len(self.timesteps)} network calls it announced, so its "
                "calls depend on the state; take a solver whose calls do not, e.g. sf.UniPC(order=3, steps=20)"
            )
        previous = following.to(sample.dtype)
        self._given = previous
        if ended:
            self._stop()
        return self.output(prev_sample=previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x_0 + σ·noise at the timesteps (batch,)."""
        times = timesteps.to(original_samples.device).double() / self._unit
        return self.process.perturb(original_samples, times, noise)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as flow-matching pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def _check(self, run: _Run, timestep: Any, sample: Tensor) -> None:
        """Refuse a step the solver does not wait for, or a state it did not hand out."""
        if abs(float(timestep) / self._unit - run.time) > 1e-4 * max(1.0, abs(run.time)):
            self._stop()
            raise InvalidInput(
                f"the solver waits for timestep {run.time * self._unit:g} and was given {float(timestep):g}; call "
                "set_timesteps before every run"
            )
        given = self._given
        if given is not None and given is not sample and not torch.equal(given, sample):
            self._stop()
            raise InvalidInput(
                "the pipeline changed the state between two steps, which the solver cannot take in; for inpainting "
                "write sf.Inpaint(prediction, known, mask) and sf.solve"
            )

    def _start(self, sample: Tensor, timestep: Any, generator: Any) -> None:
        if self.num_inference_steps is None:
            raise InvalidInput("call scheduler.set_timesteps(20) before step")
        if self._begin == 0:  # a pipeline may begin late without saying so
            self._begin = int((self.timesteps - float(timestep)).abs().argmin())
        solver = self._current
        if self._begin:
            solver = _placed(solver, grid=self._late(solver))
        settings = self._span(solver) | ({"seed": _seed(generator, self.config.seed)} if self.eta > 0 else {})
        self._run, self._n, self._given = _Run(solver, self.process, self.target, self.eta, settings), 0, None
        wide = sample.float() if sample.dtype.itemsize < 4 else sample
        self._run.begin(wide)

    def _late(self, solver: Solver) -> list[float]:
        """The nodes from the one to begin at: with one call a step they are the calls, and the end."""
        calls, stop, steps = self._calls, self._span(solver)["stop"], getattr(solver, "steps", 0)
        single = len(calls) == steps + (calls[-1] == stop) and all(a > b for a, b in pairwise(calls))
        if self._moved or not single:
            why = (
                "moves its state before its first network call"
                if self._moved
                else "calls the network more than once a step"
            )
            raise InvalidInput(
                f"{solver.facts.name} {why}, so it cannot begin in the middle of its timesteps; take another solver of one "
                "call a step, e.g. sf.DPMSolverPP(order=2, own_start=False, steps=20)"
            )
        return [*calls[self._begin :], *([] if calls[-1] == stop else [stop])]

    def _span(self, solver: Solver) -> dict[str, float]:
        grid = getattr(solver, "grid", None)
        if isinstance(grid, Nodes):
            return {"start": float(grid.values[0]), "stop": float(grid.values[-1])}
        return {"start": self.process.t_max, "stop": self.process.t_min}

    def _own_times(self, steps: int, extra: dict[str, Any]) -> list[float]:
        """The times of the model's usual scheduler; what it is asked besides their number matters to flow matching only."""
        usual = self._usual
        if self.target is FlowPrediction:
            # settings that came with another scheduler's config are there only after __init__
            usual = type(usual).from_config({k: v for k, v in self.config.items() if k in usual.config})
            if usual.config.use_dynamic_shifting and extra.get("mu") is None:
                raise InvalidInput(
                    "this model shifts its times by the size of the image, which set_timesteps was not told; write "
                    "scheduler.set_timesteps(20, mu=1.15), or own_times=False"
                )
        return times_of(usual, steps, (lambda n: extra) if usual is not self._usual else None).tolist()

    def _closed(self, nodes: list[float]) -> list[float]:
        """Nodes whose last interval is closed: by `denoise` where the solver can, else by t_min."""
        denoises = getattr(self.solver, "denoise", False)
        return nodes if denoises or nodes[-1] <= self.process.t_min else [*nodes, self.process.t_min]

    def _stop(self) -> None:
        run = getattr(self, "_run", None)
        if run is not None:
            run.stop()
        self._run, self._given, self._n = None, None, 0

    def __deepcopy__(self, memo: dict) -> Any:
        return type(self).from_config(dict(self.config), solver=self.solver)  # type: ignore[attr-defined]

    def __del__(self) -> None:
        self._stop()


@functools.lru_cache(maxsize=1)
def scheduler_class() -> type:
    """The class `SolverScheduler`, made on first use because its bases are diffusers' own."""
    diffusers = require()
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

    class SolverScheduler(Stepping, SchedulerMixin, diffusers.ConfigMixin):
        """Any fixed-step solver of sdeflow as a diffusers scheduler.

        Args:
            solver: a solver (its `steps` are replaced by the pipeline's num_inference_steps unless it has a grid of its own
                times), its class, or its description in a config.
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the table, as
                in diffusers' schedulers; the defaults are Stable Diffusion's. For another model write
                `SolverScheduler.from_config(pipe.scheduler.config, solver=solver)`, which takes over the table, the prediction
                type, spacing and shift, but neither clipping nor thresholding.
            prediction_type: "epsilon", "v_prediction", "sample", or "flow_prediction" for flow matching.
            eta: strength of the reverse SDE; by default the solver's own, 0 where it solves ODEs, else 1.
            seed: of the noise of stochastic solvers, one stream a sample; a generator given to the pipeline comes first.
            timestep_spacing, steps_offset, shift: used with `own_times=True`.
            own_times: step through the times the model's usual scheduler would take (DDIM's, or flow matching's) instead
                of the solver's own grid.
            use_flow_sigmas: True tells pipelines that bring their own times, Flux's among them, to leave these to the scheduler;
                with False they hand them over, and they are taken.

        Raises:
            InvalidInput: the solver is adaptive or has fields that cannot be written to a config; unknown settings.
        """

        order = 1
        init_noise_sigma = 1.0
        config_name = "scheduler_config.json"
        output = SchedulerOutput

        @register_to_config
        def __init__(
            self,
            solver: Any = None,
            num_train_timesteps: int = 1000,
            beta_start: float = 0.00085,
            beta_end: float = 0.012,
            beta_schedule: str = "scaled_linear",
            trained_betas: list[float] | None = None,
            rescale_betas_zero_snr: bool = False,
            prediction_type: str = "epsilon",
            eta: float | None = None,
            seed: int = 0,
            timestep_spacing: str = "leading",
            steps_offset: int = 0,
            shift: float = 1.0,
            own_times: bool = False,
            use_flow_sigmas: bool = True,
        ):
            if prediction_type not in TARGETS:
                raise InvalidInput(f"prediction_type must be one of {', '.join(TARGETS)}; got {prediction_type!r}")
            solver = as_solver(solver)
            # what counts as a default is dropped on the way to another class, whose own defaults differ
            self.register_to_config(solver=describe(solver), _use_default_values=[])
            self._prepare(solver, eta)

        @classmethod
        def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            given, known = of_model(config_dict, diffusers), cls._get_init_keys(cls)
            init, unused, _ = super().extract_init_dict({k: v for k, v in given.items() if k in known}, **kwargs)
            # the rest is kept for schedulers made of this one's config, and for `_own_times`
            return init, unused, {k: v for k, v in given.items() if k not in init}

    SolverScheduler.__module__, SolverScheduler.__qualname__ = "sdeflow.diffusers", "SolverScheduler"
    return SolverScheduler


def _placed(solver: Any, grid: Any, steps: int | None = None) -> Any:
    """The solver with its steps placed by the pipeline, a step size of its own forgotten."""
    other = {"dt": None} if getattr(solver, "dt", None) is not None else {}
    return dataclasses.replace(solver, grid=grid, steps=steps, **other)


def _eta_of(solver: Solver) -> float:
    own = getattr(solver, "eta", None)
    if isinstance(own, int | float):
        return float(own)
    return 0.0 if "none" in solver.facts.noise else 1.0


def _seed(generator: Any, seed: int) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.initial_seed()
    if isinstance(generator, list | tuple):
        return torch.tensor([g.initial_seed() for g in generator])
    return seed
