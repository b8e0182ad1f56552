/**
 * TidingsSocket: one device of one user, over the WebSocket protocol `tidings.v1.json`.
 *
 *   const socket = new TidingsSocket({ device: "phone", token: () => fetchToken() });
 *   socket.addEventListener("notification", ({ detail }) => { show(detail.n); socket.ack(detail.pos); });
 *   socket.open();
 *
 * It stays connected until `close()`, or until the server says that coming back by itself is wrong.
 * It never acknowledges on its own: an ack says that the application has the notification.
 *
 * Events, each with its `detail`:
 *   status        {status, delay?, code?, reason?}   status: offline, connecting, online, waiting, stopped
 *   welcome       the server's frame
 *   notification  {pos, try, n, again, caughtUp}     again: this id was delivered before, only its ack is owed
 *   caughtup      {items}                            what was missed has arrived, so many
 *   acked         {pos: [...]}                       these acks were written to the connection
 *   unread        {unread}                           the badge: 100 means more than 99, null not known
 *   marked        {pos: [...] | "all", upto?, as}    another device of this user did it
 *   gap           {missed, pos}                      page the inbox, then `ackUpto(pos)`
 *   problem       {code, message}                    an error that answers no request
 *   frame         {out, text}                        every frame as it is on the wire, without the token
 */

const SUBPROTOCOL = "tidings.v1.json";
const MAX_POSITIONS = 1000; // of one ack frame
const MORE_THAN_99 = 100;

const CONNECT_MS = 15_000; // from the first attempt to the welcome
const ANSWER_MS = 10_000; // for a request, and for a ping
const BACKOFF_MS = { least: 500, most: 15_000 };
const RENEW_MS = { again: 5_000, most: 2 ** 31 - 1 }; // a token that could not be renewed; the longest timer
const JITTER = 0.1; // of the pause that a server asks for
const STABLE_MS = 5_000; // a connection that lasted so long ends the back-off
const CATCH_UP_MS = { quiet: 300, most: 5_000 };
const SETTLE_MS = 1_000; // how far the inbox may be behind what was just delivered

/** Close codes after which the same client must not simply come back. */
export const FINAL_CLOSES = new Set([1000, 4400, 4401, 4403, 4409, 4413]);
const NOT_AUTHENTICATED = 4401;

/** An answer with a code, or a request that got none. `retry` says whether the same may succeed later. */
export class TidingsError extends Error {
  constructor(code, message, retry = true) {
    super(message);
    this.name = "TidingsError";
    this.code = code;
    this.retry = retry;
  }
}

/** The last so many keys: old ones are forgotten first. */
class Recent {
  #known = new Map();
  #capacity;

  constructor(capacity) {
    this.#capacity = capacity;
  }

  get(key) {
    return this.#known.get(key);
  }

  set(key, value) {
    this.#known.delete(key);
    this.#known.set(key, value);
    if (this.#known.size > this.#capacity) this.#known.delete(this.#known.keys().next().value);
  }
}

export class TidingsSocket extends EventTarget {
  /** Where this socket stands; changes are `status` events. */
  status = "offline";
  unread = null;

  #options;
  #wanted = false; // the application wants a connection
  #link = null; // what belongs to the current attempt: {ws, signal, abort}
  #token = null;
  #tokenIsFresh = false;
  #attempt = 0;
  #welcomedAt = 0;
  #heartbeatMs = 25_000;
  #bye = null;
  #refusal = null; // the last error frame that answered no request: why the close came
  #timers = new Map();
  #waiting = new Map(); // requests by ref
  #ref = 0;
  #acks = new Set();
  #recent = new Recent(1000);
  #catchingUp = false;
  #caughtUp = 0;
  #newestAt = 0;

  /**
   * @param {object} options
   * @param {() => Promise<string>} options.token fetches a token; called again before the last one ends, which renews
   *   it without a reconnect, and when it was refused.
   *   A TidingsError whose `retry` is false stops the socket, any other failure is tried again.
   * @param {string} [options.device] a stable id of this device
   * @param {string} [options.url] of the WebSocket; by default `/v1/ws` of the page's own origin
   * @param {number} [options.window] how many unacknowledged notifications may be under way
   */
  constructor({ token, device, url, window = 64 }) {
    super();
    this.#options = { token, device, window, url: url ?? ownOrigin() };
  }

