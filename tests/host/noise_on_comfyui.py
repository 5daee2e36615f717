"""Run by ComfyUI's own Python, in one process: its samplers with CNS Noise, on models without weights.

    python noise_on_comfyui.py PACK SEED

The models are ComfyUI's own classes (schedule, parametrisation, latent format) around a network that is not asked:
every prediction is x0 = 0.3·x, so that a run is linear in its noise. Prints one line of JSON, see `main`.
"""

import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

pack, seed = sys.argv[1], int(sys.argv[2])
sys.argv = ["x", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.nested_tensor  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

torch.set_grad_enabled(False)
torch.set_num_threads(1)


def import_pack():
    spec = importlib.util.spec_from_file_location(
        "klein_pack", str(Path(pack) / "__init__.py"), submodule_search_locations=[pack]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["klein_pack"] = module
    spec.loader.exec_module(module)


import_pack()
import klein_pack.nodes.cns_noise as node  # noqa: E402

WHITE = {
    "cns_gamma_source": "approximation", "cns_alpha_tilt_start": 0.0, "cns_alpha_tilt_end": 0.0,
    "cns_energy_scale": 1.0,
}  # fmt: skip
SHAPES = {"flux2": (1, 128, 8, 12), "sd15": (1, 4, 64, 48), "wan": (1, 16, 3, 16, 24)}
KINDS = {
    "flux2": (comfy.supported_models.Flux2, comfy.model_base.ModelType.FLUX),
    "sd15": (comfy.supported_models.SD15, comfy.model_base.ModelType.EPS),
    "wan": (comfy.supported_models.WAN21_T2V, comfy.model_base.ModelType.FLOW),
}
SAID, DRAWN = [], []


class Network(torch.nn.Module):
    """Answers with zeros; what it would predict is put in place of it afterwards."""

    def __init__(self, **_):
        super().__init__()
        self.dtype = torch.float32

    def forward(self, x, *_, **__):
        return torch.zeros_like(x)


class Recorded(node.ColoredNoiseSampler):
    """Keeps what it gave: (sigma, sigma_next, noise)."""

    def __call__(self, sigma, sigma_next):
        noise = super().__call__(sigma, sigma_next)
        DRAWN.append((float(sigma), float(sigma_next), noise))
        return noise


node.ColoredNoiseSampler = Recorded
node.say = lambda unique_id, lines: SAID.extend(lines)


def model(kind):
    config, parametrisation = KINDS[kind]
    config = config({"hidden_size": 128, "dim": 128, "image_model": "none"})
    config.set_inference_dtype(torch.float32, None)
    made = comfy.model_base.BaseModel(config, parametrisation, unet_model=Network)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(made, load_device=cpu, offload_device=cpu)
    patcher.set_model_sampler_post_cfg_function(lambda args: 0.3 * args["input"])
    return patcher


def with_noise(patcher, cns_seed=-1, **values):
    class Hidden(node.CNSNoise):
        class hidden:
            unique_id = "1"

    values = {"enable_cns": True, "cns_gamma_file": "sit_xl2_unguided", **values}
    return Hidden.execute(patcher, cns_seed=cns_seed, **values).result[0]


def run(patcher, shape, sampler, sigmas, seed=seed, latent=None, mask=None, positive=()):
    """The final latent from noise that does not depend on the batch, and what was drawn and said."""
    SAID.clear()
    DRAWN.clear()
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    noise = torch.cat(
        [torch.randn((1, *shape[1:]), generator=torch.Generator().manual_seed(i)) for i in range(shape[0])]
    )
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[torch.zeros(1, 4, 8), {"pooled_output": torch.zeros(1, 8), **dict(positive)}]], [])
    guider.set_cfg(1.0)
    latent = torch.zeros(shape) if latent is None else latent
    return guider.sample(noise, latent, sampler, sigmas, mask, seed=seed, disable_pbar=True)


def schedule(patcher, steps=6):
    """Sigmas that end above 0, so that the noise is still there."""
    sampling = patcher.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)[:-1]


