"""Every adapter method that PEFT knows is served, or refused by name with a reason."""

from __future__ import annotations

import pytest
from peft import PeftType

from heddle_adapters.adapter_config import CONFIG_FILE, AdapterConfig
from heddle_adapters.errors import InvalidAdapter
from heddle_adapters.method import METHODS, method_of
from heddle_adapters.methods.refused_methods import REFUSED_METHODS


def test_every_method_of_peft_is_served_or_refused_by_name() -> None:
    assert {str(each.value) for each in PeftType} <= METHODS.keys() | REFUSED_METHODS.keys()
    assert METHODS.keys().isdisjoint(REFUSED_METHODS)


@pytest.mark.parametrize("peft_type", REFUSED_METHODS)
def test_a_refusal_says_why_and_what_to_do(peft_type: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        method_of(AdapterConfig({"peft_type": peft_type}))
    assert caught.value.message.startswith(f"{CONFIG_FILE}: peft_type is '{peft_type}', which is not served: ")
    assert any(remedy in caught.value.message for remedy in ("train one", "convert", "upload"))
    assert caught.value.message.endswith(".")
    assert caught.value.param == CONFIG_FILE
