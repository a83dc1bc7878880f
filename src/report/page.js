// The report: reads the JSON that the page carries and draws it. The answer and the strangest images come first, the rest after the
// first paint, and each chart when it is scrolled to. What comes from the data is put in as text only, never as HTML: the names of
// images are whatever people chose.
"use strict";

const report = JSON.parse(document.getElementById("report").textContent);
const { answer, anomaly } = report;
const noun = report.kind === "images" ? "image" : "row";
const main = document.getElementById("content");

// Text and numbers

const whole = new Intl.NumberFormat("en-US");
const rounded = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 4 });
const brief = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return whole.format(value);
  const size = Math.abs(value);
  return size < 1e-4 || size >= 1e9 ? value.toExponential(2) : rounded.format(value);
}

const ratio = (part, all) => (all ? part / all : 0);
const percent = (share) => `${share > 0 && share < 1e-5 ? "< 0.001" : brief.format(100 * share)}\u00a0%`;
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

function bytes(n) {
  const units = ["bytes", "kB", "MB", "GB", "TB", "PB"];
  const power = n < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(n) / 3));
  return `${brief.format(n / 1000 ** power)}\u00a0${units[power]}`;
}

function duration(seconds) {
  if (seconds < 60) return `${brief.format(seconds)}\u00a0s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const local = (text) => new Date(text).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

// Characters that do not show, or that turn the reading order around, are spelled out: a name must not pass for another one.
const visible = (text) =>
  String(text).replace(/[\p{Cc}\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]/gu, (character) =>
    `\\u{${character.codePointAt(0).toString(16)}}`);

// Elements

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const data = (text, tag = "bdi", attributes = null) => el(tag, attributes, visible(text));
const time = (text) => el("time", { datetime: text, title: `${text.replace("T", " ").replace("Z", "")} UTC` }, local(text));
const short = (text) => (text.length > 32 ? `${text.slice(0, 31)}…` : text); // for labels within charts
const partitionName = (partition) => (partition === "" ? "whole table" : visible(partition));

function facts(pairs) {
  return el("dl", { class: "facts" }, pairs.map(([name, value]) => el("div", null, data(name, "dt"), el("dd", null, value))));
}

// A table in a box that scrolls by itself; a column is [heading, cell of a row, class].
function table(label, rows, columns) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Table: ${label}` },
    el("table", null,
      el("thead", null, el("tr", null, columns.map(([heading, , kind]) => el("th", { scope: "col", class: kind === "number" ? kind : null }, heading)))),
      el("tbody", null, rows.map((row) => el("tr", null, columns.map(([, cell, kind]) => el("td", { class: kind ?? null }, [cell(row)])))))));
}

const links = el("ul");

function section(id, heading, link, ...children) {
  const element = el("section", { id, "aria-labelledby": `${id}-heading` }, el("h2", { id: `${id}-heading` }, heading), children);
  main.append(element);
  links.append(el("li", null, el("a", { href: `#${id}` }, link)));
  return element;
}

// The answer

function sentence() {
  const { rows_in, rows_ok, rows_rejected, rows_flagged, duplicates, drifted_checks, drifted_partitions, partitions } = answer;
  const verb = (n, one, several) => (n === 1 ? one : several);
  const parts = [];
  if (rows_flagged === null) parts.push(`${number(rows_ok)} of ${plural(rows_in, noun)} ${verb(rows_ok, "was", "were")} embedded`);
  else if (rows_flagged === 0) parts.push(`None of ${plural(rows_ok, noun)} looks strange`);
  else parts.push(`${number(rows_flagged)} of ${plural(rows_ok, noun)} (${percent(ratio(rows_flagged, rows_ok))}) ${verb(rows_flagged, "looks", "look")} strange`);
  if (duplicates > 0) parts.push(`${number(duplicates)} ${verb(duplicates, "is a near-duplicate", "are near-duplicates")} of another`);
  if (rows_rejected > 0) parts.push(`${number(rows_rejected)} ${verb(rows_rejected, "was", "were")} rejected`);
  const last = parts.pop();
  const first = `${parts.length ? `${parts.join(", ")}${parts.length > 1 ? "," : ""} and ` : ""}${last}.`;
  if (!drifted_partitions) return drifted_checks === 0 ? `${first} The data is like the reference.` : first;
  return `${first} ${partitions === 1 ? "The data has" : `${number(drifted_partitions)} of ${plural(partitions, "partition")} ${verb(drifted_partitions, "has", "have")}`} drifted from the reference.`;
}

function tile(href, heading, value, note, warn = false) {
  const target = href !== null;
  return el("li", null, el(target ? "a" : "div", { class: `tile${warn ? " warn" : ""}`, href: target ? `#${href}` : null },
    el("span", null, heading), el("b", null, value), el("span", null, note)));
}

function drawAnswer() {
  const seconds = (new Date(report.finished_at) - new Date(report.started_at)) / 1000;
  const { rows_in, rows_ok, rows_rejected, rows_flagged, groups, duplicates, drifted_checks } = answer;
  document.getElementById("header").append(
    data(document.title, "h1"),
    el("p", { class: "answer" }, sentence()),
    el("p", { class: "muted small" }, "Pipeline ", data(report.pipeline), ", finished ", time(report.finished_at), ` after ${duration(seconds)}`),
    el("ul", { class: "tiles" },
      tile(report.partitions.length ? "partitions" : null, noun === "image" ? "Images" : "Rows", number(rows_in), answer.partitions > 1 ? `in ${plural(answer.partitions, "partition")}` : `${number(rows_ok)} embedded`),
      tile(report.rejects.length ? "rejects" : null, "Rejected", number(rows_rejected), percent(ratio(rows_rejected, rows_in)), rows_rejected > 0),
      tile(report.strangest.length ? "strangest" : null, "Flagged as strange", number(rows_flagged), rows_flagged === null ? "no anomaly stage" : percent(ratio(rows_flagged, rows_ok)), rows_flagged > 0),
      tile(report.groups.length ? "groups" : null, "Near-duplicates", number(duplicates),
        duplicates === null ? "not looked for" : duplicates === 0 ? "none found" : `in ${plural(groups, "group")}${answer.duplicate_bytes === null ? "" : `, ${bytes(answer.duplicate_bytes)} could be saved`}`),
      tile(report.drift.length ? "drift" : null, "Drift", drifted_checks === null ? "–" : drifted_checks === 0 ? "none" : plural(drifted_checks, "check"),
        drifted_checks === null ? "no reference to compare with" : drifted_checks === 0 ? "since the reference" : `in ${number(answer.drifted_partitions)} of ${plural(answer.partitions, "partition")}`, drifted_checks > 0)),
    el("ul", { class: "left-out" }, report.left_out.map((text) => data(text, "li"))));
}

