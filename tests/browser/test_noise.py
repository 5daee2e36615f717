"""The picture of the noise on CNS KSampler: what is drawn, presets, folding, and what is saved; in both renderers."""

from __future__ import annotations

import json
import math
import time

import pytest
from comfy_graph import SINGLE
from klein_cns.klein.presets import PRESETS
from klein_cns.klein.schedules import flux2_sigmas
from klein_cns.sampler import CNSParams
from klein_cns.sampler.noise_view import noise_view

pytestmark = pytest.mark.usefixtures("playwright")  # before a server is started for it
NODE = "((type) => window.app.graph._nodes.find((node) => node.type === type))"
SAMPLER = f"{NODE}('CNSKSampler')"
WIDGETS = f"() => Object.fromEntries({SAMPLER}.widgets.map(({{ name, value }}) => [name, value]))"
WORDS = "() => document.querySelector('.klein-noise')?.innerText ?? ''"
# The state of the canvas: its size, and the module that lays it out.
DRAWN = """async (noise) => {
  const { layout, cell } = await import("/extensions/klein-cns/noise_draw.js");
  const canvas = document.querySelector(".klein-noise canvas");
  const context = canvas.getContext("2d");
  const scale = canvas.width / canvas.clientWidth;
  const boxes = layout(canvas.clientWidth, noise);
  const middle = (box) => Array.from(context.getImageData(
    Math.floor((box.x + box.width / 2) * scale), Math.floor((box.y + box.height / 2) * scale), 1, 1).data).slice(0, 3);
  return Object.fromEntries(["power", "gamma"].map((kind) => [kind, noise[kind].map((row, column) =>
    row.map((_, band) => middle(cell(boxes[kind], noise, column, band))))]));
}"""
# Loader, conditioner, sampler, decode and preview, small and with CNS on.
BUILD = """async (files) => {
  const empty = { id: crypto.randomUUID(), nodes: [], links: [], last_node_id: 0, last_link_id: 0, version: 0.4 };
  await window.app.loadGraphData(empty, true, true, "noise");
  const add = (type, x) => {
    const node = window.LiteGraph.createNode(type);
    node.pos = [x, 100];
    window.app.graph.add(node);
    return node;
  };
  const types = ["KleinBaseLoader", "KleinEditConditioner", "CNSKSampler", "KleinDecode", "PreviewImage"];
  const [loader, edit, sampler, decode, preview] = types.map((type, i) => add(type, 420 * i));
  const set = (node, values) => Object.entries(values).forEach(([name, value]) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  });
  set(loader, files);
  set(edit, { prompt: "a lighthouse", image_size: "custom", width: 96, height: 64 });
  set(sampler, { steps: 2, enable_cns: true, control_after_generate: "fixed" });
  const link = (from, slot, to, name) => from.connect(slot, to, to.findInputSlot(name));
  link(loader, 0, sampler, "model");
  link(loader, 1, edit, "clip");
  link(loader, 2, edit, "vae");
  ["positive", "negative", "latent_image"].forEach((name, slot) => link(edit, slot, sampler, name));
  link(sampler, 0, decode, "latent");
  link(loader, 2, decode, "vae");
  link(decode, 0, preview, "images");
  Object.assign(window.app.canvas.ds, { scale: 0.8, offset: [-700, 20] });
  window.app.canvas.setDirty(true, true);
}"""


@pytest.fixture
def page(one_page):
    """A page with that graph."""
    one_page(BUILD, SINGLE)
    one_page.until(WORDS, lambda text: "Before a run" in text)
    return one_page


def turn(page, **values):
    page.turn(SAMPLER, **values)


def numbers(view):
    found = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in view._asdict().items()}
    found["wavelengths"][0] = None
    return found | {"size": [96, 64], "sigmas": [float(sigma) for sigma in view.sigmas]}


