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
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import urllib.error
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
        if "# ---- block:" not in text:
            continue
        blocks = re.findall(r"^# -+ block: (\w+) .*?\n(.*?)^# -+ end block -+$", text, re.M | re.S)
        assert len(blocks) == len(re.findall(r"^# -+ end block", text, re.M)) >= 1, script
        for name, body in blocks:
            first, where = seen.setdefault(name, (body, script.name))
            diff = difflib.unified_diff(first.splitlines(), body.splitlines(), where, script.name)
            assert first == body, "\n".join(diff)
    assert {"runs", "pictures", "ranks"} <= set(seen)


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


# ==== The small house: files without marked blocks ================================================
LIMITS = {"vae.py": (820, 410), "gan.py": (880, 480), "cyclegan.py": (820, 425),
          "ddpm.py": (940, 500), "gpt.py": (700, 470)}
SMALL = [script for script in SCRIPTS if "# ---- block:" not in script.read_text()]
PUBLIC = {"Config", "train", "load", "main", "sample", "translate", "generate", "nats_per_byte",
          "log_likelihood", "bits_per_dim", "draw_faces"}
small = pytest.mark.parametrize("script", SMALL, ids=lambda p: p.name)


@small
def test_lengths(script):
    lines = script.read_text().splitlines()
    chapters = [i for i, line in enumerate(lines) if line.startswith("# ==== Utilities")]
    assert len(chapters) == 1 and len(lines) <= LIMITS[script.name][0]
    assert chapters[0] <= LIMITS[script.name][1]
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            assert node.end_lineno - node.lineno < 45


@small
def test_one_statement_a_line(script):
    starts = [node.lineno for node in ast.walk(ast.parse(script.read_text()))
              if isinstance(node, ast.stmt)]
    assert len(starts) == len(set(starts))


@small
def test_imports_are_at_the_top_and_used(script):
    text = script.read_text()
    tree = ast.parse(text)
    ends = min(node.lineno for node in tree.body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert len(node.names) == 1 or isinstance(node, ast.ImportFrom)
            assert node.lineno < ends or node.module == "PIL"
            for name in node.names:
                word = (name.asname or name.name).split(".")[0]
                uses = re.findall(rf"\b{word}\b", text)
                assert len(uses) > len(re.findall(rf"import .*\b{word}\b", text)), word


@small
def test_nothing_is_unused(script):
    """Every name at the top level is used in the file, or is in its Python interface."""
    text = script.read_text()
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        for name in names:
            assert name in PUBLIC or len(re.findall(rf"\b{name}\b", text)) > 1, name


def test_same_name_same_text():
    seen = {}
    for script in SMALL:
        text = script.read_text()
        start = text[:text.index("# ==== Utilities")].count("\n")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno > start:
                own = {"draw_samples", "load"}  # a file's own sheets and loading
                if node.name not in own:
                    segment = ast.get_source_segment(text, node)
                    assert seen.setdefault(node.name, segment) == segment, (script, node.name)
    assert {"Run", "write_file", "png", "paint_faces"} <= set(seen)


# ==== Data ========================================================================================


def test_a_folder_is_the_same_however_it_is_written():
    for data in ("pictures/", "./pictures", "a/../pictures"):
        config = cyclegan.Config(data=data)
        assert (config.data, config.out) == ("pictures", str(Path("out", "cyclegan-pictures")))
    assert cyclegan.Config(data="one/,./two").data == "one,two"


def one_line(capsys, *needles, script):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{script}.py: error: "), error
    assert all(needle in error for needle in needles), error


def test_download(tmp_path):
    """Mirrors are dead, lie or are cut short; the last is right: by the sha256 of the content,
    plain or packed, by the md5 of the file, or as a .zip that is whole."""
    def files(word):
        memory = io.BytesIO()
        with zipfile.ZipFile(memory, "w") as archive:
            archive.writestr("1.txt", b"right")
        broken = memory.getvalue().replace(b"right", word)
        packed = gzip.compress(word, mtime=0)
        return {"sha256.txt": word, "sha256.gz": packed, "md5.gz": packed, "set.zip": broken}

    right, sha256 = files(b"right"), hashlib.sha256(b"right").hexdigest()
    digests = sha256, sha256, hashlib.md5(right["md5.gz"]).hexdigest(), "zip"
    torn = {name: content[:-1] for name, content in right.items()}
    for mirror, served in (("liar", files(b"wrong")), ("torn", torn), ("source", right)):
        (tmp_path / mirror).mkdir()
        for name, content in served.items():
            (tmp_path / mirror / name).write_bytes(content)
    for (name, content), digest in zip(right.items(), digests, strict=True):
        places = [tmp_path / mirror / name for mirror in ("dead", "liar", "torn", "source")]
        mirrors = [path.as_uri() for path in places]
        cyclegan.download(mirrors, tmp_path / "data" / name, digest)
        assert (tmp_path / "data" / name).read_bytes() == content
        with pytest.raises(cyclegan.UserError, match="without a network"):
            cyclegan.download(mirrors[:3], tmp_path / "nothing" / name, digest)
    assert not (tmp_path / "nothing").exists()


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "SHAKESPEARE", ((tmp_path / "dead").as_uri(), "0" * 64))
    with pytest.raises(gpt.UserError, match="without a network"):
        gpt.load_text("shakespeare", str(tmp_path / "data"))
    assert not list(tmp_path.rglob("*"))


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
    kinds = [kind for kind, _ in chunks]
    shown = len(frames) + (b"fcTL" in kinds and kinds.index(b"fcTL") < kinds.index(b"IDAT"))
    assert control == ([struct.pack(">2I", shown, 0)] if frames else [])
    return still, frames


def decode_frames(content):
    """All frames of a PNG whose still image is the first of them -> (frames, H, W, C)."""
    still, frames = decode_png(content)
    return torch.stack([still, *frames])


@pytest.mark.parametrize("channels", [1, 3])
def test_png_and_animation(channels):
    sheets = torch.randint(0, 256, (4, 9, 14, channels), dtype=torch.uint8)
    assert torch.equal(decode_png(cyclegan.png(sheets[0]))[0], sheets[0])
    still, frames = decode_png(cyclegan.png(sheets[0], list(sheets[1:])))
    assert torch.equal(still, sheets[0]) and torch.equal(torch.stack(frames), sheets[1:])


