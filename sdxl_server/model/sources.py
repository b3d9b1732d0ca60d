"""Where a model comes from: pages of the hub, and what is meant by a path or an address without a pipeline."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sdxl_server.convert.weights_files import PICKLES, explain_pickle
from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import HUB_ID, check_links, is_weights

INDEX = "model_index.json"
SAFETENSORS, GGUF = ".safetensors", ".gguf"
SINGLE_FILES = (SAFETENSORS, GGUF, *PICKLES)  # suffixes of models in one file, readable or not
MAX_NAMED = 3  # files or folders in one message
# A page of the hub: a model, or a revision, folder or file of it.
HUB_PAGE = re.compile(
    r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/(?!(api|collections|datasets|docs|spaces)/)(?P<model>[\w.-]+/[\w.-]+)"
    r"(/((?P<view>blob|resolve|raw|tree|commits?)/(?P<revision>[^/?#]+)(/(?P<path>[^?#]*))?|[\w-]+[^?#]*))?/?([?#].*)?"
)
OTHER_ADDRESS = re.compile(r"[a-z][a-z\d+.-]*://.*|(www\.)?(civitai\.\w+|huggingface\.co|hf\.co)/.*", re.IGNORECASE)


def read_hub_page(model: str) -> tuple[str, str | None]:
    """Return the id, or owner/name/file, and the revision that an address of the hub names; another text unchanged.

    The revision `main` is None, as without an address.
    """
    found = HUB_PAGE.fullmatch(model)
    if found is None or os.path.exists(model):
        return model, None
    path, revision = unquote(found["path"] or ""), unquote(found["revision"] or "")
    is_file = found["view"] != "tree" and path.lower().endswith(SINGLE_FILES)
    return f"{found['model']}/{path}" if is_file else found["model"], None if revision == "main" else revision or None


def explain_address(address: str) -> tuple[str, str] | None:
    """Say why nothing is downloaded from an address, and name the file to give instead; None for another text."""
    if not OTHER_ADDRESS.fullmatch(address) or os.path.exists(address):
        return None
    name = unquote(urlsplit(address).path.rpartition("/")[2])
    return (
        f"{address} is no page of a model on huggingface.co, and only these are read. Download the model's "
        ".safetensors file from there yourself, then give this file",
        name if name.lower().endswith(SAFETENSORS) else "model.safetensors",
    )


def explain_listing(names: Iterable[str]) -> tuple[str, str | None]:
    """Say what a folder without model_index.json holds, and return the name of the folder or file that is meant.

    Args:
        names: of all files, relative to the folder.
    """
    shown = sorted(name for name in names if not re.search(r"(^|/)(\.|__MACOSX/)", name))
    pipelines = [name.removesuffix(f"/{INDEX}") for name in shown if name.endswith(f"/{INDEX}")]
    if pipelines:
        return f"the pipeline is in {_join(pipelines)}", pipelines[0]
    here = [name for name in shown if "/" not in name]
    if "config.json" in here and any(map(is_weights, here)):
        return "it holds one component of a pipeline, not the whole", None
    for suffix in (SAFETENSORS, *PICKLES, GGUF):
        if files := [name for name in here if name.lower().endswith(suffix)]:
            what = "a model in one file" if len(files) == 1 else "models in one file each"
            return f"it holds {what}, {_join(files)}", files[0]
    return "it is another folder", None


def explain_folder(folder: Path) -> tuple[str, Path | None]:
    """Say what a folder without model_index.json is, and return the folder or file that is meant."""
    if above := _find_pipeline_above(folder):
        return f"it is inside the pipeline's folder {above}", above
    depths = ("*", *(f"{depth}/{INDEX}" for depth in ("*", "*/*", "*/*/*")))
    files = (path for depth in depths for path in folder.glob(depth) if path.is_file())
    what, name = explain_listing(path.relative_to(folder).as_posix() for path in files)
    return what, None if name is None else folder / name


def check_has_pipeline(given: str, model_dir: Path) -> None:
    """Refuse handler.model_path if it names another place than the folder of a pipeline.

    Args:
        given: the value of the setting.
        model_dir: where a relative path is looked up.

    Raises:
        ConfigError: names what is there, and the right value or command.
    """
    check_links([model_dir / given, model_dir / given / INDEX])
    if not os.path.isfile(model_dir / given / INDEX):
        raise ConfigError(f"handler.model_path takes the folder of a diffusers pipeline. {_explain(given, model_dir)}")


def _explain(given: str, model_dir: Path) -> str:
    """Say what a path without a pipeline is, and what to do."""
    path, is_here = model_dir / given, os.path.isfile(model_dir / given)
    if os.path.isdir(path):
        what, meant = explain_folder(path)
        if meant is not None and meant.is_dir():
            return f"{path} has no {INDEX}: {what}. {_advise_setting(meant, model_dir)}"
        return f"{path} has no {INDEX}: {what}. {_advise(meant, folder=f'{path}-whole')}"
    model, _ = read_hub_page(given)
    if explained := explain_address(model):
        return f"{explained[0]}: {_write_command(explained[1])}"
    if is_here and (above := _find_pipeline_above(path)):
        return f"{path} is a file inside the pipeline's folder {above}. {_advise_setting(above, model_dir)}"
    if model.lower().endswith(SINGLE_FILES):
        advice = _advise(path if is_here else Path(model), folder=str(path.with_suffix("")) if is_here else None)
        return f"{given} is a model in one file. {advice}"
    if HUB_ID.fullmatch(model):
        return f"There is no folder {given}. If it is a model on the hub, download it by: {_write_command(model)}"
    return f"There is none in {path}. {_advise(None)}"


def _find_pipeline_above(path: Path) -> Path | None:
    """Return the pipeline's folder that contains a file or a component's folder."""
    return next((parent for parent in list(path.absolute().parents)[:2] if (parent / INDEX).is_file()), None)


def _advise_setting(folder: Path, model_dir: Path) -> str:
    """Name a pipeline's folder as the setting does. Each start unpacks the archive into another model_dir."""
    return f"Set model_path to {folder.relative_to(model_dir) if folder.is_relative_to(model_dir) else folder}"


def _advise(file: Path | None, *, folder: str | None = None) -> str:
    """Say how to make a pipeline's folder of a file. Without a file: how to download one."""
    if file is None:
        return "python Download_model.py downloads one"
    if file.suffix.lower() in PICKLES:
        return explain_pickle(file, "a pickle")
    if file.suffix.lower() == GGUF:
        return explain_gguf(file)
    return f"Make a folder of it by: {_write_command(str(file), folder=folder)}"


def explain_gguf(file: Path) -> str:
    """Return the message that refuses weights in GGUF."""
    return f"{file} is in GGUF, which is not read: use the model's .safetensors file"


def _write_command(model: str, *, folder: str | None = None) -> str:
    words = ["python", "Download_model.py", "--model", model, *(() if folder is None else ("--output-dir", folder))]
    return shlex.join(words)


def _join(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