def power_color(power):
    """Red above 1, blue below, full at 2 and 1/2, by the root of the octaves."""
    octaves = max(-1.0, min(1.0, math.log2(power)))
    end = (178, 24, 43) if octaves > 0 else (33, 102, 172)
    return [247 + (channel - 247) * math.sqrt(abs(octaves)) for channel in end]


def gamma_color(gamma):
    low, middle, high = (68, 1, 84), (33, 145, 140), (253, 231, 37)
    start, end, share = (low, middle, 2 * gamma) if gamma < 0.5 else (middle, high, 2 * gamma - 1)
    return [a + (b - a) * share for a, b in zip(start, end, strict=True)]


def check_cells(page, view):
    """Every cell's colour is that of the core's number, to a rounding of 8 bits."""
    drawn = page(DRAWN, numbers(view))
    for table, color, kind in ((view.power, power_color, "power"), (view.gamma, gamma_color, "gamma")):
        for row, colors in zip(table.tolist(), drawn[kind], strict=True):
            for band, (value, found) in enumerate(zip(row, colors, strict=True)):
                if view.modes[band]:
                    assert found == pytest.approx(color(value), abs=1.5), (kind, band, value)


def view_of(params, steps, solver="euler"):
    return noise_view(params, flux2_sigmas(steps, 24), (8, 12), solver=solver, progress=None, cell=8)


def test_the_cells_are_the_cores_table_before_a_run_and_after_it(page):
    for params, steps, solver in (
        (CNSParams(), 28, "euler"),
        (CNSParams(s_churn=1.5, alpha_tilt_start=-0.4, num_freq_bins=16, formula="authors"), 7, "sde_2m"),
    ):
        values = {name: value for name, value in params.to_request().items() if name != "enable_cns"}
        turn(page, **values, steps=steps, solver=solver)
        page.until(WORDS, lambda text, steps=steps: f"Before a run: {steps} steps at 96 x 64" in text)
        time.sleep(0.5)  # it is drawn
        check_cells(page, view_of(params, steps, solver))
    turn(page, steps=2)
    assert page.run()["kind"] == "execution_success"
    page.until(WORDS, lambda text: "This run: 2 steps at 96 x 64" in text)
    turn(page, cns_alpha_tilt_start=0.3)
    page.until(WORDS, lambda text: "Before a run: 2 steps" in text)
    turn(page, cns_alpha_tilt_start=-0.4)
    page.until(WORDS, lambda text: "This run" in text)


def test_pointing_at_a_cell_reads_it(page):
    view = view_of(CNSParams(), 2)
    page(
        """async (noise) => {
          const { layout, cell } = await import("/extensions/klein-cns/noise_draw.js");
          const canvas = document.querySelector(".klein-noise canvas");
          const box = cell(layout(canvas.clientWidth, noise).power, noise, 1, 11);
          const seen = canvas.getBoundingClientRect();
          const zoom = seen.width / canvas.clientWidth;
          const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
          const at = { clientX: seen.x + x * zoom, clientY: seen.y + y * zoom };
          canvas.dispatchEvent(new MouseEvent("mousemove", { ...at, bubbles: true }));
        }""",
        numbers(view),
    )
    text = page(WORDS)
    sigma, wavelength = f"{float(f'{view.sigmas[1]:.3g}'):g}", f"{float(f'{view.wavelengths[11]:.3g}'):g}"
    assert f"step 2 of 2, σ {sigma}: waves of {wavelength} px have " in text, text
    assert f"{float(f'{view.power[1, 11]:.3g}'):g} times white noise's power" in text
    page("() => document.querySelector('.klein-noise canvas').dispatchEvent(new MouseEvent('mouseleave'))")
    assert "Before a run" in page(WORDS)


