# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "tqdm>=4.66", "pillow>=10"]
# ///
# SPDX-License-Identifier: MIT
r"""The adversarial network: a forger and a detective, and what becomes of their duel.

    z ~ N(0, I) --> Generator, the forger --> a fake ----\
                                                          --> Discriminator, the detective --> real?
                         a picture of the data set ------/

The forger never sees a real picture. All it learns, it learns from the detective, whose network
it asks: which way must my pixels change for you to believe me? The detective in turn learns from
every new forgery. If the forger wins, the detective can only toss a coin.

    python gan.py                                          on digits that this script draws itself
    python gan.py --generator dcgan                        the forger of 2015, without styles
    python gan.py --truncation 0.7                         once trained: tamer samples
    python gan.py --export 10000                           once trained: 10,000 numbered PNG files
    python gan.py --data mnist                             MNIST (downloaded once)
    python gan.py --data photographs/ --image-size 64 --learning-rate 1e-3 --r1 5       in colour
    python gan.py --data mnist --width 64 --batch-size 64 --steps 50000 --out out/gan-gpu   on a GPU

Look in out/gan: samples.png, training.png (an animation: the same z from the first step to the
last), interpolation.png, mixing.png and truncation.png (stylegan only), neighbours.png (twenty
samples, each above the training picture nearest to it), metrics.csv, checkpoint.pt. Run the
same command again and it goes on where it stopped; settings not given come from the checkpoint;
on a finished model it only samples (--seed 1: other samples).

On two cores of an AMD EPYC the plain command trains for 44 s (Zen 5) to 194 s (Zen 3). On MNIST
16,000 steps of dcgan take 135 s (Zen 5) and reach a fid, a distance from real pictures (README), of
2.6 to 2.9; 10,000 steps of stylegan with --latent-dim 64 take 120 s and reach 2.9 to 4.1.

Papers: Goodfellow et al. 2014 (arXiv:1406.2661), the duel; Radford, Metz, Chintala 2015
(arXiv:1511.06434), DCGAN; Karras, Laine, Aila 2018 (arXiv:1812.04948), StyleGAN; Karras et al. 2019
(arXiv:1912.04958), StyleGAN2; Mescheder, Geiger, Nowozin 2018 (arXiv:1801.04406), the R1 penalty;
Lopez-Paz, Oquab 2016 (arXiv:1610.06545), the judge. The networks here are small.
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
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# What no chapter defines is defined below the last one.


def knob(default, about, *within):
    """A setting: its default, its meaning, and its choices or its lowest and highest value."""
    return field(default=default, metadata={"about": about, "within": within})


@dataclass
class Config:
    """Every setting, model first; the command line is made from it."""
    generator: str = knob("stylegan", "stylegan, built on styles, or dcgan", "stylegan", "dcgan")
    latent_dim: int = knob(16, "numbers in z, and in w; 64 for long runs of stylegan", 2, 512)
    width: int = knob(16, "channels at half the picture's size; a multiple of 8", 8, 512)
    image_size: int = knob(0, "28, or a power of two from 16; 0: 28, colour data 32", 0, 1024)
    channels: int = knob(0, "1: grey, 3: colour, 0: as the data", 0, 3)
    r1: float = knob(1.0, "weight of the penalty on the detective's slopes", 0, 1e4)
    r1_every: int = knob(8, "steps between penalties, each scaled up to match", 1, 1000)
    mixing: float = knob(0.5, "share of stylegan's fakes that mix two styles", 0, 1)
    truncation: float = knob(1.0, "for stylegan: below 1, closer to the average picture", 0, 2)
    steps: int = knob(4000, "steps in all, each an update of both", 1, 10**8)
    batch_size: int = knob(16, "pictures a step, and as many fakes; a multiple of 4", 4, 2**16)
    learning_rate: float = knob(2e-3, "for both; lower it if training diverges", 0, 1)
    export: int = knob(0, "write this many samples to export/, as PNG files", 0, 10**6)
    test_images: int = knob(2000, "held-out pictures to judge on", 10, 10**6)
    samples: int = knob(100, "pictures in samples.png", 1, 10**4)
    data: str = knob("digits", "digits (drawn here), mnist, fashion, cifar10, a folder of IDX "
                     "files, or a folder or .zip of photographs")
    data_dir: str = knob("data", "where downloads are kept")
    seed: int = knob(0, "for the run; once it is finished, for the samples only", 0, 2**31)
    device: str = knob("auto", "auto: cuda, else mps, else cpu", "auto", "cpu", "cuda", "mps")
    out: str = knob("", "folder of the results; if empty, out/gan, or out/gan-dcgan-mnist, say")
    restart: bool = knob(False, "throw away the checkpoint in --out and begin afresh")

    def __post_init__(self):
        check_config(self)
        settle_shape(self, 1)
        for name, unit in (("width", 8), ("batch_size", 4)):
            if getattr(self, name) % unit:
                fail(f"{flag(name)} {getattr(self, name)} must be a multiple of {unit}")
        if self.image_size not in (28, *(2**k for k in range(4, 11))):
            fail(f"--image-size {self.image_size} must be 28, or a power of two from 16 on")


# ==== 1. The pictures =============================================================================
# load_images (block `images`, below) holds them all in memory as bytes. B is the batch; C, H, W are
# the channels, height and width of a picture: 1, 28, 28, or in colour 3, 32, 32. L is latent_dim.


def scaled(pictures):
    """Bytes 0 to 255 -> floats -1 to 1."""
    return pictures.float() / 127.5 - 1


def levels(config):
    """Resolution and channels of each level, coarse to fine: (7, 2 width), (14, width) for 28x28.
    The finest level has half of the picture's resolution: each 2x2 block of pixels becomes
    one with four times the channels. Nothing is lost, and no convolution runs at 28x28, where it
    would cost four times as much. Larger pictures have more levels, and that is all that changes
    here; their detail asks for more --width and --steps, and an --r1 that grows with their pixels.
    """
    sizes = [config.image_size // 2]
    while sizes[-1] % 2 == 0 and sizes[-1] > 4:
        sizes.append(sizes[-1] // 2)
    return [(size, min(512, config.width << k)) for k, size in enumerate(sizes)][::-1]


def conv(inside, outside):
    """A 3x3 convolution, zero padded: (B, in, H, W) -> (B, out, H, W)."""
    return nn.Conv2d(inside, outside, kernel_size=3, padding=1)


# ==== 2. The forger of 2015: DCGAN ================================================================
# Radford, Metz and Chintala found, among many that fail, a pair of networks that trains. What they
# did, and what stands here instead (what each change brought is in the README):
#
# - no pooling: the networks learn how to shrink and to grow pictures. There by strided
#   convolutions, here by folding 2x2 pixels into channels and back;
# - batch normalisation keeps signals and gradients at one size from layer to layer, and fakes apart
#   from each other. But it makes a picture depend on its neighbours in the batch, and needs other
#   statistics afterwards. Here the forger normalises each picture by itself (GroupNorm), and the
#   detective not at all: R1, below, tames it;
# - ReLU in the forger, leaky ReLU in the detective: the forger's gradient passes through all of the
#   detective, and a plain ReLU would let none pass where it is off;
# - tanh at the end of the forger: real pixels have bounds, and fakes must not give themselves away
#   by having none;
# - z had 100 numbers there, here 16; weights came from N(0, 0.02^2), here they start from PyTorch's
#   defaults.


class DCGAN(nn.Module):
    """The forger: z (B, L) -> pictures (B, C, H, W) in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        self.config, self.chance = config, [(config.latent_dim,)]
        (size, width), *finer = levels(config)

        def block(inside, outside):
            return [nn.GroupNorm(8, inside), nn.ReLU(), conv(inside, outside)]

        self.first = nn.Sequential(nn.Linear(config.latent_dim, width * size * size),
                                   nn.Unflatten(1, (width, size, size)))
        layers = block(width, width)
        for _, narrower in finer:  # PixelShuffle: twice the height and width
            layers += [*block(width, 4 * narrower), nn.PixelShuffle(2), *block(narrower, narrower)]
            width = narrower
        self.layers = nn.Sequential(*layers, *block(width, 4 * config.channels),
                                    nn.PixelShuffle(2), nn.Tanh())

    def forward(self, z, truncation=1.0):
        # channels_last: the same numbers, in an order in memory that convolutions are faster with
        x = self.first(truncation * z).contiguous(memory_format=torch.channels_last)
        return self.layers(x)


