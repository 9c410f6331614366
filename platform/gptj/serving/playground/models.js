// A form's model: the names of /v1/models as suggestions, or any other that is typed.

import { request } from "./client.js";
import { element } from "./form.js";

/** Suggest the names, and use the first, the base model, if none is entered. Throws RequestError. */
export async function showModels(form) {
  const models = (await (await request("v1/models")).json()).data;
  const field = form.form.elements.model;
  field.list.replaceChildren(...models.map(({ id }) => element("option", { value: id })));
  field.placeholder = models[0]?.id ?? "";
  form.form.dispatchEvent(new Event("input")); // the code names the model
}
