# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
"""Generative adversarial networks: a forger and a detective who teach each other.

    z ~ N(0, I) --> generator G --> fake picture --+
                                                   +--> discriminator D --> real or fake?
              a picture of the data set: real -----+

The generator is a forger: it turns random numbers z into a picture. The discriminator is a
detective: it learns to tell fakes from real pictures. The generator never sees a real picture. Its
only signal is the discriminator's gradient with respect to the fake's pixels: how would each have
to change to look more real? Both get better together. If the generator wins, its pictures are
distributed as the real ones are, and the discriminator can only flip a coin.

    python gan.py                        on faces that this script draws; see out/gan/samples.png
    python gan.py --generator dcgan      the generator of 2015, for comparison
    python gan.py --truncation 0.7       once trained: samples closer to the average face
    python gan.py --data mnist           handwritten digits
    python gan.py --data ./photos        pictures of your own

Papers: Goodfellow et al. 2014 (arXiv:1406.2661), GAN; Radford, Metz, Chintala 2015
(arXiv:1511.06434), DCGAN; Karras, Laine, Aila 2018 (arXiv:1812.04948), StyleGAN; Karras et al. 2019
(arXiv:1912.04958), StyleGAN2; Mescheder, Geiger, Nowozin 2018 (arXiv:1801.04406), R1.
"""
import argparse
import copy
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
    generator: str = setting("stylegan", "stylegan or dcgan", "stylegan", "dcgan")
    latent_dim: int = setting(32, "numbers in z, and in a style w")
    width: int = setting(16, "channels at full and half resolution; twice as many at each coarser")
    image_size: int = setting(0, "height and width, a multiple of 4; 0: 28 if grey, else 32")
    faces: int = setting(0, "faces to draw; 0: 40,000 at 32x32, fewer at larger sizes")
    r1: float = setting(2.0, "weight of the R1 penalty (chapter 5); raise it if training collapses")
    batch_size: int = setting(16, "real pictures per step, and as many fakes")
    learning_rate: float = setting(2e-3, "of both networks; lower it if training diverges")
    steps: int = setting(3000, "steps in total, each an update of both networks")
    truncation: float = setting(1.0, "below 1: samples closer to the average, of stylegan")
    samples: int = setting(100, "pictures in samples.png")
    export: int = setting(0, "write so many samples to export/, too, a PNG file each")
    seed: int = setting(0, "of the training; of a finished model, only of its samples")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    data_dir: str = setting("data", "where downloads are")
    out: str = setting("", "folder of results; default: out/gan, plus the fixed settings given")
    restart: bool = setting(False, "throw away the checkpoint, begin afresh with what is given")
    FREE = ("steps", "truncation", "samples", "export", "seed", "device", "data_dir", "out",
            "restart")  # the rest is fixed

    def __post_init__(self):
        settle(self)


# ==== 1. Data =====================================================================================
# Pictures are bytes (N, C, H, W), C = 1 (grey) or 3; for the networks they are floats in [-1, 1]. B
# is the size of a batch, L of a latent z.


def levels(size, width):
    """Resolution and channels of a generator's levels, coarse to fine: (4, 64), (8, 32), (16, 16),
    (32, 16) if size is 32 and width 16. The discriminator has all but the last."""
    sizes = [(size, width)]
    while size % 2 == 0 and size > 4:
        size //= 2
        sizes.append((size, width))
        width = min(512, 2 * width)
    return sizes[::-1]


# ==== 2. A generator of 2015: DCGAN ===============================================================
# Radford, Metz and Chintala found an architecture that trains reliably. What they had, and what is
# here instead:
# - no pooling, but strided convolutions, to double the resolution transposed ones. Those have other
#   weights for even than for odd pixels and leave a woven pattern on flat colours. Here bilinear
#   upsampling doubles it: a low-pass filter, [1, 3, 3, 1] / 4 along each axis, as in StyleGAN2;
# - batch normalisation keeps activations and gradients at one scale, but makes each fake depend on
#   the others in its batch. Here the generator normalises each picture by itself (GroupNorm), the
#   discriminator not at all: the R1 penalty (chapter 5) steadies it;
# - ReLU in the generator, leaky ReLU in the discriminator: the generator's gradient comes through
#   the discriminator, and ReLU passes none where its input is negative;
# - tanh at the end: real pixels lie in [-1, 1], and fakes outside are easily told apart;
# - 100 numbers in z, here 32; weights from N(0, 0.02^2), here PyTorch's defaults.


