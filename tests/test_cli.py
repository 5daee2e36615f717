"""The command line, run in this process on tiny weights; what a user reads is what is checked."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from klein_cns import cli
from klein_cns.klein import KleinRequest
from klein_cns.sampler import CNSParams
from PIL import Image
from test_lora import write_lora

QUICK = ["--model", "tiny", "--device", "cpu", "--num-inference-steps", "2", "--seed", "3"]


@pytest.fixture
def cat(tmp_path, photo):
    path = tmp_path / "cat.png"
    photo.crop((0, 0, 96, 64)).save(path)
    return path


@pytest.fixture
def klein(capsys):
    """Run a command; (exit status, stdout, stderr)."""

    def run(*args):
        status = cli.main([str(arg) for arg in args])
        return status, *capsys.readouterr()

    return run


def parameters(path):
    with Image.open(path) as image:
        return json.loads(image.text["klein_cns"])


def test_edit_with_everything(klein, cat, photo, tmp_path, pipeline):
    second = tmp_path / "second.jpg"
    photo.save(second)
    lora = tmp_path / "style.safetensors"
    write_lora(lora, pipeline, seed=1)
    status, out, err = klein(
        "edit", cat, second, "-p", "make it blue", "-o", tmp_path / "out.png", *QUICK, "--lora", f"{lora}:0.5",
        "--negative-prompt", "blurry", "--enable-cns", "--cns-s-churn", "0.7", "--cns-gamma-source", "reference",
        "--cns-solver", "sde", "--num-images", "2", "--image-size", "80x64",
    )
    assert (status, out.split()) == (0, [str(tmp_path / "out-1.png"), str(tmp_path / "out-2.png")])
    assert "random weights make noise" in err and "seed 3; text " in err
    made = parameters(tmp_path / "out-2.png")
    assert made["images"] == ["cat.png", "second.jpg"]
    assert made["loras"] == [{"path": "style.safetensors", "scale": 0.5}]
    assert CNSParams.from_endpoint(made) == CNSParams(s_churn=0.7, gamma_source="reference", solver="sde")
    assert made["negative_prompt"] == "blurry" and made["image_size"] == {"width": 80, "height": 64}
    with Image.open(tmp_path / "out-1.png") as image:
        assert image.size == (80, 64)


def test_generate_is_the_python_api(klein, tmp_path, pipeline):
    status, *_ = klein("generate", "-p", "a cat", "-o", tmp_path / "a.webp", *QUICK, "--image-size", "64x64")
    assert status == 0
    status, *_ = klein("generate", "-p", "a cat", "-o", tmp_path / "a.png", *QUICK, "--image-size", "64x64")
    result = pipeline("a cat", num_inference_steps=2, seed=3, image_size=(64, 64))
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(image, result.images[0])
    with Image.open(tmp_path / "a.webp") as image:
        assert image.format == "WEBP"


@pytest.fixture
def full_example(shared, cat):
    """The endpoint's own Full Example, a data: URI in place of its URL."""
    path = shared / "reference" / "endpoint" / "edit_lora.md"
    if not path.is_file():
        pytest.skip("the endpoint's document is not beside this checkout")
    text = re.search(r"\*\*Full Example\*\*:\s+```json\n(.+?)```", path.read_text(), re.S).group(1)
    return text, "data:image/png;base64," + base64.b64encode(cat.read_bytes()).decode()


def test_the_endpoints_full_example_runs(klein, full_example, tmp_path):
    text, uri = full_example
    file = tmp_path / "request.json"
    file.write_text(text)
    status, _, err = klein("edit", "--params", file, "-o", tmp_path / "a.png", *QUICK)
    assert status == 1 and "is a web address; download it and give the file, or a data: URI" in err
    file.write_text(re.sub(r"https://[^\"]+", uri, text))
    status, _, err = klein("edit", "--params", file, "-o", tmp_path / "a.png", *QUICK, "--image-size", "96x64")
    assert status == 0
    assert "acceleration has no local effect" in err and "enable_safety_checker has no local effect" in err
    assert re.search(r"enable_cns is off, so cns_s_churn, .* have no effect; turn it on with --enable-cns", err)
    made = parameters(tmp_path / "a.png")
    assert made["enable_cns"] is False and made["prompt"] == json.loads(text)["prompt"]
    assert made["num_inference_steps"] == 2  # the option overrides the file


