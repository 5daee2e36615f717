"""LoRAs on ComfyUI: cost of loading three of the 9B's size, and what merging does to a quantised model.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python benchmarks/lora.py [--repeats N]

Loading: three rank-32 LoRAs of every linear in the 9B's blocks, bfloat16, are read, converted and attached to a MODEL
of the 9B's shape (on the meta device), then every factor is read once, as patching a weight does. ComfyUI's own
loader maps files and reads them only then; ours has copied them into memory and looked through them for NaN before.
Each run is a process of its own, in turns, one thread; times are medians of the processor's (files are in the page
cache, so that nothing waits, and what else runs on the machine does not count), memory is the growth of the resident
set.

Quantised: a tiny klein with its blocks in scaled fp8; the relative error of a LoRA's effect on the weights, and on
the model's output against the same LoRA on the dequantised weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from on_comfyui import answer, import_pack, worker

RANK = 32
COUNT = 3
FILES = {"BFL names, kohya": "lora_unet_", "diffusers names, peft": "transformer."}
STRENGTHS = (0.02, 1.0)


def write_files(folder: Path) -> None:
    """Three LoRAs in each format."""
    import torch
    from klein_cns.weights.architecture import KLEIN_9B
    from klein_cns.weights.layout import rows
    from safetensors.torch import save_file

    shapes = KLEIN_9B.shapes()
    table = [row for row in rows(KLEIN_9B.double_blocks, KLEIN_9B.single_blocks) if "_blocks." in row.bfl]
    generator = torch.Generator().manual_seed(0)
    for i in range(COUNT):
        kohya, peft = {}, {}
        for row in (row for row in table if len(shapes[row.bfl]) == 2):
            out, into = shapes[row.bfl]
            down = torch.randn(RANK, into, generator=generator).bfloat16()
            up = torch.randn(out, RANK, generator=generator).bfloat16()
            name = f"lora_unet_{row.bfl.removesuffix('.weight').replace('.', '_')}"
            kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            kohya[f"{name}.alpha"] = torch.tensor(RANK / 2)
            for part, rows_of_up in zip(row.diffusers, up.chunk(len(row.diffusers)), strict=True):
                name = f"transformer.{part.removesuffix('.weight')}"
                peft |= {f"{name}.lora_A.weight": down.clone(), f"{name}.lora_B.weight": rows_of_up.clone()}
        save_file(kohya, folder / f"lora_unet_{i}.safetensors")
        save_file(peft, folder / f"transformer.{i}.safetensors")


# What follows runs in ComfyUI's Python.


def load(who: str, prefix: str, folder: str) -> dict[str, float]:
    """Processor seconds and megabytes until the three are attached, and until every factor was read."""
    import gc
    import resource
    import time

    import_pack("--cpu")
    import comfy.model_detection
    import comfy.model_patcher
    import comfy.sd
    import comfy.utils
    import torch
    from klein_pack.lora import load_lora
    from klein_pack.nodes.lora_patches import apply_updates, architecture_of
    from klein_pack.weights.architecture import KLEIN_9B

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    state = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in KLEIN_9B.shapes().items()}
    config = comfy.model_detection.model_config_from_unet(state, "")
    config.set_inference_dtype(torch.bfloat16, None)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(config.get_model(state, "", device="meta"), cpu, cpu)
    files = [f"{folder}/{prefix}{i}.safetensors" for i in range(COUNT)]

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    gc.collect()
    before, start = resident(), time.process_time()
    if who == "klein":
        target = architecture_of(model)
        model, _ = apply_updates(model, [(load_lora(file, target).updates, 1.0) for file in files], "auto")
    else:
        for file in files:
            tensors, metadata = comfy.utils.load_torch_file(file, safe_load=True, return_metadata=True)
            model, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0, lora_metadata=metadata)
    attached, attached_mb = time.process_time() - start, resident() - before
    for patches in model.patches.values():
        for patch in patches:
            for factor in (factor for factor in patch[1].weights if isinstance(factor, torch.Tensor)):
                factor.view(torch.int16).sum()
    return {"attached": attached, "attached_mb": attached_mb, "read": time.process_time() - start,
            "read_mb": resident() - before}  # fmt: skip


def quantised(folder: str) -> list[dict[str, float | str]]:
    """The error of a LoRA's effect on a scaled-fp8 tiny klein, for each strength, merged and bypassed."""
    import_pack("--cpu")
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from klein_pack.lora import LowRank, Update
    from klein_pack.nodes.lora_patches import apply_updates
    from klein_pack.weights.architecture import TINY

    torch.set_grad_enabled(False)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def run(model):
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        acts = {}
        for name in deltas:
            module = comfy.utils.get_attr(model.model, "diffusion_model." + name.removesuffix(".weight"))
            acts[name] = module(torch.eye(module.weight.shape[1])).T
        return acts, model.model.diffusion_model(*inputs)

    inputs = (draw(1, 128, 8, 8), torch.tensor([0.7]), draw(1, 16, TINY.context))
    state, plain, updates, deltas = {}, {}, [], {}
    for name, shape in TINY.shapes().items():
        weight = draw(*shape) * shape[-1] ** -0.5 if len(shape) == 2 else torch.ones(shape)
        state[name] = plain[name] = weight
        if len(shape) == 2 and "_blocks." in name:
            scale = weight.abs().max() / 448
            state |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
            plain[name] = state[name].float() * scale
            mark = list(json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode())
            state[name.replace(".weight", ".comfy_quant")] = torch.tensor(mark, dtype=torch.uint8)
            form = LowRank(draw(shape[0], 4), 0.1 * weight.std() / 2 * draw(4, shape[1]), 1.0)  # a tenth of the weight
            updates.append(Update(name, None, form))
            deltas[name] = form.delta()
    model = comfy.sd.load_diffusion_model_state_dict(state)
    reference = comfy.sd.load_diffusion_model_state_dict(plain, model_options={"dtype": torch.float32})
    base, base_output = run(model)
    rows = []
    for strength in STRENGTHS:
        truth = run(apply_updates(reference, [(updates, strength)], "merge")[0])[1] - run(reference)[1]
        for apply in ("merge", "bypass"):
            acts, output = run(apply_updates(model, [(updates, strength)], apply)[0])
            wrong = sum(float((acts[n] - base[n] - strength * deltas[n]).norm() ** 2) for n in deltas) ** 0.5
            whole = sum(float((strength * deltas[n]).norm() ** 2) for n in deltas) ** 0.5
            rows.append({"strength": strength, "apply": apply, "weights": wrong / whole,
                         "output": float((output - base_output - truth).norm() / truth.norm())})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return answer({"load": load, "quantised": quantised}, *args.worker)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        runs = [("klein", prefix, words) for words, prefix in FILES.items()] + [("comfyui", "lora_unet_", "its own")]
        found = {run: [] for run in runs}
        for _ in range(args.repeats):
            for run in runs:
                found[run].append(worker(__file__, "load", *run[:2], folder))
        print("| loader | format | attached, s | MB | every factor read, s | MB |\n|---|---|---|---|---|---|")
        for (who, _, words), results in found.items():
            median = {name: statistics.median(result[name] for result in results) for name in results[0]}
            cells = (f"{median[name]:.{0 if 'mb' in name else 3}f}" for name in median)
            print(f"| {who} | {words} | {' | '.join(cells)} |")
        print("\n| strength | apply | error of the weights' change | of the output's change |\n|---|---|---|---|")
        for row in worker(__file__, "quantised", folder):
            print(f"| {row['strength']} | {row['apply']} | {row['weights']:.1e} | {row['output']:.1e} |")


if __name__ == "__main__":
    main()
