"""KleinPipeline on tiny weights: the real classes of diffusers and transformers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from klein_cns.klein import KleinPipeline, KleinRequest, flux2_sigmas, tiny
from klein_cns.klein.loading import default_device
from klein_cns.klein.prompts import encode_prompt
from klein_cns.klein.references import to_pixels
from klein_cns.sampler import CNSParams, shipped_progress
from PIL import Image

SMALL = {"num_inference_steps": 3, "seed": 5, "image_size": (96, 64)}
CNS = CNSParams(s_churn=0.6)
OFF = CNSParams(enable_cns=False)
STILL = CNSParams(s_churn=0.0)


def edit(pipeline, images=(), **changes):
    return pipeline("make it blue", images, **{**SMALL, **changes})


def as_klein_latents(pipe, latents):
    """The official pipeline's output_type="latent", [B, 32, H/8, W/8] de-normalised, from ours."""
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
    return pipe._unpatchify_latents(latents * std + mean)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize(("solver", "cns"), [("euler", OFF), ("euler", STILL), ("sde", OFF), ("sde", STILL)])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_without_noise_the_latents_are_the_official_pipelines_bit_for_bit(
    pipeline, photo, guidance, solver, cns, references
):
    pictures = [photo.crop((0, 0, 96, 64)), photo.crop((100, 50, 164, 114))][:references]
    ours = edit(pipeline, pictures, guidance_scale=guidance, solver=solver, cns=cns)
    noise = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(5))
    pipeline.pipe.set_progress_bar_config(disable=True)
    official = pipeline.pipe(
        image=pictures or None,
        prompt="make it blue",
        height=64,
        width=96,
        num_inference_steps=3,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
    ).images
    assert torch.equal(as_klein_latents(pipeline.pipe, ours.latents), official)


