"""Weights between diffusers' and BFL's layout; oracles: diffusers' own converter, and a real ComfyUI."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from klein_cns.klein import tiny
from klein_cns.klein.convert import bfl_to_diffusers, diffusers_to_bfl, names_in, rows
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def transformer():
    return tiny(seed=3).transformer


@pytest.fixture(scope="module")
def state(transformer):
    return transformer.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_round_trip_is_bit_equal(state, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    there = diffusers_to_bfl(state)
    assert equal(bfl_to_diffusers(there), state)
    assert equal(diffusers_to_bfl(bfl_to_diffusers(there)), there)


def test_no_number_is_lost_and_the_input_is_left_alone(state):
    before = {name: tensor.clone() for name, tensor in state.items()}
    there = diffusers_to_bfl(state)
    assert sum(tensor.numel() for tensor in there.values()) == sum(tensor.numel() for tensor in state.values())
    bfl_to_diffusers(there)
    assert equal(before, state)


def test_bfl_to_diffusers_is_as_diffusers_reads_bfl(state):
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    there = diffusers_to_bfl(state)
    assert equal(bfl_to_diffusers(there), convert_flux2_transformer_checkpoint_to_diffusers(dict(there)))


def test_shapes_and_halves_by_hand(state):
    there = diffusers_to_bfl(state)
    assert there["double_blocks.1.txt_attn.qkv.weight"].shape == (384, 128)
    assert torch.equal(
        there["double_blocks.1.txt_attn.qkv.weight"][128:256], state["transformer_blocks.1.attn.add_k_proj.weight"]
    )
    shift, scale = there["final_layer.adaLN_modulation.1.weight"].split(128)
    assert torch.equal(scale, state["norm_out.linear.weight"][:128])
    assert torch.equal(shift, state["norm_out.linear.weight"][128:])
    assert there["single_blocks.2.norm.key_norm.scale"] is state["single_transformer_blocks.2.attn.norm_k.weight"]
    back = bfl_to_diffusers(there)["transformer_blocks.1.attn.add_v_proj.weight"]
    assert back.data_ptr() == there["double_blocks.1.txt_attn.qkv.weight"][256:].data_ptr()


def test_the_table_names_every_tensor_once():
    table = rows(8, 24)
    for layout, count in (("bfl", 9 + 8 * 12 + 24 * 4), ("diffusers", 9 + 8 * 16 + 24 * 4)):
        names = names_in(table, layout)
        assert len(names) == len(set(names)) == count


@pytest.mark.parametrize("guidance", [False, True])
def test_the_table_is_that_of_diffusers(guidance):
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            num_layers=3, num_single_layers=2, num_attention_heads=1, joint_attention_dim=96, guidance_embeds=guidance
        )
    state = model.state_dict()
    assert set(names_in(rows(3, 2, guidance), "diffusers")) == set(state)
    assert {name: tensor.shape for name, tensor in bfl_to_diffusers(diffusers_to_bfl(state)).items()} == {
        name: tensor.shape for name, tensor in state.items()
    }


def test_what_is_converted_can_be_saved(state, tmp_path):
    for name, converted in (("bfl", diffusers_to_bfl(state)), ("diffusers", bfl_to_diffusers(diffusers_to_bfl(state)))):
        save_file(converted, tmp_path / f"{name}.safetensors")
        assert equal(load_file(tmp_path / f"{name}.safetensors"), converted)


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def test_missing_and_unknown_keys_are_named(state):
    there = diffusers_to_bfl(state)
    with pytest.raises(ValueError, match=r"diffusers layout: missing transformer_blocks\.0\.attn\.to_k\.weight\."):
        diffusers_to_bfl(without(state, "transformer_blocks.0.attn.to_k.weight"))
    with pytest.raises(ValueError, match=r"BFL layout: missing double_blocks\.0\.img_mlp\.2\.weight\."):
        bfl_to_diffusers(without(there, "double_blocks.0.img_mlp.2.weight"))
    with pytest.raises(ValueError, match=r"unknown img_in\.weight_scale\."):
        bfl_to_diffusers({**there, "img_in.weight_scale": torch.ones(())})
    with pytest.raises(ValueError, match=r"missing x_embedder\.weight; unknown x_embedder\.bias\."):
        diffusers_to_bfl({**without(state, "x_embedder.weight"), "x_embedder.bias": torch.ones(128)})
    middle = [name for name in there if name.startswith("single_blocks.1.")]
    with pytest.raises(ValueError, match=r"missing single_blocks\.1\.linear1\.weight, .*key_norm\.scale\."):
        bfl_to_diffusers(without(there, *middle))
    with pytest.raises(ValueError, match=r"missing .* and \d+ more; unknown .* and \d+ more\."):
        bfl_to_diffusers(state)
    with pytest.raises(ValueError, match=r"missing img_in\.weight, .* and 4 more\."):
        bfl_to_diffusers({})


def test_a_block_number_without_end_makes_no_endless_table(state):
    with pytest.raises(ValueError, match=r"unknown transformer_blocks\.999999999\.x\."):
        diffusers_to_bfl({**state, "transformer_blocks.999999999.x": torch.ones(1)})


def test_rows_that_do_not_divide_are_refused(state):
    broken = {**diffusers_to_bfl(state), "double_blocks.0.img_attn.qkv.weight": torch.ones(385, 128)}
    with pytest.raises(ValueError, match=r"img_attn\.qkv\.weight has 385 rows, which do not divide into 3 equal parts"):
        bfl_to_diffusers(broken)


COMFYUI_RUN = """
import sys
weights, inputs, output = sys.argv[1:]
sys.argv = ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.sd
from safetensors.torch import load_file, save_file
patcher = comfy.sd.load_diffusion_model_state_dict(load_file(weights), model_options={"dtype": torch.float32})
given = load_file(inputs)
with torch.no_grad():
    result = patcher.model.diffusion_model(
        given["x"], timestep=given["sigma"], context=given["context"], ref_latents=[given["reference"]]
    )
