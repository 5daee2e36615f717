"""Run by ComfyUI's Python: files of weights in the quantised formats that ComfyUI knows, and dequantised again.

    python quantise.py <ComfyUI> <source> [<source> ...]

Beside each source it writes ``<format>.safetensors`` and ``<format> exact.safetensors`` for every format.
"""

import json
import sys
from pathlib import Path

folder, *sources = sys.argv[1:]
sys.path.insert(0, folder)
sys.argv = ["quantise", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

FORMATS = ("fp8", "scaled fp8", "fp8 mixed", "nvfp4")
BLOCKS = ("double_blocks.", "single_blocks.", "model.layers.")  # what published files quantise


def quantise(state, form):
    """(tensors as the file has them, the same dequantised, its extra metadata)."""
    written, plain, layers = dict(state), dict(state), {}
    for name, weight in state.items():
        if weight.ndim != 2 or not name.startswith(BLOCKS):
            continue
        if form == "fp8":
            written[name] = weight.to(torch.float8_e4m3fn)
            plain[name] = written[name].float()
            continue
        base, algorithm = name.removesuffix(".weight"), "nvfp4" if form == "nvfp4" else "float8_e4m3fn"
        options = {} if form == "nvfp4" else {"scale": "recalculate"}
        quantised = QuantizedTensor.from_float(weight, QUANT_ALGOS[algorithm]["comfy_tensor_layout"], **options)
        plain[name], parts = quantised.dequantize(), quantised.state_dict(name)
        if form == "scaled fp8":  # as files had it before they had metadata
            parts[f"{base}.scale_weight"] = parts.pop(f"{name}_scale").reshape(1)
            written["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        else:
            exact = {"full_precision_matrix_mult": True} if form == "fp8 mixed" else {}
            layers[base] = {"format": algorithm, **exact}
        written |= parts
    described = json.dumps({"format_version": "1.0", "layers": layers})
    return written, plain, {"_quantization_metadata": described} if layers else {}


for source in map(Path, sources):
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    for form in FORMATS:
        written, plain, extra = quantise(load_file(source), form)
        for name, tensors, more in ((form, written, extra), (f"{form} exact", plain, {})):
            target = source.with_name(f"{name}.safetensors")
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target, metadata=metadata | more)
