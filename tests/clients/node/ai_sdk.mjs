// `ai` with one of its providers. Argument: openai, openai-chat, openai-compatible or anthropic.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, NoObjectGeneratedError, Output, streamText, tool } from "ai";
import { z } from "zod";
import { BANNED, CITIES, KEY, MODEL, QUESTION, TURNS, URL } from "./report.mjs";
import { answered, check, equal, notOffered, ok, rejects, waitUntilIdle } from "./report.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = process.argv[2] ?? "openai";
const settings = { baseURL: `${URL}/v1`, apiKey: KEY };
// The SDK has no field for vLLM's sampling; the cancellation needs an answer that does not end by itself.
const endless = async (url, init) => {
  const body = { ...JSON.parse(init.body), ignore_eos: true, min_tokens: 400 };
  return fetch(url, { ...init, body: JSON.stringify(body) });
};
const models = {
  openai: (more) => createOpenAI({ ...settings, ...more }).responses(MODEL),
  "openai-chat": (more) => createOpenAI({ ...settings, ...more }).chat(MODEL),
  "openai-compatible": (more) =>
    createOpenAICompatible({ ...settings, ...more, name: "lethe", supportsStructuredOutputs: true, includeUsage: true })(MODEL),
  anthropic: (more) => createAnthropic({ ...settings, ...more })(MODEL),
};
// Responses are not stored, and the SDK refers to stored ones unless it is told.
const stateless = provider === "openai" ? { providerOptions: { openai: { store: false } } } : {};
const api = { openai: "responses", anthropic: "messages" }[provider] ?? "chat";
const model = models[provider]();
const short = { model, temperature: 0, maxOutputTokens: 24 };
const longer = { ...short, maxOutputTokens: 64 };
const City = z.object({ city: z.enum(CITIES) });
const Banned = z.object({ city: z.enum([BANNED]) });
const weather = tool({ description: "Weather", inputSchema: City, strict: true });
const messages = [{ role: "user", content: QUESTION }];

await check(api, "chat", async () => {
  const { text, finishReason } = await generateText({ ...short, prompt: QUESTION });
  ok(text.includes("Paris"));
  equal(finishReason, "stop");
  return text;
});

await check(api, "stream", async () => {
  const whole = await generateText({ ...short, prompt: QUESTION });
  const streamed = streamText({ ...short, prompt: QUESTION });
  const parts = [];
  for await (const part of streamed.textStream) parts.push(part);
  equal(parts.join(""), whole.text);
  equal(await streamed.finishReason, whole.finishReason);
});

await check(api, "usage", async () => {
  const whole = (await generateText({ ...short, prompt: QUESTION })).usage;
  const streamed = streamText({ ...short, prompt: QUESTION });
  await streamed.consumeStream();
  const usage = await streamed.usage;
  ok(whole.outputTokens > 0);
  equal([usage.inputTokens, usage.outputTokens], [whole.inputTokens, whole.outputTokens]);
});

await check(api, "turns", async () => {
  const first = await generateText({ ...short, ...stateless, messages });
  const follow = [...messages, ...first.response.messages, { role: "user", content: TURNS[2] }];
  const { text } = await generateText({ ...short, ...stateless, messages: follow });
  ok(text.includes("Rome"), text);
  return text;
});

await check(api, "turns_from_history", async () => {
  const { text } = await generateText({
    ...short,
    messages: [...messages, { role: "assistant", content: TURNS[1] }, { role: "user", content: TURNS[2] }],
  });
  ok(text.includes("Rome"), text);
  return text;
});

await check(api, "turns_tool", async () => {
  const first = await generateText({ ...longer, messages, tools: { weather }, toolChoice: "required" });
  const [call] = first.toolCalls;
  const output = { type: "text", value: "sunny" };
  const result = { role: "tool", content: [{ type: "tool-result", toolCallId: call.toolCallId, toolName: "weather", output }] };
  const { text, toolCalls } = await generateText({
    ...short,
    tools: { weather },
    messages: [...messages, ...first.response.messages.filter((message) => message.role === "assistant"), result],
  });
  ok(text || toolCalls.length);
});

await check(api, "tools_auto", async () => {
  const { text, toolCalls } = await generateText({ ...short, prompt: QUESTION, tools: { weather } });
  ok(text || toolCalls.length);
});

for (const [name, toolChoice] of [["tools_required", "required"], ["tools_named", { type: "tool", toolName: "weather" }]]) {
  await check(api, name, async () => {
    const { toolCalls } = await generateText({ ...longer, prompt: QUESTION, tools: { weather }, toolChoice });
    equal([toolCalls.length, toolCalls[0].toolName, toolCalls[0].invalid ?? false], [1, "weather", false]);
    ok(CITIES.includes(toolCalls[0].input.city));
  });
}

await check(api, "tools_streamed", async () => {
  const streamed = streamText({ ...longer, prompt: QUESTION, tools: { weather }, toolChoice: "required" });
  await streamed.consumeStream();
  const toolCalls = await streamed.toolCalls;
  ok(CITIES.includes(toolCalls[0].input.city));
});

await check(api, "structured", async () => {
  const { output } = await generateText({ ...longer, prompt: QUESTION, output: Output.object({ schema: City }) });
  ok(CITIES.includes(output.city));
});

await check(api, "refusal", async () => {
  const before = await answered();
  const asked = generateText({ ...longer, prompt: QUESTION, output: Output.object({ schema: Banned }) });
  let finishReason;
  try {
    const result = await asked;
    finishReason = result.finishReason;
    const error = await rejects(Promise.resolve().then(() => result.output)); // reading what is not there throws
    ok(NoObjectGeneratedError.isInstance(error) || error.name === "AI_NoOutputGeneratedError", error.name);
  } catch (error) {
    if (!NoObjectGeneratedError.isInstance(error)) throw error;
    finishReason = error.finishReason;
  }
  equal(finishReason, "content-filter");
  equal((await answered()) - before, 1);
});

await check(api, "refusal_streamed", async () => {
  const before = await answered();
  const streamed = streamText({ ...longer, prompt: QUESTION, output: Output.object({ schema: Banned }), onError: () => {} });
  await streamed.consumeStream();
  equal(await streamed.finishReason, "content-filter");
  equal((await answered()) - before, 1);
});

await check(api, "cancel", async () => {
  const controller = new AbortController();
  const streamed = streamText({
    ...short,
    model: models[provider]({ fetch: endless }),
    maxOutputTokens: 400,
    prompt: QUESTION,
    abortSignal: controller.signal,
    onError: () => {},
  });
  for await (const _ of streamed.textStream) {
    controller.abort();
    break;
  }
  await waitUntilIdle();
});

notOffered(api, "models", "the SDK does not ask for the list of models");