// The filter, shared by the cards, the groups and the map

const filter = { words: [], flagged: false };
const filtered = []; // what to call when the filter changes
const passes = (text) => filter.words.every((word) => text.includes(word));
const searchable = (...texts) => texts.join("\n").toLowerCase();

function applyFilter() {
  for (const apply of filtered) apply();
}

function drawBar() {
  const some = report.strangest.length || report.groups.length || report.map;
  const flagged = report.strangest.some((one) => one.is_anomaly) || report.map?.is_anomaly.some(Boolean);
  const search = el("input", { type: "search", placeholder: `Filter ${noun}s`, "aria-label": `Filter ${noun}s by id, partition, reason or value`, autocomplete: "off", spellcheck: "false",
    input: () => {
      filter.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      applyFilter();
    } });
  const only = el("input", { type: "checkbox", autocomplete: "off", change: () => {
    filter.flagged = only.checked;
    applyFilter();
  } });
  document.getElementById("bar").append(el("div", null,
    el("nav", { "aria-label": "Sections" }, links),
    some ? el("search", { class: "filter" }, search, flagged ? el("label", null, only, "flagged only") : null) : null));
}

// The strangest, and the dialog that shows one of them large

const PICTURES = [["image", "image"], ["input", "model input"], ["reconstruction", "reconstruc\u00adtion"], ["error_map", "error map"]];
const picturesOf = (one) => PICTURES.filter(([key]) => one.pictures[key] !== null).map(([key, caption]) => [one.pictures[key], caption, key]);

// Small pictures are shown with their pixels: smoothing would hide what the model sees.
function picture({ width, height, data: source }, alt) {
  return el("img", { src: source, width, height, alt, decoding: "async", class: Math.max(width, height) <= 128 ? "pixels" : null });
}

const scoreFacts = (one) => [
  ["score", number(one.score)],
  one.percentile === null ? null : ["percentile", number(one.percentile)],
  one.p_value === null ? null : ["p-value", number(one.p_value)],
  one.largest_error === null ? null : ["largest error", number(one.largest_error)],
].filter(Boolean);

const columnFacts = (columns) => Object.entries(columns).map(([name, value]) => [name, value === null ? "–" : typeof value === "number" ? number(value) : data(value)]);
const badge = (one) => (one.is_anomaly ? el("span", { class: "badge flagged" }, "flagged") : null);
const partitionLine = (one) => (one.partition === "" ? null : el("p", { class: "muted small" }, data(one.partition)));
const reasonChips = (one) => (one.reasons.length ? el("ul", { class: "chips", "aria-label": "Reasons" }, one.reasons.map((reason) => data(reason, "li"))) : null);

function card(one) {
  const pictures = picturesOf(one);
  const element = el("li", { class: "card" },
    pictures.length ? el("button", { type: "button", class: "pictures", "aria-label": `Enlarge the pictures of ${visible(one.image_id)}`, click: () => showLarge(element) },
      pictures.map(([shown, caption]) => el("span", null, el("span", { class: "frame" }, picture(shown, "")), caption))) : null,
    el("div", { class: "heading" }, el("h3", null, data(one.image_id)), badge(one)),
    partitionLine(one), facts(scoreFacts(one)), reasonChips(one),
    Object.keys(one.columns).length ? facts(columnFacts(one.columns)) : null);
  element.one = one;
  element.text = searchable(one.image_id, one.partition, ...one.reasons, ...Object.values(one.columns));
  return element;
}

const large = {
  heading: el("h2", { id: "large-heading" }),
  place: el("span", { class: "muted small", "aria-live": "polite" }),
  body: el("div", { class: "stack" }),
  card: null,
};
large.dialog = el("dialog", { "aria-labelledby": "large-heading",
  keydown: (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) stepLarge(step);
  },
  // A click beside the box, on the backdrop, is one on the dialog itself.
  click: (event) => event.target === large.dialog && large.dialog.close(),
  close: () => large.card.querySelector("button").focus() },
  el("div", { class: "top" }, large.heading, large.place,
    el("span", { class: "filter" },
      el("button", { type: "button", class: "button", click: () => stepLarge(-1) }, "Previous"),
      el("button", { type: "button", class: "button", click: () => stepLarge(1) }, "Next"),
      el("button", { type: "button", class: "button", click: () => large.dialog.close() }, "Close"))),
  large.body);

const largeCards = () => [...large.card.parentElement.children].filter((element) => !element.hidden && element.querySelector("button"));

function showLarge(element) {
  const { one } = element;
  large.card = element;
  const cards = largeCards();
  large.heading.replaceChildren(data(one.image_id), " ", badge(one) ?? "");
  large.place.textContent = `${cards.indexOf(element) + 1} of ${cards.length}`;
  large.body.replaceChildren(
    el("div", { class: "large" }, picturesOf(one).map(([shown, caption, key]) =>
      el("figure", null, el("div", { class: "frame" }, picture(shown, `${caption}: ${visible(one.image_id)}`)),
        el("figcaption", null, `${caption}, ${shown.width}\u00a0×\u00a0${shown.height}`,
          key === "error_map" && one.largest_error !== null ? `; the brightest is an error of ${number(one.largest_error)}` : "")))),
    partitionLine(one) ?? "", facts(scoreFacts(one)), reasonChips(one) ?? "", facts(columnFacts(one.columns)));
  if (!large.dialog.open) large.dialog.showModal();
}

