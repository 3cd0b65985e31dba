"""Shows a journey, on the screen and as one HTML file: a table, and of each stage its curve, what the model said before and after, its exams.
In: plain records (numbers, texts, paths of pictures). Out: lines, and the text of a page that needs nothing but itself: no script, link or font.
Next: nanomind/journey.py
"""

import base64
import html
import re
from pathlib import Path

CHART = 640, 220  # width and height of a curve, in the units of its viewBox
MARGIN = 46, 12, 10, 24  # left, right, top, bottom of the field inside it
POINTS = 160  # a curve of more is drawn through the means of so many pieces
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --faint: #6a7078; --line: #d9dce0; --mark: #0b62c4; --soft: #9dbbe0; --box: #f3f4f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #16181b; --faint: #9aa1a9; --line: #363b41; --mark: #6db1ff; --soft: #3f5f86; --box: #202327 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1.5rem }
.scroll { overflow-x: auto } .faint, figcaption { color: var(--faint); font-size: .9rem }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0 } th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child, .said td, .said th { text-align: left; vertical-align: top } .said td { white-space: pre-wrap; overflow-wrap: anywhere }
.said td:first-child { min-width: 9rem } figure { margin: 1rem 0 } svg { width: 100%; height: auto } svg text { fill: var(--faint); font-size: 11px }
code { background: var(--box); padding: .15rem .4rem; border-radius: .25rem } img { image-rendering: pixelated; width: 96px; display: block; margin-bottom: .3rem }
""".strip()


# ---- on the screen

def percent(share):
    return "-" if share is None else f"{100 * share:.1f} %"


def exam_table(found):
    """Shares by category as rows of a table; of an exam about pictures also what another picture's answers and guessing get."""
    more = [(head, found[name]) for name, head in (("blind", "another picture"), ("chance", "chance")) if name in found]
    return [["exam", "right", "95 % interval", *(head for head, _ in more), "questions"],
            *([name, percent(right), "{} to {}".format(*map(percent, found["interval"][name])), *(percent(shares.get(name)) for _, shares in more), found["n"][name]]
              for name, right in found["right"].items())]


def lines(table):
    """A table as text, its columns under each other."""
    widths = [max(len(str(row[i])) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(str(cell).ljust(width) if not i else str(cell).rjust(width) for i, (cell, width) in enumerate(zip(row, widths))) for row in table)


def said(record):
    """What was measured of a stage (journey.py), as text."""
    found = [f"before ({record['from']}) and after {record['stage']}:"]
    for one in record["samples"]:
        found.append(f"  {one['prompt']}" + (f"  [{Path(one['image']).name}]" if "image" in one else ""))
        found += [f"    {when:6} {' '.join(one[when].split())}" for when in ("before", "after")]
    if "exam" in record:
        found.append("exam:  " + "  ".join(f"{name} {percent(right)}" for name, right in record["exam"]["right"].items())
                     + f"  (of the known declined {percent(record['exam']['declined'])}, ended {percent(record['exam']['ended'])})")
    if "pictures" in record:
        found.append(lines(exam_table(record["pictures"])))
    return "\n".join([*found, f"measured in {record['seconds']:.1f} s"])


# ---- in the browser

def text(value):
    """Any text -> HTML that shows it and does nothing else. Control characters, which HTML forbids even escaped, become a visible mark."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def table(rows, kind=""):
    """rows: lists of cells, the first one the head; a cell is a value, or HTML from here inside a tuple of one."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{cell[0] if isinstance(cell, tuple) else text(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>\n' + "\n".join(lines) + "\n</table></div>"


def picture(path):
    """An image file -> an <img> that holds it; a file that is gone or of another kind: its name."""
    path = Path(path)
    if path.suffix.lower() not in KINDS or not path.is_file():
        return text(path.name)
    return f'<img alt="{text(path.name)}" src="data:{KINDS[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}">'


def thinned(points, most=POINTS):
    """A curve of (x, y) with many points -> the means of `most` pieces of it."""
    if len(points) <= most:
        return list(points)
    pieces = [points[i * len(points) // most:(i + 1) * len(points) // most] for i in range(most)]
    return [tuple(sum(values) / len(piece) for values in zip(*piece)) for piece in pieces]


def ticks(low, high):
    """Three to six round numbers between two."""
    step = 10.0 ** len(str(int(high - low)))
    while (high - low) / step < 3:
        step /= 2 if str(step).strip("0.")[0] in "12" else 2.5
    first = int(-(-low // step))
    return [n * step for n in range(first, int(high // step) + 1)]


def chart(loss, validation):
    """Two curves over the steps, (step, loss) each: in training, and as a line with dots on held-out data."""
    loss, (width, height), (left, right, top, bottom) = thinned(loss), CHART, MARGIN
    points = [*loss, *validation]
    if not points:
        return ""
    last, low, high = max(x for x, _ in points) or 1, min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + 1

    def place(x, y):
        return f"{left + (width - left - right) * x / last:.1f}", f"{top + (height - top - bottom) * (high - y) / (high - low):.1f}"
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over the steps">']
    for tick in ticks(low, high):
        y = place(0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="var(--line)"/><text x="{left - 6}" y="{y}" dy="4" text-anchor="end">{tick:.4g}</text>')
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        parts.append(f'<text x="{place(share * last, low)[0]}" y="{height - 6}" text-anchor="{anchor}">{share * last:,.0f}{" steps" if share == 1 else ""}</text>')
    for curve, colour, thick in ((loss, "var(--soft)", 1.5), (validation, "var(--mark)", 2)):
        if curve:
            parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="{thick}" points="{" ".join(",".join(place(x, y)) for x, y in curve)}"/>')
    for x, y in validation:
        parts.append('<circle r="3" fill="var(--mark)" cx="{}" cy="{}"/>'.format(*place(x, y)))
    return "\n".join(parts) + "\n</svg>"


def section(stage):
    """What there is to see of one stage. stage: see `page`."""
    parts = [f"<h2>{text(stage['name'])}</h2>", f"<p>{text(stage['about'])}</p>", f"<p><code>{text(stage['command'])}</code></p>"]
    curve = chart(stage["loss"], stage["validation"])
    if curve:
        parts.append(f"<figure>{curve}<figcaption>Loss: in training (pale), on held-out data (dots).</figcaption></figure>")
    samples = stage.get("samples", ())
    if samples:
        shown = [((f"{picture(one['image'])}{text(one['prompt'])}" if "image" in one else text(one["prompt"]),), one["before"], one["after"]) for one in samples]
        parts += [table([("asked", f"before ({stage['from']})", "after"), *shown], "said")]
    for caption, rows in stage.get("exams", ()):
        parts += [f'<p class="faint">{text(caption)}</p>', table(rows)]
    return "\n".join(parts)


def page(title, lead, summary, stages):
    """-> the HTML. lead: a paragraph; summary: rows of the table at the top, its head first; stages: dicts with name, about, command, loss and validation
    [(step, value)], and where they were measured samples [{"prompt", "before", "after", perhaps "image": path}] with from, and exams
    [(caption, rows of a table)]."""
    return "\n".join(["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">', '<meta name="viewport" content="width=device-width">',
                      f"<title>{text(title)}</title>", f"<style>\n{STYLE}\n</style>", "</head>", "<body>", f"<h1>{text(title)}</h1>", f"<p>{text(lead)}</p>",
                      table(summary), *map(section, stages), "</body>", "</html>"]) + "\n"
