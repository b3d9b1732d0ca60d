"""Single-file checkpoints: recognise the model in a file and convert it into a folder for diffusers.

A checkpoint lacks the settings of its components. They are in `sdxl.json`, `sd1.json` and `sd2.json`. `merges.txt` is
CLIP's vocabulary from open_clip_torch, without the lines that CLIP does not use; see LICENSE.merges.
"""
