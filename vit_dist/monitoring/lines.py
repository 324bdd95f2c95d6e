"""How a logged message reads for people: the message alone, with "warning:" before a warning."""

import logging as std_logging


class LineFormatter(std_logging.Formatter):
    """Formats "warning: masked: 3.jpg"; information has no such prefix. `times` adds the time."""

    def __init__(self, *, times: bool = False):
        super().__init__("%(asctime)s %(message)s" if times else "%(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: std_logging.LogRecord) -> str:  # noqa: N802
        """Overrides that of logging.Formatter."""
        # Only the copy in `message` changes; every handler formats the record again from `msg`.
        if record.levelno > std_logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)
