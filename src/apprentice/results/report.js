// Draws the report from the JSON in the page. Text is only ever set as text: nothing here reads or writes HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with properties and children; a text among the children stays a text. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "color") element.style.setProperty("--color", value);
    else if (name === "style") Object.assign(element.style, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const percent = (value, digits = 1) => (100 * value).toFixed(digits) + "\u00a0%";
const signed = (value, digits = 1) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const plain = (value, digits) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(digits);
const points = (value) => signed(100 * value);
const whole = (value) => Math.round(value).toLocaleString("en");
const words = (name) => name.replaceAll("_", " ");
const colors = new Map(data.agents.map((agent, place) => [agent.name, `var(--c${place % 8})`]));
const colorOf = (name) => colors.get(name) || (name.startsWith("best") || name.startsWith("only") ? "var(--c5)" : "var(--c4)");
const dot = (name) => h("span", { className: "dot", color: colorOf(name) });
const table = (head, rows, className = "") =>
  h("table", { className }, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows));
const th = (text, className = "") => h("th", { className, scope: "col" }, text);
const td = (...children) => h("td", {}, ...children);

function range(value, [low, high], color, least = 0, most = 1) {
  const at = (number) => (100 * (number - least)) / (most - least) + "%";
  const band = h("i", { style: { left: at(low), width: `max(2px, ${(100 * (high - low)) / (most - least)}%)` } });
  const zero = least < 0 ? [h("u", { style: { left: at(0) } })] : [];
  return h("div", { className: "range", color }, ...zero, band, h("b", { style: { left: at(value) } }));
}

function headline() {
  const { facts, agents } = data;
  const rate = (agent) => percent(agent.score.achievement_rate, 0);
  const students = agents.filter((agent) => agent.kind === "student");
  const [first, last] = [students[0], students.at(-1)];
  const expert = agents.find((agent) => agent.name === "expert");
  $("headline").textContent = facts.toy ? "Toy settings: these results mean nothing" : students.length > 1
    ? `From ${rate(first)} to ${rate(last)} of Crafter’s achievements`
    : `${agents.at(-1).name}: ${rate(agents.at(-1))} of Crafter’s achievements`;
  const protocol = { quick: "", balrog: ", by BALROG’s rules", "almost balrog": ", much as BALROG does", crafter: ", by Crafter’s rules" }[facts.protocol];
  $("lead").textContent = `${whole(facts.worlds)} held-out worlds, at most ${whole(facts.steps)} steps each${protocol}. ` +
    `The student is ${facts.model}` + (expert ? `; the scripted expert gets ${rate(expert)}.` : ".");
  const run = facts.run, others = run?.others.length ? `, some stages at ${run.others.join(", ")}` : "";
  $("facts").textContent = `Profile ${facts.profile}` + (run
    ? `. Run until ${run.date}${run.commit ? ` at commit ${run.commit}` : ""}${others}, on ${run.machines.join(" and ")}.`
    : ". When, where and of which commit it was run has not been recorded.");
}

function results() {
  const head = [th("agent"), th("achievement rate, 0 to 100 %", "wide"), th("Crafter score"), th("reward"), th("steps"), th("invalid"), th("episodes")];
  const span = ([low, high], digits, factor = 1) => h("small", {}, `${plain(factor * low, digits)} to ${plain(factor * high, digits)}`);
  const rows = data.agents.map(({ name, kind, score, ci95 }) => h("tr", {},
    td(dot(name), name, h("small", {}, kind)),
    drawn(range(score.achievement_rate, ci95.achievement_rate, colorOf(name)), percent(score.achievement_rate), span(ci95.achievement_rate, 1, 100)),
    td(score.crafter_score.toFixed(1), span(ci95.crafter_score, 1)),
    td(plain(score.reward, 2), span(ci95.reward, 2)),
    td(score.steps_mean.toFixed(0), span(ci95.steps_mean, 0)),
    td(percent(score.invalid_rate), span(ci95.invalid_rate, 1, 100)),
    td(whole(score.episodes))));
  $("results-table").append(table(head, rows));
  const last = data.agents.at(-1).name;
  data.replays.worlds.forEach(({ label }, value) => {
    if (!label.endsWith(` of ${last}`)) return;
    const watch = () => { $("world").value = value; chooseWorld(); $("replay").scrollIntoView(); };
    $("watch").append(h("button", { onclick: watch }, `Watch ${label.replace(/ of .*/, "")} world of ${last}`));
  });
}
/** A cell with a range and its figures: beside one another, on a phone below. */
const drawn = (bar, ...figures) => td(h("div", { className: "drawn" }, bar, h("div", {}, ...figures)));

