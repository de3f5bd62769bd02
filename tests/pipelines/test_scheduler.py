"""Our solvers inside unmodified diffusers pipelines give what `solve` gives."""

# diffusers' annotations admit neither plain tensors as latents nor what its pipelines return
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

import copy
import dataclasses
import inspect
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import torchdiffeq, torchsde
from sdeflow.solvers.base import Facts, FixedStep, Solver

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

import diffusers  # noqa: E402
import tiny  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "solvers"))
from catalogue import CASES  # noqa: E402

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Midpoint(FixedStep):
    """A user's own solver, two calls a step."""

    facts = Facts("own midpoint", 2, None, None, 2, False, ("none",), "drift", "Runge 1895")

    def init(self, task, times):
        return times

    def step(self, task, state, n, x):
        t, h = state[n], (state[n + 1] - state[n]).item()
        middle = x + h / 2 * task.equation.drift(t, x)
        return x + h * task.equation.drift(t + h / 2, middle), state


def fixed_step(kind: type) -> Solver | None:
    """The solver of a class in fixed steps, None where it chooses its steps itself."""
    if "steps" not in {f.name for f in dataclasses.fields(kind)}:
        return None
    made = kind(method="rk4", steps=1) if kind is sf.TorchDiffEq else kind(steps=1)
    return None if made.facts.adaptive else made


EXPORTED = [getattr(sf, name) for name in sf.__all__]
CLASSES = {k.__name__: fixed_step(k) for k in EXPORTED if inspect.isclass(k) and issubclass(k, Solver)}
"""Every solver class of the package: a new one is here by itself."""
CANNOT = {"torchdiffeq implicit_adams": "iterates until the state settles: its calls are not known beforehand"}
SOLVERS = (
    {name: solver for name, solver in CLASSES.items() if solver is not None}
    # the settings the contract tests prove, with each solver's own grid beside the catalogue's
    | {f"case {name}": dataclasses.replace(case(4), steps=1) for name, case in CASES.items()}
    | {
        f"torchdiffeq {name}": sf.TorchDiffEq(name, steps=1)
        for name, method in torchdiffeq.METHODS.items()
        if not method.adaptive and f"torchdiffeq {name}" not in CANNOT
    }
    | {f"torchsde {name}": sf.TorchSDE(name, steps=1) for name in torchsde.METHODS}
    | {
        "ddim to clean data": sf.DDIM(steps=1, denoise=True),
        "ShARK in a chart": sf.ShARK(steps=1, chart=sf.Trigonometric(), grid=sf.UniformLogSNR()),
        "Restart, two loops": sf.Restart(steps=1, loops=((0.1, 0.5, 2, 2), (1.0, 3.0, 1, 3))),
        "torchsde by dt": sf.TorchSDE("srk", dt=0.1),
        "own": Midpoint(steps=1),
    }
)
SHIFTED = {"SEA", "ShARK", "ExponentialShARK", "ShARK in a chart"}


def test_every_solver_class_is_either_run_here_or_adaptive():
    assert {name for name, solver in CLASSES.items() if solver is None} == {"Adams", "Dopri5", "GottaGoFast", "Tsit5"}
    assert {"FixedAdams", "ERSDE", "EDMHeun", "Restart", "SEA", "ShARK", "EulerMaruyama", "TorchSDE"} <= set(SOLVERS)
    for name, why in CANNOT.items():
        with pytest.raises(sf.InvalidInput, match="iterates until its state settles"):
            sf.diffusers.SolverScheduler(sf.TorchDiffEq(name.split()[1], steps=1))
        assert why


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def stable_diffusion(folder):
    return tiny.stable_diffusion(folder)


@pytest.fixture(scope="module")
def guided(stable_diffusion):
    return sf.diffusers.from_pipeline(stable_diffusion, prompt="a cat", guidance_scale=3.0)


def by_solve(loaded, solver, z, eta=0.0, seed=None):
    equation = sf.ReverseSDE(loaded.prediction, eta=eta)
    with torch.no_grad():
        found = sf.solve(equation, solver, z, seed=seed if eta else None)
        return loaded.decode(found.x), found


