"""Captioning: texts for the pictures, written by a model, by a person, or mended many at once.

The markup stands here, so that every text is in one place with those of the other tabs; assets/captioning.js
fills it in, and `app.captions` answers.
"""

from __future__ import annotations

import html
import json
from typing import Any

import gradio as gr

from app import captions as server
from app.session import Session
from app.shell import QUIET, answered, user_of

__all__ = ["render", "wire"]

CONNECT = "kiln.captions.connect(server);"

SHIPPED = "These pictures belong to the program and stay as they are. Work on a copy of them."
KEYS = "Alt+↓ and Alt+↑ go to the next and previous picture and save. Esc takes back what you typed."

MASK_KEYS = "By keyboard: the arrow keys move the brush, Space paints, Shift with an arrow key draws a line."

TOP = """<div class="kiln-cap-top"><p id="cap-summary" role="status">
 The captions of the pictures in the settings.</p><div class="kiln-buttons">
<button type="button" class="kiln-small" id="look-captions">Look at the captions</button>
<button type="button" class="kiln-small" id="cap-undo" disabled>Undo</button>
<button type="button" class="kiln-small" id="cap-redo" disabled>Redo</button></div></div>
<p id="cap-answer" role="status" aria-live="polite"></p>
<div id="cap-shipped" class="kiln-alert warned" hidden><p>{shipped}</p><div class="kiln-buttons">
<button type="button" class="kiln-small primary" id="cap-copy">Copy the pictures</button></div></div>"""

WRITER = """<details id="cap-writer" class="kiln-cap-box"><summary>Write captions with a model</summary>
<form onsubmit="return false"><div class="kiln-cap-fields">
<label class="kiln-field"><span>Captioner</span><select id="cap-captioner"></select>
<small id="cap-about"></small></label>
<label class="kiln-field wide"><span>Model</span><input type="text" id="cap-model" list="cap-models" spellcheck="false">
<datalist id="cap-models"></datalist>
<small>A folder, or a name on the model hub, from where it is fetched once.</small>
</label></div>
<div class="kiln-cap-fields" id="cap-options"></div>
<div class="kiln-cap-fields">
<label class="kiln-field"><span>Put in front</span><input type="text" id="cap-prefix" spellcheck="false">
<small>A space follows, as in Kohya.</small></label>
<label class="kiln-field"><span>Put behind</span><input type="text" id="cap-postfix" spellcheck="false"></label>
<label class="kiln-field"><span>If there is a caption</span><select id="cap-existing" class="kiln-words">
<option value="keep">Leave it</option><option value="machine">Replace it if a captioner wrote it</option>
<option value="all">Replace it, my own too</option></select></label>
<label class="kiln-check" id="cap-append-row"><input type="checkbox" id="cap-append">
<span>Add new tags to the caption that is there</span></label></div>
<div class="kiln-buttons"><button type="button" class="kiln-small primary" id="cap-start">Write captions</button>
<button type="button" class="kiln-small" id="cap-stop" hidden>Stop</button>
<label class="kiln-check"><input type="checkbox" id="cap-selected-only"><span>Only the selected pictures</span></label>
</div></form><div id="cap-progress"></div></details>"""

EDITOR = """<div id="cap-work" hidden><div class="kiln-cap-list">
<div class="kiln-cap-filter"><input type="search" id="cap-find" aria-label="Words in the caption"
 placeholder="Words in the caption"><select id="cap-only" class="kiln-words" aria-label="Which captions are shown">
<option value="">All</option><option value="missing">Without a caption</option><option value="long">Too long</option>
<option value="habits">With habits of a captioner</option><option value="machine">By a captioner</option>
<option value="person">By a person</option><option value="problem">Unreadable</option></select></div>
<div class="kiln-cap-filter"><label class="kiln-check"><input type="checkbox" id="cap-all"><span>Select all shown</span>
</label><span id="cap-count" role="status"></span></div>
<ol id="cap-list" aria-label="Pictures"></ol></div>
<div class="kiln-cap-editor"><div id="cap-stage"><img id="cap-picture" alt="">
<canvas id="cap-mask" role="application" hidden
 aria-label="Mask: paint the part that counts" aria-describedby="cap-mask-keys"></canvas></div>
<div id="cap-mask-tools" class="kiln-cap-tools" hidden>
<label class="kiln-check"><input type="radio" name="cap-brush" value="in" checked><span>Counts</span></label>
<label class="kiln-check"><input type="radio" name="cap-brush" value="out"><span>Does not count</span></label>
<label class="kiln-check"><span>Brush</span>
<input type="range" id="cap-brush-size" min="4" max="200" value="50"></label>
<button type="button" class="kiln-small" data-mask="all">All counts</button>
<button type="button" class="kiln-small" data-mask="none">Nothing counts</button>
<button type="button" class="kiln-small" data-mask="invert">Swap</button>
<button type="button" class="kiln-small primary" data-mask="save">Save the mask</button>
<button type="button" class="kiln-small" data-mask="cancel">Cancel</button>
<small id="cap-mask-keys">{mask_keys}</small></div>
<p id="cap-mask-words" class="kiln-cap-facts"></p>
<label class="kiln-cap-label" for="cap-text">Caption of <b id="cap-name" class="kiln-asis"></b></label>
<textarea id="cap-text" rows="5" spellcheck="true" aria-describedby="cap-facts cap-keys"></textarea>
<p id="cap-problem" class="kiln-error" hidden></p>
<p class="kiln-cap-facts" id="cap-facts"><span id="cap-tokens"></span><span id="cap-source"></span></p>
<div id="cap-flags" class="kiln-cap-chips"></div>
<div class="kiln-buttons"><button type="button" class="kiln-small" id="cap-previous">Previous</button>
<button type="button" class="kiln-small primary" id="cap-next">Save and next</button>
<button type="button" class="kiln-small" id="cap-paint">Draw a mask</button>
<button type="button" class="kiln-small" id="cap-unmask" hidden>Remove the mask</button></div>
<p id="cap-keys" class="kiln-empty">{keys}</p>
<details id="cap-history"><summary>History</summary><ol id="cap-versions"></ol></details></div></div>"""