function claims() {
  const pairs = Object.entries(data.differences).filter(([, row]) => row.pairs);
  if (!pairs.length) return;
  const most = Math.max(0.05, ...pairs.flatMap(([, row]) => row.ci95.map(Math.abs)));
  const line = ([pair, row]) => {
    const p = row.p_holm < 0.001 ? "< 0.001" : row.p_holm.toFixed(3);
    return h("tr", {}, td(pair.replace(" - ", " − ")),
      drawn(range(row.difference, row.ci95, row.p_holm < 0.05 ? "var(--c4)" : "var(--c0)", -most, most),
        points(row.difference), h("small", {}, `${points(row.ci95[0])} to ${points(row.ci95[1])}`)),
      td(p), td(`${row.better} : ${row.worse}`));
  };
  const head = () => [th("pair"), th("difference in percentage points", "wide"), th("p, corrected"), th("worlds better : worse")];
  const students = new Set(data.agents.filter((agent) => agent.kind === "student").map((agent) => agent.name));
  const between = pairs.filter(([pair]) => pair.split(" - ").every((name) => students.has(name)));
  const shown = between.length ? between : pairs;
  $("claims").append(h("div", { className: "scroll" }, table(head(), shown.map(line))));
  if (shown.length < pairs.length)
    $("claims").append(h("details", {}, h("summary", {}, `All ${pairs.length} pairs`), h("div", { className: "scroll" }, table(head(), pairs.map(line)))));
  $("claims").append(h("p", { className: "note" }, `A paired permutation test on the worlds that both have played; p by Holm’s correction for ${pairs.length} comparisons.`));
  if (data.warnings.length)
    $("claims").append(h("div", { className: "warnings", role: "note" }, ...data.warnings.map((text) => h("p", {}, text))));
}

function achievementBars() {
  const order = [...data.achievements].sort((a, b) => a.tier - b.tier || total(b.name) - total(a.name));
  const rows = order.map(({ name }) => h("tr", {}, td(words(name)), ...data.agents.map((agent) => {
    const value = agent.score.achievements[name], [low, high] = agent.ci95.achievements[name];
    const title = `${agent.name}, ${words(name)}: ${percent(value)}, 95 % interval ${percent(low)} to ${percent(high)}`;
    return td(h("span", { className: value ? "bar" : "bar none", title, color: colorOf(agent.name) },
      h("i", { style: { width: 100 * value + "%" } }), h("span", {}, value ? percent(value, 0) : "–")));
  })));
  $("bars").append(table([th(""), ...data.agents.map(({ name }) => h("th", { scope: "col" }, dot(name), name))], rows, "bars"));
}
const total = (name) => data.agents.reduce((sum, agent) => sum + agent.score.achievements[name], 0);