function stepLarge(step) {
  const cards = largeCards();
  showLarge(cards[(cards.indexOf(large.card) + step + cards.length) % cards.length]);
}

const ORDERS = {
  "strangest first": (a, b) => b.score - a.score,
  "least strange first": (a, b) => a.score - b.score,
  "largest error first": (a, b) => (b.largest_error ?? -Infinity) - (a.largest_error ?? -Infinity),
  "by id": (a, b) => (a.image_id < b.image_id ? -1 : 1),
  "by partition": (a, b) => (a.partition < b.partition ? -1 : a.partition > b.partition ? 1 : b.score - a.score),
};

function drawStrangest() {
  const { strangest } = report;
  if (!strangest.length) return;
  const cards = strangest.map(card);
  const plain = strangest.every((one) => !picturesOf(one).length);
  const list = el("ul", { class: `cards${plain ? " plain" : ""}` }, cards);
  const shown = el("span", { class: "muted small", role: "status" });
  const empty = el("p", { class: "empty", hidden: true }, `None of these ${noun}s passes the filter.`);
  const orders = Object.keys(ORDERS).filter((order) =>
    (order !== "largest error first" || strangest.some((one) => one.largest_error !== null)) &&
    (order !== "by partition" || new Set(strangest.map((one) => one.partition)).size > 1));
  const sort = el("select", { autocomplete: "off", change: () => list.append(...cards.sort((a, b) => ORDERS[sort.value](a.one, b.one))) },
    orders.map((order) => el("option", null, order)));
  filtered.push(() => {
    for (const element of cards) element.hidden = !passes(element.text) || (filter.flagged && !element.one.is_anomaly);
    const count = cards.filter((element) => !element.hidden).length;
    shown.textContent = count === cards.length ? `${number(count)} shown` : `${number(count)} of ${number(cards.length)} shown`;
    empty.hidden = count > 0;
  });
  section("strangest", `Strangest ${noun}s`, "Strangest",
    anomaly ? el("p", { class: "muted" }, "Flagged by ", data(anomaly.rule, "code"), "; cutoff: ", data(anomaly.threshold), ". Reference ", data(anomaly.reference.id, "code"),
      anomaly.reference.rows === null ? "" : ` of ${plural(anomaly.reference.rows, "row")}`, ". The first reason is the rule that decided.") : null,
    el("div", { class: "controls" }, el("label", null, "Sort", sort), shown), list, empty);
  document.body.append(large.dialog);
}

// Near-duplicates

function drawGroups() {
  if (!report.groups.length) return;
  const list = report.groups.map((group) => {
    const more = group.size - group.images.length;
    const panel = el("article", { class: `panel${group.images.length > 4 ? " whole" : ""}` },
      el("h3", null, `${plural(group.size, noun)} alike`, group.bytes_saved > 0 ? `, ${bytes(group.bytes_saved)} could be saved` : ""),
      el("p", { class: "muted small" }, "group ", data(group.group_id, "code")),
      el("ul", { class: "gallery" }, group.images.map((one) =>
        el("li", { class: one.is_representative ? "representative" : null },
          one.picture ? el("div", { class: "frame" }, picture(one.picture, `picture of ${visible(one.image_id)}`)) : null,
          data(one.image_id, "bdi"),
          one.partition === "" ? null : el("div", { class: "muted" }, data(one.partition)),
          one.is_representative ? el("div", null, el("span", { class: "badge" }, "representative")) : el("div", { class: "muted" }, `distance ${number(one.distance)}`))),
        more > 0 ? el("li", { class: "more" }, `and ${number(more)} more`) : null));
    panel.text = searchable(group.group_id, ...group.images.flatMap((one) => [one.image_id, one.partition]));
    return panel;
  });
  const empty = el("p", { class: "empty", hidden: true }, "No group passes the filter.");
  filtered.push(() => {
    for (const panel of list) panel.hidden = !passes(panel.text);
    empty.hidden = list.some((panel) => !panel.hidden);
  });
  const all = answer.groups ?? list.length;
  section("groups", "Near-duplicates", "Duplicates",
    el("p", { class: "muted" }, all > list.length ? `The ${list.length} largest of ${number(all)} groups. ` : "", "The representative is the one to keep; distances are from it."),
    el("div", { class: "groups" }, list), empty);
}

// Charts

const charts = [];
const printed = matchMedia("print");
const PRINTED_WIDTH = 680; // pixels of CSS: what fits on A4 and on Letter

// A chart is drawn when it comes near the window: `option` makes what the library draws from the colors in force.
function chart(label, height, option, rows) {
  const box = el("div", { class: "chart", role: "img", "aria-label": label, style: `height: ${height}px` });
  const drawing = { box, option, chart: null };
  charts.push(drawing);
  near.observe(box);
  const summary = el("summary", null, "Show as a table");
  const details = el("details", { class: "as-table", toggle: () => details.open && details.replaceChildren(summary, rows()) }, summary);
  drawing.details = details;
  return drawing;
}

function draw(drawing) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  drawing.chart ??= echarts.init(drawing.box, null, { renderer: "canvas" });
  drawing.chart.resize({ width: printed.matches ? PRINTED_WIDTH : "auto", silent: true });
  // The zoom is merged, so that it stays; all else is made anew.
  drawing.chart.setOption({
    animation: false,
    textStyle: { color: color("ink"), fontFamily: getComputedStyle(document.body).fontFamily },
    ...drawing.option(color),
  }, { replaceMerge: ["series", "visualMap", "legend", "xAxis", "yAxis"] });
  drawing.chart.getZr().flush();
}

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    draw(charts.find(({ box }) => box === target));
    resized.observe(target);
  }
}, { rootMargin: "400px" });
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (!printed.matches) charts.find(({ box }) => box === target).chart.resize();
});