def test_guidance_below_one_is_the_usual_formula(pipeline):
    """One step from σ = 1: the latents are linear in the guided velocity, so guidance is linear too."""
    at = {g: edit(pipeline, guidance_scale=g, num_inference_steps=1).latents for g in (0.0, 0.5, 1.0, 3.0)}
    for g in (0.5, 3.0):
        torch.testing.assert_close(at[g], at[0.0] + g * (at[1.0] - at[0.0]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(at[0.5], at[1.0])


def test_the_negative_prompt_matters_and_only_with_guidance(pipeline):
    default, other = edit(pipeline), edit(pipeline, negative_prompt="blurry")
    assert not torch.equal(default.latents, other.latents)
    unguided = [edit(pipeline, negative_prompt=text, guidance_scale=1.0).latents for text in ("", "blurry")]
    assert torch.equal(*unguided)


def test_a_long_prompt_is_kept_whole(pipeline):
    long = "word " * 300  # 1500 bytes: 1500 tokens for the byte tokenizer
    embeds, ids = encode_prompt(pipeline.pipe, long)
    assert embeds.shape[1] > 1500 and ids.shape[1] == embeds.shape[1]
    short, _ = encode_prompt(pipeline.pipe, "a cat")
    official, _ = pipeline.pipe.encode_prompt("a cat")
    assert torch.equal(short, official)


@pytest.mark.parametrize(
    ("solver", "cns"), [("euler", OFF), ("euler", CNS), ("sde_2m", CNS), ("sde_3m", OFF), ("sde_3m", CNS)]
)
def test_image_i_of_a_batch_is_the_image_alone(pipeline, photo, solver, cns):
    together = edit(pipeline, [photo], num_images=3, solver=solver, cns=cns)
    for i in range(3):
        alone = edit(pipeline, [photo], num_images=1, batch_index=[i], solver=solver, cns=cns)
        assert float((together.pixels[i] - alone.pixels[0]).abs().max()) <= 1e-4


def test_global_generators_neither_matter_nor_change(pipeline, photo):
    torch.manual_seed(1)
    first = edit(pipeline, [photo], cns=CNS)
    torch.manual_seed(2)
    np.random.seed(2)
    state = torch.get_rng_state()
    second = edit(pipeline, [photo], cns=CNS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.pixels, second.pixels)
    assert tiny(3) is not None and torch.equal(torch.get_rng_state(), state)


def test_cns_off_ignores_every_other_value(pipeline):
    wild = CNSParams(enable_cns=False, s_churn=2.0, gamma_source="reference", num_freq_bins=128)
    assert torch.equal(edit(pipeline).latents, edit(pipeline, cns=wild).latents)


@pytest.mark.parametrize("scheduler", ["flux2", "log_snr"])
@pytest.mark.parametrize("solver", ["euler", "sde", "sde_2m", "sde_3m"])
def test_every_solver_on_every_schedule(pipeline, photo, scheduler, solver):
    result = edit(pipeline, [photo], scheduler=scheduler, solver=solver, cns=CNSParams(gamma_source="reference"))
    assert bool(result.pixels.isfinite().all())
    assert result.pixels.shape == (1, 3, 64, 96)


def test_reference_gamma_needs_a_picture(pipeline):
    with pytest.raises(ValueError, match="'reference', which needs at least one reference picture"):
        edit(pipeline, cns=CNSParams(gamma_source="reference"))


def test_the_seed_is_reported_and_repeats_the_picture(pipeline, photo):
    first = edit(pipeline, [photo], seed=None, cns=CNS)
    assert first.seed != edit(pipeline, [photo], seed=None).seed
    assert torch.equal(edit(pipeline, [photo], seed=first.seed, cns=CNS).pixels, first.pixels)


def test_callback_sees_every_step(pipeline):
    events = []
    edit(pipeline, callback=events.append, num_images=2)
    assert [event["i"] for event in events] == [0, 1, 2]
    assert events[0]["x"].shape == events[0]["denoised"].shape == (2, 128, 4, 6)
    assert float(events[1]["sigma"]) == pytest.approx(float(flux2_sigmas(3, 24)[1]))

    def interrupt(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(pipeline, callback=interrupt)


def test_sizes(pipeline, photo):
    assert edit(pipeline, [photo], image_size="auto", num_inference_steps=1).pixels.shape == (1, 3, 300, 451)
    assert edit(pipeline, image_size=(65, 100), num_inference_steps=1).images[0].size == (65, 100)
    wide = Image.new("RGB", (1000, 100), "red")
    assert edit(pipeline, [wide], image_size="auto", num_inference_steps=1).images[0].size == (1000, 100)
    dot = Image.new("RGB", (1, 1), "red")
    assert edit(pipeline, [dot]).images[0].size == (96, 64)
    with pytest.raises(ValueError, match="first picture is 1x1"):
        edit(pipeline, [dot], image_size="auto")


def test_saved_and_loaded_it_makes_the_same_picture(pipeline, photo, tmp_path):
    from safetensors import safe_open

    pipeline.save_pretrained(tmp_path / "klein")
    files = list((tmp_path / "klein").rglob("*.safetensors"))
    assert len(files) == 3 and sum(file.stat().st_size for file in files) < 20e6
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["klein_cns"] == "tiny"
    loaded = KleinPipeline.from_pretrained(str(tmp_path / "klein"), device="cpu")
    assert loaded.model == "klein"
    difference = edit(pipeline, [photo], cns=CNS).pixels - edit(loaded, [photo], cns=CNS).pixels
    assert float(difference.abs().max()) <= 1e-4


def test_png_carries_every_parameter(pipeline, photo, tmp_path):
    photo.save(tmp_path / "cat.png")
    result = edit(pipeline, [tmp_path / "cat.png"], cns=CNS, num_images=2, negative_prompt="dürr ☂")
    paths = result.save(tmp_path / "out" / "edit.png")
    assert [path.name for path in paths] == ["edit-1.png", "edit-2.png"]
    with Image.open(paths[1]) as image:
        parameters = json.loads(image.text["klein_cns"])
        assert np.array_equal(image, result.images[1])
    assert parameters == result.parameters
    assert CNSParams.from_endpoint(parameters) == CNS
    assert parameters["images"] == ["cat.png"] and parameters["negative_prompt"] == "dürr ☂"
    assert parameters["seed"] == 5 and parameters["image_size"] == {"width": 96, "height": 64}
    assert str(tmp_path) not in json.dumps(parameters)
    assert set(result.timings) == {"text", "references", "denoise", "decode"}
    for name in ("jpeg", "webp"):
        (path, _) = result.save(tmp_path / f"edit.{name}", name)
        with Image.open(path) as image:
            assert image.format.lower() == name
    with pytest.raises(ValueError, match="output_format is 'gif'; allowed are png, jpeg, webp"):
        result.save(tmp_path / "edit.gif", "gif")


def test_bfloat16_keeps_latents_and_timesteps_exact(photo):
    pipeline = KleinPipeline.from_pretrained("tiny", torch_dtype=torch.bfloat16, device="cpu")
    seen = []
    time_proj = pipeline.pipe.transformer.time_guidance_embed.time_proj
    hook = time_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    events = []
    result = edit(pipeline, [photo], cns=CNS, callback=events.append)
    hook.remove()
    assert result.latents.dtype == torch.float32 and events[1]["x"].dtype == torch.float32
    sigmas = torch.from_numpy(flux2_sigmas(3, 24))
    torch.testing.assert_close(torch.stack(seen[::2])[:, 0], sigmas[:-1] * 1000, rtol=1e-6, atol=0)
    # the same noise as in float32: at σ = 1 and after one step
    exact = KleinPipeline.from_pretrained("tiny", device="cpu")
    reference = []
    edit(exact, [photo], cns=CNS, callback=reference.append)
    assert torch.equal(reference[0]["x"], events[0]["x"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"guidance_scale": 20.1}, "guidance_scale is 20.1; allowed is a number from 0.0 to 20.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; allowed is a whole number from 1 to 200"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_images": 5}, "num_images is 5; allowed is a whole number from 1 to 4"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": "7"}, "seed is '7'"),
        ({"image_size": (32, 64)}, "image_size width is 32"),
        ({"scheduler": "karras"}, "scheduler is 'karras'; allowed are flux2, log_snr"),
        ({"reference_megapixels": 0}, "reference_megapixels is 0"),
        ({"negative_prompt": None}, "negative_prompt is None; it must be text"),
        ({"cns": {"s_churn": 1}}, "cns is .*give CNSParams"),
        ({"batch_index": [0, 1]}, "batch_index has 2 entries for a batch of 1"),
        ({"batch_index": [-1]}, "batch_index is -1; allowed is a whole number from 0"),
        ({"batch_index": [0.5]}, "batch_index is 0.5"),
        ({"images": None}, "images is a NoneType; give a list of pictures"),
        ({"images": [torch.zeros(3, 64, 64)]}, "a picture is a Tensor; give a file's path"),
        ({"images": [Image.new("RGB", (0, 64))]}, "is 0x64, without any pixel"),
        ({"images": [Image.new("RGB", (64, 64))] * 5}, "5 pictures were given; at most 4"),
    ],
)
def test_wrong_values_are_named(pipeline, change, says):
    with pytest.raises(ValueError, match=says):
        edit(pipeline, **change)


