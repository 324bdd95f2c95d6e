"""The log of a run: held until its folder is known, appended to, and never what ends a run."""

import logging as std_logging
import re
import sys

import pytest
import tensorflow as tf
from absl import logging

from vit_dist.monitoring import log as log_lib
from vit_dist.monitoring.log import LOG_FILE, RunLog, detail


def lines_of(folder):
    """The lines of the log, without their times, which every message has."""
    text = (folder / LOG_FILE).read_text(encoding="utf-8")
    lines = re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text, flags=re.M).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("start: ")]
    assert starts[0] == 0
    return [line for line in lines if not line.startswith("start: ")]


def test_what_is_logged_before_the_folder_is_known_comes_first(tmp_path):
    with RunLog() as log:
        logging.warning("early %d", 1)
        detail("%s details", "early")
        log.open(tmp_path)
        detail("several\nlines, of 漢字")
        logging.error("late")
    expected = ["warning: early 1", "early details", "several", "lines, of 漢字", "error: late"]
    assert lines_of(tmp_path) == expected
    stamped = (tmp_path / LOG_FILE).read_text(encoding="utf-8")
    assert len(re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", stamped, re.M)) == 5


def test_lines_are_on_disk_at_once(tmp_path):
    with RunLog() as log:
        log.open(tmp_path)
        detail("now")
        assert lines_of(tmp_path) == ["now"]


def test_a_later_start_appends(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config", "a b.py"])
    for text in ("first", "second"):
        with RunLog() as log:
            log.open(tmp_path)
            detail(text)
    assert lines_of(tmp_path) == ["first", "second"]
    assert (tmp_path / LOG_FILE).read_text().count(" start: train --config 'a b.py' (process ") == 2


def test_a_process_that_opens_none_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog() as log:
        for _ in range(log_lib._MAX_HELD):
            detail("another host's")
        assert sum(map(len, log._held)) < 1.1 * log_lib._MAX_HELD
    assert not list(tmp_path.iterdir())


def test_details_do_not_reach_standard_error(tmp_path, capfd):
    detail("without a log")
    with RunLog() as log:
        log.open(tmp_path)
        detail("170 lines")
    assert capfd.readouterr() == ("", "")
    assert lines_of(tmp_path) == ["170 lines"]


def test_the_error_that_ends_a_run_is_there_with_its_traceback(tmp_path):
    with pytest.raises(ValueError, match="mistake"), RunLog() as log:
        log.open(tmp_path)
        raise ValueError("the mistake")
    lines = lines_of(tmp_path)
    assert lines[0] == "error: the run ends" and lines[-1] == "ValueError: the mistake"
    assert any("test_log.py" in line for line in lines)


def test_loggers_are_left_as_they_were():
    before = [list(logger.handlers) for logger in RunLog._loggers()]
    with RunLog():
        pass
    assert [list(logger.handlers) for logger in RunLog._loggers()] == before


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, monkeypatch, capsys):
    class Full:
        def add(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            raise AssertionError("closed after it has failed")

    monkeypatch.setattr(log_lib, "open_rows", lambda path: Full())
    with RunLog() as log:
        log.open(tmp_path)
        detail("first")
        std_logging.getLogger("absl").error("second")
    shown = capsys.readouterr().err
    assert shown.count("log.txt is incomplete") == 1 and "No space left on device" in shown


def test_a_log_that_cannot_be_opened_is_said_and_ends_nothing(tmp_path, capsys):
    (tmp_path / LOG_FILE).mkdir()
    with RunLog() as log:
        log.open(tmp_path)
        detail("lost")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / LOG_FILE} is incomplete: ")


def test_in_a_bucket(remote, bucket):
    with RunLog() as log:
        log.open(remote)
        detail("sent")
        detail("at the end")
    sent = (remote / LOG_FILE).read_text()
    assert re.findall(r"\d\d:\d\d:\d\d (.*)", sent)[1:] == ["sent", "at the end"]


def test_a_bucket_that_fails_ends_nothing(remote, bucket, capsys):
    bucket.refuse(403, r"POST .*log\.txt")
    with RunLog() as log:
        log.open(remote)
        detail("lost")
    assert "log.txt is incomplete" in capsys.readouterr().err
    assert not tf.io.gfile.exists(str(remote / LOG_FILE))
