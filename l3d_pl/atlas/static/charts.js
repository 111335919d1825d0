// Small charts as inline SVG (and heat maps as canvas): they follow the page's theme, print well and carry alt texts.
// All text goes through textContent: what comes from data is never read as markup.
"use strict";

const Charts = (() => {
  const SVG = "http://www.w3.org/2000/svg";

  // -- elements -------------------------------------------------------------------------------------------------------

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      node.append(child instanceof Node ? child : document.createTextNode(String(child)));
    }
    return node;
  }
  const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

  // -- numbers --------------------------------------------------------------------------------------------------------

  const known = (value) => typeof value === "number" && Number.isFinite(value);

  /** Three digits, with a real minus sign; a dash for what is not known. */
  function number(value) {
    if (!known(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text =
      Number.isInteger(value) && size < 1e6 ? value.toLocaleString("en")
      : size >= 1e5 || size < 1e-4 ? value.toExponential(1)
      : size >= 100 ? value.toFixed(0)
      : String(Number(value.toPrecision(3)));
    return text.replace(/-/g, "−");
  }
  /** What stands at an axis: short, whatever the size. */
  const tick = (value) => (value !== 0 && (Math.abs(value) >= 1e4 || Math.abs(value) < 1e-3) ? value.toExponential().replace("e+", "e").replace(/-/g, "−") : number(value));
  const percent = (share) => (!known(share) ? "–" : share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1).replace(/\.0$/, "")} %`);
  const plusMinus = (value, error) => (known(error) ? `${number(value)}\u00a0±\u00a0${number(Number(error.toPrecision(2)))}` : number(value));

  function extent(values) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (!known(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return low > high ? [0, 1] : [low, high];
  }

  /** About `count` round numbers within [low, high]. */
  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1) || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  function powers(low, high) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(1, Math.ceil((last - first + 1) / 6));
    const found = [];
    for (let p = first; p <= last; p += every) found.push(10 ** p);
    if (found.length >= 3) return found;
    const finer = [];
    for (let p = first - 1; p <= last; p++) for (const m of [1, 2, 5]) if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) finer.push(m * 10 ** p);
    return finer.length >= 2 ? finer : [low, high];
  }

  // -- axes -----------------------------------------------------------------------------------------------------------

  /** A frame with labelled axes. Returns {node, x, y, plot}: scales in pixels, and the group to draw into. */
  function frame({ width = 440, height = 230, x, y, xLabel, yLabel, alt, logX = false, logY = false, left = 62 }) {
    const box = { left, right: width - 12, top: 10, bottom: height - 42 };
    const scale = (domain, from, to, log) => {
      let [low, high] = domain;
      if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
      const f = log ? Math.log10 : (v) => v;
      const map = (v) => from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from);
      map.ticks = log ? powers(low, high) : ticks(low, high, Math.abs(to - from) / (from > to ? 45 : 65));
      return map;
    };
    const sx = scale(x, box.left, box.right, logX), sy = scale(y, box.bottom, box.top, logY);
    const node = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": alt, width, height });
    node.append(svg("title", {}, alt));
    const axes = svg("g", { class: "axes" });
    for (const t of sy.ticks) {
      axes.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: sy(t), y2: sy(t) }));
      axes.append(svg("text", { x: box.left - 7, y: sy(t) + 4, "text-anchor": "end" }, tick(t)));
    }
    for (const t of sx.ticks) {
      axes.append(svg("line", { class: "tick", x1: sx(t), x2: sx(t), y1: box.bottom, y2: box.bottom + 4 }));
      axes.append(svg("text", { x: sx(t), y: box.bottom + 17, "text-anchor": "middle" }, tick(t)));
    }
    axes.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    axes.append(svg("text", { class: "name", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
    const middle = (box.top + box.bottom) / 2;
    axes.append(svg("text", { class: "name", transform: `translate(13 ${middle}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
    const plot = svg("g", {});
    node.append(axes, plot);
    return { node, x: sx, y: sy, plot, box };
  }

  const legend = (series) =>
    el("div", { class: "legend" }, series.map((s) =>
      el("span", {}, svg("svg", { width: 26, height: 10, "aria-hidden": "true" },
        s.at.length > 1 && svg("line", { class: `series ${s.style}`, x1: 1, x2: 25, y1: 5, y2: 5 }),
        (s.points || s.at.length === 1) && svg("circle", { class: `dot ${s.style}`, cx: 13, cy: 5, r: 2.6 })), s.name)));

  /** Lines with points under a title. series: [{name, style, x, y, spread, points}]; style is a CSS class: colour and dashes;
   *  spread: what is added to and taken from y for a band around the line. upTo: what the
   *  axis reaches at least, where charts are to be compared; logY "auto": logarithmic where a few values dwarf the others. */
  function lines({ title, series, xLabel, yLabel, alt, logX = false, logY = false, fromZero = false, upTo = 0, reference = null, ...rest }) {
    if (logY === "auto") {
      const values = series.flatMap((s) => s.y).filter((v) => known(v) && v !== 0).sort((a, b) => a - b);
      logY = values.length > 2 && values[0] > 0 && values.at(-1) > 100 * values[Math.floor(values.length / 2)];
      if (logY) yLabel += " (log)";
    }
    const usable = series.map((s) => ({ ...s, at: s.x.map((x, i) => [x, s.y[i], s.spread?.[i]]).filter(([x, y]) =>
      known(x) && known(y) && (!logY || y > 0) && (!logX || x > 0)) })).filter((s) => s.at.length);
    if (!usable.length) return null;
    const xs = extent(usable.flatMap((s) => s.at.map((p) => p[0])));
    let ys = extent(usable.flatMap((s) => s.at.flatMap((p) => [p[1], p[1] + (p[2] || 0)])).concat(known(reference) ? [reference] : []));
    if (!logY) {
      const pad = (ys[1] - ys[0]) * 0.06;
      ys = [fromZero && ys[0] >= 0 ? 0 : ys[0] - pad, Math.max(ys[1] + pad, 1.06 * upTo)];
      if (fromZero && ys[1] === 0) ys = [0, 1];
    }
    const f = frame({ x: xs, y: ys, xLabel, yLabel, alt, logX, logY, ...rest });
    if (known(reference)) f.plot.append(svg("line", { class: "reference", x1: f.box.left, x2: f.box.right, y1: f.y(reference), y2: f.y(reference) }));
    for (const s of usable) {
      const band = s.at.filter((p) => known(p[2])), edge = (sign) => band.map(([x, y, spread]) => `${f.x(x).toFixed(1)} ${f.y(Math.max(y + sign * spread, ys[0])).toFixed(1)}`);
      if (band.length > 1) f.plot.append(svg("path", { class: "spread", d: `M${[...edge(1), ...edge(-1).reverse()].join("L")}Z` }));
      f.plot.append(svg("path", { class: `series ${s.style}`, d: "M" + s.at.map(([x, y]) => `${f.x(x).toFixed(1)} ${f.y(y).toFixed(1)}`).join("L") }));
      if (s.points || s.at.length === 1) for (const [x, y] of s.at) {
        f.plot.append(svg("circle", { class: `dot ${s.style}`, cx: f.x(x), cy: f.y(y), r: 2.6 },
          svg("title", {}, `${s.name}: ${number(y)} at ${number(x)}`)));
      }
    }
    return el("figure", { class: "plot" }, el("figcaption", { class: "title" }, title), f.node, usable.some((s) => s.name) ? legend(usable.filter((s) => s.name)) : null);
  }

  // -- distributions --------------------------------------------------------------------------------------------------

  /** Bars of counts between low and high; heights are log(1 + count), since one bin often holds nearly all. */
  function histogram({ low, high, counts, xLabel, alt, width = 440, height = 190 }) {
    const most = Math.max(...counts, 1);
    const f = frame({ width, height, x: [low, high], y: [0.8, most * 1.3], logY: true, xLabel, yLabel: "pairs (log scale)", alt });
    const step = (f.box.right - f.box.left) / counts.length;
    counts.forEach((count, i) => {
      if (!count) return;
      const middle = low + ((i + 0.5) * (high - low)) / counts.length;
      f.plot.append(svg("rect", { class: middle < 0 ? "negative" : "positive", x: f.box.left + i * step + 0.5, width: Math.max(step - 1, 0.8),
        y: f.y(count), height: f.box.bottom - f.y(count) }, svg("title", {}, `${number(count)} pairs of sample and reference near ${number(middle)}`)));
    });
    return f.node;
  }

  function sparkline(counts, alt) {
    const width = 92, height = 24, most = Math.log1p(Math.max(...counts, 1)), step = width / counts.length;
    const path = (from, to) => {
      let d = `M${(from * step).toFixed(1)} ${height}`;
      for (let i = from; i < to; i++) {
        const y = (height - (Math.log1p(counts[i]) / most) * (height - 2)).toFixed(1);
        d += `L${(i * step).toFixed(1)} ${y}L${((i + 1) * step).toFixed(1)} ${y}`;
      }
      return d + `L${(to * step).toFixed(1)} ${height}Z`;
    };
    const half = counts.length / 2;
    return svg("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": alt },
      svg("path", { class: "negative", d: path(0, Math.floor(half)) }),
      svg("path", { class: "positive", d: path(Math.floor(half), counts.length) }));
  }

  /** One bar per value of a small vector, upwards or downwards from zero. */
  function vector(values, alt, height = 46, width = 190) {
    const reach = Math.max(...values.map((v) => (known(v) ? Math.abs(v) : 0)), 1e-12);
    const low = values.some((v) => v < 0), zero = low ? height / 2 : height - 1, room = low ? height / 2 - 1 : height - 2;
    const step = width / values.length;
    return svg("svg", { class: "vector", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": alt },
      svg("line", { class: "axis", x1: 0, x2: width, y1: zero, y2: zero }),
      values.map((v, i) => known(v) && v !== 0 && svg("rect", { class: v < 0 ? "negative" : "positive", x: i * step + step * 0.12,
        width: Math.max(step * 0.76, 0.6), y: v < 0 ? zero : zero - (v / reach) * room, height: (Math.abs(v) / reach) * room },
        svg("title", {}, `[${i}] = ${number(v)}`))));
  }

  // -- points ---------------------------------------------------------------------------------------------------------

  /** Points that can be followed. points: [{x, y, radius, colour, title, href, faint, current}]. */
  function scatter({ points, xLabel, yLabel, alt, width = 820, height = 420 }) {
    const pad = ([low, high]) => [low - (high - low || 1) * 0.06, high + (high - low || 1) * 0.06];
    const f = frame({ width, height, x: pad(extent(points.map((p) => p.x))), y: pad(extent(points.map((p) => p.y))), xLabel, yLabel, alt });
    f.node.removeAttribute("role");  // its points are links
    for (const p of points) {
      const circle = svg("circle", { cx: f.x(p.x).toFixed(1), cy: f.y(p.y).toFixed(1), r: p.radius.toFixed(1), fill: p.colour,
        class: `point${p.faint ? " faint" : ""}` }, svg("title", {}, p.title));
      f.plot.append(svg("a", { href: p.href, "aria-label": p.title, tabindex: points.length > 60 ? -1 : 0 }, circle,
        points.length <= 30 && svg("text", { class: "mark", x: f.x(p.x) + p.radius + 3, y: f.y(p.y) + 4 }, p.mark)));
    }
    return f.node;
  }

  // -- heat maps ------------------------------------------------------------------------------------------------------

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const rgb = (name) => colour(name).split(",").map(Number);

  function bytes(base64) {
    const text = atob(base64), values = new Int8Array(text.length);
    for (let i = 0; i < text.length; i++) values[i] = text.charCodeAt(i);
    return values;
  }

  /** values: rows x columns in [-127, 127]; blue below zero, the page's own ground at zero, vermilion above. */
  function heatMap({ values, rows, columns, alt, width, height }) {
    const canvas = el("canvas", { class: "heat", width: columns, height: rows, role: "img", "aria-label": alt, title: alt,
      style: { width: `${width}px`, height: `${height}px` } });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    const [ground, low, high] = [rgb("--heat-zero"), rgb("--negative-rgb"), rgb("--positive-rgb")];
    for (let i = 0; i < values.length; i++) {
      const a = Math.min(Math.abs(values[i]) / 127, 1), end = values[i] < 0 ? low : high;
      for (let c = 0; c < 3; c++) image.data[4 * i + c] = ground[c] + a * (end[c] - ground[c]);
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  /** Attribution over a picture: clear at zero, blue or vermilion elsewhere. */
  function overlay(values, rows, columns, alt) {
    const canvas = el("canvas", { class: "overlay", width: columns, height: rows, role: "img", "aria-label": alt });
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    const reach = Math.max(...values.map((v) => (known(v) ? Math.abs(v) : 0)), 1e-12);
    const [low, high] = [rgb("--negative-rgb"), rgb("--positive-rgb")];
    values.forEach((value, i) => {
      const v = known(value) ? value : 0;
      (v < 0 ? low : high).forEach((part, c) => (image.data[4 * i + c] = part));
      image.data[4 * i + 3] = 150 * Math.min(Math.abs(v) / reach, 1);
    });
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // -- toys as networks -----------------------------------------------------------------------------------------------

  /** layers: [{weight: [in][out], bias: [out] | null}]: units in columns, edges as wide as |weight|, coloured by sign. */
  function network(layers, alt, title) {
    const sizes = [layers[0].weight.length, ...layers.map((layer) => layer.weight[0].length)];
    const width = 130 * (sizes.length - 1) + 70, height = Math.min(330, 40 + 26 * Math.max(...sizes)), top = 14, room = height - 42;
    const x = (c) => 35 + 130 * c;
    const y = (c, i) => top + room / 2 + (i - (sizes[c] - 1) / 2) * Math.min(26, room / Math.max(...sizes));
    const radius = Math.max(2.5, Math.min(7, room / Math.max(...sizes) / 2.8));
    let most = 1e-12;
    for (const { weight, bias } of layers) for (const v of weight.flat().concat(bias || [])) most = Math.max(most, Math.abs(v));
    const node = svg("svg", { class: "network", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": alt });
    const edges = [];
    layers.forEach(({ weight }, c) => weight.forEach((row, i) => row.forEach((w, j) => {
      const strength = Math.abs(w) / most;
      if (strength >= 0.03) edges.push({ strength, w, line: { x1: x(c), y1: y(c, i), x2: x(c + 1), y2: y(c + 1, j) } });
    })));
    edges.sort((a, b) => a.strength - b.strength);
    for (const { strength, w, line } of edges) {
      node.append(svg("line", { ...line, class: w < 0 ? "edge negative" : "edge positive", "stroke-width": (4 * strength).toFixed(2) },
        svg("title", {}, number(w))));
    }
    sizes.forEach((n, c) => {
      for (let i = 0; i < n; i++) {
        const bias = c ? layers[c - 1].bias : null, b = bias ? bias[i] / most : 0;
        node.append(svg("circle", { class: "ground", cx: x(c), cy: y(c, i), r: radius }));
        node.append(svg("circle", { class: `unit ${b < 0 ? "negative" : "positive"}`, "fill-opacity": Math.min(Math.abs(b), 1), cx: x(c), cy: y(c, i), r: radius },
          svg("title", {}, bias ? `unit ${i}, bias ${number(bias[i])}` : `unit ${i}`)));
        if ((c === 0 || c === sizes.length - 1) && (n <= 16 || i % 5 === 0)) {
          node.append(svg("text", { x: x(c) + (c ? radius + 5 : -radius - 5), y: y(c, i) + 4, "text-anchor": c ? "start" : "end" }, i));
        }
      }
    });
    node.append(svg("text", { x: x(0), y: height - 6, "text-anchor": "middle" }, "input"));
    node.append(svg("text", { x: x(sizes.length - 1), y: height - 6, "text-anchor": "middle" }, "output"));
    return el("figure", { class: "net" }, node, el("figcaption", {}, title));
  }

  return { el, svg, known, number, percent, plusMinus, extent, lines, legend, histogram, sparkline, vector, scatter, bytes, heatMap, overlay, network };
})();
