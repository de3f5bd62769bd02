"""Diffusers pipelines as (process, prediction, decode)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdeflow.diffusers.models import Denoiser, FluxDenoiser, bare
from sdeflow.diffusers.schedules import network_time, process_of, target_of, times_of
from sdeflow.errors import InvalidInput, MissingDependency, finite
from sdeflow.guidance import ClassifierFree
from sdeflow.networks import Conditioned, device_of
from sdeflow.predictions import Prediction
from sdeflow.processes import Process


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pipeline taken apart; unpacks as (process, prediction, decode).

    Attributes:
        process: `DiscreteVP` of the scheduler's table (t is the timestep), or `RectifiedFlow` (t is σ, the timestep over their number).
        prediction: the network, conditions and guidance inside.
        decode: state at the data end (batch, *event) → images (batch, channels, height, width) in [0, 1].
        event: shape of one sample's state.
    """

    process: Process
    prediction: Prediction
    decode: Callable[[Tensor], Tensor]
    event: tuple[int, ...]
    _times: Callable[[int], Tensor] = field(repr=False)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.process, self.prediction, self.decode))

    def times(self, steps: int) -> Tensor:
        """The times the pipeline's own scheduler would step through, first to last, float64: a `grid` for a solver.

        Schedulers that end on clean data take one step more from the last of them: `denoise=True` in the solver.
        """
        return self._times(steps)

    def noise(self, batch: int, seed: int = 0) -> Tensor:
        """Start states (batch, *event) in float32 on the network's device."""
        device = device_of(self.prediction.network) or "cpu"
        return self.process.prior((batch, *self.event), seed=seed, device=device)


