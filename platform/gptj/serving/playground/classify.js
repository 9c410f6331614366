// Text classification: labels with their scores as bars.

import { request } from "./client.js";
import { element, Form, percent } from "./form.js";
import { curl, python, showCode } from "./snippets.js";

const PATH = "classification";

export const health = `${PATH}/health`;

export function start(panel, needsKey) {
  const form = new Form(panel, {
    needsKey,
    submit: async (body, signal) => {
      const [labels] = await (await request(PATH, { body, signal })).json();
      show(form, labels, body.parameters?.function_to_apply === "none");
    },
  });
  showCode(form.part("code"), form.form, () => ({
    curl: curl(PATH, form.body()),
    Python: python(PATH, form.body()),
  }));
  return {};
}

function show(form, labels, areLogits) {
  const most = Math.max(...labels.map(({ score }) => Math.abs(score)), Number.EPSILON);
  const rows = labels.map(({ label, score }) => {
    const bar = element("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", String(Math.abs(areLogits ? score / most : score)));
    if (score < 0) bar.classList.add("negative");
    const shown = areLogits ? score.toFixed(3) : percent(score);
    return element("li", {}, element("span", {}, label), element("span", {}, shown), bar);
  });
  form.part("bars").replaceChildren(...rows);
  form.part("result").hidden = false;
  form.part("status").textContent = `The likeliest label is ${labels[0].label}.`;
}
