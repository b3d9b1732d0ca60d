"""Download a diffusers pipeline into a folder: only the needed files, and no pickles.

Weights of the fp16 variant (`model.fp16.safetensors`) get the plain name (`model.safetensors`). Every diffusers program
can then load the folder. The same command continues an interrupted download. model_index.json comes last, so a folder
with this file is complete. source.json names the model in the folder.

--model also takes a whole model in one .safetensors, and converts it offline. --vae without --model downloads a VAE
alone, for vae_path in model-config.yaml. The option --control downloads and checks a control. The safety checker of
Stable Diffusion 1.x needs --safety-checker.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sdxl_server.convert.digests import digest_file
from sdxl_server.model.folders import FP16_MARK, explain_broken_link, is_weights
from sdxl_server.model.sources import (
    GGUF,
    INDEX,
    SAFETENSORS,
    SINGLE_FILES,
    explain_address,
    explain_folder,
    explain_gguf,
    explain_listing,
    read_hub_page,
)

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
DEFAULT_REVISION = "462165984030d82259a11f4367a4eed129e94a7b"
DEMO_FOLDER = Path(__file__).parent / "demo/model"
DEFAULT_FOLDER, DEFAULT_VAE_FOLDER = Path("Base_Diffusion_model"), Path("VAE")
CONFIG = "config.json"
RECORD, DIGEST = "source.json", "sha256"
SETTINGS = (".json", ".txt", ".model")
PICKLES = (".bin", ".ckpt", ".msgpack", ".pt", ".pth")
SAFETY_CHECKER = ("safety_checker", "feature_extractor")
IP_ADAPTER = re.compile(r"ip[-_]?adapter", re.IGNORECASE)
FILE_ON_HUB = re.compile(r"(?P<model>[\w.-]+/[\w.-]+)/(?P<name>[^?]+)")  # owner/name/file.safetensors


class DownloadError(Exception):
    """The model cannot be downloaded; the message is one line.

    Attributes:
        instead: the value of --model that is probably meant.
    """

    def __init__(self, message: str, *, instead: str | None = None) -> None:
        super().__init__(message)
        self.instead = instead


@dataclass(frozen=True)
class SourceFile:
    """One file of a pipeline.

    Attributes:
        name: the path at the source, relative to the pipeline's folder.
        size: bytes.
        sha256: the digest of the content, if the source states it.
        content: what is saved instead of the source's content.
    """

    name: str
    size: int
    sha256: str | None = None
    content: bytes | None = dataclasses.field(default=None, repr=False)

    @property
    def saved_name(self) -> str:
        """The path in the output folder."""
        return self.name.replace(FP16_MARK, "")

    def is_saved(self, target: Path) -> bool:
        """Say whether a path holds the file."""
        return target.exists() and (self.content is None or target.read_bytes() == self.content)


@dataclass(frozen=True)
class Source:
    """A pipeline on the hub or in a local folder.

    Attributes:
        model: the hub's id or the local folder's name.
        revision: the hub's commit or the local files' fingerprint.
        files: all files, needed or not.
        fetch: appends the missing bytes of a source file to an open file.
        explain: says what is there instead of a pipeline, and returns the --model that is probably meant.
    """

    model: str
    revision: str
    files: Sequence[SourceFile]
    fetch: Callable[[SourceFile, BinaryIO], None]
    explain: Callable[[], tuple[str, str | None]]


def open_hub(model: str, revision: str) -> Source:
    """Return the pipeline with this id on the hub."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    info = HfApi().model_info(model, revision=revision, files_metadata=True)

    def fetch(file: SourceFile, stream: BinaryIO) -> None:
        # Not hf_hub_download: an interrupt makes its version 2.4.0 delete the partial file
        http_get(
            hf_hub_url(model, file.name, revision=info.sha),
            stream,
            resume_size=stream.tell(),
            expected_size=file.size,
            headers=build_hf_headers(),
            displayed_filename=file.name,
        )

    def explain() -> tuple[str, str | None]:
        what, name = explain_listing(each.rfilename for each in info.siblings)
        return what, f"{model}/{name}" if name and is_single_file(name) else None

    files = [SourceFile(each.rfilename, each.size, each.lfs and each.lfs.sha256) for each in info.siblings]
    return Source(model, info.sha, files, fetch, explain)


