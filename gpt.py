# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.13", "tqdm>=4.66"]
# ///
# SPDX-License-Identifier: MIT
r"""GPT: guess the next token; a good guesser, fed its own guesses, is a writer.

    text      "To be, or not to be"
                 | bytes; those that often stand side by side are merged
    tokens    [To] [ be] [,]  [ or]  [ not] [ to]
                 | the Transformer: each token gathers what it needs from those on its left
    targets   [ be] [,] [ or] [ not] [ to]  [ be]      at each place, every token's probability
                 | draw one, append it, guess again
    text      a new one

Any text will teach it, with no teacher: the answer to "what comes next?" is right there. To
guess well it has to spell, to close brackets, to remember who is speaking; nobody programs that.

    python gpt.py                                            on the manual that comes with Python
    python gpt.py --prompt "The for statement"               once trained: let it go on from there
    python gpt.py --prompt "The for" --explain               what it thinks comes next
    python gpt.py --data ~/notes                             your own file, or folder of files
    python gpt.py --data shakespeare --vocab-size 2048 --dropout 0 --steps 430    (downloaded once)
    python gpt.py --data shakespeare --vocab-size 1024 --layers 6 --heads 6 --width 384 \
        --block-size 256 --batch-size 32 --dropout 0.3 --steps 1000 --compile --out out/gpt-gpu
                                                             (this is for a GPU)
    torchrun --nproc-per-node=N gpt.py ...                   the same on N of them

Look in out/gpt: samples.txt, metrics.csv, checkpoint.pt. Run the same command again and it goes on
where it stopped; settings not given come from the checkpoint; on a finished model it only writes
(--seed 1: another text). On two cores of an AMD EPYC the plain command takes 2.3 minutes (Zen 5) to
4.3 (Zen 3); the first one on Shakespeare takes a minute (Zen 5), to a loss of 1.55 (chapter 3).

Papers: Radford et al. 2018 and 2019 (GPT and GPT-2); Vaswani et al. 2017 (arXiv:1706.03762), the
Transformer. What has changed since is noted where it comes up.
"""
import codecs
import math
import re
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

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
    vocab_size: int = knob(512, "256: just the bytes; each one beyond is a merged pair", 256, 2**16)
    block_size: int = knob(128, "tokens that a guess can look back on", 2, 2**16)
    layers: int = knob(4, "blocks of attention and MLP", 1, 200)
    heads: int = knob(4, "attention patterns in a layer; they share the width", 1, 256)
    width: int = knob(192, "numbers that stand for a token inside", 2, 2**14)
    dropout: float = knob(0.2, "share zeroed in training, to curb learning by heart", 0, 0.9)
    steps: int = knob(1200, "optimiser steps in total", 1, 10**8)
    batch_size: int = knob(8, "stretches of block_size tokens a step", 1, 2**16)
    micro_batches: int = knob(1, "parts in which a batch is computed, to save memory", 1, 2**16)
    learning_rate: float = knob(0.03, "peak of Muon's; AdamW has a third of it", 0, 1)
    compile: bool = knob(False, "torch.compile: a minute's wait first; worth it on a GPU")
    prompt: str = knob("", "the text to go on from (no space at its end); - reads stdin")
    tokens: int = knob(400, "how many to write", 1, 10**8)
    temperature: float = knob(0.7, "below 1: safer, 0: always the likeliest", 0, 100)
    top_k: int = knob(0, "draw from the k likeliest tokens only; 0: from all", 0, 2**16)
    top_p: float = knob(0.95, "draw from the likeliest that make up this share", 0, 1)
    explain: bool = knob(False, "list the likeliest next tokens instead of writing")
    samples: int = knob(1, "texts to write", 1, 10**4)
    data: str = knob("manual", "manual (of this Python), shakespeare, a text file, or a folder")
    data_dir: str = knob("data", "where downloads are kept")
    seed: int = knob(0, "for the run; once it is finished, for the texts only", 0, 2**31)
    device: str = knob("auto", "auto: cuda, else mps, else cpu", "auto", "cpu", "cuda", "mps")
    out: str = knob("", "folder of the results; if empty, out/gpt or out/gpt-DATA")
    restart: bool = knob(False, "throw away the checkpoint in --out and begin afresh")

    def __post_init__(self):
        check_config(self)
        if self.width % (2 * self.heads):
            fail(f"--width {self.width} must be a multiple of twice --heads {self.heads}")


