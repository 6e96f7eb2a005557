"""What can go wrong, and how a command ends then. The exit codes are the same for every stage and command.

| code | what happened | raised as |
|---|---|---|
| 0 | the work is done | |
| 1 | the work failed; the message says what, why, and what to do | WorkError |
| 2 | the usage or the configuration cannot work; nothing was begun | ConfigError |
| 130 | interrupted by Ctrl-C; the same command continues | KeyboardInterrupt |

What a model replies is never an error: a reply that cannot be read is recorded with its reason. Anything else that
leaves a command is a fault of this program, and is shown as a traceback.
"""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn


class ConfigError(Exception):
    """The configuration cannot work; the message says which key, and what would be right. Exit code 2."""


class WorkError(Exception):
    """The work failed; the message says what, why, and what to do. Exit code 1."""


class OutOfMoney(WorkError):
    """No more may be spent: the work ends here, and can go on later."""


class LimitReached(OutOfMoney):
    """All that the settings allow is spent; the account may have more."""


class NoAnswer(Exception):
    """An endpoint gave no usable answer to one request, after all retries. Other requests may do better."""


class OutOfBounds(Exception):
    """Training has left the bounds that the settings give; the message says which. What was best until then is kept."""


def guarded(application: Callable[..., None]) -> None:
    """Call it, and exit with the code that its end deserves."""
    try:
        application()
    except (ConfigError, WorkError) as error:
        fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _stop(f"the disk is full ({error}); make room and run the same command again", 1)
    except KeyboardInterrupt:
        # DVC itself ignores Ctrl-C and waits: exit code 0 would make it lock a partial output.
        _stop("interrupted; run the same command again to continue", 130)


def fail(error: ConfigError | WorkError) -> NoReturn:
    """Say it, and exit with its code."""
    _stop(str(error), 2 if isinstance(error, ConfigError) else 1)


def _stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