function techTree() {
  const nodes = new Map(data.achievements.map((node) => [node.name, { ...node }]));
  const needed = new Set(data.achievements.flatMap((node) => node.needs));
  const alone = [...nodes.values()].filter((node) => !node.needs.length && !needed.has(node.name));
  const linked = [...nodes.values()].filter((node) => !alone.includes(node));
  const tiers = 1 + Math.max(...linked.map((node) => node.tier));
  const [wide, high, across, down] = [128, 24 + 7 * data.agents.length, 148, 24 + 7 * data.agents.length + 22];
  let rows = 0;
  for (let tier = 0; tier < tiers; tier++) {
    const column = linked.filter((node) => node.tier === tier);
    rows = Math.max(rows, column.length);
  }
  for (let tier = 0; tier < tiers; tier++) {
    const column = linked.filter((node) => node.tier === tier);
    const mean = (node) => node.needs.length ? node.needs.reduce((sum, name) => sum + nodes.get(name).y, 0) / node.needs.length : 0;
    column.sort((a, b) => mean(a) - mean(b) || (a.name < b.name ? 1 : -1));
    column.forEach((node, place) => {
      node.x = 2 + tier * across;
      node.y = ((rows - column.length) / 2 + place) * down + 2;
    });
  }
  alone.forEach((node, place) => { node.x = 2 + place * across; node.y = rows * down + 20; });
  const height = rows * down + 20 + high + 4;
  const drawing = svg("svg", { viewBox: `0 0 ${tiers * across - across + wide + 4} ${height}`, role: "img", "aria-label": "Tech tree with each agent’s success" });
  for (const node of linked)
    for (const need of node.needs) {
      const from = nodes.get(need), [x1, y1, x2, y2] = [from.x + wide, from.y + high / 2, node.x, node.y + high / 2];
      drawing.append(svg("path", { class: "edge", d: `M${x1} ${y1}C${x1 + 16} ${y1} ${x2 - 16} ${y2} ${x2} ${y2}` }));
    }
  for (const node of nodes.values()) {
    const group = svg("g", { transform: `translate(${node.x} ${node.y})` });
    group.append(svg("rect", { class: "node", width: wide, height: high, rx: 6 }), svg("text", { x: 9, y: 16 }, words(node.name)));
    data.agents.forEach((agent, place) => {
      const value = agent.score.achievements[node.name], y = 23 + 7 * place;
      group.append(svg("rect", { class: "track", x: 9, y, width: wide - 18, height: 4, rx: 2 }));
      const bar = svg("rect", { x: 9, y, width: (wide - 18) * value, height: 4, rx: 2 }, svg("title", {}, `${agent.name}: ${percent(value)}`));
      bar.style.fill = colorOf(agent.name);
      group.append(bar);
    });
    drawing.append(group);
  }
  $("tree").append(legend(data.agents.map(({ name }) => [name, colorOf(name)])), drawing);
}
const legend = (entries) => h("div", { className: "legend" }, ...entries.map(([name, color]) => h("span", {}, h("span", { className: "dot", color }), name)));

function funnel() {
  const { decisions, episodes, split } = data.funnel;
  const read = decisions.read || 1;
  let left = read;
  const rows = [];
  const level = (label, number, width, lost = 0) => rows.push(
    h("span", { className: lost ? "lost" : "" }, label),
    h("span", { className: "level" }, h("i", { style: { width: (100 * width) / read + "%" } }),
      ...(lost ? [h("b", { style: { left: (100 * width) / read + "%", width: (100 * lost) / read + "%" } })] : [])),
    h("span", { className: lost ? "number lost" : "number" }, number));
  level("decisions read", whole(read), read);
  for (const [name, count] of Object.entries(decisions))
    if (name !== "read" && name !== "kept") { left -= count; level(words(name), "−" + whole(count), left, count); }
  level("kept", whole(decisions.kept || 0), decisions.kept || 0);
  level("to train on", whole(split.train_rows), split.train_rows);
  level("to validate on", whole(split.val_rows), split.val_rows);
  $("funnel").append(h("div", { className: "funnel" }, ...rows),
    h("p", { className: "note" }, `${whole(episodes.kept || 0)} of ${whole(episodes.read)} episodes kept; ${whole(split.val_seeds)} worlds are for validation alone.`));
}

