// Captioning: the list of captions, the editor beside the picture, previews, masks. The server decides and
// writes; texts of a person are only ever put into the page as text.
"use strict";
kiln.captions = (() => {
    const state = {server: null, facts: null, set: null, entries: [], shown: [], selected: new Set(), current: null, tag: "",
        counts: {}, limit: 0, of: "", plan: null, going: false, seen: 0, asked: 0, opened: null, mask: null, serial: 0,
        listed: 0, options: {}, thumbs: {}, wanted: [], watcher: null, saving: null, stopping: false};
    const get = (id) => document.getElementById(id);
    const key = (entry) => `${entry.folder}\n${entry.name}`;
    const pair = (entry) => [entry.folder, entry.name];
    const visible = () => Boolean(get("captions") && get("captions").offsetParent);

    function make(tag, attributes = {}, ...children) {
        const made = document.createElement(tag);
        for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
        made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
        return made;
    }

    function say(text, isError) {
        const box = get("cap-answer");
        if (!box) return;
        box.textContent = text || "";
        box.classList.toggle("kiln-error", Boolean(isError));
        if (isError) box.scrollIntoView({block: "nearest"});
    }

    async function ask(data, isQuiet) {
        const answer = await state.server.captions({sent: kiln.draft(), ...data});
        if (answer.error) {
            if (!isQuiet) say(answer.error, true);
            return null;
        }
        if (answer.message !== undefined && !isQuiet) say(answer.message);
        return answer;
    }

    // Changes settings, and waits until they have arrived.
    async function set(values) {
        kiln.apply(values);
        for (let turn = 0; turn < 60; turn++) {
            const now = JSON.parse(kiln.draft()).values;
            if (Object.entries(values).every(([name, value]) => now[name] === value)) return;
            await new Promise((done) => setTimeout(done, 50));
        }
    }

    // ---- looking ----------------------------------------------------------------------------------------
    async function look(isQuiet) {
        const found = await ask({do: "look"}, true);
        if (!get("cap-work")) return;
        if (!found) {
            const again = await ask({do: "look"});  // says why
            if (again) return look(isQuiet);
            for (const id of ["cap-work", "cap-tools"]) get(id).hidden = true;
            get("cap-summary").textContent = "";
            return;
        }
        if (!isQuiet) say("");
        take(found);
        const counted = await ask({do: "tokens"}, true);
        if (!counted || !get("cap-list")) return;
        state.counts = counted.counts;
        state.limit = counted.limit;
        state.of = counted.of;
        for (const row of get("cap-list").children) mark(row);
        showTokens();
    }

    function take(found) {
        const folders = (set) => set.folders.map((folder) => folder.path).join("\n");
        if (state.set && folders(state.set) !== folders(found)) say("");  // what was said is about other pictures
        state.set = found;
        state.entries = found.captions;
        const keys = new Set(state.entries.map(key));
        state.selected = new Set([...state.selected].filter((item) => keys.has(item)));
        get("cap-shipped").hidden = !found.shipped;
        const model = get("cap-model");
        if (model && !model.dataset.typed) model.value = usual();
        own();
        steps(found);
        filter();
        if (!state.entries.some((entry) => key(entry) === state.current)) state.current = null;
        if (state.shown.length) open(state.current ? find(state.current) : state.shown[0]);
        for (const id of ["cap-work", "cap-tools"]) get(id).hidden = !state.entries.length;
    }

    const find = (wanted) => state.entries.find((entry) => key(entry) === wanted);

    function steps(found) {
        for (const [id, words, name] of [["cap-undo", found.undo, "Undo"], ["cap-redo", found.redo, "Redo"]]) {
            get(id).disabled = !words;
            get(id).title = words || "";
            get(id).textContent = name;
        }
    }

    function summary() {
        const missing = state.entries.filter((entry) => !entry.exists).length;
        const flagged = state.entries.filter((entry) => entry.habits.length).length;
        get("cap-summary").replaceChildren(...[
            `${state.entries.length} pictures, ${missing} without a caption file`,
            flagged ? `${flagged} with habits of a captioner` : "",
        ].filter(Boolean).map((words) => make("span", {}, words)));
    }

    function tokensOf(entry) {
        return ((state.counts[entry.folder] || {})[entry.name]);
    }

    function passes(entry) {
        const words = get("cap-find").value.toLowerCase().trim();
        if (words && !entry.text.toLowerCase().includes(words) && !entry.picture.toLowerCase().includes(words)) return false;
        if (state.tag) {
            const tags = entry.text.split("\n")[0].split(",").map((tag) => tag.trim().toLowerCase());
            if (!tags.includes(state.tag.toLowerCase())) return false;
        }
        switch (get("cap-only").value) {
        case "missing": return !entry.exists || !entry.text;
        case "long": return tokensOf(entry) > state.limit;
        case "habits": return entry.habits.length > 0;
        case "machine": return entry.source === "captioner";
        case "person": return entry.exists && entry.source !== "captioner";
        case "problem": return Boolean(entry.problem);
        default: return true;
        }
    }

    function filter() {
        state.shown = state.entries.filter(passes);
        summary();
        list();
        scope();
    }

    // ---- the list -----------------------------------------------------------------------------------------
    function list() {
        const box = get("cap-list"), scrolled = box.scrollTop;
        if (state.watcher) state.watcher.disconnect();
        state.watcher = new IntersectionObserver((seen) => {
            for (const item of seen) if (item.isIntersecting) { state.watcher.unobserve(item.target); want(item.target); }
        }, {root: box, rootMargin: "300px"});
        box.replaceChildren(...state.shown.map((entry) => {
            const tick = make("input", {type: "checkbox", "aria-label": `Select ${entry.picture}`});
            tick.checked = state.selected.has(key(entry));
            const row = make("li", {}, tick, make("button", {type: "button", class: "kiln-cap-row"},
                make("img", {alt: "", loading: "lazy"}),
                make("span", {}, make("b", {class: "kiln-asis"}), make("span", {class: "kiln-asis words"}), make("em", {}))));
            row.dataset.key = key(entry);
            mark(row);
            return row;
        }));
        for (const row of box.children) state.watcher.observe(row);
        box.scrollTop = scrolled;
        if (!state.shown.length) box.replaceChildren(make("li", {class: "kiln-empty"}, "No caption is like that."));
        get("cap-all").checked = state.shown.length > 0 && state.shown.every((entry) => state.selected.has(key(entry)));
    }

    function mark(row) {
        const entry = find(row.dataset.key);
        if (!entry) return;
        row.querySelector("b").textContent = entry.picture;
        row.querySelector(".words").textContent = entry.text.slice(0, 200);
        const notes = [];
        if (entry.problem) notes.push("Unreadable");
        else if (!entry.exists) notes.push("No caption");
        else if (!entry.text) notes.push("Empty");
        if (tokensOf(entry) > state.limit) notes.push("Too long");
        if (entry.habits.length) notes.push("Habits");
        row.querySelector("em").replaceChildren(...notes.map((note) => make("i", {}, note)));
        const button = row.querySelector("button");
        if (key(entry) === state.current) button.setAttribute("aria-current", "true");
        else button.removeAttribute("aria-current");
        const url = state.thumbs[row.dataset.key];
        if (url && row.querySelector("img").getAttribute("src") !== url) row.querySelector("img").src = url;
    }

    function want(row) {
        if (state.thumbs[row.dataset.key]) return;
        state.wanted.push(row.dataset.key);
        clearTimeout(state.fetching);
        state.fetching = setTimeout(fetchThumbnails, 30);
    }

    async function fetchThumbnails() {
        while (state.wanted.length) {
            const keys = state.wanted.splice(0, 24).filter(find);
            const answer = await ask({do: "thumbnails", items: keys.map((item) => pair(find(item)))}, true);
            if (!answer) return;
            answer.urls.forEach((url, index) => { state.thumbs[keys[index]] = url; });
            for (const row of get("cap-list").children) if (keys.includes(row.dataset.key)) mark(row);
        }
    }

    function scope() {
        const chosen = targets();
        const words = state.selected.size ? `${state.selected.size} selected` : `${state.shown.length} shown`;
        get("cap-count").textContent = words;
        get("cap-scope").textContent = chosen.length === 1 ? "1 caption" : `${chosen.length} captions`;
        get("cap-selected-only").disabled = !state.selected.size;
        if (!state.selected.size) get("cap-selected-only").checked = false;
        hidePlan();
        table();
        habits();
    }

    // What is selected; without a selection, what is shown.
    const targets = () => (state.selected.size ? state.entries.filter((entry) => state.selected.has(key(entry))) : state.shown);

    // ---- the editor ---------------------------------------------------------------------------------------
    async function open(entry) {
        if (!entry) return;
        closeMask();
        state.current = key(entry);
        const serial = ++state.serial;
        for (const row of get("cap-list").children) mark(row);
        const row = [...get("cap-list").children].find((item) => item.dataset.key === state.current);
        if (row) {
            const box = get("cap-list"), top = row.offsetTop - box.offsetTop;
            if (top < box.scrollTop || top + row.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - 60;
        }
        show(entry);
        const answer = await ask({do: "open", folder: entry.folder, name: entry.name}, true);
        if (!answer || serial !== state.serial || !get("cap-picture")) return;
        state.opened = answer;
        const picture = get("cap-picture");
        if (answer.url) picture.src = answer.url; else picture.removeAttribute("src");
        picture.alt = entry.picture;
        maskWords(answer.mask);
        versions(answer.history);
    }

    function show(entry) {
        get("cap-name").textContent = entry.picture;
        const box = get("cap-text");
        if (!state.dirty) box.value = entry.text;
        get("cap-problem").hidden = !entry.problem;
        get("cap-problem").textContent = entry.problem;
        const names = {captioner: "Written by", edit: "Edited", file: "From the file", outside: "Changed by another program"};
        const source = get("cap-source");
        source.replaceChildren(entry.exists ? names[entry.source] || "" : "No caption yet");
        if (entry.exists && ["captioner", "edit"].includes(entry.source) && entry.by !== "edited")
            source.append(entry.source === "edit" ? ": " : " ", make("span", {class: "kiln-asis"}, entry.by));
        showTokens();
        get("cap-flags").replaceChildren(...entry.habits.map((habit) =>
            make("span", {class: "warned"}, make("b", {}, habit.name), " ", make("span", {class: "kiln-asis"}, habit.words))));
    }

    function showTokens(count) {
        const entry = state.current && find(state.current), box = get("cap-tokens");
        const number = count === undefined ? entry && tokensOf(entry) : count;
        if (!box) return;
        box.replaceChildren();
        if (number !== undefined && number !== null && state.limit)
            box.append(make("span", {}, `${number} of ${state.limit} tokens`), " ", make("span", {class: "kiln-asis"}, state.of));
        box.classList.toggle("kiln-error", number > state.limit);
    }

    let counting = 0;
    function typed() {
        const entry = find(state.current);
        if (!entry) return;
        state.dirty = get("cap-text").value !== entry.text;
        clearTimeout(counting);
        counting = setTimeout(async () => {
            const words = get("cap-text").value, answer = await ask({do: "count", text: words}, true);
            if (answer && get("cap-text") && get("cap-text").value === words) {
                state.limit = answer.limit;
                state.of = answer.of;
                showTokens(answer.count);
            }
        }, 300);
    }

    // Returns whether the page may go on: what is typed is saved, or was not changed.
    async function save() {
        if (state.saving) await state.saving;
        const entry = find(state.current), box = get("cap-text");
        if (!entry || !state.dirty || !box || box.value === entry.text) { state.dirty = false; return true; }
        state.saving = (async () => {
            const answer = await ask({do: "save", folder: entry.folder, name: entry.name,
                before: entry.exists ? entry.text : null, text: box.value}, false);
            if (!answer) return false;
            state.dirty = false;
            changed(answer);
            say(`saved ${entry.name}`);
            return true;
        })();
        const done = await state.saving;
        state.saving = null;
        return done;
    }

    function changed(answer) {
        const fresh = new Map(answer.changed.map((entry) => [key(entry), entry]));
        state.entries = state.entries.map((entry) => fresh.get(key(entry)) || entry);
        for (const entry of fresh.values()) if (state.counts[entry.folder]) delete state.counts[entry.folder][entry.name];
        steps(answer);
        state.shown = state.shown.map((entry) => fresh.get(key(entry)) || entry);
        for (const row of get("cap-list").children) if (fresh.has(row.dataset.key)) mark(row);
        summary();
        scope();
        const entry = state.current && find(state.current);
        if (entry && fresh.has(state.current)) { state.dirty = false; open(entry); }
        recount();
    }

    let recounting = 0;
    function recount() {
        clearTimeout(recounting);
        recounting = setTimeout(async () => {
            const counted = await ask({do: "tokens"}, true);
            if (!counted || !get("cap-list")) return;
            state.counts = counted.counts;
            for (const row of get("cap-list").children) mark(row);
            if (!state.dirty) showTokens();
        }, 400);
    }

    async function move(by) {
        if (!await save()) return;
        const at = state.shown.findIndex((entry) => key(entry) === state.current);
        const entry = state.shown[Math.min(Math.max(at + by, 0), state.shown.length - 1)];
        if (entry) { open(entry); get("cap-text").focus(); }
    }

    function versions(history) {
        const box = get("cap-versions");
        box.replaceChildren(...history.map((version, index) => {
            const names = {captioner: "Captioner", edit: "Edit", file: "File", outside: "Another program"};
            const head = make("p", {}, make("b", {}, names[version.source]), " ", make("span", {class: "kiln-asis"}, version.by === "edited" ? "" : version.by || ""),
                " ", make("time", {}, new Date(version.time * 1000).toLocaleString()));
            const body = make("p", {class: "kiln-asis kiln-diff"}, ...(version.text === null ? ["—"]
                : version.runs.length ? runs(version.runs) : [version.text]));
            const item = make("li", {}, head, body);
            if (index < history.length - 1) {
                const back = make("button", {type: "button", class: "kiln-small"}, "Back to this");
                back.addEventListener("click", async () => {
                    const entry = find(state.current);
                    const answer = await ask({do: "restore", folder: entry.folder, name: entry.name, version: index});
                    if (answer) changed(answer);
                });
                item.append(back);
            }
            return item;
        }).reverse());
    }

    const runs = (parts) => parts.map(([kind, text]) => (kind === "same" ? text : make(kind === "gone" ? "del" : "ins", {}, text)));

    // ---- many at once -------------------------------------------------------------------------------------
    let tabling = 0;
    function table() {
        clearTimeout(tabling);
        tabling = setTimeout(async () => {
            if (!get("cap-tags-box") || !get("cap-tags-box").open) return;
            const found = await ask({do: "table", items: (state.tag ? state.entries : targets()).map(pair)}, true);
            if (!found || !get("cap-tags")) return;
            get("cap-tags").replaceChildren(...found.tags.slice(0, 300).map(([tag, count]) => {
                const chip = make("button", {type: "button", "aria-pressed": String(tag === state.tag)},
                    make("span", {class: "kiln-asis"}, tag), " ", make("b", {class: "kiln-asis"}, String(count)));
                chip.addEventListener("click", () => choose(tag === state.tag ? "" : tag));
                return chip;
            }));
        }, 60);
    }

    function choose(tag) {
        state.tag = tag;
        get("cap-tag-tools").hidden = !tag;
        get("cap-tag").textContent = tag;
        get("cap-tag-new").value = tag;
        filter();
    }

    function habits() {
        const found = new Map();
        for (const entry of targets()) for (const habit of entry.habits) {
            if (!found.has(habit.name)) found.set(habit.name, {count: 0, words: habit.words});
            found.get(habit.name).count += 1;
        }
        const before = new Set([...get("cap-habits").querySelectorAll("input:not(:checked)")].map((item) => item.value));
        get("cap-habits").replaceChildren(...[...found].sort((one, other) => other[1].count - one[1].count).map(([name, hit]) => {
            const tick = make("input", {type: "checkbox", value: name});
            tick.checked = !before.has(name);
            return make("li", {}, make("label", {class: "kiln-check"}, tick, make("span", {}, name), make("b", {}, String(hit.count)),
                make("span", {class: "kiln-asis"}, hit.words)));
        }));
        if (!found.size) get("cap-habits").replaceChildren(make("li", {class: "kiln-empty"}, "None of them is in these captions."));
        get("cap-unhabit").disabled = !found.size;
    }

    function own() {
        const box = get("cap-own");
        if (box && document.activeElement !== box) box.value = (state.set.own || []).join("\n");
    }

    async function plan(operation) {
        if (!await save()) return;
        const items = targets().map(pair);
        const found = await ask({do: "plan", items, operation}, false);
        if (!found) { hidePlan(); return; }
        say("");
        state.plan = {items, operation, digest: found.digest};
        const box = get("cap-plan");
        const title = found.count === 0 ? "Nothing would change." : found.count === 1 ? "1 caption would change" : `${found.count} captions would change`;
        const rows = found.edits.map((edit) => make("li", {}, make("b", {class: "kiln-asis"}, edit.name), " ",
            make("span", {class: "kiln-asis kiln-diff"}, ...runs(edit.runs))));
        const cancel = make("button", {type: "button", class: "kiln-small"}, "Cancel");
        cancel.addEventListener("click", hidePlan);
        const buttons = make("div", {class: "kiln-buttons"});
        if (found.count) {
            const apply = make("button", {type: "button", class: "kiln-small primary", id: "cap-apply"}, "Change them");
            apply.addEventListener("click", carryOut);
            buttons.append(apply);
        }
        buttons.append(cancel);
        const more = found.count > found.edits.length ? [make("p", {class: "kiln-empty"}, `the first ${found.edits.length} are shown`)] : [];
        box.replaceChildren(make("h4", {}, title), buttons, make("ul", {}, ...rows), ...more);
        box.hidden = false;
        box.focus();
        box.scrollIntoView({block: "nearest"});
    }

    function hidePlan() {
        state.plan = null;
        const box = get("cap-plan");
        if (box) { box.hidden = true; box.replaceChildren(); }
    }

    async function carryOut() {
        const planned = state.plan;
        if (!planned) return;
        const answer = await ask({do: "apply", ...planned});
        hidePlan();
        if (!answer) return;
        if (state.tag && ["remove", "rename"].includes(planned.operation.do)) {
            state.tag = "";
            get("cap-tag-tools").hidden = true;
        }
        const words = answer.message;
        changed(answer);
        filter();
        say(words);
    }

    function tagDo(what) {
        const tag = state.tag, add = get("cap-tag-add").value.trim();
        if (what === "clear") choose("");
        else if (what === "sort") plan({do: "sort", by: "count", keep: 1});
        else if (what.startsWith("add")) { if (add) plan({do: "add", tag: add, place: what === "add" ? "first" : "last"}); else get("cap-tag-add").focus(); }
        else if (what === "remove") plan({do: "remove", tags: [tag]});
        else if (what === "rename") { if (get("cap-tag-new").value.trim()) plan({do: "rename", tag, to: get("cap-tag-new").value.trim()}); }
        else plan({do: "move", tag, place: what});
    }

    async function step(what) {
        if (!await save()) return;
        const answer = await ask({do: what});
        if (!answer) return;
        const words = answer.message;
        changed(answer);
        filter();
        say(words);
    }

    // ---- the captioner --------------------------------------------------------------------------------------
    const captioner = () => state.facts.captioners.find((item) => item.name === get("cap-captioner").value) || state.facts.captioners[0];

    function form() {
        const chosen = get("cap-captioner");
        chosen.replaceChildren(...state.facts.captioners.map((item) => make("option", {value: item.name}, item.title)));
        if (state.chosen) chosen.value = state.chosen;
        fields();
    }

    // The model that is meant unless a person says otherwise: the demo's own for the demo.
    const usual = () => (captioner().name === "blip" && state.set && state.set.demo && state.facts.demo) || captioner().models[0];

    function fields() {
        const mine = captioner();
        state.chosen = mine.name;
        get("cap-about").textContent = mine.about;
        get("cap-models").replaceChildren(...[...(mine.name === "blip" && state.facts.demo ? [state.facts.demo] : []), ...mine.models]
            .map((model) => make("option", {value: model})));
        get("cap-append-row").hidden = mine.writes !== "tags";
        const kept = state.options[mine.name] || {};
        get("cap-options").replaceChildren(...mine.fields.map((field) => {
            const value = field.name in kept ? kept[field.name] : field.default;
            const help = make("small", {}, field.description || "");
            if (field.type === "boolean") {
                const tick = make("input", {type: "checkbox", "data-option": field.name});
                tick.checked = Boolean(value);
                return make("label", {class: "kiln-check"}, tick, make("span", {}, field.title), help);
            }
            let input;
            if (field.enum) {
                input = make("select", {}, ...field.enum.map((item) => make("option", {value: item}, item)));
            } else if (field.type === "integer" || field.type === "number") {
                input = make("input", {type: "number", step: field.type === "integer" ? "1" : "0.05"});
                if (field.minimum !== undefined) input.min = field.minimum;
                if (field.maximum !== undefined) input.max = field.maximum;
            } else input = make("input", {type: "text", spellcheck: "false"});
            input.dataset.option = field.name;
            input.value = value;
            return make("label", {class: "kiln-field"}, make("span", {}, field.title), input, help);
        }));
    }

    function options() {
        const found = {};
        for (const field of captioner().fields) {
            const input = get("cap-options").querySelector(`[data-option="${field.name}"]`);
            if (field.type === "boolean") found[field.name] = input.checked;
            else if (["integer", "number"].includes(field.type)) { if (input.value !== "") found[field.name] = Number(input.value); }
            else found[field.name] = input.value;
        }
        state.options[captioner().name] = found;
        return found;
    }

    async function start(confirmed) {
        if (!await save()) return;
        const values = {captioner: captioner().name, model: get("cap-model").value, options: options(),
            prefix: get("cap-prefix").value, postfix: get("cap-postfix").value, existing: get("cap-existing").value,
            append: captioner().writes === "tags" && get("cap-append").checked};
        const chosen = get("cap-selected-only").checked ? targets().map(pair) : null;
        const answer = await ask({do: "start", values, items: chosen, confirmed: confirmed === true});
        if (!answer) return;
        if (answer.ask) { if (window.confirm(answer.ask)) start(true); return; }
        state.going = true;
        tick(true);
    }

    async function tick(isNow) {
        if (!state.server || !visible()) return;
        if (!isNow && !state.going && Date.now() - state.asked < 5000) return;
        state.asked = Date.now();
        const found = await ask({do: "progress"}, true);
        if (!found || !get("cap-progress")) return;
        const was = state.going;
        state.going = found.going;
        // The server's own words, escaped there.
        if (get("cap-progress").dataset.html !== found.html) { get("cap-progress").innerHTML = found.html; get("cap-progress").dataset.html = found.html; }
        get("cap-stop").hidden = !found.going;
        get("cap-start").disabled = found.going;
        if (found.going && get("cap-writer") && !was) get("cap-writer").open = true;
        if (state.stopping && !found.going) { state.stopping = false; say(""); }
        // While it goes on a new list every few seconds will do; at its end there is the last one.
        const mark = `${found.run} ${found.ended} ${found.done}`, isLast = was && !found.going;
        if (!(found.going || was) || mark === state.seen || state.dirty || (!isLast && Date.now() - state.listed < 4000)) return;
        state.seen = mark;
        state.listed = Date.now();
        look(true);
    }

    // ---- masks ----------------------------------------------------------------------------------------------
    function maskWords(mask) {
        const box = get("cap-mask-words");
        box.replaceChildren(mask.words);
        box.classList.toggle("kiln-error", Boolean(mask.problem));
        if (mask.kind !== "none" && mask.kind !== "alpha" && !mask.trained && !mask.problem) {
            const on = make("button", {type: "button", class: "kiln-small", id: "cap-masked"}, "Switch it on");
            box.append(" ", on);
        }
        get("cap-unmask").hidden = mask.kind !== "drawn";
        get("cap-paint").textContent = mask.kind === "drawn" ? "Change the mask" : "Draw a mask";
        if (mask.url) shade(mask.url);
        else if (!state.mask) get("cap-mask").hidden = true;
    }

    function sized() {
        const canvas = get("cap-mask"), picture = get("cap-picture");
        canvas.width = picture.naturalWidth;
        canvas.height = picture.naturalHeight;
        return canvas;
    }

    async function ready() {
        const picture = get("cap-picture");
        if (!picture.complete || !picture.naturalWidth) await new Promise((done) => picture.addEventListener("load", done, {once: true}));
    }

    const drawing = (url) => new Promise((done, failed) => {
        const image = new Image();
        image.onload = () => done(image);
        image.onerror = failed;
        image.src = url;
    });

    // The mask as training reads it, over the picture: what does not count is dimmed.
    async function shade(url) {
        const serial = state.serial;
        await ready();
        const image = await drawing(url);
        if (serial !== state.serial || state.mask) return;
        const canvas = sized();
        const values = make("canvas");
        values.width = canvas.width;
        values.height = canvas.height;
        values.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
        dim(canvas, values);
        canvas.hidden = false;
        canvas.classList.remove("drawing");
    }

    function dim(canvas, values) {
        const pixels = values.getContext("2d", {willReadFrequently: true}).getImageData(0, 0, values.width, values.height);
        for (let at = 0; at < pixels.data.length; at += 4) {
            const out = 255 - pixels.data[at];
            pixels.data[at] = 120;
            pixels.data[at + 1] = 20;
            pixels.data[at + 2] = 20;
            pixels.data[at + 3] = out * 0.65;
        }
        canvas.getContext("2d").putImageData(pixels, 0, 0);
    }

    async function paint() {
        if (!state.opened || !get("cap-picture").naturalWidth) return;
        const canvas = sized(), values = make("canvas");
        values.width = canvas.width;
        values.height = canvas.height;
        const pen = values.getContext("2d", {willReadFrequently: true});
        pen.fillStyle = "black";
        pen.fillRect(0, 0, values.width, values.height);
        if (state.opened.mask.url) pen.drawImage(await drawing(state.opened.mask.url), 0, 0, values.width, values.height);
        state.mask = {values, pen, last: null, at: [canvas.width / 2, canvas.height / 2]};
        dim(canvas, values);
        canvas.hidden = false;
        canvas.classList.add("drawing");
        canvas.tabIndex = 0;
        canvas.focus({preventScroll: true});
        get("cap-mask-tools").hidden = false;
        get("cap-paint").disabled = true;
    }

    function closeMask() {
        if (!state.mask) { if (get("cap-mask")) get("cap-mask").hidden = true; return; }
        state.mask = null;
        get("cap-mask").hidden = true;
        get("cap-mask").removeAttribute("tabindex");
        get("cap-mask-tools").hidden = true;
        get("cap-paint").disabled = false;
        if (document.activeElement === document.body) get("cap-paint").focus();
    }

    const scaled = () => get("cap-mask").width / get("cap-mask").getBoundingClientRect().width;

    function stroke(event) {
        if (!state.mask || !event.buttons) return;
        event.preventDefault();
        const box = get("cap-mask").getBoundingClientRect();
        line((event.clientX - box.left) * scaled(), (event.clientY - box.top) * scaled());
    }

    // From where the brush was to a point, in pixels of the picture.
    function line(x, y) {
        const mask = state.mask, inside = document.querySelector("[name=cap-brush]:checked").value === "in";
        mask.pen.strokeStyle = inside ? "white" : "black";
        mask.pen.lineWidth = Number(get("cap-brush-size").value) * scaled();
        mask.pen.lineCap = mask.pen.lineJoin = "round";
        mask.pen.beginPath();
        mask.pen.moveTo(...(mask.last || [x, y]));
        mask.pen.lineTo(x + 0.01, y);
        mask.pen.stroke();
        mask.last = [x, y];
        redraw();
    }

    function redraw() {
        const mask = state.mask;
        if (!mask.drawn) mask.drawn = requestAnimationFrame(() => {
            mask.drawn = 0;
            if (!state.mask) return;
            dim(get("cap-mask"), mask.values);
            if (mask.keys) ring();
        });
    }

    // The brush, for who moves it with the keyboard.
    function ring() {
        const pen = get("cap-mask").getContext("2d"), radius = Number(get("cap-brush-size").value) * scaled() / 2;
        for (const [colour, wide] of [["black", 3], ["white", 1.5]]) {
            pen.strokeStyle = colour;
            pen.lineWidth = wide * scaled();
            pen.beginPath();
            pen.arc(...state.mask.at, radius, 0, 2 * Math.PI);
            pen.stroke();
        }
    }

    function brush(event) {
        const mask = state.mask, canvas = get("cap-mask");
        const by = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
        if (!by && event.key !== " ") return;
        event.preventDefault();
        mask.keys = true;
        const step = Math.max(1, Number(get("cap-brush-size").value) * scaled() / 2), [x, y] = mask.at, paints = event.shiftKey || !by;
        mask.last = paints ? [x, y] : null;
        if (by) mask.at = [Math.min(canvas.width, Math.max(0, x + by[0] * step)), Math.min(canvas.height, Math.max(0, y + by[1] * step))];
        if (paints) line(...mask.at); else redraw();
    }

    async function maskDo(what) {
        const mask = state.mask, entry = find(state.current);
        if (!mask || !entry) return;
        if (what === "all" || what === "none") {
            mask.pen.fillStyle = what === "all" ? "white" : "black";
            mask.pen.fillRect(0, 0, mask.values.width, mask.values.height);
        } else if (what === "invert") {
            const pixels = mask.pen.getImageData(0, 0, mask.values.width, mask.values.height);
            for (let at = 0; at < pixels.data.length; at += 4) for (let part = 0; part < 3; part++) pixels.data[at + part] = 255 - pixels.data[at + part];
            mask.pen.putImageData(pixels, 0, 0);
        } else if (what === "cancel") { closeMask(); open(entry); return; }
        else {
            const answer = await ask({do: "mask", folder: entry.folder, name: entry.name, png: mask.values.toDataURL("image/png")});
            if (!answer) return;
            closeMask();
            state.opened.mask = answer.mask;
            maskWords(answer.mask);
            say("the mask is saved");
            return;
        }
        dim(get("cap-mask"), mask.values);
    }

    async function unmask() {
        const entry = find(state.current);
        const answer = await ask({do: "unmask", folder: entry.folder, name: entry.name});
        if (!answer) return;
        closeMask();
        state.opened.mask = answer.mask;
        maskWords(answer.mask);
    }

    // ---- listeners ------------------------------------------------------------------------------------------
    const clicks = {
        "look-captions": () => look(), "cap-undo": () => step("undo"), "cap-redo": () => step("redo"),
        "cap-start": () => start(), "cap-stop": () => ask({do: "stop"}).then(() => { state.stopping = true; return tick(true); }),
        "cap-previous": () => move(-1), "cap-next": () => move(1), "cap-paint": paint, "cap-unmask": unmask,
        "cap-replace": () => plan({do: "replace", find: get("cap-replace-find").value, to: get("cap-replace-to").value,
            is_pattern: get("cap-replace-pattern").checked, match_case: get("cap-replace-case").checked}),
        "cap-affix": () => plan({do: "affix", prefix: get("cap-affix-prefix").value, postfix: get("cap-affix-postfix").value}),
        "cap-unhabit": () => {
            const names = [...get("cap-habits").querySelectorAll("input:checked")].map((item) => item.value), mine = state.set.own || [];
            plan({do: "unhabit", habits: names.filter((name) => !mine.includes(name)), own: names.filter((name) => mine.includes(name))});
        },
        "cap-own-save": async () => {
            const found = await ask({do: "habits", phrases: get("cap-own").value.split("\n")});
            if (found) { get("cap-own").blur(); take(found); }
        },
        "cap-copy": async () => {
            const answer = await ask({do: "copy"});
            if (answer) { const words = answer.message; await set(answer.set); await look(true); say(words); }
        },
        "cap-masked": async () => { await set({masked_loss: true}); look(true); },
    };

    document.addEventListener("click", (event) => {
        const target = event.target.closest("#captions button");
        if (!target || target.disabled) return;
        if (clicks[target.id]) clicks[target.id]();
        else if (target.dataset.mask) maskDo(target.dataset.mask);
        else if (target.dataset.tagDo) tagDo(target.dataset.tagDo);
        else if (target.classList.contains("kiln-cap-row")) {
            const entry = find(target.parentElement.dataset.key);
            save().then((isSaved) => { if (isSaved) open(entry); });
        }
    });
    document.addEventListener("change", (event) => {
        const target = event.target;
        if (!target.closest || !target.closest("#captions")) return;
        if (target.id === "cap-captioner") {
            fields();
            delete get("cap-model").dataset.typed;
            get("cap-model").value = usual();
        } else if (target.id === "cap-only") filter();
        else if (target.id === "cap-all") {
            for (const entry of state.shown) if (target.checked) state.selected.add(key(entry)); else state.selected.delete(key(entry));
            list();
            scope();
        } else if (target.closest("#cap-list")) {
            const item = target.closest("li").dataset.key;
            if (target.checked) state.selected.add(item); else state.selected.delete(item);
            scope();
        } else if (target.closest("#cap-options")) options();
        else if (target.id === "cap-text") save();
    });
    let finding = 0;
    document.addEventListener("input", (event) => {
        if (event.target.id === "cap-text") typed();
        else if (event.target.id === "cap-model") event.target.dataset.typed = "1";
        else if (event.target.id === "cap-find") { clearTimeout(finding); finding = setTimeout(filter, 150); }
    });
    document.addEventListener("toggle", (event) => { if (event.target.id === "cap-tags-box") table(); }, true);
    document.addEventListener("keydown", (event) => {
        if (!event.target.closest || !event.target.closest("#captions")) return;
        const by = {ArrowDown: 1, ArrowUp: -1}[event.key];
        if (event.altKey && by) { event.preventDefault(); move(by); }
        else if (event.target.id === "cap-mask" && state.mask) brush(event);
        else if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && event.target.id === "cap-text") { event.preventDefault(); move(1); }
        else if (event.key === "Escape" && event.target.id === "cap-text") {
            state.dirty = false;
            event.target.value = find(state.current).text;
            showTokens();
        } else if (event.key === "Enter" && event.target.id === "cap-tag-add") tagDo("add");
        else if (event.key === "Enter" && event.target.id === "cap-tag-new") tagDo("rename");
        else if (event.key === "Enter" && /^cap-replace-(find|to)$/.test(event.target.id)) clicks["cap-replace"]();
    });
    for (const kind of ["pointerdown", "pointermove"]) {
        document.addEventListener(kind, (event) => {
            if (event.target.id !== "cap-mask" || !state.mask) return;
            if (kind === "pointerdown") { state.mask.last = null; state.mask.keys = false; event.target.setPointerCapture(event.pointerId); }
            stroke(event);
        });
    }
    window.addEventListener("beforeunload", (event) => { if (state.dirty) event.preventDefault(); });

    function connect(server) {
        state.server = kiln.answering(server);
        state.facts = JSON.parse(get("cap-data").textContent);
        form();
        if (visible()) opened();
    }

    // The tab was opened: the files may have changed since.
    function opened() {
        if (!state.server || !get("cap-work")) return;
        look(true);
        tick(true);
    }

    return {connect, opened, tick, state};
})();
