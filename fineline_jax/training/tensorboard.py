"""TensorBoard's event files, written by the thread that calls.

`tensorboardX.SummaryWriter` leaves it to a thread, which a full disk ends without a word; the run then waits for ever
until that thread takes its next event.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]


class TensorBoard:
    """A new event file in `folder`; what older files hold from `step` on is hidden. Its functions raise OSError."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(step=step, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """With the operating system when it returns."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