class DCGAN(nn.Module):
    """Latents z (B, L) -> pictures (B, C, H, W) in [-1, 1]."""

    def __init__(self, channels, size, width, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim
        (low, before), *finer = levels(size, width)

        def block(inside, outside):
            return [nn.GroupNorm(math.gcd(8, inside), inside), nn.ReLU(),
                    nn.Conv2d(inside, outside, kernel_size=3, padding=1)]

        layers = [nn.Linear(latent_dim, before * low * low),
                  nn.Unflatten(1, (before, low, low)), *block(before, before)]    # (B, 64, 4, 4)
        for _, after in finer:  # (B, 32, 8, 8), (B, 16, 16, 16), (B, 16, 32, 32)
            layers += [*block(before, after), nn.Upsample(scale_factor=2, mode="bilinear"),
                       *block(after, after)]
            before = after
        self.layers = nn.Sequential(*layers, *block(before, channels), nn.Tanh())

    def forward(self, z, truncation=1.0):
        return self.layers(truncation * z)


# ==== 3. A generator of 2018: StyleGAN ============================================================
# In DCGAN z enters once, at the start, and each layer must pass on what the later ones need. In
# StyleGAN the picture grows from a learned constant, and a mapping network turns z into a style w,
# which says at every layer how strongly each feature counts. Styles can be mixed (mixing.png).
#                           StyleGAN (2018)       StyleGAN2 (2019)        here
# mapping network z -> w    8 layers, 1/100 of    the same                4 layers, 1/10 of
#                           the learning rate                             the learning rate
# w acts by                 normalising, then     scaling the weights,    the same, computed on
#                           scaling each map      then demodulation       the activations
# noise in each layer       yes                   yes                     no
# styles mixed in training  90 % of fakes         90 % of fakes           half of the fakes
# low-pass filter           up and down           up and down             up
# from coarse to fine by    growing networks      RGB skips, residual D   plain layers
# equalised learning rates  yes                   yes                     no
# R1 penalty                at every step         every 16th, Adam        every 8th, Adam not
#                                                 adjusted to it          adjusted
# path length penalty       no                    yes                     no
# truncation of w, average of G's weights, spread of the batch as an input of D: all three


class StyledConv(nn.Module):
    """A convolution whose input channels w scales: (B, inside, H, W), (B, L) -> (B, outside, H, W).
    StyleGAN2 scales the weights W, for each picture; to scale the input is cheaper and the same:
    conv(s x, W) = conv(x, s W). Demodulation divides each output by the norm of its scaled weights:
    independent inputs of variance 1 give outputs of variance 1 (section 2.2, equation 3)."""

    def __init__(self, inside, outside, latent_dim, size=3):
        super().__init__()
        weight = torch.randn(outside, inside, size, size) / math.sqrt(inside * size**2)
        self.weight, self.padding = nn.Parameter(weight), size // 2
        self.bias = nn.Parameter(torch.zeros(outside))
        self.style = nn.Linear(latent_dim, inside)
        nn.init.normal_(self.style.weight, std=1 / math.sqrt(latent_dim))
        nn.init.ones_(self.style.bias)

    def forward(self, x, w, demodulate=True):
        s = self.style(w)                                                          # (B, inside)
        x = F.conv2d(x * s[:, :, None, None], self.weight, padding=self.padding)
        if demodulate:
            square = s.square() @ self.weight.square().sum((2, 3)).T               # (B, outside)
            x = x * (square + 1e-8).rsqrt()[:, :, None, None]
        return x + self.bias[:, None, None]


class StyleGAN(nn.Module):
    """Latents z (B, L) -> pictures (B, C, H, W) in [-1, 1]."""

    def __init__(self, channels, size, width, latent_dim):
        super().__init__()
        self.latent_dim, layers = latent_dim, []
        for _ in range(4):
            layers += [nn.Linear(latent_dim, latent_dim), nn.LeakyReLU(0.2)]
            nn.init.kaiming_normal_(layers[-2].weight, a=0.2)  # otherwise w barely depends on z
        self.mapping = nn.Sequential(*layers)
        low, before = levels(size, width)[0]
        self.constant = nn.Parameter(torch.randn(1, before, low, low))
        self.convs = nn.ModuleList()  # two at each resolution
        for _, after in levels(size, width):
            for inside in before, after:
                self.convs.append(StyledConv(inside, after, latent_dim))
            before = after
        self.to_rgb = StyledConv(before, channels, latent_dim, size=1)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")

    def styles(self, z):
        """Latents (B, L), scaled to mean square 1 -> w of each layer, all equal, (layers, B, L)."""
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        return w.expand(len(self.convs) + 1, *w.shape)

    def mean_style(self):
        """The mean of w over 1,000 fixed z, which makes the average picture: (1, L)."""
        z = torch.randn(1000, self.latent_dim, generator=torch.Generator().manual_seed(0))
        return self.styles(z.to(self.constant.device))[0].mean(0, keepdim=True)

    def render(self, styles):
        """Styles (layers, B, L), coarse to fine -> pictures (B, C, H, W)."""
        x = self.constant.expand(styles.shape[1], -1, -1, -1)                      # (B, 64, 4, 4)
        for i, (layer, w) in enumerate(zip(self.convs, styles, strict=False)):
            x = layer(x, w)
            if i > 0 and i % 2 == 0:
                x = self.upsample(x)
            x = F.leaky_relu(x, 0.2) * math.sqrt(2)  # leaky ReLU about halves the mean square
        return self.to_rgb(x, styles[-1], demodulate=False).tanh()

    def forward(self, z, truncation=1.0):
        styles = self.styles(z)
        if self.training:
            # Style mixing: half of the fakes have another style from a random layer on, so that
            # layers do not rely on each other's style (Karras et al. 2018, section 3.1).
            layer = torch.arange(len(styles), device=z.device)[:, None]            # (layers, 1)
            switch = torch.randint(1, 2 * len(styles), (len(z),), device=z.device)       # (B,)
            other = self.styles(torch.randn_like(z))
            styles = torch.where((layer < switch)[:, :, None], styles, other)
        if truncation != 1:
            styles = self.mean_style().lerp(styles, truncation)
        return self.render(styles)


# ==== 4. The discriminator ========================================================================
class Discriminator(nn.Module):
    """Pictures (B, C, H, W) -> logits (B,): the higher, the more real a picture looks."""

    def __init__(self, channels, size, width):
        super().__init__()
        layers, before = [], channels
        for _, after in levels(size, width)[-2::-1]:
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
                       nn.Conv2d(after, after, kernel_size=3, padding=1), nn.LeakyReLU(0.2)]
            before = after
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Conv2d(before + 1, before, kernel_size=3, padding=1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(before * levels(size, width)[0][0]**2, 1))

    def forward(self, x):
        x = self.body(x)                                                           # (B, 64, 4, 4)
        # A generator that makes the same picture again and again must not succeed. So D is told how
        # much the pictures in each group of 4 differ: one more channel holds the mean standard
        # deviation of their features (Karras et al. 2017, arXiv:1710.10196, section 3).
        group = math.gcd(len(x), 4)
        spread = x.unflatten(0, (-1, group)).var(1, correction=0)                # (B / 4, 64, 4, 4)
        spread = (spread + 1e-8).sqrt().mean((1, 2, 3), True).repeat_interleave(group, dim=0)
        return self.head(torch.cat([x, spread.expand_as(x[:, :1])], dim=1)).flatten()


