"""What ``klein-cns`` does: edit, generate, lora, demo. Options carry the endpoint's names."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .klein.loading import HUB_ID
from .klein.pipeline import REPORTED, KleinPipeline, check_inputs
from .klein.presets import PRESETS, preset
from .klein.request import KleinRequest
from .klein.result import FORMATS, output_files
from .klein.schedules import SCHEDULES
from .klein.sizes import latent_size
from .klein.tiny import is_tiny
from .lora import MAX_LORAS, LoraError, examine_lora, parse_loras
from .sampler.acceleration import plan
from .sampler.advice import advice
from .sampler.gamma_fits import FITS, UNGUIDED
from .sampler.params import GAMMA_FILE, PREFIX, SWITCH, CNSParams, public_name
from .sampler.progress import find_progress

NO_LOCAL_EFFECT = {
    "enable_safety_checker": "the safety checker runs at fal",
    "sync_mode": "sync_mode is about how fal returns files",
}
# What a request may hold beside the fields of KleinRequest and CNSParams.
REST = ("image_urls", "loras", "output_format", GAMMA_FILE, *NO_LOCAL_EFFECT)


def _edit(args: argparse.Namespace) -> None:
    request = _request(args)
    urls = request.pop("image_urls", [])
    if not isinstance(urls, list):
        raise ValueError(f"image_urls is {urls!r}; it must be a list of files or data: URIs.")
    pictures = args.images or urls
    if not pictures:
        raise ValueError("edit needs at least one picture; name it, or give image_urls in --params.")
    _run(args, request, pictures)


def _generate(args: argparse.Namespace) -> None:
    request = _request(args)
    if request.pop("image_urls", []):
        raise ValueError("the request has image_urls, so it edits pictures; run klein-cns edit.")
    _run(args, request, [])


def _demo(args: argparse.Namespace) -> None:
    from .klein.demo import run

    run(Path(args.output), args.seed)


def _lora(args: argparse.Namespace) -> None:
    """Print what each file is; one that cannot be used is an error after all are shown."""
    problems = []
    for file in args.files:
        try:
            report = examine_lora(file).report
        except LoraError as error:
            problems.append(str(error))
        else:
            print(report)
            if report.problem:
                problems.append(report.problem)
    if problems:
        raise ValueError("\n".join(problems))


def _run(args: argparse.Namespace, request: dict[str, Any], pictures: list[str]) -> None:
    """Check everything that can be wrong before gigabytes are loaded, then make the pictures."""
    output_format = _output_format(args)
    loras = parse_loras(request.pop("loras", []))
    gamma_file = request.pop(GAMMA_FILE, None)
    for name, why in NO_LOCAL_EFFECT.items():
        if request.pop(name, None) is not None:
            _say(f"{name} has no local effect: {why}.")
    run = KleinRequest.from_dict(request)
    cns = run.cns
    shaping = [name for name in request if name.startswith(PREFIX)]
    progress = None
    if gamma_file is not None:
        shaping.append(GAMMA_FILE)
        if cns.takes_matrix:
            progress = find_progress(gamma_file)
        elif cns.enable_cns:
            _say(f"{GAMMA_FILE} has no effect, since cns_gamma_source is {cns.gamma_source!r}.")
    if shaping and not cns.enable_cns:
        verb = "has" if len(shaping) == 1 else "have"
        _say(f"{SWITCH} is off, so {', '.join(shaping)} {verb} no effect; turn it on with --enable-cns.")
    output_files(args.output, run.num_images, output_format)
    _, (width, height) = check_inputs(run, pictures, progress)
    rows, columns = latent_size(width, height)
    sigmas = SCHEDULES[run.scheduler](run.num_inference_steps, rows * columns)
    planned = plan(run.acceleration, sigmas.tolist(), run.guidance_scale, run.solver).sentence
    if planned:
        _say(planned)
    for sentence in advice(cns, run.solver, sigmas.tolist(), run.guidance_scale):
        _say(sentence)

    try:
        pipeline = _load(args)
        pipeline.set_loras(loras)
        for report in pipeline.lora_reports:
            _say(str(report))
        result = pipeline.run(run, pictures, progress=progress, show_progress=True)
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    for path in result.save(args.output, output_format):
        print(path)
    seconds = ", ".join(f"{stage} {took:.1f} s" for stage, took in result.timings.items())
    size = result.parameters["image_size"]
    _say(f"{size['width']}x{size['height']}, seed {result.seed}; {seconds}.")


def _output_format(args: argparse.Namespace) -> str:
    """The ending of OUT decides; an option that contradicts it is an error."""
    suffix = Path(args.output).suffix.lower().lstrip(".")
    by_name = {"jpg": "jpeg"}.get(suffix, suffix)
    if by_name not in FORMATS:
        raise ValueError(
            f"the ending of {args.output} is not a picture format; allowed are .png, .jpg, .jpeg and .webp."
        )
    if args.output_format not in (None, by_name):
        raise ValueError(
            f"--output-format is {args.output_format}, but {args.output} ends in .{suffix}; give one of the two, "
            "or let them agree."
        )
    return by_name


def _load(args: argparse.Namespace) -> KleinPipeline:
    if args.model == "tiny" or is_tiny(Path(args.model)):
        _say("this is the tiny klein: random weights make noise, not pictures.")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return KleinPipeline.from_pretrained(
        args.model, torch_dtype=dtype, device=args.device, cpu_offload=args.cpu_offload
    )


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The request: --params, overridden by --preset, overridden by the options given."""
    request = _read_params(args.params) if args.params else {}
    if args.preset is not None:
        values = preset(args.preset)
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        _say(f"preset {args.preset}: {listed}. {PRESETS[args.preset].source}")
        request.update(values)
    request.update({name: getattr(args, name) for name in _request_names() if getattr(args, name, None) is not None})
    request.pop("output_format", None)  # the ending of OUT decides
    if "prompt" not in request:
        raise ValueError("there is no prompt; give -p PROMPT, or --params with one.")
    return request


