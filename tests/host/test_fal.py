"""Klein on fal and Klein Local or fal on a real ComfyUI server; fal is a fake on loopback, under another address."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import urllib.error

import pytest
import torch
from comfy_base import link_fal_client
from comfy_graph import EXAMPLES, OFF, SINGLE, example, failure, give, graph, made, node, shortened
from comfy_host import Failed, Server
from fal_runs import with_a_new_field
from fal_server import KEY, FalServer, answer, drop, png, stall
from klein_cns.weights.components import WANTED
from PIL import Image

CAT = Image.open(EXAMPLES / "pictures" / "klein_cns_cat.jpg").size
MISSING = {name: "none.safetensors" for name in SINGLE}
PROBES = '''
import sys
sys.path.append({packages!r})

class ProbeMemory:
    """Let the machine have an accelerator of so many bytes; 0 is none."""
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "set", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"size": ("INT", {{"max": 2**62}})}}}}

    def set(self, size):
        [route] = [module for name, module in sys.modules.items() if name.endswith(".nodes.route")]
        route._accelerator_memory = lambda: size or None
        return {{"ui": {{"size": [size]}}}}

class ProbeGrow:
    """An image that goes through; meanwhile the machine gets a large accelerator."""
    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "grow", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"image": ("IMAGE",)}}}}

    def grow(self, image):
        ProbeMemory().set(10**12)
        return (image,)

class ProbeName:
    """The name of a file, through a link."""
    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "name", ("COMBO",)

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"name": ("STRING", {{}})}}}}

    def name(self, name):
        return (name,)

class ProbeText:
    """Show what a text output holds."""
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "probe", "show", (), True

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {{"id": "STRING", "cost": "FLOAT", "seed": "INT", "result": "STRING"}}
        return {{"required": {{name: (kind, {{"forceInput": True}}) for name, kind in kinds.items()}}}}

    def show(self, **values):
        return {{"ui": {{name: [value] for name, value in values.items()}}}}

class ProbeFail:
    """An image that nobody may ask for."""
    CATEGORY, FUNCTION, RETURN_TYPES = "probe", "fail", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}}}

    def fail(self):
        raise RuntimeError("the branch that was not taken ran")

NODE_CLASS_MAPPINGS = {{probe.__name__: probe for probe in (ProbeMemory, ProbeGrow, ProbeName, ProbeText, ProbeFail)}}
'''


def fal_node(**changed):
    values = {
        "prompt": "make it blue",
        "negative_prompt": "",
        "guidance_scale": 5.0,
        "seed": 5,
        "num_inference_steps": 28,
        "image_size": "auto",
        "width": 1024,
        "height": 1024,
        "num_images": 1,
        "acceleration": "regular",
        "enable_safety_checker": True,
        "output_format": "png",
        "sync_mode": False,
        "image_urls": "",
        "lora_urls": "",
        "upload_loras": False,
        "max_cost_usd": 0.5,
        "recover_request_id": "",
        "resubmit_lost": False,
        "on_flagged": "error",
        **OFF.to_endpoint(),
    }
    return node("KleinFalEdit", **{**values, **changed})


def remote_graph(name, **changed):
    """A remote edit of one picture."""
    return {
        "load": node("ProbeLoad", name="falpicture"),
        "fal": fal_node(**{"images.image_0": ["load", 0], **changed}),
        "save": node("ProbeSave", name=name, image=["fal", 0]),
        "text": node("ProbeText", id=["fal", 2], cost=["fal", 3], seed=["fal", 1], result=["fal", 4]),
    }


@pytest.fixture(scope="module")
def fal():
    server = FalServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def honest(fal):
    yield
    fal.heal()
    fal.queued = fal.running = 1
    fal.respond = lambda response: response
    fal.picture = png()
    for event in fal.reached.values():
        event.clear()


@pytest.fixture(scope="module")
def host(comfyui, server, fal, tmp_path_factory):
    """A second server beside the one of the other tests, with fal-client, the fake's address and no key yet."""
    base = tmp_path_factory.mktemp("comfy-fal")
    prepare(base, server)
    for path in (server.base / "custom_nodes").iterdir():
        if path.suffix == ".py" or path.is_symlink():
            (base / "custom_nodes" / path.name).symlink_to(path.resolve())
    running = Server(*comfyui, base, {"KLEIN_CNS_FAL_URL": fal.url, "FAL_KEY": ""})
    give(running, "falpicture", torch.rand(1, 64, 96, 3))
    yield running
    running.stop()


