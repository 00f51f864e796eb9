// openai for Node: chat completions and responses. Argument: the name under which package.json has the major version.

import { BANNED, BANNED_SCHEMA, CITIES, CITY_SCHEMA, KEY, MODEL, QUESTION, REFUSAL, TURNS, URL } from "./report.mjs";
import { answered, check, equal, ok, rejects, waitUntilIdle } from "./report.mjs";

const name = process.argv[2] ?? "openai-7";
const { default: OpenAI } = await import(name);
const { zodResponseFormat, zodTextFormat } = await import(`${name}/helpers/zod`);
const { z } = await import("zod");

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY, timeout: 120_000 }); // with the library's own retries
const messages = [{ role: "user", content: QUESTION }];
const short = { model: MODEL, temperature: 0, max_tokens: 24, messages };
const longer = { ...short, max_tokens: 64 };
const City = z.object({ city: z.enum(CITIES) });
const Banned = z.object({ city: z.enum([BANNED]) });
const tool = (strict) => ({ type: "function", function: { name: "weather", parameters: CITY_SCHEMA, ...strict } });
const jsonSchema = { type: "json_schema", json_schema: { name: "only", schema: BANNED_SCHEMA } };

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

function assertCalled(choice) {
  const [call] = choice.message.tool_calls;
  equal(call.function.name, "weather");
  City.parse(JSON.parse(call.function.arguments));
}

await check("chat", "chat", async () => {
  const [choice] = (await client.chat.completions.create(short)).choices;
  ok(choice.message.content.includes("Paris"));
  return choice.message.content;
});

await check("chat", "stream", async () => {
  const whole = (await client.chat.completions.create(short)).choices[0].message.content;
  const chunks = await all(await client.chat.completions.create({ ...short, stream: true }));
  equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), whole);
  equal(await client.chat.completions.stream(short).finalContent(), whole);
});

await check("chat", "usage", async () => {
  const whole = (await client.chat.completions.create(short)).usage;
  const options = { stream: true, stream_options: { include_usage: true } };
  const streamed = (await all(await client.chat.completions.create({ ...short, ...options }))).at(-1).usage;
  for (const key of ["prompt_tokens", "completion_tokens", "total_tokens"]) equal(streamed[key], whole[key]);
});

await check("chat", "turns", async () => {
  const first = (await client.chat.completions.create(short)).choices[0].message;
  const follow = [...messages, first, { role: "user", content: TURNS[2] }];
  const again = (await client.chat.completions.create({ ...short, messages: follow })).choices[0].message.content;
  ok(again.includes("Rome"), again);
  return again;
});

await check("chat", "tools_auto", async () => {
  const { message } = (await client.chat.completions.create({ ...short, tools: [tool()] })).choices[0];
  ok(message.content || message.tool_calls);
});

await check("chat", "tools_required", async () => {
  const options = { tools: [tool({ strict: true })], tool_choice: "required" };
  assertCalled((await client.chat.completions.create({ ...longer, ...options })).choices[0]);
});

await check("chat", "tools_named", async () => {
  const options = { tools: [tool({ strict: true })], tool_choice: { type: "function", function: { name: "weather" } } };
  assertCalled((await client.chat.completions.create({ ...longer, ...options })).choices[0]);
});

await check("chat", "tools_streamed", async () => {
  const options = { tools: [tool({ strict: true })], tool_choice: "required" };
  assertCalled((await client.chat.completions.stream({ ...longer, ...options }).finalChatCompletion()).choices[0]);
});

await check("chat", "structured", async () => {
  const answer = await client.chat.completions.parse({ ...longer, response_format: zodResponseFormat(City, "city") });
  ok(CITIES.includes(answer.choices[0].message.parsed.city));
});

