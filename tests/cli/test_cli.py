"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from pi0.checkpoint.load import load_model, open_checkpoint
from pi0.cli.act import _read_image
from pi0.cli.main import main
from pi0.config import PRESETS
from pi0.inputs import random_inputs


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def pi0(*words: str | Path) -> Done:
    """Runs a command line in this process: importing torch takes seconds."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["pi0", *map(str, words)])
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return Done(code, stdout.getvalue(), stderr.getvalue())


def refused(*words: str | Path) -> str:
    """The sentence of a command that must fail with exit code 2 and no traceback."""
    done = pi0(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "base.png"
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs, noise = random_inputs(PRESETS["tiny"], cameras=2, tokens=8, seed=0)
    path = tmp_path_factory.mktemp("npz") / "in.npz"
    np.savez(
        path,
        images=inputs.images,
        img_masks=inputs.image_mask,
        tokens=inputs.tokens,
        token_masks=inputs.token_mask,
        state=inputs.state,
        noise=noise,
    )
    return path


def act(checkpoint: Path, image: Path, *more: str | Path) -> list[str | Path]:
    words = ["act", checkpoint, "--image", f"base={image}", "--prompt", "pick up the cube"]
    robot = [] if "--robot" in more else ["--robot", "generic"]
    return [*words, "--state", "0.1,0.2 0.3", *robot, *more]


def test_help_has_examples() -> None:
    top = pi0("--help")
    assert top.returncode == 0
    for verb in ("act", "trace", "sample", "inspect", "synth"):
        assert verb in top.stdout
        text = pi0(verb, "--help").stdout
        assert "Examples" in text
        assert f"pi0 {verb}" in text


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich cuts a word that is wider than its column."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    for verb in ("serve", "train", "verify", "inspect"):
        text = pi0(verb, "--help").stdout
        assert "--help" in text
        assert "…" not in text
    assert "--no-state-in-prompt" in text


def test_version() -> None:
    assert pi0("--version").stdout.strip() == "0.1.0"


def test_synth_inspect_trace(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    done = pi0("synth", "--preset", "tiny", "--seed", "3", folder)
    assert done.returncode == 0, done.stderr
    assert "89 tensors" in done.stdout
    table = pi0("inspect", folder).stdout
    assert "layout openpi" in table
    assert "action expert" in table
    assert f"{folder}: π0, 89 tensors" in table
    assert "adaptive_norm" not in table
    assert "--image base=FILE --image wrist=FILE --image right_wrist=FILE" in table
    assert "pi0 act would use\n  robot generic" in table
    data = json.loads(pi0("inspect", folder, "--json", "--cameras", "2", "--tokens", "32").stdout)
    assert data["sequence"]["total"] == 2 * 4 + 32 + 51
    assert data["modules"][0]["dtypes"] == ["BF16"]
    stopped = pi0("inspect", folder, "--robot", "aloah")
    assert stopped.returncode == 0
    assert "pi0 act would stop at the errors below; known so far:\n" in stopped.stdout
    assert "error robot-unknown" in stopped.stdout


def test_trace(tiny_path: Path, npz: Path) -> None:
    words = ("trace", tiny_path, "--image-size", "56", "--cameras", "2", "--tokens", "32")
    data = json.loads(pi0(*words, "--json").stdout)
    stages = {row["stage"]: row for row in data["stages"]}
    assert len(stages) == 11
    assert stages["vision_tower"]["shape"] == [2, 16, 48]
    assert stages["prefix"]["shape"] == [1, 64, 64]
    assert stages["velocity"]["shape"] == [1, 50, 32]
    assert all(row["ms"] >= 0 for row in data["stages"])
    assert stages["velocity"]["ms"] > stages["vlm_transformer"]["ms"]
    shapes = {part["name"]: part["shape"] for part in data["slices"]}
    assert shapes == {
        "prefix→prefix": [64, 64],
        "suffix→suffix": [51, 51],
        "suffix→prefix+suffix": [51, 115],
    }
    table = pi0("trace", tiny_path, "--inputs", npz).stdout
    assert "expert_transformer" in table
    assert "prefix 16 + suffix 51 = 67" in table


def test_trace_of_an_engine_that_shows_little(tiny_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.5")
    done = pi0("trace", tiny_path, "--engine", "transformers")
    assert done.returncode == 0, done.stderr
    assert "not shown: vision_tower, projector, token_embedding" in done.stdout
    assert "prefix 56 + suffix 51 = 107" in done.stdout
    assert "mask slice" not in done.stdout


def test_sample_equals_the_model(tiny_path: Path, npz: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    done = pi0("sample", tiny_path, "--inputs", npz, "--out", out, "--steps", "4")
    assert done.returncode == 0, done.stderr
    inputs, noise = random_inputs(PRESETS["tiny"], cameras=2, tokens=8, seed=0)
    expected = load_model(open_checkpoint(tiny_path)).sample_actions(inputs, noise, steps=4)
    with np.load(out) as file:
        got = file["actions"]
    assert got.shape == (1, 50, 32)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_act(tiny_path: Path, image: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "a" / "actions.npy", tmp_path / "chunk.png"
    done = pi0(*act(tiny_path, image, "--out", out, "--plot", plot, "--stages"))
    assert done.returncode == 0, done.stderr
    assert "action_projection" in done.stdout
    assert np.load(out).shape == (50, 32)
    with Image.open(plot) as picture:
        assert picture.size[0] > 500
    again = json.loads(pi0(*act(tiny_path, image, "--json")).stdout)
    np.testing.assert_allclose(np.array(again["actions"]), np.load(out), atol=1e-5)
    assert set(again["policy_timing"]) == {
        "preprocess_ms",
        "infer_ms",
        "postprocess_ms",
        "total_ms",
    }


def test_act_for_a_robot(tiny_path: Path, image: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "state.npy", np.zeros(8))
    done = pi0(
        "act", tiny_path, "--robot", "libero", "--image", f"base={image}", "--image",
        f"wrist={image}", "--prompt", "go", "--state", tmp_path / "state.npy", "--json",
    )  # fmt: skip
    assert np.array(json.loads(done.stdout)["actions"]).shape == (50, 7)


def test_act_refuses(tiny_path: Path, image: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep)
    (text := tmp_path / "text.npy").write_text("0.1, 0.2")
    for words, message in (
        (["--image", f"top={image}"], "camera top: expected one of base, wrist, right_wrist"),
        (["--image", "base"], "--image: expected CAMERA=FILE, found 'base'"),
        (["--image", "wrist=no.png"], "expected a picture in no.png, found none (no such file)"),
        (["--image", f"wrist={tiny_path}/config.json"], "expected a picture"),
        (["--state", "0,x"], "--state: expected numbers"),
        (["--state", "no.npy"], "--state: expected numbers"),
        (["--state", text], "(the magic string is not correct"),
        (["--state", ""], "--state: expected numbers"),
        (["--state", "0.1,,0.3"], "(a number is missing)"),
        (["--state", ", 0.2"], "(a number is missing)"),
        (["--state", "0.1, 1_0"], "(an underscore)"),
        (["--image", f"base_0_rgb={image}"], "expected one picture for images/base, found two"),
        (["--image", f"wrist={deep}"], "expected a picture of 8 bits a channel"),
        (["--out", tmp_path], "expected the name of a file to write, found a folder"),
        (["--seed", "-1"], "Usage: pi0 act"),
        (["--seed", str(2**70)], "Usage: pi0 act"),
        (["--state", "nan"], "state: expected finite values"),
        (["--robot", "r2d2"], "robot: expected one of generic"),
        (["--prompt", "x" * 60], "prompt: expected at most 48 tokens, found 62"),
        (["--prompt", ""], "prompt: expected a sentence"),
        (["--dtype", "float16"], "dtype float16"),
        (["--steps", "0"], "Usage: pi0 act"),
        (["--tokenizer", "no.model"], "tokenizer no.model: expected a file"),
    ):
        assert message in " ".join(refused(*act(tiny_path, image, *words)).split())
    assert "expected a checkpoint folder" in refused(*act(tmp_path / "no", image))


def test_a_picture_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    image = Image.fromarray(np.rot90(pixels))
    orientation = image.getexif()
    orientation[0x0112] = 6  # to be shown turned clockwise
    image.save(tmp_path / "phone.png", exif=orientation)
    np.testing.assert_array_equal(_read_image("base", tmp_path / "phone.png"), pixels)


def test_damaged_checkpoints(tiny_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated or damaged" in refused("inspect", folder)
    assert "truncated or damaged" in refused("trace", folder)
    name = "paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert f"missing: {name} [64, 32]" in refused("inspect", folder)
    save_file({**tensors, name: tensors[name].T.contiguous()}, path)
    assert f"shape: {name}: expected [64, 32], found [32, 64]" in refused("trace", folder)


def test_bad_inputs_file(tiny_path: Path, npz: Path, tmp_path: Path) -> None:
    def sample(path: Path) -> str:
        return refused("sample", tiny_path, "--inputs", path, "--out", tmp_path / "out.npz")

    with np.load(npz) as file:
        arrays = dict(file)
    bad = tmp_path / "bad.npz"
    np.savez(bad, **{k: v for k, v in arrays.items() if k != "noise"})
    assert "found no noise" in sample(bad)
    for name, value, message in (
        ("tokens", arrays["tokens"][:, :7], "token_mask: expected bool [1, 7], found bool [1, 8]"),
        ("tokens", arrays["tokens"] + 600, "tokens: expected ids from 0 to 511"),
        ("tokens", arrays["tokens"].astype(np.int32), "tokens: expected int64"),
        ("images", arrays["images"] * 255, "images: expected pixels in [-1, 1]"),
        ("images", arrays["images"] * np.nan, "images: expected finite values"),
        ("images", arrays["images"][0], "images: expected 5 dimensions"),
        ("tokens", arrays["tokens"][:, :0], "tokens: expected at least one, found shape [1, 0]"),
        ("tokens", np.array("x"), "tokens: expected an array of numbers"),
        ("noise", arrays["noise"][:, :10], "noise: expected float32 [1, 50, 32]"),
        ("img_masks", arrays["img_masks"].astype(np.float32), "image_mask: expected bool"),
    ):
        np.savez(bad, **{**arrays, name: value})
        assert message in sample(bad)
    for content in (npz.read_bytes()[:500], b"\x89PNG"):
        bad.write_bytes(content)
        sentence = "expected an .npz of arrays, found another kind of file or a truncated one."
        assert sentence in sample(bad)
    assert "No such file" in sample(tmp_path / "no.npz")
    assert not (tmp_path / "out.npz").exists()
    out = tmp_path
    assert "found a folder" in refused("sample", tiny_path, "--inputs", npz, "--out", out)


def test_synth_refuses(tiny_path: Path, tmp_path: Path) -> None:
    assert "preset: expected one of pi0_base" in refused("synth", "--preset", "x", tmp_path)
    assert "layout: expected one of openpi" in refused("synth", "--layout", "x", tmp_path)
    assert "found one" in refused("synth", "--preset", "tiny", tiny_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    """A size limit stands for a full disk: writing fails half way."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pi0.cli.main import main\n"
        f"sys.argv = ['pi0', 'synth', '--preset', 'tiny', {str(tmp_path / 'x')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "x").glob("*model*"))
    assert not list((tmp_path / "x").glob(".*"))


