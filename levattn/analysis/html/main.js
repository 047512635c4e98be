// Puts the page together from the data in it.

function choose(select, options, draw) {
  select.replaceChildren(...options.map((text, i) => element("option", { value: i }, text)));
  select.onchange = () => draw(Number(select.value));
  select.closest("label").hidden = options.length < 2;
  if (options.length) draw(0);
}

function distinct(values) {
  return [...new Set(values)];
}

function drawAccuracy(root, data) {
  const find = (name) => root.querySelector(`[data-part="${name}"]`);
  const settingOf = (p) => `${p.setting}: ${p.measure}`;
  const settings = distinct(data.points.map(settingOf));
  const asPercent = (p) => (p.measure === "cosine" ? p.value : 100 * p.value);
  const seriesOf = (points, x, unit) => {
    const folders = distinct(points.map((p) => p.folder));
    const nameOf = (p) => (folders.length > 1 ? `${p.folder}: ${p.series}` : p.series);
    return distinct(points.map(nameOf)).map((name) => {
      const own = points.filter((p) => nameOf(p) === name).sort((a, b) => a.k - b.k);
      const value = (p) => (p.measure === "cosine" ? p.value.toFixed(4) : `${(100 * p.value).toFixed(2)} %`);
      const text = (p) => `k = ${p.k}, ${p.measure} ${value(p)}${p.ms === null ? "" : `, ${shortNumber(p.ms)} ms an image`}`;
      const seen = new Set();
      const marks = own.map((p) => ({ x: x(p), y: asPercent(p), text: text(p) })).filter((m) => !seen.has(m.text) && seen.add(m.text));
      return { name, colour: data.colours[own[0].method] ?? "#888888", dashed: own[0].as_trained, points: marks };
    });
  };
  choose(find("setting"), settings, (at) => {
    const points = data.points.filter((p) => settingOf(p) === settings[at]);
    const yLabel = points[0].measure + (points[0].measure === "cosine" ? "" : ", %");
    const ticksX = distinct(points.map((p) => p.k)).sort((a, b) => a - b);
    drawChart(find("by-k"), { label: `${settings[at]} against the number of keys`, series: seriesOf(points.map((p) => ({ ...p, ms: null })), (p) => p.k), xLabel: "keys a query, k", yLabel, logX: true, ticksX, frontier: true });
    const timed = points.filter((p) => p.ms !== null);
    const devices = distinct(timed.map((p) => p.device));
    choose(find("device"), devices, (i) => {
      const here = timed.filter((p) => p.device === devices[i]);
      const tables = distinct(here.map((p) => p.table)).length;
      find("ms-note").textContent = tables > 1 ? `Timed in ${tables} runs on ${devices[i]}: small differences may be those of the runs.` : `Timed in one run on ${devices[i]}.`;
      drawChart(find("by-ms"), { label: `${settings[at]} against the time of an image`, series: seriesOf(here, (p) => p.ms), xLabel: "ms an image", yLabel, logX: true, frontier: true });
    });
    find("ms-block").hidden = timed.length === 0;
  });
}

function drawCurves(root, data) {
  const find = (name) => root.querySelector(`[data-part="${name}"]`);
  const palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B61C9", "#8DA63B"];
  const folderOf = (curve) => curve.name.split("/")[0];
  const folders = distinct(data.curves.map(folderOf));
  const parts = { curves: find("curves"), metric: find("metric"), axis: find("axis") };
  let runs = [];
  const draw = () => {
    const metric = parts.metric.selectedOptions[0].textContent;
    const seconds = parts.axis.value === "seconds";
    const series = runs.filter((c) => c.metrics[metric]).map((c, i) => ({
      name: c.name + (seconds && c.hardware ? ` (${c.hardware})` : ""),
      colour: palette[i % palette.length],
      dashed: i >= palette.length,
      points: c.metrics[metric].map(([step, time, value]) => ({ x: seconds ? time : step, y: value, text: `step ${step}, ${shortNumber(time)} s: ${shortNumber(value)}` })),
    }));
    drawChart(parts.curves, { label: `${metric} of training runs`, series, xLabel: seconds ? "seconds since the first line that was logged" : "step", yLabel: metric, dots: false });
  };
  const rank = (metric) => (metric === "train/loss" ? "" : metric); // the loss first, the others by name
  parts.axis.addEventListener("change", draw);
  parts.metric.addEventListener("change", draw);
  choose(find("runs"), folders, (at) => {
    runs = data.curves.filter((c) => folderOf(c) === folders[at]);
    const metrics = distinct(runs.flatMap((c) => Object.keys(c.metrics))).sort((a, b) => rank(a).localeCompare(rank(b)));
    parts.metric.replaceChildren(...metrics.map((name) => element("option", {}, name)));
    draw();
  });
}

function drawAbout(root, data) {
  const { provenance: made } = data;
  const rows = [
    ["made", made.time], ["by", made.command], ["commit", `${made.commit ?? "not from a git checkout"}${made.dirty ? ", with changes" : ""}`],
    ["on", `${made.hardware.num_devices} x ${made.hardware.device_kind}, ${made.hardware.num_cpus} CPU cores`],
    ["with", Object.entries(made.versions).filter(([, v]) => v).map(([n, v]) => `${n} ${v}`).join(", ")],
  ];
  root.replaceChildren(...rows.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, String(text ?? ""))]));
}

function showExplorer(section, payload) {
  if (typeof DecompressionStream === "undefined") {
    section.querySelector("[data-part=status]").textContent = "The explorer needs a browser of 2023 or later, with DecompressionStream.";
    return;
  }
  const { exactness: e, tokens, layers, heads } = payload;
  section.querySelector("[data-part=about]").textContent =
    `${payload.model}, trained with ${payload.attention} attention, on ${payload.source}: ${layers} layers, ${heads} heads, ${tokens} tokens.`;
  section.querySelector("[data-part=exactness]").textContent =
    `Attention is computed here, from logits that are stored as ${e.rank.toFixed(0)} rounded components a head (of rank ${payload.full_rank}). Dense attention is off by ${(100 * e.mean_error).toFixed(2)} % of its mass for the mean query, and by ${(100 * e.largest_error).toFixed(1)} % for the worst of all; which keys a method keeps is exact.`;
  window.explorer = new Explorer(section, payload);
}

const data = JSON.parse(document.getElementById("data").textContent);
const sections = { explorer: data.explorer !== null, accuracy: data.points.length > 0, training: data.curves.length > 0, tables: data.tables.length > 0 };
for (const [name, there] of Object.entries(sections)) {
  document.getElementById(name).hidden = !there;
  document.querySelector(`nav a[href="#${name}"]`).hidden = !there;
}
if (sections.accuracy) drawAccuracy(document.getElementById("accuracy"), data);
if (sections.training) drawCurves(document.getElementById("training"), data);
data.tables.forEach((table, i) => drawTable(document.querySelector("#tables [data-part=list]"), { ...table, open: i === 0 }));
drawAbout(document.querySelector("#made dl"), data);
if (sections.explorer) showExplorer(document.getElementById("explorer"), data.explorer);
