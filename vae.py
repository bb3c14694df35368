# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
"""The autoencoder and the variational autoencoder: squeeze a face into 32 numbers, invent others.

         encoder q(z|x)         latent z                decoder p(x|z)
    x -> 32x32 -> 16x16 -> 8x8 -> 32 numbers -> 8x8 -> 16x16 -> 32x32 -> x rebuilt
                                  ae:  z = mean
                                  vae: z = mean + sigma * eps,  eps ~ N(0, I)

An autoencoder squeezes a picture through a bottleneck and rebuilds it. It cannot invent: most
points of its latent space belong to no picture. The variational autoencoder adds noise to every
latent (the eps) and pays for latents that stray from N(0, I). So a draw from N(0, I) decodes to a
face that never existed, and a walk through latent space passes faces all the way.

    python vae.py                     on faces that this script draws; see out/vae/samples.png
    python vae.py --kind ae           the plain autoencoder, for comparison
    python vae.py --latent-dim 2      latents of two numbers: the whole space on one map
    python vae.py --data mnist        handwritten digits
    python vae.py --data ./photos     pictures of your own

Papers: Hinton, Salakhutdinov 2006 (Science 313, 504), the deep autoencoder; Kingma, Welling 2013
(arXiv:1312.6114), the variational one; Burda, Grosse, Salakhutdinov 2015 (arXiv:1509.00519), L_k.
"""
import argparse
import functools
import gzip
import io
import math
import os
import struct
import sys
import tarfile
import time
import urllib.request
import warnings
import zlib
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm import tqdm

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.nn.functional as F
from torch import nn


def setting(default, help, *choices):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    """Every setting; the command line is made from it. Helpers are at the end of the file."""
    data: str = setting("faces", "faces (drawn here), mnist, fashion, cifar10, a folder of photos")
    kind: str = setting("vae", "vae, or ae: the plain autoencoder", "vae", "ae")
    beta: float = setting(0.0, "weight of the KL (chapter 3); 0 means 1 for grey, 20 in colour")
    importance: int = setting(1, "k above 1: the last 30 % of steps maximise L_k (chapter 3)")
    latent_dim: int = setting(32, "numbers in a latent; with 2, map.png is drawn, too")
    width: int = setting(16, "channels at half the resolution; three times as many at a quarter")
    image_size: int = setting(0, "height and width, a multiple of 4; 0: 28 if grey, else 32")
    faces: int = setting(0, "faces to draw; 0: 40,000 at 32x32, fewer at larger sizes")
    batch_size: int = setting(32, "pictures per step")
    learning_rate: float = setting(4e-3, "its peak; lower it if training diverges")
    steps: int = setting(6000, "optimiser steps in total; the learning rate falls to 0 over them")
    samples: int = setting(100, "pictures in samples.png")
    seed: int = setting(0, "of the training; of a finished model, only of its samples")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    data_dir: str = setting("data", "where downloads are")
    out: str = setting("", "folder of results; default: out/vae, plus the fixed settings given")
    restart: bool = setting(False, "throw away the checkpoint, begin afresh with what is given")
    FREE = ("steps", "samples", "seed", "device", "data_dir", "out", "restart")  # the rest is fixed

    def __post_init__(self):
        settle(self)


# ==== 1. Data =====================================================================================
# Pictures are bytes (N, C, H, W), C = 1 (grey) or 3. B is the size of a batch, L of a latent.


def preprocess(images):
    """Bytes (B, C, H, W) -> floats in [0, 1]. A grey pixel becomes 1 with its grey as probability,
    else 0 (Burda et al. 2015, section 5): p(x|z) is then one probability for each pixel. New draws
    in each step also make it harder to learn pictures by heart."""
    x = images.float() / 255
    return torch.bernoulli(x) if x.shape[1] == 1 else x


# ==== 2. Encoder and decoder ======================================================================
# To halve the resolution, 2x2 pixels of C channels are folded into one of 4 C channels (space to
# depth); to double it, they are unfolded (pixel shuffle: Shi et al. 2016, arXiv:1609.05158). This
# loses nothing, and no convolution runs at full resolution, where it costs most. Shapes: for 32x32.