@pytest.mark.parametrize("name", SOLVERS)
def test_every_fixed_step_solver_gives_the_image_of_solve(stable_diffusion, guided, name):
    pipe, loaded, solver = stable_diffusion, guided, SOLVERS[name]
    z, usual = loaded.noise(1), pipe.scheduler
    pipe.scheduler = sf.diffusers.SolverScheduler(solver)
    eta, asked = pipe.scheduler.eta, []
    try:
        image = pipe(
            "a cat", latents=z, guidance_scale=3.0, num_inference_steps=STEPS, output_type="pt",
            callback_on_step_end=lambda p, n, t, k: asked.append(float(t)) or k,
            generator=torch.Generator().manual_seed(11),
        ).images  # fmt: skip
        calls = len(pipe.scheduler.timesteps)
    finally:
        pipe.scheduler = usual
    own = dataclasses.replace(solver, steps=STEPS, **({"dt": None} if isinstance(solver, sf.TorchSDE) else {}))
    expected, found = by_solve(loaded, own, z, eta, seed=11)
    assert (image - expected).abs().max() < 1e-4
    assert expected.std() > 0.01
    # a pipeline's first call is at its own state, which these shift before they ask: one call more, its output unused
    extra = int(name in SHIFTED)
    assert calls == found.calls + extra == len(asked)
    assert found.evaluations.tolist() == [2 * found.calls]
    assert not [t for t in threading.enumerate() if t.name == "sdeflow-scheduler" and t.is_alive()]


def test_flow_matching(folder):
    pipe = tiny.stable_diffusion_3(folder)
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", guidance_scale=3.0)
    z = loaded.noise(1)
    usual = pipe("a cat", latents=z, guidance_scale=3.0, num_inference_steps=STEPS, output_type="pt").images
    make = sf.diffusers.SolverScheduler
    pipe.scheduler = make(sf.UniPC(order=2, steps=1), prediction_type="flow_prediction")
    image = pipe("a cat", latents=z, guidance_scale=3.0, num_inference_steps=STEPS, output_type="pt").images
    expected, _ = by_solve(loaded, sf.UniPC(order=2, steps=STEPS), z)
    assert (image - expected).abs().max() < 1e-4
    # on the model's own shifted times, DDIM is the Euler of flow matching
    pipe.scheduler = make(sf.DDIM(steps=1, denoise=True), prediction_type="flow_prediction", shift=3.0, own_times=True)
    image = pipe("a cat", latents=z, guidance_scale=3.0, num_inference_steps=STEPS, output_type="pt").images
    assert (image - usual).abs().max() < 1e-4


def test_own_times_with_ddim_is_the_pipelines_usual_output(stable_diffusion):
    pipe, usual = stable_diffusion, stable_diffusion.scheduler
    z, run = torch.randn(1, 4, 8, 8), {"num_inference_steps": STEPS, "output_type": "pt"}
    reference = pipe("a cat", latents=z, **run).images
    pipe.scheduler = sf.diffusers.SolverScheduler.from_config(
        usual.config, solver=sf.DDIM(steps=1), own_times=True
    )  # fmt: skip
    try:
        image = pipe("a cat", latents=z, **run).images
    finally:
        pipe.scheduler = usual
    assert (image - reference).abs().max() < 1e-4


