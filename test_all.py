"""The tests: every script as its users run it, and the mathematics. ``pytest`` in this folder."""
import ast
import csv
import difflib
import gzip
import hashlib
import io
import math
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # here, and in all processes: networks this tiny gain nothing

import cyclegan  # before torch, whose import it keeps from warning where numpy is missing
import ddpm
import gan
import gpt
import vae

import torch
import torch.nn.functional as F
from torch import distributions, nn

HERE = Path(__file__).resolve().parent
SCRIPTS = [p for p in sorted(HERE.glob("*.py")) if p.name != "test_all.py"]
pytestmark = pytest.mark.filterwarnings("error")  # neither tests nor scripts may warn


# ==== The house ===================================================================================


def test_blocks_are_equal_to_the_letter():
    """Code that stands in several files is in marked blocks, and a mend in one mends them all."""
    seen = {}
    for script in SCRIPTS:
        text = script.read_text()
        blocks = re.findall(r"^# -+ block: (\w+) .*?\n(.*?)^# -+ end block -+$", text, re.M | re.S)
        assert len(blocks) == len(re.findall(r"^# -+ end block", text, re.M)) >= 1, script
        for name, body in blocks:
            first, where = seen.setdefault(name, (body, script.name))
            diff = difflib.unified_diff(first.splitlines(), body.splitlines(), where, script.name)
            assert first == body, "\n".join(diff)
    assert {"runs", "pictures", "images", "ranks"} <= set(seen)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_stands_alone(script):
    """It imports the standard library, torch and tqdm; header and licence travel with it."""
    text = script.read_text()
    assert text.startswith("# /// script\n") and "# SPDX-License-Identifier: MIT" in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                root = name.split(".")[0]
                allowed = {"torch", "tqdm"} | ({"PIL"} if node.col_offset else set())
                assert root in sys.stdlib_module_names | allowed, (node.lineno, name)


def test_commands_in_print_are_understood(tmp_path, monkeypatch):
    """Every ``python vae.py ...`` in README and docstrings has good flags and values."""
    monkeypatch.chdir(tmp_path)
    count = {vae: 0, gpt: 0, ddpm: 0, gan: 0, cyclegan: 0}
    for text in [HERE / "README.md", *SCRIPTS]:
        whole = re.sub(r"\\\n +--", " --", text.read_text())
        commands = r"(?:python|torchrun \S+) (vae|gpt|ddpm|gan|cyclegan)\.py([^\n`|]*)"
        for name, line in re.findall(commands, whole):
            words = shlex.split(re.split(r"\s{3,}|&&|;|\.\.\.", line)[0])
            count[globals()[name]] += bool(globals()[name].command_line(words))
    assert min(count.values()) >= 5, count


def test_importing_starts_nothing(tmp_path):
    names = ", ".join(script.stem for script in SCRIPTS)
    code = f"import sys; sys.argv = ['x', '--no']; import {names}; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, timeout=60,
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    assert "'PIL'" not in done.stdout and "'torchvision'" not in done.stdout


# ==== Data ========================================================================================


def idx_bytes(tensor):
    return (bytes([0, 0, 8, tensor.dim()]) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
            + bytes(tensor.flatten().tolist()))


def write_idx_folder(folder, train=200, test=45):
    """A tiny data set in the format of MNIST, two of its files plain and two compressed."""
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        pictures, labels = vae.draw_digits(count, part)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(pictures[:, 0]))
        packed = gzip.compress(idx_bytes((labels % 10).byte()), mtime=0)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(packed)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("data") / "tiny")


def test_idx_files_are_read(data):
    images = vae.load_images(str(data), "")
    pictures, labels = vae.draw_digits(200, "train")
    assert images.train.dtype == torch.uint8 and torch.equal(images.train, pictures)
    assert torch.equal(images.train_labels, labels % 10) and len(images.test) == 45
    assert images.names[3] == "three"


def test_letters_have_labels_above_nine(tmp_path):
    folder = write_idx_folder(tmp_path / "d", 20, 5)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(torch.tensor([1, 26, 3, 10, 11])))
    images = ddpm.load_images(str(folder), "")
    assert [images.names[i] for i in images.test_labels] == ["one", "26", "three", "10", "11"]


def test_a_folder_is_the_same_however_it_is_written():
    for data in ("pictures/", "./pictures", "a/../pictures"):
        config = vae.Config(data=data)
        assert (config.data, config.out) == ("pictures", str(Path("out", "vae-pictures")))
    assert cyclegan.Config(data="one/,./two").data == "one,two"