function ticks(low, high, count = 4) {
  const raw = (high - low || 1) / count, unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function chart(title, series, across, up) {
  const drawn = series.filter(({ y }) => y && y.some((value) => value !== null));
  if (!drawn.length) return;
  const [width, height, left, bottom, top] = [480, 256, 46, 42, 22];
  const xs = drawn.flatMap(({ x }) => x), ys = drawn.flatMap(({ y }) => y).filter((value) => value !== null);
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) { x0 -= 1; x1 += 1; }
  const room = (y1 - y0 || Math.abs(y1) || 1) * 0.08;
  if (y0 < 0 || y0 - room > 0) y0 -= room; else y0 = 0;
  y1 += room;
  const X = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - 12);
  const Y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - bottom - top);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
  for (const value of ticks(y0, y1)) drawing.append(
    svg("line", { class: "axis", x1: left, x2: width - 12, y1: Y(value), y2: Y(value) }),
    svg("text", { class: "soft", x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, String(value)));
  for (const value of ticks(x0, x1, 5).filter(Number.isInteger)) drawing.append(svg("text", { class: "soft", x: X(value), y: height - bottom + 18, "text-anchor": "middle" }, whole(value)));
  drawing.append(
    svg("text", { class: "soft", x: (left + width - 12) / 2, y: height - 4, "text-anchor": "middle" }, across),
    svg("text", { class: "soft", x: 0, y: 10 }, up));
  for (const { name, x, y, color } of drawn) {
    const pairs = x.map((value, place) => [value, y[place]]).filter(([, value]) => value !== null);
    const line = svg("path", { d: pairs.map(([a, b], place) => (place ? "L" : "M") + X(a).toFixed(1) + " " + Y(b).toFixed(1)).join("") });
    line.style.stroke = color;
    drawing.append(line);
    if (pairs.length < 30) for (const [a, b] of pairs) {
      const point = svg("circle", { cx: X(a), cy: Y(b), r: 3 }, svg("title", {}, `${name}, ${across} ${whole(a)}: ${b}`));
      point.style.fill = color;
      drawing.append(point);
    }
  }
  $("curves").append(h("figure", {}, h("figcaption", {}, title), legend(drawn.map(({ name, color }) => [name, color])), drawing));
}

function curves() {
  const { sft_train: train, sft_val: val, sft_held_out: tried, distill, distill_train: distilled, rl, rl_training: moved, rl_held_out: held } = data.curves;
  const [train_, val_] = ["var(--c0)", "var(--c4)"];
  const pair = (column) => [{ name: "training", x: train.step, y: train[column], color: train_ }, { name: "held out", x: val.step, y: val[column], color: val_ }];
  const [step, iteration] = ["optimizer step", "iteration"];
  chart("SFT: loss", pair("loss"), step, "nats a token");
  chart("SFT: token accuracy", pair("token_accuracy"), step, "share of tokens");
  chart("SFT: achievements an episode", [{ name: "held out", x: tried.step || [], y: tried.achievements, color: val_ }], step, "of 22");
  chart("Distillation: loss on labels and rows of SFT", [{ name: "training", x: distilled.step, y: distilled.loss, color: train_ }], step, "nats a token");
  chart("Distillation: own decisions as the teacher's", [{ name: "agreement", x: distill.round, y: distill.agreement, color: val_ }], "round", "share of decisions");
  // Held-out worlds are played after so many iterations: 0 is the student that RL begins with.
  const played = (column) => [{ name: "training worlds", x: rl.iteration, y: rl[column], color: train_ }, { name: "held out", x: held.iteration || [], y: held[column], color: "var(--c5)" }];
  chart("RL: achievements an episode", played("achievements"), iteration, "of 22");
  chart("RL: reward an episode", played("reward"), iteration, "as rl.reward weighs it");
  const of = (columns) => Object.entries(columns).map(([column, color]) => ({ name: words(column), x: moved.iteration, y: moved[column], color }));
  chart("RL: distance from the student that it began with", of({ kl: "var(--c5)" }), iteration, "KL divergence, nats a token");
  chart("RL: entropy of a token", of({ entropy: "var(--c6)" }), iteration, "nats");
  chart("RL: clipped tokens", of({ clip_fraction: "var(--c3)" }), iteration, "share of tokens");
}

