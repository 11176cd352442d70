"""The server of ``actstore serve``. Needs the extra ``serve``."""
