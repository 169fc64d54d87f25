"""What one session reads at once, by itself."""

import collections
import dataclasses

import numpy as np

from msjax.decoding import tick
from msjax.decoding.prepared import Prepared
from msjax.decoding.session import Session
from msjax.decoding.tick import State


class Reader:
  """Reads the block of a session, or what it keeps when it slides.

  Attributes:
    session: that reads.
    state: of it alone.
    before: where it slides, the state before, of which all but the cache goes on; else None.
  """

  def __init__(
    self,
    model: Prepared,
    session: Session,
    state: State,
    at_once: int,
    slide: tuple[list[np.ndarray], State] | None,
  ):
    """Begins with a state of one session; or, where it slides, with rows that are kept and the
    state `before`, of which all but the cache goes on."""
    self.model, self.session, self._at_once = model, session, at_once
    kept, self.before = slide or ([], None)
    self._kept = collections.deque(kept)
    self._fed = 0 if slide else session.context
    self.state = state
    self._make_room(len(kept) if slide else session.block_rows)

  @property
  def is_done(self) -> bool:
    """Whether nothing is left to read."""
    return not (self._kept if self.before else self.session.block_rows)

  def read(self) -> None:
    """Reads the next rows."""
    if self.before:
      count = min(self._at_once, len(self._kept))
      self._feed(np.stack([self._kept.popleft() for _ in range(count)]))
      if self.is_done:
        self.state = dataclasses.replace(self.before, cache=self.state.cache)
        self.session.slid()
    else:
      block = self.session.next_block(self._at_once)
      self._feed(block)
      self.session.had_block(block)

  def _make_room(self, rows: int) -> None:
    cells = (self._fed + rows + self._at_once) * len(self.session.streams)
    self.state = self.state.grown(cells)

  def _feed(self, block: np.ndarray) -> None:
    self._make_room(0)  # the block may have become longer
    self._fed += len(block)
    rows = np.zeros((1, self._at_once, block.shape[1]), np.int32)
    rows[0, : len(block)] = block
    count = np.array([len(block)], np.int32)
    since = max(policy.silence.since for policy in self.session.setting.policies)
    since = np.array([since], np.int32)
    self.state = tick.prefill(self.model, self.state, rows, count, since)
