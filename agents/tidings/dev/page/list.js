/** The notifications of one device, newest on top: what was delivered, and the pages of the inbox around it. */
import { clock, cut, stamp } from "./util.js";

const MAX_ROWS = 500; // older ones are dropped from the list; the inbox has them

/** One notification on one device. */
export class Row {
  positions = new Set(); // usually one; a publisher's late retry of the same id adds another
  owed = new Set(); // those of them that were delivered and are not acknowledged
  delivered = false; // over the wire, not only listed by the inbox
  tries = 0;
  read = false;
  caughtUp = false;
  epoch = 0; // the connection that last confirmed it

  constructor(n, act) {
    this.id = n.id;
    this.element = stamp("item");
    this.element.dataset.id = n.id;
    const moment = new Date(n.time ?? Date.now());
    const time = this.element.querySelector("time");
    time.textContent = Number.isNaN(moment.valueOf()) ? "" : clock(moment);
    time.title = n.time ?? "";
    this.element.querySelector(".type").textContent = n.type;
    const topic = this.element.querySelector(".topic");
    topic.textContent = topic.title = n.topic ?? "";
    topic.hidden = !n.topic;
    const words = this.element.querySelector(".words");
    words.textContent = words.title = summary(n);
    this.element.addEventListener("click", ({ target }) => this.#clicked(target, act));
  }

  #clicked(target, act) {
    const button = target.closest("button")?.dataset.testid;
    if (button === "ack" || button === "archive") act(button, this);
    else if (button === "mark-read") act(this.read ? "unread" : "read", this);
    // The end of a selection is no click.
    else if (!this.read && getSelection().isCollapsed) act("read", this);
  }

  render({ online, autoAck }) {
    const { dataset } = this.element;
    const part = (name) => this.element.querySelector(name);
    const isOwed = this.owed.size > 0;
    dataset.read = this.read;
    dataset.acked = this.delivered ? !isOwed : "unknown";
    dataset.try = this.tries || "";
    dataset.caughtup = this.caughtUp;
    part(".caught").hidden = !this.caughtUp;
    part(".try").hidden = this.tries < 2;
    part(".try").textContent = `try ${this.tries}`;
    part(".ticks").textContent = this.delivered ? (isOwed ? "✓ sent" : "✓✓ acked") : "";
    part("[data-testid=mark-read]").textContent = this.read ? "Mark unread" : "Mark read";
    part("[data-testid=ack]").hidden = !isOwed || autoAck;
    for (const button of this.element.querySelectorAll("button")) button.disabled = !online;
  }
}

function summary({ data }) {
  if (data === undefined || data === null) return "no data";
  if (typeof data === "string") return cut(data, 300);
  return cut(typeof data.text === "string" && data.text ? data.text : JSON.stringify(data), 300);
}

export class List {
  /** The `before` of the next older page, null at the end. */
  next = null;

  #rows = new Map(); // by id
  #byPosition = new Map();
  #element;
  #act;
  #look;
  #epoch = 0;
  #paged = false;

  /**
   * @param {HTMLElement} element of the list
   * @param {(action: string, row: Row) => void} act what the user wants with a row: ack, read, unread, archive
   * @param {() => {online: boolean, autoAck: boolean}} look how rows are shown now
   */
  constructor(element, act, look) {
    this.#element = element;
    this.#act = act;
    this.#look = look;
  }

  get size() {
    return this.#rows.size;
  }