def prepare(base, server):
    """A base folder with the models of ``server``, and fal-client."""
    for name in ("custom_nodes", "input", "output"):
        (base / name).mkdir()
    (base / "models").symlink_to(server.base / "models")
    (base / "custom_nodes" / "fal_probes.py").write_text(PROBES.format(packages=str(link_fal_client(base))))


@pytest.fixture(scope="module")
def keyed(host):
    """The host once the key is written, without a restart."""
    before = failure(host, remote_graph("nokey"))
    file = host.base / "user" / "__klein_cns" / "fal_key"
    assert "there is no fal key" in before and f"write it into {file}, readable only by you" in before
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(KEY)
    file.chmod(0o644)
    assert "other users can read" in failure(host, remote_graph("nokey"))
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    return host


def texts(entry, name="text"):
    return {key: value[0] for key, value in entry["outputs"][name].items()}


def test_every_input_has_a_tooltip_and_the_endpoints_name(host):
    for name in ("KleinFalEdit", "KleinFalRequests", "KleinRoute"):
        info = host.get(f"/object_info/{name}")[name]
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        assert not [key for key, spec in inputs.items() if not (len(spec) > 1 and spec[1].get("tooltip"))]
    from klein_cns.remote.order import EditRequest

    own = host.get("/object_info/KleinFalEdit")["KleinFalEdit"]["input"]
    assert set(EditRequest.model_fields) - {"loras"} <= set(own["required"]) | set(own["optional"])


def test_klein_on_fal_has_the_endpoints_controls_alone(host):
    """No local solver, formula or gamma, not even as an option; and the seed stays as it is after a run."""
    from klein_cns.remote.order import EditRequest

    own = host.get("/object_info/KleinFalEdit")["KleinFalEdit"]["input"]
    inputs = {**own["required"], **own["optional"]}
    assert {name for name in inputs if "cns" in name} == {name for name in EditRequest.model_fields if "cns" in name}
    assert inputs["cns_gamma_source"][1]["options"] == ["matrix", "approximation"]
    if host.version > (0, 11):  # 0.11 knows no control that starts as "fixed"
        assert inputs["seed"][1]["control_after_generate"] == "fixed"
    for kind, options in inputs.values():
        if kind == "COMBO":
            assert options["default"] in options["options"]


def test_a_remote_edit_brings_picture_seed_id_cost_and_response(keyed, fal):
    fal.picture = png((96, 80), (10, 200, 30))
    before = len(fal.requests)
    entry = keyed.run(remote_graph("edit", prompt="first"))
    assert len(fal.requests) == before + 1
    picture = made(keyed, "edit")
    assert tuple(picture.shape) == (1, 80, 96, 3)
    assert torch.allclose(picture[0, 0, 0], torch.tensor([10, 200, 30]) / 255)
    assert entry["outputs"]["fal"]["text"][0].startswith("$0.0400: saved in ComfyUI's output folder as klein_fal/")
    said = texts(entry)
    assert said["seed"] == 5 and said["id"] in fal.requests
    assert said["cost"] == pytest.approx(0.04)
    assert json.loads(said["result"])["timings"] == {"inference": 1.5}
    assert (keyed.base / "output" / "klein_fal" / f"{said['id']}_0.png").read_bytes() == fal.picture


def test_a_repeat_of_a_finished_run_is_not_submitted_again(keyed, fal):
    keyed.run(remote_graph("repeat", prompt="once"))
    before = len(fal.requests)
    changed = remote_graph("repeat", prompt="once", max_cost_usd=0.6)  # so ComfyUI runs the node again
    assert texts(keyed.run(changed))["cost"] == 0
    assert len(fal.requests) == before


def example_for(test, name):
    """A remote example that no other test has bought: its negative prompt is the test's own."""
    prompt = shortened(example(name))
    for one in prompt.values():
        if one["class_type"] == "KleinFalEdit":
            one["inputs"]["negative_prompt"] = test
    return prompt


