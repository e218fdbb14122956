// Review: opens a run, compares its pictures, and asks the server for what a person wants done with it.
// The server writes all content; here nothing is put together from texts.
"use strict";
kiln.review = (() => {
    const state = {server: null, run: null, signature: "", asked: 0, busy: false, looking: 0, waits: false, side: "left", picks: {},
        hasChosen: false};
    const root = () => document.getElementById("review-run");
    const wait = (ms) => new Promise((done) => setTimeout(done, ms));

    function say(text, isError) {
        const box = document.getElementById("review-answer");
        if (!box) return;
        box.textContent = text || "";
        box.classList.toggle("kiln-error", Boolean(isError));
        if (isError) box.scrollIntoView({block: "nearest"});
    }

    function isShown() {
        const box = document.getElementById("review-answer");
        return Boolean(box && box.parentElement.offsetParent);
    }

    // What has been typed and chosen, so that a picture that comes in does not take it away.
    function typed() {
        const form = document.getElementById("review-form");
        if (!form) return {};
        const values = {files: [], offered: []};
        for (const item of form.elements) {
            if (!item.name) continue;
            if (item.name === "files") { values.offered.push(item.value); if (item.checked) values.files.push(item.value); }
            else if (item.type === "checkbox") values[item.name] = item.checked;
            else if (item.type !== "radio" || item.checked) values[item.name] = item.value;
        }
        return values;
    }

    function typeAgain(values) {
        const form = document.getElementById("review-form");
        if (!form) return;
        for (const item of form.elements) {
            if (!item.name || !(item.name in values)) continue;
            if (item.name === "files") item.checked = values.files.includes(item.value) || !values.offered.includes(item.value);
            else if (item.type === "radio") { if (item.value === values.file) item.checked = true; }
            else if (item.type === "checkbox") item.checked = values[item.name];
            else item.value = values[item.name];
        }
    }

    function draw(answer, keeps) {
        const before = keeps ? typed() : {}, place = root();
        if (!place) return;
        const form = document.getElementById("review-form");
        const sliders = [...place.querySelectorAll("[data-compare]")].map((item) => item.value);
        const opened = new Map([...place.querySelectorAll("details")].map((item) => [item.firstElementChild.textContent, item.open]));
        const scrolled = [...place.querySelectorAll(".kiln-timeline")].map((item) => item.scrollLeft);
        place.innerHTML = answer.html;
        state.run = {path: answer.path, name: answer.name};
        state.signature = answer.signature;
        if (keeps) {
            // A choice that nobody made follows a new verdict.
            const now = document.getElementById("review-form");
            if (!state.hasChosen && form && now && now.dataset.advised !== form.dataset.advised) delete before.file;
            typeAgain(before);
            for (const item of place.querySelectorAll("details"))
                if (opened.has(item.firstElementChild.textContent)) item.open = opened.get(item.firstElementChild.textContent);
            [...place.querySelectorAll("[data-compare]")].forEach((item, index) => {
                if (sliders[index] === undefined) return;
                item.value = sliders[index];
                slide(item);
            });
            [...place.querySelectorAll(".kiln-timeline")].forEach((item, index) => { item.scrollLeft = scrolled[index] || 0; });
        } else {
            state.picks = {};
            state.hasChosen = false;
            firstPicks();
        }
        show("left");
        show("right");
    }

    async function ask(data, button) {
        const isLook = data.do === "look";
        if (!state.server || state.busy || (isLook && !kiln.isLost(state.looking))) return;
        const mine = Date.now();
        if (isLook) state.looking = mine;
        else state.busy = true;
        // What a person asks for is never lost to a look that is under way.
        while (!isLook && !kiln.isLost(state.looking)) await wait(30);
        if (button) button.setAttribute("aria-busy", "true");
        try {
            const answer = await state.server.review(data);
            if (answer.error) { say(answer.error, true); return; }
            if (answer.html) draw(answer, data.do !== "open");
            if (answer.said) {
                const box = document.createElement("div");
                box.innerHTML = answer.said;
                root().querySelector("header").after(box);
                box.scrollIntoView({block: "nearest"});
            }
            // What is said of settings stands where they are to be trained.
            if (answer.message || !isLook) say(answer.values ? "" : answer.message);
            // What was in the queue is there now.
            else if (state.waits && answer.html && !answer.busy) { say(""); state.waits = false; }
            if (answer.message) state.waits = Boolean(answer.now);
            if (answer.values) kiln.fill(answer);
            if (answer.fetch) {
                const link = document.createElement("a");
                link.href = answer.fetch;
                link.download = "";
                link.click();
            }
            if (answer.now && kiln.state.trigger) kiln.state.trigger("now");
        } finally {
            if (!isLook) state.busy = false;
            else if (state.looking === mine) state.looking = 0;
            if (button) button.removeAttribute("aria-busy");
        }
    }

    // The page's one timer calls this every second.
    function tick() {
        const place = root();
        if (!state.run || !place || !place.offsetParent || Date.now() - state.asked < 4000) return;
        state.asked = Date.now();
        if (!place.children.length) ask({do: "open", ...state.run});
        else ask({do: "look", signature: state.signature, ...state.run});
    }

    // ---- comparing ----------------------------------------------------------------------------------
    const compare = () => document.querySelector(".kiln-compare");

    function firstPicks() {
        const rows = [...document.querySelectorAll("#review-run tbody tr")];
        const first = rows.map((row) => [...row.querySelectorAll("[data-pick]")]).find((items) => items.length);
        if (!first) return;
        state.picks.left = JSON.parse(first[0].dataset.pick);
        state.picks.right = JSON.parse(first[first.length - 1].dataset.pick);
        state.side = "left";
    }

    function show(side) {
        const box = compare(), pick = state.picks[side];
        if (!box || !pick) return;
        box.hidden = false;
        const image = box.querySelector(`.side.${side} img`);
        if (image.getAttribute("src") !== pick.full) image.src = pick.full;
        image.alt = pick.label;
        box.querySelector(`[data-label=${side}]`).textContent = pick.label;
        for (const button of box.querySelectorAll("[data-side]"))
            button.setAttribute("aria-pressed", String(button.dataset.side === state.side));
        for (const item of document.querySelectorAll("#review-run [data-pick]")) {
            const full = JSON.parse(item.dataset.pick).full;
            item.classList.toggle("is-left", Boolean(state.picks.left) && full === state.picks.left.full);
            item.classList.toggle("is-right", Boolean(state.picks.right) && full === state.picks.right.full);
        }
    }

    function pick(item) {
        state.picks[state.side] = JSON.parse(item.dataset.pick);
        state.side = state.side === "left" ? "right" : "left";
        show("left");
        show("right");
    }

    function slide(input) {
        const stage = compare().querySelector(".stage");
        if (input.dataset.compare === "cut") stage.style.setProperty("--cut", `${input.value}%`);
        else {
            stage.style.setProperty("--zoom", input.value);
            if (Number(input.value) === 1) { stage.style.setProperty("--x", "0px"); stage.style.setProperty("--y", "0px"); }
        }
    }

    // Dragging moves the border, or the pictures where they are zoomed in.
    let drag = null;
    document.addEventListener("pointerdown", (event) => {
        const stage = event.target.closest(".kiln-compare .stage");
        if (!stage) return;
        const style = getComputedStyle(stage), zoom = Number(style.getPropertyValue("--zoom"));
        drag = {stage, zoom, x: event.clientX, y: event.clientY,
            left: parseFloat(style.getPropertyValue("--x")) || 0, top: parseFloat(style.getPropertyValue("--y")) || 0};
        if (zoom === 1) border(event);
        stage.setPointerCapture(event.pointerId);
        event.preventDefault();
    });
    document.addEventListener("pointermove", (event) => {
        if (!drag) return;
        if (drag.zoom === 1) { border(event); return; }
        const box = drag.stage.getBoundingClientRect(), far = (drag.zoom - 1) / 2;
        const clamp = (value, most) => Math.max(-most, Math.min(most, value));
        drag.stage.style.setProperty("--x", `${clamp(drag.left + event.clientX - drag.x, far * box.width)}px`);
        drag.stage.style.setProperty("--y", `${clamp(drag.top + event.clientY - drag.y, far * box.height)}px`);
    });
    for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => { drag = null; });
    function border(event) {
        const box = drag.stage.getBoundingClientRect(), input = compare().querySelector("[data-compare=cut]");
        input.value = String(Math.round(Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * 100));
        slide(input);
    }

    // ---- listeners ------------------------------------------------------------------------------------
    async function browseInto(name, button) {
        const form = button.closest("form"), input = form.elements[name];
        kiln.browse("folder", input.value, (path) => { input.value = path; input.focus(); });
    }

    document.addEventListener("change", (event) => { if (event.target.matches("#review-form [name=file]")) state.hasChosen = true; });
    document.addEventListener("click", (event) => {
        const target = event.target.closest("[data-review],[data-review-run],[data-review-open],[data-browse-into],[data-pick],[data-side]");
        if (!target || !target.closest("#review, #runs")) return;
        const data = target.dataset;
        if (data.pick) pick(target);
        else if (data.side) { state.side = data.side; show("left"); show("right"); }
        else if (data.browseInto) browseInto(data.browseInto, target);
        else if (data.reviewRun) ask({do: "open", run: Number(data.reviewRun)}, target).then(reveal);
        else if ("reviewOpen" in data) ask({do: "open", path: target.closest("form").elements.path.value}, target).then(reveal);
        else {
            const wanted = JSON.parse(data.review);
            if (wanted.do === "open") ask(wanted, target).then(reveal);
            else ask({...typed(), ...state.run, ...wanted}, target);
        }
    });
    async function reveal() {
        await wait(50);
        const place = root();
        if (place && place.children.length) place.scrollIntoView({block: "start"});
    }
    document.addEventListener("input", (event) => { if (event.target.dataset.compare) slide(event.target); });
    document.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && event.target.closest("#review-open") && event.target.name === "path") {
            event.preventDefault();
            document.querySelector("[data-review-open]").click();
            return;
        }
        const item = event.target.closest && event.target.closest("#review-run [data-pick]");
        const by = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
        if (!item || !by) return;
        const row = item.closest("tr"), column = item.closest("td").cellIndex + by[1];
        const next = by[0] < 0 ? row.previousElementSibling : by[0] > 0 ? row.nextElementSibling : row;
        const there = next && next.cells[column] && next.cells[column].querySelector("[data-pick]");
        if (!there) return;
        event.preventDefault();
        there.focus();
        there.scrollIntoView({block: "nearest", inline: "nearest"});
    });

    function connect(server) {
        state.server = kiln.answering(server);
    }

    return {connect, tick, say, isShown, state};
})();
