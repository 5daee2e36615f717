"""Klein on fal: the same edit on fal's endpoints, submitted once and never lost.

``execute`` is synchronous on purpose: an asynchronous node shares its event loop with samplers that block it for
minutes, and another node would take the interrupt that is meant for this one. The remote run has its own event loop.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..endpoint import AUTO, IMAGE_SIZES, MAX_IMAGES, MAX_LORAS, MAX_SIDE
from ..klein.references import to_image, to_pixels
from ..remote.fields import CUSTOM, ENDPOINT_SOLVER, MIN_SIDE, specs
from ..sampler.params import PREFIX, SWITCH, CNSParams
from .cns_inputs import widget
from .common import CATEGORY
from .lora_stack import LoraStack, find, given_stack
from .messages import SAYS, said, show
from .pictures import picture_inputs, split_pictures

FOLDER = "klein_cns"  # in ComfyUI's user directory, as __klein_cns: no HTTP route reads it
RESULTS = "klein_fal"  # in ComfyUI's output folder
SPECS = specs()
PROMPTS = ("prompt", "negative_prompt")
CNS = tuple(name for name in SPECS if name == SWITCH or name.startswith(PREFIX))
# Saved workflows know widgets by position: what comes after these is appended.
PLACED = (
    *PROMPTS,
    "guidance_scale",
    "seed",
    "num_inference_steps",
    "num_images",
    "acceleration",
    "enable_safety_checker",
    "output_format",
    *CNS,
    "sync_mode",
)
# For a node fresh from the menu: another seed is another purchase. ComfyUI before 0.14 has no such choice.
SEED_CONTROL = io.ControlAfterGenerate.fixed if hasattr(io, "ControlAfterGenerate") else True


class KleinFalEdit(io.ComfyNode):
    """Prompts, pictures and LoRAs in; pictures made by fal out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KleinFalEdit",
            display_name="Klein on fal",
            category=CATEGORY,
            description="Makes or edits pictures with FLUX.2 [klein] 9B Base on fal, with the endpoint's controls. "
            "fal charges for it.",
            search_aliases=["fal", "klein remote", "klein api", "flux2 fal"],
            inputs=[
                *(
                    io.String.Input(name, multiline=True, dynamic_prompts=True, default="", tooltip=_help(name))
                    for name in PROMPTS
                ),
                *picture_inputs("A picture to edit or to refer to; it is sent to fal."),
                LoraStack.Input(
                    "lora_stack",
                    optional=True,
                    tooltip=f"LoRA files of this machine, from Klein LoRA Stack; at most {MAX_LORAS} with lora_urls.",
                ),
                io.Boolean.Input(
                    "upload_loras",
                    default=False,
                    tooltip="Allow the LoRA files of lora_stack to be put on fal's servers, each once, at an address "
                    "that anyone who knows it can read.",
                ),
                io.String.Input(
                    "lora_urls",
                    multiline=True,
                    default="",
                    tooltip="LoRAs that fal fetches, one a line: address or Hugging Face repository, then the scale.",
                ),
                _widget("guidance_scale"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SPECS["seed"].metadata["max"],
                    control_after_generate=SEED_CONTROL,
                    tooltip=_help("seed"),
                ),
                _widget("num_inference_steps"),
                io.Combo.Input(
                    "image_size",
                    options=[AUTO, *IMAGE_SIZES, CUSTOM],
                    default=AUTO,
                    tooltip="auto: the first picture's size, as fal takes it. custom: width and height.",
                ),
                *(
                    io.Int.Input(side, default=1024, min=MIN_SIDE, max=MAX_SIDE, tooltip="Of the result, for custom.")
                    for side in ("width", "height")
                ),
                *map(_widget, ("num_images", "acceleration", "enable_safety_checker", "output_format", *CNS)),
                io.Float.Input(
                    "max_cost_usd",
                    default=0.5,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="A request that costs more is refused. $0.02 for each megapixel of input and output; with "
                    "auto at most. Whether fal rounds megapixels up is not documented.",
                ),
                io.String.Input(
                    "image_urls",
                    multiline=True,
                    default="",
                    advanced=True,
                    tooltip=f"Addresses of pictures that fal fetches, one a line, after the connected ones; at most "
                    f"{MAX_IMAGES} together.",
                ),
                _widget("sync_mode", advanced=True),
                io.String.Input(
                    "recover_request_id",
                    default="",
                    advanced=True,
                    tooltip="Collect this request from fal and submit nothing. If the submission of the inputs above "
                    "was lost, it is then theirs; else they are left aside.",
                ),
                io.Boolean.Input(
                    "resubmit_lost",
                    default=False,
                    advanced=True,
                    tooltip="Submit again what an earlier run submitted without learning its fate, or what fal no "
                    "longer has. It may be charged twice.",
                ),
                io.Combo.Input(
                    "on_flagged",
                    options=["error", "pass"],
                    default="error",
                    advanced=True,
                    tooltip="What to do with pictures that fal's safety checker flagged (they come black).",
                ),
                io.Float.Input(
                    "max_usd_a_day",
                    default=0.0,
                    min=0.0,
                    max=10000.0,
                    step=0.5,
                    optional=True,
                    advanced=True,
                    tooltip="A request is refused that would bring the spending since midnight above this; 0 is no "
                    "limit. Klein fal Requests shows the spending.",
                ),
                *_appended(),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="A list: sizes may differ."),
                io.Int.Output(display_name="seed", tooltip="The seed that fal used."),
                io.String.Output(display_name="request_id", tooltip="fal's name for the request."),
                io.Float.Output(
                    display_name="cost_usd", tooltip="What this run submitted; 0 where it collected an earlier request."
                ),
                io.String.Output(display_name="result", tooltip="fal's whole response, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            accept_all_inputs=True,  # so that a local control in an API prompt is refused, and not left out
            **SAYS,
        )

    @classmethod
    def execute(cls, lora_stack: Any = None, max_usd_a_day: float = 0.0, **values: Any) -> io.NodeOutput:
        key, orders, queue, runs = _remote()
        images = {name: values.pop(name) for name in list(values) if name.startswith("images.")}
        recovering = values["recover_request_id"].strip()
        notes: list[str] = []
        try:
            pictures, notes = split_pictures(images)
            order = _order(orders, pictures, lora_stack, values)
        except (ValueError, RuntimeError):  # a request can be recovered without the inputs that it was made from
            if not recovering:
                raise
            order = None
        if recovering:
            task = runs.Recovery(request_id=recovering, order=order)
        else:
            task = runs.Submission(
                order=order,
                max_cost_usd=values["max_cost_usd"],
                max_usd_a_day=max_usd_a_day,
                resubmit_lost=values["resubmit_lost"],
            )
        folder = Path(folder_paths.get_system_user_directory(FOLDER))

        def progress(text: str) -> None:
            show(cls.hidden.unique_id, text)

        collected = runs.run(
            task,
            key=key.read_key(os.environ, folder / key.FILE),
            address=os.environ.get(queue.ADDRESS),
            folder=folder,
            results=Path(folder_paths.get_output_directory()) / RESULTS,
            refuse_flagged=values["on_flagged"] == "error",
            check=comfy.model_management.throw_exception_if_processing_interrupted,
            progress=progress,
        )
        if collected.cost_usd:
            cost = f"${collected.cost_usd:.4f}: saved"
        else:
            cost = "nothing charged: collected an earlier request, which is saved"
        saved = f"{cost} in ComfyUI's output folder as {RESULTS}/{collected.files[0].name}"
        return io.NodeOutput(
            [to_pixels(picture).movedim(1, -1) for picture in collected.images],
            values["seed"] if collected.seed is None else collected.seed,
            collected.request_id,
            collected.cost_usd,
            collected.response,
            ui=said(saved, *collected.warnings, *notes),
        )


