// What Vercel's AI SDK makes of a server's answers: node ai_sdk.mjs ADDRESS CASE prints it as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";

const [address, name] = process.argv.slice(2);
const heddle = createOpenAICompatible({
  name: "heddle",
  baseURL: `${address}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const prompt = "What is the capital of France?";
const asked = { model: heddle("base"), prompt, temperature: 0, maxRetries: 0 };
const city = jsonSchema({
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, big: { type: "boolean" } },
  required: ["city", "big"],
  additionalProperties: false,
});
const tools = { look_up: tool({ inputSchema: city, execute: async () => "It is Paris." }) };

const cases = {
  generated: async () => {
    const byField = await generateText({ ...asked, providerOptions: { heddle: { adapter: "pirate" } } });
    const byModel = await generateText({ ...asked, model: heddle("pirate") });
    return [byField, byModel].map(({ text, usage, finishReason }) => ({ text, usage, finishReason }));
  },
  streamed: async () => {
    const result = streamText({ ...asked, model: heddle("pirate") });
    const pieces = [];
    for await (const piece of result.textStream) pieces.push(piece);
    return { pieces, usage: await result.usage, finishReason: await result.finishReason };
  },
  object: async () => (await generateText({ ...asked, output: Output.object({ schema: city }) })).output,
  tools: async () => {
    const forcedFirst = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" });
    const result = await generateText({ ...asked, tools, prepareStep: forcedFirst, stopWhen: stepCountIs(2) });
    return result.steps.map(({ toolCalls, toolResults, finishReason }) => ({ toolCalls, toolResults, finishReason }));
  },
  streamedTool: async () => {
    const result = streamText({ ...asked, tools, toolChoice: { type: "tool", toolName: "look_up" } });
    const parts = [];
    for await (const part of result.fullStream) parts.push(part.type);
    return { parts, toolCalls: await result.toolCalls };
  },
  refused: async () => {
    const error = await generateText({ ...asked, model: heddle("pirat") }).then(() => null, (error) => error);
    const { statusCode, message, isRetryable } = error;
    return { isApiCallError: APICallError.isInstance(error), statusCode, message, isRetryable };
  },
};

console.log(JSON.stringify(await cases[name]()));
