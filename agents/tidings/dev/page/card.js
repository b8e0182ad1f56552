/** One device on the page: its connection, its switches, its badge and its notifications. */
import { List } from "./list.js";
import { TidingsSocket } from "./socket.js";
import { Topics } from "./topics.js";
import { api, byTestId, clock, cut, element, info, stamp } from "./util.js";

const WINDOW = 64;
const PAGE = 20;
const MAX_PAGE = 200;
const MAX_LOG = 50;
const INBOX_RETRY_MS = 5_000;
const ANNOUNCE_MS = 500;
const TAKEN_OVER = 4409;

export class Card {
  #list;
  #topics;
  #socket = null;
  #changed;
  #arrived;
  #session = 0; // counts welcomes: an answer to an earlier one is stale
  #retryAt = null;
  #inboxRetry = 0;
  #gapAt = null; // the position that notes a gap, owed once the page beneath it is shown
  #frames = [];
  #frameCount = 0;
  #announced = 0;

  /**
   * @param {number} index
   * @param {{user: string, device: string, on: boolean, autoAck: boolean}} settings changed in place
   * @param {{changed: () => void, arrived: (id: string, name: string) => void, followed: (user: string) => void}} hooks
   */
  constructor(index, settings, { changed, arrived, followed }) {
    this.settings = settings;
    this.#changed = changed;
    this.#arrived = arrived;
    this.root = stamp("card");
    this.root.dataset.testid = `card-${index}`;
    this.#list = new List(
      this.#part("list"),
      (action, row) => this.#act(action, row),
      () => ({ online: this.#online, autoAck: this.settings.autoAck }),
    );
    this.#topics = new Topics(this.#part("follows"), () => followed(this.settings.user));
    this.#wire();
    this.#connect();
  }

  /** What the user follows may have changed. */
  askTopics() {
    this.#topics.ask();
  }

  get #online() {
    return this.#socket?.status === "online";
  }