@pytest.mark.parametrize(
    "usual",
    [
        diffusers.DDPMScheduler(),
        diffusers.DDIMScheduler(num_train_timesteps=500),
        diffusers.DDPMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(beta_end=0.012),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
    ids=lambda usual: type(usual).__name__,
)
def test_from_config_keeps_the_model_also_where_its_scheduler_has_defaults(usual):
    scheduler = sf.diffusers.SolverScheduler.from_config(usual.config, solver=sf.DDIM(steps=5))
    network = tiny.unconditional().unet
    predict = sf.diffusers.prediction_of(network, usual)
    x = predict.process.prior((2, 3, 8, 8))
    wanted = sf.solve(sf.ProbabilityFlowODE(predict), sf.DDIM(steps=5), x).x
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    assert (x - wanted).norm() < 1e-5 * wanted.norm()
    assert scheduler.config.shift == usual.config.get("shift", usual.config.get("flow_shift", 1.0))


def test_our_table_survives_the_way_to_a_diffusers_scheduler():
    ours = sf.diffusers.SolverScheduler(sf.DDIM(steps=5))
    back = diffusers.DDIMScheduler.from_config(ours.config)
    assert torch.allclose(back.alphas_cumprod, ours.alphas_cumprod)


@pytest.mark.parametrize("usual", [diffusers.EDMEulerScheduler(), diffusers.ScoreSdeVeScheduler()])
def test_from_config_refuses_what_has_no_table(usual):
    with pytest.raises(sf.InvalidInput, match="no table of β"):
        sf.diffusers.SolverScheduler.from_config(usual.config, solver=sf.DDIM(steps=5))


def test_times_shifted_by_the_size_of_the_image(folder):
    pipe = tiny.flux(folder)
    run = {"num_inference_steps": STEPS, "output_type": "pt", "height": 16, "width": 16}
    z = sf.diffusers.from_pipeline(pipe, prompt="a cat", height=16, width=16).noise(1)
    usual = pipe("a cat", latents=z, **run).images
    config, solver = pipe.scheduler.config, sf.DDIM(steps=1, denoise=True)
    pipe.scheduler = sf.diffusers.SolverScheduler.from_config(config, solver=solver, use_flow_sigmas=False)
    image = pipe("a cat", latents=z, **run).images
    assert usual.std() > 0.05
    assert (image - usual).abs().max() < 1e-4
    own = sf.diffusers.SolverScheduler.from_config(config, solver=solver, own_times=True)
    with pytest.raises(sf.InvalidInput, match="mu="):
        own.set_timesteps(STEPS)
    reference = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    for scheduler in (own, reference):
        scheduler.set_timesteps(STEPS, mu=1.15)
    assert torch.allclose(own.timesteps, reference.timesteps)
    assert own.timesteps[3] > 500  # 251 without the shift


def test_config_survives_saving(tmp_path):
    make = sf.diffusers.SolverScheduler
    scheduler = make(sf.UniPC(order=2, steps=7, grid=sf.InChart(sf.Trigonometric(0.7))), prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    back = make.from_pretrained(tmp_path)
    assert back.solver == sf.UniPC(order=2, steps=1, grid=sf.InChart(sf.Trigonometric(0.7)))
    assert back.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(6)
    back.set_timesteps(6)
    assert torch.equal(scheduler.timesteps, back.timesteps)
    fixed = make(sf.DDIM(grid=[900.0, 500.0, 10.0, 0.0]))
    assert make.from_config(fixed.config).solver.grid.values == (900.0, 500.0, 10.0, 0.0)
    fixed.set_timesteps(50)
    assert fixed.timesteps.tolist() == [900.0, 500.0, 10.0]


def test_a_pipeline_with_our_scheduler_is_saved_and_loaded(tmp_path):
    pipe = diffusers.DDPMPipeline(tiny.unconditional().unet, diffusers.DDPMScheduler())
    pipe.scheduler = sf.diffusers.SolverScheduler.from_config(pipe.scheduler.config, solver=sf.DDIM(steps=1))
    pipe.save_pretrained(tmp_path)
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(back.scheduler) is sf.diffusers.SolverScheduler
    assert back.scheduler.solver == sf.DDIM(steps=1)


def test_add_noise_is_diffusers_own():
    usual = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    own = sf.diffusers.SolverScheduler(sf.DDIM)
    x, noise, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, 400, 999])
    torch.testing.assert_close(own.add_noise(x, noise, t), usual.add_noise(x, noise, t))


