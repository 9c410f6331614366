// Text generation: the stream of POST /v1/completions, token by token with its alternatives.

import { events } from "./client.js";
import { characters, element, Form, percent } from "./form.js";
import { showModels } from "./models.js";
import { showCode, streamPrograms } from "./snippets.js";

const PATH = "v1/completions";
const ALTERNATIVES = 5;

export const health = "health";

export function start(panel, needsKey) {
  const form = new Form(panel, {
    needsKey,
    submit: (fields, signal) => generate(form, tokens, requestOf(fields), signal),
  });
  const tokens = new Tokens(form.part("tokens"), form.part("alternatives"));
  showCode(form.part("code"), form.form, () =>
    streamPrograms(PATH, "completions", requestOf(form.body()), "text"),
  );
  return { ready: () => showModels(form) };
}

/** The request body, from the form's fields. */
function requestOf(fields) {
  const { stop, logprobs, ...rest } = fields;
  if (stop) rest.stop = stop.replaceAll("\\n", "\n");
  if (logprobs) rest.logprobs = ALTERNATIVES;
  return { ...rest, stream: true };
}

async function generate(form, tokens, body, signal) {
  const status = form.part("status");
  const started = performance.now();
  const seen = { tokens: 0, first: null, last: null, reason: null };
  form.part("result").hidden = false;
  form.part("legend").hidden = body.logprobs === undefined;
  status.textContent = "Generating …";
  tokens.begin(body.prompt);
  // Hidden from screen readers, which would announce each token separately.
  const live = element("span", { "aria-hidden": "true" });
  status.append(live);
  const options = { include_usage: true, continuous_usage_stats: true };
  try {
    for await (const chunk of events(PATH, { body: { ...body, stream_options: options }, signal })) {
      if (chunk.usage) seen.tokens = chunk.usage.completion_tokens;
      const [choice] = chunk.choices;
      if (!choice) continue; // the last chunk only has token counts
      seen.last = performance.now();
      seen.first ??= seen.last;
      seen.firstTokens ??= seen.tokens;
      seen.reason = choice.finish_reason ?? seen.reason;
      tokens.add(choice.text, choice.logprobs);
      live.textContent = ` ${numbers(seen, started)}`;
    }
  } catch (error) {
    status.textContent = `Interrupted. ${numbers(seen, started)}`;
    if (error.name !== "AbortError") throw error;
    seen.reason = "user";
  } finally {
    tokens.end();
  }
  status.textContent = `${ENDS[seen.reason] ?? "Done."} ${numbers(seen, started)}`;
}

const ENDS = {
  stop: "Done: the text has ended.",
  length: "Done: as many tokens as were allowed.",
  user: "Stopped.",
};

function numbers({ tokens, firstTokens, first, last }, started) {
  if (first === null) return "No token yet.";
  const seconds = (last - first) / 1000;
  const speed = seconds > 0 ? `, ${((tokens - firstTokens) / seconds).toFixed(1)} tokens/s` : "";
  const wait = `${Math.round(first - started)} ms`;
  return `${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}, the first after ${wait}.`;
}

/** The text as a row of tokens, with the alternatives of the one under the pointer. */
class Tokens {
  constructor(box, alternatives) {
    this.box = box;
    this.alternatives = alternatives;
    box.addEventListener("pointerover", ({ target }) => this.#show(target));
    box.addEventListener("click", ({ target }) => this.#show(target));
    // Around both, so that the pointer can move from a token to its alternatives.
    box.parentElement.addEventListener("pointerleave", () => this.#hide());
    box.addEventListener("blur", () => this.alternatives.matches(":hover") || this.#hide());
    document.addEventListener("keydown", ({ key }) => key === "Escape" && this.#hide());
    box.addEventListener("keydown", (event) => this.#move(event));
  }

  begin(prompt) {
    this.#hide();
    this.text = []; // characters of the completion
    this.known = new WeakMap(); // a token's element -> its log-probabilities
    this.open = null; // the last token and its start; its end is the next one's start
    this.box.replaceChildren(element("span", { class: "prompt" }, prompt));
  }

  add(text, logprobs) {
    this.text.push(...characters(text));
    if (!logprobs) {
      this.box.append(text);
      return;
    }
    logprobs.tokens.forEach((token, index) => {
      const offset = logprobs.text_offset[index];
      this.#close(offset);
      const made = element("span", { class: "token" });
      const logprob = logprobs.token_logprobs[index];
      made.style.setProperty("--likely", Math.exp(logprob).toFixed(3));
      this.known.set(made, { token, logprob, top: logprobs.top_logprobs[index] ?? {} });
      this.open = { made, offset };
      this.box.append(made);
    });
    if (this.open) this.open.made.textContent = this.text.slice(this.open.offset).join("");
  }

  end() {
    this.open = null;
  }

  #close(end) {
    if (this.open) this.open.made.textContent = this.text.slice(this.open.offset, end).join("");
  }

  #move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const visible = [...this.box.querySelectorAll(".token")].filter((each) => each.textContent);
    if (!(event.key in steps) || !visible.length) return;
    event.preventDefault();
    const now = visible.indexOf(this.current);
    const next = now < 0 ? 0 : Math.min(Math.max(now + steps[event.key], 0), visible.length - 1);
    this.#show(visible[next]);
  }

  #show(token) {
    const known = this.known?.get(token);
    if (!known || token === this.current) return;
    this.#hide();
    this.current = token;
    token.classList.add("current");
    const rows = Object.entries(known.top)
      .sort(([, one], [, other]) => other - one)
      .map(([text, logprob]) => {
        const chosen = text === known.token;
        const share = Math.exp(logprob);
        const bar = element("span", { class: "bar", "aria-hidden": "true" });
        bar.style.setProperty("--share", String(share));
        return element(
          "li",
          chosen ? { class: "chosen" } : {},
          element("code", {}, visibleText(text)),
          element("span", {}, percent(share)),
          ...(chosen ? [element("span", { class: "visually-hidden" }, "chosen")] : []),
          bar,
        );
      });
    this.alternatives.replaceChildren(element("ol", {}, ...rows));
    this.alternatives.hidden = false;
    this.#place(token);
  }

  /** Directly below the token, so that the pointer crosses no other, and within the page. */
  #place(token) {
    const around = this.alternatives.parentElement.getBoundingClientRect();
    const [at] = token.getClientRects();
    const room = around.width - this.alternatives.offsetWidth;
    this.alternatives.style.left = `${Math.max(0, Math.min(at.left - around.left, room))}px`;
    this.alternatives.style.top = `${at.bottom - around.top}px`;
  }

  #hide() {
    this.current?.classList.remove("current");
    this.current = null;
    this.alternatives.hidden = true;
  }
}

/** A token with visible white space. */
const visibleText = (text) =>
  text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
