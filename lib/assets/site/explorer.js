"use strict";

// SUITE, in tables.js, holds the committed tables. What is above the line takes numbers from them and makes text of numbers; what
// is below it changes the page. A point is {method, removes, value, low, high, interval, removed, bytes, standing, says}. A size
// below 1 is a share of the decoder that was removed, and any other is the most bytes that a model may have.

const rowsOf = (profile, table) => profile.tables[table]?.rows ?? [];
const is = (value) => value !== null && value !== undefined;
const same = (a, b) => Math.abs(a - b) < 1e-9;

// --- measures: (profile, model, size) -> {method: {value, low, high, interval}} ----------------------------------------------

// Rows of a table that are about a model; those of cost and latency are about one random network and have no model of ours.
function about(profile, table, model, size) {
  return rowsOf(profile, table).filter((row) => row.method !== "dense" && row.model === model && same(row.size, size));
}

// The lowest and the highest draw of each method, over dense. The table has a row for each method, or one for each draw.
function draws(profile, model, size) {
  const dense = rowsOf(profile, "pareto").find((row) => row.model === model && row.method === "dense");
  const found = {};
  for (const row of about(profile, "seeds", model, size)) {
    const values = is(row.lowest) ? [row.lowest, row.highest] : is(row.perplexity) && dense ? [row.perplexity / dense.perplexity] : [];
    const seen = (found[row.method] ??= { count: 0, low: Infinity, high: -Infinity });
    seen.count += is(row.lowest) ? row.draws : values.length;
    seen.low = Math.min(seen.low, ...values);
    seen.high = Math.max(seen.high, ...values);
  }
  return found;
}

function perplexity(profile, model, size) {
  const found = {}, spread = draws(profile, model, size);
  for (const row of about(profile, "pareto", model, size)) {
    if (!is(row.relative)) continue;
    const drawn = spread[row.method];
    if (is(row.low)) found[row.method] = { value: row.relative, low: row.low, high: row.high, interval: "95 %, windows" };
    else if (drawn?.count > 1)
      found[row.method] = { value: row.relative, low: drawn.low, high: drawn.high, interval: `lowest and highest of ${drawn.count} draws` };
    else found[row.method] = { value: row.relative };
  }
  for (const row of about(profile, "standing", model, size))
    found[row.method] = { value: row.relative, low: row.low, high: row.high, interval: `95 %, windows and ${row.draws} draw${row.draws > 1 ? "s" : ""}` };
  return found;
}

function accuracy(profile, model, size) {
  const found = {};
  for (const row of about(profile, "pareto", model, size))
    if (is(row.accuracy)) {
      const half = 1.96 * row.stderr;
      found[row.method] = { value: row.accuracy };
      if (is(row.stderr)) Object.assign(found[row.method], { low: row.accuracy - half, high: row.accuracy + half, interval: "95 %, questions" });
    }
  for (const row of rowsOf(profile, "other_measures")) {
    const [value, change, low, high] = ["", "change_", "low_", "high_"].map((part) => row[`${part}accuracy_${size}`]);
    if (row.model !== model || !is(value)) continue;
    found[row.method] = { value };
    const dense = value - change; // the interval is that of the difference from it
    if (is(low)) Object.assign(found[row.method], { low: dense + low, high: dense + high, interval: "95 % beside dense, questions" });
  }
  return found;
}

// A column of a table as it stands; with a name that ends in the model's, where a table has a column for each model.
const column = (table, name) => (profile, model, size) =>
  Object.fromEntries(about(profile, table, model, size).filter((row) => is(row[name])).map((row) => [row.method, { value: row[name] }]));

// Costs and speed were measured at one size, that of the profile.
const once = (table, name) => (profile, model, size) =>
  Object.fromEntries(
    rowsOf(profile, table)
      .filter((row) => same(size, profile.size) && is(row[name(model)]))
      .map((row) => [row.method, { value: row[name(model)] }])
  );

const second = (name) => (profile, model, size) =>
  Object.fromEntries(
    about(profile, "pareto", model, size)
      .filter((row) => is(row[`${name}_times_dense`]))
      .map((row) => [row.method, { value: row[`${name}_times_dense`], low: row[`${name}_low`], high: row[`${name}_high`], interval: "95 %, windows" }])
  );