class Residual(nn.Module):
    """x + f(x), (B, C, H, W) -> the same (He et al. 2016, arXiv:1603.05027). The second convolution
    starts at a tenth of its usual size, so f is small at first, and no normalisation is needed."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)
            self.conv2.bias.zero_()

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Encoder(nn.Sequential):
    """Pictures (B, C, H, W) -> (B, 2 L), mean and log variance, log(sigma^2), of q(z|x)."""

    def __init__(self, channels, size, width, latent_dim):
        super().__init__(
            nn.PixelUnshuffle(2),                                          # (B, 4 C, 16, 16)
            nn.Conv2d(4 * channels, width, kernel_size=3, padding=1),      # (B, width, 16, 16)
            Residual(width),
            nn.PixelUnshuffle(2),                                          # (B, 4 width, 8, 8)
            nn.Conv2d(4 * width, 3 * width, kernel_size=1),                # (B, 3 width, 8, 8)
            Residual(3 * width), nn.SiLU(),
            nn.Flatten(),
            nn.Linear(3 * width * (size // 4)**2, 256), nn.SiLU(),
            nn.Linear(256, 2 * latent_dim))                                # (B, 2 L)


class Decoder(nn.Sequential):
    """Latents (B, L) -> (B, C, H, W): the logit of each grey pixel, the mean of each colour."""

    def __init__(self, channels, size, width, latent_dim):
        super().__init__(
            nn.Linear(latent_dim, 256), nn.SiLU(),
            nn.Linear(256, 3 * width * (size // 4)**2),
            nn.Unflatten(1, (3 * width, size // 4, size // 4)),            # (B, 3 width, 8, 8)
            Residual(3 * width), Residual(3 * width),
            nn.Conv2d(3 * width, 4 * width, kernel_size=1),                # (B, 4 width, 8, 8)
            nn.PixelShuffle(2),                                            # (B, width, 16, 16)
            Residual(width), nn.SiLU(),
            nn.Conv2d(width, 4 * channels, kernel_size=3, padding=1),      # (B, 4 C, 16, 16)
            nn.PixelShuffle(2))                                            # (B, C, 32, 32)


class VAE(nn.Module):
    """Encoder and decoder; variational=False makes a plain autoencoder of the same networks."""

    def __init__(self, channels, size, width, latent_dim, variational=True):
        super().__init__()
        self.latent_dim, self.variational = latent_dim, variational
        self.encoder = Encoder(channels, size, width, latent_dim)
        self.decode = Decoder(channels, size, width, latent_dim)
        # In colour p(x|z) also has a scale, learned: one for each of R, G and B (chapter 3).
        self.log_scale = nn.Parameter(torch.full((3, 1, 1), -2.0)) if channels == 3 else None
        if not variational:  # mean 0 and variance 1, so that samples can be decoded from N(0, I)
            self.encoder.append(nn.BatchNorm1d(2 * latent_dim, affine=False))
        self.at_once = max(1, 2**20 // size**2)  # pictures decoded together: this bounds memory

    def encode(self, x):
        """Pictures (B, C, H, W) -> mean and logvar of q(z|x), both (B, L)."""
        return self.encoder(x).chunk(2, dim=1)

    @torch.no_grad()
    def images(self, z):
        """Latents (B, L) -> what they look like, (B, C, H, W) in [0, 1]."""
        z = z.to(next(self.parameters()).device)
        x = torch.cat([self.decode(part) for part in z.split(self.at_once)])
        return x.sigmoid() if self.log_scale is None else x.clamp(0, 1)

    def log_prob(self, x, z):
        """log p(x|z): pictures (B, C, H, W) and latents (B, L) -> (B,), in nats."""
        if self.log_scale is None:
            return log_bernoulli(self.decode(z), x)
        return log_logistic(self.decode(z), self.log_scale, x)

    def forward(self, x):
        """Pictures (B, C, H, W) -> reconstruction and KL (chapter 3), both (B,), in nats."""
        mean, logvar = self.encode(x)
        if not self.variational:
            return self.log_prob(x, mean), torch.zeros_like(mean[:, 0])
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return self.log_prob(x, z), kl_divergence(mean, logvar)


# ==== 3. Objective ================================================================================
# The model draws a latent z from the prior p(z) = N(0, I), then the pixels from p(x|z), whose
# parameters the decoder computes. Real pictures should be probable: log p(x) should be large, where
# p(x) = integral of p(x|z) p(z) dz. A random z hardly ever fits a given x, so the encoder proposes
# better ones, from q(z|x) = N(mean, sigma^2). Write E_q for the mean over draws from q. The log of
# a mean is at least the mean of the logs (Jensen's inequality), so
#
#   log p(x) = log E_q[ p(x|z) p(z) / q(z|x) ]                        (the integrand times q / q)
#           >= E_q[ log p(x|z) ]  -  E_q[ log q(z|x) - log p(z) ]
#            =   reconstruction   -  KL( q(z|x) || p(z) )             the evidence lower bound, ELBO
#
# in nats (Kingma, Welling 2013, equation 3), with equality if q(z|x) is the posterior p(z|x). The
# KL has a closed form, and one draw of z estimates the reconstruction. The gradient reaches the
# encoder through that draw, because z = mean + sigma * eps is a differentiable function of mean and
# sigma: the randomness is in eps alone. This is the reparametrisation trick.


def log_bernoulli(logits, x):
    """log p(x|z) of pixels that are 0 or 1: logits and x, both (..., C, H, W) -> (...), in nats.
    Given z the pixels are independent, so their log probabilities ADD UP. To average them, a common
    mistake, weighs the KL H W times as much: the latent is ignored, every sample a grey blur."""
    return (x * logits - F.softplus(logits)).sum((-3, -2, -1))


def log_logistic(mean, log_scale, x):
    """log p(x|z) of colours, of 256 levels: mean and x, both (..., 3, H, W), log_scale (3, 1, 1) ->
    (...), in nats. A level's probability is the mass of a logistic distribution in its bin, 1/255
    wide: sigmoid(b) - sigmoid(a), where a and b are (its ends - mean) / scale (Kingma et al. 2016,
    arXiv:1606.04934). The bins of 0 and 1 reach to infinity, so all masses add up to 1. Written
    as sigmoid(b) sigmoid(-a) (1 - exp(a - b)), even a tiny mass has a finite log."""
    scale = log_scale.exp()
    log_below = F.logsigmoid((x + 1 / 510 - mean) / scale)
    log_above = F.logsigmoid((mean - x + 1 / 510) / scale)
    log_inside = log_below + log_above + torch.log(-torch.expm1(-1 / 255 / scale))
    log_p = torch.where(x < 0.001, log_below, torch.where(x > 0.999, log_above, log_inside))
    return log_p.sum((-3, -2, -1))


def kl_divergence(mean, logvar):
    """KL( N(mean, sigma^2) || N(0, I) ): mean and logvar, both (B, L) -> (B,), in nats (Kingma,
    Welling 2013, appendix B)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)


