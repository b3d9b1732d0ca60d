"""Webhooks, as standardwebhooks.com specifies them: signed, and only to where the operator allows."""

import datetime
import ipaddress
import json
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import certifi
import urllib3
from standardwebhooks import Webhook

from jobs.settings import Settings

SECONDS = 10
MAX_LENGTH = 2000


class WebhookError(ValueError):
    """A webhook's address is not allowed."""


class DeliveryError(RuntimeError):
    """A webhook was not accepted. It may be later."""


def check_webhook(address: Any, settings: Settings) -> str:
    """Return an order's webhook.

    Raises:
        WebhookError: says which addresses are accepted.
    """
    if not settings.origins:
        raise WebhookError("webhook has no place here: the operator allows no address; leave it out")
    is_text = isinstance(address, str) and address.isascii() and address.isprintable() and " " not in address
    if is_text and len(address) <= MAX_LENGTH:
        parts = urlsplit(address)
        if f"{parts.scheme}://{parts.netloc}" in settings.origins:
            return str(address)
    raise WebhookError(f"webhook takes an address at {' or '.join(settings.origins)}, not {str(address)[:200]!r}")


def send_webhook(job: Mapping[str, Any], settings: Settings) -> None:
    """Send the end of a job, as `Store.describe` returns it, to its webhook. Redirects are not followed.

    Raises:
        WebhookError: the address is not, or no longer, allowed.
        DeliveryError: another try may succeed.
    """
    url = urlsplit(check_webhook(job["webhook"], settings))
    port = url.port or (443 if url.scheme == "https" else 80)
    address = find_address(url.hostname or "", port, settings)
    now = datetime.datetime.now(tz=datetime.UTC)
    data = {name: job[name] for name in ("id", "state", "message")} | {"images": len(job["results"])}
    body = json.dumps({"type": f"job.{job['state']}", "timestamp": now.isoformat(), "data": data})
    message = f"job-{job['id']}-{job['ended']}"
    headers = {
        "Host": url.netloc,
        "Content-Type": "application/json",
        "webhook-id": message,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(settings.webhook_secret).sign(message, now, body),
    }
    # The checked address, because the name may have another one at the next look.
    if url.scheme == "https":
        pool: urllib3.HTTPConnectionPool = urllib3.HTTPSConnectionPool(
            address, port, server_hostname=url.hostname, assert_hostname=url.hostname, ca_certs=certifi.where()
        )
    else:
        pool = urllib3.HTTPConnectionPool(address, port)
    with pool:
        target = url._replace(scheme="", netloc="", fragment="", path=url.path or "/").geturl()
        try:
            answer = pool.request(
                "POST", target, body=body, headers=headers, timeout=SECONDS, retries=False, redirect=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise DeliveryError(f"{url.netloc} does not answer: {error}") from error
    if not 200 <= answer.status < 300:
        raise DeliveryError(f"{url.netloc} answers {answer.status}")


def find_address(host: str, port: int, settings: Settings) -> str:
    """Return a host's address.

    Raises:
        WebhookError: it is private and not in a network of JOBS_WEBHOOKS. An address that is listed itself is allowed.
        DeliveryError: the host is unknown.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise DeliveryError(f"{host} has no address: {error}") from error
    for text in map(str, found):
        address = ipaddress.ip_address(text)
        if text != host and not address.is_global and not any(address in network for network in settings.networks):
            raise WebhookError(f"{host} has the private address {text}, which JOBS_WEBHOOKS does not list")
    return str(min(found))
