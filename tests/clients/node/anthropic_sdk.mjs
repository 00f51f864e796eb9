// @anthropic-ai/sdk: messages.

import Anthropic from "@anthropic-ai/sdk";
import { BANNED_SCHEMA, CITIES, CITY_SCHEMA, KEY, MODEL, QUESTION, TURNS, URL } from "./report.mjs";
import { answered, check, equal, ok, waitUntilIdle } from "./report.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: KEY, timeout: 120_000 }); // with the library's own retries
const messages = [{ role: "user", content: QUESTION }];
const short = { model: MODEL, temperature: 0, max_tokens: 24, messages };
const longer = { ...short, max_tokens: 64 };
const tool = { name: "weather", description: "Weather", input_schema: CITY_SCHEMA, strict: true };
const text = (message) => message.content.filter((block) => block.type === "text").map((block) => block.text).join("");
const only = { format: { type: "json_schema", schema: BANNED_SCHEMA } };

function assertCalled(message) {
  const [call] = message.content.filter((block) => block.type === "tool_use");
  equal([call.name, message.stop_reason], ["weather", "tool_use"]);
  ok(CITIES.includes(call.input.city));
}

await check("messages", "chat", async () => {
  const message = await client.messages.create(short);
  equal(message.stop_reason, "end_turn");
  ok(text(message).includes("Paris"));
  return text(message);
});

await check("messages", "stream", async () => {
  const whole = await client.messages.create(short);
  const parts = [];
  const streamed = await client.messages.stream(short).on("text", (part) => parts.push(part)).finalMessage();
  equal([parts.join(""), text(streamed)], [text(whole), text(whole)]);
});

await check("messages", "usage", async () => {
  const whole = (await client.messages.create(short)).usage;
  const streamed = (await client.messages.stream(short).finalMessage()).usage;
  equal([streamed.input_tokens, streamed.output_tokens], [whole.input_tokens, whole.output_tokens]);
  equal((await client.messages.countTokens({ model: MODEL, messages })).input_tokens, whole.input_tokens);
});

await check("messages", "turns", async () => {
  const { content } = await client.messages.create(short);
  const follow = [...messages, { role: "assistant", content }, { role: "user", content: TURNS[2] }];
  const again = text(await client.messages.create({ ...short, messages: follow }));
  ok(again.includes("Rome"), again);
  return again;
});

await check("messages", "tools_auto", async () => {
  ok((await client.messages.create({ ...short, tools: [tool] })).content.length);
});

await check("messages", "tools_required", async () => {
  assertCalled(await client.messages.create({ ...longer, tools: [tool], tool_choice: { type: "any" } }));
});

await check("messages", "tools_named", async () => {
  assertCalled(await client.messages.create({ ...longer, tools: [tool], tool_choice: { type: "tool", name: "weather" } }));
});

await check("messages", "tools_streamed", async () => {
  assertCalled(await client.messages.stream({ ...longer, tools: [tool], tool_choice: { type: "any" } }).finalMessage());
});

await check("messages", "structured", async () => {
  const format = { type: "json_schema", schema: CITY_SCHEMA };
  ok(CITIES.includes(JSON.parse(text(await client.messages.create({ ...longer, output_config: { format } }))).city));
});

await check("messages", "refusal", async () => {
  const before = await answered();
  equal((await client.messages.create({ ...longer, output_config: only })).stop_reason, "refusal");
  equal((await answered()) - before, 1);
});

await check("messages", "refusal_streamed", async () => {
  const before = await answered();
  equal((await client.messages.stream({ ...longer, output_config: only }).finalMessage()).stop_reason, "refusal");
  equal((await answered()) - before, 1);
});

await check("messages", "cancel", async () => {
  const extra = { ignore_eos: true, min_tokens: 400, max_tokens: 400, stream: true };
  for await (const event of await client.messages.create({ ...short, ...extra })) if (event.type === "content_block_delta") break;
  await waitUntilIdle();
});

await check("messages", "models", async () => {
  ok((await client.models.list()).data.some((model) => model.id === MODEL));
  equal((await client.models.retrieve(MODEL)).id, MODEL);
});
