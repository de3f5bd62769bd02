"""Our solvers as diffusers schedulers.

A scheduler is stepped from outside: the pipeline evaluates the network at `scheduler.timesteps[n]` and hands the output to
`step`, which answers with the next state to evaluate. Our solvers call the network themselves, several times a step if they
like. So the solver runs unchanged in a thread of its own, whose network waits for the pipeline: its n-th call is the
pipeline's n-th step. The times of the calls are found beforehand by a run on one number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import queue
import threading
from typing import Any

import torch
from torch import Tensor

from sdeflow.charts import Chart
from sdeflow.diffusers.pipelines import TARGETS, require, times_of
from sdeflow.equations import ReverseSDE
from sdeflow.errors import InvalidInput
from sdeflow.grids import Grid, Nodes
from sdeflow.predictions import FlowPrediction, Prediction
from sdeflow.processes import DiscreteVP, Process, RectifiedFlow
from sdeflow.solve import solve
from sdeflow.solvers.base import FixedStep, Solver

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


def _call_times(solver: Solver, process: Process, target: type[Prediction], eta: float, settings: dict) -> list[float]:
    """Times at which the solver calls the network: the same for every state, since its grid is fixed."""
    times: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return torch.zeros_like(x)

    equation = ReverseSDE(target(network, process), eta=eta)
    solve(equation, solver, torch.ones(1, 1, dtype=torch.float64), on_failure="return", **settings)
    return times


def describe(solver: FixedStep) -> dict[str, Any]:
    """A solver as JSON: its class and the fields that differ from their defaults, steps excepted."""
    return _describe(solver, skip=("steps",))


def _describe(value: Any, skip: tuple[str, ...] = ()) -> Any:
    if isinstance(value, Nodes):
        return {"type": "Nodes", "values": list(value.values)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init and f.name not in skip}
        return {"type": type(value).__name__} | {name: _describe(entry) for name, entry in fields.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_describe(entry) for entry in value]
    raise InvalidInput(
        f"{value!r} cannot be written to a scheduler's config; use a solver whose fields are plain values"
    )


def rebuild(value: Any) -> Any:
    """What `describe` described."""
    if not isinstance(value, dict):
        return tuple(rebuild(v) for v in value) if isinstance(value, list) else value
    fields = {name: rebuild(entry) for name, entry in value.items() if name != "type"}
    for kind in _subclasses(FixedStep) + _subclasses(Grid) + _subclasses(Chart):
        if kind.__name__ == value.get("type"):
            return kind(**fields, **({"steps": 1} if _wants_steps(kind, fields) else {}))
    raise InvalidInput(
        f"no solver, grid or chart is called {value.get('type')!r}; if it is your own, import its module first"
    )


def _subclasses(kind: type) -> list[type]:
    return [c for child in kind.__subclasses__() for c in (child, *_subclasses(child))]


def _wants_steps(kind: Any, fields: dict) -> bool:
    return issubclass(kind, FixedStep) and not isinstance(fields.get("grid"), Nodes)


def as_solver(solver: Any) -> FixedStep:
    """A fixed-step solver from a solver, its class or its description; the number of steps is set later.

    Raises:
        InvalidInput: anything else.
    """
    if isinstance(solver, dict):
        solver = rebuild(solver)
    if isinstance(solver, type) and issubclass(solver, FixedStep):
        solver = solver(steps=1)
    if not isinstance(solver, FixedStep):
        given = type(solver).__name__
        raise InvalidInput(
            f"SolverScheduler needs a fixed-step solver, because a pipeline asks for its times beforehand; got {given}. "
            "Write SolverScheduler(sf.UniPC(order=3, steps=20)); adaptive solvers run on sf.diffusers.from_pipeline(pipe)"
        )
    return solver


@functools.lru_cache(maxsize=1)
def scheduler_class() -> type:
    """The class `SolverScheduler`, made on first use because its bases are diffusers' own."""
    diffusers = require()
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

    class SolverScheduler(SchedulerMixin, diffusers.ConfigMixin):
        """Any fixed-step solver of sdeflow as a diffusers scheduler.

        Args:
            solver: a solver (its `steps` are replaced by the pipeline's num_inference_steps unless it has a grid of its own
                times), its class, or its description in a config.
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the table, as
                in diffusers' schedulers; the defaults are Stable Diffusion's. For another model write
                `SolverScheduler.from_config(pipe.scheduler.config, solver=solver)`.
            prediction_type: "epsilon", "v_prediction", "sample", or "flow_prediction" for flow matching.
            eta: strength of the reverse SDE; by default the solver's own, 0 where it solves ODEs, else 1.
            seed: of the noise of stochastic solvers, one stream a sample; a generator given to the pipeline comes first.
            timestep_spacing, steps_offset, shift: used with `own_times=True`.
            own_times: step through the times the model's usual scheduler would take (DDIM's, or flow matching's) instead
                of the solver's own grid.

        Raises:
            InvalidInput: the solver is adaptive or cannot be written to a config; unknown settings.
        """

        order = 1
        init_noise_sigma = 1.0
        config_name = "scheduler_config.json"

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
            self.solver = as_solver(solver)
            # given by position, the solver would count as a default and be dropped on loading
            defaults = [name for name in self.config.get("_use_default_values", []) if name != "solver"]
            self.register_to_config(solver=describe(self.solver), _use_default_values=defaults)
            self.target = TARGETS[prediction_type]
            flow = self.target is FlowPrediction
            self._unit = float(num_train_timesteps) if flow else 1.0
            # the table and the usual times are diffusers' own, so that they are the model's to the last bit
            if flow:
                self._usual = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps, shift=shift)
                self.process: Process = RectifiedFlow(t_min=1e-4)
            else:
                self._usual = diffusers.DDIMScheduler(
                    num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                    timestep_spacing=timestep_spacing, steps_offset=steps_offset,
                    rescale_betas_zero_snr=rescale_betas_zero_snr,
                )  # fmt: skip
                self.process = DiscreteVP(self._usual.alphas_cumprod.double())
                self.alphas_cumprod = self._usual.alphas_cumprod
            self.eta = _eta_of(self.solver) if eta is None else float(eta)
            self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
            self.num_inference_steps: int | None = None
            self._run: _Run | None = None
            self._n = self._begin = 0

        def __len__(self) -> int:
            return self.config.num_train_timesteps

        def set_timesteps(
            self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: Any = None
        ) -> None:
            """Prepare a run of that many solver steps; `timesteps` lists its network calls, float32.

            A list of sigmas (flow matching) gives the times of the steps itself. `mu` is not used: the solver's grid
            places the steps.
            """
            self._stop()
            solver, grid = self.solver, self.solver.grid
            if isinstance(grid, Nodes):
                num_inference_steps = grid.steps
            elif sigmas is not None and self._unit != 1.0:
                nodes = [float(s) for s in sigmas]
                solver = dataclasses.replace(solver, grid=self._closed(nodes), steps=None)
            elif self.config.own_times:
                nodes = times_of(self._usual, int(num_inference_steps or 1)).tolist()
                solver = dataclasses.replace(solver, grid=self._closed(nodes), steps=None)
            elif num_inference_steps is None:
                raise InvalidInput("set_timesteps needs num_inference_steps; write scheduler.set_timesteps(20)")
            else:
                solver = dataclasses.replace(solver, steps=int(num_inference_steps))
            self._current = solver
            calls = _call_times(solver, self.process, self.target, self.eta, self._span(solver))
            self.timesteps = (torch.tensor(calls, dtype=torch.float64) * self._unit).to(device, torch.float32)
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
            if self._run is None:
                self._start(sample, timestep, generator)
            run, given = self._run, getattr(self, "_given", None)
            assert run is not None
            expected = float(self.timesteps[self._begin + self._n]) / self._unit
            if abs(float(timestep) / self._unit - run.time) > 1e-4 * max(1.0, abs(run.time)):
                self._stop()
                raise InvalidInput(
                    f"the solver waits for timestep {run.time * self._unit:g} (listed {expected * self._unit:g}) and was "
                    f"given {float(timestep):g}; call set_timesteps before every run"
                )
            if given is not None and given is not sample and not torch.equal(given, sample):
                self._stop()
                raise InvalidInput(
                    "the pipeline changed the state between two steps, which the solver cannot take in; for inpainting "
                    "write sf.Inpaint(prediction, known, mask) and sf.solve"
                )
            assert run.state is not None
            run.answer(model_output.detach().to(run.state.dtype))
            self._n += 1
            ended, following = run.x is not None, run.state if run.x is None else run.x
            assert following is not None
            previous = following.to(sample.dtype)
            self._given = previous
            if ended:
                self._stop()
            return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

        def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            """α x_0 + σ·noise at the timesteps (batch,)."""
            times = timesteps.to(original_samples.device).double() / self._unit
            return self.process.perturb(original_samples, times, noise)

        def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
            """`add_noise` as flow-matching pipelines call it."""
            return self.add_noise(sample, noise, timestep)

        def _start(self, sample: Tensor, timestep: Any, generator: Any) -> None:
            if self.num_inference_steps is None:
                raise InvalidInput("call scheduler.set_timesteps(20) before step")
            if self._begin == 0:  # a pipeline may begin late without saying so
                self._begin = int((self.timesteps - float(timestep)).abs().argmin())
            solver = self._current
            if self._begin:
                solver = dataclasses.replace(solver, grid=self._late(solver), steps=None)
            settings = self._span(solver) | ({"seed": _seed(generator, self.config.seed)} if self.eta > 0 else {})
            self._run, self._n, self._given = _Run(solver, self.process, self.target, self.eta, settings), 0, None
            wide = sample.float() if sample.dtype.itemsize < 4 else sample
            self._run.begin(wide)

        def _late(self, solver: FixedStep) -> list[float]:
            start, stop = self._span(solver)["start"], self._span(solver)["stop"]
            grid = solver.grid if isinstance(solver.grid, Grid) else solver.default_grid
            assert solver.steps is not None
            nodes = grid.times(self.process, start, stop, solver.steps).tolist()
            if solver.facts.evaluations != 1 or len(self.timesteps) not in (len(nodes), len(nodes) - 1):
                raise InvalidInput(
                    f"{solver.facts.name} calls the network more than once a step, so it cannot begin in the middle of its "
                    "timesteps; take a solver of one call a step, e.g. sf.DPMSolverPP(order=2, own_start=False, steps=20)"
                )
            return nodes[self._begin :]

        def _span(self, solver: FixedStep) -> dict[str, float]:
            if isinstance(solver.grid, Nodes):
                return {"start": float(solver.grid.values[0]), "stop": float(solver.grid.values[-1])}
            return {"start": self.process.t_max, "stop": self.process.t_min}

        def _closed(self, nodes: list[float]) -> list[float]:
            """Nodes whose last interval is closed: by `denoise` where the solver can, else by t_min."""
            denoises = getattr(self.solver, "denoise", False)
            return nodes if denoises or nodes[-1] <= self.process.t_min else [*nodes, self.process.t_min]

        def _stop(self) -> None:
            if getattr(self, "_run", None) is not None:
                self._run.stop()  # type: ignore[union-attr]
            self._run, self._given, self._n = None, None, 0

        def __deepcopy__(self, memo: dict) -> Any:
            return type(self).from_config(dict(self.config))

        def __del__(self) -> None:
            self._stop()

    SolverScheduler.__module__, SolverScheduler.__qualname__ = "sdeflow.diffusers", "SolverScheduler"
    return SolverScheduler


def _eta_of(solver: FixedStep) -> float:
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
