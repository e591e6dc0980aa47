from pathlib import Path
from collections.abc import Callable
def is_hub_id(text: str) -> bool:
    return False
def download_hub(text: str, *, notify: Callable[[str], None]) -> Path:
    raise NotImplementedError
