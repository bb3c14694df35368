# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "tqdm>=4.66", "pillow>=10"]
# ///
# SPDX-License-Identifier: MIT
"""The diffusion model: noise destroys a picture step by step; undo it, beginning with static.

    picture x_0 --> x_1 --> x_2 --> ... --> x_T static      q: each step adds noise; no network
    picture x_0 <-- x_1 <-- x_2 <-- ... <-- x_T static      p: each step goes a little of the way
                                                               to what a U-Net guesses x_0 to be
    "a thin upright three" --> one vector --> into every residual block of the U-Net

Making a picture in one stroke is hard. Making a noisy picture a little less noisy is a humble
skill, and any picture, noised, is a lesson in it with the answer attached. Applied again and again
to pure static, it brings out a picture that never was. Words steer it: what the prompt changes in
the network's opinion is multiplied by the guidance.

    python ddpm.py                                         on digits that this script draws itself
    python ddpm.py --prompt "a bold slanted seven"         once trained: draw this
    python ddpm.py --sampling-steps 1000 --eta 1           all steps, with noise, as in Ho et al.
    python ddpm.py --data mnist                            MNIST (downloaded once)
    python ddpm.py --data cifar10 --prompt "a horse"       in colour; --data FOLDER: photographs
    python ddpm.py --data mnist --width 128 --batch-size 256 --steps 50000 --out out/ddpm-gpu   GPU
    torchrun --nproc-per-node=N ddpm.py ...                the same on N of them

Look in out/ddpm: forward.png (the destruction), samples.png (its rows rise in guidance),
denoising.png (an animation), neighbours.png (each sample above the training picture nearest to it),
metrics.csv, checkpoint.pt. Run the same command again and it goes on where it stopped; settings not
given come from the checkpoint; on a finished model it only samples (--seed 1: other samples).
On two cores of an AMD EPYC the plain command takes 78 s (Zen 5) to 261 (Zen 3). On MNIST ten
minutes (Zen 5) reach a Frechet distance of 1.3 to the test pictures at guidance 1.5 (README).

Papers: Sohl-Dickstein et al. 2015 (arXiv:1503.03585), the idea; Ho, Jain, Abbeel 2020
(arXiv:2006.11239), DDPM; Song, Meng, Ermon 2020 (arXiv:2010.02502), DDIM; Nichol, Dhariwal 2021
(arXiv:2102.09672), the cosine schedule; Karras et al. 2022 (arXiv:2206.00364), x_t as a first
guess; Hang et al. 2023 (arXiv:2303.09556), how much each lesson counts; Ho, Salimans 2022
(arXiv:2207.12598), guidance. The U-Net is small, and works on pixels folded two by two.
"""
import math
import re
import sys
import warnings
from dataclasses import dataclass, field

from tqdm import tqdm

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # nothing here needs it
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# What no chapter defines is defined below the last one.


def knob(default, about, *within):
    """A setting: its default, its meaning, and its choices or its lowest and highest value."""
    return field(default=default, metadata={"about": about, "within": within})