const axis = (color, name, more) => ({
  name, nameTextStyle: { color: color("muted") },
  axisLine: { onZero: false, lineStyle: { color: color("mark-none") } }, axisLabel: { color: color("muted"), hideOverlap: true },
  axisTick: { lineStyle: { color: color("mark-none") } }, splitLine: { lineStyle: { color: color("line") } }, ...more,
});
const legend = (color, more) => ({
  type: "scroll", top: 0, left: 0, itemWidth: 18, formatter: short, textStyle: { color: color("ink") }, inactiveColor: color("mark-none"), pageTextStyle: { color: color("muted") },
  pageIconColor: color("accent"), pageIconInactiveColor: color("line"), ...more,
});
const tooltip = (color, formatter, more) => ({
  confine: true, transitionDuration: 0, padding: 10, backgroundColor: color("surface"), borderColor: color("mark-none"), textStyle: { color: color("ink") },
  extraCssText: "box-shadow: 0 2px 10px rgb(0 0 0 / 0.25)", formatter, ...more,
});
const lines = (...texts) => el("div", { class: "tip" }, texts.filter(Boolean).map((text, place) => el(place ? "span" : "b", null, text)));

// Scores

function drawScores() {
  const { scores } = report;
  if (!scores) return;
  const { edges, counts, flagged, reference, thresholds } = scores;
  const sum = (list) => list.reduce((total, n) => total + n, 0);
  const shares = (list, total) => list.map((n) => ratio(n, total));
  const total = sum(counts);
  const here = shares(counts, total);
  const strange = shares(flagged, total);
  const before = reference && shares(reference, sum(reference));
  const least = Math.min(...[...here, ...strange, ...(before ?? [])].filter((share) => share > 0), 1);
  const floor = 10 ** Math.floor(Math.log10(least)); // where the logarithmic axis starts
  // A cutoff far from all scores is told in words alone: drawn, it would push them together.
  const [first, last] = [edges[0], edges[edges.length - 1]];
  const drawn = thresholds.filter(({ value }) => value > 2 * first - last && value < 2 * last - first);
  const values = drawn.map(({ value }) => value);
  let logarithmic = false;

  // Rectangles rather than the library's bars: these have the edges of their bins on an axis of numbers.
  const bars = (name, list, fill, more) => ({
    name, type: "custom", itemStyle: { color: fill }, silent: true, data: list.map((share, bin) => [(edges[bin] + edges[bin + 1]) / 2, share]), ...more,
    renderItem: ({ dataIndex: bin, coordSys }, api) => {
      const [left, top] = api.coord([edges[bin], Math.max(list[bin], floor)]);
      const [right] = api.coord([edges[bin + 1], floor]);
      const bottom = coordSys.y + coordSys.height;
      const gap = right - left > 4 ? 1 : 0;
      if (more) return { type: "rect", shape: { x: left, y: coordSys.y, width: right - left, height: coordSys.height }, style: { fill: "transparent" }, emphasis: { style: { fill: "rgb(128 128 128 / 0.15)" } } };
      return list[bin] > 0 ? { type: "rect", shape: { x: left, y: top, width: right - left - gap, height: bottom - top }, style: { fill } } : null;
    },
  });
  const option = (color) => ({
    grid: { left: 4, right: 16, top: 72, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "all" },
    legend: legend(color, { data: [
      { name: "this table", icon: "rect" }, { name: "flagged", icon: "rect" }, ...(before ? [{ name: "reference", icon: "path://M0 6h24v2H0z" }] : []),
      ...(values.length ? [{ name: "cutoff", icon: "path://M0 6h6v2H0zM9 6h6v2H9zM18 6h6v2h-6z" }] : []),
    ] }),
    tooltip: tooltip(color, ({ dataIndex: bin }) => lines(`${number(edges[bin])} to ${number(edges[bin + 1])}`,
      `${plural(counts[bin], noun)}, ${percent(here[bin])}`, `${number(flagged[bin])} flagged`,
      before && `reference: ${number(reference[bin])}, ${percent(before[bin])}`)),
    xAxis: axis(color, scores.column, { type: "value", min: Math.min(first, ...values), max: Math.max(last, ...values), nameLocation: "middle", nameGap: 28,
      splitLine: { show: false }, axisLabel: { color: color("muted"), hideOverlap: true, showMinLabel: false, showMaxLabel: false, formatter: number } }),
    yAxis: axis(color, "", { type: logarithmic ? "log" : "value", min: logarithmic ? floor : 0,
      axisLabel: { color: color("muted"), formatter: percent } }),
    series: [
      bars("bin", here, "transparent", { silent: false }),
      bars("this table", here, color("mark")),
      bars("flagged", strange, color("mark-flag")),
      ...(before ? [{ name: "reference", type: "line", step: "end", silent: true, showSymbol: false, lineStyle: { width: 1.5, color: color("mark-reference") }, itemStyle: { color: color("mark-reference") },
        data: edges.map((edge, bin) => [edge, logarithmic ? Math.max(before[Math.min(bin, before.length - 1)], floor) : before[Math.min(bin, before.length - 1)]]) }] : []),
      { name: "cutoff", type: "line", silent: true, symbol: "none", lineStyle: { type: "dashed", width: 2, color: color("flag") }, itemStyle: { color: color("flag") }, data: [],
        markLine: { silent: true, symbol: "none", lineStyle: { type: "dashed", width: 2, color: color("flag") }, data: drawn.map(({ segment, value }, place) => ({
          xAxis: value, label: { show: drawn.length < 7, formatter: () => (segment === null ? number(value) : short(visible(segment))), color: color("flag"), distance: 2 + 13 * (place % 3) } })) } },
    ],
  });
  const drawing = chart(`Histogram of ${visible(scores.column)}: shares of ${plural(total, noun)}, ${number(sum(flagged))} of them flagged${before ? ", beside the reference" : ""}`, 360, option, () =>
    table("Scores by bin", edges.slice(0, -1).map((_, bin) => bin).filter((bin) => counts[bin] || reference?.[bin]), [
      ["from", (bin) => number(edges[bin]), "number"], ["to", (bin) => number(edges[bin + 1]), "number"], [`${noun}s`, (bin) => number(counts[bin]), "number"],
      ["share", (bin) => percent(here[bin]), "number"], ["flagged", (bin) => number(flagged[bin]), "number"],
      ...(before ? [["reference", (bin) => percent(before[bin]), "number"]] : []),
    ]));
  const scale = (name, value) => el("label", null, el("input", { type: "radio", autocomplete: "off", name: "scale", checked: value === logarithmic, change: () => {
    logarithmic = value;
    draw(drawing);
  } }), name);
  section("scores", "Scores", "Scores",
    el("p", { class: "muted" }, data(scores.column, "code"), ` of this table, as shares of its ${noun}s`,
      before ? `, beside that of the ${number(sum(reference))} rows of the reference` : "", ".",
      thresholds.length ? ` Cutoff: ${thresholds.map(({ segment, value }) => `${number(value)}${segment === null ? "" : ` for ${visible(segment)}`}`).join(", ")}.` : "",
      scores.missing ? ` ${plural(scores.missing, noun)} could not be scored.` : ""),
    el("div", { class: "panel" },
      el("div", { class: "controls" }, el("fieldset", null, el("legend", { class: "unseen" }, "Scale of the shares"), scale("linear", false), scale("logarithmic", true))),
      drawing.box, drawing.details));
}