def _read_params(path: str) -> dict[str, Any]:
    try:
        request = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--params {path} cannot be read as JSON: {error}.") from error
    if not isinstance(request, dict):
        raise ValueError(f"--params {path} holds a {type(request).__name__}; it must hold one JSON object.")
    known = {*_request_names(), *REPORTED}
    unknown = sorted(name for name in request if name not in known and not name.startswith(PREFIX))
    if unknown:
        raise ValueError(
            f"--params {path} has unknown {', '.join(unknown)}; known are {', '.join(sorted(_request_names()))}."
        )
    return {name: value for name, value in request.items() if name not in REPORTED and value is not None}


def _request_names() -> list[str]:
    own = [spec.name for spec in fields(KleinRequest) if spec.name != "cns"]
    return [*own, *(public_name(spec.name) for spec in fields(CNSParams)), *REST]


def _say(text: str) -> None:
    print(f"klein-cns: {text}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command's arguments; ``parse_args(...).run`` is what to call with them."""
    klein = argparse.ArgumentParser(
        prog="klein-cns", description="FLUX.2 [klein] 9B Base with Colored Noise Sampling, on your own machine."
    )
    klein.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = klein.add_subparsers(required=True, metavar="COMMAND")
    edit = commands.add_parser("edit", help="edit one to four pictures by a prompt")
    edit.add_argument("images", nargs="*", metavar="IMAGE", help="the pictures, in the order the prompt counts them")
    _add_run_options(edit, _edit)
    _add_run_options(commands.add_parser("generate", help="make pictures from a prompt"), _generate)
    lora = commands.add_parser("lora", help="say what LoRA files are, and how much of each applies to klein 9B")
    lora.add_argument("files", nargs="+", metavar="FILE", help="a .safetensors file, or a peft folder")
    lora.set_defaults(run=_lora)
    demo = commands.add_parser("demo", help="edit a photograph with random weights, and plot what CNS does")
    demo.add_argument("-o", "--output", default="klein-cns-demo", metavar="FOLDER", help="default %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default %(default)s")
    demo.set_defaults(run=_demo)
    return klein


def _add_run_options(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None]) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--params", metavar="FILE.json", help="a request as the endpoint takes it; options override it")
    names = ", ".join(f"'{name}'" for name in PRESETS)
    parser.add_argument("--preset", metavar="NAME", help=f"a named set of values; options override it: {names}")
    parser.add_argument("--lora", dest="loras", action="append", metavar="PATH:SCALE", help=f"up to {MAX_LORAS} times")
    parser.add_argument("--output-format", choices=tuple(FORMATS), help="default: the ending of OUT")
    machine = parser.add_argument_group("model and machine")
    machine.add_argument("--model", default=HUB_ID, metavar="FOLDER|HUB_ID|tiny", help="default %(default)s")
    machine.add_argument("--device", help="default: the accelerator if there is one")
    machine.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on an accelerator"
    )
    machine.add_argument("--cpu-offload", action="store_true", help="keep idle components in main memory")
    _add_fields(parser.add_argument_group("request"), KleinRequest, lambda name: name)
    cns = parser.add_argument_group("Colored Noise Sampling")
    _add_fields(cns, CNSParams, public_name)
    cns.add_argument(
        f"--{GAMMA_FILE.replace('_', '-')}",
        metavar="FILE|NAME",
        help=f"a measured gamma, or a shipped one: {', '.join(FITS)}. Default {UNGUIDED}.",
    )


def _add_fields(group: Any, cls: type, public: Callable[[str], str]) -> None:
    """One option for each field; its default is None, so that only what is given overrides --params."""
    for spec in fields(cls):
        if spec.name == "cns":
            continue
        flags = [f"--{public(spec.name).replace('_', '-')}"]
        if spec.name == "prompt":
            flags.insert(0, "-p")
        meta, text = spec.metadata, spec.metadata["help"].replace("%", "%%")
        if isinstance(spec.default, bool):
            default = False if spec.name == SWITCH else spec.default
            group.add_argument(
                *flags,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=f"{text} Default {'on' if default else 'off'}.",
            )
            continue
        options: dict[str, Any] = {"metavar": "TEXT"}
        if "options" in meta:
            options = {"metavar": "|".join(meta["options"])}
        elif "min" in meta:
            whole = isinstance(meta["step"], int)
            options = {"type": int if whole else float, "metavar": f"{meta['min']}..{meta['max']}"}
        if spec.name != "prompt" and spec.default not in (None, ""):
            text = f"{text} Default {spec.default}."
        group.add_argument(*flags, help=text, **options)
