"""Every format of LoRA files means exactly the change it was written from, and applies so on the diffusers host."""

from __future__ import annotations

import pytest
import torch
from klein_cns.klein import tiny
from klein_cns.klein.convert import bfl_to_diffusers, diffusers_to_bfl
from klein_cns.lora import LoraError, LoraSpec, forms, load_lora, peft_host
from klein_cns.lora.peft_host import remove_loras, set_loras
from klein_cns.weights.architecture import TINY
from lora_formats import FORMATS, NEW_FORM, linears, save, write
from lora_new_form import new_form
from torch.nn import functional as F

EXACT = 1e-5


@pytest.fixture(scope="module")
def pipe():
    return tiny(seed=3)


@pytest.fixture(scope="module")
def state(pipe):
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def error(found, expected):
    """Relative, in the Frobenius norm; of a change that is zero, absolute."""
    distance = float((found - expected).detach().norm())
    return distance / float(expected.norm()) if expected.any() else distance


def dense(lora, base, strength=1.0):
    """The change of every linear that a canonical LoRA means."""
    total = {name: torch.zeros_like(weight) for name, weight in base.items() if weight.ndim == 2}
    for update in lora.updates:
        update.within(total[update.weight]).add_(update.change(strength, base[update.weight]))
    return total


def effective(transformer, state):
    """The change of every linear as it acts: on the unit vectors, less what the base weight gives."""
    changes = {}
    for module in linears(state):
        weight = state[f"{module}.weight"]
        unit = torch.eye(weight.shape[1])
        changes[f"{module}.weight"] = (transformer.get_submodule(module)(unit) - F.linear(unit, weight)).T
    return changes


def run(transformer, seed=0):
    """The transformer's output for random inputs."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*axes):
        return torch.cartesian_prod(*(torch.arange(axis) for axis in axes)).float()

    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 12, 128, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 96, generator=generator),
            timestep=torch.tensor([0.7]),
            txt_ids=ids(1, 1, 1, 5), img_ids=ids(1, 4, 3, 1),
            return_dict=False,
        )[0]  # fmt: skip


@pytest.fixture(scope="module")
def other():
    """A second transformer, whose weights the tests change by hand."""
    return tiny(seed=3).transformer


def with_changes(changed, state, delta):
    """The output of a transformer whose weights were changed by hand."""
    total = {**{name: torch.zeros_like(tensor) for name, tensor in diffusers_to_bfl(state).items()}, **delta}
    parts = bfl_to_diffusers(total)
    changed.load_state_dict({name: tensor + parts[name] for name, tensor in state.items()})
    return run(changed)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_means_what_it_was_written_from(name, state, tmp_path, seed):
    sample = write(FORMATS[name], state, seed)
    save(sample, tmp_path / "a.safetensors")
    lora = load_lora(tmp_path / "a.safetensors", TINY)
    assert (lora.report.applied, lora.report.total, lora.report.left_out) == (sample.modules, sample.modules, ())
    assert lora.report.base == TINY.name and not lora.report.problem
    found = dense(lora, diffusers_to_bfl(state))
    assert found.keys() == sample.delta.keys()
    assert {
        weight: error(found[weight], sample.delta[weight])
        for weight in found
        if error(found[weight], sample.delta[weight]) > EXACT
    } == {}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_applies_exactly_on_the_diffusers_host(name, pipe, other, state, tmp_path, seed):
    check_on_the_diffusers_host(FORMATS[name], pipe, other, state, tmp_path, seed)


@pytest.mark.parametrize("name", NEW_FORM)
def test_a_new_form_is_a_class_in_the_list_of_forms_and_a_line_in_a_hosts_table(
    name, pipe, other, state, tmp_path, seed, monkeypatch
):
    """As CONTRIBUTING.md says; the ComfyUI host has the same test."""
    file = tmp_path / "a.safetensors"
    save(write(NEW_FORM[name], state, seed), file)
    with pytest.raises(LoraError, match="a parameter rank_one_.* that is not understood"):
        load_lora(file, TINY)
    form = new_form(forms)
    monkeypatch.setattr(forms, "FORMS", (*forms.FORMS, form))
    assert load_lora(file, TINY).report.format.startswith("rank one, ")
    with pytest.raises(LoraError, match="the diffusers host cannot put on a rank one; add it to ADAPTERS in lora"):
        set_loras(pipe, [LoraSpec(str(file), 1.0)])
    monkeypatch.setitem(peft_host.ADAPTERS, form, None)
    check_on_the_diffusers_host(NEW_FORM[name], pipe, other, state, tmp_path, seed)


def check_on_the_diffusers_host(form, pipe, other, state, tmp_path, seed):
    sample = write(form, state, seed)
    save(sample, tmp_path / "a.safetensors")
    plain = run(pipe.transformer)
    (report,) = set_loras(pipe, [LoraSpec(str(tmp_path / "a.safetensors"), 1.0)])
    parts = bfl_to_diffusers({**{n: torch.zeros_like(t) for n, t in diffusers_to_bfl(state).items()}, **sample.delta})
    found = effective(pipe.transformer, state)
    worst = max(error(change, parts[weight]) for weight, change in found.items())
    assert worst <= EXACT, worst
    expected = with_changes(other, state, sample.delta)
    assert float((expected - plain).abs().max()) > 1e-3
    assert error(run(pipe.transformer), expected) <= EXACT
    merged = ("lokr", "whole lokr", "loha", "diff", "column dora", "rank one")
    words = "merged" if form.kind in merged else "as peft adapters"
    assert words in report.how
    remove_loras(pipe)
    assert torch.equal(run(pipe.transformer), plain)
    assert all(torch.equal(tensor, state[weight]) for weight, tensor in pipe.transformer.state_dict().items())


STACK = ("lora_unet_<BFL>", "lycoris_<diffusers> LoKr", "peft, DoRA")
STRENGTHS = (0.7, -1.2, 0.3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (2, 2, 0), (0, 0, 2), (2,)])
def test_stacks_add_up_and_a_dora_stands_on_the_base_weight(order, pipe, other, state, tmp_path, seed):
    """At strengths other than 1, in any order, two DoRAs of one weight too."""
    specs, deltas = [], []
    for i in order:
        sample = write(FORMATS[STACK[i]], state, seed + len(specs), STRENGTHS[i])
        file = tmp_path / str(len(specs)) / "a.safetensors"
        save(sample, file)
        specs.append(LoraSpec(str(file), STRENGTHS[i]))
        deltas.append(sample.delta)
    total = {name: sum(delta[name] for delta in deltas) for name in deltas[0]}
    reports = set_loras(pipe, specs)
    parts = bfl_to_diffusers({**{n: torch.zeros_like(t) for n, t in diffusers_to_bfl(state).items()}, **total})
    found = effective(pipe.transformer, state)
    assert max(error(change, parts[weight]) for weight, change in found.items()) <= EXACT
    assert error(run(pipe.transformer), with_changes(other, state, total)) <= EXACT
    assert [report.strength for report in reports] == [spec.scale for spec in specs]
    alone = len(order) == 1
    assert ("as peft adapters" in reports[order.index(2)].how) == alone  # peft's DoRA would scale the others
    set_loras(pipe, [spec._replace(scale=0.0) for spec in specs])
    assert all(torch.equal(tensor, state[weight]) for weight, tensor in pipe.transformer.state_dict().items())