def open_folder(folder: Path) -> Source:
    """Return the pipeline in a local folder.

    Raises:
        DownloadError: one of its files is a link that leads nowhere.
    """

    def fetch(file: SourceFile, stream: BinaryIO) -> None:
        with (folder / file.name).open("rb") as original:
            original.seek(stream.tell())
            shutil.copyfileobj(original, stream)

    def explain() -> tuple[str, str | None]:
        what, meant = explain_folder(folder)
        return what, None if meant is None else str(meant)

    needed = sorted(path for path in (*folder.glob("*"), *folder.glob("*/*")) if is_needed(path.name))
    for path in needed:
        if explained := explain_broken_link(path):
            raise DownloadError(explained)
    paths = [path for path in needed if path.is_file()]
    files = [SourceFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    fingerprint = hashlib.sha256(repr((files, times)).encode()).hexdigest()
    return Source(folder.resolve().name, fingerprint, files, fetch, explain)


def is_needed(name: str) -> bool:
    """Say whether a file can be a part of a pipeline; hidden files cannot. Pickles are named in messages."""
    return name.endswith((*SETTINGS, SAFETENSORS, *PICKLES)) and not name.startswith(".")


def select_weights(names: Iterable[str], dtype: str) -> list[str]:
    """Return the names of one component's weights: the fp16 variant if wanted and present, or the plain ones."""
    weights = [name for name in names if is_weights(name)]
    plain = [name for name in weights if FP16_MARK not in name]
    half = [name for name in weights if FP16_MARK in name]
    return half or plain if dtype == "fp16" else plain


def select_files(index: dict[str, Any], files: Sequence[SourceFile], dtype: str) -> list[SourceFile]:
    """Return the files that the pipeline needs, except model_index.json.

    Raises:
        DownloadError: a component has no files, or a model has no weights in safetensors.
    """
    from sdxl_server.convert.weights_files import explain_pickle

    # A component is an attribute of the pipeline. Other names, such as "..", are not accepted from a hub.
    components = [
        name
        for name, value in index.items()  # [library, class], or [null, null] for an absent component
        if isinstance(value, list) and [type(item) for item in value] == [str, str] and name.isidentifier()
    ]
    chosen, problems = [], []
    for component in components:
        held = {each.name.rpartition("/")[2]: each for each in files if each.name.rpartition("/")[0] == component}
        inside = {name: each for name, each in held.items() if is_needed(name)}
        weights = select_weights(inside, dtype)
        chosen += [inside[name] for name in inside if name.endswith(SETTINGS) and ".index." not in name]
        chosen += [inside[name] for name in weights]
        if not inside:
            problems.append(f"{component} is missing")
        elif "config.json" in inside and not weights:  # only models have this file
            pickles = [name for name in inside if name.endswith(PICKLES)]
            advice = f": {explain_pickle(Path(component) / pickles[0], 'a pickle')}" if pickles else ""
            problems.append(f"{component} has no {dtype} weights in safetensors{advice}")
    if problems or not components:
        raise DownloadError("; ".join(problems) or f"{INDEX} names no components")
    return chosen


def check_folder(folder: Path, record: dict[str, str]) -> None:
    """Refuse a folder that holds something else, so that two models never mix."""
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    path = folder / RECORD
    held = json.loads(path.read_text()) if path.exists() else {"model": "files of another origin"}
    held.pop(DIGEST, None)  # the other entries imply it, and older versions did not write it
    if held != record:
        is_held, is_wanted = " ".join(held.values()), " ".join(record.values())
        raise DownloadError(
            f"{folder} holds {is_held}, not {is_wanted}: remove the folder or choose another --output-dir"
        )


def check_disk_space(folder: Path, needed: int) -> None:
    """Refuse a download that the disk cannot hold.

    Args:
        needed: bytes.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DownloadError(f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on the disk of {folder}")


def get_partial_path(target: Path) -> Path:
    """Return the path of an incomplete file."""
    return target.with_name(target.name + ".incomplete")


def rename_shards(index: Path) -> None:
    """Write the saved names of the shards into their index."""
    content = json.loads(index.read_text())
    content["weight_map"] = {weight: name.replace(FP16_MARK, "") for weight, name in content["weight_map"].items()}
    index.write_text(json.dumps(content, indent=2) + "\n")


def fetch_file(source: Source, file: SourceFile, target: Path) -> None:
    """Download one file, or its missing part; only a complete file gets its name."""
    partial = get_partial_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    is_shard_index = target.name.endswith(".index.json")
    is_edited = is_shard_index or file.content is not None  # so it cannot be continued
    with partial.open("wb" if is_edited else "ab") as stream:
        if file.content is None:
            source.fetch(file, stream)
        else:
            stream.write(file.content)
    if file.sha256 and digest_file(partial) != file.sha256:
        partial.unlink()
        raise DownloadError(f"{file.name} arrived damaged and was removed; run the same command again")
    if is_shard_index:
        rename_shards(partial)
    partial.replace(target)


def is_single_file(model: str) -> bool:
    """Say whether this is a model in one file, not a folder or an id."""
    return Path(model).is_file() or model.lower().endswith(SINGLE_FILES)


def check_no_pickle(name: str) -> None:
    """Refuse a pickle, and weights in GGUF, by the name and before the download."""
    from sdxl_server.convert.weights_files import PICKLES, explain_pickle

    if name.lower().endswith(PICKLES):
        raise DownloadError(explain_pickle(Path(name), "a pickle"))
    if name.lower().endswith(GGUF):
        raise DownloadError(explain_gguf(Path(name)))


def open_single_file(model: str, revision: str | None) -> tuple[dict[str, str], Source | None, SourceFile | None]:
    """Return the record of a model in one file; for a file on the hub also its source and entry."""
    path = Path(model)
    if path.is_file():
        if revision:
            raise DownloadError(f"--revision is for a model on the hub, and {model} is a local file: leave it out")
        check_no_pickle(path.name)
        return {"model": path.name, "revision": digest_file(path)}, None, None
    source, file = find_hub_file(model, revision)
    return {"model": f"{source.model}/{file.name}", "revision": source.revision}, source, file


def find_hub_file(model: str, revision: str | None) -> tuple[Source, SourceFile]:
    """Return the entry of a file on the hub, and its source."""
    match = FILE_ON_HUB.fullmatch(model)
    if match is None or model.startswith((".", "/")):
        raise DownloadError(
            f"{model} is no local file, no owner/name/file.safetensors and no page of a file on the hub"
        )
    check_no_pickle(match["name"])
    source = open_hub(match["model"], revision or "main")
    file = next((each for each in source.files if each.name == match["name"]), None)
    if file is None:
        names = (each.name for each in source.files if "/" not in each.name)
        held = ", ".join(name for name in names if name.endswith(".safetensors"))
        raise DownloadError(f"{source.model} has no file {match['name']}; it has these .safetensors: {held or 'none'}")
    return source, file


def find_original_config(path: Path, source: Source | None, file: SourceFile | None) -> SourceFile | None:
    """Return the .yaml next to a model in one file, here or at its source."""
    from sdxl_server.convert.original_config import check_config_size, find_config, is_config_of

    config = None
    if source and file:
        config = next((each for each in source.files if is_config_of(Path(file.name), Path(each.name))), None)
    elif own := find_config(path):
        config = SourceFile(own.name, own.stat().st_size, digest_file(own))
    if config:
        check_config_size(config.name, config.size)
    return config


def make_from_single_file(
    model: str, revision: str | None, *, folder: Path, dtype: str, prediction: str | None, vae: Path | None
) -> None:
    """Convert a model in one file into the folder, after its download if it is on the hub."""
    from sdxl_server.convert.conversion import check_weight_counts, convert_to_folder, count_bytes
    from sdxl_server.convert.recognition import recognise_checkpoint
    from sdxl_server.sampling.few_steps import describe_few_step_name

    origin, source, file = open_single_file(model, revision)
    record = {**origin, "dtype": dtype, **describe_vae(vae)}
    if prediction:
        record["prediction_type"] = prediction
    path = Path(model)
    config = None if prediction else find_original_config(path, source, file)
    if config:  # another configuration can make another folder
        record["config"] = " ".join(filter(None, (config.name, config.sha256)))
    check_folder(folder, record)
    if (folder / INDEX).exists():
        print(f"{folder} already holds {record['model']} ({dtype}): nothing to do")
        return
    if source and file:
        path = folder / "single_file.safetensors"
        partial = get_partial_path(path)
        if not path.exists():
            # The converted model takes about the same space again
            check_disk_space(folder, 2 * file.size - (partial.stat().st_size if partial.exists() else 0))
            start_folder(folder, record)
            if config:
                fetch_file(source, config, path.with_suffix(Path(config.name).suffix))
            fetch_file(source, file, path)
    checkpoint = recognise_checkpoint(path, prediction=prediction)
    check_weight_counts(checkpoint, needs_vae=vae is None)
    check_disk_space(folder, count_bytes(checkpoint, folder, dtype))
    print(f"{record['model']}: {checkpoint.describe()}")
    if checkpoint.note:
        print(f"{record['model']}: {checkpoint.note}")
    sha256 = file.sha256 if file else record["revision"]
    start_folder(folder, {**record, DIGEST: sha256 or digest_file(path)})
    convert_to_folder(checkpoint, folder, dtype=dtype, vae=vae, tell=print)
    if source:
        for each in folder.glob("single_file.*"):
            each.unlink()
    if hint := describe_few_step_name(Path(record["model"]).name):
        print(hint)
    print(f"{folder} is complete")


def describe_vae(vae: Path | None) -> dict[str, str]:
    """Return the entry of source.json for a VAE that replaces the model's own."""
    if vae is None:
        return {}
    if vae.is_dir():
        return {"vae": f"{vae.resolve().name} {open_folder(vae).revision}"}
    if not vae.is_file():
        raise DownloadError(f"--vae takes a .safetensors or a folder, and {vae} is neither")
    check_no_pickle(vae.name)
    return {"vae": f"{vae.name} {digest_file(vae)}"}


def start_folder(folder: Path, record: dict[str, str]) -> None:
    """Record the model of the folder before its first file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def fetch_pipeline(source: Source, folder: Path, dtype: str, *, safety_checker: bool = False) -> None:
    """Download the missing files of a pipeline."""
    index, content = read_json(source, INDEX, "a diffusers pipeline")
    if safety_checker and not any(content.get(SAFETY_CHECKER[0]) or [None]):
        raise DownloadError(f"{source.model} has no safety checker: leave out --safety-checker")
    edited = leave_out_components(content, ("image_encoder", *(() if safety_checker else SAFETY_CHECKER)))
    if edited != content or safety_checker:  # a saved index may lack it
        index = dataclasses.replace(index, sha256=None, content=(json.dumps(edited, indent=2) + "\n").encode())
    fetch_files(source, [*select_files(edited, source.files, dtype), index], folder, dtype)


def leave_out_components(index: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the content of model_index.json without some components. diffusers then loads the folder without them."""
    absent: dict[str, Any] = {name: [None, None] for name in names if name in index}
    if SAFETY_CHECKER[0] in absent and "requires_safety_checker" in index:
        absent["requires_safety_checker"] = False
    return {**index, **absent}


def fetch_vae(source: Source, folder: Path, dtype: str) -> None:
    """Download the missing files of a VAE."""
    from sdxl_server.model.vaes import FULL_VAE, TINY_VAE

    files = select_component(source, dtype, "--vae", what="the folder of a VAE", classes=(FULL_VAE, TINY_VAE))
    fetch_files(source, files, folder, dtype)


def select_component(source: Source, dtype: str, option: str, *, what: str, classes: Sequence[str]) -> list[SourceFile]:
    """Return the files of a model in diffusers' layout; its config.json comes last.

    Args:
        what: the folder that the option takes, in words.
        classes: the accepted classes of diffusers.
    """
    config, content = read_json(source, CONFIG, what)
    held = content.get("_class_name") if isinstance(content, dict) else None
    if held not in classes:
        article = "an" if classes[0][0] in "AEIOU" else "a"
        raise DownloadError(f"{option} takes {article} {' or '.join(classes)}, but {source.model} holds {held}")
    inside = {each.name: each for each in source.files}
    weights = select_weights(inside, dtype)
    if not weights:
        raise DownloadError(f"{source.model} has no weights in safetensors with a name that diffusers reads")
    return [*(inside[name] for name in weights), config]


def download_control(control: str, revision: str | None, *, folder: Path | None, dtype: str) -> None:
    """Download a control from the hub, and check it. A local control is only checked.

    Raises:
        DownloadError: with the reason in one line.
    """
    from sdxl_server.model.controls.files import open_control
    from sdxl_server.model.controls.registry import KINDS, find_kind

    control, named_revision = read_hub_page(control)
    revision, path, encoder = revision or named_revision, Path(control), {}
    with explain_errors(control, revision):
        if explained := explain_address(control):
            raise DownloadError(explained[0])
        if path.exists():
            if revision:
                raise DownloadError(f"--revision is for a control on the hub, and {control} is here: leave it out")
        elif is_single_file(control):
            source, file = find_hub_file(control, revision)
            folder = folder or Path(Path(source.model).name)
            files = select_image_encoder(source, file, dtype)
            fetch_files(source, [*files, file], folder, "as stored")
            path = folder / file.saved_name
            encoder = {"image_encoder": str((folder / files[0].name).parent.resolve())} if files else {}
        else:
            source = open_hub(control, revision or "main")
            path = folder or Path(Path(source.model).name)
            classes = [each for kind in KINDS.values() for each in kind.classes]
            files = select_component(source, dtype, "--control", what="the folder of a control", classes=classes)
            fetch_files(source, files, path, dtype)
        kind = KINDS[find_kind(open_control(path))]
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name.removesuffix(".safetensors"))
    entry = json.dumps({"name": name, "path": str(path.resolve()), **encoder})
    print(f"{path} holds {kind.name}. In model-config.yaml: handler: {{controls: [{entry}]}}")


