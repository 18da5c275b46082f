// The page of the server: asks /v1/completions or /v1/chat/completions, and shows the answer as it
// comes. What a model says becomes text nodes and nothing else, so it cannot become markup.
//
// The settings are in the address behind `#`, which browsers keep to themselves. The key is in the
// tab's session storage, and the texts are nowhere but in the page.

"use strict";

const byId = (id) => document.getElementById(id);
const [form, output, prompt, error, status] = ["form", "output", "prompt", "error", "status"].map(byId);
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"];
const KEPT = [...NUMBERS, "stop", "system", "speculative"]; // in the address, beside `mode`
const OFTEN = 100; // milliseconds between two updates of the figures
const KEY = "llmnorm-key";

let messages = []; // of the chat: {role, content}
let running = null; // the AbortController of the answer that comes

// The settings and the address.

const field = (name) => form.elements.namedItem(name);
const mode = () => document.querySelector("input[name=mode]:checked").value;

function toAddress() {
  const kept = new URLSearchParams({ mode: mode() });
  for (const name of KEPT) {
    const input = field(name);
    const value = input.type === "checkbox" ? String(input.checked) : input.value;
    const initial = input.type === "checkbox" ? String(input.defaultChecked) : input.defaultValue;
    if (value !== initial) kept.set(name, value);
  }
  history.replaceState(null, "", `#${kept}`);
}

function fromAddress() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const input of document.querySelectorAll("input[name=mode]"))
    input.checked = input.value === (kept.get("mode") === "chat" ? "chat" : "text");
  for (const name of KEPT) {
    const input = field(name);
    if (input.type === "checkbox") input.checked = (kept.get(name) ?? "true") !== "false";
    else input.value = kept.get(name) ?? input.defaultValue;
  }
  showMode();
}

function showMode() {
  const chat = mode() === "chat";
  byId("prompt-label").textContent = chat ? "Message" : "Prompt";
  byId("answers").textContent = chat ? "Conversation" : "Text";
  byId("keys").textContent = chat
    ? "Enter sends, Shift+Enter begins a line, Escape stops"
    : "Ctrl+Enter sends, Escape stops";
}

// What is asked for.

function body(text) {
  const asked = { stream: true, accepted_marks: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (field(name).value !== "") asked[name] = Number(field(name).value);
  if (field("stop").value !== "") asked.stop = [field("stop").value];
  asked.speculative = field("speculative").checked;
  if (mode() === "text") return { ...asked, prompt: text };
  const system = field("system").value;
  const before = system === "" ? [] : [{ role: "system", content: system }];
  return { ...asked, messages: [...before, ...messages, { role: "user", content: text }] };
}

class InWords extends Error {}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// A response, or an error that says in words why there is none.
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (reason) {
    if (reason.name === "AbortError") throw reason;
    throw new InWords("The server cannot be reached. It may be down, or the network is.");
  }
  if (response.ok) return response;
  const said = await response.json().then((told) => told.error, () => null);
  const wait = response.headers.get("retry-after");
  if (response.status === 401) byId("access").open = true;
  const about = {
    401: "The server asks for a key. Enter it below",
    413: "The text is too long for the server",
    429: "The server is busy",
    502: "The proxy does not reach the server",
    503: "The server takes no requests now",
    504: "The answer took too long",
  }[response.status] ?? `The server refused (status ${response.status})`;
  const again = wait ? ` Try again in ${wait} s.` : "";
  throw new InWords(`${about}: ${said?.message ?? "it gave no reason"}.${again}`);
}

// The objects of a stream of server-sent events, up to [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  while (true) {
    let got;
    try {
      got = await reader.read();
    } catch (reason) {
      if (reason.name === "AbortError") throw reason;
      got = { done: true };
    }
    if (got.done) throw new InWords("The connection was cut. The answer is not finished.");
    const parts = (held + got.value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      const object = JSON.parse(part.slice(6));
      if (object.error) throw new InWords(`The answer broke off: ${object.error.message}.`);
      yield object;
    }
  }
}

// What is shown.

function addMessage(role, text) {
  const box = document.createElement("div");
  box.className = "message";
  if (role !== null) {
    const name = document.createElement("span");
    name.className = "role";
    name.textContent = role;
    box.append(name);
  }
  if (text !== "") {
    const given = document.createElement("span");
    if (role === null) given.className = "prompt";
    given.textContent = text;
    box.append(given);
  }
  output.append(box);
  output.scrollTop = output.scrollHeight;
  return box;
}

// Adds text to a box, and keeps the end in sight where it was in sight.
function addText(box, text, accepted) {
  if (text === "") return;
  const below = output.scrollHeight - output.clientHeight - output.scrollTop < 40;
  const last = box.lastElementChild;
  const kind = accepted ? "accepted" : "own";
  if (last?.className === kind) {
    last.firstChild.appendData(text);
  } else {
    const span = document.createElement("span");
    span.className = kind;
    span.append(document.createTextNode(text));
    box.append(span);
  }
  if (below) output.scrollTop = output.scrollHeight;
}

