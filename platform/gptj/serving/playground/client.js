// Requests to the applications under this page's address, with the key; errors in a form to show.

const KEY = "gptj-key"; // in sessionStorage, which ends with the browser's tab

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/**
 * A failed request: `status` is 0 without an answer, `broken` says that one began but has no end,
 * `field` names the invalid field.
 */
export class RequestError extends Error {
  constructor(message, options = {}) {
    const { status = 0, broken = false, field = null, retryAfter = null, key = null } = options;
    super(message);
    this.status = status;
    this.broken = broken;
    this.field = field;
    this.retryAfter = retryAfter; // seconds
    this.key = key; // as it was sent
  }
}

/** The absolute address of a path below this page. */
export const address = (path) => new URL(path, document.baseURI).href;

/** The reply to a GET, or to a POST if there is a body. Throws RequestError. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  const used = key.get();
  if (used) headers.Authorization = `Bearer ${used}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(address(path), {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    throw interrupted(error);
  }
  if (!reply.ok) throw await refusal(reply, used);
  return reply;
}

/** The chunks of a server-sent stream as objects. Throws RequestError, also for error events. */
export async function* events(path, { body, signal }) {
  const reply = await request(path, { body, signal });
  const broken = (message, field = null) => new RequestError(message, { broken: true, field });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw broken("The stream ended early: the service may have stopped.");
      pending += value;
      const parts = pending.split("\n\n");
      pending = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw broken(chunk.error.message, chunk.error.param);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw broken("The connection was lost: the service, or the network, may be down.");
  } finally {
    reader.cancel().catch(() => {}); // it may already have failed, as reported above
  }
}

/** Convert a failed fetch; a stop by the user stays an AbortError. */
function interrupted(error) {
  if (error.name === "AbortError") return error;
  return new RequestError("The service does not answer. Is it running, and is the network up?");
}

async function refusal(reply, used) {
  const text = await reply.text();
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    error.message = text.slice(0, 300); // not ours: from a proxy in front of the service
  }
  const wait = Number.parseInt(reply.headers.get("Retry-After") ?? "", 10);
  return new RequestError(error.message || `The service answered ${reply.status}.`, {
    status: reply.status,
    field: error.param ?? null,
    retryAfter: Number.isNaN(wait) ? null : wait,
    key: used,
  });
}