@pytest.mark.parametrize(
    ("name", "bought", "sizes", "submitted"),
    [
        ("Edit on fal", None, [(64, 48)], 1),
        ("Local beside fal", None, [(64, 48), CAT], 1),
        ("Local or fal", "Local beside fal", [(64, 48)], 0),
    ],
)
def test_the_examples(keyed, fal, name, bought, sizes, submitted):
    """The last on a machine without an accelerator; it asks for what the second buys, and buys nothing."""
    if bought is not None:
        keyed.run(example_for(name, bought))
    before = len(fal.requests)
    outputs = keyed.run(example_for(name, name))["outputs"].values()
    saved = [image for output in outputs for image in output.get("images", []) if image["type"] == "output"]
    found = [keyed.base / "output" / image["subfolder"] / image["filename"] for image in saved]
    assert sorted(Image.open(path).size for path in found) == sizes
    assert len(fal.requests) == before + submitted


def test_several_pictures_are_a_list_of_their_own_sizes(keyed, fal):
    fal.respond = lambda response: {**response, "images": response["images"][:2]}
    sizes = iter([(64, 48), (32, 80)])
    fal.fail(file=[lambda handler, proceed: handler.reply(200, png(next(sizes)), {})] * 2)
    prompt = remote_graph("list", prompt="two", num_images=2)
    prompt["preview"] = node("PreviewImage", images=["fal", 0])
    assert len(keyed.run(prompt)["outputs"]["preview"]["images"]) == 2


def test_queue_position_and_logs_show_on_the_node(keyed, fal):
    fal.queued = fal.running = 2
    lines = keyed.watch(remote_graph("shown", prompt="shown")).texts
    text = "\n".join(lines)
    for part in (
        "$0.0400: submitting",
        "in fal's queue, position 1",
        "next in fal's queue",
        "fal is",
        "denoising 14 of 28",
    ):
        assert part in text, text


def test_interrupt_cancels_at_fal_also_during_the_submission(keyed, fal):
    for point, faults in (("status", {}), ("submit", {"submit": stall(1.0)})):
        fal.queued = 10**6
        fal.reached[point].clear()
        fal.fail(**faults)
        prompt = remote_graph("stopped", prompt=f"stopped at {point}")
        prompt_id = keyed.post("/prompt", {"prompt": prompt})["prompt_id"]
        assert fal.reached[point].wait(60)
        keyed.post("/interrupt", {"prompt_id": prompt_id})
        with pytest.raises(Failed, match="interrupted"):
            keyed.wait(prompt_id)
        assert list(fal.requests.values())[-1]["cancelled"], point
        fal.queued = 1
        before = len(fal.requests)
        keyed.run(prompt)
        assert len(fal.requests) == before + 1


def test_sentences(keyed, fal):
    before = len(fal.requests)
    for changed, says in (
        ({"max_cost_usd": 0.01}, "costs $0.0400, more than max_cost_usd 0.01"),
        ({"lora_urls": "owner/name 0.5", "images.image_0": None}, "LoRAs are given but no picture"),
        ({"enable_cns": True, "cns_formula": "authors"}, "cns_formula='authors' runs only locally"),  # of an API prompt
        ({"solver": "sde_2m"}, "solver='sde_2m' runs only locally"),
        ({"enable_cns": False, "cns_churn": 1.0}, "unknown CNS parameter cns_churn"),
        ({"max_usd_a_day": 0.03}, "spent today: together more than max_usd_a_day 0.03; nothing was submitted"),
        ({"image_urls": "http://a/1.png\nhttp://a/2.png\nhttp://a/3.png\nhttp://a/4.png"}, "5 pictures are given"),
        ({"image_urls": "C:\\picture.png"}, "is not an address"),
        ({f"images.image_{i}": ["load", 0] for i in range(5)}, "5 pictures are connected"),
        ({"recover_request_id": "../x"}, "is not a request id"),
    ):
        prompt = remote_graph("refused", **changed)
        prompt["fal"]["inputs"] = {key: value for key, value in prompt["fal"]["inputs"].items() if value is not None}
        assert says in failure(keyed, prompt)
    with pytest.raises(Failed, match="cns_gamma_source: 'reference' not in"):  # by ComfyUI, before anything runs
        keyed.run(remote_graph("refused", enable_cns=True, cns_gamma_source="reference"))
    assert len(fal.requests) == before
    detail = [{"loc": ["body", "prompt"], "msg": "bad make it blue", "input": "make it blue"}]
    fal.fail(submit=answer(422, {"detail": detail}))
    text = failure(keyed, remote_graph("refused"))
    assert "refused an input: prompt: bad ..." in text and "make it blue" not in text