function agreement() {
  const { names, counts } = data.agreement;
  const all = counts.flat().reduce((sum, count) => sum + count, 0);
  const same = counts.reduce((sum, row, place) => sum + row[place], 0);
  $("agreement-note").textContent = all
    ? `Each row is what the teacher did in decisions held out from SFT, each column what the SFT student answers there, in percent of the row. They agree in ${percent(same / all)} of ${whole(all)}.`
    : "";
  const rows = counts.map((row, place) => {
    const sum = row.reduce((one, other) => one + other, 0);
    return h("tr", {}, h("th", { scope: "row" }, words(names[place])), ...row.map((count, column) => {
      const share = sum ? count / sum : 0;
      const title = `teacher ${words(names[place])}, student ${words(names[column])}: ${whole(count)} of ${whole(sum)}`;
      return h("td", { title, style: { background: `rgba(var(--shade), ${(share * 0.75).toFixed(3)})` } }, share >= 0.005 ? (100 * share).toFixed(0) : "");
    }));
  });
  $("agreement").append(table([th("teacher, student"), ...names.map((name) => h("th", { scope: "col" }, h("span", {}, words(name))))], rows, "matrix"));
}

const duration = (seconds) => seconds < 60 ? seconds.toFixed(1) + " s" : seconds < 3600 ? (seconds / 60).toFixed(1) + " min" : (seconds / 3600).toFixed(1) + " h";

function costs() {
  const longest = Math.max(1, ...data.times.map(({ seconds }) => seconds));
  const rows = data.times.map(({ stage, seconds, cores }) => h("tr", {}, td(stage),
    h("td", { className: "wide" }, h("span", { className: "bar", color: "var(--c4)", style: { height: "12px", minWidth: "60px" } }, h("i", { style: { width: (100 * seconds) / longest + "%" } }))),
    td(duration(seconds)), td(String(cores))));
  const all = data.times.reduce((sum, { seconds }) => sum + seconds, 0);
  rows.push(h("tr", { className: "total" }, td("together"), td(""), td(duration(all)), td("")));
  $("times").append(table([th("stage"), th("", "wide"), th("time"), th("cores")], rows),
    h("p", { className: "note" }, "Of each stage’s last run, where it ran. What had been played or trained before, and was only taken up again, isn’t in it."));
  const dollars = (value) => value === null || value === undefined ? "not known" : "$" + value.toFixed(value && value < 0.1 ? 4 : 2);
  const lines = Object.entries(data.costs.teachers).map(([name, row]) => ["collect " + name, row]);
  lines.push(...data.agents.map(({ name, play }) => ["benchmark " + name, play]));
  const spent = lines.map(([, row]) => row.cost_usd);
  const body = lines.map(([name, row]) => h("tr", {}, td(name), td(whole(row.decisions)), td(row.prompt_tokens ? whole(row.prompt_tokens + row.completion_tokens) : "–"), td(dollars(row.cost_usd))));
  const { decisions, cost_usd } = data.costs.distill;
  if (cost_usd) { body.push(h("tr", {}, td("distill"), td(whole(decisions)), td(""), td(dollars(cost_usd)))); }
  if (cost_usd !== undefined) spent.push(cost_usd);
  if (data.costs.judge_usd !== 0) { body.push(h("tr", {}, td("judge"), td(""), td(""), td(dollars(data.costs.judge_usd)))); spent.push(data.costs.judge_usd); }
  const sum = spent.some((value) => value === null) ? null : spent.reduce((one, other) => one + other, 0);
  body.push(h("tr", { className: "total" }, td("together"), td(""), td(""), td(dollars(sum))));
  $("costs").append(table([th("who"), th("decisions"), th("tokens"), th("paid")], body));
}

