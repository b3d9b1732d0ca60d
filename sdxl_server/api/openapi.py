"""The OpenAPI document of a running server."""

from typing import Any

from sdxl_server.api.native import ERROR_SCHEMA, PICTURES_SCHEMA
from sdxl_server.request.contract import Contract


def build_openapi(contract: Contract, *, model: str = "diffusion_fast") -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the model's address."""
    schema = contract.build_schema()
    form = contract.build_schema(is_form=True)
    binary = {"schema": {"type": "string", "format": "binary"}}
    headers = {
        "X-Seed": {"description": "the first picture's seed", "schema": {"type": "string"}},
        "X-Request-Id": {"description": "what the server's log calls the request", "schema": {"type": "string"}},
        "X-Warning": {
            "description": "what was left out, such as the end of a long prompt",
            "schema": {"type": "string"},
        },
    }
    errors = {
        "400": "a field that cannot be accepted, or a token that is missing or wrong",
        "413": "a request of more bytes than max_request_size",
        "500": "the picture failed: the message or the server's log says why",
        "503": "the queue is full, or no worker is ready",
        "504": "the timeout would pass, or has passed, before the picture is made",
        "507": "the worker stopped while it made the picture",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stable Diffusion XL from TorchServe",
            "version": "1.0",
            "description": "A prompt in, pictures out. Names and meanings are those of diffusers' pipelines.",
        },
        "security": [{"token": []}],
        "paths": {
            f"/predictions/{model}": {
                "post": {
                    "operationId": "generate",
                    "summary": "Make pictures for a prompt",
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {"schema": {"$ref": "#/components/schemas/GenerationRequest"}},
                            "multipart/form-data": {"schema": form},
                            "text/plain": {"schema": contract.properties["prompt"]},
                        },
                    },
                    "responses": {
                        "200": {
                            "description": "One picture as itself; several, or any with Accept: application/json, "
                            "as JSON. Work that fails after its first step ends the answer with an Error instead.",
                            "headers": headers,
                            "content": {
                                **{f"image/{name}": binary for name in ("jpeg", "png", "webp")},
                                "text/event-stream": {"schema": {"type": "string"}},
                                "application/json": {
                                    "schema": {
                                        "anyOf": [
                                            {"$ref": "#/components/schemas/Pictures"},
                                            {"$ref": "#/components/schemas/Error"},
                                        ]
                                    }
                                },
                            },
                        },
                        **{
                            code: {
                                "description": words,
                                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                            }
                            for code, words in errors.items()
                        },
                    },
                }
            }
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"GenerationRequest": schema, "Pictures": PICTURES_SCHEMA, "Error": ERROR_SCHEMA},
        },
    }