# A colour picture has 3 H W values of 256 levels, and a little more precision in each outweighs the
# KL: each q(z|x) becomes very narrow, together they leave most of N(0, I) empty, and draws from it
# decode to no face. So the KL counts beta = 20 times there (as in beta-VAE: Higgins et al. 2017).
#
# The mean of k draws inside the log gives a better bound (Burda et al. 2015, equation 8):
#
#   log p(x) >= L_k = E[ log( (w_1 + ... + w_k) / k ) ],   w_i = p(x|z_i) p(z_i) / q(z_i|x)
#
# with z_i from q(z|x). L_1 is the ELBO, L_k never falls as k grows, and its limit is log p(x). The
# model is judged by L_k, and with --importance k the last steps maximise it (beta is then 1).


def log_weights(model, x, eps):
    """log w_i: pictures (B, C, H, W) and noise eps (B, k, L) -> (B, k), in nats."""
    mean, logvar = (t[:, None] for t in model.encode(x))                              # (B, 1, L)
    z = mean + (0.5 * logvar).exp() * eps                                             # (B, k, L)
    log_p = model.log_prob(x.repeat_interleave(eps.shape[1], 0), z.flatten(0, 1))     # (B k,)
    # The last term is log p(z) - log q(z|x), in which the constants of the Gaussians cancel.
    return log_p.view(eps.shape[:2]) + 0.5 * (eps**2 + logvar - z**2).sum(2)