# ==== 3. The forger of 2018: StyleGAN =============================================================
# In DCGAN z enters once, at the start, and each level has to pass on what the next ones need.
# StyleGAN turns this around: the picture grows from a learned constant, the same for all. The
# mapping network turns z into a style w, and w tells every layer how strongly each feature counts.


class StyledConv(nn.Module):
    """A convolution; w scales its input channels: (B, in, H, W), (B, L) -> (B, out, H, W).
    StyleGAN2 scales the weights, anew for each picture. Scaling the incoming activations by s
    is the same and cheaper (section 2.2 there: conv(s x, W) = conv(x, s W)). Demodulation divides
    each output channel by the length of its scaled weights, sqrt(sum of (s W)^2): for independent
    inputs of unit variance the output has unit variance again (equation 3)."""

    def __init__(self, inside, outside, latent_dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside, 3, 3) / math.sqrt(9 * inside))
        self.style = nn.Linear(latent_dim, inside)
        nn.init.normal_(self.style.weight, std=1 / math.sqrt(latent_dim))
        nn.init.ones_(self.style.bias)
        self.bias = nn.Parameter(torch.zeros(outside))

    def forward(self, x, w, demodulate=True):
        s = self.style(w)                                                            # (B, in)
        x = F.conv2d(x * s[:, :, None, None], self.weight, padding=1)
        if demodulate:
            square = s.square() @ self.weight.square().sum((2, 3)).T                 # (B, out)
            x = x * (square + 1e-8).rsqrt()[:, :, None, None]
        return x + self.bias[:, None, None]


