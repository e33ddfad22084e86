// The page: sends jobs to /v1/jobs, follows one by its events, and shows what the API says.  No library, no build.

import { StreamPlayer } from "./stream.js";

const $ = (id) => document.getElementById(id);
const OVER = ["completed", "failed", "cancelled"];
let current = null;
let listening = null;
let shown = null; // which video is in the player
let player = null;

$("token").value = localStorage.getItem("token") ?? "";
$("token").addEventListener("change", () => { localStorage.setItem("token", $("token").value); refresh(); });

const headers = () => ($("token").value ? { Authorization: `Bearer ${$("token").value}` } : {});

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  const body = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(body?.error?.message ?? `the server answered ${answer.status}`);
  return body;
}

function clock(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

// Live regions are read out whenever they are set: only for what is new.
function say(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function words(job) {
  if (job.state === "queued") return job.position ? `waiting, ${job.position} before it` : "next in the queue";
  if (job.state === "failed") return `failed: ${job.error?.message ?? ""}`;
  if (job.state === "cancelled") return "cancelled";
  if (job.state === "completed") return `done: ${job.result.frames} frames, ${clock(job.result.duration)}`;
  const left = job.eta_seconds ? `, about ${clock(job.eta_seconds)} left` : "";
  return `${job.stage}, ${Math.floor(job.progress)} %${left}`;
}

async function refresh() {
  try {
    const ready = await fetch("ready").then((answer) => answer.json());
    const state = ready.ready
      ? `${ready.gpus} GPU${ready.gpus === 1 ? "" : "s"}, ${ready.in_progress} in work, ${ready.queued} waiting`
      : `not ready: ${ready.reasons.join("; ")}`;
    const page = await ask("v1/jobs?limit=20");
    $("none").hidden = page.jobs.length > 0;
    const focused = document.activeElement?.dataset.job; // by who uses the keyboard
    $("jobs").replaceChildren(...page.jobs.map(row));
    $("jobs").querySelector(`[data-job="${focused}"]`)?.focus();
    say("readiness", state);
  } catch (error) {
    say("readiness", error.message);
  }
}

function row(job) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.job = job.id;
  button.setAttribute("aria-current", String(job.id === current));
  const when = document.createElement("span");
  when.textContent = new Date(job.created * 1000).toLocaleTimeString();
  const what = document.createElement("span");
  what.textContent = words(job);
  what.className = job.state;
  const name = document.createElement("code");
  name.textContent = job.id.slice(0, 8);
  button.append(when, what, name);
  button.addEventListener("click", () => open(job.id));
  item.append(button);
  return item;
}

async function open(id) {
  current = id;
  unload();
  listening?.abort();
  listening = new AbortController();
  const { signal } = listening; // another job may be opened while this one is fetched
  $("job").hidden = false;
  $("log").replaceChildren();
  try {
    await show(id);
  } catch (error) {
    if (!signal.aborted) $("summary").textContent = `${error.message}; trying again`;
  }
  if (signal.aborted) return;
  $("job-title").focus();
  follow(id, signal);
}

async function show(id) {
  const job = await ask(`v1/jobs/${id}`);
  if (id !== current) return job;
  const over = OVER.includes(job.state);
  $("job-title").textContent = `Job ${id.slice(0, 8)}`;
  $("summary").textContent = words(job);
  $("summary").className = job.state;
  say("said", OVER.includes(job.state) ? words(job) : job.stage);
  $("bar").value = job.progress;
  $("cancel").hidden = over;
  $("retry").hidden = !["failed", "cancelled"].includes(job.state);
  lanes(job);
  watch(job);
  const seams = job.result?.seams ?? [];
  $("seams").hidden = seams.length === 0;
  $("seams").querySelector("tbody").replaceChildren(...seams.map((seam) => {
    const line = document.createElement("tr");
    for (const value of [seam.frame, seam.method, seam.jump, seam.natural, seam.colour_step, seam.verdict]) {
      const cell = document.createElement("td");
      cell.textContent = value;
      line.append(cell);
    }
    line.lastChild.className = seam.verdict === "good" ? "good" : "bad";
    return line;
  }));
  return job;
}

// Addresses of the API, from where the page is.
const local = (address) => address?.replace(/^\//, "");

function unload() {
  player?.stop();
  player = shown = null;
  $("video").removeAttribute("src");
  $("video").load();
  $("front").textContent = "";
  $("picture").open = false;
  $("seams-picture").removeAttribute("src");
}

// The final video when it is there, before that what is finished of it; who watches goes on at the same place.
function watch(job) {
  const video = $("video");
  $("download").hidden = !job.video;
  $("player").hidden = !job.video && !job.stream;
  $("picture").hidden = !job.seams;
  const wanted = job.video ? `video ${job.finished}` : job.stream && `stream ${job.id}`;
  const again = job.video && !job.finished && shown?.startsWith("video"); // a redo: the old one stays until the end
  if (!wanted || wanted === shown || again) return;
  const [at, plays] = [video.currentTime, !video.paused && !video.ended];
  unload();
  shown = wanted;
  if (job.video) {
    $("download").href = video.src = local(job.video);
    $("seams-picture").dataset.src = local(job.seams) ?? "";
    if (at) video.currentTime = at;
    if (plays) video.play().catch(() => {}); // a browser may forbid it; the button is there
    return;
  }
  const last = job.detail.segments?.at(-1);
  const total = last ? (last.first_frame + last.frames) / 25 : null;
  player = new StreamPlayer(video, local(job.stream), total, (finished, error) => {
    $("front").textContent = error
      ? `Preview: ${error.message}; trying again`
      : `Preview: ${clock(finished)}${total ? ` of ${clock(total)}` : ""} can be watched already`;
  });
}

// A row for each GPU, by number, then what waits, then what an earlier start of the job has finished.
function lanes(job) {
  const rows = new Map();
  for (const segment of job.detail.segments ?? []) {
    const row = segment.gpu ?? (segment.stage === "finished" ? Infinity : Number.MAX_VALUE);
    rows.set(row, [...(rows.get(row) ?? []), segment]);
  }
  $("lanes").replaceChildren(...[...rows].sort(([a], [b]) => a - b).map(([row, segments]) => {
    const lane = document.createElement("div");
    lane.className = "lane";
    const label = document.createElement("strong");
    label.textContent = { [Infinity]: "done", [Number.MAX_VALUE]: "waiting" }[row] ?? `GPU ${row}`;
    const parts = document.createElement("div");
    parts.className = "parts";
    parts.append(...segments.map(part));
    lane.append(label, parts);
    return lane;
  }));
}

// A segment: a box for each of its windows.
function part(segment) {
  const box = document.createElement("span");
  box.className = "part";
  box.setAttribute("role", "img");
  const [done, all] = [segment.windows_done, segment.windows];
  box.setAttribute("aria-label", `segment ${segment.index}: ${done} of ${all} windows`);
  box.title = `segment ${segment.index}, frames ${segment.first_frame} to ${segment.first_frame + segment.frames}`;
  const name = document.createElement("span");
  name.textContent = `segment ${segment.index}`;
  box.append(name);
  for (let window = 0; window < all; window += 1) {
    const bar = document.createElement("i");
    if (window < done) bar.className = "done";
    else if (window === done && segment.stage === "rendering") {
      bar.className = "now";
      bar.style.setProperty("--share", `${100 * segment.fraction}%`);
    }
    box.append(bar);
  }
  return box;
}

// Server-sent events by hand: EventSource can't send the token.
async function follow(id, signal) {
  let last = 0;
  while (!signal.aborted) {
    try {
      const answer = await fetch(`v1/jobs/${id}/events`, { headers: { ...headers(), "Last-Event-ID": String(last) }, signal });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        text += value;
        const blocks = text.split("\n\n");
        text = blocks.pop();
        for (const block of blocks) {
          const event = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s).slice(0, 2)));
          if (!event.id) continue;
          last = event.id;
          if (event.event === "log") {
            const line = document.createElement("li");
            line.textContent = JSON.parse(event.data).message;
            $("log").append(line);
          }
        }
        await show(id);
      }
      const job = await show(id);
      refresh();
      if (OVER.includes(job.state)) return;
    } catch (error) {
      if (signal.aborted) return;
      $("summary").textContent = `${error.message}; trying again`;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

async function act(verb) {
  try {
    await ask(`v1/jobs/${current}/${verb}`, { method: "POST" });
    await (verb === "retry" ? open(current) : show(current));
    refresh();
  } catch (error) {
    $("summary").textContent = error.message;
  }
}
// Drawing it takes the server a while: only for who wants to see it.
$("picture").addEventListener("toggle", () => {
  const picture = $("seams-picture");
  if ($("picture").open && picture.dataset.src) picture.src = picture.dataset.src;
});
$("cancel").addEventListener("click", () => act("cancel"));
$("retry").addEventListener("click", () => act("retry"));

// --- the form -----------------------------------------------------------------------------------------------

const form = $("form");

form.addEventListener("submit", (event) => {
  event.preventDefault();
  $("error").textContent = "";
  const data = new FormData();
  const picture = form.picture.files[0];
  data.append(picture.type.startsWith("video/") ? "video" : "image", picture);
  data.append("audio", form.audio.files[0]);
  const two = form.audio_2.files.length > 0;
  if (two) data.append("audio_2", form.audio_2.files[0]);
  for (const name of ["size", "aspect", "preset", "prompt", ...(two ? ["audio_order", "box_1", "box_2"] : [])]) {
    if (form[name].value && !(name === "size" && !form.size.value)) data.append(name, form[name].value);
  }
  // XMLHttpRequest, because fetch does not tell how far an upload is.
  const request = new XMLHttpRequest();
  request.open("POST", "v1/jobs");
  for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
  request.setRequestHeader("Idempotency-Key", crypto.randomUUID?.() ?? String(Math.random()));
  $("upload").hidden = false;
  request.upload.onprogress = (seen) => { $("upload").value = seen.total ? seen.loaded / seen.total : 0; };
  request.onerror = () => { $("upload").hidden = true; $("error").textContent = "the server can't be reached"; };
  request.onload = async () => {
    $("upload").hidden = true;
    let body = {};
    try { body = JSON.parse(request.responseText); } catch { /* told below */ }
    if (request.status >= 300) {
      $("error").textContent = body.error?.message ?? `the server answered ${request.status}`;
      return;
    }
    await open(body.id);
    refresh();
  };
  request.send(data);
});

for (const drop of document.querySelectorAll(".drop")) {
  const input = drop.querySelector("input");
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
}

form.addEventListener("change", () => {
  const picture = form.picture.files[0];
  const still = picture && !picture.type.startsWith("video/");
  $("boxes").hidden = form.audio_2.files.length === 0;
  $("stage").hidden = !still;
  if (still && $("preview").dataset.name !== picture.name + picture.size) {
    $("preview").dataset.name = picture.name + picture.size;
    $("preview").src = URL.createObjectURL(picture);
  }
});

$("preview").addEventListener("error", () => { $("stage").hidden = true; }); // no picture: the server says so

// Boxes are drawn on the preview, and are pixels of the picture itself.
let from = null;
const point = (event) => {
  const place = $("drawn").getBoundingClientRect();
  const across = $("preview").naturalWidth / place.width;
  const at = (value, most) => Math.max(0, Math.min(most, Math.round(value * across)));
  return [at(event.clientX - place.left, $("preview").naturalWidth), at(event.clientY - place.top, $("preview").naturalHeight)];
};
$("drawn").addEventListener("pointerdown", (event) => {
  from = { at: point(event), field: form.box_1.value ? form.box_2 : form.box_1 };
  $("drawn").setPointerCapture(event.pointerId);
});
$("drawn").addEventListener("pointermove", (event) => {
  if (!from) return;
  const to = point(event);
  const [x0, x1] = [from.at[0], to[0]].sort((a, b) => a - b);
  const [y0, y1] = [from.at[1], to[1]].sort((a, b) => a - b);
  if (x1 > x0 && y1 > y0) from.field.value = [x0, y0, x1, y1].join(",");
  draw();
});
$("drawn").addEventListener("pointerup", () => { from = null; });
$("clear").addEventListener("click", () => { form.box_1.value = form.box_2.value = ""; draw(); });
form.box_1.addEventListener("input", draw);
form.box_2.addEventListener("input", draw);

function draw() {
  $("drawn").setAttribute("viewBox", `0 0 ${$("preview").naturalWidth || 1} ${$("preview").naturalHeight || 1}`);
  $("drawn").replaceChildren(...["box_1", "box_2"].flatMap((name, number) => {
    const [x0, y0, x1, y1] = form[name].value.split(",").map(Number);
    if (!(x1 > x0 && y1 > y0)) return [];
    const box = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [key, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0, fill: "none",
      stroke: ["#2b7bff", "#ff8a00"][number], "stroke-width": 4, "vector-effect": "non-scaling-stroke" })) box.setAttribute(key, value);
    return [box];
  }));
}

refresh();
setInterval(refresh, 2000);
