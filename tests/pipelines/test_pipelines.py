"""Diffusers pipelines taken apart reproduce their own output on their own timesteps."""

# diffusers' annotations admit neither plain tensors as latents nor what its pipelines return
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdeflow as sf

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

import diffusers  # noqa: E402
import tiny  # noqa: E402

from sdeflow.diffusers.schedules import times_of  # noqa: E402

DIGITS = Path(__file__).parents[1] / "data" / "digits"
STEPS = 6


def ours(loaded, solver, z):
    """Our image from the noise z."""
    nodes = solver.grid.values
    with torch.no_grad():
        found = sf.solve(sf.ProbabilityFlowODE(loaded.prediction), solver, z, start=nodes[0], stop=nodes[-1])
        return loaded.decode(found.x), found


def check(image, reference, other):
    """Equal to 1e-4, and the comparison could have failed: another condition gives another image."""
    assert reference.std() > 0.05
    assert (image - reference).abs().max() < 1e-4
    assert (other - reference).abs().max() > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion(folder, prediction_type):
    pipe = tiny.stable_diffusion(folder, prediction_type)
    options = {"negative_prompt": "dog", "guidance_scale": 5.0, "guidance_rescale": 0.3}
    loaded = sf.diffusers.from_pipeline(pipe, prompt=["a cat", "a dog"], **options | {"negative_prompt": ["dog"] * 2})
    process, prediction, decode = loaded
    assert (process, prediction, decode) == (loaded.process, loaded.prediction, loaded.decode)
    z, run = loaded.noise(2), {"num_inference_steps": STEPS, "output_type": "pt"}
    reference = pipe(
        ["a cat", "a dog"], latents=z, **options | {"negative_prompt": ["dog"] * 2}, **run
    ).images  # fmt: skip
    image, found = ours(loaded, sf.DDIM(grid=loaded.times(STEPS)), z)
    other = pipe(["a dog", "a cat"], latents=z, **options | {"negative_prompt": ["dog"] * 2}, **run).images
    check(image, reference, other)
    assert found.evaluations.tolist() == [2 * STEPS] * 2
    assert found.calls == STEPS
    single = sf.diffusers.from_pipeline(
        pipe, prompt=["a cat", "a dog"], batched=False, **options | {"negative_prompt": ["dog"] * 2}
    )
    again, found = ours(single, sf.DDIM(grid=loaded.times(STEPS)), z)
    assert (again - reference).abs().max() < 1e-4
    assert found.calls == 2 * STEPS


@pytest.mark.parametrize("order", [1, 2, 3])
def test_stable_diffusion_by_unipc(folder, order):
    """Diffusers' UniPC starts with fewer nodes and ends with fewer, on clean data."""
    pipe = tiny.stable_diffusion(folder)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, solver_order=order, final_sigmas_type="zero"
    )
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", guidance_scale=3.0)
    z = loaded.noise(1)
    reference = pipe("a cat", latents=z, guidance_scale=3.0, num_inference_steps=STEPS, output_type="pt").images
    solver = sf.UniPC(order=order, grid=loaded.times(STEPS), own_start=False, lower_order_final=True, denoise=True)
    image, _ = ours(loaded, solver, z)
    other, _ = ours(loaded, sf.DDIM(grid=loaded.times(STEPS), denoise=True), z)
    check(image, reference, other)


def test_stable_diffusion_xl(folder):
    pipe = tiny.stable_diffusion_xl(folder)
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", guidance_scale=5.0)
    z, run = loaded.noise(1), {"guidance_scale": 5.0, "num_inference_steps": STEPS, "output_type": "pt"}
    image, _ = ours(loaded, sf.DDIM(grid=loaded.times(STEPS)), z)
    check(image, pipe("a cat", latents=z, **run).images, pipe("dog", latents=z, **run).images)


def test_stable_diffusion_3(folder):
    pipe = tiny.stable_diffusion_3(folder)
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", negative_prompt="dog", guidance_scale=5.0)
    z, run = loaded.noise(1), {"guidance_scale": 5.0, "num_inference_steps": STEPS, "output_type": "pt"}
    image, _ = ours(loaded, sf.DDIM(grid=loaded.times(STEPS), denoise=True), z)
    reference = pipe("a cat", negative_prompt="dog", latents=z, **run).images
    check(image, reference, pipe("a cat", latents=z, **run).images)


def test_flux(folder):
    pipe = tiny.flux(folder)
    size = {"height": 16, "width": 16}
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", guidance_scale=3.5, **size)
    z, run = loaded.noise(1), {"num_inference_steps": STEPS, "output_type": "pt", "max_sequence_length": 512} | size
    image, found = ours(loaded, sf.DDIM(grid=loaded.times(STEPS), denoise=True), z)
    reference = pipe("a cat", latents=z, guidance_scale=3.5, **run).images
    check(image, reference, pipe("a cat", latents=z, guidance_scale=1.0, **run).images)
    assert found.calls == STEPS