def test_options_override_the_file_and_flags_can_be_turned_off(klein, tmp_path):
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"prompt": "x", "enable_cns": True, "cns_s_churn": 1.5, "cns_energy_scale": 1.1}))
    klein("generate", "--params", file, "-o", tmp_path / "a.png", *QUICK, "--image-size", "64x64",
          "--cns-s-churn", "0.25", "--no-cns-alpha-use-fnorm")
    expected = CNSParams(s_churn=0.25, energy_scale=1.1, alpha_use_fnorm=False)
    assert CNSParams.from_endpoint(parameters(tmp_path / "a.png")) == expected


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["edit", "-p", "x"], "edit needs at least one picture"),
        (["edit", "missing.png", "-p", "x"], "picture missing.png does not exist"),
        (["generate"], "there is no prompt; give -p PROMPT"),
        (["generate", "-p", "x", "--num-inference-steps", "201"], "num_inference_steps is 201; allowed is"),
        (["generate", "-p", "x", "--cns-s-churn", "3"], "cns_s_churn is 3.0; allowed is a number from 0.0"),
        (["generate", "-p", "x", "--cns-s-churn", "nan"], "cns_s_churn is nan"),
        (["generate", "-p", "x", "--image-size", "big"], "image_size is 'big'; allowed are auto, square_hd"),
        (["generate", "-p", "x", "--lora", "no.safetensors:1"], "LoRA no.safetensors does not exist"),
        (["generate", "-p", "x", *["--lora", "a"] * 4], "4 LoRAs were given; at most 3"),
        (["generate", "-p", "x"], "model 'nowhere' does not exist"),
        (["generate", "-p", "x", "--cns-gamma-file", "no.pt"], "progress file no.pt cannot be used"),
        (["generate", "-p", "x", "--enable-cns", "--cns-gamma-source", "reference"], "needs at least one reference"),
        (["generate", "-p", "x", "--params", "no.json"], "--params no.json cannot be read as JSON"),
    ],
)
def test_errors_are_one_sentence(klein, tmp_path, args, says):
    status, out, err = klein(*args, "-o", tmp_path / "a.png", "--model", "nowhere")  # said before it is looked for
    assert status == 1 and out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("klein-cns: ") and says in line
    assert not (tmp_path / "a.png").exists()


def test_params_files_that_are_wrong(klein, tmp_path):
    file = tmp_path / "request.json"
    for content, says in (
        ("[1]", "holds a list; it must hold one JSON object"),
        ('{"prompt": "x", "steps": 4}', "has unknown steps; known are"),
        ('{"prompt": "x", "cns_churn": 4}', "unknown CNS parameter cns_churn"),
        ('{"prompt": "x", "image_urls": ["a.png"]}', "so it edits pictures; run klein-cns edit"),
        ('{"prompt": "x", "output_format": "gif"}', "output_format is 'gif'"),
        ('{"prompt": 3}', "prompt is 3; it must be text"),
    ):
        file.write_text(content)
        status, _, err = klein("generate", "--params", file, "-o", tmp_path / "a.png", *QUICK)
        assert status == 1 and says in err, content
    status, _, err = klein("generate", "-p", "x", "-o", tmp_path / "a.bmp", *QUICK)
    assert status == 1 and "the ending of" in err and ".png, .jpg" in err


def test_ctrl_c_stops_cleanly(klein, tmp_path, monkeypatch):
    """The interrupt arrives in the middle of a step."""
    from diffusers import Flux2Transformer2DModel

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Flux2Transformer2DModel, "forward", interrupted)
    status, out, err = klein("generate", "-p", "x", "-o", tmp_path / "a.png", *QUICK, "--image-size", "64x64")
    assert status == 130 and out == "" and "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_every_parameter_is_an_option_with_its_range_and_meaning(capsys):
    with pytest.raises(SystemExit):
        cli.main(["edit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for cls in (KleinRequest, CNSParams):
        for name, spec in cls.__dataclass_fields__.items():
            if name == "cns":
                continue
            public = name if cls is KleinRequest or name == "enable_cns" else f"cns_{name}"
            assert f"--{public.replace('_', '-')}" in text
            assert re.sub(r"\s", "", spec.metadata["help"])[:40] in re.sub(r"\s", "", text)


def test_demo(klein, tmp_path, monkeypatch):
    from klein_cns.klein import demo

    monkeypatch.setattr(demo, "STEPS", 4)
    status, out, _ = klein("demo", "-o", tmp_path / "demo")
    assert status == 0 and "makes noise, not pictures" in out
    names = {"input.png", "edit_without_cns.png", "edit_with_cns.png", "spectrum.png"}
    assert {path.name for path in (tmp_path / "demo").iterdir()} == names
    with Image.open(tmp_path / "demo" / "edit_with_cns.png") as image:
        assert image.size == (451, 300)


def test_installed_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "klein_cns.cli", "generate", "-o", "a.png"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "klein-cns: there is no prompt; give -p PROMPT, or --params with one.\n"
    (script,) = metadata.entry_points(group="console_scripts", name="klein-cns")
    assert script.load() is cli.main