@pytest.mark.parametrize("n", [1, 7, 10, 11])
def test_grid_of_any_number(n):
    images = torch.rand(n, 1, 6, 5)
    sheet = cyclegan.grid(images, 10, scale=1)[:, :, 0]
    columns = min(n, 10)
    assert sheet.shape == (-(-n // 10) * 7, columns * 6)
    for i in range(n):
        row, column = divmod(i, columns)
        place = sheet[row * 7:row * 7 + 6, column * 6:column * 6 + 5]
        assert torch.equal(place, (images[i, 0] * 255).round().byte())
    assert torch.equal(cyclegan.grid(images, 10, scale=2)[::2, ::2, 0], sheet)


# ==== Runs: code that stands in gpt.py and cyclegan.py ============================================


def test_epochs_visit_every_row_once():
    for count, size in ((10, 4), (8, 8), (3, 8)):  # a short last batch, an exact one, more than all
        run = cyclegan.Run.__new__(cyclegan.Run)
        run.config, seen = cyclegan.Config(batch_size=size), []
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
        run = cyclegan.Run(cyclegan.Config(out=out, steps=5, **settings))
        return [torch.rand(()).item() for _ in run.steps()]

    once, again, other = chance(), chance(), chance(seed=1)
    assert once == again and len({*once, *other}) == 10


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
    """Equal to the bit; of whole checkpoints, what their models and optimisers hold."""
    def flat(thing):
        if isinstance(thing, dict):
            return [leaf for key in sorted(thing, key=str) for leaf in flat(thing[key])]
        if isinstance(thing, list):
            return [leaf for item in thing for leaf in flat(item)]
        return [thing]

    if "config" in a:
        a, b = ([s[name] for name in s if name.startswith(("model", "optimizer"))] for s in (a, b))
    a, b = flat(a), flat(b)
    return len(a) == len(b) > 0 and all(
        torch.equal(p, q) if torch.is_tensor(p) else p == q for p, q in zip(a, b, strict=True))


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
def beside(request, text, piles, tmp_path_factory):
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

    def continued(command):
        """Killed in the 30th call of objective by a checkpoint every 20 steps, and again."""
        out = place / f"ddpm-{len(command)}"
        words = ddpm_words(out, **({"steps": 30} if len(command) > 1 else {}))
        killer = place / "killer.py"
        killer.write_text(f"""
import itertools, os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import ddpm
ddpm.SAVE_SECONDS = -1  # after each reading
real, calls = ddpm.objective, itertools.count()
def objective(*a):
    if next(calls) == 29:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
ddpm.objective = objective
sys.exit(ddpm.main())
""")
        return [subprocess.run([*command, script, *words], capture_output=True, text=True,
                               timeout=120) for script in (killer, HERE / "ddpm.py")] + [out]

    def stopped():
        out = place / "stop"
        return stop_ranks(gpt_words(text, out, steps=10**6)), out

    jobs = {
        "test_gpt_killed_and_started_again": (killed, "gpt", "gradients", gpt_words, text),
        "test_two_ranks_end_where_one_process_does": (ranks, "gpt", gpt_words, text),
        "test_a_stop_reaches_all_ranks": (stopped,),
        "test_gpt_on_its_built_in_data": (newcomer, place / "newcomer"),
        "test_ddpm_killed_and_continued": (continued, [sys.executable]),
        "test_two_ranks_of_ddpm_end_where_one_process_does": (continued, torchrun("ddpm", [])[:-1]),
        "test_cyclegan_killed_and_started_again": (
            killed, "cyclegan", "translators_turn", cycle_words, piles)}
    names = {item.name for item in request.session.items}
    with ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(*job) for name, job in jobs.items() if name in names}


@pytest.fixture
def job(request, beside):
    return beside[request.node.name].result()


def test_stopped_from_python(text, tmp_path, monkeypatch):
    gradients = gpt.gradients

    def interrupted(*a):
        signal.raise_signal(signal.SIGINT)
        return gradients(*a)

    monkeypatch.setattr(gpt, "gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpt.train(gpt.command_line(gpt_words(text, tmp_path)))
    assert weights(tmp_path)["step"] == 1
    monkeypatch.undo()
    assert gpt.main(["--out", str(tmp_path), "--steps", "1"]) == 0  # enough of it: judge, write
    assert [row["step"] for row in rows_of(tmp_path)] == ["1"]
    assert (tmp_path / "samples.txt").exists() and weights(tmp_path)["judged"]


def copy_of(run, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for path in run.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_more_steps_and_another_judgement(cycled, tmp_path):
    assert [row["step"] for row in rows_of(cycled)] == ["20", "40", "45"]
    out = copy_of(cycled, tmp_path)
    assert cyclegan.main(["--out", str(out), "--steps", "60"]) == 0
    assert [row["step"] for row in rows_of(out)] == ["20", "40", "45", "60"]
    state = weights(out)
    assert state["step"] == steps_taken(state) == 60
    assert cyclegan.main(["--out", str(out), "--test-images", "2"]) == 0
    assert same(weights(out), state) and rows_of(out)[3] != rows_of(cycled)[-1]
    assert rows_of(out)[3]["fool"] == str(state["rows"][3]["fool"])
    assert rows_of(out)[3]["test_cycle_A"] != str(state["rows"][3]["test_cycle_A"])


def test_foreign_checkpoints_are_refused_and_untouched(text, writer, tmp_path, capsys):
    memory = io.BytesIO()
    torch.save(weights(writer) | {"script": "ddpm"}, memory)
    good = (writer / "checkpoint.pt").read_bytes()
    for content in (b"", b"junk", good[:len(good) // 2], memory.getvalue()):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert gpt.main(["--out", str(tmp_path)]) == 2
        one_line(capsys, "not a checkpoint", "--restart", script="gpt")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [content]
        with pytest.raises(gpt.UserError):
            gpt.load(tmp_path / "checkpoint.pt")
    assert gpt.main(gpt_words(text, tmp_path, steps=1) + ["--restart"]) == 0  # said, so done
    assert weights(tmp_path)["step"] == 1 and not weights(tmp_path)["config"]["restart"]
    with pytest.raises(gpt.UserError, match="cannot read"):
        gpt.load(tmp_path / "nothing.pt")


def test_settings_may_change_until_the_first_step_is_done(text, tmp_path, monkeypatch, capsys):
    """A run that failed before it did anything (a batch too large for the memory) binds nothing."""
    def too_large(*a):
        raise torch.OutOfMemoryError("not enough memory")

    monkeypatch.setattr(gpt, "gradients", too_large)
    assert gpt.main(gpt_words(text, tmp_path)) == 2
    assert "not enough memory" in capsys.readouterr().err.splitlines()[-1]
    assert weights(tmp_path)["step"] == 0
    monkeypatch.undo()
    assert gpt.main(["--out", str(tmp_path), "--batch-size", "8", "--width", "32"]) == 0
    assert weights(tmp_path)["step"] == 45


def test_bad_settings_from_python():
    for settings in ({"steps": 0}, {"steps": 1.5}, {"to": "C"}, {"r1": "1"}, {"seed": True}):
        with pytest.raises(cyclegan.UserError, match="--" + next(iter(settings))):
            cyclegan.Config(**settings)
    assert cyclegan.Config(r1=2).out == os.path.join("out", "cyclegan")
    expected = os.path.join("out", "cyclegan-mine")
    assert cyclegan.Config(data=str(Path("some", "mine"))).out == expected


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cyclegan.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(cyclegan.flag(f.name) in text for f in cyclegan.fields(cyclegan.Config))
    assert "(default 2800)" in text and "(default )" not in text and "False" not in text


def test_a_folder_that_cannot_be(text, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert gpt.main(gpt_words(text, tmp_path / "file" / "out")) == 2
    assert "gpt.py: error: cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk(writer, tmp_path, capsys):
    """When a checkpoint no longer fits, the one before stays whole."""
    resource = pytest.importorskip("resource")
    out = copy_of(writer, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        assert gpt.main(["--out", str(out), "--steps", "50"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in capsys.readouterr().err.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in writer.iterdir()}


def test_an_infinite_gradient_stops_a_duel_before_its_step(tmp_path, monkeypatch, capsys, piles):
    """The loss stays finite, its slope does not: no weight may follow it, not even in memory."""
    right, calls, stepped = cyclegan.verdict_loss, [], []

    def steep(x, *more):
        calls.append(1)
        return right(x, *more) + ((0 * x.sum()).sqrt() if len(calls) > 24 else 0)

    adam_step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (adam_step(self), stepped.append(all(
        p.isfinite().all() for group in self.param_groups for p in group["params"]))))
    monkeypatch.setattr(cyclegan, "verdict_loss", steep)
    assert cyclegan.main(cycle_words(tmp_path, data=piles)) == 1 and all(stepped) and stepped
    assert "grad" in capsys.readouterr().err.splitlines()[-1]
    model = cyclegan.load(tmp_path / "checkpoint.pt")
    assert all(p.isfinite().all() for p in model.parameters())


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
    """A signal finishes the step, saves, says how to go on; and the handlers of before are back."""
    before, gradients, calls = signal.getsignal(number), gpt.gradients, []

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(number)
        return gradients(*a)

    monkeypatch.setattr(gpt, "gradients", interrupted)
    assert gpt.main(gpt_words(text, tmp_path)) == 128 + number
    assert signal.getsignal(number) == before
    assert "goes on" in capsys.readouterr().err.splitlines()[-1]
    assert weights(tmp_path)["step"] == 8
    monkeypatch.undo()
    for place, name in ((gpt.Run, "finish"), (gpt, "write_samples")):  # and after the last step
        monkeypatch.setattr(place, name, lambda *a: signal.raise_signal(number))
        assert gpt.main(["--out", str(tmp_path)]) == 128 + number
        monkeypatch.undo()
    assert gpt.main(["--out", str(tmp_path)]) == 0  # all other settings come from the checkpoint
    assert same(weights(tmp_path), weights(writer)) and rows_of(tmp_path) == rows_of(writer)


def test_writing_afterwards(writer, tmp_path, monkeypatch, capsys):
    out = copy_of(writer, tmp_path)
    monkeypatch.setattr(gpt, "load_text", None)  # no data are needed
    checkpoint, model = (out / "checkpoint.pt").read_bytes(), gpt.load(out / "checkpoint.pt")
    assert gpt.main(["--out", str(out), "--steps", "20"]) == 0  # more than that are done
    assert (out / "samples.txt").read_bytes() == (writer / "samples.txt").read_bytes()
    assert "held out: nats_per_byte" in capsys.readouterr().out
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
    assert (out / "checkpoint.pt").read_bytes() == checkpoint and rows_of(out) == rows_of(writer)


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
    (["--temperature", "nan"], ["--temperature"]), (["--temp", "1"], ["--temp"]),
    (["--steps", "none"], ["--steps"]), (["--steps", "0"], ["--steps", "1 to"]),
    (["--learning-rate", "inf"], ["--learning-rate"]), (["extra"], ["extra"]),
    (["--device", "cuda:9"], ["auto or cpu or cuda"]), (["--data", ""], ["a name or a path"]),
    (["--data", "a,"], ["a name or a path"])])
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
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nats_per_byte is inf at step 4" in last and "--learning-rate" in last
    assert all(p.isfinite().all() for p in gpt.load(tmp_path / "checkpoint.pt").parameters())
    calls.clear()
    with pytest.raises(FloatingPointError):
        gpt.train(gpt.command_line(gpt_words(text, tmp_path)))


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


# ==== Damaged copies ==============================================================================


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
            for name in (b"train", b"archive"):
                raw = raw.replace(name, (b"../" * 9)[:len(name)])
    return bytes(raw)


@pytest.mark.parametrize("kind", ["zip", "text", "checkpoint"])
def test_damaged_copies_are_read_or_refused(kind, piles, writer, tmp_path):
    """Never a traceback, or a file elsewhere."""
    path, chance, refused = tmp_path / "place" / "copy.zip", random.Random(kind), 0
    path.parent.mkdir()
    raw = {"zip": piles.read_bytes(), "text": ("Wörter, words. " * 60).encode(),
           "checkpoint": (writer / "checkpoint.pt").read_bytes()}[kind]
    config = cyclegan.Config(data=str(path), image_size=24)
    read = {"zip": lambda: cyclegan.load_piles(config), "text": lambda: gpt.read_text(path),
            "checkpoint": lambda: gpt.load(path)}[kind]
    for _ in range(40):
        path.write_bytes(mutated(raw, chance))
        try:
            read()
        except (cyclegan.UserError, gpt.UserError):
            refused += 1
    assert 5 < refused and sorted(tmp_path.rglob("*")) == [path.parent, path]


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


def test_the_last_step_has_the_rate_of_its_place(writer):
    state = weights(writer)
    steps, peak = state["config"]["steps"], state["config"]["learning_rate"]
    for name, share in (("muon", 1), ("adamw", 1 / 3)):
        rate = share * peak * gpt.schedule((steps - 0.5) / steps)
        assert state[f"optimizer_{name}"]["param_groups"][0]["lr"] == pytest.approx(rate)
    ramp = [gpt.schedule(x) for x in (0, 0.005, 0.01, 0.04, 0.3, 0.7, 1)]
    assert ramp[:4] == sorted(ramp[:4]) and ramp[3:] == sorted(ramp[3:])[::-1]
    assert ramp[0] == 0 and 0.9 < ramp[3] <= 1 and ramp[-1] == pytest.approx(0)


def test_bytes_become_floats_of_the_right_range():
    x = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(3 * 24 * 24).view(2, 3, 24, 24)
    assert cyclegan.batch_of(x, torch.tensor([1, 0]), 24).mean((1, 2, 3)).tolist() == [1, -1]


def test_sheets_of_cyclegan(tmp_path, monkeypatch):
    sheets, grid = [], cyclegan.grid
    monkeypatch.setattr(cyclegan, "grid", lambda x, columns, scale=2: (
        sheets.append(x), grid(x, columns, scale))[1])
    run = cyclegan.Run(cyclegan.Config(out=str(tmp_path)))
    test = [torch.rand(2, 3, 24, 24) for _ in "ab"]
    run.film(cyclegan.both_ways(tiny_cycle(), test))
    cyclegan.draw_training(run, tiny_cycle(), test)
    assert len(sheets) == 2
    for sheet in sheets:
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


# ==== vae.py ======================================================================================
def tiny_vae(channels=1, latent_dim=3, variational=True, size=8):
    torch.manual_seed(0)
    return vae.VAE(channels, size, 4, latent_dim, variational).double()


def tiny_faces(out, **settings):
    """The words of a tiny run on faces."""
    settings = {"faces": 64, "steps": 45, "width": 4, "batch_size": 8, "samples": 10} | settings
    words = [word for name, value in settings.items() for word in
             ("--" + name.replace("_", "-"), str(value))]
    return [*words, *(["--out", str(out)] if out else [])]


def run_vae(words, cwd=HERE, check=True):
    done = subprocess.run([sys.executable, HERE / "vae.py", *words], cwd=cwd, capture_output=True,
                          text=True, timeout=120)
    assert not check or done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done


def refused(capsys, words, *needles, script=vae):
    """One line on stderr, exit status 2."""
    capsys.readouterr()
    try:
        status = script.main([str(word) for word in words])
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{script.__name__}.py: error: "), lines
    assert all(str(needle) in lines[0] for needle in needles), lines


@pytest.fixture(scope="session")
def faces_run(tmp_path_factory):
    """A plain run in an empty folder, with its default --out."""
    place = tmp_path_factory.mktemp("vae")
    done = run_vae(tiny_faces(None), cwd=place)
    return place / "out" / "vae-width4-faces64-batch_size8", done


def test_kl_divergence_is_that_of_torch():
    mean, logvar = torch.randn(2, 5, 7, dtype=torch.float64)
    normal = distributions.Normal(mean, (0.5 * logvar).exp())
    expected = distributions.kl_divergence(normal, distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(vae.kl_divergence(mean, logvar), expected)
    assert vae.kl_divergence(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


def test_log_probabilities_add_up_over_pixels():
    logits, x = torch.randn(4, 1, 6, 6), torch.rand(4, 1, 6, 6).round()
    expected = distributions.Bernoulli(logits=logits).log_prob(x).sum((1, 2, 3))
    assert torch.allclose(vae.log_bernoulli(logits, x), expected, atol=1e-5)
    mean, x = torch.rand(2, 2, 3, 6, 6, dtype=torch.float64)
    scale = torch.full((3, 1, 1), -2.0, dtype=torch.float64)
    parts = sum(vae.log_logistic(mean[:, :, i:i + 1, j:j + 1], scale, x[:, :, i:i + 1, j:j + 1])
                for i in range(6) for j in range(6))
    assert torch.allclose(vae.log_logistic(mean, scale, x), parts)


@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.4999, 1.0])
@pytest.mark.parametrize("log_scale", [-7.0, -2.0, 1.0])
def test_256_levels_add_up_to_one(mean, log_scale):
    x = (torch.arange(256, dtype=torch.float64) / 255).view(256, 1, 1, 1)
    scale = torch.full((1, 1, 1), log_scale, dtype=torch.float64)
    log_p = vae.log_logistic(torch.full_like(x, mean), scale, x)
    assert abs(log_p.exp().sum() - 1) < 1e-6 and log_p.isfinite().all()
    x32 = vae.log_logistic(torch.full_like(x, mean).float(), scale.float(), x.float())
    assert x32.isfinite().all()


def test_elbo_does_not_depend_on_the_batch():
    model, x = tiny_vae(), torch.rand(6, 1, 8, 8, dtype=torch.float64).round()
    torch.manual_seed(1)
    reconstruction, kl = model(torch.cat([x, x]))
    assert torch.allclose(kl[:6], kl[6:]) and reconstruction.shape == (12,)
    mean, logvar = model.encode(x)
    torch.manual_seed(1)
    z = mean + (0.5 * logvar).exp() * torch.randn(12, 3, dtype=torch.float64)[:6]
    assert torch.allclose(reconstruction[:6], vae.log_bernoulli(model.decode(z), x))
    assert torch.allclose(kl[:6], vae.kl_divergence(mean, logvar))


def test_gradient_reaches_the_encoder_through_the_draw():
    model, x = tiny_vae(), torch.rand(6, 1, 8, 8, dtype=torch.float64).round()
    model(x)[0].sum().backward()  # the reconstruction alone
    assert model.encoder[-1].weight.grad.abs().sum(1).min() > 0  # means and variances


@pytest.mark.parametrize("channels", [1, 3])
def test_bound_against_quadrature(channels):
    """L_1 is the ELBO, L_k grows with k, and at last it is log p(x), by an integral over z."""
    model = tiny_vae(channels, latent_dim=1)
    with torch.no_grad():
        model.encoder[-1].weight.mul_(0.3)
        model.encoder[-1].bias.zero_()
    x = (torch.rand(3, channels, 8, 8, dtype=torch.float64) * 255).round() / 255
    x = x.round() if channels == 1 else x
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        joint = [model.log_prob(one.expand(3001, -1, -1, -1), z) - 0.5 * (z[:, 0]**2) for one in x]
        exact = torch.stack([j.logsumexp(0) for j in joint]) + math.log(18 / 3000 / math.tau**0.5)
        torch.manual_seed(0)
        terms = torch.stack([torch.stack(model(x)) for _ in range(2000)]).mean(0)
        elbo = terms[0] - terms[1]
    first, more, many = (
        torch.stack([vae.log_likelihood(model, x, k, seed) for seed in range(runs)]).mean(0)
        for k, runs in ((1, 2000), (5, 400), (3000, 1)))
    assert torch.allclose(first, elbo, atol=0.2 + 0.05 * (exact - elbo).max().item())
    assert (first < more).all() and (more < exact + 0.05).all()
    assert torch.allclose(many, exact, atol=0.05)


def test_autoencoder():
    model, x = tiny_vae(variational=False), torch.rand(6, 1, 8, 8, dtype=torch.float64).round()
    assert torch.equal(model(x)[0], model(x)[0]) and not model(x)[1].any()  # no noise, no KL
    mean = model.encode(x)[0]
    assert mean.mean(0).abs().max() < 1e-6 and (mean.std(0, correction=0) - 1).abs().max() < 0.1
    with pytest.raises(vae.UserError):
        vae.log_likelihood(model, x, 2)


def test_samples():
    model = tiny_vae(3, size=16).float().eval()
    one = vae.sample(model, 3, seed=1)
    assert one.shape == (3, 3, 16, 16) and 0 <= one.min() and one.max() <= 1
    assert torch.equal(one, vae.sample(model, 3, seed=1))
    assert not torch.equal(one, vae.sample(model, 3)) and not torch.equal(one[0], one[1])
    model.at_once = 2  # memory is bounded, pictures are the same
    assert torch.allclose(one, vae.sample(model, 3, seed=1), atol=1e-6)


def test_grey_pixels_are_drawn_and_colours_kept():
    grey = torch.full((1, 1, 100, 100), 51, dtype=torch.uint8)
    drawn = vae.preprocess(grey)
    assert set(drawn.unique().tolist()) == {0, 1} and abs(drawn.mean() - 0.2) < 0.02
    assert not torch.equal(drawn, vae.preprocess(grey))
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, None]
    assert torch.equal((vae.preprocess(levels) * 255).round().byte(), levels)


def test_an_epoch_visits_all_and_each_has_its_order():
    config = vae.Config(batch_size=5)
    cpu = torch.device("cpu")
    epochs = [torch.cat([vae.batch_rows(config, 4 * epoch + i, 20, cpu) for i in range(4)])
              for epoch in range(3)]
    assert all(epoch.sort().values.tolist() == list(range(20)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(vae.batch_rows(vae.Config(batch_size=50), 3, 20, cpu)) == 20  # a small set


def test_faces_are_what_their_labels_say():
    """Hair and glasses are measured in the pixels, moods by how light and dark mouths are."""
    images, labels = vae.draw_faces(600, 3, size=64)
    assert images.shape == (600, 3, 64, 64) and images.dtype == torch.uint8
    again, _ = vae.draw_faces(600, 3, size=64)
    assert torch.equal(images, again) and not torch.equal(images, vae.draw_faces(600, 4, 64)[0])
    names = [vae.FACES[label] for label in labels]
    assert len(set(vae.FACES)) == 60 and "smiling face with long red hair and glasses" in vae.FACES
    x = images.float() / 255

    def rows(word):
        return torch.tensor([word in name for name in names])

    hair = x[:, :, 8:11, 29:35].mean((2, 3))  # the top of the head
    for colour, rgb in vae.HAIR.items():
        assert (hair[rows(colour)] - torch.tensor(rgb)).abs().mean() < 0.1, colour
    beside = (x[:, :, 40:44, 12:16].mean((2, 3)) - hair).abs().mean(1)  # next to the cheek
    assert beside[rows("long")].mean() < 0.6 * beside[rows("short")].mean()
    mouth = x[:, :, 40:50, 26:38]
    white = (mouth.amin(1) > 0.85).float().mean((1, 2))
    dark = (mouth.amax(1) < 0.2).float().mean((1, 2))
    assert white[rows("smiling")].median() > 0.15 > white[~rows("smiling")].median()
    assert dark[rows("surprised")].median() > 0.1 > dark[~rows("surprised")].median()
    rims = (x[:, :, 24:38, 14:50].amax(1) < 0.2).float().mean((1, 2))
    assert rims[rows("glasses")].median() > rims[~rows("glasses")].median() + 0.03
    assert all(vae.draw_faces(2, 1, size)[0].shape[2:] == (size, size) for size in (32, 100, 128))


@pytest.mark.parametrize("channels", [1, 3])
def test_small_png(channels):
    """Stills and animations, by an independent decoder."""
    frames = [torch.randint(256, (5, 7, channels), dtype=torch.uint8) for _ in range(3)]
    for count in (1, 3):
        content = vae.png(*frames[:count])
        if count > 1:  # the first frame is the still image: give it an fdAT chunk of its own
            assert content.count(b"fcTL") == 3 and content.count(b"fdAT") == 2
        assert torch.equal(decode_frames(content), torch.stack(frames[:count]))


def test_grid():
    sheet = vae.grid(torch.ones(3, 3, 4, 4), 2)
    assert sheet.shape == (20, 20, 3) and (sheet[:8, :8] == 255).all() and (sheet[8] == 64).all()


def test_what_a_vae_run_leaves(faces_run):
    out, done = faces_run
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.png", "reconstructions.png", "walk.png",
        "directions.png"}
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["20", "40", "45"]
    loss = [float(row["loss"]) for row in rows]
    assert loss[2] < loss[0] and float(rows[-1]["test_bits_per_value"]) > 0
    assert rows[-1]["test_bound"] in done.stdout and "Warning" not in done.stderr
    assert len(decode_frames((out / "walk.png").read_bytes())) == 20


def test_python_names_of_vae(faces_run, tmp_path):
    out, _ = faces_run
    model = vae.load(out / "checkpoint.pt")
    assert not model.training
    sheet = vae.png(vae.grid(vae.sample(model, 10, seed=0), 10))
    assert sheet == (out / "samples.png").read_bytes()
    config = vae.Config(faces=64, steps=45, width=4, batch_size=8, samples=10, out=str(tmp_path))
    again = vae.train(config)
    assert same(again.state_dict(), model.state_dict())  # the same settings, the same weights
    x = vae.preprocess(vae.draw_faces(2, 5)[0])
    assert model.encode(x)[0].shape == (2, 32) and model.decode(model.encode(x)[0]).shape == x.shape
    assert vae.log_likelihood(model, x, k=3, seed=1).shape == (2,)


def test_vae_killed_and_continued(faces_run, tmp_path):
    """SIGKILL in mid-run; the same command ends where the run that was not killed did."""
    code = f"""
import itertools, os, signal, sys
sys.path.insert(0, {str(HERE)!r})
import vae
vae.SAVE_SECONDS = -1  # after each reading
real, calls = vae.log_logistic, itertools.count()
def killer(*a):
    if next(calls) == 29:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
vae.log_logistic = killer
vae.main({tiny_faces(None)!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole, _ = faces_run
    out = tmp_path / "out" / whole.name
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"][0] == 20
    run_vae(tiny_faces(None), cwd=tmp_path)
    first, second = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (whole, out))
    assert same(first["model"], second["model"]) and same(first["optimizer"], second["optimizer"])
    for path in whole.iterdir():
        if path.suffix in (".png", ".csv"):
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.fixture
def finished(faces_run, tmp_path):
    shutil.copytree(faces_run[0], tmp_path / "done")
    return tmp_path / "done"


def test_a_finished_vae_only_samples(finished, monkeypatch, capsys):
    monkeypatch.setattr(vae, "load_images", None)
    before = {p.name: p.read_bytes() for p in finished.iterdir()}
    assert vae.main(["--out", str(finished), "--seed", "3"]) == 0
    after = {p.name: p.read_bytes() for p in finished.iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["samples.png"]
    refused(capsys, ["--out", finished, "--learning-rate", "0.01"], "learning-rate")
    assert vae.main(["--out", str(finished), "--device", "cpu"]) == 0


def test_settings_of_a_run(finished, monkeypatch, capsys):
    """More steps continue it; the device is not remembered; --restart begins afresh."""
    torch.save(torch.load(finished / "checkpoint.pt", weights_only=True) | {
        "config": vars(vae.Config(faces=64, steps=45, width=4, batch_size=8, device="cuda"))},
        finished / "checkpoint.pt")
    assert vae.command_line(["--out", str(finished)]).device == "auto"
    assert vae.main(["--out", str(finished), "--steps", "50"]) == 0
    refused(capsys, ["--out", finished, "--steps", "60", "--seed", "1"], "began with --seed 0")
    assert vae.main(["--out", str(finished), "--restart", *tiny_faces(None, steps=2)]) == 0
    assert torch.load(finished / "checkpoint.pt", weights_only=True)["progress"][0] == 2


def test_interrupted(tmp_path, monkeypatch, capsys):
    calls = iter(range(100))

    def interrupt(*a):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*a)

    real = vae.batch_rows
    monkeypatch.setattr(vae, "batch_rows", interrupt)
    assert vae.main(tiny_faces(tmp_path)) == 130
    assert "run the same command" in capsys.readouterr().err.splitlines()[-1]
    assert vae.main(tiny_faces(tmp_path, steps=2)) == 0


def test_default_folders(monkeypatch, tmp_path):
    assert vae.Config().out == str(Path("out", "vae"))
    assert vae.Config(data="mnist", latent_dim=2).out == str(Path("out", "vae-mnist-latent_dim2"))
    assert vae.Config(kind="ae", steps=9, seed=5).out == str(Path("out", "vae-ae"))


@pytest.mark.parametrize("words, needles", [
    (["--kind", "gan"], ["--kind", "vae or ae"]), (["--steps", "0"], ["--steps", "0"]),
    (["--batch-size", "-3"], ["--batch-size"]), (["--steps", "many"], ["--steps", "many"]),
    (["--learning-rate", "-1"], ["--learning-rate"]), (["--image-size", "30"], ["multiple of 4"]),
    (["--device", "tpu"], ["--device tpu"]), (["--latent", "2"], ["--latent"]),
    (["--data", "nothing"], ["nothing", "cifar10"]), (["--data", "./faces"], ["folder"])])
def test_vae_refuses_bad_words(words, needles, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, words, *needles)
    assert not list(tmp_path.iterdir())


def test_vae_refuses_foreign_checkpoints(finished, painted, tmp_path, capsys):
    path = finished / "checkpoint.pt"
    whole = path.read_bytes()
    for junk in (b"", b"junk", whole[:-2000], (painted / "checkpoint.pt").read_bytes()):
        path.write_bytes(junk)
        refused(capsys, ["--out", finished], "no checkpoint of this vae.py")
        assert path.read_bytes() == junk
        with pytest.raises(vae.UserError):
            vae.load(path)
    with pytest.raises(vae.UserError):
        vae.load(tmp_path / "nowhere.pt")


def test_two_runs_in_one_folder(tmp_path, monkeypatch, capsys):
    """The run that finds a checkpoint that it did not write stops; the other's stays."""
    real, calls = vae.batch_rows, iter(range(100))

    def intruder(*a):
        if next(calls) == 5:
            (tmp_path / "checkpoint.pt").write_bytes(b"of another run")
        return real(*a)

    monkeypatch.setattr(vae, "batch_rows", intruder)
    monkeypatch.setattr(vae, "SAVE_SECONDS", -1)
    refused_words = tiny_faces(tmp_path)
    assert vae.main(refused_words) == 2
    assert "another run" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"of another run"


def test_unwritable(tmp_path, monkeypatch, capsys):
    """Only the checkpoint must be written: other files are worth one warning."""
    (tmp_path / "file").write_text("")
    refused(capsys, tiny_faces(tmp_path / "file" / "out"), "cannot write")
    (tmp_path / "samples.png").mkdir()
    (tmp_path / "metrics.csv").mkdir()
    assert vae.main(tiny_faces(tmp_path)) == 0
    assert capsys.readouterr().err.count("warning: cannot write") == 2
    assert not list(tmp_path.glob("*.partial"))

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(capsys, [*tiny_faces(tmp_path), "--restart"], "No space left")
    monkeypatch.undo()
    assert vae.main(["--out", str(tmp_path)]) == 0  # the checkpoint of before is whole


def test_divergence_of_vae(tmp_path, monkeypatch, capsys):
    real, calls = vae.kl_divergence, iter(range(1000))
    monkeypatch.setattr(vae, "kl_divergence", lambda *a: real(*a) / (next(calls) != 25))
    monkeypatch.setattr(vae, "SAVE_SECONDS", -1)
    assert vae.main(tiny_faces(tmp_path)) == 1
    assert "lower --learning-rate" in capsys.readouterr().err.splitlines()[-1]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["progress"][0] == 20
    assert all(value.isfinite().all() for value in state["model"].values())


def test_bugs_keep_their_traceback_and_memory_is_named(tmp_path, monkeypatch, capsys):
    def fails(message):
        def job(config):
            raise RuntimeError(message)
        monkeypatch.setattr(vae, "train", job)
        return vae.main(["--out", str(tmp_path)])

    with pytest.raises(RuntimeError, match="illegal"):
        fails("CUDA error: an illegal memory access was encountered")
    assert fails("CUDA out of memory. Tried to allocate 20 GiB") == 2
    assert "--batch-size" in capsys.readouterr().err


def test_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, tiny_faces(tmp_path), "one process")


def test_letters_that_a_terminal_lacks(tmp_path):
    words = tiny_faces(tmp_path / "łódź", steps=2)
    done = subprocess.run([sys.executable, HERE / "vae.py", *words], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"?" in done.stdout, done.stderr


# ---- data of vae.py
def tiny_mnist(count):
    """Noise in the shape of MNIST, and labels; the same for the same number."""
    chance = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=chance)
    return images, torch.randint(10, (count,), generator=chance)


def idx_bytes(tensor):
    return (bytes([0, 0, 8, tensor.dim()]) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
            + bytes(tensor.flatten().tolist()))


@pytest.fixture(scope="session")
def idx(tmp_path_factory):
    """A data folder with a tiny MNIST."""
    place = tmp_path_factory.mktemp("idx")
    for part, count in (("train", 200), ("t10k", 45)):
        images, labels = tiny_mnist(count)
        (place / "mnist").mkdir(exist_ok=True)
        for name, tensor in (("images-idx3", images[:, 0]), ("labels-idx1", labels.byte())):
            path = place / "mnist" / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(tensor), mtime=0))
    return place


def test_vae_on_mnist(idx, tmp_path, capsys):
    """Grey pictures, the autoencoder, the map of two numbers, the tighter bound."""
    images = vae.load_images(vae.Config(data="mnist", data_dir=str(idx)))
    assert torch.equal(images.train, tiny_mnist(200)[0]) and len(images.test) == 45
    assert torch.equal(images.test_labels, tiny_mnist(45)[1])
    large = vae.load_images(vae.Config(data="mnist", data_dir=str(idx), image_size=32))
    assert large.train.shape == (200, 1, 32, 32) and large.train.dtype == torch.uint8
    words = ["--data", "mnist", "--data-dir", str(idx), "--steps", "8", "--width", "4"]
    for more in (["--kind", "ae"], ["--importance", "3", "--latent-dim", "2"]):
        assert vae.main([*words, *more, "--out", str(tmp_path / more[0])]) == 0
    assert (tmp_path / "--importance" / "map.png").exists()
    assert "bound" in capsys.readouterr().out


def test_vae_refuses_damaged_data(idx, tmp_path, capsys):
    shutil.copytree(idx, tmp_path / "data")
    path = tmp_path / "data" / "mnist" / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:-100], b"", b"junk", gzip.compress(b"\0\0\x08\3"), gzip.compress(b"")):
        path.write_bytes(content)
        refused(capsys, ["--data", "mnist", "--data-dir", tmp_path / "data", "--out",
                         tmp_path / "out", "--steps", "2"], "damaged", "mnist")
    assert not (tmp_path / "out").exists()