await check("chat", "refusal", async () => {
  const before = await answered();
  const [choice] = (await client.chat.completions.create({ ...longer, response_format: jsonSchema })).choices;
  equal([choice.finish_reason, choice.message.refusal], ["content_filter", REFUSAL]);
  const error = await rejects(client.chat.completions.parse({ ...longer, response_format: zodResponseFormat(Banned, "only") }));
  equal(error.name + error.message.includes("content filter"), "Errortrue");
  equal((await answered()) - before, 2);
});

await check("chat", "refusal_streamed", async () => {
  const before = await answered();
  const chunks = await all(await client.chat.completions.create({ ...longer, stream: true, response_format: jsonSchema }));
  const choices = chunks.flatMap((chunk) => chunk.choices);
  equal(choices.map((choice) => choice.delta.refusal ?? "").join(""), REFUSAL);
  equal(choices.at(-1).finish_reason, "content_filter");
  const helper = client.chat.completions.stream({ ...longer, response_format: zodResponseFormat(Banned, "only") });
  const error = await rejects(helper.finalChatCompletion());
  ok(error.message.includes("content filter"), error.message);
  equal((await answered()) - before, 2);
});

await check("chat", "cancel", async () => {
  const extra = { ignore_eos: true, min_tokens: 400, max_tokens: 400 };
  for await (const _ of await client.chat.completions.create({ ...short, ...extra, stream: true })) break; // aborts
  await waitUntilIdle();
});

await check("chat", "models", async () => {
  const listed = await all(client.models.list());
  ok(listed.some((model) => model.id === MODEL));
  equal((await client.models.retrieve(MODEL)).id, MODEL);
});

const brief = { model: MODEL, temperature: 0, max_output_tokens: 24, input: QUESTION };
const lessBrief = { ...brief, max_output_tokens: 64 };
const responseTool = (strict) => ({ type: "function", name: "weather", parameters: CITY_SCHEMA, strict });
const called = (response) => {
  const [call] = response.output.filter((item) => item.type === "function_call");
  equal(call.name, "weather");
  City.parse(JSON.parse(call.arguments));
};

await check("responses", "chat", async () => {
  const response = await client.responses.create(brief);
  equal(response.status, "completed");
  ok(response.output_text.includes("Paris"));
  return response.output_text;
});

await check("responses", "stream", async () => {
  const whole = (await client.responses.create(brief)).output_text;
  const events = await all(await client.responses.create({ ...brief, stream: true }));
  equal(events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta).join(""), whole);
  equal((await client.responses.stream(brief).finalResponse()).output_text, whole);
});

await check("responses", "turns", async () => {
  const first = await client.responses.create(brief);
  const input = [...messages, ...first.output, { role: "user", content: TURNS[2] }];
  const again = (await client.responses.create({ ...brief, input })).output_text;
  ok(again.includes("Rome"), again);
  return again;
});

await check("responses", "tools_required", async () => {
  called(await client.responses.create({ ...lessBrief, tools: [responseTool(true)], tool_choice: "required" }));
});

await check("responses", "structured", async () => {
  const response = await client.responses.parse({ ...lessBrief, text: { format: zodTextFormat(City, "city") } });
  ok(CITIES.includes(response.output_parsed.city));
});

await check("responses", "refusal", async () => {
  const before = await answered();
  const response = await client.responses.parse({ ...lessBrief, text: { format: zodTextFormat(Banned, "only") } });
  equal([response.output_parsed, response.status, response.incomplete_details], [null, "incomplete", { reason: "content_filter" }]);
  equal((await answered()) - before, 1);
});

await check("responses", "refusal_streamed", async () => {
  const response = await client.responses.stream({ ...lessBrief, text: { format: zodTextFormat(Banned, "only") } }).finalResponse();
  equal([response.output_parsed, response.status, response.incomplete_details], [null, "incomplete", { reason: "content_filter" }]);
});

await check("responses", "cancel", async () => {
  const extra = { ignore_eos: true, min_tokens: 400, max_output_tokens: 400, stream: true };
  for await (const event of await client.responses.create({ ...brief, ...extra })) if (event.type.endsWith("delta")) break;
  await waitUntilIdle();
});
