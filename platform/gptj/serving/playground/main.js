// The page: its tabs, which of them have an application that answers, and the key.

import * as ask from "./ask.js";
import * as chat from "./chat.js";
import * as classify from "./classify.js";
import { key, request } from "./client.js";
import * as generate from "./generate.js";

// By tab id in index.html. A module exports its application's `health` path and
// `start(panel, needsKey)`, whose result may have `ready()`, called once the application answers.
// It may export `missing()`: why the application does not support this, or null.
const MODULES = { generate, chat, classify, ask };
const PATIENCE_MS = 10_000; // between checks of an application that does not answer

class Tabs {
  constructor(list) {
    this.tabs = [...list.querySelectorAll("[role=tab]")];
    for (const tab of this.tabs) tab.addEventListener("click", () => this.#go(tab));
    list.addEventListener("keydown", (event) => this.#move(event));
    addEventListener("hashchange", () => this.select(this.#named()));
    this.select(this.#named());
  }

  select(chosen) {
    for (const tab of this.tabs) {
      const selected = tab === chosen;
      tab.setAttribute("aria-selected", String(selected));
      tab.tabIndex = selected ? 0 : -1;
      panelOf(tab).hidden = !selected;
    }
  }

  /** Select the user's choice and put it in the URL. */
  #go(chosen) {
    this.select(chosen);
    history.replaceState(null, "", `#${chosen.id}`);
  }

  #named() {
    return this.tabs.find(({ id }) => location.hash === `#${id}`) ?? this.tabs[0];
  }

  #move(event) {
    const now = this.tabs.indexOf(event.target);
    const places = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: -1 };
    if (!(event.key in places)) return;
    event.preventDefault();
    const next = this.tabs.at(places[event.key] % this.tabs.length);
    this.#go(next);
    next.focus();
  }
}

const panelOf = (tab) => document.getElementById(tab.getAttribute("aria-controls"));

/** Check an application's health; if it fails, show its tab as unavailable, with the reason. */
async function watch(tab, module, started) {
  const reason = await problem(module);
  const notice = panelOf(tab).querySelector("[data-part=unavailable]");
  notice.textContent = reason ?? "";
  notice.hidden = reason === null;
  tab.classList.toggle("unavailable", reason !== null);
  panelOf(tab).querySelector("[data-part=fields]").disabled = reason !== null;
  panelOf(tab).querySelector("[data-part=submit]").disabled = reason !== null;
  if (reason !== null) {
    tab.setAttribute("aria-description", "unavailable");
    setTimeout(() => watch(tab, module, started), PATIENCE_MS);
    return;
  }
  tab.removeAttribute("aria-description");
  await ready(started);
}

async function problem(module) {
  try {
    await request(module.health);
    const missing = (await module.missing?.()) ?? null;
    return missing && `Unavailable: ${missing}`;
  } catch (error) {
    if (error.status === 404 || error.status === 401)
      return `Unavailable: no application of this kind is deployed here (nothing at /${module.health}).`;
    return `Unavailable: ${error.message}`;
  }
}

/** Load what a tab needs before its first request; prompts for a missing key. */
async function ready(started) {
  try {
    await started.ready?.();
  } catch (error) {
    if (error.status !== 401) throw error;
    if (error.key === key.get()) askForKey(); // a newer key loads all tabs again
  }
}

const dialog = document.getElementById("key-dialog");
const keyField = document.getElementById("key");
const keyReason = document.getElementById("key-reason");
let afterKey = null; // retries what failed without a valid key

/** After a refusal: prompt for another key, then call `again`. */
function askForKey(again = null) {
  keyReason.textContent = key.get()
    ? "The service did not accept this key."
    : "This service answers only to requests with a key.";
  openKeys(again);
}

function openKeys(again) {
  if (dialog.open) {
    afterKey ??= again;
    return; // another tab was refused: keep what is being typed
  }
  afterKey = again;
  keyField.value = key.get();
  dialog.showModal();
  keyField.focus();
}

function useKey(value) {
  key.set(value);
  dialog.close();
  showKey();
  for (const each of Object.values(started)) ready(each);
  for (const form of document.querySelectorAll("[role=tabpanel] form"))
    form.dispatchEvent(new Event("input")); // update the code samples, which show whether a key is sent
  if (value) afterKey?.();
}

function showKey() {
  document.getElementById("key-button").textContent = key.get() ? "Key: set" : "Key";
}

document.getElementById("key-button").addEventListener("click", () => {
  keyReason.textContent = "Sent as Authorization: Bearer with each request.";
  openKeys(null);
});
document.getElementById("key-forget").addEventListener("click", () => useKey(""));
document.getElementById("key-cancel").addEventListener("click", () => dialog.close());
dialog.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(keyField.value.trim());
});

showKey();
const tabs = new Tabs(document.querySelector("[role=tablist]"));
const started = {};
for (const tab of tabs.tabs) {
  started[tab.id] = MODULES[tab.id].start(panelOf(tab), askForKey);
  watch(tab, MODULES[tab.id], started[tab.id]);
}