// The map

const CATEGORIES = 7; // told apart by color; the rest is "other"
const DIRECTIONS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function extent(values) {
  const [low, high] = values.reduce(([least, most], value) => [Math.min(least, value), Math.max(most, value)], [Infinity, -Infinity]);
  const margin = (high - low || 1) * 0.04;
  return { min: low - margin, max: high + margin };
}

// How points are colored by one value each: by a scale where all are numbers, else by category, the most frequent first.
function coloring(name, values) {
  const known = values.filter((value) => value !== null);
  if (known.every((value) => typeof value === "number") && new Set(known).size > 1) {
    known.sort((a, b) => a - b);
    // A few extreme values would leave one color for all others.
    const at = (share) => known[Math.round(share * (known.length - 1))];
    return at(0.01) < at(0.99) ? { name, values, low: at(0.01), high: at(0.99) } : { name, values, low: at(0), high: at(1) };
  }
  const labels = values.map((value) => (value === null ? "no value" : visible(value)));
  const counts = new Map();
  for (const label of labels) counts.set(label, (counts.get(label) ?? 0) + 1);
  const ranked = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
  const others = new Set(ranked.splice(CATEGORIES));
  const kinds = ranked.map((label, rank) => ({ label, color: label === "no value" ? "mark-none" : `category-${rank}`, has: (point) => labels[point] === label }));
  if (others.size) kinds.push({ label: `${number(others.size)} others`, color: "mark-none", has: (point) => others.has(labels[point]) });
  return { name, kinds };
}

