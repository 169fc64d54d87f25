"""The model card of an export: what it is, how it is used, what it was trained with."""

import json
from typing import Any

from msjax.streams import Streams

_USE = {
  "stream": """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
end = [tokenizer.eos_token_id] if model.config.msjax["end_token"] else []  # as in training
text = tokenizer.encode("Hello!", add_special_tokens=False) + end
rows = model.generate_streams({{{stream!r}: text}}, rows=32)
for row in rows:  # rows.send({{name: ids}}) puts in a word and returns the next row
  print({{name: tokenizer.decode(id) for name, id in row.items()}})
```
Without `trust_remote_code` it loads as the plain language model that it was made of; the tensor
`model.channel_embedding.weight` is then unexpected, and unused.
""",
  "folded": """
A plain language model: that of the stream `{stream}` alone, whose embedding is added to every
token's. It loads wherever models of its family do.
""",
  "reference": """
Laid out for the code of the official release of multi-stream models.
""",
}


_TRAINING = """
## Training
```json
{}
```
"""


def write(
  license_: list[str], layout: str, streams: Streams, stream: str, training: dict[str, Any]
) -> str:
  """Returns README.md.

  Args:
    license_: what the card of the model this one was made of says of it, as `license_of` has it.
    layout: of the export.
    streams: of the model.
    stream: the one that is folded in, or else one that reads.
    training: the run's config; nothing where it was not trained.
  """
  lines = [
    *license_,
    "library_name: transformers",
    "pipeline_tag: text-generation",
    "tags: [multi-stream, msjax]",
  ]
  rows = [f"| {i} | {s.name} | {s.kind} | {s.weight:g} |" for i, s in enumerate(streams.streams)]
  table = "\n".join(["| id | stream | kind | loss weight |", "|---|---|---|---|", *rows])
  front = "\n".join(lines)
  return f"""---
{front}
---
# A multi-stream language model

In every row each stream has one token; input streams are read, the others written, each seeing all
rows before (same row: `{streams.same_row}`). Token {streams.silence_id} is silence.

{table}

## Use
{_USE[layout].format(stream=stream).strip()}
{_TRAINING.format(json.dumps(training, indent=2)) if training else ""}"""


def license_of(card: bytes) -> list[str]:
  """Returns the lines on the license in a model card's front matter, its name and link included."""
  lines = [line.rstrip() for line in card.decode(errors="replace").splitlines()]
  if not lines or lines[0] != "---":
    return []
  front = lines[1 : lines.index("---", 1)] if "---" in lines[1:] else []
  keys = ("license:", "license_name:", "license_link:")
  return [line for line in front if line.startswith(keys) and not line.endswith(":")]
