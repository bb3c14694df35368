# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "tqdm>=4.66", "pillow>=10"]
# ///
# SPDX-License-Identifier: MIT
r"""The cycle: horses into zebras, and zebras into horses, without one matched pair.

    a horse ---> to_b ---> as a zebra ---> to_a ---> the same horse again
                               |
                               +--> D["b"]: a real zebra?     and all of it with A and B swapped

Nobody has photographs of one horse in both coats. But a pile of horses (A) and a pile of zebras (B)
will do: a translator from A to B has to fool a detective, a network that tells B from fakes
(gan.py), and a second translator, from B to A, has to recover the original from it. The detective
makes sure that the result looks like a zebra, the way back that it is still this very horse.

    python cyclegan.py                                     on animals that this script draws itself
    python cyclegan.py --data horse2zebra --width 24 --cycle-weight 3 --identity-weight 1 \
        --learning-rate 4e-4 --steps 16000       the paper's photographs (downloaded once)
    python cyclegan.py --data horses/,zebras/ --out out/mine ...    the same on two piles of yours
    python cyclegan.py --translate photos/ --to A --out out/mine    once trained: a whole folder
    python cyclegan.py --data horse2zebra --image-size 128 --width 64 --blocks 9 --cycle-weight 3 \
        --identity-weight 1 --learning-rate 4e-4 --steps 50000 --out out/cyclegan-gpu   on a GPU

Look in out/cyclegan (for other data out/cyclegan-NAME): translations.png (a row each: A, as B,
back as A; B, as A, back as B), training.png (an animation: the same test pictures from the first
step to the last), metrics.csv, checkpoint.pt, and what --translate made in translated/. Run the
same command again and it goes on where it stopped; settings not given come from the checkpoint.
On two cores of an AMD EPYC (Zen 5) the plain command takes under three minutes. Mean error on the
animal, out of 255: 28 as a zebra, 16 as a horse; for a mere copy, 67 (README).

Papers: Zhu, Park, Isola, Efros 2017 (arXiv:1703.10593), the cycle; Mao et al. 2016
(arXiv:1611.04076), squares for the detective; Isola et al. 2016 (arXiv:1611.07004), the detective
of patches; Johnson et al. 2016 (arXiv:1603.08155), the translator's network; Shrivastava et al.
2016 (arXiv:1612.07828), the buffer of past fakes; Mescheder et al. 2018 (arXiv:1801.04406), the R1
penalty.
"""
import math
import sys
import warnings
from collections import namedtuple
from dataclasses import dataclass, field, replace

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
    width: int = knob(16, "channels of the finest layers; a multiple of 8", 8, 512)
    blocks: int = knob(4, "residual blocks in the middle of a translator", 0, 64)
    image_size: int = knob(64, "height and width in training; a multiple of 4", 24, 1024)
    cycle_weight: float = knob(10.0, "how much finding the way back counts", 0, 1e4)
    identity_weight: float = knob(5.0, "how much leaving the target kind alone counts", 0, 1e4)
    r1: float = knob(10.0, "weight of the detectives' penalty (every 4th step, times 4)", 0, 1e4)
    buffer: int = knob(50, "past fakes kept for each detective", 0, 10**4)
    steps: int = knob(2800, "steps in all; each one trains all four networks", 1, 10**8)
    batch_size: int = knob(1, "pictures from each pile per step", 1, 2**10)
    learning_rate: float = knob(5e-4, "for all networks; from half way on it falls to 0", 0, 1)
    translate: str = knob("", "once trained: translate the pictures of this folder or .zip")
    to: str = knob("B", "what --translate translates to", "A", "B")
    test_images: int = knob(100, "held-out pictures of each pile to judge on", 1, 10**5)
    samples: int = knob(6, "rows in translations.png", 1, 100)
    data: str = knob("animals", "animals (drawn here), horse2zebra and the like, a folder or .zip "
                     "with trainA trainB testA testB, or FOLDER_A,FOLDER_B")
    data_dir: str = knob("data", "where downloads are kept")
    seed: int = knob(0, "of the run (the drawn animals stay the same)", 0, 2**31)
    device: str = knob("auto", "auto: cuda, else mps, else cpu", "auto", "cpu", "cuda", "mps")
    out: str = knob("", "folder of the results; if empty, out/cyclegan or out/cyclegan-DATA")
    restart: bool = knob(False, "throw away the checkpoint in --out and begin afresh")

    def __post_init__(self):
        check_config(self)
        for name, unit in (("width", 8), ("image_size", 4)):
            if getattr(self, name) % unit:
                fail(f"{flag(name)} {getattr(self, name)} must be a multiple of {unit}")


