"""The page: sections and charts in one file with all that it needs.

Nothing is fetched: plotly.js stands in the file, gzipped, and the page's own policy forbids every request.
"""

import base64
import gzip
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

from .charts import Section
from .errors import ReportError

_TEMPLATE = Path(__file__).with_name("page.html")


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the HTML. Raises ReportError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ReportError(
            "plotly is not installed, which draws the charts. Run `pip install specx[report]`."
        ) from error
    charts = [chart.plotly() for section in sections for chart in section.charts]
    ids = [f"chart{number}" for number in range(len(charts))]
    names = iter(ids)
    packed = gzip.compress(get_plotlyjs().encode(), mtime=0)
    parts = {
        "TITLE": html.escape(title),
        "SUBTITLE": html.escape(subtitle),
        "SECTIONS": "\n".join(_section(section, [next(names) for _ in section.charts]) for section in sections),
        # A tag within a string would end the script.
        "CHARTS": json.dumps(dict(zip(ids, charts, strict=True)), allow_nan=False)
        .replace("&", "\\u0026")
        .replace("<", "\\u003c"),
        "PLOTLY": base64.b64encode(packed).decode(),
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], text)


def _section(section: Section, ids: Sequence[str]) -> str:
    lines = [f"<section><h2>{html.escape(section.title)}</h2>"]
    if section.lead:
        lines.append(f"<p>{html.escape(section.lead)}</p>")
    if section.figures:
        pairs = (
            f"<div><dt>{html.escape(label)}</dt><dd>{html.escape(value)}</dd></div>"
            for label, value in section.figures.items()
        )
        lines.append(f"<dl>{''.join(pairs)}</dl>")
    if section.table:
        head, *rows = section.table
        lines.append(
            f'<div class="card table"><table>{_row("th", head)}{"".join(_row("td", r) for r in rows)}</table></div>'
        )
    lines.append('<div class="charts">')
    for chart, name in zip(section.charts, ids, strict=True):
        note = f"<p>{html.escape(chart.note)}</p>" if chart.note else ""
        label = html.escape(chart.title)
        lines.append(
            f'<figure class="card" style="margin:0"><h3>{label}</h3>{note}'
            f'<div class="chart" id="{name}" role="img" aria-label="{label}"></div></figure>'
        )
    return "\n".join([*lines, "</div></section>"])


def _row(cell: str, values: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{cell}>{html.escape(value)}</{cell}>' for value in values)}</tr>"
