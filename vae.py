# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "tqdm>=4.66", "pillow>=10"]
# ///
# SPDX-License-Identifier: MIT
"""The autoencoder and the variational autoencoder: squeeze a picture, rebuild it, dream up others.

          encoder q(z|x)               the code z                  decoder p(x|z)
    x -> 28x28 -> 14x14 -> 7x7 -> a few dozen numbers -> 7x7 -> 14x14 -> 28x28 -> x rebuilt
                                  ae:  z = mean
                                  vae: z = mean + sigma * eps,  eps ~ N(0, I)

An autoencoder passes a picture through a narrow code and rebuilds it on the other side. It recalls
well but cannot invent: between the codes that it uses lies no man's land, and a code picked there
decodes to a scrawl. The variational autoencoder blurs every code a little (the eps) and pays for
every code that strays from N(0, I). So codes overlap and fill the space: a draw from N(0, I)
usually decodes to a picture, and a walk from code to code passes pictures all the way.

    python vae.py                                          on digits that this script draws itself
    python vae.py --kind ae                                the plain autoencoder, for comparison
    python vae.py --latent-dim 2 --out out/vae-2           codes of two numbers: a map of them all
    python vae.py --data mnist --steps 14500 --importance 5     MNIST (downloaded once), at its best
    python vae.py --data cifar10 --latent-dim 128          in colour; or a folder of photographs
    python vae.py --data mnist --steps 60000 --width 64 --batch-size 256 --out out/vae-gpu   GPU

Look in out/vae: samples.png, reconstructions.png, walk.png (an animation), map.png (if codes are
of two numbers), metrics.csv, checkpoint.pt. Run the same command again and it goes on where it
stopped; settings not given come from the checkpoint; on a finished model it only samples (--seed 1:
other samples). On two cores of an AMD EPYC the plain command takes two minutes (Zen 5) to five (Zen
3); on MNIST the bound on log p(x) reaches -83.7 nats in eight minutes (Zen 5; README).

Papers: Hinton, Salakhutdinov 2006 (Science 313, 504), the deep autoencoder; Kingma, Welling 2013
(arXiv:1312.6114) and Rezende, Mohamed, Wierstra 2014 (arXiv:1401.4082), the variational one; Burda,
Grosse, Salakhutdinov 2015 (arXiv:1509.00519), the bound by which it is judged; Salimans et al. 2017
(arXiv:1701.05517), the density of colours. The variational objective is theirs; the networks are
convolutional and residual, where theirs, up to 2015, were fully connected.
"""
import math
import sys
import warnings
from dataclasses import dataclass, field

from tqdm import tqdm

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.nn.functional as F
from torch import nn

# What no chapter defines is defined below the last one.


def knob(default, about, *within):
    """A setting: its default, its meaning, and its choices or its lowest and highest value."""
    return field(default=default, metadata={"about": about, "within": within})


@dataclass
class Config:
    """Every setting, model first; the command line is made from it."""
    kind: str = knob("vae", "ae is the plain autoencoder, vae the variational one", "ae", "vae")
    beta: float = knob(1.0, "weight of the KL term (beta-VAE: Higgins et al. 2017)", 0, 1e4)
    importance: int = knob(1, "draws per picture in the last 30 % of training (chapter 3)", 1, 100)
    latent_dim: int = knob(32, "numbers in a code; with 2, map.png is drawn too", 1, 512)
    width: int = knob(16, "channels at half the size, 3 times as many at a quarter", 1, 512)
    image_size: int = knob(0, "height and width, in steps of 4; 0: 28, colour data 32", 0, 1024)
    channels: int = knob(0, "1: grey, 3: colour, 0: as the data", 0, 3)
    steps: int = knob(5000, "optimiser steps in total", 1, 10**8)
    batch_size: int = knob(64, "pictures per step", 1, 2**16)
    learning_rate: float = knob(4e-3, "peak of its schedule; lower it if training diverges", 0, 1)
    draws: int = knob(100, "draws per picture when judging (k in chapter 3)", 1, 10**6)
    test_images: int = knob(1000, "held-out pictures to judge on", 1, 10**6)
    samples: int = knob(100, "pictures in samples.png", 1, 10**4)
    data: str = knob("digits", "digits (drawn here), mnist, fashion, cifar10, a folder of IDX "
                     "files, or a folder or .zip of photographs")
    data_dir: str = knob("data", "where downloads are kept")
    seed: int = knob(0, "for the run; once it is finished, for the samples only", 0, 2**31)
    device: str = knob("auto", "auto: cuda, else mps, else cpu", "auto", "cpu", "cuda", "mps")
    out: str = knob("", "folder of the results; if empty, out/vae, or out/vae-ae-mnist, say")
    restart: bool = knob(False, "throw away the checkpoint in --out and begin afresh")

    def __post_init__(self):
        check_config(self)
        settle_shape(self, 4)  # a multiple of 4
        if (self.kind == "ae") + (self.beta != 1) + (self.importance > 1) > 1:
            fail("--kind ae, --beta and --importance exclude each other: give at most one")


# ==== 1. The pictures =============================================================================
# load_images (block `images`, below) has them all in memory, as bytes. B is the batch; C, H, W are
# the channels, height and width of a picture: 1, 28, 28, or in colour 3, 32, 32. L is latent_dim.


def scaled(pictures, generator=None):
    """Bytes (B, C, H, W) -> floats. Colour keeps its 256 values, from 0 to 1; a grey pixel becomes
    1 (ink) with its grey as the probability, else 0. In training each step draws anew, so the data
    never quite repeat. And once pixels are coin tosses, "the probability of this picture" has a
    meaning. (Burda et al. 2015, section 5, do so.)"""
    x = pictures.float() / 255
    return torch.bernoulli(x, generator=generator) if x.shape[1] == 1 else x


# ==== 2. Two networks, into the bottleneck and out of it ==========================================
# To halve the resolution, 2x2 pixels of C channels are folded into one of 4C (space to depth); to
# double it, unfolded (pixel shuffle: Shi et al. 2016, arXiv:1609.05158). Nothing is lost, and no
# convolution runs at 28x28, where it would cost four times what it costs at 14x14.