def test_a_lora_stack_is_uploaded_once_and_only_if_allowed(keyed, fal):
    lora = keyed.base / "models" / "loras" / "style.safetensors"
    lora.parent.mkdir(exist_ok=True)
    lora.write_bytes(b"weights of a LoRA")
    prompt = remote_graph("lora", prompt="with a LoRA")
    prompt["stack"] = stack_node("style.safetensors")
    prompt["fal"]["inputs"]["lora_stack"] = ["stack", 1]
    assert "Turn on upload_loras" in failure(keyed, prompt)
    prompt["fal"]["inputs"]["upload_loras"] = True
    for seed in (1, 2):
        prompt["fal"]["inputs"]["seed"] = seed
        keyed.run(prompt)
    bodies = [request["body"] for request in fal.requests.values() if request["body"]["prompt"] == "with a LoRA"]
    assert [body["loras"] for body in bodies] == [[{"path": bodies[0]["loras"][0]["path"], "scale": 0.75}]] * 2
    assert list(fal.uploads.values()) == [b"weights of a LoRA"]
    prompt["stack"] = stack_node("gone.safetensors")
    assert "LoRA 'gone.safetensors' does not exist" in failure(keyed, prompt)


def stack_node(name, **more):
    slots = {f"lora_{slot}": name if slot == 1 else "none" for slot in (1, 2, 3)}
    return node("KleinLoraStack", **slots, **{f"strength_{slot}": 0.75 for slot in (1, 2, 3)}, apply="auto", **more)


def route_graph(name, mode, loader, seed=1):
    """One prompt, picture and seed; local through the tiny klein, remote through fal."""
    return {
        **graph(name, OFF, ["falpicture"], loader, sampler={"seed": seed, "steps": 1, "cfg": 1.0}),
        "fal": fal_node(prompt="route", seed=seed, **{"images.image_0": ["load0", 0]}),
        "route": node("KleinRoute", mode=mode, local=["decode", 0], remote=["fal", 0]),
        "save": node("ProbeSave", name=name, image=["route", 0]),
    }


def memory(server, size):
    server.run({"memory": node("ProbeMemory", size=size)})


def test_route_runs_the_branch_taken_alone(keyed, fal):
    before = len(fal.requests)
    keyed.run(route_graph("local", "local", SINGLE))
    assert len(fal.requests) == before  # the remote branch did not run
    keyed.run(route_graph("remote", "fal", MISSING))  # the local branch did not: its files do not exist
    assert len(fal.requests) == before + 1
    assert "does not exist" in failure(keyed, route_graph("local", "local", MISSING))
    branch = {"nothing": node("ProbeFail"), "load": node("ProbeLoad", name="falpicture")}
    branch["save"] = node("ProbeSave", name="routed", image=["route", 0])
    for mode, local, remote in (("local", "load", "nothing"), ("fal", "nothing", "load")):
        keyed.run({**branch, "route": node("KleinRoute", mode=mode, local=[local, 0], remote=[remote, 0])})


def test_a_machine_without_weights_runs_a_shared_workflow_with_its_loras_through_fal(keyed, fal):
    (keyed.base / "models" / "loras" / "style.safetensors").write_bytes(b"weights of a LoRA")
    prompt = route_graph("shared", "auto", MISSING, seed=77)
    prompt["stack"] = stack_node("style.safetensors")
    prompt["applied"] = stack_node("none", model=["loader", 0], lora_stack=["stack", 1])
    prompt["sample"]["inputs"]["model"] = ["applied", 0]
    prompt["fal"]["inputs"] |= {"lora_stack": ["stack", 1], "upload_loras": True}
    keyed.run(prompt)
    body = list(fal.requests.values())[-1]["body"]
    assert body["seed"] == 77 and [lora["scale"] for lora in body["loras"]] == [0.75]


