// Shared by all tabs: a form's fields as a request body, its state, and its errors.

import { RequestError } from "./client.js";

/** An element with text, attributes and children: `element("li", { class: "bar" }, "text", …)`. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

/** Text by code points, which is how the services count characters. */
export const characters = (text) => Array.from(text);

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

export class Form {
  /** The form of a tab's panel; `submit(body, signal)` sends the request and shows the result. */
  constructor(panel, { submit, needsKey }) {
    this.panel = panel;
    this.form = panel.querySelector("form");
    this.submit = submit;
    this.needsKey = needsKey;
    this.running = null; // an AbortController
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.run();
      }
    });
    this.form.addEventListener("input", (event) => this.#clear(event.target));
    panel.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    this.part("stop")?.addEventListener("click", () => this.stop());
  }

  /** An element of the panel by its data-part. */
  part(name) {
    return this.panel.querySelector(`[data-part="${name}"]`);
  }

  /** The fields that differ from the service's defaults, nested by their dotted names. */
  body() {
    const body = {};
    for (const field of this.form.querySelectorAll("[name]")) {
      const value = read(field);
      if (value === undefined) continue;
      const path = field.name.split(".");
      const last = path.pop();
      let inner = body;
      for (const part of path) inner = inner[part] ??= {};
      inner[last] = value;
    }
    return body;
  }

  async run() {
    if (this.running || this.part("fields").disabled) return;
    this.#clearAll();
    this.running = new AbortController();
    this.#showRunning(true);
    try {
      await this.submit(this.body(), this.running.signal);
    } catch (error) {
      this.#show(error);
    } finally {
      this.running = null;
      this.#showRunning(false);
    }
  }

  stop() {
    this.running?.abort();
  }

  #showRunning(running) {
    // Not `disabled`, which would move the focus away from the button just pressed.
    this.part("submit").setAttribute("aria-disabled", String(running));
    this.panel.setAttribute("aria-busy", String(running));
    const stop = this.part("stop");
    if (!stop) return;
    if (!running && document.activeElement === stop) this.part("submit").focus();
    stop.disabled = !running;
  }

  #show(error) {
    if (!(error instanceof RequestError)) throw error; // a bug: show it in the console
    if (error.status === 401) {
      this.#say("This service needs a key.", error.message);
      this.needsKey(() => this.run());
    } else if (error.status === 429 || error.status === 503) {
      this.#sayLater(error);
    } else {
      const field = this.#field(error.field);
      this.#say(titleOf(error, field), error.message);
      if (field) this.#mark(field, error.message);
    }
  }

  #say(title, message) {
    const box = this.part("error");
    box.replaceChildren(element("strong", {}, title), element("p", {}, message));
    box.hidden = false;
    return box;
  }

  /** Busy: count down on the button until a retry. */
  #sayLater(error) {
    const title = error.status === 429 ? "The service is busy." : "The service is not ready.";
    let seconds = error.retryAfter ?? 1;
    const again = element("button", { type: "button", "aria-live": "off" });
    const box = this.#say(title, error.message);
    box.append(element("p", {}, `You can try again in ${seconds} s.`), again);
    again.addEventListener("click", () => !again.disabled && this.run());
    const count = () => {
      again.disabled = seconds > 0;
      again.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
      seconds -= 1;
      if (again.disabled && again.isConnected) setTimeout(count, 1000);
    };
    count();
  }

  /** The input that an error names: `stop`, `parameters.top_k`, or `inputs[3]`. */
  #field(path) {
    if (!path) return null;
    const name = path.replace(/\[.*$/, "");
    return this.form.querySelector(`[name="${CSS.escape(name)}"]`);
  }

  #mark(field, message) {
    const id = `${field.id}-error`;
    const hint = element("small", { id, class: "wrong" }, message);
    field.closest(".field").append(hint);
    const described = [field.getAttribute("aria-describedby"), id].filter(Boolean).join(" ");
    field.setAttribute("aria-describedby", described);
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  #clear(field) {
    if (!field.hasAttribute("aria-invalid")) return;
    const id = `${field.id}-error`;
    document.getElementById(id)?.remove();
    const rest = field.getAttribute("aria-describedby").split(" ").filter((each) => each !== id);
    if (rest.length) field.setAttribute("aria-describedby", rest.join(" "));
    else field.removeAttribute("aria-describedby");
    field.removeAttribute("aria-invalid");
  }

  #clearAll() {
    this.part("error").hidden = true;
    this.part("error").replaceChildren();
    for (const field of this.form.querySelectorAll("[aria-invalid]")) this.#clear(field);
  }
}

/** A field's value as JSON; undefined if it is the service's default. */
function read(field) {
  if (field.type === "checkbox") return field.checked ? true : undefined;
  const value = field.value;
  if (field.list) return value.trim() || field.placeholder || undefined; // what it shows
  if (field.tagName === "TEXTAREA" || field.name.startsWith("inputs")) return value;
  if (value === "" && !field.validity.badInput) return undefined;
  if (field.type !== "number") return value;
  if (field.validity.badInput) return "not a number"; // let the service report the error
  return value === field.dataset.default ? undefined : Number(value);
}

function titleOf(error, field) {
  if (error.broken) return "The answer was interrupted.";
  if (error.status === 0) return "No answer.";
  if (field) return `“${field.labels[0].textContent}” is wrong.`;
  if (error.status === 404) return "Not found.";
  if (error.status === 413) return "This is too long.";
  return error.status >= 500 ? "The service failed." : "The request was refused.";
}
