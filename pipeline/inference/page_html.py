"""The page's own HTML: a picture with its masks, an answer whose phrases light their masks up, the neurons' panel.

Phrases and masks are linked by CSS alone (`:has`): no script runs, and a phrase can be reached by the keyboard. What
the model or a user wrote is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.inference.neurons import Firing
from pipeline.inference.overlay import colour_of, layer
from pipeline.inference.results import Answer, SegmentedObject
from pipeline.inference.uploads import Upload

MAX_NUMBER = 64
"""Objects that the style sheet knows; far more than <OBJ-i> tokens there are."""


def style() -> str:
    """The style sheet of the parts below; `.nt-answer` is the box that holds picture and text."""
    lit = ",".join(
        f".nt-answer:has(.nt-p{i}:hover) .nt-o{i},.nt-answer:has(.nt-p{i} input:checked) .nt-o{i}"
        for i in range(1, MAX_NUMBER + 1)
    )
    chosen = ".nt-answer:has(.nt-phrase:hover,.nt-phrase input:checked)"
    return f"""
.nt-picture {{position:relative; width:100%; max-width:560px; margin:0 auto; line-height:0}}
.nt-picture img {{width:100%; border-radius:6px}}
.nt-picture .nt-mask {{position:absolute; inset:0; height:100%; transition:opacity .15s}}
.nt-picture .nt-base {{transition:filter .15s}}
{chosen} .nt-mask {{opacity:.06}}
{chosen} .nt-base {{filter:brightness(.55) saturate(.4)}}
{lit} {{opacity:1 !important}}
.nt-text {{font-size:1.15rem; line-height:2; margin:.6rem 0}}
.nt-phrase {{position:relative; border-radius:6px; padding:.15em .45em; margin:0 .15em; border:2px solid var(--c); cursor:pointer;
  background:color-mix(in srgb, var(--c) 18%, transparent)}}
.nt-phrase:hover, .nt-phrase:has(input:checked) {{background:color-mix(in srgb, var(--c) 55%, transparent)}}
.nt-phrase:focus-within {{outline:2px solid currentColor; outline-offset:2px}}
.nt-phrase input {{position:absolute; opacity:0; width:1px; height:1px}}
.nt-table {{border-collapse:collapse; width:100%; font-size:.9rem}}
.nt-table td, .nt-table th {{padding:.25em .6em; text-align:left; border-bottom:1px solid rgba(128,128,128,.3)}}
.nt-dot {{display:inline-block; width:.8em; height:.8em; border-radius:50%; background:var(--c); margin-right:.5em}}
.nt-none, .nt-error {{padding:.6em .9em; border-radius:6px; margin:.5rem 0}}
.nt-none {{background:rgba(128,128,128,.15)}}
.nt-error {{background:#fee2e2; color:#7f1d1d; border:1px solid #dc2626}}
.nt-empty {{color:rgba(128,128,128,.9); border:1px dashed rgba(128,128,128,.5); border-radius:8px; padding:5rem 1rem;
  text-align:center}}
.nt-caret {{animation:nt-blink 1s steps(2) infinite}}
@keyframes nt-blink {{to {{opacity:0}}}}
.nt-neurons {{width:100%; height:18px; image-rendering:pixelated; border:1px solid rgba(128,128,128,.4); background:#111827}}
.nt-layer {{display:grid; grid-template-columns:5.5em 1fr; gap:.2em .8em; align-items:center; font-size:.85rem}}
"""


def picture_html(upload: Upload, objects: Sequence[SegmentedObject] = ()) -> str:
    """The picture and, over it, one picture for each mask."""
    parts = [f'<img class="nt-base" alt="the picture" src="{_data("image/jpeg", upload.shown_jpeg())}">']
    for each in objects:
        source = _data("image/png", layer(each.mask, each.number, upload.shown.size))
        name = html.escape(each.phrase or f"object {each.number}", quote=True)
        parts.append(f'<img class="nt-mask nt-o{each.number}" alt="mask: {name}" src="{source}">')
    return f'<div class="nt-picture">{"".join(parts)}</div>'


def writing_html(text: str) -> str:
    """The answer so far, while it is written."""
    return f'<p class="nt-text">{html.escape(text)}<span class="nt-caret">▍</span></p>'


def answer_html(answer: Answer) -> str:
    """The answer with its phrases as switches, and a table of its objects."""
    spans = sorted((each.span, each) for each in answer.objects if each.span)
    out, position = "", 0
    for (start, end), each in spans:
        if start < position:
            continue
        out += html.escape(answer.text[position:start]) + _switch(each, answer.text[start:end])
        position = end
    out += html.escape(answer.text[position:])
    unnamed = [each for each in answer.objects if not each.span]
    out += "".join(" " + _switch(each, f"object {each.number}") for each in unnamed)
    parts = [f'<p class="nt-text">{out or "(the model wrote nothing)"}</p>']
    if answer.nothing_found:
        why = "the model is not sure enough of any" if answer.left_out else "the model marked nothing"
        parts.append(f'<div class="nt-none" role="status">No such object: {why} in this picture.</div>')
    if answer.objects:
        parts.append(_table(answer))
    return "".join(parts)


def _switch(each: SegmentedObject, words: str) -> str:
    return (
        f'<label class="nt-phrase nt-p{each.number}" style="--c:{colour_of(each.number)}" '
        f'title="score {each.score:.2f}; click to keep its mask lit">'
        f'<input type="checkbox">{html.escape(words)}</label>'
    )


def _table(answer: Answer) -> str:
    rows = []
    for each in answer.objects:
        box = ", ".join(f"{edge:.0f}" for edge in each.box or ())
        share = 100 * each.mask.mean()
        rows.append(
            f'<tr><td><span class="nt-dot" style="--c:{colour_of(each.number)}"></span>'
            f"{html.escape(each.phrase or '–')}</td><td>{each.score:.2f}</td><td>{box}</td><td>{share:.1f} %</td></tr>"
        )
    head = "<tr><th>object</th><th>score</th><th>box (x1, y1, x2, y2)</th><th>of the picture</th></tr>"
    return f'<table class="nt-table">{head}{"".join(rows)}</table>'


def error_html(message: str) -> str:
    """What went wrong and what to do."""
    return f'<div class="nt-error" role="alert">{html.escape(message)}</div>'


def empty_html(message: str) -> str:
    """The place of an answer before there is one."""
    return f'<div class="nt-empty">{html.escape(message)}</div>'


def neurons_html(firing: Firing) -> str:
    """A strip for each tuned layer, a column for each unit: bright where it fired at most tokens."""
    rows = []
    for row, layer_index in enumerate(firing.layers):
        best = ", ".join(f"{unit} ({share:.0%})" for unit, share in firing.most_active(row))
        rows.append(
            f'<span>layer {layer_index}</span><img class="nt-neurons" alt="units of layer {layer_index}" '
            f'src="{_data("image/png", _strip(firing.shares[row]))}"><span></span><span>most often: {best}</span>'
        )
    return (
        f"<p>{firing.tokens} tokens; one column for each of the {firing.counts.shape[1]} units of the sparse vector. "
        "Bright: fired at every token of the answer; dark: at none.</p>"
        f'<div class="nt-layer">{"".join(rows)}</div>'
    )


def _strip(shares_Z: np.ndarray) -> bytes:
    # From the page's dark blue to amber.
    dark, bright = np.array([17, 24, 39]), np.array([251, 191, 36])
    pixels = dark + shares_Z[None, :, None] * (bright - dark)
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
