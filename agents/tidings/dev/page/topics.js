/** What the user of a device follows: topics and subtrees. They are the user's, hence the same on all devices. */
import { byTestId, stamp } from "./util.js";

const RETRY_MS = 5_000;

export class Topics {
  #root;
  #form;
  #input;
  #error;
  #changed;
  #socket = null;
  #asked = 0; // counts the questions: only the last one's answer is news
  #retry = 0;

  /**
   * @param {HTMLElement} root
   * @param {() => void} changed this device has followed or unfollowed something
   */
  constructor(root, changed) {
    this.#root = root;
    this.#form = root.querySelector("form");
    this.#input = byTestId(root, "topic-input");
    this.#error = byTestId(root, "topic-error");
    this.#changed = changed;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#follow();
    });
    this.#input.addEventListener("input", () => this.#say(""));
  }

  /** Another user, or device: nothing is known of it yet. */
  use(socket, user) {
    this.#socket = socket;
    this.#root.querySelector("h3").textContent = `Topics that ${user} follows`;
    this.#show([], null);
    this.#say("");
    this.render();
  }

  /** As the connection comes and goes. */
  render() {
    const online = this.#online;
    for (const control of this.#root.querySelectorAll("input, button")) control.disabled = !online;
  }

  get #online() {
    return this.#socket?.status === "online";
  }

  /** Ask anew: no frame says that another device has changed them. */
  async ask() {
    if (!this.#online) return;
    const asked = ++this.#asked;
    const socket = this.#socket;
    const isStale = () => asked !== this.#asked || socket !== this.#socket || !this.#online;
    clearTimeout(this.#retry);
    try {
      const { topics, next } = await socket.subscriptions();
      if (!isStale()) this.#show(topics, next);
    } catch (problem) {
      if (isStale()) return;
      this.#note(`Not known now: ${problem.message} (${problem.code})`);
      this.#retry = setTimeout(() => isStale() || this.ask(), RETRY_MS);
    }
  }

  async #follow() {
    const topic = this.#input.value.trim();
    if (topic && (await this.#change(() => this.#socket.subscribe(topic)))) this.#input.value = "";
  }

  /** True where it is in force. */
  async #change(request) {
    const socket = this.#socket;
    this.#say("");
    try {
      await request();
    } catch (problem) {
      if (socket === this.#socket) this.#say(`${problem.message} (${problem.code})`);
      return false;
    }
    this.#changed();
    return socket === this.#socket;
  }

  #say(text) {
    this.#error.textContent = text;
    this.#error.hidden = !text;
    this.#input.setAttribute("aria-invalid", Boolean(text));
  }

  #show(topics, next) {
    this.#note(next === null ? "" : "… and more");
    const list = byTestId(this.#root, "topics");
    const shown = [...list.children];
    // Nobody's click is to miss what has not changed.
    if (topics.join("\n") === shown.map((item) => item.dataset.topic).join("\n")) return;
    const at = shown.findIndex((item) => item.contains(document.activeElement));
    list.replaceChildren(...topics.map((topic) => this.#item(topic)));
    if (at >= 0) (list.children[Math.min(at, topics.length - 1)]?.querySelector("button") ?? this.#input).focus();
  }

  #item(topic) {
    const item = stamp("topic");
    item.dataset.topic = item.title = topic;
    item.querySelector("span").textContent = topic;
    const button = byTestId(item, "unfollow");
    button.setAttribute("aria-label", `Unfollow ${topic}`);
    button.addEventListener("click", () => this.#change(() => this.#socket.unsubscribe(topic)));
    return item;
  }

  #note(text) {
    const note = byTestId(this.#root, "topics-note");
    note.textContent = text;
    note.hidden = !text;
  }
}
