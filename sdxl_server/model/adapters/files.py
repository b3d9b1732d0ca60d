"""Open a file of an adapter, an embedding or a control."""

from pathlib import Path

from sdxl_server.convert.digests import digest_file
from sdxl_server.convert.weights_files import CheckpointError, Header, read_safetensors_header
from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import check_links


def read_adapter_file(path: Path) -> tuple[str, Header]:
    """Return a file's SHA-256 and its header.

    Raises:
        ConfigError: it is no readable safetensors file.
    """
    check_links([path])
    if path.is_dir():
        held = ", ".join(sorted(each.name for each in path.glob("*.safetensors"))[:3])
        raise ConfigError(f"{path} is a folder: name a .safetensors file in it ({held or 'it has none'})")
    try:
        header = read_safetensors_header(path)
        digest = digest_file(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest, header
