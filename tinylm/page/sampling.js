"use strict";
/* From logits to the next token, as in tinylm/generation/sampling.py and in the same order: repetition penalty,
   temperature, top-k, top-p, min-p. Each step says which tokens it ruled out, so that the page can show it. */

/** The candidates, likeliest first: [{id, probability, removedBy}], where removedBy is null or the filter's name.

    Probabilities are after the temperature and before the filters. */
function candidates(logits, { temperature, topK, topP, minP, repetitionPenalty }, seen) {
  const adjusted = Float32Array.from(logits);
  if (repetitionPenalty !== 1) {
    for (const id of new Set(seen)) adjusted[id] *= adjusted[id] > 0 ? 1 / repetitionPenalty : repetitionPenalty;
  }
  const isGreedy = temperature === 0;
  const probabilities = softmax(isGreedy ? adjusted : adjusted.map((value) => value / temperature));
  const order = Array.from(probabilities.keys()).sort((a, b) => adjusted[b] - adjusted[a] || a - b);
  const found = order.map((id) => ({ id, probability: probabilities[id], removedBy: null }));
  if (isGreedy) return found.map((each, place) => ({ ...each, removedBy: place ? "temperature" : null }));
  const kthLogit = topK > 0 && topK < order.length ? adjusted[order[topK - 1]] : -Infinity;
  for (const each of found) if (adjusted[each.id] < kthLogit) each.removedBy = "top-k";
  cut(found, "top-p", (rest) => {
    let before = 0; // a token stays if those before it have not reached the sum yet
    return rest.map(({ share }) => [topP >= 1 || before === 0 || before < topP, (before += share)][0]);
  });
  cut(found, "min-p", (rest) => rest.map(({ share }) => share >= minP * rest[0].share));
  return found;
}

/** Apply a filter to what is left, whose shares are of one again. */
function cut(found, name, keeps) {
  const rest = found.filter((each) => !each.removedBy);
  const sum = rest.reduce((total, each) => total + each.probability, 0);
  const kept = keeps(rest.map((each) => ({ share: each.probability / sum })));
  rest.forEach((each, place) => {
    if (!kept[place]) each.removedBy = name;
  });
}

/** Draw one of what is left, with a random number from 0 to 1. */
function draw(found, random) {
  const rest = found.filter((each) => !each.removedBy);
  let goal = random * rest.reduce((total, each) => total + each.probability, 0);
  for (const each of rest) if ((goal -= each.probability) < 0) return each.id;
  return rest[rest.length - 1].id;
}

/** Random numbers from 0 to 1 that a seed repeats: xorshift on 32 bits (Marsaglia 2003). */
function randomNumbers(seed) {
  let state = (seed ^ 0x9e3779b9) | 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 4294967296;
  };
}