function published() {
  const { rows, sources, read, second_hand } = data.published;
  $("read").textContent = `Copied ${read}.`;
  const names = { achievement_rate: "achievement rate", crafter_score: "Crafter score", share_of_reward: "share of the largest reward" };
  const value = ({ metric, value, error }) => {
    const digits = metric === "crafter_score" ? 1 : 2;
    return value.toFixed(digits) + (error ? " ± " + error.toFixed(digits) : "") + (metric === "crafter_score" ? "" : " %");
  };
  const kind = ({ kind, temperature }) => kind + (temperature === undefined ? "" : `, temperature ${temperature.toFixed(1)}`);
  const source = (row) => `${row.source}, ${row.date}` + (second_hand.includes(row.source) ? ", second-hand" : "");
  const body = rows.map((row) => h("tr", {}, td(row.agent), td(value(row)), h("td", { className: "text" }, names[row.metric]),
    h("td", { className: "text" }, kind(row)), h("td", { className: "text", title: sources[row.source] }, source(row))));
  $("published-table").append(table([th("published result"), th("value"), th("metric", "text"), th("kind", "text"), th("source", "text")], body));
  $("published").append(...Object.entries(sources).map(([name, text]) => h("p", { className: "note" }, `${name}: ${text}.`)));
}

// Replays: one clock in environment steps for both panels.
const replay = { world: null, panels: [], now: 0, end: 0, timer: 0 };
const pictures = new Map();
const VITALS = ["health", "food", "drink", "energy"];

function picture(place) {
  if (!pictures.has(place)) {
    const image = new Image();
    image.src = "data:image/png;base64," + data.replays.sheets[place];
    image.decode().then(show);
    pictures.set(place, image);
  }
  return pictures.get(place);
}

function panel(episode) {
  const parts = {
    canvas: h("canvas", { width: data.replays.size, height: data.replays.size }), state: h("p", { className: "state" }),
    gauges: VITALS.map((name) => {
      const meter = h("meter", { min: 0, max: 9, low: 3, high: 5, optimum: 9, ariaLabel: name }), number = h("span");
      return { meter, number, row: h("div", { className: "gauge" }, h("span", {}, name), meter, number) };
    }),
    owned: h("div", { className: "chips owned" }), action: h("strong"), gained: h("span"), unlocked: h("div", { className: "chips" }),
    invalid: h("div", { className: "invalid" }), system: h("pre"), user: h("pre", { className: "prompt" }), reply: h("pre", { className: "reply" }),
  };
  parts.canvas.setAttribute("role", "img");
  const scripted = data.agents.some(({ name, kind }) => name === episode.agent && kind === "built in");
  const shown = { "image": "the picture and these words", "text+image": "the picture and these words", "text": "these words, no picture" }[episode.mode];
  const prompt = scripted
    ? [h("h4", {}, "Prompt"), h("pre", {}, "None: a built-in player looks at the state of the world itself.")]
    : [h("h4", {}, `Prompt: ${shown}` + (episode.scale > 1 && episode.mode !== "text" ? `, ${episode.scale} times as large` : "")), parts.user,
      h("details", {}, h("summary", {}, "System prompt"), parts.system)];
  const side = h("div", {}, ...parts.gauges.map(({ row }) => row), parts.owned,
    h("p", { className: "did" }, "does ", parts.action, parts.gained), parts.unlocked, parts.invalid);
  const picture_ = h("div", {}, parts.canvas);
  if (episode.columns.advantage) {
    parts.advantage = advantages(episode);
    picture_.append(parts.advantage.drawing);
  }
  parts.element = h("article", { className: "panel", ariaLabel: episode.agent },
    h("div", { className: "top" }, h("h3", {}, dot(episode.agent), episode.agent), parts.state),
    h("div", { className: "scene" }, picture_, side),
    h("div", { className: "words" }, ...prompt, h("h4", {}, "Reply"), parts.reply));
  return { episode, parts };
}

function advantages(episode) {
  const { advantage, step } = episode.columns, most = Math.max(1e-9, ...advantage.map(Math.abs));
  const drawing = svg("svg", { class: "advantage", viewBox: `0 0 ${replay.end} 64`, preserveAspectRatio: "none", role: "img", "aria-label": "Advantage of each decision" });
  advantage.forEach((value, place) => {
    const tall = (Math.abs(value) / most) * 30;
    const bar = svg("rect", { x: step[place], y: value > 0 ? 32 - tall : 32, width: Math.max(0.8, (step[place + 1] ?? step[place] + 1) - step[place] - 0.2), height: tall });
    bar.style.fill = value > 0 ? "var(--good)" : "var(--bad)";
    drawing.append(bar);
  });
  const cursor = svg("rect", { y: 0, width: Math.max(1, replay.end / 240), height: 64 });
  cursor.style.fill = "var(--ink)";
  cursor.style.opacity = 0.35;
  drawing.append(cursor);
  return { drawing, cursor };
}