def test_a_prompt_that_is_none(pipeline):
    with pytest.raises(ValueError, match="prompt is 3; it must be text"):
        pipeline(3)


def edit_config(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_models_that_are_missing_or_do_not_fit(pipeline, tmp_path):
    with pytest.raises(ValueError, match="model 'nowhere' does not exist; give a diffusers folder, a Hub id"):
        KleinPipeline.from_pretrained("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no readable model_index.json"):
        KleinPipeline.from_pretrained(str(tmp_path / "empty"))
    folder = tmp_path / "klein"
    pipeline.save_pretrained(folder)
    edit_config(folder, "text_encoder", hidden_size=40)
    with pytest.raises(ValueError, match="text encoder has width 40, .* one of width 32"):
        KleinPipeline.from_pretrained(str(folder))
    edit_config(folder, "text_encoder", hidden_size=2560)
    edit_config(folder, "transformer", num_attention_heads=32, joint_attention_dim=12288)
    with pytest.raises(ValueError, match=r"width 2560, but FLUX.2 \[klein\] 9B was .* Qwen3-8B \(width 4096\)"):
        KleinPipeline.from_pretrained(str(folder))
    edit_config(folder, "transformer", num_attention_heads=48, joint_attention_dim=15360)
    with pytest.raises(ValueError, match=r"FLUX.2 \[dev\]"):
        KleinPipeline.from_pretrained(str(folder))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "FluxPipeline"))
    with pytest.raises(ValueError, match="FluxPipeline folder, not a Flux2KleinPipeline"):
        KleinPipeline.from_pretrained(str(folder))
    with pytest.raises(ValueError, match="cpu_offload needs an accelerator"):
        KleinPipeline.from_pretrained("tiny", device="cpu", cpu_offload=True)


def test_a_distilled_klein_is_said_to_be_one(tmp_path):
    tiny().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    with pytest.warns(UserWarning, match="distilled klein, made for 4 steps"):
        KleinPipeline.from_pretrained(str(tmp_path), device="cpu")


def test_a_result_that_is_not_finite_is_an_error_and_no_black_picture():
    pipeline = KleinPipeline.from_pretrained("tiny", device="cpu")
    pipeline.pipe.transformer.proj_out.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="result holds NaN or infinite values; lower the scale of the LoRAs"):
        edit(pipeline)


def test_gamma_source_and_matrix_must_agree(pipeline, photo):
    for source, says in (("reference", "'reference', yet a progress matrix"), ("approximation", "takes gamma = t")):
        with pytest.raises(ValueError, match=says):
            edit(pipeline, [photo], cns=CNSParams(gamma_source=source), progress=shipped_progress())