def test_route_auto_decides_by_accelerator_files_and_memory(keyed, fal):
    """The fake accelerator is all that is not real here."""
    files = [keyed.base / "models" / wanted.folder / wanted.sources[0][0] for wanted in WANTED.values()]
    sizes = sorted((file.stat().st_size, file.name) for file in files)
    (second, _), (size, name) = sizes[-2:]
    before, took, said = len(fal.requests), [], []
    for seed, (memory_size, loader) in enumerate(
        [(0, SINGLE), (10**12, MISSING), (int(size * 1.2) - 1, SINGLE), (int(size * 1.2) + 1, SINGLE)], start=100
    ):
        memory(keyed, memory_size)
        said.append("\n".join(keyed.watch(route_graph("auto", "auto", loader, seed)).texts))
        took.append(len(fal.requests) - before)
    assert took == [1, 2, 3, 3]
    assert f"too small; its 0.0 GiB are less than the largest part that must be there at once, {name}" in said[2]
    assert f"large enough; its 0.0 GiB are enough for the largest part that must be there at once, {name}" in said[3]
    if name == SINGLE["text_encoder"]:  # which stays off the accelerator where its device is the CPU
        memory(keyed, int(second * 1.2) + 1)
        keyed.run(route_graph("auto", "auto", {**SINGLE, "text_encoder_device": "cpu"}, 150))
        assert len(fal.requests) - before == 3
    memory(keyed, 10**12)
    unknown = {"load": node("ProbeLoad", name="falpicture"), "fail": node("ProbeFail")}
    unknown["route"] = node("KleinRoute", mode="auto", local=["fail", 0], remote=["load", 0])
    keyed.run({**unknown, "save": node("ProbeSave", name="unknown", image=["route", 0])})
    del unknown["route"]["inputs"]["remote"]
    text = failure(keyed, {**unknown, "save": node("ProbeSave", name="unknown", image=["route", 0])})
    assert "no Klein 9B Base Loader feeds local" in text and "Nothing is connected to remote" in text
    linked = route_graph("linked", "auto", SINGLE | {"vae": ["name", 0]})
    linked["name"] = node("ProbeName", name=SINGLE["vae"])
    del linked["route"]["inputs"]["remote"]
    assert "a link names its files, so what it needs is unknown" in failure(keyed, linked)
    memory(keyed, 0)


def test_route_gives_the_picture_that_came_whatever_changed_meanwhile(keyed, fal):
    memory(keyed, 0)
    prompt = route_graph("grown", "auto", SINGLE, seed=200)
    prompt["grow"] = node("ProbeGrow", image=["fal", 0])
    prompt["route"]["inputs"]["remote"] = ["grow", 0]
    keyed.run(prompt)
    memory(keyed, 0)
    assert tuple(made(keyed, "grown").shape) == (1, 48, 64, 3)


def test_a_recovered_request_is_the_lost_one_of_the_same_inputs(keyed, fal):
    fal.fail(submit=drop(accept=True))
    assert "Whether fal took it is unknown" in failure(keyed, remote_graph("lost", prompt="lost"))
    *_, lost = fal.requests
    assert texts(keyed.run(remote_graph("lost", prompt="lost", recover_request_id=lost)))["id"] == lost
    before = len(fal.requests)
    assert texts(keyed.run(remote_graph("lost", prompt="lost")))["cost"] == 0 and len(fal.requests) == before
    keyed.run(remote_graph("lost", seed=1, image_urls="no address", recover_request_id=lost))  # inputs are not needed
    assert len(fal.requests) == before


def test_the_requests_node_lists_what_is_open_without_fal(keyed, fal):
    def listed(name):
        heard = keyed.watch({"list": node("KleinFalRequests")})
        [text] = heard.entry["outputs"]["list"]["text"]
        assert text in heard.texts, name
        return text

    before = listed("before")
    fal.fail(submit=drop(accept=True))
    assert "Whether fal took it is unknown" in failure(keyed, remote_graph("open", prompt="open"))
    seen = len(fal.seen)
    after = listed("after")  # run again, and not from the cache
    assert len(fal.seen) == seen and "seconds old, $0.0400" in after
    spent = [float(text.split("$")[1].split()[0]) for text in (before, after)]
    assert spent[1] - spent[0] == pytest.approx(0.04)
    *_, lost = fal.requests
    keyed.run(remote_graph("open", prompt="open", recover_request_id=lost))
    assert listed("collected").count("no id") == after.count("no id") - 1
    prompt = {"list": node("KleinFalRequests"), "show": node("PreviewAny", source=["list", 0])}
    keyed.run(prompt)


