/** The form that publishes, what became of it, and the command lines that would have done the same. */
import { Crowd } from "./crowd.js";
import { api, byTestId, element, info } from "./util.js";

const BURST = 10;
const REMEMBERED = 300;
const COPIED_MS = 1500;
const SOURCE = "tidings-dev";
const UNRESERVED = /[A-Za-z0-9\-_~@+=,:!/]/;

export class Publisher {
  #form;
  #result;
  #crowd;
  #arrivals = new Map(); // notification id -> Map(device name -> when): a device may be faster than the answer
  #last = null; // what was published last: {sentAt: Map(id -> when), headline, state}
  #freshId = uuid();

  constructor(root) {
    this.#form = root.querySelector("#publish");
    this.#result = byTestId(root, "pub-result");
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#publish(1);
    });
    byTestId(root, "pub-burst").addEventListener("click", () => this.#form.reportValidity() && this.#publish(BURST));
    this.#crowd = new Crowd(byTestId(root, "crowd"));
    this.#form.addEventListener("input", () => this.#renderForm());
    for (const button of root.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", () => copy(byTestId(root, button.dataset.copy), button));
    }
    this.root = root;
    this.#renderForm();
  }

  /** A device has it: how long did that take since it was published here? */
  arrived(id, name) {
    const devices = this.#arrivals.get(id) ?? new Map();
    devices.set(name, performance.now());
    this.#arrivals.set(id, devices);
    if (this.#arrivals.size > REMEMBERED) this.#arrivals.delete(this.#arrivals.keys().next().value);
    if (this.#last?.sentAt.has(id)) this.#renderResult();
  }

  #values() {
    const { to, text, ...fields } = Object.fromEntries(new FormData(this.#form));
    return { to, name: fields[to].trim(), type: fields.type.trim(), text, id: fields.id.trim() };
  }

  /** One after the other, so that they are stored in the order in which they were meant. */
  async #publish(times) {
    const { to, name, type, text, id } = this.#values();
    const sentAt = new Map();
    const answers = [];
    const start = performance.now();
    this.#setBusy(true);
    try {
      for (let at = 1; at <= times; at += 1) {
        const body = { [to]: name, type, data: { text: times > 1 ? `${text} (${at} of ${times})` : text } };
        if (id) body.id = times > 1 ? `${id}-${at}` : id;
        const began = performance.now();
        const answer = await api("/dev/publish", body);
        sentAt.set(answer.id, began);
        answers.push(answer);
      }
      this.#last = { sentAt, ...verdict(answers, Math.max(1, Math.round(performance.now() - start))) };
    } catch (problem) {
      const before = answers.length ? `${answers.length} published, then ` : "";
      this.#last = { sentAt, state: "error", headline: `${before}${problem.message} (${problem.code})` };
    }
    this.#setBusy(false);
    this.#renderResult();
    this.#freshId = uuid();
    this.renderCommands();
  }

  #setBusy(busy) {
    for (const control of this.#form.elements) if (control.localName === "button") control.disabled = busy;
  }

  /** One of the two names is asked for; the other keeps what was typed. */
  #renderForm() {
    const { to, user, topic } = this.#form.elements;
    for (const input of [user, topic]) input.hidden = input.disabled = input.name !== to.value;
    this.#crowd.aim(to.value === "topic" ? topic.value.trim() : null);
    this.renderCommands();
  }

  #renderResult() {
    const { sentAt, state, headline } = this.#last;
    const slowest = new Map(); // device name -> {ms, many}
    for (const [id, began] of sentAt) {
      for (const [name, at] of this.#arrivals.get(id) ?? []) {
        const { ms = 0, many = 0 } = slowest.get(name) ?? {};
        // A repeated id arrived long ago: that is no latency.
        if (at >= began) slowest.set(name, { ms: Math.max(ms, at - began), many: many + 1 });
      }
    }
    this.#result.dataset.state = state;
    const chips = [...slowest].map(([name, { ms, many }]) => {
      const share = sentAt.size > 1 ? `${many}/${sentAt.size}, slowest ` : "";
      return element("span", "chip", `${name} ${share}${Math.max(1, Math.round(ms))} ms`);
    });
    this.#result.replaceChildren(element("span", "headline", headline), ...chips);
  }

  renderCommands() {
    const { to, name, type, text, id } = this.#values();
    const data = JSON.stringify({ text });
    const words = [`${info.program} publish`, option(to, name), option("type", type), option("data", data)];
    if (id) words.push(option("id", id));
    if (!isDefault(info.nats_url)) words.push(option("nats", info.nats_url));
    byTestId(this.root, "cmd-tidings").textContent = words.join(" ");
    byTestId(this.root, "cmd-nats").textContent = natsCommand(to, name, type, data, id || this.#freshId);
  }
}

function verdict(answers, ms) {
  const [{ id, stream, seq }] = answers;
  const duplicates = answers.filter((answer) => answer.duplicate).length;
  const state = duplicates === answers.length ? "duplicate" : "ok";
  if (answers.length === 1) {
    const where = `${stream}, sequence ${seq}, id ${id}`;
    const what = duplicates ? "Duplicate, nothing new is stored" : `Stored in ${ms} ms`;
    return { state, headline: `${what}: ${where}` };
  }
  const known = duplicates ? `, ${duplicates} of them duplicates` : "";
  const where = `${stream}, sequences ${seq} to ${answers.at(-1).seq}`;
  return { state, headline: `${answers.length} accepted in ${ms} ms${known}: ${where}` };
}

// Command lines

/** A word for a POSIX shell. */
export function quote(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** A value that begins with a dash would be read as an option of its own. */
function option(name, value) {
  return value.startsWith("-") ? `--${name}=${quote(value)}` : `--${name} ${quote(value)}`;
}

/** A user id, or a topic's level, as a token of a NATS subject: %XX of its UTF-8 bytes where they are not harmless. */
export function escape(name) {
  const token = (byte) => {
    const letter = String.fromCharCode(byte);
    return UNRESERVED.test(letter) ? letter : `%${byte.toString(16).toUpperCase().padStart(2, "0")}`;
  };
  return Array.from(new TextEncoder().encode(name), token).join("");
}

function natsCommand(to, name, type, data, id) {
  const event = JSON.stringify({ specversion: "1.0", id, source: SOURCE, type, data: JSON.parse(data) });
  // The nats command takes two braces for a template of its own.
  const body = event.replaceAll("{{", "{\\u007b");
  const token = to === "user" ? escape(name) : name.split(".").map(escape).join(".");
  const where = `notify.${to}.${token}`;
  const words = ["nats pub --jetstream", quote(where), quote(body)];
  // The stream, which many share, knows a repetition by this header.
  words.push("-H", quote(`Nats-Msg-Id:${to === "user" ? token : where}/${id}`));
  if (!isDefault(info.nats_url)) words.push("--server", quote(info.nats_url));
  return words.join(" ");
}

function isDefault(url) {
  return ["nats://127.0.0.1:4222", "nats://localhost:4222"].includes(url);
}

/** crypto.randomUUID wants a secure context, which a machine on the local network is not. */
function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const digits = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

async function copy(code, button) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {
    // No clipboard without a secure context: leave it selected for the keyboard.
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), COPIED_MS);
}
