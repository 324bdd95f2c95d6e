"""How a logged message reads for people: the message, and before a warning the word."""

import logging as std_logging


class LineFormatter(std_logging.Formatter):
    """ "warning: masked: 3.jpg"; information has no such word, and the time only if asked for."""

    def __init__(self, *, times: bool = False):
        super().__init__("%(asctime)s %(message)s" if times else "%(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: std_logging.LogRecord) -> str:  # noqa: N802
        """Overrides that of logging.Formatter."""
        if record.levelno > std_logging.INFO:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)