TOOLS = """<div id="cap-tools" hidden><h3>Many at once <small id="cap-scope" role="status"></small></h3>
<details class="kiln-cap-box" id="cap-tags-box"><summary>Tags</summary>
<p class="kiln-empty">Parts between commas. Choose one to see the captions that have it.</p>
<div id="cap-tags" class="kiln-cap-chips"></div><div id="cap-tag-tools" class="kiln-buttons" hidden>
<b id="cap-tag" class="kiln-asis"></b>
<button type="button" class="kiln-small" data-tag-do="remove">Remove</button>
<input type="text" id="cap-tag-new" aria-label="New name of the tag" spellcheck="false">
<button type="button" class="kiln-small" data-tag-do="rename">Rename</button>
<button type="button" class="kiln-small" data-tag-do="first">To the front</button>
<button type="button" class="kiln-small" data-tag-do="last">To the end</button>
<button type="button" class="kiln-small" data-tag-do="clear">Show all again</button></div>
<div class="kiln-buttons"><input type="text" id="cap-tag-add" aria-label="Tag to add" placeholder="Tag to add"
 spellcheck="false"><button type="button" class="kiln-small" data-tag-do="add">Add in front</button>
<button type="button" class="kiln-small" data-tag-do="add-last">Add at the end</button>
<button type="button" class="kiln-small" data-tag-do="sort">Frequent ones first</button></div></details>
<details class="kiln-cap-box"><summary>Find and replace</summary><div class="kiln-buttons">
<input type="text" id="cap-replace-find" aria-label="Find" placeholder="Find" spellcheck="false">
<input type="text" id="cap-replace-to" aria-label="Replace with" placeholder="Replace with" spellcheck="false">
<label class="kiln-check"><input type="checkbox" id="cap-replace-case" checked><span>Match case</span></label>
<label class="kiln-check"><input type="checkbox" id="cap-replace-pattern">
<span>Pattern (regular expression)</span></label>
<button type="button" class="kiln-small" id="cap-replace">Preview</button></div></details>
<details class="kiln-cap-box"><summary>In front and behind</summary><div class="kiln-buttons">
<input type="text" id="cap-affix-prefix" aria-label="Put in front" placeholder="Put in front" spellcheck="false">
<input type="text" id="cap-affix-postfix" aria-label="Put behind" placeholder="Put behind" spellcheck="false">
<button type="button" class="kiln-small" id="cap-affix">Preview</button></div></details>
<details class="kiln-cap-box"><summary>Habits of captioners</summary>
<p class="kiln-empty">Phrases that BLIP and its like add whatever the picture shows. Untick what is true here.</p>
<ul id="cap-habits"></ul><label class="kiln-field wide"><span>My own phrases, one a line</span>
<textarea id="cap-own" rows="3" spellcheck="false"></textarea></label><div class="kiln-buttons">
<button type="button" class="kiln-small" id="cap-own-save">Look for them</button>
<button type="button" class="kiln-small primary" id="cap-unhabit">Remove the ticked</button></div></details>
<div id="cap-plan" class="kiln-cap-box" hidden tabindex="-1" role="region"
 aria-label="Preview of the changes"></div></div>"""


def render(session: Session) -> None:
    """Lay out the tab."""

    def captions(data: Any, request: gr.Request) -> dict[str, Any]:
        asked = data if isinstance(data, dict) else {}
        return answered(lambda: server.answer(session, asked, user_of(request)))

    demo = str(server.DEMO_CAPTIONER) if server.DEMO_CAPTIONER.is_dir() else ""
    facts = json.dumps({"captioners": server.captioner_facts(), "demo": demo}, separators=(",", ":"))
    kept = f'<div id="cap-data" class="kiln-asis" hidden>{html.escape(facts)}</div>'  # gradio warns of script elements
    markup = (
        (TOP + WRITER + EDITOR + TOOLS)
        .replace("{shipped}", SHIPPED)
        .replace("{keys}", KEYS)
        .replace("{mask_keys}", MASK_KEYS)
    )
    gr.HTML(
        markup + kept,
        js_on_load=CONNECT,
        server_functions=[captions],
        elem_id="captions",
        padding=False,
    )


def wire(tab: gr.Tab) -> None:
    """Look when the tab is opened; the page's own clock follows a captioning that goes on."""
    tab.select(None, None, None, js="() => kiln.captions.opened()", **QUIET)
