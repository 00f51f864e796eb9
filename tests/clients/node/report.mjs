// What the check scripts share: where the server is, the questions, and one JSON line a check. Node's own modules only.
// A check is a function. Returning means that the client did what its users rely on; what it returns is the detail of the line.

import assert from "node:assert/strict";

export const URL = process.env.LETHE_URL ?? "http://127.0.0.1:8000";
export const KEY = process.env.LETHE_KEY ?? "none needed";
export const MODEL = process.env.LETHE_MODEL ?? "smollm2-135m-instruct";
export const QUESTION = "What is the capital of France?";
export const TURNS = [QUESTION, "The capital of France is Paris.", "And of Italy?"];
export const BANNED = "Harry Potter"; // a phrase that the runner has put in force
export const REFUSAL = "I cannot continue this answer.";
export const CITIES = ["Paris", "Rome"];
export const CITY_SCHEMA = schemaOf(CITIES);
export const BANNED_SCHEMA = schemaOf([BANNED]); // allows only the phrase in force: a guard has to end the answer

export const equal = assert.deepEqual;
export const ok = assert.ok;

function schemaOf(cities) {
  const city = { type: "string", enum: cities };
  return { type: "object", properties: { city }, required: ["city"], additionalProperties: false };
}

function print(line) {
  console.log(JSON.stringify(line));
}

export async function check(api, name, run) {
  const started = Date.now();
  let line;
  try {
    line = { ok: true, detail: (await run()) ?? "" };
  } catch (error) {
    const cause = error?.cause ? ` (cause: ${error.cause.name}: ${error.cause.message})` : "";
    line = { ok: false, detail: `${error?.name}: ${error?.message}${cause}`.slice(0, 4000) };
  }
  print({ api, check: name, ...line, seconds: (Date.now() - started) / 1000 });
}

export function notOffered(api, name, reason) {
  print({ api, check: name, ok: null, detail: reason });
}

async function metric(name, label = "") {
  const page = await fetch(`${URL}/metrics`, { headers: { authorization: `Bearer ${KEY}` } });
  const lines = (await page.text()).split("\n");
  const mine = lines.filter((line) => (line.startsWith(name + "{") || line.startsWith(name + " ")) && line.includes(label));
  return mine.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" ") + 1)), 0);
}

/** How many requests to generate the server has answered: tells whether a client retried. */
export const answered = () => metric("http_requests_total", 'handler="/v1/');

export async function waitUntilIdle(withinMs = 20_000) {
  const deadline = Date.now() + withinMs;
  let running;
  while ((running = await metric("vllm:num_requests_running"))) {
    assert.ok(Date.now() < deadline, `${running} requests still run ${withinMs} ms after the client left`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
}

export async function rejects(promise) {
  try {
    const found = await promise;
    assert.fail(`a refused answer was taken for a whole one: ${JSON.stringify(found)?.slice(0, 300)}`);
  } catch (error) {
    if (error instanceof assert.AssertionError) throw error;
    return error;
  }
}