def test_image_to_image_begins_in_the_middle():
    scheduler = sf.diffusers.SolverScheduler(sf.DDIM(steps=1))
    scheduler.set_timesteps(8)
    predict = sf.NoisePrediction(lambda x, t: torch.sin(x), scheduler.process)
    late, x = scheduler.timesteps[3:], torch.randn(2, 4)
    scheduler.set_begin_index(3)
    y = x
    for t in late:
        y = scheduler.step(torch.sin(y), t, y).prev_sample
    nodes = [*late.double().tolist(), 0.0]
    expected = sf.solve(sf.ProbabilityFlowODE(predict), sf.DDIM(grid=nodes), x, start=nodes[0], stop=0.0).x
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_work_is_refused(monkeypatch):
    make = sf.diffusers.SolverScheduler
    with pytest.raises(sf.InvalidInput, match="needs a fixed-step solver"):
        make("UniPC")
    with pytest.raises(sf.InvalidInput, match="prediction_type must be"):
        make(sf.DDIM, prediction_type="score")
    with pytest.raises(sf.InvalidInput, match="set_timesteps"):
        make(sf.DDIM).step(torch.zeros(1, 2), 999, torch.zeros(1, 2))
    scheduler = make(sf.DDIM)
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2)
    moved = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    with pytest.raises(sf.InvalidInput, match="waits for timestep"):
        scheduler.step(x, scheduler.timesteps[3], moved)
    scheduler.set_timesteps(4)
    moved = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    with pytest.raises(sf.InvalidInput, match=r"changed the state.*Inpaint"):
        scheduler.step(x, scheduler.timesteps[1], moved + 1)
    with pytest.raises(sf.InvalidInput, match="no solver, grid or chart"):
        make({"type": "Nobody"})
    with pytest.raises(sf.InvalidInput, match=r"fixed-step.*SRA1 with steps of its own choice"):
        make(sf.SRA1(rtol=1e-2, atol=1e-2))
    with pytest.raises(sf.InvalidInput, match="fixed-step.*Adams"):
        make(sf.Adams)


def test_a_solver_that_changes_its_mind_about_its_calls_is_stopped():
    @dataclass(frozen=True, kw_only=True)
    class Fickle(Midpoint):
        """Calls the network again wherever the state is large: a zero network never shows it."""

        def step(self, task, state, n, x):
            x, state = super().step(task, state, n, x)
            if x.abs().max() > 50.0:
                task.equation.drift(state[n], x)
            return x, state

    scheduler = sf.diffusers.SolverScheduler(Fickle(steps=1))
    scheduler.set_timesteps(2)
    x = 100.0 * torch.ones(1, 2)

    def run(x):
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample

    with pytest.raises(sf.InvalidInput, match=r"waits for timestep|more than the 4 network calls"):
        run(x)


def test_a_function_among_the_settings_runs_is_saved_by_name_and_must_be_given_again(tmp_path):
    make, solver = sf.diffusers.SolverScheduler, sf.ERSDE(order=2, steps=1, phi=torch.square)
    scheduler = make(solver)
    scheduler.set_timesteps(3)
    assert copy.deepcopy(scheduler).solver is solver
    scheduler.save_pretrained(tmp_path)
    with pytest.raises(sf.InvalidInput, match=r"held the function .*square"):
        make.from_pretrained(tmp_path)
    assert make.from_pretrained(tmp_path, solver=solver).solver is solver


def test_path_solvers_begin_in_the_middle_too():
    scheduler = sf.diffusers.SolverScheduler(sf.EulerMaruyama(steps=1))
    scheduler.set_timesteps(8)
    predict = sf.NoisePrediction(lambda x, t: torch.sin(x), scheduler.process)
    late, x = scheduler.timesteps[3:], torch.randn(2, 4)
    y = x
    for t in late:
        y = scheduler.step(torch.sin(y), t, y, generator=torch.Generator().manual_seed(5)).prev_sample
    nodes = [*late.double().tolist(), 0.0]
    equation = sf.ReverseSDE(predict)
    expected = sf.solve(equation, sf.EulerMaruyama(grid=nodes), x, start=nodes[0], stop=0.0, seed=5).x
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for solver, why in ((sf.SRA1(steps=1), "more than once a step"), (sf.SEA(steps=1), "moves its state")):
        scheduler = sf.diffusers.SolverScheduler(solver)
        scheduler.set_timesteps(8)
        with pytest.raises(sf.InvalidInput, match=why):
            scheduler.step(x, scheduler.timesteps[4], x)
