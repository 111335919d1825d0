// The atlas: a first page, and a panel per subnetwork whose data is loaded when it is opened.
//
// Data files are scripts that call `atlasData(name, content)`: a page opened from disk may load scripts, not JSON.
// All that comes from data becomes text nodes; nothing is parsed as markup.
"use strict";

// -- data ---------------------------------------------------------------------------------------------------------------

const Data = (() => {
  const kept = new Map(), waiting = new Map(), MOST = 40; // panels in memory

  window.atlasData = (name, content) => {
    kept.set(name, content);
    for (const oldest of kept.keys()) {
      if (kept.size <= MOST) break;
      if (oldest !== "overview") kept.delete(oldest);
    }
    waiting.get(name)?.resolve(content);
    waiting.delete(name);
  };

  function load(name, file) {
    if (kept.has(name)) return Promise.resolve(kept.get(name));
    if (waiting.has(name)) return waiting.get(name).promise;
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    waiting.set(name, entry);
    const script = document.createElement("script");
    script.src = file;
    script.onload = () => {
      script.remove();
      if (waiting.delete(name)) entry.reject(new Error(`${file} is damaged: it brought no ${name}`));
    };
    script.onerror = () => {
      script.remove();
      waiting.delete(name);
      entry.reject(new Error(`${file} could not be read`));
    };
    document.head.append(script);
    return entry.promise;
  }
  return { load, overview: () => load("overview", "data/overview.js"),
    panel: (k) => load(`subnetwork/${k}`, `data/sub_${String(k).padStart(5, "0")}.js`) };
})();