class StyleGAN(nn.Module):
    """z (B, L), and noise for chance details (see draw) -> pictures (B, C, H, W) in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        L, sizes, layers = config.latent_dim, levels(config), []
        self.config = config
        self.chance = [(L,)] + [(1, size, size) for size, _ in sizes for _ in range(2)]
        for _ in range(4):
            layers += [nn.Linear(L, L), nn.LeakyReLU(0.2)]
            nn.init.kaiming_normal_(layers[-2].weight, a=0.2)  # or z would hardly count in w
            nn.init.zeros_(layers[-2].bias)
        self.mapping = nn.Sequential(*layers)
        size, before = sizes[0]
        self.constant = nn.Parameter(torch.randn(1, before, size, size))
        self.convs = nn.ModuleList()  # two a level; the first of each finer one doubles the size
        for i, (_, width) in enumerate(sizes):
            self.convs += [StyledConv(before, 4 * width if i else width, L),
                           StyledConv(width, width, L)]
            before = width
        # How loud the noise is in each channel: not at all, at first.
        self.strength = nn.ParameterList(torch.zeros(c) for _, c in sizes for _ in range(2))
        self.paint = StyledConv(before, 4 * config.channels, L)

    def styles(self, z):
        """z (B, L), brought to unit mean square -> w, the same for all layers, (layers, B, L)."""
        w = self.mapping(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        return w.expand(len(self.convs) + 1, *w.shape)

    def mean_style(self):
        """The mean of w, of 1000 fixed draws: the average picture's style, (1, 1, L)."""
        z = torch.randn(1000, self.config.latent_dim, generator=seeded("mean style"))
        return self.styles(z.to(self.constant.device))[:1].mean(1, keepdim=True)

    def render(self, styles, noise):
        """styles (layers, B, L), noise as drawn -> pictures. The sqrt(2) gives back what leaky ReLU
        takes from the mean square; the last layer, which paints, is not demodulated (StyleGAN2)."""
        x = self.constant.expand(styles.shape[1], -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)
        for i, (layer, w) in enumerate(zip(self.convs, styles, strict=False)):
            x = layer(x, w)
            x = F.pixel_shuffle(x, 2) if i % 2 == 0 and i > 0 else x
            x = F.leaky_relu(x + self.strength[i][:, None, None] * noise[i], 0.2) * math.sqrt(2)
        return F.pixel_shuffle(self.paint(x, styles[-1], demodulate=False), 2).tanh()

    def forward(self, z, *noise, truncation=1.0):
        styles = self.styles(z)
        if truncation != 1:  # towards the mean: likelier pictures, fewer kinds of them
            styles = self.mean_style().lerp(styles, truncation)
        return self.render(styles, noise)


