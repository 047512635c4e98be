// One head at a time: what a method keeps of an image, and where a query looks, densely and over what is kept.

const SHOWN = {
  kept: "what the method keeps",
  leverage: "leverage score",
  received: "attention received, mean of all queries",
};

class Explorer {
  constructor(root, payload) {
    this.root = root;
    this.payload = payload;
    this.blobs = new Map();
    this.find = (name) => root.querySelector(`[data-part="${name}"]`);
    const { prefix, grid, ks, methods } = payload;
    const matched = methods.findIndex((m) => m.name === "leverage");
    this.state = {
      image: 0, layer: payload.layers - 1, head: 0, method: Math.max(matched, 0), k: Math.min(2, ks.length - 1),
      query: prefix + Math.floor(grid[0] / 2) * grid[1] + Math.floor(grid[1] / 2), show: "kept",
    };
    this.fromHash();
    this.makeControls();
    this.panels = ["image", "dense", "reduced"].map((name) => this.makePanel(name));
    this.render();
  }

  // The address holds the view, so that it can be kept and sent.
  fromHash() {
    const { payload, state } = this;
    const asked = new URLSearchParams(location.hash.slice(1));
    const limits = { image: payload.images.length, layer: payload.layers, head: payload.heads, query: payload.tokens };
    for (const [name, limit] of Object.entries(limits)) {
      const number = Number(asked.get(name)) - 1;
      if (asked.has(name) && Number.isInteger(number) && number >= 0 && number < limit) state[name] = number;
    }
    const method = payload.methods.findIndex((m) => m.name === asked.get("method"));
    if (method >= 0) state.method = method;
    const k = payload.ks.indexOf(Number(asked.get("k")));
    if (k >= 0) state.k = k;
    if (Object.hasOwn(SHOWN, asked.get("show"))) state.show = asked.get("show");
  }

  toHash() {
    const { state, payload } = this;
    const { image, layer, head, query } = state;
    const view = { image: image + 1, layer: layer + 1, head: head + 1, method: payload.methods[state.method].name, k: payload.ks[state.k], query: query + 1, show: state.show };
    try {
      history.replaceState(null, "", `#${new URLSearchParams(view)}`);
    } catch {
      // Some viewers of local files allow no change of the address; the page does without.
    }
  }

  set(changes) {
    Object.assign(this.state, changes);
    this.toHash();
    this.render();
  }

  step(name, by, length) {
    this.set({ [name]: (this.state[name] + by + length) % length });
  }

  makeControls() {
    const { payload, state } = this;
    const pictures = this.find("images");
    payload.images.forEach((image, i) => {
      const radio = element("input", { type: "radio", name: "image", value: i, "aria-label": `Image ${i + 1}: ${image.label}` });
      radio.checked = i === state.image;
      radio.addEventListener("change", () => this.set({ image: i }));
      pictures.append(element("label", { title: image.label }, radio, element("img", { src: image.uri, alt: "" })));
    });
    const ranges = { layer: payload.layers - 1, head: payload.heads - 1, k: payload.ks.length - 1 };
    for (const [name, most] of Object.entries(ranges)) {
      const input = this.find(name);
      input.max = most;
      input.addEventListener("input", () => this.set({ [name]: Number(input.value) }));
    }
    const method = this.find("method");
    payload.methods.forEach((m, i) => method.append(element("option", { value: i }, m.name)));
    method.addEventListener("change", () => this.set({ method: Number(method.value) }));
    const show = this.find("show");
    for (const [value, text] of Object.entries(SHOWN)) show.append(element("option", { value }, text));
    show.addEventListener("change", () => this.set({ show: show.value }));
    this.find("details").addEventListener("toggle", () => this.render());
  }

  // Where a token is drawn, in widths of a patch: those that are no patches above the grid.
  placeOf(s) {
    const { prefix, grid } = this.payload;
    if (s < prefix) return [s, 0];
    return [(s - prefix) % grid[1], (prefix ? 1.35 : 0) + Math.floor((s - prefix) / grid[1])];
  }