def test_vae_reads_cifar10_and_downloads_once(tmp_path, monkeypatch, capsys):
    records = {name: torch.randint(10, (5 if name == "test_batch" else 7, 3073), dtype=torch.uint8)
               for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}
    packed, asked = io.BytesIO(), []
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, body in records.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = body.numel()
            archive.addfile(info, io.BytesIO(bytes(body.flatten().tolist())))

    def urlopen(url, timeout):
        asked.append(url)
        if len(asked) == 1:
            raise urllib.error.URLError("no network")
        reply = io.BytesIO(packed.getvalue())
        reply.headers = {}
        return reply

    monkeypatch.setattr(vae.urllib.request, "urlopen", urlopen)
    config = vae.Config(data="cifar10", data_dir=str(tmp_path))
    refused(capsys, ["--data", "cifar10", "--data-dir", tmp_path], "cannot download")
    assert not list(tmp_path.rglob("*.gz"))
    for _ in range(2):
        images = vae.load_images(config)
    assert len(asked) == 2 and images.train.shape == (35, 3, 32, 32) and len(images.test) == 5
    assert torch.equal(images.train[7, 1, 0, 3], records["data_batch_2"][0, 1 + 1024 + 3])
    assert torch.equal(images.test_labels, records["test_batch"][:, 0].long())