@dataclass
class Config:
    """Every setting, model first; the command line is made from it."""
    diffusion_steps: int = knob(1000, "T, steps from a picture to static", 2, 10**5)
    width: int = knob(32, "channels at half the size, thrice at a quarter; multiple of 8", 8, 1024)
    blocks: int = knob(2, "residual blocks at a quarter, attention after each", 1, 100)
    image_size: int = knob(0, "height and width, in steps of 4; 0: 28, colour data 32", 0, 1024)
    channels: int = knob(0, "1: grey, 3: colour, 0: as the data", 0, 3)
    vocab_size: int = knob(256, "words that captions may use, and one more", 2, 2**16)
    drop_caption: float = knob(0.1, "share of pictures shown without caption, for guidance", 0, 1)
    unseen: str = knob("thin upright two, bold upright four, thin slanted nine, bold slanted seven",
                       "kinds kept out of training, to see whether words combine; comma-separated")
    steps: int = knob(2000, "optimiser steps in total", 1, 10**8)
    batch_size: int = knob(32, "pictures a step, over all processes", 1, 2**16)
    learning_rate: float = knob(4e-3, "peak of its schedule; lower it if training diverges", 0, 1)
    prompt: tuple = knob((), "what to draw; may be given several times; if not given, some kinds")
    guidance: float = knob(2.0, "0: no prompt, 1: as trained, more: closer to the prompt", 0, 100)
    sampling_steps: int = knob(25, "steps from static to picture; T at most", 1, 10**5)
    eta: float = knob(0.0, "share of fresh noise in each step: 0 DDIM, 1 DDPM", 0, 1)
    test_images: int = knob(1000, "held-out pictures to judge on", 1, 10**6)
    samples: int = knob(100, "pictures in samples.png", 1, 10**4)
    data: str = knob("digits", "digits (drawn here), mnist, fashion, cifar10, a folder of IDX "
                     "files, or a folder or .zip of photographs")
    data_dir: str = knob("data", "where downloads are kept")
    seed: int = knob(0, "for the run; once it is finished, for the samples only", 0, 2**31)
    device: str = knob("auto", "auto: cuda, else mps, else cpu", "auto", "cpu", "cuda", "mps")
    out: str = knob("", "folder of the results; if empty, out/ddpm or out/ddpm-DATA")
    restart: bool = knob(False, "throw away the checkpoint in --out and begin afresh")

    def __post_init__(self):
        check_config(self)
        if self.width % 8:
            fail(f"--width {self.width} must be a multiple of 8")
        settle_shape(self, 4)


# ==== 1. Pictures and what is said of them ========================================================
# load_images (block `images`, below) holds all pictures in memory, as bytes, with a name for each
# kind. B is the batch; C, H, W are the channels, height and width of a picture: 1, 28, 28, or in
# colour 3, 32, 32; shapes beside the code are those of 28x28.


def captions(name):
    """Six things that may be said of a picture: "an ankle boot" six times; of a drawn digit all of
    it three times, then three shorter. (The article roughly goes by sound: "a one".)"""
    said = [name] * 6
    if parts := re.fullmatch(r"(thin|bold) (upright|slanted) (\w+)", name):
        weight, slant, digit = parts.groups()
        said[3:] = f"{weight} {digit}", f"{slant} {digit}", digit
    return [("an " if re.match("(?!one|uni|eu|use)[aeiou]", n) else "a ") + n for n in said]


def scaled(pictures):
    """Bytes 0 to 255 -> floats -1 to 1, about the size of the noise."""
    return pictures.float() / 127.5 - 1


# ==== 2. Destruction ==============================================================================
# A step of q shrinks the picture a little and adds a little noise (Ho et al. 2020, equation 2):
#
#   x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps,   eps ~ N(0, I)
#
# Sums of Gaussians are Gaussian: t steps are one (equation 4), with alpha_bar_t the product of all
# 1 - beta so far:
#
#   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
#
# so training can jump straight to any t. At T almost no signal must remain: sampling begins with
# pure static, so training must have seen that.


def cosine_schedule(steps):
    """alpha_bar_0 = 1, ..., alpha_bar_T near 0: (T + 1,), float64 (Nichol, Dhariwal, equation 17).
    It falls slowly at both ends, evenly between; with the linear beta of Ho et al. much of the
    chain is near static. The clamp keeps alpha_bar_T, by which we divide, above 0."""
    at = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((at + 0.008) / 1.008 * math.pi / 2)**2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def amounts(alpha_bar, t, like):
    """sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t) for t (B,), each (B, 1, 1, 1) beside ``like``."""
    a = alpha_bar[t.cpu()][:, None, None, None]
    return a.sqrt().to(like), (1 - a).sqrt().to(like)


def diffuse(alpha_bar, x0, t, eps):
    """x_t of q(x_t | x_0): x0 and eps (B, C, H, W), t (B,) from 0 to T -> (B, C, H, W)."""
    signal, noise = amounts(alpha_bar, t, x0)
    return signal * x0 + noise * eps