  #part(name) {
    return byTestId(this.root, name);
  }

  // What the user does

  #wire() {
    const on = (name, type, listener) => this.#part(name).addEventListener(type, listener);
    on("user-input", "change", ({ target }) => this.#rename("user", target));
    on("device-input", "change", ({ target }) => this.#rename("device", target));
    on("switch", "change", ({ target }) => this.#switch(target.checked));
    on("autoack", "change", ({ target }) => this.#setAutoAck(target.checked));
    on("read-all", "click", () => this.#mark("read", "all"));
    on("load-older", "click", () => this.#loadOlder());
    on("log", "toggle", () => this.#renderLog());
    this.#part("autoack").checked = this.settings.autoAck;
    this.#note("link").querySelector("button").addEventListener("click", () => this.#switch(true));
    this.#note("gap").querySelector("button").addEventListener("click", () => this.#setNote("gap", null));
    this.root.querySelector("[data-do=retry]").addEventListener("click", () => this.#socket.retryNow());
    setInterval(() => this.#countDown(), 250);
  }

  #rename(key, input) {
    const value = input.value.trim();
    if (value && value !== this.settings[key]) {
      this.settings[key] = value;
      this.#changed();
      this.#connect();
    }
    input.value = this.settings[key];
  }

  #switch(on) {
    this.settings.on = on;
    this.#changed();
    if (on) this.#socket.open();
    else this.#socket.close();
  }

  #setAutoAck(on) {
    this.settings.autoAck = on;
    this.#changed();
    if (on) for (const row of this.#list.rows) this.#socket.ack(...row.owed);
    this.#list.render();
    this.#renderFoot();
  }

  #act(action, row) {
    if (action === "ack") this.#socket.ack(...row.owed);
    else this.#mark(action === "archive" ? "archived" : action, [row]);
  }

  // The connection

  /** Become the device that the settings name. */
  #connect() {
    this.#socket?.close();
    this.#list.clear();
    this.#renderNames();
    const { user, device, on } = this.settings;
    const token = async () => (await api("/dev/token", { user, device })).token;
    const socket = (this.#socket = new TidingsSocket({ device, token, window: WINDOW }));
    const listen = (type, listener) =>
      socket.addEventListener(type, ({ detail }) => socket === this.#socket && listener(detail));
    listen("status", (detail) => this.#renderStatus(detail));
    listen("welcome", () => this.#welcomed());
    listen("notification", (detail) => this.#delivered(detail));
    listen("caughtup", ({ items }) => this.#caughtUp(items));
    listen("acked", ({ pos }) => this.#acked(pos));
    listen("unread", ({ unread }) => this.#renderBadge(unread));
    listen("marked", (detail) => this.#marked(detail));
    listen("gap", (detail) => this.#gap(detail));
    listen("problem", ({ message }) => this.#setNote("link", message));
    listen("frame", (detail) => this.#log(detail));
    this.#topics.use(socket, user);
    this.#renderStatus({ status: "offline" });
    this.#renderBadge(null);
    if (on) socket.open();
  }

  #welcomed() {
    this.#session += 1;
    this.#list.begin();
    this.#gapAt = null;
    this.#setNote("gap", null);
    this.#refresh();
    this.#topics.ask();
  }

  /** From here on what comes is news. */
  #caughtUp(items) {
    this.root.dataset.live = true;
    if (items) this.#refresh(true);
  }

  #delivered(item) {
    const isNews = this.#list.deliver(item);
    if (!item.again) {
      this.#announce();
      if (!item.caughtUp) this.#arrived(item.n.id, `${this.settings.user}·${this.settings.device}`);
    }
    // Old news is sent again because its ack was lost on the way.
    if (this.settings.autoAck || !isNews) this.#socket.ack(item.pos);
    this.#renderFoot();
  }

  #acked(positions) {
    this.#list.acked(positions);
    this.#renderFoot();
  }

  // Marks

  /** Mark rows, or "all": shown at once, and put right if the server says no. */
  async #mark(as, rows) {
    const chosen = rows === "all" ? this.#list.rows : rows;
    const positions = rows === "all" ? "all" : rows.flatMap((row) => [...row.positions]);
    // What is archived is dealt with, hence has arrived.
    if (as === "archived") for (const row of chosen) this.#socket.ack(...row.owed);
    this.#list.mark(as, chosen);
    try {
      await this.#socket.mark(as, positions);
      // A page that was asked for before may have brought the old state back.
      this.#list.mark(as, chosen);
      if (rows === "all") await this.#refresh();
    } catch (problem) {
      await this.#refresh();
      this.#setNote("inbox", `Not marked: ${problem.message}.`);
    }
    this.#renderFoot();
  }

  #marked({ pos, upto, as }) {
    const rows = pos === "all" ? this.#list.upto(upto) : this.#list.at(pos);
    if (rows) this.#list.mark(as, rows);
    else this.#refresh();
    this.#renderFoot();
  }

  // The inbox

  async #refresh(settled = false) {
    const page = await this.#ask({ limit: Math.min(MAX_PAGE, Math.max(PAGE, this.#list.size)) });
    if (!page) return;
    this.#list.showNewest(page, settled);
    this.#renderFoot();
    if (this.#gapAt !== null) this.#socket.ackUpto(this.#gapAt);
    this.#gapAt = null;
    if (this.#socket.unread === null) this.#socket.count().catch(() => {});
  }

  async #loadOlder() {
    const page = await this.#ask({ limit: PAGE, before: this.#list.next });
    if (page) this.#list.showOlder(page);
    this.#renderFoot();
  }

  /** A page, or null where none came; the newest one is then asked for again later. */
  async #ask(query) {
    const session = this.#session;
    const stale = () => session !== this.#session || !this.#online;
    try {
      const page = await this.#socket.inbox(query);
      if (stale()) return null;
      this.#setNote("inbox", null);
      return page;
    } catch {
      if (stale()) return null;
      this.#setNote("inbox", "Inbox not available now. New notifications still arrive.");
      clearTimeout(this.#inboxRetry);
      this.#inboxRetry = setTimeout(() => stale() || this.#refresh(), INBOX_RETRY_MS);
      return null;
    }
  }

  #gap({ missed, pos }) {
    const many = missed === null ? "More was" : `${missed.toLocaleString()} were`;
    this.#setNote("gap", `${many} missed than is sent again: all of it is in the inbox below.`);
    this.#gapAt = pos;
    this.#refresh();
  }

  // What is seen

  #note(name) {
    return this.root.querySelector(`[data-note=${name}]`);
  }

  #setNote(name, text, action = "") {
    const note = this.#note(name);
    note.hidden = text === null;
    const span = note.querySelector("span");
    if (span.textContent !== (text ?? "")) span.textContent = text ?? "";
    if (name !== "link") return;
    const button = note.querySelector("button");
    button.hidden = !action;
    button.textContent = action;
  }

  #renderNames() {
    const { user, device } = this.settings;
    this.root.querySelector("h2").textContent = `${user} on ${device}`;
    this.#part("user-input").value = user;
    this.#part("device-input").value = device;
    this.#part("switch").setAttribute("aria-label", `${user} on ${device} is connected`);
    this.root.querySelector(".scroll").setAttribute("aria-label", `Notifications of ${user} on ${device}`);
    const avatar = this.root.querySelector(".avatar");
    avatar.textContent = [...user][0].toUpperCase();
    avatar.dataset.hue = [...user].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 997, 7) % 6;
  }

  #renderStatus({ status, delay = 0, code = null, reason = "" }) {
    const waiting = status === "waiting";
    const shown = status === "stopped" ? "offline" : status;
    const state = this.#part("state");
    this.root.dataset.status = state.dataset.state = shown;
    this.root.dataset.live = false;
    state.title = waiting ? `${reason || "the connection was lost"} (${code ?? "not connected"})` : "";
    state.querySelector("[role=status]").textContent = waiting ? "reconnecting" : shown;
    this.root.querySelector("[data-do=retry]").hidden = !waiting;
    this.#part("switch").checked = shown !== "offline";
    this.#part("read-all").disabled = this.#part("load-older").disabled = !this.#online;
    this.#retryAt = waiting ? Date.now() + delay : null;
    this.#countDown();
    this.#renderEnd(status, code, reason);
    if (!this.#online) this.#setNote("inbox", null);
    this.#list.render();
    this.#topics.render();
    this.#renderFoot();
  }

  #renderEnd(status, code, reason) {
    if (status !== "stopped") return this.#setNote("link", null);
    if (code === TAKEN_OVER) return this.#setNote("link", "Another session of this device took over.", "Take it back");
    this.#setNote("link", `Not connected: ${reason || "the server has closed"} (${code}).`, "Connect again");
  }

  #countDown() {
    const seconds = this.#retryAt === null ? 0 : Math.max(0, Math.ceil((this.#retryAt - Date.now()) / 1000));
    const text = this.#retryAt === null ? "" : ` in ${seconds} s`;
    const countdown = this.root.querySelector(".countdown");
    if (countdown.textContent !== text) countdown.textContent = text;
  }

  #renderBadge(unread) {
    const badge = this.#part("badge");
    badge.textContent = unread === null ? "–" : unread > 99 ? "99+" : unread;
    badge.dataset.unread = unread ?? "";
    badge.title = unread === null ? "not known now" : "";
  }

  #renderFoot() {
    this.#part("load-older").hidden = this.#list.next === null;
    const { owed } = this.#list;
    const hint = `Ack within ${info.ack_wait_s} s, or it is sent again.`;
    const full = `${owed} are not acked: the window is full, and the rest waits.`;
    this.#setNote("acks", this.settings.autoAck ? null : owed >= WINDOW ? full : hint);
  }

  /** One sentence for all that comes at once: a burst is not read out one by one. */
  #announce() {
    this.#announced += 1;
    if (this.#announced > 1) return;
    setTimeout(() => {
      const { user, device } = this.settings;
      const many = this.#announced === 1 ? "A new notification" : `${this.#announced} new notifications`;
      this.root.querySelector(".announce").textContent = `${many} for ${user} on ${device}`;
      this.#announced = 0;
    }, ANNOUNCE_MS);
  }

  #log({ out, text }) {
    this.#frames.unshift({ out, text: `${clock(new Date())}  ${out ? "→" : "←"}  ${cut(text, 2000)}` });
    this.#frames.length = Math.min(this.#frames.length, MAX_LOG);
    this.#frameCount += 1;
    this.#renderLog();
  }

  #renderLog() {
    const log = this.#part("log");
    log.querySelector(".total").textContent = this.#frameCount;
    if (!log.open) return;
    const lines = this.#frames.map(({ out, text }) => element("li", out ? "out" : "in", text));
    log.querySelector("ol").replaceChildren(...lines);
  }
}