def write_photographs(folder, count=24):
    """Pictures of many kinds: one broken, one transparent, one grey, one turned by its camera."""
    from PIL import Image
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (40, 30), (200, 10 * i, 0)).save(folder / f"{i:02}.png")
    return folder


def test_photographs(tmp_path, capsys):
    from PIL import Image
    cats, dogs = write_photographs(tmp_path / "pets" / "Cats", 12), tmp_path / "pets" / "big_dogs"
    dogs.mkdir()
    (cats / "00.png").write_bytes(b"broken")
    (cats / "notes.txt").write_text("no picture")
    Image.new("F", (9, 9), 0.5).save(cats / "floats.tif")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(dogs / "clear.png")
    Image.new("L", (9, 9), 77).save(dogs / "grey.jfif", "JPEG")
    turned = Image.new("RGB", (10, 30), "red")
    turned.paste("blue", (0, 0, 10, 15))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(dogs / "turned.jpg", exif=exif, quality=100)
    images = vae.read_photographs(tmp_path / "pets", 8)
    assert len(images.train) + len(images.test) == 14 and len(images.test) == 2
    assert images.names == ["Cats", "big_dogs"]
    assert "left out 3 of 17 files" in capsys.readouterr().err
    everything = torch.cat([images.train, images.test])
    shades = {tuple(image[:, 4, 4].tolist()) for image in everything}
    assert (255, 255, 255) in shades and any(max(s) - min(s) < 3 and 70 < s[0] < 85 for s in shades)
    upside = [image for image in everything if image[2].max() > 150 and image[0].max() > 150
              and image[1].max() < 100]
    assert len(upside) == 1 and upside[0][0, 1, 4] > 150 and upside[0][2, 6, 4] > 150
    assert vae.main(["--data", str(tmp_path / "pets"), "--image-size", "16", "--steps", "3",
                     "--out", str(tmp_path / "out")]) == 0
    refused(capsys, ["--data", write_photographs(tmp_path / "one", 1)], "two readable pictures")