# What should the network predict? Ho et al. ask it for the noise, we for the picture; given x_t,
# each follows from the other. Near T a small error in the noise is a large one in the picture. For
# small t, on the other hand, x_t shows more of the picture than a network could repeat. So the
# guess starts from x_t, taking less of it the more noise there is (k as in Karras et al. 2022,
# table 1; there K is the data's deviation):
#
#   guess of x_0 = k x_t / sqrt(alpha_bar) + sqrt(1 - k) network(x_t),   k = K^2 / (K^2 + sigma^2)
#
# sigma^2 = (1 - alpha_bar) / alpha_bar being the noise in x_t / sqrt(alpha_bar). K is a level of
# noise you can hardly see. Where sigma is below K, x_t passes through; where it is far above,
# almost nothing of x_t does, else a haze would stay on black. Colour has little black, and more
# detail than a small network can repeat: K = 0.1 there gives 7.3 bits a value (chapter 6) and a
# little grain, 0.02 gives 16 (CIFAR-10, 700 steps).
K = {1: 0.02, 3: 0.1}  # by the number of channels


def signal_to_noise(alpha_bar, t):
    """alpha_bar_t / (1 - alpha_bar_t), for t (B,) from 1 to T -> (B,), float64."""
    return alpha_bar[t.cpu()] / (1 - alpha_bar[t.cpu()])


# ==== 3. The prompt, and the network that hears it ================================================
class PromptEncoder(nn.Module):
    """Prompts -> vectors (B, E): word and place of each word through an MLP, then their sum. The
    MLP comes before the sum, or order would be lost. Places are counted from the end: the noun is 0
    in "a seven" and "a bold seven" alike. The sum of no words, the empty prompt, is 0."""
    places = 8  # words further ahead share the last

    def __init__(self, vocab_size, size):
        super().__init__()
        self.word, self.place = nn.Embedding(vocab_size, size), nn.Embedding(self.places, size)
        self.learn([])
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))

    def learn(self, names):
        """From now on, know the words in the captions of these names."""
        texts = [text for name in names for text in captions(name)]
        self.names, self.words = names, sorted({word for text in texts for word in text.split()})
        if len(self.words) >= self.word.num_embeddings:
            fail(f"the captions use {len(self.words)} words: give a larger --vocab-size")

    def get_extra_state(self):
        return self.names  # so that they travel with the weights

    def set_extra_state(self, names):
        self.learn(names)

    def tokens(self, prompts):
        """list of str -> (B, words), 0 where there is none. UserError for an unknown word."""
        split = [prompt.lower().split() for prompt in prompts]
        unknown = [word for words in split for word in words if word not in self.words]
        if unknown:
            fail(f"no caption has the word {unknown[0]!r}; known are: {' '.join(self.words)}")
        length = max([1, *map(len, split)])
        rows = [[self.words.index(word) + 1 for word in words] for words in split]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows]).view(-1, length)

    def forward(self, tokens):
        there = tokens > 0
        place = there.flip(1).cumsum(1).flip(1) - 1  # how many words follow
        x = self.word(tokens) + self.place(place.clamp(0, self.places - 1))     # (B, words, E)
        return (self.mlp(x) * there[:, :, None]).sum(1)


def time_embedding(t, size, period=10000):
    """t (B,) -> (B, size): hands of many clocks, fast and slow (Vaswani et al. 2017, 3.5)."""
    speed = period ** -(torch.arange(size // 2, device=t.device) / (size // 2))
    angle = t[:, None] * speed
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Residual(nn.Module):
    """x + f(x, e): (B, in, H, W) and (B, E) -> (B, out, H, W). e, time plus prompt, scales and
    shifts the channels between two convolutions (Dhariwal, Nichol 2021, arXiv:2105.05233, section
    3). Ho et al. add it, which did worse here (README). The last layer starts at zero, so f does
    too. Where the number of channels changes, a 1x1 convolution adapts x."""

    def __init__(self, inside, outside, size):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside, affine=False)
        self.conv1 = nn.Conv2d(inside, outside, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, kernel_size=3, padding=1)
        self.modulate = nn.Linear(size, 2 * outside)
        self.skip = nn.Conv2d(inside, outside, kernel_size=1) if inside != outside else None
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, e):
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, dim=1)    # (B, out, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return h + (self.skip(x) if self.skip else x)


class Attention(nn.Module):
    """Every place looks at every other: (B, C, H, W) -> the same. At 7x7 that costs little."""

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(8, channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        h = self.norm(x).flatten(2).mT                                           # (B, H W, C)
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)   # (B, H W, C)
        return x + self.out(h).mT.unflatten(2, x.shape[2:])


