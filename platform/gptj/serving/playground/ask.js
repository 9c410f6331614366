// Question answering: the answers, and each one marked in its context.

import { request } from "./client.js";
import { characters, element, Form, percent } from "./form.js";
import { curl, python, showCode } from "./snippets.js";

const PATH = "question-answering";

export const health = `${PATH}/health`;

export function start(panel, needsKey) {
  const form = new Form(panel, {
    needsKey,
    submit: async (body, signal) => {
      const reply = await (await request(PATH, { body, signal })).json();
      show(form, [reply].flat(), body.inputs.context); // a list only if several were requested
    },
  });
  showCode(form.part("code"), form.form, () => ({
    curl: curl(PATH, form.body()),
    Python: python(PATH, form.body()),
  }));
  return {};
}

function show(form, answers, context) {
  const buttons = answers.map((answer) => {
    const button = element(
      "button",
      { type: "button" },
      element("span", {}, answer.answer || "no answer"),
      element("span", { class: "score" }, percent(answer.score)),
    );
    button.addEventListener("click", () => choose(answer, button));
    return button;
  });

  function choose(answer, button) {
    for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
    form.part("context").replaceChildren(...marked(context, answer));
    form.part("context").querySelector("mark")?.scrollIntoView({ block: "nearest" });
  }

  form.part("answers").replaceChildren(...buttons.map((each) => element("li", {}, each)));
  form.part("result").hidden = false;
  form.part("status").textContent = answers[0].answer
    ? `The likeliest answer is “${answers[0].answer}”.`
    : "The context has no answer.";
  choose(answers[0], buttons[0]);
}

/** The context with the answer's characters in a <mark>. */
function marked(context, { start, end }) {
  const all = characters(context);
  const text = (from, to) => all.slice(from, to).join("");
  if (start === end) return [context];
  return [text(0, start), element("mark", {}, text(start, end)), text(end)];
}