function drawMap() {
  const { map } = report;
  if (!map || !map.x.length) return;
  const flags = map.is_anomaly;
  const points = map.x.map((_, point) => point);
  const byScore = [...points].sort((a, b) => (map.score[b] ?? -Infinity) - (map.score[a] ?? -Infinity));
  const texts = points.map((point) => searchable(map.image_id[point], map.partition[point], ...map.columns.map(({ values }) => values[point] ?? "")));
  const x = extent(map.x);
  const y = extent(map.y);

  const colorings = [];
  if (flags.some((flag) => flag !== null)) {
    const kinds = [{ label: "not flagged", color: "mark", has: (point) => flags[point] === false }, { label: "flagged", color: "mark-flag", has: (point) => flags[point] === true }];
    if (flags.includes(null)) kinds.push({ label: "not scored", color: "mark-none", has: (point) => flags[point] === null });
    colorings.push({ name: "flagged", kinds });
  }
  if (map.score.some((score) => score !== null)) colorings.push(coloring("score", map.score));
  if (new Set(map.partition).size > 1) colorings.push(coloring("partition", map.partition.map(partitionName)));
  for (const { name, values } of map.columns) colorings.push(coloring(name, values));
  if (!colorings.length) colorings.push({ name: "nothing", kinds: [{ label: `${noun}s`, color: "mark", has: () => true }] });

  let colored = colorings[0];
  let shown = points;
  let current = null; // the point that the keyboard is at
  let place = new Map(); // where the library has a point: its series and its index there

  const sheet = map.sheet && Object.assign(new Image(), { src: map.sheet.data });
  function thumbnail(point) {
    const tile = sheet ? map.sheet_place[point] : -1;
    if (tile < 0) return null;
    const side = map.sheet_side;
    const canvas = el("canvas", { class: "thumbnail", width: side, height: side, role: "img", "aria-label": "thumbnail" });
    canvas.getContext("2d").drawImage(sheet, (tile % map.sheet_columns) * side, Math.floor(tile / map.sheet_columns) * side, side, side, 0, 0, side, side);
    return canvas;
  }
  const words = (point) => [
    map.partition[point] === "" ? null : visible(map.partition[point]),
    map.score[point] === null ? null : `score ${number(map.score[point])}`,
    flags[point] ? "flagged" : null,
    ...map.columns.map(({ name, values }) => `${visible(name)}: ${typeof values[point] === "string" ? visible(values[point]) : number(values[point])}`),
  ].filter(Boolean);
  const tip = (point) => el("div", { class: "tip" }, thumbnail(point), data(map.image_id[point], "b"), words(point).map((word) => data(word)));

  const option = (color) => {
    place = new Map();
    const scale = colored.kinds ? null : colored;
    const series = (scale ? [{ label: "points", color: "mark", has: () => true }] : colored.kinds).map((kind, seriesIndex) => {
      const members = shown.filter(kind.has);
      members.forEach((point, index) => place.set(point, [seriesIndex, index]));
      return {
        name: kind.label, type: "scatter", itemStyle: { color: color(kind.color), opacity: 0.8 },
        // Shape says what color says in the first coloring, and says it in all others too.
        symbol: ([, , , point]) => (flags[point] ? "diamond" : "circle"), symbolSize: ([, , , point]) => (flags[point] ? 10 : 6),
        emphasis: { scale: 1.8, itemStyle: { opacity: 1, borderColor: color("ink"), borderWidth: 2 } },
        data: members.map((point) => [map.x[point], map.y[point], scale && scale.values[point] !== null ? Math.min(Math.max(scale.values[point], scale.low), scale.high) : null, point]),
      };
    });
    const component = (n) => `component ${n + 1}${map.explained[n] === undefined ? "" : ` (${percent(map.explained[n])} of the variance)`}`;
    return {
      grid: { left: 4, right: 12, top: 40, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "all" },
      legend: scale ? { show: false } : legend(color, { itemWidth: 12, data: colored.kinds.map(({ label }) => ({ name: label, icon: label === "flagged" ? "diamond" : "circle" })) }),
      visualMap: scale ? [{ type: "continuous", dimension: 2, min: scale.low, max: scale.high, orient: "horizontal", top: 0, left: 0, itemHeight: 100, itemWidth: 14, seriesIndex: 0,
        text: [`≥ ${number(scale.high)}`, `≤ ${number(scale.low)}`], textStyle: { color: color("ink") }, hoverLink: false,
        inRange: { color: [color("low"), color("middle"), color("high")] }, outOfRange: { color: color("mark-none") } }] : [],
      tooltip: tooltip(color, ({ value }) => tip(value[3])),
      xAxis: axis(color, component(0), { type: "value", ...x, nameLocation: "middle", nameGap: 26, axisLabel: { color: color("muted"), hideOverlap: true, showMinLabel: false, showMaxLabel: false, formatter: number } }),
      yAxis: axis(color, component(1), { type: "value", ...y, nameLocation: "middle", nameGap: 36, axisLabel: { color: color("muted"), showMinLabel: false, showMaxLabel: false, formatter: number } }),
      dataZoom: ["xAxisIndex", "yAxisIndex"].map((which) => ({ type: "inside", [which]: 0, filterMode: "none", minSpan: 0.5, disabled: document.activeElement !== drawing.box })),
      series,
    };
  };

  const drawing = chart(`Map of ${plural(points.length, noun)}: those that the model sees as alike are near each other`, 560, option, () =>
    table("Points of the map", shown, [
      ["id", (point) => data(map.image_id[point])], ["partition", (point) => data(partitionName(map.partition[point]))],
      ["score", (point) => number(map.score[point]), "number"], ["flagged", (point) => (flags[point] === null ? "–" : flags[point] ? "yes" : "no")],
      ["x", (point) => number(map.x[point]), "number"], ["y", (point) => number(map.y[point]), "number"],
    ]));
  const { box } = drawing;

  // The share of each axis in view, times `factor`, about its middle.
  function zoom(factor) {
    if (!drawing.chart) draw(drawing);
    drawing.chart.dispatchAction({ type: "dataZoom", batch: drawing.chart.getOption().dataZoom.map(({ start, end }, dataZoomIndex) => {
      const half = Math.min(50, ((end - start) / 2) * factor);
      const from = Math.min(Math.max((start + end) / 2 - half, 0), 100 - 2 * half);
      return { dataZoomIndex, start: from, end: from + 2 * half };
    }) });
  }
  const announcement = el("div", { class: "unseen", "aria-live": "polite" });
  function goTo(point) {
    leave();
    current = point;
    const [seriesIndex, dataIndex] = place.get(point);
    drawing.chart.dispatchAction({ type: "highlight", seriesIndex, dataIndex });
    drawing.chart.dispatchAction({ type: "showTip", seriesIndex, dataIndex });
    announcement.textContent = [visible(map.image_id[point]), ...words(point)].join(", ");
  }
  function leave() {
    drawing.chart.dispatchAction({ type: "hideTip" });
    drawing.chart.dispatchAction({ type: "downplay" });
  }
  // Arrows go to the nearest point in view that lies that way; page keys by score.
  function step(key) {
    const pixels = new Map(points.filter((point) => place.has(point)).map((point) => [point, drawing.chart.convertToPixel("grid", [map.x[point], map.y[point]])]));
    const inView = byScore.filter((point) => pixels.has(point) && drawing.chart.containPixel("grid", pixels.get(point)));
    if (!inView.length) return;
    const at = inView.indexOf(current);
    if (at < 0 || key === "Home") return goTo(inView[0]);
    if (!DIRECTIONS[key]) return goTo(inView[(at + (key === "PageDown" ? 1 : -1) + inView.length) % inView.length]);
    const [right, down] = DIRECTIONS[key];
    const [left, top] = pixels.get(current);
    let best = null;
    let least = Infinity;
    for (const point of inView) {
      const [dx, dy] = [pixels.get(point)[0] - left, pixels.get(point)[1] - top];
      const along = dx * right + dy * down;
      const distance = Math.hypot(dx, dy);
      if (along > 0 && along >= 0.7 * distance && distance < least) [best, least] = [point, distance];
    }
    if (best !== null) goTo(best);
  }

  box.classList.add("map");
  box.style.height = "min(560px, 110vw)"; // about square on a narrow screen
  for (const [name, value] of Object.entries({ role: "application", tabindex: 0, "aria-roledescription": "scatter plot", "aria-describedby": "map-hint" })) box.setAttribute(name, value);
  // Only a map that has the focus takes the wheel: the page scrolls over it otherwise.
  const activate = (active) => drawing.chart?.setOption({ dataZoom: [{ disabled: !active }, { disabled: !active }] });
  box.addEventListener("focus", () => activate(true));
  box.addEventListener("blur", () => {
    activate(false);
    if (drawing.chart) leave();
  });
  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !drawing.chart) return;
    if (event.key === "+") zoom(0.6);
    else if (event.key === "-") zoom(1 / 0.6);
    else if (event.key === "0") zoom(Infinity);
    else if (event.key === "Escape") leave();
    else if (DIRECTIONS[event.key] || ["Home", "PageUp", "PageDown"].includes(event.key)) step(event.key);
    else return;
    event.preventDefault();
  });

  const select = el("select", { autocomplete: "off", change: () => {
    colored = colorings[select.selectedIndex];
    draw(drawing);
  } }, colorings.map(({ name }) => data(name, "option")));
  const button = (text, factor) => el("button", { type: "button", class: "button", click: () => zoom(factor) }, text);
  const count = el("span", { class: "muted small", role: "status" });
  filtered.push(() => {
    shown = points.filter((point) => passes(texts[point]) && (!filter.flagged || flags[point]));
    count.textContent = shown.length === points.length ? `${plural(points.length, "point")}` : `${number(shown.length)} of ${plural(points.length, "point")} shown`;
    if (drawing.chart) draw(drawing);
  });
  section("map", "Map of the latent space", "Map",
    el("p", { class: "muted" }, map.of > points.length ? `${number(points.length)} of ${plural(map.of, noun)}, ` : `${plural(points.length, noun)}, `,
      `laid out by `, map.method === "pca" ? "principal components" : data(map.method), `: those that the model sees as alike are near each other.`,
      flags.some(Boolean) ? " Diamonds are flagged." : ""),
    el("div", { class: "panel" },
      el("div", { class: "controls" }, el("label", null, "Color by", select), count,
        el("span", { class: "filter end" }, button("Zoom in", 0.6), button("Zoom out", 1 / 0.6), button("Reset", Infinity))),
      box,
      el("p", { class: "muted small hint", id: "map-hint" }, "Click the map, then turn the wheel to zoom and drag to move. Keys: arrows go from point to point, Home to the strangest, Page Down to the next strange, + and − zoom, 0 resets."),
      announcement, drawing.details));
}

