"""Features that browsers gained after Safari 15.4, Firefox 115 and Chrome 100, which docs/web-ui.md names."""

import re

APIS = (
    *("Promise.withResolvers", "Promise.try", "Array.fromAsync", "Object.groupBy", "Map.groupBy", "Iterator"),
    *(f"Array.prototype.{name}" for name in ("toSorted", "toReversed", "toSpliced", "with")),
    *(f"Set.prototype.{name}" for name in ("union", "intersection", "difference", "isSubsetOf", "isDisjointFrom")),
    *("AbortSignal.any", "AbortSignal.timeout", "ReadableStream.from", "CompressionStream", "DecompressionStream"),
    *("ReadableStream.prototype.values", "Blob.prototype.bytes", "Response.prototype.bytes", "Response.json"),
    *("Uint8Array.fromBase64", "Uint8Array.prototype.toBase64", "URL.canParse", "URL.parse", "RegExp.escape"),
    *("String.prototype.isWellFormed", "String.prototype.toWellFormed", "Error.isError", "Intl.DurationFormat"),
    *("OffscreenCanvas", "ImageDecoder", "CanvasRenderingContext2D.prototype.roundRect"),
    *("CanvasRenderingContext2D.prototype.reset", "CanvasRenderingContext2D.prototype.filter"),
    *("HTMLElement.prototype.showPopover", "HTMLElement.prototype.togglePopover", "HTMLElement.prototype.popover"),
    *("HTMLElement.prototype.inert", "HTMLDialogElement.prototype.requestClose", "Element.prototype.setHTML"),
    *("Element.prototype.checkVisibility", "Element.prototype.moveBefore", "Document.prototype.startViewTransition"),
    *("requestIdleCallback", "scheduler", "navigation", "trustedTypes", "showOpenFilePicker", "ClipboardItem"),
    *("StorageManager.prototype.estimate", "DataTransferItem.prototype.getAsFileSystemHandle", "CSSScopeRule"),
    *("PointerEvent.prototype.getCoalescedEvents", "HTMLInputElement.prototype.showPicker", "Float16Array"),
)
# No script can delete them from a browser. A test searches the files for them.
SYNTAX = {
    ".js": r"^await |^\s*static \{|\(\?<[=!]|/[dgimsuy]*v[dgimsuy]*[;,).\]]|"
    r"\bwith \{ type|\busing \w+ =|for await \([^)]* of [\w.]*\.body\)",
    ".css": r"light-dark\(|color-mix\(|:has\(|^\s*&|@container|@scope|@starting-style|@property|@layer|"
    r"\(width [<>]|\b(?:ok)?l(?:ch|ab)\(|\(from |anchor\(|\b(?:text-wrap|interpolate-size|subgrid)\b|\d[dsl]v[hw]\b",
    ".html": r"\b(?:popover|inert|commandfor|closedby|blocking)\b|<search|importmap",
}
# Guarded uses: the older browser takes another way.
GUARDED = (r"getCoalescedEvents\?\.", r"--screen: 100dvh", r"\(height: 1dvh\)")
OLDER_NAMES = ("filter", "values", "reset")  # of other objects, too
DELETE_APIS = f"""for (const path of {list(APIS)}) {{
    const names = path.split(".");
    const last = names.pop();
    const owner = names.reduce((node, name) => node?.[name], globalThis);
    if (owner) delete owner[last];
}}
delete ReadableStream.prototype[Symbol.asyncIterator];
"""


def find_newer(name: str, text: str) -> list[str]:
    """Return the uses of newer features in a file of the web UI."""
    for guarded in GUARDED:
        text = re.sub(guarded, "", text)
    members = "|".join(_write_use(path) for path in APIS)
    suffix = "." + name.rpartition(".")[2]
    patterns = [SYNTAX[suffix]] if suffix in SYNTAX else []
    patterns += [members] if suffix == ".js" else []
    return [found.group() for pattern in patterns for found in re.finditer(pattern, text, re.MULTILINE)]


def _write_use(path: str) -> str:
    """Return the pattern of an API's use."""
    owner, _, name = path.rpartition(".")
    if owner.endswith(".prototype"):
        return r"(?!)" if name in OLDER_NAMES else rf"\.{name}\b(?!:)"
    return rf"\b{re.escape(path)}(?=[.(])"
