"""Import torchao without its start-up lines.

On a machine without its compiled extensions torchao 0.18 logs which of them it could not load, and
torch's pytree a deprecation that torchao causes. Neither concerns a user of this package. torchao's logger is
filtered for the duration of the import; levels and the root logger are left alone. pytree's keeps the filter for
that one line, which would else come later, when transformers imports more of torchao.
"""

import logging

_NOT_LOADED = ("Failed to load ", "Skipping import of cpp extensions")
_DEPRECATED = "register_constant() on Enum"


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(noise in message for noise in _NOT_LOADED)


def _is_not_of_torchao(record: logging.LogRecord) -> bool:
    return _DEPRECATED not in record.getMessage()


def import_torchao() -> None:
    """Import the parts of torchao that this package uses."""
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_of_torchao)
    logger = logging.getLogger("torchao")
    logger.addFilter(_is_news)
    try:
        import torchao.quantization
        import torchao.utils  # noqa: F401
    finally:
        logger.removeFilter(_is_news)