  // For the application

  open() {
    if (this.#wanted) return;
    this.#wanted = true;
    this.#attempt = 0;
    this.#tokenIsFresh = false;
    this.#connect();
  }

  /** Say goodbye. What is not acknowledged comes at the next `open()`. */
  close() {
    this.#wanted = false;
    this.#flushAcks();
    this.#release(1000, "goodbye");
    this.#become("offline");
  }

  /** Do not wait for the back-off to pass. */
  retryNow() {
    if (this.status === "waiting") this.#connect();
  }

  /** These have arrived. All acks of one turn of the event loop leave in one frame. */
  ack(...positions) {
    if (this.#acks.size === 0) queueMicrotask(() => this.#flushAcks());
    for (const position of positions) this.#acks.add(position);
  }

  ackUpto(position) {
    this.#send({ t: "ack", upto: position });
  }

  /** A page, newest first: {items, next}. `next` is the `before` of the following one, null at the end. */
  async inbox({ before = null, limit = 50, filter = "all" } = {}) {
    const page = await this.#request({ t: "inbox", limit, filter, ...(before === null ? {} : { before }) });
    for (const { n } of page.items) this.#recent.set(n.id, this.#recent.get(n.id) ?? "listed");
    return page;
  }

  /** As seen, read, unread or archived; `positions` is a list or "all". */
  mark(as, positions) {
    return this.#request({ t: "mark", as, pos: positions });
  }

  async count() {
    const { unread } = await this.#request({ t: "count" });
    this.#counted(unread);
    return unread;
  }

  /** To a topic, or to a subtree as `post.42.>`; answered when it is in force. */
  subscribe(...topics) {
    return this.#request({ t: "sub", topics });
  }

  unsubscribe(...topics) {
    return this.#request({ t: "unsub", topics });
  }

  /** What the user has subscribed to: {topics, next}. `next` is the `after` of the following page, null at the end. */
  subscriptions({ after = null, limit = 500 } = {}) {
    return this.#request({ t: "subs", limit, ...(after === null ? {} : { after }) });
  }

  // Connection

  async #connect() {
    const link = this.#begin();
    this.#bye = this.#refusal = null;
    this.#become("connecting");
    this.#after("connect", CONNECT_MS, () => this.#lost("no welcome in time"));
    try {
      this.#token ??= await this.#options.token();
    } catch (error) {
      // Closed or begun anew meanwhile: nobody waits for this one.
      if (!link.signal.aborted) this.#ended(error.retry === false ? { final: error.code } : {}, error.message);
      return;
    }
    if (!link.signal.aborted) this.#dial(link);
  }

  #dial(link) {
    const { url, device, window } = this.#options;
    const ws = (link.ws = new WebSocket(url, SUBPROTOCOL));
    const on = (type, listener) => ws.addEventListener(type, listener, { signal: link.signal });
    on("open", () => {
      const hello = { t: "hello", token: this.#token, window, ...(device ? { device } : {}) };
      ws.send(JSON.stringify(hello));
      this.#emit("frame", { out: true, text: JSON.stringify({ ...hello, token: "…" }) });
    });
    on("message", ({ data }) => this.#receive(data));
    on("close", ({ code, reason }) => this.#ended({ code }, this.#refusal ?? reason));
  }

  /** A new attempt, or the wait for one: its listeners end with it. */
  #begin() {
    this.#release();
    const abort = new AbortController();
    return (this.#link = { ws: null, signal: abort.signal, abort: () => abort.abort() });
  }

  /** Let go of the current attempt at once; a dead peer would hold the closing handshake up for long. */
  #release(code, reason) {
    const link = this.#link;
    this.#link = null;
    for (const timer of this.#timers.values()) clearTimeout(timer);
    this.#timers.clear();
    this.#acks.clear();
    this.#catchingUp = false;
    for (const { reject } of this.#waiting.values()) reject(new TidingsError("closed", "the connection has ended"));
    this.#waiting.clear();
    link?.abort();
    link?.ws?.close(code ?? 4000, reason ?? "abandoned");
  }

  #lost(reason) {
    this.#ended({ code: 1006 }, reason);
  }

  /** The attempt is over: come back, come back with a new token, or leave it. */
  #ended({ code = null, final = null }, reason) {
    const bye = this.#bye;
    const lasted = this.status === "online" && Date.now() - this.#welcomedAt > STABLE_MS;
    this.#release();
    if (lasted) this.#attempt = 0;
    const newToken = code === NOT_AUTHENTICATED && !this.#tokenIsFresh;
    if (code === NOT_AUTHENTICATED) this.#token = null;
    if (newToken) {
      this.#tokenIsFresh = true;
      this.#connect();
    } else if (final !== null || FINAL_CLOSES.has(code) || bye?.reconnect === false) {
      this.#wanted = false;
      this.#become("stopped", { code: final ?? code, reason });
    } else {
      this.#wait(bye ? this.#paced(bye.after_ms) : this.#backoff(), code, reason);
    }
  }

  #wait(delay, code, reason) {
    const { signal } = this.#begin();
    // The network is back: no need to sit the rest out.
    globalThis.addEventListener("online", () => this.retryNow(), { signal });
    this.#after("retry", delay, () => this.#connect());
    this.#become("waiting", { code, reason, delay });
  }

  /** What the server asked for, and a little more at random; never at once again where there was no welcome. */
  #paced(ms) {
    const least = this.status === "online" ? 0 : Math.random() * BACKOFF_MS.least;
    return ms * (1 + Math.random() * JITTER) + least;
  }