def test_splits_and_results_among_photographs(tmp_path, capsys):
    """train, test and val count beside each other at the top; folders of results are no data."""
    for part in ("train", "test", "val"):
        write_photographs(tmp_path / "a" / part / "cat", 12)
    (tmp_path / "a" / "out").mkdir()
    write_photographs(tmp_path / "a" / "train" / "result" / "deep", 12)
    (tmp_path / "a" / "train" / "result" / "checkpoint.pt").write_bytes(b"")
    images = vae.read_photographs(tmp_path / "a", 8)
    assert len(images.train) == len(images.test) == 12 and images.names == ["cat"]
    assert "left out 12 of 36" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a" / "test")
    assert len(vae.read_photographs(tmp_path / "a", 8).test) == 12  # val
    write_photographs(tmp_path / "b" / "train", 12)
    write_photographs(tmp_path / "b" / "cat", 8)
    images = vae.read_photographs(tmp_path / "b", 8)
    assert images.names == ["cat", "train"] and len(images.test) == 2


def test_a_folder_of_photographs_may_move(tmp_path, capsys):
    folder = write_photographs(tmp_path / "a" / "photos")
    words = ["--image-size", "8", "--steps", "3", "--out", str(tmp_path / "out")]
    assert vae.main(["--data", str(folder), *words]) == 0
    shutil.move(folder, tmp_path / "moved")
    words[3] = "5"
    assert vae.main(["--data", str(tmp_path / "moved"), *words]) == 0
    assert "began with --data" in capsys.readouterr().err
    refused(capsys, ["--data", "faces", *words], "began with --data")


def test_a_path_is_never_a_built_in_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photographs(tmp_path / "faces")
    images = vae.load_images(vae.Config(data="./faces", image_size=8))
    assert images.train.shape[2:] == (8, 8) and images.names == ["picture"]


def test_memory_while_judging_is_bounded(monkeypatch):
    """In pixels, however many draws: no more than about 2^20 are decoded together."""
    most, real = [], vae.Decoder.forward

    def counted(self, z):
        most.append(len(z))
        return real(self, z)

    monkeypatch.setattr(vae.Decoder, "forward", counted)
    model = vae.VAE(3, 256, 4, 2).eval()
    vae.log_likelihood(model, torch.rand(2, 3, 256, 256), k=40)
    vae.sample(model, 20)
    assert max(most) * 256**2 <= 2**20


def test_vae_without_pillow(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(capsys, ["--data", tmp_path], "pip install pillow")


# ==== ddpm.py =====================================================================================
class TrueDenoiser(ddpm.UNet):
    """What a perfect network says of values from N(MEAN, STD^2), whatever the prompt."""
    MEAN, STD = 0.1, 0.3

    def forward(self, x, t, tokens):
        signal, noise = (table[t][:, None, None, None] for table in (self.signal, self.noise))
        gain = signal * self.STD**2 / (signal**2 * self.STD**2 + noise**2)
        return self.MEAN + gain * (x - signal * self.MEAN)


def tiny_ddpm(kind=ddpm.UNet, channels=1, size=8, steps=1000):
    torch.manual_seed(0)
    model = kind(channels, size, 8, 1, steps)
    model.prompt.names = ["hot dog", "cat", vae.FACES[0]]
    with torch.no_grad():
        for parameter in model.parameters():  # layers that start at zero would hide what they get
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_schedule_of_the_noise():
    """The cosine of Nichol and Dhariwal, equation 17; signal^2 + noise^2 = 1, exact at t = 1."""
    alpha_bar = ddpm.cosine_schedule(1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2)**2 for t in range(1001)]
    for t in (0, 1, 250, 500, 990):
        assert alpha_bar[t].item() == pytest.approx(f[t] / f[0], rel=1e-6)
    assert 0 < alpha_bar[-1].sqrt() < 0.05 and (alpha_bar.diff() < 0).all()
    model = tiny_ddpm()
    assert model.noise[1].item() == pytest.approx(math.sqrt(1 - f[1] / f[0]), rel=1e-6)
    assert torch.allclose(model.signal**2 + model.noise**2, torch.ones(1001))


def test_many_small_steps_are_one():
    """q(x_t | x_0) against t single steps (Ho et al. 2020, equations 2 and 4)."""
    model, x0 = tiny_ddpm(steps=50), torch.full((20000, 1, 1, 1), 0.7)
    x = x0.clone()
    for t in range(1, 51):
        beta = 1 - model.alpha_bar[t] / model.alpha_bar[t - 1]
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(x.shape)
        if t % 10 == 0:
            whole = model.diffuse(x0, torch.full((len(x),), t), torch.randn(x.shape))
            assert abs(x.mean() - whole.mean()) < 0.03 and abs(x.std() / whole.std() - 1) < 0.03


@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (900, 400), (1000, 999)])
def test_step_back_is_bayes_rule(t, s):
    """eta 1: the posterior q(x_s | x_t, x_0), by brute force over a grid of x_s."""
    alpha_bar, x0, xt = ddpm.cosine_schedule(1000), 0.4, -0.8
    a, b, at = alpha_bar[t], alpha_bar[s], torch.linspace(-8, 8, 2_000_001, dtype=torch.float64)
    log_p = -(at - b.sqrt() * x0)**2 / (2 * (1 - b))
    p = (log_p - (xt - (a / b).sqrt() * at)**2 / (2 * (1 - a / b))).softmax(0)
    mean, sigma = ddpm.step_back(alpha_bar.tolist(), x0, xt, t, s, eta=1)
    assert math.isclose(mean, (p * at).sum(), abs_tol=1e-4)
    assert math.isclose(sigma**2, (p * at**2).sum() - (p * at).sum()**2, rel_tol=1e-3)


def test_step_back_keeps_the_noise_and_ends_without():
    """eta 0: x_s has the same x_0 and the same eps as x_t; at s = 0 it is x_0, at any eta."""
    model, (x0, eps) = tiny_ddpm(), torch.randn(2, 5, 1, 4, 4)
    for t, s in ((2, 1), (999, 3), (1000, 500)):
        xt, xs = (model.diffuse(x0, torch.full((5,), at), eps) for at in (t, s))
        back, sigma = ddpm.step_back(model.alpha_bar, x0, xt, t, s, eta=0)
        assert sigma == 0 and torch.allclose(back, xs, atol=1e-4)
        mean, sigma = ddpm.step_back(model.alpha_bar, x0, xt, t, 0, eta=1)
        assert sigma == 0 and torch.equal(mean, x0)


@pytest.mark.parametrize("steps, eta", [(1000, 1.0), (1000, 0.0), (25, 0.0)])
def test_a_perfect_denoiser_samples_the_truth(steps, eta):
    """Its pictures have the mean of the data and the variance that the recursion predicts."""
    model = tiny_ddpm(TrueDenoiser, size=16)
    x = 2 * ddpm.sample(model, [""] * 100, steps, 1.0, eta, seed=0) - 1
    times, var = torch.linspace(1000, 0, steps + 1).round().long().tolist(), 1.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        a, b = model.alpha_bar[t], model.alpha_bar[s]
        sigma2 = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        gain = math.sqrt(a) * model.STD**2 / (a * model.STD**2 + 1 - a)  # of the estimate, by x_t
        keep = math.sqrt((1 - b - sigma2) / (1 - a))
        var = (math.sqrt(b) * gain + keep * (1 - math.sqrt(a) * gain))**2 * var + sigma2
    assert abs(x.mean() - model.MEAN) < 0.015
    assert math.isclose(x.var(), var, rel_tol=0.04)
    if steps == 1000:
        assert math.isclose(var, model.STD**2, rel_tol=0.04)


def test_guidance():
    model, x, t = tiny_ddpm(), torch.randn(2, 1, 8, 8), torch.tensor([300, 700])
    tokens = model.prompt.tokens(["a hot dog", "a cat"])
    with torch.no_grad():
        with_prompt, without = model(x, t, tokens), model(x, t, 0 * tokens)
        for g, expected in ((0, without), (1, with_prompt), (3, 3 * with_prompt - 2 * without)):
            guided = ddpm.guided(model, x, t, tokens, torch.tensor([g, g]))
            assert torch.allclose(guided, expected, atol=1e-4)
        assert not torch.allclose(model(x, t.flip(0), tokens), with_prompt, atol=1e-3)
    assert (with_prompt - without).abs().amax((1, 2, 3)).min() > 1e-3


def test_samples_of_ddpm():
    """One picture is the same in company; a seed repeats; None draws anew; any T will do."""
    model = tiny_ddpm(steps=20)
    three = ddpm.sample(model, ["a cat", "a hot dog", ""], 5, seed=1)
    assert three.shape == (3, 1, 8, 8) and 0 <= three.min() and three.max() <= 1
    assert torch.allclose(three[:1], ddpm.sample(model, ["a cat"], 5, seed=1), atol=1e-5)
    assert not torch.equal(ddpm.sample(model, [""], 5), ddpm.sample(model, [""], 5))
    assert ddpm.sample(model, [""]).isfinite().all()  # 25 steps, by default, of 20


