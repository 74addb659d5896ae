"""Storage of Optuna's studies, with heartbeats of running trials."""

import os
import time
from pathlib import Path
from typing import Any

__all__ = ["open_storage"]

#: seconds between two heartbeats of a trial, and without one until the trial is run again
HEARTBEAT_S, GRACE_S = 10, 60


def open_storage(owner: str, storage: Any) -> Any:
    """Open a path or URL with heartbeats; return a storage of Optuna unchanged."""
    from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import DBAPIError

    if storage is None or isinstance(storage, BaseStorage):
        return storage
    url = os.fspath(storage)
    if "://" not in url:
        path = Path(url).absolute()
        if path.is_dir():
            raise ValueError(f"{owner}: storage must be an SQLite file, {url!r} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path}"
    for is_last in (False, False, True):
        try:
            return RDBStorage(
                url,
                # SQLite has one writer at a time: wait for the other processes
                {"connect_args": {"timeout": GRACE_S}} if url.startswith("sqlite") else {},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
            )
        except DBAPIError:  # Optuna fails if another process creates the tables at this moment
            if is_last:
                raise
            time.sleep(1)