// Perplexity after a little training, by what the models learnt from.
const trained = (aim) => (profile, model, size) =>
  Object.fromEntries(
    about(profile, "healing", model, size)
      .filter((row) => row.learns_from === aim)
      .map((row) => [row.method, { value: row.after, low: row.low, high: row.high, interval: "95 %, windows" }])
  );

function kept(profile, model, size) {
  const dense = rowsOf(profile, "pareto").find((row) => row.model === model && row.method === "dense");
  return Object.fromEntries(about(profile, "pareto", model, size).filter((row) => dense && is(row.params)).map((row) => [row.method, { value: row.params / dense.params }]));
}

// Files that llama.cpp ran: each kind is a line of its own, and the dense model in few bits stands beside every pruned one.
const fileOf = (row) => `${row.method}, ${row.kind}`;

function filesAt(profile, model, size) {
  const rows = rowsOf(profile, "device").filter((row) => row.model === model), own = rows.filter((row) => same(row.size, size));
  return own.length ? [...own.filter((row) => row.size > 0), ...rows.filter((row) => row.size === 0)] : [];
}

const filed = (read) => (profile, model, size) => Object.fromEntries(filesAt(profile, model, size).map((row) => [fileOf(row), read(row)]));

function denseAccuracy(profile, model) {
  const dense = rowsOf(profile, "pareto").find((row) => row.model === model && row.method === "dense");
  if (is(dense?.accuracy)) return dense.accuracy;
  for (const row of rowsOf(profile, "other_measures"))
    for (const name of Object.keys(row)) {
      const size = name.match(/^change_(?:accuracy_)?([\d.]+)$/)?.[1];
      if (row.model === model && size && is(row[name])) return row[`accuracy_${size}`] - row[name];
    }
  return null;
}

// tables: whose notes say how it was measured. best: which end is better. unit: how numbers are written and called. log: the scale.
// cut: values above SUITE.top are drawn at the edge. dense: where the dense model is. file: of files, whose bytes are those on disk.
const MEASURES = {
  perplexity: { name: "perplexity", unit: "times dense", tables: ["pareto", "standing", "seeds"], read: perplexity, best: "low", log: true, cut: true, dense: () => 1 },
  healed: { name: "perplexity after a little training on text", unit: "times dense", tables: ["healing"], read: trained("next token"), best: "low", log: true, cut: true, dense: () => 1 },
  distilled: { name: "perplexity after learning from the dense model", unit: "times dense", tables: ["healing"], read: trained("dense model"), best: "low", log: true, cut: true, dense: () => 1 },
  accuracy: { name: "zero-shot accuracy", unit: "%", tables: ["other_measures"], read: accuracy, best: "high", dense: denseAccuracy },
  kl: { name: "KL divergence from dense", unit: "nats", tables: ["other_measures"], read: column("other_measures", "kl"), best: "low", dense: () => 0 },
  top: { name: "share of equal top tokens", unit: "%", tables: ["other_measures"], read: column("other_measures", "same_top"), best: "high", dense: () => 1 },
  seconds: { name: "time to compress", unit: "seconds", tables: ["cost"], read: once("cost", (model) => `seconds_${model}`), best: "low", log: true },
  memory: { name: "peak memory beyond the weights", unit: "MB", tables: ["cost"], read: once("cost", () => "peak_mb"), best: "low" },
  decode: { name: "decoding speed", unit: "times dense", tables: ["latency"], read: once("latency", () => "decode_speedup"), best: "high", dense: () => 1 },
  prefill: { name: "prefill speed", unit: "times dense", tables: ["latency"], read: once("latency", () => "prefill_speedup"), best: "high", dense: () => 1 },
  filePerplexity: { name: "perplexity in llama.cpp", unit: "times dense", tables: ["device"], file: true, read: filed((row) => ({ value: row.times_dense, low: row.low, high: row.high, interval: "95 %, windows" })), best: "low", log: true, cut: true, dense: () => 1 },
  fileBytes: { name: "file for llama.cpp", unit: "MB", tables: ["device"], file: true, read: filed((row) => ({ value: row.mb })), best: "low" },
  fileDecode: { name: "decoding speed in llama.cpp", unit: "tokens a second", tables: ["device"], file: true, read: filed((row) => ({ value: row.decode_tokens_per_s })), best: "high" },
  kept: { name: "parameters left of the whole model", unit: "%", tables: ["pareto"], read: kept, best: "low", dense: () => 1 },
};

