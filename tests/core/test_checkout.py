"""Python started in the checkout sees its folders as packages; that must not disturb anybody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("first", ["import levi_fast.kernels", "import transformers.integrations.hub_kernels"])
def test_the_folder_kernels_is_not_taken_for_the_package_of_that_name(first):
    script = (
        f"{first}; import kernels; assert 'levi_fast' not in vars(kernels) and not hasattr(kernels, '__version__'); "
        "from transformers.utils.import_utils import is_kernels_available; assert not is_kernels_available(); "
        "import levi_fast; print(type(levi_fast.backend_report()).__name__)"
    )
    if not (CHECKOUT / "kernels" / "__init__.py").is_file():
        pytest.skip("not run from a checkout")
    done = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "dict", done.stderr[-2000:]
