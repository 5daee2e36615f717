"""FLUX.2 [klein] 9B Base, local and exact: Colored Noise Sampling, multi-image edits, LoRAs.

Imports without ComfyUI and without diffusers; both are loaded where they are used.
"""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The pack's nodes, for ComfyUI."""
    try:
        from .nodes import KleinExtension
    except Exception:  # ComfyUI would log one line without a traceback
        logging.exception("klein-cns: the nodes could not be imported")
        raise
    return KleinExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
