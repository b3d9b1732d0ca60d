"""Compiling the parts of a pipeline as `pt2` says."""

from collections.abc import Callable, Mapping
from typing import Any

from sdxl_server.errors import ConfigError
from sdxl_server.families import Family
from sdxl_server.settings import BACKEND_NAMES, CompileConfig, HandlerConfig

VAE_ENCODER = "vae_encoder"


def compile_parts(
    pipeline: Any, family: Family, config: HandlerConfig, compilation: CompileConfig
) -> tuple[Mapping[str, Callable[..., Any]], Mapping[str, Any]]:
    """Compile the UNet, the VAE's two halves and the text encoders as configured; see LoadedPipeline.

    Lossless: each part computes the same, in the type of its own weights.

    Returns:
        The function of each part, and of the compiled ones the OpenVINOBackend, or None where it is another's.

    Raises:
        ConfigError: the machine lacks what the backend needs.
    """
    import torch

    if compilation.backend == "inductor":
        check_compiler()
    # Past its limit of recompilations dynamo would go on in eager PyTorch and only warn.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    methods = {
        "unet": (pipeline.unet.forward, config.compile_unet),
        "vae": (pipeline.vae.decode, config.compile_vae),
        VAE_ENCODER: (pipeline.vae._encode, config.compile_vae),
        **{name: (getattr(pipeline, name).forward, config.compile_text_encoders) for name in family.text_encoders},
    }
    functions: dict[str, Callable[..., Any]] = {}
    backends = {}
    for name, (method, is_wanted) in methods.items():
        functions[name] = method
        if compilation.backend is None or not is_wanted:
            continue
        if name in family.text_encoders:
            # At its first call transformers hooks up the hidden states, behind a lock that dynamo cannot trace.
            module = getattr(pipeline, name)
            module(torch.zeros(1, 1, dtype=torch.long, device=module.device), output_hidden_states=True)
        functions[name] = compile_method(method, compilation)
        backends[name] = functions[name].backend if compilation.backend == "openvino" else None  # type: ignore[attr-defined]
    return functions, backends


def compile_method(method: Any, compilation: CompileConfig) -> Any:
    """Return a method of a module, compiled as configured."""
    import torch

    if compilation.backend == "openvino":
        from openvino_backend import CompiledFunction

        return CompiledFunction(method, {"release_weights": True, **(compilation.options or {})})
    keywords = {name: getattr(compilation, name) for name in ("mode", "dynamic", "options")}
    backend = BACKEND_NAMES.get(str(compilation.backend), compilation.backend)
    return torch.compile(method, backend=backend, fullgraph=compilation.fullgraph or False, **keywords)


def check_compiler() -> None:
    """Refuse Inductor where there is no C++ compiler.

    Raises:
        ConfigError: says which compilers were looked for.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "pt2.backend: inductor needs a C++ compiler, and there is none; install g++ or name one in the "
            "environment variable CXX, or use the openvino backend, which needs none"
        ) from error