class Residual(nn.Module):
    """x + f(x) (He et al. 2015, arXiv:1512.03385): (B, C, H, W) -> the same. f is two convolutions,
    each after its activation (2016, arXiv:1603.05027). The second starts at a tenth of its usual
    size: f begins as almost nothing, and these networks train without normalisation."""

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
    """q(z|x): pictures (B, C, H, W) -> (B, 2 L), means and log variances of their codes: a log
    variance may be any number, and sigma = exp(logvar / 2) is positive. Shapes are for 28x28."""

    def __init__(self, config):
        width, side = config.width, config.image_size // 4
        super().__init__(
            nn.PixelUnshuffle(2),                                    # (B, 4 C, 14, 14)
            nn.Conv2d(4 * config.channels, width, kernel_size=3, padding=1),  # (B, width, 14, 14)
            Residual(width),
            nn.PixelUnshuffle(2),                                    # (B, 4 width, 7, 7)
            nn.Conv2d(4 * width, 3 * width, kernel_size=1),          # (B, 3 width, 7, 7)
            Residual(3 * width), nn.SiLU(),
            nn.Flatten(),                                            # (B, 147 width)
            nn.Linear(3 * width * side**2, 256), nn.SiLU(),
            nn.Linear(256, 2 * config.latent_dim))                   # (B, 2 L)


class Decoder(nn.Sequential):
    """p(x|z): codes (B, L) -> (B, C, H, W), the log odds of ink at every pixel; in colour, the
    middle of a bell-shaped bump for each value (chapter 3)."""

    def __init__(self, config):
        width, side = config.width, config.image_size // 4
        super().__init__(
            nn.Linear(config.latent_dim, 256), nn.SiLU(),
            nn.Linear(256, 3 * width * side**2),                     # (B, 147 width)
            nn.Unflatten(1, (3 * width, side, side)),                # (B, 3 width, 7, 7)
            Residual(3 * width), Residual(3 * width),
            nn.Conv2d(3 * width, 4 * width, kernel_size=1),          # (B, 4 width, 7, 7)
            nn.PixelShuffle(2),                                      # (B, width, 14, 14)
            Residual(width), nn.SiLU(),
            nn.Conv2d(width, 4 * config.channels, kernel_size=3, padding=1),  # (B, 4 C, 14, 14)
            nn.PixelShuffle(2))                                      # (B, C, 28, 28)


class VAE(nn.Module):
    """Encoder, decoder, and the Gaussian that samples' codes are drawn from. The autoencoder has
    the same networks."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        # In colour p(x|z) is a bump for each value (chapter 3); the log of its width, for R, G, B.
        self.log_scale = nn.Parameter(torch.full((3,), -2.0)) if config.channels == 3 else None
        # Sampling draws codes at prior_mean + prior_factor @ eps. That is N(0, I), the VAE's prior;
        # the autoencoder has none, and fit_gaussian moves this to where its codes turn out to lie.
        self.register_buffer("prior_mean", torch.zeros(config.latent_dim))
        self.register_buffer("prior_factor", torch.eye(config.latent_dim))

    def encode(self, x):
        """Pictures (B, C, H, W), scaled -> mean, logvar, (B, L) each; ae: mean is the code."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        """Codes (B, L) -> what the Decoder makes of them, (B, C, H, W)."""
        return self.decoder(z)

    def picture(self, z):
        """Codes (B, L) -> what they look like, (B, C, H, W) in [0, 1]."""
        x = self.decode(z)
        return x.sigmoid() if self.config.channels == 1 else x.clamp(0, 1)

    def place(self, eps):
        """Standard normal eps (B, L) -> the codes (B, L) that sampling draws."""
        return self.prior_mean + eps @ self.prior_factor.T


# ==== 3. The objective ============================================================================
# The model's story of a picture x: draw a code z from p(z) = N(0, I), decode it, toss a coin for
# each pixel. The story is good if it makes real pictures probable, that is if log p(x) is large,
# where p(x) = integral of p(x|z) p(z) dz. Estimating that with codes drawn at random is slow:
# hardly any of them fit a given x. The encoder is the guide: q(z|x) = N(mean, sigma^2) proposes
# codes worth trying. Write E_q for the mean over draws from q. By Jensen's inequality (the log of
# a mean is at least the mean of the logs), in natural logarithms, so in nats,
#
#   log p(x) = log E_q[ p(x|z) p(z) / q(z|x) ]        (the integral, times q and divided by q)
#           >= E_q[ log p(x|z) ] - E_q[ log q(z|x) - log p(z) ]
#            =   reconstruction  -  KL( q(z|x) || p(z) )        the evidence lower bound, or ELBO
#
# (Kingma and Welling 2013, equation 3). The gap is KL(q(z|x) || p(z|x)), 0 if q is p(z|x),
# the posterior. The KL has a closed form; one draw of z estimates the reconstruction. So that the
# gradient reaches the encoder through that draw, z = mean + sigma * eps: chance comes from outside,
# and z is a differentiable function of mean and sigma. That is the reparametrisation trick.


def log_bernoulli(logits, x):
    """log p(x|z), the log probability of all tosses: two (..., C, H, W) -> (...), nats. Given z the
    tosses are independent, so their log probabilities ADD UP over the pixels. Averaging them, a
    common mistake, gives the KL 784 times the weight, as --beta 784 does. Then it pays to ignore
    the code, and every sample is the same grey blur."""
    return (x * logits - F.softplus(logits)).sum((-3, -2, -1))


def log_logistic(middle, log_scale, x):
    """log p(x|z) of colour: middle and x (..., 3, H, W), log_scale (3,) -> (...), nats. A value is
    one of 256. Its p is the area, over its bin, 1/255 wide, of a bump: the logistic density, whose
    integral is the sigmoid. So p = sigmoid(a) - sigmoid(b), a and b being the bin's upper and
    lower end, less the middle, over scale. (For 0 and 1 the bin reaches to infinity, so that all
    256 add up to 1: Salimans et al. 2017, arXiv:1701.05517, 2.1.) And p is also sigmoid(a)
    sigmoid(-b) (1 - exp(b - a)), whose log is finite even where p is tiny."""
    scale = log_scale.exp()[:, None, None]
    a, b = ((x + half - middle) / scale for half in (1 / 510, -1 / 510))
    low, high = F.logsigmoid(a), F.logsigmoid(-b)
    inside = low + high + torch.log(-torch.expm1(-1 / 255 / scale))
    return torch.where(x < 0.001, low, torch.where(x > 0.999, high, inside)).sum((-3, -2, -1))


def log_fit(model, z, x):
    """log p(x|z): codes (N, L), pictures (N, C, H, W) -> (N,), nats."""
    if model.config.channels == 1:
        return log_bernoulli(model.decode(z), x)
    return log_logistic(model.decode(z), model.log_scale, x)


def kl_divergence(mean, logvar):
    """KL( N(mean, sigma^2) || N(0, I) ): two (B, L) -> (B,), nats (Kingma, Welling, appendix B)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)


def elbo_terms(model, x):
    """Pictures (B, C, H, W), scaled -> reconstruction (B,) and KL (B,), nats per picture. The
    autoencoder's code is the mean itself, without noise and free of charge. Nothing else
    differs in training."""
    mean, logvar = model.encode(x)
    if model.config.kind == "ae":
        return log_fit(model, mean, x), torch.zeros_like(mean[:, 0])
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return log_fit(model, z, x), kl_divergence(mean, logvar)