# ==== 4. Training =================================================================================
def schedule(progress):
    """Learning rate, as a share of its peak, at ``progress`` 0 to 1: a ramp, then half a cosine."""
    return min(1.0, progress / 0.03) * 0.5 * (1 + math.cos(math.pi * progress))


def train(config):
    """Train what is left, judge and sample; all goes to ``config.out`` -> the VAE, in eval mode.
    UserError if data, settings or folder will not do, FloatingPointError if training diverges."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("vae.py is for one process: start it without torchrun")
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model = new_model(config).to(device)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=device.type != "mps")
    run = Run(config, model=model, optimizer=optimizer)  # continues the run in config.out, if any
    if not run.finished:
        data = load_images(config)
        images = data.train.to(device)
        beta, max_norm = (1, 100) if model.log_scale is None else (20, 1e4)
        for step in run.steps():
            torch.manual_seed(hash((config.seed, step)))  # a resumed run draws the same numbers
            # Learning rate
            progress = (step + 0.5) / config.steps
            optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(progress)
            # Batch
            x = preprocess(images[batch_rows(config, step, len(images), device)])
            # Loss: minus the ELBO or, in the last steps with --importance, minus L_k
            reconstruction, kl = model(x)
            loss = ((config.beta or beta) * kl - reconstruction).mean()
            if model.variational and config.importance > 1 and progress > 0.7:
                eps = torch.randn(len(x), config.importance, config.latent_dim, device=device)
                log_w = log_weights(model, x, eps)
                loss = math.log(config.importance) - log_w.logsumexp(1).mean()
            # Gradient, clipped (a sum over all pixels, hence the high limits), and update
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            run.log(loss=loss, kl=kl.mean(), grad_norm=grad_norm)
            if (step + 1) % max(1, config.steps // 10) == 0:
                draw_samples(run, model.eval())
                model.train()
        draw_reconstructions(run, model.eval(), data.test)
        draw_walk(run, model, data.test)
        if config.data == "faces":
            draw_directions(run, model, data)
        run.finish(judge(model, data.test))
    draw_samples(run, model.eval())
    print(f"{config.out}, on held-out data: {run.figures}")
    return model


# ==== 5. Sampling =================================================================================
def sample(model, n, seed=None):
    """n new pictures, (n, C, H, W) in [0, 1]: decoded draws from the prior. They are the means of
    p(x|z), since a draw from it adds noise to every pixel. The same seed gives the same pictures;
    None draws from torch's global generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return model.images(torch.randn(n, model.latent_dim, generator=generator))


@torch.no_grad()
def mean_latents(model, images):
    """Bytes (N, C, H, W) -> the means of q(z|x), (N, L), after a new draw where they are grey."""
    x, device = preprocess(images), next(model.parameters()).device
    return torch.cat([model.encode(part.to(device))[0] for part in x.split(model.at_once)])


def draw_walk(run, model, test):
    """walk.png, an animation: 8 walks in straight lines past the latents of four test pictures."""
    walks, stops, frames = 8, 4, 20
    latents = mean_latents(model, test[torch.arange(stops * walks) % len(test)])
    latents = latents.unflatten(0, (stops, walks))                             # (stops, walks, L)
    film = []
    for frame in range(frames):
        stop, share = divmod(frame * stops / frames, 1)
        z = latents[int(stop)].lerp(latents[(int(stop) + 1) % stops], share)   # then back home
        film.append(grid(model.images(z), 8))
    run.write("walk.png", png(*film))


def draw_directions(run, model, data):
    """directions.png: a difference in meaning is a direction in latent space. Sad test faces with
    black hair move in five steps by the difference between the mean latents of smiling and sad
    faces, of faces with and without glasses, of faces with blond and with black hair."""
    names = [FACES[label] + "." for label in data.test_labels]  # "hair." means: no glasses
    latents = mean_latents(model, data.test)

    def mean(word):
        return latents[[i for i, name in enumerate(names) if word in name]].mean(0)

    moves = (mean("smiling") - mean("sad"), mean("glasses.") - mean("hair."),
             mean("blond") - mean("black"))
    starts = [i for i, name in enumerate(names) if "sad" in name and "black hair." in name][:6]
    steps = torch.linspace(0, 1, 5, device=latents.device)[:, None]
    z = torch.cat([latents[i] + steps * move for i in starts for move in moves])
    run.write("directions.png", png(grid(model.images(z), 15)))