def test_words_and_their_order():
    model = tiny_ddpm()
    tokens = model.prompt.tokens(["hot dog", "dog hot", "dog", "", "A dog"])
    with torch.no_grad():
        e, alone = model.prompt(tokens), model.prompt(model.prompt.tokens(["dog"]))
    assert min((e[0] - e[1]).norm(), (e[0] - e[2]).norm()) > 0.1 and not e[3].any()
    assert torch.allclose(e[2:3], alone) and model.prompt.tokens(["a"]).all()
    assert torch.isfinite(model.prompt(model.prompt.tokens(["a " * 40]))).all()
    with pytest.raises(ddpm.UserError, match="'zebra'; known: a black cat"):
        ddpm.sample(model, ["a zebra"], 2)
    assert ddpm.choose_prompts(ddpm.Config(unseen="cat"), model, 2) == ["a cat", "a hot dog"]
    said = "an eight", "a one", "an ankle boot", "a t-shirt", "a great dane"
    assert all(ddpm.captions(one.split(maxsplit=1)[1].replace(" ", "_")) == 12 * [one]
               for one in said)
    for name in ddpm.FACES:
        whole, *parts = dict.fromkeys(ddpm.captions(name))
        assert whole == "a " + name and ddpm.captions(name).count(whole) == 9 and len(parts) == 3
        assert all(set(part.split()) <= set(whole.split()) for part in parts)


def test_a_batch_of_ddpm(monkeypatch):
    """t covers 1 to T evenly, a tenth of the captions are dropped, pictures are in [-1, 1]."""
    config = ddpm.Config(diffusion_steps=8, batch_size=4000)
    images, labels = torch.randint(256, (4000, 1, 2, 2), dtype=torch.uint8), torch.arange(4000) % 2
    captions = torch.tensor([[[5, 6], [8, 6]], [[0, 7], [0, 9]]])
    batches = []
    for rank, ranks in ((1, 2), (0, 1)):
        torch.manual_seed(0)
        monkeypatch.setattr(ddpm, "RANK", rank)
        monkeypatch.setattr(ddpm, "RANKS", ranks)
        batches.append(ddpm.draw_batch(config, 1, images, labels, captions))
    x0, t, eps, tokens = batches[1]
    assert all(torch.equal(half, whole[1::2]) for half, whole in zip(*batches, strict=True))
    assert t.bincount(minlength=9).tolist() == [0] + 8 * [500]
    rows = ddpm.batch_rows(config, 1, 4000, torch.device("cpu"))
    assert torch.allclose(x0, images[rows] / 127.5 - 1) and x0.min() == -1 and x0.max() == 1
    dropped = ~tokens.any(1)
    assert abs(dropped.float().mean() - 0.1) < 0.02
    assert set(map(tuple, tokens.tolist())) == {(0, 0), (5, 6), (8, 6), (0, 7), (0, 9)}
    assert torch.equal(tokens[~dropped, 1] % 2, labels[rows][~dropped])


def test_objective_weighs_by_the_noise():
    """Squared error of x_0 times 1 + SNR, which is the error of v, but 5 times at most."""
    model, x0, eps = tiny_ddpm(), torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    estimate = x0 + 0.1 * torch.randn_like(x0)
    for t, limited in ((900, False), (500, False), (20, True)):
        at, a = torch.full((4,), t), model.alpha_bar[t]
        xt = model.diffuse(x0, at, eps)
        noise = (xt - math.sqrt(a) * estimate) / math.sqrt(1 - a)
        v, true = (math.sqrt(a) * e - math.sqrt(1 - a) * x
                   for e, x in ((noise, estimate), (eps, x0)))
        expected = 5 * F.mse_loss(estimate, x0) if limited else F.mse_loss(v, true)
        assert torch.allclose(ddpm.objective(model, estimate, x0, at), expected, rtol=1e-3)
    for _ in range(200):
        ddpm.objective(model, estimate, x0, torch.full((4,), 7))
    assert 0.005 < model.error[7] < 0.02 and model.error[8] == 1  # the mean error is 0.01


@pytest.mark.parametrize("mean, sigma", [(-1.0, 0.003), (-0.99, 0.02), (0.3, 0.001), (0.97, 0.5)])
def test_the_256_levels_of_the_last_step_add_up_to_one(mean, sigma):
    x0 = torch.arange(256) / 127.5 - 1
    p = ddpm.log_decoder(x0, torch.full_like(x0, mean), sigma).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("T", [1000, 300])
def test_bits_of_a_perfect_denoiser_are_the_closed_form(T):
    """Its error is set to 0, so that p uses nothing else of x_t; T = 300 leaves a KL at T."""
    model = tiny_ddpm(TrueDenoiser, size=16)
    model.error.fill_(1e-12)
    model.alpha_bar = model.alpha_bar[:T + 1]
    x = (model.MEAN + model.STD * torch.randn(16, 1, 16, 16)).clamp(-1, 1)
    images, a = ((x / 2 + 0.5) * 255).round() / 255, model.alpha_bar
    nats = 0.5 * (a[-1] * (model.STD**2 + model.MEAN**2) - a[-1] - math.log1p(-a[-1]))
    for t in range(1, T + 1):  # left: the variance of x_0, once x_t is known
        left, beta = 1 / (1 / model.STD**2 + a[t] / (1 - a[t])), 1 - a[t] / a[t - 1]
        if t > 1:
            sigma2 = (1 - a[t - 1]) / (1 - a[t]) * beta
            share2 = a[t - 1] * beta**2 / (1 - a[t])**2
            nats += 0.5 * (math.log(beta / sigma2) + (sigma2 + share2 * left) / beta - 1)
        else:  # the mean of the log of what falls into the bin, over the error r of the estimate
            r = torch.linspace(-8, 8, 20001, dtype=torch.float64) * left**0.5
            edges = [torch.special.ndtr((r + h) / beta**0.5) for h in (1 / 255, -1 / 255)]
            weight = (-r**2 / (2 * left)).softmax(0)
            nats -= (weight * (edges[0] - edges[1]).clamp(min=1e-300).log()).sum().item()
    bits = ddpm.bits_per_dim(model, images)
    assert bits.shape == (16,) and math.isclose(bits.mean(), nats / math.log(2), rel_tol=0.02)


def test_the_bound_uses_what_x_t_shows():
    """Where the network knows nothing but the mean, x_t weighted by 1 / error still tells x_0."""
    class Blurred(TrueDenoiser):
        def forward(self, x, t, tokens):
            assert not tokens.any()
            return torch.full_like(x, self.MEAN)

    model, perfect = tiny_ddpm(Blurred, size=16), tiny_ddpm(TrueDenoiser, size=16)
    model.error.fill_(model.STD**2)
    perfect.error.fill_(1e-12)
    images = (model.MEAN + model.STD * torch.randn(8, 1, 16, 16)).clamp(-1, 1) / 2 + 0.5
    bits = [ddpm.bits_per_dim(m, (images * 255).round() / 255).mean() for m in (model, perfect)]
    assert bits[0].item() == pytest.approx(bits[1].item(), rel=0.01)


# ---- as its users run it
def ddpm_words(out, **settings):
    settings = {"faces": 64, "steps": 45, "width": 8, "blocks": 1, "batch_size": 6, "samples": 20,
                "diffusion_steps": 20, "sampling_steps": 4} | settings
    words = [word for name, value in settings.items() for word in
             ("--" + name.replace("_", "-"), str(value))]
    return [*words, *(["--out", str(out)] if out else [])]


@pytest.fixture(scope="session")
def painted(tmp_path_factory):
    out = tmp_path_factory.mktemp("ddpm")
    assert ddpm.main(ddpm_words(out)) == 0
    return out


