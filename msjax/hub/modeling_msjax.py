"""A multi-stream language model in torch and transformers alone; every msjax export carries this.

Load with `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`. A grid of tokens
is [B, R, S]: in each of R rows a token for every stream, by stream id; -1 is a hole, no token at
all. Within a row attention puts the input streams first, then the others, each by id. `forward` and
`generate` stay those of the family: one stream of text, which knows of no others.
"""

import math
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

HOLE = -1

Rows = Generator[dict[str, int], Mapping[str, Sequence[int]] | None, None]


class StreamMixin:
  """Adds streams to a causal language model; `config.msjax` says which, and their rule."""

  _auto_class = "AutoModelForCausalLM"  # has `save_pretrained` write this file too

  def __init__(self, config):
    """Builds the model and an embedding for every stream, added to that of the token."""
    super().__init__(config)
    streams = len(config.msjax["streams"])
    self.model.channel_embedding = nn.Embedding(streams, config.hidden_size)
    self.post_init()

  def stream_logits(self, tokens: torch.Tensor) -> torch.Tensor:
    """What the model predicts at every cell of whole grids.

    Args:
      tokens: integers [B, R, S]; -1 is a hole.

    Returns:
      float32 [B, R, S, V]: at (r, s) for the cell (r + 1, s); 0 at holes.
    """
    S, V = len(self._names), self.config.vocab_size
    is_grid = tokens.ndim == 3 and tokens.shape[2] == S and tokens.numel()
    if not is_grid or tokens.is_floating_point() or tokens.min() < HOLE or tokens.max() >= V:
      raise ValueError(
        f"tokens: {tokens.dtype} of shape {tuple(tokens.shape)}; expected integers [B, R, {S}] "
        f"from -1 (hole) to {V - 1}, streams {', '.join(self._names)}"
      )
    return self._logits(tokens.to(self.device))

  def generate_streams(
    self,
    inputs: Mapping[str, Sequence[int]] = {},
    at: Iterable[tuple[int, str, Sequence[int]]] = (),
    rows: int = 256,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
  ) -> Rows:
    """Yields every row as it is made: token id by stream name.

    Input streams read one token a row, and silence while there is none. While it runs,
    `.send({"user": ids})` puts tokens behind what that stream is still reading, from the next row
    on, and returns that row; what the last row has not reached stays unread.

    Args:
      inputs: token ids by input stream, read from row 0 on.
      at: (row, input stream, token ids): read from that row on, or right after what is being read.
      rows: how many to make.
      temperature: 0 takes the likeliest token.
      generator: of what is drawn, on the model's device.

    Raises:
      ValueError: a stream that is unknown or no input, ids that are no tokens, text that does not
        fit into the rows, a temperature below 0.
      RuntimeError: logits are not finite.
    """
    if not (isinstance(rows, int) and rows >= 1):
      raise ValueError(f"rows: {rows!r}; expected a whole number, 1 or more")
    if not 0 <= temperature < math.inf:
      raise ValueError(f"temperature: {temperature}; expected 0, the likeliest token, or more")
    given = [*((0, name, ids) for name, ids in inputs.items()), *at]
    given = [(_row(row), name, self._ids(name, ids)) for row, name, ids in given]
    given.sort(key=lambda g: g[0])  # no text is cut by an earlier one
    ends = dict.fromkeys(self._names, 0)
    for row, name, ids in given:
      ends[name] = max(ends[name], row) + len(ids)
    end = max(ends.values())
    if end > rows:
      raise ValueError(f"rows: {rows} end before the given text, which takes {end} rows")
    return self._rows(deque(given), rows, temperature, generator)

  def _rows(self, given, rows, temperature, generator) -> Rows:
    silence, S = self.config.msjax["silence_id"], len(self._names)
    unread = {name: deque() for name in self._names}
    tokens = torch.empty(1, 0, S, dtype=torch.long, device=self.device)
    proposal = [silence] * S  # there is nothing to write the first row from
    cache = DynamicCache()
    for index in range(rows):
      if index:
        proposal = self._proposal(tokens, cache, temperature, generator)
      while given and given[0][0] <= index:
        _, name, ids = given.popleft()
        unread[name].extend(ids)
      row = list(proposal)
      for s, name in enumerate(self._names):
        if unread[name]:
          row[s] = unread[name].popleft()
        elif s in self._of_kind("input"):
          row[s] = silence
      tokens = torch.cat([tokens, tokens.new_tensor([[row]])], dim=1)
      sent = yield dict(zip(self._names, row))
      for name, ids in (sent or {}).items():
        unread[name].extend(self._ids(name, ids))

  @torch.no_grad()
  def _proposal(self, tokens, cache, temperature, generator) -> list[int]:
    """Feeds the last row of [1, R, S], the others being in the cache; writes the next."""
    fed = tokens.shape[1] - 1
    logits = self._logits(tokens, fed, cache)[0, 0]
    if not logits.isfinite().all():
      raise RuntimeError(f"row {fed + 1}: logits are not finite; are the parameters?")
    if temperature == 0:
      return logits.argmax(-1).tolist()
    chances = (logits / max(temperature, 1e-6)).softmax(-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()

  def _logits(self, tokens, fed=0, cache=None) -> torch.Tensor:
    """Logits [B, R - fed, S, V] of grids whose first `fed` rows are in the cache."""
    if self.config._attn_implementation not in ("eager", "sdpa"):
      raise ValueError(
        f"attn_implementation: {self.config._attn_implementation!r}; streams need eager or sdpa"
      )
    B, R, S = tokens.shape
    order = torch.tensor(self._order, device=tokens.device)
    cells = tokens[:, :, order].reshape(B, R * S)
    rows = torch.arange(fed, R, device=tokens.device).repeat_interleave(S)
    of_token = self.model.embed_tokens(cells[:, fed * S :].clamp(min=0))
    x = of_token + self.model.channel_embedding(order.repeat(R - fed))
    mask = torch.where(self._visible(cells, fed * S), 0.0, torch.finfo(x.dtype).min)
    x = self.model(
      inputs_embeds=x,
      attention_mask=mask[:, None].to(x.dtype),
      position_ids=rows.expand(B, -1),
      past_key_values=cache,
      use_cache=cache is not None,
    ).last_hidden_state
    logits = self.lm_head(x).float().reshape(B, R - fed, S, -1)[:, :, order.argsort()]
    return logits.masked_fill((tokens[:, fed:] == HOLE)[..., None], 0.0)

  def _visible(self, cells, first) -> torch.Tensor:
    """Who sees whom: bool [B, queries from cell `first` on, keys], in attention order.

    A query sees itself, every row before its own, and of its own row as many cells, from the first
    on, as the model's rule says; but neither holes nor silence that the rule hides.
    """
    rule, S = self.config.msjax, len(self._names)
    key = torch.arange(cells.shape[1], device=cells.device)
    query = key[first:, None]
    seen_of_own_row = {
      "hidden": 0,
      "inputs": len(self._of_kind("input")),
      "ordered": query % S,
      "visible": S,
    }[rule["same_row"]]
    key_ok = cells != HOLE
    if rule["skip_silence"]:
      key_ok &= cells != rule["silence_id"]
    return (key < query // S * S + seen_of_own_row) & key_ok[:, None] | (key == query)

  # Streams, from the config.

  @property
  def _names(self) -> list[str]:
    return [stream["name"] for stream in self.config.msjax["streams"]]

  def _of_kind(self, *kinds: str) -> list[int]:
    return [s for s, stream in enumerate(self.config.msjax["streams"]) if stream["kind"] in kinds]

  @property
  def _order(self) -> list[int]:
    """Stream ids in attention order."""
    return self._of_kind("input") + self._of_kind("output", "internal")

  def _ids(self, name, ids) -> list[int]:
    """Checks what is to be read; a model without input streams is given text in any stream."""
    if name not in self._names:
      raise ValueError(f"stream {name!r} is unknown: there are {', '.join(self._names)}")
    inputs = [self._names[s] for s in self._of_kind("input")]
    if inputs and name not in inputs:
      raise ValueError(
        f"stream {name!r}: the model writes it; tokens can be put into {', '.join(inputs)}"
      )
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # of torch or NumPy
    is_token = lambda i: isinstance(i, int) and 0 <= i < self.config.vocab_size
    wrong = [i for i in ids if not is_token(i)] if isinstance(ids, list | tuple) else [ids]
    if wrong:
      raise ValueError(
        f"stream {name!r}: {wrong[0]!r} is no token; expected a list of ids from 0 to "
        f"{self.config.vocab_size - 1}"
      )
    return list(ids)


def _row(row: int) -> int:
  if not (isinstance(row, int) and row >= 0):
    raise ValueError(f"row {row!r}: expected a whole number, 0 or more")
  return row


class StreamQwen3ForCausalLM(StreamMixin, Qwen3ForCausalLM):
  """Qwen3 with streams."""


class StreamQwen2ForCausalLM(StreamMixin, Qwen2ForCausalLM):
  """Qwen2, and Qwen2.5, with streams."""


class StreamLlamaForCausalLM(StreamMixin, LlamaForCausalLM):
  """Llama with streams."""