def select_image_encoder(source: Source, file: SourceFile, dtype: str) -> list[SourceFile]:
    """Return the files of an IP-Adapter's image encoder, as h94/IP-Adapter places them; none for other controls."""
    if not IP_ADAPTER.search(file.name):
        return []
    parent = "models/" if "vit-h" in file.name.lower() else "".join(file.name.rpartition("/")[:2])
    inside = {
        each.name.removeprefix(f"{parent}image_encoder/"): each
        for each in source.files
        if each.name.startswith(f"{parent}image_encoder/")
    }
    return [inside[name] for name in (*select_weights(inside, dtype), CONFIG) if name in inside]


def read_json(source: Source, name: str, what: str) -> tuple[SourceFile, Any]:
    """Return a JSON file of the source, and its content."""
    file = next((each for each in source.files if each.name == name), None)
    if file is None:
        held, instead = source.explain() if name == INDEX else ("", None)
        raise DownloadError(f"{source.model} is not {what}: it has no {name}{held and f'; {held}'}", instead=instead)
    content = io.BytesIO()
    source.fetch(file, content)
    return file, json.loads(content.getvalue())


def fetch_files(source: Source, files: Sequence[SourceFile], folder: Path, dtype: str) -> None:
    """Download the missing ones of these files; the last one marks the folder as complete."""
    record = {"model": source.model, "revision": source.revision, "dtype": dtype}
    check_folder(folder, record)

    targets = {folder / each.saved_name: each for each in files}
    missing = {target: each for target, each in targets.items() if not each.is_saved(target)}
    if not missing:
        print(f"{folder} already holds {source.model} ({dtype}): nothing to download")
        return
    partials = [partial for partial in map(get_partial_path, missing) if partial.exists()]
    needed = sum(each.size for each in missing.values()) - sum(partial.stat().st_size for partial in partials)
    check_disk_space(folder, needed)
    print(f"{source.model} at {source.revision}: {needed / 1e9:.2f} GB to download, {len(missing)} files into {folder}")
    plain = {
        each.name.rpartition("/")[0] or source.model
        for each in files
        if each.name.endswith(".safetensors") and FP16_MARK not in each.name
    }
    if dtype == "fp16" and plain:
        print(f"no fp16 variant of {', '.join(sorted(plain))}: using the plain weights")

    start_folder(folder, record)
    for target, file in missing.items():
        fetch_file(source, file, target)
    print(f"{folder} is complete")


