"""Import torchao without its start-up lines.

On a machine without its compiled extensions torchao 0.18 logs which of them it could not load, and
torch's pytree a deprecation that torchao causes. Neither concerns a user of this package. The two
loggers are filtered for the duration of the import; levels and the root logger are left alone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = ("Failed to load ", "Skipping import of cpp extensions", "register_constant() on Enum")
_LOGGERS = ("torchao", "torch.utils._pytree")


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOISE)


@contextmanager
def quiet() -> Iterator[None]:
    """Without these lines, whatever imports torchao inside."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


def import_torchao() -> None:
    """Import the parts of torchao that this package uses."""
    with quiet():
        import torchao.quantization
        import torchao.utils  # noqa: F401
