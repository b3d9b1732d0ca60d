"""The OpenAPI document of a running server."""

from typing import Any

from sdxl_server.api.native import ERROR_SCHEMA, IMAGES_SCHEMA
from sdxl_server.request.contract import Contract


def build_openapi(contract: Contract, *, model: str = "diffusion_fast") -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the model's address."""
    schema = contract.build_schema()
    form = contract.build_schema(is_form=True)
    binary = {"schema": {"type": "string", "format": "binary"}}
    headers = {
        "X-Seed": {"description": "the first image's seed", "schema": {"type": "string"}},
        "X-Request-Id": {"description": "the id of the request in the server's log", "schema": {"type": "string"}},
        "X-Warning": {
            "description": "warnings, such as the end of a prompt that is too long",
            "schema": {"type": "string"},
        },
    }
    errors = {
        "400": "a wrong field, or an API key (token) that is missing or wrong",
        "413": "more bytes than max_request_size",
        "500": "generation failed; the message or the server's log gives the reason",
        "503": "the queue is full, or no worker is ready",
        "504": "the timeout would pass, or has passed, before the last step",
        "507": "the worker stopped during the request",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stable Diffusion XL from TorchServe",
            "version": "1.0",
            "description": "Images for a prompt. Names and meanings are those of diffusers' pipelines.",
        },
        "security": [{"token": []}],
        "paths": {
            f"/predictions/{model}": {
                "post": {
                    "operationId": "generate",
                    "summary": "Generate images for a prompt",
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
                            "description": "One image as a file. Several images, or any with Accept: application/json, "
                            "as JSON. A failure after the first step ends the response with an Error.",
                            "headers": headers,
                            "content": {
                                **{f"image/{name}": binary for name in ("jpeg", "png", "webp")},
                                "text/event-stream": {"schema": {"type": "string"}},
                                "application/json": {
                                    "schema": {
                                        "anyOf": [
                                            {"$ref": "#/components/schemas/Images"},
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
            "schemas": {"GenerationRequest": schema, "Images": IMAGES_SCHEMA, "Error": ERROR_SCHEMA},
        },
    }