# ==== 1. Text to tokens ===========================================================================
# A token is a number. The simplest are the 256 bytes of UTF-8: any text in any language is a row of
# them. But then "the" takes three guesses. Byte-pair encoding (Gage 1994; Sennrich et al. 2015,
# arXiv:1508.07909) makes the most frequent pair of neighbours a new token, and does so again:
#
#     t h e _ c a t _ t h e   ->   th e _ c a t _ th e   ->   the _ c a t _ the
#
# The text gets shorter: the same block reaches further back, a step reads more. Merges stay inside
# words, or "dog." and "dog," would become tokens. A word, number or run of signs takes one space
# before it; every byte of a character beyond ASCII counts as a letter; runs over 48 are cut.
WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]{1,48}| ?\d{1,48}| ?[^\sA-Za-z\d\x80-\xff]{1,48}"
                   rb"|\s{1,48}(?!\S)|\s")


def merge(word, pair, token):
    """A list of tokens in which every ``pair``, from the left, has become the one ``token``."""
    merged = []
    for t in word:
        if merged and (merged[-1], t) == pair:
            merged[-1] = token
        else:
            merged.append(t)
    return merged


def learn_merges(text, count):
    """Bytes -> at most ``count`` pairs: pair i becomes token 256 + i. Fewer if none repeats. Equal
    words count together, and a pair is sought only in words that had it: 1 MB takes seconds."""
    words = [(list(word), n) for word, n in Counter(WORDS.findall(text)).items()]
    pairs, where = Counter(), defaultdict(set)  # how often each pair occurs, and in which words
    for i, (word, n) in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += n
            where[pair].add(i)
    merges = []
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        for i in where.pop(best):
            word, n = words[i]
            after = merge(word, best, 256 + len(merges))
            for pair in pairwise(word):
                pairs[pair] -= n
            for pair in pairwise(after):
                pairs[pair] += n
                where[pair].add(i)
            words[i] = after, n
        del pairs[best]
        merges.append(best)
    return merges


class Tokenizer(nn.Module):
    """Bytes <-> tokens. It is a Module so that its merges travel with the weights."""

    def __init__(self, vocab_size):
        super().__init__()
        self.register_buffer("merges", torch.full((vocab_size - 256, 2), -1))  # -1: none learned

    def learn(self, text):
        merges = learn_merges(text.encode(), len(self.merges))
        self.merges[:len(merges)] = torch.tensor(merges, dtype=torch.long).view(-1, 2)

    def encode(self, text):
        """str -> list of tokens."""
        ranks = {tuple(pair): 256 + i for i, pair in enumerate(self.merges.tolist())}
        known, tokens = {}, []
        for word in WORDS.findall(text.encode("utf-8", "replace")):
            if word not in known:  # apply the merges in the order in which they were learned
                parts = list(word)
                while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
                    first = min(pairs, key=ranks.get)
                    parts = merge(parts, first, ranks[first])
                known[word] = parts
            tokens += known[word]
        return tokens

    def pieces(self):
        """The bytes of every token. (Not a str: a token may end inside a character.)"""
        pieces = [bytes([i]) for i in range(256)]
        for left, right in self.merges.tolist():
            pieces.append(b"" if left < 0 else pieces[left] + pieces[right])
        return pieces

    def decode(self, tokens):
        """list of tokens -> bytes."""
        pieces = self.pieces()
        return b"".join(pieces[token] for token in tokens)


# ==== 2. The Transformer ==========================================================================
# B is the batch, T the tokens in a stretch of text, W the width, H the heads, D = W / H, V the
# vocabulary. W numbers stand for a token, and every block adds to them: attention adds what it
# fetched from this token and those on its left, the MLP what it makes of that. The sum, the
# residual stream, is never overwritten, and gradients pass it unharmed. There are no biases.