// The measures that a profile can have: those above, and perplexity on each further text that its table names.
function measuresOf(profile) {
  const names = Object.keys(rowsOf(profile, "pareto")[0] ?? {}).filter((name) => name.endsWith("_times_dense"));
  const texts = names.map((name) => name.replace("_times_dense", ""));
  const more = texts.map((name) => [name, { ...MEASURES.perplexity, name: `perplexity on ${name}`, tables: ["pareto"], read: second(name) }]);
  return { ...MEASURES, ...Object.fromEntries(more) };
}

// --- choices --------------------------------------------------------------------------------------------------------------

// [{id, profile, model}] of all that can be chosen, in the order of the tables.
function modelsOf(suite) {
  return Object.entries(suite.profiles).flatMap(([profile, found]) =>
    [...new Set(rowsOf(found, "pareto").map((row) => row.model))].map((model) => ({ id: `${profile}/${model}`, profile, model }))
  );
}

const sizesOf = (profile, model) => {
  const rows = ["pareto", "device"].flatMap((table) => rowsOf(profile, table)).filter((row) => row.model === model && row.size > 0);
  return [...new Set(rows.map((row) => row.size))].sort((a, b) => a - b);
};

// The sizes at which a model has values of a measure.
const measuredSizes = (profile, model, measure) => sizesOf(profile, model).filter((size) => Object.keys(measure.read(profile, model, size)).length);

// What is known of the size of each model that a measure is about: {method: {removed, bytes, kind}}.
function knownAt(profile, model, measure, size) {
  const swept = about(profile, "pareto", model, size).map((row) => [row.method, { removed: row.removed_decoder, bytes: row.bytes }]);
  if (!measure.file) return Object.fromEntries(swept);
  const removed = (row) => (row.size > 0 ? Object.fromEntries(swept)[row.method]?.removed : 0) ?? row.size;
  return Object.fromEntries(filesAt(profile, model, size).map((row) => [fileOf(row), { removed: removed(row), bytes: 1e6 * row.mb, kind: row.kind }]));
}

// Every model that has a value of a measure and a known number of bytes: [{method, size, removed, bytes, kind}].
function weighed(profile, model, measure) {
  const all = [0, ...measuredSizes(profile, model, measure)].flatMap((size) => {
    const values = measure.read(profile, model, size);
    return Object.entries(knownAt(profile, model, measure, size)).filter(([method]) => method in values).map(([method, known]) => ({ method, size, ...known }));
  });
  return all.filter(({ size, removed, bytes }) => is(bytes) && (size > 0 ? removed > 0 : removed === 0));
}

// The numbers of bytes that can be asked for, the largest first: each takes what really reached one of the shares, in one kind of file.
function budgetsOf(suite, profile, model, measure) {
  const most = {};
  for (const found of weighed(profile, model, measure)) {
    const group = `${found.kind} ${found.size}`;
    if (!elsewhere(suite, found, found.size)) most[group] = Math.max(most[group] ?? 0, found.bytes);
  }
  return [...new Set(Object.values(most).map(roundedUp))].sort((a, b) => b - a);
}

// To three digits, so that what fits still does.
function roundedUp(bytes) {
  const unit = 10 ** (Math.floor(Math.log10(bytes)) - 2);
  return Math.ceil(bytes / unit) * unit;
}

// The share at which each method has its largest model of at most so many bytes: {method: size}.
function fitting(profile, model, measure, most) {
  const best = {};
  for (const found of weighed(profile, model, measure))
    if (found.bytes <= most && !(best[found.method]?.bytes >= found.bytes)) best[found.method] = found;
  return Object.fromEntries(Object.entries(best).map(([method, { size }]) => [method, size]));
}

const nearest = (values, wanted) => values.reduce((best, value) => (Math.abs(value - wanted) < Math.abs(best - wanted) ? value : best));

