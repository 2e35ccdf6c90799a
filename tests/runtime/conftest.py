import pytest

from tests.runtime.native_models import VARIANTS
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return {
        name: save_tiny(root / name.replace(" ", "-"), family, **changes)
        for name, (family, changes) in VARIANTS.items()
    }