# ==== 5. Objective ================================================================================
# Let D(x) be the probability, in D's opinion, that x is real: the sigmoid of its logit. D wants
# log D(x) + log(1 - D(G(z))) to be high, G wants it to be low: the minimax game of Goodfellow et
# al. 2014 (equation 1). Here -log D = softplus(-logit) and -log(1 - D) = softplus(logit).


def discriminator_loss(real, fake):
    """Cross-entropy: logits of real pictures and of fakes, (B,) each -> the mean, in nats. It is
    2 log 2 = 1.39 if D flips a coin."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake):
    """-log D(G(z)), logits (B,) -> the mean, in nats, instead of log(1 - D(G(z))): where D is sure
    of a fake, the gradient of that by the logit is near 0, and G would learn nothing when it is
    worst. The gradient of this one is near -1: it does not saturate (section 3 of the paper)."""
    return F.softplus(-fake).mean()


def r1_penalty(discriminator, real):
    """Half the squared norm of the gradient of D's logit with respect to a real picture, (B, C, H,
    W) -> the mean (Mescheder et al. 2018, equation 9). Without it D stays steep where fakes look
    real already, and pushes them away again."""
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return 0.5 * gradient.square().sum((1, 2, 3)).mean()


# ==== 6. Training =================================================================================
def adam(network):
    """Adam without momentum, because each player's objective changes with every step of the other.
    All styles depend on StyleGAN's mapping network, so it learns at a tenth of the rate."""
    slow = [p for name, p in network.named_parameters() if name.startswith("mapping.")]
    rest = [p for name, p in network.named_parameters() if not name.startswith("mapping.")]
    groups = [{"params": rest, "pace": 1.0}, {"params": slow, "pace": 0.1}]
    return torch.optim.Adam(groups, betas=(0.0, 0.99), fused=rest[0].device.type != "mps")