FORGERS = {"dcgan": DCGAN, "stylegan": StyleGAN}


def draw(model, n, rng=None):
    """All that chance decides in n pictures, as a list: z (n, L); for stylegan also noise (n, 1, h,
    w) for each layer but the last: where a hair lies, not whether there is hair."""
    device = next(model.parameters()).device
    return [torch.randn(n, *shape, generator=rng).to(device) for shape in model.chance]


# ==== 4. The detective ============================================================================
class Discriminator(nn.Module):
    """Pictures (B, C, H, W) -> logits (B,): above 0 it says real, below fake. It is also told how
    much the pictures in each group of four differ (Karras et al. 2017, arXiv:1710.10196,
    section 3): a forger that paints one picture again and again gives itself away. If four does not
    divide the batch, it is told nothing."""

    def __init__(self, config):
        super().__init__()
        layers, before = [], config.channels
        for _, width in levels(config)[::-1]:
            layers += [nn.PixelUnshuffle(2), conv(4 * before, width), nn.LeakyReLU(0.2),
                       conv(width, width), nn.LeakyReLU(0.2)]            # half the height and width
            before = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(conv(before + 1, before), nn.LeakyReLU(0.2), nn.Flatten(),
                                  nn.Linear(before * levels(config)[0][0]**2, 1))

    def forward(self, x):
        x = self.body(x.contiguous(memory_format=torch.channels_last))             # (B, c, h, w)
        group = 4 if len(x) % 4 == 0 else 1
        y = x.permute(0, 2, 3, 1).reshape(len(x) // group, group, -1)  # (B / 4, 4, h w c)
        spread = ((y - y.mean(1, keepdim=True)).square().mean(1) + 1e-8).sqrt().mean(1)
        spread = spread.repeat_interleave(group)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        return self.head(torch.cat([x, spread], 1)).flatten()


# ==== 5. The duel =================================================================================
# The detective D wants log D(x) + log(1 - D(G(z))) high, the forger G wants it low: the minimax
# game of Goodfellow et al. 2014 (equation 1). With D the sigmoid of a logit, log D = -softplus of
# minus the logit: finite for any logit, where the log of a sigmoid that has become 0 would not be.


def detective_loss(real, fake):
    """Logits (B,) and (B,) -> how wrong it was on both, nats."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def forger_loss(fake):
    """-log D(G(z)) instead of log(1 - D(G(z))). Both fall as the detective is fooled, but while it
    is not (sigmoid near 0), the slope of the second by the logit is near 0, too: a forger caught
    every time would learn nothing. The slope of the first is near -1 (section 3 there)."""
    return F.softplus(-fake).mean()


def r1_penalty(discriminator, real):
    """Mean over real pictures of the squared gradient of the summed logits by the pixels, halved
    (Mescheder et al. 2018, equation 9). Without it D pushes on even once fakes look right."""
    real = real.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return 0.5 * slope.square().sum((1, 2, 3)).mean()


def detective_turn(discriminator, optimizer, real, fake, r1=0.0):
    """The gradient for a step of the detective, on pictures (B, C, H, W) of both kinds; ``r1`` is
    the weight of the penalty in this step -> its figures. To it, fakes are just pictures: detach
    cuts the path back to the forger, whose turn comes next."""
    discriminator.requires_grad_(True)
    loss = detective_loss(discriminator(real), discriminator(fake.detach()))
    penalty = r1_penalty(discriminator, real) if r1 else 0
    optimizer.zero_grad()
    (loss + r1 * penalty).backward()
    return {"detective_loss": loss} | ({"r1": penalty} if r1 else {})


def forger_turn(discriminator, optimizer, fake):
    """The gradient for a step of the forger, on its ``fake``, not detached -> its figures. It comes
    through the detective, whose weights stand still and get none."""
    discriminator.requires_grad_(False)
    loss = forger_loss(discriminator(fake))
    optimizer.zero_grad()
    loss.backward()
    return {"forger_loss": loss}


def forge(generator, n, mixing=0.0):
    """n fresh fakes; of stylegan's, a share ``mixing`` has one style up to a layer drawn at random
    and another from there on, so that layers learn not to rely on each other's styles (Karras et
    al. 2018, section 3.1)."""
    z, *noise = draw(generator, n)
    if generator.config.generator == "dcgan":
        return generator(z)
    a, b = generator.styles(z), generator.styles(draw(generator, n)[0])
    layer = torch.arange(len(a))[:, None]                                         # (layers, 1)
    # Where the second style begins, (n,); past the last layer in fakes that have only one.
    cut = torch.randint(1, len(a), (n,)) + len(a) * (torch.rand(n) >= mixing)
    return generator.render(torch.where((layer < cut)[:, :, None].to(z.device), a, b), noise)


# ==== 6. Training =================================================================================
def schedule(progress):
    """Share of the full learning rate at ``progress`` 0 to 1: all of it for three tenths of the
    way, then half a cosine down to 0. At the full rate to the end, dcgan's duel goes astray:
    on MNIST its fid is 7.1 after 4,000 steps, and 13 after 16,000."""
    return 0.5 + 0.5 * math.cos(math.pi * max(0.0, (progress - 0.3) / 0.7))


def adam(net):
    """Adam without momentum, since what is right changes with every step of the other player. All
    styles depend on w, so the mapping network learns at a tenth of the pace (Karras et al. 2018,
    appendix C: at a hundredth). That turned fid 15.0 into 5.2."""
    slow = [p for name, p in net.named_parameters() if name.startswith("mapping.")]
    rest = [p for name, p in net.named_parameters() if not name.startswith("mapping.")]
    groups = [{"params": rest, "pace": 1.0}, {"params": slow, "pace": 0.1}]
    return torch.optim.Adam(groups, betas=(0.0, 0.99), fused=True)


def averaged(model):
    """A running mean of the forger's weights; it reaches back over a ninth of the steps so far, 500
    at most. The two players chase each other in circles, and the middle of a circle is better than
    any point on it (Yazici et al. 2018, arXiv:1806.04498): at the full rate fid 7.1 against 14.3
    for the last weights; once the rate has come down, they are equal."""
    def follow(averages, weights, count):
        decay = min(0.998, (1 + count) / (10 + count))
        get_ema_multi_avg_fn(decay)(averages, weights, count)
    return AveragedModel(model, multi_avg_fn=follow)


def train(config):
    """Train what is left, judge, draw, into ``config.out`` -> the averaged forger, in eval mode.
    Raises UserError, FloatingPointError (it diverged), KeyboardInterrupt (stopped: call again)."""
    device = pick_device(config.device)
    torch.manual_seed(seed_of(config.seed, "weights"))
    G = FORGERS[config.generator](config).to(device, memory_format=torch.channels_last)
    D = Discriminator(config).to(device, memory_format=torch.channels_last)
    ema = averaged(G)
    optimizer_g, optimizer_d = adam(G), adam(D)
    run = Run(config, model=G, discriminator=D, average=ema,
              optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    if not run.finished:
        data = load_images(config.data, config.data_dir, config.image_size, config.channels)
        run.same_data(data.train, data.test)
        if len(data.test) < 4:
            fail(f"{config.data}: at least four held-out pictures are needed to judge on")
        for step in run.steps():
            if step == 0 or run.due(20):
                run.film(sample(ema.module, 24, seed="film"))
            rate = config.learning_rate * schedule(step / config.steps)
            for group in (*optimizer_g.param_groups, *optimizer_d.param_groups):
                group["lr"] = rate * group["pace"]
            real = scaled(data.train[run.batch_rows(len(data.train))].to(device))
            fake = forge(G, len(real), config.mixing)                          # both (B, C, H, W)
            r1 = config.r1 * config.r1_every if step % config.r1_every == 0 else 0
            # Measured, not clipped: log stops the run, before the step, if a figure is not finite.
            run.log(**detective_turn(D, optimizer_d, real, fake, r1),
                    detective_grad=clip_grad_norm_(D.parameters(), math.inf))
            optimizer_d.step()
            run.log(**forger_turn(D, optimizer_g, fake),
                    forger_grad=clip_grad_norm_(G.parameters(), math.inf))
            optimizer_g.step()
            ema.update_parameters(G)
            if run.due(5):  # now and then, to see how it is getting on
                draw_samples(run, ema.module)
                run.log(**duel_score(ema.module, D, data.test[:1000]))
        draw_training(run, ema.module)
        draw_neighbours(run, ema.module, data.train)
        run.finish(judge(ema.module, D, data.test))
    draw_samples(run, ema.module)
    draw_strips(run, ema.module)
    export(run, ema.module)
    run.report()
    return ema.module.eval()


# ==== 7. Sampling =================================================================================
def sample(model, n, truncation=1.0, seed=None):
    """n new pictures -> floats (n, C, H, W) in [0, 1]. truncation multiplies stylegan's w, seen
    from its mean: below 1 it keeps to what it paints best (Karras et al. 2018, appendix B). It
    multiplies dcgan's z, to little effect: a norm comes next. The same seed gives the same
    pictures; None draws from torch's global generator."""
    drawn = draw(model, n, None if seed is None else seeded(seed, "sample"))
    with evaluating(model):
        parts = [model(*part, truncation=truncation)
                 for part in zip(*(x.split(250) for x in drawn), strict=True)]
    return torch.cat(parts) / 2 + 0.5