class UNet(nn.Module):
    r"""x_t (B, C, H, W), t (B,), tokens (B, words) -> a guess of x_0 (B, C, H, W).

    28x28 --fold--> 14x14 -> Residual --------------- skip ----------------> Residual -> unfold
                                  \--fold--> 7x7 -> Residuals, Attention --unfold--/

    The way down sees the whole, the skip keeps the detail (Ronneberger et al. 2015,
    arXiv:1505.04597). Folding 2x2 pixels into channels loses nothing, and no convolution runs at
    28x28, where it would cost four times what it costs at 14x14: 64 MFLOP a picture in all. For
    64x64 or 128x128 fold 4x4 or 8x8 at the start, and unfold to match: the 2 in fold1 and unfold1
    becomes 4 or 8, and 4 C channels become 16 C or 64 C. In all it costs 1.1 or 1.6 times what
    32x32 costs."""

    def __init__(self, config):
        super().__init__()
        self.config, width, size, C = config, config.width, 128, config.channels
        self.shape = (C, config.image_size, config.image_size)
        self.alpha_bar = cosine_schedule(config.diffusion_steps)  # on the CPU, exact, no weight
        self.prompt = PromptEncoder(config.vocab_size, size)
        self.time = nn.Sequential(nn.Linear(64, size), nn.SiLU(), nn.Linear(size, size))
        self.fold1, self.unfold1 = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.into = nn.Conv2d(4 * C, width, kernel_size=3, padding=1)
        self.down = Residual(width, width, size)
        self.fold2 = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, 3 * width, 1))
        self.middle = nn.ModuleList(Residual(3 * width, 3 * width, size)
                                    for _ in range(config.blocks))
        self.attention = nn.ModuleList(Attention(3 * width) for _ in range(config.blocks))
        self.unfold2 = nn.Sequential(nn.Conv2d(3 * width, 4 * width, 1), nn.PixelShuffle(2))
        self.up = Residual(2 * width, width, size)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Conv2d(width, 4 * C, kernel_size=3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, tokens):
        snr, (signal, _) = signal_to_noise(self.alpha_bar, t), amounts(self.alpha_bar, t, x)
        K2 = K[self.config.channels]**2
        k = (K2 / (K2 + 1 / snr)).to(x)[:, None, None, None]                         # (B, 1, 1, 1)
        t = 1000 * t.float() / self.config.diffusion_steps  # 0 to 1000, whatever T is
        e = F.silu(self.time(time_embedding(t, 64)) + self.prompt(tokens))           # (B, E)
        x = given = x.contiguous(memory_format=torch.channels_last)
        x = skip = self.down(self.into(self.fold1(x)), e)                        # (B, w, 14, 14)
        x = self.fold2(x)                                                        # (B, 3 w, 7, 7)
        for block, attention in zip(self.middle, self.attention, strict=True):
            x = attention(block(x, e))
        x = self.up(torch.cat([self.unfold2(x), skip], dim=1), e)                # (B, w, 14, 14)
        x = self.unfold1(self.out(F.silu(self.norm(x)))).float()                 # (B, C, 28, 28)
        return k / signal * given + (1 - k).sqrt() * x


# ==== 4. Objective and training ===================================================================
def draw_batch(model, labels, table):
    """Draw t (B,), eps (B, C, H, W), and tokens (B, words) out of table (kinds, 6, words). t is
    spread evenly over 1 ... T, one in each of B equal parts (much as in Kingma et al. 2021,
    arXiv:2107.00630, appendix I.1): batches then differ less in how hard they are."""
    B, T = len(labels), model.config.diffusion_steps
    t = 1 + ((torch.randperm(B) + torch.rand(B)) / B * T).long().clamp(max=T - 1)
    eps = torch.randn(B, *model.shape)
    tokens = table[labels, torch.randint(table.shape[1], (B,))]
    tokens[torch.rand(B) < model.config.drop_caption] = 0  # so it knows pictures without words, too
    return t, eps, tokens


def objective(model, x0, t, eps, tokens):
    """Squared error of the guess of x_0, times a weight: 1 + signal / noise, 5 at most. With signal
    / noise alone it would be the squared error of the noise: L_simple of Ho et al. (equation 14).
    That asks hardly anything near T, where pictures take shape, and much where x_t already shows
    all x_0. The 1, from Salimans and Ho 2022 (arXiv:2202.00512, section 4), keeps a floor near T;
    the limit is from Hang et al. 2023, who limit signal / noise to 5."""
    guess = model(diffuse(model.alpha_bar, x0, t, eps), t.to(x0.device), tokens.to(x0.device))
    weight = (1 + signal_to_noise(model.alpha_bar, t)).clamp(max=5).to(x0)
    return (weight * (guess - x0).square().mean((1, 2, 3))).mean()


