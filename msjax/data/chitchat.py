"""Real chats between two people, with the time of every message: the package `chitchat-dataset`.

Who speaks first is `user`, the other `assistant`. Messages without text are left out, and so are
conversations with one sender.
"""

import datetime
import itertools
import zlib

from absl import logging

from msjax.data.formats import Conversation, Message, Where
from msjax.errors import InputError

_HELD_OUT = 20  # one conversation in so many, by the hash of its id


def conversations() -> list[Conversation]:
  """Returns the conversations that have two senders, in the order of the package."""
  raw = _raw()
  found, messages, blank = [], 0, 0
  for name, conversation in raw.items():
    said = list(itertools.chain.from_iterable(conversation["messages"]))
    senders = list(dict.fromkeys(m["sender"] for m in said))
    if len(senders) != 2:
      continue
    with_text = [m for m in said if m["text"].strip()]
    messages, blank = messages + len(said), blank + len(said) - len(with_text)
    found.append(
      Conversation(
        tuple(_message(m, first_sender=senders[0]) for m in with_text),
        id=name,
        where=Where("chitchat-dataset", len(found) + 1),
      )
    )
  logging.info(
    "chitchat-dataset: %d of %d conversations have two senders; "
    "%d of their %d messages have no text and are left out",
    *(len(found), len(raw), blank, messages),
  )
  return found


def split(conversation_id: str) -> str:
  """Returns `train` or `valid`, always the same for an id."""
  return "valid" if zlib.crc32(conversation_id.encode()) % _HELD_OUT == 0 else "train"


def _message(raw: dict[str, str], first_sender: str) -> Message:
  """One message; its time in seconds since 1970."""
  return Message(
    role="user" if raw["sender"] == first_sender else "assistant",
    content=raw["text"],
    time=datetime.datetime.fromisoformat(raw["timestamp"]).timestamp(),
  )


def _raw() -> dict[str, dict]:
  """The package's own file: conversation id -> turns of messages."""
  try:
    import chitchat_dataset
  except ModuleNotFoundError:
    raise InputError(
      "chitchat: the package chitchat-dataset is not installed; run pip install -e '.[demo]'"
    ) from None
  return chitchat_dataset.Dataset()