// Drift, rejects, timings, lineage, partitions

const ROWS = 50; // of a table at first

function drawDrift() {
  if (!report.drift.length) return;
  const over = ({ value, threshold }) => (value === null ? 0 : Math.abs(value) / (threshold || 1));
  const rows = [...report.drift].sort((a, b) => b.is_anomaly - a.is_anomaly || over(b) - over(a));
  const longest = Math.min(Math.max(...rows.map(over), 1.5), 4); // in thresholds
  const several = new Set(rows.map((row) => row.partition)).size > 1;
  const measure = ({ metric }) => (metric === "cliffs_delta" ? "Cliff’s delta" : metric.replaceAll("_", " "));
  const columns = [
    ["column", (row) => [data(row.input), row.is_anomaly ? [" ", el("span", { class: "badge flagged" }, "drifted")] : "", el("div", { class: "muted small" }, data(measure(row)))]],
    ["value and threshold", (row) => el("div", { class: `meter${row.is_anomaly ? " drifted" : ""}` },
      el("i", { style: `width: ${(100 * Math.min(over(row), longest)) / longest}%` }), el("u", { style: `left: ${100 / longest}%` })), "wide"],
    ["value", (row) => number(row.value), "number"], ["threshold", (row) => number(row.threshold), "number"],
    ["p-value", (row) => number(row.p_value), "number"], [`${noun}s`, (row) => number(row.rows), "number"],
    ...(several ? [["partition", (row) => data(partitionName(row.partition))]] : []),
  ];
  const panel = el("div", { class: "panel" }, table("Drift by column", rows.slice(0, ROWS), columns));
  if (rows.length > ROWS)
    panel.append(el("button", { type: "button", class: "button", click: () => panel.replaceChildren(table("Drift by column", rows, columns)) }, `Show all ${number(rows.length)}`));
  section("drift", "Drift since the reference", "Drift", el("p", { class: "muted" }, "How far each column has moved from the reference. A bar past the line has drifted."), panel);
}

function drawRejects() {
  if (!report.rejects.length) return;
  section("rejects", "Rejected", "Rejected", el("p", { class: "muted" }, "What could not be embedded, by cause."),
    el("div", { class: "panel rejects" }, [...report.rejects].sort((a, b) => b.rows - a.rows).map(({ status, rows, examples }) =>
      examples.length ? el("details", null, el("summary", null, data(status, "code"), ` ${plural(rows, noun)}`),
        table(`Examples of ${visible(status)}`, examples, [["id", (one) => data(one.image_id)], ["partition", (one) => data(partitionName(one.partition))], ["message", (one) => data(one.message), "wide"]]))
        : el("p", { class: "small" }, data(status, "code"), ` ${plural(rows, noun)}`))));
}

function drawTimings() {
  if (!report.timings.length) return;
  const longest = Math.max(...report.timings.map(({ secs }) => secs), 1e-9);
  section("timings", "Timings", "Timings", el("div", { class: "panel" }, table("Time of each stage", report.timings, [
    ["stage", ({ stage }) => data(stage)], ["time", ({ secs }) => duration(secs), "number"],
    [el("span", { class: "unseen" }, "beside the longest"), ({ secs }) => el("div", { class: "meter" }, el("i", { style: `width: ${(100 * secs) / longest}%` })), "wide"],
    ["rows", ({ rows }) => number(rows), "number"], ["rows a second", ({ rows, secs }) => (rows === null || !secs ? "–" : brief.format(rows / secs)), "number"],
  ])));
}

function drawLineage() {
  if (!report.lineage.length) return;
  section("lineage", "Lineage", "Lineage", el("p", { class: "muted" }, "What the tables were made by and from."),
    el("div", { class: "panel" }, el("dl", { class: "lineage" }, report.lineage.map(({ name, value }) => [data(name, "dt"), el("dd", null, data(value, "code"))]))));
}

function drawPartitions() {
  if (!report.partitions.length) return;
  const id = (heading, key) => [heading, (row) => (row[key] === null ? "–" : data(row[key])), "code"];
  section("partitions", "Partitions", "Partitions",
    answer.partitions > report.partitions.length ? el("p", { class: "muted" }, `${number(report.partitions.length)} of ${number(answer.partitions)}`) : null,
    el("div", { class: "panel" }, table("Partitions", report.partitions, [
      ["partition", (row) => data(partitionName(row.partition))], [`${noun}s`, (row) => number(row.rows_in), "number"], ["rejected", (row) => number(row.rows_rejected), "number"],
      ["flagged", (row) => number(row.rows_flagged), "number"],
      id("run of latents", "latents_run_id"), id("of neighbors", "neighbors_run_id"), id("of groups", "groups_run_id"), id("of flags", "run_id"),
    ])));
}

