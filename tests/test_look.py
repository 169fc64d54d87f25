"""What a look tells, against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msjax.decoding.look import attended, look
from msjax.streams import HOLE, Stream, Streams

SILENCE = 3
NAMES = ("output:output", "user:input", "think:internal")


@pytest.mark.parametrize("same_row", ["hidden", "inputs", "visible"])
@pytest.mark.parametrize("skip_silence", [False, True])
def test_attention_is_added_up_by_stream(same_row, skip_silence):
  streams = Streams(tuple(map(Stream.parse, NAMES)), SILENCE, same_row, skip_silence)
  B, N, K, S, H, fed = 2, 4, 2, 3, 8, 4
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 6, (B, fed + 1, S)).astype(np.int32)
  tokens[1, 2, 1] = HOLE
  q = rng.normal(size=(B, N, S, H)).astype(np.float32)
  k = rng.normal(size=(B, K, (fed + 2) * S + 1, H)).astype(np.float32)  # room for more
  key_ok = np.zeros((B, k.shape[2]), bool)
  key_ok[:, : tokens[0].size] = streams.key_ok(tokens)
  visibility = streams.visibility_in_cache(tokens[:, -1:], jnp.full(B, fed), jnp.array(key_ok))
  found = attended(jnp.array(q), jnp.array(k.swapaxes(2, 3)), visibility, streams)

  whole = streams.visibility(jnp.array(tokens)).dense()[:, -S:]
  expected = np.zeros((B, S, S))
  for b in range(B):
    for s, place in enumerate(np.argsort(streams.order)):
      for n in range(N):
        seen = np.flatnonzero(whole[b, place])
        scores = [q[b, n, place] @ k[b, n // (N // K), m] / math.sqrt(H) for m in seen]
        shares = np.exp(scores) / np.exp(scores).sum()
        for m, share in zip(seen, shares):
          expected[b, s, streams.order[m % S]] += share / N
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_logits_are_told_as_they_are():
  logits = np.random.default_rng(0).normal(size=(2, 3, 9)).astype(np.float32)
  logits[0, 0, 4] = -np.inf  # a token that there is not
  found = look(jnp.array(logits), jnp.zeros((2, 3, 3)), 4)
  log_probs = jax.nn.log_softmax(logits.astype(np.float64))
  odds = np.exp(log_probs)
  entropy = -np.where(odds > 0, odds * log_probs, 0).sum(-1)
  np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
  np.testing.assert_array_equal(found.ids, np.argsort(-logits, axis=-1)[..., :4])
  best = np.take_along_axis(np.array(log_probs), np.array(found.ids), -1)
  np.testing.assert_allclose(found.log_probs, best, atol=1e-5)
  assert look(jnp.array(logits), None, 99).ids.shape == (2, 3, 9)