# ==== 1. Two piles ================================================================================
# load_piles (last part) loads two to train on and two to judge by, as bytes (N, 3, H, W), N
# pictures of height H and width W. In shapes, B is the batch. The animals are drawn, so for them
# the truth is known as well: truth["B"] is test A drawn as zebras, truth["A"] test B as
# horses, each with a mask that says where the animal is. No animal is in two piles, so training
# never sees this truth.
Piles = namedtuple("Piles", "train_a train_b test_a test_b truth", defaults=(None,))


def batch_of(pile, rows, size):
    """Rows of a pile, each cropped and flipped at random -> floats (B, 3, size, size), -1 to 1."""
    slack, pictures = pile.shape[2] - size, []
    for picture in pile[rows]:
        top, left, flip = torch.randint(slack + 1, (2,)).tolist() + [torch.rand(()) < 0.5]
        picture = picture[:, top:top + size, left:left + size]
        pictures.append(picture.flip(2) if flip else picture)
    return torch.stack(pictures).float() / 127.5 - 1


# ==== 2. The networks =============================================================================
def norm(channels):
    """Eight channels of a picture at a time to mean 0 and variance 1, then a learned scale and
    shift: group norm (Wu and He 2018, arXiv:1803.08494). No picture depends on the others of its
    batch."""
    return nn.GroupNorm(channels // 8, channels)


def conv(inside, outside, kernel, stride=1):
    """A convolution with reflected borders: zeros would be seen as a frame."""
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2, padding_mode="reflect")