/** The decision under way at an environment step: the last one that had begun. */
function decisionAt(steps, now) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= now) low = middle; else high = middle - 1;
  }
  return low;
}

function show() {
  const text = (place) => data.replays.texts[place];
  for (const { episode, parts } of replay.panels) {
    const { columns } = episode, at = decisionAt(columns.step, replay.now);
    const last = at === columns.step.length - 1;
    const context = parts.canvas.getContext("2d"), size = data.replays.size, frame = columns.picture[at];
    const image = picture(episode.sheets[Math.floor(frame / data.sheet)]);
    context.imageSmoothingEnabled = false;
    if (image.complete && image.naturalWidth) context.drawImage(image, 0, (frame % data.sheet) * size, size, size, 0, 0, size, size);
    const unlocked = columns.unlocked.slice(0, at + 1).flat();
    const reward = columns.reward.slice(0, at + 1).reduce((sum, value) => sum + value, 0);
    const over = last && replay.now > columns.step[at] ? (episode.decisions > columns.step.length ? ", the rest isn’t shown" : { died: ", died", calls: ", no calls left" }[episode.ending] ?? ", time is up") : "";
    parts.state.textContent = `step ${columns.step[at]} of ${episode.length}, ${unlocked.length} achievements, reward ${reward.toFixed(1)}${over}`;
    parts.canvas.setAttribute("aria-label", `The world at step ${columns.step[at]}`);
    VITALS.forEach((name, place) => { parts.gauges[place].meter.value = columns.vitals[at][place]; parts.gauges[place].number.textContent = columns.vitals[at][place]; });
    const owned = Object.entries(JSON.parse(text(columns.inventory[at])));
    parts.owned.replaceChildren(...owned.map(([name, count]) => h("span", { className: "chip" }, words(name) + " ", h("b", {}, String(count)))));
    parts.action.textContent = text(columns.executed[at]);
    const gain = columns.reward[at], worth = columns.advantage?.[at];
    const amount = (label, value, digits) => h("span", { className: value > 0 ? "plus" : value < 0 ? "minus" : "" }, `${label} ${signed(value, digits)}`);
    parts.gained.replaceChildren(amount("reward", gain, 1), ...(worth === undefined || worth === null ? [] : [", ", amount("advantage", worth, 2)]));
    parts.unlocked.replaceChildren(...columns.unlocked[at].map((name) => h("span", { className: "chip new" }, words(name))));
    parts.invalid.textContent = text(columns.invalid[at]) ? `Not a valid reply: ${text(columns.invalid[at])}` : "";
    parts.system.textContent = text(columns.system[at]);
    parts.user.textContent = text(columns.user[at]);
    parts.reply.textContent = text(columns.reply[at]);
    parts.advantage?.cursor.setAttribute("x", columns.step[at]);
  }
  $("scrub").value = replay.now;
  $("clock").textContent = `step ${replay.now} of ${replay.end}`;
}

function go(now) {
  replay.now = Math.max(0, Math.min(replay.end, now));
  show();
}
/** Go by decisions, of whichever panel has the next one. */
function move(decisions) {
  const steps = [...new Set([...replay.panels.flatMap(({ episode }) => episode.columns.step), replay.end])].sort((a, b) => a - b);
  const at = decisionAt(steps, replay.now);
  const from = decisions < 0 && steps[at] < replay.now ? at + 1 : at;
  go(steps[Math.max(0, Math.min(steps.length - 1, from + decisions))]);
}
function pause() {
  clearInterval(replay.timer);
  replay.timer = 0;
  $("play").textContent = "Play";
}
function play() {
  if (replay.timer) return pause();
  if (replay.now >= replay.end) go(0);
  $("play").textContent = "Pause";
  replay.timer = setInterval(() => { move(1); if (replay.now >= replay.end) pause(); }, 1000 / Number($("speed").value));
}

