// Tables that sort by any column: the heading is a button, empty cells come last.

function cellText(value, kind) {
  if (value === null || value === undefined || value === "") return "";
  if (kind === "percent") return (100 * value).toFixed(2);
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (kind !== "number" || typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return shortNumber(value);
}

function compareCells(a, b) {
  const empty = (x) => x === null || x === undefined || x === "";
  if (empty(a) || empty(b)) return Number(empty(a)) - Number(empty(b));
  if (typeof a === "string" || typeof b === "string") return String(a).localeCompare(String(b), "en", { numeric: true });
  return a - b;
}

function drawTable(container, table) {
  let order = { column: -1, direction: "none" };
  const body = element("tbody");
  const heads = table.columns.map((column, i) => {
    const heading = column.name.replaceAll("_", " ") + (column.kind === "percent" ? " %" : "");
    const button = element("button", { type: "button" }, heading);
    const th = element("th", { scope: "col", class: column.kind, "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      const first = column.kind === "text" || ["k", "tokens"].includes(column.name) ? "ascending" : "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      const again = order.column === i;
      order = { column: i, direction: !again ? first : order.direction === first ? other : "none" };
      if (order.direction === "none") order.column = -1;
      fill();
    });
    return th;
  });
  function fill() {
    heads.forEach((th, i) => th.setAttribute("aria-sort", i === order.column ? order.direction : "none"));
    const rows = [...table.rows];
    if (order.column >= 0) {
      const sign = order.direction === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [a[order.column], b[order.column]];
        const filled = (v) => v !== null && v !== undefined && v !== "";
        return (filled(x) && filled(y) ? sign : 1) * compareCells(x, y);
      });
    }
    body.replaceChildren(...rows.map((row) =>
      element("tr", {}, ...row.map((value, i) => element("td", { class: table.columns[i].kind }, cellText(value, table.columns[i].kind))))));
  }
  fill();
  const made = element("table", {}, element("caption", { class: "unseen" }, table.name), element("thead", {}, element("tr", {}, ...heads)), body);
  const scroller = element("div", { class: "scroller", role: "region", tabindex: "0", "aria-label": `Table ${table.name}` }, made);
  if (table.plain) return container.replaceChildren(scroller);
  const record = table.provenance;
  const lines = record ? [`${record.hardware?.device_kind ?? ""} x ${record.hardware?.num_devices ?? 1}`, record.time, `commit ${(record.commit ?? "unknown").slice(0, 12)}${record.dirty ? " with changes" : ""}`] : ["how it was made is not on record"];
  const note = element("p", { class: "note" }, lines.filter(Boolean).join(", "));
  const command = record?.command ? element("code", { class: "command" }, record.command) : null;
  const details = element("details", { open: table.open }, element("summary", {}, `${table.name} (${table.rows.length} rows)`), scroller, note, ...(command ? [command] : []));
  container.append(details);
}