def require() -> Any:
    """The diffusers package.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependency("sf.diffusers needs diffusers; write: pip install 'sdeflow[diffusers]'") from error
    return diffusers


def from_pretrained(path: str, *, load: dict[str, Any] | None = None, **options: Any) -> Loaded:
    """`from_pipeline` on a folder or hub name.

    Args:
        path: a folder written by `save_pretrained`, or a name on the hub.
        load: arguments of `DiffusionPipeline.from_pretrained`, e.g. {"torch_dtype": torch.float16}.
        options: arguments of `from_pipeline`.
    """
    pipeline = require().DiffusionPipeline.from_pretrained(str(path), **(load or {}))
    return from_pipeline(pipeline, **options)


def from_pipeline(
    pipe: Any,
    *,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    class_labels: int | Sequence[int] | Tensor | None = None,
    null_label: int | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    height: int | None = None,
    width: int | None = None,
    batched: bool = True,
) -> Loaded:
    """A diffusers pipeline as (process, prediction, decode).

    Knows unconditional and class-conditional `UNet2DModel` pipelines (DDPM, DDIM), Stable Diffusion 1.x and 2.x, SDXL,
    DiT, PixArt, Stable Diffusion 3 and Flux. Clipping and thresholding settings of the scheduler are not taken over.

    Args:
        pipe: the pipeline; its networks are used as they are (device, dtype, adapters).
        prompt: one text for all samples, or one a sample.
        negative_prompt: likewise; the empty text by default.
        class_labels: the class of all samples, or one a sample.
        null_label: the class that means "none", for guidance; known for DiT.
        guidance_scale: classifier-free guidance out_u + scale·(out_c − out_u); 1 or less is none, as in diffusers. Networks that
            take the number themselves (Flux, latent consistency models) are given it.
        guidance_rescale: see `ClassifierFree`.
        height, width: of the image in pixels; default: the pipeline's.
        batched: evaluate both halves of the guidance in one call.

    Raises:
        MissingDependency: diffusers is not installed.
        InvalidInput: an unknown pipeline, a scheduler that does not fit the network, guidance without a null condition, or an option
            that the pipeline has no use for.
    """
    require()
    family = _family(pipe)
    if family.text and prompt is None:
        raise InvalidInput(f'{type(pipe).__name__} is conditioned on text; write from_pipeline(pipe, prompt="a cat")')
    if not family.text and prompt is not None:
        raise InvalidInput(
            f"{type(pipe).__name__} takes no prompt; write from_pipeline(pipe, class_labels=3), or neither"
        )
    unused: dict[str, Any] = {"class_labels": class_labels, "null_label": null_label}
    if not family.text:
        unused = {"height": height, "width": width}
    if not family.text or family.distilled:
        unused["negative_prompt"] = negative_prompt
    for name, value in unused.items():
        if value is not None:
            raise InvalidInput(f"{type(pipe).__name__} has no use for {name}={value!r}; leave it out")
    _check_request(prompt, guidance_scale, height, width)
    process, target = process_of(pipe.scheduler, flow=family.flow), target_of(pipe.scheduler, flow=family.flow)
    guided = guidance_scale > 1.0 and not (family.distilled or _embeds_guidance(pipe))
    request = Request(prompt, negative_prompt, class_labels, null_label, guided, guidance_scale, height, width)
    with torch.no_grad():
        parts = family.take(pipe, request)
    time = network_time(pipe.scheduler)
    prediction: Prediction = target(Conditioned(parts.network, **parts.given), process, time)
    if guided:
        if parts.null is None:
            raise InvalidInput(
                "guidance needs a null condition, and this pipeline's network knows none of its own; write "
                "from_pipeline(pipe, class_labels=..., null_label=<the label that means none>, guidance_scale=...)"
            )
        null = target(Conditioned(parts.network, **parts.null), process, time)
        prediction = ClassifierFree(prediction, null, guidance_scale, rescale=guidance_rescale, batched=batched)
    return Loaded(process, prediction, parts.decode, parts.event, lambda n: times_of(pipe.scheduler, n, parts.shift))


def _check_request(prompt: Any, guidance_scale: Any, height: Any, width: Any) -> None:
    texts = [prompt] if prompt is None or isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not texts or not all(text is None or isinstance(text, str) for text in texts):
        raise InvalidInput(
            f'prompt must be a text or a list of them, one a sample; got {prompt!r}. Write prompt="a cat"'
        )
    if not finite(guidance_scale):
        raise InvalidInput(f"guidance_scale must be a finite number; got {guidance_scale!r}. 1 is no guidance")
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 1):
            raise InvalidInput(f"{name} must be a positive number of pixels; got {side!r}")


# --- the families


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    prompt: Any
    negative_prompt: Any
    class_labels: Any
    null_label: int | None
    guided: bool
    guidance_scale: float
    height: int | None
    width: int | None

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)

    @property
    def negative(self) -> list[str]:
        """The negative prompts, as many."""
        given = self.negative_prompt or ""
        return [given] * len(self.prompts) if isinstance(given, str) else list(given)


@dataclass(frozen=True)
class Parts:
    """A pipeline taken apart: network(x, t, **conditions) with its conditions, with and without the text or class."""

    network: torch.nn.Module
    given: dict[str, Any]
    null: dict[str, Any] | None
    decode: Callable[[Tensor], Tensor]
    event: tuple[int, ...]
    shift: Callable[[int], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Family:
    """How to take pipelines of one sort apart."""

    take: Callable[[Any, Request], Parts]
    text: bool = False
    flow: bool = False
    distilled: bool = False


def _unconditional(pipe: Any, request: Request) -> Parts:
    unet = pipe.unet
    size = unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    classes = unet.config.get("num_class_embeds") or unet.config.get("class_embed_type")
    if bool(classes) != (request.class_labels is not None):
        line = "class_labels=3" if classes else "no class_labels"
        raise InvalidInput(
            f"this network {'is' if classes else 'is not'} conditioned on classes; write from_pipeline(pipe, ...) with "
            f"{line}"
        )
    given = {"class_labels": _labels(request.class_labels)} if classes else {}
    count = unet.config.get("num_class_embeds")
    if classes and count and not bool(((given["class_labels"] >= 0) & (given["class_labels"] < count)).all()):
        raise InvalidInput(f"class_labels must be integers from 0 to {count - 1}; got {request.class_labels!r}")
    null = {"class_labels": torch.tensor(request.null_label)} if classes and request.null_label is not None else None
    channels = int(unet.config.in_channels)
    return Parts(Denoiser(unet, channels), given, null, lambda x: _to_unit(x), (channels, *sides))


def _stable_diffusion(pipe: Any, request: Request) -> Parts:
    text, no_text = pipe.encode_prompt(request.prompts, _device(pipe), 1, request.guided, request.negative)
    given = {"encoder_hidden_states": text} | _embedded_guidance(pipe, request, text)
    null = {"encoder_hidden_states": no_text}
    return Parts(
        Denoiser(pipe.unet, int(pipe.unet.config.in_channels)),
        given,
        null if request.guided else None,
        lambda z: _decode(pipe.vae, z),
        _latent_event(pipe, pipe.unet, request),
    )


def _stable_diffusion_xl(pipe: Any, request: Request) -> Parts:
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        request.prompts,
        device=_device(pipe),
        do_classifier_free_guidance=request.guided,
        negative_prompt=request.negative if request.negative_prompt is not None else None,
    )
    event = _latent_event(pipe, pipe.unet, request)
    pixels = tuple(side * pipe.vae_scale_factor for side in event[1:])
    encoder = pipe.text_encoder_2
    width = int(pooled.shape[-1]) if encoder is None else encoder.config.projection_dim
    ids = pipe._get_add_time_ids(pixels, (0, 0), pixels, dtype=text.dtype, text_encoder_projection_dim=width)
    ids = ids.to(text.device).expand(len(text), -1)

    def conditions(text: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    null = conditions(no_text, no_pooled) if request.guided else None
    network = Denoiser(pipe.unet, int(pipe.unet.config.in_channels))
    given = conditions(text, pooled) | _embedded_guidance(pipe, request, text)
    return Parts(network, given, null, lambda z: _decode(pipe.vae, z), event)


def _stable_diffusion_3(pipe: Any, request: Request) -> Parts:
    text, no_text, pooled, no_pooled = pipe.encode_prompt(
        prompt=request.prompts,
        prompt_2=None,
        prompt_3=None,
        device=_device(pipe),
        do_classifier_free_guidance=request.guided,
        negative_prompt=request.negative,
    )
    event = _latent_event(pipe, pipe.transformer, request)
    tokens = (event[1] // pipe.transformer.config.patch_size) * (event[2] // pipe.transformer.config.patch_size)

    def shift(steps: int) -> dict[str, Any]:
        return {"mu": _mu(pipe.scheduler, tokens)} if pipe.scheduler.config.get("use_dynamic_shifting") else {}

    return Parts(
        Denoiser(pipe.transformer, event[0]),
        {"encoder_hidden_states": text, "pooled_projections": pooled},
        {"encoder_hidden_states": no_text, "pooled_projections": no_pooled} if request.guided else None,
        lambda z: _decode(pipe.vae, z),
        event,
        shift,
    )


def _pixart(pipe: Any, request: Request) -> Parts:
    text, mask, no_text, no_mask = pipe.encode_prompt(
        request.prompts, request.guided, request.negative, device=_device(pipe), clean_caption=True
    )
    event = _latent_event(pipe, pipe.transformer, request)
    size = {}
    if bare(pipe.transformer).use_additional_conditions:
        high, wide = (float(side * pipe.vae_scale_factor) for side in event[1:])
        size = {"resolution": torch.tensor([[high, wide]]), "aspect_ratio": torch.tensor([[high / wide]])}
        size = {"added_cond_kwargs": {name: value.to(text.device, text.dtype) for name, value in size.items()}}
    return Parts(
        Denoiser(pipe.transformer, event[0]),
        {"encoder_hidden_states": text, "encoder_attention_mask": mask} | size,
        {"encoder_hidden_states": no_text, "encoder_attention_mask": no_mask} | size if request.guided else None,
        lambda z: _decode(pipe.vae, z),
        event,
    )


def _flux(pipe: Any, request: Request) -> Parts:
    text, pooled, text_ids = pipe.encode_prompt(prompt=request.prompts, prompt_2=None, device=_device(pipe))
    scale = pipe.vae_scale_factor
    high, wide = (
        2 * (int(side or pipe.default_sample_size * scale) // (2 * scale)) for side in (request.height, request.width)
    )
    image_ids = pipe._prepare_latent_image_ids(1, high // 2, wide // 2, text.device, text.dtype)
    tokens, channels = (high // 2) * (wide // 2), int(pipe.transformer.config.in_channels)
    given = {
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "txt_ids": text_ids[None],
        "img_ids": image_ids[None],
    }
    if pipe.transformer.config.guidance_embeds:
        given["guidance"] = torch.tensor(request.guidance_scale, dtype=torch.float32)

    def shift(steps: int) -> dict[str, Any]:
        own = {"sigmas": [1.0 - n / steps for n in range(steps)]}
        return own | ({"mu": _mu(pipe.scheduler, tokens)} if pipe.scheduler.config.get("use_dynamic_shifting") else {})

    def decode(z: Tensor) -> Tensor:
        return _decode(pipe.vae, pipe._unpack_latents(z, high * scale, wide * scale, scale))

    return Parts(FluxDenoiser(pipe.transformer), given, None, decode, (tokens, channels), shift)


def _dit(pipe: Any, request: Request) -> Parts:
    config = pipe.transformer.config
    if request.class_labels is None:
        raise InvalidInput("DiT is conditioned on classes; write from_pipeline(pipe, class_labels=207)")
    count = int(config.num_embeds_ada_norm)  # the embedding after the last is that of no class
    null = count if request.null_label is None else request.null_label
    labels = _labels(request.class_labels)
    if not bool(((labels >= 0) & (labels <= count)).all()) or not 0 <= null <= count:
        raise InvalidInput(
            f"class_labels and null_label must be integers from 0 to {count}; got {request.class_labels!r} and {null!r}"
        )
    channels, side = int(config.in_channels), int(config.sample_size)
    return Parts(
        Denoiser(pipe.transformer, channels),
        {"class_labels": labels},
        {"class_labels": torch.tensor(null)},
        lambda z: _decode(pipe.vae, z),
        (channels, side, side),
    )


FAMILIES: dict[str, Family] = {
    "DDPMPipeline": Family(_unconditional),
    "DDIMPipeline": Family(_unconditional),
    "StableDiffusionPipeline": Family(_stable_diffusion, text=True),
    "StableDiffusionXLPipeline": Family(_stable_diffusion_xl, text=True),
    "StableDiffusion3Pipeline": Family(_stable_diffusion_3, text=True, flow=True),
    "FluxPipeline": Family(_flux, text=True, flow=True, distilled=True),
    "DiTPipeline": Family(_dit),
    "PixArtAlphaPipeline": Family(_pixart, text=True),
    "PixArtSigmaPipeline": Family(_pixart, text=True),
}
"""Pipelines by class name."""


def _family(pipe: Any) -> Family:
    for kind in type(pipe).__mro__:
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    network = "transformer" if hasattr(pipe, "transformer") else "unet"
    raise InvalidInput(
        f"from_pipeline does not know {type(pipe).__name__}; it knows {', '.join(FAMILIES)}. For a bare network write "
        f"sf.diffusers.prediction_of(pipe.{network}, pipe.scheduler), or sf.NoisePrediction(lambda x, t: ..., process)"
    )


def _labels(labels: Any) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.ndim > 1:
        raise InvalidInput(f"class_labels must be an integer or one a sample; got {labels.dtype} of {labels.ndim} axes")
    return labels


def _embeds_guidance(pipe: Any) -> bool:
    """Whether the network is one distilled under guidance, which is given the scale as an embedding (Meng et al. 2023)."""
    return getattr(getattr(pipe, "unet", None), "config", {}).get("time_cond_proj_dim") is not None


def _embedded_guidance(pipe: Any, request: Request, text: Tensor) -> dict[str, Any]:
    if not _embeds_guidance(pipe):
        return {}
    w = torch.tensor([request.guidance_scale - 1.0])  # the network was trained on w = scale − 1
    embedding = pipe.get_guidance_scale_embedding(w, embedding_dim=pipe.unet.config.time_cond_proj_dim)
    return {"timestep_cond": embedding.to(text.device, text.dtype)}


def _latent_event(pipe: Any, network: Any, request: Request) -> tuple[int, ...]:
    own = network.config.sample_size
    own = (own, own) if isinstance(own, int) else tuple(own)
    asked = (request.height, request.width)
    sides = (side // pipe.vae_scale_factor if side else default for side, default in zip(asked, own, strict=True))
    return (int(network.config.in_channels), *sides)


def _decode(vae: Any, z: Tensor) -> Tensor:
    """Images in [0, 1] of latents in the network's units."""
    config, z = vae.config, z.to(vae.dtype)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, dtype=z.dtype, device=z.device).reshape(1, -1, 1, 1) for v in (mean, std))
        z = z * std / config.scaling_factor + mean
    else:
        z = z / config.scaling_factor + (config.get("shift_factor") or 0.0)
    return _to_unit(vae.decode(z, return_dict=False)[0])


def _to_unit(x: Tensor) -> Tensor:
    return (0.5 * x + 0.5).clamp(0.0, 1.0)


def _mu(scheduler: Any, tokens: int) -> float:
    """Shift of the noise levels, linear in the number of image tokens (Esser et al. 2024)."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)


def _device(pipe: Any) -> torch.device:
    return torch.device(pipe._execution_device)
