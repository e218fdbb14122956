// What the page does by itself: shows and hides fields, marks changes, searches, keeps drafts, opens dialogs.
// Gradio holds the values; `facts` (app/fields.py) says what each field is. Nothing here is trusted by the server.
"use strict";
window.kiln = (() => {
    const facts = JSON.parse(document.getElementById("kiln-facts").textContent);
    const SKIP = {__type__: "update"};
    const store = `kiln-draft-${facts.user || ""}`;
    const state = {part: "Model", values: {}, rest: {}, base: "", origin: "", baseline: null, before: [], server: null, trigger: null,
        pending: {}, props: null, built: new Set(), all: localStorage.getItem("kiln-all") === "1", drawn: 0, timer: 0};

    const OVERRULES_EPOCH = ["max_train_steps", "max_train_epochs"];  // the first that is set counts
    const text = (value) => document.createTextNode(String(value));
    function element(tag, attributes = {}, ...children) {
        const made = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
        made.append(...children.map((child) => (child instanceof Node ? child : text(child))));
        return made;
    }

    // Labels, help and defaults stand in gradio's own description of the page.
    function props(name) {
        if (!state.props) {
            state.props = {};
            for (const part of (window.gradio_config || {}).components || []) {
                const id = String((part.props || {}).elem_id || "");
                if (id.startsWith("field-")) state.props[id.slice(6)] = part.props;
            }
        }
        return state.props[name] || {label: name, info: "", value: ""};
    }

    // ---- values -------------------------------------------------------------------------------
    const same = (one, other) => one === other || (one == null ? "" : one) === (other == null ? "" : other)
        || (typeof one !== "boolean" && typeof other !== "boolean" && String(one ?? "") === String(other ?? ""));

    function take(values) {
        // Field values in facts.order, then rest, base, origin.
        const count = facts.order.length;
        facts.order.forEach((name, index) => { state.values[name] = values[index] == null ? "" : values[index]; });
        state.rest = values[count] && typeof values[count] === "object" ? values[count] : {};
        state.base = values[count + 1] || "";
        state.origin = values[count + 2] || "";
    }

    function draft() {
        return JSON.stringify({values: {...state.rest, ...state.values}, base: state.base, origin: state.origin});
    }

    function keep() {
        try {
            localStorage.setItem(store, JSON.stringify({draft: draft(), baseline: state.baseline, opened: facts.opened, time: Date.now()}));
        } catch { /* private windows refuse; the page works all the same */ }
    }

    function stored() {
        let found = null;
        try { found = JSON.parse(localStorage.getItem(store) || "null"); } catch { /* as if there were none */ }
        return found && (!facts.opened || found.opened === facts.opened) ? found : null;
    }

    function opening() {
        const found = stored();
        return found && typeof found.draft === "string" ? found.draft : "";
    }

    const switches = () => facts.switches.map((name) => state.values[name]);

    function edited(values, isSettled) {
        take(values);
        if (isSettled) state.before = switches();
        if (state.adopts) state.baseline = {...state.values};
        state.adopts = false;
        refresh();
        keep();
        check();
        return draft();
    }

    function loaded(values, isOpening) {
        take(values);
        state.before = switches();
        const found = isOpening ? stored() : null;
        state.baseline = found && found.baseline ? found.baseline : {...state.values};
        refresh();
        keep();
        check();
        if (isOpening) {
            turn(state.part);
            firstLanguage();
            document.body.dataset.kiln = "ready";
        }
        return draft();
    }

    function typed() {
        check();
        return draft();
    }

    function apply(values) {
        state.pending = values;
        if (state.trigger) state.trigger("apply");
    }

    function pending() {
        const values = state.pending;
        state.pending = {};
        return [...facts.order, "$rest", "$base", "$origin"].map((name) => (name in values ? values[name] : SKIP));
    }

    // One family at a time, as on Kohya's page.
    function family(...values) {
        const turned = facts.switches.findIndex((name, index) => values[index] && !state.before[index]);
        state.before = values;
        return values.map((value, index) => (turned >= 0 && index !== turned && value ? false : SKIP));
    }

    let waiting = 0;
    function check() {
        clearTimeout(waiting);
        document.body.classList.add("kiln-checking");
        waiting = setTimeout(() => state.trigger && state.trigger("check"), 350);
    }

    const checked = () => document.body.classList.remove("kiln-checking");

    // What is on the disk changes without a setting: by Dataset and Captioning, by other programs, by a run.
    addEventListener("focus", () => { if ((document.getElementById("checks") || {}).offsetParent) check(); });

    // ---- which fields are shown, and how --------------------------------------------------------
    function families() {
        const on = Object.entries(facts.families).filter(([name]) => state.values[name] === true).map(([, token]) => token);
        return on.length ? on : state.values.v2 === true ? ["sd2"] : ["sd15"];
    }

    function isShown(name, seen = 0) {
        const fact = facts.fields[name];
        if (!fact) return false;
        if (fact.types && !fact.types.includes(state.values.LoRA_type)) return false;
        if (!fact.with || seen > 3) return true;
        return state.values[fact.with[0]] === fact.with[1]
            && (isShown(fact.with[0], seen + 1) || facts.switches.includes(fact.with[0]));
    }

    function outside(name) {
        const {min, max} = facts.fields[name], value = state.values[name];
        if (value === "" || typeof value === "boolean" || Number.isNaN(Number(value))) return false;
        return (min !== undefined && Number(value) < min) || (max !== undefined && Number(value) > max);
    }

    const changed = () => facts.order.filter((name) => state.baseline && name in state.baseline
        && !same(state.values[name], state.baseline[name]));

    function refresh() {
        const rules = [], mine = families(), simple = !state.all;
        const visible = {};
        for (const [name, fact] of Object.entries(facts.fields)) {
            visible[name] = simple ? facts.essential.includes(name) : isShown(name);
            if (!visible[name]) rules.push(`#field-${name}{display:none!important}`);
            else if (fact.families && !fact.families.some((token) => mine.includes(token)))
                rules.push(`#field-${name}{opacity:.85}#field-${name} .kiln-other{display:inline}`);
            if (outside(name)) rules.push(`#field-${name} .kiln-outside{display:inline}`);
        }
        const counts = OVERRULES_EPOCH.find((name) => Number(state.values[name]) > 0);
        if (counts) rules.push(`#field-epoch .kiln-overruled[data-by=${counts}]{display:block}`);
        for (const [id, names] of Object.entries(facts.groups))
            if (!names.some((name) => visible[name])) rules.push(`#${id}{display:none!important}`);
        const others = changed();
        for (const name of others) rules.push(`#field-${name}{box-shadow:inset 3px 0 var(--primary-500)}#field-${name} .kiln-reset{display:inline-flex}`);
        rule("kiln-rules", rules);
        document.body.classList.toggle("kiln-simple", simple);
        document.body.classList.toggle("kiln-fresh", !state.values.train_data_dir && !state.values.dataset_config);
        listChanges(others);
        decorate();
    }

    function shown(value) {
        if (value === true || value === false) return value ? "on" : "off";
        const string = String(value ?? "");
        return string === "" ? "empty" : string.length > 60 ? `${string.slice(0, 57)}…` : string;
    }

    function listChanges(names) {
        const box = document.getElementById("kiln-changes");
        if (!box) return;
        const title = names.length === 1 ? "1 change" : `${names.length} changes`;
        const items = names.map((name) => {
            const go = element("button", {type: "button", "data-go": name, class: "kiln-link"}, props(name).label);
            const was = element("span", {}, `${shown(state.baseline[name])} → ${shown(state.values[name])}`);
            const reset = element("button", {type: "button", "data-reset": name, class: "kiln-small"}, "Reset");
            return element("li", {}, go, " ", was, " ", reset);
        });
        box.hidden = !names.length;
        box.replaceChildren(element("summary", {}, title, state.origin ? ` since ${state.origin}` : ""),
            element("ul", {}, ...items));
        const all = element("button", {type: "button", "data-reset-all": "", class: "kiln-small"}, "Reset all");
        if (names.length > 1) box.append(all);
    }

    // Buttons beside fields; gradio mounts a field only when its tab is opened.
    function decorate() {
        for (const field of document.querySelectorAll("[id^=field-]:not([data-kiln])")) {
            const name = field.id.slice(6), fact = facts.fields[name];
            if (!fact) continue;
            field.dataset.kiln = "";
            const label = props(name).label;
            const tools = element("span", {class: "kiln-tools"});
            if (fact.path && facts.order.includes(name)) {
                const browse = element("button", {type: "button", "data-browse": name, class: "kiln-small",
                    "aria-label": `Choose ${label} on the server`}, "Browse");
                tools.append(browse);
            }
            tools.append(element("button", {type: "button", "data-reset": name, class: "kiln-small kiln-reset",
                "aria-label": `Reset ${label}`, title: "Back to what was loaded"}, "↺"));
            field.append(tools,
                element("span", {class: "kiln-note kiln-other"}, "Not used by this kind of model"),
                element("span", {class: "kiln-note kiln-outside"}, "Outside the usual range; it is taken as it is"));
            if (name === "epoch") field.append(...OVERRULES_EPOCH.map((by) => element("span", {class: "kiln-note kiln-overruled", "data-by": by},
                "Does not count, because this is set:", " ",
                element("button", {type: "button", class: "kiln-link", "data-go": by}, props(by).label), " ",
                element("button", {type: "button", class: "kiln-small", "data-epochs": ""}, "Let the epochs decide"))));
        }
        const box = document.getElementById("kiln-all");
        if (box) box.checked = state.all;
        // gradio gives these no name for a screen reader.
        for (const list of document.querySelectorAll("[role=listbox][id]:not([aria-label])")) {
            const owner = document.querySelector(`[aria-controls="${CSS.escape(list.id)}"]`);
            if (owner) list.setAttribute("aria-label", owner.getAttribute("aria-label") || "");
        }
        const log = document.querySelector("#log textarea:not([aria-label])");
        if (log) log.setAttribute("aria-label", say("Log"));
    }

    // ---- going to a field, searching -------------------------------------------------------------
    const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
    async function found(get) {
        for (let turn = 0; turn < 60; turn++) {
            const item = get();
            if (item) return item;
            await sleep(50);
        }
        return null;
    }

    function tabButton(root, name) {
        return [...document.querySelectorAll(`#${root} > .tab-wrapper .tab-container:not(.visually-hidden) button`)]
            .find((item) => [name, say(name)].includes(item.textContent.trim()));
    }

    async function openTab(name) {
        const button = await found(() => tabButton("tabs", name));
        if (button && button.getAttribute("aria-selected") !== "true") button.click();
    }

    async function go(name) {
        const fact = facts.fields[name];
        if (!fact) return;
        if (!facts.essential.includes(name) && !state.all) all(true);
        await openTab("Parameters");
        if (state.all && state.part !== fact.tab) turn(fact.tab);
        if (fact.section) {
            for (const part of fact.sections || [fact.section]) {
                const section = await found(() => document.getElementById(part));
                const head = section && section.querySelector("button.label-wrap");
                if (head && !head.classList.contains("open")) head.click();
            }
        }
        const field = await found(() => document.getElementById(`field-${name}`));
        if (!field) return;
        field.scrollIntoView({block: "center", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"});
        const input = field.querySelector("input, textarea");
        if (input) input.focus({preventScroll: true});
        field.classList.add("kiln-here");
        setTimeout(() => field.classList.remove("kiln-here"), 2000);
    }

    function all(on) {
        state.all = on;
        try { localStorage.setItem("kiln-all", on ? "1" : "0"); } catch { /* as above */ }
        refresh();
        turn(state.part);
    }

    // Parts of Parameters: one at a time, or together in the beginner's view.
    function rule(id, rules) {
        let sheet = document.getElementById(id);
        if (!sheet) document.head.append(sheet = element("style", {id}));
        sheet.textContent = rules.join("\n");
    }

    // gradio builds what becomes visible anew each time, so a part that has been built is hidden by a style alone.
    function turn(part) {
        state.part = part;
        for (const button of document.querySelectorAll("#parts [role=tab]")) {
            button.setAttribute("aria-selected", String(button.dataset.part === part));
            button.tabIndex = button.dataset.part === part ? 0 : -1;
        }
        const wanted = state.all ? [part] : facts.simple;
        rule("kiln-parts", facts.parts.filter((other) => !wanted.includes(other)).map((other) => `#panel-${other}{display:none!important}`));
        if (!state.trigger || wanted.every((one) => state.built.has(one))) return;
        for (const one of wanted) state.built.add(one);
        state.trigger("parts");
    }

    function parts() {
        return facts.parts.map((part) => ({__type__: "update", visible: state.built.has(part)}));
    }

    function search(query) {
        const box = document.getElementById("kiln-found");
        const words = query.toLowerCase().split(/\s+/).filter(Boolean);
        if (!words.length) { box.replaceChildren(); box.hidden = true; return; }
        const scored = [];
        for (const name of Object.keys(facts.fields)) {
            const {label, info} = props(name);
            const near = `${name} ${label} ${say(label)}`.toLowerCase(), far = `${near} ${info} ${say(info)}`.toLowerCase();
            if (words.every((word) => far.includes(word)))
                scored.push([words.every((word) => near.includes(word)) ? 0 : 1, name, label, info]);
        }
        scored.sort((one, other) => one[0] - other[0]);
        const items = scored.slice(0, 30).map(([, name, label, info]) => {
            const where = [facts.fields[name].tab, facts.fields[name].section].filter(Boolean).join(" › ");
            return element("li", {}, element("button", {type: "button", "data-go": name},
                element("b", {}, label), element("code", {}, name), element("span", {}, where),
                element("small", {}, String(info).slice(0, 140)),
                ...(isShown(name) ? [] : [element("em", {}, "hidden for this model and LoRA type")])));
        });
        box.hidden = false;
        box.replaceChildren(items.length ? element("ul", {}, ...items) : element("p", {}, "No field is called that."));
    }

    // ---- dialogs: choosing a file on the server -----------------------------------------------------
    async function browse(kind, path, chosen, options = {}) {
        let dialog = document.getElementById("kiln-dialog");
        if (!dialog) document.body.append(dialog = element("dialog", {id: "kiln-dialog", "aria-labelledby": "kiln-dialog-title"}));
        const answer = await state.server.browse({kind, path: path || ""});
        const title = element("h3", {id: "kiln-dialog-title"}, options.title || "Choose on the server");
        const place = element("input", {type: "text", value: answer.path, "aria-label": "Folder or file", spellcheck: "false"});
        place.addEventListener("keydown", (event) => {
            if (event.key === "Enter") { event.preventDefault(); browse(kind, place.value, chosen, options); }
        });
        const list = element("ul", {class: "kiln-entries"});
        for (const entry of answer.entries || []) {
            const button = element("button", {type: "button", class: entry.folder ? "folder" : "file"}, entry.name);
            button.addEventListener("click", () => {
                if (entry.folder) browse(kind, entry.path, chosen, options);
                else { dialog.close(); chosen(entry.path); }
            });
            list.append(element("li", {}, button));
        }
        if (!list.children.length) list.append(element("li", {}, answer.error || "Nothing to choose here."));
        const buttons = element("div", {class: "kiln-buttons"});
        const name = element("input", {type: "text", value: options.name || "", "aria-label": "File name"});
        if (options.name !== undefined) {
            const save = element("button", {type: "button", class: "primary"}, "Save");
            save.addEventListener("click", () => {
                if (!name.value.trim()) { name.focus(); return; }
                dialog.close();
                chosen(`${answer.path.replace(/[\\/]+$/, "")}/${name.value.trim()}`);
            });
            buttons.append(name, save);
        } else if (kind === "folder" || kind === "model") {
            const use = element("button", {type: "button", class: "primary"}, "Use this folder");
            use.disabled = !answer.path;
            use.addEventListener("click", () => { dialog.close(); chosen(answer.path); });
            buttons.append(use);
        }
        const cancel = element("button", {type: "button"}, "Cancel");
        cancel.addEventListener("click", () => dialog.close());
        buttons.append(cancel);
        const note = answer.error && answer.entries && answer.entries.length ? [element("p", {class: "kiln-error"}, answer.error)] : [];
        const isOpen = dialog.open;
        dialog.replaceChildren(title, place, ...note, list, buttons);
        if (!isOpen) dialog.showModal();
        (list.querySelector("button") || place).focus();
    }

    function type(id, value) {
        const input = document.querySelector(`#${id} input, #${id} textarea`);
        input.value = value;
        input.dispatchEvent(new Event("input", {bubbles: true}));
    }

    const pressed = (id) => setTimeout(() => document.getElementById(id).click(), 60);
    const here = () => (document.querySelector("#config-path input, #config-path textarea") || {}).value || "";

    function open() {
        browse("json", here(), (path) => { type("config-path", path); pressed("load"); }, {title: "Open a configuration, or a results folder's"});
    }

    function saveAs() {
        const name = `${state.values.output_name || "lora"}.json`;
        browse("save", here(), (path) => { type("config-path", path); pressed("save"); }, {title: "Save as", name});
    }

    // ---- runs --------------------------------------------------------------------------------------
    async function act(data) {
        if (data.ask && !window.confirm(data.ask)) return;
        const answer = await state.server.act(data);
        if (answer.values) fill(answer);
        else if (window.kiln.review.isShown()) window.kiln.review.say(answer.error || answer.message, answer.error);
        else tell(answer);
        if (state.trigger) state.trigger("now");
    }

    // What the server said, on Train; a tab that was never open is drawn when it is opened.
    async function tell(answer) {
        const box = await found(() => document.getElementById("kiln-answer"));
        if (!box) return;
        box.textContent = answer.error || answer.message || "";
        // What is to be done next stays until it is done.
        if (!answer.error && !answer.values) setTimeout(() => { if (box.textContent === answer.message) box.textContent = ""; }, 8000);
    }

    // Settings that the server chose, as if they had been loaded.
    function fill(answer) {
        state.adopts = true;
        apply({...answer.values, $rest: answer.rest, $base: answer.base, $origin: answer.origin});
        openTab(answer.tab || "Parameters");
        tell(answer);
    }

    function searchLog(query) {
        const box = document.querySelector("#log textarea"), count = document.getElementById("kiln-log-count");
        if (!box || !query) { if (count) count.textContent = ""; return; }
        const content = box.value.toLowerCase(), word = query.toLowerCase();
        const hits = content.split(word).length - 1;
        const from = state.logQuery === query ? box.selectionEnd : 0;
        let at = content.indexOf(word, from);
        if (at < 0) at = content.indexOf(word);
        state.logQuery = query;
        if (count) count.textContent = hits === 1 ? "1 hit" : `${hits} hits`;
        if (at < 0) return;
        box.follows = false;
        box.setSelectionRange(at, at + query.length);
        const line = content.slice(0, at).split("\n").length - 1;
        box.scrollTop = Math.max(0, line * parseFloat(getComputedStyle(box).lineHeight) - box.clientHeight / 2);
    }

    // ---- languages: the page is written in English; a file holds what each text is in another language -----
    const words = {code: "en", of: {}, patterns: [], known: new Map(), seen: new WeakMap()};
    const NUMBER = "\\d+(?:[.,:]\\d+)*";
    const UNTOUCHED = "textarea, input, select:not(.kiln-words), code, pre, script, style, figcaption, .kiln-asis, .kiln-runs b, .kiln-queue b";

    function said(text) {
        if (words.of[text]) return words.of[text];
        const numbers = [];
        const key = text.replace(new RegExp(NUMBER, "g"), (number) => { numbers.push(number); return "{}"; });
        if (words.of[key]) return words.of[key].replace(/\{\}/g, () => numbers.shift() || "");
        for (const [pattern, found] of words.patterns) {
            const parts = text.match(pattern);
            if (parts) return found.replace(/\{[*+]?\}/g, (mark) => { parts.shift(); return mark === "{+}" ? say(parts[0]) : parts[0]; });
        }
        return text;
    }

    function say(source) {
        const text = source.trim();
        if (!words.known.has(text)) {
            if (words.known.size > 5000) words.known.clear();  // a log grows
            words.known.set(text, said(text));
        }
        const found = words.known.get(text);
        return found === text ? source : source.replace(text, () => found);
    }

    // {*} stands for a name, {} for a number, {+} for a text that stands here too.
    function patterns() {
        const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
        return Object.entries(words.of).filter(([source]) => /\{[*+]\}/.test(source)).map(([source, found]) => [
            new RegExp(`^${source.split(/(\{[*+]?\})/).map((part) => part === "{*}" || part === "{+}" ? "(.+?)" : part === "{}" ? `(${NUMBER})` : escaped(part)).join("")}$`, "s"),
            found]);
    }

    function translate(node) {
        const before = words.seen.get(node);
        const source = before && before.shown === node.data ? before.source : node.data;
        const shown = say(source);
        if (shown !== node.data) node.data = shown;
        if (shown !== source) words.seen.set(node, {source, shown});
    }

    function translateAll(root) {
        if (words.code === "en" && !words.used) return;
        words.used = true;
        const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
        for (let node = texts.nextNode(); node; node = texts.nextNode())
            if (/\p{L}/u.test(node.data) && !node.parentElement.closest(UNTOUCHED)) translate(node);
        for (const item of root.querySelectorAll("[placeholder], [aria-label]")) {
            for (const name of ["placeholder", "aria-label"]) {
                if (!item.hasAttribute(name)) continue;
                const kept = `data-kiln-${name}`, now = item.getAttribute(name), [source, shown] = JSON.parse(item.getAttribute(kept) || "[]");
                const original = shown === now && source ? source : now;
                if (say(original) !== now) item.setAttribute(name, say(original));
                item.setAttribute(kept, JSON.stringify([original, say(original)]));
            }
        }
    }

    async function language(code) {
        const found = code === "en" ? {} : await state.server.words({code});
        if (found.error) return;
        words.of = found;
        words.code = code;
        words.patterns = patterns();
        words.known.clear();
        document.documentElement.lang = code;
        try { localStorage.setItem("kiln-language", code); } catch { /* as above */ }
        translateAll(document.body);
        const box = document.getElementById("kiln-language");
        if (box) box.value = code;
    }

    function firstLanguage() {
        const known = [...document.querySelectorAll("#kiln-language option")].map((item) => item.value);
        const wanted = localStorage.getItem("kiln-language") || (navigator.language || "en").slice(0, 2);
        if (wanted !== "en" && known.includes(wanted)) language(wanted);
    }

    // A page that comes from another computer without TLS is given no clipboard: there the browser copies what is selected.
    async function copy(button) {
        const source = document.getElementById(button.dataset.copy), box = source.querySelector("textarea");
        const text = box ? box.value : source.textContent;
        if (navigator.clipboard) await navigator.clipboard.writeText(text);
        else {
            const selected = document.createElement("textarea");
            selected.value = text;
            document.body.append(selected);
            selected.select();
            document.execCommand("copy");
            selected.remove();
            button.focus();
        }
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 3000);
    }

    // ---- listeners -----------------------------------------------------------------------------------
    document.addEventListener("click", (event) => {
        if (event.target.closest("#tabs > .tab-wrapper button")) setTimeout(follow, 50);
        if (event.target.closest("#start")) tell({});
        if (event.target.closest("#logout")) localStorage.removeItem(store);  // the next user sees their own
        const target = event.target.closest("[data-go],[data-reset],[data-reset-all],[data-browse],[data-set],[data-act],[data-tab],[data-copy],[data-part],[data-epochs],#open,#save-as,#kiln-bar-toggle");
        if (!target) return;
        const data = target.dataset;
        if (target.id === "open") open();
        else if (target.id === "kiln-bar-toggle")
            target.setAttribute("aria-expanded", String(document.body.classList.toggle("kiln-bar-open")));
        else if (target.id === "save-as") saveAs();
        else if (data.go) { go(data.go); const box = document.getElementById("kiln-found"); if (box) box.hidden = true; }
        else if (data.reset) apply({[data.reset]: state.baseline[data.reset]});
        else if ("resetAll" in data) apply(Object.fromEntries(changed().map((name) => [name, state.baseline[name]])));
        else if (data.browse) browse(facts.fields[data.browse].path, state.values[data.browse], (path) => apply({[data.browse]: path}));
        else if (data.set) { const values = JSON.parse(data.set); apply(values); go(Object.keys(values)[0]); }
        else if (data.act) act(JSON.parse(data.act));
        else if (data.part) turn(data.part);
        else if ("epochs" in data) apply(Object.fromEntries(OVERRULES_EPOCH.map((name) => [name, 0])));
        else if (data.tab) openTab(data.tab);
        else if (data.copy !== undefined) copy(target);
    });
    // gradio goes through the whole page for each field that it is asked for, so what is typed is taken from
    // here. Of a choice in a list it tells itself.
    let collecting = 0, typing = 0;
    document.addEventListener("input", (event) => {
        const field = event.target.closest("[id^=field-]");
        if (field) {
            // A reload right after the key must bring it back, so the draft does not wait for gradio.
            const isTyped = event.target.matches("textarea, input[type=number], input[type=text]:not([role])");
            if (isTyped && facts.order.includes(field.id.slice(6))) {
                const value = event.target.value;
                state.values[field.id.slice(6)] = event.target.type === "number" && value !== "" ? Number(value) : value;
                keep();
                clearTimeout(typing);
                typing = setTimeout(() => { refresh(); if (state.trigger) state.trigger("typed"); }, 40);
            } else {
                clearTimeout(collecting);
                collecting = setTimeout(() => state.trigger && state.trigger("collect"), 40);
            }
        }
        if (event.target.id === "kiln-search") search(event.target.value);
        if (event.target.id === "kiln-log-search") searchLog(event.target.value);
    });
    document.addEventListener("change", (event) => { if (event.target.id === "kiln-all") all(event.target.checked);
        if (event.target.id === "kiln-language") language(event.target.value);
    });
    // A list of presets or files acts when something was chosen, and not when somebody passes it with the Tab key.
    const LISTS = "#preset, #recent";
    let listed = "", isPicked = false;
    const listOf = (target) => target && target.closest && target.closest(LISTS);
    document.addEventListener("focusin", (event) => { if (listOf(event.target)) { listed = event.target.value; isPicked = false; } });
    document.addEventListener("mousedown", (event) => { if (event.target.closest("[role=option]")) isPicked = true; }, true);
    document.addEventListener("focusout", (event) => {
        const list = listOf(event.target), input = event.target, before = listed;
        if (list) setTimeout(() => { if (input.value && (isPicked || input.value !== before)) state.trigger(list.id); }, 60);
    });
    // Chromium's Tab key goes into an open list that scrolls, which then closes and leaves the focus nowhere.
    document.addEventListener("keydown", (event) => {
        if (event.key === "Tab") for (const list of document.querySelectorAll("[role=listbox]:not([tabindex])")) list.tabIndex = -1;
    }, true);
    document.addEventListener("keydown", (event) => {
        if (event.target.dataset.part && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
            const count = facts.parts.length, by = event.key === "ArrowRight" ? 1 : count - 1;
            turn(facts.parts[(facts.parts.indexOf(event.target.dataset.part) + by) % count]);
            document.getElementById(`part-${state.part}`).focus();
        }
        if (event.target.id === "kiln-log-search" && event.key === "Enter") searchLog(event.target.value);
        if (event.key === "Escape" && event.target.id === "kiln-search") { event.target.value = ""; search(""); }
        if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s") {
            event.preventDefault();
            const button = document.getElementById("save");
            if (button) button.click();
        }
    });
    let scheduled = false;
    new MutationObserver(() => {
        if (scheduled) return;
        scheduled = true;
        requestAnimationFrame(() => { scheduled = false; decorate(); listIfEmpty(); translateAll(document.body); });
    }).observe(document.documentElement, {childList: true, subtree: true, characterData: true});
    function listIfEmpty() {
        const box = document.getElementById("kiln-changes");
        if (box && state.baseline && !box.children.length) listChanges(changed());
    }

    // Gradio gives nothing at all where the server cannot be reached, or fails at what it was asked.
    function answering(server) {
        const error = "The program did not answer: look whether it is still running, then try again.";
        return new Proxy(server, {get: (all, name) => async (data) => (await all[name](data)) ?? {error}});
    }

    function connect(server, trigger) {
        state.server = answering(server);
        state.trigger = trigger;
        if (!state.following) state.following = setInterval(follow, 1000);
    }

    // Whether a tab that shows the run is open.
    const isWatched = () => ["progress", "runs"].some((id) => (document.getElementById(id) || {}).offsetParent);

    // One question a second; gradio, which goes through the whole page for every event, hears of news only.
    let askedAt = 0, missed = 0, seen = "", seenAt = 0, wasDoing = "", program = "";
    async function follow() {
        for (const tab of [window.kiln.review, window.kiln.captions]) if (tab) tab.tick();
        if (!isLost(askedAt) || document.hidden && Date.now() - seenAt < 10000) return;
        const mine = askedAt = Date.now();
        const now = await state.server.news({}), age = Date.now() - seenAt;
        if (askedAt === mine) askedAt = 0;
        if (now.error) {
            seen = "";
            if (++missed >= 3) sayAway(true);
            if (missed >= 3 && await isLoggedOut()) location.reload();
            return;
        }
        if (missed >= 3) sayAway(false);
        missed = 0;
        // Started again, perhaps as another version: its page may be another, too.
        if (program && !now.startsWith(program)) location.reload();
        program = now.split("-", 1)[0];
        const doing = now.split(" ", 2).join(" ");
        // Run and state: a short run begins and ends between two questions. Its files are there now.
        if (wasDoing && doing !== wasDoing && doing.endsWith(" idle")) check();
        wasDoing = doing;
        // Drawing costs the browser time that whoever types elsewhere would feel; and an answer may have been lost.
        if (isLost(drawingAt) && (now !== seen && (isWatched() || age > 5000) || age > 15000)) {
            seen = now;
            seenAt = Date.now();
            draw();
        }
    }

    // Gradio waits for ever for an event whose answer was lost: it is sent once more, and then the page is loaded again.
    let drawingAt = 0, isLate = false;
    function draw() {
        if (drawingAt && isLate) location.reload();
        isLate = drawingAt > 0;
        drawingAt = Date.now();
        state.trigger("now");
    }

    function drawn() {
        drawingAt = 0;
        isLate = false;
    }

    function sayAway(isAway) {
        let box = document.getElementById("kiln-away");
        if (!box) document.body.append(box = element("p", {id: "kiln-away", role: "alert"}));
        box.hidden = !isAway;
        box.textContent = isAway ? "The program does not answer: it was closed, or the network is away. This page goes on when it answers again." : "";
    }

    async function isLoggedOut() {
        const answer = await fetch("/gradio_api/login_check").catch(() => null);
        return answer !== null && answer.status === 401;
    }

    // Whether a question is not under way (0), or was asked so long ago that a network which went away took it along.
    function isLost(asked) {
        return Date.now() - asked > 20000;
    }

    return {all, answering, apply, browse, check, checked, connect, draft, drawn, edited, family, fill, go, isLost, loaded, opening, parts, pending, state, typed};
})();