def test_the_route_lists_what_is_open_until_it_is_collected(keyed, fal):
    def listed():
        return [one["request_id"] for one in keyed.get("/klein_cns/fal")["open"]]

    fal.fail(status=[answer(401)] * 9)
    failure(keyed, remote_graph("uncollected", prompt="uncollected"))
    fal.heal()
    *_, request_id = fal.requests
    seen = len(fal.seen)
    assert request_id in listed() and keyed.get("/klein_cns/fal")["key"] is True
    assert len(fal.seen) == seen
    keyed.run(remote_graph("uncollected", prompt="uncollected", recover_request_id=request_id))
    assert request_id not in listed()


def test_a_new_field_of_the_endpoint_gets_a_widget_by_its_line_alone(comfyui, server, fal, tmp_path):
    """After all others, since saved workflows know widgets by position; a prompt from before it runs as it did."""
    prepare(tmp_path, server)
    with_a_new_field(tmp_path / "custom_nodes" / "widened")
    shutil.copy(server.base / "custom_nodes" / "probe_nodes.py", tmp_path / "custom_nodes")
    running = Server(*comfyui, tmp_path, {"KLEIN_CNS_FAL_URL": fal.url, "FAL_KEY": KEY})
    try:
        give(running, "falpicture", torch.rand(1, 64, 96, 3))
        own = running.get("/object_info/KleinFalEdit")["KleinFalEdit"]
        kind, options = own["input"]["optional"]["softness"]
        assert (kind, options["default"], options["min"], options["max"]) == ("FLOAT", 0.5, 0.0, 2.0)
        assert options["tooltip"] == "How soft the picture is."
        assert own["input_order"]["optional"][-1] == "softness"
        for changed in ({}, {"softness": 1.5}):
            running.run(remote_graph("widened", prompt="widened", **changed))
        assert [request["body"]["softness"] for request in list(fal.requests.values())[-2:]] == [0.5, 1.5]
        with pytest.raises(Failed, match="softness"):
            running.run(remote_graph("widened", prompt="widened", softness=2.5))
    finally:
        running.stop()


def test_without_fal_client_the_nodes_are_there_and_say_what_to_install(comfyui, server):
    found = subprocess.run([comfyui[1], "-c", "import fal_client"], capture_output=True, check=False)
    if found.returncode == 0:
        pytest.skip("ComfyUI's own Python has fal-client, so its absence cannot be tried here")
    give(server, "falpicture", torch.rand(1, 64, 96, 3))
    prompt = {name: part for name, part in remote_graph("absent").items() if name != "text"}
    text = failure(server, prompt)
    assert "No module named 'fal_client'" in text and "pip install fal-client" in text


def test_the_key_is_nowhere(keyed, fal):
    """Log, history, workflow, pictures, journal: all files of the machine but the key's own, and what HTTP gives."""
    fal.fail(submit=answer(400, {"detail": f"Invalid key {KEY}"}))
    assert "Invalid key ..." in failure(keyed, remote_graph("leak", prompt="leak"))
    prompt = remote_graph("leak", prompt="leak 2")
    prompt["png"] = node("SaveImage", images=["fal", 0], filename_prefix="leak")
    keyed.run(prompt)
    assert list((keyed.base / "output").glob("leak*.png"))
    written = [path for name in ("user", "output", "temp", "input") for path in (keyed.base / name).rglob("*")]
    for path in [keyed.log, *written]:
        assert not path.is_file() or path.name == "fal_key" or b"secret" not in path.read_bytes(), path
    assert any(path.name == "journal.sqlite" for path in written)
    assert "secret" not in json.dumps(keyed.get("/history"))
    for attempt in ("/userdata/..%2F__klein_cns%2Ffal_key", "/userdata/fal_key", "/userdata/__klein_cns%2Ffal_key"):
        with pytest.raises(urllib.error.HTTPError):
            keyed.get(attempt)
    assert "/__klein_cns" not in json.dumps(keyed.get("/userdata?dir=.&recurse=true&split=false"))