def test_what_a_ddpm_run_leaves(painted):
    assert {p.name for p in painted.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.png", "forward.png", "denoising.png",
        "neighbours.png"}
    rows = rows_of(painted)
    assert [row["step"] for row in rows] == ["20", "40", "45"]
    assert 1 < float(rows[-1]["test_bits_per_dim"]) < 20
    state = torch.load(painted / "checkpoint.pt", weights_only=True)
    rate = state["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(4e-3 * ddpm.schedule(44.5 / 45)) and rate < 1e-4
    model = ddpm.load(painted / "checkpoint.pt")
    weight, last = model.down.conv1.weight, state["model"]["down.conv1.weight"]
    assert not model.training and torch.equal(weight, state["average"]["down.conv1.weight"])
    assert not torch.equal(weight, last) and torch.equal(model.error, state["model"]["error"])
    test = ddpm.draw_faces(200, 2)[0]
    assert ddpm.judge(model, test)["bits_per_dim"] == pytest.approx(
        float(rows[-1]["test_bits_per_dim"]), abs=2e-5)
    assert ddpm.schedule(0) == 0
    prompts = [ddpm.captions(name)[0] for name in ddpm.FACES[:2]]
    images = ddpm.sample(model, prompts, 3, guidance=2.0, seed=1)
    assert images.shape == (2, 3, 32, 32) and ddpm.bits_per_dim(model, images).shape == (2,)
    frames = decode_frames((painted / "denoising.png").read_bytes())
    assert len(frames) == 6 and torch.equal(frames[0], frames[-1])  # 4 steps from noise; the result


def test_a_finished_ddpm_draws_what_is_asked_for(painted, tmp_path, monkeypatch, capsys):
    out = copy_of(painted, tmp_path)
    before = (out / "samples.png").read_bytes()
    monkeypatch.setattr(ddpm, "load_images", None)
    model = ddpm.train(ddpm.command_line(["--out", str(out), "--prompt", "a sad face, a face with "
                                          "glasses", "--guidance", "2", "--device", "cpu"]))
    prompts = ["a sad face", "a face with glasses"] * 10
    guidance = torch.tensor([0.0] * 10 + [2.0] * 10)  # it rises from row to row
    sheet = ddpm.grid(ddpm.sample(model, prompts, 4, guidance, seed=0), 10)
    assert (out / "samples.png").read_bytes() == ddpm.png(sheet) != before
    for name in ("forward.png", "neighbours.png", "metrics.csv", "checkpoint.pt"):
        assert (out / name).read_bytes() == (painted / name).read_bytes()
    monkeypatch.undo()
    for word, value, needle in (
            ("--width", "16", "--width 8"), ("--guidance", "-1", "--guidance"),
            ("--sampling-steps", "0", "--sampling-steps"), ("--data", "mnist", "--data faces")):
        refused(capsys, ["--out", out, word, value], needle, script=ddpm)
    for word, value, needle in (
            ("--prompt", "a zebra", "'zebra'; known: a and"), ("--unseen", "x", "takes some"),
            ("--unseen", ", ".join(ddpm.FACES), "not all"), ("--image-size", "30", "of 4")):
        refused(capsys, [*ddpm_words(tmp_path / "new"), word, value], needle, script=ddpm)


def test_sheets_of_ddpm(tmp_path, monkeypatch):
    seen, grid = [], ddpm.grid
    monkeypatch.setattr(ddpm, "grid", lambda x, columns: (seen.append(x), grid(x, columns))[1])
    model, (train, _) = tiny_ddpm(size=32, channels=3), ddpm.draw_faces(100, 1)
    run = ddpm.Run(ddpm.Config(out=str(tmp_path), sampling_steps=1000, prompt="a cat"))
    ddpm.draw_forward(run, model, train)
    forward = seen.pop().view(4, 10, 3, 32, 32)
    assert torch.allclose(forward[:, 0], train[:4] / 255, atol=1e-5)
    assert abs(forward[:, -1].std() - 0.5) < 0.05  # N(0, 1) at half the size
    ddpm.draw_denoising(run, model)
    assert len(seen) == 20  # frames, however many the steps
    run.config.sampling_steps = 2
    ddpm.draw_neighbours(run, model, train)
    images, nearest = seen.pop().view(2, 2, 10, 3 * 32 * 32).unbind(1)
    distance = torch.cdist(images.flatten(0, 1), train.flatten(1) / 255)
    assert torch.allclose(nearest.flatten(0, 1), train[distance.argmin(1)].flatten(1) / 255)


def test_unseen_kinds_and_class_names(idx, tmp_path, monkeypatch):
    config = ddpm.Config(data="mnist", data_dir=str(idx), unseen="three, one")
    model = tiny_ddpm()
    with pytest.raises(ddpm.UserError, match="began with other kinds"):
        ddpm.prepare(config, model)
    model.prompt.names = []
    data, tokens = ddpm.prepare(config, model)
    assert len(data.train) == len(data.train_labels) > 0
    assert not set(data.train_labels.tolist()) & {1, 3}
    assert set(data.test_labels.tolist()) & {1, 3} and tokens.shape == (10, 12, 2)
    assert model.prompt.tokens(["a seven"]).tolist() == tokens[7, :1].tolist()
    seen, real = [], ddpm.objective
    monkeypatch.setattr(ddpm, "objective", lambda *a: seen.append(a) or real(*a))
    assert ddpm.main([*ddpm_words(tmp_path, steps=2, data="mnist", prompt="a three"),
                      "--data-dir", str(idx), "--image-size", "32"]) == 0
    assert ddpm.load(tmp_path / "checkpoint.pt").shape == (1, 32, 32)
    assert not torch.equal(seen[0][3], seen[1][3])  # each step has its own chance
    config.image_size = 32
    train = ddpm.load_images(config).train / 127.5 - 1
    assert torch.cdist(seen[0][2].flatten(1), train.flatten(1)).amin(1).max() < 0.1


def test_ddpm_on_photographs(tmp_path):
    write_photographs(tmp_path / "pets" / "Great Dane")
    write_photographs(tmp_path / "pets" / "cat")
    words = ddpm_words(tmp_path / "out", steps=1, data=tmp_path / "pets", image_size=64)
    assert ddpm.main([*words, "--prompt", "a great dane"]) == 0
    model = ddpm.load(tmp_path / "out" / "checkpoint.pt")
    assert ddpm.sample(model, ["a cat"], 2).shape == (1, 3, 64, 64)
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    torch.manual_seed(0)  # after one step, the average is a tenth of the first weights
    begun = ddpm.new_unet(ddpm.Config(**state["config"])).state_dict()["unfold1.5.weight"]
    first, last = (state[part]["unfold1.5.weight"] for part in ("average", "model"))
    assert torch.allclose(first, 0.1 * begun + 0.9 * last, atol=1e-5)


def test_ddpm_killed_and_continued(job, painted):
    killed, done, out = job
    assert killed.returncode == -signal.SIGKILL and done.returncode == 0, done.stderr
    states = [torch.load(p / "checkpoint.pt", weights_only=True) for p in (out, painted)]
    assert same(*states)
    for path in painted.iterdir():
        if path.suffix in (".png", ".csv"):
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_two_ranks_of_ddpm_end_where_one_process_does(job, tmp_path):
    killed, done, out = job
    assert ddpm.main(ddpm_words(tmp_path, steps=30)) == 0
    assert killed.returncode != 0 and done.returncode == 0, done.stderr
    assert done.stdout.count("on held-out data") == done.stderr.count("20/30 [00:00<?") == 1
    states = [torch.load(p / "checkpoint.pt", weights_only=True) for p in (tmp_path, out)]
    for part in ("model", "average"):
        a, b = (torch.cat([value.flatten() for name, value in sorted(state[part].items())
                           if "extra" not in name and "error" not in name]) for state in states)
        assert (a - b).norm() / a.norm() < 1e-3


# ==== gan.py ======================================================================================
BOTH = pytest.mark.parametrize("kind", [gan.DCGAN, gan.StyleGAN])


def tiny_gan(kind, channels=3, size=16):
    torch.manual_seed(0)
    return kind(channels, size, 8, 6).eval()


def gan_words(out, **settings):
    return tiny_faces(out, **({"image_size": 16, "width": 8, "latent_dim": 6} | settings))


def test_losses_are_finite_and_as_written():
    for logit in (-100.0, -3.0, 0.0, 3.0, 100.0):
        x = torch.tensor([logit], requires_grad=True)
        loss = gan.generator_loss(x)
        (slope,) = torch.autograd.grad(loss, x)  # near -1 where D is sure of a fake: not saturated
        assert math.isclose(slope, -1 / (1 + math.exp(logit)), rel_tol=1e-4, abs_tol=1e-12)
        assert torch.isfinite(loss) and torch.isfinite(gan.discriminator_loss(x, -x))
    real, fake = torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.5])
    expected = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
    torch.testing.assert_close(gan.discriminator_loss(real, fake), expected)


def test_r1_of_a_known_gradient():
    weight, x = torch.randn(1, 6, 6), torch.rand(5, 1, 6, 6)
    penalty = gan.r1_penalty(lambda x: 3 * (weight * x).sum((1, 2, 3)), x)
    torch.testing.assert_close(penalty, 4.5 * weight.square().sum())
    penalty = gan.r1_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, x)  # the gradient is x itself
    torch.testing.assert_close(penalty, 0.5 * x.square().sum((1, 2, 3)).mean())
    D = gan.Discriminator(1, 8, 8)
    gan.r1_penalty(D, torch.rand(4, 1, 8, 8)).backward()
    assert all(p.grad.any() for p in D.parameters() if p.dim() > 1)  # it can be minimised


@pytest.mark.parametrize("kind", ["dcgan", "stylegan"])
def test_who_is_updated_by_what(kind, tmp_path, monkeypatch):
    """In turns, D first; each update moves its own network, by the gradient of its own loss."""
    networks, seen, penalties = {}, [], []
    real_step, real_new, real_penalty = torch.optim.Adam.step, gan.new_networks, gan.r1_penalty

    def new_networks(*a):
        networks["G"], networks["D"], average = real_new(*a)
        return networks["G"], networks["D"], average

    def state(name, what):
        parts = [getattr(p, what) for p in networks[name].parameters()]
        return [torch.zeros(()) if x is None else x.detach().clone() for x in parts]

    def step(optimizer):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        name, = (n for n in networks if own == {id(p) for p in networks[n].parameters()})
        before, gradient = {n: state(n, "data") for n in networks}, state("D", "grad")
        result = real_step(optimizer)
        moved = [n for n in networks if not all(map(torch.equal, before[n], state(n, "data")))]
        rates = [group["lr"] for group in optimizer.param_groups if group["params"]]
        seen.append((name, moved, gradient, state("G", "grad"), rates))
        assert all(group["betas"][0] == 0 for group in optimizer.param_groups)
        return result

    def penalty(D, real):  # of real pictures, scaled to [-1, 1]
        faces = gan.draw_faces(64, 1, 16)[0] / 127.5 - 1
        assert all((x - faces).abs().flatten(1).amax(1).min() < 1e-5 for x in real)
        value = real_penalty(D, real)
        value.register_hook(lambda gradient: penalties.append(gradient.item()))
        return value

    monkeypatch.setattr(gan, "new_networks", new_networks)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(gan, "r1_penalty", penalty)
    monkeypatch.setattr(gan, "judge", lambda *a: {"variety": 1.0})
    assert gan.main(gan_words(tmp_path, generator=kind, steps=9, r1=0.5)) == 0
    assert [name for name, *_ in seen] == ["D", "G"] * 9
    assert all(moved == [name] for name, moved, *_ in seen)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert all(map(torch.equal, first[2], second[2]))  # G's update leaves no gradient in D
    assert all(not x.any() for x in seen[0][3])  # and D's none in G: fakes are detached
    assert penalties == [4.0] * 2  # R1 counts eightfold, in each eighth step
    (peak, *slow), (last, *_) = seen[1][4], seen[-1][4]
    assert math.isclose(peak, 2e-3) and last < peak / 10
    assert all(math.isclose(rate, peak / 10) for rate in slow) and bool(slow) == (kind != "dcgan")


def test_discriminator_learns_which_is_real(monkeypatch):
    """Real is above 0; and it sees how much the pictures of each group of four differ."""
    D, spread = gan.Discriminator(1, 16, 8), []
    D.head.register_forward_pre_hook(lambda module, inputs: spread.append(inputs[0][:, -1]))
    x = torch.rand(8, 1, 16, 16)
    features = D.body(x)
    D(x)
    for i in (0, 4):
        expected = (features[i:i + 4].var(0, correction=0) + 1e-8).sqrt().mean()
        torch.testing.assert_close(spread[0][i:i + 4], expected.expand(4, 4, 4))
    D(x[:3])
    assert spread[1].max() < 1e-3
    optimizer = gan.adam(D)
    for _ in range(30):
        optimizer.zero_grad()
        gan.discriminator_loss(D(x), D(-x)).backward()
        optimizer.step()
    assert (D(x) > 0).all() and (D(-x) < 0).all()


