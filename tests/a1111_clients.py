"""Requests as public clients of A1111's API write them, by their sources."""

from typing import Any

# SillyTavern/SillyTavern: public/scripts/extensions/stable-diffusion/index.js
SILLY_TAVERN: dict[str, Any] = {
    **{"url": "https://localhost", "auth": "name:key", "prompt": "a red fox", "negative_prompt": "blurry"},
    **{"sampler_name": "DPM++ 2M", "scheduler": "karras", "steps": 3, "cfg_scale": 7, "width": 64, "height": 64},
    **{"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.5},
    **{"hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0},
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    **{"override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True},
    **{"do_not_save_grid": False, "do_not_save_samples": False},
}
# SillyTavern's questions before it.
SILLY_TAVERN_ASKS = ("options", "samplers", "schedulers", "sd-models", "upscalers", "latent-upscale-modes", "sd-vae")
# open-webui/open-webui: backend/open_webui/routers/images.py
OPEN_WEBUI: dict[str, Any] = {
    **{"prompt": "a red fox", "batch_size": 2, "width": 64, "height": 64, "steps": 3, "negative_prompt": "blurry"},
    # AUTOMATIC1111_PARAMS
    **{"cfg_scale": 6.5, "sampler_name": "Euler a", "scheduler": "Karras"},
}
OPEN_WEBUI_ASKS = ("options", "sd-models")