# A tighter bound. The ELBO lies below log p(x); how far depends on the guide. With a mean of k
# draws inside the log the bound comes closer (Burda et al. 2015, equation 8):
#
#   log p(x) >= L_k = E[ log( (w_1 + ... + w_k) / k ) ],   w_i = p(x|z_i) p(z_i) / q(z_i|x)
#
# with z_i from q(z|x). (This L is theirs, not latent_dim.) L_1 is the ELBO, L_k never falls as k
# grows, and its limit is, in general, log p(x). L_k judges the model in the end; with --importance
# k the last steps of training maximise it, too.


def log_weights(model, x, k, generator=None):
    """Pictures (B, C, H, W), scaled -> log w_1 ... log w_k for each of them, (B, k), nats."""
    mean, logvar = (t[:, None] for t in model.encode(x))                                # (B, 1, L)
    eps = torch.randn(len(x), k, mean.shape[2], generator=generator,
                      device="cpu" if generator else x.device).to(x.device)             # (B, k, L)
    z = mean + (0.5 * logvar).exp() * eps
    fit = log_fit(model, z.flatten(0, 1), x.repeat_interleave(k, 0)).unflatten(0, (len(x), k))
    return fit + 0.5 * (eps**2 + logvar - z**2).sum(2)
    # the last term is log p(z) - log q(z|x), in which the constants of the two Gaussians cancel


# ==== 4. Training =================================================================================
def schedule(progress):
    """Share of the peak learning rate at ``progress`` 0 to 1: half a cosine, times a short ramp."""
    return min(1.0, progress / 0.03) * 0.5 * (1 + math.cos(math.pi * progress))


def train(config):
    """Train what is left to train, judge, draw, all into ``config.out`` -> the VAE in eval mode.
    Raises UserError (wrong data, setting, checkpoint or folder), FloatingPointError (it diverged),
    KeyboardInterrupt (it was stopped; the same call goes on, less restart)."""
    device = pick_device(config.device)
    torch.manual_seed(seed_of(config.seed, "weights"))
    model = VAE(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    run = Run(config, model=model, optimizer=optimizer)  # restores, counts, saves (block runs)
    if not run.finished:
        data = load_images(config.data, config.data_dir, config.image_size, config.channels)
        run.same_data(data.train, data.test)
        pictures = data.train.to(device)  # MNIST's 60,000 are 47 MB
        for step in run.steps():
            # The next batch in this epoch's order (run knows the step), its coins tossed anew.
            x = scaled(pictures[run.batch_rows(len(pictures)).to(device)])
            if step < 0.7 * config.steps or config.importance == 1:
                # Encode, draw a code, decode: how well was it rebuilt, what did the code cost?
                reconstruction, kl = elbo_terms(model, x)
                loss = (config.beta * kl - reconstruction).mean()
                run.log(kl=kl.mean())
            else:
                log_w = log_weights(model, x, config.importance)  # the loss is -L_k
                loss = (math.log(config.importance) - log_w.logsumexp(1)).mean()
            # Gradients, clipped to a length of 100: a wild batch must not undo the work of many.
            optimizer.zero_grad()
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=100)
            run.log(loss=loss, grad_norm=grad_norm)  # raises FloatingPointError if not finite
            share = schedule((step + 0.5) / config.steps)  # and now the update
            optimizer.param_groups[0]["lr"] = config.learning_rate * share
            optimizer.step()
            if run.due(10):  # now and then, to see how it is getting on
                fit_gaussian(model, data.train[:10000])
                draw_samples(run, model)
                draw_reconstructions(run, model, data.test)
        fit_gaussian(model, data.train[:10000])
        draw_reconstructions(run, model, data.test)
        draw_walk(run, model, data.test)
        run.finish(judge(model, data.test))
    draw_samples(run, model)
    run.report()
    return model.eval()


def mean_codes(model, pictures):
    """Bytes (N, C, H, W) -> the means of their codes, (N, L)."""
    tosses, device = seeded("codes"), model.prior_mean.device
    with evaluating(model):
        return torch.cat([model.encode(scaled(some.cpu(), tosses).to(device))[0]
                          for some in pictures.split(500)])


def fit_gaussian(model, pictures):
    """For the autoencoder: the mean and covariance of the codes of ``pictures`` (N, C, H, W). The
    VAE is paid to put its codes where N(0, I) has its mass. The autoencoder puts them where it
    likes; a Gaussian around them also covers codes of no picture at all, and samples show it."""
    if model.config.kind == "ae":
        codes = mean_codes(model, pictures).cpu().double()
        ridge = 1e-6 * torch.eye(codes.shape[1])  # in case one of a code's numbers is never used
        covariance = codes.T.cov(correction=0).view_as(ridge) + ridge        # (L, L), even for L=1
        model.prior_mean.copy_(codes.mean(0))
        model.prior_factor.copy_(torch.linalg.cholesky(covariance))


# ==== 5. Sampling =================================================================================
def sample(model, n, seed=None):
    """n new pictures, floats (n, C, H, W) in [0, 1]: decoded draws from N(0, I) (ae: its Gaussian).
    They are the probabilities of ink (in colour, the middles of the bumps): noise would only add
    grain. The same seed gives the same pictures; None draws from torch's global generator."""
    noise = None if seed is None else seeded(seed, "sample")
    eps = torch.randn(n, model.config.latent_dim, generator=noise).to(model.prior_mean.device)
    with evaluating(model):
        return torch.cat([model.picture(model.place(e)) for e in eps.split(500)])