def _remote() -> tuple[Any, Any, Any, Any]:
    """The modules key, order, queue and run of the remote client, loaded when a run needs them."""
    try:
        import fal_client.client  # noqa: F401 - a missing one must show before anything is submitted

        from ..remote import key, order, queue, run
    except ImportError as error:
        raise RuntimeError(
            f"Klein on fal needs packages that this Python lacks ({error}). Install them into ComfyUI's own Python: "
            "python -m pip install fal-client pydantic filelock"
        ) from None
    return key, order, queue, run


def _order(orders: Any, pictures: list[Tensor], lora_stack: Any, values: dict[str, Any]) -> Any:
    """The node's inputs as an `Order`."""
    if values.get("solver", ENDPOINT_SOLVER) != ENDPOINT_SOLVER:  # of an API prompt
        raise ValueError(
            f"solver={values['solver']!r} runs only locally; the endpoint has only {ENDPOINT_SOLVER}. Leave it out."
        )
    params = CNSParams.from_endpoint(values)
    cns = params if params.enable_cns else CNSParams(enable_cns=False)  # off, their values decide nothing
    custom = values["image_size"] == CUSTOM
    arguments = {
        **{name: values.get(name, spec.default) for name, spec in SPECS.items()},
        **cns.to_endpoint(),
        "image_size": (values["width"], values["height"]) if custom else values["image_size"],
    }
    addresses = orders.parse_image_urls(values["image_urls"])
    loras = [*_lora_files(lora_stack, values["upload_loras"]), *orders.parse_lora_urls(values["lora_urls"])]
    return orders.make_order(arguments, [*(to_image(picture[0]) for picture in pictures), *addresses], loras)


def _lora_files(stack: Any, allowed: bool) -> list[tuple[Path, float]]:
    """(file, scale) of each entry of a LORA_STACK; the strength for CLIP has no counterpart at fal.

    Raises:
        ValueError: uploading is not allowed, or a file does not exist.
    """
    entries = given_stack(stack)
    if entries and not allowed:
        raise ValueError(
            f"lora_stack holds {', '.join(name for name, *_ in entries)}, which fal can use only if they are put on "
            "its servers. Turn on upload_loras, or give their addresses in lora_urls."
        )
    return [(Path(find(name)), strength) for name, strength, _ in entries]


def _help(name: str) -> str:
    return SPECS[name].metadata["help"]


def _widget(name: str, advanced: bool | None = None) -> io.Input:
    spec = SPECS[name]
    if isinstance(spec.default, str) and "options" not in spec.metadata:
        return io.String.Input(name, default=spec.default, tooltip=_help(name), advanced=advanced)
    return widget(name, spec, advanced)


def _appended() -> list[io.Input]:
    """A widget for each field of the endpoint that has no place of its own above; older prompts lack it."""
    found = [_widget(name, advanced=True) for name in SPECS if name not in PLACED]
    for entry in found:
        entry.optional = True
    return found