class Doubling(nn.Conv2d):
    """Each pixel repeated to 2x2, then a 3x3 convolution: (B, c, h, w) -> (B, out, 2 h, 2 w). Nine
    taps then meet no more than 2x2 different pixels. So it is computed at the small size, in 2.25
    times fewer operations: four kernels of 2x2, one for each copy around a corner, in which the
    weights of all taps that meet the same pixel are added up. The result is the same; a step of
    translators 64 wide takes 2 to 12 % less time."""

    def forward(self, x):
        # Along one axis pixels 0 and 1 become 0 0 1 1. Taps centred on the second 0 (p = 0) meet 0,
        # 0, 1; on the first 1 (p = 1), 0, 1, 1. So t[p, a, i] says whether tap i meets pixel a.
        t = torch.tensor([[[1., 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], device=x.device)
        weight = torch.einsum("pai,qbj,ocij->opqcab", t, t, self.weight).flatten(0, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)        # (4 out, c, 2, 2)
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight,
                     self.bias.repeat_interleave(4))                         # (B, 4 out, h+1, w+1)
        x = F.pixel_shuffle(x, 2)[:, :, 1:-1, 1:-1]                          # (B, out, 2 h, 2 w)
        return x.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """Two convolutions, added to their own input: (B, c, h, w) -> the same shape."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(conv(width, width, 3), norm(width), nn.ReLU(),
                                    conv(width, width, 3), norm(width))

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """The translator: pictures (B, 3, H, W) in [-1, 1] -> the same shape, H and W 8, 12, 16 ....

    Down to a quarter of the size, where a convolution sees four times as far, residual blocks
    there, and up again. Three things differ from the paper. Each pixel is repeated and then
    convolved: a transposed convolution of kernel 3 and stride 2 hits some pixels more often than
    others, which shows as a checkerboard (Odena, Dumoulin, Olah 2016,
    distill.pub/2016/deconv-checkerboard). Group norm leaves the differences between the channels of
    a group; instance norm takes the mean out of each channel, and with it the colour of the sky.
    And the last convolution sees the picture itself beside the features. (On the drawn animals only
    the last makes a difference: README.)"""

    def __init__(self, config):
        super().__init__()
        w = config.width
        self.layers = nn.Sequential(
            conv(3, w, 7), norm(w), nn.ReLU(),                              # (B, w, H, W)
            conv(w, 2 * w, 3, stride=2), norm(2 * w), nn.ReLU(),            # (B, 2 w, H/2, W/2)
            conv(2 * w, 4 * w, 3, stride=2), norm(4 * w), nn.ReLU(),        # (B, 4 w, H/4, W/4)
            *[ResidualBlock(4 * w) for _ in range(config.blocks)],
            Doubling(4 * w, 2 * w, 3), norm(2 * w), nn.ReLU(),              # (B, 2 w, H/2, W/2)
            Doubling(2 * w, w, 3), norm(w), nn.ReLU())                      # (B, w, H, W)
        self.paint = conv(w + 3, 3, 7)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        return self.paint(torch.cat([self.layers(x), x], 1)).tanh()                # (B, 3, H, W)


class Discriminator(nn.Module):
    """The detective: pictures (B, 3, H, W) -> a map of verdicts (B, 1, h, w), 1 real, 0 fake. Each
    verdict is on a patch of 70x70 pixels (Isola et al. 2016): style is seen in patches, and what
    the animal is doing is the cycle's business. Why 70: go back from one verdict, r = 1. To give
    r values, a convolution of kernel 4 and stride s reads s (r - 1) + 4. With strides 1, 1, 2, 2,
    2, from the last to the first: 1 -> 4 -> 7 -> 16 -> 34 -> 70. (A verdict in a corner of 64x64
    sees half of it, one in the middle nearly all.) The paper's has instance norms in between; here
    a penalty on its slopes, below, keeps it in check (README: what the choices gained)."""

    def __init__(self, config):
        super().__init__()
        layers, before, w = [], 3, config.width
        for width, stride in ((w, 2), (2 * w, 2), (4 * w, 2), (8 * w, 1)):
            layers += [nn.Conv2d(before, width, 4, stride, 1), nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=torch.channels_last))


# ==== 3. What they want ===========================================================================
def verdict_loss(verdicts, wanted):
    """Mean squared distance of the detective's verdicts to 1 or 0 (Mao et al. 2016). With log odds,
    as in gan.py, a fake that already passes for real teaches hardly anything more, however odd;
    squares pull until its verdict is 1. Zhu et al. (section 4) found them more stable."""
    return (verdicts - wanted).square().mean()


class Buffer:
    """Past fakes. A detective that sees only the latest ones forgets the older tricks, and the two
    may go round in circles. Once the buffer is full, the detective gets a fresh fake or, just
    as likely, a past one, which the fresh one replaces (as in the code of Zhu et al.; the idea is
    from Shrivastava et al. 2016, section 2.3)."""

    def __init__(self, size):
        self.size, self.pictures = size, []

    def swap(self, fakes):
        """Fakes (B, 3, H, W) -> as many, fresh or past, cut off from the translator's graph."""
        given = []
        for fake in fakes.detach():
            if len(self.pictures) < self.size:
                self.pictures.append(fake.clone())
            elif self.size and torch.rand(()) < 0.5:
                i = int(torch.randint(self.size, ()))
                fake, self.pictures[i] = self.pictures[i], fake.clone()
            given.append(fake)
        return torch.stack([picture.to(fakes.device) for picture in given])

    def state_dict(self):
        return {"pictures": self.pictures}

    def load_state_dict(self, state):
        self.pictures = state["pictures"]


class Translators(nn.Module):
    """What a trained model is: to_b turns A into B, to_a turns B into A."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.to_b, self.to_a = Generator(config), Generator(config)


def translators_turn(G, D, optimizer, a, b, config):
    """The gradients for a step of both translators, on real a and b, (B, 3, H, W) each -> b as A, a
    as B, and the figures.

    fool      each translation should convince the detective of its new pile
    cycle     there and back again, each picture should be as it was: the detective alone would be
              happy with one zebra for all horses
    identity  a zebra should stay as it is when translated to a zebra. Otherwise little stops the
              sky from changing colour, as long as it changes back

    A mere copy costs nothing in cycle and identity: if photographs come out as mere
    copies, let both count less (README). Both are L1, absolute differences: where a pixel may be
    black or white, the best guess is then the likelier of the two, the median; with squares it
    would be grey, the mean."""
    D.requires_grad_(False)  # gradients pass through the detectives; their weights get none
    # What to translate, and what to leave alone, in one batch: faster than two.
    as_b, same_b = G.to_b(torch.cat([a, b])).chunk(2)
    as_a, same_a = G.to_a(torch.cat([b, a])).chunk(2)
    fool = verdict_loss(D["b"](as_b), 1) + verdict_loss(D["a"](as_a), 1)
    cycle = F.l1_loss(G.to_a(as_b), a) + F.l1_loss(G.to_b(as_a), b)
    same = F.l1_loss(same_b, b) + F.l1_loss(same_a, a)
    loss = fool + config.cycle_weight * cycle + config.identity_weight * same
    optimizer.zero_grad()
    loss.backward()
    return as_a, as_b, {"fool": fool, "cycle": cycle, "identity": same}


def r1_penalty(detective, real):
    """Mean over real pictures (B, 3, H, W) of the squared gradient of the mean verdict with respect
    to the pixels, halved (Mescheder et al. 2018, equation 9; gan.py). In place of instance norms
    it took a third off the errors beside the animal, and a tenth off those on it (README)."""
    real = real.detach().requires_grad_()
    verdicts = detective(real).mean((1, 2, 3))                                              # (B,)
    (slope,) = torch.autograd.grad(verdicts.sum(), real, create_graph=True)
    return 0.5 * slope.square().sum((1, 2, 3)).mean()


def detectives_turn(D, optimizer, real, fakes, r1=0.0):
    """The gradients for a step of both detectives; ``real`` and ``fakes`` are pairs (of A, of B),
    fakes of A being made from B; ``r1`` is the weight of the penalty in this step -> figures."""
    D.requires_grad_(True)
    loss, penalty = 0, 0
    for name, x, fake in zip("ab", real, fakes, strict=True):
        of_real, of_fake = D[name](torch.cat([x, fake])).chunk(2)
        loss = loss + (verdict_loss(of_real, 1) + verdict_loss(of_fake, 0)) / 2
        penalty = penalty + (r1_penalty(D[name], x) if r1 else 0)
    optimizer.zero_grad()
    (loss + r1 * penalty).backward()
    return {"detectives": loss} | ({"r1": penalty} if r1 else {})


# ==== 4. Training =================================================================================
def schedule(progress):
    """Share of the full learning rate: all of it in the first half, then linearly down to 0."""
    return min(1.0, 2 * (1 - progress))


def adam(net):
    """Adam with momentum 0.5 in place of 0.9, as the paper's authors have it: what is right changes
    with every step of the other side."""
    return torch.optim.Adam(net.parameters(), betas=(0.5, 0.999), fused=True)


def averaged(model):
    """The mean of the translators' weights over the last 200 steps or so: the two sides chase each
    other in circles, and the middle of a circle is better than any point on it (gan.py)."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))


def train(config):
    """Train what is left, judge, draw, translate, into ``config.out`` -> the averaged Translators.
    Raises UserError, FloatingPointError (it diverged), KeyboardInterrupt (stopped: call again)."""
    jobs, device = to_translate(config), pick_device(config.device)
    torch.manual_seed(seed_of(config.seed, "weights"))
    G, D = (net.to(device, memory_format=torch.channels_last) for net in (
        Translators(config), nn.ModuleDict({side: Discriminator(config) for side in "ab"})))
    ema, optimizer_g, optimizer_d = averaged(G), adam(G), adam(D)
    past_a, past_b = Buffer(config.buffer), Buffer(config.buffer)
    # From here on, all is as in the checkpoint, if there is one. --translate is not kept in it.
    run = Run(replace(config, translate="", to="B"), model=G, discriminators=D, average=ema,
              past_a=past_a, past_b=past_b, optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    if run.finished and jobs:  # the checkpoint is all it takes
        translate_all(run, ema.module, jobs, config.to)
        run.report()
        return ema.module.eval()
    piles = load_piles(config, training=not run.finished)
    test = [pile[:max(2, config.samples)].float() / 255 for pile in piles[2:4]]
    if not run.finished:
        run.same_data(piles.train_a, piles.train_b)
    for step in run.steps():
        if step == 0 or run.due(10):
            run.film(both_ways(ema.module, test))
        rows = run.batch_rows(len(piles.train_a))  # and for each a partner drawn at random
        partners = torch.randint(len(piles.train_b), rows.shape)
        a, b = (batch_of(pile, some, config.image_size).to(device)
                for pile, some in ((piles.train_a, rows), (piles.train_b, partners)))
        as_a, as_b, figures = translators_turn(G, D, optimizer_g, a, b, config)
        fakes = past_a.swap(as_a), past_b.swap(as_b)
        figures |= detectives_turn(D, optimizer_d, (a, b), fakes, 4 * config.r1 * (step % 4 == 0))
        grad_norm = clip_grad_norm_([*G.parameters(), *D.parameters()], math.inf)  # not clipped
        run.log(**figures, grad_norm=grad_norm)  # raises FloatingPointError if not finite
        for optimizer in (optimizer_g, optimizer_d):
            optimizer.param_groups[0]["lr"] = config.learning_rate * schedule(step / config.steps)
            optimizer.step()
        ema.update_parameters(G)
        if run.due(5):  # now and then, to see how it is getting on
            draw_translations(run, ema.module, test)
    if not run.finished:
        draw_training(run, ema.module, test)
        run.finish(judge(ema.module, piles))
    draw_translations(run, ema.module, test)
    translate_all(run, ema.module, jobs, config.to)
    run.report()
    return ema.module.eval()


# ==== 5. Translating ==============================================================================
def translate(model, images, to="B"):
    """Pictures (B, 3, H, W) in [0, 1], H and W from 5 on -> their translations, likewise. Sizes
    that 4 does not divide are padded by reflection at the right and below, then cropped."""
    device, (height, width) = next(model.parameters()).device, images.shape[2:]
    generator = {"A": model.to_a, "B": model.to_b}.get(to) or fail(f"to {to!r}: give A or B")
    with evaluating(model):
        parts = []
        for some in images.split(20):
            x = F.pad(some.to(device) * 2 - 1, (0, -width % 4, 0, -height % 4), mode="reflect")
            parts.append(generator(x)[:, :, :height, :width])
    return torch.cat(parts) / 2 + 0.5


def load(path, device="cpu"):
    """The Translators of a checkpoint, in eval mode. UserError if it is not cyclegan.py's."""
    state = read_checkpoint(path)
    average = averaged(Translators(Config(**state["config"])))
    with fitting(path):
        average.load_state_dict(state["average"])
    return average.module.to(device, memory_format=torch.channels_last).eval()


# ==== 6. Judging, on pictures never trained on ====================================================
def judge(model, piles):
    """Mean absolute error after the way back, 0 to 255, both ways; for the drawn animals also the
    error against the truth, on the animal and beside it, and the PSNR, 10 log10 (255^2 / mean
    squared error); and the same for a mere copy of the input."""
    figures = {}
    for to, fro, x in (("B", "A", piles.test_a.float()), ("A", "B", piles.test_b.float())):
        made = translate(model, x / 255, to).cpu()
        back = translate(model, made, fro).cpu()
        figures[f"cycle_{to}"] = (back * 255 - x).abs().mean().item()
        if piles.truth:
            truth, mask = piles.truth[to]
            for what, guess in (("", made * 255), ("copy_", x)):
                error = (guess - truth).abs().mean(1, keepdim=True)                # (N, 1, H, W)
                coat, beside = ((error * m).sum() / m.sum() for m in (mask, 1 - mask))
                mse = (guess - truth).square().mean((1, 2, 3))
                figures |= {f"{what}coat_{to}": coat.item(), f"{what}beside_{to}": beside.item(),
                            f"{what}psnr_{to}": (10 * (255 ** 2 / mse).log10()).mean().item()}
    return {f"test_{name}": value for name, value in figures.items()}


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status (see launch)."""
    return launch(argv, train)


# ==== Plumbing: blocks that stand, equal to the letter, in several files of this collection =======
# (What this script alone has comes last.) They ask of this file its name, the settings that are
# fixed once training has begun, and those on whose change a trained model is judged again.
NAME = "cyclegan"
FIXED = ("width", "blocks", "image_size", "cycle_weight", "identity_weight", "r1", "buffer",
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


# ==== The piles, and pictures that train writes ===================================================
PILES = ("trainA", "trainB", "testA", "testB")
SETS = ("apple2orange", "summer2winter_yosemite", "horse2zebra", "monet2photo", "cezanne2photo",
        "ukiyoe2photo", "vangogh2photo", "maps", "facades", "iphone2dslr_flower")


def load_piles(config, training=True):
    """The piles that ``config.data`` names -> Piles; without ``training`` only those of the test.
    UserError if there are none."""
    count, size = config.test_images, config.image_size
    if config.data == "animals":
        draw = functools.partial(draw_animals, size=size)
        train = [draw(500 * training, pile, pile == "trainB")[0] for pile in PILES[:2]]
        test = [draw(count, pile, pile == "B")[0] for pile in "AB"]
        return Piles(*train, *test, {"B": draw(count, "A", True), "A": draw(count, "B", False)})
    folders = [Path(part) for part in config.data.split(",")]
    if len(folders) > 2:
        fail(f"--data {config.data}: two folders at most")
    if len(folders) == 2:  # every tenth by name is held out, of fewer than ten the last
        piles = [list(picture_files(folder).items()) for folder in folders]
        files = [[f for i, f in enumerate(pile) if (i % 10 == min(9, len(pile) - 1)) == held_out]
                 for held_out in (False, True) for pile in piles]
    else:
        path = folders[0]
        if not path.exists():  # one of the sets that the paper's authors publish, downloaded once
            if config.data not in SETS:
                fail(f"--data {path}: no such folder or .zip, and none of {', '.join(SETS)}")
            path = Path(config.data_dir, f"{config.data}.zip")
            if not path.exists():
                url = f"https://efrosgans.eecs.berkeley.edu/cyclegan/datasets/{path.name}"
                download([url], path, "zip")
        found = picture_files(path).items()
        files = [[(name, read) for name, read in found if kind in name.split("/")[:-1]]
                 for kind in PILES]
    for kind, pile in zip(PILES, files, strict=True):
        if not pile:
            fail(f"{config.data}: no pictures for {kind}: it takes a folder or .zip with trainA, "
                 "trainB, testA and testB, or FOLDER_A,FOLDER_B with two pictures each at least")
    # Training crops from pictures a little larger, as the authors do. As bytes in memory the 2,401
    # training pictures of horse2zebra take 37 MB for crops of 64x64, 147 MB of 128, 589 MB of 256.
    larger = math.ceil(size * 286 / 256)
    train = [read_pictures(pile, larger)[0] if training else None for pile in files[:2]]
    return Piles(*train, *(read_pictures(pile[:count], size)[0] for pile in files[2:]))


def to_translate(config):
    """--translate FOLDER: [(name, read, path)], each picture and where its translation goes, never
    over one of them: translated/STEM.png, or where that is taken STEM-2.png."""
    files, taken, jobs = picture_files(config.translate) if config.translate else {}, set(), []
    if config.translate and not files:
        fail(f"--translate {config.translate}: no pictures there")
    inputs = {Path(config.translate, name).resolve() for name in files}
    for name, read in files.items():
        stem = Path(name).stem
        choices = (f"{stem}-{k + 1}" if k else stem for k in range(len(files)))
        choice = next(c for c in choices if c.lower() not in taken)  # a.png may be A.png
        taken.add(choice.lower())
        jobs.append((name, read, Path(config.out, "translated", f"{choice}.png")))
        if jobs[-1][2].resolve() in inputs:
            fail(f"{jobs[-1][2]} is one of the pictures to translate: choose another --out")
    return jobs


def translate_all(run, model, jobs, to):
    """Each picture, of any shape, from 16 pixels on; what is longer than 2048 is scaled down to it,
    to fit into memory. What cannot be read is left out, with a word about it; UserError where
    nothing can."""
    troubles = []
    for name, read, path in jobs:
        try:
            picture = read_picture(name, read)[None] / 255
            shrink = min(1, 2048 / max(picture.shape[2:]))
            if shrink * min(picture.shape[2:]) < 16:
                fail(f"{name} is smaller than 16 pixels")
        except UserError as error:
            troubles.append(str(error))
            continue
        if shrink < 1:
            picture = F.interpolate(picture, scale_factor=shrink, mode="bilinear", antialias=True)
        image = translate(model, picture, to)[0]
        image = (image.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        write_file(path, png(image))
        run.written["translated"] = str(path.parent)
    if troubles and len(troubles) == len(jobs):
        fail(troubles[0])
    if troubles:
        print(f"{NAME}.py: left out {len(troubles)} of {len(jobs)}: {troubles[0]}",
              file=sys.stderr)


def draw_animals(count, seed, stripes, size=64):
    """Horses, or the very same animals as zebras -> bytes (N, 3, size, size), and a mask (N, 1,
    size, size), 0 to 1: where the animal is. Equal seeds and sizes give equal animals."""
    parts = []
    for first in range(0, max(1, count), 20):
        g = seeded(seed, first)

        def chance(low, high, *shape, g=g):  # uniform, (20, *shape, 1, 1)
            return low + (high - low) * torch.rand(20, *shape, 1, 1, generator=g)

        picture = draw_landscape(chance, size)
        parts.append(draw_animal(chance, stripes, picture))
    return tuple(torch.cat(part)[:count] for part in zip(*parts, strict=True))


def across(size):
    """Where the pixels are: x to the right and y up, (size, size) each, between -1 and 1."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.meshgrid(axis, -axis, indexing="xy")


def draw_landscape(chance, size):
    """Sky and ground, lighter and darker in places -> (N, 3, size, size)."""
    x, y = across(size)
    cloud = F.interpolate(chance(-0.5, 0.5, 1, (size // 8) ** 2).view(-1, 1, *[size // 8] * 2),
                          (size, size), mode="bicubic", align_corners=False)
    sky = torch.tensor([0.45, 0.6, 0.8])[:, None, None] - 0.1 * y + 0.12 * cloud
    sky = sky + chance(0, 0.3, 3) * torch.tensor([1.0, 0.8, 0.7])[:, None, None]
    ground = torch.tensor([0.3, 0.45, 0.15])[:, None, None] + 0.15 * cloud
    ground = ground + chance(0, 0.4, 3) * torch.tensor([1.0, 0.6, 0.6])[:, None, None]
    horizon = chance(-0.3, 0.25, 1) + 0.06 * torch.sin(3 * x + chance(0, 6.3, 1))
    return sky.lerp(ground, ((horizon - y) * size / 2 + 0.5).clamp(0, 1))


def limb(u, v, start, end, thick, thin):
    """A line with a thickness, in the body's own coordinates u and v, (N, 1, H, W) each -> the
    distance from its surface, negative inside, and the place along it."""
    (a, b), (c, d) = start, end
    length = ((c - a) ** 2 + (d - b) ** 2) ** 0.5
    along = ((u - a) * (c - a) + (v - b) * (d - b)) / length
    t = (along / length).clamp(0, 1)
    away = ((u - a - t * (c - a)) ** 2 + (v - b - t * (d - b)) ** 2) ** 0.5
    return away - thick - (thin - thick) * t, along


def draw_animal(chance, stripes, picture):
    """An animal from the side, into each ``picture`` (N, 3, H, W) -> bytes, and the mask. It is a
    set of limbs in coordinates of its own: u towards the head, v up. So stripes follow the body
    wherever it stands."""
    size, (x, y) = picture.shape[3], across(picture.shape[3])
    scale, facing, lean = chance(0.66, 0.82, 1), chance(-1, 1, 1).sign(), chance(-0.1, 0.1, 1)
    x, y = (x - chance(-0.08, 0.08, 1)) * facing / scale, (y - chance(-0.12, 0.05, 1)) / scale
    u, v = lean.cos() * x + lean.sin() * y + 0.1, lean.cos() * y - lean.sin() * x

    # Coats: from chestnut over brown to grey; a zebra's light stripes are tinted by it.
    coat = chance(0.3, 1.0, 1) * torch.tensor([0.75, 0.45, 0.25])[:, None, None]
    coat = coat.lerp(coat.mean(1, keepdim=True), chance(0, 0.8, 1))              # (N, 3, 1, 1)
    light, dark = 0.35 * coat + 0.62, torch.full_like(coat, 0.06)
    hair, muzzle, sun = dark if stripes else 0.3 * coat, 0.35 * coat, 1 + 0.6 * v.clamp(-0.45, 0.3)

    parts = []  # limb, colour (None: fur), shade, period of the stripes, slant; back to front
    for i, hip in enumerate((-0.55, 0.38, -0.45, 0.5)):  # two far legs, two near ones
        swing, shade = chance(-0.16, 0.16, 1), 0.7 if i < 2 else 0.95
        knee, hoof = (hip + swing, -0.55), (hip + 1.3 * swing, -0.95)
        parts += [(((hip, -0.12), knee, 0.12, 0.07), None, shade, 0.4, 0),
                  ((knee, hoof, 0.065, 0.05), None, shade, 0.4, 0)]
    neck, tail = chance(0.45, 0.95, 1), (-0.86 - chance(-0.1, 0.25, 1), -0.38)
    top = a, b = 0.55 + 0.45 * neck.cos(), 0.12 + 0.55 * neck.sin()
    nose = c, d = a + chance(0.29, 0.34, 1), b - chance(0.11, 0.29, 1)
    parts[4:4] = [(((-0.74, 0.1), tail, 0.05, 0.07), hair, 1, 0, 0)]    # between far and near legs
    parts += [(((0.42, 0.3), (a - 0.08, b + 0.08), 0.06, 0.07), hair, 1, 0, 0),              # mane
              (((a - 0.02, b + 0.08), (a - 0.06, b + 0.24), 0.05, 0.015), None, sun, 0.5, 0),
              (((0.5, 0.08), top, 0.2, 0.11), None, sun, 0.5, 0),
              (((-0.5, 0.0), (0.45, 0.02), 0.27, 0.26), None, sun, 0.5, 0.25),              # body
              ((top, nose, 0.12, 0.075), None, sun, 0.4, 0),                                 # head
              ((nose, (c + 0.01, d), 0.075, 0.075), muzzle, 1, 0, 0),
              (((a + 0.1, b), (a + 0.11, b), 0.03, 0.03), dark, 1, 0, 0)]                    # eye
    mask = torch.zeros_like(picture[:, :1])
    for shape, colour, shade, every, slant in parts:
        distance, along = limb(u, v, *shape)
        cover = (0.5 - distance * scale * size / 2).clamp(0, 1)           # of each pixel, its share
        if colour is None:
            wave = torch.sin(2 * math.pi / every * (along + slant * v))
            colour = dark.lerp(light, (0.5 + 2.2 * wave).clamp(0, 1)) if stripes else coat
        picture, mask = picture.lerp(colour * shade, cover), mask.lerp(torch.ones(()), cover)
    return (picture.clamp(0, 1) * 255).round().byte(), mask


def draw_translations(run, model, test):
    """translations.png: a row each, A, as B, back as A; and, to the right, B, as A, back as B."""
    rows = []
    for x, to, fro in ((test[0], "B", "A"), (test[1], "A", "B")):
        x = x[:run.config.samples]
        made = translate(model, x, to).cpu()
        rows += [x, made, translate(model, made, fro).cpu()]
    n = min(map(len, rows))
    sheet = torch.stack([part[:n] for part in rows], 1).flatten(0, 1)
    run.write("translations.png", png(grid(sheet, 6)))


def both_ways(model, test):
    """Two test pictures of each pile and what becomes of them: A, as B, B, as A -> (8, 3, H, W)."""
    a, b = (x[torch.arange(2) % len(x)] for x in test)
    pictures = a, translate(model, a, "B").cpu(), b, translate(model, b, "A").cpu()
    return torch.stack(pictures, 1).flatten(0, 1)


def draw_training(run, model, test):
    """training.png: the same test pictures from first step to last, in 32 shades of each colour,
    which halves the file."""
    frames = [frame / 255 for frame in run.frames] + [both_ways(model, test)]
    sheets = [grid((frame * 31).round() / 31, 4, 1) for frame in frames]
    run.write("training.png", png(sheets[-1], sheets, milliseconds=400))


if __name__ == "__main__":
    sys.exit(main())