def draw_walk(run, model, test):
    """walk.png: 24 walkers stroll in straight lines past four test pictures each, and home again.
    The still image, for viewers without animation, has the first three walks."""
    walkers, stops, frames = 24, 4, 24
    codes = mean_codes(model, test[torch.arange(stops * walkers) % len(test)])
    codes, film = codes.unflatten(0, (stops, walkers)), []                    # (stops, walkers, L)
    with evaluating(model):
        for frame in range(frames):
            leg, way = divmod(frame * stops / frames, 1)
            z = codes[int(leg)].lerp(codes[(int(leg) + 1) % stops], way)      # at last home again
            film.append(model.picture(z).cpu())                               # (walkers, C, H, W)
    still = torch.stack([frame[:3] for frame in film[::frames // 8]], 1).flatten(0, 1)
    run.write("walk.png", png(grid(still, 8), [grid(frame, 8) for frame in film]))


def load(path, device="cpu"):
    """The model of a checkpoint, in eval mode. UserError if it is not vae.py's."""
    state = read_checkpoint(path)
    model = VAE(Config(**state["config"]))
    with fitting(path):
        model.load_state_dict(state["model"])
    return model.to(device, memory_format=torch.channels_last).eval()


# ==== 6. Judging, on pictures that it never saw ===================================================
def bounds(model, images, k, generator=None):
    """Pictures (B, C, H, W), scaled -> KL, ELBO and an estimate of L_k, (3, B), nats a picture. At
    most 1000 codes at a time are in memory."""
    if model.config.kind == "ae":
        fail("an autoencoder has no likelihood: its codes have no probability")
    parts, images = [], images.to(model.prior_mean.device)
    with evaluating(model):
        for x in tqdm(images.split(max(1, 1000 // k)), "judging", leave=False, delay=1):
            log_w = torch.cat([log_weights(model, x, min(1000, k - done), generator)
                               for done in range(0, k, 1000)], 1)                       # (b, k)
            kl, elbo = kl_divergence(*model.encode(x)), log_w.mean(1)  # the ELBO is E[log w]
            parts.append(torch.stack([kl, elbo, log_w.logsumexp(1) - math.log(k)]))
    return torch.cat(parts, 1)


def log_likelihood(model, images, k, seed=None):
    """An unbiased estimate of L_k, a lower bound on log p(x): pictures (B, C, H, W), grey ones of 0
    and 1, colour in [0, 1] of 256 levels -> (B,), nats a picture."""
    return bounds(model, images, k, None if seed is None else seeded(seed, "draws"))[2]


def judge(model, test):
    """Means over the first ``test_images`` pictures, in nats per picture; in colour (vae) also in
    bits per value; ae: the reconstruction alone. Seeds are fixed: the same tosses for all."""
    x = scaled(test[:model.config.test_images], seeded("test")).to(model.prior_mean.device)
    if model.config.kind == "ae":
        with evaluating(model):
            rebuilt = torch.cat([elbo_terms(model, some)[0] for some in x.split(500)])
        return {"test_reconstruction": rebuilt.mean().item()}
    kl, elbo, bound = bounds(model, x, model.config.draws, seeded("draws")).mean(1).tolist()
    figures = {"test_reconstruction": elbo + kl, "test_kl": kl, "test_elbo": elbo,
               "test_bound": bound}
    if model.config.channels == 3:
        figures["test_bits_per_dim"] = -bound / math.log(2) / x[0].numel()
    return figures


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status (see launch)."""
    return launch(argv, train)


# ==== Plumbing: blocks that stand, equal to the letter, in several files of this collection =======
# (What this script alone has comes last.) They ask of this file its name, the settings that are
# fixed once training has begun, and those on whose change a trained model is judged again.
NAME = "vae"
FIXED = ("kind", "beta", "importance", "latent_dim", "width", "image_size", "channels", "data",
         "batch_size", "seed")
JUDGING = ("draws", "test_images")


# ---- block: runs (the same in every file) ----
# Around a training loop: settings, seeds, checkpoints, metrics, stopping, downloads, errors.
import argparse, ctypes, functools, gzip, hashlib, io, os, signal, threading, time, zipfile, zlib
import http.client, urllib.request
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path


class UserError(Exception):
    """What the user can mend: on the command line one line on stderr and exit status 2."""


def fail(message):
    raise UserError(message)


def flag(name):
    return "--" + name.replace("_", "-")


def check_config(config):
    """Refuse a value out of range or of the wrong type; tidy ``data``; give ``out`` its default."""
    special = [NAME]
    for f in fields(config):
        value, kind, within = getattr(config, f.name), type(f.default), f.metadata["within"]
        fits = type(value) is kind or (kind, type(value)) in ((float, int), (tuple, list))
        if fits and within:
            fits = value in within if kind is str else within[0] <= value <= within[1]
        if not fits:
            wanted = (" or " if kind is str else " to ").join(map(str, within)) or kind.__name__
            fail(f"{flag(f.name)} takes {wanted}, not {value!r}")
        if f.name == "data":  # ./folder/ is folder, wherever it is compared
            if not all(value.split(",")):
                fail("--data takes a name or a path")
            value = config.data = ",".join(os.path.normpath(part) for part in value.split(","))
        if f.name in ("kind", "generator", "data") and value != f.default:
            special += [Path(part).resolve().stem for part in value.split(",")]
    config.out = config.out or str(Path("out", "-".join(special)))


def command_line(argv):
    """Config from the flags that are given, then the checkpoint in ``--out``, then the defaults."""
    parser = argparse.ArgumentParser(f"{NAME}.py", None, __doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    for f in fields(Config):
        how = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        how = {"action": "append"} if f.default == () else how
        default = "" if f.default in ("", ()) or f.default is False else f" (default {f.default})"
        about = (f.metadata["about"] + default).replace("%", "%%")
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=about, **how)
    given = vars(parser.parse_args(argv))
    out = Config(**{n: given[n] for n in ("out", "kind", "generator", "data") if n in given}).out
    path = Path(out, "checkpoint.pt")
    if path.exists() and not given.get("restart"):
        state = read_checkpoint(path)
        # (If it has not begun, and other data are asked for, its settings do not bind.)
        if state["step"] or given.get("data") in (None, state["config"]["data"]):
            given = state["config"] | given | {"out": out}
    return Config(**given)


def launch(argv, job):
    """job(Config from argv) -> exit status: 0, 1 diverged, 2 user's mistake, 130 or 143 stopped."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    try:
        with on_signals(stop):
            job(command_line(argv))
        return 0
    except KeyboardInterrupt as error:
        status = 128 + (error.args or (signal.SIGINT,))[0]
        words = "stopped; the same command, less any --restart, goes on"
    except BrokenPipeError:  # "| head" has seen enough; nothing may be flushed there at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        status, words = 1 if isinstance(error, FloatingPointError) else 2, f"error: {error}"
    print(f"{NAME}.py:", *words.split(), file=sys.stderr)
    return status


@contextmanager
def on_signals(handler):
    """Inside, Ctrl-C and SIGTERM call ``handler``. Only the main thread may say so."""
    main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)


@contextmanager
def evaluating(model):
    """Inside, no gradients and eval mode; afterwards the mode that was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def pick_device(name):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    name = next(n for n in there if there[n]) if name == "auto" else name
    return torch.device(name) if there[name] else fail(f"--device {name}: torch finds none here")


def seed_of(*what):
    """(seed, step), say -> 32 bits, all that torch's generator on a CPU takes."""
    return zlib.crc32(repr(what).encode())


def seeded(*what):
    return torch.Generator().manual_seed(seed_of(*what))


@functools.lru_cache(maxsize=2)
def epoch_order(count, seed, epoch):
    return torch.randperm(count, generator=seeded(seed, "epoch", epoch))


def together():
    """True where several processes train one model (see the block ranks, in some files)."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leading():
    """True in the one process that writes and speaks."""
    return not together() or torch.distributed.get_rank() == 0


def to_bytes(tensor):
    tensor = tensor.cpu().contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def write_file(path, content):
    """Write a file whole or not at all: beside it, flushed, then renamed over it."""
    if not leading():
        return
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def download(urls, path, digest):
    """Fetch ``path`` from the first url where ``digest`` is right: an md5 of the file or a sha256
    of its content, unpacked if it is a .gz, or "zip", where no more is known than that."""
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                size = int(reply.headers.get("Content-Length") or 0) or None
                with tqdm.wrapattr(reply, "read", total=size, desc=path.name, leave=False) as body:
                    content = b"".join(iter(lambda: body.read(1 << 16), b""))
            unpacked = gzip.decompress(content) if path.suffix == ".gz" else content
            md5 = hashlib.md5(content, usedforsecurity=False)
            whole = digest == "zip" and not zipfile.ZipFile(io.BytesIO(content)).testzip()
            if whole or digest in (md5.hexdigest(), hashlib.sha256(unpacked).hexdigest()):
                return write_file(path, content)
            trouble = f"{url}: wrong checksum"
        except (OSError, EOFError, ValueError, http.client.HTTPException, zlib.error,
                zipfile.BadZipFile) as error:
            trouble = f"{url}: {error}"
    fail(f"cannot download {path.name} ({trouble}); without a network, put it at {path} yourself")


def read_checkpoint(path):
    """What Run.save wrote, on the CPU. UserError where ``path`` is anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours = state["script"] == NAME and Config(**state["config"])
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except Exception:  # torch.load raises a dozen kinds of error on junk
        ours = False
    return state if ours else fail(f"{path} is not a checkpoint of this {NAME}.py: choose another "
                                   "--out, or give --restart to throw it away")


@contextmanager
def fitting(path):
    """Inside, networks and the like take what ``path`` holds for them. UserError if it is odd."""
    try:
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        fail(f"{path} does not fit this version of the script: give --restart to throw it away, or "
             "choose another --out")


class Run:
    """A training run, restored if ``config.out`` has its checkpoint. ``saved`` names what goes into
    it: anything with a state_dict. UserError if the checkpoint began with other FIXED settings."""
    kept = ("step", "seconds", "data", "judged", "rows", "sums", "frames")
    agree = staticmethod(lambda number: number)  # with the block ranks: all processes stop together

    def __init__(self, config, **saved):
        self.config, self.saved, self.written = config, saved, {}
        self.path = Path(config.out, "checkpoint.pt")
        self.step, self.seconds, self.data, self.judged = 0, 0.0, None, False
        self.rows, self.sums, self.frames = [], {}, []  # of metrics.csv, its next row, a film
        if self.path.exists() and not config.restart:
            state = read_checkpoint(self.path)
            if state["step"]:  # else it has not begun, and nothing binds it
                self.restore(state)

    def restore(self, state):
        begun, now = state["config"], asdict(self.config)
        with fitting(self.path):
            vars(self).update({name: state[name] for name in self.kept})
            self.judged = self.judged and all(begun[name] == now[name] for name in JUDGING)
            for name in FIXED:
                if begun[name] != now[name] and not (name == "seed" and self.finished):
                    self.refuse(f"began with {flag(name)} {begun[name]}")
            for name, thing in self.saved.items():
                thing.load_state_dict(state[name])

    def refuse(self, why):
        fail(f"{self.path} {why}: give --restart to throw it away, or choose another --out")

    @property
    def finished(self):
        """Trained and judged: only sampling is left."""
        return self.judged and self.step >= self.config.steps

    def same_data(self, *tensors):
        """UserError if these are not the data with which the run began."""
        crc = functools.reduce(lambda crc, tensor: zlib.crc32(to_bytes(tensor), crc), tensors, 0)
        if self.data not in (None, crc):
            self.refuse("began with other data")
        self.data = crc

    def batch_rows(self, count):
        """Which of ``count`` rows make the batch: every epoch walks its own permutation of them."""
        size = self.config.batch_size
        first, last = self.step * size // count, ((self.step + 1) * size - 1) // count
        order = [epoch_order(count, self.config.seed, epoch) for epoch in range(first, last + 1)]
        return torch.cat(order)[self.step * size - first * count:][:size]

    def steps(self):
        """Yield the steps that are left. Chance in step t comes from (seed, t) alone: on a CPU a
        killed run ends like one that was not. Saves first, every 30 s, when stopped, at the end."""
        total, stopped_by = self.config.steps, []

        def stop(number, frame):
            stopped_by.append(number)
            if len(stopped_by) > 1:  # the second time, at once
                raise KeyboardInterrupt(number)

        if self.step >= total:
            return
        with on_signals(stop), tqdm(total=total, initial=self.step, desc=NAME,
                                    disable=not leading()) as bar:
            self.judged = False
            self.save()  # a folder that cannot be written is better known before the work
            clock = last_save = time.perf_counter()
            while self.step < total:
                torch.manual_seed(seed_of(self.config.seed, self.step))
                yield self.step
                self.step += 1
                bar.update()
                now = time.perf_counter()
                self.seconds, clock = self.seconds + now - clock, now
                if self.step % 20 == 0 or self.step == total:
                    row = {n: round(sum(v) / len(v), 6) for n, v in self.sums.items()}
                    self.rows.append({"step": self.step, "seconds": round(self.seconds, 2)} | row)
                    self.sums = {}
                    bar.set_postfix({name: f"{mean:.4g}" for name, mean in row.items()})
                stop_now = self.agree(stopped_by[0] if stopped_by else 0)
                if stop_now or self.step == total or now > last_save + 30:
                    self.save()
                    last_save = time.perf_counter()
                if stop_now:
                    raise KeyboardInterrupt(stop_now)

    def due(self, times):
        """True in the first step after each of ``times`` equal parts of the run but the last."""
        part = self.config.steps / times
        return self.step > 0 and self.step // part > (self.step - 1) // part

    def log(self, **figures):
        """For the bar and metrics.csv: means over 20 steps. When one is not finite,
        FloatingPointError stops the run before this step is saved."""
        for name, value in figures.items():
            number = torch.as_tensor(value).item()
            if not math.isfinite(number):
                raise FloatingPointError(f"{name} is {number} at step {self.step}: try a lower "
                                         f"--learning-rate; {self.path} keeps the last good state")
            self.sums.setdefault(name, []).append(number)

    def film(self, images):
        """Pictures (N, C, H, W) in [0, 1], kept as the next of 20 frames at most of a film."""
        if len(self.frames) > 19:  # the run was made longer: every second one stays
            del self.frames[1::2]
        self.frames.append((images.cpu() * 255).round().byte())

    def save(self):
        """checkpoint.pt, and metrics.csv as of the same step."""
        state = {name: getattr(self, name) for name in self.kept}
        plain = {f.name: False for f in fields(self.config) if f.default is False}
        state |= {"script": NAME, "config": asdict(self.config) | plain}  # such flags pass
        state |= {name: thing.state_dict() for name, thing in self.saved.items()}
        memory = io.BytesIO()
        torch.save(state, memory)
        write_file(self.path, memory.getbuffer())
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        rows = [[str(row.get(name, "")) for name in names] for row in self.rows]
        self.write("metrics.csv", "".join(",".join(row) + "\n" for row in [names, *rows]).encode())

    def finish(self, figures):
        """The held-out figures go into the last row: the run is trained and judged."""
        if not self.rows or self.rows[-1]["step"] != self.step:  # stopped between two rows
            self.rows.append({"step": self.step, "seconds": round(self.seconds, 2)})
        self.rows[-1].update({name: round(value, 6) for name, value in figures.items()})
        self.judged = True
        self.save()

    def write(self, name, content):
        write_file(self.path.with_name(name), content)
        self.written[name] = str(self.path.with_name(name))

    def report(self):
        if not leading():
            return
        held_out = {n: v for n, v in self.rows[-1].items() if n.startswith("test_")}
        print(f"{self.step} steps, {self.seconds:.0f} s; held out:",
              ", ".join(f"{name[5:]} {value:.5g}" for name, value in held_out.items()))
        if self.written:
            print("wrote", ", ".join(self.written.values()))
# ---- end block ----


# ---- block: pictures (the same in every file) ----
# PNG and animated PNG, written with zlib alone; photographs, read with Pillow. Needs the block
# runs.
import struct


def grid(images, columns, scale=2):
    """Pictures (N, C, H, W) in [0, 1] -> one sheet, bytes (height, width, C); any N from 1 on."""
    columns = min(columns, len(images))
    images = (images.detach().cpu().clamp(0, 1) * 255).round().byte()
    images = F.pad(images, (0, 1, 0, 1), value=64)                            # a thin grey line
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(images) % columns))
    sheet = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # (rows, H, columns, W, C)
    sheet = sheet.flatten(2, 3).flatten(0, 1)
    return sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def png(still, frames=(), milliseconds=100):
    """Bytes (H, W, 1 or 3) -> a PNG file. With frames of the same size it is an animation (APNG, in
    PNG's third edition, W3C 2025), and ``still`` is what a viewer without animation shows."""
    def chunk(kind, body):
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    def pack(picture):  # a row is stored as its difference to the row above (filter 2)
        rows = picture.flatten(1)
        rows = torch.cat([rows[:1], rows[1:] - rows[:-1]])  # bytes, hence modulo 256
        return zlib.compress(to_bytes(F.pad(rows, (1, 0), value=2)), 9)

    height, width, channels = still.shape
    header = struct.pack(">2I5B", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if frames:
        parts.append(chunk(b"acTL", struct.pack(">2I", len(frames), 0)))
    parts.append(chunk(b"IDAT", pack(still)))
    for i, frame in enumerate(frames):  # a control chunk and the pixels, numbered through
        control = struct.pack(">5I2H2B", 2 * i, width, height, 0, 0, milliseconds, 1000, 0, 0)
        parts.append(chunk(b"fcTL", control))
        parts.append(chunk(b"fdAT", struct.pack(">I", 2 * i + 1) + pack(frame)))
    return b"".join(parts) + chunk(b"IEND", b"")


ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def picture_files(path):
    """The pictures below a folder or in a .zip, by name, in order: {"trainA/1.jpg": read, ...},
    where read() gives the file's bytes. A .zip is read in memory and never unpacked to disk."""
    path = Path(path)

    def member(archive, info):
        def read():
            if info.file_size > 1 << 28:
                raise ValueError("it would unpack to more than 256 MiB")
            return archive.read(info)
        return read

    try:
        if path.is_dir():
            found = {p.relative_to(path).as_posix(): p.read_bytes for p in path.rglob("*")}
        else:
            archive = zipfile.ZipFile(path)
            found = {info.filename: member(archive, info) for info in archive.infolist()}
    except (OSError, NotImplementedError, ValueError, zipfile.BadZipFile) as error:
        fail(f"{path} is neither a folder nor a whole .zip: {error}")
    return {name: found[name] for name in sorted(found) if name.lower().endswith(ENDINGS)
            and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))}


def read_picture(name, read, size=None):
    """One picture -> bytes (3, H, W), RGB whatever the file holds; with ``size``, its middle
    square, scaled to (3, size, size). UserError if it cannot be read."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        fail("photographs need one more package: pip install pillow")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd notes beside the pixels
            picture = Image.open(io.BytesIO(read()))
            if picture.width * picture.height > 1 << 26:
                raise ValueError("it has more than 64 million pixels")
            picture.draft("RGB", (size or picture.width,) * 2)  # a JPEG can be read smaller at once
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # grey of 16 bits
                picture = picture.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            elif "A" in picture.getbands() or "transparency" in picture.info:  # onto white
                picture = picture.convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                picture = Image.alpha_composite(white, picture)
            picture = picture.convert("RGB")
            if size:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        rows = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return rows.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
    except Exception as error:  # Pillow and zipfile raise a dozen kinds of error on junk
        fail(f"cannot read {name}: {error}")


def read_pictures(files, size):
    """(name, read) pairs -> bytes (N, 3, size, size), and which of the pairs they are. What cannot
    be read is left out, with a word about it; UserError where nothing is left."""
    pictures, kept, troubles = [], [], []
    bar = tqdm(files, desc="reading", leave=False, delay=1, disable=not leading())
    for i, (name, read) in enumerate(bar):
        try:
            pictures.append(read_picture(name, read, size))
            kept.append(i)
        except UserError as error:
            troubles.append(str(error))
    if troubles and (not pictures or "pip install" in troubles[0]):
        fail(troubles[0])
    if troubles and leading():
        print(f"{NAME}.py: left out {len(troubles)} of {len(files)}: {troubles[0]}",
              file=sys.stderr)
    return torch.stack(pictures), kept
# ---- end block ----


# ---- block: images (the same in every file) ----
# Small pictures and what each of them shows, in memory as bytes: drawn here, from IDX files, from
# CIFAR-10's archive, or photographs. Needs the blocks runs and pictures.
import tarfile
from collections import namedtuple

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FASHION = ["t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IDX_FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
PUBLISHED = {  # mirrors, and for each file a sha256 of its content or, if short, an md5 of the .gz
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/",
              ["ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
               "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
               "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
               "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"]),
    "fashion": ("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/"
                "data/fashion/",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                ["8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                 "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"])}
HANDS = [  # each digit as several hands write it: points xy (right, down, 0 to 9), / lifts the pen
    ["61 40 22 15 18 39 69 86 83 71 50", "50 23 16 29 59 77 74 62 41"],
    ["51 54 59", "23 41 50 54 59", "23 50 54 59/29 59 89"],
    ["13 20 50 72 74 46 19 19 59 89", "12 30 60 73 56 28 17 27 58 88"],
    ["12 30 60 72 63 44 44 74 77 58 29 17", "11 41 71 71 44 44 65 77 59 28"],
    ["30 23 15 15 55 85/71 65 59", "70 43 15 15 55 85/60 65 69", "21 14 26 56 75/81 74 67 59"],
    ["21 20 14 14 43 74 77 59 28/21 51 81", "81 51 31 24 24 54 76 68 39"],
    ["70 40 22 15 18 39 69 77 65 45 26", "60 33 16 28 59 77 65 35 17"],
    ["12 11 41 81 81 64 46 39", "11 51 81 81 54 48 49/35 55 75", "12 10 40 80 80 63 49"],
    ["72 60 30 12 23 55 77 69 39 17 26 53 72", "50 23 24 45 66 77 59 29 17 35 64 73 61 50"],
    ["72 50 20 13 25 55 73 71 71 75 69", "71 40 13 25 54 72 71 73 66 49 28"]]


# Pictures are bytes (N, C, H, W); labels (N,) say which of the names each one shows.
Images = namedtuple("Images", "train train_labels test test_labels names")


def is_photographs(name):
    """Whether this exists and is no folder of IDX files."""
    path = Path(name)
    here = name not in ("", "digits", "cifar10", *PUBLISHED) and path.exists()
    return here and not any((path / f"{IDX_FILES[0]}{end}").exists() for end in ("", ".gz"))


def settle_shape(config, multiple):
    """Give ``channels`` and ``image_size`` the data's own where they are 0; check both."""
    colour = config.data == "cifar10" or is_photographs(config.data)
    config.channels = config.channels or (3 if colour else 1)
    config.image_size = config.image_size or (32 if colour else 28)
    if config.channels == 2:
        fail("--channels takes 1 or 3, or 0 for what the data has")
    if config.image_size % multiple:
        fail(f"--image-size {config.image_size} must be a multiple of {multiple}")


def draw_digits(count, seed):
    """Handwriting: bytes (count, 1, 28, 28), and labels digit + 10 * bold + 20 * slanted, (count,).
    A stroke is a smooth curve through jittered points, its ink a sum of Gaussian blobs along it. A
    blob is separable, so the sum is a matrix product: (28, places) @ (places, 28). Clamping makes
    it a stroke with soft edges."""
    g = seeded("digits", seed)
    digit, bold, slanted = (torch.randint(n, (count,), generator=g) for n in (10, 2, 2))
    jitter = 0.4 * torch.randn(count, 16, 2, generator=g)
    shift = 0.7 * torch.randn(count, 1, 2, generator=g)
    u = torch.rand(7, count, generator=g)
    size, aspect, turn = 16.5 + 4 * u[0], 0.65 + 0.35 * u[1], 0.2 * u[2] - 0.1
    pressure, hand = u[3] - 0.5, u[4]
    lean = torch.where(slanted == 1, 0.32 + 0.28 * u[5], 0.16 * u[5] - 0.06)
    radius = torch.where(bold == 1, 1.05 + 0.3 * u[6], 0.58 + 0.22 * u[6])
    cos, sin = turn.cos(), turn.sin()  # pose: where a step to the right goes, and a step down
    pose = torch.stack([aspect * cos, aspect * sin, -sin - lean * cos, cos - lean * sin], 1)
    pose = (pose * size[:, None] / 9).view(-1, 2, 2)
    pictures = torch.empty(count, 1, 28, 28, dtype=torch.uint8)
    for d, h in [(d, h) for d, hands in enumerate(HANDS) for h in range(len(hands))]:
        strokes = [[[int(x), int(y)] for x, y in s.split()] for s in HANDS[d][h].split("/")]
        # Interpolating an identity matrix gives what each point weighs at each place of the curve.
        curves = [F.interpolate(torch.eye(len(s))[None, None], (max(24, 8 * len(s)), len(s)),
                                mode="bicubic", align_corners=True)[0, 0] for s in strokes]
        curve = torch.block_diag(*curves)                                      # (places, points)
        pace = torch.block_diag(*(torch.gradient(c, dim=0)[0] for c in curves))
        points = torch.tensor([point for s in strokes for point in s]).float()      # (points, 2)
        chosen = (digit == d) & ((hand * len(HANDS[d])).int() == h)
        for rows in chosen.nonzero()[:, 0].split(2000):
            posed = (points + jitter[rows, :len(points)]) @ pose[rows]            # (n, points, 2)
            at, pen = curve @ posed, (pace @ posed).norm(dim=2)    # (n, places, 2), (n, places)
            at = at - (at.amin(1, True) + at.amax(1, True)) / 2 + 13.5 + shift[rows]
            r = 1 + pressure[rows, None] * torch.linspace(-0.5, 0.5, len(curve))
            r = r * radius[rows, None]                                            # (n, places)
            blob = (-0.5 * ((torch.arange(28) - at[..., None]) / r[..., None, None])**2).exp()
            ink = (blob[:, :, 1] * (pen / r)[..., None] / math.tau**0.5).mT @ blob[:, :, 0]
            pictures[rows, 0] = ((ink - 0.2) * 510).clamp(0, 255).byte()
    return pictures, digit + 10 * bold + 20 * slanted


def read_idx(path, digest=""):
    """An IDX file of bytes, plain or .gz -> tensor. UserError where it is damaged or another."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            head = file.read(4)
            sizes = file.read(4 * head[3])
            shape = struct.unpack(f">{head[3]}I", sizes)
            if head[:3] != b"\0\0\x08" or not 0 < math.prod(shape) < 2**30:
                raise ValueError("it holds no bytes, or too many")
            body = file.read(math.prod(shape) + 1)
        if len(body) != math.prod(shape):
            raise ValueError("it is cut short or too long")
        if len(digest) == 64 and hashlib.sha256(head + sizes + body).hexdigest() != digest:
            raise ValueError("it is not the published one: delete it, and it is fetched again")
    except (OSError, EOFError, IndexError, ValueError, struct.error, zlib.error) as error:
        fail(f"{path} is not a good IDX file: {error}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def read_idx_files(name, data_dir):
    """mnist, fashion or a folder with the four IDX files -> Images, (N, 1, 28, 28)."""
    *mirrors, digests = PUBLISHED.get(name, [[""] * 4])
    folder, tensors = Path(data_dir, name) if mirrors else Path(name), []
    for file, digest in zip(IDX_FILES, digests, strict=True):
        path = folder / file if (folder / file).exists() else folder / f"{file}.gz"
        if mirrors and not path.exists():
            download([mirror + path.name for mirror in mirrors], path, digest)
        if not path.exists():
            fail(f"{folder} holds no {file}, plain or .gz")
        tensors.append(read_idx(path, digest))
    x, y, x_test, y_test = tensors
    if not (x.shape == (*y.shape, 28, 28) and x_test.shape == (*y_test.shape, 28, 28)):
        fail(f"{folder}: pictures of 28x28 are needed, and a label for each")
    more = [str(i) for i in range(10, int(max(y.max(), y_test.max())) + 1)]  # of letters, say
    names = (FASHION if name == "fashion" else DIGITS) + more
    return Images(x[:, None], y.long(), x_test[:, None], y_test.long(), names)


def read_cifar10(data_dir):
    """CIFAR-10's binary archive, read in memory -> Images, (N, 3, 32, 32)."""
    path = Path(data_dir, "cifar10", "cifar-10-binary.tar.gz")
    if not path.exists():
        download([f"https://www.cs.toronto.edu/~kriz/{path.name}"], path,
                 "c32a1d4ab5d03f1284b67883e8d87530")
    try:
        with gzip.open(path) as file:  # 184 MB; whatever unpacks to more is cut
            archive = tarfile.open(fileobj=io.BytesIO(file.read(1 << 28)), mode="r:")
        parts = []
        for batches in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
            files = [archive.extractfile(f"cifar-10-batches-bin/{name}.bin") for name in batches]
            records = torch.frombuffer(bytearray(b"".join(file.read() for file in files)),
                                       dtype=torch.uint8).view(-1, 1 + 3 * 32 * 32)
            if records[:, 0].max() > 9:
                raise ValueError("a label is above 9")
            parts += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()]
    except (OSError, EOFError, KeyError, AttributeError, ValueError, RuntimeError, IndexError,
            tarfile.TarError, zlib.error) as error:
        fail(f"{path} is not a good CIFAR-10 archive: {error}")
    return Images(*parts, CIFAR10)


def read_photographs(path, size):
    """A folder or .zip of pictures -> Images, (N, 3, size, size), of each its middle square. The
    innermost folder names what a picture shows; where there is none, it is a "picture". Folders
    train and test say what is what; if one is missing, every tenth picture, by name, is held
    out."""
    files, labels, splits = picture_files(path), [], []
    for name in files:
        *folders, _ = name.lower().split("/")
        kinds = [folder for folder in folders if folder not in ("train", "test")]
        words = kinds[-1].replace("_", " ").replace("-", " ").split() if kinds else []
        labels.append(" ".join(words) or "picture")
        splits.append({"train", "test"} & set(folders))
    tested = [split == {"test"} for split in splits]
    if not any(tested) or {"train"} not in splits:
        every = min(10, len(files))
        tested = [i % every == every - 1 for i in range(len(files))]
    names, parts = sorted(set(labels)), []
    for held_out in (False, True):
        some = [(file, names.index(label)) for file, label, test in
                zip(files.items(), labels, tested, strict=True) if test == held_out]
        if not some:
            fail(f"{path}: no IDX files, and fewer than two pictures, one of them to judge on")
        order = torch.randperm(len(some), generator=seeded("order"))  # or the first are of one kind
        some = [some[i] for i in order]
        pictures, kept = read_pictures([file for file, _ in some], size)
        parts += [pictures, torch.tensor([label for _, label in some])[kept]]
    return Images(*parts, names)


def fitted(pictures, size, channels):
    """Bytes (N, 1 or 3, H, W) -> (N, channels, size, size); grey is 0.3 R + 0.59 G + 0.11 B."""
    if pictures.shape[1:] == (channels, size, size):
        return pictures
    parts = []
    for some in pictures.split(1000):
        if some.shape[1] > channels:
            grey = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
            some = (some * grey).sum(1, keepdim=True).round().byte()
        if some.shape[2] != size:
            some = F.interpolate(some.float(), (size, size), mode="bilinear", antialias=True)
        parts.append(some.round().byte().expand(-1, channels, -1, -1))
    return torch.cat(parts)


def load_images(name, data_dir, size=28, channels=1):
    """digits, mnist, fashion, cifar10, a folder of IDX files, or photographs -> Images: of MNIST 55
    MB, of CIFAR-10 184 MB, of 10,000 photographs 31 MB at 32x32 and 123 MB at 64x64."""
    if name == "digits":
        kinds = [f"{w} {s}" for s in ("upright", "slanted") for w in ("thin", "bold")]
        names = [f"{kind} {digit}" for kind in kinds for digit in DIGITS]
        data = Images(*draw_digits(60000, "train"), *draw_digits(10000, "test"), names)
    elif name == "cifar10":
        data = read_cifar10(data_dir)
    elif is_photographs(name):
        data = read_photographs(name, size)
    elif name in PUBLISHED or name and Path(name).is_dir():
        data = read_idx_files(name, data_dir)
    else:
        fail(f"no data set {name}: give digits, mnist, fashion, cifar10, a folder of IDX files, or "
             "a folder or .zip of photographs")
    return data._replace(train=fitted(data.train, size, channels),
                         test=fitted(data.test, size, channels))
# ---- end block ----


# ==== Pictures that train writes ==================================================================
def draw_samples(run, model):
    """samples.png and, when a code is two numbers, map.png: 95 % of the prior along each axis."""
    run.write("samples.png", png(grid(sample(model, run.config.samples, run.config.seed), 10)))
    if model.config.latent_dim == 2:
        # Equal steps in probability: the inverse of the Gaussian's distribution function takes an
        # even grid on the unit square to points that lie as densely as N(0, I).
        steps = torch.special.ndtri((torch.arange(20) + 0.5) / 20)
        eps = torch.cartesian_prod(steps, steps).flip(1).to(model.prior_mean.device)  # (400, 2)
        with evaluating(model):
            run.write("map.png", png(grid(model.picture(model.place(eps)), 20)))


def draw_reconstructions(run, model, test):
    """reconstructions.png: four rows of originals, below each what comes back (grey: of a toss)."""
    test = test[torch.arange(40) % len(test)]
    with evaluating(model):
        rebuilt = model.picture(mean_codes(model, test)).cpu()
    pairs = torch.stack([(test / 255).unflatten(0, (4, 10)), rebuilt.unflatten(0, (4, 10))], 1)
    run.write("reconstructions.png", png(grid(pairs.flatten(0, 2), 10)))


if __name__ == "__main__":
    sys.exit(main())
