# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
"""The diffusion model: noise destroys pictures step by step; learn to undo it, start from static.

    x_0 --> x_1 --> x_2 --> ... --> x_T    q: each step adds noise; nothing is learnt here
    x_0 <-- x_1 <-- x_2 <-- ... <-- x_T    p: a U-Net estimates x_0; each step goes part of the way
    "a smiling face with long red hair" --> a vector --> every residual block of the U-Net

To guess what is under the noise is easier than to paint, and every noised picture is a training
example with a known answer. Many small steps, each toward such a guess, turn static into a new
picture. Guidance makes the guesses follow the prompt more closely.

    python ddpm.py                    on faces that this script draws; see out/ddpm/samples.png
    python ddpm.py --prompt "a smiling face with long red hair and glasses"
    python ddpm.py --data mnist --prompt "a seven"
    python ddpm.py --data ./photos    pictures of your own; a picture's folder says what it shows
    torchrun --nproc-per-node 2 ddpm.py                  on several GPUs, or processes

Papers: Sohl-Dickstein et al. 2015 (arXiv:1503.03585), the idea; Ho, Jain, Abbeel 2020
(arXiv:2006.11239), DDPM; Song, Meng, Ermon 2020 (arXiv:2010.02502), DDIM; Nichol, Dhariwal 2021
(arXiv:2102.09672), the cosine schedule; Ho, Salimans 2022 (arXiv:2207.12598), guidance.
"""
import argparse
import atexit
import copy
import functools
import gzip
import io
import math
import os
import re
import struct
import sys
import tarfile
import time
import urllib.request
import warnings
import zlib
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm import tqdm

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def setting(default, help, *choices):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting; the command line is made from it. Helpers are at the end of the file."""
    data: str = setting("faces", "faces (drawn here), mnist, fashion, cifar10, a folder of photos")
    prompt: str = setting("", "what to draw; several, comma-separated; if empty, some kinds")
    guidance: float = setting(3.0, "0 ignores the prompt, 1 is as trained, more follows it closer")
    sampling_steps: int = setting(25, "steps from static to picture")
    eta: float = setting(0.0, "fresh noise in each step: 0 none (DDIM), 1 as in Ho et al.")
    unseen: str = setting("", "kinds kept out of training, comma-separated: do words combine?")
    diffusion_steps: int = setting(1000, "T, the steps from picture to static")
    width: int = setting(32, "channels at the finer resolution, a multiple of 8; the coarser: 3x")
    blocks: int = setting(2, "residual blocks at the coarser resolution")
    image_size: int = setting(0, "height and width, a multiple of 4; 0: 28 if grey, else 32")
    faces: int = setting(0, "faces to draw; 0: 40,000 at 32x32, fewer at larger sizes")
    batch_size: int = setting(16, "pictures per step, over all processes")
    learning_rate: float = setting(4e-3, "its peak; lower it if training diverges")
    steps: int = setting(3000, "optimiser steps in total; the learning rate falls to 0 over them")
    samples: int = setting(50, "pictures in samples.png")
    seed: int = setting(0, "of the training; of a finished model, only of its samples")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    data_dir: str = setting("data", "where downloads are")
    out: str = setting("", "folder of results; default: out/ddpm, plus the fixed settings given")
    restart: bool = setting(False, "throw away the checkpoint, begin afresh with what is given")
    FREE = ("prompt", "guidance", "sampling_steps", "eta", "steps", "samples", "seed", "device",
            "data_dir", "out", "restart")  # the rest is fixed

    def __post_init__(self):
        settle(self)


# ==== 1. Pictures and captions ====================================================================
# Pictures are bytes (N, C, H, W), C = 1 (grey) or 3. B is the size of a batch.


def captions(name):
    """Twelve captions of a picture whose kind is ``name``, equally probable in training. Of a drawn
    face a quarter are shorter, so that a prompt may ask for a part and leave the rest open."""
    vowel = re.match("(?i)(?!one|uni|eu|use)[aeiou]", name)  # by its sound, roughly
    whole = ("an " if vowel else "a ") + name.replace("_", " ")
    if name not in FACES:
        return 12 * [whole]
    mood, _, _, length, colour, *_ = name.split()
    other = "a face with glasses" if "glasses" in name else f"a face with {length} hair"
    return 9 * [whole] + [f"a {mood} face", f"a face with {colour} hair", other]


# ==== 2. Destruction ==============================================================================
# A step of q shrinks the picture a little and adds a little noise (Ho et al. 2020, equation 2):
#
#   x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps,   eps ~ N(0, I)
#
# Sums of Gaussians are Gaussian, so t steps are one (equation 4), where alpha_bar_t is the product
# of 1 - beta over the steps 1 to t:
#
#   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
#
# Training can therefore jump to any t at once. By T nearly all signal must be gone: sampling begins
# with pure noise, and training must have seen that.


def cosine_schedule(steps):
    """alpha_bar_0 = 1 to alpha_bar_T near 0: (T + 1,) in float64 (Nichol, Dhariwal, equation 17).
    It falls slowly at both ends; with the linear beta of Ho et al. much of the chain is nearly pure
    noise. The clamp keeps alpha_bar_T, by which we divide, above 0."""
    progress = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((progress + 0.008) / 1.008 * math.pi / 2)**2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


# ==== 3. The network ==============================================================================
class PromptEncoder(nn.Module):
    """Prompts -> vectors (B, E): the sum over words of SiLU(vector of the word + vector of its
    place). Without the SiLU the sum would forget the order of the words. Places are counted from
    the end: "dog" is at 0 in "a dog" and in "a hot dog"."""

    def __init__(self, size, vocabulary=2048, places=16):
        super().__init__()
        self.word, self.place = nn.Embedding(vocabulary, size), nn.Embedding(places, size)
        self.names = []  # of kinds; the words of their captions are what it knows

    def get_extra_state(self):  # so the names are saved and loaded with the weights
        return self.names

    def set_extra_state(self, names):
        self.names = names

    def tokens(self, prompts):
        """B strings -> numbers of their words (B, words), 0 for none. UserError: unknown word."""
        known = sorted({w for name in self.names for w in " ".join(captions(name)).lower().split()})
        rows = [prompt.lower().split() for prompt in prompts]
        for word in [word for row in rows for word in row if word not in known]:
            raise UserError(f"no caption has the word {word!r}; known: {' '.join(known)}")
        length = max([1, *map(len, rows)])
        rows = [[0] * (length - len(row)) + [known.index(word) + 1 for word in row] for row in rows]
        return torch.tensor(rows, dtype=torch.long)

    def forward(self, tokens):
        place = torch.arange(tokens.shape[1], device=tokens.device).flip(0)
        x = self.word(tokens) + self.place(place.clamp(max=self.place.num_embeddings - 1))
        return (F.silu(x) * (tokens > 0)[:, :, None]).sum(1)           # (B, E); 0 for no words


class Residual(nn.Module):
    """skip(x) + f(x, e): (B, in, H, W), (B, E) -> (B, out, H, W). The vector e, time plus prompt,
    scales and shifts the channels between two convolutions (Dhariwal, Nichol 2021,
    arXiv:2105.05233, section 3). The last layer starts at zero, hence f too."""

    def __init__(self, inside, outside, size):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside, affine=False)
        self.conv1 = nn.Conv2d(inside, outside, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, kernel_size=3, padding=1)
        self.modulate = nn.Linear(size, 2 * outside)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, e):
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, dim=1)        # (B, out, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


class UNet(nn.Module):
    r"""x_t (B, C, H, W), t (B,), tokens (B, words) -> an estimate of x_0, (B, C, H, W).

    32x32 --fold--> 16x16 -> Residual -------------- skip -------------> Residual -> unfold
                                  \--fold--> 8x8 -> Residuals --unfold--/

    The way down sees the whole, the skip keeps the detail (Ronneberger et al. 2015,
    arXiv:1505.04597). 2x2 pixels are folded into channels, so only the last, narrow convolution
    runs at full resolution, where convolutions cost most. The first fold is 4x4 for 64x64, 8x8 for
    128x128: 1.3 and 2.3 times the work of 32x32, but details get a smaller part of the network."""

    def __init__(self, channels, size, width, blocks, diffusion_steps, E=128):
        super().__init__()
        alpha_bar = cosine_schedule(diffusion_steps)
        self.alpha_bar = alpha_bar.tolist()  # Python floats, for sampling
        self.register_buffer("signal", alpha_bar.sqrt().float())                 # (T + 1,)
        self.register_buffer("noise", (1 - alpha_bar).sqrt().float())
        self.register_buffer("error", torch.ones(diffusion_steps + 1))  # see objective
        self.register_buffer("frequency", 10000 ** (-torch.arange(32) / 32))
        self.shape = channels, size, size
        fold = next(f for f in (8, 4, 2) if f == 2 or size >= 16 * f and size % (2 * f) == 0)
        self.prompt = PromptEncoder(E)
        self.time = nn.Sequential(nn.Linear(64, E), nn.SiLU(), nn.Linear(E, E))
        self.fold1 = nn.Sequential(nn.PixelUnshuffle(fold),
                                   nn.Conv2d(fold**2 * channels, width, kernel_size=3, padding=1))
        self.map = nn.Parameter(torch.zeros(width, size // fold, size // fold))  # learned
        self.down = Residual(width, width, E)
        self.fold2 = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, 3 * width, 1))
        self.middle = nn.ModuleList(Residual(3 * width, 3 * width, E) for _ in range(blocks))
        self.unfold2 = nn.Sequential(nn.Conv2d(3 * width, 4 * width, 1), nn.PixelShuffle(2))
        self.up = Residual(2 * width, width, E)
        self.unfold1 = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, fold**2 * 8, 3, padding=1),
            nn.PixelShuffle(fold), nn.SiLU(), nn.Conv2d(8, channels, 3, padding=1))

    def diffuse(self, x0, t, eps):
        """x_t of q(x_t | x_0): x0 and eps (B, C, H, W), t (B,) from 0 to T -> (B, C, H, W)."""
        return self.signal[t, None, None, None] * x0 + self.noise[t, None, None, None] * eps

    def forward(self, x, t, tokens):
        angle = t[:, None] * self.frequency  # t becomes sinusoids (Vaswani et al. 2017), (B, 64)
        e = F.silu(self.time(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.prompt(tokens))
        x = skip = self.down(self.fold1(x) + self.map, e)                        # (B, w, 16, 16)
        x = self.fold2(x)                                                        # (B, 3 w, 8, 8)
        for block in self.middle:
            x = block(x, e)
        x = self.up(torch.cat([self.unfold2(x), skip], dim=1), e)                # (B, w, 16, 16)
        return self.unfold1(x).float()                                           # (B, C, 32, 32)


# ==== 4. Objective ================================================================================
# What should the network predict? Given x_t, the noise and the picture follow from each other. Ho
# et al. ask for the noise, Salimans and Ho 2022 (arXiv:2202.00512) for v, a mixture of both. Here
# it is the picture: this small network learns that faster, as it need not reproduce the noise.
#
# The loss is the squared error of x_0, times a weight. With SNR = alpha_bar / (1 - alpha_bar) as
# the weight it would be the squared error of the noise (L_simple of Ho et al., equation 14); with
# 1 + SNR, that of v. Both count small t most, where x_t shows nearly all of x_0. So the weight is
# 1 + SNR, 5 at most (as Hang et al. 2023, arXiv:2303.09556, limit SNR).


def objective(model, estimate, x0, t):
    """The loss: estimate and x0 (B, C, H, W), t (B,). Chapter 7 needs the mean error at each t."""
    error = (estimate - x0).square().mean((1, 2, 3))
    model.error[t] = model.error[t].lerp(error.detach(), 0.1)
    return ((1 / model.noise[t]**2).clamp(max=5) * error).mean()  # 1 + SNR = 1 / (1 - alpha_bar)


# ==== 5. Training =================================================================================
def draw_batch(config, step, images, labels, table):
    """Sample x0 and eps (B, C, H, W), t (B,), tokens (B, words) of the captions in ``table``. One t
    is in each of B parts of 1 ... T: steps differ less (after Kingma et al. 2021, 2107.00630)."""
    device, T = images.device, config.diffusion_steps
    rows = batch_rows(config, step, len(images), device)
    x0, B = images[rows] / 127.5 - 1, len(rows)
    part = (torch.randperm(B, device=device) + torch.rand(B, device=device)) / B     # 0 to 1
    t = 1 + (part * T).long().clamp(max=T - 1)
    tokens = table[labels[rows], torch.randint(table.shape[1], (B,), device=device)]
    kept = torch.rand(B, 1, device=device) > 0.1  # a tenth has no caption, for guidance
    batch = x0, t, torch.randn_like(x0), tokens * kept
    return [x[RANK::RANKS] for x in batch]  # drawn for all processes: each takes its rows


def schedule(progress):
    """Learning rate, as a share of its peak, at ``progress`` 0 to 1: a ramp, then half a cosine."""
    return min(1.0, progress / 0.03) * 0.5 * (1 + math.cos(math.pi * progress))


def train(config):
    """Train what is left, judge and sample; all goes to ``config.out`` -> the averaged UNet. Raises
    UserError (data, settings or folder will not do), FloatingPointError (training diverges)."""
    device = join_ranks(config.device)
    gpu = device.type == "cuda"
    torch.manual_seed(config.seed)
    model = new_unet(config).to(device)
    average = copy.deepcopy(model)  # of the weights over some hundred steps: better than the last
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=device.type != "mps")
    run = RankedRun(config, model=model, average=average, optimizer=optimizer)
    if not run.finished:
        data, table = prepare(config, model, average)
        images, labels, table = (x.to(device) for x in (*data[:2], table))
        network = nn.parallel.DistributedDataParallel(model) if RANKS > 1 else model
        for step in run.steps():
            torch.manual_seed(hash((config.seed, step)))  # a resumed run draws the same numbers
            # Learning rate
            progress = (step + 0.5) / config.steps
            optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(progress)
            # Batch
            x0, t, eps, tokens = draw_batch(config, step, images, labels, table)
            # Loss
            with torch.autocast("cuda" if gpu else "cpu", torch.bfloat16, enabled=gpu):
                estimate = network(model.diffuse(x0, t, eps), t, tokens)
            loss = objective(model, estimate, x0, t)
            # Gradient, clipped, and update
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1)
            optimizer.step()
            # Average, at first of fewer steps: the first weights are random
            decay = min(0.998, (1 + step) / (10 + step))
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.data.lerp_(parameter.data, 1 - decay)
            average.error.copy_(model.error)
            run.log(loss=loss, grad_norm=grad_norm)
            if (step + 1) % max(1, config.steps // 10) == 0:
                draw_samples(run, average)
        draw_forward(run, average, data.test)
        draw_neighbours(run, average, data.train)
        run.finish(judge(average, data.test))
    draw_samples(run, average)
    draw_denoising(run, average)
    print(f"{config.out}, on held-out data: {run.figures}")
    return average.eval()


# ==== 6. Sampling =================================================================================
# One step back, from t to an earlier s: ask the network for x_0, then add noise to that again, as
# much as there is at s, part of it the noise that is in x_t, part of it fresh.
def step_back(alpha_bar, x0, xt, t, s, eta):
    """Mean (B, C, H, W) and standard deviation of x_s, given x_t and x_0, for two numbers s < t
    (Song et al. 2020, equations 12 and 16). With eta 1 it is the posterior q(x_s | x_t, x_0), and
    from t to t - 1 the step of Ho et al. (equation 7). With eta 0 nothing is random, and large
    steps cost less. At s = 0 it is x_0: no noise at the last step."""
    a, b = alpha_bar[t], alpha_bar[s]
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    eps = (xt - math.sqrt(a) * x0) / math.sqrt(1 - a)
    return math.sqrt(b) * x0 + math.sqrt(max(0, 1 - b - sigma**2)) * eps, sigma


def guided(model, x, t, tokens, guidance):
    """Classifier-free guidance: extrapolate from the estimate of x_0 without the prompt to the one
    with it (Ho, Salimans 2022, equation 6, for the noise, which comes to the same). guidance (B,):
    0 is without, 1 with the prompt, 2 twice as far; the paper's w is guidance - 1."""
    twice = torch.cat([tokens, torch.zeros_like(tokens)])
    prompted, unprompted = model(torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
    return unprompted + guidance[:, None, None, None] * (prompted - unprompted)


@torch.no_grad()
def denoise(model, prompts, sampling_steps, guidance, eta=0.0, seed=None):
    """Yield x (N, C, H, W): pure noise, then what each step makes of it; the last is in [-1, 1]."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    T, device = len(model.alpha_bar) - 1, model.signal.device
    tokens = model.prompt.tokens(prompts).to(device)
    guidance = torch.as_tensor(guidance, dtype=torch.float32, device=device).expand(len(prompts))
    times = torch.linspace(T, 0, min(sampling_steps, T) + 1).round().long().tolist()
    x = torch.randn(len(prompts), *model.shape, generator=generator).to(device)
    yield x
    for t, s in zip(times[:-1], times[1:], strict=True):
        parts = [a.split(250) for a in (x, torch.full_like(tokens[:, 0], t), tokens, guidance)]
        x0 = torch.cat([guided(model, *part) for part in zip(*parts, strict=True)])
        x, sigma = step_back(model.alpha_bar, x0.clamp(-1, 1), x, t, s, eta)
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator).to(device)
        yield x


def sample(model, prompts, sampling_steps=25, guidance=3.0, eta=0.0, seed=None):
    """A picture for each of N prompts -> (N, C, H, W) in [0, 1]; ``guidance`` is a number, or one
    for each. The same seed gives the same pictures; None draws from torch's global generator."""
    for x in denoise(model, prompts, sampling_steps, guidance, eta, seed):
        images = (x / 2 + 0.5).clamp(0, 1)  # only the last is returned
    return images


# ==== 7. Judging, on held-out pictures ============================================================
# How many bits does it take, at most, to transmit a picture? x_T, then each x_{t-1} given x_t, then
# the pixels given x_1; averaged over q by drawing each x_t once (Ho et al. 2020, equation 5):
#
#   L = KL( q(x_T|x_0) || N(0, I) )  -  log p(x_0|x_1)
#       + sum over t > 1 of KL( q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t) )
#
# q here is step_back with eta 1. p has variance beta_t (one of two choices in section 3.2), and the
# mean of step_back with an estimate of x_0. For small t, x_t / sqrt(alpha_bar_t) is closer to x_0
# than the network's output, so the estimate is the mean of both, weighted by 1 / squared error.


def log_decoder(x0, mean, sigma):
    """log p(x_0 | x_1), (B, C, H, W): the mass of N(mean, sigma^2) in each pixel's bin of 2/255;
    the bins of black and white reach to infinity (Ho et al. 2020, equation 13)."""
    gap = (x0 - mean).abs()  # symmetric: high is the edge nearer the mean, low the outer one
    high = torch.special.log_ndtr((1 / 255 - gap) / sigma)
    low = torch.special.log_ndtr((-1 / 255 - gap) / sigma).masked_fill(x0.abs() > 0.999, -math.inf)
    return high + torch.log1p(-(low - high).exp())


@torch.no_grad()
def bits_per_dim(model, images):
    """L in bits per value, prompt empty: pictures (B, C, H, W) in [0, 1], of 256 levels -> (B,)."""
    alpha_bar, x0, nats = model.alpha_bar, (2 * images - 1).to(model.signal.device), 0.0
    for t in tqdm(range(1, len(alpha_bar)), "judging", leave=False, delay=2):
        a, beta = alpha_bar[t], 1 - alpha_bar[t] / alpha_bar[t - 1]
        at = torch.full((len(x0),), t, device=x0.device)
        xt = model.diffuse(x0, at, torch.randn_like(x0))
        weight = 1 / (1 + (1 - a) / a / model.error[t].item())  # (1 - a) / a: that of x_t / sqrt(a)
        estimate = model(xt, at, torch.zeros_like(at)[:, None])
        estimate = estimate.lerp(xt / math.sqrt(a), weight).clamp(-1, 1)
        if t == 1:  # on the CPU, because log_ndtr is not there on every device
            term = -log_decoder(x0.cpu(), estimate.cpu(), math.sqrt(beta))
        else:  # the KL of two Gaussians, in each value
            mean, sigma = step_back(alpha_bar, x0, xt, t, t - 1, eta=1)
            gap = mean - step_back(alpha_bar, estimate, xt, t, t - 1, eta=1)[0]
            term = 0.5 * (math.log(beta / sigma**2) + (sigma**2 + gap**2) / beta - 1)
        nats += term.cpu().flatten(1).sum(1)
    nats += 0.5 * (a * x0**2 - a - math.log1p(-a)).cpu().flatten(1).sum(1)         # the KL at T
    return nats / math.log(2) / x0[0].numel()


def judge(model, test):
    """Bits per value, the mean over 16 held-out pictures."""
    torch.manual_seed(0)  # so that figures can be compared
    return {"bits_per_dim": bits_per_dim(model, test[:16] / 255).mean().item()}


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status."""
    if RANK == 0:
        return exit_status(train, argv)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return exit_status(train, argv)  # rank 0 alone speaks


# ==== Utilities ===================================================================================
NAME = "ddpm"
SAVE_SECONDS = 30  # between two checkpoints
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
URLS = {"mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "cifar10": "https://www.cs.toronto.edu/~kriz/"}
DATASETS = ("faces", *URLS)
KINDS = {"mnist": "zero one two three four five six seven eight nine".split(),
         "fashion": ["t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt",
                     "sneaker", "bag", "ankle boot"],
         "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split()}
# Half the width of the mouth, y (down) of lips and corners, light inside; brows: rise and slant
MOODS = {"smiling": (0.25, 0.00, 0.19, -0.07, 0.97, 0.00, 0.0),
         "sad": (0.20, -0.03, 0.06, 0.15, 0.30, 0.00, 0.6),
         "surprised": (0.13, -0.09, 0.17, 0.03, 0.12, 0.08, 0.0)}
HAIR = {"black": (0.10, 0.09, 0.11), "brown": (0.42, 0.25, 0.14), "blond": (0.93, 0.77, 0.36),
        "red": (0.78, 0.29, 0.10), "grey": (0.68, 0.68, 0.71)}
FACES = [f"{mood} face with {length} {colour} hair{glasses}" for mood in MOODS
         for length in ("short", "long") for colour in HAIR for glasses in ("", " and glasses")]


def split(text):
    return [name.strip() for name in text.split(",") if name.strip()]


def prepare(config, *models):
    """Images less the --unseen kinds, and tokens (kinds, 12, words) of the captions of all."""
    if RANK > 0:
        dist.barrier()  # until rank 0 has downloaded
    data = load_images(config)
    if RANKS > 1 and RANK == 0:
        dist.barrier()
    names, unseen = data.names or KINDS[config.data], split(config.unseen)
    seen = torch.tensor([name not in unseen for name in names])[data.train_labels]
    if not set(unseen) <= set(names) or not seen.any():
        raise UserError(f"--unseen takes some, not all, of: {', '.join(names)}")
    for model in models:
        if model.prompt.names not in ([], names):
            raise UserError(f"{config.out} began with other kinds of pictures")
        model.prompt.names = names
    models[0].prompt.tokens([*split(config.prompt), ""])  # an unknown word fails before training
    tokens = models[0].prompt.tokens([caption for name in names for caption in captions(name)])
    data = data._replace(train=data.train[seen], train_labels=data.train_labels[seen])
    return data, tokens.unflatten(0, (len(names), -1))


def choose_prompts(config, model, count):
    """--prompt, in turn; if there is none, the unseen kinds and ten of all."""
    names = model.prompt.names
    some = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))[:10]
    kinds = split(config.unseen) + [names[i] for i in some.sort().values]
    return ((split(config.prompt) or [captions(kind)[0] for kind in kinds]) * count)[:count]


def draw_samples(run, model):
    """samples.png: ten prompts, a column each; from row to row the guidance rises to --guidance."""
    config, n = run.config, run.config.samples
    guidance = torch.linspace(1, 0, math.ceil(n / 10)).flip(0).repeat_interleave(10)[:n]
    images = sample(model, (choose_prompts(config, model, 10) * n)[:n], config.sampling_steps,
                    config.guidance * guidance, config.eta, config.seed)
    run.write("samples.png", png(grid(images, 10)))


def draw_denoising(run, model):
    """denoising.png, an animation: twelve pictures emerge from noise, in 19 steps at most."""
    config = run.config
    states = denoise(model, choose_prompts(config, model, 12), min(19, config.sampling_steps),
                     config.guidance, config.eta, config.seed)
    film = [grid(x / 2 + 0.5, 6) for x in states]
    run.write("denoising.png", png(film[-1], *film))  # the result comes first: the still picture


def draw_forward(run, model, test):
    """forward.png: test pictures, from left to right further on their way to noise."""
    x0 = test[torch.arange(40) // 10 % len(test)].to(model.signal.device) / 127.5 - 1
    t = torch.linspace(0, run.config.diffusion_steps, 10, device=x0.device).long().repeat(4)
    x = model.diffuse(x0, t, torch.randn_like(x0))
    run.write("forward.png", png(grid(x / 2 + 0.5, 10)))


def draw_neighbours(run, model, train):
    """neighbours.png: twenty samples, below each the training picture that is nearest to it."""
    config = run.config
    images = sample(model, choose_prompts(config, model, 20), config.sampling_steps,
                    config.guidance, config.eta, config.seed).cpu()
    distance = torch.cat([torch.cdist(images.flatten(1), some.flatten(1) / 255)
                          for some in train.split(5000)], dim=1)                         # (20, N)
    rows = zip(images.split(10), (train[distance.argmin(1)] / 255).split(10), strict=True)
    run.write("neighbours.png", png(grid(torch.cat([x for row in rows for x in row]), 10)))


def new_unet(config):
    return UNet(*image_shape(config), config.width, config.blocks, config.diffusion_steps)


def load(path, device="cpu"):
    """The averaged UNet of a checkpoint, in eval mode. UserError if it is none of ddpm.py's."""
    state = read_checkpoint(path)
    model = new_unet(Config(**state["config"]))
    model.load_state_dict(state["average"])
    return model.to(device).eval()


def join_ranks(name):
    """The device of that name. Under torchrun meet the other processes first, a GPU for each."""
    if RANKS > 1 and not dist.is_initialized():
        gpus = torch.cuda.is_available() and name != "cpu"
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        atexit.register(dist.destroy_process_group)
    return pick_device(name)


def command_line(argv):
    """The Config that ``argv`` asks for; what it leaves out comes from the checkpoint in --out."""
    parser = argparse.ArgumentParser(f"{NAME}.py", argparse.SUPPRESS, __doc__.split("\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        how = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        about = f.metadata["help"] + (f" (default {f.default})" if f.default else "")
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=about.replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    path = Path(given.get("out", ""), "checkpoint.pt")
    if "out" in given and path.exists() and "restart" not in given:
        given = read_checkpoint(path)["config"] | {"device": "auto"} | given
    return Config(**given)


def settle(config):
    """Refuse values that no run can use, and give ``out`` its default."""
    folder = NAME
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        least = int(type(f.default) is int and f.default > 0)  # of a count, often 1
        if not isinstance(value, str) and value < least or choices and value not in choices:
            takes = " or ".join(choices) or "a larger number"
            raise UserError(f"--{f.name.replace('_', '-')} takes {takes}, not {value}")
        if f.name not in config.FREE and value != f.default:
            brief = f.name in ("kind", "generator", "data")
            folder += f"-{Path(value).resolve().name}" if brief else f"-{f.name}{value}"
    config.out = config.out or str(Path("out", folder))


class UserError(ValueError):
    """An error the user can fix: one line on stderr, exit status 2."""


def exit_status(job, argv):
    """job(Config of ``argv``) -> 0, or 1 if it diverged, 2 after a UserError, 130 if stopped."""
    try:
        job(command_line(argv))
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; run the same command, without --restart, to continue"
    except (UserError, FloatingPointError) as error:
        status, message = 2 if isinstance(error, UserError) else 1, f"error: {error}"
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        status, message = 2, "error: out of memory: try a smaller --batch-size"
    print(f"{NAME}.py:", *message.split(), file=sys.stderr)
    return status


@functools.cache  # each message once
def warn(message):
    tqdm.write(f"{NAME}.py: {message}", file=sys.stderr)


def pick_device(name):
    """The torch.device of that name; auto is cuda, else mps, else cpu."""
    found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    if name not in ("auto", *found, "cpu"):
        raise UserError(f"--device {name}: torch finds none here")
    return torch.device([*found, "cpu"][0] if name == "auto" else name)


def batch_rows(config, step, count, device):
    """The rows, of ``count``, in the batch of ``step``: each epoch walks its own permutation."""
    size = min(config.batch_size, count)
    epoch, place = divmod(step, count // size)
    order = epoch_order(count, hash((config.seed, 0, epoch)))
    return order[place * size:][:size].to(device)


@functools.lru_cache(maxsize=1)
def epoch_order(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def write_file(path, content):
    """Write bytes whole or not at all: to a temporary file, which then replaces ``path``."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def download(url, path):
    """Fetch ``path`` from ``url``, unless it is there already."""
    if path.exists():
        return
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(reply, "read", total=size, desc=path.name, leave=False) as body:
                content = b"".join(iter(lambda: body.read(2**16), b""))
    except OSError as error:
        raise UserError(f"cannot download {url} ({error}): put the file at {path}") from None
    write_file(path, content)


def read_checkpoint(path):
    """What Run.save wrote. UserError where the file is anything else."""
    with suppress(Exception):  # torch.load raises a dozen kinds of error on junk
        state = torch.load(path, map_location="cpu", weights_only=True)  # safe from 2.10 on
        if state["script"] == f"{NAME}.py 2":
            return state
    raise UserError(f"{path} is no checkpoint of this {NAME}.py: use another --out, or --restart")


class Run:
    """A training run and what it leaves in ``config.out``. ``saved`` is what its checkpoint holds,
    anything with a state_dict. Where there is a checkpoint, the run continues from it."""

    def __init__(self, config, **saved):
        self.config, self.saved, self.path = config, saved, Path(config.out, "checkpoint.pt")
        self.saved_mtime = self.path.exists() and os.path.getmtime(self.path)
        new = not self.saved_mtime or config.restart
        state = {"config": {}} if new else read_checkpoint(self.path)
        self.step, self.rows, self.figures = state.get("progress", (0, [], {}))
        self.finished = bool(self.figures) and self.step >= config.steps
        for name, begun in state["config"].items():
            value = getattr(config, name)
            if value == begun or name in config.FREE and (name != "seed" or self.finished):
                continue
            if name != "data" or value in DATASETS or begun in DATASETS:
                raise UserError(f"{self.path} began with --{name.replace('_', '-')} {begun}: use "
                                "another --out, or --restart")
            warn(f"the run in {config.out} began with --data {begun}")  # it may have moved
        for name in state.keys() & saved:
            saved[name].load_state_dict(state[name])

    def steps(self):
        """Save now, so that an unwritable folder fails before training -> the steps left."""
        self.figures, self.unread = {}, []
        self.save()
        steps = self.config.steps
        self.bar = tqdm(range(self.step, steps), NAME, initial=self.step, total=steps)
        return self.bar

    def log(self, **figures):
        """The end of a step. Figures stay tensors; every 20 steps, and at the last, their means are
        read (only here the host waits for the device), checked, shown, and saved if it is time."""
        self.step += 1
        self.unread.append(torch.stack([value.detach() for value in figures.values()]))
        if self.step % 20 and self.step < self.config.steps:
            return
        means = torch.stack(self.unread).mean(0).tolist()
        row = {name: float(f"{mean:.6g}") for name, mean in zip(figures, means, strict=True)}
        if not all(map(math.isfinite, row.values())):
            raise FloatingPointError(f"step {self.step} has {row}: try a lower --learning-rate; "
                                     f"{self.path} keeps the last good state")
        self.rows.append({"step": self.step} | row)
        self.bar.set_postfix(row)
        self.unread = []
        if time.monotonic() > self.saved_at + SAVE_SECONDS or self.step == self.config.steps:
            self.save()

    def save(self):
        """checkpoint.pt and metrics.csv. UserError if another run has written the checkpoint."""
        if self.path.exists() and os.path.getmtime(self.path) != self.saved_mtime:
            raise UserError(f"another run writes {self.path}: choose another --out")
        state = {name: thing.state_dict() for name, thing in self.saved.items()}
        state |= {"script": f"{NAME}.py 2", "progress": (self.step, self.rows, self.figures),
                  "config": vars(self.config) | {"restart": False}}
        memory = io.BytesIO()
        torch.save(state, memory)
        write_file(self.path, memory.getbuffer())
        self.saved_mtime, self.saved_at = os.path.getmtime(self.path), time.monotonic()
        names = dict.fromkeys(name for row in self.rows for name in row)
        lines = [names, *([str(row.get(name, "")) for name in names] for row in self.rows)]
        self.write("metrics.csv", "".join(",".join(line) + "\n" for line in lines).encode())

    def finish(self, figures):
        self.figures = {name: round(value, 5) for name, value in figures.items()}
        self.rows[-1] |= {f"test_{name}": value for name, value in self.figures.items()}
        self.save()

    def write(self, name, content):
        """A file in ``out``. If it cannot be written, a warning is enough."""
        try:
            write_file(self.path.with_name(name), content)
        except UserError as error:
            warn(f"warning: {error}")


class RankedRun(Run):
    """A Run that several processes share: all restore it, rank 0 alone writes."""

    def save(self):
        self.saved_at = time.monotonic()
        if RANK == 0:
            super().save()

    def write(self, name, content):
        if RANK == 0:
            super().write(name, content)


def grid(images, columns):
    """Pictures (N, C, H, W) in [0, 1] -> one sheet, twice as large, bytes (height, width, C)."""
    images = (images.detach().cpu().clamp(0, 1) * 255).round().byte()
    images = F.pad(images, (0, 1, 0, 1, 0, 0, 0, -len(images) % columns), value=64)  # thin lines
    sheet = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return sheet.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)


def png(*frames):
    """Bytes (H, W, 1 or 3) -> a PNG file; several are the frames of an animation, ten a second."""
    def chunk(kind, body):
        body = kind + body
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    height, width, channels = frames[0].shape
    parts = [chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, channels - 1, 0, 0, 0))]
    if len(frames) > 1:
        parts.append(chunk(b"acTL", struct.pack(">2I", len(frames), 0)))
    for i, frame in enumerate(frames):
        rows = frame.flatten(1)  # each has a filter before it: 2 is the difference to the row above
        rows = F.pad(torch.cat([rows[:1], rows.diff(dim=0)]), (1, 0), value=2)
        pixels = zlib.compress(b"".join(bytes(row.tolist()) for row in rows), 9)
        if len(frames) > 1:  # a control chunk before the pixels; all chunks but IDAT are numbered
            parts.append(chunk(b"fcTL", struct.pack(">5I2H2B", max(0, 2 * i - 1), width, height,
                                                    0, 0, 1, 10, 0, 0)))
        parts.append(chunk(b"fdAT", struct.pack(">I", 2 * i) + pixels) if i else
                     chunk(b"IDAT", pixels))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


# A data set: bytes (N, C, H, W), and labels (N,); names[label] is what a picture shows.
Images = namedtuple("Images", "train train_labels test test_labels names")


def image_shape(config):
    """Channels and size of the pictures that ``config`` asks for."""
    grey = config.data in ("mnist", "fashion")
    if config.image_size % 4:
        raise UserError(f"--image-size {config.image_size} is not a multiple of 4")
    return 1 if grey else 3, config.image_size or (28 if grey else 32)


def load_images(config):
    """The data set of ``config``, all of it in memory: of MNIST 55 MB, of CIFAR-10 184."""
    name, size, folder = config.data, image_shape(config)[1], Path(config.data_dir, config.data)
    if name == "faces":
        n = config.faces or 40000 * 32 // size
        return Images(*draw_faces(n, 1, size), *draw_faces(max(200, n // 8), 2, size), FACES)
    if name not in DATASETS:
        return read_photographs(Path(name), size)
    try:
        tensors = read_cifar10(folder) if name == "cifar10" else read_idx_files(folder)
    except (OSError, EOFError, LookupError, RuntimeError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"a file in {folder} is damaged ({error}): delete it") from None
    if size != tensors[0].shape[2]:
        tensors[::2] = [F.interpolate(images, (size, size), mode="bilinear", antialias=True)
                        for images in tensors[::2]]
    return Images(*tensors, names=None)


def read_idx_files(folder):
    """The four gzipped IDX files of MNIST or Fashion-MNIST: (N, 1, 28, 28), labels, twice."""
    tensors = []
    for part in "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1":
        path = folder / f"{part}-ubyte.gz"
        download(URLS[folder.name] + path.name, path)
        with gzip.open(path) as file:
            content = bytearray(file.read())
        if not content[16:]:
            raise EOFError(f"{path.name} is empty")
        content = torch.frombuffer(content, dtype=torch.uint8)  # headers have 16 and 8 bytes
        tensors.append(content[16:].view(-1, 1, 28, 28) if "images" in part else content[8:].long())
    return tensors


def read_cifar10(folder):
    """CIFAR-10's binary archive: (N, 3, 32, 32), labels, twice."""
    path = folder / "cifar-10-binary.tar.gz"
    download(URLS["cifar10"] + path.name, path)
    tensors = []
    with tarfile.open(path) as archive:
        for names in [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]:
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}.bin") for name in names]
            content = bytearray(b"".join(file.read() for file in files) or b"empty")
            records = torch.frombuffer(content, dtype=torch.uint8).view(-1, 1 + 3 * 32 * 32)
            tensors += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()]
    return tensors


def read_photographs(folder, size):
    """The middle squares of all photographs in a folder -> Images. The innermost folder names what
    one shows. Held out: test/, else val/, if there is a train/; otherwise every tenth."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("photographs need one more package, pillow: pip install pillow") from None
    results = {path.parent for path in folder.rglob("*/checkpoint.pt")}  # no data
    files = sorted(path for path in folder.rglob("*.*") if path.is_file() and not
                   (results & set(path.parents) or "/." in f"/{path.relative_to(folder)}"))
    beside = [name for name in ("test", "val") if (folder / name).is_dir()]
    splits = ["train", beside[0]] if beside and (folder / "train").is_dir() else []
    images, kinds, tested, failed = [], [], [], []
    for path in tqdm(files, "reading", leave=False, delay=2):
        *folders, _ = path.relative_to(folder).parts
        try:
            test = splits.index(folders.pop(0)) if splits else len(images) % 10 == 0
            image = Image.open(io.BytesIO(path.read_bytes()))
            assert image.mode[0] not in "IF"  # more than 8 bits
            image.draft("RGB", (size, size))  # a large JPEG can be read at a fraction of its size
            image = ImageOps.exif_transpose(image).convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = bytearray(ImageOps.fit(image.convert("RGB"), (size, size)).tobytes())
        except Exception:  # in neither split, or no picture: Pillow raises a dozen kinds of error
            failed.append(path)
            continue
        images.append(torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3))
        kinds.append(["picture", *folders][-1])
        tested.append(bool(test))
    if failed:
        warn(f"{folder}: left out {len(failed)} of {len(files)} files, {failed[0]} the first")
    if len(set(tested)) < 2:
        raise UserError(f"--data {folder}: neither one of {', '.join(DATASETS)} nor a folder with "
                        "two readable pictures")
    names = sorted(set(kinds))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # mix the kinds
    images, test = torch.stack(images)[order].permute(0, 3, 1, 2), torch.tensor(tested)[order]
    labels = torch.tensor([names.index(kind) for kind in kinds])[order]
    return Images(images[~test], labels[~test], images[test], labels[test], names)


def draw_faces(count, seed, size=32):
    """Faces of nobody: uint8 (count, 3, size, size), and labels (count,), which index FACES."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(FACES), (count,), generator=generator)
    bar = tqdm(labels.split(250), "drawing faces", leave=False, delay=2)
    return torch.cat([paint_faces(some, size, generator) for some in bar]), labels


def paint_faces(labels, size, generator):
    """Paint the faces of ``labels`` (N,), from back to front: uint8 (N, 3, size, size). x goes from
    -0.9 to 0.9, to the right, y likewise, down; the head is about 1 wide and 1.2 tall."""
    def each(values):  # one row of numbers for each face -> (N, numbers, 1, 1)
        return values.float().view(len(labels), -1, 1, 1)

    def about(middle, spread, channels=1):
        chance = torch.randn(len(labels), channels, generator=generator)
        return middle + spread * each(chance.clamp(-2, 2))

    def soft(depth):  # how deep a pixel lies in a shape -> how much of it the shape covers
        return (depth * size / 1.8 + 0.5).clamp(0, 1)

    def ellipse(x, y, width, height):
        return soft((1 - (x / width)**2 - (y / height)**2) * (width / 2))

    axis, turn = (torch.arange(size) + 0.5) * 1.8 / size - 0.9, about(0, 0.06)
    x, y = axis - turn / 2, axis[:, None] - about(0.02, 0.03)
    face = x - turn  # a head that turns moves its face further than its outline
    mood, long, glasses = labels // 20, each(labels // 10 % 2), each(labels % 2)
    hair = each(torch.tensor(list(HAIR.values()))[labels // 2 % 5]) * about(0.97, 0.05)
    light, dark, red = torch.tensor([[0.98, 0.82, 0.70], [0.42, 0.27, 0.18],
                                     [0.62, 0.15, 0.17]])[:, :, None, None]              # (3, 1, 1)
    skin, wide, tall = light.lerp(dark, about(0.45, 0.25)), about(0.5, 0.02), about(0.6, 0.02)
    picture = about(0.7, 0.13, 3) * (1 - 0.12 * axis[:, None]).expand(3, size, size)
    paint = picture.lerp_  # a colour, and how much of each pixel it covers
    paint(skin * 0.9, ellipse((x + 0.4 * turn).abs() - wide, y - 0.05, 0.09, 0.13))           # ears
    paint(hair * 0.8, ellipse(x, y - 0.15, wide + 0.17, about(0.8, 0.04)) * long)
    paint(about(0.5, 0.18, 3), ellipse(x, y - 1.15, 0.75, 0.45))                             # shirt
    paint(skin * 0.85, ellipse(x, y - 0.62, 0.18, 0.33))                                      # neck
    paint(skin, ellipse(x, y, wide, tall))
    hairline = about(-0.36, 0.025) + 0.8 * (face - about(0, 0.12))**2
    paint(hair, ellipse(x, y + 0.06, wide + 0.06, tall + 0.05) * soft(hairline - y))
    width, upper, lower, corner, inside, rise, slant = each(
        torch.tensor(list(MOODS.values()))[mood]).split(1, dim=1)                     # (N, 1, 1, 1)
    apart, y_eye = about(0.215, 0.012), y + 0.04
    side = face.abs() - apart  # both eyes at once, seen from the middle of each
    white, black = torch.tensor(0.97), torch.tensor(0.1)
    paint(white, ellipse(side, y_eye, 0.105, 0.08 + 0.3 * rise))
    paint(black, ellipse((face - 0.3 * turn).abs() - apart, y_eye, 0.058, 0.065))           # pupils
    brow = y_eye + 0.19 + rise - slant * side - 1.5 * side**2
    paint(hair * 0.55, torch.minimum(soft(0.04 - brow.abs()), soft(0.13 - side.abs())))
    paint(skin * 0.8, ellipse(face, y - 0.13, 0.05, 0.07))                                    # nose
    y_mouth, bend = y - about(0.29, 0.01), (face / width)**2  # between two parabolas, the lips
    mouth = torch.minimum(y_mouth - upper.lerp(corner, bend), lower.lerp(corner, bend) - y_mouth)
    paint(red, soft(mouth + 0.035) * soft(1.2 * width - face.abs()))
    paint(inside, soft(mouth))
    rims = soft(0.03 - ((side**2 + y_eye**2).sqrt() - 0.155).abs())
    bridge = torch.minimum(soft(0.025 - y_eye.abs()), soft(apart - 0.155 - face.abs()))
    paint(black, torch.maximum(rims, bridge) * glasses)
    return (picture.clamp(0, 1) * 255).round().byte()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a letter that the terminal lacks is no error
    sys.exit(main())