def rotations(count, size):
    """cos and sin, (2, count, size / 2), of position * speed; speeds fall from 1 towards 1e-4."""
    angle = torch.arange(count)[:, None] * 10000 ** -(torch.arange(0, size, 2) / size)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rotation):
    """Mark queries and keys (..., T, D) with their positions (RoPE: Su et al. 2021,
    arXiv:2104.09864, equation 15); ``rotation`` is (2, T, D / 2). Attention compares by dot
    products, and these ignore order. So each pair of numbers (a, b) in a query or key is turned,
    like the hand of a clock, by an angle that grows with the position: the first pair fast, the
    others slower and slower. In the product of two turned pairs only the difference of their angles
    is left: how far apart two tokens are, not where they stand. GPT-2 learned a vector for each
    position, and had to learn "one to the left" anew at each."""
    (cos, sin), (a, b) = rotation, x.chunk(2, dim=-1)  # i and i + D / 2 (paper: neighbours)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Each token asks (query) and offers (key, value): the better a key fits a query, the more of
    its value is fetched.

        softmax( q k^T / sqrt(D) + mask ) v      (paper: equation 1; scaled_dot_product_attention)

    H heads do so, each in D numbers of its own, made from all W: one may look for verbs, one for
    brackets. Without sqrt(D), sums of many products are so large that the softmax sees little but
    one token. The mask keeps a token from seeing what it is to guess. Row: who looks; column: at
    whom.

                To  be   ,  or
          To     x   .   .   .       x: may look
          be     x   x   .   .       .: minus infinity, so the softmax gives it no weight at all
           ,     x   x   x   .
          or     x   x   x   x       one stretch of T tokens thus teaches T guesses in one pass"""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, rotation, past=None):
        """(B, T, W) -> (B, T, W). ``past`` (chapter 5) is a list: [] at first, then the keys and
        values of the tokens before these; their own are appended."""
        T, before = x.shape[1], past[0].shape[2] if past else 0
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))                      # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)                                         # (3, B, H, T, D)
        (q, k), v, mask = rotate(qkv[:2], rotation), qkv[2], None                # (B, H, T, D) each
        if before:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if past is not None:
            past[:] = k, v
        if before and T > 1:  # row t sees columns 0 to before + t
            mask = torch.ones(T, before + T, dtype=torch.bool, device=x.device).tril(before)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not before)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention, then x + MLP: (B, T, W) -> (B, T, W). The MLP works on each token by itself;
    SiLU in the middle (GPT-2: GELU) keeps it from being just one layer. (SwiGLU: Shazeer 2020,
    arXiv:2002.05202, and squared ReLU: So et al. 2021, arXiv:2109.08668, were no better here.) A
    norm brings what each of the two reads to mean square 1, and scales it. The sum itself, the
    residual stream, is left alone, so training is stable from the start (Xiong et al. 2020,
    arXiv:2002.04745). RMSNorm (Zhang, Sennrich 2019, arXiv:1910.07467) is LayerNorm without the
    mean."""

    def __init__(self, config):
        super().__init__()
        W = config.width
        self.norm1, self.norm2 = (nn.RMSNorm(W, eps=1e-6) for _ in range(2))
        self.attention = Attention(W, config.heads)
        self.mlp = nn.Sequential(nn.Linear(W, 4 * W, bias=False), nn.SiLU(),
                                 nn.Linear(4 * W, W, bias=False))

    def forward(self, x, rotation, past=None, keep=(1, 1)):  # keep: dropout's, chapter 4
        x = x + keep[0] * self.attention(self.norm1(x), rotation, past)
        return x + keep[1] * self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens (B, T), T at most block_size, -> logits (B, T, V): at each place, a score for every
    token as the next one. (Softmax makes them probabilities.)"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.vocab_size)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        rotation = rotations(config.block_size, config.width // config.heads)
        self.register_buffer("rotation", rotation, persistent=False)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        # The last matrix of attention and MLP starts at zero: blocks begin as "do nothing". So does
        # the head: all tokens begin equally likely, and a guess costs ln V. Other matrices keep the
        # size of what they get; embeddings stay N(0, 1), as PyTorch has them.
        for block in self.blocks:
            for layer in (block.attention.qkv, block.mlp[0]):
                nn.init.normal_(layer.weight, std=config.width**-0.5)
            for layer in (block.attention.out, block.mlp[2]):
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens, cache=None, keep=None):
        """``cache`` (chapter 5): a list for each block, in which it keeps its keys and values.
        ``keep`` (chapter 4): what dropout lets pass in training, (B, 2 * layers + 1, 1, W): two
        for each block, and the last for the embedding."""
        first = cache[0][0].shape[2] if cache and cache[0] else 0  # how many tokens it holds
        rotation = self.rotation[:, first:first + tokens.shape[1]]               # (2, T, D / 2)
        keep = [1] * (2 * len(self.blocks) + 1) if keep is None else keep.unbind(1)
        x = self.embedding(tokens) * keep[-1]                                        # (B, T, W)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, cache[i] if cache else None, keep[2 * i:2 * i + 2])
        return self.head(self.norm(x))                                               # (B, T, V)