def test_presets_set_what_they_say_and_one_undo_takes_it_back(page):
    page("async () => window.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    before = page(WIDGETS)
    for name, preset in PRESETS.items():
        if preset.values["enable_cns"]:
            page.click(name)
            page.until(WORDS, lambda text, name=name: f"These are the values of: {name}" in text)
        found = page(WIDGETS)
        public = {"num_inference_steps": "steps", "guidance_scale": "cfg"}
        if preset.values["enable_cns"]:
            assert {key: found[public.get(key, key)] for key in preset.values} == dict(preset.values)
    page.click("endpoint")
    turn(page, cns_s_churn=0.9)
    page.until(WORDS, lambda text: "Changed from endpoint: s_churn" in text)
    assert before["seed"] == page(WIDGETS)["seed"]


def test_a_preset_is_chosen_from_the_menu(page):
    page(f"() => {{ {SAMPLER}.pos = [1000, 120]; window.app.canvas.setDirty(true, true); }}")
    time.sleep(0.5)
    page.menu(SAMPLER)
    page.choose("Presets", "endpoint, guided")
    page.until(WORDS, lambda text: "These are the values of: endpoint, guided" in text)


def test_what_the_schema_calls_advanced_is_advanced_in_both_renderers(page):
    """The classic renderer looks at the widget, Nodes 2.0 at its options."""
    found = page(
        "(types) => types.map((type) => window.LiteGraph.createNode(type)).flatMap((node) => "
        "node.widgets.map(({ name, advanced, options }) => [node.type, name, !!advanced, !!options.advanced]))",
        ["CNSKSampler", "CNSSampler", "KleinBaseLoader", "KleinFalEdit"],
    )
    assert all(classic == nodes2 for *_, classic, nodes2 in found)
    assert {kind for kind, _, advanced, _ in found if advanced} >= {"CNSKSampler", "CNSSampler"}


def test_undo_takes_back_a_whole_preset(page):
    tracker = "window.app.extensionManager.workflow.activeWorkflow.changeTracker"
    page(f"async () => {tracker}.checkState()")
    before = page(WIDGETS)
    page.click("paper, guided")
    page.until(WORDS, lambda text: "These are the values of: paper, guided" in text)
    page(f"async () => {tracker}.undo()")
    page.until(WIDGETS, lambda found: found == before)
    page.until(WORDS, lambda text: "Before a run: 2 steps" in text)


def height(page):
    return page(f"() => {SAMPLER}.size[1]")


def test_off_is_a_line_and_the_widgets_fold_and_keep_their_values(page):
    """Through saving, loading, copying and a subgraph."""
    turn(page, cns_s_churn=0.7, cns_num_freq_bins=48)
    page.until(WORDS, lambda text: "Changed from endpoint: steps, s_churn, num_freq_bins" in text)
    before, tall = page(WIDGETS), height(page)
    turn(page, enable_cns=False)
    page.until(WORDS, lambda text: text.strip() == "CNS is off: the initial noise is white, and none is added")
    wanted = before | {"enable_cns": False}
    hidden = page(f"() => {SAMPLER}.widgets.filter(({{ hidden }}) => hidden).map(({{ name }}) => name)")
    assert "cns_s_churn" in hidden and all(name.startswith("cns_") for name in hidden)
    assert not any(name in page.text() for name in hidden)
    page.until(f"() => {SAMPLER}.size[1]", lambda low: low < tall - 300)
    core = page("() => { const one = window.LiteGraph.createNode('KSampler'); return one.computeSize()[1]; }")
    assert height(page) < core + 120  # an output, a switch and a line more, with the margins of Nodes 2.0
    saved = page.saved()
    page.load(saved)
    page.until(WORDS, lambda text: "CNS is off" in text)
    assert page(WIDGETS) == wanted and height(page) < core + 120
    sent = page("async () => (await window.app.graphToPrompt()).output")
    [inputs] = [one["inputs"] for one in sent.values() if one["class_type"] == "CNSKSampler"]
    assert {name: inputs[name] for name in hidden} == {name: before[name] for name in hidden}
    page(
        f"() => {{ const {{ canvas }} = window.app; canvas.selectItems([{SAMPLER}]); canvas.copyToClipboard(); "
        "canvas.pasteFromClipboard(); }"
    )
    copies = page(
        "() => window.app.graph._nodes.filter((one) => one.type === 'CNSKSampler').map((one) => "
        "Object.fromEntries(one.widgets.map(({ name, value }) => [name, value])))"
    )
    assert copies == [wanted, wanted]
    inside = page(
        f"() => {{ const {{ subgraph }} = window.app.graph.convertToSubgraph(new Set([{SAMPLER}])); "
        "return Object.fromEntries(subgraph.nodes.find((one) => one.type === 'CNSKSampler').widgets.map("
        "({ name, value }) => [name, value])); }"
    )
    assert inside == wanted


def test_a_file_from_before_the_last_inputs_opens(page):
    """The schema grows at its end; what a file lacks takes the default."""
    turn(page, cns_s_churn=0.7)
    before = page(WIDGETS)
    saved = page.saved()
    [sampler] = [one for one in saved["nodes"] if one["type"] == "CNSKSampler"]
    sampler["widgets_values"] = sampler["widgets_values"][:-2]
    page.load(saved)
    page.until(WORDS, lambda text: "Before a run" in text)
    assert page(WIDGETS) == before


def test_a_linked_switch_folds_and_a_linked_number_counts(page):
    page(
        f"""() => {{
          const add = (type, value) => {{
            const node = window.LiteGraph.createNode(type);
            node.pos = [840, 900];
            window.app.graph.add(node);
            node.widgets[0].value = value;
            return node;
          }};
          const sampler = {SAMPLER};
          add("PrimitiveBoolean", false).connect(0, sampler, sampler.findInputSlot("enable_cns"));
          add("PrimitiveInt", 9).connect(0, sampler, sampler.findInputSlot("steps"));
        }}"""
    )
    page.until(WORDS, lambda text: "CNS is off" in text)
    page(f"() => {{ {NODE}('PrimitiveBoolean').widgets[0].value = true; }}")
    page.until(WORDS, lambda text: "Before a run: 9 steps at 96 x 64" in text)
    page(
        f"""() => {{
          const [sampler, math] = [{SAMPLER}, window.LiteGraph.createNode("StringLength")];
          window.app.graph.add(math);
          math.connect(0, sampler, sampler.findInputSlot("steps"));
        }}"""
    )
    page.until(WORDS, lambda text: "assumed: steps (linked)" in text)


def test_gamma_of_the_pictures_is_said_to_come_with_a_run(page):
    turn(page, cns_gamma_source="reference")
    page.until(WORDS, lambda text: "the noise is shown after a run" in text)


def test_without_the_route_the_node_is_the_schemas(server, open_page):
    """An older server, or one whose proxy hides it: the node works, and the console stays quiet."""
    page = open_page(server)
    page(
        """async () => {
          const { api } = await import("/scripts/api.js");
          const fetchApi = api.fetchApi.bind(api);
          api.fetchApi = async (route, ...given) =>
            route.startsWith("/klein_cns/") ? new Response("", { status: 404 }) : fetchApi(route, ...given);
        }"""
    )
    page(BUILD, SINGLE)
    page.until("() => document.querySelectorAll('.klein-noise').length", lambda count: count == 0)
    names = page(f"() => {SAMPLER}.widgets.map(({{ name }}) => name)")
    assert "klein_noise" not in names and "cns_energy_scale" in names
    turn(page, enable_cns=False)
    time.sleep(1)
    assert not page(f"() => {SAMPLER}.widgets.some(({{ hidden }}) => hidden)")
    assert page.run()["kind"] == "execution_success"


def test_an_error_marks_its_node(page):
    """And what the node says of it is one sentence."""
    turn(page, cns_gamma_source="reference")  # and no picture is connected
    ended = page.run()
    assert ended["kind"] == "execution_error", ended
    failed = page("() => window.app.lastExecutionError?.node_id ?? null")
    assert str(failed) == str(page(f"() => {SAMPLER}.id"))
    assert json.dumps(ended["message"]).count("\\n") <= 1, ended