def test_a_device_that_is_not_there_and_weights_that_are_cut(tmp_path):
    with pytest.raises(ValueError, match="device 'toaster' cannot be used"):
        KleinPipeline.from_pretrained("tiny", device="toaster")
    tiny().save_pretrained(tmp_path)
    for part in ("text_encoder", "transformer"):
        (weights,) = (tmp_path / part).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match="cannot be loaded .*download its folder again"):
            KleinPipeline.from_pretrained(str(tmp_path), device="cpu")


@pytest.mark.parametrize("there", ["cuda", "xpu", "mps", None])
def test_the_accelerator_of_any_maker_is_chosen(monkeypatch, there):
    for name, backend in (("cuda", torch.cuda), ("xpu", torch.xpu), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda name=name: name == there)
    assert default_device().type == (there or "cpu")


def test_a_device_that_fails_without_a_word(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ValueError, match=r"device 'cuda' cannot be used \(RuntimeError\); leave it out"):
        KleinPipeline.from_pretrained("tiny", device="cuda")


NAMES = ["cat.png", "caf\udce9.png", "猫 ☂.png", "a\nb.png"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_file_name_reaches_the_pngs_parameters(pipeline, photo, tmp_path, name):
    """Also one that is not UTF-8, which Python holds as half characters."""
    photo.save(tmp_path / name, "PNG")
    result = edit(pipeline, [tmp_path / name], num_inference_steps=1)
    (path,) = result.save(tmp_path / f"out {name}")
    with Image.open(path) as image:
        assert json.loads(image.text["klein_cns"]) == result.parameters
    assert result.parameters["images"] == [name]


def test_half_of_a_character_in_a_prompt_is_refused(pipeline):
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(ValueError, match=f"{name} holds half of a character"):
            KleinRequest(**{"prompt": "x", name: "caf\udce9"})


def test_saving_the_tiny_klein_leaves_other_files_alone(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "mine.safetensors", metadata={"author": "me"})
    tiny().save_pretrained(tmp_path)
    with safe_open(tmp_path / "mine.safetensors", "pt") as opened:
        assert opened.metadata() == {"author": "me"}


class MeanVAE(torch.nn.Module):
    """A stand-in VAE without learned parts: 8x8 means in, nearest out."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(batch_norm_eps=0.0, block_out_channels=(1,) * 4)
        self.bn = SimpleNamespace(running_mean=torch.zeros(128), running_var=torch.ones(128))
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def encode(self, pixels):
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        latents = torch.cat([mean, torch.zeros(1, 29, *mean.shape[-2:])], dim=1)
        return SimpleNamespace(latents=latents)

    def decode(self, latents, return_dict):
        return (torch.nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="nearest"),)


class CopyTransformer(torch.nn.Module):
    """A stand-in transformer that predicts the first reference as x0."""

    def __init__(self, original):
        super().__init__()
        self.config, self.dtype, self.cache_context = original.config, torch.float32, original.cache_context
        self.time_guidance_embed, self.device = original.time_guidance_embed, original.device

    def forward(self, hidden_states, timestep, **_):
        target, reference = hidden_states.chunk(2, dim=1)
        return (torch.cat([(target - reference) / timestep.view(-1, 1, 1), reference], dim=1),)


@pytest.mark.parametrize("cns", [CNSParams(enable_cns=False), CNS])
def test_nothing_shifts_and_the_borders_survive(photo, cns):
    from skimage.registration import phase_cross_correlation

    framed = np.array(photo)
    framed[:, -3:], framed[-4:, :] = (255, 0, 0), (0, 0, 255)  # the blocks of 8 that the padding completes
    pipe = tiny()
    pipe.register_modules(vae=MeanVAE(), transformer=CopyTransformer(pipe.transformer))
    result = KleinPipeline(pipe)("copy", [Image.fromarray(framed)], num_inference_steps=4, seed=1, cns=cns)
    made = np.asarray(result.images[0], dtype=float)
    assert made.shape == (300, 451, 3)
    shift, _, _ = phase_cross_correlation(framed.mean(-1), made.mean(-1))
    assert tuple(shift) == (0.0, 0.0)
    assert np.abs(made[:-4, -1] - (255, 0, 0)).max() <= 1
    assert np.abs(made[-1, :-3] - (0, 0, 255)).max() <= 1
    blocks = to_pixels(Image.fromarray(framed))[0, :, :296, :448].unflatten(2, (56, 8)).unflatten(1, (37, 8))
    expected = blocks.mean((2, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0).numpy() * 255
    assert np.abs(made[:296, :448] - expected).max() <= 1
