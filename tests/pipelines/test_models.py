"""Bare networks of diffusers as predictions: how each sort is called, and adapters on them."""

# diffusers' annotations admit neither plain tensors as latents nor what its pipelines return
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

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

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twice(conditions):
    return {name: value.expand(2, *value.shape[1:]) for name, value in conditions.items()}


def test_the_transformer_of_stable_diffusion_3(folder):
    pipe, x = tiny.stable_diffusion_3(folder), normal(2, 16, 8, 8)
    text = {"encoder_hidden_states": normal(1, 7, 64, seed=1), "pooled_projections": normal(1, 64, seed=2)}
    predict = sf.diffusers.prediction_of(pipe.transformer, pipe.scheduler, **text)
    own = pipe.transformer(hidden_states=x, timestep=torch.full((2,), 300.0), **twice(text)).sample
    torch.testing.assert_close(predict.velocity(x, 0.3), own)


def test_the_transformer_of_flux(folder):
    pipe, x = tiny.flux(folder), normal(2, 16, 16)
    text = {"encoder_hidden_states": normal(1, 7, 32, seed=1), "pooled_projections": normal(1, 32, seed=2)}
    ids = {"txt_ids": torch.zeros(7, 3), "img_ids": pipe._prepare_latent_image_ids(1, 4, 4, x.device, x.dtype)}
    predict = sf.diffusers.prediction_of(pipe.transformer, pipe.scheduler, guidance=3.5, **text, **ids)
    t, guidance = torch.full((2,), 0.3), torch.full((2,), 3.5)
    own = pipe.transformer(hidden_states=x, timestep=t, guidance=guidance, **twice(text), **ids).sample
    torch.testing.assert_close(predict.velocity(x, 0.3), own)


def test_transformers_with_a_learned_variance(folder):
    pipe, x, t = tiny.pixart(folder, sigma=True), normal(2, 4, 8, 8), torch.full((2,), 300.0)
    text = {"encoder_hidden_states": normal(1, 5, 32, seed=1)}
    predict = sf.diffusers.prediction_of(pipe.transformer, pipe.scheduler, **text)
    own = pipe.transformer(x, timestep=t, **twice(text)).sample[:, :4]
    torch.testing.assert_close(predict.noise(x, 300.0), own)
    pipe, labels = tiny.dit(), torch.tensor([3, 4])
    predict = sf.diffusers.prediction_of(pipe.transformer, pipe.scheduler, class_labels=labels)
    torch.testing.assert_close(predict.noise(x, 300.0), pipe.transformer(x, t, class_labels=labels).sample[:, :4])


def test_networks_of_ones_own_and_compiled_ones():
    pipe, x = tiny.unconditional(), normal(2, 3, 8, 8)
    own = pipe.unet(x, 300).sample

    class Mine(torch.nn.Module):
        config = pipe.unet.config

        def forward(self, y, noise_level, return_dict=True):
            return (pipe.unet(y, noise_level).sample,)

    for model in (Mine(), torch.compile(pipe.unet, backend="eager")):
        torch.testing.assert_close(sf.diffusers.prediction_of(model, pipe.scheduler).noise(x, 300.0), own)


def test_what_cannot_be_told_apart_is_refused(folder):
    backwards = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(sf.InvalidInput, match=r"not AuraFlowTransformer2DModel.*sf\.FlowPrediction"):
        sf.diffusers.prediction_of(backwards, flow)
    with pytest.raises(sf.InvalidInput, match=r"no config\.in_channels.*process_of"):
        sf.diffusers.prediction_of(torch.nn.Identity(), diffusers.DDIMScheduler())


def adapted(network, *names):
    """The network with adapters that change its output."""
    peft = pytest.importorskip("peft")
    for seed, name in enumerate(names):
        config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian")
        network.add_adapter(config, adapter_name=name)
        with torch.no_grad():
            for parameter_name, parameter in network.named_parameters():
                if "lora_B" in parameter_name and name in parameter_name:
                    parameter.copy_(0.3 * normal(*parameter.shape, seed=seed))
    return network


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_scale_of_adapters_is_one_number(batch):
    network, x, text = adapted(tiny.unet(), "a"), normal(batch, 4, 8, 8), normal(1, 5, 32, seed=1)
    every = text.expand(batch, -1, -1)
    half, full = (network(x, 300, every, cross_attention_kwargs={"scale": s}).sample for s in (0.5, 1.0))
    assert (half - full).abs().max() > 1e-3
    scheduler, half_scale = diffusers.DDIMScheduler(), {"scale": 0.5}
    for _ in range(2):  # diffusers takes the scale out of the dict it is given
        predict = sf.diffusers.prediction_of(
            network, scheduler, encoder_hidden_states=text, cross_attention_kwargs=half_scale
        )
        torch.testing.assert_close(predict.noise(x, 300.0), half)
        torch.testing.assert_close(predict.noise(x, 300.0), half)


def test_adapters_of_a_pipeline_act_at_once(folder):
    pipe = tiny.stable_diffusion(folder)
    loaded = sf.diffusers.from_pipeline(pipe, prompt="a cat", guidance_scale=5.0)
    z, run = loaded.noise(1), {"guidance_scale": 5.0, "num_inference_steps": STEPS, "output_type": "pt"}
    times, seen = loaded.times(STEPS), []

    def check():
        reference = pipe("a cat", latents=z, **run).images
        with torch.no_grad():
            equation = sf.ProbabilityFlowODE(loaded.prediction)
            found = sf.solve(equation, sf.DDIM(grid=times), z, start=times[0], stop=times[-1])
        assert (loaded.decode(found.x) - reference).abs().max() < 1e-4
        assert all((reference - other).abs().max() > 1e-3 for other in seen)
        seen.append(reference)

    check()
    adapted(pipe.unet, "a", "b")
    check()
    pipe.set_adapters(["a", "b"], [0.3, 1.5])
    check()
    pipe.set_adapters("a", 0.5)
    check()
    pipe.fuse_lora(lora_scale=2.0)
    check()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    seen.pop(0)
    check()