function choose() {
  const { episodes } = replay.world;
  const chosen = [episodes[$("left").value], episodes[$("right").value]].filter(Boolean);
  // As far as the recorded decisions go; one step more shows how it ended.
  const ends = chosen.map((episode) => episode.decisions > episode.columns.step.length ? episode.columns.step.at(-1) + 1 : episode.length);
  replay.end = Math.max(...ends);
  replay.panels = chosen.map(panel);
  $("panels").replaceChildren(...replay.panels.map(({ parts }) => parts.element));
  $("panels").className = chosen.length > 1 ? "panels" : "panels alone";
  $("scrub").max = replay.end;
  $("marks").replaceChildren(...chosen.flatMap((episode) => episode.columns.unlocked.flatMap((names, place) => names.length
    ? [h("i", { color: colorOf(episode.agent), title: names.join(", "), style: { left: (100 * episode.columns.step[place]) / replay.end + "%" } })] : [])));
  go(replay.now);
}

function chooseWorld() {
  const world = data.replays.worlds[$("world").value], before = replay.world;
  const kept = (id) => before?.episodes[$(id).value]?.agent;
  const [left, right] = [kept("left"), kept("right")];
  replay.world = world;
  const names = world.episodes.map(({ agent, achievements }) => `${agent}, ${achievements} achievements`);
  $("left").replaceChildren(...names.map((name, value) => h("option", { value }, name)));
  $("right").replaceChildren(h("option", { value: -1 }, "nobody"), ...names.map((name, value) => h("option", { value }, name)));
  const find = (name, otherwise) => { const at = world.episodes.findIndex(({ agent }) => agent === name); return at < 0 ? otherwise : at; };
  const count = world.episodes.length;
  $("left").value = find(left, world.rollouts ? 0 : count - 1);
  $("right").value = before && right === undefined && !world.rollouts ? -1 : find(right, world.rollouts ? count - 1 : Math.max(0, count - 2));
  pause();
  replay.now = 0;
  choose();
}

function keys(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.("select, pre, summary, a")) return;
  if (event.key === " " && event.target.closest?.("button") && event.target.id !== "play") return;
  const far = event.shiftKey ? 10 : 1;
  const action = { " ": play, ArrowLeft: () => { pause(); move(-far); }, ArrowRight: () => { pause(); move(far); }, Home: () => { pause(); go(0); }, End: () => { pause(); go(replay.end); } }[event.key];
  if (!action) return;
  // Home and End belong to the page, unless the replay is in view.
  const box = $("replay").getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight) return;
  event.preventDefault();
  action();
}

function replays() {
  data.replays.worlds.forEach(({ seed, label }, value) => $("world").append(h("option", { value }, `${seed}` + (label ? ` (${label})` : ""))));
  $("world").onchange = chooseWorld;
  $("left").onchange = $("right").onchange = () => { pause(); choose(); };
  $("play").onclick = play;
  const click = { first: () => go(0), back: () => move(-1), forward: () => move(1), last: () => go(replay.end) };
  for (const [id, action] of Object.entries(click)) $(id).onclick = () => { pause(); action(); };
  $("speed").onchange = () => { if (replay.timer) { pause(); play(); } };
  $("scrub").oninput = () => { pause(); go(Number($("scrub").value)); };
  document.addEventListener("keydown", keys);
  chooseWorld();
}

/** A cue at each part that goes on to the right of what is seen. */
function cues() {
  for (const box of document.querySelectorAll(".scroll")) {
    const cue = h("p", { className: "cue", hidden: true }, "More to the right: swipe or scroll →");
    box.before(cue);
    const look = () => {
      const more = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("more", more && box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
      cue.hidden = !more;
    };
    box.addEventListener("scroll", look, { passive: true });
    new ResizeObserver(look).observe(box);
  }
}

for (const draw of [headline, results, claims, replays, achievementBars, techTree, funnel, curves, agreement, costs, published, cues]) draw();