def refusal(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def every_sampler(kind):
    """Of each of ComfyUI's samplers: variance and mean square step to step, its own noise and white noise of ours."""
    found, plain = {}, model(kind)
    white, sigmas = with_noise(plain, **WHITE), schedule(plain)
    batch = 6 if kind == "flux2" else 4
    shape = (batch, *SHAPES[kind][1:])
    for name in comfy.samplers.SAMPLER_NAMES:
        sampler = comfy.samplers.sampler_object(name)
        if name == "dpm_adaptive":
            sampler.extra_options = {"eta": 1.0}
        own = run(plain, shape, sampler, sigmas)
        result = refusal(lambda: SAID.append(run(white, shape, sampler, sigmas)))  # noqa: B023
        if result:
            found[name] = {"error": result}
            continue
        ours = SAID.pop()
        said = [line for line in SAID if isinstance(line, str)]
        found[name] = {
            "draws": len(DRAWN), "said": said, "values": own.numel(), "own": float(own.double().var()),
            "ours": float(ours.double().var()), "equal": torch.equal(own, ours),
        }  # fmt: skip
    return found


def ring_power(kind, sampler, runs, **values):
    """Mean power in each of 16 rings of the true grid, at each sigma that the sampler drew at."""
    colored, sums = with_noise(model(kind), cns_num_freq_bins=16, **values), {}
    patches = 2 if kind == "flux2" else 1
    for i in range(runs):
        run(colored, SHAPES[kind], sampler, schedule(colored), seed=seed + i)
        for start, _, noise in DRAWN:
            planes = noise.double()
            if patches == 2:
                batch, _, height, width = planes.shape
                planes = planes.reshape(batch, 32, 2, 2, height, width)
                planes = torch.stack(
                    [torch.stack([planes[:, :, i, j] for j in (0, 1)], -1).flatten(-2) for i in (0, 1)], -2
                ).flatten(-3, -2)
            power = torch.fft.fft2(planes, norm="ortho").abs().square().flatten(0, -3)
            sums.setdefault(start, []).append(power.mean(0))
    size = next(iter(sums.values()))[0].shape
    y, x = torch.meshgrid(*(torch.fft.fftfreq(side) for side in size), indexing="ij")
    radius = (x**2 + y**2).sqrt()
    ring = (radius / radius.max() * 15).long()
    count = torch.bincount(ring.flatten(), minlength=16)
    planes = 1
    for side in SHAPES[kind][1:-2]:
        planes *= side
    if patches == 2:
        planes //= 4
    return {
        "size": list(size), "planes": planes * runs, "modes": count.tolist(), "schedule": schedule(colored).tolist(),
        "power": {
            start: [float(torch.stack(parts).mean(0)[ring == k].mean()) if count[k] else None for k in range(16)]
            for start, parts in sums.items()
        },
    }  # fmt: skip


def shared(name, options, runs):
    """Pairs of draws from one start: mean product and expected correlation, for each pair of interval lengths."""
    patcher = with_noise(model("sd15"), **WHITE)
    found = []
    for i in range(runs):
        sampler = comfy.samplers.ksampler(name, options)
        run(patcher, SHAPES["sd15"], sampler, schedule(patcher), seed=seed + i)
        for (start, end, first), (again, other, second) in pairwise(list(DRAWN)):
            if start == again:
                lengths = sorted((abs(start - end), abs(start - other)))
                found.append([float((first * second).double().mean()), (lengths[0] / lengths[1]) ** 0.5])
    return {"pairs": found, "values": first.numel()}


def main():
    flux = model("flux2")
    colored, sigmas, shape = with_noise(flux), schedule(flux), SHAPES["flux2"]
    pair = (2, *shape[1:])
    one = run(colored, shape, "er_sde", sigmas)
    two = run(colored, pair, "er_sde", sigmas)
    off = with_noise(flux, enable_cns=False)
    latent, mask = torch.randn(shape), torch.zeros(1, 1, *shape[2:])
    mask[..., 2:6] = 1
    to_zero = torch.cat([sigmas, torch.zeros(1)])
    masked = run(colored, shape, "er_sde", to_zero, latent=latent, mask=mask)

    def given(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        return x

    class Loop(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            return noise

    other = comfy.samplers.KSAMPLER(given, {"noise_sampler": lambda *_: 0})
    packed = comfy.nested_tensor.NestedTensor([torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 16)])
    ancestral = comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0})
    silent = [torch.equal(run(colored, shape, ancestral, sigmas), run(flux, shape, ancestral, sigmas)), None]
    run(colored, shape, ancestral, sigmas)
    silent[1] = list(SAID)
    references = [("reference_latents", [torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(3))])]
    of_reference = with_noise(flux, cns_gamma_source="reference")
    answer = {
        "samplers": {kind: every_sampler(kind) for kind in ("flux2", "sd15")},
        "rings": {
            "flux2": ring_power("flux2", "er_sde", 60), "sd15": ring_power("sd15", "euler_ancestral", 40),
            "wan": ring_power("wan", "er_sde", 30), "dpmpp_sde": ring_power("sd15", "dpmpp_sde", 40),
        },
        "shared": {r: shared("dpmpp_sde", {"r": r}, 3) for r in (0.5, 0.3, 1.0, 1.5)},
        "batch": torch.equal(one[0], two[0]) and not torch.equal(two[0] - one[0], two[1] - one[0]),
        "again": torch.equal(one, run(colored, shape, "er_sde", sigmas)),
        "other_seed": torch.equal(one, run(colored, shape, "er_sde", sigmas, seed=seed + 1)),
        "own_seed": torch.equal(one, run(with_noise(flux, cns_seed=seed), shape, "er_sde", sigmas, seed=0)),
        "off": off is flux,
        "untouched": torch.equal(run(flux, shape, "er_sde", sigmas), run(model("flux2"), shape, "er_sde", sigmas)),
        "kept": torch.allclose(masked[..., [0, 1, 6, 7]], latent[..., [0, 1, 6, 7]], atol=1e-5),
        "reference": not torch.equal(
            run(of_reference, shape, "er_sde", sigmas, positive=references), run(colored, shape, "er_sde", sigmas)
        ),
        "silent": silent,
        "refused": {
            "given": refusal(lambda: run(colored, shape, other, sigmas)),
            "loop": refusal(lambda: run(colored, shape, Loop(), sigmas)),
            "packed": refusal(lambda: run_packed(with_noise(model("sd15")), packed)),
            "twice": refusal(lambda: with_noise(colored)),
            "reference": refusal(lambda: run(of_reference, shape, "er_sde", sigmas)),
        },
    }  # fmt: skip
    print(json.dumps(answer))


def run_packed(patcher, packed):
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds([[torch.zeros(1, 4, 8), {}]], [])
    sampler = comfy.samplers.sampler_object("euler_ancestral")
    return guider.sample(packed, packed, sampler, schedule(patcher), seed=seed, disable_pbar=True)


main()