  nameOf(s) {
    const { prefix, grid } = this.payload;
    if (s < prefix) return prefix === 1 ? "class token" : `leading token ${s + 1}`;
    return `row ${Math.floor((s - prefix) / grid[1]) + 1}, column ${((s - prefix) % grid[1]) + 1}`;
  }

  makePanel(name) {
    const { prefix, grid, tokens } = this.payload;
    const above = prefix ? 1.35 : 0;
    const isGrid = name === "image";
    const svg = element("svg", {
      viewBox: `-0.1 -0.1 ${grid[1] + 0.2} ${grid[0] + above + 0.2}`,
      role: isGrid ? "grid" : "img", tabindex: isGrid ? "0" : null, "aria-label": isGrid ? "Patches of the image; arrow keys move the query" : null,
    });
    const picture = element("image", { x: 0, y: above, width: grid[1], height: grid[0], preserveAspectRatio: "none" });
    if (isGrid) svg.append(picture);
    if (prefix) svg.append(element("text", { class: "tokenname", x: prefix + 0.25, y: 0.72, "font-size": 0.72 }, prefix === 1 ? "class token" : "class and register tokens"));
    const cells = [];
    let row = null;
    for (let s = 0; s < tokens; s++) {
      const [x, y] = this.placeOf(s);
      if (row === null || (s >= prefix && (s - prefix) % grid[1] === 0)) {
        row = element("g", isGrid ? { role: "row" } : {});
        svg.append(row);
      }
      const cell = element("rect", { x, y, width: 1, height: 1, "data-token": s, role: isGrid ? "gridcell" : null, id: isGrid ? `token-${s}` : null });
      cells.push(cell);
      row.append(cell);
    }
    const marks = element("g", { class: "marks", "aria-hidden": "true" });
    const query = element("rect", { class: "query", width: 1, height: 1, "aria-hidden": "true" });
    svg.append(marks, query);
    const tokenAt = (event) => event.target.closest?.("[data-token]")?.dataset.token;
    svg.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token !== undefined) this.set({ query: Number(token) });
    });
    svg.addEventListener("pointermove", (event) => this.hover(tokenAt(event)));
    svg.addEventListener("pointerleave", () => this.hover(undefined));
    if (isGrid) svg.addEventListener("keydown", (event) => this.key(event));
    this.find(`panel-${name}`).replaceChildren(svg);
    return { name, svg, picture, cells, marks, query };
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { payload, state } = this;
    const { prefix, grid, tokens } = payload;
    const isPatch = state.query >= prefix;
    const inRow = (state.query - prefix) % grid[1];
    const moves = {
      ArrowLeft: isPatch ? (inRow > 0 ? -1 : 0) : -1,
      ArrowRight: isPatch ? (inRow < grid[1] - 1 ? 1 : 0) : state.query < prefix - 1 ? 1 : 0,
      ArrowUp: isPatch && state.query - prefix < grid[1] ? (prefix ? -state.query : 0) : isPatch ? -grid[1] : 0,
      ArrowDown: isPatch ? grid[1] : prefix - state.query,
      Home: -inRow, End: grid[1] - 1 - inRow,
    };
    const steps = { l: ["layer", payload.layers], h: ["head", payload.heads], m: ["method", payload.methods.length], k: ["k", payload.ks.length], i: ["image", payload.images.length] };
    const lower = event.key.toLowerCase();
    if (event.key in moves) {
      event.preventDefault();
      const next = state.query + moves[event.key];
      if (next >= 0 && next < tokens && moves[event.key] !== 0) this.set({ query: next });
    } else if (lower in steps) {
      event.preventDefault();
      this.step(steps[lower][0], event.shiftKey ? -1 : 1, steps[lower][1]);
    }
  }

  async blob(image, layer) {
    const key = `${image} ${layer}`;
    if (!this.blobs.has(key)) {
      if (this.blobs.size > 6) this.blobs.delete(this.blobs.keys().next().value);
      this.blobs.set(key, unpackBlob(this.payload.blobs[image][layer], this.payload.layout));
    }
    return this.blobs.get(key);
  }

  async render() {
    const { payload, state } = this;
    this.controls();
    const { image, layer, head, method, k } = state;
    const arrays = await this.blob(image, layer);
    if (image !== state.image || layer !== state.layer) return; // another view was asked for meanwhile
    const key = [image, layer, head, method, k].join(" ");
    if (this.viewKey !== key) {
      this.view = headView(arrays, payload, { head: state.head, method: state.method, kIndex: state.k });
      this.viewKey = [image, layer, state.head, state.method, state.k].join(" ");
    }
    this.draw();
    this.root.dataset.ready = this.viewKey;
  }

  controls() {
    const { payload, state } = this;
    for (const name of ["layer", "head", "k"]) this.find(name).value = state[name];
    const k = payload.ks[state.k];
    this.find("layer-out").textContent = `${state.layer + 1} of ${payload.layers}`;
    this.find("head-out").textContent = `${state.head + 1} of ${payload.heads}`;
    this.find("k-out").textContent = `${k} of ${payload.tokens}`;
    this.find("layer").setAttribute("aria-valuetext", `layer ${state.layer + 1}`);
    this.find("head").setAttribute("aria-valuetext", `head ${state.head + 1}`);
    this.find("k").setAttribute("aria-valuetext", `${k} keys`);
    this.find("method").value = state.method;
    this.find("show").value = state.show;
    const picture = payload.images[state.image];
    this.find("images").querySelectorAll("input")[state.image].checked = true;
    const said = picture.predicted === undefined ? "" : `; the model says ${picture.predicted} (${(100 * picture.confidence).toFixed(0)} %)`;
    this.find("image-text").textContent = `${picture.label}${said}`;
  }

  draw() {
    const { payload, state, view } = this;
    const { choice } = view;
    const [dense, reduced] = [view.dense[state.query], view.reduced[state.query]];
    const most = Math.max(...dense, ...reduced);
    const heat = (values, largest) => (s) => ["var(--heat)", Math.sqrt(Math.max(values[s], 0) / (largest || 1))];
    const fills = { dense: heat(dense, most), reduced: heat(reduced, most) };
    fills.image = state.show === "kept" ? (s) => this.fillOf(s) : heat(view[state.show], Math.max(...view[state.show]));
    const place = this.placeOf(state.query);
    for (const panel of this.panels) {
      panel.picture.setAttribute("href", payload.images[state.image].uri);
      panel.cells.forEach((cell, s) => {
        const [fill, opacity] = fills[panel.name](s);
        cell.setAttribute("fill", fill);
        cell.setAttribute("fill-opacity", opacity.toFixed(3));
        if (panel.name === "image") {
          cell.setAttribute("aria-selected", String(s === state.query));
          cell.setAttribute("aria-label", this.describe(s));
        }
      });
      panel.query.setAttribute("x", place[0]);
      panel.query.setAttribute("y", place[1]);
      if (panel.name === "image") panel.svg.setAttribute("aria-activedescendant", `token-${state.query}`);
      const marked = choice.slots.reduce((all, slot, s) => (isAlone(choice, s) ? [...all, this.placeOf(s)] : all), []);
      panel.marks.replaceChildren(...marked.map(([x, y]) => element("rect", { x: x + 0.05, y: y + 0.05, width: 0.9, height: 0.9 })));
    }
    const percent = (x) => `${(100 * x).toFixed(1)} %`;
    const name = payload.methods[state.method].name;
    const alone = choice.slots.reduce((sum, _, s) => sum + (isAlone(choice, s) ? 1 : 0), 0);
    const groups = choice.members.filter((keys) => keys.length > 1).length;
    const near = choice.near?.[state.query]?.length ?? 0;
    const count = (n, one, many) => (n ? `${n} ${n === 1 ? one : many}` : "");
    const parts = [count(alone, "key by itself", "keys by themselves"), count(groups, "group of keys", "groups of keys"), near ? `${near} around the query` : ""].filter(Boolean);
    this.find("status").textContent =
      `${name}, k = ${payload.ks[state.k]}, layer ${state.layer + 1}, head ${state.head + 1}; query: ${this.nameOf(state.query)}. It sees ${parts.join(", ")}.`;
    this.find("facts").replaceChildren(
      ...[
        ["dense attention on keys seen as they are", percent(shareKept(dense, choice, state.query)), percent(view.captured)],
        ["distance of reduced from dense attention", percent(distanceOf(dense, reduced)), percent(view.distance)],
      ].map(([what, here, all]) => element("tr", {}, element("th", { scope: "row" }, what), element("td", { class: "number" }, here), element("td", { class: "number" }, all))),
    );
    this.find("scale").textContent = percent(most);
    this.find("panel-dense").querySelector("svg").setAttribute("aria-label", `Dense attention of the query; most on ${this.nameOf(dense.indexOf(Math.max(...dense)))}`);
    this.find("panel-reduced").querySelector("svg").setAttribute("aria-label", `Attention over what is kept; most on ${this.nameOf(reduced.indexOf(Math.max(...reduced)))}`);
    this.hover(undefined);
    this.list(dense, reduced);
  }

  fillOf(s) {
    const { choice } = this.view;
    const slot = choice.slots[s];
    if (slot < 0) return ["var(--paper)", 0.8];
    if (isAlone(choice, s)) return ["var(--paper)", 0];
    return [`hsl(${(slot * 137.508) % 360} 75% 50%)`, 0.62];
  }

  describe(s) {
    const { choice } = this.view;
    const slot = choice.slots[s];
    const size = slot < 0 ? 0 : choice.members[slot].length;
    const what = slot < 0 ? "dropped" : size === 1 ? "kept" : `in a group of ${size}`;
    return `${this.nameOf(s)}: ${what}, leverage score ${this.view.leverage[s].toFixed(3)}`;
  }

  hover(token) {
    const { view, state } = this;
    const text = this.find("hover");
    for (const panel of this.panels) panel.cells.forEach((cell) => cell.classList.remove("same"));
    if (token === undefined || !view) {
      text.textContent = "Point at a patch to read its numbers; click it, or move with the arrow keys, to make it the query.";
      return;
    }
    const s = Number(token);
    const percent = (x) => `${(100 * x).toFixed(2)} %`;
    text.textContent = `${this.describe(s)}; from the query: dense ${percent(view.dense[state.query][s])}, reduced ${percent(view.reduced[state.query][s])}.`;
    const slot = view.choice.slots[s];
    if (slot >= 0) for (const member of view.choice.members[slot]) this.panels[0].cells[member].classList.add("same");
  }

  // The keys as a table, built when it is open.
  list(dense, reduced) {
    const details = this.find("details");
    const holder = this.find("keys");
    if (!details.open) return holder.replaceChildren();
    const { view } = this;
    const columns = [["key", "text"], ["slot", "number"], ["members", "number"], ["leverage score", "number"], ["received", "percent"], ["from query, dense", "percent"], ["from query, reduced", "percent"]];
    const rows = Array.from(view.leverage, (score, s) => {
      const slot = view.choice.slots[s];
      return [this.nameOf(s), slot < 0 ? null : slot + 1, slot < 0 ? null : view.choice.members[slot].length, score, view.received[s], dense[s], reduced[s]];
    }).sort((a, b) => b[3] - a[3]);
    drawTable(holder, { name: "Keys of this head", columns: columns.map(([name, kind]) => ({ name, kind })), rows, open: true, plain: true });
  }
}