const NOTHING = { tokens: 0, drafted: 0, accepted: 0, waited: 0, first: 0, last: 0 };

// `waited`: the first piece's tokens, which came after the prompt was read; `first`, `last`: when
// the first and the last piece came, in milliseconds.
function showFigures({ tokens, drafted, accepted, waited, first, last }) {
  byId("tokens").textContent = String(tokens);
  const rate = ((tokens - waited) * 1000) / (last - first);
  byId("rate").textContent = last > first ? rate.toFixed(1) : "–";
  const share = `${accepted} of ${drafted} (${Math.round((100 * accepted) / drafted)} %)`;
  byId("share").textContent = drafted ? share : "–";
}

const FINISHED = {
  stop: "The answer is finished.",
  length: "The answer ends at the limit of its length.",
};

async function answer(text) {
  const chat = mode() === "chat";
  const count = { ...NOTHING };
  const asked = body(text);
  const conversation = messages; // `clear` begins another one, and this answer is none of it
  let whole = "", ending = "", shown = 0;
  running = new AbortController();
  busy(true);
  if (!chat) output.replaceChildren();
  const question = chat ? addMessage("You", text) : null;
  const box = chat ? addMessage("Model", "") : addMessage(null, text);
  showFigures(count);
  try {
    const response = await ask(`v1/${chat ? "chat/" : ""}completions`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    if (chat) prompt.value = "";
    for await (const object of events(response)) {
      const choice = object.choices[0];
      if (choice === undefined) continue; // the usage, at the end
      const piece = [...((chat ? choice.delta.content : choice.text) ?? "")];
      const marked = choice.accepted_characters ?? 0;
      addText(box, piece.slice(0, marked).join(""), true);
      addText(box, piece.slice(marked).join(""), false);
      whole += piece.join("");
      if (choice.tokens) {
        count.last = performance.now();
        if (!count.tokens) [count.first, count.waited] = [count.last, choice.tokens];
        count.tokens += choice.tokens;
        count.drafted += choice.drafted;
        count.accepted += choice.accepted;
      }
      if (choice.finish_reason) ending = FINISHED[choice.finish_reason] ?? "The answer has ended.";
      if (count.last - shown > OFTEN) showFigures(count), (shown = count.last);
    }
    status.textContent = `${ending} ${count.tokens} tokens.`;
  } catch (reason) {
    status.textContent = "";
    if (!box.isConnected) return; // cleared
    if (reason.name === "AbortError") status.textContent = `Stopped. ${count.tokens} tokens.`;
    else if (reason instanceof InWords) error.textContent = reason.message;
    else error.textContent = `This page has failed: ${reason.message}.`;
  } finally {
    if (box.isConnected) showFigures(count);
    if (chat && whole !== "") {
      conversation.push({ role: "user", content: text }, { role: "assistant", content: whole });
    } else if (chat && box.isConnected) {
      question.remove(); // nothing was answered: the message goes back to where it was typed
      box.remove();
      prompt.value = text;
    }
    running = null;
    busy(false);
  }
}

function busy(yes) {
  byId("send").disabled = yes;
  byId("stop").disabled = !yes;
  for (const input of document.querySelectorAll("input[name=mode]")) input.disabled = yes;
  output.setAttribute("aria-busy", String(yes));
  if (yes) {
    error.textContent = "";
    status.textContent = "The answer comes.";
  } else if (document.activeElement === document.body) {
    prompt.focus(); // the stop button, which had it, is disabled now
  }
}

function clear() {
  running?.abort();
  messages = [];
  output.replaceChildren();
  showFigures(NOTHING);
  error.textContent = status.textContent = "";
  prompt.focus();
}

async function describe() {
  try {
    const { data } = await (await ask("v1/models", {})).json();
    byId("model").textContent = document.title = data[0].id;
    byId("about").textContent = `context of ${data[0].max_model_len} tokens`;
    error.textContent = "";
  } catch (reason) {
    error.textContent = reason.message;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const asked = prompt.value;
  if (running === null && asked !== "") answer(asked);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  const sends = event.ctrlKey || event.metaKey || (mode() === "chat" && !event.shiftKey);
  if (!sends) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("clear").addEventListener("click", clear);
byId("settings").addEventListener("change", toAddress);
byId("modes").addEventListener("change", () => {
  clear();
  showMode();
  toAddress();
});
byId("key").addEventListener("change", (event) => {
  sessionStorage.setItem(KEY, event.target.value.trim());
  describe();
});
window.addEventListener("hashchange", fromAddress);

byId("key").value = sessionStorage.getItem(KEY) ?? "";
fromAddress();
describe();
