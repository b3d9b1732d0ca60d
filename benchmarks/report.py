"""The report: results.jsonl as tables and bars, in Markdown and in one HTML file that needs nothing else."""

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.configurations import GUIDE, PICTURE, Configuration

_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: left; }
.bar { display: grid; grid-template-columns: 10em 1fr; align-items: center; margin: .2em 0; }
td:nth-child(2) { white-space: nowrap; } figure { margin: 1em 0; } figure img { max-width: 100%; }
.bar i { display: inline-block; height: 1em; background: #0068b5; margin-right: .5em; vertical-align: middle; }
"""
_HEADINGS = (
    "configuration",
    "s per call: median (least–most)",
    f"× {GUIDE}",
    "error",
    "drawn right",
    "share of the peak",
    "compile s, cold",
    "compile s, warm",
    "load s",
    "peak GB, cold",
    "peak GB, warm",
    "what ran",
)
_NOTES = (
    "One call of a part: the UNet's is one denoising step of one picture with guidance, a batch of two.",
    "One call of picture: the whole pipeline from a prompt to a JPEG, with guidance; its load is part of compile. "
    "Drawn right: the share of prompts, where the demonstration model draws.",
    "Error: relative L2 distance of the results to those of the first configuration, from the same inputs.",
    "Compile: from loaded weights to the first result, less the median call; cold: no cache; warm: a second process.",
    "Peak GB: the most that the process had resident, files that are mapped included.",
    "Share of the peak: of the highest rate of matrix products, by PyTorch or OpenVINO, in the configuration's "
    "arithmetic, int8 where the weights are compressed, with the operations of the call as PyTorch counts them.",
)


@dataclass(frozen=True)
class Row:
    """The figures of one configuration, over all rounds; None where there is none.

    Attributes:
        seconds: of all calls after the first of each process.
        ratio: how many times faster it is than the guide's configuration.
        score: the share of prompts drawn right, from 0.
        share: of the machine's peak, from 0.
        cold, warm: seconds of compilation.
        note: what ran, or why nothing did.
    """

    name: str
    note: str
    seconds: Sequence[float] = ()
    ratio: float | None = None
    error: float | None = None
    score: float | None = None
    share: float | None = None
    cold: float | None = None
    warm: float | None = None
    load: float | None = None
    peak_cold: float | None = None
    peak_warm: float | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def list_cells(self) -> list[str]:
        """Return the cells of the table, in the order of its headings."""
        spread = f"{self.median:.3g} ({min(self.seconds):.3g}–{max(self.seconds):.3g})" if self.seconds else ""
        return [
            self.name,
            spread,
            _write(self.ratio, ".2f"),
            _write(self.error, ".2g"),
            _write(self.score, ".0%"),
            _write(self.share, ".0%"),
            *(_write(each, ".1f") for each in (self.cold, self.warm, self.load, self.peak_cold, self.peak_warm)),
            self.note,
        ]


def make_rows(machine: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each configuration among the records of one part, in their order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["configuration"]["name"], []).append(record)
    flops = next((record["flops"] for record in records if "flops" in record), None)
    guide = [seconds for record in groups.get(GUIDE, ()) for seconds in record.get("steps", ())]
    base = statistics.median(guide) if guide else None
    return [_make_row(name, group, machine["peak_gigaflops"], flops, base) for name, group in groups.items()]


def _make_row(
    name: str,
    records: Sequence[Mapping[str, Any]],
    peaks: Mapping[str, float],
    flops: int | None,
    base: float | None,
) -> Row:
    notes = [f"{word}: {each[word]}" for word in ("skipped", "failed") for each in records if word in each]
    measured = [each for each in records if "steps" in each]
    if not measured:
        return Row(name, notes[0])
    configuration = Configuration(**measured[0]["configuration"])
    peak = peaks.get("int8" if configuration.compression else configuration.arithmetic)
    seconds = [each for record in measured for each in record["steps"]]
    median = statistics.median(seconds)
    cold = [each for each in measured if not each["from_cache"]]
    warm = [each for each in measured if each["from_cache"]]

    def find_compilation(group: Sequence[Mapping[str, Any]]) -> float | None:
        return statistics.median(each["first"] - statistics.median(each["steps"]) for each in group) if group else None

    errors = [each["error"] for each in measured]
    return Row(
        name=name,
        note="; ".join(dict.fromkeys([*(each["ran"] for each in measured), *notes])),
        seconds=seconds,
        ratio=base / median if base else None,
        error=None if None in errors else max(errors),
        score=min((each["score"] for each in measured if "score" in each), default=None),
        share=flops / median / 1e9 / peak if flops and peak else None,
        cold=find_compilation(cold),
        warm=find_compilation(warm),
        load=statistics.median(each["load"] for each in measured) if "load" in measured[0] else None,
        peak_cold=max((each["peak_gigabytes"] for each in cold), default=None),
        peak_warm=max((each["peak_gigabytes"] for each in warm), default=None),
    )


def write_report(folder: Path, machine: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Write report.md and report.html."""
    parts = list(dict.fromkeys(each["part"] for each in records))
    tables = {part: make_rows(machine, [each for each in records if each["part"] == part]) for part in parts}
    about = _describe(machine, records)
    (folder / "report.md").write_text(_write_markdown(title, about, tables))
    names = [row.name for row in tables.get(PICTURE, ())]
    sheets = {name: folder / f"{name}.jpg" for name in names if (folder / f"{name}.jpg").exists()}
    (folder / "report.html").write_text(_write_html(title, about, tables, sheets))


def _describe(machine: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each thing that the figures depend on."""
    times = sorted(each["time"] for each in records)
    loads = sorted(each["load_average"] for each in records)
    return [
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['flags'])}), "
        f"{machine['memory_gigabytes']} GB; {machine['threads']} threads; governor: {machine['governor']}",
        f"Python {machine['python']}, " + ", ".join(f"{name} {each}" for name, each in machine["versions"].items()),
        "Peak, GFLOP/s: " + ", ".join(f"{name} {each}" for name, each in machine["peak_gigaflops"].items()),
        f"Measured from {times[0]} to {times[-1]}, with a load of the machine of {loads[0]:.1f} to {loads[-1]:.1f} "
        "at each start",
    ]


def _write_markdown(title: str, about: Sequence[str], tables: Mapping[str, Sequence[Row]]) -> str:
    lines = [f"# {title}", "", *(f"- {line}" for line in (*about, *_NOTES))]
    for part, rows in tables.items():
        lines += ["", f"## {part}", "", _join(_HEADINGS), _join(["---"] * len(_HEADINGS))]
        lines += [_join(row.list_cells()) for row in rows]
    return "\n".join(lines) + "\n"


def _write_html(
    title: str, about: Sequence[str], tables: Mapping[str, Sequence[Row]], sheets: Mapping[str, Path]
) -> str:
    body = [f"<h1>{escape(title)}</h1>", "<ul>", *(f"<li>{escape(line)}</li>" for line in (*about, *_NOTES)), "</ul>"]
    for part, rows in tables.items():
        body += [f"<h2>{escape(part)}</h2>", "<table>", _write_cells("th", _HEADINGS)]
        body += [*(_write_cells("td", row.list_cells()) for row in rows), "</table>"]
        body += _draw_bars("Seconds per call", {row.name: row.median for row in rows})
        body += _draw_bars("Peak GB, cold start", {row.name: row.peak_cold for row in rows})
    body += ["<h2>The first pictures of each</h2>"] if sheets else []
    for name, path in sheets.items():
        picture = base64.b64encode(path.read_bytes()).decode()
        body.append(
            f'<figure><img src="data:image/jpeg;base64,{picture}"><figcaption>{escape(name)}</figcaption></figure>'
        )
    head = f'<!doctype html><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join([head, *body]) + "\n"


def _draw_bars(heading: str, values: Mapping[str, float | None]) -> list[str]:
    present = {name: value for name, value in values.items() if value is not None}
    most = max(present.values(), default=0)
    return [
        f"<h3>{heading}</h3>",
        *(
            f'<div class="bar"><span>{escape(name)}</span><span><i style="width: {80 * value / most:.1f}%"></i>'
            f"{value:.3g}</span></div>"
            for name, value in present.items()
        ),
    ]


def _write_cells(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _join(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _write(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