  /** Full jitter: clients that lost the same gateway do not come back as one wave. */
  #backoff() {
    const { least, most } = BACKOFF_MS;
    return Math.random() * Math.min(most, least * 2 ** this.#attempt++);
  }

  /** Show the server a fresh token before this one ends. */
  #renewIn(seconds) {
    if (typeof seconds === "number") this.#after("renew", Math.min(seconds * 800, RENEW_MS.most), () => this.#renew());
  }

  async #renew() {
    const link = this.#link;
    try {
      const token = await this.#options.token();
      if (link !== this.#link) return;
      const answer = await this.#request({ t: "token", token });
      this.#token = token;
      this.#renewIn(answer.expires_in);
    } catch {
      // While the old one lives there is time; then the server closes, and a new connection begins with a new token.
      if (link === this.#link) this.#after("renew", RENEW_MS.again, () => this.#renew());
    }
  }

  /** Something came, so the peer lives; ask it only after a silence. */
  #heard() {
    this.#clear("pong");
    this.#after("ping", this.#heartbeatMs, () => {
      this.#send({ t: "ping" });
      this.#after("pong", ANSWER_MS, () => this.#lost("no answer to a ping"));
    });
  }

  // Frames

  #send(frame) {
    const ws = this.#link?.ws;
    if (this.status !== "online" || ws?.readyState !== WebSocket.OPEN) return false;
    ws.send(JSON.stringify(frame));
    this.#emit("frame", { out: true, text: JSON.stringify(frame.token ? { ...frame, token: "…" } : frame) });
    return true;
  }

  #request(frame) {
    const ref = ++this.#ref;
    return new Promise((resolve, reject) => {
      if (!this.#send({ ...frame, ref })) return reject(new TidingsError("closed", "not connected"));
      this.#waiting.set(ref, { resolve, reject });
      this.#after(`request ${ref}`, ANSWER_MS, () => {
        this.#waiting.delete(ref);
        reject(new TidingsError("timeout", "no answer in time"));
      });
    });
  }

  #receive(text) {
    this.#emit("frame", { out: false, text });
    this.#heard();
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return this.#emit("problem", { code: "bad_frame", message: "the server sent what is not JSON" });
    }
    const handlers = {
      welcome: () => this.#welcome(frame),
      n: () => this.#notifications(frame.items),
      ok: () => this.#answer(frame),
      error: () => this.#answer(frame),
      count: () => this.#counted(frame.unread),
      state: () => this.#emit("marked", { pos: frame.pos, upto: frame.upto, as: frame.as }),
      gap: () => this.#emit("gap", { missed: frame.missed, pos: frame.pos }),
      bye: () => (this.#bye = frame),
    };
    // `pong` needs no more than to be heard, and a newer server may say what we do not know.
    if (Object.hasOwn(handlers, frame?.t)) handlers[frame.t]();
  }

  #welcome(frame) {
    this.#clear("connect");
    this.#heartbeatMs = frame.heartbeat * 1000;
    this.#welcomedAt = Date.now();
    this.#tokenIsFresh = false;
    this.#catchingUp = true;
    this.#caughtUp = 0;
    this.#heard();
    this.#become("online");
    this.#setUnread(frame.unread);
    this.#renewIn(frame.expires_in);
    this.#emit("welcome", frame);
    this.#after("catch-up", CATCH_UP_MS.quiet, () => this.#endCatchUp());
  }

  #answer(frame) {
    const request = this.#waiting.get(frame.ref);
    const { code, message } = frame;
    if (request) {
      this.#waiting.delete(frame.ref);
      this.#clear(`request ${frame.ref}`);
      frame.t === "ok" ? request.resolve(frame) : request.reject(new TidingsError(code, message));
    } else if (frame.t === "error") {
      this.#refusal = message;
      this.#emit("problem", { code, message });
    }
  }

  #flushAcks() {
    const positions = [...this.#acks];
    this.#acks.clear();
    for (let at = 0; at < positions.length; at += MAX_POSITIONS) {
      const pos = positions.slice(at, at + MAX_POSITIONS);
      // Lost with its connection, an ack is owed again: the server repeats what it covers.
      if (this.#send({ t: "ack", pos })) this.#emit("acked", { pos });
    }
  }

  // Notifications and the badge

  #notifications(items) {
    for (const { pos, try: attempt, n } of items) {
      const known = this.#recent.get(n.id);
      this.#recent.set(n.id, "delivered");
      if (!known) this.#newestAt = Date.now();
      if (!known && !this.#catchingUp) this.#countOneMore();
      const again = known === "delivered";
      if (this.#catchingUp && !again) this.#caughtUp += 1;
      this.#emit("notification", { pos, try: attempt, n, again, caughtUp: this.#catchingUp });
    }
    const left = this.#welcomedAt + CATCH_UP_MS.most - Date.now();
    if (this.#catchingUp && left > 0) {
      this.#after("catch-up", Math.min(left, CATCH_UP_MS.quiet), () => this.#endCatchUp());
    }
  }

  #endCatchUp() {
    this.#catchingUp = false;
    this.#emit("caughtup", { items: this.#caughtUp });
    if (this.#caughtUp > 0 || this.unread === null) this.#recount();
  }

  /** While catching up nothing is added: the welcome has counted most of it, and the count is asked for at the end. */
  #countOneMore() {
    if (this.unread !== null) this.#setUnread(this.unread + 1);
    // A straggler of the catch-up looks like this too.
    if (Date.now() - this.#welcomedAt < CATCH_UP_MS.most) this.#after("count", SETTLE_MS, () => this.#recount());
  }

  #recount() {
    this.count().catch(() => {}); // the badge keeps its last value
  }

  #counted(unread) {
    this.#setUnread(unread);
    // What has just been delivered may not have reached the inbox when it was counted.
    const settledIn = this.#newestAt + SETTLE_MS - Date.now();
    if (settledIn > 0) this.#after("count", settledIn, () => this.#recount());
  }

  #setUnread(unread) {
    this.unread = unread === null ? null : Math.min(unread, MORE_THAN_99);
    this.#emit("unread", { unread: this.unread });
  }

  // Helpers

  #become(status, detail = {}) {
    this.status = status;
    this.#emit("status", { status, ...detail });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  /** One timer for each name; a new one replaces the old. */
  #after(name, ms, action) {
    this.#clear(name);
    this.#timers.set(
      name,
      setTimeout(() => {
        this.#timers.delete(name);
        action();
      }, ms),
    );
  }

  #clear(name) {
    clearTimeout(this.#timers.get(name));
    this.#timers.delete(name);
  }
}

function ownOrigin() {
  const url = new URL("/v1/ws", location.href);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url.href;
}
