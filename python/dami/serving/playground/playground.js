"use strict";

const MOST = 6; // answers side by side: a browser opens no more connections to one server
const COLORS = [[59, 76, 192], [170, 130, 190], [180, 4, 38]]; // λ = 0, 0.5, 1: cool to warm
const WRAP = [16, 0.25]; // tokens that a thought still gets to wrap up: at least so many, or this share of what it has
const LEFT = 52; // where the frontier's axis of tokens begins, in pixels
const $ = (id) => document.getElementById(id);

let model = null;
let names = []; // of intensities that the server knows besides numbers
let asking = null; // what aborts the requests that run

// ---------------------------------------------------------------- what the server has

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw await failure(response);
  return response.json();
}

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON, or another: the status has to do
  }
  if (response.status === 401) {
    document.querySelector(".settings").open = true;
    $("key").focus();
  }
  return new Error(message || `the server answered ${response.status} ${response.statusText}`);
}

async function meet() {
  try {
    const { id, intensity } = (await get("v1/models")).data[0];
    model = id;
    names = [...(intensity.auto ? ["auto"] : []), ...Object.keys(intensity.presets)];
    for (const id of ["number", "prompt-number"]) [$(id).min, $(id).max] = intensity.range;
    const read = intensity.presets[intensity.prompt] ?? intensity.prompt;
    if (typeof read === "number") {
      $("own").checked = true;
      $("prompt-slider").value = $("prompt-number").value = read;
      showReading();
    }
    $("model").textContent = `Model: ${model}`;
    document.title = `${model} · dami playground`;
    $("lams-names").textContent = names.length ? ` or ${names.join(", ")}` : "";
    showNames();
    if (intensity.frontier) showFrontier((await get("v1/frontier")).points);
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

function showNames() {
  const choice = (value, text, checked) => {
    const radio = make("input", { type: "radio", name: "name", value, checked });
    const label = make("label", {}, radio, ` ${text}`);
    return label;
  };
  $("names").replaceChildren(
    $("names").querySelector("legend"), choice("", "as the slider says", true), ...names.map((name) => choice(name, name, false)),
  );
  $("names").hidden = !names.length;
}

// ---------------------------------------------------------------- right answers

/** What a sum such as "2 + 3 - 4 =" at the end of a prompt comes to; "" if there is none. */
function sumOf(prompt) {
  const sum = /(?<!(?:[*/^×÷%(\d.,+-]|\b[a-zA-Z])\s*)-?\d+(?:\s*[-+]\s*\d+)+(?=\s*=?\s*$)/; // not the end of a longer term
  const terms = prompt.match(sum)?.[0].match(/[-+]?\s*\d+/g);
  return terms ? String(terms.reduce((sum, term) => sum + Number(term.replace(/\s/g, "")), 0)) : "";
}

/** As the verifier `word` of `dami evaluate`: whether the last number, or else the last word, is the known one. */
function isRight(text, known) {
  const pattern = /^-?\d+$/.test(known) ? /-?\d+/g : /[\p{L}\p{N}_]+/gu;
  return (text.replaceAll(",", "").match(pattern) ?? []).at(-1) === known;
}

// ---------------------------------------------------------------- asking

function wanted() {
  if (view() === "one") {
    return [$("ask").elements.name?.value || Number($("number").value)];
  }
  const given = $("lams").value.split(",").map((part) => part.trim()).filter(Boolean);
  for (const part of given) {
    if (!names.includes(part) && !(Math.abs(Number(part)) < Infinity)) {
      throw new RangeError(`"${part}" is neither a number${names.length ? ` nor one of ${names.join(", ")}` : ""}`);
    }
  }
  const lams = [...new Set(given.map((part) => (names.includes(part) ? part : Number(part))))];
  if (!lams.length || lams.length > MOST) throw new RangeError(`one to six intensities, please, not ${lams.length}`);
  return lams;
}

function body(lam) {
  const number = (id) => ($(id).value === "" ? {} : { [id.replace("-", "_")]: Number($(id).value) });
  return {
    model,
    messages: [{ role: "user", content: $("prompt").value }],
    intensity: lam,
    prompt_intensity: $("own").checked ? Number($("prompt-number").value) : "same",
    stream: true,
    stream_options: { include_usage: true },
    ...number("max-tokens"), ...number("temperature"), ...number("seed"),
  };
}

async function ask(event) {
  event.preventDefault();
  if (asking) return;
  if (!model) await meet(); // the server was not there, or wanted a key
  if (!model) return;
  let lams;
  try {
    lams = wanted();
  } catch (error) {
    say(error.message, true);
    $("lams").focus();
    return;
  }
  asking = new AbortController();
  busy(true);
  say(lams.length > 1 ? `${lams.length} answers on their way` : "The answer is on its way");
  const answers = lams.map((lam) => new Answer(lam));
  $("answers").replaceChildren(...answers.map((answer) => answer.card));
  const ends = await Promise.all(answers.map((answer) => answer.stream(asking.signal)));
  asking = null;
  busy(false);
  const done = ends.filter(Boolean).length;
  const [prompts, shared] = ["prompt", "shared"].map((name) => answers.reduce((sum, answer) => sum + answer[name], 0));
  const saved = shared ? `: ${shared} of the prompts' ${prompts} tokens did not have to be read` : "";
  say(done === ends.length ? `Done${saved}` : `${done} of ${ends.length} answers came to their end`, done < ends.length);
}

function busy(yes) {
  $("run").disabled = yes;
  $("stop").disabled = !yes;
  $("answers").setAttribute("aria-busy", yes);
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

/** One λ's answer: its card, and the stream that fills it. */
class Answer {
  constructor(lam) {
    this.lam = lam;
    this.tokens = this.thinking = 0; // one for each event, until the server has counted
    this.prompt = this.shared = 0; // tokens of the prompt, and those that the server knew already
    this.title = make("span");
    this.state = make("small");
    this.summary = make("summary", {}, "Thought");
    this.thought = make("div", { className: "text thought", tabIndex: 0 });
    this.details = make("details", { hidden: true }, this.summary, this.thought);
    this.text = make("div", { className: "text" });
    this.verdict = make("p", { className: "verdict", hidden: true });
    this.known = $("known").value.trim();
    this.counts = make("p", { className: "counts" });
    const { min, max } = $("slider");
    this.dial = make("input", { type: "range", min, max, step: 0.05 });
    this.wrap = make("button", { type: "button" }, "Wrap it up");
    this.controls = make("p", { className: "dial", hidden: true }, this.dial, this.wrap);
    this.dial.addEventListener("input", () => this.turn({ intensity: Number(this.dial.value) }));
    this.wrap.addEventListener("click", () => {
      this.turn({ wrap_up: Math.max(WRAP[0], Math.round(WRAP[1] * this.thinking)) });
      this.wrap.disabled = true;
    });
    this.card = make(
      "article", { className: "answer" },
      make("h2", {}, this.title, this.state), this.controls, this.details, this.text, this.verdict, this.counts,
    );
    this.name(lam);
    this.state.textContent = "waiting";
  }

  name(lam) {
    const asked = typeof this.lam === "string" ? `${this.lam}: ` : "";
    const given = typeof lam === "number" ? `λ = ${round(lam)}` : "";
    this.granted ??= this.id && lam;
    const isLowered = typeof this.lam === "number" && this.granted !== undefined && this.granted !== this.lam;
    const lowered = isLowered ? `, asked for ${round(this.lam)}` : "";
    this.title.textContent = (asked + given + lowered).replace(/: $/, "");
    this.card.style.setProperty("--lam", typeof lam === "number" ? color(lam) : "var(--muted)");
    this.card.setAttribute("aria-label", `Answer, ${this.title.textContent}`);
    this.dial.setAttribute("aria-label", `λ of the answer, ${this.title.textContent}`);
    if (typeof lam === "number" && document.activeElement !== this.dial) this.dial.value = lam;
  }

  /** Changes the answer from its next token on. While one change is on its way, only the latest other waits. */
  async turn(change) {
    const sending = this.change !== undefined;
    this.change = { ...this.change, ...change };
    while (!sending && Object.keys(this.change).length) {
      const sent = this.change;
      this.change = {};
      try {
        await this.send(sent);
      } catch (error) {
        say(error.message, true);
      }
    }
    if (!sending) this.change = undefined;
  }

  async send(change) {
    const response = await fetch(`v1/requests/${this.id}/dial`, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(change),
    });
    if (!response.ok && response.status !== 404) throw await failure(response); // 404: the answer has ended
  }

  /** Whether the answer came to its end. */
  async stream(signal) {
    this.began = performance.now();
    try {
      const response = await fetch("v1/chat/completions", {
        method: "POST", signal,
        headers: { "Content-Type": "application/json", ...headers() },
        body: JSON.stringify(body(this.lam)),
      });
      if (!response.ok) throw await failure(response);
      for await (const chunk of events(response.body)) this.take(chunk);
      this.controls.hidden = true;
      this.state.textContent = this.reason === "length" ? "cut off" : "done";
      this.count();
      this.judge();
      return true;
    } catch (error) {
      this.controls.hidden = true;
      this.state.textContent = signal.aborted ? "stopped" : "failed";
      if (!signal.aborted) this.text.append(make("p", { className: "error" }, error.message));
      return false;
    }
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    this.id = chunk.id;
    this.controls.hidden = false;
    if (typeof chunk.intensity === "number") this.name(chunk.intensity);
    if (chunk.usage) {
      this.tokens = chunk.usage.completion_tokens;
      this.thinking = chunk.usage.completion_tokens_details.reasoning_tokens;
      this.prompt = chunk.usage.prompt_tokens;
      this.shared = chunk.usage.prompt_tokens_details.cached_tokens;
    }
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { reasoning_content: thought, content } = choice.delta;
    if (thought) {
      this.details.hidden = false;
      this.thought.append(thought);
      this.thinking += 1;
      this.state.textContent = "thinking";
    }
    if (content) {
      this.text.append(content);
      this.state.textContent = "answering";
    }
    if (thought || content) {
      this.last = performance.now();
      this.tokens += 1;
    }
    this.reason = choice.finish_reason ?? this.reason;
    this.count();
  }

  judge() {
    if (!this.known) return;
    const right = isRight(this.text.textContent, this.known);
    this.verdict.textContent = right ? "✓ right" : `✗ wrong, the answer is ${this.known}`;
    this.verdict.classList.toggle("right", right);
    this.verdict.hidden = false;
  }

  count() {
    if (this.thinking) this.summary.textContent = `Thought, ${plural(this.thinking, "token")}`;
    const parts = [plural(this.tokens, "token")];
    if (this.last) {
      const seconds = (this.last - this.began) / 1000;
      parts.push(`${seconds.toFixed(1)} s`, `${(this.tokens / seconds).toFixed(0)} tokens/s`);
    }
    if (this.shared) parts.push(`${this.shared} of ${plural(this.prompt, "prompt token")} not read again`);
    this.counts.textContent = parts.join(" · ");
  }
}

/** The JSON of every server-sent event, up to [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ---------------------------------------------------------------- the frontier

function showFrontier(points) {
  for (const { intensity, tokens, accuracy } of points) {
    $("points").append(make(
      "tr", {}, make("td", {}, round(intensity)),
      make("td", {}, span(tokens, 1, 1)), make("td", {}, `${span(accuracy, 100, 0)} %`),
    ));
  }
  $("frontier-caption").textContent =
    `Each point is a fixed λ, from ${round(points[0].intensity)} to ${round(points.at(-1).intensity)}; bars hold 95 %.`;
  $("frontier").hidden = false;
  new ResizeObserver(() => drawFrontier(points)).observe($("picture").parentElement);
}

/** Draws the frontier as wide as there is room, in letters of one size. */
function drawFrontier(points) {
  const picture = $("picture");
  const width = picture.parentElement.clientWidth;
  const height = Math.min(340, Math.max(240, 0.55 * width));
  picture.replaceChildren();
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const [left, right, top, bottom] = [LEFT, width - 12, 32, height - 48];
  const most = 1.08 * Math.max(...points.map((point) => point.tokens[2]));
  const x = (tokens) => left + ((right - left) * tokens) / most;
  const y = (accuracy) => bottom - (bottom - top) * accuracy;
  const draw = (tag, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    picture.append(element);
    return element;
  };

  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    draw("line", { class: share ? "grid" : "axis", x1: left, x2: right, y1: y(share), y2: y(share) });
    draw("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`);
  }
  for (const tokens of ticks(most)) {
    draw("line", { class: "axis", x1: x(tokens), x2: x(tokens), y1: bottom, y2: bottom + 5 });
    draw("text", { x: x(tokens), y: bottom + 20, "text-anchor": "middle" }, tokens);
  }
  draw("text", { x: (left + right) / 2, y: height - 8, "text-anchor": "middle" }, "tokens per answer");
  draw("text", { x: 2, y: 14 }, "right answers");
  const way = points.map((point) => `${x(point.tokens[0])},${y(point.accuracy[0])}`).join(" ");
  draw("polyline", { class: "way", points: way });
  for (const { intensity, tokens, accuracy } of points) {
    const [cx, cy] = [x(tokens[0]), y(accuracy[0])];
    const ink = { stroke: color(intensity), "stroke-width": 1.5, opacity: 0.6 };
    draw("line", { ...ink, x1: x(tokens[1]), x2: x(tokens[2]), y1: cy, y2: cy });
    draw("line", { ...ink, x1: cx, x2: cx, y1: y(accuracy[1]), y2: y(accuracy[2]) });
    draw("circle", { cx, cy, r: 5.5, fill: color(intensity) });
  }
  nameDots(points.map(({ intensity, tokens, accuracy }, i) => {
    const name = i && i < points.length - 1 ? round(intensity) : `λ = ${round(intensity)}`;
    return [x(tokens[0]), y(accuracy[0]), name];
  }), draw);
}

/** Writes λ beside each dot where there is room; first and last have it before the others. */
function nameDots(dots, draw) {
  const taken = [];
  const clear = (box, except) =>
    taken.every((other) => box[0] > other[2] || other[0] > box[2] || box[1] > other[3] || other[1] > box[3]) &&
    dots.every(([cx, cy], i) => i === except || cx + 6 < box[0] || cx - 6 > box[2] || cy + 6 < box[1] || cy - 6 > box[3]);
  for (const i of new Set([0, dots.length - 1, ...dots.keys()])) {
    const [cx, cy, name] = dots[i];
    const size = 7.5 * name.length;
    const places = [[cx - 6 - size, cy - 8], [cx + 6, cy + 18], [cx - size / 2, cy - 12], [cx - size / 2, cy + 22]];
    const place = places.find(([left, base]) => left > LEFT && clear([left, base - 11, left + size, base + 2], i));
    if (!place) continue;
    taken.push([place[0] - 2, place[1] - 13, place[0] + size + 2, place[1] + 4]);
    draw("text", { class: "lam", x: place[0], y: place[1] }, name);
  }
}

function ticks(end) {
  const raw = end / 5;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  return Array.from({ length: Math.floor(end / step) + 1 }, (_, i) => i * step);
}

function span([value, low, high], scale, digits) {
  const text = (number) => (scale * number).toFixed(digits);
  return `${text(value)} (${text(low)}–${text(high)})`;
}

// ---------------------------------------------------------------- pieces

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function color(lam) {
  const place = 2 * Math.min(Math.max(lam, 0), 1);
  const low = Math.min(Math.floor(place), 1);
  const mixed = COLORS[low].map((channel, i) => Math.round(channel + (COLORS[low + 1][i] - channel) * (place - low)));
  return `rgb(${mixed.join(" ")})`;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function round(number) {
  return String(Number(number.toFixed(3)));
}

function view() {
  return $("ask").elements.view.value;
}

function showView() {
  $("one").hidden = view() !== "one";
  $("several").hidden = view() !== "compare";
  $("number").disabled = view() !== "one"; // a hidden field cannot hold the form up
}

function showReading() {
  $("reading").hidden = !$("own").checked;
  $("prompt-number").disabled = !$("own").checked;
}

$("ask").addEventListener("submit", ask);
$("stop").addEventListener("click", () => asking?.abort());
for (const kind of ["", "prompt-"]) {
  const [slider, number] = [$(`${kind}slider`), $(`${kind}number`)];
  slider.addEventListener("input", () => (number.value = slider.value));
  number.addEventListener("input", () => (slider.value = number.value));
}
$("own").addEventListener("change", showReading);
$("prompt").addEventListener("input", () => ($("known").value = sumOf($("prompt").value)));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
for (const radio of document.getElementsByName("view")) radio.addEventListener("change", showView);

showView();
showReading();
$("known").value ||= sumOf($("prompt").value);
meet();