def test_interrupt(tmp_path: Path) -> None:
    """While a file of over 1 GB is written: one block of each trunk, whole vocabulary."""
    folder = tmp_path / "base"
    script = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from pi0.cli.main import main\n"
        "from pi0.config import PRESETS\n"
        "base = PRESETS['pi0_base']\n"
        "trunks = {k: replace(getattr(base, k), depth=1) for k in ('vision', 'vlm', 'expert')}\n"
        "PRESETS['pi0_base'] = replace(base, **trunks)\n"
        f"sys.argv = ['pi0', 'synth', '--preset', 'pi0_base', {str(folder)!r}]\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(".model*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(folder.glob("*model*"))
    assert not list(folder.glob(".model*"))


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['pi0', 'act', '--help']\n"
        "from pi0.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'PIL', 'matplotlib', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verify(tiny_path: Path, npz: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    words = ("verify", tiny_path, "--tokens", 16, "--steps", 2, "--oracle", "none")
    done = pi0(*words, "--layers", "--report", page)
    assert done.returncode == 0, done.stdout
    assert "same computation (reference:float32, each stage on the reference's input): all " in (
        done.stdout
    )
    agree = re.search(r"agree: all \d+ comparisons are within their limits", done.stdout)
    assert agree
    assert "independent implementation: none, as requested" in done.stdout
    assert "largest deviation of actions (masked): action " in done.stdout
    html = page.read_text()
    assert html.count("<svg") == 3 + 3 + 3 + 2
    assert agree[0] in html
    assert "reference:bfloat16 against reference:float32" in html
    assert not any(word in html for word in (" src=", 'href="http', "@import")), (
        "needs nothing else"
    )
    data = json.loads(pi0(*words, "--inputs", npz, "--mode", "isolated", "--json").stdout)
    assert data["passed"]
    assert {row["part"] for row in data["rows"]} == {"structure", "isolated", "chained"}
    assert {"sample", "sample.state", "response.image"} <= {row["stage"] for row in data["rows"]}


