"""Run by ComfyUI's own Python, in one process: LoRAs on its MODEL, as effective weights and outputs.

    python lora_on_comfyui.py PACK CASES.json

CASES.json: ``weights`` (a BFL state dict), ``inputs``, and ``cases``: each a list of steps on a fresh MODEL, either
``{"klein": [[file, strength], ...], "apply": mode}`` or ``{"comfyui": file, "strength": s, "bypass": bool}``, and where
to write what came out: every weight's effective change under BFL's name, and ``output``, the model's.
"""

import importlib.util
import json
import sys
from pathlib import Path

pack, cases = sys.argv[1:]
sys.argv = ["x", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_grad_enabled(False)


def import_pack():
    spec = importlib.util.spec_from_file_location(
        "klein_pack", str(Path(pack) / "__init__.py"), submodule_search_locations=[pack]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["klein_pack"] = module
    spec.loader.exec_module(module)


import_pack()
from klein_pack.lora import load_lora  # noqa: E402
from klein_pack.nodes.lora_patches import apply_updates, architecture_of  # noqa: E402


def step(model, given):
    if "comfyui" in given:
        lora = comfy.utils.load_torch_file(given["comfyui"], safe_load=True)
        load = comfy.sd.load_bypass_lora_for_models if given.get("bypass") else comfy.sd.load_lora_for_models
        return load(model, None, lora, given["strength"], 0)[0]
    target = architecture_of(model)
    stack = [(load_lora(file, target).updates, strength) for file, strength in given["klein"]]
    return apply_updates(model, stack, given["apply"])[0]


def measure(model, inputs, names):
    """Effective weights by unit vectors, so that merged and bypassed count alike; and the model's output."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    found = {}
    for name in names:
        module = comfy.utils.get_attr(model.model, "diffusion_model." + name.removesuffix(".weight"))
        columns = module.weight.shape[1]
        found[name] = module(torch.eye(columns)).T.float().contiguous()
    found["output"] = model.model.diffusion_model(
        inputs["x"], timestep=inputs["sigma"], context=inputs["context"]
    ).float().contiguous()
    return found


def main():
    given = json.loads(Path(cases).read_text())
    state, inputs = load_file(given["weights"]), load_file(given["inputs"])
    options = {"dtype": torch.float32} if given.get("fp32", True) else {}
    model = comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options)
    names = [name for name, tensor in state.items() if tensor.ndim == 2]
    save_file(measure(model, inputs, names), given["plain"])
    for case in given["cases"]:
        changed = model
        for one in case["steps"]:
            changed = step(changed, one)
        save_file(measure(changed, inputs, names), case["result"])
    save_file(measure(model, inputs, names), given["after"])


main()