@pytest.mark.parametrize("sigma", [False, True])
def test_pixart(folder, sigma):
    pipe, size = tiny.pixart(folder, sigma), {"height": 16, "width": 24}
    loaded = sf.diffusers.from_pipeline(pipe, prompt="A cat", negative_prompt="dog", guidance_scale=5.0, **size)
    z, run = loaded.noise(1), {"guidance_scale": 5.0, "num_inference_steps": STEPS, "output_type": "pt"} | size
    run |= {"use_resolution_binning": False, "latents": z}
    image, _ = ours(loaded, sf.DDIM(grid=loaded.times(STEPS)), z)
    check(image, pipe("A cat", negative_prompt="dog", **run).images, pipe("A dog", negative_prompt="dog", **run).images)


def given_noise(monkeypatch, module, z):
    """Pipelines without a `latents` argument start from z."""
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: z)


def test_dit(monkeypatch):
    from diffusers.pipelines.dit import pipeline_dit

    pipe = tiny.dit()
    loaded = sf.diffusers.from_pipeline(pipe, class_labels=[7, 8], guidance_scale=4.0)
    z, run = loaded.noise(2), {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "pt"}
    given_noise(monkeypatch, pipeline_dit, z)
    reference = pipe(class_labels=[7, 8], **run).images
    image, _ = ours(loaded, sf.DDIM(grid=loaded.times(STEPS)), z)
    assert (image - reference).abs().max() < 1e-4
    assert reference.std() > 0.05


def test_unconditional(monkeypatch):
    from diffusers.pipelines.ddim import pipeline_ddim

    pipe = tiny.unconditional()
    loaded = sf.diffusers.from_pipeline(pipe)
    z = loaded.noise(2)
    given_noise(monkeypatch, pipeline_ddim, z)
    reference = pipe(batch_size=2, num_inference_steps=STEPS, output_type="pt").images
    image, _ = ours(loaded, sf.DDIM(grid=loaded.times(STEPS), denoise=True), z)
    check(image, reference, ours(loaded, sf.DDIM(grid=loaded.times(STEPS)), z)[0])


def test_half_precision_networks_under_a_float32_state(folder):
    pipe = tiny.unconditional()
    z = sf.diffusers.from_pipeline(pipe).noise(2)
    fine = sf.diffusers.from_pipeline(pipe)
    x = ours(fine, sf.DDIM(grid=fine.times(STEPS)), z)[1].x
    half = sf.diffusers.from_pipeline(pipe.to(dtype=torch.bfloat16))
    y = ours(half, sf.DDIM(grid=half.times(STEPS)), z)[1].x
    assert y.dtype == torch.float32
    assert 1e-5 < (x - y).abs().max() / x.abs().max() < 0.02


def test_from_pretrained_reads_what_save_pretrained_wrote(tmp_path):
    pipe = tiny.unconditional()
    pipe.save_pretrained(tmp_path)
    loaded = sf.diffusers.from_pretrained(tmp_path)
    z = loaded.noise(1)
    expected = sf.diffusers.from_pipeline(pipe).prediction.noise(z, 500.0)
    torch.testing.assert_close(loaded.prediction.noise(z, 500.0), expected)


def test_a_bare_network_and_its_scheduler():
    pipe = tiny.unconditional()
    z = torch.randn(2, 3, 8, 8)
    bare = sf.diffusers.prediction_of(pipe.unet, pipe.scheduler)
    torch.testing.assert_close(bare.noise(z, 321.0), pipe.unet(z, 321).sample)


def test_networks_distilled_under_guidance_are_given_its_scale(folder):
    pipe = tiny.stable_diffusion(folder)
    pipe.unet = tiny.unet(time_cond_proj_dim=8)
    with torch.no_grad():  # made as zeros, so that a new network does not depend on it
        torch.nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(0))
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", guidance_scale=7.5)
    z, run = loaded.noise(2), {"num_inference_steps": STEPS, "output_type": "pt", "num_images_per_prompt": 2}
    image, found = ours(loaded, sf.DDIM(grid=loaded.times(STEPS)), z)
    assert found.evaluations.tolist() == [STEPS] * 2
    reference = pipe("a cat", latents=z, guidance_scale=7.5, **run).images
    check(image, reference, pipe("a cat", latents=z, guidance_scale=2.0, **run).images)


def test_networks_whose_weights_are_kept_elsewhere():
    """Offloaded by accelerate, parameters are nowhere between calls."""
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.unconditional()
    z = sf.diffusers.from_pipeline(pipe).noise(2)
    wanted = pipe.unet(z, 300).sample
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert next(pipe.unet.parameters()).device.type == "meta"
    loaded = sf.diffusers.from_pipeline(pipe)
    assert torch.equal(loaded.noise(2), z)
    torch.testing.assert_close(loaded.prediction.noise(z, 300.0), wanted)
    assert sf.solve(sf.ProbabilityFlowODE(loaded.prediction), sf.DDIM(steps=2), z).x.isfinite().all()


