// The present form as programs: curl and Python, shown in a tab's "As code".

import { address, key } from "./client.js";
import { element } from "./form.js";

/** Keep what `details` shows in step with a form: `programs()` gives the two texts. */
export function showCode(details, form, programs) {
  const texts = {};
  for (const name of ["curl", "Python"]) {
    texts[name] = element("code");
    const copy = element("button", { type: "button" }, "Copy");
    const said = element("span", { role: "status", class: "hint" });
    copy.setAttribute("aria-label", `Copy ${name}`);
    copy.addEventListener("click", async () => {
      said.textContent = (await copied(texts[name])) ? "Copied." : "Selected: press Ctrl+C.";
    });
    details.append(
      element("div", { class: "snippet" }, element("h2", {}, name), copy, said),
      element("pre", { tabindex: "0", role: "group", "aria-label": name }, texts[name]),
    );
  }
  const update = () => {
    for (const [name, text] of Object.entries(programs())) texts[name].textContent = text;
  };
  form.addEventListener("input", update);
  details.addEventListener("toggle", update);
  update();
}

export function curl(path, body, options = "") {
  const authorization = key.get() ? ` \\\n  -H "Authorization: Bearer $GPTJ_API_KEY"` : "";
  return (
    `curl ${options}${quoted(address(path))}${authorization} \\\n` +
    `  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}`
  );
}

/** A POST by requests, whose reply is printed. */
export function python(path, body) {
  const headers = key.get()
    ? `\n    headers={"Authorization": f"Bearer {os.environ['GPTJ_API_KEY']}"},`
    : "";
  return (
    `${key.get() ? "import os\n\n" : ""}import requests\n\n` +
    `reply = requests.post(\n    ${literal(address(path))},${headers}\n` +
    `    json=${literal(body)},\n)\nreply.raise_for_status()\nprint(reply.json())`
  );
}

const OWN = new Set(["top_k", "repetition_penalty"]); // fields that OpenAI's API does not have

/** A stream by curl and by OpenAI's client: `call` is its method, `part` a choice's text. */
export function streamPrograms(path, call, body, part) {
  const own = Object.entries(body).filter(([name]) => OWN.has(name));
  const fields = Object.entries(body).filter(([name]) => !OWN.has(name));
  const lines = fields.map(([name, value]) => `    ${name}=${literal(value)},\n`);
  if (own.length) lines.push(`    extra_body=${literal(Object.fromEntries(own))},\n`);
  const environment = key.get() ? "import os\n\n" : "";
  const apiKey = key.get() ? `os.environ["GPTJ_API_KEY"]` : `"none"`;
  return {
    curl: curl(path, body, "--no-buffer "),
    Python:
      `${environment}from openai import OpenAI\n\n` +
      `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${apiKey})\n` +
      `stream = client.${call}.create(\n${lines.join("")})\n` +
      `for chunk in stream:\n    print(chunk.choices[0].${part}, end="", flush=True)\nprint()`,
  };
}

/** JSON's value in Python's notation. */
export function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const items = Object.entries(value).map(([name, each]) => `${literal(name)}: ${literal(each)}`);
  return `{${items.join(", ")}}`;
}

/** For a shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

async function copied(code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    return true;
  } catch {
    // Browsers copy only on pages that came by TLS or from this machine.
    getSelection().selectAllChildren(code);
    return false;
  }
}
