"""What the two endpoints document: the oracle for names, order, defaults, ranges and options."""

from __future__ import annotations

from typing import Any

REQUIRED = object()
# name: (type, default, range or options), in the endpoints' order
BOTH: dict[str, tuple[type, Any, tuple[Any, ...] | None]] = {
    "prompt": (str, REQUIRED, None),
    "negative_prompt": (str, "", None),
    "guidance_scale": (float, 5, (0, 20)),
    "seed": (int, None, None),
    "num_inference_steps": (int, 28, (4, 50)),
    "image_size": (object, None, None),
    "num_images": (int, 1, (1, 4)),
    "acceleration": (str, "regular", ("none", "regular", "high")),
    "sync_mode": (bool, False, None),
    "enable_safety_checker": (bool, True, None),
    "output_format": (str, "png", ("jpeg", "png", "webp")),
    "enable_cns": (bool, False, None),
    "cns_s_churn": (float, 0.5, (0, 2)),
    "cns_gamma_source": (str, "matrix", ("matrix", "approximation")),
    "cns_power_gamma": (float, 0.75, (0.1, 3)),
    "cns_gamma_divider": (float, 1.73, (0.1, 50)),
    "cns_alpha_tilt_start": (float, 0.15, (-2, 2)),
    "cns_alpha_tilt_end": (float, -0.5, (-2, 2)),
    "cns_alpha_use_fnorm": (bool, True, None),
    "cns_alpha_exp_interp": (bool, True, None),
    "cns_alpha_exp_sharpness": (float, 0.75, (0.1, 10)),
    "cns_num_freq_bins": (int, 32, (8, 128)),
    "cns_energy_scale": (float, 0.98, (0.5, 1.5)),
}
EDIT_ALONE: dict[str, tuple[type, Any, tuple[Any, ...] | None]] = {
    "image_urls": (list, REQUIRED, None),
    "loras": (list, [], None),
}
PRESETS = ("square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9")
# The endpoint's own complete example leaves these out, enable_cns among them, though it gives every cns_ value.
LEFT_OUT = ("negative_prompt", "seed", "sync_mode", "enable_cns")


def complete_request(picture: str) -> dict[str, Any]:
    """A request with what the edit endpoint's complete example gives; whole numbers are ints there too."""
    request = {name: default for name, (_, default, _) in BOTH.items() if name not in LEFT_OUT}
    size = {"height": 1152, "width": 2016}
    return {**request, "prompt": "a red coat", "image_size": size, "image_urls": [picture], "loras": []}