def update_average(average, G, step):
    """Running mean of G's weights, over some 500 steps, at first over fewer. G and D circle each
    other, and the middle of a circle beats its points (Yazici et al. 2018, arXiv:1806.04498)."""
    decay = min(0.998, (1 + step) / (10 + step))
    for mean, parameter in zip(average.parameters(), G.parameters(), strict=True):
        mean.data.lerp_(parameter.data, 1 - decay)


def train(config):
    """Train what is left, judge and sample; all goes to ``config.out`` -> the averaged generator.
    UserError if data, settings or folder will not do, FloatingPointError if training diverges."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("gan.py is for one process: start it without torchrun")
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    G, D, average = new_networks(config, device)
    adam_G, adam_D, frames = adam(G), adam(D), []
    run = Run(config, G=G, D=D, average=average, adam_G=adam_G, adam_D=adam_D)
    if not run.finished:
        data = load_images(config)
        images = data.train.to(device)
        for step in run.steps():
            if step % max(1, config.steps // 10) == 0:
                draw_samples(run, average, frames)
            torch.manual_seed(hash((config.seed, step)))  # a resumed run draws the same numbers
            # Learning rate: half a cosine, down to 0
            rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
            for group in (*adam_G.param_groups, *adam_D.param_groups):
                group["lr"] = rate * group["pace"]
            # Batch: real pictures, and as many fakes
            real = images[batch_rows(config, step, len(images), device)].float() / 127.5 - 1
            fake = G(torch.randn(len(real), G.latent_dim, device=device))
            # Discriminator: loss, gradient (detach: none for G), clipped, and update
            D.requires_grad_(True)
            loss_D = discriminator_loss(D(real), D(fake.detach()))
            penalty = 8 * config.r1 * r1_penalty(D, real) if step % 8 == 0 else 0
            adam_D.zero_grad()
            (loss_D + penalty).backward()
            norm_D = nn.utils.clip_grad_norm_(D.parameters(), max_norm=100)
            adam_D.step()
            # Generator: loss, gradient (through D, but none for D), clipped, and update
            D.requires_grad_(False)
            loss_G = generator_loss(D(fake))
            adam_G.zero_grad()
            loss_G.backward()
            norm_G = nn.utils.clip_grad_norm_(G.parameters(), max_norm=100)
            adam_G.step()
            update_average(average, G, step)
            run.log(loss_D=loss_D, loss_G=loss_G, norm_D=norm_D, norm_G=norm_G)
        draw_training(run, average, frames, data.train)
        run.finish(judge(average, data.test))
    report(run, average)
    return average


# ==== 7. Sampling =================================================================================
@torch.no_grad()
def sample(model, n, truncation=1.0, seed=None):
    """n new pictures, (n, C, H, W) in [0, 1]. Truncation below 1 moves StyleGAN's styles towards
    their mean (Karras et al. 2018, appendix B): likelier pictures, but less varied. The same seed
    gives the same pictures; None draws from torch's global generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    z = torch.randn(n, model.latent_dim, generator=generator).to(next(model.parameters()).device)
    return torch.cat([model(part, truncation) for part in z.split(100)]) / 2 + 0.5


