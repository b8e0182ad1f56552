/** What the page's modules share. */
import { TidingsError } from "./socket.js";

/** What the server says of itself; `/dev/info` replaces these. */
export const info = { nats_url: "nats://127.0.0.1:4222", program: "tidings", version: "", ack_wait_s: 30 };

export const byTestId = (root, name) => root.querySelector(`[data-testid="${name}"]`);

/** A copy of a template's only element. */
export const stamp = (id) => document.getElementById(id).content.firstElementChild.cloneNode(true);

export const cut = (text, most) => (text.length > most ? `${text.slice(0, most)}…` : text);

/** Text becomes a text node, whatever it holds. */
export function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export function clock(moment) {
  const time = moment.toLocaleTimeString(undefined, { hourCycle: "h23" });
  if (moment.toDateString() === new Date().toDateString()) return time;
  return `${moment.toLocaleDateString(undefined, { month: "short", day: "numeric" })}, ${time}`;
}

/** GET, or POST where there is a body; throws a TidingsError that says whether to try again. */
export async function api(path, body) {
  const init = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, body && init).catch(() => {
    throw new TidingsError("unreachable", "the server does not answer");
  });
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const { code = `http_${response.status}`, message = `the server answered ${response.status}` } = answer;
  throw new TidingsError(code, message, response.status >= 500 || response.status === 429);
}