// History

const LINES = 6; // partitions at most that have a line each

function drawHistory() {
  const runs = [...report.history];
  if (!runs.some(({ finished_at }) => finished_at >= report.started_at))
    runs.push(...report.partitions.map((row) => ({ ...row, finished_at: report.finished_at, drifted_checks: null, model_sha256: null })));
  if (runs.length < 2 || !report.history.length) return;
  const measures = [["flagged", (run) => (run.rows_flagged === null ? null : ratio(run.rows_flagged, run.rows_in))], ["rejected", (run) => ratio(run.rows_rejected, run.rows_in)]]
    .filter(([, of]) => runs.some((run) => of(run) !== null));
  const partitions = [...new Set(runs.map(({ partition }) => partition))];
  const few = partitions.length <= LINES;
  const models = runs.filter((run, place) => place && run.model_sha256 && runs[place - 1].model_sha256 && run.model_sha256 !== runs[place - 1].model_sha256);
  const named = few && partitions.length > 1;
  const top = (place) => (named ? 56 : 28) + place * 190;

  const option = (color) => ({
    grid: measures.map((_, place) => ({ left: 64, right: 24, top: top(place), height: 120 })),
    legend: legend(color, { show: named, data: partitions.map(partitionName) }),
    tooltip: tooltip(color, ({ data: { run }, seriesId }) => lines(partitionName(run.partition), local(run.finished_at), `${plural(run.rows_in, noun)}`,
      run.rows_flagged === null ? null : `${number(run.rows_flagged)} flagged, ${percent(ratio(run.rows_flagged, run.rows_in))}`,
      `${number(run.rows_rejected)} rejected, ${percent(ratio(run.rows_rejected, run.rows_in))}`,
      run.drifted_checks === null ? null : `${plural(run.drifted_checks, "check")} drifted`)),
    xAxis: measures.map((_, gridIndex) => axis(color, "", { type: "time", gridIndex, splitLine: { show: false } })),
    yAxis: measures.map(([name], gridIndex) => axis(color, `${name}, share of ${noun}s`, { type: "value", min: 0, max: ({ max }) => (max > 0.8 ? 1 : max > 0 ? null : 0.01), gridIndex, splitNumber: 3, nameTextStyle: { color: color("ink"), align: "left", padding: [0, 0, 0, -50] },
      axisLabel: { color: color("muted"), formatter: percent } })),
    dataZoom: [{ type: "slider", show: !printed.matches, xAxisIndex: measures.map((_, place) => place), bottom: 4, height: 22, borderColor: color("line"), fillerColor: "rgb(128 128 128 / 0.2)", textStyle: { color: color("muted") },
      showDataShadow: false, brushSelect: false, filterMode: "none", labelFormatter: (value) => new Date(value).toLocaleDateString("en-GB", { dateStyle: "medium" }) }],
    series: measures.flatMap(([measure, of], place) => (few ? partitions : [null]).map((partition, rank) => ({
      // Many partitions would be a tangle of lines: then each run is a point.
      name: partition === null ? measure : partitionName(partition), type: few ? "line" : "scatter", xAxisIndex: place, yAxisIndex: place, symbol: "circle", symbolSize: few ? 5 : 7, showSymbol: true, clip: true,
      lineStyle: { width: 2 }, itemStyle: { color: color(few ? `category-${rank}` : measure === "flagged" ? "mark-flag" : "mark"), opacity: few ? 1 : 0.6 },
      data: runs.filter((run) => partition === null || run.partition === partition).map((run) => ({ value: [Date.parse(run.finished_at), of(run)], run })),
      markLine: rank ? undefined : { silent: true, symbol: "none", lineStyle: { type: "dashed", color: color("muted") }, label: { color: color("muted"), formatter: "new model", show: place === 0 },
        data: models.map((run) => ({ xAxis: Date.parse(run.finished_at) })) },
    }))),
  });
  const drawing = chart(`Shares of ${noun}s that were flagged and rejected, over ${number(runs.length)} runs`, top(measures.length - 1) + 120 + 72, option, () =>
    table("Runs", [...runs].reverse(), [
      ["finished", (run) => time(run.finished_at)], ["partition", (run) => data(partitionName(run.partition))], [`${noun}s`, (run) => number(run.rows_in), "number"],
      ["rejected", (run) => number(run.rows_rejected), "number"], ["flagged", (run) => number(run.rows_flagged), "number"], ["drifted checks", (run) => number(run.drifted_checks), "number"],
      ["model", (run) => (run.model_sha256 ? data(run.model_sha256.slice(0, 12)) : "–"), "code"],
    ]));
  section("history", "History", "History",
    el("p", { class: "muted" }, `${number(runs.length)} runs of ${plural(partitions.length, "partition")}, this one included.`),
    el("div", { class: "panel" }, drawing.box, drawing.details));
}

// Paper shows all charts, in the colors of light, and what is folded away.
function setPrinting() {
  for (const details of document.querySelectorAll("details:not(.as-table)")) {
    if (printed.matches) details.dataset.wasOpen = details.open;
    details.open = printed.matches || details.dataset.wasOpen === "true";
  }
  charts.forEach(draw);
}

drawBar();
drawAnswer();
drawStrangest();
requestAnimationFrame(() => setTimeout(() => {
  for (const drawSection of [drawGroups, drawScores, drawMap, drawDrift, drawRejects, drawHistory, drawTimings, drawLineage, drawPartitions]) drawSection();
  applyFilter();
  document.getElementById("bar").hidden = !links.childElementCount;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.filter((drawing) => drawing.chart).forEach(draw));
  printed.addEventListener("change", setPrinting);
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  document.documentElement.dataset.ready = ""; // for who waits for the whole page
}));
