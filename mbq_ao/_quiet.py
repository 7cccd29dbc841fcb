"""torchao's first import prints what it found of its C++ extensions, and a deprecation inside torch.

Neither concerns a user of this package: no kernel of ours is in those extensions. Both come through logging, so a
filter is enough; the root logger and `warnings` are left alone. It is lifted again at the end, but for the one line
that would else come later, when transformers imports more of torchao.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_NOT_LOADED = ("Failed to load ", "Skipping import of cpp extensions")
_DEPRECATED = "register_constant() on Enum"


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOT_LOADED)


def _is_not_of_torchao(record: logging.LogRecord) -> bool:
    return _DEPRECATED not in record.getMessage()


@contextmanager
def quiet() -> Iterator[None]:
    """Without these lines, whatever imports torchao inside."""
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_of_torchao)
    logger = logging.getLogger("torchao")
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.removeFilter(_is_news)


def import_torchao() -> None:
    """Import the parts of torchao that this package uses."""
    with quiet():
        import torchao.quantization
        import torchao.utils  # noqa: F401
