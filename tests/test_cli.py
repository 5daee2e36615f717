"""The command line, run in this process on tiny weights; what a user reads is what is checked."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import metadata

import numpy as np
import pytest
import torch
from endpoint_facts import complete_request
from klein_cns import cli
from klein_cns.klein import KleinRequest
from klein_cns.sampler import CNSParams
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import write_lora

QUICK = ["--model", "tiny", "--device", "cpu", "--num-inference-steps", "2", "--seed", "3"]


@pytest.fixture
def cat(tmp_path, photo):
    path = tmp_path / "cat.png"
    photo.crop((0, 0, 96, 64)).save(path)
    return path


def parameters(path):
    with Image.open(path) as image:
        return json.loads(image.text["klein_cns"])


def test_edit_with_everything(klein, cat, photo, tmp_path, pipeline):
    second = tmp_path / "second.jpg"
    photo.save(second)
    lora = tmp_path / "style.safetensors"
    write_lora(lora, pipeline, seed=1)
    status, out, err = klein(
        "edit",
        cat,
        second,
        "-p",
        "make it blue",
        "-o",
        tmp_path / "out.png",
        *QUICK,
        "--lora",
        f"{lora}:0.5",
        "--negative-prompt",
        "blurry",
        "--enable-cns",
        "--cns-s-churn",
        "0.7",
        "--cns-gamma-source",
        "reference",
        "--solver",
        "sde",
        "--num-images",
        "2",
        "--image-size",
        "80x64",
    )
    assert (status, out.split()) == (0, [str(tmp_path / "out-1.png"), str(tmp_path / "out-2.png")])
    assert "random weights make noise" in err and "seed 3; text " in err
    assert "style.safetensors at 0.5: 3 of 3 modules apply, 3 of 3 weights as peft adapters" in err
    made = parameters(tmp_path / "out-2.png")
    assert made["images"] == ["cat.png", "second.jpg"]
    assert made["loras"] == [{"path": "style.safetensors", "scale": 0.5}]
    assert CNSParams.from_endpoint(made) == CNSParams(s_churn=0.7, gamma_source="reference")
    assert made["solver"] == "sde"
    assert made["negative_prompt"] == "blurry" and made["image_size"] == {"width": 80, "height": 64}
    with Image.open(tmp_path / "out-1.png") as image:
        assert image.size == (80, 64)


def test_lora_says_what_files_are(klein, tmp_path):
    wide, other = tmp_path / "wide.safetensors", tmp_path / "other.safetensors"
    for file, width in ((wide, 4096), (other, 6144)):
        name = "base_model.model.single_blocks.3.linear2.lora_{}.weight"
        tensors = {name.format("A"): torch.ones(2, 4 * width), name.format("B"): torch.ones(width, 2)}
        save_file(tensors, file, {"trigger_word": "sks", "ss_output_name": "mine"})
    status, out, err = klein("lora", wide)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "wide.safetensors: 1 of 1 modules apply",
        "  format: LoRA, BFL names after 'base_model.model.'; rank 2, alpha none",
        "  made for: FLUX.2 [klein] 9B",
        "  trigger words: sks",
        "  ss_output_name: mine",
    ]
    status, out, err = klein("lora", other, wide, tmp_path / "gone.safetensors")
    assert status == 1 and "other.safetensors: 0 of 1 modules apply" in out and "wide.safetensors: 1 of 1" in out
    assert "made for: FLUX.2 [dev]" in out and "was made for FLUX.2 [dev], the model is FLUX.2 [klein] 9B" in err
    assert "LoRA gone.safetensors does not exist" in err


def test_generate_is_the_python_api(klein, tmp_path, pipeline):
    status, *_ = klein("generate", "-p", "a cat", "-o", tmp_path / "a.webp", *QUICK, "--image-size", "64x64")
    assert status == 0
    status, *_ = klein("generate", "-p", "a cat", "-o", tmp_path / "a.png", *QUICK, "--image-size", "64x64")
    result = pipeline("a cat", num_inference_steps=2, seed=3, image_size=(64, 64))
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(image, result.images[0])
    with Image.open(tmp_path / "a.webp") as image:
        assert image.format == "WEBP"


def test_a_complete_request_of_the_endpoint_runs(klein, cat, tmp_path):
    file = tmp_path / "request.json"
    file.write_text(json.dumps(complete_request("https://example.com/a.png")))
    status, _, err = klein("edit", "--params", file, "-o", tmp_path / "a.png", *QUICK)
    assert status == 1 and "is a web address; download it and give the file, or a data: URI" in err
    request = complete_request("data:image/png;base64," + base64.b64encode(cat.read_bytes()).decode())
    file.write_text(json.dumps(request))
    status, _, err = klein("edit", "--params", file, "-o", tmp_path / "a.png", *QUICK, "--image-size", "96x64")
    assert status == 0
    assert "enable_safety_checker has no local effect" in err
    assert "acceleration regular: 4 of 4 model calls; the steps lie too far apart for more." in err
    assert parameters(tmp_path / "a.png")["acceleration"] == "regular"
    assert re.search(r"enable_cns is off, so cns_s_churn, .* have no effect; turn it on with --enable-cns", err)
    made = parameters(tmp_path / "a.png")
    assert made["enable_cns"] is False and made["prompt"] == request["prompt"]
    assert made["num_inference_steps"] == 2  # the option overrides the file


def test_options_override_the_file_and_flags_can_be_turned_off(klein, tmp_path):
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"prompt": "x", "enable_cns": True, "cns_s_churn": 1.5, "cns_energy_scale": 1.1}))
    klein(
        "generate",
        "--params",
        file,
        "-o",
        tmp_path / "a.png",
        *QUICK,
        "--image-size",
        "64x64",
        "--cns-s-churn",
        "0.25",
        "--no-cns-alpha-use-fnorm",
    )
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
        (["generate", "-p", "x", "--enable-cns", "--cns-gamma-file", "no.pt"], "progress file no.pt cannot be used"),
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
        ('{"prompt": "x", "loras": "style.safetensors"}', "loras is 'style.safetensors'; give a list"),
        ('{"prompt": "x", "loras": [5]}', "LoRA 5 is neither PATH:SCALE"),
        ('{"prompt": "x", "guidance_scale": 1e400}', "guidance_scale is inf"),
        ('{"prompt": 3}', "prompt is 3; it must be text"),
    ):
        file.write_text(content)
        status, _, err = klein("generate", "--params", file, "-o", tmp_path / "a.png", *QUICK)
        assert status == 1 and says in err, content
    status, _, err = klein("generate", "-p", "x", "-o", tmp_path / "a.bmp", *QUICK)
    assert status == 1 and "the ending of" in err and ".png, .jpg" in err


def test_the_ending_decides_the_format(klein, tmp_path):
    status, _, err = klein("generate", "-p", "x", "-o", tmp_path / "a.png", *QUICK, "--output-format", "jpeg")
    assert status == 1 and "--output-format is jpeg, but" in err and "ends in .png" in err
    file = tmp_path / "request.json"
    file.write_text('{"prompt": "x", "output_format": "png", "image_urls": [], "negative_prompt": null}')
    status, *_ = klein("generate", "--params", file, "-o", tmp_path / "a.JPG", *QUICK, "--image-size", "64x64")
    with Image.open(tmp_path / "a.JPG") as image:
        assert status == 0 and image.format == "JPEG"


def test_output_places_that_cannot_be_written_are_refused_before_the_model_is_looked_for(klein, cat, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for output, says in ((tmp_path / "folder.png", "is a folder"), (cat / "a.png", "cannot be written")):
        status, _, err = klein("generate", "-p", "x", "-o", output, "--model", "nowhere")
        assert status == 1 and says in err and "nowhere" not in err


def test_everything_about_the_files_is_refused_before_the_model_is_looked_for(klein, tmp_path, monkeypatch):
    """With several pictures each of their names counts; what is written first has a longer one."""
    (tmp_path / "taken-2.png").mkdir()
    long = tmp_path / f"{'n' * 250}.png"  # 254 characters; with .part it has more than the 255 that are allowed
    protected = tmp_path / "protected.png"
    protected.write_bytes(b"mine")
    monkeypatch.setattr(os, "access", lambda path, mode: path != protected)  # root may write everywhere
    for output, extra, says in (
        (tmp_path / "taken.png", ["--num-images", "2"], "taken-2.png is a folder"),
        (long, [], "cannot be written (File name too long)"),
        (protected, [], "is protected against writing"),
    ):
        status, out, err = klein("generate", "-p", "x", "-o", output, "--model", "nowhere", *extra)
        assert status == 1 and out == "" and says in err and "nowhere" not in err, err
    assert protected.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["protected.png", "taken-2.png"]
    monkeypatch.delitem(Image.SAVE, "WEBP")
    monkeypatch.setattr(Image, "init", lambda: None)
    status, _, err = klein("generate", "-p", "x", "-o", tmp_path / "a.webp", "--model", "nowhere")
    assert status == 1 and "output_format is webp, which this Pillow was built without; choose png" in err


def test_a_name_that_is_no_unicode(klein, cat, tmp_path):
    """As a file from an older system has it; the picture is made, its name printed, and its parameters kept."""
    picture, output = cat.with_name("caf\udce9.png"), tmp_path / "th\udce9.png"
    picture.write_bytes(cat.read_bytes())
    status, out, err = klein("edit", picture, "-p", "x", "-o", output, *QUICK, "--image-size", "64x64")
    assert status == 0, err
    assert out.strip() == str(tmp_path / "th\\udce9.png")
    assert parameters(output)["images"] == ["caf\udce9.png"]


def test_a_report_reaches_a_pipe_of_any_encoding(tmp_path, pipeline):
    """Windows gives pipes its own code page, which has no γ."""
    file = tmp_path / "γ 猫.safetensors"
    write_lora(file, pipeline, seed=1)
    save_file(load_file(file), file, metadata={"trigger_words": "猫 γ"})
    for encoding in ("cp1252", "ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "klein_cns.cli", "lora", str(file)],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 1 and b"modules apply" in done.stdout, done.stderr
        words, name = (text.encode(encoding, "backslashreplace") for text in ("猫 γ", file.name))
        assert b"trigger words: " + words in done.stdout and name in done.stderr


def test_settings_that_can_hardly_be_meant_are_named(klein, tmp_path):
    wild = ["--enable-cns", "--cns-s-churn", "2", "--cns-energy-scale", "1.5"]
    status, _, err = klein("generate", "-p", "x", "-o", tmp_path / "a.png", *QUICK, "--image-size", "64x64", *wild)
    assert status == 0 and "cns_s_churn 2 with cns_energy_scale 1.5 adds more noise than the model removes" in err


def test_positional_pictures_replace_those_of_the_file(klein, cat, tmp_path):
    file = tmp_path / "request.json"
    file.write_text('{"prompt": "x", "image_urls": ["https://example.com/a.png"]}')
    status, *_ = klein("edit", cat, "--params", file, "-o", tmp_path / "a.png", *QUICK)
    assert status == 0 and parameters(tmp_path / "a.png")["images"] == ["cat.png"]


def test_the_parameters_of_a_picture_make_it_again(klein, tmp_path):
    first = ["generate", "-p", "a cat", "-o", tmp_path / "a.png", *QUICK, "--image-size", "64x64", "--enable-cns"]
    klein(*first, "--cns-gamma-file", "sit_xl2_cfg_1.5")
    file = tmp_path / "request.json"
    file.write_text(json.dumps(parameters(tmp_path / "a.png")))
    assert json.loads(file.read_text())["cns_gamma_file"] == "sit_xl2_cfg_1.5"
    status, *_ = klein("generate", "--params", file, "-o", tmp_path / "b.png", "--model", "tiny", "--device", "cpu")
    assert status == 0 and parameters(tmp_path / "b.png") == parameters(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert np.array_equal(a, b)


def test_a_saved_folder_is_a_model(klein, tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path / "klein")
    for model, output in (("tiny", "a.png"), (tmp_path / "klein", "b.png")):
        args = ["generate", "-p", "a cat", "-o", tmp_path / output, "--image-size", "64x64", *QUICK[2:]]
        status, _, err = klein(*args, "--model", model)
        assert status == 0 and "random weights make noise" in err
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def test_ctrl_c_in_the_first_seconds(tmp_path):
    """A real signal to a real process, while it still imports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "klein_cns.cli", "generate", "-p", "x", "-o", str(tmp_path / "a.png"), *QUICK],
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    # Python ends itself by the signal where the interrupt passed through C code; a shell shows 130 for both
    assert process.returncode in (130, -signal.SIGINT) and "interrupted" in err and "Traceback" not in err


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