def test_modulation_is_scaled_weights():
    torch.manual_seed(0)
    layer, x, w = gan.StyledConv(6, 4, 8), torch.randn(2, 6, 9, 9), torch.randn(2, 8)
    layer.bias.data.normal_()
    with torch.no_grad():
        for i in range(2):
            weight = layer.weight * layer.style(w[i])[None, :, None, None]
            plain = F.conv2d(x[i:i + 1], weight, layer.bias, padding=1)
            torch.testing.assert_close(layer(x, w, demodulate=False)[i:i + 1], plain,
                                       atol=1e-4, rtol=1e-4)
            weight = weight / weight.square().sum((1, 2, 3), keepdim=True).sqrt()
            expected = F.conv2d(x[i:i + 1], weight, layer.bias, padding=1)
            torch.testing.assert_close(layer(x, w)[i:i + 1], expected, atol=1e-4, rtol=1e-4)
        layer.bias.zero_()
        layer.style.weight.mul_(3)
        inside = layer(torch.randn(300, 6, 9, 9), torch.randn(300, 8))[:, :, 1:-1, 1:-1]
    assert torch.allclose(inside.var((0, 2, 3)), torch.ones(4), atol=0.1)


def test_no_pattern_of_even_and_odd_pixels(monkeypatch):
    """Flat features at half the resolution make a flat picture, away from the border."""
    monkeypatch.setattr(gan, "levels", lambda size, width: [(32, width), (64, width)])
    for model in (tiny_gan(gan.StyleGAN, size=64), tiny_gan(gan.DCGAN, size=64)):
        if isinstance(model, gan.StyleGAN):
            model.constant.data = model.constant.data[:, :, :1, :1].expand(-1, -1, 32, 32)
        else:
            model.layers[1] = nn.Sequential(nn.Unflatten(1, (8, 32, 32)), nn.AdaptiveAvgPool2d(1),
                                            nn.Upsample(scale_factor=32))
        image = model(torch.randn(1, 6)).detach()
        assert image[:, :, 24:40, 24:40].var((2, 3)).max() < 1e-8 < image.var((2, 3)).min()


def test_mixing_and_truncation_at_their_ends():
    model = tiny_gan(gan.StyleGAN)
    z = torch.randn(400, 6)
    with torch.no_grad():
        w, plain = model.styles(z), model(z)
        assert torch.equal(plain, model.render(w)) and torch.equal(plain, model(z, truncation=1))
        mean = model(z[:3], truncation=0)
        torch.testing.assert_close(mean, mean[:1].expand_as(mean), atol=1e-5, rtol=0)
        styles = model.mean_style().expand(len(w), 1, 6)
        torch.testing.assert_close(mean[:1], model.render(styles), atol=1e-5, rtol=0)
        many = model.styles(torch.randn(20000, 6))[0]
        assert (model.mean_style()[0] - many.mean(0)).abs().max() < 0.15
        wide = gan.StyleGAN(3, 16, 8, 64).styles(torch.randn(500, 64))[0]
        assert 0.5 < wide.square().mean() < 2 and wide.var(0).mean() > 0.2  # w depends on z
        styles, real = [], model.render
        model.render = lambda styles_: styles.append(styles_) or real(styles_)
        model.train()(z)
    mixed = (styles[0] != w).any(2)                                             # (layers, 400)
    assert not mixed[0].any() and (mixed[1:] >= mixed[:-1]).all()  # from some layer to the last
    assert 0.4 < mixed[-1].float().mean() < 0.6
    starts = mixed.float().argmax(0)[mixed[-1]]
    assert set(starts.tolist()) == set(range(1, len(w)))


@BOTH
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 16), (3, 36)])
def test_one_sample_is_the_same_among_many(kind, channels, size):
    model = tiny_gan(kind, channels, size)
    images = gan.sample(model, 5, seed=1)
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert images.shape == (5, channels, size, size) and 0 <= images.min() and images.max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(images[3:4], model(z[3:4]) / 2 + 0.5, atol=1e-5, rtol=0)
    assert not torch.equal(gan.sample(model, 5), gan.sample(model, 5))
    assert gan.Discriminator(channels, size, 8)(images).shape == (5,)


def test_average_of_weights():
    G, average = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = average.weight.detach().clone()
    for step in (0, 1, 50, 10**6):
        nn.init.normal_(G.weight)
        keep = min(0.998, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * G.weight.detach()
        gan.update_average(average, G, step)
        torch.testing.assert_close(average.weight.detach(), expected)


def test_collapse_and_two_samples_are_noticed(monkeypatch, capsys):
    real, other = (x.float() / 127.5 - 1 for x in gan.draw_faces(1200, 3)[0].split(600))
    torch.manual_seed(0)
    assert abs(gan.two_sample_accuracy(real, other, steps=40) - 0.5) < 0.1
    assert gan.two_sample_accuracy(real, 0.7 * other, steps=40) > 0.9

    def variety(samples, test):
        monkeypatch.setattr(gan, "sample", lambda model, n, seed: samples[:n] / 2 + 0.5)
        gan.warn.cache_clear()
        return gan.judge(None, ((test + 1) * 127.5).round().byte())["variety"]

    monkeypatch.setattr(gan, "two_sample_accuracy", lambda *a: 0.5)
    assert 0.8 < variety(other, real) < 1.2
    assert 0.8 < variety(other, real[:300].repeat(2, 1, 1, 1)) < 1.2  # duplicates do not matter
    assert not capsys.readouterr().err
    assert variety(other[:5].repeat(120, 1, 1, 1) + 1e-3 * torch.randn(600, 3, 32, 32), real) < 0.3
    assert "mode collapse" in capsys.readouterr().err
    assert math.isfinite(variety(other, real[:1]))  # even one picture can be judged on


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """An unbroken run of StyleGAN, which several tests look at and none may change."""
    out = tmp_path_factory.mktemp("gan") / "run"
    done = subprocess.run([sys.executable, HERE / "gan.py", *gan_words(out)], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    return out, done.stdout


def test_what_a_gan_run_leaves(generated):
    out, shown = generated
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.pt", "metrics.csv", "samples.png", "training.png", "neighbours.png",
        "interpolation.png", "mixing.png", "truncation.png"}
    rows = rows_of(out)
    assert [row["step"] for row in rows] == ["20", "40", "45"] and rows[2]["test_variety"] in shown
    assert 0 <= float(rows[2]["test_two_samples"]) <= 1
    assert all(float(row[name]) > 0 for row in rows for name in ("norm_D", "norm_G"))
    assert len(decode_frames((out / "training.png").read_bytes())) == 14  # 12, first and last
    model, state = gan.load(out / "checkpoint.pt"), weights(out)
    assert not model.training and same(model.state_dict(), state["average"])
    assert not same(state["G"], state["average"])
    sheet = gan.png(gan.grid(gan.sample(model, 10, seed=0), 10))
    assert sheet == (out / "samples.png").read_bytes()


def test_a_finished_gan_samples_and_exports(generated, tmp_path, monkeypatch):
    out = copy_of(generated[0], tmp_path)
    monkeypatch.setattr(gan, "load_images", None)
    assert gan.main(["--out", str(out), "--truncation", "0.5", "--export", "3"]) == 0
    changed = {p.name for p in out.glob("*.*") if p.read_bytes() !=
               (generated[0] / p.name).read_bytes()}
    assert changed == {"samples.png"}
    pictures = [decode_png(p.read_bytes())[0] for p in sorted((out / "export").iterdir())]
    assert [x.shape for x in pictures] == [(16, 16, 3)] * 3
    assert not torch.equal(pictures[0], pictures[1])
    model = gan.load(out / "checkpoint.pt")
    first = (gan.sample(model, 1, 0.5, hash((0, 0)))[0] * 255).round().byte()
    assert torch.equal(pictures[0], first.permute(1, 2, 0))


def test_sheets_of_gan(generated, tmp_path, monkeypatch):
    """Mixed: coarse styles of the left column, fine ones of the top row; tamed: from the mean."""
    model, sheets, grid = gan.load(generated[0] / "checkpoint.pt"), [], gan.grid
    monkeypatch.setattr(gan, "grid", lambda x, columns: sheets.append(x) or grid(x, columns))
    gan.draw_styles(gan.Run(gan.Config(out=str(tmp_path)), model=model), model)
    walks, mixed, tamed = sheets
    with torch.no_grad():
        w = model.styles(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
        mean = model.mean_style().expand(len(w), 1, -1)
        half = len(w) // 2
        second, third = w[:, 1:2], w[:, 6:7]
        both = torch.cat([second[:half], third[half:]])  # second row, third column
        for sheet, place, styles in ((mixed, 0, mean), (mixed, 3, third), (mixed, 10, second),
                                     (mixed, 13, both), (tamed, 10, mean), (tamed, 19, second),
                                     (walks, 10, second), (walks, 19, w[:, 5:6])):
            wanted = model.render(styles)[0] / 2 + 0.5
            torch.testing.assert_close(sheet[place], wanted, atol=1e-4, rtol=0)


def test_gan_interrupted_and_continued(generated, tmp_path, monkeypatch, capsys):
    """To the bit, with both optimisers and the average."""
    loss, calls = gan.generator_loss, iter(range(1000))

    def interrupted(*a):
        if next(calls) == 30:
            raise KeyboardInterrupt
        return loss(*a)

    with monkeypatch.context() as patch:
        patch.setattr(gan, "SAVE_SECONDS", -1)
        patch.setattr(gan, "generator_loss", interrupted)
        assert gan.main(gan_words(tmp_path)) == 130
    assert "to continue" in capsys.readouterr().err and weights(tmp_path)["progress"][0] == 20
    assert gan.main(gan_words(tmp_path)) == 0
    whole, again = weights(generated[0]), weights(tmp_path)
    for name in ("G", "D", "average", "adam_G", "adam_D"):
        assert same(whole[name], again[name]), name
    assert rows_of(generated[0]) == rows_of(tmp_path)


def test_dcgan_on_digits(idx, tmp_path, capsys):
    words = gan_words(tmp_path / "a", generator="dcgan", data="mnist", data_dir=idx, steps=3,
                      image_size=28)
    assert gan.main(words) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "interpolation.png" in names and "mixing.png" not in names
    assert gan.sample(gan.load(tmp_path / "a" / "checkpoint.pt"), 2).shape == (2, 1, 28, 28)


def test_gan_refuses_what_would_go_wrong(generated, tmp_path, capsys, monkeypatch):
    for words, needle in ((["--generator", "biggan"], "stylegan or dcgan"),
                          (["--image-size", "30"], "multiple of 4"), (["--width", "0"], "--width"),
                          (["--truncation", "-1"], "--truncation"),
                          (["--data", "./faces"], "nor a folder")):  # a path is a path
        refused(capsys, [*gan_words(tmp_path / "new"), *words], needle, script=gan)
    out = copy_of(generated[0], tmp_path)
    refused(capsys, ["--out", out, "--latent-dim", "9"], "--latent-dim 6", script=gan)
    (out / "checkpoint.pt").write_bytes(b"junk")
    refused(capsys, ["--out", out], "no checkpoint of this gan.py", script=gan)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, gan_words(tmp_path / "new"), "one process", script=gan)