def download_model(
    model: str | None,
    revision: str | None,
    *,
    folder: Path | None,
    dtype: str,
    prediction: str | None = None,
    vae: str | None = None,
    safety_checker: bool = False,
) -> None:
    """Download a pipeline from the hub, copy it from a local folder, or convert a model in one file.

    Args:
        model: `demo` is the demonstration model. None is the default model, or no model if `vae` is given.
        folder: None is the default folder.
        vae: without a model the VAE to download; for a model in one file, the VAE that replaces its own.
        safety_checker: whether to download the pipeline's safety checker, too.

    Raises:
        DownloadError: with the reason in one line.
    """
    is_vae = model is None and vae is not None
    model, named_revision = read_hub_page((vae if is_vae else model) or DEFAULT_MODEL)
    revision = revision or named_revision
    folder = folder or (DEFAULT_VAE_FOLDER if is_vae else DEFAULT_FOLDER)
    local = DEMO_FOLDER if model == "demo" else Path(model)
    with explain_errors(model, revision):
        if explained := explain_address(model):
            raise DownloadError(explained[0], instead=explained[1])
        if safety_checker and (is_vae or is_single_file(model)):
            raise DownloadError(f"--safety-checker is for a pipeline's folder, and {model} holds none: leave it out")
        if is_vae and is_single_file(model):
            raise DownloadError(f"--vae without --model takes a folder or a hub id, not {model}")
        if not is_vae and is_single_file(model):
            own_vae = None if vae is None else Path(vae)
            make_from_single_file(model, revision, folder=folder, dtype=dtype, prediction=prediction, vae=own_vae)
            return
        if prediction or vae and not is_vae:
            raise DownloadError(
                f"--prediction-type, or --vae with --model, needs a model in one file, which {model} is not. --vae "
                "without --model downloads a VAE alone, for vae_path in model-config.yaml"
            )
        if local.is_dir():
            if revision:
                raise DownloadError(
                    f"--revision is for a model on the hub, and {model} is a local folder: leave it out"
                )
            source = open_folder(local)
        else:
            source = open_hub(model, revision or (DEFAULT_REVISION if model == DEFAULT_MODEL else "main"))
        if is_vae:
            fetch_vae(source, folder, dtype)
        else:
            fetch_pipeline(source, folder, dtype, safety_checker=safety_checker)