def by_scheduler(network, scheduler, x, steps):
    """Diffusers' own loop."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    return x


def test_flow_matching_of_any_number_of_training_steps():
    network, x = tiny.unconditional().unet, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)
    predict, times = sf.diffusers.prediction_of(network, scheduler), times_of(scheduler, STEPS)
    solver = sf.DDIM(grid=times, denoise=True)
    with torch.no_grad():
        found = sf.solve(sf.ProbabilityFlowODE(predict), solver, x, start=times[0], stop=times[-1]).x
    reference = by_scheduler(network, scheduler, x, STEPS)
    assert (found - reference).norm() < 1e-5 * reference.norm()


def test_times_of_schedulers_that_end_early_repeat_or_are_of_flow_matching():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network, table = tiny.unconditional().unet, {"beta_schedule": "scaled_linear", "steps_offset": 1}
    early = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", timestep_spacing="leading", **table)
    times = times_of(early, STEPS)
    assert times[-2] > 1 and times[-1] == 0 and len(times) == STEPS + 1
    solver = sf.DPMSolverPP(order=2, grid=times, own_start=False, lower_order_final=True)
    with torch.no_grad():
        equation = sf.ProbabilityFlowODE(sf.diffusers.prediction_of(network, early))
        found = sf.solve(equation, solver, x, start=times[0], stop=0.0).x
    reference = by_scheduler(network, early, x, STEPS)
    assert (found - reference).norm() < 1e-5 * reference.norm()
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **table)
    assert bool((times_of(pndm, STEPS).diff() < 0).all()) and len(times_of(pndm, STEPS)) == STEPS + 1
    flow = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    usual = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert bool((times_of(flow, STEPS) <= 1.0).all()) and times_of(flow, STEPS)[0] > 0.99
    assert times_of(usual, STEPS)[0] == 1.0


def test_what_cannot_work_is_refused(folder):
    refused = pytest.raises
    sd, sd3 = tiny.stable_diffusion(folder), tiny.stable_diffusion_3(folder)
    with refused(sf.InvalidInput, match='prompt="a cat"'):
        sf.diffusers.from_pipeline(sd)
    with refused(sf.InvalidInput, match="takes no prompt"):
        sf.diffusers.from_pipeline(tiny.unconditional(), prompt="a cat")
    with refused(sf.InvalidInput, match=r"does not know ScoreSdeVePipeline.*prediction_of"):
        sf.diffusers.from_pipeline(type("ScoreSdeVePipeline", (), {})())
    with refused(sf.InvalidInput, match=r"FlowMatchEulerDiscreteScheduler\.from_pretrained"):
        sd3.scheduler = sd.scheduler
        sf.diffusers.from_pipeline(sd3, prompt="a cat")
    with refused(sf.InvalidInput, match=r"DDIMScheduler\.from_pretrained"):
        sd.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        sf.diffusers.from_pipeline(sd, prompt="a cat")
    with refused(sf.InvalidInput, match=r"needs one of epsilon.*from_config"):
        sd.scheduler = diffusers.DDIMScheduler(prediction_type="score")
        sf.diffusers.from_pipeline(sd, prompt="a cat")
    with refused(sf.InvalidInput, match="alphas_cumprod"):
        sf.diffusers.process_of(diffusers.EDMEulerScheduler())
    with refused(sf.InvalidInput, match="no class_labels"):
        sf.diffusers.from_pipeline(tiny.unconditional(), class_labels=3)
    with refused(sf.InvalidInput, match="from 0 to 10"):
        sf.diffusers.from_pretrained("tests/data/digits/noise", class_labels=42)
    with refused(sf.InvalidInput, match="class_labels=207"):
        sf.diffusers.from_pipeline(tiny.dit())
    for given in ({"class_labels": 1001}, {"class_labels": [3, -1]}, {"class_labels": 3, "null_label": 1001}):
        with refused(sf.InvalidInput, match="from 0 to 1000"):
            sf.diffusers.from_pipeline(tiny.dit(), **given)
    for given, said in (
        ({"prompt": 3}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"prompt": "a", "height": -16}, "height must be"),
    ):
        with refused(sf.InvalidInput, match=said):
            sf.diffusers.from_pipeline(tiny.flux(folder), **given)
    flux, text = tiny.flux(folder), {"prompt": "a cat"}
    for pipe, unused in (
        (flux, text | {"negative_prompt": "dog"}),
        (flux, text | {"class_labels": 3}),
        (flux, text | {"null_label": 3}),
        (tiny.dit(), {"class_labels": 3, "height": 16}),
        (tiny.dit(), {"class_labels": 3, "width": 16}),
        (tiny.dit(), {"class_labels": 3, "negative_prompt": "dog"}),
    ):
        with refused(sf.InvalidInput, match=f"no use for {list(unused)[-1]}="):
            sf.diffusers.from_pipeline(pipe, **unused)


def test_a_missing_extra_names_the_command():
    code = """
import sys
sys.modules["diffusers"] = None
import sdeflow as sf
for use in (lambda: sf.diffusers.from_pretrained("x"), lambda: sf.diffusers.SolverScheduler):
    try:
        use()
    except sf.MissingDependency as error:
        print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.count("pip install 'sdeflow[diffusers]'") == 2