# ==== 8. Judging, on held-out pictures ============================================================
def two_sample_accuracy(real, fake, steps=300):
    """An independent discriminator learns to tell pictures (N, C, H, W) in [-1, 1] from as many
    fakes, on one half of each -> its share of right answers on the other half: 0.5 if they look
    alike, 1 if they are easily told apart (Lopez-Paz, Oquab 2016, arXiv:1610.06545)."""
    half = len(real) // 2
    D = Discriminator(*real.shape[1:3], width=16)
    optimizer = torch.optim.Adam(D.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(half, (32,))
        loss = discriminator_loss(D(real[rows]), D(fake[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = torch.cat([D(real[half:]) > 0, D(fake[half:]) < 0])
    return right.float().mean().item()


def judge(model, test):
    """On 2,000 held-out pictures or fewer, and as many samples: the accuracy above; and variety,
    the median distance from a sample to the nearest other one, over that to the nearest real
    picture. Near 1 is good, near 0 a mode collapse: samples repeat each other."""
    torch.manual_seed(0)  # so that figures can be compared
    real = test[torch.arange(max(4, min(2000, len(test)))) % len(test)].float() / 127.5 - 1
    fake = sample(model, len(real), seed=0).cpu() * 2 - 1
    x, y = fake.flatten(1), real.flatten(1)
    apart = torch.cdist(x, x).fill_diagonal_(math.inf).amin(1).median()
    variety = (apart / torch.cdist(x, y).amin(1).median()).item()
    if variety < 0.5:
        warn(f"warning: mode collapse (variety {variety:.2f}): try a larger --r1")
    return {"two_samples": two_sample_accuracy(real, fake, min(300, len(real))),
            "variety": variety}


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status."""
    return exit_status(train, argv)


# ==== Utilities ===================================================================================
NAME = "gan"
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


def draw_samples(run, model, frames):
    """samples.png, and one more of the frames that show what becomes of the same z."""
    images = sample(model, run.config.samples, run.config.truncation, run.config.seed)
    run.write("samples.png", png(grid(images, 10)))
    frames.append(grid(sample(model, 24, seed=0), 8))


def draw_training(run, model, frames, train):
    """training.png, an animation: what became of the same z. neighbours.png: twenty samples, below
    each the training picture that is nearest to it."""
    frames.append(grid(sample(model, 24, seed=0), 8))
    run.write("training.png", png(frames[-1], *frames))
    images = sample(model, 20, run.config.truncation, run.config.seed).cpu()
    distance = torch.cat([torch.cdist(images.flatten(1), some.flatten(1) / 255)
                          for some in train.split(5000)], dim=1)                     # (20, N)
    pairs = torch.stack([images, train[distance.argmin(1)] / 255]).unflatten(1, (2, 10))
    run.write("neighbours.png", png(grid(pairs.transpose(0, 1).flatten(0, 2), 10)))


@torch.no_grad()
def draw_styles(run, model):
    """interpolation.png: from one z to another. For StyleGAN also mixing.png, coarse styles of the
    left column with fine ones of the top row, and truncation.png, from the average to samples."""
    generator = torch.Generator().manual_seed(run.config.seed)
    z = torch.randn(8, model.latent_dim, generator=generator).to(next(model.parameters()).device)
    share = torch.linspace(0, 1, 10, device=z.device)[:, None]
    walks = z[:4, None].lerp(z[4:, None], share).flatten(0, 1)                       # (40, L)
    run.write("interpolation.png", png(grid(model(walks) / 2 + 0.5, 10)))
    if isinstance(model, StyleGAN):
        left, top = model.styles(z).split(4, dim=1)                             # (layers, 4, L)
        half, mean = len(left) // 2, model.mean_style()
        mixed = [mean.expand(len(left), 1, -1), top]
        for w in left.split(1, dim=1):
            mixed += [w, torch.cat([w[:half].expand(-1, 4, -1), top[half:]])]
        run.write("mixing.png", png(grid(model.render(torch.cat(mixed, 1)) / 2 + 0.5, 5)))
        tamed = [mean.lerp(w, share) for w in left.split(1, dim=1)]
        run.write("truncation.png", png(grid(model.render(torch.cat(tamed, 1)) / 2 + 0.5, 10)))


def report(run, model):
    """What a finished run does each time: draw, export, print the figures."""
    draw_samples(run, model, [])
    draw_styles(run, model)
    for i in tqdm(range(run.config.export), "export", leave=False, delay=2):
        image = sample(model, 1, run.config.truncation, hash((run.config.seed, i)))[0].cpu()
        content = png((image * 255).round().byte().permute(1, 2, 0))
        write_file(Path(run.config.out, "export", f"{i:06}.png"), content)
    print(f"{run.config.out}, on held-out data: {run.figures}")


def new_networks(config, device):
    """Generator, discriminator, and what becomes the average of the generator."""
    shape, kind = image_shape(config), DCGAN if config.generator == "dcgan" else StyleGAN
    G = kind(*shape, config.width, config.latent_dim)
    networks = G, Discriminator(*shape, config.width), copy.deepcopy(G).eval()
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # faster
    return [network.to(device, memory_format=layout) for network in networks]


def load(path, device="cpu"):
    """The averaged generator of a checkpoint, in eval mode. UserError if it is none of gan.py's."""
    state = read_checkpoint(path)
    model = new_networks(Config(**state["config"]), torch.device(device))[2]
    model.load_state_dict(state["average"])
    return model


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