@contextlib.contextmanager
def explain_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of a download into a DownloadError, whose message is one line."""
    from huggingface_hub import constants, errors

    from sdxl_server.convert.weights_files import CheckpointError
    from sdxl_server.errors import ConfigError

    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise DownloadError(str(error)) from error
    except errors.GatedRepoError as error:
        message = f"{model} is gated: accept its terms on the hub, then set HF_TOKEN to your token"
        raise DownloadError(message) from error
    except errors.RepositoryNotFoundError as error:
        message = (
            f"{model} is no local file or folder and no public model on the hub; for a private model, set HF_TOKEN"
        )
        raise DownloadError(message) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{model} has no revision {revision}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, json.JSONDecodeError) as error:
        raise DownloadError(" ".join(str(error).split())) from error
    except errors.HTTPError as error:  # the HTTP client's own: no answer came
        raise DownloadError(f"cannot reach the hub at {constants.ENDPOINT}: {error}") from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        help="hub id, local folder, or demo for the demonstration model; or a model in one .safetensors: a local file, "
        f"or owner/name/file.safetensors on the hub; or the address of a page there (default: {DEFAULT_MODEL})",
    )
    add("--revision", help="the hub's branch, tag or commit (default: a pinned commit; other models: main)")
    add(
        "--output-dir",
        type=Path,
        help=f"default: {DEFAULT_FOLDER}, {DEFAULT_VAE_FOLDER} for a VAE alone, or the name of a control",
    )
    add("--dtype", choices=("fp16", "fp32"), default="fp16", help="fp16 halves the download (default: %(default)s)")
    add(
        "--prediction-type",
        choices=("epsilon", "v_prediction", "v_prediction_ztsnr"),
        help="for a model in one file: the prediction type of its UNet; ztsnr: with zero terminal SNR (default: from "
        "the file, or from a .yaml of its name next to it)",
    )
    add(
        "--vae",
        help="without --model: the hub id or folder of a VAE to download alone, such as madebyollin/sdxl-vae-fp16-fix "
        "or the tiny madebyollin/taesdxl; for a model in one file: a .safetensors or folder with another VAE",
    )
    add(
        "--control",
        help="a control (ControlNet, T2I-Adapter, IP-Adapter) to download alone and to check: a hub id or folder in "
        "diffusers' layout, or owner/name/file.safetensors",
    )
    add(
        "--safety-checker",
        action="store_true",
        help="also download the safety checker of Stable Diffusion 1.x, for handler.safety_checker: model",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, *, retry: str = "python Download_model.py --model {}") -> int:
    """Run the program.

    Args:
        retry: the command that a message proposes, with {} for another model.
    """
    arguments = parse_arguments(argv)
    try:
        if arguments.control is not None:
            for name in ("model", "vae", "prediction_type", "safety_checker"):
                if getattr(arguments, name):
                    option = name.replace("_", "-")
                    raise DownloadError(f"--control downloads a control alone: leave out --{option}")
            download_control(arguments.control, arguments.revision, folder=arguments.output_dir, dtype=arguments.dtype)
            return 0
        download_model(
            arguments.model,
            arguments.revision,
            folder=arguments.output_dir,
            dtype=arguments.dtype,
            prediction=arguments.prediction_type,
            vae=arguments.vae,
            safety_checker=arguments.safety_checker,
        )
    except DownloadError as error:
        hint = "" if error.instead is None else f". Run: {retry.format(shlex.quote(error.instead))}"
        print(f"Download_model.py: {error}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues the download", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
