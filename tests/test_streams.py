"""The rule against a word for word transcription, over random streams, holes and segments."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msjax.errors import InputError
from msjax.streams import HOLE, KINDS, SAME_ROW, Stream, Streams

ROWS, SILENCE = 5, 3
TOKENS = (HOLE, SILENCE, 0, 7)


def stream_set(*kinds, **rule):
  specs = (f"{kind} {i}:{kind}" for i, kind in enumerate(kinds))
  return Streams(tuple(map(Stream.parse, specs)), SILENCE, **rule)


@st.composite
def grids(draw):
  """Streams, tokens [2, R, S] and segments [2, R] (or None), all at random."""
  kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
  streams = stream_set(
    *kinds, same_row=draw(st.sampled_from(SAME_ROW)), skip_silence=draw(st.booleans())
  )
  count = 2 * ROWS * len(kinds)
  tokens = draw(st.lists(st.sampled_from(TOKENS), min_size=count, max_size=count))
  segments = draw(st.none() | st.tuples(segmentations(), segmentations()))
  tokens = np.array(tokens, np.int32).reshape(2, ROWS, len(kinds))
  return streams, tokens, segments and np.array(segments, np.int32)


@st.composite
def segmentations(draw):
  """Segment numbers [R]: runs of rows, numbered in any order."""
  starts = draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
  numbers = draw(st.permutations(range(ROWS + 1)))
  return [numbers[n] for n in np.cumsum(starts)]


def attention_order(streams):
  """Stream ids of a row: inputs first, then the others, each by id."""
  return sorted(range(len(streams)), key=lambda s: (streams.streams[s].kind != "input", s))


def sees(streams, tokens, segments, q, k):
  """`Who sees whom` of one grid [R, S], word for word; q and k are (row, stream)."""
  if tokens[k] == HOLE:
    return False
  if segments is not None and segments[k[0]] != segments[q[0]]:
    return False
  if streams.skip_silence and tokens[k] == SILENCE and k != q:
    return False
  if k == q or k[0] < q[0]:
    return True
  if k[0] > q[0]:
    return False
  order = attention_order(streams)
  return {
    "hidden": False,
    "inputs": streams.streams[k[1]].kind == "input",
    "ordered": order.index(k[1]) < order.index(q[1]),
    "visible": True,
  }[streams.same_row]


def brute_force(streams, tokens, segments):
  """The rule as [B, L, L] in attention order."""
  cells = [(r, s) for r in range(tokens.shape[1]) for s in attention_order(streams)]
  segments = [None] * len(tokens) if segments is None else segments
  return np.array(
    [
      [[sees(streams, grid, segment, q, k) for k in cells] for q in cells]
      for grid, segment in zip(tokens, segments)
    ]
  )


@settings(deadline=None, max_examples=40)
@given(grids())
def test_cells_see_whom_the_rule_says(grid):
  streams, tokens, segments = grid
  seen = np.asarray(streams.visibility(tokens, segments).dense())
  is_token = np.asarray(streams.to_attention(tokens)) != HOLE  # holes make no query
  np.testing.assert_array_equal(seen[is_token], brute_force(streams, tokens, segments)[is_token])
  assert seen.diagonal(axis1=1, axis2=2).all()  # no softmax is empty, not even a hole's


@settings(deadline=None, max_examples=30)
@given(grids(), st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), st.booleans())
def test_a_row_sees_the_cache_as_it_sees_the_grid(grid, row, other_row, stale):
  streams, tokens, _ = grid
  S = len(streams)
  rows = np.array([row, other_row])  # sessions need not be equally far
  cells = np.arange((ROWS + 1) * S)  # a cache has room left
  key_ok = np.full((2, cells.size), stale)
  key_ok[:, : ROWS * S] = streams.key_ok(tokens)
  key_ok = np.where(cells < (rows[:, None] + 1) * S, key_ok, stale)
  seen = streams.visibility_in_cache(
    tokens[[0, 1], rows][:, None], jnp.asarray(rows), key_ok
  ).dense()
  whole = np.asarray(streams.visibility(tokens).dense()).reshape(2, ROWS, S, -1)
  np.testing.assert_array_equal(np.asarray(seen)[..., : ROWS * S], whole[[0, 1], rows])
  assert not np.any(seen[..., ROWS * S :])


@settings(deadline=None, max_examples=30)
@given(grids())
def test_positions_count_the_rows_of_a_segment(grid):
  streams, tokens, segments = grid
  positions = np.asarray(streams.positions(tokens, segments))
  assert positions.shape == tokens.shape
  assert positions.dtype == np.int32
  for b, r, s in np.ndindex(tokens.shape):
    first = r
    while first and (segments is None or segments[b, first - 1] == segments[b, r]):
      first -= 1
    assert positions[b, r, s] == r - first


@settings(deadline=None, max_examples=40)
@given(grids(), st.sampled_from((0.0, 0.25, 1.0)), st.booleans())
def test_a_cell_predicts_the_next_of_its_stream(grid, silence_weight, weighted):
  streams, tokens, segments = grid
  of_stream = 0.5 + np.arange(len(streams), dtype=np.float32)
  streams = Streams(
    tuple(Stream(s.name, s.kind, float(w)) for s, w in zip(streams.streams, of_stream)), SILENCE
  )
  data = 1 + np.arange(tokens.size, dtype=np.float32).reshape(tokens.shape) if weighted else None
  labels, weights = map(np.asarray, streams.labels(tokens, segments, data, silence_weight))
  assert (labels.dtype, weights.dtype) == (np.int32, np.float32)
  for b, r, s in np.ndindex(tokens.shape):
    label, weight = HOLE, 0.0
    if r + 1 < ROWS and (segments is None or segments[b, r] == segments[b, r + 1]):
      following = tokens[b, r + 1, s]
      if tokens[b, r, s] != HOLE and following != HOLE:
        label, weight = following, of_stream[s]
        weight *= data[b, r + 1, s] if weighted else 1
        weight *= silence_weight if following == SILENCE else 1
    assert labels[b, r, s] == label
    assert weights[b, r, s] == np.float32(weight)


@pytest.mark.parametrize("same_row", SAME_ROW)
def test_lag_is_what_the_rule_allows(same_row):
  streams = stream_set("output", "input", "internal", same_row=same_row)
  seen = np.asarray(streams.visibility(np.zeros((1, ROWS, 3), np.int32)).dense())[0]
  seen = seen.reshape(ROWS, 3, ROWS, 3)  # [row, place, row, place]
  heard = [seen[r, 1, 0, 0] for r in range(ROWS)]  # the output sees the input's first token
  assert streams.lag == heard.index(True) + 1  # what it then computes is the next row's cell


@pytest.mark.parametrize("same_row", SAME_ROW)
def test_lag_between_streams_is_what_the_rule_allows(same_row):
  streams = stream_set("output", "input", "internal", "input", same_row=same_row)
  seen = np.asarray(streams.visibility(np.zeros((1, ROWS, 4), np.int32)).dense())[0]
  seen = seen.reshape(ROWS, 4, ROWS, 4)
  for i, target in enumerate(streams.order):
    for j, source in enumerate(streams.order):
      heard = [seen[r, i, 0, j] for r in range(ROWS)].index(True)
      assert streams.lag_between(source, target) == heard + 1


def test_inputs_come_first_in_attention():
  streams = stream_set("output", "input", "internal", "input")
  assert streams.order == (1, 3, 0, 2)
  grid = jnp.array([[[10, 11, 12, 13], [20, 21, 22, 23]]])
  np.testing.assert_array_equal(streams.to_attention(grid), [[11, 13, 10, 12, 21, 23, 20, 22]])


@pytest.mark.parametrize("kinds", [("input", "output"), ("output", "input", "internal", "input")])
def test_attention_order_is_undone(kinds):
  streams = stream_set(*kinds)
  grid = np.random.default_rng(0).normal(size=(2, ROWS, len(kinds), 3)).astype(np.float32)
  cells = streams.to_attention(grid)
  assert cells.shape == (2, ROWS * len(kinds), 3)
  np.testing.assert_array_equal(streams.from_attention(cells), grid)


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("user:input", ("user", "input", 0.0)),
    ("output:output", ("output", "output", 1.0)),
    ("think:internal", ("think", "internal", 1.0)),
    ("user:input:0.5", ("user", "input", 0.5)),
    ("think:plan:internal", ("think:plan", "internal", 1.0)),
    ("think:plan:internal:2", ("think:plan", "internal", 2.0)),
    ("a:input:output", ("a:input", "output", 1.0)),
    ("input:input", ("input", "input", 0.0)),
    ("schrieb 2:output:0", ("schrieb 2", "output", 0.0)),
  ],
)
def test_specs_are_read(spec, expected):
  assert Stream.parse(spec) == Stream(*expected)


@pytest.mark.parametrize(
  ("spec", "told"),
  [
    ("user", "'user'.*name:kind"),
    (":input", "':input'.*name:kind"),
    (":input:1", "':input:1'.*name:kind"),
    ("", "name:kind"),
    ("user:inptu", "'inptu'.*did you mean 'input'"),
    ("user:input:much", "'much' is no number"),
    ("user:input:", "'' is no number"),
    ("user:input:-1", "-1.*not negative"),
    ("user:input:nan", "nan.*finite"),
    ("user:input:inf", "inf.*finite"),
  ],
)
def test_bad_specs_are_told(spec, told):
  with pytest.raises(InputError, match=told):
    Stream.parse(spec)


@given(
  st.text(min_size=1), st.sampled_from(KINDS), st.floats(0, allow_infinity=False, allow_nan=False)
)
def test_specs_round_trip(name, kind, weight):
  stream = Stream(name, kind, weight)
  assert Stream.parse(str(stream)) == stream


def test_bad_streams_are_told():
  user = Stream.parse("user:input")
  with pytest.raises(InputError, match="at least one"):
    Streams((), SILENCE)
  with pytest.raises(InputError, match="'user' stands twice"):
    Streams((user, user), SILENCE)
  with pytest.raises(InputError, match=r"'hiden' is none of.*did you mean 'hidden'"):
    Streams((user,), SILENCE, same_row="hiden")
  with pytest.raises(InputError, match="'usr' is unknown: there are user; did you mean 'user'"):
    Streams((user,), SILENCE).id("usr")


def test_names_kinds_and_weights_go_by_id():
  streams = Streams(
    tuple(map(Stream.parse, ("out:output", "user:input", "plan:internal:3"))), SILENCE
  )
  assert len(streams) == 3
  assert streams.names == ("out", "user", "plan")
  assert streams.id("plan") == 2
  assert streams.of_kind("internal", "output") == (0, 2)
  np.testing.assert_array_equal(streams.weights, np.array([1, 0, 3], np.float32))


@settings(deadline=None)
@given(grids())
def test_json_round_trips(grid):
  streams, _, _ = grid
  again = Streams.from_json(json.loads(json.dumps(streams.to_json())))
  assert again == streams
  assert hash(again) == hash(streams)  # static under jit


@pytest.mark.parametrize(
  ("edit", "told"),
  [
    ({"streams": [{"name": "a", "kind": "inputs", "weight": 1}]}, "'inputs'.*mean 'input'"),
    ({"streams": [{"name": "a", "kind": "input", "weight": "1"}]}, "weight '1'; expected a num"),
    ({"streams": [{"name": "", "kind": "input", "weight": 1}]}, "stream '': expected a name"),
    ({"streams": [{"name": "a", "kind": "input"}]}, r"streams.json: .*missing.*'weight'"),
    ({"silence_id": None}, "silence_id None; expected the id of a token"),
  ],
)
def test_json_edited_by_hand_is_checked(edit, told):
  with pytest.raises(InputError, match=told):
    Streams.from_json({**stream_set("output").to_json(), **edit})


def test_json_that_lacks_a_field_is_told():
  data = stream_set("output").to_json()
  del data["same_row"]
  with pytest.raises(InputError, match=r"streams.json: .same_row.; expected what msjax wrote"):
    Streams.from_json(data)


def test_json_of_another_version_is_told():
  data = stream_set("output").to_json()
  with pytest.raises(InputError, match="format_version 99, this msjax reads 1"):
    Streams.from_json({**data, "format_version": 99})


# Positions that are given.

TWO = stream_set("input", "output")


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_positions_may_stand_still_jump_and_start_again_in_each_segment(array):
  tokens = array(np.ones((1, 4, 2), np.int32))
  positions = array([[[0, 3], [0, 7], [0, 0], [5, 0]]])
  segments = array(np.array([[0, 0, 1, 1]], np.int32))
  TWO.check_positions(positions, tokens, segments)
  TWO.check_positions(TWO.positions(tokens, segments), tokens, segments)


def test_positions_may_not_run_backwards_in_a_segment():
  tokens = np.ones((1, 3, 2), np.int32)
  positions = np.array([[[0, 3], [0, 7], [1, 6]]], np.int32)
  with pytest.raises(InputError, match=r"positions: shape \(1, 3, 2\), 6 at \(0, 2, 1\)"):
    TWO.check_positions(positions, tokens)
  tokens[0, 1, 1] = HOLE  # what stands at a hole means nothing
  TWO.check_positions(positions, tokens)
  with pytest.raises(InputError, match=r"positions: shape \(1, 2, 2\); expected \(1, 3, 2\)"):
    TWO.check_positions(positions[:, :2], tokens)