// What is shown for what was wished: the first model, perplexity and 20 % where that is not to be had.
function choice(suite, wish) {
  const models = modelsOf(suite);
  if (!models.length) return null;
  const { id, profile, model } = models.find((found) => found.id === wish.model) ?? models[0];
  const found = suite.profiles[profile], measures = measuresOf(found);
  const axes = Object.keys(measures).filter((axis) => measuredSizes(found, model, measures[axis]).length);
  const axis = axes.includes(wish.axis) ? wish.axis : axes[0];
  const sizes = axis ? measuredSizes(found, model, measures[axis]) : [];
  const budgets = axis ? budgetsOf(suite, found, model, measures[axis]) : [];
  const wanted = Number(wish.size) || 0.2, offered = wanted < 1 || !budgets.length ? sizes : budgets;
  const size = offered.length ? nearest(offered, wanted < 1 || offered === budgets ? wanted : 0.2) : null;
  return { id, profile, model, axes, axis, sizes, budgets, size };
}

const readLink = (hash) => Object.fromEntries(new URLSearchParams(hash.replace(/^#/, "")));
const writeLink = ({ id, size, axis }) => "#" + new URLSearchParams({ model: id, size, axis });

// --- points ---------------------------------------------------------------------------------------------------------------

// Points of a choice, the best first, and the methods of the model that have none.
function pointsOf(suite, { profile, model, size, axis }) {
  const found = suite.profiles[profile], measure = measuresOf(found)[axis], shares = measuredSizes(found, model, measure);
  const fits = size < 1 ? null : fitting(found, model, measure, size);
  const at = (share) => pointsAt(suite, found, { model, axis, measure, size: share });
  const points = fits ? [0, ...shares].flatMap((share) => at(share).filter(({ method }) => fits[method] === share)) : at(size);
  if (fits) for (const point of points) point.standing = null; // that is about models of one size
  const sign = measure.best === "low" ? 1 : -1;
  points.sort((a, b) => sign * (a.value - b.value) || a.method.localeCompare(b.method));
  const known = new Set((fits ? shares : [size]).flatMap((share) => Object.keys(knownAt(found, model, measure, share))));
  const shown = new Set(points.map(({ method }) => method));
  return { points, missing: [...known].filter((method) => !shown.has(method)) };
}

function pointsAt(suite, found, { model, axis, measure, size }) {
  const values = measure.read(found, model, size), known = knownAt(found, model, measure, size);
  const standing = axis === "perplexity" ? about(found, "standing", model, size) : [];
  const said = rowsOf(found, "says").filter((row) => row.model === model && same(row.ratio, size));
  return Object.entries(values).map(([method, value]) => ({
    method,
    removes: suite.removes[method],
    ...value,
    removed: known[method]?.removed ?? null,
    bytes: known[method]?.bytes ?? null,
    standing: standing.find((row) => row.method === method)?.standing ?? null,
    says: said.find((row) => row.method === method)?.says ?? null,
  }));
}

function written(value, { unit }) {
  if (!is(value)) return "";
  if (unit === "%") return `${(100 * value).toFixed(1)} %`;
  if (!Number.isFinite(value)) return String(value);
  if (Math.abs(value) >= 1e5) return value.toExponential(0).replace("e+", "e");
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(Math.abs(value) < 1 ? 3 : 2);
}

const megabytes = (bytes) => `${Number((bytes / 1e6).toPrecision(3)).toLocaleString("en")} MB`;

// Whether a method removed another share than was asked for; then it is drawn hollow, and is no winner.
const elsewhere = (suite, point, size) => size < 1 && is(point.removed) && Math.abs(point.removed - size) >= suite.near;

// What the picture says, in a sentence.
function headline(suite, points, measure, { model, size }) {
  const first = points.find((point) => !elsewhere(suite, point, size)) ?? points[0];
  const level = points.filter((point) => point.standing === "level").map((point) => point.method);
  const value = `${written(first.value, measure)}${measure.unit === "%" ? "" : ` ${measure.unit}`}`;
  const also = level.length ? `; level with it: ${level.join(", ")}` : "";
  const asked = size < 1 ? `${Math.round(100 * size)} % of the decoder removed` : `${measure.file ? "file" : "weights"} of at most ${megabytes(size)}`;
  return `${model}, ${asked}: ${measure.best}est ${measure.name} with ${first.method}, ${value}${also}`;
}

// --- the picture ----------------------------------------------------------------------------------------------------------

const escaped = (text) => String(text ?? "").replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

// The ends of the axis. A measure that is cut ends at the highest value that it shows.
function domain(points, measure, dense, top) {
  const ends = points.flatMap(({ value, low, high }) => [value, low, high]).concat(dense).filter(Number.isFinite);
  const shown = measure.cut ? ends.filter((value) => value <= top) : ends;
  const low = Math.min(...shown), high = measure.cut && shown.length < ends.length ? top : Math.max(...shown);
  if (measure.log) return [low / 1.03, high > low ? high * 1.03 : low * 1.1];
  const pad = (high - low || 1) / 30;
  return [low - pad, high + pad];
}

// Round numbers within the ends, if possible two of them and not more than `most`.
function ticks([low, high], log, most) {
  const powers = [...Array(25).keys()].map((i) => i - 9);
  const decades = (digits) => powers.flatMap((power) => digits.map((digit) => digit * 10 ** power));
  const multiples = (step) => [...Array(Math.floor(high / step) - Math.ceil(low / step) + 1).keys()].map((i) => (Math.ceil(low / step) + i) * step);
  const steps = decades([1, 2, 5]).filter((step) => (high - low) / step < 100);
  const wide = log && high / low > 2; // a short part of a logarithmic axis is nearly linear
  const sets = wide ? [[1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(decades) : steps.map(multiples);
  const inside = sets.map((values) => values.map((value) => Number(value.toPrecision(12))).filter((value) => value >= low && value <= high));
  return inside.find((values) => values.length > 1 && values.length <= most) ?? inside.findLast((values) => values.length > 1) ?? inside[0];
}

const short = (value, { unit }) => (unit === "%" ? `${Number((100 * value).toPrecision(6))} %` : Number(value.toPrecision(6)).toLocaleString("en"));

// A line for each point: name, interval and dot, value. A hollow dot removed another share than was asked for.
function chart(suite, points, measure, { size, title, dense, width }) {
  const left = 158, right = 116, step = 26, radius = width < 500 ? 4 : 6, top = 26, bottom = top + step * points.length;
  const ends = domain(points, measure, dense, suite.top);
  const scale = measure.log ? (value) => Math.log(Math.max(value, 1e-12)) : (value) => value;
  const share = (value) => (scale(value) - scale(ends[0])) / (scale(ends[1]) - scale(ends[0]));
  const place = (value) => (left + (width - left - right) * Math.min(Math.max(share(value), 0), 1)).toFixed(1);
  const grid = ticks(ends, measure.log, Math.max(2, Math.floor((width - left - right) / 56)));
  const lines = grid.map((value) => `<line class="grid" x1="${place(value)}" x2="${place(value)}" y1="${top}" y2="${bottom}"/><text x="${place(value)}" y="${top - 8}" text-anchor="middle">${short(value, measure)}</text>`);
  if (is(dense)) lines.push(`<line class="dense" x1="${place(dense)}" x2="${place(dense)}" y1="${top}" y2="${bottom}"/><text x="${place(dense)}" y="${bottom + 16}" text-anchor="middle">dense</text>`);
  const marks = points.map((point, i) => {
    const y = top + step * (i + 0.5), colour = suite.colours[point.removes], gone = measure.cut && point.value > suite.top;
    const other = elsewhere(suite, point, size);
    const bar = is(point.low) && !gone ? `<line class="interval" stroke="${colour}" x1="${place(point.low)}" x2="${place(point.high)}" y1="${y}" y2="${y}"/>` : "";
    const x = Number(place(point.value)), fill = other ? "var(--page)" : colour;
    const dot = gone
      ? `<path fill="${colour}" d="M${x - 6} ${y - 6}L${x + 6} ${y}L${x - 6} ${y + 6}Z"/>`
      : `<circle cx="${x}" cy="${y}" r="${radius}" stroke="${colour}" stroke-width="2" style="fill: ${fill}"/>`;
    const weight = size < 1 || !is(point.bytes) ? null : `, ${megabytes(point.bytes)}`;
    const note = weight ?? (other ? ` at ${Math.round(100 * point.removed)} %` : { first: " first", level: " level" }[point.standing] ?? "");
    const range = is(point.low) ? ` [${written(point.low, measure)}, ${written(point.high, measure)}], ${point.interval}` : "";
    const words = `<title>${escaped(`${point.method}, ${point.removes}: ${written(point.value, measure)}${range}`)}</title>`;
    return `<g>${words}<rect x="0" y="${y - step / 2}" width="${width}" height="${step}" fill="transparent"/><text x="${left - 12}" y="${y + 4}" text-anchor="end">${escaped(point.method)}</text>${bar}${dot}<text x="${width - right + 12}" y="${y + 4}">${written(point.value, measure)}${note}</text></g>`;
  });
  return `<svg viewBox="0 0 ${width} ${bottom + 24}" width="${width}" height="${bottom + 24}" role="img" aria-label="${escaped(title)}">${lines.join("")}${marks.join("")}</svg>`;
}

function tableRow(point, measure) {
  const number = (value, shown) => `<td class="number" data-value="${value ?? ""}">${shown}</td>`;
  const removed = is(point.removed) ? (100 * point.removed).toFixed(1) : "";
  const numbers = [point.value, point.low, point.high].map((value) => number(value, written(value, measure)));
  const words = [point.standing, point.interval].map((text) => `<td>${escaped(text)}</td>`).join("");
  return `<tr><td>${escaped(point.method)}</td>${numbers.join("")}${number(point.removed, removed)}${number(point.bytes, is(point.bytes) ? megabytes(point.bytes) : "")}${words}<td>${escaped(point.removes)}</td><td class="says">${escaped(point.says)}</td></tr>`;
}

// ----------------------------------------------------------------------------------------------------------------------------

function options(select, entries, chosen) {
  select.innerHTML = entries.map(([value, words]) => `<option value="${escaped(value)}">${escaped(words)}</option>`).join("");
  select.value = String(chosen);
}

function show(wish) {
  const at = (id) => document.getElementById(id), chosen = choice(SUITE, wish);
  if (!chosen?.axis) return;
  const profile = SUITE.profiles[chosen.profile], measures = measuresOf(profile), measure = measures[chosen.axis];
  const { points, missing } = pointsOf(SUITE, chosen), title = headline(SUITE, points, measure, chosen);
  options(at("model"), modelsOf(SUITE).map(({ id, model, profile }) => [id, model === profile ? model : `${model} (${profile})`]), chosen.id);
  options(at("axis"), chosen.axes.map((axis) => [axis, `${measures[axis].name}, ${measures[axis].unit}`]), chosen.axis);
  const shares = chosen.sizes.map((size) => [size, `${Math.round(100 * size)} % of the decoder removed`]);
  options(at("size"), [...shares, ...chosen.budgets.map((most) => [most, `at most ${megabytes(most)}`])], chosen.size);
  at("says").textContent = title;
  const look = { size: chosen.size, title, dense: measure.dense?.(profile, chosen.model), width: Math.max(320, at("chart").clientWidth) };
  at("chart").innerHTML = chart(SUITE, points, measure, look);
  const shown = Object.entries(SUITE.colours).filter(([kind]) => points.some((point) => point.removes === kind));
  at("legend").innerHTML = shown.map(([kind, colour]) => `<li><span style="background: ${colour}"></span>${kind}</li>`).join("");
  at("note").textContent = measure.tables.map((table) => profile.tables[table]?.note ?? "").join(" ");
  at("missing").textContent = missing.length ? `${chosen.size < 1 ? "Not measured here" : "No model that is small enough was measured"}: ${missing.join(", ")}.` : "";
  at("rows").tBodies[0].innerHTML = points.map((point) => tableRow(point, measure)).join("");
  for (const heading of at("rows").tHead.rows[0].cells) heading.removeAttribute("aria-sort");
  at("rows").classList.toggle("silent", !points.some((point) => is(point.says)));
  at("link").href = writeLink(chosen);
  hints(); // of page.js
  return chosen;
}

if (typeof document !== "undefined") {
  let wish = readLink(location.hash);
  show(wish);
  document.getElementById("choices").addEventListener("change", (event) => {
    wish = { ...wish, ...Object.fromEntries(["model", "size", "axis"].map((id) => [id, document.getElementById(id).value])) };
    const chosen = show(wish);
    history.replaceState(null, "", writeLink(chosen));
  });
  addEventListener("hashchange", () => show((wish = readLink(location.hash))));
  addEventListener("resize", () => show(wish));
}
