// Line charts in SVG: points by mouse and by keyboard, series that can be hidden, a frontier.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  const svgTags = ["svg", "g", "path", "rect", "circle", "line", "text", "image", "title"];
  const made = svgTags.includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function shortNumber(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e6 || size < 1e-3) return x.toExponential(1).replace("e+", "e");
  return String(Number(x.toPrecision(size >= 1000 ? Math.ceil(Math.log10(size)) : 3)));
}

// Points that no other point beats in both: less x, more y.
function frontierOf(points) {
  const sorted = [...points].sort((a, b) => a.x - b.x || b.y - a.y);
  let best = -Infinity;
  return sorted.filter((point) => {
    if (point.y <= best) return false;
    best = point.y;
    return true;
  });
}

function ticksOf(low, high, isLog) {
  if (isLog) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const m of high / low > 100 ? [1] : [1, 2, 5]) {
        const tick = Number(`${m}e${power}`);
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
    return ticks;
  }
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((x) => x >= rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-6; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

const MARKERS = ["circle", "square", "diamond", "up", "down"];
function markerPath(kind, x, y, size) {
  const s = size;
  if (kind === "square") return `M${x - s},${y - s}h${2 * s}v${2 * s}h${-2 * s}z`;
  if (kind === "diamond") return `M${x},${y - s * 1.3}L${x + s * 1.3},${y}L${x},${y + s * 1.3}L${x - s * 1.3},${y}z`;
  if (kind === "up") return `M${x},${y - s * 1.2}L${x + s * 1.2},${y + s}H${x - s * 1.2}z`;
  if (kind === "down") return `M${x},${y + s * 1.2}L${x + s * 1.2},${y - s}H${x - s * 1.2}z`;
  return `M${x - s},${y}a${s},${s} 0 1,0 ${2 * s},0a${s},${s} 0 1,0 ${-2 * s},0z`;
}

function widthOf(container) {
  return Math.max(280, Math.min(760, container.clientWidth || 640));
}

// series: [{name, colour, dashed, points: [{x, y, text}]}], points in the order of their line.
function drawChart(container, { label, series, xLabel, yLabel, logX = false, ticksX = null, frontier = false, dots = true }) {
  const hidden = new Set();
  let current = null; // the point that the keyboard is at
  const tip = element("div", { class: "tip", role: "status", "aria-live": "polite" });
  const legend = element("div", { class: "legend", role: "group", "aria-label": "Series shown" });
  const frame = element("div", { class: "chart" });
  container.replaceChildren(frame, legend);

  function draw() {
    const width = widthOf(container);
    const height = Math.round(Math.max(240, width * 0.52));
    const box = { left: 52, right: width - 12, top: 12, bottom: height - 42 };
    const shown = series.filter((s) => !hidden.has(s.name) && s.points.length);
    const all = shown.flatMap((s) => s.points);
    const svg = element("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, tabindex: "0", role: "group", "aria-roledescription": "chart",
      "aria-label": `${label}. Arrow keys go from point to point.`,
    });
    if (all.length) {
      const range = (values, pad) => {
        const [low, high] = [Math.min(...values), Math.max(...values)];
        return [low - pad * (high - low || 1), high + pad * (high - low || 1)];
      };
      const toX = logX ? Math.log : (x) => x;
      const [x0, x1] = range(all.map((p) => toX(p.x)), 0.03);
      const [y0, y1] = range(all.map((p) => p.y), 0.05);
      const px = (x) => box.left + ((toX(x) - x0) / (x1 - x0)) * (box.right - box.left);
      const py = (y) => box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top);
      const back = logX ? Math.exp : (x) => x;
      for (const tick of ticksOf(y0, y1, false)) {
        svg.append(
          element("line", { class: "grid", x1: box.left, x2: box.right, y1: py(tick), y2: py(tick) }),
          element("text", { class: "tick", x: box.left - 6, y: py(tick) + 4, "text-anchor": "end" }, shortNumber(tick)),
        );
      }
      let last = -Infinity;
      for (const tick of ticksX ?? ticksOf(back(x0), back(x1), logX)) {
        if (px(tick) - last < 34) continue;
        last = px(tick);
        svg.append(
          element("line", { class: "axis", x1: last, x2: last, y1: box.bottom, y2: box.bottom + 4 }),
          element("text", { class: "tick", x: last, y: box.bottom + 17, "text-anchor": "middle" }, shortNumber(tick)),
        );
      }
      svg.append(
        element("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
        element("text", { class: "name", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel),
        element("text", { class: "name", transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
      );
      const marks = [];
      if (frontier) {
        const best = frontierOf(all);
        const corners = best.map((p, i) => `${i ? `H${px(p.x)}V` : `M${px(p.x)},`}${py(p.y)}`).join("");
        svg.append(element("path", { class: "frontier", d: `${corners}H${box.right}` }));
        for (const p of best) svg.append(element("circle", { class: "best", cx: px(p.x), cy: py(p.y), r: 9 }));
      }
      shown.forEach((s) => {
        const number = series.indexOf(s);
        const line = s.points.map((p, i) => `${i ? "L" : "M"}${px(p.x).toFixed(1)},${py(p.y).toFixed(1)}`).join("");
        svg.append(element("path", { class: "line", d: line, stroke: s.colour, "stroke-dasharray": s.dashed ? "2 4" : null }));
        for (const p of s.points) {
          const at = { x: px(p.x), y: py(p.y), point: p, series: s };
          marks.push(at);
          const marker = markerPath(MARKERS[number % MARKERS.length], at.x, at.y, 4);
          if (dots) svg.append(element("path", { class: "dot", d: marker, fill: s.colour }));
        }
      });
      const ring = element("circle", { class: "here", r: 7, visibility: "hidden" });
      svg.append(ring);
      const show = (mark) => {
        current = mark;
        ring.setAttribute("visibility", mark ? "visible" : "hidden");
        tip.hidden = !mark;
        if (!mark) return;
        ring.setAttribute("cx", mark.x);
        ring.setAttribute("cy", mark.y);
        tip.textContent = `${mark.series.name}: ${mark.point.text}`;
        tip.style.left = `${Math.min(Math.max(mark.x, 90), width - 90)}px`;
        tip.style.top = `${mark.y > height / 2 ? mark.y - 14 : mark.y + 14}px`;
        tip.classList.toggle("below", mark.y <= height / 2);
      };
      svg.addEventListener("pointermove", (event) => {
        const bounds = svg.getBoundingClientRect();
        const [x, y] = [(event.clientX - bounds.left) * (width / bounds.width), (event.clientY - bounds.top) * (height / bounds.height)];
        const near = marks.reduce((a, b) => (Math.hypot(a.x - x, a.y - y) <= Math.hypot(b.x - x, b.y - y) ? a : b));
        show(Math.hypot(near.x - x, near.y - y) < 40 ? near : null);
      });
      svg.addEventListener("pointerleave", () => show(null));
      svg.addEventListener("blur", () => show(null));
      svg.addEventListener("keydown", (event) => {
        const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
        if (event.key === "Escape") return show(null);
        if (!(event.key in moves)) return;
        event.preventDefault();
        const at = marks.indexOf(current);
        const next = at < 0 ? 0 : Math.min(Math.max(at + moves[event.key], 0), marks.length - 1);
        show(marks[next]);
      });
    }
    tip.hidden = true;
    frame.replaceChildren(svg, tip);
  }

  series.forEach((s, number) => {
    const key = element("svg", { viewBox: "0 0 24 12", width: 24, height: 12, "aria-hidden": "true" },
      element("path", { class: "line", d: "M0,6H24", stroke: s.colour, "stroke-dasharray": s.dashed ? "2 4" : null }),
      dots ? element("path", { d: markerPath(MARKERS[number % MARKERS.length], 12, 6, 4), fill: s.colour }) : null);
    const button = element("button", { type: "button", "aria-pressed": "true" }, key, s.name);
    button.addEventListener("click", () => {
      hidden.has(s.name) ? hidden.delete(s.name) : hidden.add(s.name);
      button.setAttribute("aria-pressed", String(!hidden.has(s.name)));
      draw();
    });
    legend.append(button);
  });
  draw();
  container.watcher?.disconnect(); // of the chart that was here before
  container.watcher = new ResizeObserver(() => {
    if (container.clientWidth && widthOf(container) !== frame.querySelector("svg").width.baseVal.value) draw();
  });
  container.watcher.observe(container);
}