save_file({"result": result.contiguous()}, output)
"""


def test_comfyui_computes_the_same_from_the_converted_weights(transformer, state, comfyui, tmp_path, seed):
    folder, python = comfyui
    generator = torch.Generator().manual_seed(seed)
    height, width, length = 6, 4, 7
    given = {
        "x": torch.randn(2, 128, height, width, generator=generator),
        "reference": torch.randn(2, 128, 3, 5, generator=generator),
        "context": torch.randn(2, length, 96, generator=generator),
        "sigma": torch.tensor([0.93, 0.21]),  # both hosts multiply by 1000 inside
    }
    save_file(given, tmp_path / "inputs.safetensors")
    save_file(diffusers_to_bfl(state), tmp_path / "weights.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("weights", "inputs", "output")]
    done = subprocess.run(
        [python, "-c", COMFYUI_RUN, *files],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = load_file(files[2])["result"]

    def ids(*axes):
        return torch.cartesian_prod(*(torch.arange(*axis) for axis in axes)).float()

    image_ids = torch.cat((ids((1,), (height,), (width,), (1,)), ids((10, 11), (3,), (5,), (1,))))
    tokens = torch.cat([given[name].flatten(2).transpose(1, 2) for name in ("x", "reference")], dim=1)
    with torch.no_grad():
        expected = transformer(
            hidden_states=tokens,
            encoder_hidden_states=given["context"],
            timestep=given["sigma"],
            txt_ids=ids((1,), (1,), (1,), (length,)),
            img_ids=image_ids,
            return_dict=False,
        )[0][:, : height * width]
    expected = expected.transpose(1, 2).reshape(result.shape)
    assert expected.std() > 0.1
    assert (result - expected).abs().max() <= 1e-5
