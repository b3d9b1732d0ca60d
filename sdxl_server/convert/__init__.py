"""Models in one file, as they are published for other programs: what a file is, and a folder for diffusers made of it.

`sdxl.json`, `sd1.json` and `sd2.json` hold what such a file leaves out, the settings of each part. `merges.txt` is
CLIP's vocabulary as open_clip_torch carries it, without the lines that CLIP does not use, under LICENSE.merges.
"""
