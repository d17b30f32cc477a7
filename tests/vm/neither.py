"""On a host with neither legacy tables nor nf_tables, and no way to load them: refuse, and say what each lacks."""

from __future__ import annotations

import pytest

from initd.errors import KernelError
from initd.kernel.select import pick


@pytest.mark.parametrize("choice", ["auto", "xtables", "nftables"])
def test_refused(choice):
    with pytest.raises(KernelError) as caught:
        pick(choice)
    print(f"VM: {caught.value}")
    assert caught.value.code == 71
    for name in ("xtables", "nftables"):
        assert (f"{name}: " in caught.value.message) == (choice in {"auto", name})
    assert "docs/portability.md" in str(caught.value)
