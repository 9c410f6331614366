// The names of /v1/models as a form's choice.

import { request } from "./client.js";
import { element } from "./form.js";

/** Without a key it may have to wait for one. Throws RequestError. */
export async function showModels(form) {
  const models = (await (await request("v1/models")).json()).data;
  const choice = form.form.elements.model;
  const chosen = choice.value;
  choice.replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  if (models.some(({ id }) => id === chosen)) choice.value = chosen;
  form.form.dispatchEvent(new Event("input")); // the code names the model
}