def schedule(progress):
    """Share of the peak learning rate at ``progress`` 0 to 1: a short ramp, then half a cosine."""
    return min(1.0, progress / 0.03) * 0.5 * (1 + math.cos(math.pi * progress))


def averaged(model):
    """A running mean of the weights, over some hundreds of steps: better than the last weights. At
    first it covers fewer, or it would remember the random beginning."""
    def follow(averages, weights, count):
        decay = min(0.998, (1 + count) / (10 + count))
        get_ema_multi_avg_fn(decay)(averages, weights, count)
    return AveragedModel(model, multi_avg_fn=follow)


def train(config):
    """Train what is left to train, judge, draw, all into ``config.out`` -> the UNet with its
    averaged weights, in eval mode. Raises UserError (wrong data, setting, prompt, checkpoint or
    folder), FloatingPointError (it diverged), KeyboardInterrupt (it was stopped; the same call goes
    on)."""
    device = pick_device(config.device)
    torch.manual_seed(seed_of(config.seed, "weights"))
    model = UNet(config).to(device, memory_format=torch.channels_last)
    ema = averaged(model)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    run = Run(config, model=model, average=ema, optimizer=optimizer)
    run.agree = highest  # if one process stops, all do
    if not run.finished:
        data, table = prepare(run, model, ema.module)
        for step in run.steps():
            # The next pictures; how far to drown each, in which noise, and what is said of it.
            rows = run.batch_rows(len(data.train))
            t, eps, tokens = map(my_share, draw_batch(model, data.train_labels[rows], table))
            x0 = scaled(data.train[my_share(rows)].to(device))
            with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
                loss = objective(model, x0, t, eps.to(device), tokens)
            optimizer.zero_grad()
            loss.backward()
            loss = loss.detach()
            average([loss, *(p.grad for p in model.parameters())])  # over all processes, if several
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1)
            run.log(loss=loss, grad_norm=grad_norm)  # raises FloatingPointError if not finite
            share = schedule((step + 0.5) / config.steps)  # and now the update
            optimizer.param_groups[0]["lr"] = config.learning_rate * share
            optimizer.step()
            ema.update_parameters(model)
            if run.due(5):  # now and then, to see how it is getting on
                draw_samples(run, ema.module)
        draw_forward(run, ema.module, data)
        draw_neighbours(run, ema.module, data)
        run.finish(judge(ema.module, data.test))
    ema.module.prompt.tokens(config.prompt)  # refuses words that it does not know
    draw_samples(run, ema.module)
    draw_denoising(run, ema.module)
    run.report()
    return ema.module.eval()


# ==== 5. Sampling =================================================================================
# One step back, from t to an earlier s. Ask the network what x_0 may be; then add noise to that
# again, as much as there is at s: part of it the noise that we see in x_t, part of it fresh.


def step_back(alpha_bar, x0, xt, t, s, eta):
    """Mean (B, C, H, W) and standard deviation of x_s, given x_t and x_0, s < t two numbers. Song
    et al. 2020, equations 12 and 16. With eta 1 it is Bayes' posterior q(x_s | x_t, x_0), and from
    t to t - 1 the step of Ho et al. (equation 7); with eta 0 nothing is random, and it can
    jump far. At s = 0 it is x_0 itself: no noise at the last step."""
    a, b = alpha_bar[t].item(), alpha_bar[s].item()
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    eps = (xt - math.sqrt(a) * x0) / math.sqrt(1 - a)
    return math.sqrt(b) * x0 + math.sqrt(max(0, 1 - b - sigma**2)) * eps, sigma