  get rows() {
    return [...this.#rows.values()];
  }

  /** How many notifications this device has not acknowledged. */
  get owed() {
    return this.rows.filter((row) => row.owed.size > 0).length;
  }

  clear() {
    for (const row of this.rows) this.#remove(row);
    this.next = null;
  }

  /** A new connection: what it neither delivers nor lists is going to leave. */
  begin() {
    this.#epoch += 1;
    this.#paged = false;
  }

  render() {
    const look = this.#look();
    for (const row of this.#rows.values()) row.render(look);
  }

  /** A notification has come. False where it is old news: archived here, or acknowledged, before it came again. */
  deliver({ pos, try: tries, n, again, caughtUp }) {
    let row = this.#rows.get(n.id);
    if (!row && again) return false;
    const isNews = !again || row.owed.size > 0;
    if (!row) this.#element.prepend((row = this.#add(n)).element);
    this.#place(row, pos);
    if (!again) row.caughtUp = caughtUp;
    row.delivered = true;
    row.tries = Math.max(row.tries, tries);
    row.owed.add(pos);
    row.render(this.#look());
    this.#trim();
    return isNews;
  }

  acked(positions) {
    for (const pos of positions) {
      const row = this.#byPosition.get(pos);
      row?.owed.delete(pos);
      row?.render(this.#look());
    }
  }

  at(positions) {
    return positions.map((pos) => this.#byPosition.get(pos)).filter(Boolean);
  }

  /** This position's row and all older ones; null when it is not here, for positions are opaque. */
  upto(pos) {
    const rows = [...this.#element.children].map((item) => this.#rows.get(item.dataset.id));
    const from = rows.indexOf(this.#byPosition.get(pos));
    return from < 0 ? null : rows.slice(from);
  }

  mark(as, rows) {
    for (const row of rows) {
      if (as === "archived") this.#remove(row);
      else if (as !== "seen") row.read = as === "read";
      row.render(this.#look());
    }
  }

  /**
   * The newest page is the truth: what this connection has not confirmed and the page does not list, goes.
   * @param {boolean} settled the inbox has had time to store what was delivered
   */
  showNewest({ items, next }, settled) {
    if (!this.#paged) this.next = next;
    const listed = this.#take(items);
    for (const row of this.rows) {
      if (row.epoch !== this.#epoch && row.owed.size === 0) this.#remove(row);
    }
    this.#arrange(this.#around(listed, settled));
  }

  /**
   * The list's order with a page in it. A page is one run of the inbox: what is not listed is newer or older than
   * all of it, or has only now been delivered from the midst of it.
   */
  #around(listed, settled) {
    const all = [...this.#element.children];
    const first = all.findIndex((item) => listed.has(item));
    if (first < 0) return [...all, ...listed];
    const last = all.findLastIndex((item) => listed.has(item));
    const amid = new Map(); // listed item -> what comes below it
    let above = null;
    for (const item of all.slice(first, last + 1)) {
      if (listed.has(item)) amid.set((above = item), []);
      else if (settled && this.#isArchived(item)) this.#remove(this.#rows.get(item.dataset.id));
      else amid.get(above).push(item);
    }
    const page = [...listed].flatMap((item) => [item, ...(amid.get(item) ?? [])]);
    return [...all.slice(0, first), ...page, ...all.slice(last + 1)];
  }

  /** Caught up in order, and left out by a page that lists its neighbours: archived on another device meanwhile. */
  #isArchived(item) {
    const { caughtUp, tries } = this.#rows.get(item.dataset.id);
    return caughtUp && tries === 1;
  }

  showOlder({ items, next }) {
    this.#paged = true;
    this.next = next;
    const listed = this.#take(items);
    this.#arrange([...[...this.#element.children].filter((item) => !listed.has(item)), ...listed]);
  }

  #add(n) {
    const row = new Row(n, this.#act);
    this.#rows.set(n.id, row);
    return row;
  }

  #place(row, pos) {
    row.epoch = this.#epoch;
    row.positions.add(pos);
    this.#byPosition.set(pos, row);
  }

  #remove(row) {
    row.element.remove();
    this.#rows.delete(row.id);
    for (const pos of row.positions) this.#byPosition.delete(pos);
  }

  #take(items) {
    const listed = new Set();
    for (const { pos, read, n } of items) {
      const row = this.#rows.get(n.id) ?? this.#add(n);
      this.#place(row, pos);
      row.read = read;
      row.render(this.#look());
      listed.add(row.element);
    }
    return listed;
  }

  /** Put the list in this order, moving no more than must move: a moved element loses its focus. */
  #arrange(wanted) {
    let at = this.#element.firstElementChild;
    for (const item of wanted) {
      if (item === at) at = at.nextElementSibling;
      else this.#element.insertBefore(item, at);
    }
    this.#trim();
  }

  #trim() {
    while (this.#rows.size > MAX_ROWS) {
      this.#remove(this.#rows.get(this.#element.lastElementChild.dataset.id));
      const [last] = this.#rows.get(this.#element.lastElementChild.dataset.id).positions;
      this.next = last;
    }
  }
}