def test_verify_fails(tiny_path: Path) -> None:
    done = pi0(*("verify", tiny_path, "--steps", 1, "--min-pcc", "0.99999999", "--oracle", "none"))
    assert done.returncode == 1
    assert "FAILS first at vision_tower.block.0 (all valid)" in done.stdout


def test_verify_refuses(tiny_path: Path) -> None:
    for words, message in (
        (["--mode", "sideways"], "mode: expected one of both, chained, isolated"),
        (["--engines", "warp", "reference"], "engine: expected one of reference"),
        (["--engines", "reference", "reference:int3"], "dtype: expected one of float32"),
        (["--inputs", "no.npz"], "No such file"),
        (["--min-pcc", "nan"], "min-pcc: expected a number from 0 to 1, found nan"),
        (["--engines", "reference", "reference@warp"], "expected cpu or cuda, found 'warp'"),
        (["--engines", "reference", "ttnn-host@3"], "expected cpu for engine ttnn-host, found '3'"),
        (["--engines", "transformers", "reference", "--mode", "isolated"], "expected chained for"),
        (["--oracle", "transformers", "--image-size", "56"], "expected the checkpoint's 28"),
        (["--oracle", "us"], "oracle: expected auto, none or one of transformers, lerobot"),
    ):
        assert message in refused("verify", tiny_path, *words)