def guided(model, x, t, tokens, guidance):
    """The guess of x_0, away from the one without the prompt (Ho, Salimans 2022, equation 6).
    guidance (B,): 0 is without, 1 with the prompt, 2 twice as far; the paper's w is guidance - 1.
    Given x_t the noise is a multiple of x_0 plus a constant, so guidance of either is the same."""
    if (guidance == 1).all():
        return model(x, t, tokens)
    twice = torch.cat([tokens, torch.zeros_like(tokens)])
    prompted, unprompted = model(torch.cat([x, x]), torch.cat([t, t]), twice).chunk(2)
    return unprompted + guidance[:, None, None, None] * (prompted - unprompted)


def denoise(model, prompts, sampling_steps, guidance, eta, seed):
    """Yield x (N, C, H, W): static, then the picture after each step, at last in [-1, 1]."""
    if not prompts or isinstance(prompts, str) or sampling_steps < 1:
        fail("a list of prompts is needed (the empty one is \"\"), and at least one step")
    noise = None if seed is None else seeded(seed, "sample")
    device, T = model.out.weight.device, model.config.diffusion_steps
    tokens = model.prompt.tokens(prompts).to(device)
    guidance = torch.as_tensor(guidance, dtype=torch.float32).expand(len(prompts)).to(device)
    times = torch.linspace(T, 0, min(sampling_steps, T) + 1).round().long().tolist()
    x = torch.randn(len(prompts), *model.shape, generator=noise).to(device)
    yield x
    for t, s in zip(times[:-1], times[1:], strict=True):
        with evaluating(model):
            at = torch.full((len(prompts),), t, device=device)
            parts = zip(*(a.split(250) for a in (x, at, tokens, guidance)), strict=True)
            x0 = torch.cat([guided(model, *part) for part in parts])
        mean, sigma = step_back(model.alpha_bar, x0.clamp(-1, 1), x, t, s, eta)
        x = mean + sigma * torch.randn(x.shape, generator=noise).to(device) if sigma else mean
        yield x


def sample(model, prompts, sampling_steps=25, guidance=2.0, eta=0.0, seed=None):
    """A picture for each of the prompts, a list of N str -> floats (N, C, H, W) in [0, 1].
    ``guidance`` is a number, or one for each. sampling_steps = T with eta = 1 is the ancestral
    chain. The same seed gives the same pictures; None draws from torch's global generator.
    UserError for a word that no caption had."""
    for x in denoise(model, prompts, sampling_steps, guidance, eta, seed):
        images = x / 2 + 0.5  # the last is what counts
    return images.clamp(0, 1)


def load(path, device="cpu"):
    """The averaged model of a checkpoint, in eval mode. UserError if it is not ddpm.py's."""
    state = read_checkpoint(path)
    average = averaged(UNet(Config(**state["config"])))
    with fitting(path):
        average.load_state_dict(state["average"])
    return average.module.to(device, memory_format=torch.channels_last).eval()


# ==== 6. Judging, on pictures that it never saw ===================================================
# How many bits does a picture cost, at most, by this chain? x_T, then each x_{t-1} given x_t, at
# last the pixels given x_1; averaged over q by drawing each x_t once (Ho et al. 2020, equation 5):
#
#   L = KL( q(x_T|x_0) || N(0, I) ) - log p(x_0|x_1)
#       + sum over t > 1 of KL( q(x_{t-1}|x_t,x_0) || p(x_{t-1}|x_t) )
#
# Any p gives a bound; a p wide enough for its own errors gives a better one. For small t the
# posterior q(x_{t-1}|x_t,x_0) is far narrower than the errors of the guess. So p is wider here than
# in sampling, as if x_0 were known up to ERROR. (On MNIST: 4.8 bits a pixel instead of 6.6. Most
# goes to noise that nobody sees, at t = 10 and below: an image format does better, and samples do
# not show it.)
ERROR = 0.02


def log_decoder(x0, mean, sigma):
    """log p(x_0 | x_1), (B, C, H, W): the share of N(mean, sigma^2) in each pixel's bin of 2/255;
    the bins of black and white reach to infinity (Ho et al. 2020, equation 13)."""
    gap = (x0 - mean).abs()  # symmetric: high is the edge nearer the mean, low the outer one
    high = torch.special.log_ndtr((1 / 255 - gap) / sigma)
    low = torch.special.log_ndtr((-1 / 255 - gap) / sigma).masked_fill(x0.abs() > 0.999, -math.inf)
    return high + torch.log1p(-(low - high).exp())


