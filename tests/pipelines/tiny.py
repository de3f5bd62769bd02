"""Tiny diffusers pipelines with random weights, built without downloads."""

# diffusers' annotations admit neither plain tensors as latents nor what its pipelines return
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

from __future__ import annotations

import json

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def tokenizer(folder):
    """CLIP's tokenizer over single letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({word: n for n, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(_save(folder, words))


def _save(folder, words):
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 16,
                "bos_token": words[0],
                "eos_token": words[1],
                "unk_token": words[1],
                "pad_token": words[1],
            }
        )
    )
    return folder


def text_encoder(projected=False, width=32):
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def autoencoder(channels=4, shift=None):
    torch.manual_seed(2)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
        shift_factor=shift,
    ).eval()


def unet(**own):
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **({"cross_attention_dim": 32, "attention_head_dim": 4} | own),
    ).eval()


def stable_diffusion(folder, prediction_type="epsilon"):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return _quiet(
        StableDiffusionPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(folder),
            unet=unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(folder):
    network = unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=1,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    own = tokenizer(folder)
    return _quiet(
        StableDiffusionXLPipeline(
            vae=autoencoder(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(projected=True),
            tokenizer=own,
            tokenizer_2=own,
            unet=network,
            scheduler=scheduler,
            add_watermarker=False,
        )
    )


def stable_diffusion_3(folder):
    torch.manual_seed(4)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
    ).eval()
    own = tokenizer(folder)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(16, shift=0.06),
            text_encoder=text_encoder(projected=True),
            text_encoder_2=text_encoder(projected=True),
            tokenizer=own,
            tokenizer_2=own,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux(folder):
    torch.manual_seed(5)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)).eval()
    own = tokenizer(folder)
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=autoencoder(4, shift=0.1),
            text_encoder=text_encoder(),
            tokenizer=own,
            text_encoder_2=t5,
            tokenizer_2=own,
            transformer=transformer,
        )
    )


def dit():
    torch.manual_seed(6)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    ).eval()
    return _quiet(DiTPipeline(transformer, autoencoder(), DDIMScheduler(clip_sample=False, set_alpha_to_one=False)))


def pixart(folder, sigma=False):
    torch.manual_seed(8)
    transformer = PixArtTransformer2DModel(
        sample_size=128,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=24,
        caption_channels=32,
        use_additional_conditions=False if sigma else None,
    ).eval()
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)).eval()
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return _quiet(kind(tokenizer(folder), t5, autoencoder(), transformer, scheduler))


def unconditional():
    torch.manual_seed(7)
    network = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return _quiet(DDIMPipeline(network, DDIMScheduler(clip_sample=False)))


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
