// Chat: turns over POST /v1/chat/completions, each reply shown while it is written.

import { events, request } from "./client.js";
import { element, Form } from "./form.js";
import { showModels } from "./models.js";
import { showCode, streamPrograms } from "./snippets.js";

const PATH = "v1/chat/completions";

export const health = "health";

/** Why the application does not support chats, if so; unknown without a key. */
export async function missing() {
  try {
    const { data } = await (await request("v1/models")).json();
    if (data.some(({ chat_template }) => chat_template)) return null;
    return "this model has no chat template. args.chat_template gives it one.";
  } catch (error) {
    if (error.status === 401) return null;
    throw error;
  }
}

export function start(panel, needsKey) {
  const chat = new Chat(panel, needsKey);
  return { ready: () => showModels(chat.form) };
}

class Chat {
  constructor(panel, needsKey) {
    this.turns = []; // messages so far, with role and content
    this.form = new Form(panel, { needsKey, submit: (fields, signal) => this.#say(fields, signal) });
    this.log = this.form.part("turns");
    this.form.part("clear").addEventListener("click", () => this.#clear());
    showCode(this.form.part("code"), this.form.form, () =>
      streamPrograms(PATH, "chat.completions", this.#body(this.form.body()), "delta.content"),
    );
  }

  /** The request body, from the form's fields and the messages so far. */
  #body({ system, message, ...rest }) {
    const first = system ? [{ role: "system", content: system }] : [];
    const messages = [...first, ...this.turns, { role: "user", content: message }];
    return { ...rest, messages, stream: true };
  }

  async #say(fields, signal) {
    const status = this.form.part("status");
    const turns = this.turns; // another list, once "New chat" is pressed
    const user = this.#show("user", fields.message);
    const reply = this.#show("assistant", "");
    // Hidden until complete: screen readers would announce each token.
    reply.setAttribute("aria-hidden", "true");
    this.form.part("result").hidden = false;
    status.textContent = "Answering …";
    let content = "";
    let reason = null;
    try {
      for await (const chunk of events(PATH, { body: this.#body(fields), signal })) {
        const [choice] = chunk.choices;
        if (!choice) continue;
        content += choice.delta.content ?? "";
        reason = choice.finish_reason ?? reason;
        reply.lastChild.textContent = content;
      }
    } catch (error) {
      if (error.name !== "AbortError" && this.turns === turns) {
        status.textContent = "";
        user.remove();
        reply.remove();
        this.form.part("result").hidden = this.turns.length === 0;
        throw error;
      }
      reason = "user";
    }
    const { message } = this.form.form.elements;
    if (message.value === fields.message) message.value = ""; // else the next is being written
    if (this.turns === turns) {
      turns.push({ role: "user", content: fields.message }, { role: "assistant", content });
      reply.remove();
      this.#show("assistant", content); // an addition to the log, which is announced
      status.textContent = ENDS[reason] ?? "Done.";
    }
    this.form.form.dispatchEvent(new Event("input")); // update the code sample, which includes the turns
  }

  #show(role, content) {
    const said = element("p", { class: "said" }, content);
    const turn = element("li", { class: role }, element("h2", {}, NAMES[role]), said);
    this.log.append(turn);
    return turn;
  }

  #clear() {
    this.form.stop();
    this.turns = [];
    this.log.replaceChildren();
    this.form.part("status").textContent = "";
    this.form.part("result").hidden = true;
    this.form.form.dispatchEvent(new Event("input"));
    this.form.form.elements.message.focus();
  }
}

const NAMES = { user: "You", assistant: "Model" };
const ENDS = {
  stop: "Done: the reply has ended.",
  length: "Done: as many tokens as were allowed.",
  user: "Stopped.",
};