def load(path, device="cpu"):
    """The averaged forger of a checkpoint, in eval mode. UserError if it is not gan.py's."""
    state = read_checkpoint(path)
    config = Config(**state["config"])
    average = averaged(FORGERS[config.generator](config))
    with fitting(path):
        average.load_state_dict(state["average"])
    return average.module.to(device, memory_format=torch.channels_last).eval()


# ==== 8. Judging, on pictures that neither has seen ===============================================
def duel_score(model, D, test):
    """How often the detective is right, on held-out real pictures and on fakes: one half
    on each is the forger's victory. And how varied the fakes are, with a warning of a collapse."""
    pictures = sample(model, len(test) // 4 * 4, seed="duel") * 2 - 1  # whole groups of four
    test = scaled(test[:len(pictures)].to(pictures.device))
    with evaluating(D):
        real, fake = (torch.cat([D(some) for some in x.split(200)]) for x in (test, pictures))
    figures = {"right_on_real": (real > 0).float().mean().item(),
               "right_on_fake": (fake < 0).float().mean().item(),
               "variety": variety(pictures, test)}
    if figures["variety"] < 0.5:
        print(f"\n{NAME}.py: samples repeat each other (variety {figures['variety']:.2f}, real "
              "pictures 1): mode collapse, unless it has hardly begun to learn; try a larger --r1",
              file=sys.stderr)
    return figures


def variety(pictures, like):
    """The median distance of a picture to its nearest among the rest (the second nearest, after
    itself), over the same for real ones. Near 1 is good; towards 0, collapse to a few pictures."""
    nearest, usual = (torch.cdist(x, x).topk(2, largest=False).values[:, 1].median()
                      for x in (pictures.flatten(1), like.flatten(1)))
    return (nearest / usual.clamp(min=1e-6)).item()


def two_sample_accuracy(a, b, steps=300):
    """A judge who was not there: a fresh small network learns to tell pictures a from b, (N, C, H,
    W) in [-1, 1] each, on one half of them -> its share of right answers on the other half. One
    half: they look alike; 1: easily told apart (Lopez-Paz and Oquab 2016). On the CPU, since not
    every other device can pool 7x7 into 4x4."""
    a, b, half = a.cpu(), b.cpu(), len(a) // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, "two samples"))
        net = nn.Sequential(
            nn.PixelUnshuffle(2), conv(4 * a.shape[1], 32), nn.LeakyReLU(0.2),
            nn.PixelUnshuffle(2), conv(128, 64), nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(4),
            nn.Flatten(), nn.Linear(1024, 1)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(steps):
            i, j = torch.randint(half, (2, 32))
            loss = detective_loss(net(a[i]), net(b[j]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = [sign * net(some) > 0 for x, sign in ((a[half:], 1), (b[half:], -1))
                 for some in x.split(250)]
    return torch.cat(right).float().mean().item()


def judge(model, D, test):
    """The final figures, on the first ``test_images`` held-out pictures."""
    test = test[:model.config.test_images]
    fake = sample(model, len(test), seed="judge") * 2 - 1
    two = two_sample_accuracy(scaled(test), fake, min(300, len(test)))  # or few are learnt by heart
    figures = duel_score(model, D, test) | {"two_samples": two}
    return {f"test_{name}": value for name, value in figures.items()}


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status (see launch)."""
    return launch(argv, train)


# ==== Plumbing: blocks that stand, equal to the letter, in several files of this collection =======
# (What this script alone has comes last.) They ask of this file its name, the settings that are
# fixed once training has begun, and those on whose change a trained model is judged again.
NAME = "gan"
FIXED = ("generator", "latent_dim", "width", "image_size", "channels", "r1", "r1_every", "mixing",
         "data", "batch_size", "seed")
JUDGING = ("test_images",)


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
    images = sample(model, run.config.samples, run.config.truncation, run.config.seed)
    run.write("samples.png", png(grid(images, 10)))


def draw_training(run, model):
    """training.png: the same z from first step to last; the still image is what they became."""
    frames = [frame / 255 for frame in run.frames] + [sample(model, 24, seed="film")]
    sheets = [grid(frame, 8) for frame in frames]
    run.write("training.png", png(sheets[-1], sheets + 3 * sheets[-1:], milliseconds=200))


def draw_strips(run, model, columns=10, rows=4):
    """interpolation.png: from z to z, along an arc of about their length; for stylegan, too,
    mixing.png (coarse styles of the left column, fine ones of the top row) and truncation.png."""
    z, *noise = draw(model, 2 * rows, seeded(run.config.seed, "strips"))
    noise = [x[:1] for x in noise]  # the same for all
    way = torch.linspace(0, 1, columns, device=z.device)[:, None]
    turn = 0.5 * math.pi * way

    def write(name, pictures, columns):
        run.write(name, png(grid(pictures / 2 + 0.5, columns)))

    with evaluating(model):
        arcs = [turn.cos() * a + turn.sin() * b for a, b in z.split(2)]
        write("interpolation.png", model(torch.cat(arcs), *noise), columns)
        if run.config.generator == "dcgan":
            return
        left, top = model.styles(z).split(rows, 1)                       # (layers, rows, L) each
        fine, sheet = torch.arange(len(left), device=z.device) >= len(left) // 2, [top]
        for w in left.split(1, 1):
            sheet += [w, torch.where(fine[:, None, None], top, w)]
        pictures = model.render(torch.cat(sheet, 1), noise)
        write("mixing.png", torch.cat([-torch.ones_like(pictures[:1]), pictures]), rows + 1)
        tamed = [model.mean_style().lerp(w, way) for w in left.split(1, 1)]
        write("truncation.png", model.render(torch.cat(tamed, 1), noise), columns)


def draw_neighbours(run, model, train, columns=10):
    """neighbours.png: twenty samples, below each the training picture that is nearest to it, by
    squared differences of pixels. Is it remembering or making?"""
    images = sample(model, 2 * columns, run.config.truncation, run.config.seed).cpu()
    distance = torch.cat([torch.cdist(images.flatten(1), some.flatten(1) / 255)
                          for some in train.split(5000)], dim=1)               # (20, N)
    pairs = torch.stack([x.unflatten(0, (2, columns))
                         for x in (images, train[distance.argmin(1)] / 255)], 1)
    run.write("neighbours.png", png(grid(pairs.flatten(0, 2), columns)))


def export(run, model):
    """--export N: export/000000.png and so on, for the FID tools that people use."""
    config, folder = run.config, Path(run.config.out, "export")
    for first in tqdm(range(0, config.export, 1000), "export", disable=not config.export):
        n, seed = min(1000, config.export - first), (config.seed, first)
        for i, image in enumerate(sample(model, n, config.truncation, seed).cpu()):
            picture = (image * 255).round().byte().permute(1, 2, 0)
            write_file(folder / f"{first + i:06}.png", png(picture))
    for path in folder.glob("??????.png") if config.export else ():  # of a larger export before
        if path.stem.isdigit() and int(path.stem) >= config.export:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
