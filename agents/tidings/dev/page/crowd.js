/** Synthetic users by the thousand who follow the topic that the form publishes to. */
import { api, byTestId, element } from "./util.js";

export class Crowd {
  #root;
  #result;
  #publish;
  #topic = null;

  constructor(root) {
    this.#root = root;
    this.#result = byTestId(root, "crowd-result");
    this.#publish = byTestId(root, "crowd-publish");
    root.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#gather(byTestId(root, "crowd-size").valueAsNumber);
    });
    byTestId(root, "crowd-remove").addEventListener("click", () => this.#gather(0));
  }

  /** The topic that the form has now, null where it publishes to a user. */
  aim(topic) {
    if (topic === this.#topic) return;
    this.#topic = topic;
    this.#root.hidden = topic === null;
    this.#say();
  }

  async #gather(followers) {
    const topic = this.#topic;
    const buttons = this.#root.querySelectorAll("button");
    const began = performance.now();
    for (const button of buttons) button.disabled = true;
    this.#say("busy", followers ? "They come …" : "They go …");
    try {
      const answer = await api("/dev/crowd", { topic, followers });
      if (topic === this.#topic) this.#done(answer, Math.round(performance.now() - began));
    } catch (problem) {
      if (topic === this.#topic) this.#say("error", `${problem.message} (${problem.code})`);
    }
    for (const button of buttons) button.disabled = false;
  }

  #done({ topic, followers, crowd, added, removed }, ms) {
    const changes = [added && `${added.toLocaleString()} more`, removed && `${removed.toLocaleString()} fewer`];
    const change = changes.filter(Boolean).join(", ") || "nobody new";
    const who = followers === 1 ? "1 user follows" : `${followers.toLocaleString()} users follow`;
    this.#say("ok", `${who} ${topic} now: ${change}, in ${ms} ms`);
    this.#publish.hidden = crowd === 0;
    this.#publish.textContent = `Publish to all ${followers.toLocaleString()}`;
  }

  #say(state = "", text = "") {
    this.#result.dataset.state = state;
    this.#result.replaceChildren(...(text ? [element("span", "headline", text)] : []));
    this.#publish.hidden = true;
  }
}