# ==== 3. The objective ============================================================================
# At each place the loss is -log p(the token that came); its mean is the cross entropy. It is in
# nats; divided by ln 2, in bits, and that is what an arithmetic coder that knows this model would
# need to store the token. To guess well is to compress well. Tokens differ in length, so the loss
# is counted per byte of text; 8 bits, or 5.5 nats, is guessing bytes at random.


def nats_per_byte(model, text):
    """Cross entropy of a str under the model, in nats per byte; divide by ln 2 for bits per byte.
    The text is read in stretches of block_size that do not overlap, so the first guesses of each
    have little to go on. The very first token is not guessed, and its bytes do not count."""
    T, tokens = model.config.block_size, torch.tensor(model.tokenizer.encode(text))
    if len(tokens) < 2:
        fail("a text of two tokens or more is needed: the first is not guessed")
    # Rows of T + 1 tokens; the last of a row is also the first of the next. Padded with -100, which
    # cross_entropy leaves out of its sum.
    rows = F.pad(tokens, (0, -(len(tokens) - 1) % T), value=-100).unfold(0, T + 1, T)
    nats, rows = 0.0, rows.to(model.head.weight.device)
    with evaluating(model):
        for some in rows.split(max(1, 4096 // T)):
            logits = model(some[:, :-1].clamp(min=0)).flatten(0, 1).float()       # (B * T, V)
            nats += F.cross_entropy(logits, some[:, 1:].flatten(), reduction="sum").item()
    return nats / len(model.tokenizer.decode(tokens[1:].tolist()))


# ==== 4. Training =================================================================================
# train, at the end of the chapter, is the loop. Two optimisers share the work, each doing what
# it is good at. Run (in the plumbing) does the rest: seeds, shuffling, checkpoints, stopping.


class Muon(torch.optim.Optimizer):
    """For the matrices in the blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A matrix's update (SVD: U S V^T) has, as a rule, few strong directions and many weak ones, and
    the strong take nearly all of the step. Muon steps by about U V^T, all directions alike. No SVD
    is needed: a round  x <- a x + b (x x^T) x + c (x x^T)^2 x  makes each singular value s into
    a s + b s^3 + c s^5, and three bring all but small ones to about 0.7 to 1.2. Three do better
    here than the usual five, which cost more. (torch.optim.Muon is slow on a CPU.) Steps of tall
    matrices are larger, so that each of their outputs changes as much as those of square ones."""

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            lr, wide = self.param_groups[0]["lr"], p.shape[0] < p.shape[1]
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)     # a mean of gradients ...
            x = p.grad.lerp(momentum, 0.95)                   # ... and a little more of the newest
            x = (x if wide else x.mT) / (x.norm() + 1e-7)             # singular values at most 1
            for _ in range(3):
                square = x @ x.mT
                x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
            p.mul_(1 - 0.1 * lr)                                                    # weight decay
            p.sub_(x if wide else x.mT, alpha=lr * max(1, p.shape[0] / p.shape[1])**0.5)


def make_optimizers(model):
    """Muon for the blocks' matrices; AdamW, as Muon's author advises, for embedding, head, norms.
    Every parameter is in exactly one."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return Muon(matrices), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True)


def schedule(progress):
    """Share of the peak learning rate at ``progress`` 0 to 1: a short ramp, then down to zero."""
    return min(1.0, progress / 0.02) * (1 - progress)


def draw_dropout(config):
    """(B, 2 * layers + 1, 1, W): 0 for a share of ``dropout``, else scaled so the mean is 1. It
    multiplies what embedding, attention and MLP add to the stream. No number can be relied on, so
    less is learned by heart (Srivastava et al. 2014, JMLR 15). One mask serves all tokens of a
    stretch (Gal, Ghahramani 2015, arXiv:1512.05287). It is drawn with the batch, so it is the same
    in however many parts or processes the batch is computed."""
    keep = torch.full((config.batch_size, 2 * config.layers + 1, 1, config.width), 1.0)
    return torch.bernoulli(keep - config.dropout) / (1 - config.dropout)


def gradients(model, batch, keep, parts=1):
    """Tokens (B, T + 1) -> the mean loss of all guesses, in nats; its gradients are in p.grad. A
    batch too large for the memory comes in parts, whose gradients add up to those of the whole."""
    total = torch.zeros((), device=batch.device)
    for some, k in zip(batch.chunk(parts), keep.chunk(parts), strict=True):
        with torch.autocast(batch.device.type, torch.bfloat16, batch.device.type == "cuda"):
            logits = model(some[:, :-1], keep=k)                                    # (b, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten(), reduction="sum")
        loss = loss / batch[:, 1:].numel()
        loss.backward()
        total += loss.detach()
    return total


def train(config):
    """Train what is left to train, judge, write, all into ``config.out`` -> the GPT in eval mode.
    Raises UserError (wrong data, setting, checkpoint or folder), FloatingPointError (it diverged),
    KeyboardInterrupt (it was stopped; the same call goes on)."""
    read_prompt(config)
    device = pick_device(config.device)
    torch.manual_seed(seed_of(config.seed, "weights"))
    model = GPT(config).to(device)
    muon, adamw = make_optimizers(model)
    run = Run(config, model=model, optimizer_muon=muon, optimizer_adamw=adamw)
    run.agree = highest  # of several processes all stop, or none
    if not run.finished:
        with leader_first():
            text, held_out = load_text(config.data, config.data_dir)
        tokens, T = prepare(run, model, text, held_out), config.block_size
        tokens_per_byte = len(tokens) / len(text.encode())
        compiled = torch.compile(model) if config.compile else model
        for step in run.steps():
            # Stretches in this epoch's order, shifted by up to T - 1: no two epochs cut alike.
            starts = run.batch_rows(len(tokens) // T - 1) * T
            starts = my_share(starts + torch.randint(T, starts.shape))
            batch = tokens[starts[:, None] + torch.arange(T + 1)].to(device)        # (B, T + 1)
            keep = my_share(draw_dropout(config)).to(device)
            # Guess every next token, be told the answer, and see which way to move every weight.
            loss = gradients(compiled, batch, keep, config.micro_batches)
            average([loss, *(p.grad for p in model.parameters())])  # over all processes, if several
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1)
            run.log(nats_per_byte=loss * tokens_per_byte, grad_norm=grad_norm)
            rate = config.learning_rate * schedule((step + 0.5) / config.steps)
            for optimizer, share in ((muon, 1), (adamw, 1 / 3)):
                optimizer.param_groups[0]["lr"] = rate * share
                optimizer.step()
                optimizer.zero_grad()
            if run.due(5):  # now and then, to see how it is getting on; 20,000 letters will do
                run.log(held_out=nats_per_byte(model, held_out[:20000]))
                new = config.prompt + generate(model, config.prompt, seed=config.seed)
                run.write("samples.txt", new.encode("utf-8", "replace"))
        nats = nats_per_byte(model, held_out)
        run.finish({"test_nats_per_byte": nats, "test_bits_per_byte": nats / math.log(2)})
    if leading():
        write_samples(run, model)
    run.report()
    return model.eval()


# ==== 5. Writing ==================================================================================
# Predict, draw, append, predict again. A token's keys and values depend on nothing to its
# right, so they never change: they are kept (the KV cache), and only the newest token is computed.
# When block_size tokens are in view, the model goes on from the last half of them: positions count
# from 0 again, and one pass fills a new cache. So a token costs no more late in a long text.


class Context:
    """What the model has in view as it writes: ``tokens``, at most block_size of them."""

    def __init__(self, model):
        self.model, self.tokens, self.cache = model, [], []
        self.known = 256 + (model.tokenizer.merges[:, 0] >= 0).sum().item()  # of short texts fewer

    def read(self, new):
        """Append a list of tokens -> logits of the next one, as model(tokens) would say: (V,), but
        without tokens of merges that were never learned."""
        size = self.model.config.block_size
        if len(self.tokens) + len(new) > size:
            last = size // 2 if self.tokens else size  # a long prompt may fill all of it
            new, self.tokens = (self.tokens + new)[-last:], []
        if not self.tokens:
            self.cache = [[] for _ in self.model.blocks]
        self.tokens = self.tokens + new
        with torch.no_grad():
            x = torch.tensor([new], device=self.model.head.weight.device)
            return self.model(x, self.cache)[0, -1, :self.known].float().cpu()


def choose(logits, temperature, top_k, top_p, generator=None):
    """Logits (V,) -> a token, drawn from softmax(logits / temperature). One unlikely token is rare,
    but there are many of them, and one can derail a text. So only the top_k likeliest may be
    drawn (0: all), and only the fewest that make up a share of top_p of all probability (the
    nucleus: Holtzman et al. 2019, arXiv:1904.09751)."""
    if temperature < 1e-6:
        return logits.argmax().item()
    p, order = (logits / temperature).softmax(0).sort(descending=True)
    keep = p.cumsum(0) - p < (top_p if top_p < 1 else 2)  # likelier ones sum to less (1: keep all)
    keep[0] = True
    if top_k:
        keep[top_k:] = False
    return order[torch.multinomial(p * keep, 1, generator=generator)].item()


def stream(model, prompt, tokens, temperature=0.7, top_k=0, top_p=0.95, seed=None):
    """Yield the continuation of ``prompt`` token by token, as str: a piece that ends inside a
    character waits for the rest of it. An empty prompt stands for two line ends."""
    if not temperature >= 0 or top_k < 0 or not 0 <= top_p <= 1:
        fail("temperature and top_k are 0 or more, top_p is from 0 to 1")
    noise = None if seed is None else seeded(seed, "text")
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    context, pieces = Context(model), model.tokenizer.pieces()
    new = model.tokenizer.encode(prompt or "\n\n")
    for _ in range(tokens):
        new = [choose(context.read(new), temperature, top_k, top_p, noise)]
        yield utf8.decode(pieces[new[0]])


def generate(model, prompt, tokens=200, temperature=0.7, top_k=0, top_p=0.95, seed=None):
    """-> str, the continuation alone. The same seed gives the same text; None draws from torch's
    global generator."""
    return "".join(stream(model, prompt, tokens, temperature, top_k, top_p, seed))


def explain(model, prompt, count=10):
    """The likeliest next tokens after ``prompt`` -> a list of (token as bytes, probability)."""
    logits = Context(model).read(model.tokenizer.encode(prompt or "\n\n"))
    p, order = logits.softmax(0).topk(min(count, len(logits)))
    pieces = model.tokenizer.pieces()
    return [(pieces[t], q) for t, q in zip(order.tolist(), p.tolist(), strict=True)]


def load(path, device="cpu"):
    """The model of a checkpoint, in eval mode. UserError if it is not gpt.py's."""
    state = read_checkpoint(path)
    model = GPT(Config(**state["config"]))
    with fitting(path):
        model.load_state_dict(state["model"])
    return model.to(device).eval()


def main(argv=None):
    """The command line, ``argv`` or the process's own -> exit status (see launch)."""
    with ranks():
        return launch(argv, train)


# ==== Plumbing: blocks that stand, equal to the letter, in several files of this collection =======
# (What this script alone has comes last.) They ask of this file its name, the settings that are
# fixed once training has begun, and those on whose change a trained model is judged again.
NAME = "gpt"
FIXED = ("vocab_size", "block_size", "layers", "heads", "width", "data", "batch_size", "seed")
JUDGING = ()


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


# ==== Files and the terminal ======================================================================
KINDS = ".txt .md .rst .tex .html .csv .json .toml .py .c .h .cpp .rs .go .java .js .ts".split()
SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt", "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")


def load_text(name, data_dir):
    """-> two str, to train on and held out: the last 10 %; of the manual, some topics."""
    path = Path(data_dir, "shakespeare.txt") if name == "shakespeare" else Path(name)
    if name == "manual":
        return load_manual()
    if name == "shakespeare" and not path.exists():
        download([SHAKESPEARE[0]], path, SHAKESPEARE[1])
    if not path.exists():
        fail(f"no data {name}: give manual, shakespeare, a text file, or a folder of them")
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in KINDS and p.is_file()
                       and not any(part.startswith(".") for part in p.relative_to(path).parts)
                       and not (p.parent / "checkpoint.pt").exists())  # what this script wrote
    text = "\n".join(read_text(path) for path in paths)
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


