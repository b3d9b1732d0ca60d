"""Requests to this project's own servers, which are on this machine or a private network."""

import os
from typing import Any

import requests


def send_request(method: str, url: str, **options: Any) -> requests.Response:
    """Send a request past HTTP_PROXY, and without a key from ~/.netrc.

    Args:
        options: those of requests.request.

    Raises:
        requests.RequestException: there is no response.
    """
    with requests.Session() as session:
        session.trust_env = False
        session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        return session.request(method, url, **options)
