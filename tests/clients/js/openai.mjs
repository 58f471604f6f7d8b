// What openai-js makes of a server's answers: node openai.mjs ADDRESS CASE prints it as JSON.
import OpenAI from "openai";

const [address, name] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const question = { role: "user", content: "What is the capital of France?" };
const asked = { model: "base", messages: [question], temperature: 0 };
const parameters = {
  type: "object",
  properties: { city: { type: "string", maxLength: 20 }, big: { type: "boolean" } },
  required: ["city", "big"],
  additionalProperties: false,
};
const tool = { type: "function", function: { name: "look_up", parameters, strict: true } };
const forced = { ...asked, tools: [tool], tool_choice: "required", parallel_tool_calls: false };

async function metric(sample) {
  const lines = (await (await fetch(`${address}/metrics`)).text()).split("\n");
  return Number(lines.find((line) => line.startsWith(`${sample} `))?.split(" ").at(-1) ?? 0);
}

async function becomes(value, sample) {
  for (const deadline = Date.now() + 20_000; Date.now() < deadline; ) {
    if ((await metric(sample)) === value) return true;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return false;
}

async function refused(request) {
  const error = await request.then(() => null, (error) => error);
  return {
    class: error.constructor.name,
    status: error.status,
    type: error.type,
    code: error.code,
    param: error.param,
    hasRequestId: Boolean(error.requestID),
  };
}

const cases = {
  whole: () => client.chat.completions.create(asked),
  adapters: async () => {
    const byField = await client.chat.completions.create({ ...asked, adapter: "pirate" });
    const byModel = await client.chat.completions.create({ ...asked, model: "pirate" });
    return [byField, byModel].map((reply) => [reply.choices[0].message.content, reply.heddle.adapter]);
  },
  stream: async () => {
    const chunks = [];
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create({ ...asked, ...options })) chunks.push(chunk);
    return chunks;
  },
  helper: async () => {
    const pieces = [];
    const stream = client.chat.completions.stream({ ...asked, stream_options: { include_usage: true } });
    stream.on("content", (piece) => pieces.push(piece));
    return { reply: await stream.finalChatCompletion(), text: pieces.join(""), usage: await stream.totalUsage() };
  },
  choices: async () => {
    const sampled = { n: 2, seed: 3, temperature: 1, max_tokens: 3, logprobs: true, top_logprobs: 2 };
    return (await client.chat.completions.create({ ...asked, ...sampled })).choices;
  },
  parsed: async () => {
    const response_format = { type: "json_schema", json_schema: { name: "city", strict: true, schema: parameters } };
    return (await client.chat.completions.parse({ ...asked, response_format })).choices[0];
  },
  forcedTool: async () => (await client.chat.completions.parse(forced)).choices[0],
  streamedTool: async () => {
    const done = [];
    const stream = client.chat.completions.stream(forced);
    stream.on("tool_calls.function.arguments.done", (call) => done.push(call));
    return { done, choice: (await stream.finalChatCompletion()).choices[0] };
  },
  ranTools: async () => {
    const calls = [];
    const run = (given) => calls.push(given) && "It is Paris.";
    const runnable = { type: "function", function: { ...tool.function, parse: JSON.parse, function: run } };
    const named = { type: "function", function: { name: "look_up" } };
    const runner = client.chat.completions.runTools({ ...asked, tools: [runnable], tool_choice: named });
    await runner.done();
    const reply = await client.chat.completions.create({ ...asked, messages: [...runner.messages, question] });
    return { calls, messages: runner.messages, reply: reply.choices[0] };
  },
  sentBack: async () => {
    const response_format = { type: "json_schema", json_schema: { name: "city", schema: parameters } };
    const { message } = (await client.chat.completions.parse({ ...asked, response_format })).choices[0];
    return client.chat.completions.create({ ...asked, messages: [question, message, question] });
  },
  completion: () => client.completions.create({ model: "base", prompt: "a", max_tokens: 2, echo: true, logprobs: 1 }),
  errors: async () => ({
    adapter: await refused(client.chat.completions.create({ ...asked, adapter: "pirat" })),
    model: await refused(client.chat.completions.create({ ...asked, model: "pirat" })),
    field: await refused(client.chat.completions.create({ ...asked, temperature: 9 })),
    context: await refused(client.chat.completions.create({ ...asked, max_completion_tokens: 1_000_000 })),
  }),
  models: async () => ({
    names: (await client.models.list()).data.map((model) => model.id),
    pirate: await client.models.retrieve("pirate"),
  }),
  aborted: async () => {
    const before = await metric('heddle_requests_total{outcome="disconnect"}');
    const endless = { ...asked, ignore_eos: true, max_tokens: 1900, stream: true };
    const stream = await client.chat.completions.create(endless);
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break; // which aborts the request
    const isFreed = await becomes(0, "heddle_requests_running");
    return { isFreed, isCounted: await becomes(before + 1, 'heddle_requests_total{outcome="disconnect"}') };
  },
};

console.log(JSON.stringify(await cases[name]()));