def read_text(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is no text in UTF-8: byte {error.start} is {error.reason}")
    return text if "\0" not in text else fail(f"{path} is no text: it has a NUL byte")


def load_manual():
    """The topics of Python's help(), about 0.4 MB of English and code; a tenth of them, chosen by
    their names, held out. They repeat each other: a paragraph counts once, where it stands first.
    On Python 3.11, 1 % of the characters held out are in lines that training has, too."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        fail("this Python has no manual (pydoc_data.topics): give --data a text file")
    seen, train, held_out = {""}, [], []
    for name, topic in sorted(topics.items()):
        paragraphs = {" ".join(p.split()): p.rstrip() for p in topic.split("\n\n")}
        fresh = [paragraph for words, paragraph in paragraphs.items() if words not in seen]
        seen |= paragraphs.keys()
        (train if zlib.crc32(name.encode()) % 10 else held_out).append("\n\n".join(fresh))
    return "\n\n\n".join(train), "\n\n\n".join(held_out)


def read_prompt(config):
    """--prompt -: what comes on stdin, less the end of its last line."""
    if config.prompt == "-" and leading():
        typed = sys.stdin.buffer.read().decode("utf-8", "replace")
        config.prompt = typed.removesuffix("\n").removesuffix("\r")


def prepare(run, model, text, held_out):
    """-> the tokens of ``text`` (N,). Merges are learned when a run begins, later restored."""
    if run.step == 0:
        model.tokenizer.learn(text)
    tokens, others = (torch.tensor(model.tokenizer.encode(t)) for t in (text, held_out))
    if len(tokens) < 2 * run.config.block_size + 1 or len(others) < 2:
        fail(f"--data {run.config.data} has too little text: {len(tokens)} tokens to train on, "
             f"{len(others)} held out, where a block is {run.config.block_size}")
    run.same_data(tokens, others)
    return tokens


def write_samples(run, model):
    """Stream texts to the terminal, and into samples.txt; or the list that --explain asks for."""
    config, prompt, texts = run.config, run.config.prompt, []
    with suppress(AttributeError):  # a terminal may lack characters; a notebook lacks the method
        sys.stdout.reconfigure(errors="replace")
    if config.explain:
        print(f"after {prompt!r}:")
        for piece, p in explain(model, prompt):
            print(f"{p:7.1%}  {piece.decode('utf-8', 'replace')!r}")
        return
    how = config.tokens, config.temperature, config.top_k, config.top_p
    for i in range(config.samples):
        texts.append(prompt)
        print(prompt, end="", flush=True)
        for piece in stream(model, prompt, *how, seed=config.seed + i):
            print(piece, end="", flush=True)
            texts[-1] += piece
        print("\n")
    run.write("samples.txt", f"\n{'-' * 80}\n".join(texts).encode("utf-8", "replace"))


if __name__ == "__main__":
    sys.exit(main())
