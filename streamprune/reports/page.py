"""Page of a report: HTML that needs nothing beside it, in light and in dark, on a phone too."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d1d9e0; --box: #f6f8fa;
  --a: #2f6fc4; --b: #b35c00; --c: #1f7a54; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --rule: #3d444d;
  --box: #151b23; --a: #6ea8fe; --b: #f0a657; --c: #57c996; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto; max-width: 100% }
.wide:focus-visible { outline: 2px solid var(--a) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap }
td.number, th.number { text-align: right }
pre { background: var(--box); padding: .75rem; border-radius: 6px; margin: .5rem 0; white-space: pre-wrap }
svg { display: block; width: 100%; min-width: 40rem; height: auto; font: 13px system-ui, sans-serif }
figure { margin: 1rem 0 } figcaption { color: var(--soft) } summary { cursor: pointer; color: var(--soft) }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .35rem 0 .8rem }
svg .ink { fill: var(--ink) } svg .soft { fill: var(--soft) }
svg .grid { stroke: var(--rule) } svg .axis { stroke: var(--soft) }
svg .a { fill: var(--a) } svg .b { fill: var(--b) } svg .c { fill: var(--c) } svg .ghost { fill: var(--rule) }
svg .pale { fill: var(--a); opacity: .25 } svg .half { fill: var(--a); opacity: .55 }
svg .line-a, svg .line-b, svg .line-c, svg .plan-a, svg .plan-c { fill: none; stroke-width: 2 }
svg .line-a, svg .plan-a { stroke: var(--a) } svg .line-b { stroke: var(--b) }
svg .line-c, svg .plan-c { stroke: var(--c) } svg .plan-a, svg .plan-c { stroke-dasharray: 6 4 }
svg .cut { stroke: var(--b); stroke-width: 3 }
.key-a { background: var(--a) } .key-b { background: var(--b) } .key-c { background: var(--c) }
.key-ghost { background: var(--rule) }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Make the page of its parts, which are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def heading(words: str, level: int = 2) -> str:
    """Make a heading."""
    return f"<h{level}>{escape(words)}</h{level}>"


def paragraph(words: str) -> str:
    """Make a paragraph of plain text."""
    return f"<p>{escape(words)}</p>"


def code(text: str) -> str:
    """Make a block of code, whose long lines are broken."""
    return f"<pre><code>{escape(text)}</code></pre>"


def cells(rows: Sequence[Sequence[str]], caption: str) -> str:
    """Make a table that scrolls by itself where it is wide; the first row is its header."""
    numeric = [all(_is_figure(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]

    def line(row: Sequence[str], tag: str) -> str:
        marks = [' class="number"' if each else "" for each in numeric]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for c, m in zip(row, marks, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return _scrolling(f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>", caption)


def figure(svg: str, caption: str, keys: Sequence[tuple[str, str]] = (), rows: Sequence[Sequence[str]] = ()) -> str:
    """Make a figure with its caption, its keys as (colour, words), and its figures as a table to be opened."""
    legend = "".join(f'<span class="key key-{colour}"></span>{escape(words)}' for colour, words in keys)
    said = f"<figcaption>{escape(caption)} {legend}</figcaption>"
    table = f"<details><summary>as a table</summary>{cells(rows, caption)}</details>" if rows else ""
    return f"<figure>{_scrolling(svg, caption)}{said}{table}</figure>"


def _scrolling(inner: str, words: str) -> str:
    """Make a box that scrolls sideways, by the keyboard too."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(words, quote=True)}">{inner}</div>'


def _is_figure(text: str) -> bool:
    return not text or text[0].isdigit() or text[0] in "-+.∞"
