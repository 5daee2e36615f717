"""FLUX.2 [klein] 9B Base, local and exact: Colored Noise Sampling, multi-image edits, LoRAs.

Imports without ComfyUI and without diffusers; both are loaded where they are used.
"""