def bits_per_dim(model, images, every=1, seed=None):
    """The bound L in bits per value, prompt empty: (B, C, H, W) in [0, 1], 256 levels -> (B,). With
    ``every`` > 1 each KL within the sum is taken for only one picture in ``every``, weighted that
    many times: then only the mean over the pictures means anything."""
    noise = None if seed is None else seeded(seed, "bits")
    device, T, alpha_bar = model.out.weight.device, model.config.diffusion_steps, model.alpha_bar
    x0 = (2 * images - 1).to(device)
    tokens, rows = torch.zeros(len(x0), 1, dtype=torch.long, device=device), torch.arange(len(x0))
    every = min(every, len(rows))
    a = alpha_bar[T].item()
    nats = 0.5 * (a * x0**2 - a - math.log(1 - a)).sum((1, 2, 3)).cpu().double()    # L_T
    for t in tqdm(range(1, T + 1), desc="judging", leave=False, disable=not leading()):
        some = rows if t == 1 else rows[t % every::every]
        # The deviations of q and p. (That of q is 0 at t = 1; p has there what it has at t = 2.)
        share, sigma = step_back(alpha_bar, 1, 0, max(t, 2), max(t, 2) - 1, eta=1)
        width = math.hypot(sigma, share * ERROR)  # share: that of x_0 in the mean of x_{t-1}
        for i in some.split(500):
            x, at = x0[i], torch.full((len(i),), t, device=device)
            eps = torch.randn(x.shape, generator=noise).to(device)
            xt = diffuse(alpha_bar, x, at, eps)
            with evaluating(model):
                guess = model(xt, at, tokens[i]).clamp(-1, 1)
            if t == 1:
                nats[i] -= log_decoder(x, guess, width).sum((1, 2, 3)).cpu().double()
            else:
                gap = share * (guess - x)  # between the two means
                kl = math.log(width / sigma) + (sigma**2 + gap**2) / (2 * width**2) - 0.5
                nats[i] += len(rows) / len(some) * kl.sum((1, 2, 3)).cpu().double()
    return (nats / x0[0].numel() / math.log(2)).float()


def judge(model, test):
    """Mean over the first ``test_images`` pictures, with the same noise for every model."""
    images = test[:model.config.test_images] / 255
    return {"test_bits_per_dim": bits_per_dim(model, images, every=50, seed="test").mean().item()}


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status (see launch)."""
    with ranks():
        return launch(argv, train)


# ==== Plumbing: blocks that stand, equal to the letter, in several files of this collection =======
# (What this script alone has comes last.) They ask of this file its name, the settings that are
# fixed once training has begun, and those on whose change a trained model is judged again.
NAME = "ddpm"
FIXED = ("diffusion_steps", "width", "blocks", "image_size", "channels", "vocab_size",
         "drop_caption", "unseen", "data", "batch_size", "seed")
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


# ---- block: ranks (the same in every file) ----
# Several processes, one a GPU, that torchrun started on one machine, or on several with one disk:
# each has its rows of every batch, and gradients are averaged over all. Needs the block runs.
from torch import distributed as dist


@contextmanager
def ranks():
    """Inside, the processes that torchrun started know each other. Without torchrun: nothing."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on a GPU
    try:
        yield
    finally:
        dist.destroy_process_group()


def my_share(rows):
    """This process's equal share of a batch, (B, ...) -> (B / processes, ...)."""
    if not together():
        return rows
    if len(rows) % dist.get_world_size():
        fail(f"--batch-size {len(rows)} does not divide among {dist.get_world_size()} processes")
    return rows[dist.get_rank()::dist.get_world_size()]


def average(tensors):
    """Each float tensor becomes, in place, its mean over all processes."""
    if together():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def highest(number):
    """The highest of all processes' numbers: what one is told (to stop, say), all are."""
    if not together():
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


@contextmanager
def leader_first():
    """One process does what is inside before the others do: what it downloads is there for all."""
    if not leading():
        highest(0)  # wait until the leader comes to the same call
    yield
    if leading():
        highest(0)
# ---- end block ----


# ==== Words, and pictures that train writes =======================================================
def unseen_names(config):
    return [name for name in re.split(r"\s*,\s*", config.unseen.strip()) if name]