@pytest.mark.parametrize("labels", [b"\0\0\x08\0\5", b"\0\0\x08\2\0\0\0\5\0\0\0\1" + b"\1" * 5])
def test_labels_are_one_for_each_picture(tmp_path, labels):
    folder = write_idx_folder(tmp_path / "d", 20, 5)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(vae.UserError, match="a label for each"):
        vae.load_images(str(folder), "")


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:3], lambda b: b[:11], lambda b: b[:-1], lambda b: b + b"\0",
    lambda b: b[:2] + b"\x0d" + b[3:], lambda b: b"\x89PNG" + b[4:],
    lambda b: b[:3] + b"\xff" + b[4:], lambda b: b[:4] + b"\xff" * 12 + b[16:],
    lambda b: b[:4] + b"\0" * 12 + b[16:],
    lambda b: b[:12] + struct.pack(">I", 29) + b[16:], lambda b: b[:3] + b"\1" + b[4:]])
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files_are_refused(tmp_path, damage, packed, capsys):
    folder = write_idx_folder(tmp_path / "d", 20, 5)
    path = folder / "t10k-images-idx3-ubyte"
    content = damage(path.read_bytes())
    path.unlink()
    (folder / (path.name + ".gz" if packed else path.name)).write_bytes(
        gzip.compress(content)[:-9] if packed and len(content) % 2 else
        gzip.compress(content) if packed else content)
    assert vae.main(["--data", str(folder), "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, "d")
    assert not (tmp_path / "o").exists()


def one_line(capsys, *needles, script="vae"):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{script}.py: error: "), error
    assert all(needle in error for needle in needles), error


def test_download(tmp_path, monkeypatch):
    """A mirror is dead, the next lies, the third is right; then nothing is fetched again."""
    source = write_idx_folder(tmp_path / "source", 20, 5)
    for path in list(source.iterdir()):
        if path.suffix != ".gz":
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "liar").mkdir()
    for name in vae.IDX_FILES:
        (tmp_path / "liar" / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
    mirrors = [f"file://{tmp_path}/{name}/" for name in ("dead", "liar", "source")]
    packed = [(source / f"{name}.gz").read_bytes() for name in vae.IDX_FILES]
    sha256 = [hashlib.sha256(gzip.decompress(p)).hexdigest() for p in packed]
    md5 = [hashlib.md5(p).hexdigest() for p in packed]
    monkeypatch.setattr(vae, "PUBLISHED", {"mnist": (*mirrors, sha256), "fashion": (*mirrors, md5)})
    for name in ("mnist", "fashion"):
        first = vae.load_images(name, str(tmp_path / "data"))
        assert torch.equal(first.train, vae.load_images(str(source), "").train)
        assert first.names[0] == {"mnist": "zero", "fashion": "t-shirt"}[name]
    monkeypatch.setattr(vae, "download", None)  # a second fetch would fail
    assert torch.equal(vae.load_images("mnist", str(tmp_path / "data")).test, first.test)
    # Compressed in another way the content is still right; another content is not.
    path = tmp_path / "data" / "mnist" / f"{vae.IDX_FILES[2]}.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    assert torch.equal(vae.load_images("mnist", str(tmp_path / "data")).test, first.test)
    path.write_bytes(gzip.compress(idx_bytes(first.test[:, 0] // 2)))
    with pytest.raises(vae.UserError, match="delete it"):
        vae.load_images("mnist", str(tmp_path / "data"))


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "PUBLISHED", {"mnist": (f"file://{tmp_path}/dead/", ["0" * 64] * 4)})
    with pytest.raises(vae.UserError, match="without a network"):
        vae.load_images("mnist", str(tmp_path / "data"))
    assert not list(tmp_path.rglob("*"))


def test_a_missing_file_is_named(tmp_path):
    folder = write_idx_folder(tmp_path / "d", 5, 5)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(vae.UserError, match="holds no t10k-labels-idx1-ubyte"):
        vae.load_images(str(folder), "")


def test_published_checksums_are_in_order():
    """Four for each set, sha256 or md5, and no two alike."""
    for *mirrors, digests in vae.PUBLISHED.values():
        assert len(mirrors) == 2 and len(set(digests)) == 4
        assert {len(digest) for digest in digests} <= {32, 64}


def test_drawn_digits_are_what_their_labels_say():
    x, labels = vae.draw_digits(3000, 5)
    assert x.shape == (3000, 1, 28, 28) and x.dtype == torch.uint8 and labels.unique().numel() == 40
    again, other = vae.draw_digits(3000, 5)[0], vae.draw_digits(3000, 6)[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert len({bytes(p.flatten().tolist()) for p in x}) == 3000  # drawn, not stamped
    x = x.float() / 255
    digit, bold, slanted = labels % 10, labels // 10 % 2 == 1, labels // 20 == 1
    ink = x.sum((1, 2, 3))
    for d in range(10):
        assert ink[(digit == d) & bold].mean() > 1.4 * ink[(digit == d) & ~bold].mean()
    # slant: the covariance of x and y over the ink, as a share of the variance of y
    down, right = torch.meshgrid(torch.arange(28.), torch.arange(28.), indexing="ij")
    weight = x[:, 0] / ink[:, None, None]
    right = right - (weight * right).sum((1, 2), keepdim=True)
    down = down - (weight * down).sum((1, 2), keepdim=True)
    shear = -(weight * right * down).sum((1, 2)) / (weight * down**2).sum((1, 2))
    for d in range(10):
        assert shear[(digit == d) & slanted].mean() > shear[(digit == d) & ~slanted].mean() + 0.25
    # the digit: the nearest training picture of 2500 nearly always shows the same one
    nearest = torch.cdist(x[2500:].flatten(1), x[:2500].flatten(1)).argmin(1)
    assert (digit[:2500][nearest] == digit[2500:]).float().mean() > 0.9


def test_the_built_in_set(monkeypatch):
    """60,000 and 10,000 pictures (here a hundredth of them) from different seeds, forty kinds."""
    draw, seeds = vae.draw_digits, set()
    monkeypatch.setattr(vae, "draw_digits",
                        lambda count, seed: seeds.add(seed) or draw(count // 100, seed))
    images = vae.load_images("digits", "")
    assert len(seeds) == 2
    assert len(images.train) == 600 and len(images.test) == 100 and len(set(images.names)) == 40
    assert not torch.equal(images.train[:100], images.test)
    assert images.names[3] == "thin upright three" and images.names[19] == "bold upright nine"
    assert images.names[20] == "thin slanted zero"


# ==== Pictures ====================================================================================


def decode_png(content):
    """An independent decoder: -> still, frames, each (height, width, channels) of nested bytes."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, []
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at:at + 8])
        body, crc = content[at + 8:at + 8 + size], content[at + 8 + size:at + 12 + size]
        assert crc == struct.pack(">I", zlib.crc32(kind + body))
        chunks.append((kind, body))
        at += 12 + size
    assert chunks[0][0] == b"IHDR" and chunks[-1] == (b"IEND", b"")
    width, height, depth, color, *rest = struct.unpack(">2I5B", chunks[0][1])
    channels = {0: 1, 2: 3}[color]
    assert depth == 8 and rest == [0, 0, 0]

    def pixels(data):
        raw, above, rows = zlib.decompress(data), bytes(width * channels), []
        assert len(raw) == height * (1 + width * channels)
        for start in range(0, len(raw), 1 + width * channels):
            line = raw[start + 1:start + 1 + width * channels]
            assert raw[start] in (0, 2)
            if raw[start]:
                line = bytes((a + b) % 256 for a, b in zip(line, above, strict=True))
            above = line
            rows.append(list(above))
        return torch.tensor(rows, dtype=torch.uint8).view(height, width, channels)

    still = pixels(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    frames, numbers = [], []
    for kind, body in chunks:
        if kind in (b"fcTL", b"fdAT"):
            numbers.append(struct.unpack(">I", body[:4])[0])
        if kind == b"fcTL":
            assert struct.unpack(">4I", body[4:20]) == (width, height, 0, 0) and len(body) == 26
        if kind == b"fdAT":
            frames.append(pixels(body[4:]))
    assert numbers == list(range(len(numbers)))
    control = [body for kind, body in chunks if kind == b"acTL"]
    assert control == ([struct.pack(">2I", len(frames), 0)] if frames else [])
    return still, frames


@pytest.mark.parametrize("channels", [1, 3])
def test_png_and_animation(channels):
    sheets = torch.randint(0, 256, (4, 9, 14, channels), dtype=torch.uint8)
    assert torch.equal(decode_png(vae.png(sheets[0]))[0], sheets[0])
    still, frames = decode_png(vae.png(sheets[0], list(sheets[1:])))
    assert torch.equal(still, sheets[0]) and torch.equal(torch.stack(frames), sheets[1:])


@pytest.mark.parametrize("n", [1, 7, 10, 11])
def test_grid_of_any_number(n):
    images = torch.rand(n, 1, 6, 5)
    sheet = vae.grid(images, 10, scale=1)[:, :, 0]
    columns = min(n, 10)
    assert sheet.shape == (-(-n // 10) * 7, columns * 6)
    for i in range(n):
        row, column = divmod(i, columns)
        place = sheet[row * 7:row * 7 + 6, column * 6:column * 6 + 5]
        assert torch.equal(place, (images[i, 0] * 255).round().byte())
    assert torch.equal(vae.grid(images, 10, scale=2)[::2, ::2, 0], sheet)


# ==== The mathematics of vae.py ===================================================================


def tiny_vae(**settings):
    """A model whose posterior is not the prior, and whose decoder heeds its code."""
    torch.manual_seed(0)
    model = vae.VAE(vae.Config(**({"latent_dim": 3, "width": 4} | settings)))
    with torch.no_grad():
        for linear in (model.encoder[-1], model.decoder[0]):
            linear.weight.mul_(3)
        mean, logvar = model.encoder[-1].bias.chunk(2)
        mean.add_(0.7)
        logvar.sub_(0.4)
    return model


def test_kl_divergence():
    mean, logvar = torch.randn(2, 50, 7)
    q = distributions.Normal(mean, (logvar / 2).exp())
    expected = distributions.kl_divergence(q, distributions.Normal(0., 1.)).sum(1)
    torch.testing.assert_close(vae.kl_divergence(mean, logvar), expected)
    assert (vae.kl_divergence(torch.zeros(4, 7), torch.zeros(4, 7)) == 0).all()
    assert (expected > 0).all()


def test_log_bernoulli_is_a_sum_over_pixels():
    logits, x = 3 * torch.randn(5, 1, 28, 28), torch.rand(5, 1, 28, 28).round()
    expected = distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(vae.log_bernoulli(logits, x), expected)
    assert vae.log_bernoulli(torch.full((1, 1, 28, 28), 100.), torch.zeros(1, 1, 28, 28)).isfinite()


def test_elbo_by_hand_and_independent_of_the_batch():
    model, x = tiny_vae(), torch.rand(6, 1, 28, 28).round()
    torch.manual_seed(1)
    reconstruction, kl = vae.elbo_terms(model, x)
    torch.manual_seed(1)
    mean, logvar = model.encode(x)
    z = mean + (logvar / 2).exp() * torch.randn(6, 3)
    p = model.decode(z).sigmoid().double()
    by_hand = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction.double(), by_hand, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(kl, ((mean**2 + logvar.exp() - 1 - logvar) / 2).sum(1))
    # The autoencoder draws nothing and pays nothing; its loss is the same for a batch given twice.
    ae = tiny_vae(kind="ae")
    once, twice = vae.elbo_terms(ae, x), vae.elbo_terms(ae, torch.cat([x, x]))
    torch.testing.assert_close(once[0].mean(), twice[0].mean())
    assert (once[1] == 0).all() and once[0].shape == once[1].shape == (6,)
    torch.testing.assert_close(once[0], vae.log_bernoulli(ae.decode(ae.encode(x)[0]), x))


def test_gradient_reaches_the_encoder_through_the_draw():
    model, x = tiny_vae(), torch.rand(6, 1, 28, 28).round()
    vae.elbo_terms(model, x)[0].sum().backward()
    assert model.encoder[-1].weight.grad.abs().amax(1).gt(0).all()  # both of means and of variances


def test_bound_grows_with_k_and_begins_at_the_elbo():
    model, x = tiny_vae(), torch.rand(8, 1, 28, 28).round()
    log_w = vae.log_weights(model, x, 64, torch.Generator().manual_seed(0)).detach()
    bounds = [(log_w.view(8, -1, k).logsumexp(2) - math.log(k)).mean(1) for k in (1, 4, 16, 64)]
    for small, large in zip(bounds, bounds[1:], strict=False):
        assert (large >= small - 1e-4).all()
    assert (bounds[-1] > bounds[0] + 0.1).any()
    torch.testing.assert_close(bounds[0], log_w.mean(1))
    once = vae.log_weights(model, x, 1, vae.seeded(3, "draws"))[:, 0]
    torch.testing.assert_close(vae.log_likelihood(model, x, 1, seed=3), once.detach())
    assert vae.log_likelihood(model, x, 1500, seed=3).shape == (8,)  # more draws than go at once


def test_mean_log_weight_is_the_elbo():
    """E[log w] = reconstruction - KL: the closed form and the draws must agree, sign and all."""
    model, x = tiny_vae(), torch.rand(2, 1, 28, 28).round()
    torch.manual_seed(0)
    with torch.no_grad():
        log_w = vae.log_weights(model, x, 1000).mean(1)
        terms = [vae.elbo_terms(model, x.repeat(125, 1, 1, 1)) for _ in range(8)]
    expected = torch.stack([(r - kl).view(125, 2).mean(0) for r, kl in terms])
    spread = expected.std(0) / 8**0.5
    assert ((log_w - expected.mean(0)).abs() < 5 * (spread + spread) + 0.05).all()


def test_log_likelihood_against_quadrature():
    """With one number in the code, log p(x) is an integral over a line, which a sum can do."""
    model, x = tiny_vae(latent_dim=1), torch.rand(3, 1, 28, 28).round()
    z = torch.linspace(-8, 8, 801)
    with torch.no_grad():
        fit = torch.stack([vae.log_bernoulli(model.decode(z[:, None]), picture) for picture in x])
    prior = distributions.Normal(0., 1.).log_prob(z)
    exact = (fit + prior).logsumexp(1) + math.log(16 / 800)
    estimate = vae.log_likelihood(model, x, 2000, seed=0)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)


def test_epochs_visit_every_row_once():
    for count, size in ((10, 4), (7, 7), (3, 8)):  # a short last batch, an exact one, more than all
        run = vae.Run.__new__(vae.Run)
        run.config, seen = vae.Config(batch_size=size), []
        for run.step in range(2 * count):
            rows = run.batch_rows(count)
            assert len(rows) == size
            seen += rows.tolist()
        for start in range(0, len(seen) - count + 1, count):
            assert sorted(seen[start:start + count]) == list(range(count))
        assert seen[:count] != seen[count:2 * count] or count < 4


def test_chance_differs_from_step_to_step_and_is_the_same_again(tmp_path):
    def chance(**settings):
        out = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        run = vae.Run(vae.Config(out=out, steps=5, **settings))
        return [torch.rand(()).item() for _ in run.steps()]

    once, again, other = chance(), chance(), chance(seed=1)
    assert once == again and len({*once, *other}) == 10


def test_judge_weighs_a_short_last_batch_rightly(data):
    images = vae.load_images(str(data), "")
    model = tiny_vae(kind="ae", test_images=45)
    figures = vae.judge(model, images.test)
    x = vae.scaled(images.test, vae.seeded("test"))
    with torch.no_grad():
        expected = vae.log_bernoulli(model.decode(model.encode(x)[0]), x).mean().item()
    assert figures == {"test_reconstruction": pytest.approx(expected, rel=1e-5)}
    model = tiny_vae(test_images=45, draws=50)  # 20, 20 and 5 at a time
    figures = vae.judge(model, images.test)
    with torch.no_grad():
        expected = vae.kl_divergence(*model.encode(x)).mean().item()
    assert figures["test_kl"] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        g = vae.seeded("draws")
        log_w = torch.cat([vae.log_weights(model, some, 50, g) for some in x.split(20)]).double()
    expected = log_w.exp().mean(1).log().mean().item()  # L_50, written as in the paper
    assert figures["test_bound"] == pytest.approx(expected, rel=1e-5)
    assert figures["test_elbo"] <= figures["test_bound"] and figures["test_kl"] > 0
    difference = figures["test_reconstruction"] - figures["test_kl"]
    assert figures["test_elbo"] == pytest.approx(difference)


def test_autoencoder_samples_from_its_codes(data):
    pictures = vae.load_images(str(data), "").train
    model = tiny_vae(kind="ae")
    vae.fit_gaussian(model, pictures)
    codes = vae.mean_codes(model, pictures)
    torch.testing.assert_close(model.prior_mean, codes.mean(0))
    factor = model.prior_factor
    covariance = codes.T.cov(correction=0) + 1e-6 * torch.eye(3)
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-3, atol=1e-5)
    with pytest.raises(vae.UserError, match="no likelihood"):
        vae.log_likelihood(model, torch.zeros(1, 1, 28, 28), 1)
    vae.fit_gaussian(model, pictures[:1])  # of one code there is a mean and no spread
    assert model.prior_factor.abs().max() < 0.01 and model.prior_factor.isfinite().all()
    other = tiny_vae()
    vae.fit_gaussian(other, pictures)
    eps = torch.randn(4, 3)
    assert torch.equal(other.place(eps), eps)  # the VAE's prior stays N(0, I)


def test_sampling():
    model = tiny_vae().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = vae.sample(model, 5, seed=1)
    assert first.shape == (5, 1, 28, 28) and 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, vae.sample(model, 5, seed=1))
    assert not torch.equal(first, vae.sample(model, 5, seed=2))
    assert not torch.equal(vae.sample(model, 5), vae.sample(model, 5))
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    z = torch.randn(6, 3)
    torch.testing.assert_close(model.decode(z)[:1], model.decode(z[:1]), rtol=0, atol=1e-4)


def test_residual_blocks_begin_small():
    torch.manual_seed(0)
    block, x = vae.Residual(64), torch.randn(4, 64, 7, 7)
    assert 0 < (block(x) - x).std() < 0.1


# ==== vae.py as its users run it ==================================================================


def arguments(data, out, **settings):
    settings = {"data": data, "out": out, "steps": 45, "batch_size": 16, "width": 4,
                "latent_dim": 2, "draws": 3, "test_images": 30, "samples": 7} | settings
    return [word for name, value in settings.items() if value is not None
            for word in (vae.flag(name), str(value))]


@pytest.fixture(scope="session")
def reference(data, tmp_path_factory):
    """One unbroken run, which several tests look at and none may change."""
    out = tmp_path_factory.mktemp("reference")
    assert vae.main(arguments(data, out)) == 0
    return out


def rows_of(out):
    """metrics.csv without the seconds, which differ from run to run."""
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def steps_taken(state):
    """The number of updates as the optimisers counted them."""
    optimizers = [state[name] for name in state if name.startswith("optimizer")]
    (count,) = {int(s["step"]) for o in optimizers for s in o["state"].values() if "step" in s}
    return count


def same(a, b):
    """Checkpoints with the same weights and optimiser state, to the bit."""
    def flat(thing):
        if isinstance(thing, dict):
            return [leaf for key in sorted(thing, key=str) for leaf in flat(thing[key])]
        if isinstance(thing, list):
            return [leaf for item in thing for leaf in flat(item)]
        return [thing]

    a, b = ([s[name] for name in s if name.startswith(("model", "optimizer"))] for s in (a, b))
    pairs = zip(flat(a), flat(b), strict=True)
    return all(torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in pairs)


def test_what_a_run_leaves(reference, capsys):
    assert {p.name for p in reference.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.png", "reconstructions.png", "walk.png", "map.png"}
    assert decode_png((reference / "samples.png").read_bytes())[0].shape == (58, 7 * 58, 1)
    assert decode_png((reference / "map.png").read_bytes())[0].shape == (20 * 58, 20 * 58, 1)
    still, frames = decode_png((reference / "walk.png").read_bytes())
    assert len(frames) == 24 and still.shape == frames[0].shape == (3 * 58, 8 * 58, 1)
    rows = rows_of(reference)
    assert [row["step"] for row in rows] == ["20", "40", "45"]
    assert float(rows[0]["loss"]) > float(rows[2]["loss"]) and not rows[0]["test_bound"]
    assert float(rows[2]["test_elbo"]) < float(rows[2]["test_bound"]) < 0


def test_python_names(data, reference):
    model = vae.load(reference / "checkpoint.pt")
    assert not model.training and model.config.latent_dim == 2
    x = vae.scaled(vae.load_images(str(data), "").test[:5])
    mean, logvar = model.encode(x)
    assert mean.shape == logvar.shape == (5, 2) and model.decode(mean).shape == (5, 1, 28, 28)
    assert vae.log_likelihood(model, x, 4, seed=0).shape == (5,)
    picture = decode_png((reference / "samples.png").read_bytes())[0]
    assert torch.equal(picture, vae.grid(vae.sample(model, 7, seed=0), 10))
    config = vae.Config(**(weights(reference)["config"] | {"out": str(reference)}))
    again = vae.train(config).state_dict()  # nothing is left to train
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def kill_and_start_again(script, function, words, out):
    """kill -9 in the 35th call of ``function``, between two rows of metrics.csv, and the command
    again -> its folder, and what the second process printed."""
    code = f"""
import itertools, os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import {script} as script
clock = itertools.count(0, 9)
script.time.perf_counter = lambda: next(clock)  # time flies: a checkpoint every few steps
real, calls = script.{function}, itertools.count()
def killer(*a):
    if next(calls) == 34:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
script.{function} = killer
script.main({words!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    step = weights(out)["step"]
    assert 20 < step <= 34 and step % 20
    (out / "checkpoint.pt.partial").write_bytes(b"half")  # as if killed while writing
    done = subprocess.run([sys.executable, HERE / f"{script}.py", *words], capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"Warning" not in done.stderr and b"Traceback" not in done.stderr
    return out, done.stdout.decode()


def ends_like(out, whole):
    """What was killed on the way is the same as the ``whole`` run, to the bit."""
    assert same(weights(out), weights(whole)) and rows_of(out) == rows_of(whole)
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}
    for path in [*whole.glob("*.png"), *whole.glob("*.txt")]:
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def torchrun(script, words):
    """Two processes, gloo."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            HERE / f"{script}.py", *words]


def stop_ranks(words):
    """SIGTERM to torchrun once gpt.py has printed figures -> exit status, stderr."""
    with subprocess.Popen(torchrun("gpt", words), stderr=subprocess.PIPE) as process:
        shown = b""
        while b"grad_norm" not in shown:  # the bar has its first figures
            shown += os.read(process.stderr.fileno(), 100)
            assert process.poll() is None, shown
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=60)[1].decode(), process.returncode


@pytest.fixture(scope="session", autouse=True)
def beside(request, data, text, piles, tmp_path_factory):
    """Jobs in processes of their own: they start with the first test, and go on beside the others.
    By the name of the test that asks for the result."""
    place = tmp_path_factory.mktemp("beside")

    def killed(script, function, words, data):
        out = place / script
        return kill_and_start_again(script, function, words(data=data, out=out), out)

    def ranks(script, words, data):
        out = place / f"{script}-ranks"
        command = torchrun(script, words(data, out, steps=10))
        return subprocess.run(command, capture_output=True, text=True, timeout=120), out

    def stopped():
        out = place / "stop"
        return stop_ranks(gpt_words(text, out, steps=10**6)), out

    jobs = {
        "test_killed_and_started_again": (killed, "vae", "elbo_terms", arguments, data),
        "test_gpt_killed_and_started_again": (killed, "gpt", "gradients", gpt_words, text),
        "test_two_ranks_end_where_one_process_does": (ranks, "gpt", gpt_words, text),
        "test_a_stop_reaches_all_ranks": (stopped,),
        "test_gpt_on_its_built_in_data": (newcomer, place / "newcomer"),
        "test_ddpm_killed_and_started_again": (killed, "ddpm", "objective", ddpm_words, data),
        "test_two_ranks_of_ddpm_end_where_one_process_does": (ranks, "ddpm", ddpm_words, data),
        "test_gan_killed_and_started_again": (killed, "gan", "forger_loss", gan_words, data),
        "test_cyclegan_killed_and_started_again": (
            killed, "cyclegan", "translators_turn", cycle_words, piles)}
    names = {item.name for item in request.session.items}
    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(*job) for name, job in jobs.items() if name in names}


@pytest.fixture
def job(request, beside):
    return beside[request.node.name].result()


def test_killed_and_started_again(job, reference):
    out, shown = job
    ends_like(out, reference)
    assert "held out" in shown and str(out / "walk.png") in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_started_again(data, reference, tmp_path, monkeypatch, capsys, number):
    """A signal finishes the step, saves, says how to go on; and the handlers of before are back."""
    before, elbo, calls = signal.getsignal(number), vae.elbo_terms, []

    def interrupted(model, x):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(number)
        return elbo(model, x)

    monkeypatch.setattr(vae, "elbo_terms", interrupted)
    assert vae.main(arguments(data, tmp_path)) == 128 + number
    assert signal.getsignal(number) == before
    assert "goes on" in capsys.readouterr().err.splitlines()[-1]
    assert weights(tmp_path)["step"] == 8
    monkeypatch.setattr(vae, "judge", lambda *a: signal.raise_signal(number))  # and while judging
    assert vae.main(arguments(data, tmp_path)) == 128 + number
    monkeypatch.undo()
    assert vae.main(["--out", str(tmp_path)]) == 0  # all other settings come from the checkpoint
    assert same(weights(tmp_path), weights(reference)) and rows_of(tmp_path) == rows_of(reference)


def test_stopped_from_python(data, tmp_path, monkeypatch):
    elbo = vae.elbo_terms
    def interrupted(model, x):
        signal.raise_signal(signal.SIGINT)
        return elbo(model, x)

    monkeypatch.setattr(vae, "elbo_terms", interrupted)
    config = vae.command_line(arguments(data, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        vae.train(config)
    assert weights(tmp_path)["step"] == 1
    monkeypatch.undo()
    assert vae.main(["--out", str(tmp_path), "--steps", "1"]) == 0  # enough of it: judge, sample
    assert [row["step"] for row in rows_of(tmp_path)] == ["1"]
    assert (tmp_path / "reconstructions.png").exists() and weights(tmp_path)["judged"]


def copy_of(reference, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for path in reference.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_a_finished_run_samples_without_data(reference, tmp_path, monkeypatch, capsys):
    out = copy_of(reference, tmp_path)
    monkeypatch.setattr(vae, "load_images", None)
    checkpoint = (out / "checkpoint.pt").read_bytes()
    (out / "walk.png").unlink()
    for words in (["--steps", "20"], ["--seed", "0"], ["--seed", "7"]):
        assert vae.main(["--out", str(out), *words]) == 0
        equal = (out / "samples.png").read_bytes() == (reference / "samples.png").read_bytes()
        assert equal == (words[-1] != "7")
    assert (out / "checkpoint.pt").read_bytes() == checkpoint and not (out / "walk.png").exists()
    assert rows_of(out) == rows_of(reference)
    assert "bound" in capsys.readouterr().out


def test_more_steps_and_another_judgement(reference, tmp_path):
    out = copy_of(reference, tmp_path)
    assert vae.main(["--out", str(out), "--steps", "60"]) == 0
    assert [row["step"] for row in rows_of(out)] == ["20", "40", "45", "60"]
    state = weights(out)
    assert state["step"] == steps_taken(state) == 60
    assert vae.main(["--out", str(out), "--draws", "5"]) == 0
    assert same(weights(out), state) and rows_of(out)[3] != rows_of(reference)[-1]
    assert rows_of(out)[3]["loss"] == str(state["rows"][3]["loss"])
    assert rows_of(out)[3]["test_bound"] != str(state["rows"][3]["test_bound"])


def test_steps_asked_are_steps_taken(reference):
    assert weights(reference)["step"] == steps_taken(weights(reference)) == 45


@pytest.mark.parametrize("words, needles", [
    (["--batch-size", "8"], ["--batch-size 16", "--restart", "--out"]),
    (["--latent-dim", "3"], ["--latent-dim 2", "--restart", "--out"]),
    (["--width", "5"], ["--width 4", "--restart"]), (["--beta", "2"], ["--beta 1", "--restart"]),
    (["--kind", "ae"], ["--kind vae", "--restart"]),
    (["--data", "digits"], ["--data", "--restart"]),
    (["--seed", "1", "--steps", "99"], ["--seed 0", "--restart"])])
def test_a_begun_run_is_not_changed(reference, tmp_path, capsys, words, needles):
    out = copy_of(reference, tmp_path)
    assert vae.main(["--out", str(out), *words]) == 2
    one_line(capsys, *needles)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in reference.iterdir()}


def test_other_data_in_the_same_place_are_noticed(tmp_path, capsys):
    folder = write_idx_folder(tmp_path / "d", 20, 5)
    words = arguments(folder, tmp_path / "o", steps=2)
    assert vae.main(words) == 0
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    capsys.readouterr()
    assert vae.main(arguments(folder, tmp_path / "o", steps=4)) == 2
    one_line(capsys, "other data", "--restart")


def test_foreign_checkpoints_are_refused_and_untouched(data, reference, tmp_path, capsys):
    state = weights(reference)
    memory = io.BytesIO()
    torch.save(state | {"script": "gan"}, memory)
    good = (reference / "checkpoint.pt").read_bytes()
    for content in (b"", b"junk", good[:len(good) // 2], memory.getvalue()):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert vae.main(["--out", str(tmp_path)]) == 2
        one_line(capsys, "not a checkpoint", "--restart")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [content]
        with pytest.raises(vae.UserError):
            vae.load(tmp_path / "checkpoint.pt")
    assert vae.main(arguments(data, tmp_path, steps=1) + ["--restart"]) == 0  # said, so done
    assert weights(tmp_path)["step"] == 1 and not weights(tmp_path)["config"]["restart"]
    with pytest.raises(vae.UserError, match="cannot read"):
        vae.load(tmp_path / "nothing.pt")


@pytest.mark.parametrize("words, needles", [
    (["--steps", "none"], ["--steps"]), (["--steps", "0"], ["--steps", "1 to"]),
    (["--kind", "gan"], ["ae or vae"]), (["--beta", "nan"], ["--beta"]),
    (["--beta", "-1"], ["--beta"]), (["--learning-rate", "inf"], ["--learning-rate"]),
    (["--kind", "ae", "--beta", "4"], ["ae", "--beta"]),
    (["--beta", "2", "--importance", "5"], ["--importance", "--beta"]),
    (["--colour", "red"], ["--colour"]), (["--late", "3"], ["--late"]), (["extra"], ["extra"]),
    (["--samples"], ["--samples"]), (["--device", "cuda:9"], ["cuda"]),
    (["--data", ""], ["a name or a path"]), (["--data", "a,"], ["a name or a path"]),
    (["--data", "mnits"], ["mnits", "mnist", "digits"]), (["--data", os.devnull], ["folder"])])
def test_bad_words(tmp_path, monkeypatch, capsys, words, needles):
    monkeypatch.chdir(tmp_path)
    assert vae.main(words) == 2
    one_line(capsys, *needles)
    assert not list(tmp_path.iterdir())


def test_settings_may_change_until_the_first_step_is_done(data, tmp_path, monkeypatch, capsys):
    """A run that failed before it did anything (a batch too large for the memory) binds nothing."""
    def too_large(*a):
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(vae, "elbo_terms", too_large)
    assert vae.main(arguments(data, tmp_path)) == 2
    assert "not enough memory" in capsys.readouterr().err.splitlines()[-1]
    assert weights(tmp_path)["step"] == 0
    monkeypatch.undo()
    assert vae.main(["--out", str(tmp_path), "--batch-size", "8", "--width", "2"]) == 0
    assert weights(tmp_path)["step"] == 45


def test_bad_settings_from_python():
    for settings in ({"steps": 0}, {"steps": 1.5}, {"kind": "x"}, {"beta": "1"}, {"seed": True}):
        with pytest.raises(vae.UserError, match="--" + next(iter(settings))):
            vae.Config(**settings)
    assert vae.Config(beta=2).out == os.path.join("out", "vae")
    assert vae.Config(kind="ae", data="mnist").out == os.path.join("out", "vae-ae-mnist")
    assert vae.Config(data=str(Path("some", "mine"))).out == os.path.join("out", "vae-mine")


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        vae.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(vae.flag(f.name) in text for f in vae.fields(vae.Config))
    assert "(default 64)" in text and "(default )" not in text and "False" not in text


def test_a_folder_that_cannot_be(data, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert vae.main(arguments(data, tmp_path / "file" / "out")) == 2
    assert "vae.py: error: cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk(reference, tmp_path, capsys):
    """When a checkpoint no longer fits, the one before stays whole."""
    resource = pytest.importorskip("resource")
    out = copy_of(reference, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert vae.main(["--out", str(out), "--steps", "50"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in reference.iterdir()}


def test_divergence_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch, capsys):
    elbo, calls = vae.elbo_terms, []

    def poisoned(model, x):
        calls.append(1)
        reconstruction, kl = elbo(model, x)
        return reconstruction * (float("nan") if len(calls) == 5 else 1), kl

    monkeypatch.setattr(vae, "elbo_terms", poisoned)
    assert vae.main(arguments(data, tmp_path)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "loss is nan at step 4" in last and "--learning-rate" in last
    model = vae.load(tmp_path / "checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(FloatingPointError):
        calls.clear()
        vae.train(vae.command_line(arguments(data, tmp_path)))


@pytest.mark.parametrize("script, loss", [(gan, "detective_loss"), (gan, "forger_loss"),
                                          (cyclegan, "verdict_loss")])
def test_an_infinite_gradient_stops_a_duel_before_its_step(script, loss, tmp_path, monkeypatch,
                                                           capsys, data, piles):
    """The loss stays finite, its slope does not: no weight may follow it, not even in memory."""
    right, calls, stepped = getattr(script, loss), [], []

    def steep(x, *more):
        calls.append(1)
        return right(x, *more) + ((0 * x.sum()).sqrt() if len(calls) > 24 else 0)

    adam_step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (adam_step(self), stepped.append(all(
        p.isfinite().all() for group in self.param_groups for p in group["params"]))))
    monkeypatch.setattr(script, loss, steep)
    words = cycle_words(tmp_path, data=piles) if script is cyclegan else gan_words(data, tmp_path)
    assert script.main(words) == 1 and all(stepped) and stepped
    assert "grad" in capsys.readouterr().err.splitlines()[-1]
    model = script.load(tmp_path / "checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())


def test_last_steps_raise_the_tighter_bound(data, tmp_path, monkeypatch):
    """With --importance 3 the first 70 % of the steps take the ELBO, the others L_3."""
    weigh, calls = vae.log_weights, []

    def counted(model, x, k, generator=None):
        log_w = weigh(model, x, k, generator)
        if log_w.requires_grad:
            assert k == 3 and log_w.shape == (16, 3)
            calls.append((log_w.detach().logsumexp(1) - math.log(3)).mean().item())
        return log_w

    monkeypatch.setattr(vae, "log_weights", counted)
    assert vae.main(arguments(data, tmp_path, steps=40, importance=3)) == 0
    row = rows_of(tmp_path)[1]  # steps 20 to 39: eight by the ELBO, twelve by L_3
    assert len(calls) == 12 and float(row["kl"]) > 0
    losses = weights(tmp_path)["rows"][1]["loss"] * 20 + sum(calls)  # what is left are the eight
    assert losses / 8 > -sum(calls) / 12 and weights(tmp_path)["step"] == 40


def test_it_learns(data, tmp_path):
    """60 steps of the autoencoder nearly halve the error; the same pictures are written."""
    assert vae.main(arguments(data, tmp_path, kind="ae", steps=60, latent_dim=8)) == 0
    rows = rows_of(tmp_path)
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"]) and float(rows[-1]["kl"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.png", "reconstructions.png", "walk.png"}


# ==== The mathematics of gpt.py ===================================================================


def tiny_gpt(**settings):
    """A model whose weights are all at random: at its start it would say nothing."""
    torch.manual_seed(0)
    small = {"vocab_size": 300, "block_size": 16, "layers": 2, "heads": 2, "width": 16}
    model = gpt.GPT(gpt.Config(**(small | settings))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.tokenizer.learn("the cat sat on the mat, the dog sat on the cat. " * 5)
    return model


def test_no_token_sees_what_comes_after_it():
    model, tokens = tiny_gpt(), torch.randint(300, (3, 16))
    with torch.no_grad():
        logits = model(tokens)
        for t in range(16):
            other = tokens.clone()
            other[:, t] = (other[:, t] + 1) % 300
            changed = model(other)
            assert torch.equal(changed[:, :t], logits[:, :t])
            assert (changed[:, t:] != logits[:, t:]).any(2).all()  # and all later ones see it


def test_cached_logits_are_those_of_a_plain_forward():
    """At every position, and across the start of every new window; token by token and in parts."""
    torch.manual_seed(1)
    tokens = torch.randint(300, (60,)).tolist()
    for parts in (1, 2, 5, 16):
        model = tiny_gpt()
        context, sizes = gpt.Context(model), []
        for start in range(0, 60, parts):
            logits = context.read(tokens[start:start + parts])
            sizes.append(len(context.tokens))
            assert context.tokens == tokens[:start + parts][-sizes[-1]:]
            with torch.no_grad():
                plain = model(torch.tensor([context.tokens]))[0, -1]
            torch.testing.assert_close(logits, plain[:context.known], rtol=0, atol=1e-4)
            assert context.cache[0][0].shape[2] == sizes[-1] and not logits.requires_grad
        assert max(sizes) == 16 if 16 % parts == 0 else max(sizes) > 10
        if parts == 1:
            assert sizes == [*range(1, 17), *(8 + i % 9 for i in range(44))]
    long = gpt.Context(model)
    torch.testing.assert_close(long.read(tokens), gpt.Context(model).read(tokens[-16:]))


def test_rotary_scores_depend_on_the_distance_alone():
    turn, (q, k) = gpt.rotations(40, 8), torch.randn(2, 8)
    at = [gpt.rotate(x.expand(1, 1, 40, 8), turn)[0, 0] for x in (q, k)]           # (40, 8) each
    scores = at[0] @ at[1].T
    for distance in range(-39, 40):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand(len(line)), rtol=0, atol=1e-4)
    assert scores[:, 0].std() > 0.05
    torch.testing.assert_close(at[0].norm(dim=1), q.norm().expand(40))
    torch.testing.assert_close(at[0][0], q)  # the first position is not turned


def test_the_order_of_tokens_matters():
    """Attention alone sees a set; in one layer only the rotation tells a b c from b a c."""
    model = tiny_gpt(layers=1)
    with torch.no_grad():
        one, other = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert (one - other).abs().max() > 1e-3


def test_before_training_all_tokens_are_equally_likely():
    model = gpt.GPT(gpt.Config(vocab_size=400, width=32))
    loss = F.cross_entropy(model(torch.randint(400, (2, 20))).flatten(0, 1), torch.arange(40))
    assert loss.item() == pytest.approx(math.log(400), abs=0.02)
    assert gpt.nats_per_byte(model, "some text") == pytest.approx(math.log(400), abs=0.02)


def test_any_text_survives_the_tokens():
    tokenizer = tiny_gpt().tokenizer
    torch.manual_seed(0)
    noise = bytes(torch.randint(256, (5000,)).tolist()).decode("latin-1")
    emoji = "naïve 東京 🙂👩‍👩‍👧\n\n\tif x:\r\n        pass  "
    for text in ("", "the", "a" * 1000, " " * 100, noise, emoji):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text.encode() and all(0 <= t < 300 for t in tokens)
    assert len(tokenizer.encode("the cat sat")) == 3  # words that it knows whole


def test_merges_by_hand():
    """aaabdaaabac: aa stands 4 times, then Za and ab twice (the later wins), then Yb; then none."""
    expected = [(97, 97), (256, 97), (257, 98)]
    assert gpt.learn_merges(b"aaabdaaabac", 10) == expected
    assert gpt.learn_merges(b"aaabdaaabac", 2) == expected[:2]
    assert gpt.learn_merges(b"abcdef", 10) == gpt.learn_merges(b"", 10) == []
    assert gpt.learn_merges(b"x. x, x. x,", 9)[0] == (32, 120)  # inside words, the space before
    assert all(44 not in pair and 46 not in pair for pair in gpt.learn_merges(b"x. x, x. x,", 9))
    assert gpt.merge([97, 97, 97], (97, 97), 256) == [256, 97]
    tokenizer = gpt.Tokenizer(260)
    tokenizer.learn("aaabdaaabac")
    assert tokenizer.encode("aaab") == [258] and tokenizer.encode("aab") == [256, 98]
    assert tokenizer.pieces()[258] == b"aaab" and tokenizer.pieces()[259] == b""  # a place unused


def test_merges_against_counting_anew_each_time():
    text = (HERE / "README.md").read_bytes()[:4000]
    words, expected = [list(word) for word in gpt.WORDS.findall(text)], []
    for token in range(256, 300):
        pairs = [pair for word in words for pair in zip(word, word[1:], strict=False)]
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), pair))
        expected.append(best)
        words = [gpt.merge(word, best, token) for word in words]
    assert gpt.learn_merges(text, 44) == expected
    tokenizer = gpt.Tokenizer(300)
    tokenizer.learn(text.decode())
    assert tokenizer.encode(text.decode()) == [token for word in words for token in word]


def test_words_leave_nothing_out():
    torch.manual_seed(0)
    text = bytes(torch.randint(256, (3000,)).tolist()) + b"  two\n\n  three " + b"x" * 99
    words = gpt.WORDS.findall(text)
    assert b"".join(words) == text and max(map(len, words)) <= 49


def test_choosing_a_token():
    p = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1])
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_k=0, top_p=1.0):
        how = temperature, top_k, top_p, generator
        return [gpt.choose(p.log(), *how) for _ in range(2000)]

    count = torch.bincount(torch.tensor(drawn()), minlength=5) / 2000
    torch.testing.assert_close(count, p, rtol=0, atol=0.04)
    assert set(drawn(top_k=2)) == {1, 3} and set(drawn(top_k=1)) == {1}
    assert set(drawn(top_k=99)) == {0, 1, 3, 4}
    assert set(drawn(top_p=0.5)) == {1} and set(drawn(top_p=0.51)) == {1, 3}
    assert set(drawn(top_p=0.0)) == {1} and len(set(drawn(top_p=0.85))) == 3
    assert set(drawn(top_p=0.51, top_k=1)) == {1}
    assert set(drawn(temperature=0.0)) == set(drawn(temperature=1e-30)) == {1}
    warm = torch.bincount(torch.tensor(drawn(temperature=2.0)), minlength=5) / 2000
    torch.testing.assert_close(warm, p.sqrt() / p.sqrt().sum(), rtol=0, atol=0.04)
    keeps_its_share = torch.bincount(torch.tensor(drawn(top_k=2)), minlength=5) / 2000
    assert keeps_its_share[1].item() == pytest.approx(5 / 8, abs=0.04)


def test_generate():
    model = tiny_gpt(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def write(**how):
        return gpt.generate(model, "the cat", **({"tokens": 40} | how))

    assert write(seed=1) == write(seed=1) != write(seed=2) and write() != write()
    assert write(temperature=0, seed=1) == write(temperature=0, seed=2) == write(top_k=1)
    assert not write(seed=1).startswith("the cat") and write(tokens=0) == ""
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert write(seed=3).startswith(write(seed=3, tokens=20))
    for prompt in ("", "🙂", "the " * 100, "\udcff"):
        assert isinstance(gpt.generate(model, prompt, 5, seed=0), str)
    pieces = gpt.stream(model, "a", 3, seed=0)
    next(pieces)
    assert torch.is_grad_enabled() and model.training  # also while the text is half written
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 1.1}):
        with pytest.raises(gpt.UserError, match=next(iter(wrong))):
            write(**wrong)


def test_characters_are_never_cut(monkeypatch):
    model, text = tiny_gpt(vocab_size=256), "é🙂ü 東x"
    for n in range(len(text.encode()) + 1):
        rest = iter(text.encode())
        monkeypatch.setattr(gpt, "choose", lambda *a, rest=rest: next(rest))
        whole = text.encode()[:n].decode(errors="ignore")
        assert gpt.generate(model, "x", tokens=n) == whole and "\ufffd" not in whole
    broken = iter(b"a\xff\x80b")
    monkeypatch.setattr(gpt, "choose", lambda *a: next(broken))
    assert gpt.generate(model, "x", tokens=4) == "a\ufffd\ufffdb"


def test_explain():
    model = tiny_gpt()
    likeliest = gpt.explain(model, "the cat", count=300)
    with torch.no_grad():
        logits = model(torch.tensor([model.tokenizer.encode("the cat")]))[0, -1]
    learned = 256 + int((model.tokenizer.merges[:, 0] >= 0).sum())
    assert learned < len(logits)  # of the rest nothing is expected
    p = logits[:learned].softmax(0)
    assert all(piece for piece, _ in likeliest) and len(likeliest) == learned
    assert sum(share for _, share in likeliest) == pytest.approx(1, abs=1e-4)
    assert [share for _, share in likeliest] == pytest.approx(sorted(p.tolist(), reverse=True))
    assert likeliest[0][0] == model.tokenizer.decode([p.argmax().item()])


@pytest.mark.parametrize("length", [2, 17, 18, 100, 2000])
def test_nats_per_byte_by_hand(length):
    """Windows that do not overlap, a short last one, every token but the first, over its bytes."""
    model = tiny_gpt()
    text = ("the cat sat on a 🙂 mat. " * 90)[:length]
    tokens, nats = model.tokenizer.encode(text), 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start:start + 17]
        with torch.no_grad():
            p = model(torch.tensor([window[:-1]]))[0].log_softmax(1)
        nats -= sum(p[i, t].item() for i, t in enumerate(window[1:]))
    size = len(text.encode()) - len(model.tokenizer.decode(tokens[:1]))
    if len(tokens) > 1:
        assert gpt.nats_per_byte(model, text) == pytest.approx(nats / size, rel=1e-4)
    for short in ("", "a"):
        with pytest.raises(gpt.UserError, match="two tokens"):
            gpt.nats_per_byte(model, short)


def test_every_parameter_has_one_optimizer():
    model = tiny_gpt()
    optimizers = gpt.make_optimizers(model)
    groups = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(groups) == len({id(p) for p in groups})
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()}
    muon = {id(p) for p in optimizers[0].param_groups[0]["params"]}
    assert muon == {id(p) for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}


def test_muon_turns_nothing_and_evens_out_lengths():
    """The first update is -lr sqrt(rows / columns) U f(S) V^T, where f brings S near 1."""
    for shape in ((24, 8), (8, 24), (12, 12)):
        torch.manual_seed(0)
        u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        s = torch.linspace(1, 0.1, len(vt)) * 7
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = u @ s.diag() @ vt
        optimizer = gpt.Muon([p])
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        inside = -u.T @ p.detach() @ vt.T / 0.5 / max(1, shape[0] / shape[1])**0.5
        torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-4)
        assert 0.25 < inside.diagonal().min() and inside.diagonal().max() < 1.3, inside.diagonal()


def test_a_batch_in_parts_has_the_same_gradient():
    model, batch = tiny_gpt(batch_size=8), torch.randint(300, (8, 17))
    keep = gpt.draw_dropout(model.config)

    def gradient(parts):
        model.zero_grad()
        loss = gpt.gradients(model, batch, keep, parts)
        return [loss, *(p.grad.clone() for p in model.parameters())]

    whole = gradient(1)
    logits = model(batch[:, :-1], keep=keep)
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(whole[0], expected.detach())
    for parts in (4, 3, 8, 99):
        torch.testing.assert_close(gradient(parts), whole, rtol=1e-4, atol=1e-5)


def test_dropout():
    """In training alone; a share of zeros, a mean of 1; every place of the network has its mask."""
    keep = gpt.draw_dropout(gpt.Config(dropout=0.25, batch_size=50, layers=3, width=40))
    assert keep.shape == (50, 7, 1, 40) and keep.unique().tolist() == pytest.approx([0, 4 / 3])
    assert keep.mean().item() == pytest.approx(1, abs=0.03)
    assert (gpt.draw_dropout(gpt.Config(dropout=0)) == 1).all()
    model, tokens = tiny_gpt(), torch.randint(300, (1, 9))
    with torch.no_grad():
        for model.training in (True, False):
            torch.testing.assert_close(model(tokens), model(tokens, keep=torch.ones(1, 5, 1, 16)))
        for place in range(5):
            keep = torch.ones(1, 5, 1, 16)
            keep[:, place, :, 3] = 0
            assert not torch.allclose(model(tokens), model(tokens, keep=keep))


def test_it_learns_one_batch_by_heart():
    torch.manual_seed(0)
    model, batch = gpt.GPT(tiny_gpt().config), torch.randint(300, (4, 17))
    optimizers = gpt.make_optimizers(model)
    for step in range(150):
        loss = gpt.gradients(model, batch, torch.ones(4, 5, 1, 16))
        for optimizer, rate in zip(optimizers, (0.03, 0.01), strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / 150)
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05


# ==== gpt.py as its users run it ==================================================================


def gpt_words(data, out, **settings):
    settings = {"data": data, "out": out, "steps": 45, "batch_size": 4, "vocab_size": 300,
                "block_size": 16, "layers": 2, "heads": 2, "width": 16, "tokens": 30} | settings
    return [word for name, value in settings.items() for word in (gpt.flag(name), str(value))]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A user's own file: a piece of the README, which any copy of the tests has beside it."""
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text((HERE / "README.md").read_text()[:6000] + "\n🙂 the end", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def writer(text, tmp_path_factory):
    """One unbroken run of gpt.py, which several tests look at and none may change."""
    out = tmp_path_factory.mktemp("writer")
    assert gpt.main(gpt_words(text, out)) == 0
    return out


def test_what_a_gpt_run_leaves(writer, text):
    assert {p.name for p in writer.iterdir()} == {"checkpoint.pt", "metrics.csv", "samples.txt"}
    rows = rows_of(writer)
    assert [row["step"] for row in rows] == ["20", "40", "45"]
    assert float(rows[0]["nats_per_byte"]) > float(rows[2]["nats_per_byte"])
    assert float(rows[1]["held_out"]) > 0
    nats, bits = (float(rows[2][f"test_{name}_per_byte"]) for name in ("nats", "bits"))
    assert bits == pytest.approx(nats / math.log(2), rel=1e-4)
    model = gpt.load(writer / "checkpoint.pt")
    written = text.read_text(encoding="utf-8")
    assert gpt.nats_per_byte(model, written[int(0.9 * len(written)):]) == pytest.approx(nats, 1e-4)
    assert (writer / "samples.txt").read_text() == gpt.generate(model, "", 30, seed=0)
    assert weights(writer)["step"] == steps_taken(weights(writer)) == 45
    assert model.tokenizer.merges.min() >= 0 and not model.training and model.config.width == 16
    config = gpt.Config(**(weights(writer)["config"] | {"out": str(writer)}))
    again = gpt.train(config).state_dict()  # nothing is left to train
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_gpt_killed_and_started_again(job, writer):
    out, shown = job
    ends_like(out, writer)
    assert shown.startswith((writer / "samples.txt").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_gpt_stopped_and_started_again(text, writer, tmp_path, monkeypatch, capsys, number):
    gradients, calls = gpt.gradients, []

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(number)
        return gradients(*a)

    monkeypatch.setattr(gpt, "gradients", interrupted)
    assert gpt.main(gpt_words(text, tmp_path)) == 128 + number
    assert "goes on" in capsys.readouterr().err.splitlines()[-1]
    assert weights(tmp_path)["step"] == 8
    monkeypatch.undo()
    monkeypatch.setattr(gpt, "write_samples", lambda *a: signal.raise_signal(number))
    assert gpt.main(["--out", str(tmp_path)]) == 128 + number
    monkeypatch.undo()
    assert gpt.main(["--out", str(tmp_path)]) == 0  # all other settings come from the checkpoint
    assert same(weights(tmp_path), weights(writer)) and rows_of(tmp_path) == rows_of(writer)


def test_writing_afterwards(writer, tmp_path, monkeypatch, capsys):
    out = copy_of(writer, tmp_path)
    monkeypatch.setattr(gpt, "load_text", None)  # no data are needed
    checkpoint, model = (out / "checkpoint.pt").read_bytes(), gpt.load(out / "checkpoint.pt")
    assert gpt.main(["--out", str(out), "--prompt", "Das", "--seed", "3", "--samples", "2"]) == 0
    texts = ["Das" + gpt.generate(model, "Das", 30, seed=seed) for seed in (3, 4)]
    assert (out / "samples.txt").read_text().split(f"\n{'-' * 80}\n") == texts
    assert capsys.readouterr().out.startswith("\n\n".join(texts))
    assert gpt.main(["--out", str(out), "--prompt", "Das", "--explain"]) == 0
    shown = capsys.readouterr().out.splitlines()
    piece, share = gpt.explain(model, "Das")[0]
    assert shown[0] == "after 'Das':" and len(shown) == 12
    assert shown[1] == f"{share:7.1%}  {piece.decode(errors='replace')!r}"
    pipe = io.TextIOWrapper(io.BytesIO("from a pipe \xff\n".encode("latin-1")))
    monkeypatch.setattr(sys, "stdin", pipe)
    assert gpt.main(["--out", str(out), "--prompt", "-"]) == 0
    assert (out / "samples.txt").read_text().startswith("from a pipe \ufffd")
    assert capsys.readouterr().out.startswith("from a pipe \ufffd")
    assert (out / "checkpoint.pt").read_bytes() == checkpoint


def test_a_source_of_two_symbols(tmp_path):
    """a or b, b in a quarter of the places: no model can do better than the entropy."""
    torch.manual_seed(0)
    (tmp_path / "ab.txt").write_text("".join("aaab"[i] for i in torch.randint(4, (20000,))))
    words = gpt_words(tmp_path / "ab.txt", tmp_path / "o", vocab_size=256, steps=80, batch_size=16)
    assert gpt.main(words) == 0
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    nats = float(rows_of(tmp_path / "o")[-1]["test_nats_per_byte"])
    assert nats == pytest.approx(entropy, abs=0.03)
    assert set((tmp_path / "o" / "samples.txt").read_text()) <= {"a", "b"}


def test_batches_are_from_the_text_and_differ(text, tmp_path, monkeypatch):
    """Stretches of block_size + 1 tokens in a row; over an epoch they come from all of it."""
    gradients, batches = gpt.gradients, []
    monkeypatch.setattr(gpt, "gradients",
                        lambda *a: batches.append(a[1].clone()) or gradients(*a))
    assert gpt.main(gpt_words(text, tmp_path, vocab_size=256, steps=200)) == 0
    stream = text.read_text(encoding="utf-8")
    stream = stream[:int(0.9 * len(stream))].encode()
    rows, starts = [bytes(row) for batch in batches for row in batch.tolist()], []
    for row in rows:
        assert len(row) == 17 and row in stream
        starts.append(stream.index(row))
    assert len(set(rows)) > 0.8 * len(rows)
    epoch = starts[:len(stream) // 16 - 1]
    assert len({start // 32 for start in epoch}) > 0.85 * len(stream) / 32


def test_shares_of_a_batch(monkeypatch):
    assert torch.equal(gpt.my_share(torch.arange(4)), torch.arange(4))
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert torch.equal(gpt.my_share(torch.arange(4)), torch.tensor([1, 3]))
    with pytest.raises(gpt.UserError, match="--batch-size 3"):
        gpt.my_share(torch.arange(3))


def test_two_ranks_end_where_one_process_does(job, text, tmp_path):
    """torchrun, two processes, gloo: the same batch in halves, the same weights, files once."""
    done, two = job
    assert gpt.main(gpt_words(text, tmp_path, steps=10)) == 0
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out:") == 1 and done.stderr.count("gpt:   0%") == 1
    a, b = (torch.cat([p.flatten() for p in gpt.load(out / "checkpoint.pt").parameters()])
            for out in (tmp_path, two))
    assert (a - b).norm() / a.norm() < 1e-3 and {p.name for p in two.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.txt"}
    for a, b in zip(rows_of(tmp_path), rows_of(two), strict=True):
        a, b = ([float(figure or 0) for figure in row.values()] for row in (a, b))
        assert a == pytest.approx(b, rel=1e-3)


def test_a_stop_reaches_all_ranks(job):
    (error, status), out = job
    assert status and "goes on" in error
    state = weights(out)  # after the same step
    assert 20 <= state["step"] == steps_taken(state) < 10**6


def test_the_manual():
    """Whole topics are held out; no paragraph stands twice; few lines are on both sides."""
    train, held_out = gpt.load_manual()
    assert (train, held_out) == gpt.load_text("manual", "")
    assert 0.05 < len(held_out) / len(train) < 0.3
    lines = {line.strip() for line in train.splitlines()}
    shared = sum(len(line) for line in held_out.splitlines() if line.strip() in lines)
    assert shared < 0.05 * len(held_out)
    paragraphs = [" ".join(p.split()) for p in (train + "\n\n" + held_out).split("\n\n")]
    paragraphs = [p for p in paragraphs if p]
    assert len(set(paragraphs)) == len(paragraphs) > 1000 and "The" in train


def test_own_texts(tmp_path, monkeypatch):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / ".git").mkdir()
    (tmp_path / "d" / "out").mkdir()
    for name, content in (("b.TXT", "B" * 30), ("a.md", "A" * 30), ("sub/c.py", "C" * 38),
                          ("picture.png", "no"), (".git/x.py", "no"), ("out/samples.txt", "no"),
                          ("out/checkpoint.pt", "no")):
        (tmp_path / "d" / name).write_text(content)
    assert "".join(gpt.load_text(str(tmp_path / "d"), "")) == f"{'A' * 30}\n{'B' * 30}\n{'C' * 38}"
    (tmp_path / "x.log").write_bytes("\ufeffnaïve\r\n🙂🙂🙂🙂".encode())
    assert gpt.load_text(str(tmp_path / "x.log"), "") == ("naïve\r\n🙂🙂", "🙂🙂")
    url = (tmp_path / "x.log").as_uri()
    digest = hashlib.sha256((tmp_path / "x.log").read_bytes()).hexdigest()
    monkeypatch.setattr(gpt, "SHAKESPEARE", (url, "0" * 64))
    with pytest.raises(gpt.UserError, match="checksum"):
        gpt.load_text("shakespeare", tmp_path / "data")
    monkeypatch.setattr(gpt, "SHAKESPEARE", (url, digest))
    first = gpt.load_text("shakespeare", tmp_path / "data")
    monkeypatch.setattr(gpt, "SHAKESPEARE", ("file:///gone", digest))  # nothing is fetched twice
    assert first == gpt.load_text("shakespeare", tmp_path / "data") == ("naïve\r\n🙂🙂", "🙂🙂")


@pytest.mark.parametrize("content, needles", [
    (b"", ["too little", "0 tokens"]), (b"short", ["too little"]), (b"x" * 900 + b"\0", ["NUL"]),
    (b"\xff\xfe" + b"x" * 900, ["UTF-8"]), (b"caf\xe9 " * 200, ["UTF-8", "byte 3"])])
def test_bad_texts(tmp_path, capsys, content, needles):
    (tmp_path / "bad.txt").write_bytes(content)
    for data in ("bad.txt", "."):
        words = gpt_words(tmp_path / data, tmp_path / "o")
        assert gpt.main(words) == 2
        one_line(capsys, *needles, script="gpt")
        assert not (tmp_path / "o").exists()


def test_texts_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    assert gpt.main(gpt_words("shakspere", tmp_path / "o")) == 2
    one_line(capsys, "shakspere", "manual", "shakespeare", script="gpt")
    assert gpt.main(gpt_words(tmp_path, tmp_path / "o")) == 2  # a folder without a text
    one_line(capsys, "too little text", script="gpt")
    (tmp_path / "mine.txt").write_text("words " * 500)

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert gpt.main(gpt_words(tmp_path / "mine.txt", tmp_path / "o")) == 2
    one_line(capsys, "cannot read", "mine.txt", "Permission denied", script="gpt")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert gpt.main(gpt_words("manual", tmp_path / "o")) == 2
    one_line(capsys, "--data", script="gpt")


@pytest.mark.parametrize("words, needles", [
    (["--width", "100", "--heads", "3"], ["--width 100", "--heads 3"]),
    (["--vocab-size", "255"], ["256 to"]), (["--temperature", "-1"], ["--temperature"]),
    (["--top-p", "1.5"], ["--top-p"]), (["--block-size", "1"], ["--block-size"]),
    (["--dropout", "1"], ["--dropout"]), (["--prompt"], ["--prompt"]),
    (["--temperature", "nan"], ["--temperature"])])
def test_bad_words_for_gpt(tmp_path, monkeypatch, capsys, words, needles):
    monkeypatch.chdir(tmp_path)
    assert gpt.main(words) == 2
    one_line(capsys, *needles, script="gpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, needles", [
    (["--width", "32"], ["--width 16", "--restart"]),
    (["--vocab-size", "301"], ["--vocab-size 300"]),
    (["--block-size", "8"], ["--block-size 16"]), (["--batch-size", "2"], ["--batch-size 4"]),
    (["--seed", "1", "--steps", "99"], ["--seed 0"]), (["--data", "manual"], ["--data"])])
def test_a_begun_text_is_not_changed(writer, tmp_path, capsys, words, needles):
    out = copy_of(writer, tmp_path)
    assert gpt.main(["--out", str(out), *words]) == 2
    one_line(capsys, *needles, script="gpt")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in writer.iterdir()}


def test_another_text_in_the_same_place_is_noticed(text, tmp_path, capsys):
    copy = tmp_path / "mine.txt"
    copy.write_bytes(text.read_bytes())
    assert gpt.main(gpt_words(copy, tmp_path / "o", steps=2)) == 0
    for place in (100, -1):  # in the part to train on, and in the part held out
        content = bytearray(text.read_bytes())
        content[place] ^= 1
        copy.write_bytes(content)
        capsys.readouterr()
        assert gpt.main(gpt_words(copy, tmp_path / "o", steps=4)) == 2
        one_line(capsys, "other data", "--restart", script="gpt")


def test_gpt_divergence_keeps_the_last_good_checkpoint(text, tmp_path, monkeypatch, capsys):
    gradients, calls = gpt.gradients, []

    def poisoned(*a):
        calls.append(1)
        return gradients(*a) * (float("inf") if len(calls) == 5 else 1)

    monkeypatch.setattr(gpt, "gradients", poisoned)
    assert gpt.main(gpt_words(text, tmp_path)) == 1
    assert "nats_per_byte is inf at step 4" in capsys.readouterr().err.splitlines()[-1]
    assert all(p.isfinite().all() for p in gpt.load(tmp_path / "checkpoint.pt").parameters())


def newcomer(place):
    """gpt.py on its built-in data, in a process of its own; and then piped into, and out of."""
    place.mkdir()
    command = [sys.executable, HERE / "gpt.py", "--steps", "2", "--width", "32", "--vocab-size",
               "256", "--batch-size", "2", "--tokens", "9"]
    done = subprocess.run(command, cwd=place, capture_output=True, timeout=120)
    piped = subprocess.run([*command[:2], "--prompt", "-"], cwd=place, capture_output=True,
                           input="naïve".encode(), timeout=120)
    command = [*command[:2], "--tokens", "3000", "--seed", "1"]  # and into a reader that leaves
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        left = process.stderr.read(), process.wait(60)
    return done, piped, left, place / "out" / "gpt"


def test_gpt_on_its_built_in_data(job):
    done, piped, left, out = job
    assert done.returncode == 0 and b"Warning" not in done.stderr, done.stderr
    assert b"held out: nats_per_byte" in done.stdout
    assert {p.name for p in out.iterdir()} == {"checkpoint.pt", "metrics.csv", "samples.txt"}
    assert piped.returncode == 0 and piped.stdout.startswith("naïve".encode())
    assert left == (b"", 0)


# ==== ddpm.py: the mathematics ====================================================================


class TrueDenoiser(ddpm.UNet):
    """What a perfect network says of pixels from N(MEAN, STD^2); no weights."""
    MEAN, STD = 0.1, 0.3

    def forward(self, x, t, tokens):
        signal, noise = ddpm.amounts(self.alpha_bar, t, x)
        gain = signal * self.STD**2 / (signal**2 * self.STD**2 + noise**2)
        return self.MEAN + gain * (x - signal * self.MEAN)


def tiny_ddpm(kind=ddpm.UNet, **settings):
    torch.manual_seed(0)
    model = kind(ddpm.Config(width=8, blocks=1, **settings))
    model.prompt.learn(["thin upright three", "bold slanted eight"])
    with torch.no_grad():
        for parameter in model.parameters():  # layers that start at zero would hide what they hear
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_many_small_steps_are_one():
    """q(x_t | x_0) against t single steps (Ho et al. 2020, equations 2 and 4)."""
    alpha_bar, x0 = ddpm.cosine_schedule(50), torch.full((20000, 1, 1, 1), 0.7)
    x, g = x0.clone(), torch.Generator().manual_seed(0)
    for t in range(1, 51):
        beta = (1 - alpha_bar[t] / alpha_bar[t - 1]).float()
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=g)
        if t in (1, 10, 30, 50):
            at = torch.full((len(x),), t)
            whole = ddpm.diffuse(alpha_bar, x0, at, torch.randn(x.shape, generator=g))
            assert abs(x.mean() - whole.mean()) < 0.03 and abs(x.std() / whole.std() - 1) < 0.03
            assert math.isclose(whole.std(), (1 - alpha_bar[t]).sqrt(), rel_tol=0.03)


@pytest.mark.parametrize("steps", [50, 250, 1000, 4000])
def test_at_the_last_step_hardly_any_signal_is_left(steps):
    alpha_bar = ddpm.cosine_schedule(steps)
    assert len(alpha_bar) == steps + 1 and alpha_bar[0] == 1 and alpha_bar[-1].sqrt() < 0.05
    assert (alpha_bar[1:] < alpha_bar[:-1]).all()


def test_noise_and_picture_are_one():
    """x_0 with noise eps, and back: x_s of step_back at eta 0 has the same x_0 and the same eps."""
    alpha_bar, t = ddpm.cosine_schedule(1000), [2, 3, 500, 999, 1000]
    x0, eps = torch.randn(2, 5, 1, 4, 4)
    xt = ddpm.diffuse(alpha_bar, x0, torch.tensor(t), eps)
    for s in (0, 1):
        back = torch.stack([ddpm.step_back(alpha_bar, x0[i], xt[i], t[i], s, 0)[0]
                            for i in range(5)])
        expected = ddpm.diffuse(alpha_bar, x0, torch.full((5,), s), eps)
        torch.testing.assert_close(back, expected, atol=1e-4, rtol=1e-4)
    ratio = alpha_bar[t] / (1 - alpha_bar[t])
    torch.testing.assert_close(ddpm.signal_to_noise(alpha_bar, torch.tensor(t)), ratio)


def test_lessons_are_weighted_by_signal_to_noise():
    """Below its limit the loss is the error of v; above it, 5 times that of x_0."""
    model, x0, eps = tiny_ddpm(), 0.5 * torch.randn(4, 1, 28, 28), torch.randn(4, 1, 28, 28)
    tokens = torch.zeros(4, 1, dtype=torch.long)
    for t, limited in ((900, False), (500, False), (20, True)):
        at, a = torch.full((4,), t), model.alpha_bar[t].item()
        xt = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
        guess = model(xt, at, tokens)
        noise = (xt - math.sqrt(a) * guess) / math.sqrt(1 - a)
        v, true = (math.sqrt(a) * e - math.sqrt(1 - a) * x for e, x in ((noise, guess), (eps, x0)))
        expected = 5 * F.mse_loss(guess, x0) if limited else F.mse_loss(v, true)
        torch.testing.assert_close(ddpm.objective(model, x0, at, eps, tokens), expected,
                                   rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [None, 1.0])
def test_the_network_begins_with_what_it_sees(monkeypatch, size):
    """At birth its last layer is zero: the guess is x_t, scaled up and shrunk, the more the noisier
    it is; at T nothing of it."""
    monkeypatch.setattr(ddpm, "K", {1: size or ddpm.K[1]})
    model, x = ddpm.UNet(ddpm.Config(width=8, blocks=1)), torch.randn(3, 1, 28, 28)
    t = torch.tensor([1, 500, 1000])
    with torch.no_grad():
        guess = model(x, t, torch.zeros(3, 1, dtype=torch.long))
    a = model.alpha_bar[t][:, None, None, None]
    expected = ddpm.K[1]**2 / (ddpm.K[1]**2 + (1 - a) / a) * x / a.sqrt()
    torch.testing.assert_close(guess, expected.float(), atol=1e-5, rtol=1e-4)
    assert guess[2].abs().max() < 1e-3


@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (900, 400), (1000, 999)])
def test_step_back_is_bayes_rule(t, s):
    """eta 1: the posterior q(x_s | x_t, x_0), by brute force over a grid of x_s."""
    alpha_bar = ddpm.cosine_schedule(1000)
    x0, xt, a, b = 0.4, -0.8, alpha_bar[t], alpha_bar[s]
    at = torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    log_p = -(at - b.sqrt() * x0)**2 / (2 * (1 - b))
    log_p = log_p - (xt - (a / b).sqrt() * at)**2 / (2 * (1 - a / b))
    p = log_p.softmax(0)
    mean, sigma = ddpm.step_back(alpha_bar, torch.tensor(x0), torch.tensor(xt), t, s, eta=1)
    assert math.isclose(mean, (p * at).sum(), abs_tol=1e-4)
    assert math.isclose(sigma**2, (p * at**2).sum() - (p * at).sum()**2, rel_tol=1e-3)


def test_no_noise_at_the_last_step():
    alpha_bar, x = ddpm.cosine_schedule(1000), torch.randn(3)
    mean, sigma = ddpm.step_back(alpha_bar, x, torch.randn(3), 40, 0, eta=1)
    assert sigma == 0 and torch.equal(mean, x)


def test_training_and_sampling_meet_the_same_times(monkeypatch):
    model, met = tiny_ddpm(diffusion_steps=8, sampling_steps=8), []
    table = model.prompt.tokens(["a three", "an eight"])[:, None]
    t, *_ = ddpm.draw_batch(model, torch.zeros(4000, dtype=torch.long), table)
    assert set(t.tolist()) == set(range(1, 9)) and t.bincount(minlength=9)[1:].min() > 400
    monkeypatch.setattr(ddpm, "guided", lambda model, x, t, *_: met.extend(t.tolist()) or x)
    ddpm.sample(model, ["a three"], sampling_steps=8, seed=0)
    assert met == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("steps, eta", [(1000, 1.0), (1000, 0.0), (25, 0.0)])
def test_a_perfect_denoiser_samples_the_truth(steps, eta):
    """Its pictures have the mean of the data and the variance that the recursion predicts."""
    model = tiny_ddpm(TrueDenoiser)
    x = 2 * ddpm.sample(model, [""] * 60, steps, 1.0, eta, seed=0) - 1
    times, var = torch.linspace(1000, 0, steps + 1).round().long().tolist(), 1.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        a, b = model.alpha_bar[t].item(), model.alpha_bar[s].item()
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        gain = math.sqrt(a) * model.STD**2 / (a * model.STD**2 + 1 - a)  # of x_0's guess, by x_t
        keep = math.sqrt((1 - b - sigma2) / (1 - a))
        var = (math.sqrt(b) * gain + keep * (1 - math.sqrt(a) * gain))**2 * var + sigma2
    assert abs(x.mean() - model.MEAN) < 0.01
    assert math.isclose(x.var(), var, rel_tol=0.03)
    if steps == 1000:
        assert math.isclose(var, model.STD**2, rel_tol=0.04)


def test_bits_of_a_perfect_denoiser_are_the_closed_form():
    model, T = tiny_ddpm(TrueDenoiser), 1000
    x = (model.MEAN + model.STD * torch.randn(8, 1, 28, 28)).clamp(-1, 1)
    images = ((x / 2 + 0.5) * 255).round() / 255
    a, nats = model.alpha_bar[T].item(), 0.0
    nats += 0.5 * (a * (model.STD**2 + model.MEAN**2) - a - math.log(1 - a))
    for t in range(1, T + 1):  # what is left to know of x_0, once x_t is known
        a = model.alpha_bar[t].item()
        left = 1 / (1 / model.STD**2 + a / (1 - a))
        u, s = max(t, 2), max(t, 2) - 1
        au, b = model.alpha_bar[u].item(), model.alpha_bar[s].item()
        sigma2, share2 = (1 - b) / (1 - au) * (1 - au / b), b * (1 - au / b)**2 / (1 - au)**2
        width2 = sigma2 + share2 * ddpm.ERROR**2
        if t > 1:
            nats += 0.5 * (math.log(width2 / sigma2) + (sigma2 + share2 * left) / width2 - 1)
        else:  # the mean over what the guess lacks, r, of the log of what falls into the bin
            r = torch.linspace(-8, 8, 20001, dtype=torch.float64) * left**0.5
            edges = [torch.special.ndtr((r + h) / width2**0.5) for h in (1 / 255, -1 / 255)]
            weight = (-r**2 / (2 * left)).softmax(0)
            nats -= (weight * (edges[0] - edges[1]).clamp(min=1e-300).log()).sum().item()
    bits = ddpm.bits_per_dim(model, images, seed=0)
    assert bits.shape == (8,) and math.isclose(bits.mean(), nats / math.log(2), rel_tol=0.01)


@pytest.mark.parametrize("count", [1, 7, 20, 50])
def test_every_step_counts_however_few_the_pictures(count):
    """With ``every``, the mean over the pictures is that of all terms."""
    model = tiny_ddpm(TrueDenoiser, diffusion_steps=200)
    x = (model.MEAN + model.STD * torch.randn(1, 1, 28, 28)).clamp(-1, 1)
    images = (((x / 2 + 0.5) * 255).round() / 255).expand(count, -1, -1, -1)
    few = ddpm.bits_per_dim(model, images, every=20, seed=0).mean().item()
    assert math.isclose(few, ddpm.bits_per_dim(model, images[:1], seed=0).item(), rel_tol=0.02)


def test_no_prompts_and_few_steps():
    model = tiny_ddpm(diffusion_steps=4, sampling_steps=2)
    with pytest.raises(ddpm.UserError, match="a list of prompts"):
        ddpm.sample(model, [])
    assert ddpm.sample(model, [""]).isfinite().all()  # by default 25 steps of 4


def test_ddim_with_eta_one_is_the_ancestral_chain():
    """For the same noise, all steps of it: Ho et al. 2020, algorithm 2, written out in betas."""
    model = tiny_ddpm(diffusion_steps=40, sampling_steps=40)
    images = ddpm.sample(model, ["a three", "an eight"], 40, guidance=1.0, eta=1.0, seed=5)
    noise, a = ddpm.seeded(5, "sample"), model.alpha_bar
    tokens = model.prompt.tokens(["a three", "an eight"])
    x = torch.randn(2, 1, 28, 28, generator=noise)
    for t in range(40, 0, -1):
        alpha, at = a[t] / a[t - 1], torch.full((2,), t)
        with torch.no_grad():
            x0 = model(x, at, tokens)
        mean = (a[t - 1].sqrt() * (1 - alpha) / (1 - a[t]) * x0.clamp(-1, 1)
                + alpha.sqrt() * (1 - a[t - 1]) / (1 - a[t]) * x)               # equation 7
        x = mean
        if t > 1:
            variance = (1 - a[t - 1]) / (1 - a[t]) * (1 - alpha)
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=noise)
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1).float(), atol=1e-4, rtol=0)


def test_sampling_alone_and_in_a_batch():
    """One picture is the same in company; sampling changes no state, and None draws anew."""
    model = tiny_ddpm(diffusion_steps=20, sampling_steps=5).train()
    before = {name: str(value) for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    three = ddpm.sample(model, ["a three", "an eight", ""], 5, seed=1)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    alone = ddpm.sample(model, ["a three"], 5, seed=1)
    torch.testing.assert_close(three[:1], alone, atol=1e-4, rtol=0)
    assert before == {name: str(value) for name, value in model.state_dict().items()}
    assert not torch.equal(ddpm.sample(model, [""], 5), ddpm.sample(model, [""], 5))
    prompted, other, empty = (ddpm.sample(model, [p], 5, 2.0, seed=1)
                              for p in ("a thin three", "a bold three", ""))
    assert (prompted - other).abs().max() > 1e-3 < (prompted - empty).abs().max()


def test_guidance_none_and_one():
    model, x, t = tiny_ddpm(), torch.randn(2, 1, 28, 28), torch.tensor([300, 700])
    tokens = model.prompt.tokens(["a thin three", "an eight"])
    with torch.no_grad():
        prompted, unprompted = model(x, t, tokens), model(x, t, 0 * tokens)
        for g, expected in ((0, unprompted), (1, prompted), (3, 3 * prompted - 2 * unprompted)):
            v = ddpm.guided(model, x, t, tokens, torch.tensor([g, g]))
            torch.testing.assert_close(v, expected, atol=1e-4, rtol=1e-4)
        mixed = ddpm.guided(model, x, t, tokens, torch.tensor([0, 1]))
    torch.testing.assert_close(mixed, torch.stack([unprompted[0], prompted[1]]), atol=1e-4, rtol=0)
    assert (prompted - unprompted).abs().max() > 1e-3


def test_words_and_their_order():
    model = tiny_ddpm()
    with torch.no_grad():
        e = model.prompt(model.prompt.tokens(["thin three", "three thin", "three", "", "A three"]))
    assert (e[0] - e[1]).norm() > 1e-2 and (e[0] - e[2]).norm() > 1e-2 and (e[3] == 0).all()
    with pytest.raises(ddpm.UserError, match="'zebra'.*bold eight slanted"):
        ddpm.sample(model, ["a zebra"], 2)
    said = "an eight", "a one", "an ankle boot", "a t-shirt", "an upright one"
    assert all(ddpm.captions(one.split(maxsplit=1)[1]) == [one] * 6 for one in said)
    assert ddpm.captions("bold upright two") == 3 * ["a bold upright two"] + [
        "a bold two", "an upright two", "a two"]


@pytest.mark.parametrize("mean, sigma", [(-1.0, 0.003), (-0.99, 0.02), (0.3, 0.001), (0.97, 0.5)])
def test_the_256_values_of_the_last_step_add_up_to_one(mean, sigma):
    x0 = torch.arange(256) / 127.5 - 1
    p = ddpm.log_decoder(x0, torch.full_like(x0, mean), sigma).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    inside = torch.distributions.Normal(mean, sigma)
    by_hand = inside.cdf(x0[100] + 1 / 255) - inside.cdf(x0[100] - 1 / 255)
    assert p[100].item() == pytest.approx(by_hand.item(), abs=1e-6)


def test_dropped_captions_are_dropped():
    model = tiny_ddpm(drop_caption=0.3)
    table = model.prompt.tokens(["a thin three", "an eight"])[:, None]
    *_, tokens = ddpm.draw_batch(model, torch.randint(2, (5000,)), table)
    dropped = (tokens == 0).all(1)
    assert abs(dropped.float().mean() - 0.3) < 0.03
    e = model.prompt(tokens)
    assert (e[dropped] == 0).all() and (e[~dropped].norm(dim=1) > 1e-3).all()


def test_neighbouring_times_differ():
    e = ddpm.time_embedding(torch.arange(1001).float(), 64)
    assert (e[1:] - e[:-1]).norm(dim=1).min() > 0.1
    model, x = tiny_ddpm(), torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        a, b = (model(x, torch.tensor([t]), torch.zeros(1, 1).long()) for t in (10, 500))
    assert (a - b).abs().max() > 1e-3


# ==== ddpm.py as its users run it =================================================================


def ddpm_words(data, out, **settings):
    settings = {"data": data, "out": out, "steps": 45, "batch_size": 6, "width": 8, "blocks": 1,
                "diffusion_steps": 20, "sampling_steps": 4, "samples": 20} | settings
    return [word for name, value in settings.items() for word in (ddpm.flag(name), str(value))]


@pytest.fixture(scope="session")
def painter(data, tmp_path_factory):
    """One unbroken run of ddpm.py, which several tests look at and none may change."""
    out = tmp_path_factory.mktemp("painter")
    assert ddpm.main(ddpm_words(data, out)) == 0
    return out


def test_what_a_ddpm_run_leaves(painter):
    assert {p.name for p in painter.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.png", "forward.png", "denoising.png",
        "neighbours.png"}
    assert float(rows_of(painter)[-1]["test_bits_per_dim"]) > 0


def test_the_average_is_sampled(painter):
    state = torch.load(painter / "checkpoint.pt", weights_only=True)
    model = ddpm.load(painter / "checkpoint.pt")
    weight = model.out.weight
    assert torch.equal(weight, state["average"]["module.out.weight"])
    assert not torch.equal(weight, state["model"]["out.weight"]) and not model.training
    images = ddpm.sample(model, ["a seven", "", "an eight"], 3, seed=1)
    assert images.shape == (3, 1, 28, 28) and 0 <= images.min() and images.max() <= 1
    assert torch.equal(images, ddpm.sample(model, ["a seven", "", "an eight"], 3, seed=1))


@pytest.mark.parametrize("words, needle", [
    (["--prompt", "a zebra"], "zebra"), (["--guidance", "-1"], "--guidance"),
    (["--sampling-steps", "0"], "--sampling-steps"), (["--width", "12"], "--width"),
    (["--eta", "2"], "--eta"), (["--drop-caption", "much"], "--drop-caption"),
    (["--width", "16"], "--restart"), (["--unseen", "thin upright one"], "--restart"),
    (["--data", "nowhere"], "--restart"), (["--data", "nowhere", "--restart"], "no data set"),
    (["--unseen", "tow", "--restart"], "takes some of zero, one"),
    (["--unseen", ", ".join(ddpm.DIGITS), "--restart"], "nine, not all"),
    (["--vocab-size", "3", "--restart"], "--vocab-size"),
    (["--prompt", "an aple", "--restart"], "known are: a an")])
def test_ddpm_refuses_in_one_line(painter, data, tmp_path, capsys, words, needle):
    out = copy_of(painter, tmp_path)
    assert ddpm.main([*ddpm_words(data, out), *words]) == 2
    one_line(capsys, needle, script="ddpm")


def test_ddpm_refuses_a_foreign_checkpoint(reference, data, tmp_path, capsys):
    out = copy_of(reference, tmp_path)
    before = (out / "checkpoint.pt").read_bytes()
    assert ddpm.main(ddpm_words(data, out)) == 2
    one_line(capsys, "not a checkpoint of this ddpm.py", script="ddpm")
    assert (out / "checkpoint.pt").read_bytes() == before
    with pytest.raises(ddpm.UserError):
        ddpm.load(out / "checkpoint.pt")


def test_prompts_repeat(painter, tmp_path, monkeypatch):
    """A finished model draws what is asked of it, without data; all else stays as it is."""
    out = copy_of(painter, tmp_path)
    before = (out / "samples.png").read_bytes()
    monkeypatch.setattr(ddpm, "load_images", None)
    assert ddpm.main(["--out", str(out), "--prompt", "a two", "--prompt", "an eight"]) == 0
    assert (out / "samples.png").read_bytes() != before
    for name in ("forward.png", "neighbours.png", "metrics.csv", "checkpoint.pt"):
        assert (out / name).read_bytes() == (painter / name).read_bytes()
    with pytest.raises(ddpm.UserError):
        ddpm.Config(prompt="a two")


def test_ddpm_killed_and_started_again(job, painter):
    out, shown = job
    ends_like(out, painter)
    assert "held out: bits_per_dim" in shown


def test_two_ranks_of_ddpm_end_where_one_process_does(job, data, tmp_path):
    done, two = job
    assert ddpm.main(ddpm_words(data, tmp_path, steps=10)) == 0
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held out:") == 1 and done.stderr.count("ddpm:   0%") == 1
    states = [weights(out) for out in (tmp_path, two)]
    for part in ("model", "average"):
        a, b = (torch.cat([value.flatten() for name, value in sorted(state[part].items())
                           if "extra" not in name]) for state in states)
        assert (a - b).norm() / a.norm() < 1e-3
    for a, b in zip(rows_of(tmp_path), rows_of(two), strict=True):
        a, b = ([float(figure or 0) for figure in row.values()] for row in (a, b))
        assert a == pytest.approx(b, rel=1e-2)


# ==== gan.py: the mathematics =====================================================================


def tiny_gan(kind, **settings):
    torch.manual_seed(0)
    return gan.FORGERS[kind](gan.Config(generator=kind, latent_dim=8, width=8, **settings)).eval()


def test_duel_losses_are_finite_and_as_written():
    for logit in (-100.0, -3.0, 0.0, 3.0, 100.0):
        x = torch.tensor([logit], requires_grad=True)
        loss = gan.forger_loss(x)
        (slope,) = torch.autograd.grad(loss, x)
        assert math.isclose(slope, -1 / (1 + math.exp(logit)), rel_tol=1e-4, abs_tol=1e-12)
        assert torch.isfinite(loss) and torch.isfinite(gan.detective_loss(x, -x))
    loss = gan.detective_loss(torch.tensor([2.0]), torch.tensor([-1.0]))
    right = 1 / (1 + math.exp(-2)), 1 - 1 / (1 + math.exp(1))
    assert math.isclose(loss, -math.log(right[0]) - math.log(right[1]), rel_tol=1e-5)


def test_r1_of_a_known_slope():
    weight, x = torch.randn(1, 6, 6), torch.rand(5, 1, 6, 6)
    penalty = gan.r1_penalty(lambda x: 3 * (weight * x).sum((1, 2, 3)), x)
    torch.testing.assert_close(penalty, 4.5 * weight.square().sum())
    penalty = gan.r1_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, x)  # the slope is x itself
    torch.testing.assert_close(penalty, 0.5 * x.square().sum((1, 2, 3)).mean())


@pytest.mark.parametrize("kind", ["dcgan", "stylegan"])
def test_each_turn_leaves_the_other_player_alone(kind):
    G = tiny_gan(kind)
    D = gan.Discriminator(G.config)
    real, nets = torch.rand(4, 1, 28, 28), {"G": G, "D": D}

    def state(net):
        return [x.clone() for p in net.parameters() for x in (p, p.grad) if x is not None]

    def turn(step, net, *pictures):
        before = {name: state(some) for name, some in nets.items()}
        figures = step(D, torch.optim.SGD(net.parameters(), 0.1), *pictures)
        assert all(torch.isfinite(x) for x in figures.values())
        return [name for name, some in nets.items() if len(state(some)) != len(before[name])
                or not all(map(torch.equal, state(some), before[name]))]

    assert turn(gan.detective_turn, D, real, gan.forge(G, 4), 2.0) == ["D"]
    for _ in range(2):
        assert turn(gan.forger_turn, G, gan.forge(G, 4, 0.5)) == ["G"]
        assert turn(gan.detective_turn, D, real, gan.forge(G, 4, 0.5)) == ["D"]
    fake = gan.forge(G, 4).detach()  # the gradient is that of the detective's own loss, no more
    gan.detective_turn(D, torch.optim.SGD(D.parameters(), 0.0), real, fake, 3.0)
    loss = gan.detective_loss(D(real), D(fake)) + 3 * gan.r1_penalty(D, real)
    expected = torch.autograd.grad(loss, list(D.parameters()))
    torch.testing.assert_close([p.grad for p in D.parameters()], list(expected))


def test_networks_begin_as_intended():
    """The deviation of each kind of weight, w as large as z, and no broad eps in a norm."""
    torch.manual_seed(0)
    config = gan.Config(latent_dim=64, width=32)
    G, styled, D = gan.DCGAN(config), gan.StyleGAN(config), gan.Discriminator(config)
    for m in [m for net in (G, D) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        fan_in = m.weight[0].numel()
        if m.weight.numel() > 1000:
            assert math.isclose(m.weight.std().item() * math.sqrt(3 * fan_in), 1, rel_tol=0.1)
    for m in styled.modules():
        if isinstance(m, gan.StyledConv):
            fan_in = m.weight[0].numel()
            assert math.isclose(m.weight.std().item() * math.sqrt(fan_in), 1, rel_tol=0.1)
            assert math.isclose(m.style.weight.std().item() * 8, 1, rel_tol=0.1)
            assert torch.equal(m.style.bias, torch.ones_like(m.style.bias))
    assert all(not m.bias.any() for m in styled.mapping if isinstance(m, nn.Linear))
    w = styled.styles(torch.randn(500, 64))[0]
    assert 0.5 < w.square().mean() < 2 and w.var(0).mean() > 0.2
    eps = [m.eps for net in (G, styled, D) for m in net.modules() if hasattr(m, "eps")]
    assert eps and max(eps) < 1e-3


def test_average_follows_its_formula():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average, by_hand = gan.averaged(model), None
    for count in range(4):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        new = model[0].weight.detach().clone()
        keep = (1 + count) / (10 + count)
        by_hand = new if by_hand is None else keep * by_hand + (1 - keep) * new
        average.update_parameters(model)
        torch.testing.assert_close(average.module[0].weight.detach(), by_hand)
        assert torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_scaling_activations_is_scaling_weights():
    torch.manual_seed(0)
    layer, x, w = gan.StyledConv(6, 4, 8), torch.randn(2, 6, 9, 9), torch.randn(2, 8)
    with torch.no_grad():
        for i in range(2):
            weight = layer.weight * layer.style(w[i])[None, :, None, None]
            weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
            expected = F.conv2d(x[i:i + 1], weight, padding=1)
            torch.testing.assert_close(layer(x, w)[i:i + 1], expected, atol=1e-4, rtol=1e-4)
        inside = layer(torch.randn(300, 6, 9, 9), torch.randn(300, 8))[:, :, 1:-1, 1:-1]
    assert torch.allclose(inside.var((0, 2, 3)), torch.ones(4), atol=0.1)


@pytest.mark.parametrize("kind", ["dcgan", "stylegan"])
@pytest.mark.parametrize("size", [16, 28, 64])
def test_forgers_paint_any_size_alone_and_in_a_batch(kind, size):
    model = tiny_gan(kind, image_size=size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    three = gan.sample(model.train(), 3, seed=1)
    assert model.training and three.shape == (3, 1, size, size)
    drawn = gan.draw(model.eval(), 3, gan.seeded(1, "sample"))
    with torch.no_grad():
        alone = model(*[x[:1] for x in drawn]) / 2 + 0.5
    torch.testing.assert_close(three[:1], alone, atol=1e-4, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    logits = gan.Discriminator(model.config)(three * 2 - 1)
    assert logits.shape == (3,)


def test_the_detective_hears_how_much_pictures_differ():
    """In groups of four, in training and in judging: one number for each."""
    torch.manual_seed(0)
    D, x = gan.Discriminator(gan.Config(width=8)), torch.rand(8, 1, 28, 28)
    heard = []
    D.body = nn.Sequential(nn.PixelUnshuffle(2))
    D.head = nn.Sequential(nn.Identity())
    D.head.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0][:, -1]))
    D(x)
    folded = F.pixel_unshuffle(x, 2)
    for i in (0, 4):
        expected = (folded[i:i + 4].var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(heard[0][i:i + 4], expected.expand(4, 14, 14))
    sizes, model = [], tiny_gan("dcgan")
    D = gan.Discriminator(model.config)
    D.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    gan.duel_score(model, D, gan.draw_digits(1003, "a")[0])
    assert sum(sizes) == 2000 and all(size % 4 == 0 for size in sizes)


def test_styles():
    """psi 0 is one picture for all z; a z mixed with itself is what it was; noise starts at 0."""
    model = tiny_gan("stylegan")
    z, *noise = gan.draw(model, 4, gan.seeded(0))
    noise = [x[:1].expand(4, -1, -1, -1) for x in noise]
    with torch.no_grad():
        same = model(z, *noise, truncation=0)
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-5, rtol=0)
        w, full = model.styles(z), model(z, *noise)
        assert (full - same).abs().max() > 1e-3
        torch.testing.assert_close(model.render(torch.cat([w[:2], w[2:]]), noise), full)
        torch.testing.assert_close(model(z, *[0 * x for x in noise]), full)
        model.strength[1].fill_(1)
        assert (model(z, *[0 * x for x in noise]) - model(z, *noise)).abs().max() > 1e-3


def test_strips_are_what_they_are_said_to_be(tmp_path, monkeypatch):
    """Mixed: coarse styles of the left column, fine ones of the top row; tamed: from the mean."""
    model, sheets, grid = tiny_gan("stylegan"), [], gan.grid
    monkeypatch.setattr(gan, "grid", lambda x, columns: sheets.append(x) or grid(x, columns))
    gan.draw_strips(gan.Run(gan.Config(out=str(tmp_path)), model=model), model)
    z, *noise = gan.draw(model, 8, gan.seeded(0, "strips"))
    noise = [x[:1] for x in noise]
    with torch.no_grad():
        w, mean = model.styles(z), model.mean_style()
        half = len(w) // 2
        mixed = torch.cat([w[:half, 1:2], w[half:, 6:7]])  # second row, third column
        for sheet, place, styles in ((1, 13, mixed), (1, 3, w[:, 6:7]), (1, 10, w[:, 1:2]),
                                     (2, 10, mean), (2, 19, w[:, 1:2])):
            wanted = model.render(styles.expand(len(w), 1, -1), noise)[0] / 2 + 0.5
            torch.testing.assert_close(sheets[sheet][place], wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(sheets[0][:1], model(z[:1], *noise) / 2 + 0.5, atol=1e-4, rtol=0)


def test_collapse_and_two_samples_are_noticed():
    real = gan.scaled(gan.draw_digits(1200, "a")[0])
    other = gan.scaled(gan.draw_digits(1200, "b")[0])
    few = other[:5].repeat(100, 1, 1, 1) + 0.01 * torch.randn(500, 1, 28, 28)
    assert gan.variety(few, real) < 0.3 and 0.8 < gan.variety(other, real) < 1.2
    assert abs(gan.two_sample_accuracy(real, other, steps=60) - 0.5) < 0.08
    noise = torch.rand(1200, 1, 28, 28) * 2 - 1
    assert gan.two_sample_accuracy(real, noise, steps=60) > 0.97


def test_collapse_alarm(capsys, monkeypatch):
    model, test = tiny_gan("dcgan"), gan.draw_digits(300, "a")[0]
    D = gan.Discriminator(model.config)
    real = gan.draw_digits(300, "b")[0] / 255
    monkeypatch.setattr(gan, "sample", lambda model, n, seed: real[:n])
    assert gan.duel_score(model, D, test)["variety"] > 0.8 and not capsys.readouterr().err
    monkeypatch.setattr(gan, "sample", lambda model, n, seed: real[torch.arange(n) % 3])
    assert gan.duel_score(model, D, test)["variety"] < 0.1
    assert "mode collapse" in capsys.readouterr().err


# ==== gan.py as its users run it ==================================================================


def gan_words(data, out, **settings):
    settings = {"generator": "dcgan", "data": data, "out": out, "steps": 45, "batch_size": 4,
                "width": 8, "r1_every": 4, "latent_dim": 8, "samples": 7,
                "test_images": 30} | settings
    return [word for name, value in settings.items() for word in (gan.flag(name), str(value))]


@pytest.fixture(scope="session")
def forger(data, tmp_path_factory):
    """One unbroken run of gan.py, which several tests look at and none may change."""
    out = tmp_path_factory.mktemp("forger")
    assert gan.main(gan_words(data, out)) == 0
    return out


def test_what_a_gan_run_leaves(forger, tmp_path):
    names = {"checkpoint.pt", "metrics.csv", "samples.png", "training.png", "neighbours.png",
             "interpolation.png"}
    assert {p.name for p in forger.iterdir()} == names
    last = rows_of(forger)[-1]
    assert all(0 <= float(last[f"test_{n}"]) <= 1 for n in ("right_on_real", "two_samples"))
    state, model = weights(forger), gan.load(forger / "checkpoint.pt")
    weight = model.layers[2].weight
    assert torch.equal(weight, state["average"]["module.layers.2.weight"])
    assert not torch.equal(weight, state["model"]["layers.2.weight"]) and not model.training
    assert all(state[f"optimizer_{who}"]["state"][0]["step"] == 45 for who in "gd")
    out = copy_of(forger, tmp_path)
    assert gan.main(["--out", str(out), "--export", "3", "--truncation", "0.5"]) == 0
    assert (out / "samples.png").read_bytes() != (forger / "samples.png").read_bytes()
    (out / "export" / "mine.png").touch()
    for count in (3, 2):  # a smaller export takes away what was left of the larger one
        assert gan.main(["--out", str(out), "--export", str(count)]) == 0
        names = [f"{i:06}.png" for i in range(count)] + ["mine.png"]
        assert [p.name for p in sorted((out / "export").iterdir())] == names


def test_gan_killed_and_started_again(job, forger):
    out, shown = job
    ends_like(out, forger)
    assert "held out: " in shown
    frames = weights(out)["frames"]
    assert len(frames) == 20 and all(map(torch.equal, frames, weights(forger)["frames"]))


def test_gan_goes_on_at_another_rate(data, forger, tmp_path):
    out = copy_of(forger, tmp_path)
    assert gan.main(gan_words(data, out, steps=47, learning_rate=0)) == 0
    before, after = (weights(o)["model"] for o in (forger, out))
    assert weights(out)["step"] == 47 and all(torch.equal(after[n], x) for n, x in before.items())


def test_stylegan_stopped_and_started_again(data, tmp_path, monkeypatch):
    words = [gan_words(data, tmp_path / o, generator="stylegan", steps=9) for o in "ab"]
    assert gan.main(words[0]) == 0
    pictures = {"mixing.png", "truncation.png", "interpolation.png"}
    assert pictures <= {p.name for p in (tmp_path / "a").iterdir()}
    turn, calls = gan.forger_turn, []

    def stopped(*all_of_it):
        calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 4 else None)
        return turn(*all_of_it)

    with monkeypatch.context() as patch:
        patch.setattr(gan, "forger_turn", stopped)
        assert gan.main(words[1]) == 130
    assert weights(tmp_path / "b")["step"] == 5 and gan.main(words[1]) == 0
    for key in ("model", "discriminator", "average"):
        whole, again = (weights(tmp_path / o)[key] for o in "ab")
        assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("words, needle", [
    (["--image-size", "30"], "--image-size"), (["--width", "12"], "--width"),
    (["--batch-size", "10"], "--batch-size"),
    (["--generator", "biggan"], "--generator"), (["--latent-dim", "9"], "--restart")])
def test_gan_refuses_in_one_line(forger, data, tmp_path, capsys, words, needle):
    out = copy_of(forger, tmp_path)
    assert gan.main([*gan_words(data, out), *words]) == 2
    one_line(capsys, needle, script="gan")


# ==== cyclegan.py: the mathematics ================================================================


def tiny_cycle(**settings):
    torch.manual_seed(0)
    config = cyclegan.Config(width=8, blocks=1, image_size=24, **settings)
    return cyclegan.Translators(config)


def test_drawn_animals_differ_on_the_coat_alone():
    horses, mask = cyclegan.draw_animals(8, "t", False)
    zebras, again = cyclegan.draw_animals(8, "t", True)
    assert horses.shape == (8, 3, 64, 64) and horses.dtype == torch.uint8
    assert torch.equal(mask, again) and 0.05 < mask.mean() < 0.4
    difference = (horses.float() - zebras.float()).abs()
    bare = mask.expand(-1, 3, -1, -1) == 0  # sky and ground, but for hair: mane and tail
    assert difference[~bare].mean() > 30 and difference[bare].mean() < 1.5
    assert not torch.equal(horses, cyclegan.draw_animals(8, "u", False)[0])
    for size in (24, 28, 100):
        assert cyclegan.draw_animals(2, "t", True, size)[0].shape == (2, 3, size, size)


def test_discriminator_sees_70_pixels():
    D = cyclegan.Discriminator(cyclegan.Config(width=8))
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    verdicts = D(x)
    assert D(x[:, :, :24, :24]).shape == (1, 1, 1, 1)  # the smallest --image-size
    middle = verdicts.shape[2] // 2
    (slope,) = torch.autograd.grad(verdicts[0, 0, middle, middle], x)
    for side in (2, 3):
        seen = slope.abs().amax((1, 5 - side)).nonzero()[:, 1]
        assert seen.max() - seen.min() + 1 == 70


@pytest.mark.parametrize("height, width", [(16, 16), (20, 64), (17, 30), (97, 18)])
def test_translators_map_any_size_alone_and_in_a_batch(height, width):
    model, images = tiny_cycle().train(), torch.rand(3, 3, height, width)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for to in "AB":
        made = cyclegan.translate(model, images, to)
        assert made.shape == images.shape and model.training and 0 <= made.min() <= made.max() <= 1
        alone = cyclegan.translate(model, images[:1], to)
        torch.testing.assert_close(made[:1], alone, atol=1e-4, rtol=0)
    assert not torch.equal(cyclegan.translate(model, images, "A"), made)
    with pytest.raises(cyclegan.UserError, match="give A or B"):
        cyclegan.translate(model, images, "b")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Constant(nn.Module):
    """A network that adds one number, so that every loss can be told by hand."""
    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(float(number)))

    def forward(self, x):
        return x + self.number


def test_cycle_losses_against_hand_values():
    config = cyclegan.Config(cycle_weight=10, identity_weight=5)
    G, D = nn.Module(), nn.ModuleDict({"a": Constant(0.25), "b": Constant(-0.5)})
    G.to_b, G.to_a = Constant(0.3), Constant(0.1)
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    optimizer = torch.optim.SGD(G.parameters(), lr=0.0)
    as_a, as_b, figures = cyclegan.translators_turn(G, D, optimizer, a, b, config)
    torch.testing.assert_close((as_b[0, 0, 0, 0], as_a[0, 0, 0, 0]),
                               (torch.tensor(0.3), torch.tensor(1.1)))
    fool = (0.3 - 0.5 - 1) ** 2 + (1.1 + 0.25 - 1) ** 2
    figures = {name: value.item() for name, value in figures.items()}
    assert math.isclose(figures["fool"], fool, rel_tol=1e-5)
    assert math.isclose(figures["cycle"], 2 * 0.4, rel_tol=1e-5)
    assert math.isclose(figures["identity"], 0.3 + 0.1, rel_tol=1e-5)
    # d/d(to_b): its verdict, both ways of the cycle, and its own identity
    slope = 2 * (0.3 - 0.5 - 1) + 10 * 2 + 5
    assert math.isclose(G.to_b.number.grad, slope, rel_tol=1e-5)
    assert all(p.grad is None for p in D.parameters())
    without = cyclegan.Config(cycle_weight=10, identity_weight=0)
    cyclegan.translators_turn(G, D, optimizer, a, b, without)
    assert math.isclose(G.to_b.number.grad, slope - 5, rel_tol=1e-5)
    optimizer = torch.optim.SGD(D.parameters(), lr=0.0)
    before = G.to_b.number.grad.clone()
    fakes = [cyclegan.Buffer(5).swap(x) for x in (as_a, as_b)]
    figures = cyclegan.detectives_turn(D, optimizer, (a, b), fakes)
    by_hand = ((0 + 0.25 - 1) ** 2 + (1.1 + 0.25) ** 2 + (1 - 0.5 - 1) ** 2 + (0.3 - 0.5) ** 2) / 2
    assert math.isclose(figures["detectives"].item(), by_hand, rel_tol=1e-5)
    assert torch.equal(G.to_b.number.grad, before) and D["a"].number.grad is not None


@pytest.mark.parametrize("size", [(1, 2), (6, 5)])
def test_doubling_is_repeating_and_convolving(size):
    torch.manual_seed(0)
    ours, plain = cyclegan.Doubling(4, 3, 3), cyclegan.conv(4, 3, 3)
    plain.load_state_dict(ours.state_dict())
    x, weights = torch.randn(2, 4, *size), (ours.weight, plain.weight)
    made, wanted = ours(x), plain(F.interpolate(x, scale_factor=2))
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
    pull = torch.randn_like(made)
    slopes = [torch.autograd.grad((y * pull).sum(), w)[0]
              for y, w in zip((made, wanted), weights, strict=True)]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=0)


def test_cyclegan_r1_against_hand_values():
    """A detective whose verdict is scale x, on 3 x 4 x 4 values, has the mean slope scale / 48 at
    each of them: the penalty is half of 48 (scale / 48)^2, for pictures of any number."""
    class Scale(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(float(scale)))

        def forward(self, x):
            return x * self.scale

    D, x = nn.ModuleDict({"a": Scale(2), "b": Scale(3)}), torch.zeros(5, 3, 4, 4)
    penalty = cyclegan.r1_penalty(D["a"], x)
    assert math.isclose(penalty.item(), 0.5 * 4 / 48, rel_tol=1e-5)
    optimizer = torch.optim.SGD(D.parameters(), lr=0.0)
    figures = cyclegan.detectives_turn(D, optimizer, (x, x), (x, x), r1=10)  # zeros: no other slope
    assert math.isclose(figures["r1"].item(), 0.5 * (4 + 9) / 48, rel_tol=1e-5)
    assert math.isclose(D["b"].scale.grad.item(), 10 * 3 / 48, rel_tol=1e-5)
    assert "r1" not in cyclegan.detectives_turn(D, optimizer, (x, x), (x, x))


def test_each_turn_leaves_the_other_side_as_it_was():
    G, config = tiny_cycle(), cyclegan.Config(width=8, blocks=1, image_size=24)
    D = nn.ModuleDict({side: cyclegan.Discriminator(config) for side in "ab"})
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (G, D)]
    a, b = torch.rand(2, 2, 3, 32, 32)

    def state():
        return [[p.clone() for p in net.state_dict().values()] for net in (G, D)]

    first = state()
    as_a, as_b, _ = cyclegan.translators_turn(G, D, optimizers[0], a, b, config)
    optimizers[0].step()
    second, slopes = state(), [p.grad.clone() for p in G.parameters()]
    fakes = [cyclegan.Buffer(0).swap(fake) for fake in (as_a, as_b)]
    cyclegan.detectives_turn(D, optimizers[1], (a, b), fakes)
    optimizers[1].step()
    third = state()
    for before, after, moved in ((first, second, 0), (second, third, 1)):
        assert all(map(torch.equal, before[1 - moved], after[1 - moved]))
        same = list(map(torch.equal, before[moved], after[moved]))
        assert sum(same) < len(same) / 4
    assert all(map(torch.equal, slopes, [p.grad for p in G.parameters()]))


def test_partners_change_and_the_past_stays_in_its_pile(tmp_path, monkeypatch, piles):
    drawn, heard, penalties, batch_of = [], [], [], cyclegan.batch_of
    marks = [torch.full((1, 3, 32, 32), number) for number in (-0.5, 0.5)]
    monkeypatch.setattr(cyclegan, "batch_of", lambda pile, rows, size: (
        drawn.append(rows.tolist()), batch_of(pile, rows, size))[1])
    monkeypatch.setattr(cyclegan, "translators_turn", lambda *args: (*marks, {}))
    monkeypatch.setattr(cyclegan, "detectives_turn", lambda D, optimizer, real, fakes, r1: (
        heard.append(fakes), penalties.append(r1), {})[2])
    assert cyclegan.main(cycle_words(tmp_path, data=piles, steps=28, r1=3)) == 0
    assert penalties == 7 * [12, 0, 0, 0]
    pairs = [(a, b) for (a,), (b,) in zip(drawn[::2], drawn[1::2], strict=True)]
    epochs = [dict(pairs[i:i + 7]) for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)  # every picture of A, once
    assert len({tuple(epoch[a] for epoch in epochs) for a in range(7)}) == 7
    assert sum(epochs[0][a] != epochs[1][a] for a in range(7)) >= 3  # partners are of chance
    assert {b for _, b in pairs} == set(range(9))                    # and all of B takes part
    state = weights(tmp_path)
    for i, name in enumerate(("past_a", "past_b")):
        assert all((fakes[i] == marks[i]).all() for fakes in heard)
        assert all((picture == marks[i][0]).all() for picture in state[name]["pictures"])


def test_buffer_fills_and_then_mixes_half_and_half():
    torch.manual_seed(0)
    buffer = cyclegan.Buffer(20)
    for i in range(20):
        fake = torch.full((1, 3, 2, 2), float(i), requires_grad=True) * 1
        out = buffer.swap(fake)
        assert torch.equal(out, fake) and not out.requires_grad
    assert len(buffer.pictures) == 20 and not any(p.requires_grad for p in buffer.pictures)
    past = 0
    for i in range(20, 420):
        out = buffer.swap(torch.full((1, 3, 2, 2), float(i)))
        past += out[0, 0, 0, 0].item() != i
        assert len(buffer.pictures) == 20
    assert 160 < past < 240
    other = cyclegan.Buffer(20)
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(torch.stack(other.pictures), torch.stack(buffer.pictures))
    none = cyclegan.Buffer(0)
    assert torch.equal(none.swap(fake), fake) and not none.pictures


def test_cyclegan_schedule():
    values = [cyclegan.schedule(x) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert values == [1, 1, 1, 0.5, 0]


# ==== Photographs =================================================================================


def photograph(shape=(30, 40), mode="RGB", kind="PNG", shade=120):
    """An image file of this size (height, width), as bytes."""
    from PIL import Image
    picture, memory = Image.new(mode, shape[::-1], shade if mode == "L" else None), io.BytesIO()
    if mode != "L":
        picture.paste((shade, 10, 200, 0)[:len(picture.getbands())], (0, 0, *shape[::-1]))
    picture.save(memory, kind)
    return memory.getvalue()


def test_photographs_are_read(tmp_path, capsys):
    """From a folder and from a .zip; grey, CMYK and transparent ones are RGB like the others."""
    kinds = {"a/1.png": photograph(), "a/2.jpg": photograph(mode="CMYK", kind="JPEG"),
             "b/c/3.PNG": photograph(mode="L"), "b/4.png": photograph(mode="RGBA"),
             "b/5.jpg": photograph()[:60], "b/6.txt": b"no picture", ".hidden/7.png": photograph(),
             "__MACOSX/._1.png": b"", "../8.png": photograph((9, 12))}
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, content in kinds.items():
            archive.writestr(name, content)
            if not name.startswith(".."):
                path = tmp_path / "all" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    names = ["a/1.png", "a/2.jpg", "b/4.png", "b/5.jpg", "b/c/3.PNG"]
    for path in (tmp_path / "all", tmp_path / "all.zip"):
        files = cyclegan.picture_files(path)
        assert [name for name in files if not name.startswith(".")] == names
        pictures, kept = cyclegan.read_pictures([(name, files[name]) for name in names], 16)
        assert kept == [0, 1, 2, 4]
        assert pictures.shape == (4, 3, 16, 16) and pictures.dtype == torch.uint8
        assert (pictures[0] == torch.tensor([120, 10, 200])[:, None, None]).all()
        assert (pictures[3] == 120).all()
        assert "left out 1 of 5: " in capsys.readouterr().err
    assert cyclegan.read_picture("1", files["a/1.png"]).shape == (3, 30, 40)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_middle_square_is_taken():
    from PIL import Image
    wide, memory = Image.new("RGB", (60, 20)), io.BytesIO()
    wide.paste((255, 0, 0), (20, 0, 40, 20))
    wide.save(memory, "PNG")
    assert (cyclegan.read_picture("wide", memory.getvalue, 20)[0] == 255).all()


def bomb():
    """A .zip whose one member claims to unpack to a gigabyte."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("trainA/1.png", photograph())
    raw = bytearray(memory.getvalue())
    at = raw.index(b"PK\x01\x02")
    raw[at + 24:at + 28] = struct.pack("<I", 1 << 30)
    return bytes(raw)


@pytest.mark.parametrize("content, needle", [
    (b"no zip", "neither a folder"), (bomb, "256 MiB"), (None, "neither a folder")])
def test_bad_archives(tmp_path, content, needle):
    path = tmp_path / "bad.zip"
    if content:
        path.write_bytes(content() if callable(content) else content)
    with pytest.raises(cyclegan.UserError, match=needle):
        cyclegan.read_pictures(list(cyclegan.picture_files(path).items()), 16)


def test_grey_of_16_bits_and_transparency():
    from PIL import Image
    for mode, colour, expected in (("I;16", 0x4000, (64, 64, 64)), ("I;16", 0xffff, (255,) * 3),
                                   ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
                                   ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
                                   ("LA", (10, 0), (255, 255, 255)), ("1", 1, (255, 255, 255))):
        memory = io.BytesIO()
        Image.new(mode, (8, 8), colour).save(memory, "PNG")
        for size in (None, 4):
            picture = cyclegan.read_picture("1", memory.getvalue, size)
            assert (picture == torch.tensor(expected)[:, None, None]).all(), (mode, colour)


def test_a_huge_picture_is_left_out():
    content = photograph((8200, 8200), mode="1")
    with pytest.raises(cyclegan.UserError, match="64 million"):
        cyclegan.read_picture("huge.png", lambda: content, 16)


def test_equal_seeds_give_equal_animals():
    few, many = (cyclegan.draw_animals(n, "A", True, 24) for n in (3, 120))
    assert all(torch.equal(a, b[:3]) for a, b in zip(few, many, strict=True))
    assert len(many[0]) == 120 and len(cyclegan.draw_animals(0, "A", True, 24)[0]) == 0


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(cyclegan.UserError, match="pip install pillow"):
        cyclegan.read_pictures([("1.png", photograph)], 16)


# ==== Colour ======================================================================================


def write_pile(path, names, shades=range(10, 250, 3)):
    """Pictures of these names, each in a shade of its own, into a folder or a .zip."""
    files = {name: photograph(shade=shade) for name, shade in zip(names, shades, strict=False)}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    for name, content in files.items() if path.suffix != ".zip" else ():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="session")
def pile(tmp_path_factory):
    """Twenty pictures of two kinds, and eight of them to judge on."""
    kinds = [f"{part}/{kind}/{i}.png" for part, count in (("train", 20), ("test", 8))
             for kind in ("Great_Dane", "cat") for i in range(count // 2)]
    return write_pile(tmp_path_factory.mktemp("colour") / "pile", kinds)


@pytest.mark.parametrize("end", ["", ".zip"])
def test_folders_are_kinds(tmp_path, capsys, end):
    """train and test say what is what; else each tenth is held out; what is broken takes its label
    with it."""
    names = ["x/train/cat/1.png", "x/train/Great_Dane/2.png", "x/train/cat/3.png",
             "x/test/cat/4.png", "x/test/owl/5.png"]
    path = write_pile(tmp_path / f"split{end}", names)
    data = vae.load_images(str(path), "", 16, 3)
    assert data.names == ["cat", "great dane", "owl"] and data.train.shape == (3, 3, 16, 16)
    shades = data.train[:, 0, 0, 0].tolist(), data.test[:, 0, 0, 0].tolist()
    assert dict(zip(shades[0], data.train_labels.tolist(), strict=True)) == {13: 1, 10: 0, 16: 0}
    assert dict(zip(shades[1], data.test_labels.tolist(), strict=True)) == {19: 0, 22: 2}
    names = [f"{'cat' if i % 2 else 'dog'}/{i // 2:02}.png" for i in range(25)]
    data = vae.load_images(str(write_pile(tmp_path / f"mixed{end}", names)), "", 16, 3)
    assert len(data.train) == 23 and sorted(data.test_labels.tolist()) == [0, 1]
    assert sorted(data.test[:, 0, 0, 0].tolist()) == [10 + 3 * 14, 10 + 3 * 19]  # dog/07, cat/09
    assert data.train_labels[:8].unique().numel() == 2  # not one kind first, then the other
    data = vae.load_images(str(write_pile(tmp_path / f"flat{end}", ["b.png", "a.png"])), "", 8, 1)
    assert data.names == ["picture"] and data.train.shape == (1, 1, 8, 8)
    luma = round(0.299 * 13 + 0.587 * 10 + 0.114 * 200)
    assert (data.train == luma).all()
    assert not capsys.readouterr().err
    if not end:
        split, whole = tmp_path / "split/x/train", {10: 0, 13: 1, 16: 0}
        for shade, name in ((10, "cat/1.png"), (13, "Great_Dane/2.png"), (16, "cat/3.png")):
            content = (split / name).read_bytes()
            (split / name).write_bytes(b"broken")
            data = vae.load_images(str(tmp_path / "split"), "", 16, 3)
            (split / name).write_bytes(content)
            shades = zip(data.train[:, 0, 0, 0].tolist(), data.train_labels.tolist(), strict=True)
            assert dict(shades) == {key: whole[key] for key in whole if key != shade}
            assert "left out 1 of 3" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures(tmp_path, capsys, count):
    path = write_pile(tmp_path / "few.zip", ["cat/1.png"][:count])
    assert vae.main(["--data", str(path), "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, "few.zip", "fewer than two pictures")


def cifar10(folder, damage=lambda files: files, cut=None):
    """An archive as the published one, of three pictures a batch."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    records = torch.randint(0, 256, (18, 3073), dtype=torch.uint8)
    records[:, 0] = torch.arange(18) % 10
    files = {f"data_batch_{i}.bin": records[3 * i - 3:3 * i] for i in range(1, 6)}
    files["test_batch.bin"] = records[15:]
    files = damage({name: bytes(x.flatten().tolist()) for name, x in files.items()})
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (folder / "cifar-10-binary.tar.gz").write_bytes(memory.getvalue()[:cut])
    return records


def test_cifar10_is_read_and_downloaded_once(tmp_path, monkeypatch):
    records = cifar10(tmp_path / "there")
    content = (tmp_path / "there" / "cifar-10-binary.tar.gz").read_bytes()
    digests = []

    def download(urls, path, digest):
        digests.append(digest)
        gan.write_file(path, content)

    monkeypatch.setattr(gan, "download", download)
    for _ in range(2):
        data = gan.load_images("cifar10", str(tmp_path), 32, 3)
    assert len(digests) == 1 and len(digests[0]) == 32
    assert data.train.shape == (15, 3, 32, 32) and data.test.shape == (3, 3, 32, 32)
    assert torch.equal(data.train.flatten(1), records[:15, 1:])
    assert data.test_labels.tolist() == [5, 6, 7] and data.names[8] == "ship"
    assert sorted(p.name for p in (tmp_path / "cifar10").iterdir()) == ["cifar-10-binary.tar.gz"]
    assert gan.load_images("cifar10", str(tmp_path), 28, 1).train.shape == (15, 1, 28, 28)


@pytest.mark.parametrize("damage, cut", [
    (lambda files: {}, None), (lambda files: files, 900), (lambda files: files, 0),
    (lambda files: files | {"test_batch.bin": b"\x0a" * 3073}, None),
    (lambda files: files | {"test_batch.bin": b"\x01" * 3072}, None),
    (lambda files: files | {"test_batch.bin": b""}, None)])
def test_damaged_cifar10_is_refused(tmp_path, capsys, damage, cut):
    cifar10(tmp_path / "d" / "cifar10", damage, cut)
    words = ["--data", "cifar10", "--data-dir", str(tmp_path / "d"), "--out", str(tmp_path / "o")]
    assert vae.main(words) == 2
    one_line(capsys, "cifar-10-binary.tar.gz", "not a good CIFAR-10 archive")


def test_colour_density_adds_up_to_one():
    """Over all 256 values, wherever its middle is and however wide; and it is a share of area."""
    x = (torch.arange(256) / 255)[:, None, None, None].expand(-1, 3, 1, 1)
    for middle in (-0.5, 0.0, 0.3217, 1.0, 1.4):
        for log_scale in (-6.5, -3.0, -1.0, 1.0):
            scales = torch.tensor([log_scale, -2.0, 0.0])
            parts = [vae.log_logistic(torch.full((256, 1, 1, 1), middle), scales[i:i + 1],
                                      x[:, :1]).double() for i in range(3)]
            for part in parts:
                assert part.exp().sum().item() == pytest.approx(1, abs=1e-4)
            together = vae.log_logistic(torch.full((256, 3, 1, 1), middle), scales, x)
            torch.testing.assert_close(together, sum(parts).float())
    ends = (torch.tensor([100.5, 99.5], dtype=torch.float64) / 255 - 0.45) / 0.1
    share = ends.sigmoid()[0] - ends.sigmoid()[1]
    got = vae.log_logistic(torch.full((1, 1, 1), 0.45), torch.tensor([0.1]).log(),
                           torch.full((1, 1, 1), 100 / 255))
    assert got.item() == pytest.approx(share.log().item(), abs=1e-4)
    far = vae.log_logistic(torch.full((1, 1, 1), 9.), torch.tensor([-6.]), torch.zeros(1, 1, 1))
    assert far.isfinite()


def test_colour_likelihood_against_quadrature():
    """log p(x) of a model with one latent number, by brute force over all z, in nats and bits."""
    torch.manual_seed(0)
    model = vae.VAE(vae.Config(latent_dim=1, width=2, channels=3, image_size=8))
    with torch.no_grad():
        model.log_scale.copy_(torch.tensor([1., 0.5, 0.]))
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    x, z = vae.scaled(images), torch.linspace(-8, 8, 4001)
    prior = distributions.Normal(0, 1).log_prob(z) + math.log(z[1] - z[0])
    with torch.no_grad():
        fit = [vae.log_fit(model, z[:, None], picture.expand(4001, -1, -1, -1)) for picture in x]
    expected = torch.stack([(f + prior).logsumexp(0) for f in fit])
    got = vae.log_likelihood(model, x, 2000, seed=0)
    torch.testing.assert_close(got, expected, atol=0.05, rtol=0)
    figures = vae.judge(model, images)
    assert figures["test_bits_per_dim"] == pytest.approx(
        -figures["test_bound"] / (3 * 8 * 8) / math.log(2))


@pytest.mark.parametrize("script, words, seen", [
    (vae, [], "test_bits_per_dim"), (vae, ["--kind", "ae"], "test_reconstruction"),
    (gan, ["--latent-dim", "8"], "test_variety"),
    (gan, ["--generator", "dcgan"], "test_variety"),
    (ddpm, ["--blocks", "1", "--diffusion-steps", "20", "--sampling-steps", "3", "--prompt",
            "a great dane"], "test_bits_per_dim")],
    ids=["vae", "ae", "stylegan", "dcgan", "ddpm"])
def test_in_colour(script, words, seen, pile, tmp_path, capsys):
    """Trained, judged, drawn and sampled in colour; then grey data or channels are refused."""
    out = tmp_path / "out"
    words = ["--out", str(out), "--steps", "4", "--batch-size", "4", "--width", "8", "--samples",
             "6", "--image-size", "16", *words]
    with pytest.MonkeyPatch.context() as patch:
        if script is gan:
            patch.setattr(gan, "two_sample_accuracy", lambda *_: 0.5)
        assert script.main(["--data", str(pile), *words]) == 0
    with open(out / "metrics.csv", newline="") as file:
        assert math.isfinite(float(list(csv.DictReader(file))[-1][seen]))
    still, frames = decode_png((out / "samples.png").read_bytes())
    assert still.shape[2] == 3 and not frames
    model = script.load(out / "checkpoint.pt")
    images = script.sample(model, ["a cat", ""] if script is ddpm else 2, seed=0)
    assert images.shape == (2, 3, 16, 16) and 0 <= images.min() and images.max() <= 1
    capsys.readouterr()
    for change in (["--data", "digits"], ["--channels", "1"], ["--image-size", "32"]):
        assert script.main([*words, "--steps", "9", *change]) == 2
        one_line(capsys, "began with", "--restart", script=script.__name__)


def test_a_grey_model_refuses_colour(data, pile, tmp_path, capsys):
    words = ["--out", str(tmp_path), "--steps", "2", "--width", "2", "--batch-size", "4",
             "--test-images", "4", "--draws", "2"]
    assert vae.main([*words, "--data", str(data)]) == 0
    capsys.readouterr()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert vae.main([*words, "--data", str(pile)]) == 2
    one_line(capsys, f"began with --data {data}")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("script, words, needle", [
    (vae, ["--image-size", "30"], "multiple of 4"), (ddpm, ["--image-size", "18"], "multiple of 4"),
    (gan, ["--image-size", "48"], "power of two"), (gan, ["--channels", "2"], "takes 1 or 3"),
    (vae, ["--channels", "4"], "--channels takes 0 to 3"),
    (ddpm, ["--image-size", "-4"], "--image-size takes")])
def test_sizes_that_cannot_be(tmp_path, capsys, script, words, needle):
    assert script.main([*words, "--out", str(tmp_path)]) == 2
    one_line(capsys, needle, script=script.__name__)


def mutated(raw, chance):
    """A copy with bits flipped, cut, its numbers blown up, bytes repeated, or names that climb."""
    raw, at = bytearray(raw), chance.randrange(len(raw))
    match chance.randrange(6):
        case 0:
            raw[at] ^= 1 << chance.randrange(8)
        case 1:
            for _ in range(30):
                raw[chance.randrange(len(raw))] = chance.randrange(256)
        case 2:
            del raw[at:]
        case 3:
            raw[at:at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\0\0\0\xc0"])
        case 4:
            raw[at:at] = raw[:at][-100:]
        case 5:
            for name in (b"train", b"cifar-10", b"archive", b"kind"):
                raw = raw.replace(name, (b"../" * 9)[:len(name)])
    return bytes(raw)


@pytest.mark.parametrize("kind", ["idx", "cifar10", "zip", "text", "checkpoint"])
def test_damaged_copies_are_read_or_refused(kind, data, tmp_path):
    """Never a traceback, or a file elsewhere."""
    place, chance = tmp_path / "place", random.Random(kind)
    place.mkdir()
    if kind == "idx":
        for path in data.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        path = place / "train-images-idx3-ubyte"
    elif kind == "cifar10":
        cifar10(place / "cifar10")
        path = place / "cifar10" / "cifar-10-binary.tar.gz"
    elif kind == "zip":
        path = write_pile(place / "p.zip", [f"train/kind/{i}.png" for i in range(6)])
    elif kind == "text":
        path = place / "words.txt"
        path.write_text("Wörter, words. " * 60, encoding="utf-8")
    else:
        config = vae.Config(out=str(place), width=2, latent_dim=2, image_size=8)
        vae.Run(config, model=vae.VAE(config)).save()
        path = place / "checkpoint.pt"
    read = {"idx": lambda: vae.load_images(str(place), ""), "text": lambda: gpt.read_text(path),
            "cifar10": lambda: vae.load_images("cifar10", str(place), 32, 3),
            "zip": lambda: vae.load_images(str(path), "", 8, 3),
            "checkpoint": lambda: vae.load(path)}
    raw, before, refused = path.read_bytes(), sorted(tmp_path.rglob("*")), 0
    whole = gzip.decompress(raw) if kind == "cifar10" else raw
    for _ in range(40):
        content = mutated(whole, chance)
        path.write_bytes(gzip.compress(content, 1) if kind == "cifar10" else content)
        try:
            read[kind]()
        except (vae.UserError, gpt.UserError):
            refused += 1
    assert 5 < refused and sorted(tmp_path.rglob("*")) == before


# ==== cyclegan.py as its users run it =============================================================


def cycle_words(out, **settings):
    settings = {"out": out, "steps": 45, "width": 8, "blocks": 1, "image_size": 32, "buffer": 3,
                "test_images": 5} | settings
    return [word for name, value in settings.items() for word in (cyclegan.flag(name), str(value))]


@pytest.fixture(scope="session")
def piles(tmp_path_factory):
    """Four small piles of photographs in a .zip, of different size."""
    path = tmp_path_factory.mktemp("piles") / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for pile, count in (("trainA", 7), ("trainB", 9), ("testA", 3), ("testB", 4)):
            for i in range(count):
                archive.writestr(f"set/{pile}/{i}.png", photograph((40, 36), shade=20 * i))
    return path


@pytest.fixture(scope="session")
def cycled(piles, tmp_path_factory):
    """One unbroken run of cyclegan.py, which several tests look at and none may change."""
    out = tmp_path_factory.mktemp("cycled")
    assert cyclegan.main(cycle_words(out, data=piles)) == 0
    return out


def test_what_a_cyclegan_run_leaves(cycled, piles, tmp_path):
    names = {"checkpoint.pt", "metrics.csv", "translations.png", "training.png"}
    assert {p.name for p in cycled.iterdir()} == names
    assert 0 <= float(rows_of(cycled)[-1]["test_cycle_B"]) <= 255
    model, state = cyclegan.load(cycled / "checkpoint.pt"), weights(cycled)
    rates = [state[f"optimizer_{who}"]["param_groups"][0]["lr"] for who in "gd"]
    assert rates[0] == rates[1] == pytest.approx(5e-4 * cyclegan.schedule(44 / 45))
    assert not model.training and len(state["past_a"]["pictures"]) == 3
    assert all(state[f"optimizer_{who}"]["state"][0]["step"] == 45 for who in "gd")
    folder, out = tmp_path / "photos", copy_of(cycled, tmp_path)
    folder.mkdir()
    for name, shape in (("1.png", (17, 40)), ("1.jpg", (33, 18)), ("2.png", (16, 16)),
                        ("3.png", (40, 2100))):
        (folder / name).write_bytes(photograph(shape, kind="JPEG" if "j" in name else "PNG"))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert cyclegan.main(["--out", str(out), "--translate", str(folder), "--to", "A"]) == 0
    made = {p.name: p.read_bytes() for p in (out / "translated").iterdir()}
    words = ["--out", str(out), "--test-images", "1", "--translate", str(folder)]
    assert cyclegan.main(words) == 0  # judged and drawn again
    assert weights(out)["config"]["translate"] == ""  # what is asked once is no setting
    still, frames = decode_png((out / "training.png").read_bytes())
    assert all(frame.shape == still.shape for frame in frames) and len(frames) > 2
    assert sorted(made) == ["1-2.png", "1.png", "2.png", "3.png"]
    sizes = [struct.unpack(">2I", made[name][16:24]) for name in sorted(made)]
    assert sizes == [(40, 17), (18, 33), (16, 16), (2048, 39)]
    assert before == {p: p.read_bytes() for p in folder.iterdir()}
    assert cyclegan.main(["--out", str(out), "--test-images", "2"]) == 0  # judged again
    assert rows_of(out)[-1]["test_cycle_B"] != rows_of(cycled)[-1]["test_cycle_B"]


def test_translate_never_writes_over_its_input(cycled, tmp_path, capsys, monkeypatch):
    out = copy_of(cycled, tmp_path)
    monkeypatch.delattr(cyclegan, "load_piles")  # a finished model translates without its data
    words = ["--out", str(out), "--translate"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("1.png", "b/1.png", "2.jpg", "2.PNG", "3.png"):
        (tmp_path / "a" / name).write_bytes(photograph((20, 20)))
    (tmp_path / "a" / "tiny.png").write_bytes(photograph((9, 20)))
    (tmp_path / "a" / "torn.png").write_bytes(photograph((20, 20))[:60])
    assert cyclegan.main([*words, str(tmp_path / "a")]) == 0
    made = sorted(p.name for p in (out / "translated").iterdir())
    assert made == ["1-2.png", "1.png", "2-2.png", "2.png", "3.png"]
    assert "left out 2 of 7" in capsys.readouterr().err
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "tiny.png").write_bytes(photograph((9, 20)))
    (tmp_path / "odd" / "thread.png").write_bytes(photograph((16, 9000)))
    assert cyclegan.main([*words, str(tmp_path / "odd")]) == 2  # not one could be translated
    assert "smaller than 16 pixels" in capsys.readouterr().err
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert cyclegan.main([*words, str(out)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("../../evil.png", photograph((20, 20)))
        archive.writestr("deep/fine.png", photograph((20, 20)))
    assert cyclegan.main([*words, str(tmp_path / "z.zip")]) == 0
    assert (out / "translated" / "fine.png").exists()
    assert not [path for path in tmp_path.rglob("*evil*")]


def test_cyclegan_killed_and_started_again(job, cycled):
    out, _ = job
    ends_like(out, cycled)
    for pile in ("past_a", "past_b"):  # the past travels, each in its own pile
        ours, whole = weights(out)[pile]["pictures"], weights(cycled)[pile]["pictures"]
        assert len(ours) == 3 and all(map(torch.equal, ours, whole))


def test_cyclegan_on_drawn_animals_and_on_two_folders(tmp_path):
    assert cyclegan.main(cycle_words(tmp_path / "o", steps=2)) == 0
    last = rows_of(tmp_path / "o")[-1]
    assert float(last["test_copy_coat_B"]) > 30 > 3 > float(last["test_copy_beside_B"])
    for pile in "ab":
        (tmp_path / pile).mkdir()
        for i in range(11):
            (tmp_path / pile / f"{i:02}.png").write_bytes(photograph(shade=i))
    config = cyclegan.Config(data=f"{tmp_path / 'a'},{tmp_path / 'b'}", image_size=24)
    assert [len(pile) for pile in cyclegan.load_piles(config)[:4]] == [10, 10, 1, 1]
    assert config.out == str(Path("out", "cyclegan-a-b"))
    (tmp_path / "few").mkdir()
    for i in range(3):
        (tmp_path / "few" / f"{i}.png").write_bytes(photograph(shade=i))
    config = cyclegan.Config(data=f"{tmp_path / 'few'},{tmp_path / 'b'}", image_size=24)
    assert [len(pile) for pile in cyclegan.load_piles(config)[:4]] == [2, 10, 1, 1]


@pytest.mark.parametrize("words, needle", [
    (["--image-size", "30"], "--image-size"), (["--data", "no", "--restart"], "horse2zebra"),
    (["--data", "a,b,c", "--restart"], "two folders at most"),
    (["--cycle-weight", "4"], "--restart"), (["--translate", "nowhere"], "nowhere"),
    (["--data", "."], "--restart")])
def test_cyclegan_refuses_in_one_line(cycled, piles, tmp_path, capsys, words, needle):
    out = copy_of(cycled, tmp_path)
    assert cyclegan.main([*cycle_words(out, data=piles), *words]) == 2
    one_line(capsys, needle, script="cyclegan")


# ==== What training follows, and what pictures show ===============================================


def test_the_last_step_has_the_rate_of_its_place(reference, painter, writer, forger):
    for script, out, shares in ((vae, reference, {"": 1}), (ddpm, painter, {"": 1}),
                                (gpt, writer, {"_muon": 1, "_adamw": 1 / 3})):
        state = weights(out)
        steps, peak = state["config"]["steps"], state["config"]["learning_rate"]
        for name, share in shares.items():
            rate = share * peak * script.schedule((steps - 0.5) / steps)
            assert state["optimizer" + name]["param_groups"][0]["lr"] == pytest.approx(rate)
        ramp = [script.schedule(x) for x in (0, 0.005, 0.01, 0.04, 0.3, 0.7, 1)]
        assert ramp[:4] == sorted(ramp[:4]) and ramp[3:] == sorted(ramp[3:])[::-1]
        assert ramp[0] == 0 and 0.9 < ramp[3] <= 1 and ramp[-1] == pytest.approx(0)
    state = weights(forger)
    peak = state["config"]["learning_rate"]
    for group in [*state["optimizer_g"]["param_groups"], *state["optimizer_d"]["param_groups"]]:
        assert group["lr"] == pytest.approx(peak * gan.schedule(44 / 45) * group["pace"])
    values = [gan.schedule(x) for x in (0, 0.3, 0.65, 1)]
    assert values == pytest.approx([1, 1, 0.5, 0])


def test_bytes_become_floats_of_the_right_range():
    x = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(3 * 24 * 24).view(2, 3, 24, 24)
    assert gan.scaled(x).unique().tolist() == ddpm.scaled(x).unique().tolist() == [-1, 1]
    assert cyclegan.batch_of(x, torch.tensor([1, 0]), 24).mean((1, 2, 3)).tolist() == [1, -1]
    assert vae.scaled(x).unique().tolist() == [0, 1]


@pytest.fixture
def sheets(monkeypatch):
    """What the scripts lay out on sheets from now on."""
    seen = []
    for script in (vae, gan, ddpm, cyclegan):
        monkeypatch.setattr(script, "grid", lambda x, columns, scale=2, draw=script.grid: (
            seen.append(x), draw(x, columns, scale))[1])
    return seen


def test_rebuilt_pictures_stand_below_their_originals(sheets, tmp_path):
    model, test = tiny_vae(), vae.draw_digits(45, "a")[0]
    vae.draw_reconstructions(vae.Run(vae.Config(out=str(tmp_path))), model, test)
    rows = sheets[0].view(8, 10, 1, 28, 28)
    assert torch.equal(rows[::2].flatten(0, 1), test[:40] / 255)
    with torch.no_grad():
        rebuilt = model.picture(vae.mean_codes(model, test[:40]))
    torch.testing.assert_close(rows[1::2].flatten(0, 1), rebuilt)


def test_sheets_of_ddpm(sheets, tmp_path):
    model, data = tiny_ddpm(), ddpm.load_images("digits", "")
    data = data._replace(train=data.train[:300], test=data.test[:20])
    run = ddpm.Run(ddpm.Config(out=str(tmp_path), sampling_steps=2, prompt=["a three"]))
    ddpm.draw_forward(run, model, data)
    forward = sheets[0].view(4, 10, 28, 28)
    torch.testing.assert_close(forward[:, 0], data.test[:4, 0] / 255, atol=1e-5, rtol=0)
    assert abs(forward[:, -1].std().item() - 0.5) < 0.05  # N(0, 1) at half the size
    ddpm.draw_neighbours(run, model, data)
    pairs = sheets[1].view(2, 2, 10, 784)
    near = torch.cdist(pairs[:, 1].flatten(0, 1), data.train.flatten(1) / 255)
    assert (near.amin(1) < 1e-2).all()
    own = torch.cdist(pairs[:, 0].flatten(0, 1), data.train.flatten(1) / 255)
    assert torch.equal(own.argmin(1), near.argmin(1))
    ddpm.draw_denoising(run, model)
    drawn = ddpm.sample(model, ["a three"] * 12, 2, seed=0)
    torch.testing.assert_close(sheets[-1].clamp(0, 1), drawn, atol=1e-5, rtol=0)


def test_sheets_of_gan_and_cyclegan(sheets, tmp_path):
    model, train = tiny_gan("dcgan"), gan.draw_digits(300, "a")[0]
    run = gan.Run(gan.Config(out=str(tmp_path)))
    gan.draw_neighbours(run, model, train)
    pairs = sheets[0].view(2, 2, 10, 784)
    near = torch.cdist(pairs[:, 1].flatten(0, 1), train.flatten(1) / 255)
    own = torch.cdist(pairs[:, 0].flatten(0, 1), train.flatten(1) / 255)
    assert (near.amin(1) < 1e-2).all() and torch.equal(own.argmin(1), near.argmin(1))
    run = cyclegan.Run(cyclegan.Config(out=str(tmp_path)))
    test = [torch.rand(2, 3, 24, 24) for _ in "ab"]
    run.film(cyclegan.both_ways(tiny_cycle(), test))
    cyclegan.draw_training(run, tiny_cycle(), test)
    for sheet in sheets[1:]:
        for picture, place in ((test[0][0], 0), (test[1][0], 2), (test[0][1], 4)):
            assert (sheet[place] - picture).abs().max() < 0.03  # 32 shades


def test_figures_of_a_copying_translator(monkeypatch):
    """By hand: where B as A is B itself, all errors are those of a copy; PSNR as it is defined."""
    monkeypatch.setattr(cyclegan, "translate", lambda model, x, to: x)
    piles = cyclegan.load_piles(cyclegan.Config(test_images=6), training=False)
    figures = cyclegan.judge(None, piles)
    truth, mask = piles.truth["B"]
    error = (piles.test_a.double() - truth).abs().mean(1, keepdim=True)
    psnr = [10 * math.log10(255**2 / (a.double() - b).square().mean().item())
            for a, b in zip(piles.test_a, truth, strict=True)]
    assert figures["test_cycle_B"] == figures["test_cycle_A"] == 0
    for copy in ("", "copy_"):
        assert figures[f"test_{copy}psnr_B"] == pytest.approx(sum(psnr) / 6, rel=1e-4)
        coat = (error * mask).sum() / mask.sum()
        assert figures[f"test_{copy}coat_B"] == pytest.approx(coat.item(), rel=1e-4)


def test_a_gpt_begins_at_chance_and_says_so_per_byte(text, tmp_path):
    config = gpt.Config(data=str(text), out=str(tmp_path), vocab_size=300, block_size=16, layers=1,
                        heads=2, width=16, steps=1, tokens=1)
    model = gpt.train(config)
    train, _ = gpt.load_text(str(text), "")
    per_byte = len(model.tokenizer.encode(train)) / len(train.encode())
    assert float(rows_of(tmp_path)[0]["nats_per_byte"]) == pytest.approx(math.log(300) * per_byte,
                                                                        rel=1e-4)
    torch.manual_seed(0)
    block = gpt.GPT(gpt.Config(width=128)).blocks[0]
    for layer in (block.attention.qkv, block.mlp[0]):
        assert layer.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not block.mlp[2].weight.any() and not block.attention.out.weight.any()


def test_clocks_of_the_time_embedding():
    e = ddpm.time_embedding(torch.tensor([3.0, 500.0]), 64)
    for hand in (0, 7, 31):
        angle = 500 * 10000 ** (-hand / 32)
        assert e[1, hand].item() == pytest.approx(math.cos(angle), abs=1e-3)
        assert e[1, 32 + hand].item() == pytest.approx(math.sin(angle), abs=1e-3)


def test_guidance_rises_from_row_to_row(tmp_path, monkeypatch):
    model, asked = tiny_ddpm(), []
    config = ddpm.Config(out=str(tmp_path), samples=25, guidance=3, prompt=["a three", "an eight"])
    monkeypatch.setattr(ddpm, "sample", lambda model, prompts, steps, guidance, eta, seed: (
        asked.append((prompts, guidance.tolist())), torch.zeros(len(prompts), 1, 28, 28))[1])
    ddpm.draw_samples(ddpm.Run(config), model)
    ((prompts, guidance),) = asked
    assert guidance == [0.0] * 10 + [1.5] * 10 + [3.0] * 5
    assert prompts == (["a three", "an eight"] * 13)[:25]


def test_ddpm_is_judged_by_the_mean_over_its_pictures():
    model, test = tiny_ddpm(diffusion_steps=6, test_images=12), ddpm.draw_digits(20, "a")[0]
    bits = ddpm.bits_per_dim(model, test[:12] / 255, every=50, seed="test")
    assert ddpm.judge(model, test) == {"test_bits_per_dim": pytest.approx(bits.mean().item())}


def test_the_cosine_schedule_is_that_of_the_paper():
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = ddpm.cosine_schedule(1000)
    for t in (0, 1, 250, 500, 990):
        assert alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-6)


def test_colours_of_the_vae_are_the_middles_of_its_bumps():
    model = tiny_vae(channels=3, image_size=16)
    z = torch.randn(4, 3)
    with torch.no_grad():
        middle, picture = model.decode(z), model.picture(z)
    assert torch.equal(picture, middle.clamp(0, 1)) and 0 < picture.mean() < 1


def test_what_vae_logs_is_per_picture(data, tmp_path, monkeypatch):
    terms = vae.elbo_terms

    def known(model, x):
        reconstruction, kl = terms(model, x)
        return 0 * reconstruction - 5, 0 * kl + 2

    monkeypatch.setattr(vae, "elbo_terms", known)
    assert vae.main(arguments(data, tmp_path)) == 0
    row = rows_of(tmp_path)[0]
    assert float(row["kl"]) == pytest.approx(2) and float(row["loss"]) == pytest.approx(7)
