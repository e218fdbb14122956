// Dataset: brings pictures in, shows them in a grid, edits and checks them. The server does the work and
// reads nothing here as truth; names and captions are set as text, never as HTML.
"use strict";
kiln.dataset = (() => {
    const state = {server: null, folder: "", sets: [], pictures: new Map(), order: [], picked: new Set(), at: "", thumbs: new Map(),
        wanted: new Set(), asking: 0, task: "", findings: null, buckets: null, busy: 0, opened: false, crop: null};
    const by = (id) => document.getElementById(`dataset-${id}`);
    const wait = (ms) => new Promise((done) => setTimeout(done, ms));
    const text = (value) => document.createTextNode(String(value));

    function element(tag, attributes = {}, ...children) {
        const made = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) made.setAttribute(name, value);
        made.append(...children.map((child) => (child instanceof Node ? child : text(child))));
        return made;
    }
    const button = (label, what, data = {}, kind = "") => {
        const made = element("button", {type: "button", class: `kiln-small ${kind}`, "data-dataset": what}, label);
        if (Object.keys(data).length) made.dataset.more = JSON.stringify(data);
        return made;
    };

    function say(words, isError) {
        const box = by("answer");
        box.textContent = words || "";
        box.classList.toggle("kiln-error", Boolean(isError));
        if (isError) box.scrollIntoView({block: "nearest"});
    }

    async function ask(data) {
        const answer = await state.server.dataset({folder: state.folder, settings: kiln.draft(), ...data});
        if (answer.error) { say(answer.error, true); return null; }
        return answer;
    }

    // ---- long tasks: a bar with what is left, and a Stop ---------------------------------------------
    async function follow(words, data) {
        if (state.task) { say("Something is going on already: wait for it, or stop it.", true); return null; }
        const started = await ask(data);
        if (!started) return null;
        state.task = started.task;
        const box = by("progress");
        let answer = {done: 0, total: 0};
        try {
            for (let turn = 0; ; turn++) {
                const share = answer.total ? answer.done / answer.total : 0;
                const left = answer.left_s != null && answer.done ? `${Math.max(1, Math.round(answer.left_s))} s left` : "";
                const bar = element("div", {class: `kiln-progress ${answer.total ? "" : "unknown"}`},
                    element("div", {class: "words"}, element("b", {}, words),
                        element("span", {}, answer.total ? `${answer.done} / ${answer.total}` : ""), element("span", {}, left)),
                    element("div", {class: "bar"}, element("i", {style: `width:${(100 * share).toFixed(1)}%`})));
                box.replaceChildren(bar, button("Stop", "stop"));
                await wait(turn < 4 ? 150 : 400);
                answer = await state.server.dataset({do: "progress", task: state.task, folder: state.folder});
                if (answer.error) { say(answer.error, true); return null; }
                if (answer.over) return answer.result;
            }
        } finally {
            state.task = "";
            box.replaceChildren();
        }
    }

    // ---- the folder that is open -----------------------------------------------------------------------
    function take(answer) {
        state.folder = answer.root;
        state.sets = answer.sets;
        state.pictures = new Map();
        for (const set of answer.sets) for (const picture of set.pictures) state.pictures.set(picture.id, {...picture, set: set.name});
        state.order = [...state.pictures.keys()];
        state.picked = new Set([...state.picked].filter((id) => state.pictures.has(id)));
        if (!state.pictures.has(state.at)) state.at = state.order[0] || "";
        by("folder").value = answer.root;
        draw();
    }

    async function open(folder, quiet) {
        const answer = await state.server.dataset({do: "open", folder: folder || "", settings: kiln.draft()});
        if (answer.error) {
            if (!quiet) say(answer.error, true);
            draw();
            return false;
        }
        if (answer.root !== state.folder) {
            Object.assign(state, {picked: new Set(), at: "", thumbs: new Map(), findings: null, buckets: null});
            by("findings").replaceChildren();
            by("mirrored").replaceChildren();
            by("buckets").replaceChildren();
            say("");
        }
        take(answer);
        return true;
    }

    async function first() {
        if (state.opened) return;
        state.opened = true;
        await open("", true);
    }

    // ---- the grid --------------------------------------------------------------------------------------
    const signature = (picture) => `${picture.words}|${picture.size}`;

    function draw() {
        const grid = by("grid"), all = state.order.length, empty = !all;
        by("empty").hidden = !empty;
        by("tools").hidden = empty;
        by("work").hidden = empty;
        by("more").hidden = empty;
        const parts = [];
        for (const set of state.sets) {
            const out = set.pictures.length - set.kept, title = element("h4", {class: "kiln-set"}, element("b", {}, set.name), " ",
                element("span", {}, `${set.kept} picture${set.kept === 1 ? "" : "s"}${out ? `, ${out} left out` : ""}`));
            if (set.repeats !== null) {
                const box = element("input", {type: "number", min: 1, max: 10000, value: set.repeats, "data-repeats": set.name,
                    "aria-label": "Repeats"});
                title.append(" ", element("label", {}, "Repeats", " ", box),
                    " ", element("span", {}, `${set.repeats * set.kept} an epoch`));
                if (set.kept && Math.abs(set.repeats * set.kept - 400) > 100)
                    title.append(" ", button(`Use ${set.wanted}: 400 an epoch`, "repeats", {set: set.name, repeats: set.wanted}));
            }
            const list = element("div", {class: "kiln-pictures", role: "listbox", "aria-multiselectable": "true", "aria-label": set.name});
            for (const picture of set.pictures) list.append(figure(picture));
            parts.push(title, list);
        }
        grid.replaceChildren(...parts);
        by("undo").disabled = !state.sets.some((set) => set.done);
        by("redo").disabled = !state.sets.some((set) => set.undone);
        by("undo").title = state.sets.map((set) => set.done).filter(Boolean).join("; ");
        watch();
        selection();
    }

    function figure(picture) {
        const image = element("img", {alt: "", loading: "lazy", draggable: "false"});
        const known = state.thumbs.get(picture.id);
        if (known && known.signature === signature(picture)) image.src = known.src;
        const marks = element("span", {class: "marks"});
        if (picture.broken) marks.append(element("em", {class: "bad"}, "broken"));
        if (picture.excluded) marks.append(element("em", {}, "left out"));
        if (picture.words) marks.append(element("em", {}, picture.words));
        if (picture.outdated) marks.append(element("em", {class: "bad"}, "crop again"));
        const [wide, tall] = picture.size || [1, 1];
        const shape = element("span", {class: "shape", style: `aspect-ratio:${wide}/${tall};${wide >= tall ? "width" : "height"}:100%`}, image);
        const frame = element("span", {class: "frame"}, shape);
        const bucket = state.buckets && state.buckets[picture.id];
        if (bucket) {
            const [left, top, right, bottom] = bucket.box.map((value) => (100 * value).toFixed(2));
            shape.append(element("i", {class: "cut", style: `inset:${top}% ${100 - right}% ${100 - bottom}% ${left}%`}));
            marks.append(element("em", {class: bucket.upscaled ? "bad" : ""}, `${bucket.bucket.join(" x ")}${bucket.upscaled ? " enlarged" : ""}`));
        }
        const size = picture.size ? picture.size.join(" x ") : "";
        const item = element("figure", {"data-id": picture.id, role: "option", tabindex: picture.id === state.at ? 0 : -1,
            "aria-selected": String(state.picked.has(picture.id)), class: picture.excluded ? "out" : "",
            "aria-label": [picture.name, size, picture.words, picture.excluded ? "left out" : "", picture.broken || ""].filter(Boolean).join(", ")},
            frame, marks, element("figcaption", {title: picture.broken || picture.name}, element("b", {}, picture.name),
                element("span", {}, picture.broken || `${size}${picture.caption ? "" : " · no caption"}`)));
        return item;
    }

    let watcher = null;
    function watch() {
        if (watcher) watcher.disconnect();
        watcher = new IntersectionObserver((entries) => {
            for (const entry of entries) {
                const id = entry.target.dataset.id, picture = state.pictures.get(id), known = state.thumbs.get(id);
                if (!entry.isIntersecting || !picture || picture.broken) state.wanted.delete(id);
                else if (!known || known.signature !== signature(picture)) state.wanted.add(id);
            }
            fetchThumbs();
        }, {rootMargin: "300px"});
        for (const item of by("grid").querySelectorAll("figure")) watcher.observe(item);
    }

    async function fetchThumbs() {
        if (state.asking) return;
        state.asking = 1;
        try {
            while (state.wanted.size) {
                const ids = [...state.wanted].slice(0, 24);
                for (const id of ids) state.wanted.delete(id);
                const answer = await state.server.dataset({do: "thumbs", folder: state.folder, ids});
                if (answer.error) return;
                for (const [id, src] of Object.entries(answer.thumbs)) place(id, src);
            }
        } finally { state.asking = 0; }
    }

    function place(id, src) {
        const picture = state.pictures.get(id), item = item_of(id);
        if (!picture || !src) return;
        state.thumbs.set(id, {src, signature: signature(picture)});
        if (item) item.querySelector("img").src = src;
    }
    const item_of = (id) => by("grid").querySelector(`figure[data-id="${CSS.escape(id)}"]`);

    // ---- choosing pictures --------------------------------------------------------------------------------
    function selection() {
        for (const item of by("grid").querySelectorAll("figure")) {
            item.setAttribute("aria-selected", String(state.picked.has(item.dataset.id)));
            item.tabIndex = item.dataset.id === state.at ? 0 : -1;
        }
        const count = state.picked.size;
        by("picked").textContent = count ? `${count} chosen` : "Click pictures to choose them";
        for (const item of by("tools").querySelectorAll("[data-needs]")) item.disabled = !count || (item.dataset.needs === "one" && count !== 1);
    }

    function choose(id, event) {
        if (event.shiftKey && state.at) {
            const [from, to] = [state.order.indexOf(state.at), state.order.indexOf(id)].sort((one, other) => one - other);
            for (const other of state.order.slice(from, to + 1)) state.picked.add(other);
        } else if (state.picked.has(id)) state.picked.delete(id);
        else state.picked.add(id);
        state.at = id;
        selection();
    }

    function step(by_, event) {
        const place_ = Math.min(state.order.length - 1, Math.max(0, state.order.indexOf(state.at) + by_));
        const from = state.at;
        state.at = state.order[place_];
        if (event.shiftKey) { state.picked.add(from); state.picked.add(state.at); }
        selection();
        const item = item_of(state.at);
        if (item) { item.focus(); item.scrollIntoView({block: "nearest"}); }
    }

    const columns = () => {
        const items = [...by("grid").querySelectorAll("figure")];
        const first_ = items.length ? items[0].offsetTop : 0;
        return Math.max(1, items.filter((item) => item.offsetTop === first_).length);
    };

    async function edit(what, more = {}) {
        const ids = more.ids || (state.picked.size ? [...state.picked] : state.at ? [state.at] : []);
        if (!ids.length) return false;
        const answer = await ask({do: "edit", what, ids, ...more, folder: state.folder});
        if (!answer) return false;
        const at = document.activeElement && document.activeElement.closest("#dataset-grid figure");
        state.buckets = null;
        take(answer);
        say("");
        if (at) { const item = item_of(state.at); if (item) item.focus(); }
        return true;
    }

    async function back(what) {
        const answer = await ask({do: what});
        if (!answer) return;
        const at = document.activeElement && document.activeElement.closest("#dataset-grid figure");
        state.buckets = null;
        take(answer);
        if (at && item_of(state.at)) item_of(state.at).focus();
        say(answer.words ? `${what === "undo" ? "Taken back" : "Made again"}: ${answer.words}` : "");
    }

    // ---- cropping --------------------------------------------------------------------------------------------
    const RATIOS = [["Free", 0], ["1 : 1", 1], ["2 : 3", 2 / 3], ["3 : 2", 3 / 2], ["3 : 4", 3 / 4], ["4 : 3", 4 / 3], ["9 : 16", 9 / 16], ["16 : 9", 16 / 9]];

    async function cropping(id = state.picked.size === 1 ? [...state.picked][0] : state.at) {
        if (!id) return;
        const answer = await ask({do: "preview", id});
        if (!answer) return;
        const box = answer.crop || [0, 0, 1, 1];
        state.crop = {id, box, face: answer.face, size: answer.size, ratio: 0, ratios: answer.ratios};
        const dialog = by("crop");
        const image = element("img", {src: answer.src, alt: state.pictures.get(id).name, draggable: "false"});
        await image.decode().catch(() => {});  // else the box would grow under the hand
        const cut = element("i", {class: "cut", tabindex: 0, role: "group",
            "aria-label": "Crop: arrow keys move it, with Shift they resize it"}, element("u", {}));
        const stage = element("div", {class: "stage"}, image, cut);
        const ratio = element("select", {"aria-label": "Aspect ratio"});
        RATIOS.forEach(([label, value]) => ratio.append(element("option", {value}, label)));
        ratio.addEventListener("change", () => { state.crop.ratio = Number(ratio.value); fit(); });
        const tools = element("div", {class: "kiln-buttons"}, ratio);
        const face = button("Around the face", "crop-face");
        face.disabled = !answer.face;
        tools.append(face, button("Nearest bucket", "crop-bucket"), button("Whole picture", "crop-whole"),
            element("span", {id: "dataset-crop-size"}));
        const end = element("div", {class: "kiln-buttons"}, button("Crop", "crop-do", {}, "primary"), button("Cancel", "crop-cancel"));
        dialog.replaceChildren(element("h3", {}, "Crop"), tools, stage, end);
        if (!dialog.open) dialog.showModal();
        showCut();
        cut.focus();
    }

    function showCut() {
        const {box, size} = state.crop, cut = by("crop").querySelector(".cut");
        const [left, top, right, bottom] = box.map((value) => 100 * value);
        cut.style.inset = `${top}% ${100 - right}% ${100 - bottom}% ${left}%`;
        const words = by("crop-size");
        if (words) words.textContent = `${Math.round((box[2] - box[0]) * size[0])} x ${Math.round((box[3] - box[1]) * size[1])}`;
    }

    function setBox(left, top, right, bottom) {
        const smallest = 16 / Math.min(...state.crop.size);
        left = Math.max(0, Math.min(left, 1 - smallest));
        top = Math.max(0, Math.min(top, 1 - smallest));
        right = Math.min(1, Math.max(right, left + smallest));
        bottom = Math.min(1, Math.max(bottom, top + smallest));
        state.crop.box = [left, top, right, bottom];
        showCut();
    }

    // The largest box of the chosen ratio around the middle of the one that is there.
    function fit() {
        const {box, size, ratio} = state.crop;
        if (!ratio) { showCut(); return; }
        const relative = ratio * size[1] / size[0];
        let width = box[2] - box[0], height = box[3] - box[1];
        if (width / height > relative) width = height * relative; else height = width / relative;
        const x = (box[0] + box[2]) / 2, y = (box[1] + box[3]) / 2;
        const left = Math.min(Math.max(0, x - width / 2), 1 - width), top = Math.min(Math.max(0, y - height / 2), 1 - height);
        setBox(left, top, left + width, top + height);
    }

    function drag(event) {
        const stage = event.target.closest(".stage");
        if (!stage || event.button) return;
        event.preventDefault();
        const area = stage.getBoundingClientRect(), start = [...state.crop.box];
        const at = (one) => [(one.clientX - area.left) / area.width, (one.clientY - area.top) / area.height];
        const [x, y] = at(event);
        const edge = event.pointerType === "touch" ? 0.07 : 0.03;
        const near = (value, other) => Math.abs(value - other) < edge;
        const inside = x > start[0] - edge && x < start[2] + edge && y > start[1] - edge && y < start[3] + edge;
        const grips = [near(x, start[0]), near(y, start[1]), near(x, start[2]), near(y, start[3])];
        const resizes = inside && grips.some(Boolean);
        const whole = start[0] === 0 && start[1] === 0 && start[2] === 1 && start[3] === 1;
        const draws = !resizes && (!inside || whole);
        stage.setPointerCapture(event.pointerId);
        const move = (next) => {
            const [here, there] = at(next).map((value) => Math.min(1, Math.max(0, value)));
            if (draws) setBox(Math.min(x, here), Math.min(y, there), Math.max(x, here), Math.max(y, there));
            else if (resizes) setBox(grips[0] ? here : start[0], grips[1] ? there : start[1],
                grips[2] && !grips[0] ? here : start[2], grips[3] && !grips[1] ? there : start[3]);
            else {
                const dx = Math.min(Math.max(here - x, -start[0]), 1 - start[2]), dy = Math.min(Math.max(there - y, -start[1]), 1 - start[3]);
                setBox(start[0] + dx, start[1] + dy, start[2] + dx, start[3] + dy);
            }
        };
        const end = () => {
            stage.removeEventListener("pointermove", move);
            stage.removeEventListener("pointerup", end);
            fit();
        };
        stage.addEventListener("pointermove", move);
        stage.addEventListener("pointerup", end);
    }

    function nudge(event) {
        const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
        if (!steps) return false;
        const [dx, dy] = steps.map((value) => value * 0.01), [left, top, right, bottom] = state.crop.box;
        if (event.shiftKey) setBox(left, top, right + dx, bottom + dy);
        else {
            const x = Math.min(Math.max(dx, -left), 1 - right), y = Math.min(Math.max(dy, -top), 1 - bottom);
            setBox(left + x, top + y, right + x, bottom + y);
        }
        return true;
    }

    // The bucket of the settings that is nearest in shape: what is left is then trained whole.
    function nearestBucket() {
        const {box, size, ratios} = state.crop, ratio = (box[2] - box[0]) * size[0] / ((box[3] - box[1]) * size[1]);
        state.crop.ratio = ratios.reduce((best, other) => (Math.abs(other - ratio) < Math.abs(best - ratio) ? other : best), ratios[0]);
        const named = RATIOS.find(([, value]) => Math.abs(value - state.crop.ratio) < 0.001);
        by("crop").querySelector("select").value = named ? String(named[1]) : "";
        fit();
    }

    // ---- checks ------------------------------------------------------------------------------------------------
    async function check() {
        say("");
        const person = by("person").checked;
        const result = await follow("Checking the pictures", {do: "check", person});
        if (!result || result.stopped) return;
        const groups = new Map();
        for (const finding of result.findings) groups.set(finding.kind, [...(groups.get(finding.kind) || []), finding]);
        const parts = [element("p", {class: "kiln-outcome"}, result.findings.length > 1
            ? `${result.checked} pictures checked, ${result.findings.length} findings`
            : result.findings.length ? `${result.checked} pictures checked, 1 finding` : `${result.checked} pictures checked: nothing to mend`)];
        for (const [kind, findings] of groups) {
            const level = findings.some((item) => item.level === "error") ? "error" : findings.some((item) => item.level === "warning") ? "warning" : "note";
            const head = element("summary", {class: level}, element("b", {}, result.kinds[kind]), " ", element("span", {}, findings.length));
            const list = element("ul", {});
            for (const finding of findings.slice(0, 200)) list.append(findingItem(finding));
            const all = findings.flatMap((finding) => finding.ids);
            const box = element("details", findings.length <= 12 ? {open: ""} : {}, head);
            if (new Set(all).size > 1) box.append(button("Choose these", "pick", {ids: [...new Set(all)]}));
            box.append(list);
            parts.push(box);
        }
        by("findings").replaceChildren(...parts);
        loadThumbs(by("findings"));
    }

    function thumb(id) {
        const known = state.thumbs.get(id);
        return element("img", {alt: "", "data-thumb": id, src: known ? known.src : null, loading: "lazy"});
    }

    async function loadThumbs(root) {
        const ids = [...new Set([...root.querySelectorAll("[data-thumb]:not([src])")].map((item) => item.dataset.thumb))];
        for (let start = 0; start < ids.length; start += 24) {
            const answer = await state.server.dataset({do: "thumbs", folder: state.folder, ids: ids.slice(start, start + 24)});
            for (const [id, src] of Object.entries(answer.thumbs || {}))
                for (const item of root.querySelectorAll(`[data-thumb="${CSS.escape(id)}"]`)) if (src) item.src = src;
        }
    }

    function findingItem(finding) {
        const shown = element("span", {class: "thumbs"});
        for (const id of finding.ids.slice(0, 4)) shown.append(thumb(id));
        const tools = element("span", {class: "kiln-buttons"});
        for (const repair of finding.repairs)
            tools.append(button(repair.label, "repair", {what: repair.what, ids: repair.ids, box: repair.box}));
        return element("li", {class: finding.level}, shown, element("span", {}, finding.message), tools);
    }

    async function mirrored() {
        say("");
        const result = await follow("Comparing the pictures with each other", {do: "mirrored"});
        if (!result || result.stopped) return;
        const parts = [element("p", {class: "kiln-outcome"}, result.words)];
        if (result.suspects.length) {
            const list = element("ul", {class: "kiln-mirrors"});
            for (const suspect of result.suspects) {
                list.append(element("li", {}, element("figure", {}, thumb(suspect.id), element("figcaption", {}, state.pictures.get(suspect.id).name)),
                    element("figure", {}, thumb(result.reference), element("figcaption", {}, "for comparison")),
                    element("span", {}, `looks mirrored, ${suspect.percent} %`),
                    element("span", {class: "kiln-buttons"}, button("Mirror it", "flip-one", {ids: [suspect.id]}), button("Leave it", "drop"))));
            }
            parts.push(list);
        }
        by("mirrored").replaceChildren(...parts);
        loadThumbs(by("mirrored"));
    }

    async function buckets() {
        say("");
        const result = await follow("Reading what training will see", {do: "buckets"});
        if (!result || result.stopped) return;
        state.buckets = result.pictures;
        const most = Math.max(1, ...result.buckets.map((item) => item.samples));
        const enlarged = Object.values(result.pictures).filter((item) => item.upscaled).length;
        const rows = result.buckets.map((item) => element("tr", {}, element("th", {scope: "row"}, item.size.join(" x ")),
            element("td", {}, item.pictures), element("td", {}, item.samples),
            element("td", {class: "chart"}, element("i", {style: `width:${(100 * item.samples / most).toFixed(1)}%`}))));
        const head = element("tr", {}, ...["Bucket", "Pictures", "With repeats", ""].map((title) => element("th", {scope: "col"}, title)));
        const words = `${result.steps} steps an epoch with batch size ${result.batch}`
            + (enlarged ? `; ${enlarged} enlarged` : "") + (result.classes ? `; ${result.classes} class pictures` : "");
        const notes = element("ul", {class: "kiln-checks"});
        for (const finding of result.findings) notes.append(element("li", {class: finding.level === "info" ? "note" : finding.level},
            element("b", {}, finding.level === "info" ? "Note" : finding.level === "warning" ? "Warning" : "Error"), element("span", {}, finding.message)));
        by("buckets").replaceChildren(element("p", {class: "kiln-outcome"}, words),
            element("table", {class: "kiln-table kiln-bucket-table"}, element("thead", {}, head), element("tbody", {}, ...rows)), notes,
            element("p", {class: "kiln-empty"}, "In the grid, the frame on each picture is what its bucket keeps."));
        draw();
    }

    // ---- bringing in ---------------------------------------------------------------------------------------------
    async function entries(items) {
        const files = [];
        async function walk(entry, path) {
            if (entry.isFile) files.push({file: await new Promise((done, fail) => entry.file(done, fail)), name: path + entry.name});
            else if (entry.isDirectory) {
                const reader = entry.createReader();
                for (;;) {
                    const some = await new Promise((done, fail) => reader.readEntries(done, fail));
                    if (!some.length) break;
                    for (const one of some) await walk(one, `${path}${entry.name}/`);
                }
            }
        }
        // Both are asked at once: after the first wait the browser has forgotten what was dropped.
        const dropped = [...items].filter((item) => item.kind === "file")
            .map((item) => ({entry: item.webkitGetAsEntry && item.webkitGetAsEntry(), file: item.getAsFile()}));
        for (const {entry, file} of dropped) {
            if (entry) await walk(entry, "");
            else if (file) files.push({file, name: file.name});  // from another program, which has no folders
        }
        return files;
    }

    async function bring(files, more = {}) {
        if (!files.length && !more.source) return;
        if (!state.folder) { say("Open a folder or make a project first: the pictures are copied there.", true); return; }
        const into = state.sets.length ? state.sets[0].path : state.folder, uploaded = [];
        const box = by("progress");
        for (let start = 0; start < files.length; start += 8) {
            const form = new FormData();
            for (const item of files.slice(start, start + 8)) form.append("files", item.file, item.file.name);
            box.replaceChildren(element("div", {class: "kiln-progress"}, element("div", {class: "words"},
                element("b", {}, "Sending the pictures"), element("span", {}, `${start} / ${files.length}`)),
                element("div", {class: "bar"}, element("i", {style: `width:${100 * start / files.length}%`}))));
            const answer = await fetch("/gradio_api/upload", {method: "POST", body: form});
            if (!answer.ok) { box.replaceChildren(); say(`The server did not take the files (${answer.status}): send fewer or smaller ones.`, true); return; }
            (await answer.json()).forEach((path, index) => uploaded.push({path, name: files[start + index].name}));
        }
        const result = await follow("Bringing the pictures in", {do: "bring", into, files: uploaded, ...more});
        if (!result) return;
        await open(state.folder);
        say(result.words);
        if (result.refused.length) {
            const list = element("ul", {});
            for (const [name, reason] of result.refused) list.append(element("li", {}, element("b", {}, `${name}:`), " ", reason));
            by("refused").replaceChildren(element("details", {open: ""}, element("summary", {}, `${result.refused.length} refused`), list));
        } else by("refused").replaceChildren();
    }

    // ---- projects ---------------------------------------------------------------------------------------------------
    const values = (form) => Object.fromEntries([...by(form).querySelectorAll("input")].map((item) => [item.name, item.value]));

    async function token(isTyped) {
        const given = values("project");
        const answer = await ask(isTyped ? {do: "token", token: given.token} : {do: "token", name: given.name});
        if (!answer) return;
        if (!isTyped) by("project").querySelector("[name=token]").value = answer.token;
        const box = by("token-words");
        box.textContent = answer.words;
        box.classList.toggle("kiln-error", answer.rare === false);
        say("");
    }

    async function fill(answer) {
        kiln.apply(answer.values);
        await open(answer.folder);
    }

    async function project() {
        const given = values("project");
        const kept = state.sets.reduce((sum, set) => sum + set.kept, 0);
        const answer = await ask({do: "project", ...given, repeats: given.repeats || (kept ? Math.max(1, Math.round(400 / kept)) : 10)});
        if (!answer) return;
        await fill(answer);
        by("new").open = false;
        say("The project is made, and the settings are filled in. Now bring its pictures in.");
    }

    async function prepare() {
        const result = await follow("Copying", {do: "prepare", ...values("prepare")});
        if (!result) return;
        await fill(result);
        say("The folders are made, and the settings are filled in.");
    }

    // A second click while the first one is under way would take it back.
    async function mend(target, what, more) {
        target.disabled = true;
        if (!await edit(what, more)) { target.disabled = false; return; }
        const item = target.closest("li");
        item.classList.add("mended");
        for (const image of item.querySelectorAll("[data-thumb]")) if (more.ids.includes(image.dataset.thumb)) image.removeAttribute("src");
        loadThumbs(item);
    }

    async function act(what, data, target) {
        switch (what) {
        case "open": await open(by("folder").value); break;
        case "settings": await open(""); break;
        case "use": kiln.apply({train_data_dir: state.folder}); say("The settings now train this folder."); break;
        case "files": by("files").click(); break;
        case "folders": by("folders").click(); break;
        case "source": { const given = by("source").value.trim(); if (given) await bring([], {source: given}); break; }
        case "all": state.picked = new Set(state.order); selection(); break;
        case "none": state.picked = new Set(); selection(); break;
        case "pick": state.picked = new Set(data.ids); selection(); { const item = item_of(data.ids[0]); if (item) item.scrollIntoView({block: "center"}); } break;
        case "exclude": case "include": case "left": case "right": case "flip": case "uncrop": await edit(what); break;
        case "crop": await cropping(); break;
        case "undo": case "redo": await back(what); break;
        case "repair": await mend(target, data.what, {ids: data.ids, box: data.box, file: true}); break;
        case "flip-one": await mend(target, "flip", data); break;
        case "drop": target.closest("li").remove(); break;
        case "check": await check(); break;
        case "mirrored": await mirrored(); break;
        case "buckets": await buckets(); break;
        case "stop": await state.server.dataset({do: "stop", task: state.task, folder: state.folder}); break;
        case "repeats": { const answer = await ask({do: "repeats", ...data}); if (answer) { take(answer); say(""); } break; }
        case "token": await token(false); break;
        case "project": await project(); break;
        case "prepare": await prepare(); break;
        case "copies": { const result = await follow("Writing copies", {do: "copies", target: by("target").value}); if (result && result.words) say(result.words); break; }
        case "crop-face": setBox(...state.crop.face); fit(); break;
        case "crop-whole": state.crop.ratio = 0; setBox(0, 0, 1, 1); by("crop").querySelector("select").value = "0"; break;
        case "crop-bucket": nearestBucket(); break;
        case "crop-cancel": by("crop").close(); break;
        case "crop-do": { const {id, box} = state.crop; by("crop").close(); await edit("crop", {ids: [id], box}); break; }
        }
    }

    // ---- listeners ------------------------------------------------------------------------------------------------------
    document.addEventListener("click", (event) => {
        const target = event.target.closest("[data-dataset]");
        if (target) { act(target.dataset.dataset, JSON.parse(target.dataset.more || "{}"), target); return; }
        const item = event.target.closest("#dataset-grid figure");
        if (item) { choose(item.dataset.id, event); item.focus({preventScroll: true}); }
    });
    document.addEventListener("dblclick", (event) => {
        const item = event.target.closest("#dataset-grid figure");  // two clicks have chosen it and let it go again
        if (item) cropping(item.dataset.id);
    });
    document.addEventListener("pointerdown", (event) => { if (state.crop && event.target.closest("#dataset-crop .stage")) drag(event); });
    document.addEventListener("change", (event) => {
        if (event.target.id === "dataset-files" || event.target.id === "dataset-folders") {
            bring([...event.target.files].map((file) => ({file, name: file.webkitRelativePath || file.name})));
            event.target.value = "";
        }
        if (event.target.dataset.repeats) act("repeats", {set: event.target.dataset.repeats, repeats: event.target.value});
        if (event.target.name === "token" && event.target.closest("#dataset-project")) token(true);
    });
    document.addEventListener("keydown", (event) => {
        if (event.target.closest("#dataset-crop .cut")) {
            if (nudge(event)) event.preventDefault();
            if (event.key === "Enter") act("crop-do", {});
            return;
        }
        if (event.target.id === "dataset-folder" && event.key === "Enter") { open(event.target.value); return; }
        if (!event.target.closest("#dataset-grid figure")) return;
        const key = event.key.toLowerCase();
        if (event.ctrlKey || event.metaKey) {
            if (key === "a") { event.preventDefault(); act("all"); }
            if (key === "z") { event.preventDefault(); back(event.shiftKey ? "redo" : "undo"); }
            if (key === "y") { event.preventDefault(); back("redo"); }
            return;
        }
        const steps = {arrowleft: -1, arrowright: 1, arrowup: -columns(), arrowdown: columns()};
        if (key in steps) { event.preventDefault(); step(steps[key], event); return; }
        if (key === " ") { event.preventDefault(); choose(state.at, {}); return; }
        const what = {x: "exclude", delete: "exclude", i: "include", r: event.shiftKey ? "left" : "right", f: "flip", c: "crop", enter: "crop"}[key];
        if (what) { event.preventDefault(); act(what, {}); }
    });
    const isFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files") && event.target.closest && event.target.closest("#dataset");
    document.addEventListener("dragover", (event) => {
        if (!isFiles(event)) return;
        event.preventDefault();
        by("drop").classList.add("over");
    });
    document.addEventListener("dragleave", (event) => { if (by("drop") && !event.relatedTarget) by("drop").classList.remove("over"); });
    document.addEventListener("drop", async (event) => {
        if (!isFiles(event)) return;
        event.preventDefault();
        by("drop").classList.remove("over");
        bring(await entries(event.dataTransfer.items));
    });

    function connect(server) {
        state.server = kiln.answering(server);
        // gradio mounts a tab when it is opened first.
        setTimeout(() => {
            if (!by("grid")) return;
            if (!state.opened) first(); else if (state.folder) open(state.folder, true);
            // Shown again, after another tab: captions may have come, or files gone.
            let shown = true;
            new IntersectionObserver(([entry]) => {
                if (entry.isIntersecting && !shown && state.folder && !state.task) open(state.folder, true);
                shown = entry.isIntersecting || Boolean(by("page").offsetParent);
            }).observe(by("page"));
        }, 0);
    }

    return {connect, state};
})();
