// From packed bytes to attention: no drawing, no page. Arrays are flat; heads, queries (t), keys (s), components (r).

async function unpackBlob(text, layout) {
  const binary = atob(text);
  const packed = Uint8Array.from(binary, (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = new Uint8Array(await new Response(stream).arrayBuffer());
  const kinds = { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };
  const arrays = {};
  let start = 0;
  for (const [name, dtype, shape] of layout) {
    const size = kinds[dtype].BYTES_PER_ELEMENT;
    const count = shape.reduce((a, b) => a * b, 1);
    const bytes = new Uint8Array(size * count);
    for (let plane = 0; plane < size; plane++) {
      for (let i = 0; i < count; i++) bytes[i * size + plane] = data[start++];
    }
    arrays[name] = new kinds[dtype](bytes.buffer); // little-endian, as is every machine that has a browser
  }
  return arrays;
}

function signed(x) {
  return (x >> 1) ^ -(x & 1);
}

// Logits of one head, row after row, each but for a shift.
function logitsOf(arrays, head, heads, tokens) {
  const rank = arrays.scale.length / heads;
  const logits = new Float32Array(tokens * tokens);
  const right = new Float32Array(tokens);
  // Keys that receive more attention were scaled up before they were rounded.
  const precision = arrays.precision.subarray(head * tokens, (head + 1) * tokens);
  const shrink = Float32Array.from(precision, (x) => 2 ** ((64 - x) / 4));
  for (let r = 0; r < rank; r++) {
    const scale = arrays.scale[r * heads + head];
    if (scale === 0) continue;
    const at = (r * heads + head) * tokens;
    for (let s = 0; s < tokens; s++) right[s] = scale * signed(arrays.right[at + s]) * shrink[s];
    for (let t = 0; t < tokens; t++) {
      const left = signed(arrays.left[at + t]);
      if (left === 0) continue;
      const row = t * tokens;
      for (let s = 0; s < tokens; s++) logits[row + s] += left * right[s];
    }
  }
  return logits;
}

function softmaxOf(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const exps = logits.map((x) => Math.exp(x - largest));
  const total = exps.reduce((a, b) => a + b, 0);
  return exps.map((x) => x / total);
}

// What a method keeps: `slots`, the slot of each key (-1: dropped), `members` of each slot, `weights`, logs of theirs,
// and `near`, for each query the places it sees besides.
function choiceOf(arrays, payload, method, kIndex, head) {
  const { tokens, heads, ks } = payload;
  const facts = payload.methods[method];
  const k = ks[kIndex];
  const slots = new Int32Array(tokens).fill(-1);
  if (facts.ranked) {
    const order = arrays[`${facts.name}.order`];
    for (let i = 0; i < k; i++) slots[order[head * tokens + i]] = i;
  } else {
    const packed = arrays[`${facts.name}.slots`];
    const none = packed.BYTES_PER_ELEMENT === 1 ? 255 : 65535;
    for (let s = 0; s < tokens; s++) {
      const slot = packed[(kIndex * heads + head) * tokens + s];
      slots[s] = slot === none ? -1 : slot;
    }
  }
  const members = [];
  slots.forEach((slot, s) => {
    if (slot >= 0) (members[slot] ??= []).push(s);
  });
  const packed = arrays[`${facts.name}.log_weights`];
  const most = ks[ks.length - 1];
  const weights = Array.from({ length: members.length }, (_, slot) =>
    packed ? signed(packed[(kIndex * heads + head) * most + slot]) / payload.weight_steps : 0,
  );
  return { slots, members, weights, near: facts.windows[kIndex] };
}

// Attention of one query over what is kept, spread evenly over the members of each group: exact where the value of a
// group is the mean of theirs.
function reducedAttention(row, choice, query, shared) {
  const { slots, members, weights } = choice;
  const local = choice.near ? choice.near[query] : [];
  const isLocal = new Set(local);
  const logits = [];
  const seen = []; // for each logit the keys that share its weight
  members.forEach((keys, slot) => {
    // Of groups that stand for all keys a query leaves out those that it sees itself.
    const left = shared ? keys.filter((s) => !isLocal.has(s)).length : keys.length;
    if (left === 0) return;
    const mean = keys.reduce((sum, s) => sum + row[s], 0) / keys.length;
    logits.push(mean + weights[slot] + Math.log(left / keys.length));
    seen.push(keys);
  });
  for (const s of local) {
    if (!shared && slots[s] >= 0) continue;
    logits.push(row[s]);
    seen.push([s]);
  }
  const attention = new Float32Array(row.length);
  softmaxOf(logits).forEach((mass, i) => {
    for (const s of seen[i]) attention[s] += mass / seen[i].length;
  });
  return attention;
}

function distanceOf(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += Math.abs(a[i] - b[i]);
  return sum / 2;
}

// Everything about one head under one method: dense and reduced attention of all queries, and how far they are apart.
function headView(arrays, payload, { head, method, kIndex }) {
  const { tokens, heads } = payload;
  const logits = logitsOf(arrays, head, heads, tokens);
  const choice = choiceOf(arrays, payload, method, kIndex, head);
  const facts = payload.methods[method];
  const shared = facts.weighted && facts.name !== "pivoted";
  const dense = [];
  const reduced = [];
  const received = new Float32Array(tokens);
  let captured = 0;
  let distance = 0;
  for (let t = 0; t < tokens; t++) {
    const row = logits.subarray(t * tokens, (t + 1) * tokens);
    dense.push(softmaxOf(row));
    reduced.push(reducedAttention(row, choice, t, shared));
    dense[t].forEach((mass, s) => {
      received[s] += mass / tokens;
    });
    captured += shareKept(dense[t], choice, t) / tokens;
    distance += distanceOf(dense[t], reduced[t]) / tokens;
  }
  const largest = arrays["leverage.largest"][head];
  const scores = arrays.leverage.subarray(head * tokens, (head + 1) * tokens);
  const leverage = Float32Array.from(scores, (x) => largest * (x / 255) ** 2);
  return { choice, dense, reduced, received, captured, distance, leverage };
}

// Share of a query's dense attention on keys that it sees as they are: kept by themselves, or around it.
function shareKept(dense, choice, query) {
  const near = new Set(choice.near ? choice.near[query] : []);
  return dense.reduce((sum, mass, s) => sum + (isAlone(choice, s) || near.has(s) ? mass : 0), 0);
}

function isAlone(choice, s) {
  return choice.slots[s] >= 0 && choice.members[choice.slots[s]].length === 1;
}