# ==== 6. Judging, on held-out pictures ============================================================
@torch.no_grad()
def log_likelihood(model, images, k, seed=None):
    """An estimate of L_k, a lower bound on log p(x): pictures (N, C, H, W) as preprocess makes them
    -> (N,), in nats. UserError for the autoencoder, which has no p(x)."""
    if not model.variational:
        raise UserError("an autoencoder has no likelihood: its latents have no distribution")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    bounds, images = [], images.to(next(model.parameters()).device)
    for x in tqdm(images.split(max(1, model.at_once // k)), "judging", leave=False, delay=2):
        eps = torch.randn(len(x), k, model.latent_dim, generator=generator).to(x.device)
        log_w = [log_weights(model, x, some) for some in eps.split(model.at_once, dim=1)]
        bounds.append(torch.cat(log_w, dim=1).logsumexp(1) - math.log(k))
    return torch.cat(bounds)


@torch.no_grad()
def judge(model, test):
    """Means over at most 1,000 held-out pictures, in nats; bound is L_10. In colour also bits per
    value: the size of a picture compressed with this model, over 3 H W."""
    torch.manual_seed(0)  # so that figures can be compared
    x = preprocess(test[:1000]).to(next(model.parameters()).device)
    terms = torch.cat([torch.stack(model(part)) for part in x.split(model.at_once)], dim=1)
    figures = dict(zip(("reconstruction", "kl"), terms.mean(1).tolist(), strict=True))
    if model.variational:
        figures["bound"] = log_likelihood(model, x, k=10).mean().item()
        if model.log_scale is not None:
            figures["bits_per_value"] = -figures["bound"] / math.log(2) / x[0].numel()
    return figures


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status."""
    return exit_status(train, argv)


# ==== Utilities ===================================================================================
NAME = "vae"
SAVE_SECONDS = 30  # between two checkpoints
URLS = {"mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "fashion": "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "cifar10": "https://www.cs.toronto.edu/~kriz/"}
DATASETS = ("faces", *URLS)
# Half the width of the mouth, y (down) of lips and corners, light inside; brows: rise and slant
MOODS = {"smiling": (0.25, 0.00, 0.19, -0.07, 0.97, 0.00, 0.0),
         "sad": (0.20, -0.03, 0.06, 0.15, 0.30, 0.00, 0.6),
         "surprised": (0.13, -0.09, 0.17, 0.03, 0.12, 0.08, 0.0)}
HAIR = {"black": (0.10, 0.09, 0.11), "brown": (0.42, 0.25, 0.14), "blond": (0.93, 0.77, 0.36),
        "red": (0.78, 0.29, 0.10), "grey": (0.68, 0.68, 0.71)}
FACES = [f"{mood} face with {length} {colour} hair{glasses}" for mood in MOODS
         for length in ("short", "long") for colour in HAIR for glasses in ("", " and glasses")]


def draw_samples(run, model):
    """samples.png and, where a latent is two numbers, map.png."""
    run.write("samples.png", png(grid(sample(model, run.config.samples, run.config.seed), 10)))
    if model.latent_dim == 2:
        steps = torch.special.ndtri((torch.arange(20) + 0.5) / 20)  # as dense as N(0, 1)
        z = torch.cartesian_prod(steps, steps).flip(1)                                   # (400, 2)
        run.write("map.png", png(grid(model.images(z), 20)))


def draw_reconstructions(run, model, test):
    """reconstructions.png: test pictures, and on the right of each what is rebuilt from it."""
    test = test[torch.arange(50) % len(test)]
    pairs = torch.stack([test / 255, model.images(mean_latents(model, test)).cpu()], dim=1)
    run.write("reconstructions.png", png(grid(pairs.flatten(0, 1), 10)))


def new_model(config):
    return VAE(*image_shape(config), config.width, config.latent_dim, config.kind == "vae")


def load(path, device="cpu"):
    """The VAE of a checkpoint, in eval mode. UserError if the file is no checkpoint of vae.py."""
    state = read_checkpoint(path)
    model = new_model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval()


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
