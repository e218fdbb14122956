"""Dataset: pictures brought in, edited, checked, and shown as training will see them.

The markup stands here, so that its texts are with those of the other tabs; assets/dataset.js fills it, and
`app.album` answers what it asks.
"""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from app.album import Tasks, answer
from app.session import Session
from app.shell import answered, user_of
from trainer.pictures.faces import YUNET, YUNET_URL

__all__ = ["render"]

CONNECT = "kiln.dataset.connect(server);"
EMPTY = (
    "No pictures here yet. Bring some in, or open a folder. Between 256 and 2048 pixels is right; nothing needs "
    "to be resized."
)


def _button(label: str, what: str, *, kind: str = "", needs: str = "", name: str = "", key: str = "") -> str:
    attributes = f' data-needs="{needs}"' if needs else ""
    attributes += f' id="dataset-{name}"' if name else ""
    attributes += f' title="{html.escape(key)}"' if key else ""
    kinds = f"kiln-small {kind}".strip()
    return f'<button type="button" class="{kinds}" data-dataset="{what}"{attributes}>{html.escape(label)}</button>'


def _field(label: str, name: str, hint: str = "", kind: str = "text", browse: bool = False) -> str:
    field = (
        f'<label class="kiln-field"><span>{html.escape(label)}</span><input type="{kind}" name="{name}" '
        f'placeholder="{html.escape(hint, quote=True)}" spellcheck="false" autocomplete="off"></label>'
    )
    if not browse:
        return field
    tool = f'<button type="button" class="kiln-small" data-browse-into="{name}">Browse</button>'
    return f'<div class="kiln-pair">{field}{tool}</div>'


def _markup(models: str) -> str:
    place = (
        '<form id="dataset-place" class="kiln-find" onsubmit="return false">'
        '<label class="kiln-field wide"><span>Folder</span>'
        '<input type="text" id="dataset-folder" name="folder" spellcheck="false" '
        'placeholder="The folder with the pictures, or that of a project"></label>'
        '<button type="button" class="kiln-small" data-browse-into="folder">Browse</button>'
        + _button("Open the folder", "open", kind="primary")
        + _button("Folder of the settings", "settings")
        + _button("Train this folder", "use")
        + "</form>"
    )
    new = (
        '<details id="dataset-new"><summary>New project</summary><form id="dataset-project" class="kiln-form" '
        'onsubmit="return false">'
        + '<div class="kiln-pair wide">'
        + _field("Name of the person, character or thing", "name", "Jane Doe")
        + _button("Propose a token", "token")
        + "</div>"
        + _field("Token: a rare word", "token", "j4n3d03")
        + _field("Class: what it is", "class", "person")
        + _field("Repeats", "repeats", "400 / pictures", "number")
        + _field("Where the project goes", "place", "projects", browse=True)
        + _button("Make the project", "project", kind="primary")
        + '<p id="dataset-token-words" role="status"></p></form></details>'
        '<details><summary>Dataset preparation, as in Kohya</summary><form id="dataset-prepare" class="kiln-form" '
        'onsubmit="return false">'
        + _field("Instance prompt", "instance", "sks")
        + _field("Class prompt", "class", "dog")
        + _field("Training images", "images", "", browse=True)
        + _field("Repeats", "repeats", "40", "number")
        + _field("Regularisation images", "reg", "optional", browse=True)
        + _field("Repeats of these", "reg_repeats", "1", "number")
        + _field("Destination folder", "destination", "", browse=True)
        + _button("Prepare training data", "prepare", kind="primary")
        + '</form><p class="kiln-empty">Copies the folders and fills in the settings.</p></details>'
    )
    drop = (
        '<div id="dataset-drop"><p>Drop pictures, folders or a ZIP here</p><div class="kiln-buttons">'
        + _button("Choose files", "files")
        + _button("Choose a folder", "folders")
        + '<form onsubmit="return false" class="kiln-find"><input type="text" id="dataset-source" name="source" '
        'aria-label="Folder or ZIP on the server" placeholder="or a folder or ZIP on the server" spellcheck="false">'
        '<button type="button" class="kiln-small" data-browse-into="source">Browse</button>'
        + _button("Copy in", "source")
        + '</form></div><input type="file" id="dataset-files" multiple hidden><input type="file" id="dataset-folders" '
        "webkitdirectory multiple hidden></div>"
    )
    tools = (
        '<div id="dataset-tools" class="kiln-toolbar" role="toolbar" aria-label="Edit the chosen pictures" hidden>'
        '<span id="dataset-picked" role="status"></span>'
        + _button("All", "all", key="Ctrl+A")
        + _button("None", "none")
        + '<span class="gap"></span>'
        + _button("Leave out", "exclude", needs="any", key="X")
        + _button("Take in", "include", needs="any", key="I")
        + _button("Turn left", "left", needs="any", key="Shift+R")
        + _button("Turn right", "right", needs="any", key="R")
        + _button("Mirror", "flip", needs="any", key="F")
        + _button("Crop …", "crop", needs="one", key="C")
        + _button("Uncrop", "uncrop", needs="any")
        + '<span class="gap"></span>'
        + _button("Undo", "undo", name="undo", key="Ctrl+Z")
        + _button("Redo", "redo", name="redo", key="Ctrl+Y")
        + "</div>"
    )
    work = (
        '<div id="dataset-work" hidden><div class="kiln-toolbar">'
        + _button("Check the pictures", "check", kind="primary")
        + '<label class="kiln-switch"><input type="checkbox" id="dataset-person" checked>'
        " <span>It is a person</span></label>"
        + _button("Is one mirrored?", "mirrored")
        + _button("What will training see?", "buckets")
        + "</div>"
        '<div id="dataset-findings"></div><div id="dataset-mirrored"></div><div id="dataset-buckets"></div></div>'
    )
    more = (
        '<div id="dataset-more" hidden>'
        "<details><summary>Write edited copies</summary><form class='kiln-find' onsubmit='return false'>"
        '<input type="text" id="dataset-target" name="target" aria-label="New folder for the copies" '
        'placeholder="New folder for the copies" spellcheck="false">'
        + _button("Write them", "copies")
        + "</form><p class='kiln-empty'>Training applies the edits by itself; copies are for other programs.</p>"
        "</details><details><summary>How faces are found</summary><p class='kiln-empty'>Built in are OpenCV's "
        "cascades: they find upright faces in photographs, and miss turned, covered and drawn ones. YuNet finds "
        f"more: put its file <code>{YUNET}</code> (230 KB, MIT) from <code>{YUNET_URL}</code> into "
        f"<code>{html.escape(models)}</code>; the next check uses it.</p></details></div>"
    )
    return (
        '<div id="dataset-page">'
        + place
        + new
        + drop
        + '<div id="dataset-progress"></div><p id="dataset-answer" role="status"></p><div id="dataset-refused"></div>'
        + f'<p id="dataset-empty" class="kiln-empty">{EMPTY}</p>'
        + work
        + tools
        + '<div id="dataset-grid"></div>'
        + more
        + '<dialog id="dataset-crop" aria-label="Crop"></dialog></div>'
    )


def render(session: Session) -> None:
    """Lay out the tab."""
    tasks = Tasks()

    def dataset(data: Any, request: gr.Request) -> dict[str, Any]:
        asked = data if isinstance(data, dict) else {}
        return answered(lambda: answer(session, tasks, asked, user_of(request)))

    gr.HTML(
        _markup(str(session.state / "models")),
        js_on_load=CONNECT,
        server_functions=[dataset],
        elem_id="dataset",
        padding=False,
    )