(() => {
  const { el, known, number, percent, plusMinus } = Charts;
  const main = document.getElementById("main"), message = document.getElementById("message");
  let run = null; // the first page's data
  let names = []; // of tensors, without what all share
  let colours = []; // per tensor
  const view = { sort: "p_act", descending: true, text: "", tensor: "", alive: false, page: 0, order: [], attribution: true, tokens: "coefficient", kind: "top" };
  const ROWS = 50, PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b3a300"], OTHER = "#8a939c";

  function say(text) {
    message.textContent = text;
    clearTimeout(say.timer);
    say.timer = setTimeout(() => (message.textContent = ""), 6000);
  }
  let kept = null; // the first page as it was left: drawn again only where labels have changed
  const data = (text, attributes = {}) => el("span", { ...attributes, class: `data ${attributes.class || ""}` }, text);
  const missing = (text) => el("p", { class: "missing" }, text);
  const link = (k) => `#/subnetwork/${k}`;

  // -- what the browser keeps -------------------------------------------------------------------------------------------

  const Store = { // a browser may refuse to keep anything: the page then forgets, and says so once
    read(key) { try { return localStorage.getItem(key); } catch { return null; } },
    write(key, value) { try { localStorage.setItem(key, value); } catch { say("This browser keeps nothing for pages from disk: export the labels."); } },
  };

  const Labels = {
    all: {},
    key: () => `l3d-atlas-labels:${run.id}`,
    open() {
      try { this.take(JSON.parse(Store.read(this.key()) || "{}")); } catch { this.all = {}; }
    },
    take(labels) {
      for (const [k, text] of Object.entries(labels)) {
        if (/^\d+$/.test(k) && Number(k) < run.n && typeof text === "string") this.put(Number(k), text);
      }
    },
    get(k) { return this.all[k] || ""; },
    put(k, text) {
      text = text.trim().slice(0, 500);
      if (text) this.all[k] = text; else delete this.all[k];
    },
    save() { kept = null; Store.write(this.key(), JSON.stringify(this.all)); },
    exported() {
      const content = { format: "l3d-atlas-labels", version: 1, id: run.id, run: run.title, labels: this.all };
      const address = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2) + "\n"], { type: "application/json" }));
      el("a", { href: address, download: `${run.title.replace(/[^\w.-]+/g, "_")}-labels.json` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 10000);
      say(`${Object.keys(this.all).length} labels exported.`);
    },
    async loaded(file) {
      let content;
      try { content = JSON.parse(await file.text()); } catch { return say(`${file.name} is no JSON; nothing was loaded.`); }
      const labels = content?.labels;
      if (content?.format !== "l3d-atlas-labels" || typeof labels !== "object" || labels === null) return say(`${file.name} holds no labels of an atlas; nothing was loaded.`);
      if (content.id !== run.id) return say(`${file.name} labels another decomposition (${String(content.run).slice(0, 60)}); nothing was loaded.`);
      this.take(labels);
      this.save();
      say(`${Object.keys(labels).length} labels loaded from ${file.name}.`);
      show();
    },
  };

  const Theme = {
    names: ["auto", "light", "dark"],
    system: matchMedia("(prefers-color-scheme: dark)"),
    chosen: Store.read("l3d-atlas-theme") || "auto",
    apply(printing = false) {
      const dark = !printing && (this.chosen === "dark" || (this.chosen === "auto" && this.system.matches));
      document.documentElement.dataset.theme = dark ? "dark" : "light";
      document.getElementById("theme").textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[this.chosen];
    },
    turn() {
      this.chosen = this.names[(this.names.indexOf(this.chosen) + 1) % 3];
      Store.write("l3d-atlas-theme", this.chosen);
      this.apply();
      show();
    },
  };

  // -- the first page ---------------------------------------------------------------------------------------------------

  const COLUMNS = [
    { key: "k", name: "subnetwork", value: (k) => k, cell: (k) => el("td", { class: "number" }, el("a", { href: link(k) }, k)) },
    { key: "label", name: "label", value: (k) => Labels.get(k).toLowerCase(), cell: (k) => el("td", { class: "label data", title: Labels.get(k) }, Labels.get(k)) },
    { key: "circuit", name: "circuit", column: "circuit", value: (k) => of("circuit", k), natural: true, cell: (k) => el("td", { class: "data" }, of("circuit", k)) },
    { key: "p_act", name: "P_act", title: "share of the pairs of sample and reference in whose reconstruction it takes part", value: (k) => of("p_act", k), cell: (k) => el("td", { class: "number" }, of("dead", k) ? "dead" : percent(of("p_act", k))) },
    { key: "impact", name: "impact", column: "impact_mean", title: "mean over samples and references of |V_in · ∇D|, ± its standard error", value: (k) => of("impact_mean", k),
      cell: (k) => el("td", { class: "number" }, plusMinus(of("impact_mean", k), of("impact_se", k))) },
    { key: "positive", name: "c > 0", column: "positive_share", title: "share of the active coefficients that are positive", value: (k) => of("positive_share", k), cell: (k) => el("td", { class: "number" }, percent(of("positive_share", k))) },
    { key: "coefficients", name: "coefficients", column: "histograms", unsorted: true, title: "distribution over the pairs of sample and reference, negative left of the middle; heights are logarithmic", cell: (k) => el("td", {}, spark(k)) },
    { key: "tensor", name: "norm by tensor", title: "share of the squared norm in each tensor; sorted by the largest one's name, then its share", value: (k) => { const largest = of("shares", k)[0]; return largest ? [names[largest[0]], -largest[1]] : null; }, cell: (k) => el("td", {}, normBar(k)) },
    { key: "nearest", name: "nearest", column: "nearest", title: "the most similar other subnetwork and its |cos|; sorted by |cos|", value: (k) => of("nearest_cos", k),
      cell: (k) => el("td", {}, known(of("nearest", k)) && of("nearest", k) >= 0 ? [el("a", { href: link(of("nearest", k)) }, of("nearest", k)), ` (${number(of("nearest_cos", k))})`] : "–") },
  ];
  const of = (column, k) => run.subnetworks[column]?.[k] ?? null;
  const columns = () => COLUMNS.filter((c) => !c.column || run.subnetworks[c.column]);

  const spark = (k) => {
    const h = of("histograms", k);
    return h ? Charts.sparkline(h[2], `Coefficients of subnetwork ${k} from ${number(h[0])} to ${number(h[1])}`) : "–";
  };
  function normBar(k) {
    const shares = of("shares", k) || [];
    const words = shares.map(([i, share]) => `${names[i]} ${percent(share)}`).join(", ");
    return el("div", {}, el("div", { class: "bars", role: "img", "aria-label": words, title: words },
      shares.map(([i, share]) => el("i", { style: { width: `${100 * share}%`, background: colours[i] } }))),
      shares.length ? data(`${names[shares[0][0]]} ${percent(shares[0][1])}`, { class: "note" }) : null);
  }

  function chosen() {
    const text = view.text.trim().toLowerCase();
    const found = [];
    for (let k = 0; k < run.n; k++) {
      if (view.alive && of("dead", k)) continue;
      const main = of("shares", k)[0];
      if (view.tensor !== "" && (!main || main[0] !== Number(view.tensor))) continue;
      if (text && String(k) !== text && ![Labels.get(k), of("circuit", k), main && names[main[0]]].some((t) => t && t.toLowerCase().includes(text))) continue;
      found.push(k);
    }
    const column = COLUMNS.find((c) => c.key === view.sort), sign = view.descending ? -1 : 1;
    const value = new Map(found.map((k) => [k, column.value(k)]));
    const natural = new Intl.Collator("en", { numeric: true });
    return found.sort((a, b) => {
      const x = value.get(a), y = value.get(b);
      const empty = (v) => v === null || v === "" || Number.isNaN(v);
      if (empty(x) || empty(y)) return empty(x) - empty(y) || a - b; // what is not known comes last either way
      const apart = Array.isArray(x) ? natural.compare(x[0], y[0]) || x[1] - y[1] : typeof x === "string" ? natural.compare(x, y) : x - y;
      return sign * apart || a - b;
    });
  }

  function table() {
    view.order = chosen();
    const pages = Math.max(1, Math.ceil(view.order.length / ROWS));
    view.page = Math.min(view.page, pages - 1);
    const part = view.order.slice(view.page * ROWS, (view.page + 1) * ROWS);
    const turn = (to) => { view.page = to; refresh(); };
    const head = columns().map((c) => el("th", { scope: "col", "data-column": c.key, class: ["k", "p_act", "impact", "positive"].includes(c.key) ? "number" : null, title: c.title,
      "aria-sort": view.sort === c.key ? (view.descending ? "descending" : "ascending") : null },
      c.unsorted ? c.name : el("button", { onclick: () => {
        if (view.sort === c.key) view.descending = !view.descending;
        else Object.assign(view, { sort: c.key, descending: ["p_act", "impact", "positive", "nearest"].includes(c.key) });
        view.page = 0;
        refresh();
      } }, c.name)));
    return el("div", { id: "table" },
      el("p", { class: "note", id: "count" }, view.order.length === run.n ? `${run.n} subnetworks` : `${view.order.length} of ${run.n} subnetworks`),
      el("div", { class: "scroll" }, el("table", { class: "wide" }, el("thead", {}, el("tr", {}, head)),
        el("tbody", {}, part.map((k) => el("tr", { "data-k": k, class: of("dead", k) ? "dead" : null }, columns().map((c) => c.cell(k))))))),
      pages > 1 ? el("div", { class: "row controls" }, el("button", { disabled: view.page === 0, onclick: () => turn(view.page - 1) }, "← rows"),
        `rows ${view.page * ROWS + 1} to ${Math.min((view.page + 1) * ROWS, view.order.length)} of ${view.order.length}`,
        el("button", { disabled: view.page === pages - 1, onclick: () => turn(view.page + 1) }, "rows →")) : null);
  }

  let points = []; // of the map, one per entry of run.map

  function map() {
    const m = run.map, inside = new Set(view.order);
    if (!m || !m.subnetwork.length) return null;
    const most = Math.max(...m.subnetwork.map((k) => of("p_act", k) || 0), 1e-9);
    const drawn = Charts.scatter({
      points: m.subnetwork.map((k, i) => ({ x: m.x[i], y: m.y[i], radius: 3 + 7 * Math.sqrt((of("p_act", k) || 0) / most), href: link(k), mark: k, faint: !inside.has(k),
        colour: of("dead", k) ? "#8a939c" : colours[of("shares", k)[0]?.[0] ?? 0],
        title: `subnetwork ${k}${Labels.get(k) ? `: ${Labels.get(k)}` : ""}, P_act ${percent(of("p_act", k))}` })),
      xLabel: "first coordinate (no unit)", yLabel: "second coordinate (no unit)",
      alt: `Map of ${m.subnetwork.length} subnetworks by |cos| between them` });
    points = [...drawn.querySelectorAll(".point")];
    return drawn;
  }

  function refresh() {
    document.getElementById("table")?.replaceWith(table());
    const inside = new Set(view.order);
    run.map?.subnetwork.forEach((k, i) => points[i]?.classList.toggle("faint", !inside.has(k)));
  }

  function filters() {
    const shown = new Set(run.subnetworks.shares.map((s) => s[0]?.[0]).filter((i) => i !== undefined));
    const change = (key, value) => { view[key] = value; view.page = 0; refresh(); };
    return el("div", { class: "row controls" },
      el("label", {}, "Filter ", el("input", { type: "search", id: "filter", placeholder: "number, label, tensor", value: view.text, oninput: (e) => change("text", e.target.value) })),
      el("label", {}, "mostly in ", (() => {
        const select = el("select", { id: "tensor", onchange: (e) => change("tensor", e.target.value) }, el("option", { value: "" }, "any tensor"),
          [...shown].sort((a, b) => a - b).map((i) => el("option", { value: i }, names[i])));
        select.value = view.tensor;
        return select;
      })()),
      el("label", {}, (() => { const box = el("input", { type: "checkbox", id: "alive", onchange: (e) => change("alive", e.target.checked) }); box.checked = view.alive; return box; })(), " hide dead"),
      el("span", { class: "gap" }),
      el("button", { id: "export", onclick: () => Labels.exported() }, "Export labels"),
      el("button", { id: "import", onclick: () => document.getElementById("labels").click() }, "Load labels"),
      el("input", { type: "file", id: "labels", accept: ".json,application/json", hidden: true, onchange: (e) => { if (e.target.files[0]) Labels.loaded(e.target.files[0]); e.target.value = ""; } }));
  }

  const scoreTable = (rows) => el("div", { class: "scroll" }, el("table", {}, el("tbody", {}, rows.map(([figure, value, meaning]) =>
    el("tr", {}, el("th", { scope: "row", class: "data" }, figure), el("td", { class: "number" }, value), el("td", { class: "soft" }, meaning))))));

  function tensorTable() {
    const rows = el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {},
      ["tensor", "shape", "rank per axis"].map((t) => el("th", { scope: "col" }, t)), el("th", { scope: "col", class: "number", title: "reconstruction loss of that tensor alone, as logged last" }, `loss L${run.losses_of ? ` (${run.losses_of})` : ""}`), el("th", { scope: "col", class: "number", title: "of the subnetworks' squared norm, on average" }, "share of norm"), el("th", {}))),
      el("tbody", {}, run.tensors.map((t, i) => el("tr", {}, el("td", { class: "data" }, t.name), el("td", { class: "whole" }, t.shape.join(" × ")), el("td", { class: "whole" }, t.ranks.join(" × ")), el("td", { class: "number" }, number(t.loss)),
        el("td", { class: "number" }, percent(t.share)), el("td", {}, el("div", { class: "bars", "aria-hidden": "true" }, el("i", { style: { width: `${100 * t.share}%`, background: colours[i] } }))))))));
    return [el("h3", {}, "By tensor"), run.tensors.length > 12 ? el("details", {}, el("summary", {}, `${run.tensors.length} tensors`), rows) : rows];
  }

  function activity() {
    const values = run.subnetworks.p_act.filter((v, k) => known(v) && !of("dead", k)).sort((a, b) => b - a);
    return values.length > 1 ? Charts.lines({ title: "P_act by rank", series: [{ name: "", style: "s1", x: values.map((_, i) => i + 1), y: values, points: values.length <= 120 }], fromZero: true, logY: "auto", xLabel: `rank of the subnetwork (${run.n - values.length} of ${run.n} dead)`, yLabel: "P_act (share of pairs)",
      alt: `P_act of ${values.length} live subnetworks by rank, from ${percent(values[0])} to ${percent(values.at(-1))}` }) : null;
  }

  function trainingCurves() {
    const c = run.curves, step = "optimizer step";
    if (c.missing) return el("div", { class: "columns" }, missing(c.missing), activity());
    const line = (name, style, pair, points) => pair && { name, style, x: pair[0], y: pair[1], points };
    const group = (entries, quietFrom) => Object.entries(entries || {}).map(([name, pair], i) => line(name, i < quietFrom ? `s${i + 1}` : "quiet", pair, pair[0].length < 8)).filter(Boolean);
    const largest = run.tensors.filter((t) => c.tensors[t.name]).sort((a, b) => b.share - a.share).map((t) => t.name);
    const tensors = Object.fromEntries(largest.map((name) => [shortName(name), c.tensors[name]]));
    const others = (series, name) => series.map((s, i) => ({ ...s, name: i < 4 ? s.name : i === 4 ? name : "" })); // all of one grey
    return el("div", { class: "columns" },
      Charts.lines({ title: "Reconstruction loss", series: [line("train", "s1", c.loss["train/loss"]), line("held out", "s2", c.loss["val/loss"], true)].filter(Boolean), fromZero: true,
        xLabel: step, yLabel: "loss L (share of |∇D|²)", alt: "Reconstruction loss against the training step" }),
      Object.keys(tensors).length > 1 ? Charts.lines({ title: "Loss by tensor", series: others(group(tensors, 4), `${largest.length - 4} other${largest.length > 5 ? "s" : ""}`), fromZero: true, xLabel: step, yLabel: "loss of one tensor", alt: "Loss per tensor against the training step" }) : null,
      activity(),
      Object.values(c.p_act).some((pair) => pair[0].length > 1) ? Charts.lines({ title: "P_act in training", series: others(group(c.p_act, 4).map((s) => ({ ...s, name: `subnetwork ${s.name}` })), "others"), fromZero: true, xLabel: step, yLabel: "P_act (share of pairs)",
        alt: `P_act of ${Object.keys(c.p_act).length} of ${c.n_p_act} subnetworks against the training step` }) : null,
      c.dead ? Charts.lines({ title: "Dead subnetworks", series: [line("", "s1", c.dead)], fromZero: true, xLabel: step, yLabel: "dead (share of subnetworks)", alt: "Share of dead subnetworks against the training step" }) : null);
  }

  function overviewPage() {
    view.order = chosen();
    const s = run.size;
    return [
      el("h1", {}, data(run.title)),
      el("p", { class: "soft" }, "Subnetworks found by local loss landscape decomposition (L3D): directions in the parameters of a frozen model, a sparse few of which reconstruct the gradient of each sample."),
      el("dl", { class: "facts" }, run.facts.map(([key, value, more]) => el("div", {}, el("dt", {}, key), el("dd", { class: "data" }, value, more ? el("details", { class: "note" }, el("summary", {}, "all settings"), more) : null)))),
      run.analysed ? null : missing("This run has not been analysed: samples, outputs and interventions are missing. `l3d atlas RUN` adds them."),
      el("h2", {}, "Score card"),
      run.score.truth.length ? el("div", { class: "columns" }, el("div", {}, el("h3", {}, "The run"), scoreTable(run.score.rows)),
        el("div", {}, el("h3", {}, "Against the ground truth"), scoreTable(run.score.truth)))
        : [scoreTable(run.score.rows), el("p", { class: "soft data" }, run.score.note)],
      tensorTable(),
      el("h2", {}, "Subnetworks"), filters(), table(),
      el("div", { class: "tags note" }, colours.map((c, i) => c !== OTHER && el("span", {}, el("span", { class: "swatch", style: { background: c } }), data(names[i]))),
        colours.includes(OTHER) ? el("span", {}, el("span", { class: "swatch", style: { background: OTHER } }), `${colours.filter((c) => c === OTHER).length} other tensors`) : null),
      run.pictures.length ? [el("h2", {}, "Pictures"), el("div", { class: "pictures columns" }, run.pictures.map((p) => p.words ? missing(p.words) :
        el("figure", {}, el("img", { src: p.file, alt: p.alt }), el("figcaption", {}, p.caption))))] : null,
      run.figures.length ? [el("h2", {}, "Figures"), el("div", { class: "pictures columns figures" }, run.figures.map((p) => el("figure", {}, el("img", { src: p.file, alt: p.alt }), el("figcaption", {}, p.caption))))] : null,
      run.map ? [el("h2", {}, "Map"), el("p", { class: "note" }, "Near each other: similar directions (|cos|). Larger: higher P_act. Colour: the tensor that holds most of the norm; grey: dead. A point opens its subnetwork."),
        el("figure", { id: "map" }, map())] : null,
      el("h2", {}, "Training and activity"), trainingCurves(),
      el("p", { class: "note", id: "size" }, `This atlas: ${s.files} files, ${number(s.bytes / 1e6)} MB; nothing is loaded from a network. Keys: ← → step through the table's order, Esc comes back here, / filters.`),
    ];
  }

  // -- a subnetwork's panel ----------------------------------------------------------------------------------------------

  const visible = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const unit = () => (run.output_kind === "probability" ? "probability" : "output");

  function tokens(item, sample, colouring) {
    const value = new Map();
    if (colouring === "attribution" && sample.attribution) sample.attribution.values.forEach((v, i) => value.set(item.first + i, v));
    else if (colouring === "coefficient" && item.coefficients) item.coefficients[0].forEach((p, i) => value.set(p, item.coefficients[1][i]));
    const reach = Math.max(...[...value.values()].map((v) => Math.abs(v) || 0), 1e-12);
    return el("div", { class: "tokens" }, item.tokens.map((token, i) => {
      const p = item.first + i, v = value.get(p), here = p === sample.position;
      return el("span", { class: `token ${v < 0 ? "negative" : "positive"}${here ? " here" : ""}`, style: { "--a": known(v) ? (0.62 * Math.abs(v)) / reach : 0 },
        title: `position ${p}${known(v) ? `, ${colouring} ${number(v)}` : ""}${here ? ", the sample's own" : ""}` }, visible(token));
    }));
  }

  function picture(item, sample) {
    const a = sample?.attribution;
    return el("div", { class: "picture" }, item.picture ? el("img", { src: item.picture, alt: `picture, label ${item.label ?? "unknown"}` }) : "no picture",
      a && a.values.length === a.height * a.width ? Charts.overlay(a.values, a.height, a.width, "Where in the picture the coefficient comes from") : null);
  }

  function itemView(item, sample, colouring) {
    if (!item) return missing(`sample ${sample.sample} is not in the table of items`);
    if (item.kind === "text") return tokens(item, sample, colouring);
    if (item.kind === "image") return picture(item, sample);
    return vector(item, sample?.attribution);
  }

  function vector(item, attribution, height) {
    const cells = item.values.length < item.of ? `, ${item.values.length} cells of ${item.of}, each the largest of its values` : "";
    return [Charts.vector(item.values, `Input vector of ${item.of} values${cells}`, height),
      attribution ? el("div", { class: "overlay" }, Charts.vector(attribution.values, "How much of the coefficient each value of the vector carries", 30), el("div", { class: "note" }, "↑ attribution")) : null];
  }

  const moves = (s) => el("div", { class: "moves" }, [["raised", "▲", "up", "raises"], ["lowered", "▼", "down", "lowers"]].map(([way, sign, style, word]) =>
    s[way].length ? el("div", {}, el("span", { class: style, title: word }, sign), s[way].slice(0, 5).map(([name, derivative, p]) =>
      el("span", { class: "chip", title: `${word} ${name}: d ${unit()} / dδ = ${number(derivative)}; ${unit()} ${number(p)} at δ = 0` }, visible(name), run.output_kind === "probability" ? null : el("span", { class: "soft" }, `: ${derivative > 0 ? "+" : ""}${number(derivative)}`)))) : null));

  const INACTIVE = "Not active: |c| is below the threshold against more than half of the sample's references; the impact, a mean over all of them, may still be high.";
  const about = (s, item) => [item?.label ? ["label ", data(item.label), " · "] : null, `sample ${s.sample}${s.position >= 0 ? `, position ${s.position}` : ""} · impact ${plusMinus(s.impact, s.impact_se)} · c\u00a0${number(s.coefficient)}`, s.active ? null : [" · ", el("span", { class: "inactive", title: INACTIVE }, "not active")]];

  function samplesSection(panel) {
    const box = el("div", { id: "samples" });
    const kinds = ["top", "middle", "random"].filter((kind) => panel.samples[kind]?.length);
    if (!kinds.length) return missing("No samples: this subnetwork is dead, or the run has not been analysed.");
    let all = false;
    function draw() {
      const kind = kinds.includes(view.kind) ? view.kind : kinds[0], rows = panel.samples[kind], shown = all ? rows : rows.slice(0, 12);
      const items = (s) => panel.items[s.sample];
      const image = items(rows[0])?.kind === "image", text = items(rows[0])?.kind === "text";
      const attributed = rows.filter((s) => s.attribution).length, moved = rows.filter((s) => s.raised.length || s.lowered.length).length, part = `(of ${attributed} of ${rows.length})`;
      const press = (name, value, key) => el("button", { "aria-pressed": String(view[key] === value || (key === "kind" && kind === value)), "data-choice": value, onclick: () => { view[key] = value; draw(); } }, name);
      box.replaceChildren(
        el("div", { class: "row controls" }, kinds.map((k) => press({ top: "highest impact", middle: "middle of the active ones", random: "random" }[k], k, "kind")), el("span", { class: "gap" }),
          text && attributed ? el("span", { class: "row" }, "colour: ", press("coefficient", "coefficient", "tokens"), press(`attribution ${part}`, "attribution", "tokens")) : null,
          !text && attributed ? el("label", {}, (() => { const tick = el("input", { type: "checkbox", id: "attribution", onchange: (e) => { view.attribution = e.target.checked; draw(); } }); tick.checked = view.attribution; return tick; })(), ` attribution ${part}`) : null),
        el("p", { class: "note" }, { top: "Samples by impact, the highest first", middle: "Samples around the median impact of the active ones", random: "Samples drawn at random" }[kind],
          text ? `; colour, scaled to each text: ${view.tokens === "attribution" && attributed ? "what each earlier token adds to |c| of the marked one (orange) or takes from it (blue)" : "each position's own coefficient, orange for positive, blue for negative"}; the box marks the position that the impact belongs to` : !attributed ? "" : image ? "; orange parts of a picture add to |c|, blue ones take from it" : "; below a vector, attribution: orange values add to |c|, blue ones take from it", text && run.output_kind === "probability" ? ". ▲▼ the next tokens after the box whose probability v raises and lowers most." : run.output_kind === "probability" ? ". ▲▼ the outputs whose probability v raises and lowers most." : ". ▲▼ outputs that v raises and lowers most, with d output / dδ.",
          moved && moved < rows.length ? ` Told for ${moved} of ${rows.length}.` : "",
          shown.some((s) => !s.active) ? ` ${INACTIVE}` : ""),
        !text ? el("div", { class: `cards${view.attribution ? "" : " hide-attribution"}` }, shown.map((s) => el("div", { class: "card", "data-sample": s.sample }, itemView(items(s), s), el("div", { class: "soft" }, about(s, items(s))), moves(s))))
          : el("div", {}, shown.map((s) => el("div", { class: "sample", "data-sample": s.sample }, el("div", { class: "about" }, about(s, items(s))), itemView(items(s), s, view.tokens), moves(s)))),
        rows.length > shown.length ? el("div", { class: "row controls" }, el("button", { id: "more", onclick: () => { all = true; draw(); } }, `Show all ${rows.length}`)) : "");
    }
    draw();
    return box;
  }

  function effectsSection(panel) {
    const { deltas, cases } = panel.effects || { deltas: [], cases: [] };
    if (!deltas.length) return null;
    const zero = deltas.reduce((best, d, i) => (Math.abs(d) < Math.abs(deltas[best]) ? i : best), 0);
    const at = el("output", { id: "delta-value" }), bars = [];
    const strong = new Set((panel.samples.top || []).map((s) => `${s.sample} ${s.position}`));
    const grid = el("div", { class: "effects" }, cases.map((c) => {
      const item = panel.items[c.sample], [low, high] = run.output_kind === "probability" ? [0, Math.max(...c.outputs.flatMap((o) => o[1].filter(known)), 0.02)] : Charts.extent(c.outputs.flatMap((o) => o[1]).concat(0));
      const place = (v) => (100 * (v - low)) / (high - low || 1);
      return el("div", { class: "effect", "data-sample": c.sample },
        el("div", { class: "about note" }, `sample ${c.sample}${c.position >= 0 ? `, position ${c.position}` : ""}, ${strong.has(`${c.sample} ${c.position}`) ? "of high impact" : "inactive, for comparison"}`, item?.label ? [" · label ", data(item.label)] : null),
        el("div", { class: "context" }, !item ? null : item.kind === "text" ? tokens({ ...item, tokens: item.tokens.slice(Math.max(0, c.position - item.first - 7), c.position >= 0 ? c.position - item.first + 1 : 12), first: item.first + Math.max(0, c.position - item.first - 7) }, c, "none")
          : item.kind === "image" ? picture(item) : vector(item, null, 34)),
        c.outputs.map(([name, values]) => {
          const bar = el("i", { class: "value" }), text = el("span", { class: "number" }), base = values[zero];
          bars.push((i) => {
            const v = values[i], from = place(Math.min(0, v)), to = place(Math.max(0, v));
            bar.style.left = `${known(v) ? from : 0}%`;
            bar.style.width = `${known(v) ? Math.max(to - from, 0.4) : 0}%`;
            bar.className = v < 0 ? "value negative" : "value";
            text.textContent = run.output_kind === "probability" && known(v) ? (v < 0.0005 ? "< 0.001" : v.toFixed(3)) : number(v);
          });
          return el("div", { class: "meter" }, data(visible(name), { title: name }), el("div", { class: "track" }, bar,
            known(base) && deltas[zero] === 0 ? el("i", { class: "base", style: { left: `calc(${place(base)}% - 1px)` }, title: `${number(base)} at δ = 0` }) : null), text);
        }));
    }));
    const slider = el("input", { type: "range", id: "delta", min: 0, max: deltas.length - 1, step: 1, value: zero, "aria-label": "δ, length of the step along v", oninput: () => move(Number(slider.value)) });
    const move = (i) => {
      at.textContent = `δ = ${number(deltas[i])}`;
      slider.setAttribute("aria-valuetext", at.textContent);
      for (const set of bars) set(i);
    };
    move(zero);
    return [el("h2", {}, "Push it"), el("p", { class: "note" }, `Outputs f(x, W0 + δ v) of chosen samples as δ moves; the line is their value at δ = 0. Computed beforehand for ${deltas.length} values of δ.`),
      el("div", { class: "slider" }, el("button", { class: "controls", onclick: () => { slider.value = zero; move(zero); } }, "reset"), slider, at), grid];
  }

  function curvesSection(panel) {
    const style = { subnetwork: "s1", random: "s4", gradient: "s2" };
    const called = { subnetwork: "v", random: "random", gradient: "gradient" };
    const { n_top, n_background, n_controls } = run.counts, top = panel.samples.top?.length;
    const entries = Object.entries(panel.curves || {}).sort(([a], [b]) => Object.keys(style).indexOf(a) - Object.keys(style).indexOf(b));
    if (!entries.length) return null;
    const of = (column) => entries.map(([control, c]) => ({ name: called[control] || control, style: style[control] || "s3", x: c.delta, y: c[column], spread: c[`${column}_std`], points: true }));
    const xLabel = "δ (length of the step along the direction)";
    const most = Math.max(...entries.flatMap(([, c]) => [...c.relevant.map((v, i) => v + (c.relevant_std[i] || 0)), ...c.irrelevant]).filter(known), 0);
    const change = (of_) => Charts.lines({ title: `Change of outputs, ${of_} samples`, series: of(of_), xLabel, yLabel: "summed |change of outputs|", fromZero: true, upTo: most, alt: `Change of outputs of ${of_} samples along subnetwork ${panel.k} against delta, with controls` });
    const local = panel.locality || {};
    const kl = run.divergence === "kl" ? "KL (nats), inactive" : "D, inactive samples";
    return [el("h2", {}, "Interventions"),
      el("p", { class: "note" }, `Relevant samples: ${known(n_top) ? `the ${top}` : "those"} of highest impact; irrelevant: ${known(n_background) ? `${panel.irrelevant} of ${n_background} random ones, in which it is inactive` : "random ones in which it is inactive"}. Selectivity: mean summed |change of outputs| of the relevant over the irrelevant ones; over outputs: in the relevant samples, mean |change| of the outputs that v moves most at first over that of all others. Controls, as long: ${known(n_controls) ? `${n_controls} random directions of the same ranks (mean; the band is ± their standard deviation)` : "random directions of the same ranks"}, and the mean gradient.`),
      el("div", { class: "columns" },
        Charts.lines({ title: "Selectivity", series: of("selectivity"), xLabel, yLabel: "selectivity (ratio, log)", logY: true, reference: 1, alt: `Selectivity of subnetwork ${panel.k} against delta, with controls` }),
        change("relevant"), change("irrelevant"),
        Charts.lines({ title: "Selectivity over outputs", series: of("outputs_selectivity"), xLabel, yLabel: "selectivity (ratio, log)", logY: true, alt: `Selectivity of subnetwork ${panel.k} over outputs: in the relevant samples, the mean |change| of the outputs of highest |derivative| along v over that of all others` }),
        Charts.lines({ title: "Side effects on inactive samples", series: of("kl_inactive"), xLabel, yLabel: kl, fromZero: true, logY: "auto", alt: `Side effects: divergence from the unchanged model on samples where subnetwork ${panel.k} is inactive` }),
        Charts.lines({ title: "Change of the task's loss", series: of("loss_change"), xLabel, yLabel: "change of the task's loss", reference: 0, alt: `Change of the task's loss against delta` }),
        local.delta ? Charts.lines({ title: "How far the linear picture holds", series: [{ name: "change of D", style: "s1", x: local.delta, y: local.change, points: true }, { name: "linear prediction", style: "s2", x: local.delta, y: local.linear, points: true }], xLabel, yLabel: "change of D, mean", alt: `Change of the divergence along subnetwork ${panel.k} and its linear prediction: how far the local picture holds` }) : null)];
  }

  function heat(cells, words, aspect) {
    const values = Charts.bytes(cells.cells), { rows, columns } = cells;
    const cell = Math.min(24, Math.max(1.5, Math.min(430 / columns, 260 / rows)));
    const pooled = (n, of) => (n < of ? `, ${n} cells of ${of}` : "");
    const alt = `${words}, ${rows} by ${columns}, largest |value| ${number(cells.largest)}`;
    return el("figure", {}, Charts.heatMap({ values, rows, columns, alt, width: columns * cell, height: rows * (aspect || (rows === 1 ? 14 : cell)) }),
      el("figcaption", {}, `${words}${pooled(columns, cells.of_columns)}${pooled(rows, cells.of_rows)}; full colour: ±${number(cells.largest)}`));
  }

  function structureSection(panel) {
    const parts = panel.tensors.map((t) => el("div", {}, el("h3", { title: run.tensors[t.tensor].name }, data(names[t.tensor]), " ", el("span", { class: "soft" }, `${t.shape.join(" × ")}, rank ${t.ranks.join(" × ")}, ${percent(panel.shares.find((s) => s[0] === t.tensor)?.[1])} of the squared norm`)),
      t.whole ? heat(t.whole, t.shape.length === 1 ? "the vector" : t.shape.length === 2 ? "the matrix, axis 0 downwards" : "the tensor, axis 0 downwards, the others in a row") : null,
      (t.modes || []).map((m, axis) => heat(m, `axis ${axis} (${t.shape[axis]} units): ${m.rows === 1 ? "its direction" : `${m.rows} of ${m.of} directions, strongest first; singular values ${m.values.slice(0, 4).map(number).join(", ")}${m.values.length > 4 ? " …" : ""}`}`, 14)),
      t.whole || t.modes ? null : missing("values that are not finite")));
    const more = run.tensors.length - panel.tensors.length;
    return [el("h2", {}, "Structure"),
      panel.network ? el("div", { class: "nets" }, Charts.network(run.network, "The target model as a network of units and weighted edges", "target model"),
        Charts.network(panel.network, `Subnetwork ${panel.k} as a network of units and weighted edges`, `subnetwork ${panel.k}, with the sign that agrees with the target`)) : null,
      el("p", { class: "note" }, "Orange: positive, blue: negative", panel.network ? "; an edge is as wide as |weight| over the picture's largest, a unit is filled by its bias" : "", ". Factor matrices in their own basis: singular vectors of each axis, since Tucker factors are free up to a change of basis.", more > 0 ? ` The ${panel.tensors.length} tensors with the largest share; ${more} more hold the rest.` : ""),
      el("div", { class: "columns" }, parts)];
  }

  function neighboursSection(panel) {
    if (!panel.neighbours?.length) return null;
    const most = (place, n) => panel.neighbours.filter((row) => row[place]).sort((a, b) => Math.abs(b[place]) - Math.abs(a[place])).slice(0, n);
    const table = (title, rows) => rows.length ? el("div", {}, el("h3", {}, title), el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["subnetwork", "label", "cos", "co-activation"].map((t, i) => el("th", { scope: "col", class: i > 1 ? "number" : null, title: i === 3 ? "samples where both are active over samples where either is" : null }, t)))),
      el("tbody", {}, rows.map(([other, cos, both]) => el("tr", {}, el("td", {}, el("a", { href: link(other) }, `subnetwork ${other}`)), el("td", { class: "label data" }, Labels.get(other) || of("circuit", other) || ""), el("td", { class: "number" }, number(cos)), el("td", { class: "number" }, percent(both)))))))) : null;
    return [el("h2", {}, "Neighbours"), el("div", { class: "columns" }, table("Most similar directions", most(1, 8)), table("Most often active together", most(2, 4)))];
  }

  function summarySection({ summary, samples }) {
    const n = samples.top?.length;
    const outputs = (way, style, sign, word) => summary[way].length ? el("div", {}, el("dt", {}, `A step along +v ${word} most (mean d ${unit()} / dδ; in how many of the ${n} top samples)`),
      el("dd", { class: "row moves" }, el("span", { class: style, "aria-hidden": "true" }, sign), summary[way].map(([name, mean, same]) => el("span", { class: "chip", title: `d ${unit()} / dδ of ${name} = ${number(mean)}, mean over the top samples; of this sign in ${same} of ${n}` },
        visible(name), el("span", { class: "soft" }, `\u2002${mean > 0 ? "+" : ""}${number(mean)}\u2002${same}/${n}`))))) : null;
    return el("dl", { class: "facts", id: "summary" }, outputs("raised", "up", "▲", "raises"), outputs("lowered", "down", "▼", "lowers"));
  }

  function panelPage(panel) {
    const k = panel.k, h = of("histograms", k);
    const input = el("input", { id: "label", type: "text", maxlength: 500, placeholder: "what does it do? (kept in this browser)", size: 42, value: Labels.get(k),
      oninput: (e) => { Labels.put(k, e.target.value); Labels.save(); } });
    const circuit = of("circuit", k);
    const facts = [["P_act", of("dead", k) ? "dead" : `${percent(of("p_act", k))} of sample-reference pairs`],
      ["Impact", known(of("impact_mean", k)) ? plusMinus(of("impact_mean", k), of("impact_se", k)) : null],
      ["Active samples", known(of("active_samples", k)) ? `${number(of("active_samples", k))} of ${number(run.counts.n_samples)} samples: active against at least half of the references` : null],
      ["Positive coefficients", known(of("positive_share", k)) ? percent(of("positive_share", k)) : null],
      ["Local picture", known(of("local_to", k)) ? `D within 10 % of its linear prediction up to |δ| = ${number(of("local_to", k))}` : null],
    ].filter(([, v]) => v !== null);
    return [
      el("div", { class: "row" }, el("h1", {}, `Subnetwork ${k}`), circuit ? data(circuit, { class: "soft" }) : null, el("span", { class: "gap" }), el("label", {}, "Label ", input)),
      el("dl", { class: "facts" }, facts.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", { class: "data" }, value)))),
      summarySection(panel),
      el("h2", {}, "Samples"), samplesSection(panel),
      effectsSection(panel), curvesSection(panel),
      el("h2", {}, "Coefficients and norm"),
      el("div", { class: "columns" },
        h ? el("figure", {}, Charts.histogram({ low: h[0], high: h[1], counts: h[2], xLabel: "coefficient c = V_in · ∇D (divergence per unit step)", alt: `Histogram of the coefficients of subnetwork ${k}` })) : null,
        el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "tensor"), el("th", { scope: "col", class: "number", title: "of its squared norm" }, "share of norm"), el("th", {}, ""))),
          el("tbody", {}, panel.shares.filter(([, share], i) => i < 8 || share > 0.01).map(([i, share]) => el("tr", {}, el("td", { class: "data" }, names[i]), el("td", { class: "number" }, percent(share)),
            el("td", {}, el("div", { class: "bars", "aria-hidden": "true" }, el("i", { style: { width: `${100 * share}%`, background: colours[i] } })))))))) ),
      structureSection(panel), neighboursSection(panel),
    ];
  }

  // -- which page is shown ------------------------------------------------------------------------------------------------

  let current = null; // k of the panel that is shown
  let asked = 0;

  /** k of the panel that the address names, which may still be loading; null for the first page. */
  function wanted() {
    const match = /^#\/subnetwork\/(\d+)$/.exec(location.hash);
    return match ? Number(match[1]) : null;
  }

  async function show() {
    const turn = ++asked, k = wanted(), again = current === k && main.dataset.page;
    if (k !== null && k >= run.n) say(`There is no subnetwork ${k}: there are 0 to ${run.n - 1}.`);
    if (k === null || k >= run.n) {
      current = null;
      document.getElementById("steps").hidden = true;
      document.getElementById("where").textContent = "";
      document.title = `${run.title} · atlas`;
      fill("overview", (kept ??= [overviewPage()].flat(3).filter(Boolean)), again);
      return;
    }
    let panel = null, content;
    try { panel = await Data.panel(k); } catch (error) { content = missing(`Subnetwork ${k}: ${error.message}.`); }
    if (turn !== asked) return; // another page was asked for meanwhile
    if (panel) content = panelPage(panel);
    current = k;
    const place = view.order.indexOf(k);
    document.getElementById("steps").hidden = false;
    document.getElementById("where").textContent = place >= 0 ? `${place + 1} of ${view.order.length} in the table's order` : "outside the table's filter";
    document.title = `Subnetwork ${k} · ${run.title}`;
    fill(String(k), content, again);
    setTimeout(() => { const next = neighbour(1); if (next !== null) Data.panel(next).catch(() => {}); }, 300);
  }

  function fill(page, content, keepPlace) {
    const y = scrollY;
    main.replaceChildren(...[content].flat(3).filter(Boolean));
    main.dataset.page = page;
    scrollTo(0, keepPlace ? y : 0);
  }

  /** The subnetwork `by` places on in the table's order from the wanted one, so that fast keys all count; null at its end. */
  function neighbour(by) {
    const order = view.order.length ? view.order : [...Array(run.n).keys()], place = order.indexOf(wanted());
    return order[place < 0 ? 0 : place + by] ?? null;
  }
  function step(by) {
    const to = neighbour(by);
    if (wanted() !== null && to !== null) location.hash = link(to);
  }

  const shortName = (name) => { const i = run.tensors.findIndex((t) => t.name === name); return i < 0 ? name : names[i]; };

  function prepare() {
    const all = run.tensors.map((t) => t.name.split("."));
    let shared = 0;
    while (all.length > 1 && all.every((parts) => parts.length > shared + 1 && parts[shared] === all[0][shared])) shared++;
    names = all.map((parts) => parts.slice(shared).join("."));
    const total = run.tensors.map(() => 0);
    for (const shares of run.subnetworks.shares) for (const [i, share] of shares) total[i] += share;
    colours = run.tensors.map(() => OTHER);
    total.map((t, i) => [t, i]).sort((a, b) => b[0] - a[0]).slice(0, PALETTE.length).forEach(([, i], rank) => (colours[i] = PALETTE[rank]));
    view.order = chosen();
  }

  document.getElementById("previous").onclick = () => step(-1);
  document.getElementById("next").onclick = () => step(1);
  document.getElementById("theme").onclick = () => Theme.turn();
  Theme.system.addEventListener("change", () => { Theme.apply(); show(); });
  addEventListener("hashchange", show);
  addEventListener("beforeprint", () => { Theme.apply(true); show(); });
  addEventListener("afterprint", () => { Theme.apply(); show(); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === "Escape" && wanted() !== null) location.hash = "#/";
    else if (event.key === "/" && current === null) { event.preventDefault(); document.getElementById("filter").focus(); }
  });

  Theme.apply();
  Data.overview().then((content) => {
    run = content;
    Labels.open();
    prepare();
    show();
  }).catch((error) => main.replaceChildren(missing(`The atlas cannot be shown: ${error.message}.`)));
})();
