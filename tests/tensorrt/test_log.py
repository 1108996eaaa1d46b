"""Who gets which message of TensorRT's one logger."""

import gc
from types import ModuleType, SimpleNamespace

import pytest

from qat.tensorrt.log import BuildLog, Messages, messages_of

LEVELS = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


@pytest.fixture
def trt():
    class ILogger:
        pass

    for level in LEVELS:
        setattr(ILogger, level, level.lower())
    return SimpleNamespace(ILogger=ILogger)


@pytest.fixture
def messages(trt):
    return Messages(trt)


def test_a_build_gets_what_is_said_while_it_runs(messages):
    log = BuildLog()
    messages.logger.log("info", "before")
    with messages.recorded(log, verbose=True) as logger:
        logger.log("verbose", "tactic")
        logger.log("error", "no memory")
    messages.logger.log("info", "after")
    assert log == [("VERBOSE", "tactic"), ("ERROR", "no memory")]


def test_a_quiet_build_drops_verbose_messages_only(messages):
    log = BuildLog()
    with messages.recorded(log, verbose=False) as logger:
        for level in LEVELS:
            logger.log(level.lower(), level)
    assert [severity for severity, _ in log] == list(LEVELS[:-1])


def test_an_engine_hears_nothing_of_a_build(messages):
    engine = BuildLog()
    logger = messages.listen(engine, keep=10)
    with messages.recorded(BuildLog(), verbose=True):
        logger.log("error", "of the build")
    logger.log("error", "of the engine")
    assert engine == [("ERROR", "of the engine")]


def test_an_engine_keeps_the_last_messages(messages):
    engine = BuildLog()
    logger = messages.listen(engine, keep=2)
    for i in range(5):
        logger.log("warning", str(i))
    assert engine == [("WARNING", "3"), ("WARNING", "4")]


def test_listening_twice_records_once(messages):
    engine = BuildLog()
    messages.listen(engine, keep=5)
    messages.listen(engine, keep=5).log("warning", "once")
    assert engine == [("WARNING", "once")]


def test_an_engine_that_is_gone_does_not_stop_the_others(messages):
    gone, kept = BuildLog(), BuildLog()
    messages.listen(gone, keep=5)
    logger = messages.listen(kept, keep=5)
    del gone
    gc.collect()
    logger.log("warning", "still here")
    assert kept == [("WARNING", "still here")]


def test_a_failed_build_stops_recording(messages):
    log = BuildLog()
    with pytest.raises(KeyboardInterrupt), messages.recorded(log, verbose=True):
        raise KeyboardInterrupt
    messages.logger.log("info", "later")
    assert log == []


def test_a_process_has_one_logger_of_a_module(trt):
    module = ModuleType("tensorrt")
    module.ILogger = trt.ILogger
    assert messages_of(module).logger is messages_of(module).logger
