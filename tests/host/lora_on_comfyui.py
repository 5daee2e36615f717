"""Run by ComfyUI's own Python, in one process: LoRAs on its MODEL, as effective weights and outputs.

    python lora_on_comfyui.py PACK CASES.json

CASES.json: ``weights`` (a BFL state dict), ``quantise`` (none, fp8 storage, or a format of ComfyUI), ``inputs``,
``compile`` (whether the output is taken through torch.compile too), and ``cases``: each a list of steps on a fresh
MODEL, either ``{"klein": [[file, strength], ...], "apply": mode}`` or ``{"comfyui": file, "strength": s, "bypass":
bool}``, and where to write what came out: every weight as it acts under BFL's name, ``output``, the model's, and in the
metadata how the updates of each LoRA were applied. ``held``, where given, are four files: printed is which of them are
in memory while a MODEL has the first and others were loaded since, without that MODEL, and without any. ``new_form``,
where given, is a file like lora_new_form.py, whose form is added first; printed is what is said until it has a patch.
"""

import gc
import importlib.util
import json
import sys
import weakref
from pathlib import Path

pack, cases = sys.argv[1:]
sys.argv = ["x", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS, get_layout_class  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the weights are tiny


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


def quantised(state, form):
    """The blocks' weights in a format of ComfyUI, as its own files hold them."""
    layout = get_layout_class(QUANT_ALGOS[form]["comfy_tensor_layout"])
    found = {}
    for name, weight in state.items():
        if weight.ndim != 2 or "_blocks." not in name:
            found[name] = weight
            continue
        packed, params = layout.quantize(weight) if form == "nvfp4" else layout.quantize(weight, scale="recalculate")
        found |= {name: packed, f"{name}_scale": getattr(params, "block_scale", params.scale)}
        if form == "nvfp4":
            found[f"{name}_scale_2"] = params.scale
        mark = json.dumps({"format": form}).encode()
        found[name.replace(".weight", ".comfy_quant")] = torch.tensor(list(mark), dtype=torch.uint8)
    return found


def load_model(state, form):
    if form in ("", "storage"):
        dtype = torch.float8_e4m3fn if form else torch.float32
        return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": dtype})
    return comfy.sd.load_diffusion_model_state_dict(quantised(state, form))


def step(model, given):
    if "comfyui" in given:
        lora = comfy.utils.load_torch_file(given["comfyui"], safe_load=True)
        load = comfy.sd.load_bypass_lora_for_models if given.get("bypass") else comfy.sd.load_lora_for_models
        return load(model, None, lora, given["strength"], 0)[0], []
    target = architecture_of(model)
    stack = [(load_lora(file, target).updates, strength) for file, strength in given["klein"]]
    return apply_updates(model, stack, given["apply"])


def measure(model, inputs, names, compiled=None):
    """Effective weights by unit vectors, so that merged and bypassed count alike; and the model's output, plain and
    through ``compiled``."""
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    found = {}
    for name in names:
        module = comfy.utils.get_attr(model.model, "diffusion_model." + name.removesuffix(".weight"))
        columns = module.weight.shape[1]
        found[name] = module(torch.eye(columns)).T.float().contiguous()
    for name, run in (("output", model.model.diffusion_model), ("compiled", compiled)):
        if run is not None:
            output = run(inputs["x"], timestep=inputs["sigma"], context=inputs["context"])
            found[name] = output.float().contiguous()
    return found


def held(state, files):
    from klein_pack.nodes.lora_stack import APPLIED, with_loras

    def put(model, file):
        return with_loras(model, [(file, 1.0, 1.0)], [file], "auto")[0]

    model = load_model(state, "")
    first = put(model, files[0])
    loras = [weakref.ref(first.get_attachment(APPLIED)[0][1])]
    loras += [weakref.ref(put(model, file).get_attachment(APPLIED)[0][1]) for file in files[1:]]
    found = []
    for variable in ("", "first", "model"):
        if variable == "first":
            del first
        if variable == "model":
            del model
        gc.collect()
        found.append([lora() is not None for lora in loras])
    print(json.dumps(found))


def add_form(model, given):
    from klein_pack.lora import forms
    from klein_pack.nodes.lora_patches import PATCHES

    spec = importlib.util.spec_from_file_location("new_form", given["new_form"])
    new = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(new)
    form = new.new_form(forms)
    forms.FORMS = (*forms.FORMS, form)
    try:
        step(model, given["cases"][0]["steps"][0])
    except ValueError as error:
        print(json.dumps(str(error)))
    PATCHES[form] = new.as_patch


def main():
    given = json.loads(Path(cases).read_text())
    state, inputs = load_file(given["weights"]), load_file(given["inputs"])
    if given["held"]:
        return held(state, given["held"])
    model = load_model(state, given["quantise"])
    if given["new_form"]:
        add_form(model, given)
    names = [name for name, tensor in state.items() if tensor.ndim == 2]
    compiled = torch.compile(model.model.diffusion_model, backend="eager") if given["compile"] else None
    save_file(measure(model, inputs, names, compiled), given["plain"])
    for case in given["cases"]:
        changed = model
        how = []
        for one in case["steps"]:
            changed, counts = step(changed, one)
            how += counts
        save_file(measure(changed, inputs, names, compiled), case["result"], metadata={"how": json.dumps(how)})
    save_file(measure(model, inputs, names, compiled), given["after"])


main()