def prepare(run, *models):
    """-> Images, less the kinds that --unseen names, and what may be said of each kind: its six
    captions, as tokens (kinds, 6, words)."""
    config, unseen = run.config, unseen_names(run.config)
    with leader_first():
        data = load_images(config.data, config.data_dir, config.image_size, config.channels)
    seen = torch.tensor([name not in unseen for name in data.names])
    train, test = seen[data.train_labels], seen[data.test_labels]
    unknown = config.unseen != Config.unseen and set(unseen) - set(data.names)
    if unknown or not (train.any() and test.any()):
        fail(f"--unseen {config.unseen}: takes some of {', '.join(data.names)}, not all")
    data = Images(data.train[train], data.train_labels[train], data.test[test],
                  data.test_labels[test], data.names)
    run.same_data(data.train, data.test)
    for model in models:
        model.prompt.learn([name for name in data.names if name not in unseen])
    models[0].prompt.tokens(config.prompt)  # an unknown word is better known before the work
    texts = [t for n in data.names for t in (captions(n) if n not in unseen else [""] * 6)]
    return data, models[0].prompt.tokens(texts).unflatten(0, (-1, 6))


def choose_prompts(run, model, count):
    """--prompt in turn; if none is given, kinds that it was never shown, then some that it was."""
    prompts, seen, words = list(run.config.prompt), model.prompt.names, set(model.prompt.words)
    if not prompts:
        kinds = [name for name in unseen_names(run.config) if set(name.split()) <= words]
        kinds += seen[::math.ceil(len(seen) / max(1, count - len(kinds)))]
        prompts = [captions(name)[0] for name in kinds]
    return (prompts * count)[:count]


def draw_samples(run, model):
    """samples.png: ten prompts or more side by side; row by row guidance rises to --guidance."""
    config = run.config
    columns = min(max(10, len(config.prompt)), config.samples)
    rows = math.ceil(config.samples / columns)
    prompts = choose_prompts(run, model, columns) * rows
    guidance = torch.linspace(0, 1, rows)[:, None] if rows > 1 else torch.ones(1, 1)
    guidance = (config.guidance * guidance).expand(-1, columns).flatten()[:config.samples]
    images = sample(model, prompts[:config.samples], config.sampling_steps, guidance, config.eta,
                    config.seed)
    run.write("samples.png", png(grid(images, columns)))


def draw_denoising(run, model, columns=6, frames=20):
    """denoising.png: twelve pictures emerge from static; the still image is what they become."""
    config, prompts = run.config, choose_prompts(run, model, 2 * columns)
    film = list(denoise(model, prompts, config.sampling_steps, config.guidance, config.eta,
                        config.seed))
    film = [film[round(i * (len(film) - 1) / (frames - 1))] for i in range(frames)]
    sheets = [grid(x / 2 + 0.5, columns) for x in film]
    run.write("denoising.png", png(sheets[-1], sheets + 4 * sheets[-1:]))  # it rests on the last


def draw_forward(run, model, data, rows=4, columns=10):
    """forward.png: test pictures, from left to right further and further on their way to static."""
    x0 = scaled(data.test[torch.arange(rows) % len(data.test)]).repeat_interleave(columns, 0)
    t = torch.linspace(0, run.config.diffusion_steps, columns).long().repeat(rows)
    eps = torch.randn(x0.shape, generator=seeded(run.config.seed, "forward"))
    run.write("forward.png", png(grid(diffuse(model.alpha_bar, x0, t, eps) / 2 + 0.5, columns)))


def draw_neighbours(run, model, data, columns=10):
    """neighbours.png: twenty samples, below each the training picture that is nearest to it, by
    squared differences of pixels. Is it remembering or making?"""
    prompts = choose_prompts(run, model, 2 * columns)
    images = sample(model, prompts, run.config.sampling_steps, run.config.guidance, run.config.eta,
                    run.config.seed).cpu()
    distance = torch.cat([torch.cdist(images.flatten(1), some.flatten(1) / 255)
                          for some in data.train.split(5000)], dim=1)           # (20, N)
    nearest = data.train[distance.argmin(1)] / 255
    pairs = torch.stack([images.unflatten(0, (2, columns)), nearest.unflatten(0, (2, columns))], 1)
    run.write("neighbours.png", png(grid(pairs.flatten(0, 2), columns)))


if __name__ == "__main__":
    sys.exit(main())
