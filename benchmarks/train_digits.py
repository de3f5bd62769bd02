"""Train the small class-conditional networks the tests and benchmarks use: scikit-learn's digits, CPU, minutes.

    python benchmarks/train_digits.py --output tests/data/digits

writes one diffusers pipeline folder a target (`noise`, `v`) and `training.json` with seed, data hash, losses, versions.

The network is a `UNet2DModel` of 225 thousand parameters on 8×8 pixels in [−1, 1]. Labels 0…9 are the digits and 10 is
"no class", shown in 10 % of the rows, so one network serves conditional, unconditional and guided sampling (Ho & Salimans
2022). Times are drawn from the whole interval [0, 999], not from its integers, because the solvers evaluate in between.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import sklearn
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

import sdeflow as sf

NO_CLASS = 10
TARGETS: dict[str, Literal["epsilon", "v_prediction"]] = {"noise": "epsilon", "v": "v_prediction"}
"""Our names of the targets and the schedulers' names of them."""
TRAIN = 1437
"""Rows of the training part; the other 360 are held out."""


def split(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, their labels, held-out images, their labels): images float32 (n, 1, 8, 8) in [−1, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    images = torch.from_numpy(pixels[order] / 8.0 - 1.0).float().reshape(-1, 1, 8, 8)
    classes = torch.from_numpy(labels[order]).long()
    return images[:TRAIN], classes[:TRAIN], images[TRAIN:], classes[TRAIN:]


def data_hash(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of the training set, so that other data cannot pass for these."""
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


def network() -> UNet2DModel:
    """The untrained network."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        num_class_embeds=NO_CLASS + 1,
    )


def train(target: str, steps: int, batch: int, seed: int) -> tuple[UNet2DModel, list[float]]:
    """The trained network (exponential average of its weights) and the mean loss of every tenth of the run."""
    torch.set_num_threads(1)  # the order of sums, and so the last bits of the weights, depends on it
    images, labels, _, _ = split()
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    process = sf.DiscreteVP.linear()
    model = network()
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for n in range(steps):
        rows = torch.randint(len(images), (batch,), generator=draw)
        hidden = torch.rand(batch, generator=draw) < 0.1
        x0, classes = images[rows], labels[rows].masked_fill(hidden, NO_CLASS)
        # one draw and its shifts cover the interval evenly: less variance than independent times
        t = 999.0 * ((torch.rand(1, generator=draw) + torch.arange(batch) / batch) % 1.0).double()
        noise = torch.randn(x0.shape, generator=draw)
        x = process.perturb(x0, t, noise)
        alpha, sigma = (c.float().reshape(-1, 1, 1, 1) for c in (process.alpha(t), process.sigma(t)))
        wanted = noise if target == "noise" else alpha * noise - sigma * x0
        loss = (model(x, t.float(), class_labels=classes).sample - wanted).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.995, (1 + n) / (10 + n))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1.0 - decay)
        losses.append(loss.item())
        if (n + 1) % max(1, steps // 10) == 0:
            print(f"{target} {n + 1}/{steps}: loss {np.mean(losses[-steps // 10 :]):.4f}", flush=True)
    return average.eval(), [round(float(np.mean(part)), 5) for part in np.array_split(np.array(losses), 10)]


def run(target: str, steps: int, batch: int, seed: int, folder: Path) -> dict:
    """Train one target, save its pipeline into `folder`, return its part of the record."""
    began = time.perf_counter()
    model, losses = train(target, steps, batch, seed)
    DDPMPipeline(model, DDPMScheduler(prediction_type=TARGETS[target])).save_pretrained(folder)
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "cpu_seconds": round(time.process_time(), 1),
        "seconds": round(time.perf_counter() - began, 1),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small networks on scikit-learn's digits.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    images, labels, _, _ = split()
    record = {
        "data": "scikit-learn digits, first 1437 rows of numpy.random.default_rng(0).permutation(1797)",
        "data_sha256": data_hash(images, labels),
        "seed": given.seed,
        "steps": given.steps,
        "batch": given.batch,
        "threads": 1,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, sklearn, np)}
        | {"python": platform.python_version()},
    }
    with ProcessPoolExecutor(len(TARGETS), mp_context=get_context("spawn")) as pool:
        jobs = {t: pool.submit(run, t, given.steps, given.batch, given.seed, given.output / t) for t in TARGETS}
        record["targets"] = {target: job.result() for target, job in jobs.items()}
    (given.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
