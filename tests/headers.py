"""Headers of real models, from the model classes of diffusers and transformers built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from klein_cns.klein.convert import diffusers_to_bfl
from klein_cns.weights.files import Header
from klein_cns.weights.header import StoredTensor

ADVICE = {  # what is needed, its usual name, where it is published, the folder
    "transformer": (
        "FLUX.2 [klein] 9B Base",
        "flux-2-klein-base-9b-fp8.safetensors",
        "huggingface.co/black-forest-labs/FLUX.2-klein-base-9b-fp8",
        "models/diffusion_models",
    ),
    "text_encoder": (
        "Qwen3-8B",
        "qwen_3_8b_fp8mixed.safetensors",
        "huggingface.co/Comfy-Org/flux2-klein-9B",
        "models/text_encoders",
    ),
    "vae": ("FLUX.2's VAE", "flux2-vae.safetensors", "huggingface.co/Comfy-Org/flux2-dev", "models/vae"),
}
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I64": 8}
WRONG = [  # what the check is for, what it meets, what it says
    ("transformer", "4B", "a transformer (FLUX.2 [klein] 4B)"),
    ("transformer", "4B diffusers", "a transformer (FLUX.2 [klein] 4B)"),
    ("transformer", "dev", "a transformer (FLUX.2 [dev])"),
    ("transformer", "FLUX.1", "a transformer (FLUX.1)"),
    ("transformer", "FLUX.1 diffusers", "a transformer (FLUX.1)"),
    ("transformer", "SDXL", "a transformer (another diffusion model)"),
    ("transformer", "LoRA", "a LoRA"),
    ("transformer", "kohya LoRA", "a LoRA"),
    ("transformer", "LoKr", "a LoRA"),
    ("transformer", "Qwen3-8B", "a text encoder (Qwen3-8B)"),
    ("transformer", "FLUX.2's VAE", "a VAE (FLUX.2 VAE)"),
    ("transformer", "bitsandbytes", "a file of unknown kind (weights packed by bitsandbytes)"),
    ("transformer", "numbers", "a file of unknown kind"),
    ("text_encoder", "Qwen3-4B", "a text encoder (Qwen3-4B)"),
    ("text_encoder", "Mistral", "a text encoder (Mistral-Small-3.2-24B)"),
    ("text_encoder", "T5", "a text encoder (T5)"),
    ("text_encoder", "9B", "a transformer (FLUX.2 [klein] 9B)"),
    ("text_encoder", "LoRA", "a LoRA"),
    ("vae", "FLUX.1's VAE", "a VAE (another VAE, of 16 latent channels)"),
    ("vae", "TAESD", "a VAE (another VAE, or a part of one)"),
    ("vae", "9B", "a transformer (FLUX.2 [klein] 9B)"),
    ("vae", "LoRA", "a LoRA"),
]


def described(state, dtype="BF16"):
    return {name: (dtype, list(tensor.shape)) for name, tensor in state.items()}


def flux_2(doubles, singles, heads, context, guidance=False):
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel(
            num_layers=doubles,
            num_single_layers=singles,
            num_attention_heads=heads,
            joint_attention_dim=context,
            guidance_embeds=guidance,
        ).state_dict()


def flux_1():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).state_dict()


def qwen3(width, layers, heads=32, kv_heads=8, intermediate=12288):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config).state_dict()


def vae(flux2=True):
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    with torch.device("meta"):
        return (AutoencoderKLFlux2() if flux2 else AutoencoderKL(latent_channels=16)).state_dict()


def real_models():
    """Tensors of real models as (dtype, shape), by name of the model."""
    nine = flux_2(8, 24, 32, 12288)
    q, style = torch.empty(8, 8, device="meta"), "diffusion_model.double_blocks.0.img_attn.qkv"
    mistral = {name: tensor for name, tensor in qwen3(5120, 2).items() if "q_norm" not in name and "k_norm" not in name}
    return {
        "9B": described(diffusers_to_bfl(nine)),
        "9B diffusers": described(nine),
        "4B": described(diffusers_to_bfl(flux_2(5, 20, 24, 7680))),
        "4B diffusers": described(flux_2(5, 20, 24, 7680)),
        "dev": described(diffusers_to_bfl(flux_2(8, 48, 48, 15360, guidance=True))),
        "FLUX.2 of another width": described(flux_2(2, 2, 2, 96)),
        "FLUX.1 diffusers": described(flux_1()),
        "FLUX.1": {
            "img_in.weight": ("BF16", [3072, 64]),
            "txt_in.weight": ("BF16", [3072, 4096]),
            "vector_in.in_layer.weight": ("BF16", [3072, 768]),
            "guidance_in.in_layer.weight": ("BF16", [3072, 256]),
            "double_blocks.0.img_attn.qkv.weight": ("BF16", [9216, 3072]),
        },
        "Chroma": {
            "img_in.weight": ("BF16", [3072, 64]),
            "txt_in.weight": ("BF16", [3072, 4096]),
            "distilled_guidance_layer.norms.0.scale": ("BF16", [5120]),
            "double_blocks.0.img_attn.qkv.weight": ("BF16", [9216, 3072]),
        },
        "SDXL": {"model.diffusion_model.input_blocks.0.0.weight": ("F16", [320, 4, 3, 3])},
        "Qwen3-8B": described(qwen3(4096, 36)),
        "Qwen3-4B": described(qwen3(2560, 36, intermediate=9728)),
        "Qwen3-14B": described(qwen3(5120, 40, heads=40, intermediate=17408)),
        "Mistral": described(mistral),
        "T5": {"encoder.block.0.layer.0.SelfAttention.q.weight": ("BF16", [4096, 4096])},
        "CLIP": {"text_model.encoder.layers.0.mlp.fc1.weight": ("F16", [3072, 768])},
        "FLUX.2's VAE": described(vae(), "F32"),
        "FLUX.2's VAE in BFL layout": {
            **{f"{half}.conv_out.weight": ("BF16", [8, 8, 3, 3]) for half in ("encoder", "decoder")},
            "encoder.conv_in.weight": ("BF16", [128, 3, 3, 3]),
            "decoder.conv_in.weight": ("BF16", [384, 32, 3, 3]),
            "decoder.up.0.block.0.conv1.weight": ("BF16", [96, 96, 3, 3]),
            "bn.running_mean": ("BF16", [128]),
            "bn.running_var": ("BF16", [128]),
        },
        "FLUX.1's VAE": described(vae(flux2=False), "F32"),
        "TAESD": {"decoder.1.weight": ("F32", [64, 4, 3, 3]), "encoder.0.weight": ("F32", [64, 3, 3, 3])},
        "LoRA": {f"{style}.lora_{end}.weight": ("BF16", list(q.shape)) for end in "AB"},
        "kohya LoRA": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ("BF16", [8, 8])},
        "LoKr": {"transformer_blocks.0.attn.to_q.lokr_w1": ("BF16", [8, 8])},
        "bitsandbytes": {
            "img_in.weight": ("U8", [98304, 1]),
            "txt_in.weight": ("U8", [98304, 1]),
            "img_in.weight.quant_state.bitsandbytes__nf4": ("U8", [100]),
        },
        "numbers": {"a": ("F32", [2, 2])},
    }


def as_header(tensors, name="x.safetensors", metadata=None):
    found = {key: StoredTensor(dtype, tuple(shape)) for key, (dtype, shape, *_) in tensors.items()}
    return Header(Path(name), found, metadata or {})


def write(path, tensors, metadata=None, cut=0, change=None):
    """A safetensors file whose data is a hole on the disk, so that 18 GB take no space."""
    entries, end = {}, 0
    for name, (dtype, shape, *_) in tensors.items():
        start, end = end, end + BYTES[dtype] * int(torch.Size(shape).numel())
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if metadata is not None:
        entries["__metadata__"] = metadata
    if change:
        change(entries)
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end - cut)
    return path


def quantised(tensors, kind):
    """The tensors of a file whose matrices are stored in another format, as ComfyUI names the parts."""
    result = {}
    for name, (dtype, shape, *_) in tensors.items():
        base = name.removesuffix("weight")
        if len(shape) != 2 or base == name:
            result[name] = (dtype, shape)
            continue
        out, columns = shape
        if kind == "nvfp4":
            result |= {
                name: ("U8", [out, columns // 2]),
                f"{base}weight_scale": ("F8_E4M3", [out, columns // 16]),
                f"{base}weight_scale_2": ("F32", []),
                f"{base}comfy_quant": ("U8", [20]),
            }
        elif kind == "mxfp8":
            result |= {name: ("F8_E4M3", shape), f"{base}weight_scale": ("U8", [out, columns // 32])}
        elif kind == "int8":
            result |= {name: ("I8", shape), f"{base}weight_scale": ("F32", [out, 1])}
        elif kind == "int4 in int8":
            result |= {name: ("I8", [out, columns // 2]), f"{base}weight_scale": ("F32", [out, 1])}
        else:
            result[name] = ("F8_E4M3", shape)
            if kind != "fp8":
                result[f"{base}{kind}"] = ("F32", [])
                result[f"{base}input_scale"] = ("F32", [])
    if kind == "scale_weight":
        result["scaled_fp8"] = ("F8_E4M3", [2])
    return result


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


def assert_advises(error, kind):
    """One sentence that says what is needed, its usual name, where it is published, and the folder."""
    sentence = str(error)
    assert all(part in sentence for part in ADVICE[kind])
    assert sentence.endswith(".") and ". " not in sentence and "\n" not in sentence
