/**
 * The demo page: three devices side by side, and a form that publishes to them.
 * What comes over the wire is data: it reaches the page as text nodes only.
 */
import { Card } from "./card.js";
import { Publisher } from "./publish.js";
import { api, element, info } from "./util.js";

const STORAGE = "tidings.devices";
const DEVICES = [
  { user: "alice", device: "phone" },
  { user: "alice", device: "laptop" },
  { user: "bob", device: "phone" },
];

const publisher = new Publisher(document.querySelector(".panel"));
const settings = load();
const hooks = { changed, followed, arrived: (id, name) => publisher.arrived(id, name) };
const cards = settings.map((device, index) => new Card(index, device, hooks));
document.getElementById("cards").append(...cards.map((card) => card.root));
renderUsers();
introduce();
// Whoever comes back to the page may have followed something elsewhere.
addEventListener("focus", () => cards.forEach((card) => card.askTopics()));

function load() {
  let stored = [];
  try {
    stored = JSON.parse(localStorage.getItem(STORAGE)) ?? [];
  } catch {
    // A browser that keeps nothing, or kept what is none of ours: begin anew.
  }
  return DEVICES.map((device, index) => ({ on: true, autoAck: true, ...device, ...stored[index] }));
}

function changed() {
  try {
    localStorage.setItem(STORAGE, JSON.stringify(settings));
  } catch {
    // It is only a convenience.
  }
  renderUsers();
}

/** Topics are the user's: all devices show what one has changed. */
function followed(user) {
  for (const card of cards) if (card.settings.user === user) card.askTopics();
}

function renderUsers() {
  const users = [...new Set(settings.map(({ user }) => user))];
  document.getElementById("users").replaceChildren(...users.map((user) => new Option(user, user)));
}

async function introduce() {
  try {
    Object.assign(info, await api("/dev/info"));
  } catch {
    return; // the defaults are right for most
  }
  const parts = [element("code", "", info.nats_url), element("span", "", `v${info.version}`)];
  document.getElementById("info").replaceChildren(...parts);
  publisher.renderCommands();
}