@pytest.mark.parametrize("found", [None, "0.80.0"])
def test_verify_refuses_before_the_work(
    tiny_path: Path, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ttnn, or another: said before the reference is loaded and run, not after."""

    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("pi0.engines.tenstorrent.ttnn_import.version", version)
    monkeypatch.delattr("pi0.engines.reference.load_model")
    said = refused("verify", tiny_path, "--engines", "reference", "ttnn-host:fast")
    assert f"pi0: ttnn: expected ttnn 0.81.1, found {found or 'none'}." in said
    assert len(said.splitlines()) == 1


def test_damaged_weights(tiny_path: Path, image: Path, tmp_path: Path) -> None:
    """NaN in the weights: an error that names the tensor, of act and of trace."""
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    tensors = load_file(folder / "model.safetensors")
    tensors["action_out_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for words in (act(folder, image), ("trace", folder)):
        assert "action_out_proj.weight: expected finite weights, found 1 NaN" in refused(*words)


def test_warnings_are_sentences(tiny_path: Path, image: Path, recwarn) -> None:
    done = pi0(*act(tiny_path, image, "--state", "1000"))
    assert done.returncode == 0
    assert "pi0: warning: state: state[0] = 1000: more than 100 standard" in done.stderr


def test_too_little_memory_is_said_before_the_work(tiny_path: Path, image: Path) -> None:
    many, on_cpu = 3_000_000_000, ("--engine", "cpu")
    for words, found in (
        (("trace", tiny_path, "--tokens", many, *on_cpu), f"28 px and {many} tokens"),
        (("trace", tiny_path, "--tokens", many, *on_cpu, "--weight-cache"), f"{many} tokens"),
        (("verify", tiny_path, "--cameras", many), f"with {many} images"),
        ((*act(tiny_path, image), "--image-size", 200_000), "with 1 images of 200000 px"),
    ):
        said = refused(*words)
        assert "memory: expected enough for engine" in said
        assert found in said


def test_too_little_memory(tiny_path: Path) -> None:
    assert "memory: expected enough" in refused("trace", tiny_path, "--image-size", 10**6)
