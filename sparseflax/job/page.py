"""HTML pages that need nothing beside them: a frame, tables, and figures as SVG."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Okabe and Ito's palette; no figure tells anything by colour alone.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 62rem; margin: 2rem auto }}
body {{ padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .85rem; line-height: 1.3 }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; vertical-align: top }}
th {{ border-bottom: 2px solid #111; white-space: normal }}
th:first-child, td:first-child {{ text-align: left }}
svg {{ max-width: 100%; height: auto }}
p.note {{ color: #555; font-size: .9rem }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{headline}</p>
{body}
</body>
</html>
"""


def page(title: str, headline: str, body: str) -> str:
    """A page of a title, a sentence and HTML."""
    return PAGE.format(title=html.escape(title), headline=html.escape(headline), body=body)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<div class=wide><table>", line(head, "th"), *(line(row, "td") for row in rows), "</table></div>"])


def bars(rows: Sequence[tuple[str, float, str]], chosen: Sequence[str] = ()) -> str:
    """Horizontal bars of (label, value, what to write beside it); those that are chosen stand out."""
    most, height = max((value for _, value, _ in rows), default=0.0) or 1.0, 30
    parts = []
    for i, (label, value, text) in enumerate(rows):
        y, length = i * height, 360 * value / most
        colour = BLUE if label in chosen else "#BBBBBB"
        parts += [f'<text x="230" y="{y + 20}" text-anchor="end"{_bold(label in chosen)}>{html.escape(label)}</text>',
                  f'<rect x="240" y="{y + 5}" width="{max(1.0, length):.1f}" height="{height - 10}" fill="{colour}"/>',
                  f'<text x="{250 + length:.1f}" y="{y + 20}"{_bold(label in chosen)}>{html.escape(text)}</text>']
    return _svg(760, height * len(rows), parts)


def pairs(rows: Sequence[tuple[str, float, float]], names: tuple[str, str], unit: str, title: str) -> str:
    """Two horizontal bars, one below the other, for each (label, value, value); `names` says what they are, in which unit."""
    most, height, top = max((max(pair) for _, *pair in rows), default=0.0) or 1.0, 32, 56
    parts = [f'<text x="10" y="20" font-weight="bold">{html.escape(title)}</text>']
    for i, (name, colour) in enumerate(zip(names, (GREY, BLUE), strict=True)):
        parts += [f'<rect x="{340 + 150 * i}" y="30" width="24" height="12" fill="{colour}"/>',
                  f'<text x="{370 + 150 * i}" y="41">{html.escape(f"{name}, {unit}")}</text>']
    for i, (label, *values) in enumerate(rows):
        y = top + i * height
        parts.append(f'<text x="330" y="{y + 19}" text-anchor="end">{html.escape(label)}</text>')
        for j, (value, colour) in enumerate(zip(values, (GREY, BLUE), strict=True)):
            length, text = 480 * value / most, f"{value:.0f}" if value >= 100 else f"{value:.3g}"
            parts += [f'<rect x="340" y="{y + 3 + 13 * j}" width="{max(1.0, length):.1f}" height="11" fill="{colour}"/>',
                      f'<text x="{346 + length:.1f}" y="{y + 13 + 13 * j}" font-size="11">{text}</text>']
    return _svg(900, top + height * len(rows), parts)


def curve(points: Sequence[tuple[float, float]], chosen: tuple[float, float] | None, x_label: str, y_label: str,
          limit: float | None = None) -> str:
    """A line through points, one of them marked; a dashed line at the limit of y."""
    left, top, width, height = 70, 20, 620, 260
    xs, ys = [x for x, _ in points], [y for _, y in points] + ([] if limit is None else [limit])
    x_low, x_high = _ends(xs)
    y_low, y_high = _ends([*ys, 0.0])

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * (x - x_low) / (x_high - x_low), top + height * (1 - (y - y_low) / (y_high - y_low))

    parts = [f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#111"/>']
    for k in range(5):
        x, y = x_low + (x_high - x_low) * k / 4, y_low + (y_high - y_low) * k / 4
        parts += [f'<text x="{at(x, y_low)[0]:.1f}" y="{top + height + 20}" text-anchor="middle">{x:.3g}</text>',
                  f'<text x="{left - 8}" y="{at(x_low, y)[1] + 5:.1f}" text-anchor="end">{y:.3g}</text>']
    if limit is not None:
        y = at(x_low, limit)[1]
        parts += [f'<path d="M{left} {y:.1f}H{left + width}" stroke="{ORANGE}" stroke-dasharray="6 4" fill="none"/>',
                  f'<text x="{left + width}" y="{y - 6:.1f}" text-anchor="end" fill="{ORANGE}">allowed: {limit:g}</text>']
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in sorted(points)))
    parts.append(f'<path d="M{line}" fill="none" stroke="{BLUE}" stroke-width="2"/>')
    for point in points:
        x, y = at(*point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if point == chosen else 4}" stroke="{BLUE}" stroke-width="2" '
                     f'fill="{BLUE if point == chosen else "white"}"/>')
    parts += [f'<text x="{left + width / 2}" y="{top + height + 42}" text-anchor="middle">{html.escape(x_label)}</text>',
              f'<text transform="translate(16 {top + height / 2}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}'
              "</text>"]
    return _svg(left + width + 20, top + height + 52, parts)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    space = 0.05 * (high - low) or 0.5
    return low - (space if low else 0), high + space


def _bold(bold: bool) -> str:
    return ' font-weight="bold"' if bold else ""


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
                      'font-family="system-ui, sans-serif" font-size="13">', *parts, "</svg>"])
