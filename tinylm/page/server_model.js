"use strict";
/* A model that a server computes: conversations go there, and for the glass box its weights come here. */

class ServerModel extends PageModel {
  async packed(step) {
    const when = step === null ? "" : `?step=${step}`;
    return (await ask(`page/models/${encodeURIComponent(this.about.name)}${when}`)).arrayBuffer();
  }

  async *answer(messages, settings, signal, notice) {
    const count = (some) => this.count(some, signal);
    const fitting = await fitted(messages, this.context, settings.maxTokens, count, notice);
    const body = {
      model: this.about.name,
      stream: true,
      max_tokens: settings.maxTokens,
      temperature: settings.temperature,
      top_k: settings.topK,
      top_p: settings.topP,
      min_p: settings.minP,
      repetition_penalty: settings.repetitionPenalty,
      ...(settings.seed === "" ? {} : { seed: settings.seed }),
      ...(this.canChat ? { messages: fitting } : { prompt: asText(fitting) }),
    };
    try {
      const response = await ask(this.canChat ? "v1/chat/completions" : "v1/completions", body, signal);
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices[0];
        yield choice.delta ? choice.delta.content || "" : choice.text;
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }

  async count(messages, signal) {
    const model = this.about.name;
    if (asText(messages).length > MOST_LETTERS) return Infinity; // a server reads no body of some megabytes
    const body = this.canChat ? { model, messages } : { model, prompt: asText(messages) };
    try {
      return (await (await ask("tokenize", body, signal)).json()).count;
    } catch (error) {
      if (["context_length_exceeded", "body_too_large"].includes(error.code)) return Infinity;
      throw error;
    }
  }
}

/** The models of the server; of one that has just been started, as soon as it has loaded them. */
async function serverModels() {
  for (;;) {
    try {
      const { data } = await (await ask("v1/models")).json();
      trouble("");
      return data.map((card) => new ServerModel(card));
    } catch (error) {
      if (error.code !== "loading") throw error;
      trouble("the server is loading its models…");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

/** Asks the server; what it refuses, and that it cannot be reached, becomes an error with one sentence. */
async function ask(path, body = null, signal = undefined) {
  const options = body === null ? { signal } : { method: "POST", signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" } };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error("the server cannot be reached; start it again with: tinylm serve");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw Object.assign(new Error(said.error?.message || `the server answered with status ${response.status}`),
    { code: said.error?.code });
}

/** The events of a stream, as they come. */
async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "", isWhole = false;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      part = { done: true };
    }
    if (part.done) break;
    rest += decoder.decode(part.value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") isWhole = true;
      else yield JSON.parse(line.slice(6));
    }
  }
  if (!isWhole) throw new Error("the server went away in the middle of the answer");
}
