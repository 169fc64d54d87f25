"""Model cards, as the hub reads them."""

import huggingface_hub
import pytest

from msjax.hub import card
from msjax.streams import Stream, Streams

STREAMS = Streams((Stream("user", "input", 0.0), Stream("say", "output", 0.5)), 7, "inputs")


@pytest.mark.parametrize(
  ("written", "license_"),
  [
    (b"---\nlibrary_name: x\nlicense: mit\ntags: [a]\n---\n# Text\n", ["license: mit"]),
    (b"---\r\nlicense: mit\r\n---\r\n", ["license: mit"]),
    (
      b"---\nlicense_link: x.y/z\nbase_model: b\nlicense: other\nlicense_name: own\n---\n",
      ["license_link: x.y/z", "license: other", "license_name: own"],
    ),
    (b"---\nbase_model: b\n---\nlicense: of the text\n", []),
    (b"---\nlicense:\n---\n", []),
    (b"# A card\n---\nlicense: mit\n---\n", []),
    (b"---\nlicense: mit\n", []),  # front matter that does not end
    (b"\xff\xfe", []),
    (b"", []),
  ],
)
def test_the_license_stands_in_the_front_matter(written, license_):
  assert card.license_of(written) == license_


@pytest.mark.parametrize("license_", [["license: other", "license_name: own"], []])
def test_the_hub_reads_what_a_card_says(license_):
  text = card.write(license_, "stream", STREAMS, "user", {"train": {"steps": 3}})
  data = huggingface_hub.ModelCard(text).data
  named = [
    f"{name}: {data[name]}" for name in ("license", "license_name") if name in data.to_dict()
  ]
  assert (named, data.library_name) == (license_, "transformers")
  assert (data.pipeline_tag, data.tags) == ("text-generation", ["multi-stream", "msjax"])
  assert card.license_of(text.encode()) == license_
  assert "| 0 | user | input | 0 |\n| 1 | say | output | 0.5 |" in text
  assert "`inputs`" in text and "Token 7 is silence" in text and '"steps": 3' in text


@pytest.mark.parametrize(
  ("layout", "told"),
  [
    ("stream", "generate_streams({'user': "),
    ("folded", "the stream `user` alone"),
    ("reference", "the official release"),
  ],
)
def test_every_layout_tells_its_use(layout, told):
  assert told in card.write([], layout, STREAMS, "user", {})
