"""What policies refuse, and how they are lined up for the devices."""

import json

import numpy as np
import pytest

from msjax.decoding.policy import Knobs, Policy, Silence, by_stream
from msjax.errors import InputError


@pytest.mark.parametrize(
  ("policy", "message"),
  [
    (Policy(temperature=-0.1), "temperature: -0.1; expected 0 or more"),
    (Policy(temperature=float("nan")), "temperature: nan; expected 0 or more"),
    (Policy(temperature="hot"), "temperature: 'hot'; expected a number"),
    (Policy(top_k=2.5), "top_k: 2.5; expected a whole number"),
    (Policy(silence=8), "silence: 8; expected a Silence"),
    (Policy(silence=Silence(ramp=None)), "silence.ramp: None; expected a whole number"),
    (Policy(top_k=-1), r"top_k: -1; expected 0 \(all\) or more"),
    (Policy(top_p=0), "top_p: 0; expected more than 0, at most 1"),
    (Policy(min_p=1.0), "min_p: 1.0; expected 0 or more, less than 1"),
    (Policy(repetition_penalty=0), "repetition_penalty: 0; expected more than 0"),
    (Policy(presence_penalty=float("inf")), "presence_penalty: inf; expected a number"),
    (Policy(logit_bias={20: 1.0}), "logit_bias: 1.0 for token 20; expected .* tokens 0 to 19"),
    (Policy(silence=Silence(ramp=0)), "silence.ramp: 0; expected 1 row or more"),
    (Policy(silence=Silence(duty=1.5)), "silence.duty: 1.5; expected 0 to 1"),
    (Policy(silence=Silence(since=-1)), "silence.since: -1; expected row 0 or later"),
    (
      Policy(silence=Silence(shares=(0.5, 2.0))),
      r"silence.shares: \(0.5, 2.0\); expected 0 to 1 each",
    ),
    (
      Policy(silence=Silence(shortest=5, longest=3)),
      r"silence.shortest: 5 rows; expected at most silence.longest \(3\)",
    ),
  ],
)
def test_what_is_out_of_range_is_refused(policy, message):
  with pytest.raises(InputError, match=f"^session 1, stream 'user': {message}"):
    policy.check("session 1, stream 'user'", 20)
  Policy().check("", 20)


def test_every_field_finds_its_place():
  silence = Silence(1.0, 2, True, True, 3, 4, 0.5, 6, (0.5, 0.25, 1.0))
  odd = Policy(0.1, 5, 0.6, 0.7, 1.8, 0.9, {3: 1.0, 1: 2.0, 2: -1.0}, silence, True)
  knobs = Knobs.of([[Policy(), odd], [odd, Policy()]])
  fields = "temperature top_k top_p min_p repetition_penalty presence_penalty ablated"
  for name in fields.split():
    one, other = getattr(Policy(), name), getattr(odd, name)
    np.testing.assert_allclose(getattr(knobs, name), [[one, other], [other, one]], rtol=1e-6)
  for name in ["penalty", "ramp", "lead", "while_read", "shortest", "longest", "duty", "since"]:
    one, other = getattr(Silence(), name), getattr(silence, name)
    np.testing.assert_array_equal(getattr(knobs, name), [[one, other], [other, one]])
  assert knobs.bias_ids[0].tolist() == [[-1] * 4, [1, 2, 3, -1]]
  assert knobs.bias[0].tolist() == [[0] * 4, [2, -1, 1, 0]]
  assert knobs.shares[0].tolist() == [[-1] * 16, [0.5, 0.25] + [1] * 14]


# Words of a command.

NAMES = ("user", "think", "output")


def test_words_change_policies_by_stream():
  words = ["temperature=0.5,top_k=9", "think:silence.longest=8,ablated=TRUE", "think:top_k=3"]
  found = by_stream(words, NAMES, Policy(top_p=0.9))
  assert tuple(found) == NAMES
  assert found["output"] == found["user"] == Policy(0.5, 9, 0.9)
  assert found["think"] == Policy(0.5, 3, 0.9, silence=Silence(longest=8), ablated=True)
  assert by_stream([], NAMES)["user"] == Policy()


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("temprature=1", "policy 'temprature=1': expected NAME=VALUE, .*; did you mean 'temperature'"),
    ("top_k", "policy 'top_k': expected NAME=VALUE, NAME one of temperature, top_k,"),
    ("top_k=1.5", "policy 'top_k=1.5': expected a whole number"),
    ("top_p=x", "policy 'top_p=x': expected a number"),
    ("ablated=1", "policy 'ablated=1': expected true or false"),
    ("silence.ramps=1", "did you mean 'silence.ramp'"),
    ("logit_bias=1", "policy 'logit_bias=1': expected NAME=VALUE"),
    ("thnk:top_k=1", "policy 'thnk:top_k=1': stream 'thnk' is unknown: .*; did you mean 'think'"),
  ],
)
def test_words_that_say_nothing_are_refused(word, message):
  with pytest.raises(InputError, match=message):
    by_stream([word], NAMES)


def test_policies_go_through_json():
  policy = Policy(0.5, logit_bias={3: -1.5}, silence=Silence(2.0, 5, lead=True), ablated=True)
  assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
